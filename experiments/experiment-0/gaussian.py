"""Experiment 0: DDPM and DDIM on one-dimensional Gaussian data, where nothing has to be learned.

The claim
    Let x_0 ~ N(mu_0, sigma_0^2), and let p_t be the distribution of x_t = x_0 + N(0, sigma_q^2 t).
    The reverse mean E[x_{t-dt} | x_t] is a straight line in x_t, so each step of DDPM and of DDIM
    maps a Gaussian to a Gaussian. Both return Gaussians that are known before a sample is drawn.

The truth beside it
    The mean and the std of what a sampler returns obey one recursion: `law`. The error is how far
    the law is from p_0, the data's: W_2, how far the mass must be moved, root mean square.
    It has two causes: sampling starts from the base, N(0, sigma_q^2), and not from p_1; and it
    takes finite steps. Started from p_1 itself, all of the error is that of the steps.

What to look for in figures/
    experiment-0-samples-ddm-ddim-toy-example.jpg   histograms on the law, which is not quite p_0
    experiment-0-error-vs-steps.jpg                 from p_1 the errors fall towards 0; from the
                                                    base they stop: which sampler's higher, and why?
    experiment-0-error-vs-sigma-q.jpg               sigma_q too small: the base is unlike p_1;
                                                    too large: the steps are too coarse

Try this
    python gaussian.py --num-steps 1    which sampler is too wide, and which too narrow?
    python gaussian.py --sigma-q 1      the base is unlike p_1: which sampler keeps more of that?
    python gaussian.py --sigma-0 0.1    narrow data: is DDPM's last noise wider than the data?
    python gaussian.py --mu-0 0         the base has the right mean: what is left of the error?
"""

import os
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path

os.environ["MPLBACKEND"] = "agg"  # figures are files, also from a notebook

import matplotlib.pyplot as plt
import numpy as np
from tqdm import tqdm

# ------------------------------------------- The data -------------------------------------------
MU_0, SIGMA_0 = 1.0, 0.7


@dataclass(frozen=True)
class Gaussian:
    """x_0 ~ N(mu_0, sigma_0^2), and x_t = x_0 + N(0, sigma_q^2 t).  A law is its (mean, std)."""

    mu_0: float
    sigma_0: float
    sigma_q: float

    def p_t(self, t):
        """The distribution of x_t.  p_0 is that of the data."""
        return self.mu_0, (self.sigma_0**2 + self.sigma_q**2 * t) ** 0.5

    def starts(self):
        """Where sampling starts, and where it ought to."""
        return {"base": (0.0, self.sigma_q), "p_1": self.p_t(1)}


# --------------------------------------- The reverse mean ---------------------------------------
# (x_{t-dt}, x_t) is Gaussian, and x_t is x_{t-dt} plus independent noise: their covariance is the
# variance of x_{t-dt}. The rest is linear regression.


def slope(t, dt, *, sigma_0, sigma_q):
    """Slope of E[x_{t-dt} | x_t] in x_t: the variance of x_{t-dt} over that of x_t."""
    return (sigma_0**2 + sigma_q**2 * (t - dt)) / (sigma_0**2 + sigma_q**2 * t)


def reverse_mean(x_t, t, dt, *, mu_0, sigma_0, sigma_q):
    """E[x_{t-dt} | x_t] for x_0 ~ N(mu_0, sigma_0^2), exact for any dt.

    It is x_t + sigma_q^2 dt times the score of p_t, (mu_0 - x_t) / (sigma_0^2 + sigma_q^2 t).
    x_t: any shape, at time t;  0 < dt <= t <= 1.  Returns the shape of x_t.
    """
    return mu_0 + slope(t, dt, sigma_0=sigma_0, sigma_q=sigma_q) * (x_t - mu_0)


# ----------------------------------------- The samplers -----------------------------------------
# They know nothing of the data but the function that they are given: reverse_mean(x_t, t, dt).


def ddpm(reverse_mean, x_1, num_steps, sigma_q, rng):
    """Algorithm 1 (DDPM): x_{t-dt} = E[x_{t-dt} | x_t] + N(0, sigma_q^2 dt).

    x_1: draws of the base;  num_steps = 1 / dt.  Yields x_{t-dt} after every step, the last is x_0.
    """
    x_t, dt = x_1, 1 / num_steps
    for k in range(num_steps, 0, -1):  # t = k dt
        noise = rng.standard_normal(x_t.shape)
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


# ------------------------------------------ The truth -------------------------------------------


