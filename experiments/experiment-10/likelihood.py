"""Experiment 10: the regression is a bound on the log-likelihood.

The claim
    DDPM with any denoiser D has a density q_0 of its outputs, and log q_0(x_0) >= ELBO(x_0), a sum
    of squared errors (section 5 of the tutorial, likelihood interpretations):
        ELBO(x_0) = log N(x_0; 0, sigma_q^2) - 1/2
                    + sum over steps k, t = k dt, of (1 - E|x_0 - D(x_t, t)|^2 / sigma_t^2) / (2k)
    So minus the loss is, up to constants, the ELBO for one weight in t: 1 / t^2 on |x_0 - D|^2.
    Averaged over the data, it is below log p_0, the data's own, by three parts:
        E log p_0 - E ELBO = steps + learning + base.

The truth beside it
    The data is the mixture of experiment 9, so log p_0 is known, q_0 is computed on a grid, and
    the three parts have formulas, with the entropy H and the Fisher information J:
        steps      H(p_1) - H(p_0) - sigma_q^2 dt / 2 times the sum of J(t)   steps are not small
        learning   the sum of dt E|D - E[x_0|x_t]|^2 / (2 sigma_q^2 t^2)      D is not exact
        base       KL(p_1 || N(0, sigma_q^2))                                 the start is not p_1

What to look for in figures/
    bound.jpg         the ELBO lies below log q_0; do more steps close that gap, or the one above?
    three-parts.jpg   the gap of the exact denoiser and of three networks, part by part: which part
                      differs, and does the KL of what they sample follow it?

Try this
    python likelihood.py --num-steps 1000    the steps' part falls; does learning's?
    python likelihood.py --sigma-q 1         a base farther from p_1: does DDPM forget the start?
"""

import copy
import os
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path

os.environ["MPLBACKEND"] = "agg"  # figures are files, also from a notebook

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import nn
from tqdm import tqdm

# ------------------------------------------- The data -------------------------------------------
WEIGHTS, CENTERS = np.array([0.6, 0.4]), np.array([-1.0, 1.0])
SIGMA_0 = 0.3


def faults():
    """What the script cannot do with this data, a line each."""
    lines = []
    positive = abs(sum(WEIGHTS) - 1) < 1e-9 and min(WEIGHTS) > 0
    if not (positive and len(WEIGHTS) == len(CENTERS)):
        lines.append("WEIGHTS: not positive numbers with sum 1, one for each of CENTERS")
    if not (np.abs(CENTERS).max() <= 50 and 0.1 <= SIGMA_0 <= 5):
        lines.append("CENTERS and SIGMA_0: not from -50 to 50 and .1 to 5, too much for a grid")
    return lines


def draws(n, sigma_0, rng):
    """n draws of x_0, (n,).  rng: a NumPy Generator."""
    return rng.choice(CENTERS, size=n, p=WEIGHTS) + sigma_0 * rng.standard_normal(n)


@dataclass(frozen=True)
class Mixture:
    """x_0 is one of CENTERS, plus N(0, sigma_0^2).  x_t = x_0 + N(0, sigma_q^2 t), 0 <= t <= 1.

    An expectation is a sum over a grid: for smooth functions that vanish at both ends, nearly
    exact.
    """

    sigma_0: float
    sigma_q: float

    def log_joint(self, x, t):
        """log of p(center) p(x_t = x | center), for each center.  x: any shape.  (k, ...)"""
        variance = self.sigma_0**2 + self.sigma_q**2 * t
        logs = [np.log(w) - (x - c) ** 2 / (2 * variance) for w, c in zip(WEIGHTS, CENTERS)]
        return np.array(logs) - np.log(2 * np.pi * variance) / 2

    def log_density(self, x, t):
        """log p_t(x).  x: any shape.  Returns that shape."""
        return np.logaddexp.reduce(self.log_joint(x, t), axis=0)

    def posterior(self, x, t):
        """p(center | x_t = x), for each center.  x: (n,).  Returns (k, n)."""
        logits = self.log_joint(x, t)
        odds = np.exp(logits - logits.max(axis=0))
        return odds / odds.sum(axis=0)

    def score(self, x, t):
        """d/dx log p_t(x): the way to the mean center, over the variance.  x: (n,)."""
        return (CENTERS @ self.posterior(x, t) - x) / (self.sigma_0**2 + self.sigma_q**2 * t)

    def grid(self):
        """The points x, (n,): uniform about 0, out to 8 std of the farthest Gaussian of p_1."""
        spacing = min(self.sigma_0 / 6, self.sigma_q / 64)
        reach = np.abs(CENTERS).max() + 8 * np.hypot(self.sigma_0, self.sigma_q)
        n = int(reach / spacing)
        return spacing * np.arange(-n, n + 1)

    def average(self, values, t):
        """E[values(x_t)].  values: (n,), at the points of the grid."""
        x = self.grid()
        return (x[1] - x[0]) * (np.exp(self.log_density(x, t)) @ values)

    def entropy(self, t):
        """H(p_t) = -E[log p_t(x_t)], in nats."""
        return self.average(-self.log_density(self.grid(), t), t)

    def fisher(self, t):
        """J(t) = E[score^2], the Fisher information of p_t."""
        return self.average(self.score(self.grid(), t) ** 2, t)


