"""Experiment 5: trained on N points of the Swiss roll, a network copies them, or generalises.

The claim
    Of all functions, the training loss on N points a_i is least for the denoiser of these points,
        D_N(x_t, t) = sum_i p(x_0 = a_i | x_t) a_i,
    the minimiser. DDIM with it, if its last step is small, returns training points. Section 3.7 of
    the tutorial says that real networks often do better by failing to be this minimiser; its figure
    6 shows trajectories for N = 10, 20, 40.

The truth beside it
    Both ends are known: D_N is `empirical_denoiser`, and the denoiser D of the whole curve is
    `exact_denoiser`. The error of a denoiser f is its excess on fresh data, E|f - D|^2, in percent
    of the Bayes error, E|x_0 - D|^2, the least there is. Network and minimiser sample from the same
    starts; we count the copies, the samples that lie on a training point.

What to look for in figures/
    trajectories.jpg      from the same starts, who ends on training points (grey), who between?
    distances.jpg         how far from 40 training points do the network's samples end?
    which-denoiser.jpg    where each denoiser puts a point of the curve: what shape has the
                          minimiser, what shape the network?
    error-vs-n.jpg        for which N is the network better than the function it is trained to be?

Try this
    python generalization.py --train-steps 200    stopped early: better or worse? For every N?
    python generalization.py --last-t 0.01        a coarse last step: does the minimiser copy?
    python generalization.py --num-steps 10       few steps, but a small last one: does it copy?
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
# It knows nothing of the data but the function that it is given: reverse_mean(x_t, t, dt).


def ddim(reverse_mean, x_1, times):
    """Algorithm 2 (DDIM) with steps of any size: x_{t-dt} = x_t + lam (E[x_{t-dt} | x_t] - x_t).

    lam = sigma_t / (sigma_{t-dt} + sigma_t); as sigma_t = sigma_q sqrt(t), sigma_q cancels in it.
    x_1: draws of the base;  times: from 1 down to 0.  Yields x_{t-dt} after every step.
    """
    x_t = x_1
    for k, t in enumerate(times[:-1]):
        dt = t - times[k + 1]
        lam = t**0.5 / ((t - dt) ** 0.5 + t**0.5)
        x_t = x_t + lam * (reverse_mean(x_t, t, dt) - x_t)
        yield x_t


# ------------------------------------------- Learning -------------------------------------------
MIN_T = 1e-7  # the smallest t that is learned: sigma_t is then sigma_q / 3000
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


def train(points, sigma_q, train_steps, rng):
    """Pseudocode 6 as in experiment 3, but x_0 is always one of the points, (N, 2).

    The points come again and again, the noise on them is always fresh.  Returns the Denoiser.
    """
    # nn.Linear draws its weights from torch's own generator: its seed is drawn from ours.
    torch.manual_seed(torch.randint(2**60, (), generator=rng).item())
    denoiser = Denoiser(sigma_q)
    optimizer = torch.optim.Adam(denoiser.parameters(), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.005, train_steps)
    for _ in tqdm(range(train_steps), f"training on {len(points)} points", disable=None):
        x_0 = points[torch.randint(len(points), (512,), generator=rng)]
        t = MIN_T ** torch.rand(512, 1, generator=rng)
        x_t = add_noise(x_0, t, sigma_q, rng)
        _, c_out, _, _ = denoiser.preconditioning(t)
        loss = ((denoiser(x_t, t) - x_0) / c_out).square().sum(dim=1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return denoiser.requires_grad_(False)


# ------------------------------------------ The truth -------------------------------------------


def posterior_mean(x_t, points, sigma_t):
    """E[x_0 | x_t] if x_0 is each of the points with the same probability: Bayes' rule.

    x_t: (n, 2);  points: (k, 2).  Returns (n, 2).
    """
    means = []
    for rows in x_t.split(math.ceil(10**6 / len(points))):  # (rows, k) fits in memory
        # The default, |x|^2 - 2 x.a + |a|^2, is too coarse for the smallest sigma_t.
        distance = torch.cdist(rows, points, compute_mode="donot_use_mm_for_euclid_dist")
        means.append((-((distance / sigma_t) ** 2) / 2).softmax(dim=1) @ points)
    return torch.cat(means)


def empirical_denoiser(x_t, t, *, points, sigma_q):
    """D_N: E[x_0 | x_t] for N points, (N, 2), as in experiment 2.

    The training loss is least for it: the best guess of x_0, in least squares, is its mean.
    x_t: (n, 2);  t: a float.  Returns (n, 2).
    """
    return posterior_mean(x_t, points, sigma_q * t**0.5)


def exact_denoiser(x_t, t, *, sigma_q):
    """D: E[x_0 | x_t] for the whole curve, as many points.

    They lie evenly in theta, nowhere farther apart than a quarter of sigma_t and of SPREAD: good to
    sigma_t / 100 where it was tried.  x_t: (n, 2);  t: a float.  Returns (n, 2).
    """
    sigma_t = sigma_q * t**0.5
    num_points = math.ceil(4 * SPEED * (END - START) * (1 / sigma_t + 1 / SPREAD))
    theta = START + (END - START) * (torch.arange(num_points) + 0.5) / num_points
    return posterior_mean(x_t, curve(theta), sigma_t)


# ------------------------------------------ Measuring -------------------------------------------
NUM_POINTS = [10, 20, 40, 160, 640]  # N
TIMES = [2000 ** -((k + 0.5) / 7) for k in reversed(range(7))]  # as in experiment 3
LENGTH = jvp(curve, THETA, torch.ones_like(THETA))[1].norm(dim=-1).mean().item() * (END - START)
NEAR = 0.1  # of the spacing, LENGTH / N: a sample so near to a training point is a copy


def held_out(exact, sigma_q, rng, n=4000):
    """Noisy draws of the whole curve at each of TIMES: a list of (t, x_t, D(x_t, t), Bayes error).

    x_t and D(x_t, t) are (n, 2). The Bayes error, E|x_0 - D|^2, is the least that can be had.
    """
    draws = []
    for t in TIMES:
        x_0 = swiss_roll(n, rng)
        x_t = add_noise(x_0, t, sigma_q, rng)
        best = exact(x_t, t)
        draws.append((t, x_t, best, (x_0 - best).square().sum(dim=1).mean().item()))
    return draws


def excess(denoiser, draws):
    """E|f - D|^2 over the Bayes error, the mean over TIMES.  draws: of held_out."""
    ratios = [
        (denoiser(x_t, t) - best).square().sum(dim=1).mean().item() / bayes
        for t, x_t, best, bayes in draws
    ]
    return sum(ratios) / len(ratios)


def paths(denoiser, x_1, num_steps, last_t):
    """DDIM from x_1, (n, 2), at times 1, ..., last_t, evenly in log t, and 0.  (steps + 1, n, 2)"""
    times = [last_t ** (k / max(1, num_steps - 1)) for k in range(num_steps)] + [0.0]
    steps = ddim(partial(reverse_mean, denoiser=denoiser), x_1, times)
    return torch.stack([x_1, *tqdm(steps, "DDIM", num_steps, disable=None)])


def nearest(x_0, points):
    """Distance of each x_0, (n, 2), to the nearest of the points, (N, 2), in spacings.  (n,)"""
    distance = torch.cdist(x_0.double(), points.double()).amin(dim=1)
    return distance * len(points) / LENGTH


def measure(runs, data, fresh):
    """nearest for the ends of runs, {(name, N): of paths}, and for fresh draws, (n, 2)."""
    distances = {(name, n): nearest(run[-1], data[:n]) for (name, n), run in runs.items()}
    return {**distances, **{("fresh draws", n): nearest(fresh, data[:n]) for n in NUM_POINTS}}


# ----------------------------------------- The figures ------------------------------------------
plt.style.use("default")  # the same figures whatever the reader's matplotlibrc says
BLUE, PINK = "#0072B2", "#CC79A7"
COLORS = {"network": BLUE, "minimiser": PINK}


def draw_trajectories(runs, data):
    """Network over minimiser, from the same starts.

    runs: {(name, N): of paths};  data: (n, 2), of which the first N are trained on.
    """
    fig, axes = plt.subplots(2, 3, figsize=(11, 8), layout="constrained", sharex=True, sharey=True)
    line = curve(THETA)
    for row, name in zip(axes, COLORS):
        for ax, n in zip(row, NUM_POINTS):
            copy = nearest(runs[name, n][-1], data[:n]) < NEAR
            run, share = runs[name, n][:, :60], copy.double().mean()
            for which, color, label in [(copy, "0.7", "copies"), (~copy, BLUE, "other samples")]:
                drawn = run[:, which[:60]]
                ax.plot(drawn[..., 0], drawn[..., 1], color=color, lw=0.8)
                ax.plot(*drawn[-1].T, ".", color=color, ms=8, label=label)
            ax.plot(*line.T, color="0.85", lw=3, zorder=0, label="the curve")
            ax.plot(*data[:n].T, "o", color="k", mfc="none", ms=7, label="training points")
            ax.set(title=f"{name}, $N$ = {n}: {share:.0%} copies", xlabel="$x$", ylabel="$y$")
            ax.label_outer()
    low, high = line.aminmax(dim=0)
    middle, half = (low + high) / 2, 0.9 * (high - low).max()
    (left, bottom), (right, top) = (middle - half).tolist(), (middle + half).tolist()
    for ax in axes.flat:
        ax.set(xlim=(left, right), ylim=(bottom, top), aspect="equal")
    fig.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return fig


def draw_distances(distances, n):
    """To the nearest of n training points.  distances: {(name, N): of nearest}."""
    fig, ax = plt.subplots(figsize=(5.4, 4.2), layout="constrained")
    for name, style in {
        "network": {"color": BLUE, "alpha": 0.7},
        "fresh draws": {"color": "k", "histtype": "step", "lw": 1.5},
    }.items():
        distance = distances[name, n]
        bins = NEAR * torch.arange(distance.max() / NEAR + 2)
        weights = torch.full_like(distance, 1 / len(distance))
        ax.hist(distance, bins, weights=weights, label=name, **style)
    ax.set(xlabel="distance to the nearest training point, in spacings", ylabel="share of samples")
    ax.set_title(f"$N$ = {n}; nearer than {NEAR}: a copy")
    ax.legend()
    return fig


def draw_denoisers(denoisers, exact, data, t):
    """Where on the curve a denoiser puts a point of the curve: theta out against theta in.

    denoisers: {(name, N): denoiser};  exact: of the whole curve;  data: as above.
    """
    fig, axes = plt.subplots(1, 3, figsize=(12, 4.9), layout="constrained", sharey=True)
    theta = torch.linspace(START, END, 2000)
    x_t = curve(theta)

    def angle(x_0):  # of the nearest point of the curve
        return theta[torch.cdist(x_0, x_t).argmin(dim=1)]

    best = angle(exact(x_t, t))
    for ax, n in zip(axes, NUM_POINTS):
        ax.plot(theta, best, color="k", lw=0.8, label="$D$, of the curve")
        for name in ("minimiser", "network"):
            out = angle(denoisers[name, n](x_t, t))
            ax.plot(theta, out, ".", ms=3, mew=0, color=COLORS[name])
            ax.plot([], [], color=COLORS[name], lw=2, label=name)
        points = angle(data[:n])
        ax.plot(points, points, "o", color="k", mfc="none", ms=7, label="training points")
        ax.set(xlabel=r"$\theta$ of $x_t$", title=f"$N$ = {n}, $t$ = {t:.2g}")
    axes[0].set_ylabel(r"$\theta$ of the denoiser's output")
    fig.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return fig


def draw_errors(errors):
    """Excess against N.  errors: {(name, N): a number}."""
    fig, ax = plt.subplots(figsize=(5.4, 4.2), layout="constrained")
    for name, color in COLORS.items():
        values = [100 * errors[name, n] for n in NUM_POINTS]
        ax.plot(NUM_POINTS, values, "o-", color=color, label=name)
    ax.set(xscale="log", xlabel="$N$, number of training points", title="Error on fresh data")
    ax.set(yscale="log", ylabel="excess, % of the Bayes error")
    ax.set_xticks(NUM_POINTS, NUM_POINTS)
    ax.set_xticks([], minor=True)
    ax.grid(alpha=0.3)
    ax.legend()
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


def report(distances, errors):
    """Rows for table.  distances, errors: {(name, N): of nearest, of excess}."""
    rows = [["N", "copies: network", "minimiser", "fresh draws", "excess: network", "minimiser"]]
    for n in NUM_POINTS:
        near = [distances[name, n] < NEAR for name in ("network", "minimiser", "fresh draws")]
        copies = [f"{which.double().mean():.1%}" for which in near]
        rows.append([f"{n}", *copies, *(f"{errors[name, n]:.1%}" for name in COLORS)])
    return rows


def main(argv=None):
    args = options(
        argv,
        *faults(),
        num_steps=(100, 1, 1000, "steps of DDIM"),
        num_samples=(1000, 1, 4000, "samples of each denoiser"),
        sigma_q=(1.0, 0.1, 100.0, "std of the noise at t = 1, and of the base"),
        last_t=(MIN_T, MIN_T, 0.1, "the last step of DDIM is from this t to 0"),
        train_steps=(2000, 1, 10**6, "steps of the optimizer, for each N"),
        seed=(0, 0, 10**6, "seed of every draw"),
    )
    torch.set_num_threads(1)  # the same bytes on any number of cores, and hardly slower
    rng = torch.Generator().manual_seed(args.seed)

    data, denoisers, runs = swiss_roll(max(NUM_POINTS), rng), {}, {}
    for n in NUM_POINTS:
        points, sigma_q = data[:n], args.sigma_q  # so each training set holds the smaller ones
        denoisers["network", n] = train(points, sigma_q, args.train_steps, rng)
        denoisers["minimiser", n] = partial(empirical_denoiser, points=points, sigma_q=sigma_q)
    exact = partial(exact_denoiser, sigma_q=args.sigma_q)
    draws = held_out(exact, args.sigma_q, rng)
    errors = {which: excess(denoiser, draws) for which, denoiser in denoisers.items()}

    x_1 = args.sigma_q * torch.randn(args.num_samples, 2, generator=rng)
    for which, denoiser in denoisers.items():
        runs[which] = paths(denoiser, x_1, args.num_steps, args.last_t)
    distances = measure(runs, data, swiss_roll(4000, rng))

    for name, figure in {
        "trajectories": draw_trajectories(runs, data),
        "distances": draw_distances(distances, NUM_POINTS[2]),
        "which-denoiser": draw_denoisers(denoisers, exact, data, TIMES[0]),
        "error-vs-n": draw_errors(errors),
    }.items():
        figure.savefig(args.figures_dir / f"{name}.jpg", dpi=120)
    table(report(distances, errors))
    print(f"figures: {args.figures_dir}")


if __name__ == "__main__":
    main()
