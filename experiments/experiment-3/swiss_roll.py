"""Experiment 3: a network learns E[x_0 | x_t] on the Swiss roll; DDPM and DDIM sample with it.

Claim. A fully connected ReLU network, trained by least squares to predict x_0 from x_t = x_0 + N(0, sigma_q^2 t I),
learns the denoiser E[x_0 | x_t]; eq. (24) of the tutorial turns it into the reverse mean that Algorithms 1 and 2 need.
The data lies on a curve, so E[x_0 | x_t] is an integral along it (`exact_denoiser`). So the loss has a known floor, the
Bayes error, and the samplers can be run with an ideal denoiser: what still parts its samples from data is not learning.
What to look for in figures/:
  data.jpg, train_loss.jpg   the curve; the loss falls to the Bayes error
  eval_*_samples.jpg         DDPM and DDIM samples over the data; DDIM remembers its start, so the base's error more
  learned-vs-exact.jpg       the learned field lies on the exact one
  error-budget.jpg           distance to the data: how much is base, steps, learning, and chance
Run:  python swiss_roll.py        (python swiss_roll.py --help lists what can be changed)
"""

import argparse
import contextlib
import io
import itertools
import math
import os
import re
import signal
import sys
import zipfile
from functools import partial
from pathlib import Path

if __name__ == "__main__":  # set before the slow imports: Ctrl-C is one line and status 130, always
    signal.signal(signal.SIGINT, lambda *_: (os.write(2, b"interrupted\n"), os._exit(130)))

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import nn
from tqdm import tqdm

MIN_T, MIN_SIGMA_T = 5e-4, 0.002  # the smallest t that is learned; the smallest sigma_t that the quadrature resolves
def curve(theta):
    """The Swiss roll at angles theta in [pi/2, 4 pi], (n,): radius theta / (4 pi).  Returns (n, 2)."""
    return torch.stack([theta.cos(), theta.sin()], dim=1) * theta[:, None] / (4 * math.pi)

def swiss_roll(n, rng):
    """n draws of x_0, theta uniform on [pi/2, 4 pi], no noise, by a torch Generator.  Returns (n, 2)."""
    return curve(math.pi / 2 + 3.5 * math.pi * torch.rand(n, generator=rng, device=rng.device))

def add_noise(x_0, t, sigma_q, rng):
    """x_t = x_0 + N(0, sigma_q^2 t I).  x_0: (n, 2);  t: (n,) or a float.  Returns (n, 2)."""
    sigma_t = sigma_q * torch.as_tensor(t, device=x_0.device).sqrt().reshape(-1, 1)
    return x_0 + sigma_t * torch.randn(x_0.shape, generator=rng, device=rng.device)

# -------------------------------------------- Learning --------------------------------------------
class Denoiser(nn.Module):
    """f(x_t, t), a ReLU network that learns E[x_0 | x_t].

    Preconditioned as in Karras et al. (2022, arXiv 2206.00364, section 5): inputs of unit size, and an output that
    corrects the best linear guess on the scale of that guess's error, so the task has unit size at every t.
    """

    def __init__(self, sigma_q, sigma_data=0.5, width=64, depth=4):
        super().__init__()
        self.sigma_q, self.sigma_data = sigma_q, sigma_data
        widths = [3] + depth * [width]
        hidden = [layer for a, b in zip(widths, widths[1:]) for layer in (nn.Linear(a, b), nn.ReLU())]
        self.layers = nn.Sequential(*hidden, nn.Linear(width, 2))

    def forward(self, x_t, t):
        """x_t: (n, 2);  t: (n,) or a float, 0 < t <= 1.  Returns E[x_0 | x_t] as learned, (n, 2)."""
        sigma_t = self.sigma_q * torch.as_tensor(t, dtype=x_t.dtype, device=x_t.device).sqrt().reshape(-1, 1)
        norm = (sigma_t**2 + self.sigma_data**2).sqrt()
        inputs = torch.cat([x_t / norm, (sigma_t.log() / 2).expand(len(x_t), 1)], dim=1)
        return (self.sigma_data / norm) ** 2 * x_t + self.sigma_data * sigma_t / norm * self.layers(inputs)

