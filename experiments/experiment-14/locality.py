"""Experiment 14: what a window makes of the training images, and a network that sees no more.

The claim
    What this convolutional network returns at a pixel depends on a window of x_t around it, the
    same way everywhere. Windows of several images fit together in many ways, if they are small: so
    what is drawn is new. And the best guess, L = E[pixel | window], draws nearly the same
    (Kamb & Ganguli, arXiv 2412.20292).

The truth beside it
    `local_denoiser`: the mean of the centers of all windows of all training images, weighted by
    p(window | window of x_t). For every f that sees no more, E|f - x_0|^2 = E|L - x_0|^2 +
    E|f - L|^2; the second is its excess. A sample's twin is what L makes of the same start. Beside
    both, the loss's minimiser, which sees the whole image: `exact_denoiser`.

What to look for in figures/
    samples.jpg       the network, its twin and the minimiser, from the same starts: which copies?
    excess-vs-t.jpg   left, what seeing a window costs; right, how much of L is learned
    windows.jpg       where L gets a stroke from: windows of which digits?

Try this
    python locality.py --window 3       less is seen: is the network nearer to its twin?
    python locality.py --window 13      more is seen, but never a whole image: are there copies?
    python locality.py --num-images 1   windows of one digit only: is it copied?
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


def add_noise(x_0, t, sigma_q, rng):
    """x_t = x_0 + N(0, sigma_q^2 t I).  x_0: (n, d);  t: a float or (n, 1).  Returns (n, d)."""
    return x_0 + sigma_q * t**0.5 * torch.randn(x_0.shape, generator=rng)


def faults():
    """What the script cannot do with the data, a line each, from a look at one image."""
    images = digits(1, torch.Generator())[0]
    side, lines = round(images.shape[1] ** 0.5), []
    if side**2 != images.shape[1] or side < 8:  # the largest window, 15, goes once around
        lines.append(f"images are squares of 8 x 8 or more, not of {images.shape[1]} pixels")
    if not 0 < images.std() < torch.inf:
        lines.append("images are finite, and not blank")
    return lines


def squares(images):
    """(n, d) to (n, side, side)."""
    return images.unflatten(-1, (round(images.shape[-1] ** 0.5), -1))


def windows(images, window):
    """The window around each pixel; edges are circular.  (n, d) to (n, d, window^2), by rows."""
    before, after = window // 2, (window - 1) // 2
    around = (before, after, before, after)
    padded = nn.functional.pad(squares(images)[:, None], around, mode="circular")
    return nn.functional.unfold(padded, window).transpose(1, 2)


# --------------------------------------- The reverse mean ---------------------------------------


def reverse_mean(x_t, t, dt, *, denoiser):
    """E[x_{t-dt} | x_t] from E[x_0 | x_t], eq. (24) of the tutorial.

    Exact for any dt: of the noise x_t - x_0, the last dt brought on average the share dt / t.
    x_t: (n, d), at time t;  0 < dt <= t <= 1;  denoiser(x_t, t) -> (n, d).  Returns (n, d).
    """
    return (dt / t) * denoiser(x_t, t) + (1 - dt / t) * x_t


# ----------------------------------------- The samplers -----------------------------------------
# They know nothing of the data but the function that they are given: reverse_mean(x_t, t, dt).


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
MIN_T = 1 / 1600  # the smallest t that is learned


class Denoiser(nn.Module):
    """A convolutional network that learns E[pixel | window].

    A circular convolution of the window's size, then blocks of 1 x 1: at every pixel the same plain
    network of the window^2 numbers seen there. Preconditioned as in experiment 3.
    """

    def __init__(self, images, window, sigma_q, width=64, num_blocks=3):
        super().__init__()
        self.window, self.sigma_q, self.variance = window, sigma_q, images.square().mean()
        self.first = nn.Linear(window**2 + 1, width)  # the window, and t
        self.blocks = nn.ModuleList()
        for _ in range(num_blocks):
            block = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
            self.blocks.append(block)
        self.last = nn.Sequential(nn.ReLU(), nn.Linear(width, 1))

    def c_out(self, t):
        """The error of the best linear guess of a pixel from that pixel of x_t."""
        return (1 / self.variance + 1 / (self.sigma_q**2 * t)) ** -0.5

    def pixel(self, seen, t):
        """E[pixel | window], learned.  seen: (m, window^2);  t: a float or (m, 1).  (m, 1)"""
        noise = self.sigma_q**2 * torch.as_tensor(t).expand(len(seen), 1)  # its variance
        h = self.first(torch.cat([seen / (self.variance + noise).sqrt(), noise.log() / 4], dim=1))
        for block in self.blocks:
            h = h + block(h)
        center = seen[:, self.window // 2 * (self.window + 1)][:, None]
        return self.variance / (self.variance + noise) * center + self.c_out(t) * self.last(h)

    def forward(self, x_t, t):
        """x_t: (n, d);  t: a float.  Returns (n, d)."""
        return self.pixel(windows(x_t, self.window).flatten(0, 1), t).view(x_t.shape)


def train(images, *, window, sigma_q, train_steps, rng, batch_size=2048, learning_rate=0.006):
    """Pseudocode 6, with sigma_t uniform and the error in units of c_out.

    It sees windows only, so it learns from windows, drawn at random from the images, (N, d), each
    with its own t and noise.  Returns the trained Denoiser.
    """
    # nn.Linear draws its weights from torch's own generator: its seed is drawn from ours.
    torch.manual_seed(torch.randint(2**60, (), generator=rng).item())
    denoiser = Denoiser(images, window, sigma_q)
    optimizer = torch.optim.Adam(denoiser.parameters(), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, train_steps)
    known, centers = windows(images, window).flatten(0, 1), images.view(-1, 1)
    for _ in tqdm(range(train_steps), "training", disable=None):
        batch = torch.randint(len(known), (batch_size,), generator=rng)
        t = (MIN_T**0.5 + (1 - MIN_T**0.5) * torch.rand(batch_size, 1, generator=rng)) ** 2
        seen = add_noise(known[batch], t, sigma_q, rng)
        error = (denoiser.pixel(seen, t) - centers[batch]) / denoiser.c_out(t)
        optimizer.zero_grad()
        error.square().mean().backward()
        optimizer.step()
        schedule.step()
    return denoiser.requires_grad_(False)


# ------------------------------------------ The truth -------------------------------------------


def window_posterior(seen, known, sigma_t):
    """p(window of an image | window of x_t), Bayes' rule: experiment 2 in window^2 dimensions.

    seen: (m, window^2), of x_t;  known: (M, window^2), all as likely.  Returns (m, M).
    """
    logits = (seen @ known.T - known.square().sum(dim=1) / 2) / sigma_t**2
    return logits.softmax(dim=1)


def local_denoiser(x_t, t, *, images, window, sigma_q):
    """L(x_t) = E[pixel | window]: the mean of the centers of all windows of all images.

    x_t: (n, d);  t: a float;  images: (N, d).  Returns (n, d).
    """
    known, centers = windows(images, window).flatten(0, 1), images.flatten()
    posterior = partial(window_posterior, known=known, sigma_t=sigma_q * t**0.5)
    return torch.stack([posterior(seen) @ centers for seen in windows(x_t, window)])


def best_filter(x_t, t, *, images, window, sigma_q):
    """The best guess of a pixel that is linear in the window, Wiener's.  As local_denoiser."""
    known = windows(images, window).flatten(0, 1)
    covariance = known.T @ known / len(known) + sigma_q**2 * t * torch.eye(window**2)
    weights = torch.linalg.solve(covariance, known.T @ images.flatten() / len(known))
    return windows(x_t, window) @ weights


