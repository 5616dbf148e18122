"""Python and pytest in new processes."""

import subprocess
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path

from harness.processes import ROOT, finished


def python(code: str, *flags: str, env: Mapping[str, str] | None = None) -> str:
    """Run code in a new Python, with ``env`` added to this environment; return what it prints."""
    done = finished(ROOT, sys.executable, *flags, "-c", textwrap.dedent(code), env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


def pytest_on(
    folder: Path, test: str, *args: str, ini: str = "", program: tuple[str, ...] = ("-m", "pytest")
) -> "subprocess.CompletedProcess[str]":
    """Run pytest on a test in a project of its own; return its status and what it printed."""
    (folder / "test_it.py").write_text(test)
    (folder / "pytest.ini").write_text(ini)  # without one pytest searches the folders above
    argv = [sys.executable, *program, "-p", "no:cacheprovider", *args]
    return subprocess.run(argv, capture_output=True, text=True, cwd=folder, check=False)  # noqa: S603
