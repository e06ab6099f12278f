"""Experiment 11 held to references that share no code with it."""

import math
import re
from functools import partial
from statistics import NormalDist

import couplings as s
import numpy as np
import pytest
from conftest import paste, rng, snippet

BLUE, PINK, SKY = "#0072B2", "#CC79A7", "#56B4E9"


def near(values, want):
    """The mean of draws is within five standard errors of want."""
    return abs(values.mean() - want) < 5 * values.std() / len(values) ** 0.5


def test_sort_batches():
    x_1, x_0 = s.draw(1024, rng())
    for batch in (1, 8, 1024):
        got = s.sort_batches(x_1, x_0, batch)
        assert np.shape(got) == (2, 1024), "the pairs are x_1 and x_0, as many as were given"
        for x, y in zip((x_1, x_0), got):
            same = y.reshape(-1, batch) == np.sort(x.reshape(-1, batch))
            assert same.all(), "each batch is in order, and keeps its own draws"


OTHERS = [
    ("STD = 0.15", 16),
    ("WEIGHTS, CENTERS = np.array([0.2, 0.5, 0.3]), np.array([3.0, -2.0, 0.5])\nSTD = 0.3", 4),
    ("WEIGHTS, CENTERS = np.array([1.0]), np.array([2.0])\nSTD = 0.5", 2),
    ("WEIGHTS, CENTERS = np.array([0.3, 0.7]), np.array([-6.0, 9.0])\nSTD = 0.45", 1),
]


@pytest.mark.parametrize(("code", "batch"), OTHERS)
def test_the_truth_follows_the_data(code, batch):
    """Density, twins, cost, parts and velocity, by draws, whatever the mixture."""
    m = paste(s, code)
    assert m.faults() == []
    x_1, x_0 = m.draw(64_000, rng())
    edges = np.quantile(x_0, [0.02, 0.2, 0.45, 0.7, 0.95])
    for low, high in zip(edges, edges[1:]):
        middles = low + (high - low) * (np.arange(4000) + 0.5) / 4000
        share = m.density_0(middles).mean() * (high - low)
        assert near((low < x_0) & (x_0 < high), share), "density_0 is not that of the draws"

    some = np.array([-2.9, -1, -0.35, 0.02, 0.5, 2])
    for x, twin in zip(some, m.monotone(some)):
        parts = [w * NormalDist(c, m.STD).cdf(twin) for w, c in zip(m.WEIGHTS, m.CENTERS)]
        assert sum(parts) == pytest.approx(NormalDist().cdf(x), abs=5e-6), "another quantile"

    starts, weights = m.starts()
    optimal = weights @ (m.monotone(starts) - starts) ** 2
    levels = (np.arange(400_000) + 0.5) / 400_000
    ends = [np.interp(levels, *table()[::-1]) for table in (m.table_1, m.table_0)]
    assert optimal == pytest.approx(((ends[0] - ends[1]) ** 2).mean(), rel=2e-4)

    irreducible, curvature = m.split(batch, optimal)
    assert irreducible + curvature + optimal == pytest.approx(m.cost(batch), rel=1e-5)
    x_1, x_0 = m.sort_batches(x_1, x_0, batch)
    v, x_t, times = np.empty_like(x_0), np.empty_like(x_0), (np.arange(8) + 0.5) / 8
    for part, t in zip(np.split(np.arange(64_000), 8), times):  # each batch at one of eight t
        x_t[part] = t * x_1[part] + (1 - t) * x_0[part]
        grid = np.linspace(x_t[part].min(), x_t[part].max(), 400)
        on_grid = m.batch_velocity(grid, t, batch=batch)
        assert np.shape(on_grid) == (400,), "the velocity has a number for each x_t"
        v[part] = np.interp(x_t[part], grid, on_grid)
        for few in np.array_split(part[x_t[part].argsort()], 8):
            assert near((x_0 - x_1 - v)[few], 0), "v_t is not the mean of x_0 - x_1 at x_t"
    for values, want in ((x_0 - x_1, m.cost(batch)), (x_0 - x_1 - v, irreducible)):
        assert near((values**2).reshape(-1, batch).mean(axis=1), want)  # batches are independent


def test_what_it_cannot_do():
    for code in [
        "WEIGHTS, CENTERS = np.array([0.5, 0.4]), np.array([-1.0, 1.0])",
        "WEIGHTS, CENTERS = np.array([0.5, 0.5]), np.array([-1.0, 0.0, 1.0])",
        "WEIGHTS, CENTERS = np.full(2, np.nan), np.array([-1.0, 1.0])",
        "STD = 0.0",
        "STD = 0.001",
    ]:
        assert len(paste(s, code).faults()) == 1


