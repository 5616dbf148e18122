"""The command ``watch``: options, exit statuses, signals and output."""

import json
import os
import pty
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import Thread
from typing import Any

import pytest
from aiohttp import web
from yarl import URL

from aiohttp_smg_routing.__main__ import main
from aiohttp_smg_routing.testing import free_port
from aiohttp_smg_routing.watch import cli
from harness.processes import ROOT, local_url
from harness.servers import serve

from ..commands import broken_pipe
from ..verify_servers import in_background
from .metric_pages import IDLE, PINNED, W1, server_page, smg

FAST = ("--interval", "0.1")
ONCE = ("--once", *FAST)
MOVED = smg({"vacant": 5, "occupied_hit": 190, "occupied_miss": 10})


@contextmanager
def pages(*texts: str | web.Response, ended_by: signal.Signals | None = None) -> Iterator[URL]:
    """Serve each page once, then the last one again, which may also send this process a signal."""
    left = list(texts)

    async def metrics(request: web.Request) -> web.Response:
        if len(left) == 1 and ended_by:
            os.kill(os.getpid(), ended_by)
        page = left.pop(0) if len(left) > 1 else left[0]
        return web.Response(text=page) if isinstance(page, str) else page

    app = web.Application()
    app.router.add_get("/metrics", metrics)
    with in_background(serve(app)) as url:
        yield url


