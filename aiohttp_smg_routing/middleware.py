"""The inbound half: the request's session enters the context."""

from collections.abc import Awaitable, Mapping
from typing import Any

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from .config import RoutingConfig, as_config
from .context import Scope, enter_scope
from .ledger import PinLedger
from .source import SessionIdFinder
from .values import several

# Nested apps run a middleware each for one request: what the outer one found is kept on the
# request, not looked up in the context, which may hold the session of whoever started the server.
_request_key: Any = getattr(web, "RequestKey", lambda name, _: name)  # aiohttp 3.14+
_SCOPE = _request_key("aiohttp_smg_routing", Scope)


def routing_middleware(
    config: RoutingConfig | Mapping[str, Any], pins: PinLedger | None = None
) -> Middleware:
    """Return the middleware alone, for an app that doesn't use ``setup()``.

    It looks for the session id where ``config.session_id`` says and puts it in the context of the
    request. A request without one passes unchanged, as does every request where ``config`` is not
    enabled. Calls to the gateway within a request are entered in ``pins``.

    >>> app = web.Application(middlewares=[routing_middleware(config)])
    """
    config = as_config(config)
    find_session_id = SessionIdFinder(several(config.session_id)).find

    def enter(request: web.Request, session_id: str | None) -> None:
        scope = Scope(session_id, config, pins, request.get(_SCOPE))
        request[_SCOPE] = scope
        enter_scope(scope)

    async def find_first(
        request: web.Request, handler: Handler, found: Awaitable[str | None]
    ) -> web.StreamResponse:
        enter(request, await found)
        return await handler(request)

    # No coroutine of its own where it has nothing to wait for: each chunk of a streamed answer
    # would wake it on the way to the handler.
    @web.middleware
    def middleware(request: web.Request, handler: Handler) -> Awaitable[web.StreamResponse]:
        if not config.enabled:
            return handler(request)
        found = find_session_id(request)
        if found is not None and not isinstance(found, str):
            return find_first(request, handler, found)
        enter(request, found)
        return handler(request)

    return middleware
