"""Experiment 1 held to references that share no code with it."""

from functools import partial

import numpy as np
import point_mass as s
import pytest
from conftest import paste, rng, snippet
from matplotlib.colors import same_color
from matplotlib.figure import Figure

A = np.array([1.5, -0.75, 4.0])
COLORS = {"DDPM": "#0072B2", "DDIM": "#E69F00"}


@pytest.mark.parametrize(("t", "dt"), [(1.0, 0.001), (0.5, 0.2), (0.4, 0.399), (1.0, 1.0)])
def test_reverse_mean_by_bayes_rule(t, dt):
    """A sum over the noise up to t - dt, weighted by how well it explains x_t."""
    z = np.linspace(-9, 9, 2001)
    previous = A[:, None] + 2.0 * (t - dt) ** 0.5 * z
    for x_t in np.array([[1.5, -0.75, 0.0], [-2.0, 1.0, 3.0]]):
        weights = np.exp(-(z**2) / 2 - (x_t[:, None] - previous) ** 2 / (2 * 4.0 * dt))
        exact = (weights * previous).sum(axis=1) / weights.sum(axis=1)
        wrong = f"E[x_(t-dt) | x_t = {x_t}] for a = {A}, t = {t}, dt = {dt}"
        assert s.reverse_mean(x_t, t, dt, a=A) == pytest.approx(exact, abs=1e-9), wrong


def test_ddim_at_every_step():
    x_1 = 3 * rng().standard_normal((50, 3))
    for num_steps in (1, 2, 7, 200):
        steps = [x_1, *s.ddim(partial(s.reverse_mean, a=A), x_1, num_steps)]
        exact = [A + (k / num_steps) ** 0.5 * (x_1 - A) for k in range(num_steps, -1, -1)]
        np.testing.assert_allclose(steps, exact, rtol=0, atol=1e-13)
        exact = s.ddim_trajectory(x_1, s.times(num_steps), a=A)
        np.testing.assert_allclose(steps, exact, rtol=0, atol=1e-13)


def ddpm_mean_and_variance(x_1, k, num_steps, sigma_q):
    """Of x_t at t = k / num_steps: the noise of step j shrinks to k / j of itself, or stays."""
    shares = [(k / j) ** 2 for j in range(max(k, 1), num_steps)] if k else [1]
    return A + k / num_steps * (x_1 - A), sigma_q**2 / num_steps * sum(shares)


def test_ddpm_at_every_step():
    n, x_1 = 100_000, np.array([3.0, -1.0, 0.0])
    steps = s.ddpm(partial(s.reverse_mean, a=A), np.tile(x_1, (n, 1)), 5, 2.0, rng(1))
    for k, x_t in zip((4, 3, 2, 1, 0), steps):
        mean, variance = ddpm_mean_and_variance(x_1, k, 5, 2.0)
        assert (np.abs(x_t.mean(axis=0) - mean) < 5 * (variance / n) ** 0.5).all()
        assert (np.abs(x_t.var(axis=0) / variance - 1) < 5 * (2 / n) ** 0.5).all()


@pytest.mark.parametrize("num_steps", [1, 2, 30])
def test_ddpm_rms(num_steps):
    """The start is N(0, 4 I): |a|^2 + 12 shrinks by t^2, and the steps' noise comes to it."""
    law = s.ddpm_rms(num_steps, 2.0, a=A)
    for k in range(num_steps + 1):
        _, variance = ddpm_mean_and_variance(A, k, num_steps, 2.0)
        exact = (k / num_steps) ** 2 * (A @ A + 12) + 3 * variance
        assert law[num_steps - k] == pytest.approx(exact**0.5, rel=1e-12)