@pytest.mark.parametrize("batch", [1, 2, 32])
def test_density_ratio_is_bernsteins_sum(batch):
    u, w = rng().random((2, 1000))
    want = 0
    for k in range(batch):
        want += math.comb(batch - 1, k) ** 2 * (u * w) ** k * ((1 - u) * (1 - w)) ** (batch - 1 - k)
    np.testing.assert_allclose(s.density_ratio(u, w, batch), batch * want, atol=1e-9)


def test_straight_velocity():
    """Lines from x_1 to x_1^3 + x_1: at any t, the line through x_t is found again."""
    table, some = np.linspace(-2, 2, 4001), np.array([-1.234, 0.1, 1.777])
    for t in (0.0, 0.3, 1.0):
        v = s.straight_velocity(some + (1 - t) * some**3, t, x_1=table, x_0=table**3 + table)
        np.testing.assert_allclose(v, some**3, atol=1e-5)


def test_errors_and_reflow():
    """A velocity of 0: starts against twins. The first step: all go to 0. A flow that halves."""
    x_1, weights = s.starts()
    optimal = weights @ (s.monotone(x_1) - x_1) ** 2
    assert [*s.errors(lambda x_t, t: 0 * x_t).values()] == pytest.approx([optimal**0.5] * 3)
    first = s.errors(partial(s.batch_velocity, batch=1))[1]
    assert first == pytest.approx((1 + 0.15**2) ** 0.5, abs=1e-4)
    once = s.reflow(lambda x_t, t: -np.log(2) * x_t, 1)
    np.testing.assert_allclose(once, x_1 * (1 - np.log(2) / s.FINE) ** s.FINE)
    np.testing.assert_allclose(s.reflow(lambda x_t, t: -np.log(2) * x_t, 3), once, atol=1e-12)
    x_0 = s.ends(partial(s.batch_velocity, batch=16), x_1[::12], s.FINE)
    np.testing.assert_allclose(x_0, s.monotone(x_1[::12]), atol=0.02)


def test_straight_is_not_enough():
    """x_0, x_1 independent from N(0, I): trajectories on rays, to x_1 again; one step goes to 0."""

    def velocity(x_t, t):
        return (1 - 2 * t) / (t**2 + (1 - t) ** 2) * x_t

    x_0, x_1 = rng(5).standard_normal((2, 1000))
    x_t = 0.3 * x_1 + 0.7 * x_0
    assert near((x_0 - x_1 - velocity(x_t, 0.3)) * x_t, 0)
    assert (s.ends(velocity, x_1, 1) == 0).all()
    np.testing.assert_allclose(s.ends(velocity, x_1, 400), x_1, rtol=1e-2)


def curves(ax):
    """{color: (t, x_t)} of the paths in a panel, a row of x_t for each; dots have no gap."""
    found = {}
    for line in ax.lines:
        t, x_t = line.get_data()
        length = np.isnan(t).argmax() + 1  # a gap ends each path
        found[line.get_color()] = t[: length - 1], x_t.reshape(-1, length)[:, : length - 1]
    return found


def test_draw_lines():
    """Each panel has its paths, blue if they start above 0; grey leads from the steps to twins."""
    runs = {f"{k}": [rng(3 * k + j).normal(size=(j + 2, 9)) for j in range(3)] for k in range(4)}
    twins = rng(20).normal(size=9)
    axes = np.reshape(s.draw_lines(runs, twins).axes, (3, 4))
    assert axes[0, 0].get_xlim()[0] > 1 > 0 > axes[0, 0].get_xlim()[1]
    for column, panels in zip(axes.T, runs.values()):
        for ax, want in zip(column, panels):
            for color, side in ((BLUE, want[0] > 0), (PINK, want[0] <= 0)):
                t, x_t = curves(ax)[color]
                np.testing.assert_allclose(t, np.linspace(1, 0, len(want)), atol=1e-9)
                np.testing.assert_array_equal(x_t, want[:, side].T)
        t, x_t = curves(ax)["0.6"]
        np.testing.assert_array_equal(x_t.T, [want[-1], twins])
        (dots,) = (line for line in ax.lines if line.get_color() == "k")
        np.testing.assert_array_equal(dots.get_data(), [[t[1]] * 9, twins])


