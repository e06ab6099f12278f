"""What a user may type, and what may go wrong: bad and extreme input, faults, Ctrl-C, checkpoints, reproducibility."""

import contextlib
import inspect
import io
import math
import os
import pickle
import random
import re
import resource
import signal
import subprocess
import sys
import time
import tracemalloc
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from conftest import EXPERIMENTS, load
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

SCRIPTS = [
    "experiment-0/gaussian.py",
    "experiment-1/point_mass.py",
    "experiment-2/two_points.py",
    "experiment-3/swiss_roll.py",
    "experiment-4/flow_matching.py",
]
EVERYWHERE = ["--num-steps", "--num-samples", "--seed", "--figures-dir", "--show"]
LEARNING = ["--train-steps", "--batch-size", "--learning-rate", "--device", "--checkpoint"]
OPTIONS = {  # what each script takes beside EVERYWHERE
    0: ["--mu-0", "--sigma-0", "--sigma-q"],
    1: ["--a", "--sigma-q"],
    2: ["--points", "--weights", "--sigma-q"],
    3: ["--sigma-q", *LEARNING],
    4: LEARNING,
}
TINY = {k: ["--num-steps", "3", "--num-samples", "20"] for k in range(5)}
for k in (3, 4):
    TINY[k] += ["--train-steps", "4", "--batch-size", "8"]


def quick(module):
    """The module, its checks against the exact made coarse; what the command line does is left as it is."""
    if hasattr(module, "exact_velocity"):
        module.exact_velocity = partial(module.exact_velocity, num_panels=8, num_radii=4)
    if hasattr(module, "excess_error"):
        losses_of = module.losses_of
        module.excess_error = partial(module.excess_error, n=200)
        module.losses_of = lambda denoiser, n, *rest: losses_of(denoiser, min(n, 2000), *rest)
    return module


@pytest.fixture(scope="module")
def modules():
    return [quick(load(path)) for path in SCRIPTS]


def call(module, arguments):
    """Runs main in this process.  Returns (exit status, what went to stderr)."""
    err = io.StringIO()
    with contextlib.redirect_stderr(err):
        try:
            module.main([str(argument) for argument in arguments])
        except SystemExit as end:
            if isinstance(end.code, str):  # as the interpreter would
                return 1, f"{err.getvalue()}{end.code}\n"
            return end.code or 0, err.getvalue()
        finally:
            plt.close("all")
    return 0, err.getvalue()


def start(command, **options):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, *map(str, command)], **pipes, **options)


def finish(process):
    """Waits for it.  Returns (exit status, what went to stderr)."""
    err = process.communicate(timeout=100)[1]
    return process.returncode, err


def tree(folder):
    """Everything below the folder: contents and time of change of each file, None for a folder."""
    return {
        str(path): (path.read_bytes(), path.stat().st_mtime_ns) if path.is_file() else None
        for path in folder.rglob("*")
    }


def assert_refused(result, words):
    status, err = result
    assert status == 2, err
    assert err.endswith("\n"), err
    assert err.count("\n") == 1, err
    for word in words:
        assert word in err