def losses_of(denoiser, n, sigma_q, rng, sigma_data=0.5):
    """w(t) |f(x_t, t) - x_0|^2 of n fresh draws, (n,); t log-uniform on [MIN_T, 1], w(t) = 1 / (f's output scale)^2."""
    x_0, t = swiss_roll(n, rng), MIN_T ** torch.rand(n, generator=rng, device=rng.device)
    weight = 1 / (sigma_q**2 * t) + 1 / sigma_data**2
    return weight * (denoiser(add_noise(x_0, t, sigma_q, rng), t) - x_0).square().sum(dim=1)

def train(*, sigma_q, train_steps, batch_size, learning_rate, rng):
    """Least squares on fresh samples.  rng: a torch Generator.  Returns (Denoiser, the loss of each step)."""
    with torch.random.fork_rng(devices=[]):  # nn.Linear draws from global state: seed it, then put it back
        torch.manual_seed(rng.initial_seed())
        denoiser = Denoiser(sigma_q).to(rng.device)
    optimizer = torch.optim.Adam(denoiser.parameters(), fused=rng.device.type != "mps")
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=train_steps)
    losses = torch.empty(train_steps, device=rng.device)
    for step in (progress := tqdm(range(train_steps), desc="training", disable=None)):
        loss = losses_of(denoiser, batch_size, sigma_q, rng).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses[step] = loss.detach()
        if step % 100 == 0:
            progress.set_postfix(loss=f"{loss:.3f}")
    return denoiser.requires_grad_(False), losses.tolist()

# ------------------------------- The reverse mean and the samplers --------------------------------
def reverse_mean(x_t, t, dt, *, denoiser):
    """E[x_{t-dt} | x_t] from E[x_0 | x_t], eq. (24).  x_t: (n, 2) at time t;  0 < dt <= t <= 1.  Returns (n, 2)."""
    return (dt / t) * denoiser(x_t, t) + (1 - dt / t) * x_t

def ddpm(reverse_mean, x_1, num_steps, sigma_q, rng):
    """Algorithm 1 (DDPM): x_{t-dt} = E[x_{t-dt} | x_t] + N(0, sigma_q^2 dt).

    reverse_mean(x_t, t, dt) -> like x_t;  x_1: draws of the base;  num_steps = 1 / dt >= 1 (0: ZeroDivisionError);
    rng: a torch Generator.  Yields num_steps arrays like x_1, the last of them x_0.
    """
    x_t, dt = x_1, 1 / num_steps
    for k in range(num_steps, 0, -1):  # t = k dt
        noise = torch.randn(x_t.shape, generator=rng, device=rng.device)
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

