"""Experiment 1: DDIM runs straight to a point mass, and lands on it in any number of steps.

The claim
    If all the data is one point a, the reverse mean is ((t - dt) / t) x_t + (dt / t) a. Put it into
    Algorithm 2, where lam = sqrt(t) / (sqrt(t - dt) + sqrt(t)): a step multiplies x_t - a by
        1 - lam dt / t = sqrt(t - dt) / sqrt(t),
    because dt = (sqrt(t) - sqrt(t - dt)) (sqrt(t) + sqrt(t - dt)). From 1 to t these factors
    multiply to sqrt(t), whatever the steps: DDIM is at a + sqrt(t) (x_1 - a), and at last at a.
    DDPM adds fresh noise at each step, and nothing takes away the last of it.

The truth beside it
    Each DDIM sample has its exact trajectory, and the error is the largest distance of any sample,
    at any step, from it. DDPM's root mean square distance to a obeys a recursion, `ddpm_rms`.

Why it matters
    A data set is a mixture of points: its reverse mean is the average of theirs, with weights that
    depend on x_t (experiment 2).

What to look for in figures/
    experiment-1-sample-trajectories-ddim.jpg   DDIM: straight into a; DDPM, from the same
                                                starts: wandering, and at last around a
    experiment-1-distance-vs-time.jpg           each DDIM mark on its curve sqrt(t) |x_1 - a|; DDPM,
                                                root mean square, does not end at 0

Try this
    python point_mass.py --num-steps 1          one step: where does each sampler end?
    python point_mass.py --num-steps 1000       small steps: how much closer does DDPM end?
    python point_mass.py --a-x 10 --a-y -4      far from the base: which sampler ends worse?
    python point_mass.py --sigma-q 4            wider noise: how far from a does DDPM end?
"""

import os
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from functools import partial
from itertools import zip_longest
from pathlib import Path

os.environ["MPLBACKEND"] = "agg"  # figures are files, also from a notebook

import matplotlib.pyplot as plt
import numpy as np

# ------------------------------------------- The data -------------------------------------------
# One point: x_0 = a, always. So x_t = a + N(0, sigma_q^2 t I). Any number of coordinates; the
# command line sets the first two, and the plane of these is drawn.
A = np.array([1.0, 1.0])


def faults(a):
    """What the script cannot do with the point, a line each."""
    try:
        a = np.array(a, float)
    except (TypeError, ValueError):  # words, or a list in a list
        a = np.zeros(0)
    if a.ndim != 1 or len(a) < 2 or not np.isfinite(a).all():
        return ["A: not a point of two or more coordinates"]
    return []


# --------------------------------------- The reverse mean ---------------------------------------


def reverse_mean(x_t, t, dt, *, a):
    """E[x_{t-dt} | x_t] when x_0 = a, exact for any dt.

    Of the noise x_t - a, the last dt brought on average the share dt / t.
    x_t: (..., d), at time t;  0 < dt <= t <= 1;  a: (d,).  Returns the shape of x_t.
    """
    return ((t - dt) / t) * x_t + (dt / t) * a


# ----------------------------------------- The samplers -----------------------------------------
# They know nothing of the data but the function that they are given: reverse_mean(x_t, t, dt).


def ddpm(reverse_mean, x_1, num_steps, sigma_q, rng):
    """Algorithm 1 (DDPM): x_{t-dt} = E[x_{t-dt} | x_t] + N(0, sigma_q^2 dt).

    x_1: draws of the base;  num_steps = 1 / dt.  Yields x_{t-dt} after every step, the last is x_0.
    """
    x_t, dt = x_1, 1 / num_steps
    for k in range(num_steps, 0, -1):  # t = k dt
        noise = rng.standard_normal(x_t.shape)
        x_t = reverse_mean(x_t, k / num_steps, dt) + sigma_q * dt**0.5 * noise
        yield x_t


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


def times(num_steps):
    """t = 1, 1 - dt, ..., 0.  Returns (num_steps + 1,)."""
    return np.arange(num_steps, -1, -1) / num_steps


