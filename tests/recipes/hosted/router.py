"""A router that runs in its own thread and calls with httpx.

python router.py --port PORT --upstream URL
"""

import argparse
import threading

import httpx
from aiohttp import web


class Router(threading.Thread):
    def __init__(self, upstream: str, port: int) -> None:
        super().__init__(daemon=True)
        self.upstream, self.port = upstream, port

    async def chat_completions(self, request: web.Request) -> web.Response:
        async with httpx.AsyncClient(timeout=600) as client:
            answer = await client.post(self.upstream + request.path, json=await request.json())
        return web.json_response(answer.json(), status=answer.status_code)

    def run(self) -> None:
        app = web.Application()
        app.router.add_post("/v1/chat/completions", self.chat_completions)
        web.run_app(app, host="127.0.0.1", port=self.port, handle_signals=False, print=None)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int)
    parser.add_argument("--upstream")
    given = parser.parse_args()
    router = Router(given.upstream, given.port)
    router.start()
    router.join()
