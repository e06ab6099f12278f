"""How close the scripts come to what the machine can do.  Run by hand; pytest does not collect it.

Every row times a piece of a script and, in turn with it, the least work that piece cannot do without:
drawing the same normals, touching the same array, the network's forward and backward passes. A and B
alternate (A B A B ...), so that what else the machine is doing falls on both; the ratio is the median of
the pairs' ratios, and the numbers behind it are the least and the largest of them.

Run:  python tests/benchmark.py                    everything, some minutes; best on a quiet machine
      python tests/benchmark.py --accuracy         error against training time, for other settings than the defaults
      python tests/benchmark.py --device cuda      experiments 3 and 4 on a GPU
"""

import argparse
import contextlib
import io
import json
import subprocess
import sys
import tempfile
import time
import tracemalloc
from functools import partial

import numpy as np
import torch
from conftest import EXPERIMENTS, load

PATHS = [
    "experiment-0/gaussian.py",
    "experiment-1/point_mass.py",
    "experiment-2/two_points.py",
    "experiment-3/swiss_roll.py",
    "experiment-4/flow_matching.py",
]

# For --accuracy: the defaults of training, and what else is tried, chosen to take about as long.
SWISS_ROLL = {"sigma_q": 1.0, "train_steps": 8500, "batch_size": 1024, "learning_rate": 0.01}
SWISS_ROLL_OTHERS = [
    *({"train_steps": n} for n in (1000, 2000, 4250, 17_000)),
    {"batch_size": 256, "train_steps": 20_000},
    {"batch_size": 4096, "train_steps": 2500},
    {"width": 32, "train_steps": 12_000},
    {"width": 128, "train_steps": 4500},
    *({"learning_rate": rate} for rate in (0.003, 0.03)),
    {"threads": 2},
]
FLOW = {"train_steps": 9000, "batch_size": 512, "learning_rate": 0.005}
FLOW_TIMES = (0.95, 0.8, 0.6, 0.4, 0.2, 0.05)
FLOW_OTHERS = [
    *({"train_steps": n} for n in (1000, 2250, 4500, 18_000)),
    {"batch_size": 256, "train_steps": 15_000},
    {"batch_size": 2048, "train_steps": 2700},
    {"width": 96, "train_steps": 12_000},
    {"width": 192, "train_steps": 5500},
    *({"learning_rate": rate} for rate in (0.0015, 0.015)),
    {"threads": 2},
]

# One whole run of a script in a process of its own: argv is the script and its arguments. The last line that it
# prints says how long it took to import matplotlib, to import the rest, to train, and to build and save the figures.
WHOLE_RUN = """
import importlib.util, json, sys, time

start = time.perf_counter()
import matplotlib.pyplot
import matplotlib.animation
matplotlib_done = time.perf_counter()
spec = importlib.util.spec_from_file_location("script", sys.argv[1])
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)
imports_done = time.perf_counter()
depth, seconds = 0, {"training": 0.0, "figures": 0.0}

def timed(function, part):
    def wrapper(*args, **kwargs):
        global depth
        begin, depth = time.perf_counter(), depth + 1
        try:
            return function(*args, **kwargs)
        finally:
            depth -= 1
            seconds[part] += (time.perf_counter() - begin) * (depth == 0)  # an animation saves its frames one by one
    return wrapper

for name in dir(script):
    if name.startswith("plot_") or name in ("animate", "train"):
        setattr(script, name, timed(getattr(script, name), "training" if name == "train" else "figures"))
figure = matplotlib.figure.Figure
figure.savefig = timed(figure.savefig, "figures")
script.main(sys.argv[2:])
imports = {"matplotlib": matplotlib_done - start, "other imports": imports_done - matplotlib_done}
print(json.dumps({**imports, **seconds, "torch": "torch" in sys.modules}))
"""


