"""``aiohttp-smg-routing run`` with real, unchanged servers in separate processes."""

import asyncio
import json
import os
import signal
import sys
import venv
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientSession
from yarl import URL

from aiohttp_smg_routing.testing import Recorder, free_port
from harness.processes import ROOT, local_url, running

from ..commands import RUN, run_program
from ..turns import answered
from ..waiting import until_answered

pytestmark = pytest.mark.thorough

MODULE = RUN[1:]  # Python's arguments

# A user's server: one function makes and runs the app, and its turns call with httpx.
SERVER = """
import asyncio, json, os, sys, subprocess
import httpx
from aiohttp import ClientSession, web

ROUTING = {"gateway": os.environ["GATEWAY"]}
CHILD = "import os, sys; print('aiohttp_smg_routing' in sys.modules)"

async def turn(request):
    url = os.environ["GATEWAY"] + "/v1/chat/completions"
    body = await request.json()
    async with httpx.AsyncClient() as client:
        answer = await client.post(url, json=body)
    async with ClientSession() as session, session.post(url, json=body):
        return web.json_response(answer.json())

async def state(request):
    child = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True)
    return web.json_response({
        "environ": dict(os.environ),
        "path": sys.path,
        "argv": sys.argv,
        "child": child.stdout.strip(),
        "marks": getattr(sys, "marks", []),
    })

def main():
    app = web.Application()
    app.router.add_post("/sessions/{session_id}/turn", turn)
    app.router.add_get("/", state)
    EDIT
    web.run_app(app, host="127.0.0.1", port=int(os.environ["PORT"]))

if __name__ == "__main__":
    main()
"""


class UsersServer:
    """A server's process and its URL."""

    def __init__(self, process: asyncio.subprocess.Process, url: URL) -> None:
        self.process, self.url = process, url
        self.said = ""

    async def state(self) -> dict[str, Any]:
        async with ClientSession() as session, session.get(self.url) as response:
            return dict(await response.json())

    async def play(self, *sessions: str, turns: int = 2) -> None:
        async with ClientSession() as session:
            for session_id in sessions * turns:
                url = self.url / "sessions" / session_id / "turn"
                await answered(session, url, json={"user": session_id})

    async def stop(self) -> int:
        """Stop the process with SIGTERM; return its exit status."""
        self.process.send_signal(signal.SIGTERM)
        _, said = await self.process.communicate()
        self.said = said.decode()
        assert self.process.returncode is not None
        return self.process.returncode


@asynccontextmanager
async def users_server(
    folder: Path,
    gateway: Recorder,
    *argv: str,
    edit: str = "pass",
    env: Mapping[str, str] | None = None,
) -> AsyncIterator[UsersServer]:
    """Run the server in ``folder`` with ``argv`` until the block ends; yield once it answers."""
    (folder / "server.py").write_text(SERVER.replace("EDIT", edit))
    url = local_url(free_port())
    given = {"GATEWAY": str(gateway.url), "PORT": str(url.port), **(env or {})}
    async with running(folder, *argv, **given) as process:
        await until_answered(url, process)
        yield UsersServer(process, url)


def assert_pinned(gateway: Recorder, *sessions: str) -> None:
    """Assert that both calls of each turn carried the key of its session."""
    assert {call.json()["user"] for call in gateway.calls} == {*sessions}
    assert len(gateway.calls) == 4 * len(sessions)
    for call in gateway.calls:
        assert call.keys == [call.json()["user"].encode()]


BY_ENV = {"SMG_ROUTING_GATEWAY": "{gateway}"}
TOML = '[other]\na = 1\n[smg_routing]\ngateway = "{gateway}"\n'
WAYS: dict[str, tuple[list[str], dict[str, str]]] = {
    "the environment": (["--", sys.executable, "server.py"], BY_ENV),
    "a file": (["--config", "server.toml", "--", sys.executable, "server.py"], {}),
    "a name": (["--config", "server:ROUTING", "--", sys.executable, "server.py"], {}),
    "a module": (["--", "-m", "server"], BY_ENV),
    "without the dashes": ([sys.executable, "server.py"], BY_ENV),
}


