"""Experiment 1: DDIM runs straight to a point mass, and lands on it in any number of steps.

The claim
    If all the data is one point, x_0 = a in the plane, then x_t is on a Brownian bridge and
        E[x_{t-dt} | x_t] = ((t - dt) / t) x_t + (dt / t) a.
    Put this into Algorithm 2, where lam = sqrt(t) / (sqrt(t - dt) + sqrt(t)). A step multiplies
    x_t - a by 1 - lam dt / t = sqrt(t - dt) / sqrt(t), because
        dt = (sqrt(t) - sqrt(t - dt)) (sqrt(t) + sqrt(t - dt)).
    So DDIM moves on the straight line from x_1 to a, is at distance sqrt(t) |x_1 - a| from a at
    time t, and is at a when t = 0: exactly, in any number of steps, one included.
    DDPM adds fresh noise at each step, and nothing removes the last of it, sigma_q sqrt(dt) in each
    direction. Its mean square distance to a follows an exact recursion: `ddpm_mean_square`.

Why it matters
    Any distribution is a mixture of points. Its reverse mean is the average of what is here, with
    weights that depend on x_t (experiment 2): every curved path is an average of straight ones.

What to look for in figures/
    experiment-1-sample-trajectories-ddim.jpg   straight lines into a; the marks, one for each step,
                                                lie closer together where the distance falls slowly
    experiment-1-distance-vs-time.jpg           each DDIM mark on its curve, sqrt(t) |x_1 - a|; DDPM
                                                on its law, which ends at sigma_q sqrt(2 dt), not 0

Run
    python point_mass.py

Try this
    python point_mass.py --num-steps 1       one step: DDIM is exact already
    python point_mass.py --a 10 -4           the point is far away
    python point_mass.py --num-steps 1000    small steps: DDPM's last noise is small too
"""

import argparse
import io
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from tqdm import tqdm

# ------------------------------------------- The data -------------------------------------------
# One point: x_0 = a, always. So x_t = a + N(0, sigma_q^2 t I).


# --------------------------------------- The reverse mean ---------------------------------------
# Between x_0 = a and x_t lies a Brownian bridge: (x_{t-dt}, x_t) is jointly Gaussian around a, with
# variances sigma_q^2 (t - dt) and sigma_q^2 t, and a covariance equal to the first. Linear
# regression gives E[x_{t-dt} | x_t] = a + ((t - dt) / t) (x_t - a): sigma_q cancels.


def reverse_mean(x_t, t, dt, *, a):
    """E[x_{t-dt} | x_t] when x_0 = a; exact for every dt.

    x_t: (..., d) points at time t;  0 < dt <= t <= 1;  a: (d,).  Returns the shape of x_t.
    """
    return ((t - dt) / t) * x_t + (dt / t) * a


# ----------------------------------------- The samplers -----------------------------------------
# They know nothing of the data but the function that they are given: reverse_mean(x_t, t, dt).


def ddpm(reverse_mean, x_1, num_steps, sigma_q, rng):
    """Algorithm 1 (DDPM): x_{t-dt} = E[x_{t-dt} | x_t] + N(0, sigma_q^2 dt).

    reverse_mean(x_t, t, dt) -> like x_t;  x_1: draws of the base;  rng: a NumPy Generator.
    num_steps = 1 / dt >= 1 (0: ZeroDivisionError).
    Yields num_steps arrays like x_1, the last of them x_0.
    """
    x_t, dt = x_1, 1 / num_steps
    for k in range(num_steps, 0, -1):  # t = k dt
        noise = rng.standard_normal(x_t.shape)
        x_t = reverse_mean(x_t, k / num_steps, dt) + sigma_q * dt**0.5 * noise
        yield x_t


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
# Where the samplers must be, computed without sampling. DDIM's step multiplies x_t - a by
# sqrt(t - dt) / sqrt(t); from 1 to t these factors multiply to sqrt(t), whatever the steps.


def ddim_distance(distance_1, t):
    """|x_t - a| on a DDIM trajectory that started at |x_1 - a| = distance_1: exact for every dt."""
    return distance_1 * np.sqrt(t)


def ddpm_mean_square(num_steps, mean_square_1, sigma_q, d=2):
    """E|x_t - a|^2 of DDPM at t = 1, 1 - dt, ..., 0, given its value at t = 1: exact for every dt.

    A step scales x_t - a by (t - dt) / t and adds N(0, sigma_q^2 dt I) in d dimensions.
    Returns (num_steps + 1,); the last is d sigma_q^2 dt, the noise of the last step.
    """
    mean_squares = [mean_square_1]
    for k in range(num_steps, 0, -1):  # t = k dt
        scale = (k - 1) / k
        mean_squares.append(scale**2 * mean_squares[-1] + d * sigma_q**2 / num_steps)
    return np.array(mean_squares)


