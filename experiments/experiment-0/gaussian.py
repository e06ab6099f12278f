"""Experiment 0: DDPM and DDIM on one-dimensional Gaussian data, where nothing has to be learned.

The claim
    Let x_0 ~ N(mu_0, sigma_0^2) and x_t = x_0 + N(0, sigma_q^2 t). Then the reverse mean
    E[x_{t-dt} | x_t] is known exactly, and Algorithms 1 (DDPM) and 2 (DDIM) of the tutorial can be
    run with no error but their own. Both turn samples of the base, N(0, sigma_q^2), into samples of
    the data's distribution p_0, almost.

How far is almost?
    Every step maps a Gaussian to a Gaussian. So what a sampler returns is exactly Gaussian, and its
    mean and standard deviation follow a short recursion: `ddpm_law` and `ddim_law`. We call that
    the law of the sampler: the distribution of its samples, known before any is drawn. How far it
    is from p_0 is measured by W_2: how far the mass must be moved, root mean square. Two things
    keep the law from p_0; one wants a larger sigma_q, the other a smaller one:
      the base    the noised data at t = 1 are p_1 = N(mu_0, sigma_0^2 + sigma_q^2), and sampling
                  starts from N(0, sigma_q^2). A larger sigma_q makes them more alike. Smaller steps
                  do not: an error is left as dt -> 0, the floor (`ddpm_floor`, `ddim_floor`);
      the steps   given x_t, x_{t-dt} has a variance a little smaller than DDPM's sigma_q^2 dt, and
                  DDIM follows a curve by straight pieces. Smaller steps mend this, a larger sigma_q
                  makes it worse.
    And if DDPM's noise is left out, it ends far too narrow, in any number of steps.

What to look for in figures/
    experiment-0-samples-ddm-ddim-toy-example.jpg   the histograms sit on the law, not quite on p_0
    experiment-0-error-vs-steps.jpg                 lines that fall, and lines that meet their floor
    experiment-0-error-vs-sigma-q.jpg               a best sigma_q between too small and too large

Run
    python gaussian.py

Try this
    python gaussian.py --num-steps 1                   one step: DDPM far too wide, DDIM too narrow
    python gaussian.py --sigma-q 1                     the base is too narrow
    python gaussian.py --sigma-q 50 --num-steps 100    the base is right, the steps are too coarse
"""

import argparse
import io
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from tqdm import tqdm

# ------------------------------------------- The data -------------------------------------------
# x_0 ~ N(mu_0, sigma_0^2). Adding noise keeps it Gaussian: every p_t is a mean and a variance.


def p_t(t, *, mu_0, sigma_0, sigma_q):
    """(mean, std) of x_t = x_0 + N(0, sigma_q^2 t).  p_0 is the data, p_1 where to start from."""
    return mu_0, (sigma_0**2 + sigma_q**2 * t) ** 0.5


# --------------------------------------- The reverse mean ---------------------------------------
# (x_{t-dt}, x_t) is jointly Gaussian, with variances sigma_0^2 + sigma_q^2 (t - dt) and
# sigma_0^2 + sigma_q^2 t, and a covariance equal to the first. The rest is linear regression:
# E[x_{t-dt} | x_t] = mu_0 + slope (x_t - mu_0), slope = covariance / variance of x_t.


def slope(t, dt, *, sigma_0, sigma_q):
    """d E[x_{t-dt} | x_t] / d x_t: the covariance over the variance of x_t."""
    return (sigma_0**2 + sigma_q**2 * (t - dt)) / (sigma_0**2 + sigma_q**2 * t)


def reverse_mean(x_t, t, dt, *, mu_0, sigma_0, sigma_q):
    """E[x_{t-dt} | x_t] for x_0 ~ N(mu_0, sigma_0^2); exact for every dt.

    x_t: any shape, values at time t;  0 < dt <= t <= 1.  Returns the shape of x_t.
    """
    a = slope(t, dt, sigma_0=sigma_0, sigma_q=sigma_q)
    return a * x_t + (1 - a) * mu_0


