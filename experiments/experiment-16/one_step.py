"""Experiment 16: one step.  The flow's map instead of its velocity.  Beyond the tutorial.

The claim
    Flow matching (experiment 4) learns a velocity, and few Euler steps with it are wrong. The
    flow's map takes a point at time t to where the flow carries it at time r < t: x + (t - r) u,
    with u(x, t, r) the mean velocity on the way. It needs one step, and it can be learned without
    following the flow. A network stands for u. Three losses, on draws of (x_0, x_1):
        velocity      u(x_t, t, t) is pulled to v = x_0 - x_1: Pseudocode 4
        consistency   f(x, t) = x + t u(x, t, 0) is pulled to what it is on the same line one level
                      lower, of N levels of t (Song et al. 2023, 2303.01469)
        MeanFlow      u(x_t, t, r) is pulled to v - (t - r) du/dt, the derivative taken along the
                      line, dx/dt = -v (Geng et al. 2025, 2505.13447)
    MeanFlow's fixed point is the map. Consistency training's is not, and is known.

The truth beside it
    In one dimension a flow keeps order, so its map takes quantiles to quantiles: `flow_map`. It
    gives every one-step sample its exact twin. Perfect consistency training gives
        f_k(x) = E[f_{k-1}(x_{t_{k-1}}) | x_{t_k} = x],    f_0(x) = x,    t_k = k / N,
    by quadrature, level by level: `consistent`. So the method's error and the network's are told
    apart. Distances to twins are over 4000 even quantiles of the base: no sampling error.

What to look for in figures/
    maps.jpg    x_0 against x_1: one Euler step goes to the mean of the data; the map has a steep
                place, and consistency training rounds it off as its fixed point does
    error.jpg   the fixed point's error falls slowly with N, and networks lie near it

Try this
    python one_step.py --num-levels 2      even perfect training is off by .60
    python one_step.py --num-levels 1000   perfect training is off by .04; is the network?
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
import torch
from torch import nn
from tqdm import tqdm

# ------------------------------------------- The data -------------------------------------------
# x_0 ~ .6 N(-1, .3^2) + .4 N(1, .3^2), as in experiments 9 and 10; the base is N(0, 1).
WEIGHTS, CENTERS, STD = (0.6, 0.4), (-1.0, 1.0), 0.3


def mixture(n, rng):
    """n draws of x_0.  rng: a torch Generator.  Returns (n, 1)."""
    upper = torch.rand(n, 1, generator=rng) < WEIGHTS[1]
    return torch.where(upper, CENTERS[1], CENTERS[0]) + STD * torch.randn(n, 1, generator=rng)


def between(x_0, x_1, t):
    """x_t on the line from x_0 to x_1: the linear pointwise flow of experiment 4."""
    return t * x_1 + (1 - t) * x_0


# ------------------------------------------- Learning -------------------------------------------


class Network(nn.Module):
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
        # Scaled up: the map is steep, and small inputs start flat.
        return self.layers(torch.cat([3 * x, 2 * t, 2 * (t - r)], dim=1))


def jump(u, x, t, r):
    """Where u takes x from time t to time r, numbers: x + (t - r) u.  x: (n, 1)."""
    return x + (t - r) * u(x, torch.full_like(x, t), torch.full_like(x, r))


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


def mean_flow_loss(u, x_0, x_1, rng):
    """Along the flow x_t + (t - r) u(x_t, t, r) stays: u = v - (t - r) du/dt.

    The right side is linear in v, so x_0 - x_1 may stand for its mean v. Half of the draws have
    r = t: there it is the loss above.
    """
    t, r = torch.rand(2, *x_0.shape, generator=rng).sort(dim=0, descending=True).values
    r = torch.where(torch.rand(x_0.shape, generator=rng) < 0.5, t, r)
    v = x_0 - x_1
    along = (-v, torch.ones_like(t), torch.zeros_like(r))
    mean_velocity, change = torch.func.jvp(u, (between(x_0, x_1, t), t, r), along)
    target = (v - (t - r) * change).detach()
    return (mean_velocity - target).square().mean()


def train(loss, *, train_steps, rng, batch_size=512, learning_rate=0.004):
    """One of the losses above, on fresh pairs of independent x_0 and x_1.  Returns the Network.

    Where a target is the network's own, the mean loss is no number that must fall: not returned.
    """
    # nn.Linear draws its weights from torch's own generator: its seed is drawn from ours.
    torch.manual_seed(torch.randint(2**60, (), generator=rng).item())
    network = Network()
    optimizer = torch.optim.Adam(network.parameters(), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, train_steps)
    for _ in tqdm(range(train_steps), "training", disable=None):
        x_0, x_1 = mixture(batch_size, rng), torch.randn(batch_size, 1, generator=rng)
        optimizer.zero_grad()
        loss(network, x_0, x_1, rng).backward()
        optimizer.step()
        schedule.step()
    return network.requires_grad_(False)


# ------------------------------------------ The truth -------------------------------------------


def cdf(x, t):
    """P(x_t <= x): x_t is a mixture about (1 - t) CENTERS.  x: (n,), float64.  Returns (n,)."""
    std = math.hypot((1 - t) * STD, t)
    parts = [torch.special.ndtr((x - (1 - t) * center) / std) for center in CENTERS]
    return WEIGHTS[0] * parts[0] + WEIGHTS[1] * parts[1]


def flow_map(x, t, r):
    """Where the flow takes x from time t to time r: to the same quantile, found by bisection.

    x: (n,), float64, |x| < 6.  Returns (n,).
    """
    p = cdf(x, t)
    low, high = torch.full_like(x, -8), torch.full_like(x, 8)
    for _ in range(50):
        middle = (low + high) / 2
        below = cdf(middle, r) < p
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2


def posterior_nodes(x, t, num_nodes=20):
    """x_0 given x_t = x: two Gaussians.  Returns nodes and weights, (2 num_nodes, n) each."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(num_nodes)
    variance = 1 / (1 / STD**2 + (1 - t) ** 2 / t**2)
    marginal = (1 - t) ** 2 * STD**2 + t**2
    means, logits = [], []
    for weight, center in zip(WEIGHTS, CENTERS):
        means.append(variance * (center / STD**2 + (1 - t) * x / t**2))
        logits.append(math.log(weight) - (x - (1 - t) * center) ** 2 / (2 * marginal))
    odds = np.exp(logits - np.max(logits, axis=0))
    odds /= odds.sum(axis=0)
    x_0 = [mean + variance**0.5 * node for mean in means for node in nodes]
    return np.array(x_0), np.array([p * w for p in odds for w in weights / weights.sum()])


