"""Experiment 15: words.  Diffusion that hides letters.  Beyond the tutorial.

The claim
    At time t each letter of x_0 is hidden with probability t. Write a letter as a one-hot vector,
    a hidden one as 0. A hidden letter was hidden in the last dt with probability dt / t: eq. (24),
        E[x_{t-dt} | x_t] = (dt / t) E[x_0 | x_t] + (1 - dt / t) x_t.
    This holds the probability of each letter after the step; the rest to 1 is that of staying
    hidden. The sampler draws each letter from it, independently of the others: like the Gaussian of
    Fact 1 (experiment 9) right to first order in dt. The KL divergences of N steps sum to about
    (S(1) - S(0)) / 2N nats.

The truth beside it
    E[x_0 | x_t] is p(letter | letters seen), counted in `denoiser`. S(t) is the sum over letters of
    H(letter | the others, each seen with probability 1 - t), H the entropy. The KL divergences sum
    to the error of a Riemann sum for the integral of S, which is H(p_0) (`path_kl`). That bounds
    KL(p_0 || q), where q, the law of what is returned, is a sum over the orders in which letters
    can appear (`law`). A network's law and expected loss are found by the same sums. Twins are
    what the counted conditionals make of the same random numbers.

What to look for in figures/
    train_loss.jpg     what number does the loss fall to?
    unmasking.jpg      which words are wrong, and when did they go wrong?
    kl-vs-steps.jpg    twice the steps: how much less is lost? what does the network add to it?

Try this
    python words.py --num-steps 1        all letters at once: how many words of twelve?
    python words.py --num-steps 64       two runs of 64 steps: are there non-words?
    python words.py --train-steps 300    trained a tenth as long: do many steps still help?
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


# --------------------------------------- The reverse mean ---------------------------------------


def reverse_mean(x_t, t, dt, *, denoiser):
    """E[x_{t-dt} | x_t] from E[x_0 | x_t], eq. (24) of the tutorial.

    Exact for any dt: of the letters hidden at t, the last dt hid on average the share dt / t.
    x_t: (n, length, letters), at time t;  0 < dt <= t <= 1;  denoiser(x_t, t): like x_t.
    """
    return (dt / t) * denoiser(x_t, t) + (1 - dt / t) * x_t


# ----------------------------------------- The samplers -----------------------------------------


def unmask(reverse_mean, x_1, num_steps, rng):
    """Algorithm 1 for letters: each is drawn with the probabilities E[x_{t-dt} | x_t].

    x_1: zeros, (n, length, letters);  num_steps = 1 / dt.  Yields x_{t-dt} after every step.
    """
    x_t, dt = x_1, 1 / num_steps
    for k in range(num_steps, 0, -1):  # t = k dt
        chance = reverse_mean(x_t, k / num_steps, dt)
        upper = chance.cumsum(dim=2)  # beyond the last: still hidden
        u = torch.rand(*x_t.shape[:2], 1, generator=rng, dtype=x_t.dtype)
        x_t = ((upper - chance <= u) & (u < upper)).double()
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


def conditionals(words, denoiser):
    """p(letter | letters seen) of every word's own letters, for each set of places seen.

    Returns {places seen, a tuple of bools: (number of words, length)}.
    """
    chances = {}
    for places in itertools.product((False, True), repeat=words.shape[1]):
        x_t = words * torch.tensor(places)[:, None]
        chances[places] = (denoiser(x_t) * words).sum(dim=2)
    return chances


def law(num_steps, chances):
    """The probability that num_steps steps return each word: (number of words,).

    Each letter draws its own step. groups: in how many different steps letters have appeared;
    those steps can be chosen in C(num_steps, groups) of num_steps^length equally likely ways.
    chances: of conditionals.
    """
    length, q = len(next(iter(chances))), 0
    reached = {(False,) * length: 1}  # places seen: probability of their letters, all ways summed
    for groups in range(1, length + 1):
        after = {}
        for before, way in reached.items():
            for seen in itertools.product(*((True,) if b else (False, True) for b in before)):
                new = torch.tensor(seen) ^ torch.tensor(before)
                if new.any():
                    together = chances[before][:, new].prod(dim=1)
                    after[seen] = after.get(seen, 0) + way * together
        q = q + math.comb(num_steps, groups) / num_steps**length * after[(True,) * length]
        reached = after
    return q


def hidden_entropies(chances):
    """For s = 0, 1, ...: the sum of H(letter | s others seen) over letters and sets of s others.

    Cross-entropies of the data and the chances: entropies, if these are the data's.
    """
    sums = [0.0] * len(next(iter(chances)))
    for places, chance in chances.items():
        if not all(places):
            sums[sum(places)] -= chance[:, ~torch.tensor(places)].log().sum(dim=1).mean().item()
    return sums


def conditional_entropy(t, chances):
    """S(t): sum over letters of H(letter | the others, each seen with probability 1 - t)."""
    sums = hidden_entropies(chances)
    return sum((1 - t) ** s * t ** (len(sums) - 1 - s) * h for s, h in enumerate(sums))


def expected_loss(chances):
    """The integral of S: the mean of the loss in train.  H(p_0), if the chances are the data's."""
    sums = hidden_entropies(chances)  # and (1 - t)^s t^(n - 1 - s) integrates to 1 / (n C(n-1, s))
    n = len(sums)
    return sum(h / (n * math.comb(n - 1, s)) for s, h in enumerate(sums))


