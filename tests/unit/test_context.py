"""The current session: in blocks, in generators, and in code handed to other tasks."""

import asyncio
import contextvars
import gc
import itertools
import logging
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from functools import partial
from typing import Any
from uuid import UUID

import pytest
from aiohttp import ClientSession, web
from pytest_aiohttp.plugin import AiohttpClient

from aiohttp_smg_routing import (
    ROUTING,
    MissingSessionError,
    PinSummary,
    Routing,
    RoutingConfig,
    current_session_id,
    in_session,
    routing_session,
)
from aiohttp_smg_routing.config import name_and_key
from aiohttp_smg_routing.context import Scope
from aiohttp_smg_routing.testing import Recorder
from harness.proxies import CLIENT, pinned_server


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


async def test_a_block_keeps_the_parts_of_a_block_of_the_same_session_unless_it_has_its_own(
    gateway: Recorder,
) -> None:
    routing = Routing({"gateway": str(gateway.url), "pin_by": "{session_id}/{json:model}"})
    async with ClientSession(trace_configs=[routing.trace_config()]) as session:

        async def key(session_id: str, **parts: str) -> bytes:
            with routing_session(session_id, {f"json:{name}": it for name, it in parts.items()}):
                async with session.post(gateway.chat):
                    [key] = gateway.last.keys
                    return key

        alone, other = await key("s-1"), await key("s-2")
        judge, actor = await key("s-1", model="judge"), await key("s-1", model="actor")
        assert len({alone, other, judge, actor}) == 4
        with routing_session("s-1", {"json:model": "judge"}):
            assert await key("s-1") == judge
            assert await key("s-1", model="actor") == actor
            assert await key("s-2") == other


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


async def test_a_block_says_what_the_sources_of_pin_by_find(gateway: Recorder) -> None:
    routing = Routing(RoutingConfig(gateway.url, pin_by="{session_id}/{json:model}"))
    async with ClientSession(trace_configs=[routing.trace_config()]) as session:

        async def key(*block: Any) -> bytes:
            with routing_session(*block):
                async with session.post(gateway.chat):
                    [sent] = gateway.last.keys
                    return sent

        judge = await key("s-1", {"json:model": "judge"})
        assert await key("s-1", {"json:model": "judge"}) == judge
        others = [
            await key("s-1", {"json:model": "policy"}),
            await key("s-2", {"json:model": "judge"}),
            await key("s-1/judge"),
        ]
        assert len({judge, *others}) == 4
        for nothing in ({}, {"json:model": None}, {"json:model": ""}, {"query:model": "judge"}):
            assert await key("s-1", nothing) == b"s-1"
    assert {pin.session for pin in routing.pins.sessions()} == {"s-1", "s-2", "s-1/judge"}


async def test_a_block_keeps_the_parts_of_its_sessions_request_that_it_does_not_name(
    gateway: Recorder, aiohttp_client: AiohttpClient
) -> None:
    async def handler(request: web.Request) -> web.Response:
        async def key() -> bytes:
            async with request.app[CLIENT].post(gateway.chat):
                [sent] = gateway.last.keys
                return sent

        async def key_in(*block: Any) -> bytes:
            with routing_session(*block):
                return await key()

        keys.append(await key())
        assert await key_in("s-1", {"json:model": "judge"}) == judge
        assert await key_in("s-1", {"json:model": "judge", "header:X-Team": "red"}) == judge
        assert await key_in("s-1", {"header:X-Team": None}) == b"s-1"
        assert await key_in("s-2", {"json:model": "judge"}) == b"s-2"
        return web.Response()

    keys: list[bytes] = []
    config = RoutingConfig(gateway.url, pin_by="{session_id}/{json:model}/{header:X-Team}")
    _, key_of_judge = name_and_key(config, "s-1", {"json:model": "judge", "header:X-Team": "red"})
    judge = key_of_judge.encode()
    app = pinned_server(gateway.url, pin_by=config.pin_by.template)
    app.router.add_post("/{session_id}", handler)
    client = await aiohttp_client(app)
    for model in ("policy", "judge"):
        async with client.post("/s-1", json={"model": model}, headers={"X-Team": "red"}) as answer:
            assert answer.status == 200
    assert keys[0] != keys[1] == judge


# A block around a yield is wrong, and the log says so.


def left_elsewhere(caplog: pytest.LogCaptureFixture) -> list[str]:
    lines = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    return [line for line in lines if "yield" in line]


def turns(session_id: str, count: int = 2) -> Iterator[int]:
    with routing_session(session_id):
        yield from range(count)


