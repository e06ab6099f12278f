"""Experiment 12 held to references that share no code with it."""

from functools import partial

import guidance as s
import numpy as np
import pytest

STD = 0.5


def rng(seed=0):
    return np.random.default_rng(seed)


def line(w):
    """D_w on the line."""
    data = partial(s.gaussian_denoiser, mean=0, variance=s.S_U)
    of_class = partial(s.gaussian_denoiser, mean=0, variance=s.S_C)
    return partial(s.guided, data=data, of_class=of_class, w=w)


def plane(w, std=STD):
    """D_w in the plane."""
    data = partial(s.mixture_denoiser, std=std)
    of_class = partial(s.gaussian_denoiser, mean=s.CENTERS[0], variance=std**2)
    return partial(s.guided, data=data, of_class=of_class, w=w)


def log_tilted(x, sigma, w):
    """log p_t(x) p_t(c|x)^w in the plane, up to a constant.  x: (..., 2)."""
    centers = [(0, 1), (-(0.75**0.5), -0.5), (0.75**0.5, -0.5)]
    p = np.exp(-((x[..., None, :] - centers) ** 2).sum(axis=-1) / (2 * (STD**2 + sigma**2)))
    return (1 - w) * np.log(p.sum(axis=-1)) + w * np.log(p[..., 0])


@pytest.mark.parametrize("w", [0, 1, 4])
def test_denoisers_have_the_score_of_the_tilted_density(w):
    """w = 0: the mixture's denoiser alone; w = 1: the class's; 4: both."""
    x, sigma, h = rng().normal(size=(20, 2)), 0.6, 1e-5
    score = (plane(w)(x, sigma) - x) / sigma**2
    for k, step in enumerate(h * np.eye(2)):
        difference = log_tilted(x + step, sigma, w) - log_tilted(x - step, sigma, w)
        np.testing.assert_allclose(score[:, k], difference / (2 * h), atol=1e-5)


def test_w_of_1_is_the_conditional_sampler_to_the_letter():
    of_class = partial(s.gaussian_denoiser, mean=s.CENTERS[0], variance=STD**2)
    x_1, sigmas = 9 * rng().normal(size=(20, 2)), s.log_uniform(5, 0.01, 9)
    for got, want in zip(s.ddim(plane(1), x_1, sigmas), s.ddim(of_class, x_1, sigmas)):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("w", [0, 1, 2, 4, 8])
def test_laws_are_the_limits_of_recursions(w):
    """Each step multiplies x by a number, and DDPM's adds noise: 40 000 steps, no sample."""
    sigmas = np.geomspace(1e4, 1e-4, 40_001)
    ratio, variance = sigmas[1:] / sigmas[:-1], sigmas[:-1] ** 2
    shrink = 1 - (1 - w) * s.S_U / (s.S_U + variance) - w * s.S_C / (s.S_C + variance)
    ddim = 1e8 * np.prod(1 - (1 - ratio) * shrink) ** 2
    assert s.ddim_variance(w) == pytest.approx(ddim, rel=5e-3)
    ddpm = 1e8
    for factor, noise in zip(1 - (1 - ratio**2) * shrink, variance * (1 - ratio**2)):
        ddpm = factor**2 * ddpm + noise
    assert s.ddpm_variance(w) == pytest.approx(ddpm, rel=5e-3)
    assert s.tilted_variance(w) == pytest.approx(1 / ((1 - w) / s.S_U + w / s.S_C))


def test_samplers_after_every_step():
    """Variances by hand, on a coarse grid, where D = 0: DDPM's is the last noise alone."""
    n, sigmas = 200_000, np.array([4.0, 2.0, 1.0, 0.0])
    x_1 = 4 * rng().standard_normal(n)

    def zero(x, sigma):
        return 0 * x

    for x, sigma in zip(s.ddim(zero, x_1, sigmas), sigmas[1:]):
        np.testing.assert_allclose(x, x_1 * sigma / 4, atol=1e-12)
    variance, g = 16.0, rng(1)
    for k, x in enumerate(s.ddpm(zero, x_1, sigmas, g)):
        old, new = sigmas[k] ** 2, sigmas[k + 1] ** 2
        variance = (new / old) ** 2 * variance + old - new
        assert x.var() == pytest.approx(variance, rel=5 * (2 / n) ** 0.5)


