"""Experiment 2 held to references that share no code with it."""

import math
from functools import partial
from statistics import NormalDist

import numpy as np
import pytest
import two_points as s
from matplotlib.colors import to_rgb
from matplotlib.quiver import Quiver

POINTS = np.array([[0.5, -1.0], [2.0, 1.5], [-1.0, 0.3]])
THREE = {"points": POINTS, "weights": np.array([0.2, 0.5, 0.3]), "sigma_q": 1.5}
TWO = {"points": POINTS[:2], "weights": np.array([0.3, 0.7]), "sigma_q": 1.5}
BLUE, ORANGE = "#0072B2", "#E69F00"


def parts(x, t, points, weights, sigma_q):
    """What each point brings to the density p_t(x), at one x."""
    variance = sigma_q**2 * t
    return [
        w * math.exp(-(math.dist(x, a) ** 2) / (2 * variance)) / (2 * math.pi * variance)
        for a, w in zip(points, weights)
    ]


@pytest.mark.parametrize("t", [0.05, 0.4, 1.0])
def test_posterior(t):
    x_t = 2 * np.random.default_rng(1).standard_normal((20, 2))
    want = [np.array(parts(x, t, **THREE)) / sum(parts(x, t, **THREE)) for x in x_t]
    np.testing.assert_allclose(s.posterior(x_t, t, **THREE), want, atol=1e-12)
    far = np.array([[900.0, 800.0], [0.5, -1.1]])
    assert s.posterior(far, 1e-6, **THREE).tolist() == [[0, 1, 0], [1, 0, 0]]


@pytest.mark.parametrize("dt", [0.1, 0.4])
def test_reverse_mean_by_the_score(dt):
    """E[x_{t-dt} | x_t] = x_t + sigma_q^2 dt grad log p_t, by differences of the density."""
    t, h = 0.4, 1e-5
    for x in np.random.default_rng(3).standard_normal((5, 2)):
        score = [
            math.log(sum(parts(x + step, t, **THREE)) / sum(parts(x - step, t, **THREE))) / (2 * h)
            for step in h * np.eye(2)
        ]
        step = s.reverse_mean(x[None], t, dt, **THREE)[0] - x
        np.testing.assert_allclose(step, 1.5**2 * dt * np.array(score), atol=1e-7)


def test_in_noise_the_arrows_point_between_the_points():
    """Not to the mean: at t = 1 the places they point to have two thirds of the data's spread."""
    data = {"points": s.POINTS, "weights": np.array([0.8, 0.2]), "sigma_q": 2}
    x_1 = s.noisy(100_000, np.random.default_rng(6), **data)
    mean, variance = -0.6 * s.POINTS[1], 4 + 0.64 * s.POINTS[1] ** 2
    assert (np.abs(x_1.mean(axis=0) - mean) < 5 * (variance / 100_000) ** 0.5).all()
    assert (np.abs(x_1.var(axis=0) / variance - 1) < 5 * (2 / 100_000) ** 0.5).all()
    spread = np.hypot(*(s.reverse_mean(x_1, 1, 1, **data) - mean).T)
    assert (spread**2).mean() ** 0.5 == pytest.approx(0.94, abs=0.005)
    assert 0.8 * np.hypot(*s.POINTS[1]) == pytest.approx(1.44, abs=0.005)  # of the data


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


def look_at_backdrop(ax, t, side):
    """The shade, the stars and the border, of TWO at time t."""
    shade, ticks = ax.images[0].get_array(), np.linspace(-side, side, 200)
    assert [*ax.images[0].get_extent()] == [-side, side, -side, side]
    assert ax.images[0].origin == "lower"
    for row, column in ((20, 30), (100, 140), (180, 110)):
        p = np.array(parts((ticks[column], ticks[row]), t, **TWO))
        color = p / p.sum() @ [to_rgb(BLUE), to_rgb(ORANGE)]
        np.testing.assert_allclose(shade[row, column], 1 - 0.35 * (1 - color))
    lines = {line.get_label(): line for line in ax.lines}
    for i, color in ((1, BLUE), (2, ORANGE)):
        star = lines[f"$a_{i}$; shade: $p(x_0 = a_{i} | x_t)$"]
        assert star.get_xydata().tolist() == [POINTS[i - 1].tolist()]
        assert star.get_color() == color
    axis = (POINTS[1] - POINTS[0]) / math.dist(*POINTS[:2])
    assert lines["border at this $t$"].get_xydata() @ axis == pytest.approx(s.border(t, **TWO))


