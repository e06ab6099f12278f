"""Experiment 13 held to references that share no code with it."""

import re
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace

import digits as s
import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
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
    draws = torch.rand(60, 4, generator=rng(1)).double().numpy()
    x = (np.arange(192) + 0.5) / 12
    points = np.stack(np.meshgrid(x, x[::-1]), axis=2)  # the first row is at the top
    for i, outline in [*enumerate(s.outlines())][::7]:
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


def test_a_missing_font(monkeypatch, capsys):
    """One line, and status 2."""
    monkeypatch.setattr(s, "NAMES", ["DejaVuSans", "no-such-font"])
    with pytest.raises(SystemExit, match="2"):
        s.outlines()
    assert re.fullmatch(r".*no-such-font\.ttf\n", capsys.readouterr().err)


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


def test_denoiser(data, monkeypatch):
    """On all axes the Gaussian one solves the normal equations; the network adds 2 times c_out."""
    images, labels, _ = data
    monkeypatch.setattr(s, "NUM_AXES", 256)
    denoiser = s.Denoiser(images, 2.0).requires_grad_(False)
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
    added = (denoiser(x_t, 0.1, labels) - got) @ denoiser.axes
    assert (added - 2 * error).abs().max() < 1e-4
    z, time, label = inputs[0].split([256, 1, 11], dim=1)
    assert z.square().mean(dim=0)[::8].numpy() == pytest.approx(1, abs=5 * (2 / 300) ** 0.5)
    assert torch.allclose(time, torch.tensor(0.1).log() / 4)
    assert label.argmax(dim=1).tolist() == labels.tolist()


def test_train(monkeypatch):
    """If the network is a t, x_0 label / 2 + 1 and c_out sqrt(t), the best a is E[x_0] / E[t]."""
    seen = []

    class Network(torch.nn.Module):
        def __init__(self, images, sigma_q):
            super().__init__()
            self.a, self.c_out = torch.nn.Parameter(torch.zeros(())), torch.sqrt

        def forward(self, x_t, t, label):
            seen.append((x_t, t, label[:, None]))
            return self.a * t.expand_as(x_t)

    monkeypatch.setattr(s, "Denoiser", Network)
    labels = torch.arange(50) % 10
    images = (labels / 2 + 1)[:, None].expand(50, 4)
    network = s.train(images, labels, sigma_q=0.1, train_steps=120, rng=rng(1), learning_rate=0.5)
    x_t, t, label = (torch.cat(parts) for parts in zip(*seen))
    least, hidden, root = 250**-0.5, label == s.NO_LABEL, t.sqrt()  # 120 * 256 draws
    assert root.min() >= least - 1e-6
    assert root.mean().item() == pytest.approx((1 + least) / 2, abs=5 * 0.29 / 175)
    assert hidden.double().mean().item() == pytest.approx(0.2, abs=5 * 0.4 / 175)
    noise = ((x_t - (label / 2 + 1)) / (0.1 * root))[~hidden[:, 0]]
    assert noise.std().item() == pytest.approx(1, rel=0.01)
    mean_t = (1 - least**3) / (3 * (1 - least))
    assert network.a.item() == pytest.approx(3.25 / mean_t, rel=0.04)
    assert not network.a.requires_grad


def test_it_learns(data):
    """A short training is nearer to the exact denoiser than the Gaussian one."""
    images, labels, exact = data
    denoiser = s.train(images, labels, sigma_q=2.0, train_steps=80, rng=rng(6), batch_size=128)
    errors = s.measure(denoiser, exact, images, images, rng(7))
    ratios = np.divide(errors["excess, network"], errors["excess, Gaussian"])
    assert (ratios < [1.03, 1.01, 0.98, 0.93, 0.93, 0.93]).all()


