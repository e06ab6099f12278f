"""Experiment 0: Gaussian data.  The samplers, their exact laws, and the floors of the laws."""

import re

import numpy as np
import oracles
import pytest

pytestmark = pytest.mark.filterwarnings("error", "ignore::DeprecationWarning")  # deprecations: matplotlib's own

SETTINGS = [  # mu_0, sigma_0, sigma_q, num_steps
    (1.0, 0.7, 7.0, 1),
    (1.0, 0.7, 7.0, 40),
    (-3.0, 0.5, 2.0, 2),
    (0.0, 2.0, 1.0, 5),
    (3.0, 0.1, 0.6, 11),
]


def random_data(rng):
    return {"mu_0": rng.normal(0, 3), "sigma_0": 10 ** rng.uniform(-1, 0.5), "sigma_q": 10 ** rng.uniform(-0.5, 1.2)}


# ---------------------------------------- The reverse mean ----------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_reverse_mean_is_the_mean_of_the_joint_law(gaussian, seed):
    rng = np.random.default_rng(seed)
    data = random_data(rng)
    t = [rng.uniform(0.05, 1), 1.0][seed % 2]
    dt = [rng.uniform(0.05, 0.95) * t, t][seed // 2 % 2]
    x_t = data["mu_0"] + np.hypot(data["sigma_0"], data["sigma_q"]) * rng.normal(0, 2, 5)
    point = np.array([[data["mu_0"]]])
    exact = oracles.reverse_mean(x_t[:, None], t, dt, point, np.ones(1), data["sigma_0"], data["sigma_q"])[:, 0]
    # The oracle's exponents reach 1e4, so its weights are good to 1e4 EPS.
    scale = np.abs(x_t).max() + abs(data["mu_0"])
    np.testing.assert_allclose(gaussian.reverse_mean(x_t, t, dt, **data), exact, rtol=0, atol=1e4 * oracles.EPS * scale)


@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 2), (2, 3, 4), (0,)])
def test_reverse_mean_treats_every_entry_alike(gaussian, shape):
    data = {"mu_0": 1.0, "sigma_0": 0.7, "sigma_q": 3.0}
    x_t = np.random.default_rng(0).normal(size=shape)
    together = gaussian.reverse_mean(x_t, 0.8, 0.3, **data)
    assert np.shape(together) == shape
    one_by_one = [gaussian.reverse_mean(float(x), 0.8, 0.3, **data) for x in x_t.flat]
    np.testing.assert_array_equal(np.ravel(together), one_by_one)


# ------------------------------------------ The samplers ------------------------------------------


def run_sampler(gaussian, name, x_1, num_steps, seed, **data):
    def mean(x_t, t, dt):
        return gaussian.reverse_mean(x_t, t, dt, **data)

    if name == "ddim":
        return list(gaussian.ddim(mean, x_1, num_steps))
    return list(gaussian.ddpm(mean, x_1, num_steps, data["sigma_q"], np.random.default_rng(seed)))


@pytest.mark.parametrize(("mu_0", "sigma_0", "sigma_q", "num_steps"), SETTINGS)
@pytest.mark.parametrize("name", ["ddpm", "ddim"])
def test_samples_follow_the_law_within_five_standard_errors(gaussian, name, mu_0, sigma_0, sigma_q, num_steps):
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
    first, again, other = (run_sampler(gaussian, "ddpm", x_1, 5, seed, **data)[-1] for seed in (3, 3, 4))
    np.testing.assert_array_equal(first, again)
    assert np.all(first != other)


# -------------------------------------- The laws and the floors -----------------------------------


