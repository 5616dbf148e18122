"""The fuzzer runs, and finds a law that is broken."""

import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from harness.processes import ROOT, finished

pytestmark = pytest.mark.skipif(
    (sys.platform, platform.machine()) != ("linux", "x86_64"), reason="atheris has no wheel for it"
)


def fuzz(tree: Path, seconds: int) -> "subprocess.CompletedProcess[str]":
    return finished(tree, sys.executable, "-m", "fuzz", str(seconds), errors="replace")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Copy the fuzzed code, so that the files of a finding stay in the test's folder."""
    for name in ("aiohttp_smg_routing", "fuzz"):
        shutil.copytree(ROOT / name, tmp_path / name)
    return tmp_path


def test_the_first_inputs_break_no_law_and_no_file_is_left(tree: Path) -> None:
    """``make fuzz`` goes on with others, which would not be the same in each run of the tests."""
    run = fuzz(tree, 0)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.endswith("no law was broken\n")
    tried = re.findall(r"number_of_executed_units: *(\d+)", run.stderr)
    assert len(tried) == 3
    assert min(map(int, tried)) > 500
    assert {path.name for path in tree.iterdir()} == {"aiohttp_smg_routing", "fuzz"}


def test_a_broken_law_is_found_and_its_input_kept(tree: Path) -> None:
    key = tree / "aiohttp_smg_routing" / "keys.py"
    whole = key.read_text()
    key.write_text(whole.replace("VALID_KEY.fullmatch(whole)", "True"))
    main = tree / "fuzz" / "__main__.py"
    one_target = 'TARGETS = ("key",)'  # the others take as long, and find nothing
    main.write_text(re.sub(r"(?m)^TARGETS = .*", one_target, main.read_text()))
    run = fuzz(tree, 1)
    assert run.returncode == 1, run.stdout + run.stderr
    assert "a law was broken: key\n" in run.stdout
    [found] = tree.glob("fuzz-key-crash-*")

    def again() -> int:
        argv = (sys.executable, "-m", "fuzz.run", "key", found.name)
        return finished(tree, *argv, errors="replace").returncode

    assert again() != 0
    key.write_text(whole)
    assert again() == 0
