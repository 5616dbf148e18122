"""The server of ``unedited.py``, started with the plugin.

python -m tests.recipes.pinned GATEWAY PORT    or   gunicorn tests.recipes.pinned:gunicorn_app
"""

import asyncio
import os
import sys

from aiohttp import web

from aiohttp_smg_routing import setup

from . import unedited


def make_app() -> web.Application:
    app = unedited.make_app()
    setup(
        app,
        {"gateway": os.environ["GATEWAY"], "instrument": True, "session_id": "json:user"},
    )
    return app


async def gunicorn_app() -> web.Application:
    """Return the app, from a coroutine function because gunicorn calls nothing else."""
    return make_app()


def main(gateway: str, loop: str, port: str) -> None:
    os.environ["GATEWAY"] = gateway
    new_loop = asyncio.new_event_loop
    if loop == "uvloop":
        from uvloop import new_event_loop as new_loop
    web.run_app(make_app(), host="127.0.0.1", port=int(port), loop=new_loop(), print=None)


if __name__ == "__main__":
    main(*sys.argv[1:])
