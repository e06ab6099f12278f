"""Experiment 9: the reverse step is nearly Gaussian, if it is small; what counts is its mean.

The claim
    Given x_t, the earlier x_{t-dt} is nearly N(E[x_{t-dt} | x_t], sigma^2), sigma^2 = sigma_q^2 dt
    (Fact 1 of the tutorial). That is why DDPM adds Gaussian noise, why its steps must be small,
    and why only a mean has to be learned. With F = log p_{t-dt} and its derivatives at x_t,
    KL(posterior || Gaussian) is, for small sigma,
        sigma^2 F'^2 / 2      if the mean is taken as x_t
        sigma^4 F''^2 / 4     if the mean is right
        sigma^6 F'''^2 / 12   if the variance is right, too

The truth beside it
    The data is two Gaussians, so every p_t is known, and p(x_{t-dt} | x_t) is Bayes' rule, summed
    on a grid. For steps of any size, averaged over p_t, its KL divergence to N(m, sigma^2) is
        H(p_t) - H(p_{t-dt})                      for m = x_t
        H(p_t) - H(p_{t-dt}) - sigma^2 J(t) / 2   for m = E[x_{t-dt} | x_t]
    with the entropy H and the Fisher information J(t) = E[score^2]. So with mean x_t the sum over
    a run is H(p_1) - H(p_0), however many steps are taken; with the right mean it falls as dt, if
    dt is small. That sum, plus KL(p_1 || base), bounds KL(p_0 || what DDPM returns).

What to look for in figures/
    reverse-step.jpg   two modes, one Gaussian: bad until the step is far smaller than their gap
    kl-vs-sigma.jpg    dots by Bayes' rule: slopes 2, 4, 6; the first two lie on the identities
    kl-vs-steps.jpg    a run: more steps do nothing for mean x_t

Try this
    python nearly_gaussian.py --sigma-0 0.15    half the width: how many steps does it need?
    python nearly_gaussian.py --sigma-q 4       a better base, at the price of more steps
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


@dataclass(frozen=True)
class Mixture:
    """x_0 is one of CENTERS, plus N(0, sigma_0^2).  x_t = x_0 + N(0, sigma_q^2 t), 0 <= t <= 1.

    An expectation is a sum over a grid: for smooth functions that vanish at both ends, nearly
    exact.
    """

    sigma_0: float
    sigma_q: float

    def log_joint(self, x, t):
        """log of p(center) p(x_t = x | center), for each center.  x: any shape.  (2, ...)"""
        variance = self.sigma_0**2 + self.sigma_q**2 * t
        logs = [np.log(w) - (x - c) ** 2 / (2 * variance) for w, c in zip(WEIGHTS, CENTERS)]
        return np.array(logs) - np.log(2 * np.pi * variance) / 2

    def log_density(self, x, t):
        """log p_t(x).  x: any shape.  Returns that shape."""
        return np.logaddexp.reduce(self.log_joint(x, t), axis=0)

    def posterior(self, x, t):
        """p(center | x_t = x), for each center.  x: (n,).  Returns (2, n)."""
        logits = self.log_joint(x, t)
        odds = np.exp(logits - logits.max(axis=0))
        return odds / odds.sum(axis=0)

    def score(self, x, t):
        """d/dx log p_t(x): the way to the mean center, over the variance.  x: (n,)."""
        return (CENTERS @ self.posterior(x, t) - x) / (self.sigma_0**2 + self.sigma_q**2 * t)

    def grid(self):
        """The points x, (n,): uniform, finer than the data's detail, out to 8 std of p_1."""
        spacing = min(self.sigma_0 / 6, self.sigma_q / 64)
        n = int((1 + 8 * np.hypot(self.sigma_0, self.sigma_q)) / spacing)
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


def log_gaussian(x, mean, sigma):
    """The log density of N(mean, sigma^2) at x."""
    return -(((x - mean) / sigma) ** 2) / 2 - np.log((2 * np.pi) ** 0.5 * sigma)


def step_posterior(x_t, t, dt, mixture):
    """p(x_{t-dt} | x_t) by Bayes' rule: p_{t-dt}(x) N(x_t; x, sigma^2), over its sum.

    x_t: (n,).  Returns k moves x_{t-dt} - x_t, (k,), and the log density of each, (n, k).
    """
    sigma = mixture.sigma_q * dt**0.5
    spacing = min(sigma / 8, mixture.sigma_0 / 4)
    moves = np.arange(-14 * sigma, 14 * sigma, spacing)
    logs = mixture.log_density(x_t[:, None] + moves, t - dt) - (moves / sigma) ** 2 / 2
    return moves, logs - np.logaddexp.reduce(logs, axis=1, keepdims=True) - np.log(spacing)


def identities(t, dt, mixture):
    """E[KL(p(x_{t-dt} | x_t) || N(m, sigma^2))] for m = x_t and m = E[x_{t-dt} | x_t].  (2,)

    Exact for any dt. The right mean is sigma^2 score away from x_t: that saves sigma^2 J / 2.
    """
    rise = mixture.entropy(t) - mixture.entropy(t - dt)
    return np.array([rise, rise - mixture.sigma_q**2 * dt * mixture.fisher(t) / 2])


