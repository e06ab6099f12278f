"""Experiment 8 held to references that share no code with it."""

import math
from functools import partial

import fast_samplers as s
import numpy as np
import pytest

CENTERS = [(math.cos(k * math.pi / 4), math.sin(k * math.pi / 4)) for k in range(8)]
UNEQUAL = np.arange(1, 9) / 36
SIGMAS = [3.0, 1.4, 0.5, 0.2, 0.0]


def starts(n=30, seed=0):
    return 2 * np.random.default_rng(seed).standard_normal((n, 2))


def bent(x, sigma):
    """In place of a denoiser: the samplers' steps are formulas in its values."""
    return np.tanh(x / (1 + sigma)) * (1 - 0.3 * sigma)


def test_mixture():
    n = 40_000
    x_0 = s.mixture(n, np.random.default_rng(0), weights=UNEQUAL, sigma_0=0.05)
    offsets = x_0[:, None] - CENTERS
    nearest = np.linalg.norm(offsets, axis=2).argmin(axis=1)
    for k, w in enumerate(UNEQUAL):
        assert (nearest == k).mean() == pytest.approx(w, abs=5 * (w * (1 - w) / n) ** 0.5)
    own = offsets[np.arange(n), nearest]
    assert own.std() == pytest.approx(0.05, abs=5 * 0.05 / (4 * n) ** 0.5)


@pytest.mark.parametrize("sigma", [0.2, 1.0, 4.0])
def test_denoiser_by_quadrature(sigma):
    """The mean of x_0 under prior times likelihood, summed over a lattice in the plane."""
    x_0 = np.stack(np.meshgrid(*[np.linspace(-2.5, 2.5, 201)] * 2), axis=-1).reshape(-1, 2)
    squares = ((x_0[:, None] - CENTERS) ** 2).sum(axis=2)
    prior = np.exp(-squares / (2 * 0.2**2)) @ UNEQUAL
    x = starts(5)
    likelihood = np.exp(-((x[:, None] - x_0) ** 2).sum(axis=2) / (2 * sigma**2))
    want = (prior * likelihood) @ x_0 / (likelihood @ prior)[:, None]
    got = s.denoiser(x, sigma, weights=UNEQUAL, sigma_0=0.2)
    np.testing.assert_allclose(got, want, atol=1e-8)


def test_ddim_on_uniform_t_is_algorithm_2():
    x, n, sigma_q = starts(), 6, 3.0
    for k, got in zip((6, 5, 4, 3, 2, 1), s.ddim(bent, x, s.uniform_t(n, sigma_q))):
        t, dt = k / n, 1 / n
        mean = (dt / t) * bent(x, sigma_q * t**0.5) + (1 - dt / t) * x  # eq. (24)
        x = x + t**0.5 / (abs(t - dt) ** 0.5 + t**0.5) * (mean - x)
        np.testing.assert_allclose(got, x, atol=1e-6)  # t - dt rounds, at 0 too


def test_heun_is_algorithm_1_of_karras_et_al():
    x = starts()
    for k, got in enumerate(s.heun(bent, x, SIGMAS)):
        t, next_t = SIGMAS[k], SIGMAS[k + 1]
        d = x / t - bent(x, t) / t
        after = x + (next_t - t) * d
        if k < 3:
            next_d = after / next_t - bent(after, next_t) / next_t
            after = x + (next_t - t) * (d / 2 + next_d / 2)
        np.testing.assert_allclose(got, after, atol=1e-13)
        x = after
    assert k == 3


def test_dpm_solver_2m_is_algorithm_2_of_lu_et_al():
    """With alpha = 1: h_i = lambda_i - lambda_{i-1}, r_i = h_{i-1} / h_i, lambda = -log sigma."""
    x, lambdas, outputs = starts(), -np.log(SIGMAS[:-1]), []
    for k, got in enumerate(s.dpm_solver_2m(bent, x, SIGMAS)):
        outputs.append(bent(x, SIGMAS[k]))
        h = lambdas[k + 1] - lambdas[k] if k < 3 else math.inf
        d = outputs[k]
        if 0 < k < 3:
            r = (lambdas[k] - lambdas[k - 1]) / h
            d = (1 + 1 / (2 * r)) * outputs[k] - 1 / (2 * r) * outputs[k - 1]
        x = SIGMAS[k + 1] / SIGMAS[k] * x - (math.exp(-h) - 1) * d
        np.testing.assert_allclose(got, x, atol=1e-13)
    assert k == 3


