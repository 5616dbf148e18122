"""A load balancer: it tries each of its backends in turn until one answers.

python -m balancer --port PORT BACKEND ...
"""

import argparse
from collections.abc import AsyncIterator
from contextlib import suppress

from aiohttp import ClientError, ClientSession, web


class Balancer:
    def __init__(self, backends: list[str]) -> None:
        self.backends = backends
        self.session: ClientSession

    async def running(self, _: web.Application) -> AsyncIterator[None]:
        async with ClientSession() as self.session:
            yield

    async def chat_completions(self, request: web.Request) -> web.Response:
        body = await request.json()
        for backend in self.backends:
            with suppress(ClientError):
                async with self.session.post(backend + request.path, json=body) as answer:
                    if answer.status < 500:
                        return web.json_response(await answer.json(), status=answer.status)
        return web.Response(status=502)

    def app(self) -> web.Application:
        app = web.Application()
        app.cleanup_ctx.append(self.running)
        app.router.add_post("/v1/chat/completions", self.chat_completions)
        return app


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int)
    parser.add_argument("backends", nargs="+")
    given = parser.parse_args()
    web.run_app(Balancer(given.backends).app(), host="127.0.0.1", port=given.port, print=None)
