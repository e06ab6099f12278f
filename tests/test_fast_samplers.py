"""Experiment 8: fast samplers.  Each against its formula written apart, and against quantiles.

In one dimension the probability-flow ODE keeps the order of points. So its solution is the quantile
map: from x at sigma_max to the point of the data with the same share of probability below it. The
references here are that map, found by bisection, and sums over grids; they share no code with the
script.
"""

import itertools
import math
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import load

script = load("experiment-8/fast_samplers.py")
samplers = pytest.mark.parametrize("name", script.SAMPLERS)

MEANS = np.array([[-1.0], [0.4], [1.5]])  # a mixture on the line
WEIGHTS = np.array([0.2, 0.5, 0.3])
LINE = {"centers": MEANS, "weights": WEIGHTS}


# ---- References ----


def share_below(x, sigma, std, means, weights):
    """P(noisy data < x) for a mixture on the line.  x: (n,)."""
    scale = math.hypot(std, sigma) * 2**0.5
    rows = [[math.erfc((m - value) / scale) / 2 for m in means] for value in x]
    return np.array(rows) @ weights


def quantile_map(x, sigma, std, means, weights):
    """The point of the data with as much below it as x has at sigma: by bisection.  x: (n,)."""
    wanted = share_below(x, sigma, std, means, weights)
    low = np.full(len(x), min(means) - 9 * std)
    high = np.full(len(x), max(means) + 9 * std)
    for _ in range(60):
        middle = (low + high) / 2
        below = share_below(middle, 0.0, std, means, weights) < wanted
        low = np.where(below, middle, low)
        high = np.where(below, high, middle)
    return (low + high) / 2


def line_case(n, std, sigma_max):
    """A denoiser on the line, n starts in the bulk of the noisy data, and where the ODE ends."""
    x_1 = sigma_max * np.linspace(-2, 2, n)
    truth = quantile_map(x_1, sigma_max, std, MEANS[:, 0], WEIGHTS)
    return partial(script.denoiser, std=std, **LINE), x_1[:, None], truth[:, None]


def rms(a):
    return np.sqrt((a**2).sum(axis=1).mean())


def some_points(n=50, seed=0):
    return 2 * np.random.default_rng(seed).standard_normal((n, 2))


# ---- The data and the denoiser ----


def test_the_data_has_the_centers_shares_and_the_std_asked_for():
    n, std = 40_000, 0.05
    x_0 = script.mixture(n, np.random.default_rng(0), std=std, weights=script.UNEQUAL)
    assert np.allclose(np.linalg.norm(script.CENTERS, axis=1), 1)
    offsets = x_0[:, None] - script.CENTERS
    nearest = np.argmin((offsets**2).sum(axis=2), axis=1)
    for k in range(8):
        share = (k + 1) / 36
        assert abs((nearest == k).mean() - share) < 5 * (share * (1 - share) / n) ** 0.5
    own = offsets[np.arange(n), nearest]
    assert abs(own.std() - std) < 5 * std / (4 * n) ** 0.5
    np.testing.assert_array_equal(script.nearest_center(x_0), nearest)


def test_spread_is_the_distance_from_the_mean():
    n, std = 200_000, 0.3
    squares = (script.mixture(n, np.random.default_rng(0), std=std) ** 2).sum(axis=1)
    assert abs(squares.mean() - script.spread(std) ** 2) < 5 * squares.std() / n**0.5


@pytest.mark.parametrize("sigma", [0.03, 0.3, 4.0])
def test_the_denoiser_is_the_mean_of_the_posterior_summed_on_a_grid(sigma):
    std = 0.1
    x_0 = np.linspace(-2.5, 3, 200_001)
    prior = sum(w * np.exp(-((x_0 - m) ** 2) / (2 * std**2)) for w, m in zip(WEIGHTS, MEANS[:, 0]))
    x = np.array([-1.3, -0.4, 0.1, 0.7, 1.4])
    weights = prior * np.exp(-((x[:, None] - x_0) ** 2) / (2 * sigma**2))
    exact = weights @ x_0 / weights.sum(axis=1)
    seen = script.denoiser(x[:, None], sigma, std=std, **LINE)[:, 0]
    np.testing.assert_allclose(seen, exact, atol=1e-10)


def test_by_default_the_denoiser_is_that_of_the_eight_gaussians():
    rng = np.random.default_rng(0)
    x_0 = script.CENTERS[rng.integers(8, size=400_000)] + 0.05 * rng.standard_normal((400_000, 2))
    x = np.array([0.9, 0.3])
    weights = np.exp(-((x - x_0) ** 2).sum(axis=1) / (2 * 0.2**2))
    share = weights / weights.sum()
    mean = share @ x_0
    se = np.sqrt((share**2) @ (x_0 - mean) ** 2)
    assert np.all(np.abs(script.denoiser(x[None], 0.2)[0] - mean) < 5 * se)