# ------------------------------------------- Bad input --------------------------------------------
COUNTS, SIZES = ["0", "-1", "1.5", "many", "nan"], ["0", "-1", "-1e-3", "nan", "inf", "-inf", "wide"]
BAD = [(k, arguments, [option]) for k in range(5) for arguments, option in [
    *[([option, value], option) for option in ("--num-steps", "--num-samples") for value in COUNTS],
    *[(["--seed", value], "--seed") for value in (-1, 2**63, 0.5, "now")],
    (["--figures-dir", "a-file"], "--figures-dir"),
    (["--figures-dir", "a-file/below"], "--figures-dir"),
    (["--figures-dir", "a-file/far/below"], "--figures-dir"),
    (["--no-such-option"], "--no-such-option"),
]]  # fmt: skip
BAD += [(k, ["--sigma-q", x], ["--sigma-q"]) for k in range(4) for x in SIZES]
BAD += [(0, ["--sigma-0", x], ["--sigma-0"]) for x in SIZES]
BAD += [(0, ["--mu-0", x], ["--mu-0", "number"]) for x in ["nan", "inf", "far"]]
BAD += [(1, ["--a", x], ["--a", "X,Y"]) for x in ["nan,1", "1,inf", "-1,nan", "1", "1,2,3", "here", ",", "1;2"]]
BAD += [(2, ["--points", "0,0", x], ["--points", "X,Y"]) for x in ["nan,1", "1,inf", "1", "1,2,3", "here", ","]]
BAD += [
    (2, ["--points"], ["--points"]),
    (2, ["--points", "1,2", "1,2"], ["--points", "differ"]),
    (2, ["--points", "0,1", "-0,1"], ["--points", "differ"]),
    (2, ["--weights", "1.5", "-0.5"], ["--weights"]),
    (2, ["--weights", "0.5", "nan"], ["--weights"]),
    (2, ["--weights", "0.5", "0.4"], ["--weights", "1"]),
    (2, ["--weights", "0", "0"], ["--weights", "1"]),
    (2, ["--weights", "1"], ["--weights", "2"]),
    (2, ["--weights", ".2", ".3", ".5"], ["--weights", "2"]),
    (2, ["--points", "1,1", "--weights", ".5", ".5"], ["--weights", "1"]),
]
for k in (3, 4):
    for option in ("--train-steps", "--batch-size"):
        BAD += [(k, [option, value], [option]) for value in COUNTS]
    BAD += [(k, ["--learning-rate", x], ["--learning-rate"]) for x in SIZES]
    BAD += [(k, ["--device", x], ["--device", "cpu"]) for x in ["abacus", "cuda:99", "meta"]]
    places = ["missing/net.pt", "a-file/net.pt", "figures", "a-file", "n" * 252, "n" * 300]
    BAD += [(k, ["--checkpoint", x], ["--checkpoint"]) for x in places]
for k in range(5):
    BAD += [(k, ["two\nlines"], ["unrecognized"]), (k, ["--figures-dir", "a-file/two\nlines"], ["--figures-dir"])]


def set_stage(folder):
    """A folder `figures` with a figure in it, and a file where no folder can be."""
    (folder / "figures").mkdir()
    for name in ("figures/data.jpg", "a-file"):
        (folder / name).write_bytes(b"as it was")
    return folder


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    return set_stage(tmp_path_factory.mktemp("stage"))


@pytest.mark.parametrize(("k", "arguments", "words"), BAD)
def test_bad_input_is_one_line_and_touches_nothing(modules, stage, monkeypatch, k, arguments, words):
    monkeypatch.chdir(stage)
    before = tree(stage)
    folder = [] if "--figures-dir" in arguments else ["--figures-dir", "new/figures"]
    assert_refused(call(modules[k], [*TINY[k], *folder, *arguments]), words)
    assert tree(stage) == before


@pytest.mark.parametrize(("k", "arguments"), [(0, ["--mu-0", "nan"]), (2, ["--weights", 2, -1]), (3, ["--seed", -1])])
def test_bad_input_in_a_process_of_its_own(tmp_path, k, arguments):
    set_stage(tmp_path)
    before = tree(tmp_path)
    process = start([EXPERIMENTS / SCRIPTS[k], *arguments, "--figures-dir", "figures"], cwd=tmp_path)
    assert_refused(finish(process), arguments[:1])
    assert tree(tmp_path) == before


@pytest.mark.parametrize("k", range(5))
def test_help_and_defaults(modules, tmp_path, monkeypatch, capsys, k):
    assert call(modules[k], ["--help"]) == (0, "")
    text = capsys.readouterr().out
    for option in EVERYWHERE + OPTIONS[k]:
        assert re.search(rf"^  {option}\b", text, re.MULTILINE), option
    assert text.count("default") >= len(EVERYWHERE + OPTIONS[k]) - 2
    assert "what happens if" in text.lower()
    assert text.count(f"python {Path(SCRIPTS[k]).name}") >= 2

    seen = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(modules[k], "run", lambda args, *rest: seen.append(args))
    assert call(modules[k], []) == (0, "")
    assert seen[0].figures_dir.resolve() == (EXPERIMENTS / SCRIPTS[k]).parent / "figures"
    assert call(modules[k], ["--figures-dir", "a/b"]) == (0, "")
    assert seen[1].figures_dir.resolve() == tmp_path / "a" / "b"


