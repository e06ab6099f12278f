"""Experiment 17: asking a trained denoiser for more than it was trained for.  Beyond the tutorial.

The claim
    y = a.x_0 + N(0, tau^2) was measured, and samples of p(x_0 | y) are wanted. The denoiser,
    D = E[x_0 | x_t], was trained without y. Diffusion posterior sampling (DPS; Chung et al. 2022,
    arXiv 2209.14687) takes the likelihood of y as if x_0 were D. What is tested here is this
    approximation: with small steps and the exact D it is
        D + C a (y - a.D) / tau^2,    C = Cov[x_0 | x_t] = sigma_t^2 dD/dx_t,
    in the samplers. (Their own step has a tuned factor in place of 1 / tau^2: see the page.) It
    forgets that a.x_0, given x_t, has a variance of its own. Put back (Boys et al. 2023, arXiv
    2310.06721),
        D + C a (y - a.D) / (tau^2 + a.C a)
    is exact for Gaussian data. How far off are both, and do they believe y too much or too little?

The truth beside it
    If the data is many points c, E[x_0 | x_t, y] is experiment 2's posterior mean with one more
    term: weights exp(-|x_t - c|^2 / (2 sigma_t^2) - (y - a.c)^2 / (2 tau^2)). A sample's twin has
    the same start, the same noise, and this denoiser. For data N(0, s^2) and a = 1, DPS with small
    steps and large sigma_q returns a Gaussian that is known: `gaussian_law`.

What to look for in figures/
    posterior.jpg   the data and a strip, y - tau to y + tau: who crowds into it, and whose samples
                    lie on their twins?
    gaussian.jpg    mean and variance against the precision of the measurement

Try this
    python inverse_problems.py --tau 0.02 --y 0.3    precise: is each arc found?
    python inverse_problems.py --tau 0.1 --y=-0.5    is y believed too much, or too little?
    python inverse_problems.py --tau 1               vague: which of the three is best?
"""

import copy
import os
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from functools import partial
from itertools import zip_longest
from pathlib import Path

os.environ["MPLBACKEND"] = "agg"  # figures are files, also from a notebook
os.environ["OPENBLAS_NUM_THREADS"] = "1"  # NumPy's: more would wait for each other

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.collections import LineCollection
from tqdm import tqdm

# ------------------------------------------- The data -------------------------------------------
# The roll of experiment 3 as 1000 points, each as likely; a.x_0 is its first coordinate.
START, END = np.pi / 2, 4 * np.pi  # the angles at which the roll starts and ends
THETA = START + (END - START) * (np.arange(1000) + 0.5) / 1000
POINTS = np.stack([np.cos(THETA), np.sin(THETA)], axis=1) * THETA[:, None] / (4 * np.pi)
A = np.array([1.0, 0.0])
SIGMA_Q = 30 * np.abs(POINTS).max()  # far wider than the data: p_1 is nearly the base


def faults():
    """What this script cannot do with the data above, a line each."""
    if np.ndim(POINTS) != 2 or np.shape(POINTS)[1] != 2 or len(POINTS) < 2:
        yield "POINTS are two or more, in the plane: (k, 2)"
    elif np.shape(A) != (2,) or not 0 < np.ptp(POINTS @ A) < np.inf:
        yield "A is (2,), and a.x_0 is finite and not the same for all POINTS"


def arcs(points, a):
    """The number of the arc that each point is on, (k,): a new one wherever a.c turns back.

    In the order of points. So the place where a.c is y is on each arc once, or not at all.
    """
    upwards = np.sign(np.diff(points @ a))
    return np.append(0, np.cumsum(np.diff(upwards, prepend=upwards[:1]) != 0))


# ----------------------------------------- The denoiser -----------------------------------------
# Three denoisers, a line apart: x_t (n, 2), at time t, given y. Each returns (n, 2).


def log_likelihood(x_t, t, *, points, sigma_q):
    """log p(x_t | x_0 = point), but for what is the same for all points.  Returns (k, n)."""
    squares = (points**2).sum(axis=1, keepdims=True)
    return (points @ x_t.T - squares / 2) / (sigma_q**2 * t)


def softmax(logits):
    """Bayes' rule: probabilities in proportion to exp(logits).  (k, n), of sum 1 over k."""
    odds = np.exp(logits - logits.max(axis=0))
    return odds / odds.sum(axis=0)


def posterior_denoiser(x_t, t, y, *, points, a, tau, sigma_q):
    """E[x_0 | x_t, y], exact: the likelihood of y is one more term."""
    logits = log_likelihood(x_t, t, points=points, sigma_q=sigma_q)
    logits -= (y - points @ a)[:, None] ** 2 / (2 * tau**2)
    return softmax(logits).T @ points


