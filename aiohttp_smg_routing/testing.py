"""Real processes on free loopback ports, for tests and demonstrations.

    async with smg_gateway(["http://127.0.0.1:8001"], policy="manual") as gateway:
        ...  # call gateway.url
        print(await gateway.branches())  # {'vacant': 1, 'occupied_hit': 5}

Needs the extra ``gateway``: ``pip install 'aiohttp_smg_routing[gateway]'``.
"""

import asyncio
import os
import signal
import socket
import sys
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec

import aiohttp
from yarl import URL

__all__ = ("SmgGateway", "child_process", "free_port", "free_ports", "smg_gateway")

_POLL_SECONDS = 0.05
_START_SECONDS = 60


def free_port() -> int:
    """Return a loopback TCP port that nobody listens on at this moment."""
    [port] = free_ports(1)
    return port


def free_ports(count: int) -> list[int]:
    """Return so many loopback TCP ports that nobody listens on, no two of them the same."""
    with ExitStack() as stack:  # all are held until the last is there
        held = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in held:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in held]


@asynccontextmanager
async def child_process(
    *argv: str, ready: Callable[[], Awaitable[bool]]
) -> AsyncIterator[asyncio.subprocess.Process]:
    """Run ``argv`` until the block ends; enter the block once ``ready()`` is true.

    The child has a session of its own, so a Ctrl-C in the terminal reaches this process alone,
    which then kills the child. Raises ``RuntimeError``, with the end of what the child printed,
    when it exits early or is not ready within a minute. A connection that ``ready()`` is refused
    counts as false.
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
                await asyncio.wait_for(_until_ready(process, ready), _START_SECONDS)
            except (ChildProcessError, asyncio.TimeoutError) as error:
                output.seek(0)
                tail = output.read()[-4000:].decode(errors="replace")
                raise RuntimeError(f"{argv} did not start: {error!r}\n{tail}") from error
            yield process
        finally:
            if process.returncode is None:
                # Not process.kill(): that reaps a child which has just died, and asyncio, which
                # then cannot, logs a warning.
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
        except aiohttp.ClientConnectionError:
            pass
        await asyncio.sleep(_POLL_SECONDS)


@dataclass(frozen=True, slots=True)
class SmgGateway:
    """A running gateway: where it answers, where its metrics are, and its process."""

    url: URL
    metrics_url: URL
    process: asyncio.subprocess.Process

    async def branches(self) -> Counter[str]:
        """Return how often each branch of the ``manual`` or ``consistent_hashing`` policy ran.

        ``{"vacant": 7, "occupied_hit": 35}``: seven sessions were pinned, 35 later calls followed.
        """
        from prometheus_client.parser import text_string_to_metric_families

        async with (
            aiohttp.ClientSession(raise_for_status=True) as session,
            session.get(self.metrics_url) as response,
        ):
            text = await response.text()
        branches: Counter[str] = Counter()
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name.endswith("_policy_branch_total"):
                    branches[sample.labels["branch"]] += int(sample.value)
        return branches


@asynccontextmanager
async def smg_gateway(
    workers: Sequence[str | URL],
    *,
    policy: str,
    args: Sequence[str] = (),
    port: int | None = None,
) -> AsyncIterator[SmgGateway]:
    """Run the real gateway before ``workers``; enter the block once it finds them all healthy.

    ``policy`` is the gateway's ``--policy``; ``args`` are further command-line arguments, such as
    ``("--assignment-mode", "min_group")``; ``port`` is a free one unless it is given. The workers
    must answer ``/health`` already: one that is still loading costs the gateway 30 seconds
    (measured on SMG 1.13.0).
    """
    if find_spec("smg") is None:
        raise ModuleNotFoundError(
            "the SMG gateway is not installed: pip install 'aiohttp_smg_routing[gateway]'"
        )
    own_port, metrics_port = free_ports(2)
    url = URL(f"http://127.0.0.1:{port or own_port}")
    metrics_url = URL(f"http://127.0.0.1:{metrics_port}/metrics")
    async with aiohttp.ClientSession() as session:

        async def ready() -> bool:
            async with session.get(url / "workers") as response:
                known = (await response.json())["workers"]
            return [worker["is_healthy"] for worker in known] == [True] * len(workers)

        async with child_process(
            *(sys.executable, "-m", "smg", "launch"),
            *("--host", "127.0.0.1", "--port", str(url.port)),
            *("--prometheus-host", "127.0.0.1", "--prometheus-port", str(metrics_url.port)),
            *("--worker-urls", *map(str, workers)),
            *("--policy", policy, *args),
            *("--disable-tokenizer-autoload", "--log-level", "warn"),
            ready=ready,
        ) as process:
            yield SmgGateway(url, metrics_url, process)