# ----------------------------------------- The samplers -----------------------------------------
# They know nothing of the data but the function that they are given: reverse_mean(x_t, t, dt).


def ddpm(reverse_mean, x_1, num_steps, sigma_q, rng):
    """Algorithm 1 (DDPM): x_{t-dt} = E[x_{t-dt} | x_t] + N(0, sigma_q^2 dt).

    reverse_mean(x_t, t, dt) -> like x_t;  x_1: draws of the base;  rng: a NumPy Generator.
    num_steps = 1 / dt >= 1 (0: ZeroDivisionError).
    Yields num_steps arrays like x_1, the last of them x_0.
    """
    x_t, dt = x_1, 1 / num_steps
    for k in range(num_steps, 0, -1):  # t = k dt
        noise = rng.standard_normal(x_t.shape)
        x_t = reverse_mean(x_t, k / num_steps, dt) + sigma_q * dt**0.5 * noise
        yield x_t


def ddim(reverse_mean, x_1, num_steps):
    """Algorithm 2 (DDIM): x_{t-dt} = x_t + lam (E[x_{t-dt} | x_t] - x_t).

    lam = sigma_t / (sigma_{t-dt} + sigma_t); as sigma_t = sigma_q sqrt(t), sigma_q cancels in it.
    reverse_mean(x_t, t, dt) -> like x_t;  x_1: draws of the base.
    num_steps = 1 / dt >= 1 (0: ZeroDivisionError).
    Yields num_steps arrays like x_1, the last of them x_0.
    """
    x_t, dt = x_1, 1 / num_steps
    for k in range(num_steps, 0, -1):  # t = k dt
        lam = k**0.5 / ((k - 1) ** 0.5 + k**0.5)
        x_t = x_t + lam * (reverse_mean(x_t, k / num_steps, dt) - x_t)
        yield x_t


# ------------------------------------------- The truth ------------------------------------------
# What the samplers must produce, computed without drawing a sample.


def ddpm_law(num_steps, mean_1, std_1, *, mu_0, sigma_0, sigma_q, noise=1.0):
    """Exact (mean, std) of what `ddpm` returns when x_1 ~ N(mean_1, std_1^2).

    A step sends the mean through the reverse mean. It multiplies the variance by slope^2, and adds
    the variance of the noise, sigma_q^2 dt.
    noise: factor on the noise; 0 leaves it out.  All arguments but num_steps may be arrays.
    """
    dt = 1 / num_steps
    mean = mean_1
    variance = std_1**2
    for k in range(num_steps, 0, -1):
        t = k / num_steps
        a = slope(t, dt, sigma_0=sigma_0, sigma_q=sigma_q)
        mean = a * mean + (1 - a) * mu_0
        variance = a**2 * variance + noise**2 * sigma_q**2 * dt
    return mean, variance**0.5


def ddim_law(num_steps, mean_1, std_1, *, mu_0, sigma_0, sigma_q):
    """Exact (mean, std) of what `ddim` returns when x_1 ~ N(mean_1, std_1^2).

    A step is x_t -> (1 - lam + lam slope) x_t + constant: the std is multiplied by that factor.
    All arguments but num_steps may be arrays.
    """
    dt = 1 / num_steps
    mean = mean_1
    std = std_1
    for k in range(num_steps, 0, -1):
        t = k / num_steps
        lam = k**0.5 / ((k - 1) ** 0.5 + k**0.5)
        a = slope(t, dt, sigma_0=sigma_0, sigma_q=sigma_q)
        mean = mean + lam * (a * mean + (1 - a) * mu_0 - mean)
        std = (1 - lam + lam * a) * std
    return mean, std


