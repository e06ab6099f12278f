"""Experiment 0: DDPM and DDIM on one-dimensional Gaussian data, where nothing has to be learned.

Claim. If x_0 ~ N(mu_0, sigma_0^2) and x_t = x_0 + N(0, sigma_q^2 t), the reverse mean
E[x_{t-dt} | x_t] is known exactly, so Algorithms 1 and 2 of the tutorial can be run with no error
but their own. Both turn samples of N(0, sigma_q^2) into samples of p_0, almost.

How far is almost? Every step is affine in x_t (plus Gaussian noise), so the output is exactly
Gaussian, with a mean and a standard deviation that follow a recursion (`ddpm_law`, `ddim_law`).
Two things keep it from p_0, and they pull sigma_q in opposite directions:
  the base    x_1 starts from N(0, sigma_q^2), not from p_1 = N(mu_0, sigma_0^2 + sigma_q^2);
              this does not go away with dt, only with a larger sigma_q (`ddpm_floor`, `ddim_floor`);
  the steps   each step of size dt is approximate; this goes away with dt, and grows with sigma_q.

What to look for in figures/:
  experiment-0-samples-ddm-ddim-toy-example.jpg   the histograms sit on their law, not quite on p_0
  experiment-0-error-vs-steps.jpg                 lines that fall, and lines that meet their floor
  experiment-0-error-vs-sigma-q.jpg               the U-shape; the default sigma_q, 7, lies between
                                                  the minima of DDPM and DDIM at 1000 steps

Run:  python gaussian.py        (python gaussian.py --help lists what can be changed)
"""

import argparse
import contextlib
import io
import os
import re
import signal
import sys
import tempfile
from functools import partial
from pathlib import Path

if __name__ == "__main__":  # set before the slow imports: Ctrl-C is one line and status 130, always
    signal.signal(signal.SIGINT, lambda *_: (os.write(2, b"interrupted\n"), os._exit(130)))

import matplotlib.pyplot as plt
import numpy as np
from tqdm import tqdm

# ---------------------------------------- The reverse mean ----------------------------------------
# (x_{t-dt}, x_t) is jointly Gaussian: variances sigma_0^2 + sigma_q^2 (t - dt)
# and sigma_0^2 + sigma_q^2 t, covariance equal to the first. The rest is linear regression.

def reverse_mean(x_t, t, dt, *, mu_0, sigma_0, sigma_q):
    """E[x_{t-dt} | x_t] for x_0 ~ N(mu_0, sigma_0^2); exact for every dt.

    x_t: any shape, values at time t;  0 < dt <= t <= 1.  Returns the shape of x_t.
    """
    variance_t = sigma_0**2 + sigma_q**2 * t
    return (sigma_0**2 + sigma_q**2 * (t - dt)) / variance_t * x_t + sigma_q**2 * dt / variance_t * mu_0

# --------------- The samplers. They know nothing of the data but the reverse mean. ----------------
def ddpm(reverse_mean, x_1, num_steps, sigma_q, rng):
    """Algorithm 1 (DDPM): x_{t-dt} = E[x_{t-dt} | x_t] + N(0, sigma_q^2 dt).

    reverse_mean(x_t, t, dt) -> like x_t;  x_1: draws of the base;  num_steps = 1 / dt >= 1 (0: ZeroDivisionError);
    rng: a NumPy Generator.  Yields num_steps arrays like x_1, the last of them x_0.
    """
    x_t, dt = x_1, 1 / num_steps
    for k in range(num_steps, 0, -1):  # t = k dt
        noise = rng.standard_normal(x_t.shape)
        x_t = reverse_mean(x_t, k / num_steps, dt) + sigma_q * dt**0.5 * noise
        yield x_t

def ddim(reverse_mean, x_1, num_steps):
    """Algorithm 2 (DDIM): x_{t-dt} = x_t + lam (E[x_{t-dt} | x_t] - x_t), lam = sigma_t / (sigma_{t-dt} + sigma_t).

    reverse_mean(x_t, t, dt) -> like x_t;  x_1: draws of the base;  num_steps = 1 / dt >= 1 (0: ZeroDivisionError).
    Yields num_steps arrays like x_1, the last of them x_0.  As sigma_t = sigma_q sqrt(t), sigma_q cancels in lam.
    """
    x_t, dt = x_1, 1 / num_steps
    for k in range(num_steps, 0, -1):  # t = k dt
        lam = k**0.5 / ((k - 1) ** 0.5 + k**0.5)
        x_t = x_t + lam * (reverse_mean(x_t, k / num_steps, dt) - x_t)
        yield x_t

