"""Experiment 3 held to references that share no code with it."""

import math
import re
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import swiss_roll as s
import torch


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def brute_force_denoiser(x_t, sigma_t, nodes=20_000):
    """E[x_0 | x_t] for one x_t, by a plain sum over the curve in NumPy."""
    theta = np.linspace(math.pi / 2, 4 * math.pi, nodes)
    c = np.stack([theta * np.cos(theta), theta * np.sin(theta)], axis=1) / (4 * math.pi)
    squares = ((x_t - c) ** 2).sum(axis=1) / (2 * sigma_t**2)
    weights = np.exp(squares.min() - squares)
    return weights @ c / weights.sum()


def test_the_data_is_the_curve():
    x = s.swiss_roll(20_000, rng()).double()
    radius = x.norm(dim=1)
    angle = torch.atan2(x[:, 1], x[:, 0])
    off = (radius * 4 * math.pi - angle) / (2 * math.pi)  # whole turns
    assert (off - off.round()).abs().max() < 1e-5
    assert radius.mean() == pytest.approx(4.5 / 8, abs=5 * radius.std() / 20_000**0.5)
    assert (x**2).mean() ** 0.5 == pytest.approx(s.SIGMA_DATA, rel=0.02)


@pytest.mark.parametrize("t", [5e-4, 0.01, 1.0])
@pytest.mark.parametrize("sigma_q", [0.1, 1.0, 100.0])
def test_exact_denoiser(t, sigma_q):
    x_t = s.add_noise(s.swiss_roll(8, rng()), t, sigma_q, rng(1))
    want = [brute_force_denoiser(x.numpy(), sigma_q * t**0.5) for x in x_t]
    got = s.exact_denoiser(x_t, t, sigma_q=sigma_q).numpy()
    assert np.abs(got - want).max() < 0.01 * min(1, sigma_q * t**0.5)


def test_reverse_mean_by_regression():
    """Eq. (24) against least squares on draws of (x_{t-dt}, x_t): residuals have mean 0 in bins."""
    t, dt, n = 0.5, 0.2, 100_000
    g = rng(2)
    x_previous = s.add_noise(s.swiss_roll(n, g), t - dt, 1.0, g)
    x_t = s.add_noise(x_previous, dt, 1.0, g)
    mean = s.reverse_mean(x_t, t, dt, denoiser=partial(s.exact_denoiser, sigma_q=1.0))
    residual = x_previous - mean
    for inside in (x_t[:, 0] < -1, x_t[:, 0].abs() < 0.3, x_t[:, 1] > 1):
        r = residual[inside]
        assert (r.mean(dim=0).abs() < 5 * r.std(dim=0) / len(r) ** 0.5).all()


def test_samplers_on_a_point_mass():
    """To a point mass at 0: DDIM is at x_1 sqrt(t), and DDPM's variance obeys a recursion."""
    mean = partial(s.reverse_mean, denoiser=lambda x_t, t: torch.zeros_like(x_t))
    x_1 = 3 * torch.randn(50_000, 2, generator=rng())
    for k, x_t in zip((6, 5, 4, 3, 2, 1, 0), s.ddim(mean, x_1, 7)):
        assert (x_t - x_1 * (k / 7) ** 0.5).abs().max() < 1e-5
    variance = 9.0
    for k, x_t in zip((4, 3, 2, 1), s.ddpm(mean, x_1, 4, 3.0, rng(1))):
        variance = (1 - 1 / k) ** 2 * variance + 9 / 4
        assert x_t.var().item() == pytest.approx(variance, rel=0.03)


def test_preconditioning_is_the_best_linear_guess():
    """With a network of 0, the error of c_skip x_t is c_out when the data has SIGMA_DATA."""
    t = 0.3
    c_skip, c_out, c_in, c_noise = s.Denoiser(2.0).preconditioning(t)
    x_0 = s.SIGMA_DATA * torch.randn(200_000, generator=rng())
    x_t = x_0 + 2.0 * t**0.5 * torch.randn(200_000, generator=rng(1))
    assert (x_t @ x_0 / (x_t @ x_t)).item() == pytest.approx(c_skip, rel=0.02)
    assert (x_0 - c_skip * x_t).std().item() == pytest.approx(c_out, rel=0.02)
    assert (c_in * x_t).std().item() == pytest.approx(1, rel=0.02)
    assert c_noise.item() == pytest.approx(math.log(2 * t**0.5) / 2)


def test_it_learns():
    denoiser, losses = s.train(sigma_q=1.0, train_steps=600, rng=rng(3))
    exact = partial(s.exact_denoiser, sigma_q=1.0)
    excess, bayes = s.measure(denoiser, exact, 1.0, rng(4), n=3000)
    assert np.mean(np.divide(excess, bayes)) < 0.03
    assert len(losses) == 600
    assert np.mean(losses[-100:]) == pytest.approx(s.least_loss(denoiser, bayes), rel=0.05)


