"""A call, as the raw lines that arrived at a socket."""

import asyncio
import json
from dataclasses import dataclass
from typing import Any

from ..gateway import ROUTING_KEY_HEADER, TARGET_WORKER_HEADER

# RFC 9113, section 3.4. sglang-router asks each worker in HTTP/2 first, and in HTTP/1.1 when the
# connection is closed.
_HTTP_2_PREFACE = b"PRI * HTTP/2.0"


@dataclass(frozen=True, slots=True)
class Call:
    """One call, as the bytes that arrived."""

    start_line: bytes
    header_lines: tuple[bytes, ...]
    body: bytes

    @property
    def method(self) -> str:
        """The method."""
        return self.start_line.split()[0].decode()

    @property
    def path(self) -> str:
        """The path as it was sent, with its query."""
        return self.start_line.split()[1].decode()

    @property
    def keys(self) -> list[bytes]:
        """The routing keys: on a tagged call one, and one alone."""
        return self.values(ROUTING_KEY_HEADER)

    def values(self, name: str) -> list[bytes]:
        """Return the raw values of every header line of that name, in whatever case."""
        pairs = (line.split(b":", 1) for line in self.header_lines)
        return [value.strip() for key, value in pairs if key.lower() == name.lower().encode()]

    def others(self, header: str) -> tuple[bytes, ...]:
        """Return what else could choose the worker, where ``header`` carries the key."""
        names = {ROUTING_KEY_HEADER.lower(), TARGET_WORKER_HEADER.lower()} - {header.lower()}
        return tuple(value for name in sorted(names) for value in self.values(name))

    def json(self) -> Any:
        """Return what the body says; ``ValueError`` where it is not JSON."""
        return json.loads(self.body)


async def read_call(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Call:
    """Read the next call of a connection; ``ConnectionAbortedError`` if it is to speak HTTP/2."""
    head = await reader.readuntil(b"\r\n\r\n")
    start_line, *lines = head[:-4].split(b"\r\n")
    if start_line == _HTTP_2_PREFACE:
        raise ConnectionAbortedError("the client asks for HTTP/2, which is not spoken here")
    call = Call(start_line, tuple(lines), b"")
    if call.values("Expect"):
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    body = bytearray()
    if b"chunked" in b",".join(call.values("Transfer-Encoding")).lower():
        while size := int((await reader.readline()).partition(b";")[0], 16):
            body += await reader.readexactly(size)
            await reader.readline()
        while (await reader.readline()).strip():  # trailers
            pass
    elif length := call.values("Content-Length"):
        body += await reader.readexactly(int(length[0]))
    return Call(start_line, tuple(lines), bytes(body))
