"""Experiment 8: fast samplers. Which solver, which grid of noise levels, how many evaluations?

The claim
    DDIM with small steps solves an ordinary differential equation, the probability-flow ODE
        dx/dsigma = (x - D(x, sigma)) / sigma,    D(x, sigma) = E[x_0 | x_0 + N(0, sigma^2 I) = x],
    from sigma = sigma_q, where there is noise, to sigma = 0, where there is data. Here sigma is the
    tutorial's sigma_t = sigma_q sqrt(t), and D is the denoiser. DDIM is Euler's method for it, and
    the tutorial's grid is uniform in t. Both can be bettered:
      the solver  Heun's method and DPM-Solver++(2M) are of second order: twice as many steps
                  leave a quarter of the error, not a half;
      the grid    uniform t spends nearly all steps at large sigma and then leaps over the scales
                  on which the data has its detail. The steps belong at small sigma.
    What costs time is evaluating the denoiser, a network in practice. So errors are compared at
    equal numbers of evaluations, not of steps.

How is the error known?
    The data is a mixture of eight Gaussians in the plane. Its denoiser is known in closed form, so
    the ODE can be solved to nine digits: `solution`. The error of a sampler is its root mean square
    distance to that solution, from the same starts, which are drawn from the true p_1. DDPM adds
    noise and has no solution to match. Its samples are held against the data's distribution.

What limits the accuracy
    sigma_min, where the last step to sigma = 0 begins: `last_step_error`. Edges in the data, where
    the second order is lost on two of the grids: `segment_denoiser`. The denoiser's own error:
    `disturbed`. And borders between Gaussians of unequal weight, where a few samples go to the
    wrong one: `measure_switches`.

What to look for in figures/
    error-vs-evaluations.jpg   a better grid gains more than a better solver; both together, most
    grids.jpg                  where each grid puts its steps, and what it leaps over
    ten-evaluations.jpg        ten evaluations: the right grid shows the data, uniform t does not
    where-it-ends.jpg          orders lost at an edge; no gain below the denoiser's own error

Run
    python fast_samplers.py

Try this
    python fast_samplers.py --num-steps 40     the grids and the errors with 40 evaluations, not 20
    python fast_samplers.py --sigma-0 .02      finer detail: for 10 % DDIM on uniform t needs 366
                                               evaluations, not 302
    python fast_samplers.py --sigma-q 40       more noise: for 1 % DPM-Solver++(2M) on rho = 7 needs
                                               23 evaluations, not 15
"""

import argparse
import io
import math
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from tqdm import tqdm

# ------------------------------------------- The data -------------------------------------------
# x_0 is one of eight centers on the unit circle, plus N(0, std^2 I).

ANGLES = 2 * np.pi * np.arange(8) / 8
CENTERS = np.stack([np.cos(ANGLES), np.sin(ANGLES)], axis=1)
EQUAL = np.full(8, 1 / 8)  # the weights of the centers
UNEQUAL = np.arange(1, 9) / 36  # others, to see what symmetry hides


def mixture(n, rng, *, std, weights=EQUAL):
    """n draws of x_0, (n, 2)."""
    x_0 = CENTERS[rng.choice(len(CENTERS), size=n, p=weights)]
    return x_0 + std * rng.standard_normal(x_0.shape)


def spread(std):
    """Root mean square distance of the data from its mean, 0: the unit that errors are given in."""
    return (1 + 2 * std**2) ** 0.5


# ----------------------------------------- The denoiser -----------------------------------------
# x = x_0 + N(0, sigma^2 I) is a center plus N(0, (std^2 + sigma^2) I). Which center it was follows
# from Bayes' rule, as in experiment 2. Given the center, (x_0, x) is jointly Gaussian, as in
# experiment 0, and E[x_0 | x, center] = (std^2 x + sigma^2 center) / (std^2 + sigma^2).


def mean_center(x, variance, *, centers=CENTERS, weights=EQUAL):
    """E[center | x] when x is centers[i] + N(0, variance I) with probability weights[i].

    x: (n, d);  centers: (k, d);  weights: (k,), positive, of sum 1.  Returns (n, d).
    """
    dots = centers @ x.T - (centers**2).sum(axis=1, keepdims=True) / 2  # (k, n): a row a center
    logits = np.log(weights)[:, None] + dots / variance
    odds = np.exp(logits - logits.max(axis=0))
    return (odds / odds.sum(axis=0)).T @ centers


def denoiser(x, sigma, *, std=0.05, centers=CENTERS, weights=EQUAL):
    """D(x, sigma) = E[x_0 | x_0 + N(0, sigma^2 I) = x] for the mixture; exact.

    x: (n, d);  sigma: a float > 0;  std >= 0: of each Gaussian.  Returns (n, d).
    """
    variance = std**2 + sigma**2
    center = mean_center(x, variance, centers=centers, weights=weights)
    return (std**2 * x + sigma**2 * center) / variance


# ----------------------------------------- The samplers -----------------------------------------
# They know the denoiser, D(x, sigma), and a grid of noise levels: sigma_q = sigmas[0] > ... > 0.
# Each yields one array a step. A step goes from sigma to next_sigma.


