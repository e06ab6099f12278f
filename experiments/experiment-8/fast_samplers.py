"""Experiment 8: fast samplers. Which solver, which noise levels, how many evaluations?

The claim
    DDIM with small steps solves an ordinary differential equation, the probability-flow ODE
        dx/dsigma = (x - D(x, sigma)) / sigma,    D(x, sigma) = E[x_0 | x_0 + N(0, sigma^2 I) = x],
    from sigma = sigma_q, where there is noise, to sigma = 0, where there is data. Here sigma is the
    tutorial's sigma_t = sigma_q sqrt(t). DDIM is Euler's method for it, on a grid that is uniform
    in t. Both can be bettered (section 5, "Samplers in practice"):
      the solver  Heun's method and DPM-Solver++(2M) are of second order: small steps of half the
                  length leave a quarter of the error;
      the grid    if sigma_q is large, uniform t spends nearly all steps at large sigma and leaps
                  over the scales on which the data has its detail.
    What costs time is evaluating the denoiser, a network in practice. So errors are compared at
    equal numbers of evaluations, not of steps. How many does it take to do better than the
    tutorial's sampler with 1000?

The truth beside it
    The data is a mixture of Gaussians, its denoiser is Bayes' rule, and the ODE is solved to eight
    digits by Runge-Kutta: `solution`. A sample's twin is here the ODE's solution from the same
    start, and the error is the root mean square distance of samples to their twins. Starts are
    drawn from the true p_1.

What to look for in figures/
    error-vs-evaluations.jpg   which gains more, the grid or the solver?
    grids.jpg                  where each grid puts its steps, and what it leaps over
    samples.jpg                lines join samples to their twins

Try this
    python fast_samplers.py --num-evaluations 8    very few: which solver fails, and where?
    python fast_samplers.py --sigma-q 40           ten times the noise: which grids suffer?
    python fast_samplers.py --sigma-0 0.02         finer detail: which grids still find it?
    python fast_samplers.py --imbalance 8          unequal weights: do samples reach their Gaussian?
"""

import math
import os
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from functools import cache, partial
from itertools import zip_longest
from pathlib import Path

os.environ["MPLBACKEND"] = "agg"  # figures are files, also from a notebook

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.collections import LineCollection
from tqdm import tqdm

# ------------------------------------------- The data -------------------------------------------
# x_0 is one of the centers, (k, 2), plus N(0, sigma_0^2 I).  Their weights: of an option.
ANGLES = 2 * np.pi * np.arange(8) / 8
CENTERS = np.stack([np.cos(ANGLES), np.sin(ANGLES)], axis=1)


def faults():
    """What the script cannot do with the centers, a line each."""
    try:
        centers = np.array(CENTERS, float)
    except (TypeError, ValueError):  # words, or rows of different lengths
        centers = np.zeros(0)
    if centers.ndim != 2 or centers.shape[1] != 2 or not centers.size:
        yield "CENTERS: points in the plane, (k, 2)"
    elif not np.isfinite(centers).all():
        yield "CENTERS: one of them is not finite"


def mixture(n, rng, *, weights, sigma_0):
    """n draws of x_0, (n, 2).  weights: (k,), of the centers, of sum 1."""
    x_0 = rng.choice(CENTERS, size=n, p=weights)
    return x_0 + sigma_0 * rng.standard_normal(x_0.shape)


# ----------------------------------------- The denoiser -----------------------------------------
# x = x_0 + N(0, sigma^2 I) is a center plus N(0, (sigma_0^2 + sigma^2) I). Which center it was is
# Bayes' rule (experiment 2); given the center, (x_0, x) is jointly Gaussian (experiment 0).


def mean_center(x, variance, *, weights):
    """E[center | x] when x is a center plus N(0, variance I).  x: (n, 2).  Returns (n, 2).

    log w_i - |x - center_i|^2 / (2 variance), but for |x|^2, alike for all i.
    """
    centers = np.asarray(CENTERS)
    heights = np.log(weights) - (centers**2).sum(axis=1) / (2 * variance)
    logits = centers / variance @ x.T + heights[:, None]  # (k, n)
    odds = np.exp(logits - logits.max(axis=0))
    return (odds / odds.sum(axis=0)).T @ centers


def denoiser(x, sigma, *, weights, sigma_0):
    """D(x, sigma) = E[x_0 | x_0 + N(0, sigma^2 I) = x].  x: (n, 2);  sigma > 0.  (n, 2)"""
    variance = sigma_0**2 + sigma**2
    return (sigma_0**2 * x + sigma**2 * mean_center(x, variance, weights=weights)) / variance


