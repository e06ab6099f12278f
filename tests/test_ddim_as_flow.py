"""Experiment 6: DDIM as a linear flow, schedules as changes of scale and time, and where they end.

The references below share no code with the script: sums and products written out, the ODE by
Runge-Kutta, densities by the trapezoidal rule, conditional means by what defines them (the error is
uncorrelated with every function of x_t).
"""

import math
import re
from functools import partial
from statistics import NormalDist
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest
from conftest import EXPERIMENTS, load

script = load("experiment-6/ddim_as_flow.py")

NORMAL = NormalDist()
PAIR = {"points": np.array([[-1.1], [1.1]]), "weights": np.array([0.8, 0.2])}
THREE = {"points": np.array([[-2.0], [0.3], [1.5]]), "weights": np.array([0.2, 0.5, 0.3])}


def random_data(rng, d=1):
    """Two to five points, their weights and a sigma_q within a few units of each other."""
    k = rng.integers(2, 6)
    points = rng.normal(0, 2, (k, d))
    if d == 1:
        points = np.sort(points, axis=0)
    return {
        "points": points,
        "weights": rng.dirichlet(np.ones(k)),
        "sigma_q": 10 ** rng.uniform(-0.3, 1),
    }


# ------------------------------------------- References -------------------------------------------


def mean_x_0(x, alpha, beta, points, weights):
    """E[x_0 | x] for one x, (d,): Bayes' rule with every density written out."""
    logs = [
        math.log(w) - sum((x - alpha * a) ** 2) / (2 * beta**2) for a, w in zip(points, weights)
    ]
    odds = [math.exp(value - max(logs)) for value in logs]
    return sum(o * a for o, a in zip(odds, points)) / sum(odds)


def density(x, sigma, points, weights):
    """Density of x_0 + N(0, sigma^2) at x: a float or an array."""
    return sum(
        w * NORMAL_PEAK / sigma * np.exp(-(((x - a) / sigma) ** 2) / 2)
        for a, w in zip(points[:, 0], weights)
    )


NORMAL_PEAK = 1 / math.sqrt(2 * math.pi)


def runge_kutta(y, sigma_from, sigma_to, points, weights, num_steps=400):
    """The ODE dy/dlog(sigma) = -sigma^2 d log p / dy, at fourth order.  y: (n,)."""

    def slope(log_sigma, y):
        sigma = math.exp(log_sigma)
        z = (y[:, None] - points[:, 0]) / sigma
        terms = weights * np.exp(-(z**2 - (z**2).min(axis=1, keepdims=True)) / 2)
        return sigma * (terms * z).sum(axis=1) / terms.sum(axis=1)

    h = math.log(sigma_to / sigma_from) / num_steps
    for i in range(num_steps):
        s = math.log(sigma_from) + i * h
        k_1 = slope(s, y)
        k_2 = slope(s + h / 2, y + h / 2 * k_1)
        k_3 = slope(s + h / 2, y + h / 2 * k_2)
        k_4 = slope(s + h, y + h * k_3)
        y = y + h / 6 * (k_1 + 2 * k_2 + 2 * k_3 + k_4)
    return y


def sampler_end(x, levels, points, weights):
    """Where Euler's steps in the noise level end: y_r = D + (r / t) (y_t - D).

    x: a float;  levels: from noise to 0.
    """
    for t, r in zip(levels[:-1], levels[1:]):
        mean = mean_x_0(np.array([x]), 1.0, t, points, weights)[0]
        x = mean + r / t * (x - mean)
    return x


def watershed(end, points, low, high):
    """The start from which `end`, an increasing function, falls on the middle of two points."""
    middle = points.mean()
    for _ in range(40):
        start = (low + high) / 2
        if end(start) < middle:
            low = start
        else:
            high = start
    return (low + high) / 2


def own_levels(name, num_steps, sigma_q):
    """Noise levels at equal steps of each schedule's time, each from its own definition."""
    k = np.arange(num_steps, -1, -1) / num_steps
    if name == "variance exploding":
        return sigma_q * k**0.5
    if name == "sigma = t":
        return sigma_q * k
    if name == "rectified flow":
        return sigma_q * (k / 2) / (1 - k / 2)
    # x loses the factor exp(-I / 2), I = 0.1 t + 9.95 t^2; sigma^2 = exp(I) - 1, sigma_q at k = 1.
    last = (-0.1 + math.sqrt(0.01 + 39.8 * math.log(1 + sigma_q**2))) / 19.9
    return np.sqrt(np.exp(0.1 * k * last + 9.95 * (k * last) ** 2) - 1)


# ------------------------------------- The data and the schedules ---------------------------------


