"""Experiment 10 held to references that share no code with it."""

import math
from functools import partial

import likelihood as s
import numpy as np
import pytest
import torch

DATA = {"sigma_0": 0.3, "sigma_q": 2.0}
EXACT = partial(s.tweedie, **DATA)


def draws(n, t, seed):
    """n draws of x_0 and x_t, without the script."""
    rng = np.random.default_rng(seed)
    x_0 = np.where(rng.random(n) < 0.6, -1, 1) + 0.3 * rng.standard_normal(n)
    return x_0, x_0 + 2 * t**0.5 * rng.standard_normal(n)


def bent(x_t, t):
    """A denoiser that is wrong everywhere, and not smooth."""
    return EXACT(x_t, t) + 0.2 * t * np.abs(np.sin(x_t)) + 0.1 * t


def normal(x, mean, variance):
    return np.exp(-((x - mean) ** 2) / (2 * variance)) / (2 * math.pi * variance) ** 0.5


def test_mixture():
    """Its share on the left, and its moments."""
    x_0 = s.mixture(100_000, np.random.default_rng(0), sigma_0=0.3)
    assert (x_0 < 0).mean() == pytest.approx(0.6, abs=5 * 0.5 / 1e5**0.5)
    assert x_0.mean() == pytest.approx(-0.2, abs=5 * 1.03 / 1e5**0.5)
    assert x_0[x_0 < 0].std() == pytest.approx(0.3, rel=0.02)


@pytest.mark.parametrize("t", [0.0, 0.01, 0.5, 1.0])
def test_density_score_and_denoiser(t):
    """Against sums of two normal densities, and Bayes' rule on a grid of x_0."""
    x = np.array([-3.0, -1.2, 0.0, 0.1, 2.0])
    p = 0.6 * normal(x, -1, 0.09 + 4 * t) + 0.4 * normal(x, 1, 0.09 + 4 * t)
    assert s.log_density(x, t, **DATA) == pytest.approx(np.log(p))
    difference = s.log_density(x + 1e-5, t, **DATA) - s.log_density(x - 1e-5, t, **DATA)
    assert s.score(x, t, **DATA) == pytest.approx(difference / 2e-5, rel=1e-5)
    if t > 0:
        x_0 = np.linspace(-4, 4, 4001)
        joint = 0.6 * normal(x_0, -1, 0.09) + 0.4 * normal(x_0, 1, 0.09)
        joint = joint * normal(x[:, None], x_0, 4 * t)
        mean = joint @ x_0 / joint.sum(axis=1)
        assert EXACT(x, t) == pytest.approx(mean, abs=1e-6)
        tweedie = x + 4 * t / 3 * s.score(x, t, **DATA)
        assert s.reverse_mean(x, t, t / 3, denoiser=EXACT) == pytest.approx(tweedie)


def test_network_predicts():
    """With a last layer that gives .5: x_0 = .5, or noise = .5; losses of that."""
    x_0, noise, t = torch.tensor([[1.0, -2.0], [0.3, 0.9], [0.25, 1.0]])
    x_t = x_0 + 2 * t**0.5 * noise
    for predicts, power, want, loss in [
        ("x_0", 0, [0.5, 0.5], (0.5**2 + 2.5**2) / 2),
        ("x_0", 2, [0.5, 0.5], (0.5**2 * 16 + 2.5**2) / 2),
        ("noise", 1, [1.3 - 0.5, -0.2 - 1.0], 4 * (0.2**2 + 0.4**2) / 2),
    ]:
        network = s.Network(predicts, 2.0).requires_grad_(False)
        network.layers[-1].weight.zero_()
        network.layers[-1].bias.fill_(0.5)
        assert network(x_t, t).tolist() == pytest.approx(want)
        assert s.on_arrays(network)(x_t.double().numpy(), 1.0)[1] == pytest.approx(want[1])
        assert s.weighted_loss(network, x_0, t, noise, power).item() == pytest.approx(loss)


