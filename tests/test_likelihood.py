"""Experiment 10 held to references that share no code with it.  Mixture: test_nearly_gaussian."""

import contextlib
import io
import math
import re
from functools import partial
from pathlib import Path

import likelihood as s
import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex

DATA = s.Mixture(sigma_0=0.3, sigma_q=2.0)
EXACT = partial(s.tweedie, mixture=DATA)


def bent(x_t, t):
    """A denoiser that is wrong everywhere, and not smooth."""
    return EXACT(x_t, t) + 0.2 * t * np.abs(np.sin(x_t)) + 0.1 * t


def normal(x, mean, variance):
    return np.exp(-((x - mean) ** 2) / (2 * variance)) / (2 * math.pi * variance) ** 0.5


@pytest.mark.parametrize("t", [0.01, 0.5, 1.0])
def test_denoiser(t):
    """Against Bayes' rule on a grid of x_0; its reverse mean is that of a bridge to x_0."""
    x, x_0 = np.array([-3.0, -1.2, 0.0, 0.1, 2.0]), np.linspace(-4, 4, 4001)
    joint = 0.6 * normal(x_0, -1, 0.09) + 0.4 * normal(x_0, 1, 0.09)
    joint = joint * normal(x[:, None], x_0, 4 * t)
    mean = joint @ x_0 / joint.sum(axis=1)
    assert EXACT(x, t) == pytest.approx(mean, abs=1e-6)
    assert s.reverse_mean(x, t, t / 3, denoiser=EXACT) == pytest.approx(mean / 3 + 2 / 3 * x)


def test_network_predicts():
    """With a last layer that gives .5: x_0 = .5, or noise = .5; losses of that."""
    x_0, noise, t = torch.tensor([[1.0, -2.0], [0.3, 0.9], [0.25, 1.0]])
    x_t = x_0 + 2 * t**0.5 * noise
    for (predicts, power), want, loss in [
        (s.LOSSES["x_0"], [0.5, 0.5], (0.5**2 + 2.5**2) / 2),
        (s.LOSSES["x_0, ELBO's weight"], [0.5, 0.5], (0.5**2 * 16 + 2.5**2) / 2),
        (s.LOSSES["noise"], [1.3 - 0.5, -0.2 - 1.0], 4 * (0.2**2 + 0.4**2) / 2),
    ]:
        network = s.Network(predicts, 2.0).requires_grad_(False)
        network.layers[-1].weight.zero_()
        network.layers[-1].bias.fill_(0.5)
        assert network(x_t, t).tolist() == pytest.approx(want)
        assert s.weighted_loss(network, x_0, t, noise, power).item() == pytest.approx(loss)


def test_gradients():
    """That of the ELBO is that of the loss with 1 / t^2, times -1 / (2 sigma_q^2).

    By finite differences of the ELBO, and on a batch of 50 quantiles of the noise for each x_0, t.
    """
    torch.manual_seed(0)
    network = s.Network("x_0", 2.0, width=8).double()
    bias, x = network.layers[4].bias, DATA.grid()

    def expected(shift):
        bias.data += shift
        bound = s.elbo(lambda x, t: network(torch.from_numpy(x), t).detach().numpy(), x, 4, 2.0)
        bias.data -= shift
        return DATA.average(bound, 0)

    ways = 1e-5 * torch.eye(8, dtype=torch.double)
    slopes = torch.tensor([expected(way) - expected(-way) for way in ways]) / 2e-5

    middle = (torch.arange(50, dtype=torch.double) + 0.5) / 50
    z = 2**0.5 * torch.erfinv(2 * middle - 1)
    times = torch.arange(1, 5).double() / 4
    x_0 = torch.cat([-1 + 0.3 * z] * 3 + [1 + 0.3 * z] * 2)
    batch = [a.flatten() for a in torch.meshgrid(x_0, times, z, indexing="ij")]
    cosines = []
    for power in (0, 1, 2):
        (gradient,) = torch.autograd.grad(s.weighted_loss(network, *batch, power), bias)
        cosines.append(torch.cosine_similarity(-gradient, slopes, dim=0).item())
    assert cosines[2] > 0.9999
    assert max(cosines[:2]) < 0.999
    assert slopes.norm().item() == pytest.approx(gradient.norm().item() / 8, rel=0.02)


