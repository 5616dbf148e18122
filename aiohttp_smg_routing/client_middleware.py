"""The outbound half for who counts microseconds: the hook's decision, without a trace."""

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import aiohttp
from aiohttp import ClientRequest, ClientResponse, hdrs

from .call import answered, begin, failed
from .config import RoutingConfig, as_config
from .hook import is_claimed
from .ledger import PinLedger

ClientHandler = Callable[[ClientRequest], Awaitable[ClientResponse]]
ClientMiddleware = Callable[[ClientRequest, ClientHandler], Awaitable[ClientResponse]]


def routing_client_middleware(
    config: RoutingConfig | Mapping[str, Any], pins: PinLedger | None = None
) -> ClientMiddleware:
    """Return a client middleware that does what ``routing_trace_config(config, pins)`` does.

    It saves what aiohttp spends on any trace config. A ``middlewares=`` of one call replaces those
    of its session, and then the call goes out without a key: that is why the trace config is the
    default. Where a session has both, the trace config has the call; a second client middleware
    of these on one session would tag and count it again. A redirect is not entered in the ledger,
    since a middleware can't tell whether it is followed.

    Raises ``RuntimeError`` where aiohttp is older than 3.12, which has no client middlewares.

    >>> ClientSession(middlewares=[routing_client_middleware(config)])
    """
    if not hasattr(aiohttp, "ClientMiddlewareType"):
        raise RuntimeError(
            f"client middlewares need aiohttp 3.12 or newer, and this is {aiohttp.__version__}: "
            "use routing_trace_config(config)"
        )
    config = as_config(config)

    async def middleware(request: ClientRequest, handler: ClientHandler) -> ClientResponse:
        method, url = request.method, request.url
        if not config.tags(method, url) or is_claimed(request.session, method, url):
            return await handler(request)
        call = begin(config, pins, method, url, request.headers)
        try:
            response = await handler(request)
        except BaseException:
            failed(call)
            raise
        if not _is_redirect(response):
            answered(call, response)
        return response

    return middleware


def _is_redirect(response: ClientResponse) -> bool:
    """Tell whether aiohttp makes a call of its own of the answer: that one counts."""
    return response.status in (301, 302, 303, 307, 308) and (
        hdrs.LOCATION in response.headers or hdrs.URI in response.headers
    )
