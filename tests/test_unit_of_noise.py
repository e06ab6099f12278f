"""Experiment 19 held to references that share no code with it."""

from functools import partial

import digits
import numpy as np
import pytest
import torch
import unit_of_noise as s
from conftest import paste, snippet
from conftest import torch_rng as rng
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

BLACK, BLUE, GREEN, PINK, SKY = "#000000", "#0072b2", "#009e73", "#cc79a7", "#56b4e9"
# Unlike the default in all respects: other sizes, off center, three times as large, unequal labels.
OTHER = """
SIDES = [4, 6]
def digits(n, rng, side):
    labels = torch.randint(5, (n,), generator=rng) // 2
    return 3 * torch.rand(n, side**2, generator=rng) + labels[:, None], labels
"""
SMALL = ["--num-samples=12", "--num-steps=3", "--train-steps=2", "--num-images=60"]


def posterior(x, images, sigma):
    """p(image | x) in NumPy, term by term."""
    squares = ((x[:, None] - images) ** 2).sum(axis=2) / (2 * sigma**2)
    weights = np.exp(squares.min(axis=1, keepdims=True) - squares)
    return weights / weights.sum(axis=1, keepdims=True)


def test_flow_and_its_shift():
    """To one point, each step lands on the line to it; shifted, the noise is a times as large."""
    a, x_1 = torch.tensor([1.0, -2.0]), torch.randn(5, 2, generator=rng(6))
    times = [1, 0.7, 0.2, 0.1, 0]
    run = s.flow(partial(s.velocity, denoiser=lambda x_t, t: a.expand(5, 2)), x_1, times)
    for t, x_t in zip(times[1:], run):
        torch.testing.assert_close(x_t, a + t * (x_1 - a))
    for t in (0.1, 0.5, 0.9):
        sigma = 4 * t / (1 - t)
        wrong = "at the shifted time the flow has a times the noise t / (1 - t) of time t"
        assert s.shifted(t, 4) == pytest.approx(sigma / (1 + sigma)), wrong
    assert (s.shifted(0, 4), s.shifted(1, 4)) == (0, 1)


def test_the_same_drawings_at_any_size():
    """With 16 pixels those of experiment 13; a pixel is the mean of those of a larger drawing."""
    images, labels = s.digits(40, rng(1), 16)
    assert torch.equal(images, digits.digits(40, rng(1))[0])
    assert labels.tolist() == [*range(10)] * 4
    for side in (8, 32):
        other, _ = s.digits(40, rng(1), side)
        small, large = sorted([images, other], key=lambda x: x.shape[1])
        side = round(small.shape[1] ** 0.5)
        means = large.reshape(40, side, 2, side, 2).mean(dim=(2, 4)).flatten(1)
        assert (means - small).abs().max() < 0.5  # Agg draws curves to a tenth of a pixel
        assert (means - small).abs().mean() < 0.02, "not the same drawing"


