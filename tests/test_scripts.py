"""What all scripts share: copies alike, one order of headings, the command line, the same bytes."""

import ast
import contextlib
import importlib
import inspect
import io
import os
import re
import subprocess
import sys
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SCRIPTS
from matplotlib.figure import Figure
from pages import blocks, differences

ROOT = Path(__file__).resolve().parents[1]
NAMES = [script.stem for script in SCRIPTS]


@pytest.fixture(params=SCRIPTS, ids=NAMES)
def path(request):
    return request.param


# What no option makes smaller: constants of a script.
LESS = {
    "gaussian": {"STEP_COUNTS": [1, 10], "SIZES": np.array([0.1, 3.0])},
    "generalization": {"NUM_POINTS": [10, 20, 40]},
    "couplings": {"BATCHES": [1, 4]},
    "fast_samplers": {"BUDGETS": [8, 15]},
    "nearly_gaussian": {"STEP_COUNTS": [1, 10], "NUM_SIGMAS": 5},
    "likelihood": {"STEP_COUNTS": [10, 100]},
    "locality": {"SIDE": 8, "NUM_DRAWS": 2},
    "words": {"STEP_COUNTS": [1, 4]},
    "inversion": {"LINE_COUNTS": [5, 50], "STEP_COUNTS": [4, 15], "ODE_COUNT": 20},
    "unit_of_noise": {"SIDES": [8, 10, 12], "LEVELS": [0.05, 0.3, 2.0]},
    "one_step": {"LEVELS": [1, 2], "STEPS": [1, 2], "MANY": 4},
}


@pytest.fixture
def script(path, monkeypatch):
    """The script, measuring with few draws."""
    script = importlib.import_module(path.stem)
    for name, value in LESS.get(path.stem, {}).items():
        monkeypatch.setattr(script, name, value)
    for name in definitions(path):
        parameters = inspect.signature(getattr(script, name)).parameters
        fewer = {"n": 300, "num_times": 3, "num_frames": 3}
        fewer = {key: n for key, n in fewer.items() if key in parameters}
        if any(parameters[key].default is not inspect.Parameter.empty for key in fewer):
            monkeypatch.setattr(script, name, partial(getattr(script, name), **fewer))
    return script


def run(script, *arguments):
    """Runs main in this process.  Returns exit status, stdout and stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            script.main([str(argument) for argument in arguments])
        except SystemExit as end:
            return end.code, out.getvalue(), err.getvalue()
    return 0, out.getvalue(), err.getvalue()


@cache
def knobs(script):
    """The table that main hands to options: {name: (default, least, largest, meaning)}."""
    table = {}

    def spy(argv, **knobs):
        table.update(knobs)
        raise SystemExit

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "options", spy)
        run(script)
    return table


def words(values):
    """{"num_steps": 5} as the words --num-steps 5."""
    return [word for name, x in values.items() for word in (f"--{name.replace('_', '-')}", x)]


SMALL = {"num_steps": 5, "num_evaluations": 5, "num_samples": 40}
SMALL |= {"num_images": 120, "train_steps": 3}


def small(script):
    """Counts small, all else at its default."""
    return {name: value for name, value in SMALL.items() if name in knobs(script)}


def contents(folder):
    """The files in a folder, not those in folders below."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


# -------------------------------------------- Copies --------------------------------------------
# Names that play the same part in several scripts and do it in another way in each.
OWN = set(
    "main faults measure sample train report apart least_loss guided distance denoiser mixture "
    "trajectories Denoiser law times errors nearest paths starts follow solution exact_velocity "
    "learned mixture_denoiser in_plane digits read crossing".split()
)
# Names that are the same to the letter in these scripts, if perhaps not in others.
COPIES = {
    "reverse_mean": "swiss_roll generalization ddim_as_flow prediction_target likelihood digits "
    "locality words inverse_problems",
    "ddpm": "gaussian point_mass swiss_roll digits",
    "ddim": "gaussian point_mass two_points swiss_roll ddim_as_flow prediction_target digits "
    "locality",
    "flow": "flow_matching couplings one_step",
    "digits": "digits locality",
    "curve": "swiss_roll generalization prediction_target",
    "exact_denoiser": "swiss_roll prediction_target",
    "Denoiser": "swiss_roll generalization",
    "Mixture": "nearly_gaussian likelihood",
}
COPIES = {name: set(stems.split()) for name, stems in COPIES.items()}


