"""The inbound half: the request's session enters the context."""

from collections.abc import Mapping
from typing import Any

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from .config import RoutingConfig, as_config
from .context import Scope, enter_scope
from .ledger import PinLedger
from .source import SessionIdFinder
from .values import request_key, several

# Nested apps run a middleware each for one request: what the outer one found is kept on the
# request, not looked up in the context, which may hold the session of whoever started the server.
_SCOPE = request_key("aiohttp_smg_routing", Scope)


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
    find_session_id = SessionIdFinder(
        several(config.session_id),
        several(config.ignore_ids),
        conceal=config.key == "digest",
    ).find

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        if config.enabled:
            found = find_session_id(request)
            session_id = found if found is None or isinstance(found, str) else await found
            scope = Scope(session_id, config, pins, request.get(_SCOPE))
            request[_SCOPE] = scope
            enter_scope(scope)
        return await handler(request)

    return middleware
