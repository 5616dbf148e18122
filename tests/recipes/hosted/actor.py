"""A server that is a Ray actor: its app is made and run in a method.

python actor.py --port PORT --upstream URL    It ends with its standard input.
"""

import argparse
import json
import os
import sys
from typing import Any

import httpx
import ray
from aiohttp import web


class Server:
    async def start(self, upstream: str, port: int) -> None:
        self.upstream = upstream
        app = web.Application()
        app.router.add_post("/sessions/{session_id}/chat", self.chat)
        self.runner = web.AppRunner(app)
        await self.runner.setup()
        await web.TCPSite(self.runner, "127.0.0.1", port).start()

    async def chat(self, request: web.Request) -> web.Response:
        async with httpx.AsyncClient(timeout=600) as client:
            url = f"{self.upstream}/v1/chat/completions"
            answer = await client.post(url, json=await request.json())
        return web.json_response(answer.json(), status=answer.status_code)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int)
    parser.add_argument("--upstream")
    given = parser.parse_args()
    ray.init(**json.loads(os.environ["RAY_INIT"]))
    server: Any = ray.remote(Server).remote()
    ray.get(server.start.remote(given.upstream, given.port))
    sys.stdin.read()
    ray.shutdown()


if __name__ == "__main__":
    main()
