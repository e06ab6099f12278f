"""Experiment 4: the exact velocity against brute force, the flow step by step, and how well the
default learns.
"""

import math
import re
from collections import deque

import numpy as np
import oracles
import pytest
import torch
from conftest import texts

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
        assert_zero_mean(
            torch.stack([(k * angle).cos(), (k * angle).sin(), r * (k * angle).cos()], dim=1)
        )


def test_spiral_law(flow_matching, rng):
    """Moments against those of theta uniform on [0, 6 pi]; the characteristic function by a fine
    sum over theta.
    """
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


def test_linear_flow_moves_at_its_velocity(flow_matching, rng):
    x_0, x_1 = torch.randn(2, 9, 2, generator=rng).double()
    t = torch.rand(9, generator=rng).double()
    x_t, velocity = flow_matching.linear_flow(x_0, x_1, t)
    later, _ = flow_matching.linear_flow(x_0, x_1, t - 0.001)  # time runs towards 0
    assert (later - x_t - 0.001 * velocity).abs().max() < 1e-12
    assert torch.equal(flow_matching.linear_flow(x_0, x_1, 0.0)[0], x_0)
    assert torch.equal(flow_matching.linear_flow(x_0, x_1, 1.0)[0], x_1)


def test_draw_times_has_its_density(flow_matching, rng):
    n = 10**5
    t = flow_matching.draw_times(n, rng)
    assert 0 <= t.min() < 1e-3
    assert 1 - 1e-3 < t.max() <= 1
    for below, share in [(0.25, 0.25), (0.5, 0.5), (0.65, 0.6), (0.8, 0.7), (0.9, 0.85)]:
        assert abs(float((t < below).double().mean()) - share) <= 1.5 / n  # they are stratified
    few = torch.cat([flow_matching.draw_times(1, rng) for _ in range(2000)])
    assert abs(float((few < 0.8).double().mean()) - 0.7) < 5 * (0.21 / 2000) ** 0.5


def test_draw_x_t_is_between_the_two(flow_matching, rng):
    x_t = flow_matching.draw_x_t(10**5, 0.25, rng).double()
    squares = 0.75**2 * 3.02 + 0.25**2 * (2.75**2 + 1 / 48)  # E|x_0|^2 and E|x_1|^2
    assert_zero_mean(x_t.square().sum(dim=1) - squares)
    assert_zero_mean(x_t - torch.tensor([0, -0.75 / (2 * math.pi)]))


# ---------------------------------------- The exact velocity --------------------------------------


@pytest.mark.parametrize("t", TIMES)
def test_exact_velocity_agrees_with_a_sum_over_three_dimensions(flow_matching, rng, t):
    x_t = flow_matching.draw_x_t(3, t, rng)
    brute = np.array([oracles.spiral_velocity(x, t) for x in x_t.double().numpy()])
    exact = flow_matching.exact_velocity(x_t, t)
    assert exact.dtype == torch.double
    assert np.abs(exact.numpy() - brute).max() < 1e-6
    fast = flow_matching.exact_velocity(x_t, t, spacing=0.02)
    assert np.abs(fast.numpy() - brute).max() < 5e-5


@pytest.mark.parametrize("t", [0.02, 0.5, 0.98])
def test_exact_velocity_does_not_hang_on_the_number_of_nodes(flow_matching, rng, monkeypatch, t):
    x_t = flow_matching.draw_x_t(200, t, rng)
    exact = flow_matching.exact_velocity(x_t, t)
    finer = flow_matching.quadrature(200)
    monkeypatch.setattr(flow_matching, "quadrature", lambda: finer)
    assert (flow_matching.exact_velocity(x_t, t, spacing=0.001) - exact).abs().max() < 2e-6


