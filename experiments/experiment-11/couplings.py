"""Experiment 11: which coupling? Where lines cross, trajectories bend.

The claim
    A flow is learned from pairs (x_0, x_1), each moved along its line x_t = t x_1 + (1 - t) x_0.
    Any coupling, that is any way to pair data with noise, gives a right flow (section 4.3), if its
    trajectories are unique. But where lines of different pairs cross, the velocity is their mean,
    E[x_0 - x_1 | x_t]. Then some trajectories bend, and few steps end in wrong places. The price
    is exact (Pythagoras, twice):
        E|x_0 - x_1|^2  =  irreducible  +  curvature  +  cost of the flow's own coupling.
    irreducible: integral of E|x_0 - x_1 - v_t|^2 dt, the least loss that training can reach;
    curvature: integral of E|v_t|^2 dt less E|flow(x_1) - x_1|^2, 0 if trajectories are straight and
    keep their speed.

The truth beside it
    In one dimension all of it is known. Sorting batches of B draws is optimal transport within the
    batch; its law has a closed form, so v_t is one integral. Trajectories cannot cross on a line.
    So each of these flows leads from x_1 to its twin at the same quantile of the data, `monotone`,
    and the last term is W_2^2, the cost of optimal transport. The error is the root mean square
    distance to the twins.

What to look for in figures/
    lines.jpg    lines that cross, trajectories, and where few steps end: four couplings
    cost.jpg     the price, split in three, and the errors of 1, 2 and 4 steps

Try this
    python couplings.py --num-steps 4    the last row of lines.jpg with four steps: who is wrong?
    python couplings.py --reflows 2      does a second reflow help?
"""

import math
import os
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from functools import cache, partial
from itertools import zip_longest
from pathlib import Path
from statistics import NormalDist

os.environ["MPLBACKEND"] = "agg"  # figures are files, also from a notebook

import matplotlib.pyplot as plt
import numpy as np

# ------------------------------------------- The data -------------------------------------------
# The noise x_1 is N(0, 1); the data x_0 is one of CENTERS, plus N(0, STD^2).
WEIGHTS, CENTERS = np.array([0.5, 0.5]), np.array([-1.0, 1.0])
STD = 0.15


def faults():
    """What cannot be done with the data above, a line each."""
    found = []
    positive = len(WEIGHTS) > 0 and min(WEIGHTS) > 0 and abs(sum(WEIGHTS) - 1) < 1e-9
    if not (positive and len(WEIGHTS) == len(CENTERS)):
        found += ["WEIGHTS must be positive and sum to 1, one for each of CENTERS"]
    elif not max(CENTERS) - min(CENTERS) <= 500 * STD:
        found += ["CENTERS lie more than 500 STD apart: too far for the tables"]
    return found


def density_1(x):
    """The density of x_1, at x of any shape."""
    return np.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)


def density_0(x):
    """The density of x_0, at x of any shape."""
    return sum(w * density_1((x - c) / STD) / STD for w, c in zip(WEIGHTS, CENTERS))


@cache
def table_1():
    """Points x and the distribution function of x_1 there: (m,), (m,)."""
    x = np.linspace(-8, 8, 2401)
    return x, np.array([NormalDist().cdf(y) for y in x])


@cache
def table_0():
    """Points x, as fine in units of STD, and the distribution function of x_0 there."""
    low, high = min(CENTERS) - 8 * STD, max(CENTERS) + 8 * STD
    x = np.linspace(low, high, int(150 * (high - low) / STD) + 1)
    parts = [[w * NormalDist(c, STD).cdf(y) for y in x] for w, c in zip(WEIGHTS, CENTERS)]
    return x, np.sum(parts, axis=0)


def draw(n, rng):
    """n draws of x_1 and n of x_0, independent.  rng: a NumPy Generator.  Returns (n,), (n,)."""
    x_1 = rng.standard_normal(n)
    x_0 = rng.choice(CENTERS, n, p=WEIGHTS) + STD * rng.standard_normal(n)
    return x_1, x_0


