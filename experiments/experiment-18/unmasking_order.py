"""Experiment 18: which letter first?  The order of unmasking.  Beyond the tutorial.

The claim
    Show one letter at a time, each drawn from p(letter | letters seen). An order that is chosen
    before the letter is drawn is exact, whatever it is: at random, or the surest place first. A
    choice made after drawing is in general another law: draw a letter for every hidden place,
    and show the likeliest draw (as LLaDA and MaskGIT do).

The truth beside it
    What a run returns has a law, and `law` sums it, state by state (which letters are seen, and
    where), for the counted conditionals of experiment 15 and for a network's. A likeliest draw is
    shown at place i if all others draw letters that are less likely, so with two letters
        q(a, b) / p_0(a, b) = F_2(p_1(a)) + F_1(p_2(b)),   F_j(c) = P(p_j(its letter) < c).
    Where two are equal the first place wins. The error is KL(p_0 || q).

What to look for in figures/
    laws.jpg            q over p_0, word by word: 1 is right. Which words suffer, and why they?
    runs.jpg            a network's words appear: in which panel do words come twice?
    two-at-once.jpg     more letters a step: which rule is the best of the three?

Try this
    python unmasking_order.py --letters 2          two letters a step: are all samples words?
    python unmasking_order.py --train-steps 300    trained a tenth as long: which rule suffers most?
"""

import itertools
import math
import os
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from functools import partial
from itertools import zip_longest
from pathlib import Path

os.environ["MPLBACKEND"] = "agg"  # figures are files, also from a notebook

import matplotlib.pyplot as plt
import torch
from torch import nn
from tqdm import tqdm

# ------------------------------------------- The data -------------------------------------------
# Equally likely. Any different words of one length will do; more than eight letters take long.
WORDS = """
able also bake band bare base bath bone cake came care city cold core dark data date dice
done door face fact fire fish game gate gold hand hard home lake late life line list lost
make mind mine mist more name nine note rain rate rice road
""".split()
LETTERS = sorted(set("".join(map(str, WORDS))))
HIDDEN = "\u00b7"  # a dot


def faults(words):
    """What the script cannot do with this list of words, a line each."""
    odd = [word for word in words if not isinstance(word, str) or HIDDEN in word]
    if odd:
        return [f"WORDS: strings without '{HIDDEN}', unlike {odd[0]!r}"]
    found = []
    if len(words) < 2:
        found.append(f"WORDS: two words at least, not {len(words)}")
    if len(set(map(len, words))) > 1:
        short, long = min(words, key=len), max(words, key=len)
        found.append(f"WORDS: all of one length, unlike '{short}' and '{long}'")
    twice = [word for word in words if words.count(word) > 1]
    if twice:
        found.append(f"WORDS: each once, unlike '{twice[0]}'")
    return found


def one_hot(words):
    """Words of one length as vectors.  Returns (number of words, length, len(LETTERS))."""
    places = torch.tensor([[LETTERS.index(letter) for letter in word] for word in words])
    return nn.functional.one_hot(places, len(LETTERS)).double()


def spell(x_t):
    """The words of x_t, (n, length, letters)."""
    places = torch.where(x_t.sum(dim=2) > 0, x_t.argmax(dim=2), len(LETTERS))
    return ["".join([*LETTERS, HIDDEN][k] for k in word) for word in places.tolist()]


def hide(x_0, t, rng):
    """x_t: each letter is hidden with probability t.  x_0: (n, length, letters);  t: (n, 1)."""
    shown = torch.rand(x_0.shape[:2], generator=rng) >= t
    return x_0 * shown[:, :, None]


# ----------------------------------------- The samplers -----------------------------------------
RULES = ("random", "surest place", "likeliest draw")
TIE = 1e-9  # probabilities that are equal, but for rounding: then the first place wins


def unmask_by(rule, denoiser, x_1, letters, rng):
    """Shows so many letters a step, drawn independently, at the places that the rule ranks first.

    x_1: zeros, (n, length, letters of the alphabet).  Yields x_t after every step.
    """
    x_t, length = x_1, x_1.shape[1]
    for _ in range(0, length, letters):
        chance = denoiser(x_t)
        upper = chance.cumsum(dim=2)
        u = torch.rand(*x_t.shape[:2], 1, generator=rng, dtype=x_t.dtype)
        draw = ((upper - chance <= u) & (u < upper)).double()
        score = {
            "random": torch.rand(x_t.shape[:2], generator=rng, dtype=x_t.dtype),
            "surest place": chance.amax(dim=2),
            "likeliest draw": (chance * draw).sum(dim=2),
        }[rule]
        hidden = x_t.sum(dim=2) == 0
        score = torch.where(hidden, score - TIE * torch.arange(length), -1)
        first = score.topk(min(letters, length), dim=1).indices
        shown = torch.zeros_like(hidden).scatter(1, first, True) & hidden
        x_t = torch.where(shown[:, :, None], draw, x_t)
        yield x_t


