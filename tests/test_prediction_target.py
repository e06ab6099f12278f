"""Experiment 7 held to references that share no code with it."""

import math
from functools import partial

import numpy as np
import prediction_target as s
import pytest
import torch


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def plane(d):
    return torch.linalg.qr(torch.randn(d, 2, generator=rng(9))).Q


def test_the_chain():
    """A roll on the plane, and the noise of each part in all dimensions."""
    n, basis = 20_000, plane(5)
    x_0, x_previous, x_t = s.chain(n, 0.0025, basis, 2.0, rng())
    z = x_0 @ basis
    turns = 2 * z.norm(dim=1) - torch.atan2(z[:, 1], z[:, 0]) / (2 * math.pi)
    assert (turns - turns.round()).abs().max() < 1e-5
    assert z.norm(dim=1).mean().item() == pytest.approx(4.5 / 8, rel=0.01)
    torch.testing.assert_close(x_0, z @ basis.T)
    for noise, variance in ((x_previous - x_0, 4 * 0.0015), (x_t - x_previous, 4 * 0.001)):
        torch.testing.assert_close(noise.var(dim=0), torch.full((5,), variance), rtol=0.05, atol=0)
    both = (x_t - x_previous) * (x_previous - x_0)
    assert abs(both.mean()) < 5 * both.std() / both.numel() ** 0.5


@pytest.mark.parametrize("t", [0.001, 0.1, 1.0])
def test_exact_denoiser_on_a_plane(t):
    """Against a plain sum over the curve, all of it in 7 dimensions and double precision."""
    basis = plane(7)
    _, _, x_t = s.chain(10, t, basis, 1.5, rng(1))
    theta = np.linspace(math.pi / 2, 4 * math.pi, 20_000)
    roll = np.stack([theta * np.cos(theta), theta * np.sin(theta)], axis=1) / (4 * math.pi)
    roll = roll @ basis.T.double().numpy()
    squares = ((x_t.double().numpy()[:, None] - roll) ** 2).sum(axis=2) / (2 * 1.5**2 * t)
    weights = np.exp(squares.min(axis=1, keepdims=True) - squares)
    want = weights @ roll / weights.sum(axis=1, keepdims=True)
    got = s.exact_on_plane(x_t, t, basis=basis, sigma_q=1.5).numpy()
    assert np.abs(got - want).max() < 0.01 * min(1, 1.5 * t**0.5)


@pytest.mark.parametrize("t", [0.001, 0.03, 1.0])
def test_targets(t):
    """Each row gives the target as its paper writes it; x_{t-dt}, and its mean, are eq. (24)."""
    x_0, x_previous, x_t = (x.double() for x in s.chain(50, t, plane(3), 1.5, rng(2)))
    sigma_t, s_0 = 1.5 * t**0.5, 0.3
    noise, phi = (x_t - x_0) / sigma_t, math.atan(sigma_t)
    c_skip = s_0**2 / (sigma_t**2 + s_0**2)
    c_out = sigma_t * s_0 / (sigma_t**2 + s_0**2) ** 0.5
    noisy_x_0 = s.x_0_from_previous(x_previous, x_t, t)
    mean = s.reverse_mean(x_t, t, s.DT, denoiser=lambda x_t, t: x_0)
    torch.testing.assert_close(mean, (0.001 * x_0 + (t - 0.001) * x_t) / t)
    for target, of, want in [
        ("x_0", x_0, x_0),
        ("noise", x_0, noise),
        ("v", x_0, math.cos(phi) * noise - math.sin(phi) * x_0),
        ("preconditioned", x_0, (x_0 - c_skip * x_t) / c_out),
        ("x_{t-dt}", noisy_x_0, x_previous),
        ("x_{t-dt}", x_0, mean),
    ]:
        skip, factor = s.TARGETS[target](t, sigma_t, s_0)
        torch.testing.assert_close((of - skip * x_t) / factor, want)


@pytest.mark.parametrize("t", [0.001, 0.02, 1.0])
def test_claim_2(t):
    """In units of x_0, the variance of x_{t-dt} is that of x_0 and of the bridge."""
    x_0, x_previous, x_t = s.chain(50_000, t, torch.eye(2), 1.5, rng(3))
    best = s.exact_denoiser(x_t, t, sigma_q=1.5)
    noisy_x_0 = s.x_0_from_previous(x_previous, x_t, t)
    extra = ((noisy_x_0 - best) ** 2 - (x_0 - best) ** 2).flatten()
    want = 1.5**2 * t * (t - 0.001) / 0.001
    assert extra.mean().item() == pytest.approx(want, abs=5 * extra.std() / 1e5**0.5 + 1e-6)


