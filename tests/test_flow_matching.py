"""Experiment 4: the exact velocity against brute force, the flow step by step, and how well the default learns."""

import math
from collections import deque

import numpy as np
import oracles
import pytest
import torch
from PIL import Image

pytestmark = pytest.mark.filterwarnings("error")

TIMES = (0.05, 0.2, 0.4, 0.6, 0.8, 0.95)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def rng():
    return torch.Generator().manual_seed(11)


def assert_zero_mean(values):
    """values: (n, ...), independent rows: their mean is 0 within 5 standard errors."""
    assert torch.all(values.mean(dim=0).abs() <= 5 * values.std(dim=0) / len(values) ** 0.5)


def at_time(flow_matching, n, t, rng):
    return (t * flow_matching.annulus(n, rng) + (1 - t) * flow_matching.spiral(n, rng)).double()


# ------------------------------------ The two distributions and the pairs -------------------------


def test_annulus_law(flow_matching, rng):
    x = flow_matching.annulus(10**6, rng).double()
    assert x.shape == (10**6, 2)
    r = x.norm(dim=1)
    assert 2.5 - 1e-5 <= r.min() <= r.max() <= 3 + 1e-5
    assert_zero_mean(x)
    assert_zero_mean((r - 2.75) / 0.25)
    assert_zero_mean(((r - 2.75) / 0.25) ** 2 - 1 / 3)
    angle = torch.atan2(x[:, 1], x[:, 0])
    for k in (1, 2, 3):
        assert_zero_mean(torch.stack([(k * angle).cos(), (k * angle).sin(), r * (k * angle).cos()], dim=1))


def test_spiral_law(flow_matching, rng):
    """Moments against those of theta uniform on [0, 6 pi]; the characteristic function by a fine sum over theta."""
    x = flow_matching.spiral(10**6, rng).double()
    assert x.shape == (10**6, 2)
    theta = 6 * math.pi * (torch.arange(100_000, dtype=torch.double) + 0.5) / 100_000
    curve = torch.stack([theta.cos(), theta.sin()], dim=1) * theta[:, None] / (2 * math.pi)
    assert_zero_mean(x - curve.mean(dim=0))
    assert_zero_mean(x.square().sum(dim=1) - 3 - 0.02)
    for k in ((1.0, 0.0), (0.0, 2.0), (3.0, 4.0), (9.0, -5.0)):
        k = torch.tensor(k, dtype=torch.double)
        blur = math.exp(-(0.1**2) * float(k @ k) / 2)
        assert_zero_mean((x @ k).cos() - blur * (curve @ k).cos().mean())
        assert_zero_mean((x @ k).sin() - blur * (curve @ k).sin().mean())


def test_random_pairs(flow_matching, rng):
    n = 10**5
    x_t, t, target = flow_matching.random_pairs(n, rng)
    assert 0 <= t.min() < 1e-3
    assert 1 - 1e-3 < t.max() < 1
    assert abs(float((t < 0.5).double().mean()) - 0.75) <= 1 / n
    assert abs(float((t < 0.25).double().mean()) - 0.375) <= 1 / n
    assert abs(float((t < 0.75).double().mean()) - 0.875) <= 1 / n
    x_0, x_1 = x_t + t[:, None] * target, x_t - (1 - t[:, None]) * target
    radius = x_1.norm(dim=1)
    assert 2.5 - 1e-4 < radius.min() < radius.max() < 3 + 1e-4
    assert float(flow_matching.distance_to_curve(x_0).max()) < 0.1 * 6 + 0.1
    assert_zero_mean((x_0 * x_1).double())
    assert_zero_mean((x_0 * x_1.flip(1)).double())
    assert_zero_mean(x_1.double() * (t[:, None].double() - 0.375))


# ---------------------------------------- The exact velocity --------------------------------------


@pytest.mark.parametrize("t", TIMES)
def test_exact_velocity_agrees_with_a_sum_over_three_dimensions(flow_matching, rng, t):
    """To 1e-6, at the default resolution and at finer ones."""
    x_t = at_time(flow_matching, 40, t, rng)
    fine = flow_matching.exact_velocity(x_t, t, num_panels=128, num_radii=40)
    brute = np.array([oracles.spiral_velocity(x, t) for x in x_t[:3].numpy()])
    assert np.abs(fine[:3].numpy() - brute).max() < 1e-6
    assert (flow_matching.exact_velocity(x_t, t) - fine).abs().max() < 1e-6
    finer = flow_matching.exact_velocity(x_t[:10], t, num_panels=256, num_radii=80)
    assert (fine[:10] - finer).abs().max() < 1e-6


def test_residual_of_the_exact_velocity_is_orthogonal_to_everything(flow_matching, rng):
    x_t, t, target = flow_matching.random_pairs(4000, rng)
    residual = target.double() - flow_matching.exact_velocity(x_t, t)
    x, t = x_t.double(), t.double()[:, None]
    for g in (torch.ones_like(x), x, x.flip(1), t * x, (3 * x).sin(), (3 * x).cos(), t.expand_as(x)):
        assert_zero_mean(residual * g)


def test_exact_velocity_at_the_ends(flow_matching, rng):
    x = flow_matching.spiral(20, rng).double()
    assert (flow_matching.exact_velocity(x, 0.0) - x).abs().max() < 1e-6
    with pytest.raises(ValueError, match="t is not in"):
        flow_matching.exact_velocity(x, 1.0)


# --------------------------------------------- The flow -------------------------------------------