GRID = np.linspace(-7, 7, 7001)  # of x


def consistent(x_1, num_levels):
    """f_N(x_1), N = num_levels: what perfect consistency training makes of x_1, (n,).

    Level by level on GRID; on a line x_r = (r / t) x_t + (1 - r / t) x_0, r / t = 1 - 1 / k.
    """
    values = GRID  # f_0
    for k in range(1, num_levels + 1):
        x_0, weights = posterior_nodes(GRID, k / num_levels)
        x_r = (1 - 1 / k) * GRID + x_0 / k
        values = (weights * np.interp(x_r, GRID, values)).sum(axis=0)
    return torch.from_numpy(np.interp(x_1, GRID, values))


# ------------------------------------------ Measuring -------------------------------------------
NUM_STARTS = 4000
STARTS = torch.special.ndtri((torch.arange(NUM_STARTS, dtype=torch.float64) + 0.5) / NUM_STARTS)
LEVELS = [1, 2, 5, 10, 20, 50, 100, 200]
EULER_STEPS = [1, 2, 4, 10, 50]


def euler(u, x_1, x_t, t, r):
    """With the velocity: Pseudocode 5."""
    return x_t + (t - r) * u(x_t, torch.full_like(x_t, t), torch.full_like(x_t, t))


def consistency(u, x_1, x_t, t, r):
    """To x_0, and back towards the same x_1 as far as r: not where the flow is, if r > 0."""
    return between(jump(u, x_t, t, 0), x_1, r)


def mean_flow(u, x_1, x_t, t, r):
    """With the map, from t to r."""
    return jump(u, x_t, t, r)


def sample(step, u, x_1, num_steps):
    """x_0 from x_1, (n,), by one of the three steps above.  Returns (n,)."""
    x_1 = x_t = x_1.float()[:, None]
    for k in range(num_steps, 0, -1):
        x_t = step(u, x_1, x_t, k / num_steps, (k - 1) / num_steps)
    return x_t[:, 0].double()


def consistency_name(num_levels):
    """How a consistency network is called."""
    return f"consistency, {num_levels} levels"


def learn(num_levels, *, train_steps, rng):
    """Trains all networks, for consistency one more with 100 levels: {name: (network, step)}."""
    methods = {"velocity": (velocity_loss, euler)}
    for n in (num_levels, 100):
        loss = partial(consistency_loss, num_levels=n)
        methods[consistency_name(n)] = loss, consistency
    methods["MeanFlow"] = mean_flow_loss, mean_flow
    networks = {}
    for name, (loss, step) in methods.items():
        networks[name] = train(loss, train_steps=train_steps, rng=rng), step
    return networks


def errors(x_0, twins):
    """Root mean square and median distance of x_0 to their twins, (n,) each."""
    apart = (x_0 - twins).abs()
    return apart.square().mean().item() ** 0.5, apart.median().item()


