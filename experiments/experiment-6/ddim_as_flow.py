"""Experiment 6: DDIM is a linear flow, and noise schedules are changes of scale and time.

The claim
    Section 4.6, Claim 4. Draw x_0 from the data and x_1 = x_0 + N(0, sigma_q^2): the diffusion
    coupling. Move each pair on a straight line, x_t = t x_1 + (1 - t) x_0. The marginal flow of
    these lines has DDIM's trajectories, on another clock: DDIM at time t is the flow at sqrt(t).
    The noise in x_t has standard deviation sigma_q sqrt(t) for DDIM, and sigma_q t for the flow.
    At equal noise both know the same E[x_0 | x_t], and both move straight towards it.

Why one step serves every schedule
    A schedule is a pair: x_t = alpha_t x_0 + beta_t N(0, 1). With D = E[x_0 | x_t], the
    deterministic step from t to r keeps the noise that D implies, (x_t - alpha_t D) / beta_t:
        x_r = alpha_r D + (beta_r / beta_t) (x_t - alpha_t D).
    Write y = x / alpha and sigma = beta / alpha, the noise level. The step becomes
        y_r = D + (sigma_r / sigma_t) (y_t - D),
    and D depends on y_t and sigma_t alone. So a schedule only says at which times which levels are
    visited, and in which unit x is measured. On the same levels all schedules give the same y.

Where schedules differ
    the grid   steps of equal time are at other noise levels in each schedule: other errors;
    the base   at t = 1 the diffusion coupling is at p_1, data plus noise, but Algorithm 2 starts
               from N(0, sigma_q^2). The independent coupling, x_0 and x_1 drawn separately, has
               that base by construction: at t = 1 its alpha is 0, so its level is infinite, and
               there the base is exact. Algorithm 2 puts the same base at the level sigma_q. With a
               large sigma_q the two meet.

What is exact
    In one dimension trajectories of an ODE cannot cross, so the ODE keeps each sample's rank: the
    u-quantile of the noised data goes to the u-quantile of the data. This is the ODE's solution in
    closed form (`quantile`), and with it the share that each data point receives (`exact_shares`;
    the heaviest point's is printed).

What to look for in figures/
    same-trajectories.jpg   two curves on two clocks, one curve at equal noise
    schedules.jpg           where twenty steps of equal time fall, and the error that they make
    share-vs-sigma-q.jpg    the right base gives the right share; a large sigma_q makes both right

Run
    python ddim_as_flow.py

Try this
    python ddim_as_flow.py --num-steps 5                           few steps: the grid matters
    python ddim_as_flow.py --points -2 0 1.5 --weights .2 .5 .3    three points
    python ddim_as_flow.py --points -.44 1.76                      data of mean zero: a better base
"""

import argparse
import io
import math
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

# ------------------------------------------- The data -------------------------------------------
# x_0 is the point a_i with probability w_i, and x_t = alpha x_0 + beta N(0, 1). Each schedule says
# what alpha and beta are at time t; its clock says at which t the level beta / alpha is sigma.


def variance_exploding(t, sigma_q):
    """(alpha, beta) of the tutorial's process, x_t = x_0 + N(0, sigma_q^2 t).  0 <= t <= 1."""
    return np.ones_like(t), sigma_q * np.sqrt(t)


def variance_exploding_clock(sigma, sigma_q):
    """The t at which the noise level is sigma."""
    return (sigma / sigma_q) ** 2


RATE_0, RATE_1 = 0.1, 20.0  # at t = 0 and t = 1: 1000 times eq. (74)'s beta in Ho et al. (2020)


def variance_preserving(t):
    """(alpha, beta) of eq. (74) with a linear rate, in the limit of small steps.  0 <= t <= 1.

    Each step of eq. (74) multiplies x by sqrt(1 - rate dt). So alpha = exp(-I / 2), where I is the
    integral of the rate from 0 to t, and beta^2 = 1 - alpha^2: data of variance 1 keep it.
    """
    integral = RATE_0 * t + (RATE_1 - RATE_0) * t**2 / 2
    return np.exp(-integral / 2), np.sqrt(-np.expm1(-integral))


def variance_preserving_clock(sigma):
    """The t at which the noise level is sigma: the integral is log(1 + sigma^2), a quadratic."""
    integral = np.log1p(sigma**2)
    return 2 * integral / (RATE_0 + np.sqrt(RATE_0**2 + 2 * (RATE_1 - RATE_0) * integral))


