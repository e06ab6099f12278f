"""Experiment 11 held to references that share no code with it."""

import math
from functools import partial
from statistics import NormalDist
from unittest.mock import Mock

import couplings as s
import numpy as np
import pytest

SPREAD = 1 + 0.15**2  # E x_0^2
OPTIMAL = 0.25262  # W_2^2


def rng(seed=0):
    return np.random.default_rng(seed)


def pairs(n, batch, seed=0):
    return s.sort_batches(*s.draw(n, rng(seed)), batch)


def near(values, want):
    """The mean of draws is within five standard errors of want."""
    return abs(values.mean() - want) < 5 * values.std() / len(values) ** 0.5


def test_densities_are_those_of_the_draws():
    edges = np.array([-1.6, -1.1, -0.9, -0.3, 0.4, 0.95, 1.05, 1.7])
    for x, density in zip(s.draw(100_000, rng()), (s.density_1, s.density_0)):
        for low, high in zip(edges, edges[1:]):
            middles = low + (high - low) * (np.arange(100) + 0.5) / 100
            assert near((low < x) & (x < high), density(middles).mean() * (high - low))


def test_sort_batches():
    x_1, x_0 = s.draw(1024, rng())
    for batch in (1, 8, 1024):
        for x, y in zip((x_1, x_0), s.sort_batches(x_1, x_0, batch)):
            assert (y.reshape(-1, batch) == np.sort(x.reshape(-1, batch))).all()


@pytest.mark.parametrize("batch", [1, 2, 32])
def test_density_ratio_is_bernsteins_sum(batch):
    u, w = rng().random((2, 1000))
    want = 0
    for k in range(batch):
        want += math.comb(batch - 1, k) ** 2 * (u * w) ** k * ((1 - u) * (1 - w)) ** (batch - 1 - k)
    np.testing.assert_allclose(s.density_ratio(u, w, batch), batch * want, atol=1e-9)


@pytest.mark.parametrize("batch", [1, 4, 32])
def test_velocity_against_draws_in_bins(batch):
    x_1, x_0 = pairs(96_000, batch)
    x = np.linspace(-8, 8, 321)
    for t in (0.05, 0.5, 0.9):
        x_t = t * x_1 + (1 - t) * x_0
        residual = x_0 - x_1 - np.interp(x_t, x, s.batch_velocity(x, t, batch=batch))
        for part in np.array_split(residual[x_t.argsort()], 12):
            assert near(part, 0)


def test_straight_velocity():
    """Lines from x_1 to x_1^3 + x_1: at any t, the line through x_t is found again."""
    table, some = np.linspace(-2, 2, 4001), np.array([-1.234, 0.1, 1.777])
    for t in (0.0, 0.3, 1.0):
        v = s.straight_velocity(some + (1 - t) * some**3, t, x_1=table, x_0=table**3 + table)
        np.testing.assert_allclose(v, some**3, atol=1e-5)


def test_monotone_against_quantiles():
    """By the standard library's distribution function."""
    normal, x_1 = NormalDist(), np.array([-3, -1, -0.3, -1e-3, 0.02, 0.5, 2])
    for x, twin in zip(x_1, s.monotone(x_1)):
        below = (normal.cdf((twin - 1) / 0.15) + normal.cdf((twin + 1) / 0.15)) / 2
        assert below == pytest.approx(normal.cdf(x), abs=1e-6)


@pytest.mark.parametrize("batch", [1, 16])
def test_cost_and_split(batch):
    """By draws, each batch at one of ten t, and the identity.  The flow ends at the twins."""
    irreducible, curvature = s.split(batch, OPTIMAL)
    assert irreducible + curvature + OPTIMAL == pytest.approx(s.cost(batch), abs=3e-5)
    x_1, x_0 = (x.reshape(10, -1) for x in pairs(12_800, batch))
    times = (np.arange(10) + 0.5) / 10
    x_t = [t * y_1 + (1 - t) * y_0 for t, y_1, y_0 in zip(times, x_1, x_0)]
    v = [s.batch_velocity(x, t, batch=batch) for x, t in zip(x_t, times)]
    for values, want in ((x_0 - x_1, s.cost(batch)), (x_0 - x_1 - v, irreducible)):
        assert near((values**2).reshape(-1, batch).mean(axis=1), want)  # batches are independent
    starts = np.linspace(-2, 2, 10)
    x_0 = s.ends(partial(s.batch_velocity, batch=batch), starts, 100)
    np.testing.assert_allclose(x_0, s.monotone(starts), atol=0.02)