# ----------------------------------------- The denoiser -----------------------------------------


def tweedie(x_t, t, *, mixture):
    """E[x_0 | x_t] = x_t + sigma_t^2 score(x_t, t), the exact denoiser.  x_t: (n,)."""
    return x_t + mixture.sigma_q**2 * t * mixture.score(x_t, t)


def reverse_mean(x_t, t, dt, *, denoiser):
    """E[x_{t-dt} | x_t] from E[x_0 | x_t], eq. (24) of the tutorial.

    Exact for any dt: of the noise x_t - x_0, the last dt brought on average the share dt / t.
    x_t: (n,), at time t;  0 < dt <= t <= 1;  denoiser(x_t, t) -> (n,).  Returns (n,).
    """
    return (dt / t) * denoiser(x_t, t) + (1 - dt / t) * x_t


# ------------------------------------------- Learning -------------------------------------------
# x_0 = x_t - sigma_t noise: the squared error of noise is that of x_0, over sigma_q^2 t.
LOSSES = {  # name: (what the network predicts, the power of 1 / t on |x_0 - D|^2)
    "x_0": ("x_0", 0),
    "x_0, ELBO's weight": ("x_0", 2),
    "noise": ("noise", 1),
}


class Denoiser(nn.Module):
    """A ReLU network D(x_t, t) that learns E[x_0 | x_t], from x_0 or from the noise."""

    def __init__(self, predicts, mixture, width=64):
        super().__init__()
        self.predicts, self.sigma_q = predicts, mixture.sigma_q
        self.mean_0 = np.average(CENTERS, weights=WEIGHTS)
        variance = np.average(np.subtract(CENTERS, self.mean_0) ** 2, weights=WEIGHTS)
        self.std_0 = (variance + mixture.sigma_0**2) ** 0.5
        self.layers = nn.Sequential(
            nn.Linear(2, width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, 1),
        )

    def forward(self, x_t, t):
        """D(x_t, t).  x_t: (n,);  t: a float or (n,).  Returns (n,)."""
        t = torch.as_tensor(t, dtype=x_t.dtype).expand_as(x_t)
        sigma_t = self.sigma_q * t**0.5
        unit = (x_t - self.mean_0) / (self.std_0**2 + sigma_t**2) ** 0.5  # mean 0, std 1
        output = self.layers(torch.stack([unit, sigma_t.log()], dim=1)).squeeze(1)
        if self.predicts == "noise":
            return x_t - sigma_t * output
        return self.mean_0 + self.std_0 * output


def weighted_loss(network, x_0, t, noise, power):
    """The mean of |x_0 - D(x_t, t)|^2 / t^power.  x_0, t, noise: (n,)."""
    x_t = x_0 + network.sigma_q * t**0.5 * noise
    return ((network(x_t, t) - x_0).square() / t**power).mean()


def train(predicts, power, *, num_steps, mixture, train_steps, rng, batch_size=512):
    """Pseudocode 6 with a weight; t is uniform on dt, 2 dt, ..., 1, the times of DDPM's steps.

    rng: a NumPy Generator.  Returns the trained network.
    """
    # nn.Linear draws its weights from torch's own generator: its seed is drawn from ours.
    torch.manual_seed(int(rng.integers(2**60)))
    network = Denoiser(predicts, mixture)
    optimizer = torch.optim.Adam(network.parameters(), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.006, train_steps)
    for _ in tqdm(range(train_steps), "training", disable=None):
        x_0 = draws(batch_size, mixture.sigma_0, rng)
        t = rng.integers(1, num_steps + 1, batch_size) / num_steps
        batch = (x_0, t, rng.standard_normal(batch_size))
        loss = weighted_loss(network, *(torch.from_numpy(a).float() for a in batch), power)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network.requires_grad_(False)


def learned(x_t, t, *, network):
    """D(x_t, t) of a trained network, for NumPy arrays.  x_t: (n,);  t: a float.  Returns (n,)."""
    return network(torch.from_numpy(x_t).float(), t).double().numpy()


# ------------------------------------------ The truth -------------------------------------------


