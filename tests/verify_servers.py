"""Servers for the tests of ``verify``: engines that stream and remember, gateways, proxies."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from itertools import accumulate, cycle
from typing import Any, TypeVar

from aiohttp import ClientSession, web
from multidict import CIMultiDict
from yarl import URL

from harness import workers
from harness.processes import together
from harness.servers import serve
from harness.workers import MODEL

from .crosstalk import Handler

CLIENT = web.AppKey("client", ClientSession)

T = TypeVar("T")


@asynccontextmanager
async def caching_workers(
    count: int, *, report: bool = True, kv_usage: Sequence[float] = ()
) -> AsyncIterator[list[URL]]:
    """Run workers that stream; with ``report`` their usage has the cached tokens.

    ``kv_usage`` is how full the KV cache of each is, 0 to 1, in its metrics.
    """
    apps = [engine(report=report) for _ in range(count)]
    for app, usage in zip(apps, kv_usage, strict=False):
        app.router.add_get("/metrics", _load(usage))
    async with together(map(serve, apps)) as urls:
        yield urls


def engine(*, report: bool = True) -> web.Application:
    """Return a worker whose tokens are words, and whose KV cache holds every prompt it served."""
    cache: set[str] = set()

    async def health(request: web.Request) -> web.Response:
        return web.Response()

    async def completions(request: web.Request) -> web.StreamResponse:
        body = await request.json()
        texts = [message["content"] + "\n" for message in body["messages"]]
        known = [prompt for prompt in accumulate(texts) if prompt in cache]
        prompt, cached = "".join(texts), max(known, key=len, default="")
        cache.update(accumulate([*texts, "ok\n"]))
        usage: dict[str, object] = {"prompt_tokens": len(prompt.split()), "completion_tokens": 1}
        if report:
            usage["prompt_tokens_details"] = {"cached_tokens": len(cached.split())}
        return await stream(request, "ok", usage)

    app = web.Application()
    app.router.add_get("/health", health)
    app.router.add_get("/v1/models", models)
    app.router.add_post("/v1/chat/completions", completions)
    return app


def _load(kv_usage: float) -> Handler:
    async def metrics(request: web.Request) -> web.Response:
        return web.Response(text=f"vllm:kv_cache_usage_perc {kv_usage}\n")

    return metrics


async def models(request: web.Request) -> web.Response:
    return web.json_response(workers.models())


async def stream(request: web.Request, reply: str, usage: dict[str, object]) -> web.StreamResponse:
    """Answer with a streamed chat completion."""
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    head = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": MODEL}
    for delta in ({"role": "assistant", "content": ""}, {"content": reply}):
        choice = {"index": 0, "delta": delta, "finish_reason": None}
        await _event(response, {**head, "choices": [choice], "usage": None})
    await _event(response, {**head, "choices": [], "usage": usage})
    await response.write(b"data: [DONE]\n\n")
    return response


async def _event(response: web.StreamResponse, data: object) -> None:
    await response.write(b"data: " + json.dumps(data).encode() + b"\n\n")


def fake_gateway(chat: Handler, *, models: Handler = models) -> web.Application:
    """Return a server with the endpoints of a gateway; ``chat`` answers the turns."""

    async def metrics(request: web.Request) -> web.Response:
        return web.Response(text="smg_manual_policy_cache_entries 0\n")

    async def workers(request: web.Request) -> web.Response:
        return web.json_response({"workers": 2 * [{"is_healthy": True}]})

    app = web.Application()
    app.router.add_get("/metrics", metrics)
    app.router.add_get("/workers", workers)
    app.router.add_get("/v1/models", models)
    app.router.add_post("/v1/chat/completions", chat)
    return app


def proxy(
    *upstreams: URL,
    drop: frozenset[str] = frozenset(),
    add: Sequence[tuple[str, str]] = (),
    key: Callable[[web.Request], str] | None = None,
    body: Callable[[bytes, web.Request], bytes] = lambda said, request: said,
    api_key: str | None = None,
) -> web.Application:
    """Return a proxy in front of one gateway, or of replicas that take turns.

    ``drop`` names headers, in lower case, that it removes from calls and answers; ``add`` has
    headers that it adds to calls. With ``key`` it is a session server that sends that key.
    ``body`` changes the body of a call. With ``api_key`` it requires that key, and answers a wrong
    one with a 401 that shows it.
    """
    turn = cycle(upstreams)

    async def client(app: web.Application) -> AsyncIterator[None]:
        async with ClientSession(auto_decompress=False) as app[CLIENT]:
            yield

    async def forward(request: web.Request) -> web.StreamResponse:
        authorization = request.headers.get("Authorization")
        if api_key and authorization != f"Bearer {api_key}":
            raise web.HTTPUnauthorized(text=f"wrong API key: {authorization}")
        gone = drop | {"host", "content-length", "transfer-encoding", "connection", "keep-alive"}
        headers = [(n, v) for n, v in request.headers.items() if n.lower() not in gone]
        headers += add
        path = request.path
        if key:
            headers.append(("X-SMG-Routing-Key", key(request)))
            path = path[path.find("/v1/") :]
        upstream = next(turn) if request.method == "POST" else upstreams[0]
        url = upstream.with_path(path)
        said = body(await request.read(), request)
        async with request.app[CLIENT].request(
            request.method, url, headers=headers, data=said
        ) as answer:
            kept = [(n, v) for n, v in answer.headers.items() if n.lower() not in gone]
            response = web.StreamResponse(status=answer.status, headers=CIMultiDict(kept))
            await response.prepare(request)
            async for chunk in answer.content.iter_any():
                await response.write(chunk)
            return response

    app = web.Application()
    app.cleanup_ctx.append(client)
    app.router.add_route("*", "/{path:.*}", forward)
    return app


@contextmanager
def in_background(manager: AbstractAsyncContextManager[T]) -> Iterator[T]:
    """Hold ``manager`` open in another thread, because the command needs the main thread."""
    entered: Future[tuple[T, asyncio.AbstractEventLoop, asyncio.Event]] = Future()

    async def hold() -> None:
        async with manager as value:
            end = asyncio.Event()
            entered.set_result((value, asyncio.get_running_loop(), end))
            await end.wait()

    with ThreadPoolExecutor(1) as thread:
        held = thread.submit(asyncio.run, hold())
        either: tuple[Future[Any], ...] = (entered, held)
        wait(either, return_when=FIRST_COMPLETED)
        if not entered.done():
            held.result()  # raises the error
        value, loop, end = entered.result()
        try:
            yield value
        finally:
            loop.call_soon_threadsafe(end.set)
            held.result()
