"""Experiment 9: the reverse step is nearly Gaussian, if it is small; what counts is its mean.

The claim
    Given x_t, the earlier x_{t-dt} is nearly N(E[x_{t-dt} | x_t], sigma^2), sigma^2 = sigma_q^2 dt
    (Fact 1 of the tutorial). That is why DDPM adds Gaussian noise, why its steps must be small,
    and why only a mean has to be learned. With F = log p_{t-dt} and its derivatives at x_t, the
    KL divergence of the two, for small sigma, is
        sigma^2 F'^2 / 2      if the mean is taken as x_t
        sigma^4 F''^2 / 4     if the mean is right
        sigma^6 F'''^2 / 12   if the variance is right, too

The truth beside it
    The data is two Gaussians, so every p_t is known, and p(x_{t-dt} | x_t) is Bayes' rule, summed
    on a grid. For steps of any size, averaged over p_t, its KL divergence to N(m, sigma^2) is
        H(p_t) - H(p_{t-dt})                      for m = x_t
        H(p_t) - H(p_{t-dt}) - sigma^2 J(t) / 2   for m = E[x_{t-dt} | x_t]
    with the entropy H and the Fisher information J(t) = E[score^2]. So with mean x_t the sum over
    a run is H(p_1) - H(p_0), however many steps are taken; with the right mean it falls as dt, if
    dt is small. That sum, plus KL(p_1 || base), bounds KL(p_0 || what DDPM returns).

What to look for in figures/
    reverse-step.jpg   two modes, one Gaussian: bad until the step is far smaller than their gap
    kl-vs-sigma.jpg    dots by Bayes' rule: slopes 2, 4, 6; the first two lie on the identities
    kl-vs-steps.jpg    more steps do nothing for mean x_t; what DDPM returns

Try this
    python nearly_gaussian.py --num-steps 1     one giant step: a blur, twice too wide
    python nearly_gaussian.py --sigma-0 0.15    half the width: how many steps does it need?
    python nearly_gaussian.py --sigma-q 4       a better base, at the price of more steps
"""

import os
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile

os.environ["MPLBACKEND"] = "agg"  # figures are files, also from a notebook

import matplotlib.pyplot as plt
import numpy as np
from tqdm import tqdm

# ------------------------------------------- The data -------------------------------------------
# x_0 is one of two centers, plus N(0, sigma_0^2). So x_t is a center, plus a wider Gaussian.
WEIGHTS, CENTERS = np.array([0.6, 0.4]), np.array([-1.0, 1.0])


def mixture(n, rng, *, sigma_0):
    """n draws of x_0, (n,).  rng: a NumPy Generator."""
    return rng.choice(CENTERS, size=n, p=WEIGHTS) + sigma_0 * rng.standard_normal(n)


def log_joint(x, t, *, sigma_0, sigma_q):
    """log of p(center) p(x_t = x | center), for each center.  x: any shape.  Returns (..., 2)."""
    variance = sigma_0**2 + sigma_q**2 * t
    squares = np.subtract.outer(x, CENTERS) ** 2
    return np.log(WEIGHTS) - squares / (2 * variance) - np.log(2 * np.pi * variance) / 2


def log_density(x, t, *, sigma_0, sigma_q):
    """log p_t(x), 0 <= t <= 1.  x: any shape.  Returns that shape."""
    return np.logaddexp.reduce(log_joint(x, t, sigma_0=sigma_0, sigma_q=sigma_q), axis=-1)


# --------------------------------------- The reverse mean ---------------------------------------


def center_posterior(x, t, *, sigma_0, sigma_q):
    """p(center | x_t = x), for each center.  x: any shape.  Returns (..., 2)."""
    joint = log_joint(x, t, sigma_0=sigma_0, sigma_q=sigma_q)
    return np.exp(joint - np.logaddexp.reduce(joint, axis=-1, keepdims=True))


def score(x, t, *, sigma_0, sigma_q):
    """d/dx log p_t(x): the way to the mean center, over the variance.  x: any shape."""
    mean_center = center_posterior(x, t, sigma_0=sigma_0, sigma_q=sigma_q) @ CENTERS
    return (mean_center - x) / (sigma_0**2 + sigma_q**2 * t)


