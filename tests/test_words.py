"""Experiment 15 held to references that share no code with it."""

import itertools
import math
import re
from collections import Counter
from functools import lru_cache, partial

import pytest
import torch
import words as s
from conftest import paste, snippet, torch_rng
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

LIST = tuple("cat car bat bad tab".split())
DATA = s.one_hot(LIST)
EXACT = partial(s.denoiser, words=DATA)


def state(text, letters=s.LETTERS):
    """'c.t' as (1, 3, letters): a dot is hidden."""
    rows = [[float(letter == seen) for letter in letters] for seen in text]
    return torch.tensor([rows], dtype=torch.float64)


@lru_cache(None)
def chance(letter, place, seen, listed=LIST):
    """p(letter at place | seen), counted word by word: seen is 'c.t'."""
    fitting = [w for w in listed if all(a in (".", b) for a, b in zip(seen, w))]
    return sum(w[place] == letter for w in fitting) / len(fitting)


def masked(word, places):
    return "".join(letter if shown else "." for letter, shown in zip(word, places))


def brute_law(word, num_steps, listed):
    """The mean over all steps at which each letter can be shown."""
    ways = []
    for steps in itertools.product(range(num_steps), repeat=len(word)):
        seen = [masked(word, [other < step for other in steps]) for step in steps]
        ways.append(math.prod(chance(c, i, seen[i], listed) for i, c in enumerate(word)))
    return sum(ways) / len(ways)


def brute_entropies(t, listed):
    """S(t): over letters, over which of the others are seen, over words."""
    total, length = 0, len(listed[0])
    for places in itertools.product((0, 1), repeat=length):
        weight = (1 - t) ** sum(places) * t ** (length - 1 - sum(places)) if not all(places) else 0
        for word, place in itertools.product(listed, range(length)):
            if not places[place]:
                seen = masked(word, places)
                total -= weight / len(listed) * math.log(chance(word[place], place, seen, listed))
    return total


def test_data():
    assert s.spell(state("c.t")) == [f"c{s.HIDDEN}t"]
    t = torch.full((20_000, 1), 0.3)
    shown = s.hide(DATA[:1].expand(20_000, -1, -1), t, torch_rng()).sum(dim=2)
    assert (shown.mean(dim=0) - 0.7).abs().max() < 5 * (0.21 / 20_000) ** 0.5
    both = (shown[:, 0] * shown[:, 1]).mean()
    assert abs(both - 0.49) < 5 * 0.5 / 20_000**0.5
    lost = EXACT(state("r.."))  # no word fits: all count for what is hidden
    assert lost is not None, "denoiser returns nothing"
    assert lost[0, :2].max(dim=1).values.tolist() == pytest.approx([1, 1])
    assert (s.spell(lost), lost[0, 2].max().item()) == (["rat"], pytest.approx(0.4))


def test_eq_24_by_bayes_rule():
    """The reverse mean, from a sum over all words and over what was hidden when."""
    t, dt = 0.7, 0.3
    fitting = [w for w in LIST if w.startswith("b")]
    mean = torch.zeros(3, len(s.LETTERS), dtype=torch.float64)
    for word in fitting:
        for places in itertools.product((False, True), repeat=2):
            # Hidden at t: each of the two was hidden at t - dt with probability (t - dt) / t.
            weight = math.prod(dt / t if shown else 1 - dt / t for shown in places)
            mean += weight / len(fitting) * state(masked(word, (True, *places)))[0]
    found = s.reverse_mean(state("b.."), t, dt, denoiser=EXACT)[0]
    off = (found - mean).abs().max()
    assert off < 1e-12, "not (dt / t) E[x_0 | x_t] + (1 - dt / t) x_t, eq. (24)"


