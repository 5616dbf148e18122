"""``aiohttp-smg-routing run`` with launchers, child processes and a ``sitecustomize``."""

import sys
from pathlib import Path

import pytest

from harness.processes import ROOT

from ..commands import RUN, run_program

pytestmark = pytest.mark.thorough


def test_a_broken_pipe_ends_what_is_no_python_as_without_run(tmp_path: Path) -> None:
    argv = ("bash", "-c", "yes | head -n 1; echo ${PIPESTATUS[0]}")
    plain, run = run_program(tmp_path, *argv), run_program(tmp_path, *RUN, "--", *argv)
    assert (run.stdout, run.stderr) == (plain.stdout, plain.stderr)


@pytest.mark.parametrize("text", ["echo hi\n", "#!/no/such/program\n"])
def test_a_file_that_can_not_be_run_is_told_in_a_sentence(tmp_path: Path, text: str) -> None:
    (tmp_path / "server").write_text(text)
    (tmp_path / "server").chmod(0o755)
    run = run_program(tmp_path, *RUN, "--", "./server")
    assert (run.returncode, run.stdout) == (126, "")
    assert run.stderr.startswith("aiohttp-smg-routing run: './server' can't be run: ")
    assert run.stderr.count("\n") == 1


def test_options_of_pythons_that_do_not_shut_run_out_are_not_taken_for_one(tmp_path: Path) -> None:
    options = ("-X", "dev", "-W", "ignore", "-Xdev", "-Wdefault::ImportWarning")
    assert run_program(tmp_path, *RUN, "--", sys.executable, *options, "-c", "").returncode == 0


def test_what_a_launcher_adds_to_pythonpath_stays(tmp_path: Path) -> None:
    code = "import os, sys; print(os.environ['PYTHONPATH'], '/added' in sys.path)"
    line = f'PYTHONPATH=/added:$PYTHONPATH {sys.executable} -c "{code}"'
    run = run_program(tmp_path, *RUN, "--", "bash", "-c", line)
    assert run.stdout == f"/added:{ROOT} True\n"


def test_a_launcher_may_name_the_arguments_of_execve(tmp_path: Path) -> None:
    server = "import sys; print('aiohttp_smg_routing' in sys.modules)"
    code = (
        "import os, sys; "
        f"os.execve(path=sys.executable, argv=[sys.executable, '-c', {server!r}], env=os.environ)"
    )
    run = run_program(tmp_path, *RUN, "--", sys.executable, "-c", code)
    assert (run.returncode, run.stdout) == (0, "True\n")


def test_a_sitecustomize_that_fails_says_so_as_without_run(tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    (own / "sitecustomize.py").write_text("import no_such_module\n")
    # Only the server, not ``run``, gets the failing sitecustomize.
    line = f"PYTHONPATH=$PYTHONPATH:{own} {sys.executable} -c 'print(1)'"
    run = run_program(tmp_path, *RUN, "--", "bash", "-c", line)
    assert run.stdout == "1\n"
    assert "ModuleNotFoundError: No module named 'no_such_module'" in run.stderr


def test_a_package_that_can_not_be_imported_fails_nothing(tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    (own / "aiohttp.py").write_text("raise ValueError('odd')\n")
    (own / "sitecustomize.py").write_text("import sys; sys.mark = 'own sitecustomize'\n")
    code = "import sys; print(sys.mark)"
    line = f'PYTHONPATH=$PYTHONPATH:{own} {sys.executable} -c "{code}"'
    run = run_program(tmp_path, *RUN, "--", "bash", "-c", line)
    assert run.stdout == "own sitecustomize\n"
    assert "no call carries a key (odd)" in run.stderr
    assert run.stderr.count("\n") == 1


def test_a_child_that_serves_no_app_says_nothing(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys; subprocess.run([sys.executable, '-c', "
        "'import sys; print(\"aiohttp_smg_routing\" in sys.modules)'], check=True)"
    )
    run = run_program(tmp_path, *RUN, "--children", "--", sys.executable, "-c", code)
    assert run.stdout == "True\n"
    assert run.stderr.count("served no aiohttp app") == 1
    assert "those that it started have the plugin too" in run.stderr


def test_a_client_session_that_is_something_else_in_an_app_is_a_warning(tmp_path: Path) -> None:
    code = (
        "import asyncio; from aiohttp import web; app = web.Application(); app['client'] = 3; "
        "asyncio.run(web.AppRunner(app).setup()); print('served')"
    )
    env = {"SMG_ROUTING_CLIENT_SESSION": "client"}
    run = run_program(tmp_path, *RUN, "--", sys.executable, "-c", code, env=env)
    assert run.stdout == "served\n"
    assert "no ClientSession under 'client'" in run.stderr


IN_SERVER = (
    "import os, sys; "
    "print('aiohttp_smg_routing' in sys.modules, sorted(it for it in os.environ if 'SMG' in it), "
    "os.environ.get('PYTHONPATH'), flush=True)"
)
EXECS = (
    "os.execv(sys.executable, argv)",
    "os.execve(sys.executable, argv, {**os.environ})",
    "os.execlp(sys.executable, *argv)",
)


def test_a_launcher_that_becomes_the_server_hands_the_plugin_on(tmp_path: Path) -> None:
    """Each launcher becomes the next one, and the last becomes the server."""
    for number, call in enumerate(EXECS, 1):
        become = f"argv = [sys.executable, '{number + 1}.py']; {call}"
        (tmp_path / f"{number}.py").write_text(f"{IN_SERVER}; {become}")
    (tmp_path / f"{len(EXECS) + 1}.py").write_text(IN_SERVER)
    run = run_program(tmp_path, *RUN, "--", sys.executable, "1.py")
    each = f"True ['SMG_ROUTING_GATEWAY'] {ROOT}\n"
    assert run.stdout == each * (len(EXECS) + 1), run.stderr


def test_a_fork_that_becomes_another_program_has_no_plugin(tmp_path: Path) -> None:
    (tmp_path / "server.py").write_text(IN_SERVER)
    (tmp_path / "launcher.py").write_text(
        "import os, sys; os.fork() or os.execv(sys.executable, [sys.executable, 'server.py']); "
        "os.wait()"
    )
    run = run_program(tmp_path, *RUN, "--", sys.executable, "launcher.py")
    assert run.stdout == f"False ['SMG_ROUTING_GATEWAY'] {ROOT}\n", run.stderr
