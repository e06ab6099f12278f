"""Experiment 9 held to closed forms, to differences and to draws."""

import re
from functools import partial

import nearly_gaussian as s
import numpy as np
import pytest

DATA = {"sigma_0": 0.3, "sigma_q": 2.0}


def rng(seed=0):
    return np.random.default_rng(seed)


def noisy(x, variance, g):
    return x + variance**0.5 * g.standard_normal(len(x))


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_log_density_is_that_of_draws(t):
    g, x = rng(1), s.grid(**DATA)
    x_t = noisy(s.mixture(200_000, g, sigma_0=0.3), 4 * t, g)
    p = np.exp(s.log_density(x, t, **DATA)) * (x[1] - x[0])
    assert p.sum() == pytest.approx(1, abs=1e-13)
    for edge in x[::20] + (x[1] - x[0]) / 2:  # between two points
        assert (x_t < edge).mean() == pytest.approx(p[x < edge].sum(), abs=5 * 0.5 / 200_000**0.5)


@pytest.mark.parametrize("t", [0.0, 0.01, 1.0])
def test_score_is_the_slope_of_log_density(t):
    x, h = np.linspace(-3, 3, 24).reshape(2, 3, 4), 1e-5
    slope = (s.log_density(x + h, t, **DATA) - s.log_density(x - h, t, **DATA)) / (2 * h)
    np.testing.assert_allclose(s.score(x, t, **DATA), slope, atol=1e-6)
    assert s.score(0.3, t, **DATA) == pytest.approx(s.score(np.array([0.3]), t, **DATA)[0])


def test_ddpm_on_a_point_mass():
    """To a point mass at 0: the variance obeys a recursion."""
    variance, x_1 = 9.0, 3 * rng().standard_normal(100_000)
    steps = s.ddpm(lambda x_t, t, dt: (1 - dt / t) * x_t, x_1, 4, 3.0, rng(1))
    for k, x_t in zip((4, 3, 2, 1), steps):
        variance = (1 - 1 / k) ** 2 * variance + 9 / 4
        assert x_t.var() == pytest.approx(variance, rel=5 * (2 / 100_000) ** 0.5)


def test_one_gaussian(monkeypatch):
    """Both centers at 0.5: each reverse mean is linear, so a step maps mean and variance."""
    monkeypatch.setattr(s, "CENTERS", np.array([0.5, 0.5]))
    assert s.entropy(0.5, **DATA) == pytest.approx(np.log(2 * np.pi * np.e * 2.09) / 2)
    assert s.fisher(0.5, **DATA) == pytest.approx(1 / 2.09)
    x, mean, variance = s.grid(**DATA), 0.0, 4.0
    for k in (5, 4, 3, 2, 1):
        slope = (0.09 + 4 * (k - 1) / 5) / (0.09 + 4 * k / 5)
        mean, variance = 0.5 + slope * (mean - 0.5), slope**2 * variance + 4 / 5
    q = s.output_density(partial(s.reverse_mean, **DATA), x, 5, 2.0)
    assert abs(q - s.gaussian(x, mean, variance**0.5)).max() < 1e-9


def test_kl_of_gaussians():
    x = np.linspace(-30, 30, 6001)
    p, q = s.gaussian(x, 0.4, 0.5), s.gaussian(x, -0.1, 2.0)
    want = np.log(2 / 0.5) + (0.5**2 + 0.5**2) / (2 * 2**2) - 0.5
    assert s.kl(p, q, x) == pytest.approx(want)


def test_step_posterior_is_bayes_rule():
    """Over p_t(x_t), which is known, not over its sum; and its mean is the reverse mean."""
    x_t, t, dt = np.array([-4.0, 0.1, 1.0]), 0.3, 0.2
    moves, logs = s.step_posterior(x_t, t, dt, **DATA)
    joint = s.log_density(x_t[:, None] + moves, t - dt, **DATA)
    joint = joint - moves**2 / (2 * 0.8) - np.log(2 * np.pi * 0.8) / 2
    np.testing.assert_allclose(logs, joint - s.log_density(x_t, t, **DATA)[:, None], atol=1e-10)
    mean = x_t + np.exp(logs) @ moves * (moves[1] - moves[0])
    np.testing.assert_allclose(mean, s.reverse_mean(x_t, t, dt, **DATA), atol=1e-10)


@pytest.mark.parametrize(("t", "dt"), [(1.0, 1.0), (0.6, 0.25), (0.02, 0.01)])
@pytest.mark.parametrize("sigma_0", [0.15, 1.0])
def test_identities(t, dt, sigma_0):
    data = {"sigma_0": sigma_0, "sigma_q": 2.0}
    x = s.grid(**data)
    got = [s.average(row, x, t, **data) for row in s.step_kl(x, t, dt, **data)]
    np.testing.assert_allclose(s.identities(t, dt, **data), got[:2], atol=1e-11)
    assert got[0] > got[1] > got[2] > 0


