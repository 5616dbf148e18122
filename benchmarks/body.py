"""Measure the cost of a session id in the JSON body; print Markdown for docs/performance.md.

python -m benchmarks.body [--quick]
"""

import asyncio
import gc
import io
import json
import sys
import time
from collections.abc import Awaitable, Callable
from statistics import median

from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

import aiohttp_smg_routing
from harness.markdown import head, row

TEXT = 'The quick brown fox said "hello" to the lazy dog.\n' * 20
SIZES = (1, 4, 16)  # MiB
SOURCES = ("header:X-Session-Id", "json:session_id")
ROUNDS = 9


def body(mib: int) -> bytes:
    """Return the JSON of a conversation of about ``mib`` MiB."""
    messages = [{"role": "user", "content": TEXT}] * (mib * 1000)
    return json.dumps({"messages": messages, "session_id": "s-1"}).encode()


async def read(request: web.Request) -> web.Response:
    """Read the body and answer with its length."""
    return web.Response(text=str(len(await request.read())))


async def post(source: str, sent: bytes, rounds: int) -> float:
    """Return the median CPU milliseconds of client and server for a request."""
    app = web.Application(client_max_size=2**26)
    app.router.add_post("/", read)
    options = {"session_id": source, "json_max_size": 2**26}
    aiohttp_smg_routing.setup(app, {"gateway": "http://10.0.0.1:30000", **options})
    async with TestClient(TestServer(app)) as client:

        async def once() -> None:
            headers = {"Content-Type": "application/json"}
            async with client.post("/", data=io.BytesIO(sent), headers=headers) as answer:
                assert int(await answer.text()) == len(sent)  # noqa: S101 - the body must arrive

        return await cost(once, rounds)


async def cost(work: Callable[[], Awaitable[object]], rounds: int) -> float:
    """Return the median CPU milliseconds of ``work`` over the rounds, after a warm-up."""
    await work()
    found = []
    for _ in range(rounds):
        gc.collect()
        begin = time.process_time()
        await work()
        found.append(1000 * (time.process_time() - begin))
    return median(found)


async def main(quick: bool) -> None:
    """Measure each size with each source."""
    rounds = 1 if quick else ROUNDS
    print(head("body", "id from a header", "id from the body", "`json.loads` of the body"))
    for mib in SIZES[:1] if quick else SIZES:
        sent = body(mib)

        async def parse(sent: bytes = sent) -> None:
            json.loads(sent)

        costs = [
            *[await post(source, sent, rounds) for source in SOURCES],
            await cost(parse, rounds),
        ]
        print(row(f"{mib} MiB", *(f"{each:.1f} ms" for each in costs)), flush=True)


if __name__ == "__main__":
    asyncio.run(main(quick="--quick" in sys.argv[1:]))
