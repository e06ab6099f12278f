"""Experiment 16: one step.  The flow's map instead of its velocity.  Beyond the tutorial.

The claim
    Flow matching (experiment 4) learns a velocity, and few Euler steps with it are wrong. The
    flow's map takes a point at time t to where the flow carries it at time r < t: x + (t - r) u,
    with u(x, t, r) the mean velocity on the way. It needs one step. A network stands for u, trained
    on draws of (x_0, x_1) in one of four ways:
        velocity      u(x_t, t, t) is pulled to v = x_0 - x_1: Pseudocode 4
        consistency   f(x, t) = x + t u(x, t, 0) is pulled to what it is on the same line one level
                      lower, of N levels of t (Song et al. 2023, 2303.01469)
        MeanFlow      u(x_t, t, r) is pulled to v - (t - r) du/dt, the derivative taken along
                      dx/dt = -v, with v = x_0 - x_1 (Geng et al. 2025, 2505.13447)
        distilled     the same, with the learned velocity for v
    Consistency training stops at something else than the map, which is known. MeanFlow's fixed
    point is the map, but its target is as noisy as x_0 - x_1, times the slope of the map; the
    distilled network's target has no noise.

The truth beside it
    In one dimension a flow keeps order, so its map takes quantiles to quantiles: `flow_map`. It
    gives every one-step sample its exact twin. Perfect consistency training gives
        f_k(x) = E[f_{k-1}(x_{t_{k-1}}) | x_{t_k} = x],    f_0(x) = x,    t_k = k / N,
    by quadrature, level by level: `consistent`. So the method's error and the network's are told
    apart. Distances to twins are over 4000 even quantiles of the base: no sampling error.

What to look for in figures/
    idea.jpg    a velocity is the tangent of a trajectory; the map jumps to the trajectory's end
    maps.jpg    x_0 against x_1 for each network, over the exact map and its steep places
    error.jpg   left: more levels in training; right: more steps in sampling

Try this
    python one_step.py --num-levels 2      how good can consistency training be with two levels?
    python one_step.py --num-levels 1000   and with a thousand: whose error is left?
    python one_step.py --more-steps 4000   start at the solution, and go on from data: better?
"""

import copy
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
import torch
from torch import nn
from tqdm import tqdm

# ------------------------------------------- The data -------------------------------------------
# x_0 is one of CENTERS, plus N(0, STD^2), as in experiments 9 and 10; the base is N(0, 1).
WEIGHTS, CENTERS, STD = (0.6, 0.4), (-1.0, 1.0), 0.3


def faults():
    """What the script cannot do with this data, a line each."""
    positive = len(WEIGHTS) > 0 and min(WEIGHTS) > 0 and abs(sum(WEIGHTS) - 1) < 1e-6
    if not (positive and len(WEIGHTS) == len(CENTERS)):
        yield "WEIGHTS: one for each of CENTERS, above 0, of sum 1"
    if not (0 < STD < math.inf and np.ptp(CENTERS) <= 100 * STD):
        yield "CENTERS: at most 100 STD apart, or the grid of `consistent` is too coarse"


def mixture(n, rng):
    """n draws of x_0.  rng: a torch Generator.  Returns (n, 1)."""
    weights, centers = torch.tensor([WEIGHTS, CENTERS], dtype=torch.float32)
    which = torch.multinomial(weights, n, replacement=True, generator=rng)
    return centers[which][:, None] + STD * torch.randn(n, 1, generator=rng)


def between(x_0, x_1, t):
    """x_t on the line from x_0 to x_1: the linear pointwise flow of experiment 4."""
    return t * x_1 + (1 - t) * x_0


def std(t):
    """Of x_t, if its center is known: a number, or like t."""
    return ((1 - t) ** 2 * STD**2 + t**2) ** 0.5


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


