"""Experiment 7: what the network predicts: x_{t-dt}, x_0, the noise, v, or a mixture.

The claim
    A sampler needs E[x_0 | x_t]. A network can learn it by least squares from any of five targets:
        x_{t-dt}         the point one step earlier, dt = 1/1000            (Pseudocode 1)
        x_0              the clean point                                    (Pseudocode 6)
        noise            (x_t - x_0) / sigma_t                              (Ho et al., 2020)
        v                (noise - sigma_t x_0) / sqrt(1 + sigma_t^2)        (Salimans and Ho, 2022)
        preconditioned   (x_0 - c_skip x_t) / c_out                         (Karras et al., 2022)
    Each conditional mean given x_t gives E[x_0 | x_t] in one line, so all five have one optimum
    (sections 2.3 and 5, Claim 2, B.10). Here one network is trained on each: same layers, inputs,
    batches and steps; the loss is the plain squared error of its own target.

Why are they not equally good?
    In E[x_0 | x_t] an error of the output is multiplied by a factor that depends on t: t/dt, 1,
    sigma_t, sigma_t / sqrt(1 + sigma_t^2), c_out. A good target has a small factor where little
    error is allowed. (The plain loss weights an error of E[x_0 | x_t] by 1 / factor^2: the factor
    and that weighting come together.)
    The target x_{t-dt} has one more fault: it contains noise that cannot be predicted from x_t. In
    units of x_0 this adds sigma_q^2 t (t - dt) / dt to the variance of the target (Claim 2).
    Which fault costs more? Two control targets separate the faults: x_{t-dt} without the noise, x_0
    with it added.

What to look for in figures/
    target-variance.jpg   Claim 2 as a number: the variance of the targets, exact and measured
    error-vs-t.jpg        the error of what is learned, above the least possible, for each target
    samples.jpg           what DDIM makes of the five networks

Run
    python prediction_target.py

Try this
    python prediction_target.py --train-steps 200     little is learned; which target is ahead?
    python prediction_target.py --train-steps 6000    all learn more; does the order stay?
    python prediction_target.py --sigma-q 4           noise far larger than the data
    python prediction_target.py --num-steps 1000      sampling with the dt of x_{t-dt}
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
DT = 1 / 1000  # between x_{t-dt} and x_t, and the smallest t


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


def draw_chain(n, t, sigma_q, rng):
    """n draws of x_0, x_{t-dt} and x_t.  t: (n,) or a float, DT <= t <= 1.  Each (n, 2)."""
    x_0 = swiss_roll(n, rng)
    x_previous = add_noise(x_0, t - DT, sigma_q, rng)
    x_t = add_noise(x_previous, DT, sigma_q, rng)
    return x_0, x_previous, x_t


# --------------------------------------- The reverse mean ---------------------------------------


def reverse_mean(x_t, t, dt, *, denoiser):
    """E[x_{t-dt} | x_t] from E[x_0 | x_t], eq. (24) of the tutorial.

    x_t: (n, 2) points at time t;  0 < dt <= t <= 1;  denoiser(x_t, t) -> (n, 2).  Returns (n, 2).
    """
    return (dt / t) * denoiser(x_t, t) + (1 - dt / t) * x_t


# A network that has learned a target says f(x_t, t) = E[target | x_t]. For each target there are
# two functions: what the network regresses on, given a draw of (x_0, x_{t-dt}, x_t), and how its
# output is turned into E[x_0 | x_t]. The second is the first solved for x_0; of x_{t-dt} it is
# eq. (24) solved for E[x_0 | x_t]. Arguments that one does not need are there for the others.
# Points are (n, 2);  t and sigma_t = sigma_q sqrt(t): (n, 1) or floats.


def regress_on_previous(x_0, x_previous, x_t, t, sigma_t):
    """x_{t-dt}."""
    return x_previous


def x_0_from_previous(output, x_t, t, sigma_t):
    return x_t + (t / DT) * (output - x_t)


def regress_on_x_0(x_0, x_previous, x_t, t, sigma_t):
    """x_0."""
    return x_0


def x_0_from_x_0(output, x_t, t, sigma_t):
    return output


def regress_on_noise(x_0, x_previous, x_t, t, sigma_t):
    """The noise, N(0, I): x_t = x_0 + sigma_t noise."""
    return (x_t - x_0) / sigma_t


def x_0_from_noise(output, x_t, t, sigma_t):
    return x_t - sigma_t * output


def regress_on_v(x_0, x_previous, x_t, t, sigma_t):
    """v: with sigma_t = tan(phi), it is cos(phi) noise - sin(phi) x_0."""
    noise = (x_t - x_0) / sigma_t
    return (noise - sigma_t * x_0) / (1 + sigma_t**2) ** 0.5


def x_0_from_v(output, x_t, t, sigma_t):
    return x_t / (1 + sigma_t**2) - sigma_t / (1 + sigma_t**2) ** 0.5 * output


SIGMA_DATA = 0.5  # about the standard deviation of the data


def preconditioning(sigma_t):
    """c_skip and c_out of Karras et al. (2022, arXiv 2206.00364, table 1).

    The best linear guess of x_0 is c_skip x_t, and c_out is the size of its error.
    """
    variance_t = sigma_t**2 + SIGMA_DATA**2  # of x_t
    c_skip = SIGMA_DATA**2 / variance_t
    c_out = SIGMA_DATA * sigma_t / variance_t**0.5
    return c_skip, c_out


def regress_on_preconditioned(x_0, x_previous, x_t, t, sigma_t):
    """What the best linear guess of x_0 misses, in units of the size of its error."""
    c_skip, c_out = preconditioning(sigma_t)
    return (x_0 - c_skip * x_t) / c_out


def x_0_from_preconditioned(output, x_t, t, sigma_t):
    c_skip, c_out = preconditioning(sigma_t)
    return c_skip * x_t + c_out * output


TARGETS = {
    "x_{t-dt}": (regress_on_previous, x_0_from_previous),
    "x_0": (regress_on_x_0, x_0_from_x_0),
    "noise": (regress_on_noise, x_0_from_noise),
    "v": (regress_on_v, x_0_from_v),
    "preconditioned": (regress_on_preconditioned, x_0_from_preconditioned),
}

# Given x_0 and x_t, the path between them is a Brownian bridge: x_{t-dt} is the point
# (dt / t) x_0 + (1 - dt / t) x_t and noise, of variance sigma_q^2 dt (t - dt) / t. So the targets
# x_{t-dt} and x_0 differ in two ways, this noise and the factor t / dt. Two more targets part them:


def regress_on_averaged_previous(x_0, x_previous, x_t, t, sigma_t):
    """E[x_{t-dt} | x_0, x_t]: x_{t-dt} without the noise of the bridge."""
    return (DT / t) * x_0 + (1 - DT / t) * x_t


def regress_on_noisy_x_0(x_0, x_previous, x_t, t, sigma_t):
    """x_0 with the noise of the bridge: x_{t-dt}, in units of x_0."""
    return x_0_from_previous(x_previous, x_t, t, sigma_t)


CONTROLS = {
    "x_{t-dt}, no noise": (regress_on_averaged_previous, x_0_from_previous),
    "x_0, with noise": (regress_on_noisy_x_0, x_0_from_x_0),
}


# ----------------------------------------- The samplers -----------------------------------------
# They know nothing of the data but the function that they are given: reverse_mean(x_t, t, dt).


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
NUM_SEEDS = 3  # networks trained on each target
BATCH_SIZE = 512
LEARNING_RATE = 0.01  # at its largest


class Predictor(nn.Module):
    """A ReLU network that learns one target, a name in TARGETS or CONTROLS."""

    def __init__(self, target, sigma_q, width=64):
        super().__init__()
        self.regress_on, self.x_0_from = {**TARGETS, **CONTROLS}[target]
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

    def output(self, x_t, t):
        """E[target | x_t], learned.  x_t: (n, 2);  t: (n, 1).  Returns (n, 2).

        The inputs are scaled as in Karras et al.: x_t to about unit size, t to log(sigma_t) / 2.
        """
        sigma_t = self.sigma_q * t.sqrt()
        std_t = (sigma_t**2 + SIGMA_DATA**2).sqrt()  # of x_t
        return self.layers(torch.cat([x_t / std_t, sigma_t.log() / 2], dim=1))

    def forward(self, x_t, t):
        """E[x_0 | x_t], learned.  x_t: (n, 2);  t: a float, DT <= t <= 1.  Returns (n, 2)."""
        t = torch.full((len(x_t), 1), t)
        return self.x_0_from(self.output(x_t, t), x_t, t, self.sigma_q * t.sqrt())


def squared_errors(predictor, n, sigma_q, rng):
    """The loss of n fresh draws, one by one: |f(x_t, t) - target|^2, nothing weighted.

    t is log-uniform on [DT, 1]: every scale of the noise is met as often.  Returns (n,).
    """
    t = DT ** torch.rand(n, generator=rng)
    x_0, x_previous, x_t = draw_chain(n, t, sigma_q, rng)
    t = t[:, None]
    target = predictor.regress_on(x_0, x_previous, x_t, t, sigma_q * t.sqrt())
    return (predictor.output(x_t, t) - target).square().sum(dim=1)


def train(target, *, sigma_q, train_steps, batch_size, learning_rate, rng):
    """Least squares on fresh samples.  target: a name;  rng: a torch Generator.

    The seed of rng fixes the first weights and all batches, and they are the same for all targets.
    Returns the trained Predictor and the loss of each step, a list of floats.
    """
    torch.manual_seed(rng.initial_seed())  # nn.Linear draws its weights from torch's own generator
    predictor = Predictor(target, sigma_q)
    optimizer = torch.optim.Adam(predictor.parameters(), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, train_steps)
    losses = []
    for _ in tqdm(range(train_steps), f"training on {target}", disable=None):
        loss = squared_errors(predictor, batch_size, sigma_q, rng).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return predictor.requires_grad_(False), losses


def train_all(sigma_q, train_steps, seed):
    """A network for each target and each of NUM_SEEDS seeds: {target: [Predictor, ...]}."""
    settings = {"batch_size": BATCH_SIZE, "learning_rate": LEARNING_RATE}
    settings.update(sigma_q=sigma_q, train_steps=train_steps)
    predictors = {}
    for target in {**TARGETS, **CONTROLS}:
        predictors[target] = []
        for i in range(NUM_SEEDS):
            rng = torch.Generator().manual_seed(seed + i)
            predictor, _ = train(target, rng=rng, **settings)
            predictors[target].append(predictor)
    return predictors


# ------------------------------------------- The truth ------------------------------------------
# p(theta | x_t) is proportional to exp(-|x_t - c(theta)|^2 / (2 sigma_t^2)) by Bayes' rule, with
# c(theta) the curve. So E[x_0 | x_t] is the average of c(theta) with that weight: an integral over
# theta, done by Gauss-Legendre quadrature. All of it is in double precision, on the CPU.


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


def variance_of_x_0(t, *, sigma_q):
    """E Var[x_0 | x_t] per dimension, to 6 digits.  t: a float, sigma_q sqrt(t) >= 0.015.

    Twice that is the Bayes error, the least squared error that a guess of x_0 can have.
    The mean over x_t is a sum over a grid of 120 x 120 points, 6 sigma_t wider than the roll; the
    sum over a grid converges fast for functions as smooth as these.
    """
    sigma_t = sigma_q * t**0.5
    c, log_weights = quadrature(sigma_t)
    side = torch.linspace(-1 - 6 * sigma_t, 1 + 6 * sigma_t, 120, dtype=torch.double)
    within = 0.0  # the sum of p(x_t) E[|x_0 - E[x_0 | x_t]|^2 | x_t]
    mass = 0.0  # the sum of p(x_t)
    for x_t in torch.cartesian_prod(side, side).split(2**18 // len(c) + 1):
        joint = (log_weights - torch.cdist(x_t, c).square() / (2 * sigma_t**2)).exp()
        p = joint.sum(dim=1).clamp(min=1e-300)  # far from the roll it rounds to 0
        mean = joint @ c / p[:, None]
        second_moment = joint @ c.square().sum(dim=1) / p
        within += float((p * (second_moment - mean.square().sum(dim=1))).sum())
        mass += float(p.sum())
    return within / mass / 2


def bridge_variance(t, *, sigma_q):
    """What the noise of the bridge adds to that when the target is x_{t-dt}, in units of x_0.

    It is (t / dt)^2 times sigma_q^2 dt (t - dt) / t.  t: a float or an array.
    """
    return sigma_q**2 * t * (t - DT) / DT


def exact_variances(times, sigma_q):
    """E Var[target | x_t] per dimension, in units of x_0 (Claim 2): {target: (len(times),)}.

    x_{t-dt} has that of x_0 and the bridge's. Noise, v and preconditioned have that of x_0: given
    x_t each of them is x_0, shifted and scaled.
    """
    of_x_0 = np.array([variance_of_x_0(t, sigma_q=sigma_q) for t in times])
    of_previous = of_x_0 + bridge_variance(np.array(times), sigma_q=sigma_q)
    return {"x_{t-dt}": of_previous, "x_0": of_x_0}


# ------------------------------------------- Measuring ------------------------------------------
TIMES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)  # the t at which networks are measured
NUM_DIRECTIONS = 64  # of the sliced distance
NUM_DATA_SETS = 11
EQUALITY_TIME = 0.1  # the t at which B.10 is looked at
FAR = 10.0  # samples are kept within [-FAR, FAR]^2
VIEW = 1.2  # the figure of the samples shows [-VIEW, VIEW]^2


def mean_and_error(values):
    """The mean over the first axis and its standard error.  values: (k, ...), k >= 2."""
    return values.mean(axis=0), values.std(axis=0, ddof=1) / len(values) ** 0.5


def factor(target, t, sigma_q):
    """The size of what multiplies an error of the output in E[x_0 | x_t], linear in the output."""
    _, x_0_from = {**TARGETS, **CONTROLS}[target]
    sigma_t = sigma_q * t**0.5
    return abs(x_0_from(1.0, 0.0, t, sigma_t) - x_0_from(0.0, 0.0, t, sigma_t))


def measure_target_variance(sigma_q, rng, n=20_000):
    """E Var[target | x_t] per dimension, in units of x_0, from n draws at each of TIMES.

    That is the mean square of what the target, turned into x_0, misses E[x_0 | x_t] by. Noise, v
    and preconditioned, turned into x_0, are x_0 itself: they would give its number again.
    Returns {target: (means, standard errors), (len(TIMES),) each} for x_{t-dt} and x_0.
    """
    squares = {"x_{t-dt}": [], "x_0": []}
    for t in TIMES:
        sigma_t = sigma_q * t**0.5
        x_0, x_previous, x_t = draw_chain(n, t, sigma_q, rng)
        exact = exact_denoiser(x_t, t, sigma_q=sigma_q)
        for target, rows in squares.items():
            regress_on, x_0_from = TARGETS[target]
            value = regress_on(x_0, x_previous, x_t, t, sigma_t)
            miss = x_0_from(value, x_t, t, sigma_t) - exact
            rows.append(miss.square().mean(dim=1).numpy())
    return {target: mean_and_error(np.stack(rows, axis=1)) for target, rows in squares.items()}


def measure_errors(predictors, bayes, sigma_q, rng, n=10_000):
    """Excess over the Bayes error: E|learned - E[x_0 | x_t]|^2 / E|x_0 - E[x_0 | x_t]|^2.

    The first from n draws at each of TIMES;  bayes: the second, exact, (len(TIMES),).
    predictors: {target: one Predictor per seed}.  Returns {target: (seeds, len(TIMES))}.
    """
    rows = {target: np.empty((len(runs), len(TIMES))) for target, runs in predictors.items()}
    for k, t in enumerate(TIMES):
        x_t = add_noise(swiss_roll(n, rng), t, sigma_q, rng)
        exact = exact_denoiser(x_t, t, sigma_q=sigma_q)
        for target, runs in predictors.items():
            for i, predictor in enumerate(runs):
                excess = (predictor(x_t, t) - exact).square().sum(dim=1).mean()
                rows[target][i, k] = float(excess) / bayes[k]
    return rows


def output_errors(errors, bayes, sigma_q):
    """Root mean square error per dimension of what the networks put out, in the target's units.

    Over both dimensions, excess x Bayes error = 2 factor^2 x that squared; so it is computed from
    measure_errors, not measured again.
    errors, bayes: as there.  Returns {target: (len(TIMES),)}, over all seeds.
    """
    outputs = {}
    for target, rows in errors.items():
        factors = np.array([factor(target, t, sigma_q) for t in TIMES])
        outputs[target] = (rows.mean(axis=0) * bayes / 2) ** 0.5 / factors
    return outputs


def measure_equality(denoiser, t, sigma_q, rng, n=200_000):
    """Two of the squared errors that B.10 calls equal, for a denoiser and its reverse mean.

    Returns |x_{t-dt} - reverse mean|^2, (dt/t)^2 |x_0 - denoiser|^2, and the first less the second,
    each a mean over n draws and its standard error; and what the difference should be, the variance
    of the bridge.
    """
    x_0, x_previous, x_t = draw_chain(n, t, sigma_q, rng)
    guess = denoiser(x_t, t)
    mean = reverse_mean(x_t, t, DT, denoiser=lambda x_t, t: guess)
    first = (x_previous - mean).double().square().sum(dim=1)
    second = (DT / t) ** 2 * (x_0 - guess).double().square().sum(dim=1)
    rows = [mean_and_error(values.numpy()) for values in (first, second, first - second)]
    return (*rows, 2 * (DT / t) ** 2 * bridge_variance(t, sigma_q=sigma_q))


def last(steps, num_steps, label):
    """The last array that a sampler yields, x_0.  label: of the progress bar."""
    for x_t in tqdm(steps, desc=label, total=num_steps, disable=None):
        pass
    return x_t


def sample(predictors, num_samples, num_steps, sigma_q, rng):
    """DDIM from the true p_1 with every network, and with the exact denoiser, from the same x_1.

    A bad network can send samples anywhere. What leaves [-FAR, FAR]^2 is put on its edge, so that
    distances remain numbers.
    predictors: {target: one Predictor per seed}.  Returns {(target, index of the seed): x_0,
    (n, 2)}; the exact denoiser's key is ("exact", 0).
    """
    x_1 = add_noise(swiss_roll(num_samples, rng), 1.0, sigma_q, rng)
    denoisers = {("exact", 0): partial(exact_denoiser, sigma_q=sigma_q)}
    for target in TARGETS:
        for i, predictor in enumerate(predictors[target]):
            denoisers[target, i] = predictor
    samples = {}
    for run, denoiser in denoisers.items():
        steps = ddim(partial(reverse_mean, denoiser=denoiser), x_1, num_steps)
        x_0 = last(steps, num_steps, f"DDIM, {run[0]}")
        samples[run] = x_0.nan_to_num(nan=FAR).clamp(-FAR, FAR)
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


def in_view(x_0):
    """Which points lie in the square that the figure shows.  x_0: (n, 2).  Returns (n,), bool."""
    return x_0.abs().amax(dim=1) < VIEW


def measure_offsets(samples):
    """How each network's samples differ from those of the exact denoiser from the same x_1.

    samples: {run: x_0, (n, 2)}.  Returns {run: (median distance, share of the samples in view)}.
    """
    exact = samples["exact", 0]
    offsets = {}
    for run, x_0 in samples.items():
        distance = (x_0.double() - exact).norm(dim=1)
        offsets[run] = float(distance.median()), float(in_view(x_0).double().mean())
    return offsets


def over_seeds(values):
    """Mean and standard error over the seeds.  values: {(target, index of the seed): ...}.

    ...: a float, or several.  Returns {target: (mean, standard error)} for TARGETS.
    """
    summary = {}
    for target in TARGETS:
        summary[target] = mean_and_error(np.array([values[target, i] for i in range(NUM_SEEDS)]))
    return summary


# ------------------------------------------- Printing -------------------------------------------


def print_row(name, values, digits):
    print(f"{name:22}" + "".join(f"{value:10.{digits}g}" for value in values))


def report(exact, measured, errors, outputs, equality, distances, floor, offsets, args):
    """exact: of exact_variances;  measured: of measure_target_variance;  errors, outputs,
    equality, distances and floor, offsets: of the functions of those names.
    """
    print(f"sigma_q = {args.sigma_q:g}, dt = {DT:g}; for each target", end=" ")
    print(f"{NUM_SEEDS} networks, {args.train_steps} steps of {BATCH_SIZE} draws")
    print_row("t", TIMES, 3)
    print("variance of the target, per dimension, in units of x_0")
    for target, variance in exact.items():
        print_row(f"  {target}, exact", variance, 3)
        print_row("    measured", measured[target][0], 3)
        print_row("    +- (s.e.)", measured[target][1], 1)

    print("excess over the Bayes error, in %, mean of the networks")
    for target, rows in errors.items():
        mean, error = mean_and_error(100 * rows)
        print_row(f"  {target}", mean, 3)
        print_row("    +- (s.e.)", error, 1)

    print(f"error of the output x its factor  at t = {TIMES[0]:<16g}at t = {TIMES[-1]:g}")
    for target, output in outputs.items():
        low = f"{output[0]:.3f} x {factor(target, TIMES[0], args.sigma_q):.4g}"
        high = f"{output[-1]:.3f} x {factor(target, TIMES[-1], args.sigma_q):.4g}"
        print(f"  {target:32}{low:22}{high}")

    first, second, difference, bridge = equality
    print(f"B.10 at t = {EQUALITY_TIME:g}: |x_(t-dt) - reverse mean|^2 is {first[0]:.3e}", end=", ")
    print(f"(dt/t)^2 |x_0 - denoiser|^2 is {second[0]:.3e};")
    print(f"they differ by {difference[0]:.4e} +- {difference[1]:.1e} (s.e.)", end=", ")
    print(f"and the noise of the bridge is {bridge:.4e}")

    print(f"DDIM from p_1, {args.num_samples} samples, {args.num_steps} steps; s.e. over networks")
    print("                      sliced W_2 to data / floor    off exact DDIM (median)   in view")
    print(
        f"  floor: {floor[0]:.4f}       1    +- {floor[1] / floor[0]:.2g} (s.d. of two data sets)"
    )
    print(f"  exact denoiser      {distances['exact', 0][1]:.3g}")
    print(f"  (what left [-{FAR:g}, {FAR:g}]^2 was put on its edge)")
    spread = over_seeds(offsets)
    for target, (mean, error) in over_seeds(distances).items():
        (offset, share), (offset_error, _) = spread[target]
        print(f"  {target:20}{mean[1]:<8.3g} +- {error[1]:<18.1g}", end="")
        print(f"{offset:<8.3g} +- {offset_error:<12.1g} {share:.0%}")


# ------------------------------------------ The figures -----------------------------------------
plt.switch_backend("agg")  # the figures are files: no window
plt.rcParams.update({"font.size": 12, "axes.titlesize": 12})
STYLES = {
    "x_{t-dt}": (r"$x_{t-\Delta t}$", "C3", "v"),
    "x_0": ("$x_0$", "C0", "o"),
    "noise": ("noise", "C1", "s"),
    "v": ("$v$", "C2", "D"),
    "preconditioned": ("preconditioned", "k", "*"),
}  # label, colour and mark of each target


def draw_variance(times, exact, measured):
    """exact: of exact_variances at times;  measured: of measure_target_variance."""
    fig, ax = plt.subplots(figsize=(6, 5.4), layout="constrained")
    ax.loglog(times, exact["x_{t-dt}"], "C3", label=r"$x_{t-\Delta t}$, exact")
    ax.loglog(times, exact["x_0"], "C0", label="the other four, exact")
    for target, (mean, _) in measured.items():
        label, color, mark = STYLES[target]
        ax.plot(TIMES, mean, mark, mfc="none", color=color, ms=8, label=f"{label}, measured")
    ratio = exact["x_{t-dt}"][-1] / exact["x_0"][-1]
    ax.set(xlabel="$t$", ylabel="variance of the target given $x_t$, in units of $x_0$")
    ax.set_title(f"Predicting $x_{{t-\\Delta t}}$: up to {ratio:.0f} times the variance")
    ax.legend(fontsize=10)
    ax.grid(alpha=0.3)
    return fig


def draw_errors(errors):
    """Mean, and lowest to highest of the networks.  errors: of measure_errors."""
    fig, ax = plt.subplots(figsize=(6, 6), layout="constrained")
    for target, (label, color, mark) in STYLES.items():
        rows = errors[target]
        ax.fill_between(TIMES, rows.min(axis=0), rows.max(axis=0), color=color, alpha=0.2, lw=0)
        ax.loglog(TIMES, rows.mean(axis=0), mark + "-", color=color, ms=7, label=label)
    ax.set(xlabel="$t$", ylabel="excess error / Bayes error")
    ax.set_title(
        "Predicting $x_0$ is poor near the data, noise and $v$\n"
        "near $t = 1$, $x_{t-\\Delta t}$ everywhere"
    )
    title = f"predicted: mean, and lowest to highest of {NUM_SEEDS} networks"
    fig.legend(fontsize=11, loc="outside lower center", ncols=3, title=title)
    ax.grid(alpha=0.3)
    return fig


def draw_samples(samples, distances, offsets, data):
    """The first network of each target, and the exact denoiser.  samples: of sample."""
    fig, axes = plt.subplots(3, 2, figsize=(6, 9.4), layout="constrained", sharex=True, sharey=True)
    styles = {**STYLES, "exact": ("exact denoiser", "C4", "")}
    for ax, (target, (label, color, _)) in zip(axes.flat, styles.items()):
        x_0 = samples[target, 0].double()
        ax.scatter(*data.T, s=10, color="0.8")
        ax.scatter(*x_0[in_view(x_0)].T, s=1, color=color)
        ax.text(0, -1.13, f"{offsets[target, 0][1]:.0%} in view", ha="center", fontsize=11)
        ax.set_title(f"{label}\n$W_2$: {distances[target, 0][1]:.3g} x floor")
        ax.set(xlim=(-VIEW, VIEW), ylim=(-VIEW, VIEW), aspect="equal", xlabel="$x$", ylabel="$y$")
        ax.label_outer()
    fig.suptitle("Predicting $x_0$ blurs the roll; $x_{t-\\Delta t}$ loses it", fontsize=13)
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
    add("--num-steps", type=number(int, 1, 1000), default=100, help="steps of the sampler, 1/dt")
    add("--num-samples", type=number(int, 2, 10**6), default=5000, help="samples per network")
    add("--sigma-q", type=number(float, 0.5, 100), default=1.0, help="std of the noise at t = 1")
    add("--train-steps", type=number(int, 1, 10**6), default=1200, help="steps of the optimizer")
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


def main(argv=None):
    """Trains, samples, measures, prints, draws.  Exits with status 2 on bad input."""
    args = parse_arguments(argv)
    torch.set_num_threads(1)  # so small a network gains little from two
    sigma_q = args.sigma_q

    predictors = train_all(sigma_q, args.train_steps, args.seed)

    rng = torch.Generator().manual_seed(args.seed + NUM_SEEDS)
    samples = sample(predictors, args.num_samples, args.num_steps, sigma_q, rng)

    exact = exact_variances(TIMES, sigma_q)
    measured = measure_target_variance(sigma_q, rng)
    errors = measure_errors(predictors, 2 * exact["x_0"], sigma_q, rng)
    outputs = output_errors(errors, 2 * exact["x_0"], sigma_q)
    equality = measure_equality(predictors["x_0"][0], EQUALITY_TIME, sigma_q, rng)
    distances, floor = measure_distances(samples, rng)
    offsets = measure_offsets(samples)

    report(exact, measured, errors, outputs, equality, distances, floor, offsets, args)

    folder = args.figures_dir
    times = np.geomspace(DT, 1, 25)
    curves = exact_variances(times, sigma_q)
    save(draw_variance(times, curves, measured), folder / "target-variance.jpg")
    save(draw_errors(errors), folder / "error-vs-t.jpg")
    data = swiss_roll(args.num_samples, rng)
    save(draw_samples(samples, distances, offsets, data), folder / "samples.jpg")


if __name__ == "__main__":
    main()