# ------------------------- The check: the denoiser that no network can beat -------------------------
def exact_denoiser(x_t, t, *, sigma_q):
    """E[x_0 | x_t], the integral of c(theta) p(theta | x_t) along the curve c, by Gauss-Legendre quadrature.

    x_t: (n, 2);  t: (n,) or a float.  Returns (n, 2) in x_t's precision; the quadrature's own error is below 1e-6.
    Raises ValueError where sigma_t < MIN_SIGMA_T, which would take too many nodes.
    """
    variance = sigma_q**2 * torch.as_tensor(t, dtype=x_t.dtype, device=x_t.device).reshape(-1, 1)
    if variance.min() < MIN_SIGMA_T**2:
        raise ValueError(f"sigma_t is below {MIN_SIGMA_T:g}")
    # 16 nodes a panel. Panels are even in theta^2, nearly so in arc length (6.3 in all), and at most 5 sigma_t long.
    nodes, weights = np.polynomial.legendre.leggauss(16)
    edges = np.linspace((math.pi / 2) ** 2, (4 * math.pi) ** 2, math.ceil(2 + 1.3 / float(variance.min()) ** 0.5))
    theta = np.sqrt((edges[1:] + edges[:-1])[:, None] / 2 + np.diff(edges)[:, None] / 2 * nodes)
    log_w, c = torch.tensor(np.log(weights / theta).ravel()).to(x_t), curve(torch.tensor(theta.ravel())).to(x_t)
    rows, half_square = 2**20 // len(c) + 1, c.square().sum(dim=1) / 2  # a few rows at a time, to stay in cache
    mean_x_0, variance = torch.empty_like(x_t), variance.expand(len(x_t), 1)
    for x, v, y in zip(x_t.split(rows), variance.split(rows), mean_x_0.split(rows)):
        y[:] = ((x @ c.T - half_square) / v + log_w).softmax(dim=1) @ c  # -|x - c|^2 / (2 v) but for a term without c
    return mean_x_0

def excess_error(denoiser, t, sigma_q, rng, n=20_000):
    """(E|f - exact|^2, Bayes error E|x_0 - exact|^2) at time t, from n draws; unweighted."""
    x_0 = swiss_roll(n, rng)
    x_t = add_noise(x_0, t, sigma_q, rng)
    exact = exact_denoiser(x_t.double(), t, sigma_q=sigma_q)
    return [float(error.square().sum(dim=1).mean()) for error in (denoiser(x_t, t) - exact, x_0 - exact)]

def sliced_wasserstein(a, b, num_directions=64):
    """Sliced 2-Wasserstein distance between two sets of n points, (n, 2) each (Bonneel et al., 2015); a float."""
    angles = math.pi * torch.arange(num_directions, device=a.device) / num_directions
    directions = torch.stack([angles.cos(), angles.sin()], dim=1)
    squares = [((a @ d).sort().values - (b @ d).sort().values).square().mean() for d in directions]
    return float(torch.stack(squares).mean().sqrt())

# ------------------------------------------ The figures -------------------------------------------
def plot_points(panels):
    """One panel per title.  panels: {title: {label: (points, color, size)}}."""
    fig, axes = plt.subplots(len(panels), 1, figsize=(5, 0.4 + 4.6 * len(panels)), layout="constrained", squeeze=False)
    for ax, (title, layers) in zip(axes[:, 0], panels.items()):
        for label, (points, color, size) in layers.items():
            ax.scatter(*points[:4000].T, s=size, color=color, label=label)
        ax.set(xlabel="$x$", ylabel="$y$", aspect="equal", title=title)
        ax.legend(fontsize=10, loc="upper right", markerscale=2)
    return fig

