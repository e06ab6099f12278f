"""Experiment 20 held to references that share no code with it."""

import math
from functools import partial

import inversion as s
import numpy as np
import pytest
import torch
from conftest import paste, snippet, torch_rng

OTHER = """
S_U, S_C = 0.7, 3.0
CENTERS = torch.tensor([[4.0, 9.0], [7.0, 3.0], [0.5, 1.0]], dtype=torch.double)
WEIGHTS = torch.tensor([0.2, 0.5, 0.3], dtype=torch.double)
STD = 0.6
START, END = 1.0, 9.0
def curve(theta):
    return torch.stack([9 + theta * theta.cos() / 2, 3 * theta.sin() - 5], dim=1)
"""
DATA = {"the script's": "STD = 0.05", "off center": OTHER, "the page's": snippet(s)}


def product(w, n, s_u, s_c, sigma_max):
    """There and back by hand: up with the slopes at lower ends, down with those at upper ends."""
    sigma, h, total = np.arange(n + 1) * sigma_max / n, sigma_max / n, 1.0
    g = sigma * ((1 - w) / (s_u**2 + sigma**2) + w / (s_c**2 + sigma**2))
    for k in range(n):
        total *= (1 + h * g[k]) * (1 - h * g[k + 1])
    return total


@pytest.mark.parametrize("code", DATA.values(), ids=DATA)
def test_the_truth_follows_the_data(code, tmp_path, monkeypatch):
    o = paste(s, code)
    for w in (1, 3):
        law = o.factor(w, 4000, s_u=o.S_U, s_c=o.S_C, sigma_max=40)
        assert law == pytest.approx(product(w, 4000, o.S_U, o.S_C, 40), abs=2e-3)
        want = product(w, 30, o.S_U, o.S_C, o.LINE_SIGMA)
        assert o.measured_factor(w, 30) == pytest.approx(want), "not there and back on this line"
    # The denoisers by Bayes' rule in NumPy.
    centers, weights, sigma = o.CENTERS.numpy(), o.WEIGHTS.numpy(), 3 * o.STD
    x = centers.mean(axis=0) + centers.std() * np.random.default_rng(0).normal(size=(9, 2))
    v, squares = o.STD**2 + sigma**2, ((x[:, None] - centers) ** 2).sum(axis=2)
    p = weights * np.exp((squares.min(axis=1)[:, None] - squares) / (2 * v))
    mean = p @ centers / p.sum(axis=1)[:, None]
    d, d_c = (c + (o.STD**2 / v) * (x - c) for c in (mean, centers[0]))
    for w in (0, 1, 5):
        got = o.in_plane(w)(torch.tensor(x), sigma)
        np.testing.assert_allclose(got, (1 - w) * d + w * d_c, atol=1e-9)
    sent = o.of_first_class(4000, torch_rng()).numpy()
    np.testing.assert_allclose(sent.mean(axis=0), centers[0], atol=5 * o.STD / 4000**0.5)
    assert sent.std(axis=0) == pytest.approx(o.STD, rel=0.06)
    if code == snippet(s):
        monkeypatch.setattr(s.plt.Figure, "savefig", lambda *_, **__: None)
        o.LINE_COUNTS, o.STEP_COUNTS, o.ODE_COUNT = [15], [2], 2
        few = "--train-steps 2 --num-steps 2 --num-samples 5 --figures-dir".split()
        o.main([*few, str(tmp_path)])


@pytest.mark.parametrize(
    ("bad", "word"),
    [
        ("S_U, S_C = 1.0, 0.0", "S_C"),
        ("S_U, S_C = 9.0, 2.0", "LINE_SIGMA"),
        ("STD = math.nan", "STD"),
        ("CENTERS = torch.ones(3, 3).double()", "CENTERS"),
        ("CENTERS = torch.ones(8, 2)", "double"),
        ("CENTERS = torch.ones(8, 2).double() / 0", "finite"),
        ("WEIGHTS = torch.ones(8).double()", "WEIGHTS"),
        ("START, END = 3, 3", "curve"),
    ],
)
def test_what_it_cannot_do_is_refused(bad, word, tmp_path, capsys):
    with pytest.raises(SystemExit) as refusal:
        paste(s, bad).main(["--figures-dir", str(tmp_path / "new")])
    assert refusal.value.code == 2
    assert word in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("sigma_max", [4, 10, 20])
