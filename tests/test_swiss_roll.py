"""Experiment 3: the exact denoiser against brute force, the samplers step by step, and how well
the default learns.
"""

import math
import re
from collections import deque
from functools import partial

import numpy as np
import oracles
import pytest
import torch
from conftest import texts


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def rng():
    return torch.Generator().manual_seed(11)


def assert_zero_mean(values):
    """values: (n, ...), independent rows: their mean is 0 within 5 standard errors."""
    assert torch.all(values.mean(dim=0).abs() <= 5 * values.std(dim=0) / len(values) ** 0.5)


# ------------------------------------- The data and the denoiser ----------------------------------


def test_swiss_roll_is_uniform_in_its_angle(swiss_roll, rng):
    x = swiss_roll.swiss_roll(10**6, rng).double()
    assert x.shape == (10**6, 2)
    theta = 4 * math.pi * x.norm(dim=1)
    assert math.pi / 2 - 1e-5 <= theta.min() <= theta.max() <= 4 * math.pi + 1e-5
    direction = torch.stack([theta.cos(), theta.sin()], dim=1)
    assert (x - direction * x.norm(dim=1, keepdim=True)).abs().max() < 1e-5
    u = (theta - math.pi / 2) / (3.5 * math.pi)
    for power in (1, 2, 3):
        assert_zero_mean(u**power - 1 / (power + 1))


@pytest.mark.parametrize("sigma_q", [0.1, 1.0, 4.0, 100.0])
@pytest.mark.parametrize("t", [5e-4, 0.01, 0.1, 0.5, 1.0])
def test_exact_denoiser_agrees_with_a_fine_sum(swiss_roll, rng, t, sigma_q):
    x_t = swiss_roll.add_noise(swiss_roll.swiss_roll(4, rng), t, sigma_q, rng).double()
    exact = swiss_roll.exact_denoiser(x_t, t, sigma_q=sigma_q)
    assert exact.dtype == torch.double
    assert np.abs(exact.numpy() - oracles.roll_denoiser(x_t.numpy(), sigma_q * t**0.5)).max() < 1e-6
    # In double precision whatever comes in: a single-precision x_t is taken as it is.
    single = swiss_roll.exact_denoiser(x_t.float(), t, sigma_q=sigma_q)
    assert torch.equal(single, swiss_roll.exact_denoiser(x_t.float().double(), t, sigma_q=sigma_q))


def test_quadrature_weights_make_the_mean_of_the_roll(swiss_roll):
    points, weights = oracles.roll_nodes()
    for sigma_t in (0.01, 0.3, 5.0):
        c, log_weights = swiss_roll.quadrature(sigma_t)
        mean = log_weights.softmax(dim=0) @ c
        assert np.abs(mean.numpy() - weights @ points).max() < 1e-6


@pytest.mark.parametrize("t", [0.01, 0.1, 1.0])
def test_residual_of_the_exact_denoiser_is_orthogonal_to_everything(swiss_roll, rng, t):
    x_0 = swiss_roll.swiss_roll(10**6, rng).double()
    x_t = swiss_roll.add_noise(x_0, t, 1.0, rng)
    residual = x_0 - swiss_roll.exact_denoiser(x_t, t, sigma_q=1.0)
    for g in (torch.ones_like(x_t), x_t, x_t.flip(1), (7 * x_t).sin(), (3 * x_t).cos()):
        assert_zero_mean(residual * g)


def test_exact_denoiser_takes_t_per_sample(swiss_roll, rng):
    t = torch.tensor([0.01, 0.1, 1.0], dtype=torch.double)
    x_t = torch.randn(3, 2, generator=rng, dtype=torch.double)
    each = torch.cat(
        [swiss_roll.exact_denoiser(x[None], float(s), sigma_q=0.7) for x, s in zip(x_t, t)]
    )
    assert (swiss_roll.exact_denoiser(x_t, t, sigma_q=0.7) - each).abs().max() < 1e-6


