"""The hook alone: calls that aiohttp would make, from their start to their end, without a network.

It uses the public names of the package, and nothing else of this folder: make micro runs it on
earlier commits too.
"""

from collections.abc import Coroutine
from types import SimpleNamespace
from typing import Any, cast

from aiohttp import ClientResponse, ClientSession, TraceRequestEndParams, TraceRequestStartParams
from multidict import CIMultiDict
from yarl import URL

from aiohttp_smg_routing import Routing

HEADERS = {"Accept": "*/*", "Content-Type": "application/json"}
WORKER = "http://10.0.0.2:8000"


class Calls:
    """Takes calls through the hook of a routing, each in the session of the running code."""

    def __init__(self, routing: Routing) -> None:
        self._hook = routing.trace_config()
        self._hook.freeze()
        hooks = [self._hook]
        self._session = cast(
            "ClientSession", SimpleNamespace(trace_configs=hooks, _trace_configs=hooks)
        )

    def call(self, url: URL, worker: str = WORKER) -> None:
        """Start a call and answer it by the worker."""
        done(self._call(url, worker))

    async def _call(self, url: URL, worker: str) -> None:
        context, headers = SimpleNamespace(), CIMultiDict({"Host": url.authority, **HEADERS})
        # aiohttp passes a new URL object, with its own text, to the hook for each call.
        url = url.update_query(None)
        start = TraceRequestStartParams("POST", url, headers)
        await self._hook.on_request_start.send(self._session, context, start)
        head = CIMultiDict({"X-SMG-Routed-Worker-Id": worker.encode().decode()})
        response = cast("ClientResponse", SimpleNamespace(status=200, headers=head))
        end = TraceRequestEndParams("POST", url, headers, response)
        await self._hook.on_request_end.send(self._session, context, end)


def done(coroutine: Coroutine[Any, Any, Any]) -> None:
    """Run a coroutine that never waits to its end, without an event loop."""
    try:
        coroutine.send(None)
    except StopIteration:
        return
    raise RuntimeError("it waits for something")
