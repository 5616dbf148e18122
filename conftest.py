"""What pytest does from the root of the repository: the pages are tests as well.

Only a page brings what the snippets of the pages need, so a test file runs with what it needs
itself.
"""

import os
from collections.abc import Generator, Iterable
from pathlib import Path

import pytest

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # or it asks the internet, when imported

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


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Name the remedy where a test file, or a page, needs a package that is not installed."""
    report = yield
    if report.failed and "ModuleNotFoundError" in str(report.longrepr):
        report.sections.append(("What to install", REMEDY))
    return report