# ----------------------------------------- The samplers -----------------------------------------
# They know the denoiser, D(x, sigma), and a grid of noise levels: sigma_q = sigmas[0] > ... > 0.
# Each yields one array a step. A step goes from sigma to next_sigma.


def ddim(denoiser, x, sigmas):
    """Algorithm 2 of the tutorial on any grid: Euler's method.  One evaluation a step.

    lam (E[x_{t-dt} | x_t] - x_t), with eq. (24) put in, is (next_sigma - sigma) (x - D) / sigma.
    """
    for sigma, next_sigma in zip(sigmas, sigmas[1:]):
        slope = (x - denoiser(x, sigma)) / sigma
        x = x + (next_sigma - sigma) * slope
        yield x


def heun(denoiser, x, sigmas):
    """Heun's method: Euler's step, then again with the mean of the slopes at its two ends.

    Karras et al. (2022, arXiv 2206.00364), Algorithm 1. Two evaluations a step, but for the last:
    at sigma = 0 there is no slope, so it stays Euler's.
    """
    for sigma, next_sigma in zip(sigmas, sigmas[1:]):
        slope = (x - denoiser(x, sigma)) / sigma
        euler = x + (next_sigma - sigma) * slope
        if next_sigma == 0:
            yield euler
        else:
            next_slope = (euler - denoiser(euler, next_sigma)) / next_sigma
            x = x + (next_sigma - sigma) * (slope + next_slope) / 2
            yield x


def dpm_solver_2m(denoiser, x, sigmas):
    """DPM-Solver++(2M).  Lu et al. (2022, arXiv 2211.01095), Algorithm 2, with alpha = 1.

    With lambda = -log sigma the ODE is dx/dlambda = D - x. Were D constant in a step, x would come
    nearer to D by the factor next_sigma / sigma, exactly: that is DDIM. Here D is the straight line
    in lambda through its last two values, taken at the middle of the step. One evaluation a step.
    The first step has no earlier value, the last is infinitely long in lambda: both stay DDIM's.
    """
    earlier, length_earlier = x, math.inf  # a line through no earlier value is level
    for sigma, next_sigma in zip(sigmas, sigmas[1:]):
        now = middle = denoiser(x, sigma)
        if next_sigma > 0:
            length = math.log(sigma / next_sigma)
            middle = now + length / (2 * length_earlier) * (now - earlier)
            earlier, length_earlier = now, length
        x = middle + (next_sigma / sigma) * (x - middle)
        yield x


SOLVERS = {"DDIM": ddim, "Heun": heun, "DPM-Solver++(2M)": dpm_solver_2m}


# Grids: n steps are n + 1 noise levels, from sigma_max down to 0.


def uniform_t(n, sigma_max):
    """The tutorial's grid: t = 1, 1 - 1/n, ..., 0, and sigma = sigma_max sqrt(t).  (n + 1,)."""
    return sigma_max * np.sqrt(np.arange(n, -1, -1) / n)


def uniform_sigma(n, sigma_max):
    """Steps of equal length in sigma.  Returns (n + 1,)."""
    return sigma_max * np.arange(n, -1, -1) / n


def log_uniform(n, sigma_min, sigma_max):
    """Steps of equal ratio: uniform in log sigma, then 0.  Returns (n + 1,)."""
    return np.append(np.geomspace(sigma_max, sigma_min, n), 0)


def karras(n, sigma_min, sigma_max, rho=7):
    """Uniform in sigma^(1 / rho), then 0: eq. (5) of Karras et al. (2022).  Returns (n + 1,)."""
    return np.append(np.linspace(sigma_max ** (1 / rho), sigma_min ** (1 / rho), n) ** rho, 0)


SIGMA_MIN = 0.002  # as in Karras et al. (2022)
GRIDS = {
    "uniform t": uniform_t,
    "uniform sigma": uniform_sigma,
    "log sigma": lambda n, sigma_max: log_uniform(n, SIGMA_MIN, sigma_max),
    "rho = 7": lambda n, sigma_max: karras(n, SIGMA_MIN, sigma_max),
}


# ------------------------------------------ The truth -------------------------------------------