def again(f, x_0, noise, t):
    """From x_0 back to time t with fresh noise, and to x_0 again (Song et al., Algorithm 1).

    f(x, t): x_0 from x at time t.  x_0, noise: (n,).  Returns (n,).
    """
    return f(between(x_0, noise, t), t)


# ------------------------------------------- Learning -------------------------------------------
MEAN = sum(w * c for w, c in zip(WEIGHTS, CENTERS))
VARIANCE = sum(w * (c - MEAN) ** 2 for w, c in zip(WEIGHTS, CENTERS)) + STD**2


class MeanVelocity(nn.Module):
    """u(x, t, r), the mean velocity from time t to r <= t; that at t, if r = t."""

    def __init__(self, width=64):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(3, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, 1),
        )

    def forward(self, x, t, r):
        """x, t, r: (n, 1) each.  Returns (n, 1)."""
        z = (x - (1 - t) * MEAN) / ((1 - t) ** 2 * VARIANCE + t**2).sqrt()
        # Scaled up: the map is steep, and small inputs start flat.
        return (1 + VARIANCE) ** 0.5 * self.layers(torch.cat([3 * z, 2 * t, 2 * (t - r)], dim=1))

    def velocity(self, x, t):
        """u(x, t, t)."""
        return self(x, t, t)


def velocity_loss(u, x_0, x_1, rng):
    """Pseudocode 4: the flow's velocity is E[x_0 - x_1 | x_t]."""
    t = torch.rand(x_0.shape, generator=rng)
    return (u(between(x_0, x_1, t), t, t) - (x_0 - x_1)).square().mean()


def consistency_loss(u, x_0, x_1, rng, *, num_levels):
    """Neighbours on a line shall have the same f: the upper is pulled to the lower's."""
    k = torch.randint(1, num_levels + 1, x_0.shape, generator=rng)
    upper, lower = k / num_levels, (k - 1) / num_levels
    zero = torch.zeros_like(upper)
    x_t, x_r = between(x_0, x_1, upper), between(x_0, x_1, lower)
    with torch.no_grad():
        target = x_r + lower * u(x_r, lower, zero)
    return (x_t + upper * u(x_t, upper, zero) - target).square().mean()


def identity_loss(u, x_t, t, r, v):
    """Along the flow x_t + (t - r) u(x_t, t, r) stays: u = v - (t - r) du/dt, dx/dt = -v.

    Row i of u depends on row i of x_t and t alone, so the gradient of the sum of all rows holds
    every row's own derivatives: one reverse pass.
    """
    x_t, t = x_t.requires_grad_(), t.requires_grad_()
    mean_velocity = u(x_t, t, r)
    by_x, by_t = torch.autograd.grad(mean_velocity.sum(), (x_t, t), retain_graph=True)
    target = v - (t - r) * (by_t - v * by_x)
    return (mean_velocity - target.detach()).square().mean()


def two_times(shape, rng):
    """t and r < t, uniform on the triangle: the larger and the smaller of two draws."""
    return torch.rand(2, *shape, generator=rng).sort(dim=0, descending=True).values


def mean_flow_loss(u, x_0, x_1, rng):
    """From data: the identity's right side is linear in v, so x_0 - x_1 stands for its mean v.

    Half of the draws have r = t: there it is the loss of the velocity.
    """
    t, r = two_times(x_0.shape, rng)
    r = torch.where(torch.rand(x_0.shape, generator=rng) < 0.5, t, r)
    return identity_loss(u, between(x_0, x_1, t), t, r, x_0 - x_1)


def distillation_loss(u, x_0, x_1, rng, *, velocity):
    """From a velocity that is known: all of the target is a function of x_t, t and r."""
    t, r = two_times(x_0.shape, rng)
    x_t = between(x_0, x_1, t)
    return identity_loss(u, x_t, t, r, velocity(x_t, t).detach())


