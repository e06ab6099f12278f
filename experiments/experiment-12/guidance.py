"""Experiment 12: guided samplers do not sample the tilted density.  Beyond the tutorial.

The claim
    To draw a class c more clearly than the data shows it, classifier-free guidance (Ho & Salimans
    2022, arXiv 2207.12598) puts, in place of the denoiser D(x), into DDPM or DDIM
        D_w = D + w (D(.|c) - D),
    so w = 0 is all the data and w = 1 the class. (They write (1 + w) D(.|c) - w D: their w is ours
    minus 1.) It is often said that this samples the tilted density p_0(x) p(c|x)^w. For w > 1 it
    does not. How far off are DDPM and DDIM, and in which direction?

The truth beside it
    At each noise level (D_w - x) / sigma^2 is the score of p_t(x) p_t(c|x)^w. But this is not what
    the tilted density becomes under noise, so DDPM and DDIM do not run through these densities.
    If data and class are N(0, S_U) and N(0, S_C), the variances are known, with r = S_U / S_C:
        tilted    S_U / (1 + (r - 1) w)
        DDPM      S_U / (r - 1) (1 - r^(1 - 2 w)) / (2 w - 1)
        DDIM      S_U r^-w
    This example, its laws and the repair are those of Bradley & Nakkiran (2024, arXiv 2408.09000,
    section 3.1). The repair: steps of Langevin dynamics at each level, on the density wanted. For
    classes in the plane the tilted density is known on a grid.

What to look for in figures/
    tilted.jpg          classes in the plane: which sampler stays with the tilted density?
    variance-vs-w.jpg   two Gaussians: the three laws, and samples

Try this
    python guidance.py --num-steps 50      are two Langevin steps at only 50 levels enough?
    python guidance.py --num-langevin 0    no repair: which two samplers are one?
    python guidance.py --sigma-q 5         a base that is not p_1: who remembers it, who forgets?
    python guidance.py --std 0.2           classes far apart: is there anything to tilt?
"""

import os
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from functools import partial
from itertools import zip_longest
from pathlib import Path

os.environ["MPLBACKEND"] = "agg"  # figures are files, also from a notebook

import matplotlib.pyplot as plt
import numpy as np
from tqdm import tqdm

# ------------------------------------------- The data -------------------------------------------
# On a line: N(0, S_U), unconditional, and its class N(0, S_C); S_U and S_C are variances.
# In the plane: Gaussians of one std, a class each. WEIGHTS are their shares; c is the first.
S_U, S_C = 2.0, 1.0
ANGLES = np.pi * (1 / 2 + 2 * np.arange(3) / 3)
CENTERS = np.stack([np.cos(ANGLES), np.sin(ANGLES)], axis=1)
WEIGHTS = np.full(3, 1 / 3)


def faults():
    """What this script cannot do with the data above, a line each."""
    if not 0 < S_C < S_U:
        yield "S_C is the variance of a part of the data: 0 < S_C < S_U"
    if np.ndim(CENTERS) != 2 or np.shape(CENTERS)[1] != 2 or len(CENTERS) < 2:
        yield "CENTERS are two classes or more in the plane: (k, 2)"
    elif not np.isfinite(CENTERS).all():
        yield "CENTERS: one of them is not finite"
    elif not (
        np.shape(WEIGHTS) == (len(CENTERS),) and min(WEIGHTS) > 0 and abs(sum(WEIGHTS) - 1) < 1e-9
    ):
        yield "WEIGHTS are positive, one for each of CENTERS, and their sum is 1"
    elif np.allclose(CENTERS[0], WEIGHTS @ CENTERS):
        yield "the first of CENTERS is the mean of the data: away from what should guidance push?"


def class_logits(x, variance):
    """log p(class, x) when x is one of CENTERS plus N(0, variance I).  x: (n, 2).  Returns (k, n).

    That is log weight - |x - center|^2 / (2 variance), but for |x|^2, alike for all classes.
    """
    heights = np.log(WEIGHTS) - (CENTERS**2).sum(axis=1) / (2 * variance)
    return CENTERS / variance @ x.T + heights[:, None]


def class_posterior(x, variance):
    """Bayes' rule: p(class | x).  x: (n, 2), as above.  Returns (n, k)."""
    logits = class_logits(x, variance)
    odds = np.exp(logits - logits.max(axis=0))
    return (odds / odds.sum(axis=0)).T


# ----------------------------------------- The denoiser -----------------------------------------
# As in experiment 8 a denoiser is a function of x = x_0 + N(0, sigma^2 I) and sigma, the sigma_t of
# the tutorial.


def gaussian_denoiser(x, sigma, *, center, variance):
    """E[x_0 | x] for x_0 ~ N(center, variance I).  x: any shape.  Returns that shape."""
    share = variance / (variance + sigma**2)
    return share * x + (1 - share) * center