def log_gaussian(x, mean, sigma):
    """The log density of N(mean, sigma^2) at x."""
    return -(((x - mean) / sigma) ** 2) / 2 - np.log((2 * np.pi) ** 0.5 * sigma)


def parts(denoiser, num_steps, mixture):
    """The three parts of the gap E log p_0 - E ELBO by their formulas, {name: number}."""
    x, sigma_q, dt = mixture.grid(), mixture.sigma_q, 1 / num_steps
    steps, learning = mixture.entropy(1) - mixture.entropy(0), 0
    for t in np.arange(1, num_steps + 1) / num_steps:
        steps -= sigma_q**2 * dt * mixture.fisher(t) / 2
        error = denoiser(x, t) - tweedie(x, t, mixture=mixture)
        learning += dt * mixture.average(error**2, t) / (2 * sigma_q**2 * t**2)
    base = mixture.average(mixture.log_density(x, 1) - log_gaussian(x, 0, sigma_q), 1)
    return {"steps": steps, "learning": learning, "base": base}


def log_output(reverse_mean, x, num_steps, sigma_q):
    """log q_0: the log density of what DDPM returns from the base, at the points x of the grid.

    A step moves the mass at a point to a Gaussian around the reverse mean of that point: to the
    points within 8 sigma of it. The last step sums logarithms: a bad denoiser can make q_0 smaller
    than any float.  Returns (n,).
    """
    dt, spacing = 1 / num_steps, x[1] - x[0]
    sigma = sigma_q * dt**0.5
    reach = int(8 * sigma / spacing) + 1
    mass = spacing * np.exp(log_gaussian(x, 0, sigma_q))
    for k in range(num_steps, 1, -1):  # t = k dt
        mean = reverse_mean(x, k / num_steps, dt)[:, None]
        near = np.rint((mean - x[0]) / spacing).astype(int) + np.arange(-reach, reach + 1)
        arrives = np.exp(log_gaussian(x[0] + spacing * near, mean, sigma))
        moved = spacing * mass[:, None] * arrives
        mass = np.bincount(near.clip(0, len(x) - 1).ravel(), moved.ravel(), len(x))
    log_mass, mean = np.log(mass.clip(1e-300)), reverse_mean(x, dt, dt)
    return np.array([np.logaddexp.reduce(log_mass + log_gaussian(y, mean, sigma)) for y in x])


# ------------------------------------------ Measuring -------------------------------------------
STEP_COUNTS = [1, 10, 100, 1000]


def elbo(denoiser, x, num_steps, sigma_q):
    """ELBO(x_0) of DDPM with any denoiser, for x_0 at the points x of the grid, (n,).

    E|x_0 - D|^2 = x_0^2 - 2 x_0 E[D] + E[D^2], and E[D(x_0 + noise)] is a convolution of D.
    """
    bound = log_gaussian(x, 0, sigma_q) - 1 / 2
    for k in range(1, num_steps + 1):  # t = k dt
        sigma_t = sigma_q * (k / num_steps) ** 0.5
        near = x[abs(x) <= 9 * sigma_t]
        kernel = (x[1] - x[0]) * np.exp(log_gaussian(near, 0, sigma_t))
        output = denoiser(x, k / num_steps)
        mean, square = (np.convolve(values, kernel, "same") for values in (output, output**2))
        bound += (1 - (x**2 - 2 * x * mean + square) / sigma_t**2) / (2 * k)
    return bound


def measure(denoiser, num_steps, mixture):
    """{name: (n,)}: log p_0, log q_0 and the ELBO of DDPM with a denoiser, on the grid."""
    x, mean = mixture.grid(), partial(reverse_mean, denoiser=denoiser)
    return {
        "log p_0": mixture.log_density(x, 0),
        "log q_0": log_output(mean, x, num_steps, mixture.sigma_q),
        "ELBO": elbo(denoiser, x, num_steps, mixture.sigma_q),
    }


def measure_gap(denoiser, num_steps, mixture):
    """{name: number}: the gap E log p_0 - E ELBO, its parts, and KL(p_0 || q_0)."""
    log_p, log_q, bound = measure(denoiser, num_steps, mixture).values()
    gap, kl = mixture.average(log_p - bound, 0), mixture.average(log_p - log_q, 0)
    return {"gap": gap, **parts(denoiser, num_steps, mixture), "KL(p_0 || q_0)": kl}


# ----------------------------------------- The figures ------------------------------------------
plt.style.use("default")  # the same figures whatever the reader's matplotlibrc says
BLUE, PINK, SKY = "#0072B2", "#CC79A7", "#56B4E9"
PARTS = {"learning": BLUE, "base": "0.75", "steps": SKY}  # from the axis upwards