@pytest.mark.parametrize(("t", "dt"), [(1.0, 0.3), (0.6, 0.2), (0.5, 0.5), (1.0, 1.0)])
def test_reverse_mean_agrees_with_the_joint_law(swiss_roll, rng, t, dt):
    x_t = torch.randn(4, 2, generator=rng, dtype=torch.double)
    mean = swiss_roll.reverse_mean(
        x_t, t, dt, denoiser=partial(swiss_roll.exact_denoiser, sigma_q=1.0)
    )
    points, weights = oracles.roll_nodes()
    exact = oracles.reverse_mean(x_t.numpy(), t, dt, points, weights, 0.0, 1.0)
    assert np.abs(mean.numpy() - exact).max() < 1e-6


# ------------------------------------------- The samplers -----------------------------------------


def test_ddim_is_an_euler_step_in_sigma(swiss_roll, rng):
    """dx / dsigma = (x - E[x_0 | x]) / sigma, from sigma_t to sigma_{t-dt}."""
    exact = partial(swiss_roll.exact_denoiser, sigma_q=1.5)
    x = x_1 = torch.randn(50, 2, generator=rng, dtype=torch.double)
    start = x_1.clone()
    steps = list(swiss_roll.ddim(partial(swiss_roll.reverse_mean, denoiser=exact), x_1, 6))
    assert len(steps) == 6
    assert torch.equal(x_1, start)
    for k, step in zip(range(6, 0, -1), steps):
        sigma, lower = 1.5 * (k / 6) ** 0.5, 1.5 * ((k - 1) / 6) ** 0.5
        x = x + (lower - sigma) * (x - exact(x, k / 6)) / sigma
        assert (step - x).abs().max() < 1e-12


def test_ddpm_steps_have_the_right_mean_and_variance(swiss_roll, rng):
    n, x_1, times = 10**6, torch.ones(10**6, 2), []

    def mean(x, t, dt):
        times.append((t, dt))
        return 0.5 * x + t

    start = x_1.clone()
    steps = list(swiss_roll.ddpm(mean, x_1, 4, 3.0, rng))
    assert torch.equal(x_1, start)
    assert times == [(1.0, 0.25), (0.75, 0.25), (0.5, 0.25), (0.25, 0.25)]
    previous = x_1
    for (t, _), x in zip(times, steps):
        noise = (x - 0.5 * previous - t).double()
        assert_zero_mean(noise)
        assert_zero_mean(noise**2 - 9 / 4)
        assert_zero_mean(noise * previous)
        previous = x
    assert len(steps) == 4
    assert len(x) == n


# --------------------------------------- Errors and distances -------------------------------------


def test_projections_are_sorted_along_every_direction(swiss_roll, rng):
    a = torch.randn(300, 2, generator=rng).double()
    seen = swiss_roll.projections(a)
    np.testing.assert_allclose(seen, oracles.sliced_quantiles(a.numpy()), atol=1e-12)
    # Seen from all sides, a shift by (3, -4) is 5 / sqrt(2), root mean square.
    shift = swiss_roll.projections(a + torch.tensor([3.0, -4.0])) - seen
    assert float(shift.square().mean().sqrt()) == pytest.approx(5 / 2**0.5, rel=1e-9)


def test_measured_distances_are_to_fresh_data_and_the_floor_among_it(swiss_roll, rng):
    n = 400
    samples = {"near": swiss_roll.swiss_roll(n, rng), "far": swiss_roll.swiss_roll(n, rng) + 1.0}
    state = rng.get_state()
    distances, (floor, spread) = swiss_roll.measure_distances(samples, rng)
    rng.set_state(state)
    data = [swiss_roll.swiss_roll(n, rng).numpy() for _ in range(11)]
    seen = [oracles.sliced_quantiles(x) for x in data]
    for name, x_0 in samples.items():
        own = oracles.sliced_quantiles(x_0.numpy().astype(float))
        exact = np.mean([np.mean((own - other) ** 2) for other in seen]) ** 0.5
        expected = exact, exact / floor  # draws are in single precision
        assert distances[name] == pytest.approx(expected, rel=1e-5)
    pairs = [np.mean((a - b) ** 2) for a, b in zip(seen, seen[1:])]
    assert floor == pytest.approx(np.mean(pairs) ** 0.5, rel=1e-5)
    assert spread == pytest.approx(np.std(np.sqrt(pairs), ddof=1), rel=1e-4)
    assert distances["far"][0] == pytest.approx(1, abs=0.1)  # (1, 1) seen from all sides


