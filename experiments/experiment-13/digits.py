"""Experiment 13: the same samplers draw digits, beside those that the exact denoiser draws.

The claim
    The samplers do not change with the data: DDPM and DDIM are those of experiment 3, to the
    letter. But x_0 is an image of 16 x 16 pixels, and a network learns E[x_0 | x_t]. Given the
    label too, it learns E[x_0 | x_t, label]: then a digit can be asked for. Guidance overstates
    the label: D + w (D(. | label) - D) with w > 1.

The truth beside it
    The data is a finite set of images. So E[x_0 | x_t] is their mean, weighted by p(image | x_t):
    experiment 2 in 256 dimensions, `exact_denoiser`. With a label: the mean of that digit's images.
    A sample's twin is what the exact denoiser makes of the same start.

What to look for in figures/
    digits.jpg         the network's digits above their twins; in a column, all have one start
    excess-vs-t.jpg    left, the network is nearer to the exact denoiser than the Gaussian one is,
                       its first guess; right, on new images the exact one can be the worse
    digits.gif         noise becomes digits; DDPM leaves the noise of its last step

Try this
    python digits.py --guidance 10       too much for the network, not for the exact denoiser
    python digits.py --num-steps 20      enough for DDIM; DDPM's last noise is twice as wide
    python digits.py --train-steps 300   a weak network: guidance helps it more
    python digits.py --num-images 120    two of each digit and font: the network copies them
"""

import os
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile

os.environ["MPLBACKEND"] = "agg"  # figures are files, also from a notebook

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.animation import FuncAnimation, PillowWriter
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


def outlines():
    """The ten digits in the first font, in the second, ...: 60 paths of height 1, around 0."""
    paths = []
    for name in NAMES:
        file = FONTS / f"{name}.ttf"
        if not file.is_file():
            print(f"digits.py: this matplotlib comes without {file}", file=sys.stderr)
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


NO_LABEL = 10


def guided(denoiser, label, w):
    """The reverse mean of D + w (D(. | label) - D), Ho & Salimans (2022, arXiv 2207.12598).

    w = 0 is without label, w = 1 with it, w > 1 exaggerates it (theirs is w - 1).
    denoiser(x_t, t, label) -> (n, 256);  label: (n,), of 0, ..., 9.
    """

    def mixed(x_t, t):
        without = denoiser(x_t, t, torch.full_like(label, NO_LABEL))
        return without + w * (denoiser(x_t, t, label) - without)

    return partial(reverse_mean, denoiser=mixed)


# ----------------------------------------- The samplers -----------------------------------------
# They know nothing of the data but the function that they are given: reverse_mean(x_t, t, dt).


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


# ------------------------------------------- Learning -------------------------------------------
MIN_T = 1 / 250  # the smallest t that is learned: the last step of the most steps
SIGMA_DATA = 0.44  # the standard deviation of the data, per pixel
NUM_AXES = 96  # the other 160 have less than 1 % of the variance


def c_out(t, sigma_q):
    """The error of the best linear guess of x_0, per pixel, if pixels were independent."""
    return SIGMA_DATA * sigma_q * t**0.5 / (sigma_q**2 * t + SIGMA_DATA**2) ** 0.5


class Denoiser(nn.Module):
    """A residual network that learns E[x_0 | x_t, label].

    As in experiment 3 it learns, in units of c_out, what a first guess misses. There the guess was
    c_skip x_t, the best for independent pixels. Pixels are not independent: here it is the Gaussian
    denoiser, and the network works in its axes.
    """

    def __init__(self, images, sigma_q, width=256, num_blocks=5):
        super().__init__()
        self.sigma_q = sigma_q
        variances, axes = torch.linalg.eigh(images.T @ images / len(images))  # in rising order
        self.variances, self.axes = variances[-NUM_AXES:], axes[:, -NUM_AXES:]
        self.first = nn.Linear(NUM_AXES + 1 + 11, width)  # x_t, t, the label
        self.blocks = nn.ModuleList()
        for _ in range(num_blocks):
            hidden = [nn.LayerNorm(width), nn.Linear(width, width), nn.GELU()]
            self.blocks.append(nn.Sequential(*hidden, nn.Linear(width, width)))
        self.last = nn.Linear(width, NUM_AXES)

    def gaussian(self, x_t, t):
        """E[x_0 | x_t] if the data were Gaussian: experiment 0 on each principal axis.  (n, 256)"""
        shrink = self.variances / (self.variances + self.sigma_q**2 * t)
        return shrink * (x_t @ self.axes) @ self.axes.T

    def forward(self, x_t, t, label):
        """x_t: (n, 256);  t: a float or (n, 1);  label: (n,), of 0, ..., NO_LABEL.  (n, 256)"""
        t = torch.as_tensor(t).expand(len(x_t), 1)
        z = x_t @ self.axes / (self.variances + self.sigma_q**2 * t).sqrt()
        h = self.first(torch.cat([z, t.log() / 4, nn.functional.one_hot(label, 11)], dim=1))
        for block in self.blocks:
            h = h + block(h)
        return self.gaussian(x_t, t) + c_out(t, self.sigma_q) * self.last(h) @ self.axes.T


