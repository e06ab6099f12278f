"""Experiment 16 held to references that share no code with it."""

from functools import partial
from statistics import NormalDist

import numpy as np
import one_step as s
import pytest
import torch

PARTS = [(w, NormalDist(center, 0.3)) for w, center in ((0.6, -1.0), (0.4, 1.0))]
X_0 = np.linspace(-3.5, 3.5, 2001)  # a grid for x_0, far into both tails
P_0 = np.array([sum(w * part.pdf(x) for w, part in PARTS) for x in X_0])


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def weights_given(x, t):
    """p(x_0 | x_t = x) on X_0, by Bayes' rule.  x: (n,).  Returns (n, len(X_0)), of sum 1."""
    x_1 = (x[:, None] - (1 - t) * X_0) / t
    weights = P_0 * np.exp(-(x_1**2) / 2)
    return weights / weights.sum(axis=1, keepdims=True)


def velocity(x, t):
    """E[x_0 - x_1 | x_t = x], summed on X_0."""
    mean = weights_given(x, t) @ X_0
    return mean - (x - (1 - t) * mean) / t


def test_data():
    x_0 = s.mixture(100_000, rng())
    assert x_0.shape == (100_000, 1)
    assert abs(x_0.mean() + 0.2) < 5 * 1.05**0.5 / 100_000**0.5
    for point in (-1.2, -0.5, 0.8, 1.3):
        p = sum(w * part.cdf(point) for w, part in PARTS)
        assert abs((x_0 < point).double().mean() - p) < 5 * (p * (1 - p) / 100_000) ** 0.5
    assert s.between(3.0, 7.0, 0.25) == 4


@pytest.mark.parametrize(("t", "r"), [(1.0, 0.3), (0.7, 0.3), (0.5, 0.45)])
def test_flow_map_by_runge_kutta(t, r):
    x = start = np.linspace(-2.5, 2.5, 21)
    h = (t - r) / 150
    for k in range(150):
        time = t - k * h
        k_1 = velocity(x, time)
        k_2 = velocity(x + h / 2 * k_1, time - h / 2)
        k_3 = velocity(x + h / 2 * k_2, time - h / 2)
        k_4 = velocity(x + h * k_3, time - h)
        x = x + h / 6 * (k_1 + 2 * k_2 + 2 * k_3 + k_4)
    np.testing.assert_allclose(s.flow_map(torch.tensor(start), t, r), x, rtol=0, atol=1e-6)


def test_flow_map_to_the_data():
    """To t = 0: quantiles of the base go to quantiles of the data."""
    x_0 = s.flow_map(s.STARTS, 1, 0)
    for k in (3, 700, 2399, 2401, 3996):
        assert sum(w * part.cdf(x_0[k].item()) for w, part in PARTS) == pytest.approx(
            (k + 0.5) / 4000, rel=1e-9
        )
        assert NormalDist().cdf(s.STARTS[k].item()) == pytest.approx((k + 0.5) / 4000, rel=1e-9)


def test_consistent_by_another_quadrature():
    """Sums on a grid of x_0, and a spline through f_{k-1} only where x_1 can come from."""
    x_1 = np.array([-2.0, -0.4, 0.1, 0.3, 1.7])
    grid = np.linspace(-4.5, 4.5, 1501)
    for num_levels in (1, 2, 3, 7):
        values = grid
        for k in range(1, num_levels):
            x_r = (k - 1) / k * grid[:, None] + X_0 / k
            weights = weights_given(grid, k / num_levels)
            values = (weights * np.interp(x_r, grid, values)).sum(axis=1)
        x_r = (num_levels - 1) / num_levels * x_1[:, None] + X_0 / num_levels
        exact = np.interp(x_r, grid, values) @ (P_0 / P_0.sum())  # x_1 tells nothing of x_0
        np.testing.assert_allclose(s.consistent(x_1, num_levels), exact, rtol=0, atol=1e-4)


def test_fixed_points_draw_near_the_map():
    twins = s.flow_map(s.STARTS, 1, 0)
    rms, median = s.errors(s.consistent(s.STARTS, 20), twins)
    assert (rms, median) == pytest.approx((0.185, 0.0726), abs=1e-3)
    rms, median = s.errors(s.consistent(s.STARTS, 100), twins)
    assert (rms, median) == pytest.approx((0.0952, 0.0106), abs=3e-4)


def test_mean_flow_identity_of_the_exact_map():
    """u = v - (t - r) du/dt along dx/dt = -v, by differences of flow_map."""
    x = torch.tensor([-1.7, -0.6, 0.2, 0.9], dtype=torch.float64)
    t, r, step = 0.8, 0.35, 1e-4

    def u(x, t):
        return (s.flow_map(x, t, r) - x) / (t - r)

    v = torch.tensor(velocity(x.numpy(), t))
    change = (u(x - step * v, t + step) - u(x + step * v, t - step)) / (2 * step)
    torch.testing.assert_close(u(x, t), v - (t - r) * change, rtol=0, atol=1e-6)


