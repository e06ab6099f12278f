"""Experiment 0 held to references that share no code with it."""

from statistics import NormalDist

import gaussian as s
import numpy as np
import pytest

DATA = {"mu_0": 1.0, "sigma_0": 0.7, "sigma_q": 3.0}
OTHER = {"mu_0": -2.0, "sigma_0": 0.3, "sigma_q": 0.8}


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


def test_reverse_mean_from_the_score():
    """Tweedie: x_t + sigma_q^2 dt times the slope of log p_t, here by differences."""
    x_t, t, dt, h = np.array([-2.0, 0.5, 3.0]), 0.6, 0.2, 1e-4
    p = [NormalDist(*s.p_t(t, **DATA)).pdf(x) for x in [*(x_t - h), *(x_t + h)]]
    score = np.diff(np.log(p).reshape(2, 3), axis=0)[0] / (2 * h)
    want = x_t + DATA["sigma_q"] ** 2 * dt * score
    np.testing.assert_allclose(s.reverse_mean(x_t, t, dt, **DATA), want, atol=1e-6)


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
    by_sigma_q = s.error_vs_sigma_q(mu_0=1.0, sigma_0=0.7)
    for name in ("DDPM", "DDIM"):
        assert by_steps[name, "p_1"][0] == pytest.approx(one[name], rel=1e-9)
        assert by_steps[name, "p_1"][-1] < 0.01 < by_steps[name, "base"][-1]
        for n in (10, 100, 1000):
            mean, std = s.law(name, n, 0.0, s.SIGMA_QS[70], **{**DATA, "sigma_q": s.SIGMA_QS[70]})
            exact = ((mean - 1.0) ** 2 + (std - 0.7) ** 2) ** 0.5
            assert by_sigma_q[name, n][70] == pytest.approx(exact, rel=1e-9)


def test_main(tmp_path, capsys, monkeypatch):
    def spy(x_1, num_steps, rng, original=s.sample, **data):
        assert x_1.mean() == pytest.approx(0, abs=5 * 0.8 / 200)
        assert x_1.std() == pytest.approx(0.8, rel=0.02)
        assert (num_steps, data) == (9, OTHER)
        return original(x_1, num_steps, rng, **data)

    monkeypatch.setattr(s, "sample", spy)
    flags = "--num-steps 9 --num-samples 40_000 --mu-0 -2 --sigma-0 0.3 --sigma-q 0.8"
    s.main([*flags.split(), "--figures-dir", str(tmp_path)])
    names = {"samples-ddm-ddim-toy-example", "error-vs-steps", "error-vs-sigma-q"}
    assert {path.stem[len("experiment-0-") :] for path in tmp_path.iterdir()} == names
    *_, ddpm, ddim, data = (line.split() for line in capsys.readouterr().out.splitlines())
    assert data == ["data", "-2.0000", "0.3000"]
    for name, *row in (ddpm, ddim):
        mean, x_mean, _, mean_se, std, x_std, _, std_se, from_base, from_p_1 = row
        exact = s.law(name, 9, 0.0, 0.8, **OTHER)
        assert (float(mean), float(std)) == pytest.approx(exact, abs=6e-5)
        assert 0 < abs(float(x_mean) - exact[0]) < 5 * float(mean_se)
        assert 0 < abs(float(x_std) - exact[1]) < 5 * float(std_se)
        assert float(mean_se) == pytest.approx(exact[1] / 200, abs=6e-5)
        assert float(from_base) == pytest.approx(np.hypot(exact[0] + 2, exact[1] - 0.3), abs=6e-5)
        assert float(from_p_1) < float(from_base)
