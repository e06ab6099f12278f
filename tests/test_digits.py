"""Experiment 13 held to references that share no code with it."""

from functools import partial

import digits as s
import numpy as np
import pytest
import torch
from matplotlib.path import Path as MplPath
from matplotlib.transforms import Affine2D


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def data():
    """300 images with mean 0, their labels, and the exact denoiser for sigma_q = 2."""
    images, labels = s.digits(300, rng())
    images = images - images.mean(dim=0)
    return images, labels, partial(s.exact_with_label, images=images, labels=labels, sigma_q=2.0)


def test_ink_is_the_area_inside_the_outline():
    """Against 144 points a pixel, each moved and turned back to the outline."""
    images, labels = s.digits(60, rng(1))
    assert labels.tolist() == [*range(10)] * 6
    assert torch.nn.functional.pdist(images).min() > 1  # black to white is 32
    draws = torch.rand(60, 4, generator=rng(1)).double().numpy()
    x = (np.arange(192) + 0.5) / 12
    points = np.stack(np.meshgrid(x, x[::-1]), axis=2)  # the first row is at the top
    for i, outline in [*enumerate(s.outlines())][::7]:
        height, angle, right, up = draws[i]
        angle = np.deg2rad(10 * angle - 5)
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        back = (points - [7.5 + right, 7.5 + up]) @ turn / (16 * (0.7 + 0.06 * height))
        inside = np.zeros(192**2, dtype=bool)
        polygons = outline.transformed(Affine2D().scale(1000)).to_polygons()
        assert len(polygons) - 1 == [1, 0, 0, 0, 1, 0, 1, 0, 2, 1][i % 10]  # holes
        for polygon in polygons:
            inside ^= MplPath(polygon).contains_points(1000 * back.reshape(-1, 2))
        want = 2 * inside.reshape(16, 12, 16, 12).mean(axis=(1, 3)) - 1
        off = images[i].reshape(16, 16).numpy() - want
        assert np.abs(off).max() < 0.35  # Agg draws curves to a tenth of a pixel
        assert np.abs(off).mean() < 0.02


def test_a_missing_font(monkeypatch, capsys):
    """One line, and status 2."""
    monkeypatch.setattr(s, "NAMES", ["DejaVuSans", "no-such-font"])
    with pytest.raises(SystemExit) as end:
        s.outlines()
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "no-such-font.ttf" in line


@pytest.mark.parametrize("t", [0.004, 0.1, 1.0])
def test_exact_denoiser(data, t):
    """With a label, the mean over that digit's images; without, over all."""
    images, labels, exact = data
    label = torch.tensor([3, 3, 7, s.NO_LABEL, 0, s.NO_LABEL])
    x_t = s.add_noise(images[:6], t, 2.0, rng(3))
    for row, x, digit in zip(exact(x_t, t, label), x_t.double().numpy(), label):
        points = (images if digit == s.NO_LABEL else images[labels == digit]).double().numpy()
        squares = ((x - points) ** 2).sum(axis=1)
        weights = np.exp((squares.min() - squares) / (2 * 4 * t))
        assert np.abs(row.numpy() - weights @ points / weights.sum()).max() < 1e-3


def test_guided():
    """D = 1 without label, D = label with it; a step of a quarter of t goes a quarter to D."""

    def denoiser(x_t, t, label):
        return torch.where(label == s.NO_LABEL, 1, label)[:, None].expand(x_t.shape)

    label = torch.tensor([0, 4, 9])
    for w, want in [(0, [1, 1, 1]), (1, [0, 4, 9]), (2, [-1, 7, 17])]:
        got = s.guided(denoiser, label, w)(torch.full((3, 2), 8), 0.5, 0.125)
        assert (4 * got[:, 1] - 3 * 8).tolist() == want


def test_denoiser(data, monkeypatch):
    """On all axes the Gaussian one solves the normal equations; the network adds 2 times c_out."""
    images, labels, _ = data
    monkeypatch.setattr(s, "NUM_AXES", 256)
    denoiser = s.Denoiser(images, 2.0).requires_grad_(False)
    denoiser.last.weight.zero_()
    denoiser.last.bias.fill_(2)
    x_t = s.add_noise(images, 0.1, 2.0, rng(4))
    covariance = np.cov(images.double().numpy().T, bias=True)
    want = covariance @ np.linalg.solve(covariance + 0.4 * np.eye(256), x_t.double().numpy().T)
    got = denoiser.gaussian(x_t, 0.1)
    assert np.abs(got.numpy() - want.T).max() < 1e-4
    assert images.std().item() == pytest.approx(s.SIGMA_DATA, rel=0.05)
    error = (1 / (1 / s.SIGMA_DATA**2 + 1 / 0.4)) ** 0.5  # of a guess, if x_0 is N(0, SIGMA_DATA^2)
    added = (denoiser(x_t, 0.1, labels) - got) @ denoiser.axes
    assert (added - 2 * error).abs().max() < 1e-4