def test_errors():
    """Of a velocity of 0: the distance of starts to twins.  Of the first step: all go to 0."""
    assert s.errors(lambda x_t, t: 0 * x_t) == pytest.approx([OPTIMAL**0.5] * 3, abs=1e-4)
    assert s.errors(partial(s.batch_velocity, batch=1))[0] == pytest.approx(SPREAD**0.5, abs=1e-4)


def test_reflow():
    """A flow that halves is Euler's limit of x' = -x log 2; a second reflow changes nothing."""
    once = s.reflow(lambda x_t, t: -np.log(2) * x_t, 1)
    np.testing.assert_allclose(once, s.STARTS * (1 - np.log(2) / s.FINE) ** s.FINE)
    np.testing.assert_allclose(s.reflow(lambda x_t, t: -np.log(2) * x_t, 3), once, atol=1e-12)
    x_0 = s.reflow(partial(s.batch_velocity, batch=1), 1)
    assert (np.diff(x_0) > 0).all()  # no two lines meet


def test_straight_is_not_enough():
    """x_0, x_1 independent from N(0, I): trajectories on rays, to x_1 again; one step goes to 0."""

    def velocity(x_t, t):
        return (1 - 2 * t) / (t**2 + (1 - t) ** 2) * x_t

    x_0, x_1 = rng(5).standard_normal((2, 5000))
    x_t = 0.3 * x_1 + 0.7 * x_0
    assert near((x_0 - x_1 - velocity(x_t, 0.3)) * x_t, 0)
    assert (s.ends(velocity, x_1, 1) == 0).all()
    np.testing.assert_allclose(s.ends(velocity, x_1, 2000), x_1, rtol=2e-3)


def test_measure(monkeypatch):
    monkeypatch.setattr(s, "BATCHES", [1, 4])
    rows, optimal = s.measure(2)
    assert optimal == pytest.approx(OPTIMAL, abs=1e-5)
    assert [*rows] == ["B = 1", "B = 4", "sorted", "reflow 2"]
    for batch in (1, 4):
        own = s.errors(partial(s.batch_velocity, batch=batch))
        assert rows[f"B = {batch}"] == [s.cost(batch), *s.split(batch, optimal), *own]
    assert rows["sorted"] == pytest.approx([optimal, 0, 0, 0, 0, 0], abs=1e-9)
    x_0 = s.reflow(partial(s.batch_velocity, batch=1), 2)
    error = (s.WEIGHTS @ (x_0 - s.monotone(s.STARTS)) ** 2) ** 0.5
    price = s.WEIGHTS @ (x_0 - s.STARTS) ** 2
    assert rows["reflow 2"] == pytest.approx([price, 0, 0, error, error, error], abs=1e-9)


def paths(ax):
    """{color: (t, x_t)} of the paths in a panel, a row of x_t for each."""
    found = {}
    for line in ax.lines:
        t, x_t = line.get_data()
        length = np.isnan(t).argmax() + 1  # a gap ends each path; dots have none
        found[line.get_color()] = t[: length - 1], x_t.reshape(-1, length)[:, : length - 1]
    return found


def test_draw_lines():
    """Each panel: the pairs, the flow, two steps, of the coupling that its title says."""
    x_1, x_0 = s.draw(40, rng(7))
    twins, optimal = s.monotone(x_1), {"x_1": s.STARTS, "x_0": s.monotone(s.STARTS)}
    couplings = {
        "independent": (1, partial(s.batch_velocity, batch=1)),
        "batches of 4": (4, partial(s.batch_velocity, batch=4)),
        "batches of 32": (32, partial(s.batch_velocity, batch=32)),
        "sorted": (40, partial(s.straight_velocity, **optimal)),
    }
    figure = s.draw_lines(x_1, x_0, 2)
    axes = np.reshape(figure.axes, (3, 4))
    assert figure.get_suptitle().startswith("Blue: starts above 0; pink: below 0")
    words = [ax.get_ylabel().split("\n")[0] for ax in axes[:, 0]]
    assert words == ["lines", "trajectories", "Euler, steps: 2"]
    assert [ax.get_title() for ax in axes[0]] == [*couplings]
    assert axes[0, 0].get_xlim()[0] > 1 > 0 > axes[0, 0].get_xlim()[1]
    for column, (batch, velocity) in zip(axes.T, couplings.values()):
        lines = np.array(s.sort_batches(x_1, x_0, batch))
        flows = (np.array([x_1, *s.flow(velocity, x_1, n)]) for n in (s.FINE, 2))
        for ax, want in zip(column, (lines, *flows)):
            for color, side in (("#0072B2", want[0] > 0), ("#CC79A7", want[0] <= 0)):
                t, x_t = paths(ax)[color]
                np.testing.assert_allclose(t, np.linspace(1, 0, len(want)), atol=1e-9)
                np.testing.assert_array_equal(x_t, want[:, side].T)
        t, x_t = paths(ax)["0.6"]  # from the last step to the twins
        np.testing.assert_array_equal(x_t.T, [want[-1], twins])
        dots = ax.lines[-1].get_data()
        np.testing.assert_array_equal(dots, [[t[1]] * 40, twins])