def law(sampler, num_steps, mean_1, std_1, *, mu_0, sigma_0, sigma_q):
    """Exact (mean, std) of what "DDPM" or "DDIM" returns when x_1 ~ N(mean_1, std_1^2).

    A step multiplies x_t - mu_0 by 1 - lam + lam slope. DDPM has lam = 1, and adds its noise.
    """
    mean, variance, dt = mean_1, std_1**2, 1 / num_steps
    for k in range(num_steps, 0, -1):  # t = k dt
        if sampler == "DDPM":
            lam, noise = 1, sigma_q**2 * dt
        else:
            lam, noise = k**0.5 / ((k - 1) ** 0.5 + k**0.5), 0
        factor = 1 - lam + lam * slope(k / num_steps, dt, sigma_0=sigma_0, sigma_q=sigma_q)
        mean = mu_0 + factor * (mean - mu_0)
        variance = factor**2 * variance + noise
    return mean, variance**0.5


def wasserstein(a, b):
    """W_2 of two Gaussians: how far the mass of a must be moved, root mean square, to make b."""
    return np.hypot(a[0] - b[0], a[1] - b[1])


# ------------------------------------------ Measuring -------------------------------------------
# data: a Gaussian; **vars(data) hands its three numbers on by name.
SAMPLERS = ("DDPM", "DDIM")
STEP_COUNTS = np.unique(np.geomspace(1, 10_000, 25).round().astype(int))
SIZES = np.geomspace(0.1, 100, 61)  # sigma_q over the size of the data


def sample(x_1, num_steps, rng, data):
    """Runs both samplers from x_1, (n,).  Returns {sampler: x_0, (n,)}."""
    mean = partial(reverse_mean, **vars(data))
    runs = {
        "DDPM": ddpm(mean, x_1, num_steps, data.sigma_q, rng),
        "DDIM": ddim(mean, x_1, num_steps),
    }
    samples = {}
    for name, steps in runs.items():
        for x_t in tqdm(steps, name, num_steps, disable=None):
            pass
        samples[name] = x_t
    return samples


def standard_errors(std, n):
    """Of the mean and of the std of n draws of a Gaussian."""
    return std / n**0.5, std / (2 * n) ** 0.5


def laws(num_steps, start, data):
    """{sampler: the (mean, std) that it returns}.  start: (mean, std) of x_1."""
    return {name: law(name, num_steps, *start, **vars(data)) for name in SAMPLERS}


def errors(num_steps, start, data):
    """{sampler: W_2 of its law and p_0}.  start: (mean, std) of x_1."""
    found = laws(num_steps, start, data)
    return {name: wasserstein(found[name], data.p_t(0)) for name in SAMPLERS}


def error_vs_steps(data):
    """{start: [errors for each of STEP_COUNTS]}, start "base" or "p_1"."""
    return {
        name: [errors(int(n), start, data) for n in STEP_COUNTS]
        for name, start in data.starts().items()
    }


def error_vs_sigma_q(mu_0, sigma_0):
    """sigma_q, as SIZES, and {num_steps: [errors from the base for each]}."""
    sigma_qs = max(abs(mu_0), sigma_0) * SIZES
    spread = [Gaussian(mu_0, sigma_0, sigma_q) for sigma_q in sigma_qs.tolist()]
    return sigma_qs, {
        n: [errors(n, data.starts()["base"], data) for data in spread] for n in (10, 100, 1000)
    }


# ----------------------------------------- The figures ------------------------------------------
plt.style.use("default")  # the same figures whatever the reader's matplotlibrc says
BLUE, ORANGE, PINK = "#0072B2", "#E69F00", "#CC79A7"
COLORS = {"DDPM": BLUE, "DDIM": ORANGE}


def density(mean, std):
    """The density of a Gaussian: x, (200,), and p(x), (200,)."""
    z = np.linspace(-4, 4, 200)
    return mean + std * z, np.exp(-(z**2) / 2) / (std * (2 * np.pi) ** 0.5)


def draw_histogram(ax, points, exact, wanted, color, label):
    """A histogram of points, (n,), with the density of their law, and the one wanted.

    exact, wanted: (mean, std);  label: that of wanted.
    """
    ax.hist(points, bins=100, density=True, color="0.8", label="sampled")
    ax.plot(*density(*exact), color=color, lw=2, label="law")
    ax.plot(*density(*wanted), "k--", label=label)
    ax.legend(loc="upper left")


def draw_samples(x_1, samples, found, num_steps, data):
    """The base, then what each sampler makes of it.  samples: of sample;  found: of laws."""
    fig, axes = plt.subplots(1, 3, figsize=(12, 4.2), layout="constrained")
    axes[1].sharex(axes[2])
    axes[1].sharey(axes[2])
    base, p_1 = data.starts().values()
    draw_histogram(axes[0], x_1, base, p_1, PINK, "$p_1$")
    axes[0].set(xlabel="$x_1$", ylabel="density", title=r"the base, $N(0, \sigma_q^2)$")
    for ax, name in zip(axes[1:], SAMPLERS):
        draw_histogram(ax, samples[name], found[name], data.p_t(0), COLORS[name], "$p_0$")
        ax.set(xlabel="$x_0$", title=f"{name}, steps: {num_steps}")
    return fig