def test_it_learns(monkeypatch):
    """The exact denoiser, from the times of the steps, each as often, and from the noise."""
    batches, rates, weights = [], [], []

    def spy(network, x_0, t, noise, power, original=s.weighted_loss):
        batches.append(torch.stack([x_0, t, noise]))
        weights.append(network.layers[0].weight.detach().clone())
        assert (network.predicts, power) == ("x_0", 1)
        return original(network, x_0, t, noise, power)

    def adam(parameters, original=torch.optim.Adam, **settings):
        optimizer = original(parameters, **settings)
        optimizer.register_step_post_hook(lambda *_: rates.append(optimizer.param_groups[0]["lr"]))
        return optimizer

    monkeypatch.setattr(s, "weighted_loss", spy)
    monkeypatch.setattr(torch.optim, "Adam", adam)
    rng = np.random.default_rng(0)
    denoiser = s.train("x_0", 1, num_steps=5, mixture=DATA, train_steps=200, rng=rng)
    assert s.parts(denoiser, 5, DATA)[1] < 0.01
    assert max(rates) == pytest.approx(0.006, rel=1e-3)  # in one cycle, down to nearly 0
    assert rates[-1] < 1e-6
    x_0, t, noise = torch.cat(batches, dim=1)
    n = len(t)
    assert n == 200 * 512
    assert torch.allclose(t.unique(), torch.arange(1, 6) / 5)
    assert t.mean().item() == pytest.approx(0.6, abs=5 * 0.28 / n**0.5)
    assert [x_0.mean().item(), noise.mean().item()] == pytest.approx([-0.2, 0], abs=5 / n**0.5)
    assert [x_0.var().item(), noise.var().item()] == pytest.approx([1.05, 1], rel=0.02)
    assert x_0[x_0 < 0].std().item() == pytest.approx(0.3, rel=0.02)
    s.train("x_0", 1, num_steps=5, mixture=DATA, train_steps=1, rng=np.random.default_rng(1))
    assert not torch.allclose(weights[0], weights[-1], atol=0.1)  # the seed's own first weights


@pytest.mark.parametrize("x_0", [-1.3, 0.2])
def test_elbo_is_a_sum_over_bridges(x_0):
    """KL divergences of Gaussians along draws of x_t given x_0, five standard errors."""
    n, num_steps = 100_000, 6
    rng, dt = np.random.default_rng(2), 1 / num_steps
    x = DATA.grid()
    bound = np.interp(x_0, x, s.elbo(bent, x, num_steps, 2.0))
    total = np.full(n, -(x_0**2) / 8)  # -KL(p(x_1 | x_0) || base)
    for k in range(num_steps, 0, -1):
        t = k * dt
        x_t = x_0 + 2 * t**0.5 * rng.standard_normal(n)
        mean = bent(x_t, t) / k + (1 - 1 / k) * x_t
        if k == 1:
            total += np.log(normal(x_0, mean, 4 * dt))
        else:
            off, ratio = x_t + (x_0 - x_t) / k - mean, 1 - 1 / k
            total -= (ratio + off**2 / (4 * dt) - 1 - np.log(ratio)) / 2
    assert bound == pytest.approx(total.mean(), abs=5 * total.std() / n**0.5 + 1e-3)


@pytest.mark.parametrize("num_steps", [1, 2, 10, 50])
@pytest.mark.parametrize("denoiser", [EXACT, bent])
def test_bound_and_identity(denoiser, num_steps):
    """ELBO <= log q_0 at every x; E log p_0 - E ELBO is the sum of the parts."""
    x = DATA.grid()
    p_0 = 0.6 * normal(x, -1, 0.09) + 0.4 * normal(x, 1, 0.09)
    p_1 = 0.6 * normal(x, -1, 4.09) + 0.4 * normal(x, 1, 4.09)
    log_p, log_q, bound = s.measure(denoiser, num_steps, DATA)
    near = abs(x) < 4
    assert log_p[near] == pytest.approx(np.log(p_0[near]))
    assert (bound < log_q)[near].all()
    gap, steps, learning, base, kl = s.measure_gap(denoiser, num_steps, DATA)
    assert gap == pytest.approx((x[1] - x[0]) * p_0 @ (log_p - bound))
    assert kl == pytest.approx((x[1] - x[0]) * p_0 @ (log_p - log_q))
    assert gap == pytest.approx(steps + learning + base, abs=1e-5)
    assert base == pytest.approx((x[1] - x[0]) * p_1 @ np.log(p_1 / normal(x, 0, 4)))
    assert 0 < kl < gap
    assert steps > 0
    assert (learning > 0.001) == (denoiser is bent)


# ------------------------------------ What is drawn and printed --------------------------------


