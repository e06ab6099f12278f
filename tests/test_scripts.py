"""What all scripts share: copies, the command line, checkpoints, bytes, files whole or not."""

import ast
import contextlib
import io
import os
import pickle
import re
import resource
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import EXPERIMENTS, SCRIPTS, assert_image, load
from matplotlib.figure import Figure
from matplotlib.text import Text

NAMES = [script.stem for script in SCRIPTS]
# A small run of each script.
TINY = {name: ["--num-steps", "5", "--num-samples", "40"] for name in NAMES}
LEARNING = ["swiss_roll", "flow_matching"]  # the scripts with a checkpoint
for name in LEARNING:
    TINY[name] += ["--train-steps", "10", "--batch-size", "8"]
TINY["generalization"] += ["--train-steps", "10", "--batch-size", "8"]
TINY["prediction_target"] += ["--train-steps", "10"]


@pytest.fixture(scope="module")
def modules():
    """The scripts, their checks against the exact made with fewer draws."""
    found = {script.stem: load(script) for script in SCRIPTS}
    roll, flow = found["swiss_roll"], found["flow_matching"]
    roll.excess_error = partial(roll.excess_error, n=500)
    roll.bayes_loss = partial(roll.bayes_loss, n=500)
    flow.irreducible_loss = partial(flow.irreducible_loss, num_times=5)
    flow.NUM_EXACT, flow.NUM_DRAWN = 20, 20
    few = found["generalization"]
    few.NUM_POINTS, few.NUM_FRESH = (10, 20, 40, 640), 100
    few.measure_losses = partial(few.measure_losses, n=500)
    few.measure_bayes_loss = partial(few.measure_bayes_loss, n=500)
    target = found["prediction_target"]
    target.NUM_SEEDS = 2
    for name, n in [("target_variance", 500), ("errors", 500), ("equality", 5000)]:
        name = f"measure_{name}"
        setattr(target, name, partial(getattr(target, name), n=n))
    fast = found["fast_samplers"]
    fast.NUM_STARTS, fast.SEGMENT_STARTS = 20, 10
    return found


def call(module, *arguments):
    """Runs main in this process.  Returns (exit status, what went to stderr)."""
    err = io.StringIO()
    with contextlib.redirect_stderr(err):
        try:
            module.main([str(argument) for argument in arguments])
        except SystemExit as end:
            return end.code, err.getvalue()
    return 0, err.getvalue()


def tree(folder):
    """Everything below the folder: the contents of each file, None for a folder."""
    paths = folder.rglob("*")
    return {str(path): path.read_bytes() if path.is_file() else None for path in paths}


# -------------------------------------------- Copies --------------------------------------------
# Functions that do another thing in each script, under one name because they play the same part.
OWN = {
    "main",
    "parse_arguments",
    "report",
    "reverse_mean",
    "sample",
    "train",
    "curve",
    "quadrature",
}
OWN |= {"shares_along_curve", "load", "save_checkpoint", "learn", "Denoiser"}
OWN |= {
    "denoiser",
    "flow",
    "karras",
}  # in experiments 6 and 8: of a mixture, any grid, schedule or grid
TORCH = {"swiss_roll", "generalization", "prediction_target", "flow_matching"}


