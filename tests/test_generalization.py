"""Experiment 5 held to references that share no code with it."""

import itertools
import math
from functools import partial

import generalization as s
import numpy as np
import pytest
import torch


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def brute_force_mean(x_t, sigma_t, points):
    """E[x_0 | x_t] for one x_t and equal weights, by a plain sum in NumPy."""
    squares = ((x_t - points) ** 2).sum(axis=1) / (2 * sigma_t**2)
    weights = np.exp(squares.min() - squares)
    return weights @ points / weights.sum()


THETA = np.linspace(math.pi / 2, 4 * math.pi, 20_000)
ROLL = np.stack([THETA * np.cos(THETA), THETA * np.sin(THETA)], axis=1) / (4 * math.pi)


def test_both_denoisers():
    points = s.swiss_roll(30, rng())
    for t, sigma_q in itertools.product([5e-4, 0.01, 0.2, 1.0], [0.1, 1.0, 100.0]):
        sigma_t = sigma_q * t**0.5
        x_t = s.add_noise(s.swiss_roll(600, rng(1)), t, sigma_q, rng(2))  # 600 rows: in two parts
        for got, data in [
            (s.exact_denoiser(x_t, t, sigma_q=sigma_q), ROLL),
            (s.empirical_denoiser(x_t, t, points=points, sigma_q=sigma_q), points.double().numpy()),
        ]:
            want = [brute_force_mean(x, sigma_t, data) for x in x_t[::40].double().numpy()]
            assert np.abs(got[::40].numpy() - want).max() < 0.01 * min(1, sigma_t), (t, sigma_q)


def test_posterior_mean_in_little_noise():
    """Points about sigma_t apart, for the smallest sigma_t that DDIM comes to."""
    points, sigma_t = s.curve(torch.linspace(9, 9.02, 60)), 3e-4
    x_t = points + sigma_t * torch.randn(60, 2, generator=rng())
    got = s.posterior_mean(x_t, points, sigma_t).numpy()
    x_t, points = x_t.double().numpy(), points.double().numpy()
    want = [brute_force_mean(x, sigma_t, points) for x in x_t]
    assert np.abs(got - want).max() < 0.01 * sigma_t


def test_sample_on_a_point_mass():
    """To a point a, DDIM is at a + (x_1 - a) sqrt(t) after every step, also with steps uneven."""
    a = torch.tensor([[0.5, -1.0]])
    x_1 = torch.randn(100, 2, generator=rng())
    seen = []

    def denoiser(x_t, t):
        seen.append(t)
        return a.expand(len(x_t), 2)

    paths = s.sample(denoiser, x_1, 4, 1e-6)
    assert seen == pytest.approx([1, 1e-2, 1e-4, 1e-6])
    root_t = torch.tensor([1, 0.1, 0.01, 0.001, 0])[:, None, None]
    assert (paths - a - (x_1 - a) * root_t).abs().max() < 1e-5
    for path, point in zip(s.sample(denoiser, x_1, 1, 1e-6), (x_1, a)):
        assert (path - point).abs().max() < 1e-5


def test_one_ddim_step_on_a_gaussian():
    """Data N(0, 1), sigma_q = 2: D = x_t / (1 + 4 t), and a step of Algorithm 2 by hand."""
    x_t = torch.tensor([[3.0, -1.0]])
    mean = partial(s.reverse_mean, denoiser=lambda x_t, t: x_t / (1 + 4 * t))
    (x_r,) = s.ddim(mean, x_t, [0.49, 0.25])
    lam, back = 0.7 / (0.5 + 0.7), (1 + 4 * 0.25) / (1 + 4 * 0.49)
    assert (x_r - (1 + lam * (back - 1)) * x_t).abs().max() < 1e-6


def test_the_minimiser_only_copies():
    """At every N shown; and not if the last step is from much noise."""
    roll, x_1 = s.swiss_roll(640, rng()), torch.randn(200, 2, generator=rng(1))
    for n in s.NUM_POINTS:
        minimiser = partial(s.empirical_denoiser, points=roll[:n], sigma_q=1.0)
        x_0 = s.sample(minimiser, x_1, 40, s.MIN_T)[-1]
        assert (s.nearest(x_0, roll[:n]) < s.NEAR).all()
    assert (s.nearest(s.sample(minimiser, x_1, 40, 1e-2)[-1], roll) < s.NEAR).double().mean() < 0.3


def test_trained_on_three_points_it_is_their_minimiser():
    points = torch.tensor([[0.6, 0.0], [-0.3, 0.5], [-0.3, -0.5]])
    denoiser = s.train(points, 2.0, 500, rng(3))
    g, units = rng(4), []
    for u in torch.arange(0.5, 20):  # t log-uniform on [1e-7, 1]
        t = 1e-7 ** (u.item() / 20)
        x_t = s.add_noise(points[torch.randint(3, (2000,), generator=g)], t, 2.0, g)
        best = s.empirical_denoiser(x_t, t, points=points, sigma_q=2.0)
        error = (denoiser(x_t, t) - best).square().sum(dim=1).mean().item()
        assert error < 0.005
        units.append(error * (1 / (4 * t) + 1 / s.SIGMA_DATA**2))  # over c_out^2
    assert np.mean(units) < 0.6  # of an untrained one 2


