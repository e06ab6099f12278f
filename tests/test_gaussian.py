"""Experiment 0: Gaussian data.  The samplers, their exact laws, and the floors of the laws."""

import re

import numpy as np
import oracles
import pytest
from conftest import texts

SETTINGS = [  # mu_0, sigma_0, sigma_q, num_steps
    (1.0, 0.7, 7.0, 1),
    (1.0, 0.7, 7.0, 40),
    (-3.0, 0.5, 2.0, 2),
    (0.0, 2.0, 1.0, 5),
    (3.0, 0.1, 0.6, 11),
]


def random_data(rng):
    return {
        "mu_0": rng.normal(0, 3),
        "sigma_0": 10 ** rng.uniform(-1, 0.5),
        "sigma_q": 10 ** rng.uniform(-0.5, 1.2),
    }


# ---------------------------------------- The reverse mean ----------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_reverse_mean_is_the_mean_of_the_joint_law(gaussian, seed):
    rng = np.random.default_rng(seed)
    data = random_data(rng)
    t = [rng.uniform(0.05, 1), 1.0][seed % 2]
    dt = [rng.uniform(0.05, 0.95) * t, t][seed // 2 % 2]
    x_t = data["mu_0"] + np.hypot(data["sigma_0"], data["sigma_q"]) * rng.normal(0, 2, 5)
    point = np.array([[data["mu_0"]]])
    exact = oracles.reverse_mean(
        x_t[:, None], t, dt, point, np.ones(1), data["sigma_0"], data["sigma_q"]
    )[:, 0]
    # The oracle's exponents reach 1e4, so its weights are good to 1e4 EPS.
    scale = np.abs(x_t).max() + abs(data["mu_0"])
    np.testing.assert_allclose(
        gaussian.reverse_mean(x_t, t, dt, **data), exact, rtol=0, atol=1e4 * oracles.EPS * scale
    )


@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 2), (2, 3, 4), (0,)])
def test_reverse_mean_treats_every_entry_alike(gaussian, shape):
    data = {"mu_0": 1.0, "sigma_0": 0.7, "sigma_q": 3.0}
    x_t = np.random.default_rng(0).normal(size=shape)
    together = gaussian.reverse_mean(x_t, 0.8, 0.3, **data)
    assert np.shape(together) == shape
    one_by_one = [gaussian.reverse_mean(float(x), 0.8, 0.3, **data) for x in x_t.flat]
    np.testing.assert_array_equal(np.ravel(together), one_by_one)


def test_slope_is_that_of_the_reverse_mean(gaussian):
    data = {"mu_0": 1.0, "sigma_0": 0.7, "sigma_q": 3.0}
    means = [gaussian.reverse_mean(x, 0.8, 0.3, **data) for x in (2.0, 3.0)]
    slope = gaussian.slope(0.8, 0.3, sigma_0=0.7, sigma_q=3.0)
    assert slope == pytest.approx(means[1] - means[0], rel=1e-12)


# ------------------------------------------ The samplers ------------------------------------------


def run_sampler(gaussian, name, x_1, num_steps, seed, **data):
    def mean(x_t, t, dt):
        return gaussian.reverse_mean(x_t, t, dt, **data)

    if name == "ddim":
        return list(gaussian.ddim(mean, x_1, num_steps))
    return list(gaussian.ddpm(mean, x_1, num_steps, data["sigma_q"], np.random.default_rng(seed)))


@pytest.mark.parametrize(("mu_0", "sigma_0", "sigma_q", "num_steps"), SETTINGS)
@pytest.mark.parametrize("name", ["ddpm", "ddim"])
def test_samples_follow_the_law_within_five_standard_errors(
    gaussian, name, mu_0, sigma_0, sigma_q, num_steps
):
    n, data = 10**6, {"mu_0": mu_0, "sigma_0": sigma_0, "sigma_q": sigma_q}
    x_1 = sigma_q * np.random.default_rng(1).standard_normal(n)
    x_0 = run_sampler(gaussian, name, x_1, num_steps, seed=2, **data)[-1]
    mean, std = getattr(gaussian, f"{name}_law")(num_steps, 0.0, sigma_q, **data)
    assert abs(x_0.mean() - mean) < 5 * std / n**0.5
    assert abs(x_0.var() - std**2) < 5 * std**2 * (2 / n) ** 0.5


