"""Experiment 17 held to references that share no code with it."""

from functools import partial
from statistics import NormalDist

import inverse_problems as s
import numpy as np
import pytest
import torch

A = np.array([0.6, 0.8])
X_T = np.array([[0.3, -0.2], [-0.6, 0.5], [1.5, 0.1]])
GIVEN = {"points": s.POINTS, "a": A, "sigma_q": 2.0}


def rng(seed=0):
    return np.random.default_rng(seed)


def by_differences(function, x_t, direction, step=1e-5):
    return (function(x_t + step * direction) - function(x_t - step * direction)) / (2 * step)


@pytest.mark.parametrize("t", [0.01, 0.09, 1.0])
def test_posterior_denoiser_by_tweedie(t):
    """x_t + sigma_t^2 grad log p(x_t, y), from the joint density."""

    def log_density(x_t):
        exponents = -((x_t[:, None] - s.POINTS) ** 2).sum(axis=2) / (2 * 4 * t)
        exponents = exponents - (0.15 - s.POINTS @ A) ** 2 / (2 * 0.3**2)
        return np.logaddexp.reduce(exponents, axis=1)

    gradient = [by_differences(log_density, X_T, e) for e in np.eye(2)]
    exact = X_T + 4 * t * np.transpose(gradient)
    found = s.posterior_denoiser(X_T, t, 0.15, tau=0.3, **GIVEN)
    np.testing.assert_allclose(found, exact, rtol=0, atol=1e-7)


@pytest.mark.parametrize("t", [0.01, 0.09, 1.0])
def test_covariance_is_a_derivative(t):
    """C a = sigma_t^2 times the derivative of E[x_0 | x_t] along a: by autograd, by differences."""
    points, a = torch.tensor(s.POINTS), torch.tensor(A)

    def denoiser(x_t):
        return (-(x_t[:, None] - points).square().sum(dim=2) / (8 * t)).softmax(dim=1) @ points

    x_t = torch.tensor(X_T)
    mean, c_a = s.moments(X_T, t, **GIVEN)
    np.testing.assert_allclose(mean, denoiser(x_t), rtol=0, atol=1e-10)
    jacobian = torch.autograd.functional.jacobian(lambda x_t: denoiser(x_t).sum(dim=0), x_t)
    np.testing.assert_allclose(c_a, 4 * t * (jacobian @ a).T, rtol=0, atol=1e-10)
    differences = by_differences(lambda x_t: s.moments(x_t, t, **GIVEN)[0], X_T, A)
    np.testing.assert_allclose(c_a, 4 * t * differences, rtol=0, atol=1e-7)


def test_gaussian_points():
    """Points that are quantiles of N(0, s^2): with the variance exact, DPS as in closed form."""
    quantiles = [NormalDist(0, 0.7).inv_cdf((k + 0.5) / 20_000) for k in range(20_000)]
    given = {"points": np.outer(quantiles, A), "a": A, "sigma_q": 2.0}
    x_t = np.outer([-1.0, 0.2, 1.5], A)
    for t in (0.05, 0.6):
        exact = s.posterior_denoiser(x_t, t, 0.9, tau=0.4, **given)
        repaired = s.with_variance(x_t, t, 0.9, tau=0.4, **given)
        np.testing.assert_allclose(repaired, exact, rtol=0, atol=2e-4)
        plain = s.dps(x_t, t, 0.9, tau=0.4, **given) @ A
        closed = s.gaussian_dps(x_t @ A, t, 0.9, s=0.7, tau=0.4, sigma_q=2.0)
        np.testing.assert_allclose(plain, closed, rtol=0, atol=5e-4)
        assert np.abs(plain - exact @ A).max() > 0.1


class Fixed:
    """In place of a generator: the same noise at every step."""

    def __init__(self, noise):
        self.noise = noise

    def standard_normal(self, shape):
        return np.full(shape, self.noise)


def test_samplers_at_every_step():
    """To a point mass at 3: DDIM scales the distance, DDPM also adds the noise of the step."""
    mean, grid = partial(s.reverse_mean, denoiser=lambda x, t: 3.0), s.times(4, 2.0, 0.1)
    np.testing.assert_allclose(2 * grid[:-1] ** 0.5, [2, 2 / 20 ** (1 / 3), 2 / 20 ** (2 / 3), 0.1])
    assert grid[-1] == 0
    steps = [*s.ddim(mean, np.array([5.0]), grid)]
    np.testing.assert_allclose(np.ravel(steps), 3 + 2 * grid[1:] ** 0.5, rtol=1e-12)
    x, noisy = 5.0, [*s.ddpm(mean, np.array([5.0]), grid, 2.0, Fixed(0.7))]
    for t, earlier, (found,) in zip(grid, grid[1:], noisy):
        x = 3 + earlier / t * (x - 3) + 0.7 * 2 * (t - earlier) ** 0.5
        assert found == pytest.approx(x, rel=1e-12)
    assert len(steps) == len(noisy) == 4


