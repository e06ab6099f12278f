"""Experiment 18 held to references that share no code with it."""

import inspect
import itertools
import math
import re
from collections import Counter
from fractions import Fraction
from functools import lru_cache, partial

import numpy as np
import pytest
import torch
import unmasking_order as s
import words
from conftest import paste, rng, snippet, torch_rng
from matplotlib.colors import to_hex
from matplotlib.figure import Figure


@lru_cache(None)
def chances(seen, place, listed):
    """{letter: p(letter at place | seen)}, counted word by word: seen is 'c.t'."""
    fitting = [w for w in listed if all(a in (".", b) for a, b in zip(seen, w))] or listed
    counts = Counter(w[place] for w in fitting)
    return {letter: Fraction(k, len(fitting)) for letter, k in sorted(counts.items())}


def ranked(rule, seen, hidden, draw, listed):
    """Hidden places, those to be shown first in front; equal ones as they stand."""
    if rule == "surest place":
        return sorted(hidden, key=lambda i: -max(chances(seen, i, listed).values()))
    return sorted(hidden, key=lambda i: -chances(seen, i, listed)[draw[i]])


def after(seen, shown, draw):
    return "".join(draw[i] if i in shown else c for i, c in enumerate(seen))


def brute_law(rule, listed, letters):
    """{word: probability}, with every draw of every hidden place written out."""
    states = {"." * len(listed[0]): Fraction(1)}
    while any("." in seen for seen in states):
        found = Counter()
        for seen, weight in states.items():
            hidden = [i for i, c in enumerate(seen) if c == "."]
            laws = [chances(seen, i, listed) for i in hidden]
            for letters_drawn in itertools.product(*laws):
                draw = dict(zip(hidden, letters_drawn))
                p = weight * math.prod(law[c] for law, c in zip(laws, letters_drawn))
                sets = [ranked(rule, seen, hidden, draw, listed)[:letters]]
                if rule == "random":
                    sets = [*itertools.combinations(hidden, min(letters, len(hidden)))]
                for shown in sets:
                    found[after(seen, shown, draw)] += p / len(sets)
        states = found
    return states


@pytest.mark.parametrize("letters", [1, 2, 3])
@pytest.mark.parametrize("rule", s.RULES)
@pytest.mark.parametrize(
    "text",
    [
        'WORDS = "cat car bat bad tab".split()',
        'WORDS = ["10", "11", "01"]',
        'WORDS = ["ABBA", "ACBA", "C BA", "CB A", "ADDA"]',
        snippet(s),
    ],
)
def test_the_truth_follows_the_data(text, rule, letters):
    own = paste(s, text)
    data = own.one_hot(own.WORDS)
    law = own.law(rule, partial(own.denoiser, words=data), data, letters)
    assert law is not None, "law returns nothing"
    brute = brute_law(rule, tuple(own.WORDS), letters)
    for word, q in zip(own.WORDS, law.tolist()):
        exact = float(brute[word])
        assert q == pytest.approx(exact, abs=1e-9), f"q({word}) is {exact:.4f}, not {q:.4f}"
    if letters == 1 and rule != "likeliest draw":
        assert own.kl(law) == pytest.approx(0, abs=1e-9)


def test_two_letters_by_hand():
    """q / p_0 = F_2(p_1(a)) + F_1(p_2(b)); of two that are equal the first place is shown."""
    listed = tuple("ab ac ad bb cb db dd".split())
    p_1, p_2 = (chances("..", place, listed) for place in (0, 1))
    data = s.one_hot(listed)
    law = s.law("likeliest draw", partial(s.denoiser, words=data), data)
    for (a, b), q in zip(listed, law.tolist()):
        below_a = sum(p for p in p_2.values() if p <= p_1[a])
        below_b = sum(p for p in p_1.values() if p < p_2[b])
        assert len(listed) * q == pytest.approx(float(below_a + below_b), abs=1e-9)


def test_the_likeliest_draw_by_brute_force():
    """200 000 runs, all runs in one state at a time: every word within five standard errors."""
    n, rand, listed = 200_000, rng(5), tuple(s.WORDS)
    states = Counter({"....": n})
    for _ in range(4):
        found = Counter()
        for seen, count in states.items():
            hidden = [i for i in range(4) if seen[i] == "."]
            laws = [chances(seen, i, listed) for i in hidden]
            cells = [[*law] for law in laws]
            drawn = [rand.choice(len(p), count, p=[*map(float, p.values())]) for p in laws]
            for draw, k in Counter(zip(*(d.tolist() for d in drawn))).items():
                draw = {i: cells[j][draw[j]] for j, i in enumerate(hidden)}
                first = ranked("likeliest draw", seen, hidden, draw, listed)[:1]
                found[after(seen, first, draw)] += k
        states = found
    data = s.one_hot(listed)
    law = s.law("likeliest draw", partial(s.denoiser, words=data), data).tolist()
    assert sum(states[word] for word in s.WORDS) == n
    assert sum(q for word, q in zip(listed, law) if word[-1] == "e") == pytest.approx(
        0.934, abs=5e-4
    )
    for word, q in zip(s.WORDS, law):
        assert abs(states[word] / n - q) < 5 * (q * (1 - q) / n) ** 0.5, word


