"""Experiment 17 held to references that share no code with it."""

from functools import partial
from statistics import NormalDist

import inverse_problems as s
import numpy as np
import pytest
import torch
from conftest import paste, rng, snippet
from matplotlib.figure import Figure

CLOUD = """
POINTS = 3 * np.random.default_rng(5).normal([4, -2], 1, (9, 2))
A = np.array([0.6, -1.8])
"""
EXACT = "the exact denoiser is E[x_0 | x_t, y]: Bayes' rule with the likelihoods of x_t and of y"


def by_differences(function, x_t, direction, step=1e-5):
    return (function(x_t + step * direction) - function(x_t - step * direction)) / (2 * step)


@pytest.mark.parametrize("code", ["", CLOUD, snippet(s)])
@pytest.mark.parametrize("t", [0.01, 0.3])
def test_the_truth_follows_the_data(code, t):
    """Three denoisers, the law and the arcs, for the points at the top: sums, and derivatives."""
    script = paste(s, code) if code else s
    points, a, sigma_q = script.POINTS, script.A, 10.0
    y, tau, variance = points[0] @ a + 0.1, 0.3, 100 * t
    x_t = points[[0, 3, -1]] + [[0.3, -0.2], [-0.6, 0.5], [1.5, 0.1]]
    given = {"points": points, "a": a, "sigma_q": sigma_q}

    def log_density(x_t, y=None):
        exponents = -((x_t[:, None] - points) ** 2).sum(axis=2) / (2 * variance)
        if y is not None:
            exponents = exponents - (y - points @ a) ** 2 / (2 * tau**2)
        return np.logaddexp.reduce(exponents, axis=1)

    gradient = [by_differences(partial(log_density, y=y), x_t, e) for e in np.eye(2)]
    found = script.posterior_denoiser(x_t, t, y, tau=tau, **given)
    exact = x_t + variance * np.transpose(gradient)
    np.testing.assert_allclose(found, exact, rtol=0, atol=1e-5, err_msg=EXACT)

    tensors = torch.tensor(points), torch.tensor(a)

    def denoiser(x_t):
        squares = (x_t[:, None] - tensors[0]).square().sum(dim=2)
        return (-squares / (2 * variance)).softmax(dim=1) @ tensors[0]

    mean = denoiser(torch.tensor(x_t)).numpy()
    jacobian = torch.autograd.functional.jacobian(lambda x: denoiser(x).sum(0), torch.tensor(x_t))
    c_a = variance * (jacobian @ tensors[1]).T.numpy()
    for name, extra in (("dps", 0), ("with_variance", c_a @ a)):
        want = mean + c_a * ((y - mean @ a) / (tau**2 + extra))[:, None]
        found = getattr(script, name)(x_t, t, y, tau=tau, **given)
        message = f"{name}: C a is sigma_t^2 times the derivative of E[x_0 | x_t] along a"
        np.testing.assert_allclose(found, want, rtol=1e-6, atol=1e-6, err_msg=message)

    law = script.point_posterior(y, points=points, a=a, tau=tau)
    densities = np.array([NormalDist(c @ a, tau).pdf(y) for c in points])
    np.testing.assert_allclose(law, densities / densities.sum(), rtol=1e-7, atol=1e-15)
    number, up, arc = [0], np.sign(points[1] @ a - points[0] @ a), 0
    for last, point in zip(points, points[1:]):
        arc += np.sign(point @ a - last @ a) != up
        up = np.sign(point @ a - last @ a)
        number.append(arc)
    np.testing.assert_array_equal(script.arcs(points, a), number)
    assert np.abs(points).max() * 30 == pytest.approx(script.SIGMA_Q)


@pytest.mark.parametrize(
    "code", ["POINTS = np.ones((4, 2))", "A = np.zeros(2)", "A = np.full(2, np.nan)"]
)
def test_what_it_cannot_do_is_refused(code):
    with pytest.raises(SystemExit, match="2"):
        paste(s, code).main([])


class Fixed:
    """In place of a generator: the same noise at every step."""

    def standard_normal(self, shape):
        return np.full(shape, 0.7)


def test_samplers_at_every_step():
    """To a point mass at 3: DDIM scales the distance, DDPM also adds the noise of the step."""
    mean, grid = partial(s.reverse_mean, denoiser=lambda x, t: 3.0), s.times(4, ratio=20)
    np.testing.assert_allclose(grid[:-1] ** 0.5, [1, 20 ** (-1 / 3), 20 ** (-2 / 3), 1 / 20])
    assert grid[-1] == 0
    steps = [*s.ddim(mean, np.array([5.0]), grid)]
    np.testing.assert_allclose(np.ravel(steps), 3 + 2 * grid[1:] ** 0.5, rtol=1e-9)
    x, noisy = 5.0, [*s.ddpm(mean, np.array([5.0]), grid, 2.0, Fixed())]
    for t, earlier, (found,) in zip(grid, grid[1:], noisy):
        x = 3 + earlier / t * (x - 3) + 0.7 * 2 * (t - earlier) ** 0.5
        assert found == pytest.approx(x, rel=1e-9)
    assert len(steps) == len(noisy) == 4


