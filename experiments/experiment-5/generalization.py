"""Experiment 5: trained on N points of the Swiss roll, a network memorises them, or generalises.

The claim
    Of all functions, the training loss on points a_1, ..., a_N is least for the denoiser of these
    points,
        D_N(x_t, t) = sum_i p(x_0 = a_i | x_t) a_i,
    the posterior of experiment 2 with N equal weights: `empirical_denoiser`. With it, and small
    steps, DDIM returns training points and nothing else. It has memorised them. Section 3.7 of the
    tutorial says that networks do better because they fail to be this minimiser, and figure 6 there
    shows the paths of DDIM for N = 10, 20, 40.

Memorised or generalised, in numbers
    The points are drawn from a curve, and the denoiser D of the whole curve is an integral:
    `exact_denoiser`. So both ends are known, and the network f is measured against each at the same
    x_t, in units of the distance between the two:
        |f - D_N|^2 / |D_N - D|^2        0 if it has memorised, 1 if it is D
        |f - D|^2 / |D_N - D|^2          1 if it has memorised, 0 if it is D
    Its training loss has two marks. The floor is the loss of D_N. The Bayes loss is the loss of D
    on fresh data, the least that is possible on points never seen. A training loss far below it, as
    for N <= 40, means that the network knows its points, and not only the roll. A little below it
    can be the chance of the points.
    Samples have one: the share of copies, which lie on a training point, beside that share for
    fresh data, which come near one by chance. It tells something for N <= 40. For more points, "on"
    is finer than what the network's samples miss the roll by, on average.

What to look for in figures/
    trajectories.jpg      from 10 points the network's paths are nearly the minimiser's; from 40
                          points some end between training points
    which-denoiser.jpg    with few points the network is near the minimiser at large t, and leaves
                          it at small t, towards the denoiser of the roll
    error-vs-n.jpg        in the mean over t the network is better than the minimiser until N is so
                          large that its own error is what is left; copies: nearly all of the
                          samples for N = 10, two thirds for N = 40

Run
    python generalization.py

Try this
    python generalization.py --train-steps 200     stopped early: fewer copies, at N = 10 less error
    python generalization.py --train-steps 6000    trained longer: more copies, at N = 10 more error
    python generalization.py --num-steps 100       coarse steps: even the minimiser copies less
"""

import argparse
import io
import math
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.collections import LineCollection
from matplotlib.colors import PowerNorm
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
# It knows nothing of the data but the function that it is given: reverse_mean(x_t, t, dt).


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
MIN_T = 5e-4  # the smallest t that is learned
SIGMA_DATA = 0.5  # about the standard deviation of the data


