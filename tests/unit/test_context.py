import asyncio
import contextvars
from collections.abc import AsyncIterator
from uuid import UUID

import pytest

from aiohttp_smg_routing import current_session_id, routing_session


def test_outside_there_is_no_session() -> None:
    assert current_session_id() is None


async def test_block_sets_the_session_and_takes_it_back() -> None:
    with routing_session("s-1"):
        assert current_session_id() == "s-1"
        async with routing_session("s-2"):
            assert current_session_id() == "s-2"
        assert current_session_id() == "s-1"
    assert current_session_id() is None


async def test_block_takes_it_back_after_an_error() -> None:
    with pytest.raises(KeyError):
        async with routing_session("s-1"):
            raise KeyError
    assert current_session_id() is None


def test_block_takes_ints_uuids_and_none() -> None:
    with routing_session(7):
        assert current_session_id() == "7"
        with routing_session(UUID(int=1)):
            assert current_session_id() == str(UUID(int=1))
        for nothing in (None, "", " "):
            with routing_session(nothing):
                assert current_session_id() is None


def test_block_refuses_what_is_no_session_id() -> None:
    with pytest.raises(TypeError, match="not a bytes"):
        routing_session(b"s-1")  # type: ignore[arg-type]


def test_block_is_for_one_use() -> None:
    block = routing_session("s-1")
    with block:
        with pytest.raises(RuntimeError, match="make a new one for each block"), block:
            pass
        assert current_session_id() == "s-1"
    assert current_session_id() is None
    with pytest.raises(RuntimeError, match="make a new one for each block"), block:
        pass


async def test_concurrent_blocks_stay_apart() -> None:
    barrier = asyncio.Event()
    entered = 0

    async def job(number: int) -> bool:
        nonlocal entered
        async with routing_session(number):
            entered += 1
            if entered == 1000:
                barrier.set()
            await barrier.wait()
            inherited = await asyncio.create_task(asyncio.to_thread(current_session_id))
            return current_session_id() == inherited == str(number)

    assert all(await asyncio.gather(*map(job, range(1000))))
    assert current_session_id() is None


async def test_block_may_be_left_in_another_context_than_it_was_entered_in() -> None:
    async def stream() -> AsyncIterator[str | None]:
        with routing_session("s-1"):
            yield current_session_id()

    chunks = stream()
    other = contextvars.copy_context()
    assert await asyncio.create_task(anext(chunks)) == "s-1"  # type: ignore[arg-type]
    with pytest.raises(StopAsyncIteration):
        await asyncio.create_task(anext(chunks))  # type: ignore[arg-type]
    assert other.run(current_session_id) is None
    assert current_session_id() is None
