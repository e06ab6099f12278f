"""Experiment 9: the reverse step is nearly Gaussian, if it is small; what counts is its mean.

The claim
    Given x_t, the earlier x_{t-dt} is nearly N(E[x_{t-dt} | x_t], sigma^2), sigma^2 = sigma_q^2 dt
    (Fact 1 of the tutorial). That is why DDPM adds Gaussian noise, why its steps must be small,
    and why only a mean has to be learned. With F = log p_{t-dt}, as in the tutorial's B.1, and its
    derivatives at x_t, KL(posterior || Gaussian) is, for small sigma,
        sigma^2 F'^2 / 2      if the mean is taken as x_t
        sigma^4 F''^2 / 4     if the mean is right
        sigma^6 F'''^2 / 12   if the variance is right, too

The truth beside it
    The data is a mixture of Gaussians, so every p_t is known, and p(x_{t-dt} | x_t) is Bayes' rule,
    summed on a grid. Averaged over p_t, its KL divergence to N(m, sigma^2) is, for any step,
        H(p_t) - H(p_{t-dt})                      for m = x_t
        H(p_t) - H(p_{t-dt}) - sigma^2 J(t) / 2   for m = E[x_{t-dt} | x_t]
    with the entropy H and the Fisher information J(t) = E[score^2]. So with mean x_t the sum over
    a run is H(p_1) - H(p_0), however many steps are taken; with the right mean it falls as dt, if
    dt is small. That sum, plus KL(p_1 || base), bounds KL(p_0 || what DDPM returns).

What to look for in figures/
    reverse-step.jpg   the posterior between two centers: how small must the step be?
    kl-vs-sigma.jpg    dots by Bayes' rule: slopes 2, 4, 6; the first two lie on the identities
    kl-vs-steps.jpg    a run: which of the sums do more steps make smaller?

Try this
    python nearly_gaussian.py --sigma-0 0.15    half the width: how many steps does it need?
    python nearly_gaussian.py --sigma-q 4       is a base nearer to p_1 better at the same steps?
"""

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

# ------------------------------------------- The data -------------------------------------------
WEIGHTS, CENTERS = np.array([0.6, 0.4]), np.array([-1.0, 1.0])


def faults():
    """What the script cannot do with this data, a line each."""
    lines = []
    positive = abs(sum(WEIGHTS) - 1) < 1e-9 and min(WEIGHTS) > 0
    if not (positive and len(WEIGHTS) == len(CENTERS)):
        lines.append("WEIGHTS: not positive numbers with sum 1, one for each of CENTERS")
    if not np.abs(CENTERS).max() <= 50:
        lines.append("CENTERS: not all from -50 to 50, too far for a grid")
    return lines


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


# --------------------------------------- The reverse mean ---------------------------------------


def reverse_mean(x_t, t, dt, *, mixture):
    """E[x_{t-dt} | x_t] from the score of p_t (Tweedie), exact for any dt.

    x_t: (n,), at time t;  0 < dt <= t <= 1.  Returns (n,).
    """
    return x_t + mixture.sigma_q**2 * dt * mixture.score(x_t, t)


# ------------------------------------------ The truth -------------------------------------------
# What a step is compared with, and the power of sigma that the KL divergence falls with.
GAUSSIANS = {"mean x_t": 2, "right mean": 4, "right mean and variance": 6}
WRONG, RIGHT, BOTH = GAUSSIANS


def log_gaussian(x, mean, sigma):
    """The log density of N(mean, sigma^2) at x."""
    return -(((x - mean) / sigma) ** 2) / 2 - np.log((2 * np.pi) ** 0.5 * sigma)


