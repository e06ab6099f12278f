"""How close the scripts come to what the machine can do.  Run by hand; pytest does not collect it.

Every row times a piece of a script and, in turn with it, the least work that the piece cannot do
without: drawing the same normals, touching the same array, the network's passes. A and B alternate,
so that what else the machine does falls on both. The ratio is the median of the pairs' ratios, with
the least and the largest of them.

Run:  python tests/benchmark.py
"""

import contextlib
import io
import subprocess
import sys
import tempfile
import time
from collections import deque
from functools import partial

import numpy as np
import torch
from conftest import SCRIPTS, load


def seconds(work):
    start = time.perf_counter()
    with contextlib.redirect_stderr(io.StringIO()):  # no progress bar
        work()
    return time.perf_counter() - start


def exhaust(steps):
    """The last array of a sampler; no other is kept."""
    return deque(steps, maxlen=1).pop()


def compare(row, work, limit, to_reach, repeats=7, per=1):
    """Times work() and limit() in turn and prints their row.  per: steps in one call."""
    work()
    limit()  # caches, allocators, lazy initialisation
    times = np.array([(seconds(work), seconds(limit)) for _ in range(repeats)]) / per * 1e3
    ratios = times[:, 0] / times[:, 1]
    own, least = np.median(times, axis=0)
    spread = f"{np.median(ratios):.2f} [{ratios.min():.2f}, {ratios.max():.2f}]"
    verdict = "  ABOVE" * bool(np.median(ratios) > to_reach)
    print(
        f"{row:<50}{own:10.3f} ms{least:10.3f} ms   {spread:<20} <= {to_reach}{verdict}", flush=True
    )


def rows_of_gaussian(n=100_000, num_steps=1000):
    gaussian, rng, x = load("experiment-0/gaussian.py"), np.random.default_rng(0), np.ones(n)
    known = partial(gaussian.reverse_mean, mu_0=1.0, sigma_0=0.7, sigma_q=7.0)
    x_1 = 7.0 * rng.standard_normal(n)

    def draw():
        for _ in range(num_steps):
            rng.standard_normal(n)

    def multiply_add():
        for _ in range(num_steps):
            np.multiply(x, 0.999, out=x)
            np.add(x, 0.001, out=x)

    ddpm = partial(gaussian.ddpm, known, x_1, num_steps, 7.0, rng)
    ddim = partial(gaussian.ddim, known, x_1, num_steps)
    compare("0: DDPM, 100 000 x 1000 / drawing the normals", lambda: exhaust(ddpm()), draw, 1.35)
    compare(
        "0: DDIM, the same / a multiply-add in place", lambda: exhaust(ddim()), multiply_add, 3.5
    )


def rows_of_two_points(n=10_000, num_steps=50):
    two_points, rng = load("experiment-2/two_points.py"), np.random.default_rng(0)
    x_1 = rng.standard_normal((n, 2))
    for points in (np.array([(-1.5, -1.0), (1.5, 1.0)]), rng.normal(size=(100, 2))):
        weights = np.full(len(points), 1 / len(points))
        known = partial(two_points.reverse_mean, points=points, weights=weights, sigma_q=1.0)

        def squared_distances(points=points):
            for _ in range(num_steps):
                sum((x - a[:, None]) ** 2 for x, a in zip(x_1.T, points.T))

        ddim = partial(two_points.ddim, known, x_1, num_steps)
        row = f"2: 10 000 x 50, {len(points)} points / squared distances"
        compare(row, lambda ddim=ddim: exhaust(ddim()), squared_distances, 4)


def train_on_one_batch(network, loss_of, num_steps):
    """Forward, backward, optimizer and schedule, on a batch already made."""
    optimizer = torch.optim.Adam(network.parameters(), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, num_steps)
    for _ in range(num_steps):
        optimizer.zero_grad()
        loss_of(network).mean().backward()
        optimizer.step()
        schedule.step()


def rows_of_swiss_roll(train_steps=200, n=4000, steps=100):
    roll, rng = load("experiment-3/swiss_roll.py"), torch.Generator().manual_seed(0)
    x_0, t = roll.swiss_roll(1024, rng), roll.MIN_T ** torch.rand(1024, generator=rng)
    x_t = roll.add_noise(x_0, t, 1.0, rng)
    settings = {"train_steps": train_steps, "batch_size": 1024, "learning_rate": 0.01, "rng": rng}

    def limit():
        squares = lambda f: (1 / t + 4) * (f(x_t, t) - x_0).square().sum(dim=1)  # noqa: E731
        train_on_one_batch(roll.Denoiser(1.0), squares, train_steps)

    train = partial(roll.train, sigma_q=1.0, **settings)
    compare("3: a training step / on a batch already made", train, limit, 1.15, per=train_steps)
    denoiser = roll.Denoiser(1.0).requires_grad_(False)
    known, x_1 = partial(roll.reverse_mean, denoiser=denoiser), torch.randn(n, 2, generator=rng)
    ddpm, ddim = (
        partial(roll.ddpm, known, x_1, steps, 1.0, rng),
        partial(roll.ddim, known, x_1, steps),
    )
    for name, sampler in (("DDPM", ddpm), ("DDIM", ddim)):
        work = lambda sampler=sampler: exhaust(sampler())  # noqa: E731
        forward = lambda: [denoiser(x_1, k / steps) for k in range(steps, 0, -1)]  # noqa: E731
        compare(f"3: a {name} step of 4000 / a forward pass", work, forward, 1.15, per=steps)


def rows_of_flow_matching(train_steps=100, n=10_000, steps=50):
    flow, rng = load("experiment-4/flow_matching.py"), torch.Generator().manual_seed(0)
    t = flow.draw_times(2048, rng)
    x_t, target = flow.linear_flow(flow.spiral(2048, rng), flow.annulus(2048, rng), t)
    settings = {"train_steps": train_steps, "batch_size": 2048, "learning_rate": 0.01, "rng": rng}

    def limit():
        squares = lambda f: (f(x_t, t) - target).square().sum(dim=1)  # noqa: E731
        train_on_one_batch(flow.Velocity(), squares, train_steps)

    train = partial(flow.train, **settings)
    compare("4: a training step / on a batch already made", train, limit, 1.15, per=train_steps)
    velocity, x_1 = flow.Velocity().requires_grad_(False), flow.annulus(n, rng)
    work = lambda: exhaust(flow.flow(velocity, x_1, steps))  # noqa: E731
    forward = lambda: [velocity(x_1, k / steps) for k in range(steps, 0, -1)]  # noqa: E731
    compare("4: a step of 10 000 / a forward pass", work, forward, 1.15, per=steps)


def rows_of_whole_runs():
    total = 0.0
    for script in SCRIPTS:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, str(script), "--figures-dir", folder]
            wall = seconds(lambda c=command: subprocess.run(c, check=True, capture_output=True))
        total += wall
        print(f"{script.stem:<20} {wall:6.1f} s", flush=True)
    print(f"{'together':<20} {total:6.1f} s")


def main():
    torch.set_num_threads(1)  # as the scripts do
    print(f"NumPy {np.__version__}, torch {torch.__version__}, one thread")
    rows_of_gaussian()
    rows_of_two_points()
    rows_of_swiss_roll()
    rows_of_flow_matching()
    rows_of_whole_runs()


if __name__ == "__main__":
    main()