def sort_batches(x_1, x_0, batch):
    """Minibatch optimal transport: in each batch the least goes to the least, and so on.

    x_1, x_0: (n,), cut into batches in the order given.  Returns the pairs, (n,), (n,).
    """
    x_1, x_0 = x_1.copy(), x_0.copy()
    for k in range(0, len(x_1), batch):
        x_1[k : k + batch].sort()
        x_0[k : k + batch].sort()
    return x_1, x_0


# ----------------------------------------- The velocity -----------------------------------------


def density_ratio(u, w, batch):
    """p(x_1, x_0) / (p(x_1) p(x_0)) when batches are sorted; u, w: the quantiles of x_1, x_0.

    In a batch of B, let k others be below. Given k, u and w are independent, of density B b_k,
        b_k(u) = C(B-1, k) u^k (1-u)^(B-1-k)    (Bernstein's polynomials).
    Each k has probability 1 / B, so the ratio is B sum_k b_k(u) b_k(w) = B S_{B-1}, where
        S_n = sum_k C(n, k)^2 a^k b^(n-k),    a = u w,  b = (1-u) (1-w).
    S_n = (b - a)^n P_n((b + a) / (b - a)), P_n Legendre's polynomial: the loop is their recurrence.
    u, w: arrays of one shape.  Returns the same shape.
    """
    a, b = u * w, (1 - u) * (1 - w)
    total, square = a + b, (a - b) ** 2
    s, before = np.ones_like(a), 0
    for n in range(batch - 1):
        s, before = ((2 * n + 1) * total * s - n * square * before) / (n + 1), s
    return batch * s


Z = np.linspace(-6, 6, 49)  # a standard normal's range, and its probabilities
Z_WEIGHTS = density_1(Z) * (Z[1] - Z[0])


def pairs(x_t, t, batch):
    """The pairs whose lines lead through x_t: d = x_0 - x_1, and their weights, (m, n) each.

    Let pairs be independent first, and c the center of x_0. Then x_1 and (x_0 - c) / STD are
    standard normal, and x_t - (1 - t) c = t x_1 + (1 - t) STD (x_0 - c) / STD is normal of
    standard deviation `spread`. Turn the two so that one is that sum, in units of spread: `along`.
    x_t says nothing of the other, Z. A weight is p(c | x_t) p(Z) density_ratio; the sum of weights
    is the density of x_t over what it is for independent pairs.
    x_t: (n,);  t: a float, 0 < t <= 1.
    """
    spread = math.hypot(t, (1 - t) * STD)
    cos, sin = t / spread, (1 - t) * STD / spread
    along = (x_t - (1 - t) * CENTERS[:, None]) / spread  # (centers, n)
    logits = np.log(WEIGHTS)[:, None] - along**2 / 2
    chances = np.exp(logits - logits.max(axis=0))
    chances /= chances.sum(axis=0)
    x_1 = cos * along[:, None] - sin * Z[:, None]  # (centers, 49, n)
    x_0 = CENTERS[:, None, None] + STD * (sin * along[:, None] + cos * Z[:, None])
    u, w = np.interp(x_1, *table_1()), np.interp(x_0, *table_0())
    p = chances[:, None] * Z_WEIGHTS[:, None] * density_ratio(u, w, batch)
    return (x_0 - x_1).reshape(-1, len(x_t)), p.reshape(-1, len(x_t))


def mean(d, p):
    """The mean of d with weights p, (m, n) each, over the first axis.  (n,); 0 if p is."""
    return (p * d).sum(axis=0) / (p.sum(axis=0) + 1e-300)


def batch_velocity(x_t, t, *, batch):
    """v_t(x_t) = E[x_0 - x_1 | x_t] when batches are sorted.  x_t: (n,);  t: a float.  (n,)"""
    return mean(*pairs(x_t, t, batch))


