"""Experiment 4 held to references that share no code with it."""

import math
import re

import flow_matching as s
import numpy as np
import pytest
import torch
from conftest import paste, snippet, torch_rng

PINK, GREEN, BLUE, GREY = "#CC79A7", "#009E73", "#0072B2", "0.7"


def assert_zero_mean(values, message=""):
    """values: (n, ...), independent rows: their mean is 0 within 5 standard errors."""
    within = values.mean(dim=0).abs() <= 5 * values.std(dim=0) / len(values) ** 0.5 + 1e-12
    assert within.all(), message


def brute_force_velocity(m, x_t, t):
    """(E[x_0 | x_t] - x_t) / t for one x_t, a complex number: a plain sum over x_1, in NumPy.

    Its weights are the density of x_0 = (x_t - t x_1) / (1 - t), a sum over theta.
    """
    theta = m.END * (torch.arange(700).double() + 0.5) / 700
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
    logs = np.array([-(abs(c - x_0) ** 2) / (2 * m.NOISE**2) for c in curve])
    density = np.exp(logs).sum(axis=0)
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
    n = 50_000
    for t in (0.25, torch.rand(n, 1, generator=torch_rng())):
        x_t, velocity = m.lines(n, t, torch_rng(1))
        x_1, x_0 = x_t - (1 - t) * velocity, x_t + t * velocity
        radius = (x_1.norm(dim=1) - m.INNER) / (m.OUTER - m.INNER)
        assert (radius - 0.5).abs().max() < 0.5 + 1e-4, "x_1 lies between INNER and OUTER"
        assert_zero_mean(torch.stack([radius - 1 / 2, radius**2 - 1 / 3], dim=1), "|x_1|")
        assert_zero_mean(torch.cat([x_1, x_1.prod(dim=1)[:, None]], dim=1), "x_1 is round")
        for x, square in ((x_0, m.SQUARE_0), (x_1, m.SQUARE_1)):
            assert_zero_mean(x.square().sum(dim=1) - square, "E|x_0|^2 or E|x_1|^2")
        middle = x_0 - x_0.mean(dim=0)
        assert_zero_mean(middle[:, :, None] * x_1[:, None], "x_0 and x_1 are independent")
    theta = m.END * (torch.arange(20_000).double() + 0.5) / 20_000
    for k in (0.5, 2j, 3 + 4j, 9 - 5j):  # the characteristic function of x_0
        k = k / m.SIZE
        wave = [
            torch.exp(1j * (k * torch.view_as_complex(x.double().contiguous())).real)
            for x in (x_0, m.curve(theta))
        ]
        difference = wave[0] - wave[1].mean() * math.exp(-((m.NOISE * abs(k)) ** 2) / 2)
        assert_zero_mean(torch.view_as_real(difference), "the curve, blurred by NOISE")

    first = m.exact_velocity(x_1[:9], 1.0) + x_1[:9] - m.curve(theta).mean(dim=0)
    assert first.abs().max() < 1e-4 * m.SIZE, "at t = 1 the velocity leads to E[x_0]"
    for t in (0.05, 0.5, 0.95):
        x_t, target = m.lines(4000, t, torch_rng(2))
        got = m.exact_velocity(x_t, t)
        want = [brute_force_velocity(m, complex(*x), t) for x in x_t[:2].tolist()]
        off = np.abs(torch.view_as_complex(got[:2]).numpy() - want).max()
        assert off < 1e-4 * m.SIZE, "exact_velocity is not E[x_0 - x_1 | x_t]"
        assert_zero_mean((target - got) * torch.sin(x_t / m.SIZE), "exact_velocity is not the mean")
        assert torch.allclose(m.exact_velocity(x_t[150:450], t), got[150:450])

        network = m.Velocity().requires_grad_(False)
        network.layers[-1].weight.zero_()
        network.layers[-1].bias.zero_()
        miss = ((target - network(x_t, t)) * x_t).sum(dim=1)
        assert_zero_mean(miss, "c_skip x_t is the best multiple")
        error = (target - network(x_t, t)).square()
        network.layers[-1].bias.fill_(1)
        c_out = (network(torch.zeros(1, 2), t)).square().mean()
        assert_zero_mean(error.mean(dim=1) - c_out, "c_out is its error")