@pytest.mark.parametrize(("scale", "tau", "y"), [(1.0, 0.5, 1.0), (1.4, 0.9, -0.6)])
def test_gaussian_law(scale, tau, y):
    """The samplers are linear in x_1 and noise: means from 0, variances by adding up squares."""
    grid = s.times(10_000, 1000.0)
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


def test_numbers_of_the_derivation():
    """s = 1, tau = .5, y = 1, with Dawson's integral at sqrt(2) = .452 540 from a table."""
    law = partial(s.gaussian_law, s=1.0, tau=0.5, y=1.0)
    assert law("DDIM") == pytest.approx((2 * 2**0.5 * 0.452540, np.exp(-4)), rel=1e-4)
    assert law("DDPM") == pytest.approx((1 - np.exp(-4), (1 - np.exp(-8)) / 8))
    assert law("posterior") == pytest.approx((0.8, 0.2))


def test_measuring():
    twice = np.concatenate([s.POINTS[[5, 300, 301]] + 1e-4, s.POINTS[[700, 701, 702, 999]]])
    half_turns = s.THETA[[5, 300, 301, 700, 701, 702, 999]] / np.pi
    exact = [np.mean((k <= half_turns) & (half_turns < k + 1)) for k in range(4)]
    np.testing.assert_allclose(s.arc_shares(twice), exact)
    assert len(set(exact)) > 2
    weights = s.point_posterior(0.1, points=s.POINTS, a=A, tau=0.2)
    densities = np.array([NormalDist(c @ A, 0.2).pdf(0.1) for c in s.POINTS])
    np.testing.assert_allclose(weights, densities / densities.sum(), rtol=1e-9)
    x = 3 + 2 * rng().standard_normal((2, 40_000))
    mean, mean_error, variance, variance_error = s.estimates(x)
    assert (np.abs(mean - 3) < 5 * mean_error).all()
    assert (np.abs(variance - 4) < 5 * variance_error).all()
    np.testing.assert_allclose(mean_error, 0.01, rtol=0.05)
    np.testing.assert_allclose(variance_error, 4 * (2 / 40_000) ** 0.5, rtol=0.05)


def test_gaussian_samples_keep_to_the_law():
    samples = s.sample_gaussian(rng(1), n=4000, num_steps=1000)
    for sampler, x_0 in samples.items():
        mean, mean_error, variance, variance_error = s.estimates(x_0)
        laws = [s.gaussian_law(sampler, s=1.0, tau=1 / k, y=1.0) for k in s.RATIOS]
        exact_mean, exact_variance = np.transpose(laws)
        # What the steps' size adds is below .3 % of the mean and 3 % of the variance.
        assert (np.abs(mean - exact_mean) < 5 * mean_error + 0.003).all()
        assert (np.abs(variance / exact_variance - 1) < 5 * variance_error / variance + 0.03).all()


def test_twins_and_the_wiring():
    """The same starts and noise for all; what is said of each denoiser on the roll."""
    x_1, generator = 30 * rng().standard_normal((50, 2)), rng(3)
    samples = s.sample_roll(x_1, 40, generator, y=0.1, tau=0.2)
    given = {"y": 0.1, "points": s.POINTS, "a": s.A, "tau": 0.2, "sigma_q": 30.0}
    for name, denoiser in [
        ("exact", s.posterior_denoiser),
        ("DPS", s.dps),
        ("with variance", s.with_variance),
    ]:
        runs = s.run_both(partial(denoiser, **given), x_1, 40, 30.0, rng(3))
        for sampler in ("DDPM", "DDIM"):
            assert np.array_equal(samples[name][sampler], runs[sampler])
    mean = partial(s.reverse_mean, denoiser=partial(s.dps, **given))
    *_, x_0 = s.ddpm(mean, x_1, s.times(40, 30.0), 30.0, rng(3))
    assert np.array_equal(samples["DPS"]["DDPM"], x_0)
    vague = s.sample_roll(x_1, 40, rng(3), y=0.0, tau=10.0)
    for name in ("DPS", "with variance"):
        assert np.abs(vague[name]["DDPM"] - vague["exact"]["DDPM"]).mean() < 1e-3


