"""Experiment 6 held to Bayes' rule one number at a time, to draws, and to ranks."""

import math
import re
from functools import partial
from statistics import NormalDist

import ddim_as_flow as s
import numpy as np
import pytest
from conftest import paste, rng, snippet
from matplotlib.colors import to_hex
from matplotlib.figure import Figure


def close(got, want, hint, **tolerance):
    assert got is not None, hint
    assert np.allclose(got, want, **{"rtol": 1e-9, "atol": 1e-9, **tolerance}), hint


def bayes(x, alpha, beta, points, weights):
    """E[x_0 | x] for one x, (d,): every density written out."""
    logs = [math.log(w) - sum((x - alpha * a) ** 2) / 2 / beta**2 for a, w in zip(points, weights)]
    odds = [math.exp(log - max(logs)) for log in logs]
    return sum(o * a for o, a in zip(odds, points)) / sum(odds)


def left_of(x, sigma, points, weights):
    """P(x_0 + N(0, sigma^2) < x) for each of x, (n, 1): a mixture's distribution function."""
    return [sum(w * NormalDist(a, sigma).cdf(y) for w, (a,) in zip(weights, points)) for (y,) in x]


def test_velocity_is_the_mean_over_lines():
    """E[x_0 - x_1 | x_t], counted among draws of the lines that pass near x."""
    n, t, x, points, weights = 400_000, 0.4, 0.3, [[-1.1], [1.1]], [0.8, 0.2]
    x_0 = rng(2).choice(np.ravel(points), n, p=weights)
    x_1 = x_0 + 2 * rng(3).standard_normal(n)
    near = (x_0 - x_1)[abs(t * x_1 + (1 - t) * x_0 - x) < 0.02]
    error = near.std() / len(near) ** 0.5
    mean = bayes(np.array([x]), 1, 2 * t, np.array(points), weights)
    got = s.velocity(np.array([[x]]), t, denoiser=lambda x_t, t: mean)
    close(
        got, near.mean(), "velocity: E[x_0 - x_1 | x_t] = (E[x_0 | x_t] - x_t) / t", atol=5 * error
    )


def test_sample_on_a_point_mass():
    """To a point mass at a, x - alpha a shrinks as beta does: after every step."""
    x_1, a, t = np.array([[3.0], [-1.0]]), 0.5, np.array([1, 0.7, 0.4, 0.1, 0])
    runs = s.sample(lambda x, alpha, beta: np.full_like(x, a), x_1, 1 - t, 2 * t)
    hint = "sample: alpha_r E[x_0 | x] + beta_r noise, where x = alpha E[x_0 | x] + beta noise"
    close(runs and [*runs], [(1 - r) * a + r * x_1 for r in t[1:]], hint)


OTHER_DATA = {
    "the script's": "DATA = {'points': np.array([[-1.1], [1.1]]), 'weights': np.array([0.8, 0.2])}",
    "the page's": snippet(s),
    "on a line": "DATA = {'points': [[-9e3], [20.5], [29.0]], 'weights': [0.2, 0.5, 0.3]}",
    "in the plane": "DATA = {'points': [[9, 0], [0, 9], [5, 5]], 'weights': [0.1, 0.3, 0.6]}",
}