def karras(t):
    """(alpha, beta) of Karras et al. (2022): no scaling, and time is the noise level.  t >= 0."""
    return np.ones_like(t), t


def karras_clock(sigma):
    """The t at which the noise level is sigma."""
    return sigma


def rectified_flow(t, sigma_q):
    """(alpha, beta) of the line t x_1 + (1 - t) x_0 with x_1 ~ N(0, sigma_q^2).  0 <= t <= 1."""
    return 1 - t, sigma_q * t


def rectified_flow_clock(sigma, sigma_q):
    """The t at which the noise level is sigma."""
    return sigma / (sigma_q + sigma)


def schedules(sigma_q):
    """The four of them: {name: (schedule, clock)}."""
    exploding = partial(variance_exploding, sigma_q=sigma_q)
    exploding_clock = partial(variance_exploding_clock, sigma_q=sigma_q)
    rectified = partial(rectified_flow, sigma_q=sigma_q)
    rectified_clock = partial(rectified_flow_clock, sigma_q=sigma_q)
    return {
        "variance exploding": (exploding, exploding_clock),
        "variance preserving": (variance_preserving, variance_preserving_clock),
        "sigma = t": (karras, karras_clock),
        "rectified flow": (rectified, rectified_clock),
    }


# --------------------------------------- The reverse mean ---------------------------------------


def denoiser(x_t, alpha, beta, *, points, weights):
    """E[x_0 | x_t] where x_t = alpha x_0 + beta N(0, I), by Bayes' rule.

    x_t: (n, d);  alpha >= 0 and beta > 0: floats;  points: (k, d);  weights: (k,), positive.
    Returns (n, d).

    In log w_i - |x_t - alpha a_i|^2 / (2 beta^2), the term |x_t|^2 is the same for all i and
    cancels.
    """
    dots = alpha * points @ x_t.T - alpha**2 * (points**2).sum(axis=1, keepdims=True) / 2
    logits = np.log(weights)[:, None] + dots / beta**2  # (k, n): a row a point
    odds = np.exp(logits - logits.max(axis=0))
    return (odds / odds.sum(axis=0)).T @ points


def reverse_mean(x_t, t, dt, *, points, weights, sigma_q):
    """E[x_{t-dt} | x_t] from E[x_0 | x_t], eq. (24): what Algorithm 2 asks for.

    x_t: (n, d) points at time t;  0 < dt <= t <= 1.  Returns (n, d).
    """
    mean_x_0 = denoiser(x_t, *variance_exploding(t, sigma_q), points=points, weights=weights)
    return (dt / t) * mean_x_0 + (1 - dt / t) * x_t


def diffusion_coupling(t, sigma_q):
    """(alpha, beta) of the line t x_1 + (1 - t) x_0 with x_1 = x_0 + N(0, sigma_q^2), eq. (73).

    x_0 is in both terms, and t + (1 - t) = 1: it is Karras et al.'s schedule in units of sigma_q.
    """
    return karras(sigma_q * t)


# The same line when x_1 ~ N(0, sigma_q^2) is drawn without looking at x_0: it is rectified flow.
independent_coupling = rectified_flow


def velocity(x_t, t, *, coupling, points, weights, sigma_q):
    """The marginal flow v_t(x_t) = E[x_0 - x_1 | x_t] of linear pointwise flows, eq. (64) and (65).

    x_t = t x_1 + (1 - t) x_0 gives x_0 - x_1 = (x_0 - x_t) / t, whatever the coupling. The coupling
    only decides how much noise E[x_0 | x_t] sees.  x_t: (n, d);  0 < t <= 1.  Returns (n, d).
    """
    mean_x_0 = denoiser(x_t, *coupling(t, sigma_q), points=points, weights=weights)
    return (mean_x_0 - x_t) / t


# ----------------------------------------- The samplers -----------------------------------------
# They know nothing of the data but the function that they are given.


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


def flow(velocity, x_1, times):
    """Pseudocode 5 on any grid: x_r = x_t + v_t(x_t) (t - r), for neighbours t > r of the grid.

    velocity(x_t, t) -> like x_t;  x_1: draws of the base;  times: (num_steps + 1,), from 1 to 0.
    Yields num_steps arrays like x_1, the last of them x_0.
    """
    x_t = x_1
    for t, r in zip(times[:-1], times[1:]):
        x_t = x_t + velocity(x_t, t) * (t - r)
        yield x_t


