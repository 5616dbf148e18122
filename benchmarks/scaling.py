"""What many sessions cost a gateway, how they spread, and what moves: docs/scaling.md has it.

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
from harness.proc import memory as memory_of

from .report import machine
from .servers import stub_workers

WORKERS = 8
STEPS, STEP = 10, 5_000  # keys for the memory
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
    """Play one turn of each session, the gateways taking turns; return the workers."""
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
    """Return how many bytes of memory the gateway's process holds."""
    held = memory_of(gateway.process.pid)
    if held is None:
        raise RuntimeError("this system does not tell what memory a process holds")
    return held


def names(count: int, first: int = 0) -> list[str]:
    """Return keys of the length of a UUID."""
    return [f"{number:036}" for number in range(first, first + count)]


async def memory(urls: Sequence[URL], step: int) -> None:
    """Print what a pinned key costs the gateway, beside as many calls of keys that it knows."""
    async with smg_gateway(urls, policy="manual") as gateway:
        await play([gateway], names(step))  # connections, threads and buffers are there by now
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
    print(f"Gateway: {known[0] / 2**20:.0f} MiB with {step:,} pinned keys of 36 bytes.")
    for what, held in (("keys that it knows", known), ("new keys", pinned)):
        slope = linear_regression(calls, held).slope
        print(f"  {calls[-1]:,} calls of {what}: {slope:.0f} bytes each (slope), "
              f"{(held[-1] - held[0]) / calls[-1]:.0f} from end to end")  # fmt: skip
    each = (pinned[-1] - pinned[0]) / calls[-1]
    print(f"  10⁶ pinned sessions: {each * MILLION / 2**20:.0f} MiB at {each:.0f} bytes each")
    print(f"  it counts {dict(branches)}")


async def spread(
    urls: Sequence[URL], sessions: int, launched: Sequence[tuple[str, Sequence[str]]] = SPREADS
) -> None:
    """Print how many sessions a worker gets, by policy, opened one by one or many at once."""
    print(f"Sessions per worker, {sessions:,} sessions on {len(urls)} workers:")
    for policy, args in launched:
        for at_once in (1, AT_ONCE):
            async with smg_gateway(urls, policy=policy, args=args) as gateway:
                found = await play([gateway], names(sessions), at_once=at_once)
            counts = sorted(Counter(found.values()).values())
            how, fullest = " ".join((policy, *args[1:])), counts[-1] * len(urls) / sessions
            print(f"  {how}, {at_once} at once: {counts[0]} to {counts[-1]}, "
                  f"the fullest {fullest:.2f} x the mean")  # fmt: skip


async def split(urls: Sequence[URL], sessions: int) -> None:
    """Print how many sessions two gateways that take turns bring to several workers."""
    print(f"{sessions:,} sessions of {TURNS} turns, two gateways in turn, {len(urls)} workers:")
    for policy in ("manual", "consistent_hashing"):
        async with AsyncExitStack() as stack:
            contexts = [smg_gateway(urls, policy=policy) for _ in range(2)]
            both = [await stack.enter_async_context(context) for context in contexts]
            keys = names(sessions)
            turns = [await play(both if turn % 2 else both[::-1], keys) for turn in range(TURNS)]
        several = sum(len({turn[key] for turn in turns}) > 1 for key in keys)
        print(f"  {policy}: {several} of {len(keys)} sessions on several workers")


async def restarts(urls: Sequence[URL], sessions: int) -> None:
    """Print how many sessions move when a gateway starts again, or has other workers."""
    keys = names(sessions)

    async def found(policy: str, workers: Sequence[URL]) -> Mapping[str, str]:
        running: AbstractAsyncContextManager[SmgGateway] = smg_gateway(workers, policy=policy)
        async with running as gateway:
            return await play([gateway], keys)

    print(f"{sessions:,} sessions on {len(urls)} workers; how many move when the gateway")
    for policy in ("manual", "consistent_hashing"):
        before = await found(policy, urls)
        for what, workers in (
            ("starts again", urls),
            ("starts again in another order of its workers", urls[::-1]),
            ("starts again with one worker less", urls[:-1]),
        ):
            after = await found(policy, workers)
            moved = [key for key in keys if after[key] != before[key]]
            print(f"  {what}, {policy}: {len(moved)}")
            if urls[-1] not in workers:
                gone = sum(worker == str(urls[-1]) for worker in before.values())
                print(f"    of which had been on that worker: {gone}")


async def main(quick: bool) -> None:
    """Measure all of it."""
    sessions, step = (200, 200) if quick else (SESSIONS, STEP)
    async with stub_workers(WORKERS) as workers:
        await memory(workers.urls, step)
        await spread(workers.urls, sessions)
        await spread(workers.urls, 20 * sessions, SPREADS[-1:])  # is it the keys, or the ring?
        await split(workers.urls, sessions)
        await restarts(workers.urls, sessions)
    if quick:
        print("A quick run: it shows that all of it works, and its figures mean nothing.")
    print(f"Measured on: {', '.join(f'{name} {what}' for name, what in machine().items())}.")


if __name__ == "__main__":
    asyncio.run(main(quick="--quick" in sys.argv[1:]))
