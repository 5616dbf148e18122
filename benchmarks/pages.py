"""Renew the figures on the pages: ``make figures``, ``make figures PAGES=docs/scaling.md``.

A figure stands in a block: between two comments, which readers don't see.

    <!-- figures: python -m benchmarks.scaling; section: Restarts -->
    <!-- end of figures -->

A command runs once, in an empty folder. Each of its blocks, on whichever page, gets what the
command printed, or wrote into ``figures.md``: all of it, or what stands under the heading that the
block names. The command, the commit and the machine stand below. Pictures that it wrote and one of
these pages names, such as ``performance.svg``, go to ``docs/images``. A command that fails or is
interrupted changes no page.
"""

import argparse
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from harness.processes import ROOT, environment

from .report import machine

BEGIN, END = "<!-- figures: ", "<!-- end of figures -->"
BLOCK = re.compile(
    re.escape(BEGIN) + r"([^;\n]+)(?:; section: ([^\n]+?))? -->\n(.*?)" + re.escape(END), re.DOTALL
)
IMAGES = Path("docs/images")
LAST = "python -m benchmarks.trace.summary"  # it reads a page that other commands write
SHOWN = ("CPU", "system", "Python", "aiohttp", "smg")


@dataclass(frozen=True, slots=True)
class Output:
    """The output of a command."""

    text: str
    pictures: dict[str, bytes]
    source: str
    """The command, the commit and the machine, in one line."""

    def section(self, heading: str | None) -> str:
        """Return the text under a heading, or all of it. Raises ``ValueError``."""
        if heading is None:
            return self.text.strip()
        found = re.search(rf"^(#+) {re.escape(heading)}$\n", self.text, re.MULTILINE)
        if not found:
            raise ValueError(f"its output has no section {heading!r}")
        rest = self.text[found.end() :]
        return re.split(rf"^#{{1,{len(found[1])}}} ", rest, maxsplit=1, flags=re.MULTILINE)[
            0
        ].strip()


def commands(page: Path) -> list[str]:
    """Return the commands of a page's blocks. Raises ``ValueError`` if a block is broken."""
    text = page.read_text("utf-8")
    found = [block[1] for block in BLOCK.finditer(text)]
    if not text.count(BEGIN.strip()) == text.count(END) == len(found):
        raise ValueError(f"{page}: a block of figures has no end, no beginning or no command")
    for block in BLOCK.finditer(text):
        if f"`{block[1]}`" not in block[3]:
            raise ValueError(f"{page}: a block does not say that {block[1]!r} made it")
    return found


def program(command: str) -> list[str]:
    """Return the program to run. Raises ``ValueError`` if there is no such module or file."""
    name, *words = shlex.split(command)
    if name == "python" and words[:1] == ["-m"] and _is_module(words[1]):
        return [sys.executable, *words]
    if os.access(ROOT / name, os.X_OK):
        return [str(ROOT / name), *words]
    raise ValueError(f"there is no command {command!r}")


def _is_module(name: str) -> bool:
    folder = ROOT.joinpath(*name.split("."))
    return (folder / "__main__.py").exists() or folder.with_suffix(".py").exists()


def commit() -> str:
    """Return the commit of the code that runs, and whether files have changed since."""

    def git(*words: str) -> str:
        argv = ("git", "-C", str(ROOT), *words)
        return subprocess.run(argv, capture_output=True, text=True, check=False).stdout.strip()  # noqa: S603

    is_changed = git(
        "diff", "--name-only", "HEAD", "--", "*.py", "pyproject.toml", ".ci", ":!tests"
    )
    return (git("rev-parse", "--short", "HEAD") or "unknown") + " with changes" * bool(is_changed)


def run(command: str) -> Output:
    """Run a command and show its output. Raises ``ValueError`` if it fails."""
    code, begin = commit(), time.monotonic()
    # Wide, because wrapped lines would break a table in Markdown.
    env = environment(COLUMNS="200", PYTHONUNBUFFERED="1")
    with TemporaryDirectory() as name:
        folder, lines = Path(name), []
        with subprocess.Popen(  # noqa: S603
            program(command), cwd=folder, env=env, stdout=subprocess.PIPE, text=True
        ) as process:
            try:
                for line in process.stdout or ():
                    print(line, end="", flush=True)
                    lines.append(line)
            except BaseException:
                process.terminate()  # it ends its own child processes
                raise
        if process.returncode:
            raise ValueError(f"it ended with status {process.returncode}")
        file = folder / "figures.md"
        text = file.read_text("utf-8") if file.exists() else "".join(lines)
        pictures = {each.name: each.read_bytes() for each in folder.glob("*.svg")}
    here = machine()
    known = (here[each] if each in SHOWN[:3] else f"{each} {here[each]}" for each in SHOWN)
    seconds = time.monotonic() - begin
    source = f"`{command}`, {seconds:.0f} s; commit {code}; {here['date']}; {', '.join(known)}."
    return Output(text, pictures, source)


def renew(command: str, pages: Iterable[Path]) -> None:
    """Run a command, then write its blocks on all pages. Raises ``ValueError`` if it fails."""
    output = run(command)

    def renewed(block: re.Match[str]) -> str:
        if block[1] != command:
            return block[0]
        first = block[0].partition("\n")[0]
        return f"{first}\n\n{output.section(block[2])}\n\n*{output.source}*\n\n{END}"

    texts = {page: BLOCK.sub(renewed, page.read_text("utf-8")) for page in pages}
    for name, picture in output.pictures.items():
        if any(name in text for text in texts.values()):
            _write(IMAGES / name, picture)
    for page, text in texts.items():
        _write(page, text.encode())


def _write(file: Path, content: bytes) -> None:
    """Replace a file at once, so that nobody reads half of it."""
    beside = file.with_name(f".{file.name}")
    beside.write_bytes(content)
    beside.replace(file)


def find(chosen: Sequence[Path]) -> dict[str, list[Path]]:
    """Return each command on a chosen page, with all pages that have a block of it."""
    every = {*chosen, Path("README.md"), *Path("docs").glob("*.md")}
    named = {page: commands(page) for page in sorted(every) if page.exists() or page in chosen}
    wanted = dict.fromkeys(each for page in chosen or named for each in named[page])
    for command in wanted:
        program(command)
    ordered = sorted(wanted, key=lambda command: command == LAST)
    return {each: [page for page in named if each in named[page]] for each in ordered}


def failures(found: dict[str, list[Path]]) -> Iterator[str]:
    """Renew the blocks of each command; yield each failure and the pages that it left unchanged."""
    for command, pages in found.items():
        names = ", ".join(map(str, pages))
        print(f"{names}: {command}", flush=True)
        try:
            renew(command, pages)
        except (OSError, ValueError) as error:
            yield f"{names} stays as it was: {command!r}: {error}"
        except KeyboardInterrupt:
            yield f"{names} stays as it was: {command!r}: interrupted"
            return


def main() -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pages", description=__doc__)
    parser.add_argument("pages", nargs="*", metavar="PAGE", type=Path, help="all by default")
    parser.add_argument(
        "--list", action="store_true", help="run nothing: check and list the blocks"
    )
    options = parser.parse_args()
    try:
        found = find(options.pages)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    if options.list:
        for command, pages in found.items():
            print(f"{command}: {', '.join(map(str, pages))}")
        return 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    failed = list(failures(found))
    for failure in failed:
        print(failure, file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
