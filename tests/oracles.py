"""Independent references for the tests: slow, plain, and sharing no code with the scripts.

Each works by another road than the function it checks: quadrature where the script has a closed
form, a closed form where it has a recursion, Runge-Kutta where it has Euler, 50 digits where it has
16. Symbols are the tutorial's: x_t = x_0 + N(0, sigma_q^2 t), sigma_t = sigma_q sqrt(t).
"""

import math
from decimal import Decimal, localcontext
from statistics import NormalDist

import numpy as np

EPS = np.finfo(float).eps

# ------------------------ Reverse means by quadrature (experiments 0 to 2) ------------------------


def reverse_mean(x_t, t, dt, points, weights, data_std, sigma_q):
    """E[x_{t-dt} | x_t] when x_0 ~ sum_i weights[i] N(points[i], data_std^2 I): the joint law,
    summed on a grid.

    x_t: (n, d);  points: (k, d);  weights: (k,).  Returns (n, d). y = x_{t-dt} has density sum_i
    w_i N(a_i, data_std^2 + sigma_q^2 (t - dt)), and x_t given y is N(y, sigma_q^2 dt): the answer
    is the mean of y under their product.  If y has no density (data_std = 0 and dt = t), the sum
    goes over the points.  Otherwise the trapezoidal rule, with steps of half the smaller of the two
    standard deviations: its error on Gaussian products is exp(-4 pi^2) and below.
    """
    noise_variance, variance = sigma_q**2 * dt, data_std**2 + sigma_q**2 * (t - dt)
    means = []
    for x in x_t:
        if variance == 0:
            y, log_prior = points, np.log(weights)
        else:
            narrow = min(noise_variance, variance) ** 0.5
            low, high = (
                np.minimum(x, points.min(0)) - 9 * narrow,
                np.maximum(x, points.max(0)) + 9 * narrow,
            )
            sides = [np.arange(lo, hi, narrow / 2) for lo, hi in zip(low, high)]
            y = np.stack(np.meshgrid(*sides), axis=-1).reshape(-1, len(x))
            log_terms = [
                np.log(w) - ((y - a) ** 2).sum(1) / (2 * variance) for w, a in zip(weights, points)
            ]
            log_prior = np.logaddexp.reduce(log_terms, axis=0)
        log_joint = log_prior - ((x - y) ** 2).sum(1) / (2 * noise_variance)
        joint = np.exp(log_joint - log_joint.max())
        means.append(joint @ y / joint.sum())
    return np.array(means)


# ----------------------------- Experiment 0: the law of the samplers ------------------------------


def ddpm_law(num_steps, mean_1, std_1, mu_0, sigma_0, sigma_q, noise=1.0):
    """(mean, std) of DDPM's output in closed form.

    With V_t = sigma_0^2 + sigma_q^2 t, a step multiplies x_t - mu_0 by V_{t-dt} / V_t.  These
    telescope: from time s to 0 the factor is V_0 / V_s, for what starts at s = 1 and for the noise
    that enters at s = t - dt.
    """
    v = sigma_0**2 + sigma_q**2 * np.arange(num_steps + 1) / num_steps  # at s = 0, dt, ..., 1
    variance = (v[0] / v[-1] * std_1) ** 2 + np.sum(
        (noise * sigma_q * v[0] / v[:-1]) ** 2
    ) / num_steps
    return mu_0 + (mean_1 - mu_0) * v[0] / v[-1], variance**0.5


def ddim_law(num_steps, mean_1, std_1, mu_0, sigma_0, sigma_q):
    """(mean, std) of DDIM's output in closed form.

    Algorithm 2 with this reverse mean multiplies x_t - mu_0 by (sigma_0^2 + sigma_t sigma_{t-dt}) /
    (sigma_0^2 + sigma_t^2), because lam dt = sqrt(t) (sqrt(t) - sqrt(t - dt)).
    """
    sigma = sigma_q * np.sqrt(np.arange(num_steps + 1) / num_steps)
    factor = np.prod((sigma_0**2 + sigma[1:] * sigma[:-1]) / (sigma_0**2 + sigma[1:] ** 2))
    return mu_0 + (mean_1 - mu_0) * factor, std_1 * factor