def draw_bound(curves, x):
    """Around the data.  curves: {number of steps: of `measure`}, a panel for each;  x: the grid."""
    fig, axes = plt.subplots(1, len(curves), figsize=(11, 4.8), layout="constrained", sharey=True)
    margin = 10 / 3 * SIGMA_0
    shown = (min(CENTERS) - margin < x) & (x < max(CENTERS) + margin)
    for ax, (num_steps, logs) in zip(axes, curves.items()):
        log_p, log_q, bound = (log[shown] for log in logs.values())
        ax.plot(x[shown], log_p, "k", lw=3, label=r"$\log\,p_0(x)$, the data")
        ax.plot(x[shown], log_q, BLUE, lw=2, label=r"$\log\,q_0(x)$, what DDPM returns")
        ax.plot(x[shown], bound, PINK, lw=2, label="ELBO$(x)$, the bound")
        ax.fill_between(x[shown], bound, log_q, color=PINK, alpha=0.25)
        ax.set(xlabel="$x$", title=f"exact denoiser, number of steps: {num_steps}")
    # Between centers that lie far apart log p_0 is far below all that is of interest.
    axes[0].set_ylim(bottom=max(axes[0].get_ylim()[0], log_p.max() - 12))
    axes[0].set_ylabel("nats")
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return fig


def draw_parts(gaps, num_steps):
    """The gap, part by part, and the KL of the output.  gaps: {name: of `measure_gap`}."""
    fig, ax = plt.subplots(figsize=(8, 5), layout="constrained")
    names = [name.replace("x_0", "$x_0$") for name in gaps]
    height = np.zeros(len(gaps))
    for part, color in PARTS.items():
        size = np.array([gap[part] for gap in gaps.values()])
        ax.bar(names, size, 0.6, height, color=color, label=part)
        height += size
    kl = [gap["KL(p_0 || q_0)"] for gap in gaps.values()]
    ax.plot(names, kl, "kD", ms=8, mec="w", label=r"KL$(p_0\,\|\,q_0)$ of the output")
    ax.set_title(rf"$E\,\log\,p_0 - E\,$ELBO in three parts, number of steps: {num_steps}")
    ax.set(xlabel="denoiser: exact, or a network and its loss", ylabel="nats")
    fig.legend(loc="outside lower center", ncols=4)
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


def bound_rows(curves, mixture):
    """Averages over the data for each number of steps.  For `table`."""
    rows = [["steps (exact denoiser)", *(f"E {name}" for name in next(iter(curves.values())))]]
    for n, logs in curves.items():
        rows.append([f"{n}", *(f"{mixture.average(log, 0):.4f}" for log in logs.values())])
    return rows


def gap_rows(gaps, num_steps):
    """The gap of each denoiser and its parts.  For `table`."""
    rows = [[f"denoiser ({num_steps} steps)", *next(iter(gaps.values()))]]
    for name, gap in gaps.items():
        rows.append([name, *(f"{value:.4f}" for value in gap.values())])
    return rows


def main(argv=None):
    args = options(
        argv,
        *faults(),
        num_steps=(200, 1, 1000, "steps of DDPM with the networks, 1 / dt"),
        sigma_q=(2.0, 0.5, 4.0, "std of the noise at t = 1, and of the base"),
        train_steps=(2000, 1, 10**5, "steps of the optimizer, for each network"),
        seed=(0, 0, 10**6, "seed of every draw"),
    )
    torch.set_num_threads(1)  # the same bytes on any number of cores, and hardly slower
    rng = np.random.default_rng(args.seed)
    mixture = Mixture(SIGMA_0, args.sigma_q)

    denoisers = {"exact": partial(tweedie, mixture=mixture)}
    counts = {"num_steps": args.num_steps, "train_steps": args.train_steps}
    for name, loss in LOSSES.items():  # all from the same draws
        network = train(*loss, **counts, mixture=mixture, rng=copy.deepcopy(rng))
        denoisers[name] = partial(learned, network=network)
    gaps = {name: measure_gap(d, args.num_steps, mixture) for name, d in denoisers.items()}
    curves = {n: measure(denoisers["exact"], n, mixture) for n in STEP_COUNTS}

    for name, figure in {
        "bound": draw_bound({n: curves[n] for n in (10, 100)}, mixture.grid()),
        "three-parts": draw_parts(gaps, args.num_steps),
    }.items():
        figure.savefig(args.figures_dir / f"{name}.jpg", dpi=120)
    table(bound_rows(curves, mixture))
    table(gap_rows(gaps, args.num_steps))
    off = max(abs(gap["gap"] - sum(gap[part] for part in PARTS)) for gap in gaps.values())
    print(f"gap = steps + learning + base, to {off:.0e}")
    print(f"figures: {args.figures_dir}")


if __name__ == "__main__":
    main()