@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_residual_of_the_exact_velocity_is_orthogonal_to_everything(flow_matching, rng, t):
    n = 4000
    x_0, x_1 = flow_matching.spiral(n, rng), flow_matching.annulus(n, rng)
    x, target = flow_matching.linear_flow(x_0, x_1, t)
    residual = target.double() - flow_matching.exact_velocity(x, t)
    x = x.double()
    for g in (torch.ones_like(x), x, x.flip(1), (3 * x).sin(), (3 * x).cos()):
        assert_zero_mean(residual * g)


def test_exact_velocity_at_the_ends(flow_matching, rng):
    x = flow_matching.spiral(20, rng).double()
    # At t = 0 nothing is known of x_1, and E[x_1] = 0; at t = 1 nothing of x_0.
    assert (flow_matching.exact_velocity(x, 0.001) - x).abs().max() < 0.2
    mean_x_0 = torch.tensor([0, -1 / (2 * math.pi)], dtype=torch.double)
    at_1 = flow_matching.exact_velocity(x, 1.0)
    assert (at_1 - (mean_x_0 - x)).abs().max() < 1e-9
    inside = 2.7 * x / x.norm(dim=1, keepdim=True)
    assert (flow_matching.exact_velocity(inside, 0.99) - (mean_x_0 - inside)).abs().max() < 0.05


# --------------------------------------------- The flow -------------------------------------------


@pytest.mark.parametrize("num_steps", [1, 2, 7])
def test_flow_of_known_velocities(flow_matching, rng, num_steps):
    x_1, c = (
        torch.randn(9, 2, generator=rng, dtype=torch.double),
        torch.tensor([2.0, -1.0], dtype=torch.double),
    )
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


# ------------------------------------------ Measuring -------------------------------------------


def test_nearest_on_curve(flow_matching, rng):
    theta = 6 * math.pi * torch.tensor([0.05, 0.31, 0.69, 0.95], dtype=torch.double)
    x = flow_matching.curve(theta)
    distance, tenth = flow_matching.nearest_on_curve(x)
    assert float(distance.max()) < 0.01  # half the spacing of the 4001 points
    assert tenth.tolist() == [0, 3, 6, 9]
    far = torch.tensor([[100.0, 0.0]])
    assert float(flow_matching.nearest_on_curve(far)[0][0]) == pytest.approx(97.0, abs=0.01)
    shares = flow_matching.shares_along_curve(x[[0, 0, 1, 3]])
    assert shares.tolist() == [0.5, 0, 0, 0.25, 0, 0, 0, 0, 0, 0.25]
    assert flow_matching.share_error(900) == pytest.approx(0.01)


def test_shares_of_data_are_tenths(flow_matching, rng):
    n = 50_000
    shares = flow_matching.shares_along_curve(flow_matching.spiral(n, rng))
    # The noise moves some points across the ends of the tenths: few, and as many back.
    assert float((shares - 0.1).abs().max()) < 5 * (0.09 / n) ** 0.5


def test_velocity_error_is_relative_to_the_exact_one(flow_matching):
    for factor in (0.0, 1.0, 1.25, 3.0):
        error = flow_matching.velocity_error(
            lambda x, t, factor=factor: factor * flow_matching.exact_velocity(x, t),
            0.4,
            torch.Generator().manual_seed(1),
            n=50,
        )
        assert error == pytest.approx((factor - 1) ** 2, rel=1e-9, abs=1e-20)


def test_measured_velocity_has_every_time_and_the_mean(flow_matching, monkeypatch):
    monkeypatch.setattr(flow_matching, "velocity_error", lambda velocity, t, rng: t**2)
    errors = flow_matching.measure_velocity(None, None)
    squares = [t**2 for t in TIMES]
    assert errors == dict(zip([*TIMES, "mean"], [*squares, sum(squares) / 6]))
    assert flow_matching.final_loss([9.0] * 100 + [1.0] * 250 + [2.0] * 250) == 1.5


