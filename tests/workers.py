"""Workers behind the real gateway: plain aiohttp servers that note who called.

python -m tests.workers PORT    one of them as a process, which can be killed
"""

import json
import sys
from asyncio.subprocess import Process
from collections import defaultdict
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field

from aiohttp import ClientSession, web
from yarl import URL

from aiohttp_smg_routing.testing import child_process, free_port

MODEL = "stub"


@dataclass
class Workers:
    """The workers' addresses, and for each session (the request's ``user``) who served it."""

    urls: list[URL] = field(default_factory=list)
    served: defaultdict[str, list[URL]] = field(default_factory=lambda: defaultdict(list))
    keys: defaultdict[str, set[str | None]] = field(default_factory=lambda: defaultdict(set))


def chat(session_id: str, turn: int = 1) -> Mapping[str, object]:
    """Return the body of a turn: the conversation so far, and whose it is."""
    messages = [{"role": "user", "content": f"turn {number}"} for number in range(turn)]
    return {"model": MODEL, "user": session_id, "messages": messages}


def _worker(workers: Workers) -> web.Application:
    async def health(request: web.Request) -> web.Response:
        return web.Response()

    async def models(request: web.Request) -> web.Response:
        model = {"id": MODEL, "object": "model", "owned_by": "vllm", "root": MODEL}
        return web.json_response({"object": "list", "data": [{**model, "max_model_len": 4096}]})

    async def completions(request: web.Request) -> web.Response:
        session_id = json.loads(await request.read())["user"]
        assert request.transport is not None
        host, port = request.transport.get_extra_info("sockname")
        workers.served[session_id].append(URL(f"http://{host}:{port}"))
        workers.keys[session_id].add(request.headers.get("X-SMG-Routing-Key"))
        message = {"role": "assistant", "content": "ok"}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        head = {"id": "c", "object": "chat.completion", "created": 1, "model": MODEL}
        usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        return web.json_response({**head, "choices": [choice], "usage": usage})

    app = web.Application()
    app.router.add_get("/health", health)
    app.router.add_get("/v1/models", models)
    app.router.add_post("/v1/chat/completions", completions)
    return app


@asynccontextmanager
async def stub_workers(count: int) -> AsyncIterator[Workers]:
    workers = Workers()
    async with AsyncExitStack() as stack:
        for _ in range(count):
            runner = web.AppRunner(_worker(workers), access_log=None, shutdown_timeout=1)
            await runner.setup()
            stack.push_async_callback(runner.cleanup)
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            host, port = runner.addresses[0]
            workers.urls.append(URL(f"http://{host}:{port}"))
        yield workers


@asynccontextmanager
async def worker_processes(count: int) -> AsyncIterator[dict[URL, Process]]:
    async with AsyncExitStack() as stack:
        session = await stack.enter_async_context(ClientSession())
        processes = {}
        for _ in range(count):
            url = URL(f"http://127.0.0.1:{free_port()}")

            async def ready(url: URL = url) -> bool:
                async with session.get(url / "health") as response:
                    return response.ok

            argv = (sys.executable, "-m", "tests.workers", str(url.port))
            processes[url] = await stack.enter_async_context(child_process(*argv, ready=ready))
        yield processes


if __name__ == "__main__":
    web.run_app(
        _worker(Workers()), host="127.0.0.1", port=int(sys.argv[1]), access_log=None, print=None
    )