def test_ddim_on_a_point_mass():
    """To a point mass at 0: x_t is x_1 sqrt(t) after every step."""
    mean = partial(s.reverse_mean, denoiser=lambda x_t, t: torch.zeros_like(x_t))
    x_1 = 3 * torch.randn(50, 2, generator=rng())
    for k, x_t in zip((6, 5, 4, 3, 2, 1, 0), s.ddim(mean, x_1, 7)):
        torch.testing.assert_close(x_t, x_1 * (k / 7) ** 0.5, atol=1e-5, rtol=1e-5)


def test_the_predictor():
    """Inputs of unit size; preconditioned is the best linear guess of x_0, and its error."""
    predictor, seen = s.Predictor("preconditioned", 2.0, 8, 16), []
    predictor.layers.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    x_0, _, x_t = s.chain(20_000, 0.3, plane(8), 2.0, rng(4))
    got = predictor(x_t, 0.3)
    torch.testing.assert_close(predictor(x_t, torch.full((20_000, 1), 0.3)), got)
    assert seen[0][:, :8].square().mean().item() == pytest.approx(1, rel=0.02)
    assert seen[0][0, 8].item() == pytest.approx(math.log(2 * 0.3**0.5) / 2)
    linear = ((x_0 * x_t).sum() / x_t.square().sum()).item()
    error = (x_0 - linear * x_t).square().mean().item() ** 0.5
    skip, factor = predictor.skip_and_factor(0.3)
    assert (skip, factor) == pytest.approx((linear, error), rel=0.05)
    torch.testing.assert_close(got, skip * x_t + factor * predictor.layers(seen[0]))


class Silent(s.Predictor):
    """Its output is 0, so its loss is the mean square of the target."""

    def __init__(self, *args):
        super().__init__(*args)
        torch.nn.init.zeros_(self.layers[-1].weight)
        torch.nn.init.zeros_(self.layers[-1].bias)


@pytest.mark.parametrize("target", s.NETWORKS)
def test_the_loss(target, monkeypatch):
    """Plain least squares with t log-uniform: against an integral over t of known moments."""
    d, of_x_0, s_0 = 6, (1 + 1 / 8 + 1 / 64) / 3, 0.43 * (2 / 6) ** 0.5  # of a uniform radius
    t = 0.001 ** ((np.arange(20_000) + 0.5) / 20_000)
    square = 1.5**2 * t  # sigma_t^2
    of_previous = of_x_0 + d * 1.5**2 * (t - 0.001)
    want = {
        "x_{t-dt}": of_previous,
        "x_{t-dt}, no noise": of_previous - d * 1.5**2 * 0.001 * (t - 0.001) / t,
        "x_0": of_x_0 + 0 * t,
        "x_0, with noise": of_x_0 + d * square * (t - 0.001) / 0.001,
        "noise": d + 0 * t,
        "v": (d + square * of_x_0) / (1 + square),
        "preconditioned": (square * of_x_0 / s_0**2 + d * s_0**2) / (square + s_0**2),
    }[target].mean()
    monkeypatch.setattr(s, "Predictor", Silent)
    size = {"sigma_q": 1.5, "width": 8, "train_steps": 1, "batch_size": 100_000}
    _, (loss,) = s.train(target, basis=plane(d), rng=rng(5), **size)
    assert loss == pytest.approx(want, rel=0.03)


def test_the_noise_of_the_bridge(monkeypatch):
    """On the same draws, what x_{t-dt} has more than its mean is the variance of the bridge."""
    monkeypatch.setattr(s, "Predictor", Silent)
    size = {"basis": plane(6), "sigma_q": 1.5, "width": 8, "train_steps": 1, "batch_size": 100_000}
    targets = ("x_{t-dt}", "x_{t-dt}, no noise")
    (_, (noisy,)), (_, (mean,)) = (s.train(target, rng=rng(5), **size) for target in targets)
    t = 0.001 ** ((np.arange(20_000) + 0.5) / 20_000)
    want = 6 * 1.5**2 * 0.001 * ((t - 0.001) / t).mean()
    assert noisy - mean == pytest.approx(want, rel=0.1)


