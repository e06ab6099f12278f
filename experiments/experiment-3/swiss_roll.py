"""Experiment 3: a network learns E[x_0 | x_t] on the Swiss roll; DDPM and DDIM sample with it.

The claim
    A fully connected ReLU network is trained by least squares to predict x_0 from
    x_t = x_0 + N(0, sigma_q^2 t I). What it learns is the denoiser E[x_0 | x_t], and eq. (24)
        E[x_{t-dt} | x_t] = (dt / t) E[x_0 | x_t] + (1 - dt / t) x_t
    turns that into the reverse mean, which is all that DDPM and DDIM need.

How well does it learn, and does it matter?
    The data lies on a curve, so E[x_0 | x_t] is an integral along the curve: `exact_denoiser`. Its
    error is the least that any denoiser can have, the Bayes error; what a network has more is its
    excess. Samples are drawn with the network and with the exact denoiser, from two starts:
      the base    N(0, sigma_q^2 I), where sampling starts in practice;
      p_1         the data plus N(0, sigma_q^2 I), where it should start: the base is a little too
                  narrow and off-centre, and DDIM, a fixed map of its start, keeps that error.
    Errors that the exact denoiser makes as well are not due to the network.

What to look for in figures/
    data.jpg                     the curve
    train_loss.jpg               the loss falls to the Bayes error
    learned-vs-exact.jpg         the learned denoiser lies over the exact one
    eval_ddpm_samples.jpg        DDPM from the base and from p_1: the curve, and its last noise
    eval_ddim_samples.jpg        DDIM: on the curve, a few samples between its turns
    error-budget.jpg             distance to the data: base against p_1, learned against exact
    shares-along-the-roll.jpg    how much of the samples lies in each tenth of the roll

Run
    python swiss_roll.py

Try this
    python swiss_roll.py --train-steps 300                        little is learned
    python swiss_roll.py --num-steps 20 --checkpoint roll.pt      few steps; keeps the network
    python swiss_roll.py --num-steps 200 --checkpoint roll.pt     more steps; need not train again
    python swiss_roll.py --sigma-q 4                              a wider base
"""

import argparse
import io
import math
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import nn
from tqdm import tqdm

# ------------------------------------------- The data -------------------------------------------
START, END = math.pi / 2, 4 * math.pi  # the angles at which the roll starts and ends


def curve(theta):
    """The Swiss roll at the angles theta, (n,): radius theta / (4 pi).  Returns (n, 2)."""
    direction = torch.stack([theta.cos(), theta.sin()], dim=1)
    return direction * theta[:, None] / (4 * math.pi)


def swiss_roll(n, rng):
    """n draws of x_0: theta uniform on [pi/2, 4 pi], no noise.  Returns (n, 2).

    rng: a torch Generator; what is drawn lies on its device, here and below.
    """
    theta = START + (END - START) * torch.rand(n, generator=rng, device=rng.device)
    return curve(theta)


def add_noise(x_0, t, sigma_q, rng):
    """x_t = x_0 + N(0, sigma_q^2 t I).  x_0: (n, 2);  t: (n,) or a float.  Returns (n, 2)."""
    sigma_t = sigma_q * torch.as_tensor(t, device=x_0.device).sqrt().reshape(-1, 1)
    return x_0 + sigma_t * torch.randn(x_0.shape, generator=rng, device=rng.device)


# --------------------------------------- The reverse mean ---------------------------------------


def reverse_mean(x_t, t, dt, *, denoiser):
    """E[x_{t-dt} | x_t] from E[x_0 | x_t], eq. (24) of the tutorial.

    x_t: (n, 2) points at time t;  0 < dt <= t <= 1;  denoiser(x_t, t) -> (n, 2).  Returns (n, 2).
    """
    return (dt / t) * denoiser(x_t, t) + (1 - dt / t) * x_t


# ----------------------------------------- The samplers -----------------------------------------
# They know nothing of the data but the function that they are given: reverse_mean(x_t, t, dt).


