"""Experiment 1: a point mass.  DDIM runs straight to it, exactly; DDPM's distance follows its own exact law."""

import re

import numpy as np
import oracles
import pytest

pytestmark = pytest.mark.filterwarnings("error", "ignore::DeprecationWarning")  # deprecations: matplotlib's own

A = np.array([1.5, -0.75])


@pytest.fixture
def mean(point_mass):
    return lambda x_t, t, dt: point_mass.reverse_mean(x_t, t, dt, a=A)


# ---------------------------------------- The reverse mean ----------------------------------------


@pytest.mark.parametrize("d", [1, 2])
@pytest.mark.parametrize("seed", range(12))
def test_reverse_mean_is_the_mean_of_the_joint_law(point_mass, seed, d):
    rng = np.random.default_rng(seed)
    t = [rng.uniform(0.05, 1), 1.0][seed % 2]
    dt = [rng.uniform(0.05, 0.95) * t, t][seed // 2 % 2]
    a, sigma_q = rng.normal(0, 3, d), 10 ** rng.uniform(-0.5, 1.5)
    x_t = a + sigma_q * t**0.5 * rng.normal(0, 2, (4, d))
    exact = oracles.reverse_mean(x_t, t, dt, a[None], np.ones(1), 0.0, sigma_q)
    # The oracle's exponents reach 1e4, so its weights are good to 1e4 EPS.
    scale = np.abs(x_t).max() + np.abs(a).max()
    np.testing.assert_allclose(point_mass.reverse_mean(x_t, t, dt, a=a), exact, rtol=0, atol=1e4 * oracles.EPS * scale)


@pytest.mark.parametrize("shape", [(2,), (1, 2), (7, 2), (3, 4, 2), (0, 2)])
def test_reverse_mean_treats_every_point_alike(point_mass, shape):
    x_t = np.random.default_rng(0).normal(size=shape)
    together = point_mass.reverse_mean(x_t, 0.8, 0.3, a=A)
    assert together.shape == shape
    one_by_one = [point_mass.reverse_mean(x, 0.8, 0.3, a=A) for x in x_t.reshape(-1, 2)]
    np.testing.assert_array_equal(together.reshape(-1, 2), np.reshape(one_by_one, (-1, 2)))


# ---------------------------------------------- DDIM ----------------------------------------------


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e6])
@pytest.mark.parametrize("num_steps", [1, 2, 7, 1000])
def test_ddim_ends_at_the_point(point_mass, mean, num_steps, scale):
    x_1 = scale * np.random.default_rng(0).standard_normal((1000, 2))
    *_, x_0 = point_mass.ddim(mean, x_1, num_steps)
    assert np.abs(x_0 - A).max() <= 1e-12 * max(1.0, scale)


@pytest.mark.parametrize("num_steps", [1, 2, 7, 1000])
def test_ddim_is_at_sqrt_t_of_the_way_on_a_straight_line(point_mass, mean, num_steps):
    x_1 = np.random.default_rng(0).standard_normal((100, 2))
    steps = list(point_mass.ddim(mean, x_1, num_steps))
    assert len(steps) == num_steps
    # A step has ten roundings of numbers below 10, and shrinks those of the steps before.
    rounding = 100 * num_steps * oracles.EPS
    for k, x_t in zip(range(num_steps - 1, -1, -1), steps):
        np.testing.assert_allclose(x_t, A + (k / num_steps) ** 0.5 * (x_1 - A), rtol=0, atol=rounding)
        distance = point_mass.ddim_distance(np.linalg.norm(x_1 - A, axis=1), k / num_steps)
        np.testing.assert_allclose(np.linalg.norm(x_t - A, axis=1), distance, rtol=0, atol=rounding)
        assert point_mass.departure_from_line(x_t, x_1, A).max() < rounding


def test_samplers_leave_x_1_alone_and_the_seed_decides_the_bits(point_mass, mean):
    x_1 = np.random.default_rng(0).standard_normal((50, 2))
    before = x_1.copy()
    first, again, other = (list(point_mass.ddpm(mean, x_1, 6, 2.0, np.random.default_rng(s))) for s in (3, 3, 4))
    list(point_mass.ddim(mean, x_1, 6))
    assert len(first) == 6
    np.testing.assert_array_equal(x_1, before)
    np.testing.assert_array_equal(first, again)
    assert not np.any(np.equal(first, other))


# ---------------------------------- The check: distances and lines --------------------------------


@pytest.mark.parametrize(("num_steps", "sigma_q"), [(1, 1.0), (2, 3.0), (9, 0.5)])
def test_ddpm_mean_square_is_that_of_a_million_samples(point_mass, mean, num_steps, sigma_q):
    n, rng = 10**6, np.random.default_rng(7)
    x_1 = sigma_q * rng.standard_normal((n, 2))
    exact = point_mass.ddpm_mean_square(num_steps, np.mean(np.sum((x_1 - A) ** 2, axis=1)), sigma_q)
    assert exact.shape == (num_steps + 1,)
    for law, x_t in zip(exact[1:], point_mass.ddpm(mean, x_1, num_steps, sigma_q, rng)):
        squares = np.sum((x_t - A) ** 2, axis=1)
        assert abs(squares.mean() - law) < 5 * squares.std() / n**0.5


