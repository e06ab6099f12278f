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
    noise = torch.cat([x_previous - x_0, x_t - x_previous], dim=1)
    want = torch.diag(torch.tensor([4 * 0.0015] * 5 + [4 * 0.001] * 5))
    torch.testing.assert_close(noise.T.cov(), want, rtol=0.05, atol=2e-4)


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
    """Each row gives the target as its paper writes it; that of x_{t-dt} is its mean, eq. (24)."""
    x_0, _, x_t = (x.double() for x in s.chain(50, t, plane(3), 1.5, rng(2)))
    sigma_t, s_0 = 1.5 * t**0.5, 0.3
    noise, phi = (x_t - x_0) / sigma_t, math.atan(sigma_t)
    c_skip = s_0**2 / (sigma_t**2 + s_0**2)
    c_out = sigma_t * s_0 / (sigma_t**2 + s_0**2) ** 0.5
    for target, want in {
        "x_0": x_0,
        "noise": noise,
        "v": math.cos(phi) * noise - math.sin(phi) * x_0,
        "preconditioned": (x_0 - c_skip * x_t) / c_out,
        "x_{t-dt}": (0.001 * x_0 + (t - 0.001) * x_t) / t,
    }.items():
        skip, factor = s.TARGETS[target](t, sigma_t, s_0)
        torch.testing.assert_close((x_0 - skip * x_t) / factor, want)


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


@pytest.mark.parametrize("target", s.TARGETS)
def test_the_loss(target):
    """The error of x_0 over factor^2; for x_{t-dt} that of the reverse mean, eq. (24)."""
    denoiser = s.Predictor(target, 1.5, 6, 8).requires_grad_(False)
    x_0, x_previous, x_t = s.chain(50, 0.3, plane(6), 1.5, rng(5))
    got = s.loss(denoiser, x_0, x_previous, x_t, torch.full((50, 1), 0.3))
    error = (denoiser(x_t, 0.3) - x_0) / denoiser.skip_and_factor(0.3)[1]
    if target == "x_{t-dt}":
        error = s.reverse_mean(x_t, 0.3, 0.001, denoiser=denoiser) - x_previous
    torch.testing.assert_close(got, 6 * error.square().mean(), rtol=1e-3, atol=0)


def test_training(monkeypatch):
    """t is log-uniform, the schedule runs to its end, weights and draws are the same for all."""
    schedules, times, loss = [], [], s.loss
    library = torch.optim.lr_scheduler
    one_cycle = library.OneCycleLR

    def spy(*args):
        schedules.append(one_cycle(*args))
        return schedules[-1]

    monkeypatch.setattr(library, "OneCycleLR", spy)
    monkeypatch.setattr(s, "loss", lambda *args: times.append(args[-1]) or loss(*args))
    size = {"basis": plane(3), "sigma_q": 1.0, "width": 5, "train_steps": 4, "batch_size": 5000}
    g, one = rng(6), rng(6)
    together = s.train_all(["noise", "x_0", "v"], g, **size)
    assert [schedule.last_epoch for schedule in schedules] == [4, 4, 4]
    logs = (torch.cat(times[:4]).log() / math.log(0.001)).flatten().sort().values
    torch.testing.assert_close(logs, torch.linspace(0, 1, 20_000), atol=0.02, rtol=0)
    for k, target in enumerate(["noise", "x_0", "v"]):
        assert torch.equal(times[4 * k], times[0])
        assert together[target].target == target
    alone = s.train("v", rng=one, **size)
    assert torch.equal(alone.layers[0].weight, together["v"].layers[0].weight)
    assert torch.equal(torch.rand(3, generator=g), torch.rand(3, generator=one))


def test_the_claim():
    """In 2 dimensions noise is ahead at small t; in 64 x_0 is, and noise errs off the plane."""
    shares, basis = {}, plane(64)
    for d, high in ((2, plane(2)), (64, basis)):
        size = {"basis": high, "sigma_q": 1.0, "width": 64, "train_steps": 80}
        learned = s.train_all(["noise", "x_0"], rng(6), **size)
        shares[d] = s.measure(learned, high, 1.0, rng(7), n=2000)
    assert shares[2]["noise"][0] < shares[2]["x_0"][0]
    assert shares[64]["noise"][4] > 20 * shares[64]["x_0"][4]
    _, _, x_t = s.chain(2000, 0.1, basis, 1.0, rng(8))
    error = learned["noise"](x_t, 0.1) - s.exact_on_plane(x_t, 0.1, basis=basis, sigma_q=1.0)
    assert (error @ basis).square().sum() < 0.1 * error.square().sum()


def test_measure_of_a_known_error():
    """Off by (.1, .2, 0) is an excess of .05; at small t the Bayes error is sigma_q^2 t."""
    exact = partial(s.exact_on_plane, basis=plane(3), sigma_q=1.0)
    off = {"off": lambda x_t, t: exact(x_t, t) + torch.tensor([0.1, 0.2, 0.0])}
    shares = s.measure(off, plane(3), 1.0, rng(7))["off"]
    assert [0.05 / share for share in shares[:2]] == pytest.approx(s.TIMES[:2], rel=0.1)
    x_0, _, x_t = s.chain(10_000, 1.0, plane(3), 1.0, rng(8))
    bayes = (x_0 - exact(x_t, 1.0)).square().sum(dim=1).mean().item()
    assert 0.05 / shares[-1] == pytest.approx(bayes, rel=0.05)