def test_langevin_leaves_the_tilted_density_as_it_is_and_pulls_samples_to_it():
    n, w, sigma, g = 20_000, 4, 0.3, rng()
    tilted = 1 / ((1 - w) / (s.S_U + sigma**2) + w / (s.S_C + sigma**2))
    for x in (tilted**0.5 * g.standard_normal(n), 0.3 * g.standard_normal(n)):
        for _ in range(200):
            x = s.langevin(line(w), x, sigma, 0.02, g)
        assert x.var() == pytest.approx(tilted, rel=5 * (2 / n) ** 0.5 + 0.01)  # 0.01: the step


def test_ddpm_langevin():
    """Two Langevin steps on each level of the grid, of the size it says, then DDPM's."""
    sigmas, x, g = s.log_uniform(5, 0.01, 10), 10 * rng().standard_normal(30), rng(2)
    np.testing.assert_allclose(sigmas, [10, 10**0.25, 10**-0.5, 10**-1.25, 0.01, 0], rtol=1e-12)
    repaired = s.ddpm_langevin(line(2), x, sigmas, rng(2), num_langevin=2, variance=1.5)
    for sigma, next_sigma, got in zip(sigmas, sigmas[1:], repaired):
        for _ in range(2):
            x = s.langevin(line(2), x, sigma, (1.5 + sigma**2) / 50, g)
        x = next(s.ddpm(line(2), x, [sigma, next_sigma], g))
        np.testing.assert_array_equal(got, x)


@pytest.mark.parametrize("w", [1, 4])
def test_tilted_samples_by_quadrature(w):
    n = 20_000
    x_0 = s.tilted_samples(n, w, rng(), std=STD)
    axis = np.linspace(-4, 5, 400)
    grid = np.stack(np.meshgrid(axis, axis), axis=-1)
    p = np.exp(log_tilted(grid, 0, w))
    p /= p.sum()
    mean = (p * grid[..., 1]).sum()
    std = (p * (grid[..., 1] - mean) ** 2).sum() ** 0.5
    assert x_0.shape == (n, 2)
    assert s.along_axis(x_0) == pytest.approx(mean, abs=5 * std / n**0.5)
    assert x_0[:, 1].std() == pytest.approx(std, rel=5 / (2 * n) ** 0.5 + 0.01)
    assert x_0[:, 0].mean() == pytest.approx(0, abs=5 * x_0[:, 0].std() / n**0.5)


def test_measure():
    assert s.measure(np.array([1.0, 3, 3, -3])) == pytest.approx((7, 7 / 2**0.5))


def test_main(tmp_path, capsys, monkeypatch):
    calls, original = [], s.sample

    def spy(denoiser, x, sigmas, rng, **repair):
        calls.append((denoiser, x, sigmas, repair))
        return original(denoiser, x, sigmas, rng, **repair)

    monkeypatch.setattr(s, "sample", spy)
    command = "--num-steps 100 --num-samples 2100 --std 0.3 --sigma-q 50"
    s.main(f"--figures-dir {tmp_path} {command}".split())
    wanted = [(line(w), (2100,), s.S_C) for w in s.SCALES]
    wanted += [(plane(w, 0.3), (2000, 2), 0.3**2) for w in s.SCALES[1:]]
    assert len(calls) == len(wanted)
    for (denoiser, x, sigmas, repair), (reference, shape, variance) in zip(calls, wanted):
        assert x.shape == shape
        assert x.std() == pytest.approx(50, rel=0.07)
        assert sigmas[[0, -2]] == pytest.approx([50, 0.01])
        assert repair == {"num_langevin": 2, "variance": variance}
        np.testing.assert_array_equal(
            denoiser(np.ones((1, 2)), 0.6), reference(np.ones((1, 2)), 0.6)
        )
    assert {path.name for path in tmp_path.iterdir()} == {"tilted.jpg", "variance-vs-w.jpg"}
    lines = capsys.readouterr().out.splitlines()
    for text, w in zip(lines[2:7], s.SCALES):
        numbers = np.array([float(word.strip("()")) for word in text.split()[3:] if word != "+-"])
        exact = (s.ddim_variance(w), s.ddpm_variance(w), s.tilted_variance(w))
        assert numbers[2::3] == pytest.approx(exact, abs=1e-4)
        assert numbers[0::3] == pytest.approx(exact, rel=0.35)
        assert numbers[1::3] == pytest.approx(numbers[0::3] * (2 / 2100) ** 0.5, abs=1e-4)
    ddim, ddpm, repaired, tilted = map(float, lines[11].split()[3:])
    assert ddim > ddpm > repaired
    assert tilted == pytest.approx(1.02, abs=0.05)
