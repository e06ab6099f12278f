"""Experiment 5: both exact denoisers against brute force, what is measured, and what is found."""

import math
from decimal import Decimal, localcontext
from functools import partial
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from conftest import load

script = load("experiment-5/generalization.py")


DEFAULTS = {"sigma_q": 1.0, "train_steps": 1500, "batch_size": 512, "learning_rate": 0.01}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


@pytest.fixture
def rng():
    return torch.Generator().manual_seed(5)


def assert_mean(values, expected, factor=5):
    """values: (n,), independent: their mean is the expected one within 5 standard errors."""
    values = torch.as_tensor(values, dtype=torch.double)
    assert abs(values.mean() - expected) <= factor * values.std() / len(values) ** 0.5


def assert_close_pairs(a, b):
    """Two independent (value, standard error) agree within 5 of their joint standard errors."""
    assert abs(a[0] - b[0]) <= 5 * math.hypot(a[1], b[1])


# -------------------------------------------- References ------------------------------------------


def posterior_mean_50_digits(x, variance, points):
    """sum_i p(a_i | x) a_i, from |x - a_i|^2 / (2 variance).  x: (2,);  points: (N, 2)."""
    with localcontext() as context:
        context.prec = 50
        x, *points = [[Decimal(float(v)) for v in row] for row in (x, *points)]
        logs = [
            -sum((u - v) ** 2 for u, v in zip(x, a)) / (2 * Decimal(float(variance)))
            for a in points
        ]
        p = [(v - max(logs)).exp() for v in logs]
        return [float(sum(w * a[k] for w, a in zip(p, points)) / sum(p)) for k in range(2)]


def roll_moments(x, sigma_t, num_nodes=100_000):
    """E[x_0 | x_t] on the roll, and the trace of Cov[x_0 | x_t], by the midpoint rule.  x: (2,)."""
    theta = np.pi / 2 + 3.5 * np.pi * (np.arange(num_nodes) + 0.5) / num_nodes
    points = (theta * np.array([np.cos(theta), np.sin(theta)])).T / (4 * np.pi)
    logs = -((x - points) ** 2).sum(axis=1) / (2 * sigma_t**2)
    p = np.exp(logs - logs.max())
    p /= p.sum()
    mean = p @ points
    return mean, p @ ((points - mean) ** 2).sum(axis=1)


def chance_of_a_copy(num_points, reach):
    """The chance that a point of the roll has one of num_points others within `reach` along it."""
    theta = np.pi / 2 + 3.5 * np.pi * (np.arange(200_000) + 0.5) / 200_000
    arc = np.cumsum(np.sqrt(1 + theta**2)) * 3.5 * np.pi / 200_000 / (4 * np.pi)
    near = np.interp(arc + reach, arc, theta) - np.interp(
        arc - reach, arc, theta
    )  # less at the ends of the roll
    return np.mean(1 - (1 - near / (3.5 * np.pi)) ** num_points)


# ----------------------------------------- The exact denoisers ------------------------------------


@pytest.mark.parametrize("sigma_q", [0.3, 1.0, 5.0])
@pytest.mark.parametrize("t", [5e-4, 0.02, 1.0])
@pytest.mark.parametrize("num_points", [1, 7, 30])
def test_empirical_denoiser_in_50_digits(rng, num_points, t, sigma_q):
    points = script.swiss_roll(num_points, rng).double()
    x_t = script.add_noise(points[:1].expand(6, 2), t, sigma_q, rng)
    mean = script.empirical_denoiser(x_t, t, points=points, sigma_q=sigma_q)
    assert mean.dtype == torch.double
    variance = Decimal(sigma_q) ** 2 * Decimal(t)
    exact = [posterior_mean_50_digits(x, variance, points) for x in x_t]
    # a log odds is good to ten roundings of its terms; the mean moves by that times the spread
    terms = (float(x_t.norm(dim=1).max()) + 1) / float(variance)
    assert np.abs(mean.numpy() - exact).max() <= 10 * 1.2e-16 * (1 + 2 * terms)