def exact_denoiser(x_t, t, *, images, sigma_q):
    """E[x_0 | x_t]: the mean of the images, weighted by p(image | x_t), Bayes' rule (experiment 2).

    x_t: (n, d);  t: a float;  images: (N, d), all as likely.  Returns (n, d).
    """
    sigma_t = sigma_q * t**0.5
    posterior = (-((torch.cdist(x_t, images) / sigma_t) ** 2) / 2).softmax(dim=1)
    return posterior @ images


# ------------------------------------------ Measuring -------------------------------------------
TIMES = [1.0, 0.64, 0.36, 0.16, 0.04, 0.01]  # of those that 100 steps visit, down to the last
NUM_DRAWS = 40  # of x_t, at each of TIMES


def measure(denoiser, local, linear, exact, images, rng):
    """Means over images, pixels and noise at each of TIMES, errors in units of c_out^2.

    denoiser: the network;  local: L;  linear: the best filter;  exact: the minimiser.
    Returns {name: a list}.
    """
    found, mean_square = {}, nn.functional.mse_loss
    x_0 = images[torch.arange(NUM_DRAWS) % len(images)]
    for t in TIMES:
        x_t = add_noise(x_0, t, denoiser.sigma_q, rng)
        best, unit = local(x_t, t), denoiser.c_out(t) ** 2
        excess = {f: mean_square(f(x_t, t), best) for f in (denoiser, linear)}
        for name, value in {
            "minimiser's error": mean_square(exact(x_t, t), x_0) / unit,
            "least error for a window (L's)": mean_square(best, x_0) / unit,
            "excess, best filter": excess[linear] / unit,
            "excess, network": excess[denoiser] / unit,
            "learned beyond the filter": 1 - excess[denoiser] / excess[linear],
        }.items():
            found.setdefault(name, []).append(value.item())
    return found