@pytest.mark.parametrize("num_steps", [1, 2, 3, 17, 300])
@pytest.mark.parametrize("seed", range(6))
def test_laws_agree_with_closed_forms(gaussian, seed, num_steps):
    rng = np.random.default_rng(seed)
    data, mean_1, std_1 = random_data(rng), rng.normal(0, 3), rng.uniform(0, 10)
    tolerance = {"rtol": 10 * num_steps * oracles.EPS, "atol": 10 * num_steps * oracles.EPS * (3 + abs(mean_1))}
    for noise in (1.0, 0.0, 0.3):
        exact = oracles.ddpm_law(num_steps, mean_1, std_1, noise=noise, **data)
        np.testing.assert_allclose(gaussian.ddpm_law(num_steps, mean_1, std_1, noise=noise, **data), exact, **tolerance)
    plain = oracles.ddpm_law(num_steps, mean_1, std_1, **data)
    np.testing.assert_allclose(gaussian.ddpm_law(num_steps, mean_1, std_1, **data), plain, **tolerance)
    exact = oracles.ddim_law(num_steps, mean_1, std_1, **data)
    np.testing.assert_allclose(gaussian.ddim_law(num_steps, mean_1, std_1, **data), exact, **tolerance)


def test_laws_take_arrays_for_every_argument_but_num_steps(gaussian):
    rng = np.random.default_rng(0)
    mean_1, std_1 = rng.normal(size=(4, 1)), rng.uniform(1, 2, 3)
    data = {"mu_0": rng.normal(size=3), "sigma_0": rng.uniform(0.5, 1, 3), "sigma_q": rng.uniform(1, 5, (4, 1))}
    for law in (gaussian.ddpm_law, gaussian.ddim_law):
        together = law(6, mean_1, std_1, **data)
        assert np.shape(together) == (2, 4, 3)
        for i, j in np.ndindex(4, 3):
            one = {"mu_0": data["mu_0"][j], "sigma_0": data["sigma_0"][j], "sigma_q": data["sigma_q"][i, 0]}
            alone = law(6, mean_1[i, 0], std_1[j], **one)
            # NumPy's array and scalar powers may differ in the last bit, in each of 6 steps.
            np.testing.assert_allclose([part[i, j] for part in together], alone, rtol=60 * oracles.EPS)


def test_without_noise_ddpm_shrinks_the_data_by_its_whole_slope_whatever_the_steps(gaussian):
    mu_0, sigma_0, sigma_q = 1.0, 0.7, 7.0
    std_1 = np.hypot(sigma_0, sigma_q)
    for num_steps in (1, 10, 1000):
        mean, std = gaussian.ddpm_law(num_steps, mu_0, std_1, mu_0=mu_0, sigma_0=sigma_0, sigma_q=sigma_q, noise=0.0)
        np.testing.assert_allclose([mean, std], [mu_0, sigma_0**2 / std_1], rtol=10 * num_steps * oracles.EPS)


@pytest.mark.parametrize("seed", range(8))
def test_floors_are_the_limits_of_the_reverse_sde_and_of_the_probability_flow_ode(gaussian, seed):
    data = random_data(np.random.default_rng(seed))
    std_errors = oracles.floor_std_errors(data["sigma_0"], data["sigma_q"])
    for floor, noise, std_error in [(gaussian.ddpm_floor, 1, std_errors[0]), (gaussian.ddim_floor, 0, std_errors[1])]:
        coarse, fine = (oracles.limit_law(0.0, data["sigma_q"], noise=noise, num_steps=n, **data) for n in (1000, 2000))
        exact = np.abs(np.array(fine) - [data["mu_0"], data["sigma_0"]])
        tolerance = np.abs(np.subtract(fine, coarse)).max() + 1e4 * oracles.EPS * (1 + abs(data["mu_0"]))
        assert tolerance < 1e-6
        np.testing.assert_allclose(floor(**data), exact, rtol=0, atol=tolerance)
        np.testing.assert_allclose(floor(**data)[1], std_error, rtol=20 * oracles.EPS)