def path_kl(num_steps, chances):
    """The sum of the steps' KL divergences, in nats.  chances: the data's."""
    times = [k / num_steps for k in range(1, num_steps + 1)]
    riemann = sum(conditional_entropy(t, chances) for t in times) / num_steps
    return riemann - expected_loss(chances)


def kl(q):
    """KL(p_0 || q), in nats.  q: the probability of each word, (number of words,)."""
    return -math.log(len(q)) - q.log().mean().item()


# ------------------------------------------ Measuring -------------------------------------------
STEP_COUNTS = [1, 2, 4, 8, 16, 64, 256]
MOMENTS = (1.0, 0.75, 0.5, 0.25, 0.0)


def paths(denoiser, words, num_steps, rng, num_words=12):
    """[x_1, ..., x_0] of one run of the sampler, from all letters hidden."""
    x_1 = torch.zeros(num_words, *words.shape[1:], dtype=words.dtype)
    return [x_1, *unmask(partial(reverse_mean, denoiser=denoiser), x_1, num_steps, rng)]


def watch(network, words, num_steps, rng):
    """{"network", "twin"}: words at the last step not after each of MOMENTS, of the same draws."""
    same = rng.clone_state()
    runs = {
        "network": paths(network, words, num_steps, rng),
        "twin": paths(partial(denoiser, words=words), words, num_steps, same),
    }
    steps = [int((1 - t) * num_steps) for t in MOMENTS]
    return {name: [spell(path[k]) for k in steps] for name, path in runs.items()}


def measure(counted, learned):
    """{name: a number for each of STEP_COUNTS}: shares of words and KL.  Both: of conditionals."""
    laws = [law(n, counted) for n in STEP_COUNTS]
    learned_laws = [law(n, learned) for n in STEP_COUNTS]
    rise = conditional_entropy(1.0, counted) - conditional_entropy(0.0, counted)
    return {
        "words": [q.sum().item() for q in laws],
        "words, network": [q.sum().item() for q in learned_laws],
        "KL(p_0 || q)": [kl(q) for q in laws],
        "KL, network": [kl(q) for q in learned_laws],
        "sum of steps": [path_kl(n, counted) for n in STEP_COUNTS],
        "about": [rise / (2 * n) for n in STEP_COUNTS],
    }


def report(found):
    """Rows for table.  found: of measure."""
    rows = [["steps", *found]]
    for k, n in enumerate(STEP_COUNTS):
        rows.append([f"{n}", *(f"{abs(numbers[k]):.4f}" for numbers in found.values())])  # no -0
    return rows


# ----------------------------------------- The figures ------------------------------------------
plt.style.use("default")  # the same figures whatever the reader's matplotlibrc says
BLUE = "#0072B2"


