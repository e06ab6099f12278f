"""Experiment 2: the data is two points; DDIM runs to one or the other, steered by Bayes' rule.

The claim
    If x_0 is the point a_i with probability w_i, DDIM averages the moves that it would make to each
    point alone (experiment 1). It averages them by the posterior (section 3.3 of the tutorial),
        p(x_0 = a_i | x_t)  in proportion to  w_i exp(-|x_t - a_i|^2 / (2 sigma_q^2 t)),
    which depends on where x_t is. The plain average, by the w_i wherever x_t is, is wrong.

The truth beside it
    With small steps DDIM follows an ordinary differential equation (ODE) that carries p_1 to p_0.
    In it the coordinate along the line through the two points moves at a speed that depends on
    itself and t alone, and on a line trajectories cannot cross. So a border parts the starts: the
    share w_1 of p_1 on one side goes to a_1, the rest to a_2. The base N(0, sigma_q^2 I) is not
    p_1, and the border cuts it into other shares, also known. A sample's twin is the point that
    the ODE takes its start to.

What to look for in figures/
    experiment-2-sample-trajectories-ddim.jpg   the border at t = 1 parts the starts; averaged
                                                plainly, all run to one place, without data
    velocity-field.jpg                          in noise the arrows point between the points, near
                                                the data to one or the other

Try this
    python two_points.py --weight 0.5     the border halves the base, too
    python two_points.py --sigma-q 10     the base is more nearly p_1, its shares more nearly right
    python two_points.py --sigma-q 30     still more nearly, but now the steps are too long
    python two_points.py --num-steps 2    too few steps: samples end between the points
"""

import math
import os
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from functools import partial
from itertools import zip_longest
from pathlib import Path

os.environ["MPLBACKEND"] = "agg"  # figures are files, also from a notebook

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import to_rgb
from tqdm import tqdm

# ------------------------------------------- The data -------------------------------------------
# x_0 is points[i] with probability weights[i]. The posterior and what follows from it hold for any
# number of points, the border for two.
POINTS = np.array([[-1.5, -1.0], [1.5, 1.0]])


def noisy(n, rng, *, points, weights, sigma_q):
    """n draws of p_1: x_1 = x_0 + N(0, sigma_q^2 I).

    points: (k, d);  weights: (k,), of sum 1.  Returns (n, d).
    """
    x_0 = points[rng.choice(len(points), size=n, p=weights)]
    return x_0 + sigma_q * rng.standard_normal(x_0.shape)


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


def border(t, *, points, weights, sigma_q):
    """Where the ODE parts the samples at time t: x_t goes to the first point if x_t @ along < s.

    The ODE keeps the order along the line, and carries p_t to p_0. So s cuts off the share w_1 of
    p_t, which is to say that as much of the first point's Gaussian lies beyond it as of the
    second's before it:  w_1 P(u > s | a_1) = w_2 P(u < s | a_2).  Bisection.  Returns s, a float.
    """
    sigma_t = sigma_q * t**0.5
    u_1, u_2 = points @ along(points)
    low, high = u_1 - 10 * sigma_t, u_2 + 10 * sigma_t
    for _ in range(100):
        s = (low + high) / 2
        beyond = weights[0] * normal_tail((s - u_1) / sigma_t)
        before = weights[1] * normal_tail((u_2 - s) / sigma_t)
        if beyond > before:
            low = s
        else:
            high = s
    return s


def base_share(*, points, weights, sigma_q):
    """The share of the base N(0, sigma_q^2 I) on the first point's side of the border."""
    return normal_tail(-border(1, points=points, weights=weights, sigma_q=sigma_q) / sigma_q)


def twins(x_1, *, points, weights, sigma_q):
    """The point that the ODE takes each start to.  x_1: (n, d).  Returns (n, d)."""
    s = border(1, points=points, weights=weights, sigma_q=sigma_q)
    return points[(x_1 @ along(points) > s).astype(int)]


# ------------------------------------------ Measuring -------------------------------------------


def sample(mean, x_1, num_steps, label):
    """x_0, (n, d), by DDIM from x_1 with the reverse mean `mean`.  label: of the progress bar."""
    for x_t in tqdm(ddim(mean, x_1, num_steps), label, num_steps, disable=None):
        pass
    return x_t


def first_share(x_0, points):
    """The share of the samples, (n, d), that are nearer to the first point than to the second."""
    squares = ((x_0[:, None] - points) ** 2).sum(axis=2)  # (n, 2)
    return (squares[:, 0] < squares[:, 1]).mean()


def mean_distance(x_0, places):
    """Mean distance of the samples to their places, (n, d) each."""
    return np.linalg.norm(x_0 - places, axis=1).mean()


# ----------------------------------------- The figures ------------------------------------------
plt.style.use("default")  # the same figures whatever the reader's matplotlibrc says
BLUE, ORANGE = "#0072B2", "#E69F00"
COLORS = [BLUE, ORANGE]  # of the points


