"""Experiment 1 held to references that share no code with it."""

from functools import partial

import numpy as np
import point_mass as s
import pytest

A = np.array([1.5, -0.75])


def rng(seed=0):
    return np.random.default_rng(seed)


@pytest.mark.parametrize(("t", "dt"), [(1.0, 0.001), (0.5, 0.2), (0.4, 0.399), (1.0, 1.0)])
def test_reverse_mean_by_bayes_rule(t, dt):
    """A sum over the noise up to t - dt, weighted by how well it explains x_t."""
    z = np.linspace(-9, 9, 2001)
    previous = A[:, None] + 2.0 * (t - dt) ** 0.5 * z
    for x_t in np.array([[1.5, -0.75], [-2.0, 1.0]]):
        weights = np.exp(-(z**2) / 2 - (x_t[:, None] - previous) ** 2 / (2 * 4.0 * dt))
        exact = (weights * previous).sum(axis=1) / weights.sum(axis=1)
        np.testing.assert_allclose(s.reverse_mean(x_t, t, dt, a=A), exact, rtol=0, atol=1e-9)


def test_ddim_at_every_step():
    x_1 = 3 * rng().standard_normal((50, 2))
    for num_steps in (1, 2, 7, 200):
        steps = [x_1, *s.ddim(partial(s.reverse_mean, a=A), x_1, num_steps)]
        assert len(steps) == num_steps + 1
        exact = s.ddim_trajectory(x_1, s.times(num_steps), a=A)
        np.testing.assert_allclose(steps, exact, rtol=0, atol=1e-13)
        np.testing.assert_allclose(steps[-1], np.tile(A, (50, 1)), rtol=0, atol=1e-15)


def ddpm_mean_and_variance(x_1, k, num_steps, sigma_q):
    """Of x_t at t = k / num_steps: the noise of step j shrinks to k / j of itself, or stays."""
    shares = [(k / j) ** 2 for j in range(max(k, 1), num_steps)] if k else [1]
    return A + k / num_steps * (x_1 - A), sigma_q**2 / num_steps * sum(shares)


def test_ddpm_at_every_step():
    n, x_1 = 100_000, np.array([3.0, -1.0])
    starts = np.tile(x_1, (n, 1))
    steps = s.ddpm(partial(s.reverse_mean, a=A), starts, 5, 2.0, rng(1))
    for k, x_t in zip((4, 3, 2, 1, 0), steps):
        mean, variance = ddpm_mean_and_variance(x_1, k, 5, 2.0)
        assert (np.abs(x_t.mean(axis=0) - mean) < 5 * (variance / n) ** 0.5).all()
        assert (np.abs(x_t.var(axis=0) / variance - 1) < 5 * (2 / n) ** 0.5).all()


@pytest.mark.parametrize("num_steps", [1, 2, 30])
def test_ddpm_law(num_steps):
    """The start is N(0, 4 I): |a|^2 + 8 shrinks by t^2, and the steps' noise comes to it."""
    law = s.ddpm_law(num_steps, 2.0, a=A)
    assert len(law) == num_steps + 1
    assert law[0] == pytest.approx((A @ A + 8) ** 0.5)
    for k in range(num_steps):
        _, variance = ddpm_mean_and_variance(A, k, num_steps, 2.0)
        exact = (k / num_steps) ** 2 * (A @ A + 8) + 2 * variance
        assert law[num_steps - k] == pytest.approx(exact**0.5, rel=1e-12)


def test_distances():
    x = np.array([[3.0, 4.0], [1.0, 0.0]])
    np.testing.assert_allclose(s.distance(x, np.zeros(2)), [5, 1])
    assert s.root_mean_square(np.array([5.0, 1.0])) == pytest.approx(13**0.5)


def test_main(tmp_path, capsys, monkeypatch):
    calls = []

    def spy(x_1, num_steps, sigma_q, rng, *, a, original=s.sample):
        paths = original(x_1, num_steps, sigma_q, rng, a=a)
        paths["DDIM"][2, 7] += (3e-3, 4e-3)  # one sample, at one step
        calls.append((x_1, num_steps, sigma_q, a, paths))
        return paths

    monkeypatch.setattr(s, "sample", spy)
    flags = "--num-steps 4 --num-samples 10_000 --a-x 1.5 --a-y -0.75 --sigma-q 2"
    s.main([*flags.split(), "--figures-dir", str(tmp_path)])
    ((x_1, num_steps, sigma_q, a, paths),) = calls
    assert (num_steps, sigma_q, *a) == (4, 2, 1.5, -0.75)
    assert x_1.std() == pytest.approx(2, rel=0.03)
    assert abs(x_1.mean()) < 5 * 2 / 20_000**0.5
    assert all(np.array_equal(x_t[0], x_1) for x_t in paths.values())
    names = {"sample-trajectories-ddim", "distance-vs-time"}
    assert {path.stem for path in tmp_path.iterdir()} == {f"experiment-1-{name}" for name in names}
    _, ddpm_line, ddim_line = capsys.readouterr().out.splitlines()
    rms, se, law = (float(ddpm_line.replace(",", "").split()[k]) for k in (5, 7, -1))
    squares = ((paths["DDPM"][-1] - A) ** 2).sum(axis=1)
    assert rms == pytest.approx(squares.mean() ** 0.5, abs=1e-4)
    assert law == pytest.approx(2 * (2 / 4) ** 0.5, abs=1e-4)
    assert 0 < abs(rms - law) < 5 * se
    assert se == pytest.approx(squares.std() / 100 / (2 * rms), rel=0.05)
    assert float(ddim_line.split()[9]) == pytest.approx(5e-3, rel=0.01)