@pytest.mark.parametrize("num_steps", [1, 2, 9])
@pytest.mark.parametrize("name", ["ddpm", "ddim"])
def test_samplers_yield_num_steps_new_arrays_and_leave_x_1_alone(gaussian, name, num_steps):
    x_1 = np.random.default_rng(0).normal(size=(5, 2))
    before = x_1.copy()
    steps = run_sampler(gaussian, name, x_1, num_steps, seed=0, mu_0=1.0, sigma_0=0.5, sigma_q=2.0)
    assert len(steps) == num_steps
    assert all(x_t.shape == x_1.shape for x_t in steps)
    assert not any(np.shares_memory(a, b) for i, a in enumerate(steps) for b in [x_1, *steps[:i]])
    np.testing.assert_array_equal(x_1, before)


@pytest.mark.parametrize("num_steps", [1, 2, 3, 10, 49])
def test_samplers_hand_the_reverse_mean_t_from_1_down_to_dt(gaussian, num_steps):
    for sampler, rest in [(gaussian.ddpm, (1.0, np.random.default_rng(0))), (gaussian.ddim, ())]:
        calls = []

        def mean(x_t, t, dt, calls=calls):
            calls.append((t, dt))
            return x_t

        list(sampler(mean, np.zeros(1), num_steps, *rest))
        assert calls == [(k / num_steps, 1 / num_steps) for k in range(num_steps, 0, -1)]


def test_samplers_refuse_zero_steps(gaussian):
    for name in ("ddpm", "ddim"):
        with pytest.raises(ZeroDivisionError):
            run_sampler(gaussian, name, np.zeros(1), 0, seed=0, mu_0=1.0, sigma_0=0.5, sigma_q=2.0)


def test_ddpm_gives_the_same_bits_for_the_same_seed_only(gaussian):
    x_1, data = np.linspace(-2, 2, 50), {"mu_0": 1.0, "sigma_0": 0.5, "sigma_q": 2.0}
    first, again, other = (
        run_sampler(gaussian, "ddpm", x_1, 5, seed, **data)[-1] for seed in (3, 3, 4)
    )
    np.testing.assert_array_equal(first, again)
    assert np.all(first != other)


# -------------------------------------- The laws and the floors -----------------------------------


@pytest.mark.parametrize("num_steps", [1, 2, 3, 17, 300])
@pytest.mark.parametrize("seed", range(6))
def test_laws_agree_with_closed_forms(gaussian, seed, num_steps):
    rng = np.random.default_rng(seed)
    data, mean_1, std_1 = random_data(rng), rng.normal(0, 3), rng.uniform(0, 10)
    tolerance = {
        "rtol": 10 * num_steps * oracles.EPS,
        "atol": 10 * num_steps * oracles.EPS * (3 + abs(mean_1)),
    }
    for noise in (1.0, 0.0, 0.3):
        exact = oracles.ddpm_law(num_steps, mean_1, std_1, noise=noise, **data)
        np.testing.assert_allclose(
            gaussian.ddpm_law(num_steps, mean_1, std_1, noise=noise, **data), exact, **tolerance
        )
    plain = oracles.ddpm_law(num_steps, mean_1, std_1, **data)
    np.testing.assert_allclose(
        gaussian.ddpm_law(num_steps, mean_1, std_1, **data), plain, **tolerance
    )
    exact = oracles.ddim_law(num_steps, mean_1, std_1, **data)
    np.testing.assert_allclose(
        gaussian.ddim_law(num_steps, mean_1, std_1, **data), exact, **tolerance
    )