def test_irreducible_loss_is_what_the_law_of_total_variance_leaves(flow_matching, rng):
    """E|x_0 - x_1 - v_t|^2 = E|x_0 - x_1|^2 - E|v_t|^2, with |v_t| from other draws."""
    loss, error = flow_matching.irreducible_loss(rng)
    squares = []
    for t in flow_matching.draw_times(200, rng).tolist():
        x_t = flow_matching.draw_x_t(25, t, rng)
        squares.append(flow_matching.exact_velocity(x_t, t, spacing=0.02).square().sum(dim=1))
    squares = torch.cat(squares)
    total = 3.02 + 2.75**2 + 1 / 48
    other = float(squares.std()) / len(squares) ** 0.5
    assert abs(loss - (total - float(squares.mean()))) < 5 * (error**2 + other**2) ** 0.5
    assert 0.05 < error < 0.15


def test_run_flow_keeps_the_first_paths(flow_matching, monkeypatch):
    monkeypatch.setattr(flow_matching, "NUM_DRAWN", 3)
    x_1 = torch.arange(10.0).reshape(5, 2)
    x_0, paths = flow_matching.run_flow(lambda x, t: x + t, x_1, 4, "")
    steps = list(flow_matching.flow(lambda x, t: x + t, x_1, 4))
    assert torch.equal(x_0, steps[-1])
    assert torch.equal(paths, torch.stack([x[:3] for x in (x_1, *steps)]))


def test_measured_samples_stand_beside_data(flow_matching, rng):
    n = 300
    samples = {10: flow_matching.annulus(n, rng), 20: flow_matching.spiral(n, rng)}
    state = rng.get_state()
    rows, data_row = flow_matching.measure_samples(samples, rng)
    rng.set_state(state)
    data = [flow_matching.spiral(n, rng) for _ in range(11)]
    seen = [oracles.sliced_quantiles(x.numpy()) for x in data]
    pairs = [np.mean((a - b) ** 2) for a, b in zip(seen, seen[1:])]
    line = flow_matching.curve(torch.linspace(0, 6 * math.pi, 4000))
    away = {
        key: float(torch.cdist(x, line).min(dim=1).values.mean())
        for key, x in [("data", data[0]), *samples.items()]
    }
    expected = (away["data"], np.mean(pairs) ** 0.5, np.std(np.sqrt(pairs), ddof=1))
    assert list(data_row) == ["away", "sliced", "spread"]
    assert tuple(data_row.values()) == pytest.approx(expected, rel=1e-4)
    for key, x in samples.items():
        own = oracles.sliced_quantiles(x.numpy())
        sliced = np.mean([np.mean((own - other) ** 2) for other in seen]) ** 0.5
        ratios = away[key] / away["data"], sliced / np.mean(pairs) ** 0.5
        assert list(rows[key]) == ["away", "away_ratio", "sliced", "sliced_ratio"]
        expected = away[key], ratios[0], sliced, ratios[1]
        assert tuple(rows[key].values()) == pytest.approx(expected, rel=1e-4)
    assert list(rows) == [10, 20]


# ------------------------------------------- The network ------------------------------------------


def test_velocity_shapes_and_ends(flow_matching, rng):
    velocity, x_t = flow_matching.Velocity(), torch.randn(5, 2, generator=rng)
    outs = [velocity(x_t, t) for t in (0.0, 1.0)]
    assert outs[0].shape == (5, 2)
    assert (outs[0] - outs[1]).abs().min() > 1e-5
    assert torch.equal(outs[1], velocity(x_t, torch.ones(5)))


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_a_network_that_says_nothing_leaves_the_best_linear_guess(flow_matching, rng, t):
    """And c_out is the size of what it misses.  Both by linear regression on many pairs."""
    velocity = flow_matching.Velocity().requires_grad_(False)
    velocity.layers[-1].weight.zero_()
    velocity.layers[-1].bias.zero_()
    c_skip = float(velocity(torch.ones(1, 2), t)[0, 0])
    velocity.layers[-1].bias.fill_(1.0)
    c_out = float(velocity(torch.ones(1, 2), t)[0, 0]) - c_skip
    x_0, x_1 = flow_matching.spiral(10**5, rng), flow_matching.annulus(10**5, rng)
    x_t, target = flow_matching.linear_flow(x_0, x_1, t)
    slope = float((x_t * target).mean() / x_t.square().mean())
    # The variances of the network are about those of the data: to 1 % and a percent of sampling.
    assert c_skip == pytest.approx(slope, abs=0.02)
    assert c_out == pytest.approx(float((target - slope * x_t).std()), rel=0.02)


