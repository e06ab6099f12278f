"""Experiment 2: two points of data; DDIM runs to one or the other, steered by Bayes' rule.

The claim
    If x_0 is the point a_i with probability w_i, the reverse mean is that of a point mass, averaged
    over which point it was:
        E[x_{t-dt} | x_t] = sum_i p(x_0 = a_i | x_t) ( ((t - dt) / t) x_t + (dt / t) a_i ),
    and the average is weighted by Bayes' rule. As x_t given x_0 = a_i is N(a_i, sigma_q^2 t I),
        p(x_0 = a_i | x_t)  is proportional to  w_i exp(-|x_t - a_i|^2 / (2 sigma_q^2 t)).

Which point does a start go to?
    With small steps DDIM follows the probability-flow ODE. With sigma = sigma_q sqrt(t) as clock it
    is dx/dsigma = (x - E[x_0 | x_t]) / sigma, and a DDIM step is an Euler step for it. Of two
    points, E[x_0 | x_t] depends only on the coordinate u along a_2 - a_1. On a line the paths of an
    ODE cannot cross, and this ODE carries p_1 to p_0. So the share w_1 of p_1 with the smallest u
    goes to a_1, the rest to a_2: a straight line parts the plane (`watershed`).
    But sampling starts from the base N(0, sigma_q^2 I), which is not p_1. The same line cuts off
    another share of the base, `exact_share`, and that is in general not w_1.

What to look for in figures/
    experiment-2-sample-trajectories-ddim.jpg   the shade is p(x_0 = a_i | x_1 = x); the line parts
                                                the starts that go to a_1 from those to a_2
    experiment-2-error-vs-steps.jpg             distance to the ODE's solution: along the way it
                                                falls as 1/steps, at the end much faster

Run
    python two_points.py

Try this
    python two_points.py --weights .8 .2                      one point is likelier
    python two_points.py --weights .8 .2 --sigma-q 30         and the base is nearly right
    python two_points.py --points -2 -1 2 -1 0 2              three points
    python two_points.py --num-steps 2                        two steps
"""

import argparse
import io
import math
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import to_rgb
from tqdm import tqdm

# ------------------------------------------- The data -------------------------------------------
# k points a_i with probabilities w_i; k = 2 by default, and nothing but `exact_share` needs k = 2.


def draw_p_1(n, rng, *, points, weights, sigma_q):
    """n draws from the true p_1, that is x_0 + N(0, sigma_q^2 I).  Returns (n, d)."""
    x_0 = points[rng.choice(len(points), size=n, p=weights)]
    return x_0 + sigma_q * rng.standard_normal(x_0.shape)


# --------------------------------------- The reverse mean ---------------------------------------


def posterior(x_t, t, *, points, weights, sigma_q):
    """p(x_0 = a_i | x_t) by Bayes' rule, for every sample and every point.

    x_t: (n, d) points at time t > 0;  points: (k, d);  weights: (k,), positive, of sum 1.
    Returns (n, k), rows of sum 1.

    In log w_i - |x_t - a_i|^2 / (2 sigma_t^2), the term |x_t|^2 is the same for all i and cancels.
    """
    sigma_t = sigma_q * t**0.5
    dots = points @ x_t.T - (points**2).sum(axis=1, keepdims=True) / 2  # (k, n): a row a point
    logits = np.log(weights)[:, None] + dots / sigma_t**2
    odds = np.exp(logits - logits.max(axis=0))
    return (odds / odds.sum(axis=0)).T


def reverse_mean(x_t, t, dt, *, points, weights, sigma_q):
    """E[x_{t-dt} | x_t] when x_0 is points[i] with probability weights[i]; exact for every dt.

    x_t: (n, d) points at time t;  0 < dt <= t <= 1;  points: (k, d);  weights: (k,), positive.
    Returns (n, d).
    """
    mean_x_0 = posterior(x_t, t, points=points, weights=weights, sigma_q=sigma_q) @ points
    return ((t - dt) / t) * x_t + (dt / t) * mean_x_0


def plain_average(x_t, t, dt, *, points):
    """The same without Bayes' rule: wrong (section 3.3), and here to see what goes wrong.

    It treats the data as one point, the mean of the a_i.
    """
    return ((t - dt) / t) * x_t + (dt / t) * points.mean(axis=0)


# ----------------------------------------- The samplers -----------------------------------------
# They know nothing of the data but the function that they are given: reverse_mean(x_t, t, dt).


