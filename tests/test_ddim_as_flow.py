"""Experiment 6 held to references that share no code with it."""

import math
from functools import partial
from statistics import NormalDist

import ddim_as_flow as s
import numpy as np
import pytest

THREE = {"points": np.array([[-2.0], [0.3], [1.5]]), "weights": np.array([0.2, 0.5, 0.3])}


def mean_x_0(x, alpha, beta, points, weights):
    """E[x_0 | x] for one x, (d,): Bayes' rule, every density written out."""
    logs = [
        math.log(w) - sum((x - alpha * a) ** 2) / (2 * beta**2) for a, w in zip(points, weights)
    ]
    odds = [math.exp(log - max(logs)) for log in logs]
    return sum(o * a for o, a in zip(odds, points)) / sum(odds)


def left_of(y, sigma, points, weights):
    """P(x_0 + N(0, sigma^2) < y), a mixture's distribution function."""
    return sum(w * NormalDist(a, sigma).cdf(y) for w, a in zip(weights, points[:, 0]))


def test_schedules_are_those_of_the_text():
    """Draws as the text has them: slope in x_0, standard deviation of the rest; and the clocks."""
    rng, n, t = np.random.default_rng(0), 200_000, 0.3
    x_0, noise = 2 * rng.standard_normal(n), 3 * rng.standard_normal(n)
    for name, x_t in {
        "DDIM": x_0 + t**0.5 * noise,
        "linear flow": t * (x_0 + noise) + (1 - t) * x_0,
        "rectified flow": t * noise + (1 - t) * x_0,
    }.items():
        alpha, beta, clock = s.schedules(3.0)[name]
        slope = (x_t @ x_0) / (x_0 @ x_0)
        assert slope == pytest.approx(alpha(t), abs=0.02)
        assert (x_t - slope * x_0).std() == pytest.approx(beta(t), rel=0.01)
        assert clock(beta(t) / alpha(t)) == pytest.approx(t)


def test_variance_preserving_is_eq_74_in_small_steps():
    """x <- sqrt(1 - beta) x + sqrt(beta) noise; Ho et al. (2020): 1e-4 to .02 in 1000 steps."""
    alpha, beta, clock = s.schedules(1.0)["variance preserving"]
    rates = np.linspace(0.1, 20, 100_000)[:40_000] / 100_000  # up to t = .4
    variance = 0.0
    for rate in rates:
        variance = (1 - rate) * variance + rate
    assert alpha(0.4) == pytest.approx(np.prod(1 - rates) ** 0.5, rel=1e-3)
    assert beta(0.4) ** 2 == pytest.approx(variance, rel=1e-3)
    assert clock(beta(0.4) / alpha(0.4)) == pytest.approx(0.4)


def test_samplers_on_a_point_mass():
    """To a point mass at a, x - alpha a shrinks as beta does: after every step."""
    x_1, a, t = np.array([[3.0], [-1.0]]), 0.5, np.array([1, 0.7, 0.4, 0.1, 0])
    mean = partial(s.reverse_mean, denoiser=lambda x, t: np.full_like(x, a))
    for k, x in zip((6, 5, 4, 3, 2, 1, 0), s.ddim(mean, x_1, 7)):
        np.testing.assert_allclose(x, a + (k / 7) ** 0.5 * (x_1 - a), atol=1e-12)
    v = partial(s.velocity, denoiser=lambda x, t: np.full_like(x, a))
    for r, x in zip(t[1:], s.flow(v, x_1, t)):
        np.testing.assert_allclose(x, a + r * (x_1 - a), atol=1e-12)
    runs = s.sample(lambda x, alpha, beta: np.full_like(x, a), x_1, 1 - t, 2 * t)
    for r, x in zip(t[1:], runs):
        np.testing.assert_allclose(x, (1 - r) * a + r * x_1, atol=1e-12)


