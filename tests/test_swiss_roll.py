"""Experiment 3 held to references that share no code with it."""

import math
from functools import partial

import numpy as np
import pytest
import swiss_roll as s
import torch


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def brute_force_denoiser(x_t, sigma_t, nodes=20_000):
    """E[x_0 | x_t] for one x_t, by a plain sum over the curve in NumPy."""
    theta = np.linspace(math.pi / 2, 4 * math.pi, nodes)
    c = np.stack([theta * np.cos(theta), theta * np.sin(theta)], axis=1) / (4 * math.pi)
    squares = ((x_t - c) ** 2).sum(axis=1) / (2 * sigma_t**2)
    weights = np.exp(squares.min() - squares)
    return weights @ c / weights.sum()


def test_the_data_is_the_curve():
    x = s.swiss_roll(20_000, rng()).double()
    radius = x.norm(dim=1)
    angle = torch.atan2(x[:, 1], x[:, 0])
    off = (radius * 4 * math.pi - angle) / (2 * math.pi)  # whole turns
    assert (off - off.round()).abs().max() < 1e-5
    assert radius.mean() == pytest.approx(4.5 / 8, abs=5 * radius.std() / 20_000**0.5)


@pytest.mark.parametrize("t", [5e-4, 0.01, 0.2, 1.0])
@pytest.mark.parametrize("sigma_q", [0.1, 1.0, 4.0, 100.0])
def test_exact_denoiser(t, sigma_q):
    x_t = s.add_noise(s.swiss_roll(8, rng()), t, sigma_q, rng(1))
    want = [brute_force_denoiser(x.numpy(), sigma_q * t**0.5) for x in x_t]
    got = s.exact_denoiser(x_t, t, sigma_q=sigma_q).numpy()
    assert np.abs(got - want).max() < 0.01 * min(1, sigma_q * t**0.5)


def test_reverse_mean_by_regression():
    """Eq. (24) against least squares on draws of (x_{t-dt}, x_t): residuals have mean 0 in bins."""
    t, dt, n = 0.5, 0.2, 200_000
    g = rng(2)
    x_previous = s.add_noise(s.swiss_roll(n, g), t - dt, 1.0, g)
    x_t = s.add_noise(x_previous, dt, 1.0, g)
    mean = s.reverse_mean(x_t, t, dt, denoiser=partial(s.exact_denoiser, sigma_q=1.0))
    residual = x_previous - mean
    for inside in (x_t[:, 0] < -1, x_t[:, 0].abs() < 0.3, x_t[:, 1] > 1):
        r = residual[inside]
        assert (r.mean(dim=0).abs() < 5 * r.std(dim=0) / len(r) ** 0.5).all()


def test_samplers_on_a_point_mass():
    """To a point mass at 0: DDIM is at x_1 sqrt(t), and DDPM's variance obeys a recursion."""
    mean = partial(s.reverse_mean, denoiser=lambda x_t, t: torch.zeros_like(x_t))
    x_1 = 3 * torch.randn(50_000, 2, generator=rng())
    for k, x_t in zip((6, 5, 4, 3, 2, 1, 0), s.ddim(mean, x_1, 7)):
        assert (x_t - x_1 * (k / 7) ** 0.5).abs().max() < 1e-5
    variance = 9.0
    for k, x_t in zip((4, 3, 2, 1), s.ddpm(mean, x_1, 4, 3.0, rng(1))):
        variance = (1 - 1 / k) ** 2 * variance + 9 / 4
        assert x_t.var().item() == pytest.approx(variance, rel=0.03)


def test_preconditioning_is_the_best_linear_guess():
    """With a network of 0, the error of c_skip x_t is c_out when the data has SIGMA_DATA."""
    t = 0.3
    c_skip, c_out, c_in, c_noise = s.Denoiser(2.0).preconditioning(t)
    x_0 = s.SIGMA_DATA * torch.randn(200_000, generator=rng())
    x_t = x_0 + 2.0 * t**0.5 * torch.randn(200_000, generator=rng(1))
    assert (x_t @ x_0 / (x_t @ x_t)).item() == pytest.approx(c_skip, rel=0.02)
    assert (x_0 - c_skip * x_t).std().item() == pytest.approx(c_out, rel=0.02)
    assert (c_in * x_t).std().item() == pytest.approx(1, rel=0.02)
    assert c_noise.item() == pytest.approx(math.log(2 * t**0.5) / 2)