def test_laws_take_arrays_for_every_argument_but_num_steps(gaussian):
    rng = np.random.default_rng(0)
    mean_1, std_1 = rng.normal(size=(4, 1)), rng.uniform(1, 2, 3)
    data = {
        "mu_0": rng.normal(size=3),
        "sigma_0": rng.uniform(0.5, 1, 3),
        "sigma_q": rng.uniform(1, 5, (4, 1)),
    }
    for law in (gaussian.ddpm_law, gaussian.ddim_law):
        together = law(6, mean_1, std_1, **data)
        assert np.shape(together) == (2, 4, 3)
        for i, j in np.ndindex(4, 3):
            one = {
                "mu_0": data["mu_0"][j],
                "sigma_0": data["sigma_0"][j],
                "sigma_q": data["sigma_q"][i, 0],
            }
            alone = law(6, mean_1[i, 0], std_1[j], **one)
            # NumPy's array and scalar powers may differ in the last bit, in each of 6 steps.
            np.testing.assert_allclose(
                [part[i, j] for part in together], alone, rtol=60 * oracles.EPS
            )


def test_without_noise_ddpm_shrinks_the_data_by_its_whole_slope_whatever_the_steps(gaussian):
    mu_0, sigma_0, sigma_q = 1.0, 0.7, 7.0
    std_1 = np.hypot(sigma_0, sigma_q)
    for num_steps in (1, 10, 1000):
        mean, std = gaussian.ddpm_law(
            num_steps, mu_0, std_1, mu_0=mu_0, sigma_0=sigma_0, sigma_q=sigma_q, noise=0.0
        )
        np.testing.assert_allclose(
            [mean, std], [mu_0, sigma_0**2 / std_1], rtol=10 * num_steps * oracles.EPS
        )


@pytest.mark.parametrize("seed", range(8))
def test_floors_are_the_limits_of_the_reverse_sde_and_of_the_probability_flow_ode(gaussian, seed):
    data = random_data(np.random.default_rng(seed))
    std_errors = oracles.floor_std_errors(data["sigma_0"], data["sigma_q"])
    for floor, noise, std_error in [
        (gaussian.ddpm_floor, 1, std_errors[0]),
        (gaussian.ddim_floor, 0, std_errors[1]),
    ]:
        coarse, fine = (
            oracles.limit_law(0.0, data["sigma_q"], noise=noise, num_steps=n, **data)
            for n in (1000, 2000)
        )
        exact = np.abs(np.array(fine) - [data["mu_0"], data["sigma_0"]])
        tolerance = np.abs(np.subtract(fine, coarse)).max() + 1e4 * oracles.EPS * (
            1 + abs(data["mu_0"])
        )
        assert tolerance < 1e-6
        np.testing.assert_allclose(floor(**data), exact, rtol=0, atol=tolerance)
        np.testing.assert_allclose(floor(**data)[1], std_error, rtol=20 * oracles.EPS)


@pytest.mark.parametrize("mu_0", [1.0, -2.0])
@pytest.mark.parametrize("name", ["ddpm", "ddim"])
def test_laws_from_the_base_tend_to_the_floors(gaussian, name, mu_0):
    data = {"mu_0": mu_0, "sigma_0": 0.7, "sigma_q": 3.0}
    law, floor = getattr(gaussian, f"{name}_law"), getattr(gaussian, f"{name}_floor")(**data)

    def limit(num_steps):
        """Of a law that is limit + b log(n) / n + c / n, from three n: the next terms fall at
        least as n^-1.5.
        """
        n = num_steps * np.array([1, 2, 4])
        basis = np.stack([np.ones(3), np.log(n) / n, 1 / n], axis=1)
        return np.linalg.solve(basis, [law(int(steps), 0.0, 3.0, **data) for steps in n])[0]

    once, twice = limit(1000), limit(2000)
    off = np.abs(np.abs(twice - [mu_0, 0.7]) - floor)
    assert np.all(off <= np.abs(twice - once) + 1e4 * oracles.EPS)
    assert np.all(np.abs(twice - once) < 0.01 * np.array(floor))  # so the line above can fail


