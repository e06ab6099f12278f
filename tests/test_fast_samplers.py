"""Experiment 8 held to references that share no code with it."""

import math

import fast_samplers as s
import numpy as np
import pytest
from conftest import paste, rng, snippet
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

SIGMAS = [3.0, 1.4, 0.5, 0.001, 0.0]
RUNS = [(name, grid) for name in s.SOLVERS for grid in s.GRIDS]


def close(got, want, hint, **tolerance):
    assert got is not None, hint
    assert np.shape(got) == np.shape(want), hint
    assert np.allclose(got, want, **{"rtol": 1e-9, "atol": 1e-9, **tolerance}), hint


def starts(n=30):
    return 2 * rng().standard_normal((n, 2))


def bent(x, sigma):
    """In place of a denoiser: the samplers' steps are formulas in its values."""
    return np.tanh(x / (1 + sigma)) * (1 - 0.3 * sigma)


OTHER_DATA = {
    "the script's": "ANGLES = 2 * np.pi * np.arange(8) / 8",
    "the page's": snippet(s),
    "three times as large": "CENTERS = [[27.0, 1.0], [30.5, -2.0], [33.0, 4.0], [29.0, 5.5]]",
    "one": "CENTERS = np.array([[-2.0, 0.5]])",
}


@pytest.mark.parametrize("code", OTHER_DATA.values(), ids=OTHER_DATA)
def test_the_truth_follows_the_data(code):
    """Draws; prior times likelihood, summed over a lattice; the solution by tiny Euler steps."""
    m, sigma_0 = paste(s, code), 0.3
    centers = np.array(m.CENTERS, float)
    weights = np.arange(1, len(centers) + 1) / sum(range(1, len(centers) + 1))
    data, n = {"weights": weights, "sigma_0": sigma_0}, 20_000
    offsets = m.mixture(n, rng(1), weights=weights, sigma_0=0.05)[:, None] - centers
    nearest = np.linalg.norm(offsets, axis=2).argmin(axis=1)
    for k, w in enumerate(weights):
        error = (w * (1 - w) / n) ** 0.5
        assert abs((nearest == k).mean() - w) <= 5 * error, "mixture: centers by their weights"
    own = offsets[np.arange(n), nearest]
    close(own.std(), 0.05, "mixture: plus N(0, sigma_0^2 I)", atol=5 * 0.05 / (4 * n) ** 0.5)

    low, high = centers.min(axis=0) - 1.8, centers.max(axis=0) + 1.8
    axes = [np.arange(*ends, 0.06) for ends in zip(low, high)]
    x_0 = np.stack(np.meshgrid(*axes), axis=-1).reshape(-1, 2)
    prior = np.exp(-((x_0[:, None] - centers) ** 2).sum(axis=2) / (2 * sigma_0**2)) @ weights
    for sigma in (0.2, 1.0, 4.0):
        x = centers[rng(2).integers(len(centers), size=5)] + sigma * starts(5) / 2
        likelihood = np.exp(-((x[:, None] - x_0) ** 2).sum(axis=2) / (2 * sigma**2)) * prior
        want = likelihood @ x_0 / likelihood.sum(axis=1, keepdims=True)
        close(m.denoiser(x, sigma, **data), want, "denoiser: E[x_0 | x], Bayes' rule", atol=1e-6)

    twins, slope = m.solution(x, 4.0, **data), (x - want) / 4.0
    hint = "solution: along dx/dsigma = (x - D) / sigma, from sigma_max to 0"
    close(m.solution(x - 1e-4 * slope, 4.0 - 1e-4, **data), twins, hint, atol=1e-6)
    close(m.solution(x, 1e-6, **data), x, "solution: at sigma = 0 it ends where it starts")
    close(m.solution(x, 4.0, **data, num_steps=500), twins, "solution: eight digits", atol=2e-8)
    own = centers[0] + (x - centers[0]) * sigma_0 / math.hypot(sigma_0, 4)
    if len(centers) == 1:
        close(twins, own, "solution: one Gaussian, in which x keeps its place")


def test_data_that_it_cannot_do(capsys):
    for data in (
        "[1.0, 2.0]",
        "[[1, 2, 3]]",
        "[[1.0, np.nan]]",
        "[[1, 2], [3]]",
        "np.zeros((0, 2))",
    ):
        with pytest.raises(SystemExit, match="2"):
            paste(s, f"CENTERS = {data}").main([])
        assert "CENTERS" in capsys.readouterr().err.splitlines()[-1]