def test_draw_cost():
    """Bars stand on each other: W_2^2 grey, curvature pink, irreducible blue; curves of errors."""
    found = {
        name: {"cost": row[0], "irreducible": row[1], "curvature": row[2]}
        | {"errors": dict(zip(s.NUM_STEPS, row[3:]))}
        for name, row in {
            "a": [2.1, 0.9, 0.7, 0.51, 0.41, 0.31],
            "b": [1.5, 0.6, 0.5, 0.42, 0.32, 0.22],
            "last": [0.4, 0.03, 0.02, 0.13, 0.23, 0.33],
        }.items()
    }
    bars, ax = s.draw_cost(found, 0.25).axes
    bottoms = {PINK: [0.25] * 3, SKY: [0.95, 0.75, 0.27]}
    heights = {PINK: [0.7, 0.5, 0.02], SKY: [0.9, 0.6, 0.03]}
    for stack in bars.containers:
        color = s.plt.matplotlib.colors.to_hex(stack[0].get_facecolor())
        code = {name.lower(): name for name in (PINK, SKY)}.get(color, "grey")
        assert [bar.get_y() for bar in stack] == pytest.approx(bottoms.get(code, [0] * 3))
        assert [b.get_height() for b in stack] == pytest.approx(heights.get(code, [0.25] * 3))
    assert [[*line.get_ydata()] for line in bars.lines] == [[2.1, 1.5, 0.4]]
    drawn = [(line.get_marker(), [*line.get_xdata()], [*line.get_ydata()]) for line in ax.lines]
    for n, marker in zip(s.NUM_STEPS, "os^"):
        rows = [row["errors"][n] for row in found.values()]
        assert (marker, ["a", "b"], rows[:2]) in drawn
        assert (marker, ["last"], rows[2:]) in drawn


def numbers(rows):
    return {row[0]: [float(cell) for cell in row[1:]] for row in rows[1:]}


def test_main(tmp_path, capsys, monkeypatch, spy):
    """With the page's data: what is measured, of what; what is drawn and printed is that."""
    m = paste(s, snippet(s))
    m.BATCHES, m.FINE = [1, 4], 20
    monkeypatch.setattr(m.plt.Figure, "savefig", lambda *_, **__: None)
    calls = {name: spy(m, name) for name in ("measure", "reflow", "follow", "report", "table")}
    drawn = [spy(m, "draw_lines"), spy(m, "draw_cost")]
    m.main(f"--figures-dir {tmp_path} --reflows 2 --num-steps 3 --num-samples 9 --seed 5".split())
    ((found, optimal),) = (call.result for call in calls["measure"])
    (again,), (runs,), (printed,) = (calls[name] for name in ("reflow", "follow", "report"))
    x_1, weights = m.starts()
    for batch, name in zip((1, 4), found):
        assert name == f"B = {batch}"
        velocity = partial(m.batch_velocity, batch=batch)
        parts = [found[name][key] for key in ("cost", "irreducible", "curvature")]
        assert parts == [m.cost(batch), *m.split(batch, optimal)]
        assert found[name]["errors"] == m.errors(velocity)
    np.testing.assert_allclose(again.result, m.reflow(partial(m.batch_velocity, batch=1), 1))
    assert again.num_reflows == 2
    *_, straight, last = numbers(printed.result).values()
    assert straight == pytest.approx([optimal, 0, 0, 0, 0, 0], abs=5e-5)
    error = (weights @ (again.result - m.monotone(x_1)) ** 2) ** 0.5
    price = weights @ (again.result - x_1) ** 2
    assert last == pytest.approx([price, 0, 0, error, error, error], abs=5e-5)
    rows = numbers(calls["table"][0].rows)
    assert list(rows)[:2] == ["B = 1", "B = 4"]
    for name in ("B = 1", "B = 4"):
        row = found[name]
        want = [row["cost"], row["irreducible"], row["curvature"], *row["errors"].values()]
        assert rows[name] == pytest.approx(want, abs=5e-5)
    line = capsys.readouterr().out.splitlines()[-2]
    rest = [row["cost"] - row["irreducible"] - row["curvature"] for row in found.values()]
    off = max(abs(x - optimal) for x in rest[:2])
    printed = [float(word) for word in re.findall(r"\b\d+\.\d+|\de-\d+", line)]
    assert printed == [pytest.approx(optimal, abs=5e-5), pytest.approx(off, rel=0.5)]

    assert runs.num_steps == 3
    np.testing.assert_array_equal([runs.x_1, runs.x_0], m.draw(9, rng(5)))
    lines, cost = (calls[0] for calls in drawn)
    np.testing.assert_array_equal(lines.twins, m.monotone(runs.x_1))
    assert [*cost.found] == ["B = 1", "B = 4", "sorted"]
    assert cost.optimal == optimal
    couplings = [partial(m.batch_velocity, batch=batch) for batch in (1, 4, 32)]
    for batch, velocity, panels in zip((1, 4, 32), couplings, lines.runs.values()):
        np.testing.assert_array_equal(panels[0], m.sort_batches(runs.x_1, runs.x_0, batch))
        for n, path in zip((m.FINE, 3), panels[1:]):
            np.testing.assert_array_equal(path, [runs.x_1, *m.flow(velocity, runs.x_1, n)])
    pair, *paths = [*lines.runs.values()][3]
    np.testing.assert_array_equal(pair, np.sort([runs.x_1, runs.x_0]))
    for path in paths:
        np.testing.assert_allclose(path[-1], lines.twins, atol=1e-3)
