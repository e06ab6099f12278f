"""How fast the scripts are.  Run by hand: python tests/benchmark.py

First pieces of them, each in turn with the least work that it cannot do without, so that whatever
else the machine does falls on both. Then each script as a process of its own.
"""

import importlib
import os
import subprocess
import sys
import tempfile
import time
from functools import partial

import numpy as np
import torch
from conftest import SCRIPTS  # puts the scripts on the path

gaussian, swiss_roll, flow_matching = map(
    importlib.import_module, ("gaussian", "swiss_roll", "flow_matching")
)


def seconds(work):
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def exhaust(steps):
    for _ in steps:
        pass


def compare(name, work, least, repeats=7):
    """Median times of both in seconds, and the median of the ratios with its extremes."""
    work(), least()  # caches and lazy initialisation
    times = np.array([(seconds(work), seconds(least)) for _ in range(repeats)])
    own, limit = np.median(times, axis=0)
    ratios = times[:, 0] / times[:, 1]
    spread = f"{np.median(ratios):.2f} [{ratios.min():.2f}, {ratios.max():.2f}]"
    print(f"{name:52}{own:8.3f} s{limit:8.3f} s   {spread}", flush=True)


def samplers(n=100_000, num_steps=1000):
    rng = np.random.default_rng(0)
    mean = partial(gaussian.reverse_mean, mu_0=1.0, sigma_0=0.7, sigma_q=7.0)
    x_1, x = 7.0 * rng.standard_normal(n), np.ones(n)

    def draw():
        for _ in range(num_steps):
            rng.standard_normal(n)

    def multiply_add():
        for _ in range(num_steps):
            np.multiply(x, 0.999, out=x)
            np.add(x, 0.001, out=x)

    ddpm = lambda: exhaust(gaussian.ddpm(mean, x_1, num_steps, 7.0, rng))  # noqa: E731
    ddim = lambda: exhaust(gaussian.ddim(mean, x_1, num_steps))  # noqa: E731
    compare("0: DDPM / drawing its noise", ddpm, draw)
    compare("0: DDIM / a multiply-add in place", ddim, multiply_add)


def learning(name, network, loss, train, train_steps=200):
    """A training loop against forward, backward and optimizer on one batch made beforehand."""

    def least():
        optimizer = torch.optim.Adam(network.parameters(), fused=True)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.001, train_steps)
        for _ in range(train_steps):
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()
            schedule.step()

    compare(name, lambda: train(train_steps=train_steps), least)


def networks():
    rng = torch.Generator().manual_seed(0)
    x_0, t = swiss_roll.swiss_roll(1024, rng), torch.rand(1024, 1, generator=rng)
    denoiser, velocity = swiss_roll.Denoiser(1.0), flow_matching.Velocity()
    learning(
        "3: training / the same on a batch already made",
        denoiser,
        lambda: (denoiser(x_0, t) - x_0).square().sum(dim=1).mean(),
        partial(swiss_roll.train, sigma_q=1.0, rng=rng),
    )
    x, s = flow_matching.annulus(2048, rng), torch.rand(2048, 1, generator=rng)
    learning(
        "4: training / the same on a batch already made",
        velocity,
        lambda: (velocity(x, s) - x).square().sum(dim=1).mean(),
        partial(flow_matching.train, rng=rng),
    )


def whole_runs():
    for script in SCRIPTS:
        with tempfile.TemporaryDirectory() as folder:
            start, before = time.perf_counter(), os.times()
            command = [sys.executable, str(script), "--figures-dir", folder]
            subprocess.run(command, check=True, capture_output=True)
            wall, after = time.perf_counter() - start, os.times()
        cpu = after.children_user + after.children_system
        cpu -= before.children_user + before.children_system
        print(
            f"{script.parent.name:16}{script.stem:20}{cpu:7.1f} s of CPU{wall:7.1f} s", flush=True
        )


if __name__ == "__main__":
    print(f"NumPy {np.__version__}, torch {torch.__version__}, one thread")
    samplers()
    networks()
    whole_runs()
