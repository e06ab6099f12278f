"""Experiment 13: the same samplers draw digits, beside those that the training images make.

The claim
    DDPM and DDIM are those of experiment 3, to the letter. But x_0 is an image, 16 x 16 pixels.
    A network learns E[x_0 | x_t], D, and E[x_0 | x_t, label]: so a digit can be asked for.
    Guidance overstates the label: D + w (D(. | label) - D) with w > 1.

The truth beside it
    The data is a finite set of images. So the minimiser of the loss, as in experiment 5, is their
    mean, weighted by p(image | x_t): experiment 2 in 256 dimensions, `exact_denoiser`. With a
    label: that of the label's images.
    A sample's twin is what the minimiser makes of the same start and the same noise.

What to look for in figures/
    digits.jpg         the network's digits above their twins: are they the same?
    excess-vs-t.jpg    images that were learned, and new ones: which denoiser errs less?
    digits.gif         noise becomes digits

Try this
    python digits.py --guidance 10      does more guidance help, and whom?
    python digits.py --num-steps 20     how many steps does a digit need?
    python digits.py --num-images 120   two of each digit and font: does the network copy them?
"""

import os
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from functools import cache, partial
from itertools import islice, zip_longest
from pathlib import Path

os.environ["MPLBACKEND"] = "agg"  # figures are files, also from a notebook

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.animation import PillowWriter
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
SIDE = 16  # pixels


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


def digits(n, rng):
    """n images, (n, 256), from -1 (paper) to 1 (ink), and their labels, (n,).

    The digits in turn, the fonts in turn; height 70 to 76 % of the side, turned by up to 5 degrees,
    moved by up to half a pixel.  rng: a torch Generator.
    """
    paths = outlines()
    renderer = RendererAgg(SIDE, SIDE, 72)
    brush = renderer.new_gc()
    brush.set_linewidth(0)  # fill the outline, do not draw it
    draws = torch.rand(n, 4, generator=rng).numpy()
    images = np.empty((n, SIDE, SIDE), dtype=np.float32)
    for i, (height, angle, right, up) in enumerate(draws):
        place = Affine2D().scale(SIDE * (0.70 + 0.06 * height)).rotate_deg(10 * angle - 5)
        place.translate(SIDE / 2 + right - 0.5, SIDE / 2 + up - 0.5)
        renderer.clear()
        renderer.draw_path(brush, paths[i % len(paths)], place, (0, 0, 0))
        images[i] = np.asarray(renderer.buffer_rgba())[..., 3]  # the share of a pixel under ink
    return torch.from_numpy(images).flatten(1) / 127.5 - 1, torch.arange(n) % 10


def faults(n=300):
    """What the script cannot do with the data, a line each, from a look at n images."""
    images, labels = digits(n, torch.Generator())
    learned, num_pixels = {*labels.chunk(2)[0].tolist()}, images.shape[1]
    wrong = sorted(learned ^ {*range(labels.max() + 1)})
    lines = [f"labels run from 0 up, each among the images learned: not {wrong}"] if wrong else []
    if round(num_pixels**0.5) ** 2 != num_pixels:
        lines.append(f"images are squares, not of {num_pixels} pixels")
    if not 0 < images.std() < torch.inf:
        lines.append("images are finite, and not blank")
    return lines


def add_noise(x_0, t, sigma_q, rng):
    """x_t = x_0 + N(0, sigma_q^2 t I).  x_0: (n, d);  t: a float or (n, 1).  Returns (n, d)."""
    return x_0 + sigma_q * t**0.5 * torch.randn(x_0.shape, generator=rng)


# --------------------------------------- The reverse mean ---------------------------------------


def reverse_mean(x_t, t, dt, *, denoiser):
    """E[x_{t-dt} | x_t] from E[x_0 | x_t], eq. (24) of the tutorial.

    Exact for any dt: of the noise x_t - x_0, the last dt brought on average the share dt / t.
    x_t: (n, d), at time t;  0 < dt <= t <= 1;  denoiser(x_t, t) -> (n, d).  Returns (n, d).
    """
    return (dt / t) * denoiser(x_t, t) + (1 - dt / t) * x_t


NO_LABEL = -1  # in the place of a label


def guided(x_t, t, *, denoiser, label, w):
    """D + w (D(. | label) - D), arXiv 2207.12598 (whose w is less by 1).  Returns (n, d)."""
    parts = [(1 - w, torch.full_like(label, NO_LABEL)), (w, label)]
    return sum(share * denoiser(x_t, t, which) for share, which in parts if share)


# ----------------------------------------- The samplers -----------------------------------------


