"""The fixtures cost pytest little in a project that only has this package installed."""

import subprocess
import sys
from pathlib import Path

import pytest

TEST = """
import sys

def test_it():
    loaded = {name.partition(".")[0] for name in sys.modules}
    assert "pytest_aiohttp_smg_routing" in loaded
    assert not loaded & {"aiohttp_smg_routing", "aiohttp", "multidict", "yarl", "prometheus_client"}
"""
USE = """
async def test_gateway(recording_gateway):
    assert recording_gateway.calls == []
"""
ASYNCIO = ("-p", "no:aiohttp", "--asyncio-mode=auto")  # pytest-aiohttp itself imports aiohttp
OLD = """
import sys, types

sys.modules["pytest_asyncio"] = types.ModuleType("pytest_asyncio")  # older than its fixture()
import pytest

sys.exit(pytest.main(sys.argv[1:]))
"""


def run(folder: Path, test: str, *args: str, program: tuple[str, ...] = ("-m", "pytest")) -> str:
    (folder / "test_it.py").write_text(test)
    (folder / "pytest.ini").touch()  # otherwise pytest searches the folders above
    argv = [sys.executable, *program, "-p", "no:cacheprovider", *args]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=folder, check=False)  # noqa: S603
    return done.stdout + done.stderr


@pytest.mark.thorough
def test_a_run_that_asks_for_no_fixture_imports_neither_the_package_nor_aiohttp(
    tmp_path: Path,
) -> None:
    assert "1 passed" in run(tmp_path, TEST, *ASYNCIO)


def test_the_fixtures_are_there_with_pytest_asyncio_alone(tmp_path: Path) -> None:
    assert "1 passed" in run(tmp_path, USE, *ASYNCIO)


@pytest.mark.thorough
def test_a_pytest_asyncio_that_is_too_old_breaks_no_other_test(tmp_path: Path) -> None:
    options = ("-p", "no:aiohttp", "-p", "no:asyncio")
    printed = run(tmp_path, TEST + USE, *options, program=("-c", OLD))
    assert "1 passed" in printed
    assert "fixture 'recording_gateway' not found" in printed
