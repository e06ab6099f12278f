"""Experiment 11 held to references that share no code with it."""

import math
from functools import partial
from statistics import NormalDist

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
def test_copula_is_bernsteins_sum(batch):
    u, w = rng().random((2, 1000))
    want = 0
    for k in range(batch):
        want += math.comb(batch - 1, k) ** 2 * (u * w) ** k * ((1 - u) * (1 - w)) ** (batch - 1 - k)
    np.testing.assert_allclose(s.copula(u, w, batch), batch * want, atol=1e-9)


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


def test_flow_after_every_step():
    """dx/dt = -x t, four steps by hand: t = 1, .75, .5, .25."""
    steps = list(s.flow(lambda x_t, t: x_t * t, np.array([2.0, -1.0]), 4))
    factors = np.cumprod([1.25, 1.1875, 1.125, 1.0625])
    np.testing.assert_allclose(steps, np.outer(factors, [2, -1]), rtol=1e-12)


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


@pytest.mark.parametrize("angle", [10.0, 170.0])
def test_rotation(angle):
    """With the velocity of the lines, every number of steps ends at x_0."""
    x_1 = rng(5).standard_normal(5000) + 1j * rng(6).standard_normal(5000)
    x_0 = x_1 * np.exp(1j * np.pi * angle / 180)
    price, misses = s.rotation(angle, x_1)
    assert near(abs(x_0 - x_1) ** 2, price)
    assert misses == pytest.approx([0] * 3, abs=1e-12)


def test_main(tmp_path, capsys, monkeypatch):
    calls = {}

    def spy(name, original):
        return lambda *args: original(*calls.setdefault(name, args))

    for name in ("reflow", "rotation", "draw_lines"):
        monkeypatch.setattr(s, name, spy(name, getattr(s, name)))
    s.main(f"--figures-dir {tmp_path} --reflows 2 --angle 60 --num-steps 3 --num-samples 9".split())
    first, num_reflows = calls["reflow"]
    assert (first.func, first.keywords, num_reflows) == (s.batch_velocity, {"batch": 1}, 2)
    assert calls["rotation"][0] == 60
    x_1, x_0, num_steps = calls["draw_lines"]
    assert (len(x_1), len(x_0), num_steps) == (9, 9, 3)
    assert {path.stem for path in tmp_path.iterdir()} == {"lines", "cost"}
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 6 + 2 + 2
    table = [[float(word) for word in line.split()[-6:]] for line in lines[1:9]]
    prices, irreducible, curvature, one, _, four = np.array(table).T
    np.testing.assert_allclose(prices - irreducible - curvature, OPTIMAL, atol=1e-3)
    assert prices[[0, 2]] == pytest.approx([2.0225, 0.9236])
    assert one[[0, 2, 6]] == pytest.approx([1.011, 0.527, 0])
    assert (np.diff(one[:7]) < 0).all()
    assert four[7] < 0.01  # one flow's error is all that a reflow has
    assert lines[9].startswith("W_2^2 = 0.2526; ")
    assert float(lines[9].split()[-1]) < 1e-4
    assert "60 degrees: W_2^2 = 0, cost 2.0000" in lines[10]
