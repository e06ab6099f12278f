"""Experiment 2: several points.  Bayes' rule to the last digit, DDIM as an ODE solver, and where
samples end.
"""

import re
import tracemalloc
from statistics import NormalDist

import numpy as np
import oracles
import pytest
from conftest import texts

PAIR = np.array([[-1.5, -1.0], [1.5, 1.0]])
HALVES, UNEQUAL = np.array([0.5, 0.5]), np.array([0.8, 0.2])
TRIANGLE, THIRDS = np.array([[-2.0, -1.0], [2.0, -1.0], [0.0, 2.0]]), np.array([0.2, 0.5, 0.3])


def reverse_mean_of(two_points, **data):
    return lambda x_t, t, dt: two_points.reverse_mean(x_t, t, dt, **data)


# ---------------------------------- The posterior and the reverse mean ----------------------------


def assert_posterior_is_right(two_points, x_t, t, points, weights, sigma_q):
    """Holds every row to 50 digits, within its rounding bound; returns the largest bound."""
    p = two_points.posterior(x_t, t, points=points, weights=weights, sigma_q=sigma_q)
    assert p.shape == (len(x_t), len(points))
    assert np.abs(p.sum(axis=1) - 1).max() <= len(points) * oracles.EPS
    bounds = []
    for x, row in zip(x_t, p):
        exact, bound = oracles.posterior(x, t, points, weights, sigma_q)
        assert np.all(np.abs(row - exact) <= bound), (x, row, exact, bound)
        bounds.append(bound.max())
    return max(bounds)


@pytest.mark.parametrize("k", [1, 2, 3, 100])
@pytest.mark.parametrize("sigma_q", [0.1, 1.0, 30.0, 100.0])
def test_posterior_of_k_points_agrees_with_50_digits(two_points, sigma_q, k):
    rng = np.random.default_rng(k)
    points, weights = 2 * rng.uniform(-1, 1, (k, 2)), rng.dirichlet(np.ones(k))
    i, j = rng.integers(k, size=(2, 6))
    between = (points[i] + points[j]) / 2
    anywhere = points[i] + rng.normal(size=(6, 2))
    at_points = points[i] + sigma_q * rng.normal(size=(6, 2))
    x_t = np.concatenate([between, anywhere, at_points])
    bound = assert_posterior_is_right(two_points, x_t, 1.0, points, weights, sigma_q)
    assert bound < 1e-11
    assert_posterior_is_right(two_points, x_t, rng.uniform(0.001, 1), points, weights, sigma_q)


@pytest.mark.parametrize("d", [1, 2, 5])
def test_posterior_works_in_any_dimension_and_row_by_row(two_points, d):
    rng = np.random.default_rng(d)
    weights = rng.dirichlet(np.ones(4))
    data = {"points": rng.normal(0, 2, (4, d)), "weights": weights, "sigma_q": 1.3}
    x_t = rng.normal(0, 2, (9, d))
    assert assert_posterior_is_right(two_points, x_t, 0.6, *data.values()) < 1e-12
    together = two_points.posterior(x_t, 0.6, **data)
    alone = np.concatenate([two_points.posterior(x[None], 0.6, **data) for x in x_t])
    # NumPy's wide exp and its matrix products may differ in the last bit.
    np.testing.assert_allclose(together, alone, rtol=1e3 * oracles.EPS)
    assert two_points.posterior(x_t[:0], 0.6, **data).shape == (0, 4)


