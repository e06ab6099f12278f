"""Experiment 19: how much noise is enough?  Noise has a unit.  Beyond the tutorial.

The claim
    Noise has a unit: the standard deviation of a pixel times the number of pixels on a side. Two
    numbers that stand unexplained in code are this one: latents are multiplied by .18215, which
    makes their std 1, and timesteps are shifted as pixels grow in number, which makes up for the
    side.

The truth beside it
    For x = x_0 + N(0, sigma^2 I) and D(x, sigma) = E[x_0 | x], whatever the data is:
      scaled by c      D_c(x, sigma) = c D(x / c, sigma / c);
      each pixel copied to k pixels, R x_0: only the means of blocks count, R^T x / k, and their
      noise is less    D_k(x, sigma) = R D(R^T x / k, sigma / sqrt(k)).
    The linear flow has sigma = t / (1 - t). So the same trajectory is at the time
        shifted(t, a) = a t / (1 + (a - 1) t),    a = sqrt(k).
    Digits drawn at three sizes are not copies. For them Bayes' rule over all images says at which
    sigma a digit can still be told.

What to look for in figures/
    noisy.jpg     one digit at three sizes: in which row is it as hard to read in all three?
    labels.jpg    the probability of the right label against sigma, and against sigma in our unit
    excess.jpg    networks that know the data's std, or do not: where do they err?
    samples.jpg   what they make of noise, above their twins

Try this
    python unit_of_noise.py --scale 2            as if the side were doubled: what do samples lack?
    python unit_of_noise.py --scale 10           the data times 10, all else as it was
    python unit_of_noise.py --train-steps 200    a quarter of the training: where does it err more?
"""

import os
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from functools import cache, partial
from itertools import zip_longest
from pathlib import Path

os.environ["MPLBACKEND"] = "agg"  # figures are files, also from a notebook

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.backends.backend_agg import RendererAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextPath
from matplotlib.transforms import Affine2D
from torch import nn
from tqdm import tqdm

# ------------------------------------------- The data -------------------------------------------
FONTS = Path(matplotlib.get_data_path(), "fonts", "ttf")  # they come with matplotlib
NAMES = ["DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif", "STIXGeneral", "cmr10", "cmss10"]
SIDES = [8, 16, 32]  # pixels, two or three sizes;  the networks learn the first


@cache
def outlines():
    """The ten digits in the first font, in the second, ...: 60 paths of height 1, around 0."""
    paths = []
    for name in NAMES:
        file = FONTS / f"{name}.ttf"
        if not file.is_file():
            print(f"this matplotlib comes without the font {file}", file=sys.stderr)
            sys.exit(2)
        font = FontProperties(fname=file)
        for digit in "0123456789":
            path = TextPath((0, 0), digit, size=1, prop=font)
            box = path.get_extents()
            center = Affine2D().translate(-(box.x0 + box.x1) / 2, -(box.y0 + box.y1) / 2)
            paths.append(path.transformed(center.scale(1 / box.height)))
    return paths


def digits(n, rng, side):
    """n images, (n, side^2), from -1 (paper) to 1 (ink), and their labels, (n,).

    Those of experiment 13, which has side 16: the digits in turn, the fonts in turn; height 70 to
    76 % of the side, turned by up to 5 degrees, moved by up to a 32nd of the side.  rng: a torch
    Generator; in one state it gives the same drawings at any size.
    """
    paths = outlines()
    renderer = RendererAgg(side, side, 72)
    brush = renderer.new_gc()
    brush.set_linewidth(0)  # fill the outline, do not draw it
    draws = torch.rand(n, 4, generator=rng).numpy()
    images = np.empty((n, side, side), dtype=np.float32)
    for i, (height, angle, right, up) in enumerate(draws):
        place = Affine2D().scale(side * (0.70 + 0.06 * height)).rotate_deg(10 * angle - 5)
        place.translate(side * (0.5 + (right - 0.5) / 16), side * (0.5 + (up - 0.5) / 16))
        renderer.clear()
        renderer.draw_path(brush, paths[i % len(paths)], place, (0, 0, 0))
        images[i] = np.asarray(renderer.buffer_rgba())[..., 3]  # the share of a pixel under ink
    return torch.from_numpy(images).flatten(1) / 127.5 - 1, torch.arange(n) % 10


