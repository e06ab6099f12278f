"""Experiment 13 held to references that share no code with it."""

from functools import partial
from pathlib import Path

import digits as s
import numpy as np
import pytest
import torch
from matplotlib.path import Path as MplPath
from matplotlib.transforms import Affine2D


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def mean_by_loop(x, points, sigma_t):
    """E[x_0 | x_t] for one x_t, by a loop in double precision."""
    squares = [((x - point) ** 2).sum() / (2 * sigma_t**2) for point in points]
    weights = [np.exp(min(squares) - square) for square in squares]
    return sum(w * point for w, point in zip(weights, points)) / sum(weights)


@pytest.fixture(scope="module")
def data():
    """300 images with mean 0, and their labels."""
    images, labels = s.digits(300, rng())
    return images - images.mean(dim=0), labels


def test_ink_is_the_area_inside_the_outline():
    """Against 144 points a pixel, each moved and turned back to the outline."""
    images, labels = s.digits(60, rng(1))
    assert labels.tolist() == [*range(10)] * 6
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


def test_digits_and_fonts_differ():
    """All 60 are apart, and yet small moves and turns leave a digit nearest to its like."""
    images, others = s.digits(60, rng(1))[0], s.digits(60, rng(2))[0]
    apart = torch.cdist(images, images) + 100 * torch.eye(60)
    assert apart.min() > 1  # black to white is 32
    nearest = torch.cdist(images, others).argmin(dim=1)
    assert (nearest % 10 == torch.arange(60) % 10).double().mean() > 0.9


