"""Programs out of Debian packages, which no virtual environment brings."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

import pytest

ROOT = Path(__file__).parents[1]


def program(name: str, package: str, environ: Mapping[str, str] = os.environ) -> str:
    """Return where the program is; without it fail on CI, and skip elsewhere."""
    folders = [environ.get("PATH", os.defpath), "/usr/sbin", str(ROOT / ".venv" / "bin")]
    path = shutil.which(name, path=os.pathsep.join(folders))
    return path or absent(
        f"{name} is not here: run .ci/debian {package} {name}, which puts it into .venv/bin",
        environ,
    )


def absent(reason: str, environ: Mapping[str, str] = os.environ) -> NoReturn:
    """End a test that misses something: with a failure on CI, and skipped elsewhere."""
    if environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)