def faults(n=60):
    """What the script cannot do with the data, a line each, from a look at n images."""
    lines = [] if len(SIDES) in (2, 3) else ["SIDES are two or three sizes"]
    for side in SIDES:
        images, labels = digits(n, torch.Generator(), side)
        if images.shape != (n, side**2) or labels.shape != (n,):
            lines.append(f"digits: side {side} wants images (n, {side**2}) and labels (n,)")
        elif not torch.is_tensor(images) or images.dtype != torch.float32:
            lines.append("digits: images are a tensor in single precision")
        elif not 0 < unit(images) < torch.inf or len(labels.unique()) < 2:
            lines.append("digits: images must be finite and differ, with two labels at least")
        elif labels.is_floating_point() or labels.min() < 0:
            lines.append("digits: labels are whole numbers from 0 up")
    return lines


def unit(images):
    """The unit of noise: std times side, the root mean square distance of images to their mean."""
    return (images - images.mean(dim=0)).square().sum(dim=1).mean().sqrt().item()


def copied(images, factor):
    """R: each pixel becomes factor x factor pixels.  (n, side^2) to (n, (factor side)^2)."""
    side = round(images.shape[1] ** 0.5)
    rows = images.reshape(-1, side, side).repeat_interleave(factor, dim=1)
    return rows.repeat_interleave(factor, dim=2).flatten(1)


def block_means(images, factor):
    """R^T / k: the means of blocks of factor x factor pixels, from large images to small ones."""
    side = round(images.shape[1] ** 0.5)
    return nn.functional.avg_pool2d(images.reshape(-1, 1, side, side), factor).flatten(1)


# ----------------------------------------- The samplers -----------------------------------------
# One sampler on any grid: with t it is the linear flow; with sigma in the place of t, and images
# that do not shrink, the same line is DDIM (experiment 8).


def velocity(x_t, t, *, denoiser):
    """E[x_0 - x_1 | x_t], where x_t = t x_1 + (1 - t) x_0, which is then (x_0 - x_t) / t.

    x_t: (n, d), at time 0 < t <= 1;  denoiser(x_t, t) -> (n, d).  Returns (n, d).
    """
    return (denoiser(x_t, t) - x_t) / t


def flow(velocity, x_1, times):
    """Pseudocode 5 on any grid: x_r = x_t + v_t(x_t) (t - r), for neighbours t > r of the grid.

    times: (num_steps + 1,), from 1 to 0.  Yields x_r after every step, the last is x_0.
    """
    x_t = x_1
    for t, r in zip(times, times[1:]):
        x_t = x_t + velocity(x_t, t) * (t - r)
        yield x_t


def shifted(t, a):
    """The time at which the linear flow has a times the noise, to the image, that it has at t.

    s / (1 - s) = a t / (1 - t), solved for s (Esser et al., 2024, arXiv 2403.03206).
    """
    return a * t / (1 + (a - 1) * t)


# ------------------------------------------- Learning -------------------------------------------
LOW, HIGH = 0.02, 2.5  # the noise levels, for training and for sampling, in our unit


class Denoiser(nn.Module):
    """A network that learns E[x_0 | x], preconditioned as in experiment 3, for a std of the data.

    sigma_data: the std that it is told, which need not be the data's.
    """

    def __init__(self, num_pixels, sigma_data, width=256):
        super().__init__()
        self.sigma_data = sigma_data
        self.layers = nn.Sequential(
            nn.Linear(num_pixels + 1, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, num_pixels),
        )

    def c_out(self, sigma):
        """The std of the error of the best multiple of x, were sigma_data true."""
        return (1 / self.sigma_data**2 + 1 / sigma**2) ** -0.5

    def forward(self, x, sigma):
        """x: (n, d);  sigma: a float or (n, 1).  Returns (n, d)."""
        sigma = torch.as_tensor(sigma, dtype=x.dtype).expand(len(x), 1)
        std = (self.sigma_data**2 + sigma**2).sqrt()  # of x
        inputs = torch.cat([x / std, (sigma / self.sigma_data).log() / 4], dim=1)
        return (self.sigma_data / std) ** 2 * x + self.c_out(sigma) * self.layers(inputs)


