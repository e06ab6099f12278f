"""Experiment 10 held to references that share no code with it.  Mixture: test_nearly_gaussian."""

import math
import re
from functools import partial
from pathlib import Path

import likelihood as s
import numpy as np
import pytest
import torch
from conftest import paste, rng, snippet
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

DATA = s.Mixture(sigma_0=0.3, sigma_q=2.0)
EXACT = partial(s.tweedie, mixture=DATA)


def normal(x, mean, variance):
    return np.exp(-((x - mean) ** 2) / (2 * variance)) / (2 * math.pi * variance) ** 0.5


def close(got, want, hint, **tolerance):
    assert got is not None, hint
    assert np.allclose(got, want, **{"rtol": 1e-6, "atol": 1e-6, **tolerance}), hint


def bridges(x_0, denoiser, num_steps, sigma_q, n=40_000):
    """log of DDPM's path density over the forward one's, along n draws of paths given x_0."""
    draw, variance = rng(2), sigma_q**2 / num_steps
    total = np.full(n, -(x_0**2) / (2 * sigma_q**2))  # -KL(p(x_1 | x_0) || base)
    for k in range(num_steps, 0, -1):
        x_t = x_0 + sigma_q * (k / num_steps) ** 0.5 * draw.standard_normal(n)
        mean, ratio = denoiser(x_t, k / num_steps) / k + (1 - 1 / k) * x_t, 1 - 1 / k
        if k == 1:
            total += np.log(normal(x_0, mean, variance))
        else:
            off = x_t + (x_0 - x_t) / k - mean
            total -= (ratio + off**2 / variance - 1 - np.log(ratio)) / 2
    return total.mean(), 5 * total.std() / n**0.5


OTHER_DATA = {
    "the script's": "WEIGHTS, CENTERS = [0.6, 0.4], [-1, 1]\nSIGMA_0 = 0.3",
    "the page's": snippet(s) + "SIGMA_0 = 0.3",
    "off center": "WEIGHTS, CENTERS = [0.1, 0.4, 0.2, 0.3], [6, 9, 3.5, 7]\nSIGMA_0 = 0.9",
}


@pytest.mark.parametrize("code", OTHER_DATA.values(), ids=OTHER_DATA)
def test_the_truth_follows_the_data(code):
    """Denoiser by Bayes' rule on a grid of x_0, the ELBO along bridges, the gap by its parts."""
    m, described = paste(s, code), {"np": np}
    exec(code, described)
    std, n = described["SIGMA_0"], 6
    weights, centers = np.array(described["WEIGHTS"]), np.array(described["CENTERS"], float)
    data = m.Mixture(std, 2.0)
    exact = partial(m.tweedie, mixture=data)
    grid = np.arange(min(centers) - 8 * std, max(centers) + 8 * std, std / 10)
    p_0 = weights @ normal(grid, centers[:, None], std**2)
    for t in (0.01, 0.5, 1.0):
        x = np.array([min(centers) - 1, np.mean(centers), max(centers) + 1])
        joint = p_0 * normal(x[:, None], grid, 4 * t)
        mean = joint @ grid / joint.sum(axis=1)
        close(exact(x, t), mean, "tweedie: E[x_0 | x_t], by Bayes' rule", atol=1e-4)
        got = m.reverse_mean(x, t, t / 3, denoiser=exact)
        close(got, mean / 3 + 2 / 3 * x, "reverse_mean: eq. (24), a third of the way", atol=1e-4)

    def off(x_t, t):
        return exact(x_t, t) + 0.3 * t

    x, x_0 = data.grid(), max(centers) - std
    hint = "elbo: log N(x_0; 0, sigma_q^2) - 1/2 + sum (1 - E|x_0 - D|^2 / sigma_t^2) / (2k)"
    want, error = bridges(x_0, off, n, 2.0)
    log_p, log_q, bound = m.measure(off, n, data).values()
    close(bound is not None and np.interp(x_0, x, bound), want, hint, atol=error + 0.01)
    near = log_p > -20
    assert (bound < log_q)[near].all(), "the ELBO is a lower bound on log q_0"
    density, p_1 = (weights @ normal(x, centers[:, None], std**2 + v) for v in (0, 4))
    close(log_p[near], np.log(density[near]), "measure: log p_0")
    gap, steps, learning, base, kl = m.measure_gap(off, n, data).values()
    want = (x[1] - x[0]) * density @ np.transpose([log_p - bound, log_p - log_q])
    close([gap, kl], want, "measure_gap: E log p_0 - E ELBO, KL(p_0 || q_0)")
    hint = "parts: steps + learning + base = E log p_0 - E ELBO, for every denoiser"
    close(steps + learning + base, gap, hint, atol=1e-5)
    close(learning, 0.3**2 / 8, "parts: learning, the sum of dt E|D - exact|^2 / (2 sigma_q^2 t^2)")
    ratio = np.log(p_1.clip(1e-300)) + x**2 / 8 + np.log(8 * np.pi) / 2
    close(base, (x[1] - x[0]) * p_1 @ ratio, "parts: base, KL(p_1 || N(0, sigma_q^2))")
    assert 0 < kl < gap

    draws = m.draws(20_000, std, rng(3))
    mean, second = weights @ centers, weights @ (centers**2 + std**2)
    close(draws.mean(), mean, "draws: mean", atol=5 * draws.std() / 20_000**0.5)
    close((draws**2).mean(), second, "draws", atol=5 * (draws**2).std() / 20_000**0.5)
    network, seen = m.Denoiser("x_0", data).requires_grad_(False), []
    close([network.mean_0, network.std_0], [mean, (second - mean**2) ** 0.5], "Denoiser: its units")
    network.layers.register_forward_hook(lambda _, given, __: seen.append(given[0][:, 0]))
    m.learned(draws + rng(4).standard_normal(20_000), 0.25, network=network)
    close([seen[0].mean(), seen[0].std()], [0, 1], "Denoiser: inputs in these units", atol=0.04)