@pytest.mark.parametrize(("name", "logarithm"), [("ddpm", 0.0), ("ddim", 3.0**2 / (8 * 0.7))])
def test_from_the_true_p_1_the_error_falls_with_order_one(gaussian, name, logarithm):
    data = {"mu_0": 1.0, "sigma_0": 0.7, "sigma_q": 3.0}
    steps, law = 500 * 2 ** np.arange(6), getattr(gaussian, f"{name}_law")
    error = [
        gaussian.wasserstein(*law(int(n), 1.0, np.hypot(0.7, 3.0), **data), 1.0, 0.7) for n in steps
    ]
    # error = (b log(n) + c) / n + ...  DDIM has a logarithm, b = sigma_q^2 / (8 sigma_0), because
    # its steps in
    # sigma = sigma_q sqrt(t) are long where sigma is small.  What follows falls at least as n^-1.5,
    # so n error
    # grows by b log 2 when n doubles, but for what falls by 2^-.5 or faster.
    off = np.abs(np.diff(steps * error) - logarithm * np.log(2))
    assert np.all(off[1:] < 2**-0.5 * off[:-1])
    assert off[-1] < 0.01


def test_wasserstein_is_the_distance_of_the_quantiles(gaussian):
    for mean_a, std_a, mean_b, std_b in [
        (0, 1, 0, 1),
        (1, 2, -3, 0.5),
        (0, 1, 0, 3),
        (2, 1, 5, 1),
        (-1, 0.01, 1, 40),
    ]:
        exact = oracles.wasserstein(mean_a, std_a, mean_b, std_b)
        # Beyond 8 standard deviations lies 1e-13 of the oracle's integral.
        assert gaussian.wasserstein(mean_a, std_a, mean_b, std_b) == pytest.approx(
            exact, rel=1e-12, abs=1e-12
        )
    assert gaussian.wasserstein(np.zeros(3), np.ones(3), 3.0, 5.0).tolist() == [5.0] * 3


@pytest.mark.parametrize("num_steps", [10, 100, 1000])
@pytest.mark.parametrize("name", ["ddpm", "ddim"])
def test_error_against_sigma_q_falls_to_one_minimum_and_rises(gaussian, name, num_steps):
    sigma_qs = 0.7 * np.logspace(-1, 3, 81)
    law = getattr(gaussian, f"{name}_law")(
        num_steps, 0.0, sigma_qs, mu_0=1.0, sigma_0=0.7, sigma_q=sigma_qs
    )
    best = np.argmin(errors := gaussian.wasserstein(*law, 1.0, 0.7))
    assert 0 < best < len(errors) - 1
    assert np.all(np.diff(errors[: best + 1]) < 0)
    # Beyond the minimum the error rises to that of an output which has lost every trace of p_0, and
    # stays.
    rise = errors[best : best + 21]
    assert np.all(np.diff(rise) > 0)


def test_default_sigma_q_lies_between_the_minima_of_the_two_samplers(gaussian, tmp_path):
    args = gaussian.parse_arguments(["--figures-dir", str(tmp_path)])
    sigma_qs, errors = gaussian.measure_error_vs_sigma_q(mu_0=args.mu_0, sigma_0=args.sigma_0)
    best = [sigma_qs[np.argmin(errors[name, args.num_steps])] for name in ("DDPM", "DDIM")]
    assert args.num_steps == 1000
    assert args.num_samples >= 100_000
    assert min(best) <= args.sigma_q <= max(best)


def test_density_is_that_of_the_normal_distribution(gaussian):
    x = np.linspace(-40, 45, 2001)  # the trapezoidal rule is exact to rounding here
    density = gaussian.gaussian_density(x, 2.5, 3.0)
    moments = [np.sum(density * (x - 2.5) ** p) * (x[1] - x[0]) for p in (0, 1, 2, 4)]
    np.testing.assert_allclose(moments, [1, 0, 9, 3 * 81], atol=1e-9)


