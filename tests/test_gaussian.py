"""Experiment 0 held to references that share no code with it."""

import re
from pathlib import Path
from statistics import NormalDist

import gaussian as s
import numpy as np
import pytest

DATA = {"mu_0": 1.0, "sigma_0": 0.7, "sigma_q": 3.0}
OTHER = {"mu_0": -2.0, "sigma_0": 0.3, "sigma_q": 0.8}
BLUE, ORANGE, PINK = "#0072B2", "#E69F00", "#CC79A7"


def rng(seed=0):
    return np.random.default_rng(seed)


def test_the_data_and_the_starts():
    t, n = 0.3, 200_000
    x_t = 1.0 + 0.7 * rng().standard_normal(n) + 3.0 * t**0.5 * rng(1).standard_normal(n)
    mean, std = s.p_t(t, **DATA)
    assert x_t.mean() == pytest.approx(mean, abs=5 * std / n**0.5)
    assert x_t.std() == pytest.approx(std, abs=5 * std / (2 * n) ** 0.5)
    assert s.starts(**DATA) == {"base": (0.0, 3.0), "p_1": (1.0, pytest.approx(9.49**0.5))}


@pytest.mark.parametrize("data", [DATA, OTHER])
@pytest.mark.parametrize(("t", "dt"), [(1.0, 0.001), (0.5, 0.2), (0.4, 0.4), (1.0, 1.0)])
def test_reverse_mean_by_bayes_rule(data, t, dt):
    """A sum over x_0 and the noise up to t - dt, weighted by how well each explains x_t."""
    z = np.linspace(-9, 9, 601)
    previous = data["mu_0"] + data["sigma_0"] * z[:, None] + data["sigma_q"] * (t - dt) ** 0.5 * z
    for x_t in (-2.0, 0.5, 3.0):
        misfit = (x_t - previous) ** 2 / (data["sigma_q"] ** 2 * dt)
        weights = np.exp(-(z[:, None] ** 2 + z**2 + misfit) / 2)
        exact = (weights * previous).sum() / weights.sum()
        assert s.reverse_mean(x_t, t, dt, **data) == pytest.approx(exact, abs=1e-6)


def test_samplers_on_a_point_mass():
    """To a point mass at 0: DDIM is at x_1 sqrt(t), and DDPM's variance obeys a recursion."""

    def mean(x_t, t, dt):
        return (1 - dt / t) * x_t

    x_1 = 3 * rng().standard_normal(100_000)
    for k, x_t in zip((6, 5, 4, 3, 2, 1, 0), s.ddim(mean, x_1, 7)):
        np.testing.assert_allclose(x_t, x_1 * (k / 7) ** 0.5, rtol=0, atol=1e-13)
    variance = 9.0
    for k, x_t in zip((4, 3, 2, 1), s.ddpm(mean, x_1, 4, 3.0, rng(1))):
        variance = (1 - 1 / k) ** 2 * variance + 9 / 4
        assert x_t.var() == pytest.approx(variance, rel=5 * (2 / 100_000) ** 0.5)


def test_law_of_ddim():
    """DDIM is a linear map: two points show what it does to a mean and a std."""
    x_0 = s.sample(np.array([0.5, 2.5]), 9, rng(), **DATA)["DDIM"]
    mean, std = s.law("DDIM", 9, 0.5, 2.0, **DATA)
    assert [mean, mean + std] == pytest.approx(x_0, rel=1e-12)


@pytest.mark.parametrize("data", [DATA, OTHER])
def test_law_with_small_steps(data):
    """As dt -> 0: DDPM keeps of x_1 the share r, DDIM the share sqrt(r) (the ODE)."""
    mu_0, sigma_0, sigma_q = data.values()
    r = sigma_0**2 / (sigma_0**2 + sigma_q**2)
    mean, std = s.law("DDPM", 50_000, 0.0, sigma_q, **data)
    assert mean == pytest.approx(mu_0 * (1 - r), rel=1e-9)  # for any number of steps
    assert std == pytest.approx(sigma_0 * (1 - r**2) ** 0.5, rel=1e-3)
    mean, std = s.law("DDIM", 50_000, 0.0, sigma_q, **data)
    assert mean == pytest.approx(mu_0 * (1 - r**0.5), rel=1e-3)
    assert std == pytest.approx(sigma_q * r**0.5, rel=1e-3)


def test_the_pull_of_a_step_forgets_not_the_noise():
    """Runs with the same noise: of a difference, DDPM keeps the share r, DDIM about sqrt(r)."""
    r = 0.49 / 9.49
    one, other = (s.sample(np.array([x_1]), 1000, rng(), **DATA) for x_1 in (-1.0, 4.0))
    assert other["DDPM"] - one["DDPM"] == pytest.approx(5 * r, rel=1e-9)
    assert other["DDIM"] - one["DDIM"] == pytest.approx(5 * r**0.5, rel=0.03)


