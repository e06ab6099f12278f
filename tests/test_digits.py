"""Experiment 13 held to references that share no code with it."""

import re
from functools import partial

import digits as s
import numpy as np
import pytest
import torch
from conftest import paste, snippet
from conftest import torch_rng as rng
from matplotlib.animation import PillowWriter
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.path import Path as MplPath
from matplotlib.transforms import Affine2D

BLACK, BLUE, PINK = "#000000", "#0072b2", "#cc79a7"
# Unlike the default in all respects: 6 x 6, off center, three times as large, unequal labels.
OTHER = """
def digits(n, rng):
    labels = torch.randint(5, (n,), generator=rng) // 2 % 2
    return 3 * torch.rand(n, 36, generator=rng) + labels[:, None], labels
"""


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
    draws = torch.rand(60, 4, generator=rng(1)).double().numpy()
    x = (np.arange(192) + 0.5) / 12
    points = np.stack(np.meshgrid(x, x[::-1]), axis=2)  # the first row is at the top
    for i, outline in [*enumerate(s.outlines())][::25]:
        height, angle, right, up = draws[i]
        angle = np.deg2rad(10 * angle - 5)
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        back = (points - [7.5 + right, 7.5 + up]) @ turn / (16 * (0.7 + 0.06 * height))
        inside = np.zeros(192**2, dtype=bool)
        for polygon in outline.transformed(Affine2D().scale(1000)).to_polygons():
            inside ^= MplPath(polygon).contains_points(1000 * back.reshape(-1, 2))
        want = 2 * inside.reshape(16, 12, 16, 12).mean(axis=(1, 3)) - 1
        off = np.abs(images[i].reshape(16, 16).numpy() - want)
        assert off.max() < 0.35  # Agg draws curves to a tenth of a pixel
        assert off.mean() < 0.02


@pytest.mark.parametrize(
    ("labels", "pixels", "ink", "word"),
    [
        ([0, 2] * 4, 9, 1.0, "labels"),
        ([-1, 0] * 4, 9, 1.0, "labels"),
        ([0] * 4 + [1] * 4, 9, 1.0, "labels"),
        ([0] * 8, 7, 1.0, "7 pixels"),
        ([0] * 8, 9, 0.0, "blank"),
        ([0] * 8, 9, float("nan"), "finite"),
    ],
)
def test_what_it_refuses(labels, pixels, ink, word, monkeypatch, capsys):
    """A label missing, below 0, or not among those learned; no squares, blank, or not finite."""
    other = ink * torch.rand(8, pixels), torch.tensor(labels)
    monkeypatch.setattr(s, "digits", lambda n, rng: other)
    with pytest.raises(SystemExit, match="2"):
        s.main([])
    assert word in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("code", ["", snippet(s), OTHER, OTHER.replace("% 2", "* 0")])
@pytest.mark.parametrize("t", [0.01, 1.0])
def test_the_truth_follows_the_data(code, t):
    """With a label, the mean over the images with that label; without, over all."""
    own = paste(s, code) if code else s
    images, labels = own.digits(90, rng(2))
    label = torch.tensor([*labels[:4], own.NO_LABEL, labels.max(), own.NO_LABEL])
    x_t = own.add_noise(images[:7], t, 2.0, rng(3))
    exact = own.exact_with_label(x_t, t, label, images=images, labels=labels, sigma_q=2.0)
    for row, x, which in zip(exact, x_t.double().numpy(), label):
        points = images.double().numpy()[(labels == which) | (which == own.NO_LABEL)]
        squares = ((x - points) ** 2).sum(axis=1)
        weights = np.exp((squares.min() - squares) / (2 * 4 * t))
        wrong = f"it is no mean of the images with label {which}, weighted by Bayes' rule"
        assert np.abs(row.numpy() - weights @ points / weights.sum()).max() < 1e-3, wrong