# Of data N(0, .3^2) all is linear: std of x_t, the map, the velocity, the fixed point.
def std(t):
    return ((1 - t) ** 2 * 0.09 + t**2) ** 0.5


def covariance(t, r):
    return (1 - t) * (1 - r) * 0.09 + t * r


def exact_map(t, r):
    """The slope of u(x, t, r)."""
    at_t = (t - (1 - t) * 0.09) / std(t) ** 2  # of -v
    return torch.where(t > r, (std(r) / std(t) - 1) / (t - r).clamp(min=1e-9), -at_t)


def fixed_point(t, r, num_levels=4):
    """The slope of u(x, t, 0) for f_k(x) = c_k x, where c_k = c_{k-1} E[x_{k-1} | x_k] / x_k."""
    slopes = [1.0]
    for k in range(1, num_levels + 1):
        ratio = covariance(k / num_levels, (k - 1) / num_levels) / std(k / num_levels) ** 2
        slopes.append(slopes[-1] * ratio)
    f = torch.tensor(slopes)[(t * num_levels).round().long()]
    return torch.where(t > 0, (f - 1) / t.clamp(min=1e-9), 0.0)


@pytest.mark.parametrize(
    ("loss", "slope"),
    [
        (s.velocity_loss, exact_map),
        (partial(s.consistency_loss, num_levels=4), fixed_point),
        (s.mean_flow_loss, exact_map),
    ],
)
def test_losses_stop_at_their_fixed_points(loss, slope):
    """By Monte Carlo, with x_0 - x_1 in place of v: the mean gradient is 0; not so 5 % away."""
    for size, still in ((0.0, True), (0.05, False)):
        gradients, generator = [], rng(1)
        for _ in range(30):
            theta = torch.tensor([size, 0.0], requires_grad=True)

            def u(x, t, r, theta=theta):
                return (slope(t, r) * (1 + theta[0]) + theta[1] * t) * x

            x_0, x_1 = (
                0.3 * torch.randn(5000, 1, generator=generator),
                torch.randn(5000, 1, generator=generator),
            )
            loss(u, x_0, x_1, generator).backward()
            gradients.append(theta.grad)
        gradients = torch.stack(gradients)
        z = gradients.mean(dim=0) / (gradients.std(dim=0) / 30**0.5)
        assert (z.abs().max() < 5) == still, z


def test_training(monkeypatch):
    """Of the velocity, in seconds: near E[x_0 - x_1 | x_t]."""
    network = s.train(s.velocity_loss, train_steps=300, rng=rng())
    x, t = torch.linspace(-1.5, 1.5, 7)[:, None], torch.full((7, 1), 0.6)
    exact = velocity(x[:, 0].double().numpy(), 0.6)
    assert np.abs(network(x, t, t)[:, 0].numpy() - exact).max() < 0.3
    steps = []

    class Counted(torch.optim.lr_scheduler.OneCycleLR):
        def step(self, *args):
            steps.append(args)
            super().step(*args)

    monkeypatch.setattr(torch.optim.lr_scheduler, "OneCycleLR", Counted)
    again = s.train(s.velocity_loss, train_steps=300, rng=rng())
    assert torch.equal(network(x, t, t), again(x, t, t))
    assert len(steps) == 301  # once when it is made


def test_steps():
    """With a u that shows all it is given; two and three steps by hand."""

    def u(x, t, r):
        return 10 * t + 100 * r + x

    def jump(x, t, r):
        return x + (t - r) * (10 * t + 100 * r + x)

    x_1 = torch.tensor([0.5, -1.0], dtype=torch.float64)
    x, half = x_1.clone(), 1 / 2
    euler = x + half * (110 + x)
    euler = euler + half * (55 + euler)
    torch.testing.assert_close(s.sample(s.euler, u, x_1, 2), euler)
    torch.testing.assert_close(s.sample(s.mean_flow, u, x_1, 2), jump(jump(x, 1, half), half, 0))
    again = jump(x, 1, 0) / 3 + 2 * x_1 / 3
    again = 2 * jump(again, 2 / 3, 0) / 3 + x_1 / 3
    torch.testing.assert_close(s.sample(s.consistency, u, x_1, 3), jump(again, 1 / 3, 0))