def sample(denoiser, x, alphas, betas):
    """Any schedule's deterministic step: x_r = alpha_r D + (beta_r / beta_t) (x_t - alpha_t D).

    denoiser(x_t, alpha_t, beta_t) -> D = E[x_0 | x_t], like x_t;  x: starts at the first time.
    alphas, betas: (num_steps + 1,), from noise to data; of the betas only the last is 0.
    Yields num_steps arrays like x, the last of them x_0.
    """
    for i in range(len(betas) - 1):
        mean_x_0 = denoiser(x, alphas[i], betas[i])
        x = alphas[i + 1] * mean_x_0 + betas[i + 1] / betas[i] * (x - alphas[i] * mean_x_0)
        yield x


# ------------------------------------------- The truth ------------------------------------------
# The probability-flow ODE, dy/dsigma = (y - E[x_0 | y]) / sigma, turns the density of x_0 + N(0,
# sigma^2) at one level into that at the next. On a line its trajectories cannot cross. So the mass
# to the left of a trajectory stays the same: it is at the u-quantile always, with the same u.

erfc = np.vectorize(math.erfc, otypes=[float])


def normal_cdf(z):
    """P(N(0, 1) < z), for an array z."""
    return erfc(-z / 2**0.5) / 2


def quantile(u, sigma, *, points, weights):
    """The u-quantile of x_0 + N(0, sigma^2), by bisection.

    0 < u < 1 and sigma > 0: arrays that broadcast;  points: (k, 1).  Returns their common shape.
    """
    u, sigma = np.broadcast_arrays(u, sigma)
    low = points.min() - 10 * sigma
    high = points.max() + 10 * sigma
    for _ in range(50):
        middle = (low + high) / 2
        below = sum(w * normal_cdf((middle - a) / sigma) for w, a in zip(weights, points[:, 0]))
        low = np.where(below < u, middle, low)
        high = np.where(below < u, high, middle)
    return (low + high) / 2


def quantile_of_data(u, *, points, weights):
    """The same at sigma = 0: the data's own u-quantile, one of its points.  u: (n,)."""
    return points[np.searchsorted(np.cumsum(weights)[:-1], u), 0]


def borders(sigma, *, points, weights):
    """Where the ODE parts the line at level sigma: left of border j is what ends at a_1, ..., a_j.

    points: (k, 1), increasing.  Returns (k - 1,).

    The mass to the left is w_1 + ... + w_j. So what a_1, ..., a_j put beyond the border is as much
    as the other points put before it. Bisection on this balance keeps its digits where both are
    tiny, and `quantile` would not.
    """
    first = np.tri(len(points) - 1, len(points), dtype=bool)  # row j: the points up to a_j
    low = np.full(len(points) - 1, points.min() - 10 * sigma)
    high = np.full(len(points) - 1, points.max() + 10 * sigma)
    for _ in range(60):
        middle = (low + high) / 2
        z = (middle[:, None] - points[:, 0]) / sigma
        surplus = np.where(first, normal_cdf(-z), -normal_cdf(z)) @ weights
        low = np.where(surplus > 0, middle, low)
        high = np.where(surplus > 0, high, middle)
    return (low + high) / 2


def exact_shares(*, points, weights, sigma_q):
    """Share of the base N(0, sigma_q^2) that the ODE carries to each of the points: (k,).

    The base has its own mass between the borders: w_i only if it is p_1.
    """
    below = normal_cdf(borders(sigma_q, points=points, weights=weights) / sigma_q)
    return np.diff(below, prepend=0, append=1)


# ------------------------------------------- Measuring ------------------------------------------
# Claim 4 and the schedules are measured without chance: from NUM_STARTS quantiles of p_1.
NUM_STARTS = 200
STEP_COUNTS = [5, 10, 20, 50, 100, 200]  # num_steps whose shares are sampled
FACTORS = np.array([0.5, 1, 2.5, 5, 10, 25])  # shares are sampled at these multiples of sigma_q


def times(num_steps):
    """t = 1, 1 - dt, ..., 0.  Returns (num_steps + 1,)."""
    return np.arange(num_steps, -1, -1) / num_steps