def moments(x_t, t, *, points, a, sigma_q):
    """E[x_0 | x_t] and C a = Cov[x_0, a.x_0 | x_t], both without y: (n, 2) each.

    Of a network they are D and sigma_t^2 times a derivative of D: "second-order Tweedie".
    """
    weights = softmax(log_likelihood(x_t, t, points=points, sigma_q=sigma_q)).T  # (n, k)
    mean = weights @ points
    product = weights @ (points * (points @ a)[:, None])  # E[x_0 a.x_0 | x_t]
    return mean, product - mean * (mean @ a)[:, None]


def dps(x_t, t, y, *, points, a, tau, sigma_q):
    """DPS: the likelihood of y as if x_0 were its mean."""
    mean, c_a = moments(x_t, t, points=points, a=a, sigma_q=sigma_q)
    return mean + c_a * ((y - mean @ a) / tau**2)[:, None]


def with_variance(x_t, t, y, *, points, a, tau, sigma_q):
    """The same with the variance that DPS forgets: y given x_t has variance tau^2 + a.C a."""
    mean, c_a = moments(x_t, t, points=points, a=a, sigma_q=sigma_q)
    return mean + c_a * ((y - mean @ a) / (tau**2 + c_a @ a))[:, None]


def gaussian_dps(x_t, t, y, *, s, tau, sigma_q):
    """DPS for data N(0, s^2), measured itself.  x_t: any shape;  tau, (m, 1), is broadcast."""
    variance = sigma_q**2 * t
    mean = s**2 * x_t / (s**2 + variance)
    c = s**2 * variance / (s**2 + variance)
    return mean + c * (y - mean) / tau**2


def reverse_mean(x_t, t, dt, *, denoiser):
    """E[x_{t-dt} | x_t] from E[x_0 | x_t], eq. (24) of the tutorial.

    Exact for any dt: of the noise x_t - x_0, the last dt brought on average the share dt / t.
    x_t: (n, d), at time t;  0 < dt <= t <= 1;  denoiser(x_t, t) -> (n, d).  Returns (n, d).
    """
    return (dt / t) * denoiser(x_t, t) + (1 - dt / t) * x_t


# ----------------------------------------- The samplers -----------------------------------------
# Algorithms 1 and 2, at times of the caller's choice: 1 = times[0] > times[1] > ... > 0.


def ddpm(reverse_mean, x_1, times, sigma_q, rng):
    """Algorithm 1 (DDPM): x_{t-dt} = E[x_{t-dt} | x_t] + N(0, sigma_q^2 dt).  Yields each."""
    x_t = x_1
    for t, dt in zip(times, times[:-1] - times[1:]):
        noise = rng.standard_normal(x_t.shape)
        x_t = reverse_mean(x_t, t, dt) + sigma_q * dt**0.5 * noise
        yield x_t


def ddim(reverse_mean, x_1, times):
    """Algorithm 2 (DDIM): x_{t-dt} = x_t + lam (E[x_{t-dt} | x_t] - x_t).  Yields each."""
    x_t = x_1
    for t, dt in zip(times, times[:-1] - times[1:]):
        lam = t**0.5 / ((t - dt) ** 0.5 + t**0.5)
        x_t = x_t + lam * (reverse_mean(x_t, t, dt) - x_t)
        yield x_t


def times(num_steps, ratio=3000):
    """From 1, even in log t, to where sigma_t = sigma_q / ratio, then 0.  (num_steps + 1,)"""
    return np.append(np.geomspace(1, ratio**-2, num_steps), 0)


# ------------------------------------------ The truth -------------------------------------------

NODES, NODE_WEIGHTS = np.polynomial.legendre.leggauss(100)  # for integrals from -1 to 1


def gaussian_law(method, *, s, tau, y):
    """Exact mean and variance for data N(0, s^2), in the limit of small steps and large sigma_q.

    method: "posterior", or DPS by the sampler "DDPM" or "DDIM". With V = s^2 + sigma_t^2, DPS by
    DDIM is dx/dV = (x / V + k^2 s^2 x / V^2 - k^2 y / V) / 2; by DDPM twice that, and noise.
    """
    k = s / tau
    if method == "posterior":
        return y * k**2 / (1 + k**2), s**2 / (1 + k**2)
    if method == "DDPM":
        return -y * np.expm1(-(k**2)), -(tau**2) / 2 * np.expm1(-2 * k**2)
    # The mean is y int_0^(k^2) exp(p^2 / (2 k^2) - p) dp; beyond p = 80 nothing is left.
    half = min(k**2, 80) / 2
    p = half * (1 + NODES)
    return y * half * NODE_WEIGHTS @ np.exp(p**2 / (2 * k**2) - p), s**2 * np.exp(-(k**2))