def limit_law(mean_1, std_1, mu_0, sigma_0, sigma_q, noise, num_steps=4000):
    """(mean, std) in the limit dt -> 0: moments of the reverse SDE (noise = 1) or the probability-
    flow ODE (0).

    dx = -(1 + noise^2) / 2 sigma_q^2 score dt + noise sigma_q dw, dt < 0, with score -(x - mu_0) /
    V_t (Anderson 1982; Song et al. 2021).  In u = log V_t, dm/du = (1 + noise^2) / 2 (m - mu_0) and
    dv/du = (1 + noise^2) v - noise^2 exp(u): solved by Runge-Kutta of order 4.
    """

    def derivative(u, state):
        m, v = state
        return np.array(
            [(1 + noise**2) / 2 * (m - mu_0), (1 + noise**2) * v - noise**2 * math.exp(u)]
        )

    u, end = math.log(sigma_0**2 + sigma_q**2), math.log(sigma_0**2)
    state, h = np.array([mean_1, std_1**2]), (end - u) / num_steps
    for k in range(num_steps):
        state = runge_kutta_step(derivative, u + k * h, state, h)
    return state[0], state[1] ** 0.5


def floor_std_errors(sigma_0, sigma_q):
    """(DDPM's, DDIM's) sigma_0 - std in the limit dt -> 0 from the base, in 50 digits.

    From the true p_1 the limit is p_0.  The base lacks the variance sigma_0^2, of which the square
    of the factor of the whole run is missed at the end: V_0 / V_1 for DDPM, sqrt(V_0 / V_1) for
    DDIM.
    """
    with localcontext() as context:
        context.prec = 50
        v_0, v_1 = Decimal(sigma_0) ** 2, Decimal(sigma_0) ** 2 + Decimal(sigma_q) ** 2
        missed = [v_0 * (v_0 / v_1) ** 2, v_0 * (v_0 / v_1)]
        return [float(v_0.sqrt() - (v_0 - m).sqrt()) for m in missed]


def wasserstein(mean_a, std_a, mean_b, std_b):
    """2-Wasserstein distance of two Gaussians: root mean square difference of their quantiles,
    summed.
    """
    z, standard = np.arange(-8, 0, 0.125), NormalDist()
    density = np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi) * 0.125
    levels = [standard.cdf(v) for v in z]
    a = np.array([NormalDist(mean_a, std_a).inv_cdf(u) for u in levels])
    b = np.array([NormalDist(mean_b, std_b).inv_cdf(u) for u in levels])
    upper = (2 * mean_a - a) - (2 * mean_b - b)  # the quantile at 1 - u mirrors that at u
    middle = (mean_a - mean_b) ** 2 / math.sqrt(2 * math.pi) * 0.125
    return math.sqrt(np.sum(density * ((a - b) ** 2 + upper**2)) + middle)


# ----------------------------------- Experiment 1: a point mass -----------------------------------


def ddpm_mean_square(num_steps, k, mean_square_1, sigma_q, d):
    """E|x_t - a|^2 under DDPM at t = k dt, as a sum over the noises that have entered.

    From j dt to k dt everything shrinks by k / j, and the noise that entered at j dt had d
    sigma_q^2 dt.
    """
    entered = sum((k / j) ** 2 if j else 1.0 for j in range(k, num_steps))
    return (k / num_steps) ** 2 * mean_square_1 + d * sigma_q**2 / num_steps * entered


def distance_from_line(x, start, end):
    """Distance of x from the line through start and end: what is left of x - end after projection.
    All (d,).
    """
    along = (start - end) / np.linalg.norm(start - end)
    return np.linalg.norm((x - end) - (x - end) @ along * along)


# ---------------------------------- Experiment 2: several points ----------------------------------


def posterior(x, t, points, weights, sigma_q):
    """p(x_0 = a_i | x_t = x) in 50-digit arithmetic, and a bound on what 16 digits can do.

    x: (d,);  points: (k, d);  weights: (k,), positive.  Returns (p, bound): (k,) each.
    The bound is rounding analysis of (a_i . x - |a_i|^2 / 2) / variance + log w_i, u = EPS / 2:
    d products, sums, the division and the variance make fewer than 2 d + 8 roundings of terms of
    size (|a_i| . |x| + |a_i|^2) / variance, and 4 of log w_i. p moves by a factor exp of twice the
    largest of these errors at most; exp, the sum and the division add k + 4.
    """
    with localcontext() as context:
        context.prec = 50
        exact = [[Decimal(float(v)) for v in row] for row in (x, *points)]
        variance = Decimal(float(sigma_q)) ** 2 * Decimal(float(t))
        logs = []
        for w, a in zip(weights, exact[1:]):
            square = sum((u - v) ** 2 for u, v in zip(exact[0], a))
            logs.append(Decimal(float(w)).ln() - square / (2 * variance))
        odds = [(v - max(logs)).exp() for v in logs]
        p = np.array([float(v / sum(odds)) for v in odds])
    sizes = (np.abs(points) @ np.abs(x) + (points**2).sum(axis=1)) / float(variance)
    error = EPS / 2 * ((2 * len(x) + 8) * sizes + 4 * np.abs(np.log(weights))).max()
    return p, p * np.expm1(2 * error) + (len(p) + 4) * EPS


