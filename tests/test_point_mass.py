"""Experiment 1 held to references that share no code with it."""

from functools import partial

import numpy as np
import point_mass as s
import pytest

A = np.array([1.5, -0.75])
BLUE, ORANGE = "#0072B2", "#E69F00"


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
def test_ddpm_rms(num_steps):
    """The start is N(0, 4 I): |a|^2 + 8 shrinks by t^2, and the steps' noise comes to it."""
    law = s.ddpm_rms(num_steps, 2.0, a=A)
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


def test_figures():
    """Of paths that are no sampler's: each line is its own path, in its own panel and color."""
    paths = {"DDPM": rng(1).standard_normal((5, 20, 2)), "DDIM": rng(2).standard_normal((5, 20, 2))}
    t, law = np.array([1, 0.75, 0.5, 0.25, 0]), np.array([9.0, 7.0, 6.0, 2.0, 1.0])
    planes, graphs = s.draw_paths(paths, A).axes, s.draw_distances(paths, law, A).axes
    for plane, graph, name, color in zip(planes, graphs, paths, (BLUE, ORANGE)):
        assert plane.get_title() == graph.get_title() == f"{name}, steps: 4"
        assert graph.get_xlim()[0] > 1 > 0 > graph.get_xlim()[1]  # sampling runs to the right
        assert graph.lines[0].get_label() == "samples"
        for j in range(12):
            x_t = paths[name][:, j]
            r_t = np.hypot(*(x_t - A).T)
            assert plane.lines[j].get_color() == color
            np.testing.assert_array_equal(plane.lines[j].get_xydata(), x_t)
            np.testing.assert_allclose(graph.lines[j].get_xydata().T, [t, r_t])
            if name == "DDIM":  # the exact line and distance, from x_1 to a
                np.testing.assert_allclose(plane.lines[12 + j].get_xydata(), [x_t[0], A])
                fine, exact = graph.lines[12 + j].get_xydata().T
                assert (fine[0], fine[-1]) == (1, 0)
                np.testing.assert_allclose(exact, fine**0.5 * r_t[0])
        starts, ends, star = plane.lines[-3:]  # above all others
        assert starts.get_label() == "$x_1$, draws of the base"
        assert (ends.get_label(), ends.get_color()) == (f"$x_0$, {name}", color)
        assert star.get_label() == "$a$, all of the data"
        for line, points in [(starts, paths[name][0]), (ends, paths[name][-1]), (star, [A])]:
            np.testing.assert_array_equal(line.get_xydata(), points[:12])
    assert (graphs[0].get_xlabel(), graphs[0].get_ylabel()) == ("$t$", "$|x_t - a|$")
    assert planes[1].lines[12].get_label() == r"exact: $a + \sqrt{t}\,(x_1 - a)$"
    assert graphs[1].lines[12].get_label() == r"exact: $\sqrt{t}\,|x_1 - a|$"
    rms = np.hypot(*(paths["DDPM"] - A).T).T
    for line, label, values in [
        (graphs[0].lines[12], "root mean square of all", (rms**2).mean(axis=1) ** 0.5),
        (graphs[0].lines[13], "exact root mean square", law),
    ]:
        assert line.get_label() == label
        np.testing.assert_allclose(line.get_xydata().T, [t, values])


def test_main(tmp_path, capsys, monkeypatch):
    calls, printed, drawn = [], [], []

    def spy(x_1, num_steps, sigma_q, rng, *, a, original=s.sample):
        paths = original(x_1, num_steps, sigma_q, rng, a=a)
        paths["DDIM"][2, 7] += (3e-3, 4e-3)  # one sample, at one step
        calls.append((x_1, num_steps, sigma_q, a, paths))
        return paths

    def spy_on_figure(*args, original=s.draw_distances):
        drawn.extend(args)
        return original(*args)

    monkeypatch.setattr(s, "sample", spy)
    monkeypatch.setattr(s, "draw_distances", spy_on_figure)
    monkeypatch.setattr(s, "table", printed.extend)
    flags = "--num-steps 4 --num-samples 10_000 --a-x 1.5 --a-y -0.75 --sigma-q 2"
    s.main([*flags.split(), "--figures-dir", str(tmp_path)])
    ((x_1, num_steps, sigma_q, a, paths),) = calls
    assert (num_steps, sigma_q, *a) == (4, 2, 1.5, -0.75)
    assert x_1.std() == pytest.approx(2, rel=0.03)
    assert abs(x_1.mean()) < 5 * 2 / 20_000**0.5
    assert all(np.array_equal(x_t[0], x_1) for x_t in paths.values())
    assert drawn[0] is paths
    np.testing.assert_array_equal(drawn[1], s.ddpm_rms(4, 2, a=A))
    names = {"sample-trajectories-ddim", "distance-vs-time"}
    assert {path.stem for path in tmp_path.iterdir()} == {f"experiment-1-{name}" for name in names}

    line = "data a = (1.5, -0.75), base N(0, 2^2 I), samples of each sampler: 10000, steps: 4"
    assert capsys.readouterr().out.splitlines()[0] == line
    heads, (ddpm, rms, se, law), (ddim, error, none, zero) = printed
    assert heads == ["", "measured", "s.e.", "exact"]
    assert (ddpm[:4], ddim[:4], none, zero) == ("DDPM", "DDIM", "", "0")
    squares = ((paths["DDPM"][-1] - A) ** 2).sum(axis=1)
    assert float(rms) == pytest.approx(squares.mean() ** 0.5, abs=1e-4)
    assert float(law) == pytest.approx(2 * (2 / 4) ** 0.5, abs=1e-4)
    assert 0 < abs(float(rms) - float(law)) < 5 * float(se)
    assert float(se) == pytest.approx(squares.std() / 100 / (2 * squares.mean() ** 0.5), rel=0.05)
    assert float(error) == pytest.approx(5e-3, rel=0.01)


def test_table(capsys):
    s.table([["", "a", "long"], ["first", "1.25", "2"]])
    assert capsys.readouterr().out == "          a  long\nfirst  1.25     2\n"
