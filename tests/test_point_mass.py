"""Experiment 1: a point mass.  DDIM runs straight to it, exactly; DDPM's distance follows its own
exact law.
"""

import re
import tracemalloc

import numpy as np
import oracles
import pytest
from conftest import texts

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
    np.testing.assert_allclose(
        point_mass.reverse_mean(x_t, t, dt, a=a), exact, rtol=0, atol=1e4 * oracles.EPS * scale
    )


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
        np.testing.assert_allclose(
            x_t, A + (k / num_steps) ** 0.5 * (x_1 - A), rtol=0, atol=rounding
        )
        distance = point_mass.ddim_distance(np.linalg.norm(x_1 - A, axis=1), k / num_steps)
        np.testing.assert_allclose(np.linalg.norm(x_t - A, axis=1), distance, rtol=0, atol=rounding)
        assert point_mass.distance_from_line(x_t, x_1, A).max() < rounding


def test_samplers_leave_x_1_alone_and_the_seed_decides_the_bits(point_mass, mean):
    x_1 = np.random.default_rng(0).standard_normal((50, 2))
    before = x_1.copy()
    first, again, other = (
        list(point_mass.ddpm(mean, x_1, 6, 2.0, np.random.default_rng(s))) for s in (3, 3, 4)
    )
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
    np.testing.assert_array_equal(
        point_mass.ddpm_mean_square(5, 2.0, 1.5), point_mass.ddpm_mean_square(5, 2.0, 1.5, 2)
    )


def test_distance_from_line_is_the_distance_to_the_projection(point_mass):
    x_t, x_1 = np.random.default_rng(0).normal(0, 5, (2, 200, 2))
    exact = [oracles.distance_from_line(x, start, A) for x, start in zip(x_t, x_1)]
    # Products of numbers below 30, divided by distances that this seed keeps above .1.
    rounding = 1e4 * oracles.EPS
    np.testing.assert_allclose(
        point_mass.distance_from_line(x_t, x_1, A), exact, rtol=0, atol=rounding
    )


# ------------------------------------------ Measuring -------------------------------------------


def bent(monkeypatch, point_mass, offsets):
    """Makes the module's DDIM yield x_1 + offsets[k] at step k."""
    monkeypatch.setattr(point_mass, "ddim", lambda mean, x_1, n: (x_1 + off for off in offsets))


def test_measured_departures_are_the_largest_over_steps_and_samples(point_mass, monkeypatch):
    x_1 = A + np.random.default_rng(0).normal(size=(60, 2))
    offsets = np.random.default_rng(1).normal(size=(3, 60, 2))
    bent(monkeypatch, point_mass, offsets)
    paths, largest = point_mass.measure_ddim(x_1, 3, a=A)
    line, law, end = [], [], []
    for t, off in zip((2 / 3, 1 / 3, 0), offsets):
        for start, x in zip(x_1, x_1 + off):
            line.append(oracles.distance_from_line(x, start, A))
            law.append(abs(np.linalg.norm(x - A) - t**0.5 * np.linalg.norm(start - A)))
            end.append(np.linalg.norm(x - A))
    assert largest == pytest.approx({"line": max(line), "law": max(law), "end": max(end[-60:])})
    np.testing.assert_array_equal(paths, np.concatenate([x_1[None], x_1 + offsets])[:, :40])


def test_measured_ddim_departs_by_rounding_only(point_mass):
    x_1 = np.random.default_rng(0).standard_normal((1000, 2))
    _, largest = point_mass.measure_ddim(x_1, 20, a=A)
    assert max(largest.values()) < 1e-13