# ------------------------------------------- Measuring --------------------------------------------
def seconds(work, device="cpu"):
    """Wall time of work(), with all that it left the GPU to do."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start

def exhaust(steps):
    """The last array of a sampler; no other is kept."""
    for x_t in steps:
        pass
    return x_t

def compare(row, work, limit, to_reach, *, device="cpu", repeats=7, per=1):
    """Times work() and limit() in turn and prints their row.  to_reach: None for no limit;  per: steps in one call."""
    with contextlib.redirect_stderr(io.StringIO()):  # no progress bar: it is not a terminal
        work(), limit()  # caches, allocators, lazy initialisation
        times = np.array([(seconds(work, device), seconds(limit, device)) for _ in range(repeats)]) / per
    measured, held_against = np.median(times, axis=0)
    ratios = times[:, 0] / times[:, 1]
    spread = f"{np.median(ratios):6.2f}  [{ratios.min():.2f}, {ratios.max():.2f}]"
    verdict = "above" if to_reach and np.median(ratios) > to_reach else ""
    print_row(row, human(measured), human(held_against), spread, f"<= {to_reach:g}  {verdict}" if to_reach else "-")

def human(t):
    unit, factor = next((u, f) for u, f in (("s", 1), ("ms", 1e3), ("us", 1e6), ("ns", 1e9)) if t * f >= 1 or u == "ns")
    return f"{t * factor:.3g} {unit}"

def print_row(row, measured, limit, ratio, to_reach):
    print(f"{row:<50} {measured:>9} {limit:>9}   {ratio:<22} {to_reach}", flush=True)


# ------------------------------------------- The rows ---------------------------------------------
def gaussian_steps(gaussian, name, n, num_steps):
    """Experiment 0's sampler as its `run` calls it, with its default parameters: a function to call."""
    rng, mean = np.random.default_rng(0), partial(gaussian.reverse_mean, mu_0=1.0, sigma_0=0.7, sigma_q=7.0)
    x_1 = 7.0 * rng.standard_normal(n)
    if name == "DDPM":
        return lambda: exhaust(gaussian.ddpm(mean, x_1, num_steps, 7.0, rng))
    return lambda: exhaust(gaussian.ddim(mean, x_1, num_steps))

def rows_of_gaussian(n=100_000, num_steps=1000):
    gaussian, rng, x = load(PATHS[0]), np.random.default_rng(0), np.ones(n)

    def draw():
        for _ in range(num_steps):
            rng.standard_normal(n)

    def multiply_add():
        for _ in range(num_steps):
            np.multiply(x, 0.999, out=x)
            np.add(x, 0.001, out=x)

    def ddim_by_hand(mu_0=1.0, sigma_0=0.7, sigma_q=7.0):  # the five passes of a DDIM step with no array made
        x_t, mean = 7.0 * rng.standard_normal(n), np.empty(n)
        for k in range(num_steps, 0, -1):
            lam = k**0.5 / ((k - 1) ** 0.5 + k**0.5)
            variance_t = sigma_0**2 + sigma_q**2 * k / num_steps
            np.multiply(x_t, (sigma_0**2 + sigma_q**2 * (k - 1) / num_steps) / variance_t, out=mean)
            mean += sigma_q**2 / num_steps / variance_t * mu_0
            mean -= x_t
            mean *= lam
            x_t += mean

    ddpm, ddim = (gaussian_steps(gaussian, name, n, num_steps) for name in ("DDPM", "DDIM"))
    compare("0: DDPM, 100,000 x 1000 / drawing the normals", ddpm, draw, 1.35)
    compare("0: DDIM, 100,000 x 1000 / multiply-add in place", ddim, multiply_add, 3, repeats=11)
    compare("0: DDIM by hand, in place / multiply-add in place", ddim_by_hand, multiply_add, None, repeats=11)

def rows_of_two_points(n=10_000, num_steps=50):
    two_points, rng = load(PATHS[2]), np.random.default_rng(0)
    x_1 = rng.standard_normal((n, 2))
    two = np.array([(-1.5, -1.0), (1.5, 1.0)])
    for points in (two, rng.normal(size=(100, 2))):
        weights = np.full(len(points), 1 / len(points))
        mean = partial(two_points.reverse_mean, points=points, weights=weights, sigma_q=1.0)

        def squared_distances(points=points):  # one coordinate at a time: no array of (n, k, 2), 10 times slower
            for _ in range(num_steps):
                sum((x - a[:, None]) ** 2 for x, a in zip(x_1.T, points.T))

        def ddim(mean=mean):
            exhaust(two_points.ddim(mean, x_1, num_steps))

        compare(f"2: 10,000 x 50, {len(points)} points / squared distances", ddim, squared_distances, 4)

def train_on_one_batch(network, loss_of, num_steps, learning_rate):
    """Forward, backward, optimiser and schedule, as `train` sets them up, on a batch already made."""
    optimizer = torch.optim.Adam(network.parameters(), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=num_steps)
    for _ in range(num_steps):
        loss = loss_of(network).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()