@pytest.mark.parametrize(("scale", "tau", "y"), [(1.0, 0.5, 1.0), (1.4, 0.9, -0.6)])
def test_gaussian_law(scale, tau, y):
    """The samplers are linear in x_1 and noise: means from 0, variances by adding up squares."""
    grid = s.times(4000, ratio=1e5)
    denoiser = partial(s.gaussian_dps, y=y, s=scale, tau=tau, sigma_q=1000.0)
    mean = partial(s.reverse_mean, denoiser=denoiser)
    for at_0, at_1 in s.ddim(mean, np.array([0.0, 1.0]), grid):
        pass
    exact = s.gaussian_law("DDIM", s=scale, tau=tau, y=y)
    assert (at_0, (1000 * (at_1 - at_0)) ** 2) == pytest.approx(exact, rel=0.01)
    x, variance = 0.0, 1000.0**2
    for t, earlier in zip(grid, grid[1:]):
        x, shifted = mean(np.array([x, x + 1.0]), t, t - earlier)
        variance = (shifted - x) ** 2 * variance + 1000.0**2 * (t - earlier)
    assert (x, variance) == pytest.approx(s.gaussian_law("DDPM", s=scale, tau=tau, y=y), rel=0.01)
    precision = 1 / scale**2 + 1 / tau**2
    exact = pytest.approx((y / tau**2 / precision, 1 / precision), rel=1e-12)
    assert s.gaussian_law("posterior", s=scale, tau=tau, y=y) == exact


@pytest.mark.parametrize("k", [1e-6, 0.5, 2**0.5, 5.0, 20.0, 1e4])
def test_gaussian_law_for_any_ratio(k):
    """Dawson's integral by a sum over many even steps, no farther than it counts."""
    q = max(0, k / 2**0.5 - 40 / k) + min(k / 2**0.5, 40 / k) * (np.arange(200_000) + 0.5) / 2e5
    integral = np.exp(q**2 - k**2 / 2).sum() * min(k / 2**0.5, 40 / k) / 2e5
    mean, variance = s.gaussian_law("DDIM", s=2.0, tau=2 / k, y=3.0)
    assert mean == pytest.approx(3 * 2**0.5 * k * integral, rel=1e-7)
    assert variance == pytest.approx(4 * np.exp(-(k**2)))
    want = (3 * -np.expm1(-(k**2)), -(4 / k**2) / 2 * np.expm1(-2 * k**2))
    assert s.gaussian_law("DDPM", s=2.0, tau=2 / k, y=3.0) == pytest.approx(want, rel=1e-9)


def test_twins_and_the_wiring():
    """The same starts and noise for all."""
    x_1, grid = s.SIGMA_Q * rng().standard_normal((20, 2)), s.times(30)
    samples = s.sample_points(x_1, grid, rng(3), y=0.1, tau=0.2)
    given = {"y": 0.1, "points": s.POINTS, "a": s.A, "tau": 0.2, "sigma_q": s.SIGMA_Q}
    functions = {"exact": s.posterior_denoiser, "DPS": s.dps, "with variance": s.with_variance}
    for name, denoiser in functions.items():
        mean = partial(s.reverse_mean, denoiser=partial(denoiser, **given))
        *_, x_0 = s.ddpm(mean, x_1, grid, s.SIGMA_Q, rng(3))
        assert np.array_equal(samples[name]["DDPM"], x_0)
        *_, x_0 = s.ddim(mean, x_1, grid)
        assert np.array_equal(samples[name]["DDIM"], x_0)


BLACK, BLUE, ORANGE = "k", "#0072B2", "#E69F00"


def hold_points(figure, samples, script):
    """What is measured lies to the right, in the strip; samples are orange, joined to twins."""
    for ax, columns in zip(figure.axes, samples.values()):
        data, dots = (
            next(line.get_xydata() for line in ax.lines if line.get_color() == color)
            for color in (BLACK, ORANGE)
        )
        for drawn, points in ((data, script.POINTS), (dots, columns["DDIM"])):
            np.testing.assert_allclose(drawn[:, 0], points @ script.A)
            length = np.hypot(*script.A)
            np.testing.assert_allclose(np.hypot(*drawn.T), length * np.hypot(*points.T))
        twins = samples["exact"]["DDIM"] @ script.A
        joins = np.array(ax.collections[0].get_segments())
        np.testing.assert_allclose(joins[:, 0], dots)
        np.testing.assert_allclose(joins[:, 1, 0], twins)
        strip = ax.patches[0].get_extents().transformed(ax.transData.inverted())
        assert (strip.x0, strip.x1) == pytest.approx((0.1 - 0.3, 0.1 + 0.3))
        left, right = ax.get_xlim()
        assert left < data[:, 0].min() < data[:, 0].max() < right