def test_denoiser(data, monkeypatch):
    """On all axes the Gaussian one solves the normal equations; the network adds 2 times c_out."""
    images, labels, _ = data
    monkeypatch.setattr(s, "NUM_AXES", 256)
    denoiser = s.Denoiser(images, 10, 2.0).requires_grad_(False)
    denoiser.last.weight.zero_()
    denoiser.last.bias.fill_(2)
    inputs = []
    denoiser.first.register_forward_hook(lambda layer, values, result: inputs.extend(values))
    x_t = s.add_noise(images, 0.1, 2.0, rng(4))
    covariance = np.cov(images.double().numpy().T, bias=True)
    want = covariance @ np.linalg.solve(covariance + 0.4 * np.eye(256), x_t.double().numpy().T)
    got = denoiser.gaussian(x_t, 0.1)
    assert np.abs(got.numpy() - want.T).max() < 1e-4
    error = (1 / (1 / images.var(correction=0) + 1 / 0.4)) ** 0.5  # as images have mean 0
    label = torch.where(torch.arange(300) < 9, s.NO_LABEL, labels)
    added = (denoiser(x_t, 0.1, label) - got) @ denoiser.axes
    assert (added - 2 * error).abs().max() < 1e-4
    z, time, which = inputs[0].split([256, 1, 11], dim=1)
    assert z.square().mean(dim=0)[::8].numpy() == pytest.approx(1, abs=5 * (2 / 300) ** 0.5)
    assert torch.allclose(time, torch.tensor(0.1).log() / 4)
    assert which.argmax(dim=1).tolist() == [10] * 9 + labels[9:].tolist()


def test_train(monkeypatch):
    """If the network is a t, x_0 label / 2 + 1 and c_out sqrt(t), the best a is E[x_0] / E[t]."""
    seen = []

    class Network(torch.nn.Module):
        def __init__(self, images, num_labels, sigma_q):
            super().__init__()
            assert num_labels == 7
            self.a, self.c_out = torch.nn.Parameter(torch.zeros(())), torch.sqrt

        def forward(self, x_t, t, label):
            seen.append((x_t, t, label[:, None]))
            return self.a * t.expand_as(x_t)

    monkeypatch.setattr(s, "Denoiser", Network)
    labels = torch.arange(49) % 7
    images = (labels / 2 + 1)[:, None].expand(49, 4)
    network = s.train(images, labels, sigma_q=0.1, train_steps=120, rng=rng(1), learning_rate=0.5)
    x_t, t, label = (torch.cat(parts) for parts in zip(*seen))
    least, hidden, root = 250**-0.5, label == s.NO_LABEL, t.sqrt()  # 120 * 256 draws
    assert root.min() >= least - 1e-6
    assert root.mean().item() == pytest.approx((1 + least) / 2, abs=5 * 0.29 / 175)
    assert hidden.double().mean().item() == pytest.approx(0.2, abs=5 * 0.4 / 175)
    noise = ((x_t - (label / 2 + 1)) / (0.1 * root))[~hidden[:, 0]]
    assert noise.std().item() == pytest.approx(1, rel=0.01)
    mean_t = (1 - least**3) / (3 * (1 - least))
    assert network.a.item() == pytest.approx(2.5 / mean_t, rel=0.04)
    assert not network.a.requires_grad


def test_it_learns(data):
    """A short training is nearer to the exact denoiser than the Gaussian one."""
    images, labels, exact = data
    denoiser = s.train(images, labels, sigma_q=2.0, train_steps=80, rng=rng(6), batch_size=128)
    errors = s.measure(denoiser, exact, images, images, rng(7))
    ratios = np.divide(errors["excess, network"], errors["excess, Gaussian"])
    assert (ratios < [0.93, 0.93, 0.93, 0.98, 1.01, 1.03]).all()


