"""Experiment 6: DDIM is a linear flow on another clock, and schedules are changes of units.

The claim
    Section 4.6, Claim 4. Draw x_0 from the data and x_1 = x_0 + N(0, sigma_q^2), the diffusion
    coupling, and move each pair on a straight line, x_t = t x_1 + (1 - t) x_0. The marginal flow
    of these lines has DDIM's trajectories: DDIM at time t is the flow at time sqrt(t). There both
    have the same noise, know the same E[x_0 | x_t], and move straight towards it.
    Other schedules, x_t = alpha x_0 + beta N(0, 1), are the same process in other units:
    x / alpha is x_0 plus noise of standard deviation sigma = beta / alpha, the noise level. So on
    the same levels all have the same x / alpha. A schedule decides where even steps of its time
    fall, and so how large their error is.

The truth beside it
    On equal noise levels the samplers agree to rounding. On other levels they do not: each takes
    large steps along one ordinary differential equation (ODE), dx/dsigma = (x - D) / sigma, with
    D = E[x_0 | x], as experiment 2 has it. A sample's twin is here the ODE's solution from the same
    start, by Runge-Kutta (`ode_path`), and the error is the root mean square distance to it. Starts
    are of p_1, as the data is after its noise: on a line its quantiles, else draws.

What to look for in figures/
    same-trajectories.jpg   two clocks, and one trajectory at equal noise
    schedules.jpg           the noise levels of even steps, and their error along the way

Try this
    python ddim_as_flow.py --num-steps 1     one step: is DDIM still equal to the flow?
    python ddim_as_flow.py --num-steps 200   ten times the steps: what is left of the error?
    python ddim_as_flow.py --sigma-q 20      ten times the noise: which schedule is worst?
"""

import math
import os
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from functools import partial
from itertools import zip_longest
from pathlib import Path
from statistics import NormalDist

os.environ["MPLBACKEND"] = "agg"  # figures are files, also from a notebook

import matplotlib.pyplot as plt
import numpy as np

# ------------------------------------------- The data -------------------------------------------
# x_0 is one of the points, and noise is added to it: x_t = alpha x_0 + beta N(0, I).
# points: (k, d), in any dimension, d = 1 is a line;  weights: (k,), of sum 1.
DATA = {"points": np.array([[-1.1], [1.1]]), "weights": np.array([0.8, 0.2])}


def faults(points, weights):
    """What the script cannot do with the data, a line each."""
    try:
        points, weights = np.array(points, float), np.array(weights, float)
    except (TypeError, ValueError):  # words, or rows of different lengths
        points, weights = np.zeros(0), np.zeros(0)
    if points.ndim != 2 or not points.size or not np.isfinite(points).all():
        yield "DATA: points are (k, d), for each of k points a list of its coordinates"
    elif weights.shape != (len(points),) or not min(weights) > 0 or abs(sum(weights) - 1) > 1e-9:
        yield "DATA: weights are positive, one for each point, and their sum is 1"


normal_cdf = np.vectorize(NormalDist().cdf)


def start_at(u, sigma_q, *, points, weights):
    """x_1 of p_1: in one dimension the u-quantiles, in more a draw for each u.

    A quantile is found by halving an interval.  u: (n,), from 0 to 1.  Returns (n, d).
    """
    if np.shape(points)[1] == 1:
        low = np.full(len(u), np.min(points) - 8 * sigma_q)
        high = np.full(len(u), np.max(points) + 8 * sigma_q)
        for _ in range(60):
            x = (low + high) / 2
            below = normal_cdf((x[:, None] - np.ravel(points)) / sigma_q) @ weights
            low, high = np.where(below < u, x, low), np.where(below < u, high, x)
        return x[:, None]
    rng = np.random.default_rng(0)
    x_0 = rng.choice(points, len(u), p=weights)
    return x_0 + sigma_q * rng.standard_normal(x_0.shape)


RATE_0, RATE_1 = 0.1, 20.0  # at t = 0 and 1: of Ho et al. (2020), times their 1000 steps


def total_rate(t):
    """The integral from 0 to t of a rate that grows evenly from RATE_0 to RATE_1."""
    return RATE_0 * t + (RATE_1 - RATE_0) * t**2 / 2


def total_rate_inverse(total):
    """The t at which total_rate is total: a quadratic equation."""
    return 2 * total / (RATE_0 + np.sqrt(RATE_0**2 + 2 * (RATE_1 - RATE_0) * total))


