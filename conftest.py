"""Configure pytest: the pages are tests, coverage is measured in chosen tests, xdist gets groups.

Only a page imports the packages that its snippets need, so a test file runs without them.
"""

import os
import pkgutil
import sys
from collections.abc import Generator, Iterable
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

import pytest

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # otherwise its import asks the internet

# These tests reach each line and branch of the package. Coverage makes a test up to twice as slow,
# so tests of whole programs and thorough tests run without it.
COVERING = ("tests/unit/", "tests/wire/", "tests/gateway/test_testing_")

# LiteLLM alone takes four seconds of CPU time to import, and imports OpenAI's SDK.
SDKS = (
    *("tests/recipes/test_agents.py", "tests/recipes/test_canned.py"),
    *("tests/recipes/test_litellm.py", "tests/recipes/test_messages.py"),
    *("tests/recipes/test_openai.py", "docs/recipes.md"),
)

MEASURING = pytest.StashKey[Any]()
"""The coverage measurement, if there is one."""

Report = TypeVar("Report", pytest.CollectReport, pytest.TestReport)
# The last one is what the package itself says of a missing extra.
SIGNS = ("ModuleNotFoundError", "PackageNotFoundError", "pip install 'aiohttp_smg_routing[")
REMEDY = "These tests need packages that are not here: pip install -e . --group test"


class Page(pytest.File):
    """A page whose snippets are tests."""

    def collect(self) -> Iterable[pytest.Item | pytest.Collector]:
        """Collect the snippets; import what they need only now."""
        from tests.pages import collect_page

        page = collect_page(self.path, self.parent)
        return page.collect() if page else []


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    """Collect each page as a file of tests."""
    return Page.from_parent(parent, path=file_path) if file_path.suffix == ".md" else None


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection(session: pytest.Session) -> Generator[None, object, object]:
    """Measure the import of the package, then stop coverage until a test of ``COVERING`` runs."""
    if "coverage" in sys.modules:
        from coverage import Coverage

        if measuring := Coverage.current():
            package = import_module("aiohttp_smg_routing")
            for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
                import_module(module.name)
            session.config.stash[MEASURING] = measuring
        while running := Coverage.current():  # a process of xdist has two, and both must stop
            running.stop()
    return (yield)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Measure coverage in the tests of ``COVERING`` that are not thorough, with their fixtures."""
    measuring = item.config.stash.get(MEASURING, None)
    is_asked = item.nodeid.startswith(COVERING) and "thorough" not in item.keywords
    if measuring is None or not is_asked:
        return (yield)
    measuring.start()
    try:
        return (yield)
    finally:
        measuring.stop()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Let one process run a whole page, a whole file of recipes, or all tests that import SDKs.

    The snippets of a page build on each other. A recipe's library takes seconds to import.
    """
    if config.getoption("dist") != "loadscope":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class Pages(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::")[0]
            if file in SDKS:
                return "SDKs"
            return file if file.endswith(".md") or file.startswith("tests/recipes/") else nodeid

    return Pages(config, log)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Name the remedy if a test file or a page needs a package that is not installed."""
    report = yield
    return _with_remedy(report)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Name the remedy also if a test or its fixture needs one."""
    report = yield
    return _with_remedy(report)


def _with_remedy(report: Report) -> Report:
    said = f"{report.longreprtext} {report.capstderr}" if report.failed else ""
    if any(sign in said for sign in SIGNS):
        report.sections.append(("What to install", REMEDY))
    return report
