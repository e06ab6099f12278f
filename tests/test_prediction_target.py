"""Experiment 7 held to references that share no code with it."""

import math
from functools import partial

import numpy as np
import prediction_target as s
import pytest
import torch
from conftest import paste, snippet, torch_rng

FAR_AWAY = """
START, END = 1.0, 9.0
def curve(theta):
    return torch.stack([9 + theta * theta.cos() / 2, 3 * theta.sin() - 5], dim=1)
"""


def plane(d):
    return torch.linalg.qr(torch.randn(d, 2, generator=torch_rng(9))).Q


@pytest.mark.parametrize("data", ["START, END = 2, 9.5", FAR_AWAY, snippet(s)])
def test_the_truth_follows_the_data(data, tmp_path, monkeypatch):
    """The denoiser against a plain sum over the curve, all of it in 7 dimensions."""
    o, basis = paste(s, data), plane(7)
    part = (torch.arange(20_000, dtype=torch.double) + 0.5) / 20_000
    c = (o.curve(o.START + (o.END - o.START) * part) @ basis.T.double()).numpy()
    for t in (0.001, 0.1, 1.0):
        _, _, x_t = o.chain(10, t, basis, 1.5, torch_rng(1))
        squares = ((x_t.double().numpy()[:, None] - c) ** 2).sum(axis=2) / (2 * 1.5**2 * t)
        weights = np.exp(squares.min(axis=1, keepdims=True) - squares)
        want = weights @ c / weights.sum(axis=1, keepdims=True)
        error = np.abs(o.exact_on_plane(x_t, t, basis=basis, sigma_q=1.5).numpy() - want).max()
        assert error < 0.01 * min(o.SPREAD, 1.5 * t**0.5), "not the posterior mean on the plane"

    # Preconditioned: the best multiple of x_t, and the size of its error.  Inputs of unit size.
    predictor, seen = o.Denoiser("preconditioned", 2 * o.SPREAD, 7, 16), []
    predictor.layers.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    x_0, _, x_t = o.chain(5000, 0.3, basis, 2 * o.SPREAD, torch_rng(4))
    got = predictor(x_t, 0.3)
    linear = ((x_0 * x_t).sum() / x_t.square().sum()).item()
    error = (x_0 - linear * x_t).square().mean().item() ** 0.5
    skip, factor = predictor.skip_and_factor(0.3)
    assert (skip, factor) == pytest.approx((linear, error), rel=0.05)
    assert seen[0][:, :7].square().mean().item() == pytest.approx(1, rel=0.02)
    assert seen[0][0, 7].item() == pytest.approx(math.log(2 * o.SPREAD * 0.3**0.5) / 2)
    torch.testing.assert_close(got, skip * x_t + factor * predictor.layers(seen[0]))
    if data == snippet(s):
        monkeypatch.setattr(s.plt.Figure, "savefig", lambda *_, **__: None)
        o.measure = partial(o.measure, n=50)
        few = "--train-steps 2 --num-steps 2 --num-samples 20 --dimension 5 --figures-dir".split()
        o.main([*few, str(tmp_path)])


def test_the_chain():
    """A curve on the plane, and the noise of each part in all dimensions."""
    basis = plane(5)
    x_0, x_previous, x_t = s.chain(20_000, 0.0025, basis, 2.0, torch_rng())
    turns = 2 * (z := x_0 @ basis).norm(dim=1) - torch.atan2(z[:, 1], z[:, 0]) / (2 * math.pi)
    assert (turns - turns.round()).abs().max() < 1e-5
    torch.testing.assert_close(x_0, z @ basis.T)
    noise = torch.cat([x_previous - x_0, x_t - x_previous], dim=1)
    want = torch.diag(torch.tensor([4 * 0.0015] * 5 + [4 * 0.001] * 5))
    torch.testing.assert_close(noise.T.cov(), want, rtol=0.05, atol=2e-4)


@pytest.mark.parametrize("t", [0.001, 0.03, 1.0])
def test_targets(t):
    """Each row gives the target as its paper writes it; that of x_{t-dt} is its mean, eq. (24)."""
    x_0, _, x_t = (x.double() for x in s.chain(50, t, plane(3), 1.5, torch_rng(2)))
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
        off = ((x_0 - skip * x_t) / factor - want).abs().max() / want.abs().max()
        assert off < 1e-6, f"(x_0 - skip x_t) / factor is not {target}"


@pytest.mark.parametrize("target", s.TARGETS)
def test_the_loss(target):
    """The error of x_0 over factor^2; for x_{t-dt} that of the reverse mean, eq. (24)."""
    denoiser = s.Denoiser(target, 1.5, 6, 8).requires_grad_(False)
    x_0, x_previous, x_t = s.chain(50, 0.3, plane(6), 1.5, torch_rng(5))
    got = s.loss(denoiser, x_0, x_previous, x_t, torch.full((50, 1), 0.3))
    error = (denoiser(x_t, 0.3) - x_0) / denoiser.skip_and_factor(0.3)[1]
    if target == "x_{t-dt}":
        error = s.reverse_mean(x_t, 0.3, 0.001, denoiser=denoiser) - x_previous
    torch.testing.assert_close(got, 6 * error.square().mean(), rtol=1e-3, atol=0)


def test_training(spy):
    """t is log-uniform; weights and draws are the same for all targets."""
    losses, size = spy(s, "loss"), {"basis": plane(3), "sigma_q": 1.0, "width": 5}
    g, one, size = torch_rng(6), torch_rng(6), {**size, "train_steps": 4, "batch_size": 2000}
    together = s.train_all(["noise", "x_0", "v"], g, **size)
    logs = torch.cat([call.t for call in losses[:4]]).log() / math.log(0.001)
    want = torch.linspace(0, 1, 8000)
    torch.testing.assert_close(logs.flatten().sort().values, want, atol=0.03, rtol=0)
    for k, target in enumerate(["noise", "x_0", "v"]):
        assert torch.equal(losses[4 * k].t, losses[0].t)
        assert together[target].target == target
    alone = s.train("v", rng=one, **size)
    assert torch.equal(alone.layers[0].weight, together["v"].layers[0].weight)