def schedules(sigma_q):
    """{name: (alpha, beta, clock)}: functions of t, and the t at which beta / alpha is sigma.

    DDIM                 the tutorial's process, eq. (12), also called variance exploding
    linear flow          of the diffusion coupling: t x_1 + (1 - t) x_0 is x_0 + t N(0, sigma_q^2).
                         In units of sigma_q it is the sigma = t of Karras et al. (2022)
    rectified flow       of the independent coupling: x_1 ~ N(0, sigma_q^2), whatever x_0 is
    variance preserving  eq. (74) in small steps: each multiplies x by sqrt(1 - rate dt)
    """
    return {
        "DDIM": (np.ones_like, lambda t: sigma_q * np.sqrt(t), lambda s: (s / sigma_q) ** 2),
        "linear flow": (np.ones_like, lambda t: sigma_q * t, lambda s: s / sigma_q),
        "rectified flow": (lambda t: 1 - t, lambda t: sigma_q * t, lambda s: s / (sigma_q + s)),
        "variance preserving": (
            lambda t: np.exp(-total_rate(t) / 2),
            lambda t: np.sqrt(-np.expm1(-total_rate(t))),
            lambda s: total_rate_inverse(np.log1p(s**2)),
        ),
    }


# ----------------------------------------- The denoiser -----------------------------------------
# From it follow what DDIM asks for, the reverse mean, and what the flow asks for, the velocity.


def denoiser(x_t, alpha, beta, *, points, weights):
    """E[x_0 | x_t] where x_t = alpha x_0 + beta N(0, I): Bayes' rule.

    x_t: (n, d);  points: (k, d), with weights: (k,), of sum 1.  Returns (n, d).
    """
    means = alpha * np.asarray(points)  # of x_t, given x_0
    logits = (means @ x_t.T - (means**2).sum(axis=1, keepdims=True) / 2) / beta**2  # (k, n)
    logits += np.log(weights)[:, None]
    odds = np.exp(logits - logits.max(axis=0))
    return (odds / odds.sum(axis=0)).T @ points


def reverse_mean(x_t, t, dt, *, denoiser):
    """E[x_{t-dt} | x_t] from E[x_0 | x_t], eq. (24) of the tutorial.

    Exact for any dt: of the noise x_t - x_0, the last dt brought on average the share dt / t.
    x_t: (n, d), at time t;  0 < dt <= t <= 1;  denoiser(x_t, t) -> (n, d).  Returns (n, d).
    """
    return (dt / t) * denoiser(x_t, t) + (1 - dt / t) * x_t


def velocity(x_t, t, *, denoiser):
    """E[x_0 - x_1 | x_t], eq. (64) for lines: x_t = t x_1 + (1 - t) x_0 gives (x_0 - x_t) / t.

    x_t: (n, d), at time 0 < t <= 1;  denoiser(x_t, t) -> (n, d).  Returns (n, d).
    """
    return (denoiser(x_t, t) - x_t) / t


# ----------------------------------------- The samplers -----------------------------------------
# They know nothing of the data but the function that they are given.


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


def flow(velocity, x_1, times):
    """Pseudocode 5 on any grid: x_r = x_t + v_t(x_t) (t - r), for neighbours t > r of the grid.

    times: (num_steps + 1,), from 1 to 0.  Yields x_r after every step, the last is x_0.
    """
    x_t = x_1
    for t, r in zip(times, times[1:]):
        x_t = x_t + velocity(x_t, t) * (t - r)
        yield x_t


def sample(denoiser, x, alphas, betas):
    """DDIM's step in any schedule: E[x_0 | x_t] and the noise that it implies, at the next level.

    denoiser(x_t, alpha, beta) -> like x_t;  alphas, betas: (num_steps + 1,), from noise to data.
    Yields x after every step, the last is x_0.
    """
    for alpha, beta, alpha_r, beta_r in zip(alphas, betas, alphas[1:], betas[1:]):
        mean_x_0 = denoiser(x, alpha, beta)
        noise = (x - alpha * mean_x_0) / beta
        x = alpha_r * mean_x_0 + beta_r * noise
        yield x


# ------------------------------------------ The truth -------------------------------------------


