"""Samplers of diffusers, k-diffusion and smalldiffusion, judged by experiment 8's twins.

By hand, in an environment of its own, as these packages are not needed for anything else:

    pip install diffusers==0.42.1 k-diffusion==0.1.1.post1 smalldiffusion==0.5.0 "setuptools<70"
    python tests/peers.py

Prints the table of experiments/YOUR-SAMPLER.md and writes its figure. A minute and a half of one
core.
The data is eight Gaussians, the denoiser is exact. diffusers is asked in its own language: linear
beta, 1000 steps, noise prediction; its start is N(0, I), which the twins take for noise of the
largest level. Between two of the 1000 levels log sigma is interpolated, as diffusers does.
"""

import re
import sys
from importlib.metadata import version
from pathlib import Path

import diffusers
import k_diffusion.sampling as k
import matplotlib.pyplot as plt
import numpy as np
import smalldiffusion
import torch

PAGE = Path(__file__).resolve().parents[1] / "experiments/YOUR-SAMPLER.md"
sys.path.append(str(PAGE.parent / "experiment-8"))
import fast_samplers as ours  # noqa: E402

JUDGE = {}
exec(re.search(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)[1], JUDGE)
ring = JUDGE["ring"]

ALPHAS = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
SIGMAS = ((1 - ALPHAS) / ALPHAS) ** 0.5
SIGMA_MIN = 0.002  # of the grids that we choose, as in experiment 8


def starts(seed, sigma_max, n=1000):
    """Noise of variance 1, (n, 2), and the twins: the ODE's solution from sigma_max times that."""
    noise = np.random.default_rng(seed).standard_normal((n, 2))
    x, sigmas = sigma_max * noise, np.geomspace(sigma_max, 1e-3, 4000)
    for sigma, lower in zip(sigmas, sigmas[1:]):  # Heun's method
        slope = (x - ring(x, sigma)) / sigma
        euler = x + (lower - sigma) * slope
        x = x + (lower - sigma) * (slope + (euler - ring(euler, lower)) / lower) / 2
    return noise, ring(x, lower)


def by_diffusers(name, num_steps, noise, **config):
    """x_0 and the number of evaluations."""
    scheduler = getattr(diffusers, name)(beta_start=1e-4, beta_end=0.02, **config)
    scheduler.set_timesteps(num_steps)
    x = torch.tensor(noise) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        log_sigma = np.interp(float(t), np.arange(1000), np.log(SIGMAS))
        sigma = np.exp(log_sigma)
        seen = scheduler.scale_model_input(x, t).numpy() * (1 + sigma**2) ** 0.5
        epsilon = (seen - ring(seen, sigma)) / sigma
        x = scheduler.step(torch.tensor(epsilon), t, x).prev_sample
    return x.numpy(), len(scheduler.timesteps)


def by_k_diffusion(name, num_steps, noise, rho=7):
    calls = []

    def denoiser(x, sigma):
        calls.append(sigma)
        return torch.tensor(ring(x.numpy(), sigma[0].item()))

    sigmas = k.get_sigmas_karras(num_steps, SIGMA_MIN, SIGMAS[-1], rho)
    x = getattr(k, name)(denoiser, SIGMAS[-1] * torch.tensor(noise), sigmas, disable=True)
    return x.numpy(), len(calls)


class Model(torch.nn.Module, smalldiffusion.ModelMixin):
    """The exact noise predictor, as smalldiffusion asks for one."""

    input_dims = (2,)

    def forward(self, x, sigma, cond=None):
        x, sigma = x.numpy(), float(sigma.flatten()[0])
        return torch.tensor((x - ring(x, sigma)) / sigma)


def by_smalldiffusion(num_steps, noise, **how):
    schedule = smalldiffusion.ScheduleDDPM(N=1000, beta_start=1e-4, beta_end=0.02)
    sigmas = schedule.sample_sigmas(num_steps).double()
    x = torch.tensor(noise) * (1 + sigmas[0] ** 2) ** 0.5
    *_, x = smalldiffusion.samples(Model(), sigmas, xt=x, batchsize=len(noise), **how)
    return x.numpy(), num_steps


def by_ours(num_steps, noise):
    """Experiment 8's DPM-Solver++(2M), on its best grid."""
    grid = ours.karras(num_steps, SIGMA_MIN, SIGMAS[-1])
    *_, x = ours.dpm_solver_2m(ring, SIGMAS[-1] * noise, grid)
    return x, num_steps