def test_measure_of_known_errors(data):
    """If x_t itself were the best guess: the noise is the Bayes error, .1^2 the excess of + .1.

    Each is drawn in its color, beside those that it is compared with.
    """

    def exact(x_t, t, label):
        assert (label == s.NO_LABEL).all()
        return x_t

    def network(x_t, t, label):
        return exact(x_t, t, label) + 0.1

    network.sigma_q, network.c_out = 2.0, lambda t: t + 1
    network.gaussian = lambda x_t, t: x_t - 0.2
    errors = s.measure(network, exact, data[0], data[0].flip(1), rng(10))
    noise = 4 * np.array(s.TIMES)
    least, line, excess, new, learned = (
        row * (np.array(s.TIMES) + 1) ** 2 for row in errors.values()
    )
    assert least == pytest.approx(noise, rel=0.03)
    assert (line, excess) == (pytest.approx(0.04, rel=1e-3), pytest.approx(0.01, rel=1e-3))
    assert (new, learned) == (pytest.approx(noise, rel=0.03), pytest.approx(noise + 0.01, rel=0.03))
    assert (least != new).all()

    panels = s.draw_errors({name: [k, 3, 1, 2, 5, 9] for k, name in enumerate(errors)}).axes
    for ax in panels:
        assert (ax.get_xscale(), ax.get_ylim()[0]) == ("log", 0)
        assert ax.get_xlim()[0] > 1 > 0.004 > ax.get_xlim()[1]  # as sampling runs
        assert all([*line.get_xdata()] == s.TIMES for line in ax.lines)
    drawn = [{to_hex(x.get_color()): x.get_ydata()[0] for x in ax.lines} for ax in panels]
    assert drawn == [{BLACK: 0, PINK: 1, BLUE: 2}, {BLACK: 3, BLUE: 4}]


def test_read_and_report():
    """Ten images 1 apart: legible for the first third of a way to another one, and for the last."""
    images, labels = torch.eye(20)[::2] / 2**0.5, torch.arange(10)

    def ways(*shares):
        """From image 0 to 9, from 1 to 9, ..."""
        shares = torch.tensor(shares)[:, None]
        return (1 - shares) * images[: len(shares)] + shares * images[9]

    which, legible = s.read(ways(0, 0.33, 0.336, 0.6, 0.67), images, labels)
    assert which.tolist() == [0, 1, 2, 9, 9]
    assert legible.tolist() == [True, True, False, False, True]
    a, b = ways(0, 0.4, 0, 0, 0, 0, 0, 0), ways(0.4, 0.4, 0.4, 0.6, 0.6, 0.4, 0, 0)
    samples = {"1": [b, a], "2": [a, b]}
    twins = {"1": [a, b], "2": [b, a[[1, 0, 2, 3, 5, 4, 6, 7]]]}
    assert [row[1:] for row in s.report(samples, twins, ways(0.4, 0, 0.4), images, labels)[1:]] == [
        ["33.3%", "27.2%"],
        ["87.5%", "11.7%", "25.0%", "75.0%"],
        ["25.0%", "15.3%", "87.5%", "37.5%"],
    ]


def test_paths(data):
    """Every step by hand: eq. (24), then DDPM's noise, but for the last, or DDIM's share."""
    x_1, label = 2 * torch.randn(20, 256, generator=rng(12)), torch.arange(20) % 10
    calls, noise = [], rng(13)
    denoiser = lambda *args: calls.append(args) or data[2](*args)  # noqa: E731
    found = s.paths(denoiser, x_1, label, 3.0, 10, 2.0, rng(13))
    assert len(calls) == 10 * (1 + 1 + 1 + 2)  # D and D(. | label), but what counts for nothing
    for (kind, path), w in zip(found.items(), (0, 1, 1, 3)):
        assert (len(path), path[0]) == (11, x_1)
        for k, x_t, after in zip(range(10, 0, -1), path, path[1:]):
            none, asked = (data[2](x_t, k / 10, which) for which in (label * 0 + s.NO_LABEL, label))
            step = (none + w * (asked - none) - x_t) / k
            if "DDPM" not in kind:
                step /= 1 + (1 - 1 / k) ** 0.5
            elif k > 1:
                step += 2 / 10**0.5 * torch.randn(20, 256, generator=noise)
            wrong = f"{kind}: the step from t = {k}/10 is not its algorithm's"
            assert torch.allclose(after, x_t + step, atol=1e-4), wrong


def strips(ax):
    """The rows of images in a panel: {color: (10, 256)}, from the one above; -1 is white."""
    found = {}
    for strip in sorted(ax.images, key=lambda strip: strip.get_extent()[3]):
        assert (strip.get_clim(), to_hex(strip.cmap(0.0))) == ((-1, 1), "#ffffff")
        squares = strip.get_array().reshape(18, 10, 18)[1:-1, :, 1:-1].swapaxes(0, 1)
        found[to_hex(strip.cmap(1.0))] = torch.tensor(squares.reshape(10, 256))
    assert [*found] == [BLUE, BLACK]
    return torch.stack([*found.values()])


