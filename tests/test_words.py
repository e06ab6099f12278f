"""Experiment 15 held to references that share no code with it."""

import itertools
import math
from collections import Counter
from functools import partial

import pytest
import torch
import words as s

SMALL = ["cat", "car", "bat", "bad", "tab"]
DATA = s.one_hot(SMALL)
EXACT = partial(s.denoiser, words=DATA)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def state(text, alphabet=s.LETTERS):
    """'c.t' as (1, 3, letters): a dot is hidden."""
    rows = [[float(letter == seen) for letter in alphabet] for seen in text]
    return torch.tensor([rows], dtype=torch.float64)


def chance(letter, place, seen):
    """p(letter at place | seen), counted word by word: seen is 'c.t'."""
    fitting = [w for w in SMALL if all(a in (".", b) for a, b in zip(seen, w))]
    return sum(w[place] == letter for w in fitting) / len(fitting)


def masked(word, places):
    return "".join(letter if shown else "." for letter, shown in zip(word, places))


def test_data():
    assert len(set(s.WORDS)) == len(s.WORDS) >= 40
    assert s.spell(DATA) == SMALL
    assert s.spell(state("c.t")) == ["c\u00b7t"]
    assert (DATA.sum(dim=2) == 1).all()
    t = torch.full((20_000, 1), 0.3)
    shown = s.hide(DATA[:1].expand(20_000, -1, -1), t, rng()).sum(dim=2)
    assert (shown.mean(dim=0) - 0.7).abs().max() < 5 * (0.21 / 20_000) ** 0.5
    both = (shown[:, 0] * shown[:, 1]).mean()
    assert abs(both - 0.49) < 5 * 0.5 / 20_000**0.5


def test_denoiser_counts():
    for seen in ("...", "b..", ".a.", "..t", "ba.", "c.t"):
        found = EXACT(state(seen))[0]
        for place, k in itertools.product(range(3), range(len(s.LETTERS))):
            assert found[place, k] == pytest.approx(chance(s.LETTERS[k], place, seen), abs=1e-12)
    # No word fits: a letter that is seen stays, the others are those of all words.
    dead = EXACT(state("r.."))[0]
    assert dead[0, s.LETTERS.index("r")] == 1
    assert dead[1, s.LETTERS.index("a")] == pytest.approx(1)
    assert dead[2, s.LETTERS.index("t")] == pytest.approx(0.4)


def test_eq_24_by_bayes_rule():
    """The reverse mean, from a sum over all words and over what was hidden when."""
    t, dt = 0.7, 0.3
    seen = "b.."
    fitting = [w for w in SMALL if w.startswith("b")]
    mean = torch.zeros(3, len(s.LETTERS), dtype=torch.float64)
    for word in fitting:
        for places in itertools.product((False, True), repeat=2):
            # Hidden at t: each of the two was hidden at t - dt with probability (t - dt) / t.
            weight = math.prod(dt / t if shown else 1 - dt / t for shown in places)
            mean += weight / len(fitting) * state(masked(word, (True, *places)))[0]
    found = s.reverse_mean(state(seen), t, dt, denoiser=EXACT)[0]
    torch.testing.assert_close(found, mean, rtol=0, atol=1e-12)


def test_sampler_at_every_step():
    """Letters appear at an even rate, stay, and are drawn from the conditionals."""
    n = 20_000
    x_1 = torch.zeros(n, *DATA.shape[1:], dtype=torch.float64)
    steps = [*s.unmask(partial(s.reverse_mean, denoiser=EXACT), x_1, 4, rng(1))]
    assert len(steps) == 4
    before = x_1
    for k, x_t in enumerate(steps, 1):
        assert set(x_t.sum(dim=2).unique().tolist()) <= {0.0, 1.0}
        assert (x_t >= before).all()
        shown = x_t.sum(dim=(1, 2)) / 3
        assert abs(shown.mean() - k / 4) <= 5 * shown.std() / n**0.5
        before = x_t
    assert (before.sum(dim=2) == 1).all()
    first = steps[0][:, 0].sum(dim=0) / n  # shown in the first step, with chance 1 / 4
    for letter, share in Counter(word[0] for word in SMALL).items():
        exact = share / 5 / 4
        assert abs(first[s.LETTERS.index(letter)] - exact) < 5 * (exact / n) ** 0.5