# ---- The samplers, one step at a time ----

SIGMAS = np.array([3.0, 1.4, 0.5, 0.2, 0.0])


def bent(x, sigma):
    """Any denoiser will do: the steps are formulas in its values."""
    return np.tanh(x / (1 + sigma)) * (1 - 0.3 * sigma)


def test_ddim_keeps_a_part_of_x_and_takes_the_rest_from_the_denoiser():
    x = some_points()
    for k, seen in enumerate(script.ddim(bent, x, SIGMAS)):
        kept = SIGMAS[k + 1] / SIGMAS[k]
        x = kept * x + (1 - kept) * bent(x, SIGMAS[k])
        np.testing.assert_allclose(seen, x, atol=1e-13)
    assert k == 3


def test_heun_is_algorithm_1_of_karras_et_al():
    x = some_points()
    for k, seen in enumerate(script.heun(bent, x, SIGMAS)):
        t, next_t = SIGMAS[k], SIGMAS[k + 1]
        d = x / t - bent(x, t) / t
        after = x + (next_t - t) * d
        if k < 3:
            next_d = after / next_t - bent(after, next_t) / next_t
            after = x + (next_t - t) * (d / 2 + next_d / 2)
        np.testing.assert_allclose(seen, after, atol=1e-13)
        x = after
    assert k == 3


def test_dpm_solver_2m_is_algorithm_2_of_lu_et_al():
    """With alpha = 1: h_i = lambda_i - lambda_{i-1}, r_i = h_{i-1} / h_i, lambda = -log sigma."""
    x = some_points()
    lambdas = -np.log(SIGMAS[:-1])
    outputs = []
    for k, seen in enumerate(script.dpm_solver_2m(bent, x, SIGMAS)):
        outputs.append(bent(x, SIGMAS[k]))
        if k == 3:  # to sigma = 0, where exp(-h) = 0
            after = outputs[k]
        else:
            h = lambdas[k + 1] - lambdas[k]
            d = outputs[k]
            if k > 0:
                r = (lambdas[k] - lambdas[k - 1]) / h
                d = (1 + 1 / (2 * r)) * outputs[k] - 1 / (2 * r) * outputs[k - 1]
            after = SIGMAS[k + 1] / SIGMAS[k] * x - (math.exp(-h) - 1) * d
        np.testing.assert_allclose(seen, after, atol=1e-13)
        x = after
    assert k == 3


def test_ddpm_is_eq_24_and_noise_of_variance_sigma_q_squared_dt():
    sigma_q, x = SIGMAS[0], some_points()
    rng = np.random.default_rng(1)
    for k, seen in enumerate(script.ddpm(bent, x, SIGMAS, np.random.default_rng(1))):
        t, next_t = (SIGMAS[k] / sigma_q) ** 2, (SIGMAS[k + 1] / sigma_q) ** 2
        dt = t - next_t
        mean = dt / t * bent(x, SIGMAS[k]) + (1 - dt / t) * x
        x = mean + sigma_q * dt**0.5 * rng.standard_normal(x.shape)
        np.testing.assert_allclose(seen, x, atol=1e-12)
    assert k == 3


@pytest.mark.parametrize("num_steps", [1, 2, 20])
def test_on_uniform_t_ddim_and_ddpm_are_the_tutorials_algorithms(num_steps):
    """Those of experiment 0, which know the reverse mean, eq. (24), and no sigma."""
    gaussian = load("experiment-0/gaussian.py")
    sigma_q, x_1 = 4.0, some_points()

    def reverse_mean(x_t, t, dt):
        return (dt / t) * script.denoiser(x_t, sigma_q * t**0.5) + (1 - dt / t) * x_t

    sigmas = script.uniform_t(num_steps, sigma_q)
    pairs = zip(
        itertools.zip_longest(
            script.ddim(script.denoiser, x_1, sigmas), gaussian.ddim(reverse_mean, x_1, num_steps)
        ),
        itertools.zip_longest(
            script.ddpm(script.denoiser, x_1, sigmas, np.random.default_rng(2)),
            gaussian.ddpm(reverse_mean, x_1, num_steps, sigma_q, np.random.default_rng(2)),
        ),
    )
    for k, ((ddim, algorithm_2), (ddpm, algorithm_1)) in enumerate(pairs, 1):
        np.testing.assert_allclose(ddim, algorithm_2, atol=1e-12)
        np.testing.assert_allclose(ddpm, algorithm_1, atol=1e-12)
    assert k == num_steps