@pytest.mark.parametrize("sigma_q", [0.1, 2.0, 100.0])
def test_each_clock_tells_when_the_level_is_reached(sigma_q):
    sigmas = sigma_q * np.geomspace(1e-3, 1, 40)
    for name, (schedule, clock) in script.schedules(sigma_q).items():
        t = clock(sigmas)
        alphas, betas = schedule(t)
        np.testing.assert_allclose(betas / alphas, sigmas, rtol=1e-12, err_msg=name)
        assert np.all(np.diff(t) > 0), name
        assert clock(np.zeros(1)) == 0, name
        alpha, beta = schedule(np.zeros(1))
        assert (alpha, beta) == (1, 0), name


def test_schedules_are_the_processes_of_the_text():
    t, sigma_q = np.linspace(0, 1, 7), 3.0
    np.testing.assert_allclose(
        script.variance_exploding(t, sigma_q)[1] ** 2, 9 * t
    )  # x_0 + N(0, sigma_q^2 t)
    np.testing.assert_array_equal(script.karras(t), [np.ones(7), t])
    np.testing.assert_allclose(script.rectified_flow(t, sigma_q), [1 - t, 3 * t])
    alpha, beta = script.variance_preserving(t)
    np.testing.assert_allclose(alpha**2 + beta**2, 1, rtol=1e-14)


@pytest.mark.parametrize("t", [0.05, 0.4, 1.0])
def test_variance_preserving_is_the_limit_of_eq_74(t):
    """x <- sqrt(1 - beta) x + sqrt(beta) noise, T steps; Ho et al.: 1e-4 to .02 for T = 1000."""
    big_t = 100_000
    rate = 0.1 + 19.9 * (np.arange(round(t * big_t)) + 0.5) / big_t
    kept, variance = 1.0, 0.0
    for beta in rate / big_t:
        kept *= math.sqrt(1 - beta)
        variance = (1 - beta) * variance + beta
    alpha, beta = script.variance_preserving(t)
    lost = (
        (rate**2).sum() / big_t**2 / 4
    )  # log(1 - b) = -b - b^2 / 2 - ..., and half of it for the root
    assert math.log(kept) == pytest.approx(math.log(alpha), abs=1.1 * lost)
    assert variance == pytest.approx(float(beta) ** 2, abs=2.2 * lost)


# ----------------------------------- The denoiser and the velocity --------------------------------


@pytest.mark.parametrize("d", [1, 2, 3])
@pytest.mark.parametrize("seed", range(4))
def test_denoiser_is_bayes_rule(seed, d):
    rng = np.random.default_rng([seed, d])
    data = random_data(rng, d)
    points, weights = data["points"], data["weights"]
    alpha, beta = rng.uniform(0, 1), 10 ** rng.uniform(-1, 1)
    x_t = alpha * points[rng.integers(len(points), size=20)] + 2 * beta * rng.standard_normal(
        (20, d)
    )
    exact = [mean_x_0(x, alpha, beta, points, weights) for x in x_t]
    # Exponents reach some thousands, each good to a few parts in 1e16.
    np.testing.assert_allclose(
        script.denoiser(x_t, alpha, beta, points=points, weights=weights), exact, atol=1e-11
    )
    x_t, no_signal = (
        np.zeros((1, d)),
        script.denoiser(np.zeros((1, d)), 0.0, beta, points=points, weights=weights),
    )
    np.testing.assert_allclose(no_signal[0], weights @ points, atol=1e-14)


def assert_uncorrelated(error, x_t):
    """E[error g(x_t)] = 0 for several g, within 5 s.e.: what makes a conditional mean."""
    for g in (np.ones_like(x_t), x_t, np.cos(2 * x_t), np.sign(x_t - 0.4)):
        product = error * g
        assert abs(product.mean()) < 5 * product.std() / len(product) ** 0.5


@pytest.mark.parametrize("t", [0.15, 0.5, 0.9])
@pytest.mark.parametrize("coupling", ["diffusion", "independent"])
def test_velocity_is_the_mean_of_x_0_minus_x_1_given_x_t(coupling, t):
    rng, n, sigma_q = np.random.default_rng(0), 100_000, 1.3
    x_0 = THREE["points"][rng.choice(3, size=n, p=THREE["weights"])]
    x_1 = sigma_q * rng.standard_normal((n, 1)) + (x_0 if coupling == "diffusion" else 0)
    x_t = t * x_1 + (1 - t) * x_0
    function = {"diffusion": script.diffusion_coupling, "independent": script.independent_coupling}[
        coupling
    ]
    v = script.velocity(x_t, t, coupling=function, sigma_q=sigma_q, **THREE)
    assert_uncorrelated((x_0 - x_1 - v)[:, 0], x_t[:, 0])