def train(loss, *, train_steps, rng, batch_size=512, learning_rate=0.004, start=None):
    """One of the losses above, on fresh pairs of independent x_0 and x_1.

    start: a network whose weights to start from.  Returns the MeanVelocity. Where a target is the
    network's own, the mean loss is no number that must fall: not returned.
    """
    # nn.Linear draws its weights from torch's own generator: its seed is drawn from ours.
    torch.manual_seed(torch.randint(2**60, (), generator=rng).item())
    network = copy.deepcopy(start).requires_grad_() if start else MeanVelocity()
    optimizer = torch.optim.Adam(network.parameters(), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, train_steps)
    for _ in tqdm(range(train_steps), "training", disable=None):
        x_0, x_1 = mixture(batch_size, rng), torch.randn(batch_size, 1, generator=rng)
        optimizer.zero_grad()
        loss(network, x_0, x_1, rng).backward()
        optimizer.step()
        schedule.step()
    return network.requires_grad_(False)


MANY = 100  # levels of the second consistency training


def learn(num_levels, *, train_steps, more_steps, rng):
    """Trains all networks.  Returns {name: network}.

    MeanFlow gets as many pairs as the velocity and the network distilled from it together.
    """
    longer = train_steps + train_steps // 2
    # Half the rate of the others: the worst of five seeds is nearer then (and MeanFlow's farther).
    velocity = train(velocity_loss, train_steps=train_steps, rng=rng, learning_rate=0.002)
    networks = {"velocity": velocity}
    for n, steps in ((num_levels, train_steps), (MANY, longer)):
        loss = partial(consistency_loss, num_levels=n)
        networks[with_levels(n)] = train(loss, train_steps=steps, rng=rng, batch_size=256)
    networks["MeanFlow"] = train(mean_flow_loss, train_steps=longer, rng=rng)
    loss = partial(distillation_loss, velocity=velocity.velocity)
    distilled = train(loss, train_steps=train_steps, rng=rng, batch_size=256, start=velocity)
    networks["distilled"] = distilled
    if more_steps:
        more = train(mean_flow_loss, train_steps=more_steps, rng=rng, start=distilled)
        networks["distilled, then MeanFlow"] = more
    return networks


def with_levels(num_levels):
    """How a consistency network is called."""
    return f"consistency, {num_levels} levels"


# ------------------------------------------ The truth -------------------------------------------


def exact_velocity(x, t):
    """E[x_0 - x_1 | x_t = x]: given the center c, x_0 and x_1 are linear in x - (1 - t) c.

    x: (n, 1);  t: (n, 1) or a number.  Returns (n, 1).
    """
    weights, centers = torch.tensor([WEIGHTS, CENTERS], dtype=x.dtype)
    rest = x - (1 - t) * centers  # (n, number of components)
    odds = (weights.log() - (rest / std(t)) ** 2 / 2).softmax(dim=1)
    each = centers + ((1 - t) * STD**2 - t) / std(t) ** 2 * rest
    return (odds * each).sum(dim=1, keepdim=True)


def log_odds(x, t):
    """log P(x_t <= x) / P(x_t > x): precise in both tails.  x: (n,), float64.  Returns (n,)."""
    weights, centers = torch.tensor([WEIGHTS, CENTERS], dtype=x.dtype)[:, :, None]
    z = (x - (1 - t) * centers) / std(t)
    below, above = (weights.log() + torch.special.log_ndtr(s) for s in (z, -z))
    return below.logsumexp(dim=0) - above.logsumexp(dim=0)


def flow_map(x, t, r):
    """Where the flow takes x from time t to time r: to the same quantile, found by bisection.

    That lies between the least and the largest that it would be in one component.
    x: (n,), float64.  Returns (n,).
    """
    least, largest = min(CENTERS), max(CENTERS)
    odds = log_odds(x, t)
    low = (1 - r) * least + std(r) / std(t) * (x - (1 - t) * largest)
    high = (1 - r) * largest + std(r) / std(t) * (x - (1 - t) * least)
    for _ in range(60):
        middle = (low + high) / 2
        below = log_odds(middle, r) < odds
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2