def straight_velocity(x_t, t, *, x_1, x_0):
    """v_t when x_0 is an increasing function of x_1: one line at most leads through x_t.

    x_1, x_0: (m,), a table of that function, increasing.  x_t: (n,);  t: a float.  Returns (n,).
    """
    return np.interp(x_t, t * x_1 + (1 - t) * x_0, x_0 - x_1)


# ----------------------------------------- The samplers -----------------------------------------


def flow(velocity, x_1, num_steps):
    """Pseudocode 5: x_{t-dt} = x_t + v_t(x_t) dt, for t = 1, 1 - dt, ..., dt.

    x_1: draws of the base;  num_steps = 1 / dt;  velocity(x_t, t) -> like x_t, t a float.
    Yields x_{t-dt} after every step, the last is x_0.
    """
    x_t, dt = x_1, 1 / num_steps
    for k in range(num_steps, 0, -1):  # t = k dt
        x_t = x_t + velocity(x_t, k / num_steps) * dt
        yield x_t


# ------------------------------------------ The truth -------------------------------------------


def monotone(x_1):
    """The twin of x_1, (n,): the same quantile of the data.  Returns (n,)."""
    x, cdf = table_0()
    return np.interp(np.interp(x_1, *table_1()), cdf, x)


def cost(batch):
    """E|x_0 - x_1|^2 when batches are sorted: given their rank, x_0 and x_1 are independent."""
    product = 0.0  # E x_0 x_1
    for k in range(batch):
        means = []
        for (x, cdf), density in ((table_1(), density_1), (table_0(), density_0)):
            rank = math.comb(batch - 1, k) * cdf**k * (1 - cdf) ** (batch - 1 - k)  # b_k
            means.append((x * density(x) * rank).sum() * (x[1] - x[0]))
        product += batch * means[0] * means[1]
    return 1 + WEIGHTS @ CENTERS**2 + STD**2 - 2 * product


# ------------------------------------------ Measuring -------------------------------------------
BATCHES = [1, 2, 4, 8, 16, 32]  # 1 is the independent coupling
NUM_STEPS = [1, 2, 4]
FINE = 100  # steps of a trajectory, and of a reflow

NODES, NODE_WEIGHTS = np.polynomial.legendre.leggauss(16)
TIMES = list(zip((1 + NODES) / 2, NODE_WEIGHTS / 2))  # an integral over t is a sum over these


@cache
def starts(n=60):
    """x_1, increasing, and weights: a mean over x_1 is a sum over them.  (m,), (m,)

    n Gauss-Legendre nodes for each piece between two places where the twins may jump, from one
    center to the next.
    """
    below = np.cumsum(WEIGHTS[np.argsort(CENTERS)])[:-1]
    edges = np.clip([-5, *(NormalDist().inv_cdf(share) for share in below), 5], -5, 5)
    nodes, weights = np.polynomial.legendre.leggauss(n)
    centers, halves = (edges[1:] + edges[:-1]) / 2, np.diff(edges) / 2
    x_1 = (centers[:, None] + halves[:, None] * nodes).ravel()
    return x_1, np.outer(halves, weights).ravel() * density_1(x_1)


def split(batch, optimal):
    """irreducible and curvature when batches are sorted.  optimal: W_2^2.

    E|x_0 - x_1 - v_t|^2 is the mean of the variance of d = x_0 - x_1 given x_t.
    """
    irreducible = speed = 0.0
    for t, weight in TIMES:
        x_t = np.add.outer((1 - t) * CENTERS, math.hypot(t, (1 - t) * STD) * Z).ravel()
        d, p = pairs(x_t, t, batch)
        p *= np.outer(WEIGHTS, Z_WEIGHTS).ravel()  # the probability of x_t, of independent pairs
        v = mean(d, p)
        irreducible += weight * (p * (d - v) ** 2).sum()
        speed += weight * (p.sum(axis=0) @ v**2)
    return irreducible, speed - optimal