async def test_generators_that_take_turns_leave_no_session_behind_and_are_named_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def takes_turns() -> None:
        for _ in range(3):
            for _ in zip(turns("s-1"), turns("s-2"), strict=True):
                assert current_session_id() is not None
            assert current_session_id() is None
            with routing_session("s-3"):
                for _ in zip(turns("s-1"), turns("s-2"), turns("s-4"), strict=True):
                    pass
                assert current_session_id() == "s-3"
            assert current_session_id() is None

    await asyncio.create_task(takes_turns())
    [line] = left_elsewhere(caplog)
    assert "takes_turns" in line
    assert "around the code that consumes" in line
    assert "s-1" not in caplog.text  # an id may be a credential


@pytest.mark.parametrize("order", [*itertools.permutations(range(3))])
async def test_blocks_that_are_left_in_any_order_leave_the_session_around_them(
    order: tuple[int, ...], caplog: pytest.LogCaptureFixture
) -> None:
    async def leaves_in_any_order() -> None:
        blocks = [routing_session(f"s-{number}") for number in range(3)]
        for block in blocks:
            block.__enter__()
        is_open = [True] * 3
        for number in order:
            blocks[number].__exit__(None, None, None)
            is_open[number] = False
            innermost_is_open = number < 2 and is_open[2]
            if innermost_is_open:
                assert current_session_id() == "s-2"  # the other exits don't end it
        assert current_session_id() == "around"

    with routing_session("around"):
        await asyncio.create_task(leaves_in_any_order())


async def test_right_use_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    async def consumes() -> list[str | None]:
        seen = []
        for session_id in ("s-1", "s-2"):
            with routing_session(session_id):
                seen += [current_session_id() for _ in range(2)]
        for _ in turns("s-3"):  # run to its end
            pass
        for _ in turns("s-3"):
            break
        return [*seen, current_session_id()]

    assert await asyncio.create_task(consumes()) == ["s-1", "s-1", "s-2", "s-2", None]
    assert left_elsewhere(caplog) == []