def constants(mixture):
    """E[F'^2] / 2, E[F''^2] / 4 and E[F'''^2] / 12 of F = log p_0, (3,).

    F'' holds the variance, and F''' the third moment, of p(center | x).
    """
    x, variance = mixture.grid(), mixture.sigma_0**2
    posterior = mixture.posterior(x, 0)
    deviation = CENTERS[:, None] - CENTERS @ posterior  # (2, n)
    first = mixture.score(x, 0)
    second = ((posterior * deviation**2).sum(axis=0) / variance - 1) / variance
    third = (posterior * deviation**3).sum(axis=0) / variance**3
    squares = [first**2 / 2, second**2 / 4, third**2 / 12]
    return np.array([mixture.average(square, 0) for square in squares])


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
    log_last = log_gaussian(x[:, None], reverse_mean(x, dt, dt), sigma)
    return np.logaddexp.reduce(np.log(mass.clip(1e-300)) + log_last, axis=1)


# ------------------------------------------ Measuring -------------------------------------------
GAUSSIANS = ["mean x_t", "right mean", "right mean and variance"]  # that a step is compared with
STEP_COUNTS = [1, 3, 10, 30, 100, 300, 1000]


def step_kl(x_t, t, dt, mixture):
    """KL(p(x_{t-dt} | x_t) || Gaussian) for each of GAUSSIANS.  x_t: (n,).  Returns (3, n).

    The integral of p log(p / g) - p + g: nowhere negative, so that nothing cancels.
    """
    moves, logs = step_posterior(x_t, t, dt, mixture)
    p, spacing = np.exp(logs), moves[1] - moves[0]
    right = (reverse_mean(x_t, t, dt, mixture=mixture) - x_t)[:, None]
    sigma = mixture.sigma_q * dt**0.5
    std = (spacing * p * (moves - right) ** 2).sum(axis=1, keepdims=True) ** 0.5
    divergences = []
    for mean, width in [(0, sigma), (right, sigma), (right, std)]:
        log_g = log_gaussian(moves, mean, width)
        divergences.append(spacing * (p * (logs - log_g) - p + np.exp(log_g)).sum(axis=1))
    return np.array(divergences)


def measure_steps(sigmas, mixture):
    """The last step, from dt to 0, with sigma = sigma_q sqrt(dt): step_kl averaged over x_dt.

    sigmas: (n,).  Returns that, (n, 3), its identities, (n, 2), and its limits, (n, 3).
    """
    x, rows = mixture.grid(), []
    times = (sigmas / mixture.sigma_q) ** 2
    for dt in times:
        rows.append([mixture.average(row, dt) for row in step_kl(x, dt, dt, mixture)])
    exact = np.array([identities(dt, dt, mixture) for dt in times])
    return np.array(rows), exact, constants(mixture) * sigmas[:, None] ** [2, 4, 6]


def measure_runs(mixture):
    """Six numbers for a run of each of STEP_COUNTS.  Returns (6, n).

    The sum of its steps' `identities` with mean x_t; with the right mean, the limit for many steps
    and the sum itself; the sum + KL(p_1 || base), a bound on the next; KL(p_0 || q_0), where q_0 is
    the density of what DDPM returns; the std of q_0.
    """
    x, sigma_q, rows = mixture.grid(), mixture.sigma_q, []
    rise = mixture.entropy(1) - mixture.entropy(0)  # every entropy between comes with + and -
    # H rises at the rate sigma_q^2 J / 2. So `right` is that integral, less its Riemann sum at the
    # later ends: about dt / 2 times the fall of sigma_q^2 J / 2.
    rate = sigma_q**2 / 4 * (mixture.fisher(0) - mixture.fisher(1))
    base = mixture.average(mixture.log_density(x, 1) - log_gaussian(x, 0, sigma_q), 1)
    for n in STEP_COUNTS:
        right = rise - sigma_q**2 / 2 * sum(mixture.fisher(k / n) / n for k in range(1, n + 1))
        log_q = log_output(partial(reverse_mean, mixture=mixture), x, n, sigma_q)
        kl = mixture.average(mixture.log_density(x, 0) - log_q, 0)
        q = np.exp(log_q) * (x[1] - x[0])
        std = (q @ x**2 - (q @ x) ** 2) ** 0.5
        rows.append([rise, rate / n, right, right + base, kl, std])
    return np.array(rows).T


# ----------------------------------------- The figures ------------------------------------------
plt.style.use("default")  # the same figures whatever the reader's matplotlibrc says
BLUE, GREEN, PINK, SKY = "#0072B2", "#009E73", "#CC79A7", "#56B4E9"
COLORS = [PINK, BLUE, GREEN]  # of GAUSSIANS