def draw_error_vs_steps(by_steps):
    """A panel for each start.  by_steps: of error_vs_steps."""
    fig, axes = plt.subplots(1, 2, figsize=(9.5, 4.4), layout="constrained", sharey=True)
    for ax, start, title in zip(axes, ("p_1", "base"), ("from $p_1$", "from the base")):
        for name, color in COLORS.items():
            curve = [found[name] for found in by_steps[start]]
            ax.loglog(STEP_COUNTS, curve, "o-", color=color, ms=4, label=name)
        ax.set(xlabel=r"number of steps, $1/\Delta t$", title=title)
        ax.grid(alpha=0.3)
        ax.legend()
    axes[0].set_ylabel("$W_2$(law of the sampler, $p_0$)")
    return fig


def draw_error_vs_sigma_q(sigma_qs, by_sigma_q, sigma_q):
    """A panel for each sampler, of error_vs_sigma_q.  sigma_q: that of this run."""
    fig, axes = plt.subplots(1, 2, figsize=(9.5, 4.4), layout="constrained", sharey=True)
    for ax, name in zip(axes, SAMPLERS):
        for (n, found), alpha in zip(by_sigma_q.items(), (0.35, 0.65, 1)):
            style = {"color": COLORS[name], "alpha": alpha, "lw": 2}
            curve = [at_sigma_q[name] for at_sigma_q in found]
            ax.loglog(sigma_qs, curve, **style, label=f"{n} steps")
        ax.axvline(sigma_q, color="k", ls=":", label=rf"$\sigma_q$ = {sigma_q:g}")
        ax.set(xlabel=r"$\sigma_q$", title=f"{name}, from the base")
        ax.grid(alpha=0.3)
        ax.legend()
    axes[0].set_ylabel("$W_2$(law of the sampler, $p_0$)")
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


def report(samples, found, num_steps, data):
    """Rows of table: law and samples from the base; the error from either start."""
    rows = [["", "mean: law", "sampled", "s.e.", "std: law", "sampled", "s.e."]]
    rows[0] += ["W_2: from base", "from p_1"]
    far = [errors(num_steps, start, data) for start in data.starts().values()]
    for name, x_0 in samples.items():
        mean, std = found[name]
        mean_se, std_se = standard_errors(std, len(x_0))
        numbers = [mean, x_0.mean(), mean_se, std, x_0.std(), std_se]
        numbers += [from_start[name] for from_start in far]
        rows.append([name, *(f"{number:.4f}" for number in numbers)])
    return rows


def main(argv=None):
    args = options(
        argv,
        num_steps=(1000, 1, 10_000, "steps of a sampler, 1 / dt"),
        num_samples=(100_000, 1, 10**6, "samples of each sampler"),
        mu_0=(float(MU_0), -1000.0, 1000.0, "mean of the data"),
        sigma_0=(float(SIGMA_0), 0.1, 100.0, "std of the data"),
        sigma_q=(7.0, 0.1, 100.0, "std of the noise at t = 1, and of the base"),
        seed=(0, 0, 10**6, "seed of every draw"),
    )
    rng = np.random.default_rng(args.seed)
    data = Gaussian(args.mu_0, args.sigma_0, args.sigma_q)

    x_1 = args.sigma_q * rng.standard_normal(args.num_samples)
    samples = sample(x_1, args.num_steps, rng, data)
    found = laws(args.num_steps, data.starts()["base"], data)

    sigma_qs, by_sigma_q = error_vs_sigma_q(args.mu_0, args.sigma_0)
    for name, figure in {
        "samples-ddm-ddim-toy-example": draw_samples(x_1, samples, found, args.num_steps, data),
        "error-vs-steps": draw_error_vs_steps(error_vs_steps(data)),
        "error-vs-sigma-q": draw_error_vs_sigma_q(sigma_qs, by_sigma_q, args.sigma_q),
    }.items():
        figure.savefig(args.figures_dir / f"experiment-0-{name}.jpg", dpi=120)
    print(f"data N({args.mu_0:g}, {args.sigma_0:g}^2), base N(0, {args.sigma_q:g}^2),", end=" ")
    print(f"samples of each sampler: {args.num_samples}, steps: {args.num_steps}")
    table(report(samples, found, args.num_steps, data))
    print(f"figures: {args.figures_dir}")


if __name__ == "__main__":
    main()
