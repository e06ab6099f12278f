"""Experiment 9 held to quadrature, to recursions and to sums over every step."""

import math
import re

import nearly_gaussian as s
import numpy as np
import pytest
from conftest import paste, rng, snippet
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

DATA = s.Mixture(sigma_0=0.3, sigma_q=2.0)


def normal(x, mean, variance):
    return np.exp(-((x - mean) ** 2) / (2 * variance)) / (2 * math.pi * variance) ** 0.5


def log(p):
    return np.log(np.maximum(p, 1e-300))


def close(got, want, hint, **tolerance):
    assert got is not None, hint
    assert np.allclose(got, want, **{"rtol": 1e-6, "atol": 1e-9, **tolerance}), hint


def numbers(rows):
    """The cells of a table that are numbers, but for the first of each row."""
    return [cell for row in rows for cell in row[1:] if re.fullmatch(r"-?[\d.]+(e[+-]\d+)?", cell)]


CODE = "WEIGHTS, CENTERS = "
OTHER_DATA = {
    "the script's": (CODE + "np.array([0.6, 0.4]), np.array([-1.0, 1.0])", 0.3, 2.0),
    "the page's": (snippet(s), 0.4, 2.0),
    "three times as large": (CODE + "[0.1, 0.4, 0.2, 0.3], [20, 26, 14.5, 22]", 0.9, 4.0),
    "one Gaussian": (CODE + "np.array([1.0]), np.array([-3.0])", 0.5, 1.0),
}


@pytest.mark.parametrize(("code", "sigma_0", "sigma_q"), OTHER_DATA.values(), ids=OTHER_DATA)
def test_the_truth_follows_the_data(code, sigma_0, sigma_q):
    """By sums over x_0 and x_t on a grid of this test's own, derivatives by differences."""
    m, described = paste(s, code), {"np": np}
    exec(code, described)
    data = m.Mixture(sigma_0, sigma_q)
    weights, centers = np.array(described["WEIGHTS"]), np.array(described["CENTERS"], float)
    h = sigma_0 / 10
    x = np.arange(min(0, *centers) - 6.5 * sigma_q, max(0, *centers) + 6.5 * sigma_q, h)
    p_0 = weights @ normal(x, centers[:, None], sigma_0**2)

    def p(t, y=x):
        return h * normal(y[:, None], x, sigma_q**2 * t) @ p_0 if t else p_0

    t, dt = 0.3, 0.2
    p_t, before, variance = p(t), p(t - dt), sigma_q**2 * dt
    near = p_t > 1e-9
    bayes = before * normal(x[near][:, None], x, variance) / p_t[near][:, None]
    mean = h * bayes @ x
    hint = "reverse_mean: Tweedie's x_t + sigma_q^2 dt score, which is Bayes' mean of x_{t-dt}"
    close(m.reverse_mean(x[near], t, dt, mixture=data), mean, hint, atol=1e-6)

    close(np.exp(data.log_density(x.reshape(1, -1), t))[0], p_t, "log_density: of p_t")
    parts = [w * normal(x, c, sigma_0**2 + sigma_q**2 * t) for w, c in zip(weights, centers)]
    close((data.posterior(x, t) * p_t)[:, near], np.array(parts)[:, near], "posterior: Bayes' rule")
    slope = (log(p(t, x[near] + 1e-4)) - log(p(t, x[near] - 1e-4))) / 2e-4
    close(data.score(x[near], t), slope, "score: the derivative of log p_t", atol=1e-5)
    close(data.entropy(t), -h * p_t @ log(p_t), "entropy: -E log p_t", rtol=1e-5)
    close(data.fisher(t), h * p_t[near] @ slope**2, "fisher: E[score^2]", rtol=1e-5)

    kls = []
    for center, width in [
        (x[near], variance),
        (mean, variance),
        (mean, h * (bayes * (x - mean[:, None]) ** 2).sum(axis=1)),
    ]:
        ratio = log(bayes) + (x - center[:, None]) ** 2 / (2 * np.reshape(width, (-1, 1)))
        ratio += np.log(2 * math.pi * np.reshape(width, (-1, 1))) / 2
        kls.append(h * h * p_t[near] @ (bayes * ratio).sum(axis=1))
    hint = "identities: H(p_t) - H(p_{t-dt}); with the right mean sigma^2 J(t) / 2 less"
    close([*(m.identities(t, dt, data) or {"": 0}).values()], kls[:2], hint, atol=1e-6)
    got = m.step_kl(x[near], t, dt, data)
    hint = (
        "step_kl: KL(posterior || Gaussian) with mean x_t, the right mean, and the right variance"
    )
    close([h * p_t[near] @ kl for kl in got.values()], kls, hint, atol=1e-6)

    sigmas = np.array([0.01, 0.011, sigma_q / 2])
    divergences, exact, limits = (list(part.values()) for part in m.measure_steps(sigmas, data))
    close(np.array(divergences[:2]), exact, "measure_steps: Bayes' rule and identities", rtol=1e-9)
    hint = "constants: E[F'^2] / 2, E[F''^2] / 4, E[F'''^2] / 12 are the limits of KL / sigma^n"
    close(np.array(divergences)[:, :2], np.array(limits)[:, :2], hint, rtol=0.02, atol=1e-14)

    run = list(m.measure_run(1, data).values())
    steps = h * normal(x[:, None], x + sigma_q**2 * np.gradient(log(p(1)), h), sigma_q**2)
    q = steps @ normal(x, 0, sigma_q**2)
    base = h * p(1) @ log(p(1) / normal(x, 0, sigma_q**2))
    hint = "measure_run: one step from the base; the bound is the sum + KL(p_1 || base)"
    close(run[3] - run[2], base, hint, rtol=1e-4)
    close(run[4], h * p_0 @ log(p_0 / q), hint, rtol=2e-3)
    assert run[4] < run[3]