@pytest.mark.parametrize("mu_0", [1.0, -2.0])
@pytest.mark.parametrize("name", ["ddpm", "ddim"])
def test_laws_from_the_base_tend_to_the_floors(gaussian, name, mu_0):
    data = {"mu_0": mu_0, "sigma_0": 0.7, "sigma_q": 3.0}
    law, floor = getattr(gaussian, f"{name}_law"), getattr(gaussian, f"{name}_floor")(**data)

    def limit(num_steps):
        """Of a law that is limit + b log(n) / n + c / n, from three n: the next terms fall at least as n^-1.5."""
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
    error = [gaussian.wasserstein(*law(int(n), 1.0, np.hypot(0.7, 3.0), **data), 1.0, 0.7) for n in steps]
    # error = (b log(n) + c) / n + ...  DDIM has a logarithm, b = sigma_q^2 / (8 sigma_0), because its steps in
    # sigma = sigma_q sqrt(t) are long where sigma is small.  What follows falls at least as n^-1.5, so n error
    # grows by b log 2 when n doubles, but for what falls by 2^-.5 or faster.
    off = np.abs(np.diff(steps * error) - logarithm * np.log(2))
    assert np.all(off[1:] < 2**-0.5 * off[:-1])
    assert off[-1] < 0.01


def test_wasserstein_is_the_distance_of_the_quantiles(gaussian):
    for mean_a, std_a, mean_b, std_b in [(0, 1, 0, 1), (1, 2, -3, 0.5), (0, 1, 0, 3), (2, 1, 5, 1), (-1, 0.01, 1, 40)]:
        exact = oracles.wasserstein(mean_a, std_a, mean_b, std_b)
        # Beyond 8 standard deviations lies 1e-13 of the oracle's integral.
        assert gaussian.wasserstein(mean_a, std_a, mean_b, std_b) == pytest.approx(exact, rel=1e-12, abs=1e-12)
    assert gaussian.wasserstein(np.zeros(3), np.ones(3), 3.0, 5.0).tolist() == [5.0] * 3


@pytest.mark.parametrize("num_steps", [10, 100, 1000])
@pytest.mark.parametrize("name", ["ddpm", "ddim"])
def test_error_against_sigma_q_falls_to_one_minimum_and_rises(gaussian, name, num_steps):
    sigma_qs = 0.7 * np.logspace(-1, 3, 81)
    law = getattr(gaussian, f"{name}_law")(num_steps, 0.0, sigma_qs, mu_0=1.0, sigma_0=0.7, sigma_q=sigma_qs)
    best = np.argmin(errors := gaussian.wasserstein(*law, 1.0, 0.7))
    assert 0 < best < len(errors) - 1
    assert np.all(np.diff(errors[: best + 1]) < 0)
    # Beyond the minimum the error rises to that of an output which has lost every trace of p_0, and stays.
    rise = errors[best : best + 21]
    assert np.all(np.diff(rise) > 0)


def test_default_sigma_q_lies_between_the_minima_of_the_two_samplers(gaussian, tmp_path):
    args = gaussian.parse_arguments(["--figures-dir", str(tmp_path)])
    sigma_qs, best = args.sigma_0 * np.logspace(0, 2, 81), []
    for law in (gaussian.ddpm_law, gaussian.ddim_law):
        mean, std = law(args.num_steps, 0.0, sigma_qs, mu_0=args.mu_0, sigma_0=args.sigma_0, sigma_q=sigma_qs)
        best.append(sigma_qs[np.argmin(np.hypot(mean - args.mu_0, std - args.sigma_0))])
    assert args.num_steps == 1000
    assert args.num_samples >= 100_000
    assert min(best) <= args.sigma_q <= max(best)


def test_density_is_that_of_the_normal_distribution(gaussian):
    x = np.linspace(-40, 45, 2001)  # the trapezoidal rule is exact to rounding here
    density = gaussian.gaussian_density(x, 2.5, 3.0)
    moments = [np.sum(density * (x - 2.5) ** p) * (x[1] - x[0]) for p in (0, 1, 2, 4)]
    np.testing.assert_allclose(moments, [1, 0, 9, 3 * 81], atol=1e-9)


