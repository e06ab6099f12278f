"""Experiment 5 held to references that share no code with it."""

from functools import partial

import generalization as s
import numpy as np
import pytest
import torch
from conftest import paste, snippet, torch_rng

FAR_AWAY = """
START, END = 1.0, 9.0
def curve(theta):
    return torch.stack([9 + theta * theta.cos() / 2, 3 * theta.sin() - 5], dim=1)
"""


def brute_force(x_t, sigma_t, points):
    """E[x_0 | x_t] for points with equal weights, by a plain sum in NumPy."""
    means = []
    for x in x_t.double().numpy():
        squares = ((x - points) ** 2).sum(axis=1) / (2 * sigma_t**2)
        weights = np.exp(squares.min() - squares)
        means.append(weights @ points / weights.sum())
    return np.array(means)


@pytest.mark.parametrize("data", ["START, END = 2, 9.5", FAR_AWAY, snippet(s)])
def test_the_truth_follows_the_data(data, tmp_path, monkeypatch):
    o = paste(s, data)
    part = (torch.arange(20_000, dtype=torch.double) + 0.5) / 20_000
    c = o.curve(o.START + (o.END - o.START) * part).numpy()
    points = o.swiss_roll(30, torch_rng())
    for t, sigma_q in [(5e-4, 0.1), (5e-4, 1.0), (0.01, 1.0), (1.0, 1.0), (1.0, 100.0)]:
        x_t = o.add_noise(o.swiss_roll(8, torch_rng(1)), t, sigma_q, torch_rng(2))
        for got, data_points in [
            (o.exact_denoiser(x_t, t, sigma_q=sigma_q), c),
            (o.empirical_denoiser(x_t, t, points=points, sigma_q=sigma_q), points.double().numpy()),
        ]:
            error = got.numpy() - brute_force(x_t, sigma_q * t**0.5, data_points)
            assert np.abs(error).max() < 0.01 * min(o.SPREAD, sigma_q * t**0.5), "not the mean"
    length = np.linalg.norm(np.diff(c, axis=0), axis=1).sum()
    assert length == pytest.approx(o.LENGTH, rel=1e-3)
    x_0 = o.swiss_roll(5000, torch_rng())
    assert x_0.square().sum(dim=1).mean().item() == pytest.approx(2 * o.SIGMA_DATA**2, rel=0.06)
    if data == snippet(s):
        monkeypatch.setattr(s.plt.Figure, "savefig", lambda *_, **__: None)
        o.NUM_POINTS, o.held_out = [3, 4, 5], partial(o.held_out, n=50)
        few = "--train-steps 2 --num-steps 2 --num-samples 20 --figures-dir".split()
        o.main([*few, str(tmp_path)])


def test_posterior_mean_in_little_noise():
    """Points about sigma_t apart, for the smallest sigma_t that DDIM comes to; rows in parts."""
    points, sigma_t = s.curve(torch.linspace(9, 9.02, 60)), 3e-4
    x_t = points + sigma_t * torch.randn(60, 2, generator=torch_rng())
    got = s.posterior_mean(x_t.repeat(300, 1), points, sigma_t).numpy()
    want = brute_force(x_t, sigma_t, points.double().numpy())
    assert np.abs(got - np.tile(want, (300, 1))).max() < 0.01 * sigma_t


def test_paths_to_a_point_mass():
    """To a point a, DDIM is at a + (x_1 - a) sqrt(t) after every step, also with steps uneven."""
    a, seen = torch.tensor([[0.5, -1.0]]), []
    x_1 = torch.randn(100, 2, generator=torch_rng())

    def denoiser(x_t, t):
        seen.append(t)
        return a.expand(len(x_t), 2)

    runs = s.paths(denoiser, x_1, 4, 1e-6)
    assert seen == pytest.approx([1, 1e-2, 1e-4, 1e-6])
    root_t = torch.tensor([1, 0.1, 0.01, 0.001, 0])[:, None, None]
    assert (runs - a - (x_1 - a) * root_t).abs().max() < 1e-5