def test_they_learn():
    """In 2 dimensions noise is ahead at small t; in 64 x_0 is, by far."""
    shares = {}
    for d in (2, 64):
        size = {"basis": plane(d), "sigma_q": 1.0, "width": 64, "train_steps": 120}
        learned = s.train_all(["noise", "x_0"], rng(6), **size)
        shares[d] = s.measure(learned, plane(d), 1.0, rng(7), n=2000)
    assert shares[2]["noise"][0] < shares[2]["x_0"][0]
    assert shares[64]["noise"][4] > 20 * shares[64]["x_0"][4]


def test_all_see_the_same():
    size = {"basis": plane(3), "sigma_q": 1.0, "width": 5, "train_steps": 4}
    together = s.train_all(["noise", "x_0"], rng(6), **size)
    for target, denoiser in together.items():
        alone, losses = s.train(target, rng=rng(6), **size)
        assert len(losses) == 4
        assert torch.equal(alone.layers[0].weight, denoiser.layers[0].weight)


def test_measure_of_a_known_error():
    """Off by (.1, .2, 0) is an excess of .05; at small t the Bayes error is sigma_q^2 t."""
    exact = partial(s.exact_on_plane, basis=plane(3), sigma_q=1.0)
    off = {"off": lambda x_t, t: exact(x_t, t) + torch.tensor([0.1, 0.2, 0.0])}
    shares = s.measure(off, plane(3), 1.0, rng(7))["off"]
    assert [0.05 / share for share in shares[:2]] == pytest.approx(s.TIMES[:2], rel=0.1)
    x_0, _, x_t = s.chain(10_000, 1.0, plane(3), 1.0, rng(8))
    bayes = (x_0 - exact(x_t, 1.0)).square().sum(dim=1).mean().item()
    assert 0.05 / shares[-1] == pytest.approx(bayes, rel=0.05)


def test_sample_and_twins():
    exact = partial(s.exact_denoiser, sigma_q=1.0)
    x_1 = torch.randn(50, 2, generator=rng())
    mean = partial(s.reverse_mean, denoiser=exact)
    assert torch.equal(s.sample(exact, x_1, 20), [*s.ddim(mean, x_1, 20)][-1])
    far = torch.tensor([[3.0, 4.0], [1e200, 0.0]], dtype=torch.double)
    assert s.to_twin(far, torch.zeros(2, 2)).tolist() == [5, 1e200]


def test_main(tmp_path, capsys, monkeypatch):
    calls = {"train_all": [], "measure": [], "sample": []}

    def spy(name, original, *args, **settings):
        result = original(*args, **settings)
        calls[name].append((args, settings, result))
        return result

    for name in calls:
        monkeypatch.setattr(s, name, partial(spy, name, getattr(s, name)))
    words = "--dimension 5 --width 9 --num-steps 4 --sigma-q 3 --train-steps 6 --num-samples 900"
    s.main(f"--figures-dir {tmp_path} {words}".split())

    assert [[*args[0]] for args, _, _ in calls["train_all"]] == [[*s.NETWORKS], [*s.TARGETS][1:]]
    for d, trained, measured in zip((2, 5), calls["train_all"], calls["measure"]):
        _, settings, denoisers = trained
        basis = settings.pop("basis")
        assert settings == {"sigma_q": 3, "width": 9, "train_steps": 6}
        assert basis.shape == (d, 2)
        torch.testing.assert_close(basis.T @ basis, torch.eye(2))
        assert measured[0][:3] == (denoisers, basis, 3)
    (exact, x_1, num_steps), *others = (args for args, _, _ in calls["sample"])
    assert (exact.keywords, num_steps) == ({"sigma_q": 3}, 4)
    assert x_1.std().item() == pytest.approx(3, rel=0.1)
    assert abs(x_1.mean()) < 5 * 3 / 1800**0.5
    for target, (denoiser, start, num_steps) in zip(s.TARGETS, others):
        assert denoiser is calls["train_all"][0][2][target]
        assert torch.equal(start, x_1.double())
        assert num_steps == 4

    assert {path.stem for path in tmp_path.iterdir()} == {"error-vs-t", "why", "samples"}
    lines = capsys.readouterr().out.splitlines()[1:]
    rows = [row for _, _, shares in calls["measure"] for row in shares.items()]
    assert len(lines) == len(rows) == 11
    for line, (target, row) in zip(lines, rows):
        numbers = [float(word) for word in line[28:].split()]
        assert target in line[:28]
        assert numbers[:7] == pytest.approx([100 * share for share in row], rel=0.01)
    twins, *samples = (x_0 for _, _, x_0 in calls["sample"])
    for line, x_0 in zip(lines, samples):
        median = (x_0 - twins).norm(dim=1).median().item()
        assert float(line.split()[-1]) == pytest.approx(median, rel=0.06)