# -------------- The check. What the samplers must produce, without drawing a sample. --------------
def ddpm_law(num_steps, mean_1, std_1, *, mu_0, sigma_0, sigma_q, noise=1.0):
    """Exact (mean, std) of what `ddpm` returns when x_1 ~ N(mean_1, std_1^2).

    A step maps the mean through the reverse mean, and the variance to slope^2 variance +
    sigma_q^2 dt, where slope = d reverse_mean / d x_t.  noise: factor on the noise; 0 leaves it out.
    All arguments but num_steps may be arrays that broadcast.
    """
    mean, variance, dt = mean_1, std_1**2, 1 / num_steps
    for k in range(num_steps, 0, -1):
        t = k / num_steps
        slope = reverse_mean(1.0, t, dt, mu_0=0.0, sigma_0=sigma_0, sigma_q=sigma_q)
        mean = reverse_mean(mean, t, dt, mu_0=mu_0, sigma_0=sigma_0, sigma_q=sigma_q)
        variance = slope**2 * variance + noise**2 * sigma_q**2 * dt
    return mean, variance**0.5

def ddim_law(num_steps, mean_1, std_1, *, mu_0, sigma_0, sigma_q):
    """Exact (mean, std) of what `ddim` returns when x_1 ~ N(mean_1, std_1^2).

    A step is x_t -> (1 - lam + lam slope) x_t + constant, so the std takes that factor.
    All arguments but num_steps may be arrays that broadcast.
    """
    mean, std, dt = mean_1, std_1, 1 / num_steps
    for k in range(num_steps, 0, -1):
        t, lam = k / num_steps, k**0.5 / ((k - 1) ** 0.5 + k**0.5)
        slope = reverse_mean(1.0, t, dt, mu_0=0.0, sigma_0=sigma_0, sigma_q=sigma_q)
        mean = mean + lam * (reverse_mean(mean, t, dt, mu_0=mu_0, sigma_0=sigma_0, sigma_q=sigma_q) - mean)
        std = (1 - lam + lam * slope) * std
    return mean, std

def wasserstein(mean_a, std_a, mean_b, std_b):
    """2-Wasserstein distance between N(mean_a, std_a^2) and N(mean_b, std_b^2)."""
    return np.hypot(mean_a - mean_b, std_a - std_b)

def ddpm_floor(*, mu_0, sigma_0, sigma_q):
    """(|bias|, |std error|) of DDPM started from N(0, sigma_q^2), in the limit dt -> 0.

    The slopes multiply to r = sigma_0^2 / (sigma_0^2 + sigma_q^2) over a whole run. So the base's
    mean error mu_0 comes out as mu_0 r, and its missing variance sigma_0^2 as sigma_0^2 r^2: the
    std ends short by sigma_0 (1 - sqrt(1 - r^2)).
    """
    r = sigma_0**2 / (sigma_0**2 + sigma_q**2)
    return abs(mu_0) * r, sigma_0 * r**2 / (1 + (1 - r**2) ** 0.5)

def ddim_floor(*, mu_0, sigma_0, sigma_q):
    """(|bias|, |std error|) of DDIM started from N(0, sigma_q^2), in the limit dt -> 0.

    The limit is the probability-flow ODE, dx/dt = sigma_q^2 (x - mu_0) / (2 (sigma_0^2 + sigma_q^2 t)).
    Over a whole run it shrinks by sigma_0 / std_1, std_1 = sqrt(sigma_0^2 + sigma_q^2): the mean's error
    mu_0, and the std, which starts at sigma_q and so ends short by sigma_0 (1 - sigma_q / std_1).
    """
    std_1 = np.hypot(sigma_0, sigma_q)
    return abs(mu_0) * sigma_0 / std_1, sigma_0 * sigma_0**2 / (std_1 * (std_1 + sigma_q))

