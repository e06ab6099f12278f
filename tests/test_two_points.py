"""Experiment 2: several points.  Bayes' rule to the last digit, DDIM as an ODE solver, and where samples end."""

import ast
import re

import numpy as np
import oracles
import pytest

pytestmark = pytest.mark.filterwarnings("error", "ignore::DeprecationWarning")  # deprecations: matplotlib's own

PAIR = np.array([[-1.5, -1.0], [1.5, 1.0]])
HALVES, UNEQUAL = np.array([0.5, 0.5]), np.array([0.8, 0.2])
TRIANGLE, THIRDS = np.array([[-2.0, -1.0], [2.0, -1.0], [0.0, 2.0]]), np.array([0.2, 0.5, 0.3])


def reverse_mean_of(two_points, **data):
    return lambda x_t, t, dt: two_points.reverse_mean(x_t, t, dt, **data)


def random_weights(rng, k):
    """(k,) weights, one of them zero if k >= 3."""
    weights = rng.dirichlet(np.ones(k))
    if k >= 3:
        weights[rng.integers(k)] = 0
    return weights / weights.sum()


# ---------------------------------- The posterior and the reverse mean ----------------------------


def assert_posterior_is_right(two_points, x_t, t, points, weights, sigma_q):
    """Holds every row to 50 digits, within its rounding bound; returns the largest bound."""
    p = two_points.posterior(x_t, t, points=points, weights=weights, sigma_q=sigma_q)
    assert p.shape == (len(x_t), len(points))
    assert np.all(p[:, weights == 0] == 0)
    assert np.abs(p.sum(axis=1) - 1).max() <= len(points) * oracles.EPS
    bounds = []
    for x, row in zip(x_t, p):
        exact, bound = oracles.posterior(x, t, points, weights, sigma_q)
        assert np.all(np.abs(row - exact) <= bound), (x, row, exact, bound)
        bounds.append(bound.max())
    return max(bounds)


@pytest.mark.parametrize("gap", [1e-3, 1.0, 1e6])
@pytest.mark.parametrize("sigma_t", [1e-6, 1e-2, 1.0, 1e6])
def test_posterior_near_the_bisector_is_right_to_1e_12(two_points, sigma_t, gap):
    points, weights = np.array([[-gap / 2, 0.0], [gap / 2, 0.0]]), np.array([0.3, 0.7])
    odds = np.array([0, 1e-3, 0.5, -0.5, 3, -3, 40, -40, 1e4, -1e4, 1e8])  # their logarithms
    x_t = np.stack([odds * sigma_t**2 / gap, np.linspace(-gap, gap, len(odds))], axis=1)
    for t, w in [(1.0, weights), (0.25, weights), (1.0, HALVES)]:
        # p (1 - p) <= 1/4 times the error of the log odds: 20 roundings of 500, of squares 31 sigma_t away
        assert assert_posterior_is_right(two_points, x_t[:6], t, points, w, sigma_t / t**0.5) < 1e-12
        assert_posterior_is_right(two_points, x_t, t, points, w, sigma_t / t**0.5)


def test_posterior_when_rounding_hides_the_likeliest_point(two_points):
    """Three points 1e6 away, and x nearer to the last two by less than 1e6 can show; the odds of those are e to 1."""
    points, x_t = np.array([[0, 1e6], [-1e6, 0], [1e6, 0]]), np.array([[5e-19, -5e-11]])
    p = two_points.posterior(x_t, 1.0, points=points, weights=np.ones(3) / 3, sigma_q=1e-6)
    assert np.abs(p[0] - np.array([0, 1, np.e]) / (1 + np.e)).max() < 1e-12


@pytest.mark.parametrize("k", [1, 2, 3, 100])
@pytest.mark.parametrize("sigma_q", [1e-6, 1e-3, 1.0, 30.0, 1e6])
def test_posterior_of_k_points_agrees_with_50_digits(two_points, sigma_q, k):
    rng = np.random.default_rng(k)
    for size in (1.0, 1e6):
        points, weights = size * rng.uniform(-1, 1, (k, 2)), random_weights(rng, k)
        i, j = rng.integers(k, size=(2, 6))
        between = (points[i] + points[j]) / 2
        anywhere = points[i] + size * rng.normal(size=(6, 2))
        at_points = points[i] + sigma_q * rng.normal(size=(6, 2))
        x_t = np.concatenate([between, anywhere, at_points])
        assert_posterior_is_right(two_points, x_t, rng.uniform(0.001, 1), points, weights, sigma_q)


