"""Experiment 7: every target has the optimum it should, its variance is the exact one, what is
measured is what it says, and the targets come in the order that the README tells.
"""

import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import load

p = load("experiment-7/prediction_target.py")
ALL = [*p.TARGETS, *p.CONTROLS]
DT = 1e-3


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def rng():
    return torch.Generator().manual_seed(7)


def pair(target):
    return {**p.TARGETS, **p.CONTROLS}[target]


def assert_mean(values, expected=0.0):
    """values: (n, ...), independent rows, of the expected mean within 5 standard errors."""
    values = np.asarray(values, dtype=float) - expected
    error = values.std(axis=0) / len(values) ** 0.5
    assert np.all(np.abs(values.mean(axis=0)) <= 5 * error), (values.mean(axis=0), error)


def squared_radius():
    """E|x_0|^2: the mean of (theta / 4 pi)^2 over [pi/2, 4 pi]."""
    low, high = math.pi / 2, 4 * math.pi
    return (high**3 - low**3) / 3 / (high - low) / (4 * math.pi) ** 2


# ------------------------------------------- References ------------------------------------------


def posterior(x_t, t, sigma_q, nodes=40_000):
    """The roll at the midpoints of even pieces of theta, (nodes, 2), and p(theta | x_t) there."""
    low, high = math.pi / 2, 4 * math.pi
    theta = low + (high - low) * (np.arange(nodes) + 0.5) / nodes
    c = np.stack([theta * np.cos(theta), theta * np.sin(theta)], axis=1) / (4 * math.pi)
    exponent = -((x_t - c) ** 2).sum(axis=1) / (2 * sigma_q**2 * t)
    weight = np.exp(exponent - exponent.max())
    return c, weight / weight.sum()


def targets_given_both(x_0, x_t, t, sigma_q):
    """E[target | x_0, x_t], written out once more.  x_0: (n, 2);  x_t: (2,)."""
    sigma = sigma_q * math.sqrt(t)
    noise = (x_t - x_0) / sigma
    phi = math.atan(sigma)
    previous = x_0 + (x_t - x_0) * (t - DT) / t  # the bridge, a share (t - dt) / t of the way
    guess = x_t * 0.25 / (0.25 + sigma**2)
    scale = math.sqrt(0.25 * sigma**2 / (0.25 + sigma**2))
    return {
        "x_{t-dt}": previous,
        "x_0": x_0,
        "noise": noise,
        "v": math.cos(phi) * noise - math.sin(phi) * x_0,
        "preconditioned": (x_0 - guess) / scale,
        "x_{t-dt}, no noise": previous,
        "x_0, with noise": x_0,
    }


# ------------------------------------------ The targets ------------------------------------------


@pytest.mark.parametrize("sigma_q", [0.6, 2.0])
@pytest.mark.parametrize("t", [0.001, 0.02, 0.4, 1.0])
@pytest.mark.parametrize("target", ALL)
def test_the_mean_of_each_target_gives_the_mean_of_x_0(target, t, sigma_q):
    """A network at its optimum says E[target | x_t]; turned back that must be E[x_0 | x_t]."""
    for x_t in np.array([[0.3, -0.2], [-0.6, 0.5], [1.0, 0.1]]):
        c, weight = posterior(x_t, t, sigma_q)
        output = weight @ targets_given_both(c, x_t, t, sigma_q)[target]
        sigma_t = sigma_q * t**0.5
        x_0 = pair(target)[1](output, x_t, t, sigma_t)
        assert np.abs(x_0 - weight @ c).max() < 1e-9
        exact = p.exact_denoiser(torch.tensor(x_t[None]), t, sigma_q=sigma_q)
        assert np.abs(exact.numpy()[0] - weight @ c).max() < 1e-5