def test_ddim_on_uniform_t_is_algorithm_2():
    x, n, sigma_q, want = starts(), 6, 3.0, []
    for t in np.arange(n, 0, -1) / n:
        mean = bent(x, sigma_q * t**0.5) / n / t + (1 - 1 / n / t) * x  # eq. (24)
        x = x + t**0.5 / (abs(t - 1 / n) ** 0.5 + t**0.5) * (mean - x)
        want.append(x)
    got = [*s.ddim(bent, starts(), s.uniform_t(n, sigma_q))]
    close(got, want, "ddim: Algorithm 2 on its own grid", atol=1e-6)  # t - dt rounds, at 0 too


def test_heun_is_algorithm_1_of_karras_et_al():
    x, want = starts(), []
    for t, next_t in zip(SIGMAS, SIGMAS[1:]):
        d = x / t - bent(x, t) / t
        after = x + (next_t - t) * d
        if next_t:
            next_d = after / next_t - bent(after, next_t) / next_t
            after = x + (next_t - t) * (d / 2 + next_d / 2)
        want.append(x := after)
    hint = "heun: the mean of the slopes at both ends of Euler's step; to sigma = 0 Euler's step"
    close([*(s.heun(bent, starts(), SIGMAS) or [])], want, hint)


def test_dpm_solver_2m_is_algorithm_2_of_lu_et_al():
    """With alpha = 1: h_i = lambda_i - lambda_{i-1}, r_i = h_{i-1} / h_i, lambda = -log sigma."""
    x, lambdas, outputs, want = starts(), -np.log(SIGMAS[:-1]), [], []
    for k in range(4):
        outputs.append(bent(x, SIGMAS[k]))
        h, d = lambdas[k + 1] - lambdas[k] if k < 3 else math.inf, outputs[k]
        if 0 < k < 3:
            r = (lambdas[k] - lambdas[k - 1]) / h
            d = (1 + 1 / (2 * r)) * outputs[k] - 1 / (2 * r) * outputs[k - 1]
        want.append(x := SIGMAS[k + 1] / SIGMAS[k] * x - (math.exp(-h) - 1) * d)
    hint = "dpm_solver_2m: DDIM's step with D + h / (2 h_before) (D - D_before) in place of D"
    close([*(s.dpm_solver_2m(bent, starts(), SIGMAS) or [])], want, hint)


def test_grids():
    """Uniform in what its name says, but for the last step of two of them."""
    for name, inverse, steps in [
        ("uniform t", lambda sigma: sigma**2, 12),
        ("uniform sigma", lambda sigma: sigma, 12),
        ("log sigma", np.log, 11),
        ("rho = 7", lambda sigma: sigma ** (1 / 7), 11),
    ]:
        close(s.GRIDS[name](1, 4.0), [4, 0], name)
        sigmas = s.GRIDS[name](12, 4.0)
        first, last = inverse(np.array([4.0, 0 if steps == 12 else 0.002]))
        close(inverse(sigmas[: steps + 1]), np.linspace(first, last, steps + 1), name)
        close(sigmas[12:], [0], name)


def test_sample_spends_its_budget_and_nears_the_solution():
    """Evaluations are counted where they happen; Heun's are 2 n - 1, so it may leave one over."""
    data, evaluated, off = {"weights": np.arange(1, 9) / 36, "sigma_0": 0.2}, [], {}

    def counted(x, sigma):
        evaluated.append(sigma)
        return s.denoiser(x, sigma, **data)

    twins = s.solution(starts(), 2.0, **data)
    for budget in (1, 2, 7, 200):
        evaluated.clear()
        for run, x_0 in s.sample(counted, starts(), 2.0, budget).items():
            off[run] = s.apart(x_0, twins)
        least = sum(budget - (name == "Heun" and budget % 2 == 0) for name, _ in RUNS)
        assert len(evaluated) == least, "sample: as many steps as the evaluations allow"
    assert max(off[name, "rho = 7"] for name in s.SOLVERS) < 0.01
    assert max(off.values()) < 0.1
    x = np.array([[3.0, 4.0], [0.0, 0.0]])
    close(s.apart(x, 0 * x), 12.5**0.5, "apart: the root of the mean square distance")


