"""Programs that are no Python, and where they are."""

import os
import shutil
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = sysconfig.get_path("scripts")


def found(name: str, environ: Mapping[str, str] = os.environ) -> str | None:
    """Return where the program is, the virtual environment included."""
    folders = [environ.get("PATH", os.defpath), "/usr/sbin", SCRIPTS]
    return shutil.which(name, path=os.pathsep.join(folders))


def program(name: str, package: str, environ: Mapping[str, str] = os.environ) -> str:
    """Return where Debian's program is; without it fail on CI, and skip elsewhere."""
    return found(name, environ) or absent(
        f"{name} is not here: run .ci/debian {package} {name}, which puts it into .venv/bin",
        environ,
    )


def absent(reason: str, environ: Mapping[str, str] = os.environ) -> NoReturn:
    """End a test that misses something: with a failure on CI, and skipped elsewhere."""
    if environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)
