"""Experiment 4 held to references that share no code with it."""

import math
import re
from functools import partial

import flow_matching as s
import numpy as np
import pytest
import torch
from conftest import paste, snippet, torch_rng

PINK, GREEN, BLUE, GREY = "#CC79A7", "#009E73", "#0072B2", "0.7"


def assert_zero_mean(values, message):
    """values: (n, ...), independent rows: their mean is 0 within 5 standard errors."""
    within = values.mean(dim=0).abs() <= 5 * values.std(dim=0) / len(values) ** 0.5 + 1e-12
    assert within.all(), message


def brute_force_velocity(m, x_t, t):
    """(E[x_0 | x_t] - x_t) / t for one x_t, a complex number: a plain sum over x_1, in NumPy.

    Its weights are the density of x_0 = (x_t - t x_1) / (1 - t), a sum over theta.
    """
    theta = m.END * (torch.arange(500).double() + 0.5) / 500
    curve = torch.view_as_complex(m.curve(theta).contiguous()).numpy()
    width = m.NOISE * (1 - t) / t
    reach, center = (abs(curve).max() + 7 * m.NOISE) * (1 - t) / t, abs(x_t) / t
    low, high = max(m.INNER, center - reach), min(m.OUTER, center + reach)
    nodes, weights = np.polynomial.legendre.leggauss(20 + int(2 * (high - low) / width))
    half = math.asin(reach / center) if reach < center else math.pi
    count = 20 + int(2 * m.OUTER * half / width)
    angles = np.angle(x_t) + half * np.linspace(-1, 1, count, endpoint=False)
    radii = low + (high - low) * (nodes + 1) / 2
    x_1 = np.exp(1j * angles) * radii[:, None]
    x_0 = (x_t - t * x_1) / (1 - t)
    density = sum(np.exp(-(abs(c - x_0) ** 2) / (2 * m.NOISE**2)) for c in curve)
    return (np.average(x_0, weights=density * weights[:, None]) - x_t) / t


DATA = [
    "NOISE = 0.1",
    "END = 2 * math.pi\nNOISE = 0.3\nINNER, OUTER = 1.0, 2.5\n"
    "def curve(theta):\n    return torch.stack([2 + theta.cos(), 0.5 * theta.sin() - 1], dim=1)\n",
    "NOISE = 0.3\nINNER, OUTER = 7.5, 9.0\ndef curve(theta):\n"
    "    direction = torch.stack([theta.cos(), theta.sin()], dim=1)\n"
    "    return 3 * direction * theta[:, None] / (2 * math.pi)\n",
]


@pytest.mark.parametrize("code", DATA)
def test_the_truth_follows_the_data(code):
    """Draws, moments, exact velocity and preconditioning, for any curve and ring."""
    m = paste(s, code)
    assert m.faults() == []
    n = 10_000
    for t in (0.25, torch.rand(n, 1, generator=torch_rng())):
        x_t, velocity = m.lines(n, t, torch_rng(1))
        x_1, x_0 = x_t - (1 - t) * velocity, x_t + t * velocity
        for x, square in ((x_0, m.SQUARE_0), (x_1, m.SQUARE_1)):
            assert_zero_mean(x.square().sum(dim=1) - square, "E|x_0|^2 or E|x_1|^2")
        middle = x_0 - x_0.mean(dim=0)
        assert_zero_mean(middle[:, :, None] * x_1[:, None], "x_0 and x_1 are independent")

    theta = m.END * (torch.arange(20_000).double() + 0.5) / 20_000
    first = m.exact_velocity(x_1[:9], 1.0)
    assert first is not None, "exact_velocity: return E[x_0 - x_1 | x_t] at each x_t, (n, 2)"
    assert (first + x_1[:9] - m.curve(theta).mean(dim=0)).abs().max() < 1e-4 * m.SIZE, (
        "at t = 1 the velocity leads to E[x_0]"
    )
    for t in (0.05, 0.5, 0.95):
        x_t, target = m.lines(2000, t, torch_rng(2))
        got = m.exact_velocity(x_t, t)
        want = brute_force_velocity(m, complex(*x_t[0].tolist()), t)
        off = abs(complex(*got[0].tolist()) - want)
        assert off < 1e-4 * m.SIZE, "exact_velocity is not E[x_0 - x_1 | x_t]"
        assert_zero_mean((target - got) * torch.sin(x_t / m.SIZE), "exact_velocity is not the mean")
        assert torch.allclose(m.exact_velocity(x_t[150:450], t), got[150:450])

        network = m.Velocity().requires_grad_(False)
        network.layers[-1].weight.zero_()
        network.layers[-1].bias.zero_()
        miss = target - network(x_t, t)
        assert_zero_mean((miss * x_t).sum(dim=1), "c_skip x_t is the best multiple")
        network.layers[-1].bias.fill_(1)
        c_out = (network(torch.zeros(1, 2), t)).square().mean()
        assert_zero_mean(miss.square().mean(dim=1) - c_out, "c_out is its error")

    m.curve = lambda theta: torch.stack([theta, 0 * theta], dim=1)
    x, y = (m.spiral(n, torch_rng(3)) - torch.tensor([m.END / 2, 0])).T
    moments = [x, x**2 - m.END**2 / 12 - m.NOISE**2, y, y**2 - m.NOISE**2]
    assert_zero_mean(torch.stack(moments, dim=1), "theta is uniform, the curve blurred by NOISE")