def test_sampler_at_every_step():
    """Letters appear at an even rate, stay, and are drawn from the conditionals."""
    n = 20_000
    x_1 = torch.zeros(n, *DATA.shape[1:], dtype=torch.float64)
    steps = [*(s.unmask(partial(s.reverse_mean, denoiser=EXACT), x_1, 4, torch_rng(1)) or ())]
    assert len(steps) == 4, f"num_steps is 4, so x_t is yielded 4 times, not {len(steps)}"
    before = x_1
    for k, x_t in enumerate(steps, 1):
        counts = {*x_t.sum(dim=2).unique().tolist()}
        assert counts <= {0.0, 1.0}, "a place holds one letter, or none"
        assert (x_t >= before).all(), "a letter that was seen has changed, or is hidden again"
        shown = x_t.sum(dim=(1, 2)) / 3
        off = abs(shown.mean() - k / 4)
        assert off <= 5 * shown.std() / n**0.5, f"after {k} of 4 steps {k} / 4 of letters are seen"
        before = x_t
    counts = Counter(s.spell(before))
    for word, q in zip(LIST, s.law(4, s.conditionals(DATA, EXACT)).tolist()):
        off = abs(counts[word] / n - q)
        assert off < 5 * (q * (1 - q) / n) ** 0.5, "letters are not drawn from E[x_{t-dt} | x_t]"


@pytest.mark.parametrize(
    "text",
    [
        'WORDS = ["10", "11", "01"]',
        'WORDS = ["aa", "ab", "ba", "bb"]',
        'WORDS = ["ZEBRA", "cobra", "zoned", "coned", "C BRA", "ZONED", "zebra"]',
        snippet(s),
    ],
)
def test_the_truth_follows_the_data(text, tmp_path, monkeypatch, capsys):
    """Denoiser, laws, entropies and the bound against sums over words, letter by letter."""
    own = paste(s, text)
    listed, data = tuple(own.WORDS), own.one_hot(own.WORDS)
    exact = partial(own.denoiser, words=data)
    length, few = len(listed[0]), listed[:5]
    for word, places in itertools.product(few, itertools.product((0, 1), repeat=length)):
        seen = masked(word, places)
        rows = [[chance(c, i, seen, listed) for c in own.LETTERS] for i in range(length)]
        mean = exact(state(seen, own.LETTERS))[0]
        off = (mean - torch.tensor(rows, dtype=torch.float64)).abs().max()
        assert off < 1e-12, f"given '{seen}', letters are not those of the words that fit"

    chances = own.conditionals(data, exact)
    for n in (1, 3):
        q = own.law(n, chances)
        for word, found in zip(few, q.tolist()):
            assert found == pytest.approx(brute_law(word, n, listed), abs=1e-12)
        bound = sum(brute_entropies(k / n, listed) for k in range(1, n + 1)) / n
        assert own.path_kl(n, chances) == pytest.approx(bound - math.log(len(listed)), abs=1e-12)
        kl = sum(math.log(1 / len(listed) / x) for x in q.tolist()) / len(listed)
        assert own.kl(q) == pytest.approx(kl, abs=1e-12)
    assert own.conditional_entropy(0.0, chances) == pytest.approx(brute_entropies(0.0, listed))
    assert own.expected_loss(chances) == pytest.approx(math.log(len(listed)), abs=1e-12)
    own.STEP_COUNTS = [1, 64]
    printed = [cell for row in own.report(own.measure(chances, chances))[1:] for cell in row]
    assert not [cell for cell in printed if cell.startswith("-")], "no divergence is negative"

    if text == snippet(s):
        monkeypatch.setattr(Figure, "savefig", lambda *_, **__: None)
        own.main(["--num-steps", "2", "--train-steps", "2", "--figures-dir", str(tmp_path)])
        assert f"{math.log(len(listed)):.4f}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "listed",
    [["cat", "bat", "cat"], ["cat", "cart"], ["cat"], [], [1024, 1089], [f"c{s.HIDDEN}t", "cat"]],
)
def test_lists_that_are_refused(listed, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(s, "WORDS", listed)
    with pytest.raises(SystemExit, match="2"):
        s.main(["--figures-dir", str(tmp_path / "new")])
    assert "WORDS" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "new").exists()


def test_signs_are_drawn_as_they_are():
    """Matplotlib reads what stands between two $ as a formula, and fails if it is none."""
    columns = [["$^$_", r"$\\$"] for _ in s.MOMENTS]
    s.draw_unmasking([(1, {"network": columns, "twin": columns})] * 2).canvas.draw()