@pytest.mark.parametrize(
    ("code", "word"),
    [
        ("NOISE = 0.0", "NOISE"),
        ("INNER, OUTER = 3.0, 2.0", "annulus"),
        (
            "def annulus(n, rng):\n    angle = math.pi * torch.rand(n, generator=rng)\n"
            "    return 2.7 * torch.stack([angle.cos(), angle.sin()], dim=1)\n",
            "annulus",
        ),
        ("def annulus(n, rng):\n    return torch.randn(n, 2, generator=rng)\n", "annulus"),
    ],
)
def test_what_it_cannot_do(code, word, capsys, tmp_path):
    with pytest.raises(SystemExit) as end:
        paste(s, code).main(["--figures-dir", str(tmp_path / "new")])
    assert end.value.code == 2
    assert word in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "new").exists()


def test_flow():
    """dx = -x t dt, step by step: a product."""
    x_1 = torch.randn(9, 2, generator=torch_rng())
    got = s.trajectories("", lambda x_t, t: x_t * t, x_1, 5)
    factors = [math.prod(1 + (5 - j) / 5 / 5 for j in range(k)) for k in range(6)]
    assert torch.allclose(got, torch.tensor(factors)[:, None, None] * x_1)


def test_it_learns(spy):
    calls = spy(s, "lines")
    velocity, losses = s.train(train_steps=100, rng=torch_rng(3), batch_size=512)
    t = torch.cat([call.t for call in calls])
    assert_zero_mean(torch.cat([t - 0.5, (t - 0.5) ** 2 - 1 / 12], dim=1), "t is uniform")
    assert len(losses) == 100
    assert 5.5 < np.mean(losses[-20:]) < 6.8
    again, _ = s.train(train_steps=1, rng=torch_rng(4), batch_size=2)
    other, _ = s.train(train_steps=1, rng=torch_rng(5), batch_size=2)
    assert (again.frequencies != other.frequencies).any(), "first weights follow the generator"
    errors, squares = np.array(s.measure(velocity, torch_rng(4), n=300))
    assert errors.sum() < 0.2 * squares.sum()
    assert (errors < 0.05 * squares)[3:].all()


def test_measuring(monkeypatch):
    """Were v_t(x) = 2 x + (3, 0) and the error (0.3, 0.4); were v_t(x) = x."""
    squares = [t**2 * 91 / 12 + (1 - t) ** 2 * 3.02 for t in s.TIMES]  # E|x_t|^2
    v, f = torch.tensor([[3, 0], [3.3, 0.4]])
    monkeypatch.setattr(s, "exact_velocity", lambda x_t, t: 2 * x_t + v)
    found = s.measure(lambda x_t, t: 2 * x_t + f, torch_rng(5), n=20_000)
    assert found[0] == pytest.approx([0.25] * 6, rel=1e-4)
    assert found[1] == pytest.approx([4 * square + 9 for square in squares], rel=0.03)
    monkeypatch.setattr(s, "exact_velocity", lambda x_t, t: x_t)
    want = (
        91 / 12
        + 3.02
        - np.mean([t**2 * 91 / 12 + (1 - t) ** 2 * 3.02 for t in (1 / 6, 1 / 2, 5 / 6)])
    )
    assert s.least_loss(torch_rng(8), num_times=3, n=50_000) == pytest.approx(want, abs=0.05)
    x = torch.tensor([[0.0, 0.0], [0.3, 0.5], [0.0, 0.49]])
    assert s.apart(x, torch.zeros(3, 2)) == pytest.approx((0.49, 1 / 3))


def test_crossing():
    place, ends = s.crossing(torch_rng(6))
    assert ends.shape == (2, 100, 2)
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


def test_animate(spy):
    """The points at each time, brighter than what is around; at rest at both ends."""
    x_1 = s.annulus(5, torch_rng(11))
    paths = torch.linspace(1, 0.2, 41)[:, None, None] * x_1
    frames = s.animate(paths, num_frames=5)
    starts = [k for k, frame in enumerate(frames) if k == 0 or frame is not frames[k - 1]]
    assert len(starts) == 5
    assert starts[1] > 2, "it rests before the first step"
    assert len(frames) - starts[-1] > starts[1], "it rests longer after the last"
    for k, first in enumerate(starts):
        picture = np.asarray(frames[first].convert("RGB")).sum(axis=2)
        height, width = picture.shape
        now, other = paths[10 * k], paths[10 * ((k + 2) % 5)]
        low, high = s.LIMITS
        x, y = ((now - low) / (high - low)).T.numpy()
        assert (picture[((1 - y) * height).astype(int), (x * width).astype(int)] > 150).all()
        x, y = ((other - low) / (high - low)).T.numpy()
        assert (picture[((1 - y) * height).astype(int), (x * width).astype(int)] < 150).any()


