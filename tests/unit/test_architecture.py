"""The package imports what the table in CONTRIBUTING.md says; the rest imports what is public."""

import ast
import re
import sys
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest

from harness.processes import ROOT

PACKAGE = ROOT / "aiohttp_smg_routing"
CORE = sorted(file.stem for file in PACKAGE.glob("[!_]*.py"))
FOLDERS = sorted(file.parent.name for file in PACKAGE.glob("*/__init__.py"))
FOLDERS_OUTSIDE = ("benchmarks", "demo", "examples", "fuzz", "harness", "mutants", "soak", "tests")
OUTSIDE = [file for name in FOLDERS_OUTSIDE for file in (ROOT / name).rglob("*.py")]
OUTSIDE.append(ROOT / "conftest.py")
PUBLIC = (PACKAGE.name, f"{PACKAGE.name}.testing", f"{PACKAGE.name}.run")
ROW = re.compile(r"^\| `(\w+)` \| .+ \| (.+) \|$", re.MULTILINE)
# aiohttp, its dependencies, and the package that the extra ``metrics`` installs.
ALLOWED = {"aiohttp", "multidict", "yarl", "prometheus_client", PACKAGE.name}


def picture() -> dict[str, list[str]]:
    """Return the imports of each file or folder, in the order of the table."""
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    table = page.partition("### Who imports whom")[2]
    return {name: re.findall(r"`(\w+)`", imports) for name, imports in ROW.findall(table)}


@cache
def imported(file: Path) -> list[list[str]]:
    """Return the parts of each name that a file imports, at its top or within a function."""
    return list(_imported(file))


def _imported(file: Path) -> Iterator[list[str]]:
    here = file.relative_to(ROOT).parts
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name.split(".")
        elif isinstance(node, ast.ImportFrom):
            above = here[: -node.level] if node.level else ()
            for alias in node.names:
                yield [*above, *(node.module or "").split("."), alias.name]


def of_package(name: str) -> list[str]:
    """Return the other files and folders of the package that a file or folder imports."""
    folder = PACKAGE / name
    files = folder.rglob("*.py") if folder.is_dir() else [PACKAGE / f"{name}.py"]
    paths = [[part for part in it if part] for file in files for it in imported(file)]
    known = {*CORE, *FOLDERS}
    # Any other name belongs to the package itself, which is __init__.
    ours = {
        path[1] if path[1] in known else "__init__" for path in paths if path[0] == PACKAGE.name
    }
    return sorted(ours - {name})


def test_the_picture_has_every_file() -> None:
    assert sorted(picture()) == sorted(CORE + FOLDERS)


@pytest.mark.parametrize("name", CORE + FOLDERS)
def test_a_file_imports_what_its_row_says(name: str) -> None:
    assert picture().get(name, []) == of_package(name)


def test_imports_run_one_way() -> None:
    above: set[str] = set()
    for name, its in picture().items():
        above.add(name)
        assert above.isdisjoint(its), f"{name} imports a file that stands above it"


def test_users_of_the_package_load_neither_testing_nor_verify() -> None:
    assert {*of_package("__init__")} <= {*CORE}


def test_nothing_outside_imports_what_is_private_in_the_package() -> None:
    names = {name: {*import_module(name).__all__} for name in PUBLIC}
    unit = ROOT / "tests" / "unit"  # tests of single functions and objects need undocumented ones
    private = set()
    for file in OUTSIDE:
        for path in imported(file):
            module, name = ".".join(path[:-1]), path[-1]
            is_public = ".".join(path) in PUBLIC or name in names.get(module, ())
            is_single = file.is_relative_to(unit) and not any(
                re.fullmatch(r"_[^_].*", part) for part in path
            )
            if path[0] == PACKAGE.name and not is_public and not is_single:
                private.add((file.name, f"{module}.{name}"))
    assert private == set()


def test_nothing_imports_from_a_file_of_tests() -> None:
    """What two files need is in a third one."""
    paths = {(it.name, ".".join(path)) for it in OUTSIDE for path in imported(it)}
    ours = {(file, path) for file, path in paths if path.startswith(FOLDERS_OUTSIDE)}
    assert {(file, path) for file, path in ours if ".test_" in path} == set()
    assert ours


def test_an_example_needs_no_file_of_the_checkout() -> None:
    examples = [file for file in OUTSIDE if file.is_relative_to(ROOT / "examples")]
    needed = {path[0] for file in examples for path in imported(file)}
    assert needed & {*FOLDERS_OUTSIDE, "conftest"} == set()
    assert examples


def test_no_file_edits_the_path_of_imports() -> None:
    editing = re.compile(r"sys\.path(?:\.\w+\(|\[|\s*\+?=[^=])")
    files = [*OUTSIDE, *PACKAGE.rglob("*.py")]
    found = [file.name for file in files if editing.search(file.read_text(encoding="utf-8"))]
    assert found == ["sitecustomize.py"]  # it removes the folder that run put on the path


def test_the_core_needs_nothing_but_aiohttp() -> None:
    needed = {path[0] for name in CORE for path in imported(PACKAGE / f"{name}.py")}
    assert needed - sys.stdlib_module_names <= ALLOWED


def test_the_core_is_few_files() -> None:
    assert len(list(PACKAGE.glob("*.py"))) <= 18  # 17 for the core, 1 for httpx


def test_each_file_is_short() -> None:
    sizes = {path: len(path.read_text().splitlines()) for path in PACKAGE.rglob("*.py")}
    assert max(sizes.values()) <= 300