def ddpm_floor(*, mu_0, sigma_0, sigma_q):
    """(|error of the mean|, |error of the std|) of DDPM from the base as dt -> 0.

    Over a whole run the slopes multiply to r = sigma_0^2 / (sigma_0^2 + sigma_q^2), for any dt. The
    base's mean is wrong by mu_0, so the mean ends wrong by mu_0 r. The base's variance lacks
    sigma_0^2, so the variance ends short by sigma_0^2 r^2: the std is sigma_0 sqrt(1 - r^2).
    """
    r = sigma_0**2 / (sigma_0**2 + sigma_q**2)
    std_error = sigma_0 * r**2 / (1 + (1 - r**2) ** 0.5)  # sigma_0 (1 - sqrt(1 - r^2))
    return abs(mu_0) * r, std_error


def ddim_floor(*, mu_0, sigma_0, sigma_q):
    """(|error of the mean|, |error of the std|) of DDIM from the base as dt -> 0.

    The limit is the probability-flow ODE (section 3.5). It carries p_1 to p_0, so it multiplies
    x_1 - mu_0 by sigma_0 / std_1, std_1 = sqrt(sigma_0^2 + sigma_q^2). From the base, the mean ends
    wrong by mu_0 sigma_0 / std_1, and the std ends at sigma_q sigma_0 / std_1.
    """
    std_1 = np.hypot(sigma_0, sigma_q)
    std_error = sigma_0 * sigma_0**2 / (std_1 * (std_1 + sigma_q))  # sigma_0 (1 - sigma_q / std_1)
    return abs(mu_0) * sigma_0 / std_1, std_error


def wasserstein(mean_a, std_a, mean_b, std_b):
    """2-Wasserstein distance W_2 of N(mean_a, std_a^2) and N(mean_b, std_b^2).

    How far one distribution's mass has to be moved, root mean square, to make the other.
    """
    return np.hypot(mean_a - mean_b, std_a - std_b)


# ------------------------------------------- Measuring ------------------------------------------


def last(steps, num_steps, label):
    """The last array that a sampler yields, x_0.  label: of the progress bar."""
    for x_t in tqdm(steps, desc=label, total=num_steps, disable=None):
        pass
    return x_t


def sample(x_1, num_steps, rng, *, mu_0, sigma_0, sigma_q):
    """Runs both samplers from the same starts x_1, (n,).  Returns {sampler: x_0, (n,)}."""
    step_mean = partial(reverse_mean, mu_0=mu_0, sigma_0=sigma_0, sigma_q=sigma_q)
    return {
        "DDPM": last(ddpm(step_mean, x_1, num_steps, sigma_q, rng), num_steps, "DDPM"),
        "DDIM": last(ddim(step_mean, x_1, num_steps), num_steps, "DDIM"),
    }


def measure_samples(samples, num_steps, **data):
    """What each sampler returned from the base, beside its law, and the law beside p_0.

    samples: {sampler: x_0, (n,)};  data: mu_0, sigma_0, sigma_q.  Returns {sampler: row}, a row
    being {"mean", "std": as sampled, with "mean_se", "std_se", their standard errors; "exact_mean",
    "exact_std": of the law; "distance": W_2 of the law and p_0; "floor": its limit as dt -> 0}.
    """
    laws = {"DDPM": ddpm_law, "DDIM": ddim_law}
    floors = {"DDPM": ddpm_floor, "DDIM": ddim_floor}
    rows = {}
    for name, x_0 in samples.items():
        exact_mean, exact_std = laws[name](num_steps, 0.0, data["sigma_q"], **data)
        rows[name] = {
            "mean": x_0.mean(),
            "mean_se": exact_std / len(x_0) ** 0.5,
            "exact_mean": exact_mean,
            "std": x_0.std(),
            "std_se": exact_std / (2 * len(x_0)) ** 0.5,
            "exact_std": exact_std,
            "distance": wasserstein(exact_mean, exact_std, *p_t(0, **data)),
            "floor": np.hypot(*floors[name](**data)),
        }
    return rows