def test_the_minimiser_copies():
    data, x_1 = s.swiss_roll(640, torch_rng()), torch.randn(100, 2, generator=torch_rng(1))
    for n in (10, 640):
        minimiser = partial(s.empirical_denoiser, points=data[:n], sigma_q=1.0)
        x_0 = s.paths(minimiser, x_1, 30, s.MIN_T)[-1]
        copies = s.nearest(x_0, data[:n]) < s.NEAR
        assert copies.all(), f"{copies.double().mean():.0%} of the minimiser's samples are copies"
    assert (s.nearest(s.paths(minimiser, x_1, 30, 1e-2)[-1], data) < s.NEAR).double().mean() < 0.3


def test_trained_on_three_points_it_is_their_minimiser():
    points = torch.tensor([[0.6, 0.0], [-0.3, 0.5], [-0.3, -0.5]])
    denoiser = s.train(points, 2.0, 100, torch_rng(3))
    g, units = torch_rng(4), []
    for u in torch.arange(0.5, 20):  # t log-uniform on [1e-7, 1]
        t = 1e-7 ** (u.item() / 20)
        x_t = s.add_noise(points[torch.randint(3, (1000,), generator=g)], t, 2.0, g)
        best = s.empirical_denoiser(x_t, t, points=points, sigma_q=2.0)
        error = (denoiser(x_t, t) - best).square().sum(dim=1).mean().item()
        units.append(error * (1 / (4 * t) + 1 / s.SIGMA_DATA**2))  # over c_out^2
    assert np.mean(units) < 1.2, "far from the posterior mean over the points"  # untrained: 1.56


def test_measuring():
    """Off by (.1, .2) is E|f - D|^2 = .05 at every t; distances are in spacings."""
    exact = partial(s.exact_denoiser, sigma_q=2.0)
    draws = s.held_out(exact, 2.0, torch_rng(5), n=2000)
    for (t, x_t, *_), want in zip(draws, s.TIMES):
        assert t == want
        assert x_t.var(dim=0).sum().item() == pytest.approx(2 * (0.4305**2 + 4 * t), rel=0.12)
    bayes = [error for *_, error in draws]
    assert bayes[0] == pytest.approx(4 * s.TIMES[0], rel=0.2)  # across the curve all is known
    off = s.excess(lambda x, t: exact(x, t) + torch.tensor([0.1, 0.2]), draws)
    assert off == pytest.approx(np.mean(0.05 / np.array(bayes)), rel=1e-3)
    x_0 = torch.tensor([[0.1, 0.0], [1.0, -0.3], [0.2, 0.0], [-0.4, 0.0]])
    want = np.array([0.1, 0.3, 0.2, 0.4]) * 2 / s.LENGTH
    assert s.nearest(x_0, torch.tensor([[0.0, 0.0], [1.0, 0.0]])).tolist() == pytest.approx(want)


def drawn(ax, points):
    """The colors of what is drawn in a panel at these points."""
    lines = [line for line in ax.lines if line.get_xydata().shape == tuple(np.shape(points))]
    return [line.get_color() for line in lines if np.allclose(line.get_xydata(), points)]


def test_drawn(monkeypatch):
    monkeypatch.setattr(s, "NUM_POINTS", [3, 4, 5])
    blue, pink = "#0072B2", "#CC79A7"
    g, data = torch_rng(7), s.swiss_roll(5, torch_rng(6))
    which = [(name, n) for name in ("network", "minimiser") for n in (3, 4, 5)]
    runs = {key: torch.randn(3, 8, 2, generator=g) + 5 for key in which}
    for k, run in enumerate(runs.values()):
        run[-1, : k + 1] = data[k % 3]  # in every panel another number of copies
    for k, (ax, (name, n)) in enumerate(zip(s.draw_trajectories(runs, data).axes, which)):
        for j, run in enumerate(runs[name, n].unbind(dim=1)):
            assert drawn(ax, run) == ["0.7" if j <= k else blue]
        assert drawn(ax, data[:n]) == ["k"]

    (ax,) = s.draw_errors({key: k + 1 for k, key in enumerate(which)}).axes
    assert drawn(ax, [[3, 100], [4, 200], [5, 300]]) == [blue]
    assert drawn(ax, [[3, 400], [4, 500], [5, 600]]) == [pink]

    distances = {("network", 5): [0.05, 0.15, 0.15, 0.31], ("fresh draws", 5): [0.25, 0.05]}
    (ax,) = s.draw_distances({key: torch.tensor(x) for key, x in distances.items()}, 5).axes
    (bars,), (step,) = ax.containers[:1], [p for p in ax.patches if hasattr(p, "get_xy")][-1:]
    assert [bar.get_height() for bar in bars] == pytest.approx([0.25, 0.5, 0, 0.25, 0])
    assert bars[1].get_x() == pytest.approx(0.1)
    assert step.get_xy()[1:7:2, 1] == pytest.approx([0.5, 0, 0.5])

    theta = torch.linspace(s.START, s.END, 2000)  # what each puts out is 0.1 k lower
    shifted = [lambda x_t, t, k=k: s.curve(theta - 0.1 * k) for k in range(7)]
    axes = s.draw_denoisers(dict(zip(which, shifted)), shifted[6], data, 0.25).axes
    for j, ax in enumerate(axes):
        lines = [line for line in ax.lines if len(line.get_xydata()) == 2000]
        by = {line.get_color(): line.get_xydata()[500:].T for line in lines}
        for color, k in [("k", 6), (pink, 3 + j), (blue, j)]:
            np.testing.assert_allclose(by[color][0] - by[color][1], 0.1 * k, atol=0.006)