def ends(velocity, x_1, num_steps):
    """Where the flow takes x_1.  Returns x_0, like x_1."""
    for x_t in flow(velocity, x_1, num_steps):
        pass
    return x_t


def errors(velocity):
    """Root mean square distance of ends to twins: {number of steps: distance}."""
    x_1, weights = starts()
    twins = monotone(x_1)
    return {n: (weights @ (ends(velocity, x_1, n) - twins) ** 2) ** 0.5 for n in NUM_STEPS}


def measure():
    """{batch: what sorting batches costs, and its errors}, and W_2^2."""
    x_1, weights = starts()
    optimal = weights @ (monotone(x_1) - x_1) ** 2
    found = {}
    for batch in BATCHES:
        irreducible, curvature = split(batch, optimal)
        found[f"B = {batch}"] = {
            "cost": cost(batch),
            "irreducible": irreducible,
            "curvature": curvature,
            "errors": errors(partial(batch_velocity, batch=batch)),
        }
    return found, optimal


def straight(x_0):
    """The same for a coupling of starts with x_0, both increasing: no two lines meet."""
    x_1, weights = starts()
    velocity = partial(straight_velocity, x_1=x_1, x_0=x_0)
    price = weights @ (x_0 - x_1) ** 2  # all of it is the cost of the flow's own coupling
    return {"cost": price, "irreducible": 0.0, "curvature": 0.0, "errors": errors(velocity)}


def reflow(velocity, num_reflows):
    """Starts are paired with the ends of their trajectories, again and again: the last x_0."""
    x_1, _ = starts()
    for _ in range(num_reflows):
        x_0 = ends(velocity, x_1, FINE)
        velocity = partial(straight_velocity, x_1=x_1, x_0=x_0)
    return x_0


def follow(x_1, x_0, num_steps):
    """{coupling: [its lines, the flow's trajectories, few steps]}, each (steps + 1, n) from x_1.

    x_1, x_0: (n,), independent.
    """
    x, _ = table_1()
    couplings = {
        "independent": (1, partial(batch_velocity, batch=1)),
        "batches of 4": (4, partial(batch_velocity, batch=4)),
        "batches of 32": (32, partial(batch_velocity, batch=32)),
        "sorted": (len(x_1), partial(straight_velocity, x_1=x, x_0=monotone(x))),
    }
    return {
        name: [
            np.array(sort_batches(x_1, x_0, batch)),
            np.array([x_1, *flow(velocity, x_1, FINE)]),
            np.array([x_1, *flow(velocity, x_1, num_steps)]),
        ]
        for name, (batch, velocity) in couplings.items()
    }


# ----------------------------------------- The figures ------------------------------------------
plt.style.use("default")  # the same figures whatever the reader's matplotlibrc says
BLUE, PINK, SKY = "#0072B2", "#CC79A7", "#56B4E9"


def draw_paths(ax, t, paths, color):
    """Each column of paths over t.  All are one curve with gaps, which is drawn faster."""
    gap = np.full((1, paths.shape[1]), np.nan)
    x_t = np.vstack([paths, gap]).T.ravel()
    ax.plot(np.tile([*t, np.nan], paths.shape[1]), x_t, color=color, lw=0.7)