@pytest.mark.parametrize("num_steps", [1, 2, 7])
def test_flow_of_known_velocities(flow_matching, rng, num_steps):
    x_1, c = torch.randn(9, 2, generator=rng, dtype=torch.double), torch.tensor([2.0, -1.0], dtype=torch.double)
    times, start = [], x_1.clone()

    def velocity(x_t, t):
        times.append(t)
        return x_t - c

    steps = list(flow_matching.flow(velocity, x_1, num_steps))
    assert torch.equal(x_1, start)
    assert times == [k / num_steps for k in range(num_steps, 0, -1)]
    assert len(steps) == num_steps
    assert (steps[-1] - c - (1 + 1 / num_steps) ** num_steps * (x_1 - c)).abs().max() < 1e-12
    x_0 = deque(flow_matching.flow(lambda x_t, t: c, x_1, num_steps), maxlen=1).pop()
    assert (x_0 - x_1 - c).abs().max() < 1e-12


def test_distances(flow_matching, rng):
    theta = 6 * math.pi * torch.rand(50, generator=rng)
    line = flow_matching.curve(theta)
    assert float(flow_matching.distance_to_curve(line).max()) < 0.01  # half the spacing of the 4000 points
    far = torch.tensor([[100.0, 0.0]])
    assert float(flow_matching.distance_to_curve(far)) == pytest.approx(97.0, abs=0.01)
    a, shift = torch.randn(500, 2, generator=rng), torch.tensor([3.0, -4.0])
    assert flow_matching.sliced_wasserstein(a, a[torch.randperm(500, generator=rng)]) < 1e-5
    assert flow_matching.sliced_wasserstein(a, a + shift) == pytest.approx(5 / 2**0.5, rel=1e-5)


# ------------------------------------------- The network ------------------------------------------


def test_velocity_shapes_and_ends(flow_matching, rng):
    velocity, x_t = flow_matching.Velocity(), torch.randn(5, 2, generator=rng)
    outs = [velocity(x_t, t) for t in (0.0, 1.0)]
    assert outs[0].shape == (5, 2)
    assert (outs[0] - outs[1]).abs().min() > 1e-5
    assert torch.equal(outs[1], velocity(x_t, torch.ones(5)))


def test_training_is_deterministic_private_and_lowers_the_loss(flow_matching):
    state, runs = torch.get_rng_state(), []
    for seed in (3, 3, 4):
        rng = torch.Generator().manual_seed(seed)
        runs.append(flow_matching.train(train_steps=150, batch_size=256, learning_rate=0.005, rng=rng))
    assert torch.equal(state, torch.get_rng_state())
    (first, losses), (second, again), (other, _) = runs
    weights = [torch.cat([p.ravel() for p in net.state_dict().values()]) for net in (first, second, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert losses == again
    assert len(losses) == 150
    error = (np.var(losses[:20]) / 20 + np.var(losses[-20:]) / 20) ** 0.5
    assert np.mean(losses[:20]) - np.mean(losses[-20:]) > 3 * error


@pytest.fixture(scope="module")
def learned(flow_matching):
    torch.set_num_threads(1)
    rng = torch.Generator().manual_seed(0)
    return flow_matching.train(train_steps=9000, batch_size=512, learning_rate=0.005, rng=rng)[0]


@pytest.fixture(scope="module")
def generated(flow_matching, learned):
    """20,000 points after 100 steps."""
    x_0 = deque(
        flow_matching.flow(learned, flow_matching.annulus(20_000, torch.Generator().manual_seed(5)), 100), maxlen=1
    ).pop()
    return x_0


def test_default_is_close_to_the_exact_velocity(flow_matching, learned, rng):
    errors = []
    for t in TIMES:
        x_t = at_time(flow_matching, 500, t, rng).float()
        exact = flow_matching.exact_velocity(x_t, t)
        errors.append(float((learned(x_t, t) - exact).square().sum() / exact.square().sum()))
    assert np.mean(errors) <= 0.025


def test_default_ends_on_the_spiral(flow_matching, generated, rng):
    true = flow_matching.distance_to_curve(flow_matching.spiral(10_000, rng)).mean()
    assert float(flow_matching.distance_to_curve(generated[:10_000]).mean() / true) <= 1.15


@pytest.mark.parametrize(("n", "bound"), [(10_000, 2.0), (2_000, 1.1)])
def test_default_is_as_far_from_data_as_data(flow_matching, generated, rng, n, bound):
    """D / F of oracles.sliced_ratio, all 20,000 points in sets of n, 30 data sets; bound within 2 standard errors."""
    data = np.stack([flow_matching.spiral(n, rng).numpy() for _ in range(30)])
    ratio, error = oracles.sliced_ratio(generated.reshape(-1, n, 2).numpy(), data)
    assert ratio <= bound + 2 * error


# ------------------------------------------- The figures ------------------------------------------


def test_main_writes_exactly_its_figures(flow_matching, tmp_path, assert_jpegs, monkeypatch):
    exact_velocity = flow_matching.exact_velocity  # a coarse quadrature will do for figures
    monkeypatch.setattr(flow_matching, "exact_velocity", lambda x_t, t: exact_velocity(x_t, t, 8, 4))
    small = ["--train-steps", "20", "--batch-size", "64", "--num-steps", "20", "--num-samples", "200"]
    flow_matching.main([*small, "--figures-dir", str(tmp_path)])
    with Image.open(tmp_path / "scatter.gif") as gif:
        frames = []
        for k in range(gif.n_frames):
            gif.seek(k)
            frames.append((np.asarray(gif.convert("RGB")).astype(int), gif.info["duration"]))
    assert len(frames) > 10
    assert np.ptp(frames[0][0]) > 200
    held = sum(time for frame, time in frames if np.array_equal(frame, frames[-1][0]))
    assert held >= 5 * frames[0][1]
    (tmp_path / "scatter.gif").unlink()
    assert_jpegs(tmp_path, ["data.jpg", "train_loss.jpg", "trajectories.jpg"])