def reverse_mean(x_t, t, dt, *, sigma_0, sigma_q):
    """E[x_{t-dt} | x_t] from the score of p_t (Tweedie), exact for any dt.

    x_t: any shape, at time t;  0 < dt <= t <= 1.  Returns the shape of x_t.
    """
    return x_t + sigma_q**2 * dt * score(x_t, t, sigma_0=sigma_0, sigma_q=sigma_q)


# ----------------------------------------- The samplers -----------------------------------------


def ddpm(reverse_mean, x_1, num_steps, sigma_q, rng):
    """Algorithm 1 (DDPM): x_{t-dt} = E[x_{t-dt} | x_t] + N(0, sigma_q^2 dt).

    x_1: draws of the base;  num_steps = 1 / dt.  Yields x_{t-dt} after every step, the last is x_0.
    """
    x_t, dt = x_1, 1 / num_steps
    for k in range(num_steps, 0, -1):  # t = k dt
        noise = rng.standard_normal(x_t.shape)
        x_t = reverse_mean(x_t, k / num_steps, dt) + sigma_q * dt**0.5 * noise
        yield x_t


# ------------------------------------------ The truth -------------------------------------------
# An integral is a sum over a grid: for smooth functions that vanish at both ends, nearly exact.


def grid(*, sigma_0, sigma_q):
    """The points x, (n,): uniform, finer than the data's detail, out to 8 std of p_1."""
    spacing = min(sigma_0 / 6, sigma_q / 64)
    n = int((1 + 8 * np.hypot(sigma_0, sigma_q)) / spacing)
    return spacing * np.arange(-n, n + 1)


def average(values, x, t, **data):
    """E[values(x_t)].  values: (n,), at the points x of the grid;  data: sigma_0, sigma_q."""
    return (x[1] - x[0]) * (np.exp(log_density(x, t, **data)) @ values)


def entropy(t, **data):
    """H(p_t) = -E[log p_t(x_t)], in nats."""
    x = grid(**data)
    return average(-log_density(x, t, **data), x, t, **data)


def fisher(t, **data):
    """J(t) = E[score^2], the Fisher information of p_t."""
    x = grid(**data)
    return average(score(x, t, **data) ** 2, x, t, **data)


def kl(p, q, x):
    """KL(p || q), in nats.  p, q: densities, (n,), at the points x of the grid."""
    inside = p > 1e-40  # elsewhere p log(p / q) is nothing
    return (x[1] - x[0]) * (p[inside] @ np.log(p[inside] / q[inside]))


def gaussian(x, mean, sigma):
    """The density of N(mean, sigma^2) at x."""
    return np.exp(-(((x - mean) / sigma) ** 2) / 2) / ((2 * np.pi) ** 0.5 * sigma)


def output_density(reverse_mean, x, num_steps, sigma_q):
    """The density of what `ddpm` returns from the base, at the points x of the grid, (n,).

    A step moves the mass at a point to a Gaussian around the reverse mean of that point: to the
    points within 8 sigma of it.
    """
    dt, spacing = 1 / num_steps, x[1] - x[0]
    sigma = sigma_q * dt**0.5
    reach = int(8 * sigma / spacing) + 1
    q = gaussian(x, 0, sigma_q)
    for k in range(num_steps, 0, -1):  # t = k dt
        mean = reverse_mean(x, k / num_steps, dt)[:, None]
        near = np.rint((mean - x[0]) / spacing).astype(int) + np.arange(-reach, reach + 1)
        mass = spacing * q[:, None] * gaussian(x[0] + spacing * near, mean, sigma)
        q = np.bincount(near.clip(0, len(x) - 1).ravel(), mass.ravel(), len(x))
    return q