def test_it_learns(data):
    """A short training is nearer to the exact denoiser than the Gaussian one, at every t."""
    images, labels, exact = data
    options = {"sigma_q": 2.0, "train_steps": 200, "batch_size": 128}
    denoiser, losses = s.train(images, labels, **options, rng=rng(6))
    errors = s.measure(denoiser, exact, images, images, 2.0, rng(7))
    ratios = np.divide(errors["excess, network"], errors["excess, Gaussian denoiser"])
    assert ratios.max() < 0.98
    # The loss is a mean over sqrt(t), here by the trapezoidal rule, and labels make it less.
    error, root = np.array(errors["new images, network"]), np.sqrt(s.TIMES)
    mean = ((error[1:] + error[:-1]) / 2 * np.diff(root)).sum() / (root[-1] - root[0])
    assert len(losses) == 200
    assert 0.7 * mean < np.mean(losses[-20:]) < 0.95 * mean


def test_measure_of_known_errors(data):
    """If x_t itself were the best guess: the noise is the Bayes error, .1^2 the excess of + .1."""

    def exact(x_t, t, label):
        assert (label == s.NO_LABEL).all()
        return x_t

    def network(x_t, t, label):
        return exact(x_t, t, label) + 0.1

    network.gaussian = lambda x_t, t: x_t - 0.2
    errors = s.measure(network, exact, data[0], data[0].flip(1), 2.0, rng(10))
    times = np.array(s.TIMES)
    unit = 1 / (1 / s.SIGMA_DATA**2 + 1 / (4 * times))
    noise = {"Bayes error": 0, "new images, exact": 0, "new images, network": 0.01}
    for name, more in noise.items():
        assert errors[name] * unit == pytest.approx(4 * times + more, rel=0.03)
    assert errors["excess, network"] * unit == pytest.approx(0.01, rel=1e-3)
    assert errors["excess, Gaussian denoiser"] * unit == pytest.approx(0.04, rel=1e-3)


def test_read_and_summary():
    """Ten images at distance 1 of one another: from one to another, legible for a third."""
    images, labels = torch.eye(20)[::2] / 2**0.5, torch.arange(10)
    shares = torch.tensor([0.0, 0.3, 0.36, 0.6])[:, None]
    x_0 = (1 - shares) * images[4] + shares * images[7]
    digit, legible = s.read(x_0, images, labels)
    assert digit.tolist() == [4, 4, 4, 7]
    assert legible.tolist() == [True, True, False, False]
    shares = s.summary(x_0, images[[4, 7, 7, 7]], torch.tensor([4, 4, 5, 6]), images, labels)
    assert shares == {"legible": 0.5, "as asked": 0.5, "as its twin": 0.5, "twin legible": 1.0}


def test_twins_are_images_of_the_digit_asked_for(data):
    images, labels, exact = data
    x_1, label = 2 * torch.randn(20, 256, generator=rng(12)), torch.arange(20) % 10
    path = s.sample(exact, x_1, label, 1, 30)
    assert (len(path), path[0]) == (31, x_1)
    distances = torch.cdist(path[-1], images).masked_fill(label[:, None] != labels, 32)
    assert distances.amin(dim=1).max() < 0.05


def test_main(tmp_path, capsys, monkeypatch):
    """The same start for all; the exact denoiser of the images learned; each path to its place."""
    calls = {"train": [], "measure": [], "sample": [], "draw_digits": [], "animate": []}

    def spy(name, original):
        def call(*args, **options):
            result = original(*args, **options)
            calls[name].append((args, result))
            return result

        monkeypatch.setattr(s, name, call)

    monkeypatch.setattr(s, "animate", partial(s.animate, num_frames=2))
    for name in calls:
        spy(name, getattr(s, name))
    small = "--num-images 60 --num-samples 12 --num-steps 3 --train-steps 2"
    s.main(f"--figures-dir {tmp_path} {small} --sigma-q 4 --guidance 3".split())
    (images, labels), (denoiser, _) = calls["train"][0]
    assert images.mean(dim=0).abs().max() < 1e-5
    (learned, exact, old, new, sigma_q, _), _ = calls["measure"][0]
    assert (learned, old) == (denoiser, images)
    assert sigma_q == denoiser.sigma_q == 4
    assert exact.keywords == {"images": images, "labels": labels, "sigma_q": 4}
    assert 0.1 < torch.cdist(new, images).amin(dim=1).min() < 9  # other draws, centred alike
    x_1 = calls["sample"][0][0][1]
    assert x_1.std().item() == pytest.approx(4, rel=0.1)
    (samples, twins, _), _ = calls["draw_digits"][0]
    ends = [x_0 for pair in zip(samples.values(), twins.values()) for x_0 in pair]
    for k, ((which, start, label, w, num_steps), path) in enumerate(calls["sample"]):
        assert which is (exact if k % 2 else denoiser)
        assert start is x_1
        assert label.tolist() == [*range(10), 0, 1]
        assert (w, num_steps) == ((0, 1, 3)[k // 2], 3)
        assert ends[k] is path[-1]
    paths = calls["animate"][0][0][0]
    assert [paths["DDIM"], paths["exact"]] == [path for _, path in calls["sample"][-2:]]
    noise = paths["DDPM"][1] - s.guided(denoiser, label, 3)(x_1, 1.0, 1 / 3)
    assert noise.std().item() == pytest.approx(4 / 3**0.5, rel=0.1)
    names = {"digits.jpg", "excess-vs-t.jpg", "digits.gif"}
    assert {path.name for path in tmp_path.iterdir()} == names
    starts = [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()]
    assert starts[-3:] == ["without label", "with label", "guided, w = 3"]
