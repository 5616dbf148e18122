"""The inbound half: the request's session enters the context."""

from collections.abc import Mapping
from typing import Any

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from .config import RoutingConfig, as_config, as_tuple
from .context import RoutedSession, enter_session
from .source import session_id_finder

# Nested apps run a middleware each for one request: what the outer one found is kept on the
# request, not looked up in the context, which may hold the session of whoever started the server.
_request_key: Any = getattr(web, "RequestKey", lambda name, _: name)  # aiohttp 3.14+
_SESSION = _request_key("aiohttp_smg_routing", RoutedSession)


def routing_middleware(config: RoutingConfig | Mapping[str, Any]) -> Middleware:
    """Return the middleware alone, for an app that doesn't use ``setup()``.

    It looks for the session id where ``config.session_id`` says and puts it in the context of the
    request. A request without one passes unchanged, as does every request where ``config`` is not
    enabled.

    >>> app = web.Application(middlewares=[routing_middleware(config)])
    """
    config = as_config(config)
    find_session_id = session_id_finder(as_tuple(config.session_id))

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        if config.enabled:
            session = request.get(_SESSION)
            session_id = await find_session_id(request)
            if session_id is not None:
                session = request[_SESSION] = RoutedSession(session_id, config, session)
            enter_session(session)
        return await handler(request)

    return middleware
