"""Experiment 2: with two points of data, DDIM runs to one or the other, and Bayes' rule says to which.

Claim. If x_0 is a_i with probability w_i, the reverse mean is that of a point mass, averaged over which
point it was:
    E[x_{t-dt} | x_t] = sum_i p(x_0 = a_i | x_t) ( ((t - dt) / t) x_t + (dt / t) a_i ),
    p(x_0 = a_i | x_t)  proportional to  w_i exp(-|x_t - a_i|^2 / (2 sigma_q^2 t))      (Bayes' rule).
DDIM with small steps follows the probability-flow ODE, dx/dsigma = (x - E[x_0 | x_t]) / sigma. It decides
by where x_1 lies: the ODE maps x_1 to a_1 on one side of a line perpendicular to a_2 - a_1 and to a_2 on
the other. Along a_2 - a_1 the ODE carries p_1 to p_0 and keeps order, so that line is the w_1-quantile of
p_1 in that direction (`exact_share`). From the true p_1 the shares are then the weights. From
N(0, sigma_q^2 I), which is not p_1, they are not, unless symmetry makes them so: the table shows both.

What to look for in figures/:
  experiment-2-sample-trajectories-ddim.jpg   the shade is p(x_0 = a_i | x_1 = x); with equal weights, no trajectory
                                              crosses the line where it is 1/2
  experiment-2-error-vs-steps.jpg             distance to the ODE's solution: slope -1 along the way; at t = 0 all
                                              that counts is which point was reached

Run:  python two_points.py        (python two_points.py --help lists what can be changed)
"""

import argparse
import contextlib
import io
import math
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
from matplotlib.colors import to_rgb
from tqdm import tqdm


# --------------------------------- The posterior and the reverse mean ---------------------------------
def posterior(x_t, t, *, points, weights, sigma_q):
    """p(x_0 = a_i | x_t) by Bayes' rule, for every sample and every point.

    x_t: (n, d) points at time t > 0;  points: (k, d);  weights: (k,), sum to 1, zeros allowed.
    Returns (n, k), rows that sum to 1.  Odds are taken against the likeliest point, so nothing overflows;
    they are right to 1e-12.
    """
    variance = sigma_q**2 * t
    with np.errstate(divide="ignore"):  # a weight of 0 has log -inf and odds 0
        log_weights = np.log(weights)[:, None]
    squared_distances = sum((x - a[:, None]) ** 2 for x, a in zip(x_t.T, points.T))  # (k, n)
    log_odds = log_weights - 0.5 / variance * squared_distances  # but for a term that all i share
    largest = log_odds.max(axis=0)
    far = largest < -500  # 31 sigma_t from every point: the differences of such squares lose digits
    if far.any():
        log_odds[:, far] = far_log_odds(x_t[far], log_odds[:, far].argmax(axis=0), points, log_weights, variance)
        largest = log_odds.max(axis=0)
    odds = np.exp(log_odds - largest)
    return (odds / odds.sum(axis=0)).T

def far_log_odds(x_t, likeliest, points, log_weights, variance):
    """log_odds of `posterior`, (k, n), with no digits lost, from a guess of the likeliest point a_r, (n,).

    |x - a_r|^2 - |x - a_i|^2 = 2 (a_i - a_r) . (x - (a_i + a_r) / 2): no difference of large squares.
    """
    for _ in range(2):  # between far points rounded squares may have guessed wrongly: then the odds guess again
        a_r, dots = points[likeliest].T, 0.0
        for x, r, a in zip(x_t.T, a_r, points.T):
            dots = dots + (a[:, None] - r) * (x - (a[:, None] + r) / 2)  # (k, n)
        log_odds = dots / variance + log_weights
        likeliest = log_odds.argmax(axis=0)
    return log_odds

def reverse_mean(x_t, t, dt, *, points, weights, sigma_q):
    """E[x_{t-dt} | x_t] when x_0 is points[i] with probability weights[i]; exact for every dt.

    x_t: (n, d) points at time t;  0 < dt <= t <= 1;  points: (k, d);  weights: (k,).  Returns (n, d).
    """
    mean_x_0 = posterior(x_t, t, points=points, weights=weights, sigma_q=sigma_q) @ points
    return ((t - dt) / t) * x_t + (dt / t) * mean_x_0

