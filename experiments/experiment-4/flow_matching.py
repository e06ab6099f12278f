"""Experiment 4: flow matching; a network learns the velocity that carries an annulus to a spiral.

The claim
    Draw x_0 from the spiral and x_1 from the annulus, independently. Move each pair on a straight
    line, x_t = t x_1 + (1 - t) x_0: its velocity is x_0 - x_1 (the linear pointwise flow; time runs
    from 1 to 0). A network trained by least squares to predict x_0 - x_1 from (x_t, t) learns
        v_t(x) = E[x_0 - x_1 | x_t = x],
    the average velocity of all the lines through x (Pseudocode 4). Following it from t = 1 to 0,
        x_{t-dt} = x_t + v_t(x_t) dt,
    carries the annulus to the spiral (Pseudocode 5).

How well does it learn, and what matters?
    Annulus and spiral are simple enough for v_t to be an integral along the spiral:
    `exact_velocity`. So the learned velocity has an error that can be measured at each t, and the
    exact velocity can be followed beside it. The loss has a known floor, its irreducible part
    E|x_0 - x_1 - v_t(x_t)|^2: the network cannot know which of the lines through x_t it is on.
    Lying on the spiral is not enough: each tenth of the spiral should get a tenth of the points.
    Which turn of the spiral a point goes to is decided near t = 1. Errors of v_t are small there,
    but cost more than larger errors near t = 0, which only move a point across its turn.

What to look for in figures/
    data.jpg                       the annulus, the spiral
    train_loss.jpg                 the loss falls to its irreducible part
    scatter.gif                    the points flow, coloured by the height at which they started
    trajectories.jpg               their paths; learned velocities on exact ones at three t
    shares-along-the-spiral.jpg    how many points each tenth of the spiral gets

Run
    python flow_matching.py

Try this
    python flow_matching.py --train-steps 200                      little is learned
    python flow_matching.py --num-steps 5 --checkpoint flow.pt     few steps; keeps the network
    python flow_matching.py --num-steps 50 --checkpoint flow.pt    more steps; need not train again
"""

import argparse
import io
import math
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.animation import PillowWriter
from torch import nn
from tqdm import tqdm

# ------------------------------------------- The data -------------------------------------------
INNER, OUTER = 2.5, 3.0  # radii of the annulus
START, END = 0.0, 6 * math.pi  # the angles at which the spiral starts and ends
NOISE = 0.1  # standard deviation of what is added to the spiral


def annulus(n, rng):
    """n draws of x_1: angle uniform, radius uniform on [2.5, 3].  Returns (n, 2).

    rng: a torch Generator; what is drawn lies on its device, here and below.
    """
    angle = 2 * math.pi * torch.rand(n, generator=rng, device=rng.device)
    radius = INNER + (OUTER - INNER) * torch.rand(n, generator=rng, device=rng.device)
    return torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1)


def curve(theta):
    """The spiral's centre line at angles theta, (n,): radius theta / (2 pi).  Returns (n, 2)."""
    direction = torch.stack([theta.cos(), theta.sin()], dim=1)
    return direction * theta[:, None] / (2 * math.pi)


def spiral(n, rng):
    """n draws of x_0: theta uniform on [0, 6 pi], plus N(0, 0.1^2 I).  Returns (n, 2)."""
    theta = START + (END - START) * torch.rand(n, generator=rng, device=rng.device)
    return curve(theta) + NOISE * torch.randn((n, 2), generator=rng, device=rng.device)


# ----------------------------------------- The velocity -----------------------------------------


def linear_flow(x_0, x_1, t):
    """x_t = t x_1 + (1 - t) x_0 and its velocity x_0 - x_1, (n, 2) each.

    x_0, x_1: (n, 2);  t: (n,) or a float.
    """
    t = torch.as_tensor(t, device=x_0.device).reshape(-1, 1)
    return t * x_1 + (1 - t) * x_0, x_0 - x_1


# ----------------------------------------- The samplers -----------------------------------------


