from pathlib import Path

import pytest

from ..programs import program


@pytest.fixture(autouse=True)
def _nothing_in_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.programs.SCRIPTS", str(tmp_path / "bin"))


def test_without_a_program_ci_fails_and_other_machines_skip(tmp_path: Path) -> None:
    path = str(tmp_path)
    with pytest.raises(pytest.fail.Exception, match=r"run \.ci/debian a-package a-program"):
        program("a-program", "a-package", {"PATH": path, "CI": "true"})
    with pytest.raises(pytest.skip.Exception, match=r"run \.ci/debian a-package a-program"):
        program("a-program", "a-package", {"PATH": path})


def test_a_program_in_the_virtual_environment_is_found(tmp_path: Path) -> None:
    file = tmp_path / "bin" / "a-program"
    file.parent.mkdir()
    file.touch(mode=0o755)
    assert program("a-program", "a-package", {"PATH": str(tmp_path)}) == str(file)