def ddpm(reverse_mean, x_1, num_steps, sigma_q, rng):
    """Algorithm 1 (DDPM): x_{t-dt} = E[x_{t-dt} | x_t] + N(0, sigma_q^2 dt).

    reverse_mean(x_t, t, dt) -> like x_t;  x_1: draws of the base;  rng: a torch Generator.
    num_steps = 1 / dt >= 1 (0: ZeroDivisionError).
    Yields num_steps arrays like x_1, the last of them x_0.
    """
    x_t, dt = x_1, 1 / num_steps
    for k in range(num_steps, 0, -1):  # t = k dt
        noise = torch.randn(x_t.shape, generator=rng, device=rng.device)
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


# ------------------------------------------- Learning -------------------------------------------
MIN_T = 5e-4  # the smallest t that is learned: the last step of 2000
SIGMA_DATA = 0.5  # about the standard deviation of the data


class Denoiser(nn.Module):
    """A ReLU network that learns E[x_0 | x_t].

    Preconditioned as in Karras et al. (2022, arXiv 2206.00364, section 5 and table 1): c_skip x_t
    is close to the best linear guess of x_0, and c_out is the size of its error. The network learns
    what that guess misses, in units of c_out. So its task has the same size at every t, and at
    small t, where x_t nearly is x_0, it can do little harm.
    """

    def __init__(self, sigma_q, width=64):
        super().__init__()
        self.sigma_q = sigma_q
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

    def forward(self, x_t, t):
        """E[x_0 | x_t], learned.  x_t: (n, 2);  t: (n,) or a float, 0 < t <= 1.  Returns (n, 2)."""
        t = torch.as_tensor(t, dtype=x_t.dtype, device=x_t.device).reshape(-1, 1)
        sigma_t = self.sigma_q * t.sqrt()
        std_t = (sigma_t**2 + SIGMA_DATA**2).sqrt()  # of x_t
        c_in = 1 / std_t
        c_skip = SIGMA_DATA**2 / std_t**2
        c_out = SIGMA_DATA * sigma_t / std_t
        c_noise = sigma_t.log() / 2  # theirs is half of that
        inputs = torch.cat([c_in * x_t, c_noise.expand(len(x_t), 1)], dim=1)
        return c_skip * x_t + c_out * self.layers(inputs)


def losses_of(denoiser, n, sigma_q, rng):
    """The loss of n fresh draws, one by one: |f(x_t, t) - x_0|^2 / c_out^2.  Returns (n,).

    t is log-uniform on [MIN_T, 1], so every scale of the noise is met equally often.
    """
    x_0 = swiss_roll(n, rng)
    t = MIN_T ** torch.rand(n, generator=rng, device=rng.device)
    x_t = add_noise(x_0, t, sigma_q, rng)
    variance_t = sigma_q**2 * t + SIGMA_DATA**2  # of x_t
    c_out_squared = SIGMA_DATA**2 * sigma_q**2 * t / variance_t
    return (denoiser(x_t, t) - x_0).square().sum(dim=1) / c_out_squared


def train(*, sigma_q, train_steps, batch_size, learning_rate, rng):
    """Least squares on fresh samples: Pseudocode 6, with the t and the weights of losses_of.

    rng: a torch Generator; it says the device.
    Returns the trained Denoiser and the loss of each step, a list of floats.
    """
    torch.manual_seed(rng.initial_seed())  # nn.Linear draws its weights from torch's own generator
    denoiser = Denoiser(sigma_q).to(rng.device)
    optimizer = torch.optim.Adam(denoiser.parameters(), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, train_steps)
    losses = []
    for _ in tqdm(range(train_steps), "training", disable=None):
        loss = losses_of(denoiser, batch_size, sigma_q, rng).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return denoiser.requires_grad_(False), losses


# ------------------------------------------- The truth ------------------------------------------
# p(theta | x_t) is proportional to exp(-|x_t - c(theta)|^2 / (2 sigma_t^2)) by Bayes' rule, with
# c(theta) the curve. So E[x_0 | x_t] is the average of c(theta) with that weight: an integral over
# theta, done by Gauss-Legendre quadrature. All of it is in double precision, on the CPU.


