"""Experiment 1: DDIM runs straight to a point mass, and lands on it in any number of steps.

Claim. If all the data is one point, x_0 = a in R^2, then (Brownian bridge)
    E[x_{t-dt} | x_t] = ((t - dt) / t) x_t + (dt / t) a.
Put into Algorithm 2, each step multiplies x_t - a by
    1 - lam dt / t = sqrt(t - dt) / sqrt(t),      lam = sqrt(t) / (sqrt(t - dt) + sqrt(t)),
because dt = (sqrt(t) - sqrt(t - dt)) (sqrt(t) + sqrt(t - dt)). So DDIM moves along the straight line
from x_1 to a, is at distance sqrt(t) |x_1 - a| from it at time t, and at a when t = 0: exactly, even in
one step. DDPM gets there with fresh noise at each step, and its last noise, sigma_q sqrt(dt), stays;
its mean-square distance follows an exact law too (`ddpm_mean_square`).

What to look for in figures/:
  experiment-1-sample-trajectories-ddim.jpg   straight lines into a; the marks, one a step, are not
                                              evenly spaced: the distance falls as sqrt(t)
  experiment-1-distance-vs-time.jpg           every DDIM mark on its sqrt(t) curve; DDPM's root mean
                                              square on its law, ending at sigma_q sqrt(2 dt), not at 0

Run:  python point_mass.py        (python point_mass.py --help lists what can be changed)
"""

import argparse
import contextlib
import io
import itertools
import os
import re
import signal
import sys
import tempfile
from functools import partial
from pathlib import Path

if __name__ == "__main__":  # set before the slow imports: Ctrl-C is one line and status 130, always
    signal.signal(signal.SIGINT, lambda *_: (os.write(2, b"interrupted\n"), os._exit(130)))

import matplotlib.pyplot as plt
import numpy as np
from tqdm import tqdm


# ---------------------------------------- The reverse mean ----------------------------------------
def reverse_mean(x_t, t, dt, *, a):
    """E[x_{t-dt} | x_t] when x_0 = a; exact for every dt.

    x_t: (..., d) points at time t;  0 < dt <= t <= 1;  a: (d,).  Returns the shape of x_t.
    """
    return ((t - dt) / t) * x_t + (dt / t) * a

# ------------------------------------------ The samplers ------------------------------------------
def ddim(reverse_mean, x_1, num_steps):
    """Algorithm 2 (DDIM): x_{t-dt} = x_t + lam (E[x_{t-dt} | x_t] - x_t), lam = sigma_t / (sigma_{t-dt} + sigma_t).

    reverse_mean(x_t, t, dt) -> like x_t;  x_1: draws of the base;  num_steps = 1 / dt >= 1 (0: ZeroDivisionError).
    Yields num_steps arrays like x_1, the last of them x_0.  As sigma_t = sigma_q sqrt(t), sigma_q cancels in lam.
    """
    x_t, dt = x_1, 1 / num_steps
    for k in range(num_steps, 0, -1):  # t = k dt
        lam = k**0.5 / ((k - 1) ** 0.5 + k**0.5)
        x_t = x_t + lam * (reverse_mean(x_t, k / num_steps, dt) - x_t)
        yield x_t

def ddpm(reverse_mean, x_1, num_steps, sigma_q, rng):
    """Algorithm 1 (DDPM): x_{t-dt} = E[x_{t-dt} | x_t] + N(0, sigma_q^2 dt).

    reverse_mean(x_t, t, dt) -> like x_t;  x_1: draws of the base;  num_steps = 1 / dt >= 1 (0: ZeroDivisionError);
    rng: a NumPy Generator.  Yields num_steps arrays like x_1, the last of them x_0.
    """
    x_t, dt = x_1, 1 / num_steps
    for k in range(num_steps, 0, -1):  # t = k dt
        noise = rng.standard_normal(x_t.shape)
        x_t = reverse_mean(x_t, k / num_steps, dt) + sigma_q * dt**0.5 * noise
        yield x_t

# ------------------- The check. Where the samplers must be, without sampling. ---------------------
def ddim_distance(distance_1, t):
    """|x_t - a| along a DDIM trajectory that started at distance |x_1 - a| = distance_1: exact, any dt."""
    return distance_1 * np.sqrt(t)

def ddpm_mean_square(num_steps, mean_square_1, sigma_q, d=2):
    """E|x_t - a|^2 for DDPM at t = 1, 1 - dt, ..., 0, given its value at t = 1: exact, any dt.

    A step scales x_t - a by (t - dt) / t and adds N(0, sigma_q^2 dt I) in d dimensions.
    Returns num_steps + 1 values; the last is d sigma_q^2 dt, the noise of the last step.
    """
    mean_squares = [mean_square_1]
    for k in range(num_steps, 0, -1):
        mean_squares.append(((k - 1) / k) ** 2 * mean_squares[-1] + d * sigma_q**2 / num_steps)
    return np.array(mean_squares)