def test_measured_ddpm_stands_beside_its_law(point_mass, mean):
    n, num_steps = 20_000, 8
    x_1 = 3.0 * np.random.default_rng(0).standard_normal((n, 2))
    rng = np.random.default_rng
    paths, distances = point_mass.measure_ddpm(x_1, num_steps, 3.0, rng(5), a=A)
    steps = [x_1, *point_mass.ddpm(mean, x_1, num_steps, 3.0, rng(5))]
    np.testing.assert_array_equal(paths, [x_t[:40] for x_t in steps])
    squares = [np.sum((x_t - A) ** 2, axis=1) for x_t in steps]
    rms = [np.mean(square) ** 0.5 for square in squares]
    np.testing.assert_allclose(distances["rms"], rms, rtol=1e-12)
    exact = [
        oracles.ddpm_mean_square(num_steps, k, squares[0].mean(), 3.0, 2) ** 0.5
        for k in range(num_steps, -1, -1)
    ]
    np.testing.assert_allclose(distances["exact"], exact, rtol=1e-12)
    # The standard error of a root mean square, from 200 batches of 100 samples.
    for square, rms_se in zip(squares, distances["rms_se"]):
        batches = np.sqrt(square.reshape(200, 100).mean(axis=1))
        assert rms_se == pytest.approx(
            batches.std() / 200**0.5, rel=0.3
        )  # 5 % s.e. of a std of 200
    assert np.all(np.abs(distances["rms"] - exact)[1:] < 5 * distances["rms_se"][1:])


def test_only_what_is_drawn_is_kept(point_mass):
    """20 000 samples in 2-D are 0.32 MB, so all 200 steps of one run would be 64 MB."""
    x_1 = np.zeros((20_000, 2)) + 1.0
    tracemalloc.start()
    point_mass.measure_ddim(x_1, 200, a=A)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16e6


# ------------------------------------ Printing and the figures ----------------------------------


def test_report_prints_what_was_measured(point_mass, capsys):
    class Args:
        a, sigma_q, num_samples, num_steps = [1.5, -0.75], 2.5, 321, 4

    distances = {
        "rms": np.array([5.1, 4.1, 3.1, 2.1, 1.1]),
        "rms_se": np.array([0.51, 0.41, 0.31, 0.21, 0.11]),
        "exact": np.array([5.2, 4.2, 3.2, 2.2, 1.2]),
    }
    point_mass.report({"line": 1e-11, "law": 2e-12, "end": 3e-13}, distances, Args)
    lines = capsys.readouterr().out.splitlines()
    assert "(1.5, -0.75), sigma_q = 2.5: 321 samples, 4 steps" in lines[0]
    for line, number, words in zip(
        lines[1:4], ("1e-11", "2e-12", "3e-13"), ("line", "sqrt", "t = 0")
    ):
        assert number in line
        assert words in line
    rows = [[float(x) for x in re.findall(r"\d+\.\d+", line)] for line in lines[5:]]
    t = [1, 0.75, 0.5, 0.25, 0]
    columns = distances["rms"], distances["rms_se"], distances["exact"]
    np.testing.assert_allclose(rows, np.stack([t, *columns], axis=1))


def test_figures_draw_what_was_measured(point_mass):
    rng = np.random.default_rng(0)
    x_1 = rng.standard_normal((60, 2))
    ddim_paths, _ = point_mass.measure_ddim(x_1, 5, a=A)
    ddpm_paths, distances = point_mass.measure_ddpm(x_1, 5, 1.0, rng, a=A)
    axes = point_mass.draw_paths(ddim_paths, A).axes[0]
    np.testing.assert_array_equal(axes.lines[0].get_xydata(), ddim_paths[:, 0])
    figure = point_mass.draw_distances(ddim_paths, ddpm_paths, distances, A)
    top, bottom = figure.axes
    marks = [line for line in top.lines if line.get_marker() == "o" and len(line.get_xdata())]
    np.testing.assert_array_equal(marks[0].get_xdata(), [1, 0.8, 0.6, 0.4, 0.2, 0])
    distance = np.linalg.norm(ddim_paths[:, 0] - A, axis=1)
    np.testing.assert_allclose(marks[0].get_ydata(), distance)
    curve = top.lines[0]  # the exact one of the same start
    np.testing.assert_allclose(curve.get_ydata(), distance[0] * np.sqrt(curve.get_xdata()))
    drawn = {line.get_label(): line.get_ydata() for line in bottom.lines}
    np.testing.assert_array_equal(drawn["exact root mean square"], distances["exact"])
    np.testing.assert_array_equal(drawn["root mean square, all samples"], distances["rms"])
    assert f"= {(2 / 5) ** 0.5:.2g}" in texts(figure)
