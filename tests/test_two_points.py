"""Experiment 2 held to references that share no code with it."""

import math
import re
from functools import partial

import numpy as np
import pytest
import two_points as s

POINTS = np.array([[0.5, -1.0], [2.0, 1.5], [-1.0, 0.3]])
THREE = {"points": POINTS, "weights": np.array([0.2, 0.5, 0.3]), "sigma_q": 1.5}
TWO = {"points": POINTS[:2], "weights": np.array([0.3, 0.7]), "sigma_q": 1.5}


def density(x, t, i=None):
    """p_t(x) of THREE, or the part of it that comes from point i, one x at a time."""
    variance = 1.5**2 * t
    parts = [
        w * math.exp(-(math.dist(x, a) ** 2) / (2 * variance)) / (2 * math.pi * variance)
        for a, w in zip(POINTS, (0.2, 0.5, 0.3))
    ]
    return sum(parts) if i is None else parts[i]


@pytest.mark.parametrize("t", [0.05, 0.4, 1.0])
def test_posterior(t):
    x_t = 2 * np.random.default_rng(1).standard_normal((20, 2))
    want = [[density(x, t, i) / density(x, t) for i in range(3)] for x in x_t]
    np.testing.assert_allclose(s.posterior(x_t, t, **THREE), want, atol=1e-12)
    assert s.posterior(np.array([[900.0, 800.0]]), 1e-6, **THREE).tolist() == [[0, 1, 0]]


@pytest.mark.parametrize("dt", [0.1, 0.4])
def test_reverse_mean_by_the_score(dt):
    """E[x_{t-dt} | x_t] = x_t + sigma_q^2 dt grad log p_t, by differences of the density."""
    t, h = 0.4, 1e-5
    for x in np.random.default_rng(3).standard_normal((5, 2)):
        score = [
            (math.log(density(x + step, t)) - math.log(density(x - step, t))) / (2 * h)
            for step in h * np.eye(2)
        ]
        step = s.reverse_mean(x[None], t, dt, **THREE)[0] - x
        np.testing.assert_allclose(step, 1.5**2 * dt * np.array(score), atol=1e-7)


def test_ddim_averaged_plainly_runs_straight_to_the_mean():
    """As to a point mass (experiment 1), by the factor sqrt(t), after every step."""
    x_1 = np.random.default_rng(4).standard_normal((10, 2))
    mean = np.array([0.2 * 0.5 + 0.5 * 2 - 0.3, -0.2 + 0.5 * 1.5 + 0.3 * 0.3])
    plain = partial(s.plain_mean, points=POINTS, weights=THREE["weights"])
    for k, x_t in zip((6, 5, 4, 3, 2, 1, 0), s.ddim(plain, x_1, 7)):
        np.testing.assert_allclose(x_t, mean + (k / 7) ** 0.5 * (x_1 - mean), atol=1e-13)
    assert k == 0


def test_border_cuts_off_the_first_weight():
    n, rng = 200_000, np.random.default_rng(5)
    axis = np.array([1.5, 2.5]) / math.hypot(1.5, 2.5)
    for t in (0.1, 1):
        x_0 = POINTS[rng.choice(2, size=n, p=[0.3, 0.7])]
        x_t = x_0 + 1.5 * t**0.5 * rng.standard_normal((n, 2))
        below = (x_t @ axis < s.border(t, **TWO)).mean()
        assert below == pytest.approx(0.3, abs=5 * (0.21 / n) ** 0.5)
    halves = {**TWO, "weights": np.array([0.5, 0.5])}
    assert s.border(1, **halves) == pytest.approx((POINTS[0] + POINTS[1]) @ axis / 2)


def test_no_trajectory_crosses_the_border():
    """DDIM with small steps, from both sides of the border: after every step, and at the end."""
    axis = (POINTS[1] - POINTS[0]) / math.dist(*POINTS[:2])
    start = s.border(1, **TWO) * axis + np.outer([-2, 0, 3], [-axis[1], axis[0]])
    x_1 = np.concatenate([start - 0.02 * axis, start + 0.02 * axis])
    for k, x_t in zip(range(999, 0, -1), s.ddim(partial(s.reverse_mean, **TWO), x_1, 1000)):
        beyond = x_t @ axis > s.border(k / 1000, **TWO)
        assert beyond.tolist() == 3 * [False] + 3 * [True]
    np.testing.assert_array_equal(s.twins(x_1, **TWO), POINTS[[0, 0, 0, 1, 1, 1]])
    np.testing.assert_allclose(x_t, POINTS[[0, 0, 0, 1, 1, 1]], atol=0.2)


def test_measures():
    x_0 = np.array([[0.5, -1.0], [0.5, 0.0], [2.0, 1.0], [0.9, -0.7]])
    assert s.first_share(x_0, POINTS[:2]) == 0.75
    assert s.mean_distance(x_0[:2], np.array([[3.5, 3.0], [0.5, 1.0]])) == pytest.approx(3)


def test_main(tmp_path, capsys, monkeypatch):
    calls, drawn = [], []

    def spy(mean, x_1, num_steps, label, original=s.sample):
        calls.append((mean, x_1, num_steps))
        return original(mean, x_1, num_steps, label)

    def spy_on_figure(*args, original=s.draw_trajectories, **data):
        drawn.extend(args)
        return original(*args, **data)

    monkeypatch.setattr(s, "sample", spy)
    monkeypatch.setattr(s, "draw_trajectories", spy_on_figure)
    s.main(f"--figures-dir {tmp_path} --num-steps 50 --sigma-q 4 --weight 0.7".split())
    (bayes, p_1, steps), (again, base, _), (plain, same, _) = calls
    assert steps == 50
    assert bayes is again
    assert base is same
    assert (bayes.func, plain.func) == (s.reverse_mean, s.plain_mean)
    assert bayes.keywords["sigma_q"] == 4
    assert bayes.keywords["weights"] == pytest.approx([0.7, 0.3])
    assert drawn[:2] == [bayes, plain]
    np.testing.assert_array_equal(drawn[2], base[:40])
    for x_1, mean, variance in [(base, 0, 16), (p_1, -0.4 * 1.5, 16 + 0.84 * 1.5**2)]:
        assert x_1[:, 0].mean() == pytest.approx(mean, abs=5 * (variance / 10_000) ** 0.5)
        assert x_1[:, 0].var() == pytest.approx(variance, rel=5 * (2 / 10_000) ** 0.5)
    names = {"experiment-2-sample-trajectories-ddim", "velocity-field"}
    assert {path.stem for path in tmp_path.iterdir()} == names
    lines = capsys.readouterr().out.splitlines()[1:]
    numbers = [[float(word) for word in re.findall(r" ([\d.]\S*)", line)] for line in lines]
    for (share, error, exact, apart), want in zip(numbers, (0.7, s.base_share(**bayes.keywords))):
        assert exact == pytest.approx(want, abs=1e-4)
        assert error == pytest.approx((want * (1 - want) / 10_000) ** 0.5, abs=1e-4)
        assert abs(share - exact) < 5 * error  # of samples by DDIM
        assert apart < 0.05
    assert numbers[2][0] < 1e-12
    assert numbers[2][1] > 1