def draw_loss(losses, least):
    """losses: of train;  least: H(p_0)."""
    fig, ax = plt.subplots(figsize=(6, 4.5), layout="constrained")
    window = max(1, len(losses) // 50)
    smooth = torch.tensor(losses).unfold(0, window, 1).mean(dim=1)
    ax.plot(losses, ".", color="0.8", ms=2, label="each step")
    steps = range(window - 1, len(losses))
    ax.plot(steps, smooth, color=BLUE, label=f"mean of {window} steps")
    ax.axhline(least, color="k", ls="--", label=f"$H(p_0)$ = {least:.3f}")
    ax.set(xlabel="training step", ylabel="loss, nats")
    ax.set_title("Training loss, and the entropy of the data")
    ax.legend()
    return fig


def draw_unmasking(runs):
    """The network's words at each of MOMENTS, and the twins.  runs: [(num_steps, of watch)]."""
    fig, axes = plt.subplots(1, len(runs), figsize=(5.5 * len(runs), 4.6), layout="constrained")
    for ax, (num_steps, spelled) in zip(axes, runs):
        twins = spelled["twin"][-1]
        for column, texts in enumerate([*spelled["network"], twins]):
            for row, word in enumerate(texts):
                wrong = HIDDEN not in word and word not in WORDS
                color = "0.6" if wrong else "k" if texts is twins else BLUE
                text = ax.text(column, row, word, ha="center", va="center", color=color)
                text.set(family="monospace", fontsize=12, style="italic" if wrong else "normal")
                text.set_parse_math(False)  # a $ is a letter
        ax.set_xticks(range(len(MOMENTS) + 1), [*(f"{t:g}" for t in MOMENTS), "twin"])
        ax.set(xlim=(-0.5, len(MOMENTS) + 0.5), ylim=(len(twins) - 0.5, -0.5), yticks=[])
        ax.set(xlabel="$t$", title=f"steps: {num_steps}")
    fig.suptitle("Letters appear; blue: network; black: twin; grey italics: not in the list")
    return fig


def draw_errors(found):
    """KL and the share of words against the number of steps.  found: of measure."""
    fig, (left, right) = plt.subplots(1, 2, figsize=(10, 4.6), layout="constrained")
    left.loglog(STEP_COUNTS, found["sum of steps"], color="0.6", label="sum of the steps' KL")
    left.loglog(STEP_COUNTS, found["about"], "k:", label="$(S(1) - S(0)) / 2N$")
    left.loglog(STEP_COUNTS, found["KL(p_0 || q)"], "k", label=r"KL$(p_0 \| q)$, counted")
    left.loglog(STEP_COUNTS, found["KL, network"], "o", color=BLUE, label="the same, network")
    left.set(xlabel="number of steps $N$", ylabel="nats", title="What a run loses")
    left.legend()

    right.semilogx(STEP_COUNTS, found["words"], "k", label="counted")
    right.semilogx(STEP_COUNTS, found["words, network"], "o", color=BLUE, label="network")
    right.set(xlabel="number of steps $N$", ylim=(0, 1.05), title="Probability of a word")
    right.legend(loc="lower right")
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
        num_steps=(4, 1, 1000, "steps of the words in unmasking.jpg, left"),
        train_steps=(3000, 1, 10**6, "steps of the optimizer"),
        seed=(0, 0, 10**6, "seed of every draw"),
    )
    torch.set_num_threads(1)  # the same bytes on any number of cores, and hardly slower
    rng = torch.Generator().manual_seed(args.seed)
    words = one_hot(WORDS)
    entropy = math.log(len(words))

    network, losses = train(words, train_steps=args.train_steps, rng=rng)
    learned = conditionals(words, network)
    found = measure(conditionals(words, partial(denoiser, words=words)), learned)
    runs = [(n, watch(network, words, n, rng)) for n in (args.num_steps, 64)]

    for name, figure in {
        "train_loss": draw_loss(losses, entropy),
        "unmasking": draw_unmasking(runs),
        "kl-vs-steps": draw_errors(found),
    }.items():
        figure.savefig(args.figures_dir / f"{name}.jpg", dpi=120)
    print(f"H(p_0) = {entropy:.4f} nats; the network's expected loss: {expected_loss(learned):.4f}")
    table(report(found))
    print(f"figures: {args.figures_dir}")


if __name__ == "__main__":
    main()