def mixture_denoiser(x, sigma, *, std):
    """E[x_0 | x] for all classes: that of one, at the mean of the centers.  x: (n, 2)."""
    center = class_posterior(x, std**2 + sigma**2) @ CENTERS
    return gaussian_denoiser(x, sigma, center=center, variance=std**2)


def guided(x, sigma, *, data, of_class, w):
    """D_w = D + w (D(.|c) - D).  data, of_class: the denoisers D and D(.|c).  The shape of x."""
    return (1 - w) * data(x, sigma) + w * of_class(x, sigma)


# What `sample` needs of an example: D, D(.|c), and the variance of the class.
ON_LINE = {
    "data": partial(gaussian_denoiser, center=0, variance=S_U),
    "of_class": partial(gaussian_denoiser, center=0, variance=S_C),
    "variance": S_C,
}


def in_plane(std):
    """As ON_LINE, of the first of the classes."""
    data = partial(mixture_denoiser, std=std)
    of_class = partial(gaussian_denoiser, center=CENTERS[0], variance=std**2)
    return {"data": data, "of_class": of_class, "variance": std**2}


# ----------------------------------------- The samplers -----------------------------------------
# They know the denoiser, D(x, sigma), and a grid of noise levels: sigma_q = sigmas[0] > ... > 0.
# Each yields one array a step. A step goes from sigma to next_sigma.


def ddim(denoiser, x, sigmas):
    """Algorithm 2 of the tutorial on any grid: Euler's method.  One evaluation a step.

    lam (E[x_{t-dt} | x_t] - x_t), with eq. (24) put in, is (next_sigma - sigma) (x - D) / sigma.
    """
    for sigma, next_sigma in zip(sigmas, sigmas[1:]):
        slope = (x - denoiser(x, sigma)) / sigma
        x = x + (next_sigma - sigma) * slope
        yield x


def ddpm_step(denoiser, x, sigma, next_sigma, rng):
    """A step of Algorithm 1 of the tutorial: the reverse mean, and N(0, sigma_q^2 dt I).

    In eq. (24) dt / t is 1 - (next_sigma / sigma)^2, and sigma_q^2 dt is sigma^2 - next_sigma^2.
    """
    reverse_mean = x + (1 - (next_sigma / sigma) ** 2) * (denoiser(x, sigma) - x)
    return reverse_mean + (sigma**2 - next_sigma**2) ** 0.5 * rng.standard_normal(x.shape)


def ddpm(denoiser, x, sigmas, rng):
    """Algorithm 1 on any grid."""
    for sigma, next_sigma in zip(sigmas, sigmas[1:]):
        x = ddpm_step(denoiser, x, sigma, next_sigma, rng)
        yield x


def langevin(denoiser, x, sigma, step, rng):
    """One step of Langevin dynamics: x + step / 2 score + N(0, step I).

    Small steps leave the density with that score as it is. The score is (D - x) / sigma^2.
    """
    score = (denoiser(x, sigma) - x) / sigma**2
    return x + step / 2 * score + step**0.5 * rng.standard_normal(x.shape)


def ddpm_langevin(denoiser, x, sigmas, rng, *, num_langevin, variance):
    """DDPM, with Langevin steps before each of its own.  variance: the class's, for their size."""
    for sigma, next_sigma in zip(sigmas, sigmas[1:]):
        for _ in range(num_langevin):
            x = langevin(denoiser, x, sigma, (variance + sigma**2) / 50, rng)
        x = ddpm_step(denoiser, x, sigma, next_sigma, rng)
        yield x


# The last of 1000 even steps of t would leap from sigma_q / 30 to 0. And sigma_q has to be large:
# the base is not p_1, and guided DDIM remembers where it starts.


def log_uniform(n, sigma_min, sigma_max):
    """Steps of equal ratio: uniform in log sigma, then 0.  Returns (n + 1,)."""
    return np.append(np.geomspace(sigma_max, sigma_min, n), 0)


# ------------------------------------------ The truth -------------------------------------------


# On a line, x - D_w = s G x with s = sigma^2 and G = (1 - w) / (S_U + s) + w / (S_C + s). So a step
# from s to s - ds multiplies x by 1 - G ds / 2 (DDIM), or by 1 - G ds and adds N(0, ds) (DDPM): an
# equation for its variance v. The laws are the limits of small steps and large sigma_q.


def tilted_variance(w):
    """Of p_0(x) p(c|x)^w, in proportion to p_0(x)^(1 - w) p(x|c)^w: precisions add."""
    return S_U / (1 + (S_U / S_C - 1) * w)