def test_empirical_denoiser_is_experiment_2s_posterior(rng):
    two_points = load("experiment-2/two_points.py")
    points = script.swiss_roll(300, rng).double()
    x_t = torch.randn(1000, 2, generator=rng, dtype=torch.double)  # 1000 rows: in three parts
    for t in (0.001, 0.1, 1.0):
        mean = script.empirical_denoiser(x_t, t, points=points, sigma_q=2.0)
        data = {"points": points.numpy(), "weights": np.full(300, 1 / 300), "sigma_q": 2.0}
        assert (
            np.abs(
                mean.numpy() - two_points.posterior(x_t.numpy(), t, **data) @ data["points"]
            ).max()
            < 1e-11
        )


def test_empirical_denoiser_takes_a_time_for_each_row(rng):
    points = script.swiss_roll(50, rng)
    x_t = torch.randn(4, 2, generator=rng)
    t = torch.tensor([0.001, 0.01, 0.1, 1.0])
    mean = script.empirical_denoiser(x_t, t, points=points, sigma_q=1.5)
    for i in range(4):
        alone = script.empirical_denoiser(x_t[i : i + 1], t[i], points=points, sigma_q=1.5)
        assert (mean[i] - alone[0]).abs().max() < 1e-13


@pytest.mark.parametrize("t", [5e-4, 0.01, 1.0])
def test_exact_denoiser_agrees_with_a_fine_sum(rng, t):
    x_t = script.add_noise(script.swiss_roll(6, rng), t, 1.5, rng).double()
    exact = script.exact_denoiser(x_t, t, sigma_q=1.5)
    expected = [roll_moments(x, 1.5 * t**0.5)[0] for x in x_t.numpy()]
    assert np.abs(exact.numpy() - expected).max() < 1e-6


def test_many_points_make_the_denoiser_of_the_roll(rng):
    """D_N errs as N^(-1/2): with 16 times the points, the mean square is a sixteenth."""
    x_t = script.add_noise(script.swiss_roll(500, rng), 0.1, 1.0, rng)
    exact = script.exact_denoiser(x_t, 0.1, sigma_q=1.0)
    squares = []
    for n in (500, 8000):
        sets = [script.swiss_roll(n, rng) for _ in range(12)]
        errors = [
            script.empirical_denoiser(x_t, 0.1, points=points, sigma_q=1.0) - exact
            for points in sets
        ]
        squares.append(torch.stack([error.square().sum(dim=1).mean() for error in errors]))
    ratio = squares[0].mean() / squares[1].mean()
    relative = math.hypot(*[float(s.std() / s.mean()) / 12**0.5 for s in squares])
    assert abs(ratio / 16 - 1) < 5 * relative


def test_roll_length():
    theta = np.linspace(np.pi / 2, 4 * np.pi, 100_001)
    points = (theta * np.array([np.cos(theta), np.sin(theta)])).T / (4 * np.pi)
    assert script.roll_length() == pytest.approx(
        np.linalg.norm(np.diff(points, axis=0), axis=1).sum(), rel=1e-8
    )


# ------------------------------------------- The samplers -----------------------------------------


def test_ddim_with_the_empirical_denoiser_returns_training_points(rng):
    """Ten points so far apart that sigma at the last step, 0.03, tells them apart.

    Less than one sample in a hundred is then so near the middle of two that both have a part in it.
    """
    points = script.curve(torch.linspace(script.START, script.END, 10, dtype=torch.double))
    denoiser = partial(script.empirical_denoiser, points=points, sigma_q=1.0)
    x_0, _ = script.sample_paths(denoiser, torch.randn(200, 2, generator=rng), 1000, "test")
    assert (script.nearest(x_0, points) < 1e-6).double().mean() > 0.97
    assert len(torch.cdist(x_0, points).argmin(dim=1).unique()) >= 8


def test_with_small_steps_all_samples_are_training_points_for_large_n_too(rng):
    """From t = dt to 0, DDIM is what it is from 1 to 0 with sigma_q sqrt(dt): the last step, again.

    After four runs of 100 steps, sigma is 1e-4, a hundredth of the spacing.  Gaps are about
    exponential, so one in 25 points has a neighbour within 2e-4: nine samples in ten are copies.
    """
    points = script.swiss_roll(640, rng).double()
    x, sigma_q = torch.randn(200, 2, generator=rng, dtype=torch.double), 1.0
    for _ in range(4):
        mean = partial(
            script.reverse_mean,
            denoiser=partial(script.empirical_denoiser, points=points, sigma_q=sigma_q),
        )
        *_, x, x_0 = script.ddim(mean, x, 100)
        sigma_q *= 0.1
    assert (script.nearest(x_0, points) < 1e-5).double().mean() > 0.9