def flow(velocity, x_1, num_steps):
    """Pseudocode 5: x_{t-dt} = x_t + v_t(x_t) dt, for t = 1, 1 - dt, ..., dt.

    velocity(x_t, t) -> like x_t;  x_1: draws of the annulus.
    num_steps = 1 / dt >= 1 (0: ZeroDivisionError).
    Yields num_steps arrays like x_1, the last of them x_0.
    """
    x_t, dt = x_1, 1 / num_steps
    for k in range(num_steps, 0, -1):  # t = k dt
        x_t = x_t + velocity(x_t, k / num_steps) * dt
        yield x_t


# ------------------------------------------- Learning -------------------------------------------
VARIANCE_0, VARIANCE_1 = 1.5, 3.8  # of the spiral and of the annulus, per coordinate, about


class Velocity(nn.Module):
    """A ReLU network that learns v_t(x_t).

    Preconditioned like the denoiser of experiment 3: the best linear guess of x_0 - x_1 is
    c_skip x_t, and c_out is the size of its error. The network learns what that guess misses, in
    units of c_out. Near t = 1, where x_t says little of x_0, that is little.
    Beside x_t and t it sees sines and cosines of them, so that it can bend sharply: of x_t at
    random frequencies (Tancik et al., 2020, arXiv 2006.10739), of t at whole ones. And it sees how
    far |x_t| is from the edges of t x_1, the annulus on its way: near t = 1, v_t bends at these
    edges and nowhere else, on the scale 1 - t (the 0.1 in the code keeps it finite at t = 1).
    """

    def __init__(self, num_frequencies=48, num_harmonics=10, width=128):
        super().__init__()
        self.register_buffer("frequencies", 3 * torch.randn(2, num_frequencies))
        self.register_buffer("harmonics", 2 * math.pi * torch.arange(1.0, num_harmonics + 1))
        self.layers = nn.Sequential(
            nn.Linear(5 + 2 * num_frequencies + 2 * num_harmonics, width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, 2),
        )

    def forward(self, x_t, t):
        """v_t(x_t), learned.  x_t: (n, 2);  t: (n,) or a float, 0 <= t <= 1.  Returns (n, 2)."""
        t = torch.as_tensor(t, dtype=x_t.dtype, device=x_t.device).reshape(-1, 1)
        t = t.expand(len(x_t), 1)
        variance_t = t**2 * VARIANCE_1 + (1 - t) ** 2 * VARIANCE_0  # of x_t
        c_skip = ((1 - t) * VARIANCE_0 - t * VARIANCE_1) / variance_t
        c_out = (VARIANCE_0 * VARIANCE_1 / variance_t).sqrt()
        radius = x_t.norm(dim=1, keepdim=True)
        to_inner = (radius - t * INNER) / (1.1 - t)
        to_outer = (radius - t * OUTER) / (1.1 - t)
        a = x_t @ self.frequencies
        b = t * self.harmonics
        waves = [a.sin(), a.cos(), b.sin(), b.cos()]
        inputs = torch.cat([x_t, t, to_inner, to_outer, *waves], dim=1)
        return c_skip * x_t + c_out * self.layers(inputs)


def draw_times(n, rng):
    """n draws of t for training, (n,): half of them below .5, two in ten to .8, three in ten above.

    Pseudocode 4 prints Unif[0, 1]; any density has the same minimiser v_t. This one has more draws
    near t = 1, because errors there decide where on the spiral a point ends.
    """
    # One uniform draw in each interval from i / n to (i + 1) / n, so that all batches are alike.
    u = (torch.arange(n, device=rng.device) + torch.rand(n, generator=rng, device=rng.device)) / n
    middle = 0.5 + (u - 0.5) / 0.2 * 0.3  # from .5 to .8 while u goes from .5 to .7
    near_1 = 0.8 + (u - 0.7) / 0.3 * 0.2  # from .8 to 1 while u goes from .7 to 1
    return torch.where(u < 0.5, u, torch.where(u < 0.7, middle, near_1))