def test_main(tmp_path, monkeypatch):
    """Options reach training, measuring and samplers, and what they return rows and figures."""
    calls = {name: [] for name in ("train_all", "measure", "sample", "draw_errors", "draw_samples")}

    def spy(name, original, *args, **settings):
        fewer = {"n": 300} if name == "measure" else {}
        calls[name].append((args, settings, original(*args, **settings, **fewer)))
        return calls[name][-1][-1]

    for name in calls:
        monkeypatch.setattr(s, name, partial(spy, name, getattr(s, name)))
    tables = []
    monkeypatch.setattr(s, "table", tables.append)
    words = "--dimension 5 --width 9 --num-steps 4 --sigma-q 3 --train-steps 6 --num-samples 900"
    s.main(f"--figures-dir {tmp_path} {words}".split())
    assert {path.name for path in tmp_path.iterdir()} == {"error-vs-t.jpg", "samples.jpg"}

    assert [[*args[0]] for args, _, _ in calls["train_all"]] == [[*s.TARGETS], [*s.TARGETS][1:]]
    for d, trained, measured in zip((2, 5), calls["train_all"], calls["measure"]):
        _, settings, denoisers = trained
        basis = settings.pop("basis")
        assert settings == {"sigma_q": 3, "width": 9, "train_steps": 6}
        assert basis.shape == (d, 2)
        torch.testing.assert_close(basis.T @ basis, torch.eye(2))
        assert measured[0][:3] == (denoisers, basis, 3)
    ((exact, x_1, num_steps), _, twins), *others = calls["sample"]
    assert (exact.func, exact.keywords, num_steps) == (s.exact_denoiser, {"sigma_q": 3}, 4)
    assert x_1.shape == (900, 2)
    assert x_1.std().item() == pytest.approx(3, rel=0.1)
    mean = partial(s.reverse_mean, denoiser=exact)
    assert torch.equal(twins, [*s.ddim(mean, x_1, 4)][-1])
    names = ["x_0", "noise", "v", "preconditioned"]
    for target, (args, _, _) in zip(names, others):
        assert args[0] is calls["train_all"][0][2][target]
        assert torch.equal(args[1], x_1)
        assert args[2] == 4

    in_flat, in_high = (result for _, _, result in calls["measure"])
    samples = dict(zip(names, (x_0 for _, _, x_0 in others)))
    assert calls["draw_errors"][0][0] == (in_flat, in_high, 5)
    assert calls["draw_samples"][0][0] == (samples, twins)
    heading, *rows = tables[0]
    assert [float(cell) for cell in heading[1:]] == s.TIMES
    want = [(f"2 dimensions: {target}", errors) for target, errors in in_flat.items()]
    want += [(f"5 dimensions: {target}", errors) for target, errors in in_high.items()]
    for row, (name, errors) in zip(rows, want):
        assert row[0] == name
        assert [float(cell) for cell in row[1:]] == pytest.approx(
            [100 * e for e in errors], abs=0.006
        )
    assert len(rows) == len(want) == 9
    assert tables[1][0][1:] == names
    for cell, x_0 in zip(tables[1][1][1:], samples.values()):
        median = np.median(np.hypot(*(x_0 - twins).T.double().numpy()))
        assert float(cell) == pytest.approx(median, abs=0.006, rel=0.003)


def test_the_figures():
    symbols = [r"$x_{t-\Delta t}$", "$x_0$", "noise", "$v$", "preconditioned"]
    colors = ["#CC79A7", "#E69F00", "#0072B2", "#56B4E9", "#009E73"]
    in_flat = {t: [k + 0.1 * i for i in range(1, 8)] for k, t in enumerate(s.TARGETS)}
    in_high = {t: [10 * e for e in in_flat[t]] for t in [*s.TARGETS][1:]}
    axes = s.draw_errors(in_flat, in_high, 5).axes
    for ax, d, shares in zip(axes, (2, 5), (in_flat, in_high)):
        assert ax.get_title() == f"the roll in {d} dimensions"
        assert ax.get_xlim()[0] > 1 > 0.001 > ax.get_xlim()[1]
        lines = {line.get_label(): line for line in ax.lines}
        for target, symbol, color in zip(s.TARGETS, symbols, colors):
            assert (symbol in lines) == (target in shares)
            if target in shares:
                want = [(t, 100 * share) for t, share in zip(s.TIMES, shares[target])]
                np.testing.assert_allclose(lines[symbol].get_xydata(), want, rtol=1e-6)
                assert lines[symbol].get_color() == color

    twins = torch.tensor([[0.0, 0.0], [0.5, 0.5]])
    moved = {
        target: twins + torch.tensor([[0.01 * k, 0.0], [0.2 * k, 0.2]])
        for k, target in enumerate([*s.TARGETS][1:], 1)
    }
    first, *axes, _ = s.draw_samples(moved, twins).axes
    np.testing.assert_allclose(first.lines[0].get_xydata(), twins)
    assert first.get_title() == "twins: exact denoiser"
    for ax, x_0, symbol, color in zip(axes, moved.values(), symbols[1:], colors[1:]):
        line, dots, roll = ax.lines
        np.testing.assert_allclose(line.get_xydata(), torch.stack([x_0[1], twins[1]]))
        np.testing.assert_allclose(dots.get_xydata(), x_0)
        assert (dots.get_color(), roll.get_label()) == (color, "data")
        assert ax.get_title() == f"target: {symbol}"
