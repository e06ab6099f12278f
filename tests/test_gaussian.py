"""Experiment 0 held to references that share no code with it."""

from statistics import NormalDist

import gaussian as s
import numpy as np
import pytest
from conftest import paste, rng, snippet
from matplotlib.figure import Figure

DATA = {"mu_0": 1.0, "sigma_0": 0.7, "sigma_q": 3.0}
OTHER = {"mu_0": -200.0, "sigma_0": 40.0, "sigma_q": 9.0}
COLORS = {"DDPM": "#0072B2", "DDIM": "#E69F00"}


@pytest.fixture(autouse=True)
def written(monkeypatch):
    """Figures are not written, which takes seconds."""
    monkeypatch.setattr(Figure, "savefig", lambda *_, **__: None)


@pytest.mark.parametrize("data", [DATA, OTHER])
@pytest.mark.parametrize(("t", "dt"), [(1.0, 0.001), (0.5, 0.2), (0.4, 0.4), (1.0, 1.0)])
def test_reverse_mean_by_bayes_rule(data, t, dt):
    """A sum over x_0 and the noise up to t - dt, weighted by how well each explains x_t."""
    z = np.linspace(-9, 9, 601)
    previous = data["mu_0"] + data["sigma_0"] * z[:, None] + data["sigma_q"] * (t - dt) ** 0.5 * z
    for x_t in data["mu_0"] + data["sigma_0"] * np.array([-2.0, 0.5]):
        misfit = (x_t - previous) ** 2 / (data["sigma_q"] ** 2 * dt)
        weights = np.exp(-(z[:, None] ** 2 + z**2 + misfit) / 2)
        exact = (weights * previous).sum() / weights.sum()
        found = s.reverse_mean(x_t, t, dt, **data)
        wrong = f"E[x_(t-dt) | x_t = {x_t}] for {data}, t = {t}, dt = {dt}"
        assert found == pytest.approx(exact, abs=1e-6 * data["sigma_0"]), wrong


@pytest.mark.parametrize("data", [DATA, {**OTHER, "mu_0": -2.0}])
def test_law_of_many_samples(data):
    """From the base and from p_1; the data itself is drawn and noised."""
    n = 20_000
    stds = np.array([data["sigma_0"], data["sigma_q"]])
    noised = data["mu_0"] + stds @ rng(1).normal(size=(2, n))
    for x_1, start in [(data["sigma_q"] * rng().normal(size=n), "base"), (noised, "p_1")]:
        mean_1, std_1 = s.Gaussian(**data).starts()[start]
        assert abs(x_1.mean() - mean_1) < 5 * std_1 / n**0.5
        assert x_1.std() == pytest.approx(std_1, rel=5 / (2 * n) ** 0.5)
        for name, x_0 in s.sample(x_1, 9, rng(2), s.Gaussian(**data)).items():
            mean, std, se = x_0.mean(), x_0.std(), x_0.std() / n**0.5
            wanted = pytest.approx(mean, abs=5 * se), pytest.approx(std, abs=5 * se)
            wrong = f"{name}'s law is not the mean and std of its samples, {mean}, {std}"
            assert s.law(name, 9, mean_1, std_1, **data) == wanted, wrong


def test_samplers_on_a_point_mass():
    """To a point mass at 0: DDIM is at x_1 sqrt(t), and DDPM's variance obeys a recursion."""

    def mean(x_t, t, dt):
        return (1 - dt / t) * x_t

    x_1, variance = 3 * rng().standard_normal(100_000), 9.0
    for k, x_t in zip((6, 5, 4, 3, 2, 1, 0), s.ddim(mean, x_1, 7)):
        np.testing.assert_allclose(x_t, x_1 * (k / 7) ** 0.5, rtol=0, atol=1e-13)
    for k, x_t in zip((4, 3, 2, 1), s.ddpm(mean, x_1, 4, 3.0, rng(1))):
        variance = (1 - 1 / k) ** 2 * variance + 9 / 4
        assert x_t.var() == pytest.approx(variance, rel=5 * (2 / 100_000) ** 0.5)


@pytest.mark.parametrize("changed", ["MU_0, SIGMA_0 = -30, 5", "the page's"])
def test_the_truth_follows_the_data(changed, tmp_path, spy):
    """As dt -> 0: DDPM keeps of x_1 the share r, DDIM the share sqrt(r) (the ODE)."""
    other = paste(s, snippet(s) if changed == "the page's" else changed)
    calls = spy(other, "report")
    other.STEP_COUNTS, other.SIZES = np.array([1, 10]), np.array([1.0, 10.0])
    other.draw_samples = lambda *_: Figure()
    other.main(["--num-steps", "10_000", "--num-samples", "3", "--figures-dir", str(tmp_path)])
    mu_0, sigma_0 = (172 + 1 / 9, 9.52709) if changed == "the page's" else (-30, 5)
    r = sigma_0**2 / (sigma_0**2 + 7**2)
    laws = calls[0].found
    assert laws["DDPM"] == pytest.approx((mu_0 * (1 - r), sigma_0 * (1 - r**2) ** 0.5), rel=1e-3)
    assert laws["DDIM"] == pytest.approx((mu_0 * (1 - r**0.5), 7 * r**0.5), rel=1e-3)
    assert other.error_vs_sigma_q(mu_0, sigma_0)[0] == pytest.approx([abs(mu_0), 10 * abs(mu_0)])