def starts(*, points, weights, sigma_q):
    """The ranks u = (i + 1/2) / NUM_STARTS, (NUM_STARTS,), and their quantiles of p_1, a column."""
    u = (np.arange(NUM_STARTS) + 0.5) / NUM_STARTS
    return u, quantile(u, sigma_q, points=points, weights=weights)[:, None]


def largest_distance(steps, reference):
    """The largest |difference| of two samplers over all steps and starts."""
    return max(np.abs(x - y).max() for x, y in zip(steps, reference))


def measure_claim_4(x_1, num_steps, *, sigma_q, **data):
    """Pseudocode 5 with the diffusion coupling against Algorithm 2, from the same starts x_1.

    Returns {grid: largest distance over all steps}, for the grid sqrt(t) and the uniform grid.
    """
    known = partial(reverse_mean, sigma_q=sigma_q, **data)
    linear = partial(velocity, coupling=diffusion_coupling, sigma_q=sigma_q, **data)
    t = times(num_steps)
    distances = {}
    for name, grid in [("sqrt(t)", np.sqrt(t)), ("uniform", t)]:
        algorithm_2 = ddim(known, x_1, num_steps)
        distances[name] = largest_distance(flow(linear, x_1, grid), algorithm_2)
    return distances


def measure_trajectories(num_steps, *, sigma_q, **data):
    """Six trajectories: of the ODE, of Algorithm 2, and of Pseudocode 5 on two grids.

    Returns {"level": sigma / sigma_q of the ODE's, (250,);  "exact": (250, 6);  "Algorithm 2",
    "sqrt(t)", "uniform": (num_steps + 1, 6), the starts included}.
    """
    u = np.array([0.02, 0.2, 0.6, 0.76, 0.83, 0.95])
    x_1 = quantile(u, sigma_q, **data)[:, None]
    level = np.linspace(1, 0.004, 250)
    known = partial(reverse_mean, sigma_q=sigma_q, **data)
    linear = partial(velocity, coupling=diffusion_coupling, sigma_q=sigma_q, **data)
    t = times(num_steps)
    return {
        "level": level,
        "exact": quantile(u, sigma_q * level[:, None], **data),
        "Algorithm 2": np.array([x_1, *ddim(known, x_1, num_steps)])[..., 0],
        "sqrt(t)": np.array([x_1, *flow(linear, x_1, np.sqrt(t))])[..., 0],
        "uniform": np.array([x_1, *flow(linear, x_1, t)])[..., 0],
    }


def measure_same_levels(x_1, num_steps, *, sigma_q, **data):
    """Every schedule on the noise levels of Algorithm 2, from the same starts x / alpha = x_1.

    Returns {schedule: largest distance of its x / alpha to Algorithm 2's x}, and the same for
    Pseudocode 5 with the independent coupling.
    """
    algorithm_2 = list(ddim(partial(reverse_mean, sigma_q=sigma_q, **data), x_1, num_steps))
    sigmas = sigma_q * np.sqrt(times(num_steps))
    distances = {}
    for name, (schedule, clock) in schedules(sigma_q).items():
        alphas, betas = schedule(clock(sigmas))
        steps = sample(partial(denoiser, **data), alphas[0] * x_1, alphas, betas)
        scaled = (x / alpha for x, alpha in zip(steps, alphas[1:]))
        distances[name] = largest_distance(scaled, algorithm_2)
    linear = partial(velocity, coupling=independent_coupling, sigma_q=sigma_q, **data)
    grid = rectified_flow_clock(sigmas, sigma_q)
    steps = flow(linear, (1 - grid[0]) * x_1, grid)
    scaled = (x / (1 - t) for x, t in zip(steps, grid[1:]))
    distances["Pseudocode 5, independent coupling"] = largest_distance(scaled, algorithm_2)
    return distances


def uniform_grid(schedule, clock, num_steps, sigma_q):
    """(alphas, betas), (num_steps + 1,) each: equal steps of time from the level sigma_q to 0."""
    return schedule(clock(sigma_q) * times(num_steps))