@pytest.mark.parametrize("target", ALL)
def test_each_pair_inverts(rng, target):
    """The exact denoiser, turned into the target's conditional mean and back, is itself."""
    t = DT ** torch.rand(200, 1, generator=rng, dtype=torch.double)
    t[:3, 0] = torch.tensor([DT, 0.5, 1.0])
    sigma_t = 1.7 * t.sqrt()
    x_t = p.add_noise(p.swiss_roll(200, rng).double(), t[:, 0], 1.7, rng)
    exact = p.exact_denoiser(x_t, t[:, 0], sigma_q=1.7)
    regress_on, x_0_from = pair(target)
    mean = (DT / t) * exact + (1 - DT / t) * x_t  # eq. (24)
    output = regress_on(exact, mean, x_t, t, sigma_t)  # every target is linear in x_0 and x_{t-dt}
    assert (x_0_from(output, x_t, t, sigma_t) - exact).abs().max() < 1e-11
    for row in (0, 1, 2, 150):  # and so with floats
        x, s = x_t[row], float(t[row])
        back = x_0_from(regress_on(exact[row], mean[row], x, s, 1.7 * s**0.5), x, s, 1.7 * s**0.5)
        assert (back - exact[row]).abs().max() < 1e-11


@pytest.mark.parametrize("t", [0.01, 0.3])
@pytest.mark.parametrize("target", ALL)
def test_what_is_regressed_on_has_that_conditional_mean(rng, target, t):
    """target - E[target | x_t] is orthogonal to whatever is a function of x_t."""
    n = 100_000
    x_0, x_previous, x_t = p.draw_chain(n, t, 1.3, rng)
    sigma_t = 1.3 * t**0.5
    exact = p.exact_denoiser(x_t, t, sigma_q=1.3)
    regress_on, _ = pair(target)
    mean = regress_on(exact, (DT / t) * exact + (1 - DT / t) * x_t, x_t, t, sigma_t)
    residual = regress_on(x_0, x_previous, x_t, t, sigma_t) - mean
    for g in (torch.ones_like(x_t), x_t, x_t.flip(1), (7 * x_t).sin()):
        assert_mean(residual * g)


def test_targets_are_what_their_names_say(rng, monkeypatch):
    n, t = 100_000, 0.3
    sigma_t = 2 * t**0.5
    x_0, x_previous, x_t = p.draw_chain(n, t, 2.0, rng)
    draws = {name: pair(name)[0](x_0, x_previous, x_t, t, sigma_t) for name in ALL}
    assert torch.equal(draws["x_{t-dt}"], x_previous)
    assert torch.equal(draws["x_0"], x_0)
    noise = draws["noise"].double()
    assert_mean(noise)
    assert_mean(noise**2, 1.0)
    assert_mean(noise * x_0)
    phi = math.atan(sigma_t)
    assert (draws["v"] - math.cos(phi) * noise + math.sin(phi) * x_0).abs().max() < 1e-5
    # without and with the noise of the bridge: the difference has its variance, and no more
    bridge = (x_previous - draws["x_{t-dt}, no noise"]).double()
    assert_mean(bridge)
    assert_mean(bridge**2, 4 * DT * (t - DT) / t)
    assert_mean(bridge * x_t)
    assert (draws["x_0, with noise"] - x_0 - bridge * t / DT).abs().max() < 2e-3
    # v is the preconditioned target of data with standard deviation 1, with another sign
    monkeypatch.setattr(p, "SIGMA_DATA", 1.0)
    flipped = p.regress_on_preconditioned(x_0, x_previous, x_t, t, sigma_t)
    assert (flipped + draws["v"]).abs().max() < 1e-5


def test_the_preconditioned_target_has_unit_size_for_gaussian_data_of_that_size(rng):
    n, t = 200_000, 0.2
    x_0 = 0.5 * torch.randn(n, 2, generator=rng, dtype=torch.double)
    x_t = x_0 + 1.5 * t**0.5 * torch.randn(n, 2, generator=rng, dtype=torch.double)
    value = p.regress_on_preconditioned(x_0, None, x_t, t, 1.5 * t**0.5)
    assert_mean(value**2, 1.0)
    assert_mean(value * x_t)  # the best linear guess leaves nothing linear


