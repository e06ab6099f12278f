"""Experiment 5 held to references that share no code with it."""

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


@pytest.mark.parametrize("t", [5e-4, 0.01, 0.2, 1.0])
@pytest.mark.parametrize("sigma_q", [0.1, 1.0, 100.0])
def test_both_denoisers(t, sigma_q):
    sigma_t = sigma_q * t**0.5
    points = s.swiss_roll(30, rng())
    x_t = s.add_noise(s.swiss_roll(600, rng(1)), t, sigma_q, rng(2))  # 600 rows: in two parts
    for got, data in [
        (s.exact_denoiser(x_t, t, sigma_q=sigma_q), ROLL),
        (s.empirical_denoiser(x_t, t, points=points, sigma_q=sigma_q), points.double().numpy()),
    ]:
        want = [brute_force_mean(x, sigma_t, data) for x in x_t[::40].double().numpy()]
        assert np.abs(got[::40].numpy() - want).max() < 0.01 * min(1, sigma_t)


def test_reverse_mean_by_regression():
    """Eq. (24) against draws of (x_{t-dt}, x_t) from five points: residuals have mean 0 in bins."""
    t, dt, n, g = 0.5, 0.2, 200_000, rng(2)
    points = s.swiss_roll(5, g)
    x_previous = s.add_noise(points[torch.randint(5, (n,), generator=g)], t - dt, 1.0, g)
    x_t = s.add_noise(x_previous, dt, 1.0, g)
    minimiser = partial(s.empirical_denoiser, points=points, sigma_q=1.0)
    residual = x_previous - s.reverse_mean(x_t, t, dt, denoiser=minimiser)
    for inside in (x_t[:, 0] < -1, x_t[:, 0].abs() < 0.3, x_t[:, 1] > 1):
        r = residual[inside]
        assert (r.mean(dim=0).abs() < 5 * r.std(dim=0) / len(r) ** 0.5).all()


def test_sample_on_a_point_mass():
    """To a point a, DDIM is at a + (x_1 - a) sqrt(t) after every step."""
    a = torch.tensor([[0.5, -1.0]])
    x_1 = torch.randn(100, 2, generator=rng())
    x_0, paths = s.sample(lambda x_t, t: a.expand(len(x_t), 2), x_1, 7)
    t = torch.arange(7, -1, -1)[:, None, None] / 7
    assert (paths - a - (x_1[: s.DRAWN] - a) * t**0.5).abs().max() < 1e-5
    assert (x_0 - a).abs().max() < 1e-5


def test_with_small_steps_the_minimiser_only_copies():
    """From t = dt on, DDIM is what it is from 1 on, with sigma_q sqrt(dt) for sigma_q.

    So the last step is replaced by 100 smaller ones, twice: it then has sigma_t = 1e-3.
    """
    points, sigma_q = s.swiss_roll(160, rng()), 1.0
    x = torch.randn(300, 2, generator=rng(1))
    for _ in range(3):
        denoiser = partial(s.empirical_denoiser, points=points, sigma_q=sigma_q)
        *_, x, x_0 = s.ddim(partial(s.reverse_mean, denoiser=denoiser), x, 100)
        sigma_q /= 10
    assert s.copies(x_0, points).double().mean() > 0.97


def test_preconditioning_is_the_best_linear_guess():
    c_skip, c_out, c_in, c_noise = s.Denoiser(2.0).preconditioning(0.3)
    x_0 = s.SIGMA_DATA * torch.randn(200_000, generator=rng())
    x_t = s.add_noise(x_0, 0.3, 2.0, rng(1))
    want = [x_t @ x_0 / (x_t @ x_t), (x_0 - c_skip * x_t).std(), 1 / x_t.std()]
    assert [c_skip, c_out, c_in] == pytest.approx([w.item() for w in want], rel=0.02)
    assert c_noise.item() == pytest.approx(math.log(2 * 0.3**0.5) / 2)