def mean_x_0(x, sigma, points, weights):
    """E[x_0 | x_0 + N(0, sigma^2 I) = x], by Bayes' rule.  x: (n, d).  Returns (n, d)."""
    squares = ((x[:, None, :] - points) ** 2).sum(axis=2)
    p = weights * np.exp(-(squares - squares.min(axis=1, keepdims=True)) / (2 * sigma**2))
    return p @ points / p.sum(axis=1, keepdims=True)


def runge_kutta_step(derivative, u, state, h):
    """One step of the classical Runge-Kutta method of order 4 for d state / du = derivative(u,
    state).
    """
    k_1 = derivative(u, state)
    k_2 = derivative(u + h / 2, state + h / 2 * k_1)
    k_3 = derivative(u + h / 2, state + h / 2 * k_2)
    k_4 = derivative(u + h, state + h * k_3)
    return state + h / 6 * (k_1 + 2 * k_2 + 2 * k_3 + k_4)


def probability_flow(x, sigmas, points, weights, substeps=200):
    """Solution of the probability-flow ODE at every sigma of `sigmas`, started from x at the
    first: order 4.

    x: (n, d);  sigmas: (m,), positive.  Returns (m, n, d).  dx/dsigma = -sigma score = (x - E[x_0 |
    x]) / sigma (Karras et al. 2022, eq. 1), so dx / d log(sigma) = x - E[x_0 | x].
    """
    path = [x]
    for start, end in zip(np.log(sigmas[:-1]), np.log(sigmas[1:])):
        h = (end - start) / substeps
        for k in range(substeps):
            x = runge_kutta_step(
                lambda u, x: x - mean_x_0(x, math.exp(u), points, weights), start + k * h, x, h
            )
        path.append(x)
    return np.array(path)


def share_of_first(points, weights, sigma_q, substeps=4000):
    """Share of N(0, sigma_q^2 I) that the ODE carries to the first of two points: by tracing the
    watershed.

    As sigma -> 0 the watershed is where both points are equally likely.  With sigma growing, the
    ODE draws every path near the watershed onto it, so it is traced from a sigma below |a_2 - a_1|
    / 20 up to sigma_q.
    """
    gap = np.linalg.norm(points[1] - points[0])
    axis = (points[1] - points[0]) / gap
    line, sigma = (points @ axis)[:, None], min(gap / 20, sigma_q / 1.5)
    tie = line.mean(axis=0) + sigma**2 * math.log(weights[0] / weights[1]) / gap
    watershed = probability_flow(tie[None], np.array([sigma, sigma_q]), line, weights, substeps)[
        -1, 0, 0
    ]
    return 0.5 * (1 + math.erf(watershed / sigma_q / math.sqrt(2)))


# ----------------------- Experiments 3 and 4: denoiser, velocity, distances -----------------------


def roll_nodes(n=400):
    """The Swiss roll at n Gauss-Legendre nodes of its angle.  Returns (n, 2), weights (n,)."""
    nodes, weights = np.polynomial.legendre.leggauss(n)
    theta = np.pi / 2 + 3.5 * np.pi * (nodes + 1) / 2
    return np.stack([theta * np.cos(theta), theta * np.sin(theta)], axis=1) / (
        4 * np.pi
    ), weights / 2


def roll_denoiser(x_t, sigma_t, num_nodes=200_000):
    """E[x_0 | x_t] on the Swiss roll, by the midpoint rule in the angle, weights by logarithms.
    x_t: (n, 2).

    The rule's relative error is (step / sigma_t)^2 / 24 or so: 5e-6 of sigma_t at sigma_t = 0.005.
    """
    theta = np.pi / 2 + 3.5 * np.pi * (np.arange(num_nodes) + 0.5) / num_nodes
    points = np.stack([theta * np.cos(theta), theta * np.sin(theta)], axis=1) / (4 * np.pi)
    means = []
    for x in x_t:
        logs = -((x - points) ** 2).sum(axis=1) / (2 * sigma_t**2)
        p = np.exp(logs - np.logaddexp.reduce(logs))
        means.append(p @ points)
    return np.array(means)