def test_measure_of_known_errors(data):
    """If x_t itself were the best guess: the noise is the Bayes error, .1^2 the excess of + .1."""

    def exact(x_t, t, label):
        assert (label == s.NO_LABEL).all()
        return x_t

    def network(x_t, t, label):
        return exact(x_t, t, label) + 0.1

    network.sigma_q, network.c_out = 2.0, lambda t: t + 1
    network.gaussian = lambda x_t, t: x_t - 0.2
    errors = s.measure(network, exact, data[0], data[0].flip(1), rng(10))
    times = np.array([0.004, 0.01, 0.03, 0.1, 0.3, 1])
    noise, errors = 4 * times, {name: row * (times + 1) ** 2 for name, row in errors.items()}
    assert errors["Bayes error"] == pytest.approx(noise, rel=0.03)
    assert errors["excess, Gaussian"] == pytest.approx(0.04, rel=1e-3)
    assert errors["excess, network"] == pytest.approx(0.01, rel=1e-3)
    assert errors["new images, exact"] == pytest.approx(noise, rel=0.03)
    assert errors["new images, network"] == pytest.approx(noise + 0.01, rel=0.03)
    assert (errors["Bayes error"] != errors["new images, exact"]).all()


def test_read_and_summary():
    """Ten images 1 apart: legible for the first third of a way to another one, and for the last."""
    images, labels = torch.eye(20)[::2] / 2**0.5, torch.arange(10)

    def ways(*shares):
        """From image 0 to 9, from 1 to 9, ..."""
        shares = torch.tensor(shares)[:, None]
        return (1 - shares) * images[: len(shares)] + shares * images[9]

    digit, legible = s.read(ways(0, 0.33, 0.336, 0.6, 0.67), images, labels)
    assert digit.tolist() == [0, 1, 2, 9, 9]
    assert legible.tolist() == [True, True, False, False, True]
    a, b = ways(0, 0.4, 0, 0, 0, 0, 0, 0), ways(0.4, 0.4, 0.4, 0.6, 0.6, 0.4, 0, 0)
    paths, twins = {"1": [b, a], "2": [a, b]}, {"1": [a, b], "2": [b, a[[1, 0, 2, 3, 5, 4, 6, 7]]]}
    assert s.summary(paths, twins, ways(0.4, 0, 0.4), images, labels) == [
        ["", "legible", "+-", "twin legible", "as its twin"],
        ["new images", "33.3%", "27.2%", "", ""],
        ["1", "87.5%", "11.7%", "25.0%", "75.0%"],
        ["2", "25.0%", "15.3%", "87.5%", "37.5%"],
    ]


def test_sample(data):
    """Every step by hand: eq. (24), then DDPM's noise or DDIM's share of the way."""
    x_1, label = 2 * torch.randn(20, 256, generator=rng(12)), torch.arange(20) % 10
    calls, noise = [], rng(13)
    denoiser = lambda *args: calls.append(args) or data[2](*args)  # noqa: E731
    paths = s.sample(denoiser, x_1, 3.0, 10, 2.0, rng(13))
    assert len(calls) == 10 * (1 + 1 + 1 + 2)  # D and D(. | label), but what counts for nothing
    kinds = ["DDIM, without label", "DDPM, with label", "DDIM, with label", "DDIM, guided, w = 3"]
    assert [*paths] == kinds
    for (kind, path), w in zip(paths.items(), (0, 1, 1, 3)):
        assert (len(path), path[0]) == (11, x_1)
        for k, x_t, after in zip(range(10, 0, -1), path, path[1:]):
            none, asked = (data[2](x_t, k / 10, which) for which in (label * 0 + s.NO_LABEL, label))
            step = (none + w * (asked - none) - x_t) / k
            if "DDPM" in kind:
                step += 2 / 10**0.5 * torch.randn(20, 256, generator=noise)
            else:
                step /= 1 + (1 - 1 / k) ** 0.5
            assert torch.allclose(after, x_t + step, atol=1e-4)