def ddpm(reverse_mean, x_1, num_steps, sigma_q, rng):
    """Algorithm 1 (DDPM): x_{t-dt} = E[x_{t-dt} | x_t] + N(0, sigma_q^2 dt).

    x_1: draws of the base;  num_steps = 1 / dt.  Yields x_{t-dt} after every step, the last is x_0.
    """
    x_t, dt = x_1, 1 / num_steps
    for k in range(num_steps, 0, -1):  # t = k dt
        noise = torch.randn(x_t.shape, generator=rng)
        x_t = reverse_mean(x_t, k / num_steps, dt) + sigma_q * dt**0.5 * noise
        yield x_t


def ddim(reverse_mean, x_1, num_steps):
    """Algorithm 2 (DDIM): x_{t-dt} = x_t + lam (E[x_{t-dt} | x_t] - x_t).

    lam = sigma_t / (sigma_{t-dt} + sigma_t); as sigma_t = sigma_q sqrt(t), sigma_q cancels in it.
    x_1: draws of the base;  num_steps = 1 / dt.  Yields x_{t-dt} after every step, the last is x_0.
    """
    x_t, dt = x_1, 1 / num_steps
    for k in range(num_steps, 0, -1):  # t = k dt
        lam = k**0.5 / ((k - 1) ** 0.5 + k**0.5)
        x_t = x_t + lam * (reverse_mean(x_t, k / num_steps, dt) - x_t)
        yield x_t


def ddpm_to_mean(reverse_mean, x_1, num_steps, sigma_q, rng):
    """ddpm, but its last step adds no noise: x_0 = E[x_0 | x_dt].  Yields as ddpm does."""
    x_t, dt = x_1, 1 / num_steps
    for x_t in islice(ddpm(reverse_mean, x_1, num_steps, sigma_q, rng), num_steps - 1):
        yield x_t
    yield reverse_mean(x_t, dt, dt)


# ------------------------------------------- Learning -------------------------------------------
MIN_T = 1 / 250  # the smallest t that is learned: the last step of the most steps
NUM_AXES = 96  # of 256 or of fewer; the other 160 have less than 1 % of the variance


class Denoiser(nn.Module):
    """A residual network that learns E[x_0 | x_t, label].

    As in experiment 3 it learns, in units of c_out, what a first guess misses. Here that is the
    Gaussian denoiser, since neighbouring pixels are alike, and the network works in its axes.
    """

    def __init__(self, images, num_labels, sigma_q, width=256, num_blocks=5):
        super().__init__()
        self.num_labels, self.sigma_q = num_labels, sigma_q
        self.sigma_data = images.square().mean().sqrt()
        variances, axes = torch.linalg.eigh(images.T @ images / len(images))  # in rising order
        self.variances, self.axes = variances[-NUM_AXES:], axes[:, -NUM_AXES:]
        num_axes = len(self.variances)  # at most as many as pixels
        self.first = nn.Linear(num_axes + 1 + num_labels + 1, width)  # x_t, t, the label or none
        self.blocks = nn.ModuleList()
        for _ in range(num_blocks):
            hidden = [nn.LayerNorm(width), nn.Linear(width, width), nn.GELU()]
            self.blocks.append(nn.Sequential(*hidden, nn.Linear(width, width)))
        self.last = nn.Linear(width, num_axes)

    def c_out(self, t):
        """The error of the best linear guess, were pixels independent, with one variance."""
        return (1 / self.sigma_data**2 + 1 / (self.sigma_q**2 * t)) ** -0.5

    def gaussian(self, x_t, t):
        """E[x_0 | x_t] if the data were Gaussian: experiment 0 on each principal axis.  (n, d)"""
        shrink = self.variances / (self.variances + self.sigma_q**2 * t)
        return shrink * (x_t @ self.axes) @ self.axes.T

    def forward(self, x_t, t, label):
        """x_t: (n, d);  t: a float or (n, 1);  label: (n,).  Returns (n, d)."""
        t = torch.as_tensor(t).expand(len(x_t), 1)
        z = x_t @ self.axes / (self.variances + self.sigma_q**2 * t).sqrt()
        num_inputs = self.num_labels + 1  # NO_LABEL is the last
        which = nn.functional.one_hot(label % num_inputs, num_inputs)
        h = self.first(torch.cat([z, t.log() / 4, which], dim=1))
        for block in self.blocks:
            h = h + block(h)
        return self.gaussian(x_t, t) + self.c_out(t) * self.last(h) @ self.axes.T