def test_shares_along_the_curve(swiss_roll, rng):
    n = 50_000
    shares = swiss_roll.shares_along_curve(swiss_roll.swiss_roll(n, rng))
    assert shares.shape == (10,)
    assert float(shares.sum()) == pytest.approx(1)
    assert float((shares - 0.1).abs().max()) < 5 * (0.09 / n) ** 0.5
    theta = math.pi / 2 + 3.5 * math.pi * torch.tensor([0.01, 0.02, 0.31, 0.99], dtype=torch.double)
    outside = swiss_roll.curve(theta) * 1.01
    expected = torch.tensor([0.5, 0, 0, 0.25, 0, 0, 0, 0, 0, 0.25], dtype=torch.double)
    assert torch.equal(swiss_roll.shares_along_curve(outside), expected)
    assert swiss_roll.share_error(900) == pytest.approx(0.01)


def test_blur_is_the_distance_to_the_curve(swiss_roll):
    theta = torch.linspace(5, 12, 50, dtype=torch.double)
    line = swiss_roll.curve(theta)
    tangent = swiss_roll.curve(theta + 1e-5) - swiss_roll.curve(theta - 1e-5)
    normal = torch.stack([-tangent[:, 1], tangent[:, 0]], dim=1) / tangent.norm(dim=1, keepdim=True)
    offset = torch.linspace(-0.05, 0.05, 50, dtype=torch.double)[:, None]
    assert swiss_roll.blur(line) < 0.002  # half the spacing of the 4000 points
    exact = float(offset.square().mean().sqrt())
    assert swiss_roll.blur(line + offset * normal) == pytest.approx(exact, rel=1e-3)


def test_sample_runs_both_samplers_from_both_starts(swiss_roll):
    exact = partial(swiss_roll.exact_denoiser, sigma_q=2.0)
    data = swiss_roll.swiss_roll(30, torch.Generator().manual_seed(1))
    starts = swiss_roll.draw_starts(data, 2.0, torch.Generator().manual_seed(2))
    assert torch.allclose(starts["p_1"] - starts["base"], data, atol=1e-6)
    assert float(starts["base"].std()) == pytest.approx(2.0, abs=5 * 2.0 / (2 * 60) ** 0.5)
    samples = swiss_roll.sample(exact, starts, 5, 2.0, torch.Generator().manual_seed(3), "exact")
    mean, noise = partial(swiss_roll.reverse_mean, denoiser=exact), torch.Generator().manual_seed(3)
    for start, x_1 in starts.items():
        *_, x_0 = swiss_roll.ddpm(mean, x_1, 5, 2.0, noise)
        assert torch.equal(samples["DDPM", start, "exact"], x_0)
        *_, x_0 = swiss_roll.ddim(mean, x_1, 5)
        assert torch.equal(samples["DDIM", start, "exact"], x_0)
    assert len(samples) == 4


@pytest.mark.parametrize("t", [0.01, 1.0])
def test_excess_error_and_bayes_error_sum_to_the_loss(swiss_roll, rng, t):
    excess, bayes = swiss_roll.excess_error(
        partial(swiss_roll.exact_denoiser, sigma_q=2.0), t, 2.0, rng
    )
    assert excess < 1e-8
    assert bayes > 0
    n = 200_000
    excess, bayes = swiss_roll.excess_error(lambda x_t, t: x_t, t, 2.0, rng, n=n)
    # |x_t - x_0|^2 = 4 t chi^2_2 has mean and standard deviation 8 t; the cross term is as noisy at
    # most
    assert abs(excess + bayes - 8 * t) < 5 * 2 * 8 * t / n**0.5