def drawn(ax, color):
    return [line.get_xydata() for line in ax.lines if to_hex(line.get_color()) == color.lower()]


def test_what_is_drawn(monkeypatch):
    """Panels are grids; a solver is found by its color. Every number differs from every other."""
    monkeypatch.setattr(s, "BUDGETS", [2, 5])
    errors, samples = rng().uniform(1, 2, (12, 2)), 1 + rng(1).random((12, 2, 2))
    twins = rng(2).random((2, 2))
    panels = s.draw_errors(dict(zip(RUNS, errors))).axes
    squares = s.draw_samples(dict(zip(RUNS, samples)), twins, 17, 0.2).axes
    for k, (name, grid) in enumerate(RUNS):
        color, column = s.STYLES[name][0], [*s.GRIDS].index(grid)
        close(drawn(panels[column], color), [np.transpose([[2, 5], errors[k]])], "errors")
        close(drawn(squares[k], color), [samples[k]], "samples")
        close(drawn(squares[k], to_hex("0.3")), [twins], "twins")
        lines = squares[k].collections[0].get_segments()
        close(lines, np.stack([samples[k], twins], axis=1), "from sample to twin")

    (ax,) = s.draw_grids(6, 3.0, 0.2).axes
    for line, grid in zip(drawn(ax, "#000000"), s.GRIDS.values()):
        close(line[:, 0], [*grid(6, 3.0)[:-1], 0.0005], "levels")
        assert np.ptp(line[:, 1]) == 0
    assert ax.xaxis_inverted()  # from noise to data
    assert ax.patches[0].get_extents().x0 == ax.transData.transform((0.2, 0))[0]


def test_main(tmp_path, monkeypatch, spy):
    """Starts and twins, what is printed and what is drawn; with the page's solver and its data."""
    m = paste(s, snippet(s))
    exec(snippet(s, "A solver of your own"), vars(m))
    assert [m.most_steps(m.SOLVERS["midpoint"], budget) for budget in (2, 8, 15)] == [1, 4, 7]

    m.BUDGETS = [4, 9]
    monkeypatch.setattr(Figure, "savefig", lambda *_, **__: None)
    names = ("measure", "sample", "draw_errors", "draw_grids", "draw_samples", "table")
    calls = {name: spy(m, name) for name in names}
    values = "--seed 3 --num-samples 40 --sigma-q 0.5 --sigma-0 0.3 --imbalance 8"
    m.main(f"--figures-dir {tmp_path} {values} --num-evaluations 7".split())
    (run,), samples, (errors,), (grids,), (squares,), (table,) = calls.values()

    stream, data = rng(3), {"weights": np.geomspace(1, 8, 5), "sigma_0": 0.3}
    data["weights"] /= data["weights"].sum()
    x_1 = m.mixture(40, stream, **data) + 0.5 * stream.standard_normal((40, 2))
    close(run.x_1, x_1, "main: starts are x_0 + N(0, sigma_q^2 I)")
    close(run.twins, m.solution(x_1, 0.5, **data), "main: twins from the same starts")
    known = m.denoiser(starts(), 2.0, **data)
    for call in samples:
        close(call.x_1, x_1, "main: all from the same starts")
        close(call.denoiser(starts(), 2.0), known, "main: with the denoiser of the data")
        assert call.sigma_q == 0.5
    assert [call.budget for call in samples] == [4, 9, 7]
    for name, x_0 in samples[1].result.items():
        close(run.result[name][1], m.apart(x_0, run.twins), "measure: for each of BUDGETS")
    assert errors.errors == run.result
    assert (grids.num_steps, grids.sigma_q, grids.sigma_0) == (7, 0.5, 0.3)
    assert squares.samples is samples[2].result
    assert (squares.twins is run.twins, squares.num_evaluations, squares.sigma_0) == (True, 7, 0.3)
    want = [run.result[name, grid] for grid in ("uniform t", "rho = 7") for name in m.SOLVERS]
    cells = [[float(cell) for cell in row[1:]] for row in table.rows]
    assert cells[0] == [4, 9]
    close(cells[1:], want, "report: errors", rtol=0.05)
