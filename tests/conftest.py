"""What the test modules share: the scripts, imported by path, and a look at the figures they write."""

import importlib.util
from pathlib import Path

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest

EXPERIMENTS = Path(__file__).resolve().parents[1] / "experiments"


def load(path):
    """The script at `path`, a path below experiments/, imported as a module; its `main` is not run."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, EXPERIMENTS / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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


@pytest.fixture(scope="session")
def scripts():
    """Every script's path, in the order of the experiments."""
    return sorted(EXPERIMENTS.glob("experiment-*/*.py"))


@pytest.fixture(scope="session")
def assert_jpegs():
    """A check that a folder holds exactly the named figures, each a whole JPEG with dark ink on white paper."""

    def check(folder, names):
        assert sorted(path.name for path in folder.iterdir()) == sorted(names)
        for name in names:
            data = (folder / name).read_bytes()
            assert data.startswith(b"\xff\xd8"), name
            assert data.endswith(b"\xff\xd9"), name
            pixels = plt.imread(folder / name)
            assert min(pixels.shape[:2]) >= 400, name
            assert np.ptp(pixels) > 200, name

    return check