def test_measured_excess_is_relative_to_the_bayes_error(swiss_roll):
    """f = 1.1 E[x_0 | x_t] is off by a tenth of E[x_0 | x_t], whose mean square is known by
    quadrature.
    """
    exact = partial(swiss_roll.exact_denoiser, sigma_q=1.0)
    ratios, bayes_errors = swiss_roll.measure_denoiser(
        lambda x_t, t: 1.1 * exact(x_t, t), 1.0, torch.Generator().manual_seed(5)
    )
    mean = ratios.pop("mean")
    assert mean == pytest.approx(sum(ratios.values()) / 7)
    assert list(ratios) == list(bayes_errors) == [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0]
    points, weights = oracles.roll_nodes()
    second_moment = weights @ (points**2).sum(axis=1)
    for t, bayes in bayes_errors.items():
        # E|E[x_0|x_t]|^2 = E|x_0|^2 - Bayes error.  20 000 draws: 1 % and a little.
        assert ratios[t] * bayes == pytest.approx(0.01 * (second_moment - bayes), rel=0.05)
    assert bayes_errors[0.001] == pytest.approx(0.001, rel=0.1)  # on a line: one direction is known


def test_final_loss_is_the_mean_of_the_last_500(swiss_roll):
    assert swiss_roll.final_loss([9.0] * 100 + [1.0] * 250 + [2.0] * 250) == 1.5


def test_bayes_loss_is_the_loss_of_the_exact_denoiser(swiss_roll):
    loss, error = swiss_roll.bayes_loss(1.0, torch.Generator().manual_seed(6), n=4000)
    exact = partial(swiss_roll.exact_denoiser, sigma_q=1.0)
    losses = swiss_roll.losses_of(exact, 4000, 1.0, torch.Generator().manual_seed(6)).numpy()
    assert loss == pytest.approx(losses.mean(), rel=1e-9)
    assert error == pytest.approx(losses.std(ddof=1) / 4000**0.5, rel=1e-9)


def test_losses_are_weighted_by_one_over_the_output_scale(swiss_roll, rng):
    """f = x_t has the error sigma_t^2 chi^2_2, so the weighted loss is (1 + 4 sigma_q^2 t)
    chi^2_2.
    """
    losses = swiss_roll.losses_of(lambda x_t, t: x_t, 10**6, 1.5, rng).double()
    low = swiss_roll.MIN_T
    mean_t = (1 - low) / -math.log(low)  # of t log-uniform on [low, 1]
    assert losses.shape == (10**6,)
    assert_zero_mean(losses - 2 * (1 + 4 * 2.25 * mean_t))


# ------------------------------------------- The network ------------------------------------------


def test_denoiser_shapes_and_extremes(swiss_roll, rng):
    for sigma_q in (0.1, 1.0, 100.0):
        denoiser = swiss_roll.Denoiser(sigma_q)
        x_t = torch.randn(5, 2, generator=rng) * max(1.0, sigma_q)
        for t in (5e-4, 1.0):
            out = denoiser(x_t, t)
            assert out.shape == (5, 2)
            assert torch.all(out.isfinite())
            assert torch.equal(out, denoiser(x_t, torch.full((5,), t)))
    x_t = torch.randn(100, 2, generator=rng)
    assert (swiss_roll.Denoiser(1e-5)(x_t, 1.0) - x_t).abs().max() < 1e-4


def test_c_out_is_the_size_of_what_the_linear_guess_misses(swiss_roll, rng):
    """Of data with standard deviation sigma_data, x_0 - c_skip x_t has standard deviation c_out."""
    denoiser, n, t = swiss_roll.Denoiser(2.0).requires_grad_(False), 10**5, 0.3
    layers = denoiser.layers
    layers[-1].weight.data.zero_()
    layers[-1].bias.data.zero_()
    c_skip = float(denoiser(torch.ones(1, 2), t)[0, 0])
    layers[-1].bias.data.fill_(1.0)
    c_out = float(denoiser(torch.ones(1, 2), t)[0, 0]) - c_skip
    x_0 = 0.5 * torch.randn(n, generator=rng)
    x_t = x_0 + 2.0 * t**0.5 * torch.randn(n, generator=rng)
    assert float((x_0 - c_skip * x_t).std()) == pytest.approx(c_out, abs=5 * c_out / (2 * n) ** 0.5)