def test_which_variance_has_a_reverse_step(capsys):
    """The page's lines print the std at the end; with the posterior's variance that of p_0."""
    page = (Path(s.__file__).parent / "README.md").read_text(encoding="utf-8")
    lines = re.search(r"```python\n(.*?)```", page, re.DOTALL)[1]
    exec(lines, {})
    wide, narrow, exact = (float(word) for word in capsys.readouterr().out.split())
    assert wide == pytest.approx(s.law("DDPM", 1000, 0, 7.0, mu_0=0, sigma_0=0.7, sigma_q=7)[1])
    assert exact == pytest.approx(0.7 * (1 - (0.49 / 49.49) ** 2) ** 0.5, rel=1e-4)
    normals = rng().standard_normal((1001, 20_000))
    x_t = 7 * normals[0]
    for k in range(1000, 0, -1):
        x_t = s.reverse_mean(x_t, k / 1000, 0.001, mu_0=0, sigma_0=0.7, sigma_q=7)
        x_t += 7 * (0.001 * (k - 1) / k) ** 0.5 * normals[k]
    assert x_t.std() == pytest.approx(narrow, rel=5 / 40_000**0.5)


def test_wasserstein_by_quantiles():
    """In one dimension the mass is moved from quantile to quantile."""
    z = np.array([NormalDist().inv_cdf((k + 0.5) / 20_000) for k in range(20_000)])
    exact = (((1.0 + 0.7 * z) - (0.4 + 2.0 * z)) ** 2).mean() ** 0.5
    assert s.wasserstein((1.0, 0.7), (0.4, 2.0)) == pytest.approx(exact, rel=1e-3)


def test_standard_errors():
    draws = 3 * rng().standard_normal((20_000, 200))
    spread = draws.mean(axis=1).std(), draws.std(axis=1).std()
    assert s.standard_errors(3, 200) == pytest.approx(spread, rel=0.03)


def test_errors():
    """One step from p_1: DDPM returns N(E x_0, sigma_q^2 more), DDIM E[x_0 | x_1]."""
    one = {"DDPM": (9 + 0.49**2 / 9.49) ** 0.5 - 0.7, "DDIM": 0.7 - 0.49 / 9.49**0.5}
    by_steps = s.error_vs_steps(**DATA)
    by_sigma_q = s.error_vs_sigma_q(1.0, 0.7)
    for name in ("DDPM", "DDIM"):
        assert by_steps[name, "p_1"][0] == pytest.approx(one[name], rel=1e-9)
        assert by_steps[name, "p_1"][-1] < 0.01 < by_steps[name, "base"][-1]
        for n in (10, 100, 1000):
            mean, std = s.law(name, n, 0.0, s.SIGMA_QS[35], **{**DATA, "sigma_q": s.SIGMA_QS[35]})
            exact = ((mean - 1.0) ** 2 + (std - 0.7) ** 2) ** 0.5
            assert by_sigma_q[name, n][35] == pytest.approx(exact, rel=1e-9)


def test_histograms():
    """Of a constant each, in the panel of its title; the law in color, the truth dashed."""
    samples = {"DDPM": np.full(20, -2.1), "DDIM": np.full(20, -1.9)}
    figure = s.draw_samples(np.full(20, 0.25), samples, 9, **OTHER)
    wanted = [(r"the base, $N(0, \sigma_q^2)$", "$p_1$", 0.25, (0, 0.8), (-2, 0.73**0.5), PINK)]
    for name, color in (("DDPM", BLUE), ("DDIM", ORANGE)):
        law = s.law(name, 9, 0.0, 0.8, **OTHER)
        wanted += [(f"{name}, steps: 9", "$p_0$", samples[name][0], law, (-2, 0.3), color)]
    for ax, (title, truth, x, law, exact, color) in zip(figure.axes, wanted):
        assert ax.get_title() == title
        (bar,) = (bar for bar in ax.patches if bar.get_height() > 0)
        assert bar.get_x() - 1e-9 <= x <= bar.get_x() + bar.get_width() + 1e-9
        for line, label, hue, bell in zip(ax.lines, ("law", truth), (color, "k"), (law, exact)):
            assert (line.get_label(), line.get_color()) == (label, hue)
            p = [NormalDist(*bell).pdf(x) for x in line.get_xdata()]
            np.testing.assert_allclose(line.get_ydata(), p)
            assert line.get_xdata()[[0, -1]] == pytest.approx(bell[0] + bell[1] * np.array([-4, 4]))