def backdrop(ax, t, side, title, *, points, weights, sigma_q):
    """The points; the posterior and the border at time t, in a square of the given half side."""
    x, y = np.meshgrid(np.linspace(-side, side, 200), np.linspace(-side, side, 200))
    grid = np.stack([x.ravel(), y.ravel()], axis=1)
    p = posterior(grid, t, points=points, weights=weights, sigma_q=sigma_q)
    shade = (p @ [to_rgb(color) for color in COLORS]).reshape(200, 200, 3)
    ax.imshow(1 - 0.35 * (1 - shade), extent=(-side, side, -side, side), origin="lower")
    axis = along(points)
    foot = axis * border(t, points=points, weights=weights, sigma_q=sigma_q)
    across = 3 * side * np.array([-axis[1], axis[0]])
    for i, (a, color) in enumerate(zip(points, COLORS), 1):
        label = f"$a_{i}$; shade: $p(x_0 = a_{i} | x_t)$"
        ax.plot(*a, "*", color=color, ms=16, mec="k", zorder=4, label=label)
    ax.plot(*np.stack([foot - across, foot + across]).T, "k--", lw=1.2, label="border at this $t$")
    ax.set(xlabel="$x$", ylabel="$y$", title=title, aspect="equal")
    ax.set(xlim=(-side, side), ylim=(-side, side))


def draw_trajectories(bayes, plain, x_1, num_steps, **data):
    """DDIM from the same starts, (n, 2), with either mean.  Colors: of the twins."""
    fig, axes = plt.subplots(1, 2, figsize=(10, 5.9), layout="constrained")
    side = 1.05 * max(np.abs(x_1).max(), np.abs(data["points"]).max())
    ends = twins(x_1, **data)
    for ax, mean, how in zip(axes, (bayes, plain), ("by the posterior", "plainly")):
        paths = np.array([x_1, *ddim(mean, x_1, num_steps)])  # (num_steps + 1, n, 2)
        for i, (a, color) in enumerate(zip(data["points"], COLORS), 1):
            own = paths[:, (ends == a).all(axis=1)]
            ax.plot(own[..., 0], own[..., 1], color=color, lw=1.1)
            ax.plot([], [], color=color, label=f"the ODE goes to $a_{i}$")
        ax.plot(*x_1.T, "o", color="0.2", ms=3.5, label="$x_1$")
        ax.plot(*paths[-1].T, "kx", ms=6, zorder=5, label="$x_0$")
        backdrop(ax, 1, side, f"DDIM, averaged {how} (backdrop: $t$ = 1)", **data)
    fig.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return fig


def draw_directions(**data):
    """E[x_0 | x_t] - x_t, in which direction DDIM moves: sigma_t^2 times the score (Tweedie)."""
    fig, axes = plt.subplots(1, 3, figsize=(12, 4.8), layout="constrained")
    side = 2 * np.abs(data["points"]).max()
    x, y = np.meshgrid(*[np.linspace(-0.93, 0.93, 14) * side] * 2)
    grid = np.stack([x.ravel(), y.ravel()], axis=1)
    for ax, t in zip(axes, (1, 0.3, 0.03)):
        arrows = reverse_mean(grid, t, t, **data) - grid
        style = {"angles": "xy", "scale_units": "xy", "scale": 8, "width": 0.005}
        ax.quiver(*grid.T, *arrows.T, color="0.15", **style)
        style = {"ls": "", "marker": r"$\rightarrow$", "ms": 16, "mew": 0}
        ax.plot([], [], color="0.15", **style, label="$(E[x_0|x_t] - x_t)/8$")
        sigma_t = data["sigma_q"] * t**0.5
        backdrop(ax, t, side, rf"$t$ = {t:g}: $\sigma_t$ = {sigma_t:.2g}", **data)
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


def report(name, mean, x_1, num_steps, exact, **data):
    """A row of table, of DDIM from x_1, (n, d).  exact: the share that the ODE takes to a_1."""
    x_0 = sample(mean, x_1, num_steps, name)
    shares = [first_share(x_0, data["points"]), (exact * (1 - exact) / len(x_0)) ** 0.5, exact]
    apart = mean_distance(x_0, twins(x_1, **data))
    return [name, *(f"{share:.4f}" for share in shares), f"{apart:.2g}"]


def main(argv=None):
    args = options(
        argv,
        num_steps=(500, 1, 2000, "steps of the sampler, 1 / dt"),
        num_samples=(10_000, 1, 10**6, "samples from p_1, and from the base"),
        weight=(0.8, 0.01, 0.99, "w_1, the probability of the first point"),
        sigma_q=(2.0, 0.5, 100.0, "std of the noise at t = 1, and of the base"),
        seed=(0, 0, 10**6, "seed of every draw"),
    )
    rng = np.random.default_rng(args.seed)
    weights = np.array([args.weight, 1 - args.weight])
    data = {"points": POINTS, "weights": weights, "sigma_q": args.sigma_q}
    bayes = partial(reverse_mean, **data)
    plain = partial(plain_mean, points=POINTS, weights=weights)

    base = args.sigma_q * rng.standard_normal((args.num_samples, 2))
    p_1 = noisy(args.num_samples, rng, **data)
    share = base_share(**data)
    rows = [
        ["samples from", "nearer to a_1", "s.e.", "exact", "mean distance to twins"],
        report("p_1", bayes, p_1, args.num_steps, args.weight, **data),
        report("the base", bayes, base, args.num_steps, share, **data),
        report("the base, averaged plainly", plain, base, args.num_steps, share, **data),
    ]
    table(rows)

    for name, figure in {
        "experiment-2-sample-trajectories-ddim": draw_trajectories(
            bayes, plain, base[:40], args.num_steps, **data
        ),
        "velocity-field": draw_directions(**data),
    }.items():
        figure.savefig(args.figures_dir / f"{name}.jpg", dpi=120)
    print(f"figures: {args.figures_dir}")


if __name__ == "__main__":
    main()