def test_the_chain_has_its_two_noises(rng):
    n = 200_000
    u = torch.rand(n, generator=rng)
    t = DT**u
    x_0, x_previous, x_t = (x.double() for x in p.draw_chain(n, t, 1.5, rng))
    first, second = x_previous - x_0, x_t - x_previous
    assert_mean(first**2 - 2.25 * (t.double()[:, None] - DT))
    assert_mean(second**2, 2.25 * DT)
    assert_mean(first * second)
    assert_mean(first * x_0)
    closest = torch.full((5,), DT) ** (1 - 2**-24)  # the smallest t that torch.rand can give
    assert all(x.isfinite().all() for x in p.draw_chain(5, closest, 1.0, rng))
    x_0, x_previous, _ = p.draw_chain(5, DT, 1.0, rng)
    assert torch.equal(x_0, x_previous)


@pytest.mark.parametrize("target", ALL)
def test_factor_is_the_slope_of_x_0_in_the_output(target):
    for t, sigma_q in [(0.001, 1.0), (0.04, 2.5), (1.0, 0.7)]:
        s = sigma_q * t**0.5
        known = {"noise": s, "v": s / math.hypot(1, s), "preconditioned": s / math.hypot(1, 2 * s)}
        default = t / DT if target.startswith("x_{") else 1.0
        assert p.factor(target, t, sigma_q) == pytest.approx(known.get(target, default), rel=1e-9)


# ------------------------------------------- The truth -------------------------------------------


@pytest.mark.parametrize(("t", "sigma_q"), [(0.001, 0.5), (0.01, 1.0), (0.1, 1.0), (1.0, 2.0)])
def test_variance_of_x_0_agrees_with_draws(rng, t, sigma_q):
    x_0 = p.swiss_roll(40_000, rng)
    x_t = p.add_noise(x_0, t, sigma_q, rng)
    miss = x_0 - p.exact_denoiser(x_t, t, sigma_q=sigma_q)
    assert_mean(miss.square().mean(dim=1), p.variance_of_x_0(t, sigma_q=sigma_q))


def test_variance_of_x_0_has_its_limits():
    """Little noise leaves x_0 free along the curve only; much noise leaves it free."""
    tangent = p.variance_of_x_0(0.001, sigma_q=0.5) / (0.25 * 0.001 / 2)
    assert tangent == pytest.approx(1, abs=0.02)
    low, high = math.pi / 2, 4 * math.pi
    sin = (math.sin(high) - high * math.cos(high)) - (math.sin(low) - low * math.cos(low))
    cos = (math.cos(high) + high * math.sin(high)) - (math.cos(low) + low * math.sin(low))
    mean_square = (sin**2 + cos**2) / (4 * math.pi * (high - low)) ** 2  # |E x_0|^2
    whole = (squared_radius() - mean_square) / 2
    assert p.variance_of_x_0(1.0, sigma_q=100) == pytest.approx(whole, rel=1e-4)


@pytest.mark.parametrize("sigma_q", [1.0, 4.0])
def test_target_variances_agree_with_draws(rng, sigma_q):
    """Within 5 standard errors, at every t, for both variances."""
    exact = p.exact_variances(p.TIMES, sigma_q)
    measured = p.measure_target_variance(sigma_q, rng)
    assert list(measured) == list(exact) == ["x_{t-dt}", "x_0"]
    for target, (mean, error) in measured.items():
        expected = exact[target]
        assert mean.shape == error.shape == (len(p.TIMES),)
        assert np.all(np.abs(mean - expected) <= 5 * error), target
    # of N(0, s^2) in two dimensions the mean square has the standard deviation s^2; n = 20 000
    mean, error = measured["x_{t-dt}"]
    assert error[-1] == pytest.approx(exact["x_{t-dt}"][-1] / 20_000**0.5, rel=0.05)