def test_grids():
    for name, grid in s.GRIDS.items():
        assert grid(1, 4.0) == pytest.approx([4, 0])
        sigmas = grid(12, 4.0)
        assert len(sigmas) == 13
        assert sigmas[[0, -1]] == pytest.approx([4, 0])
        even = {  # what its name says is uniform
            "uniform t": sigmas**2,
            "uniform sigma": sigmas,
            "log sigma": np.log(sigmas[:-1]),
            "rho = 7": sigmas[:-1] ** (1 / 7),
        }[name]
        np.testing.assert_allclose(even, np.linspace(even[0], even[-1], len(even)), atol=1e-12)
        if name in ("log sigma", "rho = 7"):
            assert sigmas[-2] == pytest.approx(0.002)


def test_solution_for_one_gaussian_and_its_digits():
    """One center: x keeps its place in the Gaussian. Eight: nine digits, by twice the steps."""
    x_1, one = starts(), np.where(np.arange(8) == 1, 1, 1e-300)
    want = CENTERS[1] + (x_1 - CENTERS[1]) * 0.05 / math.hypot(0.05, 4)
    got = s.solution(x_1, 4, weights=one, sigma_0=0.05)
    np.testing.assert_allclose(got, want, atol=1e-10)
    once = s.solution(x_1, 4, weights=UNEQUAL, sigma_0=0.05)
    twice = s.solution(x_1, 4, weights=UNEQUAL, sigma_0=0.05, num_steps=2000)
    np.testing.assert_allclose(once, twice, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", s.SAMPLERS)
def test_sample_spends_its_budget_and_nears_the_solution(name):
    data = {"weights": UNEQUAL, "sigma_0": 0.2}
    twins = s.solution(starts(), 2.0, **data)
    evaluated = []

    def counted(x, sigma):
        evaluated.append(sigma)
        return s.denoiser(x, sigma, **data)

    off = {}
    for grid in s.GRIDS:
        for budget in (1, 2, 7, 200):
            evaluated.clear()
            off[grid] = s.distance(s.sample(name, grid, budget, counted, starts(), 2.0), twins)
            assert budget - (name == "Heun") <= len(evaluated) <= budget
    assert off["rho = 7"] < off["log sigma"] < (0.01 if name == "DDIM" else 1e-3)
    assert off["uniform sigma"] < off["uniform t"] < 0.1


def test_distance():
    x = np.array([[3.0, 4.0], [0.0, 0.0], [0.0, 1.0]])
    assert s.distance(x + 1, np.ones((3, 2))) == pytest.approx((26 / 3) ** 0.5)


def test_main(tmp_path, capsys, monkeypatch):
    calls = {}

    def spy(*args, original):
        calls[original.__name__] = args, original(*args)
        return calls[original.__name__][1]

    for original in (s.measure, s.draw_grids, s.draw_samples):
        monkeypatch.setattr(s, original.__name__, partial(spy, original=original))
    monkeypatch.setattr(s, "BUDGETS", [5, 20])
    options = "--num-samples 500 --sigma-q 0.5 --sigma-0 0.3 --imbalance 8 --num-evaluations 7"
    s.main(f"--figures-dir {tmp_path} {options}".split())

    (known, x_1, twins, _), errors = calls["measure"]
    weights = known.keywords["weights"]
    np.testing.assert_allclose(weights[1:] / weights[:-1], 8 ** (1 / 7))
    squares = 1 + 2 * 0.3**2 + 2 * 0.5**2  # of p_1
    assert (x_1**2).sum(axis=1).mean() == pytest.approx(squares, rel=0.25)
    np.testing.assert_array_equal(twins, s.solution(x_1, 0.5, weights=weights, sigma_0=0.3))
    run = partial(s.sample, denoiser=known, x_1=x_1, sigma_q=0.5)
    for pair, row in errors.items():
        assert row == [s.distance(run(*pair, budget), twins) for budget in (5, 20)]
    (samples, its_twins, number), _ = calls["draw_samples"]
    assert its_twins is twins
    assert (number, *calls["draw_grids"][0]) == (7, 7, 0.5, 0.3)
    for pair, x_0 in samples.items():
        np.testing.assert_array_equal(x_0, run(*pair, 7))
    names = {"error-vs-evaluations", "grids", "samples"}
    assert {path.stem for path in tmp_path.iterdir()} == names
    _, header, *rows = capsys.readouterr().out.splitlines()
    assert header.split()[2:] == 4 * ["DDIM", "Heun", "DPM"]
    assert list(errors) == [(name, grid) for grid in s.GRIDS for name in s.SAMPLERS]
    assert len(rows) == 2
    for line, want in zip(rows, zip((5, 20), *errors.values())):
        assert [float(word) for word in line.split()] == pytest.approx(want, rel=0.06)
