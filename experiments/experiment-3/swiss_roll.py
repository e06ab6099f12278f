"""Experiment 3: a network learns E[x_0 | x_t] on the Swiss roll; DDPM and DDIM sample with it.

The claim
    A fully connected ReLU network is trained by weighted least squares to predict x_0 from
    x_t = x_0 + N(0, sigma_q^2 t I). What it learns is the denoiser E[x_0 | x_t], and eq. (24)
        E[x_{t-dt} | x_t] = (dt / t) E[x_0 | x_t] + (1 - dt / t) x_t
    turns that into the reverse mean, which is all that DDPM and DDIM need.

The truth beside it
    The data lies on a curve, so E[x_0 | x_t] is an average along the curve: `exact_denoiser`. Its
    squared error at t is the least that any denoiser can have, the Bayes error; what a network has
    more is its excess. The training loss weighs the errors at all t: its least value is known too.
    Each sample has a twin: the same start, the same noise, the exact denoiser. How far apart they
    are is what the network's error does to samples; what both get wrong (too few steps, a base that
    is not p_1) it does not show.

What to look for in figures/
    data-to-noise-and-back.jpg   noise is added to data (above), DDIM starts from noise (below): is
                                 it the same cloud at each t? Are they the same points?
    data.jpg                     the curve
    train_loss.jpg               where does the loss start, and where does it stop?
    learned-vs-exact.jpg         arrows from x_t to E[x_0|x_t], exact and learned; in colour, how
                                 far their heads are apart: where does the network err?
    eval_ddpm_samples.jpg        DDPM and its twins: what have both that the data has not?
    eval_ddim_samples.jpg        DDIM and its twins; lines join those that are far apart

Try this
    python swiss_roll.py --train-steps 300    is it bad near the data, or in the noise?
    python swiss_roll.py --num-steps 20       few steps: do samples part from their twins?
    python swiss_roll.py --sigma-q 4          how wide is DDPM's last noise now?
"""

import math
import os
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from functools import partial
from itertools import zip_longest
from pathlib import Path

os.environ["MPLBACKEND"] = "agg"  # figures are files, also from a notebook

import matplotlib.pyplot as plt
import torch
from matplotlib.colors import LogNorm
from torch import nn
from torch.autograd.functional import jvp
from tqdm import tqdm

# ------------------------------------------- The data -------------------------------------------
# Another curve: other START, END and curve. All that follows is computed from them.
START, END = math.pi / 2, 4 * math.pi  # the angles at which the roll starts and ends


def curve(theta):
    """The Swiss roll at the angles theta, (n,): radius theta / (4 pi).  Returns (n, 2)."""
    direction = torch.stack([theta.cos(), theta.sin()], dim=1)
    return direction * theta[:, None] / (4 * math.pi)


THETA = torch.linspace(START, END, 1000)
SPEED = jvp(curve, THETA, torch.ones_like(THETA))[1].norm(dim=-1).max().item()  # |dx / dtheta|
SPREAD = curve(THETA).std(dim=0).norm().item()  # root mean square distance from the mean


def faults():
    """What this script cannot do with the curve, a line each."""
    points = curve(THETA)
    right = points.shape == (len(THETA), 2) and points.isfinite().all() and START < END and SPEED
    return [] if right else ["curve(theta) must be a curve in the plane, from START up to END"]


def swiss_roll(n, rng):
    """n draws of x_0: theta uniform on [START, END], no noise.  rng: a torch Generator.  (n, 2)"""
    return curve(START + (END - START) * torch.rand(n, generator=rng))


def add_noise(x_0, t, sigma_q, rng):
    """x_t = x_0 + N(0, sigma_q^2 t I).  x_0: (n, d);  t: a float or (n, 1).  Returns (n, d)."""
    return x_0 + sigma_q * t**0.5 * torch.randn(x_0.shape, generator=rng)


# --------------------------------------- The reverse mean ---------------------------------------


