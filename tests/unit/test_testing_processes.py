import asyncio
import sys

import pytest

from aiohttp_smg_routing.testing import child_process, free_ports, processes


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
    monkeypatch.setattr(processes, "_START_SECONDS", 0)
    with pytest.raises(RuntimeError, match="did not start: TimeoutError"):
        async with child_process(
            sys.executable, "-c", "import time; time.sleep(1000)", ready=never
        ):
            raise AssertionError("never ready")


def test_no_two_free_ports_are_the_same() -> None:
    assert len(set(free_ports(500))) == 500