@pytest.mark.parametrize("d", [1, 2, 5])
def test_posterior_works_in_any_dimension_and_row_by_row(two_points, d):
    rng = np.random.default_rng(d)
    data = {"points": rng.normal(0, 2, (4, d)), "weights": random_weights(rng, 4), "sigma_q": 1.3}
    x_t = rng.normal(0, 2, (9, d))
    assert assert_posterior_is_right(two_points, x_t, 0.6, *data.values()) < 1e3 * oracles.EPS
    together = two_points.posterior(x_t, 0.6, **data)
    alone = np.concatenate([two_points.posterior(x[None], 0.6, **data) for x in x_t])
    np.testing.assert_allclose(together, alone, rtol=100 * oracles.EPS)  # NumPy's wide exp may differ in the last bit
    assert two_points.posterior(x_t[:0], 0.6, **data).shape == (0, 4)


def test_posterior_stays_a_probability_between_far_points_at_tiny_noise(two_points):
    # Here the likeliest point cannot be told from rounded squared distances: they are equal to their last bit.
    rng = np.random.default_rng(0)
    for _ in range(2000):
        k, size, sigma_q = rng.integers(2, 6), 10 ** rng.uniform(0, 6), 10 ** rng.uniform(-6, 0)
        points = rng.uniform(-size, size, (k, 2))
        across = (points[1] - points[0])[::-1] * [-1, 1]
        x_t = (points[0] + points[1]) / 2 + across * rng.normal(size=(4, 1))
        p = two_points.posterior(x_t, 1.0, points=points, weights=np.full(k, 1 / k), sigma_q=sigma_q)
        assert np.all((p >= 0) & (p <= 1))
        assert np.abs(p.sum(axis=1) - 1).max() <= k * oracles.EPS


