"""Experiment 16 held to references that share no code with it."""

from functools import partial
from statistics import NormalDist

import numpy as np
import one_step as s
import pytest
import torch
from conftest import paste, snippet, torch_rng
from matplotlib.colors import to_hex, to_rgba
from matplotlib.figure import Figure


class Brute:
    """The same data by the standard library, and by sums on a fine grid of x_0."""

    def __init__(self, weights, centers, std):
        self.parts = [(w, NormalDist(c, std)) for w, c in zip(weights, centers)]
        self.x_0 = np.linspace(min(centers) - 7 * std, max(centers) + 7 * std, 401)
        self.p_0 = np.array([sum(w * part.pdf(x) for w, part in self.parts) for x in self.x_0])

    def cdf(self, x, t=0):
        """P(x_t <= x)."""
        laws = [(w, NormalDist(0, t or 1e-9) + part * (1 - t)) for w, part in self.parts]
        return sum(w * law.cdf(x) for w, law in laws)

    def given(self, x, t):
        """p(x_0 | x_t = x), by Bayes' rule.  x: (n,).  Returns (n, 401), of sum 1."""
        logs = np.log(self.p_0 + 1e-300) - ((x[:, None] - (1 - t) * self.x_0) / t) ** 2 / 2
        weights = np.exp(logs - logs.max(axis=1, keepdims=True))
        return weights / weights.sum(axis=1, keepdims=True)

    def velocity(self, x, t):
        """E[x_0 - x_1 | x_t = x]."""
        mean = self.given(x, t) @ self.x_0
        return mean - (x - (1 - t) * mean) / t

    def consistent(self, x, num_levels, level):
        """f_k by sums over x_0 and straight lines between 301 points."""
        points = values = np.linspace(self.x_0[0] - 5, self.x_0[-1] + 5, 301)
        for k in range(1, level + 1):
            at = x if k == level else points
            x_r = (k - 1) / k * at[:, None] + self.x_0 / k
            values = (self.given(at, k / num_levels) * np.interp(x_r, points, values)).sum(axis=1)
        return values