def test_reverse_mean_is_the_mean_of_x_t_minus_dt_given_x_t():
    rng, n, sigma_q, t, dt = np.random.default_rng(1), 100_000, 1.3, 0.7, 0.2
    x_0 = THREE["points"][rng.choice(3, size=n, p=THREE["weights"])]
    before = x_0 + sigma_q * (t - dt) ** 0.5 * rng.standard_normal((n, 1))
    x_t = before + sigma_q * dt**0.5 * rng.standard_normal((n, 1))
    mean = script.reverse_mean(x_t, t, dt, sigma_q=sigma_q, **THREE)
    assert_uncorrelated((before - mean)[:, 0], x_t[:, 0])
    # What is left is the doubt about x_0 and the bridge between x_0 and x_t (README, on B.10).
    mean_x_0 = script.denoiser(x_t, *script.variance_exploding(t, sigma_q), **THREE)
    bridge = (before - mean) ** 2 - (dt / t * (x_0 - mean_x_0)) ** 2
    exact = sigma_q**2 * (t - dt) * dt / t
    assert abs(bridge.mean() - exact) < 5 * bridge.std() / n**0.5


# ------------------------------------------- The samplers -----------------------------------------


def test_flow_adds_velocity_times_each_step_of_its_grid():
    times = np.array([1.0, 0.7, 0.65, 0.1, 0.0])
    steps = list(script.flow(lambda x_t, t: t + 0 * x_t, np.zeros((2, 1)), times))
    exact = np.cumsum([1 * 0.3, 0.7 * 0.05, 0.65 * 0.55, 0.1 * 0.1])
    assert len(steps) == 4
    for x_t, value in zip(steps, exact):
        np.testing.assert_allclose(x_t, value, rtol=1e-14)


@pytest.mark.parametrize("seed", range(3))
def test_sample_keeps_the_noise_that_the_denoiser_implies(seed):
    rng = np.random.default_rng(seed)
    data = random_data(rng, 2)
    known = partial(script.denoiser, points=data["points"], weights=data["weights"])
    alphas = np.append(np.sort(rng.uniform(0.1, 1, 5)), 0.9)
    betas = np.append(np.sort(rng.uniform(0.5, 4, 5))[::-1], 0)
    x = 3 * rng.standard_normal((30, 2))
    before = x.copy()
    steps = list(script.sample(known, x, alphas, betas))
    assert len(steps) == 5
    for i, after in enumerate(steps):
        mean = np.array(
            [mean_x_0(row, alphas[i], betas[i], data["points"], data["weights"]) for row in x]
        )
        noise = (x - alphas[i] * mean) / betas[i]
        np.testing.assert_allclose(after, alphas[i + 1] * mean + betas[i + 1] * noise, atol=1e-11)
        x = after
    np.testing.assert_array_equal(steps[0] * 0 + before, before)


@pytest.mark.parametrize("sigma_q", [0.5, 2.0])
def test_any_schedule_runs_straight_to_a_point_mass(sigma_q):
    x_1 = np.linspace(-3, 3, 7)[:, None]
    known = partial(script.denoiser, points=np.array([[0.7]]), weights=np.ones(1))
    for schedule, clock in script.schedules(sigma_q).values():
        alphas, betas = schedule(clock(sigma_q) * np.linspace(1, 0, 6))
        *_, x_0 = script.sample(known, x_1, alphas, betas)
        np.testing.assert_allclose(x_0, 0.7, atol=1e-14)


# -------------------------------------- The identities, to rounding -------------------------------


@pytest.mark.parametrize("d", [1, 2])
@pytest.mark.parametrize("num_steps", [1, 2, 7, 50])
@pytest.mark.parametrize("seed", range(4))
def test_claim_4_and_the_schedules_to_rounding(seed, num_steps, d):
    rng = np.random.default_rng([seed, num_steps, d])
    data = random_data(rng, d)
    x_1 = data["points"][rng.integers(len(data["points"]), size=50)] + data[
        "sigma_q"
    ] * rng.standard_normal((50, d))
    claim = script.measure_claim_4(x_1, num_steps, **data)
    assert claim["sqrt(t)"] < 1e-11
    assert (claim["uniform"] > 1e-3) == (num_steps > 1)  # with one step both grids are (1, 0)
    same_levels = script.measure_same_levels(x_1, num_steps, **data)
    assert len(same_levels) == 5
    for name, distance in same_levels.items():
        assert distance < 1e-11, name


@pytest.mark.parametrize("seed", range(3))
def test_algorithm_2_is_euler_in_the_noise_level(seed):
    """So that the identities above cannot all be wrong alike."""
    rng = np.random.default_rng(seed)
    data = random_data(rng)
    x_1 = np.array([[-1.0], [0.2], [2.5]])
    *_, x_0 = script.ddim(partial(script.reverse_mean, **data), x_1, 12)
    levels = own_levels("variance exploding", 12, data["sigma_q"])
    exact = [sampler_end(x, levels, data["points"], data["weights"]) for x in x_1[:, 0]]
    np.testing.assert_allclose(x_0[:, 0], exact, atol=1e-11)