def hold_gaussian(figure, on_line):
    """Laws and marks, mean and variance, in the colours of their samplers."""
    colors = {"posterior": BLACK, "DDPM": BLUE, "DDIM": ORANGE}
    for column, ax in enumerate(figure.axes):
        for method, color in colors.items():
            curves = [line.get_data() for line in ax.lines if line.get_color() == color]
            (k, curve) = max(curves, key=lambda data: len(data[0]))
            laws = [s.gaussian_law(method, s=1.0, tau=1 / ratio, y=1.0)[column] for ratio in k]
            np.testing.assert_allclose(curve, laws)
        assert len(ax.containers) == 2
        for marks, _, (bars,) in ax.containers:
            (method,) = [name for name in on_line if colors[name] == marks.get_color()]
            numbers, errors = s.estimates(on_line[method])[2 * column : 2 * column + 2]
            np.testing.assert_allclose(marks.get_xydata(), np.transpose([s.RATIOS, numbers]))
            ends = np.array(bars.get_segments())[:, :, 1]
            np.testing.assert_allclose(np.ptp(ends, axis=1), 10 * errors)


def test_main(tmp_path, monkeypatch, spy):
    """The page's own data: what is drawn and printed, each number against what it is of."""
    script = paste(s, snippet(s))
    line = partial(script.sample_gaussian, n=400, num_steps=300)
    monkeypatch.setattr(script, "sample_gaussian", line)
    monkeypatch.setattr(Figure, "savefig", lambda *_, **__: None)
    tables, calls = spy(script, "table"), spy(script, "sample_points")
    plane, lines = spy(script, "draw_points"), spy(script, "draw_gaussian")
    flags = "--num-steps 9 --num-samples 60 --y 0.1 --tau 0.3"
    script.main([*flags.split(), "--figures-dir", str(tmp_path)])
    (call,) = calls
    assert (call.y, call.tau, len(call.times), call.x_1.shape) == (0.1, 0.3, 10, (60, 2))
    assert call.x_1.std() == pytest.approx(script.SIGMA_Q, rel=0.3)
    assert (plane[0].samples, plane[0].y, plane[0].tau) == (call.result, 0.1, 0.3)

    hold_points(plane[0].result, call.result, script)
    hold_gaussian(lines[0].result, lines[0].samples)

    (_, law, *rows), (_, *line_rows) = (table.rows for table in tables)
    points, a, arc = script.POINTS, script.A, script.arcs(script.POINTS, script.A)
    weights = script.point_posterior(0.1, points=points, a=a, tau=0.3)
    shares = [weights[arc == k].sum() for k in range(arc.max() + 1)]
    shown = sorted(sorted(range(len(shares)), key=lambda k: -shares[k])[:4])
    spread = sum(w * (x - 0.1) ** 2 for w, x in zip(weights, points @ a)) ** 0.5
    numbers = [float(cell) for cell in law[1:] if cell]
    assert numbers == pytest.approx([spread, *(shares[k] for k in shown)], abs=5.1e-4)
    samples = [
        (x_0, call.result["exact"][sampler])
        for runs in call.result.values()
        for sampler, x_0 in runs.items()
    ]
    for row, (x_0, twin) in zip(rows, samples):
        off = np.mean((x_0 @ a - 0.1) ** 2) ** 0.5
        nearest = ((x_0[:, None] - points) ** 2).sum(axis=2).argmin(axis=1)
        found = [np.mean(arc[nearest] == k) for k in shown]
        from_twin, *cells = (float(cell) for cell in row[2:])
        assert float(row[1]) == pytest.approx(off, abs=6e-4)
        assert from_twin == pytest.approx(np.median(np.hypot(*(x_0 - twin).T)), abs=6e-4)
        assert cells == pytest.approx(found, abs=5.1e-3)
    for row, method in zip(line_rows, ("posterior", "DDPM", "DDIM")):
        exact = script.gaussian_law(method, s=1.0, tau=0.5, y=1.0)
        assert [float(row[1]), float(row[3])] == pytest.approx(exact, abs=5.1e-5)
        if method != "posterior":
            x_0 = lines[0].samples[method][list(script.RATIOS).index(2.0)]
            found = [float(number) for cell in (row[2], row[4]) for number in cell.split(" +- ")]
            v = x_0.var()
            want = [x_0.mean(), (v / 400) ** 0.5, v, v * (2 / 400) ** 0.5]
            assert found == pytest.approx(want, abs=5.1e-5)
            assert found[0] == pytest.approx(exact[0], abs=5 * found[1] + 0.02)
            assert found[2] == pytest.approx(exact[1], abs=5 * found[3] + 0.02)
