"""Are the numbers on the pages what the scripts print?  By hand: python tests/pages.py [SCRIPT ...]

Runs each script at its defaults, holds the console blocks of its page to what is printed, and
says which lines differ. Two processes at a time; about five minutes for all scripts.
"""

import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor

from conftest import SCRIPTS

NUMBER = re.compile(r"-?\d*\.?\d+(?:e[+-]?\d+)?")


def same(number, other):
    """Equal to the last digit but one; of rounding errors, such as 3e-15, only the size."""
    if abs(float(number)) < 1e-9 and abs(float(other)) < 1e-9:
        return True
    mantissa, _, exponent = number.partition("e")
    digits = len(mantissa.partition(".")[2])
    unit = 10.0 ** (int(exponent or 0) - digits)
    return abs(float(number) - float(other)) < (10 if digits else 0.5) * unit


def blocks(path):
    """The lines of the console blocks of a script's page."""
    page = (path.parent / "README.md").read_text(encoding="utf-8")
    return "".join(re.findall(r"```console\n(.*?)```", page, re.DOTALL)).splitlines()


def differences(wanted, lines):
    """Those of the page's lines that were not printed in this order, with what was instead."""

    def words(line):
        return NUMBER.sub("0", line).split()

    start = 0
    for line in wanted:
        later = [k for k in range(start, len(lines)) if words(lines[k]) == words(line)]
        printed = lines[later[0]] if later else "no line with these words"
        start = later[0] + 1 if later else start
        if not later or not all(map(same, NUMBER.findall(line), NUMBER.findall(printed))):
            yield line, printed


def printed(path):
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(path), "--figures-dir", folder]
        run = subprocess.run(command, check=True, capture_output=True, encoding="utf-8")
    return run.stdout.splitlines()[:-1]


def main():
    chosen = [path for path in SCRIPTS if not sys.argv[1:] or path.stem in sys.argv[1:]]
    with ThreadPoolExecutor(2) as pool:
        for path, lines in zip(chosen, pool.map(printed, chosen)):
            found = [*differences(blocks(path), lines)]
            print(f"{path.stem}: {len(blocks(path))} lines, {len(found)} differ", flush=True)
            for pair in found:
                print("  page:    {}\n  printed: {}".format(*pair))


if __name__ == "__main__":
    main()
