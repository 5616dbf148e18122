"""The command line: ``python -m mutants``."""

import argparse
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from harness.markdown import head, row

from .selection import files, selected

try:
    from .changes import Faults, Mutant
except ModuleNotFoundError as error:
    sys.exit(f"{error}: pip install -e . --group mutants")

from .trial import Copy

ROOT = Path(__file__).parents[1]
_COUNT = 100  # about fifteen minutes on two cores


def arguments() -> argparse.Namespace:
    """Return the arguments of the command line; exit if they are wrong."""
    parser = argparse.ArgumentParser(prog="python -m mutants")
    known = files(ROOT)
    parser.add_argument("files", nargs="*", default=known, help="files of the package; all of them")
    parser.add_argument("--count", type=int, default=_COUNT, help=f"mutants to try; {_COUNT}")
    parser.add_argument("--seed", type=int, help="draws the same mutants again; random")
    parser.add_argument("--at-least", type=float, help="exit with 1 if fewer percent are caught")
    given = parser.parse_args()
    for file in given.files:
        if file not in known:
            parser.error(f"{file} is no file of the package, such as {known[3]}")
    if given.count < 1:
        parser.error(f"--count is {given.count}: there is nothing to try")
    given.files = sorted(set(given.files))  # so that their order doesn't change the sample
    if given.seed is None:
        given.seed = random.randrange(10**6)  # noqa: S311 - no secret
    return given


def sample(chosen: Sequence[str], count: int, seed: int) -> list[Mutant]:
    """Return ``count`` mutants of the files, or all if there are fewer."""
    faults = [Faults(file, (ROOT / file).read_text(encoding="utf-8")) for file in chosen]
    places = [(its, number) for its in faults for number in range(len(its))]
    drawn = random.Random(seed).sample(places, min(count, len(places)))  # noqa: S311
    return [its[number] for its, number in drawn]


def attempt(mutants: Sequence[Mutant]) -> Counter[tuple[str, str]]:
    """Try each mutant; return the count of each outcome by file, and show the survivors."""
    counts: Counter[tuple[str, str]] = Counter()
    with TemporaryDirectory(prefix="mutants-") as folder:
        copy = Copy(ROOT, Path(folder))
        try:
            for test in sorted({test for mutant in mutants for test in selected(mutant.file)}):
                tell(f"without a mutant: {test} {copy.measure(test):.0f} s")
            for number, mutant in enumerate(mutants, 1):
                started = time.monotonic()
                outcome = copy.outcome(mutant.file, mutant.after, selected(mutant.file))
                counts[mutant.file, outcome] += 1
                seconds = time.monotonic() - started
                where = f"{mutant.file}:{mutant.line}"
                tell(f"{number}/{len(mutants)} {where} {outcome} {seconds:.0f} s")
                if outcome == "survived":
                    tell(mutant.diff)
        except KeyboardInterrupt:
            tell("Stopped: what follows is of the mutants that were tried.")
    return counts


def tell(text: str) -> None:
    """Show progress on stderr: a page of the docs gets what stands on stdout."""
    print(text, file=sys.stderr, flush=True)


def as_markdown(counts: Counter[tuple[str, str]]) -> str:
    """Return a row for each file, in Markdown."""
    outcomes = ("caught", "timed out", "survived")
    lines = [head("file", "mutants", *outcomes)]
    tried = sorted({file for file, _ in counts})
    for name, its in [*((f"`{file}`", [file]) for file in tried), ("all", tried)]:
        of_each = [sum(counts[file, outcome] for file in its) for outcome in outcomes]
        lines.append(row(name, *map(str, (sum(of_each), *of_each))))
    return "\n".join(lines)


def git(*words: str) -> str:
    """Return what a git command prints about this repository."""
    return subprocess.check_output(["git", *words], cwd=ROOT, text=True).strip()  # noqa: S603, S607


def main() -> int:
    """Try a sample of mutants, and print how many of them the tests catch."""
    given = arguments()
    commit = git("describe", "--always", "--dirty")
    mutants = sample(given.files, given.count, given.seed)
    counts = attempt(mutants)
    tried = counts.total()
    if tried == 0:
        return 130
    survived = sum(count for (_, outcome), count in counts.items() if outcome == "survived")
    share = 100 * (tried - survived) / tried
    print(f"{as_markdown(counts)}\n")
    caught = f"{share:.1f} % are caught, those that exceed the time limit included."
    print(f"{caught} Seed {given.seed}, {commit}.")
    if tried < len(mutants):
        return 130
    return 1 if given.at_least is not None and share < given.at_least else 0


if __name__ == "__main__":
    sys.exit(main())
