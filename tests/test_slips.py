"""The slips of experiments/ERRATA.md that can be run: the printed form fails, the derived holds."""

import math

import numpy as np
import pytest

# Gaussian data: every variable is a sum of x_0 and of independent noises: that of the time up to
# T - DT, of the last DT before T, and of the time from T to 1. VARIANCES has theirs.
T, DT, SIGMA_Q = 0.5, 0.2, 1.5
VARIANCES = np.array([0.7, SIGMA_Q**2 * (T - DT), SIGMA_Q**2 * DT, SIGMA_Q**2 * (1 - T)])
X_0, X_BEFORE, X_T, X_1 = np.tri(4)  # at 0, T - DT, T, 1
SIGMA_T = SIGMA_Q * T**0.5
NOISE = (X_T - X_0) / SIGMA_T  # epsilon_t


def mean_square(a):
    return a**2 @ VARIANCES


def given(a, x):
    """E[a | x], of jointly Gaussian a and x: a multiple of x."""
    return (a * x) @ VARIANCES / mean_square(x) * x


def distance_left(velocity, num_steps=1000):
    """Pseudocode 5 to a point mass at x_0 = 0, from x_1 = 1."""
    x = 1.0
    for k in range(num_steps, 0, -1):
        x += velocity(x, k / num_steps) / num_steps
    return abs(x)


def test_pseudocode_3():
    def run(times, dt, x=1.0):
        for t in times:
            lam = math.sqrt(t) / (math.sqrt(t - dt) + math.sqrt(t))
            x = x + lam * ((t - dt) / t * x - x)  # to a point mass at 0
        return x

    with pytest.raises(ValueError, match=r"domain|nonnegative"):
        run([1, 0.75, 0.5, 0.25, 0], 0.25)
    assert run([1, 0.75, 0.5, 0.25], 0.25) == 0


def test_eq_70():
    assert distance_left(lambda x, t: x / (2 * t)) > 30
    assert distance_left(lambda x, t: -x / (2 * t)) < 0.02


def test_lemma_4():
    on_line = T * X_1 + (1 - T) * X_0
    exact = given(X_0 - X_1, on_line)
    assert not np.allclose(exact, given(X_0 - on_line, on_line), rtol=0.1)
    np.testing.assert_allclose(exact, given(X_0 - on_line, on_line) / T)
    np.testing.assert_allclose(given(X_1, X_T), X_T)  # in the forward process, not on the line:
    assert not np.allclose(given(X_1, on_line), on_line, rtol=0.1)
    assert distance_left(lambda x, t: -x) == pytest.approx(1 / math.e, rel=1e-3)
    assert distance_left(lambda x, t: -x / t) < 1e-12


def test_b_10_noise():
    np.testing.assert_allclose(given(X_0 - X_T, X_T), -SIGMA_T * given(NOISE, X_T))
    least = mean_square(DT / T * (given(X_0, X_T) - X_0))
    least_noise = mean_square(given(NOISE, X_T) - NOISE)
    assert (DT / (T * SIGMA_T)) ** 2 * least_noise != pytest.approx(least, rel=0.1)
    assert (DT * SIGMA_T / T) ** 2 * least_noise == pytest.approx(least)


def test_b_10_errors():
    least = mean_square(DT / T * (given(X_0, X_T) - X_0))
    bridge = SIGMA_Q**2 * DT * (T - DT) / T
    printed = given(X_BEFORE - X_T, X_T) - X_BEFORE
    assert mean_square(printed) > 3 * (least + bridge)
    assert mean_square(printed + X_T) == pytest.approx(least + bridge)
    for f in (0 * X_T, 0.4 * X_T, -2 * X_T):  # in the place of E[x_0 | x_t]
        first, second = DT / T * (f - X_T) + X_T - X_BEFORE, DT / T * (f - X_0)
        assert mean_square(first) - mean_square(second) == pytest.approx(bridge)


def test_lemma_1():
    """KL(Gaussian || posterior): infinite for a smooth bump, O(sigma^4) for 1 / cosh, N(0, 1)."""

    def bump(x):
        return np.where(abs(x) < 1, -1 / (1 - np.clip(x, -1 + 1e-9, 1 - 1e-9) ** 2), -np.inf)

    def kl(log_p, sigma, z=0.5, h=1e-4):
        u = np.linspace(-12, 12, 24_001)  # x_0 = z + sigma u
        log_posterior = log_p(z + sigma * u) - u**2 / 2
        log_posterior = log_posterior - np.log(np.exp(log_posterior).sum())
        shift = sigma * (log_p(z + h) - log_p(z - h)) / (2 * h)  # mu_z = z + sigma^2 (log p)'(z)
        log_q = -((u - shift) ** 2) / 2
        log_q = log_q - np.log(np.exp(log_q).sum())
        return np.exp(log_q) @ (log_q - log_posterior)

    largest = []  # fourth derivative of the bump's p, on a grid and on one twice as fine
    for n in (2001, 4001):
        x = np.linspace(-1.1, 1.1, n)
        largest.append(abs(np.diff(np.exp(bump(x)), 4)).max() / (x[1] - x[0]) ** 4)
    assert largest[1] == pytest.approx(largest[0], rel=0.01)
    for sigma in (0.5, 0.1, 0.05):
        assert kl(bump, sigma) == math.inf
    for log_p in (lambda x: -np.log(np.cosh(x)), lambda x: -(x**2) / 2):  # its slope has no bound
        smooth = [kl(log_p, sigma) for sigma in (0.1, 0.05)]
        assert smooth[0] / smooth[1] == pytest.approx(16, rel=0.03)