def test_a_missing_font(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(s, "FONTS", [*s.FONTS[:3], Path("fonts/none.ttf")])
    with pytest.raises(SystemExit) as end:
        s.main(["--figures-dir", str(tmp_path)])
    assert end.value.code == 2
    out, err = capsys.readouterr()
    assert (out, len(err.splitlines())) == ("", 1)
    assert "none.ttf" in err
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("t", [0.004, 0.1, 1.0])
def test_exact_denoiser(data, t):
    """With a label, the mean over that digit's images; without, over all."""
    images, labels = data
    label = torch.tensor([3, 3, 7, s.NO_LABEL, 0, s.NO_LABEL])
    x_t = s.add_noise(images[:6], t, 2.0, rng(3))
    got = s.exact_with_label(x_t, t, label, images=images, labels=labels, sigma_q=2.0)
    for row, x, digit in zip(got, x_t.double().numpy(), label):
        points = images if digit == s.NO_LABEL else images[labels == digit]
        want = mean_by_loop(x, points.double().numpy(), 2 * t**0.5)
        assert np.abs(row.numpy() - want).max() < 1e-3


def test_reverse_mean_of_two_points():
    """In one dimension: the mean of the two bridges, to each point, with posterior weights."""
    points = torch.tensor([[-1.0], [2.0]])
    x_t, t, dt = torch.linspace(-3, 4, 8)[:, None], 0.5, 0.2
    denoiser = partial(s.exact_denoiser, images=points, sigma_q=1.5)
    odds = torch.exp(((x_t + 1) ** 2 - (x_t - 2) ** 2) / (2 * 1.5**2 * t))  # of 2 to -1
    ends = (t - dt) / t * x_t + dt / t * points.T  # (8, 2)
    want = (ends[:, :1] + odds * ends[:, 1:]) / (1 + odds)
    torch.testing.assert_close(s.reverse_mean(x_t, t, dt, denoiser=denoiser), want)


def test_guided():
    """D = 1 without label, D = label with it; and with dt = t the reverse mean is D."""

    def denoiser(x_t, t, label):
        return torch.where(label == s.NO_LABEL, 1, label)[:, None].expand(x_t.shape)

    label = torch.tensor([0, 4, 9])
    for w, want in [(0, [1, 1, 1]), (1, [0, 4, 9]), (2, [-1, 7, 17])]:
        got = s.guided(denoiser, label, w)(torch.zeros(3, 2), 0.5, 0.5)
        assert got[:, 1].tolist() == want


def test_samplers_on_a_point_mass():
    """To a point mass at 0: DDIM is at x_1 sqrt(t), and DDPM's variance obeys a recursion."""
    mean = partial(s.reverse_mean, denoiser=lambda x_t, t: torch.zeros_like(x_t))
    x_1 = 3 * torch.randn(20_000, 5, generator=rng())
    for k, x_t in zip((6, 5, 4, 3, 2, 1, 0), s.ddim(mean, x_1, 7)):
        torch.testing.assert_close(x_t, x_1 * (k / 7) ** 0.5, atol=1e-5, rtol=1e-5)
    variance = 9.0
    for k, x_t in zip((4, 3, 2, 1), s.ddpm(mean, x_1, 4, 3.0, rng(1))):
        variance = (1 - 1 / k) ** 2 * variance + 9 / 4
        assert x_t.var().item() == pytest.approx(variance, rel=0.03)


def test_gaussian_denoiser(data, monkeypatch):
    """On all axes it solves the normal equations; the leading ones hold nearly all variance."""
    images, _ = data
    assert s.Denoiser(images, 2.0).variances.sum() > 0.99 * images.square().mean(dim=0).sum()
    monkeypatch.setattr(s, "NUM_AXES", 256)
    covariance = np.cov(images.double().numpy().T, bias=True)
    x_t = s.add_noise(images[:5], 0.1, 2.0, rng(4))
    want = covariance @ np.linalg.solve(covariance + 0.4 * np.eye(256), x_t.double().numpy().T)
    got = s.Denoiser(images, 2.0).gaussian(x_t, 0.1).numpy()
    assert np.abs(got - want.T).max() < 1e-4


def test_what_the_network_adds(data):
    """In the axes, in units of the error of the best linear guess of N(0, SIGMA_DATA^2)."""
    images, labels = data
    assert images.std().item() == pytest.approx(s.SIGMA_DATA, rel=0.05)
    denoiser = s.Denoiser(images, 2.0).requires_grad_(False)
    denoiser.last.weight.zero_()
    denoiser.last.bias.fill_(2)
    x_t = s.add_noise(images, 0.3, 2.0, rng(5))
    added = (denoiser(x_t, 0.3, labels) - denoiser.gaussian(x_t, 0.3)) @ denoiser.axes
    error = (1 / (1 / s.SIGMA_DATA**2 + 1 / (4 * 0.3))) ** 0.5
    torch.testing.assert_close(added, torch.full((300, 96), 2 * error), atol=1e-4, rtol=1e-4)


def test_it_learns(data):
    """A short training is nearer to the exact denoiser than the Gaussian one, at every t."""
    images, labels = data
    options = {"sigma_q": 2.0, "train_steps": 200, "batch_size": 128}
    denoiser, losses = s.train(images, labels, **options, rng=rng(6))
    exact = partial(s.exact_with_label, images=images, labels=labels, sigma_q=2.0)
    errors = s.measure(denoiser, exact, images, images, 2.0, rng(7))
    ratios = np.divide(errors["excess, network"], errors["excess, Gaussian denoiser"])
    assert ratios.max() < 0.98
    assert ratios[2:].max() < 0.8
    # The loss is a mean over sqrt(t), here by the trapezoidal rule, and labels make it less.
    error, root = np.array(errors["new images, network"]), np.sqrt(s.TIMES)
    mean = ((error[1:] + error[:-1]) / 2 * np.diff(root)).sum() / (root[-1] - root[0])
    assert len(losses) == 200
    assert 0.7 * mean < np.mean(losses[-20:]) < 0.95 * mean
    x_t = s.add_noise(images, 1.0, 2.0, rng(8))
    with_label = (denoiser(x_t, 1.0, labels) - images).square().mean().item() / s.c_out(1, 2) ** 2
    assert with_label < 0.8 * error[-1]


def test_measure_of_known_errors(data):
    """A network that is off by .1 has an excess of .01, on new images this and the exact one's."""
    images, labels = data
    exact = partial(s.exact_with_label, images=images, labels=labels, sigma_q=2.0)
    none = torch.full_like(labels, s.NO_LABEL)

    class Shifted:
        def gaussian(self, x_t, t):
            return exact(x_t, t, none) - 0.2

        def __call__(self, x_t, t, label):
            return exact(x_t, t, label) + 0.1

    new = images.flip(1)  # in a mirror
    errors = s.measure(Shifted(), exact, images, new, 2.0, rng(10))
    unit = np.array([s.c_out(t, 2.0) ** 2 for t in s.TIMES])
    errors = {name: row * unit for name, row in errors.items()}
    assert errors["excess, network"] == pytest.approx(0.01, rel=1e-3)
    assert errors["excess, Gaussian denoiser"] == pytest.approx(0.04, rel=1e-3)
    assert errors["Bayes error"][0] < 1e-4  # little noise: it knows which image it was
    x_t = s.add_noise(images, 1.0, 2.0, rng(11)).double().numpy()[:100]
    points = images.double().numpy()
    squares = [((mean_by_loop(x, points, 2) - x_0) ** 2).mean() for x, x_0 in zip(x_t, points)]
    error = 5 * np.std(squares) * (1 / 100 + 1 / 300) ** 0.5
    assert errors["Bayes error"][-1] == pytest.approx(np.mean(squares), abs=error)
    nearest = torch.cdist(new, images).amin(dim=1).square().mean().item() / 256
    assert errors["new images, exact"][0] == pytest.approx(nearest, rel=0.05)
    more = errors["new images, network"] - errors["new images, exact"]
    assert more == pytest.approx(0.01, abs=0.002)


def test_read_and_summary():
    """Ten images at distance 1 of one another: from one to another, legible for a third."""
    images, labels = torch.eye(20)[::2] / 2**0.5, torch.arange(10)
    shares = torch.tensor([0.0, 0.3, 0.36, 0.6])[:, None]
    x_0 = (1 - shares) * images[4] + shares * images[7]
    digit, legible = s.read(x_0, images, labels)
    assert digit.tolist() == [4, 4, 4, 7]
    assert legible.tolist() == [True, True, False, False]
    twins, label = images[[4, 7, 7, 7]], torch.tensor([4, 4, 5, 6])
    assert s.summary(x_0, twins, label, images, labels) == {
        "legible": 0.5,
        "as asked": 0.5,
        "as its twin": 0.5,
        "twin legible": 1.0,
        "twin as asked": 0.25,
    }


def test_runs_with_the_exact_denoiser(data):
    """Every run ends on an image of the digit asked for; DDPM leaves its last noise."""
    images, labels = data
    exact = partial(s.exact_with_label, images=images, labels=labels, sigma_q=2.0)
    x_1, label = 2 * torch.randn(20, 256, generator=rng(12)), torch.arange(20) % 10
    x_0 = s.sample(exact, x_1, label, 1, 30)
    assert torch.cdist(x_0, images).amin(dim=1).max() < 0.05
    assert s.summary(x_0, x_0, label, images, labels)["as asked"] == 1
    paths = s.record(exact, exact, x_1, label, 1, 30, 2.0, rng(13))
    for name in ("DDIM", "exact"):
        assert torch.equal(paths[name][0], x_1)
        assert len(paths[name]) == 31
        torch.testing.assert_close(paths[name][-1], x_0)
    noise = torch.cdist(paths["DDPM"][-1], images).amin(dim=1).square().mean().item() / 256
    assert noise == pytest.approx(4 / 30, rel=0.1)
    zero = s.record(lambda x_t, t, label: 0 * x_t, exact, x_1, label, 1, 3, 2.0, rng(13))
    assert zero["DDIM"][-1].abs().max() < 1e-5 < zero["exact"][-1].abs().max()


def test_frames(monkeypatch):
    """Frames are even in sigma_t = sigma_q sqrt(t); contrast does not grow with the noise."""
    seen = []
    monkeypatch.setattr(s, "show_digits", lambda ax, rows: seen.append(rows["DDIM"]))
    t = torch.arange(100, -1, -1)[:, None, None] / 100  # at each step, a picture of t
    movie = s.animate({"DDIM": t.expand(101, 10, 256)}, torch.zeros(256), 2.0, num_frames=5)
    assert [*movie.new_frame_seq()] == [1, 0.75, 0.5, 0.25, 0] + [0] * 5
    movie._draw_was_started = True  # it will not be saved
    for share in (1, 0.5, 0):
        movie._func(share)
        torch.testing.assert_close(seen[-1], torch.full((10, 256), share**2 / (1 + 2 * share)))


def test_main(tmp_path, capsys, monkeypatch):
    calls = {"train": [], "sample": [], "record": [], "measure": []}

    def spy(name, original):
        def record_call(*args, **options):
            calls[name].append((args, options))
            return original(*args, **options)

        monkeypatch.setattr(s, name, record_call)

    for name in calls:
        spy(name, getattr(s, name))
    monkeypatch.setattr(s, "animate", partial(s.animate, num_frames=2))
    small = "--num-images 60 --num-samples 12 --num-steps 3 --train-steps 2"
    s.main(f"--figures-dir {tmp_path} {small} --sigma-q 4 --guidance 3".split())
    images, labels = calls["train"][0][0]
    assert images.mean(dim=0).abs().max() < 1e-5
    x_1 = calls["sample"][0][0][1]
    assert x_1.std().item() == pytest.approx(4, rel=0.1)
    for k, ((denoiser, start, label, w, num_steps), _) in enumerate(calls["sample"]):
        assert (w, num_steps) == ((0, 1, 3)[k // 2], 3)
        assert torch.equal(start, x_1)  # twins, and a column of the figure
        assert label.tolist() == [*range(10), 0, 1]
        exact = {"images": images, "labels": labels, "sigma_q": 4}
        assert denoiser.keywords == exact if k % 2 else denoiser.sigma_q == 4
    (_, known, old, new, sigma_q, _), _ = calls["measure"][0]
    assert (known.keywords, sigma_q) == (exact, 4)
    assert torch.equal(old, images)
    apart = torch.cdist(new, images).amin(dim=1)
    assert 0.1 < apart.min() < apart.max() < 9  # other draws, centred alike
    (_, _, start, label, w, _, sigma_q, _), _ = calls["record"][0]
    assert torch.equal(start, x_1[:10])
    assert (label.tolist(), w, sigma_q) == ([*range(10)], 3, 4)
    names = {"digits.jpg", "excess-vs-t.jpg", "digits.gif"}
    assert {path.name for path in tmp_path.iterdir()} == names
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10
    starts = ["without label  ", "with label  ", "guided, w = 3  "]
    assert all(line.startswith(start) for line, start in zip(lines[-3:], starts))
    assert lines[-1].split()[-1] == "100.0%"  # the exact denoiser's digits are those asked for