def test_drawn():
    samples = {
        name: {sampler: rng(3 * i + j).random((4, 2)) for j, sampler in enumerate(("DDPM", "DDIM"))}
        for i, name in enumerate(s.DENOISERS)
    }
    axes = s.draw_roll(samples, 0.3, 0.05).axes
    titles = ["exact: $E[x_0|x_t, y]$", "DPS", "DPS with the variance"]
    assert [ax.get_title() for ax in axes] == titles
    for ax, columns in zip(axes, samples.values()):
        lines = {line.get_label(): line.get_xydata() for line in ax.lines}
        assert np.array_equal(lines["data"], s.POINTS)
        dots = lines["samples by DDIM, joined to their twins"]
        assert np.array_equal(dots, columns["DDIM"])
        joins = [line.get_xydata() for line in ax.lines if line.get_label().startswith("_")]
        assert np.array_equal(joins, np.stack([dots, samples["exact"]["DDIM"]], axis=1))
        strip = ax.patches[0].get_extents().transformed(ax.transData.inverted())
        assert (strip.x0, strip.x1) == pytest.approx((0.25, 0.35))

    on_line = {name: rng(i).random((len(s.RATIOS), 50)) for i, name in enumerate(("DDPM", "DDIM"))}
    figure = s.draw_gaussian(on_line)
    for column, ax in enumerate(figure.axes):
        lines = {line.get_label(): line for line in ax.lines}
        for name, method in [
            ("posterior", "posterior"),
            ("DPS, DDPM", "DDPM"),
            ("DPS, DDIM", "DDIM"),
        ]:
            k, curve = lines[f"{name}, exact"].get_data()
            laws = [s.gaussian_law(method, s=1.0, tau=1 / ratio, y=1.0)[column] for ratio in k]
            np.testing.assert_allclose(curve, laws)
            assert lines[f"{name}, exact"].get_color() == s.COLORS[method]
        for bars, (method, x_0) in zip(ax.containers, on_line.items()):
            assert bars[0].get_color() == s.COLORS[method]
            numbers, errors = s.estimates(x_0)[2 * column : 2 * column + 2]
            np.testing.assert_allclose(bars[0].get_xydata(), np.transpose([s.RATIOS, numbers]))
            ends = np.array(bars[2][0].get_segments())[:, :, 1]
            np.testing.assert_allclose(np.ptp(ends, axis=1), 10 * errors)
    assert [ax.get_title()[:4] for ax in figure.axes] == ["mean", "vari"]


def test_main(tmp_path, monkeypatch):
    """What is printed, each number against what it is of."""
    kept, printed = {}, []
    line = partial(s.sample_gaussian, n=500, num_steps=50)
    roll = s.sample_roll
    monkeypatch.setattr(s, "sample_gaussian", lambda rng: kept.setdefault("line", line(rng)))

    def spy(x_1, num_steps, rng, *, y, tau):
        kept.update(
            roll=roll(x_1, num_steps, rng, y=y, tau=tau), x_1=x_1, asked=(num_steps, y, tau)
        )
        return kept["roll"]

    monkeypatch.setattr(s, "sample_roll", spy)
    monkeypatch.setattr(s, "table", printed.append)
    flags = "--num-steps 20 --num-samples 130 --y 0.1 --tau 0.3"
    s.main([*flags.split(), "--figures-dir", str(tmp_path)])
    assert kept["asked"] == (20, 0.1, 0.3)
    assert kept["x_1"].shape == (130, 2)
    assert kept["x_1"].std() == pytest.approx(30, rel=0.2)
    (heading, law, *rows), (line_heading, *line_rows) = printed
    assert heading[:3] == ["Swiss roll", "a.x_0 from y", "x_0 from twin"]
    weights = s.point_posterior(0.1, points=s.POINTS, a=s.A, tau=0.3)
    shares = [weights[s.THETA // np.pi == k].sum() for k in range(4)]
    spread = sum(w * (x - 0.1) ** 2 for w, (x, _) in zip(weights, s.POINTS)) ** 0.5
    assert [float(law[1]), *map(float, law[3:])] == pytest.approx([spread, *shares], abs=5.1e-4)
    names = [(name, sampler) for name in kept["roll"] for sampler in ("DDPM", "DDIM")]
    assert [row[0] for row in rows] == [", ".join(pair) for pair in names]
    for row, (name, sampler) in zip(rows, names):
        x_0, twin = kept["roll"][name][sampler], kept["roll"]["exact"][sampler]
        off = np.mean((x_0[:, 0] - 0.1) ** 2) ** 0.5
        apart = np.median(np.hypot(*(x_0 - twin).T))
        numbers = [off, apart, *s.arc_shares(x_0)]
        assert [*map(float, row[1:])] == pytest.approx(numbers, abs=5.1e-4)
    assert line_heading == ["Gaussian, s / tau = 2", "mean", "sampled", "variance", "sampled"]
    for row, method in zip(line_rows, ("posterior", "DDPM", "DDIM")):
        assert method in row[0]
        exact = s.gaussian_law(method, s=1.0, tau=0.5, y=1.0)
        assert [float(row[1]), float(row[3])] == pytest.approx(exact, abs=5.1e-5)
        if method != "posterior":
            x_0 = kept["line"][method][list(s.RATIOS).index(2.0)]
            found = [float(number) for cell in (row[2], row[4]) for number in cell.split(" +- ")]
            v = x_0.var()
            exact = [x_0.mean(), (v / 500) ** 0.5, v, v * (2 / 500) ** 0.5]
            assert found == pytest.approx(exact, abs=5.1e-5)
    assert {path.stem for path in tmp_path.iterdir()} == {"posterior", "gaussian"}