def test_gradients():
    """That of the ELBO is that of the loss with 1 / t^2, times -1 / (2 sigma_q^2).

    By finite differences of the ELBO, and on a batch of 50 quantiles of the noise for each x_0, t.
    """
    torch.manual_seed(0)
    network = s.Network("x_0", 2.0, width=8).double()
    bias, x = network.layers[4].bias, s.grid(**DATA)

    def expected(shift):
        bias.data += shift
        bound = s.elbo(lambda x, t: network(torch.from_numpy(x), t).detach().numpy(), x, 4, 2.0)
        bias.data -= shift
        return s.average(bound, x, 0, **DATA)

    ways = 1e-5 * torch.eye(8, dtype=torch.double)
    slopes = torch.tensor([expected(way) - expected(-way) for way in ways]) / 2e-5

    middle = (torch.arange(50, dtype=torch.double) + 0.5) / 50
    z = 2**0.5 * torch.erfinv(2 * middle - 1)
    times = torch.arange(1, 5).double() / 4
    x_0 = torch.cat([-1 + 0.3 * z] * 3 + [1 + 0.3 * z] * 2)
    batch = [a.flatten() for a in torch.meshgrid(x_0, times, z, indexing="ij")]
    cosines = []
    for power in (0, 1, 2):
        (gradient,) = torch.autograd.grad(s.weighted_loss(network, *batch, power), bias)
        cosines.append(torch.cosine_similarity(-gradient, slopes, dim=0).item())
    assert cosines[2] > 0.9999
    assert max(cosines[:2]) < 0.999
    assert slopes.norm().item() == pytest.approx(gradient.norm().item() / 8, rel=0.02)


def test_it_learns():
    """To the Bayes error, averaged over the times of the steps."""
    rng = np.random.default_rng(0)
    network, losses = s.train("x_0", 0, num_steps=5, train_steps=300, rng=rng, **DATA)
    bayes = []
    for k in range(1, 6):
        x_0, x_t = draws(50_000, k / 5, k)
        bayes.append(((x_0 - EXACT(x_t, k / 5)) ** 2).mean())
    assert len(losses) == 300
    assert np.mean(losses[-100:]) == pytest.approx(np.mean(bayes), rel=0.03)
    assert s.parts(s.on_arrays(network), 5, **DATA)[1] < 0.01


@pytest.mark.parametrize("x_0", [-1.3, 0.2])
def test_elbo_is_a_sum_over_bridges(x_0):
    """KL divergences of Gaussians along draws of x_t given x_0, five standard errors."""
    n, num_steps = 100_000, 6
    rng, dt = np.random.default_rng(2), 1 / num_steps
    x = s.grid(**DATA)
    bound = np.interp(x_0, x, s.elbo(bent, x, num_steps, 2.0))
    total = np.full(n, -(x_0**2) / 8)  # -KL(p(x_1 | x_0) || base)
    for k in range(num_steps, 0, -1):
        t = k * dt
        x_t = x_0 + 2 * t**0.5 * rng.standard_normal(n)
        mean = s.reverse_mean(x_t, t, dt, denoiser=bent)
        if k == 1:
            total += np.log(normal(x_0, mean, 4 * dt))
        else:
            off, ratio = x_t + (x_0 - x_t) / k - mean, 1 - 1 / k
            total -= (ratio + off**2 / (4 * dt) - 1 - np.log(ratio)) / 2
    assert bound == pytest.approx(total.mean(), abs=5 * total.std() / n**0.5 + 1e-3)


@pytest.mark.parametrize("num_steps", [1, 2, 10, 50])
@pytest.mark.parametrize("denoiser", [EXACT, bent])
def test_bound_and_identity(denoiser, num_steps):
    """ELBO <= log q_0 at every x; E log p_0 - E ELBO is the sum of the parts."""
    bound, log_q = s.measure(denoiser, num_steps, **DATA)
    near = abs(s.grid(**DATA)) < 4
    assert (bound < log_q)[near].all()
    three, gap, kl = s.measure_gap(denoiser, num_steps, **DATA)
    assert gap == pytest.approx(three.sum(), abs=1e-5)
    assert 0 < kl < gap
    assert three[0] > 0
    assert (three[1] > 0.001) == (denoiser is bent)


@pytest.mark.parametrize("slope", [0.0, 0.5])
def test_output_of_a_linear_denoiser(slope):
    """Gaussian, of a variance that obeys a recursion; a tail below any float is still a number."""
    x, num_steps, variance = s.grid(**DATA), 100, 4.0
    mean = partial(s.reverse_mean, denoiser=lambda x_t, t: 0.3 + slope * (x_t - 0.3))
    center = 0.0
    for k in range(num_steps, 0, -1):
        factor = slope / k + 1 - 1 / k
        center = 0.3 + factor * (center - 0.3)
        variance = factor**2 * variance + 4 / num_steps
    log_q = s.log_output(mean, x, num_steps, 2.0)
    near = abs(x) < (8 if slope == 0 else 2)
    want = -((x - center) ** 2) / (2 * variance) - np.log(2 * math.pi * variance) / 2
    assert log_q[near] == pytest.approx(want[near], abs=1e-6)
    assert np.isfinite(log_q).all()