def quadrature(sigma_t):
    """Nodes for integrals over theta of what varies on the scale sigma_t along the curve.

    The panels are even in theta^2, which is nearly even in arc length (6.3 in all), and about
    4.5 sigma_t long; each has 16 Gauss-Legendre nodes.
    Returns c(theta) at the nodes, (m, 2), and the logarithms of their weights, (m,), up to a
    constant.
    """
    num_panels = max(2, math.ceil(1.4 / sigma_t))
    nodes, weights = np.polynomial.legendre.leggauss(16)  # on [-1, 1]
    edges = np.linspace(START**2, END**2, num_panels + 1)
    middle = (edges[1:] + edges[:-1]) / 2
    theta = np.sqrt(middle[:, None] + (edges[1] - edges[0]) / 2 * nodes).ravel()
    log_weights = np.log(np.tile(weights, num_panels) / theta)  # dtheta = d(theta^2) / 2 theta
    return curve(torch.tensor(theta)), torch.tensor(log_weights)


def exact_denoiser(x_t, t, *, sigma_q):
    """E[x_0 | x_t], good to 1e-6.  x_t: (n, 2);  t: (n,) or a float, sigma_q sqrt(t) >= 0.002.

    Returns (n, 2), double, on the CPU.
    """
    x_t = x_t.cpu().double()
    variance = sigma_q**2 * torch.as_tensor(t, dtype=torch.double).reshape(-1, 1).expand(
        len(x_t), 1
    )
    c, log_weights = quadrature(float(variance.min()) ** 0.5)
    # The logarithm of the weight is -|x_t - c|^2 / (2 variance), which is
    # (x_t . c - |c|^2 / 2) / variance and a term without c, the same for all nodes: it cancels.
    # That is the product of (x_t, -1) / variance and (c, |c|^2 / 2), for all x_t and c at once.
    rows = torch.cat([x_t, -torch.ones(len(x_t), 1)], dim=1) / variance
    columns = torch.cat([c, c.square().sum(dim=1, keepdim=True) / 2], dim=1).T
    means = []
    for part in rows.split(2**18 // len(c) + 1):  # a few rows at a time, to stay in cache
        p = torch.addmm(log_weights, part, columns).softmax(dim=1)  # log_weights + part @ columns
        means.append(p @ c)
    return torch.cat(means)


# ------------------------------------------- Measuring ------------------------------------------
TIMES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)  # the t at which the denoiser is measured
NUM_DIRECTIONS = 64  # of the sliced distance
NUM_DATA_SETS = 11


def excess_error(denoiser, t, sigma_q, rng, n=20_000):
    """(excess, Bayes error) at time t, from n draws: E|f - E[x_0|x_t]|^2, E|x_0 - E[x_0|x_t]|^2.

    Together they are E|f - x_0|^2, because x_0 - E[x_0|x_t] is uncorrelated with any f(x_t).
    """
    x_0 = swiss_roll(n, rng)
    x_t = add_noise(x_0, t, sigma_q, rng)
    exact = exact_denoiser(x_t, t, sigma_q=sigma_q)
    excess = (denoiser(x_t, t).cpu().double() - exact).square().sum(dim=1).mean()
    bayes = (x_0.cpu().double() - exact).square().sum(dim=1).mean()
    return float(excess), float(bayes)


def measure_denoiser(denoiser, sigma_q, rng):
    """How much larger the denoiser's error is than it has to be, at each of TIMES.

    Returns {t: excess / Bayes error}, their mean under the key "mean", and {t: Bayes error}.
    """
    ratios = {}
    bayes_errors = {}
    for t in TIMES:
        excess, bayes_errors[t] = excess_error(denoiser, t, sigma_q, rng)
        ratios[t] = excess / bayes_errors[t]
    ratios["mean"] = sum(ratios.values()) / len(TIMES)
    return ratios, bayes_errors


