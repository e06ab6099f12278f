"""Experiment 4: flow matching; a network learns the velocity that carries an annulus to a spiral.

The claim
    Draw x_1 from the annulus and x_0 from the spiral, independently, and move each pair along the
    straight line x_t = t x_1 + (1 - t) x_0, at velocity x_0 - x_1 (time runs from 1 to 0). Many
    lines pass through one place. Least squares on draws of (x_t, x_0 - x_1) learns their mean
        v_t(x) = E[x_0 - x_1 | x_t = x]                                    (Pseudocode 4),
    and following it, x_{t-dt} = x_t + v_t(x_t) dt, carries the annulus to the spiral (Pseudocode
    5). The lines are straight; the trajectories that follow their mean are not.

The truth beside it
    Here v_t is an integral along the spiral: `exact_velocity`. Its loss is the least possible, not
    0: x_t does not tell which line it is on. A sample's twin follows it from the same start.

What to look for in figures/
    data.jpg            the annulus and the spiral
    scatter.gif         one flows into the other
    train_loss.jpg      the loss falls to its irreducible part
    trajectories.jpg    lines through one place, and their mean; trajectories beside their twins

Try this
    python flow_matching.py --num-steps 1       where do all points land?
    python flow_matching.py --num-steps 10      who is off the spiral, the network or the steps?
    python flow_matching.py --train-steps 300   what is not yet learned? Does the loss say so?
"""

import math
import os
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from itertools import zip_longest
from pathlib import Path

os.environ["MPLBACKEND"] = "agg"  # figures are files, also from a notebook

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.collections import LineCollection
from PIL import Image  # matplotlib brings it; its PillowWriter makes a file twice as large
from torch import nn
from tqdm import tqdm

# ------------------------------------------- The data -------------------------------------------
INNER, OUTER = 2.5, 3.0  # radii of the annulus
END = 6 * math.pi  # the angle at which the spiral ends; it starts at 0
NOISE = 0.1  # standard deviation of what is added to the spiral, per coordinate


def annulus(n, rng):
    """n draws of x_1: angle and radius uniform, INNER to OUTER.  rng: torch's.  Returns (n, 2)."""
    angle = 2 * math.pi * torch.rand(n, generator=rng)
    radius = INNER + (OUTER - INNER) * torch.rand(n, generator=rng)
    return torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1)


def curve(theta):
    """The spiral's center line at the angles theta, (n,): radius theta / (2 pi).  (n, 2)"""
    direction = torch.stack([theta.cos(), theta.sin()], dim=1)
    return direction * theta[:, None] / (2 * math.pi)


def spiral(n, rng):
    """n draws of x_0: theta uniform on [0, END], plus N(0, NOISE^2 I).  Returns (n, 2)."""
    theta = END * torch.rand(n, generator=rng)
    return curve(theta) + NOISE * torch.randn(n, 2, generator=rng)


def lines(n, t, rng):
    """x_t and the velocity x_0 - x_1 on n straight lines, (n, 2) each.  t: a float or (n, 1)."""
    x_0, x_1 = spiral(n, rng), annulus(n, rng)
    return t * x_1 + (1 - t) * x_0, x_0 - x_1


def gauss_legendre(n):
    """Nodes and weights of a quadrature on [0, 1], (n,) each, in double precision."""
    nodes, weights = np.polynomial.legendre.leggauss(n)  # on [-1, 1]
    return torch.tensor((1 + nodes) / 2), torch.tensor(weights / 2)


# An average over theta is a sum over POINTS of the curve, 50 for each piece of about 25 NOISE.
LENGTH = curve(torch.linspace(0, END, 10_000)).diff(dim=0).norm(dim=1).sum().item()
PIECES = 1 + min(100, int(LENGTH / max(25 * NOISE, 1e-9)))
NODES, WEIGHTS = gauss_legendre(50)
NODES = ((torch.arange(PIECES)[:, None] + NODES) / PIECES).ravel()  # of theta / END
WEIGHTS = WEIGHTS.repeat(PIECES) / PIECES
POINTS = curve(END * NODES)  # (m, 2)
SQUARE_0 = (WEIGHTS @ POINTS.square().sum(dim=1)).item() + 2 * NOISE**2  # E|x_0|^2
SQUARE_1 = (INNER**2 + INNER * OUTER + OUTER**2) / 3  # E|x_1|^2
SIZE = max(OUTER, POINTS.norm(dim=1).max().item())  # how far from 0 the picture reaches