def test_predicting_x_previous_adds_the_variance_of_the_bridge(rng):
    """Claim 2 from draws of a bridge: Brownian motion, pinned to 0 at both ends."""
    n, t, sigma_q = 200_000, 0.05, 1.5
    path = torch.randn(n, 2, generator=rng, dtype=torch.double)
    early = sigma_q * math.sqrt(t - DT) * path[:, 0]
    late = sigma_q * math.sqrt(DT) * path[:, 1]
    pinned = early - (t - DT) / t * (early + late)
    assert_mean((t / DT * pinned) ** 2, p.bridge_variance(t, sigma_q=sigma_q))
    exact = p.exact_variances([t, 1.0], sigma_q)
    extra = exact["x_{t-dt}"] - exact["x_0"]
    assert extra == pytest.approx([2.25 * t * (t - DT) / DT, 2.25 * 999], rel=1e-12)
    assert exact["x_0"][0] == p.variance_of_x_0(t, sigma_q=sigma_q)


# -------------------------------------------- Learning -------------------------------------------


@pytest.mark.parametrize("target", ALL)
def test_forward_turns_the_output_into_x_0(rng, target):
    predictor = p.Predictor(target, 1.5)
    x_t = torch.randn(6, 2, generator=rng)
    for t in (0.001, 0.3, 1.0):
        output = predictor.output(x_t, torch.full((6, 1), t))
        assert output.shape == (6, 2)
        x_0 = pair(target)[1](output, x_t, t, 1.5 * t**0.5)
        assert torch.allclose(predictor(x_t, t), x_0, rtol=1e-4, atol=1e-3 * t / DT * 1e-3)


def test_the_network_sees_the_scaled_point_and_the_logarithm(rng):
    predictor = p.Predictor("noise", 3.0)
    seen = []
    predictor.layers.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    x_t, t = torch.randn(4, 2, generator=rng), torch.tensor([[0.001], [0.02], [0.3], [1.0]])
    predictor.output(x_t, t)
    std = (9 * t + 0.25).sqrt()
    assert torch.allclose(seen[0][:, :2], x_t / std)
    assert torch.allclose(seen[0][:, 2:], (3 * t.sqrt()).log() / 2)
    layers = p.Predictor("v", 1.0).layers
    shapes = [tuple(w.shape) for w in layers.parameters() if w.ndim == 2]
    assert shapes == [(64, 3), (64, 64), (64, 64), (64, 64), (2, 64)]


def test_the_loss_is_the_plain_squared_error_at_log_uniform_t(rng):
    """Of a network that says 0 it is E|target|^2, known for three of the targets."""
    mean_t = (1 - DT) / math.log(1 / DT)
    known = {
        "noise": 2.0,
        "x_0": squared_radius(),
        "x_{t-dt}": squared_radius() + 2 * 2.25 * (mean_t - DT),
    }
    for target, expected in known.items():
        predictor = p.Predictor(target, 1.5)
        predictor.output = lambda x_t, t: torch.zeros_like(x_t)
        errors = p.squared_errors(predictor, 100_000, 1.5, rng)
        assert errors.shape == (100_000,)
        assert_mean(errors, expected)
    predictor.output = lambda x_t, t: x_t  # |x_t - x_{t-dt}|^2: no more than the last noise
    assert_mean(p.squared_errors(predictor, 100_000, 1.5, rng), 2 * 2.25 * DT)


def test_all_targets_get_the_same_weights_and_batches():
    """At a learning rate of nothing the weights stay as drawn; the rng ends in the same state."""
    settings = {"sigma_q": 1.0, "train_steps": 3, "batch_size": 8, "learning_rate": 1e-12}
    ends = []
    for target in ALL:
        rng = torch.Generator().manual_seed(5)
        predictor, losses = p.train(target, rng=rng, **settings)
        weights = torch.cat([w.ravel() for w in predictor.parameters()])
        ends.append((weights, rng.get_state(), losses))
        assert len(losses) == 3
    for weights, state, _ in ends[1:]:
        assert torch.allclose(weights, ends[0][0], atol=1e-10)
        assert torch.equal(state, ends[0][1])
    other, _ = p.train("noise", rng=torch.Generator().manual_seed(6), **settings)
    weights = torch.cat([w.ravel() for w in other.parameters()])
    assert not torch.allclose(weights, ends[0][0], atol=1e-3)


