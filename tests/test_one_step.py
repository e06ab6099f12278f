"""Experiment 16 held to references that share no code with it."""

from functools import partial
from statistics import NormalDist

import numpy as np
import one_step as s
import pytest
import torch
from conftest import paste, snippet, torch_rng
from matplotlib.colors import to_hex, to_rgba


class Brute:
    """The same data by the standard library, and by sums on a fine grid of x_0."""

    def __init__(self, weights, centers, std):
        self.parts = [(w, NormalDist(c, std)) for w, c in zip(weights, centers)]
        self.x_0 = np.linspace(min(centers) - 7 * std, max(centers) + 7 * std, 801)
        self.p_0 = np.array([sum(w * part.pdf(x) for w, part in self.parts) for x in self.x_0])

    def cdf(self, x, t=0):
        """P(x_t <= x)."""
        laws = [(w, NormalDist(0, t or 1e-9) + part * (1 - t)) for w, part in self.parts]
        return sum(w * law.cdf(x) for w, law in laws)

    def given(self, x, t):
        """p(x_0 | x_t = x), by Bayes' rule.  x: (n,).  Returns (n, 801), of sum 1."""
        logs = np.log(self.p_0 + 1e-300) - ((x[:, None] - (1 - t) * self.x_0) / t) ** 2 / 2
        weights = np.exp(logs - logs.max(axis=1, keepdims=True))
        return weights / weights.sum(axis=1, keepdims=True)

    def velocity(self, x, t):
        """E[x_0 - x_1 | x_t = x]."""
        mean = self.given(x, t) @ self.x_0
        return mean - (x - (1 - t) * mean) / t

    def consistent(self, x, num_levels, level):
        """f_k by sums over x_0 and straight lines between 401 points."""
        low, high = self.x_0[0] - 5, self.x_0[-1] + 5
        points = values = np.linspace(low, high, 401)
        for k in range(1, level + 1):
            at = x if k == level else points
            x_r = (k - 1) / k * at[:, None] + self.x_0 / k
            f_k = (self.given(at, k / num_levels) * np.interp(x_r, points, values)).sum(axis=1)
            values = f_k
        return f_k


DATA = {
    "as it is": None,
    "three, unequal, off center": "WEIGHTS, CENTERS, STD = (0.5, 0.2, 0.3), (-0.4, 1.7, 3.0), 0.25",
    "three times as large": "WEIGHTS, CENTERS, STD = [0.3, 0.7], [-2, 4], 0.9",
    "one Gaussian": "WEIGHTS, CENTERS, STD = (1,), (2,), 0.5",
    "the page's": snippet(s),
}


@pytest.mark.parametrize("code", DATA.values(), ids=DATA)
def test_the_truth_follows_the_data(code):
    m = paste(s, code) if code else s
    brute = Brute(m.WEIGHTS, m.CENTERS, m.STD)
    assert [*m.faults()] == []
    x_0 = m.mixture(40_000, torch_rng())
    assert x_0.shape == (40_000, 1)
    for point in np.quantile(x_0, [0.1, 0.4, 0.6, 0.9]):
        p = brute.cdf(point)
        assert abs((x_0 < point).double().mean() - p) < 5 * (p * (1 - p) / 40_000) ** 0.5
    mean = brute.x_0 @ brute.p_0 / brute.p_0.sum()
    variance = (brute.x_0 - mean) ** 2 @ brute.p_0 / brute.p_0.sum()
    assert pytest.approx((mean, variance), rel=1e-5) == (m.MEAN, m.VARIANCE)

    def points(t):
        """Where x_t may be: (5,)."""
        z = torch.tensor([-1.3, -0.4, 0.1, 0.3, 1.7], dtype=torch.float64)
        return t * z + (1 - t) * torch.quantile(x_0.double(), torch.special.ndtr(z))

    for t in (0.3, 0.9):
        x = points(t)
        v = m.exact_velocity(x[:, None], t)[:, 0]
        np.testing.assert_allclose(v, brute.velocity(x.numpy(), t), atol=1e-6)
        moved = (m.flow_map(x, t, t + 1e-4) - m.flow_map(x, t, t - 1e-4)) / 2e-4
        np.testing.assert_allclose(moved, -v, rtol=1e-4, atol=1e-6, err_msg="dx/dt is -v")
    for t, r in ((1.0, 0.0), (0.6, 0.2), (0.5, 0.5)):
        for start, end in zip(points(t).tolist(), m.flow_map(points(t), t, r).tolist()):
            message = "the map does not take quantiles to the same quantiles"
            assert brute.cdf(end, r) == pytest.approx(brute.cdf(start, t), rel=1e-6), message
    for num_levels, level in ((1, 1), (4, 2), (3, 3)):
        x = points(level / num_levels)
        np.testing.assert_allclose(
            m.consistent(x, num_levels, level),
            brute.consistent(x.numpy(), num_levels, level),
            atol=5e-4 * (1 + m.VARIANCE),
            err_msg=f"f_{level} of {num_levels} is not E[f_{level - 1} | x_t]",
        )