@samplers
@pytest.mark.parametrize("num_steps", [1, 2, 3, 10])
def test_evaluations_are_what_the_samplers_make(name, num_steps):
    calls = []

    def counted(x, sigma):
        calls.append(sigma)
        return script.denoiser(x, sigma)

    x_1 = some_points()
    start = x_1.copy()
    steps = list(script.SAMPLERS[name](counted, x_1, script.karras(num_steps, 0.002, 4.0)))
    assert len(steps) == num_steps
    assert len(calls) == script.evaluations(name, num_steps)
    assert min(calls) > 0  # the denoiser at sigma = 0 is never asked for
    np.testing.assert_array_equal(x_1, start)


@samplers
def test_steps_within_a_budget_are_the_most_that_it_pays_for(name):
    for budget in range(1, 30):
        steps = script.steps_within(name, budget)
        assert script.evaluations(name, steps) <= budget < script.evaluations(name, steps + 1)
        assert script.spent(name, [budget]) == [script.evaluations(name, steps)]


@samplers
def test_a_point_mass_is_reached_exactly_on_any_grid(name):
    point = np.array([0.7, -1.2])
    for grid in script.all_grids(4.0).values():
        for num_steps in (1, 2, 7):
            steps = script.SAMPLERS[name](
                lambda x, _: 0 * x + point, some_points(), grid(num_steps)
            )
            np.testing.assert_allclose(script.final(steps), np.tile(point, (50, 1)), atol=1e-13)


# ---- The grids ----


@pytest.mark.parametrize("n", [1, 2, 20])
@pytest.mark.parametrize("sigma_max", [0.5, 4.0, 100.0])
def test_grids_fall_from_sigma_max_to_0_in_n_steps(n, sigma_max):
    for name, grid in script.all_grids(sigma_max, 0.01).items():
        sigmas = grid(n)
        assert sigmas.shape == (n + 1,)
        assert sigmas[0] == pytest.approx(sigma_max, rel=1e-14)
        assert sigmas[-1] == 0
        assert np.all(np.diff(sigmas) < 0)
        if name in ("uniform log sigma", "rho = 7") and n > 1:
            assert sigmas[-2] == pytest.approx(0.01, rel=1e-13)


def test_each_grid_is_uniform_in_what_its_name_says():
    n, low, high = 12, 0.01, 4.0
    np.testing.assert_allclose(script.uniform_t(n, high) ** 2, 16 * np.linspace(1, 0, n + 1))
    np.testing.assert_allclose(np.diff(script.uniform_sigma(n, high)), -high / n)
    ratios = script.log_uniform(n, low, high)[1:-1] / script.log_uniform(n, low, high)[:-2]
    np.testing.assert_allclose(ratios, (low / high) ** (1 / (n - 1)))
    for rho in (1, 7):
        for i, sigma in enumerate(script.karras(n, low, high, rho)[:-1]):  # eq. (5), Karras et al.
            a, b = high ** (1 / rho), low ** (1 / rho)
            assert sigma == pytest.approx((a + i / (n - 1) * (b - a)) ** rho, rel=1e-12)
    np.testing.assert_array_equal(script.karras(n, low, high), script.karras(n, low, high, 7))


def test_all_grids_carry_the_names_and_the_sigma_min_that_they_say():
    grids = script.all_grids(4.0)
    np.testing.assert_array_equal(grids["uniform t"](5), script.uniform_t(5, 4.0))
    np.testing.assert_array_equal(grids["uniform sigma"](5), script.uniform_sigma(5, 4.0))
    np.testing.assert_array_equal(grids["uniform log sigma"](5), script.log_uniform(5, 0.002, 4.0))
    np.testing.assert_array_equal(grids["rho = 7"](5), script.karras(5, 0.002, 4.0))


# ---- The truth ----


@pytest.mark.parametrize(("std", "sigma_max"), [(0.05, 4.0), (0.3, 1.0), (0.02, 20.0)])
def test_the_solution_is_the_quantile_map_to_1e_8(std, sigma_max):
    _, x_1, truth = line_case(101, std, sigma_max)
    seen, error = script.solution(x_1, sigma_max, std=std, **LINE)
    assert error < 1e-8
    np.testing.assert_allclose(seen, truth, atol=1e-8)


def test_in_the_plane_the_solution_of_a_product_is_a_quantile_map_on_each_axis():
    std, sigma_max = 0.1, 2.0
    left, right = np.array([-1.0, 0.7]), np.array([-0.3, 0.9])
    centers = np.array([[a, b] for a in left for b in right])
    w_left, w_right = np.array([0.3, 0.7]), np.array([0.6, 0.4])
    x_1 = some_points(60)
    exact = [
        quantile_map(x_1[:, 0], sigma_max, std, left, w_left),
        quantile_map(x_1[:, 1], sigma_max, std, right, w_right),
    ]
    data = {"centers": centers, "weights": np.outer(w_left, w_right).ravel()}
    seen, _ = script.solution(x_1, sigma_max, std=std, **data)
    np.testing.assert_allclose(seen, np.transpose(exact), atol=1e-8)