@pytest.mark.parametrize("num_steps", [1, 2, 3])
def test_law_by_brute_force_and_by_sampling(num_steps):
    """All steps at which each letter can be shown, word by word; then samples of the sampler."""
    law = s.law(num_steps, s.conditionals(DATA, EXACT))
    for word, found in zip(SMALL, law):
        total = 0
        for steps in itertools.product(range(num_steps), repeat=3):
            seen = [masked(word, [other < step for other in steps]) for step in steps]
            total += math.prod(chance(word[i], i, seen[i]) for i in range(3))
        assert found == pytest.approx(total / num_steps**3, abs=1e-12)
    n = 20_000
    for x_0 in s.sample(EXACT, DATA, num_steps, n, rng(num_steps)):
        pass
    counts = Counter(s.spell(x_0))
    for word, q in zip(SMALL, law.tolist()):
        assert abs(counts[word] / n - q) < 5 * (q * (1 - q) / n) ** 0.5
    share, error = s.word_share(x_0, DATA)
    assert share == pytest.approx(sum(counts[word] for word in SMALL) / n, abs=1e-12)
    assert error == pytest.approx((share * (1 - share) / n) ** 0.5)


def entropy(weights):
    return -sum(w * math.log(w) for w in weights if w)


def brute_entropies(t):
    """J(t): over letters, over which of the others are seen, over what is seen."""
    total = 0
    for place in range(3):
        for places in itertools.product((False, True), repeat=3):
            if places[place]:
                continue
            weight = math.prod(
                1 - t if shown else t for i, shown in enumerate(places) if i != place
            )
            for seen, words in Counter(masked(word, places) for word in SMALL).items():
                laws = [chance(letter, place, seen) for letter in s.LETTERS]
                total += weight * words / 5 * entropy(laws)
    return total


def test_path_kl_by_brute_force():
    """J from sums over masks; its integral is the entropy of the data; a bound on the law's KL."""
    chances = s.conditionals(DATA, EXACT)
    for t in (0.0, 0.4, 1.0):
        assert s.conditional_entropy(t, chances) == pytest.approx(brute_entropies(t), abs=1e-12)
    assert s.expected_loss(chances) == pytest.approx(math.log(5), abs=1e-12)
    for n in (1, 2, 5):
        exact = sum(brute_entropies(k / n) for k in range(1, n + 1)) / n - math.log(5)
        assert s.path_kl(n, chances) == pytest.approx(exact, abs=1e-12)
        q = s.law(n, chances)
        assert s.kl(q) == pytest.approx(sum(math.log(1 / 5 / x) / 5 for x in q.tolist()))
        assert s.kl(q) <= exact + 1e-12


def test_training():
    """Near the entropy of five words; the loss without sampling is that with, to its noise."""
    network, losses = s.train(DATA, train_steps=250, rng=rng())
    loss = s.expected_loss(s.conditionals(DATA, network))
    assert math.log(5) < loss < math.log(5) + 0.02
    late = torch.tensor(losses[-100:])
    assert abs(late.mean() - loss) < 5 * late.std() / 10 + 0.02
    torch.testing.assert_close(network(state("ba.")), EXACT(state("ba.")), rtol=0, atol=0.1)
    assert losses[0] > 3 * math.log(s.one_hot(SMALL).shape[2]) * 0.8


def test_drawn():
    losses = [5.0, 4.0, 3.0]
    lines = {line.get_label(): line for line in s.draw_loss(losses, 2.5).axes[0].lines}
    assert [*lines["each step"].get_ydata()] == losses
    assert [*lines["$H(p_0)$ = 2.500"].get_ydata()] == [2.5, 2.5]

    moments = [["\u00b7\u00b7", "..."], ["k", "l"], ["m", "n"], ["o", "p"], ["lake", "xxxx"]]
    runs = {2: (moments, ["rate", "yyyy"]), 64: (moments[::-1], ["mind", "zzzz"])}
    for ax, (num_steps, (texts, twins)) in zip(s.draw_unmasking(runs).axes, runs.items()):
        assert ax.get_title() == f"steps: {num_steps}"
        drawn = {text.get_position(): text for text in ax.texts}
        for column, words in enumerate([*texts, twins]):
            assert [drawn[column, row].get_text() for row in range(2)] == words
        assert [label.get_text() for label in ax.get_xticklabels()][::5] == ["1", "twin"]
        assert drawn[5, 0].get_color() == "k"
        assert drawn[5, 1].get_color() == "0.6"
    colors = [ax.texts[k].get_color() for ax in s.draw_unmasking(runs).axes for k in (0, 1, 8, 9)]
    assert colors == [s.BLUE, "0.6", s.BLUE, "0.6"] * 2

    found = {
        name: [10 * i + k + 1.0 for k in range(len(s.STEP_COUNTS))]
        for i, name in enumerate(
            ["share", "learned share", "error", "KL", "learned KL", "sum of steps", "about"]
        )
    }
    left, right = s.draw_errors(found).axes
    lines = {line.get_label(): [*line.get_ydata()] for line in left.lines}
    assert lines["sum of the steps' KL"] == found["sum of steps"]
    assert lines["$(J(1) - J(0)) / 2N$"] == found["about"]
    assert lines[r"KL$(p_0 \| q)$, counted"] == found["KL"]
    assert lines["the same, network"] == found["learned KL"]
    assert [*right.lines[0].get_ydata()] == found["share"]
    assert [*right.containers[0][0].get_ydata()] == found["learned share"]
    (bars,) = right.containers[0][2]
    low, high = bars.get_segments()[2][:, 1]
    assert (high - low) / 4 == pytest.approx(found["error"][2])