@pytest.mark.parametrize("w", [1, 7.5])
def test_the_factor_in_three_places(w, sigma_max):
    """The formula, the product and the trip agree better, the more steps there are."""
    for n, tolerance in [(50, 0.06), (1000, 5e-4)]:
        law = s.factor(w, n, s_u=s.S_U, s_c=s.S_C, sigma_max=sigma_max)
        by_hand = product(w, n, s.S_U, s.S_C, sigma_max)
        x = np.array([1.0, -2.0, 5.0])
        sigmas = s.even_steps(n, sigma_max)
        latent, again = s.round_trip(s.on_line(w), x, sigmas)
        np.testing.assert_allclose(again, by_hand * x)
        assert law == pytest.approx(by_hand, abs=tolerance), "the formula is not exp(-h int g^2)"
    wide, narrow = ((sigma_max**2 / std**2 + 1) ** 0.5 for std in (s.S_U, s.S_C))
    assert latent / x == pytest.approx(wide ** (1 - w) * narrow**w, rel=0.1)  # by the ODE


def test_inversion_takes_the_slope_at_its_lower_end():
    """After every step, by hand; and the exact one undoes DDIM after every step."""
    sigmas, x = [3.0, 2.0, 0.5, 0.0], torch.tensor([[1.0, 2.0]], dtype=torch.double)
    ups, at = [*s.inversion(lambda x, sigma: x - sigma * x, x, sigmas)], []
    message = "the slope, here x, is not that of the lower end of the step"
    for up, want in zip(ups, [1, 2.5, 5]):
        np.testing.assert_allclose(up, want * x, err_msg=message)

    def watched(x, sigma):
        at.append(sigma)
        return s.in_plane(0)(x, sigma)

    [*s.inversion(watched, x, sigmas)]
    assert at == [0.5, 2]
    x_0 = s.of_first_class(40, torch_rng())
    levels = s.even_ratios(15, 0.002, 4)
    assert (levels[0], levels[-1], len(levels)) == (pytest.approx(4), pytest.approx(0.002), 16)
    assert levels[3] / levels[2] == pytest.approx(levels[9] / levels[8])
    ups = [x_0, *s.exact_inversion(s.in_plane(0), x_0, levels)]
    downs = [ups[-1], *s.ddim(s.in_plane(0), ups[-1], levels)]
    for up, down in zip(ups, downs[::-1]):
        torch.testing.assert_close(up, down, rtol=0, atol=1e-11)


def test_solved_where_the_plain_iteration_fails():
    """All data, 15 steps, points between classes: goal(x) for x does not converge, ours does."""
    denoiser, levels = s.in_plane(0), s.even_ratios(15, 0.002, 4)
    turn = torch.linspace(0.1, 0.7, 41, dtype=torch.double)
    x, failed = torch.stack([turn.cos(), turn.sin()], dim=1), False
    for sigma, next_sigma in zip(levels[6:10], levels[7:]):
        start = x
        for _ in range(60):
            start = x + (sigma - next_sigma) * (start - denoiser(start, sigma)) / sigma
        found = s.inverse_step(denoiser, x, sigma, next_sigma)
        (plain,), (ours,) = (s.ddim(denoiser, y, [sigma, next_sigma]) for y in (start, found))
        failed |= (plain - x).abs().max().item() > 1e-3
        assert (ours - x).abs().max() < 1e-12, "the step's own equation is not solved"
    assert failed
    x_0 = s.of_first_class(50, torch_rng())
    assert 0.1 < s.apart(s.solved(s.in_plane(1), x_0, levels, s.in_plane(7.5))[1], x_0) < 0.25


def test_the_ode_there_and_back(monkeypatch):
    """One Gaussian is multiplied by a ratio of stds, known; two ODEs do not undo each other."""
    x = s.of_first_class(30, torch_rng())
    levels = s.even_ratios(200, 0.01, 4)
    ratio = math.hypot(s.STD, 4) / math.hypot(s.STD, 0.01)
    want = s.CENTERS[0] + ratio * (x - s.CENTERS[0])
    latent = s.ode(s.in_plane(1), x, levels[::-1])
    torch.testing.assert_close(latent, want, rtol=1e-6, atol=1e-6)
    monkeypatch.setattr(s, "ODE_COUNT", 100)
    error, size = s.measure_ode(s.in_plane(1), s.in_plane(7.5), x, 0.002, 4)
    fine = s.round_trip(s.in_plane(1), x, s.even_ratios(500, 0.002, 4), s.in_plane(7.5))
    assert error == pytest.approx(s.apart(fine[1], x), rel=0.05)
    assert size == pytest.approx((fine[0].square().mean() / 16).sqrt().item(), rel=0.02)


def test_it_learns_and_what_is_inverted_is_the_network():
    network = s.train(train_steps=150, rng=torch_rng(3))
    g = torch_rng(4)
    x_0 = s.swiss_roll(2000, g)
    x = s.add_noise(x_0, 0.09, s.ROLL_SIGMA, g)
    theta = torch.linspace(s.START, s.END, 2000)
    best = (-torch.cdist(x, s.curve(theta)).square() / 0.18).softmax(dim=1) @ s.curve(theta)
    denoiser = partial(s.learned, network=network)
    found = denoiser(x.double(), 0.3)
    excess, bayes = (found - best).square().sum(dim=1).mean(), (x_0 - best).square().sum(dim=1)
    assert excess < 0.1 * bayes.mean(), "far from E[x_0 | x_t]"
    sent = x_0[:20].double()
    again = s.solved(denoiser, sent, s.even_ratios(10, s.MIN_T**0.5, 1))[1]
    assert s.apart(again, sent) < 1e-12


