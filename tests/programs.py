"""Programs out of Debian packages, which no virtual environment brings."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def program(name: str, package: str, environ: Mapping[str, str] = os.environ) -> str:
    """Return where the program is; without it fail on CI, and skip elsewhere."""
    folders = [environ.get("PATH", os.defpath), "/usr/sbin", str(ROOT / ".venv" / "bin")]
    if path := shutil.which(name, path=os.pathsep.join(folders)):
        return path
    absent = f"{name} is not here: run .ci/debian {package} {name}, which puts it into .venv/bin"
    if environ.get("CI") == "true":
        pytest.fail(absent)
    pytest.skip(absent)