@pytest.mark.parametrize("k", [1, 2])
def test_only_what_is_drawn_is_kept(modules, tmp_path, monkeypatch, k):
    """20 000 samples in 2-D are 0.32 MB, so all the steps of both runs would be 128 MB; what is drawn is 0.4 MB."""

    def flat(mean, x_1, step_counts, reference_steps):
        return [np.ones(len(step_counts))] * 2

    monkeypatch.setattr(modules[k], "errors_vs_steps", flat, raising=False)  # 10 000 steps of its own, of fewer samples
    tracemalloc.start()
    call(modules[k], ["--num-steps", 200, "--num-samples", 20_000, "--figures-dir", tmp_path])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64e6


# ------------------------------------ Extreme but valid input -------------------------------------
FEW, LEAST, LAST = "--num-steps 3 --num-samples 7", "--num-steps 1 --num-samples 1", f"--seed {2**63 - 1}"
EXTREME = [
    (0, f"{LEAST} {LAST}"),
    (0, f"{FEW} --sigma-q 1e-6 --mu-0 -1e6 --sigma-0 1e6"),
    (0, f"{FEW} --sigma-q 1e6 --mu-0 1e6 --sigma-0 1e-6"),
    (1, f"{LEAST} {LAST}"),
    (1, f"{FEW} --sigma-q 1e-6 --a 1e6,-1e6"),
    (1, f"{FEW} --sigma-q 1e-6 --a 0,0"),
    (1, f"{FEW} --sigma-q 1e6 --a -1e6,0"),
    (2, f"{LEAST} {LAST} --points 1,2"),
    (2, f"{FEW} --sigma-q 1e-6 --points 0,0 1e6,0"),
    (2, f"{FEW} --sigma-q 1e6 --points -5e5,0 5e5,0 --weights 1 0"),
    (2, f"{FEW} --sigma-q 1e-6"),
    (2, f"{FEW} --sigma-q 1e6 --points 1,1 1,1.000001 -1,2"),
    (3, f"{LEAST} {LAST} --train-steps 1 --batch-size 1"),
    (3, f"{FEW} --sigma-q 1e-6 --train-steps 10 --batch-size 2"),
    (3, f"{FEW} --sigma-q 1e6 --train-steps 3 --batch-size 2"),
    (4, f"{LEAST} {LAST} --train-steps 10 --batch-size 1"),
]


def assert_whole(folder):
    """Every file in the folder is a whole image, with dark ink on white paper."""
    assert any(folder.iterdir())
    for path in folder.iterdir():
        data, ends = path.read_bytes(), {".jpg": (b"\xff\xd8", b"\xff\xd9"), ".gif": (b"GIF89a", b";")}[path.suffix]
        assert data.startswith(ends[0]), path
        assert data.endswith(ends[1]), path
        with Image.open(path) as image:
            assert min(image.size) >= 300, path
            assert np.ptp(np.asarray(image.convert("L"))) > 200, path


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("k", "arguments"), EXTREME)
def test_extreme_input_works(modules, tmp_path, monkeypatch, capsys, k, arguments):
    words, savefig = [], Figure.savefig

    def look(fig, *args, **options):
        savefig(fig, *args, **options)
        words.extend(text.get_text() for text in fig.findobj(Text))
        assert all(np.isfinite([ax.get_xlim(), ax.get_ylim()]).all() for ax in fig.axes)

    monkeypatch.setattr(Figure, "savefig", look)
    assert call(modules[k], [*arguments.split(), "--figures-dir", tmp_path]) == (0, "")
    assert_whole(tmp_path)
    assert not re.search(r"\b(nan|inf)\b", " ".join(words)), "in a figure"
    assert not re.search(r"\b(nan|inf)\b", capsys.readouterr().out), "in the output"


@pytest.mark.parametrize("k", [3, 4])
def test_every_number_of_train_steps_can_be_scheduled(modules, k):
    width = {"sigma_q": 1.0} if k == 3 else {}
    for train_steps in range(1, 31):
        settings = {"train_steps": train_steps, "batch_size": 1, "learning_rate": 0.001}
        losses = modules[k].train(**width, **settings, rng=torch.Generator().manual_seed(0))[1]
        assert len(losses) == train_steps
        assert np.isfinite(losses).all()