def paths(denoisers, x_1, num_steps):
    """Runs DDIM from x_1, (n, d), with each of denoisers.  Returns {name: [x_1, ..., x_0]}."""
    found = {}
    for name, denoiser in denoisers.items():
        steps = ddim(partial(reverse_mean, denoiser=denoiser), x_1, num_steps)
        found[name] = [x_1, *tqdm(steps, name, num_steps, disable=None)]
    return found


def likeness(x, y):
    """The squared correlation of images, over their pixels.  x, y: (n, d).  Returns (n,)."""
    x, y = (z - z.mean(dim=1, keepdim=True) for z in (x, y))
    return nn.functional.cosine_similarity(x, y).square()


def nearest(x_0, images):
    """The distance to the nearest training image, wherever it is shifted.  (n, d) to (n,)."""
    side = round(images.shape[1] ** 0.5)
    return torch.cdist(x_0, windows(images, side).flatten(0, 1)).amin(dim=1)


def report(samples, images):
    """Rows for table; medians over samples.  samples: of paths.

    A copy is nearer to a training image than a third of what a blank is.
    """
    rows = [["DDIM", "corr^2 with the network's", "to nearest training image", "copies"]]
    copy = images.norm(dim=1).mean() / 3
    for name, path in samples.items():
        distance = nearest(path[-1], images)
        same = likeness(path[-1], samples["network"][-1]).median()
        copies = (distance < copy).double().mean()
        rows.append([name, f"{same:.3f}", f"{distance.median():.2f}", f"{copies:.0%}"])
    return rows


# ----------------------------------------- The figures ------------------------------------------
plt.style.use("default")  # the same figures whatever the reader's matplotlibrc says
BLUE, PINK = "#0072B2", "#CC79A7"


def show(ax, images, color):
    """An image, (d,), or several side by side, (k, d), white at -1, full colour at 1."""
    strip = squares(images.view(-1, images.shape[-1])).transpose(0, 1).flatten(1).numpy()
    ink = LinearSegmentedColormap.from_list("", ["w", color])
    ax.imshow(strip, ink, vmin=-1, vmax=1, interpolation="nearest")
    ax.set(xticks=[], yticks=[])


def draw_samples(samples, mean):
    """Ten starts side by side, a row for each denoiser.  samples: of paths."""
    fig, axes = plt.subplots(3, 1, figsize=(10, 3.6), layout="constrained")
    for ax, (name, path) in zip(axes, samples.items()):
        x_0 = path[-1][:10] + mean
        show(ax, x_0, BLUE if name == "network" else "k")
        side = len(squares(x_0)[0])
        ax.vlines(side * np.arange(1, len(x_0)) - 0.5, -0.5, side - 0.5, color="0.7", lw=1)
        ax.set_ylabel(name, fontsize=14)
    return fig