def test_the_error_that_the_solution_states_is_its_error():
    _, x_1, truth = line_case(101, 0.05, 4.0)
    for num_steps in (200, 400):
        seen, stated = script.solution(x_1, 4.0, num_steps, std=0.05, **LINE)
        assert 0.7 < np.abs(seen - truth).max() / stated < 1.4
    assert script.solution(some_points(), 4.0, std=0.05)[1] < 1e-8  # with the default steps


def test_last_step_error_is_that_of_one_step_from_the_solution():
    std = 0.05
    offsets = std * np.random.default_rng(0).standard_normal((5000, 2))
    center = np.array([[0.4, -0.2]])
    for sigma in (0.002, 0.05, 1.0):
        x = center + offsets * math.sqrt(std**2 + sigma**2) / std  # p_sigma's quantiles
        known = partial(script.denoiser, std=std, centers=center, weights=np.ones(1))
        off = script.final(script.ddim(known, x, [sigma, 0.0])) - center - offsets
        ratio = rms(off) / rms(offsets)
        expected = script.last_step_error(sigma, std) / (2**0.5 * std)
        assert ratio == pytest.approx(expected, rel=1e-9)


def test_uniform_t_needs_inverts_the_last_step():
    for error in (1e-4, 0.01, 0.05):
        n = script.uniform_t_needs(error, 4.0, 0.05)
        assert script.last_step_error(4.0 / n**0.5, 0.05) == pytest.approx(error, rel=1e-9)
    assert script.uniform_t_needs(0.08, 4.0, 0.05) == 1  # more than sqrt(2) std: any last step


def test_the_last_step_is_what_uniform_t_ends_with_after_18_000_steps():
    (_, (_, n, _)) = script.measure_last_steps(sigma_max=4.0, std=0.05)
    assert 17_000 < n < 19_000
    rng = np.random.default_rng(0)
    x_0 = script.mixture(60, rng, std=0.05)
    x_1 = x_0 + 4 * rng.standard_normal(x_0.shape)
    truth, _ = script.solution(x_1, 4.0, std=0.05)
    own = truth - script.CENTERS[script.nearest_center(truth)]
    # The last step's error is proportional to the distance from the center.
    alone = script.spread(0.05) * 0.01 * rms(own) / (2**0.5 * 0.05)
    errors = {}
    for name in ("DDIM", "DPM-Solver++(2M)"):
        steps = script.SAMPLERS[name](script.denoiser, x_1, script.uniform_t(round(n), 4.0))
        errors[name] = rms(script.final(steps) - truth)
    assert errors["DPM-Solver++(2M)"] == pytest.approx(alone, rel=0.02)  # nothing else is left
    assert alone < errors["DDIM"] < 1.3 * alone  # the other steps add what Euler's method leaves


@pytest.mark.parametrize("sigma", [0.05, 0.5, 4.0])
def test_the_segments_denoiser_is_a_mean_over_the_segment(sigma):
    nodes, weights = np.polynomial.legendre.leggauss(200)
    x = np.array([-1 - 5 * sigma, -1.0, -0.3, 0.2, 0.99, 1 + 3 * sigma])
    odds = weights * np.exp(-((x[:, None] - nodes) ** 2) / (2 * sigma**2))
    exact = odds @ nodes / odds.sum(axis=1)
    np.testing.assert_allclose(script.segment_denoiser(x[:, None], sigma)[:, 0], exact, atol=1e-10)


def test_the_segments_solution_is_its_quantile_map():
    nodes, weights = np.polynomial.legendre.leggauss(100)
    for sigma in (0.5, 4.0):
        x = np.linspace(-2, 2, 9) * sigma
        below = [[math.erfc((n - v) / sigma / 2**0.5) / 2 for n in nodes] for v in x]
        share = np.array(below) @ weights / 2
        seen = script.segment_solution(x[:, None], sigma)[:, 0]
        np.testing.assert_allclose(seen, 2 * share - 1, atol=1e-12)


# ---- Orders and limits ----


def order(name, grid, denoiser, x_1, truth, few=160, many=640):
    """log2(error ratio) / log2(evaluation ratio), with evaluations counted apart."""
    errors, used = [], []
    for n in (few, many):
        num_steps = n // 2 if name == "Heun" else n
        steps = script.SAMPLERS[name](denoiser, x_1, grid(num_steps))
        errors.append(rms(script.final(steps) - truth))
        used.append(2 * num_steps - 1 if name == "Heun" else num_steps)
    return math.log(errors[0] / errors[1]) / math.log(used[1] / used[0])


@samplers
def test_orders_on_the_line_against_the_quantile_map(name):
    case = line_case(41, 0.2, 3.0)
    wanted = {"DDIM": 1, "Heun": 2, "DPM-Solver++(2M)": 2}[name]
    grids = script.all_grids(3.0, 1e-4)
    for grid in ("uniform log sigma", "rho = 7"):
        assert order(name, grids[grid], *case) == pytest.approx(wanted, abs=0.12)