# ------------------------- The samplers, over random valid settings -------------------------------
def arrays(steps, num_steps, shape):
    """Checks that the sampler yields num_steps finite arrays of that shape."""
    steps = list(steps)
    assert len(steps) == num_steps
    for x_t in steps:
        assert tuple(x_t.shape) == shape
        assert np.isfinite(np.asarray(x_t)).all()


@pytest.mark.parametrize("seed", range(30))
def test_samplers_are_finite_and_of_the_right_shape(modules, seed):
    gaussian, point_mass, two_points, swiss_roll, flow_matching = modules
    pick = random.Random(seed)
    num_steps, n, k = pick.choice([1, 2, pick.randint(3, 60)]), pick.randint(1, 50), pick.randint(1, 5)
    sigma_q, far = 10 ** pick.uniform(-6, 6), 10 ** pick.uniform(-6, 6)
    rng = np.random.default_rng(pick.randrange(2**63))

    data = {"mu_0": pick.uniform(-far, far), "sigma_0": 10 ** pick.uniform(-6, 6), "sigma_q": sigma_q}
    mean = partial(gaussian.reverse_mean, **data)
    x_1 = sigma_q * rng.standard_normal(n)
    arrays(gaussian.ddpm(mean, x_1, num_steps, sigma_q, rng), num_steps, (n,))
    arrays(gaussian.ddim(mean, x_1, num_steps), num_steps, (n,))

    x_1, points = sigma_q * rng.standard_normal((n, 2)), rng.uniform(-far, far, (k, 2))
    mean = partial(point_mass.reverse_mean, a=points[0])
    arrays(point_mass.ddim(mean, x_1, num_steps), num_steps, (n, 2))
    arrays(point_mass.ddpm(mean, x_1, num_steps, sigma_q, rng), num_steps, (n, 2))
    mean = partial(two_points.reverse_mean, points=points, weights=rng.dirichlet(np.ones(k)), sigma_q=sigma_q)
    arrays(two_points.ddim(mean, x_1, num_steps), num_steps, (n, 2))

    rng = torch.Generator().manual_seed(pick.randrange(2**63))
    mean = partial(swiss_roll.reverse_mean, denoiser=swiss_roll.Denoiser(sigma_q).requires_grad_(False))
    x_1 = sigma_q * torch.randn((n, 2), generator=rng)
    arrays(swiss_roll.ddpm(mean, x_1, num_steps, sigma_q, rng), num_steps, (n, 2))
    arrays(swiss_roll.ddim(mean, x_1, num_steps), num_steps, (n, 2))
    velocity = flow_matching.Velocity().requires_grad_(False)
    arrays(flow_matching.flow(velocity, flow_matching.annulus(n, rng), num_steps), num_steps, (n, 2))


