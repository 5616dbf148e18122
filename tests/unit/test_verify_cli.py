"""The command line: options, exit statuses, secrets, signals, and what is printed."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Coroutine, Iterator
from contextlib import nullcontext
from importlib.machinery import BuiltinImporter
from pathlib import Path
from typing import Any, TextIO

import pytest
from aiohttp import web
from yarl import URL

from aiohttp_smg_routing import __main__, __version__
from aiohttp_smg_routing.__main__ import main
from aiohttp_smg_routing.testing import free_port
from aiohttp_smg_routing.verify import cli, report, streams
from harness.processes import CLI, ROOT, finished, local_url
from harness.servers import serve

from ..commands import broken_pipe
from ..crosstalk import Handler
from ..fresh import python
from ..verify_servers import fake_gateway, in_background, proxy, stream

SECRET = "sesame-7f3a"
USAGE: dict[str, object] = {"prompt_tokens": 10, "prompt_tokens_details": {"cached_tokens": 9}}


def pinning(stop_after: int | None = None) -> Handler:
    """Return a handler that pins by the key, else rotates the workers; one call may SIGTERM us."""
    calls: list[str] = []

    async def chat(request: web.Request) -> web.StreamResponse:
        key = request.headers.get("X-SMG-Routing-Key")
        calls.append(key or "")
        if len(calls) == stop_after:
            os.kill(os.getpid(), signal.SIGTERM)
        worker = sum(map(ord, key)) if key else calls.count("")
        body = web.Response(headers={"x-smg-routed-worker-id": f"http://w{worker % 2}"})
        body.text = 'data: {"usage": %s}\n\ndata: [DONE]\n\n' % json.dumps(USAGE)  # noqa: UP031
        return body

    return chat


@pytest.fixture
def url() -> Iterator[URL]:
    with in_background(serve(fake_gateway(pinning()))) as url:
        yield url


FEW = ("--sessions", "8")  # enough for a verdict, where the test is not about the turns


def status_of(url: URL, *options: str) -> int:
    return main(["verify", str(url), "--metrics", f"{url.origin()}/metrics", *options])


def test_pinned_is_0(url: URL, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, picture = tmp_path / "seen.json", tmp_path / "pins.svg"
    status = status_of(url / "", "--json", str(file), "--plot", str(picture))
    out = capsys.readouterr().out
    assert status == 0, out
    seen = json.loads(file.read_text())
    assert (seen["verdict"], seen["exit_status"]) == ("pinned", 0)
    assert len(seen["turns"]) == seen["sent"] == 288
    for arm in ("keyed", "control"):
        mine = [turn for turn in seen["turns"] if turn["arm"] == arm]
        for outcome in ("first", "kept", "moved", "unknown", "failed"):
            count = sum(turn["outcome"] == outcome for turn in mine)
            assert seen["arms"][arm][outcome] == count
        assert seen["arms"][arm]["cached_share"] == 0.9
    assert seen["sentence"] in " ".join(out.split())
    assert "120 (100.0%)" in out
    assert picture.stat().st_size > 0


def test_metrics_are_looked_for_on_port_29000(
    url: URL, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "seen.json"
    assert main(["verify", str(url), "--json", str(file)]) == 0
    assert json.loads(file.read_text())["plan"]["metrics"] == "http://127.0.0.1:29000/metrics"


def test_not_pinned_is_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    drop = frozenset({"x-smg-routing-key"})
    with (
        in_background(serve(fake_gateway(pinning()))) as upstream,
        in_background(serve(proxy(upstream, drop=drop))) as url,
    ):
        assert status_of(url) == 1
    assert "Not pinned: " in capsys.readouterr().out


def test_could_not_tell_is_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(local_url(free_port()))]) == 2
    out = capsys.readouterr().out
    assert "Could not tell: no turn in a session that keeps its key was answered." in out
    assert "No connection to http://127.0.0.1:" in out


@pytest.mark.parametrize(
    ("status", "words"),
    [(401, "SMG_API_KEY"), (404, "Check the URL"), (503, "GET /workers"), (308, "no redirect")],
)
def test_gateway_that_answers_an_error_cannot_be_judged(
    status: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    async def chat(request: web.Request) -> web.Response:
        return web.Response(status=status, headers={"Location": "/"})

    with in_background(serve(fake_gateway(chat))) as url:
        assert status_of(url) == 2
    out = capsys.readouterr().out
    assert f"answers {status}" in out
    assert words in " ".join(out.split())


def test_gateway_that_does_not_answer_in_time_cannot_be_judged(
    capsys: pytest.CaptureFixture[str],
) -> None:
    async def chat(request: web.Request) -> web.Response:
        await asyncio.Event().wait()
        raise AssertionError("it never answers")

    with in_background(serve(fake_gateway(chat))) as url:
        assert status_of(url, "--concurrency", "2", "--timeout", "0.2") == 2
    out = " ".join(capsys.readouterr().out.split())
    assert "did not answer in time" in out
    assert "--timeout SECONDS" in out


def test_gateway_behind_a_path_is_reached(capsys: pytest.CaptureFixture[str]) -> None:
    app = web.Application()
    app.add_subapp("/smg", fake_gateway(pinning()))
    with in_background(serve(app)) as url:
        for base in (url / "smg", f"{url}/smg/"):
            assert main(["verify", str(base), "--metrics", f"{url}/smg/metrics", *FEW]) == 0


@pytest.mark.parametrize(
    ("path", "tried", "words"),
    [
        ("/v1", "/v1/v1/chat/completions", "Leave /v1 out of the URL"),
        ("/x", "/x/v1/chat/completions", "the path that a proxy in front wants"),
    ],
)
def test_404_names_the_url_that_was_tried(
    path: str, tried: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with in_background(serve(fake_gateway(pinning()))) as url:
        options = ["--model", "stub", "--concurrency", "1"]
        assert main(["verify", f"{url}{path}", *options]) == 2
        out = " ".join(capsys.readouterr().out.split())
        assert f"{url}{tried} answers 404" in out
        assert words in out
        assert main(["verify", str(url), "--through", f"{url}{path}", *options]) == 2
        assert f"{url}{path}/sessions/verify-" in " ".join(capsys.readouterr().out.split())


def test_unknown_model_lists_those_that_exist(capsys: pytest.CaptureFixture[str]) -> None:
    async def chat(request: web.Request) -> web.Response:
        raise web.HTTPNotFound(text='{"error": {"message": "The model [nope] is not there"}}')

    with in_background(serve(fake_gateway(chat))) as url:
        assert status_of(url, "--model", "[nope]") == 2
    out = " ".join(capsys.readouterr().out.split())
    assert "has no model '[nope]' (The model [nope] is not there)." in out
    assert "Name one that it has with --model: stub." in out


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["nothing"],
        ["verify"],
        ["verify", "10.0.0.1:30000"],
        ["verify", "ftp://10.0.0.1"],
        ["verify", "http://10.0.0.1:99999"],
        ["verify", "http://<host>:30000"],
        ["verify", "http://{host}:1"],
        ["verify", "http://gateway :30000"],
        ["verify", "http://%zz:1"],
        ["verify", "http://10.0.0.1", "--metrics", "http://<host>:29000/metrics"],
        ["verify", "http://10.0.0.1", "--through", "http://<host>:8080"],
        ["watch", "http://<host>:29000/metrics", "--once", "--interval", "0.1"],
        ["verify", "http://10.0.0.1/?a=b"],
        ["verify", f"http://user:{SECRET}@10.0.0.1"],
        ["verify", f"http://user:{SECRET}@10.0.0.1:99999"],
        ["verify", f"http://user:{SECRET}@"],
        ["verify", f"http://user:{SECRET}@[bad"],
        ["verify", f"http://10.0.0.1?api_key={SECRET}"],
        ["verify", "http://10.0.0.1", f"http://user:{SECRET}@10.0.0.2"],
        [f"http://user:{SECRET}@10.0.0.1"],
        ["verify", "http://10.0.0.1", f"--sessions=http://user:{SECRET}@10.0.0.1"],
        ["verify", "http://10.0.0.1", "--through", f"http://user:{SECRET}@10.0.0.1:99999"],
        ["verify", "http://10.0.0.1", "--through", f"http://user:{SECRET}@[bad"],
        ["verify", "http://10.0.0.1", "--metrics", f"user:{SECRET}@10.0.0.1:29000"],
        ["verify", "http://10.0.0.1", "--timeout", "nan"],
        ["verify", "http://10.0.0.1", "--timeout", "inf"],
        ["verify", "http://10.0.0.1", "--time-limit", "nan"],
        ["verify", "http://10.0.0.1", "--time-limit", "inf"],
        ["verify", "http://10.0.0.1", "--min-kept", "nan"],
        ["verify", "http://10.0.0.1", "--json", ""],
        ["verify", "http://10.0.0.1", "--plot", ""],
        ["verify", "http://10.0.0.1", "--nothing"],
        ["verify", "http://10.0.0.1", "--api-key", SECRET],
        ["verify", "http://10.0.0.1", "--turns", "1"],
        ["verify", "http://10.0.0.1", "--sessions", "0"],
        ["verify", "http://10.0.0.1", "--concurrency", "0"],
        ["verify", "http://10.0.0.1", "--max-tokens", "0"],
        ["verify", "http://10.0.0.1", "--timeout", "0"],
        ["verify", "http://10.0.0.1", "--time-limit", "-1"],
        ["verify", "http://10.0.0.1", "--min-kept", "0"],
        ["verify", "http://10.0.0.1", "--min-kept", "99"],
        ["verify", "http://10.0.0.1", "--metrics", "10.0.0.1:29000"],
        ["verify", "http://10.0.0.1", "--through", "10.0.0.1"],
        ["verify", "http://10.0.0.1", "--session-id", "all-the-same"],
        ["verify", "http://10.0.0.1", "--model", "m\udcff"],
        ["verify", "http://10.0.0.1", "--through", "http://10.0.0.2?a=b"],
        ["verify", "http://10.0.0.1", "--through", f"http://h?k={SECRET}&s={{session_id}}"],
        ["verify", "http://10.0.0.1", "--session-header", "X-Session-Id"],
        ["verify", "http://10.0.0.1", "--session-json", "user"],
        ["verify", "http://10.0.0.1", "--create", "http://10.0.0.2/sessions"],
        ["verify", "http://10.0.0.1", "--through", "http://h", "--session-json", "a..b"],
        ["verify", "http://10.0.0.1", "--through", "http://h", "--session-header", "a b"],
        ["verify", "http://10.0.0.1", "--header", "X:"],
        ["verify", "http://10.0.0.1", "--session-id", "{n}\r\nX-Evil: 1"],
        ["verify", "http://10.0.0.1", "--plot", "pins.jpg"],
        ["verify", "http://10.0.0.1", "--plot", "no/such/folder/pins.svg"],
        ["verify", "http://10.0.0.1", "--json", "no/such/folder/seen.json"],
        ["verify", "http://10.0.0.1", "--api-key-file", "no/such/file"],
    ],
)
def test_wrong_usage_is_64(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 64
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Usage: aiohttp-smg-routing" in captured.err
    assert SECRET not in captured.err


@pytest.mark.parametrize(
    "host",
    [
        "10.0.0.1",
        "[fe80::1]",
        "[fe80::1%25eth0]",
        "[::ffff:10.0.0.1]",
        "a_b",
        "a-b.c.",
        "bücher.de",
    ],
)
def test_name_or_address_is_a_host(host: str) -> None:
    given = f"https://{host}:1/smg"
    assert cli.verify.make_context("verify", [given]).params["gateway"] == URL(given)


def test_metrics_are_looked_for_on_an_address_of_ipv6_too(tmp_path: Path) -> None:
    file = tmp_path / "seen.json"
    assert main(["verify", f"https://[::1]:{free_port()}/smg", "--json", str(file)]) == 2
    assert json.loads(file.read_text())["plan"]["metrics"] == "http://[::1]:29000/metrics"


def test_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"aiohttp-smg-routing {__version__}\n"


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_is_0(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([flag]) == 0
    assert re.findall(r"(?m)^  (\w+)  ", capsys.readouterr().out) == ["run", "verify", "watch"]
    assert main(["verify", flag]) == 0
    out = capsys.readouterr().out
    assert "SMG_API_KEY" in out
    assert "[default: 24; x>=1]" in out
    assert max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize(
    ("through", "path"),
    [
        ("", "/sessions/verify"),
        ("/", "/sessions/verify"),
        ("/v2/sessions", "/v2/sessions/verify"),
        ("/a/{session_id}/b", "/a/verify"),
        ("/a/{session_id}/v1", "/a/verify"),
        ("/a/{session_id}/v1/chat/completions/", "/a/verify"),
    ],
)
def test_url_of_the_session_server_is_completed(url: URL, through: str, path: str) -> None:
    paths = []

    async def chat(request: web.Request) -> web.StreamResponse:
        paths.append(request.path)
        return await stream(request, "ok", USAGE)

    app = web.Application()
    app.router.add_post("/{path:.*}", chat)
    with in_background(serve(app)) as base:
        status_of(url, "--through", f"{str(base).rstrip('/')}{through}", *FEW)
    assert len(paths) == 96
    assert all(seen.startswith(path) and seen.count("verify") == 1 for seen in paths)
    assert all(seen.endswith("/v1/chat/completions") for seen in paths)
    assert not any("/v1/v1/" in seen or "completions/v1" in seen for seen in paths)


@pytest.mark.parametrize("source", ["environment", "file"])
def test_api_key_is_sent_and_never_shown(
    source: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file, seen = tmp_path / "key", tmp_path / "seen.json"
    options = ["--json", str(seen), *FEW]
    if source == "file":
        file.write_text(f"\n{SECRET}\n")
        monkeypatch.setenv("SMG_API_KEY", "another")
        options += ["--api-key-file", str(file)]
    else:
        monkeypatch.setenv("SMG_API_KEY", SECRET)
    with (
        in_background(serve(fake_gateway(pinning()))) as upstream,
        in_background(serve(proxy(upstream, api_key=SECRET))) as url,
        in_background(serve(proxy(upstream, api_key="other"))) as closed,
    ):
        assert status_of(url, *options) == 0
        said = seen.read_text()
        assert status_of(closed, *options) == 2
    captured = capsys.readouterr()
    assert "wrong API key: Bearer ***" in captured.out
    assert SECRET not in captured.out + captured.err + said + seen.read_text()


@pytest.mark.parametrize("content", [b"", b"  \n", b"two\nlines", b"k\xc3\xa9y", b"\xff\xfe"])
def test_api_key_that_can_not_be_one_is_not_shown(
    content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "key"
    file.write_bytes(content)
    assert main(["verify", "http://10.0.0.1", "--api-key-file", str(file)]) == 64
    err = capsys.readouterr().err
    assert "lines" not in err
    assert "k\u00e9y" not in err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_prints_what_was_seen_and_leaves_nothing_running(
    number: signal.Signals, tmp_path: Path
) -> None:
    count = 0
    running: list[subprocess.Popen[str]] = []

    async def chat(request: web.Request) -> web.StreamResponse:
        nonlocal count
        count += 1
        if count > 20:
            running[0].send_signal(number)
            await asyncio.Event().wait()
        return await stream(request, "ok", USAGE)

    file = tmp_path / "seen.json"
    with in_background(serve(fake_gateway(chat))) as url:
        argv = [*CLI, "verify", str(url), "--json", str(file)]
        with subprocess.Popen(  # noqa: S603
            argv, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as process:
            running.append(process)
            out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    seen = json.loads(file.read_text())
    turns = len(seen["turns"])
    assert 0 < turns <= 20
    assert f"Stopped by {number.name} after {turns} turns: no verdict." in out
    assert "turns answered" in out
    assert err == ""
    assert (seen["verdict"], seen["exit_status"]) == ("could not tell", 128 + number)


def test_signal_in_this_process(capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGTERM)
    ignored = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as nohup does
    try:
        with in_background(serve(fake_gateway(pinning(stop_after=10)))) as url:
            assert status_of(url) == 128 + signal.SIGTERM
    finally:
        signal.signal(signal.SIGINT, ignored)
    assert signal.getsignal(signal.SIGTERM) == before
    assert "Stopped by SIGTERM after" in capsys.readouterr().out


def test_signal_that_is_not_the_first_or_comes_during_the_report_changes_nothing(
    url: URL, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = report.show_seen

    def impatient(*args: Any) -> None:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        shown(*args)

    monkeypatch.setattr(cli, "show_seen", impatient)
    assert status_of(url, *FEW) == 0
    assert "Pinned: " in capsys.readouterr().out


def test_signal_before_the_first_call_stops_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(coroutine: Coroutine[None, None, None]) -> None:
        signal.raise_signal(signal.SIGINT)
        run(coroutine)

    run = asyncio.run
    monkeypatch.setattr("asyncio.run", interrupted)
    assert main(["verify", "http://10.0.0.1"]) == 130
    assert capsys.readouterr().out == "\nStopped by SIGINT after 0 turns: no verdict.\n"


def test_ctrl_c_before_the_run_is_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "terminal", interrupted)
    assert main(["verify", "http://10.0.0.1"]) == 130


def test_fault_of_the_program_is_not_taken_for_not_pinned(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fault(*args: object) -> None:
        raise KeyError("a fault")

    monkeypatch.setattr(cli, "terminal", fault)
    assert main(["verify", "http://10.0.0.1"]) == 2
    assert "KeyError: 'a fault'" in capsys.readouterr().err


def test_file_that_can_not_be_written_does_not_change_the_verdict(
    url: URL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*args: object) -> None:
        raise OSError("No space left on device")

    file, picture = tmp_path / "seen.json", tmp_path / "pins.svg"
    monkeypatch.setattr(cli, "write_json", full)
    assert status_of(url, "--json", str(file), "--plot", str(picture), *FEW) == 0
    assert f"Not written: {file}: No space left on device" in capsys.readouterr().err
    assert picture.stat().st_size > 0


def full_disk() -> TextIO:
    return open("/dev/full", "w", encoding="utf-8")


@pytest.mark.parametrize("name", ["stdout", "stderr"])
@pytest.mark.parametrize("make", [broken_pipe, full_disk, lambda: None])
def test_output_that_nobody_can_read_changes_nothing(
    url: URL,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    make: Callable[[], TextIO | None],
) -> None:
    if make is full_disk and not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    file = tmp_path / "seen.json"
    with nullcontext(make()) as stream:
        with monkeypatch.context() as patch:
            patch.setattr(sys, name, stream)
            assert main(["verify", "--nothing"]) == 64
            assert status_of(url, "--json", str(file), *FEW) == 0
        if stream:
            stream.close()  # Python does so at exit; no error remains
    assert json.loads(file.read_text())["exit_status"] == 0


def test_long_output_into_a_broken_pipe_is_no_error() -> None:
    stream = broken_pipe()
    out = streams.lasting(stream)
    assert out.write(100_000 * "x") == 100_000
    out.flush()
    stream.close()


def test_reader_that_goes_away_does_not_change_the_exit_status(url: URL, tmp_path: Path) -> None:
    file = tmp_path / "seen.json"
    argv = [*CLI, "verify", str(url), "--json", str(file), *FEW]
    with subprocess.Popen(  # noqa: S603
        argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0
    assert file.exists()


def test_ctrl_c_during_the_imports_is_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(name: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(__main__, "find_spec", interrupted)
    assert main(["verify", "http://10.0.0.1"]) == 130


def test_without_the_extra_the_command_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("click", "matplotlib", "prometheus_client", "rich")
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(sys, "meta_path", [BuiltinImporter])  # finds no installed package
    monkeypatch.setattr(sys, "argv", ["aiohttp-smg-routing", "verify", "http://10.0.0.1"])
    assert main() == 64
    assert capsys.readouterr().err == (
        f"Commands other than run need {', '.join(names)}: "
        "pip install 'aiohttp_smg_routing[verify]'\n"
    )
    assert main(["--version"]) == 0  # needs no other package


def test_python_dash_m_is_the_command() -> None:
    assert "GATEWAY_URL" in finished(ROOT, *CLI, "verify", "--help", check=True).stdout


def test_core_does_not_import_the_command() -> None:
    code = (
        "import sys, aiohttp_smg_routing, aiohttp_smg_routing.testing;"
        "import aiohttp_smg_routing.__main__;"
        "print([name for name in sys.modules if 'verify' in name"
        " or name.split('.')[0] in ('click', 'matplotlib', 'rich')])"
    )
    assert python(code) == "[]\n"
