"""What pytest does from the root of the repository: the pages are tests as well.

Only a page brings what the snippets of the pages need, so a test file runs with what it needs
itself.
"""

import gc
import os
import pkgutil
import sys
from collections.abc import Generator, Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # or it asks the internet, when imported

# The tests that reach each line and branch of the package. Coverage makes a test take up to twice
# as long: the tests of whole programs, and those that are marked as thorough, do without.
COVERING = ("tests/unit/", "tests/wire/", "tests/gateway/test_testing_")

# LiteLLM's alone takes four seconds of a processor to import, and brings OpenAI's.
SDKS = (
    *("tests/recipes/test_agents.py", "tests/recipes/test_canned.py"),
    *("tests/recipes/test_litellm.py", "tests/recipes/test_messages.py"),
    "tests/recipes/test_openai.py",
)

MEASURING = pytest.StashKey[Any]()
"""What measures coverage, where something does."""

REMEDY = "These tests need packages that are not here: pip install -e . --group test"


class Page(pytest.File):
    """A page, whose snippets are tests."""

    def collect(self) -> Iterable[pytest.Item | pytest.Collector]:
        """Import what the snippets need, now that somebody asks for them."""
        from tests.pages import collect_page

        page = collect_page(self.path, self.parent)
        return page.collect() if page else []


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    """Take each page for a file of tests."""
    return Page.from_parent(parent, path=file_path) if file_path.suffix == ".md" else None


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection(session: pytest.Session) -> Generator[None, object, object]:
    """Measure what the package does when it is imported, and from then on only what is asked of.

    What the collection makes stays until the end: the search for garbage, a tenth of the time, need
    not go through it again and again.
    """
    if "coverage" in sys.modules:
        from coverage import Coverage

        if measuring := Coverage.current():
            package = import_module("aiohttp_smg_routing")
            for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
                import_module(module.name)
            session.config.stash[MEASURING] = measuring
        while running := Coverage.current():  # a process of xdist has two: both must stop
            running.stop()
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Measure coverage in those tests that it is asked of, their fixtures included."""
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
    """Let one process run a page, in order, a file of recipes, and all that import SDKs.

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
    """Name the remedy where a test file, or a page, needs a package that is not installed."""
    report = yield
    if report.failed and "ModuleNotFoundError" in str(report.longrepr):
        report.sections.append(("What to install", REMEDY))
    return report