# ----------------------------------------- The figures ------------------------------------------
plt.style.use("default")  # the same figures whatever the reader's matplotlibrc says
BLUE, ORANGE, PINK = "#0072B2", "#E69F00", "#CC79A7"


def draw_maps(samples, fixed_points, twins):
    """x_0 against x_1, a panel for each network, over the exact map.

    samples: {name: x_0};  fixed_points: {name: x_0} of perfect consistency training;
    twins: the exact x_0.  (n,) each, of STARTS.
    """
    fig, axes = plt.subplots(1, len(samples), figsize=(13, 4), layout="constrained", sharey=True)
    for ax, (name, x_0) in zip(axes, samples.items()):
        ax.plot(STARTS, twins, "k", lw=1.2, label="the flow's map, exact")
        if name in fixed_points:
            ax.plot(STARTS, fixed_points[name], color="0.6", lw=4, label="perfect training")
        ax.plot(STARTS, x_0, color=BLUE, lw=1.5, label="network")
        ax.set(xlabel="$x_1$", title=name)
        ax.legend(loc="upper left")
    axes[0].set_ylabel("$x_0$")
    return fig


def draw_errors(by_levels, by_euler, one_step):
    """RMS distances to twins.  by_levels, by_euler: {N: RMS};  one_step: {name: RMS}."""
    fig, ax = plt.subplots(figsize=(7, 4.8), layout="constrained")
    ax.loglog(*zip(*by_levels.items()), "k", label="consistency, perfect training, one step")
    marked = {n: one_step[name] for n in by_levels if (name := consistency_name(n)) in one_step}
    ax.loglog(*zip(*marked.items()), "o", color=BLUE, label="consistency, network, one step")
    ax.axhline(one_step["MeanFlow"], color=PINK, label="MeanFlow, network, one step")
    ax.loglog(*zip(*by_euler.items()), "s--", color=ORANGE, label="velocity, network, Euler")
    ax.set(xlabel="$N$: levels in training; steps of Euler", ylabel="RMS distance")
    ax.set_title("Distance of samples to their exact twins")
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


def network_rows(samples, perfect, twins):
    """A row for each network, one for the map.  samples: {name: (x_0 in one step, in two)}."""
    half = between(twins, STARTS, 0.5)  # where `consistency` goes on with the exact map
    samples = {**samples, "exact map, as consistency": (twins, flow_map(half, 0.5, 0))}
    rows = [["", "RMS", "median", "two steps: RMS", "median", "perfect, one step: RMS", "median"]]
    for name, x_0s in samples.items():
        fixed = [perfect[name]] if name in perfect else []
        numbers = [f"{e:.4f}" for x_0 in [*x_0s, *fixed] for e in errors(x_0, twins)]
        rows.append([name, *numbers, *[""] * (6 - len(numbers))])
    return rows


def main(argv=None):
    args = options(
        argv,
        num_levels=(20, 1, 1000, "levels of the first consistency training"),
        train_steps=(8000, 1, 10**6, "steps of the optimizer, for each network"),
        seed=(0, 0, 10**6, "seed of every draw"),
    )
    torch.set_num_threads(1)  # the same bytes on any number of cores, and hardly slower
    rng = torch.Generator().manual_seed(args.seed)

    networks = learn(args.num_levels, train_steps=args.train_steps, rng=rng)

    twins = flow_map(STARTS, 1, 0)
    fixed = {n: consistent(STARTS, n) for n in sorted({*LEVELS, args.num_levels})}
    perfect = {consistency_name(n): x_0 for n, x_0 in fixed.items()}
    samples = {
        name: [sample(step, network, STARTS, n) for n in (1, 2)]
        for name, (network, step) in networks.items()
    }
    one_step = {name: x_0 for name, (x_0, _) in samples.items()}
    network, _ = networks["velocity"]
    by_euler = {n: errors(sample(euler, network, STARTS, n), twins)[0] for n in EULER_STEPS}
    by_levels = {n: errors(x_0, twins)[0] for n, x_0 in fixed.items()}

    table(network_rows(samples, perfect, twins))
    for name, by in ("Euler steps", by_euler), ("levels, perfect", by_levels):
        table([[name, *map(str, by)], ["RMS", *(f"{error:.4f}" for error in by.values())]])

    draw_maps(one_step, perfect, twins).savefig(args.figures_dir / "maps.jpg", dpi=120)
    rms = {name: errors(x_0, twins)[0] for name, x_0 in one_step.items()}
    draw_errors(by_levels, by_euler, rms).savefig(args.figures_dir / "error.jpg", dpi=120)
    print(f"figures: {args.figures_dir}")


if __name__ == "__main__":
    main()