def numbers(row):
    """The cells of a row, after the first, as numbers."""
    return [float(cell) for cell in row[1:]]


def test_main(tmp_path, monkeypatch, spy):
    """Options reach the trips, the trips the rows and the figures."""
    names = "train of_first_class swiss_roll add_noise measure measure_ode paths table"
    names += " draw_round_trip draw_paths draw_latents"
    calls = {name: spy(s, name) for name in names.split()}
    monkeypatch.setattr(s.plt.Figure, "savefig", lambda *_, **__: None)
    monkeypatch.setattr(s, "LINE_COUNTS", [20, 70])
    monkeypatch.setattr(s, "STEP_COUNTS", [4, 6])
    monkeypatch.setattr(s, "ODE_COUNT", 9)
    monkeypatch.setattr(s, "inverse_step", partial(s.inverse_step, most=9))
    words = "--num-steps 5 --num-samples 7 --w 3 --off 0.2 --train-steps 3 --seed 2"
    s.main(f"--figures-dir {tmp_path} {words}".split())
    assert calls["train"][0].train_steps == 3
    x_class, noisy = calls["of_first_class"][0].result, calls["add_noise"][-1]
    assert (len(x_class), noisy.sigma_q * noisy.t**0.5) == (7, pytest.approx(0.2))
    pair = {"no guidance": (1, 1), "one way": (1, 3), "both ways": (3, 3)}
    *plane, roll = calls["measure"]
    x = torch.tensor([[0.3, 0.8]], dtype=torch.double)
    for call, ode, (name, ws) in zip(plane, calls["measure_ode"], pair.items()):
        assert call.name == name
        for one in (call, ode):
            assert torch.equal(one.x_0, x_class)
            assert (one.sigma_min, one.sigma_max) == pytest.approx((0.002, 4))
            for field, w in zip((one.there, one.back), ws):
                assert torch.equal(field(x, 0.3), s.in_plane(w)(x, 0.3))
    assert torch.equal(roll.x_0, noisy.result.double())
    assert (roll.sigma_min, roll.sigma_max) == (s.MIN_T**0.5, 1)
    network = calls["train"][0].result
    assert torch.equal(roll.there(x, 0.3), network(x, 0.09))
    assert roll.back is roll.there

    line, trips = (call.rows for call in calls["table"])
    assert numbers(line[0]) == [20, 70]
    for w, found, law in [(1, *line[1:3]), (3, *line[3:5])]:
        want = [product(w, n, s.S_U, s.S_C, 10) for n in (20, 70)]
        assert numbers(found) == pytest.approx(want, abs=6e-5)
        want = [s.factor(w, n, s_u=s.S_U, s_c=s.S_C, sigma_max=10) for n in (20, 70)]
        assert numbers(law) == pytest.approx(want, abs=6e-5)
    levels = {n: s.even_ratios(n, 0.002, 4) for n in (4, 6)}
    for k, call in enumerate(calls["measure"]):
        errors, sizes = call.result
        limit = [calls["measure_ode"][k].result[0]] if k < 3 else []
        assert numbers(trips[1 + 2 * k]) == pytest.approx(errors["plain"] + limit, rel=0.06)
        assert numbers(trips[2 + 2 * k]) == pytest.approx(errors["solved"], rel=0.06)
        if k < 3:
            for n, error, exact, size in zip((4, 6), errors["plain"], errors["solved"], sizes):
                latent, again = s.round_trip(call.there, x_class, levels[n], call.back)
                assert error == pytest.approx((again - x_class).norm() / 7**0.5)
                assert size == pytest.approx(latent.norm() / (4 * 14**0.5))
                *_, again = s.solved(call.there, x_class, levels[n], call.back)
                assert exact == pytest.approx((again - x_class).norm() / 7**0.5)
    for row, k in zip(trips[9:], (0, 2)):
        want = [*calls["measure"][k].result[1], calls["measure_ode"][k].result[1]]
        assert numbers(row) == pytest.approx(want, rel=6e-3)

    (drawn,) = calls["draw_round_trip"]
    assert drawn.limit == calls["measure_ode"][1].result[0]
    assert [*drawn.factors] == [1, 3]
    assert all(drawn.errors[call.name] is call.result[0] for call in calls["measure"])
    plain, solved, plane = calls["paths"]
    sigmas = s.even_steps(5, 10)
    for call, trip in (plain, s.round_trip), (solved, s.solved):
        latent, again = trip(s.on_line(1), call.x_0, sigmas)
        up, down = call.result
        assert torch.equal(up[0], call.x_0)
        assert torch.equal(up[-1], latent)
        assert torch.equal(down[0], latent)
        assert torch.equal(down[-1], again)
    latent, again = s.solved(s.in_plane(1), x_class[:6], s.even_ratios(5, 0.002, 4), s.in_plane(3))
    assert torch.equal(plane.result[0][-1], latent)
    assert torch.equal(plane.result[1][-1], again)
    (drawn,) = calls["draw_paths"]
    assert drawn.line == {"plain": plain.result, "solved": solved.result}
    assert drawn.plane is plane.result
    assert drawn.sigmas == sigmas
    latents = [x for x, _ in calls["draw_latents"][0].latents.values()]
    for latent, w in zip(latents, (1, 3)):
        want, _ = s.round_trip(s.in_plane(w), x_class, s.even_ratios(5, 0.002, 4))
        assert torch.equal(latent, want)
    assert calls["draw_latents"][0].base.std().item() == pytest.approx(4, rel=0.6)