def test_largest_distance_looks_at_every_step_and_start():
    a = np.zeros((4, 3, 1))
    for step in range(4):
        for start in range(3):
            b = a.copy()
            b[step, start] = 0.5
            assert script.largest_distance(a, b) == 0.5
            assert script.largest_distance(b, a) == 0.5


# ------------------------------------------- The truth --------------------------------------------


@pytest.mark.parametrize("data", [PAIR, THREE])
@pytest.mark.parametrize("sigma", [0.2, 1.0, 8.0])
def test_quantile_has_the_mass_u_to_its_left(sigma, data):
    u = np.array([0.001, 0.1, 0.37, 0.6, 0.9, 0.9999])
    for level, x in zip(u, script.quantile(u, sigma, **data)):
        grid = np.linspace(data["points"].min() - 9 * sigma, x, 40_001)
        p = density(grid, sigma, **data)
        mass = (p.sum() - (p[0] + p[-1]) / 2) * (grid[1] - grid[0])
        assert mass == pytest.approx(level, abs=1e-7)


def test_quantile_broadcasts_and_ends_at_the_datas_own():
    u, sigmas = np.array([0.1, 0.3, 0.69, 0.71, 0.95]), np.array([[2.0], [1e-7]])
    table = script.quantile(u, sigmas, **THREE)
    assert table.shape == (2, 5)
    np.testing.assert_allclose(table[0], script.quantile(u, 2.0, **THREE), atol=1e-12)
    np.testing.assert_array_equal(script.quantile_of_data(u, **THREE), [-2, 0.3, 0.3, 1.5, 1.5])
    np.testing.assert_allclose(table[1], script.quantile_of_data(u, **THREE), atol=1e-6)


@pytest.mark.parametrize("data", [PAIR, THREE])
def test_the_ode_keeps_quantiles(data):
    u = np.array([0.01, 0.15, 0.4, 0.66, 0.78, 0.83, 0.99])
    x_1 = script.quantile(u, 2.0, **data)
    for sigma in (1.0, 0.5, 0.2):
        solved = runge_kutta(x_1, 2.0, sigma, **data)
        np.testing.assert_allclose(script.quantile(u, sigma, **data), solved, atol=1e-7)


@pytest.mark.parametrize("sigma_q", [0.5, 2.0, 20.0])
@pytest.mark.parametrize("data", [PAIR, THREE])
def test_exact_shares_are_the_bases_mass_between_the_watersheds(data, sigma_q):
    points = data["points"]
    below = [0.0]
    for j in range(len(points) - 1):
        pair = points[j : j + 2]
        low, high = pair.min() - 6 * sigma_q, pair.max() + 6 * sigma_q
        for _ in range(6):  # 1/40 of the bracket each time
            starts = np.linspace(low, high, 41)
            ends = runge_kutta(starts, sigma_q, 0.05 * np.ptp(pair), num_steps=120, **data)
            left = np.flatnonzero(ends < pair.mean())[-1]
            low, high = starts[left], starts[left + 1]
        below.append(NORMAL.cdf((low + high) / 2 / sigma_q))
    exact = np.diff([*below, 1.0])
    np.testing.assert_allclose(script.exact_shares(sigma_q=sigma_q, **data), exact, atol=2e-5)


def test_exact_shares_where_the_points_lie_far_apart():
    """Points 20 sigma_q apart: both tails at the border are about 1e-23.

    w_1 Phi(-(1 + s) / sigma_q) = w_2 Phi(-(1 - s) / sigma_q), and Phi(-z) is exp(-z^2 / 2) / z to
    leading order: s is sigma_q^2 log(4) / 2, and a little less at the next order.
    """
    data = {"points": np.array([[-1.0], [1.0]]), "weights": PAIR["weights"], "sigma_q": 0.1}
    s = 0.01 * math.log(4) / 2
    s = 0.01 * (math.log(4) + math.log((1 - s) / (1 + s))) / 2
    np.testing.assert_allclose(
        script.borders(0.1, points=data["points"], weights=data["weights"]), s, rtol=1e-3
    )
    assert script.exact_shares(**data)[0] == pytest.approx(NORMAL.cdf(s / 0.1), abs=1e-4)
    for weight in (1e-6, 0.5):
        weights = np.array([weight, 1 - weight])
        share = script.exact_shares(
            points=np.array([[-12.5], [12.5]]), weights=weights, sigma_q=0.385
        )
        assert 0.4 < share[0] < 0.5 + 1e-9  # the border stays near the middle
    assert script.exact_shares(points=np.array([[3.0]]), weights=np.ones(1), sigma_q=1.0) == 1