D, KARRAS, LU = by_diffusers, {"use_karras_sigmas": True}, {"use_lu_lambdas": True}
RUNS = {
    "DDIM, as it comes": (D, "DDIMScheduler", {"clip_sample": False}),
    "DDIM, clip_sample left on": (D, "DDIMScheduler", {}),
    "DDIM, trailing": (
        D,
        "DDIMScheduler",
        {"clip_sample": False, "timestep_spacing": "trailing"},
    ),
    "Euler, as it comes": (D, "EulerDiscreteScheduler", {}),
    "Euler, Karras": (D, "EulerDiscreteScheduler", KARRAS),
    "DPM-Solver++(2M), as it comes": (D, "DPMSolverMultistepScheduler", {}),
    "DPM-Solver++(2M), Karras": (D, "DPMSolverMultistepScheduler", KARRAS),
    "DPM-Solver++(2M), Lu": (D, "DPMSolverMultistepScheduler", LU),
    "Heun, as it comes": (D, "HeunDiscreteScheduler", {}),
    "Heun, Karras": (D, "HeunDiscreteScheduler", KARRAS),
    "UniPC, as it comes": (D, "UniPCMultistepScheduler", {}),
    "UniPC, Karras": (D, "UniPCMultistepScheduler", KARRAS),
    "DEIS, as it comes": (D, "DEISMultistepScheduler", {}),
    "LMS, as it comes": (D, "LMSDiscreteScheduler", {}),
    "PNDM, as it comes": (D, "PNDMScheduler", {}),
    "k-diffusion: Euler, Karras": (by_k_diffusion, "sample_euler", {}),
    "k-diffusion: Heun, Karras": (by_k_diffusion, "sample_heun", {}),
    "k-diffusion: DPM-Solver++(2M), Karras": (by_k_diffusion, "sample_dpmpp_2m", {}),
    "experiment 8: DPM-Solver++(2M), rho = 7": (by_ours, None, {}),
    "smalldiffusion: DDIM": (by_smalldiffusion, None, {"gam": 1.0}),
    "smalldiffusion: accelerated": (by_smalldiffusion, None, {"gam": 2.0}),
}


def error(label, num_steps, noise, twins):
    """RMS distance to the twins, and the number of evaluations."""
    how, name, config = RUNS[label]
    x_0, calls = how(*[name] * (name is not None), num_steps, noise, **config)
    return np.square(x_0 - twins).sum(axis=1).mean() ** 0.5, calls


ORANGE, BLUE, GREEN = "#E69F00", "#0072B2", "#009E73"
LINES = {  # color: the solver;  dashed: the grid that it comes with
    "DDIM, as it comes": (ORANGE, "--"),
    "Euler, Karras": (ORANGE, "-"),
    "Heun, as it comes": (GREEN, "--"),
    "Heun, Karras": (GREEN, "-"),
    "DPM-Solver++(2M), as it comes": (BLUE, "--"),
    "DPM-Solver++(2M), Karras": (BLUE, "-"),
    "DPM-Solver++(2M), Lu": (BLUE, "-."),
    "experiment 8: DPM-Solver++(2M), rho = 7": ("k", "-"),
}


def draw(noise, twins):
    fig, ax = plt.subplots(figsize=(7, 4.8), layout="constrained")
    for label, (color, style) in LINES.items():
        curve = [error(label, n, noise, twins) for n in (8, 15, 25, 50, 100, 200)]
        rms, calls = zip(*curve)
        ax.loglog(calls, rms, style, color=color, marker="o", ms=3, label=label)
    ax.set(xlabel="evaluations of the denoiser", ylabel="RMS distance to the twins")
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8)
    fig.savefig(PAGE.parent / "your-sampler.jpg", dpi=120)


def main():
    for name in ("diffusers", "k-diffusion", "smalldiffusion", "torch", "numpy"):
        print(name, version(name))
    for seed in (0, 1):
        noise, twins = starts(seed, SIGMAS[-1])
        print(f"seed {seed}: RMS distance to twins, steps      15            50           200")
        for label in RUNS:
            found = [error(label, n, noise, twins) for n in (15, 50, 200)]
            print(f"{label:40}", *(f"{rms:.4f} ({calls:3})" for rms, calls in found), flush=True)
    draw(noise, twins)


if __name__ == "__main__":
    main()