@pytest.mark.parametrize("k", [1, 2, 3, 6])
@pytest.mark.parametrize("seed", range(8))
def test_reverse_mean_is_the_mean_of_the_joint_law(two_points, seed, k):
    rng = np.random.default_rng([seed, k])
    t = [rng.uniform(0.2, 1), 1.0][seed % 2]
    dt = [rng.uniform(0.1, 0.9) * t, t][seed // 2 % 2]
    points, weights, sigma_q = rng.normal(0, 2, (k, 2)), rng.dirichlet(np.ones(k)), 10 ** rng.uniform(0, 1)
    x_t = points[rng.integers(k, size=2)] + sigma_q * t**0.5 * rng.normal(size=(2, 2))
    exact = oracles.reverse_mean(x_t, t, dt, points, weights, 0.0, sigma_q)
    reverse_mean = two_points.reverse_mean(x_t, t, dt, points=points, weights=weights, sigma_q=sigma_q)
    # The oracle's exponents reach 1e4, so its weights are good to 1e4 EPS.
    scale = np.abs(x_t).max() + np.abs(points).max()
    np.testing.assert_allclose(reverse_mean, exact, rtol=0, atol=1e4 * oracles.EPS * scale)


# ---------------------------------------------- DDIM ----------------------------------------------


@pytest.mark.parametrize(("points", "weights"), [(PAIR, HALVES), (PAIR, UNEQUAL), (TRIANGLE, THIRDS)])
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
    assert np.all(np.abs(share - exact) <= 5 * np.sqrt(np.multiply(exact, np.subtract(1, exact)) / n))


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


def test_from_the_base_shares_miss_unequal_weights_as_exact_share_says_and_less_for_larger_sigma_q(two_points):
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
    points, weights = TRIANGLE[:k] if k <= 3 else 3 * rng.normal(size=(k, 2)), random_weights(rng, k)
    mean = reverse_mean_of(two_points, points=points, weights=weights, sigma_q=2.0)
    x_1 = 2.0 * rng.standard_normal((100, 2))
    ends = oracles.probability_flow(x_1, np.array([2.0, 1e-3]), points, weights, substeps=2000)[-1]
    *_, x_0 = two_points.ddim(mean, x_1, 4000)
    np.testing.assert_array_equal(two_points.reached(x_0, points), two_points.reached(ends, points))
    assert np.abs(ends - points[two_points.reached(ends, points)]).max() < 0.01  # ten standard deviations at 1e-3
    assert set(two_points.reached(x_0, points)) <= set(np.flatnonzero(weights))


# ------------------------------------------- The check --------------------------------------------


def test_draw_p_1_has_the_moments_of_the_true_p_1(two_points):
    n, points, weights = 10**6, TRIANGLE + np.array([1.0, 0.5]), THIRDS
    x_1 = two_points.draw_p_1(n, np.random.default_rng(4), points=points, weights=weights, sigma_q=1.5)
    assert x_1.shape == (n, 2)
    mean = weights @ points
    covariance = (weights[:, None] * (points - mean)).T @ (points - mean) + 1.5**2 * np.eye(2)
    assert np.all(np.abs(x_1.mean(axis=0) - mean) < 5 * np.sqrt(np.diag(covariance) / n))
    products = np.einsum("ni,nj->nij", x_1 - mean, x_1 - mean)
    assert np.all(np.abs(products.mean(axis=0) - covariance) < 5 * products.std(axis=0) / n**0.5)


def test_draw_p_1_takes_points_by_their_weights_and_bits_from_its_rng(two_points):
    data = {"points": TRIANGLE, "weights": THIRDS, "sigma_q": 1e-6}
    first, again, other = (two_points.draw_p_1(10_000, np.random.default_rng(s), **data) for s in (1, 1, 2))
    share = [np.mean(np.linalg.norm(first - a, axis=1) < 1e-4) for a in TRIANGLE]
    assert_within_five_standard_errors(share, THIRDS, 10_000)
    np.testing.assert_array_equal(first, again)
    assert not np.any(first == other)


@pytest.mark.parametrize("shift", [0.0, 0.4, -1.0])
@pytest.mark.parametrize("first", [0.5, 0.8, 0.02])
@pytest.mark.parametrize("sigma_q", [0.02, 0.1, 0.5, 2.0, 30.0])
def test_exact_share_is_what_the_traced_watershed_parts(two_points, sigma_q, first, shift):
    points, weights = PAIR / np.linalg.norm(PAIR[1]) + shift * sigma_q, np.array([first, 1 - first])
    coarse, fine = (oracles.share_of_first(points, weights, sigma_q, substeps) for substeps in (1000, 2000))
    assert abs(fine - coarse) < 1e-6
    assert two_points.exact_share(points, weights, sigma_q) == pytest.approx(fine, abs=abs(fine - coarse) + 1e-12)


def test_exact_share_in_other_dimensions(two_points):
    for d in (1, 3):
        points = np.random.default_rng(d).normal(size=(2, d))
        exact = oracles.share_of_first(points, UNEQUAL, 1.2)
        assert two_points.exact_share(points, UNEQUAL, 1.2) == pytest.approx(exact, abs=1e-9)


@pytest.mark.parametrize("gap", [1.0, 10.0, 100.0, 1e6])
def test_exact_share_of_a_weight_of_zero_or_one(two_points, gap):
    points = np.array([[0.0, 0.0], [gap, 0.0]])
    assert two_points.exact_share(points, np.array([1.0, 0.0]), 1.0) == pytest.approx(1, abs=oracles.EPS)
    assert two_points.exact_share(points - [gap, 0.0], np.array([0.0, 1.0]), 1.0) == pytest.approx(0, abs=oracles.EPS)


def test_exact_share_splits_no_difference_between_equal_weights(two_points):
    for sigma_q in (1e-3, 1.0, 1e6):
        rounding = 4 * oracles.EPS * (1 + 1.8 / sigma_q)  # of the watershed, which lies among points at 1.8
        assert two_points.exact_share(PAIR, HALVES, sigma_q) == pytest.approx(0.5, abs=rounding)


def test_reached_is_the_nearest_point(two_points):
    x_0 = np.random.default_rng(0).normal(0, 3, (500, 2))
    nearest = [min(range(3), key=lambda i: np.hypot(*(x - TRIANGLE[i]))) for x in x_0]
    assert two_points.reached(x_0, TRIANGLE).tolist() == nearest
    assert set(nearest) == {0, 1, 2}


@pytest.mark.parametrize(("points", "weights"), [(PAIR, UNEQUAL), (TRIANGLE, THIRDS)])
def test_errors_vs_steps_are_distances_to_the_odes_solution_and_fall_with_order_one(two_points, points, weights):
    step_counts, data = [5, 10, 20, 40, 80], {"points": points, "weights": weights, "sigma_q": 2.0}
    x_1 = two_points.draw_p_1(100, np.random.default_rng(5), **data)
    mean = reverse_mean_of(two_points, **data)

    sigmas = np.append(2.0 * np.sqrt([1, 0.8, 0.6, 0.4, 0.2]), 1e-4)
    coarse, ode = (oracles.probability_flow(x_1, sigmas, points, weights, substeps) for substeps in (150, 300))
    assert np.abs(ode - coarse).max() < 1e-6
    ode[-1] = oracles.mean_x_0(ode[-1], 1e-4, points, weights)  # from sigma = 1e-4 to 0

    def distances(num_steps):
        path = np.array(list(two_points.ddim(mean, x_1, num_steps)))[num_steps // 5 - 1 :: num_steps // 5]
        squares = ((path - ode[1:]) ** 2).sum(axis=2).mean(axis=1)
        return np.sqrt([squares[:-1].mean(), squares[-1]])

    measured = np.array(two_points.errors_vs_steps(mean, x_1, step_counts, 4000)).T
    exact, reference = np.array([distances(n) for n in step_counts]), distances(4000)
    # Triangle inequality: errors against the reference differ from those against the ODE by the reference's own.
    assert np.all(np.abs(measured - exact) <= reference + 1e-6)
    assert reference[0] < exact[-1, 0] / 40  # so the line above can fail
    # error = c / n + d / n^2 + ...: what the observed order lacks of 1 about halves as n doubles.
    off = np.abs(np.log2(exact[:-1, 0] / exact[1:, 0]) - 1)
    assert np.all(off[1:] < 0.75 * off[:-1])


# ------------------------------------------ All the scripts ---------------------------------------


@pytest.mark.parametrize("name", ["ddim", "ddpm"])
def test_a_sampler_has_the_same_text_wherever_it_stands(scripts, name):
    texts = {}
    for path in scripts:
        source = path.read_text(encoding="utf-8")
        for node in ast.parse(source).body:
            if isinstance(node, ast.FunctionDef) and node.name == name:
                texts[path.name] = ast.get_source_segment(source, node)
    numpy_scripts = {"gaussian.py", "point_mass.py"} | ({"two_points.py"} if name == "ddim" else set())
    assert numpy_scripts <= set(texts)
    if name == "ddpm":  # torch's draws its noise in another way
        texts.pop("swiss_roll.py", None)
    assert len(set(texts.values())) == 1, sorted(texts)


# ------------------------------------------ The script itself -------------------------------------


def run_main(two_points, capsys, folder, *arguments):
    two_points.main(["--num-steps", "100", "--num-samples", "4000", *arguments, "--figures-dir", str(folder)])
    lines = capsys.readouterr().out.splitlines()
    numbers = [re.findall(r"\d+\.\d+|none", line.split(")")[1]) for line in lines if line.lstrip().startswith("(")]
    return lines, [[np.nan if number == "none" else float(number) for number in row] for row in numbers]


FIGURES = ["experiment-2-sample-trajectories-ddim.jpg", "experiment-2-error-vs-steps.jpg"]


@pytest.fixture
def quick(two_points, monkeypatch):
    """The script with its convergence study cut short."""
    errors = [1.0, 0.5, 0.25, 0.1, 0.05, 0.025], [0.0] * 6
    monkeypatch.setattr(two_points, "errors_vs_steps", lambda *_: errors)
    return two_points


def test_main_writes_exactly_its_figures_and_prints_shares_beside_theory(two_points, tmp_path, capsys, assert_jpegs):
    lines, rows = run_main(two_points, capsys, tmp_path, "--weights", ".8", ".2")
    assert_jpegs(tmp_path, FIGURES)
    exact = oracles.share_of_first(PAIR, UNEQUAL, 2.0)
    for row, weight, base in zip(rows, UNEQUAL, (exact, 1 - exact)):
        for (share, error, theory), truth in zip((row[:3], row[3:]), (weight, base)):
            assert theory == pytest.approx(truth, abs=1e-4)  # four digits are printed
            assert error == pytest.approx((share * (1 - share) / 4000) ** 0.5, abs=1e-4)
            assert abs(share - truth) < 5 * (truth * (1 - truth) / 4000) ** 0.5
    slope = next(line for line in lines if "falls as" in line)
    assert -1.05 < float(re.search(r"num_steps\^(\S+)", slope)[1]) < -0.9


@pytest.mark.parametrize(
    ("points", "weights"),
    [(["1,2"], [1.0]), (["-2,-1", "2,-1", "0,2"], [0.2, 0.5, 0.3]), (["3,0", "-3,0"], [1.0, 0.0])],
)
def test_main_takes_any_number_of_points_and_a_weight_of_zero(quick, tmp_path, capsys, assert_jpegs, points, weights):
    arguments = ["--points", *points, "--weights", *map(str, weights)]
    _, rows = run_main(quick, capsys, tmp_path, *arguments)
    assert_jpegs(tmp_path, FIGURES)
    assert [row[2] for row in rows] == weights
    assert_within_five_standard_errors(np.array([row[0] for row in rows]), np.array(weights), 4000)
    assert all(np.isnan(row[5]) for row in rows) == (len(points) == 3)
    assert sum(row[3] for row in rows) == pytest.approx(1, abs=1e-3)


def test_main_prints_the_same_table_for_the_same_seed_only(quick, tmp_path, capsys):
    tables = [run_main(quick, capsys, tmp_path, "--seed", seed)[0] for seed in ("5", "5", "6")]
    assert tables[0] == tables[1] != tables[2]