def grid(t, n=4001):
    """x_t from 8 std below the lowest component to 8 above the highest, (n,)."""
    ends = min(CENTERS) * (1 - t) - 8 * std(t), max(CENTERS) * (1 - t) + 8 * std(t)
    return np.linspace(*ends, n)


def cubic(x, points, values):
    """The cubic through the four values about x.  x: any shape;  points: uniform."""
    place = (x - points[0]) / (points[1] - points[0])
    k = np.clip(place.astype(int), 1, len(points) - 3)
    s = np.clip(place, 0, len(points) - 1) - k
    a, b, c, d = (values[k + shift] for shift in (-1, 0, 1, 2))
    return b + s * (
        c - a / 3 - b / 2 - d / 6 + s * ((a + c) / 2 - b + s * ((d - a) / 6 + (b - c) / 2))
    )


def consistent(x, num_levels, level=None):
    """f_k(x), k = level or num_levels: what perfect consistency training makes of x, (n,).

    Level by level on `grid`. On a line x_r = (r / t) x_t + (1 - r / t) x_0, r / t = 1 - 1 / k, and
    x_0 given x_t is a mixture, too: Gauss and Hermite's nodes for each component.
    """
    nodes, node_weights = np.polynomial.hermite_e.hermegauss(8)
    points = values = grid(0)  # f_0
    for k in range(1, (level if level is not None else num_levels) + 1):
        t = k / num_levels
        x_t, gain = grid(t), (1 - t) * STD**2 / std(t) ** 2
        rests = [x_t - (1 - t) * center for center in CENTERS]
        logits = [np.log(w) - (rest / std(t)) ** 2 / 2 for w, rest in zip(WEIGHTS, rests)]
        total, spread = np.logaddexp.reduce(logits), STD * t / std(t) * nodes[:, None]
        f_k = 0
        for center, rest, logit in zip(CENTERS, rests, logits):
            x_r = (1 - 1 / k) * x_t + (center + gain * rest + spread) / k
            mean = node_weights @ cubic(x_r, points, values) / node_weights.sum()
            f_k = f_k + np.exp(logit - total) * mean
        points, values = x_t, f_k
    return torch.from_numpy(cubic(np.asarray(x), points, values))


# ------------------------------------------ Measuring -------------------------------------------
NUM_STARTS = 4000
STARTS = torch.special.ndtri((torch.arange(NUM_STARTS, dtype=torch.float64) + 0.5) / NUM_STARTS)
# The same as fresh noise: in an order in which pairs of both fill the plane evenly.
FRESH = STARTS[(torch.arange(NUM_STARTS, dtype=torch.float64) * (5**0.5 - 1) / 2 % 1).argsort()]
LEVELS = [1, 2, 5, 10, 20, 50, 100, 200]
STEPS = [1, 2, 5, 10, 20, 50, 200]


def average(x, t, r, *, u):
    """u(x, t, r) for numbers t and r.  x: (n,), float64.  Returns (n,)."""
    x = x.float()[:, None]
    return u(x, torch.full_like(x, t), torch.full_like(x, r))[:, 0].double()


def jump(x, t, *, u):
    """Where u takes x from time t to 0."""
    return x + t * average(x, t, 0, u=u)


