"""A call, as the raw lines that arrived at a socket."""

import asyncio
import json
from dataclasses import dataclass
from typing import Any

from ..gateway import ROUTING_KEY_HEADER


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

    def json(self) -> Any:
        """Return what the body says; ``ValueError`` where it is not JSON."""
        return json.loads(self.body)


async def read_call(reader: asyncio.StreamReader) -> Call:
    """Read the next call of a connection."""
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