def test_train_all_gives_each_target_the_same_seeds(monkeypatch):
    calls = []

    def train(target, *, rng, **settings):
        calls.append((target, rng.initial_seed(), settings))
        return target, []

    monkeypatch.setattr(p, "train", train)
    predictors = p.train_all(2.0, 77, 40)
    assert list(predictors) == ALL
    assert all(predictors[target] == [target] * p.NUM_SEEDS for target in ALL)
    assert p.NUM_SEEDS >= 3
    for target in ALL:
        assert [seed for name, seed, _ in calls if name == target] == [40, 41, 42]
    expected = {"sigma_q": 2.0, "train_steps": 77, "batch_size": 512, "learning_rate": 0.01}
    assert all(settings == expected for _, _, settings in calls)


# ------------------------------------------- Measuring -------------------------------------------


def test_measured_errors_of_known_denoisers(rng):
    """A shift of the exact denoiser; and x_t itself, whose error and the Bayes error add up."""

    def shifted(x_t, t):
        return p.exact_denoiser(x_t, t, sigma_q=1.5) + torch.tensor([0.03, -0.04])

    bayes = 2 * p.exact_variances(p.TIMES, 1.5)["x_0"]
    predictors = {"x_0": [shifted, lambda x_t, t: x_t], "noise": [shifted]}
    n = 4000
    errors = p.measure_errors(predictors, bayes, 1.5, rng, n=n)
    assert errors["x_0"].shape == (2, len(p.TIMES))
    assert errors["x_0"][0] * bayes == pytest.approx(0.0025, rel=1e-6)
    assert errors["noise"][0] == pytest.approx(errors["x_0"][0])
    # |x_t - E[x_0 | x_t]|^2 has the mean 2 sigma_t^2 - bayes, and no larger a 4th moment than
    # |x_t - x_0|^2, (2 sigma_t^2)^2 2
    whole = 2 * 2.25 * np.array(p.TIMES)
    assert np.all(abs(errors["x_0"][1] * bayes + bayes - whole) < 5 * 2**0.5 * whole / n**0.5)
    outputs = p.output_errors({"x_0": errors["x_0"][:1], "noise": errors["noise"]}, bayes, 1.5)
    rms = 0.05 / 2**0.5  # of the shift, per dimension
    assert outputs["x_0"] == pytest.approx([rms] * len(p.TIMES), rel=1e-6)
    sigma_t = 1.5 * np.array(p.TIMES) ** 0.5
    assert outputs["noise"] == pytest.approx(rms / sigma_t, rel=1e-6)
    both = {"x_0": np.array([[0.1] * 7, [0.3] * 7])}  # over seeds: the mean of the squares
    mean = p.output_errors(both, bayes, 1.5)["x_0"]
    assert mean == pytest.approx((0.2 * bayes / 2) ** 0.5)


def test_squared_errors_of_b_10_differ_by_the_variance_of_the_bridge(rng):
    """Whatever the denoiser; of g = x_t both are known: 2 sigma_q^2 dt and dt^2 / t of it."""
    t, sigma_q = 0.2, 1.4
    bridge = 2 * sigma_q**2 * DT * (t - DT) / t
    for denoiser in (lambda x_t, t: 0.3 * x_t.flip(1) + t, lambda x_t, t: x_t):
        first, second, difference, expected = p.measure_equality(denoiser, t, sigma_q, rng)
        assert expected == pytest.approx(bridge, rel=1e-9)
        assert abs(difference[0] - bridge) <= 5 * difference[1]
        assert difference[1] < bridge / 300
        assert difference[0] == pytest.approx(first[0] - second[0], rel=1e-9)
    assert abs(first[0] - 2 * sigma_q**2 * DT) <= 5 * first[1]
    assert abs(second[0] - 2 * sigma_q**2 * DT**2 / t) <= 5 * second[1]


