"""Experiment 4 held to references that share no code with it."""

import math
from unittest.mock import Mock

import flow_matching as s
import numpy as np
import pytest
import torch


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def assert_zero_mean(values):
    """values: (n, ...), independent rows: their mean is 0 within 5 standard errors."""
    assert (values.mean(dim=0).abs() <= 5 * values.std(dim=0) / len(values) ** 0.5).all()


THETA, THETA_WEIGHTS = np.polynomial.legendre.leggauss(500)  # on [-1, 1]


def brute_force_velocity(x_t, t):
    """(E[x_0 | x_t] - x_t) / t for one x_t, a complex number: a plain sum over x_1, in NumPy.

    Its weights are the spiral's density at x_0 = (x_t - t x_1) / (1 - t), a sum over theta.
    """
    reach, width, center = 3.7 * (1 - t) / t, 0.1 * (1 - t) / t, abs(x_t) / t
    low, high = max(2.5, center - reach), min(3, center + reach)
    nodes, weights = np.polynomial.legendre.leggauss(20 + int(2 * (high - low) / width))
    half = math.asin(reach / center) if reach < center else math.pi
    angles = half * np.linspace(-1, 1, 20 + int(6 * half / width), endpoint=False)
    x_1 = np.exp(1j * (np.angle(x_t) + angles)) * (low + (high - low) * (nodes[:, None] + 1) / 2)
    x_0 = (x_t - t * x_1) / (1 - t)
    density = 0
    for theta, weight in zip(3 * math.pi * (THETA + 1), THETA_WEIGHTS):
        away = x_0 - theta / (2 * math.pi) * np.exp(1j * theta)
        density += weight * np.exp(-(away.real**2 + away.imag**2) / 0.02)
    return (np.average(x_0, weights=density * weights[:, None]) - x_t) / t


def test_spiral():
    """Its characteristic function, by a fine sum over theta."""
    x = torch.view_as_complex(s.spiral(200_000, rng()).double())
    theta = 6 * math.pi * (torch.arange(100_000).double() + 0.5) / 100_000
    curve = torch.polar(theta / (2 * math.pi), theta)
    for k in (0.5, 2j, 3 + 4j, 9 - 5j):
        wave = [torch.exp(1j * (k * points).real) for points in (x, curve)]
        difference = wave[0] - wave[1].mean() * math.exp(-0.01 * abs(k) ** 2 / 2)
        assert_zero_mean(torch.view_as_real(difference))


def test_lines_run_from_the_annulus_to_the_spiral():
    for t in (0.25, torch.rand(50_000, 1, generator=rng())):
        x_t, velocity = s.lines(50_000, t, rng(1))
        x_1, x_0 = x_t - (1 - t) * velocity, x_t + t * velocity
        radius = x_1.norm(dim=1) - 2.75
        assert radius.abs().max() < 0.25 + 1e-5
        assert_zero_mean(torch.stack([radius, radius**2 - 0.25 / 12], dim=1))
        assert_zero_mean(torch.cat([x_1, radius[:, None] * x_1, x_1.prod(dim=1)[:, None]], dim=1))
        for x, square in ((x_0, s.SQUARE_0), (x_1, s.SQUARE_1)):
            assert_zero_mean(x.square().sum(dim=1) - square)
        assert_zero_mean(x_0[:, :, None] * x_1[:, None])  # they are independent


def test_flow():
    """dx = -x t dt, step by step: a product."""
    x_1 = torch.randn(9, 2, generator=rng())
    got = s.trajectories("", lambda x_t, t: x_t * t, x_1, 5)
    factors = [math.prod(1 + (5 - j) / 5 / 5 for j in range(k)) for k in range(6)]
    assert torch.allclose(got, torch.tensor(factors)[:, None, None] * x_1)


@pytest.mark.parametrize("t", [0.01, 0.2, 0.5, 0.8, 0.99])
def test_exact_velocity(t):
    x_t, _ = s.lines(2, t, rng(2))
    want = [brute_force_velocity(complex(*x), t) for x in x_t.tolist()]
    got = torch.view_as_complex(s.exact_velocity(x_t, t)).numpy()
    assert np.abs(got - want).max() < 1e-4


def test_exact_velocity_at_1_and_in_parts():
    x = s.annulus(450, rng()).double()
    mean_x_0 = torch.tensor([0, -1 / (2 * math.pi)])
    assert torch.allclose(s.exact_velocity(x, 1.0), mean_x_0 - x, atol=1e-6)
    each = torch.cat([s.exact_velocity(rows, 0.9) for rows in x.split(90)])
    assert torch.allclose(s.exact_velocity(x, 0.9), each)


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_preconditioning_is_the_best_multiple_of_x_t(t):
    """A network of 0 leaves c_skip x_t, one of 1 adds c_out.  By regression on many lines."""
    velocity = s.Velocity().requires_grad_(False)
    velocity.layers[-1].weight.zero_()
    velocity.layers[-1].bias.zero_()
    c_skip = velocity(torch.ones(1, 2), t)[0, 0].item()
    velocity.layers[-1].bias.fill_(1)
    c_out = velocity(torch.ones(1, 2), t)[0, 0].item() - c_skip
    x_t, target = s.lines(200_000, t, rng())
    slope = ((x_t * target).mean() / x_t.square().mean()).item()
    assert c_skip == pytest.approx(slope, abs=0.01)
    assert c_out**2 == pytest.approx((target - slope * x_t).square().mean().item(), rel=0.01)