def train(*, train_steps, batch_size, learning_rate, rng):
    """Pseudocode 4: least squares on fresh pairs.  rng: a torch Generator; it says the device.

    Returns the trained Velocity and the loss of each step, a list of floats.
    """
    torch.manual_seed(rng.initial_seed())  # the network's weights are from torch's own generator
    velocity = Velocity().to(rng.device)
    optimizer = torch.optim.Adam(velocity.parameters(), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, train_steps)
    losses = []
    for _ in tqdm(range(train_steps), "training", disable=None):
        x_0 = spiral(batch_size, rng)
        x_1 = annulus(batch_size, rng)
        t = draw_times(batch_size, rng)
        x_t, target = linear_flow(x_0, x_1, t)
        loss = (velocity(x_t, t) - target).square().sum(dim=1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return velocity.requires_grad_(False), losses


# ------------------------------------------- The truth ------------------------------------------
# As x_0 = (x_t - t x_1) / (1 - t), x_0 - x_1 = (x_t - x_1) / (1 - t), and so
#     v_t(x_t) = (x_t - E[x_1 | x_t]) / (1 - t).
# Fix the spiral's angle theta. Then w = x_t - (1 - t) c(theta) is t x_1 plus N(0, s^2 I), where
# s = 0.1 (1 - t): an annulus with blurred edges. It is round. So its density g depends on |w| only,
# and E[x_1 | w] points along w with a length h that depends on |w| only: two functions of one
# number, integrals over the radius of x_1. What remains is an integral over theta, with weights by
# Bayes' rule:
#     E[x_1 | x_t] = average over theta of h(|w|) w / |w|, weighted by g(|w|).
# All of it is in double precision, on the CPU.


def quadrature(num_panels=80):
    """Nodes for integrals over theta: 8 Gauss-Legendre nodes on each panel.

    The panels get shorter in theta as the radius, and with it the arc, grows.
    Returns c(theta) at the nodes, (m, 2), and the logarithms of their weights, (m,), of sum 1.
    """
    nodes, weights = np.polynomial.legendre.leggauss(8)  # on [-1, 1]
    edges = START + (END - START) * np.linspace(0, 1, num_panels + 1) ** (2 / 3)
    half = np.diff(edges)[:, None] / 2
    theta = ((edges[1:] + edges[:-1])[:, None] / 2 + half * nodes).ravel()
    weights = (half * weights).ravel() / (END - START)
    return curve(torch.tensor(theta)), torch.tensor(weights).log()


def blurred_annulus(t, spacing):
    """log g and h on an even grid of |w|, which reaches 9 s beyond the edges.

    Given |x_1| = r, the angle of x_1 integrates to Bessel functions (I0e and I1e are I_0 and I_1,
    scaled by exp so that they do not overflow):
        g = integral over r of exp(-(|w| - t r)^2 / (2 s^2)) I0e(|w| t r / s^2),
        h = the average of r I1e / I0e with that weight.
    Only r within 6 s / t of |w| / t counts: 20 Gauss-Legendre nodes there.
    t: 0 < t < 1;  spacing: of the grid, in units of s, but at most 100 000 points.
    Returns |w|, log g, h, (n,) each.
    """
    s = NOISE * (1 - t)
    low = max(0.0, t * INNER - 9 * s)
    high = t * OUTER + 9 * s
    num_points = min(math.ceil((high - low) / (spacing * s)), 100_000)
    grid = torch.linspace(low, high, num_points, dtype=torch.double)
    nodes, weights = (torch.tensor(q) for q in np.polynomial.legendre.leggauss(20))
    peak = (grid / t).clamp(INNER, OUTER)
    left = (peak - 6 * s / t).clamp(min=INNER)[:, None]
    right = (peak + 6 * s / t).clamp(max=OUTER)[:, None]
    r = (left + right) / 2 + (right - left) / 2 * nodes  # (n, 20)
    z = grid[:, None] * t * r / s**2
    p = torch.exp(-(((grid[:, None] - t * r) / s) ** 2) / 2) * weights * (right - left)
    g = (p * torch.special.i0e(z)).sum(dim=1)
    h = (p * r * torch.special.i1e(z)).sum(dim=1) / g
    return grid, g.log(), h


def exact_velocity(x_t, t, spacing=0.003):
    """v_t(x_t) = E[x_0 - x_1 | x_t].  x_t: (n, 2);  t: a float, 0 < t <= 1.

    spacing: of the grid for g and h.  The error is below 1e-6 with 0.003 (t <= .98), and below
    5e-5 with 0.02, which is faster.
    Returns (n, 2), double, on the CPU.
    """
    x_t = x_t.cpu().double()
    c, log_weights = quadrature()
    if t == 1:  # x_t = x_1, which says nothing of x_0
        return log_weights.exp() @ c - x_t
    grid, log_g, h = blurred_annulus(t, spacing)
    velocities = []
    for x in x_t.split(100):  # to stay in cache
        distance = torch.cdist(x, (1 - t) * c)  # |w|, (100, m)
        # Both functions, interpolated between the two grid points around |w|.
        place = (distance - grid[0]) / (grid[1] - grid[0])
        k = place.long().clamp(0, len(grid) - 2)
        log_g_of_w = torch.lerp(log_g.take(k), log_g.take(k + 1), place - k)
        h_of_w = torch.lerp(h.take(k), h.take(k + 1), place - k)
        p = (log_g_of_w + log_weights).softmax(dim=1)
        factor = p * h_of_w / distance
        # The sum over theta of factor w, where w = x - (1 - t) c.
        mean_x_1 = factor.sum(dim=1, keepdim=True) * x - factor @ ((1 - t) * c)
        velocities.append((x - mean_x_1) / (1 - t))
    return torch.cat(velocities)


# ------------------------------------------- Measuring ------------------------------------------
TIMES = (0.05, 0.2, 0.4, 0.6, 0.8, 0.95)  # the t at which the velocity is measured
NUM_DRAWN = 2500  # points kept at every step, for the figures
NUM_EXACT = 1500  # points that follow the exact velocity
NUM_DIRECTIONS = 64  # of the sliced distance
NUM_DATA_SETS = 11


def draw_x_t(n, t, rng):
    """n draws of x_t, t a float.  Returns (n, 2)."""
    return linear_flow(spiral(n, rng), annulus(n, rng), t)[0]


def velocity_error(velocity, t, rng, n=1000):
    """E|f - v_t|^2 / E|v_t|^2 at time t, from n draws of x_t; f is the learned velocity."""
    x_t = draw_x_t(n, t, rng)
    exact = exact_velocity(x_t, t)
    learned = velocity(x_t, t).cpu().double()
    return float((learned - exact).square().sum() / exact.square().sum())


def measure_velocity(velocity, rng):
    """Returns {t: velocity_error at t} for t in TIMES, and their mean under the key "mean"."""
    errors = {t: velocity_error(velocity, t, rng) for t in TIMES}
    errors["mean"] = sum(errors.values()) / len(TIMES)
    return errors


def final_loss(losses):
    """Mean loss of the last 500 training steps."""
    return np.mean(losses[-500:])


def irreducible_loss(rng, num_times=50, n=100):
    """What is left of the training loss at its minimum, and its standard error.

    That is E|x_0 - x_1 - v_t(x_t)|^2, from n pairs at each of num_times draws of t, which are drawn
    as in training.  rng: on the CPU.
    """
    losses = []
    for t in draw_times(num_times, rng).tolist():
        x_t, target = linear_flow(spiral(n, rng), annulus(n, rng), t)
        losses.append((target - exact_velocity(x_t, t, spacing=0.02)).square().sum(dim=1))
    losses = torch.cat(losses)
    return float(losses.mean()), float(losses.std()) / len(losses) ** 0.5


def run_flow(velocity, x_1, num_steps, label):
    """x_0, (n, 2), and the first paths, (num_steps + 1, NUM_DRAWN, 2), both on the CPU."""
    # One array for all, not a list of small ones between the large ones: that scatters memory.
    paths = torch.empty(num_steps + 1, min(len(x_1), NUM_DRAWN), 2)
    paths[0] = x_1[:NUM_DRAWN]
    for k, x_t in enumerate(tqdm(flow(velocity, x_1, num_steps), label, num_steps, disable=None)):
        paths[k + 1] = x_t[:NUM_DRAWN]
    return x_t.cpu(), paths


def nearest_on_curve(x):
    """Distance of each point to the curve, and the tenth of its angle where it is nearest.

    x: (n, 2), on the CPU.  Returns (n,), and (n,) whole numbers from 0 to 9.
    """
    num_points = 4000
    line = curve(torch.linspace(START, END, num_points, dtype=torch.double))
    distance = []
    tenth = []
    for part in x.double().split(1000):
        nearest = torch.cdist(part, line).min(dim=1)
        distance.append(nearest.values)
        tenth.append(nearest.indices * 10 // num_points)
    return torch.cat(distance), torch.cat(tenth)


def shares_along_curve(x_0):
    """Share of the points in each tenth of the spiral's angle, (10,); of the data about 1/10."""
    tenth = nearest_on_curve(x_0)[1]
    return torch.bincount(tenth, minlength=10).double() / len(x_0)


def share_error(n):
    """Standard error of a share of 1/10 among n points."""
    return (0.1 * 0.9 / n) ** 0.5


def projections(points):
    """Sorted coordinates of points, (n, 2), along NUM_DIRECTIONS axes.  Returns (directions, n)."""
    angles = math.pi * torch.arange(NUM_DIRECTIONS, dtype=torch.double) / NUM_DIRECTIONS
    directions = torch.stack([angles.cos(), angles.sin()])
    return (points.cpu().double() @ directions).T.contiguous().sort(dim=1).values


def measure_samples(samples, rng):
    """How well each set of samples matches the data.  samples: {key: (n, 2)}, one n for all.

    "away" is the mean distance to the curve; "sliced" is the sliced 2-Wasserstein distance to fresh
    data (Bonneel et al., 2015): on a line, W_2 of two sets of n points sends the sorted points of
    one to those of the other, and the sliced distance is the root mean square of that over
    directions. Returns {key: {"away", "away_ratio": in units of the data's own, "sliced",
    "sliced_ratio": in units of the floor}}, and of data {"away", "sliced": of data to data, the
    floor, "spread": its standard deviation from pair to pair}.
    """
    n = len(next(iter(samples.values())))
    data = [spiral(n, rng) for _ in range(NUM_DATA_SETS)]
    seen = [projections(x_0) for x_0 in data]
    pairs = torch.stack([(a - b).square().mean() for a, b in zip(seen, seen[1:])])
    floor = float(pairs.mean().sqrt())
    data_away = float(nearest_on_curve(data[0])[0].mean())
    data_row = {"away": data_away, "sliced": floor, "spread": float(pairs.sqrt().std())}
    rows = {}
    for key, x_0 in samples.items():
        own = projections(x_0)
        squares = torch.stack([(own - other).square().mean() for other in seen])
        sliced = float(squares.mean().sqrt())
        away = float(nearest_on_curve(x_0)[0].mean())
        rows[key] = {"away": away, "away_ratio": away / data_away}
        rows[key].update(sliced=sliced, sliced_ratio=sliced / floor)
    return rows, data_row


# ------------------------------------------- Printing -------------------------------------------


def report(errors, loss, irreducible, rows, data_row, shares, shares_se, args):
    """Each argument is what was measured;  shares, shares_se: {label: (10,)}, {label: float}."""
    print("t                          " + "".join(f"{t:>8}" for t in errors))
    print("E|learned - v|^2 / E|v|^2  " + "".join(f"{error:8.2%}" for error in errors.values()))
    print(f"loss of the last 500 steps {loss:.3f},", end=" ")
    print(f"irreducible {irreducible[0]:.3f} +- {irreducible[1]:.3f} (s.e.)")
    print(f"{args.num_samples} samples    distance to the curve      sliced W_2 to data")
    print(f"data             {data_row['away']:12.4f}", end="              ")
    print(f"{data_row['sliced']:12.4f} +- {data_row['spread']:.4f} (s.d.)")
    for num_steps, row in rows.items():
        print(f"{num_steps:5} steps      {row['away']:12.4f} = {row['away_ratio']:5.2f} x", end=" ")
        print(f"    {row['sliced']:12.4f} = {row['sliced_ratio']:5.2f} x")
    print("share of the points in each tenth of the spiral, from its inner end")
    for label, share in shares.items():
        row = "".join(f"{s:7.3f}" for s in share)
        print(f"{label:17}{row}   +- {shares_se[label]:.3f}")


# ------------------------------------------ The figures -----------------------------------------
plt.switch_backend("agg")  # the figures are files: no window
plt.rcParams.update({"font.size": 12, "axes.titlesize": 12})


def draw_data(x_0, x_1):
    """x_0, x_1: (n, 2)."""
    fig, ax = plt.subplots(figsize=(5, 5), layout="constrained")
    ax.scatter(*x_1.T, s=2, color="C0", label="annulus, $x_1$")
    ax.scatter(*x_0.T, s=2, color="C1", label="spiral, $x_0$")
    ax.set(xlabel="$x$", ylabel="$y$", aspect="equal")
    ax.set_title("The flow is to carry the annulus to the spiral")
    ax.legend(fontsize=10, loc="upper right", markerscale=4)
    return fig


def draw_loss(losses, irreducible):
    """losses: of train;  irreducible: of irreducible_loss."""
    fig, ax = plt.subplots(figsize=(6, 4.5), layout="constrained")
    window = max(1, len(losses) // 50)
    means = np.convolve(losses, np.ones(window) / window, mode="valid")
    steps = np.arange(1, len(losses) + 1)
    ax.semilogy(steps, losses, ".", color="0.8", ms=2, label="loss of each step")
    ax.semilogy(steps[window - 1 :], means, "C0.-", ms=1, label=f"mean of {window} steps")
    value, error = irreducible
    ax.axhspan(value - error, value + error, color="0.7")
    label = f"irreducible part, {value:.2f} $\\pm$ {error:.2f} (s.e.)"
    ax.axhline(value, color="k", ls="--", lw=1.2, label=label)
    ax.set(xlabel="training step", ylabel="flow matching loss")
    ax.set_title("The training loss falls to its irreducible part")
    ax.legend(fontsize=11)
    return fig


def draw_trajectories(paths, velocity, rng, num_paths=300, num_arrows=200):
    """Paths of the learned flow, (num_steps + 1, n, 2), and learned velocities on exact ones."""
    fig, axes = plt.subplots(4, 1, figsize=(5, 19), layout="constrained")
    paths = paths[:, :num_paths]
    axes[0].plot(paths[..., 0], paths[..., 1], color="0.6", lw=0.5)
    axes[0].scatter(*paths[0].T, s=6, color="C0", zorder=3, label="start, $x_1$")
    axes[0].scatter(*paths[-1].T, s=6, color="C1", zorder=3, label="end, $x_0$")
    axes[0].set_title("Paths of the learned flow")
    for ax, t in zip(axes[1:], (0.8, 0.4, 0.05)):
        x_t = draw_x_t(num_arrows, t, rng)
        exact = exact_velocity(x_t, t)
        ax.quiver(*x_t.cpu().T, *exact.T, color="0.65", width=0.011, scale=50, label="exact")
        learned = velocity(x_t, t).cpu()
        ax.quiver(*x_t.cpu().T, *learned.T, color="C0", width=0.003, scale=50, label="learned")
        ax.set_title(f"$v_t$ at t = {t:g} (arrows not to scale)")
    for ax in axes:
        ax.legend(fontsize=10, loc="upper right")
        ax.set(xlabel="$x$", ylabel="$y$", aspect="equal", xlim=(-4.2, 4.2), ylim=(-4.2, 4.2))
    return fig


def draw_shares(shares, shares_se):
    """shares: {label: (10,)};  shares_se: {label: float}."""
    fig, ax = plt.subplots(figsize=(6, 4.8), layout="constrained")
    se = shares_se["data"]
    ax.axhspan(0.1 - 2 * se, 0.1 + 2 * se, color="0.88")
    ax.axhline(0.1, color="k", ls="--", lw=1, label="1/10, and $\\pm$ 2 s.e. of data")
    middles = np.arange(10) + 0.5
    styles = {
        "data": {"fmt": "s", "color": "0.5"},
        "learned velocity": {"fmt": "o", "color": "C0"},
        "exact velocity": {"fmt": "x", "color": "C1"},
    }
    for (label, style), offset in zip(styles.items(), (-0.15, 0, 0.15)):
        style.update(ms=7, mew=1.5, lw=1, label=f"{label} $\\pm$ 2 s.e.")
        ax.errorbar(middles + offset, shares[label], 2 * shares_se[label], **style)
    ax.set(xlabel="tenth of the spiral, from its inner end", ylabel="share of the points")
    ax.set(xticks=range(11), title="Each tenth of the spiral gets its share of the points")
    ax.set_ylim(top=1.12 * ax.get_ylim()[1])
    ax.legend(fontsize=9, ncols=2)
    return fig


def draw_frames(paths, target):
    """The points flow over the faint target.  paths: (num_steps + 1, n, 2).

    Yields one figure again and again, redrawn for the next frame; the last stands for a while.
    """
    fig, ax = plt.subplots(figsize=(4.4, 4.6), layout="constrained")
    ax.plot(*target.T, ".", color="0.85", ms=2)
    dots = ax.scatter(*paths[0].T, s=3, c=paths[0, :, 1], cmap="viridis", zorder=3)
    ax.set(xlabel="$x$", ylabel="$y$", aspect="equal", xlim=(-3.8, 3.8), ylim=(-3.8, 3.8))
    steps = np.unique(np.linspace(0, len(paths) - 1, 36).round().astype(int))
    for k in [*steps, *[steps[-1]] * 10]:
        dots.set_offsets(paths[k])
        ax.set_title(f"t = {1 - k / (len(paths) - 1):.2f}", family="monospace")
        yield fig
        fig.set_layout_engine("none")  # the first frame has found the layout


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


def load(path):
    """The Velocity in a file of save_checkpoint, with its `losses`.  ValueError for other files."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        velocity = Velocity()
        velocity.load_state_dict(saved["network"])
        velocity.losses = saved["losses"]
    except Exception as error:  # torch.load has many for a file that it cannot read
        raise ValueError(f"{path} is not a checkpoint of this script") from error
    return velocity.requires_grad_(False)


def parse_arguments(argv):
    """The options.  Exits with status 2 on what cannot be used."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = partial(parser.add_argument, metavar="X")
    add("--num-steps", type=number(int, 1, 1000), default=200, help="steps of the flow, 1/dt")
    add("--num-samples", type=number(int, 2, 10**6), default=10_000, help="samples of each flow")
    add("--train-steps", type=number(int, 1, 10**6), default=2400, help="steps of the optimizer")
    add("--batch-size", type=number(int, 1, 10**5), default=2048, help="fresh pairs in each")
    add("--learning-rate", type=number(float, 1e-6, 0.1), default=0.01, help="at its largest")
    add("--seed", type=number(int, 0, 2**60), default=0, help="seed of every draw")
    devices = ["cpu"]
    if torch.accelerator.is_available():
        devices.append(torch.accelerator.current_accelerator().type)
    add("--device", choices=devices, default="cpu", help=f"of the network: {' or '.join(devices)}")
    add("--checkpoint", type=Path, help="saves the trained network, or loads it if the file exists")
    add("--figures-dir", type=Path, default=Path(__file__).parent / "figures", help="their folder")
    args = parser.parse_args(argv)
    args.trained = None
    try:
        if args.checkpoint and args.checkpoint.exists():
            args.trained = load(args.checkpoint)
        elif args.checkpoint:
            args.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        args.figures_dir.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        parser.error(f"argument --checkpoint or --figures-dir: {error}")
    return args


def save(figure, path):
    """Writes the figure whole or not at all: drawn in memory, written beside, moved into place."""
    image = io.BytesIO()  # Pillow does not notice a full disk, Python does
    figure.savefig(image, format="jpg", dpi=120)
    part = path.with_suffix(".part")
    part.write_bytes(image.getvalue())
    part.replace(path)
    print(f"wrote {path}")


def save_animation(frames, path, dpi=80):
    """Writes a GIF whole or not at all, as `save` does.  frames: of draw_frames."""
    image = io.BytesIO()
    image.name = path.name  # tells Pillow the format
    writer = PillowWriter(fps=12)
    for k, figure in enumerate(frames):
        if k == 0:
            writer.setup(figure, path, dpi)
        writer.grab_frame()
    writer.outfile = image
    writer.finish()
    part = path.with_suffix(".part")
    part.write_bytes(image.getvalue())
    part.replace(path)
    print(f"wrote {path}")


def save_checkpoint(velocity, losses, path):
    """Writes the network whole or not at all, as `save` does."""
    checkpoint = io.BytesIO()
    torch.save({"network": velocity.state_dict(), "losses": losses}, checkpoint)
    part = path.with_suffix(".part")
    part.write_bytes(checkpoint.getvalue())
    part.replace(path)
    print(f"wrote {path}")


def learn(args):
    """The network and the loss of each step: trained, and saved if asked for; or loaded."""
    if args.trained:
        return args.trained.to(args.device), args.trained.losses
    rng = torch.Generator(args.device).manual_seed(3 * args.seed)
    settings = {"train_steps": args.train_steps, "batch_size": args.batch_size}
    velocity, losses = train(**settings, learning_rate=args.learning_rate, rng=rng)
    if args.checkpoint:
        save_checkpoint(velocity, losses, args.checkpoint)
    return velocity, losses


def main(argv=None):
    """Learns, flows, measures, prints, draws.  Exits with status 2 on bad input."""
    args = parse_arguments(argv)
    torch.set_num_threads(1)  # so small a network gains little from two

    velocity, losses = learn(args)

    data_rng = torch.Generator().manual_seed(3 * args.seed + 1)
    rng = torch.Generator(args.device).manual_seed(3 * args.seed + 2)
    x_0 = spiral(args.num_samples, data_rng)
    x_1 = annulus(args.num_samples, data_rng)
    samples = {}
    for num_steps in sorted({10, 30, args.num_steps}):
        label = f"learned, {num_steps} steps"
        samples[num_steps], drawn = run_flow(velocity, x_1.to(args.device), num_steps, label)
        if num_steps == args.num_steps:
            paths = drawn
    coarse = partial(exact_velocity, spacing=0.02)
    exact_x_0, _ = run_flow(coarse, x_1[:NUM_EXACT], args.num_steps, "exact")

    errors = measure_velocity(velocity, rng)
    irreducible = irreducible_loss(data_rng)
    rows, data_row = measure_samples(samples, data_rng)
    sets = {"data": x_0, "learned velocity": samples[args.num_steps], "exact velocity": exact_x_0}
    shares = {label: shares_along_curve(x) for label, x in sets.items()}
    shares_se = {label: share_error(len(x)) for label, x in sets.items()}

    loss = final_loss(losses)
    report(errors, loss, irreducible, rows, data_row, shares, shares_se, args)

    folder = args.figures_dir
    save(draw_data(x_0[:NUM_DRAWN], x_1[:NUM_DRAWN]), folder / "data.jpg")
    save(draw_loss(losses, irreducible), folder / "train_loss.jpg")
    save(draw_trajectories(paths, velocity, rng), folder / "trajectories.jpg")
    save(draw_shares(shares, shares_se), folder / "shares-along-the-spiral.jpg")
    save_animation(draw_frames(paths, x_0[:NUM_DRAWN]), folder / "scatter.gif")


if __name__ == "__main__":
    main()