def test_digits_are_drawn(monkeypatch):
    """Images at random, so that no two are alike; a path of 4 steps in frames of 4, 1 and 0."""
    draws = torch.rand(4, 2, 5, 12, 256, generator=rng(13)) - 0.5
    mean, frames = torch.rand(256, generator=rng(14)) - 0.5, []
    samples, twins = ({name: [*draws[k, i]] for k, name in enumerate("abcd")} for i in (0, 1))
    for ax, pair in zip(s.draw_digits(samples, twins, mean).axes, draws):
        assert torch.allclose(strips(ax), pair[:, -1, :10] + mean)
    monkeypatch.setattr(
        PillowWriter, "grab_frame", lambda self: frames.append(strips(*self.fig.axes))
    )
    monkeypatch.setattr(PillowWriter, "finish", lambda self: None)
    s.save_movie("", draws[3, 0], draws[3, 1], mean, 4.0, num_frames=3)
    assert len(frames) == 6
    for frame, k, sigma_t in zip(frames, (4, 1, 0, 0, 0, 0), (4, 2, 0, 0, 0, 0)):
        assert torch.allclose(frame, (draws[3, :, 4 - k, :10] + mean) / (1 + sigma_t))


def test_main(tmp_path, spy, monkeypatch, capsys):
    """On the page's own data: twins have the same start and noise; each path comes to its place."""
    own, names = paste(s, snippet(s)), "train measure paths report draw_digits save_movie"
    monkeypatch.setattr(Figure, "savefig", lambda *_, **__: None)
    own.save_movie = lambda file, path, twin, mean_image, sigma_q: None
    calls = {name: spy(own, name) for name in names.split()}
    small = (
        "--num-samples=12 --num-steps=3 --train-steps=2 --num-images=60 --sigma-q=4 --guidance=3"
    )
    own.main([*small.split(), f"--figures-dir={tmp_path}"])
    ((learned,), (found,), (twins, samples)) = (calls[k] for k in ("train", "measure", "paths"))
    images, labels = learned.images, learned.labels
    assert images.mean(dim=0).abs().max() < 1e-5
    assert (len(images), learned.sigma_q, learned.train_steps) == (60, 4, 2)
    assert (found.denoiser, samples.denoiser) == (learned.result, learned.result)
    assert torch.equal(found.images, images)
    assert 0.1 < torch.cdist(found.new, images).amin(dim=1).min() < 5  # other draws, centred alike
    x_1, label = twins.x_1, twins.label
    want = own.exact_with_label(x_1, 0.5, label, images=images, labels=labels, sigma_q=4)
    for exact in (found.exact, twins.denoiser):
        assert torch.equal(exact(x_1, 0.5, label), want)
    assert (len(x_1), x_1.std().item()) == (12, pytest.approx(4, rel=0.1))
    assert label.tolist() == [0, 1, 2] * 4
    for start in (twins, samples):
        assert (start.x_1, start.label) == (x_1, label)
        assert (start.guidance, start.num_steps, start.sigma_q) == (3, 3, 4)
    wrong = "a twin has the same noise as its sample"
    assert torch.equal(twins.rng.get_state(), samples.rng.get_state()), wrong
    (report,), (drawn,), (movie,) = (calls[k] for k in ("report", "draw_digits", "save_movie"))
    for call in (report, drawn):
        assert (call.samples, call.twins) == (samples.result, twins.result)
    assert (report.new, report.images, report.labels) == (found.new, images, labels)
    assert movie.path == [*samples.result.values()][-1]
    assert (movie.twin, movie.sigma_q) == ([*twins.result.values()][-1], 4)
    for call in (drawn, movie):
        assert (images + call.mean_image).min() == pytest.approx(-1, abs=1e-4)
    cells = [f"{x:.3f}" for row in found.result.values() for x in row]
    cells += [cell for row in report.result[1:] for cell in row[1:]]
    printed = capsys.readouterr().out.split("figures:")[0]
    assert re.findall(r"\d+\.\d+%?", printed) == [*map(str, s.TIMES), *cells]