def test_what_the_layers_see():
    velocity, seen = s.Velocity(), []
    velocity.layers.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    x_t = torch.tensor([[0.6 * 2.5, 0.0], [0.0, 0.6 * 3.0], [0.0, 2.3]])
    velocity(x_t, 0.6)
    edges = torch.tensor([[0, -0.6], [0.6, 0], [1.6, 1.0]])  # in units of 1.1 - t = 0.5
    want = torch.cat([x_t, torch.full((3, 1), 0.6), edges], dim=1)
    assert torch.allclose(seen[0][:, :5], want, atol=1e-6)


def test_it_learns(monkeypatch):
    monkeypatch.setattr(s, "lines", Mock(wraps=s.lines))
    velocity, losses = s.train(train_steps=100, rng=rng(3), batch_size=512)
    t = torch.cat([call.args[1] for call in s.lines.call_args_list])
    assert_zero_mean(torch.cat([t - 0.5, (t - 0.5) ** 2 - 1 / 12], dim=1))
    assert len(losses) == 100
    assert 5.5 < np.mean(losses[-20:]) < 6.8
    errors, squares = np.array(s.measure(velocity, rng(4), n=300))
    assert errors.sum() < 0.2 * squares.sum()
    assert (errors < 0.05 * squares)[3:].all()


def mean_square(t):
    """E|x_t|^2."""
    return t**2 * 91 / 12 + (1 - t) ** 2 * 3.02


def test_measure(monkeypatch):
    """Were v_t(x) = 2 x + (3, 0), and the error 0.3 and 0.4."""
    v, f = torch.tensor([[3, 0], [3.3, 0.4]])
    monkeypatch.setattr(s, "exact_velocity", lambda x_t, t: 2 * x_t + v)
    errors, squares = s.measure(lambda x_t, t: 2 * x_t + f, rng(5), n=20_000)
    assert errors == pytest.approx([0.25] * 6, rel=1e-4)
    assert squares == pytest.approx([4 * mean_square(t) + 9 for t in s.TIMES], rel=0.03)


def test_least_loss(monkeypatch):
    """Were v_t(x) = x: E|x_0 - x_1|^2 - E|x_t|^2, at three midpoints."""
    monkeypatch.setattr(s, "exact_velocity", lambda x_t, t: x_t)
    want = 91 / 12 + 3.02 - np.mean([mean_square(t) for t in (1 / 6, 1 / 2, 5 / 6)])
    assert s.least_loss(rng(8), num_times=3, n=50_000) == pytest.approx(want, abs=0.05)


def test_apart():
    x = torch.tensor([[0.0, 0.0], [0.3, 0.5], [0.0, 0.49]])
    assert s.apart(x, torch.zeros(3, 2)) == pytest.approx((0.49, 1 / 3))


def data(ax, **want):
    """(n, points, 2): the lines of a panel whose properties are these."""
    lines = (a for a in ax.lines if all(getattr(a, f"get_{k}")() == v for k, v in want.items()))
    return torch.tensor(np.array([line.get_xydata() for line in lines])).float()


def test_draw_trajectories():
    paths, twins = 3 * torch.rand(2, 6, 25, 2, generator=rng(9))
    place, aside = torch.tensor([[[0.3, 1.15]], [[1.0, 2.0]]])
    figure = s.draw_trajectories(paths, twins, lambda x_t, t: t * aside, rng(10))
    left, plane, radius = figure.axes
    lines = data(left, color="#CC79A7", linewidth=0.4)
    assert lines.shape == (100, 2, 2)
    assert ((lines.mean(dim=1) - place).norm(dim=1) < 0.05).all()
    assert ((lines[:, 0].norm(dim=1) - 2.75).abs() < 0.25 + 1e-5).all()
    exact = place + s.exact_velocity(place, 0.5) / 2
    for color, x_t, end in (("0.7", twins, exact), ("#0072B2", paths, place + aside / 4)):
        assert torch.allclose(data(left, color=color)[0], torch.cat([place, end]).float())
        x_t = x_t[:, :20].transpose(0, 1)
        assert torch.equal(data(plane, color=color), x_t)
        want = torch.stack([torch.linspace(1, 0, 6).expand(20, 6), x_t.norm(dim=2)], dim=2)
        assert torch.equal(data(radius, color=color), want)
    for ax, ends in ((left, lines.unbind(dim=1)), (plane, paths[[0, -1], :20])):
        for k, label in enumerate(("$x_1$", "$x_0$")):
            assert torch.equal(data(ax, label=label)[0], ends[k])
        assert data(ax, label="spiral").norm(dim=2)[0, -1] == pytest.approx(3)
    labels = [(line.get_color(), line.get_label()) for line in left.lines[100:102]]
    assert labels == [("0.7", "exact"), ("#0072B2", "learned")]
    titles = ["Lines through one place, $t$ = 0.5", "Trajectories", "Distance from the center"]
    assert [ax.get_title() for ax in figure.axes] == titles
    assert radius.get_xlim() == (1, 0)