def strips(ax, *pair):
    """Holds what is drawn to two rows of images, (n, 256): upright, in order, from -1 to 1."""
    assert [text.get_text() for text in ax.get_yticklabels()] == ["network", "its twin"]
    assert [*ax.get_yticks(), *ax.get_ylim()] == [0.5, 1.5, 2, 0]
    for k, (strip, ink, images) in enumerate(zip(ax.images, ("#000000", "#0072b2"), pair)):
        assert [*strip.get_extent(), *strip.get_clim()] == [0, 10, k + 1, k, -1, 1]
        assert [to_hex(strip.cmap(shade)) for shade in (0.0, 1.0)] == ["#ffffff", ink]
        squares = strip.get_array().reshape(18, 10, 18)[1:-1, :, 1:-1].swapaxes(0, 1)
        assert np.allclose(squares.reshape(10, 256), images[:10], atol=1e-6)


def test_digits_are_drawn():
    """Images at random, so that no two are alike; a path of 4 steps in frames of 4, 1 and 0."""
    draws = torch.rand(4, 2, 5, 12, 256, generator=rng(13)) - 0.5
    mean = torch.rand(256, generator=rng(14)) - 0.5
    paths, twins = ({name: [*draws[k, i]] for k, name in enumerate("abcd")} for i in (0, 1))
    axes = s.draw_digits(paths, twins, mean).axes
    assert [ax.get_title() for ax in axes] == [*"abcd"]
    for ax, pair in zip(axes, draws):
        strips(ax, *(pair[:, -1] + mean))
    movie = s.animate(paths, twins, mean, 4.0, num_frames=3)
    frames = [*movie.new_frame_seq()]
    assert len(frames) == 6
    for frame, k, sigma_t in zip(frames, (4, 1, 0, 0, 0, 0), (4, 2, 0, 0, 0, 0)):
        movie._draw_frame(frame)
        (ax,) = movie._fig.axes
        assert ax.get_title() == rf"$\sigma_t$ = {sigma_t:.2f}"
        strips(ax, *(draws[3, :, 4 - k] + mean) / (1 + sigma_t))


def test_errors_are_drawn():
    """An error of k is that of the row k."""
    names = "Bayes error;excess, Gaussian;excess, network;new images, exact;new images, network"
    errors = {name: [k, 3, 1, 2, 5, 9] for k, name in enumerate(names.split(";"))}
    drawn = []
    for ax in s.draw_errors(errors).axes:
        assert (ax.get_xscale(), ax.get_ylim()[0]) == ("log", 0)
        assert ax.get_xlim()[0] > 1 > 0.004 > ax.get_xlim()[1]  # as sampling runs
        for line in ax.lines:
            t, (k, *rest) = line.get_data()
            assert [*t, *rest] == [0.004, 0.01, 0.03, 0.1, 0.3, 1, 3, 1, 2, 5, 9]
            drawn.append(f"{ax.get_title()}: {k}, {line.get_label()}, {line.get_color()}")
    assert drawn == [
        "Images learned: Bayes error, excess: 0, Bayes error, k",
        "Images learned: Bayes error, excess: 1, excess, Gaussian denoiser, #CC79A7",
        "Images learned: Bayes error, excess: 2, excess, network, #0072B2",
        "New images: total error: 3, exact denoiser, k",
        "New images: total error: 4, network, #0072B2",
    ]


def spy(script, monkeypatch, *names):
    """Calls of functions of the script: {name: [(*arguments, result), ...]}.  Nothing is saved."""
    calls = {name: [] for name in names}

    def call(name, original, *args, **options):
        calls[name].append((*args, original(*args, **options)))
        return calls[name][-1][-1]

    monkeypatch.setattr(Figure, "savefig", lambda *_, **__: None)
    monkeypatch.setattr(script, "animate", lambda *_: SimpleNamespace(save=lambda *_, **__: None))
    for name in names:
        monkeypatch.setattr(script, name, partial(call, name, getattr(script, name)))
    return calls