def test_measure_of_a_known_error():
    """A denoiser that is off by (.1, .2) has an excess of .05; the Bayes error is |x_0 - D|^2."""
    exact = partial(s.exact_denoiser, sigma_q=1.0)

    def shifted(x_t, t):
        return exact(x_t, t) + torch.tensor([0.1, 0.2])

    excess, bayes = s.measure(shifted, exact, 1.0, rng(5), n=5000)
    assert excess == pytest.approx([0.05] * 7, rel=1e-3)
    assert bayes[0] == pytest.approx(s.TIMES[0], rel=0.05)  # across the curve all is known


def test_apart():
    x = torch.tensor([[0.0, 0.0], [0.3, 0.4], [0.0, 0.02]])
    assert s.apart(x, torch.zeros(3, 2)) == pytest.approx((0.02, 1 / 3))
    assert s.apart(torch.tensor([[0.11, 0.0], [0.09, 0.0]]), torch.zeros(2, 2))[1] == 0.5


def test_twins_share_start_and_noise():
    exact = partial(s.exact_denoiser, sigma_q=1.0)
    x_1 = torch.randn(50, 2, generator=rng())
    got = s.sample(exact, x_1, 20, 1.0, rng(3))
    mean = partial(s.reverse_mean, denoiser=exact)
    assert torch.equal(got["DDPM"], [*s.ddpm(mean, x_1, 20, 1.0, rng(3))][-1])
    assert torch.equal(got["DDIM"], [*s.ddim(mean, x_1, 20)][-1])


def test_losses():
    """A Bayes error of c_out^2 at every t is a loss of 1.  A tenth of a few is the last."""
    denoiser = s.Denoiser(2.0)
    bayes = [denoiser.preconditioning(t)[1] ** 2 for t in s.TIMES]
    assert s.least_loss(denoiser, bayes) == pytest.approx(1)
    assert s.last_tenth([*range(30)]) == 28
    assert s.last_tenth([5, 7]) == 7


def lines(ax):
    return {line.get_label(): line for line in ax.lines}


def ends(line):
    """Of the lines that join draws: their starts and ends."""
    return line.get_xydata().reshape(-1, 3, 2)[:, :2].swapaxes(0, 1)


def test_drawn():
    """Each curve is what its label says, in the panel whose title says so."""
    theta = torch.tensor([math.pi / 2, 4 * math.pi])
    x_0 = torch.tensor([[0.3, -0.2], [1.5, 0.0], [-0.5, 0.1]])
    twins = x_0 + torch.tensor([[0.0, 0.01], [-0.3, 0.4], [0.0, -0.02]])
    both = torch.stack([x_0, twins])
    for name, color in [("DDPM", "#0072B2"), ("DDIM", "#E69F00")]:
        left, right = s.draw_samples(name, x_0, twins).axes
        titles = [f"{name}, learned denoiser", f"{name}, exact denoiser"]
        assert [left.get_title(), right.get_title()] == titles
        for ax, points, want in [(left, x_0, color), (right, twins, "k")]:
            assert ax.lines[0].get_color() == want
            np.testing.assert_array_equal(ax.lines[0].get_xydata(), points)
            data = lines(ax)["data"]
            assert data.zorder < min(line.zorder for line in ax.lines[:-1])
            np.testing.assert_allclose(
                data.get_xydata()[[0, -1]], s.curve(theta).numpy(), atol=1e-6
            )
            assert ax.get_xlim() == ax.get_ylim() == pytest.approx((-1.575, 1.575))
        drawn = lines(left)
        assert drawn["sample"].get_color() == color
        np.testing.assert_array_equal(drawn["sample"].get_xydata(), x_0[1:2])
        np.testing.assert_array_equal(drawn["its twin"].get_xydata(), twins[1:2])
        np.testing.assert_array_equal(ends(drawn["over 0.1 apart"])[:, 0], both[:, 1])

    panels = s.draw_denoisers(lambda x, t: 2 * x + t, lambda x, t: 3 * x + t, 2.0, rng()).axes
    for ax, t, sigma_t in zip(panels, (0.01, 0.1, 1), ("0.2", "0.63", "2")):
        assert ax.get_title() == rf"$t$ = {t}: $\sigma_t$ = {sigma_t}"
        x_t = lines(ax)["$x_t$"].get_xydata()
        for k, (name, end) in enumerate([("exact", 3 * x_t + t), ("learned", 2 * x_t + t)]):
            dots = lines(ax)[f"$E[x_0|x_t]$, {name}"]
            assert (dots.get_color() == "#0072B2") == (name == "learned")
            np.testing.assert_allclose(dots.get_xydata(), end, rtol=1e-5)
            np.testing.assert_allclose(ends(ax.lines[k]), [x_t, end], rtol=1e-5)

    (ax,) = s.draw_loss([float(k) for k in range(100)], 1.256).axes
    drawn = {label: line.get_xydata().T for label, line in lines(ax).items()}
    np.testing.assert_array_equal(drawn["each step"], [range(100)] * 2)
    np.testing.assert_array_equal(drawn["mean of 2 steps"], [range(1, 100), np.arange(0.5, 99)])
    np.testing.assert_array_equal(drawn["exact denoiser: 1.26"][1], [1.256, 1.256])
    (ax,) = s.draw_data(x_0).axes
    assert ax.get_title() == "3 draws of $x_0$"
    np.testing.assert_array_equal(ax.collections[0].get_offsets(), x_0)