def ddim(reverse_mean, x_1, num_steps):
    """Algorithm 2 (DDIM): x_{t-dt} = x_t + lam (E[x_{t-dt} | x_t] - x_t).

    lam = sigma_t / (sigma_{t-dt} + sigma_t); as sigma_t = sigma_q sqrt(t), sigma_q cancels in it.
    reverse_mean(x_t, t, dt) -> like x_t;  x_1: draws of the base.
    num_steps = 1 / dt >= 1 (0: ZeroDivisionError).
    Yields num_steps arrays like x_1, the last of them x_0.
    """
    x_t, dt = x_1, 1 / num_steps
    for k in range(num_steps, 0, -1):  # t = k dt
        lam = k**0.5 / ((k - 1) ** 0.5 + k**0.5)
        x_t = x_t + lam * (reverse_mean(x_t, k / num_steps, dt) - x_t)
        yield x_t


# ------------------------------------------- The truth ------------------------------------------


def normal_tail(z):
    """P(N(0, 1) > z), a float."""
    return math.erfc(z / 2**0.5) / 2


def watershed(points, weights, sigma_q):
    """The s at which the probability-flow ODE parts the starts: u = s, with u along a_2 - a_1.

    points: (2, d), different, at most 50 sigma_q apart;  weights: (2,), positive.

    s is the w_1-quantile of p_1 in the direction u: P(u < s) = w_1. Written in tails, so that
    nothing cancels, that is  w_1 P(u > s | a_1) = w_2 P(u < s | a_2).  Bisection finds it.
    """
    axis = (points[1] - points[0]) / np.linalg.norm(points[1] - points[0])
    u_1, u_2 = points @ axis
    low = u_1 - 10 * sigma_q
    high = u_2 + 10 * sigma_q
    for _ in range(100):
        s = (low + high) / 2
        beyond = weights[0] * normal_tail((s - u_1) / sigma_q)
        before = weights[1] * normal_tail((u_2 - s) / sigma_q)
        if beyond > before:
            low = s
        else:
            high = s
    return s


def exact_share(points, weights, sigma_q):
    """Share of the base N(0, sigma_q^2 I) on the first point's side of the watershed, a float."""
    return normal_tail(-watershed(points, weights, sigma_q) / sigma_q)


# ------------------------------------------- Measuring ------------------------------------------
NUM_DRAWN = 60  # trajectories kept whole, for the figure
STEP_COUNTS = [5, 10, 20, 50, 100, 200]  # num_steps whose error is measured
REFERENCE_STEPS = 10_000  # num_steps of what stands for the ODE's solution


def reached(x_0, points):
    """Index of the point nearest to each x_0.  x_0: (n, d);  points: (k, d).  Returns (n,)."""
    return np.argmin([((x_0 - a) ** 2).sum(axis=1) for a in points], axis=0)


def measure_shares(x_1, num_steps, label, **data):
    """Runs DDIM from x_1, (n, 2), and counts where it ends.  data: points, weights, sigma_q.

    Returns the share of samples that reached each point, (k,), its standard error, (k,), the root
    mean square distance from the point reached, and the first trajectories,
    (num_steps + 1, NUM_DRAWN, 2).
    """
    steps = ddim(partial(reverse_mean, **data), x_1, num_steps)
    paths = [x_1[:NUM_DRAWN]]
    for x_t in tqdm(steps, label, num_steps, disable=None):
        paths.append(x_t[:NUM_DRAWN].copy())  # a copy, so that the rest of x_t is freed
    points = data["points"]
    ends = reached(x_t, points)
    share = np.bincount(ends, minlength=len(points)) / len(x_1)
    share_se = np.sqrt(share * (1 - share) / len(x_1))
    off = np.sqrt(((x_t - points[ends]) ** 2).sum(axis=1).mean())
    return share, share_se, off, np.array(paths)


def measure_plain_average(x_1, num_steps, points):
    """Runs DDIM with `plain_average`: how far from the middle of the points it ends, at most."""
    for x_t in ddim(partial(plain_average, points=points), x_1, num_steps):
        pass
    return np.linalg.norm(x_t - points.mean(axis=0), axis=1).max()


def base_shares(*, points, weights, sigma_q):
    """Exact share of the base that goes to each point, (k,), or None: known for two points only."""
    if len(points) != 2:
        return None
    first = exact_share(points, weights, sigma_q)
    return np.array([first, 1 - first])


