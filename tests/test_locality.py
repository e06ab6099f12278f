"""Experiment 14 held to references that share no code with it."""

import re
from functools import partial

import locality as s
import numpy as np
import pytest
import torch
from conftest import paste, snippet
from conftest import torch_rng as rng
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

BLACK, GREY, BLUE, PINK = "#000000", "#808080", "#0072b2", "#cc79a7"
# Unlike the default in all respects: 10 x 10 pixels, off center, three times as large.
OTHER = """
def digits(n, rng):
    return 3 * torch.rand(n, 100, generator=rng) + 1, torch.zeros(n).long()
"""


@pytest.fixture(scope="module")
def images():
    """The ten digits, less their mean, (10, 256)."""
    images, _ = s.digits(10, rng())
    return images - images.mean()


@pytest.mark.parametrize("code", ["", snippet(s), OTHER])
def test_the_truth_follows_the_data(code):
    """L, one pixel at a time, in a loop over all windows; and a minimiser of all pixels at once."""
    own = paste(s, code) if code else s
    images = own.digits(4, rng(2))[0].double()
    images = images - images.mean()
    side, t = round(images.shape[1] ** 0.5), 0.04
    x_t = own.add_noise(images, t, 4.0, rng(3))[:2]
    got = own.local_denoiser(x_t, t, images=images, window=3, sigma_q=4.0)
    noisy, known = x_t.view(2, side, side).numpy(), images.view(4, side, side).numpy()
    for row, column in [(0, 0), (side // 2, 7), (3, side - 1)]:
        squares = np.zeros((4, side, side))
        for i in (-1, 0, 1):
            for j in (-1, 0, 1):
                shifted = np.roll(known, (-i, -j), axis=(1, 2))
                squares += (shifted - noisy[1, (row + i) % side, (column + j) % side]) ** 2
        weights = np.exp(-(squares - squares.min()) / (2 * 16 * t))
        wrong = "L is not the mean of the windows' centers, weighted by Bayes' rule"
        want = (weights * known).sum() / weights.sum()
        assert got[1, side * row + column].item() == pytest.approx(want, abs=1e-5), wrong
    squares = ((noisy[:, None] - known) ** 2).sum(axis=(2, 3))
    weights = np.exp(-(squares - squares.min(axis=1)[:, None]) / (2 * 16 * t))
    want = weights @ images.numpy() / weights.sum(axis=1)[:, None]
    whole = own.exact_denoiser(x_t, t, images=images, sigma_q=4.0)
    assert np.abs(whole.numpy() - want).max() < 1e-5


@pytest.mark.parametrize(
    ("num_pixels", "ink", "word"),
    [(49, 1.0, "49"), (200, 1.0, "200"), (64, 0.0, "blank"), (64, float("nan"), "finite")],
)
def test_what_it_refuses(num_pixels, ink, word, monkeypatch, capsys):
    """Images too small for the largest window, no squares, blank, or not finite."""
    monkeypatch.setattr(s, "digits", lambda n, rng: (ink * torch.rand(n, num_pixels), None))
    with pytest.raises(SystemExit, match="2"):
        s.main([])
    assert word in capsys.readouterr().err.splitlines()[-1]


def test_best_filter(images):
    """By least squares on many windows with their noise drawn."""
    x_0 = images.repeat(20, 1)
    x_t = s.add_noise(x_0, 0.04, 4.0, rng(4))
    seen = s.windows(x_t, 3).flatten(0, 1).double().numpy()
    weights, (squares,), *_ = np.linalg.lstsq(seen, x_0.double().flatten().numpy(), rcond=None)
    got = s.best_filter(x_t, 0.04, images=images, window=3, sigma_q=4.0)
    wrong = "not the linear function of the window with the least error"
    off = np.square(got.flatten().numpy() - seen @ weights).mean()
    assert off < 3e-4 * squares / len(seen), wrong


def test_errors_add_up(images):
    """E|f - x_0|^2 = E|L - x_0|^2 + E|f - L|^2 for an untrained f; not for one that sees more."""
    torch.manual_seed(3)
    network = s.Denoiser(images, 5, 4.0).requires_grad_(False)
    network.last[1].weight *= 10  # far from L
    whole = partial(s.exact_denoiser, images=images, sigma_q=4.0)
    x_0 = images.repeat(6, 1)
    x_t = s.add_noise(x_0, 0.04, 4.0, rng(4))
    best = s.local_denoiser(x_t, 0.04, images=images, window=5, sigma_q=4.0)
    for f, holds in [(network, True), (whole, False)]:
        excess = (f(x_t, 0.04) - best).square()
        more = (f(x_t, 0.04) - x_0).square() - (best - x_0).square() - excess
        more = more.mean(dim=1)
        standard_error = (more.std() / len(more) ** 0.5).item()
        assert standard_error < 0.2 * excess.mean()
        assert (abs(more.mean().item()) < 5 * standard_error) == holds


@pytest.mark.parametrize("window", [3, 5])
def test_field_of_view(images, window):
    """A pixel is seen from the places around it and nowhere else; all places are alike.

    If the last layer gives 2: the best linear guess from the pixel itself, and 2 its error.
    """
    torch.manual_seed(5)
    network = s.Denoiser(images, window, 4.0).requires_grad_(False)
    x_t = torch.randn(1, 16, 16, generator=rng(6))
    other = x_t.clone()
    other[0, 0, 9] += 1
    both = torch.cat([x_t, other]).flatten(1)
    changed = (network(both, 0.1).diff(dim=0).abs() > 1e-6).view(16, 16)
    down, right = torch.meshgrid(torch.arange(16), torch.arange(16), indexing="ij")
    away = torch.maximum(torch.minimum(down, 16 - down), (right - 9).abs())  # from row 0, column 9
    assert (changed == (away <= window // 2)).all()
    shifted = network(x_t.roll((3, 5), (1, 2)).flatten(1), 0.1).view(16, 16)
    assert (shifted.roll((-3, -5), (0, 1)).flatten() - network(both, 0.1)[0]).abs().max() < 1e-5

    network.last[1].weight.zero_()
    network.last[1].bias.fill_(2)
    for t in (0.01, 1.0):
        slope = 1 / (1 + 16 * t / images.numpy().var())
        want = slope * both + 2 * (slope * 16 * t) ** 0.5
        assert (network(both, t) - want).abs().max() < 1e-5


def test_it_learns(images, monkeypatch):
    """Nearly L; and the loss goes to L's error over c_out^2, a mean over sigma_t uniform."""
    losses, backward = [], torch.Tensor.backward
    monkeypatch.setattr(
        torch.Tensor, "backward", lambda loss: (losses.append(loss.item()), backward(loss))
    )
    network = s.train(images, window=3, sigma_q=4.0, train_steps=150, rng=rng(8), batch_size=256)
    view = {"images": images, "window": 3, "sigma_q": 4.0}
    local, linear = partial(s.local_denoiser, **view), partial(s.best_filter, **view)
    monkeypatch.setattr(s, "NUM_DRAWS", 5)
    monkeypatch.setattr(s, "TIMES", [1.0, 0.64, 0.36, 0.16, 0.04, 0.01, s.MIN_T])
    _, least, _, excess, learned = s.measure(network, local, linear, local, images, rng(9)).values()
    assert (np.array(learned)[1:6] > [0.3, 0.6, 0.5, 0.5, 0.6]).all()
    mean = -np.trapezoid(np.add(least, excess), np.sqrt(s.TIMES)) / (1 - s.MIN_T**0.5)
    assert np.mean(losses[-40:]) == pytest.approx(mean, rel=0.06)


def test_measure_of_known_errors(images):
    """If x_t itself were L: the noise is its error; + .1, + .3, - .2 are off by their squares."""

    def network(x_t, t):
        return x_t + 0.1

    network.sigma_q, network.c_out = 4.0, lambda t: torch.tensor(2 + t)
    linear, whole = (lambda x_t, t: x_t + 0.3), (lambda x_t, t: x_t - 0.2)
    found = s.measure(network, lambda x_t, t: x_t, linear, whole, images, rng(10))
    noise, unit = 16 * np.array(s.TIMES), (2 + np.array(s.TIMES)) ** 2
    minimiser, least, line, excess, learned = map(np.array, found.values())
    assert least * unit == pytest.approx(noise, rel=0.06)
    assert minimiser * unit == pytest.approx(noise + 0.04, rel=0.06)
    assert line * unit == pytest.approx(0.09, rel=1e-3)
    assert excess * unit == pytest.approx(0.01, rel=1e-3)
    assert learned == pytest.approx(8 / 9, rel=1e-3)

    rows = dict(zip(found, ([x] * 6 for x in (5.0, 1.0, 2.0, 0.25, 0.5))))
    panels = s.draw_errors(rows).axes
    drawn = [{to_hex(x.get_color()): x.get_ydata()[0] for x in ax.lines} for ax in panels]
    assert drawn == [{PINK: 3, BLACK: 1, BLUE: 1.25, GREY: 5}, {BLUE: 0.5, BLACK: 1}]
    for ax in panels:
        assert ax.get_xlim()[0] > 1 > 0.01 > ax.get_xlim()[1] > 0


def test_report(images):
    """Samples made so that every number is known: two shifted images, one of them a copy."""
    wave = torch.linspace(0, 6 * torch.pi, 257)[:-1]
    shifted = images.view(10, 16, 16).roll((5, -3), (1, 2)).flatten(1)
    shifted[0, :4] += 1.45  # 2.9 away, a copy: a blank is 9.3 from an image
    shifted[1:3, :4] += 2  # 4 away, none
    others = torch.stack([3 - shifted[0], shifted[1] + wave.sin() / 2, wave.cos()])
    samples = {"network": [None, shifted[:3]], "A": [None, others]}
    _, network, other = (row[1:] for row in s.report(samples, images))
    assert network == ["1.000", "4.00", "33%"]
    same = [np.corrcoef(x, y)[0, 1] ** 2 for x, y in zip(shifted.numpy(), others.numpy())]
    assert 1 > sorted(same)[1] > np.mean(same) + 0.01
    assert (other[0], other[2]) == (f"{np.median(same):.3f}", "0%")


def test_what_is_drawn(images):
    """Samples, each denoiser's in a row of its own and in its color.

    Windows: x_t is a digit, shifted: the framed one that weighs most is the same one, there.
    """
    samples = {name: [None, images / (k + 1)] for k, name in enumerate(["network", "b", "c"])}
    for k, ax in enumerate(s.draw_samples(samples, 0.25).axes):
        (strip,) = ax.images
        squares = np.asarray(strip.get_array()).reshape(16, 10, 16).swapaxes(0, 1)
        assert np.abs(squares.reshape(10, 256) - images.numpy() / (k + 1) - 0.25).max() < 1e-5
        assert to_hex(strip.cmap(1.0)) == (BLACK if k else BLUE)

    end = images[[4]].view(16, 16).roll((-2, 1), (0, 1)).view(1, 256)
    path = [end + 4 * k / 100 for k in range(100, -1, -1)]
    axes = s.draw_windows(path, 0.25, images=images, window=5, sigma_q=0.5).axes
    down, right = divmod(s.windows(end, 5)[0].sum(dim=1).argmax().item(), 16)
    for k, (noisy, nearest, *others) in zip((16, 4), (axes[:5], axes[5:])):
        centered = np.roll(path[100 - k].view(16, 16).numpy(), (8 - down, 8 - right), axis=(0, 1))
        assert np.abs(noisy.images[0].get_array() - 0.25 - centered).max() < 1e-5
        assert noisy.patches[0].get_xy() == (5.5, 5.5)
    assert np.abs(nearest.images[0].get_array().flatten() - 0.25 - images[4].numpy()).max() < 1e-5
    assert nearest.patches[0].get_xy() == (right - 1 - 2.5, down + 2 - 2.5)
    weights = [float(re.search(r"[\d.]+", ax.get_title())[0]) for ax in (nearest, *others)]
    assert weights == sorted(weights, reverse=True)


def test_main(tmp_path, monkeypatch, spy, capsys):
    """On the page's own data: each denoiser comes to its place; what was measured is printed."""
    own, names = paste(s, snippet(s)), "train measure paths report draw_samples draw_windows"
    calls = {name: spy(own, name) for name in names.split()}
    own.NUM_DRAWS = 2
    monkeypatch.setattr(Figure, "savefig", lambda *_, **__: None)
    small = "--num-samples=4 --num-steps=3 --train-steps=2 --window=3 --num-images=3 --sigma-q=2"
    own.main([*small.split(), f"--figures-dir={tmp_path}"])
    (learned,), (found,), (sampled,), (report,), (drawn,), (seen,) = calls.values()
    known, network = learned.images, learned.result
    assert known.mean().abs() < 1e-6
    assert (learned.window, learned.sigma_q, learned.train_steps) == (3, 2, 2)
    assert found.images is known
    x_1, view = sampled.x_1, {"images": known, "window": 3, "sigma_q": 2}
    local = own.local_denoiser(x_1, 0.5, **view)
    whole = own.exact_denoiser(x_1, 0.5, images=known, sigma_q=2)
    assert (x_1.std().item(), sampled.num_steps) == (pytest.approx(2, rel=0.1), 3)
    for got, want in [
        *zip(sampled.denoisers.values(), (network(x_1, 0.5), local, whole)),
        *zip((found.denoiser, found.local, found.exact), (network(x_1, 0.5), local, whole)),
        (found.linear, own.best_filter(x_1, 0.5, **view)),
    ]:
        assert torch.equal(got(x_1, 0.5), want)
    x_t = x_1
    for k, x in zip((3, 2, 1), sampled.result["minimiser"][1:]):  # DDIM, from t = k / 3
        share = 1 - (1 - 1 / k) ** 0.5
        x_t = x_t + share * (own.exact_denoiser(x_t, k / 3, images=known, sigma_q=2) - x_t)
        assert (x - x_t).abs().max() < 1e-4
    assert report.samples == drawn.samples == sampled.result
    assert report.images is known
    assert seen.path is sampled.result["its twin"]
    assert (seen.images, seen.window, seen.sigma_q) == (known, 3, 2)
    for call in (drawn, seen):
        assert (known + call.mean).min() == pytest.approx(-1, abs=1e-3)
    printed = capsys.readouterr().out.split("figures:")[0]
    cells = [f"{x:.3f}" for row in found.result.values() for x in row]
    cells += [cell for row in report.result[1:] for cell in row[1:]]
    assert re.findall(r"(?<!\S)-?[\d.]+%?(?!\S)", printed) == [f"{t:.2g}" for t in s.TIMES] + cells