@pytest.mark.parametrize("d", [1, 2, 5])
@pytest.mark.parametrize("num_steps", [1, 2, 7, 200])
def test_ddpm_mean_square_is_a_sum_over_the_noises(point_mass, num_steps, d):
    exact = [oracles.ddpm_mean_square(num_steps, k, 8.5, 3.0, d) for k in range(num_steps, -1, -1)]
    law = point_mass.ddpm_mean_square(num_steps, 8.5, 3.0, d)
    np.testing.assert_allclose(law, exact, rtol=10 * num_steps * oracles.EPS)
    assert law[-1] == pytest.approx(d * 9.0 / num_steps, rel=10 * oracles.EPS)


def test_ddpm_mean_square_is_in_the_plane_unless_told(point_mass):
    np.testing.assert_array_equal(point_mass.ddpm_mean_square(5, 2.0, 1.5), point_mass.ddpm_mean_square(5, 2.0, 1.5, 2))


def test_departure_from_line_is_the_distance_to_the_projection(point_mass):
    x_t, x_1 = np.random.default_rng(0).normal(0, 5, (2, 200, 2))
    exact = [oracles.distance_from_line(x, start, A) for x, start in zip(x_t, x_1)]
    # Products of numbers below 30, divided by distances that this seed keeps above .1.
    np.testing.assert_allclose(point_mass.departure_from_line(x_t, x_1, A), exact, rtol=0, atol=1e4 * oracles.EPS)
    assert point_mass.departure_from_line(x_t[0], x_1[0], A) == pytest.approx(exact[0], abs=1e4 * oracles.EPS)


def test_a_start_at_the_point_itself_departs_from_no_line(point_mass, mean):
    x_1 = A + np.zeros((3, 2))
    for x_t in point_mass.ddim(mean, x_1, 4):
        np.testing.assert_allclose(x_t, x_1, rtol=4 * oracles.EPS)
    assert point_mass.departure_from_line(x_1, x_1, A).tolist() == [0.0] * 3


# ------------------------------------------ The script itself -------------------------------------

SMALL = ["--num-steps", "8", "--num-samples", "20000", "--a", "-2,0.5", "--sigma-q", "3"]


def test_main_writes_exactly_its_figures_and_prints_samples_beside_their_law(
    point_mass, tmp_path, capsys, assert_jpegs
):
    point_mass.main([*SMALL, "--figures-dir", str(tmp_path)])
    assert_jpegs(tmp_path, ["experiment-1-sample-trajectories-ddim.jpg", "experiment-1-distance-vs-time.jpg"])
    lines = capsys.readouterr().out.splitlines()
    departures = [float(re.search(r"(\S+)\s+exact: 0$", line)[1]) for line in lines if line.startswith("DDIM")]
    assert len(departures) == 3
    assert max(departures) < 1e-12
    rows = [re.findall(r"[\d.e+-]*\d", line) for line in lines if line.strip().startswith("t =")]
    rows = np.array([[float(number) for number in row] for row in rows])
    assert rows[:, 0].tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]
    for (_, sampled, error, exact), k in zip(rows, (8, 6, 4, 2, 0)):
        # At t = 1 the law starts from the sampled mean square, itself an estimate of |a|^2 + 2 sigma_q^2.
        drawn = rows[0, 3] ** 2
        assert exact == pytest.approx(oracles.ddpm_mean_square(8, k, drawn, 3.0, 2) ** 0.5, rel=1e-4)
        assert abs(sampled - exact) < 5 * error
    variance = 4 * 3.0**4 + 4 * 9.0 * (4 + 0.25)  # of |x_1 - a|^2
    assert abs(rows[0, 3] ** 2 - (4.25 + 18)) < 5 * (variance / 20000) ** 0.5
    assert rows[0, 2] == pytest.approx((variance / 20000) ** 0.5 / 2 / 22.25**0.5, rel=0.1)  # two digits are printed
    # At t = 0 the square is 2 sigma_q^2 dt / 2 times a chi-square of two degrees: its deviation is its mean.
    assert rows[-1, 2] == pytest.approx((18 / 8) ** 0.5 / 2 / 20000**0.5, rel=0.1)


def test_main_prints_the_same_table_for_the_same_seed_only(point_mass, tmp_path, capsys, monkeypatch):
    for plot in ("plot_trajectories", "plot_distances"):
        monkeypatch.setattr(point_mass, plot, lambda *_: point_mass.plt.figure(figsize=(1, 1)))
    tables = []
    for seed in ("5", "5", "6"):
        point_mass.main([*SMALL, "--seed", seed, "--figures-dir", str(tmp_path)])
        tables.append(capsys.readouterr().out)
    assert tables[0] == tables[1] != tables[2]