@samplers
def test_on_uniform_t_every_sampler_has_order_1_because_of_its_last_step(name):
    case = line_case(41, 0.5, 1.0)  # wide Gaussians: sigma_max / sqrt(160) is far below their std
    grid = script.all_grids(1.0)["uniform t"]
    assert order(name, grid, *case) == pytest.approx(1, abs=0.12)


@samplers
def test_orders_on_the_segment_drop_where_its_ends_are_leapt_over(name):
    """Within a last step sigma of an end, a share of order sigma of the starts errs by order sigma.

    So the root mean square error falls no faster than sigma^1.5, and sigma is 1 / n or 1 / sqrt(n).
    """
    u = (np.arange(200) + 0.5) / 200  # evenly over the data
    low, high = np.full(200, -60.0), np.full(200, 60.0)
    for _ in range(60):
        middle = (low + high) / 2
        below = (script.segment_solution(middle[:, None], 4.0)[:, 0] + 1) / 2 < u
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    case = (script.segment_denoiser, middle[:, None], 2 * u[:, None] - 1)
    grids = script.all_grids(4.0, script.SMALL_SIGMA_MIN)
    second = name != "DDIM"
    wanted = {"uniform t": 0.75, "uniform sigma": 1 + second / 2, "rho = 7": 1 + second}
    for grid, p in wanted.items():
        assert order(name, grids[grid], *case) == pytest.approx(p, abs=0.12), grid


def test_all_samplers_have_one_limit():
    rng = np.random.default_rng(0)
    x_0 = script.mixture(100, rng, std=0.05)
    x_1 = x_0 + 4 * rng.standard_normal(x_0.shape)
    truth, _ = script.solution(x_1, 4.0, std=0.05)
    for name, bound in {"DDIM": 2e-3, "Heun": 5e-5, "DPM-Solver++(2M)": 5e-5}.items():
        for grid in ("uniform log sigma", "rho = 7"):
            sigmas = script.all_grids(4.0, 1e-4)[grid](400)
            ends = script.final(script.SAMPLERS[name](script.denoiser, x_1, sigmas))
            assert rms(ends - truth) < bound, (name, grid)


# ---- Learning ----


def test_the_disturbance_has_the_length_that_it_says_and_no_one_direction():
    x = some_points(2000)
    for std, sigma in itertools.product((0.05, 0.3), (0.01, 0.3, 3.0)):
        known = partial(script.denoiser, std=std)
        off = script.disturbed(x, sigma, denoiser=known, size=0.07, std=std) - known(x, sigma)
        v = math.sqrt(0.5 + std**2)
        length = 0.07 * math.sqrt(2) * v * sigma / math.sqrt(v**2 + sigma**2)
        np.testing.assert_allclose(np.linalg.norm(off, axis=1), length, rtol=1e-10)
        assert np.linalg.norm(off.mean(axis=0)) < 0.5 * length
    exact = script.disturbed(x, 0.3, denoiser=known, size=0.0, std=std)
    np.testing.assert_array_equal(exact, known(x, 0.3))


def test_the_unit_of_the_disturbance_is_the_error_of_the_best_linear_guess():
    rng = np.random.default_rng(0)
    x_0 = script.mixture(200_000, rng, std=0.3)
    for sigma in (0.2, 2.0):
        x = x_0 + sigma * rng.standard_normal(x_0.shape)
        guess = (x * x_0).sum() / (x**2).sum() * x  # least squares, from the draws
        off = script.disturbed(x[:1], sigma, denoiser=lambda x, _: 0 * x, size=1.0, std=0.3)
        squares = ((x_0 - guess) ** 2).sum(axis=1)
        se = squares.std() / len(x) ** 0.5
        assert abs((off**2).sum() - squares.mean()) < 5 * se


# ---- Measuring ----


def test_rms_distance_and_its_standard_error():
    a = np.array([[3.0, 4.0], [0.0, 0.0], [0.0, 1.0]])
    assert script.rms_distance(a, 0 * a)[0] == pytest.approx((26 / 3) ** 0.5)
    rng = np.random.default_rng(0)
    pairs = [script.rms_distance(rng.standard_normal((500, 2)), np.zeros(2)) for _ in range(400)]
    distances, ses = np.transpose(pairs)
    # A standard deviation from 400 draws is good to 1 / sqrt(800) of itself.
    assert abs(distances.std() / ses.mean() - 1) < 5 / 800**0.5


def measured(n=60, budgets=script.BUDGETS):
    rng = np.random.default_rng(3)
    x_0 = script.mixture(n, rng, std=0.2)
    x_1 = x_0 + 2 * rng.standard_normal(x_0.shape)
    known = partial(script.denoiser, std=0.2)
    truth, _ = script.solution(x_1, 2.0, std=0.2)
    grids = script.all_grids(2.0)
    return (known, x_1, truth), grids