def step_posterior(x_t, t, dt, *, sigma_0, sigma_q):
    """p(x_{t-dt} | x_t) by Bayes' rule: p_{t-dt}(x) N(x_t; x, sigma^2), over its sum.

    x_t: (n,).  Returns k moves x_{t-dt} - x_t, (k,), and the log density of each, (n, k).
    """
    sigma = sigma_q * dt**0.5
    spacing = min(sigma / 8, sigma_0 / 4)
    moves = np.arange(-14 * sigma, 14 * sigma, spacing)
    logs = log_density(x_t[:, None] + moves, t - dt, sigma_0=sigma_0, sigma_q=sigma_q)
    logs -= (moves / sigma) ** 2 / 2
    return moves, logs - np.logaddexp.reduce(logs, axis=1, keepdims=True) - np.log(spacing)


def identities(t, dt, **data):
    """E[KL(p(x_{t-dt} | x_t) || N(m, sigma^2))] for m = x_t and m = E[x_{t-dt} | x_t].  (2,)

    Exact for any dt. The right mean is sigma^2 score away from x_t: that saves sigma^2 J / 2.
    """
    rise = entropy(t, **data) - entropy(t - dt, **data)
    return np.array([rise, rise - data["sigma_q"] ** 2 * dt * fisher(t, **data) / 2])


def constants(**data):
    """E[F'^2] / 2, E[F''^2] / 4 and E[F'''^2] / 12 of F = log p_0, (3,).

    F'' holds the variance, and F''' the third moment, of p(center | x).
    """
    x, variance = grid(**data), data["sigma_0"] ** 2
    posterior = center_posterior(x, 0, **data)
    deviation = CENTERS - (posterior @ CENTERS)[:, None]
    first = score(x, 0, **data)
    second = ((posterior * deviation**2).sum(axis=1) / variance - 1) / variance
    third = (posterior * deviation**3).sum(axis=1) / variance**3
    squares = [first**2 / 2, second**2 / 4, third**2 / 12]
    return np.array([average(square, x, 0, **data) for square in squares])


# ------------------------------------------ Measuring -------------------------------------------
GAUSSIANS = ["mean x_t", "right mean", "right mean and variance"]  # that a step is compared with
STEP_COUNTS = [1, 3, 10, 30, 100, 300, 1000]


def step_kl(x_t, t, dt, **data):
    """KL(p(x_{t-dt} | x_t) || Gaussian) for each of GAUSSIANS.  x_t: (n,).  Returns (3, n).

    The integral of p log(p / g) - p + g: nowhere negative, so that nothing cancels.
    """
    moves, logs = step_posterior(x_t, t, dt, **data)
    p, spacing = np.exp(logs), moves[1] - moves[0]
    right = (reverse_mean(x_t, t, dt, **data) - x_t)[:, None]
    sigma = data["sigma_q"] * dt**0.5
    std = (spacing * p * (moves - right) ** 2).sum(axis=1, keepdims=True) ** 0.5
    divergences = []
    for mean, width in [(0, sigma), (right, sigma), (right, std)]:
        log_g = -(((moves - mean) / width) ** 2) / 2 - np.log((2 * np.pi) ** 0.5 * width)
        divergences.append(spacing * (p * (logs - log_g) - p + np.exp(log_g)).sum(axis=1))
    return np.array(divergences)


def measure_steps(sigmas, **data):
    """The last step, from dt to 0, with sigma = sigma_q sqrt(dt): step_kl averaged over x_dt.

    sigmas: (n,).  Returns that, (n, 3), its identities, (n, 2), and its limits, (n, 3).
    """
    x, rows = grid(**data), []
    times = (sigmas / data["sigma_q"]) ** 2
    for dt in times:
        rows.append([average(row, x, dt, **data) for row in step_kl(x, dt, dt, **data)])
    exact = np.array([identities(dt, dt, **data) for dt in times])
    return np.array(rows), exact, constants(**data) * sigmas[:, None] ** [2, 4, 6]


def measure_runs(**data):
    """At each of STEP_COUNTS the sums of the two identities over a run, the bound, the output.

    Output: KL(p_0 || what DDPM returns).  Its bound: the second sum + KL(p_1 || base).  (4, n)
    """
    x, mean, rows = grid(**data), partial(reverse_mean, **data), []
    p_0, p_1 = (np.exp(log_density(x, t, **data)) for t in (0, 1))
    base = kl(p_1, gaussian(x, 0, data["sigma_q"]), x)
    for n in STEP_COUNTS:
        wrong, right = sum(identities(k / n, 1 / n, **data) for k in range(1, n + 1))
        q = output_density(mean, x, n, data["sigma_q"])
        rows.append([wrong, right, right + base, kl(p_0, q, x)])
    return np.array(rows).T