def test_samples_start_from_p_1_and_stay_within_reach(rng):
    """One step of DDIM returns the denoiser of x_1; the identity leaves x_1 as it was."""
    n = 20_000
    predictors = {target: [lambda x_t, t: x_t] for target in p.TARGETS}
    predictors["v"] = [lambda x_t, t: 1e30 * x_t]
    predictors["noise"] = [lambda x_t, t: x_t / 0]
    samples = p.sample(predictors, n, 1, 1.5, rng)
    assert set(samples) == {("exact", 0), *((target, 0) for target in p.TARGETS)}
    x_1 = samples["x_0", 0]
    assert_mean(x_1.double().square().sum(dim=1), squared_radius() + 2 * 2.25)
    exact = p.exact_denoiser(x_1, 1.0, sigma_q=1.5)
    assert (samples["exact", 0] - exact).abs().max() < 1e-9
    for target in ("v", "noise"):
        assert torch.equal(samples[target, 0], 10 * x_1.sign())
    predictors["noise"] = [lambda x_t, t: math.nan * x_t]
    assert torch.equal(p.sample(predictors, 4, 2, 1.5, rng)["noise", 0], torch.full((4, 2), 10.0))


def test_ddim_of_the_exact_denoiser_follows_eq_24(rng):
    """Four steps, each an Euler step in sigma_t, as section 3.5 has it."""
    samples = p.sample({target: [] for target in p.TARGETS}, 50, 4, 1.5, torch.Generator())
    rng = torch.Generator()
    x = p.add_noise(p.swiss_roll(50, rng), 1.0, 1.5, rng).double()
    for k in range(4, 0, -1):
        sigma, lower = 1.5 * (k / 4) ** 0.5, 1.5 * ((k - 1) / 4) ** 0.5
        slope = (x - p.exact_denoiser(x, k / 4, sigma_q=1.5)) / sigma
        x = x + (lower - sigma) * slope
    assert (samples["exact", 0] - x).abs().max() < 1e-6