def test_data_that_is_refused():
    for code, words in [
        ("WEIGHTS, CENTERS, STD = (0.6, 0.6), (-1, 1), 0.3", "WEIGHTS"),
        ("WEIGHTS, CENTERS, STD = (1.0,), (-1, 1), 0.3", "WEIGHTS"),
        ("WEIGHTS, CENTERS, STD = (0.5, 0.5), (-1, 1), 0.001", "CENTERS"),
        ("WEIGHTS, CENTERS, STD = (0.5, 0.5), (-1, 1), -1", "CENTERS"),
    ]:
        (line,) = paste(s, code).faults()
        assert line.startswith(words)


def test_many_levels_by_another_quadrature():
    """200 levels: even nodes, straight lines on one grid and on one twice as fine, extrapolated."""
    x = np.array([-2.0, 0.0, 0.2, 0.25, 0.3, 1.5])
    nodes, results = np.arange(-6.0, 7.0)[:, None], []
    weights = np.exp(-(nodes[:, 0] ** 2) / 2) / (2 * np.pi) ** 0.5
    for size in (3001, 6001):
        points = values = np.linspace(-5, 5, size)
        for k in range(1, 201):
            t = k / 200
            variance, var_0 = 0.09 * (1 - t) ** 2 + t**2, 1 / (1 / 0.09 + (1 - t) ** 2 / t**2)
            densities, means = [], []
            for w, c in ((0.6, -1), (0.4, 1)):
                x_0 = var_0 * (c / 0.09 + (1 - t) * points / t**2) + var_0**0.5 * nodes
                x_r = points + (x_0 - points) / k
                means.append(weights @ np.interp(x_r, points, values))
                densities.append(w * np.exp(-((points - (1 - t) * c) ** 2) / (2 * variance)))
            upper = 1 / (1 + np.divide(*np.maximum(densities, 1e-290)))
            values = (1 - upper) * means[0] + upper * means[1]
        results.append(np.interp(x, points, values))
    want = (4 * results[1] - results[0]) / 3
    np.testing.assert_allclose(s.consistent(x, 200), want, rtol=0, atol=1e-4)


# Of data N(0, .3^2) all is linear: std of x_t, the map, the velocity, the fixed point.
def std(t):
    return ((1 - t) ** 2 * 0.09 + t**2) ** 0.5


def velocity_slope(t):
    return ((1 - t) * 0.09 - t) / std(t) ** 2


def exact_map(t, r):
    """The slope of u(x, t, r)."""
    return torch.where(t > r, (std(r) / std(t) - 1) / (t - r).clamp(min=1e-9), velocity_slope(t))


def fixed_point(t, r, num_levels=4):
    """The slope of u(x, t, 0) for f_k(x) = c_k x, where c_k = c_{k-1} E[x_{k-1} | x_k] / x_k."""
    slopes = [1.0]
    for k in range(1, num_levels + 1):
        upper, lower = k / num_levels, (k - 1) / num_levels
        covariance = (1 - upper) * (1 - lower) * 0.09 + upper * lower
        slopes.append(slopes[-1] * covariance / std(upper) ** 2)
    f = torch.tensor(slopes)[(t * num_levels).round().long()]
    return torch.where(t > 0, (f - 1) / t.clamp(min=1e-9), 0.0)


