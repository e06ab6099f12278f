"""Puts every script on the path, makes our own faults errors, and holds what many tests use."""

import ast
import copy
import functools
import inspect
import os
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

SCRIPTS = sorted(Path(__file__).resolve().parents[1].glob("experiments/*/*.py"))
sys.path += [str(script.parent) for script in SCRIPTS]
torch.set_num_threads(1)  # as the scripts do
os.environ["NO_COLOR"] = "1"  # argparse's messages, from Python 3.14 on


def pytest_configure(config):
    """Numbers that go wrong are errors, and so is any warning raised in a script's lines."""
    config.addinivalue_line("filterwarnings", "error::RuntimeWarning")
    config.addinivalue_line("filterwarnings", "ignore:Animation was deleted")
    for script in SCRIPTS:
        config.addinivalue_line("filterwarnings", f"error:::{script.stem}")


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


def rng(seed=0):
    return np.random.default_rng(seed)


def torch_rng(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def spy(monkeypatch):
    """calls = spy(script, "name"): from now on, what that function is given and returns.

    calls[0].x_1 is what the first call had for x_1, whether by position or by name; a generator
    is kept as it was at the call. calls[0].result is what it returned.
    """

    def keep(value):
        if isinstance(value, torch.Generator):
            return value.clone_state()
        return copy.deepcopy(value) if isinstance(value, np.random.Generator) else value

    def watch(module, name):
        original, calls = getattr(module, name), []

        @functools.wraps(original)
        def watched(*args, **kwargs):
            bound = inspect.signature(original).bind(*args, **kwargs)
            bound.apply_defaults()
            call = SimpleNamespace(**{key: keep(value) for key, value in bound.arguments.items()})
            call.result = original(*args, **kwargs)
            calls.append(call)
            return call.result

        monkeypatch.setattr(module, name, watched)
        return calls

    return watch


def snippet(module, heading="Change it yourself"):
    """The first lines of Python below that heading of the script's page."""
    page = (Path(module.__file__).parent / "README.md").read_text(encoding="utf-8")
    _, section = re.split(rf"^## {heading}.*$", page, maxsplit=1, flags=re.MULTILINE)
    return re.search(r"```python\n(.*?)```", section.split("\n## ")[0], re.DOTALL)[1]


def names(node):
    """What a statement at the top of a file defines."""
    targets = getattr(node, "targets", [node])
    found = [inner for target in targets for inner in getattr(target, "elts", [target])]
    return {getattr(x, "id", getattr(x, "name", None)) for x in found} - {None}


def paste(module, code):
    """The script as another module, each statement of code in the place of its namesake there.

    As a reader would. What has no namesake goes before the next that has.
    """
    source, start, parts = Path(module.__file__).read_text(encoding="utf-8"), 0, []
    lines, new = source.splitlines(keepends=True), []
    own = ast.parse(source).body
    for node in ast.parse(code).body:
        new.append(ast.get_source_segment(code, node) + "\n")
        for old in own:
            if names(old) & names(node):
                assert names(old) <= names(node), f"{names(old)} stand together in the script"
                parts.append((old.lineno - 1, old.end_lineno, new))
                new = []
    assert parts, "nothing in the script has these names"
    assert not new, "the last statement has no namesake in the script"
    text = ""
    for first, last, statements in sorted(parts, key=lambda part: part[:2]):
        text += "".join(lines[start:first] + statements)
        start = last
    text += "".join(lines[start:])
    other = ModuleType(f"{module.__name__}_changed")
    other.__file__ = module.__file__
    exec(compile(text, module.__file__, "exec"), other.__dict__)
    return other