def draw_step(mixture):
    """Figure 2 of the tutorial: p(x_0 | x_t = 0) over its Gaussian, for three steps dt = t."""
    fig, axes = plt.subplots(1, 3, figsize=(12, 4.2), layout="constrained")
    x_t = np.zeros(1)
    for ax, dt in zip(axes, (1 / 16, 1 / 64, 1 / 16_384)):
        sigma = mixture.sigma_q * dt**0.5
        x, logs = step_posterior(x_t, dt, dt, mixture)  # x_t is 0, so a move is x_0
        log_g = log_gaussian(x, reverse_mean(x_t, dt, dt, mixture=mixture), sigma)
        kl = step_kl(x_t, dt, dt, mixture)[1, 0]
        ax.fill_between(x, np.exp(logs[0]), color="0.8", label="posterior $p(x_0|x_t = 0)$")
        ax.plot(x, np.exp(log_g), BLUE, label=r"$N(E[x_0|x_t = 0], \sigma^2)$")
        ax.set(title=rf"$\sigma$ = {sigma:.3g}: KL = {kl:.3g}", xlabel="$x_0$")
        ax.set(xlim=(-4.5 * sigma, 4.5 * sigma), ylim=(0, None))
    axes[0].set_ylabel("density")
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return fig


def draw_sigmas(sigmas, divergences, exact, limits):
    """sigmas: (n,);  the others: of `measure_steps`."""
    fig, ax = plt.subplots(figsize=(7.5, 5.5), layout="constrained")
    for k, color in enumerate(COLORS):
        label = GAUSSIANS[k].replace("x_t", "$x_t$")
        ax.loglog(sigmas, divergences[:, k], "o", color=color, ms=5, label=label)
    ax.loglog(sigmas, exact[:, 0], "k", lw=1, label="identities")
    ax.loglog(sigmas, exact[:, 1], "k", lw=1)
    for k, color in enumerate(COLORS):
        constant = limits[0, k] / sigmas[0] ** (2 * k + 2)
        label = rf"${constant:.3g}\,\sigma^{2 * k + 2}$"
        ax.loglog(sigmas, limits[:, k], "--", color=color, lw=1, label=label)
    ax.set(xlabel=r"$\sigma = \sigma_q \sqrt{\Delta t}$", ylabel="KL", ylim=(None, 10))
    ax.set_title(r"KL$(p(x_0|x_{\Delta t})\,\|\,$Gaussian$)$, averaged over $x_{\Delta t}$")
    ax.legend(ncols=2)
    return fig


def draw_runs(runs):
    """runs: of `measure_runs`."""
    fig, ax = plt.subplots(figsize=(7.5, 5), layout="constrained")
    wrong, limit, right, _, kl, _ = runs
    rate = limit[0] * STEP_COUNTS[0]
    ax.loglog(STEP_COUNTS, wrong, "o-", color=PINK, label="sum, mean $x_t$")
    ax.loglog(STEP_COUNTS, right, "o-", color=BLUE, label="sum, right mean")
    ax.loglog(STEP_COUNTS, limit, "k--", lw=1, label=f"{rate:.4g} / number of steps")
    ax.loglog(STEP_COUNTS, kl, "^-", color=SKY, label=r"KL$(p_0\,\|\,q_0)$, of what DDPM returns")
    ax.set(xlabel="number of steps", ylabel="KL", ylim=(None, 3 * wrong[0]))
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


def main(argv=None):
    args = options(
        argv,
        sigma_0=(0.3, 0.15, 1.0, "std of each Gaussian of the data"),
        sigma_q=(2.0, 0.5, 4.0, "std of the noise at t = 1, and of the base"),
    )
    mixture = Mixture(args.sigma_0, args.sigma_q)

    sigmas = np.geomspace(0.01, args.sigma_q, 25)
    divergences, exact, limits = measure_steps(sigmas, mixture)
    slopes = np.log(divergences[1] / divergences[0]) / np.log(sigmas[1] / sigmas[0])
    off = abs(divergences[:, :2] - exact).max(axis=0)
    runs = measure_runs(mixture)

    rows = [[f"last step, sigma = {sigmas[0]:g}", *GAUSSIANS]]
    rows.append(["slope of KL in sigma", *(f"{slope:.3f}" for slope in slopes)])
    rows.append(["KL / limit", *(f"{ratio:.4f}" for ratio in divergences[0] / limits[0])])
    rows.append(["off its identity, any sigma", *(f"{error:.0e}" for error in off), "-"])
    table(rows)
    rows = [["steps", "sum, mean x_t", "limit", "sum, right mean", "+ KL(p_1 || base)"]]
    rows[0] += ["KL(p_0 || q_0)", "std of q_0"]
    for n, numbers in zip(STEP_COUNTS, runs.T):
        rows.append([f"{n}", *(f"{number:.4f}" for number in numbers)])
    table(rows)

    for name, figure in {
        "reverse-step": draw_step(mixture),
        "kl-vs-sigma": draw_sigmas(sigmas, divergences, exact, limits),
        "kl-vs-steps": draw_runs(runs),
    }.items():
        figure.savefig(args.figures_dir / f"{name}.jpg", dpi=120)
    print(f"figures: {args.figures_dir}")


if __name__ == "__main__":
    main()
