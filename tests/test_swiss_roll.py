"""Experiment 3 held to references that share no code with it."""

import math
from functools import partial

import numpy as np
import pytest
import swiss_roll as s
import torch
from conftest import paste, snippet, torch_rng

FAR_AWAY = """
START, END = 1.0, 9.0
def curve(theta):
    return torch.stack([9 + theta * theta.cos() / 2, 3 * theta.sin() - 5], dim=1)
"""


def brute_force(script, x_t, sigma_t):
    """E[x_0 | x_t], by a plain sum over a very fine curve in double precision."""
    part = (torch.arange(20_000, dtype=torch.double) + 0.5) / 20_000
    c = script.curve(script.START + (script.END - script.START) * part).numpy()
    means = []
    for x in x_t.double().numpy():
        squares = ((x - c) ** 2).sum(axis=1) / (2 * sigma_t**2)
        weights = np.exp(squares.min() - squares)
        means.append(weights @ c / weights.sum())
    return np.array(means)


@pytest.mark.parametrize("data", ["START, END = 2, 9.5", FAR_AWAY, snippet(s)])
def test_the_truth_follows_the_data(data, tmp_path, monkeypatch):
    o = paste(s, data)
    for t, sigma_q in [(5e-4, 0.1), (5e-4, 1.0), (0.01, 1.0), (1.0, 1.0), (1.0, 100.0)]:
        x_t = o.add_noise(o.swiss_roll(5, torch_rng()), t, sigma_q, torch_rng(1))
        want = brute_force(o, x_t, sigma_t := sigma_q * t**0.5)
        error = np.abs(o.exact_denoiser(x_t, t, sigma_q=sigma_q).numpy() - want).max()
        assert error < 0.01 * min(o.SPREAD, sigma_t), "not the posterior mean along the curve"

    # c_skip x_t is the best multiple of x_t, c_out the size of its error: the loss starts at 2.
    sigma_q, t = 2 * o.SPREAD, 0.3
    c_skip, c_out, c_in, c_noise = o.Denoiser(sigma_q).preconditioning(t)
    x_0 = o.swiss_roll(20_000, torch_rng())
    x_t = o.add_noise(x_0, t, sigma_q, torch_rng(1))
    assert ((x_0 * x_t).sum() / x_t.square().sum()).item() == pytest.approx(c_skip, rel=0.03)
    for size, want in [(x_0 - c_skip * x_t, 2 * c_out**2), (c_in * x_t, 2)]:
        assert size.square().sum(dim=1).mean().item() == pytest.approx(want, rel=0.03)
    assert c_noise.item() == pytest.approx(math.log(sigma_q * t**0.5) / 2)
    if data == snippet(s):
        monkeypatch.setattr(s.plt.Figure, "savefig", lambda *_, **__: None)
        o.measure, o.there_and_back = partial(o.measure, n=100), partial(o.there_and_back, n=100)
        few = "--train-steps 2 --num-steps 2 --num-samples 20 --figures-dir".split()
        o.main([*few, str(tmp_path)])


@pytest.mark.parametrize("bad", ["START, END = 3, 3", "def curve(theta):\n    return 0 * theta"])
def test_what_is_no_curve_is_refused(bad, tmp_path, capsys):
    with pytest.raises(SystemExit) as refusal:
        paste(s, bad).main(["--figures-dir", str(tmp_path / "new")])
    assert refusal.value.code == 2
    assert "curve" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "new").exists()


def test_reverse_mean_by_regression():
    """Eq. (24) against draws of (x_{t-dt}, x_t): residuals have mean 0 wherever x_t is."""
    t, dt, n = 0.5, 0.2, 50_000
    g = torch_rng(2)
    x_previous = s.add_noise(s.swiss_roll(n, g), t - dt, 1.0, g)
    x_t = s.add_noise(x_previous, dt, 1.0, g)
    mean = s.reverse_mean(x_t, t, dt, denoiser=partial(s.exact_denoiser, sigma_q=1.0))
    for inside in (x_t[:, 0] < -1, x_t[:, 0].abs() < 0.3, x_t[:, 1] > 1):
        r = (x_previous - mean)[inside]
        off = r.mean(dim=0).abs() / (r.std(dim=0) / len(r) ** 0.5)
        assert (off < 5).all(), "not the mean of x_{t-dt}, given x_t: see eq. (24)"


def test_ddpm_on_a_point_mass():
    """To a point mass at 0, its variance obeys a recursion.  (DDIM: test_there_and_back.)"""
    mean = partial(s.reverse_mean, denoiser=lambda x_t, t: torch.zeros_like(x_t))
    x_1, variance = 3 * torch.randn(20_000, 2, generator=torch_rng()), 9.0
    for k, x_t in zip((4, 3, 2, 1), s.ddpm(mean, x_1, 4, 3.0, torch_rng(1))):
        variance = (1 - 1 / k) ** 2 * variance + 9 / 4
        assert x_t.var().item() == pytest.approx(variance, rel=0.04)