# ------------------------------------- Reproducible, checkpoints ----------------------------------
DRIVER = f"""import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_command_line import load, quick; quick(load(sys.argv[1])).main(sys.argv[2:])"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """runs(k): two folders, each written by a fresh process, the first with one thread, the second with two."""
    done = {}

    def run(k):
        if k not in done:
            done[k] = []
            for threads in "12":
                folder = tmp_path_factory.mktemp("run")
                options = ["--figures-dir", folder / "figures"] + ["--checkpoint", folder / "net.pt"] * (k > 2)
                environment = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
                assert finish(start(["-c", DRIVER, SCRIPTS[k], *TINY[k], *options], env=environment)) == (0, "")
                done[k].append(folder)
        return done[k]

    return run


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("k", range(5))
def test_same_command_same_bytes_whatever_the_threads(runs, k):
    one, two = map(contents, runs(k))
    assert one == two
    assert len(one) >= 2
    assert not any(".part" in name for name in one)
    assert_whole(runs(k)[0] / "figures")


@pytest.mark.parametrize("k", range(3))
def test_another_seed_gives_other_figures(modules, runs, tmp_path, k):
    assert call(modules[k], [*TINY[k], "--seed", 1, "--figures-dir", tmp_path]) == (0, "")
    assert contents(tmp_path) != contents(runs(k)[0] / "figures")


@pytest.mark.parametrize("k", [3, 4])
def test_a_checkpoint_stands_in_for_training(modules, runs, tmp_path, monkeypatch, k):
    net = runs(k)[0] / "net.pt"
    before = tree(net.parent)
    monkeypatch.setattr(modules[k], "train", None)  # cannot be called
    assert call(modules[k], [*TINY[k], "--checkpoint", net, "--figures-dir", tmp_path]) == (0, "")
    assert contents(tmp_path) == contents(runs(k)[0] / "figures")
    assert tree(net.parent) == before


@pytest.mark.parametrize("k", [3, 4])
def test_a_loaded_network_is_the_trained_one(modules, runs, k):
    loaded = modules[k].load(runs(k)[0] / "net.pt")
    settings = {name: value for name, value in loaded.settings.items() if name != "seed"}
    rng = torch.Generator().manual_seed(loaded.settings["seed"])
    trained, losses = modules[k].train(**settings, rng=rng)
    x = torch.randn((50, 2), generator=rng)
    for t in (0.01, 0.5, 1.0, torch.linspace(0.1, 1, 50)):
        assert torch.equal(loaded(x, t), trained(x, t))
    assert loaded.losses == losses


class Bomb:
    """Unpickled by code that trusts it, it makes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def saved(thing):
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    return buffer.getvalue()


def altered(data, **changes):
    return saved({**torch.load(io.BytesIO(data), weights_only=True), **changes})


def flipped(data):
    """One byte of a weight's, in the middle of the file."""
    return data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :]