SMALL = ["--num-samples=12", "--num-steps=3", "--train-steps=2"]


def test_main(tmp_path, monkeypatch):
    """Twins have the same start and noise, of the images learned; each path comes to its place."""
    names = "train measure sample summary table draw_digits draw_errors animate"
    calls = spy(s, monkeypatch, *names.split())
    s.main([*SMALL, "--num-images=60", "--sigma-q=4", "--guidance=2", f"--figures-dir={tmp_path}"])
    ((images, labels, denoiser),) = calls["train"]
    ((learned, exact, old, new, _, errors),) = calls["measure"]
    (*first, its_noise, twins), (*second, noise, paths) = calls["sample"]
    ((*arguments, rows),) = calls["summary"]
    x_1 = first[1]
    assert images.mean(dim=0).abs().max() < 1e-5
    assert (len(images), len(new), learned, denoiser.sigma_q) == (60, 60, denoiser, 4)
    assert torch.equal(old, images)
    assert exact.keywords == {"images": images, "labels": labels, "sigma_q": 4}
    assert 0.1 < torch.cdist(new, images).amin(dim=1).min() < 9  # other draws, centred alike
    assert (len(x_1), x_1.std().item()) == (12, pytest.approx(4, rel=0.1))
    assert (first, second) == ([exact, x_1, 2, 3, 4], [denoiser, x_1, 2, 3, 4])
    assert its_noise is not noise
    assert torch.equal(its_noise.get_state(), noise.get_state())  # after as many draws
    assert arguments == [paths, twins, new, images, labels]
    above = [["t", "0.004", "0.01", "0.03", "0.1", "0.3", "1.0"]]
    above += [[name, *(f"{error:.3f}" for error in row)] for name, row in errors.items()]
    assert [printed for printed, _ in calls["table"]] == [above, rows]
    assert calls["draw_errors"][0][0] is errors
    for drawn, beside, mean, *_ in (calls["draw_digits"][0], calls["animate"][0]):
        assert (drawn, beside) == (paths, twins)
        assert torch.allclose((images + mean)[:, 0], torch.tensor(-1.0), atol=1e-5)  # paper
    assert calls["animate"][0][3] == 4


def test_your_own_images(tmp_path, monkeypatch):
    """The page's lines in a copy of the script: 201 images of 8 x 8, half learned, half new."""
    page = Path(s.__file__).with_name("README.md").read_text(encoding="utf-8")
    (snippet,) = re.findall(r"```python\n(def digits.*?)\n```", page, re.DOTALL)
    script = Path(s.__file__).read_text(encoding="utf-8")
    copy = re.sub(r"def digits\(.*?(?=\n\n\n)", lambda _: snippet, script, flags=re.DOTALL)
    own = ModuleType("own")
    own.__file__ = str(tmp_path / "own.py")
    exec(copy, own.__dict__)
    pixels = np.random.default_rng(0).integers(0, 256, (201, 8, 8), dtype=np.uint8)
    pixels[:, 0, 0], pixels[:, 0, 1] = np.arange(201), 0  # which it is; and the same in all
    np.savez(tmp_path / "images.npz", images=pixels, labels=np.arange(201) % 10)
    monkeypatch.chdir(tmp_path)
    calls = spy(own, monkeypatch, "train", "measure", "digits")
    own.main([*SMALL, f"--figures-dir={tmp_path}"])
    ((_, _, (images, labels)),) = calls["digits"]
    which = ((images[:, 0] + 1) * 127.5).round().long()
    assert torch.equal(which % 10, labels)
    assert np.allclose(images, pixels[which.numpy()].reshape(201, 64) / 127.5 - 1, atol=1e-6)
    learned, old, new = calls["train"][0][0], *calls["measure"][0][2:4]
    assert (len(learned), len(old), len(new)) == (101, 100, 100)
    assert torch.cdist(new, learned).min() > 1  # none was learned