@pytest.mark.parametrize("data", [PAIR, THREE])
def test_exact_shares_approach_the_weights_as_the_mean_over_sigma_q(data):
    """To first order in 1 / sigma_q, p_1 is the base moved by the data's mean m."""
    sigma_q, m = 1e3, (data["weights"] @ data["points"])[0]
    borders = [NORMAL.inv_cdf(level) for level in np.cumsum(data["weights"])[:-1]]
    moved = [0, *(NORMAL_PEAK * math.exp(-(z**2) / 2) for z in borders), 0]
    gap = script.exact_shares(sigma_q=sigma_q, **data) - data["weights"]
    np.testing.assert_allclose(sigma_q * gap, m * np.diff(moved), atol=5e-3)


# ------------------------------------------- Measuring --------------------------------------------


@pytest.mark.parametrize("num_steps", [3, 6])
def test_each_schedules_error_is_its_distance_to_the_ode(monkeypatch, num_steps):
    monkeypatch.setattr(script, "NUM_STARTS", 12)
    sigma_q = 2.0
    u, x_1 = script.starts(sigma_q=sigma_q, **PAIR)
    np.testing.assert_allclose(u, np.arange(1, 24, 2) / 24)
    np.testing.assert_allclose(x_1, script.quantile(u, sigma_q, **PAIR)[:, None])
    rows = script.measure_schedules(num_steps, sigma_q=sigma_q, **PAIR)
    assert list(rows) == [
        "variance exploding",
        "variance preserving",
        "sigma = t",
        "rectified flow",
    ]
    for name, row in rows.items():
        levels = own_levels(name, num_steps, sigma_q)
        np.testing.assert_allclose(row["sigmas"], levels, atol=1e-12)
        squares = []
        y, solution = x_1[:, 0], x_1[:, 0]
        for t, r in zip(levels[:-1], levels[1:]):
            mean = np.array([mean_x_0(np.array([v]), 1.0, t, **PAIR)[0] for v in y])
            y = mean + r / t * (y - mean)
            if r > 0:
                solution = runge_kutta(solution, t, r, num_steps=120, **PAIR)
            else:
                solution = np.where(
                    np.arange(12) < 10, -1.1, 1.1
                )  # ranks below .8: (2 i + 1) / 24 for i < 10
            squares.append(np.mean((y - solution) ** 2))
        np.testing.assert_allclose(row["rms"], np.sqrt(squares), rtol=1e-5, atol=1e-7)
        assert row["largest"] == max(row["rms"])
    starts = [row["start"] for row in rows.values()]
    last = (-0.1 + math.sqrt(0.01 + 39.8 * math.log(5))) / 19.9
    np.testing.assert_allclose(starts, [1, last, 2, 0.5], rtol=1e-12)


def test_the_error_of_every_schedule_is_of_first_order(monkeypatch):
    monkeypatch.setattr(script, "NUM_STARTS", 40)
    few, many = (script.measure_schedules(n, sigma_q=2.0, **PAIR) for n in (80, 160))
    for name in few:
        inner = few[name]["largest"], many[name]["largest"]
        assert 0.9 < math.log2(inner[0] / inner[1]) < 1.3, name


def test_trajectories_lie_on_quantiles_and_on_their_grids():
    paths = script.measure_trajectories(9, sigma_q=2.0, **PAIR)
    u = [0.02, 0.2, 0.6, 0.76, 0.83, 0.95]
    for i in (0, 100, 249):
        np.testing.assert_allclose(
            paths["exact"][i], script.quantile(u, 2 * paths["level"][i], **PAIR), atol=1e-12
        )
    assert (paths["level"][0], paths["level"][-1]) == (1, 0.004)
    np.testing.assert_allclose(paths["Algorithm 2"], paths["sqrt(t)"], atol=1e-12)
    uniform = own_levels("sigma = t", 9, 2.0)
    squared = own_levels("variance exploding", 9, 2.0)
    for name, levels in [("uniform", uniform), ("Algorithm 2", squared)]:
        assert paths[name].shape == (10, 6)
        np.testing.assert_allclose(paths[name][0], paths["exact"][0], atol=1e-12)
        ends = [sampler_end(x, levels, **PAIR) for x in paths["exact"][0]]
        np.testing.assert_allclose(paths[name][-1], ends, atol=1e-11)


def test_share_of_heaviest_counts_what_is_nearest():
    steps = iter([np.full((5, 1), 9.0), np.array([[-1.0], [0.2], [0.8], [1.0], [5.0]])])
    data = {"points": np.array([[-2.0], [0.3], [1.5]]), "weights": np.array([0.2, 0.5, 0.3])}
    share, error = script.share_of_heaviest(steps, **data)  # nearest to .3 are .2 and .8
    assert share == 0.4
    assert error == pytest.approx((0.4 * 0.6 / 5) ** 0.5)