def test_sample_paths_keeps_the_first_trajectories(rng):
    """With one point a, x_t - a shrinks as sqrt(t) (experiment 1)."""
    a = torch.tensor([[0.5, -1.0]])
    x_1 = torch.randn(100, 2, generator=rng)
    x_0, paths = script.sample_paths(lambda x_t, t: a.double().expand(len(x_t), 2), x_1, 8, "test")
    assert paths.shape == (9, script.NUM_DRAWN, 2)
    t = torch.arange(8, -1, -1)[:, None, None] / 8
    assert (paths - a - t.sqrt() * (x_1[: script.NUM_DRAWN] - a)).abs().max() < 1e-6
    assert (x_0 - a).abs().max() < 1e-6
    assert x_0.shape == (100, 2)


# ------------------------------------------- Learning ---------------------------------------------


def test_the_network_has_three_hidden_layers_of_128_and_its_preconditioning():
    denoiser = script.Denoiser(2.0).requires_grad_(False)
    widths = [
        tuple(layer.weight.shape) for layer in denoiser.layers if isinstance(layer, torch.nn.Linear)
    ]
    assert widths == [(128, 3), (128, 128), (128, 128), (2, 128)]
    assert [type(layer).__name__ for layer in denoiser.layers] == ["Linear", "ReLU"] * 3 + [
        "Linear"
    ]
    x_t, sigma_t, t = torch.tensor([[0.7, -0.2]]), 2.0 * 0.25**0.5, 0.25
    seen = []
    denoiser.layers[0].register_forward_hook(lambda layer, inputs, output: seen.append(inputs[0]))
    denoiser.layers[-1].weight.zero_()
    denoiser.layers[-1].bias.copy_(torch.tensor([1.0, -3.0]))
    variance = sigma_t**2 + 0.25
    # linear regression of x_0 on x_t, for data of variance 1/4: slope, and what is left
    expected = 0.25 / variance * x_t + (0.25 * sigma_t**2 / variance) ** 0.5 * torch.tensor(
        [[1.0, -3.0]]
    )
    assert torch.allclose(denoiser(x_t, t), expected)
    assert torch.allclose(denoiser(x_t, torch.tensor([t])), expected)
    assert torch.allclose(
        seen[0], torch.tensor([[0.7, -0.2, math.log(sigma_t) / 2 * variance**0.5]]) / variance**0.5
    )


def test_training_draws(rng):
    points, n = torch.tensor([[0.0, 1.0], [2.0, 3.0], [-1.0, 0.5]]), 200_000
    x_0, t, x_t = script.training_draws(points, n, 3.0, rng)
    which = (x_0[:, None] == points).all(dim=2)
    assert which.any(dim=1).all()
    for i in range(3):
        assert_mean(which[:, i], 1 / 3)
    u = t.double().log() / math.log(script.MIN_T)
    assert 0 <= u.min() <= u.max() <= 1 + 1e-6
    for power in (1, 2):
        assert_mean(u**power, 1 / (power + 1))
    noise = (x_t - x_0) / (3.0 * t.sqrt()[:, None])
    for k in range(2):
        assert_mean(noise[:, k], 0)
        assert_mean(noise[:, k] ** 2, 1)


def test_weighted_squares_are_in_units_of_c_out(rng):
    """A network that adds c_out to one component of the linear guess is off it by exactly 1."""
    denoiser = script.Denoiser(0.7).requires_grad_(False)
    denoiser.layers[-1].weight.zero_()
    outputs = []
    x_t, t = torch.randn(50, 2, generator=rng), torch.rand(50, generator=rng) + 1e-3
    for value in (0.0, 1.0):
        denoiser.layers[-1].bias.copy_(torch.tensor([value, 0.0]))
        outputs.append(denoiser(x_t, t))
    assert torch.allclose(script.weighted_squares(*outputs, t, 0.7), torch.ones(50), rtol=1e-3)