def functions(script):
    """The text of every function and class at the top level of a script."""
    source = script.read_text(encoding="utf-8")
    nodes = [n for n in ast.parse(source).body if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
    return {node.name: ast.get_source_segment(source, node) for node in nodes}


def test_copies_are_alike():
    places = {}
    for script in SCRIPTS:
        for name, text in functions(script).items():
            if name == "ddpm" and script.stem in TORCH:
                name = "ddpm in torch"  # its noise is drawn in another way
            if name in ("ddpm", "ddim") and script.stem == "fast_samplers":
                name += " in sigma"
            if name not in OWN and not name.startswith(("draw_", "measure_")):
                places.setdefault(name, {})[script.stem] = text
    for name, texts in places.items():
        assert len(set(texts.values())) == 1, (name, sorted(texts))
    assert {"gaussian", "point_mass", "two_points", "swiss_roll"} <= set(places["ddim"])
    assert set(places["save"]) == set(places["number"]) == set(NAMES)


HEADINGS = ["The data", "The reverse mean", "The velocity", "The denoiser", "The samplers"]
HEADINGS += ["Learning", "The truth", "Measuring", "Printing", "The figures", "Running it"]


@pytest.mark.parametrize("script", SCRIPTS, ids=NAMES)
def test_scripts_read_alike(script):
    lines = script.read_text(encoding="utf-8").splitlines()
    headings = [m[1] for line in lines if (m := re.fullmatch(r"# -+ (.+?) -+", line))]
    places = [HEADINGS.index(heading) for heading in headings]
    assert places == sorted(places)
    assert {"The data", "The truth", "Measuring", "The figures", "Running it"} <= set(headings)
    assert max(map(len, lines)) <= 100


# ---------------------------------------- The command line --------------------------------------
COUNTS, SIZES = ["0", "-1", "1.5", "many", "nan"], ["0", "-1", "nan", "inf", "wide"]
BAD = {
    "--num-steps": COUNTS,
    "--num-samples": COUNTS,
    "--seed": ["-1", "0.5", "now"],
    "--figures-dir": ["a-file", "a-file/below"],
    "--no-such-option": ["1"],
    "--sigma-q": SIZES,
    "--sigma-0": SIZES,
    "--mu-0": ["nan", "inf", "far"],
    "--a": ["1", "1 2 3", "nan 1", "1 inf", "here there"],
    "--points": ["", "1 2 3", "nan 1 2 3", "1 2", "1 2 1 2", "-90 0 90 0"],
    "--weights": ["0 1", "1.5 -0.5", "0.5 nan", "0.5 0.4", "1", ".2 .3 .5"],
    "--train-steps": COUNTS,
    "--batch-size": COUNTS,
    "--learning-rate": SIZES,
    "--device": ["abacus", "meta"],
    "--checkpoint": ["a-file", "a-file/net.pt", "figures"],
}


@pytest.mark.parametrize("name", NAMES)
def test_bad_input_is_refused_before_any_work(modules, tmp_path, monkeypatch, name):
    """By argparse: usage, a line that names the option, status 2; every file as it was."""
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures/data.jpg").write_bytes(b"as it was")
    (tmp_path / "a-file").write_bytes(b"as it was")
    monkeypatch.chdir(tmp_path)
    before = tree(tmp_path)
    options = Path(modules[name].__file__).read_text(encoding="utf-8")
    tried = 0
    for option, values in BAD.items():
        own = (
            option in ("--points", "--weights") and name != "two_points"
        )  # in experiment 6's tests
        if not own and (f'"{option}"' in options or option == "--no-such-option"):
            for value in values:
                folder = [] if option == "--figures-dir" else ["--figures-dir", "figures"]
                status, err = call(modules[name], *TINY[name], *folder, option, *value.split())
                assert status == 2, (option, value)
                assert err.startswith("usage: "), err
                assert option in err.splitlines()[-1] or "unrecognized" in err, err
                assert tree(tmp_path) == before, (option, value)
                tried += 1
    assert tried >= 15


@pytest.mark.parametrize("name", NAMES)
def test_help_is_the_docstring_and_every_default(modules, capsys, name):
    assert call(modules[name], "--help") == (0, "")
    text = capsys.readouterr().out
    assert modules[name].__doc__.strip() in text
    assert len(re.findall(rf"^    python {name}\.py --", text, re.MULTILINE)) >= 2
    options = re.findall(r"^  (--[\w-]+)", text, re.MULTILINE)
    assert {"--num-steps", "--num-samples", "--seed", "--figures-dir"} <= set(options)
    assert len(re.findall(r"\(default:\s", text)) == len(options)
    assert (
        modules[name].parse_arguments([]).figures_dir
        == SCRIPTS[NAMES.index(name)].parent / "figures"
    )


EXTREME = [
    ("gaussian", "--num-steps 1 --num-samples 2 --seed 9223372036854775807"),
    ("gaussian", "--sigma-q 0.1 --mu-0 -100 --sigma-0 10 --num-steps 3 --num-samples 7"),
    ("gaussian", "--sigma-q 100 --mu-0 100 --sigma-0 0.1 --num-steps 3 --num-samples 7"),
    ("point_mass", "--num-steps 1 --num-samples 1 --seed 9223372036854775807"),
    ("point_mass", "--sigma-q 0.1 --a 100 -100 --num-steps 3 --num-samples 7"),
    ("point_mass", "--sigma-q 100 --a 0 0 --num-steps 3 --num-samples 7"),
    ("two_points", "--num-steps 1 --num-samples 1"),
    ("two_points", "--sigma-q 0.1 --points 0 0 3 0 --num-steps 3 --num-samples 7"),
    ("two_points", "--sigma-q 100 --points -100 0 100 0 --weights .999999 .000001"),
    ("two_points", "--points -2 -1 2 -1 0 2 --num-steps 3 --num-samples 70"),
    ("swiss_roll", "--train-steps 1 --batch-size 1 --num-steps 1 --num-samples 2"),
    ("swiss_roll", "--sigma-q 0.1 --learning-rate 0.1"),
    ("swiss_roll", "--sigma-q 100"),
    ("flow_matching", "--train-steps 1 --batch-size 1 --num-steps 1 --num-samples 2"),
    ("flow_matching", "--learning-rate 0.1"),
]


@pytest.mark.parametrize(("name", "arguments"), EXTREME)
def test_extreme_input_gives_numbers(modules, tmp_path, monkeypatch, capsys, name, arguments):
    words = []
    savefig = Figure.savefig

    def look(figure, *args, **options):
        savefig(figure, *args, **options)
        words.extend(text.get_text() for text in figure.findobj(Text))
        assert all(np.isfinite([*ax.get_xlim(), *ax.get_ylim()]).all() for ax in figure.axes)

    monkeypatch.setattr(Figure, "savefig", look)
    small = [*TINY[name], *arguments.split(), "--figures-dir", tmp_path]
    assert call(modules[name], *small) == (0, "")
    for path in tmp_path.iterdir():
        assert_image(path)
    assert not re.search(r"\b(nan|inf)\b", " ".join([*words, capsys.readouterr().out]))


# ---------------------------------------- Bytes and checkpoints ---------------------------------


@pytest.fixture(scope="module")
def runs(modules, tmp_path_factory):
    """runs(name): the folder of a small run of that script, made once."""
    done = {}

    def run(name):
        if name not in done:
            done[name] = tmp_path_factory.mktemp(name)
            keep = ["--checkpoint", done[name] / "net.pt"] * (name in LEARNING)
            options = [*TINY[name], "--figures-dir", done[name] / "figures", *keep]
            assert call(modules[name], *options) == (0, "")
        return done[name]

    return run


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("name", NAMES)
def test_the_same_command_writes_the_same_bytes(modules, runs, tmp_path, name):
    """In this process again, with another number of threads; another seed writes other bytes."""
    first = contents(runs(name) / "figures")
    assert len(first) >= 2
    for path in (runs(name) / "figures").iterdir():
        assert_image(path)
    torch.set_num_threads(2)
    assert call(modules[name], *TINY[name], "--figures-dir", tmp_path / "again") == (0, "")
    assert contents(tmp_path / "again") == first


@pytest.mark.parametrize("name", ["gaussian", "swiss_roll"])
def test_used_as_the_readme_says(runs, tmp_path, name):
    """cd into the experiment, run the script: a process of its own writes the same bytes.

    Of swiss_roll those figures that the fewer draws here do not touch.
    """
    script = EXPERIMENTS / SCRIPTS[NAMES.index(name)]
    command = [sys.executable, script.name, *TINY[name], "--figures-dir", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    process = subprocess.run(
        command, cwd=script.parent, env=environment, capture_output=True, text=True, timeout=100
    )
    assert (process.returncode, process.stderr) == (0, "")
    written, here = contents(tmp_path), contents(runs(name) / "figures")
    alike = [figure for figure in here if name == "gaussian" or figure.startswith(("data", "eval"))]
    assert len(alike) == 3
    assert {figure: written[figure] for figure in alike} == {
        figure: here[figure] for figure in alike
    }
    assert all(f"wrote {tmp_path / figure}" in process.stdout for figure in written)


@pytest.mark.parametrize("name", ["point_mass", "two_points"])
def test_another_seed_writes_other_figures(modules, runs, tmp_path, name):
    assert call(modules[name], *TINY[name], "--seed", 1, "--figures-dir", tmp_path) == (0, "")
    assert contents(tmp_path) != contents(runs(name) / "figures")


@pytest.mark.parametrize("name", LEARNING)
def test_a_checkpoint_stands_in_for_training(modules, runs, tmp_path, monkeypatch, name):
    net = runs(name) / "net.pt"
    before = net.read_bytes()
    monkeypatch.setattr(modules[name], "train", None)  # cannot be called
    options = [*TINY[name], "--checkpoint", net, "--figures-dir", tmp_path]
    assert call(modules[name], *options) == (0, "")
    assert contents(tmp_path) == contents(runs(name) / "figures")
    assert net.read_bytes() == before
    x = torch.ones(3, 2)
    assert modules[name].load(net)(x, 0.5).shape == (3, 2)
    assert len(modules[name].load(net).losses) == 10


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


@pytest.mark.parametrize("name", LEARNING)
def test_what_is_not_a_checkpoint_is_refused(modules, runs, tmp_path, name):
    whole = (runs(name) / "net.pt").read_bytes()
    other = (runs(LEARNING[1 - LEARNING.index(name)]) / "net.pt").read_bytes()
    network = torch.load(io.BytesIO(whole), weights_only=True)["network"]
    bomb = tmp_path / "ran"
    net = tmp_path / "net.pt"
    for data in (b"", b"text", whole[:-99], other, saved([1]), saved(network),
                 pickle.dumps(Bomb(bomb)), saved({"losses": Bomb(bomb)})):  # fmt: skip
        net.write_bytes(data)
        folder = tmp_path / "new"
        status, err = call(modules[name], *TINY[name], "--checkpoint", net, "--figures-dir", folder)
        assert status == 2
        assert "net.pt is not a checkpoint" in err
        assert sorted(tmp_path.iterdir()) == [net]
        with pytest.raises(ValueError, match=r"net\.pt"):
            modules[name].load(net)


def test_a_checkpoint_of_another_sigma_q_is_refused(modules, runs, tmp_path):
    options = ["--checkpoint", runs("swiss_roll") / "net.pt", "--figures-dir", tmp_path / "new"]
    status, err = call(modules["swiss_roll"], *TINY["swiss_roll"], *options, "--sigma-q", 2)
    assert status == 2
    assert "--sigma-q 1" in err
    assert not (tmp_path / "new").exists()


# --------------------------------------- Whole or not at all ------------------------------------


def writers(modules, folder):
    """Every way in which a script writes a file: a function to call, and the file."""
    figure = Figure(figsize=(4, 4))
    roll, flow = modules["swiss_roll"], modules["flow_matching"]
    yield (lambda: roll.save(figure, folder / "a.jpg")), folder / "a.jpg"
    yield (lambda: flow.save_animation([figure] * 3, folder / "b.gif")), folder / "b.gif"
    denoiser, velocity = roll.Denoiser(1.0), flow.Velocity()
    yield (lambda: roll.save_checkpoint(denoiser, [1.0], folder / "c.pt")), folder / "c.pt"
    yield (lambda: flow.save_checkpoint(velocity, [1.0], folder / "d.pt")), folder / "d.pt"


def test_an_interrupt_leaves_the_previous_file(modules, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    for write, path in writers(modules, tmp_path):
        path.write_bytes(b"as it was")
        for step in ("write_bytes", "replace"):
            with monkeypatch.context() as patch:
                patch.setattr(Path, step, interrupt)
                with pytest.raises(KeyboardInterrupt):
                    write()
            assert path.read_bytes() == b"as it was"
        write()
        assert len(path.read_bytes()) > 500


def test_a_full_disk_leaves_the_previous_file(modules, tmp_path):
    """No file can grow beyond 500 bytes meanwhile: a write raises OSError."""
    for write, path in writers(modules, tmp_path):
        path.write_bytes(b"as it was")
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (500, limits[1]))
        try:
            with pytest.raises(OSError, match="large"):
                write()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert path.read_bytes() == b"as it was"