def draw_lines(runs, twins):
    """Lines, trajectories and few steps; the steps' ends with their twins.  runs: of follow."""
    fig, axes = plt.subplots(3, 4, figsize=(12, 8), layout="constrained", sharex=True, sharey=True)
    for column, (name, panels) in zip(axes.T, runs.items()):
        for ax, paths in zip(column, panels):
            above = paths[0] > 0
            t = np.linspace(1, 0, len(paths))
            draw_paths(ax, t, paths[:, above], BLUE)
            draw_paths(ax, t, paths[:, ~above], PINK)
        draw_paths(ax, [0, -0.12], np.array([paths[-1], twins]), "0.6")
        ax.plot(np.full(len(twins), -0.12), twins, "k.", ms=3)
        ax.set_xlabel("$t$")
        column[0].set_title(name)
    steps = f"Euler, steps: {len(paths) - 1}"
    for ax, word in zip(axes[:, 0], ("lines", "trajectories", steps)):
        ax.set_ylabel(f"{word}\n$x_t$")
    axes[0, 0].set(xlim=(1.02, -0.15), xticks=[1, 0.5, 0])
    fig.suptitle("Blue: starts above 0; pink: below 0; black dots: the twins")
    return fig


def draw_cost(found, optimal):
    """The cost, split, and the errors; the last of found is apart.  found, optimal: of measure."""
    names = [*found]
    price, irreducible, curvature = (
        np.array([row[part] for row in found.values()])
        for part in ("cost", "irreducible", "curvature")
    )
    fig, (bars, ax) = plt.subplots(1, 2, figsize=(12, 4.6), layout="constrained")

    bars.bar(names, optimal, color="0.7", label="$W_2^2$")
    bars.bar(names, curvature, bottom=optimal, color=PINK, label="curvature")
    bars.bar(names, irreducible, bottom=optimal + curvature, color=SKY, label="irreducible")
    bars.plot(names, price, "k_", ms=26, label="cost, computed directly")
    bars.set(title="Cost of the coupling", ylabel="$E|x_0 - x_1|^2$")
    bars.legend(reverse=True)

    for n, style in zip(NUM_STEPS, ("ko-", "ks--", "k^:")):
        miss = [row["errors"][n] for row in found.values()]
        ax.plot(names[:-1], miss[:-1], style, mfc="w", label=f"{n} Euler step" + "s" * (n > 1))
        ax.plot(names[-1:], miss[-1:], style[:2], mfc="w")  # not the next of the batches
    ax.set(title="Error of few steps", ylabel="RMS distance to the twins")
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


def report(found):
    """Rows for table of what measure found."""
    headings = ["coupling", "cost", "irreducible", "curvature"]
    rows = [[*headings, *(f"error, {n} step" + "s" * (n > 1) for n in NUM_STEPS)]]
    for name, row in found.items():
        numbers = [row["cost"], row["irreducible"], row["curvature"], *row["errors"].values()]
        rows.append([name, *(f"{x:.4f}" for x in numbers)])
    return rows


def main(argv=None):
    args = options(
        argv,
        *faults(),
        num_steps=(1, 1, 100, "Euler steps in the last row of lines.jpg"),
        num_samples=(64, 1, 500, "pairs that are drawn"),
        reflows=(1, 1, 10, "reflows of the independent coupling"),
        seed=(0, 0, 10**6, "seed of every draw"),
    )
    rng = np.random.default_rng(args.seed)

    found, optimal = measure()
    parts = [row["irreducible"] + row["curvature"] + optimal for row in found.values()]
    off = max(abs(row["cost"] - whole) for row, whole in zip(found.values(), parts))
    found["sorted"] = straight(monotone(starts()[0]))
    again = reflow(partial(batch_velocity, batch=1), args.reflows)
    x_1, x_0 = draw(args.num_samples, rng)

    for name, figure in {
        "lines": draw_lines(follow(x_1, x_0, args.num_steps), monotone(x_1)),
        "cost": draw_cost(found, optimal),
    }.items():
        figure.savefig(args.figures_dir / f"{name}.jpg", dpi=120)
    table(report({**found, f"reflow {args.reflows}": straight(again)}))
    print(f"W_2^2 = {optimal:.4f}; irreducible + curvature + W_2^2 is the cost, within {off:.0e}")
    print(f"figures: {args.figures_dir}")


if __name__ == "__main__":
    main()
