"""What the test modules share: the scripts, imported by path, and a look at the figures they
write.
"""

import importlib.util
from pathlib import Path

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest

EXPERIMENTS = Path(__file__).resolve().parents[1] / "experiments"
SCRIPTS = sorted(EXPERIMENTS.glob("experiment-*/*.py"))


def load(path):
    """The script at `path`, a path below experiments/, imported as a module; its `main` is not
    run.
    """
    spec = importlib.util.spec_from_file_location(Path(path).stem, EXPERIMENTS / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pytest_configure(config):
    """Our own faults are errors: numbers that go wrong, and any warning raised in a script's
    lines.
    """
    config.addinivalue_line("filterwarnings", "error::RuntimeWarning")
    for script in SCRIPTS:
        config.addinivalue_line("filterwarnings", f"error:::{script.stem}")


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


@pytest.fixture(scope="session")
def gaussian():
    return load("experiment-0/gaussian.py")


@pytest.fixture(scope="session")
def point_mass():
    return load("experiment-1/point_mass.py")


@pytest.fixture(scope="session")
def two_points():
    return load("experiment-2/two_points.py")


@pytest.fixture(scope="session")
def swiss_roll():
    return load("experiment-3/swiss_roll.py")


@pytest.fixture(scope="session")
def flow_matching():
    return load("experiment-4/flow_matching.py")


def texts(figure):
    """Everything that is written in a figure, one string."""
    return "\n".join(text.get_text() for text in figure.findobj(matplotlib.text.Text))


def assert_image(path):
    """The file is a whole JPEG or GIF, dark on white, at most 300 KB (a GIF 2 MB)."""
    data = path.read_bytes()
    first, last, most = {
        ".jpg": (b"\xff\xd8", b"\xff\xd9", 300_000),
        ".gif": (b"GIF89a", b";", 2_000_000),
    }[path.suffix]
    assert data.startswith(first), path
    assert data.endswith(last), path
    assert len(data) <= most, path
    pixels = plt.imread(path)[..., :3]
    assert min(pixels.shape[:2]) >= 300, path
    assert np.ptp(pixels.astype(float)) > 200, path