def test_small_steps_have_slopes_2_4_6():
    sigmas = np.array([0.005, 0.0055, 0.1])
    divergences, exact, limits = s.measure_steps(sigmas, **DATA)
    np.testing.assert_allclose(divergences[:2] / limits[:2], 1, rtol=0.005)
    slopes = np.log(divergences[1] / divergences[0]) / np.log(1.1)
    np.testing.assert_allclose(slopes, [2, 4, 6], atol=0.03)
    np.testing.assert_allclose(divergences[:, :2], exact, atol=1e-12)


def test_a_run(monkeypatch):
    """Held to the numbers of another computation, and to draws of log(p_1 / base)."""
    monkeypatch.setattr(s, "STEP_COUNTS", [1, 100])
    wrong, right, bound, output = s.measure_runs(**DATA)
    assert wrong == pytest.approx([1.3417, 1.3417], abs=5e-5)
    assert right == pytest.approx([0.9450, 0.0990], abs=5e-5)
    assert output == pytest.approx([0.8740, 0.0178], abs=1e-4)
    x_1 = noisy(s.mixture(100_000, rng(5), sigma_0=0.3), 4.0, rng(6))
    base = s.log_density(x_1, 1, **DATA) - np.log(s.gaussian(x_1, 0, 2.0))
    assert bound - right == pytest.approx([base.mean()] * 2, abs=5 * base.std() / 100_000**0.5)


def test_output_density_is_that_of_samples():
    n, mean, x = 100_000, partial(s.reverse_mean, **DATA), s.grid(**DATA)
    *_, x_0 = s.ddpm(mean, 2.0 * rng(8).standard_normal(n), 6, 2.0, rng(9))
    q = s.output_density(mean, x, 6, 2.0)
    for edge in (-1.5, -0.5, 0.5, 2.0):
        share = (x[1] - x[0]) * q[x < edge].sum()
        assert (x_0 < edge).mean() == pytest.approx(share, abs=0.01)


@pytest.mark.parametrize("num_steps", [1, 6])
def test_sample_with_and_without_the_last_noise(num_steps):
    x_1 = 2 * rng().standard_normal(1000)
    x_0, mean = s.sample(x_1, num_steps, rng(1), **DATA)
    g = rng(1)
    *_, want = s.ddpm(partial(s.reverse_mean, **DATA), x_1, num_steps, 2.0, g)
    assert np.array_equal(x_0, want)
    last = rng(1).standard_normal((num_steps, 1000))[-1]
    np.testing.assert_allclose(x_0 - mean, 2 / num_steps**0.5 * last, atol=1e-12)


def test_figure_2_of_the_tutorial():
    titles = [ax.get_title() for ax in s.draw_step(**DATA).axes]
    assert [title[-5:] for title in titles] == ["0.668", "0.719", "0.031"]


def test_main(tmp_path, capsys, monkeypatch):
    calls = []

    def spy(x_1, num_steps, g, original=s.sample, **data):
        calls.append((x_1, num_steps, data, g.bit_generator.state["state"]))
        return original(x_1, num_steps, g, **data)

    monkeypatch.setattr(s, "sample", spy)
    monkeypatch.setattr(s, "STEP_COUNTS", [1, 3, 10])
    s.main(f"--figures-dir {tmp_path} --sigma-0 1 --sigma-q 3 --num-steps 7 --seed 3".split())
    ((x_1, num_steps, data, state),) = calls
    g = rng(3)
    assert (num_steps, data) == (7, {"sigma_0": 1, "sigma_q": 3})
    assert np.array_equal(x_1, 3 * g.standard_normal(20_000))
    assert state == g.bit_generator.state["state"]  # one stream: the noise follows the starts
    names = {"reverse-step", "kl-vs-sigma", "kl-vs-steps"}
    assert {path.stem for path in tmp_path.iterdir()} == names
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 9
    rows = [[float(n) for n in re.findall(r"(?<= )\d[\d.e-]*", line)] for line in lines]
    assert rows[1] == pytest.approx([2, 4, 6], abs=0.01)  # slopes
    assert rows[2] == pytest.approx([1, 1, 1], abs=0.01)  # KL over its limit
    assert rows[3][0] < 1e-11
    runs = s.measure_runs(**data)
    assert rows[5] == pytest.approx([1, *runs[:, 0]], abs=1e-4)
    assert rows[6] == pytest.approx([10, *runs[:, 2]], abs=1e-4)
    fine = sum(s.identities(k / 300, 1 / 300, **data)[1] for k in range(1, 301))
    assert rows[7] == pytest.approx([runs[0, 0], 300 * fine], rel=0.02)
    assert rows[8][0] == pytest.approx(1.96**0.5, abs=0.02)
    assert rows[8][1] ** 2 - rows[8][2] ** 2 == pytest.approx(9 / 7, rel=0.05)