def ode_path(denoiser, x, sigmas):
    """Where the ODE takes x, (n, d), from level sigmas[0]: at each of sigmas, (m,), which fall.

    In u = log sigma it is dx/du = x - E[x_0 | x]: the classic Runge-Kutta method, in steps of at
    most .04. Level 0, the data, is taken as 1e-6. No sampler is used.  Returns (m, n, d).
    """

    def slope(x, u):
        return x - denoiser(x, 1, math.exp(u))

    path, logs = [x], np.log(np.maximum(sigmas, 1e-6))
    for first, last in zip(logs, logs[1:]):
        num_steps = math.ceil((first - last) / 0.04)
        h = (last - first) / num_steps
        for u in first + h * np.arange(num_steps):
            k_1 = slope(x, u)
            k_2 = slope(x + h / 2 * k_1, u + h / 2)
            k_3 = slope(x + h / 2 * k_2, u + h / 2)
            k_4 = slope(x + h * k_3, u + h)
            x = x + h / 6 * (k_1 + 2 * k_2 + 2 * k_3 + k_4)
        path.append(x)
    return np.array(path)


# ------------------------------------------ Measuring -------------------------------------------


def even(num_steps):
    """Even steps of time: 1, 1 - dt, ..., 0.  Returns (num_steps + 1,)."""
    return np.arange(num_steps, -1, -1) / num_steps


def trajectories(denoiser, x_1, num_steps, sigma_q):
    """Algorithm 2 on even steps of t, and Pseudocode 5 on the grid sqrt(t), from x_1, (n, d).

    Returns {sampler: (num_steps + 1, n, d)}, from x_1 on.
    """

    def with_diffusion(x_t, t):
        return denoiser(x_t, 1, sigma_q * t**0.5)

    def on_lines(x_t, t):
        return denoiser(x_t, 1, sigma_q * t)

    mean = partial(reverse_mean, denoiser=with_diffusion)
    v = partial(velocity, denoiser=on_lines)
    ddim_steps = ddim(mean, x_1, num_steps)
    flow_steps = flow(v, x_1, np.sqrt(even(num_steps)))
    return {"DDIM": np.array([x_1, *ddim_steps]), "linear flow": np.array([x_1, *flow_steps])}


def path_in(denoiser, alpha, beta, x_1, times):
    """x / alpha in one schedule, from x_1, (n, d), at times, (num_steps + 1,).

    Returns its noise levels, (num_steps + 1,), and x / alpha, (num_steps + 1, n, d), from x_1 on.
    """
    alphas, betas = alpha(times), beta(times)
    steps = sample(denoiser, alphas[0] * x_1, alphas, betas)
    return betas / alphas, np.array([x_1, *(x / a for x, a in zip(steps, alphas[1:]))])


def on_equal_levels(denoiser, x_1, num_steps, sigma_q):
    """Each schedule at the noise levels of Algorithm 2.

    Returns {schedule: x / alpha, (num_steps + 1, n, d)}.
    """
    levels = sigma_q * np.sqrt(even(num_steps))
    return {
        name: path_in(denoiser, alpha, beta, x_1, clock(levels))[1]
        for name, (alpha, beta, clock) in schedules(sigma_q).items()
    }


def on_even_steps(denoiser, x_1, num_steps, sigma_q):
    """Each schedule on even steps of its own time, from the time of level sigma_q down to 0.

    Returns {schedule: (levels, x / alpha)}: (num_steps + 1,) and (num_steps + 1, n, d).
    """
    return {
        name: path_in(denoiser, alpha, beta, x_1, clock(sigma_q) * even(num_steps))
        for name, (alpha, beta, clock) in schedules(sigma_q).items()
    }


def apart(x, twins):
    """Root mean square distance to the twins.  Both (m, n, d).  Returns (m,)."""
    return ((x - twins) ** 2).sum(axis=2).mean(axis=1) ** 0.5


def report(found, num_steps):
    """Rows for `table`.  found: {schedule: (levels, errors)}."""
    rows = [[f"even steps of its own time: {num_steps}", "last level > 0", "largest RMS to twins"]]
    for name, (levels, errors) in found.items():
        rows.append([name, f"{levels[-2]:.3f}", f"{errors.max():.3g}"])
    return rows


# ----------------------------------------- The figures ------------------------------------------
plt.style.use("default")  # the same figures whatever the reader's matplotlibrc says
ORANGE, GREEN, PINK, SKY = "#E69F00", "#009E73", "#CC79A7", "#56B4E9"
STYLES = {
    "DDIM": {"color": ORANGE, "marker": "o", "ms": 7, "mfc": "none"},
    "linear flow": {"color": SKY, "marker": "x", "ms": 5, "mew": 1.5},
    "rectified flow": {"color": GREEN, "marker": ".", "ms": 6},
    "variance preserving": {"color": PINK, "marker": "^", "ms": 5, "mfc": "none"},
}


