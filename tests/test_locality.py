"""Experiment 14 held to references that share no code with it."""

import inspect
from functools import partial

import digits
import locality as s
import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def images():
    """The ten digits, less their mean, (10, 256)."""
    images, _ = s.digits(10, rng())
    return images - images.mean()


def test_the_minimiser_is_that_of_experiment_13():
    assert inspect.getsource(s.exact_denoiser) == inspect.getsource(digits.exact_denoiser)


@pytest.mark.parametrize("window", [1, 3, 4, 5, 16])
def test_windows(window):
    """Pixel by pixel, around the edges."""
    images = torch.randn(2, 256, generator=rng(1))
    got = s.windows(images, window)
    squares, away = images.view(2, 16, 16).numpy(), range(-(window // 2), (window + 1) // 2)
    for place in (0, 15, 100, 255):
        row, column = divmod(place, 16)
        want = [squares[:, (row + i) % 16, (column + j) % 16] for i in away for j in away]
        assert (got[:, place].numpy() == np.stack(want, axis=1)).all()


@pytest.mark.parametrize("t", [0.01, 0.04, 1.0])
def test_local_denoiser(images, t):
    """One pixel at a time, in a loop over all windows of all images."""
    x_t = s.add_noise(images, t, 4.0, rng(2))[:2].double()
    got = s.local_denoiser(x_t, t, images=images.double(), window=3, sigma_q=4.0)
    noisy, known = x_t.view(2, 16, 16).numpy(), images.double().view(10, 16, 16).numpy()
    for row, column in [(0, 0), (8, 7), (3, 15)]:
        squares = np.zeros((10, 16, 16))
        for i in (-1, 0, 1):
            for j in (-1, 0, 1):
                shifted = np.roll(known, (-i, -j), axis=(1, 2))
                squares += (shifted - noisy[1, (row + i) % 16, (column + j) % 16]) ** 2
        weights = np.exp(-(squares - squares.min()) / (2 * 16 * t))
        want = (weights * known).sum() / weights.sum()
        assert got[1, 16 * row + column].item() == pytest.approx(want, abs=1e-5)


def test_errors_add_up(images):
    """E|f - x_0|^2 = E|L - x_0|^2 + E|f - L|^2 for an untrained f; not for one that sees more."""
    torch.manual_seed(3)
    network = s.Denoiser(5, 4.0).requires_grad_(False)
    network.last[1].weight *= 10  # far from L
    whole = partial(s.exact_denoiser, images=images, sigma_q=4.0)
    x_0 = images.repeat(15, 1)
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
def test_field_of_view(window):
    """A pixel is seen from the places around it and nowhere else; all places are alike."""
    torch.manual_seed(5)
    network = s.Denoiser(window, 4.0).requires_grad_(False)
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


def test_first_guess(images):
    """If the last layer gives 2: the best linear guess from the pixel itself, and 2 its error."""
    network = s.Denoiser(5, 4.0).requires_grad_(False)
    network.last[1].weight.zero_()
    network.last[1].bias.fill_(2)
    assert images.std().item() == pytest.approx(s.SIGMA_DATA, rel=0.05)
    for t in (0.01, 1.0):
        x_t = s.add_noise(images, t, 4.0, rng(7))
        slope = 1 / (1 + 16 * t / s.SIGMA_DATA**2)
        want = slope * x_t + 2 * (slope * 16 * t) ** 0.5
        assert (network(x_t, t) - want).abs().max() < 1e-5
        assert network.c_out(t) == pytest.approx((slope * 16 * t) ** 0.5)


def test_it_learns(images, monkeypatch):
    """Nearly L; and the loss goes to L's error over c_out^2, a mean over sigma_t uniform."""
    losses, backward = [], torch.Tensor.backward

    def spy(loss):
        losses.append(loss.item())
        backward(loss)

    monkeypatch.setattr(torch.Tensor, "backward", spy)
    network = s.train(images, window=3, sigma_q=4.0, train_steps=250, rng=rng(8), batch_size=512)
    local = partial(s.local_denoiser, images=images, window=3, sigma_q=4.0)
    monkeypatch.setattr(s, "NUM_DRAWS", 10)
    found = s.measure(network, local, local, images, rng(9))
    least = [0.98, 0.97, 0.95, 0.94, 0.96, 0.94, 0.88]
    assert (np.array(found["share of L learned"]) > least).all()
    error = np.add(found["least error (L's)"], found["network's excess"])
    mean = np.trapezoid(error, np.sqrt(s.TIMES)) / (1 - s.MIN_T**0.5)
    assert np.mean(losses[-50:]) == pytest.approx(mean, rel=0.05)


def test_measure_of_known_errors(images):
    """If x_t itself were L: the noise is its error, .1^2 the excess of + .1; noise and .2^2."""

    def network(x_t, t):
        return x_t + 0.1

    network.sigma_q, network.c_out = 4.0, lambda t: 2 + t
    found = s.measure(network, lambda x_t, t: x_t, lambda x_t, t: x_t - 0.2, images, rng(10))
    noise, unit = 16 * np.array(s.TIMES), (2 + np.array(s.TIMES)) ** 2
    assert found["least error (L's)"] * unit == pytest.approx(noise, rel=0.06)
    assert found["minimiser's error"] * unit == pytest.approx(noise + 0.04, rel=0.06)
    assert found["network's excess"] * unit == pytest.approx(0.01, rel=1e-3)
    unlearned = 0.01 / (noise + s.SIGMA_DATA**2)
    assert 1 - np.array(found["share of L learned"]) == pytest.approx(unlearned, rel=0.1)


def test_sample():
    """A network that always says a goes straight there: at every t, a + sqrt(t) (x_1 - a)."""
    x_1, a = torch.randn(3, 256, generator=rng(11)), torch.arange(256.0) / 100
    path = s.sample(lambda x_t, t: a.expand(x_t.shape), x_1, 4, "")
    want = [a + t**0.5 * (x_1 - a) for t in (1, 0.75, 0.5, 0.25, 0)]
    assert (torch.stack(path) - torch.stack(want)).abs().max() < 1e-5


def test_report(images):
    """Samples of three kinds, made so that every number is known."""
    wave = torch.linspace(0, 6 * torch.pi, 257)[:-1]
    sine, cosine = wave.sin(), wave.cos()  # uncorrelated
    shifted = images.view(10, 16, 16).roll((5, -3), (1, 2)).flatten(1)
    shifted[0, :4] += 1.45  # 2.9 away, a copy
    shifted[1:3, :4] += 2  # 4 away, none
    far = images.max() + 1 + torch.stack([sine, 2 * sine, sine + 2 * cosine])
    others = torch.stack([3 - shifted[0], shifted[1] + sine / 2, cosine])
    paths = {"network": [None, shifted[:3]], "A": [None, others], "B": [None, far]}
    assert s.likeness(sine.expand(3, -1), far) == pytest.approx([1, 1, 0.2], abs=1e-4)
    rows = s.report(paths, images)
    assert [row[0] for row in rows] == ["DDIM", "network", "A", "B"]
    assert rows[1][1:] == ["1.000", "4.00", "33%"]
    same = [np.corrcoef(x, y)[0, 1] ** 2 for x, y in zip(shifted.numpy(), others.numpy())]
    assert 1 > sorted(same)[1] > np.mean(same) + 0.01
    assert (rows[2][1], rows[2][3]) == (f"{np.median(same):.3f}", "0%")
    apart = [min((image - x).norm() for image in images) for x in far]  # no shift is nearer
    assert float(rows[3][2]) == pytest.approx(np.median(apart), rel=0.02)


def test_figures(images):
    """Each curve and each picture is what its label says, in the panel whose title says so."""
    found = {"least error (L's)": 1, "network's excess": 2, "share of L learned": 0.5}
    found = {name: [x + k / 10 for k in range(7)] for name, x in found.items()}
    found["minimiser's error"] = [5.0] * 7
    left, right = s.draw_errors(found).axes
    lines = {line.get_label(): line for line in left.lines}
    assert lines["$L$, the least for a window"].get_ydata()[2] == pytest.approx(1.2)
    assert lines["network"].get_xydata()[3] == pytest.approx([0.04, 3.6])
    assert lines["minimiser"].get_ydata()[3] == 5
    assert right.lines[0].get_xydata()[1] == pytest.approx([0.0025, 0.6])
    assert (lines["network"].get_color(), right.lines[0].get_color()) == (s.BLUE, s.BLUE)
    for ax in (left, right):
        assert ax.get_xlim()[0] > 1 > ax.get_xlim()[1] > 0

    names, squares = ["network", "its twin", "minimiser"], images.view(10, 16, 16).numpy()
    paths = {name: [None, images / (k + 1)] for k, name in enumerate(names)}
    for k, ax in enumerate(s.draw_samples(paths, 0.25).axes):
        strip = np.asarray(ax.images[0].get_array()).reshape(16, 10, 16)
        assert ax.get_ylabel() == names[k]
        assert np.abs(strip[:, 3] - squares[3] / (k + 1) - 0.25).max() < 1e-5
        assert ax.images[0].cmap(1.0)[:3] == to_rgb(s.BLUE if k == 1 else "k")


def test_the_windows_drawn(images):
    """x_t is a digit, shifted: the framed window that weighs most is the same one, there."""
    end = images[[4]].view(16, 16).roll((-2, 1), (0, 1)).view(1, 256)
    path = [end + 4 * k / 100 for k in range(100, -1, -1)]
    fig = s.draw_windows(path, 0.25, images=images, window=5, sigma_q=0.5)
    rows = np.reshape(fig.axes, (2, 5))
    ink = s.windows(end, 5)[0].sum(dim=1).argmax().item()
    down, right = divmod(ink, 16)
    for row, k in zip(rows, (16, 4)):
        assert row[0].get_title().endswith(f"{0.5 * (k / 100) ** 0.5:.2g}")
        drawn = row[0].images[0].get_array() - 0.25
        centered = np.roll(path[100 - k].view(16, 16).numpy(), (8 - down, 8 - right), axis=(0, 1))
        assert np.abs(drawn - centered).max() < 1e-5
        assert row[0].patches[0].get_xy() == (5.5, 5.5)
        assert row[0].images[0].cmap(1.0)[:3] == to_rgb(s.BLUE)
    drawn = rows[1][1].images[0].get_array() - 0.25
    assert np.abs(drawn.flatten() - images[4].numpy()).max() < 1e-5
    assert rows[1][1].patches[0].get_xy() == (right - 1 - 2.5, down + 2 - 2.5)
    weights = [float(ax.get_title()[7:-1]) for ax in rows[1][1:]]
    assert weights == sorted(weights, reverse=True)


def test_main(tmp_path, monkeypatch):
    """One start for all; each denoiser to its place; what is printed is what was measured."""
    calls = {"train": [], "measure": [], "sample": [], "report": [], "table": []}
    calls |= {"draw_samples": [], "draw_errors": [], "draw_windows": []}

    def spy(name, original):
        def call(*args, **options):
            result = original(*args, **options)
            calls[name].append((args, options, result))
            return result

        monkeypatch.setattr(s, name, call)

    for name in calls:
        spy(name, getattr(s, name))
    monkeypatch.setattr(s, "NUM_DRAWS", 2)
    small = "--num-images 3 --num-samples 4 --num-steps 3 --train-steps 2 --window 3 --sigma-q 2"
    s.main(f"--figures-dir {tmp_path} {small}".split())
    _, options, network = calls["train"][0]
    images = options["images"]
    assert images.mean().abs() < 1e-6
    view = {"images": images, "window": 3, "sigma_q": 2}
    assert options == {**view, "train_steps": 2, "rng": options["rng"]}
    assert (network.window, network.sigma_q) == (3, 2)
    (learned, local, exact, old, _), _, found = calls["measure"][0]
    assert (learned, old) == (network, images)
    assert (local.func, local.keywords) == (s.local_denoiser, view)
    assert (exact.func, exact.keywords) == (s.exact_denoiser, {"images": images, "sigma_q": 2})
    x_1 = calls["sample"][0][0][1]
    assert x_1.std().item() == pytest.approx(2, rel=0.1)
    paths = {}
    for f, call in zip((network, local, exact), calls["sample"]):
        (which, start, num_steps, name), _, path = call
        assert (which, num_steps) == (f, 3)
        assert start is x_1
        paths[name] = path
    assert [*paths] == ["network", "its twin", "minimiser"]
    assert calls["report"][0][0] == (paths, images)
    (drawn, mean), _, _ = calls["draw_samples"][0]
    assert drawn == paths
    assert mean.item() == pytest.approx(s.digits(3, rng())[0].mean().item())
    assert calls["draw_errors"][0][0] == (found,)
    assert calls["draw_windows"][0][0][0] is paths["its twin"]
    assert calls["draw_windows"][0][1] == view
    (heading, *rows), report = (args[0] for args, _, _ in calls["table"])
    assert report is calls["report"][0][2]
    assert [float(t) for t in heading[1:]] == pytest.approx(s.TIMES, rel=0.01)
    assert {name: row for name, *row in rows} == {
        name: [f"{value:.3f}" for value in row] for name, row in found.items()
    }
    assert len({*map(tuple, found.values())}) == len(found)
