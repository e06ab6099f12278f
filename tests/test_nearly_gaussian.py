"""Experiment 9 held to closed forms, to differences and to brute force."""

import math
from functools import partial

import nearly_gaussian as s
import numpy as np
import pytest
from matplotlib.colors import to_hex

DATA = s.Mixture(sigma_0=0.3, sigma_q=2.0)


def normal(x, mean, variance):
    return np.exp(-((x - mean) ** 2) / (2 * variance)) / (2 * math.pi * variance) ** 0.5


def p(x, t):
    return 0.6 * normal(x, -1, 0.09 + 4 * t) + 0.4 * normal(x, 1, 0.09 + 4 * t)


def mean_0(x, t):
    """E[x_0 | x_t = x], as a ratio: each Gaussian has its own linear regression."""
    to_center = 4 * t / (0.09 + 4 * t)
    left = 0.6 * normal(x, -1, 0.09 + 4 * t) / p(x, t)
    return x + to_center * (left * (-1 - x) + (1 - left) * (1 - x))


# ----------------------------- Mixture, log_output: also experiment 10's -----------------------


@pytest.mark.parametrize("t", [0.0, 0.01, 0.3, 1.0])
def test_density_posterior_and_score(t):
    x, h = np.linspace(-3, 3, 24), 1e-5
    np.testing.assert_allclose(np.exp(DATA.log_density(x.reshape(2, 3, 4), t)).ravel(), p(x, t))
    want = [0.6 * normal(x, -1, 0.09 + 4 * t), 0.4 * normal(x, 1, 0.09 + 4 * t)]
    np.testing.assert_allclose(DATA.posterior(x, t), want / p(x, t), atol=1e-12)
    slope = (np.log(p(x + h, t)) - np.log(p(x - h, t))) / (2 * h)
    np.testing.assert_allclose(DATA.score(x, t), slope, atol=1e-6)


@pytest.mark.parametrize(("sigma_0", "sigma_q"), [(0.15, 4.0), (0.3, 2.0), (1.0, 0.5)])
def test_averages(sigma_0, sigma_q, monkeypatch):
    """The mixture's moments; with both centers at 0.5, entropy and information of a Gaussian."""
    data = s.Mixture(sigma_0, sigma_q)
    x = data.grid()
    for t in (0, 0.4, 1):
        variance = sigma_0**2 + sigma_q**2 * t
        assert [data.average(x**k, t) for k in (0, 1, 2)] == pytest.approx([1, -0.2, 1 + variance])
        with monkeypatch.context() as patch:
            patch.setattr(s, "CENTERS", np.array([0.5, 0.5]))
            assert data.entropy(t) == pytest.approx(np.log(2 * np.pi * np.e * variance) / 2)
            assert data.fisher(t) == pytest.approx(1 / variance)


@pytest.mark.parametrize("slope", [0.0, 0.5])
def test_output_of_a_linear_denoiser(slope):
    """Gaussian, of a variance that obeys a recursion; a tail below any float is still a number."""
    x, num_steps, center, variance = DATA.grid(), 100, 0.0, 4.0
    for k in range(num_steps, 0, -1):
        factor = slope / k + 1 - 1 / k
        center, variance = 0.3 + factor * (center - 0.3), factor**2 * variance + 4 / num_steps
    mean = lambda x_t, t, dt: x_t + dt / t * (1 - slope) * (0.3 - x_t)  # noqa: E731
    log_q = s.log_output(mean, x, num_steps, 2.0)
    near = abs(x) < (8 if slope == 0 else 2)
    want = -((x - center) ** 2) / (2 * variance) - np.log(2 * math.pi * variance) / 2
    assert log_q[near] == pytest.approx(want[near], abs=1e-6)
    assert np.isfinite(log_q).all()


# ------------------------------------------- One step ------------------------------------------