def test_main(tmp_path, monkeypatch, spy):
    names = "train excess paths draw_trajectories draw_distances draw_denoisers draw_errors measure"
    calls = {name: spy(s, name) for name in [*names.split(), "table"]}
    monkeypatch.setattr(s, "NUM_POINTS", [10, 20, 40])
    monkeypatch.setattr(s, "held_out", partial(s.held_out, n=400))
    monkeypatch.setattr(s.plt.Figure, "savefig", lambda *_, **__: None)
    flags = "--train-steps 5 --num-steps 9 --sigma-q 4 --last-t 0.001 --num-samples 300"
    s.main(f"--figures-dir {tmp_path} {flags}".split())

    (measure,), (drawing,) = calls["measure"], calls["draw_denoisers"]
    data, x_1 = measure.data, calls["paths"][0].x_1
    assert x_1.std().item() == pytest.approx(4, rel=0.15)
    t, x_t, best, _ = calls["excess"][0].draws[-1]  # in much noise
    assert x_t.var(dim=0).sum().item() == pytest.approx(2 * (0.4305**2 + 16 * t), rel=0.2)
    torch.testing.assert_close(best, s.exact_denoiser(x_t, t, sigma_q=4))
    torch.testing.assert_close(drawing.exact(x_t, t), best)
    assert drawing.t == min(s.TIMES)
    assert calls["draw_trajectories"][0].runs is measure.runs
    assert calls["draw_distances"][0].distances is measure.result
    assert calls["draw_distances"][0].n == 40
    assert drawing.data is calls["draw_trajectories"][0].data is data

    paths, excess = iter(calls["paths"]), iter(calls["excess"])
    for n, train, row in zip(s.NUM_POINTS, calls["train"], calls["table"][0].rows[1:]):
        assert torch.equal(train.points, data[:n])  # each set holds the smaller ones
        assert (train.sigma_q, train.train_steps, train.result.sigma_q) == (4, 5, 4)
        ends, errors = {"fresh draws": measure.fresh}, []
        for name in ("network", "minimiser"):
            denoiser, run, error = drawing.denoisers[name, n], next(paths), next(excess)
            assert denoiser is run.denoiser is error.denoiser
            assert run.x_1 is x_1
            assert (run.num_steps, run.last_t) == (9, 0.001)
            assert run.result is measure.runs[name, n]
            assert calls["draw_errors"][0].errors[name, n] == error.result
            ends, errors = {name: run.result[-1], **ends}, [*errors, 100 * error.result]
        assert drawing.denoisers["network", n] is train.result
        want = s.empirical_denoiser(x_t, t, points=data[:n], sigma_q=4)
        torch.testing.assert_close(denoiser(x_t, t), want)
        found = [float(cell.rstrip("%")) for cell in row]
        shares = []
        for name in ("network", "minimiser", "fresh draws"):
            apart = np.linalg.norm(ends[name].numpy()[:, None] - data[:n].numpy(), axis=2).min(1)
            shares.append(100 * (apart * n / s.LENGTH < 0.1).mean())
        assert found == pytest.approx([n, *shares, *errors], abs=0.06)
