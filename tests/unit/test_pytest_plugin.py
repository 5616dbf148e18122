"""The fixtures cost pytest little in a project that only has this package installed."""

from pathlib import Path

import pytest

from ..fresh import pytest_on

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


@pytest.mark.thorough
def test_a_run_that_asks_for_no_fixture_imports_neither_the_package_nor_aiohttp(
    tmp_path: Path,
) -> None:
    assert "1 passed" in pytest_on(tmp_path, TEST, *ASYNCIO).stdout


def test_the_fixtures_are_there_with_pytest_asyncio_alone(tmp_path: Path) -> None:
    assert "1 passed" in pytest_on(tmp_path, USE, *ASYNCIO).stdout


@pytest.mark.thorough
def test_a_pytest_asyncio_that_is_too_old_breaks_no_other_test(tmp_path: Path) -> None:
    options = ("-p", "no:aiohttp", "-p", "no:asyncio")
    printed = pytest_on(tmp_path, TEST + USE, *options, program=("-c", OLD)).stdout
    assert "1 passed" in printed
    assert "fixture 'recording_gateway' not found" in printed
