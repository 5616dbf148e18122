"""A gateway, or a worker behind one, that records each call as it arrived."""

import asyncio
import socket
import struct
from collections import Counter, deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager, closing, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from yarl import URL

from ..config import RoutingConfig, as_config
from ..gateway import CHAT_COMPLETIONS, ROUTING_KEY_HEADER
from ..keys import SessionId, routing_key
from .answers import Answer, canned
from .call import Call, read_call

_LARGEST_HEAD = 2**20


@dataclass(slots=True, eq=False)
class Recorder:
    """A server's address, the calls that it received, and its answers.

    >>> recorder.answer = lambda call: completion("hello", worker=f"http://{recorder.url.host}")
    >>> response = await session.post(recorder.chat, json=turn)
    >>> len(recorder.calls), recorder.last.method
    (7, 'POST')
    """

    url: URL
    """Its address, such as ``http://127.0.0.1:40123``."""

    calls: list[Call] = field(default_factory=list)
    """The calls that it received, in order. Behind a gateway these include health checks."""

    answer: Callable[[Call], Answer] = field(default=canned)
    """A function of the call that returns the answer. Default: ``canned()``."""

    _next: deque[Answer] = field(default_factory=deque)

    @property
    def chat(self) -> URL:
        """The URL of its chat completions."""
        return self.url / CHAT_COMPLETIONS[1:]

    @property
    def last(self) -> Call:
        """The last call. Raises ``IndexError`` if there was none."""
        return self.calls[-1]

    def answer_with(self, *answers: Answer) -> None:
        """Set the answers to the next calls, one for each; ``answer`` gives those after them.

        >>> recorder.answer_with(failure(503), completion("at last"))
        """
        self._next.extend(answers)

    async def _answer_to(self, call: Call) -> AsyncGenerator[bytes, None]:
        """Yield the pieces of the answer to a call."""
        answer = self._next.popleft() if self._next else self.answer(call)
        if isinstance(answer, bytes):
            head, end, _ = answer.partition(b"\r\n\r\n")
            yield head + end if call.method == "HEAD" else answer
            return
        async with aclosing(answer):
            async for piece in answer:
                yield piece

    def assert_pinned(
        self,
        session_id: SessionId,
        *,
        turns: int | None = None,
        config: RoutingConfig | Mapping[str, Any] | None = None,
    ) -> None:
        """Assert that ``turns`` calls carried the session's key, and no other key beside it.

        Without ``turns`` there must be one call or more. If the server's config sets ``key``,
        ``secret``, ``prefix`` or ``header``, pass it as ``config``. Raises ``AssertionError`` with
        the keys that arrived.

        >>> recorder.assert_pinned("s-17", turns=6)
        """
        __tracebackhide__ = True
        assert_pinned([self], session_id, turns=turns, config=config)


def assert_pinned(
    workers: Sequence[Recorder],
    session_id: SessionId,
    *,
    turns: int | None,
    config: RoutingConfig | Mapping[str, Any] | None,
) -> None:
    """Assert that one of the ``workers`` received all of a session's calls; see ``Recorder``."""
    __tracebackhide__ = True
    given = None if config is None else as_config(config)
    key = (given.routing_key if given else routing_key)(session_id).encode()
    header = given.header if given else ROUTING_KEY_HEADER
    arrived = [
        (worker, tuple(call.values(header)), call.others(header))
        for worker in workers
        for call in worker.calls
        if call.method == "POST"  # the gateway asks its workers for their health all the time
    ]
    ours = [each for each in arrived if key in each[1]]
    served = Counter(worker for worker, _, _ in ours)
    if any(len(keys) > 1 or others for _, keys, others in ours):
        problem = "came beside another key, or a worker's name, on one call"
    elif len(served) > 1:
        problem = f"came to {len(served)} workers"
    elif sum(served.values()) != turns and (turns is not None or not served):
        wanted = "one or more" if turns is None else turns
        problem = f"came on {sum(served.values())} calls, not on {wanted}"
    else:
        return
    shown = "\n".join(
        f"  {count} x {b', '.join(keys + others).decode(errors='replace') or '(none)'}"
        f" at {worker.url}"
        for (worker, keys, others), count in Counter(arrived).items()
    )
    raise AssertionError(
        f"session {session_id!r} is not pinned: its key {key.decode()!r} {problem}. "
        f"The keys that arrived:\n{shown or '  no call arrived'}"
    )


@contextmanager
def _reset_where_an_answer_says_so(writer: asyncio.StreamWriter) -> Iterator[None]:
    try:
        yield
    except ConnectionResetError:
        linger = struct.pack("ii", True, 0)  # an RST, and no FIN
        # If the caller reset it, it is closed already, and uvloop then gives no socket.
        with suppress(OSError, AttributeError):
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        writer.transport.abort()


@asynccontextmanager
async def recording_gateway(port: int = 0) -> AsyncIterator[Recorder]:
    """Run a server that stands in for a gateway until the block ends, by default on a free port.

    It takes any call, records it in ``calls``, and answers with a chat completion unless told
    otherwise. It pins nothing: ``smg_gateway()`` does. If an answer raises an error, the end of the
    block raises it. Raises ``OSError`` if the port is taken.

    >>> async with recording_gateway() as gateway:
    ...     response = await session.post(gateway.chat, json=turn)
    >>> gateway.last.keys  # the config of ``session`` names another gateway
    []
    """
    writers: list[asyncio.StreamWriter] = []
    tasks: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - asyncio serves each connection in a task
        tasks.add(task)
        writers.append(writer)
        # The caller, or the end of the block, may end the connection at any moment.
        over = (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError)
        with closing(writer), suppress(*over), _reset_where_an_answer_says_so(writer):
            is_over = False
            while not is_over:
                call = await read_call(reader, writer)
                recorder.calls.append(call)
                async with aclosing(recorder._answer_to(call)) as pieces:
                    async for piece in pieces:
                        if not piece:
                            return
                        writer.write(piece)
                        await writer.drain()
                is_over = b"close" in b",".join(call.values("Connection")).lower()

    server = await asyncio.start_server(serve, "127.0.0.1", port, backlog=4096, limit=_LARGEST_HEAD)
    recorder = Recorder(URL(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"))
    try:
        yield recorder
    finally:
        server.close()
        for writer in writers:  # an answer under way ends here, even one that nobody reads
            writer.transport.abort()
        for task in tasks:
            task.cancel()
        ended = await asyncio.gather(*tasks, return_exceptions=True)
        for writer in writers:
            with suppress(ConnectionError):
                await writer.wait_closed()
        await server.wait_closed()
        for error in ended:
            if isinstance(error, Exception):
                raise error
