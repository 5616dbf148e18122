"""Ledgers, and helpers that give them calls and read them."""

import logging
import sys
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

from aiohttp_smg_routing import PinLedger, Routing, RoutingConfig
from aiohttp_smg_routing.ledger import PendingCall
from aiohttp_smg_routing.testing import Call, completion

A_HANG = 120  # seconds until a test that hangs fails

A, B, C = "http://a:30000", "http://b:30000", "http://c:30000"
W1, W2, W3, W4 = (f"http://10.0.0.{number}:8000" for number in (1, 2, 3, 4))


def ledger(*gateways: str, **config: Any) -> PinLedger:
    return Routing(RoutingConfig(gateways or A, **config)).pins


def begun(
    pins: PinLedger, session_id: str, *, gateway: str = A, key: str | None = None
) -> PendingCall:
    """Start a call to a gateway as the hook does."""
    return PendingCall(pins, "X-SMG-Routing-Key", session_id, gateway, key or session_id)


def answered(call: PendingCall, worker: str | None) -> None:
    """Give a call its answer, which may name a worker."""
    headers = {} if worker is None else {"X-SMG-Routed-Worker-Id": worker}
    call.ledger.answered(call, 200, headers)


def play(pins: PinLedger, *turns: tuple[str, str | None], gateway: str = A) -> None:
    """Play turns one after the other; each is a session and the worker that answers."""
    for session_id, worker in turns:
        answered(begun(pins, session_id, gateway=gateway), worker)


def by_worker(*workers: str) -> Callable[[Call], bytes]:
    """Return a function that gives answers; each names the next worker."""
    names = iter(workers)
    return lambda call: completion(worker=next(names))


async def turn(client: Any, session_id: str = "s-1") -> int:
    async with client.post(f"/sessions/{session_id}/v1/chat/completions", json={}) as response:
        await response.read()
        status: int = response.status
        return status


def watched(work: Callable[[], object]) -> None:
    """Run ``work`` in a thread, so that a deadlock fails the test instead of hanging it."""
    failures: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(A_HANG)
    assert not thread.is_alive(), "it hangs"
    for error in failures:
        raise error


def interrupted(run: Callable[[], object], at: int, interrupt: Callable[[], object]) -> bool:
    """Call ``run``, and ``interrupt`` at its point number ``at``; tell whether it got there.

    A finalizer or a signal handler may run between any two bytecodes.
    ``at`` is -1 for no interruption.
    """
    seen = 0

    def local(frame: Any, event: str, argument: Any) -> Any:
        nonlocal seen
        # Python 3.13.0 omits some opcode events. If tracing stopped at the interruption, 3.13 and
        # newer would omit all of them in the next run.
        if event in ("line", "opcode"):
            if seen == at:
                interrupt()
            seen += 1
        return local

    def trace(frame: Any, event: str, argument: Any) -> Any:
        if frame.f_code.co_filename == logging.__file__:  # it never enters the ledger
            return None
        frame.f_trace_opcodes = True
        return local

    sys.settrace(trace)
    try:
        run()
    finally:
        sys.settrace(None)
    return seen > at


def is_consistent(pins: PinLedger) -> bool:
    rows = pins.sessions()
    sessions = len({row.session for row in rows})
    workers = Counter(row.worker for row in rows if row.worker)
    return pins.workers() == workers and pins.summary().sessions == sessions


def end_in_a_thread(pins: PinLedger) -> None:
    """End a session in another thread while this one is in the ledger."""
    thread = threading.Thread(target=pins.end, args=("a",))
    thread.start()
    thread.join()


def read_all(pins: PinLedger) -> None:
    pins.sessions()
    pins.of("a")
    pins.workers()
    pins.workers(60)
    pins.calls()
    pins.summary()