def test_data_that_it_cannot_do():
    for code in ("WEIGHTS, CENTERS = [0.5, 0.6], [0, 1]", "SIGMA_0 = 0.01"):
        assert len(paste(s, code).faults()) == 1


def test_network_predicts():
    """With a last layer that gives .5: x_0 = mean + .5 std, or noise = .5; losses of that."""
    x_0, noise, t = torch.tensor([[1.0, -2.0], [0.3, 0.9], [0.25, 1.0]])
    x_t, middle = x_0 + 2 * t**0.5 * noise, -0.2 + 0.5 * (1.05) ** 0.5
    a, b = (1 - middle) ** 2, (2 + middle) ** 2
    for (predicts, power), want, loss in [
        (s.LOSSES["x_0"], [middle, middle], (a + b) / 2),
        (s.LOSSES["x_0, ELBO's weight"], [middle, middle], (16 * a + b) / 2),
        (s.LOSSES["noise"], [1.3 - 0.5, -0.2 - 1.0], 4 * (0.2**2 + 0.4**2) / 2),
    ]:
        network = s.Denoiser(predicts, DATA).requires_grad_(False)
        network.layers[-1].weight.zero_()
        network.layers[-1].bias.fill_(0.5)
        close(s.learned(x_t.numpy(), t, network=network), want, "Denoiser")
        loss_now = s.weighted_loss(network, x_0, t, noise, power)
        close(loss_now, loss, "weighted_loss: |x_0 - D|^2 / t^power")


def test_the_loss_is_the_bound():
    """With the weight 1 / t^2, E ELBO + loss / (2 sigma_q^2) is the same for all networks.

    The loss on 100 quantiles of the noise for each x_0 and t.
    """
    z = 2**0.5 * torch.erfinv((2 * torch.arange(100) + 1) / 100 - 1)
    x_0 = torch.cat([-1 + 0.3 * z] * 3 + [1 + 0.3 * z] * 2)
    batch = torch.meshgrid(x_0, torch.arange(1, 5) / 4, z, indexing="ij")
    sums = []
    for k in range(3):
        network = s.Denoiser("x_0", DATA, width=8).requires_grad_(False)
        network.layers[-1].bias.fill_(k - 1)
        bound = DATA.average(s.elbo(partial(s.learned, network=network), DATA.grid(), 4, 2.0), 0)
        losses = (s.weighted_loss(network, *map(torch.flatten, batch), power) for power in range(3))
        sums.append([bound + loss.item() / 8 for loss in losses])
    unweighted, noise, right = np.ptp(sums, axis=0)
    assert right < 0.02 * min(unweighted, noise)


def test_it_learns(spy):
    """The exact denoiser, from the times of the steps, each as often, and from the noise."""
    batches = spy(s, "weighted_loss")
    settings = {"num_steps": 5, "mixture": DATA}
    network = s.train("x_0", 1, train_steps=150, rng=rng(), batch_size=256, **settings)
    assert s.parts(partial(s.learned, network=network), 5, DATA)["learning"] < 0.015
    assert {call.power for call in batches} == {1}
    x_0, t, noise = (
        torch.cat([getattr(c, name) for c in batches]) for name in ("x_0", "t", "noise")
    )
    n = len(t)
    assert torch.allclose(t.unique(), torch.arange(1, 6) / 5)
    close(t.mean(), 0.6, "train: t uniform on the times of the steps", atol=5 * 0.28 / n**0.5)
    close([x_0.mean(), noise.mean()], [-0.2, 0], "train: means of x_0, noise", atol=5 / n**0.5)
    close([x_0.var(), noise.var()], [1.05, 1], "train: variances of x_0, noise", rtol=0.02)
    first = [s.train("noise", 1, train_steps=1, rng=rng(k), **settings) for k in (0, 1)]
    weights = [network.layers[0].weight for network in first]
    assert not torch.allclose(*weights, atol=0.1), "first weights follow the generator"