def test_measure_errors_has_each_sampler_on_each_grid_at_each_budget():
    case, grids = measured()
    errors = script.measure_errors(*case, grids, [7, 12], "errors")
    assert list(errors) == list(itertools.product(script.SAMPLERS, grids))
    known, x_1, truth = case
    for (name, grid), pairs in errors.items():
        for k, budget in enumerate([7, 12]):
            num_steps = {"Heun": {7: 4, 12: 6}[budget]}.get(name, budget)
            *_, x_0 = script.SAMPLERS[name](known, x_1, grids[grid](num_steps))
            squares = ((x_0 - truth) ** 2).sum(axis=1)
            assert pairs[0, k] == pytest.approx(squares.mean() ** 0.5)
            assert pairs[1, k] == pytest.approx(squares.std() / 60**0.5 / 2 / pairs[0, k])


def test_needs_are_enough_and_one_step_less_is_not(monkeypatch):
    monkeypatch.setattr(script, "BUDGETS", [5, 10, 20, 40, 80])
    monkeypatch.setattr(script, "TARGETS", (0.4, 0.1, 0.01))
    case, grids = measured()
    errors = script.measure_errors(*case, grids, script.BUDGETS, "errors")
    needs = script.measure_needs(errors, *case, grids, 0.9)
    known, x_1, truth = case
    found = []
    for (name, grid), numbers in needs.items():
        for target, number in zip((0.36, 0.09, 0.009), numbers):
            last = errors[name, grid][0, -1]
            assert (number is None) == (last > target)
            if number:
                num_steps = (number + 1) // 2 if name == "Heun" else number
                for steps, is_enough in [(num_steps, True), (num_steps - 1, False)]:
                    if steps:
                        *_, x_0 = script.SAMPLERS[name](known, x_1, grids[grid](steps))
                        assert (rms(x_0 - truth) <= target) == is_enough
                found.append(number)
    assert len(found) > 20  # of 36
    assert len(found) < 36


def test_best_grid_has_the_smallest_number_for_the_smallest_error():
    needs = {("DDIM", "a"): [1, 1, None], ("DDIM", "b"): [9, 9, 9], ("DDIM", "c"): [2, 2, 10]}
    needs["Heun", "a"] = [1, 1, 1]
    assert script.best_grid(needs, "DDIM") == "b"
    assert script.best_grid(needs, "Heun") == "a"


def test_observed_orders_are_exact_on_powers_of_the_evaluations():
    budgets = [20, 160, 640]
    errors = {}
    for name, p in [("DDIM", 1.0), ("Heun", 2.0), ("DPM-Solver++(2M)", 1.7)]:
        used = np.array([19, 159, 639] if name == "Heun" else budgets)
        errors[name, "rho = 7"] = np.array([3.0 * used**-p, used])
    orders = script.observed_orders(errors, budgets)
    assert list(orders.values()) == pytest.approx([1.0, 2.0, 1.7])


def test_measure_orders_finds_1_and_2_on_both_data(monkeypatch):
    monkeypatch.setattr(script, "SEGMENT_STARTS", 60)
    monkeypatch.setattr(script, "SEGMENT_BUDGETS", [160, 640])
    case, _ = measured(100)
    orders, segment = script.measure_orders(*case, 2.0, np.random.default_rng(0))
    assert list(orders) == ["Gaussians", "segment"]
    for by_run in orders.values():
        for name, wanted in {"DDIM": 1, "Heun": 2, "DPM-Solver++(2M)": 2}.items():
            assert by_run[name, "rho = 7"] == pytest.approx(wanted, abs=0.2)
    assert segment["Heun", "rho = 7"].shape == (2, 2)


def test_enough_is_where_the_error_stays_within_a_tenth_of_its_end():
    assert script.enough(np.array([5.0, 2.0, 1.05, 1.2, 1.0, 1.0]), "DDIM") == 20
    assert script.enough(np.array([5.0, 2.0, 1.05, 1.2, 1.0, 1.0]), "Heun") == 19
    assert script.enough(np.array([1.09, 1.0]), "DDIM") == 5


def test_measure_switches_counts_what_ends_at_another_center(monkeypatch):
    monkeypatch.setattr(script, "NUM_STARTS", 300)
    setting = {"sigma_max": 4.0, "std": 0.05}
    rough = script.measure_switches(8, np.random.default_rng(0), **setting)
    fine = script.measure_switches(200, np.random.default_rng(0), **setting)
    for (weights, name), (error, se, switched, others) in rough.items():
        if name == "Heun":  # with 4 steps it is nowhere
            continue
        # The switched ones err by half the distance of two centers, .77 to 2, or more.
        beyond = 300 * error**2 - (300 - switched) * others**2
        assert 0.4**2 * switched <= beyond <= 2.4**2 * switched
        assert fine[weights, name][0] < error / 2 + se
        assert fine[weights, name][2] <= 10
    assert rough["weights 1 : ... : 8", "DDIM"][2] > 5
    assert fine["equal weights", "Heun"][2] == 0