def end_of_independent(x, after, sigma_q):
    """Where PAIR's independent coupling ends.  after: the levels sigma_q t / (1 - t) below t = 1.

    At t = 1 it knows nothing of x_0. Its first step puts the noise around the data's mean.
    """
    return sampler_end(-0.66 + x * after[0] / sigma_q, after, **PAIR)


def test_shares_against_num_steps_are_those_of_the_watershed(monkeypatch):
    """A sampler increases with its start: a share is the base's mass below one start, bisected."""
    monkeypatch.setattr(script, "STEP_COUNTS", [4, 25])
    n, sigma_q = 20_000, 2.0
    shares = script.measure_share_vs_steps(n, np.random.default_rng(0), sigma_q=sigma_q, **PAIR)
    for i, num_steps in enumerate([4, 25]):
        levels = own_levels("variance exploding", num_steps, sigma_q)
        k = np.arange(num_steps - 1, -1, -1) / num_steps
        after = sigma_q * k / (1 - k)
        ends = {
            "Algorithm 2": lambda x, levels=levels: sampler_end(x, levels, **PAIR),
            "independent": partial(end_of_independent, after=after, sigma_q=sigma_q),
        }
        for name, end in ends.items():
            exact = NORMAL.cdf(watershed(end, PAIR["points"], -8, 8) / sigma_q)
            share, error = shares[name][:, i]
            assert abs(share - exact) < 5 * (exact * (1 - exact) / n) ** 0.5, (name, num_steps)
            assert error == pytest.approx((share * (1 - share) / n) ** 0.5)
    assert abs(shares["independent"][0, 1] - 0.8) < abs(shares["independent"][0, 0] - 0.8)


def test_shares_against_sigma_q_are_the_closed_forms(monkeypatch):
    monkeypatch.setattr(script, "FACTORS", np.array([0.5, 10.0]))
    shares = script.measure_share_vs_sigma_q(4000, np.random.default_rng(1), sigma_q=2.0, **PAIR)
    diffusion = [script.exact_shares(sigma_q=sigma_q, **PAIR)[0] for sigma_q in (1.0, 20.0)]
    independent = []
    for sigma_q in (1.0, 20.0):  # the grid's own share, without chance: as in the test above
        after = np.append(sigma_q * np.geomspace(100, 0.001, 199), 0)
        end = partial(end_of_independent, after=after, sigma_q=sigma_q)
        start = watershed(end, PAIR["points"], -4 * sigma_q, 4 * sigma_q)
        independent.append(NORMAL.cdf(start / sigma_q))
    np.testing.assert_allclose(independent, 0.8017, atol=5e-5)  # the README's
    quantiles = np.array([[NORMAL.inv_cdf((i + 0.5) / 4000)] for i in range(4000)])
    no_chance = SimpleNamespace(standard_normal=lambda shape: quantiles)
    even = script.measure_share_vs_sigma_q(4000, no_chance, sigma_q=2.0, **PAIR)["independent"]
    np.testing.assert_allclose(even[0], independent, atol=1 / 4000)
    for name, exact in [("independent", np.array(independent)), ("diffusion", np.array(diffusion))]:
        error = np.sqrt(exact * (1 - exact) / 4000)
        assert np.all(np.abs(shares[name][0] - exact) < 5 * error), name
        np.testing.assert_allclose(shares[name][1], error, rtol=0.1)


@pytest.mark.parametrize(("data", "heaviest"), [(PAIR, 0), (THREE, 1)])
def test_exact_share_is_that_of_the_heaviest_point(data, heaviest):
    exact = script.measure_exact_share(sigma_q=2.0, **data)
    assert exact["independent"] == data["weights"].max()
    assert exact["diffusion"] == script.exact_shares(sigma_q=2.0, **data)[heaviest]
    for sigma_q, share in zip([1, 2, 5, 10, 20, 50], exact["table"]):
        assert share == script.exact_shares(sigma_q=sigma_q, **data)[heaviest]
    for i in (0, 30, 59):
        assert (
            exact["curve"][i] == script.exact_shares(sigma_q=exact["sigma_q"][i], **data)[heaviest]
        )
    assert exact["sigma_q"][0] < 1
    assert exact["sigma_q"][-1] > 50


@pytest.mark.parametrize("n", [1, 2, 20, 100])
def test_slips_leave_what_their_products_say(n):
    """A step multiplies x by 1 + dt v(1, t) at t = k / n: products with closed forms."""
    printed_70, corrected_70, printed_4, corrected_4 = script.measure_slips(n).values()
    gamma_ratio = math.exp(math.lgamma(n + 1.5) - math.lgamma(n + 1)) / math.gamma(
        1.5
    )  # of 1 + 1 / (2k): grows
    assert printed_70 == pytest.approx(gamma_ratio, rel=1e-12)
    assert printed_70 > 1
    assert corrected_70 == pytest.approx(
        math.comb(2 * n, n) / 4**n, rel=1e-12
    )  # of 1 - 1 / (2k): to 0
    assert printed_4 == pytest.approx((1 - 1 / n) ** n, rel=1e-12)  # to 1 / e
    assert corrected_4 < 1e-15


