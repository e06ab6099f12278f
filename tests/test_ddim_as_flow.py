"""Experiment 6 held to references that share no code with it."""

import math
from functools import partial
from statistics import NormalDist
from types import SimpleNamespace

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
    np.testing.assert_array_equal(paths["flow, grid sqrt(t)"], equal["linear flow, Pseudocode 5"])
    assert len(equal) == 5
    for x in (paths["DDIM"], *equal.values()):
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


def test_drawn_trajectories():
    """Two starts, three steps, sigma_q = 5. Every number differs from every other."""
    names = ("DDIM", "flow, grid sqrt(t)", "flow, even grid")
    paths = dict(zip(names, np.arange(24.0).reshape(3, 4, 2, 1)))
    fig = s.draw_trajectories(paths, lambda sigma: np.array([[100 + sigma], [300 - sigma]]), 5.0)
    own, equal = fig.axes
    assert (own.get_xlabel(), equal.get_xlabel()) == ("$t$", r"noise level $\sigma$")
    assert (own.get_title()[:12], equal.get_title()[-11:]) == ("Each on its ", "equal noise")
    t = np.array([1, 1, 2 / 3, 2 / 3, 1 / 3, 1 / 3, 0, 0])
    even, root, data = "linear flow, even grid", r"linear flow, grid $\sqrt{t}$", "the data"
    for ax, want in [
        (own, {"DDIM": (t, 0), even: (t, 16)}),
        (equal, {"DDIM": (5 * t**0.5, 0), even: (5 * t, 16), root: (5 * t**0.5, 8)}),
    ]:
        assert ax.xaxis_inverted()  # from noise to data
        lines = {x.get_label(): x for x in ax.lines}
        np.testing.assert_array_equal(lines[data].get_xydata(), [[0, -1.1], [0, 1.1]])
        for name, (x, first) in want.items():
            got = lines[name].get_xydata()
            np.testing.assert_allclose(got, np.stack([x, first + np.arange(8)], axis=1))
            assert lines[name].get_color() == (s.ORANGE if name == "DDIM" else s.SKY)
    assert set(lines) >= {*want, data, "lines: the ODE's solution"}
    for (down, up), noise, color in [
        (own.lines[:2], lambda t: 5 * t**0.5, s.ORANGE),
        (own.lines[2:4], lambda t: 5 * t, s.SKY),
        (equal.lines[:2], lambda sigma: sigma, "0.6"),
    ]:
        assert down.get_color() == up.get_color() == color
        np.testing.assert_allclose(down.get_ydata(), 100 + noise(down.get_xdata()))
        np.testing.assert_allclose(up.get_ydata(), 300 - noise(up.get_xdata()))


def test_drawn_schedules():
    found = {
        name: (np.array([9, k + 1, 0]), np.array([0, 7 + k, k])) for k, name in enumerate(s.STYLES)
    }
    rows, errors = s.draw_schedules(found, 17).axes
    assert rows.get_title().endswith("time: 17")
    labels = {y: label.get_text() for y, label in zip(rows.get_yticks(), rows.get_yticklabels())}
    for (name, (levels, rms)), row, line in zip(found.items(), rows.lines, errors.lines):
        np.testing.assert_array_equal(row.get_xdata(), levels)
        np.testing.assert_array_equal(line.get_xydata(), np.stack([levels, rms], axis=1))
        assert [labels[y] for y in row.get_ydata()] == 3 * [name]
        assert line.get_label() == name
        assert line.get_color() == row.get_color() == s.STYLES[name]["color"]
    assert (errors.get_ylabel(), errors.get_title()[:9]) == (
        "RMS distance to the twins",
        "The error",
    )
    for ax in (rows, errors):
        assert ax.xaxis_inverted()
        assert ax.get_xlabel() == r"noise level $\sigma$"


def test_main(tmp_path, monkeypatch):
    """Starts and twins, what is printed and what is drawn, with measurements that all differ."""
    calls, tables, saved = [], [], {}
    found = {
        "c": (np.array([3, 2, 1.5, 0.7, 0]), np.array([0, 5, 6, 4, 1.0])),
        "d": (np.array([3, 1, 0.8, 0.2, 0]), np.array([0, 2, 8, 9, 7.0])),
    }

    def equal(known, x_1, *args):
        calls.append((known, x_1, *args))
        ddim = s.trajectories(known, x_1, *args)["DDIM"]
        return {"a": ddim + 0.03, "b": ddim - 0.5 * (ddim == ddim.max())}

    def even(known, x_1, twins, *args):
        calls.append((known, x_1, *args))
        calls.append((known, twins(3.0), *args))
        return found

    def draw(name, *args):
        return SimpleNamespace(savefig=lambda path, dpi: saved.update({path.stem: (name, args)}))

    monkeypatch.setattr(s, "on_equal_levels", equal)
    monkeypatch.setattr(s, "on_even_steps", even)
    monkeypatch.setattr(s, "table", tables.append)
    for name in ("draw_trajectories", "draw_schedules"):
        monkeypatch.setattr(s, name, partial(draw, name))
    s.main(f"--figures-dir {tmp_path} --num-steps 4 --num-samples 20 --sigma-q 3".split())

    for known, x_1, num_steps, sigma_q in calls:
        assert (num_steps, sigma_q) == (4, 3.0)
        ranks = [left_of(y, 3.0, **s.DATA) for y in x_1[:, 0]]
        np.testing.assert_allclose(ranks, (np.arange(20) + 0.5) / 20, atol=1e-5)
        assert known(x_1[:1], 0.5, 2)[0] == pytest.approx(mean_x_0(x_1[0], 0.5, 2, **s.DATA))
    assert tables == [
        [
            ["DDIM's noise levels, steps: 4", "x / alpha, farthest from Algorithm 2's"],
            ["a", "3.0e-02"],
            ["b", "5.0e-01"],
        ],
        [
            ["even steps of its own time: 4", "last level > 0", "largest RMS to twins"],
            ["c", "0.700", "6"],
            ["d", "0.200", "9"],
        ],
    ]
    assert saved["schedules"] == ("draw_schedules", (found, 4))
    drawn, (paths, twins, sigma_q) = saved["same-trajectories"]
    assert (drawn, sigma_q) == ("draw_trajectories", 3.0)
    np.testing.assert_equal(paths, s.trajectories(known, twins(3.0), 4, 3.0))
    ranks = [[left_of(y, sigma, **s.DATA) for y in twins(sigma)[:, 0]] for sigma in (0.5, 3.0)]
    np.testing.assert_allclose(*ranks, atol=1e-4)