def step_posterior(x_t, t, dt, mixture):
    """p(x_{t-dt} | x_t) by Bayes' rule: p_{t-dt}(x) N(x_t; x, sigma^2), over its sum.

    x_t: (n,).  Returns k moves x_{t-dt} - x_t, (k,), and the log density of each, (n, k).
    """
    sigma = mixture.sigma_q * dt**0.5
    # If the center is known, too: a Gaussian narrower than sigma, this share of the way to it.
    share = sigma**2 / (mixture.sigma_0**2 + mixture.sigma_q**2 * t)
    likely = mixture.posterior(x_t, t) > 1e-16
    farthest = abs(np.subtract.outer(CENTERS, x_t))[likely].max()
    spacing = min(sigma / 8, mixture.sigma_0 / 4)
    n = int((8 * sigma + share * farthest) / spacing)
    moves = spacing * np.arange(-n, n + 1)
    logs = mixture.log_density(x_t[:, None] + moves, t - dt) - (moves / sigma) ** 2 / 2
    return moves, logs - np.logaddexp.reduce(logs, axis=1, keepdims=True) - np.log(spacing)


def identities(t, dt, mixture):
    """{Gaussian: E[KL(p(x_{t-dt} | x_t) || N(m, sigma^2))]}, m = x_t and m = E[x_{t-dt} | x_t].

    Exact for any dt. The right mean is sigma^2 score away from x_t: that saves sigma^2 J / 2.
    """
    rise = mixture.entropy(t) - mixture.entropy(t - dt)
    return {WRONG: rise, RIGHT: rise - mixture.sigma_q**2 * dt * mixture.fisher(t) / 2}


def constants(mixture):
    """{Gaussian: E[F'^2] / 2, E[F''^2] / 4, E[F'''^2] / 12} of F = log p_0.

    F'' holds the variance, and F''' the third moment, of p(center | x).
    """
    x, variance = mixture.grid(), mixture.sigma_0**2
    posterior = mixture.posterior(x, 0)
    deviation = np.subtract.outer(CENTERS, x) - (CENTERS @ posterior - x)  # (k, n)
    first = mixture.score(x, 0)
    second = ((posterior * deviation**2).sum(axis=0) / variance - 1) / variance
    third = (posterior * deviation**3).sum(axis=0) / variance**3
    squares = {WRONG: first**2 / 2, RIGHT: second**2 / 4, BOTH: third**2 / 12}
    return {name: mixture.average(square, 0) for name, square in squares.items()}


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
STEP_COUNTS, NUM_SIGMAS = [1, 3, 10, 30, 100, 300, 1000], 25
ROUNDING = 1e-14  # the least KL divergence that the sums below can tell from 0


def step_kl(x_t, t, dt, mixture):
    """{Gaussian: KL(p(x_{t-dt} | x_t) || Gaussian)}.  x_t: (n,).  Returns arrays (n,).

    The integral of p log(p / g) - p + g: nowhere negative, so that nothing cancels.
    """
    moves, logs = step_posterior(x_t, t, dt, mixture)
    p, spacing = np.exp(logs), moves[1] - moves[0]
    right = (reverse_mean(x_t, t, dt, mixture=mixture) - x_t)[:, None]
    sigma = mixture.sigma_q * dt**0.5
    std = (spacing * p * (moves - right) ** 2).sum(axis=1, keepdims=True) ** 0.5
    divergences = {}
    for name, mean, width in [(WRONG, 0, sigma), (RIGHT, right, sigma), (BOTH, right, std)]:
        log_g = log_gaussian(moves, mean, width)
        divergences[name] = spacing * (p * (logs - log_g) - p + np.exp(log_g)).sum(axis=1)
    return divergences


def columns(rows):
    """Dicts with the same keys as one dict of arrays."""
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def measure_steps(sigmas, mixture):
    """The last step, from dt to 0, with sigma = sigma_q sqrt(dt): step_kl averaged over x_dt.

    sigmas: (n,).  Returns three dicts {Gaussian: (n,)}: that, its identities, and its limits.
    """
    divergences, exact = [], []
    for dt in (sigmas / mixture.sigma_q) ** 2:
        x = mixture.grid()
        mass = (x[1] - x[0]) * np.exp(mixture.log_density(x, dt))
        near = mass > 1e-20  # elsewhere the posterior may lie beyond the moves
        kl = step_kl(x[near], dt, dt, mixture)
        divergences.append({name: each @ mass[near] for name, each in kl.items()})
        exact.append(identities(dt, dt, mixture))
    limits = {name: c * sigmas ** GAUSSIANS[name] for name, c in constants(mixture).items()}
    return columns(divergences), columns(exact), limits