def exact_v(x, t):
    return velocity_slope(t) * x


LOSSES = {
    "velocity": (s.velocity_loss, exact_map),
    "consistency": (partial(s.consistency_loss, num_levels=4), fixed_point),
    "MeanFlow": (s.mean_flow_loss, exact_map),
    "distilled": (partial(s.distillation_loss, velocity=exact_v), exact_map),
}


@pytest.mark.parametrize(("loss", "slope"), LOSSES.values(), ids=LOSSES)
def test_losses_stop_at_their_fixed_points(loss, slope):
    """By Monte Carlo, with x_0 - x_1 in place of v: the mean gradient is 0; not so 5 % away."""
    for size, still in ((0.0, True), (0.05, False)):
        gradients, values, generator = [], [], torch_rng(1)
        for _ in range(30):
            theta = torch.tensor([size, 0.0], requires_grad=True)

            def u(x, t, r, theta=theta):
                return (slope(t, r) * (1 + theta[0]) + theta[1] * t) * x

            x_0 = 0.3 * torch.randn(3000, 1, generator=generator)
            value = loss(u, x_0, torch.randn(3000, 1, generator=generator), generator)
            value.backward()
            gradients.append(theta.grad)
            values.append(value.item())
        gradients = torch.stack(gradients)
        z = gradients.mean(dim=0) / (gradients.std(dim=0) / 30**0.5 + 1e-4)
        assert (z.abs().max() < 5) == still, (
            "at its fixed point the loss still pushes" if still else "off it nothing pushes back"
        )
        # Distillation has no noise: at the map its loss is 0, not small in the mean.
        noise = loss is not LOSSES["distilled"][0]
        assert not still or (max(values) > 1e-3) == noise


def test_identity_loss_by_differences():
    """The derivative along dx/dt = -v, of rows that are all different, in double precision."""
    torch.manual_seed(0)
    u = s.MeanVelocity(width=8).double()
    x = torch.linspace(-2, 2, 7, dtype=torch.float64)[:, None]
    v = torch.linspace(3, -1, 7, dtype=torch.float64)[:, None]
    t, r, h = torch.linspace(0.5, 1, 7).double()[:, None], torch.full_like(x, 0.2), 1e-5
    change = (u(x - h * v, t + h, r) - u(x + h * v, t - h, r)) / (2 * h)
    want = (u(x, t, r) - (v - (t - r) * change).detach()).square().mean()
    loss = s.identity_loss(u, x.clone(), t.clone(), r, v)
    torch.testing.assert_close(
        loss, want, rtol=1e-6, atol=0, msg="u is not pulled to v - (t - r) du/dt"
    )
    got, want = (torch.autograd.grad(y, [*u.parameters()]) for y in (loss, want))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7, msg="the target is not held fixed")


def test_training(spy):
    """Of the velocity, in seconds: near E[x_0 - x_1 | x_t].  A start is kept as it was."""
    network = s.train(s.velocity_loss, train_steps=250, rng=torch_rng())
    x, t = torch.linspace(-1.5, 1.5, 7)[:, None], torch.full((7, 1), 0.6)
    exact = Brute(s.WEIGHTS, s.CENTERS, s.STD).velocity(x[:, 0].double().numpy(), 0.6)
    v = network.velocity(x, t)
    assert np.abs(v[:, 0].numpy() - exact).max() < 0.3
    rates = {"train_steps": 40, "learning_rate": 1e-6, "start": network, "batch_size": 9}
    draws = spy(s, "mixture")
    other = s.train(s.velocity_loss, rng=torch_rng(1), **rates)
    assert [call.n for call in draws] == [9] * 40
    assert torch.equal(v, network.velocity(x, t))
    # One cycle of the learning rate: each weight moves by less than 40 steps of its largest.
    first, last = (next(n.parameters()) for n in (network, other))
    assert 4e-6 < (first - last).abs().max() < 0.7 * 40e-6