def draw_trajectories(paths, solution, sigma_q):
    """Against each sampler's own time, and against the noise level: the first coordinate.

    paths: of trajectories, from n starts;  solution: (m, n, d), at m even levels from there to 0.
    """
    fig, (own, equal) = plt.subplots(1, 2, figsize=(11, 4.9), layout="constrained", sharey=True)
    t, fine = even(len(paths["DDIM"]) - 1), np.linspace(1, 0, len(solution))
    own_times = {"DDIM": (t, fine**2), "linear flow": (np.sqrt(t), fine)}
    for name, (times, fine_times) in own_times.items():
        x, marks = paths[name][..., 0], {"ls": "", **STYLES[name]}
        own.plot(fine_times, solution[..., 0], color=marks["color"], lw=0.8)
        own.plot(times, x, **marks)
        equal.plot(sigma_q * np.sqrt(t), x, **marks)
        equal.lines[-1].set_label(name)
    equal.plot(sigma_q * fine, solution[..., 0], color="0.6", lw=0.8, zorder=1)
    equal.lines[-1].set_label("lines: the ODE's solution")
    own.set(xlabel="$t$", title="Each on its own clock")
    own.set_ylabel("$x_t$" if solution.shape[2] == 1 else "first coordinate of $x_t$")
    equal.set(xlabel=r"noise level $\sigma$", title="The same runs at equal noise")
    points = np.array(DATA["points"])[:, 0]
    for ax in (own, equal):
        ax.plot(0 * points, points, "k*", ms=12, zorder=3)
        ax.invert_xaxis()
    equal.lines[-1].set_label("the data")
    fig.legend(*equal.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return fig


def draw_schedules(found, num_steps):
    """Noise levels, and errors at them.  found: of on_even_steps."""
    fig, (grids, errors) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for row, (name, (levels, rms)) in enumerate(found.items()):
        grids.plot(levels, np.full(len(levels), -row), ls="", **STYLES[name])
        errors.plot(levels, rms, lw=1, label=name, **STYLES[name])
    grids.set(yticks=range(0, -4, -1), yticklabels=found, ylim=(-3.6, 0.6))
    grids.set_title(f"Even steps of each schedule's time: {num_steps}")
    errors.set(ylabel="RMS distance to the twins", title="The error along the way")
    errors.grid(alpha=0.3)
    errors.legend()
    for ax in (grids, errors):
        ax.set_xlabel(r"noise level $\sigma$")
        ax.invert_xaxis()
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
        *faults(**DATA),
        num_steps=(20, 1, 1000, "steps of a sampler, 1 / dt"),
        num_samples=(200, 1, 10_000, "starts of p_1"),
        sigma_q=(2.0, 0.1, 100.0, "std of the noise at t = 1"),
    )
    num_steps, sigma_q = args.num_steps, args.sigma_q
    known = partial(denoiser, **DATA)
    x_1 = start_at((np.arange(args.num_samples) + 0.5) / args.num_samples, sigma_q, **DATA)

    paths = trajectories(known, x_1, num_steps, sigma_q)
    equal = [paths["linear flow"], *on_equal_levels(known, x_1, num_steps, sigma_q).values()]
    found = {
        name: (levels, apart(x, ode_path(known, x_1, levels)))
        for name, (levels, x) in on_even_steps(known, x_1, num_steps, sigma_q).items()
    }
    few = start_at(np.array([0.02, 0.2, 0.6, 0.76, 0.83, 0.95]), sigma_q, **DATA)
    drawn = trajectories(known, few, num_steps, sigma_q)
    lines = ode_path(known, few, sigma_q * np.linspace(1, 0, 101))

    for name, figure in {
        "same-trajectories": draw_trajectories(drawn, lines, sigma_q),
        "schedules": draw_schedules(found, num_steps),
    }.items():
        figure.savefig(args.figures_dir / f"{name}.jpg", dpi=120)
    difference = np.abs(np.array(equal) - paths["DDIM"]).max()
    print(f"flow and schedules on DDIM's noise levels: farthest from DDIM {difference:.1e}")
    table(report(found, num_steps))
    print(f"figures: {args.figures_dir}")


if __name__ == "__main__":
    main()