# ------------------------------------------- Learning -------------------------------------------


class Denoiser(nn.Module):
    """A ReLU network that learns p(letter | letters seen), which does not depend on t."""

    def __init__(self, length, width=256):
        super().__init__()
        size = length * len(LETTERS)
        self.layers = nn.Sequential(
            nn.Flatten(),
            nn.Linear(size, width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, size),
            nn.Unflatten(1, (length, len(LETTERS))),
        )

    def forward(self, x_t, t=None):
        """E[x_0 | x_t], learned: a letter that is seen is known.  x_t: (n, length, letters)."""
        seen = x_t.sum(dim=2, keepdim=True) > 0
        return torch.where(seen, x_t, self.layers(x_t.float()).double().softmax(dim=2))


def train(words, *, train_steps, rng, batch_size=512, learning_rate=0.01):
    """Cross-entropy of the hidden letters divided by t, t uniform: on average at least H(p_0).

    words: of one_hot.  Returns the trained Denoiser and the loss of each step.
    """
    # nn.Linear draws its weights from torch's own generator: its seed is drawn from ours.
    torch.manual_seed(torch.randint(2**60, (), generator=rng).item())
    network = Denoiser(words.shape[1])
    optimizer = torch.optim.Adam(network.parameters(), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, train_steps)
    losses = []
    for _ in tqdm(range(train_steps), "training", disable=None):
        x_0 = words[torch.randint(len(words), (batch_size,), generator=rng)]
        # One t in each interval of 1 / batch_size: uniform, and the loss varies less. Never 0.
        t = (torch.arange(batch_size) + 1 - torch.rand(batch_size, generator=rng)) / batch_size
        x_t = hide(x_0, t[:, None], rng)
        log_chance = (network(x_t) * x_0).sum(dim=2).log()  # 0 for letters that are seen
        loss = -(log_chance.sum(dim=1) / t).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return network.requires_grad_(False), losses


# ------------------------------------------ The truth -------------------------------------------


def denoiser(x_t, t=None, *, words):
    """E[x_0 | x_t], counted: of the words that fit the letters seen, how many have which letter.

    It does not depend on t. If independent letters have left no word that fits, all words count.
    x_t: (n, length, letters);  words: of one_hot.  Returns (n, length, letters).
    """
    agree = torch.einsum("nlv,wlv->nw", x_t, words)  # letters in common
    fits = (agree == x_t.sum(dim=(1, 2))[:, None]).double()
    fits[fits.sum(dim=1) == 0] = 1
    mean = torch.einsum("nw,wlv->nlv", fits / fits.sum(dim=1, keepdim=True), words)
    return torch.where(x_t.sum(dim=2, keepdim=True) > 0, x_t, mean)


def ranks_after(rule, chance, own, j, i):
    """The probability that place j comes after place i, if i draws the word's own letter: (n,)."""
    margin = TIE if i < j else -TIE
    if rule == "surest place":
        return (chance[:, j].amax(dim=1) < chance[:, i].amax(dim=1) + margin).double()
    return (chance[:, j] * (chance[:, j] < own[:, i, None] + margin)).sum(dim=1)


def step(rule, chance, own, shown, hidden):
    """The probability that a step shows these of the hidden places, with the word's own letters.

    chance: p(letter | letters seen), (n, length, letters);  own: of each word's own letters,
    (n, length).  The draws are independent, so the others come after all that are shown with the
    least of their probabilities to come after one.  Returns (n,).
    """
    drawn = own[:, list(shown)].prod(dim=1)
    if rule == "random":
        return drawn / math.comb(len(hidden), len(shown))
    for j in set(hidden) - set(shown):
        after = [ranks_after(rule, chance, own, j, i) for i in shown]
        drawn = drawn * torch.stack(after).amin(dim=0)
    return drawn