def test_below_the_denoisers_own_error_more_evaluations_do_not_help():
    case, _ = measured(300)
    wrong, plenty = script.measure_disturbed(*case, sigma_max=2.0, std=0.2)
    assert list(wrong) == list(itertools.product(script.SIZES, script.SAMPLERS))
    for (size, name), (distances, ses) in wrong.items():
        assert len(distances) == len(ses) == 11  # of BUDGETS, to 160
        known = partial(script.disturbed, denoiser=case[0], size=size, std=0.2)
        num_steps = 80 if name == "Heun" else 160
        x_0 = script.final(
            script.SAMPLERS[name](known, case[1], script.karras(num_steps, 0.002, 2.0))
        )
        assert distances[-1] == pytest.approx(rms(x_0 - case[2]))
        assert plenty[size, name] == script.enough(distances, name)
        if name == "DPM-Solver++(2M)":
            at_end = wrong[size, "Heun"][0][-1]
            assert distances[-1] == pytest.approx(at_end, rel=0.1)  # one floor for both
    floors = [wrong[size, "Heun"][0][-1] for size in script.SIZES]
    assert floors[0] < floors[1] / 2 < floors[2] / 4  # it grows with the size


def test_sliced_distance_of_shifted_points_and_by_trying_all_orders():
    points = np.random.default_rng(0).standard_normal((6, 2))
    shift = np.array([0.3, -0.4])
    seen, moved = script.shadows(points), script.shadows(points + shift)
    assert script.sliced_distance(seen, [moved]) == pytest.approx(0.5 / 2**0.5)
    others = [script.mixture(6, np.random.default_rng(k), std=0.1) for k in (1, 2)]
    squares = []
    for other, k in itertools.product(others, range(script.NUM_DIRECTIONS)):
        angle = math.pi * k / script.NUM_DIRECTIONS
        axis = np.array([math.cos(angle), math.sin(angle)])
        a, b = points @ axis, other @ axis
        squares.append(
            min(np.mean((a - b[list(p)]) ** 2) for p in itertools.permutations(range(6)))
        )
    others = [script.shadows(other) for other in others]
    assert script.sliced_distance(seen, others) == pytest.approx(np.mean(squares) ** 0.5)


def test_measure_laws_agrees_with_the_law_of_ddpm_on_one_gaussian(monkeypatch):
    """On one Gaussian DDPM's variance follows a recursion; W_2 of two Gaussians is known."""
    monkeypatch.setattr(script, "OCTAVES", [4, 8])
    n, std, sigma_max = 8000, 0.5, 2.0
    rng = np.random.default_rng(0)
    data = [std * rng.standard_normal((n, 2)) for _ in range(3)]
    x_1 = math.hypot(std, sigma_max) * rng.standard_normal((n, 2))
    one = {"centers": np.zeros((1, 2)), "weights": np.ones(1)}
    known = partial(script.denoiser, std=std, **one)
    grids = script.all_grids(sigma_max)
    distances, floor = script.measure_laws(known, x_1, data, {"DDIM": "rho = 7"}, grids, rng)
    assert list(distances) == [("DDPM", grid) for grid in grids] + [("DDIM", "rho = 7")]
    for grid in grids:
        for k, num_steps in enumerate([4, 8]):
            sigmas = grids[grid](num_steps)
            variance = std**2 + sigma_max**2
            for sigma, r in zip(sigmas, sigmas[1:]):
                slope = (std**2 + r**2) / (std**2 + sigma**2)  # of E[x_{t-dt} | x_t]
                variance = slope**2 * variance + sigma**2 - r**2
            # Each of 2 n coordinates: the standard error of a std is std / sqrt(4 n).
            bound = 5 * 2 * variance**0.5 / (4 * n) ** 0.5 + 2 * floor[0]
            assert abs(distances["DDPM", grid][k] - abs(variance**0.5 - std)) < bound
    assert 0 < floor[1] < floor[0] < 0.03


def test_samples_are_of_every_sampler_on_every_grid():
    case, grids = measured()
    samples = script.measure_samples(case[0], case[1], grids, np.random.default_rng(0))
    assert list(samples) == list(itertools.product(["DDPM", *script.SAMPLERS], grids))
    for (name, grid), x_0 in samples.items():
        if name != "DDPM":
            num_steps = 5 if name == "Heun" else 10
            *_, again = script.SAMPLERS[name](case[0], case[1], grids[grid](num_steps))
            np.testing.assert_array_equal(x_0, again)
    *_, again = script.ddpm(case[0], case[1], grids["uniform t"](10), np.random.default_rng(0))
    np.testing.assert_array_equal(samples["DDPM", "uniform t"], again)