def solution(x, sigma_max, *, weights, sigma_0, num_steps=1000):
    """Where the ODE takes x, (n, 2), from sigma_max to 0, by the classic Runge-Kutta method.

    In the variable u = log sqrt(sigma_0^2 + sigma^2) the ODE is dx/du = x - E[center | x]: smooth
    down to sigma = 0. None of the samplers above is used.  Returns (n, 2).
    """

    def slope(x, u):
        return x - mean_center(x, math.exp(2 * u), weights=weights)

    u = math.log(math.hypot(sigma_0, sigma_max))
    h = (math.log(sigma_0) - u) / num_steps
    for _ in range(num_steps):
        k_1 = slope(x, u)
        k_2 = slope(x + h / 2 * k_1, u + h / 2)
        k_3 = slope(x + h / 2 * k_2, u + h / 2)
        k_4 = slope(x + h * k_3, u + h)
        x = x + h / 6 * (k_1 + 2 * k_2 + 2 * k_3 + k_4)
        u = u + h
    return x


# ------------------------------------------ Measuring -------------------------------------------
BUDGETS = [8, 15, 30, 60, 125, 250, 500, 1000]  # numbers of evaluations


@cache
def evaluations(solver, num_steps):
    """How often a solver evaluates the denoiser in num_steps steps: counted on one point."""
    evaluated = []

    def counted(x, sigma):
        evaluated.append(sigma)
        return x

    for _ in solver(counted, np.zeros((1, 2)), range(num_steps, -1, -1)):
        pass
    return len(evaluated)


def most_steps(solver, budget):
    """The most steps with at most `budget` evaluations, found by halving; at least 1."""
    least, most = 1, budget
    while least < most:
        middle = (least + most + 1) // 2
        if evaluations(solver, middle) <= budget:
            least = middle
        else:
            most = middle - 1
    return least


def sample(denoiser, x_1, sigma_q, budget):
    """{(solver, grid): x_0, (n, 2)}, each from x_1 with at most `budget` evaluations."""
    samples = {}
    for grid, levels in GRIDS.items():
        for name, solver in SOLVERS.items():
            for x_t in solver(denoiser, x_1, levels(most_steps(solver, budget), sigma_q)):
                samples[name, grid] = x_t
    return samples


def apart(x_0, twins):
    """Root mean square distance of samples to their twins, (n, 2) each."""
    return ((x_0 - twins) ** 2).sum(axis=1).mean() ** 0.5


def measure(denoiser, x_1, twins, sigma_q):
    """The error of each solver on each grid: {(solver, grid): one for each of BUDGETS}."""
    errors = {(name, grid): [] for grid in GRIDS for name in SOLVERS}
    for budget in tqdm(BUDGETS, "evaluations", disable=None):
        for run, x_0 in sample(denoiser, x_1, sigma_q, budget).items():
            errors[run].append(apart(x_0, twins))
    return errors


def report(errors):
    """Rows for `table`.  errors: of measure."""
    rows = [["RMS distance to twins, evaluations <=", *map(str, BUDGETS)]]
    for grid in ("uniform t", "rho = 7"):  # the others are in the figure
        for name in SOLVERS:
            rows.append([f"{name}, {grid}", *(f"{error:.2g}" for error in errors[name, grid])])
    return rows


# ----------------------------------------- The figures ------------------------------------------
plt.style.use("default")  # the same figures whatever the reader's matplotlibrc says
ORANGE, PINK, SKY = "#E69F00", "#CC79A7", "#56B4E9"

STYLES = {"DDIM": (ORANGE, "o"), "Heun": (SKY, "s"), "DPM-Solver++(2M)": (PINK, "^")}
TITLES = {
    "uniform t": "uniform $t$",
    "uniform sigma": r"uniform $\sigma$",
    "log sigma": r"uniform $\log\,\sigma$",
    "rho = 7": r"$\rho$ = 7",
}


def draw_errors(errors):
    """A panel for each grid.  errors: of measure."""
    fig, axes = plt.subplots(1, 4, figsize=(13, 4.2), layout="constrained", sharey=True)
    for ax, grid in zip(axes, GRIDS):
        for name, (color, marker) in STYLES.items():
            ax.loglog(BUDGETS, errors[name, grid], color=color, marker=marker, ms=5, label=name)
        ax.set(xlabel="evaluations of the denoiser", title=TITLES[grid])
        ax.set_xticks(BUDGETS, BUDGETS, fontsize=9)
        ax.set_xticks([], minor=True)
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("RMS distance to the twins")
    fig.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=len(STYLES))
    return fig


