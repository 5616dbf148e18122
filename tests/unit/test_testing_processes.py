import asyncio
import socket
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from aiohttp_smg_routing.testing import child_process, free_port, free_ports, processes
from harness.processes import ROOT, finished


async def never() -> bool:
    return False


async def always() -> bool:
    return True


async def test_child_process_is_gone_when_the_block_ends() -> None:
    async with child_process(sys.executable, "-c", "input()", ready=always) as process:
        assert process.returncode is None or process.returncode == 1
    assert process.returncode is not None


async def test_child_process_is_gone_after_an_error() -> None:
    code = "import time; time.sleep(1000)"
    with pytest.raises(KeyError):
        async with child_process(sys.executable, "-c", code, ready=always) as process:
            raise KeyError
    assert process.returncode is not None


async def test_child_process_is_gone_when_its_start_is_cancelled() -> None:
    polled = asyncio.Event()

    async def polling() -> bool:
        polled.set()
        return False

    async def start() -> None:
        code = "import time; time.sleep(1000)"
        async with child_process(sys.executable, "-c", code, ready=polling):
            raise AssertionError("never ready")

    task = asyncio.create_task(start())
    await polled.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_child_that_exits_shows_what_it_printed() -> None:
    with pytest.raises(RuntimeError, match=r"did not start.*exit status 3(.|\n)*boom"):
        async with child_process(
            sys.executable, "-c", "print('boom'); raise SystemExit(3)", ready=never
        ):
            raise AssertionError("never ready")


async def test_child_that_never_gets_ready_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "START_SECONDS", 0)
    with pytest.raises(RuntimeError, match="did not start: it was not ready within 0 seconds"):
        async with child_process(
            sys.executable, "-c", "import time; time.sleep(1000)", ready=never
        ):
            raise AssertionError("never ready")


def test_no_two_free_ports_are_the_same() -> None:
    assert len(set(free_ports(500))) == 500
    # Nor those of calls one after the other: a program may still be about to take its port.
    assert len({free_port() for _ in range(processes._MAX_GIVEN)}) == processes._MAX_GIVEN


def test_nobody_who_asks_for_any_port_gets_a_free_port() -> None:
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(500)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        given = [probe.getsockname()[1] for probe in probes]
    ours = free_ports(500)
    assert max(ours) < min(given) or min(ours) > max(given)


def test_a_port_that_somebody_has_is_not_free(monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    free_ports(processes._MAX_GIVEN)  # after so many a port may be reused
    monkeypatch.setattr(processes, "OWN_PORTS", [port])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", port))
        with pytest.raises(OSError, match=r"only 0 of 1 ports of 127\.0\.0\.1 are free"):
            free_port()
    assert free_port() == port


def test_a_port_is_given_once_while_its_process_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    ports = free_ports(20)
    monkeypatch.setattr(processes, "OWN_PORTS", ports)
    with pytest.raises(OSError, match="only 0 of 1"):
        free_ports(1)
    asks = (
        "from aiohttp_smg_routing.testing import free_ports, processes\n"
        f"processes.OWN_PORTS = {ports}\n"
        "print(free_ports(1))"
    )
    said = finished(ROOT, sys.executable, "-c", asks).stderr
    assert "only 0 of 1 ports of 127.0.0.1 are free" in said


def test_a_given_port_is_for_whoever_listens_on_it() -> None:
    port = free_port()
    with socket.create_server(("127.0.0.1", port)) as server:
        assert server.getsockname()[1] == port


def test_where_the_system_gives_every_port_it_gives_the_free_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(processes, "OWN_PORTS", range(0))
    assert len(set(free_ports(5))) == 5


def test_where_the_system_does_not_say_what_it_gives_the_free_ones_are_low(tmp_path: Path) -> None:
    assert processes.own_ports(tmp_path / "none") == range(10_000, 32768)