RINGS = [  # half of one; too narrow; not uniform in radius
    "    u = math.pi * torch.rand(2, n, generator=rng)\n    radius = 2.5 + 0.5 * u[1] / math.pi\n"
    "    return (radius * torch.stack([u[0].cos(), u[0].sin()])).T\n",
    "    x = torch.randn(n, 2, generator=rng)\n    return 2.7 * x / x.norm(dim=1, keepdim=True)\n",
    "    return torch.randn(n, 2, generator=rng)\n",
]


def test_what_it_cannot_do():
    assert len(paste(s, "NOISE = 0.0").faults()) == 1
    assert len(paste(s, "INNER, OUTER = 3.0, 2.0").faults()) == 1
    for ring in RINGS:
        assert len(paste(s, f"def annulus(n, rng):\n{ring}").faults()) == 1


def test_flow():
    """dx = -x t dt, step by step: a product."""
    x_1 = torch.randn(9, 2, generator=torch_rng())
    assert s.flow(torch.mul, x_1, 5) is not None, "flow: yield x_t after every step"
    got = s.trajectories("", torch.mul, x_1, 5)
    factors = [math.prod(1 + (5 - j) / 5 / 5 for j in range(k)) for k in range(6)]
    assert torch.allclose(got, torch.tensor(factors)[:, None, None] * x_1), (
        "flow: x_t + v_t(x_t) dt"
    )


def test_it_learns(spy):
    calls = spy(s, "lines")
    velocity, losses = s.train(train_steps=100, rng=torch_rng(3), batch_size=400)
    t = torch.cat([call.t for call in calls])
    assert_zero_mean(torch.cat([t - 0.5, (t - 0.5) ** 2 - 1 / 12], dim=1), "t is uniform")
    assert len(losses) == 100
    assert 5.5 < np.mean(losses[-20:]) < 6.8
    one, other = (s.train(train_steps=1, rng=torch_rng(k), batch_size=2)[0] for k in (4, 5))
    assert (one.frequencies != other.frequencies).any(), "first weights follow the generator"
    errors, squares = np.array(s.measure(velocity, torch_rng(4), n=200))
    assert errors.sum() < 0.2 * squares.sum()
    assert (errors < 0.1 * squares)[3:].all()