# ------------------------------------------ Measuring -------------------------------------------
DATA = {"mu_0": -2.0, "sigma_0": 0.5, "sigma_q": 3.0}


def test_p_t_has_the_moments_of_noised_data(gaussian):
    rng = np.random.default_rng(0)
    n, t = 10**6, 0.3
    x_t = -2.0 + 0.5 * rng.standard_normal(n) + 3.0 * t**0.5 * rng.standard_normal(n)
    mean, std = gaussian.p_t(t, **DATA)
    assert abs(x_t.mean() - mean) < 5 * std / n**0.5
    assert abs(x_t.std() - std) < 5 * std / (2 * n) ** 0.5
    assert gaussian.p_t(0, **DATA) == (-2.0, 0.5)


def test_sample_runs_both_samplers_from_the_same_starts(gaussian):
    x_1 = np.random.default_rng(1).normal(size=50)
    samples = gaussian.sample(x_1, 6, np.random.default_rng(2), **DATA)
    for name, x_0 in samples.items():
        expected = run_sampler(gaussian, name.lower(), x_1, 6, seed=2, **DATA)[-1]
        np.testing.assert_array_equal(x_0, expected)
    assert list(samples) == ["DDPM", "DDIM"]


def test_measured_samples_stand_beside_their_law(gaussian):
    rng = np.random.default_rng(3)
    samples = {"DDPM": rng.normal(5, 7, 400), "DDIM": rng.normal(-1, 2, 900)}
    rows = gaussian.measure_samples(samples, 20, **DATA)
    laws = {"DDPM": (oracles.ddpm_law, 1), "DDIM": (oracles.ddim_law, 0)}
    for name, (law, noise) in laws.items():
        row, x_0 = rows[name], samples[name]
        mean, std = law(20, 0.0, 3.0, **DATA)
        limit = oracles.limit_law(0.0, 3.0, noise=noise, **DATA)
        expected = {
            "mean": np.sum(x_0) / len(x_0),
            "std": np.sum((x_0 - np.sum(x_0) / len(x_0)) ** 2 / len(x_0)) ** 0.5,
            "mean_se": std / len(x_0) ** 0.5,
            "std_se": std / (2 * len(x_0)) ** 0.5,
            "exact_mean": mean,
            "exact_std": std,
            "distance": oracles.wasserstein(mean, std, -2.0, 0.5),
            "floor": oracles.wasserstein(*limit, -2.0, 0.5),
        }
        assert row == pytest.approx(expected, rel=1e-9)


def test_errors_against_steps_are_distances_of_the_laws_to_p_0(gaussian):
    errors = gaussian.measure_error_vs_steps(**DATA)
    p_1 = (-2.0, np.hypot(0.5, 3.0))
    laws = {
        "DDPM": oracles.ddpm_law,
        "DDIM": oracles.ddim_law,
        "no noise": lambda *args, **data: oracles.ddpm_law(*args, noise=0.0, **data),
    }
    assert set(errors) == set(laws)
    for name, law in laws.items():
        for start, x_1 in [("base", (0.0, 3.0)), ("p_1", p_1)]:
            exact = [np.hypot(*np.subtract(law(int(n), *x_1, **DATA), (-2.0, 0.5)))
                     for n in gaussian.STEP_COUNTS]  # fmt: skip
            np.testing.assert_allclose(errors[name][start], exact, rtol=1e-8, atol=1e-12)
    assert {1, 1000, 10_000} <= set(gaussian.STEP_COUNTS)
    ends = [
        oracles.wasserstein(*oracles.ddim_law(n, *p_1, **DATA), -2.0, 0.5) for n in (1000, 10_000)
    ]
    order = gaussian.observed_order(errors["DDIM"]["p_1"])
    assert order == pytest.approx(np.log10(ends[0] / ends[1]), rel=1e-6)


def test_std_without_noise_is_lost_to_the_whole_slope(gaussian):
    lost = gaussian.std_without_noise(30, **DATA)
    assert lost == pytest.approx(0.5**2 / np.hypot(0.5, 3.0), rel=1e-12)