# ------------------------------------------- Measuring ------------------------------------------
NUM_DRAWN = 40  # trajectories kept whole, for the figures; of the others a few numbers a step


def times(num_steps):
    """t = 1, 1 - dt, ..., 0.  Returns (num_steps + 1,)."""
    return np.arange(num_steps, -1, -1) / num_steps


def distance_from_line(x_t, x_1, a):
    """Distance of each x_t from the straight line through its start x_1 and a.  Returns (n,)."""
    (ux, uy), (vx, vy) = (x_t - a).T, (x_1 - a).T
    return np.abs(ux * vy - uy * vx) / np.hypot(vx, vy)


def measure_ddim(x_1, num_steps, *, a):
    """Runs DDIM from x_1, (n, 2), and holds every step to the claim.

    Returns the first trajectories, (num_steps + 1, NUM_DRAWN, 2), and the largest departures over
    all samples and steps: {"line": from the straight line to a, "law": from sqrt(t) |x_1 - a|,
    "end": from a at t = 0}.
    """
    distance_1 = np.linalg.norm(x_1 - a, axis=1)
    steps = ddim(partial(reverse_mean, a=a), x_1, num_steps)
    paths = [x_1[:NUM_DRAWN]]
    off_line = []
    off_law = []
    for t, x_t in zip(times(num_steps)[1:], tqdm(steps, "DDIM", num_steps, disable=None)):
        distance = np.linalg.norm(x_t - a, axis=1)
        off_line.append(distance_from_line(x_t, x_1, a).max())
        off_law.append(np.abs(distance - ddim_distance(distance_1, t)).max())
        paths.append(x_t[:NUM_DRAWN].copy())  # a copy, so that the rest of x_t is freed
    largest = {"line": max(off_line), "law": max(off_law), "end": distance.max()}
    return np.array(paths), largest


def measure_ddpm(x_1, num_steps, sigma_q, rng, *, a):
    """Runs DDPM from x_1, (n, 2).  Returns the first trajectories, as above, and its distances.

    The distances are {"rms": root mean square of |x_t - a|, "rms_se": its standard error, "exact":
    by ddpm_mean_square from the same starts}, (num_steps + 1,) each, at t = 1, 1 - dt, ..., 0.
    """
    steps = ddpm(partial(reverse_mean, a=a), x_1, num_steps, sigma_q, rng)
    paths = [x_1[:NUM_DRAWN]]
    squares = ((x_1 - a) ** 2).sum(axis=1)
    means = [squares.mean()]
    stds = [squares.std()]
    for x_t in tqdm(steps, "DDPM", num_steps, disable=None):
        squares = ((x_t - a) ** 2).sum(axis=1)
        means.append(squares.mean())
        stds.append(squares.std())
        paths.append(x_t[:NUM_DRAWN].copy())
    rms = np.sqrt(means)
    # The relative error of a root is half that of its square.
    rms_se = np.array(stds) / len(x_1) ** 0.5 / (2 * rms)
    exact = ddpm_mean_square(num_steps, means[0], sigma_q) ** 0.5
    return np.array(paths), {"rms": rms, "rms_se": rms_se, "exact": exact}


# ------------------------------------------- Printing -------------------------------------------


def report(largest, distances, args):
    """largest: of measure_ddim;  distances: of measure_ddpm."""
    print(f"data ({args.a[0]:g}, {args.a[1]:g}), sigma_q = {args.sigma_q:g}:", end=" ")
    print(f"{args.num_samples} samples, {args.num_steps} steps")
    print(f"DDIM  largest distance from a straight line    {largest['line']:8.2g}   exact: 0")
    print(f"DDIM  largest distance from sqrt(t) |x_1 - a|  {largest['law']:8.2g}   exact: 0")
    print(f"DDIM  largest distance from a at t = 0         {largest['end']:8.2g}   exact: 0")
    print("DDPM  root mean square of |x_t - a|")
    for k in np.unique(np.linspace(0, args.num_steps, 5).round().astype(int)):
        rms, rms_se, exact = (distances[name][k] for name in ("rms", "rms_se", "exact"))
        t = times(args.num_steps)[k]
        print(f"      t = {t:.3f}:   sampled {rms:8.4f} +- {rms_se:.4f}   exact {exact:8.4f}")


# ------------------------------------------ The figures -----------------------------------------
plt.switch_backend("agg")  # the figures are files: no window
plt.rcParams.update({"font.size": 12, "axes.titlesize": 12})