def measure_run(num_steps, mixture):
    """{name: number}; q_0 is the density of what DDPM returns.

    The sum of its steps' `identities` with mean x_t; with the right mean, the limit for many steps
    and the sum itself; the sum + KL(p_1 || base), a bound on the next; KL(p_0 || q_0); q_0's std.
    """
    x, sigma_q = mixture.grid(), mixture.sigma_q
    rise = mixture.entropy(1) - mixture.entropy(0)  # every entropy between comes with + and -
    # H rises at the rate sigma_q^2 J / 2. So `right` is that integral, less its Riemann sum at the
    # later ends: about dt / 2 times the fall of sigma_q^2 J / 2.
    limit = sigma_q**2 / 4 * (mixture.fisher(0) - mixture.fisher(1)) / num_steps
    fishers = [mixture.fisher(k / num_steps) for k in range(1, num_steps + 1)]
    right = rise - sigma_q**2 / 2 * sum(fishers) / num_steps
    base = mixture.average(mixture.log_density(x, 1) - log_gaussian(x, 0, sigma_q), 1)
    log_q = log_output(partial(reverse_mean, mixture=mixture), x, num_steps, sigma_q)
    q = np.exp(log_q) * (x[1] - x[0])
    return {
        "sum, mean x_t": rise,
        "limit": limit,
        "sum, right mean": right,
        "+ KL(p_1 || base)": right + base,
        "KL(p_0 || q_0)": mixture.average(mixture.log_density(x, 0) - log_q, 0),
        "std of q_0": (q @ x**2 - (q @ x) ** 2) ** 0.5,
    }


# ----------------------------------------- The figures ------------------------------------------
plt.style.use("default")  # the same figures whatever the reader's matplotlibrc says
BLUE, GREEN, PINK, SKY = "#0072B2", "#009E73", "#CC79A7", "#56B4E9"
COLORS = {WRONG: PINK, RIGHT: BLUE, BOTH: GREEN}


def draw_step(mixture):
    """Figure 2 of the tutorial: p(x_0 | x_t) over its Gaussian, for three steps dt = t.

    x_t is the middle of the widest gap between neighbouring centers.
    """
    fig, axes = plt.subplots(1, 3, figsize=(12, 4.2), layout="constrained")
    centers = np.unique(CENTERS)
    left = np.diff(centers, append=centers[-1]).argmax()
    x_t = centers[left : left + 2].mean(keepdims=True)
    for ax, dt in zip(axes, (1 / 16, 1 / 64, 1 / 16_384)):
        sigma = mixture.sigma_q * dt**0.5
        moves, logs = step_posterior(x_t, dt, dt, mixture)
        x_0, mean = x_t + moves, reverse_mean(x_t, dt, dt, mixture=mixture)
        kl = step_kl(x_t, dt, dt, mixture)[RIGHT][0]
        given = f"|x_t = {x_t[0]:.3g}"
        ax.fill_between(x_0, np.exp(logs[0]), color="0.8", label=f"posterior $p(x_0{given})$")
        label = rf"$N(E[x_0{given}], \sigma^2)$"
        ax.plot(x_0, np.exp(log_gaussian(x_0, mean, sigma)), BLUE, label=label)
        ax.set(title=rf"$\sigma$ = {sigma:.3g}: KL = {kl:.3g}", xlabel="$x_0$")
        shown = max(4.5 * sigma, moves[-1] - 5.5 * sigma)
        ax.set(xlim=(x_t[0] - shown, x_t[0] + shown), ylim=(0, None))
    axes[0].set_ylabel("density")
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return fig