def test_excess_of_a_known_error():
    """A denoiser that is off by (.1, .2) has E|f - D|^2 = .05 at every t."""
    exact = partial(s.exact_denoiser, sigma_q=2.0)
    draws = s.held_out(exact, 2.0, rng(5), n=5000)
    assert [t for t, *_ in draws] == s.TIMES
    assert np.log(s.TIMES) / math.log(1 / 2000) == pytest.approx(np.arange(6.5, 0, -1) / 7)
    for t, x_t, best, _ in draws:
        assert x_t.var(dim=0).sum().item() == pytest.approx(ROLL.var(axis=0).sum() + 8 * t, rel=0.1)
        assert torch.equal(best, exact(x_t, t))
    bayes = [error for *_, error in draws]
    assert bayes[0] == pytest.approx(4 * s.TIMES[0], rel=0.05)  # across the curve all is known
    assert bayes[-1] < ROLL.var(axis=0).sum()

    def shifted(x_t, t):
        return exact(x_t, t) + torch.tensor([0.1, 0.2])

    assert s.excess(shifted, draws) == pytest.approx(np.mean(0.05 / np.array(bayes)), rel=1e-3)


def test_nearest():
    steps = np.linalg.norm(np.diff(ROLL, axis=0), axis=1)
    assert pytest.approx(steps.sum(), rel=1e-5) == s.LENGTH
    points = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    x_0 = torch.tensor([[0.1, 0.0], [1.0, -0.3], [0.2, 0.0], [-0.4, 0.0]])
    want = np.array([0.1, 0.3, 0.2, 0.4]) * 2 / s.LENGTH
    assert s.nearest(x_0, points).tolist() == pytest.approx(want)


def lines(ax):
    return {line.get_label(): line for line in ax.lines}


def test_drawn(monkeypatch):
    """Each curve is what its label says, in the panel whose title says so."""
    monkeypatch.setattr(s, "NUM_POINTS", [3, 4, 5])
    colors = {"network": "#0072B2", "minimiser": "#CC79A7"}
    g, roll = rng(7), s.swiss_roll(5, rng(6))
    paths = {(name, n): torch.randn(3, 8, 2, generator=g) + 5 for name in colors for n in (3, 4, 5)}
    for k, path in enumerate(paths.values()):
        path[-1, : k + 1] = roll[k % 3]  # in every panel another number of copies
    axes = s.draw_trajectories(paths, roll).axes
    for k, (ax, ((name, n), path)) in enumerate(zip(axes, paths.items())):
        assert ax.get_title() == f"{name}, $N$ = {n}: {(k + 1) / 8:.0%} copies"
        dots = lines(ax)
        np.testing.assert_array_equal(dots["copies"].get_xydata(), path[-1, : k + 1])
        np.testing.assert_array_equal(dots["other samples"].get_xydata(), path[-1, k + 1 :])
        np.testing.assert_array_equal(dots["training points"].get_xydata(), roll[:n])
        assert dots["the roll"].zorder < ax.lines[0].zorder
        for drawn, j in zip([*ax.lines[: k + 1], *ax.lines[k + 2 :]], range(8)):
            np.testing.assert_array_equal(drawn.get_xydata(), path[:, j])
            assert drawn.get_color() == ("0.7" if j <= k else "#0072B2")

    (ax,) = s.draw_errors({which: k + 1 for k, which in enumerate(paths)}).axes
    for k, (name, color) in enumerate(colors.items()):
        assert lines(ax)[name].get_color() == color
        np.testing.assert_array_equal(
            lines(ax)[name].get_xydata().T, [[3, 4, 5], 3 * k + np.r_[1:4]]
        )

    distances = {("network", 5): [0.05, 0.15, 0.15, 0.31], ("fresh draws", 5): [0.25, 0.05]}
    (ax,) = s.draw_distances({key: torch.tensor(x) for key, x in distances.items()}, 5).axes
    bars, step = ax.containers[0], ax.patches[-1]
    assert [bar.get_height() for bar in bars] == pytest.approx([0.25, 0.5, 0, 0.25, 0])
    assert bars[1].get_x() == pytest.approx(0.1)
    assert step.get_xy()[1:7:2, 1] == pytest.approx([0.5, 0, 0.5])
    assert (bars[0].get_label(), step.get_label()) == ("network", "fresh draws")
    assert ax.get_title() == "$N$ = 5; nearer than 0.1: a copy"

    theta = torch.linspace(math.pi / 2, 4 * math.pi, 2000)  # what each puts out is 0.1 k lower
    shifted = [lambda x_t, t, k=k: s.curve(theta - 0.1 * k) for k in range(7)]
    axes = s.draw_denoisers(dict(zip(paths, shifted)), shifted[6], roll, 0.25).axes
    for j, (ax, n) in enumerate(zip(axes, (3, 4, 5))):
        assert ax.get_title() == f"$N$ = {n}, $t$ = 0.25"
        drawn = [("$D$, of the roll", "k", ax.lines[0], 6)]
        drawn += [("minimiser", colors["minimiser"], ax.lines[1], 3 + j)]
        drawn += [("network", colors["network"], ax.lines[3], j)]
        for name, color, line, k in drawn:
            assert lines(ax)[name].get_color() == line.get_color() == color
            x, y = line.get_xydata()[500:].T
            np.testing.assert_allclose(x - y, 0.1 * k, atol=0.006)
        x, y = lines(ax)["training points"].get_xydata().T
        np.testing.assert_allclose(s.curve(torch.tensor(x)), roll[:n], atol=0.004)
        np.testing.assert_array_equal(x, y)