def reverse_mean(x_t, t, dt, *, denoiser):
    """E[x_{t-dt} | x_t] from E[x_0 | x_t], eq. (24) of the tutorial.

    Exact for any dt: of the noise x_t - x_0, the last dt brought on average the share dt / t.
    x_t: (n, d), at time t;  0 < dt <= t <= 1;  denoiser(x_t, t) -> (n, d).  Returns (n, d).
    """
    return (dt / t) * denoiser(x_t, t) + (1 - dt / t) * x_t


# ----------------------------------------- The samplers -----------------------------------------
# They know nothing of the data but the function that they are given: reverse_mean(x_t, t, dt).


def ddpm(reverse_mean, x_1, num_steps, sigma_q, rng):
    """Algorithm 1 (DDPM): x_{t-dt} = E[x_{t-dt} | x_t] + N(0, sigma_q^2 dt).

    x_1: draws of the base;  num_steps = 1 / dt.  Yields x_{t-dt} after every step, the last is x_0.
    """
    x_t, dt = x_1, 1 / num_steps
    for k in range(num_steps, 0, -1):  # t = k dt
        noise = torch.randn(x_t.shape, generator=rng)
        x_t = reverse_mean(x_t, k / num_steps, dt) + sigma_q * dt**0.5 * noise
        yield x_t


def ddim(reverse_mean, x_1, num_steps):
    """Algorithm 2 (DDIM): x_{t-dt} = x_t + lam (E[x_{t-dt} | x_t] - x_t).

    lam = sigma_t / (sigma_{t-dt} + sigma_t); as sigma_t = sigma_q sqrt(t), sigma_q cancels in it.
    x_1: draws of the base;  num_steps = 1 / dt.  Yields x_{t-dt} after every step, the last is x_0.
    """
    x_t, dt = x_1, 1 / num_steps
    for k in range(num_steps, 0, -1):  # t = k dt
        lam = k**0.5 / ((k - 1) ** 0.5 + k**0.5)
        x_t = x_t + lam * (reverse_mean(x_t, k / num_steps, dt) - x_t)
        yield x_t


# ------------------------------------------- Learning -------------------------------------------
MIN_T = 1 / 2000  # the smallest t that is learned: the last step of the most steps
SIGMA_DATA = curve(THETA).square().mean().item() ** 0.5  # E|x_0|^2 = 2 SIGMA_DATA^2


class Denoiser(nn.Module):
    """A ReLU network that learns E[x_0 | x_t].

    Preconditioned as in Karras et al. (2022, arXiv 2206.00364, table 1): of all multiples of x_t,
    c_skip x_t is the best guess of x_0, whatever the data, and c_out the size of its error, per
    coordinate. The network learns what that guess misses, in units of c_out.
    """

    def __init__(self, sigma_q):
        super().__init__()
        self.sigma_q, width = sigma_q, 64
        self.layers = nn.Sequential(
            nn.Linear(3, width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, 2),
        )

    def preconditioning(self, t):
        """c_skip, c_out, c_in, c_noise at time t: a float or (n, 1)."""
        sigma_t = self.sigma_q * t**0.5
        std_t = (sigma_t**2 + SIGMA_DATA**2) ** 0.5  # of x_t
        c_noise = torch.log(torch.as_tensor(sigma_t)) / 2  # theirs is half of this
        return (SIGMA_DATA / std_t) ** 2, SIGMA_DATA * sigma_t / std_t, 1 / std_t, c_noise

    def forward(self, x_t, t):
        """E[x_0 | x_t], learned.  x_t: (n, 2);  t: a float or (n, 1), 0 < t <= 1.  (n, 2)"""
        c_skip, c_out, c_in, c_noise = self.preconditioning(t)
        inputs = torch.cat([c_in * x_t, c_noise.expand(len(x_t), 1)], dim=1)
        return c_skip * x_t + c_out * self.layers(inputs)