class Denoiser(nn.Module):
    """A ReLU network of three hidden layers, as the tutorial's, that learns E[x_0 | x_t].

    Preconditioned as in Karras et al. (2022, arXiv 2206.00364, section 5 and table 1). The best
    linear guess of x_0 is c_skip x_t, and c_out is the size of its error. The network learns what
    that guess misses, in units of c_out. So its task has the same size at every t.
    """

    def __init__(self, sigma_q, width=128):
        super().__init__()
        self.sigma_q = sigma_q
        self.layers = nn.Sequential(
            nn.Linear(3, width),
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
        c_noise = sigma_t.log() / 2
        inputs = torch.cat([c_in * x_t, c_noise.expand(len(x_t), 1)], dim=1)
        return c_skip * x_t + c_out * self.layers(inputs)


def training_draws(points, n, sigma_q, rng):
    """What the network is trained on: n of the points, with noise.  points: (N, 2).

    t is log-uniform on [MIN_T, 1]: every scale of the noise is met as often. The points are drawn
    again and again, the noise is always fresh.  Returns x_0, (n, 2), t, (n,), and x_t, (n, 2).
    """
    x_0 = points[torch.randint(len(points), (n,), generator=rng)]
    t = MIN_T ** torch.rand(n, generator=rng)
    return x_0, t, add_noise(x_0, t, sigma_q, rng)


def weighted_squares(a, b, t, sigma_q):
    """|a - b|^2 / c_out^2 one by one, as in the loss.  a, b: (n, 2);  t: (n,).  Returns (n,)."""
    weight = 1 / (sigma_q**2 * t) + 1 / SIGMA_DATA**2  # 1 / c_out^2
    return weight * (a - b).square().sum(dim=1)


def train(points, *, sigma_q, train_steps, batch_size, learning_rate, rng):
    """Least squares on the points alone (Pseudocode 6).  points: (N, 2);  rng: a torch Generator.

    Returns the trained Denoiser and the loss of each step, a list of floats.
    """
    torch.manual_seed(rng.initial_seed())  # nn.Linear draws its weights from torch's own generator
    denoiser = Denoiser(sigma_q)
    optimizer = torch.optim.Adam(denoiser.parameters(), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, train_steps)
    losses = []
    for _ in tqdm(range(train_steps), f"training on {len(points)} points", disable=None):
        x_0, t, x_t = training_draws(points, batch_size, sigma_q, rng)
        loss = weighted_squares(denoiser(x_t, t), x_0, t, sigma_q).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return denoiser.requires_grad_(False), losses


# ------------------------------------------- The truth ------------------------------------------
# There are two. If x_0 is one of the training points, p(x_0 = a_i | x_t) is proportional to
# exp(-|x_t - a_i|^2 / (2 sigma_t^2)) by Bayes' rule, and E[x_0 | x_t] is the average of the a_i
# with that weight. If x_0 is anywhere on the roll, it is the average of c(theta), the curve, with
# the same weight: an integral over theta, done by Gauss-Legendre quadrature. Both are in double
# precision.


def empirical_denoiser(x_t, t, *, points, sigma_q):
    """E[x_0 | x_t] when x_0 is each of the points with probability 1 / N: the memorising minimiser.

    It is what the training loss is least for: at every x_t and t the best guess of x_0 is its mean.
    x_t: (n, 2);  t: (n,) or a float, > 0;  points: (N, 2).  Returns (n, 2), double.
    """
    points = points.double()
    t = torch.as_tensor(t, dtype=torch.double)
    variance = sigma_q**2 * t.reshape(-1, 1).expand(len(x_t), 1)
    # |x_t|^2 is the same for all points, and cancels in the softmax (experiment 2's `posterior`)
    rows = torch.cat([x_t.double(), -torch.ones(len(x_t), 1)], dim=1) / variance
    columns = torch.cat([points, points.square().sum(dim=1, keepdim=True) / 2], dim=1).T
    few = 2**17 // len(points) + 1  # rows at a time, to stay in cache
    return torch.cat([(part @ columns).softmax(dim=1) @ points for part in rows.split(few)])


def quadrature(sigma_t):
    """Nodes for integrals over theta of what varies on the scale sigma_t along the curve.

    The panels are even in theta^2, which is nearly even in arc length (6.3 in all), and about
    4.5 sigma_t long; each has 16 Gauss-Legendre nodes.
    Returns c(theta) at the nodes, (m, 2), and the logarithms of their weights, (m,), but for a
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


def roll_length():
    """Arc length of the roll: the integral of sqrt(1 + theta^2) / (4 pi) from START to END."""
    ends = [(x * math.hypot(1, x) + math.asinh(x)) / 2 for x in (START, END)]
    return (ends[1] - ends[0]) / (4 * math.pi)


# ------------------------------------------- Measuring ------------------------------------------
NUM_POINTS = (10, 20, 40, 160, 640, 2560)  # N: each training set holds the smaller ones
COMPARED = (10, 40, 640)  # those whose denoisers are printed and drawn at each t
TIMES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)  # the t at which the denoisers are compared
COPY = 0.1  # a sample is a copy if it is nearer to a training point than this part of the spacing
NUM_FRESH = 4000  # points never trained on, for what is measured on fresh data
NUM_DRAWN = 60  # trajectories kept whole, for the figure


def mean(values):
    """Mean of values, (n,), and its standard error: two floats."""
    return float(values.mean()), float(values.std()) / len(values) ** 0.5


def ratio(above, below):
    """mean(above) / mean(below), (n,) each, and each draw's share in the error of the ratio, (n,).

    To first order the ratio r errs as the mean of (above - r below) / mean(below) does, so the
    standard error of that mean is the ratio's.
    """
    r = above.mean() / below.mean()
    return float(r), (above - r * below) / below.mean()


def measure_losses(denoiser, points, sigma_q, rng, n=40_000):
    """Training loss, its floor, and how far the one is above the other, each with standard error.

    The floor is the loss of the minimiser D_N. As D_N is the conditional mean of x_0, the loss is
    the floor plus the mean of |f - D_N|^2 / c_out^2, which has much less chance in it than the
    difference of the two.  Returns {"loss", "floor", "above"}: (mean, s.e.), from n draws.
    """
    x_0, t, x_t = training_draws(points, n, sigma_q, rng)
    learned = denoiser(x_t, t)
    minimiser = empirical_denoiser(x_t, t, points=points, sigma_q=sigma_q)
    return {
        "loss": mean(weighted_squares(learned, x_0, t, sigma_q)),
        "floor": mean(weighted_squares(minimiser, x_0, t, sigma_q)),
        "above": mean(weighted_squares(learned, minimiser, t, sigma_q)),
    }


def measure_bayes_loss(sigma_q, rng, n=40_000):
    """The loss of the roll's own denoiser on n fresh points, and its standard error."""
    x_0, t, x_t = training_draws(swiss_roll(n, rng), n, sigma_q, rng)
    exact = exact_denoiser(x_t, t, sigma_q=sigma_q)
    return mean(weighted_squares(exact, x_0, t, sigma_q))


def measure_denoiser(denoiser, points, x_0, sigma_q, rng):
    """The network f, the minimiser D_N and the roll's denoiser D at the same x_t.

    x_0: (n, 2), the points to which noise is added.  Returns {t: distances} for t in TIMES, with
    distances {"D_N": |f - D_N|^2, "D": |f - D|^2, "apart": |D_N - D|^2,
    "bayes": |x_0 - D|^2}, (n,) each.
    """
    rows = {}
    for t in TIMES:
        x_t = add_noise(x_0, t, sigma_q, rng)
        learned = denoiser(x_t, t)
        minimiser = empirical_denoiser(x_t, t, points=points, sigma_q=sigma_q)
        exact = exact_denoiser(x_t, t, sigma_q=sigma_q)
        pairs = {
            "D_N": (learned, minimiser),
            "D": (learned, exact),
            "apart": (minimiser, exact),
            "bayes": (x_0, exact),
        }
        rows[t] = {name: (a - b).square().sum(dim=1) for name, (a, b) in pairs.items()}
    return rows


def in_units(rows):
    """Both distances of the network in units of |D_N - D|^2, at each t.  rows: of measure_denoiser.

    The unit is the mean of |D_N - D|^2 over the rows' own x_t: another one on training points.
    Returns {"D_N", "D": [(ratio, s.e.) for each of TIMES]}.
    """
    units = {"D_N": [], "D": []}
    for row in rows.values():
        for name, pairs in units.items():
            value, moves = ratio(row[name], row["apart"])
            pairs.append((value, mean(moves)[1]))
    return units


def mean_excess(rows, name):
    """Excess error in units of the Bayes error, E|x_0 - D|^2 at each t: mean over TIMES, and s.e.

    rows: of measure_denoiser on fresh data;  name: "D" for the network, "apart" for D_N.
    """
    pairs = [ratio(row[name], row["bayes"]) for row in rows.values()]
    moves = sum(moves for _, moves in pairs) / len(pairs)  # of one x_0, at every t
    return sum(value for value, _ in pairs) / len(pairs), mean(moves)[1]


def sample_paths(denoiser, x_1, num_steps, label):
    """Runs DDIM from x_1, (n, 2).  label: of the progress bar.

    Returns x_0, (n, 2), and the first trajectories, (num_steps + 1, NUM_DRAWN, 2).
    """
    steps = ddim(partial(reverse_mean, denoiser=denoiser), x_1, num_steps)
    paths = [x_1[:NUM_DRAWN]]
    for x_t in tqdm(steps, label, num_steps, disable=None):
        paths.append(x_t[:NUM_DRAWN].float())
    return x_t, torch.stack(paths)


def nearest(x, points):
    """Distance of each x to the nearest of the points, good to 1e-7.  Returns (n,), double."""
    points = points.double()
    return torch.cat([torch.cdist(part, points).amin(dim=1) for part in x.double().split(500)])


def measure_samples(x_0, points):
    """Where samples lie.  x_0: (n, 2);  points: (N, 2), those of training.

    Returns {"point": distance to the nearest training point, "roll": to the roll, good to 2e-4,
    "copies": share nearer to a training point than COPY times the spacing, which is the length of
    the roll over N}: (mean, s.e.).
    """
    line = curve(torch.linspace(START, END, 20_001, dtype=torch.double))
    to_point = nearest(x_0, points)
    copied = to_point < COPY * roll_length() / len(points)
    return {"point": mean(to_point), "roll": mean(nearest(x_0, line)), "copies": mean(1.0 * copied)}


def measure_training_set(network, points, x_1, fresh, num_steps, sigma_q, rng):
    """The network beside the minimiser of its training points, and beside fresh data.

    points: (N, 2);  x_1: (n, 2), starts of DDIM;  fresh: (m, 2), data that it has never seen.
    Returns {"losses": of measure_losses; "excess": {"network", "minimiser": of mean_excess};
    "fresh", "training": of in_units, the noise being added to fresh data or to training points;
    "samples": {"network", "minimiser", "data": of measure_samples}; "paths": {"network",
    "minimiser": trajectories of sample_paths}}.
    """
    seen = points[torch.randint(len(points), (len(fresh),), generator=rng)]
    on_fresh = measure_denoiser(network, points, fresh, sigma_q, rng)
    on_seen = measure_denoiser(network, points, seen, sigma_q, rng)
    minimiser = partial(empirical_denoiser, points=points, sigma_q=sigma_q)
    x_0 = {"data": fresh}
    paths = {}
    for name, denoiser in [("network", network), ("minimiser", minimiser)]:
        label = f"DDIM, {len(points)} points, {name}"
        x_0[name], paths[name] = sample_paths(denoiser, x_1, num_steps, label)
    network_excess = mean_excess(on_fresh, "D")
    return {
        "losses": measure_losses(network, points, sigma_q, rng),
        "excess": {"network": network_excess, "minimiser": mean_excess(on_fresh, "apart")},
        "fresh": in_units(on_fresh),
        "training": in_units(on_seen),
        "samples": {name: measure_samples(x, points) for name, x in x_0.items()},
        "paths": paths,
    }


# ------------------------------------------- Printing -------------------------------------------


def side_by_side(pairs, digits, scale=1):
    """(value, standard error) pairs as text, side by side."""
    texts = [f"{scale * value:.{digits}f} +- {scale * se:.{digits}f}" for value, se in pairs]
    return "".join(f"{text:>19}" for text in texts)


def report(results, bayes, args):
    """results: {N: of measure_training_set};  bayes: of measure_bayes_loss."""
    print(
        f"sigma_q = {args.sigma_q:g}; {args.train_steps} training steps of {args.batch_size} draws"
    )
    print(f"{args.num_samples} samples by DDIM, {args.num_steps} steps; +- is the standard error")
    print("   N      training loss   floor: minimiser   loss above floor")
    for n, result in results.items():
        pairs = [result["losses"][name] for name in ("loss", "floor", "above")]
        print(f"{n:4}{side_by_side(pairs, 4)}")
    print(f"Bayes loss, the least loss on fresh data:{side_by_side([bayes], 4)}")

    print("          excess error, % of the Bayes error                     share of copies, %")
    print("   N            network          minimiser", end="")
    print("            network          minimiser         fresh data")
    for n, result in results.items():
        excess = [result["excess"][name] for name in ("network", "minimiser")]
        copies = [result["samples"][name]["copies"] for name in ("network", "minimiser", "data")]
        print(f"{n:4}{side_by_side(excess, 2, 100)}{side_by_side(copies, 1, 100)}")

    print("            distance to the roll                distance to the nearest training point")
    print("   N            network          minimiser", end="")
    print("            network          minimiser         fresh data")
    for n, result in results.items():
        samples = result["samples"]
        to_roll = [samples[name]["roll"] for name in ("network", "minimiser")]
        to_point = [samples[name]["point"] for name in ("network", "minimiser", "data")]
        print(f"{n:4}{side_by_side(to_roll, 5)}{side_by_side(to_point, 5)}")

    print("squared distance of the network to the minimiser, D_N, and to the roll's denoiser, D;")
    print(
        "x_t: training points or fresh data, with noise; unit |D_N - D|^2 there; "
        "0.401(3): 0.401 +- 0.003"
    )
    print("   N                t =" + "".join(f"{t:>11g}" for t in TIMES))
    rows = [("D_N", "training"), ("D_N", "fresh"), ("D", "fresh")]
    for n in COMPARED:
        for name, where in rows:
            pairs = results[n][where][name]
            cells = [f"{value:.3f}({math.ceil(1000 * se)})" for value, se in pairs]
            print(f"{n:4}  to {name:<3}, {where:<8} " + "".join(f"{cell:>11}" for cell in cells))


# ------------------------------------------ The figures -----------------------------------------
plt.switch_backend("agg")  # the figures are files: no window
plt.rcParams.update({"font.size": 12, "axes.titlesize": 12})


def draw_paths(results, roll):
    """Paths of DDIM for three N: the network's, and the minimiser's from the same starts.

    results: {N: of measure_training_set};  roll: (n, 2), of which the first N are trained on.
    Drawn are the three quarters of the trajectories that start nearest to 0.
    """
    size = {"figsize": (5.8, 10.6), "layout": "constrained"}
    fig, axes = plt.subplots(3, 2, sharex=True, sharey=True, **size)
    line = curve(torch.linspace(START, END, 400))
    color = {"cmap": "viridis", "norm": PowerNorm(0.5, 0, 1)}
    for row, n in zip(axes, NUM_POINTS):
        for ax, name in zip(row, ("network", "minimiser")):
            paths = results[n]["paths"][name]
            num_steps = len(paths) - 1
            inner = paths[0].norm(dim=1).argsort()[: 3 * NUM_DRAWN // 4]  # so the roll is large
            # few of the steps, even in sigma_t: the segments are of like length
            parts = num_steps * (1 - np.linspace(1, 0, 80) ** 2)
            shown = np.unique(parts.round().astype(int))
            t = np.tile(1 - shown[1:] / num_steps, len(inner))
            paths = paths[shown][:, inner].transpose(0, 1)
            segments = torch.stack([paths[:, :-1], paths[:, 1:]], dim=2).reshape(-1, 2, 2)
            shade = ax.add_collection(LineCollection(segments, array=t, lw=1, **color))
            ax.plot(*line.T, color="0.75", lw=1.2, zorder=0, label="the roll")
            ax.plot(
                *roll[:n].T, "o", color="C1", ms=8, mfc="none", mew=1.5, label="training points"
            )
            ax.plot(*paths[:, -1].T, "k.", ms=4.5, label="samples")
            share, _ = results[n]["samples"][name]["copies"]
            ax.set(aspect="equal", title=f"{n} points, {name}:\n{share:.0%} copies")
    for ax in axes[:, 0]:
        ax.set_ylabel("$y$")
    for ax in axes[-1]:
        ax.set_xlabel("$x$")
    ticks = [0, 0.01, 0.1, 0.3, 0.6, 1]
    bar = fig.colorbar(shade, ax=axes, label="$t$", location="bottom", aspect=40, pad=0.01)
    bar.set_ticks(ticks, labels=[f"{tick:g}" for tick in ticks])
    handles = axes[0, 0].get_legend_handles_labels()
    fig.legend(*handles, loc="outside lower center", ncols=3, fontsize=11)
    fig.suptitle("Of ten points the network makes copies;\nof forty it begins to fill the gaps")
    return fig


def draw_which(results):
    """At each t, which of the two exact denoisers the network is near.

    results: {N: of measure_training_set}.
    """
    size = {"figsize": (6, 10.5), "layout": "constrained"}
    fig, axes = plt.subplots(3, 1, sharex=True, sharey=True, **size)
    for ax, n in zip(axes, COMPARED):
        for where, name, style, label in [
            ("fresh", "D", "C0o-", "to $D$, the roll's denoiser"),
            ("fresh", "D_N", "C1s-", "to $D_N$, the memorising minimiser"),
            ("training", "D_N", "C1s:", "to $D_N$, at training points + noise, in the unit there"),
        ]:
            values, errors = np.array(results[n][where][name]).T
            face = {"fresh": None, "training": "w"}[where]
            ax.errorbar(TIMES, values, errors, fmt=style, ms=6, mfc=face, lw=1.5, label=label)
        ax.axhline(1, color="k", ls="--", lw=1)
        ax.set(xscale="log", yscale="log", title=f"{n} training points")
        ax.set_ylabel("squared distance of $f$,\nunit $|D_N - D|^2$")
        ax.grid(alpha=0.3)
    axes[-1].set_xlabel("$t$")
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", fontsize=11)
    fig.suptitle("At small t the network fails to be the minimiser")
    return fig


def draw_error(results):
    """Excess error and share of copies against N.  results: {N: of measure_training_set}."""
    size = {"figsize": (6, 8.4), "layout": "constrained"}
    fig, (top, bottom) = plt.subplots(2, 1, sharex=True, **size)
    styles = {"network": "C0o-", "minimiser": "C1s-", "data": "k^:"}
    names = {"network": "network", "minimiser": "memorising minimiser", "data": "fresh data"}
    for name in ("network", "minimiser"):
        values, errors = np.transpose([result["excess"][name] for result in results.values()])
        top.errorbar(NUM_POINTS, values, errors, fmt=styles[name], ms=6, label=names[name])
    for name in ("network", "minimiser", "data"):
        pairs = [result["samples"][name]["copies"] for result in results.values()]
        values, errors = np.transpose(pairs)
        bottom.errorbar(NUM_POINTS, values, errors, fmt=styles[name], ms=6, label=names[name])
    label = r"minimiser as $\Delta t \to 0$"
    bottom.axhline(1, color="C1", ls="--", lw=1.2, label=label)
    top.set(
        xscale="log", yscale="log", ylabel="excess error / Bayes error,\nmean over the seven $t$"
    )
    top.set_title(
        "In the mean over t the network beats the minimiser,\n"
        "until N is so large that its own error is left"
    )
    bottom.set(xlabel="$N$, number of training points", ylabel="share of copies")
    bottom.set_title(
        "With few points most samples are copies;\nfrom N = 160 on the share no longer tells"
    )
    bottom.set_xticks(NUM_POINTS, [str(n) for n in NUM_POINTS])
    bottom.minorticks_off()
    bottom.set_xlim(NUM_POINTS[0] / 1.3, NUM_POINTS[-1] * 1.3)
    for ax in (top, bottom):
        ax.grid(alpha=0.3)
        ax.legend(fontsize=11)
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
    add("--num-steps", type=number(int, 1, 2000), default=1000, help="steps of the sampler, 1/dt")
    add("--num-samples", type=number(int, 2, 10**5), default=400, help="samples per denoiser")
    add("--sigma-q", type=number(float, 0.1, 100), default=1.0, help="std of the noise at t = 1")
    add("--train-steps", type=number(int, 1, 10**6), default=1500, help="steps of the optimizer")
    add("--batch-size", type=number(int, 1, 10**5), default=512, help="draws in each of them")
    add("--learning-rate", type=number(float, 1e-6, 0.1), default=0.01, help="at its largest")
    add("--seed", type=number(int, 0, 2**62), default=0, help="seed of every draw")
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


def learn_from(points, args):
    """The network trained on the points; for all N the same first weights and seed of the noise."""
    settings = {"sigma_q": args.sigma_q, "train_steps": args.train_steps}
    settings.update(batch_size=args.batch_size, learning_rate=args.learning_rate)
    return train(points, rng=torch.Generator().manual_seed(args.seed), **settings)[0]


def main(argv=None):
    """Trains, samples, measures, prints, draws.  Exits with status 2 on bad input."""
    args = parse_arguments(argv)
    torch.set_num_threads(1)  # so small a network gains little from two
    rng = torch.Generator().manual_seed(args.seed + 1)  # of all but the training
    sigma_q, num_steps = args.sigma_q, args.num_steps

    roll = swiss_roll(max(NUM_POINTS), rng)  # the first N of these are the training points
    fresh = swiss_roll(NUM_FRESH, rng)
    x_1 = sigma_q * torch.randn(args.num_samples, 2, generator=rng)

    networks = {n: learn_from(roll[:n], args) for n in NUM_POINTS}

    results = {}
    for n, network in networks.items():
        results[n] = measure_training_set(network, roll[:n], x_1, fresh, num_steps, sigma_q, rng)
    bayes = measure_bayes_loss(sigma_q, rng)

    report(results, bayes, args)

    folder = args.figures_dir
    save(draw_paths(results, roll), folder / "trajectories.jpg")
    save(draw_which(results), folder / "which-denoiser.jpg")
    save(draw_error(results), folder / "error-vs-n.jpg")


if __name__ == "__main__":
    main()