@pytest.mark.parametrize(
    ("images", "labels"),
    [
        (torch.rand(60, 65), torch.arange(60) % 2),
        (torch.rand(60, 64), torch.arange(59) % 2),
        (torch.rand(60, 64), torch.zeros(60)),
        (torch.rand(60, 64), torch.arange(60) % 2 - 1),
        (torch.rand(60, 64), torch.arange(60.0) % 2),
        (torch.ones(60, 64), torch.arange(60) % 2),
        (torch.rand(60, 64) / 0, torch.arange(60) % 2),
        (torch.rand(60, 64).double(), torch.arange(60) % 2),
    ],
)
def test_what_it_refuses(images, labels, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(s, "SIDES", [8, 8])
    monkeypatch.setattr(s, "digits", lambda n, rng, side: (images, labels))
    with pytest.raises(SystemExit, match="2"):
        s.main([f"--figures-dir={tmp_path / 'new'}"])
    assert "digits" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("sides", [[], [8], [6, 7, 8, 9]])
def test_two_or_three_sizes(sides, monkeypatch):
    """One has nothing to be compared with; a fourth curve would have no shade."""
    monkeypatch.setattr(s, "SIDES", sides)
    assert any("SIDES" in fault for fault in s.faults())


@pytest.mark.parametrize("code", ["", snippet(s), OTHER])
def test_the_truth_follows_the_data(code, tmp_path, monkeypatch, capsys):
    """Both denoisers, the label, the unit, scaling and copying, for any images."""
    own = paste(s, code) if code else s
    images, labels = own.digits(30, rng(2), own.SIDES[0])
    images, c = images.double(), 5.49
    points, side = images.numpy(), own.SIDES[0]
    pairs = ((points[:, None] - points) ** 2).sum(axis=2)
    wrong = "the unit is std times side: pairs of images are sqrt(2) of it apart, in RMS"
    assert own.unit(images) == pytest.approx((pairs.mean() / 2) ** 0.5), wrong
    for level in (0.05, 0.3, 2.0):
        sigma, noise = level * own.unit(images), torch.randn(30, side**2, generator=rng(3)).double()
        x, exact = images + sigma * noise, partial(own.exact_denoiser, sigma=sigma, images=images)
        want = posterior(x.numpy(), points, sigma) @ points
        wrong = "it is no mean of the images, weighted by Bayes' rule"
        assert np.asarray(exact(x)) == pytest.approx(want, abs=1e-8), wrong
        t = sigma / (1 + sigma)
        got = own.flow_denoiser((1 - t) * x, t, images=images)
        assert np.abs(got.numpy() - want).max() < 1e-8, "in the flow sigma is t / (1 - t)"
        scaled = own.exact_denoiser(c * x, c * sigma, images=c * images)
        assert torch.allclose(scaled, c * exact(x)), "D_c(x, sigma) = c D(x / c, sigma / c)"

        large = own.copied(images, 3)
        y = large + 3 * sigma * torch.randn(large.shape, generator=rng(4)).double()
        means = y.reshape(30, side, 3, side, 3).mean(dim=(2, 4)).flatten(1)
        want = np.repeat((posterior(means.numpy(), points, sigma) @ points), 9).reshape(
            30, side, side, 3, 3
        )
        got = own.exact_denoiser(y, 3 * sigma, images=large).numpy()
        wrong = "of copies only the means of blocks count, with a third of the noise"
        assert np.abs(got - want.swapaxes(2, 3).reshape(30, -1)).max() < 1e-8, wrong
        assert torch.allclose(own.block_means(y, 3), means)

        right = labels[:, None].numpy() == labels.numpy()
        noise = torch.randn(30, side**2, generator=rng(5), dtype=torch.double).numpy()
        want = (posterior(points + sigma * noise, points, sigma) * right).sum(axis=1).mean()
        assert own.right_label(sigma, images, labels, rng(5)) == pytest.approx(want)
    if code:
        monkeypatch.setattr(Figure, "savefig", lambda *_, **__: None)
        own.main([*SMALL, f"--figures-dir={tmp_path}"])
        assert "nan" not in capsys.readouterr().out


def test_copies():
    """The flow on small images and on copies, three steps by hand."""
    images = torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 1], [0, 0, -1, 1]]).double()
    found = s.copies(images, 2, rng(7), num_samples=40, num_steps=3)
    x_1 = torch.randn(40, 16, generator=rng(7), dtype=torch.double).numpy()
    large = np.repeat(np.repeat(images.numpy().reshape(3, 2, 2), 2, axis=1), 2, axis=2)

    def means(x):
        return x.reshape(40, 2, 2, 2, 2).mean(axis=(2, 4)).reshape(40, 4)

    def run(x, points, times):
        for t, r in zip(times, times[1:]):
            best = posterior(x, (1 - t) * points, t) @ points
            x = r / t * x + (1 - r / t) * best
            yield x

    times = np.array([1, 2 / 3, 1 / 3, 0])
    small = [*run(2 * means(x_1), images.numpy(), times)]
    same = [means(x) for x in run(x_1, large.reshape(3, 16), times)]
    most = max(np.abs(a - b).max() for a, b in zip(small, same))
    ends = [np.argmin(((x[:, None] - images.numpy()) ** 2).sum(axis=2), axis=1) for x in
            (small[-1], same[-1])]  # fmt: skip
    assert found["the same grid"] == pytest.approx((most, (ends[0] != ends[1]).mean()))
    assert most > 0.1
    assert found["shifted"][0] < 1e-12, "on the shifted grid trajectories are the same"
    assert found["shifted"][1] == 0


def test_denoiser():
    """c_skip x is the best multiple of x, c_out the size of its error, layers see std 1."""
    network = s.Denoiser(4, 3.0).requires_grad_(False)
    network.layers[-1].weight.zero_()
    network.layers[-1].bias.fill_(2)
    seen = []
    network.layers.register_forward_hook(lambda layer, values, result: seen.extend(values))
    x_0 = 3 * torch.randn(50_000, 4, generator=rng(8))
    x = x_0 + 2 * torch.randn(x_0.shape, generator=rng(9))
    guess = network(x, 2.0) - 2 * network.c_out(2.0)
    assert guess.numpy() == pytest.approx(((x_0 * x).sum() / x.square().sum() * x).numpy(), abs=0.2)
    assert (guess - x_0).std().item() == pytest.approx(network.c_out(2.0), rel=0.01)
    assert seen[0][:, :4].std().item() == pytest.approx(1, rel=0.01)
    assert seen[0][0, 4].item() == pytest.approx(np.log(2 / 3) / 4)


