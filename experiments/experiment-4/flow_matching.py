"""Experiment 4: flow matching; a network learns the velocity that carries an annulus to a spiral.

Claim. Draw x_0 from the spiral and x_1 from the annulus, independently, and move each pair on a straight line,
x_t = t x_1 + (1 - t) x_0, at velocity x_0 - x_1 (the linear pointwise flow). A network trained by least squares to
predict x_0 - x_1 from (x_t, t) learns the marginal velocity v_t(x) = E[x_0 - x_1 | x_t = x] (Pseudocode 4), and
x_{t-dt} = x_t + v_t(x_t) dt from t = 1 to dt carries the annulus to the spiral (Pseudocode 5).
Both distributions are simple enough for v_t to be an integral over the spiral's angle and the annulus's radius, the
other angle being done in closed form with Bessel functions (`exact_velocity`).
What to look for in figures/:
  data.jpg           the annulus, the spiral
  train_loss.jpg     the loss falls to its irreducible part, the variance of x_0 - x_1 given x_t
  scatter.gif        the points flow from annulus to spiral, coloured by where they started
  trajectories.jpg   their paths, and the learned velocity on top of the exact one at several t
Run:  python flow_matching.py        (python flow_matching.py --help lists what can be changed)
"""

import argparse
import contextlib
import io
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
from matplotlib.animation import PillowWriter
from torch import nn
from tqdm import tqdm

INNER, OUTER, TURNS, NOISE = 2.5, 3.0, 3, 0.1  # radii of the annulus; turns of the spiral and its noise
def annulus(n, rng):
    """n draws of x_1: angle uniform, radius uniform on [2.5, 3].  rng: a torch Generator.  Returns (n, 2)."""
    angle, radius = torch.rand((2, n), generator=rng, device=rng.device)
    angle, radius = 2 * math.pi * angle, INNER + (OUTER - INNER) * radius
    return torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1)

def curve(theta):
    """The spiral's centre line at angles theta in [0, 6 pi], (n,): radius theta / (2 pi).  Returns (n, 2)."""
    return torch.stack([theta.cos(), theta.sin()], dim=1) * theta[:, None] / (2 * math.pi)

def spiral(n, rng):
    """n draws of x_0: theta uniform on [0, 6 pi], plus N(0, 0.1^2 I).  rng: a torch Generator.  Returns (n, 2)."""
    theta = 2 * math.pi * TURNS * torch.rand(n, generator=rng, device=rng.device)
    return curve(theta) + NOISE * torch.randn((n, 2), generator=rng, device=rng.device)

# -------------------------------------------- Learning --------------------------------------------
class Velocity(nn.Module):
    """f(x_t, t), a ReLU network that learns v_t(x_t).

    Beside x_t and t it sees sines and cosines of them, so that it can bend sharply: of x_t at random frequencies
    (Tancik et al. 2020, arXiv 2006.10739), of t at whole ones (t itself tells the two ends apart).
    """

    def __init__(self, num_frequencies=64, num_harmonics=12, width=128):
        super().__init__()
        self.register_buffer("frequencies", 2 * torch.randn(2, num_frequencies))
        self.register_buffer("harmonics", 2 * math.pi * torch.arange(1.0, num_harmonics + 1))
        widths = [3 + 2 * num_frequencies + 2 * num_harmonics, width, width, width]
        hidden = [layer for a, b in zip(widths, widths[1:]) for layer in (nn.Linear(a, b), nn.ReLU())]
        self.layers = nn.Sequential(*hidden, nn.Linear(width, 2))

    def forward(self, x_t, t):
        """x_t: (n, 2);  t: (n,) or a float, 0 <= t <= 1.  Returns v_t(x_t) as learned, (n, 2)."""
        t = torch.as_tensor(t, dtype=x_t.dtype, device=x_t.device).expand(len(x_t))[:, None]
        a, b = x_t @ self.frequencies, t * self.harmonics
        return self.layers(torch.cat([x_t, t, a.sin(), a.cos(), b.sin(), b.cos()], dim=1))

def random_pairs(n, rng):
    """(x_t, t, x_0 - x_1) of n fresh independent pairs, 3/4 of them at t < 1/2, where v_t is hardest; t in strata."""
    x_0, x_1 = spiral(n, rng), annulus(n, rng)
    u = (torch.arange(n, device=rng.device) + torch.rand(n, generator=rng, device=rng.device)) / n
    t = torch.where(u < 0.75, u / 1.5, 2 * u - 1).clamp(max=1 - 1e-6)
    return t[:, None] * x_1 + (1 - t[:, None]) * x_0, t, x_0 - x_1