async def test_a_generator_that_is_kept_after_a_break_and_left_later_is_named(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def breaks_and_goes_on() -> None:
        kept = turns("s-1")
        for _ in kept:
            break
        with routing_session("s-2"):
            del kept  # leaves the block
            assert current_session_id() == "s-2"
        assert current_session_id() is None

    await asyncio.create_task(breaks_and_goes_on())
    assert len(left_elsewhere(caplog)) == 1


async def test_an_async_generator_that_the_loop_closes_after_a_break_is_named(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The loop leaves the block in another task, so this task keeps the session."""
    closed = asyncio.Event()

    async def values() -> AsyncIterator[int]:
        try:
            async with routing_session("s-1"):
                yield 1
        finally:
            closed.set()

    async def breaks() -> None:
        async for _ in values():
            break
        gc.collect()
        await closed.wait()

    await asyncio.create_task(breaks())
    [line] = left_elsewhere(caplog)
    assert "breaks" in line


async def test_block_may_be_left_in_another_context_than_it_was_entered_in(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def stream() -> AsyncIterator[str | None]:
        with routing_session("s-1"):
            yield current_session_id()

    async def steps() -> str | None:
        return await anext(values, None)

    values = stream()
    other = contextvars.copy_context()
    assert [await asyncio.create_task(steps()) for _ in range(2)] == ["s-1", None]
    assert other.run(current_session_id) is None
    assert current_session_id() is None
    assert len(left_elsewhere(caplog)) == 1


# Code that is handed to another context.


async def session_of_this_code() -> str | None:
    await asyncio.sleep(0)
    return current_session_id()


async def test_what_is_handed_through_a_queue_runs_in_the_session_that_handed_it() -> None:
    jobs: asyncio.Queue[Coroutine[Any, Any, str | None]] = asyncio.Queue()

    async def worker() -> list[str | None]:
        seen = [await (await jobs.get()) for _ in range(3)]
        return [*seen, await asyncio.create_task(await jobs.get()), current_session_id()]

    with routing_session("of the worker"):
        running = asyncio.create_task(worker())
    for session_id in ("s-1", "s-2", None, "s-3"):
        with routing_session(session_id):
            await jobs.put(in_session(session_of_this_code()))
    assert await running == ["s-1", "s-2", None, "s-3", "of the worker"]


async def in_a_loop_of_another_thread(job: Coroutine[Any, Any, str | None]) -> str | None:
    return await asyncio.to_thread(asyncio.run, job)


async def handed_over_by_another_thread(job: Coroutine[Any, Any, str | None]) -> str | None:
    loop = asyncio.get_running_loop()
    future = await asyncio.to_thread(asyncio.run_coroutine_threadsafe, job, loop)
    return await asyncio.wrap_future(future)


async def gathered(job: Coroutine[Any, Any, str | None]) -> str | None:
    [result] = await asyncio.gather(job)
    return result


@pytest.mark.parametrize(
    "run",
    [
        asyncio.create_task,
        asyncio.ensure_future,
        asyncio.shield,
        partial(asyncio.wait_for, timeout=None),
        gathered,
        handed_over_by_another_thread,
        in_a_loop_of_another_thread,
    ],
)
async def test_it_runs_in_the_session_in_whatever_way_it_is_run(
    run: Callable[[Coroutine[Any, Any, str | None]], Awaitable[str | None]],
) -> None:
    with routing_session("s-1"):
        job = in_session(session_of_this_code())
    with routing_session("another"):
        assert await run(job) == "s-1"
        assert current_session_id() == "another"


@pytest.mark.parametrize("job", [session_of_this_code, None, "s-1"])
def test_what_is_no_coroutine_is_refused(job: Any) -> None:
    with pytest.raises(TypeError, match="takes a coroutine, not a"):
        in_session(job).close()


async def test_without_a_session_it_runs_in_none_whoever_runs_it() -> None:
    job = in_session(session_of_this_code())
    with routing_session("another"):
        assert await asyncio.create_task(job) is None


async def test_tasks_and_threads_that_it_starts_are_in_its_session() -> None:
    async def starts() -> tuple[str | None, str | None]:
        task = asyncio.create_task(session_of_this_code())
        return await task, await asyncio.to_thread(current_session_id)

    with routing_session("s-1"):
        job = in_session(starts())
    assert await job == ("s-1", "s-1")


@pytest.mark.parametrize("error", [KeyError, asyncio.CancelledError, None])
async def test_awaited_directly_it_leaves_the_callers_session_as_it_was(
    error: type[BaseException] | None,
) -> None:
    async def fails() -> str:
        routing_session("left behind").__enter__()
        if error:
            raise error
        return "returned"

    with routing_session("s-1"):
        job = in_session(fails())
    with routing_session("of the caller"):
        if error:
            with pytest.raises(error):
                await job
        else:
            assert await job == "returned"
        assert current_session_id() == "of the caller"


async def test_it_is_cancelled_as_the_coroutine_would_be() -> None:
    started, cleaned_up = asyncio.Event(), []

    async def waits() -> None:
        try:
            started.set()
            await asyncio.Event().wait()
        finally:
            cleaned_up.append(current_session_id())

    with routing_session("s-1"):
        job = in_session(waits())
    task = asyncio.create_task(job)
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert cleaned_up == ["s-1"]


async def test_closed_before_it_starts_it_leaves_no_warning(
    recwarn: pytest.WarningsRecorder,
) -> None:
    with routing_session("s-1"):
        jobs = [in_session(session_of_this_code()) for _ in range(2)]
    jobs[0].close()
    task = asyncio.create_task(jobs[1])
    task.cancel()  # before it starts, as a scheduler does at shutdown
    await asyncio.wait([task])
    del jobs, task
    gc.collect()
    assert [str(warning.message) for warning in recwarn] == []


def test_never_awaited_it_is_warned_of_once_by_its_own_name(
    recwarn: pytest.WarningsRecorder,
) -> None:
    job = in_session(session_of_this_code())
    del job
    gc.collect()
    [warning] = recwarn
    assert str(warning.message) == "coroutine 'session_of_this_code' was never awaited"


async def test_a_job_that_waits_for_ever_is_collected_and_touches_no_other_session(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Garbage collection ends such a task, in the context of whatever code is running."""
    monkeypatch.setattr(logging.getLogger("asyncio"), "disabled", True)  # it logs the pending task

    class Held:
        pass

    async def waits(held: Held) -> None:
        itself = asyncio.current_task()
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            del held, itself  # keeps both alive until here

    held = Held()
    gone = weakref.ref(held)
    with routing_session("s-1"):
        job = in_session(waits(held))
    with routing_session("around the task"):
        task = asyncio.create_task(job)
    await asyncio.sleep(0)
    with routing_session("s-2"):
        del task, held, job
        gc.collect()
        assert gone() is None
        assert current_session_id() == "s-2"


Play = Callable[[], Awaitable[None]]


async def with_a_job(
    gateway: Recorder,
    aiohttp_client: AiohttpClient,
    hand_over: Callable[[asyncio.Queue[Any], Play], Awaitable[None]],
    **config: object,
) -> web.Application:
    """Return a server whose handler has handed over a job, after that job has run."""
    app = pinned_server(gateway.url, **config)
    jobs: asyncio.Queue[Coroutine[Any, Any, None]] = asyncio.Queue()

    async def play() -> None:
        async with app[CLIENT].post(gateway.chat):
            pass

    async def handler(request: web.Request) -> web.Response:
        await hand_over(jobs, play)
        return web.Response(status=202)

    app.router.add_post("/{session_id}", handler)
    client = await aiohttp_client(app)
    async with client.post("/s-1"):
        pass
    job = await jobs.get()  # the request and its task have ended
    try:
        await asyncio.create_task(job)
    except MissingSessionError:
        assert config["on_late"] == "raise"
    return app


async def test_a_job_of_a_request_has_its_session_and_is_not_late_when_it_has_ended(
    gateway: Recorder, aiohttp_client: AiohttpClient
) -> None:
    async def hand_over(jobs: asyncio.Queue[Any], play: Play) -> None:
        jobs.put_nowait(in_session(play()))  # type: ignore[arg-type]

    app = await with_a_job(gateway, aiohttp_client, hand_over, on_late="raise", prefix="job-7/")
    assert gateway.last.keys == [b"job-7/s-1"]
    assert app[ROUTING].pins.summary() == PinSummary(unknown=1, sessions=1)


@pytest.mark.parametrize("on_late", ["warn", "raise"])
async def test_a_job_that_late_code_makes_stays_late_and_is_named(
    gateway: Recorder,
    aiohttp_client: AiohttpClient,
    caplog: pytest.LogCaptureFixture,
    on_late: str,
) -> None:
    async def hand_over(jobs: asyncio.Queue[Any], play: Play) -> None:
        request = asyncio.current_task()

        async def batcher() -> None:
            assert request is not None
            await asyncio.wait([request])
            jobs.put_nowait(in_session(play()))  # type: ignore[arg-type]

        batchers.append(asyncio.create_task(batcher()))

    batchers: list[asyncio.Task[None]] = []
    app = await with_a_job(gateway, aiohttp_client, hand_over, on_late=on_late)
    assert app[ROUTING].pins.summary().late == 1
    assert [call.keys for call in gateway.calls] == ([[b"s-1"]] if on_late == "warn" else [])
    assert ("with_a_job.<locals>.play" in caplog.text) == (on_late == "warn")


async def test_a_session_that_late_code_names_is_not_late(
    gateway: Recorder, aiohttp_client: AiohttpClient
) -> None:
    async def hand_over(jobs: asyncio.Queue[Any], play: Play) -> None:
        request = asyncio.current_task()

        async def batcher() -> None:
            assert request is not None
            await asyncio.wait([request])
            with routing_session("s-2"):
                jobs.put_nowait(in_session(play()))  # type: ignore[arg-type]

        batchers.append(asyncio.create_task(batcher()))

    batchers: list[asyncio.Task[None]] = []
    app = await with_a_job(gateway, aiohttp_client, hand_over, on_late="raise")
    assert gateway.last.keys == [b"s-2"]
    assert app[ROUTING].pins.summary() == PinSummary(unknown=1, sessions=1)


async def test_a_block_that_is_collected_leaves_the_context_of_the_running_code() -> None:
    """A task that the block started runs on and triggers the garbage collector."""
    seen: list[str | None] = []
    goes_on = asyncio.Event()

    async def child() -> None:
        await goes_on.wait()
        gc.collect()
        seen.append(current_session_id())

    async def parent() -> None:
        with routing_session("job-1"):
            children.append(asyncio.create_task(child()))
            await asyncio.get_running_loop().create_future()

    children: list[asyncio.Task[None]] = []
    logging.getLogger("asyncio").disabled = True  # it rightly logs the pending task
    gc.disable()
    try:
        with routing_session("outer"):
            asyncio.create_task(parent())  # noqa: RUF006 - so that it is collected
            await asyncio.sleep(0)
        goes_on.set()
        await children[0]
    finally:
        gc.enable()
        logging.getLogger("asyncio").disabled = False
    assert seen == ["job-1"]


def test_blocks_that_overlap_without_end_leave_nothing() -> None:
    """Each block surrounds a yield, and is left after the next one was entered."""

    def value(number: int) -> Iterator[int]:
        with routing_session(number):
            yield number

    def scopes() -> int:
        gc.collect()
        return sum(isinstance(it, Scope) for it in gc.get_objects())

    def run() -> int:
        before = scopes()
        window = value(0)
        next(window)
        for number in range(1, 2000):
            following = value(number)
            next(following)
            window.close()  # type: ignore[attr-defined]
            window = following
        return scopes() - before

    assert contextvars.copy_context().run(run) < 20