def test_errors_and_learning(monkeypatch):
    rms, median = s.errors(torch.tensor([1.0, 5.0, 2.0]), torch.tensor([1.0, 2.0, 6.0]))
    assert (rms, median) == pytest.approx(((25 / 3) ** 0.5, 3.0))
    calls = []
    monkeypatch.setattr(s, "train", lambda *args, **kwargs: calls.append((*args, kwargs)))
    networks = s.learn(7, train_steps=3, rng=None)
    assert [step for _, step in networks.values()] == [
        *(s.euler, s.consistency, s.consistency, s.mean_flow)
    ]
    names = ["velocity", "consistency, 7 levels", "consistency, 100 levels", "MeanFlow"]
    assert [*networks] == names
    losses = [call[0] for call in calls]
    assert (losses[0], losses[3]) == (s.velocity_loss, s.mean_flow_loss)
    assert [loss.keywords["num_levels"] for loss in losses[1:3]] == [7, 100]
    assert all(kwargs == {"train_steps": 3, "rng": None} for _, kwargs in calls)


def test_drawn():
    x = [k + torch.arange(4000, dtype=torch.float64) for k in range(4)]
    samples = {"velocity": x[0], "consistency, 5 levels": x[1]}
    axes = s.draw_maps(samples, {"consistency, 5 levels": x[2]}, x[3]).axes
    for ax, (name, x_0) in zip(axes, samples.items()):
        lines = {line.get_label(): line for line in ax.lines}
        assert ax.get_title() == name
        for label, y in [("the flow's map, exact", x[3]), ("network", x_0)]:
            assert np.array_equal(lines[label].get_xydata(), np.stack([s.STARTS, y], axis=1))
        assert ("perfect training" in lines) == (name in "consistency, 5 levels")
    assert np.array_equal(lines["perfect training"].get_ydata(), x[2])

    one_step = {"velocity": 9.0, "consistency, 5 levels": 8.0, "MeanFlow": 7.0}
    (ax,) = s.draw_errors({2: 6.0, 5: 5.0}, {1: 4.0, 3: 3.0}, one_step).axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in ax.lines}
    assert lines["consistency, perfect training, one step"] == [[2, 6], [5, 5]]
    assert lines["consistency, network, one step"] == [[5, 8]]
    assert lines["velocity, network, Euler"] == [[1, 4], [3, 3]]
    assert [y for _, y in lines["MeanFlow, network, one step"]] == [7, 7]


def test_main(tmp_path, monkeypatch):
    kept, printed = {}, []

    def spy(*args, original=s.learn, **kwargs):
        kept.update(args=(*args, kwargs["train_steps"]), networks=original(*args, **kwargs))
        return kept["networks"]

    monkeypatch.setattr(s, "learn", spy)
    monkeypatch.setattr(s, "LEVELS", [2, 5, 100])
    monkeypatch.setattr(s, "EULER_STEPS", [1, 3])
    monkeypatch.setattr(s, "table", printed.append)
    s.main(f"--train-steps 3 --num-levels 4 --figures-dir {tmp_path}".split())
    assert kept["args"] == (4, 3)
    twins = s.flow_map(s.STARTS, 1, 0)
    (heading, *rows), euler, levels = printed
    assert heading[1:] == [
        *("RMS", "median", "two steps: RMS", "median", "perfect, one step: RMS", "median")
    ]
    exact = rows.pop()
    half = s.flow_map((twins + s.STARTS) / 2, 0.5, 0)  # half way back to x_1, and down again
    assert exact == [
        *("exact map, as consistency", "0.0000", "0.0000"),
        *(f"{error:.4f}" for error in s.errors(half, twins)),
        *("", ""),
    ]
    assert [row[0] for row in rows] == [*kept["networks"]]
    for row, (name, (network, step)) in zip(rows, kept["networks"].items()):
        x_0s = [s.sample(step, network, s.STARTS, n) for n in (1, 2)]
        if "levels" in name:
            x_0s.append(s.consistent(s.STARTS, int(name.split()[1])))
        numbers = [f"{error:.4f}" for x_0 in x_0s for error in s.errors(x_0, twins)]
        assert row[1:] == [*numbers, *[""] * (6 - len(numbers))]
        assert len(set(numbers)) == len(numbers)
    network, _ = kept["networks"]["velocity"]
    rms = [s.errors(s.sample(s.euler, network, s.STARTS, n), twins)[0] for n in (1, 3)]
    assert euler == [["Euler steps", "1", "3"], ["RMS", *(f"{e:.4f}" for e in rms)]]
    rms = [s.errors(s.consistent(s.STARTS, n), twins)[0] for n in (2, 4, 5, 100)]
    exact = [["levels, perfect", "2", "4", "5", "100"], ["RMS", *(f"{e:.4f}" for e in rms)]]
    assert levels == exact
    assert {path.stem for path in tmp_path.iterdir()} == {"maps", "error"}
