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


@pytest.mark.parametrize("n", [1, 2, 12])
def test_grids(n):
    for name, grid in s.GRIDS.items():
        sigmas = grid(n, 4.0)
        assert len(sigmas) == n + 1
        assert sigmas[0] == pytest.approx(4)
        assert sigmas[-1] == 0
        even = {  # what its name says is uniform
            "uniform t": sigmas**2,
            "uniform sigma": sigmas,
            "log sigma": np.log(sigmas[:-1]),
            "rho = 7": sigmas[:-1] ** (1 / 7),
        }[name]
        np.testing.assert_allclose(even, np.linspace(even[0], even[-1], len(even)), atol=1e-12)
        if name in ("log sigma", "rho = 7") and n > 1:
            assert sigmas[-2] == pytest.approx(0.002)


def quantile_map(x, sigma, sigma_0, w):
    """From r N(1, ...) with probability w, else r N(-1, ...), r^2 = 1/2, noisy, to data: on a line.

    The ODE keeps the order of points there, so as much of the data lies below as did of p_1.
    """

    def below(y, std):
        parts = [p * math.erfc((c - y) / std / 2**0.5) / 2 for p, c in [(w, r), (1 - w, -r)]]
        return sum(parts)

    r = 0.5**0.5
    wanted = below(x, math.hypot(sigma_0, sigma))
    low, high = -r - 9 * sigma_0, r + 9 * sigma_0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if below(middle, sigma_0) < wanted else (low, middle)
    return low


@pytest.mark.parametrize(("sigma_0", "sigma_q"), [(0.05, 4.0), (0.3, 1.0), (0.02, 40.0)])
def test_solution_of_a_product_is_a_quantile_map_on_each_axis(sigma_0, sigma_q):
    """Four of the centers are the corners of a square; the others get no weight."""
    weights = np.full(8, 1e-300)
    weights[[1, 3, 5, 7]] = 0.7 * 0.4, 0.3 * 0.4, 0.3 * 0.6, 0.7 * 0.6
    x_1 = sigma_q * starts() / 2
    want = [[quantile_map(x, sigma_q, sigma_0, w) for x, w in zip(xy, (0.7, 0.4))] for xy in x_1]
    got = s.solution(x_1, sigma_q, weights=weights, sigma_0=sigma_0)
    np.testing.assert_allclose(got, want, atol=1e-8)


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
            assert evaluated[0] == pytest.approx(2)
            assert min(evaluated) > 0
    assert off["rho = 7"] < off["log sigma"] < (0.01 if name == "DDIM" else 1e-3)
    assert off["uniform sigma"] < off["uniform t"] < 0.1


def test_distance():
    x = np.array([[3.0, 4.0], [0.0, 0.0], [0.0, 1.0]])
    assert s.distance(x + 1, np.ones((3, 2))) == pytest.approx((26 / 3) ** 0.5)


def test_main(tmp_path, capsys, monkeypatch):
    calls = {}

    def spy_on(name, original):
        def spy(*args):
            calls[name] = args, original(*args)
            return calls[name][1]

        monkeypatch.setattr(s, name, spy)

    for name in ("measure", "draw_grids", "draw_samples"):
        spy_on(name, getattr(s, name))
    monkeypatch.setattr(s, "BUDGETS", [5, 20])
    options = "--num-samples 500 --sigma-q 0.5 --sigma-0 0.3 --imbalance 8 --num-evaluations 7"
    s.main(f"--figures-dir {tmp_path} {options}".split())

    (known, x_1, twins, _), errors = calls["measure"]
    weights = known.keywords["weights"]
    np.testing.assert_allclose(weights[1:] / weights[:-1], 8 ** (1 / 7))
    assert weights.sum() == pytest.approx(1)
    mean, squares = weights @ CENTERS, 1 + 2 * 0.3**2 + 2 * 0.5**2  # of p_1
    assert (abs(x_1.mean(axis=0) - mean) < 5 * (squares / 1000) ** 0.5).all()
    assert (x_1**2).sum(axis=1).mean() == pytest.approx(squares, rel=0.25)
    want = s.solution(x_1, 0.5, weights=weights, sigma_0=0.3)
    np.testing.assert_array_equal(twins, want)
    run = partial(s.sample, denoiser=known, x_1=x_1, sigma_q=0.5)
    for pair, row in errors.items():
        assert row == [s.distance(run(*pair, budget), twins) for budget in (5, 20)]

    (samples, its_twins, number), _ = calls["draw_samples"]
    assert its_twins is twins
    assert number == 7
    for pair, x_0 in samples.items():
        np.testing.assert_array_equal(x_0, run(*pair, 7))
    assert calls["draw_grids"][0] == (7, 0.5, 0.3)
    names = {"error-vs-evaluations", "grids", "samples"}
    assert {path.stem for path in tmp_path.iterdir()} == names
    grids, names, *rows = capsys.readouterr().out.splitlines()
    assert " ".join(grids.split()) == "error uniform t uniform sigma log sigma rho = 7"
    assert names.split()[2:] == 4 * ["DDIM", "Heun", "DPM"]
    assert list(errors) == [(name, grid) for grid in s.GRIDS for name in s.SAMPLERS]
    for k, line in enumerate(rows):
        want = [[5, 20][k], *(row[k] for row in errors.values())]
        assert [float(word) for word in line.split()] == pytest.approx(want, rel=0.06)
    assert len(rows) == 2