def test_main(tmp_path, capsys, monkeypatch, spy):
    """What is measured, of what; each number and figure where it belongs."""
    monkeypatch.setattr(s.plt.Figure, "savefig", lambda *_, **__: None)
    for name, few in (("measure", {"n": 50}), ("least_loss", {"num_times": 2, "n": 50})):
        original = getattr(s, name)
        monkeypatch.setattr(s, name, lambda *args, f=original, few=few: f(*args, **few))
    names = "train trajectories apart crossing animate draw_data draw_loss draw_trajectories"
    names += " measure least_loss report table"
    calls = {name: spy(s, name) for name in names.split()}
    s.main(f"--figures-dir {tmp_path} --train-steps 20 --num-steps 3 --num-samples 40".split())
    velocity, losses = calls["train"][0].result
    assert len(losses) == 20
    run, twin = calls["trajectories"]
    assert (run.num_steps, twin.num_steps) == (3, 3)
    assert torch.equal(run.x_1, twin.x_1)
    assert len(run.x_1) == 40
    x_t = run.x_1 + velocity(run.x_1, 1.0) / 3
    assert torch.allclose(run.result[1], x_t, atol=1e-5), "paths follow the network"
    twin_t = run.x_1 + s.exact_velocity(run.x_1, 1.0) / 3
    assert torch.allclose(twin.result[1], twin_t, atol=1e-5), "twins, the exact velocity"
    (apart,) = calls["apart"]
    assert torch.equal(apart.x_0, run.result[-1])
    assert torch.equal(apart.twins, twin.result[-1])
    assert torch.equal(calls["animate"][0].paths, run.result)
    drawn = calls["draw_trajectories"][0]
    place, ends = calls["crossing"][0].result
    assert torch.equal(drawn.paths, run.result)
    assert torch.equal(drawn.twins, twin.result)
    assert torch.equal(drawn.ends, ends)
    for mean, f in zip(drawn.means, (s.exact_velocity, velocity)):
        assert torch.allclose(mean, (place + f(place[None], 0.5)[0] / 2).to(mean.dtype))
    x_0, x_1 = calls["draw_data"][0].x_0, calls["draw_data"][0].x_1
    assert x_0.norm(dim=1).min() < 1 < 2 < x_1.norm(dim=1).min()
    least = calls["least_loss"][0].result
    assert (calls["draw_loss"][0].losses, calls["draw_loss"][0].least) == (losses, least)
    assert (tmp_path / "scatter.gif").stat().st_size > 1000

    errors, squares = np.array(calls["measure"][0].result)
    means = [np.append(row, row.mean()) for row in (errors, squares)]
    rows = [
        [float(cell.strip("%")) for cell in row[1:] if cell != "mean"]
        for row in calls["table"][0].rows
    ]
    assert rows[0] == s.TIMES
    for row, want, off in zip(rows[1:], (*means, 100 * means[0] / means[1]), (5e-5, 5e-3, 5e-3)):
        assert row == pytest.approx(want, abs=off)
    loss, *_, distance, _ = capsys.readouterr().out.splitlines()
    loss, distance = (
        [float(x) for x in re.findall(r"\d+\.\d+", line)] for line in (loss, distance)
    )
    assert loss == [pytest.approx(np.mean(losses[-2:]), abs=5e-3), pytest.approx(least, abs=5e-3)]
    median, far = apart.result
    assert distance == [pytest.approx(median, abs=5e-5), pytest.approx(100 * far, abs=0.05), 0.5]


def test_change_it_yourself(tmp_path, monkeypatch):
    """The page's block: main runs, and v_t is its own data's."""
    m = paste(s, snippet(s))
    monkeypatch.setattr(m.plt.Figure, "savefig", lambda *_, **__: None)
    m.measure, m.least_loss = lambda *_: ([1.0] * 6, [1.0] * 6), lambda _: 1.0
    m.main(
        ["--figures-dir", str(tmp_path), *"--train-steps 2 --num-steps 2 --num-samples 9".split()]
    )
    x_t, target = m.lines(4000, 0.4, torch_rng())
    assert_zero_mean((target - m.exact_velocity(x_t, 0.4)) * torch.sin(x_t))