def test_step_posterior_is_bayes_rule():
    """Over p_t(x_t), which is known, not over its sum; and its mean is the reverse mean."""
    x_t, t, dt = np.array([-4.0, 0.1, 1.0]), 0.3, 0.2
    moves, logs = s.step_posterior(x_t, t, dt, DATA)
    want = p(x_t[:, None] + moves, t - dt) * normal(moves, 0, 0.8) / p(x_t, t)[:, None]
    np.testing.assert_allclose(np.exp(logs), want, atol=1e-10)
    mean = x_t + want @ moves * (moves[1] - moves[0])
    np.testing.assert_allclose(s.reverse_mean(x_t, t, dt, mixture=DATA), mean, atol=1e-10)


@pytest.mark.parametrize(("t", "dt"), [(1.0, 1.0), (0.6, 0.25), (0.02, 0.01)])
@pytest.mark.parametrize("sigma_0", [0.15, 1.0])
def test_identities(t, dt, sigma_0):
    data = s.Mixture(sigma_0, 2.0)
    got = [data.average(row, t) for row in s.step_kl(data.grid(), t, dt, data)]
    np.testing.assert_allclose(s.identities(t, dt, data), got[:2], atol=1e-11)
    assert got[0] > got[1] > got[2] > 0


def test_small_steps():
    sigmas = np.array([0.005, 0.0055, 0.1])
    divergences, exact, limits = s.measure_steps(sigmas, DATA)
    np.testing.assert_allclose(divergences[:2] / limits[:2], 1, rtol=0.005)
    np.testing.assert_allclose(divergences[:, :2], exact, atol=1e-12)


# -------------------------------------------- A run --------------------------------------------


def test_a_run(monkeypatch):
    """One step by brute force, two and many by sums over every step."""
    monkeypatch.setattr(s, "STEP_COUNTS", [1, 2, 300])
    wrong, limit, right, bound, kl, std = s.measure_runs(DATA)
    x, step = np.linspace(-16, 16, 1601), 0.02
    near = abs(x) < 5
    rise = step * (p(x, 0)[near] @ np.log(p(x, 0)[near]) - p(x, 1) @ np.log(p(x, 1)))
    base = step * p(x, 1) @ np.log(p(x, 1) / normal(x, 0, 4))
    assert wrong == pytest.approx([rise] * 3)
    assert bound - right == pytest.approx([base] * 3)
    for k, n in enumerate([1, 2, 300]):
        sums = sum(s.identities(j / n, 1 / n, DATA) for j in range(1, n + 1))
        assert [wrong[k], right[k]] == pytest.approx(sums)
    assert limit * [1, 2, 300] == pytest.approx([300 * right[2]] * 3, rel=0.03)

    q = step * normal(x[:, None], mean_0(x, 1), 4) @ normal(x, 0, 4)
    assert kl[0] == pytest.approx(step * p(x, 0)[near] @ np.log((p(x, 0) / q)[near]))
    assert std[0] ** 2 == pytest.approx(step * (q @ x**2) - (step * (q @ x)) ** 2)
    half = normal(x[:, None], (x + mean_0(x, 1)) / 2, 2) @ normal(x, 0, 4)
    q = step**2 * normal(x[:, None], mean_0(x, 0.5), 2) @ half
    assert kl[1] == pytest.approx(step * p(x, 0)[near] @ np.log((p(x, 0) / q)[near]))
    assert kl[2] < 0.003


# ------------------------------------ What is drawn and printed --------------------------------


def test_figure_2_of_the_tutorial():
    for ax, sigma, kl in zip(s.draw_step(DATA).axes, (1 / 2, 1 / 4, 1 / 64), (0.668, 0.719, 0)):
        assert ax.get_title().startswith(rf"$\sigma$ = {sigma:.3g}: KL = {kl:.3g}")
        t = (sigma / 2) ** 2
        (line,), (area,) = ax.lines, ax.collections
        x, density = line.get_xydata().T
        np.testing.assert_allclose(density, normal(x, mean_0(np.zeros(1), t), sigma**2))
        x, density = area.get_paths()[0].vertices[1 : len(x) + 1].T
        np.testing.assert_allclose(density, p(x, 0) * normal(x, 0, sigma**2) / p(0, t), atol=1e-9)
        assert line.get_label() == r"$N(E[x_0|x_t = 0], \sigma^2)$"
        assert area.get_label() == "posterior $p(x_0|x_t = 0)$"
        assert ax.get_xlim() == pytest.approx((-4.5 * sigma, 4.5 * sigma))