def test_flow():
    """It keeps the share to the left of every point, from p_0 to p_1; so it is known."""

    def share(x, variance):
        erf = [math.erf((x - center) / (2 * variance) ** 0.5) for center in (-1, 1)]
        return (1 + 0.6 * erf[0] + 0.4 * erf[1]) / 2

    x = np.array([-1.5, -0.7, 0.05, 0.8, 1.4])
    want = []
    for point in x:
        low, high = -30.0, 30.0
        for _ in range(60):
            middle = (low + high) / 2
            lower = share(middle, 4.09) < share(point, 0.09)
            low, high = (middle, high) if lower else (low, middle)
        p_0, p_1 = (
            0.6 * normal(z, -1, v) + 0.4 * normal(z, 1, v) for z, v in ((point, 0.09), (low, 4.09))
        )
        want.append(math.log(p_0 / p_1 * normal(low, 0, 4)))
    assert s.log_flow(x, **DATA) == pytest.approx(want, abs=2e-4)
    x = s.grid(**DATA)
    kl = s.average(s.log_density(x, 0, **DATA) - s.log_flow(x, **DATA), x, 0, **DATA)
    assert kl == pytest.approx(s.parts(EXACT, 1, **DATA)[2], abs=2e-5)


def test_disturbed():
    """At equal cost, the pushes of the last steps do most harm, and alternating ones none."""
    kls, pushes = {}, {}
    for where, denoiser in {"none": EXACT, **s.disturbed(EXACT, 0.05, 50, 2.0)}.items():
        (_, learning, _), _, kls[where] = s.measure_gap(denoiser, 50, **DATA)
        assert learning == pytest.approx(0.05 if where != "none" else 0)
        pushes[where] = [np.sign(denoiser(0.0, k / 50) - EXACT(0.0, k / 50)) for k in range(1, 51)]
    harm = {where: kl - kls["none"] for where, kl in kls.items()}
    assert 0.05 > harm["all steps"] > harm["last tenth"] > 4 * harm["first tenth"] > 0
    assert abs(harm["alternating"]) < harm["first tenth"]
    assert pushes["last tenth"] == [1] * 5 + [0] * 45
    assert pushes["first tenth"] == [0] * 45 + [1] * 5
    assert pushes["alternating"] == [-1, 1] * 25


def test_main(tmp_path, capsys, monkeypatch):
    trained, measured = [], []

    def spy_train(*loss, rng, original=s.train, **settings):
        trained.append((loss, settings, rng.bit_generator.state))
        return original(*loss, rng=rng, **settings)

    def spy_measure(denoiser, num_steps, original=s.measure_gap, **data):
        measured.append((num_steps, data))
        return original(denoiser, num_steps, **data)

    monkeypatch.setattr(s, "train", spy_train)
    monkeypatch.setattr(s, "measure_gap", spy_measure)
    monkeypatch.setattr(s, "STEP_COUNTS", [10, 100])
    s.main(f"--figures-dir {tmp_path} --train-steps 30 --num-steps 20 --cost 0.03".split())
    assert [loss for loss, _, _ in trained] == [("x_0", 0), ("x_0", 2), ("noise", 1)]
    for _, settings, state in trained:
        assert settings == {"num_steps": 20, "train_steps": 30, **DATA}
        assert state == trained[0][2]  # the same first weights, the same draws
    assert measured == [(20, DATA)] * 8
    assert {path.stem for path in tmp_path.iterdir()} == {"bound", "three-parts"}
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10
    assert lines[2].split() == ["100", "-0.8868", "-0.9046", "-1.0056"]
    for line in lines[4:8]:
        gap, *three, kl = map(float, line[20:].split())
        assert gap == pytest.approx(sum(three), abs=2e-4)
        assert 0 < kl < gap
        assert (three[1] == 0) == line.startswith("exact")
    assert lines[8].endswith(" 0.0199")
    assert float(lines[8].split()[5].rstrip(";")) < 1e-10
    worst = s.disturbed(EXACT, 0.03, 20, 2.0)["all steps"]
    kl = s.measure_gap(worst, 20, **DATA)[2]
    assert lines[9].startswith(f"KL(p_0 || q_0), learning 0.03: all steps {kl:.4f}")
