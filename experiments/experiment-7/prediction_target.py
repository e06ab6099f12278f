"""Experiment 7: what the network predicts: x_{t-dt}, x_0, the noise, v, or a mixture.

The claim
    A sampler needs E[x_0 | x_t]. A network f learns it by least squares from any of the targets
        (x_0 - skip x_t) / factor,    and then    E[x_0 | x_t] = skip x_t + factor f,
    skip and factor being functions of t. All have one optimum. But no network is at it, and what
    counts is the error of its output times the factor. Which target is best depends on t, and on
    the dimension of the space that the data lies in: here the plane, and 64 dimensions.

The truth beside it
    The denoiser of the data is known, in 2 dimensions and on a plane in 64. The error is a
    network's excess, its squared distance to that exact denoiser, over the Bayes error, the least
    squared error of any guess of x_0. A sample's twin has the same start and the exact denoiser.

What to look for in figures/
    error-vs-t.jpg   2 dimensions beside 64: which target is ahead, and where?
    samples.jpg      DDIM with each network in 64 dimensions, from above and from the side: how far
                     off the plane of the data does it end?

Try this
    python prediction_target.py --dimension 4     where between 2 and 64 does the order turn?
    python prediction_target.py --width 256       is the network in 64 only too narrow?
    python prediction_target.py --num-steps 100   fewer steps: do samples leave their twins?
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


DT = 1 / 1000  # between x_{t-dt} and x_t, and the smallest t


def chain(n, t, basis, sigma_q, rng):
    """n draws of x_0, x_{t-dt} and x_t: the curve on a plane, and noise in all d dimensions.

    t: a float or (n, 1), DT <= t <= 1;  basis: (d, 2), orthonormal, P on the page.  (n, d) each.
    """
    x_0 = swiss_roll(n, rng) @ basis.T
    x_previous = add_noise(x_0, t - DT, sigma_q, rng)
    return x_0, x_previous, add_noise(x_previous, DT, sigma_q, rng)


# --------------------------------------- The reverse mean ---------------------------------------


def reverse_mean(x_t, t, dt, *, denoiser):
    """E[x_{t-dt} | x_t] from E[x_0 | x_t], eq. (24) of the tutorial.

    Exact for any dt: of the noise x_t - x_0, the last dt brought on average the share dt / t.
    x_t: (n, d), at time t;  0 < dt <= t <= 1;  denoiser(x_t, t) -> (n, d).  Returns (n, d).
    """
    return (dt / t) * denoiser(x_t, t) + (1 - dt / t) * x_t


# A network f that learns (x_0 - skip x_t) / factor gives E[x_0 | x_t] = skip x_t + factor f. Here
# are skip and factor; s is sigma_t, and s_0 the root mean square of x_0, per coordinate.
# The last three: Ho et al. (2020); Salimans and Ho (2022), v = (noise - s x_0) / sqrt(1 + s^2);
# Karras et al. (2022).
TARGETS = {
    "x_{t-dt}": lambda t, s, s_0: (1 - t / DT, t / DT),  # eq. (24), solved for E[x_0 | x_t]
    "x_0": lambda t, s, s_0: (0, 1),
    "noise": lambda t, s, s_0: (1, -s),
    "v": lambda t, s, s_0: (1 / (1 + s**2), -s / (1 + s**2) ** 0.5),
    "preconditioned": lambda t, s, s_0: (1 / (1 + (s / s_0) ** 2), s / (1 + (s / s_0) ** 2) ** 0.5),
}


# ----------------------------------------- The samplers -----------------------------------------


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
SIGMA_DATA = curve(THETA).square().mean().item() ** 0.5  # E|x_0|^2 = 2 SIGMA_DATA^2


class Denoiser(nn.Module):
    """E[x_0 | x_t] from a ReLU network that learns one of TARGETS, in d dimensions."""

    def __init__(self, target, sigma_q, d, width):
        super().__init__()
        self.target, self.sigma_q = target, sigma_q
        self.sigma_data = SIGMA_DATA * (2 / d) ** 0.5  # per coordinate of all d
        self.layers = nn.Sequential(
            nn.Linear(d + 1, width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, d),
        )

    def skip_and_factor(self, t):
        """At time t: a float or (n, 1)."""
        return TARGETS[self.target](t, self.sigma_q * t**0.5, self.sigma_data)

    def output(self, x_t, t):
        """The target, learned.  x_t: (n, d);  t: a float or (n, 1), DT <= t <= 1.  (n, d)

        All targets have the same inputs: x_t to unit size, and log(sigma_t) / 2.
        """
        sigma_t = self.sigma_q * t**0.5
        std_t = (sigma_t**2 + self.sigma_data**2) ** 0.5  # of x_t
        log_noise = torch.log(torch.as_tensor(sigma_t)) / 2
        return self.layers(torch.cat([x_t / std_t, log_noise.expand(len(x_t), 1)], dim=1))

    def forward(self, x_t, t):
        """E[x_0 | x_t], learned.  As of output."""
        skip, factor = self.skip_and_factor(t)
        return skip * x_t + factor * self.output(x_t, t)


def loss(denoiser, x_0, x_previous, x_t, t):
    """Mean squared error of the output; the target is x_{t-dt} itself, or of the form above.

    It is the squared error of E[x_0 | x_t] over factor^2: a target is also a weighting.
    """
    if denoiser.target == "x_{t-dt}":
        target = x_previous
    else:
        skip, factor = denoiser.skip_and_factor(t)
        target = (x_0 - skip * x_t) / factor
    return (denoiser.output(x_t, t) - target).square().sum(dim=1).mean()


def train(target, *, basis, sigma_q, width, train_steps, rng, batch_size=512, learning_rate=0.01):
    """Least squares on a target, with t log-uniform.  Returns the trained Denoiser."""
    # nn.Linear draws its weights from torch's own generator: its seed is drawn from ours.
    torch.manual_seed(torch.randint(2**60, (), generator=rng).item())
    denoiser = Denoiser(target, sigma_q, len(basis), width)
    optimizer = torch.optim.Adam(denoiser.parameters(), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, train_steps)
    for _ in tqdm(range(train_steps), f"{target}, d = {len(basis)}", disable=None):
        t = DT ** torch.rand(batch_size, 1, generator=rng)
        error = loss(denoiser, *chain(batch_size, t, basis, sigma_q, rng), t)
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        schedule.step()
    return denoiser.requires_grad_(False)


def train_all(targets, rng, **settings):
    """{target: Denoiser}, with the same first weights and the same draws for all."""
    *others, last = targets
    denoisers = {target: train(target, rng=rng.clone_state(), **settings) for target in others}
    return {**denoisers, last: train(last, rng=rng, **settings)}


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


def exact_on_plane(x_t, t, *, basis, sigma_q):
    """E[x_0 | x_t] in d dimensions: P D(P^T x_t).  Noise off the plane tells nothing.  (n, d)"""
    return exact_denoiser(x_t @ basis, t, sigma_q=sigma_q) @ basis.T


# ------------------------------------------ Measuring -------------------------------------------
TIMES = [1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001]


def measure(denoisers, basis, sigma_q, rng, n=10_000):
    """E|f - E[x_0|x_t]|^2 / E|x_0 - E[x_0|x_t]|^2, f learned: the excess over the Bayes error.

    From n draws at each of TIMES.  Returns {target: (len(TIMES),)}, lists.
    """
    shares = {target: [] for target in denoisers}
    for t in TIMES:
        x_0, _, x_t = chain(n, t, basis, sigma_q, rng)
        best = exact_on_plane(x_t, t, basis=basis, sigma_q=sigma_q)
        bayes = (x_0 - best).square().sum(dim=1).mean()
        for target, denoiser in denoisers.items():
            excess = (denoiser(x_t, t) - best).square().sum(dim=1).mean()
            shares[target].append((excess / bayes).item())
    return shares


def sample(denoiser, x_1, num_steps):
    """DDIM from x_1, (n, d).  Returns x_0, (n, d)."""
    for x_t in ddim(partial(reverse_mean, denoiser=denoiser), x_1, num_steps):
        pass
    return x_t


def off_plane(x, basis):
    """Distance from the plane.  x: (n, d);  basis: (d, 2).  Returns (n,)."""
    return (x - x @ basis @ basis.T).norm(dim=1)


# ----------------------------------------- The figures ------------------------------------------
plt.style.use("default")  # the same figures whatever the reader's matplotlibrc says
BLUE, ORANGE, GREEN, PINK, SKY = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9"
STYLES = {  # of TARGETS: the symbol, color and marker
    "x_{t-dt}": (r"$x_{t-\Delta t}$", PINK, "s"),
    "x_0": ("$x_0$", ORANGE, "o"),
    "noise": ("noise", BLUE, "^"),
    "v": ("$v$", SKY, "v"),
    "preconditioned": ("preconditioned", GREEN, "D"),
}


def draw_errors(shares):
    """A panel for each number of dimensions.  shares: {d: of measure}."""
    fig, axes = plt.subplots(1, 2, figsize=(9, 4.6), layout="constrained", sharey=True)
    for ax, (d, errors) in zip(axes, shares.items()):
        for target, values in errors.items():
            symbol, color, marker = STYLES[target]
            percent = 100 * torch.tensor(values)
            ax.loglog(TIMES, percent, color=color, marker=marker, ms=5, label=symbol)
        ax.set(xlabel="$t$", xlim=(1.2, 0.0008), title=f"the data in {d} dimensions")
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("excess, % of the Bayes error")
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return fig


def draw_samples(samples, basis):
    """Each network's samples from above, in the plane, and from the side.

    samples: {target: (n, d)};  basis: (d, 2).
    """
    size = {"figsize": (12, 6), "layout": "constrained", "sharex": True, "sharey": "row"}
    fig, axes = plt.subplots(2, len(samples), **size)
    for (above, side), (target, x_0) in zip(axes.T, samples.items()):
        symbol, color, _ = STYLES[target]
        place = x_0 @ basis
        above.plot(*place.T, ".", color=color, ms=2)
        above.plot(*curve(THETA).T, "k", lw=0.8, label="data")
        above.set(title=f"target: {symbol}", aspect="equal")
        side.plot(place[:, 0], off_plane(x_0, basis), ".", color=color, ms=2)
        side.axhline(0, color="k", lw=0.8)
        side.set(xlabel="$z_1$")
    axes[0, 0].set_ylabel("$z_2$")
    axes[1, 0].set_ylabel("distance from the plane")
    axes[0, 0].legend()
    fig.suptitle(f"DDIM in {len(basis)} dimensions: above, the plane of the data; below, off it")
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


def report(shares, samples, twins, bases):
    """Rows for table: in d dimensions a network's excess, and its samples' median distances.

    shares: {d: of measure};  samples: {d: {target: (n, d)}};  twins, bases: {d: ...}.
    """
    rows = [["excess, %; t =", *(f"{t:g}" for t in TIMES)]]
    rows[0] += ["| from twin", "from plane"]
    for d, errors in shares.items():
        for target, values in errors.items():
            cells = [f"{100 * value:.2f}" for value in values]
            if target in samples[d]:
                x_0 = samples[d][target]
                distances = (x_0 - twins[d]).norm(dim=1), off_plane(x_0, bases[d])
                cells += [f"{distance.median():.3f}" for distance in distances]
            rows.append([f"in {d}: {target}", *cells])
    return rows


def main(argv=None):
    args = options(
        argv,
        *faults(),
        dimension=(64, 3, 256, "of the space that the plane of the roll lies in"),
        width=(64, 1, 256, "units in each hidden layer"),
        num_steps=(1000, 1, 1000, "steps of the sampler, 1 / dt"),
        num_samples=(1000, 1, 10**6, "samples of each network"),
        sigma_q=(1.0, 0.1, 100.0, "std of the noise at t = 1, and of the base"),
        train_steps=(1500, 1, 10**6, "steps of the optimizer, for each network"),
        seed=(0, 0, 10**6, "seed of every draw"),
    )
    torch.set_num_threads(1)  # the same bytes on any number of cores, and hardly slower
    rng = torch.Generator().manual_seed(args.seed)
    settings = {"sigma_q": args.sigma_q, "width": args.width, "train_steps": args.train_steps}

    high = torch.linalg.qr(torch.randn(args.dimension, 2, generator=rng)).Q
    bases = {2: torch.eye(2), args.dimension: high}
    sampled = [*TARGETS][1:]  # all but x_{t-dt}, which is far worse than the others
    shares, samples, twins = {}, {}, {}
    for d, basis in bases.items():
        denoisers = train_all(TARGETS if d == 2 else sampled, rng, basis=basis, **settings)
        shares[d] = measure(denoisers, basis, args.sigma_q, rng)
        x_1 = args.sigma_q * torch.randn(args.num_samples, d, generator=rng)
        exact = partial(exact_on_plane, basis=basis, sigma_q=args.sigma_q)
        twins[d] = sample(exact, x_1, args.num_steps)
        samples[d] = {target: sample(denoisers[target], x_1, args.num_steps) for target in sampled}

    for name, figure in {
        "error-vs-t": draw_errors(shares),
        "samples": draw_samples(samples[args.dimension], high),
    }.items():
        figure.savefig(args.figures_dir / f"{name}.jpg", dpi=120)
    table(report(shares, samples, twins, bases))
    print(f"figures: {args.figures_dir}")


if __name__ == "__main__":
    main()
