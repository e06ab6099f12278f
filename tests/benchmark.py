"""How close the scripts come to what the machine can do.  Run by hand; pytest does not collect it.

Every row times a piece of a script and, in turn with it, the least work that piece cannot do without:
drawing the same normals, touching the same array, the network's forward and backward passes. A and B
alternate (A B A B ...), so that what else the machine is doing falls on both; the ratio is the median of
the pairs' ratios, and the numbers behind it are the least and the largest of them.

Run:  python tests/benchmark.py                    everything, some minutes; best on a quiet machine
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

# One whole run of a script in a process of its own: argv is the script and its arguments. The last line that it
# prints says how long it took to import matplotlib, to import the rest, and to build and save the figures.
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
depth, drawing = 0, 0.0

def timed(function):
    def wrapper(*args, **kwargs):
        global depth, drawing
        begin, depth = time.perf_counter(), depth + 1
        try:
            return function(*args, **kwargs)
        finally:
            depth -= 1
            drawing += (time.perf_counter() - begin) * (depth == 0)  # an animation saves its frames one by one
    return wrapper

for name in dir(script):
    if name.startswith("plot_") or name == "animate":
        setattr(script, name, timed(getattr(script, name)))
figure = matplotlib.figure.Figure
figure.savefig = timed(figure.savefig)
script.main(sys.argv[2:])
seconds = {"matplotlib": matplotlib_done - start, "rest": imports_done - matplotlib_done, "drawing": drawing}
print(json.dumps({**seconds, "torch": "torch" in sys.modules}))
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
    """Times work() and limit() in turn and prints their row.  per: how many steps one call takes."""
    with contextlib.redirect_stderr(io.StringIO()):  # no progress bar: it is not a terminal
        work(), limit()  # caches, allocators, lazy initialisation
        times = np.array([(seconds(work, device), seconds(limit, device)) for _ in range(repeats)]) / per
    measured, held_against = np.median(times, axis=0)
    ratios = times[:, 0] / times[:, 1]
    spread = f"{np.median(ratios):6.2f}  [{ratios.min():.2f}, {ratios.max():.2f}]"
    verdict = "" if np.median(ratios) <= to_reach else "  above"
    print_row(row, human(measured), human(held_against), spread, f"<= {to_reach:g}{verdict}")

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

    ddpm, ddim = (gaussian_steps(gaussian, name, n, num_steps) for name in ("DDPM", "DDIM"))
    compare("0: DDPM, 100,000 x 1000 / drawing the normals", ddpm, draw, 1.35)
    compare("0: DDIM, 100,000 x 1000 / multiply-add in place", ddim, multiply_add, 3, repeats=11)

def rows_of_two_points(n=10_000, num_steps=50):
    two_points, rng = load(PATHS[2]), np.random.default_rng(0)
    x_1 = rng.standard_normal((n, 2))
    two = np.array([(-1.5, -1.0), (1.5, 1.0)])
    for points in (two, rng.normal(size=(100, 2))):
        weights = np.full(len(points), 1 / len(points))
        mean = partial(two_points.reverse_mean, points=points, weights=weights, sigma_q=1.0)

        def squared_distances(points=points):
            for _ in range(num_steps):
                ((x_1[:, None] - points) ** 2).sum(-1)

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
            to_reach = "" if n < 10**4 else "<= 2" + "  above" * (ratio > 2)
            label = f"0: {name}, {n:,} samples: {peak / 1e6:.3g} MB, {peak / 8 / n:.2g} arrays"
            print_row(label, human(median), human(np.median(times[:, 1])), spread, to_reach)

def rows_of_whole_runs(paths, extra, repeats):
    """Each script in a process of its own, figures to a temporary folder; 3 and 4 once."""
    total = 0.0
    heads = f"{'matplotlib':>10} {'torch, tqdm':>11} {'figures':>9} {'the rest':>9}"
    print(f"\n{'whole process, defaults':<29} {'total':>8} {heads}")
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
        other = run["total"] - run["matplotlib"] - run["rest"] - run["drawing"]
        imports = f"{run['matplotlib']:8.2f} s {run['rest']:9.2f} s"
        share = run["drawing"] / (run["total"] - run["drawing"])
        print(f"{path:<29} {run['total']:6.1f} s {imports} {run['drawing']:7.2f} s {other:7.1f} s", end="   ")
        print(f"figures take {share:.0%} of what is not figures", flush=True)
    print(f"{'together':<29} {total:6.1f} s")


def main():
    parser = argparse.ArgumentParser(description="Each part of the scripts against the least work it needs.")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="of experiments 3 and 4")
    device = parser.parse_args().device
    torch.set_num_threads(1)  # as the scripts do
    where = torch.cuda.get_device_name() if device == "cuda" else "one thread"
    print(f"NumPy {np.__version__}, torch {torch.__version__}, {where}; limits are timed in the same run, in turn\n")
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