def test_error_curves(monkeypatch):
    """Numbers that are no errors: each curve is its own, in its own panel."""
    monkeypatch.setattr(s, "STEP_COUNTS", [3, 30])
    monkeypatch.setattr(s, "SIGMA_QS", [0.2, 20])
    colors, titles = (
        {"DDPM": BLUE, "DDIM": ORANGE},
        {"p_1": "from $p_1$", "base": "from the base"},
    )
    keys = [(name, key) for name in colors for key in ("base", "p_1", 10, 100, 1000)]
    errors = {key: [k, k + 0.5] for k, key in enumerate(keys, 1)}
    for ax, start in zip(s.draw_error_vs_steps(errors).axes, titles):
        assert ax.get_title() == titles[start]
        assert ax.get_xlabel() == r"number of steps, $1/\Delta t$"
        for line, name in zip(ax.lines, colors):
            assert (line.get_label(), line.get_color()) == (name, colors[name])
            assert [*map(list, line.get_data())] == [[3, 30], errors[name, start]]
    errors = {(name, n): errors[name, n] for name, n in keys if n not in titles}
    for ax, name in zip(s.draw_error_vs_sigma_q(errors, 0.8).axes, colors):
        assert ax.get_title() == f"{name}, from the base"
        assert ax.get_xlabel() == r"$\sigma_q$"
        for line, n, alpha in zip(ax.lines, (10, 100, 1000), (0.35, 0.65, 1)):
            assert (line.get_label(), line.get_color()) == (f"{n} steps", colors[name])
            assert line.get_alpha() == alpha
            assert [*map(list, line.get_data())] == [[0.2, 20], errors[name, n]]
        assert ax.lines[3].get_label() == r"$\sigma_q$ = 0.8"
        assert [*ax.lines[3].get_xdata()] == [0.8, 0.8]


def test_main(tmp_path, capsys, monkeypatch):
    printed, drawn, errors = [], [], []

    def spy(x_1, num_steps, rng, original=s.sample, **data):
        assert x_1.mean() == pytest.approx(0, abs=5 * 0.8 / 200)
        assert x_1.std() == pytest.approx(0.8, rel=0.02)
        assert (num_steps, data) == (9, OTHER)
        drawn.extend([x_1, original(x_1, num_steps, rng, **data)])
        return drawn[1]

    def spy_on_figure(*args, original=s.draw_samples, **data):
        assert (*args, data) == (*drawn, 9, OTHER)
        return original(*args, **data)

    def spy_on_errors(*args, original=s.draw_error_vs_sigma_q):
        errors.extend(args)
        return original(*args)

    monkeypatch.setattr(s, "sample", spy)
    monkeypatch.setattr(s, "draw_samples", spy_on_figure)
    monkeypatch.setattr(s, "draw_error_vs_sigma_q", spy_on_errors)
    monkeypatch.setattr(s, "table", printed.extend)
    monkeypatch.setattr(s, "STEP_COUNTS", np.array([1, 10]))
    monkeypatch.setattr(s, "SIGMA_QS", np.array([1.0, 10.0]))
    flags = "--num-steps 9 --num-samples 40_000 --mu-0 -2 --sigma-0 0.3 --sigma-q 0.8"
    s.main([*flags.split(), "--figures-dir", str(tmp_path)])
    assert errors == [s.error_vs_sigma_q(-2, 0.3), 0.8]
    names = {"samples-ddm-ddim-toy-example", "error-vs-steps", "error-vs-sigma-q"}
    assert {path.stem[len("experiment-0-") :] for path in tmp_path.iterdir()} == names
    line = "data N(-2, 0.3^2), base N(0, 0.8^2), samples of each sampler: 40000, steps: 9"
    assert capsys.readouterr().out.splitlines()[0] == line
    heads = ["", "mean: law", "sampled", "s.e.", "std: law", "sampled", "s.e."]
    assert printed[0] == [*heads, "W_2: from base", "from p_1"]
    for name, row in zip(("DDPM", "DDIM"), printed[1:]):
        x_0, law = drawn[1][name], s.law(name, 9, 0.0, 0.8, **OTHER)
        from_p_1 = s.law(name, 9, -2.0, 0.73**0.5, **OTHER)
        far = [np.hypot(mean + 2, std - 0.3) for mean, std in (law, from_p_1)]
        mean, std = [law[0], x_0.mean(), law[1] / 200], [law[1], x_0.std(), law[1] / 80_000**0.5]
        assert row == [name, *(f"{number:.4f}" for number in [*mean, *std, *far])]
        assert len(set(row)) == len(row)
