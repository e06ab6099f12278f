"""Experiment 2: the data is two points; DDIM runs to one or the other, steered by Bayes' rule.

The claim
    If x_0 is the point a_i with probability w_i, DDIM averages the moves that it would make to each
    point alone (experiment 1). It averages them by the posterior (section 3.3 of the tutorial),
        p(x_0 = a_i | x_t)  in proportion to  w_i exp(-|x_t - a_i|^2 / (2 sigma_q^2 t)),
    which depends on where x_t is. The plain average, by the w_i wherever x_t is, is wrong.

The truth beside it
    With small steps DDIM follows an ordinary differential equation (ODE) that carries p_1 to p_0,
        dx/dt = (x - E[x_0 | x_t = x]) / 2t.
    In it the coordinate along the line through the two points moves at a speed that depends on
    itself and t alone, as the posterior does; and on a line trajectories cannot cross. So a border
    parts the starts: the share w_1 of p_1 on one side goes to a_1, the rest to a_2. The base
    N(0, sigma_q^2 I) is not p_1, and the border cuts it into other shares, also known. A sample's
    twin is the point that the ODE takes its start to. For more points the ODE is solved.

What to look for in figures/
    experiment-2-sample-trajectories-ddim.jpg   the border at t = 1 parts the starts; averaged
                                                plainly, all run to one place, without data
    velocity-field.jpg                          in noise the arrows point between the points, near
                                                the data to one or the other

Try this
    python two_points.py --weight 0.5     where does the border cut the base now?
    python two_points.py --sigma-q 10     the base is more nearly p_1: are its shares?
    python two_points.py --sigma-q 30     still more nearly, but are the steps short enough?
    python two_points.py --num-steps 2    too few steps: where do samples end?
"""

import math
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
from matplotlib.colors import to_rgb
from tqdm import tqdm

# ------------------------------------------- The data -------------------------------------------
# Two points of the plane or more; how probable each is.
POINTS = np.array([[-1.5, -1.0], [1.5, 1.0]])
WEIGHTS = np.array([0.8, 0.2])


@dataclass(frozen=True)
class Data:
    """x_0 is points[i] with probability weights[i], and x_t = x_0 + N(0, sigma_q^2 t I)."""

    points: np.ndarray  # (k, 2)
    weights: np.ndarray  # (k,), positive, of sum 1
    sigma_q: float

    def noisy(self, n, rng):
        """n draws of p_1, (n, 2)."""
        x_0 = self.points[rng.choice(len(self.points), size=n, p=self.weights)]
        return x_0 + self.sigma_q * rng.standard_normal(x_0.shape)


def faults(points, weights):
    """What the script cannot do with the data, a line each."""
    try:
        points, weights = np.array(points, float), np.array(weights, float)
    except (TypeError, ValueError):  # words, or rows of different lengths
        points, weights = np.zeros(0), np.zeros(0)
    if points.ndim != 2 or points.shape[1] != 2 or len(points) < 2:
        return ["POINTS: not two or more points of the plane"]
    if not np.isfinite(points).all() or len(np.unique(points, axis=0)) < len(points):
        return ["POINTS: two are the same, or one is not finite"]
    if weights.shape != points.shape[:1] or not min(weights) > 0 or abs(sum(weights) - 1) > 1e-9:
        return ["WEIGHTS: not a positive number for each point, of sum 1"]
    return []


# --------------------------------------- The reverse mean ---------------------------------------


def posterior(x_t, t, *, points, weights, sigma_q):
    """p(x_0 = points[i] | x_t), Bayes' rule: x_t given x_0 is N(x_0, sigma_q^2 t I).

    x_t: (n, d), at time t > 0;  points: (k, d);  weights: (k,), positive.  Returns (n, k).
    """
    variance = sigma_q**2 * t
    logits = points @ x_t.T / variance  # (k, n); |x_t|^2 cancels
    logits += (np.log(weights) - (points**2).sum(axis=1) / (2 * variance))[:, None]
    odds = np.exp(logits - logits.max(axis=0))
    return (odds / odds.sum(axis=0)).T