def test_figure_2():
    """Bayes' rule on a grid: as printed, x_t says nothing of x_{t-1}, however small sigma is."""
    x, sigma, x_t = np.linspace(-6, 6, 4001), 0.1, 0.5
    prior = np.exp(-((x - 1) ** 2) / 0.5) + np.exp(-((x + 1) ** 2) / 0.5)

    def std(center):
        posterior = prior * np.exp(-((x_t - center) ** 2) / (2 * sigma**2))
        mean = posterior @ x / posterior.sum()
        return (posterior @ (x - mean) ** 2 / posterior.sum()) ** 0.5

    assert std(0 * x) == pytest.approx((1 + 0.25) ** 0.5, rel=1e-3)  # the prior's
    assert std(x) == pytest.approx(sigma, rel=0.05)


def test_claim_1():
    """p_t = N(0, 1 + t): with minus the remainder falls as dt^2, fourfold."""

    def p(t, x=0.5):
        return math.exp(-(x**2) / (2 + 2 * t)) / (2 * math.pi * (1 + t)) ** 0.5

    rate = (p(T + 1e-5) - p(T - 1e-5)) / 2e-5
    printed, derived = (
        [abs(p(T - dt) - p(T) - sign * dt * rate) for dt in (0.02, 0.01)] for sign in (1, -1)
    )
    assert printed[0] / printed[1] == pytest.approx(2, rel=0.02)
    assert derived[0] / derived[1] == pytest.approx(4, rel=0.05)


def test_footnote_22():
    s, s_next, x_0 = math.exp(-0.3), math.exp(-0.4), 2.0  # s(t) = exp(-t)
    x_t = s * x_0
    assert x_t + (s - s_next) / s * x_t > x_t > s_next * x_0
    assert x_t + (s_next - s) / s * x_t == pytest.approx(s_next * x_0)


def test_eq_45():
    """One point a: a step by v dt scales the distance to it by sigma_{t-dt} / sigma_t."""
    a, x_t, ratio = 0.5, 2.0, (1 - DT / T) ** 0.5
    v = 1 / (ratio + 1) * (DT / T) * (a - x_t)  # lam E[x_{t-dt} - x_t | x_t]
    assert x_t + v * DT != pytest.approx(a + ratio * (x_t - a), rel=0.1)
    assert x_t + v / DT * DT == pytest.approx(a + ratio * (x_t - a))


def test_section_5():
    """Without noise: a thousand small steps of eq. (74), and dx = f dt."""
    x_0, rate, n = 3.0, 2.0, 1000
    exact = printed = derived = x_0
    for _ in range(n):
        exact *= math.sqrt(1 - rate / n)
        printed += -rate / 2 / n
        derived += -rate / 2 * derived / n
    assert printed != pytest.approx(exact, rel=0.1)
    assert derived == pytest.approx(exact, rel=2e-3)


def test_eq_104():
    """p = N(1, 1), F'(0) = 1, F''(0) = -1: the remainder falls with sigma^4, sixteenfold."""

    def remainder(sigma, sign):
        variance = 1 + sigma**2
        exact = -math.log(2 * math.pi * variance) / 2 - 1 / (2 * variance)
        return exact - (-math.log(2 * math.pi) / 2 - 1 / 2) - sigma**2 * (-1 + sign) / 2

    assert remainder(0.1, -1) / remainder(0.05, -1) == pytest.approx(4, rel=0.02)
    assert remainder(0.1, 1) / remainder(0.05, 1) == pytest.approx(16, rel=0.02)


def test_eq_106():
    """F = 2x - exp(x) at 0: F' = 1, F'' = F''' = -1.  KL(N(mu, sigma^2) || posterior) less terms.

    With mu = sigma^1.5 the rest is sigma^2 mu / 2 and falls as sigma^3.5; at mu* as sigma^4.
    """

    def rest(mu, sigma, kept=0.0):
        u = np.linspace(-10, 10, 4001)  # x = sigma u
        p_1 = np.exp(2 * sigma * u - np.exp(sigma * u) - u**2 / 2).sum() / np.exp(-(u**2) / 2).sum()
        mean_f = 2 * mu - math.exp(mu + sigma**2 / 2)
        kl = math.log(p_1) + mu**2 / (2 * sigma**2) - mean_f
        return kl - (mu - sigma**2) ** 2 / (2 * sigma**2) - mu**2 / 2 - kept * sigma**2 * mu

    def falls(power, kept=0.0):
        large, small = (rest(sigma**power, sigma, kept) for sigma in (0.01, 0.005))
        return math.log2(large / small)

    assert falls(1.5) == pytest.approx(3.5, abs=0.1)  # not sigma^4
    assert falls(1.5, kept=0.5) > 3.8
    assert falls(2) == pytest.approx(4, abs=0.1)


def test_b_5_limit():
    def off(t, dt):
        return abs(math.sqrt(1 - dt / t) - (1 - dt / (2 * t)))

    assert off(0.1, 0.1) == 0.5  # the smallest t that there is
    assert off(0.5, 1e-2) / off(0.5, 1e-3) == pytest.approx(100, rel=0.02)  # second order


def test_b_5_last_line():
    """The mean of x_0 by least squares: from noise alone there is nothing to learn."""
    assert not given(X_0, X_T - X_0).any()
    shrink = VARIANCES[0] / (VARIANCES[0] + SIGMA_Q**2 * T)
    np.testing.assert_allclose(given(X_0, X_T), shrink * X_T)


def test_eq_132():
    last, total = given(X_T - X_BEFORE, X_T), given(X_T - X_0, X_T)
    np.testing.assert_allclose(T / DT * last, total)  # as in (128)
    assert not np.allclose(T / DT * last, given(X_0 - X_T, X_T), rtol=0.1)