def test_data_that_it_cannot_do():
    for data in ("[0.5, 0.6], [0, 1]", "[1.2, -0.2], [0, 1]", "[0.5, 0.5], [0]", "[1], [90]"):
        assert len(paste(s, f"WEIGHTS, CENTERS = {data}").faults()) == 1


@pytest.mark.parametrize("slope", [0.0, 0.5])
def test_output_of_a_linear_denoiser(slope):
    """Gaussian, of a variance that obeys a recursion; a tail below any float is still a number."""
    x, num_steps, center, variance = DATA.grid(), 30, 0.0, 4.0
    for k in range(num_steps, 0, -1):
        factor = slope / k + 1 - 1 / k
        center, variance = 0.3 + factor * (center - 0.3), factor**2 * variance + 4 / num_steps
    log_q = s.log_output(lambda x, t, dt: x + dt / t * (1 - slope) * (0.3 - x), x, num_steps, 2.0)
    near = abs(x - center) < 7 * variance**0.5
    want = np.log(normal(x[near], center, variance))
    close(log_q[near], want, "log_output: each step to a Gaussian about the mean", atol=1e-6)
    assert np.isfinite(log_q).all()


def test_a_run():
    """Its sums over every step; two steps of what DDPM returns; and the limit for many."""
    for n, data in [(2, DATA), (40, s.Mixture(1.0, 2.0))]:
        wrong, limit, right, _, kl, std = s.measure_run(n, data).values()
        sums = [[*s.identities(k / n, 1 / n, data).values()] for k in range(1, n + 1)]
        close([wrong, right], np.sum(sums, axis=0), "measure_run: sums of the steps' identities")
        if n == 2:
            x = np.linspace(-16, 16, 801)
            means = [x + 4 * (1 / 2) * data.score(x, t) for t in (1, 0.5)]
            half, last = (0.04 * normal(x[:, None], mean, 2) for mean in means)
            p_0, q = np.exp(data.log_density(x, 0)), last @ half @ normal(x, 0, 4)
            close(kl, 0.04 * p_0 @ log(p_0 / q), "measure_run: KL(p_0 || q_0)")
            close(std**2, 0.04 * (q @ x**2) - (0.04 * (q @ x)) ** 2, "measure_run: std of q_0")
    close(limit, right, "measure_run: the limit of the sum with the right mean", rtol=0.05)