STEP_COUNTS = np.unique(np.logspace(0, 4, 33).round().astype(int))


def measure_error_vs_steps(**data):
    """W_2 of the law and p_0 for each of STEP_COUNTS, from the base and from the true p_1.

    Returns {sampler: {"base": (n,), "p_1": (n,)}}; "no noise" is DDPM without its noise.
    """
    laws = {"DDPM": ddpm_law, "DDIM": ddim_law, "no noise": partial(ddpm_law, noise=0.0)}
    starts = {"base": (0.0, data["sigma_q"]), "p_1": p_t(1, **data)}
    p_0 = p_t(0, **data)
    errors = {}
    for name, law in laws.items():
        errors[name] = {}
        for start, x_1 in starts.items():
            distances = [wasserstein(*law(n, *x_1, **data), *p_0) for n in STEP_COUNTS]
            errors[name][start] = np.array(distances)
    return errors


def observed_order(errors):
    """The p of error ~ dt^p between 1000 and 10 000 steps.  errors: one for each of STEP_COUNTS."""
    at = dict(zip(STEP_COUNTS, errors))
    return np.log10(at[1000] / at[10_000])


def std_without_noise(num_steps, **data):
    """Standard deviation that DDPM ends with, from the true p_1, when its noise is left out."""
    return ddpm_law(num_steps, *p_t(1, **data), noise=0.0, **data)[1]


def measure_error_vs_sigma_q(*, mu_0, sigma_0):
    """W_2 of the law and p_0, from the base, for 161 sigma_q from sigma_0 / 10 to 1000 sigma_0.

    Returns sigma_qs, (161,), and {(sampler, num_steps): errors, (161,)} for 10, 100, 1000 steps.
    """
    sigma_qs = sigma_0 * np.logspace(-1, 3, 161)
    data = {"mu_0": mu_0, "sigma_0": sigma_0, "sigma_q": sigma_qs}
    errors = {}
    for name, law in [("DDPM", ddpm_law), ("DDIM", ddim_law)]:
        for n in (10, 100, 1000):
            errors[name, n] = wasserstein(*law(n, 0.0, sigma_qs, **data), mu_0, sigma_0)
    return sigma_qs, errors


# ------------------------------------------- Printing -------------------------------------------


def report(table, orders, best, narrow, args):
    """table: of measure_samples;  orders, best: {sampler: float};  narrow: of std_without_noise."""
    print(f"data N({args.mu_0:g}, {args.sigma_0:g}^2), sigma_q = {args.sigma_q:g}:", end=" ")
    print(f"{args.num_samples} samples from the base, {args.num_steps} steps")
    print("                mean of x_0                   std of x_0           W_2 to p_0")
    print("         sampled +- s.e.   exact     sampled +- s.e.   exact     law   dt -> 0")
    for name, row in table.items():
        mean = f"{row['mean']:7.4f} +- {row['mean_se']:6.4f}  {row['exact_mean']:7.4f}"
        std = f"{row['std']:7.4f} +- {row['std_se']:6.4f}  {row['exact_std']:7.4f}"
        print(f"{name}    {mean}   {std}  {row['distance']:7.4f}  {row['floor']:7.4f}")
    for name in table:
        print(f"{name}: from p_1 the error falls as dt^{orders[name]:.2f};", end=" ")
        print(f"from the base the best sigma_q at 1000 steps is {best[name]:.1f}")
    print(f"DDPM without its noise, from p_1, ends with std {narrow:.4f} and not {args.sigma_0:g}")


# ------------------------------------------ The figures -----------------------------------------
plt.switch_backend("agg")  # the figures are files: no window
plt.rcParams.update({"font.size": 12, "axes.titlesize": 12})


def gaussian_density(x, mean, std):
    """Density of N(mean, std^2) at x."""
    return np.exp(-0.5 * ((x - mean) / std) ** 2) / (std * (2 * np.pi) ** 0.5)