def final_loss(losses):
    """Mean loss of the last 500 training steps."""
    return np.mean(losses[-500:])


def bayes_loss(sigma_q, rng, n=40_000):
    """The training loss of the exact denoiser, from n draws, and its standard error."""
    losses = losses_of(partial(exact_denoiser, sigma_q=sigma_q), n, sigma_q, rng)
    return float(losses.mean()), float(losses.std()) / n**0.5


def last(steps, num_steps, label):
    """The last array that a sampler yields, x_0.  label: of the progress bar."""
    for x_t in tqdm(steps, desc=label, total=num_steps, disable=None):
        pass
    return x_t


def draw_starts(data, sigma_q, rng):
    """x_1 from the base and from the true p_1, {start: (n, 2)}.  data: (n, 2), draws of x_0."""
    noise = sigma_q * torch.randn(data.shape, generator=rng, device=rng.device)
    return {"base": noise, "p_1": data + noise}


def sample(denoiser, starts, num_steps, sigma_q, rng, which):
    """Runs both samplers.  starts: {start: x_1, (n, 2)};  which: the denoiser's name.

    Returns {(sampler, start, which): x_0, (n, 2), on the CPU}.
    """
    step_mean = partial(reverse_mean, denoiser=denoiser)
    samples = {}
    for start, x_1 in starts.items():
        x_1 = x_1.to(rng.device)
        steps = ddpm(step_mean, x_1, num_steps, sigma_q, rng)
        samples["DDPM", start, which] = last(steps, num_steps, f"DDPM, {start}, {which}").cpu()
        steps = ddim(step_mean, x_1, num_steps)
        samples["DDIM", start, which] = last(steps, num_steps, f"DDIM, {start}, {which}").cpu()
    return samples


def projections(points):
    """Sorted coordinates of points, (n, 2), along NUM_DIRECTIONS axes.  Returns (directions, n)."""
    angles = math.pi * torch.arange(NUM_DIRECTIONS, dtype=torch.double) / NUM_DIRECTIONS
    directions = torch.stack([angles.cos(), angles.sin()])
    return (points.cpu().double() @ directions).T.contiguous().sort(dim=1).values


def measure_distances(samples, rng):
    """Sliced 2-Wasserstein distance of each set of samples to fresh data (Bonneel et al., 2015).

    On a line the distance W_2 of two sets of n points is simple: the sorted points of one go to
    those of the other. The sliced distance is the root mean square of that over directions.
    samples: {run: x_0, (n, 2)}.  Returns {run: (root mean square distance to NUM_DATA_SETS data
    sets of n points, the same in units of the floor)}, and the floor: the distance between data
    sets, with its standard deviation from pair to pair.
    """
    n = len(next(iter(samples.values())))
    data = [projections(swiss_roll(n, rng)) for _ in range(NUM_DATA_SETS)]
    pairs = torch.stack([(a - b).square().mean() for a, b in zip(data, data[1:])])
    floor = float(pairs.mean().sqrt())
    distances = {}
    for run, x_0 in samples.items():
        seen = projections(x_0)
        squares = torch.stack([(seen - other).square().mean() for other in data])
        distance = float(squares.mean().sqrt())
        distances[run] = distance, distance / floor
    return distances, (floor, float(pairs.sqrt().std()))


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
    """Share of the points in each tenth of the roll's angle, (10,); of the data each is 1/10."""
    tenth = nearest_on_curve(x_0)[1]
    return torch.bincount(tenth, minlength=10).double() / len(x_0)


def blur(x_0):
    """Root mean square distance of the points to the curve; of the data it is 0."""
    return float(nearest_on_curve(x_0)[0].square().mean().sqrt())


def share_error(n):
    """Standard error of a share of 1/10 among n points."""
    return (0.1 * 0.9 / n) ** 0.5


# ------------------------------------------- Printing -------------------------------------------