def sample(x_1, num_steps, rng, **data):
    """What `ddpm` returns from x_1, (n,), and the same without the noise of its last step."""
    mean = partial(reverse_mean, **data)
    x_dt = x_t = x_1
    steps = ddpm(mean, x_1, num_steps, data["sigma_q"], rng)
    for x_next in tqdm(steps, "DDPM", num_steps, disable=None):
        x_dt, x_t = x_t, x_next
    return x_t, mean(x_dt, 1 / num_steps, 1 / num_steps)


# ----------------------------------------- The figures ------------------------------------------
plt.style.use("default")  # the same figures whatever the reader's matplotlibrc says
COLORS = ["C1", "C0", "C2"]  # of GAUSSIANS


def draw_step(**data):
    """Figure 2 of the tutorial: p(x_0 | x_t = 0) over its Gaussian, for three steps dt = t."""
    fig, axes = plt.subplots(1, 3, figsize=(12, 4.2), layout="constrained")
    x_t = np.zeros(1)
    for ax, dt in zip(axes, (1 / 16, 1 / 64, 1 / 1024)):
        sigma = data["sigma_q"] * dt**0.5
        x, logs = step_posterior(x_t, dt, dt, **data)  # x_t is 0, so a move is x_0
        normal = gaussian(x, reverse_mean(x_t, dt, dt, **data), sigma)
        divergence = step_kl(x_t, dt, dt, **data)[1, 0]
        ax.fill_between(x, np.exp(logs[0]), color="0.8", label="$p(x_0|x_t = 0)$")
        ax.plot(x, normal, "C0", label=r"$N(E[x_0|x_t = 0], \sigma^2)$")
        ax.set(title=rf"$\sigma$ = {sigma:.3g}: KL = {divergence:.3f}", xlabel="$x_0$")
        ax.set(xlim=(-4.5 * sigma, 4.5 * sigma), ylim=(0, None))
    axes[0].set_ylabel("density")
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return fig


def draw_sigmas(sigmas, divergences, exact, limits):
    """sigmas: (n,);  the others: of measure_steps."""
    fig, ax = plt.subplots(figsize=(7.5, 5.5), layout="constrained")
    for k, color in enumerate(COLORS):
        label = GAUSSIANS[k].replace("x_t", "$x_t$")
        ax.loglog(sigmas, divergences[:, k], "o", color=color, ms=5, label=label)
    ax.loglog(sigmas, exact[:, 0], "k", lw=1, label="identities")
    ax.loglog(sigmas, exact[:, 1], "k", lw=1)
    for k, color in enumerate(COLORS):
        constant = limits[0, k] / sigmas[0] ** (2 * k + 2)
        label = rf"${constant:.3g}\,\sigma^{2 * k + 2}$"
        ax.loglog(sigmas, limits[:, k], "--", color=color, lw=1, label=label)
    ax.set(xlabel=r"$\sigma = \sigma_q \sqrt{\Delta t}$", ylabel="KL", ylim=(None, 10))
    ax.set_title(r"KL$(p(x_0|x_{\Delta t})\,\|\,$Gaussian$)$, averaged over $x_{\Delta t}$")
    ax.legend(ncols=2)
    return fig