def draw_samples(x_1, samples, table, num_steps, **data):
    """The base, then each sampler's histogram with its law and p_0.  table: of measure_samples."""
    fig, (top, *axes) = plt.subplots(3, 1, figsize=(6, 8.4), layout="constrained")
    mean_1, std_1 = p_t(1, **data)
    x = np.linspace(-abs(mean_1) - 4 * std_1, abs(mean_1) + 4 * std_1, 800)
    top.hist(x_1, bins=120, range=(x[0], x[-1]), density=True, color="0.8", label="$x_1$ drawn")
    base = gaussian_density(x, 0, data["sigma_q"])
    top.plot(x, base, "C0", label=r"base $N(0, \sigma_q^2)$")
    top.plot(x, gaussian_density(x, mean_1, std_1), "k--", label="true $p_1$")
    top.set_title("Sampling starts from the base, which is not quite $p_1$")

    mean_0, std_0 = p_t(0, **data)
    for ax, (name, row), color in zip(axes, table.items(), ["C0", "C1"]):
        mean, std = row["exact_mean"], row["exact_std"]
        left = min(mean_0 - 4.5 * std_0, mean - 4.5 * std)
        right = max(mean_0 + 4.5 * std_0, mean + 4.5 * std)
        x = np.linspace(left, right, 800)
        bins = {"bins": 100, "range": (left, right), "density": True}
        ax.hist(samples[name], **bins, color="0.8", label="$x_0$ sampled")
        ax.plot(x, gaussian_density(x, mean, std), color, label="law of the sampler")
        ax.plot(x, gaussian_density(x, mean_0, std_0), "k--", label="target $p_0$")
        distance = row["distance"]
        ax.set_title(f"{name}, {num_steps} steps: law is {distance:.2g} from $p_0$ ($W_2$)")
    for ax in (top, *axes):
        ax.set(xlabel="$x$", ylabel="density")
        ax.legend(fontsize=10, loc="upper left")
        ax.margins(x=0)
        ax.set_ylim(0, 1.25 * ax.get_ylim()[1])
    return fig


def draw_error_vs_steps(errors, table):
    """errors: of measure_error_vs_steps;  table: of measure_samples, for the floors."""
    fig, ax = plt.subplots(figsize=(6, 6.4), layout="constrained")
    for name, color in [("DDPM", "C0"), ("DDIM", "C1")]:
        ax.loglog(STEP_COUNTS, errors[name]["base"], color, label=f"{name} from the base")
        ax.loglog(STEP_COUNTS, errors[name]["p_1"], color, ls="--", label=f"{name} from $p_1$")
        floor = table[name]["floor"]
        ax.axhline(floor, color=color, lw=1, ls=":", label=f"floor of {name}: {floor:.2g}")
    without = errors["no noise"]["p_1"]
    ax.loglog(STEP_COUNTS, without, "C2", ls="-.", label="DDPM without noise, from $p_1$: flat")
    ax.set(xlabel=r"num_steps $= 1/\Delta t$", ylabel="$W_2$(law of the sampler, $p_0$)")
    ax.set_title("From $p_1$ the error falls with $\\Delta t$; from the\nbase it meets a floor")
    ax.legend(fontsize=10, ncols=2, loc="upper center", bbox_to_anchor=(0.45, -0.13))
    ax.grid(alpha=0.3)
    return fig