def test_main(tmp_path, capsys, monkeypatch):
    calls, printed, drawn = {}, [], []
    bayes = [10 + k for k in range(7)]
    known = {
        "train": lambda result: (result[0], [9.0] * 45 + [3.21] * 5),
        "measure": lambda _: ([(k + 1) * b / 1000 for k, b in enumerate(bayes)], bayes),
        "least_loss": lambda _: 1.28,
    }

    def spy_on(name):
        original, change = getattr(s, name), known.get(name, lambda result: result)

        def spy(*args, **keywords):
            seen = [x.get_state() if isinstance(x, torch.Generator) else x for x in args]
            result = change(original(*args, **keywords))
            calls.setdefault(name, []).append((*seen, keywords, result))
            return result

        monkeypatch.setattr(s, name, spy)

    for name in [*known, "sample", "draw_loss", "draw_denoisers", "draw_samples"]:
        spy_on(name)
    monkeypatch.setattr(s, "table", printed.append)
    monkeypatch.setattr(s.plt.Figure, "savefig", lambda _, path, dpi: drawn.append(path.name))
    s.main(f"--figures-dir {tmp_path} --train-steps 50 --num-steps 5 --sigma-q 4".split())

    ((keywords, (network, losses)),) = calls["train"]
    assert (keywords["sigma_q"], keywords["train_steps"]) == (4, 50)
    (exact, x_1, *same, _, twins), (learned, start, *steps, _, samples) = calls["sample"]
    assert learned is network
    assert exact.func is s.exact_denoiser
    assert learned.sigma_q == exact.keywords["sigma_q"] == 4
    assert x_1.std().item() == pytest.approx(4, rel=0.05)
    assert abs(x_1.mean().item()) < 0.3
    assert torch.equal(x_1, start)
    assert steps[:2] == same[:2] == [5, 4]
    assert torch.equal(steps[2], same[2])  # of the noise
    assert calls["measure"][0][:3] == calls["draw_denoisers"][0][:3] == (network, exact, 4)
    assert calls["least_loss"][0][:2] == (network, bayes)
    assert calls["draw_loss"][0][:2] == (losses, 1.28)
    for (name, x_0, twin, *_), want in zip(calls["draw_samples"], ("DDPM", "DDIM")):
        assert name == want
        assert x_0 is samples[name]
        assert twin is twins[name]
    names = ["data", "train_loss", "learned-vs-exact", "eval_ddpm_samples", "eval_ddim_samples"]
    assert drawn == [f"{name}.jpg" for name in names]

    loss = "loss: 3.21 in the last tenth, 1.28 with the exact denoiser"
    assert capsys.readouterr().out.splitlines()[0] == loss
    levels, apart = printed
    assert levels[0] == ["t", "0.00086", "0.0025", "0.0075", "0.022", "0.066", "0.2", "0.58"]
    assert levels[1] == ["Bayes error", *map(str, bayes)]
    assert levels[2] == ["excess over it", *(f"{k / 10:.2f}%" for k in range(1, 8))]
    assert apart[0] == ["from sample to twin", "median", "over 0.1"]
    for (name, median, far), want in zip(apart[1:], ("DDPM", "DDIM")):
        distance = np.hypot(*(samples[name] - twins[name]).numpy().T)
        assert name == want
        assert float(median) == pytest.approx(np.quantile(distance, 0.5), abs=1e-3)
        assert float(far[:-1]) == pytest.approx(100 * (distance > 0.1).mean(), abs=0.06)


def test_another_curve(tmp_path):
    """The page's snippet, in the place of the roll: it is learned, and the whole script runs."""
    folder = Path(s.__file__).parent
    page = (folder / "README.md").read_text(encoding="utf-8")
    source = Path(s.__file__).read_text(encoding="utf-8")
    first, last = source.index("START, END = "), source.index("def swiss_roll(")
    other = ModuleType("other")
    other.__file__ = str(tmp_path / "other.py")
    (snippet,) = re.findall(r"```python\n(START.*?)```", page, re.DOTALL)
    exec(source[:first] + snippet + "\n\n" + source[last:], other.__dict__)
    x_0 = other.swiss_roll(5000, rng())
    assert x_0.square().mean() ** 0.5 == pytest.approx(other.SIGMA_DATA, rel=0.03)
    other.main(f"--figures-dir {tmp_path} --train-steps 60 --num-steps 5 --num-samples 50".split())
    assert len([*tmp_path.iterdir()]) == 5
