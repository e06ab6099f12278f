"""Experiment 7: what the network predicts: x_{t-dt}, x_0, the noise, v, or a mixture.

The claim
    A sampler needs E[x_0 | x_t]. A network f learns it by least squares from any of the targets
        (x_0 - skip x_t) / factor,    and then    E[x_0 | x_t] = skip x_t + factor f,
    skip and factor being functions of t. All have one optimum. But no network is at it, and what
    counts is the error of its output times the factor. In 2 dimensions the factor decides: near the
    data it is sigma_t for noise and 1 for x_0, and noise is better. In 64 the output decides: x_0
    lies on a plane, noise fills all 64, these networks hand it on badly, and x_0 is better.

The truth beside it
    The denoiser of the roll is known, in 2 dimensions and on a plane in 64. The error is a
    network's excess, its squared distance to that exact denoiser, over the Bayes error, the least
    squared error of any guess of x_0. A sample's twin has the same start and the exact denoiser.

What to look for in figures/
    error-vs-t.jpg   2 dimensions beside 64: the verdict turns round
    why.jpg          x_{t-dt} differs from x_0 by a factor and by noise: which of them does harm?
    samples.jpg      DDIM with each network, in 2 dimensions: lines lead to the twins

Try this
    python prediction_target.py --dimension 4        where between 2 and 64 does it turn?
    python prediction_target.py --train-steps 4500   does training help?    (100 seconds)
    python prediction_target.py --width 256          does a wider network?  (three minutes)
    python prediction_target.py --num-steps 1000     steps of the dt of x_{t-dt}: is it saved?
"""

import math
import os
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile

os.environ["MPLBACKEND"] = "agg"  # figures are files, also from a notebook

import matplotlib.pyplot as plt
import torch
from torch import nn
from tqdm import tqdm

# ------------------------------------------- The data -------------------------------------------
START, END = math.pi / 2, 4 * math.pi  # the angles at which the roll starts and ends
DT = 1 / 1000  # between x_{t-dt} and x_t, and the smallest t


def curve(theta):
    """The Swiss roll at the angles theta, (n,): radius theta / (4 pi).  Returns (n, 2)."""
    direction = torch.stack([theta.cos(), theta.sin()], dim=1)
    return direction * theta[:, None] / (4 * math.pi)


def swiss_roll(n, rng):
    """n draws of x_0: theta uniform on [pi/2, 4 pi], no noise.  rng: a torch Generator.  (n, 2)"""
    return curve(START + (END - START) * torch.rand(n, generator=rng))


def add_noise(x_0, t, sigma_q, rng):
    """x_t = x_0 + N(0, sigma_q^2 t I).  x_0: (n, d);  t: a float or (n, 1).  Returns (n, d)."""
    return x_0 + sigma_q * t**0.5 * torch.randn(x_0.shape, generator=rng)


def chain(n, t, basis, sigma_q, rng):
    """n draws of x_0, x_{t-dt} and x_t: a roll on a plane, and noise in all d dimensions.

    t: a float or (n, 1), DT <= t <= 1;  basis: (d, 2), orthonormal, P on the page.  (n, d) each.
    """
    x_0 = swiss_roll(n, rng) @ basis.T
    x_previous = add_noise(x_0, t - DT, sigma_q, rng)
    return x_0, x_previous, add_noise(x_previous, DT, sigma_q, rng)


# --------------------------------------- The reverse mean ---------------------------------------


def reverse_mean(x_t, t, dt, *, denoiser):
    """E[x_{t-dt} | x_t] from E[x_0 | x_t], eq. (24) of the tutorial.

    Exact for any dt: of the noise x_t - x_0, the last dt brought on average the share dt / t.
    x_t: (n, d), at time t;  0 < dt <= t <= 1;  denoiser(x_t, t) -> (n, d).  Returns (n, d).
    """
    return (dt / t) * denoiser(x_t, t) + (1 - dt / t) * x_t


# A network f that learns (x_0 - skip x_t) / factor gives E[x_0 | x_t] = skip x_t + factor f. Here
# are skip and factor; s is sigma_t, and s_0 the standard deviation of x_0 per coordinate.
# The last three: Ho et al. (2020), Salimans and Ho (2022), Karras et al. (2022).
TARGETS = {
    "x_{t-dt}": lambda t, s, s_0: (1 - t / DT, t / DT),  # eq. (24), solved for E[x_0 | x_t]
    "x_0": lambda t, s, s_0: (0, 1),
    "noise": lambda t, s, s_0: (1, -s),
    "v": lambda t, s, s_0: (1 / (1 + s**2), -s / (1 + s**2) ** 0.5),
    "preconditioned": lambda t, s, s_0: (1 / (1 + (s / s_0) ** 2), s / (1 + (s / s_0) ** 2) ** 0.5),
}