def test_it_learns():
    """A curve far from 0: in units of c_out, an untrained network's excess is 1."""
    o, g = paste(s, FAR_AWAY), torch_rng(3)
    denoiser, losses = o.train(sigma_q=5.0, train_steps=60, rng=g)
    excess, _ = o.measure(denoiser, partial(o.exact_denoiser, sigma_q=5.0), 5.0, g, n=1000)
    assert o.least_loss(denoiser, excess) < 0.7, "far from E[x_0 | x_t]"
    assert losses[0] == pytest.approx(2, rel=0.2)


def test_measuring():
    """Off by (.1, .2) is an excess of .05; across the curve all is known at small t."""
    exact = partial(s.exact_denoiser, sigma_q=1.0)
    off = torch.tensor([0.1, 0.2])
    excess, bayes = s.measure(lambda x, t: exact(x, t) + off, exact, 1.0, torch_rng(5), n=1000)
    assert excess == pytest.approx([0.05] * 7, rel=1e-3)
    assert bayes[0] == pytest.approx(min(s.TIMES), rel=0.2)
    denoiser = s.Denoiser(2.0)
    bayes = [denoiser.preconditioning(t)[1] ** 2 for t in s.TIMES]
    assert s.least_loss(denoiser, bayes) == pytest.approx(1)
    assert [s.last_tenth([*range(30)]), s.last_tenth([5, 7])] == [28, 7]
    x = torch.tensor([[0.0, 0.09], [0.3, 0.4], [0.0, 0.11]])
    assert s.apart(x, torch.zeros(3, 2)) == pytest.approx((0.11, 2 / 3))


def test_there_and_back():
    """The forward process adds noise to the same points; DDIM's run at the same times."""
    a = torch.tensor([0.5, -0.5])
    clouds = s.there_and_back(lambda x, t: a.expand(len(x), 2), 1000, 2.0, torch_rng(), n=1000)
    assert [*clouds] == sorted(clouds)
    assert (min(clouds), max(clouds), len(clouds)) == (0, 1, 5)
    x_0, start = clouds[0.0][0], clouds[1.0][1]
    for t, (forward, back) in clouds.items():
        assert (forward - x_0).std().item() == pytest.approx(2 * t**0.5, rel=0.08)
        torch.testing.assert_close(back, a + (start - a) * t**0.5, atol=1e-4, rtol=1e-4)
    last, before = clouds[1.0][0], clouds[0.1][0]
    noise = torch.stack([(last - before).flatten(), (before - x_0).flatten()])
    assert abs(torch.corrcoef(noise)[0, 1]) < 5 / 2000**0.5
    axes = np.reshape(s.draw_there_and_back(clouds).axes, (2, 5))
    for column, pair in zip(axes.T, clouds.values()):
        for ax, x_t, x_0 in zip(column, pair, clouds[0.0]):
            (dots,) = ax.collections
            np.testing.assert_array_equal(dots.get_offsets(), x_t)
            place = torch.cdist(x_0[:50], s.curve(s.THETA)).argmin(dim=1)
            np.testing.assert_array_equal(dots.get_array()[:50], place)


def among(ax, points):
    """The line or dots of a panel that are these points."""
    of = [line for line in ax.lines if line.get_xydata().shape == tuple(np.shape(points))]
    (found,) = [line for line in of if np.allclose(line.get_xydata(), points, equal_nan=True)]
    return found