def test_samplers():
    """With a u that shows all it is given; by hand."""

    def u(x, t, r):
        return 10 * t + 100 * r + x

    def jump(x, t, r):
        return x + (t - r) * (10 * t + 100 * r + x)

    x, half = s.STARTS, 1 / 2
    assert sorted(s.FRESH.tolist()) == x.tolist()
    assert abs((x * s.FRESH).mean()) < 0.01
    euler = x + half * (110 + x)
    euler = euler + half * (55 + euler)
    near = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)
    near(s.sample("velocity", u, 2), euler, msg="Euler's steps take u(x_t, t, t)")
    jumps = jump(jump(x, 1, half), half, 0)
    near(s.sample("MeanFlow", u, 2), jumps, msg="jumps take u(x_t, t, t - dt)")
    near(s.sample("consistency", u, 1, 5), jump(x, 1, 0))
    back = 0.4 * s.FRESH + 0.6 * jump(x, 1, 0)
    near(s.sample("consistency", u, 2, 5), jump(back, 0.4, 0), msg="back with fresh noise")
    one, two = s.perfect(5)
    near(one, s.consistent(x, 5))
    near(two, s.consistent(0.4 * s.FRESH + 0.6 * one, 5, 2))
    rms_and_median = s.apart(torch.tensor([1.0, 5.0, 2.0]), torch.tensor([1.0, 2.0, 6.0]))
    assert rms_and_median == pytest.approx(((25 / 3) ** 0.5, 3.0))
    laws = s.apart_as_laws(torch.tensor([3.0, 1.0]), torch.tensor([1.0, 4.0]))
    assert laws == pytest.approx(0.5**0.5), "W_2 pairs the least with the least"


def curves(ax):
    """{color: its lines' points}, of a panel."""
    found = {}
    for line in ax.lines:
        found.setdefault(to_hex(line.get_color()).upper(), []).append(line.get_xydata())
    return found


def test_idea():
    times, paths = s.trajectories(12, 5)
    assert np.allclose(paths[3], s.flow_map(paths[0], 1, times[3]), atol=1e-9)
    left, right = s.draw_idea(times, paths, 7 + paths[0]).axes
    for ax, ends, color in ((left, 7 + paths[0], s.ORANGE), (right, paths[-1], "k")):
        drawn = np.array(curves(ax)["#BFBFBF"])
        assert np.array_equal(drawn[:, :, 1], paths.T)
        assert np.array_equal(drawn[0, :, 0], times)
        for k, arrow in zip((2, 7), ax.texts):
            assert (arrow.xyann, arrow.xy) == ((1, paths[0, k]), (0, ends[k]))
            assert arrow.arrow_patch.get_edgecolor() == to_rgba(color)
        assert len(ax.texts) == 2


def test_drawn():
    x = [k + torch.arange(4000, dtype=torch.float64) for k in range(4)]
    samples = {"MeanFlow": x[0], s.with_levels(5): x[1]}
    axes = s.draw_maps(samples, {s.with_levels(5): x[2]}, x[3]).axes
    for ax, wanted in zip(
        axes, ({"#000000": x[3], s.BLUE: x[0]}, {"#000000": x[3], s.BLUE: x[1], "#999999": x[2]})
    ):
        drawn = curves(ax)
        assert drawn.keys() == wanted.keys()
        for color, y in wanted.items():
            assert np.array_equal(drawn[color][0], np.stack([s.STARTS, y], axis=1))

    by_steps = {"velocity": {1: 4.0, 3: 3.0}, "MeanFlow": {1: 2.5}, "distilled": {1: 2.0}}
    one_step = {"velocity": 9.0, s.with_levels(5): 8.0, "MeanFlow": 7.0, "distilled": 6.5}
    left, right = map(curves, s.draw_errors({2: 6.0, 5: 5.0}, by_steps, one_step).axes)
    assert left["#000000"][0].tolist() == [[2, 6], [5, 5]]
    assert left[s.BLUE][0].tolist() == [[5, 8]]
    assert [left[color][0][0, 1] for color in (s.PINK, s.GREEN)] == [7, 6.5]
    drawn = {color: right[color][0].tolist() for color in right}
    assert drawn == {s.ORANGE: [[1, 4], [3, 3]], s.PINK: [[1, 2.5]], s.GREEN: [[1, 2]]}