def test_trained_on_three_points_it_is_their_minimiser():
    points = torch.tensor([[0.6, 0.0], [-0.3, 0.5], [-0.3, -0.5]])
    denoiser, losses = s.train(points, sigma_q=2.0, train_steps=300, rng=rng(3))
    minimiser = partial(s.empirical_denoiser, points=points, sigma_q=2.0)
    g, floor = rng(4), []
    for u in torch.arange(0.5, 20):  # t log-uniform on [1 / 2000, 1]
        t = 2000 ** (-u.item() / 20)
        x_0 = points[torch.randint(3, (2000,), generator=g)]
        x_t = s.add_noise(x_0, t, 2.0, g)
        best = minimiser(x_t, t)
        assert (denoiser(x_t, t) - best).square().sum(dim=1).mean() < 0.005
        weight = 1 / (4 * t) + 1 / s.SIGMA_DATA**2  # 1 / c_out^2
        floor.append(weight * (best - x_0).square().sum(dim=1).mean().item())
    assert len(losses) == 300
    assert np.mean(losses[-100:]) == pytest.approx(np.mean(floor), rel=0.06)


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


def test_copies():
    steps = np.linalg.norm(np.diff(ROLL, axis=0), axis=1)
    assert pytest.approx(steps.sum(), rel=1e-5) == s.LENGTH
    points = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    near, far = 0.099 * s.LENGTH / 2, 0.101 * s.LENGTH / 2
    x_0 = torch.tensor([[near, 0.0], [far, 0.0], [1.0, near], [1.0, -far], [-near, 0.0]])
    assert s.copies(x_0, points).tolist() == [True, False, True, False, True]


def spied(monkeypatch, name):
    """The calls of a function: (arguments, keywords, what it returned)."""
    calls, original = [], getattr(s, name)

    def spy(*args, **keywords):
        calls.append((args, keywords, original(*args, **keywords)))
        return calls[-1][2]

    monkeypatch.setattr(s, name, spy)
    return calls


def test_main(tmp_path, capsys, monkeypatch):
    trained, measured, sampled = (spied(monkeypatch, w) for w in ("train", "excess", "sample"))
    monkeypatch.setattr(s, "NUM_POINTS", [10, 40, 160])
    monkeypatch.setattr(s.held_out, "__defaults__", (400,))  # n
    monkeypatch.setattr(s.plt.Figure, "savefig", lambda *_, dpi: None)  # see test_scripts.py
    s.main(f"--figures-dir {tmp_path} --train-steps 5 --num-steps 20 --sigma-q 4".split())

    rows = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    assert [int(row[0]) for row in rows] == s.NUM_POINTS
    x_1 = sampled[0][0][1]
    assert x_1.std().item() == pytest.approx(4, rel=0.1)
    t, x_t, _, bayes = measured[0][0][1][-1]  # in much noise
    assert x_t.var(dim=0).sum().item() == pytest.approx(2 * 4**2 * t, rel=0.2)
    assert bayes == pytest.approx(ROLL.var(axis=0).sum(), rel=0.1)
    for k, (n, row) in enumerate(zip(s.NUM_POINTS, rows)):
        points = trained[k][1]["points"]
        assert torch.equal(points, trained[-1][1]["points"][:n])  # each set holds the smaller ones
        network, minimiser = trained[k][2][0], sampled[2 * k + 1][0][0]
        assert torch.equal(minimiser.keywords["points"], points)
        assert network.sigma_q == minimiser.keywords["sigma_q"] == 4
        got = [float(word.strip("%")) for word in row]
        assert 15 < got[3] < 30  # about one in five, by chance
        for which, denoiser in enumerate([network, minimiser]):
            (of, start, num_steps), _, (x_0, _) = sampled[2 * k + which]
            assert of is measured[2 * k + which][0][0] is denoiser
            assert torch.equal(start, x_1)
            assert num_steps == 20
            copied = s.copies(x_0, points).double().mean().item()
            assert got[1 + which] == pytest.approx(100 * copied, abs=0.06)
            assert got[4 + which] == pytest.approx(measured[2 * k + which][2], rel=0.01)