def test_measuring(monkeypatch):
    """Were v_t(x) = 2 x + (3, 0) and the error (0.3, 0.4); were v_t(x) = x."""

    def square(t):
        return t**2 * 91 / 12 + (1 - t) ** 2 * 3.02  # E|x_t|^2

    v, f = torch.tensor([[3, 0], [3.3, 0.4]])
    monkeypatch.setattr(s, "exact_velocity", lambda x_t, t: 2 * x_t + v)
    errors, squares = s.measure(lambda x_t, t: 2 * x_t + f, torch_rng(5), n=20_000)
    assert errors == pytest.approx([0.25] * 6, rel=1e-4)
    assert squares == pytest.approx([4 * square(t) + 9 for t in s.TIMES], rel=0.03)
    monkeypatch.setattr(s, "exact_velocity", lambda x_t, t: x_t)
    want = square(0) + square(1) - np.mean([square(t) for t in (1 / 6, 1 / 2, 5 / 6)])
    assert s.least_loss(torch_rng(8), num_times=3, n=50_000) == pytest.approx(want, abs=0.05)
    x = torch.tensor([[0.0, 0.0], [0.3, 0.5], [0.0, 0.49]])
    assert s.apart(x, torch.zeros(3, 2)) == pytest.approx((0.49, 1 / 3))


def test_crossing():
    place, ends = s.crossing(torch_rng(6), n=50_000, num_lines=30)
    assert ends.shape == (2, 30, 2)
    assert ((ends.mean(dim=0) - place).norm(dim=1) < 0.15).all(), "lines pass the place at t = 0.5"
    assert ((ends[0].norm(dim=1) - 2.75).abs() < 0.25 + 1e-5).all()
    goal = place + s.exact_velocity(place[None], 0.5)[0] / 2
    assert (goal - s.POINTS).norm(dim=1).min() > 0.2, "the mean of the ends is off the curve"


def data(ax, **want):
    """(n, points, 2): the lines of a panel whose properties are these."""
    lines = (a for a in ax.lines if all(getattr(a, f"get_{k}")() == v for k, v in want.items()))
    return torch.tensor(np.array([line.get_xydata() for line in lines])).float()


def test_draw_trajectories():
    paths, twins, ends = 3 * torch.rand(3, 6, 25, 2, generator=torch_rng(9))
    place, *means = torch.rand(3, 2, generator=torch_rng(10))
    left, plane, radius = s.draw_trajectories(place, ends[:2], means, paths, twins).axes
    lines = data(left, color=PINK, linestyle="-")
    assert torch.equal(lines, ends[:2].transpose(0, 1))
    for color, x_t, mean in ((GREY, twins, means[0]), (BLUE, paths, means[1])):
        assert torch.equal(data(left, color=color)[0], torch.stack([place, mean]))
        x_t = x_t[:, :20].transpose(0, 1)
        assert torch.equal(data(plane, color=color), x_t)
        want = torch.stack([torch.linspace(1, 0, 6).expand(20, 6), x_t.norm(dim=2)], dim=2)
        assert torch.equal(data(radius, color=color), want)
    for ax, (x_1, x_0) in ((left, ends[:2]), (plane, paths[[0, -1], :20])):
        assert torch.equal(data(ax, color=PINK, marker=".")[0], x_1)
        assert torch.equal(data(ax, color=GREEN, marker=".")[0], x_0)
        curve = data(ax, color=GREEN, linestyle="-").norm(dim=2)[0]
        assert (curve[0], curve[-1]) == (0, pytest.approx(3))
    assert radius.get_xlim() == (1, 0)


def test_draw_data_and_loss():
    (ax,) = s.draw_data(torch.ones(3, 2), torch.zeros(4, 2)).axes
    to_hex = s.plt.matplotlib.colors.to_hex
    sums = {to_hex(dots.get_facecolor()[0]): dots.get_offsets().sum() for dots in ax.collections}
    assert sums == {PINK.lower(): 0, GREEN.lower(): 6}
    (ax,) = s.draw_loss([float(k**2) for k in range(100)], 4.256).axes
    assert data(ax, color="0.8")[0, 7].tolist() == [7, 49]
    assert data(ax, color=BLUE)[0, 7].tolist() == [8, 56.5]
    (exact,) = (line for line in ax.lines if line.get_color() == "k")
    assert set(exact.get_ydata()) == {4.256}