def test_trajectories():
    """With reverse means that are none: steps to the right, or up."""
    moves = np.array([[1.0, 0.0], [0.0, 1.0]])
    x_1 = 3 * np.random.default_rng(8).standard_normal((6, 2))
    right, up = (lambda x_t, t, dt, move=move: x_t + move for move in moves)
    axes = s.draw_trajectories(right, up, x_1, 2, **TWO).axes
    to_first = (x_1 @ (POINTS[1] - POINTS[0]) / math.dist(*POINTS[:2])) < s.border(1, **TWO)
    assert 0 < to_first.sum() < 6
    for ax, how, move in zip(axes, ("by the posterior", "plainly"), moves):
        assert ax.get_title() == f"DDIM, averaged {how} (backdrop: $t$ = 1)"
        middle = x_1 + move * 2**0.5 / (1 + 2**0.5)
        paths = np.stack([x_1, middle, middle + move], axis=1)
        for color, own in ((BLUE, paths[to_first]), (ORANGE, paths[~to_first])):
            lines = [x for x in ax.lines if x.get_color() == color and len(x.get_xdata()) == 3]
            np.testing.assert_allclose([line.get_xydata() for line in lines], own)
        lines = {line.get_label(): line for line in ax.lines}
        assert lines["the ODE goes to $a_1$"].get_color() == BLUE
        assert lines["the ODE goes to $a_2$"].get_color() == ORANGE
        np.testing.assert_array_equal(lines["$x_1$"].get_xydata(), x_1)
        np.testing.assert_allclose(lines["$x_0$"].get_xydata(), paths[:, -1])
        look_at_backdrop(ax, 1, 1.05 * max(np.abs(x_1).max(), 2))


def test_directions():
    for ax, t, sigma_t in zip(
        s.draw_directions(**TWO).axes, (1, 0.3, 0.03), ("1.5", "0.82", "0.26")
    ):
        assert ax.get_title() == rf"$t$ = {t:g}: $\sigma_t$ = {sigma_t}"
        (arrows,) = (x for x in ax.collections if isinstance(x, Quiver))
        assert (arrows.scale, arrows.scale_units, arrows.angles) == (8, "xy", "xy")
        for k in (3, 77, 160):
            x = np.array([arrows.X[k], arrows.Y[k]])
            p = np.array(parts(x, t, **TWO))
            want = p / p.sum() @ TWO["points"] - x
            np.testing.assert_allclose([arrows.U[k], arrows.V[k]], want)
        assert ax.lines[0].get_label() == "$(E[x_0|x_t] - x_t)/8$"
        look_at_backdrop(ax, t, 4)


def test_main(tmp_path, monkeypatch):
    calls, drawn, printed = [], [], []

    def spy(mean, x_1, num_steps, label, original=s.sample):
        calls.append((mean, x_1, num_steps, original(mean, x_1, num_steps, label)))
        return calls[-1][-1]

    def spy_on_figure(*args, original=s.draw_trajectories, **data):
        drawn.extend(args)
        return original(*args, **data)

    monkeypatch.setattr(s, "sample", spy)
    monkeypatch.setattr(s, "draw_trajectories", spy_on_figure)
    monkeypatch.setattr(s, "table", printed.extend)
    s.main(f"--figures-dir {tmp_path} --num-steps 20 --sigma-q 4 --weight 0.7".split())
    (bayes, p_1, steps, _), (again, base, _, _), (plain, same, _, _) = calls
    assert steps == 20
    assert bayes is again
    assert base is same
    assert (bayes.func, plain.func) == (s.reverse_mean, s.plain_mean)
    assert bayes.keywords["sigma_q"] == 4
    for mean in (bayes, plain):
        assert mean.keywords["weights"] == pytest.approx([0.7, 0.3])
        assert mean.keywords["points"] is s.POINTS
    assert drawn[:2] == [bayes, plain]
    assert drawn[3] == 20
    np.testing.assert_array_equal(drawn[2], base[:40])
    for x_1, mean, variance in [(base, 0, 16), (p_1, -0.4 * 1.5, 16 + 0.84 * 1.5**2)]:
        assert x_1[:, 0].mean() == pytest.approx(mean, abs=5 * (variance / 10_000) ** 0.5)
        assert x_1[:, 0].var() == pytest.approx(variance, rel=5 * (2 / 10_000) ** 0.5)
    files = {"experiment-2-sample-trajectories-ddim.jpg", "velocity-field.jpg"}
    assert {path.name for path in tmp_path.iterdir()} == files

    heads = ["samples from", "nearer to a_1", "s.e.", "exact", "mean distance to twins"]
    assert printed[0] == heads
    names = ["p_1", "the base", "the base, averaged plainly"]
    cut = s.border(1, **bayes.keywords)
    of_base = NormalDist(0, 4).cdf(cut)
    axis = s.POINTS[1] / np.linalg.norm(s.POINTS[1])
    for name, exact, row, (_, x_1, _, x_0) in zip(
        names, (0.7, of_base, of_base), printed[1:], calls
    ):
        ends = np.where((x_1 @ axis < cut)[:, None], s.POINTS[0], s.POINTS[1])
        share, se = (x_0 @ axis < 0).mean(), (exact * (1 - exact) / 10_000) ** 0.5
        apart = np.hypot(*(x_0 - ends).T).mean()
        assert row == [name, f"{share:.4f}", f"{se:.4f}", f"{exact:.4f}", f"{apart:.2g}"]
        assert len(set(row)) == 5
        assert name == names[2] or abs(share - exact) < 5 * se  # of samples by DDIM
