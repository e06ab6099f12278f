"""Experiment 2 held to references that share no code with it."""

import math
from functools import partial
from statistics import NormalDist

import numpy as np
import pytest
import two_points as s
from conftest import paste, rng, snippet
from matplotlib.colors import same_color, to_rgb
from matplotlib.figure import Figure
from matplotlib.quiver import Quiver

PLACES = np.array([[0.5, -1.0], [2.0, 1.5], [-1.0, 0.3]])
THREE = s.Data(PLACES, np.array([0.2, 0.5, 0.3]), 1.5)
TWO = s.Data(PLACES[:2], np.array([0.3, 0.7]), 1.5)
HUES = ["#0072B2", "#E69F00", "#CC79A7"]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(Figure, "savefig", lambda *_, **__: None)
    monkeypatch.setattr(s, "GRID", 21)


def parts(x, t, data):
    """What each point brings to the density p_t(x), at one x, but for a factor."""
    squares = np.array([math.dist(x, a) ** 2 for a in data.points])
    return data.weights * np.exp(-squares / (2 * data.sigma_q**2 * t))


@pytest.mark.parametrize("t", [0.05, 0.4, 1.0])
def test_posterior(t):
    x_t = 2 * rng(1).standard_normal((20, 2))
    want = [parts(x, t, THREE) / sum(parts(x, t, THREE)) for x in x_t]
    wrong = "p(x_0 = a_i | x_t) is not w_i N(x_t; a_i, sigma_q^2 t), over their sum"
    assert s.posterior(x_t, t, **vars(THREE)) == pytest.approx(np.array(want), abs=1e-12), wrong
    far = np.array([[900.0, 800.0], [0.5, -1.1]])
    assert s.posterior(far, 1e-6, **vars(THREE)).tolist() == [[0, 1, 0], [1, 0, 0]]


@pytest.mark.parametrize("dt", [0.1, 0.4])
def test_reverse_mean_by_the_score(dt):
    """E[x_{t-dt} | x_t] = x_t + sigma_q^2 dt grad log p_t, by differences of the density."""
    t, h = 0.4, 1e-5
    for x in rng(3).standard_normal((5, 2)):
        score = [
            math.log(sum(parts(x + e, t, THREE)) / sum(parts(x - e, t, THREE))) / (2 * h)
            for e in h * np.eye(2)
        ]
        step = s.reverse_mean(x[None], t, dt, **vars(THREE))[0] - x
        np.testing.assert_allclose(step, 1.5**2 * dt * np.array(score), atol=1e-7)


def test_ddim_averaged_plainly_runs_straight_to_the_mean():
    """As to a point mass (experiment 1), by the factor sqrt(t), after every step."""
    x_1, mean = rng(4).standard_normal((10, 2)), np.array([0.8, 0.64])
    plain = partial(s.plain_mean, points=PLACES, weights=THREE.weights)
    for k, x_t in zip((6, 5, 4, 3, 2, 1, 0), s.ddim(plain, x_1, 7)):
        np.testing.assert_allclose(x_t, mean + (k / 7) ** 0.5 * (x_1 - mean), atol=1e-13)
    assert k == 0


def test_no_trajectory_crosses_the_border():
    """DDIM with small steps, from both sides of the border: after every step, and at the end."""
    axis = (PLACES[1] - PLACES[0]) / math.dist(*PLACES[:2])
    start = s.border(1, TWO) * axis + np.outer([-2, 0, 3], [-axis[1], axis[0]])
    x_1 = np.concatenate([start - 0.02 * axis, start + 0.02 * axis])
    sides = [0, 0, 0, 1, 1, 1]
    for k, x_t in zip(range(999, 0, -1), s.ddim(partial(s.reverse_mean, **vars(TWO)), x_1, 1000)):
        assert (x_t @ axis > s.border(k / 1000, TWO)).tolist() == sides
    assert s.goes_to(x_1, 1, TWO).tolist() == s.solve(x_1, 1, TWO).tolist() == sides
    np.testing.assert_allclose(x_t, PLACES[sides], atol=0.2)


@pytest.mark.parametrize(
    ("points", "weights", "t"),
    [
        (PLACES[:2], [0.3, 0.7], 0.3),
        (3 * PLACES - 5, [0.2, 0.5, 0.3], 1),
        (np.array([[0, 0], [9, 1], [1, -4], [2, 2], [-3, 1.5]]), [0.1, 0.4, 0.2, 0.2, 0.1], 0.7),
    ],
)
def test_the_truth_follows_the_data(points, weights, t):
    """The ODE carries p_t to the data: each point gets its weight.

    Small steps of Euler's, dx/dt = (x - E[x_0 | x]) / 2t, bring some starts to their points.
    """
    data = s.Data(points, np.array(weights), 3.0)
    x_t = s.Data(points, data.weights, 3 * t**0.5).noisy(4000, rng(8))  # of p_t
    found = s.goes_to(x_t, t, data)
    for i, w in enumerate(weights):
        assert (found == i).mean() == pytest.approx(w, abs=5 * (w * (1 - w) / 4000) ** 0.5)
    x, times = x_t[:20], np.geomspace(t, 0.01, 300)
    for t, next_t in zip(times, times[1:]):
        p = np.array([parts(y, t, data) for y in x])
        x = x - (t - next_t) * (x - p @ points / p.sum(axis=1, keepdims=True)) / (2 * t)
    assert s.nearest(x, points).tolist() == found[:20].tolist()