def train(images, *, sigma_data, low, high, train_steps, rng, batch_size=128):
    """Least squares, sigma log-uniform from low to high, error / c_out.  images: (N, d)."""
    # nn.Linear draws its weights from torch's own generator: its seed is drawn from ours.
    torch.manual_seed(torch.randint(2**60, (), generator=rng).item())
    denoiser = Denoiser(images.shape[1], sigma_data)
    optimizer = torch.optim.Adam(denoiser.parameters(), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.004, train_steps)
    for _ in tqdm(range(train_steps), "training", disable=None):
        x_0 = images[torch.randint(len(images), (batch_size,), generator=rng)]
        sigma = low * (high / low) ** torch.rand(batch_size, 1, generator=rng)
        x = x_0 + sigma * torch.randn(x_0.shape, generator=rng)
        loss = ((denoiser(x, sigma) - x_0) / denoiser.c_out(sigma)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return denoiser.requires_grad_(False)


# ------------------------------------------ The truth -------------------------------------------


def chances(x, sigma, images):
    """p(image | x), Bayes' rule (experiment 2), all images as likely.  Returns (n, N)."""
    return (-((torch.cdist(x, images) / sigma) ** 2) / 2).softmax(dim=1)


def exact_denoiser(x, sigma, *, images):
    """E[x_0 | x_0 + N(0, sigma^2 I) = x].  x: (n, d);  images: (N, d).  Returns (n, d)."""
    return chances(x, sigma, images) @ images


def flow_denoiser(x_t, t, *, images):
    """E[x_0 | x_t] in the linear flow: the images have shrunk to (1 - t) of themselves.  (n, d)"""
    return chances(x_t, t, (1 - t) * images) @ images


def right_label(sigma, images, labels, rng):
    """The mean of P(right label | x), x = image + N(0, sigma^2 I), once for each image."""
    x = images + sigma * torch.randn(images.shape, generator=rng, dtype=images.dtype)
    right = labels[:, None] == labels
    return (chances(x, sigma, images) * right).sum(dim=1).mean().item()


# ------------------------------------------ Measuring -------------------------------------------
LEVELS = [0.1 * 20 ** (k / 11) for k in range(12)]  # sigma in our unit, from .1 to 2
EXCESS_LEVELS = [2.5, 1.0, 0.4, 0.16, 0.06, 0.025]
SHARES = [0.8, 0.5, 0.3]
SHOWN = 0.1  # the level of the pictures, in our unit
FACTOR = 4  # a pixel is copied to FACTOR x FACTOR


def crossing(shares, wanted):
    """The level, in our unit, at which shares, one at each of LEVELS, fall to wanted; or None."""
    for low, high, above, below in zip(LEVELS, LEVELS[1:], shares, shares[1:]):
        if above > wanted >= below:
            return low * (high / low) ** ((above - wanted) / (above - below))
    return None


def copies(images, factor, rng, num_samples=100, num_steps=10):
    """Runs the flow on small images and on copies of them, from the same block means of noise.

    Returns {grid: (largest difference of block means at any step, share of samples that end at
    another image)} for the small images' grid and for that grid shifted.
    """
    images = images.double()
    large = copied(images, factor)
    x_1 = torch.randn(num_samples, large.shape[1], generator=rng, dtype=torch.double)
    times = torch.linspace(1, 0, num_steps + 1, dtype=torch.double)
    small, big = (
        partial(velocity, denoiser=partial(flow_denoiser, images=kind)) for kind in (images, large)
    )
    path = [*flow(small, factor * block_means(x_1, factor), times)]
    found = {}
    for name, grid in {"the same grid": times, "shifted": shifted(times, factor)}.items():
        largest = 0
        for t, s, x_t, x_s in zip(times[1:], grid[1:], path, flow(big, x_1, grid)):
            means = block_means(x_s, factor) * (1 - t) / (1 - s)  # where x_0 has shrunk alike
            largest = max(largest, (means - x_t).abs().max().item())
        ends = [torch.cdist(x_0, images).argmin(dim=1) for x_0 in (means, x_t)]
        found[name] = largest, (ends[0] != ends[1]).double().mean().item()
    return found


def measure(denoiser, images, rng):
    """Excess over the exact denoiser at EXCESS_LEVELS, per pixel, in units of the true c_out^2."""
    errors = []
    for level in EXCESS_LEVELS:
        sigma = level * unit(images)
        x = images + sigma * torch.randn(images.shape, generator=rng)
        excess = denoiser(x, sigma) - exact_denoiser(x, sigma, images=images)
        std = unit(images) / images.shape[1] ** 0.5
        errors.append((excess.square().mean() * (1 / std**2 + 1 / sigma**2)).item())
    return errors


def sample(denoiser, noise, low, high, num_steps):
    """x_0, (n, d), by DDIM from high * noise: levels log-uniform from high to low, then 0."""
    sigmas = np.append(np.geomspace(high, low, num_steps), 0).tolist()
    for x in flow(partial(velocity, denoiser=denoiser), high * noise, sigmas):
        pass
    return x


def nearest_label(x_0, images, labels):
    """The label of the nearest image, (n,)."""
    return labels[torch.cdist(x_0, images).argmin(dim=1)]


def apart(x_0, twins, images, labels):
    """RMS distance of samples to twins, in our unit, and the share with the label of its twin."""
    distance = (x_0 - twins).square().sum(dim=1).mean().sqrt().item() / unit(images)
    same = nearest_label(x_0, images, labels) == nearest_label(twins, images, labels)
    return distance, same.double().mean().item()


def label_rows(curves, units):
    """Rows for table.  {side: P(right label) at each of LEVELS}, {side: the unit of noise}."""
    shares = [f"P = {share:g}" for share in SHARES]
    rows = [["pixels", "std", "sigma at P = .5", "over std side:", *shares]]
    for side, curve in curves.items():
        half, *levels = (crossing(curve, share) for share in [0.5, *SHARES])
        sigma = "-" if half is None else f"{half * units[side]:.3f}"
        cells = ["-" if level is None else f"{level:.3f}" for level in levels]
        rows.append([f"{side} x {side}", f"{units[side] / side:.3f}", sigma, "", *cells])
    return rows


def copy_rows(found):
    """Rows for table.  found: of copies."""
    return [
        [f"copies, {grid}", "largest difference", f"{most:.1e}", "another image", f"{other:.0%}"]
        for grid, (most, other) in found.items()
    ]


def sample_rows(samples, twins, images, labels):
    """Rows for table: how far samples are from twins, and what the twins are.  {name: (n, d)}"""
    rows = [["std known to", "apart", "label as twin", "twins: std", "commonest", "rarest"]]
    for name, x_0 in samples.items():
        distance, same = apart(x_0, twins[name], images, labels)
        off = twins[name] - images.mean(dim=0)
        std = off.square().sum(dim=1).mean().sqrt().item() / unit(images)
        counts = torch.bincount(
            nearest_label(twins[name], images, labels), minlength=labels.max() + 1
        )
        kinds = labels.unique()
        order = kinds[counts[kinds].argsort(stable=True)].tolist()
        ends = [f"{kind}: {counts[kind] / len(x_0):.1%}" for kind in (order[-1], order[0])]
        rows.append([name, f"{distance:.2f}", f"{same:.1%}", f"{std:.3f}", *ends])
    return rows


# ----------------------------------------- The figures ------------------------------------------
plt.style.use("default")  # the same figures whatever the reader's matplotlibrc says
BLUE, GREEN, PINK, SKY = "#0072B2", "#009E73", "#CC79A7", "#56B4E9"
COLORS = [BLUE, SKY, GREEN, PINK]  # of the networks


def draw_noisy(pictures, levels):
    """One image at each size, (side^2,), plus noise: equal sigma above, equal in our unit below.

    pictures: {side: [noisy, noisy]};  levels: {side: [sigma, sigma]}.
    """
    size = (3 * len(pictures), 6.4)
    fig, axes = plt.subplots(2, len(pictures), figsize=size, layout="constrained", squeeze=False)
    for column, (side, noisy) in zip(axes.T, pictures.items()):
        for ax, x, sigma in zip(column, noisy, levels[side]):
            reach = 1 + 1.5 * sigma  # contrast
            square = x.reshape(side, side).numpy()
            ax.imshow(square, "gray_r", vmin=-reach, vmax=reach, interpolation="nearest")
            ax.set(xticks=[], yticks=[], title=rf"{side} pixels: $\sigma$ = {sigma:.2f}")
    axes[0, 0].set_ylabel(r"equal $\sigma$", fontsize=14)
    axes[1, 0].set_ylabel(r"equal $\sigma$ / (std $\cdot$ side)", fontsize=14)
    return fig


def draw_labels(curves, units, chance):
    """P(right label) against sigma and in our unit.  curves, units: {side: ...}."""
    fig, axes = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained", sharey=True)
    for shade, marker, side in zip(("0.65", "0.4", "k"), "os^", curves):
        for ax, scale in zip(axes, (units[side], 1)):
            sigmas = [scale * level for level in LEVELS]
            style = {"color": shade, "marker": marker, "ms": 5, "label": f"{side} x {side}"}
            ax.plot(sigmas, curves[side], **style)
    axes[0].set(xlabel=r"$\sigma$", ylabel="P(right label | x), mean", ylim=(0, 1.03))
    axes[1].set(xlabel=r"$\sigma$ / (std $\cdot$ side)")
    for ax in axes:
        ax.axhline(chance, color="k", lw=0.8, ls=":")
        ax.set_xscale("log")
        ax.invert_xaxis()  # as sampling runs
    axes[0].legend(title="pixels", loc="upper left")
    fig.suptitle("Can the digit be told? Exact posterior; dotted: a guess without x")
    return fig


def draw_excess(errors, scale):
    """Errors of each network, {name: one at each of EXCESS_LEVELS}; levels made for std 1: grey."""
    fig, ax = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    for color, (name, row) in zip(COLORS, errors.items()):
        ax.plot(EXCESS_LEVELS, row, "o-", color=color, label=name)
    ax.axvspan(LOW / scale, HIGH / scale, color="0.9", lw=0, label="levels made for std 1")
    ax.set(xscale="log", yscale="log", xlabel=r"$\sigma$ / (std $\cdot$ side)")
    ax.set(ylabel=r"excess / $c_\mathrm{out}^2$", title=f"Data of std {scale:g}: std known to")
    ax.set_xlim(1.5 * EXCESS_LEVELS[0], EXCESS_LEVELS[-1] / 1.5)  # as sampling runs
    fig.legend(*ax.get_legend_handles_labels(), loc="outside right upper")
    return fig


def show_digits(ax, title, x_0, twin):
    """The first ten of each, (n, d), in blue and in black, white at -1, ink at 1."""
    ax.clear()
    for k, (images, ink) in enumerate([(x_0, BLUE), (twin, "k")]):
        side = round(images.shape[1] ** 0.5)
        squares = nn.functional.pad(images[:10].reshape(10, side, side), (1, 1, 1, 1), value=-1)
        strip = squares.transpose(0, 1).flatten(1).numpy()  # side by side, with a margin
        shades = LinearSegmentedColormap.from_list("", ["w", ink])
        ax.imshow(strip, shades, vmin=-1, vmax=1, extent=(0, 10, k + 1, k), interpolation="nearest")
    ax.set(xticks=[], ylim=(2, 0), title=title, frame_on=False)
    ax.set_yticks([0.5, 1.5], ["network", "its twin"], fontsize=14)
    ax.tick_params(length=0)


def draw_samples(samples, twins):
    """The first ten of each network above their twins, in the units of the images."""
    fig, axes = plt.subplots(len(samples), 1, figsize=(7, 6.2), layout="constrained")
    for ax, name in zip(axes, samples):
        show_digits(ax, f"std known to {name}", samples[name], twins[name])
    return fig


# ------------------------------------------ Running it ------------------------------------------


def options(argv, *faults, **knobs):
    """The command line: num_steps=(default, least, largest, meaning) is --num-steps, and so on.

    faults: what the script cannot do with the data at its top, a line each; it is refused.
    """
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    text = "default: figures; with other options, a folder in it"
    parser.add_argument("--figures-dir", metavar="X", type=os.path.expanduser, help=text)
    for name, (default, least, largest, meaning) in knobs.items():
        text = f"{meaning}: {least:_} to {largest:_}, default {default:_}"
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, metavar="X", type=type(default), default=default, help=text)
    args = parser.parse_args(argv)
    for name, (_, least, largest, _) in knobs.items():
        if not least <= (value := getattr(args, name)) <= largest:
            option = name.replace("_", "-")
            parser.error(f"argument --{option}: {value} is not from {least:_} to {largest:_}")
    for fault in faults:
        parser.error(fault)
    tried = [f"{name}-{x}" for name, x in vars(args).items() if x != parser.get_default(name)]
    own = Path(__file__).parent / "figures" / "-".join(tried).replace("_", "-")
    args.figures_dir = Path(args.figures_dir or own)
    probe = args.figures_dir / "a-name-longer-than-that-of-any-figure-here"
    try:
        args.figures_dir.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        parser.error(f"argument --figures-dir: {error}")
    if hasattr(sys.stdout, "reconfigure"):  # not in a notebook
        sys.stdout.reconfigure(errors="backslashreplace")  # for a folder that is not in ASCII
    return args