def test_training_in_other_units():
    """Data, std and levels times 4: the same network. And it learns."""
    images, _ = s.digits(60, rng(), 8)
    images = images - images.mean(dim=0)
    how = {"train_steps": 60, "batch_size": 64}
    one = s.train(images, sigma_data=0.34, low=0.1, high=6.8, rng=rng(10), **how)
    four = s.train(4 * images, sigma_data=1.36, low=0.4, high=27.2, rng=rng(10), **how)
    wrong = "nothing but the units is different"
    assert torch.allclose(four(4 * images, 2.0), 4 * one(images, 0.5), atol=1e-3), wrong
    assert not any(weight.requires_grad for weight in one.parameters())
    errors = s.measure(one, images, rng(11))
    skip = s.measure(lambda x, sigma: x / (1 + sigma**2 / 0.34**2), images, rng(11))
    assert (np.divide(errors, skip)[1:4] < 0.85).all(), "it has learned nothing"


def test_levels_learned(monkeypatch):
    """sigma log-uniform from low to high; the error over c_out: the best constant is known."""
    seen = []

    class Network(torch.nn.Module):
        def __init__(self, num_pixels, sigma_data):
            super().__init__()
            self.a, self.c_out = torch.nn.Parameter(torch.zeros(())), lambda sigma: sigma

        def forward(self, x, sigma):
            seen.append((x, sigma))
            return self.a * sigma.expand_as(x)

    monkeypatch.setattr(s, "Denoiser", Network)
    s.train(torch.full((5, 4), 2.0), sigma_data=9, low=0.5, high=8, train_steps=150, rng=rng(12))
    x, sigma = (torch.cat(parts) for parts in zip(*seen))
    part = (sigma / 0.5).log() / np.log(16)
    assert (part.min() > -1e-5, part.max() < 1 + 1e-5) == (True, True)
    assert part.mean().item() == pytest.approx(0.5, abs=5 * 0.29 / len(part) ** 0.5)
    assert part.std().item() == pytest.approx(12**-0.5, rel=0.02)
    assert ((x - 2) / sigma).std().item() == pytest.approx(1, rel=0.02)


def test_measure_and_sample(monkeypatch):
    """Off by .1 is an excess of .01; DDIM to one point is on the line to it at each level."""
    images, _ = s.digits(60, rng(), 8)
    std = images.std(dim=0, correction=0).square().mean().sqrt().item()
    off = lambda x, sigma: s.exact_denoiser(x, sigma, images=images) + 0.1  # noqa: E731
    want = [0.01 * (1 / std**2 + 1 / (8 * std * level) ** 2) for level in s.EXCESS_LEVELS]
    assert s.measure(off, images, rng(13)) == pytest.approx(want, rel=1e-3)

    calls, a = [], torch.tensor([1.0, -2.0])
    denoiser = lambda x, sigma: calls.append((x, sigma)) or a.expand(5, 2)  # noqa: E731
    noise = torch.randn(5, 2, generator=rng(14))
    assert torch.allclose(s.sample(denoiser, noise, 0.5, 8.0, 5), a)
    assert [sigma for _, sigma in calls] == pytest.approx([8, 4, 2, 1, 0.5])
    for x, sigma in calls:
        torch.testing.assert_close(x, a + (8 * noise - a) * sigma / 8, msg="not DDIM's step")