def plot_loss(losses, bayes):
    fig, ax = plt.subplots(figsize=(6, 4.5), layout="constrained")
    window = max(1, len(losses) // 50)
    means = np.convolve(losses, np.ones(window) / window, mode="valid")
    ax.semilogy(np.arange(1, len(losses) + 1), losses, ".", color="0.8", ms=2, label="loss of each step")
    ax.semilogy(np.arange(window, len(losses) + 1), means, "C0.-", ms=1, label=f"mean of {window} steps")
    if math.isfinite(bayes):
        ax.axhline(bayes, color="k", ls="--", lw=1.2, label=f"Bayes error, {bayes:.3f}: no network can beat it")
    ax.set(xlabel="training step", ylabel="weighted squared error", title="Training loss and the Bayes error")
    ax.legend(fontsize=11)
    return fig

def plot_fields(denoisers, sigma_q, excesses, rng):
    """For three t: E[x_0 | x_t] - x_t as arrows from draws of x_t, learned on exact."""
    fig, axes = plt.subplots(3, 1, figsize=(5, 14), layout="constrained")
    for ax, t in zip(axes, (0.01, 0.1, 1.0)):
        x_t = add_noise(swiss_roll(150 if t < 1 else 40, rng), t, sigma_q, rng)
        for name, color, width in [("exact", "0.65", 0.012), ("learned", "C0", 0.0035)][-len(denoisers) :]:
            style = {"color": color, "width": width, "angles": "xy", "scale_units": "xy", "scale": 1}
            ax.quiver(*x_t.T.cpu(), *(denoisers[name](x_t, t) - x_t).T.cpu(), label=name, **style)
        ax.plot(*curve(torch.linspace(math.pi / 2, 4 * math.pi, 300)).T, "k", lw=0.8, label="the data")
        percent = f": excess error {excesses[t]:.2%}" if t in excesses else ""
        ax.set(xlabel="$x$", ylabel="$y$", aspect="equal", title=f"$E[x_0\\,|\\,x_t] - x_t$ at t = {t:g}{percent}")
    fig.legend(*ax.get_legend_handles_labels(), fontsize=11, loc="outside upper center", ncols=3)
    return fig

def plot_budget(distances, floor, spread):
    """distances: {(denoiser, start, sampler): sliced distance to data}."""
    fig, ax = plt.subplots(figsize=(6, 5), layout="constrained")
    runs = list(dict.fromkeys(key[1:] for key in distances))
    for which, marker in [("learned", "o"), ("exact", "x")]:
        heights = [distances.get((which, *run), np.nan) for run in runs]
        ax.semilogy(range(len(runs)), heights, marker, ms=10, mew=2, label=f"{which} denoiser")
    ax.axhspan(floor - spread, floor + spread, color="0.88")
    ax.axhline(floor, color="k", ls="--", lw=1, label=f"between two data sets: {floor:.4f} $\\pm$ {spread:.4f} (s.d.)")
    ax.set_xticks(range(len(runs)), [f"{sampler}\nfrom {start}" for start, sampler in runs])
    ax.set(ylabel="sliced $W_2$ to the data", title="Distance to data: base or $p_1$, learned or not", xlim=(-0.5, 3.5))
    ax.legend(fontsize=10)
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

def load(path):
    """The Denoiser that --checkpoint saved (no code in it is run), with `losses` and `settings`.  Else: ValueError."""
    try:
        if zipfile.ZipFile(path).testzip() is not None:
            raise ValueError("some bytes are not as they were written")
        saved = torch.load(path, map_location="cpu", weights_only=True)
        denoiser = Denoiser(saved["settings"]["sigma_q"])
        denoiser.load_state_dict(saved["network"])
        denoiser.losses, denoiser.settings = [float(loss) for loss in saved["losses"]], dict(saved["settings"])
    except Exception as error:  # zipfile and torch raise many kinds for a broken file
        raise ValueError(f"'{path}' is not a whole checkpoint of {Path(__file__).name}") from error
    return denoiser.requires_grad_(False)

def run(args, settings, denoiser):
    torch.set_num_threads(1)  # layers this small gain little from two, and the result must not hang on how many
    rng, sigma_q, n = torch.Generator(args.device).manual_seed(args.seed), args.sigma_q, args.num_samples
    training = {key: settings[key] for key in settings if key != "seed"}
    denoiser, losses = (denoiser.to(args.device), denoiser.losses) if denoiser else train(**training, rng=rng)
    if not math.isfinite(sum(losses)):
        sys.exit("the training diverged; try a smaller --learning-rate")
    if args.checkpoint and not args.checkpoint.exists():
        buffer, saved = io.BytesIO(), {"settings": settings, "losses": losses, "network": denoiser.state_dict()}
        torch.save(saved, buffer)
        write_whole(args.checkpoint, buffer.getvalue())
    rng.manual_seed(args.seed ^ 1)  # so that what follows is the same for a network trained now or loaded
    denoisers, bayes, excesses = {"learned": denoiser}, torch.tensor([math.nan]), {}
    if sigma_q * MIN_T**0.5 >= MIN_SIGMA_T:
        denoisers["exact"] = partial(exact_denoiser, sigma_q=sigma_q)
        bayes = losses_of(denoisers["exact"], 200_000, sigma_q, rng).cpu()
        for t in (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0):
            excess, floor = excess_error(denoiser, t, sigma_q, rng)
            excesses[t] = excess / floor
            print(f"t = {t:<5g}  Bayes error {floor:9.3g}   the learned denoiser's excess over it {excesses[t]:8.3%}")
        print(f"mean over t {np.mean(list(excesses.values())):59.3%}")
    floor = f"{bayes.mean():.4f} +- {bayes.std(correction=0) / len(bayes) ** 0.5:.4f} (s.e.)"
    print(f"loss of the last 500 steps {np.mean(losses[-500:]):.4f}; Bayes error {floor if excesses else 'unresolved'}")
    data = swiss_roll(n, rng)
    noise = sigma_q * torch.randn(data.shape, generator=rng, device=rng.device)
    starts, samples = {"base": noise, "$p_1$": data + noise}, {}
    for which, start, name in itertools.product(denoisers, starts, ("DDPM", "DDIM")):
        mean, x_1 = partial(reverse_mean, denoiser=denoisers[which]), starts[start]
        steps = ddpm(mean, x_1, args.num_steps, sigma_q, rng) if name == "DDPM" else ddim(mean, x_1, args.num_steps)
        for x_t in tqdm(steps, desc=f"{name}, {which}, from {start}", total=args.num_steps, disable=None):
            samples[which, start, name] = x_t
    fresh = [swiss_roll(n, rng) for _ in range(11)]
    floors = np.array([sliced_wasserstein(a, b) for a, b in zip(fresh, fresh[1:])])
    floor = (floors**2).mean() ** 0.5
    distances = {key: np.mean([sliced_wasserstein(x, b) ** 2 for b in fresh]) ** 0.5 for key, x in samples.items()}
    print(f"sliced W_2 to data, {n} samples, {args.num_steps} steps; of data {floor:.4f} +- {floors.std():.4f} (s.d.)")
    for (which, start, name), distance in distances.items():
        print(f"{name} from {start.strip('$'):<4}  {which:<7} denoiser  {distance:.4f} = {distance / floor:.2f} x that")
    plt.rcParams.update({"font.size": 12, "axes.titlesize": 12})
    data, samples = data.cpu(), {key: x_0.cpu() for key, x_0 in samples.items()}
    figures = {"data.jpg": plot_points({"The data: a Swiss roll, no noise": {"$x_0$": (data, "0.3", 3)}})}
    figures["train_loss.jpg"] = plot_loss(losses, float(bayes.mean()))
    figures["learned-vs-exact.jpg"] = plot_fields(denoisers, sigma_q, excesses, rng)
    figures["error-budget.jpg"] = plot_budget(distances, floor, floors.std())
    for name in ("DDPM", "DDIM"):
        layers = {f"{name} from {start}": (samples["learned", start, name], "C0", 1.5) for start in starts}
        panels = {title: {"data": (data, "0.8", 12), "samples": layer} for title, layer in layers.items()}
        figures[f"eval_{name.lower()}_samples.jpg"] = plot_points(panels)
    for name, fig in figures.items():
        buffer = io.BytesIO()  # not the file itself: a full disk would go unnoticed
        fig.savefig(buffer, format="jpg", dpi=100)
        write_whole(args.figures_dir / name, buffer.getvalue())
    plt.show() if args.show else plt.close("all")

def main(argv=None):
    """Learn, sample, hold both against the exact, write the figures.  Exits with 2 on bad input, 1 on a fault."""
    parser = argparse.ArgumentParser(
        description="Learn E[x_0 | x_t] on the Swiss roll, sample with DDPM and DDIM, and hold both against the exact.",
        epilog="what happens if ...\n  little is learned?     python swiss_roll.py --train-steps 300\n"
        "  few steps are taken?   python swiss_roll.py --num-steps 20 --checkpoint roll.pt (then 200: it is trained)\n"
        "  the base is wider?     python swiss_roll.py --sigma-q 4",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {' '.join(message.split())}\n")  # one line, no usage
    add = parser.add_argument
    parser._negative_number_matcher = re.compile(r"-[^-h]")  # -1e-3 is a value, not an option
    numbers = {  # option: type, lowest, highest, default, meaning
        "--num-steps": (int, 1, 2000, 1000, "number of steps of a sampler, 1/dt"),
        "--num-samples": (int, 1, 10**6, 10_000, "number of samples per sampler"),
        "--sigma-q": (float, 1e-6, 1e6, 1.0, "sigma_q, standard deviation of the noise at t = 1"),
        "--train-steps": (int, 1, 10**6, 8500, "number of steps of the optimizer"),
        "--batch-size": (int, 1, 2**16, 1024, "number of fresh samples in each of them"),
        "--learning-rate": (float, 1e-9, 1.0, 0.01, "largest rate of the one-cycle schedule"),
        "--seed": (int, 0, 2**63 - 1, 0, "seed of every draw"),
    }
    for name, (kind, _, _, default, text) in numbers.items():
        add(name, type=kind, default=default, metavar="X", help=f"{text} (default: {default})")
    devices = ["cpu"] + ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available()
    add("--device", choices=devices, default="cpu", help="where to train and sample (default: cpu)")
    add("--checkpoint", type=Path, metavar="FILE", help="save the trained network there; if it exists, load it")
    add("--figures-dir", type=Path, default=Path(__file__).parent / "figures", help="default: beside the script")
    add("--show", action="store_true", help="open the figures in windows as well")
    args, denoiser = parser.parse_args(argv), None
    for name, (kind, low, high, _, _) in numbers.items():
        if not low <= vars(args)[name[2:].replace("-", "_")] <= high:  # NaN is not
            parser.error(f"argument {name}: takes a{' whole' * (kind is int)} number from {low} to {high}")
    plt.switch_backend(plt.get_backend() if args.show else "agg")
    if args.show and plt.get_backend().lower() == "agg":
        parser.error("argument --show: there is no display to open windows on")
    settings = {name: vars(args)[name] for name in ("sigma_q", "train_steps", "batch_size", "learning_rate", "seed")}
    if (file := args.checkpoint) and os.path.exists(file):  # False for a name that is too long
        try:
            denoiser = load(file)
        except ValueError as error:
            parser.error(f"argument --checkpoint: {error}")
        for name in (name for name in settings if denoiser.settings.get(name) != settings[name]):
            trained = f"--{name.replace('_', '-')} {denoiser.settings.get(name)}, not {settings[name]}"
            parser.error(f"argument --checkpoint: '{file}' was trained with {trained}")
    elif file and not (os.access(f"{file.parent}/.", os.W_OK) and len(os.fsencode(file.name)) < 240):
        parser.error(f"argument --checkpoint: takes a file in a folder that can be written to, not '{file}'")
    with contextlib.suppress(OSError):
        args.figures_dir.mkdir(parents=True, exist_ok=True)
    if not os.access(f"{args.figures_dir}/.", os.W_OK):
        parser.error(f"argument --figures-dir: takes a folder that can be written to, not '{args.figures_dir}'")
    try:
        run(args, settings, denoiser)
    except OSError as error:
        sys.exit(f"{parser.prog}: {error}")

if __name__ == "__main__":  # from here on, Ctrl-C also removes what is half written; a second one changes nothing
    ignore = partial(signal.signal, signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGINT, lambda *_: (ignore(), os.write(2, b"interrupted\n"), sys.exit(130)))
    main()