def draw_sigmas(sigmas, divergences, exact, limits):
    """sigmas: (n,);  the others: of `measure_steps`."""
    fig, ax = plt.subplots(figsize=(7.5, 5.5), layout="constrained")
    for name, kl in divergences.items():
        told = kl > ROUNDING
        label = name.replace("x_t", "$x_t$")
        ax.loglog(sigmas[told], kl[told], "o", color=COLORS[name], ms=5, label=label)
    for label, curve in zip(["identities", None], exact.values()):
        ax.loglog(sigmas, curve, "k", lw=1, label=label)
    for name, limit in limits.items():
        told, power = limit > ROUNDING, GAUSSIANS[name]
        label = rf"${limit[0] / sigmas[0] ** power:.3g}\,\sigma^{power}$"
        ax.loglog(sigmas[told], limit[told], "--", color=COLORS[name], lw=1, label=label)
    ax.set(xlabel=r"$\sigma = \sigma_q \sqrt{\Delta t}$", ylabel="KL", ylim=(None, 10))
    ax.set_title(r"KL$(p(x_0|x_{\Delta t})\,\|\,$Gaussian$)$, averaged over $x_{\Delta t}$")
    ax.legend(ncols=2)
    return fig


def draw_runs(runs):
    """runs: {number of steps: of `measure_run`}."""
    fig, ax = plt.subplots(figsize=(7.5, 5), layout="constrained")
    curves = columns([*runs.values()])
    for name, style, color, label in [
        ("sum, mean x_t", "o-", PINK, "sum, mean $x_t$"),
        ("sum, right mean", "o-", BLUE, "sum, right mean"),
        ("limit", "--", "k", "its limit for many steps"),
        ("KL(p_0 || q_0)", "^-", SKY, r"KL$(p_0\,\|\,q_0)$, of what DDPM returns"),
    ]:
        ax.loglog([*runs], curves[name], style, color=color, label=label)
    top = max(curves["sum, mean x_t"].max(), curves["KL(p_0 || q_0)"].max())
    ax.set(xlabel="number of steps", ylabel="KL", ylim=(None, 3 * top))
    ax.set_title("A run: the sum of its steps; its output")
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


def step_rows(sigmas, divergences, exact, limits):
    """Slopes and limits at the smallest sigma; at all, how far from the identity.  For `table`."""
    text = [[f"last step, sigma = {sigmas[0]:g}", "slope of KL in sigma", "KL / limit"]]
    text[0].append("off its identity, any sigma")
    for name, kl in divergences.items():
        slope = ratio = off = "-"
        if kl[0] > ROUNDING:
            slope = f"{np.log(kl[1] / kl[0]) / np.log(sigmas[1] / sigmas[0]):.3f}"
            ratio = f"{kl[0] / limits[name][0]:.4f}"
        if name in exact:
            off = f"{abs(kl - exact[name]).max():.0e}"
        text.append([name, slope, ratio, off])
    return [*zip(*text)]


def run_rows(runs):
    """A row of numbers for each number of steps.  For `table`."""
    rows = [["steps", *next(iter(runs.values()))]]
    return rows + [[f"{n}", *(f"{x:.4f}" for x in run.values())] for n, run in runs.items()]


def main(argv=None):
    args = options(
        argv,
        *faults(),
        sigma_0=(0.3, 0.15, 1.0, "std of each Gaussian of the data"),
        sigma_q=(2.0, 0.5, 4.0, "std of the noise at t = 1, and of the base"),
    )
    mixture = Mixture(args.sigma_0, args.sigma_q)

    sigmas = np.geomspace(0.01, args.sigma_q, NUM_SIGMAS)
    steps = measure_steps(sigmas, mixture)
    runs = {n: measure_run(n, mixture) for n in STEP_COUNTS}

    for name, figure in {
        "reverse-step": draw_step(mixture),
        "kl-vs-sigma": draw_sigmas(sigmas, *steps),
        "kl-vs-steps": draw_runs(runs),
    }.items():
        figure.savefig(args.figures_dir / f"{name}.jpg", dpi=120)
    table(step_rows(sigmas, *steps))
    table(run_rows(runs))
    print(f"figures: {args.figures_dir}")


if __name__ == "__main__":
    main()
