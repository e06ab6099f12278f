"""Experiment 8 held to references that share no code with it."""

import math
import re
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace

import fast_samplers as s
import numpy as np
import pytest
from matplotlib.figure import Figure

CENTERS = [(math.cos(k * math.pi / 4), math.sin(k * math.pi / 4)) for k in range(8)]
UNEQUAL = np.arange(1, 9) / 36
SIGMAS = [3.0, 1.4, 0.5, 0.001, 0.0]
TITLES = {
    "uniform t": "uniform $t$",
    "uniform sigma": r"uniform $\sigma$",
    "log sigma": r"uniform $\log\,\sigma$",
    "rho = 7": r"$\rho$ = 7",
}


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


@pytest.mark.parametrize("name", s.SOLVERS)
def test_sample_spends_its_budget_and_nears_the_solution(name):
    """Evaluations are counted where they happen; Heun's are 2 n - 1, so it may leave one over."""
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


def test_heun_stops_short_with_eight_evaluations():
    """As the page says: its second slope is mostly far smaller; DDIM overshoots, by less."""
    data = {"weights": np.ones(8) / 8, "sigma_0": 0.05}
    x_0 = s.mixture(300, np.random.default_rng(0), **data)
    x_1 = x_0 + 4 * np.random.default_rng(1).standard_normal(x_0.shape)
    known, twins = partial(s.denoiser, **data), s.solution(x_1, 4.0, **data)
    ahead = {}
    for name in ("Heun", "DDIM"):
        off = s.sample(name, "rho = 7", 8, known, x_1, 4.0) - twins
        ahead[name] = (off * (twins - x_1)).sum(axis=1) / np.linalg.norm(twins - x_1, axis=1)
    assert (ahead["Heun"] < 0).mean() > 0.9 < (ahead["DDIM"] > 0).mean()
    assert -ahead["Heun"].mean() > 5 * ahead["DDIM"].mean()
    sigmas = s.karras(4, 0.002, 4.0)
    for x, sigma, after in zip([x_1, *s.heun(known, x_1, sigmas)], sigmas, sigmas[1:-1]):
        slope = (x - known(x, sigma)) / sigma
        euler = x + (after - sigma) * slope
        second = (euler - known(euler, after)) / after
        assert np.median((second * slope).sum(axis=1) / (slope**2).sum(axis=1)) < 0.4


def test_measure(monkeypatch):
    """Each run's distance, for each budget; the samples here say who they are."""
    rank = {run: k for k, run in enumerate([*s.SOLVERS, *s.GRIDS])}
    twins = np.array([[1.0, 1.0], [1.0, 1.0]])

    def sample(name, grid, budget, *args):
        assert args == ("denoiser", "x_1", 3.0)
        return np.array([[4.0, 5.0], [1.0, 1.0]]) * 2.0 ** (rank[name] + 10 * rank[grid]) * budget

    monkeypatch.setattr(s, "sample", sample)
    monkeypatch.setattr(s, "BUDGETS", [5, 20])
    errors = s.measure("denoiser", "x_1", twins, 3.0)
    assert set(errors) == {(name, grid) for name in s.SOLVERS for grid in s.GRIDS}
    for (name, grid), row in errors.items():
        c = 2.0 ** (rank[name] + 10 * rank[grid]) * np.array([5, 20])
        squares = (4 * c - 1) ** 2 + (5 * c - 1) ** 2 + 2 * (c - 1) ** 2
        np.testing.assert_allclose(row, (squares / 2) ** 0.5)


def test_drawn_errors(monkeypatch):
    monkeypatch.setattr(s, "BUDGETS", [2, 5])
    runs = [(name, grid) for name in s.SOLVERS for grid in s.GRIDS]
    errors = {run: [1.0 + k, 0.01 * (1 + k)] for k, run in enumerate(runs)}
    fig = s.draw_errors(errors)
    assert [ax.get_title() for ax in fig.axes] == [TITLES[grid] for grid in s.GRIDS]
    assert fig.axes[0].get_ylabel() == "RMS distance to the twins"
    for ax, grid in zip(fig.axes, s.GRIDS):
        assert ax.get_xlabel() == "evaluations of the denoiser"
        assert [line.get_label() for line in ax.lines] == [*s.SOLVERS]
        for line in ax.lines:
            error = errors[line.get_label(), grid]
            np.testing.assert_array_equal(line.get_xydata(), np.stack([[2, 5], error], axis=1))
            _, color, marker = s.SOLVERS[line.get_label()]
            assert (line.get_color(), line.get_marker()) == (color, marker)
    assert s.SOLVERS["DDIM"][1] == "#E69F00"


def test_drawn_grids():
    (ax,) = s.draw_grids(6, 3.0, 0.2).axes
    names = dict(zip(ax.get_yticks(), [label.get_text() for label in ax.get_yticklabels()]))
    for line, (grid, title) in zip(ax.lines, TITLES.items()):
        sigmas = s.GRIDS[grid](6, 3.0)
        np.testing.assert_array_equal(line.get_xdata(), [*sigmas[:-1], 0.0005])
        assert [names[y] for y in line.get_ydata()] == 7 * [title]
    assert dict(zip(ax.get_xticks(), [x.get_text() for x in ax.get_xticklabels()]))[0.0005] == "0"
    assert ax.xaxis_inverted()  # from noise to data
    assert ax.patches[0].get_extents().x0 == ax.transData.transform((0.2, 0))[0]
    assert ax.get_title() == r"Steps on each grid: 6; grey: below $\sigma_0$ = 0.2"