def lines_of(ax, color):
    return [line.get_xydata().T for line in ax.lines if to_hex(line.get_color()) == color.lower()]


def test_what_is_drawn():
    for ax, sigma in zip(s.draw_step(DATA).axes, (1 / 2, 1 / 4, 1 / 64)):
        (line,), (area,), t = ax.lines, ax.collections, (sigma / 2) ** 2
        x, density = line.get_xydata().T
        mean = float(s.reverse_mean(np.zeros(1), t, t, mixture=DATA)[0])
        close(density, normal(x, mean, sigma**2), "draw_step: the Gaussian of the right mean")
        x, density = area.get_paths()[0].vertices[1 : len(x) + 1].T
        posterior = np.exp(DATA.log_density(x, 0) - DATA.log_density(np.zeros(1), t))
        close(density, posterior * normal(x, 0, sigma**2), "draw_step: the posterior")
        kl = s.step_kl(np.zeros(1), t, t, DATA)[s.RIGHT][0]
        assert f"{sigma:.3g}" in ax.get_title()
        assert f"{kl:.3g}" in ax.get_title()

    names, values = [*s.measure_run(1, DATA)], rng().uniform(1, 2, (3, 6))
    ax = s.draw_runs({n: dict(zip(names, row)) for n, row in zip((2, 5, 9), values)}).axes[0]
    for color, column in [(s.PINK, 0), ("#000000", 1), (s.BLUE, 2), (s.SKY, 4)]:
        assert np.array_equal(lines_of(ax, color), [[[2, 5, 9], values[:, column]]])

    sigmas, (kls, exact, limits) = np.array([0.5, 1, 2]), rng(1).uniform(1, 2, (3, 3, 3))
    given = [dict(zip(s.GAUSSIANS, curves)) for curves in (kls, exact[:2], limits)]
    ax = s.draw_sigmas(sigmas, *given).axes[0]
    for color, kl, limit in zip((s.PINK, s.BLUE, s.GREEN), kls, limits):
        assert np.array_equal(lines_of(ax, color), [[sigmas, kl], [sigmas, limit]])
    assert np.array_equal(lines_of(ax, "#000000"), [[sigmas, curve] for curve in exact[:2]])


def test_main(tmp_path, monkeypatch, spy):
    """With the page's data: each number printed or drawn is that of its function."""
    m = paste(s, snippet(s))
    calls = {name: spy(m, name) for name in ("measure_steps", "measure_run", "table")}
    drawn = {name: spy(m, name) for name in ("draw_step", "draw_sigmas", "draw_runs")}
    m.STEP_COUNTS, m.NUM_SIGMAS = [1, 10], 4
    monkeypatch.setattr(Figure, "savefig", lambda *_, **__: None)
    m.main(f"--figures-dir {tmp_path} --sigma-0 0.5 --sigma-q 3".split())
    (steps,), runs, (first, second) = calls.values()
    sigmas, (kls, exact, limits) = np.geomspace(0.01, 3, 4), steps.result
    assert steps.mixture == runs[0].mixture == drawn["draw_step"][0].mixture == m.Mixture(0.5, 3.0)
    close(steps.sigmas, sigmas, "main: from .01 to sigma_q")
    (sketch,) = drawn["draw_sigmas"]
    for got, want in [(sketch.divergences, kls), (sketch.exact, exact), (sketch.limits, limits)]:
        assert [*got] == [*want]
        assert np.array_equal([*got.values()], [*want.values()])
    assert np.array_equal(sketch.sigmas, sigmas)
    assert drawn["draw_runs"][0].runs == {1: runs[0].result, 10: runs[1].result}

    want = [f"{np.log(kl[1] / kl[0]) / np.log(300) * 3:.3f}" for kl in kls.values()]
    want += [f"{kls[name][0] / limits[name][0]:.4f}" for name in kls]
    want += [f"{abs(kls[name] - exact[name]).max():.0e}" for name in exact]
    assert numbers(first.rows) == want
    assert numbers(second.rows) == [f"{x:.4f}" for run in runs for x in run.result.values()]
    assert [row[0] for row in second.rows[1:]] == ["1", "10"]