def report(ratios, bayes_errors, loss, bayes, distances, floor, shares, share_se, blurs, args):
    """ratios, bayes_errors: of measure_denoiser;  loss: of final_loss;  bayes: of bayes_loss;
    distances, floor: of measure_distances;  shares, blurs: {run: (10,)}, {run: float}.
    """
    print("t                        " + "".join(f"{t:>9}" for t in ratios))
    print("Bayes error              " + "".join(f"{e:9.3g}" for e in bayes_errors.values()))
    print("learned: excess over it  " + "".join(f"{ratio:9.3%}" for ratio in ratios.values()))
    print(f"loss of the last 500 steps {loss:.4f},", end=" ")
    print(f"of the exact denoiser {bayes[0]:.4f} +- {bayes[1]:.4f} (s.e.)")
    print(f"{args.num_samples} samples, {args.num_steps} steps", end="       ")
    print("sliced W_2 to data       share in a tenth    distance to the curve (rms)")
    print(f"data                          {floor[0]:.4f} +- {floor[1]:.4f} (s.d.)", end="   ")
    print(f"0.100 +- {share_se:.3f} (s.e.)   0")
    for (sampler, start, which), (distance, ratio) in distances.items():
        run = sampler, start, which
        print(f"{sampler} from {start:<5}{which:>8} denoiser", end="  ")
        print(f"{distance:.4f} = {ratio:5.2f} x data", end="    ")
        print(f"{shares[run].min():.3f} to {shares[run].max():.3f}       {blurs[run]:.4f}")


# ------------------------------------------ The figures -----------------------------------------
plt.switch_backend("agg")  # the figures are files: no window
plt.rcParams.update({"font.size": 12, "axes.titlesize": 12})


def draw_data(data):
    """data: (n, 2)."""
    fig, ax = plt.subplots(figsize=(5, 5), layout="constrained")
    ax.scatter(*data.T, s=3, color="0.3", label="$x_0$")
    ax.set(xlabel="$x$", ylabel="$y$", aspect="equal", title="The data: a Swiss roll, no noise")
    ax.legend(fontsize=10, loc="upper right", markerscale=2)
    return fig