def point_posterior(y, *, points, a, tau):
    """p(x_0 = point | y).  Returns (k,)."""
    return softmax(-((y - points @ a) ** 2) / (2 * tau**2))


# ------------------------------------------ Measuring -------------------------------------------
DENOISERS = {"exact": posterior_denoiser, "DPS": dps, "with variance": with_variance}


def sample(denoiser, x_1, times, sigma_q, rng):
    """DDPM and DDIM from x_1.  Returns {sampler: x_0}."""
    mean = partial(reverse_mean, denoiser=denoiser)
    runs = {"DDPM": ddpm(mean, x_1, times, sigma_q, rng), "DDIM": ddim(mean, x_1, times)}
    samples = {}
    for name, steps in runs.items():
        for x_0 in tqdm(steps, name, len(times) - 1, disable=None):
            pass
        samples[name] = x_0
    return samples


def sample_points(x_1, times, rng, *, y, tau):
    """{denoiser: {sampler: x_0, (n, 2)}}, all from x_1 and with the same noise."""
    samples = {}
    for name, denoiser in DENOISERS.items():
        given_y = partial(denoiser, y=y, points=POINTS, a=A, tau=tau, sigma_q=SIGMA_Q)
        samples[name] = sample(given_y, x_1, times, SIGMA_Q, copy.deepcopy(rng))
    return samples


RATIOS = np.array([0.25, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0])  # s / tau; s = y = 1


def sample_gaussian(rng, n=20_000, num_steps=2000, sigma_q=1000.0):
    """DPS for each of RATIOS.  Returns {sampler: x_0, (len(RATIOS), n)}."""
    denoiser = partial(gaussian_dps, y=1.0, s=1.0, tau=1 / RATIOS[:, None], sigma_q=sigma_q)
    x_1 = sigma_q * rng.standard_normal((len(RATIOS), n))
    return sample(denoiser, x_1, times(num_steps, ratio=100 * sigma_q), sigma_q, rng)


def apart(x_0, twins):
    """Distances of samples, (n, 2), to their twins.  (n,)"""
    return np.linalg.norm(x_0 - twins, axis=1)


def nearest(x_0):
    """The index of the point that is nearest to each of x_0, (n, 2).  (n,)"""
    return (POINTS @ x_0.T - (POINTS**2).sum(axis=1, keepdims=True) / 2).argmax(axis=0)


def estimates(x_0):
    """Mean and variance over the last axis, each with its standard error if x_0 is Gaussian."""
    n, variance = x_0.shape[-1], x_0.var(axis=-1)
    mean_error, variance_error = (variance / n) ** 0.5, variance * (2 / n) ** 0.5
    return x_0.mean(axis=-1), mean_error, variance, variance_error


# ----------------------------------------- The figures ------------------------------------------
plt.style.use("default")  # the same figures whatever the reader's matplotlibrc says
BLUE, ORANGE = "#0072B2", "#E69F00"
COLORS = {"posterior": "k", "DDPM": BLUE, "DDIM": ORANGE}


def draw_points(samples, y, tau, num_drawn=250):
    """Samples by DDIM, a panel for each denoiser; a line joins each to its twin."""
    fig, axes = plt.subplots(1, 3, figsize=(12, 4.5), layout="constrained", sharey=True)
    titles = ["exact: $E[x_0|x_t, y]$", "DPS", "DPS with the variance"]
    plane = np.transpose([A, [-A[1], A[0]]])  # what is measured, to the right
    points, twins = POINTS @ plane, samples["exact"]["DDIM"][:num_drawn] @ plane
    margin = 0.1 * np.ptp(points, axis=0).max()
    (left, bottom), (right, top) = points.min(axis=0) - margin, points.max(axis=0) + margin
    for ax, title, runs in zip(axes, titles, samples.values()):
        x_0 = runs["DDIM"][:num_drawn] @ plane
        ax.axvspan(y - tau, y + tau, color="0.9", label=r"$y \pm \tau$")
        ax.plot(*points.T, ".k", ms=1, label="data")
        joins = LineCollection(np.stack([x_0, twins], axis=1), colors="0.5", lw=0.6, zorder=1)
        ax.add_collection(joins)
        ax.plot(*x_0.T, ".", color=ORANGE, ms=5, label="samples by DDIM, joined to their twins")
        ax.set(xlabel="$a^T x_0$", title=title, aspect="equal")
        ax.set(xlim=(left, right), ylim=(bottom, top))
    fig.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return fig