# ------------------------------------------ The sampler -------------------------------------------
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

# ------------------------------------------- The check --------------------------------------------
def draw_p_1(n, rng, *, points, weights, sigma_q):
    """n draws from the true p_1, that is x_0 + N(0, sigma_q^2 I).  Returns (n, d)."""
    x_0 = points[rng.choice(len(points), size=n, p=weights)]
    return x_0 + sigma_q * rng.standard_normal(x_0.shape)

def log_tail(z):
    """log P(N(0, 1) > z), a float; where the tail itself would underflow, from its asymptotic series."""
    if z < 30:
        return math.log(math.erfc(z / 2**0.5) / 2)
    return -(z**2) / 2 - math.log(z * (2 * math.pi) ** 0.5) - 1 / z**2 + 2.5 / z**4

def exact_share(points, weights, sigma_q):
    """Share of N(0, sigma_q^2 I) that the probability-flow ODE carries to the first of two points.

    points: (2, d), different;  weights: (2,).  With u the coordinate along a_2 - a_1, the ODE parts p_1 at
    its w_1-quantile s, where w_1 P(u > s | a_1) = w_2 P(u < s | a_2); found by bisection.
    """
    axis = (points[1] - points[0]) / np.linalg.norm(points[1] - points[0])
    u_1, u_2 = points @ axis
    low, high = u_1 - 40 * sigma_q, u_2 + 40 * sigma_q
    with np.errstate(divide="ignore"):  # a weight of 0 has log -inf
        log_odds = np.log(weights[1]) - np.log(weights[0])
    for _ in range(200):
        s = (low + high) / 2
        past = log_odds + log_tail((u_2 - s) / sigma_q) > log_tail((s - u_1) / sigma_q)
        low, high = (low, s) if past else (s, high)
    return math.erfc(-s / sigma_q / 2**0.5) / 2

def reached(x_0, points):
    """Index of the point nearest to each x_0.  x_0: (n, d);  points: (k, d).  Returns (n,)."""
    return np.argmin([np.sum((x_0 - a) ** 2, axis=1) for a in points], axis=0)

def errors_vs_steps(mean, x_1, step_counts, reference_steps):
    """Distance of DDIM from the probability-flow ODE: from DDIM with `reference_steps` steps.

    x_1: (n, d);  step_counts: multiples of 5 that divide reference_steps.  Returns two lists, with a value
    for each count: root mean square over samples and t = .2, .4, .6, .8, and that at t = 0.
    """

    def fifths(num_steps):
        return np.array([x_t for k, x_t in enumerate(ddim(mean, x_1, num_steps), 1) if k * 5 % num_steps == 0])

    reference = fifths(reference_steps)
    rms = [np.sqrt(((fifths(n) - reference) ** 2).sum(axis=2).mean(axis=1)) for n in step_counts]
    return [np.sqrt((r[:-1] ** 2).mean()) for r in rms], [r[-1] for r in rms]