def law(rule, denoiser, words, letters=1):
    """The probability that the sampler returns each word, with so many letters a step.

    words: of one_hot;  denoiser(x_t) -> p(letter | letters seen).  Returns (number of words,).
    """
    places = range(words.shape[1])
    reached = {(): 1}  # places seen: the probability that they are, with the word's own letters
    for _ in places[::letters]:
        after = {}
        for seen, way in reached.items():
            hidden = [place for place in places if place not in seen]
            chance = denoiser(words * torch.tensor([[place in seen] for place in places]))
            own = (chance * words).sum(dim=2)
            for shown in itertools.combinations(hidden, min(letters, len(hidden))):
                now = tuple(sorted(seen + shown))
                after[now] = after.get(now, 0) + way * step(rule, chance, own, shown, hidden)
        reached = after
    return reached[tuple(places)]


def kl(q):
    """KL(p_0 || q), in nats.  q: the probability of each word, (number of words,)."""
    return -math.log(len(q)) - q.log().mean().item()


# ------------------------------------------ Measuring -------------------------------------------


def measure(denoisers, words, letters):
    """{rule: {name: the law of what it returns}}, for {name: denoiser}."""
    return {
        rule: {name: law(rule, denoiser, words, letters) for name, denoiser in denoisers.items()}
        for rule in RULES
    }


def sweep(denoiser, words):
    """{rule: [KL for 1, 2, ... letters a step]}."""
    return {
        rule: [kl(law(rule, denoiser, words, letters + 1)) for letters in range(words.shape[1])]
        for rule in RULES
    }


def report(laws, errors):
    """Rows for three tables: each rule; words of the last rule; more letters a step."""
    rules = [["", "KL(p_0 || q)", "KL, network", "words", "words, network"]]
    for rule, found in laws.items():
        counted, network = found["counted"], found["network"]
        numbers = [abs(kl(counted)), kl(network), counted.sum(), network.sum()]  # 0, not -0
        rules.append([rule, *(f"{x:.4f}" for x in numbers)])

    share = len(counted) * counted
    order = share.argsort(stable=True).tolist()
    words = [
        [f"{rule}, {name} q / p_0:", *(f"{WORDS[k]} {share[k]:.4f}" for k in few)]
        for name, few in (("least", order[:3]), ("largest", order[:-4:-1]))
    ]

    sizes = [["letters a step", *errors]]
    for k in range(len(errors[rule])):
        sizes.append([f"{k + 1}", *(f"{abs(numbers[k]):.4f}" for numbers in errors.values())])
    return rules, words, sizes


def paths(rule, denoiser, words, letters, rng, num_words=16):
    """[x_1, ..., x_0] of one run of the sampler, from all letters hidden."""
    x_1 = torch.zeros(num_words, *words.shape[1:], dtype=words.dtype)
    return [x_1, *unmask_by(rule, denoiser, x_1, letters, rng)]


# ----------------------------------------- The figures ------------------------------------------
plt.style.use("default")  # the same figures whatever the reader's matplotlibrc says
BLUE, GREEN, PINK, SKY = "#0072B2", "#009E73", "#CC79A7", "#56B4E9"
STYLES = {"random": (GREEN, "o-"), "surest place": (PINK, "s--"), "likeliest draw": (SKY, "^:")}


def draw_laws(laws):
    """q over p_0 of each word, those of the last rule in order.  laws: of measure."""
    order = [*laws.values()][-1]["counted"].argsort(stable=True)
    size = (min(max(6, 0.22 * len(order)), 500), 7.5)  # a JPEG has 65 500 pixels at most
    shared = {"sharex": True, "sharey": True, "layout": "constrained"}
    fig, axes = plt.subplots(len(laws), 1, figsize=size, **shared)
    for ax, (rule, found) in zip(axes, laws.items()):
        heights = {name: (len(order) * q[order]).tolist() for name, q in found.items()}
        ax.bar(range(len(order)), heights["counted"], color="0.75", label="counted conditionals")
        ax.plot(range(len(order)), heights["network"], "o", color=BLUE, ms=4, label="network")
        ax.axhline(1, color="k", lw=1, label="the truth")
        ax.set(ylabel="$q / p_0$", xlim=(-1, len(order)))
        ax.set_title(rf"{rule}: KL$(p_0 \| q)$ = {abs(kl(found['counted'])):.4f} nats, counted")
    axes[0].set_ylim(bottom=0)
    axes[0].legend(loc="upper left", ncols=3)
    names, look = [WORDS[k] for k in order], {"rotation": 90, "family": "monospace"}
    axes[-1].set_xticks(range(len(order)), names, parse_math=False, **look)
    return fig