def ddpm(denoiser, x, sigmas, rng):
    """Algorithm 1 of the tutorial on any grid.  rng: a NumPy Generator.

    As sigma^2 = sigma_q^2 t, eq. (24) has dt / t = 1 - (next_sigma / sigma)^2, and the noise has
    the variance sigma_q^2 dt = sigma^2 - next_sigma^2. One evaluation a step.
    """
    for sigma, next_sigma in zip(sigmas, sigmas[1:]):
        share = 1 - (next_sigma / sigma) ** 2  # dt / t
        mean = x + share * (denoiser(x, sigma) - x)  # E[x_{t-dt} | x_t]
        noise = rng.standard_normal(x.shape)
        x = mean + (sigma**2 - next_sigma**2) ** 0.5 * noise
        yield x


def ddim(denoiser, x, sigmas):
    """Algorithm 2 of the tutorial on any grid: Euler's method.  One evaluation a step.

    lam (E[x_{t-dt} | x_t] - x_t), with eq. (24) put in, is (next_sigma - sigma) (x - D) / sigma.
    """
    for sigma, next_sigma in zip(sigmas, sigmas[1:]):
        slope = (x - denoiser(x, sigma)) / sigma
        x = x + (next_sigma - sigma) * slope
        yield x


def heun(denoiser, x, sigmas):
    """Heun's method: Euler's step, then again with the mean of the slopes at its two ends.

    Karras et al. (2022, arXiv 2206.00364), Algorithm 1. Order 2; two evaluations a step, but for
    the last: at sigma = 0 there is no slope, so it stays Euler's.
    """
    for sigma, next_sigma in zip(sigmas, sigmas[1:]):
        slope = (x - denoiser(x, sigma)) / sigma
        euler = x + (next_sigma - sigma) * slope
        if next_sigma == 0:
            yield euler
        else:
            next_slope = (euler - denoiser(euler, next_sigma)) / next_sigma
            x = x + (next_sigma - sigma) * (slope + next_slope) / 2
            yield x


def dpm_solver_2m(denoiser, x, sigmas):
    """DPM-Solver++(2M).  Lu et al. (2022, arXiv 2211.01095), Algorithm 2, with alpha = 1.

    With lambda = -log sigma the ODE is dx/dlambda = D - x. Were D constant in a step, x would come
    nearer to D by the factor next_sigma / sigma, exactly: that is DDIM. Here D is the straight line
    in lambda through its last two values, taken at the middle of the step. Order 2, and one
    evaluation a step. The first step has no earlier value. The last is infinitely long in lambda.
    Both stay DDIM's.
    """
    earlier = None  # D of the step before, and that step's length in lambda
    for sigma, next_sigma in zip(sigmas, sigmas[1:]):
        now = denoiser(x, sigma)
        straight = now
        if next_sigma > 0:
            length = math.log(sigma / next_sigma)
            if earlier:
                before, length_before = earlier
                straight = now + length / (2 * length_before) * (now - before)
            earlier = now, length
        x = straight + (next_sigma / sigma) * (x - straight)
        yield x


# Grids: n steps are n + 1 noise levels, from sigma_max down to 0. The first two need no sigma_min:
# their last step, to 0, is as long as the rule makes it. The last two reach sigma_min in n - 1
# steps and then go to 0.


def uniform_t(n, sigma_max):
    """The tutorial's grid: t = 1, 1 - 1/n, ..., 0, and sigma = sigma_max sqrt(t).  (n + 1,)."""
    return sigma_max * np.sqrt(np.arange(n, -1, -1) / n)


def uniform_sigma(n, sigma_max):
    """Steps of equal length in sigma.  Returns (n + 1,)."""
    return sigma_max * np.arange(n, -1, -1) / n


def log_uniform(n, sigma_min, sigma_max):
    """Steps of equal ratio: uniform in log sigma, then 0.  Returns (n + 1,)."""
    return np.append(np.geomspace(sigma_max, sigma_min, n), 0)


def karras(n, sigma_min, sigma_max, rho=7):
    """Uniform in sigma^(1 / rho), then 0: eq. (5) of Karras et al. (2022).  Returns (n + 1,)."""
    return np.append(np.linspace(sigma_max ** (1 / rho), sigma_min ** (1 / rho), n) ** rho, 0)


SIGMA_MIN = 0.002  # as in Karras et al. (2022)
SAMPLERS = {"DDIM": ddim, "Heun": heun, "DPM-Solver++(2M)": dpm_solver_2m}


def all_grids(sigma_max, sigma_min=SIGMA_MIN):
    """The four grids by name, each a function of the number of steps."""
    return {
        "uniform t": partial(uniform_t, sigma_max=sigma_max),
        "uniform sigma": partial(uniform_sigma, sigma_max=sigma_max),
        "uniform log sigma": partial(log_uniform, sigma_min=sigma_min, sigma_max=sigma_max),
        "rho = 7": partial(karras, sigma_min=sigma_min, sigma_max=sigma_max),
    }


def evaluations(sampler, num_steps):
    """How often `sampler` evaluates the denoiser in num_steps steps.  sampler: its name."""
    if sampler == "Heun":
        return 2 * num_steps - 1
    return num_steps


def steps_within(sampler, budget):
    """The most steps for which `sampler` needs no more than `budget` evaluations."""
    if sampler == "Heun":
        return (budget + 1) // 2
    return budget