# ------------------------------------------ The figures -------------------------------------------
def plot_trajectories(trajectories, ends, num_steps, *, points, weights, sigma_q):
    """trajectories: (num_steps + 1, n, 2);  ends: (n,), the index of the point that each reached."""
    fig, ax = plt.subplots(figsize=(6, 6.4), layout="constrained")
    everything = np.concatenate([trajectories.reshape(-1, 2), points])
    center, half = (everything.max(0) + everything.min(0)) / 2, 0.55 * np.ptp(everything, axis=0).max()
    side = np.linspace(-half, half, 240)
    grid = center + np.stack(np.meshgrid(side, side), axis=-1)
    p = posterior(grid.reshape(-1, 2), 1.0, points=points, weights=weights, sigma_q=sigma_q)
    colors = np.array([to_rgb(f"C{i % 10}") for i in range(len(points))])
    extent = (center[0] - half, center[0] + half, center[1] - half, center[1] + half)
    shade = 1 - 0.45 * (1 - (p @ colors).reshape(240, 240, 3))
    ax.imshow(shade, extent=extent, origin="lower", interpolation="bilinear")
    for p_i in p.T[: 1 if len(points) == 2 else None]:  # of two points, one line says it all
        if p_i.min() < 0.5 < p_i.max():
            ax.contour(*grid.T.swapaxes(1, 2), p_i.reshape(240, 240), [0.5], colors="k", linewidths=1, linestyles="--")
    ax.plot([], [], "k--", lw=1, label=r"$p(x_0 = a_i\,|\,x_1) = \frac{1}{2}$;  shade: which $a_i$ is likelier")
    for i, a in enumerate(points):
        paths = trajectories[:, ends == i]
        every = max(1, num_steps // 50)
        ax.plot(paths[..., 0], paths[..., 1], "o-", color=0.75 * colors[i], ms=2.5, lw=0.7, markevery=every)
        ax.plot(*a, "*", color=colors[i], ms=20, mec="k")
    ax.plot(*trajectories[0].T, "o", color="0.2", ms=4.5, label=r"$x_1$, drawn from $N(0, \sigma_q^2 I)$")
    ax.plot([], [], "k*", ms=12, mfc="w", label="the data: $a_1, a_2, \\ldots$")
    ax.set(xlabel="$x$", ylabel="$y$", xlim=extent[:2], ylim=extent[2:])
    ax.set_title(f"DDIM, {num_steps} step{'s' * (num_steps > 1)}: where $x_1$ lies decides where it goes")
    ax.legend(fontsize=10, loc="upper left", bbox_to_anchor=(0, -0.11))
    return fig

def plot_errors(step_counts, along, at_end, slope):
    """step_counts, along, at_end: lists of one length;  slope: of log along against log step_counts."""
    fig, ax = plt.subplots(figsize=(6, 5), layout="constrained")
    ax.loglog(step_counts, along, "o-", color="C0", label=f"at t = .2, .4, .6, .8: slope {slope:.2f}")
    ax.loglog(step_counts, along[-1] * step_counts[-1] / np.array(step_counts), "k--", lw=1, label="slope $-1$")
    ax.loglog(step_counts, at_end, "s-", color="C1", label=f"at t = 0 ({at_end[-1]:.1g} with {step_counts[-1]} steps)")
    ax.set_ylim(bottom=max(along[-1] / 100, 1e-18))
    ax.set(xlabel=r"num_steps $= 1/\Delta t$", ylabel="RMS distance to the ODE's solution")
    ax.set_title("DDIM solves the probability-flow ODE to first order")
    ax.set_xticks(step_counts, [str(n) for n in step_counts], minor=False)
    ax.minorticks_off()
    ax.legend(fontsize=11)
    ax.grid(alpha=0.3)
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
        return x, y
    raise argparse.ArgumentTypeError(f"takes X,Y, two numbers from -1000000.0 to 1000000.0, not {text!r}")

def parse_arguments(argv):
    parser = argparse.ArgumentParser(
        description="DDIM trajectories to two points (or more) in the plane, beside what Bayes' rule and the ODE say.",
        epilog="what happens if ...\n"
        "  one point is likelier?      python two_points.py --weights .8 .2\n"
        "  ... and the base is right?  python two_points.py --weights .8 .2 --sigma-q 30\n"
        "  there are three points?     python two_points.py --points -2,-1 2,-1 0,2\n"
        "  two steps are taken?        python two_points.py --num-steps 2",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {' '.join(message.split())}\n")  # one line, no usage
    parser._negative_number_matcher = re.compile(r"-[^-h]")  # -1,2 is a value, not an option

    def add(name, kind, default, text):
        parser.add_argument(name, type=kind, default=default, metavar="X", help=f"{text} (default: %(default)s)")

    add("--num-steps", between(int, 1, 10_000), 50, "number of steps, 1/dt")
    add("--num-samples", between(int, 1, 10**6), 10_000, "number of samples; the first 60 are drawn")
    two, text = [(-1.5, -1.0), (1.5, 1.0)], "a_1 a_2 ..., the points that are the data (default: -1.5,-1 1.5,1)"
    parser.add_argument("--points", type=point, nargs="+", default=two, metavar="X,Y", help=text)
    text = "w_1 w_2 ..., the probability of each point (default: equal)"
    parser.add_argument("--weights", type=between(float, 0, 1), nargs="+", metavar="X", help=text)
    add("--sigma-q", between(float, 1e-6, 1e6), 2.0, "sigma_q, standard deviation of the noise at t = 1")
    add("--seed", between(int, 0, 2**63 - 1), 0, "seed of every draw")
    folder = Path(__file__).parent / "figures"
    text = "folder the figures go to (default: figures, beside the script)"
    parser.add_argument("--figures-dir", type=Path, default=folder, metavar="DIR", help=text)
    parser.add_argument("--show", action="store_true", help="open the figures in windows as well")
    args = parser.parse_args(argv)
    if len(set(args.points)) < len(args.points):
        parser.error("argument --points: takes points that differ from one another")
    args.weights = args.weights or [1 / len(args.points)] * len(args.points)
    if len(args.weights) != len(args.points) or abs(sum(args.weights) - 1) > 1e-9:
        parser.error(f"argument --weights: takes one number per point ({len(args.points)} here), adding up to 1")
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
    points, weights = np.array(args.points), np.array(args.weights) / sum(args.weights)
    data = {"points": points, "weights": weights, "sigma_q": args.sigma_q}
    mean, drawn = partial(reverse_mean, **data), 60
    starts = {
        "N(0, sigma_q^2 I)": args.sigma_q * rng.standard_normal((args.num_samples, 2)),
        "true p_1": draw_p_1(args.num_samples, rng, **data),
    }
    shares, trajectories = {}, {}
    for name, x_1 in starts.items():
        trajectories[name] = [x_1[:drawn]]
        for x_t in tqdm(ddim(mean, x_1, args.num_steps), desc=f"DDIM, {name}", total=args.num_steps, disable=None):
            trajectories[name].append(x_t[:drawn].copy())
        shares[name] = np.bincount(reached(x_t, points), minlength=len(points)) / args.num_samples
    trajectory = np.array(trajectories["N(0, sigma_q^2 I)"])
    step_counts = [5, 10, 20, 50, 100, 200]
    along, at_end = errors_vs_steps(mean, starts["true p_1"][:1000], step_counts, 50 * step_counts[-1])
    slope = np.polyfit(np.log(step_counts[2:]), np.log(np.maximum(along[2:], 1e-300)), 1)[0]
    print(f"{args.num_samples} samples, {args.num_steps} steps, sigma_q {args.sigma_q:g}.  Shares by DDIM,")
    print("                              from the true p_1              from N(0, sigma_q^2 I)")
    print("                    point     sampled +- s.e.    exact       sampled +- s.e.    exact (dt -> 0)")
    base_share = [1.0] if len(points) == 1 else [np.nan] * len(points)  # of three or more: no closed form
    if len(points) == 2:
        base_share = [exact_share(points, weights, args.sigma_q), 1 - exact_share(points, weights, args.sigma_q)]
    for i, (x, y) in enumerate(points):
        print(f"{f'({x:g}, {y:g})':>25}", end="")
        for share, exact in [(shares["true p_1"][i], weights[i]), (shares["N(0, sigma_q^2 I)"][i], base_share[i])]:
            error = (share * (1 - share) / args.num_samples) ** 0.5
            print(f"     {share:.4f} +- {error:.4f}   {'none' if np.isnan(exact) else f'{exact:.4f}':>6}", end="  ")
        print()
    print(f"DDIM's distance to the ODE's solution along the way falls as num_steps^{slope:.2f} (20 to 200 steps)")

    plt.rcParams.update({"font.size": 12, "axes.titlesize": 12})
    figures = {
        "experiment-2-sample-trajectories-ddim.jpg": plot_trajectories(
            trajectory, reached(trajectory[-1], points), args.num_steps, **data
        ),
        "experiment-2-error-vs-steps.jpg": plot_errors(step_counts, along, at_end, slope),
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
