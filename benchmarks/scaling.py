"""Measure what many sessions cost a gateway, how they spread, and how many move.

It prints Markdown for docs/scaling.md.

python -m benchmarks.scaling [--quick]
"""

import asyncio
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from itertools import cycle
from statistics import linear_regression

from aiohttp import ClientSession, TCPConnector
from yarl import URL

from aiohttp_smg_routing import ROUTING_KEY_HEADER
from aiohttp_smg_routing.testing import SmgGateway, smg_gateway
from harness.agents import CHAT, WORKER_HEADER
from harness.markdown import head, row
from harness.proc import memory as memory_of

from .report import machine
from .servers import stub_workers

WORKERS = 8
STEPS, STEP = 10, 5_000  # for memory(): steps, and keys in each
SESSIONS, TURNS = 2_000, 4
AT_ONCE = 32
MILLION = 10**6
BODY = {"model": "stub", "messages": [{"role": "user", "content": "hello"}]}
SPREADS = (
    ("manual", ()),  # assigns at random
    ("manual", ("--assignment-mode", "min_group")),
    ("manual", ("--assignment-mode", "min_load")),
    ("consistent_hashing", ()),
)


async def play(
    gateways: Sequence[SmgGateway], keys: Iterable[str], *, at_once: int = AT_ONCE
) -> dict[str, str]:
    """Play one turn of each session; the gateways take turns. Return each session's worker."""
    found: dict[str, str] = {}
    calls = zip(keys, cycle(gateway.url for gateway in gateways), strict=False)

    async def caller(client: ClientSession, calls: Iterator[tuple[str, URL]]) -> None:
        for key, url in calls:
            headers = {ROUTING_KEY_HEADER: key}
            async with client.post(url / CHAT, json=BODY, headers=headers) as response:
                await response.read()
                found[key] = response.headers[WORKER_HEADER]

    connector = TCPConnector(limit=0)
    async with ClientSession(connector=connector, raise_for_status=True) as client:
        await asyncio.gather(*(caller(client, calls) for _ in range(at_once)))
    return found


def resident(gateway: SmgGateway) -> int:
    """Return the resident memory of the gateway's process, in bytes."""
    held = memory_of(gateway.process.pid)
    if held is None:
        raise RuntimeError("this system does not tell what memory a process holds")
    return held


def names(count: int, first: int = 0) -> list[str]:
    """Return new keys, each as long as a UUID."""
    return [f"{number:036}" for number in range(first, first + count)]


async def memory(urls: Sequence[URL], step: int) -> None:
    """Print the gateway's memory for a new key, and for as many calls with known keys."""
    async with smg_gateway(urls, policy="manual") as gateway:
        await play([gateway], names(step))  # warm-up: makes connections, threads and buffers
        known = [resident(gateway)]
        for _ in range(STEPS):
            await play([gateway], names(step))
            known.append(resident(gateway))
        pinned = [resident(gateway)]
        for number in range(1, STEPS + 1):
            await play([gateway], names(step, number * step))
            pinned.append(resident(gateway))
        branches = +await gateway.branches()
    calls = [number * step for number in range(STEPS + 1)]
    heading("Memory", f"{calls[-1]:,} calls under `manual`", "bytes each", "slope", "for 10⁶")
    for what, held in (("new keys of 36 bytes", pinned), ("keys that it knows", known)):
        each, slope = (held[-1] - held[0]) / calls[-1], linear_regression(calls, held).slope
        print(
            row(what, f"{each:.0f}", f"{slope:.0f}", f"{each * MILLION / 2**20:.0f} MiB"),
            flush=True,
        )
    counted = ", ".join(f"{count:,} `{branch}`" for branch, count in branches.items())
    print(
        f"\nThe gateway held {known[0] / 2**20:.0f} MiB with {step:,} keys. It counted {counted}."
    )