# ------------------------------------------ The script itself -------------------------------------

SMALL = ["--num-steps", "20", "--num-samples", "20000", "--mu-0", "-2", "--sigma-0", "0.5", "--sigma-q", "3"]


def numbers(line):
    return [float(number) for number in re.findall(r"[-+]?\b\d+\.?\d*(?:e[-+]?\d+)?", line)]


@pytest.fixture(scope="module")
def written(gaussian, tmp_path_factory):
    """The folder of a small run."""
    folder = tmp_path_factory.mktemp("gaussian")
    gaussian.main([*SMALL, "--figures-dir", str(folder)])
    return folder


def test_main_writes_exactly_its_figures(written, assert_jpegs):
    names = ["samples-ddm-ddim-toy-example", "error-vs-steps", "error-vs-sigma-q"]
    assert_jpegs(written, [f"experiment-0-{name}.jpg" for name in names])


def test_main_prints_samples_beside_their_law(gaussian, tmp_path, capsys, monkeypatch):
    for plot in ("plot_samples", "plot_error_vs_steps", "plot_error_vs_sigma_q"):
        monkeypatch.setattr(gaussian, plot, lambda *_, **__: gaussian.plt.figure(figsize=(1, 1)))
    gaussian.main([*SMALL, "--figures-dir", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    data = {"mu_0": -2.0, "sigma_0": 0.5, "sigma_q": 3.0}
    for name, law, noise in [("DDPM", oracles.ddpm_law, 1), ("DDIM", oracles.ddim_law, 0)]:
        row = next(line for line in lines if line.startswith(name) and "+-" in line)
        mean, mean_se, exact_mean, std, std_se, exact_std, distance, floor = numbers(row)
        law_mean, law_std = law(20, 0.0, 3.0, **data)
        limit_mean, limit_std = oracles.limit_law(0.0, 3.0, noise=noise, **data)
        assert [exact_mean, exact_std] == pytest.approx([law_mean, law_std], rel=1e-4)  # five digits are printed
        assert [mean_se, std_se] == pytest.approx([law_std / 20000**0.5, law_std / 40000**0.5], rel=0.05)  # two
        assert distance == pytest.approx(np.hypot(law_mean + 2, law_std - 0.5), rel=1e-3)  # four
        assert floor == pytest.approx(np.hypot(limit_mean + 2, limit_std - 0.5), rel=1e-3)
        assert 0 < abs(mean - exact_mean) < 5 * mean_se
        assert 0 < abs(std - exact_std) < 5 * std_se
        p_1 = (-2.0, np.hypot(0.5, 3.0))
        ends = [oracles.wasserstein(*law(n, *p_1, **data), -2.0, 0.5) for n in (1000, 10_000)]
        row = next(line for line in lines if line.startswith(f"{name}  from p_1"))
        assert float(re.search(r"dt\^([\d.]+)", row)[1]) == pytest.approx(np.log10(ends[0] / ends[1]), abs=0.01)
    lost = next(line for line in lines if "noise left out" in line)
    assert numbers(lost)[-2:] == pytest.approx([0.25 / np.hypot(0.5, 3.0), 0.5], rel=1e-3)
    assert sum(line.startswith("wrote ") for line in lines) == 3


def test_main_prints_the_same_table_for_the_same_seed_only(gaussian, tmp_path, capsys, monkeypatch):
    for plot in ("plot_samples", "plot_error_vs_steps", "plot_error_vs_sigma_q"):
        monkeypatch.setattr(gaussian, plot, lambda *_, **__: gaussian.plt.figure(figsize=(1, 1)))
    tables = []
    for seed in ("5", "5", "6"):
        gaussian.main([*SMALL, "--seed", seed, "--figures-dir", str(tmp_path)])
        tables.append(capsys.readouterr().out)
    assert tables[0] == tables[1] != tables[2]
