"""Experiment 15: words.  Diffusion that hides letters.  Beyond the tutorial.

The claim
    At time t each letter of x_0 is hidden with probability t. Write a letter as a one-hot vector,
    a hidden one as 0. A hidden letter was hidden in the last dt with probability dt / t: eq. (24),
        E[x_{t-dt} | x_t] = (dt / t) E[x_0 | x_t] + (1 - dt / t) x_t.
    This holds the probability of each letter after the step; the rest to 1 is that of staying
    hidden. The sampler draws each letter from it, independently of the others: like the Gaussian of
    Fact 1 (experiment 9) right to first order in dt. N steps lose about (J(1) - J(0)) / 2N nats.

The truth beside it
    E[x_0 | x_t] is p(letter | letters seen), counted in `denoiser`. J(t) is the sum over letters of
    H(letter | the others, each seen with probability 1 - t), H the entropy. The steps' KL
    divergences sum to the error of a Riemann sum for the integral of J, which is H(p_0)
    (`path_kl`). This bounds KL(p_0 || q), where q, the law of what is returned, is a sum over the
    orders in which letters can appear (`law`). A network's expected loss is at least H(p_0). Twins
    are what the counted conditionals make of the same random numbers.

What to look for in figures/
    train_loss.jpg     the loss falls to H(p_0)
    unmasking.jpg      letters appear; few steps make non-words, many hardly any; twins beside them
    kl-vs-steps.jpg    what is lost falls as 1 / steps; the network adds an error that stays

Try this
    python words.py --num-steps 1        all letters at once: hardly a word
    python words.py --num-steps 64       non-words are rare now
    python words.py --train-steps 300    many steps no longer help
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
# Equally likely. Any words of one length will do; more than six letters take long.
WORDS = """
able also bake band bare base bath bone cake came care city cold core dark data date dice
done door face fact fire fish game gate gold hand hard home lake late life line list lost
make mind mine mist more name nine note rain rate rice road
""".split()
LETTERS = sorted(set("".join(WORDS)))
HIDDEN = "\u00b7"  # a dot


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

    Exact for any dt: of the noise x_t - x_0, the last dt brought on average the share dt / t.
    x_t: (n, d), at time t;  0 < dt <= t <= 1;  denoiser(x_t, t) -> (n, d).  Returns (n, d).
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
    """A ReLU network that learns p(letter | letters seen).  t is no input: it would not help."""

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
        # One t in each interval of 1 / batch_size: uniform, and the loss varies less.
        t = (torch.arange(batch_size) + torch.rand(batch_size, generator=rng)) / batch_size
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

    order: which letters appear first, second, ...; together if their numbers are equal. With m
    different numbers it comes about in C(num_steps, m) of num_steps^length equally likely ways.
    chances: of conditionals.
    """
    length, q = len(next(iter(chances))), 0
    for order in itertools.product(range(length), repeat=length):
        groups = max(order) + 1
        if len(set(order)) == groups:  # no number is left out
            way = math.comb(num_steps, groups) / num_steps**length
            for group in range(groups):
                shown = torch.tensor([number == group for number in order])
                before = tuple(number < group for number in order)
                way = way * chances[before][:, shown].prod(dim=1)
            q = q + way
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
    """J(t): sum over letters of H(letter | the others, each seen with probability 1 - t)."""
    sums = hidden_entropies(chances)
    return sum((1 - t) ** s * t ** (len(sums) - 1 - s) * h for s, h in enumerate(sums))


def expected_loss(chances):
    """The integral of J: the mean of the loss in train.  H(p_0), if the chances are the data's."""
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


def sample(denoiser, words, num_steps, num_samples, rng):
    """Runs the sampler from all letters hidden.  Yields x_t after every step."""
    x_1 = torch.zeros(num_samples, *words.shape[1:], dtype=words.dtype)
    mean = partial(reverse_mean, denoiser=denoiser)
    return tqdm(unmask(mean, x_1, num_steps, rng), f"{num_steps} steps", num_steps, disable=None)


def word_share(x_0, words):
    """The share of x_0 that are words, and its standard error."""
    share = (torch.einsum("nlv,wlv->nw", x_0, words) == words.shape[1]).any(dim=1).double().mean()
    return share.item(), (share * (1 - share) / len(x_0)).item() ** 0.5


def measure(network, words, num_samples, rng):
    """{name: a number for each of STEP_COUNTS}: shares of words and KL, exact and learned."""
    counted = conditionals(words, partial(denoiser, words=words))
    learned = conditionals(words, network)
    laws = [law(n, counted) for n in STEP_COUNTS]
    learned_laws = [law(n, learned) for n in STEP_COUNTS]
    rise = conditional_entropy(1.0, counted) - conditional_entropy(0.0, counted)
    shares = []
    for n in STEP_COUNTS:
        for x_0 in sample(network, words, n, num_samples, rng):
            pass
        shares.append(word_share(x_0, words))
    return {
        "share": [q.sum().item() for q in laws],
        "learned share": [share for share, _ in shares],
        "error": [error for _, error in shares],
        "KL": [kl(q) for q in laws],
        "learned KL": [kl(q) for q in learned_laws],
        "sum of steps": [path_kl(n, counted) for n in STEP_COUNTS],
        "about": [rise / (2 * n) for n in STEP_COUNTS],
    }