def test_it_learns():
    denoiser, losses = s.train(sigma_q=1.0, train_steps=600, rng=rng(3))
    exact = partial(s.exact_denoiser, sigma_q=1.0)
    excess, bayes = s.measure(denoiser, exact, 1.0, rng(4), n=5000)
    assert np.mean(np.divide(excess, bayes)) < 0.03
    assert len(losses) == 600
    assert np.mean(losses[-100:]) == pytest.approx(s.least_loss(denoiser, bayes), rel=0.05)


def test_measure_of_a_known_error():
    """A denoiser that is off by (.1, .2) has an excess of .05; the Bayes error is |x_0 - D|^2."""
    exact = partial(s.exact_denoiser, sigma_q=1.0)

    def shifted(x_t, t):
        return exact(x_t, t) + torch.tensor([0.1, 0.2])

    excess, bayes = s.measure(shifted, exact, 1.0, rng(5), n=20_000)
    assert excess == pytest.approx([0.05] * 7, rel=1e-3)
    assert bayes[0] == pytest.approx(s.TIMES[0], rel=0.05)  # across the curve all is known


def test_apart():
    x = torch.tensor([[0.0, 0.0], [0.3, 0.4], [0.0, 0.02]])
    assert s.apart(x, torch.zeros(3, 2)) == pytest.approx((0.02, 1 / 3))
    assert s.apart(torch.tensor([[0.11, 0.0], [0.09, 0.0]]), torch.zeros(2, 2))[1] == 0.5


def test_twins_share_start_and_noise():
    exact = partial(s.exact_denoiser, sigma_q=1.0)
    x_1 = torch.randn(50, 2, generator=rng())
    got = s.sample(exact, x_1, 20, 1.0, rng(3))
    mean = partial(s.reverse_mean, denoiser=exact)
    assert torch.equal(got["DDPM"], [*s.ddpm(mean, x_1, 20, 1.0, rng(3))][-1])
    assert torch.equal(got["DDIM"], [*s.ddim(mean, x_1, 20)][-1])


def test_least_loss():
    """A Bayes error of c_out^2 at every t is a loss of 1."""
    denoiser = s.Denoiser(2.0)
    bayes = [denoiser.preconditioning(t)[1] ** 2 for t in s.TIMES]
    assert s.least_loss(denoiser, bayes) == pytest.approx(1)


def test_main(tmp_path, capsys, monkeypatch):
    calls = []

    def spy(denoiser, x_1, num_steps, sigma_q, noise, original=s.sample):
        calls.append((denoiser, x_1, sigma_q, noise.get_state()))
        return original(denoiser, x_1, num_steps, sigma_q, noise)

    monkeypatch.setattr(s, "sample", spy)
    s.main(f"--figures-dir {tmp_path} --train-steps 50 --num-steps 5 --sigma-q 4".split())
    (learned, x_1, sigma_q, state), (exact, twin_x_1, _, twin_state) = calls
    assert learned.sigma_q == sigma_q == exact.keywords["sigma_q"] == 4
    assert x_1.std().item() == pytest.approx(4, rel=0.05)
    assert abs(x_1.mean().item()) < 0.3
    assert torch.equal(x_1, twin_x_1)
    assert torch.equal(state, twin_state)  # the same start, the same noise
    names = {"data", "train_loss", "learned-vs-exact", "eval_ddpm_samples", "eval_ddim_samples"}
    assert {path.stem for path in tmp_path.iterdir()} == names
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    assert all(0 < float(share[:-1]) < 100 for share in lines[2].split()[3:])
    assert all(0 < float(line.split()[4]) < 1 for line in lines[3:])
