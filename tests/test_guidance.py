"""Experiment 12 held to references that share no code with it."""

from functools import partial

import guidance as s
import numpy as np
import pytest
from conftest import paste, rng, snippet
from matplotlib.figure import Figure

OFF_CENTER = """
CENTERS = np.array([[4.0, 9.0], [7.0, 3.0], [0.5, 1.0], [5.0, 5.0], [9.0, 12.0]])
WEIGHTS = np.array([0.15, 0.3, 0.2, 0.25, 0.1])
"""
COLORS = {"tilted": "0.2", "DDIM": "#E69F00", "DDPM": "#0072B2", "DDPM + Langevin": "#CC79A7"}


def guided(of, w):
    """D_w of an example: ON_LINE or of in_plane."""
    return partial(s.guided, data=of["data"], of_class=of["of_class"], w=w)


def log_tilted(script, x, variance, w):
    """log p_t(x) p_t(c|x)^w in the plane, up to a constant, as it is written.  x: (n, 2)."""
    joint = [
        np.log(weight) - ((x - center) ** 2).sum(axis=1) / (2 * variance)
        for center, weight in zip(script.CENTERS, script.WEIGHTS)
    ]
    return np.logaddexp.reduce(joint) * (1 - w) + joint[0] * w


@pytest.mark.parametrize("code", ["", OFF_CENTER, snippet(s)])
def test_the_truth_follows_the_data(code):
    """Scores by differences, the tilted density on another grid."""
    script, std, sigma = paste(s, code) if code else s, 0.7, 0.6
    x = script.CENTERS[0] + rng().normal(size=(20, 2))
    for w in (0, 1, 4):
        score = (guided(script.in_plane(std), w)(x, sigma) - x) / sigma**2
        for k, step in enumerate(1e-5 * np.eye(2)):
            ends = [log_tilted(script, x + sign * step, std**2 + sigma**2, w) for sign in (-1, 1)]
            message = "(D_w - x) / sigma^2 is not the score of p_t(x) p_t(c|x)^w"
            want = (ends[1] - ends[0]) / 2e-5
            np.testing.assert_allclose(score[:, k], want, atol=1e-5, err_msg=message)

    axis = np.linspace(-7, 7, 150)
    grid = script.CENTERS[0] + np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2)
    for w in (1, 8):
        want = np.exp(log_tilted(script, grid, std**2, w))
        points, p = script.tilted(w, std)
        for power in (1, 2):
            exact = want @ grid**power / want.sum()
            np.testing.assert_allclose(p @ points**power, exact, rtol=1e-5, atol=1e-6)
    mean = sum(weight * center for weight, center in zip(script.WEIGHTS, script.CENTERS))
    places = script.along_axis(np.stack([mean, script.CENTERS[0], 2 * script.CENTERS[0] - mean]))
    np.testing.assert_allclose(places, [0, 1, 2], atol=1e-12)


@pytest.mark.parametrize(
    "code",
    [
        "CENTERS = np.ones((3, 3))",
        "CENTERS = np.ones((2, 2))",
        "CENTERS = np.full((3, 2), np.nan)",
        "WEIGHTS = np.array([0.5, 0.5, 0.5])",
        "WEIGHTS = np.array([np.nan, 0.5, 0.5])",
        "CENTERS = np.array([[0.0, 0.0], [1.0, 1.0], [-1.0, -1.0]])",
        "S_U, S_C = 1.0, 2.0",
    ],
)
def test_what_it_cannot_do_is_refused(code):
    with pytest.raises(SystemExit, match="2"):
        paste(s, code).main([])