def rows_of_swiss_roll(device, train_steps=300, n=10_000):
    swiss_roll = load(PATHS[3])
    rng = torch.Generator(device).manual_seed(0)

    x_0, t = swiss_roll.swiss_roll(1024, rng), swiss_roll.MIN_T ** torch.rand(1024, generator=rng, device=device)
    x_t, weight = swiss_roll.add_noise(x_0, t, 1.0, rng), 1 / t + 1 / 0.5**2

    def weighted_squares(denoiser):
        return weight * (denoiser(x_t, t) - x_0).square().sum(dim=1)

    def train():
        swiss_roll.train(sigma_q=1.0, train_steps=train_steps, batch_size=1024, learning_rate=0.01, rng=rng)

    def limit():
        train_on_one_batch(swiss_roll.Denoiser(1.0).to(device), weighted_squares, train_steps, 0.01)

    compare("3: training step / on a batch already made", train, limit, 1.15, device=device, per=train_steps)

    denoiser = swiss_roll.Denoiser(1.0).to(device).requires_grad_(False)
    mean, steps = partial(swiss_roll.reverse_mean, denoiser=denoiser), 100  # of the 1000: a step costs the same
    x_1 = torch.randn((n, 2), generator=rng, device=device)

    def forward():
        for k in range(steps, 0, -1):
            denoiser(x_1, k / steps)

    def ddpm():
        exhaust(swiss_roll.ddpm(mean, x_1, steps, 1.0, rng))

    def ddim():
        exhaust(swiss_roll.ddim(mean, x_1, steps))

    compare("3: a DDPM step of 10,000 / a forward pass", ddpm, forward, 1.15, device=device, per=steps)
    compare("3: a DDIM step of 10,000 / a forward pass", ddim, forward, 1.15, device=device, per=steps)

def rows_of_flow_matching(device, train_steps=300, n=10_000, steps=100):
    flow_matching = load(PATHS[4])
    rng = torch.Generator(device).manual_seed(0)
    x_t, t, target = flow_matching.random_pairs(512, rng)

    def squares(velocity):
        return (velocity(x_t, t) - target).square().sum(dim=1)

    def train():
        flow_matching.train(train_steps=train_steps, batch_size=512, learning_rate=0.005, rng=rng)

    def limit():
        train_on_one_batch(flow_matching.Velocity().to(device), squares, train_steps, 0.005)

    compare("4: training step / on a batch already made", train, limit, 1.15, device=device, per=train_steps)
    velocity, x_1 = flow_matching.Velocity().to(device).requires_grad_(False), flow_matching.annulus(n, rng)

    def forward():
        for k in range(steps, 0, -1):
            velocity(x_1, k / steps)

    def flow():
        exhaust(flow_matching.flow(velocity, x_1, steps))

    compare("4: a step of 10,000 / a forward pass", flow, forward, 1.15, device=device, per=steps)

