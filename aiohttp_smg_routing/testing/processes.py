"""Real processes on free loopback ports."""

import asyncio
import os
import random
import shlex
import signal
import socket
import tempfile
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from itertools import chain, repeat
from pathlib import Path

import aiohttp

POLL_SECONDS = 0.05
START_SECONDS = 60


def own_ports(file: Path = Path("/proc/sys/net/ipv4/ip_local_port_range")) -> range:
    """Return the ports that the system gives to nobody on its own.

    Documentation/networking/ip-sysctl.rst of Linux; other systems begin at 32768 or above.
    """
    try:
        first = int(file.read_text().split()[0])
    except OSError:
        first = 32768
    return range(10_000, first)


OWN_PORTS = own_ports()
_random = random.SystemRandom()  # processes with one seed must not choose the same ports

# A port that was given is free until its program listens. Until then, a UDP socket of the same
# number, which hinders no TCP program, keeps the port from other calls. The socket ends with the
# process at the latest.
_given: deque[int] = deque()  # the file descriptors
_MAX_GIVEN = 100


def free_port() -> int:
    """Return a TCP port of 127.0.0.1 that nobody listens on, as ``free_ports()`` does.

    >>> url = f"http://127.0.0.1:{free_port()}"
    """
    [port] = free_ports(1)
    return port


def free_ports(count: int) -> list[int]:
    """Return ``count`` different TCP ports of 127.0.0.1 that nobody listens on.

    They lie outside the range from which the system gives a port to a program that asks for any.
    So no such program takes one before the caller does. No later call, in this process or another,
    gives one of the last 100 again. Raises ``OSError`` if there are too few.

    >>> port, metrics_port = free_ports(2)
    """
    ports: Iterable[int] = repeat(0, 100 * count)  # 0 is any port: the system's range has them all
    if OWN_PORTS:
        begin = _random.randrange(len(OWN_PORTS))
        ports = chain(OWN_PORTS[begin:], OWN_PORTS[:begin])
    free: list[int] = []
    for port in ports:
        if len(free) == count:
            break
        with (
            suppress(OSError),  # the port is taken: try the next
            socket.socket(type=socket.SOCK_DGRAM) as keeper,
            socket.socket() as probe,
        ):
            keeper.bind(("127.0.0.1", port))  # first, so that a port that was given is not probed
            probe.bind(keeper.getsockname())
            free.append(probe.getsockname()[1])
            _given.append(keeper.detach())
    for _ in range(len(_given) - _MAX_GIVEN):  # a process may open only so many files
        socket.close(_given.popleft())
    if len(free) < count:
        raise OSError(
            f"only {len(free)} of {count} ports of 127.0.0.1 are free: ask for fewer, or end the "
            "programs that hold them"
        )
    return free


@asynccontextmanager
async def child_process(
    *argv: str, ready: Callable[[], Awaitable[bool]]
) -> AsyncIterator[asyncio.subprocess.Process]:
    """Run ``argv`` until the block ends; enter the block once ``ready()`` is true.

    A refused connection in ``ready()`` counts as false. A Ctrl-C in the terminal reaches this
    process alone, which then kills the child. Raises ``OSError`` if the program can't be run, and
    ``RuntimeError`` with the end of the child's output if the child exits early or is not ready
    within 60 seconds.

    >>> async def ready():
    ...     return True
    >>> async with child_process("sleep", "60", ready=ready) as process:
    ...     process.returncode is None
    True
    """
    with tempfile.TemporaryFile() as output:
        process = await asyncio.create_subprocess_exec(
            *argv,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        try:
            try:
                await asyncio.wait_for(_until_ready(process, ready), START_SECONDS)
            except (ChildProcessError, asyncio.TimeoutError) as error:
                output.seek(0)
                tail = output.read()[-4000:].decode(errors="replace")
                how = str(error) or f"it was not ready within {START_SECONDS} seconds"
                raise RuntimeError(
                    f"{shlex.join(argv)} did not start: {how}. The end of its output:\n{tail}"
                ) from error
            yield process
        finally:
            if process.returncode is None:
                # Not process.kill(): that reaps a child that has just died, and then asyncio, which
                # can't reap it any more, logs a warning.
                with suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)
            await process.wait()


async def _until_ready(
    process: asyncio.subprocess.Process, ready: Callable[[], Awaitable[bool]]
) -> None:
    while True:
        if process.returncode is not None:
            raise ChildProcessError(f"exit status {process.returncode}")
        try:
            if await ready():
                return
        except aiohttp.ClientError:  # it may listen already, and not answer yet
            pass
        await asyncio.sleep(POLL_SECONDS)