def watch(network, words, num_steps, rng, num_words=12):
    """Spelled words at the last step not after each of MOMENTS, and the twins' at t = 0."""
    same = rng.clone_state()
    hidden = torch.zeros(num_words, *words.shape[1:], dtype=words.dtype)
    states = [hidden, *sample(network, words, num_steps, num_words, rng)]
    for twins in sample(partial(denoiser, words=words), words, num_steps, num_words, same):
        pass
    return [spell(states[int((1 - t) * num_steps)]) for t in MOMENTS], spell(twins)


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
    """The network's words at each of MOMENTS, and the twins.  runs: {num_steps: of watch}."""
    fig, axes = plt.subplots(1, len(runs), figsize=(5.5 * len(runs), 4.6), layout="constrained")
    for ax, (num_steps, (moments, twins)) in zip(axes, runs.items()):
        for column, spelled in enumerate([*moments, twins]):
            for row, word in enumerate(spelled):
                wrong = HIDDEN not in word and word not in WORDS
                color = "0.6" if wrong else "k" if spelled is twins else BLUE
                text = ax.text(column, row, word, ha="center", va="center", color=color)
                text.set(family="monospace", fontsize=12, style="italic" if wrong else "normal")
        ax.set_xticks(range(len(moments) + 1), [*(f"{t:g}" for t in MOMENTS), "twin"])
        ax.set(xlim=(-0.5, len(moments) + 0.5), ylim=(len(twins) - 0.5, -0.5), yticks=[])
        ax.set(xlabel="$t$", title=f"steps: {num_steps}")
    fig.suptitle("Letters appear; blue: network; black: twin; grey italics: not in the list")
    return fig


def draw_errors(found):
    """KL and the share of words against the number of steps.  found: of measure."""
    fig, (left, right) = plt.subplots(1, 2, figsize=(10, 4.6), layout="constrained")
    left.loglog(STEP_COUNTS, found["sum of steps"], color="0.6", label="sum of the steps' KL")
    left.loglog(STEP_COUNTS, found["about"], "k:", label="$(J(1) - J(0)) / 2N$")
    left.loglog(STEP_COUNTS, found["KL"], "k", label=r"KL$(p_0 \| q)$, counted")
    left.loglog(STEP_COUNTS, found["learned KL"], "o", color=BLUE, label="the same, network")
    left.set(xlabel="number of steps $N$", ylabel="nats", title="What a run loses")
    left.legend()

    right.semilogx(STEP_COUNTS, found["share"], "k", label="counted")
    bars = 2 * torch.tensor(found["error"])
    style = {"fmt": "o", "color": BLUE, "capsize": 3, "label": "network, two standard errors"}
    right.errorbar(STEP_COUNTS, found["learned share"], bars, **style)
    right.set(xlabel="number of steps $N$", ylim=(0, 1.05), title="Share of words in samples")
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
        num_steps=(4, 1, 1000, "steps of the words in unmasking.jpg, left"),
        num_samples=(2000, 2, 100_000, "samples of the network for each share"),
        train_steps=(3000, 1, 10**6, "steps of the optimizer"),
        seed=(0, 0, 10**6, "seed of every draw"),
    )
    torch.set_num_threads(1)  # the same bytes on any number of cores, and hardly slower
    rng = torch.Generator().manual_seed(args.seed)
    words = one_hot(WORDS)
    entropy = math.log(len(words))

    network, losses = train(words, train_steps=args.train_steps, rng=rng)
    loss = expected_loss(conditionals(words, network))
    found = measure(network, words, args.num_samples, rng)
    runs = {n: watch(network, words, n, rng) for n in (args.num_steps, 64)}

    print(f"H(p_0) = {entropy:.4f} nats; the network's expected loss: {loss:.4f}")
    rows = [["steps", "words", "network", "KL(p_0 || q)", "network", "sum of steps", "about"]]
    for n, share, learned, error, *nats in zip(STEP_COUNTS, *found.values()):
        shares = [f"{share:.4f}", f"{learned:.3f} +- {error:.3f}"]
        rows.append([f"{n}", *shares, *(f"{x:.4f}" for x in nats)])
    table(rows)

    for name, figure in {
        "train_loss": draw_loss(losses, entropy),
        "unmasking": draw_unmasking(runs),
        "kl-vs-steps": draw_errors(found),
    }.items():
        figure.savefig(args.figures_dir / f"{name}.jpg", dpi=120)
    print(f"figures: {args.figures_dir}")


if __name__ == "__main__":
    main()