def test_training(monkeypatch):
    """Near the entropy of five words; the loss without sampling is that with, to its noise."""
    network, losses = s.train(DATA, train_steps=150, rng=torch_rng())
    loss = s.expected_loss(s.conditionals(DATA, network))
    assert math.log(5) < loss < math.log(5) + 0.03
    late = torch.tensor(losses[-50:])
    assert abs(late.mean() - loss) < 5 * late.std() / 50**0.5 + 0.03
    torch.testing.assert_close(network(state("ba.")), EXACT(state("ba.")), rtol=0, atol=0.1)
    # The least that torch.rand can return is 0, once in 2^24 draws: the loss is a number.
    monkeypatch.setattr(torch, "rand", lambda *size, **_: torch.zeros(*size))
    _, losses = s.train(DATA, train_steps=1, rng=torch_rng())
    assert math.isfinite(losses[0])


def test_main(tmp_path, monkeypatch, capsys, spy):
    """What is printed and drawn is of the network that was trained; twins get the same draws."""
    monkeypatch.setattr(s, "STEP_COUNTS", [1, 3])
    monkeypatch.setattr(Figure, "savefig", lambda *_, **__: None)
    calls = {name: spy(s, name) for name in ("train", "table", "paths")}
    figures = {name: spy(s, f"draw_{name}") for name in ("loss", "unmasking", "errors")}
    s.main([*"--num-steps 5 --train-steps 100 --seed 3".split(), "--figures-dir", str(tmp_path)])
    (trained,), (table,) = calls["train"], calls["table"]
    words, (network, losses) = trained.words, trained.result
    assert (s.spell(words), len(losses)) == (s.WORDS, 100)
    assert torch.equal(trained.rng.get_state(), torch_rng(3).get_state())

    exact = partial(s.denoiser, words=words)
    counted, learned = s.conditionals(words, exact), s.conditionals(words, network)
    entropy, loss = math.log(len(words)), s.expected_loss(learned)
    printed = re.findall(r"\d+\.\d+", capsys.readouterr().out)
    assert printed[:2] == [f"{entropy:.4f}", f"{loss:.4f}"]
    rise = s.conditional_entropy(1.0, counted) - s.conditional_entropy(0.0, counted)
    rows = []
    for n, cells in zip((1, 3), table.rows[1:]):
        q, own = s.law(n, counted), s.law(n, learned)
        row = [q.sum(), own.sum(), s.kl(q), s.kl(own), s.path_kl(n, counted), rise / 2 / n]
        rows.append([float(x) for x in row])
        assert [*map(float, cells)] == pytest.approx([n, *rows[-1]], abs=5.1e-5)

    def find(figure, ys):
        lines = [line for ax in figure.axes for line in ax.lines]
        (line,) = (line for line in lines if [*line.get_ydata()] == pytest.approx(ys, rel=1e-4))
        return line.axes, to_hex(line.get_color())

    axes, colors = zip(*(find(figures["errors"][0].result, ys) for ys in zip(*rows)))
    assert [ax is axes[0] for ax in axes] == [True, True, False, False, False, False]
    assert colors == tuple("#000000 #0072b2 #000000 #0072b2 #999999 #000000".split())
    drawn = [find(figures["loss"][0].result, ys)[1] for ys in (losses, [entropy] * 2)]
    assert drawn == ["#cccccc", "#000000"]

    panels = [
        {text.get_position(): (text.get_text(), to_hex(text.get_color())) for text in ax.texts}
        for ax in figures["unmasking"][0].result.axes
    ]
    for n, own in zip((5, 64), (call for call in calls["paths"] if call.denoiser is network)):
        twins = s.paths(exact, words, n, own.rng)  # the same draws
        expected = {}
        for x, x_t in enumerate([*(own.result[k * n // 4] for k in range(5)), twins[-1]]):
            for y, word in enumerate(s.spell(x_t)):
                wrong = s.HIDDEN not in word and word not in s.WORDS
                expected[x, y] = word, "#999999" if wrong else "#000000" if x == 5 else "#0072b2"
        assert expected in panels, f"no panel shows the run of {n} steps and its twins"