def draw_gaussian(samples):
    """Laws as lines, samples as marks, against s / tau.  samples: of sample_gaussian."""
    fig, (left, right) = plt.subplots(1, 2, figsize=(10, 4.4), layout="constrained")
    k = np.linspace(RATIOS[0], RATIOS[-1], 100)
    for method, color in COLORS.items():
        mean, variance = np.transpose(
            [gaussian_law(method, s=1.0, tau=tau, y=1.0) for tau in 1 / k]
        )
        name = method if method == "posterior" else f"DPS, {method}"
        left.plot(k, mean, color=color, label=f"{name}, exact")
        right.semilogy(k, variance, color=color, label=f"{name}, exact")
    for method, x_0 in samples.items():
        mean, mean_error, variance, variance_error = estimates(x_0)
        style = {"fmt": "o", "ms": 4, "capsize": 3, "color": COLORS[method]}
        left.errorbar(RATIOS, mean, 5 * mean_error, **style, label=f"DPS, {method}, sampled")
        right.errorbar(RATIOS, variance, 5 * variance_error, **style)
    left.axhline(1, color="0.6", ls=":", label="the measurement $y$")
    left.set(xlabel=r"$s / \tau$", title="mean of $x_0$")
    right.set(xlabel=r"$s / \tau$", title=r"variance of $x_0$, in units of $s^2$")
    fig.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3)
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


def point_rows(samples, y, tau):
    """A row for the law, then one for each denoiser and sampler; the four likeliest arcs."""
    law, arc = point_posterior(y, points=POINTS, a=A, tau=tau), arcs(POINTS, A)
    shares = np.bincount(arc, weights=law)
    likeliest = np.sort(np.argsort(-shares)[:4])
    heading = [f"{len(POINTS)} points", "a.x_0 from y", "x_0 from twin"]
    off = (law @ (POINTS @ A - y) ** 2) ** 0.5
    rows = [
        [*heading, *(f"arc {k + 1}" for k in likeliest)],
        ["p(x_0 | y)", f"{off:.3f}", "", *(f"{x:.3f}" for x in shares[likeliest])],
    ]
    for name, runs in samples.items():
        for sampler, x_0 in runs.items():
            off = ((x_0 @ A - y) ** 2).mean() ** 0.5
            from_twin = np.median(apart(x_0, samples["exact"][sampler]))
            found = np.bincount(arc[nearest(x_0)], minlength=len(shares)) / len(x_0)
            cells = [f"{off:.3f}", f"{from_twin:.3f}", *(f"{x:.2f}" for x in found[likeliest])]
            rows.append([f"{name}, {sampler}", *cells])
    return rows


def gaussian_rows(samples, ratio=2.0):
    """A row for each method, s / tau = ratio: laws, and samples with standard errors."""
    rows = [[f"Gaussian, s / tau = {ratio:g}", "mean", "sampled", "variance", "sampled"]]
    for method in COLORS:
        mean, variance = gaussian_law(method, s=1.0, tau=1 / ratio, y=1.0)
        sampled = ["", ""]
        if method in samples:
            x, x_error, v, v_error = estimates(samples[method][ratio == RATIOS][0])
            sampled = [f"{x:.4f} +- {x_error:.4f}", f"{v:.4f} +- {v_error:.4f}"]
        name = method if method == "posterior" else f"DPS, {method}"
        rows.append([name, f"{mean:.4f}", sampled[0], f"{variance:.4f}", sampled[1]])
    return rows


def main(argv=None):
    largest = float(np.ceil(np.abs(POINTS).max() * np.abs(A).sum()))  # at least of a.x_0
    args = options(
        argv,
        *faults(),
        num_steps=(200, 1, 5000, "steps of a sampler, on the points"),
        num_samples=(1000, 1, 10_000, "samples of each sampler, on the points"),
        y=(0.0, -largest, largest, "the measurement of a.x_0"),
        tau=(0.2, 0.01, 10.0, "std of the measurement's noise"),
        seed=(0, 0, 10**6, "seed of every draw"),
    )
    rng = np.random.default_rng(args.seed)

    x_1 = SIGMA_Q * rng.standard_normal((args.num_samples, 2))
    in_plane = sample_points(x_1, times(args.num_steps), rng, y=args.y, tau=args.tau)
    on_line = sample_gaussian(rng)

    for name, figure in {
        "posterior": draw_points(in_plane, args.y, args.tau),
        "gaussian": draw_gaussian(on_line),
    }.items():
        figure.savefig(args.figures_dir / f"{name}.jpg", dpi=120)
    table(point_rows(in_plane, args.y, args.tau))
    table(gaussian_rows(on_line))
    print(f"figures: {args.figures_dir}")


if __name__ == "__main__":
    main()
