"""Experiment 12 held to references that share no code with it."""

from functools import partial

import guidance as s
import numpy as np
import pytest

STD = 0.5


def rng(seed=0):
    return np.random.default_rng(seed)


def guided(w, of):
    """D_w of an example: ON_LINE or of in_plane."""
    return partial(s.guided, data=of["data"], of_class=of["of_class"], w=w)


def log_tilted(x, sigma, w):
    """log p_t(x) p_t(c|x)^w in the plane, up to a constant.  x: (..., 2)."""
    centers = [(0, 1), (-(0.75**0.5), -0.5), (0.75**0.5, -0.5)]
    p = np.exp(-((x[..., None, :] - centers) ** 2).sum(axis=-1) / (2 * (STD**2 + sigma**2)))
    return (1 - w) * np.log(p.sum(axis=-1)) + w * np.log(p[..., 0])


@pytest.mark.parametrize("w", [0, 1, 4])
def test_denoisers_have_the_score_of_the_tilted_density(w):
    """w = 0: the mixture's denoiser alone; w = 1: the class's; 4: both."""
    x, sigma, h = rng().normal(size=(20, 2)), 0.6, 1e-5
    score = (guided(w, s.in_plane(STD))(x, sigma) - x) / sigma**2
    for k, step in enumerate(h * np.eye(2)):
        difference = log_tilted(x + step, sigma, w) - log_tilted(x - step, sigma, w)
        np.testing.assert_allclose(score[:, k], difference / (2 * h), atol=1e-5)


@pytest.mark.parametrize("w", [1, 2, 4, 8])
def test_laws_are_the_limits_of_recursions(w):
    """Each step multiplies x by a number, and DDPM's adds noise: 40 000 steps, no sample."""
    sigmas = np.geomspace(1e4, 1e-4, 40_001)
    ratio, variance = sigmas[1:] / sigmas[:-1], sigmas[:-1] ** 2
    shrink = 1 - guided(w, s.ON_LINE)(1.0, sigmas[:-1])
    want = 1 - (1 - w) * 2 / (2 + variance) - w / (1 + variance)
    np.testing.assert_allclose(shrink, want, atol=1e-12)
    ddim = 1e8 * np.prod(1 - (1 - ratio) * want) ** 2
    assert s.ddim_variance(w) == pytest.approx(ddim, rel=5e-3)
    ddpm = 1e8
    for factor, noise in zip(1 - (1 - ratio**2) * want, variance * (1 - ratio**2)):
        ddpm = factor**2 * ddpm + noise
    assert s.ddpm_variance(w) == pytest.approx(ddpm, rel=5e-3)
    assert s.tilted_variance(w) == pytest.approx(1 / ((1 - w) / 2 + w))


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
    tilted = 1 / ((1 - w) / (2 + sigma**2) + w / (1 + sigma**2))
    for x in (tilted**0.5 * g.standard_normal(n), 0.3 * g.standard_normal(n)):
        for _ in range(200):
            x = s.langevin(guided(w, s.ON_LINE), x, sigma, 0.02, g)
        assert x.var() == pytest.approx(tilted, rel=5 * (2 / n) ** 0.5 + 0.01)  # 0.01: the step


def test_sample():
    """Each name its sampler, in turn on one stream; Langevin steps, of the size it says, first."""
    of, x_1, sigmas = (
        s.in_plane(0.3),
        10 * rng().standard_normal((30, 2)),
        s.log_uniform(5, 0.01, 10),
    )
    np.testing.assert_allclose(sigmas, [10, 10**0.25, 10**-0.5, 10**-1.25, 0.01, 0], rtol=1e-12)
    assert of["variance"] == pytest.approx(0.09)
    assert s.ON_LINE["variance"] == 1
    got = s.sample(x_1, 3, sigmas, rng(2), num_langevin=2, **of)
    g, denoiser = rng(2), guided(3, of)
    *_, ddim = s.ddim(denoiser, x_1, sigmas)
    *_, ddpm = s.ddpm(denoiser, x_1, sigmas, g)
    x = x_1
    for sigma, next_sigma in zip(sigmas, sigmas[1:]):
        for _ in range(2):
            x = s.langevin(denoiser, x, sigma, (0.09 + sigma**2) / 50, g)
        (x,) = s.ddpm(denoiser, x, [sigma, next_sigma], g)
    for name, want in {"DDIM": ddim, "DDPM": ddpm, "DDPM + Langevin": x}.items():
        np.testing.assert_array_equal(got[name], want)