async def spread(
    urls: Sequence[URL], sessions: int, launched: Sequence[tuple[str, Sequence[str]]] = SPREADS
) -> None:
    """Print how many sessions a worker gets, by policy, if opened one by one or many at once."""
    for policy, args in launched:
        for at_once in (1, AT_ONCE):
            async with smg_gateway(urls, policy=policy, args=args) as gateway:
                found = await play([gateway], names(sessions), at_once=at_once)
            counts = sorted(Counter(found.values()).values())
            how, fullest = " ".join((policy, *args[1:])), counts[-1] * len(urls) / sessions
            spread_of = f"{counts[0]:,} to {counts[-1]:,}"
            cells = (f"`{how}`", f"{sessions:,}", f"{at_once}", spread_of, f"{fullest:.2f}")
            print(row(*cells), flush=True)


async def split(urls: Sequence[URL], sessions: int) -> None:
    """Print how many sessions come to several workers if two gateways take turns."""
    last = "came to several workers"
    heading("Two gateways in turn", f"of {sessions:,} sessions of {TURNS} turns", last)
    for policy in ("manual", "consistent_hashing"):
        async with AsyncExitStack() as stack:
            contexts = [smg_gateway(urls, policy=policy) for _ in range(2)]
            both = [await stack.enter_async_context(context) for context in contexts]
            keys = names(sessions)
            turns = [await play(both if turn % 2 else both[::-1], keys) for turn in range(TURNS)]
        several = sum(len({turn[key] for turn in turns}) > 1 for key in keys)
        print(row(f"`{policy}`", f"{several:,}"), flush=True)


async def restarts(urls: Sequence[URL], sessions: int) -> None:
    """Print how many sessions move when a gateway restarts with the same or other workers."""
    keys = names(sessions)

    async def found(policy: str, workers: Sequence[URL]) -> Mapping[str, str]:
        running: AbstractAsyncContextManager[SmgGateway] = smg_gateway(workers, policy=policy)
        async with running as gateway:
            return await play([gateway], keys)

    policies = ("manual", "consistent_hashing")
    before = {policy: await found(policy, urls) for policy in policies}
    what = f"{sessions:,} sessions, {len(urls)} workers: the gateway starts again"
    heading("Restarts", what, *(f"moved under `{policy}`" for policy in policies))
    for what, workers in (
        ("with the same workers", urls),
        ("with its workers in another order", urls[::-1]),
        ("with one worker less", urls[:-1]),
    ):
        cells = []
        for policy in policies:
            after = await found(policy, workers)
            moved = sum(after[key] != before[policy][key] for key in keys)
            gone = sum(worker == str(urls[-1]) for worker in before[policy].values())
            those = (
                f", of those {gone:,} had been on that worker" if len(workers) < len(urls) else ""
            )
            cells.append(f"{moved:,}{those}")
        print(row(what, *cells), flush=True)


def heading(title: str, *columns: str) -> None:
    """Print a heading, and the head of its table."""
    print(f"\n## {title}\n")
    print(head(*columns), flush=True)


async def main(quick: bool) -> None:
    """Measure and print everything."""
    sessions, many, step = (100, 200, 50) if quick else (SESSIONS, 20 * SESSIONS, STEP)
    async with stub_workers(WORKERS) as workers:
        await memory(workers.urls, step)
        columns = ("sessions", "at once", "on a worker", "fullest / mean")
        heading("Spread", f"{WORKERS} workers", *columns)
        await spread(workers.urls, sessions)
        await spread(workers.urls, many, SPREADS[-1:])  # is the ring itself uneven?
        await split(workers.urls, sessions)
        await restarts(workers.urls, sessions)
    if quick:
        print("\nA quick run: it shows that all of it works, and its figures mean nothing.")
    print("\n## Machine\n")
    print(f"{', '.join(f'{name} {what}' for name, what in machine().items())}.")


if __name__ == "__main__":
    asyncio.run(main(quick="--quick" in sys.argv[1:]))