def ddim_trajectory(x_1, t, *, a):
    """Where DDIM is at the times t, (m,), from x_1, (n, d), for any dt.  Returns (m, n, d)."""
    return a + np.sqrt(t)[:, None, None] * (x_1 - a)


def ddpm_rms(num_steps, sigma_q, *, a):
    """Exact root mean square of |x_t - a| at `times`, when x_1 ~ N(0, sigma_q^2 I), the base.

    A step multiplies x_t - a by (t - dt) / t and adds N(0, sigma_q^2 dt I). The last multiplies by
    0: what is left is its noise, sigma_q sqrt(d dt).  a: (d,).  Returns (num_steps + 1,).
    """
    mean_squares = [a @ a + len(a) * sigma_q**2]
    for k in range(num_steps, 0, -1):  # t = k dt
        noise = len(a) * sigma_q**2 / num_steps
        mean_squares.append(((k - 1) / k) ** 2 * mean_squares[-1] + noise)
    return np.sqrt(mean_squares)


# ------------------------------------------ Measuring -------------------------------------------


def paths(x_1, num_steps, sigma_q, rng, *, a):
    """Runs both samplers from x_1, (n, d).  {sampler: x_t at `times`, (num_steps + 1, n, d)}"""
    mean = partial(reverse_mean, a=a)
    runs = {"DDPM": ddpm(mean, x_1, num_steps, sigma_q, rng), "DDIM": ddim(mean, x_1, num_steps)}
    return {name: np.stack([x_1, *steps]) for name, steps in runs.items()}


def distance(x, y):
    """|x - y|.  x, y: (..., d).  Returns (...)."""
    return np.linalg.norm(x - y, axis=-1)


def root_mean_square(distances):
    """Over samples.  distances: (..., n).  Returns (...)."""
    return (distances**2).mean(axis=-1) ** 0.5


# ----------------------------------------- The figures ------------------------------------------
plt.style.use("default")  # the same figures whatever the reader's matplotlibrc says
BLUE, ORANGE = "#0072B2", "#E69F00"
COLORS = {"DDPM": BLUE, "DDIM": ORANGE}
NUM_DRAWN = 12  # trajectories in a figure