@pytest.mark.parametrize("w", [1, 4])
def test_tilted_samples_by_quadrature(w):
    n = 400_000
    x_0 = s.tilted_samples(n, w, rng(), std=STD)
    axis = np.linspace(-4, 5, 400)
    grid = np.stack(np.meshgrid(axis, axis), axis=-1)
    p = np.exp(log_tilted(grid, 0, w))
    p /= p.sum()
    mean = (p * grid[..., 1]).sum()
    variances = (p * grid[..., 0] ** 2).sum(), (p * (grid[..., 1] - mean) ** 2).sum()
    assert x_0.shape == (n, 2)
    (place, error), (total, its_error) = map(s.estimate, (s.along_axis(x_0), s.from_mean(x_0)))
    assert place == pytest.approx(mean, abs=5 * error)
    assert total == pytest.approx(sum(variances), abs=5 * its_error)
    assert error == pytest.approx((variances[1] / n) ** 0.5, rel=0.01)
    assert x_0[:, 0].mean() == pytest.approx(0, abs=5 * (variances[0] / n) ** 0.5)


def test_the_claim():
    """Means of the classes are too far, DDIM's farther; DDPM is narrower on the line only."""
    sigmas, n, w, means, totals = s.log_uniform(200, 0.01, 100), 4000, 8, {}, {}
    x_1 = 100 * rng(3).standard_normal((n, 2))
    samples = s.sample(x_1, w, sigmas, rng(4), num_langevin=8, **s.in_plane(STD))
    samples["tilted"] = s.tilted_samples(n, w, rng(5), std=STD)
    for name, x_0 in samples.items():
        means[name], totals[name] = x_0[:, 1].mean(), x_0.var(axis=0).sum()
    assert means["DDIM"] - 0.7 > means["DDPM"] > means["tilted"] + 0.3
    assert means["DDPM + Langevin"] == pytest.approx(means["tilted"], abs=0.03)
    assert totals["DDIM"] < 0.6 * totals["tilted"]
    assert totals["DDPM"] > totals["tilted"] - 5 * totals["tilted"] / n**0.5
    assert s.ddim_variance(w) < s.ddpm_variance(w) < s.tilted_variance(w)


