"""experiments/YOUR-SAMPLER.md, as a reader uses it: pasted, run, and each planted fault is seen."""

import contextlib
import io
import re
from pathlib import Path

import gaussian
import numpy as np
import pytest

PAGE = Path(__file__).resolve().parents[1] / "experiments/YOUR-SAMPLER.md"
TEXT = PAGE.read_text(encoding="utf-8")
CODE = [
    code.split("\n\n\njudge(")[0] for code in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
]
JUDGE, EDM, DDIM, FLOW, EVERYTHING = CODE
SAMPLERS = {"edm": EDM, "ddim": DDIM, "flow": FLOW}
LEVELS = {"edm": 20, "ddim": 157.4, "flow": 20}


def judged(code, call, name, twins=False):
    """What the judge prints of a sampler, as {"point": "0.0000", "mean": ...}.

    Where nobody asks for the twins, the equation is solved in a few steps.
    """
    place = {}
    judge = JUDGE if twins else JUDGE.replace("0.001, 2000", "0.001, 9")
    exec("\n\n".join([judge, EVERYTHING, code]), place)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(f"judge({call}, {LEVELS[name]})", place)
    found = re.findall(r"(point|mean|std|twins|evaluations)[\w ]*:? (-?[\d.]+)", out.getvalue())
    return dict(found)


def test_its_denoisers():
    """By the score of the density, with differences: Tweedie."""
    place = {}
    exec(JUDGE, place)
    line, ring, centers = place["line"], place["ring"], place["CENTERS"]
    x = np.array([[-0.7, 0.4], [0.9, 0.1], [0.2, -1.3]])
    for sigma in (0.05, 0.4, 3.0):

        def log_density(x, variance=0.05**2 + sigma**2):
            return np.log(np.exp(-((x - centers) ** 2).sum(axis=1) / (2 * variance)).sum())

        for point in x:
            steps = 1e-5 * np.eye(2)
            score = [(log_density(point + h) - log_density(point - h)) / 2e-5 for h in steps]
            wanted = point + sigma**2 * np.array(score)
            np.testing.assert_allclose(ring(point[None], sigma)[0], wanted, atol=1e-6)
        # All of the way back to 0 in one step is experiment 0's reverse mean.
        wanted = gaussian.reverse_mean(x, 1, 1, mu_0=1, sigma_0=0.7, sigma_q=sigma)
        np.testing.assert_allclose(line(x, sigma), wanted)


def test_its_samplers():
    """Right ones pass: what the page says that the judge prints, for all three languages."""
    text = re.search(r"```text\n(.*?)```", TEXT, re.DOTALL)[1]
    runs = re.findall(r"judge\((.*), [\d.]+\)\npoint: (.*) away.*\n.*mean (\S+) .*std (\S+) ", text)
    assert len(runs) == 5
    for call, *wanted in runs:
        (name,) = (name for name in SAMPLERS if name in call)
        found = judged(SAMPLERS[name], call, name, twins=call == name)
        values = [float(found[key]) for key in ("point", "mean", "std")]
        assert values == pytest.approx([float(x) for x in wanted], abs=0.0011)
        if call == name:
            assert float(found["twins"]) < 0.011
            assert f"evaluations of the denoiser: {found['evaluations']}" in text


def test_the_judge_against_runge_kutta():
    """A sampler that is the solution of the ODE has no error."""
    place = {}
    exec(JUDGE, place)

    def solved(denoiser, x, rng):
        if x.shape[1] == 1:
            return x
        for sigma, lower in zip(grid := np.geomspace(20, 1e-4, 400), grid[1:]):
            h = np.log(lower / sigma)  # dx / dlog sigma = x - D, classic Runge-Kutta
            middle = (sigma * lower) ** 0.5
            k_1 = x - place["ring"](x, sigma)
            k_2 = x + h / 2 * k_1 - place["ring"](x + h / 2 * k_1, middle)
            k_3 = x + h / 2 * k_2 - place["ring"](x + h / 2 * k_2, middle)
            k_4 = x + h * k_3 - place["ring"](x + h * k_3, lower)
            x = x + h / 6 * (k_1 + 2 * k_2 + 2 * k_3 + k_4)
        return place["ring"](x, lower)

    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        place["judge"](solved, 20)
    assert float(re.search(r"twins: (\S+)", out.getvalue())[1]) <= 0.0002


ROWS = re.findall(r"^\| .* \| `(\w+)` \| `(.*)` \| `(.*)` \| (\w+) (\S+) \((\S+)\) \|$", TEXT, re.M)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[2])
def test_it_sees_the_fault(row):
    """Planted as the page says: the number that it names leaves its right value."""
    name, right, wrong, key, shown, without = row
    noisy = {"variance**0.5 *": "lambda *a: ddim(*a, eta=1)"}
    noisy |= {"+ g**2 * s * score / 2": "lambda *a: flow(*a, g=1)"}
    noisy |= {"+ w * (D": "lambda *a: edm(*a, everything)"}
    code = SAMPLERS[name]
    assert code.count(right) == 1
    found = judged(code.replace(right, wrong), noisy.get(right, name), name)[key]
    assert float(found) == pytest.approx(float(shown), abs=0.0011)
    assert abs(float(shown) - float(without)) > 0.0019


def test_all_faults_are_tried():
    assert len(ROWS) == 8
