"""``make mutants``: the faults that it makes, and its report on those that no test notices."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from harness.proc import processes_in
from harness.processes import ROOT, running
from mutants.selection import PACKAGE, TESTS, files, selected

from ..waiting import until

if TYPE_CHECKING:  # importing mutmut is slow, and each process collects this file
    from mutants.changes import Faults


# TEST, below, notices only faults in the return statement.
FILE = f"{PACKAGE}/pins.py"
TEST, _ = selected(FILE)
_CODE = '''\
"""A file of the package."""


def sign(number: int | None) -> str:
    """Return its sign."""
    if number is None:
        raise TypeError("no number")
    return "negative" if number < 0 else "positive"
'''
_NOTICE = """\
import pytest

from aiohttp_smg_routing.pins import sign


def test_sign():
    assert sign(-2) == "negative"
    assert sign(2) == "positive"
"""


def faults_of(code: str) -> "Faults":
    from mutants.changes import Faults

    return Faults(FILE, code)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Make a repository whose package is one file."""
    tree = tmp_path / "tree"
    shutil.copytree(ROOT / "mutants", tree / "mutants", ignore=shutil.ignore_patterns("*.pyc"))
    names = ("__init__", "testing/__init__")
    texts = {f"{PACKAGE}/{name}.py": "" for name in names}
    texts |= dict.fromkeys(selected(FILE), "def test_nothing():\n    pass\n")
    texts |= {FILE: _CODE, TEST: _NOTICE}
    for name, text in texts.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(text)
    git = ("git", "-c", "user.name=t", "-c", "user.email=t@localhost")
    for words in (("init", "--quiet"), ("add", "."), ("commit", "--quiet", "-m", "all")):
        subprocess.run([*git, *words], cwd=tree, check=True)  # noqa: S603
    (tmp_path / "tmp").mkdir()
    return tree