def test_errors_against_sigma_q_are_distances_from_the_base(gaussian):
    sigma_qs, errors = gaussian.measure_error_vs_sigma_q(mu_0=-2.0, sigma_0=0.5)
    assert (len(sigma_qs), sigma_qs[0], sigma_qs[-1]) == (161, 0.05, pytest.approx(500))
    assert set(errors) == {(name, n) for name in ("DDPM", "DDIM") for n in (10, 100, 1000)}
    for (name, n), error in errors.items():
        law = {"DDPM": oracles.ddpm_law, "DDIM": oracles.ddim_law}[name]
        for i in (0, 60, 160):
            mean, std = law(n, 0.0, sigma_qs[i], -2.0, 0.5, sigma_qs[i])
            assert error[i] == pytest.approx(np.hypot(mean + 2.0, std - 0.5), rel=1e-9)


# ------------------------------------ Printing and the figures ----------------------------------


class Args:
    mu_0, sigma_0, sigma_q, num_steps, num_samples = 1.25, 0.75, 6.5, 123, 4567


NAMES = ["mean", "mean_se", "exact_mean", "std", "std_se", "exact_std", "distance", "floor"]
ROWS = {
    "DDPM": dict(zip(NAMES, [0.11, 0.012, 0.13, 0.14, 0.015, 0.16, 0.17, 0.18])),
    "DDIM": dict(zip(NAMES, [0.21, 0.022, 0.23, 0.24, 0.025, 0.26, 0.27, 0.28])),
}


def test_report_prints_what_was_measured(gaussian, capsys):
    orders, best = {"DDPM": 1.5, "DDIM": 0.25}, {"DDPM": 4.5, "DDIM": 9.5}
    gaussian.report(ROWS, orders, best, 0.0815, Args)
    lines = capsys.readouterr().out.splitlines()
    assert all(
        text in lines[0] for text in ("N(1.25, 0.75^2)", "= 6.5:", "4567 samples", "123 steps")
    )
    for line, row in zip(lines[3:5], ROWS.values()):
        assert [float(x) for x in re.findall(r"\d\.\d+", line)] == list(row.values())
    assert "dt^1.50" in lines[5]
    assert lines[5].endswith(" 4.5")
    assert "dt^0.25" in lines[6]
    assert lines[6].endswith(" 9.5")
    assert "0.0815" in lines[7]
    assert "0.75" in lines[7]


def test_figures_say_what_was_measured(gaussian):
    rng = np.random.default_rng(0)
    samples = {name: rng.normal(size=100) for name in ROWS}
    figure = gaussian.draw_samples(rng.normal(size=100), samples, ROWS, 20, **DATA)
    words = texts(figure)
    assert "DDPM, 20 steps: law is 0.17 from" in words
    assert "DDIM, 20 steps: law is 0.27 from" in words
    x, density = figure.axes[2].lines[0].get_data()  # DDIM's law
    assert x[np.argmax(density)] == pytest.approx(0.23, abs=0.05)

    errors = gaussian.measure_error_vs_steps(**DATA)
    axes = gaussian.draw_error_vs_steps(errors, ROWS).axes[0]
    drawn = {line.get_label(): line.get_ydata() for line in axes.lines}
    np.testing.assert_array_equal(drawn["DDIM from $p_1$"], errors["DDIM"]["p_1"])
    assert drawn["floor of DDPM: 0.18"] == [0.18, 0.18]

    sigma_qs, errors = gaussian.measure_error_vs_sigma_q(mu_0=-2.0, sigma_0=0.5)
    axes = gaussian.draw_error_vs_sigma_q(sigma_qs, errors, 6.5).axes[0]
    marks = [line for line in axes.lines if line.get_marker() in "os"]
    best = [sigma_qs[np.argmin(error)] for error in errors.values()]
    assert [float(line.get_xdata()[0]) for line in marks] == best
    assert "6.5" in texts(axes.figure)