# ----------------------------------- Printing, figures, the script itself -------------------------


@pytest.fixture(scope="module")
def default():
    """What the script measures by default: the arguments of report, and of the figures."""
    data = {"sigma_q": 2.0, **PAIR}
    rng = np.random.default_rng(0)
    _, x_1 = script.starts(**data)
    return {
        "claim": script.measure_claim_4(x_1, 20, **data),
        "same_levels": script.measure_same_levels(x_1, 20, **data),
        "tables": {n: script.measure_schedules(n, **data) for n in (20, 100)},
        "shares": script.measure_share_vs_steps(10_000, rng, **data),
        "by_sigma_q": script.measure_share_vs_sigma_q(10_000, rng, **data),
        "exact": script.measure_exact_share(**data),
        "slips": {n: script.measure_slips(n) for n in (20, 100)},
    }


@pytest.fixture
def printed(default, tmp_path, capsys):
    script.report(**default, args=script.parse_arguments(["--figures-dir", str(tmp_path)]))
    return capsys.readouterr().out.splitlines()


def numbers(line):
    return re.findall(r"\d+\.\d+(?:e[-+]\d+)?", line)


def line_with(lines, *words):
    (found,) = [line for line in lines if all(word in line for word in words)]
    return found


def test_every_printed_number_is_what_was_measured(default, printed):
    for grid, value in default["claim"].items():
        assert numbers(line_with(printed, f"coupling, {grid} grid")) == [f"{value:.1e}"]
    for name, value in default["same_levels"].items():
        assert numbers(line_with(printed, f"{name}, its levels")) == [f"{value:.1e}"]
    for name, row in default["tables"][20].items():
        cells = [f"{row['start']:.4f}"]
        for n in (20, 100):
            own = default["tables"][n][name]
            cells += [f"{own['largest']:.4f}", f"{own['sigmas'][-2]:.3f}"]
        assert numbers(line_with(printed, f"  {name}  ")) == cells
    for i, n in enumerate(script.STEP_COUNTS):
        cells = [*default["shares"]["independent"][:, i], *default["shares"]["Algorithm 2"][:, i]]
        (line,) = [line for line in printed[17:] if line.startswith(f"  {n:7d}   ")][:1]
        assert numbers(line) == [f"{cell:.4f}" for cell in cells]
    exact = default["exact"]
    assert numbers(line_with(printed, "    exact   ")) == [
        f"{exact['independent']:.4f}",
        f"{exact['diffusion']:.4f}",
    ]
    for i, sigma_q in enumerate([1, 2, 5, 10, 20, 50]):
        cells = [
            *default["by_sigma_q"]["independent"][:, i],
            *default["by_sigma_q"]["diffusion"][:, i],
        ]
        line = [line for line in printed if line.startswith(f"  {sigma_q:7d}   ")][-1]
        assert numbers(line) == [f"{cell:.4f}" for cell in [*cells, exact["table"][i]]]
    for name in script.SLIPS:
        cells = [f"{default['slips'][n][name]:.4f}" for n in (20, 100)]
        assert numbers(line_with(printed, name)) == cells


def test_shares_with_the_default_seed_are_within_five_standard_errors(default):
    for name, exact in [
        ("independent", 0.8),
        ("Algorithm 2", script.exact_shares(sigma_q=2.0, **PAIR)[0]),
    ]:
        share, error = default["shares"][name][:, -1]
        assert abs(share - exact) < 5 * error
    assert script.exact_shares(sigma_q=2.0, **PAIR)[0] == pytest.approx(0.72, abs=5e-3)


def test_shares_of_data_of_mean_zero_are_those_of_the_readme():
    moved = {"points": PAIR["points"] + 0.66, "weights": PAIR["weights"]}
    for sigma_q, share in [(2.0, 0.8196), (5.0, 0.8035)]:
        assert script.exact_shares(sigma_q=sigma_q, **moved)[0] == pytest.approx(share, abs=5e-5)


def test_six_independent_shares_lie_above_by_what_the_readme_says(default):
    shares, errors = default["by_sigma_q"]["independent"]
    assert shares.min() > 0.8
    assert shares.mean() - 0.8 == pytest.approx(0.0038, abs=5e-5)
    assert np.sqrt((errors**2).sum()) / 6 == pytest.approx(0.0016, abs=5e-5)


def test_identities_hold_as_the_readme_says(default):
    assert default["claim"]["sqrt(t)"] < 1e-13
    assert default["claim"]["uniform"] > 1
    for name, distance in default["same_levels"].items():
        assert distance < 1e-13, name