def test_training_is_deterministic_and_lowers_the_loss(flow_matching):
    runs = []
    for seed in (3, 3, 4):
        rng = torch.Generator().manual_seed(seed)
        runs.append(
            flow_matching.train(train_steps=150, batch_size=256, learning_rate=0.005, rng=rng)
        )
    (first, losses), (second, again), (other, _) = runs
    weights = [
        torch.cat([p.ravel() for p in net.state_dict().values()]) for net in (first, second, other)
    ]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert losses == again
    assert len(losses) == 150
    error = (np.var(losses[:20]) / 20 + np.var(losses[-20:]) / 20) ** 0.5
    assert np.mean(losses[:20]) - np.mean(losses[-20:]) > 3 * error


@pytest.fixture(scope="module")
def learned(flow_matching, tmp_path_factory):
    """The network that the script trains by default."""
    torch.set_num_threads(1)
    args = flow_matching.parse_arguments(["--figures-dir", str(tmp_path_factory.mktemp("figures"))])
    return flow_matching.learn(args)[0]


@pytest.fixture(scope="module")
def generated(flow_matching, learned):
    """20 000 points after 200 steps."""
    x_1 = flow_matching.annulus(20_000, torch.Generator().manual_seed(5))
    return deque(flow_matching.flow(learned, x_1, 200), maxlen=1).pop()


def test_default_is_close_to_the_exact_velocity(flow_matching, learned, rng):
    assert flow_matching.measure_velocity(learned, rng)["mean"] <= 0.018


def test_default_ends_on_the_spiral(flow_matching, generated, rng):
    away, _ = flow_matching.nearest_on_curve(generated)
    true, _ = flow_matching.nearest_on_curve(flow_matching.spiral(20_000, rng))
    assert float(away.mean() / true.mean()) <= 1.07


def test_default_gives_every_tenth_of_the_spiral_its_share(flow_matching, generated):
    """Within 8 % of a tenth, and two standard errors of what 20 000 points can tell."""
    shares = flow_matching.shares_along_curve(generated)
    assert float((shares - 0.1).abs().max()) <= 0.008 + 2 * (0.09 / 20_000) ** 0.5


def test_default_is_as_far_from_data_as_data(flow_matching, generated, rng):
    """D / F of oracles.sliced_ratio, 2 sets of 10 000 points and 10 data sets; to 2 s.e."""
    data = np.stack([flow_matching.spiral(10_000, rng).numpy() for _ in range(10)])
    ratio, error = oracles.sliced_ratio(generated.reshape(-1, 10_000, 2).numpy(), data)
    assert ratio <= 1.2 + 2 * error


# ------------------------------------ Printing and the figures ----------------------------------
SETS = ("data", "learned velocity", "exact velocity")