def faults(n=100_000):
    """What cannot be done with the data above, a line each.  n: test draws of the annulus."""
    x_1 = annulus(n, torch.Generator().manual_seed(0))
    radius = (x_1.norm(dim=1) - INNER) / (OUTER - INNER)
    angle = torch.atan2(x_1[:, 1], x_1[:, 0]) / (2 * math.pi) + 0.5
    # If both are uniform on [0, 1] and independent, so are their sum and difference, modulo 1.
    uniform = torch.stack([radius, angle, (radius + angle) % 1, (radius - angle) % 1])
    off = (uniform.sort(dim=1).values - torch.linspace(0, 1, n)).abs().max()  # Kolmogorov's
    least = max(LENGTH / 2500, (OUTER - INNER) / 40)
    found = []
    if not (0 <= INNER < OUTER and off < 2.5 / n**0.5):
        found += ["annulus: x_1 must be round about 0, |x_1| uniform from INNER to OUTER"]
    if least > NOISE:
        found += [f"NOISE: {NOISE} is below {least:.2g}, too fine for the quadrature"]
    return found


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


# ------------------------------------------- Learning -------------------------------------------


class Velocity(nn.Module):
    """A ReLU network that learns v_t(x_t).

    c_skip x_t is the best guess of x_0 - x_1 that is a multiple of x_t, c_out its error (RMS, per
    coordinate); the layers learn what it misses, in units of c_out. They see x_t, t, and how far
    |x_t| is from the edges of t x_1: near t = 1, v_t bends there, on the scale 1 - t (1.1 - t is
    not 0). Waves in x_t and t help to bend sharply (Tancik et al., 2020, arXiv 2006.10739).
    Lengths are in units of SIZE / 3.
    """

    def __init__(self, num_waves=32, num_harmonics=10, width=96):
        super().__init__()
        self.register_buffer("frequencies", 3 * torch.randn(2, num_waves))
        self.register_buffer("harmonics", 2 * math.pi * torch.arange(1.0, num_harmonics + 1))
        self.layers = nn.Sequential(
            nn.Linear(5 + 2 * num_waves + 2 * num_harmonics, width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, 2),
        )

    def forward(self, x_t, t):
        """v_t(x_t), learned.  x_t: (n, 2);  t: a float or (n, 1), 0 <= t <= 1.  Returns (n, 2)."""
        t = torch.as_tensor(t).expand(len(x_t), 1)
        square_t = t**2 * SQUARE_1 + (1 - t) ** 2 * SQUARE_0  # E|x_t|^2
        c_skip = ((1 - t) * SQUARE_0 - t * SQUARE_1) / square_t
        c_out = (SQUARE_0 * SQUARE_1 / square_t / 2).sqrt()
        unit = SIZE / 3
        x, radius = x_t / unit, x_t.norm(dim=1, keepdim=True)
        edges = [(radius - t * edge) / unit / (1.1 - t) for edge in (INNER, OUTER)]
        a, b = x @ self.frequencies, t * self.harmonics
        inputs = torch.cat([x, t, *edges, a.sin(), a.cos(), b.sin(), b.cos()], dim=1)
        return c_skip * x_t + c_out * self.layers(inputs)


