"""Experiment 11: which coupling? Where lines cross, trajectories bend.

The claim
    A flow is learned from pairs (x_0, x_1), each moved along its line x_t = t x_1 + (1 - t) x_0.
    Any coupling, that is any way to pair data with noise, gives a right flow (section 4.3), if its
    trajectories are unique. But where lines of different pairs cross, the velocity is their mean,
    E[x_0 - x_1 | x_t]. Then trajectories bend, and few steps end in wrong places. The price is
    exact (Pythagoras, twice):
        E|x_0 - x_1|^2  =  irreducible  +  curvature  +  cost of the flow's own coupling.
    irreducible: integral of E|x_0 - x_1 - v_t|^2 dt, the least loss that training can reach;
    curvature: integral of E|v_t|^2 dt less E|flow(x_1) - x_1|^2, 0 if trajectories are straight and
    keep their speed.

The truth beside it
    In one dimension all of it is known. Sorting batches of B draws is optimal transport within the
    batch; its law has a closed form, so v_t is one integral. Trajectories cannot cross on a line.
    So every one of these flows leads from x_1 to its twin at the same quantile of the data,
    `monotone`, and the last term is W_2^2, the cost of optimal transport, for all. The error is the
    root mean square distance to the twins.

What to look for in figures/
    lines.jpg    fewer crossings from left to right, straighter trajectories, better single steps
    cost.jpg     the price, split in three, and the errors of 1, 2 and 4 steps

Try this
    python couplings.py --num-steps 4    the last row of lines.jpg with four steps: who is wrong?
    python couplings.py --reflows 2      does a second reflow help?
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
# The noise x_1 is N(0, 1); the data x_0 is 1 or -1, plus N(0, SIGMA_0^2).
SIGMA_0 = 0.15
X = np.linspace(-8, 8, 16_001)  # where the distribution functions are tabulated
normal_cdf = np.vectorize(NormalDist().cdf)
CDF_1 = normal_cdf(X)
CDF_0 = (normal_cdf((X - 1) / SIGMA_0) + normal_cdf((X + 1) / SIGMA_0)) / 2


def density_1(x):
    """The density of x_1, at x of any shape."""
    return np.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)


def density_0(x):
    """The density of x_0, at x of any shape."""
    return (density_1((x - 1) / SIGMA_0) + density_1((x + 1) / SIGMA_0)) / (2 * SIGMA_0)


def draw(n, rng):
    """n draws of x_1 and n of x_0, independent.  rng: a NumPy Generator.  Returns (n,), (n,)."""
    x_1 = rng.standard_normal(n)
    x_0 = rng.choice([-1, 1], n) + SIGMA_0 * rng.standard_normal(n)
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


D = np.linspace(-6, 6, 145)  # values of x_0 - x_1; not one pair in a million is farther apart


def joint(x_t, t, batch):
    """The density of (x_t, d), d = x_0 - x_1, at each of D.  x_t: (n,);  t: a float.  (145, n)

    The pair is x_0 = x_t + t d and x_1 = x_t - (1 - t) d, a change of variables of determinant 1.
    """
    x_0 = x_t + t * D[:, None]
    x_1 = x_t - (1 - t) * D[:, None]
    u, w = np.interp(x_1, X, CDF_1), np.interp(x_0, X, CDF_0)
    return density_1(x_1) * density_0(x_0) * density_ratio(u, w, batch)


def batch_velocity(x_t, t, *, batch):
    """v_t(x_t) = E[x_0 - x_1 | x_t] when batches are sorted.  x_t: (n,);  t: a float.  (n,)"""
    p = joint(x_t, t, batch)
    return D @ p / (p.sum(axis=0) + 1e-300)  # 0 where no line leads


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
    return np.interp(np.interp(x_1, X, CDF_1), CDF_0, X)


def cost(batch):
    """E|x_0 - x_1|^2 when batches are sorted: given their rank, x_0 and x_1 are independent."""
    spacing = X[1] - X[0]
    product = 0.0  # E x_0 x_1
    for k in range(batch):
        chosen = math.comb(batch - 1, k)
        rank_1 = chosen * CDF_1**k * (1 - CDF_1) ** (batch - 1 - k)  # b_k
        rank_0 = chosen * CDF_0**k * (1 - CDF_0) ** (batch - 1 - k)
        mean_1 = (X * density_1(X) * rank_1).sum() * spacing
        mean_0 = (X * density_0(X) * rank_0).sum() * spacing
        product += batch * mean_1 * mean_0
    return 2 + SIGMA_0**2 - 2 * product


# ------------------------------------------ Measuring -------------------------------------------
BATCHES = [1, 2, 4, 8, 16, 32]  # 1 is the independent coupling
NUM_STEPS = [1, 2, 4]
FINE = 100  # steps of a trajectory, and of a reflow

# Means over x_1 are sums over starts, dense around 0, where the twins jump from one bump to the
# other. Integrals over t are sums of 16 terms.
Y = np.linspace(-1, 1, 120)
STARTS, SPACING = 5 * Y**3, 15 * Y**2 * (Y[1] - Y[0])
WEIGHTS = density_1(STARTS) * SPACING
NODES, NODE_WEIGHTS = np.polynomial.legendre.leggauss(16)
TIMES = list(zip((1 + NODES) / 2, NODE_WEIGHTS / 2))


def split(batch, optimal):
    """irreducible and curvature when batches are sorted.  optimal: W_2^2.

    E|x_0 - x_1 - v_t|^2 is the mean of the variance of d = x_0 - x_1 given x_t.  STARTS are x_t.
    """
    irreducible = speed = 0.0
    for t, weight in TIMES:
        p = joint(STARTS, t, batch) * SPACING * (D[1] - D[0])
        v = D @ p / p.sum(axis=0)
        irreducible += weight * (p * (D[:, None] - v) ** 2).sum()
        speed += weight * (p.sum(axis=0) @ v**2)
    return irreducible, speed - optimal


def ends(velocity, x_1, num_steps):
    """Where the flow takes x_1.  Returns x_0, like x_1."""
    for x_t in flow(velocity, x_1, num_steps):
        pass
    return x_t


def errors(velocity):
    """Root mean square distance of ends to twins, for each of NUM_STEPS: a list."""
    twins = monotone(STARTS)
    return [(WEIGHTS @ (ends(velocity, STARTS, n) - twins) ** 2) ** 0.5 for n in NUM_STEPS]


def reflow(velocity, num_reflows):
    """The coupling of STARTS with the ends of their trajectories, again and again: x_0, (120,)."""
    for _ in range(num_reflows):
        x_0 = ends(velocity, STARTS, FINE)
        velocity = partial(straight_velocity, x_1=STARTS, x_0=x_0)
    return x_0


def measure(num_reflows):
    """A row for each coupling: {name: [cost, irreducible, curvature, *errors]}; and W_2^2.

    A reflow starts from the independent coupling.
    """
    twins = monotone(STARTS)
    optimal = WEIGHTS @ (twins - STARTS) ** 2
    rows = {}
    for batch in BATCHES:
        velocity = partial(batch_velocity, batch=batch)
        rows[f"B = {batch}"] = [cost(batch), *split(batch, optimal), *errors(velocity)]
    again = reflow(partial(batch_velocity, batch=1), num_reflows)
    for name, x_0 in {"sorted": twins, f"reflow {num_reflows}": again}.items():
        velocity = partial(straight_velocity, x_1=STARTS, x_0=x_0)
        own = WEIGHTS @ (x_0 - STARTS) ** 2  # all of the cost: x_0 increases, so lines never meet
        rows[name] = [own, 0.0, 0.0, *errors(velocity)]
    return rows, optimal


# ----------------------------------------- The figures ------------------------------------------
plt.style.use("default")  # the same figures whatever the reader's matplotlibrc says
BLUE, PINK, SKY = "#0072B2", "#CC79A7", "#56B4E9"


def draw_paths(ax, t, paths, color):
    """Each column of paths over t.  All are one curve with gaps, which is drawn faster."""
    gap = np.full((1, paths.shape[1]), np.nan)
    x_t = np.vstack([paths, gap]).T.ravel()
    ax.plot(np.tile([*t, np.nan], paths.shape[1]), x_t, color=color, lw=0.7)


def draw_lines(x_1, x_0, num_steps):
    """Lines, trajectories and steps from x_1, with its twins.  x_1, x_0: (n,), independent."""
    twins = monotone(x_1)
    columns = {
        "independent": (1, partial(batch_velocity, batch=1)),
        "batches of 4": (4, partial(batch_velocity, batch=4)),
        "batches of 32": (32, partial(batch_velocity, batch=32)),
        "sorted": (len(x_1), partial(straight_velocity, x_1=STARTS, x_0=monotone(STARTS))),
    }
    fig, axes = plt.subplots(3, 4, figsize=(12, 8), layout="constrained", sharex=True, sharey=True)
    for column, (name, (batch, velocity)) in zip(axes.T, columns.items()):
        lines = np.array(sort_batches(x_1, x_0, batch))
        trajectories = np.array([x_1, *flow(velocity, x_1, FINE)])
        steps = np.array([x_1, *flow(velocity, x_1, num_steps)])
        for ax, paths in zip(column, (lines, trajectories, steps)):
            above = paths[0] > 0
            t = np.linspace(1, 0, len(paths))
            draw_paths(ax, t, paths[:, above], BLUE)
            draw_paths(ax, t, paths[:, ~above], PINK)
        draw_paths(ax, [0, -0.12], np.array([steps[-1], twins]), "0.6")
        ax.plot(np.full(len(twins), -0.12), twins, "k.", ms=3)
        ax.set_xlabel("$t$")
        column[0].set_title(name)
    for ax, word in zip(axes[:, 0], ("lines", "trajectories", f"Euler, steps: {num_steps}")):
        ax.set_ylabel(f"{word}\n$x_t$")
    axes[0, 0].set(xlim=(1.02, -0.15), xticks=[1, 0.5, 0])
    fig.suptitle("Blue: starts above 0; pink: below 0; black dots: the twins")
    return fig


def draw_cost(rows, optimal):
    """The cost, split, and the errors, but for the reflow.  rows, optimal: of measure."""
    names = [name for name in rows if not name.startswith("reflow")]
    price, irreducible, curvature, *misses = np.array([rows[name] for name in names]).T
    fig, (bars, ax) = plt.subplots(1, 2, figsize=(12, 4.6), layout="constrained")

    bars.bar(names, optimal, color="0.7", label="$W_2^2$")
    bars.bar(names, curvature, bottom=optimal, color=PINK, label="curvature")
    bars.bar(names, irreducible, bottom=optimal + curvature, color=SKY, label="irreducible")
    bars.plot(names, price, "k_", ms=26, label="cost, computed directly")
    bars.set_title(r"Cost of the coupling, $E|x_0 - x_1|^2$")
    bars.legend(reverse=True)

    for n, miss, style in zip(NUM_STEPS, misses, ("ko-", "ks--", "k^:")):
        ax.plot(names[:-1], miss[:-1], style, mfc="w", label=f"{n} Euler step" + "s" * (n > 1))
        ax.plot(names[-1:], miss[-1:], style[:2], mfc="w")  # not the next of the batches
    ax.set_title("RMS distance to the twins")
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
        num_steps=(1, 1, 100, "Euler steps in the last row of lines.jpg"),
        num_samples=(64, 1, 500, "pairs that are drawn"),
        reflows=(1, 1, 10, "reflows of the independent coupling"),
        seed=(0, 0, 10**6, "seed of every draw"),
    )
    rng = np.random.default_rng(args.seed)

    rows, optimal = measure(args.reflows)
    off = max(abs(row[0] - row[1] - row[2] - optimal) for row in list(rows.values())[:-1])

    headings = ["coupling", "cost", "irreducible", "curvature"]
    headings += [f"error, {n} step" + "s" * (n > 1) for n in NUM_STEPS]
    table([headings, *([name, *(f"{x:.4f}" for x in row)] for name, row in rows.items())])
    print(f"W_2^2 = {optimal:.4f}; irreducible + curvature + W_2^2 is the cost, within {off:.0e}")

    for name, figure in {
        "lines": draw_lines(*draw(args.num_samples, rng), args.num_steps),
        "cost": draw_cost(rows, optimal),
    }.items():
        figure.savefig(args.figures_dir / f"{name}.jpg", dpi=120)
    print(f"figures: {args.figures_dir}")


if __name__ == "__main__":
    main()