# ------------------------------------------ The figures -------------------------------------------
def gaussian_density(x, mean, std):
    return np.exp(-0.5 * ((x - mean) / std) ** 2) / (std * (2 * np.pi) ** 0.5)

def plot_samples(samples, laws, x_1, num_steps, *, mu_0, sigma_0, sigma_q):
    """Base density, then each sampler's histogram with its law and p_0.  samples, laws: by sampler."""
    fig, axes = plt.subplots(3, 1, figsize=(6, 8.4), layout="constrained")
    spread = 4 * np.hypot(sigma_0, sigma_q) + abs(mu_0)
    x = np.linspace(-spread, spread, 800)
    axes[0].hist(x_1, bins=120, range=(-spread, spread), density=True, color="0.8", label="$x_1$ drawn")
    axes[0].plot(x, gaussian_density(x, 0, sigma_q), "C0", label=r"base $N(0, \sigma_q^2)$")
    axes[0].plot(x, gaussian_density(x, mu_0, np.hypot(sigma_0, sigma_q)), "k--", label="true $p_1$")
    axes[0].set_title("Sampling starts from the base, which is not quite $p_1$")
    for ax, (name, x_0), color in zip(axes[1:], samples.items(), ["C0", "C1"]):
        mean, std = laws[name]
        left = min(mu_0 - 4.5 * sigma_0, mean - 4.5 * std)
        right = max(mu_0 + 4.5 * sigma_0, mean + 4.5 * std)
        x = np.linspace(left, right, 800)
        ax.hist(x_0, bins=100, range=(left, right), density=True, color="0.8", label="$x_0$ sampled")
        ax.plot(x, gaussian_density(x, mean, std), color, label="law of the sampler")
        ax.plot(x, gaussian_density(x, mu_0, sigma_0), "k--", label="target $p_0$")
        off = wasserstein(mean, std, mu_0, sigma_0)
        ax.set_title(f"{name}, {num_steps} steps: law is {off:.2g} from $p_0$ ($W_2$)")
    for ax in axes:
        ax.set(xlabel="$x$", ylabel="density")
        ax.legend(fontsize=10, loc="upper left")
        ax.margins(x=0)
        ax.set_ylim(0, 1.25 * ax.get_ylim()[1])
    return fig

def plot_error_vs_steps(grid, errors, floors):
    """W_2 of the law to p_0.  errors: sampler -> (len(grid), 2), from the base and from p_1."""
    fig, ax = plt.subplots(figsize=(6, 7), layout="constrained")
    ddpm_bias, ddim_bias = r"$\mu_0\sigma_0^2/(\sigma_0^2+\sigma_q^2)$", r"$\mu_0\sigma_0/\sqrt{\sigma_0^2+\sigma_q^2}$"
    for name, formula, color in [("DDPM", ddpm_bias, "C0"), ("DDIM", ddim_bias, "C1")]:
        bias, std_error = floors[name]
        ax.loglog(grid, errors[name][:, 0], color, label=f"{name} from the base")
        ax.loglog(grid, errors[name][:, 1], color, ls="--", label=f"{name} from $p_1$")
        label = f"its floor: |bias| {formula} = {bias:.2g}, |std error| {std_error:.1g}"
        ax.axhline(np.hypot(bias, std_error), color=color, lw=1, ls=":", label=label)
    ax.loglog(grid, errors["no noise"][:, 1], "C2", ls="-.", label="DDPM with the noise left out, from $p_1$")
    ax.set(xlabel=r"num_steps $= 1/\Delta t$", ylabel="$W_2$(law of the sampler, $p_0$)")
    ax.set_title("From $p_1$ the error falls with $\\Delta t$; from the\nbase it meets a floor; without noise it stays")
    ax.legend(fontsize=10, loc="upper center", bbox_to_anchor=(0.45, -0.13))
    ax.grid(alpha=0.3)
    return fig

