"""The files that say what users and developers install agree with each other."""

import re
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import aiohttp_smg_routing
from harness.processes import ROOT, finished

tomllib = import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")

PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
EXTRAS: dict[str, list[str]] = PROJECT["project"]["optional-dependencies"]
GROUPS: dict[str, list[Any]] = PROJECT["dependency-groups"]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
FOLDERS = (
    "aiohttp_smg_routing",
    "benchmarks",
    "demo",
    "docs",
    "examples",
    "fuzz",
    "harness",
    "mutants",
    "soak",
    "tests",
    ".ci",
)


def texts() -> dict[Path, str]:
    """Return the text of each file that may say what to install."""
    files = [*ROOT.glob("*.md"), *ROOT.glob("*.py"), ROOT / "pyproject.toml", ROOT / "Makefile"]
    for folder in FOLDERS:
        found = (ROOT / folder).rglob("*")
        files += [it for it in found if it.is_file() and it.suffix in ("", ".md", ".py")]
    return {file.relative_to(ROOT): file.read_text(encoding="utf-8") for file in files}


def test_users_see_the_extras_of_users() -> None:
    assert set(EXTRAS) == {"metrics", "verify", "gateway", "testing"}


def test_each_extra_that_is_named_is_there() -> None:
    for file, text in texts().items():
        named = re.findall(r"aiohttp_smg_routing\\?\[([a-z,]+)\\?\]", text)
        assert {*",".join(named).split(",")} - {""} <= {*EXTRAS}, file


def test_each_group_that_is_named_is_there() -> None:
    named = {name for text in texts().values() for name in re.findall(r"--group (\w+)", text)}
    assert named <= {*GROUPS}
    assert named  # the Makefile names its group in a stamp
    assert {*re.findall(r"\(VENV\)/(\w+)\.installed", MAKEFILE)} <= {*GROUPS}


def test_a_package_has_one_range_of_versions_wherever_it_is_named() -> None:
    ranges: dict[str, set[str]] = {}
    listed = [PROJECT["project"]["dependencies"], *EXTRAS.values(), *GROUPS.values()]
    for requirement in (it for its in listed for it in its if isinstance(it, str)):
        name, its = re.fullmatch(r"([\w-]+(?:\[[\w,]+\])?)(.*)", requirement, re.DOTALL).groups()  # type: ignore[union-attr]
        ranges.setdefault(name, set()).add(its)
    assert {name: its for name, its in ranges.items() if len(its) > 1} == {}


def test_the_version_is_one_that_can_be_released_and_heads_the_changelog() -> None:
    version = aiohttp_smg_routing.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+", version)
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    [newest, *_] = re.findall(r"^## (.+)$", changelog, re.MULTILINE)
    assert re.fullmatch(rf"{re.escape(version)} \((unreleased|\d{{4}}-\d\d-\d\d)\)", newest)


def test_what_make_check_leaves_out_is_there() -> None:
    patterns = re.findall(r"--ignore(?:-glob)? '?([\w/*.]+)'?", MAKEFILE)
    assert len(patterns) == 4
    for pattern in patterns:
        assert [*ROOT.glob(pattern)], pattern


def test_ci_runs_make_check_on_each_python_and_all_of_ci_run() -> None:
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    assert re.findall(r"- run: (.+)", workflow) == ["make check", ".ci/run"]
    classifiers = PROJECT["project"]["classifiers"]
    pythons = [it for it in (name.rpartition(" ")[2] for name in classifiers) if "3." in it]
    matrix = re.findall(r'"(3\.\d+)"', workflow)
    assert matrix == re.findall(r"^ +(3\.\d+)$", workflow, re.MULTILINE) == pythons


@pytest.mark.thorough
def test_a_test_file_runs_with_what_it_needs_and_another_names_what_to_install() -> None:
    code = (
        "import sys; sys.modules['sybil'] = sys.modules['matplotlib'] = None; import pytest; "
        "sys.exit(pytest.main(sys.argv[1:]))"
    )
    options = ("-p", "no:cacheprovider", "--continue-on-collection-errors")
    files = ("README.md", "tests/unit/test_testing_call.py", "tests/unit/test_verify_plot.py")
    done = finished(ROOT, sys.executable, "-c", code, *options, *files)
    assert "1 passed, 2 errors" in done.stdout
    assert done.stdout.count("pip install -e . --group test") == 2
    assert done.returncode == pytest.ExitCode.TESTS_FAILED