def train(*, train_steps, rng, batch_size=2048, learning_rate=0.01):
    """Pseudocode 4: least squares on fresh lines, t uniform on [0, 1].

    Returns the trained Velocity and the loss of each step.
    """
    # nn.Linear draws its weights from torch's own generator: its seed is drawn from ours.
    torch.manual_seed(torch.randint(2**60, (), generator=rng).item())
    velocity = Velocity()
    optimizer = torch.optim.Adam(velocity.parameters(), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, train_steps)
    losses = []
    for _ in tqdm(range(train_steps), "training", disable=None):
        t = torch.rand(batch_size, 1, generator=rng)
        x_t, target = lines(batch_size, t, rng)
        loss = (velocity(x_t, t) - target).square().sum(dim=1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return velocity.requires_grad_(False), losses


# ------------------------------------------ The truth -------------------------------------------
# On a line x_0 - x_1 = (x_t - x_1) / (1 - t), and so v_t(x_t) = (x_t - E[x_1 | x_t]) / (1 - t).
# Fix the curve's angle theta. Then w = x_t - (1 - t) c(theta) is t x_1 plus N(0, s^2 I), with
# s = NOISE (1 - t): an annulus with blurred edges. It is round. So its density at w is g(|w|), and
# E[x_1 | w] points along w and has a length h(|w|). By Bayes' rule
#     E[x_1 | x_t] = the average over theta of h(|w|) w / |w|, weighted by g(|w|).
FEW_NODES, FEW_WEIGHTS = (q[:, None] for q in gauss_legendre(30))  # for |x_1|


def blurred_annulus(t):
    """log g and h on an even grid of |w|, which ends 5 s beyond the edges: (grid, log g, h).

    Given |x_1| = r, the integral over the angle of x_1 is a Bessel function:
        g = the integral over r of exp(-(|w| - t r)^2 / (2 s^2)) I0e(|w| t r / s^2),
        h = the average of r I1e / I0e with that weight.
    I0e and I1e are I_0 and I_1 times exp(-z). Only r within 8 s / t of |w| / t counts.
    """
    s = NOISE * (1 - t)
    low, high = max(0, t * INNER - 5 * s), t * OUTER + 5 * s
    grid = torch.linspace(low, high, math.ceil((high - low) / (0.02 * s)), dtype=torch.double)
    start, end = (((grid + side) / t).clamp(INNER, OUTER) for side in (-8 * s, 8 * s))
    r = start + (end - start) * FEW_NODES  # (30, n)
    p = (end - start) * FEW_WEIGHTS * torch.exp(-(((grid - t * r) / s) ** 2) / 2)
    z = grid * t * r / s**2
    g = (p * torch.special.i0e(z)).sum(dim=0)
    h = (p * r * torch.special.i1e(z)).sum(dim=0) / g
    return grid, g.log(), h


def interpolate(w, grid, *tables):
    """Linear interpolation at w, any shape, in each table, (m,), on an even grid, (m,).  A list."""
    u = (w - grid[0]) / (grid[1] - grid[0])
    k = u.long().clamp(0, len(grid) - 2)  # w lies between grid[k] and grid[k + 1]
    return [torch.lerp(table.take(k), table.take(k + 1), u - k) for table in tables]


def exact_velocity(x_t, t):
    """v_t(x_t), good to 1e-4 of SIZE.  x_t: (n, 2);  t: a float, 0 < t <= 1.  (n, 2), double."""
    x_t = x_t.double()
    if t == 1:  # x_t = x_1, which says nothing of x_0
        return WEIGHTS @ POINTS - x_t
    grid, log_g, h = blurred_annulus(t)
    means = []
    for x in x_t.split(200):  # to stay in cache
        w = torch.cdist(x, (1 - t) * POINTS)  # |w|, (200, m)
        log_g_w, h_w = interpolate(w, grid, log_g, h)
        factor = (WEIGHTS.log() + log_g_w).softmax(dim=1) * h_w / w
        means.append(factor.sum(dim=1, keepdim=True) * x - (1 - t) * factor @ POINTS)
    return (x_t - torch.cat(means)) / (1 - t)


# ------------------------------------------ Measuring -------------------------------------------
TIMES = [0.05, 0.2, 0.4, 0.6, 0.8, 0.95]  # at which the velocity is measured
FAR = 5 * NOISE  # more than NOISE explains; half of the distance between two turns of the spiral


def measure(velocity, rng, n=4000):
    """E|f - v_t|^2 of a velocity f, and E|v_t|^2, at each of TIMES: two lists.  n draws of x_t."""
    errors, squares = [], []
    for t in TIMES:
        x_t, _ = lines(n, t, rng)
        exact = exact_velocity(x_t, t)
        errors.append((velocity(x_t, t) - exact).square().sum(dim=1).mean().item())
        squares.append(exact.square().sum(dim=1).mean().item())
    return errors, squares


def least_loss(rng, num_times=40, n=6000):
    """The loss of train with the exact velocity: its irreducible part E|x_0 - x_1 - v_t(x_t)|^2.

    That is E|x_0 - x_1|^2 - E|v_t|^2.  n draws of x_t at each of num_times midpoints of t.
    """
    squares = []
    for k in range(num_times):
        t = (k + 0.5) / num_times
        x_t, _ = lines(n, t, rng)
        squares.append(exact_velocity(x_t, t).square().sum(dim=1).mean().item())
    return SQUARE_0 + SQUARE_1 - sum(squares) / num_times


def crossing(rng, n=200_000, num_lines=100):
    """A place, (2,), and the ends x_1, x_0 of the lines nearest to it at t = 0.5, (2, 100, 2).

    The place is one of 100 draws of x_t. Its mean line is long, and ends far from the curve.
    """
    x_t, target = lines(n, 0.5, rng)
    some = x_t[:100]
    way = exact_velocity(some, 0.5) / 2  # from t = 0.5 to 0
    off = torch.cdist(some + way, POINTS).min(dim=1).values
    place = some[(off * way.norm(dim=1)).argmax()]
    near = (x_t - place).norm(dim=1).argsort()[:num_lines]
    return place, torch.stack([x_t - target / 2, x_t + target / 2])[:, near]


def trajectories(name, velocity, x_1, num_steps):
    """The flow from x_1, (n, 2): x_t at t = 1, 1 - dt, ..., 0.  Returns (num_steps + 1, n, 2)."""
    steps = tqdm(flow(velocity, x_1, num_steps), name, num_steps, disable=None)
    return torch.stack([x_1, *steps])


def apart(x_0, twins):
    """Median distance of samples to their twins, (n, 2) each, and the share farther than FAR."""
    distance = (x_0 - twins).norm(dim=1)
    return distance.median().item(), (distance > FAR).double().mean().item()


# ----------------------------------------- The figures ------------------------------------------
plt.style.use("default")  # the same figures whatever the reader's matplotlibrc says
BLUE, GREEN, PINK = "#0072B2", "#009E73", "#CC79A7"
EXACT = {"color": "0.7", "lw": 5, "label": "exact"}
LEARNED = {"color": BLUE, "lw": 1.2, "label": "learned"}  # over it
LIMITS = (-1.1 * SIZE, 1.1 * SIZE)
CURVE = curve(torch.linspace(0, END, 1000)).T


def draw_data(x_0, x_1):
    """x_0, x_1: (n, 2)."""
    fig, ax = plt.subplots(figsize=(5, 5.3), layout="constrained")
    ax.scatter(*x_1.T, s=3, color=PINK, label="$x_1$, the start")
    ax.scatter(*x_0.T, s=3, color=GREEN, label="$x_0$, the goal")
    ax.set(xlabel="$x$", ylabel="$y$", aspect="equal")
    fig.legend(loc="outside lower center", ncols=2, markerscale=3)
    return fig


def draw_loss(losses, least):
    """losses: of train;  least: of least_loss."""
    fig, ax = plt.subplots(figsize=(11, 3.8), layout="constrained")
    window = max(1, len(losses) // 50)
    smooth = torch.tensor(losses).unfold(0, window, 1).mean(dim=1)
    ax.plot(losses, ".", color="0.8", ms=2, label="each step")
    ax.plot(range(window - 1, len(losses)), smooth, color=BLUE, label=f"mean of {window} steps")
    ax.axhline(least, color="k", ls="--", label=f"exact velocity: {least:.2f}")
    ax.set(xlabel="training step", ylabel="loss, $|f(x_t, t) - (x_0 - x_1)|^2$", ylim=(0, None))
    ax.legend()
    return fig


def draw_trajectories(place, ends, means, paths, twins):
    """Lines through one place and their mean; 20 trajectories over their twins.

    place, ends: of crossing;  means: E[x_0 | x_t = place], exact and learned, (2,) each;
    paths, twins: of trajectories.
    """
    fig, axes = plt.subplots(1, 3, figsize=(13, 5), layout="constrained")
    axes[0].plot(ends[..., 0], ends[..., 1], color=PINK, lw=0.4)
    for mean, style in zip(means, (EXACT, {**LEARNED, "lw": 2})):
        axes[0].plot(*torch.stack([place, mean]).T, **style, zorder=3)
    axes[0].plot(*place, "ko", zorder=4)
    axes[0].plot(*means[0], "k*", ms=12, zorder=4, label="mean of the $x_0$ left")
    axes[0].set_title("Lines through one place, $t$ = 0.5")

    for x_t, style in [(twins[:, :20], EXACT), (paths[:, :20], LEARNED)]:
        axes[1].plot(x_t[..., 0], x_t[..., 1], **style)
        axes[2].plot(torch.linspace(1, 0, len(x_t)), x_t.norm(dim=2), **style)
    axes[1].set_title("Trajectories")
    axes[2].set(xlabel="$t$", ylabel="$|x_t|$", xlim=(1, 0), title="Distance from 0")

    for ax, (x_1, x_0) in zip(axes, (ends, paths[[0, -1], :20])):
        ax.plot(*x_1.T, ".", color=PINK, label="$x_1$")
        ax.plot(*x_0.T, ".", color=GREEN, label="$x_0$")
        ax.plot(*CURVE, color=GREEN, lw=1, zorder=0, label="curve")
        ax.set(xlabel="$x$", ylabel="$y$", aspect="equal", xlim=LIMITS, ylim=LIMITS)
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    return fig


def animate(paths, num_frames=41):
    """Pictures of the flow, each drawn once; the first and the last are repeated, to rest there.

    paths: (num_steps + 1, n, 2).  A point's color is the radius at which it starts.
    """
    fig = plt.figure(figsize=(4, 4), facecolor="#0b1020")
    ax = fig.add_axes((0, 0, 1, 1), xlim=LIMITS, ylim=LIMITS)
    ax.axis("off")
    ax.plot(*CURVE, "0.4", lw=0.6)
    height = (paths[0].norm(dim=1) - INNER) / (OUTER - INNER)
    colors = plt.get_cmap("plasma")(0.2 + 0.8 * height.numpy())
    tails = ax.add_collection(LineCollection([], colors=colors, lw=0.7, alpha=0.35))
    dots = ax.scatter(*paths[0].T, s=5, lw=0, color=colors)
    label = ax.text(
        0.03, 0.03, "", transform=ax.transAxes, color="0.8", family="monospace", size=12
    )
    frames, last = [], len(paths) - 1
    for now in np.linspace(0, last, num_frames).round().astype(int):
        before = max(0, now - round(last / 20))  # a twentieth of all steps is a tail
        dots.set_offsets(paths[now])
        tails.set_segments(paths[before : now + 1].transpose(0, 1).numpy())
        label.set_text(f"t = {1 - now / last:.2f}")
        fig.canvas.draw()
        frames.append(Image.fromarray(np.asarray(fig.canvas.buffer_rgba())).convert("RGB"))
    colors = frames[-1].quantize(32, Image.Quantize.FASTOCTREE)  # 32 colors halve the file
    frames = [frame.quantize(palette=colors, dither=Image.Dither.NONE) for frame in frames]
    return [*8 * frames[:1], *frames, *25 * frames[-1:]]


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


def report(errors, squares):
    """Rows for table from what measure returns. The last ratio is that of the means."""
    errors, squares = ([*row, sum(row) / len(row)] for row in (errors, squares))
    return [
        ["t", *(f"{t:g}" for t in TIMES), "mean"],
        ["E|f - v_t|^2", *(f"{error:.4f}" for error in errors)],
        ["E|v_t|^2", *(f"{square:.2f}" for square in squares)],
        ["their ratio", *(f"{error / square:.2%}" for error, square in zip(errors, squares))],
    ]


def main(argv=None):
    args = options(
        argv,
        *faults(),
        num_steps=(200, 1, 500, "steps of the flow, 1 / dt"),
        num_samples=(1500, 1, 10_000, "samples, and twins"),
        train_steps=(2800, 1, 10**6, "steps of the optimizer"),
        seed=(0, 0, 10**6, "seed of every draw"),
    )
    torch.set_num_threads(1)  # the same bytes on any number of cores, and hardly slower
    rng = torch.Generator().manual_seed(args.seed)

    velocity, losses = train(train_steps=args.train_steps, rng=rng)
    errors, squares = measure(velocity, rng)
    least = least_loss(rng)

    x_1 = annulus(args.num_samples, rng)
    paths = trajectories("learned", velocity, x_1, args.num_steps)
    twins = trajectories("exact", exact_velocity, x_1, args.num_steps)
    place, ends = crossing(rng)
    means = [place + f(place[None], 0.5)[0] / 2 for f in (exact_velocity, velocity)]

    for name, figure in {
        "data": draw_data(spiral(2000, rng), annulus(2000, rng)),
        "train_loss": draw_loss(losses, least),
        "trajectories": draw_trajectories(place, ends, means, paths, twins),
    }.items():
        figure.savefig(args.figures_dir / f"{name}.jpg", dpi=120)
    first, *others = animate(paths[:, :1500])
    movie = {"save_all": True, "append_images": others, "duration": 70, "loop": 0}
    first.save(args.figures_dir / "scatter.gif", **movie)

    tenth = losses[-max(1, len(losses) // 10) :]
    print(f"loss: {sum(tenth) / len(tenth):.2f} in the last tenth, {least:.2f} is irreducible")
    table(report(errors, squares))
    median, far = apart(paths[-1], twins[-1])
    print(f"a sample is {median:.4f} from its twin (median), {far:.1%} over {FAR:g}")
    print(f"figures: {args.figures_dir}")


if __name__ == "__main__":
    main()
