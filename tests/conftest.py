"""Puts every script on the path, and makes our own faults errors."""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch

SCRIPTS = sorted(Path(__file__).resolve().parents[1].glob("experiments/*/*.py"))
sys.path += [str(script.parent) for script in SCRIPTS]
torch.set_num_threads(1)  # as the scripts do


def pytest_configure(config):
    """Numbers that go wrong are errors, and so is any warning raised in a script's lines."""
    config.addinivalue_line("filterwarnings", "error::RuntimeWarning")
    config.addinivalue_line("filterwarnings", "ignore:.torch.jit.script")  # torch's own, in jvp
    config.addinivalue_line("filterwarnings", "ignore:Animation was deleted")
    for script in SCRIPTS:
        config.addinivalue_line("filterwarnings", f"error:::{script.stem}")


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")