def numbers(row):
    return [float(cell) for cell in row if cell.replace(".", "").isdigit()]


def test_main(tmp_path, monkeypatch, spy):
    """Once, small: each number printed and drawn is that of the network in its row."""
    monkeypatch.setattr(s, "grid", partial(s.grid, n=801))
    monkeypatch.setattr(s, "STARTS", s.STARTS[10::20])
    monkeypatch.setattr(s, "FRESH", s.STARTS.flip(0) ** 3)
    monkeypatch.setattr(s, "LEVELS", [2, 5])
    monkeypatch.setattr(s, "STEPS", [1, 3])
    monkeypatch.setattr(s, "MANY", 9)
    learned, tables, trained = spy(s, "learn"), spy(s, "table"), spy(s, "train")
    idea, maps, errors = (spy(s, f"draw_{name}") for name in ("idea", "maps", "errors"))
    options = "--train-steps 3 --num-levels 4 --more-steps 2 --seed 5"
    s.main([*options.split(), "--figures-dir", str(tmp_path)])
    call = learned[0]
    assert (call.num_levels, call.train_steps, call.more_steps) == (4, 3, 2)
    assert call.rng.initial_seed() == 5
    networks, twins = call.result, s.flow_map(s.STARTS, 1, 0)
    losses = [call.loss for call in trained]
    assert (losses[0], losses[3], losses[5]) == (s.velocity_loss, *[s.mean_flow_loss] * 2)
    assert [loss.keywords["num_levels"] for loss in losses[1:3]] == [4, 9]
    assert losses[4].keywords["velocity"] == networks["velocity"].velocity
    given = [(call.train_steps, call.batch_size) for call in trained]
    assert given == [(3, 512), (3, 256), (6, 256), (4, 512), (3, 256), (2, 512)]
    starts = [*[None] * 4, networks["velocity"], networks["distilled"]]
    assert [call.start for call in trained] == starts
    (_, *rows), (levels, perfect), (steps, *by_steps) = (table.rows for table in tables)
    assert len(rows) == len(networks) + 1

    def cells(x_0, twice):
        return [*s.apart(x_0, twins), s.apart_as_laws(twice, twins)]

    for row, (name, u) in zip(rows, networks.items()):
        num_levels = {s.with_levels(n): n for n in (4, 9)}.get(name)
        want = cells(*(s.sample(name, u, k, num_levels) for k in (1, 2)))
        want += cells(*s.perfect(num_levels)) if num_levels else []
        assert row[0] == name
        assert numbers(row[1:]) == pytest.approx(want, abs=6e-5)
        if name != "velocity":
            assert torch.equal(maps[0].samples[name], s.sample(name, u, 1))
    half = (twins + s.FRESH) / 2
    assert numbers(rows[-1]) == pytest.approx(cells(twins, s.flow_map(half, 0.5, 0)), abs=6e-5)
    assert maps[0].fixed_points.keys() == {s.with_levels(n) for n in (4, 9)}
    assert torch.equal(maps[0].twins, twins)

    exact = {n: s.apart(s.consistent(s.STARTS, n), twins)[0] for n in (2, 4, 5, 9)}
    assert errors[0].by_levels == pytest.approx(exact)
    assert dict(zip(numbers(levels), numbers(perfect))) == pytest.approx(exact, abs=6e-5)
    for name, row in zip(("velocity", "distilled"), by_steps):
        want = [s.apart(s.sample(name, networks[name], n), twins)[0] for n in (1, 3)]
        assert numbers(row) == pytest.approx(want, abs=6e-5)
        assert [*errors[0].by_steps[name].values()] == want
    assert numbers(steps) == [1, 3]
    assert errors[0].one_step["MeanFlow"] == s.apart(maps[0].samples["MeanFlow"], twins)[0]
    # At t = 1 nothing is known of x_0: one Euler step ends at the mean of the data.
    torch.testing.assert_close(idea[0].euler, torch.full((25,), s.MEAN, dtype=torch.float64))
    assert {path.stem for path in tmp_path.iterdir()} == {"idea", "maps", "error"}