def reverse_mean(x_t, t, dt, *, points, weights, sigma_q):
    """E[x_{t-dt} | x_t], eq. (24): the reverse means of the points, averaged by the posterior.

    That of the point a is (dt / t) a + (1 - dt / t) x_t. Exact for any dt.
    x_t: (n, d), at time t;  0 < dt <= t <= 1.  Returns (n, d).
    """
    mean_x_0 = posterior(x_t, t, points=points, weights=weights, sigma_q=sigma_q) @ points
    return (dt / t) * mean_x_0 + (1 - dt / t) * x_t


def plain_mean(x_t, t, dt, *, points, weights):
    """The mistake: the same, averaged by the weights, wherever x_t is.  Returns (n, d)."""
    return (dt / t) * (weights @ points) + (1 - dt / t) * x_t


# ----------------------------------------- The samplers -----------------------------------------
# They know nothing of the data but the function that they are given: reverse_mean(x_t, t, dt).


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


# ------------------------------------------ The truth -------------------------------------------


def along(points):
    """The unit vector from the first of two points, (2, d), to the second.  Returns (d,)."""
    return (points[1] - points[0]) / np.linalg.norm(points[1] - points[0])


def normal_tail(z):
    """P(N(0, 1) > z).  z: a float."""
    return math.erfc(z / 2**0.5) / 2


def border(t, data):
    """Where the ODE parts the samples at time t: x_t goes to the first point if x_t @ along < s.

    For two points. The ODE keeps the order along the line, and carries p_t to p_0. So s cuts off
    the share w_1 of p_t, which is to say that as much of the first point's Gaussian lies beyond it
    as of the second's before it:  w_1 P(u > s | a_1) = w_2 P(u < s | a_2).  Bisection.
    """
    sigma_t = data.sigma_q * t**0.5
    u_1, u_2 = data.points @ along(data.points)
    low, high = u_1 - 10 * sigma_t, u_2 + 10 * sigma_t
    for _ in range(100):
        s = (low + high) / 2
        beyond = data.weights[0] * normal_tail((s - u_1) / sigma_t)
        before = data.weights[1] * normal_tail((u_2 - s) / sigma_t)
        if beyond > before:
            low = s
        else:
            high = s
    return s


def solve(x_t, t, data, num_steps=100):
    """Which point the ODE takes x_t, (n, 2), at time t, to, for any number of points.  (n,)

    Down to sigma_t = a tenth of the least distance of points, where the posterior is sure. In
    s = log sigma_t the ODE is dx/ds = x - E[x_0 | x]: by the midpoint rule, in equal steps of s,
    each exact as long as E[x_0 | x] stands still.
    """
    gaps = [math.dist(a, b) for i, a in enumerate(data.points) for b in data.points[:i]]
    sigma_t = data.sigma_q * t**0.5
    half_steps = np.geomspace(sigma_t, min(sigma_t, min(gaps) / 10), 2 * num_steps + 1)
    for sigma, middle, next_sigma in zip(*(half_steps[i::2] for i in (0, 1, 2))):
        x = x_t
        for at, to in ((sigma, middle), (middle, next_sigma)):
            mean = posterior(x, (at / data.sigma_q) ** 2, **vars(data)) @ data.points
            x = mean + to / sigma * (x_t - mean)
        x_t = x
    return posterior(x_t, (half_steps[-1] / data.sigma_q) ** 2, **vars(data)).argmax(axis=1)


def goes_to(x_t, t, data):
    """The number, 0 to k - 1, of the point that the ODE takes x_t, (n, 2), at time t, to.  (n,)"""
    if len(data.points) > 2:
        return solve(x_t, t, data)
    return (x_t @ along(data.points) > border(t, data)).astype(int)


def first_shares(data):
    """The share of starts that the ODE takes to the first point.  {start: share, or None}

    Of p_1 it is w_1, since the ODE carries p_1 to p_0. Of the base it has a closed form if there
    are two points.
    """
    two = len(data.points) == 2
    of_base = normal_tail(-border(1, data) / data.sigma_q) if two else None
    return {"p_1": data.weights[0], "the base": of_base}


# ------------------------------------------ Measuring -------------------------------------------


GRID = 200  # points on a side of a picture


def sample(mean, x_1, num_steps, label):
    """x_0, (n, 2), by DDIM from x_1 with the reverse mean `mean`.  label: of the progress bar."""
    for x_t in tqdm(ddim(mean, x_1, num_steps), label, num_steps, disable=None):
        pass
    return x_t


def nearest(x_0, points):
    """The number of the point that is nearest to each sample.  x_0: (n, 2).  Returns (n,)."""
    return ((x_0[:, None] - points) ** 2).sum(axis=2).argmin(axis=1)