def test_the_tutorials_last_step_makes_its_largest_error(default):
    ends = {name: row["rms"][-1] for name, row in default["tables"][20].items()}
    largest = [row["largest"] for row in default["tables"][20].values()]
    assert ends.pop("variance exploding") == max(largest)
    assert max(ends.values()) < 1e-3


def test_every_table_row_of_the_readme_is_printed(printed):
    """Each row's numbers stand, in this order, in one line of the output."""
    readme = (EXPERIMENTS / "experiment-6/README.md").read_text(encoding="utf-8")
    rows = [numbers(line) for line in readme.splitlines() if line.startswith("|") and numbers(line)]
    assert len(rows) >= 20
    for row in rows:
        pattern = r".*\b".join(re.escape(cell) for cell in row)
        assert any(re.search(r"\b" + pattern, line) for line in printed), row


def test_figures_show_what_was_measured(default):
    paths = script.measure_trajectories(20, sigma_q=2.0, **PAIR)
    top, bottom = script.draw_trajectories(paths, sigma_q=2.0, points=PAIR["points"]).axes
    x = [line.get_xdata() for line in top.lines[:12]]  # the exact curves of DDIM, then of the flow
    np.testing.assert_allclose(x[0], x[6] ** 2)  # DDIM at t is the flow at sqrt(t)
    marks = {
        style: [
            line.get_xydata()
            for line in bottom.lines
            if (line.get_marker(), line.get_linestyle()) == (style, "None")
        ]
        for style in "o."
    }
    assert len(marks["o"]) == len(marks["."]) == 7  # six trajectories, and the legend's
    for ring, dot in zip(marks["o"][:6], marks["."][:6]):
        np.testing.assert_allclose(ring, dot, atol=1e-12)
        np.testing.assert_allclose(ring[:, 0], 2 * np.sqrt(np.arange(20, -1, -1) / 20))

    top, middle, bottom = script.draw_schedules(default["tables"]).axes
    for i, name in enumerate(default["tables"][20]):
        np.testing.assert_array_equal(
            top.lines[i].get_xdata(), default["tables"][20][name]["sigmas"]
        )
        for ax, n in [(middle, 20), (bottom, 100)]:
            row = default["tables"][n][name]
            np.testing.assert_array_equal(
                ax.lines[i].get_xydata(), np.transpose([row["sigmas"][1:], row["rms"]])
            )

    top, bottom = script.draw_shares(
        default["shares"], default["by_sigma_q"], default["exact"], 2.0
    ).axes
    panels = [
        (top, [1, 2, 5, 10, 20, 50], "by_sigma_q", "diffusion"),
        (bottom, script.STEP_COUNTS, "shares", "Algorithm 2"),
    ]
    for ax, x, key, second in panels:
        for bars, name in zip(ax.containers, ["independent", second]):
            share, error = default[key][name]
            marks, _, (lines,) = bars
            np.testing.assert_allclose(marks.get_xydata(), np.transpose([x, share]))
            lengths = [np.ptp(segment[:, 1]) for segment in lines.get_segments()]
            np.testing.assert_allclose(lengths, 4 * error)  # two standard errors up, two down
    plt.close("all")


@pytest.mark.parametrize(
    "arguments",
    [
        "--points 1 1 --weights .5 .5",
        "--points 1 -1",
        "--points -30 30",
        "--points 0 1 2",
        "--weights .5 .6",
        "--weights 1",
    ],
)
def test_points_and_weights_that_do_not_fit_are_refused(arguments, tmp_path, capsys):
    folder = tmp_path / "new"
    with pytest.raises(SystemExit) as refusal:
        script.main([*arguments.split(), "--figures-dir", str(folder)])
    assert refusal.value.code == 2
    assert not folder.exists()
    assert "argument --" in capsys.readouterr().err


def test_main_runs_with_three_points(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(script, "STEP_COUNTS", [5, 10])
    monkeypatch.setattr(script, "NUM_STARTS", 20)
    options = ["--num-steps", "3", "--num-samples", "50", "--sigma-q", "1.5"]
    options += ["--points", "-2", ".3", "1.5", "--weights", ".2", ".5", ".3"]
    script.main([*options, "--figures-dir", str(tmp_path)])
    names = ["same-trajectories.jpg", "schedules.jpg", "share-vs-sigma-q.jpg"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    for name in names:
        assert np.ptp(plt.imread(tmp_path / name)) > 200
    lines = capsys.readouterr().out.splitlines()
    assert numbers(line_with(lines, "    exact   "))[0] == "0.5000"
    assert (
        "-2 with probability 0.2, 0.3 with probability 0.5, 1.5 with probability 0.3; sigma_q = 1.5"
        in lines[0]
    )
    plt.close("all")