def test_drawn_samples():
    runs = [(name, grid) for name in s.SOLVERS for grid in s.GRIDS]
    samples = {run: np.array([[k, k + 0.1], [k + 0.2, k + 0.3]]) for k, run in enumerate(runs)}
    twins = np.array([[20.0, 21.0], [22.0, 23.0]])
    fig = s.draw_samples(samples, twins, 17)
    assert "17" in fig.get_suptitle()
    panels = np.reshape(fig.axes, (3, 4))
    assert [ax.get_title() for ax in panels[0]] == [*TITLES.values()]
    assert [ax.get_ylabel() for ax in panels[:, 0]] == [*s.SOLVERS]
    for row in panels:
        name = row[0].get_ylabel()
        for ax, grid in zip(row, s.GRIDS):
            drawn = {line.get_label(): line for line in ax.lines}
            np.testing.assert_array_equal(drawn["twins"].get_xydata(), twins)
            np.testing.assert_array_equal(drawn[name].get_xydata(), samples[name, grid])
            assert drawn[name].get_color() == row[0].yaxis.label.get_color() == s.SOLVERS[name][1]
            lines = np.array(ax.collections[0].get_segments())
            np.testing.assert_array_equal(lines, np.stack([samples[name, grid], twins], axis=1))


def test_change_it_yourself(tmp_path, monkeypatch):
    """The page's solver, pasted in: counted, printed and drawn beside the others."""
    here = Path(s.__file__)
    page = (here.parent / "README.md").read_text(encoding="utf-8")
    snippet = re.search(r"```python\n(.*?)```", page, re.DOTALL)[1]
    source = here.read_text(encoding="utf-8")
    table = re.search(r"^SOLVERS = \{.*?^\}\n", source, re.DOTALL | re.MULTILINE)[0]
    copy = ModuleType("copy")
    copy.__file__ = s.__file__
    exec(source.replace(table, table + snippet), copy.__dict__)

    x, (step,) = starts(), copy.midpoint(bent, starts(), [3.0, 1.0])
    half = x - (x - bent(x, 3.0)) / 3
    np.testing.assert_allclose(step, x - (half - bent(half, 2.0)))
    assert [copy.most_steps(copy.midpoint, budget) for budget in (2, 8, 15)] == [1, 4, 7]
    figures, rows = {}, []
    monkeypatch.setattr(Figure, "savefig", lambda fig, to, dpi: figures.update({to.stem: fig}))
    copy.BUDGETS, copy.table = [4, 15], rows.extend
    copy.main(["--figures-dir", str(tmp_path), "--num-samples", "40"])
    names = [*s.SOLVERS, "midpoint"]
    want = [f"{name}, {grid}" for grid in ("uniform t", "rho = 7") for name in names]
    assert [row[0] for row in rows[1:]] == want
    for ax in figures["error-vs-evaluations"].axes:
        assert [line.get_label() for line in ax.lines] == names
    assert [ax.get_ylabel() for ax in figures["samples"].axes[::4]] == names


def test_main(tmp_path, monkeypatch):
    """Starts and twins, what is printed and what is drawn, with measurements that all differ."""
    runs = [(name, grid) for name in s.SOLVERS for grid in s.GRIDS]
    errors = {run: [0.1 + k / 100, 0.002 + k / 10_000] for k, run in enumerate(runs)}
    calls, rows, saved = [], [], {}

    def measure(*args):
        calls.append(args)
        return errors

    def draw(name, *args):
        return SimpleNamespace(savefig=lambda path, dpi: saved.update({path.stem: (name, *args)}))

    for name in ("draw_errors", "draw_grids", "draw_samples"):
        monkeypatch.setattr(s, name, partial(draw, name))
    monkeypatch.setattr(s, "measure", measure)
    monkeypatch.setattr(s, "sample", lambda *args: args)
    monkeypatch.setattr(s, "table", rows.extend)
    monkeypatch.setattr(s, "BUDGETS", [5, 20])
    options = "--seed 3 --num-samples 40 --sigma-q 0.5 --sigma-0 0.3 --imbalance 8"
    s.main(f"--figures-dir {tmp_path} {options} --num-evaluations 7".split())

    [(known, x_1, twins, sigma_q)] = calls
    assert sigma_q == 0.5
    weights = known.keywords["weights"]
    assert weights.sum() == pytest.approx(1)
    np.testing.assert_allclose(weights[1:] / weights[:-1], 8 ** (1 / 7))
    want = s.denoiser(starts(), 2.0, weights=weights, sigma_0=0.3)
    np.testing.assert_array_equal(known(starts(), 2.0), want)
    rng = np.random.default_rng(3)
    x_0 = s.mixture(40, rng, weights=weights, sigma_0=0.3)
    np.testing.assert_array_equal(x_1, x_0 + 0.5 * rng.standard_normal((40, 2)))
    np.testing.assert_array_equal(twins, s.solution(x_1, 0.5, weights=weights, sigma_0=0.3))
    assert rows == [
        ["RMS distance to twins, evaluations <=", "5", "20"],
        *(
            [f"{name}, {grid}", *(f"{error:.2g}" for error in errors[name, grid])]
            for grid in ("uniform t", "rho = 7")
            for name in ("DDIM", "Heun", "DPM-Solver++(2M)")
        ),
    ]
    samples = {run: (*run, 7, known, x_1, 0.5) for run in runs}
    assert saved == {
        "error-vs-evaluations": ("draw_errors", errors),
        "grids": ("draw_grids", 7, 0.5, 0.3),
        "samples": ("draw_samples", samples, twins, 7),
    }
