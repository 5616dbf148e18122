"""The real SMG gateway."""

import asyncio
import re
import sys
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import aiohttp
from yarl import URL

from ..config import RoutingConfig
from ..keys import SessionId
from .processes import child_process, free_ports
from .recorder import Recorder, assert_pinned, recording_gateway


@dataclass(frozen=True, slots=True)
class SmgGateway:
    """A running gateway."""

    url: URL
    """Where it answers."""
    metrics_url: URL
    process: asyncio.subprocess.Process
    workers: tuple[Recorder, ...] = ()
    """The workers that were started for it."""

    def assert_pinned(
        self,
        session_id: SessionId,
        *,
        turns: int | None = None,
        config: RoutingConfig | Mapping[str, Any] | None = None,
    ) -> None:
        """Assert that the session's calls, ``turns`` of them, came to one of its ``workers``.

        As ``Recorder.assert_pinned()``, over all the workers.
        """
        __tracebackhide__ = True
        assert_pinned(self.workers, session_id, turns=turns, config=config)

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


StartSmgGateway = Callable[..., Awaitable[SmgGateway]]
"""What the fixture ``smg_gateway`` is: it takes what the context manager takes, and the gateway
runs until the test ends."""


@asynccontextmanager
async def smg_gateway(
    workers: int | Sequence[str | URL],
    *,
    policy: str,
    args: Sequence[str] = (),
    port: int | None = None,
) -> AsyncIterator[SmgGateway]:
    """Run the real gateway before ``workers``; enter the block once it finds them all healthy.

    ``workers`` is how many are started for it, each a ``Recorder``, or the URLs of your own.
    ``policy`` is the gateway's ``--policy``; ``args`` are further command-line arguments, such as
    ``("--assignment-mode", "min_group")``; ``port`` is a free one unless it is given. Worker
    overload protection, which moves the sessions of a worker whose KV cache is 80 % full and is on
    by default from SMG 1.12 on, is off unless ``args`` name one of its options. Workers of
    your own must answer ``/health`` already: one that is still loading costs the gateway 30 seconds
    (measured on SMG 1.13.0). Raises ``ModuleNotFoundError`` where the gateway is not installed.

    >>> async with smg_gateway(3, policy="manual") as smg:
    ...     smg.assert_pinned("s-1", turns=3)
    """
    if find_spec("smg") is None:
        raise ModuleNotFoundError(
            "the SMG gateway is not installed: pip install 'aiohttp_smg_routing[gateway]'"
        )
    program = (sys.executable, "-m", "smg", "launch", "--disable-tokenizer-autoload")
    arguments = ("--policy", policy, "--log-level", "warn", *_protection(args), *args)
    async with run_gateway(program, workers, arguments, port) as gateway:
        yield gateway


def _protection(args: Sequence[str]) -> tuple[str, ...]:
    """Return what switches worker overload protection off, where SMG has it on by default."""
    is_default = tuple(map(int, version("smg").split(".")[:2])) >= (1, 12)
    is_named = any("worker-overload-" in argument for argument in args)
    return ("--disable-worker-overload-protection",) if is_default and not is_named else ()


@asynccontextmanager
async def run_gateway(
    program: Sequence[str],
    workers: int | Sequence[str | URL],
    args: Sequence[str],
    port: int | None = None,
) -> AsyncIterator[SmgGateway]:
    """Run SMG, or one of its relatives, whose command lines and lists of workers are the same."""
    async with AsyncExitStack() as stack:
        started: tuple[Recorder, ...] = ()
        if isinstance(workers, int):
            contexts = [recording_gateway() for _ in range(workers)]
            started = tuple([await stack.enter_async_context(context) for context in contexts])
            workers = [worker.url for worker in started]
        urls = [str(worker) for worker in workers]
        own_port, metrics_port = free_ports(2)  # now that none of them can be given to a worker
        url = URL(f"http://127.0.0.1:{port or own_port}")
        metrics_url = URL(f"http://127.0.0.1:{metrics_port}/metrics")
        # None of its connections stays, for a test that looks at those to the gateway.
        connector = aiohttp.TCPConnector(force_close=True)
        session = await stack.enter_async_context(aiohttp.ClientSession(connector=connector))

        async def ready() -> bool:
            async with session.get(url / "workers") as response:
                known = (await response.json())["workers"]
            found = {_RANK.sub("", worker["url"]) for worker in known}
            return len(found) == len(urls) and all(worker["is_healthy"] for worker in known)

        async with child_process(
            *program,
            *("--host", "127.0.0.1", "--port", str(url.port)),
            *("--prometheus-host", "127.0.0.1", "--prometheus-port", str(metrics_url.port)),
            *("--worker-urls", *urls),
            *args,
            ready=ready,
        ) as process:
            yield SmgGateway(url, metrics_url, process, started)


# What --dp-aware has behind the URL of a worker, for each of its data-parallel ranks.
_RANK = re.compile(r"@\d+$")