COLORS = {"no guidance": "#E69F00", "one way": "#CC79A7", "both ways": "#56B4E9"}


def test_the_figures():
    """Curves in the colours of their runs: errors, paths, latents."""
    counts, factors = s.LINE_COUNTS, {1: [0.2, 0.3, 0.4, 0.5], 7.5: [-0.1, 0.6, 0.7, 0.8]}
    names = {**COLORS, "network": "#0072B2"}
    errors = {
        run: {"plain": [k, k + 1, k + 2], "solved": [k + 0.1, k + 0.2, k + 0.3]}
        for k, run in enumerate(names, 1)
    }
    line, plane, roll = s.draw_round_trip(factors, errors, 0.37, 7.5).axes
    for w, color in [(1, "#E69F00"), (7.5, "#56B4E9")]:
        (marks,) = [x for x in line.lines if x.get_color() == color]
        want = np.transpose([counts, [abs(1 - x) for x in factors[w]]])
        np.testing.assert_allclose(marks.get_xydata(), want)
    laws = [x.get_xydata() for x in line.lines if x.get_color() == "k"]
    for law, w in zip(laws, factors):
        for n, lost in law[::20]:
            want = 1 - s.factor(w, n, s_u=s.S_U, s_c=s.S_C, sigma_max=s.LINE_SIGMA)
            assert lost == pytest.approx(want)
    assert len(laws) == 2
    for run, color in names.items():
        ax = roll if run == "network" else plane
        curves = {x.get_linestyle(): x.get_ydata() for x in ax.lines if x.get_color() == color}
        assert [*curves["-"]] == errors[run]["plain"]
        assert [*curves[":"]] == errors[run]["solved"]
    (dashed,) = [x for x in plane.lines if x.get_color() == "k"]
    assert [*dashed.get_ydata()] == [0.37, 0.37]

    rows = torch.arange(6.0)[:, None] + torch.tensor([[0.0, 0.3]])
    both = {name: (rows + k, rows.flipud() + k + 7) for k, name in enumerate(("plain", "solved"))}
    flat = torch.stack([rows, rows**2], dim=2)
    *panels, plane = s.draw_paths(both, (flat, -flat), [5, 4, 3, 2, 1, 0], 7.5).axes
    for ax, (up, down) in zip(panels, both.values()):
        grey, orange = ([x for x in ax.lines if x.get_color() == c] for c in ("0.6", "#E69F00"))
        for k in range(2):
            for curve, run in (grey[k], up), (orange[k], down.flipud()):
                for sigma, x in curve.get_xydata():
                    assert x == pytest.approx(run[round(sigma), k].item()), "not at its level"
        assert ax.get_xlim()[0] > ax.get_xlim()[1]
    for color, run in ("0.6", flat), ("#CC79A7", -flat):
        curves = [x.get_xydata() for x in plane.lines if x.get_color() == color]
        np.testing.assert_allclose(np.stack(curves, axis=1), run)

    base, points = torch.ones(3, 2), {"a": 2 * torch.ones(3, 2), "b": 5 * torch.ones(3, 2)}
    drawn = {name: (x, color) for (name, x), color in zip(points.items(), COLORS.values())}
    assert len(s.draw_latents({"a": drawn["a"]}, base).axes) == 1, "with w = 1 there is one"
    for ax, (x, color) in zip(s.draw_latents(drawn, base).axes, drawn.values()):
        found = {dots.get_color(): dots.get_xydata() for dots in ax.lines}
        np.testing.assert_array_equal(found[color], x)
        np.testing.assert_array_equal(found["0.3"], base)