def train(*, train_steps, batch_size, learning_rate, rng):
    """Pseudocode 4: least squares on fresh pairs.  rng: a torch Generator.  Returns (Velocity, loss of each step)."""
    with torch.random.fork_rng(devices=[]):  # nn.Linear draws from global state: seed it, then put it back
        torch.manual_seed(rng.initial_seed())
        velocity = Velocity().to(rng.device)
    optimizer = torch.optim.Adam(velocity.parameters(), fused=rng.device.type != "mps")
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=train_steps, pct_start=0.15)
    losses = torch.empty(train_steps, device=rng.device)
    for step in (progress := tqdm(range(train_steps), desc="training", disable=None)):
        x_t, t, target = random_pairs(batch_size, rng)
        loss = (velocity(x_t, t) - target).square().sum(dim=1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses[step] = loss.detach()
        if step % 100 == 0:
            progress.set_postfix(loss=f"{loss:.3f}")
    return velocity.requires_grad_(False), losses.tolist()

def flow(velocity, x_1, num_steps):
    """Pseudocode 5: x_{t-dt} = x_t + v_t(x_t) dt, for t = 1, 1 - dt, ..., dt.

    velocity(x_t, t) -> like x_t;  x_1: draws of the annulus;  num_steps = 1 / dt >= 1 (0: ZeroDivisionError).
    Yields num_steps arrays like x_1, the last of them x_0.
    """
    x_t, dt = x_1, 1 / num_steps
    for k in range(num_steps, 0, -1):  # t = k dt
        x_t = x_t + velocity(x_t, k / num_steps) * dt
        yield x_t

# ------------------------------------------- The check --------------------------------------------
def exact_velocity(x_t, t, num_panels=80, num_radii=20, rows=100):
    """E[x_0 - x_1 | x_t] = (x_t - E[x_1 | x_t]) / (1 - t), by quadrature in double precision.

    With w = x_t - (1 - t) c(theta) and s = 0.1 (1 - t), x_t given theta and x_1 is N(t x_1 + (1 - t) c(theta), s^2 I).
    For |x_1| = r, the angle of x_1 integrates to p(theta, r | x_t) ~ exp(-(|w| - t r)^2 / (2 s^2)) I0e(|w| t r / s^2)
    and E[x_1 | x_t, theta, r] = r (w / |w|) I1e / I0e, with I0e, I1e the scaled Bessel functions.  That leaves theta,
    8 Gauss-Legendre nodes on panels about even in arc length, and r, on the part of [2.5, 3] within 6 s / t of |w| / t.
    x_t: (n, 2);  t: (n,) or a float, 0 <= t < 1 (else ValueError).  Returns (n, 2), double.
    """
    t = torch.as_tensor(t, dtype=torch.double).expand(len(x_t))
    if not (t.min() >= 0 and t.max() < 1):
        raise ValueError("t is not in [0, 1)")
    grid = np.linspace(0, 2 * math.pi * TURNS, 10_000)
    length = grid * np.sqrt(1 + grid**2) + np.arcsinh(grid) + 3 * grid  # of the arc, times 4 pi; and some of the angle
    edges = np.interp(np.linspace(0, length[-1], num_panels + 1), length, grid)
    nodes, weights = (torch.tensor(q) for q in np.polynomial.legendre.leggauss(8))
    middle, half = torch.tensor(edges[1:] + edges[:-1])[:, None] / 2, torch.tensor(np.diff(edges))[:, None] / 2
    c, log_w = curve((middle + half * nodes).ravel()), (half * weights).log().ravel()
    nodes, weights = (torch.tensor(q) for q in np.polynomial.legendre.leggauss(num_radii))
    velocity = torch.empty(len(x_t), 2, dtype=torch.double)
    for x, t_x, v in zip(x_t.double().cpu().split(rows), t.split(rows), velocity.split(rows)):
        x, t_x = x[:, None], t_x[:, None]
        w, s = x - (1 - t_x)[..., None] * c, NOISE * (1 - t_x)
        distance = w.norm(dim=2).clamp(min=1e-12)
        peak, reach = (distance / t_x.clamp(min=1e-9)).clamp(INNER, OUTER), 6 * s / t_x.clamp(min=1e-9)
        low, high = (peak - reach).clamp(min=INNER), (peak + reach).clamp(max=OUTER)
        r = ((low + high)[..., None] + (high - low)[..., None] * nodes) / 2  # (rows, angles, radii)
        z = (distance * t_x / s**2)[..., None] * r
        i0e, i1e = torch.special.i0e(z), torch.special.i1e(z)
        log_p = -(((distance[..., None] - t_x[..., None] * r) / s[..., None]) ** 2) / 2
        log_p += (log_w + (high - low).log())[..., None]
        p = (log_p - log_p.amax(dim=(1, 2), keepdim=True)).exp() * weights
        mean_x_1 = ((p * r * i1e).sum(dim=2) / distance)[:, None] @ w / (p * i0e).sum(dim=(1, 2))[:, None, None]
        v[:] = (x - mean_x_1)[:, 0] / (1 - t_x)
    return velocity

def distance_to_curve(x):
    """Distance of each point to the spiral's centre line (to 4000 points of it).  x: (n, 2).  Returns (n,)."""
    line = curve(torch.linspace(0, 2 * math.pi * TURNS, 4000, device=x.device))
    return torch.cat([torch.cdist(rows, line).min(dim=1).values for rows in x.split(2000)])

def sliced_wasserstein(a, b, num_directions=64):
    """Sliced 2-Wasserstein distance between two sets of n points, (n, 2) each (Bonneel et al., 2015); a float."""
    angles = math.pi * torch.arange(num_directions, device=a.device) / num_directions
    directions = torch.stack([angles.cos(), angles.sin()], dim=1)
    squares = [((a @ d).sort().values - (b @ d).sort().values).square().mean() for d in directions]
    return float(torch.stack(squares).mean().sqrt())

# ------------------------------------------ The figures -------------------------------------------
def plot_data(x_0, x_1):
    fig, ax = plt.subplots(figsize=(6, 6), layout="constrained")
    ax.scatter(*x_1.T, s=2, color="C0", label="annulus, $x_1$")
    ax.scatter(*x_0.T, s=2, color="C1", label="spiral, $x_0$")
    ax.set(xlabel="$x$", ylabel="$y$", aspect="equal", title="The flow is to carry the annulus to the spiral")
    ax.legend(fontsize=10, loc="upper right", markerscale=4)
    return fig

def plot_loss(losses, floor, error):
    fig, ax = plt.subplots(figsize=(6, 4.5), layout="constrained")
    window = max(1, len(losses) // 50)
    means = np.convolve(losses, np.ones(window) / window, mode="valid")
    ax.semilogy(np.arange(1, len(losses) + 1), losses, ".", color="0.8", ms=2, label="loss of each step")
    ax.semilogy(np.arange(window, len(losses) + 1), means, "C0.-", ms=1, label=f"mean of {window} steps")
    ax.axhspan(floor - error, floor + error, color="0.7")
    ax.axhline(floor, color="k", ls="--", lw=1.2, label=f"irreducible part, {floor:.2f} $\\pm$ {error:.2f} (s.e.)")
    ax.set(xlabel="training step", ylabel="flow matching loss", title="Training loss and its irreducible part")
    ax.legend(fontsize=11)
    return fig

def plot_trajectories(paths, fields):
    """paths: (num_steps + 1, n, 2);  fields: {t: (x_t, learned, exact)}, (n, 2) each."""
    fig, axes = plt.subplots(len(fields) + 1, 1, figsize=(5, 4.7 * (len(fields) + 1)), layout="constrained")
    axes[0].plot(paths[..., 0], paths[..., 1], color="0.6", lw=0.5)
    axes[0].scatter(*paths[0].T, s=6, color="C0", zorder=3, label="start, $x_1$")
    axes[0].scatter(*paths[-1].T, s=6, color="C1", zorder=3, label="end, $x_0$")
    axes[0].set_title("Paths of the learned flow")
    for ax, (t, (x_t, learned, exact)) in zip(axes[1:], fields.items()):
        ax.quiver(*x_t.T, *exact.T, color="0.65", width=0.011, scale=50, label="exact")
        ax.quiver(*x_t.T, *learned.T, color="C0", width=0.003, scale=50, label="learned")
        ax.set_title(f"$v_t$ at t = {t:g} (arrows not to scale)")
    for ax in axes:
        ax.legend(fontsize=10, loc="upper right")
        ax.set(xlabel="$x$", ylabel="$y$", aspect="equal", xlim=(-4.2, 4.2), ylim=(-4.2, 4.2))
    return fig

def animate(paths, target):
    """The bytes of a GIF: the points flow over the faint target.  paths: (num_steps + 1, n, 2)."""
    fig, ax = plt.subplots(figsize=(4.4, 4.6), layout="constrained")
    ax.scatter(*target.T, s=1, color="0.85")
    dots = ax.scatter(*paths[0].T, s=3, c=paths[0, :, 1], cmap="viridis")
    ax.set(xlabel="$x$", ylabel="$y$", aspect="equal", xlim=(-3.8, 3.8), ylim=(-3.8, 3.8))
    frames = np.unique(np.linspace(0, len(paths) - 1, 51).round().astype(int))
    writer, buffer = PillowWriter(fps=12), io.BytesIO()
    buffer.name = "scatter.gif"  # which says the format
    writer.setup(fig, buffer.name, dpi=80)
    writer.outfile = buffer
    for k in [*frames, *[frames[-1]] * 15]:  # a pause at the end
        dots.set_offsets(paths[k])
        ax.set_title(f"t = {1 - k / (len(paths) - 1):.2f}", family="monospace")
        writer.grab_frame()
    writer.finish()
    return buffer.getvalue()

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
    """The Velocity that --checkpoint saved (no code in it is run), with `losses` and `settings`.  Else: ValueError."""
    try:
        if zipfile.ZipFile(path).testzip() is not None:
            raise ValueError("some bytes are not as they were written")
        saved = torch.load(path, map_location="cpu", weights_only=True)
        velocity = Velocity()
        velocity.load_state_dict(saved["network"])
        velocity.losses, velocity.settings = [float(loss) for loss in saved["losses"]], dict(saved["settings"])
    except Exception as error:  # zipfile and torch raise many kinds for a broken file
        raise ValueError(f"'{path}' is not a whole checkpoint of {Path(__file__).name}") from error
    return velocity.requires_grad_(False)

def run(args, settings, velocity):
    torch.set_num_threads(1)  # layers this small gain little from two, and the result must not hang on how many
    rng, n = torch.Generator(args.device).manual_seed(args.seed), args.num_samples
    training = {key: settings[key] for key in settings if key != "seed"}
    velocity, losses = (velocity.to(args.device), velocity.losses) if velocity else train(**training, rng=rng)
    if not math.isfinite(sum(losses)):
        sys.exit("the training diverged; try a smaller --learning-rate")
    if args.checkpoint and not args.checkpoint.exists():
        buffer, saved = io.BytesIO(), {"settings": settings, "losses": losses, "network": velocity.state_dict()}
        torch.save(saved, buffer)
        write_whole(args.checkpoint, buffer.getvalue())
    rng.manual_seed(args.seed ^ 1)  # so that what follows is the same for a network trained now or loaded
    fields, errors = {}, []
    for t in (0.95, 0.8, 0.6, 0.4, 0.2, 0.05):
        x_t = t * annulus(1000, rng) + (1 - t) * spiral(1000, rng)
        exact, learned = exact_velocity(x_t, t), velocity(x_t, t).cpu().double()
        fields[t] = [field[:250] for field in (x_t.cpu(), learned, exact)]
        errors.append(float((learned - exact).square().sum() / exact.square().sum()))
        print(f"t = {t:<4g}  E|v_learned - v|^2 / E|v|^2 = {errors[-1]:.2%}")
    print(f"mean over t {np.mean(errors):30.2%}")
    x_t, t, target = random_pairs(4000, rng)
    squares = (target.cpu() - exact_velocity(x_t, t.cpu())).square().sum(dim=1)
    floor, floor_error = float(squares.mean()), float(squares.std()) / len(squares) ** 0.5
    print(f"loss of the last 500 steps {np.mean(losses[-500:]):.3f}; irreducible {floor:.3f} +- {floor_error:.3f}")
    x_1, x_0, other = annulus(n, rng), spiral(n, rng), [spiral(n, rng) for _ in range(11)]
    true = float(distance_to_curve(x_0).mean())
    sliced = np.array([sliced_wasserstein(a, b) for a, b in zip(other, other[1:])])
    print(f"{n} samples       distance to the curve       sliced W_2 to fresh data")
    print(f"true data      {true:12.4f}                {(sliced**2).mean() ** 0.5:10.4f} +- {sliced.std():.4f}")
    for num_steps in sorted({10, 30, 100, 300, args.num_steps}):
        paths = [x_1[:2000]]
        for x_t in tqdm(flow(velocity, x_1, num_steps), desc="flow", total=num_steps, disable=None):
            paths.append(x_t[:2000].clone())
        if num_steps == args.num_steps:
            drawn = torch.stack(paths).cpu()
        away = float(distance_to_curve(x_t).mean())
        far = np.mean([sliced_wasserstein(x_t, b) ** 2 for b in other]) ** 0.5
        far_ratio = far / (sliced**2).mean() ** 0.5
        print(f"{num_steps:5} steps    {away:12.4f} = {away / true:5.2f} x        {far:10.4f} = {far_ratio:5.2f} x")
    plt.rcParams.update({"font.size": 12, "axes.titlesize": 12})
    x_0, x_1 = x_0[:4000].cpu(), x_1[:4000].cpu()
    figures = {"data.jpg": plot_data(x_0, x_1), "train_loss.jpg": plot_loss(losses, floor, floor_error)}
    figures["trajectories.jpg"] = plot_trajectories(drawn[:, :300], {t: fields[t] for t in (0.8, 0.4, 0.05)})
    for name, fig in figures.items():
        buffer = io.BytesIO()  # not the file itself: a full disk would go unnoticed
        fig.savefig(buffer, format="jpg", dpi=100)
        write_whole(args.figures_dir / name, buffer.getvalue())
    write_whole(args.figures_dir / "scatter.gif", animate(drawn, x_0))
    plt.show() if args.show else plt.close("all")

def main(argv=None):
    """Learn, flow, hold both against the exact, write the figures.  Exits with 2 on bad input, 1 on a fault."""
    parser = argparse.ArgumentParser(
        description="Learn the flow that carries an annulus to a spiral, and hold it against the exact velocity.",
        epilog="what happens if ...\n  little is learned?     python flow_matching.py --train-steps 500\n"
        "  few steps are taken?   python flow_matching.py --num-steps 5 --checkpoint flow.pt (then 50: it is trained)",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {' '.join(message.split())}\n")  # one line, no usage
    add = parser.add_argument
    parser._negative_number_matcher = re.compile(r"-[^-h]")  # -1e-3 is a value, not an option
    numbers = {  # option: type, lowest, highest, default, meaning
        "--num-steps": (int, 1, 2000, 100, "number of steps of the flow, 1/dt"),
        "--num-samples": (int, 1, 10**6, 10_000, "number of samples"),
        "--train-steps": (int, 1, 10**6, 9000, "number of steps of the optimizer"),
        "--batch-size": (int, 1, 2**16, 512, "number of fresh pairs in each of them"),
        "--learning-rate": (float, 1e-9, 1.0, 0.005, "largest rate of the one-cycle schedule"),
        "--seed": (int, 0, 2**63 - 1, 0, "seed of every draw"),
    }
    for name, (kind, _, _, default, text) in numbers.items():
        add(name, type=kind, default=default, metavar="X", help=f"{text} (default: {default})")
    devices = ["cpu"] + ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available()
    add("--device", choices=devices, default="cpu", help="where to train and sample (default: cpu)")
    add("--checkpoint", type=Path, metavar="FILE", help="save the trained network there; if it exists, load it")
    add("--figures-dir", type=Path, default=Path(__file__).parent / "figures", help="default: beside the script")
    add("--show", action="store_true", help="open the figures in windows as well")
    args, velocity = parser.parse_args(argv), None
    for name, (kind, low, high, _, _) in numbers.items():
        if not low <= vars(args)[name[2:].replace("-", "_")] <= high:  # NaN is not
            parser.error(f"argument {name}: takes a{' whole' * (kind is int)} number from {low} to {high}")
    plt.switch_backend(plt.get_backend() if args.show else "agg")
    if args.show and plt.get_backend().lower() == "agg":
        parser.error("argument --show: there is no display to open windows on")
    settings = {name: vars(args)[name] for name in ("train_steps", "batch_size", "learning_rate", "seed")}
    if (file := args.checkpoint) and os.path.exists(file):  # False for a name that is too long
        try:
            velocity = load(file)
        except ValueError as error:
            parser.error(f"argument --checkpoint: {error}")
        for name in (name for name in settings if velocity.settings.get(name) != settings[name]):
            trained = f"--{name.replace('_', '-')} {velocity.settings.get(name)}, not {settings[name]}"
            parser.error(f"argument --checkpoint: '{file}' was trained with {trained}")
    elif file and not (os.access(f"{file.parent}/.", os.W_OK) and len(os.fsencode(file.name)) < 240):
        parser.error(f"argument --checkpoint: takes a file in a folder that can be written to, not '{file}'")
    with contextlib.suppress(OSError):
        args.figures_dir.mkdir(parents=True, exist_ok=True)
    if not os.access(f"{args.figures_dir}/.", os.W_OK):
        parser.error(f"argument --figures-dir: takes a folder that can be written to, not '{args.figures_dir}'")
    try:
        run(args, settings, velocity)
    except OSError as error:
        sys.exit(f"{parser.prog}: {error}")

if __name__ == "__main__":  # from here on, Ctrl-C also removes what is half written; a second one changes nothing
    ignore = partial(signal.signal, signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGINT, lambda *_: (ignore(), os.write(2, b"interrupted\n"), sys.exit(130)))
    main()