def test_rows():
    """Curves that fall evenly in log sigma; one sample of four has another label than its twin."""
    shares = [0.9 - 0.06 * k for k in range(len(s.LEVELS))]
    level = s.LEVELS[0] * (s.LEVELS[1] / s.LEVELS[0]) ** (0.4 / 0.06)
    assert s.crossing(shares, 0.5) == pytest.approx(level)
    assert s.crossing(shares, 0.05) is s.crossing(shares, 0.95) is None
    row, other = s.label_rows({4: shares, 6: [0.6] * len(shares)}, {4: 8.0, 6: 3.0})[1:]
    thirds = [s.LEVELS[0] * (s.LEVELS[1] / s.LEVELS[0]) ** (p / 0.06) for p in (0.1, 0.4, 0.6)]
    assert row[1:] == ["2.000", f"{8 * level:.3f}", "", *(f"{x:.3f}" for x in thirds)]
    assert other[1:] == ["0.500", "-", "", "-", "-", "-"]

    images, labels = torch.tensor([[3.0, 0], [-3, 0], [0, 4], [0, -4]]), torch.tensor([0, 0, 2, 3])
    twins = images[[0, 1, 0, 2]]  # labels 0, 0, 0, 2;  squares 9, 9, 9, 16;  the unit: 3.5355
    _, row = s.sample_rows({"x": images[[0, 1, 0, 3]] + 0.5}, {"x": twins}, images, labels)
    distance = ((3 * 0.5 + 0.25 + 7.5**2) / 4 / 12.5) ** 0.5
    assert row[1:] == [
        f"{distance:.2f}", "75.0%", f"{(43 / 50) ** 0.5:.3f}", "0: 75.0%", "3: 0.0%"
    ]  # fmt: skip

    rows = s.copy_rows({"a": (2.5, 0.2), "b": (3e-12, 0.0)})
    assert [row[2::2] for row in rows] == [["2.5e+00", "20%"], ["3.0e-12", "0%"]]


def test_what_is_drawn():
    """Each curve by its data and its color; images as they are, around 0 in grey."""
    pictures = {side: torch.randn(2, side**2, generator=rng(side)) for side in (2, 3, 4)}
    levels = {side: [1.0, side / 2] for side in pictures}
    axes = np.reshape(s.draw_noisy(pictures, levels).axes, (2, 3))
    for column, (side, pair), sigmas in zip(axes.T, pictures.items(), levels.values()):
        for ax, x, sigma in zip(column, pair, sigmas):
            (image,) = ax.images
            np.testing.assert_array_equal(image.get_array(), x.reshape(side, side))
            low, high = image.get_clim()
            assert -low == high >= 1 + sigma, "contrast that noise does not exceed"
            assert image.cmap(0.0)[0] > image.cmap(1.0)[0], "ink is dark"

    curves = {side: np.linspace(0.9, side / 100, len(s.LEVELS)) for side in (8, 16, 32)}
    units = {8: 3.0, 16: 7.0, 32: 16.0}
    for ax, scales in zip(
        s.draw_labels(curves, units, 0.17).axes, (units, dict.fromkeys(units, 1))
    ):
        *lines, guess = ax.lines
        assert set(guess.get_ydata()) == {0.17}
        assert (ax.get_xscale(), ax.xaxis_inverted(), len(lines)) == ("log", True, 3)
        for line, side, shade in zip(lines, curves, (0.65, 0.4, 0)):
            assert line.get_xdata() == pytest.approx(scales[side] * np.array(s.LEVELS))
            np.testing.assert_array_equal(line.get_ydata(), curves[side])
            assert to_hex(line.get_color()) == to_hex(str(shade)), "the larger, the darker"

    errors = {name: [k + 1.0] * len(s.EXCESS_LEVELS) for k, name in enumerate("abcd")}
    (ax,) = s.draw_excess(errors, 4.0).axes
    found = {to_hex(line.get_color()): line.get_ydata()[0] for line in ax.lines}
    assert found == {BLUE: 1, SKY: 2, GREEN: 3, PINK: 4}
    assert all([*line.get_xdata()] == s.EXCESS_LEVELS for line in ax.lines)
    assert ax.get_xlim()[0] > ax.get_xlim()[1], "from noise to data, as sampling runs"
    (grey,) = ax.patches
    ends = grey.get_extents().transformed(ax.transData.inverted())
    assert sorted([ends.x0, ends.x1]) == pytest.approx([s.LOW / 4, s.HIGH / 4])

    draws = torch.rand(4, 2, 12, 9, generator=rng(15))
    samples, twins = ({name: draws[k, i] for k, name in enumerate("abcd")} for i in (0, 1))
    for ax, pair in zip(s.draw_samples(samples, twins).axes, draws):
        rows = {to_hex(strip.cmap(1.0)): strip for strip in ax.images}
        above, below = rows[BLUE], rows[BLACK]
        assert above.get_extent()[3] < below.get_extent()[3], "twins below"
        for strip, x in zip((above, below), pair):
            squares = strip.get_array().reshape(5, 10, 5)[1:-1, :, 1:-1].swapaxes(0, 1)
            np.testing.assert_array_equal(squares.reshape(10, 9), x[:10])