def test_two_places_at_once():
    """The page's numbers: what a pair loses is its mutual information, given what is seen."""

    def entropy(*places):
        counts = Counter(tuple(word[i] for i in places) for word in s.WORDS)
        return -sum(k / 48 * math.log(k / 48) for k in counts.values())

    costs, data = {}, s.one_hot(s.WORDS)
    for i, j in itertools.combinations(range(4), 2):
        k, m = {*range(4)} - {i, j}
        rest = entropy(i, j, k) + entropy(i, j, m) - entropy(i, j) - entropy(0, 1, 2, 3)
        costs[i, j] = entropy(i) + entropy(j) - entropy(i, j), rest
    assert min(costs, key=costs.get) == (1, 3)  # the surest: e at the end, a after the first
    assert costs[1, 3] == pytest.approx((0.256, 0.697), abs=5e-4)
    counted = partial(s.denoiser, words=data)
    assert s.kl(s.law("surest place", counted, data, 2)) == pytest.approx(sum(costs[1, 3]))
    mean = sum(map(sum, costs.values())) / 6
    assert s.kl(s.law("random", counted, data, 2)) < mean == pytest.approx(0.885, abs=5e-4)


@pytest.mark.parametrize("letters", [1, 2])
@pytest.mark.parametrize("rule", s.RULES)
def test_sampler_at_every_step(rule, letters):
    """So many letters a step, which stay; and what is returned has the law."""
    n, listed = 20_000, "cat car bat bad tab".split()
    data = s.one_hot(listed)
    counted = partial(s.denoiser, words=data)
    before = torch.zeros(n, *data.shape[1:], dtype=torch.float64)
    for k, x_t in enumerate(s.unmask_by(rule, counted, before, letters, torch_rng(7)) or (), 1):
        assert (x_t.sum(dim=(1, 2)) == min(k * letters, 3)).all(), f"{letters} letters a step"
        assert (x_t >= before).all(), "a letter that was seen has changed, or is hidden again"
        before = x_t
    assert before.any(), "the sampler yields no step"
    assert k == math.ceil(3 / letters), "it goes on when no letter is hidden"
    counts = Counter(s.spell(before))
    for word, q in zip(listed, s.law(rule, counted, data, letters).tolist()):
        off = abs(counts[word] / n - q)
        assert off < 5 * (q * (1 - q) / n) ** 0.5 + 1e-9, f"{word}: not with the probability of law"


def test_copies():
    """What stands in experiment 15 too, words apart, and is held to account there."""
    for name in "faults one_hot spell hide denoiser Denoiser train kl".split():
        texts = (inspect.getsource(getattr(script, name)) for script in (s, words))
        here, there = (re.sub('"[^"]*"', "", text) for text in texts)
        assert here == there


def test_temperature_0(capsys):
    """The page's lines, run in its folder: different words that can come out, for each rule."""
    exec(snippet(s, "Predict, then run"), {})
    counts = [int(line.split()[-1]) for line in capsys.readouterr().out.splitlines()]
    assert counts == [7, 1, 1]


def test_draws_that_are_equally_likely(monkeypatch):
    """The page's words of a coin: errors as small as you like choose among equal draws."""
    listed = "0000 0011 0101 0110 1001 1010 1100 1111".split()
    data = s.one_hot(s.WORDS)
    last = partial(s.law, "likeliest draw", partial(s.denoiser, words=data), data)
    monkeypatch.setattr(s, "TIE", -1e-9)
    assert s.kl(last()) == pytest.approx(0.6360, abs=5e-5)
    assert 48 * last()[s.WORDS.index("home")] == pytest.approx(1.43, abs=5e-3)

    own = paste(s, f"WORDS = {listed}")
    data = own.one_hot(own.WORDS)

    def tipped(x_t):
        mean = own.denoiser(x_t, words=data)
        error = torch.tensor([1.0, -1.0]) * torch.tensor([[5.0], [2.0], [4.0], [3.0]]) * 1e-7
        return torch.where(mean.amax(dim=2, keepdim=True) < 0.9, mean + error, mean)

    for rule in s.RULES[:2]:
        assert own.kl(own.law(rule, tipped, data)) == pytest.approx(0, abs=1e-9)
    share = 8 * own.law("likeliest draw", tipped, data)
    assert share[0].item() == pytest.approx(8 * 15 / 16 * 7 / 8 * 3 / 4, abs=1e-4)
    assert share.min().item() == pytest.approx(1 / 64, abs=1e-4)