def test_training_sees_the_points_alone_and_is_deterministic():
    point = torch.tensor([[0.3, -0.6]])
    settings = {**DEFAULTS, "train_steps": 200, "batch_size": 64}
    runs = [
        script.train(point, rng=torch.Generator().manual_seed(s), **settings) for s in (1, 1, 2)
    ]
    assert runs[0][1] == runs[1][1] != runs[2][1]
    assert len(runs[0][1]) == 200
    assert np.mean(runs[0][1][-20:]) < 0.02 < np.mean(runs[0][1][:20])
    x_t = script.add_noise(point.expand(200, 2), 0.1, 1.0, torch.Generator().manual_seed(3))
    assert (runs[0][0](x_t, 0.1) - point).norm(dim=1).mean() < 0.05  # sigma_t is 0.3
    assert not any(weight.requires_grad for weight in runs[0][0].parameters())


# ------------------------------------------- Measuring --------------------------------------------


def test_ratio_and_its_standard_error():
    """2000 repetitions with correlated numerator and denominator: spread and stated error agree."""
    rng = torch.Generator().manual_seed(1)
    below = 1 + torch.rand(2000, 400, generator=rng, dtype=torch.double)
    above = 3 * below + torch.randn(2000, 400, generator=rng, dtype=torch.double)
    pairs = [script.ratio(a, b) for a, b in zip(above, below)]
    values = torch.tensor([value for value, _ in pairs])
    errors = torch.tensor([script.mean(moves)[1] for _, moves in pairs])
    assert_mean(values, 3)
    assert abs(values.std() / errors.mean() - 1) < 5 / (2 * 2000) ** 0.5
    assert script.mean(torch.tensor([1.0, 2.0, 3.0, 6.0])) == pytest.approx(
        (3.0, (14 / 3) ** 0.5 / 2)
    )


def test_mean_excess_and_its_standard_error_when_times_share_their_data():
    rng = torch.Generator().manual_seed(2)
    values, errors = [], []
    for _ in range(1000):
        common = torch.randn(300, generator=rng, dtype=torch.double).square()
        rows = {
            t: {"D": t * common * (1 + torch.rand(300, generator=rng)), "bayes": 2 + 0 * common}
            for t in (1, 2, 3)
        }
        value, error = script.mean_excess(rows, "D")
        values.append(value)
        errors.append(error)
    assert_mean(values, 2 * 1.5 / 2)
    # the spread itself is good to a factor 1 + (2 * 1000)^(-1/2)
    assert abs(np.std(values) / np.mean(errors) - 1) < 5 / (2 * 1000) ** 0.5


def test_units_of_the_two_denoisers(rng):
    """The distances are 0 and 1 at the minimiser, 1 and 0 at the roll's denoiser, 1/4 half way."""
    points, fresh = script.swiss_roll(30, rng), script.swiss_roll(300, rng)
    minimiser = partial(script.empirical_denoiser, points=points, sigma_q=2.0)
    exact = partial(script.exact_denoiser, sigma_q=2.0)
    for weight in (0.0, 0.5, 1.0):
        rows = script.measure_denoiser(
            lambda x_t, t, w=weight: w * minimiser(x_t, t) + (1 - w) * exact(x_t, t),
            points,
            fresh,
            2.0,
            rng,
        )
        assert tuple(rows) == script.TIMES
        units = script.in_units(rows)
        assert np.allclose([value for value, _ in units["D_N"]], (1 - weight) ** 2, atol=1e-12)
        assert np.allclose([value for value, _ in units["D"]], weight**2, atol=1e-12)


def test_measure_denoiser_against_the_fine_sum(rng):
    """x_t is at its time: E|x_0 - D|^2 is the mean of the posterior's own variance there."""
    n = 4000
    rows = script.measure_denoiser(
        lambda x_t, t: 0 * x_t, script.swiss_roll(5, rng), script.swiss_roll(n, rng), 1.5, rng
    )
    for t in (0.01, 1.0):
        x_t = script.add_noise(script.swiss_roll(400, rng), t, 1.5, rng).double().numpy()
        moments = [roll_moments(x, 1.5 * t**0.5, 5000) for x in x_t]
        assert_close_pairs(
            script.mean(rows[t]["bayes"]), script.mean(torch.tensor([v for _, v in moments]))
        )
        assert_close_pairs(
            script.mean(rows[t]["D"]), script.mean(torch.tensor([m @ m for m, _ in moments]))
        )