def measure_schedules(num_steps, *, sigma_q, **data):
    """Each schedule on its own uniform grid, held to the ODE's solution at each of its levels.

    Returns {schedule: row}, a row being {"start": its time at the level sigma_q;
    "sigmas": its levels, (num_steps + 1,);  "rms": root mean square over the starts of the distance
    of x / alpha to the ODE's solution, after each step, (num_steps,);  "largest": of them}.
    """
    u, x_1 = starts(sigma_q=sigma_q, **data)
    rows = {}
    for name, (schedule, clock) in schedules(sigma_q).items():
        alphas, betas = uniform_grid(schedule, clock, num_steps, sigma_q)
        sigmas = betas / alphas
        steps = sample(partial(denoiser, **data), alphas[0] * x_1, alphas, betas)
        y = np.array([x[:, 0] / alpha for x, alpha in zip(steps, alphas[1:])])
        along = quantile(u, sigmas[1:-1, None], **data)
        solution = np.concatenate([along, [quantile_of_data(u, **data)]])
        rms = np.sqrt(((y - solution) ** 2).mean(axis=1))
        rows[name] = {"start": clock(sigma_q), "sigmas": sigmas, "rms": rms, "largest": rms.max()}
    return rows


def share_of_heaviest(steps, *, points, weights):
    """Share of samples that end nearest to the point of largest weight, and its standard error.

    steps: a sampler at work on (n, 1).
    """
    for x_0 in steps:
        pass
    nearest = np.argmin(np.abs(x_0 - points.T), axis=1)
    share = np.mean(nearest == np.argmax(weights))
    return share, np.sqrt(share * (1 - share) / len(x_0))


def measure_share_vs_steps(num_samples, rng, *, sigma_q, **data):
    """Share of the heaviest point from the base N(0, sigma_q^2), for each of STEP_COUNTS.

    Both samplers take their own uniform grid, and the same fresh starts for each number of steps.
    Returns {sampler: (share, standard error), (n,) each}.
    """
    known = partial(reverse_mean, sigma_q=sigma_q, **data)
    linear = partial(velocity, coupling=independent_coupling, sigma_q=sigma_q, **data)
    shares = {"independent": [], "Algorithm 2": []}
    for num_steps in STEP_COUNTS:
        x_1 = sigma_q * rng.standard_normal((num_samples, 1))
        steps = flow(linear, x_1, times(num_steps))
        shares["independent"].append(share_of_heaviest(steps, **data))
        steps = ddim(known, x_1, num_steps)
        shares["Algorithm 2"].append(share_of_heaviest(steps, **data))
    return {name: np.transpose(pairs) for name, pairs in shares.items()}


def measure_share_vs_sigma_q(num_samples, rng, *, sigma_q, **data):
    """The same for FACTORS times sigma_q, on a grid that is fine for each of them.

    By Claim 4 the diffusion coupling is Algorithm 2; Pseudocode 5 can take it on any grid. On this
    one t / (1 - t) falls from 100 to 1/1000 by equal factors: steps are small near both ends.
    Returns {coupling: (share, standard error), (n,) each}.
    """
    odds = np.geomspace(100, 0.001, 199)
    grid = np.concatenate([[1], odds / (1 + odds), [0]])
    couplings = {"independent": independent_coupling, "diffusion": diffusion_coupling}
    shares = {name: [] for name in couplings}
    for std in sigma_q * FACTORS:
        x_1 = std * rng.standard_normal((num_samples, 1))
        for name, coupling in couplings.items():
            linear = partial(velocity, coupling=coupling, sigma_q=std, **data)
            shares[name].append(share_of_heaviest(flow(linear, x_1, grid), **data))
    return {name: np.transpose(pairs) for name, pairs in shares.items()}


def measure_exact_share(*, sigma_q, **data):
    """Closed form, dt -> 0, of the heaviest point's share from the base.

    Returns {"independent": its weight;  "diffusion": by exact_shares at sigma_q;  "table": the same
    for FACTORS times sigma_q, (n,);  "sigma_q", "curve": the same for the figure, (60,) each}.
    """
    heaviest = np.argmax(data["weights"])

    def share(std):
        return exact_shares(sigma_q=std, **data)[heaviest]

    fine = sigma_q * np.geomspace(FACTORS[0] / 1.3, FACTORS[-1] * 1.3, 60)
    return {
        "independent": data["weights"][heaviest],
        "diffusion": share(sigma_q),
        "table": np.array([share(std) for std in sigma_q * FACTORS]),
        "sigma_q": fine,
        "curve": np.array([share(std) for std in fine]),
    }