def draw_runs(runs):
    """Words as they appear.  runs: {rule: words before the first step and after each}."""
    columns, length = max(map(len, runs.values())), len(WORDS[0])
    width = max(4, 0.1 * columns * (length + 1))
    fig, axes = plt.subplots(1, len(runs), figsize=(width * len(runs), 5), layout="constrained")
    for ax, (rule, moments) in zip(axes, runs.items()):
        for column, texts in enumerate(moments):
            for row, word in enumerate(texts):
                wrong = HIDDEN not in word and word not in WORDS
                text = ax.text(column, row, word, ha="center", va="center", family="monospace")
                text.set(color="0.6" if wrong else BLUE, style="italic" if wrong else "normal")
                text.set_parse_math(False)  # a $ is a letter
        ax.set(xlim=(-0.5, len(moments) - 0.5), ylim=(len(moments[0]) - 0.5, -0.5), yticks=[])
        ax.set(xticks=range(len(moments)), xlabel="steps taken", title=rule)
    fig.suptitle("A network's letters appear; grey italics: not in the list")
    return fig


def draw_sweep(found):
    """KL against letters a step.  found: of sweep."""
    fig, ax = plt.subplots(figsize=(6, 4.5), layout="constrained")
    for rule, errors in found.items():
        color, style = STYLES[rule]
        ax.plot(range(1, len(errors) + 1), errors, style, color=color, label=rule)
    ax.set(xticks=range(1, len(errors) + 1), xlabel="letters shown in a step")
    ax.set(ylabel=r"KL$(p_0 \| q)$, nats", title="Counted conditionals")
    ax.legend()
    return fig


# ------------------------------------------ Running it ------------------------------------------


def options(argv, *faults, **knobs):
    """The command line: num_steps=(default, least, largest, meaning) is --num-steps, and so on.

    faults: what the script cannot do with the data at its top, a line each; it is refused.
    """
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    text = "default: figures; with other options, a folder in it"
    parser.add_argument("--figures-dir", metavar="X", type=os.path.expanduser, help=text)
    for name, (default, least, largest, meaning) in knobs.items():
        text = f"{meaning}: {least:_} to {largest:_}, default {default:_}"
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, metavar="X", type=type(default), default=default, help=text)
    args = parser.parse_args(argv)
    for name, (_, least, largest, _) in knobs.items():
        if not least <= (value := getattr(args, name)) <= largest:
            option = name.replace("_", "-")
            parser.error(f"argument --{option}: {value} is not from {least:_} to {largest:_}")
    for fault in faults:
        parser.error(fault)
    tried = [f"{name}-{x}" for name, x in vars(args).items() if x != parser.get_default(name)]
    own = Path(__file__).parent / "figures" / "-".join(tried).replace("_", "-")
    args.figures_dir = Path(args.figures_dir or own)
    probe = args.figures_dir / "a-name-longer-than-that-of-any-figure-here"
    try:
        args.figures_dir.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        parser.error(f"argument --figures-dir: {error}")
    if hasattr(sys.stdout, "reconfigure"):  # not in a notebook
        sys.stdout.reconfigure(errors="backslashreplace")  # for a folder that is not in ASCII
    return args


def table(rows):
    """Prints rows of strings, the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip_longest(*rows, fillvalue="")]
    for first, *others in rows:
        cells = [other.rjust(width) for other, width in zip(others, widths[1:])]
        print(first.ljust(widths[0]), *cells, sep="  ")


def main(argv=None):
    args = options(
        argv,
        *faults(WORDS),
        letters=(1, 1, 100, "letters shown in a step, in laws.jpg and runs.jpg"),
        train_steps=(3000, 1, 10**6, "steps of the optimizer"),
        seed=(0, 0, 10**6, "seed of every draw"),
    )
    torch.set_num_threads(1)  # the same bytes on any number of cores, and hardly slower
    rng = torch.Generator().manual_seed(args.seed)
    words = one_hot(WORDS)

    network, _ = train(words, train_steps=args.train_steps, rng=rng)
    counted = partial(denoiser, words=words)
    laws = measure({"counted": counted, "network": network}, words, args.letters)
    errors = sweep(counted, words)
    runs = {rule: paths(rule, network, words, args.letters, rng) for rule in RULES}

    for name, figure in {
        "laws": draw_laws(laws),
        "runs": draw_runs({rule: [*map(spell, path)] for rule, path in runs.items()}),
        "two-at-once": draw_sweep(errors),
    }.items():
        figure.savefig(args.figures_dir / f"{name}.jpg", dpi=120)
    for rows in report(laws, errors):
        table(rows)
    print(f"figures: {args.figures_dir}")


if __name__ == "__main__":
    main()