def test_what_is_drawn():
    x, names = np.array([-3, -1, 0, 1.0]), [*s.measure(EXACT, 1, DATA)]
    curves = {n: dict(zip(names, rng(n).uniform(1, 2, (3, 4)))) for n in (7, 9)}
    for ax, (n, logs) in zip(s.draw_bound(curves, x).axes, curves.items()):
        assert str(n) in ax.get_title()
        lines = {to_hex(line.get_color()).upper(): line.get_xydata().T for line in ax.lines}
        for color, log in zip(("#000000", s.BLUE, s.PINK), logs.values()):
            assert np.array_equal(lines[color], [x[1:], log[1:]])

    names, values = [*s.measure_gap(EXACT, 1, DATA)], rng(1).uniform(1, 2, (3, 5))
    ax = s.draw_parts({k: dict(zip(names, row)) for k, row in zip("abc", values)}, 30).axes[0]
    assert "30" in ax.get_title()
    _, steps, learning, base, kl = values.T
    for color, low, high in [
        (s.BLUE, 0 * steps, learning),
        ("0.75", learning, base),
        (s.SKY, learning + base, steps),
    ]:
        bars = [bar for bar in ax.patches if to_hex(bar.get_facecolor()) == to_hex(color)]
        close([[b.get_y(), b.get_height()] for b in bars], np.transpose([low, high]), "draw_parts")
    (line,) = [line for line in ax.lines if len(line.get_ydata()) == 3]
    assert np.array_equal(line.get_ydata(), kl)
    assert to_hex(line.get_color()) == "#000000"


def numbers(rows):
    """The cells of a table that are numbers, but for the first of each row."""
    return [cell for row in rows for cell in row[1:] if re.fullmatch(r"-?[\d.]+", cell)]


def test_main(tmp_path, monkeypatch, spy, capsys):
    """With the page's data: wiring; what is printed or drawn is that of its function."""
    m = paste(s, snippet(s))
    data = m.Mixture(0.3, 1.5)
    calls = [spy(m, name) for name in ("train", "learned", "measure", "measure_gap", "table")]
    drawn = [spy(m, name) for name in ("draw_bound", "draw_parts")]
    m.STEP_COUNTS = [3, 10, 100]
    monkeypatch.setattr(Figure, "savefig", lambda *_, **__: None)
    options = "--train-steps 3 --num-steps 20 --sigma-q 1.5 --seed 4"
    m.main(f"--figures-dir {tmp_path} {options}".split())
    trained, learned, measured, gaps, tables = calls
    assert [(c.predicts, c.power) for c in trained] == [("x_0", 0), ("x_0", 2), ("noise", 1)]
    for call in trained:  # the same weights and draws for all
        assert (call.num_steps, call.train_steps, call.mixture) == (20, 3, data)
        assert call.rng.standard_normal() == rng(4).standard_normal()
    assert [*dict.fromkeys(c.network for c in learned)] == [c.result for c in trained]
    assert {(c.num_steps, c.mixture) for c in gaps} == {(20, data)}
    curves = {c.num_steps: c for c in measured[-3:]}
    assert [*curves] == [3, 10, 100]
    want = [f"{data.average(x, 0):.4f}" for c in curves.values() for x in c.result.values()]
    assert numbers(tables[0].rows) == want
    assert numbers(tables[1].rows) == [f"{x:.4f}" for c in gaps for x in c.result.values()]
    close(gaps[0].result["learning"], 0, "main: the first denoiser is exact")
    x = np.linspace(-2, 2, 9)
    close(curves[3].denoiser(x, 0.5), m.tweedie(x, 0.5, mixture=data), "main: STEP_COUNTS, exact")
    (bound,), (three,) = drawn
    assert all(bound.curves[n] is curves[n].result for n in (10, 100))
    assert np.array_equal(bound.x, data.grid())
    assert ([*three.gaps.values()], three.num_steps) == ([c.result for c in gaps], 20)
    found = [call.result for call in gaps]
    off = max(abs(gap["gap"] - sum(gap[part] for part in m.PARTS)) for gap in found)
    assert f"{off:.0e}" in capsys.readouterr().out


def test_question(capsys):
    """What the code of the page's question prints is what it says there."""
    page = (Path(s.__file__).parent / "README.md").read_text(encoding="utf-8")
    code = snippet(s, "Predict, then run")
    exec(code, {})
    printed = re.search(r"```text\n(.*?)```", page.split(code)[1], re.DOTALL)[1]
    assert capsys.readouterr().out == printed