def test_losses_of_two_points(rng):
    """Points (+-a, 0): D_N is a tanh(a x / sigma_t^2), and the floor a sum over x and t."""
    a, sigma_q = 0.4, 1.5
    points = torch.tensor([[a, 0.0], [-a, 0.0]])
    losses = script.measure_losses(lambda x_t, t: x_t, points, sigma_q, rng)
    z = np.linspace(-9, 9, 2001)
    density = np.exp(-(z**2) / 2) / np.sum(np.exp(-(z**2) / 2))
    u = (np.arange(2000) + 0.5) / 2000
    variance = sigma_q**2 * script.MIN_T**u
    weight = 1 / variance + 4
    x = a + variance[:, None] ** 0.5 * z
    floor = np.mean(weight * (((a - a * np.tanh(a * x / variance[:, None])) ** 2) @ density))
    loss = np.mean(2 * variance * weight)  # of f = x_t: weight times E|noise|^2
    assert abs(losses["floor"][0] - floor) < 5 * losses["floor"][1]
    assert abs(losses["loss"][0] - loss) < 5 * losses["loss"][1]
    assert abs(losses["above"][0] - (loss - floor)) < 5 * losses["above"][1]
    minimiser = partial(script.empirical_denoiser, points=points, sigma_q=sigma_q)
    least = script.measure_losses(minimiser, points, sigma_q, rng)
    assert least["above"][0] == 0
    assert least["loss"] == least["floor"]


def test_measure_bayes_loss_is_the_mean_of_the_posteriors_variance(rng):
    _, t, x_t = script.training_draws(script.swiss_roll(1000, rng), 1000, 1.0, rng)
    t = t.double().numpy()
    variances = [roll_moments(x, s**0.5, 5000)[1] for x, s in zip(x_t.double().numpy(), t)]
    expected = script.mean(torch.tensor((1 / t + 4) * variances))
    assert_close_pairs(script.measure_bayes_loss(1.0, rng), expected)


def test_nearest_and_the_distance_to_the_roll(rng):
    theta = torch.linspace(2, 12, 1300, dtype=torch.double)  # in three parts
    tangent = torch.stack(
        [theta.cos() - theta * theta.sin(), theta.sin() + theta * theta.cos()], dim=1
    )
    normal = torch.stack([tangent[:, 1], -tangent[:, 0]], dim=1) / tangent.norm(dim=1, keepdim=True)
    points = script.curve(theta)
    measured = script.measure_samples(points + 0.02 * normal, points)
    for key in ("point", "roll"):
        assert measured[key][0] == pytest.approx(0.02, abs=2e-6)
        assert measured[key][1] < 1e-6
    assert script.measure_samples(points, points)["roll"][0] < 2e-4
    x = torch.randn(700, 2, generator=rng)
    one_by_one = [min(math.dist(u, v) for v in points[::50].tolist()) for u in x.tolist()]
    assert np.abs(script.nearest(x, points[::50]).numpy() - one_by_one).max() < 1e-7


def test_copies_are_nearer_than_a_tenth_of_the_spacing():
    points = torch.tensor([[0.0, 0.0], [5.0, 0.0], [10.0, 0.0], [15.0, 0.0]])
    reach = 0.1 * script.roll_length() / 4
    x_0 = points + torch.tensor(
        [[0.0, 0.99 * reach], [0.0, -0.99 * reach], [-1.01 * reach, 0], [0.99 * reach, 0]]
    )
    assert script.measure_samples(x_0, points)["copies"] == pytest.approx(
        (0.75, (3 / 16 * 4 / 3) ** 0.5 / 2)
    )


def test_share_of_copies_among_fresh_data(rng):
    n = 160
    shares = []
    for _ in range(60):
        fresh = script.swiss_roll(100, rng)
        shares.append(script.measure_samples(fresh, script.swiss_roll(n, rng))["copies"][0])
    assert_mean(shares, chance_of_a_copy(n, 0.1 * script.roll_length() / n))


# ---------------------------------------- What the default finds ----------------------------------


@pytest.fixture(scope="module")
def found():
    """The default's sets of 10 and 2560 points, its networks, and what is measured of them."""
    torch.set_num_threads(1)
    rng = torch.Generator().manual_seed(1)
    roll = script.swiss_roll(2560, rng)
    fresh = script.swiss_roll(2000, rng)
    x_1 = torch.randn(200, 2, generator=rng)
    results = {}
    for n, num_steps in ((10, 1000), (2560, 2)):  # of 2560 points the samples are not looked at
        network, _ = script.train(roll[:n], rng=torch.Generator().manual_seed(0), **DEFAULTS)
        given = (roll[:n], x_1, fresh, num_steps, 1.0, rng)
        results[n] = script.measure_training_set(network, *given)
    return results