def sample(name, u, num_steps, num_levels=None):
    """x_0 from STARTS: Euler steps with the velocity, else jumps of the map.  Returns (n,).

    num_levels: if consistency; its second step starts from fresh noise, at the middle level.
    """
    if num_levels and num_steps == 2:
        f = partial(jump, u=u)
        return again(f, f(STARTS, 1), FRESH, num_levels // 2 / num_levels)
    length = 0 if name == "velocity" else 1 / num_steps

    def velocity(x_t, t):
        return average(x_t, t, t - length, u=u)

    for x_0 in flow(velocity, STARTS, num_steps):
        pass
    return x_0


def perfect(num_levels):
    """What perfect consistency training makes of STARTS in one step, and in two: (n,), (n,)."""

    def f(x, t):
        return consistent(x, num_levels, round(t * num_levels))

    x_0 = f(STARTS, 1)
    return x_0, again(f, x_0, FRESH, num_levels // 2 / num_levels)


def apart(x_0, twins):
    """Root mean square and median distance of x_0 to their twins, (n,) each."""
    distance = (x_0 - twins).abs()
    return distance.square().mean().item() ** 0.5, distance.median().item()


def apart_as_laws(x_0, twins):
    """W_2 of two sets of draws: in one dimension the root mean square over sorted pairs."""
    return apart(x_0.sort().values, twins.sort().values)[0]


def trajectories(num_paths=24, num_times=61):
    """The flow from even quantiles of the base.  Returns times, paths (num_times, num_paths)."""
    times = torch.linspace(1, 0, num_times, dtype=torch.float64)
    starts = STARTS[len(STARTS) // num_paths // 2 :: len(STARTS) // num_paths]
    return times, torch.stack([flow_map(starts, 1, t) for t in times])


# ----------------------------------------- The figures ------------------------------------------
plt.style.use("default")  # the same figures whatever the reader's matplotlibrc says
BLUE, ORANGE, GREEN, PINK = "#0072B2", "#E69F00", "#009E73", "#CC79A7"


def draw_idea(times, paths, euler):
    """Trajectories, with tangents at t = 1 on the left and jumps of the map on the right.

    times: (m,);  paths: (m, n);  euler: (n,), where one Euler step goes from paths[0].
    """
    fig, axes = plt.subplots(1, 2, figsize=(12, 4.4), layout="constrained", sharey=True)
    titles = ("Velocity: one Euler step, along the tangent", "Map: one jump, to the same end")
    for ax, title, ends, color in zip(axes, titles, (euler, paths[-1]), (ORANGE, "k")):
        ax.plot(times, paths, color="0.75", lw=1)
        for start, end in [*zip(paths[0].tolist(), ends.tolist())][2::5]:
            arrow = {"arrowstyle": "-|>", "color": color, "lw": 1.6, "shrinkA": 0, "shrinkB": 0}
            ax.annotate("", xy=(0, end), xytext=(1, start), arrowprops=arrow)
        ax.set(xlim=(1.02, -0.02), xlabel="$t$", title=title)
    axes[0].set_ylabel("$x_t$")
    return fig


def draw_maps(samples, fixed_points, twins):
    """x_0 against x_1, a panel for each network that is a map, over the exact one.

    samples: {name: x_0};  fixed_points: {name: x_0} of perfect consistency training;
    twins: the exact x_0.  (n,) each, of STARTS.
    """
    width = 3.25 * len(samples)
    fig, axes = plt.subplots(1, len(samples), figsize=(width, 4), layout="constrained", sharey=True)
    for ax, (name, x_0) in zip(axes, samples.items()):
        ax.plot(STARTS, twins, "k", lw=1.2, label="the flow's map, exact")
        if name in fixed_points:
            ax.plot(STARTS, fixed_points[name], color="0.6", lw=4, label="perfect training")
        ax.plot(STARTS, x_0, color=BLUE, lw=1.5, label="network")
        ax.set(xlabel="$x_1$", title=name)
        ax.legend(loc="upper left")
    axes[0].set_ylabel("$x_0$")
    return fig


def draw_errors(by_levels, learned, by_steps):
    """RMS distances to twins, against levels in training and against steps in sampling.

    by_levels, learned: {N: RMS} of perfect training, of networks;  by_steps: {name: {N: RMS}}.
    """
    fig, (left, right) = plt.subplots(1, 2, figsize=(12, 4.8), layout="constrained", sharey=True)
    left.loglog(*zip(*by_levels.items()), "k", label="consistency, perfect training")
    left.loglog(*zip(*learned.items()), "o", color=BLUE, label="consistency, network")
    for (name, errors), color, marker in zip(by_steps.items(), (ORANGE, PINK, GREEN), "s^D"):
        right.loglog(*zip(*errors.items()), color=color, marker=marker, label=name)
        if name != "velocity":
            left.axhline(errors[1], color=color, label=name)
    left.set(xlabel="$N$, levels in training", title="One step")
    right.set(xlabel="steps in sampling", title="Along the flow: Euler steps, or jumps of a map")
    left.set_ylabel("RMS distance to exact twins")
    for ax in (left, right):
        ax.grid(alpha=0.3)
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


def report(samples, fixed, twins):
    """A row for each network, one for the map.  samples, fixed: {name: x_0 in one step, in two}."""
    exact = again(partial(flow_map, r=0), twins, FRESH, 0.5)
    kinds = ("one step: RMS", "perfect: RMS")
    rows = [["", *(cell for kind in kinds for cell in (kind, "median", "two steps: W_2"))]]
    for name, x_0s in {**samples, "exact map": (twins, exact)}.items():
        pairs = [x_0s, fixed[name]] if name in fixed else [x_0s]
        cells = [f"{e:.4f}" for x, y in pairs for e in (*apart(x, twins), apart_as_laws(y, twins))]
        rows.append([name, *cells])
    return rows


def main(argv=None):
    args = options(
        argv,
        *faults(),
        num_levels=(20, 1, 1000, "levels of the first consistency training"),
        train_steps=(4000, 1, 10**6, "steps of the optimizer; of two networks, half as many more"),
        more_steps=(0, 0, 10**6, "steps from data, starting at the distilled network"),
        seed=(0, 0, 10**6, "seed of every draw"),
    )
    torch.set_num_threads(1)  # the same bytes on any number of cores, and hardly slower
    rng = torch.Generator().manual_seed(args.seed)

    networks = learn(
        args.num_levels, train_steps=args.train_steps, more_steps=args.more_steps, rng=rng
    )

    twins = flow_map(STARTS, 1, 0)
    levels = {with_levels(n): n for n in (args.num_levels, MANY)}
    fixed = {name: perfect(n) for name, n in levels.items()}
    samples = {
        name: [sample(name, u, steps, levels.get(name)) for steps in (1, 2)]
        for name, u in networks.items()
    }
    by_levels = {
        n: apart(consistent(STARTS, n), twins)[0] for n in sorted({*LEVELS, *levels.values()})
    }
    by_steps = {
        name: {n: apart(sample(name, networks[name], n), twins)[0] for n in STEPS}
        for name in ("velocity", "MeanFlow", "distilled")
    }

    times, paths = trajectories()
    euler = paths[0] + exact_velocity(paths[0][:, None], 1)[:, 0]
    maps = {name: x_0 for name, (x_0, _) in samples.items() if name != "velocity"}
    perfect_maps = {name: x_0 for name, (x_0, _) in fixed.items()}
    learned = {n: apart(maps[name], twins)[0] for name, n in levels.items()}
    for name, figure in {
        "idea": draw_idea(times, paths, euler),
        "maps": draw_maps(maps, perfect_maps, twins),
        "error": draw_errors(by_levels, learned, by_steps),
    }.items():
        figure.savefig(args.figures_dir / f"{name}.jpg", dpi=120)

    table(report(samples, fixed, twins))
    for first, numbers, errors in (
        ("levels", by_levels, {"perfect": by_levels}),
        ("steps", STEPS, by_steps),
    ):
        rows = [[name, *map("{:.4f}".format, rms.values())] for name, rms in errors.items()]
        table([[first, *map(str, numbers)], *rows])
    print(f"figures: {args.figures_dir}")


if __name__ == "__main__":
    main()