ROWS = {
    "B = 1": [2.1, 0.9, 0.7, 0.51, 0.41, 0.31],
    "B = 2": [1.5, 0.6, 0.5, 0.42, 0.32, 0.22],
    "sorted": [0.4, 0.03, 0.02, 0.13, 0.23, 0.33],
    "reflow 2": [7.0, 8.0, 9.0, 7.5, 8.5, 9.5],
}


def test_draw_cost():
    bars, ax = s.draw_cost(ROWS, 0.25).axes
    for stack, label, low, high in zip(
        bars.containers,
        ("$W_2^2$", "curvature", "irreducible"),
        ([0, 0, 0], [0.25, 0.25, 0.25], [0.95, 0.75, 0.27]),
        ([0.25, 0.25, 0.25], [0.95, 0.75, 0.27], [1.85, 1.35, 0.3]),
    ):
        assert stack.get_label() == label
        assert [bar.get_y() for bar in stack] == pytest.approx(low)
        assert [bar.get_y() + bar.get_height() for bar in stack] == pytest.approx(high)
    assert bars.lines[0].get_label() == "cost, computed directly"
    assert [*bars.lines[0].get_ydata()] == [2.1, 1.5, 0.4]
    for k, label in enumerate(("1 Euler step", "2 Euler steps", "4 Euler steps")):
        line, last = ax.lines[2 * k : 2 * k + 2]
        assert line.get_label() == label
        assert line.get_marker() == last.get_marker()
        assert [*line.get_xdata(), *last.get_xdata()] == ["B = 1", "B = 2", "sorted"]
        got = [*line.get_ydata(), *last.get_ydata()]
        assert got == [ROWS[name][3 + k] for name in ("B = 1", "B = 2", "sorted")]
    assert [bars.get_title()[:4], ax.get_title()[:3]] == ["Cost", "RMS"]


def test_main(tmp_path, capsys, monkeypatch):
    rows = []
    monkeypatch.setattr(s, "NUM_STEPS", [1, 3, 5])
    monkeypatch.setattr(s, "table", rows.extend)
    for name in ("measure", "draw_lines", "draw_cost"):
        monkeypatch.setattr(s, name, Mock(return_value=Mock()))
    s.measure.return_value = ROWS, 0.3
    s.main(f"--figures-dir {tmp_path} --reflows 2 --num-steps 3 --num-samples 9".split())
    s.measure.assert_called_once_with(2)
    s.draw_cost.assert_called_once_with(ROWS, 0.3)
    x_1, x_0, num_steps = s.draw_lines.call_args.args
    assert (len(x_1), len(x_0), num_steps) == (9, 9, 3)
    for draw, name in ((s.draw_lines, "lines.jpg"), (s.draw_cost, "cost.jpg")):
        draw.return_value.savefig.assert_called_once_with(tmp_path / name, dpi=120)
    headings = ["error, 1 step", "error, 3 steps", "error, 5 steps"]
    assert rows[0] == ["coupling", "cost", "irreducible", "curvature", *headings]
    assert {name: [float(x) for x in row] for name, *row in rows[1:]} == ROWS
    line = capsys.readouterr().out.splitlines()[0]
    assert line.startswith("W_2^2 = 0.3000; ")
    assert line.endswith(" 2e-01")  # 2.1 - .9 - .7 - .3, the largest but for the reflow's