def test_main(tmp_path, monkeypatch, capsys):
    """Options reach the samplers, samples the rows and the figures."""
    calls, tables, drawn = [], [], []

    def sample(x, w, sigmas, rng, *, data, of_class, variance, num_langevin):
        ones = np.ones((1, x.ndim))
        seen = [denoiser(ones, 0.6).tolist() for denoiser in (data, of_class)]
        calls.append((w, x, sigmas, seen, variance, num_langevin))
        size = {"DDIM": 1, "DDPM": 2, "DDPM + Langevin": 3}
        return {name: w * k + rng.normal(size=x.shape) for name, k in size.items()}

    monkeypatch.setattr(s, "sample", sample)
    monkeypatch.setattr(s, "table", tables.append)
    for name in ("draw_variances", "draw_samples"):
        draw = getattr(s, name)
        monkeypatch.setattr(s, name, lambda *args, draw=draw: drawn.append(args) or draw(*args))
    words = "--num-steps 9 --num-samples 5100 --num-langevin 3 --std 0.3 --sigma-q 50"
    s.main(f"--figures-dir {tmp_path} {words}".split())
    assert {path.name for path in tmp_path.iterdir()} == {"tilted.jpg", "variance-vs-w.jpg"}

    assert [w for w, *_ in calls] == [1, 2, 4, 8, 2, 8]
    assert [x.shape for _, x, *_ in calls] == [(5100,)] * 4 + [(5000, 2)] * 2
    for _, x, sigmas, seen, variance, num_langevin in calls:
        of = s.ON_LINE if x.ndim == 1 else s.in_plane(0.3)
        ones = np.ones((1, x.ndim))
        assert seen == [of[key](ones, 0.6).tolist() for key in ("data", "of_class")]
        assert (variance, num_langevin) == (of["variance"], 3)
        assert x.std() == pytest.approx(50, rel=0.07)
        np.testing.assert_array_equal(sigmas, s.log_uniform(9, 0.01, 50))

    (classes, std), (variances,) = drawn
    assert std == 0.3
    for w, columns in classes.items():
        want = s.tilted_samples(200_000, w, rng(1), std=0.3)[:, 1]
        assert columns["tilted"][:, 1].mean() == pytest.approx(want.mean(), abs=0.005)
    assert [*variances] == [1, 2, 4, 8]
    assert "(+- 2%)" in capsys.readouterr().out
    heading, *rows = tables[0]
    assert heading == ["", "DDIM", "law", "DDPM", "law", "DDPM + Langevin", "tilted"]
    for row, w in zip(rows, variances):
        numbers = [float(cell) for cell in row[1:]]
        laws = [2 ** (1 - w), (2 - 2 ** (2 - 2 * w)) / (2 * w - 1), 2 / (1 + w)]
        assert row[0] == f"w = {w}"
        assert numbers[1::2] == pytest.approx(laws, abs=6e-5)
        for k, variance in enumerate(numbers[::2], 1):  # of N(w k, 1), about 0
            error = ((4 * (w * k) ** 2 + 2) / 5100) ** 0.5
            assert variance == pytest.approx((w * k) ** 2 + 1, abs=5 * error)
            assert (variance, error) == pytest.approx([*variances[w].values()][k - 1], rel=0.15)

    heading, *rows = tables[1]
    assert heading == ["", "mean, w = 2", "mean, w = 8", "variance, w = 2", "variance, w = 8"]
    assert [row[0] for row in rows] == ["tilted", "DDIM", "DDPM", "DDPM + Langevin"]
    for k, row in enumerate(rows):
        numbers = [[float(x) for x in cell.split("+-")] for cell in row[1:]]
        x_0 = [classes[w][row[0]] for w in (2, 8)]
        values = [x[:, 1] for x in x_0] + [((x - x.mean(axis=0)) ** 2).sum(axis=1) for x in x_0]
        want = [(v.mean(), v.std() / len(v) ** 0.5) for v in values]
        np.testing.assert_allclose(numbers, want, atol=6e-4)
        assert [x.shape for x in x_0] == [(5000, 2) if k else (200_000, 2)] * 2


def test_the_figures():
    names = ["tilted", "DDIM", "DDPM", "DDPM + Langevin"]
    colors = ["0.2", "#E69F00", "#0072B2", "#CC79A7"]
    samples = {
        w: {name: rng().normal(w + k, 0.1, (5, 2)) for k, name in enumerate(names)} for w in (2, 8)
    }
    axes = s.draw_samples(samples, 0.3).axes
    for ax, (w, name) in zip(axes, [(w, name) for w in (2, 8) for name in names]):
        dots, *circles, mean = ax.lines
        assert ax.get_title() == f"{name}, $w$ = {w}"
        assert dots.get_color() == colors[names.index(name)]
        np.testing.assert_array_equal(dots.get_xydata(), samples[w][name])
        for circle, center in zip(circles, s.CENTERS):
            np.testing.assert_allclose(np.hypot(*(circle.get_xydata() - center).T), 0.6)
        assert mean.get_ydata() == pytest.approx([samples[w]["tilted"][:, 1].mean()] * 2)
        (left, right), (bottom, top) = ax.get_xlim(), ax.get_ylim()
        assert left < -1.4 < 11 < right
        assert bottom < -1 < 11 < top

    measured = {w: {name: (w + k, 0.1 * k) for k, name in enumerate(names) if k} for w in (1, 3)}
    (ax,) = s.draw_variances(measured).axes
    lines = {line.get_label(): line for line in ax.lines}
    for label, law in {"tilted": s.tilted_variance, **s.LAWS}.items():
        if label != "DDPM + Langevin":
            line = lines[f"{label}, exact"]
            np.testing.assert_allclose(line.get_ydata(), law(np.linspace(1, 3, 200)))
            np.testing.assert_allclose(line.get_xdata(), np.linspace(1, 3, 200))
            assert line.get_color() == colors[names.index(label)]
    for k, bars in enumerate(ax.containers, 1):
        marks, _, (spans,) = bars
        assert bars.get_label() == f"{names[k]}, sampled"
        assert marks.get_color() == colors[k]
        np.testing.assert_allclose(marks.get_xydata(), [(1, 1 + k), (3, 3 + k)])
        assert [np.ptp(span[:, 1]) for span in spans.get_segments()] == pytest.approx([k, k])
