"""The parts of ``aiohttp-smg-routing run``; tests/wire/test_run.py runs whole servers."""

import atexit
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from aiohttp import ClientSession, web
from pytest_aiohttp.plugin import AiohttpClient

from aiohttp_smg_routing import ROUTING, ConfigError, RoutingConfig, plugin, setup
from aiohttp_smg_routing.__main__ import main
from aiohttp_smg_routing.run import config, install
from aiohttp_smg_routing.testing import Recorder

from ..fresh import python

URL = "http://10.0.0.1:30000"
MAPPING: dict[str, object] = {"gateway": URL, "prefix": "job/"}
CONFIG = RoutingConfig(URL)
HERE = __name__


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    """Restore the signals: the command resets them when it becomes the server."""
    before = {it: signal.getsignal(it) for it in (signal.SIGPIPE, signal.SIGXFSZ)}
    yield
    for it, handler in before.items():
        signal.signal(it, handler)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Undo what ``install()`` does to the process, which does not say how it ended."""
    monkeypatch.setattr(atexit, "register", lambda *_: None)
    yield
    del web.AppRunner.setup


def write(folder: Path, text: str) -> str:
    file = folder / "server.toml"
    file.write_text(text)
    return str(file)


# Finding the options


@pytest.mark.parametrize(("line", "instrument"), [("", True), ("instrument = false", False)])
def test_a_file_has_the_options_and_instrument_is_true_unless_it_says(
    tmp_path: Path, line: str, instrument: bool
) -> None:
    found = config.load(write(tmp_path, f'[smg_routing]\ngateway = "{URL}"\n{line}\n'))
    assert (found.gateway, found.instrument) == (CONFIG.gateway, instrument)


@pytest.mark.parametrize(("value", "instrument"), [(None, True), ("no", False)])
def test_the_environment_has_the_options_where_none_are_named(
    monkeypatch: pytest.MonkeyPatch, value: str | None, instrument: bool
) -> None:
    monkeypatch.setenv("SMG_ROUTING_GATEWAY", URL)
    if value:
        monkeypatch.setenv("SMG_ROUTING_INSTRUMENT", value)
    assert config.load("").instrument is instrument


def test_a_mapping_of_the_servers_is_read_and_a_config_taken_as_it_is() -> None:
    assert config.load(f"{HERE}:MAPPING").prefix == "job/"
    assert config.load(f"{HERE}:MAPPING").instrument
    assert config.load(f"{HERE}:CONFIG") is CONFIG


def test_a_name_of_the_program_that_runs_is_not_imported_a_second_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    program = ModuleType("__main__")
    program.__file__ = "/srv/server.py"
    program.CONFIG = CONFIG  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "__main__", program)
    assert config.load("server:CONFIG") is CONFIG
    assert "server" not in sys.modules


def test_a_module_of_a_package_that_runs_is_not_imported_a_second_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An example is ``run --config servers.agent:CONFIG -- -m servers.agent``."""
    (tmp_path / "servers").mkdir()
    for name in ("agent", "other"):
        (tmp_path / "servers" / f"{name}.py").write_text("CONFIG = {'gateway': 'http://h'}\n")
    monkeypatch.syspath_prepend(tmp_path)
    program = ModuleType("__main__")
    program.__file__ = str(tmp_path / "servers" / "agent.py")
    program.CONFIG = CONFIG  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "__main__", program)
    assert config.load("servers.agent:CONFIG") is CONFIG
    assert "servers.agent" not in sys.modules
    assert config.load("servers.other:CONFIG") is not CONFIG
    with pytest.raises(ConfigError, match=r"no\.such:CONFIG is not there"):
        config.load("no.such:CONFIG")
    monkeypatch.delitem(sys.modules, "servers.other")
    monkeypatch.delitem(sys.modules, "servers")


def test_a_file_on_a_python_that_reads_no_toml_names_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tomllib", None)
    monkeypatch.setitem(sys.modules, "tomli", None)
    with pytest.raises(ConfigError, match="pip install tomli"):
        config.load(write(tmp_path, ""))


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("no.such:NAME", "no.such:NAME is not there"),
        (f"{HERE}:NOTHING", "NOTHING is not there"),
        ("nothing.toml", r"nothing.toml can't be read: No such file"),
    ],
)
def test_a_source_that_is_not_there_is_named(source: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=f"^config: .*{reason}"):
        config.load(source)