@pytest.mark.parametrize(("s_u", "s_c"), [(2.0, 1.0), (5.0, 0.8)])
def test_laws_are_the_limits_of_recursions(s_u, s_c):
    """Each step multiplies x by a number, and DDPM's adds noise: 10 000 steps, no sample."""
    script, w = paste(s, f"S_U, S_C = {s_u}, {s_c}"), np.array([1, 2, 4, 8])
    sigmas = np.geomspace(1e3, 1e-3, 10_001)[:, None]
    ratio, variance = sigmas[1:] / sigmas[:-1], sigmas[:-1] ** 2
    shrink = 1 - guided(script.ON_LINE, w)(1.0, sigmas[:-1])
    want = 1 - (1 - w) * s_u / (s_u + variance) - w * s_c / (s_c + variance)
    np.testing.assert_allclose(shrink, want, atol=1e-12)
    ddim = 1e6 * np.prod(1 - (1 - ratio) * want, axis=0) ** 2
    np.testing.assert_allclose(script.ddim_variance(w), ddim, rtol=0.03)
    ddpm = 1e6
    for factor, noise in zip(1 - (1 - ratio**2) * want, variance * (1 - ratio**2)):
        ddpm = factor**2 * ddpm + noise
    np.testing.assert_allclose(script.ddpm_variance(w), ddpm, rtol=0.03)
    np.testing.assert_allclose(script.tilted_variance(w), 1 / ((1 - w) / s_u + w / s_c))


def test_samplers_after_every_step():
    """By hand, where D = 0."""
    sigmas, x, g = [4.0, 2.0, 1.0, 0.0], np.array([5.0, -2.0]), rng(1)
    runs = s.ddim(lambda x, _: 0 * x, x, sigmas), s.ddpm(lambda x, _: 0 * x, x, sigmas, rng(1))
    want = x
    for old, new, by_ddim, by_ddpm in zip(sigmas, sigmas[1:], *runs):
        message = "a step of DDIM keeps next / sigma of x - D"
        assert by_ddim == pytest.approx(x * new / 4), message
        want = (new / old) ** 2 * want + (old**2 - new**2) ** 0.5 * g.standard_normal(2)
        message = "a step of DDPM keeps next^2 / sigma^2 of x - D, and adds N(0, sigma^2 - next^2)"
        assert by_ddpm == pytest.approx(want), message


def test_langevin_leaves_the_tilted_density_as_it_is_and_pulls_samples_to_it():
    n, w, sigma, g = 5000, 4, 0.3, rng()
    tilted = 1 / ((1 - w) / (2 + sigma**2) + w / (1 + sigma**2))
    for x in (tilted**0.5 * g.standard_normal(n), 0.3 * g.standard_normal(n)):
        for _ in range(200):
            x = s.langevin(guided(s.ON_LINE, w), x, sigma, 0.02, g)
        assert x.var() == pytest.approx(tilted, rel=5 * (2 / n) ** 0.5 + 0.01)  # 0.01: the step


def test_sample():
    """Each name its sampler, in turn on one stream; Langevin steps, of the size it says, first."""
    of, x_1 = s.in_plane(0.3), 10 * rng().standard_normal((30, 2))
    sigmas = s.log_uniform(5, 0.01, 10)
    np.testing.assert_allclose(sigmas, [10, 10**0.25, 10**-0.5, 10**-1.25, 0.01, 0], rtol=1e-12)
    assert (of["variance"], s.ON_LINE["variance"]) == pytest.approx((0.09, 1))
    got = s.sample(x_1, 3, sigmas, rng(2), num_langevin=2, **of)
    g, denoiser = rng(2), guided(of, 3)
    *_, ddim = s.ddim(denoiser, x_1, sigmas)
    *_, ddpm = s.ddpm(denoiser, x_1, sigmas, g)
    x = x_1
    for sigma, next_sigma in zip(sigmas, sigmas[1:]):
        for _ in range(2):
            x = s.langevin(denoiser, x, sigma, (0.09 + sigma**2) / 50, g)
        (x,) = s.ddpm(denoiser, x, [sigma, next_sigma], g)
    for name, want in {"DDIM": ddim, "DDPM": ddpm, "DDPM + Langevin": x}.items():
        np.testing.assert_array_equal(got[name], want)


def test_where_the_claim_ends(capsys):
    """The page's last question, with fewer steps and samples: DDPM goes farther than DDIM."""
    code = snippet(s, "Predict, then run").replace("uniform(1000", "uniform(200")
    exec(code.replace("40_000", "10_000"), {})
    ddim, ddpm, repaired = (
        float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()
    )
    assert ddpm - 0.01 > ddim > 1.05
    assert repaired == pytest.approx(1.034, abs=0.03)