def test_from_ten_points_the_network_is_the_minimiser_at_t_1(found):
    """There it is at least 20 times nearer to the minimiser than to the denoiser of the roll."""
    to_minimiser, to_roll = found[10]["fresh"]["D_N"][-1], found[10]["fresh"]["D"][-1]
    assert to_roll[0] - 5 * to_roll[1] > 20 * (to_minimiser[0] + 5 * to_minimiser[1])
    assert to_minimiser[0] < 0.05


def test_from_ten_points_it_has_memorised_where_it_was_trained_and_not_between(found):
    for fresh, seen in list(zip(found[10]["fresh"]["D_N"], found[10]["training"]["D_N"]))[:3]:
        assert seen[0] + 5 * math.hypot(seen[1], fresh[1]) < fresh[0]
    assert max(value for value, _ in found[10]["training"]["D_N"]) < 0.06


def test_its_training_loss_is_below_the_bayes_loss_and_near_its_floor(found):
    bayes = script.measure_bayes_loss(1.0, torch.Generator().manual_seed(4))
    loss, floor, above = [found[10]["losses"][key] for key in ("loss", "floor", "above")]
    assert loss[0] + 5 * math.hypot(loss[1], bayes[1]) < bayes[0]
    assert 0 < above[0] < 0.05 * floor[0]


def test_order_of_the_curves_in_n(found):
    """With 10 points the network is better than the minimiser, with 2560 worse; N helps both."""
    excess = {(name, n): found[n]["excess"][name] for n in found for name in found[n]["excess"]}
    for better, worse in [
        (("network", 10), ("minimiser", 10)),
        (("minimiser", 2560), ("network", 2560)),
        (("network", 2560), ("network", 10)),
    ]:
        (low, low_error), (high, high_error) = excess[better], excess[worse]
        assert low + 5 * math.hypot(low_error, high_error) < high


def test_the_minimiser_improves_with_every_n(rng):
    roll, fresh = script.swiss_roll(2560, rng), script.swiss_roll(1000, rng)
    nothing = script.Denoiser(1.0).requires_grad_(False)
    pairs = []
    for n in script.NUM_POINTS:
        rows = script.measure_denoiser(nothing, roll[:n], fresh, 1.0, rng)
        pairs.append(script.mean_excess(rows, "apart"))
    for (high, high_error), (low, low_error) in zip(pairs, pairs[1:]):
        assert low + 5 * math.hypot(low_error, high_error) < high


def test_ten_points_are_copied_and_fresh_data_are_not(found):
    share, error = found[10]["samples"]["network"]["copies"]
    assert share - 5 * error > 0.9
    share, error = found[10]["samples"]["data"]["copies"]
    assert share + 5 * error < 0.3


# ---------------------------------- What is printed, and the figures ------------------------------


def made_up_results():
    """Results whose every number is different: pairs (k / 100, k / 1000) for k = 1, 2, ..."""
    count = iter(range(1, 10_000))

    def pairs(*names):
        return {name: (k / 100, k / 1000) for name, k in zip(names, count)}

    def sides():
        return {name: list(pairs(*script.TIMES).values()) for name in ("D_N", "D")}

    paths = torch.linspace(-1, 1, 4 * script.NUM_DRAWN * 2).reshape(4, script.NUM_DRAWN, 2)
    return {
        n: {
            "losses": pairs("loss", "floor", "above"),
            "excess": pairs("network", "minimiser"),
            "fresh": sides(),
            "training": sides(),
            "samples": {
                name: pairs("point", "roll", "copies") for name in ("data", "network", "minimiser")
            },
            "paths": {"network": paths, "minimiser": paths},
        }
        for n in script.NUM_POINTS
    }


