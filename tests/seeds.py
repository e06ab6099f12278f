"""How far the numbers of what is learned spread.  By hand: python tests/seeds.py [SCRIPT ...]

Runs each script that learns with seeds 0 to 4, and prints its lines once, every number that is not
the same in all five as least..largest. Two processes at a time; 20 minutes for all scripts.
"""

import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor

from conftest import SCRIPTS

NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[+-]\d+)?")


def printed(script, seed):
    """The lines that the script prints, but for the last, which names the figures' folder."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(script), "--seed", str(seed), "--figures-dir", folder]
        run = subprocess.run(command, check=True, capture_output=True, encoding="utf-8")
    return run.stdout.splitlines()[:-1]


def spread(texts):
    """One text in place of several that differ in their numbers only: least..largest."""
    numbers = zip(*(NUMBER.findall(text) for text in texts))
    ranges = (
        column[0]
        if len(set(column)) == 1
        else "..".join(sorted(column, key=float)[:: len(texts) - 1])
        for column in numbers
    )
    return NUMBER.sub(lambda _: next(ranges), texts[0])


def main():
    chosen = sys.argv[1:]
    learning = [path for path in SCRIPTS if "\ndef train(" in path.read_text(encoding="utf-8")]
    with ThreadPoolExecutor(2) as pool:
        for script in learning:
            if not chosen or script.stem in chosen:
                runs = pool.map(printed, [script] * 5, range(5))
                print(script.stem)
                for lines in zip(*runs):
                    # Columns stay apart: two spaces or more lie between them.
                    cells = [re.split(r"\s{2,}", line.strip()) for line in lines]
                    print("  " + "   ".join(map(spread, zip(*cells))), flush=True)


if __name__ == "__main__":
    main()