def plot_error_vs_sigma_q(sigma_qs, curves, chosen):
    """W_2 of the law to p_0 against sigma_q.  curves: {(sampler, num_steps): errors}."""
    fig, ax = plt.subplots(figsize=(6, 5.4), layout="constrained")
    for (name, num_steps), errors in curves.items():
        dash = {"DDPM": "-", "DDIM": "--"}[name]
        color = plt.get_cmap("viridis")({10: 0.85, 100: 0.5, 1000: 0.1}[num_steps])
        ax.loglog(sigma_qs, errors, dash, color=color, label=f"{name}, {num_steps} steps")
        best = np.argmin(errors)
        ax.plot(sigma_qs[best], errors[best], "o" if name == "DDPM" else "s", color=color, ms=8)
    ax.axvline(chosen, color="0.4", lw=1, ls=":", label=rf"this run's $\sigma_q$ = {chosen:g}")
    ax.set(xlabel=r"$\sigma_q$", ylabel="$W_2$(law of the sampler, $p_0$)")
    ax.set_title("Too small: the base is wrong. Too large: the\nsteps are. Marks show the best $\\sigma_q$ between")
    ax.legend(fontsize=9, ncols=2)
    ax.grid(alpha=0.3)
    return fig

# ---------------------------------------- The command line ----------------------------------------
def write_whole(path, data):
    """Writes bytes beside `path`, and moves that file into place only once it is complete."""
    part = path.with_name(f".part-{path.name}")
    try:
        part.write_bytes(data)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    print(f"wrote {path}")

def between(kind, low, high):
    """An argparse type: an int or a float in [low, high]; NaN and infinity are in no such range."""

    def parse(text):
        with contextlib.suppress(ValueError):
            if low <= kind(text) <= high:
                return kind(text)
        name = {int: "a whole number", float: "a number"}[kind]
        raise argparse.ArgumentTypeError(f"takes {name} from {low} to {high}, not {text!r}")

    return parse

def parse_arguments(argv):
    parser = argparse.ArgumentParser(
        description="DDPM and DDIM on 1-D Gaussian data, with the exact law of what they return.",
        epilog="what happens if ...\n"
        "  one step is taken?             python gaussian.py --num-steps 1\n"
        "  the base is too narrow?        python gaussian.py --sigma-q 1\n"
        "  it is too wide for the steps?  python gaussian.py --sigma-q 50 --num-steps 100",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {' '.join(message.split())}\n")  # one line, no usage
    parser._negative_number_matcher = re.compile(r"-[^-h]")  # -1e6 is a value, not an option

    def add(name, kind, default, text):
        parser.add_argument(name, type=kind, default=default, metavar="X", help=f"{text} (default: %(default)s)")

    add("--num-steps", between(int, 1, 10_000), 1000, "number of steps, 1/dt")
    add("--num-samples", between(int, 1, 10**7), 100_000, "number of samples per sampler")
    add("--mu-0", between(float, -1e6, 1e6), 1.0, "mu_0, mean of the data")
    add("--sigma-0", between(float, 1e-6, 1e6), 0.7, "sigma_0, standard deviation of the data")
    add("--sigma-q", between(float, 1e-6, 1e6), 7.0, "sigma_q, standard deviation of the noise at t = 1")
    add("--seed", between(int, 0, 2**63 - 1), 0, "seed of every draw")
    folder = Path(__file__).parent / "figures"
    text = "folder the figures go to (default: figures, beside the script)"
    parser.add_argument("--figures-dir", type=Path, default=folder, metavar="DIR", help=text)
    parser.add_argument("--show", action="store_true", help="open the figures in windows as well")
    args = parser.parse_args(argv)
    if not args.show:
        plt.switch_backend("agg")
    elif plt.get_backend().lower() == "agg":
        parser.error("argument --show: there is no display to open windows on")
    try:
        args.figures_dir.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=args.figures_dir).close()
    except OSError as error:
        parser.error(f"argument --figures-dir: takes a folder to write to, not '{args.figures_dir}' ({error.strerror})")
    return args