def test_main(tmp_path, spy, monkeypatch):
    """On the page's own data: options reach the samplers, samples the rows and the figures."""
    script = paste(s, snippet(s))
    names = "sample class_rows draw_samples draw_variances"
    calls, *others = (spy(script, name) for name in names.split())
    monkeypatch.setattr(Figure, "savefig", lambda *_, **__: None)
    words = "--num-steps 9 --num-samples 510 --num-langevin 3 --std 0.3 --sigma-q 50"
    script.main(f"--figures-dir {tmp_path} {words}".split())
    assert [call.w for call in calls] == [1, 2, 4, 8, 2, 8]
    for call in calls:
        of = script.ON_LINE if call.x.ndim == 1 else script.in_plane(0.3)
        ones = np.ones((1, call.x.ndim))
        for name in ("data", "of_class"):
            assert (getattr(call, name)(ones, 0.6) == of[name](ones, 0.6)).all()
        assert (call.variance, call.num_langevin) == (of["variance"], 3)
        assert call.x.std() == pytest.approx(50, rel=0.2)
        np.testing.assert_array_equal(call.sigmas, s.log_uniform(9, 0.01, 50))
    assert [call.x.shape for call in calls] == [(510,)] * 4 + [(510, 2)] * 2

    (rows,), (plane,), (line,) = others
    assert (plane.samples, plane.truths, plane.std) == (rows.samples, rows.truths, 0.3)
    for call in calls[4:]:
        columns, (points, p) = plane.samples[call.w], plane.truths[call.w]
        assert all(columns[name] is x_0 for name, x_0 in call.result.items())
        error = (p @ (points - p @ points) ** 2 / 510) ** 0.5
        assert (np.abs(columns["tilted"].mean(axis=0) - p @ points) < 5 * error).all()
        np.testing.assert_array_equal(p, script.tilted(call.w, 0.3)[1])
    for call in calls[:4]:
        want = [((x**2).mean(), (x**2).std() / 510**0.5) for x in call.result.values()]
        np.testing.assert_allclose([*line.variances[call.w].values()], want)


def test_the_figures():
    """Samples, laws and marks in the colours of their samplers; circles, thick where c is."""
    samples = {w: {name: rng().normal(w, 1, (5, 2)) for name in COLORS} for w in (2, 8)}
    truths = {w: (np.array([[0.0, w], [3.0, w]]), np.array([0.2, 0.8])) for w in (2, 8)}
    axes = s.draw_samples(samples, truths, 0.3).axes
    for ax, (w, name) in zip(axes, [(w, name) for w in (2, 8) for name in COLORS]):
        (dots,) = [line for line in ax.lines if line.get_color() == COLORS[name]]
        np.testing.assert_array_equal(dots.get_xydata(), samples[w][name])
        circles = [line for line in ax.lines if len(line.get_xydata()) > 50]
        for circle, center in zip(circles, s.CENTERS):
            np.testing.assert_allclose(np.hypot(*(circle.get_xydata() - center).T), 0.6)
        assert circles[0].get_linewidth() > circles[1].get_linewidth()
        (mean,) = [line for line in ax.lines if line.get_linestyle() == ":"]
        assert mean.get_xy1() == pytest.approx((2.4, w))
        assert np.subtract(mean.get_xy2(), mean.get_xy1()) @ s.CENTERS[0] == pytest.approx(0)
        for least, largest in (ax.get_xlim(), ax.get_ylim()):
            assert least < -1.1
            assert largest > 8

    measured = {w: {name: (w + k, 0.1 * k) for k, name in enumerate(s.LAWS, 1)} for w in (1, 3)}
    (ax,) = s.draw_variances(measured).axes
    w = np.linspace(1, 3, 200)
    laws = [2 / (1 + w), 2 ** (1 - w), (2 - 2 ** (2 - 2 * w)) / (2 * w - 1)]
    for name, law in zip(COLORS, laws):
        (line,) = [x for x in ax.lines if x.get_color() == COLORS[name] and len(x.get_xdata()) > 2]
        np.testing.assert_allclose(line.get_xydata(), np.transpose([w, law]))
    for bars in ax.containers:
        marks, _, (spans,) = bars
        (k,) = [k for k, name in enumerate(COLORS) if marks.get_color() == COLORS[name]]
        np.testing.assert_allclose(marks.get_xydata(), [(1, 1 + k), (3, 3 + k)])
        assert [np.ptp(span[:, 1]) for span in spans.get_segments()] == pytest.approx([k, k])
    assert len(ax.containers) == 3