@pytest.mark.parametrize(("argv", "env"), WAYS.values(), ids=WAYS)
async def test_a_server_that_nobody_edited_pins_its_sessions(
    tmp_path: Path, gateway: Recorder, argv: list[str], env: dict[str, str]
) -> None:
    (tmp_path / "server.toml").write_text(TOML.format(gateway=gateway.url))
    env = {name: it.format(gateway=gateway.url) for name, it in env.items()}
    async with users_server(tmp_path, gateway, *MODULE, *argv, env=env) as server:
        await server.play("s-1", "s-2")
        assert await server.stop() == 0, server.said
    assert_pinned(gateway, "s-1", "s-2")


async def test_the_server_finds_all_as_it_is_without_run(tmp_path: Path, gateway: Recorder) -> None:
    own = tmp_path / "own"
    own.mkdir()
    (own / "sitecustomize.py").write_text("import sys\nsys.marks = ['own sitecustomize']\n")
    env = {"SMG_ROUTING_GATEWAY": str(gateway.url), "PYTHONPATH": f"{ROOT}{os.pathsep}{own}"}
    states, statuses = [], []
    for command in ([], [*MODULE, "--", sys.executable]):
        async with users_server(tmp_path, gateway, *command, "server.py", env=env) as server:
            states.append(await server.state())
            statuses.append(await server.stop())
        states[-1]["environ"].pop("PORT")
    assert states[0]["marks"] == ["own sitecustomize"]
    assert states[0] == states[1]
    assert statuses[0] == statuses[1]


@pytest.mark.parametrize(("options", "has_it"), [([], "False"), (["--children"], "True")])
async def test_a_child_process_has_the_plugin_where_that_is_asked_for(
    tmp_path: Path, gateway: Recorder, options: list[str], has_it: str
) -> None:
    argv = (*MODULE, *options, "--", sys.executable, "server.py")
    env = {"SMG_ROUTING_GATEWAY": str(gateway.url)}
    async with users_server(tmp_path, gateway, *argv, env=env) as server:
        assert (await server.state())["child"] == has_it


OWN_SETUP = "from aiohttp_smg_routing import setup; "
OWN: dict[str, tuple[str, list[list[bytes]]]] = {
    "the app": (OWN_SETUP + "setup(app, {**ROUTING, 'instrument': True})", [[b"s-1"]] * 2),
    "a sub-app": (
        OWN_SETUP + "sub = web.Application(); setup(sub, ROUTING); app.add_subapp('/sub', sub)",
        [[]] * 2,
    ),
}


@pytest.mark.parametrize(("edit", "keys"), OWN.values(), ids=OWN)
async def test_an_app_that_calls_setup_itself_is_left_alone(
    tmp_path: Path, gateway: Recorder, edit: str, keys: list[list[bytes]]
) -> None:
    env = {"SMG_ROUTING_GATEWAY": str(gateway.url), "SMG_ROUTING_PREFIX": "twice/"}
    argv = (*MODULE, "--", sys.executable, "server.py")
    async with users_server(tmp_path, gateway, *argv, env=env, edit=edit) as server:
        await server.play("s-1", turns=1)
        await server.stop()
    assert [call.keys for call in gateway.calls] == keys


async def test_a_client_session_that_an_app_lacks_is_a_warning(
    tmp_path: Path, gateway: Recorder
) -> None:
    env = {
        "SMG_ROUTING_GATEWAY": str(gateway.url),
        "SMG_ROUTING_CLIENT_SESSION": "client",
    }
    argv = (*MODULE, "--", sys.executable, "server.py")
    async with users_server(tmp_path, gateway, *argv, env=env) as server:
        await server.play("s-1", turns=2)
        assert await server.stop() == 0
    assert_pinned(gateway, "s-1")
    assert "no ClientSession under 'client'" in server.said


async def test_a_frozen_app_is_served_without_the_plugin_and_named(
    tmp_path: Path, gateway: Recorder
) -> None:
    env = {"SMG_ROUTING_GATEWAY": str(gateway.url)}
    argv = (*MODULE, "--", sys.executable, "server.py")
    edit = "app.on_startup.freeze()"
    async with users_server(tmp_path, gateway, *argv, env=env, edit=edit) as server:
        await server.play("s-1", turns=1)
        await server.stop()
    assert [call.keys for call in gateway.calls] == [[], []]
    assert "is frozen before it is served" in server.said


# Exit statuses and output