def fifths(x_1, num_steps, **data):
    """x_t of DDIM at t = .8, .6, .4, .2, 0.  num_steps: a multiple of 5.  Returns (5, n, d)."""
    steps = ddim(partial(reverse_mean, **data), x_1, num_steps)
    return np.array([x_t for k, x_t in enumerate(steps, 1) if k % (num_steps // 5) == 0])


def measure_errors(x_1, **data):
    """Root mean square distance of DDIM to the ODE's solution, for each of STEP_COUNTS.

    DDIM with REFERENCE_STEPS steps stands for the solution.  x_1: (n, d).
    Returns the distance over t = .8, .6, .4, .2 together, (len(STEP_COUNTS),), and that at t = 0.
    """
    reference = fifths(x_1, REFERENCE_STEPS, **data)
    along = []
    at_end = []
    for num_steps in STEP_COUNTS:
        squares = ((fifths(x_1, num_steps, **data) - reference) ** 2).sum(axis=2)
        along.append(np.sqrt(squares[:-1].mean()))
        at_end.append(np.sqrt(squares[-1].mean()))
    return np.array(along), np.array(at_end)


def observed_slope(errors):
    """The p of error ~ num_steps^p, by least squares from 20 steps on.  errors: for STEP_COUNTS."""
    return np.polyfit(np.log(STEP_COUNTS[2:]), np.log(errors[2:]), 1)[0]


# ------------------------------------------- Printing -------------------------------------------


def report(from_p_1, from_base, exact, slope, off_middle, args):
    """from_*: shares and errors of measure_shares;  exact: of base_shares;  the rest: floats."""
    print(f"sigma_q = {args.sigma_q:g}: {args.num_samples} samples by DDIM, {args.num_steps} steps")
    print("share of each point:    from the true p_1               from the base N(0, sigma_q^2 I)")
    print("              sampled +- s.e.   dt -> 0       sampled +- s.e.   dt -> 0")
    for i, (x, y) in enumerate(args.points):
        true = f"{from_p_1[0][i]:.4f} +- {from_p_1[1][i]:.4f}    {args.weights[i]:.4f}"
        base = f"{from_base[0][i]:.4f} +- {from_base[1][i]:.4f}"
        known = "none known" if exact is None else f"{exact[i]:.4f}"
        print(f"{f'({x:g}, {y:g})':>12}  {true}       {base}    {known}")
    print(f"distance of the samples from the point that they reached: {from_base[2]:.1g} (rms)")
    print(f"DDIM's distance to the ODE's solution, t = .2 to .8, falls as num_steps^{slope:.2f}")
    print(f"averaged without Bayes' rule, all samples end within {off_middle:.1g} of the middle")


# ------------------------------------------ The figures -----------------------------------------
plt.switch_backend("agg")  # the figures are files: no window
plt.rcParams.update({"font.size": 12, "axes.titlesize": 12})


def draw_paths(paths, *, points, weights, sigma_q):
    """The trajectories over the posterior at t = 1.  paths: (num_steps + 1, n, 2)."""
    fig, ax = plt.subplots(figsize=(6, 6.4), layout="constrained")
    everything = np.concatenate([paths.reshape(-1, 2), points])
    center = (everything.max(axis=0) + everything.min(axis=0)) / 2
    half = 0.55 * np.ptp(everything, axis=0).max()
    extent = (center[0] - half, center[0] + half, center[1] - half, center[1] + half)
    x, y = np.meshgrid(np.linspace(*extent[:2], 240), np.linspace(*extent[2:], 240))
    grid = np.stack([x.ravel(), y.ravel()], axis=1)
    p = posterior(grid, 1.0, points=points, weights=weights, sigma_q=sigma_q)

    colors = np.array([to_rgb(f"C{i % 10}") for i in range(len(points))])
    shade = 1 - 0.45 * (1 - (p @ colors).reshape(240, 240, 3))
    ax.imshow(shade, extent=extent, origin="lower", interpolation="bilinear")
    if len(points) == 2:
        axis = (points[1] - points[0]) / np.linalg.norm(points[1] - points[0])
        foot = watershed(points, weights, sigma_q) * axis
        across = 4 * half * np.array([-axis[1], axis[0]])
        ends = np.stack([foot - across, foot + across])
        ax.plot(*ends.T, "k--", lw=1, label="parts the starts: to $a_1$, to $a_2$ (exact)")
    ax.plot([], [], "s", color="0.8", ms=8, label=r"shade: $p(x_0 = a_i\,|\,x_1 = x)$")

    num_steps = len(paths) - 1
    ends = reached(paths[-1], points)
    style = {"ms": 2.5, "lw": 0.7, "markevery": max(1, num_steps // 50)}
    for i, a in enumerate(points):
        own = paths[:, ends == i]
        ax.plot(own[..., 0], own[..., 1], "o-", color=0.75 * colors[i], **style)
        ax.plot(*a, "*", color=colors[i], ms=20, mec="k")
    start_label = r"$x_1$, drawn from $N(0, \sigma_q^2 I)$"
    ax.plot(*paths[0].T, "o", color="0.2", ms=4.5, label=start_label)
    ax.plot([], [], "k*", ms=12, mfc="w", label=r"the data: $a_1, a_2, \ldots$")
    ax.set(xlabel="$x$", ylabel="$y$", xlim=extent[:2], ylim=extent[2:])
    ax.set_title(f"DDIM, num_steps = {num_steps}: where $x_1$ lies decides")
    ax.legend(fontsize=10, loc="upper left", bbox_to_anchor=(0, -0.11))
    return fig


def draw_errors(along, at_end):
    """along, at_end: of measure_errors."""
    fig, ax = plt.subplots(figsize=(6, 5), layout="constrained")
    label = f"at t = .2, .4, .6, .8: slope {observed_slope(along):.2f}"
    ax.loglog(STEP_COUNTS, along, "o-", color="C0", label=label)
    first_order = along[-1] * STEP_COUNTS[-1] / np.array(STEP_COUNTS)
    ax.loglog(STEP_COUNTS, first_order, "k--", lw=1, label="slope $-1$")
    label = f"at t = 0 ({at_end[-1]:.1g} with {STEP_COUNTS[-1]} steps)"
    ax.loglog(STEP_COUNTS, at_end, "s-", color="C1", label=label)
    ax.set_ylim(bottom=along[-1] / 100)
    ax.set(xlabel=r"num_steps $= 1/\Delta t$", ylabel="RMS distance to the ODE's solution")
    ax.set_title("DDIM converges to the ODE's solution, to first order")
    ax.set_xticks(STEP_COUNTS, [str(n) for n in STEP_COUNTS], minor=False)
    ax.minorticks_off()
    ax.legend(fontsize=11)
    ax.grid(alpha=0.3)
    return fig


# ------------------------------------------ Running it ------------------------------------------


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """--help prints the docstring as it stands, and each option's default."""


def number(kind, low, high):
    """An argparse type: an int or a float from low to high (so neither NaN nor infinity)."""

    def parse(text):
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low:g} and {high:g}")
        return kind(text)

    parse.__name__ = kind.__name__
    return parse


def parse_arguments(argv):
    """The options.  Exits with status 2 on what cannot be used."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = partial(parser.add_argument, metavar="X")
    add("--num-steps", type=number(int, 1, 10_000), default=50, help="steps of the sampler, 1/dt")
    add("--num-samples", type=number(int, 1, 10**6), default=10_000, help="samples per start")
    points = {"type": number(float, -100, 100), "nargs": "+", "default": [-1.5, -1.0, 1.5, 1.0]}
    add("--points", **points, help="x and y of a_1, x and y of a_2, ...")
    add("--weights", type=number(float, 1e-6, 1), nargs="+", help="of each point; None: equal")
    add("--sigma-q", type=number(float, 0.1, 100), default=2.0, help="std of the noise at t = 1")
    add("--seed", type=number(int, 0, 2**63 - 1), default=0, help="seed of every draw")
    add("--figures-dir", type=Path, default=Path(__file__).parent / "figures", help="their folder")
    args = parser.parse_args(argv)
    if len(args.points) % 2:
        parser.error("argument --points: an x and a y are needed for each point")
    args.points = np.reshape(args.points, (-1, 2))
    if not 0 < np.ptp(args.points, axis=0).max() <= 30 * args.sigma_q:
        parser.error("argument --points: must differ, and by no more than 30 sigma_q")
    args.weights = np.array(args.weights or [1 / len(args.points)] * len(args.points))
    if len(args.weights) != len(args.points) or abs(args.weights.sum() - 1) > 1e-9:
        parser.error("argument --weights: one for each point is needed, and 1 in all")
    try:
        args.figures_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"argument --figures-dir: {error}")
    return args


def save(figure, path):
    """Writes the figure whole or not at all: drawn in memory, written beside, moved into place."""
    image = io.BytesIO()  # Pillow does not notice a full disk, Python does
    figure.savefig(image, format="jpg", dpi=120)
    part = path.with_suffix(".part")
    part.write_bytes(image.getvalue())
    part.replace(path)
    print(f"wrote {path}")


def main(argv=None):
    """Samples, measures, prints, draws.  Exits with status 2 on bad input."""
    args = parse_arguments(argv)
    rng = np.random.default_rng(args.seed)
    data = {"points": args.points, "weights": args.weights, "sigma_q": args.sigma_q}

    base = args.sigma_q * rng.standard_normal((args.num_samples, 2))
    p_1 = draw_p_1(args.num_samples, rng, **data)

    *from_base, paths = measure_shares(base, args.num_steps, "from the base", **data)
    *from_p_1, _ = measure_shares(p_1, args.num_steps, "from p_1", **data)
    along, at_end = measure_errors(p_1[:1000], **data)
    off_middle = measure_plain_average(base, args.num_steps, args.points)

    report(from_p_1, from_base, base_shares(**data), observed_slope(along), off_middle, args)

    folder = args.figures_dir
    save(draw_paths(paths, **data), folder / "experiment-2-sample-trajectories-ddim.jpg")
    save(draw_errors(along, at_end), folder / "experiment-2-error-vs-steps.jpg")


if __name__ == "__main__":
    main()