def test_draw_data_and_loss():
    (ax,) = s.draw_data(torch.ones(3, 2), torch.zeros(4, 2)).axes
    sums = {dots.get_label(): dots.get_offsets().sum() for dots in ax.collections}
    assert sums == {"$x_1$, the annulus": 0, "$x_0$, the spiral": 6}
    (ax,) = s.draw_loss([float(k**2) for k in range(100)], 4.256).axes
    shown = {line.get_label(): line.get_xydata()[7:8].tolist() for line in ax.lines}
    assert shown == {
        "each step": [[7, 49]],
        "mean of 2 steps": [[8, 56.5]],
        "exact velocity: 4.26": [],
    }
    assert ax.lines[2].get_ydata()[0] == 4.256


def test_animate():
    """From t = 1 to 0, with a tail of a twentieth of the steps, at rest at both ends."""
    paths = torch.rand(41, 3, 2, generator=rng(11))
    paths[0] = torch.tensor([[2.5, 0], [0, 3.0], [-2.75, 0]])
    animation = s.animate(paths)
    animation._draw_was_started = True  # no warning that nobody looked at it
    frames = [*animation.new_frame_seq()]
    assert (np.diff(frames) > 0).all()
    (ax,) = animation._fig.axes
    tails, dots = ax.collections
    for frame, k, text in ((frames[0], 0, "1.00"), (frames[-1], 40, "0.00"), (10, 10, "0.75")):
        animation._func(frame)
        assert ax.texts[0].get_text() == f"t = {text}"
        assert (dots.get_offsets() == paths[k].numpy()).all()
    assert (np.array(tails.get_segments()) == paths[8:11].transpose(0, 1).numpy()).all()
    colors = s.plt.get_cmap("plasma")([0.2, 1.0, 0.6])
    np.testing.assert_allclose(dots.get_facecolors(), colors)


def test_main(tmp_path, capsys, monkeypatch):
    """What is measured, of what; each number and figure where it belongs."""
    rows, paths, twins = [], *torch.rand(2, 4, 1600, 2)
    losses = [float(k) for k in range(20)]
    errors, squares = [0.01, 0.02, 0.03, 0.04, 0.05, 0.12], [1.0, 2.0, 3.0, 4.0, 2.0, 6.0]
    for name, result in {
        "train": ("learned", losses),
        "measure": (errors, squares),
        "least_loss": 4.25,
        "apart": (0.1234, 0.056),
        **{name: Mock() for name in ("draw_data", "draw_loss", "draw_trajectories", "animate")},
    }.items():
        monkeypatch.setattr(s, name, Mock(return_value=result))
    monkeypatch.setattr(s, "trajectories", Mock(side_effect=[paths, twins]))
    monkeypatch.setattr(s, "table", rows.extend)
    s.main(f"--figures-dir {tmp_path} --train-steps 20 --num-steps 3 --num-samples 40".split())
    assert s.train.call_args.kwargs["train_steps"] == 20
    assert s.measure.call_args.args[0] == "learned"
    (_, *run), (_, *twin) = (call.args for call in s.trajectories.call_args_list)
    assert (run, twin) == (["learned", run[1], 3], [s.exact_velocity, run[1], 3])
    assert (run[1].norm(dim=1) - torch.full((40,), 2.75)).abs().max() < 0.25 + 1e-5
    assert all(map(torch.equal, s.apart.call_args.args, (paths[-1], twins[-1])))
    x_0, x_1 = s.draw_data.call_args.args
    assert x_0.norm(dim=1).min() < 1 < 2 < x_1.norm(dim=1).min()
    assert s.draw_loss.call_args.args == (losses, 4.25)
    assert s.draw_trajectories.call_args.args[:3] == (paths, twins, "learned")
    for name, file in (("data", "data"), ("loss", "train_loss"), ("trajectories", "trajectories")):
        figure = getattr(s, f"draw_{name}").return_value
        assert figure.savefig.call_args.args == (tmp_path / f"{file}.jpg",)
    assert torch.equal(s.animate.call_args.args[0], paths[:, :1500])
    loss, distance, _ = capsys.readouterr().out.splitlines()
    assert loss == "loss: 18.50 in the last tenth, 4.25 is irreducible"
    assert distance == "a sample is 0.1234 from its twin (median), 5.6% over 0.5"
    assert [" ".join(row) for row in rows] == [
        "t 0.05 0.2 0.4 0.6 0.8 0.95 mean",
        "E|f - v_t|^2 0.0100 0.0200 0.0300 0.0400 0.0500 0.1200 0.0450",
        "E|v_t|^2 1.00 2.00 3.00 4.00 2.00 6.00 3.00",
        "their ratio 1.00% 1.00% 1.00% 1.00% 2.50% 2.00% 1.50%",
    ]
