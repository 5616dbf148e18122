"""A server that keeps each request as the raw lines that arrived at its socket."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

from yarl import URL

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


def redirect(location: str | URL, status: int = 307) -> bytes:
    return f"HTTP/1.1 {status} R\r\nLocation: {location}\r\nContent-Length: 0\r\n\r\n".encode()


@dataclass(frozen=True)
class Call:
    """One request, as bytes."""

    start_line: bytes
    header_lines: tuple[bytes, ...]
    body: bytes

    @property
    def path(self) -> str:
        return self.start_line.split()[1].decode()

    def values(self, name: str) -> list[bytes]:
        """Return the raw values of every header line of that name, in whatever case."""
        pairs = (line.split(b":", 1) for line in self.header_lines)
        return [value.strip() for key, value in pairs if key.lower() == name.lower().encode()]

    @property
    def keys(self) -> list[bytes]:
        return self.values("X-SMG-Routing-Key")


@dataclass
class Wire:
    """Where the server listens, what it received, and what it answers."""

    url: URL
    calls: list[Call] = field(default_factory=list)
    answer: Callable[[Call], bytes] = lambda call: OK

    @property
    def chat(self) -> URL:
        return self.url / "v1/chat/completions"

    @property
    def last(self) -> Call:
        return self.calls[-1]


async def _read_call(reader: asyncio.StreamReader) -> Call:
    head = await reader.readuntil(b"\r\n\r\n")
    start_line, *lines = head[:-4].split(b"\r\n")
    call = Call(start_line, tuple(lines), b"")
    body = b""
    if call.values("Transfer-Encoding") == [b"chunked"]:
        while size := int(await reader.readline(), 16):
            body += await reader.readexactly(size)
            await reader.readline()
        await reader.readline()
    elif length := call.values("Content-Length"):
        body = await reader.readexactly(int(length[0]))
    return Call(start_line, tuple(lines), body)


@asynccontextmanager
async def recording_server() -> AsyncIterator[Wire]:
    writers: list[asyncio.StreamWriter] = []
    tasks: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        writers.append(writer)
        try:
            while True:
                call = await _read_call(reader)
                wire.calls.append(call)
                writer.write(wire.answer(call))
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass

    server = await asyncio.start_server(serve, "127.0.0.1", 0, backlog=4096)
    wire = Wire(URL(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"))
    try:
        yield wire
    finally:
        server.close()
        for writer in writers:
            writer.close()
        await asyncio.gather(*tasks, return_exceptions=True)
        for writer in writers:
            with suppress(ConnectionError):
                await writer.wait_closed()
        await server.wait_closed()
