"""Programs that are not written in Python, and their paths."""

import os
import shutil
import sysconfig
from collections.abc import Mapping
from typing import NoReturn

import pytest

SCRIPTS = sysconfig.get_path("scripts")


def found(name: str, environ: Mapping[str, str] = os.environ) -> str | None:
    """Return the path of a program, which may be in the virtual environment."""
    folders = [environ.get("PATH", os.defpath), "/usr/sbin", SCRIPTS]
    return shutil.which(name, path=os.pathsep.join(folders))


def program(name: str, package: str, environ: Mapping[str, str] = os.environ) -> str:
    """Return the path of a program of Debian's; without it, fail on CI and skip elsewhere."""
    return found(name, environ) or absent(
        f"{name} is not here: run .ci/debian {package} {name}, which puts it into .venv/bin",
        environ,
    )


def absent(reason: str, environ: Mapping[str, str] = os.environ) -> NoReturn:
    """End a test that lacks something: fail on CI, and skip elsewhere."""
    if environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)