def draw_errors(found):
    """found: of measure."""
    fig, (left, right) = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    least = np.array(found["least error for a window (L's)"])
    left.plot(TIMES, least + found["excess, best filter"], "o-", color=PINK, label="best filter")
    left.plot(TIMES, least, "ko-", lw=3, label="$L$, the least for a window")
    left.plot(TIMES, least + found["excess, network"], "o-", color=BLUE, label="network")
    left.plot(TIMES, found["minimiser's error"], "o--", color="0.5", label="minimiser")
    left.set(title="Error: $E|f - x_0|^2$", ylabel=r"per pixel, in units of $c_\mathrm{out}^2$")
    right.plot(TIMES, found["learned beyond the filter"], "o-", color=BLUE)
    right.axhline(1, color="k", lw=1)
    right.set(title="Of what the best filter misses of $L$,\nthe share that the network learned")
    right.set(ylim=(min(0, *found["learned beyond the filter"]), 1.05))
    for ax in (left, right):
        ax.set(xscale="log", xlabel="$t$", xlim=(1.3, 0.8 * TIMES[-1]))
        ax.grid(alpha=0.3)
    fig.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return fig


def show_window(ax, image, place, window):
    """An image, (d,), with a frame around the window of that pixel."""
    show(ax, image, "k")
    down, right = divmod(place, len(squares(image)))
    corner = (right - window // 2 - 0.5, down - window // 2 - 0.5)
    ax.add_patch(plt.Rectangle(corner, window, window, fill=False, color=PINK, lw=2))


def draw_windows(path, mean, *, images, window, sigma_q):
    """At two noise levels, the first x_t of path, a window, and those that weigh most."""
    num_steps, known = len(path) - 1, windows(images, window).flatten(0, 1)
    place = windows(path[-1][:1], window).sum(dim=2).argmax().item()  # where there is most ink
    num_pixels, side = images.shape[1], len(squares(images)[0])
    fig, axes = plt.subplots(2, 5, figsize=(9, 4.2), layout="constrained")
    for row, t in zip(axes, (0.16, 0.04)):
        k = max(1, round(t * num_steps))  # t = k dt
        sigma_t, x_t = sigma_q * (k / num_steps) ** 0.5, path[num_steps - k][:1]
        middle = side // 2 * (side + 1)  # x_t is shifted: the window is there
        show_window(row[0], windows(x_t, side)[0, place] + mean, middle, window)
        row[0].set_title(rf"$x_t$, $\sigma_t$ = {sigma_t:.2g}")
        posterior = window_posterior(windows(x_t, window)[0, [place]], known, sigma_t)[0]
        for ax, weight, index in zip(row[1:], *(x.tolist() for x in posterior.topk(4))):
            image, pixel = divmod(index, num_pixels)
            show_window(ax, images[image] + mean, pixel, window)
            ax.set_title(f"weight {weight:.1%}")
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
        num_steps=(100, 1, 1600, "steps of the sampler, 1 / dt"),
        num_samples=(30, 1, 1000, "samples of each denoiser"),
        num_images=(10, 1, 300, "images to learn from"),
        window=(5, 1, 15, "pixels on a side of what the network sees"),
        sigma_q=(4.0, 0.5, 20.0, "std of the noise at t = 1, and of the base"),
        train_steps=(4000, 1, 10**6, "steps of the optimizer"),
        seed=(0, 0, 10**6, "seed of every draw"),
    )
    torch.set_num_threads(1)  # the same bytes on any number of cores, and hardly slower
    rng = torch.Generator().manual_seed(args.seed)

    images, _ = digits(args.num_images, rng)
    mean = images.mean()  # one number: the network does not know where a pixel is
    images = images - mean
    view = {"images": images, "window": args.window, "sigma_q": args.sigma_q}
    denoiser = train(**view, train_steps=args.train_steps, rng=rng)
    local = partial(local_denoiser, **view)
    exact = partial(exact_denoiser, images=images, sigma_q=args.sigma_q)

    found = measure(denoiser, local, partial(best_filter, **view), exact, images, rng)
    x_1 = args.sigma_q * torch.randn(args.num_samples, images.shape[1], generator=rng)
    denoisers = {"network": denoiser, "its twin": local, "minimiser": exact}
    samples = paths(denoisers, x_1, args.num_steps)

    for name, figure in {
        "samples": draw_samples(samples, mean),
        "excess-vs-t": draw_errors(found),
        "windows": draw_windows(samples["its twin"], mean, **view),
    }.items():
        figure.savefig(args.figures_dir / f"{name}.jpg", dpi=120)
    rows = [[name, *(f"{value:.3f}" for value in row)] for name, row in found.items()]
    table([["t", *(f"{t:.2g}" for t in TIMES)], *rows])
    table(report(samples, images))
    print(f"figures: {args.figures_dir}")


if __name__ == "__main__":
    main()