def definitions(path):
    """The text of every function and class at the top level of a script."""
    source = path.read_text(encoding="utf-8")
    nodes = [n for n in ast.parse(source).body if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
    lines = source.split("\n")
    return {node.name: "\n".join(lines[node.lineno - 1 : node.end_lineno]) for node in nodes}


def alike(text):
    """What is compared: code, without docstrings (shapes differ); normals by NumPy or torch."""
    text = re.sub(r' *""".*?"""\n', "", text, flags=re.DOTALL)
    text = text.replace("rng.standard_normal(x_t.shape)", "normals")
    return text.replace("torch.randn(x_t.shape, generator=rng)", "normals")


def test_copies_are_alike():
    places = {}
    for path in SCRIPTS:
        for name, text in definitions(path).items():
            places.setdefault(name, {}).setdefault(alike(text), set()).add(path.stem)
    assert [*places["options"].values()] == [*places["table"].values()] == [set(NAMES)]
    for name, texts in places.items():
        if name in COPIES:
            assert any(COPIES[name] <= stems for stems in texts.values()), (name, texts.values())
        elif name not in OWN and not name.startswith("draw_"):
            assert len(texts) == 1, (name, texts.values())
    on_sigmas = {"fast_samplers", "guidance", "inversion"}  # there ddim has a grid of sigma
    assert any(on_sigmas <= stems for stems in places["ddim"].values())


def test_the_example_on_the_front_page():
    """Prints what its comments say; its samplers are the scripts', less their docstrings."""
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", page, re.DOTALL)[1]
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(code, {})
    assert out.getvalue().splitlines() == re.findall(r"^print\(.*\)  # (.+)", code, re.MULTILINE)
    own = definitions(ROOT / "experiments/experiment-0/gaussian.py")
    for name in ("ddpm", "ddim"):
        assert re.sub(r' *""".*?"""\n', "", own[name], flags=re.DOTALL) in code


COLORS = {"BLUE": "#0072B2", "ORANGE": "#E69F00", "GREEN": "#009E73", "PINK": "#CC79A7"}
COLORS["SKY"] = "#56B4E9"


def test_form(path, script):
    """Sections in order; figures that do not depend on the reader; help; figures on the page."""
    source = path.read_text(encoding="utf-8")
    headings = re.findall(r"^# -+ (.+?) -+$", source, re.MULTILINE)
    order = ["The data", "The samplers", "Learning", "The truth", "Measuring", "The figures"]
    shared = [heading for heading in headings if heading in [*order, "Running it"]]
    assert shared == [heading for heading in [*order, "Running it"] if heading in shared]
    assert {"The data", "The truth", "Measuring", "The figures", "Running it"} <= set(shared)
    assert len(headings) <= len(shared) + 1  # The reverse mean, The velocity, ...

    lines = ['os.environ["MPLBACKEND"] = "agg"', "import matplotlib", 'plt.style.use("default")']
    places = [source.index(f"\n{line}") for line in lines]
    assert places == sorted(places)
    colors = r"^([A-Z, ]+) = ((?:\"#\w{6}\"(?:, )?)+)$"
    names, codes = re.search(colors, source, re.MULTILINE).groups()
    assert codes.split(", ") == [f'"{COLORS[name]}"' for name in names.split(", ")]
    assert not re.search(r"\bC\d\b", source)

    status, text, err = run(script, "--help")
    assert (status, err) == (0, "")
    assert script.__doc__.strip() in text
    tried = re.findall(rf"^    python {script.__name__}\.py (--[\w-]+)", text, re.MULTILINE)
    assert len(tried) >= 2
    assert set(tried) <= set(words(knobs(script))[::2])

    page = (path.parent / "README.md").read_text(encoding="utf-8")
    for name in contents(path.parent / "figures"):
        assert f'src="figures/{name}"' in page


# ---------------------------------------- The command line --------------------------------------


def test_bad_input_is_refused_before_any_work(script, tmp_path, monkeypatch):
    """By argparse: usage, a line that names the option, status 2; no file written."""
    monkeypatch.setattr(Figure, "savefig", None)  # cannot be called
    if hasattr(script, "faults"):  # looks at the data, which takes some scripts a while
        monkeypatch.setattr(script, "faults", lambda *_, **__: [])
    (tmp_path / "file").write_text("as it was")
    bad = [("--figures-dir", tmp_path / "file"), ("--figures-dir", tmp_path / "file/below")]
    bad += [("--no-such-option", "1")]
    for name, (_, least, largest, _) in knobs(script).items():
        wrong = ["many", "nan", least - 1, largest + 1, "1.5" if type(least) is int else "inf"]
        bad += [(words({name: 0})[0], value) for value in wrong]
    for option, value in bad:
        folder = [] if option == "--figures-dir" else ["--figures-dir", tmp_path / "new"]
        status, out, err = run(script, *folder, option, value)
        assert (status, out) == (2, ""), (option, value)
        assert err.startswith("usage: ")
        assert option in err.splitlines()[-1]
    assert contents(tmp_path) == {"file": b"as it was"}

    # A folder that is there and takes no file, as on a read-only disk.
    monkeypatch.setattr(Path, "touch", lambda path: (path / "no/file").open())
    status, out, err = run(script, "--figures-dir", tmp_path)
    assert (status, out) == (2, "")
    assert "--figures-dir" in err.splitlines()[-1]


def test_where_the_figures_go(tmp_path, monkeypatch):
    """All options at their defaults: figures.  Else a folder in it that says what is different."""
    import point_mass

    monkeypatch.setattr(point_mass, "__file__", str(tmp_path / "script.py"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    table = knobs(point_mass)
    defaults = words({name: default for name, (default, *_) in table.items()})
    changed = {name: largest for name, (_, _, largest, _) in [*table.items()][:2]}
    own = "-".join(f"{name}-{changed[name]}" for name in table if name in changed)
    for arguments, folder in [
        ([], "figures"),
        (defaults, "figures"),
        (words(changed), "figures/" + own.replace("_", "-")),
        ([*words(changed), "--figures-dir", tmp_path / "there"], "there"),
        (["--figures-dir=~/there"], "home/there"),
    ]:
        args = point_mass.options([str(word) for word in arguments], **table)
        assert args.figures_dir == tmp_path / folder
        assert contents(args.figures_dir) == {}


def test_data_that_is_refused(tmp_path, capsys):
    """options is told what is wrong with the data: one line, status 2, and no folder is made."""
    import point_mass

    with pytest.raises(SystemExit, match="2"):
        point_mass.options(["--figures-dir", str(tmp_path / "new")], "POINTS: one is NaN")
    assert capsys.readouterr().err.endswith("error: POINTS: one is NaN\n")
    assert not (tmp_path / "new").exists()


def test_rows_of_any_length(capsys):
    import point_mass

    point_mass.table([["a", "bb"], ["ccc", "d", "eeee"], ["f"]])
    assert capsys.readouterr().out.split("\n") == ["a    bb", "ccc   d  eeee", "f  ", ""]


# -------------------------------------------- Running -------------------------------------------


def test_runs(path, script, tmp_path, monkeypatch):
    """Sizes at one end, twice: numbers, the same bytes, the figures that are committed.

    Then sizes at the other end.  Pictures are drawn small, as pixels, without a layout: cheaper,
    and what is in them is the same.
    """
    savefig = Figure.savefig

    def draw(figure, where, **how):
        figure.set_layout_engine("none")
        for ax in figure.axes:
            assert np.isfinite([*ax.get_xlim(), *ax.get_ylim()]).all()
        if not isinstance(where, Path):  # a frame of an animation
            savefig(figure, where, **how)
        elif where.parent.name == "other":
            where.touch()
        else:
            figure.set_dpi(20)
            figure.canvas.draw()
            where.write_bytes(figure.canvas.buffer_rgba())

    monkeypatch.setattr(Figure, "savefig", draw)
    counts, ends = small(script), [{}, {}]
    for name, (default, least, largest, _) in knobs(script).items():
        for end, value in zip(ends, (least, largest)):
            end[name] = value if type(default) is float else counts.get(name, least)
    ends[1] |= {name: least for name, (_, least, *_) in knobs(script).items() if name in counts}
    printed = []
    for folder, values in ("first", ends[0]), ("again", ends[0]), ("other", ends[1]):
        status, out, _ = run(script, *words(values), "--figures-dir", tmp_path / folder)
        assert status == 0
        *lines, last = out.splitlines()
        assert last == f"figures: {tmp_path / folder}"
        assert 1 <= len(lines) <= 16
        assert not re.search(r"\b(nan|inf)\b", out)
        printed.append(lines)
        torch.rand(1)  # whatever was drawn before
    assert printed[0] == printed[1]
    assert contents(tmp_path / "first") == contents(tmp_path / "again")
    committed = contents(path.parent / "figures")
    assert set(committed) == set(contents(tmp_path / "first")) == set(contents(tmp_path / "other"))
    for name, picture in committed.items():
        assert len(picture) <= (2_000_000 if name.endswith(".gif") else 300_000)


def test_used_as_the_readme_says(tmp_path):
    """cd into the experiment, run the script; from a notebook, and whatever matplotlibrc says.

    Into a folder with a name that the output cannot be written in.
    """
    import point_mass

    command = ["--num-steps", "5", "--num-samples", "40", "--figures-dir"]
    assert run(point_mass, *command, tmp_path / "here")[0] == 0
    reader = {"MPLBACKEND": "module://not_installed.backend", "MATPLOTLIBRC": str(tmp_path)}
    settings = ["text.usetex: True", "figure.dpi: 33", "savefig.bbox: tight", "font.size: 30"]
    (tmp_path / "matplotlibrc").write_text("\n".join(settings))
    process = subprocess.run(
        [sys.executable, "point_mass.py", *command, tmp_path / "öwn"],
        cwd=Path(point_mass.__file__).parent,
        env={**os.environ, **reader, "OMP_NUM_THREADS": "2", "PYTHONIOENCODING": "ascii"},
        capture_output=True,
    )
    assert (process.returncode, process.stderr) == (0, b"")
    assert contents(tmp_path / "öwn") == contents(tmp_path / "here")


# --------------------------------------------- Pages --------------------------------------------
FAST = "gaussian point_mass two_points ddim_as_flow fast_samplers nearly_gaussian couplings "
FAST += "guidance"


@pytest.mark.parametrize("stem", FAST.split())
def test_numbers_on_the_page(stem, tmp_path, monkeypatch):
    """Console blocks are what a default run prints.  For the slow ones: python tests/pages.py"""
    script = importlib.import_module(stem)
    for name in vars(script).copy():
        if name.startswith("draw_"):
            monkeypatch.setattr(script, name, lambda *_, **__: Figure())
    monkeypatch.setattr(Figure, "savefig", lambda *_, **__: None)
    status, out, _ = run(script, "--figures-dir", tmp_path)
    wanted = blocks(Path(script.__file__))
    assert (status, len(wanted) > 2) == (0, True)
    assert not [*differences(wanted, out.splitlines())], "lines of the page, and what is printed"


PAGES = [ROOT / "README.md", *ROOT.glob("*/*.md"), *ROOT.glob("*/*/*.md")]


def anchors(page):
    """The headings of a page, as GitHub names them in links."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


def test_pages():
    """No dead link, and inline formulas as $`...`$: in a plain $...$ Markdown eats backslashes."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for link in sum(re.findall(r'\]\((?!http)([^)]+)|src="([^"]+)"', text), ()):
            path, _, anchor = link.partition("#")
            target = page.parent / path if path else page
            assert target.exists(), (page, link)
            assert not anchor or anchor in anchors(target), (page, link)
        text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
        text = re.sub(r"\$`[^`\n]+`\$", "", text)
        assert "$" not in re.sub(r"`[^`\n]+`", "", text), page


def test_dictionary():
    """Each cell of the front page's table, run: theirs goes in, ours comes out."""
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    table = re.search(r"## Dictionary\n.*?\|---.*?\n(.*?)\n\n(.*?)</details>", page, re.DOTALL)
    x_0, eps = np.random.default_rng(0).standard_normal((2, 5))
    sigma, sigma_next = 0.7, 0.5
    a, s = 1 / (1 + sigma**2), sigma / (1 + sigma)  # theirs for this noise level
    x_t = x_0 + sigma * eps
    ours = [x_t, sigma, x_0, eps, -eps / sigma, x_0 - eps, sigma**2 - sigma_next**2]
    theirs = [
        {"x": a**0.5 * x_t, "a": a, "eps": eps, "beta": 1 - a * (1 + sigma_next**2)},
        {"x": x_t, "sigma": sigma, "D": x_0, "sigma_next": sigma_next},
        {"x": (1 - s) * x_0 + s * eps, "s": s, "v": eps - x_0},
        {"x": s * eps + (1 - s) * x_0, "s": 1 - s, "v": x_0 - eps},
    ]
    rows = [line[1:-1].split("|")[-4:] for line in table[1].replace(r"\|", "").splitlines()]
    assert len(rows) == len(ours)
    for row, wanted in zip(rows, ours):
        for cell, names in zip(row, theirs):
            for code in re.findall("`(.+)`", cell):
                np.testing.assert_allclose(eval(code, {}, names), wanted, err_msg=code)
    (code,) = re.findall(r"denoiser is `(.+?)`", table[2])  # of v_prediction
    v = {**theirs[0], "v": a**0.5 * eps - (1 - a) ** 0.5 * x_0}
    np.testing.assert_allclose(eval(code, {}, v), x_0)


def test_questions():
    """Each number of an answer stands on a page that the answer links to."""
    page = ROOT / "experiments/QUESTIONS.md"
    questions = re.findall(r"^\*\*.*\n(.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(questions) > 30
    for answer in questions:
        links = re.findall(r"\]\((?!http)([\w./-]+\.md)", answer)
        text = " ".join((page.parent / link).read_text(encoding="utf-8") for link in links)
        known = {number.lstrip("0") for number in re.findall(r"\d*\.?\d+", text)}
        said = re.sub(r"\[.*?\]\(.*?\)", "", answer)
        for number in re.findall(r"(?<![\w₀])\d*\.?\d+", said):
            assert number.lstrip("0") in known, (number, answer)