def test_curves_are_what_their_labels_say(monkeypatch):
    monkeypatch.setattr(s, "STEP_COUNTS", [2, 5, 9])
    numbers = np.random.default_rng(0).uniform(1, 2, (6, 3))
    ax = s.draw_runs(numbers).axes[0]
    lines = {line.get_label(): line.get_xydata().T for line in ax.lines}
    outputs = r"KL$(p_0\,\|\,q_0)$, of what DDPM returns"
    labels = ["sum, mean $x_t$", f"{2 * numbers[1, 0]:.4g} / number of steps", "sum, right mean"]
    for label, y in zip([*labels, outputs], numbers[[0, 1, 2, 4]]):
        assert np.array_equal(lines.pop(label), [[2, 5, 9], y])
    assert not lines

    sigmas, limits = np.array([0.5, 1, 2]), np.array([[0.75, 0.25, 0.125]] * 3)
    ax = s.draw_sigmas(sigmas, numbers[:3].T, numbers[3:5].T, limits).axes[0]
    lines = {(line.get_label(), line.get_color()): line.get_xydata().T for line in ax.lines}
    for k, label in enumerate(["mean $x_t$", "right mean", "right mean and variance"]):
        color = [s.PINK, s.BLUE, s.GREEN][k]
        assert np.array_equal(lines[label, color], [sigmas, numbers[k]])
        dashes = rf"${limits[0, k] * 2 ** (2 * k + 2):.3g}\,\sigma^{2 * k + 2}$"
        assert np.array_equal(lines[dashes, color], [sigmas, limits[:, k]])
    black = [line for line in ax.lines if to_hex(line.get_color()) == "#000000"]
    assert np.array_equal([line.get_ydata() for line in black], numbers[3:5])
    assert (black[0].get_label(), len(ax.lines)) == ("identities", 8)


def test_main(tmp_path, monkeypatch):
    """Each number printed or drawn is that of the function it comes from."""
    tables, saved = [], {}

    class Figure:
        def __init__(self, name, *arguments):
            self.savefig = lambda path, dpi: saved.update({path.name: (name, arguments)})

    for name in ("draw_step", "draw_sigmas", "draw_runs"):
        monkeypatch.setattr(s, name, partial(Figure, name))
    monkeypatch.setattr(s, "table", tables.append)
    monkeypatch.setattr(s, "STEP_COUNTS", [1, 10])
    s.main(f"--figures-dir {tmp_path} --sigma-0 0.5 --sigma-q 3".split())
    data, sigmas = s.Mixture(0.5, 3.0), np.geomspace(0.01, 3, 25)
    divergences, exact, limits = steps = s.measure_steps(sigmas, data)
    slopes = np.log(divergences[1] / divergences[0]) / np.log(300) * 24
    runs = s.measure_runs(data)

    names, slope, ratio, off = tables[0]
    assert names == ["last step, sigma = 0.01", "mean x_t", "right mean", "right mean and variance"]
    assert slope == ["slope of KL in sigma", *(f"{x:.3f}" for x in slopes)]
    assert ratio == ["KL / limit", *(f"{x:.4f}" for x in divergences[0] / limits[0])]
    errors = [f"{abs(divergences[:, k] - exact[:, k]).max():.0e}" for k in (0, 1)]
    assert off == ["off its identity, any sigma", *errors, "-"]
    heading = ["steps", "sum, mean x_t", "limit", "sum, right mean", "+ KL(p_1 || base)"]
    assert tables[1] == [
        [*heading, "KL(p_0 || q_0)", "std of q_0"],
        ["1", *(f"{x:.4f}" for x in runs[:, 0])],
        ["10", *(f"{x:.4f}" for x in runs[:, 1])],
    ]
    assert saved["reverse-step.jpg"] == ("draw_step", (data,))
    for file, name, want in [
        ("kl-vs-sigma.jpg", "draw_sigmas", [sigmas, *steps]),
        ("kl-vs-steps.jpg", "draw_runs", [runs]),
    ]:
        drawn, arguments = saved[file]
        assert drawn == name
        assert all(map(np.array_equal, arguments, want))
    assert len(saved) == 3