@pytest.mark.parametrize("code", OTHER_DATA.values(), ids=OTHER_DATA)
def test_the_truth_follows_the_data(code):
    """Denoiser, starts and solution; then each run, step by step, of this test's own recursion."""
    m, sigma_q, u = paste(s, code), 3.0, np.array([0.01, 0.3, 0.55, 0.78, 0.9])
    points, weights = (np.array(m.DATA[name], float) for name in ("points", "weights"))
    known, d = partial(m.denoiser, **m.DATA), points.shape[1]
    x_1 = m.start_at(u, sigma_q, **m.DATA)
    for alpha, beta in [(1, 2.0), (0.3, 0.9), (0.9, 0.05)]:
        want = [bayes(x, alpha, beta, points, weights) for x in alpha * x_1]
        close(known(alpha * x_1, alpha, beta), want, "denoiser: E[x_0 | alpha x_0 + beta N(0, I)]")
    if d == 1:
        close(left_of(x_1, sigma_q, points, weights), u, "start_at: the u-quantiles")
    else:
        x, mean = m.start_at(np.linspace(0, 1, 4000), sigma_q, **m.DATA), weights @ points
        spread = weights @ ((points - mean) ** 2).sum(axis=1) + d * sigma_q**2
        close(x.mean(axis=0), mean, "start_at: p_1", atol=5 * (spread / 4000) ** 0.5)
        close(((x - mean) ** 2).sum(axis=1).mean(), spread, "start_at: p_1", rtol=0.1)

    middles = np.array([0.6, 0.2])
    levels = [1, *np.ravel([[1.01 * r, r, 0.99 * r] for r in middles]), 0]
    path = m.ode_path(known, x_1, sigma_q * np.array(levels))
    close(path[0], x_1, "ode_path: from the starts")
    for sigma, above, x, below in zip(sigma_q * middles, path[1::3], path[2::3], path[3::3]):
        slope = [(y - bayes(y, 1, sigma, points, weights)) / sigma for y in x]
        hint = "ode_path: dx/dsigma is (x - E[x_0 | x]) / sigma"
        close((above - below) / (0.02 * sigma), slope, hint, rtol=0.01, atol=0.01)
        if d == 1:
            close(left_of(x, sigma, points, weights), u, "ode_path: it keeps its rank", atol=1e-5)
    off = np.linalg.norm(path[-1][:, None] - points, axis=2).min(axis=1)
    close(off, 0, "ode_path: ends at a point of the data", atol=1e-5)

    def recursion(levels):
        """x_r = D + (sigma_r / sigma) (x - D) on these levels, from x_1 on."""
        path = [x_1]
        for sigma, next_sigma in zip(levels, levels[1:]):
            mean = np.array([bayes(x, 1, sigma, points, weights) for x in path[-1]])
            path.append(mean + next_sigma / sigma * (path[-1] - mean))
        return path

    even = np.arange(4, -1, -1) / 4
    want = recursion(sigma_q * even**0.5)
    for name, x in m.trajectories(known, x_1, 4, sigma_q).items():
        close(x, want, f"{name}: x_r = D + (sigma_r / sigma) (x - D) on DDIM's levels")
    equal = m.on_equal_levels(known, x_1, 4, sigma_q)
    for name, (levels, x) in m.on_even_steps(known, x_1, 4, sigma_q).items():
        close(equal[name], want, f"{name}: in units of alpha, DDIM's trajectory")
        close(x, recursion(levels), f"{name}: on its own levels, too")
        close(levels[0], sigma_q, f"{name}: from the level sigma_q")
        _, _, clock = m.schedules(sigma_q)[name]
        close(clock(levels) / clock(sigma_q), even, f"{name}: even steps of its time")


def test_data_that_it_cannot_do(capsys):
    for data in (
        "[1.0, 2.0], 'weights': [0.5, 0.5]",
        "[[1.0, 2.0], [3.0]], 'weights': [0.5, 0.5]",
        "np.zeros((0, 2)), 'weights': []",
        "[[1.0], [2.0]], 'weights': [0.9, 0.2]",
        "[[1.0], [2.0]], 'weights': [np.nan, 1.0]",
    ):
        with pytest.raises(SystemExit, match="2"):
            paste(s, f"DATA = {{'points': {data}}}").main([])
        assert "DATA" in capsys.readouterr().err.splitlines()[-1]


def test_schedules_are_those_of_the_text():
    """Draws as the text has them: slope in x_0, standard deviation of the rest; and the clocks.

    Variance preserving: eq. (74) in small steps; Ho et al. (2020): 1e-4 to .02 in 1000 steps.
    """
    n, t = 200_000, 0.3
    x_0, noise = 2 * rng(0).standard_normal(n), 3 * rng(1).standard_normal(n)
    kept, variance = 1.0, 0.0
    for rate in np.linspace(0.1, 20, 100_000)[:30_000] / 100_000:
        kept, variance = (1 - rate) ** 0.5 * kept, (1 - rate) * variance + rate
    for name, x_t in {
        "DDIM": x_0 + t**0.5 * noise,
        "linear flow": t * (x_0 + noise) + (1 - t) * x_0,
        "rectified flow": t * noise + (1 - t) * x_0,
        "variance preserving": kept * x_0 + variance**0.5 * noise / 3,
    }.items():
        alpha, beta, clock = s.schedules(3.0)[name]
        slope = (x_t @ x_0) / (x_0 @ x_0)
        assert alpha(t) == pytest.approx(slope, abs=5 * 1.5 / n**0.5), name
        assert beta(t) == pytest.approx((x_t - slope * x_0).std(), rel=5 / (2 * n) ** 0.5), name
        assert clock(beta(t) / alpha(t)) == pytest.approx(t), name


def drawn(ax, color, marks=True):
    """What is drawn in this color, as marks or as lines: (number, points, 2)."""
    lines = [line for line in ax.lines if to_hex(line.get_color()) == color.lower()]
    return np.array([x.get_xydata() for x in lines if (x.get_linestyle() == "None") == marks])


