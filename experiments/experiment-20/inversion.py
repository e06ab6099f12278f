"""Experiment 20: there and back.  From an image to its noise: inversion.  Beyond the tutorial.

The claim
    DDIM is a map from noise to data. To edit an image, one looks for the noise that it comes from:
    one runs DDIM backwards, from the image up to the largest noise level, and then back down.
    Does the image come back?
      the slope   DDIM's step from sigma down to sigma' takes the slope of the ODE at sigma. The way
                  up stands at sigma', and takes it there: at the wrong end. So it is not the
                  inverse. The error falls with the number of steps.
      solved      The inverse of a step is x = x' + (sigma - sigma') slope(x, sigma): an equation
                  for x. Solve it at each step, and the image comes back to rounding.
      guidance    Up without guidance (w = 1), down with w = 7.5: these are two ODEs. This is no
                  error of numbers. Do more steps help?

The truth beside it
    On a line, all data N(0, S_U^2) and a class N(0, S_C^2): there and back, in even steps of sigma
    of width h, multiplies x by about
        exp(-h pi ((1 - w)^2 / (4 S_U) + w^2 / (4 S_C) + w (1 - w) / (S_U + S_C))),
    if steps are small and the largest noise level is large.
    In the plane Gaussians, a class each, whose ODE is solved there and back by Runge-Kutta. And on
    the Swiss roll a network: what is inverted is the sampler, whatever it has learned.
    The error is the root mean square distance of what comes back to what was sent.

What to look for in figures/
    round-trip.jpg   which line falls, which is flat, which is rounding?
    paths.jpg        a few points of the class, there and back
    latents.jpg      the noise that was found: would the base have drawn it?

Try this
    python inversion.py --num-steps 200      the pictures with more steps: what is still off?
    python inversion.py --train-steps 300    a bad network: is it harder to invert?
    python inversion.py --off 0.1            points beside the roll: where does their noise lie?
    python inversion.py --w 0                down without a class: what comes back?
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
import torch
from torch import nn
from tqdm import tqdm

# ------------------------------------------- The data -------------------------------------------
# On a line: N(0, S_U^2), unconditional, and its class N(0, S_C^2).
S_U, S_C = 2**0.5, 1.0
# In the plane: Gaussians of std STD, a class each, anywhere and of any number. WEIGHTS are their
# shares; the class that is sent there and back is the first.
ANGLES = 2 * math.pi * torch.arange(8, dtype=torch.double) / 8
CENTERS = torch.stack([ANGLES.cos(), ANGLES.sin()], dim=1)
WEIGHTS = torch.ones(len(CENTERS), dtype=torch.double) / len(CENTERS)
STD = 0.05
# And a curve in the plane, for the network: another curve is another START, END and curve.
START, END = math.pi / 2, 4 * math.pi  # the angles at which the roll starts and ends


def curve(theta):
    """The Swiss roll at the angles theta, (n,): radius theta / (4 pi).  Returns (n, 2)."""
    direction = torch.stack([theta.cos(), theta.sin()], dim=1)
    return direction * theta[:, None] / (4 * math.pi)


THETA = torch.linspace(START, END, 1000)
LINE_SIGMA, PLANE_SIGMA, ROLL_SIGMA = 10.0, 4.0, 1.0  # the largest noise level of each


def faults():
    """What this script cannot do with the data above, a line each."""
    if not all(0 < x < math.inf for x in (S_U, S_C, STD, LINE_SIGMA, PLANE_SIGMA, ROLL_SIGMA)):
        yield "S_U, S_C, STD and the largest noise levels are standard deviations, above 0"
    if 3 * max(S_U, S_C) > LINE_SIGMA:
        yield "LINE_SIGMA must be 3 times S_U and S_C at least: the formula takes it for large"
    if not all(torch.is_tensor(x) and x.dtype == torch.double for x in (CENTERS, WEIGHTS)):
        yield "CENTERS and WEIGHTS are tensors in double precision"
    elif CENTERS.ndim != 2 or CENTERS.shape[1] != 2 or not CENTERS.isfinite().all():
        yield "CENTERS are classes in the plane: (k, 2), finite"
    elif len(WEIGHTS) != len(CENTERS) or min(WEIGHTS) <= 0 or abs(sum(WEIGHTS) - 1) > 1e-6:
        yield "WEIGHTS are positive, one for each of CENTERS, and their sum is 1"
    points = curve(THETA)
    right = points.shape == (len(THETA), 2) and points.isfinite().all() and START < END
    if not right or points.std() == 0:
        yield "curve(theta) must be a curve in the plane, from START up to END"


def of_first_class(n, rng):
    """n draws of x_0 of the first class, (n, 2)."""
    return CENTERS[0] + STD * torch.randn(n, 2, generator=rng, dtype=torch.double)


def swiss_roll(n, rng):
    """n draws of x_0: theta uniform on [START, END], no noise.  rng: a torch Generator.  (n, 2)"""
    return curve(START + (END - START) * torch.rand(n, generator=rng))


def add_noise(x_0, t, sigma_q, rng):
    """x_t = x_0 + N(0, sigma_q^2 t I).  x_0: (n, d);  t: a float or (n, 1).  Returns (n, d)."""
    return x_0 + sigma_q * t**0.5 * torch.randn(x_0.shape, generator=rng)


# ----------------------------------------- The denoiser -----------------------------------------
# As in experiments 8 and 12 a denoiser is a function of x = x_0 + N(0, sigma^2 I) and sigma, the
# sigma_t of the tutorial.


def gaussian_denoiser(x, sigma, *, center, variance):
    """E[x_0 | x] for x_0 ~ N(center, variance I).  x: any shape.  Returns that shape."""
    share = variance / (variance + sigma**2)
    return share * x + (1 - share) * center


def mixture_denoiser(x, sigma):
    """E[x_0 | x] for all classes: that of one, at the mean of the centers.  x: (n, 2)."""
    squares = ((x[:, None] - CENTERS) ** 2).sum(dim=2)  # (n, k)
    posterior = (WEIGHTS.log() - squares / (2 * (STD**2 + sigma**2))).softmax(dim=1)
    return gaussian_denoiser(x, sigma, center=posterior @ CENTERS, variance=STD**2)


def guided(x, sigma, *, data, of_class, w):
    """D_w = D + w (D(.|c) - D).  data, of_class: the denoisers D and D(.|c).  The shape of x."""
    return (1 - w) * data(x, sigma) + w * of_class(x, sigma)


def on_line(w):
    """D_w on the line.  Returns denoiser(x, sigma)."""
    data = partial(gaussian_denoiser, center=0, variance=S_U**2)
    of_class = partial(gaussian_denoiser, center=0, variance=S_C**2)
    return partial(guided, data=data, of_class=of_class, w=w)


def in_plane(w):
    """D_w in the plane, guided to the first class.  Returns denoiser(x, sigma)."""
    of_class = partial(gaussian_denoiser, center=CENTERS[0], variance=STD**2)
    return partial(guided, data=mixture_denoiser, of_class=of_class, w=w)


# ----------------------------------------- The samplers -----------------------------------------
# They know the denoiser, D(x, sigma), and a grid of noise levels: sigmas[0] > ... >= 0. Each yields
# one array a step: ddim on its way down the grid, the two inversions on their way up.


def even_steps(n, sigma_max):
    """Steps of equal length, down to 0.  Returns n + 1 levels."""
    return [sigma_max * k / n for k in range(n, -1, -1)]


def even_ratios(n, sigma_min, sigma_max):
    """Steps of equal ratio, down to sigma_min > 0.  Returns n + 1 levels."""
    return [sigma_min * (sigma_max / sigma_min) ** (k / n) for k in range(n, -1, -1)]


def ddim(denoiser, x, sigmas):
    """Algorithm 2 of the tutorial on any grid: Euler's method.  One evaluation a step.

    lam (E[x_{t-dt} | x_t] - x_t), with eq. (24) put in, is (next_sigma - sigma) (x - D) / sigma.
    """
    for sigma, next_sigma in zip(sigmas, sigmas[1:]):
        slope = (x - denoiser(x, sigma)) / sigma
        x = x + (next_sigma - sigma) * slope
        yield x


def inversion(denoiser, x, sigmas):
    """DDIM backwards: up the grid, each step with the slope at its lower end, where it starts.

    At sigma = 0 the slope is 0, its limit where the data has a density: that step changes nothing.
    """
    levels = [*sigmas][::-1]
    for sigma, next_sigma in zip(levels, levels[1:]):
        if sigma > 0:
            x = x + (next_sigma - sigma) * (x - denoiser(x, sigma)) / sigma
        yield x


def inverse_step(denoiser, x_0, sigma, next_sigma, most=200):
    """The x that DDIM's step from sigma down to next_sigma takes to x_0:  x = goal(x), where
    goal(x) = x_0 + (sigma - next_sigma) (x - D(x, sigma)) / sigma.

    Put goal(x) in the place of x, again and again: that contracts if the step times the slope's
    derivative is below 1. Where it is not, guesses jump to and fro across the solution. So the next
    guess is a mean of the last two goals: the one where, were all linear, miss = goal - x would be
    least (Anderson's method with one past guess).  At most `most` evaluations.
    """
    x, past = x_0, None
    for _ in range(most):
        goal = x_0 + (sigma - next_sigma) * (x - denoiser(x, sigma)) / sigma
        miss = goal - x
        if abs(miss).max() <= 1e-15 * abs(x).max():
            break
        x = goal
        if past is not None:
            change = miss - past[1]
            squares = (change**2).sum(-1, keepdims=True) + 1e-300
            share = ((change * miss).sum(-1, keepdims=True) / squares).clip(0, 1)
            x = goal + share * (past[0] - goal)
        past = goal, miss
    return x


def exact_inversion(denoiser, x, sigmas):
    """Up the grid, each step the inverse of the step of DDIM."""
    levels = [*sigmas][::-1]
    for next_sigma, sigma in zip(levels, levels[1:]):
        x = inverse_step(denoiser, x, sigma, next_sigma)
        yield x


def round_trip(denoiser, x_0, sigmas, back=None, climb=inversion):
    """Up by climb, down by DDIM.  back: the denoiser of the way down, if it is another.

    Returns the latent, which is what is found at sigmas[0], and x_0 again.
    """
    for latent in climb(denoiser, x_0, sigmas):
        pass
    for again in ddim(back or denoiser, latent, sigmas):
        pass
    return latent, again


solved = partial(round_trip, climb=exact_inversion)


# ------------------------------------------- Learning -------------------------------------------
# The network of experiment 3, with less training.
MIN_T = 1 / 2000  # the smallest t that is learned
SIGMA_DATA = curve(THETA).square().mean().item() ** 0.5  # E|x_0|^2 = 2 SIGMA_DATA^2


class Denoiser(nn.Module):
    """A ReLU network that learns E[x_0 | x_t].

    Preconditioned as in Karras et al. (2022, arXiv 2206.00364, table 1): of all multiples of x_t,
    c_skip x_t is the best guess of x_0, whatever the data, and c_out the size of its error, per
    coordinate. The network learns what that guess misses, in units of c_out.
    """

    def __init__(self, sigma_q):
        super().__init__()
        self.sigma_q, width = sigma_q, 64
        self.layers = nn.Sequential(
            nn.Linear(3, width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, 2),
        )

    def preconditioning(self, t):
        """c_skip, c_out, c_in, c_noise at time t: a float or (n, 1)."""
        sigma_t = self.sigma_q * t**0.5
        std_t = (sigma_t**2 + SIGMA_DATA**2) ** 0.5  # of x_t
        c_noise = torch.log(torch.as_tensor(sigma_t)) / 2  # theirs is half of this
        return (SIGMA_DATA / std_t) ** 2, SIGMA_DATA * sigma_t / std_t, 1 / std_t, c_noise

    def forward(self, x_t, t):
        """E[x_0 | x_t], learned.  x_t: (n, 2);  t: a float or (n, 1), 0 < t <= 1.  (n, 2)"""
        c_skip, c_out, c_in, c_noise = self.preconditioning(t)
        inputs = torch.cat([c_in * x_t, c_noise.expand(len(x_t), 1)], dim=1)
        return c_skip * x_t + c_out * self.layers(inputs)


def train(*, train_steps, rng):
    """As in experiment 3.  Returns the trained Denoiser, in double precision."""
    # nn.Linear draws its weights from torch's own generator: its seed is drawn from ours.
    torch.manual_seed(torch.randint(2**60, (), generator=rng).item())
    denoiser = Denoiser(ROLL_SIGMA)
    optimizer = torch.optim.Adam(denoiser.parameters(), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, train_steps)
    for _ in tqdm(range(train_steps), "training", disable=None):
        x_0 = swiss_roll(1024, rng)
        t = MIN_T ** torch.rand(1024, 1, generator=rng)
        x_t = add_noise(x_0, t, ROLL_SIGMA, rng)
        _, c_out, _, _ = denoiser.preconditioning(t)
        loss = ((denoiser(x_t, t) - x_0) / c_out).square().sum(dim=1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return denoiser.requires_grad_(False).double()


def learned(x, sigma, *, network):
    """The network as a denoiser of x and sigma: sigma = ROLL_SIGMA sqrt(t)."""
    return network(x, (sigma / ROLL_SIGMA) ** 2)


# ------------------------------------------ The truth -------------------------------------------


def factor(w, num_steps, *, s_u, s_c, sigma_max):
    """What there and back on the line multiplies x by, in even steps, if these are short.

    At sigma the slope is g x, with g = sigma ((1 - w) / (s_u^2 + sigma^2) + w / (s_c^2 + sigma^2)).
    Up multiplies by 1 + h g, taken at the lower ends, down by 1 - h g, at the upper ones: together
    prod (1 - h^2 g^2) = exp(-h int g^2). The last 1 - h g has no partner. For a large sigma_max it
    is 1 - h / sigma_max: the tail of the integral, whose upper end is so infinity.
    """
    integral = (1 - w) ** 2 / (4 * s_u) + w**2 / (4 * s_c) + w * (1 - w) / (s_u + s_c)
    return math.exp(-sigma_max / num_steps * math.pi * integral)


def ode(denoiser, x, sigmas):
    """Where the ODE takes x along the levels sigmas, up or down, by the classic Runge-Kutta method.

    In u = log sigma it is dx/du = x - D.  All levels above 0.
    """
    for sigma, next_sigma in zip(sigmas, sigmas[1:]):
        h, middle = math.log(next_sigma / sigma), (sigma * next_sigma) ** 0.5
        k_1 = x - denoiser(x, sigma)
        k_2 = x + h / 2 * k_1 - denoiser(x + h / 2 * k_1, middle)
        k_3 = x + h / 2 * k_2 - denoiser(x + h / 2 * k_2, middle)
        k_4 = x + h * k_3 - denoiser(x + h * k_3, next_sigma)
        x = x + h / 6 * (k_1 + 2 * k_2 + 2 * k_3 + k_4)
    return x


# ------------------------------------------ Measuring -------------------------------------------
LINE_COUNTS, STEP_COUNTS, ODE_COUNT = [15, 50, 200, 1000], [15, 50, 200], 300  # numbers of steps


def measured_factor(w, num_steps):
    """What there and back on the line multiplies by."""
    x_0 = torch.ones(1, dtype=torch.double)
    return round_trip(on_line(w), x_0, even_steps(num_steps, LINE_SIGMA))[1].item()


def apart(x, other):
    """Root mean square distance, (n, 2) each."""
    return ((x - other) ** 2).sum(dim=1).mean().item() ** 0.5


def paths(climb, there, back, x_0, sigmas):
    """Whole runs, starts included: the way up by climb, an inversion, and the way down."""
    up = torch.stack([x_0, *climb(there, x_0, sigmas)])
    return up, torch.stack([up[-1], *ddim(back, up[-1], sigmas)])


def size(latent, sigma_max):
    """The root mean square of latents, (n, 2), over that of the base."""
    return apart(latent, 0 * latent) / (2**0.5 * sigma_max)


def measure(there, back, x_0, sigma_min, sigma_max, name):
    """There and back with each of STEP_COUNTS: {"plain" or "solved": [error]}, [size].

    there, back: the denoisers.  The size: of the latents of plain inversion.
    """
    errors, sizes = {"plain": [], "solved": []}, []
    for num_steps in tqdm(STEP_COUNTS, name, disable=None):
        sigmas = even_ratios(num_steps, sigma_min, sigma_max)
        latent, again = round_trip(there, x_0, sigmas, back)
        errors["plain"].append(apart(again, x_0))
        errors["solved"].append(apart(solved(there, x_0, sigmas, back)[1], x_0))
        sizes.append(size(latent, sigma_max))
    return errors, sizes


def measure_ode(there, back, x_0, sigma_min, sigma_max):
    """As measure, by the two ODEs themselves: the error and the size."""
    sigmas = even_ratios(ODE_COUNT, sigma_min, sigma_max)
    latent = ode(there, x_0, sigmas[::-1])
    return apart(ode(back, latent, sigmas), x_0), size(latent, sigma_max)


# ----------------------------------------- The figures ------------------------------------------
plt.style.use("default")  # the same figures whatever the reader's matplotlibrc says
BLUE, ORANGE, PINK, SKY = "#0072B2", "#E69F00", "#CC79A7", "#56B4E9"
COLORS = {"no guidance": ORANGE, "one way": PINK, "both ways": SKY, "network": BLUE}


def draw_round_trip(factors, errors, limit, w):
    """Three panels.  factors: {w: [measured]};  errors: {run: of measure};  limit: by the ODEs."""
    fig, (line, plane, roll) = plt.subplots(1, 3, figsize=(12, 4.8), layout="constrained")
    low, high = math.log(min(LINE_COUNTS) / 1.5), math.log(max(LINE_COUNTS) * 1.5)
    steps = torch.linspace(low, high, 60).exp().tolist()
    for (w_line, found), color, name in zip(factors.items(), (ORANGE, SKY), ("formula", None)):
        law = [1 - factor(w_line, n, s_u=S_U, s_c=S_C, sigma_max=LINE_SIGMA) for n in steps]
        line.loglog(steps, law, color="k", lw=1, label=name)
        lost = [abs(1 - x) for x in found]
        line.loglog(LINE_COUNTS, lost, "o", color=color, label=f"plain, $w$ = {w_line:g}")
    line.set(title="on a line", ylabel="what is lost: 1 - factor")
    line.legend()
    for run, found in errors.items():
        ax = roll if run == "network" else plane
        for method, marker, ls in ("plain", "o", "-"), ("solved", "s", ":"):
            style = {"color": COLORS[run], "marker": marker, "ls": ls, "ms": 5}
            ax.loglog(STEP_COUNTS, found[method], label=f"{run}, {method}", **style)
    plane.axhline(limit, color="k", ls="--", lw=1, label="one way, by the ODEs")
    plane.set(title=f"{len(CENTERS)} Gaussians, guidance {w:g}", ylim=(1e-17, 10))
    plane.set_ylabel("RMS distance of what comes back")
    roll.set(title="a network", ylim=(1e-17, 10))
    for ax in fig.axes:
        ax.set_xlabel("steps each way")
        counts = LINE_COUNTS if ax is line else STEP_COUNTS
        ax.set_xticks(counts, counts)
        ax.set_xticks([], minor=True)
        ax.grid(alpha=0.3)
    handles = [ax.get_legend_handles_labels() for ax in (plane, roll)]
    fig.legend(*map(sum, zip(*handles), ([], [])), loc="outside lower center", ncols=5)
    return fig


def draw_paths(line, plane, sigmas, w):
    """Up in grey, down in color.

    line: {method: (up, down)}, (steps + 1, m), drawn against sigmas at the lowest levels;
    plane: (up, down), (steps + 1, m, 2), there without guidance, back with w.
    """
    fig, axes = plt.subplots(1, 3, figsize=(12, 4.4), layout="constrained")
    low = math.ceil(0.4 * len(sigmas)) + 1  # how many levels: higher up the two are alike
    for ax, (method, (up, down)) in zip(axes, line.items()):
        ax.plot(sigmas[-low:], up[:low].flipud(), "o-", color="0.6", lw=3, ms=6)
        ax.plot(sigmas[-low:], down[-low:], "o-", color=ORANGE, lw=1.2, ms=3)
        ax.set(title=f"on a line, $w$ = 1, {method}", xlabel=r"noise level $\sigma$", ylabel="$x$")
        ax.invert_xaxis()
    up, down = plane
    axes[2].plot(*CENTERS.T, "+", color="k", ms=8)
    axes[2].plot(*up.permute(2, 0, 1), color="0.6", lw=3)
    axes[2].plot(*down.permute(2, 0, 1), "o-", color=PINK, lw=1.2, ms=3)
    axes[2].set(title=f"up $w$ = 1, down $w$ = {w:g}, solved", xlabel="$x$", ylabel="$y$")
    axes[2].set(aspect="equal")
    fig.suptitle("Up (grey) and down (color)")
    return fig


def draw_latents(latents, base):
    """The latents of each guidance over the base.  latents: {title: ((n, 2), color)}."""
    size = (4.5 * len(latents), 4.6)
    fig, axes = plt.subplots(1, len(latents), figsize=size, layout="constrained", squeeze=False)
    for ax, (title, (latent, color)) in zip(axes[0], latents.items()):
        ax.plot(*latent.T, ".", color=color, ms=3, label="found")
        ax.plot(*base.T, ".", color="0.3", ms=1.5, label="draws of the base")
        ax.set(title=title, xlabel="$x$", ylabel="$y$", aspect="equal")
        ax.legend(fontsize=8)
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


def report(factors, errors, sizes, odes, w):
    """Two lists of rows for table."""
    line = [["on a line, x comes back times", *map(str, LINE_COUNTS)]]
    for w_line, found in factors.items():
        line.append([f"w = {w_line:g}", *(f"{x:.4f}" for x in found)])
        law = [factor(w_line, n, s_u=S_U, s_c=S_C, sigma_max=LINE_SIGMA) for n in LINE_COUNTS]
        line.append(["  formula", *(f"{x:.4f}" for x in law)])
    names = {
        "no guidance": "w = 1",
        "one way": f"up w = 1, down w = {w:g}",
        "both ways": f"w = {w:g}",
        "network": "network",
    }
    plane = [["distance of what comes back", *map(str, STEP_COUNTS), "ODE"]]
    for run, found in errors.items():
        limit = [f"{odes[run][0]:.2g}"] if run in odes else []
        plane.append([names[run], *(f"{x:.2g}" for x in found["plain"]), *limit])
        plane.append(["  solved", *(f"{x:.2g}" for x in found["solved"])])
    for run in ("no guidance", "both ways"):
        found = [*sizes[run], odes[run][1]]
        plane.append([f"size of latents, {names[run]}", *(f"{x:.3g}" for x in found)])
    return line, plane


def main(argv=None):
    args = options(
        argv,
        *faults(),
        num_steps=(15, 1, 1000, "steps each way, in the pictures of paths and latents"),
        num_samples=(200, 1, 10**5, "points that are sent"),
        w=(7.5, 0.0, 20.0, "guidance"),
        off=(0.0, 0.0, 1.0, "std of what is added to points of the curve before they are sent"),
        train_steps=(2000, 1, 10**6, "steps of the optimizer"),
        seed=(0, 0, 10**6, "seed of every draw"),
    )
    torch.set_num_threads(1)  # the same bytes on any number of cores, and hardly slower
    rng = torch.Generator().manual_seed(args.seed)
    network = partial(learned, network=train(train_steps=args.train_steps, rng=rng))

    x_class = of_first_class(args.num_samples, rng)
    x_roll = add_noise(swiss_roll(args.num_samples, rng), args.off**2, 1, rng).double()
    plain, guidance = in_plane(1), in_plane(args.w)
    plane = (x_class, STD / 25, PLANE_SIGMA)
    runs = {
        "no guidance": (plain, plain, *plane),
        "one way": (plain, guidance, *plane),
        "both ways": (guidance, guidance, *plane),
        "network": (network, network, x_roll, ROLL_SIGMA * MIN_T**0.5, ROLL_SIGMA),
    }
    factors = {w: [measured_factor(w, n) for n in LINE_COUNTS] for w in (1, args.w)}
    errors, sizes, odes = {}, {}, {}
    for name, run in runs.items():
        errors[name], sizes[name] = measure(*run, name)
        if name != "network":
            odes[name] = measure_ode(*run)

    few = torch.linspace(-2, 2, 5, dtype=torch.double)
    levels = even_steps(args.num_steps, LINE_SIGMA)
    climbs = {"plain": inversion, "solved": exact_inversion}
    line = {
        method: paths(climb, on_line(1), on_line(1), few, levels)
        for method, climb in climbs.items()
    }
    sigmas = even_ratios(args.num_steps, *plane[1:])
    apart_ways = paths(exact_inversion, plain, guidance, x_class[:6], sigmas)
    latents = {
        "$w$ = 1": (round_trip(plain, x_class, sigmas)[0], ORANGE),
        f"$w$ = {args.w:g}": (round_trip(guidance, x_class, sigmas)[0], SKY),
    }
    base = PLANE_SIGMA * torch.randn(args.num_samples, 2, generator=rng)

    for name, figure in {
        "round-trip": draw_round_trip(factors, errors, odes["one way"][0], args.w),
        "paths": draw_paths(line, apart_ways, levels, args.w),
        "latents": draw_latents(latents, base),
    }.items():
        figure.savefig(args.figures_dir / f"{name}.jpg", dpi=120)
    for rows in report(factors, errors, sizes, odes, args.w):
        table(rows)
    print(f"figures: {args.figures_dir}")


if __name__ == "__main__":
    main()