def test_training_is_deterministic_and_lowers_the_loss(swiss_roll):
    runs = []
    for seed in (3, 3, 4):
        rng = torch.Generator().manual_seed(seed)
        runs.append(
            swiss_roll.train(
                sigma_q=1.0, train_steps=200, batch_size=1024, learning_rate=0.01, rng=rng
            )
        )
    (first, losses), (second, again), (other, _) = runs
    weights = [torch.cat([p.ravel() for p in net.parameters()]) for net in (first, second, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert losses == again
    assert len(losses) == 200
    error = (np.var(losses[:20]) / 20 + np.var(losses[-20:]) / 20) ** 0.5
    assert np.mean(losses[:20]) - np.mean(losses[-20:]) > 3 * error


@pytest.fixture(scope="module")
def learned(swiss_roll):
    torch.set_num_threads(1)
    rng = torch.Generator().manual_seed(0)
    return swiss_roll.train(
        sigma_q=1.0, train_steps=8500, batch_size=1024, learning_rate=0.01, rng=rng
    )[0]


def test_default_is_close_to_the_exact_denoiser(swiss_roll, learned, rng):
    ratios, _ = swiss_roll.measure_denoiser(learned, 1.0, rng)
    assert max(ratios.values()) <= 0.01
    assert ratios["mean"] <= 0.0025


def test_default_samples_like_data_from_the_true_p_1(swiss_roll, learned, rng):
    """D / F of oracles.sliced_ratio, 2 independent generated sets and 30 data sets of 5000 points.

    DDIM with 200 steps is held to 1.1 within two of the jackknife's standard errors. DDPM cannot
    be: its last noise, sigma_q sqrt(dt), is still in its samples. So it is held to what the exact
    denoiser gives from the same starts with the same noise.
    """
    n, num_steps = 5000, 200
    x_1 = swiss_roll.add_noise(swiss_roll.swiss_roll(2 * n, rng), 1.0, 1.0, rng)
    data = np.stack([swiss_roll.swiss_roll(n, rng).numpy() for _ in range(30)])
    exact = partial(swiss_roll.exact_denoiser, sigma_q=1.0)
    ratios = {}
    for name, denoiser in [("learned", learned), ("exact", exact)]:
        mean = partial(swiss_roll.reverse_mean, denoiser=denoiser)
        steps = swiss_roll.ddpm(mean, x_1, num_steps, 1.0, torch.Generator().manual_seed(3))
        x_0 = deque(steps, maxlen=1).pop().reshape(2, n, 2).numpy()
        ratios[name] = oracles.sliced_ratio(x_0, data)
    assert ratios["learned"][0] <= 1.1 * ratios["exact"][0] + 2 * ratios["learned"][1]
    steps = swiss_roll.ddim(partial(swiss_roll.reverse_mean, denoiser=learned), x_1, num_steps)
    x_0 = deque(steps, maxlen=1).pop().reshape(2, n, 2).numpy()
    ratio, error = oracles.sliced_ratio(x_0, data)
    assert ratio <= 1.1 + 2 * error


def test_a_network_that_says_nothing_leaves_the_best_linear_guess(swiss_roll, rng):
    denoiser = swiss_roll.Denoiser(2.0)
    denoiser.layers[-1].weight.data.zero_()
    denoiser.layers[-1].bias.data.zero_()
    x_t = torch.randn((5, 2), generator=rng)
    assert torch.allclose(denoiser(x_t, 0.25), x_t * 0.5**2 / (0.5**2 + 2.0**2 * 0.25))


# ------------------------------------ Printing and the figures ----------------------------------
RATIOS = {0.01: 0.0111, 0.1: 0.0222, 1.0: 0.0333, "mean": 0.0777}
RUNS = [(a, b, c) for c in ("learned", "exact") for b in ("base", "p_1") for a in ("DDPM", "DDIM")]


def test_report_prints_what_was_measured(swiss_roll, capsys):
    class Args:
        num_samples, num_steps = 900, 43

    bayes_errors = {0.01: 0.125, 0.1: 0.25, 1.0: 0.5}
    distances = {run: (0.1 + 0.01 * i, 3 + 0.25 * i) for i, run in enumerate(RUNS)}
    shares = {run: torch.linspace(0.05, 0.15 + 0.001 * i, 10) for i, run in enumerate(RUNS)}
    measured = RATIOS, bayes_errors, 1.25, (1.75, 0.125), distances, (0.2, 0.03), shares, 0.012
    blurs = {run: 0.5 + 0.001 * i for i, run in enumerate(RUNS)}
    swiss_roll.report(*measured, blurs, Args)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[1:] == ["0.01", "0.1", "1.0", "mean"]
    assert lines[1].split()[2:] == ["0.125", "0.25", "0.5"]
    assert re.findall(r"[\d.]+%", lines[2]) == ["1.110%", "2.220%", "3.330%", "7.770%"]
    assert re.findall(r"\d\.\d+", lines[3]) == ["1.2500", "1.7500", "0.1250"]
    assert "900 samples, 43 steps" in lines[4]
    assert re.findall(r"\d\.\d+", lines[5]) == ["0.2000", "0.0300", "0.100", "0.012"]
    for i, (line, run) in enumerate(zip(lines[6:], RUNS)):
        assert all(word in line for word in run)
        numbers = [float(x) for x in re.findall(r"\d\.\d+", line)]
        assert numbers == pytest.approx(
            [*distances[run], 0.05, 0.15 + 0.001 * i, blurs[run]], abs=1e-4
        )


def test_figures_draw_what_was_measured(swiss_roll, rng):
    axes = swiss_roll.draw_loss([3.0, 2.0, 1.0], (1.75, 0.125)).axes[0]
    drawn = {line.get_label(): line.get_ydata() for line in axes.lines}
    assert list(drawn["loss of each step"]) == [3.0, 2.0, 1.0]
    assert drawn["exact denoiser, 1.750: no network can beat it"] == [1.75, 1.75]

    figure = swiss_roll.draw_denoisers(lambda x_t, t: 0.9 * x_t, RATIOS, 1.0, rng)
    assert all(f"{p}%" in texts(figure) for p in ("1.11", "2.22", "3.33"))
    lines = {line.get_label(): line.get_xydata() for line in figure.axes[1].lines}
    x_t = torch.tensor(lines["$x_t$"])
    np.testing.assert_allclose(lines["$E[x_0|x_t]$, learned"], 0.9 * x_t, rtol=1e-6)
    exact = swiss_roll.exact_denoiser(x_t, 0.1, sigma_q=1.0)
    np.testing.assert_allclose(lines["$E[x_0|x_t]$, exact"], exact, atol=1e-6)

    distances = {run: (0.1 + 0.01 * i, 9.0) for i, run in enumerate(RUNS)}
    axes = swiss_roll.draw_budget(distances, (0.2, 0.03)).axes[0]
    drawn = {line.get_label(): line.get_ydata() for line in axes.lines}
    order = [("DDPM", "base"), ("DDIM", "base"), ("DDPM", "p_1"), ("DDIM", "p_1")]
    assert list(drawn["exact denoiser"]) == [distances[(*run, "exact")][0] for run in order]
    assert list(drawn["learned denoiser"]) == [distances[(*run, "learned")][0] for run in order]
    assert "0.2000 $\\pm$ 0.0300" in texts(axes.figure)

    shares = {run: torch.linspace(0.05, 0.15 + 0.001 * i, 10) for i, run in enumerate(RUNS)}
    axes = swiss_roll.draw_shares(shares, 0.012).axes
    for ax, start in zip(axes, ("base", "p_1")):
        drawn = {line.get_label(): line.get_ydata() for line in ax.lines}
        for sampler, start_of, which in RUNS:
            if start_of == start:
                label = f"{sampler}, {which} denoiser"
                np.testing.assert_array_equal(drawn[label], shares[sampler, start, which])

    samples = {run: torch.full((5, 2), float(i)) for i, run in enumerate(RUNS)}
    axes = swiss_roll.draw_samples("DDIM", samples, torch.zeros(4, 2)).axes
    for ax, start in zip(axes, ("base", "p_1")):
        drawn = ax.collections[1].get_offsets()
        np.testing.assert_array_equal(drawn, samples["DDIM", start, "learned"])
