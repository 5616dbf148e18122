"""A server of another author: one catch-all route, and a ClientSession for each call.

It knows nothing of sessions, of SMG or of the plugin.
"""

import os

from aiohttp import ClientSession, web
from multidict import CIMultiDict
from yarl import URL

NOT_COPIED = {"host", "connection", "content-length", "transfer-encoding"}


def make_app(gateway: URL | None = None) -> web.Application:
    upstream = gateway or URL(os.environ["GATEWAY"])

    async def proxy(request: web.Request) -> web.StreamResponse:
        if request.method == "GET":
            return web.json_response({"pid": os.getpid()})
        headers = CIMultiDict(
            (n, v) for n, v in request.headers.items() if n.lower() not in NOT_COPIED
        )
        url = upstream.with_path(request.path)
        async with (
            ClientSession() as session,
            session.post(url, data=request.content, headers=headers) as answer,
        ):
            response = web.StreamResponse(status=answer.status)
            response.content_type = answer.content_type
            response.headers["X-Pid"] = str(os.getpid())
            await response.prepare(request)
            async for chunk in answer.content.iter_any():
                await response.write(chunk)
            return response

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", proxy)
    return app