def test_signs_are_drawn_as_they_are(monkeypatch):
    """Matplotlib reads what stands between two $ as a formula; and long words need room."""
    listed = [r"$\\$_ab^$", "$^$_cdef"]
    monkeypatch.setattr(s, "WORDS", listed)
    q = torch.tensor([0.4, 0.6])
    s.draw_laws({rule: {"counted": q, "network": q} for rule in s.RULES}).canvas.draw()
    figure = s.draw_runs({rule: [listed] * 9 for rule in s.RULES})
    figure.canvas.draw()
    for panel in figure.axes:
        boxes = sorted(
            (text.get_window_extent().y0, text.get_window_extent().x0, text.get_window_extent().x1)
            for text in panel.texts
        )
        for one, two in zip(boxes, boxes[1:]):
            assert one[2] < two[1] or one[0] < two[0], "words overlap"


def test_list_that_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(s, "WORDS", ["cat", "cart"])
    with pytest.raises(SystemExit, match="2"):
        s.main(["--figures-dir", str(tmp_path / "new")])
    assert "WORDS" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "new").exists()


def test_main(tmp_path, monkeypatch, spy):
    """The page's list, two letters a step: prints and pictures are the trained network's."""
    own = paste(s, snippet(s))
    monkeypatch.setattr(Figure, "savefig", lambda *_, **__: None)
    calls = {name: spy(own, name) for name in ("train", "table", "paths")}
    figures = {name: spy(own, f"draw_{name}") for name in ("laws", "runs", "sweep")}
    own.main([*"--letters 2 --train-steps 30 --seed 3".split(), "--figures-dir", str(tmp_path)])
    (trained,) = calls["train"]
    data, network = trained.words, trained.result[0]
    assert (own.spell(data), trained.train_steps) == (own.WORDS, 30)
    assert torch.equal(trained.rng.get_state(), torch_rng(3).get_state())

    counted, n = partial(own.denoiser, words=data), len(data)
    laws = [[own.law(rule, d, data, 2) for d in (counted, network)] for rule in s.RULES]
    rules, listed, sizes = ([row[1:] for row in call.rows] for call in calls["table"])
    for pair, cells in zip(laws, rules[1:]):
        numbers = [*map(own.kl, pair), *(q.sum().item() for q in pair)]
        assert [*map(float, cells)] == pytest.approx(numbers, abs=5.1e-5)
    share = n * laws[-1][0]
    order = np.argsort(share.tolist(), kind="stable")
    for cells, few in zip(listed, (order[:3], order[:-4:-1])):
        assert cells == [f"{own.WORDS[k]} {share[k]:.4f}" for k in few]
    sweep = [[own.kl(own.law(rule, counted, data, k)) for rule in s.RULES] for k in (1, 2, 3)]
    for row, cells in zip(sweep, sizes[1:]):
        assert [*map(float, cells)] == pytest.approx(row, abs=5.1e-5)

    (panel,) = figures["sweep"][0].result.axes
    drawn = {to_hex(line.get_color()): [*line.get_ydata()] for line in panel.lines}
    for color, column in zip(("#009e73", "#cc79a7", "#56b4e9"), zip(*sweep)):
        assert drawn[color] == pytest.approx(column)
    drawn = []
    for panel in figures["laws"][0].result.axes:
        lines = {to_hex(line.get_color()): [*line.get_ydata()] for line in panel.lines}
        assert lines["#000000"] == [1, 1]
        drawn += [[bar.get_height() for bar in panel.patches], lines["#0072b2"]]
    exact = np.array([(n * q)[order].tolist() for pair in laws for q in pair])
    assert np.array(drawn) == pytest.approx(exact)
    assert [x.get_text() for x in panel.get_xticklabels()] == [own.WORDS[k] for k in order]
    for rule, call, panel in zip(s.RULES, calls["paths"], figures["runs"][0].result.axes):
        x_1 = torch.zeros(16, *data.shape[1:], dtype=torch.float64)
        steps = [own.spell(x_t) for x_t in [x_1, *own.unmask_by(rule, network, x_1, 2, call.rng)]]
        found = {text.get_position(): (text.get_text(), text.get_color()) for text in panel.texts}
        for x, y in itertools.product(range(3), range(16)):
            wrong = s.HIDDEN not in steps[x][y] and steps[x][y] not in own.WORDS
            assert found[x, y] == (steps[x][y], "0.6" if wrong else s.BLUE)