def train(images, labels, *, sigma_q, train_steps, rng, batch_size=256, learning_rate=0.004):
    """Pseudocode 6, with sigma_t uniform, the error in units of c_out, and one label in 5 hidden.

    images: (N, 256);  labels: (N,).  Returns the trained Denoiser and the loss of each step.
    """
    # nn.Linear draws its weights from torch's own generator: its seed is drawn from ours.
    torch.manual_seed(torch.randint(2**60, (), generator=rng).item())
    denoiser = Denoiser(images, sigma_q)
    optimizer = torch.optim.Adam(denoiser.parameters(), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, train_steps)
    losses = []
    for _ in tqdm(range(train_steps), "training", disable=None):
        batch = torch.randint(len(images), (batch_size,), generator=rng)
        hidden = torch.rand(batch_size, generator=rng) < 0.2
        label = labels[batch].masked_fill(hidden, NO_LABEL)
        x_0 = images[batch]
        t = (MIN_T**0.5 + (1 - MIN_T**0.5) * torch.rand(batch_size, 1, generator=rng)) ** 2
        x_t = add_noise(x_0, t, sigma_q, rng)
        loss = ((denoiser(x_t, t, label) - x_0) / c_out(t, sigma_q)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return denoiser.requires_grad_(False), losses


# ------------------------------------------ The truth -------------------------------------------


def exact_denoiser(x_t, t, *, images, sigma_q):
    """E[x_0 | x_t]: the mean of the images, weighted by p(image | x_t), Bayes' rule (experiment 2).

    x_t: (n, 256);  t: a float;  images: (N, 256), all as likely.  Returns (n, 256).
    """
    posterior = (-((torch.cdist(x_t, images) / (sigma_q * t**0.5)) ** 2) / 2).softmax(dim=1)
    return posterior @ images


def exact_with_label(x_t, t, label, *, images, labels, sigma_q):
    """E[x_0 | x_t, label]: the same over the images of that digit.  Arguments as in Denoiser."""
    x_0 = torch.empty_like(x_t)
    for digit in label.unique():
        asked = label == digit
        known = images if digit == NO_LABEL else images[labels == digit]
        x_0[asked] = exact_denoiser(x_t[asked], t, images=known, sigma_q=sigma_q)
    return x_0


# ------------------------------------------ Measuring -------------------------------------------
TIMES = [0.004, 0.01, 0.03, 0.1, 0.3, 1.0]


def measure(denoiser, exact, images, new, sigma_q, rng):
    """Errors without label at each of TIMES, per pixel, in units of c_out^2: {name: a list}.

    As in experiment 3, the Bayes error is E|x_0 - E[x_0|x_t]|^2, and the excess of a denoiser f is
    E|f - E[x_0|x_t]|^2. On new images, drawn as the first were, the error is E|f - x_0|^2.
    denoiser, exact: of (x_t, t, label);  images, new: (N, 256).
    """
    none = torch.full((len(images),), NO_LABEL)
    errors = {}
    for t in TIMES:
        x_t, new_t = add_noise(images, t, sigma_q, rng), add_noise(new, t, sigma_q, rng)
        best = exact(x_t, t, none)
        for name, difference in {
            "Bayes error": images - best,
            "excess, Gaussian denoiser": denoiser.gaussian(x_t, t) - best,
            "excess, network": denoiser(x_t, t, none) - best,
            "new images, exact": exact(new_t, t, none) - new,
            "new images, network": denoiser(new_t, t, none) - new,
        }.items():
            error = difference.square().mean() / c_out(t, sigma_q) ** 2
            errors.setdefault(name, []).append(error.item())
    return errors


def sample(denoiser, x_1, label, w, num_steps):
    """Runs DDIM from x_1, (n, 256).  Returns the list of all x_t, from x_1 to x_0."""
    steps = ddim(guided(denoiser, label, w), x_1, num_steps)
    return [x_1, *tqdm(steps, f"DDIM, w = {w:g}", num_steps, disable=None)]


def read(x_0, images, labels):
    """What digit it is, (n,): that of the nearest image; and whether it is legible, (n,).

    Legible: the nearest image is less than half as far as the nearest image of another digit.
    """
    distances = torch.cdist(x_0, images)
    nearest = torch.stack([distances[:, labels == k].amin(dim=1) for k in range(10)], dim=1)
    first, second = nearest.sort(dim=1).values[:, :2].T
    return nearest.argmin(dim=1), first < second / 2


def summary(x_0, twins, label, images, labels):
    """Shares of the samples, (n, 256), and the legible share of their twins: {what: share}."""
    digit, legible = read(x_0, images, labels)
    twin, twin_legible = read(twins, images, labels)
    shares = {
        "legible": legible,
        "as asked": digit == label,
        "as its twin": digit == twin,
        "twin legible": twin_legible,
    }
    return {what: which.double().mean().item() for what, which in shares.items()}


# ----------------------------------------- The figures ------------------------------------------
plt.style.use("default")  # the same figures whatever the reader's matplotlibrc says


def show_digits(ax, rows):
    """The first ten images of each row, white at -1, ink at 1.  rows: {name: (n, 256)}."""
    for k, (name, images) in enumerate(rows.items()):
        squares = images[:10].reshape(10, SIDE, SIDE)
        squares = nn.functional.pad(squares, (1, 1, 1, 1), value=-1)  # a margin
        strip = squares.transpose(0, 1).flatten(1).numpy()
        ink = "#0050a0" if name == "exact" else "black"
        cmap = LinearSegmentedColormap.from_list("ink", ["white", ink])
        place = (0, 10, k + 1, k)
        ax.imshow(strip, cmap, vmin=-1, vmax=1, extent=place, interpolation="nearest")
    ax.set(xticks=[], ylim=(len(rows), 0))
    ax.set_yticks([k + 0.5 for k in range(len(rows))], [*rows], fontsize=14)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)