def words(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("after", "status", "sentence"),
    [
        (PINNED, 0, "Pinned: 100 of 100 later calls"),
        (MOVED, 1, "Not pinned: 190 of 200 later calls"),
        (IDLE, 2, "Could not tell: the gateway has routed no call."),
    ],
)
def test_once_has_the_exit_status_of_verify(
    after: str, status: int, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pages(IDLE, after) as url:
        assert main(["watch", str(url), *ONCE]) == status
    out = capsys.readouterr().out
    assert sentence in " ".join(out.split())
    assert "\x1b" not in out
    assert max(map(len, out.splitlines())) <= 80


def test_min_kept_is_the_share_that_must_stay(capsys: pytest.CaptureFixture[str]) -> None:
    with pages(IDLE, MOVED) as url:
        assert main(["watch", str(url), *ONCE, "--min-kept", "0.95"]) == 0


def test_once_as_json_is_one_document(capsys: pytest.CaptureFixture[str]) -> None:
    server = (
        server_page(),
        server_page({W1: 5, "http://v": 1}, {W1: 6}, first=5, kept=20),
    )
    with pages(IDLE, PINNED) as url, pages(*server) as theirs:
        assert main(["watch", f"{url}/metrics", f"{theirs}/metrics", *ONCE, "--json"]) == 0
    seen = json.loads(capsys.readouterr().out)
    assert (seen["verdict"], seen["exit_status"], seen["causes"]) == ("pinned", 0, [])
    assert seen["gateway"]["now"]["branches"]["manual"] == {"vacant": 5, "occupied_hit": 100}
    assert seen["gateway"]["now_seconds"] >= 0.1
    assert (seen["server"]["now"]["kept"], seen["server"]["now"]["kept_share"]) == (20, 1)
    assert seen["server"]["active_sessions"] == {W1: 5, "http://v": 1}
    assert seen["server"]["sessions_skew"] == {
        "worker": W1,
        "most": 5,
        "mean": 3,
        "ratio": 5 / 3,
    }


@pytest.mark.parametrize(
    ("page", "said"),
    [
        ("<html><body>Hello</body></html>", "the answer is not a page of metrics: invalid"),
        ("node_load1 0.5\n", "the answer is not an SMG gateway's metrics"),
        (server_page(kept=9), "the answer is not an SMG gateway's metrics"),
        (web.Response(status=500, text="sick"), "it answers 500 (sick)"),
        (web.Response(status=404), "it answers 404"),
        (web.Response(status=307, headers={"Location": "/"}), "it answers 307"),
        (PINNED + 'smg_worker_selection_total{policy="random"} NaN\n', "_total is nan"),
        (PINNED[: len(PINNED) // 2], "the answer is not a page of metrics: Invalid value"),
        ("# TYPE smg_x\n", "the answer is not a page of metrics."),
        (PINNED + "# \n" * 2**21, "the page has more than 4 MiB"),
        ("smg_x{" + 'a="1",' * 2**19 + "} 1\n", "the page has a line of more than 64 KiB"),
    ],
)
def test_page_that_is_none_is_said_to_be_so_with_the_remedy(
    page: str | web.Response, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pages(page) as url:
        # A second look would never come.
        assert main(["watch", str(url), "--once", "--interval", "1000"]) == 2
    out = words(capsys)
    assert f"could not be read at {url}/metrics, since " in out
    assert said in out
    assert "--prometheus-port" in out
    assert "Traceback" not in out


def test_help_shows_the_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["watch", "--help"]) == 0
    out = words(capsys)
    assert "[default: 1 on a terminal, else 5]" in out
    assert "[default: 0.99; 0<x<=1]" in out


@pytest.mark.parametrize("command", ["verify", "watch"])
def test_its_page_has_the_options_of_a_command(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, "--help"]) == 0
    options = capsys.readouterr().out.partition("Options:\n")[2].split()
    page = (ROOT / "docs" / f"{command}.md").read_text("utf-8")
    assert (
        page.partition("## Options\n")[2].partition("```text\n")[2].split()[: len(options)]
        == options
    )


def test_nobody_at_the_url(capsys: pytest.CaptureFixture[str]) -> None:
    with pages(IDLE, PINNED) as url:
        status = main(["watch", str(url), str(local_url(free_port())), *ONCE])
    out = words(capsys)
    assert status == 0  # the gateway's page is enough
    assert "The session server's metrics could not be read" in out
    assert 'metrics = "prometheus"' in out
    assert main(["watch", str(local_url(free_port())), *ONCE]) == 2
    assert "The gateway's counters could not be read" in words(capsys)


def test_counters_that_begin_anew_are_a_restart(capsys: pytest.CaptureFixture[str]) -> None:
    server = server_page(kept=50), server_page(kept=5)
    with pages(PINNED, smg({"vacant": 3, "occupied_hit": 20})) as url, pages(*server) as theirs:
        assert main(["watch", str(url), str(theirs), *ONCE, "--json"]) == 0
    seen = json.loads(capsys.readouterr().out)
    restarts = ["gateway_restarted", "server_restarted"]
    assert [cause["name"] for cause in seen["causes"]] == restarts
    assert "since the gateway started" in seen["sentence"]
    assert seen["gateway"]["now"] is None
    assert (seen["gateway"]["restarts"], seen["server"]["restarts"]) == (1, 1)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_ends_it_in_order(
    number: signal.Signals, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with pages(IDLE, PINNED, MOVED, ended_by=number) as url:
        assert main(["watch", str(url), *FAST]) == status
    printed = capsys.readouterr()
    assert "Could not tell" in printed.out
    assert printed.err == ""


def test_log_says_a_cause_when_it_comes_up_and_then_names_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    down = smg({"vacant": 5, "occupied_hit": 190}, health={"http://10.0.0.2:8000": 0})
    server = server_page(kept=50)
    with (
        pages(IDLE, PINNED, *[down] * 9, PINNED, PINNED, down, ended_by=signal.SIGTERM) as url,
        pages(server) as theirs,
    ):
        assert main(["watch", str(url), str(theirs), *FAST]) == 143
    out = words(capsys)
    assert 1 <= out.count("1 of 2 workers is not healthy: http://10.0.0.2:8000") <= 2
    assert out.count("As before: worker_down.") > 2


def test_json_is_a_line_for_each_interval(capsys: pytest.CaptureFixture[str]) -> None:
    with pages(IDLE, *[PINNED] * 8, ended_by=signal.SIGTERM) as url:
        assert main(["watch", str(url), *FAST, "--json"]) == 143
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(told) > 2
    assert told[-1]["verdict"] == "pinned"
    assert told[0]["gateway"]["kind"] == "smg"  # it waits until it can read a page


@pytest.mark.parametrize(("kind", "seconds"), [("xterm", 1), ("dumb", 5)])
def test_what_is_not_redrawn_is_printed_less_often(
    kind: str, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    intervals = []

    class Watching(cli.Watching):
        def __init__(self, gateway: URL, server: URL | None, interval: float, *rest: Any) -> None:
            intervals.append(interval)
            super().__init__(gateway, server, 0.1, *rest)

    monkeypatch.setattr(cli, "Watching", Watching)
    on_terminal(monkeypatch, kind)
    assert intervals == [seconds]


def test_it_ends_when_nobody_reads_what_it_prints(monkeypatch: pytest.MonkeyPatch) -> None:
    with pages(PINNED) as url, broken_pipe() as pipe:
        monkeypatch.setattr("sys.stdout", pipe)
        assert main(["watch", str(url), *FAST]) == 141


def on_terminal(monkeypatch: pytest.MonkeyPatch, kind: str, *options: str) -> bytes:
    """Run the command on such a terminal until Ctrl-C; return its output."""
    for name, value in (("TERM", kind), ("COLUMNS", "80"), ("LINES", "24")):
        monkeypatch.setenv(name, value)
    master, slave = pty.openpty()
    read = bytearray()

    def reader() -> None:
        with suppress(OSError):  # the other end is closed
            while chunk := os.read(master, 65536):
                read.extend(chunk)

    thread = Thread(target=reader)
    thread.start()
    with pages(IDLE, *[PINNED] * 9, ended_by=signal.SIGINT) as url, open(slave, "w") as screen:
        monkeypatch.setattr("sys.stdout", screen)
        assert main(["watch", str(url), *options]) == 130
    thread.join()
    os.close(master)
    return bytes(read)


def test_terminal_is_redrawn_and_keeps_the_last_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    read = on_terminal(monkeypatch, "xterm", *FAST)
    entered, left = read.find(b"\x1b[?1049h"), read.rfind(b"\x1b[?1049l")
    assert 0 <= entered < left
    assert read[entered:left].count(b"occupied_hit") > 2
    last = re.sub(rb"\x1b\[[\d;?]*[a-zA-Z]", b"", read[left:]).decode()
    assert "Pinned: 100 of 100 later calls" in last
    assert last.count("occupied_hit") == 1


def test_terminal_that_can_not_be_redrawn_gets_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    read = on_terminal(monkeypatch, "dumb", *FAST)
    assert b"\x1b" not in read
    assert read.count(b"occupied_hit") > 2


def test_fault_of_the_program_is_no_verdict(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fault(*args: object) -> None:
        raise KeyError("a fault")

    monkeypatch.setattr(cli, "read_gateway", fault)
    with pages(PINNED) as url:
        assert main(["watch", str(url)]) == 2
        assert main(["watch", str(url), "--once"]) == 2
    assert capsys.readouterr().err.count("KeyError: 'a fault'") == 2


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["127.0.0.1:29000"],
        ["http://u:sesame@h:29000"],
        ["http://h:29000", "--interval", "nan"],
        ["http://h:29000", "--interval", "0"],
        ["http://h:29000", "--min-kept", "0"],
        ["http://h:29000", "http://s:1", "http://t:1"],
    ],
)
def test_wrong_usage_is_64(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["watch", *argv]) == 64
    err = capsys.readouterr().err
    assert "Usage: aiohttp-smg-routing watch" in err
    assert "sesame" not in err
