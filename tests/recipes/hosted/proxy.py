"""A proxy whose main() makes its app and runs it.

python proxy.py --listen HOST:PORT --target URL
"""

import argparse

from aiohttp import ClientSession, web


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--listen")
    parser.add_argument("--target")
    given = parser.parse_args()

    async def forward(request: web.Request) -> web.StreamResponse:
        async with (
            ClientSession() as session,
            session.post(
                given.target + request.path,
                data=request.content,
                headers={"Content-Type": request.content_type},
            ) as answer,
        ):
            response = web.StreamResponse(status=answer.status)
            response.content_type = answer.content_type
            await response.prepare(request)
            async for chunk in answer.content.iter_any():
                await response.write(chunk)
            return response

    app = web.Application()
    app.router.add_post("/{path:.*}", forward)
    host, port = given.listen.split(":")
    web.run_app(app, host=host, port=int(port), print=None)


if __name__ == "__main__":
    main()