def marks(num_steps):
    """Dots on a line, at most about 50."""
    return {"marker": "o", "ms": 3.5, "markevery": max(1, num_steps // 50)}


def draw_paths(found, a):
    """The plane of the first two coordinates, a panel for each sampler.  found: of paths."""
    fig, axes = plt.subplots(1, 2, figsize=(9.5, 5.3), layout="constrained", sharey=True)
    drawn = {name: x_t[:, :NUM_DRAWN] for name, x_t in found.items()}
    num_steps = len(found["DDIM"]) - 1

    x, y, *_ = drawn["DDPM"].T
    axes[0].plot(x.T, y.T, color=BLUE, lw=0.6, **marks(num_steps))
    x, y, *_ = drawn["DDIM"].T
    axes[1].plot(x.T, y.T, color=ORANGE, ls="", **marks(num_steps))
    x, y, *_ = ddim_trajectory(drawn["DDIM"][0], np.array([1.0, 0.0]), a=a).T
    exact = axes[1].plot(x.T, y.T, "k", lw=0.8)
    exact[0].set_label(r"exact: $a + \sqrt{t}\,(x_1 - a)$")

    places = np.concatenate([*drawn.values()])[..., :2]
    low, high = places.min(axis=(0, 1)), places.max(axis=(0, 1))
    (x, y), side = (low + high) / 2, 0.55 * (high - low).max()
    for ax, (name, x_t) in zip(axes, drawn.items()):
        ax.plot(*x_t[0, :, :2].T, "o", color="0.5", ms=6, label="$x_1$, draws of the base")
        style = {"color": COLORS[name], "ms": 7, "mec": "k"}
        ax.plot(*x_t[-1, :, :2].T, "o", **style, label=f"$x_0$, {name}")
        ax.plot(*a[:2], "*", color="none", ms=20, mec="k", mew=1.5, label="$a$, all of the data")
        ax.set(xlabel="$x$", title=f"{name}, steps: {num_steps}", aspect="equal")
        ax.set(xlim=(x - side, x + side), ylim=(y - side, y + side))
        ax.legend()
    axes[0].set_ylabel("$y$")
    return fig


def draw_distances(found, rms, a):
    """|x_t - a| against t, a panel for each sampler.  found: of paths;  rms: of ddpm_rms."""
    fig, axes = plt.subplots(1, 2, figsize=(9.5, 4.6), layout="constrained", sharey=True)
    num_steps = len(rms) - 1
    t, fine = times(num_steps), np.linspace(1, 0, 200)
    dots = {"ls": "", **marks(num_steps)}

    r_t = distance(found["DDPM"], a)
    axes[0].plot(t, r_t[:, :NUM_DRAWN], color="0.8", lw=0.7)[0].set_label("samples")
    axes[0].plot(t, root_mean_square(r_t), color=BLUE, **dots, label="root mean square of all")
    axes[0].plot(t, rms, "k", lw=0.8, label="exact root mean square")

    x_t = found["DDIM"][:, :NUM_DRAWN]
    exact = distance(ddim_trajectory(x_t[0], fine, a=a), a)
    axes[1].plot(t, distance(x_t, a), color=ORANGE, **dots)[0].set_label("samples")
    axes[1].plot(fine, exact, "k", lw=0.8)[0].set_label(r"exact: $\sqrt{t}\,|x_1 - a|$")

    axes[0].set_ylabel("$|x_t - a|$")
    for ax, name in zip(axes, found):
        ax.set(xlabel="$t$", title=f"{name}, steps: {num_steps}")
        ax.invert_xaxis()
        ax.legend(loc="upper right")
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
    wrong = faults(A)
    x, y = (1.0, 1.0) if wrong else map(float, A[:2])
    args = options(
        argv,
        *wrong,
        num_steps=(20, 1, 1000, "steps of a sampler, 1 / dt"),
        num_samples=(2000, 1, 10_000, "samples of each sampler"),
        a_x=(x, -100.0, 100.0, "the data's point, x"),
        a_y=(y, -100.0, 100.0, "the data's point, y"),
        sigma_q=(1.0, 0.1, 100.0, "std of the noise at t = 1, and of the base"),
        seed=(0, 0, 10**6, "seed of every draw"),
    )
    rng = np.random.default_rng(args.seed)
    a = np.array([args.a_x, args.a_y, *A[2:]])

    x_1 = args.sigma_q * rng.standard_normal((args.num_samples, len(a)))
    found = paths(x_1, args.num_steps, args.sigma_q, rng, a=a)
    exact = ddpm_rms(args.num_steps, args.sigma_q, a=a)
    error = distance(found["DDIM"], ddim_trajectory(x_1, times(args.num_steps), a=a)).max()
    rms = root_mean_square(distance(found["DDPM"][-1], a))
    # |x_0 - a|^2 is chi-squared, d degrees of freedom: its std is its mean times sqrt(2 / d).
    rms_se = exact[-1] / (2 * len(a) * args.num_samples) ** 0.5

    for name, figure in {
        "sample-trajectories-ddim": draw_paths(found, a),
        "distance-vs-time": draw_distances(found, exact, a),
    }.items():
        figure.savefig(args.figures_dir / f"experiment-1-{name}.jpg", dpi=120)
    point = ", ".join(f"{number:g}" for number in a[:2]) + ", ..." * (len(a) > 2)
    print(f"data a = ({point}), base N(0, {args.sigma_q:g}^2 I), dimensions: {len(a)},", end=" ")
    print(f"samples of each sampler: {args.num_samples}, steps: {args.num_steps}")
    rows = [
        ["", "measured", "s.e.", "exact"],
        ["DDPM: |x_0 - a|, root mean square", f"{rms:.4f}", f"{rms_se:.4f}", f"{exact[-1]:.4f}"],
        ["DDIM: |x_t - a - sqrt(t) (x_1 - a)|, largest", f"{error:.2g}", "", "0"],
    ]
    table(rows)
    print(f"figures: {args.figures_dir}")


if __name__ == "__main__":
    main()