def draw_digits(samples, twins, mean_image):
    """The first ten samples of each kind above their twins.  samples, twins: {name: (n, 256)}."""
    fig, axes = plt.subplots(3, 1, figsize=(7, 5), layout="constrained")
    for ax, name in zip(axes, samples):
        show_digits(ax, {"network": samples[name] + mean_image, "exact": twins[name] + mean_image})
        ax.set_title(name, fontsize=14)
    return fig


def draw_errors(errors):
    """errors: of measure."""
    fig, axes = plt.subplots(1, 2, figsize=(9, 4), layout="constrained", sharey=True)
    for (name, row), color in zip(errors.items(), ["#0050a0", "C1", "k", "#0050a0", "k"]):
        axes[int("new" in name)].plot(TIMES, row, "o-", color=color, label=name)
    for ax, title in zip(axes, ("Images that were learned", "New images")):
        ax.set(xscale="log", xlabel="$t$", ylim=(0, None), title=title)
        ax.legend(loc="upper center")
        ax.grid(alpha=0.3)
    axes[0].set_ylabel(r"error per pixel, in units of $c_\mathrm{out}^2$")
    return fig


def animate(paths, mean_image, sigma_q, num_frames=30):
    """Noise becomes digits, in frames about even in sigma_t; then as many of rest.

    paths: {name: [x_1, ..., x_0]}, each (n, 256).  Returns the animation.
    """
    fig, ax = plt.subplots(figsize=(7, 2.4), layout="constrained")
    num_steps = len(paths["DDIM"]) - 1

    def show(k):  # t = k dt
        sigma_t = sigma_q * (k / num_steps) ** 0.5
        ax.clear()
        even = 1 + sigma_t  # the same contrast in every frame
        show_digits(ax, {name: (x[-1 - k] + mean_image) / even for name, x in paths.items()})
        ax.set_title(rf"$\sigma_t$ = {sigma_t:.2f}", fontsize=14)

    frames = [round(share**2 * num_steps) for share in torch.linspace(1, 0, num_frames).tolist()]
    return FuncAnimation(fig, show, frames + [0] * num_frames)