def departure_from_line(x_t, x_1, a):
    """Distance of each x_t from the straight line through its start x_1 and a.  All (n, 2) or (2,); returns (n,)."""
    (ux, uy), (vx, vy) = (x_t - a).T, (x_1 - a).T
    return np.abs(ux * vy - uy * vx) / np.maximum(np.hypot(vx, vy), np.finfo(float).tiny)

# ------------------------------------------ The figures -------------------------------------------
def plot_trajectories(trajectories, a, num_steps):
    """trajectories: (num_steps + 1, n, 2)."""
    fig, ax = plt.subplots(figsize=(6, 6), layout="constrained")
    style = {"color": "C0", "ms": 3, "lw": 0.7, "alpha": 0.7, "markevery": max(1, num_steps // 50)}
    ax.plot(trajectories[..., 0], trajectories[..., 1], "o-", **style)
    ax.plot(*trajectories[0].T, "o", color="0.3", ms=5, label="$x_1$, drawn from $N(0, \\sigma_q^2 I)$")
    ax.plot([], [], "o-", color="C0", ms=3, lw=0.7, label=f"DDIM, {num_steps} step{'s' * (num_steps > 1)}, each marked")
    ax.plot(*a, "*", color="C1", ms=20, mec="k", label="$a$, all of the data")
    ax.set(xlabel="$x$", ylabel="$y$", aspect="equal", title="DDIM runs straight to a point mass")
    ax.legend(fontsize=10, loc="upper left", bbox_to_anchor=(0, -0.12))
    return fig

def plot_distances(t, ddim_distances, ddpm_distances, ddpm_rms, exact_rms):
    """t: (num_steps + 1,);  *_distances: (num_steps + 1, n drawn);  *_rms: (num_steps + 1,)."""
    fig, (top, bottom) = plt.subplots(2, 1, figsize=(6, 8), layout="constrained", sharex=True)
    fine, every = np.linspace(0, 1, 400), max(1, len(t) // 50)
    top.plot(fine, np.sqrt(fine)[:, None] * ddim_distances[0], "k", lw=0.8)
    top.plot(t, ddim_distances, "o", color="C0", ms=4, markevery=every)
    top.plot([], [], "o", color="C0", ms=4, label="DDIM, one curve a start")
    top.plot([], [], "k", lw=0.8, label=r"exact: $\sqrt{t}\,\|x_1 - a\|$")
    top.set(ylabel=r"$\|x_t - a\|$", title=r"DDIM: every start follows its $\sqrt{t}$ law to 0")
    bottom.plot(t, ddpm_distances, color="0.75", lw=0.7)
    bottom.plot([], [], color="0.75", lw=0.7, label="DDPM, the same starts")
    bottom.plot(t, ddpm_rms, "o", color="C1", ms=5, markevery=every, label="root mean square, all samples")
    bottom.plot(t, exact_rms, "k", lw=1, label="exact root mean square")
    bottom.set(xlabel="$t$ (sampling runs from right to left)", ylabel=r"$\|x_t - a\|$")
    bottom.set_title(rf"DDPM: its last noise stays, $\sigma_q\sqrt{{2\Delta t}}$ = {exact_rms[-1]:.2g}")
    for ax in (top, bottom):
        ax.legend(fontsize=10, loc="upper left")
        ax.set_ylim(0, 1.3 * ax.get_ylim()[1])
    return fig

# ---------------------------------------- The command line ----------------------------------------
def write_whole(path, data):
    """Writes bytes beside `path`, and moves that file into place only once it is complete."""
    part = path.with_name(f".part-{path.name}")
    try:
        part.write_bytes(data)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    print(f"wrote {path}")

def between(kind, low, high):
    """An argparse type: an int or a float in [low, high]; NaN and infinity are in no such range."""

    def parse(text):
        with contextlib.suppress(ValueError):
            if low <= kind(text) <= high:
                return kind(text)
        name = {int: "a whole number", float: "a number"}[kind]
        raise argparse.ArgumentTypeError(f"takes {name} from {low} to {high}, not {text!r}")

    return parse

def point(text):
    """An argparse type: X,Y with both coordinates in [-1e6, 1e6]."""
    with contextlib.suppress(ValueError, argparse.ArgumentTypeError):
        x, y = (between(float, -1e6, 1e6)(number) for number in text.split(","))
        return np.array([x, y])
    raise argparse.ArgumentTypeError(f"takes X,Y, two numbers from -1000000.0 to 1000000.0, not {text!r}")

def parse_arguments(argv):
    parser = argparse.ArgumentParser(
        description="DDIM trajectories to a point mass in the plane, beside the exact law of their distance.",
        epilog="what happens if ...\n"
        "  one step is taken?          python point_mass.py --num-steps 1\n"
        "  the point is far away?      python point_mass.py --a 10,-4\n"
        "  DDPM takes smaller steps?   python point_mass.py --num-steps 1000",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {' '.join(message.split())}\n")  # one line, no usage
    parser._negative_number_matcher = re.compile(r"-[^-h]")  # -1,2 is a value, not an option

    def add(name, kind, default, text, metavar="X"):
        parser.add_argument(name, type=kind, default=default, metavar=metavar, help=f"{text} (default: %(default)s)")

    add("--num-steps", between(int, 1, 10_000), 20, "number of steps, 1/dt")
    add("--num-samples", between(int, 1, 10**6), 10_000, "number of samples; the first 40 are drawn")
    add("--a", point, "1,1", "a, the point that is all of the data", "X,Y")
    add("--sigma-q", between(float, 1e-6, 1e6), 1.0, "sigma_q, standard deviation of the noise at t = 1")
    add("--seed", between(int, 0, 2**63 - 1), 0, "seed of every draw")
    folder = Path(__file__).parent / "figures"
    text = "folder the figures go to (default: figures, beside the script)"
    parser.add_argument("--figures-dir", type=Path, default=folder, metavar="DIR", help=text)
    parser.add_argument("--show", action="store_true", help="open the figures in windows as well")
    args = parser.parse_args(argv)
    if not args.show:
        plt.switch_backend("agg")
    elif plt.get_backend().lower() == "agg":
        parser.error("argument --show: there is no display to open windows on")
    try:
        args.figures_dir.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=args.figures_dir).close()
    except OSError as error:
        parser.error(f"argument --figures-dir: takes a folder to write to, not '{args.figures_dir}' ({error.strerror})")
    return args

def run(args):
    rng = np.random.default_rng(args.seed)
    a, drawn = args.a, 40
    x_1 = args.sigma_q * rng.standard_normal((args.num_samples, 2))
    mean = partial(reverse_mean, a=a)
    runs = {"DDIM": ddim(mean, x_1, args.num_steps), "DDPM": ddpm(mean, x_1, args.num_steps, args.sigma_q, rng)}
    t = np.arange(args.num_steps, -1, -1) / args.num_steps

    # Of every step: all of the few samples that are drawn, and a few numbers about the rest.
    trajectories, squares, bends, off_law = {"DDIM": [], "DDPM": []}, [], [], []
    distance_1 = np.linalg.norm(x_1 - a, axis=1)
    for name, steps in runs.items():
        progress = tqdm(steps, desc=name, total=args.num_steps, disable=None)
        for t_k, x_t in zip(t, itertools.chain([x_1], progress)):
            distance = np.linalg.norm(x_t - a, axis=1)
            trajectories[name].append(x_t[:drawn].copy())
            if name == "DDIM":
                bends.append(departure_from_line(x_t, x_1, a).max())
                off_law.append(np.abs(distance - ddim_distance(distance_1, t_k)).max())
            else:
                squares.append([(distance**2).mean(), (distance**2).std() / args.num_samples**0.5])
    exact_rms = ddpm_mean_square(args.num_steps, (distance_1**2).mean(), args.sigma_q) ** 0.5
    mean_square, standard_error = np.array(squares).T
    ddpm_rms = np.sqrt(mean_square)

    print(f"{args.num_samples} samples, {args.num_steps} steps, sigma_q {args.sigma_q:g}, a = ({a[0]:g}, {a[1]:g})")
    print(f"DDIM  largest departure from a straight line   {max(bends):8.2g}   exact: 0")
    print(f"DDIM  largest departure from sqrt(t) |x_1 - a| {max(off_law):8.2g}   exact: 0")
    print(f"DDIM  largest distance to a at t = 0           {off_law[-1]:8.2g}   exact: 0")
    print("DDPM  root mean square of |x_t - a|, at")
    for k in np.unique(np.linspace(0, args.num_steps, 5).round().astype(int)):
        error = standard_error[k] / (2 * ddpm_rms[k])  # of the root: half the relative error of the square
        print(f"      t = {t[k]:.3f}:   sampled {ddpm_rms[k]:10.5g} +- {error:<8.2g}   exact {exact_rms[k]:10.5g}")

    plt.rcParams.update({"font.size": 12, "axes.titlesize": 12})
    trajectories = {name: np.array(x) for name, x in trajectories.items()}
    distances = {name: np.linalg.norm(x[:, :12] - a, axis=2) for name, x in trajectories.items()}
    figures = {
        "experiment-1-sample-trajectories-ddim.jpg": plot_trajectories(trajectories["DDIM"], a, args.num_steps),
        "experiment-1-distance-vs-time.jpg": plot_distances(
            t, distances["DDIM"], distances["DDPM"], ddpm_rms, exact_rms
        ),
    }
    for name, fig in figures.items():
        buffer = io.BytesIO()  # not the file itself: a full disk would go unnoticed
        fig.savefig(buffer, format="jpg", dpi=120)
        write_whole(args.figures_dir / name, buffer.getvalue())
    if args.show:
        plt.show()
    plt.close("all")

def main(argv=None):
    """Sample, hold the samples against their law, write the figures.  Exits with 2 on bad input, 1 on a full disk."""
    args = parse_arguments(argv)
    try:
        run(args)
    except OSError as error:
        print(f"{Path(__file__).name}: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":  # from here on, Ctrl-C also removes what is half written; a second one changes nothing
    ignore = partial(signal.signal, signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGINT, lambda *_: (ignore(), os.write(2, b"interrupted\n"), sys.exit(130)))
    main()