def x_0_from_previous(x_previous, x_t, t):
    """x_t + (t / dt) (x_{t-dt} - x_t): on average x_0, given x_0 and x_t.  (n, d) each.

    Between x_0 and x_t lies a Brownian bridge. Its x_{t-dt} has the mean of eq. (24) with x_0, and
    the variance sigma_q^2 dt (t - dt) / t per coordinate. So this is x_0 and noise of the variance
    sigma_q^2 t (t - dt) / dt, which x_t does not tell: Claim 2.
    """
    return x_t + (t / DT) * (x_previous - x_t)


# What is trained: a row of TARGETS, and whether the noise of the bridge is in the target. The last
# two part what is different in x_{t-dt} and x_0: one has only the factor, the other only the noise.
NETWORKS = {target: (target, target == "x_{t-dt}") for target in TARGETS}
NETWORKS |= {"x_{t-dt}, no noise": ("x_{t-dt}", False), "x_0, with noise": ("x_0", True)}


# ----------------------------------------- The samplers -----------------------------------------


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


# ------------------------------------------- Learning -------------------------------------------
SIGMA_DATA = 0.43  # the standard deviation of the roll, per coordinate of its plane


class Predictor(nn.Module):
    """E[x_0 | x_t] from a ReLU network that learns a row of TARGETS, in d dimensions."""

    def __init__(self, row, sigma_q, d, width):
        super().__init__()
        self.row, self.sigma_q = row, sigma_q
        self.sigma_data = SIGMA_DATA * (2 / d) ** 0.5  # per coordinate of all d
        self.layers = nn.Sequential(
            nn.Linear(d + 1, width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, d),
        )

    def skip_and_factor(self, t):
        """At time t: a float or (n, 1)."""
        return TARGETS[self.row](t, self.sigma_q * t**0.5, self.sigma_data)

    def forward(self, x_t, t):
        """E[x_0 | x_t], learned.  x_t: (n, d);  t: a float or (n, 1), DT <= t <= 1.  (n, d)

        All targets have the same inputs: x_t to unit size, and log(sigma_t) / 2.
        """
        sigma_t = self.sigma_q * t**0.5
        std_t = (sigma_t**2 + self.sigma_data**2) ** 0.5  # of x_t
        log_noise = torch.log(torch.as_tensor(sigma_t)) / 2
        inputs = torch.cat([x_t / std_t, log_noise.expand(len(x_t), 1)], dim=1)
        skip, factor = self.skip_and_factor(t)
        return skip * x_t + factor * self.layers(inputs)