def curves(at, paths):
    """Each path, the first coordinate of paths (m, n, d), against at: (n, m, 2)."""
    return [np.stack([at, x], axis=1) for x in paths[..., 0].T]


def test_drawn_trajectories():
    """Two starts in the plane, three steps, sigma_q = 5. Every number differs from every other."""
    t, fine, exact = np.array([1, 2 / 3, 1 / 3, 0]), np.linspace(1, 0, 6), rng().random((6, 2, 2))
    paths = dict(zip(("DDIM", "linear flow"), 2 + rng(1).random((2, 4, 2, 2))))
    own, equal = s.draw_trajectories(paths, exact, 5.0).axes
    for name, color, power in ("DDIM", s.ORANGE, 1), ("linear flow", s.SKY, 1 / 2):
        path, own_t, own_fine = paths[name], t**power, fine ** (2 * power)
        close(drawn(own, color), curves(own_t, path), f"{name} against its own time")
        close(drawn(own, color, marks=False), curves(own_fine, exact), f"{name}'s solution")
        close(drawn(equal, color), curves(5 * t**0.5, path), f"{name} against the noise level")
    close(drawn(equal, to_hex("0.6"), marks=False), curves(5 * fine, exact), "the solution")
    for ax in (own, equal):
        close(drawn(ax, "#000000")[0], [[0, -1.1], [0, 1.1]], "the data, at t = 0")
        assert ax.xaxis_inverted()  # from noise to data


def test_drawn_schedules():
    found = {name: tuple(rng(k).random((2, 3))) for k, name in enumerate(s.STYLES)}
    grids, errors = s.draw_schedules(found, 17).axes
    labels = dict(zip(grids.get_yticks(), [x.get_text() for x in grids.get_yticklabels()]))
    named = dict(zip([to_hex(x.get_color()) for x in errors.lines], errors.lines))
    for name, (levels, rms) in found.items():
        color = s.STYLES[name]["color"]
        (marks,), (line,) = drawn(grids, color), [named[color.lower()].get_xydata()]
        close(marks[:, 0], levels, "its levels")
        close(line.T, [levels, rms], "its errors against its levels")
        assert {labels[y] for y in marks[:, 1]} == {named[color.lower()].get_label()}
    assert grids.xaxis_inverted()  # from noise to data


def test_main(tmp_path, monkeypatch, spy, capsys):
    """Starts and twins, what is printed and what is drawn; then the page's data."""
    names = ("on_even_steps", "draw_trajectories", "draw_schedules")
    calls = {name: spy(s, name) for name in names}

    def shifted(known, x_1, *args):
        return {"a": s.trajectories(known, x_1, *args)["DDIM"] + 0.25 * (x_1 == x_1.max())}

    monkeypatch.setattr(s, "on_equal_levels", shifted)
    monkeypatch.setattr(Figure, "savefig", lambda *_, **__: None)
    small = f"--figures-dir {tmp_path} --num-steps 4 --num-samples 20 --sigma-q 3".split()
    s.main(small)
    (run,), (sketch,), (errors,) = calls.values()
    ranks = left_of(run.x_1, 3.0, **s.DATA)
    close(ranks, (np.arange(20) + 0.5) / 20, "main: starts at the quantiles of p_1")
    assert (run.num_steps, run.sigma_q, errors.num_steps, sketch.sigma_q) == (4, 3.0, 4, 3.0)
    numbers = []
    for name, (levels, x) in run.result.items():
        off = ((x - s.ode_path(run.denoiser, run.x_1, levels)) ** 2).sum(axis=2).mean(axis=1)
        close(errors.found[name], [levels, off**0.5], "main: levels, and RMS distances to twins")
        numbers += [f"{levels[-2]:.3f}", f"{max(off) ** 0.5:.3g}"]
    first, _, *table, _ = capsys.readouterr().out.splitlines()
    assert float(first.split()[-1]) == 0.25
    assert re.findall(r"\d\.\d+", "\n".join(table)) == numbers

    few, known = sketch.paths["DDIM"][0], partial(s.denoiser, **s.DATA)
    for name, path in s.trajectories(known, few, 4, 3.0).items():
        close(sketch.paths[name], path, "main: the sampler's own path is drawn")
    levels = 3 * np.linspace(1, 0, len(sketch.solution))
    close(sketch.solution, s.ode_path(known, few, levels), "main: the solution at even levels")

    paste(s, snippet(s)).main(small)