def spent(sampler, budgets):
    """The evaluations that `sampler` makes with at most so many, for each of budgets; a list."""
    return [evaluations(sampler, steps_within(sampler, budget)) for budget in budgets]


# ------------------------------------------- Learning -------------------------------------------
# Nothing is learned here. What a network's error does is seen by disturbing the exact denoiser.


def disturbed(x, sigma, *, denoiser, size, std):
    """The denoiser with an error of exact length: size times that of the best linear guess.

    The best linear guess of x_0 from x has the root mean square error sqrt(2) c_out, where c_out =
    v sigma / sqrt(v^2 + sigma^2) and v is the data's standard deviation on each axis. It is
    the unit in which a preconditioned network learns (experiment 3), so a network's error is about
    as large a part of it at every sigma. The direction turns with x and sigma, smoothly.

    x: (n, 2);  size >= 0; experiment 3's network has about .02 to .05.  Returns (n, 2).
    """
    v = spread(std) / 2**0.5
    scale = np.hypot(v, sigma)  # the standard deviation of x on each axis
    c_out = v * sigma / scale
    first, second = 2 * x.T / scale
    angle = 3 * np.sin(first + math.log(sigma) / 2) + 3 * np.cos(second - math.log(sigma) / 2)
    direction = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    return denoiser(x, sigma) + size * 2**0.5 * c_out * direction


# ------------------------------------------- The truth ------------------------------------------
# Put the denoiser into the ODE: dx/dsigma = sigma (x - E[center | x]) / (std^2 + sigma^2). In the
# variable u = log sqrt(std^2 + sigma^2) this is dx/du = x - E[center | x]. It has no singularity at
# sigma = 0. None of the samplers above is used.


def runge_kutta(x, sigma_max, num_steps, *, std, weights=EQUAL, centers=CENTERS):
    """The ODE's solution at sigma = 0 from x at sigma_max, by the classic method of order 4.

    x: (n, d);  std > 0;  num_steps: of equal length in u.  Returns (n, d).
    """

    def slope(x, u):
        return x - mean_center(x, math.exp(2 * u), weights=weights, centers=centers)

    u = math.log(math.hypot(std, sigma_max))
    h = (math.log(std) - u) / num_steps
    for _ in range(num_steps):
        k_1 = slope(x, u)
        k_2 = slope(x + h / 2 * k_1, u + h / 2)
        k_3 = slope(x + h / 2 * k_2, u + h / 2)
        k_4 = slope(x + h * k_3, u + h)
        x = x + h / 6 * (k_1 + 2 * k_2 + 2 * k_3 + k_4)
        u = u + h
    return x