# ---- Printing, and the whole ----


def test_reports_print_what_they_are_given(capsys):
    args = SimpleNamespace(sigma_0=0.05, sigma_q=4.0, num_steps=30, num_samples=77)
    runs = list(itertools.product(script.SAMPLERS, script.all_grids(1.0)))
    needs = {run: [k, 10 * k, None] for k, run in enumerate(runs, 1)}
    at_num_steps = {run: np.array([[k / 7], [k / 700]]) for k, run in enumerate(runs, 1)}
    script.report_needs(needs, at_num_steps, (3.5e-5, [1, 20.4, 300]), 4e-9, args)
    lines = capsys.readouterr().out.splitlines()
    for (name, grid), numbers in needs.items():
        row = next(line for line in lines if line.startswith(f"{name:<17} {grid}  "))
        rest = row.split(grid)[1].split()
        k = numbers[0]
        assert rest == [str(k), str(10 * k), ">", "640", f"{k / 7:.5f}", "+-", f"{k / 700:.5f}"]
    assert any(line.endswith("4e-09") for line in lines)
    assert any("3.5e-05" in line for line in lines)
    assert any("1, 20, 300 steps" in line for line in lines)

    orders = {"segment": {run: k / 9 for k, run in enumerate(runs)}}
    script.report_orders(orders)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[2:] for row in rows] == [
        [f"{k / 9:.2f}" for k in range(first, first + 4)] for first in (0, 4, 8)
    ]

    laws = {("DDPM", "uniform t"): np.arange(8) / 3}
    script.report_laws(laws, (0.123, 0.045), args)
    out = capsys.readouterr().out
    assert "77 samples" in out
    assert "0.123 +- 0.045" in out
    assert out.splitlines()[-1].split()[3:] == [f"{k / 3:.3f}" for k in range(8)]

    switches = {("equal weights", "DDIM"): (0.5, 0.25, 17, 0.125)}
    wrong = {(0.03, "Heun"): np.array([[0.9, 0.4], [0.1, 0.2]])}
    script.report_limits(switches, wrong, {(0.03, "Heun"): 19}, args)
    lines = capsys.readouterr().out.splitlines()
    numbers = "0.50000 +- 0.25000 17 of 1000 0.12500"
    assert " ".join(lines[2].split()) == f"equal weights DDIM {numbers}"
    assert " ".join(lines[-1].split()) == "size 0.03 Heun 0.40000 +- 0.20000 from 19"


def test_main_prints_its_tables_and_writes_its_figures(tmp_path, capsys, monkeypatch):
    """With fewer starts and budgets; on the default data the table's order must be seen already."""
    monkeypatch.setattr(script, "NUM_STARTS", 80)
    monkeypatch.setattr(script, "SEGMENT_STARTS", 20)
    monkeypatch.setattr(script, "BUDGETS", [5, 10, 20, 40, 80, 160])
    monkeypatch.setattr(script, "OCTAVES", [5, 10, 20])
    monkeypatch.setattr(script, "SEGMENT_BUDGETS", [160, 640])
    script.main(["--num-samples", "200", "--num-steps", "16", "--figures-dir", str(tmp_path)])
    names = ["error-vs-evaluations", "grids", "ten-evaluations", "where-it-ends"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{name}.jpg" for name in names]
    out = capsys.readouterr().out
    assert "at most 16 evaluations" in out
    error = {}
    for line in out.splitlines():
        for run in itertools.product(script.SAMPLERS, script.all_grids(1.0)):
            if line.startswith(f"{run[0]:<17} {run[1]:<17}") and "+-" in line:
                error[run] = float(line.split("+-")[0].split()[-1])
    assert len(error) == 12

    rng = np.random.default_rng(0)  # the draws of main: five data sets, then the starts
    *_, x_0 = [script.mixture(200, rng, std=0.05) for _ in range(6)]
    x_1 = (x_0 + 4 * rng.standard_normal(x_0.shape))[:80]
    truth, _ = script.solution(x_1, 4.0, std=0.05)
    for run, printed in error.items():
        num_steps = 8 if run[0] == "Heun" else 16
        sigmas = script.all_grids(4.0)[run[1]](num_steps)
        x_0 = script.final(script.SAMPLERS[run[0]](script.denoiser, x_1, sigmas))
        assert printed == pytest.approx(rms(x_0 - truth), abs=6e-6)
    for grid in ("uniform log sigma", "rho = 7"):
        assert error["DPM-Solver++(2M)", grid] < error["DDIM", grid] / 2
        for name in script.SAMPLERS:
            assert error[name, grid] < error[name, "uniform sigma"] / 2
            assert error[name, "uniform sigma"] < error[name, "uniform t"] / 2