def test_what_is_drawn():
    x, curves = np.array([-3, -1, 0, 1.0]), np.random.default_rng(0).uniform(1, 2, (2, 3, 4))
    for ax, n, logs in zip(s.draw_bound({7: curves[0], 9: curves[1]}, x).axes, (7, 9), curves):
        assert ax.get_title() == f"exact denoiser, number of steps: {n}"
        lines = {line.get_label(): line.get_xydata().T for line in ax.lines}
        labels = [r"$\log\,p_0(x)$, the data", r"$\log\,q_0(x)$, what DDPM returns"]
        for label, y in zip([*labels, "ELBO$(x)$, the bound"], logs):
            assert np.array_equal(lines.pop(label), [x[1:], y[1:]])
        assert not lines
        colors = [to_hex(line.get_color()).upper() for line in ax.lines]
        assert colors == ["#000000", s.BLUE, s.PINK]

    names = ["exact", "x_0", "noise"]
    gaps = np.random.default_rng(1).uniform(1, 2, (3, 5))
    ax = s.draw_parts(dict(zip(names, gaps)), 30).axes[0]
    assert ax.get_title().endswith("number of steps: 30")
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["exact", "$x_0$", "noise"]
    bars = {bars.get_label(): [(b.get_y(), b.get_height()) for b in bars] for bars in ax.containers}
    _, steps, learning, base, kl = gaps.T
    for label, low, high in [
        ("steps", 0 * steps, steps),
        ("base", steps, base),
        ("learning", steps + base, learning),
    ]:
        np.testing.assert_allclose(bars.pop(label), np.transpose([low, high]))
    assert not bars
    assert np.array_equal(ax.lines[0].get_ydata(), kl)
    assert ax.lines[0].get_label() == r"KL$(p_0\,\|\,q_0)$ of the output"


def test_main(tmp_path, capsys, monkeypatch):
    """Wiring; each number printed or drawn is that of the function it comes from."""
    data, trained, tables, saved = s.Mixture(0.3, 1.5), [], [], {}
    exact = partial(s.tweedie, mixture=data)

    def train(*loss, rng, **settings):
        trained.append((loss, settings, rng.standard_normal()))
        shift = len(trained) / 10
        return lambda x_t, t: exact(x_t, t) + shift * t

    class Figure:
        def __init__(self, name, *arguments):
            self.savefig = lambda path, dpi: saved.update({path.name: (name, *arguments)})

    for name in ("draw_bound", "draw_parts"):
        monkeypatch.setattr(s, name, partial(Figure, name))
    monkeypatch.setattr(s, "train", train)
    monkeypatch.setattr(s, "table", tables.append)
    monkeypatch.setattr(s, "STEP_COUNTS", [3, 10, 100])
    options = "--train-steps 30 --num-steps 20 --sigma-q 1.5 --seed 4"
    s.main(f"--figures-dir {tmp_path} {options}".split())
    settings = {"num_steps": 20, "train_steps": 30, "mixture": data}
    first = np.random.default_rng(4).standard_normal()  # the same weights and draws for all
    losses = [("x_0", 0), ("x_0", 2), ("noise", 1)]
    assert trained == [(loss, settings, first) for loss in losses]

    heading, *rows = tables[0]
    assert heading == ["steps (exact denoiser)", "E log p_0", "E log q_0", "E ELBO"]
    drawn, curves, x = saved["bound.jpg"]
    assert (drawn, [*curves]) == ("draw_bound", [10, 100])
    assert np.array_equal(x, data.grid())
    for n, row in zip((3, 10, 100), rows):
        logs = s.measure(exact, n, data)
        assert row == [f"{n}", *(f"{data.average(log, 0):.4f}" for log in logs)]
        assert n == 3 or np.array_equal(curves[n], logs)

    heading, *rows = tables[1]
    assert heading == ["denoiser (20 steps)", "gap", "steps", "learning", "base", "KL(p_0 || q_0)"]
    drawn, gaps, num_steps = saved["three-parts.jpg"]
    assert (drawn, num_steps) == ("draw_parts", 20)
    assert [*gaps] == ["exact", "x_0", "x_0, ELBO's weight", "noise"]
    for (name, gap), row in zip(gaps.items(), rows):
        assert row == [name, *(f"{value:.4f}" for value in gap)]
    assert np.array_equal(gaps["exact"], s.measure_gap(exact, 20, data))
    shifts = [0, 0.1, 0.2, 0.3]
    assert [g[2] for g in gaps.values()] == pytest.approx([c**2 / 4.5 for c in shifts])
    off = max(abs(g[0] - sum(g[1:4])) for g in gaps.values())
    assert capsys.readouterr().out.startswith(f"gap = steps + learning + base, to {off:.0e}\n")


def test_the_snippet_on_the_page():
    """It prints what the page says that it prints."""
    page = Path(s.__file__).with_name("README.md").read_text(encoding="utf-8")
    code, printed = re.search(r"```python\n(.*?)```.*?```text\n(.*?)```", page, re.DOTALL).groups()
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(code, {})
    assert out.getvalue() == printed