def ddpm_variance(w):
    """What guided DDPM returns, w > 1/2: dv/ds = 2 v G - 1, an elementary integral."""
    r = S_U / S_C
    return S_U / (r - 1) * (1 - r ** (1 - 2 * w)) / (2 * w - 1)


def ddim_variance(w):
    """What guided DDIM returns: dv/ds = v G."""
    return S_U * (S_U / S_C) ** -w


def tilted(w, std, side=201):
    """p_0(x) p(c|x)^w for the classes, w >= 1, on a grid: points (n, 2), probabilities (n,).

    It is p(x|c) p(c|x)^(w - 1). The second factor is log-concave, too: so there is one mode, at
    most w - 1 times as far from the center of c as the farthest center is, and no direction is
    wider than the class. The grid closes in on the mode, and ends six stds from it.
    """
    unit = np.linspace(-1, 1, side)
    unit = np.stack(np.meshgrid(unit, unit), axis=-1).reshape(-1, 2)
    farthest = np.linalg.norm(CENTERS - CENTERS[0], axis=1).max()
    mode = CENTERS[0]
    for half_width in np.geomspace((w - 1) * farthest + 6 * std, 6 * std, 5):
        points = mode + half_width * unit
        logits = class_logits(points, std**2)
        log_posterior = logits[0] - np.logaddexp.reduce(logits)
        log_p = (w - 1) * log_posterior - ((points - CENTERS[0]) ** 2).sum(axis=1) / (2 * std**2)
        mode = points[log_p.argmax()]
    p = np.exp(log_p - log_p.max())
    return points, p / p.sum()


# ------------------------------------------ Measuring -------------------------------------------
LAWS = {"DDIM": ddim_variance, "DDPM": ddpm_variance, "DDPM + Langevin": tilted_variance}


def sample(x, w, sigmas, rng, *, data, of_class, variance, num_langevin):
    """Runs the three samplers from x, guided with w.  Returns {sampler: x_0, the shape of x}."""
    denoiser = partial(guided, data=data, of_class=of_class, w=w)
    repair = {"num_langevin": num_langevin, "variance": variance}
    runs = {
        "DDIM": ddim(denoiser, x, sigmas),
        "DDPM": ddpm(denoiser, x, sigmas, rng),
        "DDPM + Langevin": ddpm_langevin(denoiser, x, sigmas, rng, **repair),
    }
    samples = {}
    for name, steps in runs.items():
        for x_0 in tqdm(steps, f"{name}, w = {w}", len(sigmas) - 1, disable=None):
            pass
        samples[name] = x_0
    return samples


def estimate(values):
    """The mean of values, (n,), and its standard error."""
    return values.mean(), values.std() / len(values) ** 0.5


def along_axis(x):
    """The place of x, (n, 2), on the axis of the class: 0 at the data's mean, 1 at its center."""
    mean = WEIGHTS @ CENTERS
    axis = CENTERS[0] - mean
    return (x - mean) @ axis / (axis @ axis)


def from_point(x, point):
    """Squared distances of x, (n, 2), to a point: to their mean, the total variance is theirs."""
    return ((x - point) ** 2).sum(axis=1)


# ----------------------------------------- The figures ------------------------------------------
plt.style.use("default")  # the same figures whatever the reader's matplotlibrc says
BLUE, ORANGE, PINK = "#0072B2", "#E69F00", "#CC79A7"
COLORS = {"tilted": "0.2", "DDIM": ORANGE, "DDPM": BLUE, "DDPM + Langevin": PINK}


def draw_variances(variances):
    """The laws as lines, samples as marks.  variances: {w: {sampler: (variance, s.e.)}}."""
    fig, ax = plt.subplots(figsize=(7, 4.8), layout="constrained")
    w = np.linspace(min(variances), max(variances), 200)
    ax.semilogy(w, tilted_variance(w), color=COLORS["tilted"], label="tilted, exact")
    ax.semilogy(w, ddpm_variance(w), color=COLORS["DDPM"], label="DDPM, exact")
    ax.semilogy(w, ddim_variance(w), color=COLORS["DDIM"], label="DDIM, exact")
    for name in LAWS:
        marks, errors = np.transpose([measured[name] for measured in variances.values()])
        style = {"color": COLORS[name], "capsize": 4, "ms": 5, "label": f"{name}, sampled"}
        ax.errorbar([*variances], marks, 5 * errors, fmt="o", **style)
    ax.set(xlabel="guidance $w$", ylabel="variance of $x_0$")
    ax.set_title(f"Data N(0, {S_U:g}), class N(0, {S_C:g}); bars: five standard errors")
    ax.grid(alpha=0.3)
    ax.legend(loc="lower left")
    return fig