DATA = {
    "as it is": "",
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
    for t, r in ((1.0, 0.0), (0.6, 0.2), (0.5, 0.5)):
        for start, end in zip(points(t).tolist(), m.flow_map(points(t), t, r).tolist()):
            message = "the map does not take quantiles to the same quantiles"
            assert brute.cdf(end, r) == pytest.approx(brute.cdf(start, t), rel=1e-6), message
    for num_levels, level in ((1, 1), (4, 2), (3, 3)):
        x = points(level / num_levels)
        np.testing.assert_allclose(
            m.consistent(x, num_levels, level),
            brute.consistent(x.numpy(), num_levels, level),
            atol=1e-3 * (1 + m.VARIANCE),
            err_msg=f"f_{level} of {num_levels} is not E[f_{level - 1} | x_t]",
        )


def test_data_that_is_refused():
    pair = "(0.5, 0.5), (-1, 1)"
    for data in (
        "(0.6, 0.6), (-1, 1), 0.3",
        "(1.0,), (-1, 1), 0.3",
        "(math.nan, math.nan), (-1, 1), 0.3",
        f"{pair}, 1e-3",
        f"{pair}, -1",
    ):
        assert len([*paste(s, f"WEIGHTS, CENTERS, STD = {data}").faults()]) == 1, data


def test_many_levels_by_another_quadrature():
    """200 levels: even nodes, straight lines on one grid and on one twice as fine, extrapolated."""
    x = np.array([-2.0, 0.0, 0.2, 0.25, 0.3, 1.5])
    nodes, (w, c) = np.arange(-6.0, 7.0)[:, None, None], np.array([[0.6, 0.4], [-1, 1]])[..., None]
    results = []
    for size in (1401, 2801):
        points = values = np.linspace(-4, 4, size)
        for k in range(1, 201):
            t = k / 200
            variance = 1 / (1 / 0.09 + (1 - t) ** 2 / t**2)
            x_0 = variance * (c / 0.09 + (1 - t) * points / t**2) + variance**0.5 * nodes
            f = np.interp(points + (x_0 - points) / k, points, values)
            means = (np.exp(-(nodes**2) / 2) / (2 * np.pi) ** 0.5 * f).sum(axis=0)
            logs = np.log(w) - (points - (1 - t) * c) ** 2 / (0.18 * (1 - t) ** 2 + 2 * t**2)
            values = (np.exp(logs - np.logaddexp(*logs)) * means).sum(axis=0)
        results.append(np.interp(x, points, values))
    want = (4 * results[1] - results[0]) / 3
    np.testing.assert_allclose(s.consistent(x, 200), want, rtol=0, atol=3e-4)


# Of one Gaussian's draws all is linear: the map, the velocity, perfect consistency training.
ONE = paste(s, "WEIGHTS, CENTERS, STD = (1.0,), (0.0,), 0.3")
PERFECT = torch.cat([ONE.consistent([1.0], 4, k) for k in range(5)])


def velocity(x, t):
    return ((1 - t) * 0.09 - t) / ((1 - t) ** 2 * 0.09 + t**2) * x


def exact(x, t, r):
    """u(x, t, r)."""
    slope = (ONE.std(r) / ONE.std(t) - 1) / (t - r).clamp(min=1e-9)
    return torch.where(t > r, slope * x, velocity(x, t))


def perfect(x, t, r):
    """u(x, t, 0) of f_k."""
    return (PERFECT[(4 * t).round().long()] - 1) / t.clamp(min=1e-9) * x


LOSSES = {
    "velocity": (s.velocity_loss, exact),
    "consistency": (partial(s.consistency_loss, num_levels=4), perfect),
    "MeanFlow": (s.mean_flow_loss, exact),
    "distilled": (partial(s.distillation_loss, velocity=velocity), exact),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_stop_at_their_fixed_points(name):
    """By Monte Carlo, with x_0 - x_1 in place of v: the mean gradient is 0; not so 5 % away."""
    loss, solution = LOSSES[name]
    for size, still in ((0.0, True), (0.05, False)):
        gradients, values, generator = [], [], torch_rng(1)
        for _ in range(30):
            theta = torch.tensor([size, 0.0], requires_grad=True)

            def u(x, t, r, theta=theta):
                return (1 + theta[0]) * solution(x, t, r) + theta[1] * t * x

            x_0 = 0.3 * torch.randn(3000, 1, generator=generator)
            value = loss(u, x_0, torch.randn(3000, 1, generator=generator), generator)
            value.backward()
            gradients.append(theta.grad)
            values.append(value.item())
        gradients = torch.stack(gradients)
        z = gradients.mean(dim=0) / (gradients.std(dim=0) / 30**0.5 + 1e-4)
        wrong = "pushes away from its fixed point" if still else "does not push back to it"
        assert (z.abs().max() < 5) == still, f"{name}: the loss {wrong}"
        # Distillation has no noise: at the map its loss is 0, not small in the mean.
        assert not still or (max(values) < 1e-3) == (name == "distilled"), f"{name}: noise"


def test_training(spy):
    """Of the velocity, for a second: near E[x_0 - x_1 | x_t].  A start is kept as it was."""
    draws = spy(s, "mixture")
    network = s.train(s.velocity_loss, train_steps=150, rng=torch_rng(), batch_size=128)
    assert {call.n for call in draws} == {128}
    x, t = torch.linspace(-1.5, 1.5, 7)[:, None], torch.full((7, 1), 0.6)
    v = network.velocity(x, t)
    assert (v - s.exact_velocity(x, t)).abs().max() < 0.5
    rates = {"train_steps": 40, "learning_rate": 1e-6, "start": network, "batch_size": 9}
    other = s.train(s.velocity_loss, rng=torch_rng(1), **rates)
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

    x, near = s.STARTS, partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)
    assert sorted(s.FRESH.tolist()) == x.tolist()
    assert abs((x * s.FRESH).mean()) < 0.01
    euler = x + (110 + x) / 2
    near(s.sample("velocity", u, 2), euler + (55 + euler) / 2, msg="Euler: u(x_t, t, t)")
    near(s.sample("MeanFlow", u, 2), jump(jump(x, 1, 0.5), 0.5, 0), msg="jump: u(x_t, t, t - dt)")
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
    """{color: its last line's points}, of a panel."""
    return {to_hex(line.get_color()).upper(): line.get_xydata().tolist() for line in ax.lines}


def test_drawn():
    times, paths = s.trajectories(12, 5)
    assert np.allclose(paths[3], s.flow_map(paths[0], 1, times[3]), atol=1e-9)
    panels = s.draw_idea(times, paths, 7 + paths[0]).axes
    for ax, ends, color in zip(panels, (7 + paths[0], paths[-1]), (s.ORANGE, "k")):
        assert np.array_equal([line.get_ydata() for line in ax.lines], paths.T)
        assert len(ax.texts) == 2
        for k, arrow in zip((2, 7), ax.texts):
            assert (arrow.xyann, arrow.xy) == ((1, paths[0, k]), (0, ends[k]))
            assert arrow.arrow_patch.get_edgecolor() == to_rgba(color)

    x = [k + torch.arange(4000, dtype=torch.float64) for k in range(4)]
    y = [torch.stack([s.STARTS, x_0], dim=1).tolist() for x_0 in x]
    first, second = s.draw_maps({"MeanFlow": x[0], "c": x[1]}, {"c": x[2]}, x[3]).axes
    assert curves(first) == {"#000000": y[3], s.BLUE: y[0]}
    assert curves(second) == {"#000000": y[3], s.BLUE: y[1], "#999999": y[2]}

    by_steps = {"velocity": {1: 4, 3: 3}, "MeanFlow": {1: 2.5, 3: 7}, "distilled": {1: 2, 3: 8}}
    left, right = map(curves, s.draw_errors({2: 6, 5: 5}, {5: 9}, by_steps).axes)
    assert (left["#000000"], left[s.BLUE]) == ([[2, 6], [5, 5]], [[5, 9]])
    assert [left[color][0][1] for color in (s.PINK, s.GREEN)] == [2.5, 2]
    wanted = {s.ORANGE: [[1, 4], [3, 3]], s.PINK: [[1, 2.5], [3, 7]], s.GREEN: [[1, 2], [3, 8]]}
    assert right == wanted


def numbers(row):
    return [float(cell) for cell in row if cell.replace(".", "").isdigit()]


def test_main(tmp_path, monkeypatch, spy):
    """Once, small: each number printed and drawn is that of the network in its row."""
    saved, few = [], {"LEVELS": [2, 5], "STEPS": [1, 3], "MANY": 9}
    few |= {"STARTS": s.STARTS[10::20], "FRESH": s.STARTS[10::20].flip(0) ** 3}
    few |= {"grid": partial(s.grid, n=801), "trajectories": partial(s.trajectories, num_times=3)}
    for name, value in few.items():
        monkeypatch.setattr(s, name, value)
    monkeypatch.setattr(Figure, "savefig", lambda _, path, **__: saved.append(path.stem))
    learned, tables, trained = spy(s, "learn"), spy(s, "table"), spy(s, "train")
    idea, maps, errors = (spy(s, f"draw_{name}") for name in ("idea", "maps", "errors"))
    options = "--train-steps 3 --num-levels 4 --more-steps 2 --seed 5"
    s.main([*options.split(), "--figures-dir", str(tmp_path)])
    assert saved == ["idea", "maps", "error"]

    networks, twins = [*learned[0].result.values()], s.flow_map(s.STARTS, 1, 0)
    assert learned[0].rng.initial_seed() == 5
    losses = [call.loss for call in trained]
    assert (losses[0], losses[3], losses[5]) == (s.velocity_loss, *[s.mean_flow_loss] * 2)
    assert [loss.keywords["num_levels"] for loss in losses[1:3]] == [4, 9]
    assert losses[4].keywords["velocity"] == networks[0].velocity
    given = [(call.train_steps, call.batch_size, call.start) for call in trained]
    assert given[:4] == [(3, 512, None), (3, 256, None), (4, 256, None), (4, 512, None)]
    assert given[4:] == [(3, 256, networks[0]), (2, 512, networks[4])]

    (_, *rows), (levels, perfect), (steps, *by_steps) = (table.rows for table in tables)
    fixed = {1: s.perfect(4), 2: s.perfect(9)}
    pairs = [
        [s.sample("" if k else "velocity", u, n, {1: 4, 2: 9}.get(k)) for n in (1, 2)]
        for k, u in enumerate(networks)
    ]
    pairs.append([twins, s.flow_map((twins + s.FRESH) / 2, 0.5, 0)])
    one_jump = [one for one, _ in pairs]
    assert len(rows) == len(pairs)
    for k, row in enumerate(rows):
        found = [pairs[k], fixed[k]] if k in fixed else [pairs[k]]
        want = [e for x, y in found for e in (*s.apart(x, twins), s.apart_as_laws(y, twins))]
        assert numbers(row[1:]) == pytest.approx(want, abs=6e-5)
    assert all(map(torch.equal, maps[0].samples.values(), one_jump[1:]))
    assert all(map(torch.equal, maps[0].fixed_points.values(), (fixed[1][0], fixed[2][0])))
    assert torch.equal(maps[0].twins, twins)

    exact = {n: s.apart(s.consistent(s.STARTS, n), twins)[0] for n in (2, 4, 5, 9)}
    assert errors[0].by_levels == pytest.approx(exact)
    assert errors[0].learned == {n: s.apart(one_jump[k], twins)[0] for k, n in ((1, 4), (2, 9))}
    assert dict(zip(numbers(levels), numbers(perfect))) == pytest.approx(exact, abs=6e-5)
    assert numbers(steps) == [1, 3]
    drawn = errors[0].by_steps
    for k, name, row in zip((0, 3, 4), ("velocity", "MeanFlow", "distilled"), by_steps):
        want = [s.apart(s.sample(name, networks[k], n), twins)[0] for n in (1, 3)]
        assert numbers(row) == pytest.approx(want, abs=6e-5)
        assert [*drawn[name].values()] == want
    # At t = 1 nothing is known of x_0: one Euler step ends at the mean of the data.
    torch.testing.assert_close(idea[0].euler, torch.full_like(idea[0].euler, s.MEAN))
