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
        assert_zero_mean(x_0.square().sum(dim=1) - 3.02)
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
def test_preconditioning_is_the_best_linear_guess(t):
    """A network of 0 leaves c_skip x_t, one of 1 adds c_out.  By regression on many lines."""
    velocity = s.Velocity().requires_grad_(False)
    velocity.layers[-1].weight.zero_()
    velocity.layers[-1].bias.zero_()
    c_skip = velocity(torch.ones(1, 2), t)[0, 0].item()
    velocity.layers[-1].bias.fill_(1)
    c_out = velocity(torch.ones(1, 2), t)[0, 0].item() - c_skip
    x_t, target = s.lines(200_000, t, rng())
    slope = ((x_t * target).mean() / x_t.square().mean()).item()
    assert c_skip == pytest.approx(slope, abs=0.02)
    assert c_out == pytest.approx((target - slope * x_t).std().item(), rel=0.02)


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
    errors = s.measure(velocity, rng(4), n=300)
    assert np.mean(errors) < 0.3
    assert max(errors[3:]) < 0.05


def test_measure_of_a_known_error():
    errors = s.measure(lambda x_t, t: 1.5 * s.exact_velocity(x_t, t), rng(5), n=50)
    assert errors == pytest.approx([0.25] * 6)


def test_least_loss():
    """By its definition, at other times, from other draws."""
    g, losses = rng(6), []
    for k in range(20):
        t = (k + 0.5) / 20
        x_t, target = s.lines(150, t, g)
        losses.append((target - s.exact_velocity(x_t, t)).square().sum(dim=1).mean())
    least, error = s.least_loss(rng(7), num_times=15, n=200), np.hypot(6.2, 4.2) / 3000**0.5
    assert least == pytest.approx(np.mean(losses), abs=5 * error)


def test_apart():
    x = torch.tensor([[0.0, 0.0], [0.3, 0.5], [0.0, 0.49]])
    assert s.apart(x, torch.zeros(3, 2)) == pytest.approx((0.49, 1 / 3))


def test_main(tmp_path, capsys, monkeypatch):
    animation = s.FuncAnimation
    monkeypatch.setattr(s, "FuncAnimation", lambda *args: animation(*args[:2], args[2][::75]))
    monkeypatch.setattr(s, "trajectories", Mock(wraps=s.trajectories))
    monkeypatch.setattr(s, "measure", lambda velocity, rng: [0.01, 0.02, 0.03, 0.04, 0.05, 0.09])
    monkeypatch.setattr(s, "least_loss", lambda rng: 4.25)
    s.main(f"--figures-dir {tmp_path} --train-steps 20 --num-steps 3 --num-samples 40".split())
    (learned, x_1, num_steps), twin = (call.args[1:] for call in s.trajectories.call_args_list)
    assert isinstance(learned, s.Velocity)
    assert twin == (s.exact_velocity, x_1, num_steps) == (s.exact_velocity, x_1, 3)
    assert (x_1.norm(dim=1) - torch.full((40,), 2.75)).abs().max() < 0.25 + 1e-5
    loss, _, errors, distance = capsys.readouterr().out.splitlines()
    assert "4.25" in loss
    assert errors.split()[-7:] == ["1.00%", "2.00%", "3.00%", "4.00%", "5.00%", "9.00%", "4.00%"]
    x_0, twins = (list(s.flow(v, x_1, 3))[-1] for v in (learned, s.exact_velocity))
    assert float(distance.split()[3]) == pytest.approx(s.apart(x_0, twins)[0], abs=1e-4)