def table(rows):
    """Prints rows of strings, the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip_longest(*rows, fillvalue="")]
    for first, *others in rows:
        cells = [other.rjust(width) for other, width in zip(others, widths[1:])]
        print(first.ljust(widths[0]), *cells, sep="  ")


def main(argv=None):
    args = options(
        argv,
        *faults(),
        num_steps=(40, 1, 1000, "steps of the sampler"),
        num_samples=(800, 10, 5000, "samples of each network"),
        num_images=(1000, 60, 3000, "images, at each size"),
        scale=(5.49, 0.05, 100.0, "std of the data that is learned, 1 / .18215"),
        train_steps=(800, 1, 10**6, "steps of the optimizer"),
        seed=(0, 0, 10**6, "seed of every draw"),
    )
    torch.set_num_threads(1)  # the same bytes on any number of cores, and hardly slower
    rng = torch.Generator().manual_seed(args.seed)

    # The same drawings at each size: which label can be told?
    scene = torch.Generator().manual_seed(torch.randint(2**60, (), generator=rng).item())
    drawn = {side: digits(args.num_images, scene.clone_state(), side) for side in SIDES}
    units = {side: unit(images) for side, (images, _) in drawn.items()}
    curves, pictures, levels = {}, {}, {}
    for side, (images, labels) in drawn.items():
        sigmas = [units[side] * level for level in LEVELS]
        curves[side] = [right_label(sigma, images, labels, rng) for sigma in sigmas]
        noise = torch.randn(side**2, generator=rng)
        levels[side] = [SHOWN * units[SIDES[1]], SHOWN * units[side]]
        pictures[side] = [images[2] + sigma * noise for sigma in levels[side]]
    chance = (labels[:, None] == labels).double().mean().item()

    # The first size: copied, and learned at another scale.
    side = SIDES[0]
    images, labels = drawn[side]
    found = copies(images, FACTOR, rng)
    mean_image, std = images.mean(dim=0), units[side] / side
    latents = (images - mean_image) * (args.scale / std)
    noise = torch.randn(args.num_samples, side**2, generator=rng)
    exact = partial(exact_denoiser, images=latents)
    errors, samples, twins = {}, {}, {}
    for name, (sigma_data, levels_for) in {
        "network and levels": (args.scale, args.scale),
        "levels": (1.0, args.scale),
        "network": (args.scale, 1.0),
        "neither": (1.0, 1.0),
    }.items():
        ends = {"low": LOW * levels_for * side, "high": HIGH * levels_for * side}
        steps = {"train_steps": args.train_steps, "rng": rng}
        denoiser = train(latents, sigma_data=sigma_data, **ends, **steps)
        errors[name] = measure(denoiser, latents, rng)
        samples[name] = sample(denoiser, noise, **ends, num_steps=args.num_steps)
        twins[name] = sample(exact, noise, **ends, num_steps=args.num_steps)

    def shown(images):
        return {name: x * (std / args.scale) + mean_image for name, x in images.items()}

    for name, figure in {
        "noisy": draw_noisy(pictures, levels),
        "labels": draw_labels(curves, units, chance),
        "excess": draw_excess(errors, args.scale),
        "samples": draw_samples(shown(samples), shown(twins)),
    }.items():
        figure.savefig(args.figures_dir / f"{name}.jpg", dpi=120)
    table(copy_rows(found))
    table(label_rows(curves, units))
    rows = [[name, *(f"{error:.3f}" for error in row)] for name, row in errors.items()]
    table([["excess at sigma / (std side) =", *map(str, EXCESS_LEVELS)], *rows])
    table(sample_rows(samples, twins, latents, labels))
    print(f"figures: {args.figures_dir}")


if __name__ == "__main__":
    main()