def apart(x_0, twins):
    """Mean distance of the samples to their twins, (n, 2) each."""
    return np.linalg.norm(x_0 - twins, axis=1).mean()


def plane_grid(middle, side, n):
    """n by n points of the square middle +- side.  Returns (n^2, 2)."""
    x, y = np.meshgrid(*(m + np.linspace(-side, side, n) for m in middle))
    return np.stack([x.ravel(), y.ravel()], axis=1)


def scene(t, middle, side, data):
    """What is seen at time t in the square middle +- side.

    posterior: (GRID, GRID, k);  borders: [(GRID, GRID)], each 0 on a border, or changing its sign;
    tails, arrows: (196, 2), of the arrows E[x_0 | x_t] - x_t, in which direction DDIM moves: they
    are sigma_t^2 times the score (Tweedie).
    """
    grid, tails = plane_grid(middle, side, GRID), plane_grid(middle, 0.93 * side, 14)
    (x, y), k = middle, len(data.points)
    if k == 2:
        borders = [grid @ along(data.points) - border(t, data)]
    else:
        numbers = solve(grid, t, data)
        # Between point i and those that come after it: so no border is drawn twice.
        borders = [np.where(numbers < i, np.nan, (numbers == i) - 0.5) for i in range(k - 1)]
    return {
        "t": t,
        "sigma_t": data.sigma_q * t**0.5,
        "extent": (x - side, x + side, y - side, y + side),
        "posterior": posterior(grid, t, **vars(data)).reshape(GRID, GRID, k),
        "borders": [values.reshape(GRID, GRID) for values in borders],
        "tails": tails,
        "arrows": reverse_mean(tails, t, t, **vars(data)) - tails,
    }


# ----------------------------------------- The figures ------------------------------------------
plt.style.use("default")  # the same figures whatever the reader's matplotlibrc says
BLUE, ORANGE, PINK, SKY, GREEN = "#0072B2", "#E69F00", "#CC79A7", "#56B4E9", "#009E73"


def colors(k):
    """A color for each of k points; five are told apart best."""
    if k <= 5:
        return [BLUE, ORANGE, PINK, SKY, GREEN][:k]
    return [*plt.get_cmap("viridis")(np.linspace(0, 1, k))]


def draw_scene(ax, view, points, title):
    """The points, the posterior (shade) and the borders.  view: of scene."""
    hues = colors(len(points))
    shade = view["posterior"] @ np.array([to_rgb(color) for color in hues])
    ax.imshow(1 - 0.35 * (1 - shade), extent=view["extent"], origin="lower")
    for i, (a, color) in enumerate(zip(points, hues)):
        label = f"$a_{{{i + 1}}}$; shade: $p(x_0 = a_{{{i + 1}}} | x_t)$"
        ax.plot(*a, "*", color=color, ms=16, mec="k", zorder=4, label=label)
    for values in view["borders"]:
        if (values < 0).any() and (values > 0).any():  # the border is in the picture
            style = {"colors": "k", "linestyles": "--", "linewidths": 1.2}
            ax.contour(values, [0], extent=view["extent"], origin="lower", **style)
    ax.plot([], [], "k--", lw=1.2, label="border at this $t$")
    ax.set(xlabel="$x$", ylabel="$y$", title=title, aspect="equal")
    ax.set(xlim=view["extent"][:2], ylim=view["extent"][2:])


def draw_trajectories(paths, numbers, view, points):
    """DDIM from the same starts.  paths: {how it averages: (num_steps + 1, n, 2)}.

    numbers: (n,), of the points that the ODE goes to, which give the colors;  view: of scene.
    """
    fig, axes = plt.subplots(1, 2, figsize=(10, 5.9), layout="constrained")
    for ax, (how, x_t) in zip(axes, paths.items()):
        for i, color in enumerate(colors(len(points))):
            x, y = x_t[:, numbers == i].T
            ax.plot(x.T, y.T, color=color, lw=1.1)
            ax.plot([], [], color=color, label=f"the ODE goes to $a_{{{i + 1}}}$")
        ax.plot(*x_t[0].T, "o", color="0.2", ms=3.5, label="$x_1$")
        ax.plot(*x_t[-1].T, "kx", ms=6, zorder=5, label="$x_0$")
        draw_scene(ax, view, points, f"DDIM, averaged {how} (backdrop: $t$ = 1)")
    fig.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return fig