def draw_grids(num_steps, sigma_q, sigma_0):
    """Where the grids put their steps."""
    fig, ax = plt.subplots(figsize=(8, 3.4), layout="constrained")
    zero = SIGMA_MIN / 4  # where sigma = 0 is drawn
    ax.axvspan(zero / 2, sigma_0, color="0.9", lw=0)
    for row, grid in enumerate(GRIDS):
        sigmas = np.maximum(GRIDS[grid](num_steps, sigma_q), zero)
        ax.plot(sigmas, np.full(len(sigmas), -row), "o-", color="k", mfc="w")
    ax.set_yticks(range(0, -4, -1), [TITLES[grid] for grid in GRIDS])
    ticks = [zero, SIGMA_MIN, 0.01, 0.1, 1, 10, 100]
    ax.set(xscale="log", xlabel=r"noise level $\sigma$", ylim=(-3.6, 0.6))
    ax.set_xticks(ticks, ["0", *map("{:g}".format, ticks[1:])])
    ax.set_xticks([], minor=True)
    ax.set_xlim(1.5 * max(sigma_0, sigma_q), zero / 2)
    ax.set_title(rf"Steps on each grid: {num_steps}; grey: below $\sigma_0$ = {sigma_0:g}")
    return fig


def draw_samples(samples, twins, num_evaluations, sigma_0):
    """Solvers by grids, with lines to the twins.  samples: {(solver, grid): x_0, (n, 2)}."""
    size = (10, 0.5 + 2.5 * len(STYLES))
    fig, axes = plt.subplots(len(STYLES), 4, figsize=size, layout="constrained")
    middle = (np.min(CENTERS, axis=0) + np.max(CENTERS, axis=0)) / 2
    side = 0.6 * np.ptp(CENTERS, axis=0).max() + 4 * sigma_0
    (left, right), (bottom, top) = np.transpose([middle - side, middle + side])
    for row, (name, (color, _)) in zip(axes, STYLES.items()):
        for ax, grid in zip(row, GRIDS):
            lines = np.stack([samples[name, grid], twins], axis=1)[:1000]  # (1000, 2, 2)
            ax.add_collection(LineCollection(lines, colors="0.65", lw=0.5))
            ax.plot(*lines[:, 1].T, ".", color="0.3", ms=3, mew=0, label="twins")
            ax.plot(*lines[:, 0].T, ".", color=color, ms=3, mew=0, label=name)
            ax.set(xlim=(left, right), ylim=(bottom, top), aspect="equal", xticks=[], yticks=[])
        row[0].set_ylabel(name, color=color, fontsize=12)
    for ax, grid in zip(axes[0], GRIDS):
        ax.set_title(TITLES[grid])
    fig.suptitle(f"Evaluations: at most {num_evaluations}; grey: the twins")
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


def main(argv=None):
    args = options(
        argv,
        *faults(),
        num_evaluations=(15, 2, 1000, "evaluations in the pictures"),
        num_samples=(1000, 1, 10**6, "samples of each sampler"),
        sigma_0=(0.05, 0.01, 1.0, "std of each Gaussian"),
        sigma_q=(4.0, 0.1, 100.0, "std of the noise at t = 1"),
        imbalance=(1.0, 1.0, 100.0, "weight of the last center over that of the first"),
        seed=(0, 0, 10**6, "seed of every draw"),
    )
    rng = np.random.default_rng(args.seed)
    weights = np.geomspace(1, args.imbalance, len(CENTERS))
    data = {"weights": weights / weights.sum(), "sigma_0": args.sigma_0}
    known = partial(denoiser, **data)

    x_0 = mixture(args.num_samples, rng, **data)
    x_1 = x_0 + args.sigma_q * rng.standard_normal(x_0.shape)
    twins = solution(x_1, args.sigma_q, **data)

    errors = measure(known, x_1, twins, args.sigma_q)
    samples = sample(known, x_1, args.sigma_q, args.num_evaluations)

    for name, figure in {
        "error-vs-evaluations": draw_errors(errors),
        "grids": draw_grids(args.num_evaluations, args.sigma_q, args.sigma_0),
        "samples": draw_samples(samples, twins, args.num_evaluations, args.sigma_0),
    }.items():
        figure.savefig(args.figures_dir / f"{name}.jpg", dpi=120)
    table(report(errors))
    print(f"figures: {args.figures_dir}")


if __name__ == "__main__":
    main()