def train(images, labels, *, sigma_q, train_steps, rng, batch_size=256, learning_rate=0.004):
    """Pseudocode 6: sigma_t uniform, error / c_out, one label in 5 hidden.  images: (N, d)."""
    # nn.Linear draws its weights from torch's own generator: its seed is drawn from ours.
    torch.manual_seed(torch.randint(2**60, (), generator=rng).item())
    denoiser = Denoiser(images, labels.max().item() + 1, sigma_q)
    optimizer = torch.optim.Adam(denoiser.parameters(), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, train_steps)
    for _ in tqdm(range(train_steps), "training", disable=None):
        batch = torch.randint(len(images), (batch_size,), generator=rng)
        label = labels[batch].masked_fill(torch.rand(batch_size, generator=rng) < 0.2, NO_LABEL)
        x_0 = images[batch]
        t = (MIN_T**0.5 + (1 - MIN_T**0.5) * torch.rand(batch_size, 1, generator=rng)) ** 2
        x_t = add_noise(x_0, t, sigma_q, rng)
        loss = ((denoiser(x_t, t, label) - x_0) / denoiser.c_out(t)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return denoiser.requires_grad_(False)


# ------------------------------------------ The truth -------------------------------------------


def exact_denoiser(x_t, t, *, images, sigma_q):
    """E[x_0 | x_t]: the mean of the images, weighted by p(image | x_t), Bayes' rule (experiment 2).

    x_t: (n, d);  t: a float;  images: (N, d), all as likely.  Returns (n, d).
    """
    sigma_t = sigma_q * t**0.5
    posterior = (-((torch.cdist(x_t, images) / sigma_t) ** 2) / 2).softmax(dim=1)
    return posterior @ images


def exact_with_label(x_t, t, label, *, images, labels, sigma_q):
    """E[x_0 | x_t, label]: the same over the images with that label.  Arguments as in Denoiser."""
    x_0 = torch.empty_like(x_t)
    for which in label.unique():
        asked = label == which
        known = images if which == NO_LABEL else images[labels == which]
        x_0[asked] = exact_denoiser(x_t[asked], t, images=known, sigma_q=sigma_q)
    return x_0


# ------------------------------------------ Measuring -------------------------------------------
TIMES = [1.0, 0.3, 0.1, 0.03, 0.01, MIN_T]


def measure(denoiser, exact, images, new, rng):
    """Errors without label at each of TIMES, per pixel, in units of c_out^2: {name: a list}.

    On the images learned: the least error, the minimiser's, and the excess of others beyond it, as
    in experiment 3. On new images: the whole error.  images, new: (n, d).
    """
    none = torch.full((len(images),), NO_LABEL)
    errors = {}
    for t in TIMES:
        x_t, new_t = (add_noise(x_0, t, denoiser.sigma_q, rng) for x_0 in (images, new))
        best = exact(x_t, t, none)
        for name, difference in {
            "Bayes error": images - best,
            "excess, Gaussian": denoiser.gaussian(x_t, t) - best,
            "excess, network": denoiser(x_t, t, none) - best,
            "new images, minimiser": exact(new_t, t, none) - new,
            "new images, network": denoiser(new_t, t, none) - new,
        }.items():
            error = difference.square().mean() / denoiser.c_out(t) ** 2
            errors.setdefault(name, []).append(error.item())
    return errors


def paths(denoiser, x_1, label, guidance, num_steps, sigma_q, rng):
    """Runs the samplers from x_1, (n, d), for label, (n,).  Returns {which: [x_1, ..., x_0]}."""

    def mean(w):
        return partial(reverse_mean, denoiser=partial(guided, denoiser=denoiser, label=label, w=w))

    runs = {
        "DDIM, without label": ddim(mean(0), x_1, num_steps),
        "DDPM, with label": ddpm_to_mean(mean(1), x_1, num_steps, sigma_q, rng),
        "DDIM, with label": ddim(mean(1), x_1, num_steps),
        f"DDIM, guided, w = {guidance:g}": ddim(mean(guidance), x_1, num_steps),
    }
    return {name: [x_1, *tqdm(run, name, num_steps, disable=None)] for name, run in runs.items()}


def read(x_0, images, labels):
    """The nearest image's label and whether it is legible, (n,) each: others are twice as far."""
    kinds, distances = labels.unique(), torch.cdist(x_0, images)
    nearest = torch.stack([distances[:, labels == kind].amin(dim=1) for kind in kinds], dim=1)
    distance, place = nearest.min(dim=1)
    other = nearest.scatter(1, place[:, None], torch.inf).amin(dim=1)
    return kinds[place], distance < other / 2


def report(samples, twins, new, images, labels):
    """Rows for table: shares, standard errors.  samples, twins: of paths;  new: (m, d), real."""
    rows = [["", "legible", "+-", "twin legible", "as its twin"]]
    for name, path in {"new images": [new], **samples}.items():
        which, legible = read(path[-1], images, labels)
        share = legible.double().mean().item()
        row = [name, f"{share:.1%}", f"{(share * (1 - share) / len(legible)) ** 0.5:.1%}"]
        if name in twins:  # real images have none
            twin, twin_legible = read(twins[name][-1], images, labels)
            row += [f"{x.double().mean():.1%}" for x in (twin_legible, which == twin)]
        rows.append(row)
    return rows


# ----------------------------------------- The figures ------------------------------------------
plt.style.use("default")  # the same figures whatever the reader's matplotlibrc says
BLUE, PINK = "#0072B2", "#CC79A7"


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


def draw_digits(samples, twins, mean_image):
    """The first ten samples of each kind above their twins.  samples, twins: of paths."""
    fig, axes = plt.subplots(len(samples), 1, figsize=(7, 6.2), layout="constrained")
    for ax, name in zip(axes, samples):
        show_digits(ax, name, samples[name][-1] + mean_image, twins[name][-1] + mean_image)
    return fig


def draw_errors(errors):
    """errors: of measure."""
    fig, (old, new) = plt.subplots(1, 2, figsize=(9, 4.2), layout="constrained", sharey=True)
    old.plot(TIMES, errors["Bayes error"], "ko-", label="Bayes error")
    old.plot(TIMES, errors["excess, Gaussian"], "o-", color=PINK, label="excess, Gaussian denoiser")
    old.plot(TIMES, errors["excess, network"], "o-", color=BLUE, label="excess, network")
    old.set(title="Images learned: Bayes error, excess", ylabel=r"error / $c_\mathrm{out}^2$")
    new.plot(TIMES, errors["new images, minimiser"], "ko-", label="minimiser")
    new.plot(TIMES, errors["new images, network"], "o-", color=BLUE, label="network")
    new.set(title="New images: total error")
    for ax in (old, new):
        ax.set(xscale="log", xlabel="$t$", xlim=(1.2, MIN_T / 1.2), ylim=(0, None))
        ax.legend(loc="upper center")
    return fig


def save_movie(file, path, twin, mean_image, sigma_q, num_frames=30):
    """Noise becomes digits, in frames about even in sigma_t; then as many of rest."""
    fig, ax = plt.subplots(figsize=(7, 1.9), layout="constrained")
    num_steps, writer = len(path) - 1, PillowWriter(fps=12)
    with writer.saving(fig, file, dpi=80):
        for share in torch.linspace(1, -1, 2 * num_frames).clamp(min=0).tolist():
            k = round(share**2 * num_steps)  # t = k dt
            sigma_t = sigma_q * (k / num_steps) ** 0.5
            pair = torch.stack([path[-1 - k], twin[-1 - k]]) + mean_image
            show_digits(ax, rf"$\sigma_t$ = {sigma_t:.2f}", *pair / (1 + sigma_t))  # contrast
            writer.grab_frame()


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
        num_steps=(100, 1, 250, "steps of a sampler, 1 / dt"),
        num_samples=(400, 10, 1000, "samples of each kind"),
        num_images=(3000, 60, 60_000, "images to learn from"),
        sigma_q=(2.0, 0.5, 10.0, "std of the noise at t = 1, and of the base"),
        guidance=(2.0, 0.0, 10.0, "the weight w of the label when guided"),
        train_steps=(2000, 1, 10**6, "steps of the optimizer"),
        seed=(0, 0, 10**6, "seed of every draw"),
    )
    torch.set_num_threads(1)  # the same bytes on any number of cores, and hardly slower
    rng = torch.Generator().manual_seed(args.seed)

    images, labels = digits(2 * args.num_images, rng)  # one half to learn, the other is new
    (images, new), (labels, _) = images.chunk(2), labels.chunk(2)
    mean_image = images.mean(dim=0)
    images, new = images - mean_image, new[:2000] - mean_image
    denoiser = train(images, labels, sigma_q=args.sigma_q, train_steps=args.train_steps, rng=rng)
    exact = partial(exact_with_label, images=images, labels=labels, sigma_q=args.sigma_q)

    errors = measure(denoiser, exact, images[: len(new)], new, rng)
    x_1 = args.sigma_q * torch.randn(args.num_samples, len(mean_image), generator=rng)
    kinds = labels.unique()
    label = kinds[torch.arange(args.num_samples) % len(kinds)]  # each in turn
    start = (x_1, label, args.guidance, args.num_steps, args.sigma_q)
    # A twin has the same start and the same noise.
    twins = paths(exact, *start, rng.clone_state())
    samples = paths(denoiser, *start, rng)

    for name, figure in {
        "digits": draw_digits(samples, twins, mean_image),
        "excess-vs-t": draw_errors(errors),
    }.items():
        figure.savefig(args.figures_dir / f"{name}.jpg", dpi=120)
    (*_, path), (*_, twin) = samples.values(), twins.values()  # guided
    save_movie(args.figures_dir / "digits.gif", path, twin, mean_image, args.sigma_q)
    rows = [[name, *(f"{error:.3f}" for error in row)] for name, row in errors.items()]
    table([["t", *map(str, TIMES)], *rows])
    table(report(samples, twins, new, images, labels))
    print(f"figures: {args.figures_dir}")


if __name__ == "__main__":
    main()