def test_report_prints_what_was_measured(capsys):
    results = made_up_results()
    script.report(
        results,
        (12.5, 6.25),
        SimpleNamespace(sigma_q=1, train_steps=2, batch_size=3, num_samples=4, num_steps=5),
    )
    lines = capsys.readouterr().out.splitlines()
    assert max(len(line) for line in lines) <= 100
    assert any(line.split()[-3:] == ["12.5000", "+-", "6.2500"] for line in lines)
    rows = [line.replace("+-", "").replace("(", " ").replace(")", " ").split() for line in lines]
    for n, result in results.items():
        own = [row for row in rows if row and row[0] == str(n)]
        losses, shares, distances, *sides = own
        assert [float(v) for v in losses[1:]] == [
            v for pair in result["losses"].values() for v in pair
        ]
        samples = result["samples"]
        pairs = [result["excess"]["network"], result["excess"]["minimiser"]]
        pairs += [samples[name]["copies"] for name in ("network", "minimiser", "data")]
        assert [float(v) for v in shares[1:]] == pytest.approx(
            [100 * v for pair in pairs for v in pair]
        )
        pairs = [samples[name]["roll"] for name in ("network", "minimiser")]
        pairs += [samples[name]["point"] for name in ("network", "minimiser", "data")]
        assert [float(v) for v in distances[1:]] == [v for pair in pairs for v in pair]
        if n in script.COMPARED:
            for row, (name, where) in zip(
                sides, [("D_N", "training"), ("D_N", "fresh"), ("D", "fresh")]
            ):
                assert row[2:4] == [name + "," * (name == "D_N"), where] or row[2:5] == [
                    name,
                    ",",
                    where,
                ]
                values = [float(v) for v in row[-14:]]
                assert values[::2] == [value for value, _ in result[where][name]]
                assert values[1::2] == [math.ceil(1000 * error) for _, error in result[where][name]]


def test_figures_show_what_was_measured():
    results = made_up_results()
    top, bottom = script.draw_error(results).axes
    for ax, curves in [
        (
            top,
            [
                [result["excess"][name] for result in results.values()]
                for name in ("network", "minimiser")
            ],
        ),
        (
            bottom,
            [
                [r["samples"][name]["copies"] for r in results.values()]
                for name in ("network", "minimiser", "data")
            ],
        ),
    ]:
        assert len(ax.containers) == len(curves)
        for drawn, pairs in zip(ax.containers, curves):
            assert tuple(drawn.lines[0].get_xdata()) == script.NUM_POINTS
            assert list(drawn.lines[0].get_ydata()) == [value for value, _ in pairs]
    for ax, n in zip(script.draw_which(results).axes, script.COMPARED):
        assert str(n) in ax.get_title()
        for drawn, (where, name) in zip(
            ax.containers, [("fresh", "D"), ("fresh", "D_N"), ("training", "D_N")]
        ):
            assert list(drawn.lines[0].get_ydata()) == [
                value for value, _ in results[n][where][name]
            ]


def test_trajectories_run_from_start_to_sample():
    results = made_up_results()
    roll = script.curve(torch.linspace(script.START, script.END, 50))
    axes = script.draw_paths(results, roll).axes[:6]
    for ax, n in zip(axes[::2], script.NUM_POINTS):
        line, training, samples = ax.lines
        assert len(line.get_xdata()) > 100
        assert np.allclose(training.get_xydata(), roll[:n])
        paths = results[n]["paths"]["network"]
        segments = np.array(ax.collections[0].get_segments()).reshape(-1, 3, 2, 2)
        inner = paths[0].norm(dim=1).argsort()[: len(segments)]
        assert len(segments) == 3 * script.NUM_DRAWN // 4
        assert np.allclose(samples.get_xydata(), paths[-1][inner])
        assert np.allclose(segments[:, 0, 0], paths[0][inner])
        assert np.allclose(segments[:, -1, 1], paths[-1][inner])
        assert np.allclose(ax.collections[0].get_array()[:3], [2 / 3, 1 / 3, 0])


def test_main_writes_exactly_its_figures(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script, "NUM_FRESH", 20)
    monkeypatch.setattr(script, "NUM_POINTS", (10, 20, 40, 640))
    script.main(
        [
            "--train-steps",
            "4",
            "--batch-size",
            "8",
            "--num-steps",
            "2",
            "--num-samples",
            "3",
            "--figures-dir",
            str(tmp_path),
        ]
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "error-vs-n.jpg",
        "trajectories.jpg",
        "which-denoiser.jpg",
    ]
    assert all(path.stat().st_size < 300_000 for path in tmp_path.iterdir())
    assert capsys.readouterr().out.count("wrote") == 3