def draw_runs(runs, rate, x, p_0, q, samples, num_steps):
    """Left: measure_runs, and rate / number of steps.  Right: what DDPM returns.

    p_0, q: the densities of data and output at x, (n,);  samples: of `sample`.
    """
    fig, (left, right) = plt.subplots(1, 2, figsize=(12, 5), layout="constrained")
    labels = ["sum, mean $x_t$", "sum, right mean"]
    labels += [r"that + KL$(p_1\|$base$)$", r"KL$(p_0\|$output$)$"]
    for values, style, label in zip(runs, ["C1o-", "C0o-", "C2s-", "k^-"], labels):
        left.loglog(STEP_COUNTS, values, style, label=label)
    label = f"{rate:.3g} / number of steps"
    left.loglog(STEP_COUNTS, rate / np.array(STEP_COUNTS), "C0--", lw=1, label=label)
    left.set(xlabel="number of steps", ylabel="KL", title="A run: the sum of its steps; its output")
    left.legend()

    side = max(2.5, *(abs(draws).max() for draws in samples))
    bins = np.linspace(-side, side, 121)
    right.hist(samples[0], bins, density=True, color="C0", alpha=0.4, label="samples")
    right.plot(x, q, "C0", label="their density")
    label = "without the last noise"
    right.hist(samples[1], bins, density=True, color="C3", histtype="step", label=label)
    right.plot(x, p_0, "k", label="$p_0$")
    right.set(xlabel="$x_0$", ylabel="density", xlim=(-side, side))
    right.set_title(f"DDPM, number of steps: {num_steps}")
    right.legend()
    return fig


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
        num_steps=(100, 1, 1000, "steps of DDPM in the picture, 1 / dt"),
        num_samples=(20_000, 1, 10**6, "samples in the picture"),
        sigma_0=(0.3, 0.15, 1.0, "std of each Gaussian of the data"),
        sigma_q=(2.0, 0.5, 4.0, "std of the noise at t = 1, and of the base"),
        seed=(0, 0, 10**6, "seed of every draw"),
    )
    rng = np.random.default_rng(args.seed)
    data = {"sigma_0": args.sigma_0, "sigma_q": args.sigma_q}

    sigmas = np.geomspace(0.01, args.sigma_q, 25)
    divergences, exact, limits = measure_steps(sigmas, **data)
    slopes = np.log(divergences[1] / divergences[0]) / np.log(sigmas[1] / sigmas[0])
    runs = measure_runs(**data)
    # Summed over a run: the integral of J, less dt times the sum of J at the later ends.
    rate = args.sigma_q**2 / 4 * (fisher(0, **data) - fisher(1, **data))

    x_1 = args.sigma_q * rng.standard_normal(args.num_samples)
    samples = sample(x_1, args.num_steps, rng, **data)
    x_0 = mixture(args.num_samples, rng, sigma_0=args.sigma_0)

    print(f"last step, sigma = {sigmas[0]}" + "".join(f"{name:>25}" for name in GAUSSIANS))
    print("slope of KL in sigma  " + "".join(f"{slope:25.3f}" for slope in slopes))
    print("KL / limit            " + "".join(f"{r:25.4f}" for r in divergences[0] / limits[0]))
    print(f"the identities hold to {abs(exact - divergences[:, :2]).max():.0e}")
    print("steps   sum, mean x_t   sum, right mean   that + KL(p_1 || base)   KL(p_0 || output)")
    for n, (wrong, right, bound, output) in list(zip(STEP_COUNTS, runs.T))[::2]:
        print(f"{n:5}{wrong:16.4f}{right:18.4f}{bound:25.4f}{output:20.5f}")
    rise = entropy(1, **data) - entropy(0, **data)
    print(f"H(p_1) - H(p_0) = {rise:.4f}; the sum with the right mean: about {rate:.2f} / steps")
    stds = [draws.std() for draws in (x_0, *samples)]
    print("std: data {:.2f}, DDPM {:.2f}, without the last noise {:.2f}".format(*stds))

    x = grid(**data)
    p_0 = np.exp(log_density(x, 0, **data))
    q = output_density(partial(reverse_mean, **data), x, args.num_steps, args.sigma_q)
    for name, figure in {
        "reverse-step": draw_step(**data),
        "kl-vs-sigma": draw_sigmas(sigmas, divergences, exact, limits),
        "kl-vs-steps": draw_runs(runs, rate, x, p_0, q, samples, args.num_steps),
    }.items():
        figure.savefig(args.figures_dir / f"{name}.jpg", dpi=120)
    print(f"figures: {args.figures_dir}")


if __name__ == "__main__":
    main()