def spiral_velocity(x, t):
    """v_t(x) = E[x_0 - x_1 | x_t = x] of annulus and spiral, 0 < t < 1, by a sum over all three of
    theta, r, angle.

    x: (2,).  Given theta, x_1 = (x - (1 - t) c(theta) - (1 - t) e) / t with e ~ N(0, 0.1^2 I), so
    the sum goes over the part of the annulus within 9 standard deviations 0.1 (1 - t) / t of where
    e = 0.  Gauss-Legendre in theta (2400 nodes) and r (60), the trapezoidal rule in the angle (its
    ends are at e^-40, or it goes all around). E[x_0 | theta, x_1, x_t] = (x_t - t x_1) / (1 - t),
    as x_t = t x_1 + (1 - t) x_0.
    """
    nodes, weights = np.polynomial.legendre.leggauss(12)
    edges = np.linspace(0, np.sqrt(6 * np.pi), 201) ** 2
    theta = ((edges[1:] + edges[:-1])[:, None] + np.diff(edges)[:, None] * nodes).ravel() / 2
    w_theta = (np.diff(edges)[:, None] * weights).ravel()
    centre = np.stack([theta * np.cos(theta), theta * np.sin(theta)], axis=1) / (2 * np.pi)
    goal, reach = (x - (1 - t) * centre) / t, 9 * 0.1 * (1 - t) / t
    radius, direction = np.linalg.norm(goal, axis=1), np.arctan2(goal[:, 1], goal[:, 0])
    low, high = np.maximum(2.5, radius - reach), np.minimum(3.0, radius + reach)
    keep = low < high
    nodes, weights = np.polynomial.legendre.leggauss(60)
    half_width, num_angles = min(np.pi, 1.1 * reach / 2.5), 150
    offsets = half_width * (2 * (np.arange(num_angles) + 0.5) / num_angles - 1)
    total, moment = 0.0, np.zeros(2)
    for i in np.flatnonzero(keep):
        r = ((low[i] + high[i]) + (high[i] - low[i]) * nodes)[:, None] / 2
        angle = direction[i] + offsets
        a, b = r * np.cos(angle), r * np.sin(angle)
        density = np.exp(
            -((a - goal[i, 0]) ** 2 + (b - goal[i, 1]) ** 2) / (2 * (0.1 * (1 - t) / t) ** 2)
        )
        density *= w_theta[i] * (high[i] - low[i]) * weights[:, None]
        total += density.sum()
        moment += (
            (density * ((x[0] - t * a) / (1 - t) - a)).sum(),
            (density * ((x[1] - t * b) / (1 - t) - b)).sum(),
        )
    return moment / total


def sliced_quantiles(points, num_directions=64):
    """The sorted projections of points, (n, 2), on directions half a turn around.  Returns
    (num_directions, n).
    """
    angles = np.pi * np.arange(num_directions) / num_directions
    return np.sort(
        np.cos(angles)[:, None] * points[:, 0] + np.sin(angles)[:, None] * points[:, 1], axis=1
    )


def sliced_ratio(generated, data):
    """D / F: root mean square sliced distance from sets of generated points to sets of data, over
    that among data sets.

    generated: (a, n, 2), independent sets;  data: (b, n, 2), too.  Returns the ratio and its
    standard error. D^2 and F^2 are means over all pairs: U-statistics.  The error is from leaving
    out one set at a time (jackknife).
    """
    a, b = ([sliced_quantiles(points) for points in sets] for sets in (generated, data))
    cross = np.array([[np.mean((u - v) ** 2) for v in b] for u in a])
    among = np.array([[np.mean((u - v) ** 2) for v in b] for u in b])

    def ratio(rows, columns):
        f = among[np.ix_(columns, columns)].sum() / (len(columns) * (len(columns) - 1))
        return (cross[np.ix_(rows, columns)].mean() / f) ** 0.5

    rows, columns = np.arange(len(a)), np.arange(len(b))
    left_out = (
        [ratio(np.delete(rows, i), columns) for i in rows],
        [ratio(rows, np.delete(columns, i)) for i in columns],
    )
    return ratio(rows, columns), sum((len(v) - 1) * np.var(v) for v in left_out) ** 0.5