# ------------------------------------------ Running it ------------------------------------------


def options(argv, **knobs):
    """The command line: num_steps=(default, least, largest, meaning) is --num-steps, and so on."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = partial(parser.add_argument, metavar="X")
    add("--figures-dir", type=Path, help="default: figures; with other options, a folder in it")
    for name, (default, least, largest, meaning) in knobs.items():
        text = f"{meaning}: {least:_} to {largest:_}, default {default:_}"
        add(f"--{name.replace('_', '-')}", type=type(default), default=default, help=text)
    args = parser.parse_args(argv)
    for name, (_, least, largest, _) in knobs.items():
        if not least <= (value := getattr(args, name)) <= largest:
            option = name.replace("_", "-")
            parser.error(f"argument --{option}: {value} is not from {least:_} to {largest:_}")
    tried = [f"{name}-{x}" for name, x in vars(args).items() if x != parser.get_default(name)]
    own = Path(__file__).parent / "figures" / "-".join(tried).replace("_", "-")
    args.figures_dir = args.figures_dir or own
    try:
        args.figures_dir.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=args.figures_dir).close()
    except OSError as error:
        parser.error(f"argument --figures-dir: {error}")
    return args


def main(argv=None):
    args = options(
        argv,
        num_steps=(100, 1, 250, "steps of a sampler, 1 / dt"),
        num_samples=(400, 10, 1000, "samples of each kind"),
        num_images=(3000, 60, 5000, "images to learn from"),
        sigma_q=(2.0, 0.5, 10.0, "std of the noise at t = 1, and of the base"),
        guidance=(2.0, 0.0, 10.0, "the weight w of the label when guided"),
        train_steps=(2200, 1, 10**6, "steps of the optimizer"),
        seed=(0, 0, 10**6, "seed of every draw"),
    )
    torch.set_num_threads(1)  # the same bytes on any number of cores, and hardly slower
    rng = torch.Generator().manual_seed(args.seed)
    sigma_q = args.sigma_q

    images, labels = digits(args.num_images, rng)
    mean_image = images.mean(dim=0)
    images = images - mean_image
    new = digits(args.num_images, rng)[0] - mean_image
    denoiser, _ = train(images, labels, sigma_q=sigma_q, train_steps=args.train_steps, rng=rng)

    exact = partial(exact_with_label, images=images, labels=labels, sigma_q=sigma_q)
    errors = measure(denoiser, exact, images, new, sigma_q, rng)

    x_1 = sigma_q * torch.randn(args.num_samples, SIDE**2, generator=rng)
    label = torch.arange(args.num_samples) % 10
    weights = {"without label": 0, "with label": 1, f"guided, w = {args.guidance:g}": args.guidance}
    samples, twins, table = {}, {}, {}
    for name, w in weights.items():
        path = sample(denoiser, x_1, label, w, args.num_steps)
        twin = sample(exact, x_1, label, w, args.num_steps)
        samples[name], twins[name] = path[-1], twin[-1]
        table[name] = summary(path[-1], twin[-1], label, images, labels)
    mean = guided(denoiser, label, args.guidance)  # as the last path
    noisy = [x_1, *ddpm(mean, x_1, args.num_steps, sigma_q, rng)]

    print(f"{'t':26}" + "".join(f"{t:8g}" for t in TIMES))
    for name, row in errors.items():
        print(f"{name:26}" + "".join(f"{error:8.3f}" for error in row))
    print(f"{'DDIM':26}" + "".join(f"{column:>15}" for column in table["with label"]))
    for name, row in table.items():
        print(f"{name:26}" + "".join(f"{share:15.1%}" for share in row.values()))

    for name, figure in {
        "digits": draw_digits(samples, twins, mean_image),
        "excess-vs-t": draw_errors(errors),
    }.items():
        figure.savefig(args.figures_dir / f"{name}.jpg", dpi=120)
    movie = animate({"DDIM": path, "exact": twin, "DDPM": noisy}, mean_image, sigma_q)
    movie.save(args.figures_dir / "digits.gif", writer=PillowWriter(fps=12), dpi=80)
    print(f"figures: {args.figures_dir}")


if __name__ == "__main__":
    main()