def test_the_claim():
    """In 2 dimensions noise is ahead at small t; in 64 x_0 is, and noise errs off the plane."""
    shares, basis = {}, plane(64)
    for d, high in ((2, plane(2)), (64, basis)):
        size = {"basis": high, "sigma_q": 1.0, "width": 64, "train_steps": 60, "batch_size": 128}
        learned = s.train_all(["noise", "x_0"], torch_rng(6), **size)
        shares[d] = s.measure(learned, high, 1.0, torch_rng(7), n=500)
    assert shares[2]["noise"][-1] < shares[2]["x_0"][-1]
    assert shares[64]["noise"][2] > 20 * shares[64]["x_0"][2]
    _, _, x_t = s.chain(2000, 0.1, basis, 1.0, torch_rng(8))
    error = learned["noise"](x_t, 0.1) - s.exact_on_plane(x_t, 0.1, basis=basis, sigma_q=1.0)
    assert (error @ basis).square().sum() < 0.1 * error.square().sum()


def test_measuring():
    """Off by (.1, .2, 0) is an excess of .05; at small t the Bayes error is sigma_q^2 t."""
    exact = partial(s.exact_on_plane, basis=plane(3), sigma_q=1.0)
    off = {"off": lambda x_t, t: exact(x_t, t) + torch.tensor([0.1, 0.2, 0.0])}
    shares = s.measure(off, plane(3), 1.0, torch_rng(7), n=1000)["off"]
    assert [0.05 / share for share in shares[-2:]] == pytest.approx(s.TIMES[-2:], rel=0.2)


def test_main(tmp_path, monkeypatch, spy):
    """Options reach training, measuring and the sampler, and what they return rows and figures."""
    names = ("train_all", "measure", "sample", "draw_errors", "draw_samples", "report", "table")
    monkeypatch.setattr(s, "measure", partial(s.measure, n=500))
    calls = {name: spy(s, name) for name in names}
    monkeypatch.setattr(s.plt.Figure, "savefig", lambda *_, **__: None)
    words = "--dimension 5 --width 9 --num-steps 4 --sigma-q 3 --train-steps 6 --num-samples 300"
    s.main(f"--figures-dir {tmp_path} {words}".split())
    sampled, rows, samples = [*s.TARGETS][1:], calls["table"][0].rows, iter(calls["sample"])
    assert [float(cell) for cell in rows[0][1:8]] == s.TIMES == sorted(s.TIMES, reverse=True)
    lines, at = iter(rows[1:]), torch.randn(9, 5, generator=torch_rng())
    for d, trained, measured in zip((2, 5), calls["train_all"], calls["measure"]):
        settings, basis = trained.settings, trained.settings["basis"]
        assert settings == {"sigma_q": 3, "width": 9, "train_steps": 6, "basis": basis}
        assert (measured.denoisers, measured.sigma_q) == (trained.result, 3)
        assert measured.basis is basis
        twin = next(samples)
        want = s.exact_on_plane(at[:, :d], 0.5, basis=basis, sigma_q=3)
        torch.testing.assert_close(twin.denoiser(at[:, :d], 0.5), want)
        assert twin.x_1.shape == (300, d)
        assert twin.x_1.std().item() == pytest.approx(3, rel=0.15)
        for target, shares in measured.result.items():
            line = [float(cell) for cell in next(lines)[1:]]
            assert line[:7] == pytest.approx([100 * share for share in shares], abs=0.006)
            if target not in sampled:
                assert len(line) == 7
                continue
            one = next(samples)
            assert one.denoiser is trained.result[target]
            assert torch.equal(one.x_1, twin.x_1), "not the same start"
            *_, x_0 = s.ddim(partial(s.reverse_mean, denoiser=one.denoiser), one.x_1, 4)
            assert torch.equal(one.result, x_0)
            off = x_0 - x_0 @ basis @ basis.T
            for cell, apart in zip(line[7:], (x_0 - twin.result, off)):
                assert cell == pytest.approx(apart.norm(dim=1).median().item(), abs=6e-4)
            if d == 5:
                assert calls["draw_samples"][0].samples[target] is one.result
    shares = {d: call.result for d, call in zip((2, 5), calls["measure"])}
    assert calls["draw_errors"][0].shares == shares

    colors = dict(zip(s.TARGETS, ["#CC79A7", "#E69F00", "#0072B2", "#56B4E9", "#009E73"]))
    for ax, errors in zip(calls["draw_errors"][0].result.axes, shares.values()):
        drawn = {line.get_color(): line.get_xydata() for line in ax.lines}
        for target, values in errors.items():
            np.testing.assert_allclose(drawn[colors[target]].T, [s.TIMES, 100 * np.array(values)])
    above, side = np.reshape(calls["draw_samples"][0].result.axes, (2, 4))
    for top, bottom, target in zip(above, side, sampled):
        x_0 = calls["draw_samples"][0].samples[target]
        z, off = (x_0 @ basis).numpy(), (x_0 - x_0 @ basis @ basis.T).norm(dim=1)
        for ax, want in [(top, z), (bottom, np.stack([z[:, 0], off], 1))]:
            (dots,) = [line for line in ax.lines if line.get_color() == colors[target]]
            np.testing.assert_allclose(dots.get_xydata(), want, atol=1e-5)