def test_offsets_distances_and_their_summary(rng):
    n = 2000
    data = p.swiss_roll(n, rng)
    samples = {("exact", 0): data.double()}
    for k, target in enumerate(p.TARGETS):
        for i in range(p.NUM_SEEDS):
            samples[target, i] = data + (k + i) * torch.tensor([3.0, -4.0])
    offsets = p.measure_offsets(samples)
    distances, floor = p.measure_distances(samples, rng)
    assert offsets["exact", 0] == (0.0, 1.0)
    assert offsets["x_0", 1] == pytest.approx((10.0, 0.0), abs=1e-5)  # k = 1, i = 1
    half = data.clone()
    half[: n // 2, 1] = -1.3
    share = p.measure_offsets({("exact", 0): data, ("v", 0): half})["v", 0][1]
    assert share == 0.5
    # |shift| / sqrt(2) is the root mean square of the shift over directions
    assert distances["v", 2][0] == pytest.approx(25 / 2**0.5, rel=0.01)
    assert distances["v", 2][1] == distances["v", 2][0] / floor[0]
    assert 0.5 < distances["exact", 0][1] < 2
    summary = p.over_seeds(distances)
    assert list(summary) == list(p.TARGETS)
    mean, error = summary["v"]  # shifts of 3, 4, 5 times 5: mean 20, standard error 5 / sqrt(3)
    assert mean[0] == pytest.approx(20 / 2**0.5, rel=0.01)
    assert error[0] == pytest.approx(5 / 3**0.5 / 2**0.5, rel=0.01)


def test_mean_and_error():
    mean, error = p.mean_and_error(np.array([[1.0, 0.0], [2.0, 0.0], [6.0, 0.0]]))
    assert mean == pytest.approx([3, 0])
    assert error == pytest.approx([(14 / 2 / 3) ** 0.5, 0])


# ----------------------------------------- What is learned ---------------------------------------


def learn(targets, train_steps, seeds=3):
    """The logarithm of the excess error of networks trained for fewer steps than the default."""
    settings = {"sigma_q": 1.0, "train_steps": train_steps, "batch_size": p.BATCH_SIZE}
    settings["learning_rate"] = p.LEARNING_RATE
    predictors = {target: [] for target in targets}
    for target in targets:
        for seed in range(100, 100 + seeds):
            rng = torch.Generator().manual_seed(seed)
            predictors[target].append(p.train(target, rng=rng, **settings)[0])
    bayes = 2 * p.exact_variances(p.TIMES, 1.0)["x_0"]
    rng = torch.Generator().manual_seed(1)
    errors = p.measure_errors(predictors, bayes, 1.0, rng, n=2000)
    return {target: np.log(rows) for target, rows in errors.items()}


def assert_above(logs, worse, better, t):
    """worse has the larger excess error at t, by 5 standard errors of the difference.

    Two or three seeds say little of their spread; so it is taken from all targets together.
    """
    k = p.TIMES.index(t)
    rows = np.array([errors[:, k] for errors in logs.values()])
    spread = (rows.var(axis=1, ddof=1).mean() * 2 / rows.shape[1]) ** 0.5
    gap = logs[worse][:, k].mean() - logs[better][:, k].mean()
    assert gap > 5 * spread, (worse, better, t, gap, spread)


def test_x_0_is_worst_near_the_data_noise_and_v_near_t_1():
    logs = learn(["x_0", "noise", "v", "preconditioned"], 800, seeds=2)
    for other in ("noise", "v", "preconditioned"):
        assert_above(logs, "x_0", other, 0.003)
    for worse in ("noise", "v"):
        for better in ("x_0", "preconditioned"):
            assert_above(logs, worse, better, 1.0)


def test_the_factor_costs_more_than_the_noise_and_the_noise_costs_where_the_factor_is_1():
    logs = learn(["x_{t-dt}", "x_{t-dt}, no noise", "x_0", "x_0, with noise"], 150)
    for t in (0.1, 0.3, 1.0):
        assert_above(logs, "x_0, with noise", "x_0", t)
        assert_above(logs, "x_{t-dt}, no noise", "x_0, with noise", t)
        k = p.TIMES.index(t)
        # where the factor is t / dt, the noise costs less, by 5 standard errors, than it costs x_0
        gap, error = p.mean_and_error((logs["x_{t-dt}"] - logs["x_{t-dt}, no noise"])[:, k])
        cost = (logs["x_0, with noise"] - logs["x_0"])[:, k].mean()
        assert gap + 5 * error < cost


# -------------------------------------- Printing and the figures ---------------------------------


def made_up():
    """Arguments for report, each number recognisable."""
    exact = {"x_{t-dt}": np.arange(1, 8) * 1.5, "x_0": np.arange(1, 8) * 0.25}
    measured = {
        "x_{t-dt}": (np.arange(1, 8) * 2.5, np.full(7, 0.75)),
        "x_0": (np.arange(1, 8) * 0.125, np.full(7, 0.5)),
    }
    errors = {
        target: np.tile([[0.01], [0.02], [0.06]], 7) * (k + 1) for k, target in enumerate(ALL)
    }
    outputs = {target: np.linspace(0.1, 0.7, 7) * (k + 1) for k, target in enumerate(ALL)}
    equality = ((3e-3, 1e-5), (2e-5, 1e-7), (2.98e-3, 1e-5), 2.5e-3)
    distances = {("exact", 0): (0.2, 2.0)}
    offsets = {}
    for k, target in enumerate(p.TARGETS):
        for i in range(p.NUM_SEEDS):
            distances[target, i] = (0.1, 3.0 + k + i)
            offsets[target, i] = (0.04 + i / 100, 0.5)
    args = SimpleNamespace(sigma_q=1.0, num_samples=99, num_steps=9, train_steps=12)
    return exact, measured, errors, outputs, equality, distances, (0.1, 0.02), offsets, args


def test_report_prints_what_it_is_given(capsys):
    p.report(*made_up())
    text = capsys.readouterr().out
    lines = [line.strip() for line in text.splitlines()]

    def after(start, rows=0):
        """The numbers in the line that starts so, or that many rows below it."""
        index = next(i for i, line in enumerate(lines) if line.startswith(start)) + rows
        name = start if not rows else lines[index].split("  ")[0]
        return [float(x) for x in re.findall(r"\d[\d.]*(?:e[+-]\d+)?", lines[index][len(name) :])]

    assert "99 samples, 9 steps" in text
    assert "12 steps of 512" in text
    assert after("t   ") == list(p.TIMES)
    assert after("x_{t-dt}, exact") == pytest.approx(np.arange(1, 8) * 1.5)
    assert after("x_0, exact") == pytest.approx(np.arange(1, 8) * 0.25)
    assert after("x_0, exact", 1) == pytest.approx(np.arange(1, 8) * 0.125)
    assert after("x_0, exact", 2) == [0.5] * 7
    assert after("x_{t-dt}, exact", 1) == pytest.approx(np.arange(1, 8) * 2.5)
    assert after("x_{t-dt}, exact", 2) == [0.8] * 7  # one digit
    assert "what left [-10, 10]^2" in text
    assert after("noise   ") == pytest.approx([9.0] * 7)  # 3 x the mean of 1, 2 and 6 %
    assert after("noise   ", 1) == pytest.approx([5] * 7)  # 3 x 1.53, one digit
    table = lines[next(i for i, line in enumerate(lines) if line.startswith("error of the")) :]
    row = next(line for line in table if line.startswith("v "))
    assert re.findall(r"[\d.]+ x [\d.]+", row) == ["0.400 x 0.03161", "2.800 x 0.7071"]
    assert "is 3.000e-03, (dt/t)^2 |x_0 - denoiser|^2 is 2.000e-05" in text
    assert "2.9800e-03 +- 1.0e-05 (s.e.), and the noise of the bridge is 2.5000e-03" in text
    assert after("exact denoiser") == [2.0]
    assert after("floor") == [0.1, 1.0, 0.2]
    last = [line for line in lines if line.startswith("preconditioned")][-1]
    assert re.findall(r"\d[\d.]*", last) == ["8", "0.6", "0.05", "0.006", "50"]


def test_the_figures_show_what_they_are_given(rng):
    _, measured, errors, _, _, distances, _, offsets, _ = made_up()
    curves = {"x_{t-dt}": np.geomspace(1, 700, 25), "x_0": np.full(25, 2.0)}
    ax = p.draw_variance(np.geomspace(DT, 1, 25), curves, measured).axes[0]
    assert np.array_equal(ax.lines[0].get_ydata(), curves["x_{t-dt}"])
    assert np.array_equal(ax.lines[1].get_ydata(), curves["x_0"])
    assert np.array_equal(ax.lines[2].get_ydata(), np.arange(1, 8) * 2.5)
    assert np.array_equal(ax.lines[3].get_ydata(), np.arange(1, 8) * 0.125)
    assert len(ax.lines) == 4
    assert "up to 350 times" in ax.get_title()
    ax = p.draw_errors(errors).axes[0]
    for k, line in enumerate(ax.lines):
        assert line.get_ydata() == pytest.approx([0.03 * (k + 1)] * 7)
        band = ax.collections[k].get_paths()[0].vertices[:, 1]
        assert (band.min(), band.max()) == pytest.approx((0.01 * (k + 1), 0.06 * (k + 1)))
    data = p.swiss_roll(50, rng)
    samples = dict.fromkeys(distances, data + 0.01)
    samples["noise", 0] = torch.cat([data[:25], data[25:] + 9])
    offsets["exact", 0] = (0.0, 1.0)
    figure = p.draw_samples(samples, distances, offsets, data)
    titles = [ax.get_title() for ax in figure.axes]
    assert ["3 x" in titles[0], "5 x" in titles[2], "2 x" in titles[5]] == [True] * 3
    assert [len(ax.collections[1].get_offsets()) for ax in figure.axes] == [50, 50, 25, 50, 50, 50]
    assert figure.axes[0].texts[0].get_text() == "50% in view"


def test_main_writes_its_figures(tmp_path, capsys):
    small = ["--train-steps", "1", "--num-steps", "2", "--num-samples", "50"]
    p.main([*small, "--sigma-q", "100", "--figures-dir", str(tmp_path)])
    names = ["error-vs-t.jpg", "samples.jpg", "target-variance.jpg"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert not re.search(r"\b(nan|inf)\b", capsys.readouterr().out)