def draw_samples(samples, truths, std):
    """Rows of w, columns of samplers.  samples: {w: {name: (n, 2)}};  truths: {w: of tilted}."""
    fig, axes = plt.subplots(2, 4, figsize=(10, 6.6), layout="constrained")
    circle = 2 * std * np.exp(1j * np.linspace(0, 2 * np.pi, 100))
    points = [x_0[:2000] for columns in samples.values() for x_0 in columns.values()]
    points = np.concatenate([*points, CENTERS - 2.2 * std, CENTERS + 2.2 * std])
    (left, bottom), (right, top) = points.min(axis=0), points.max(axis=0)
    across = (CENTERS[0] - WEIGHTS @ CENTERS) @ [[0, 1], [-1, 0]]
    for row, (w, columns) in zip(axes, samples.items()):
        points, p = truths[w]
        for ax, (name, x_0) in zip(row, columns.items()):
            ax.plot(*x_0[:2000].T, ".", color=COLORS[name], ms=2.5, mew=0)
            for k, (x, y) in enumerate(CENTERS):
                ax.plot(x + circle.real, y + circle.imag, "k", lw=0.7 if k else 1.8)
            ax.axline(p @ points, p @ points + across, color="k", ls=":", lw=1)
            ax.set_title(f"{name}, $w$ = {w}")
            ax.set(xlim=(left, right), ylim=(bottom, top), aspect="equal", xticks=[], yticks=[])
    fig.suptitle(
        f"{len(CENTERS)} classes, guided to the thick one "
        "(circles: two stds; dotted: mean of the tilted density)"
    )
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


def variance_rows(variances):
    """A row for each w: samplers, each beside its law."""
    rows = [["", "DDIM", "law", "DDPM", "law", "DDPM + Langevin", "tilted"]]
    for w, measured in variances.items():
        pairs = [(measured[name][0], law(w)) for name, law in LAWS.items()]
        rows.append([f"w = {w}", *(f"{number:.4f}" for pair in pairs for number in pair)])
    return rows


def class_rows(samples, truths):
    """A row for each sampler: means on the axis and total variances, for each w."""
    rows = [["", *(f"mean, w = {w}" for w in samples), *(f"variance, w = {w}" for w in samples)]]
    means = [p @ along_axis(points) for points, p in truths.values()]
    variances = [p @ from_point(points, p @ points) for points, p in truths.values()]
    rows.append(["tilted, exact", *(f"{x:.3f}" for x in means + variances)])
    for name in LAWS:
        x_0s = [columns[name] for columns in samples.values()]
        means = [estimate(along_axis(x_0)) for x_0 in x_0s]
        variances = [estimate(from_point(x_0, x_0.mean(axis=0))) for x_0 in x_0s]
        rows.append([name, *(f"{x:.3f} +- {error:.3f}" for x, error in means + variances)])
    return rows


def main(argv=None):
    args = options(
        argv,
        *faults(),
        num_steps=(1000, 1, 10_000, "steps of a sampler, even in log sigma"),
        num_samples=(4000, 1, 10**6, "samples of each sampler"),
        num_langevin=(2, 0, 100, "Langevin steps before each step of DDPM"),
        std=(0.5, 0.1, 1.0, "std of each class in the plane"),
        sigma_q=(100.0, 5.0, 1000.0, "std of the noise at t = 1, and of the base"),
        seed=(0, 0, 10**6, "seed of every draw"),
    )
    rng = np.random.default_rng(args.seed)
    sigmas = log_uniform(args.num_steps, 0.01, args.sigma_q)
    run = partial(sample, sigmas=sigmas, rng=rng, num_langevin=args.num_langevin)

    x_1 = args.sigma_q * rng.standard_normal(args.num_samples)
    variances = {}
    for w in (1, 2, 4, 8):
        samples = run(x_1, w, **ON_LINE)
        variances[w] = {name: estimate(x_0**2) for name, x_0 in samples.items()}

    x_1 = args.sigma_q * rng.standard_normal((args.num_samples, 2))
    truths = {w: tilted(w, args.std) for w in (2, 8)}
    classes = {}
    for w, (points, p) in truths.items():
        drawn = points[rng.choice(len(points), args.num_samples, p=p)]
        classes[w] = {"tilted": drawn, **run(x_1, w, **in_plane(args.std))}

    for name, figure in {
        "tilted": draw_samples(classes, truths, args.std),
        "variance-vs-w": draw_variances(variances),
    }.items():
        figure.savefig(args.figures_dir / f"{name}.jpg", dpi=120)
    print(f"two Gaussians: variance of x_0 (+- {(2 / args.num_samples) ** 0.5:.0%}), and its law")
    table(variance_rows(variances))
    print(f"{len(CENTERS)} classes: mean of x_0 on the axis of the first, and total variance")
    table(class_rows(classes, truths))
    print(f"figures: {args.figures_dir}")


if __name__ == "__main__":
    main()