def test_streams_and_exit_status_are_the_servers(tmp_path: Path) -> None:
    """A process that serves no app adds one line when it ends."""
    code = "import sys; print(sys.stdin.read()); print('err', file=sys.stderr); sys.exit(7)"
    done = run_program(tmp_path, *RUN, "--", sys.executable, "-c", code, input="in")
    assert (done.returncode, done.stdout) == (7, "in\n")
    error, said = done.stderr.splitlines()
    assert error == "err"
    assert "served no aiohttp app" in said


def test_a_signal_that_ends_the_server_ends_run(tmp_path: Path) -> None:
    code = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    done = run_program(tmp_path, *RUN, "--", sys.executable, "-c", code)
    assert done.returncode == -signal.SIGKILL


def test_a_process_whose_fork_may_serve_says_nothing(tmp_path: Path) -> None:
    code = "import os; os.fork() or os._exit(0); os.wait()"
    done = run_program(tmp_path, *RUN, "--", sys.executable, "-c", code)
    assert (done.returncode, done.stderr) == (0, "")


BAD: dict[str, tuple[list[str], dict[str, str], int, str]] = {
    "no options": (["--", "true"], {"SMG_ROUTING_GATEWAY": ""}, 64, "SMG_ROUTING_GATEWAY: is req"),
    "no table": (["--config", "none.toml", "--", "true"], {}, 64, "has no table [smg_routing]"),
    "no file": (["--config", "x.toml", "--", "true"], {}, 64, "x.toml can't be read: No such file"),
    "no TOML": (["--config", "bad.toml", "--", "true"], {}, 64, "bad.toml is not TOML"),
    "bad options": (["--config", "typo.toml", "--", "true"], {}, 64, "nearest one is 'prefix'"),
    "no command": (["--"], {}, 64, "there is no command"),
    "no such command": (["--", "no-such-thing"], {}, 127, "'no-such-thing' was not found"),
    **{
        " ".join(options): (
            ["--", "python3", *options, "-I", "x.py"],
            {},
            64,
            "-I keeps Python from reading PYTHONPATH",
        )
        for options in (["-u"], ["-X", "dev"], ["-W", "ignore"], ["-Xdev"])
    },
}
# Runs each command line, and prints what came of it.
IN_TURN = """
import contextlib, io, json, os, sys
from aiohttp_smg_routing.__main__ import main

for argv, env in json.load(sys.stdin):
    os.environ.update({"SMG_ROUTING_GATEWAY": "http://127.0.0.1:1", **env})
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(["run", *argv])
    print(json.dumps([status, out.getvalue(), err.getvalue()]))
"""


def test_bad_input_is_told_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "none.toml").write_text("[server]\nport = 1\n")
    (tmp_path / "bad.toml").write_text("[server\n")
    (tmp_path / "typo.toml").write_text('[smg_routing]\ngateway = "http://h:1"\nprefx = ""\n')
    given = json.dumps([(argv, env) for argv, env, _, _ in BAD.values()])
    done = run_program(tmp_path, sys.executable, "-c", IN_TURN, input=given)
    results = [json.loads(line) for line in done.stdout.splitlines()]
    for name, (status, out, err) in zip(BAD, results, strict=True):
        _, _, expected, sentence = BAD[name]
        assert (name, status, out) == (name, expected, "")
        assert err.startswith("aiohttp-smg-routing run: ")
        assert sentence in err
        assert err.count("\n") == 1


def test_a_name_that_is_not_there_stops_the_server_as_setup_would(tmp_path: Path) -> None:
    code = "from aiohttp import web; web.run_app(web.Application(), port=0)"
    argv = ("--config", "no_such:NAME", "--", sys.executable, "-c", code)
    done = run_program(tmp_path, *RUN, *argv)
    assert done.returncode == 1
    assert "ConfigError: config: no_such:NAME is not there" in done.stderr


def test_a_python_that_has_not_the_package_runs_the_server_and_says_so(tmp_path: Path) -> None:
    venv.create(tmp_path / "bare", with_pip=False, symlinks=True)
    python = str(tmp_path / "bare" / "bin" / "python")
    done = run_program(tmp_path, *RUN, "--", python, "-c", "print(1)")
    assert (done.returncode, done.stdout) == (0, "1\n")
    assert f"{python} can't import it" in done.stderr
    assert done.stderr.count("\n") == 1