def solution(x, sigma_max, num_steps=1000, **data):
    """What the samplers must return from x, (n, d), and its estimated largest error, a float.

    Halving the step of an order 4 method leaves 1/16 of its error. So the error is about
    1/15 of the change from num_steps / 2 to num_steps.
    """
    fine = runge_kutta(x, sigma_max, num_steps, **data)
    coarse = runge_kutta(x, sigma_max, num_steps // 2, **data)
    return fine, np.abs(fine - coarse).max() / 15


def last_step_error(sigma, std):
    """Root mean square error of one Euler step from the ODE's solution at `sigma` to 0.

    Near a center, x - center is proportional to sqrt(std^2 + sigma^2) along the ODE, and D takes
    the part std^2 / (std^2 + sigma^2) of it. So x_0 - center comes out shorter by the factor
    std / sqrt(std^2 + sigma^2). It has length sqrt(2) std, root mean square.

    This holds where the center is decided at `sigma` already. From a larger sigma the step ends at
    a mean of several centers, and its error is larger.
    """
    return 2**0.5 * std * (1 - std / np.hypot(std, sigma))


def uniform_t_needs(error, sigma_max, std):
    """The n for which the last step of uniform_t(n, sigma_max) alone leaves `error`.

    That step starts at sigma = sigma_max / sqrt(n): `last_step_error` solved for n.
    """
    kept = 1 - error / (2**0.5 * std)  # std / sqrt(std^2 + sigma^2)
    if kept <= 0:
        return 1.0
    return (sigma_max / std) ** 2 / (1 / kept**2 - 1)


# A line is data without width, and it has ends: x_0 uniform on [-1, 1]. In one dimension the ODE
# keeps the order of points, so it carries each quantile of the noisy data to the same quantile of
# the data. Here that is a closed form.

erfc = np.vectorize(math.erfc, otypes=[float])  # NumPy has none


def phi(z):
    """Density of N(0, 1) at z, any shape."""
    return np.exp(-(z**2) / 2) / (2 * np.pi) ** 0.5


def Phi(z):
    """P(N(0, 1) < z), any shape."""
    return erfc(-z / 2**0.5) / 2


def segment_denoiser(x, sigma):
    """E[x_0 | x] for x_0 uniform on [-1, 1]: the mean of N(x, sigma^2) cut off at -1 and 1.

    x: (n, 1), at most 35 sigma outside;  returns (n, 1).  Computed for |x|, then the sign is
    restored; this avoids cancellation.
    """
    y = np.abs(x)
    left = (-1 - y) / sigma
    right = (1 - y) / sigma
    mean = y - sigma * (phi(right) - phi(left)) / (Phi(right) - Phi(left))
    return np.sign(x) * mean


def segment_solution(x, sigma_max):
    """Where the ODE takes x, (n, 1): the quantile of [-1, 1] that x has at sigma_max; exact."""
    right = (x + 1) / sigma_max
    left = (x - 1) / sigma_max
    area = right * Phi(right) + phi(right) - left * Phi(left) - phi(left)  # of Phi, left to right
    return sigma_max * area - 1  # 2 P(noisy data < x) - 1


# ------------------------------------------- Measuring ------------------------------------------
BUDGETS = [5, 7, 10, 14, 20, 28, 40, 56, 80, 113, 160, 226, 320, 452, 640]  # evaluations
OCTAVES = [5, 10, 20, 40, 80, 160, 320, 640]
TARGETS = (0.1, 0.01, 0.001)  # errors, in units of the data's spread
NUM_STARTS = 1000  # trajectories whose error is measured
SEGMENT_BUDGETS = OCTAVES[2:]
SEGMENT_STARTS = 250
SEGMENT_SIGMA_MAX = 4.0
SMALL_SIGMA_MIN = 0.0002  # for the orders: it puts the last step's error out of sight
SIZES = (0.003, 0.01, 0.03)  # of the denoiser's own error
NUM_EVALUATIONS = 10  # of the samples that are drawn
NUM_DIRECTIONS = 64  # of the sliced distance
NUM_DATA_SETS = 5  # that samples are held against


def final(steps):
    """The last array that a sampler yields, x_0."""
    for x_0 in steps:
        pass
    return x_0


def rms_distance(x_0, truth):
    """Root mean square distance of two arrays of points, (n, d), and its standard error."""
    squares = ((x_0 - truth) ** 2).sum(axis=1)
    rms = squares.mean() ** 0.5
    # The relative error of a root is half that of its square.
    return rms, squares.std() / len(squares) ** 0.5 / (2 * rms)


def measure_errors(denoiser, x_1, truth, grids, budgets, label):
    """Each sampler on each grid against the ODE's solution, with at most so many evaluations.

    x_1, truth: (n, d);  grids: {name: function of num_steps};  budgets: numbers of evaluations.
    Returns {(sampler, grid): (2, len(budgets))}: root mean square distances, standard errors.
    """
    errors = {}
    for sampler in tqdm(SAMPLERS, label, disable=None):
        for grid in grids:
            pairs = []
            for budget in budgets:
                sigmas = grids[grid](steps_within(sampler, budget))
                x_0 = final(SAMPLERS[sampler](denoiser, x_1, sigmas))
                pairs.append(rms_distance(x_0, truth))
            errors[sampler, grid] = np.array(pairs).T
    return errors


def fewest_steps(sampler, grid, distances, target, denoiser, x_1, truth):
    """The number of steps that is enough for the error `target`, while one step less is not.

    grid: a function of num_steps;  distances: the errors with BUDGETS. Bisection starts from the
    last of BUDGETS that misses the target and the next one. None if all of them miss it.
    """
    misses = np.flatnonzero(distances > target)
    first = misses[-1] + 1 if len(misses) else 0
    if first == len(BUDGETS):
        return None
    low = steps_within(sampler, BUDGETS[first - 1]) if first else 0
    high = steps_within(sampler, BUDGETS[first])
    while high - low > 1:
        middle = (low + high) // 2
        x_0 = final(SAMPLERS[sampler](denoiser, x_1, grid(middle)))
        if rms_distance(x_0, truth)[0] > target:
            low = middle
        else:
            high = middle
    return high


def measure_needs(errors, denoiser, x_1, truth, grids, unit):
    """The evaluations that each sampler needs on each grid for an error of TARGETS, times unit.

    errors: of measure_errors with BUDGETS.
    Returns {(sampler, grid): a number for each target, or None if BUDGETS[-1] is not enough}.
    """
    needs = {}
    for (sampler, grid), (distances, _) in tqdm(errors.items(), "needs", disable=None):
        needs[sampler, grid] = []
        for target in TARGETS:
            case = (sampler, grids[grid], distances, target * unit, denoiser, x_1, truth)
            num_steps = fewest_steps(*case)
            spent_in_all = None
            if num_steps:
                spent_in_all = evaluations(sampler, num_steps)
            needs[sampler, grid].append(spent_in_all)
    return needs


def best_grid(needs, sampler):
    """The grid on which `sampler` needs the fewest evaluations for the smallest of TARGETS."""
    reached = {}
    for (name, grid), numbers in needs.items():
        if name == sampler:
            reached[grid] = numbers[-1] or math.inf
    return min(reached, key=reached.get)


def observed_orders(errors, budgets, few=160, many=640):
    """The p of error ~ evaluations^-p from `few` to `many`.  Returns {(sampler, grid): p}."""
    orders = {}
    for (sampler, grid), (distances, _) in errors.items():
        at = dict(zip(budgets, distances))
        first, second = spent(sampler, [few, many])
        orders[sampler, grid] = math.log(at[few] / at[many]) / math.log(second / first)
    return orders


def measure_orders(denoiser, x_1, truth, sigma_max, rng):
    """Observed orders on the Gaussians and on data without width, the segment.

    Returns {data: of observed_orders} and the errors on the segment: of measure_errors, with
    SEGMENT_BUDGETS. Both with SMALL_SIGMA_MIN.
    """
    grids = all_grids(sigma_max, SMALL_SIGMA_MIN)
    errors = measure_errors(denoiser, x_1, truth, grids, [160, 640], "orders")

    sigma_max = SEGMENT_SIGMA_MAX
    noise = sigma_max * rng.standard_normal((SEGMENT_STARTS, 1))
    x_1 = rng.uniform(-1, 1, (SEGMENT_STARTS, 1)) + noise
    truth = segment_solution(x_1, sigma_max)
    grids = all_grids(sigma_max, SMALL_SIGMA_MIN)
    segment = measure_errors(segment_denoiser, x_1, truth, grids, SEGMENT_BUDGETS, "segment")

    orders = {
        "Gaussians": observed_orders(errors, [160, 640]),
        "segment": observed_orders(segment, SEGMENT_BUDGETS),
    }
    return orders, segment


def measure_last_steps(*, sigma_max, std):
    """What the last step alone leaves, by `last_step_error`.

    Returns that of a grid that ends at SIGMA_MIN, and the steps of uniform_t that it asks for, to
    reach each of TARGETS: a list.
    """
    errors = [target * spread(std) for target in TARGETS]
    return last_step_error(SIGMA_MIN, std), [uniform_t_needs(e, sigma_max, std) for e in errors]


def nearest_center(x_0):
    """Index of the center nearest to each x_0.  x_0: (n, 2).  Returns (n,)."""
    return np.argmax(x_0 @ CENTERS.T, axis=1)  # they all lie on one circle


def measure_switches(num_evaluations, rng, *, sigma_max, std):
    """How many samples have another nearest center than the ODE's solution; the others' error.

    On rho = 7, for two choices of the centers' weights.  Returns {(weights, sampler): (root mean
    square distance of all, its standard error, how many of NUM_STARTS end at another center, root
    mean square distance of the others)}.
    """
    switches = {}
    for name, weights in [("equal weights", EQUAL), ("weights 1 : ... : 8", UNEQUAL)]:
        x_0 = mixture(NUM_STARTS, rng, std=std, weights=weights)
        x_1 = x_0 + sigma_max * rng.standard_normal(x_0.shape)
        truth, _ = solution(x_1, sigma_max, std=std, weights=weights)
        known = partial(denoiser, std=std, weights=weights)
        for sampler in SAMPLERS:
            sigmas = karras(steps_within(sampler, num_evaluations), SIGMA_MIN, sigma_max)
            x_0 = final(SAMPLERS[sampler](known, x_1, sigmas))
            stays = nearest_center(x_0) == nearest_center(truth)
            others, _ = rms_distance(x_0[stays], truth[stays])
            switched = NUM_STARTS - stays.sum()
            switches[name, sampler] = (*rms_distance(x_0, truth), switched, others)
    return switches


def enough(distances, sampler):
    """The evaluations from which on the error stays within a tenth of its last value.

    distances: one for each of BUDGETS, from the first.
    """
    above = np.flatnonzero(distances > 1.1 * distances[-1])
    first = above[-1] + 1 if len(above) else 0
    return spent(sampler, BUDGETS)[first]


def measure_disturbed(denoiser, x_1, truth, *, sigma_max, std):
    """The errors on rho = 7 when the denoiser has an error of its own, with BUDGETS to 160.

    Returns {(size, sampler): (2, n)}, root mean square distances and standard errors, and
    {(size, sampler): from how many evaluations on more do not help}.
    """
    grid = {"rho = 7": partial(karras, sigma_min=SIGMA_MIN, sigma_max=sigma_max)}
    budgets = [budget for budget in BUDGETS if budget <= 160]
    wrong = {}
    plenty = {}
    for size in SIZES:
        approximate = partial(disturbed, denoiser=denoiser, size=size, std=std)
        errors = measure_errors(approximate, x_1, truth, grid, budgets, f"error {size:g}")
        for (sampler, _), pair in errors.items():
            wrong[size, sampler] = pair
            plenty[size, sampler] = enough(pair[0], sampler)
    return wrong, plenty


def measure_samples(denoiser, x_1, grids, rng):
    """Every sampler on every grid, with at most NUM_EVALUATIONS.  x_1: (n, 2).

    Returns {(sampler, grid): x_0, (n, 2)}, DDPM first.
    """
    samples = {}
    for sampler, steps in {"DDPM": partial(ddpm, rng=rng), **SAMPLERS}.items():
        for grid in grids:
            sigmas = grids[grid](steps_within(sampler, NUM_EVALUATIONS))
            samples[sampler, grid] = final(steps(denoiser, x_1, sigmas))
    return samples


def shadows(points):
    """Coordinates of points, (n, 2), along NUM_DIRECTIONS axes, sorted.  (directions, n)."""
    angles = np.pi * np.arange(NUM_DIRECTIONS) / NUM_DIRECTIONS
    directions = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    return np.sort(directions @ points.T, axis=1)


def sliced_distance(seen, others):
    """Sliced 2-Wasserstein distance of samples to data sets of as many points each; a float.

    W_2 is how far one set's points have to be moved, root mean square, to lie on the other's. On a
    line the sorted points of one go to the sorted points of the other. The sliced distance is the
    root mean square of that over directions (Bonneel et al., 2015), and here over the data sets.
    seen: the samples' shadows;  others: a list, each data set's shadows.
    """
    squares = [((seen - other) ** 2).mean() for other in others]
    return np.mean(squares) ** 0.5


def measure_laws(denoiser, x_1, data, best, grids, rng):
    """Sliced distance to the data: of DDPM on every grid, of the others on their best.

    x_1: (n, 2);  data: a list of (n, 2);  best: {sampler: grid}.
    Returns {(sampler, grid): (len(OCTAVES),)}, and the floor: the distance between two data sets,
    mean and standard deviation over the pairs of neighbors in `data` (four of five sets, and they
    overlap). The distances of samples are root mean squares over `data`.
    """
    others = [shadows(points) for points in data]
    samplers = {"DDPM": partial(ddpm, rng=rng), **SAMPLERS}
    runs = [("DDPM", grid) for grid in grids]
    distances = {}
    for sampler, grid in tqdm([*runs, *best.items()], "distributions", disable=None):
        row = []
        for budget in OCTAVES:
            sigmas = grids[grid](steps_within(sampler, budget))
            x_0 = final(samplers[sampler](denoiser, x_1, sigmas))
            row.append(sliced_distance(shadows(x_0), others))
        distances[sampler, grid] = np.array(row)
    pairs = [sliced_distance(a, [b]) for a, b in zip(others, others[1:])]
    return distances, (np.mean(pairs), np.std(pairs, ddof=1))


# ------------------------------------------- Printing -------------------------------------------


def report_needs(needs, at_num_steps, last_steps, accuracy, args):
    """needs, last_steps: of measure_*;  at_num_steps: of measure_errors;  accuracy: a float."""
    print(f"eight Gaussians of std {args.sigma_0:g}, sigma_q = {args.sigma_q:g},", end=" ")
    print(f"sigma_min = {SIGMA_MIN:g}; {NUM_STARTS} starts")
    print(f"the ODE's solution is known to {accuracy:.1g}")
    print(f"\nevaluations for an error of            10 %     1 %    .1 %{'':10}", end="")
    print(f"error, at most {args.num_steps} evaluations, +- s.e.")
    too_many = f"> {BUDGETS[-1]}"
    for (sampler, grid), numbers in needs.items():
        shown = "".join(f"{n or too_many:>8}" for n in numbers)
        rms, se = at_num_steps[sampler, grid][:, 0]
        print(f"{sampler:<17} {grid:<17}{shown}{rms:26.5f} +- {se:.5f}")
    print(f"on rho = 7 and uniform log sigma the last step leaves {last_steps[0]:.2g} for good")
    shown = ", ".join(f"{n:.0f}" for n in last_steps[1])
    print(f"on uniform t the last step alone, the center decided, asks for {shown} steps")


def report_orders(orders):
    """orders: {data: of observed_orders}."""
    names = list(all_grids(1.0))
    print("\nobserved order, 160 to 640 evaluations " + "".join(f"{name:>19}" for name in names))
    for data, by_run in orders.items():
        for sampler in SAMPLERS:
            row = "".join(f"{by_run[sampler, grid]:19.2f}" for grid in names)
            print(f"{data:<20}{sampler:<20}{row}")


def report_laws(laws, floor, args):
    """laws: of measure_laws;  floor: of measure_laws."""
    print(f"\nsliced W_2 to the data, {args.num_samples} samples;", end=" ")
    print(f"between two data sets {floor[0]:.3f} +- {floor[1]:.3f} (s.d.)")
    print(f"{'evaluations':<35}" + "".join(f"{budget:8d}" for budget in OCTAVES))
    for (sampler, grid), row in laws.items():
        print(f"{sampler:<17} {grid:<17}" + "".join(f"{distance:8.3f}" for distance in row))


def report_limits(switches, wrong, plenty, args):
    """switches: of measure_switches;  wrong, plenty: of measure_disturbed."""
    print(f"\nrho = 7, at most {args.num_steps} evaluations{'':10}error +- s.e.", end="")
    print("   at another center   error of the others")
    for (weights, sampler), (rms, se, switched, others) in switches.items():
        print(f"{weights:<20}{sampler:<18}{rms:12.5f} +- {se:.5f}", end="")
        print(f"{switched:12d} of {NUM_STARTS}{others:20.5f}")
    print(
        "\nrho = 7, and the denoiser has an error     error at 160 +- s.e.     more does not help"
    )
    for (size, sampler), (distances, ses) in wrong.items():
        print(f"size {size:<15g}{sampler:<18}{distances[-1]:16.5f} +- {ses[-1]:.5f}", end="")
        print(f"{'from':>18} {plenty[size, sampler]}")


# ------------------------------------------ The figures -----------------------------------------
plt.switch_backend("agg")  # the figures are files: no window
plt.rcParams.update({"font.size": 12, "axes.titlesize": 12})
COLORS = {"DDPM": "C3", "DDIM": "C0", "Heun": "C1", "DPM-Solver++(2M)": "C2"}
MARKS = {"DDPM": "D", "DDIM": "o", "Heun": "s", "DPM-Solver++(2M)": "^"}
SYMBOLS = {
    "uniform t": "uniform $t$",
    "uniform sigma": r"uniform $\sigma$",
    "uniform log sigma": r"uniform $\log\,\sigma$",
    "rho = 7": r"$\rho = 7$",
}


def draw_run(ax, sampler, budgets, distances, **style):
    """One line of errors against evaluations.  distances: one for each of budgets."""
    style = {"color": COLORS[sampler], "marker": MARKS[sampler], "ms": 5, "lw": 1.2, **style}
    ax.loglog(spent(sampler, budgets), distances, **style)


def finish_axes(ax, budgets, ylabel, ncols):
    """Ticks at the numbers of evaluations, labels, and the legend below."""
    ax.set_xticks(budgets, [str(budget) for budget in budgets])
    ax.set_xticks([], minor=True)
    ax.set(xlabel="evaluations of the denoiser", ylabel=ylabel)
    ax.grid(alpha=0.3)
    legend = {"fontsize": 10, "loc": "upper center", "bbox_to_anchor": (0.46, -0.14)}
    ax.legend(**legend, ncols=ncols, columnspacing=1, handlelength=2.8)


def draw_errors(errors, orders, best, laws, floor, *, sigma_max, std):
    """errors: of measure_errors;  orders: of observed_orders;  best: {sampler: grid}.

    laws, floor: of measure_laws.
    """
    fig, (top, bottom) = plt.subplots(2, 1, figsize=(6.4, 12), layout="constrained")
    tutorial = dict.fromkeys(SAMPLERS, "uniform t")
    for chosen, line, slope in [(tutorial, "--", "slope"), (best, "-", "order")]:
        for sampler, grid in chosen.items():
            label = f"{sampler}, {SYMBOLS[grid]}: {slope} {orders[sampler, grid]:.2f}"
            distances = errors[sampler, grid][0]
            draw_run(top, sampler, BUDGETS, distances, ls=line, label=label)
    alone = last_step_error(sigma_max / np.array(BUDGETS) ** 0.5, std)
    label = "last step of uniform $t$ alone, the center decided"
    top.loglog(BUDGETS, alone, "k:", lw=1.5, label=label)
    label = rf"last step from $\sigma_{{\min}}$ = {SIGMA_MIN:g} alone"
    top.axhline(last_step_error(SIGMA_MIN, std), color="k", ls="-.", lw=1, label=label)
    top.set_title("A better grid gains more than a better solver;\nboth together gain most")
    finish_axes(top, OCTAVES, "RMS distance to the ODE's solution", ncols=1)

    lines = {"uniform t": "--", "uniform sigma": ":", "uniform log sigma": "-.", "rho = 7": "-"}
    for (sampler, grid), distances in laws.items():
        label = f"{sampler}, {SYMBOLS[grid]}"
        draw_run(bottom, sampler, OCTAVES, distances, ls=lines[grid], label=label)
    bottom.axhspan(floor[0] - floor[1], floor[0] + floor[1], color="0.88")
    bottom.axhline(floor[0], color="k", ls="--", lw=1, label="between two data sets")
    bottom.set_title("DDPM too: on uniform $t$ its last noise stays")
    finish_axes(bottom, OCTAVES, "sliced $W_2$ to the data", ncols=2)
    return fig


def draw_grids(at_num_steps, num_steps, *, sigma_max, std):
    """Where the grids put num_steps steps.  at_num_steps: of measure_errors, for that many."""
    fig, ax = plt.subplots(figsize=(6.4, 5.4), layout="constrained")
    low = SIGMA_MIN / 4  # where sigma = 0 is drawn
    ax.axvspan(low / 2, std, color="0.9", lw=0)
    for row, (grid, sigmas) in enumerate(all_grids(sigma_max).items()):
        x = np.maximum(sigmas(num_steps), low)
        ax.plot(x, np.full(len(x), -row), "o-", color="C0", lw=0.8, ms=6, mfc="w")
        first = at_num_steps["DDIM", grid][0, 0]
        second = at_num_steps["DPM-Solver++(2M)", grid][0, 0]
        label = f"{SYMBOLS[grid]}: error {first:.2g} by DDIM, {second:.2g} by DPM-Solver++(2M)"
        ax.text(low / 1.6, 0.2 - row, label, fontsize=11)
    ax.text(low / 1.6, -3.7, r"grey: $\sigma$ below the Gaussians' std", fontsize=11)
    ax.set(xscale="log", xlim=(low / 2, 1.8 * sigma_max), ylim=(-4, 0.7), yticks=[])
    ticks = [tick for tick in (0.01, 0.1, 1, 10) if tick < sigma_max / 2]
    labels = [f"{tick:g}" for tick in (*ticks, sigma_max)]
    ax.set_xticks([low, SIGMA_MIN, *ticks, sigma_max], ["0", r"$\sigma_{\min}$", *labels])
    ax.set_xticks([], minor=True)
    ax.set_xlabel(r"$\sigma$ (sampling runs from right to left)")
    ax.set_title(f"{num_steps} steps: uniform $t$ leaps over all the detail at once")
    return fig


def draw_samples(samples, data):
    """What the samplers give on each grid, over the data.  samples: of measure_samples."""
    fig, axes = plt.subplots(4, 4, figsize=(6.6, 7.2), layout="constrained")
    for ax, ((sampler, _), x_0) in zip(axes.flat, samples.items()):
        ax.plot(*data[:1000].T, ".", color="0.75", ms=4, mew=0)
        ax.plot(*x_0[:1000].T, ".", color=COLORS[sampler], ms=2.5, mew=0)
        ax.set(xlim=(-1.7, 1.7), ylim=(-1.7, 1.7), aspect="equal", xticks=[], yticks=[])
    for ax, symbol in zip(axes[0], SYMBOLS.values()):
        ax.set_title(symbol)
    for ax, sampler in zip(axes[:, 0], COLORS):
        ax.set_ylabel(sampler.replace("-", "-\n"))
    title = f"{NUM_EVALUATIONS} evaluations: the grid decides (grey: the data)"
    fig.suptitle(title, fontsize=13)
    return fig


def draw_limits(segment, orders, wrong, errors):
    """segment, errors: of measure_errors;  orders: of the segment;  wrong: of measure_disturbed."""
    fig, (top, bottom) = plt.subplots(2, 1, figsize=(6.4, 11.6), layout="constrained")
    for sampler in ("Heun", "DPM-Solver++(2M)"):
        for grid, line in [("uniform t", "--"), ("uniform sigma", ":"), ("rho = 7", "-")]:
            label = f"{sampler}, {SYMBOLS[grid]}: {orders[sampler, grid]:.2f}"
            distances = segment[sampler, grid][0]
            draw_run(top, sampler, SEGMENT_BUDGETS, distances, ls=line, label=label)
    title = "At the ends of a segment the order drops, but not\non $\\rho = 7$"
    top.set_title(f"{title} (numbers: observed orders)")
    finish_axes(top, SEGMENT_BUDGETS, "RMS distance to the ODE's solution", ncols=2)

    shades = plt.get_cmap("viridis")([0.85, 0.6, 0.3, 0.0])
    for sampler, line in [("DDIM", "--"), ("DPM-Solver++(2M)", "-")]:
        exact = errors[sampler, "rho = 7"]
        rows = {0.0: exact, **{size: wrong[size, sampler] for size in SIZES}}
        for shade, (size, (distances, _)) in zip(shades, sorted(rows.items(), reverse=True)):
            label = f"{sampler}, size {size:g}"
            budgets = BUDGETS[: len(distances)]
            draw_run(bottom, sampler, budgets, distances, color=shade, ls=line, label=label)
    bottom.set_title(
        "From where the denoiser's own error is reached,\nmore evaluations do not help"
    )
    finish_axes(bottom, OCTAVES, "RMS distance to the ODE's solution", ncols=2)
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
    steps = "evaluations that a sampler may make: its steps (Heun: half as many)"
    add("--num-steps", type=number(int, 1, 1000), default=20, help=steps)
    add("--num-samples", type=number(int, 2, 10**6), default=5000, help="samples per sampler")
    add("--sigma-0", type=number(float, 0.02, 0.5), default=0.05, help="std of each Gaussian")
    add("--sigma-q", type=number(float, 0.1, 100), default=4.0, help="std of the noise at t = 1")
    add("--seed", type=number(int, 0, 2**63 - 1), default=0, help="seed of every draw")
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
    """Samples, measures, prints, draws.  Exits with status 2 on bad input."""
    args = parse_arguments(argv)
    rng = np.random.default_rng(args.seed)
    setting = {"sigma_max": args.sigma_q, "std": args.sigma_0}
    known = partial(denoiser, std=args.sigma_0)
    grids = all_grids(args.sigma_q)

    data = [mixture(args.num_samples, rng, std=args.sigma_0) for _ in range(NUM_DATA_SETS)]
    x_0 = mixture(max(args.num_samples, NUM_STARTS), rng, std=args.sigma_0)
    p_1 = x_0 + args.sigma_q * rng.standard_normal(x_0.shape)
    x_1 = p_1[:NUM_STARTS]
    truth, accuracy = solution(x_1, args.sigma_q, std=args.sigma_0)
    case = (known, x_1, truth)

    errors = measure_errors(*case, grids, BUDGETS, "errors")
    at_num_steps = measure_errors(*case, grids, [args.num_steps], "errors")
    needs = measure_needs(errors, *case, grids, spread(args.sigma_0))
    best = {sampler: best_grid(needs, sampler) for sampler in SAMPLERS}
    orders, segment = measure_orders(*case, args.sigma_q, rng)
    laws, floor = measure_laws(known, p_1[: args.num_samples], data, best, grids, rng)
    switches = measure_switches(args.num_steps, rng, **setting)
    wrong, plenty = measure_disturbed(*case, **setting)
    samples = measure_samples(known, p_1[: args.num_samples], grids, rng)

    report_needs(needs, at_num_steps, measure_last_steps(**setting), accuracy, args)
    report_orders(orders)
    report_laws(laws, floor, args)
    report_limits(switches, wrong, plenty, args)

    folder = args.figures_dir
    figure = draw_errors(errors, orders["Gaussians"], best, laws, floor, **setting)
    save(figure, folder / "error-vs-evaluations.jpg")
    save(draw_grids(at_num_steps, args.num_steps, **setting), folder / "grids.jpg")
    save(draw_samples(samples, data[0]), folder / "ten-evaluations.jpg")
    figure = draw_limits(segment, orders["segment"], wrong, errors)
    save(figure, folder / "where-it-ends.jpg")


if __name__ == "__main__":
    main()