def draw_directions(views, points):
    """The arrows at several times.  views: of scene."""
    fig, axes = plt.subplots(1, len(views), figsize=(12, 4.8), layout="constrained")
    for ax, view in zip(axes, views):
        style = {"angles": "xy", "scale_units": "xy", "scale": 8, "width": 0.005}
        ax.quiver(*view["tails"].T, *view["arrows"].T, color="0.15", **style)
        style = {"ls": "", "marker": r"$\rightarrow$", "ms": 16, "mew": 0}
        ax.plot([], [], color="0.15", **style, label="$(E[x_0|x_t] - x_t)/8$")
        title = rf"$t$ = {view['t']:g}: $\sigma_t$ = {view['sigma_t']:.2g}"
        draw_scene(ax, view, points, title)
    fig.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=4)
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


def report(samples, x_1, data):
    """Rows of table.  samples, x_1: {samples from: (n, 2)}."""
    rows = [["samples from", "nearest a_1", "s.e.", "exact", "mean distance to twins"]]
    shares = first_shares(data)
    for name, x_0 in samples.items():
        cells = ["", "", ""]
        if name in shares:  # averaged plainly, all end at one place: it is near to none
            cells[0] = f"{(nearest(x_0, data.points) == 0).mean():.4f}"
        if exact := shares.get(name):
            cells[1:] = f"{(exact * (1 - exact) / len(x_0)) ** 0.5:.4f}", f"{exact:.4f}"
        twins = data.points[goes_to(x_1[name], 1, data)]
        rows.append([name, *cells, f"{apart(x_0, twins):.2g}"])
    return rows


def main(argv=None):
    wrong = faults(POINTS, WEIGHTS)
    args = options(
        argv,
        *wrong,
        num_steps=(500, 1, 2000, "steps of the sampler, 1 / dt"),
        num_samples=(10_000, 1, 10**6, "samples from p_1, and from the base"),
        weight=(0.5 if wrong else float(WEIGHTS[0]), 0.01, 0.99, "probability of the first point"),
        sigma_q=(2.0, 0.5, 100.0, "std of the noise at t = 1, and of the base"),
        seed=(0, 0, 10**6, "seed of every draw"),
    )
    rng = np.random.default_rng(args.seed)
    others = np.array(WEIGHTS[1:]) / sum(WEIGHTS[1:])  # keep their proportions
    weights = np.array([args.weight, *(1 - args.weight) * others])
    data = Data(np.array(POINTS, dtype=float), weights, args.sigma_q)
    bayes = partial(reverse_mean, **vars(data))
    plain = partial(plain_mean, points=data.points, weights=weights)

    base = args.sigma_q * rng.standard_normal((args.num_samples, 2))
    p_1 = data.noisy(args.num_samples, rng)
    samples, x_1 = {}, {}
    for name, mean, starts in [
        ("p_1", bayes, p_1),
        ("the base", bayes, base),
        ("the base, averaged plainly", plain, base),
    ]:
        x_1[name], samples[name] = starts, sample(mean, starts, args.num_steps, name)

    few = base[:40]
    means = {"by the posterior": bayes, "plainly": plain}
    paths = {how: np.array([few, *ddim(mean, few, args.num_steps)]) for how, mean in means.items()}
    start = scene(1, (0, 0), 1.05 * max(np.abs(few).max(), np.abs(data.points).max()), data)
    middle = (data.points.min(axis=0) + data.points.max(axis=0)) / 2
    side = 2 * np.abs(data.points - middle).max()
    views = [scene(t, middle, side, data) for t in (1, 0.3, 0.03)]
    for name, figure in {
        "experiment-2-sample-trajectories-ddim": draw_trajectories(
            paths, goes_to(few, 1, data), start, data.points
        ),
        "velocity-field": draw_directions(views, data.points),
    }.items():
        figure.savefig(args.figures_dir / f"{name}.jpg", dpi=120)
    print(
        f"points: {len(weights)}, w_1 = {args.weight:g}, base N(0, {args.sigma_q:g}^2 I),", end=" "
    )
    print(f"samples in each row: {args.num_samples}, steps: {args.num_steps}")
    table(report(samples, x_1, data))
    print(f"figures: {args.figures_dir}")


if __name__ == "__main__":
    main()