def draw_loss(losses, bayes):
    """losses: of train;  bayes: of bayes_loss."""
    fig, ax = plt.subplots(figsize=(6, 4.5), layout="constrained")
    window = max(1, len(losses) // 50)
    means = np.convolve(losses, np.ones(window) / window, mode="valid")
    steps = np.arange(1, len(losses) + 1)
    ax.semilogy(steps, losses, ".", color="0.8", ms=2, label="loss of each step")
    ax.semilogy(steps[window - 1 :], means, "C0.-", ms=1, label=f"mean of {window} steps")
    label = f"exact denoiser, {bayes[0]:.3f}: no network can beat it"
    ax.axhline(bayes[0], color="k", ls="--", lw=1.2, label=label)
    ax.set(xlabel="training step", ylabel="weighted squared error")
    ax.set_title("The training loss falls to that of the exact denoiser")
    ax.legend(fontsize=11)
    return fig


def draw_denoisers(denoiser, ratios, sigma_q, rng):
    """Lines from x_t to E[x_0 | x_t], learned over exact.  ratios: of measure_denoiser."""
    fig, axes = plt.subplots(3, 1, figsize=(5, 14), layout="constrained")
    for ax, t, num_points in zip(axes, (0.01, 0.1, 1.0), (80, 60, 40)):  # three of TIMES
        x_t = add_noise(swiss_roll(num_points, rng), t, sigma_q, rng)
        ax.plot(*x_t.cpu().T, ".", color="0.3", ms=5, label="$x_t$")
        ax.plot(*curve(torch.linspace(START, END, 300)).T, "k", lw=0.8, label="the data")
        exact = exact_denoiser(x_t, t, sigma_q=sigma_q)
        learned = denoiser(x_t, t)
        for name, x_0, color, size in [("exact", exact, "0.75", 4), ("learned", learned, "C0", 1)]:
            lines = torch.stack([x_t.cpu(), x_0.cpu()])  # (2, num_points, 2)
            ax.plot(lines[..., 0], lines[..., 1], color=color, lw=size)
            ax.plot(*x_0.cpu().T, "o", color=color, ms=size + 2, label=f"$E[x_0|x_t]$, {name}")
        ax.set(xlabel="$x$", ylabel="$y$", aspect="equal")
        ax.set_title(f"t = {t:g}: excess error {ratios[t]:.2%} of the Bayes error")
    fig.legend(*ax.get_legend_handles_labels(), fontsize=11, loc="outside upper center", ncols=2)
    return fig


def draw_samples(sampler, samples, data):
    """A sampler with the learned denoiser over the data, from both starts.  samples: of sample."""
    fig, axes = plt.subplots(2, 1, figsize=(5, 9.6), layout="constrained")
    for ax, start in zip(axes, ("base", "p_1")):
        ax.scatter(*data.T, s=12, color="0.8", label="data")
        ax.scatter(*samples[sampler, start, "learned"].T, s=1.5, color="C0", label="samples")
        name = {"base": "the base", "p_1": "the true $p_1$"}[start]
        ax.set(xlabel="$x$", ylabel="$y$", aspect="equal", title=f"{sampler} from {name}")
        ax.legend(fontsize=10, loc="upper right", markerscale=2)
    return fig


def draw_budget(distances, floor):
    """distances, floor: of measure_distances."""
    fig, ax = plt.subplots(figsize=(6, 5), layout="constrained")
    runs = [("DDPM", "base"), ("DDIM", "base"), ("DDPM", "p_1"), ("DDIM", "p_1")]
    for which, marker in [("learned", "o"), ("exact", "x")]:
        heights = [distances[(*run, which)][0] for run in runs]
        ax.semilogy(range(4), heights, marker, ms=10, mew=2, label=f"{which} denoiser")
    ax.axhspan(floor[0] - floor[1], floor[0] + floor[1], color="0.88")
    label = f"between two data sets: {floor[0]:.4f} $\\pm$ {floor[1]:.4f} (s.d.)"
    ax.axhline(floor[0], color="k", ls="--", lw=1, label=label)
    names = {"base": "base", "p_1": "$p_1$"}
    ax.set_xticks(range(4), [f"{sampler}\nfrom {names[start]}" for sampler, start in runs])
    ax.set(ylabel="sliced $W_2$ to the data", xlim=(-0.5, 3.5))
    ax.set_title("DDIM keeps the base's error; learned or exact is alike")
    ax.legend(fontsize=10)
    return fig


def draw_shares(shares, share_se):
    """shares: {(sampler, start, denoiser): (10,)};  share_se: of share_error."""
    fig, axes = plt.subplots(2, 1, figsize=(6, 7), layout="constrained", sharex=True, sharey=True)
    middles = np.arange(10) + 0.5
    for ax, start in zip(axes, ("base", "p_1")):
        ax.axhspan(0.1 - 2 * share_se, 0.1 + 2 * share_se, color="0.88")
        ax.axhline(0.1, color="k", ls="--", lw=1, label=r"data: 1/10 $\pm$ 2 s.e.")
        for sampler, color, offset in [("DDPM", "C0", -0.1), ("DDIM", "C1", 0.1)]:
            for which, marker in [("learned", "o"), ("exact", "x")]:
                label = f"{sampler}, {which} denoiser"
                share = shares[sampler, start, which]
                ax.plot(middles + offset, share, marker, color=color, ms=7, mew=1.5, label=label)
        name = {"base": "the base: DDIM keeps its error", "p_1": "the true $p_1$"}[start]
        ax.set(ylabel="share of the samples", title=f"From {name}")
    axes[0].legend(fontsize=9, ncols=2)
    axes[0].set_ylim(top=1.15 * axes[0].get_ylim()[1])
    axes[1].set(xlabel="tenth of the roll, from its inner end", xticks=range(11))
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


def load(path):
    """The Denoiser in a file of save_checkpoint, with its `losses`.  ValueError for other files."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        denoiser = Denoiser(saved["sigma_q"])
        denoiser.load_state_dict(saved["network"])
        denoiser.losses = saved["losses"]
    except Exception as error:  # torch.load has many for a file that it cannot read
        raise ValueError(f"{path} is not a checkpoint of this script") from error
    return denoiser.requires_grad_(False)


def parse_arguments(argv):
    """The options.  Exits with status 2 on what cannot be used."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = partial(parser.add_argument, metavar="X")
    add("--num-steps", type=number(int, 1, 2000), default=1000, help="steps of a sampler, 1/dt")
    add("--num-samples", type=number(int, 2, 10**6), default=4000, help="samples per sampler")
    add("--sigma-q", type=number(float, 0.1, 100), default=1.0, help="std of the noise at t = 1")
    add("--train-steps", type=number(int, 1, 10**6), default=8500, help="steps of the optimizer")
    add("--batch-size", type=number(int, 1, 10**5), default=1024, help="fresh draws in each")
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
            if args.trained.sigma_q != args.sigma_q:
                raise ValueError(f"it was trained with --sigma-q {args.trained.sigma_q:g}")
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


def save_checkpoint(denoiser, losses, path):
    """Writes the network whole or not at all, as `save` does."""
    checkpoint = io.BytesIO()
    network = denoiser.state_dict()
    torch.save({"sigma_q": denoiser.sigma_q, "network": network, "losses": losses}, checkpoint)
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
    settings["learning_rate"] = args.learning_rate
    denoiser, losses = train(sigma_q=args.sigma_q, **settings, rng=rng)
    if args.checkpoint:
        save_checkpoint(denoiser, losses, args.checkpoint)
    return denoiser, losses


def main(argv=None):
    """Learns, samples, measures, prints, draws.  Exits with status 2 on bad input."""
    args = parse_arguments(argv)
    torch.set_num_threads(1)  # so small a network gains little from two
    sigma_q, num_steps = args.sigma_q, args.num_steps

    denoiser, losses = learn(args)

    data_rng = torch.Generator().manual_seed(3 * args.seed + 1)
    # Alike, so that on the CPU DDPM has the same noise with both denoisers.
    rng = torch.Generator(args.device).manual_seed(3 * args.seed + 2)
    exact_rng = torch.Generator().manual_seed(3 * args.seed + 2)
    data = swiss_roll(args.num_samples, data_rng)
    starts = draw_starts(data, sigma_q, data_rng)
    exact = partial(exact_denoiser, sigma_q=sigma_q)
    samples = sample(denoiser, starts, num_steps, sigma_q, rng, "learned")
    samples.update(sample(exact, starts, num_steps, sigma_q, exact_rng, "exact"))

    ratios, bayes_errors = measure_denoiser(denoiser, sigma_q, rng)
    bayes = bayes_loss(sigma_q, data_rng)
    distances, floor = measure_distances(samples, data_rng)
    shares = {run: shares_along_curve(x_0) for run, x_0 in samples.items()}
    share_se = share_error(args.num_samples)
    blurs = {run: blur(x_0) for run, x_0 in samples.items()}

    loss = final_loss(losses)
    report(ratios, bayes_errors, loss, bayes, distances, floor, shares, share_se, blurs, args)

    folder = args.figures_dir
    save(draw_data(data), folder / "data.jpg")
    save(draw_loss(losses, bayes), folder / "train_loss.jpg")
    save(draw_denoisers(denoiser, ratios, sigma_q, rng), folder / "learned-vs-exact.jpg")
    save(draw_samples("DDPM", samples, data), folder / "eval_ddpm_samples.jpg")
    save(draw_samples("DDIM", samples, data), folder / "eval_ddim_samples.jpg")
    save(draw_budget(distances, floor), folder / "error-budget.jpg")
    save(draw_shares(shares, share_se), folder / "shares-along-the-roll.jpg")


if __name__ == "__main__":
    main()