def test_report_prints_what_was_measured(flow_matching, capsys):
    class Args:
        num_samples = 900

    errors = {0.05: 0.011, 0.95: 0.033, "mean": 0.077}
    names = ["away", "away_ratio", "sliced", "sliced_ratio"]
    rows = {10: dict(zip(names, (0.5, 2.5, 1.5, 3.5)))}
    rows[200] = dict(zip(names, (0.75, 1.25, 0.25, 0.55)))
    shares = {label: torch.arange(1, 11) / 100 + i / 1000 for i, label in enumerate(SETS)}
    shares_se = {label: 0.001 * (i + 1) for i, label in enumerate(SETS)}
    data_row = {"away": 0.25, "sliced": 0.5, "spread": 0.125}
    flow_matching.report(errors, 1.25, (1.75, 0.375), rows, data_row, shares, shares_se, Args)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[1:] == ["0.05", "0.95", "mean"]
    assert re.findall(r"[\d.]+%", lines[1]) == ["1.10%", "3.30%", "7.70%"]
    assert re.findall(r"\d\.\d+", lines[2]) == ["1.250", "1.750", "0.375"]
    assert "900 samples" in lines[3]
    assert re.findall(r"\d\.\d+", lines[4]) == ["0.2500", "0.5000", "0.1250"]
    assert lines[5].split()[0] == "10"
    assert re.findall(r"\d\.\d+", lines[5]) == ["0.5000", "2.50", "1.5000", "3.50"]
    assert lines[6].split()[0] == "200"
    assert re.findall(r"\d\.\d+", lines[6]) == ["0.7500", "1.25", "0.2500", "0.55"]
    for i, (line, label) in enumerate(zip(lines[8:], SETS)):
        assert line.startswith(label)
        numbers = [float(x) for x in re.findall(r"\d\.\d+", line)]
        expected = [*(k / 100 + i / 1000 for k in range(1, 11)), 0.001 * (i + 1)]
        assert numbers == pytest.approx(expected)


def test_figures_draw_what_was_measured(flow_matching, rng):
    axes = flow_matching.draw_loss([3.0, 2.0, 1.0], (1.75, 0.375)).axes[0]
    drawn = {line.get_label(): line.get_ydata() for line in axes.lines}
    assert list(drawn["loss of each step"]) == [3.0, 2.0, 1.0]
    assert drawn["irreducible part, 1.75 $\\pm$ 0.38 (s.e.)"] == [1.75, 1.75]

    shares = {label: torch.arange(1, 11) / 100 + i / 1000 for i, label in enumerate(SETS)}
    shares_se = {label: 0.001 * (i + 1) for i, label in enumerate(SETS)}
    axes = flow_matching.draw_shares(shares, shares_se).axes[0]
    for bars, label in zip(axes.containers, SETS):
        assert bars.get_label().startswith(label)
        np.testing.assert_array_equal(bars.lines[0].get_ydata(), shares[label])
        low, high = bars.lines[2][0].get_segments()[0][:, 1]
        assert high - low == pytest.approx(4 * shares_se[label])

    paths = torch.randn(5, 40, 2, generator=rng)
    figure = flow_matching.draw_trajectories(paths, lambda x, t: -x / t, rng)
    np.testing.assert_array_equal(figure.axes[0].lines[0].get_xydata(), paths[:, 0])
    for ax, t in zip(figure.axes[1:], (0.8, 0.4, 0.05)):
        exact, learned = ax.collections
        assert f"t = {t:g}" in ax.get_title()
        x = torch.tensor(learned.XY)
        np.testing.assert_allclose(np.stack([learned.U, learned.V], 1), -x / t, rtol=1e-5)
        v = flow_matching.exact_velocity(x, t)
        np.testing.assert_allclose(np.stack([exact.U, exact.V], 1), v, atol=1e-5)


def test_frames_show_the_points_from_t_1_to_0(flow_matching):
    paths = torch.arange(5.0)[:, None, None].expand(5, 3, 2) / 10
    titles, drawn = [], []
    for figure in flow_matching.draw_frames(paths, torch.zeros(4, 2)):
        titles.append(figure.axes[0].get_title())
        drawn.append(figure.axes[0].collections[0].get_offsets()[0, 0])
    assert titles[:5] == ["t = 1.00", "t = 0.75", "t = 0.50", "t = 0.25", "t = 0.00"]
    assert drawn[:5] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    assert len(titles) >= 10  # the last stands for a while
    assert set(titles[5:]) == {"t = 0.00"}
    assert "t = 0.00" in texts(figure)