# Two of the text's slips (v2), on a point mass at x_0 = 0, so that E[x_0 | x_t] = 0. By eq. (59) a
# flow moves as dx/dt = -v. The trajectory of eq. (72), x_t = sqrt(t) x_1, needs v = -x_t / (2t);
# that of eq. (66), x_t = t x_1, needs v = -x_t / t.
SLIPS = {
    "eq. (70), as printed:  v = (x_t - x_0) / 2t": lambda x_t, t: x_t / (2 * t),
    "eq. (70), corrected:   v = (x_0 - x_t) / 2t": lambda x_t, t: -x_t / (2 * t),
    "Lemma 4, as printed:   v = E[x_0 - x_t | x_t]": lambda x_t, t: -x_t,
    "Lemma 4, corrected:    v = E[x_0 - x_t | x_t] / t": lambda x_t, t: -x_t / t,
}


def measure_slips(num_steps):
    """How far from the point mass Pseudocode 5 ends, |x_0| / |x_1|, on the uniform grid.

    Returns {velocity: float}; 0 when it arrives, above 1 when it is driven away.
    """
    left = {}
    for name, v in SLIPS.items():
        *_, x_0 = flow(v, 1.0, times(num_steps))
        left[name] = abs(x_0)
    return left


# ------------------------------------------- Printing -------------------------------------------


def report(claim, same_levels, tables, shares, by_sigma_q, exact, slips, args):
    """tables, slips: {num_steps: of measure_schedules, measure_slips};  the rest: of measure_*."""
    points = zip(args.points[:, 0], args.weights)
    print("data:", ", ".join(f"{a:g} with probability {w:g}" for a, w in points), end="; ")
    print(f"sigma_q = {args.sigma_q:g}")
    print(f"largest distance to Algorithm 2 over {args.num_steps} steps from {NUM_STARTS} starts")
    for grid, distance in claim.items():
        print(f"  Pseudocode 5, diffusion coupling, {grid + ' grid':<17}{distance:9.1e}")
    for name, distance in same_levels.items():
        print(f"  {name + ', its levels':<51}{distance:9.1e}")
    print(
        "each on its own uniform grid: largest RMS distance to the ODE's solution (last level > 0)"
    )
    print(f"{'from t':>33}" + "".join(f"{f'{n} steps':>20}" for n in tables))
    for name in schedules(args.sigma_q):
        rows = [table[name] for table in tables.values()]
        cells = "".join(f"{row['largest']:12.4f} ({row['sigmas'][-2]:.3f})" for row in rows)
        print(f"  {name:<22}{rows[0]['start']:9.4f}{cells}")
    print(f"share of the heaviest point: {args.num_samples} samples from N(0, sigma_q^2)")
    print("    steps   independent coupling   Algorithm 2")
    pairs = zip(STEP_COUNTS, shares["independent"].T, shares["Algorithm 2"].T)
    for num_steps, (left, left_se), (right, right_se) in pairs:
        print(f"  {num_steps:7d}   {left:.4f} +- {left_se:.4f}       {right:.4f} +- {right_se:.4f}")
    print(f"    exact   {exact['independent']:.4f}                 {exact['diffusion']:.4f}")
    print("  sigma_q   independent coupling   diffusion coupling     exact")
    sides = by_sigma_q["independent"].T, by_sigma_q["diffusion"].T
    for factor, (left, left_se), (right, right_se), known in zip(FACTORS, *sides, exact["table"]):
        cells = f"{left:.4f} +- {left_se:.4f}       {right:.4f} +- {right_se:.4f}"
        print(f"  {args.sigma_q * factor:7g}   {cells}       {known:.4f}")
    print("slips in v2: |x_0| / |x_1| after Pseudocode 5 on a point mass; an arrival is 0")
    print(" " * 53 + "".join(f"{f'{n} steps':>12}" for n in slips))
    for name in SLIPS:
        print(f"  {name:<51}" + "".join(f"{left[name]:12.4f}" for left in slips.values()))


# ------------------------------------------ The figures -----------------------------------------
plt.switch_backend("agg")  # the figures are files: no window
plt.rcParams.update({"font.size": 12, "axes.titlesize": 12})
STYLES = [("C0", "o"), ("C1", "s"), ("C2", "^"), ("k", "x")]  # of the four schedules