def test_drawn():
    x_0 = torch.tensor([[0.3, -0.2], [1.5, 0.0], [-0.5, 0.1]])
    twins = x_0 + torch.tensor([[0.0, 0.01], [-0.3, 0.4], [0.0, -0.02]])
    gap = torch.full((2,), math.nan)
    for name, color in [("DDPM", "#0072B2"), ("DDIM", "#E69F00")]:
        left, right = s.draw_samples(name, x_0, twins).axes
        assert among(left, x_0).get_color() == among(left, x_0[1:2]).get_color() == color
        assert among(right, twins).get_color() == among(left, twins[1:2]).get_color() == "k"
        assert among(left, torch.stack([x_0[1], twins[1], gap])).get_color() == "k"
        assert among(left, s.curve(s.THETA)).zorder < among(left, x_0).zorder
        assert left.get_xlim()[0] < -0.7 < 1.5 < left.get_xlim()[1]

    exact, learned = (lambda x, t: 3 * x + t), (lambda x, t: 2 * x)
    *panels, _ = s.draw_denoisers(learned, exact, 2.0, torch_rng()).axes
    for (black, blue, error), t in zip(np.reshape(panels, (2, 3)), (0.1, 0.01)):
        for ax, field, color in [(black, exact, (0, 0, 0)), (blue, learned, (0, 0.447, 0.698))]:
            (arrows,) = ax.collections
            tails = torch.tensor(np.array(arrows.get_offsets()))
            want = field(tails, t) - tails
            np.testing.assert_allclose(np.stack([arrows.U, arrows.V], 1), want, rtol=1e-4)
            assert arrows.get_facecolor()[0][:3] == pytest.approx(color, abs=0.01)
        (image,) = error.collections
        cells = image.get_array()
        for i, j in [(0, 0), (0, -1)]:  # row of y, column of x
            want = np.hypot(*(image.get_coordinates()[:-1, :-1][i, j] + t))  # the cell's corner
            assert cells[i, j] == pytest.approx(want, abs=0.05)

    (ax,) = s.draw_loss([float(k) for k in range(100)], 1.256).axes
    assert among(ax, [[k, k] for k in range(100)])
    assert among(ax, [[k, k - 0.5] for k in range(1, 100)]).get_color() == "#0072B2"
    assert among(ax, [[0, 1.256], [1, 1.256]]).get_color() == "k"


def test_main(tmp_path, monkeypatch, spy):
    """Options reach training, measuring and sampling; twins have the same start and noise."""
    names = "train measure least_loss sample there_and_back draw_loss draw_denoisers draw_samples "
    names += "draw_there_and_back table"
    monkeypatch.setattr(s.plt.Figure, "savefig", lambda *_, **__: None)
    for name, n in [("measure", 1000), ("there_and_back", 100)]:
        monkeypatch.setattr(s, name, partial(getattr(s, name), n=n))
    calls = {name: spy(s, name) for name in names.split()}
    s.main(f"--figures-dir {tmp_path} --train-steps 3 --num-steps 5 --sigma-q 4 --seed 3".split())

    (train,), (measure,), (least,) = calls["train"], calls["measure"], calls["least_loss"]
    (network, losses), (excess, bayes) = train.result, measure.result
    assert (train.sigma_q, train.train_steps, network.sigma_q) == (4, 3, 4)
    twin, learned = calls["sample"]
    assert twin.denoiser is measure.exact is calls["draw_denoisers"][0].exact
    x_t = torch.randn(5, 2, generator=torch_rng())
    want = brute_force(s, x_t, 2.0)
    np.testing.assert_allclose(twin.denoiser(x_t, 0.25), want, atol=0.01)
    assert learned.denoiser is measure.denoiser is calls["draw_denoisers"][0].denoiser is network
    assert twin.x_1.std().item() == pytest.approx(4, rel=0.05)
    assert torch.equal(twin.x_1, learned.x_1)
    assert torch.equal(twin.rng.get_state(), learned.rng.get_state()), "not the same noise"
    mean = partial(s.reverse_mean, denoiser=network)
    *_, x_0 = s.ddim(mean, twin.x_1, 5)
    assert torch.equal(learned.result["DDIM"], x_0)
    *_, x_0 = s.ddpm(mean, twin.x_1, 5, 4, learned.rng)
    assert torch.equal(learned.result["DDPM"], x_0)
    assert (least.denoiser, least.bayes) == (network, bayes)
    assert (calls["draw_loss"][0].losses, calls["draw_loss"][0].least) == (losses, least.result)
    for call in calls["draw_samples"]:
        assert torch.equal(call.x_0, learned.result[call.sampler])
        assert torch.equal(call.twins, twin.result[call.sampler])
    (back,) = calls["there_and_back"]
    assert (back.denoiser, back.num_steps, back.sigma_q) == (network, 5, 4)
    assert calls["draw_there_and_back"][0].clouds is back.result

    levels, distances = (call.rows for call in calls["table"])
    times, errors, shares = ([float(cell.rstrip("%")) for cell in row[1:]] for row in levels)
    assert times == pytest.approx(s.TIMES[::-1], rel=0.02), "t does not fall from 1 to 0"
    assert errors == pytest.approx(bayes[::-1], rel=0.01)
    assert shares == pytest.approx(100 * np.divide(excess, bayes)[::-1], abs=0.006)
    for (name, *cells), call in zip(distances[1:], calls["draw_samples"]):
        distance = np.hypot(*(call.x_0 - call.twins).numpy().T)
        median, far = (float(cell.rstrip("%")) for cell in cells)
        assert name == call.sampler
        assert median == pytest.approx(np.median(distance), abs=0.001)
        assert far == pytest.approx(100 * (distance > 0.1).mean(), abs=0.06)