@pytest.mark.parametrize(
    "code",
    [
        "POINTS = [[1, 2]]",
        "POINTS = [[1, 2], [1, 2]]",
        "POINTS = [[1, 2], [3]]",
        "WEIGHTS = [0.5, 0.6]",
        "WEIGHTS = [np.nan, np.nan]",
        "WEIGHTS = [1]",
    ],
)
def test_what_the_script_cannot_do_is_refused(code, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        paste(s, code).main(["--figures-dir", str(tmp_path / "new")])
    assert f"error: {code.split()[0]}: " in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def look_at(ax, t, data, side, middle=(0, 0)):
    """The shade, the stars and the borders of a picture."""
    extent = [middle[0] - side, middle[0] + side, middle[1] - side, middle[1] + side]
    (image,) = ax.images
    assert [*image.get_extent()] == pytest.approx(extent)
    for row, column in ((2, 3), (10, 14), (18, 11)):
        x = middle + np.linspace(-side, side, 21)[[column, row]]
        p = parts(x, t, data)
        color = p / p.sum() @ [to_rgb(hue) for hue in HUES[: len(p)]]
        shade = image.get_array()[row if image.origin == "lower" else 20 - row, column]
        np.testing.assert_allclose(shade, 1 - 0.35 * (1 - color))
    for a, hue in zip(data.points, HUES):
        assert any(
            same_color(line.get_color(), hue) and line.get_xydata().tolist() == [a.tolist()]
            for line in ax.lines
        )
    places = [
        p.vertices for c in ax.collections if not isinstance(c, Quiver) for p in c.get_paths()
    ]
    ways = 0.15 * side * np.array([[1, 0], [0, 1], [-1, 0], [0, -1]])
    around = (np.concatenate(places)[::5, None] + ways).reshape(-1, 2)
    sides = s.goes_to(around, t, data).reshape(-1, 4)
    assert (sides.min(axis=1) < sides.max(axis=1)).all()  # across a border it is another point


@pytest.mark.parametrize("three", [False, True])
def test_main(three, tmp_path, spy):
    other = paste(s, snippet(s)) if three else s
    other.GRID, weights = 21, np.array([0.6, 0.24, 0.16] if three else [0.6, 0.4])
    sampled, tables = spy(other, "sample"), spy(other, "table")
    drawn, views = spy(other, "draw_trajectories"), spy(other, "draw_directions")
    flags = "--num-samples 2000 --num-steps 60 --sigma-q 3 --weight 0.6 --seed 3"
    other.main([*flags.split(), "--figures-dir", str(tmp_path)])
    points = np.array([[-1.5, -1.0], [1.5, 1.0], [-1.0, 1.5]])[: len(weights)]
    data = s.Data(points, weights, 3.0)
    base = 3 * rng(3).standard_normal((2000, 2))
    p_1, same, plainly = sampled
    np.testing.assert_allclose(same.x_1, base)
    np.testing.assert_allclose(plainly.x_1, base)
    assert np.abs(p_1.x_1.mean(axis=0) - weights @ points).max() < 5 * (11 / 2000) ** 0.5
    for call in (p_1, same):
        exact = s.reverse_mean(base, 0.3, 0.1, **vars(data))
        np.testing.assert_allclose(call.mean(base, 0.3, 0.1), exact)
    np.testing.assert_allclose(plainly.result, np.tile(weights @ points, (2000, 1)), atol=1e-12)

    side = 1.05 * np.abs(base[:40]).max()
    numbers = s.goes_to(base[:40], 1, data)
    for ax, mean in zip(drawn[0].result.axes, (same.mean, plainly.mean)):
        look_at(ax, 1, data, side)
        paths = np.array([base[:40], *s.ddim(mean, base[:40], 60)])
        for i, hue in enumerate(HUES[: len(weights)]):
            lines = [x.get_xydata() for x in ax.lines if same_color(x.get_color(), hue)]
            lines = [line for line in lines if len(line) == 61]
            np.testing.assert_allclose(lines, paths[:, numbers == i].swapaxes(0, 1))
        dots = [line.get_xydata() for line in ax.lines if len(line.get_xydata()) == 40]
        np.testing.assert_allclose(dots, paths[[0, -1]])
    middle = (points.min(axis=0) + points.max(axis=0)) / 2
    for ax, t in zip(views[0].result.axes, (1, 0.3, 0.03)):
        look_at(ax, t, data, 2 * np.abs(points - middle).max(), middle)
        (arrows,) = (x for x in ax.collections if isinstance(x, Quiver))
        for k in (3, 77, 160):
            x = np.array([arrows.X[k], arrows.Y[k]])
            p = parts(x, t, data)
            np.testing.assert_allclose([arrows.U[k], arrows.V[k]], p / p.sum() @ points - x)

    of_base = NormalDist(0, 3).cdf(s.border(1, data)) if not three else None
    for call, row, exact in zip(sampled, tables[0].rows[1:], (0.6, of_base, None)):
        share = (((call.result[:, None] - points) ** 2).sum(axis=2).argmin(axis=1) == 0).mean()
        ends = points[s.goes_to(call.x_1, 1, data)]
        numbers = [share] if call is not plainly else []  # all of those are at one place
        numbers += [(exact * (1 - exact) / 2000) ** 0.5, exact] if exact else []
        numbers.append(np.hypot(*(call.result - ends).T).mean())
        found = [float(x) for x in row[1:] if x]
        assert found == [pytest.approx(x, abs=6e-5, rel=0.05) for x in numbers]
        assert exact is None or abs(share - exact) < 5 * numbers[1]