def draw_trajectories(paths, *, sigma_q, points):
    """Against each sampler's own time, then against the noise level.  paths: as measured."""
    fig, (top, bottom) = plt.subplots(2, 1, figsize=(6, 9.6), layout="constrained")
    t = times(len(paths["uniform"]) - 1)
    level, exact = paths["level"], paths["exact"]
    top.plot(level**2, exact, "C0", lw=1)
    top.plot(level, exact, "C1", lw=1)
    top.plot(t, paths["Algorithm 2"], "o", color="C0", ms=4, mfc="w")
    top.plot(t, paths["uniform"], "x", color="C1", ms=5)
    top.plot([], [], "C0o-", ms=4, mfc="w", lw=1, label="DDIM at $t$")
    top.plot([], [], "C1x-", ms=5, lw=1, label="linear flow at $t$, diffusion coupling")
    top.set(xlabel="$t$", title="Own clocks: DDIM lingers at high noise,\nthe flow does not")

    rings = {"color": "C0", "ms": 8, "mfc": "none"}
    bottom.plot(sigma_q * level, exact, "0.6", lw=1)
    bottom.plot(sigma_q * np.sqrt(t), paths["Algorithm 2"], "o", **rings)
    bottom.plot(sigma_q * np.sqrt(t), paths["sqrt(t)"], "k.", ms=4)
    bottom.plot(sigma_q * t, paths["uniform"], "x", color="C1", ms=5)
    bottom.plot([], [], "0.6", lw=1, label="the ODE, exact")
    bottom.plot([], [], "o", **rings, label="DDIM")
    bottom.plot([], [], "k.", ms=4, label=r"linear flow, grid $\sqrt{t}$")
    bottom.plot([], [], "x", color="C1", ms=5, label="linear flow, uniform grid")
    bottom.set(
        xlabel=r"noise level $\sigma$: $\sigma_q \sqrt{t}$ for DDIM, $\sigma_q t$ for the flow"
    )
    bottom.set_title("At equal noise: one trajectory, and on the\ngrid $\\sqrt{t}$ the same points")
    for ax in (top, bottom):
        ax.plot(0 * points, points, "k*", ms=12, zorder=1)
        ax.set_xlim(left=-0.03 * ax.get_xlim()[1])
        ax.set_ylim(top=ax.get_ylim()[1] + 0.2 * np.ptp(ax.get_ylim()))
        ax.set_ylabel("$x_t$  (stars: the data)")
        ax.legend(fontsize=10, ncols=2, loc="upper left")
    return fig