def test_animate():
    """The points at each time, brighter than what is around; at rest at both ends."""
    paths = torch.linspace(1, 0.2, 41)[:, None, None] * s.annulus(5, torch_rng(11))
    frames = s.animate(paths, num_frames=5)
    starts = [k for k, frame in enumerate(frames) if k == 0 or frame is not frames[k - 1]]
    assert len(starts) == 5
    assert len(frames) - starts[-1] > starts[1] > 2, "it rests at the start, and longer at the end"
    for k, first in enumerate(starts):
        picture = np.asarray(frames[first].convert("RGB")).sum(axis=2)
        height, width = picture.shape
        now, other = 10 * k, 10 * ((k + 2) % 5)
        points = paths[[now, max(0, now - 1), other]] / s.LIMITS[1]
        x, y = (1 + points.numpy().T) / 2
        light = picture[((1 - y) * height).astype(int), (x * width).astype(int)]
        assert (light[:, 0] > 150).all(), "the points"
        assert (light[:, 1] > 100).all(), "their tails"
        assert (light[:, 2] < 150).any(), "not where they are at another time"


def numbers(text):
    return [float(x) for x in re.findall(r"\d+\.\d+", text)]


def test_main(tmp_path, capsys, monkeypatch, spy):
    """With the page's data: what is measured, of what; each number and figure where it belongs."""
    m = paste(s, snippet(s))
    monkeypatch.setattr(m.plt.Figure, "savefig", lambda *_, **__: None)
    few = {"measure": {"n": 50}, "crossing": {"n": 1000}, "animate": {"num_frames": 2}}
    for name, less in {**few, "least_loss": {"n": 50, "num_times": 2}}.items():
        monkeypatch.setattr(m, name, partial(getattr(m, name), **less))
    names = "train trajectories apart crossing animate draw_data draw_loss draw_trajectories"
    calls = {name: spy(m, name) for name in f"{names} measure least_loss table".split()}
    options = "--train-steps 20 --num-steps 3 --num-samples 40 --seed 7"
    m.main(f"--figures-dir {tmp_path} {options}".split())
    (trained,), (run, twin) = calls["train"], calls["trajectories"]
    (apart,), (drawn,) = calls["apart"], calls["draw_trajectories"]
    (data,) = calls["draw_data"]
    velocity, losses = trained.result
    assert torch.equal(trained.rng.get_state(), torch_rng(7).get_state())
    assert len(losses) == 20
    assert (run.num_steps, twin.num_steps, len(run.x_1)) == (3, 3, 40)
    assert torch.equal(run.x_1, twin.x_1)
    for call, f in ((run, velocity), (twin, m.exact_velocity)):
        x_t = run.x_1 + f(run.x_1, 1.0) / 3
        assert torch.allclose(call.result[1].double(), x_t.double(), atol=1e-5), "other velocity"
    assert torch.equal(apart.x_0, run.result[-1])
    assert torch.equal(apart.twins, twin.result[-1])
    assert torch.equal(calls["animate"][0].paths, run.result)
    place, ends = calls["crossing"][0].result
    for got, want in [(drawn.paths, run.result), (drawn.twins, twin.result), (drawn.ends, ends)]:
        assert torch.equal(got, want)
    for mean, f in zip(drawn.means, (m.exact_velocity, velocity)):
        assert torch.allclose(mean, (place + f(place[None], 0.5)[0] / 2).to(mean.dtype))
    assert data.x_0.norm(dim=1).mean() < 2 < data.x_1.norm(dim=1).min()
    least = calls["least_loss"][0].result
    assert (calls["draw_loss"][0].losses, calls["draw_loss"][0].least) == (losses, least)

    errors, squares = np.array(calls["measure"][0].result)
    means = [np.append(row, row.mean()) for row in (errors, squares)]
    times, *rows = [numbers(" ".join(row[1:])) for row in calls["table"][0].rows]
    assert times == m.TIMES
    for row, want, off in zip(rows, (*means, 100 * means[0] / means[1]), (5e-5, 5e-3, 5e-3)):
        assert row == pytest.approx(want, abs=off)
    loss, *_, distance, _ = map(numbers, capsys.readouterr().out.splitlines())
    assert loss == [pytest.approx(np.mean(losses[-2:]), abs=5e-3), pytest.approx(least, abs=5e-3)]
    median, far = apart.result
    assert distance == [pytest.approx(median, abs=5e-5), pytest.approx(100 * far, abs=0.05), 0.5]