def test_main(tmp_path, monkeypatch, capsys):
    """The numbers printed are those of the network that was trained; twins get the same draws."""
    kept, printed = {}, []

    def spy(name, original):
        def call(*args, **kwargs):
            kept.setdefault(name, []).append((args, result := original(*args, **kwargs)))
            return result

        monkeypatch.setattr(s, name, call)

    spy("measure", s.measure)
    spy("watch", s.watch)
    spy("draw_loss", s.draw_loss)
    monkeypatch.setattr(s, "STEP_COUNTS", [1, 3])
    monkeypatch.setattr(s, "table", printed.extend)
    flags = "--num-steps 5 --num-samples 70 --train-steps 3"
    s.main([*flags.split(), "--figures-dir", str(tmp_path)])
    (((network, words, num_samples, _), found),) = kept["measure"]
    assert (s.spell(words), num_samples) == (s.WORDS, 70)
    line = capsys.readouterr().out.splitlines()[0]
    loss = s.expected_loss(s.conditionals(words, network))
    assert line.split()[2] == f"{math.log(len(s.WORDS)):.4f}"
    assert line.split()[-1] == f"{loss:.4f}"
    heading = ["steps", "words", "network", "KL(p_0 || q)", "network", "sum of steps", "about"]
    assert printed[0] == heading
    names = ["share", "learned share", "KL", "learned KL", "sum of steps", "about"]
    chances = [s.conditionals(words, f) for f in (partial(s.denoiser, words=words), network)]
    for k, n in enumerate([1, 3]):
        row = printed[1 + k]
        numbers = [float(cell.split()[0]) for cell in row[1:]]
        assert row[0] == f"{n}"
        assert numbers == pytest.approx([found[name][k] for name in names], abs=5.1e-4)
        assert float(row[2].split()[-1]) == pytest.approx(found["error"][k], abs=5.1e-4)
        counted, learned = (s.law(n, c) for c in chances)
        exact = [counted.sum(), s.kl(counted), s.kl(learned), s.path_kl(n, chances[0])]
        assert numbers[:1] + numbers[2:5] == pytest.approx([float(x) for x in exact], abs=5.1e-4)
        share = learned.sum().item()
        assert abs(numbers[1] - share) < 5 * (share / 70) ** 0.5 + 0.02
        ends = [s.conditional_entropy(t, chances[0]) for t in (1.0, 0.0)]
        assert numbers[5] == pytest.approx((ends[0] - ends[1]) / (2 * n), abs=5.1e-5)
    assert [args[2] for args, _ in kept["watch"]] == [5, 64]
    (((losses, least), _),) = kept["draw_loss"]
    assert (len(losses), least) == (3, math.log(len(s.WORDS)))
    assert {path.stem for path in tmp_path.iterdir()} == {"train_loss", "unmasking", "kl-vs-steps"}

    exact = partial(s.denoiser, words=words)
    moments, twins = s.watch(exact, words, 4, rng(3), num_words=30)
    assert moments[-1] == twins  # the same draws
    assert all("\u00b7" not in word for word in twins)
    shown = [sum(letter != "\u00b7" for letter in "".join(texts)) for texts in moments]
    assert shown == sorted(shown)
    assert (shown[0], len(set(shown))) == (0, 5)