@pytest.mark.parametrize(
    ("text", "reason"), [("[server]\n", r"no table \[smg_routing\]"), ("[", "is not TOML")]
)
def test_a_file_without_the_options_is_named(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        config.load(write(tmp_path, text))


# The apps of the process


def calling(gateway: Recorder) -> web.Application:
    async def client(app: web.Application) -> Any:
        async with ClientSession() as app["client"]:
            yield

    async def handler(request: web.Request) -> web.Response:
        async with request.app["client"].post(gateway.chat):
            return web.Response()

    app = web.Application()
    app.router.add_post("/{session_id}", handler)
    app.cleanup_ctx.append(client)
    return app


@pytest.mark.filterwarnings("ignore:It is recommended to use web.AppKey")
@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("instrument", ["true", "false"])
async def test_an_app_is_set_up_when_it_is_served_with_the_sessions_that_it_has(
    gateway: Recorder,
    aiohttp_client: AiohttpClient,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    instrument: str,
) -> None:
    monkeypatch.setenv("SMG_ROUTING_GATEWAY", str(gateway.url))
    monkeypatch.setenv("SMG_ROUTING_CLIENT_SESSION", "client,other")
    monkeypatch.setenv("SMG_ROUTING_INSTRUMENT", instrument)
    install()
    app = calling(gateway)
    client = await aiohttp_client(app)
    async with client.post("/s-1") as response:
        assert response.status == 200
    assert gateway.last.keys == [b"s-1"]
    [line] = [it.getMessage() for it in caplog.records if "no ClientSession under" in it.message]
    assert "'other'" in line
    assert ("set instrument = true" in line) is (instrument == "false")


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("where", ["the app", "below it"])
async def test_an_app_whose_tree_calls_setup_is_left_alone(
    gateway: Recorder,
    aiohttp_client: AiohttpClient,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
) -> None:
    monkeypatch.setenv("SMG_ROUTING_GATEWAY", URL)
    install()
    app, sub = web.Application(), web.Application()
    own = setup(app if where == "the app" else sub, {"gateway": str(gateway.url)})
    app.add_subapp("/sub", sub)
    await aiohttp_client(app)
    assert app.get(ROUTING) is (own if where == "the app" else None)


@pytest.mark.usefixtures("installed")
async def test_a_frozen_app_is_served_as_it_is_and_named(
    aiohttp_client: AiohttpClient,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("SMG_ROUTING_GATEWAY", URL)
    install()
    app = web.Application()
    app.on_startup.freeze()
    await aiohttp_client(app)
    assert ROUTING not in app
    assert "frozen before it is served" in caplog.text


@pytest.mark.usefixtures("installed")
async def test_the_start_up_line_is_printed_where_logging_would_drop_it(
    aiohttp_client: AiohttpClient,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("SMG_ROUTING_GATEWAY", URL)
    install()
    for level, count in ((logging.WARNING, 1), (logging.INFO, 0)):
        caplog.set_level(level, "aiohttp_smg_routing")
        await aiohttp_client(web.Application())
        said = capsys.readouterr().err
        assert said.count("aiohttp-smg-routing run: POST /v1/chat/completions to") == count
    assert plugin.logger.handlers == []
    assert plugin.logger.level == logging.NOTSET


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("", "if a process that this one starts serves it, add --children"),
        ("has_children=True", "this process served no aiohttp app itself"),
        ("is_child=True", ""),
    ],
)
def test_a_process_that_ends_without_an_app_says_so_unless_it_is_one_of_many(
    given: str, said: str
) -> None:
    code = f"from aiohttp_smg_routing.run import install; install({given})"
    printed = python(f"import sys; sys.stderr = sys.stdout; {code}")
    assert said in printed
    assert len(printed.splitlines()) == bool(said)


@pytest.mark.usefixtures("installed")
async def test_a_process_says_at_its_end_that_it_served_no_app_unless_it_did_or_is_a_child(
    aiohttp_client: AiohttpClient,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("SMG_ROUTING_GATEWAY", URL)
    at_end: list[Callable[[], object]] = []
    monkeypatch.setattr(atexit, "register", lambda *given: at_end.append(partial(*given)))
    install(is_child=True)
    assert at_end == []
    install()
    at_end[0]()
    assert caplog.text.count("served no aiohttp app") == 1
    await aiohttp_client(web.Application())
    at_end[0]()
    assert caplog.text.count("served no aiohttp app") == 1


# The command


def test_an_option_that_it_does_not_know_is_64(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--bad", "--", "true"]) == 64
    assert "unrecognized arguments: --bad" in capsys.readouterr().err
    assert main(["run", "--help"]) == 0


class BecameError(Exception):
    """Raised in place of ``os.execve()``."""


def begun(monkeypatch: pytest.MonkeyPatch, *argv: str) -> tuple[list[str], dict[str, str]]:
    """Return the arguments and the environment that the process would run the server with."""

    def execve(program: str, command: list[str], environ: dict[str, str]) -> None:
        raise BecameError(command, environ)

    monkeypatch.setattr(os, "execve", execve)
    with pytest.raises(BecameError) as caught:
        main(["run", *argv])
    command, environ = caught.value.args
    return command, environ


@pytest.mark.parametrize("before", [None, "lib"])
def test_the_command_starts_with_what_its_python_needs(
    monkeypatch: pytest.MonkeyPatch, before: str | None
) -> None:
    monkeypatch.setenv("SMG_ROUTING_GATEWAY", URL)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    if before:
        monkeypatch.setenv("PYTHONPATH", before)
    command, environ = begun(monkeypatch, "--children", "--", "-m", "server", "--port", "1")
    assert command == [sys.executable, "-m", "server", "--port", "1"]
    first, *others = environ["PYTHONPATH"].split(os.pathsep)
    assert (Path(first) / "sitecustomize.py").is_file()
    assert others == ([before] if before else [])
    told = json.loads(environ["AIOHTTP_SMG_ROUTING_RUN"])
    assert told == {
        "config": "",
        "children": True,
        "is_child": False,
        "has_pythonpath": before is not None,
    }


def test_a_file_is_passed_on_by_its_whole_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, f'[smg_routing]\ngateway = "{URL}"\n')
    monkeypatch.chdir(tmp_path)
    _, environ = begun(monkeypatch, "--config", "server.toml", "--", sys.executable)
    told = json.loads(environ["AIOHTTP_SMG_ROUTING_RUN"])
    assert told["config"] == str(tmp_path / "server.toml")


def test_a_name_is_left_for_the_server_to_find(monkeypatch: pytest.MonkeyPatch) -> None:
    _, environ = begun(monkeypatch, "--config", "no.such:NAME", sys.executable, "-u", "x.py", "-I")
    assert json.loads(environ["AIOHTTP_SMG_ROUTING_RUN"])["config"] == "no.such:NAME"


@pytest.mark.parametrize("word", ["-mSphinx", "-cimport I", "--"])
def test_letters_behind_a_module_or_code_are_no_options(
    monkeypatch: pytest.MonkeyPatch, word: str
) -> None:
    command, _ = begun(monkeypatch, "--config", "a:B", sys.executable, word, "-I")
    assert command[1:] == [word, "-I"]


def test_a_program_that_is_no_python_may_start_one(monkeypatch: pytest.MonkeyPatch) -> None:
    command, _ = begun(monkeypatch, "--config", "a:B", "--", "sh", "-c", "python -I x.py")
    assert command == ["sh", "-c", "python -I x.py"]


BAD: dict[str, tuple[list[str], int, str]] = {
    "no options": (["--", "true"], 64, "SMG_ROUTING_GATEWAY: is required"),
    "no command": (["--config", "a:B", "--"], 64, "there is no command"),
    "no such command": (["--config", "a:B", "--", "no-such-thing"], 127, "was not found"),
    "isolated": (["--config", "a:B", "--", sys.executable, "-uI", "x"], 64, "-uI keeps Python"),
    "behind": (["--config", "a:B", sys.executable, "-X", "dev", "-E"], 64, "-E keeps Python"),
}


@pytest.mark.parametrize(("argv", "status", "reason"), BAD.values(), ids=BAD)
def test_bad_input_is_a_sentence_and_a_status(
    capsys: pytest.CaptureFixture[str], argv: list[str], status: int, reason: str
) -> None:
    assert main(["run", *argv]) == status
    assert reason in capsys.readouterr().err


def test_a_file_that_the_system_can_not_run_is_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "server"
    file.write_bytes(b"\0not a program")
    file.chmod(0o755)
    assert main(["run", "--config", "a:B", "--", str(file)]) == 126
    assert "can't be run: Exec format error" in capsys.readouterr().err