def draw_error_vs_sigma_q(sigma_qs, errors, chosen):
    """errors: of measure_error_vs_sigma_q;  chosen: this run's sigma_q."""
    fig, ax = plt.subplots(figsize=(6, 5.4), layout="constrained")
    shades = {10: 0.85, 100: 0.5, 1000: 0.1}
    for (name, num_steps), error in errors.items():
        color = plt.get_cmap("viridis")(shades[num_steps])
        line, mark = {"DDPM": ("-", "o"), "DDIM": ("--", "s")}[name]
        ax.loglog(sigma_qs, error, line, color=color, label=f"{name}, {num_steps} steps")
        best = np.argmin(error)
        ax.plot(sigma_qs[best], error[best], mark, color=color, ms=8)
    ax.axvline(chosen, color="0.4", lw=1, ls=":", label=rf"this run's $\sigma_q$ = {chosen:g}")
    ax.set(xlabel=r"$\sigma_q$", ylabel="$W_2$(law of the sampler, $p_0$)")
    ax.set_title(
        "Too small: the base is wrong. Too large: the\nsteps are. Marks: the best $\\sigma_q$"
    )
    ax.legend(fontsize=9, ncols=2)
    ax.grid(alpha=0.3)
    return fig


# ------------------------------------------ Running it ------------------------------------------


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """--help prints the docstring as it stands, and each option's default."""


def number(kind, low, high):
    """An argparse type: an int or a float from low to high (so neither NaN nor infinity)."""

    def parse(text):
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low:g} and {high:g}")
        return kind(text)

    parse.__name__ = kind.__name__
    return parse


def parse_arguments(argv):
    """The options.  Exits with status 2 on what cannot be used."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = partial(parser.add_argument, metavar="X")
    add("--num-steps", type=number(int, 1, 10_000), default=1000, help="steps of a sampler, 1/dt")
    add("--num-samples", type=number(int, 2, 10**7), default=100_000, help="samples per sampler")
    add("--mu-0", type=number(float, -100, 100), default=1.0, help="mean of the data")
    add(
        "--sigma-0", type=number(float, 0.1, 10), default=0.7, help="standard deviation of the data"
    )
    add("--sigma-q", type=number(float, 0.1, 100), default=7.0, help="std of the noise at t = 1")
    add("--seed", type=number(int, 0, 2**63 - 1), default=0, help="seed of every draw")
    add("--figures-dir", type=Path, default=Path(__file__).parent / "figures", help="their folder")
    args = parser.parse_args(argv)
    try:
        args.figures_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"argument --figures-dir: {error}")
    return args


def save(figure, path):
    """Writes the figure whole or not at all: drawn in memory, written beside, moved into place."""
    image = io.BytesIO()  # Pillow does not notice a full disk, Python does
    figure.savefig(image, format="jpg", dpi=120)
    part = path.with_suffix(".part")
    part.write_bytes(image.getvalue())
    part.replace(path)
    print(f"wrote {path}")


def main(argv=None):
    """Samples, measures, prints, draws.  Exits with status 2 on bad input."""
    args = parse_arguments(argv)
    rng = np.random.default_rng(args.seed)
    data = {"mu_0": args.mu_0, "sigma_0": args.sigma_0, "sigma_q": args.sigma_q}

    x_1 = args.sigma_q * rng.standard_normal(args.num_samples)
    samples = sample(x_1, args.num_steps, rng, **data)

    table = measure_samples(samples, args.num_steps, **data)
    by_steps = measure_error_vs_steps(**data)
    sigma_qs, by_sigma_q = measure_error_vs_sigma_q(mu_0=args.mu_0, sigma_0=args.sigma_0)
    orders = {name: observed_order(by_steps[name]["p_1"]) for name in table}
    best = {name: sigma_qs[np.argmin(by_sigma_q[name, 1000])] for name in table}
    narrow = std_without_noise(args.num_steps, **data)

    report(table, orders, best, narrow, args)

    folder = args.figures_dir
    figure = draw_samples(x_1, samples, table, args.num_steps, **data)
    save(figure, folder / "experiment-0-samples-ddm-ddim-toy-example.jpg")
    save(draw_error_vs_steps(by_steps, table), folder / "experiment-0-error-vs-steps.jpg")
    figure = draw_error_vs_sigma_q(sigma_qs, by_sigma_q, args.sigma_q)
    save(figure, folder / "experiment-0-error-vs-sigma-q.jpg")


if __name__ == "__main__":
    main()