def spied(monkeypatch, name):
    """The calls of a function: (arguments, what it returned)."""
    calls, original = [], getattr(s, name)

    def spy(*args):
        calls.append((args, original(*args)))
        return calls[-1][1]

    monkeypatch.setattr(s, name, spy)
    return calls


def test_main(tmp_path, monkeypatch):
    names = (
        "train excess sample measure draw_trajectories draw_distances draw_denoisers draw_errors"
    )
    calls = {name: spied(monkeypatch, name) for name in names.split()}
    printed, saved = [], []
    monkeypatch.setattr(s, "NUM_POINTS", [10, 40, 160])
    monkeypatch.setattr(s.held_out, "__defaults__", (400,))  # n
    monkeypatch.setattr(s, "table", printed.extend)
    monkeypatch.setattr(s.plt.Figure, "savefig", lambda _, path, dpi: saved.append(path.stem))
    flags = "--train-steps 5 --num-steps 20 --sigma-q 4 --last-t 0.001 --num-samples 500"
    s.main(f"--figures-dir {tmp_path} {flags}".split())

    assert saved == ["trajectories", "distances", "which-denoiser", "error-vs-n"]
    (network, x_1, *steps), _ = calls["sample"][0]
    assert steps == [20, 0.001]
    assert x_1.std().item() == pytest.approx(4, rel=0.1)
    t, x_t, _, bayes = calls["excess"][0][0][1][-1]  # in much noise
    assert x_t.var(dim=0).sum().item() == pytest.approx(2 * 4**2 * t, rel=0.2)
    assert bayes == pytest.approx(ROLL.var(axis=0).sum(), rel=0.1)
    paths, roll = calls["draw_trajectories"][0][0]
    distances, of = calls["draw_distances"][0][0]
    denoisers, exact, *same = calls["draw_denoisers"][0][0]
    (errors,) = calls["draw_errors"][0][0]
    *_, fresh = calls["measure"][0][0]
    assert len(fresh) == 4000
    assert (of, exact.func, exact.keywords) == (160, s.exact_denoiser, {"sigma_q": 4})
    assert same[0] is roll
    assert same[1] == s.TIMES[0]

    head, *rows = printed
    assert head == [
        "N",
        *"copies: network,minimiser,fresh draws,excess: network,minimiser".split(","),
    ]
    for k, (n, row) in enumerate(zip(s.NUM_POINTS, rows)):
        (points, *settings, _), network = calls["train"][k]
        assert torch.equal(points, roll[:n])  # each set holds the smaller ones
        assert settings == [4, 5]
        assert (network, network.sigma_q) == (denoisers["network", n], 4)
        minimiser = denoisers["minimiser", n]
        assert torch.equal(minimiser.keywords["points"], points)
        assert minimiser.keywords["sigma_q"] == 4
        ends = {"fresh draws": fresh}
        for which, name in enumerate(("network", "minimiser")):
            (denoiser, start, *_), path = calls["sample"][2 * k + which]
            (measured, _), error = calls["excess"][2 * k + which]
            assert denoiser is measured is denoisers[name, n]
            assert start is x_1
            assert path is paths[name, n]
            assert errors[name, n] == error == pytest.approx(float(row[4 + which]), rel=0.06)
            ends = {**ends, name: path[-1]}
        for name, cell in zip(("network", "minimiser", "fresh draws"), row[1:]):
            apart = np.linalg.norm(ends[name].numpy()[:, None] - points.numpy(), axis=2).min(axis=1)
            apart = apart * n / s.LENGTH
            np.testing.assert_allclose(distances[name, n], apart, rtol=1e-3, atol=1e-4)
            assert float(cell[:-1]) == pytest.approx(100 * (apart < 0.1).mean(), abs=0.06)
        assert row[0] == str(n)
        assert len(set(row)) == 6