@pytest.mark.parametrize("code", ["A = [30.0, -7.0, 0.5, 2.0]", "A = (-2, 5)", "the page's"])
def test_the_truth_follows_the_data(code, tmp_path, monkeypatch, spy):
    """All of DDIM ends at the point, DDPM the last step's noise away: chi, d degrees of freedom."""
    monkeypatch.setattr(Figure, "savefig", lambda *_, **__: None)
    other = paste(s, snippet(s) if code == "the page's" else code)
    tables = spy(other, "table")
    other.main(["--num-samples", "500", "--num-steps", "10", "--figures-dir", str(tmp_path)])
    _, ddpm, ddim = tables[0].rows
    measured, se, exact = map(float, ddpm[1:])
    noise = np.linalg.norm(0.1**0.5 * rng().standard_normal((20_000, len(other.A))), axis=1)
    assert exact == pytest.approx((noise**2).mean() ** 0.5, rel=0.02)
    assert se == pytest.approx((noise**2).std() / 500**0.5 / (2 * exact), rel=0.05)
    assert abs(measured - exact) < 5 * se
    assert float(ddim[1]) < 1e-12


@pytest.mark.parametrize("code", ["A = 1.0", "A = [1.0]", "A = [1.0, np.nan]", "A = [1, [2]]"])
def test_what_is_no_point_is_refused(code, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        paste(s, code).main(["--figures-dir", str(tmp_path / "new")])
    assert "error: A: " in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def curves(ax, color):
    """The lines of a panel in that color, (n, 2) each."""
    return [line.get_xydata() for line in ax.lines if same_color(line.get_color(), color)]


def among(wanted, curves):
    return any(c.shape == wanted.shape and np.allclose(c, wanted) for c in curves)


def test_main(tmp_path, spy, monkeypatch):
    """What is drawn and printed is the paths' own; one sample is put off its line, at one step."""

    def slip(mean, x_1, num_steps, original=s.ddim):
        for k, x_t in enumerate(original(mean, x_1, num_steps)):
            yield x_t + ((k == 1) & (np.arange(len(x_t)) == 7))[:, None] * [3e-3, 4e-3]

    monkeypatch.setattr(s, "ddim", slip)
    monkeypatch.setattr(Figure, "savefig", lambda *_, **__: None)
    run, tables = spy(s, "paths"), spy(s, "table")
    planes, graphs = spy(s, "draw_paths"), spy(s, "draw_distances")
    flags = "--num-steps 4 --num-samples 5000 --a-x 1.5 --a-y -0.75 --sigma-q 2 --seed 3"
    s.main([*flags.split(), "--figures-dir", str(tmp_path)])
    faint = {**COLORS, "DDPM": "0.8"}
    a, t = A[:2], np.array([1, 0.75, 0.5, 0.25, 0])
    np.testing.assert_allclose(run[0].x_1, 2 * rng(3).standard_normal((5000, 2)))
    for plane, graph, name in zip(planes[0].result.axes, graphs[0].result.axes, COLORS):
        x_t, color = run[0].result[name], COLORS[name]
        r_t = np.linalg.norm(x_t - a, axis=2)
        assert graph.get_xlim()[0] > 1 > 0 > graph.get_xlim()[1]  # sampling runs to the right
        for j in range(12):
            assert among(x_t[:, j], curves(plane, color))
            assert among(np.stack([t, r_t[:, j]], 1), curves(graph, faint[name]))
        assert among(x_t[0, :12], curves(plane, "0.5"))
        assert among(x_t[-1, :12], curves(plane, color))
        assert among(a[None], curves(plane, "none"))
        if name == "DDIM":  # the exact line and distance, from x_1 to a
            assert among(np.array([x_t[0, 5], a]), curves(plane, "k"))
            fine = np.linspace(1, 0, 200)
            assert among(np.stack([fine, fine**0.5 * r_t[0, 5]], 1), curves(graph, "k"))
        else:
            rms = (r_t**2).mean(axis=1) ** 0.5
            assert among(np.stack([t, rms], 1), curves(graph, color))
            assert among(np.stack([t, s.ddpm_rms(4, 2.0, a=a)], 1), curves(graph, "k"))

    _, ddpm, ddim = tables[0].rows
    numbers = [rms[-1], 2 * 0.5**0.5 / (2 * 5000**0.5), 2 * 0.5**0.5]
    assert [float(x) for x in ddpm[1:]] == pytest.approx(numbers, abs=6e-5)
    assert float(ddim[1]) == 0.005