def test_quantile_and_the_ode():
    """Read forwards again; its slope in sigma is (x - E[x_0 | x]) / sigma; and at level 0."""
    u = np.array([0.01, 0.3, 0.69, 0.71, 0.999])
    for sigma in (0.05, 0.5, 4.0):
        below, y, above = (s.quantile(u, r * sigma, **THREE) for r in (0.99, 1, 1.01))
        np.testing.assert_allclose([left_of(x, sigma, **THREE) for x in y[:, 0]], u, atol=1e-5)
        slope = [(x - mean_x_0(x, 1, sigma, **THREE)) / sigma for x in y]
        np.testing.assert_allclose((above - below) / (0.02 * sigma), slope, atol=0.005)
    np.testing.assert_allclose(s.quantile(u, 0, **THREE)[:, 0], [-2, 0.3, 0.3, 1.5, 1.5], atol=1e-8)


@pytest.mark.parametrize("num_steps", [1, 2, 30])
@pytest.mark.parametrize("sigma_q", [0.5, 2.0, 20.0])
def test_all_agree_on_equal_levels(num_steps, sigma_q):
    """With y_r = D + (sigma_r / sigma) (y - D) written out, one number at a time."""
    known = partial(s.denoiser, **THREE)
    x_1 = sigma_q * np.array([[-2.1], [-0.3], [0.2], [1.9]])
    want, levels = [x_1], [sigma_q * (k / num_steps) ** 0.5 for k in range(num_steps, -1, -1)]
    for sigma, next_sigma in zip(levels, levels[1:]):
        means = np.array([mean_x_0(y, 1, sigma, **THREE) for y in want[-1]])
        want.append(means + next_sigma / sigma * (want[-1] - means))
    paths = s.trajectories(known, x_1, num_steps, sigma_q)
    equal = s.on_equal_levels(known, x_1, num_steps, sigma_q)
    for x in (paths["DDIM"], paths["flow, grid sqrt(t)"], *equal.values()):
        np.testing.assert_allclose(x, want, atol=1e-10)
    even = s.follow(known, np.ones_like, lambda t: sigma_q * t, x_1, s.even(num_steps))[1]
    np.testing.assert_allclose(paths["flow, even grid"], even, atol=1e-10)


def test_on_even_steps():
    """To a point mass at 0 all are exact. Twins that are off by .1 and .7: an error of .5."""
    x_1 = np.array([[1.0], [-3.0]])

    def twins(sigma):
        return x_1 * sigma / 2 + [[0.1], [-0.7]]

    found = s.on_even_steps(lambda x, alpha, beta: 0 * x, x_1, twins, 4, 2.0)
    k = np.arange(4, -1, -1) / 4
    want = {"DDIM": 2 * k**0.5, "linear flow": 2 * k, "rectified flow": 2 * k / (2 - k)}
    for name, (levels, errors) in found.items():
        np.testing.assert_allclose(levels[[0, -1]], [2, 0], atol=1e-12)
        np.testing.assert_allclose(levels, want.get(name, levels), atol=1e-12)
        np.testing.assert_allclose(errors, 0.5, atol=1e-12)


def test_main(tmp_path, capsys, monkeypatch):
    calls = []

    def spy(known, x_1, twins, *args, original=s.on_even_steps):
        calls.append((x_1, twins(0.5), args, original(known, x_1, twins, *args)))
        return calls[0][-1]

    monkeypatch.setattr(s, "on_even_steps", spy)
    s.main(f"--figures-dir {tmp_path} --num-steps 4 --num-samples 20 --sigma-q 3".split())
    [(x_1, at_half, args, found)] = calls
    assert args == (4, 3.0)
    for x, sigma in [(x_1, 3.0), (at_half, 0.5)]:
        ranks = [left_of(y, sigma, **s.DATA) for y in x[:, 0]]
        np.testing.assert_allclose(ranks, (np.arange(20) + 0.5) / 20, atol=1e-5)
    assert {path.stem for path in tmp_path.iterdir()} == {"same-trajectories", "schedules"}
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 9
    equal, even = (float(line.split()[-1]) for line in lines[1:3])
    assert equal < 1e-12 < 1 < even
    for line, (levels, errors) in zip(lines[5:], found.values()):
        difference, last, largest = (float(word) for word in line.split()[-3:])
        assert difference < 1e-12
        assert [last, largest] == pytest.approx([levels[3], max(errors)], rel=6e-3)