def run(args):
    rng = np.random.default_rng(args.seed)
    data = {"mu_0": args.mu_0, "sigma_0": args.sigma_0, "sigma_q": args.sigma_q}
    p_0, p_1 = (args.mu_0, args.sigma_0), (args.mu_0, np.hypot(args.sigma_0, args.sigma_q))
    base = (0.0, args.sigma_q)

    x_1 = args.sigma_q * rng.standard_normal(args.num_samples)
    mean = partial(reverse_mean, **data)
    runs = {"DDPM": ddpm(mean, x_1, args.num_steps, args.sigma_q, rng), "DDIM": ddim(mean, x_1, args.num_steps)}
    samples = {}
    for name, steps in runs.items():
        for x_t in tqdm(steps, desc=name, total=args.num_steps, disable=None):
            samples[name] = x_t  # only the last one is kept: x_0

    laws = {"DDPM": ddpm_law, "DDIM": ddim_law, "no noise": partial(ddpm_law, noise=0.0)}
    floors = {"DDPM": ddpm_floor(**data), "DDIM": ddim_floor(**data)}
    outputs = {name: laws[name](args.num_steps, *base, **data) for name in samples}
    grid = np.unique(np.logspace(0, 4, 33).round().astype(int))
    starts = [np.array(pair) for pair in zip(base, p_1)]  # means and stds of both starts: one recursion for the two
    errors = {name: np.array([wasserstein(*law(n, *starts, **data), *p_0) for n in grid]) for name, law in laws.items()}
    sigma_qs = args.sigma_0 * np.logspace(-1, 3, 161)
    by_sigma_q = {
        (name, n): wasserstein(*laws[name](n, 0.0, sigma_qs, **{**data, "sigma_q": sigma_qs}), *p_0)
        for name in samples
        for n in (10, 100, 1000)
    }

    print(f"{args.num_samples} samples, {args.num_steps} steps; p_0 has mean {p_0[0]:g}, std {p_0[1]:g}")
    print("         sampled mean +- s.e.      exact      sampled std +- s.e.      exact    W_2(law, p_0)    as dt -> 0")
    for name, x_0 in samples.items():
        (exact_mean, exact_std), root_n = outputs[name], args.num_samples**0.5
        print(f"{name} {x_0.mean():12.5g} +- {exact_std / root_n:<8.2g} {exact_mean:10.5g}", end=" ")
        print(f"{x_0.std():13.5g} +- {exact_std / (2**0.5 * root_n):<8.2g} {exact_std:10.5g}", end=" ")
        print(f"{wasserstein(exact_mean, exact_std, *p_0):15.4g} {np.hypot(*floors[name]):15.4g}")
    for name in samples:
        order = -np.polyfit(np.log(grid[grid >= 1000]), np.log(errors[name][grid >= 1000, 1] + 1e-300), 1)[0]
        best = sigma_qs[np.argmin(by_sigma_q[name, 1000])]
        print(f"{name}  from p_1, error ~ dt^{order:.2f} (1000 to 10000 steps); best sigma_q at 1000 steps: {best:.1f}")
    lost = laws["no noise"](args.num_steps, *p_1, **data)[1]
    print(f"DDPM with the noise left out, from p_1, ends with std {lost:.4g}, not {p_0[1]:g}")

    plt.rcParams.update({"font.size": 12, "axes.titlesize": 12})
    figures = {
        "experiment-0-samples-ddm-ddim-toy-example.jpg": plot_samples(samples, outputs, x_1, args.num_steps, **data),
        "experiment-0-error-vs-steps.jpg": plot_error_vs_steps(grid, errors, floors),
        "experiment-0-error-vs-sigma-q.jpg": plot_error_vs_sigma_q(sigma_qs, by_sigma_q, args.sigma_q),
    }
    for name, fig in figures.items():
        buffer = io.BytesIO()  # not the file itself: a full disk would go unnoticed
        fig.savefig(buffer, format="jpg", dpi=120)
        write_whole(args.figures_dir / name, buffer.getvalue())
    if args.show:
        plt.show()
    plt.close("all")

def main(argv=None):
    """Sample, hold the samples against their law, write the figures.  Exits with 2 on bad input, 1 on a full disk."""
    args = parse_arguments(argv)
    try:
        run(args)
    except OSError as error:
        print(f"{Path(__file__).name}: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":  # from here on, Ctrl-C also removes what is half written; a second one changes nothing
    ignore = partial(signal.signal, signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGINT, lambda *_: (ignore(), os.write(2, b"interrupted\n"), sys.exit(130)))
    main()