def train(target, *, basis, sigma_q, width, train_steps, rng, batch_size=512, learning_rate=0.01):
    """Plain least squares on a target, a name in NETWORKS, with t log-uniform.

    The error of the output is that of E[x_0 | x_t], over the factor: a target is also a weighting.
    Returns the trained Predictor and the loss of each step.
    """
    row, bridge = NETWORKS[target]
    # nn.Linear draws its weights from torch's own generator: its seed is drawn from ours.
    torch.manual_seed(torch.randint(2**60, (), generator=rng).item())
    denoiser = Predictor(row, sigma_q, len(basis), width)
    optimizer = torch.optim.Adam(denoiser.parameters(), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, train_steps)
    losses = []
    for _ in tqdm(range(train_steps), f"{target}, d = {len(basis)}", disable=None):
        t = DT ** torch.rand(batch_size, 1, generator=rng)
        x_0, x_previous, x_t = chain(batch_size, t, basis, sigma_q, rng)
        clean = x_0_from_previous(x_previous, x_t, t) if bridge else x_0
        _, factor = denoiser.skip_and_factor(t)
        loss = ((denoiser(x_t, t) - clean) / factor).square().sum(dim=1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return denoiser.requires_grad_(False), losses


def train_all(targets, rng, **settings):
    """{target: Predictor}, with the same first weights and the same draws for all."""
    denoisers, state = {}, rng.get_state()
    for target in targets:
        rng.set_state(state)
        denoisers[target], _ = train(target, rng=rng, **settings)
    return denoisers


# ------------------------------------------ The truth -------------------------------------------


def exact_denoiser(x_t, t, *, sigma_q):
    """E[x_0 | x_t]: the average of the curve, weighted by p(theta | x_t), Bayes' rule.

    The posterior of experiment 2, its points at most about sigma_t / 4 apart: the midpoint rule.
    In single precision good to sigma_t / 100 for sigma_t >= 0.002.
    x_t: (n, 2);  t: a float.  Returns (n, 2).
    """
    sigma_t = sigma_q * t**0.5
    num_points = math.ceil(4 * (END - START) / sigma_t) + 20
    theta = START + (END - START) * (torch.arange(num_points) + 0.5) / num_points
    points = curve(theta)
    means = []
    for rows in x_t.split(500):  # (500, num_points) fits in memory
        posterior = (-((torch.cdist(rows, points) / sigma_t) ** 2) / 2).softmax(dim=1)
        means.append(posterior @ points)
    return torch.cat(means)


def exact_on_plane(x_t, t, *, basis, sigma_q):
    """E[x_0 | x_t] in d dimensions: P D(P^T x_t).  Noise off the plane tells nothing.  (n, d)"""
    return exact_denoiser(x_t @ basis, t, sigma_q=sigma_q) @ basis.T


# ------------------------------------------ Measuring -------------------------------------------
TIMES = [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0]


def measure(denoisers, basis, sigma_q, rng, n=10_000):
    """E|f - E[x_0|x_t]|^2 / E|x_0 - E[x_0|x_t]|^2, f learned: the excess over the Bayes error.

    From n draws at each of TIMES.  Returns {target: (len(TIMES),)}, lists.
    """
    shares = {target: [] for target in denoisers}
    for t in TIMES:
        x_0, _, x_t = chain(n, t, basis, sigma_q, rng)
        best = exact_on_plane(x_t, t, basis=basis, sigma_q=sigma_q)
        bayes = (x_0 - best).square().sum(dim=1).mean()
        for target, denoiser in denoisers.items():
            excess = (denoiser(x_t, t) - best).square().sum(dim=1).mean()
            shares[target].append((excess / bayes).item())
    return shares


def sample(denoiser, x_1, num_steps):
    """DDIM from x_1, (n, 2).  Returns x_0, (n, 2)."""
    *_, x_0 = ddim(partial(reverse_mean, denoiser=denoiser), x_1, num_steps)
    return x_0


FAR = 0.1  # the turns of the roll are at least 0.48 apart


def to_twin(x_0, twins):
    """Distances of samples to their twins, (n, 2) each.  Returns (n,)."""
    return torch.hypot(*(x_0 - twins).T)  # a square of what flew off could be too large


# ----------------------------------------- The figures ------------------------------------------
plt.style.use("default")  # the same figures whatever the reader's matplotlibrc says
STYLES = {  # of TARGETS: the symbol, color and marker
    "x_{t-dt}": (r"$x_{t-\Delta t}$", "k", "s"),
    "x_0": ("$x_0$", "#D55E00", "o"),
    "noise": ("noise", "#0072B2", "^"),
    "v": ("$v$", "#56B4E9", "v"),
    "preconditioned": ("preconditioned", "#009E73", "D"),
}


def plot_errors(ax, shares, label, color, **style):
    """shares: of one target, of measure."""
    ax.loglog(TIMES, 100 * torch.tensor(shares), color=color, ms=5, label=label, **style)
    ax.set_xlabel("$t$")
    ax.grid(alpha=0.3)


def draw_errors(in_flat, in_high, d):
    """A panel for 2 dimensions and one for d.  in_flat, in_high: of measure."""
    fig, axes = plt.subplots(1, 2, figsize=(9, 4.6), layout="constrained", sharey=True)
    for ax, shares, dimensions in zip(axes, (in_flat, in_high), (2, d)):
        for target, (symbol, color, marker) in STYLES.items():
            if target in shares:
                plot_errors(ax, shares[target], symbol, color, marker=marker)
        ax.set_title(f"the roll in {dimensions} dimensions")
    axes[0].set_ylabel("excess, % of the Bayes error")
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return fig


def draw_control(in_flat):
    """The factor of x_{t-dt} or not: color.  The noise of the bridge or not: dashes."""
    fig, ax = plt.subplots(figsize=(6, 4.8), layout="constrained")
    for target, label in {
        "x_0": "factor 1, no noise: $x_0$",
        "x_0, with noise": "factor 1, noise",
        "x_{t-dt}, no noise": r"factor $t/\Delta t$, no noise",
        "x_{t-dt}": r"factor $t/\Delta t$, noise: $x_{t-\Delta t}$",
    }.items():
        row, bridge = NETWORKS[target]
        _, color, marker = STYLES[row]
        dashes = {"ls": "--", "mfc": "w"} if bridge else {}
        plot_errors(ax, in_flat[target], label, color, marker=marker, **dashes)
    ax.set(ylabel="excess, % of the Bayes error", title="The factor, and the noise of the bridge")
    ax.legend()
    return fig


def draw_samples(samples, twins):
    """The twins, and each network's samples with lines to the twins that are FAR."""
    fig, axes = plt.subplots(2, 3, figsize=(10, 7.4), layout="constrained")
    axes[0, 0].plot(*twins.T, "o", color="0.4", ms=2, mew=0)
    axes[0, 0].plot([], [], color="0.7", label=f"to the twin, if over {FAR} away")
    axes[0, 0].set_title("the twins: exact denoiser", fontsize=10)
    for ax, (target, x_0) in zip(axes.flat[1:], samples.items()):
        symbol, color, _ = STYLES[target]
        distances = to_twin(x_0, twins)
        near = distances < 10  # the others are out of the picture
        lines = torch.stack([x_0, twins])[:, near & (distances > FAR)][:, :1000]  # (2, k, 2)
        ax.plot(lines[..., 0], lines[..., 1], color="0.7", lw=0.5)
        ax.plot(*x_0[near].T, "o", color=color, ms=2, mew=0)
        ax.set_title(f"{symbol}: median distance {distances.median():.2g}", fontsize=10)
    for ax in axes.flat:
        ax.plot(*curve(torch.linspace(START, END, 300)).T, "k", lw=0.5, label="data", zorder=0)
        ax.set(xlim=(-1.1, 1.1), ylim=(-1.1, 1.1), aspect="equal", xlabel="$x$", ylabel="$y$")
        ax.label_outer()
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return fig


# ------------------------------------------ Running it ------------------------------------------


def options(argv, **knobs):
    """The command line: num_steps=(default, least, largest, meaning) is --num-steps, and so on."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = partial(parser.add_argument, metavar="X")
    add("--figures-dir", type=Path, help="default: figures; with other options, a folder in it")
    for name, (default, least, largest, meaning) in knobs.items():
        text = f"{meaning}: {least:_} to {largest:_}, default {default:_}"
        add(f"--{name.replace('_', '-')}", type=type(default), default=default, help=text)
    args = parser.parse_args(argv)
    for name, (_, least, largest, _) in knobs.items():
        if not least <= (value := getattr(args, name)) <= largest:
            option = name.replace("_", "-")
            parser.error(f"argument --{option}: {value} is not from {least:_} to {largest:_}")
    tried = [f"{name}-{x}" for name, x in vars(args).items() if x != parser.get_default(name)]
    own = Path(__file__).parent / "figures" / "-".join(tried).replace("_", "-")
    args.figures_dir = args.figures_dir or own
    try:
        args.figures_dir.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=args.figures_dir).close()
    except OSError as error:
        parser.error(f"argument --figures-dir: {error}")
    return args


def main(argv=None):
    args = options(
        argv,
        dimension=(64, 2, 256, "of the space that the plane of the roll lies in"),
        width=(64, 1, 256, "units in each hidden layer"),
        num_steps=(100, 1, 1000, "steps of the sampler, 1 / dt"),
        num_samples=(1000, 1, 10**6, "samples of each network"),
        sigma_q=(1.0, 0.1, 100.0, "std of the noise at t = 1, and of the base"),
        train_steps=(1500, 1, 10**6, "steps of the optimizer, for each network"),
        seed=(0, 0, 10**6, "seed of every draw"),
    )
    torch.set_num_threads(1)  # the same bytes on any number of cores, and hardly slower
    rng = torch.Generator().manual_seed(args.seed)
    settings = {"sigma_q": args.sigma_q, "width": args.width, "train_steps": args.train_steps}

    flat = torch.eye(2)
    denoisers = train_all(NETWORKS, rng, basis=flat, **settings)
    in_flat = measure(denoisers, flat, args.sigma_q, rng)

    x_1 = args.sigma_q * torch.randn(args.num_samples, 2, generator=rng)
    twins = sample(partial(exact_denoiser, sigma_q=args.sigma_q), x_1, args.num_steps)
    start = x_1.double()  # what flies off stays finite
    samples = {name: sample(denoisers[name].double(), start, args.num_steps) for name in TARGETS}

    high, _ = torch.linalg.qr(torch.randn(args.dimension, 2, generator=rng))
    denoisers = train_all(list(TARGETS)[1:], rng, basis=high, **settings)
    in_high = measure(denoisers, high, args.sigma_q, rng)

    print(f"{'excess / Bayes error, %; t =':28}" + "".join(f"{t:9}" for t in TIMES) + "  to twin")
    for d, shares in ((2, in_flat), (args.dimension, in_high)):
        for target, row in shares.items():
            line = f"d = {d:<4}{target:20}" + "".join(f"{100 * e:9.3g}" for e in row)
            if shares is in_flat and target in samples:
                line += f"{to_twin(samples[target], twins).median():9.2g}"
            print(line)

    for name, figure in {
        "error-vs-t": draw_errors(in_flat, in_high, args.dimension),
        "why": draw_control(in_flat),
        "samples": draw_samples(samples, twins),
    }.items():
        figure.savefig(args.figures_dir / f"{name}.jpg", dpi=120)
    print(f"figures: {args.figures_dir}")


if __name__ == "__main__":
    main()