def draw_paths(paths, a):
    """DDIM's trajectories in the plane.  paths: (num_steps + 1, n, 2)."""
    num_steps = len(paths) - 1
    fig, ax = plt.subplots(figsize=(6, 6), layout="constrained")
    style = {"color": "C0", "ms": 3, "lw": 0.7, "alpha": 0.7, "markevery": max(1, num_steps // 50)}
    ax.plot(paths[..., 0], paths[..., 1], "o-", **style)
    ax.plot(*paths[0].T, "o", color="0.3", ms=5, label=r"$x_1$, drawn from $N(0, \sigma_q^2 I)$")
    ax.plot([], [], "o-", color="C0", ms=3, lw=0.7, label=f"DDIM, num_steps = {num_steps}, marked")
    ax.plot(*a, "*", color="C1", ms=20, mec="k", label="$a$, all of the data")
    ax.set(xlabel="$x$", ylabel="$y$", aspect="equal", title="DDIM runs straight to a point mass")
    ax.legend(fontsize=10, loc="upper left", bbox_to_anchor=(0, -0.12))
    return fig


def draw_distances(ddim_paths, ddpm_paths, ddpm_distances, a, num_starts=12):
    """Distance to a against t.

    *_paths: (num_steps + 1, n, 2), the first num_starts drawn;  ddpm_distances: of measure_ddpm.
    """
    fig, (top, bottom) = plt.subplots(2, 1, figsize=(6, 8), layout="constrained", sharex=True)
    t = times(len(ddim_paths) - 1)
    every = max(1, len(t) // 50)
    distance = np.linalg.norm(ddim_paths[:, :num_starts] - a, axis=2)
    fine = np.linspace(0, 1, 400)
    top.plot(fine, ddim_distance(distance[0], fine[:, None]), "k", lw=0.8)
    top.plot(t, distance, "o", color="C0", ms=4, markevery=every)
    top.plot([], [], "o", color="C0", ms=4, label=f"DDIM, {num_starts} starts")
    top.plot([], [], "k", lw=0.8, label=r"exact: $\sqrt{t}\,\|x_1 - a\|$")
    top.set(ylabel=r"$\|x_t - a\|$", title=r"DDIM: every start follows its $\sqrt{t}$ law to 0")

    rms, exact = ddpm_distances["rms"], ddpm_distances["exact"]
    bottom.plot(t, np.linalg.norm(ddpm_paths[:, :num_starts] - a, axis=2), color="0.75", lw=0.7)
    bottom.plot([], [], color="0.75", lw=0.7, label="DDPM, the same starts")
    bottom.plot(
        t, rms, "o", color="C1", ms=5, markevery=every, label="root mean square, all samples"
    )
    bottom.plot(t, exact, "k", lw=1, label="exact root mean square")
    bottom.set(xlabel="$t$ (sampling runs from right to left)", ylabel=r"$\|x_t - a\|$")
    last_noise = rf"$\sigma_q\sqrt{{2\Delta t}}$ = {exact[-1]:.2g}"
    bottom.set_title(f"DDPM: its last noise stays, {last_noise}")
    for ax in (top, bottom):
        ax.legend(fontsize=10, loc="upper left")
        ax.set_ylim(0, 1.3 * ax.get_ylim()[1])
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
    add("--num-steps", type=number(int, 1, 10_000), default=20, help="steps of a sampler, 1/dt")
    add("--num-samples", type=number(int, 1, 10**6), default=10_000, help="samples per sampler")
    add("--a", type=number(float, -100, 100), nargs=2, default=[1.0, 1.0], help="the data's point")
    add("--sigma-q", type=number(float, 0.1, 100), default=1.0, help="std of the noise at t = 1")
    add("--seed", type=number(int, 0, 2**63 - 1), default=0, help="seed of every draw")
    add("--figures-dir", type=Path, default=Path(__file__).parent / "figures", help="their folder")
    args = parser.parse_args(argv)
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
    a = np.array(args.a)

    x_1 = args.sigma_q * rng.standard_normal((args.num_samples, 2))
    ddpm_paths, distances = measure_ddpm(x_1, args.num_steps, args.sigma_q, rng, a=a)
    ddim_paths, largest = measure_ddim(x_1, args.num_steps, a=a)

    report(largest, distances, args)

    folder = args.figures_dir
    save(draw_paths(ddim_paths, a), folder / "experiment-1-sample-trajectories-ddim.jpg")
    figure = draw_distances(ddim_paths, ddpm_paths, distances, a)
    save(figure, folder / "experiment-1-distance-vs-time.jpg")


if __name__ == "__main__":
    main()