def started(tree: Path, *words: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(  # noqa: S603
        [sys.executable, "-B", "-m", "mutants", *words],
        cwd=tree,
        env={**os.environ, "TMPDIR": str(tree.parent / "tmp")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def sampled(tree: Path, *words: str) -> tuple[int, str, str]:
    with started(tree, *words) as run:
        printed, complained = run.communicate()
    return run.returncode, printed, complained


def is_clean(tree: Path) -> bool:
    command = ["git", "status", "--porcelain", "--ignored"]
    changed = subprocess.check_output(command, cwd=tree, text=True)  # noqa: S603
    return not changed and not list((tree.parent / "tmp").iterdir())


def test_what_no_test_notices_is_shown_and_nothing_is_left(tree: Path) -> None:
    status, printed, complained = sampled(tree, FILE, "--seed=3", "--at-least=50")
    assert status == 0, printed + complained
    survivors = re.findall(r"^\+(?!\+\+) *(.*)$", complained, re.MULTILINE)
    assert sorted(survivors) == [
        "if (number is None) and False:",
        "pass",
        'return "negative" if number < 1 else "positive"',
        'return "negative" if number <= 0 else "positive"',
    ]
    row = re.search(rf"^\| `{FILE}` \| (\d+) \| (\d+) \| 0 \| 4 \|$", printed, re.MULTILINE)
    assert row
    tried, caught = map(int, row.groups())
    assert tried == caught + 4 == len(faults_of(_CODE))
    assert f"{100 * caught / tried:.1f} % are caught" in printed
    commit = subprocess.check_output(["git", "describe", "--always"], cwd=tree, text=True)  # noqa: S607
    assert printed.endswith(f"Seed 3, {commit.strip()}.\n")
    assert is_clean(tree)


def test_too_few_that_are_caught_fail_if_asked(tree: Path) -> None:
    assert sampled(tree, FILE, "--count=1", "--at-least=100.1")[0] == 1


def test_a_seed_draws_the_same_mutants_again() -> None:
    from mutants.__main__ import sample

    def drawn(seed: int) -> list[str]:
        return [mutant.diff for mutant in sample([FILE], 3, seed)]

    first = drawn(1)
    assert len(first) == 3
    assert drawn(1) == first
    assert drawn(2) != first


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_shows_what_was_tried_and_leaves_nothing(tree: Path, number: int) -> None:
    with started(tree, FILE) as run:
        assert run.stderr is not None
        for line in run.stderr:
            if line.startswith("1/"):
                run.send_signal(number)
                break
        printed, complained = run.communicate()
    assert run.returncode == 130, printed + complained
    assert "what follows is of the mutants that were tried" in complained
    assert is_clean(tree)


async def test_tests_that_take_too_long_are_stopped_with_what_they_started(tree: Path) -> None:
    (tree / TEST).write_text(
        "import subprocess\n"
        "from aiohttp_smg_routing.pins import sign\n"
        "def test_sign():\n"
        "    if sign(2) != 'positive':\n"
        "        subprocess.Popen(['sleep', '3600']).wait()\n"
    )
    code = (
        "import sys; from pathlib import Path; from mutants import trial; "
        "trial._SECONDS_MORE = 1; copy = trial.Copy(Path('.'), Path(sys.argv[1])); "
        f"copy.measure({TEST!r}); "
        f"print(copy.outcome({FILE!r}, 'def sign(number): return 0', ({TEST!r},)))"
    )
    async with running(tree, "-c", code, str(tree.parent / "tmp")) as process:
        printed, complained = await process.communicate()
    assert printed == b"timed out\n", complained.decode()
    await until(lambda: processes_in(tree.parent.resolve()) == {})


def test_tests_that_fail_without_a_mutant_end_it(tree: Path) -> None:
    (tree / TEST).write_text("def test_sign():\n    assert False\n")
    status, printed, complained = sampled(tree, FILE)
    assert status == 1
    assert complained.endswith(f"{TEST} fails without a mutant.\n")
    assert "caught" not in printed
    assert not list((tree.parent / "tmp").iterdir())


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["nowhere.py"], "nowhere.py is no file of the package, such as "),
        (["--count=0"], "--count is 0: there is nothing to try"),
        (["--seed=x"], "argument --seed: invalid int value: 'x'"),
    ],
)
def test_wrong_arguments_get_a_sentence(
    words: list[str],
    sentence: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from mutants.__main__ import main

    monkeypatch.setattr(sys, "argv", ["mutants", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    told = capsys.readouterr()
    assert (ended.value.code, told.out) == (2, "")
    assert sentence in told.err


@pytest.mark.parametrize(
    ("code", "mutants"),
    [
        ("x = a + 1", {"x = a - 1", "x = a + 2"}),
        ("x = a <= b and c", {"x = a < b and c", "x = a <= b or c"}),
        ("x = a is not b", {"x = a is b"}),
        ("x = not a", {"x = a"}),
        ("x = True", {"x = False"}),
        ("x = 'name'", {"x = 'XXnameXX'"}),
        ("if a: b()", {"if (a) and False: b()", "if (a) or True: b()"}),
        ("while a:\n    b()", {"while (a) and False:\n    b()", "while a:\n    pass"}),
        (
            "x = [b for b in c if d]",
            {f"x = [b for b in c if (d) {w}]" for w in ("and False", "or True")},
        ),
        ("x = a if b else c", {f"x = a if (b) {w} else c" for w in ("and False", "or True")}),
        ("f(a)", {"pass"}),
        ("a.b = c", {"pass"}),
        ("def f():\n    return a", {"def f():\n    pass"}),
        ("raise a", {"pass"}),
        ("x = f(a)", set()),  # never removed: nothing would run
        ("'''A docstring.'''", set()),
        ("x = 'a message of %s'", set()),
        ("x = ('a message ' 'of_two_lines')", set()),
        ("@dataclass(slots=True)\nclass A:\n    b: int", set()),
        ("x: Literal['a'] = b", set()),
        ("X = int | None", set()),
        ("if TYPE_CHECKING:\n    import a", set()),
        ("assert a > 1", set()),
    ],
)
def test_these_are_the_faults_that_a_line_can_have(code: str, mutants: set[str]) -> None:
    faults = faults_of(code)
    assert {faults[number].after for number in range(len(faults))} == mutants


def test_every_file_of_the_package_has_tests_that_exist() -> None:
    for file in files(ROOT):
        for test in selected(file):
            assert (ROOT / test).is_file(), f"{file}: {test}"


def test_every_row_is_that_of_a_file_or_folder() -> None:
    names = {file.removeprefix(f"{PACKAGE}/").removesuffix(".py") for file in files(ROOT)}
    folders = {name.partition("/")[0] for name in names if "/" in name}
    assert TESTS.keys() <= names | folders