@pytest.mark.parametrize("k", [1, 2, 3, 6])
@pytest.mark.parametrize("seed", range(8))
def test_reverse_mean_is_the_mean_of_the_joint_law(two_points, seed, k):
    rng = np.random.default_rng([seed, k])
    t = [rng.uniform(0.2, 1), 1.0][seed % 2]
    dt = [rng.uniform(0.1, 0.9) * t, t][seed // 2 % 2]
    points, weights, sigma_q = (
        rng.normal(0, 2, (k, 2)),
        rng.dirichlet(np.ones(k)),
        10 ** rng.uniform(0, 1),
    )
    x_t = points[rng.integers(k, size=2)] + sigma_q * t**0.5 * rng.normal(size=(2, 2))
    exact = oracles.reverse_mean(x_t, t, dt, points, weights, 0.0, sigma_q)
    reverse_mean = two_points.reverse_mean(
        x_t, t, dt, points=points, weights=weights, sigma_q=sigma_q
    )
    # The oracle's exponents reach 1e4, so its weights are good to 1e4 EPS.
    scale = np.abs(x_t).max() + np.abs(points).max()
    np.testing.assert_allclose(reverse_mean, exact, rtol=0, atol=1e4 * oracles.EPS * scale)


# ---------------------------------------------- DDIM ----------------------------------------------


@pytest.mark.parametrize(
    ("points", "weights"), [(PAIR, HALVES), (PAIR, UNEQUAL), (TRIANGLE, THIRDS)]
)
def test_ddim_is_euler_in_sigma_on_the_probability_flow_ode(two_points, points, weights):
    sigma_q, num_steps = 2.0, 10
    mean = reverse_mean_of(two_points, points=points, weights=weights, sigma_q=sigma_q)
    x_1 = sigma_q * np.random.default_rng(0).standard_normal((200, 2))
    before, x = x_1.copy(), x_1
    steps = list(two_points.ddim(mean, x_1, num_steps))
    assert len(steps) == num_steps
    sigma = sigma_q * np.sqrt(np.arange(num_steps, -1, -1) / num_steps)
    for x_t, start, end in zip(steps, sigma[:-1], sigma[1:]):
        slope = (x - oracles.mean_x_0(x, start, points, weights)) / start
        # Numbers below 10, whose squares over 2 sigma^2 >= .8 are exponents below 100.
        np.testing.assert_allclose(x_t, x + (end - start) * slope, rtol=0, atol=1e4 * oracles.EPS)
        x = x_t
    np.testing.assert_array_equal(x_1, before)


@pytest.mark.parametrize("shift", [np.zeros(2), np.array([0.7, -0.4])])
@pytest.mark.parametrize("num_steps", [1, 3, 50])
def test_with_equal_weights_no_trajectory_crosses_the_bisector(two_points, num_steps, shift):
    points = PAIR + shift
    mean = reverse_mean_of(two_points, points=points, weights=HALVES, sigma_q=2.0)
    x_1 = 2.0 * np.random.default_rng(0).standard_normal((10_000, 2))
    side = np.sign((x_1 - shift) @ (points[1] - points[0]))
    assert len(np.unique(side)) == 2
    for x_t in two_points.ddim(mean, x_1, num_steps):
        np.testing.assert_array_equal(np.sign((x_t - shift) @ (points[1] - points[0])), side)
    np.testing.assert_array_equal(two_points.reached(x_t, points), side > 0)


def shares(two_points, x_1, num_steps, **data):
    """Share of x_1 that DDIM takes nearest to each point."""
    *_, x_0 = two_points.ddim(reverse_mean_of(two_points, **data), x_1, num_steps)
    nearest = np.argmin(np.linalg.norm(x_0[:, None] - data["points"], axis=2), axis=1)
    return np.bincount(nearest, minlength=len(data["points"])) / len(x_1)


def assert_within_five_standard_errors(share, exact, n):
    assert np.all(
        np.abs(share - exact) <= 5 * np.sqrt(np.multiply(exact, np.subtract(1, exact)) / n)
    )


@pytest.mark.parametrize("num_steps", [1, 20])
def test_equal_weights_share_the_base_in_halves(two_points, num_steps):
    x_1 = 2.0 * np.random.default_rng(1).standard_normal((100_000, 2))
    share = shares(two_points, x_1, num_steps, points=PAIR, weights=HALVES, sigma_q=2.0)
    assert_within_five_standard_errors(share, HALVES, len(x_1))


@pytest.mark.parametrize(("points", "weights"), [(PAIR, UNEQUAL), (TRIANGLE, THIRDS)])
def test_from_the_true_p_1_many_steps_give_the_weights(two_points, points, weights):
    n, data = 20_000, {"points": points, "weights": weights, "sigma_q": 2.0}
    x_1 = two_points.draw_p_1(n, np.random.default_rng(2), **data)
    assert_within_five_standard_errors(shares(two_points, x_1, 300, **data), weights, n)


def test_from_the_base_shares_miss_unequal_weights_as_exact_share_says_and_less_for_larger_sigma_q(
    two_points,
):
    n, missed = 20_000, []
    for sigma_q in (1.5, 3.0, 12.0):
        data = {"points": PAIR + 0.2, "weights": UNEQUAL, "sigma_q": sigma_q}
        x_1 = sigma_q * np.random.default_rng(3).standard_normal((n, 2))
        share, exact = shares(two_points, x_1, 300, **data), two_points.exact_share(*data.values())
        assert_within_five_standard_errors(share, [exact, 1 - exact], n)
        missed.append(abs(share[0] - 0.8))
    error = (0.8 * 0.2 / n) ** 0.5
    assert missed[0] > missed[1] + 5 * error
    assert missed[1] > missed[2] + 5 * error > 10 * error


@pytest.mark.parametrize("k", [1, 3, 5])
def test_every_sample_ends_at_the_point_that_the_ode_takes_it_to(two_points, k):
    rng = np.random.default_rng(k)
    points = TRIANGLE[:k] if k <= 3 else 3 * rng.normal(size=(k, 2))
    weights = rng.dirichlet(np.ones(k))
    mean = reverse_mean_of(two_points, points=points, weights=weights, sigma_q=2.0)
    x_1 = 2.0 * rng.standard_normal((100, 2))
    ends = oracles.probability_flow(x_1, np.array([2.0, 1e-3]), points, weights, substeps=2000)[-1]
    *_, x_0 = two_points.ddim(mean, x_1, 4000)
    np.testing.assert_array_equal(two_points.reached(x_0, points), two_points.reached(ends, points))
    assert (
        np.abs(ends - points[two_points.reached(ends, points)]).max() < 0.01
    )  # ten standard deviations at 1e-3


# ------------------------------------------- The check --------------------------------------------


def test_draw_p_1_has_the_moments_of_the_true_p_1(two_points):
    n, points, weights = 10**6, TRIANGLE + np.array([1.0, 0.5]), THIRDS
    x_1 = two_points.draw_p_1(
        n, np.random.default_rng(4), points=points, weights=weights, sigma_q=1.5
    )
    assert x_1.shape == (n, 2)
    mean = weights @ points
    covariance = (weights[:, None] * (points - mean)).T @ (points - mean) + 1.5**2 * np.eye(2)
    assert np.all(np.abs(x_1.mean(axis=0) - mean) < 5 * np.sqrt(np.diag(covariance) / n))
    products = np.einsum("ni,nj->nij", x_1 - mean, x_1 - mean)
    assert np.all(np.abs(products.mean(axis=0) - covariance) < 5 * products.std(axis=0) / n**0.5)


def test_draw_p_1_takes_points_by_their_weights_and_bits_from_its_rng(two_points):
    data = {"points": TRIANGLE, "weights": THIRDS, "sigma_q": 1e-6}
    first, again, other = (
        two_points.draw_p_1(10_000, np.random.default_rng(s), **data) for s in (1, 1, 2)
    )
    share = [np.mean(np.linalg.norm(first - a, axis=1) < 1e-4) for a in TRIANGLE]
    assert_within_five_standard_errors(share, THIRDS, 10_000)
    np.testing.assert_array_equal(first, again)
    assert not np.any(first == other)


@pytest.mark.parametrize("shift", [0.0, 0.4, -1.0])
@pytest.mark.parametrize("first", [0.5, 0.8, 0.02])
@pytest.mark.parametrize("sigma_q", [0.034, 0.5, 30.0])
def test_exact_share_is_what_the_traced_watershed_parts(two_points, sigma_q, first, shift):
    points, weights = PAIR / np.linalg.norm(PAIR[1]) + shift * sigma_q, np.array([first, 1 - first])
    coarse, fine = (
        oracles.share_of_first(points, weights, sigma_q, substeps) for substeps in (1000, 2000)
    )
    assert abs(fine - coarse) < 1e-6
    assert two_points.exact_share(points, weights, sigma_q) == pytest.approx(
        fine, abs=abs(fine - coarse) + 1e-12
    )


def test_exact_share_in_other_dimensions(two_points):
    for d in (1, 3):
        points = np.random.default_rng(d).normal(size=(2, d))
        exact = oracles.share_of_first(points, UNEQUAL, 1.2)
        assert two_points.exact_share(points, UNEQUAL, 1.2) == pytest.approx(exact, abs=1e-9)


def test_exact_share_splits_no_difference_between_equal_weights(two_points):
    for sigma_q in (0.1, 1.0, 100.0):
        rounding = (
            4 * oracles.EPS * (1 + 1.8 / sigma_q)
        )  # of the watershed, which lies among points at 1.8
        assert two_points.exact_share(PAIR, HALVES, sigma_q) == pytest.approx(0.5, abs=rounding)


def test_reached_is_the_nearest_point(two_points):
    x_0 = np.random.default_rng(0).normal(0, 3, (500, 2))
    nearest = [min(range(3), key=lambda i: np.hypot(*(x - TRIANGLE[i]))) for x in x_0]
    assert two_points.reached(x_0, TRIANGLE).tolist() == nearest
    assert set(nearest) == {0, 1, 2}


@pytest.mark.parametrize(("points", "weights"), [(PAIR, UNEQUAL), (TRIANGLE, THIRDS)])
def test_errors_are_distances_to_the_odes_solution_and_fall_with_order_one(
    two_points, points, weights, monkeypatch
):
    step_counts, data = [5, 10, 20, 40, 80], {"points": points, "weights": weights, "sigma_q": 2.0}
    monkeypatch.setattr(two_points, "STEP_COUNTS", step_counts)
    monkeypatch.setattr(two_points, "REFERENCE_STEPS", 4000)
    x_1 = two_points.draw_p_1(100, np.random.default_rng(5), **data)
    mean = reverse_mean_of(two_points, **data)

    sigmas = np.append(2.0 * np.sqrt([1, 0.8, 0.6, 0.4, 0.2]), 1e-4)
    coarse, ode = (
        oracles.probability_flow(x_1, sigmas, points, weights, substeps) for substeps in (150, 300)
    )
    assert np.abs(ode - coarse).max() < 1e-6
    ode[-1] = oracles.mean_x_0(ode[-1], 1e-4, points, weights)  # from sigma = 1e-4 to 0

    def distances(num_steps):
        path = np.array(list(two_points.ddim(mean, x_1, num_steps)))[
            num_steps // 5 - 1 :: num_steps // 5
        ]
        squares = ((path - ode[1:]) ** 2).sum(axis=2).mean(axis=1)
        return np.sqrt([squares[:-1].mean(), squares[-1]])

    measured = np.array(two_points.measure_errors(x_1, **data)).T
    exact, reference = np.array([distances(n) for n in step_counts]), distances(4000)
    # Triangle inequality: errors against the reference differ from those against the ODE by the
    # reference's own.
    assert np.all(np.abs(measured - exact) <= reference + 1e-6)
    assert reference[0] < exact[-1, 0] / 40  # so the line above can fail
    # error = c / n + d / n^2 + ...: what the observed order lacks of 1 about halves as n doubles.
    off = np.abs(np.log2(exact[:-1, 0] / exact[1:, 0]) - 1)
    assert np.all(off[1:] < 0.75 * off[:-1])
    slope = np.polyfit(np.log([20, 40, 80]), np.log(measured[2:, 0]), 1)[0]
    assert two_points.observed_slope(measured[:, 0]) == pytest.approx(slope)
    assert two_points.observed_slope(7.0 / np.array(step_counts) ** 2) == pytest.approx(-2)


# ------------------------------------------ Measuring -------------------------------------------


@pytest.mark.parametrize(("points", "weights"), [(PAIR, UNEQUAL), (TRIANGLE, THIRDS)])
def test_measured_shares_count_where_ddim_ends(two_points, points, weights):
    data = {"points": points, "weights": weights, "sigma_q": 2.0}
    x_1 = two_points.draw_p_1(5000, np.random.default_rng(0), **data)
    share, share_se, off, paths = two_points.measure_shares(x_1, 30, "", **data)
    np.testing.assert_allclose(share, shares(two_points, x_1, 30, **data))
    np.testing.assert_allclose(share_se, np.sqrt(share * (1 - share) / 5000))
    *_, x_0 = two_points.ddim(reverse_mean_of(two_points, **data), x_1, 30)
    nearest = np.min([np.sum((x_0 - a) ** 2, axis=1) for a in points], axis=0)
    assert off == pytest.approx(np.mean(nearest) ** 0.5)
    steps = list(two_points.ddim(reverse_mean_of(two_points, **data), x_1, 30))
    np.testing.assert_array_equal(paths, [x_t[:60] for x_t in (x_1, *steps)])


def test_base_shares_are_known_for_two_points_only(two_points):
    first = oracles.share_of_first(PAIR, UNEQUAL, 2.0)
    known = two_points.base_shares(points=PAIR, weights=UNEQUAL, sigma_q=2.0)
    assert known == pytest.approx([first, 1 - first], abs=1e-8)
    assert two_points.base_shares(points=TRIANGLE, weights=THIRDS, sigma_q=2.0) is None


def test_the_plain_average_sends_everything_to_the_middle(two_points):
    x_1 = 2.0 * np.random.default_rng(0).standard_normal((100, 2))
    assert two_points.measure_plain_average(x_1, 17, TRIANGLE) < 1e-14
    middle = TRIANGLE.mean(axis=0)
    expected = 0.75 * x_1 + 0.25 * middle
    np.testing.assert_allclose(
        two_points.plain_average(x_1, 0.8, 0.2, points=TRIANGLE), expected, atol=1e-14
    )


def test_only_what_is_drawn_is_kept(two_points):
    """20 000 samples in 2-D are 0.32 MB, so all 200 steps would be 64 MB."""
    data = {"points": PAIR, "weights": HALVES, "sigma_q": 2.0}
    tracemalloc.start()
    two_points.measure_shares(np.ones((20_000, 2)), 200, "", **data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16e6


# ------------------------------------ Printing and the figures ----------------------------------


def test_report_prints_what_was_measured(two_points, capsys):
    class Args:
        points, weights = np.array([[1.5, -2.0], [3.0, 4.0]]), np.array([0.85, 0.15])
        sigma_q, num_samples, num_steps = 2.5, 321, 43

    from_p_1 = np.array([0.11, 0.12]), np.array([0.013, 0.014]), 9e-9
    from_base = np.array([0.21, 0.22]), np.array([0.023, 0.024]), 4e-5
    two_points.report(from_p_1, from_base, np.array([0.31, 0.32]), -1.25, 3e-7, Args)
    lines = capsys.readouterr().out.splitlines()
    assert "sigma_q = 2.5: 321 samples by DDIM, 43 steps" in lines[0]
    rows = [[float(x) for x in re.findall(r"\d\.\d{4}", line)] for line in lines[3:5]]
    assert rows == [[0.11, 0.013, 0.85, 0.21, 0.023, 0.31], [0.12, 0.014, 0.15, 0.22, 0.024, 0.32]]
    assert "(1.5, -2)" in lines[3]
    assert "4e-05" in lines[5]
    assert "num_steps^-1.25" in lines[6]
    assert "3e-07" in lines[7]
    two_points.report(from_p_1, from_base, None, -1.25, 3e-7, Args)
    assert capsys.readouterr().out.count("none known") == 2


def test_figures_draw_what_was_measured(two_points):
    data = {"points": PAIR, "weights": UNEQUAL, "sigma_q": 2.0}
    x_1 = 2.0 * np.random.default_rng(0).standard_normal((60, 2))
    *_, paths = two_points.measure_shares(x_1, 10, "", **data)
    axes = two_points.draw_paths(paths, **data).axes[0]
    drawn = np.concatenate(
        [line.get_xydata() for line in axes.lines if len(line.get_xdata()) == 11]
    )
    np.testing.assert_allclose(np.sort(drawn, axis=0), np.sort(paths.reshape(-1, 2), axis=0))
    line = next(line for line in axes.lines if "parts the starts" in str(line.get_label()))
    ends = np.array(line.get_xydata())
    axis = (PAIR[1] - PAIR[0]) / np.linalg.norm(PAIR[1] - PAIR[0])
    # Beyond it lies what exact_share does not count.
    share = oracles.share_of_first(PAIR, UNEQUAL, 2.0)
    np.testing.assert_allclose(ends @ axis, 2.0 * NormalDist().inv_cdf(share), atol=1e-6)
    assert np.linalg.norm(ends[1] - ends[0]) > 10

    along = 3.0 / np.array(two_points.STEP_COUNTS)
    axes = two_points.draw_errors(along, along / 30).axes[0]
    drawn = {line.get_label(): line.get_ydata() for line in axes.lines}
    np.testing.assert_array_equal(drawn["at t = .2, .4, .6, .8: slope -1.00"], along)
    np.testing.assert_allclose(drawn["slope $-1$"], along)
    np.testing.assert_array_equal(drawn["at t = 0 (0.0005 with 200 steps)"], along / 30)
    assert "first order" in texts(axes.figure)