def rows_of_growth(sizes=(10**3, 10**4, 10**5, 10**6), repeats=5):
    """Time per sample and step, sizes in turn, and the most memory held at once, in arrays of one number a sample."""
    gaussian = load(PATHS[0])
    for name in ("DDPM", "DDIM"):
        works = [gaussian_steps(gaussian, name, n, 10**7 // n) for n in sizes]
        times = np.array([[seconds(work) for work in works] for _ in range(repeats)]) / 1e7
        for n, own, median in zip(sizes, times.T, np.median(times, axis=0)):
            work = gaussian_steps(gaussian, name, n, 20)
            tracemalloc.start()  # counts from here, so without x_1
            work()
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            ratio = median / np.median(times[:, 1])
            spread = f"{ratio:6.2f}  [{own.min() * 1e9:.2f}, {own.max() * 1e9:.2f}] ns"
            to_reach = "" if n < 10**4 else "<= 2" + "  above" * bool(ratio > 2)
            label = f"0: {name}, {n:,} samples: {peak / 1e6:.3g} MB, {peak / 8 / n:.2g} arrays"
            print_row(label, human(median), human(np.median(times[:, 1])), spread, to_reach)

def rows_of_whole_runs(paths, extra, repeats):
    """Each script in a process of its own, figures to a temporary folder; 3 and 4 once."""
    total = 0.0
    columns = ("matplotlib", "other imports", "training", "figures")
    heads = "".join(f"{name:>15}" for name in ("total", *columns, "the rest"))
    print(f"\n{'whole process, defaults':<29}{heads}")
    for path in paths:
        runs = []
        for _ in range(repeats if path in PATHS[:3] else 1):
            with tempfile.TemporaryDirectory() as folder:
                command = [sys.executable, "-c", WHOLE_RUN, str(EXPERIMENTS / path), "--figures-dir", folder, *extra]
                start = time.perf_counter()
                output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                parts = json.loads(output.splitlines()[-1])
                runs.append({"total": time.perf_counter() - start, **parts})
        run = sorted(runs, key=lambda run: run["total"])[len(runs) // 2]
        if path in PATHS[:3]:
            assert not run["torch"], f"{path} imports torch"
        total += run["total"]
        parts = [run["total"], *(run[name] for name in columns)]
        cells = "".join(f"{part:13.2f} s" for part in (*parts, parts[0] - sum(parts[1:])))
        share = run["figures"] / (run["total"] - run["figures"])
        print(f"{path:<29}{cells}   figures take {share:.0%} of what is not figures", flush=True)
    print(f"{'together':<29}{total:13.2f} s")


def rows_of_accuracy(times=(0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)):
    """Error against training time.  One line a setting: the default with one thing changed, at about equal time."""
    swiss_roll, flow_matching = load(PATHS[3]), load(PATHS[4])
    rng = torch.Generator().manual_seed(1)
    fields = {t: t * flow_matching.annulus(1000, rng) + (1 - t) * flow_matching.spiral(1000, rng) for t in FLOW_TIMES}
    exact = {t: flow_matching.exact_velocity(x_t, t) for t, x_t in fields.items()}

    def excess(denoiser):
        pairs = [swiss_roll.excess_error(denoiser, t, 1.0, torch.Generator().manual_seed(2)) for t in times]
        return np.mean([error / bayes for error, bayes in pairs])

    def off(velocity):
        squares = [((velocity(x, t) - exact[t]).square().sum() / exact[t].square().sum()) for t, x in fields.items()]
        return float(torch.stack(squares).mean())

    for script, network, error, default, others in (
        (swiss_roll, "Denoiser", excess, SWISS_ROLL, SWISS_ROLL_OTHERS),
        (flow_matching, "Velocity", off, FLOW, FLOW_OTHERS),
    ):
        print(f"\n{script.__name__}: {'settings':<62} {'training':>9} {'error':>8}")
        own = getattr(script, network)
        for other in ({}, *others):
            settings = {**default, "width": None, "threads": 1, **other}
            width, threads = settings.pop("width"), settings.pop("threads")
            setattr(script, network, partial(own, width=width) if width else own)
            torch.set_num_threads(threads)
            with contextlib.redirect_stderr(io.StringIO()):
                start = time.perf_counter()
                trained, _ = script.train(**settings, rng=torch.Generator().manual_seed(0))
                wall = time.perf_counter() - start
            label = ", ".join(f"{key} {value}" for key, value in other.items()) or f"the default, {default}"
            torch.set_num_threads(1)
            print(f"  {label:<{60 + len(script.__name__)}} {wall:9.1f} s {error(trained):8.2%}", flush=True)
        setattr(script, network, own)


def main():
    parser = argparse.ArgumentParser(description="Each part of the scripts against the least work it needs.")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="of experiments 3 and 4")
    parser.add_argument("--accuracy", action="store_true", help="error against training time instead, on the CPU")
    args = parser.parse_args()
    device = args.device
    if device == "cuda" and (args.accuracy or not torch.cuda.is_available()):
        parser.error(f"argument --device: {'not with --accuracy' if args.accuracy else 'there is no CUDA device here'}")
    torch.set_num_threads(1)  # as the scripts do
    where = torch.cuda.get_device_name() if device == "cuda" else "one thread"
    print(f"NumPy {np.__version__}, torch {torch.__version__}, {where}; limits are timed in the same run, in turn\n")
    if args.accuracy:
        return rows_of_accuracy()
    print_row("row", "measured", "limit", "ratio [min, max]", "to reach")
    if device == "cpu":
        rows_of_gaussian()
        rows_of_two_points()
    rows_of_swiss_roll(device)
    rows_of_flow_matching(device)
    if device == "cpu":
        print("\ngrowth: time per sample and step; limit: that of 10,000 samples; spread: its least and largest")
        rows_of_growth()
    rows_of_whole_runs(PATHS if device == "cpu" else PATHS[3:], ["--device", device] * (device == "cuda"), repeats=3)


if __name__ == "__main__":
    main()
