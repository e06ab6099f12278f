"""What training buys, and which times matter.  Run by hand; pytest does not collect it.

Run:  python tests/accuracy.py                error against training time in experiments 3 and 4
      python tests/accuracy.py --intervals    experiment 4: which times matter for what
"""

import argparse

import torch
from benchmark import exhaust, seconds
from conftest import load
from oracles import sliced_ratio


def trained(script, seed=0, **settings):
    """The trained network, and how long it took."""
    networks, rng = [], torch.Generator().manual_seed(seed)
    wall = seconds(
        lambda: networks.append(script.train(**settings, learning_rate=0.01, rng=rng)[0])
    )
    return networks[0], wall


def rows_of_accuracy():
    roll, flow = load("experiment-3/swiss_roll.py"), load("experiment-4/flow_matching.py")
    for steps in (1000, 2000, 4250, 8500, 17_000):
        network, wall = trained(roll, sigma_q=1.0, train_steps=steps, batch_size=1024)
        error = roll.measure_denoiser(network, 1.0, torch.Generator().manual_seed(1))[0]["mean"]
        print(f"3: {steps:6} steps {wall:6.1f} s   mean excess {error:.3%}", flush=True)
    for steps in (600, 1200, 2400, 4800):
        network, wall = trained(flow, train_steps=steps, batch_size=2048)
        print(f"4: {steps:6} steps {wall:6.1f} s   {judge(flow, network, network)}", flush=True)


def judge(flow, network, velocity, n=10_000, num_sets=5, num_steps=200):
    """What a velocity does; network: the one whose error is measured."""
    error = flow.measure_velocity(network, torch.Generator().manual_seed(1))["mean"]
    rng = torch.Generator().manual_seed(2)
    x_0 = exhaust(flow.flow(velocity, flow.annulus(num_sets * n, rng), num_steps)).float()
    data = torch.stack([flow.spiral(n, rng) for _ in range(10)])
    worst = float((10 * flow.shares_along_curve(x_0) - 1).abs().max())
    ratio, se = sliced_ratio(x_0.reshape(num_sets, n, 2).numpy(), data.numpy())
    away = [float(flow.nearest_on_curve(x)[0].mean()) for x in (x_0, data.reshape(-1, 2))]
    return (
        f"velocity error {error:.2%}, worst share {worst:.1%} off, "
        f"sliced W_2 {ratio:.2f} +- {se:.2f} x floor, distance {away[0] / away[1]:.3f} x"
    )


def rows_of_intervals():
    """Three ways to train, and for the first the exact velocity on one interval of t at a time."""
    flow = load("experiment-4/flow_matching.py")
    own_network, own_times, size = (
        flow.Velocity,
        flow.draw_times,
        {"train_steps": 2400, "batch_size": 2048},
    )

    class Plain(own_network):
        """Without preconditioning, and without a view of the annulus's edges."""

        def forward(self, x_t, t):
            t = torch.as_tensor(t, dtype=x_t.dtype).reshape(-1, 1).expand(len(x_t), 1)
            a, b = x_t @ self.frequencies, t * self.harmonics
            waves = [a.sin(), a.cos(), b.sin(), b.cos()]
            return self.layers(torch.cat([x_t, t, torch.zeros(len(x_t), 2), *waves], dim=1))

    def uniform(n, rng):
        return (torch.arange(n) + torch.rand(n, generator=rng)) / n

    def early(n, rng):  # three quarters of the draws below 1/2
        u = uniform(n, rng)
        return torch.where(u < 0.75, u / 1.5, 2 * u - 1)

    for name, network, times, seed in (
        ("3/4 of the draws at t < 1/2, plain", Plain, early, 0),
        ("uniform t, plain", Plain, uniform, 0),
        *(("uniform t, preconditioned", own_network, uniform, seed) for seed in (0, 1, 2)),
        *(("the script's own", own_network, own_times, seed) for seed in (0, 1, 2)),
    ):
        flow.Velocity, flow.draw_times = network, times
        velocity, wall = trained(flow, seed, **size)
        print(f"{name:<36}{wall:5.1f} s   {judge(flow, velocity, velocity)}", flush=True)
        if times is early:
            for low, high in ((0.8, 1.0), (0.5, 0.8), (0.2, 0.5), (0.0, 0.2)):

                def mixed(x_t, t, low=low, high=high, learned=velocity):
                    exact = low < t <= high
                    return flow.exact_velocity(x_t, t, 0.02) if exact else learned(x_t.float(), t)

                row = f"  exact on ({low}, {high}]"
                print(f"{row:<36}{'':>9}{judge(flow, velocity, mixed, num_sets=2)}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--intervals", action="store_true", help="which times matter for what")
    torch.set_num_threads(1)  # as the scripts do
    if parser.parse_args().intervals:
        rows_of_intervals()
    else:
        rows_of_accuracy()


if __name__ == "__main__":
    main()