BROKEN = {
    "empty": lambda data, other, path: b"",
    "random bytes": lambda data, other, path: random.Random(0).randbytes(5000),
    "the first half": lambda data, other, path: data[: len(data) // 2],
    "all but the last byte": lambda data, other, path: data[:-1],
    "one byte flipped": lambda data, other, path: flipped(data),
    "a list": lambda data, other, path: saved([1, 2, 3]),
    "only a network": lambda data, other, path: saved(torch.load(io.BytesIO(data), weights_only=True)["network"]),
    "the other experiment's": lambda data, other, path: other,
    "settings that are a list": lambda data, other, path: altered(data, settings=[1]),
    "losses that are a text": lambda data, other, path: altered(data, losses="low"),
    "a pickle that runs code": lambda data, other, path: pickle.dumps(Bomb(path)),
    "a torch.save that runs code": lambda data, other, path: altered(data, losses=Bomb(path)),
}


@pytest.mark.parametrize("k", [3, 4])
@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_checkpoint_is_refused(modules, runs, tmp_path, how, k):
    data, other = ((runs(i)[0] / "net.pt").read_bytes() for i in (k, 7 - k))
    net = tmp_path / "net.pt"
    net.write_bytes(BROKEN[how](data, other, tmp_path / "ran"))
    before = tree(tmp_path)
    result = call(modules[k], [*TINY[k], "--checkpoint", net, "--figures-dir", tmp_path / "new"])
    assert_refused(result, ["--checkpoint", "net.pt"])
    assert tree(tmp_path) == before
    with pytest.raises(ValueError, match=r"net\.pt"):
        modules[k].load(net)


@pytest.mark.parametrize(
    "option", ["--train-steps 5", "--batch-size 9", "--learning-rate 0.1", "--seed 3", "--sigma-q 2"]
)
@pytest.mark.parametrize("k", [3, 4])
def test_a_checkpoint_of_other_settings_is_refused(modules, runs, tmp_path, k, option):
    net = runs(k)[0] / "net.pt"
    if option.split()[0] in OPTIONS[k] + EVERYWHERE:
        arguments = [*TINY[k], *option.split(), "--checkpoint", net, "--figures-dir", tmp_path / "new"]
        assert_refused(call(modules[k], arguments), ["--checkpoint", *option.split()])
        assert not any(tmp_path.iterdir())


# ---------------------------------------- Whole or not at all -------------------------------------
def test_all_scripts_write_files_alike(modules):
    assert len({inspect.getsource(module.write_whole) for module in modules}) == 1


# Runs a script as `python script` would, and sends itself a signal when an audit event comes (docs: audit_events).
SABOTAGE = """import os, runpy, sys
def hook(event, args):
    if event == EVENT and TEXT in str(args[0]):
        os.kill(os.getpid(), SIGNAL)
sys.addaudithook(hook)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")"""


def sabotaged(event, text, number, k, arguments):
    code = SABOTAGE.replace("EVENT", repr(event)).replace("TEXT", repr(text)).replace("SIGNAL", str(int(number)))
    return finish(start(["-c", code, EXPERIMENTS / SCRIPTS[k], *arguments]))


@pytest.fixture
def figures(runs, tmp_path):
    """Point mass's figures as an earlier run left them."""
    for name, data in contents(runs(1)[0] / "figures").items():
        (tmp_path / name).write_bytes(data)
    return tmp_path


def test_a_kill_before_the_move_leaves_the_figures(modules, figures):
    before = tree(figures)
    arguments = [*TINY[1], "--seed", 5, "--figures-dir", figures]
    assert sabotaged("os.rename", ".part-", signal.SIGKILL, 1, arguments)[0] == -signal.SIGKILL
    after = tree(figures)
    assert {name: after[name] for name in before} == before
    assert [name for name in after if name not in before and ".part-" not in name] == []
    assert call(modules[1], arguments) == (0, "")  # and what is left over does not last
    assert tree(figures).keys() == before.keys()


@pytest.mark.parametrize(("event", "text"), [("import", "matplotlib.pyplot"), ("import", "tqdm"), ("open", ".part-"),
                                             ("os.rename", ".part-")])  # fmt: skip
def test_an_interrupt_is_one_line_and_leaves_the_figures(figures, event, text):
    before = tree(figures)
    status, err = sabotaged(event, text, signal.SIGINT, 1, [*TINY[1], "--seed", 5, "--figures-dir", figures])
    assert (status, err.strip()) == (130, "interrupted")
    assert tree(figures) == before


@pytest.mark.parametrize(("k", "seconds", "arguments"), [(1, 2, "--num-steps 10000"), (3, 1, ""), (4, 3.5, "")])
def test_an_interrupt_from_the_keyboard(runs, tmp_path, k, seconds, arguments):
    many = ["--num-samples", 10**6, *arguments.split(), "--figures-dir", tmp_path]
    process = start([EXPERIMENTS / SCRIPTS[k], *many])
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    status, err = finish(process)
    assert (status, err.strip()) == (130, "interrupted")
    assert not any(tmp_path.iterdir())


@contextlib.contextmanager
def full_disk(size):
    """No file can grow beyond `size` bytes meanwhile (Python ignores SIGXFSZ; a write raises OSError)."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize(("k", "size"), [(0, 5000), (1, 0), (1, 5000), (2, 5000)])
def test_a_full_disk_is_one_line_and_leaves_the_figures(modules, runs, tmp_path, k, size):
    for name, data in contents(runs(k)[0] / "figures").items():
        (tmp_path / name).write_bytes(data)
    before = tree(tmp_path)
    with full_disk(size):
        status, err = call(modules[k], [*TINY[k], "--seed", 5, "--figures-dir", tmp_path])
    assert (status, err.count("\n")) == (1, 1)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("k", [3, 4])
def test_a_full_disk_leaves_no_part_of_a_checkpoint(modules, tmp_path, k):
    (tmp_path / "data.jpg").write_bytes(b"as it was")
    before = tree(tmp_path)
    with full_disk(3000):
        status, err = call(modules[k], [*TINY[k], "--checkpoint", tmp_path / "net.pt", "--figures-dir", tmp_path])
    assert (status, err.count("\n")) == (1, 1)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("k", [3, 4])
def test_a_diverging_training_is_one_line(modules, tmp_path, monkeypatch, k):
    train = modules[k].train
    monkeypatch.setattr(modules[k], "train", lambda **settings: (train(**settings)[0], [math.nan]))
    status, err = call(modules[k], [*TINY[k], "--checkpoint", tmp_path / "net.pt", "--figures-dir", tmp_path])
    assert (status, err.count("\n")) == (1, 1)
    assert "--learning-rate" in err
    assert not any(tmp_path.iterdir())