def test_which_variance_has_a_reverse_step(capsys):
    """The page's lines print the std at the end; with the posterior's variance that of p_0."""
    exec(snippet(s, "Predict, then run"), {})
    wide, narrow, exact = (float(word) for word in capsys.readouterr().out.split())
    assert wide == pytest.approx(s.law("DDPM", 1000, 0, 7.0, mu_0=0, sigma_0=0.7, sigma_q=7)[1])
    assert exact == pytest.approx(0.7 * (1 - (0.49 / 49.49) ** 2) ** 0.5, rel=1e-4)
    assert narrow == pytest.approx(0.634, abs=1e-3)


def test_wasserstein_by_quantiles():
    """In one dimension the mass is moved from quantile to quantile."""
    z = np.array([NormalDist().inv_cdf((k + 0.5) / 20_000) for k in range(20_000)])
    exact = (((1.0 + 0.7 * z) - (0.4 + 2.0 * z)) ** 2).mean() ** 0.5
    assert s.wasserstein((1.0, 0.7), (0.4, 2.0)) == pytest.approx(exact, rel=1e-3)


def lines(figure):
    """The lines of each panel, {color: {style: [(n, 2), ...]}}."""
    panels = []
    for ax in figure.axes:
        panels.append({})
        for line in ax.lines:
            styles = panels[-1].setdefault(line.get_color(), {})
            styles.setdefault(line.get_linestyle(), []).append(line.get_xydata())
    return panels


def test_main(tmp_path, spy, monkeypatch):
    """What is drawn and printed is the law's, the samples' and the error's own."""
    monkeypatch.setattr(s, "STEP_COUNTS", np.array([2, 5]))
    monkeypatch.setattr(s, "SIZES", np.array([0.2, 20]))
    calls, tables, histograms = spy(s, "sample"), spy(s, "table"), spy(s, "draw_samples")
    by_steps, by_sigma_q = spy(s, "draw_error_vs_steps"), spy(s, "draw_error_vs_sigma_q")
    flags = "--num-steps 9 --num-samples 5000 --mu-0 -2 --sigma-0 0.3 --sigma-q 0.8 --seed 3"
    s.main([*flags.split(), "--figures-dir", str(tmp_path)])
    data = {"mu_0": -2.0, "sigma_0": 0.3, "sigma_q": 0.8}
    starts = {"base": (0, 0.8), "p_1": (-2, 0.73**0.5)}
    (call,) = calls
    assert (call.num_steps, call.data) == (9, s.Gaussian(**data))
    np.testing.assert_allclose(call.x_1, 0.8 * rng(3).standard_normal(5000))

    def error(name, num_steps, start, **data):
        mean, std = s.law(name, num_steps, *start, **data)
        return pytest.approx(np.hypot(mean + 2, std - 0.3), rel=1e-6)

    laws = {name: s.law(name, 9, *starts["base"], **data) for name in COLORS}
    pictures = [("#CC79A7", call.x_1, starts["base"], starts["p_1"])]
    pictures += [(COLORS[name], call.result[name], laws[name], (-2, 0.3)) for name in COLORS]
    drawn = lines(histograms[0].result)
    for ax, panel, (color, x, own, wanted) in zip(histograms[0].result.axes, drawn, pictures):
        heights = [bar.get_height() for bar in ax.patches]
        assert heights == pytest.approx(np.histogram(x, len(heights), density=True)[0])
        for curve, bell in ((panel[color]["-"][0], own), (panel["k"]["--"][0], wanted)):
            p = [NormalDist(*bell).pdf(place) for place in curve[:, 0]]
            np.testing.assert_allclose(curve[:, 1], p, rtol=1e-6)
            assert curve[:, 0].max() > bell[0] + 3 * bell[1]
    for panel, start in zip(lines(by_steps[0].result), ("p_1", "base")):
        for name, color in COLORS.items():
            curve = [[n, error(name, n, starts[start], **data)] for n in (2, 5)]
            assert panel[color]["-"][0].tolist() == curve
    for panel, (name, color) in zip(lines(by_sigma_q[0].result), COLORS.items()):
        assert panel["k"][":"][0][:, 0].tolist() == [0.8, 0.8]
        for curve, num_steps in zip(panel[color]["-"], (10, 100, 1000)):
            at = [(q, {**data, "sigma_q": q}) for q in (0.4, 40)]
            far = [[pytest.approx(q), error(name, num_steps, (0, q), **other)] for q, other in at]
            assert curve.tolist() == far

    for row, name in zip(tables[0].rows[1:], COLORS):
        x_0, (mean, std) = call.result[name], laws[name]
        numbers = [mean, x_0.mean(), std / 5000**0.5, std, x_0.std(), std / 10_000**0.5]
        far = [error(name, 9, start, **data).expected for start in starts.values()]
        assert [float(x) for x in row[1:]] == pytest.approx([*numbers, *far], abs=6e-5)
