"""The real SMG gateway."""

import asyncio
import re
import sys
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any, Protocol

import aiohttp
from yarl import URL

from ..config import RoutingConfig
from ..keys import SessionId
from .processes import POLL_SECONDS, START_SECONDS, child_process, free_ports
from .recorder import Recorder, assert_pinned, recording_gateway


@dataclass(frozen=True, slots=True)
class SmgGateway:
    """A running gateway.

    >>> smg.url / "workers", smg.metrics_url, smg.process.pid, len(smg.workers)
    (URL('http://127.0.0.1:.../workers'), URL('http://127.0.0.1:.../metrics'), ..., 3)
    """

    url: URL
    """Its address."""
    metrics_url: URL
    """The address of its Prometheus metrics."""
    process: asyncio.subprocess.Process
    """Its process, which ends with the block or the test."""
    workers: tuple[Recorder, ...] = ()
    """The workers that were started for it. Empty if the workers are your own."""

    def assert_pinned(
        self,
        session_id: SessionId,
        *,
        turns: int | None = None,
        config: RoutingConfig | Mapping[str, Any] | None = None,
    ) -> None:
        """Assert that one of the ``workers`` got ``turns`` calls of the session, with its key.

        The arguments are those of ``Recorder.assert_pinned()``.

        >>> smg.assert_pinned("s-17", turns=3)
        """
        __tracebackhide__ = True
        assert_pinned(self.workers, session_id, turns=turns, config=config)

    async def branches(self) -> Counter[str]:
        """Return how often each branch of the ``manual`` or ``consistent_hashing`` policy ran.

        ``vacant`` counts first turns of sessions, ``occupied_hit`` later turns on the same worker.
        Raises ``aiohttp.ClientError`` if the gateway does not answer.

        >>> branches = await smg.branches()
        >>> branches["vacant"], branches["occupied_hit"]
        (1, 2)
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


class StartSmgGateway(Protocol):
    """The type of the fixture ``smg_gateway``. The gateway that it starts runs until the test ends.

    >>> smg = await smg_gateway(3, policy="manual")
    """

    def __call__(
        self,
        workers: int | Sequence[str | URL],
        *,
        policy: str,
        args: Sequence[str] = (),
        port: int | None = None,
    ) -> Awaitable[SmgGateway]:
        """Start the gateway; the arguments are those of the context manager."""


@asynccontextmanager
async def smg_gateway(
    workers: int | Sequence[str | URL],
    *,
    policy: str,
    args: Sequence[str] = (),
    port: int | None = None,
) -> AsyncIterator[SmgGateway]:
    """Run the real gateway for ``workers``; enter the block once it finds them all healthy.

    ``workers`` is the number of workers to start for it, each a ``Recorder``, or the URLs of your
    own. They must answer ``/health`` already: one that is still loading costs the gateway 30
    seconds (measured on SMG 1.13.0). ``policy`` is the gateway's ``--policy``. ``args`` are further
    command-line arguments, such as ``("--assignment-mode", "min_group")``. By default ``port`` is a
    free one. Worker overload protection is off unless ``args`` has one of its options: SMG 1.12 and
    newer turn it on, and it moves the sessions of a worker whose KV cache is 80 % full.

    Raises ``ModuleNotFoundError`` if the gateway is not installed, ``RuntimeError`` with the end of
    its output if it does not start within 60 seconds, or wants an API key. SMG 1.9 is then started
    once more.

    >>> async with smg_gateway(3, policy="manual") as smg:
    ...     await smg.branches()
    Counter()
    """
    if find_spec("smg") is None:
        raise ModuleNotFoundError(
            "the SMG gateway is not installed: pip install 'aiohttp_smg_routing[gateway]'"
        )
    program = (sys.executable, "-m", "smg", "launch", "--disable-tokenizer-autoload")
    arguments = ("--policy", policy, "--log-level", "warn", *_protection(args), *args)
    start = partial(run_gateway, program, workers, arguments, port)
    async with AsyncExitStack() as stack:
        try:
            gateway = await stack.enter_async_context(start())
        except RuntimeError:
            if _version() != (1, 9):
                raise
            # Rarely, SMG 1.9 fails to register a worker, and tries no more (docs/gateways.md).
            gateway = await stack.enter_async_context(start())
        if _version() == (1, 10) and policy in ("consistent_hashing", "prefix_hash"):
            try:
                await asyncio.wait_for(_rebuild_hash_ring(gateway.url), START_SECONDS)
            except asyncio.TimeoutError:
                message = "SMG 1.10 did not build its hash ring again: use SMG 1.11 or newer"
                raise RuntimeError(message) from None
        yield gateway


def _version() -> tuple[int, ...]:
    return tuple(map(int, version("smg").split(".")[:2]))


def _protection(args: Sequence[str]) -> tuple[str, ...]:
    """Return the option that turns worker overload protection off, if SMG has it on by default."""
    is_default = _version() >= (1, 12)
    is_named = any("worker-overload-" in argument for argument in args)
    return ("--disable-worker-overload-protection",) if is_default and not is_named else ()


async def _rebuild_hash_ring(url: URL) -> None:
    """Change a label of one worker: SMG then builds its hash ring again.

    If several workers register at once, SMG 1.10 may leave some of them out of the ring, and
    ``consistent_hashing`` then gives them no call (``docs/gateways.md``). With ``--dp-aware`` it
    accepts the change, but does not make it.
    """
    async with aiohttp.ClientSession(raise_for_status=True) as session:
        async with session.get(url / "workers") as response:
            known = (await response.json())["workers"]
        for worker in [its for its in known if not _RANK.search(its["url"])][:1]:
            path = url / "workers" / worker["id"]
            labels = worker.get("labels", {}) | {"hash_ring": "whole"}
            async with session.patch(path, json={"labels": labels}):
                pass
            while not labels.items() <= worker.get("labels", {}).items():
                await asyncio.sleep(POLL_SECONDS)
                async with session.get(path) as response:
                    worker = await response.json()


@asynccontextmanager
async def run_gateway(
    program: Sequence[str],
    workers: int | Sequence[str | URL],
    args: Sequence[str],
    port: int | None = None,
) -> AsyncIterator[SmgGateway]:
    """Run SMG, or a related gateway that has the same options and the same list of workers."""
    async with AsyncExitStack() as stack:
        started: tuple[Recorder, ...] = ()
        if isinstance(workers, int):
            contexts = [recording_gateway() for _ in range(workers)]
            started = tuple([await stack.enter_async_context(context) for context in contexts])
            workers = [worker.url for worker in started]
        urls = [str(worker) for worker in workers]
        own_port, metrics_port = free_ports(2)  # last, or a worker could get one of them
        url = URL(f"http://127.0.0.1:{port or own_port}")
        metrics_url = URL(f"http://127.0.0.1:{metrics_port}/metrics")
        # Keeps no connection open: a test may count the connections to the gateway.
        connector = aiohttp.TCPConnector(force_close=True)
        session = await stack.enter_async_context(aiohttp.ClientSession(connector=connector))

        async def ready() -> bool:
            async with session.get(url / "workers") as response:
                if response.status in (401, 403):
                    said = f"it answers GET /workers with {response.status}: leave out its API key"
                    raise ChildProcessError(said)
                response.raise_for_status()
                known = (await response.json())["workers"]
            # Another gateway may hold the port that this one was given: its workers differ.
            found = {_RANK.sub("", worker["url"]) for worker in known}
            return found == set(urls) and all(worker["is_healthy"] for worker in known)

        async with child_process(
            *program,
            *("--host", "127.0.0.1", "--port", str(url.port)),
            *("--prometheus-host", "127.0.0.1", "--prometheus-port", str(metrics_url.port)),
            *("--worker-urls", *urls),
            *args,
            ready=ready,
        ) as process:
            yield SmgGateway(url, metrics_url, process, started)


# With --dp-aware, this follows the URL of a worker, once for each data-parallel rank.
_RANK = re.compile(r"@\d+$")