def draw_schedules(tables):
    """tables: {num_steps: of measure_schedules}."""
    heights = [1] + [1.5 for _ in tables]
    size = {"figsize": (6, 9.6), "layout": "constrained", "height_ratios": heights}
    fig, (top, *axes) = plt.subplots(len(heights), 1, sharex=True, **size)
    few = min(tables)
    for (color, mark), (name, row) in zip(STYLES, tables[few].items()):
        height = list(tables[few]).index(name)
        top.plot(row["sigmas"], np.full(few + 1, height), mark, color=color, ms=5)
        top.text(0, height - 0.2, name, fontsize=11)
    top.set(ylim=(3.5, -0.8), yticks=[])
    top.set_title(f"{few} steps of equal time visit other noise levels")
    for ax, (num_steps, rows) in zip(axes, tables.items()):
        for (color, mark), (name, row) in zip(STYLES, rows.items()):
            style = {"color": color, "lw": 1.2, "ms": 4, "markevery": max(1, num_steps // 20)}
            ax.plot(row["sigmas"][1:], row["rms"], mark + "-", label=name, **style)
        ax.set_title(f"{num_steps} steps: other levels, other errors")
        ax.set_ylabel("RMS distance to the ODE")
        ax.legend(fontsize=10)
        ax.grid(alpha=0.3)
    axes[-1].set_xlabel(r"noise level $\sigma = \beta / \alpha$ (sampling runs from right to left)")
    return fig


def draw_shares(shares, by_sigma_q, exact, sigma_q):
    """shares, by_sigma_q: of measure_share_*;  exact: of measure_exact_share."""
    fig, (top, bottom) = plt.subplots(2, 1, figsize=(6, 8.4), layout="constrained")
    top.plot(exact["sigma_q"], exact["curve"], "C0", lw=1.2)
    bottom.axhline(exact["diffusion"], color="C0", lw=1.2)
    panels = [
        (top, sigma_q * FACTORS, by_sigma_q["independent"], by_sigma_q["diffusion"]),
        (bottom, STEP_COUNTS, shares["independent"], shares["Algorithm 2"]),
    ]
    for ax, x, (left, left_se), (right, right_se) in panels:
        style = {"ms": 5, "capsize": 3, "lw": 1.2}
        label = "independent coupling, $\\pm$ 2 standard errors"
        ax.errorbar(x, left, 2 * left_se, fmt="s", color="C1", label=label, **style)
        label = "diffusion coupling (DDIM), likewise"
        ax.errorbar(x, right, 2 * right_se, fmt="o", color="C0", label=label, **style)
        ax.axhline(exact["independent"], color="C1", lw=1.2)
        ax.plot([], [], "0.4", lw=1.2, label=r"lines: closed form, $\Delta t \to 0$")
        ax.set(xscale="log", ylabel="share of the heaviest point")
        ax.set_xticks(x, [f"{value:g}" for value in x])
        ax.minorticks_off()
        ax.grid(alpha=0.3)
    top.set(xlabel=r"$\sigma_q$")
    top.set_title(
        "From $N(0, \\sigma_q^2)$ the independent coupling gives\n"
        "the right share, DDIM only if $\\sigma_q$ is large"
    )
    bottom.set(xlabel=r"num_steps $= 1/\Delta t$")
    bottom.set_title(rf"$\sigma_q$ = {sigma_q:g}: more steps do not mend a wrong base")
    bottom.legend(fontsize=10, loc="upper left", bbox_to_anchor=(0, -0.18))
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
    add("--num-steps", type=number(int, 1, 1000), default=20, help="steps of a sampler, 1/dt")
    add("--num-samples", type=number(int, 1, 10**6), default=10_000, help="samples of each share")
    points = {"type": number(float, -100, 100), "nargs": "+", "default": [-1.1, 1.1]}
    add("--points", **points, help="the data's points a_1 < a_2 < ...")
    weights = {"type": number(float, 1e-6, 1), "nargs": "+", "default": [0.8, 0.2]}
    add("--weights", **weights, help="the probability of each")
    add("--sigma-q", type=number(float, 0.1, 100), default=2.0, help="std of the noise at t = 1")
    add("--seed", type=number(int, 0, 2**63 - 1), default=0, help="seed of every draw")
    add("--figures-dir", type=Path, default=Path(__file__).parent / "figures", help="their folder")
    args = parser.parse_args(argv)
    args.points = np.array(args.points)[:, None]
    args.weights = np.array(args.weights)
    if not np.all(np.diff(args.points[:, 0]) > 0) or np.ptp(args.points) > 25 * args.sigma_q:
        parser.error("argument --points: must increase, by no more than 25 sigma_q in all")
    if len(args.weights) != len(args.points) or abs(args.weights.sum() - 1) > 1e-9:
        parser.error("argument --weights: one for each point is needed, and 1 in all")
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
    data = {"points": args.points, "weights": args.weights, "sigma_q": args.sigma_q}
    counts = [args.num_steps, 5 * args.num_steps]

    _, x_1 = starts(**data)
    paths = measure_trajectories(args.num_steps, **data)
    claim = measure_claim_4(x_1, args.num_steps, **data)
    same_levels = measure_same_levels(x_1, args.num_steps, **data)
    tables = {num_steps: measure_schedules(num_steps, **data) for num_steps in counts}
    shares = measure_share_vs_steps(args.num_samples, rng, **data)
    by_sigma_q = measure_share_vs_sigma_q(args.num_samples, rng, **data)
    exact = measure_exact_share(**data)
    slips = {num_steps: measure_slips(num_steps) for num_steps in counts}

    report(claim, same_levels, tables, shares, by_sigma_q, exact, slips, args)

    folder = args.figures_dir
    figure = draw_trajectories(paths, sigma_q=args.sigma_q, points=args.points)
    save(figure, folder / "same-trajectories.jpg")
    save(draw_schedules(tables), folder / "schedules.jpg")
    figure = draw_shares(shares, by_sigma_q, exact, args.sigma_q)
    save(figure, folder / "share-vs-sigma-q.jpg")


if __name__ == "__main__":
    main()