def test_main(tmp_path, spy, monkeypatch, capsys):
    monkeypatch.setattr(Figure, "savefig", lambda *_, **__: None)
    monkeypatch.setattr(s, "SIDES", [8, 10, 12])
    monkeypatch.setattr(s, "LEVELS", [0.05, 0.3, 2.0])
    names = "digits right_label copies train measure sample draw_noisy draw_labels draw_excess "
    names += "draw_samples label_rows copy_rows sample_rows"
    calls = {name: spy(s, name) for name in names.split()}
    s.main([*SMALL, "--scale=3", f"--figures-dir={tmp_path}"])
    drawn = {call.side: call.result for call in calls["digits"][3:]}
    assert [*drawn] == s.SIDES
    assert len({call.rng.initial_seed() for call in calls["digits"][3:]}) == 1, "the same drawings"
    curves = calls["label_rows"][0].curves
    units = {
        side: images.std(dim=0, correction=0).norm().item() for side, (images, _) in drawn.items()
    }
    asked = iter(calls["right_label"])
    for side, (images, labels) in drawn.items():
        for level, share in zip(s.LEVELS, curves[side]):
            call = next(asked)
            assert (call.images, call.labels, call.result) == (images, labels, share)
            assert call.sigma == pytest.approx(level * units[side])
    assert calls["draw_labels"][0].curves is curves
    for name in ("draw_labels", "label_rows"):
        assert calls[name][0].units == pytest.approx(units)
    assert calls["draw_labels"][0].chance == pytest.approx(0.1)

    (noisy,) = calls["draw_noisy"]
    for side, pair in noisy.pictures.items():
        sigmas = [s.SHOWN * units[k] for k in (s.SIDES[1], side)]
        assert noisy.levels[side] == pytest.approx(sigmas), "equal sigma; equal in our unit"
        one, other = ((x - drawn[side][0][2]) / sigma for x, sigma in zip(pair, sigmas))
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
        assert one.std().item() == pytest.approx(1, abs=5 / (2 * side**2) ** 0.5)

    images, labels = drawn[8]
    assert (calls["copies"][0].images, calls["copies"][0].factor) == (images, s.FACTOR)
    assert calls["copy_rows"][0].found is calls["copies"][0].result
    latents = calls["train"][0].images
    mean = images.mean(dim=0)
    torch.testing.assert_close(latents * (units[8] / 8) / 3 + mean, images, atol=1e-4, rtol=1e-4)
    assert latents.square().mean().sqrt().item() == pytest.approx(3)
    (rows,), (strips,) = calls["sample_rows"], calls["draw_samples"]
    errors = calls["draw_excess"][0].errors
    runs = [calls["sample"][k : k + 2] for k in range(0, 8, 2)]
    told = [(3, 3), (1, 3), (3, 1), (1, 1)]  # to the network, and for the levels
    for name, (own, factor), learned, found, (x, twin) in zip(
        errors, told, calls["train"], calls["measure"], runs
    ):
        assert (learned.sigma_data, learned.train_steps, learned.images) == (own, 2, latents)
        for call in (learned, x, twin):
            assert (call.low, call.high) == pytest.approx((8 * factor * s.LOW, 8 * factor * s.HIGH))
        assert (found.denoiser, x.denoiser, found.images) == (learned.result,) * 2 + (latents,)
        assert errors[name] is found.result
        assert (x.noise, x.num_steps) == (twin.noise, twin.num_steps) == (runs[0][0].noise, 3)
        want = s.exact_denoiser(latents, 5.0, images=latents)
        assert torch.equal(twin.denoiser(latents, 5.0), want), "a twin is the exact denoiser's"
        assert (rows.samples[name], rows.twins[name]) == (x.result, twin.result)
        for call, kind in ((x, strips.samples), (twin, strips.twins)):
            assert torch.allclose(kind[name], call.result * units[8] / 24 + mean, atol=1e-4)
    assert (rows.images, rows.labels) == (latents, labels)
    assert runs[0][0].noise.shape == (12, 64)
    want = [row[1:] for name in ("copy_rows", "label_rows") for row in calls[name][0].result]
    want += [[*map(str, s.EXCESS_LEVELS)], *([f"{x:.3f}" for x in row] for row in errors.values())]
    want += [row[1:] for row in rows.result]
    out = capsys.readouterr().out.split("figures:")[0].splitlines()
    assert len(out) == len(want)
    assert all(
        line.split()[-len(" ".join(row).split()) :] == " ".join(row).split()
        for line, row in zip(out, want)
    )