def train(*, sigma_q, train_steps, rng):
    """Pseudocode 6, with t log-uniform and the error in units of c_out.

    So every octave of the noise counts the same. With t uniform, one draw in a hundred would have
    sigma_t < sigma_q / 10. At each t, what is learned is E[x_0 | x_t], whatever its weight.
    Returns the trained Denoiser and the loss of each step.
    """
    # nn.Linear draws its weights from torch's own generator: its seed is drawn from ours.
    torch.manual_seed(torch.randint(2**60, (), generator=rng).item())
    denoiser = Denoiser(sigma_q)
    optimizer = torch.optim.Adam(denoiser.parameters(), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, train_steps)
    losses = []
    for _ in tqdm(range(train_steps), "training", disable=None):
        x_0 = swiss_roll(1024, rng)
        t = MIN_T ** torch.rand(1024, 1, generator=rng)
        x_t = add_noise(x_0, t, sigma_q, rng)
        _, c_out, _, _ = denoiser.preconditioning(t)
        loss = ((denoiser(x_t, t) - x_0) / c_out).square().sum(dim=1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return denoiser.requires_grad_(False), losses


# ------------------------------------------ The truth -------------------------------------------


def exact_denoiser(x_t, t, *, sigma_q):
    """E[x_0 | x_t]: the average of the curve, weighted by p(theta | x_t), Bayes' rule.

    The posterior of experiment 2, its points evenly in theta, and nowhere farther apart than a
    quarter of sigma_t and of SPREAD: the midpoint rule, good to sigma_t / 100 where it was tried.
    x_t: (n, 2);  t: a float.  Returns (n, 2).
    """
    sigma_t = sigma_q * t**0.5
    num_points = math.ceil(4 * SPEED * (END - START) * (1 / sigma_t + 1 / SPREAD))
    theta = START + (END - START) * (torch.arange(num_points) + 0.5) / num_points
    points = curve(theta)
    means = []
    for rows in x_t.split(math.ceil(10**6 / num_points)):  # (rows, num_points) fits in memory
        # The default, |x|^2 - 2 x.c + |c|^2, is too coarse for small sigma_t far from 0.
        distance = torch.cdist(rows, points, compute_mode="donot_use_mm_for_euclid_dist")
        means.append((-((distance / sigma_t) ** 2) / 2).softmax(dim=1) @ points)
    return torch.cat(means)


# ------------------------------------------ Measuring -------------------------------------------
TIMES = [MIN_T ** ((k + 0.5) / 7) for k in reversed(range(7))]  # midpoints of sevenths of log t


def measure(denoiser, exact, sigma_q, rng, n=20_000):
    """Excess and Bayes error at each of TIMES, each from n draws: two lists.

    The Bayes error is E|x_0 - E[x_0|x_t]|^2, the excess E|f - E[x_0|x_t]|^2. Their sum is
    E|f - x_0|^2: x_0 - E[x_0|x_t] is uncorrelated with any function f of x_t.
    """
    excess, bayes = [], []
    for t in TIMES:
        x_0 = swiss_roll(n, rng)
        x_t = add_noise(x_0, t, sigma_q, rng)
        best = exact(x_t, t)
        excess.append((denoiser(x_t, t) - best).square().sum(dim=1).mean().item())
        bayes.append((x_0 - best).square().sum(dim=1).mean().item())
    return excess, bayes


def least_loss(denoiser, bayes):
    """The training loss with the exact denoiser: a mean over log t.  bayes: of measure."""
    c_outs = [denoiser.preconditioning(t)[1] for t in TIMES]
    return sum(b / c_out**2 for b, c_out in zip(bayes, c_outs)) / len(TIMES)


def last_tenth(losses):
    """The mean of the last tenth of the losses."""
    tenth = losses[-max(1, len(losses) // 10) :]
    return sum(tenth) / len(tenth)


def sample(denoiser, x_1, num_steps, sigma_q, rng):
    """Runs both samplers from x_1, (n, 2).  Returns {sampler: x_0, (n, 2)}."""
    mean = partial(reverse_mean, denoiser=denoiser)
    runs = {"DDPM": ddpm(mean, x_1, num_steps, sigma_q, rng), "DDIM": ddim(mean, x_1, num_steps)}
    samples = {}
    for name, steps in runs.items():
        for x_t in tqdm(steps, name, num_steps, disable=None):
            pass
        samples[name] = x_t
    return samples


FAR = float(f"{SPREAD / 6:.1g}")  # a sixth of the spread, to one digit


def apart(x_0, twins):
    """Median distance of samples to their twins, (n, 2) each, and the share farther than FAR."""
    distance = (x_0 - twins).norm(dim=1)
    return distance.median().item(), (distance > FAR).double().mean().item()


def there_and_back(denoiser, num_steps, sigma_q, rng, n=4000):
    """{t: (draws of p_t, what DDIM makes of the base), (n, 2) each}, at five t from 0 up.

    The first are one run of the forward process: noise is added to the same points.
    """
    x_1 = sigma_q * torch.randn(n, 2, generator=rng)
    run = [x_1, *ddim(partial(reverse_mean, denoiser=denoiser), x_1, num_steps)]
    x_t, clouds, steps = swiss_roll(n, rng), {}, 0
    for k in (round(num_steps * t) for t in (0, 0.003, 0.02, 0.1, 1)):
        x_t = add_noise(x_t, (k - steps) / num_steps, sigma_q, rng)
        clouds[k / num_steps], steps = (x_t, run[num_steps - k]), k
    return clouds


# ----------------------------------------- The figures ------------------------------------------
plt.style.use("default")  # the same figures whatever the reader's matplotlibrc says
BLUE, ORANGE = "#0072B2", "#E69F00"
COLORS = {"DDPM": BLUE, "DDIM": ORANGE}


def draw_data(x_0):
    """x_0: (n, 2)."""
    fig, ax = plt.subplots(figsize=(5, 5), layout="constrained")
    ax.scatter(*x_0.T, s=3, color="0.3")
    ax.set(xlabel="$x$", ylabel="$y$", aspect="equal", title=f"{len(x_0)} draws of $x_0$")
    return fig


def draw_loss(losses, least):
    """losses: of train;  least: of least_loss."""
    fig, ax = plt.subplots(figsize=(6, 4.5), layout="constrained")
    window = max(1, len(losses) // 50)
    smooth = torch.tensor(losses).unfold(0, window, 1).mean(dim=1)
    ax.plot(losses, ".", color="0.8", ms=2, label="each step")
    ax.plot(range(window - 1, len(losses)), smooth, color=BLUE, label=f"mean of {window} steps")
    ax.axhline(least, color="k", ls="--", label=f"exact denoiser: {least:.2f}")
    ax.set(xlabel="training step", ylabel=r"loss, $|f(x_t, t) - x_0|^2 / c_\mathrm{out}^2$")
    ax.set_title("Training loss, and the least possible")
    ax.legend()
    return fig


def square(ax, *points):
    """Limits of a square that holds the points, (n, 2) each."""
    low, high = torch.cat(points).aminmax(dim=0)
    middle, half = (low + high) / 2, 0.525 * (high - low).max()
    (left, bottom), (right, top) = (middle - half).tolist(), (middle + half).tolist()
    ax.set(xlim=(left, right), ylim=(bottom, top), aspect="equal")


def join(ax, starts, ends, **style):
    """A line from each of starts, (n, 2), to its end, (n, 2): one line with gaps."""
    gaps = torch.full_like(starts, math.nan)
    ax.plot(*torch.stack([starts, ends, gaps], dim=1).reshape(-1, 2).T, **style)


def draw_denoisers(denoiser, exact, sigma_q, rng):
    """Arrows from x_t to E[x_0 | x_t], exact and learned, and the distance between their heads."""
    fig, axes = plt.subplots(2, 3, figsize=(11, 7), layout="constrained", sharex=True, sharey=True)
    data, times, size = curve(THETA), (0.1, 0.01), 75
    square(axes[0, 0], data.mean(dim=0) + 1.3 * (data - data.mean(dim=0)))
    x, y = (
        torch.linspace(*limits, size) for limits in (axes[0, 0].get_xlim(), axes[0, 0].get_ylim())
    )
    grid, tails = torch.cartesian_prod(x, y), torch.cartesian_prod(x[2::5], y[2::5])
    errors = {t: (denoiser(grid, t) - exact(grid, t)).norm(dim=1) for t in times}
    every = torch.cat([*errors.values()])
    norm = LogNorm(every.quantile(0.02).item(), every.max().item())
    arrow = {"angles": "xy", "scale_units": "xy", "scale": 1, "width": 0.004}
    for row, t in zip(axes, times):
        for ax, field, name, color in zip(
            row, (exact, denoiser), ("exact", "learned"), ("k", BLUE)
        ):
            ax.plot(*data.T, color="0.8", lw=4, zorder=0)
            ax.quiver(*tails.T.numpy(), *(field(tails, t) - tails).T.numpy(), color=color, **arrow)
            ax.set_title(f"$E[x_0|x_t]$, {name}, $t$ = {t:g}")
        cells = errors[t].view(size, size).T.numpy()
        image = row[2].pcolormesh(x.numpy(), y.numpy(), cells, norm=norm, cmap="magma")
        x_t = add_noise(swiss_roll(300, rng), t, sigma_q, rng)
        row[2].plot(*x_t.T, ".", color="w", ms=1.5)
        row[2].set_title("their distance; dots: $x_t$")
    for ax in axes.flat:
        ax.set(xlabel="$x$", ylabel="$y$", aspect="equal")
        ax.label_outer()
    fig.colorbar(image, ax=axes)
    return fig


def draw_there_and_back(clouds):
    """A column for each t; color is the place on the curve at t = 0.  clouds: of there_and_back."""
    fig, axes = plt.subplots(2, len(clouds), figsize=(11, 4.8), layout="constrained")
    places = [torch.cdist(x_0, curve(THETA)).argmin(dim=1).numpy() for x_0 in clouds[0]]
    for column, (t, pair) in zip(axes.T, clouds.items()):
        for ax, x_t, place in zip(column, pair, places):
            ax.scatter(*x_t.T, s=2, c=place, cmap="plasma", lw=0)
            square(ax, *pair)
            ax.set(xticks=[], yticks=[], facecolor="0.08")
        column[0].set_title(f"$t$ = {t:g}")
    axes[0, 0].set_ylabel("adding noise $\\rightarrow$")
    axes[1, 0].set_ylabel("$\\leftarrow$ DDIM")
    return fig


def draw_samples(sampler, x_0, twins):
    """Samples beside their twins, (n, 2) each; a line joins those that are over FAR apart."""
    fig, (left, right) = plt.subplots(1, 2, figsize=(5.4, 3.3), layout="constrained", sharey=True)
    color, far = COLORS[sampler], (x_0 - twins).norm(dim=1) > FAR
    for ax, denoiser in [(left, "learned"), (right, "exact")]:
        ax.plot(*curve(THETA).T, color="0.85", lw=4, zorder=0, label="data")
        ax.set(xlabel="$x$", title=f"{sampler}, {denoiser} denoiser")
        square(ax, x_0, twins, curve(THETA))
    left.plot(*x_0.T, ".", color=color, ms=2)
    left.plot(*x_0[far].T, ".", color=color, ms=7, mec="k", mew=0.5, label="sample")
    left.plot(*twins[far].T, ".", color="k", ms=4, label="its twin")
    join(left, x_0[far], twins[far], color="k", lw=0.7, label=f"over {FAR:g} apart")
    left.set_ylabel("$y$")
    right.plot(*twins.T, ".", color="k", ms=2)
    fig.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return fig


# ------------------------------------------ Running it ------------------------------------------


def options(argv, *faults, **knobs):
    """The command line: num_steps=(default, least, largest, meaning) is --num-steps, and so on.

    faults: what the script cannot do with the data at its top, a line each; it is refused.
    """
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    text = "default: figures; with other options, a folder in it"
    parser.add_argument("--figures-dir", metavar="X", type=os.path.expanduser, help=text)
    for name, (default, least, largest, meaning) in knobs.items():
        text = f"{meaning}: {least:_} to {largest:_}, default {default:_}"
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, metavar="X", type=type(default), default=default, help=text)
    args = parser.parse_args(argv)
    for name, (_, least, largest, _) in knobs.items():
        if not least <= (value := getattr(args, name)) <= largest:
            option = name.replace("_", "-")
            parser.error(f"argument --{option}: {value} is not from {least:_} to {largest:_}")
    for fault in faults:
        parser.error(fault)
    tried = [f"{name}-{x}" for name, x in vars(args).items() if x != parser.get_default(name)]
    own = Path(__file__).parent / "figures" / "-".join(tried).replace("_", "-")
    args.figures_dir = Path(args.figures_dir or own)
    probe = args.figures_dir / "a-name-longer-than-that-of-any-figure-here"
    try:
        args.figures_dir.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        parser.error(f"argument --figures-dir: {error}")
    if hasattr(sys.stdout, "reconfigure"):  # not in a notebook
        sys.stdout.reconfigure(errors="backslashreplace")  # for a folder that is not in ASCII
    return args


def table(rows):
    """Prints rows of strings, the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip_longest(*rows, fillvalue="")]
    for first, *others in rows:
        cells = [other.rjust(width) for other, width in zip(others, widths[1:])]
        print(first.ljust(widths[0]), *cells, sep="  ")


def report(excess, bayes, samples, twins):
    """Two lists of rows for table, from what measure and sample return."""
    levels = [
        ["t", *(f"{t:.2g}" for t in TIMES[::-1])],
        ["Bayes error", *(f"{b:.3g}" for b in bayes[::-1])],
        ["excess over it", *(f"{e / b:.2%}" for e, b in zip(excess[::-1], bayes[::-1]))],
    ]
    distances = [["from sample to twin", "median", f"over {FAR:g}"]]
    for name, x_0 in samples.items():
        median, far = apart(x_0, twins[name])
        distances.append([name, f"{median:.4f}", f"{far:.1%}"])
    return levels, distances


def main(argv=None):
    args = options(
        argv,
        *faults(),
        num_steps=(1000, 1, 2000, "steps of a sampler, 1 / dt"),
        num_samples=(4000, 1, 10**6, "samples of each sampler"),
        sigma_q=(1.0, 0.1, 100.0, "std of the noise at t = 1, and of the base"),
        train_steps=(8500, 1, 10**6, "steps of the optimizer"),
        seed=(0, 0, 10**6, "seed of every draw"),
    )
    torch.set_num_threads(1)  # the same bytes on any number of cores, and hardly slower
    rng = torch.Generator().manual_seed(args.seed)

    denoiser, losses = train(sigma_q=args.sigma_q, train_steps=args.train_steps, rng=rng)
    exact = partial(exact_denoiser, sigma_q=args.sigma_q)
    excess, bayes = measure(denoiser, exact, args.sigma_q, rng)
    least = least_loss(denoiser, bayes)

    x_1 = args.sigma_q * torch.randn(args.num_samples, 2, generator=rng)
    twins = sample(exact, x_1, args.num_steps, args.sigma_q, rng.clone_state())  # the same noise
    samples = sample(denoiser, x_1, args.num_steps, args.sigma_q, rng)
    clouds = there_and_back(denoiser, args.num_steps, args.sigma_q, rng)

    for name, figure in {
        "data": draw_data(swiss_roll(2000, rng)),
        "train_loss": draw_loss(losses, least),
        "learned-vs-exact": draw_denoisers(denoiser, exact, args.sigma_q, rng),
        "eval_ddpm_samples": draw_samples("DDPM", samples["DDPM"], twins["DDPM"]),
        "eval_ddim_samples": draw_samples("DDIM", samples["DDIM"], twins["DDIM"]),
        "data-to-noise-and-back": draw_there_and_back(clouds),
    }.items():
        figure.savefig(args.figures_dir / f"{name}.jpg", dpi=120)
    print(f"loss: {last_tenth(losses):.2f} in the last tenth, {least:.2f} with the exact denoiser")
    for rows in report(excess, bayes, samples, twins):
        table(rows)
    print(f"figures: {args.figures_dir}")


if __name__ == "__main__":
    main()
