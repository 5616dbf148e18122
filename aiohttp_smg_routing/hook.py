"""The outbound half: the hook puts the key on the call."""

import logging
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from aiohttp import (
    ClientResponse,
    ClientSession,
    TraceConfig,
    TraceRequestRedirectParams,
    TraceRequestStartParams,
    hdrs,
)
from multidict import CIMultiDict
from yarl import URL

from .config import RoutingConfig, as_config
from .context import session_of_call
from .gateway import ROUTING_KEY_HEADER, TARGET_WORKER_HEADER

logger = logging.getLogger(__name__)


class MissingSessionError(LookupError):
    """A call to the gateway has no session, and the config says ``on_missing = "raise"``."""


class RoutingTraceConfig(TraceConfig):
    """A ``TraceConfig`` that knows its config, so that ``attach()`` finds it."""

    def __init__(self, config: RoutingConfig) -> None:
        super().__init__()
        self.config = config


def routing_trace_config(config: RoutingConfig | Mapping[str, Any]) -> TraceConfig:
    """Return a trace config that puts the routing key on each call that ``config`` tags.

    The session is that of the request whose handler makes the call, or of ``routing_session()``.
    A redirect is judged again on every hop. It does nothing where ``config`` is not enabled.

    >>> ClientSession(trace_configs=[routing_trace_config(config)])
    """
    config = as_config(config)
    trace_config = RoutingTraceConfig(config)

    async def on_request_start(
        session: ClientSession, context: SimpleNamespace, params: TraceRequestStartParams
    ) -> None:
        context.routing_header = _tag(config, params.method, params.url, params.headers)

    async def on_request_redirect(
        session: ClientSession, context: SimpleNamespace, params: TraceRequestRedirectParams
    ) -> None:
        if context.routing_header is not None:
            params.headers.popall(context.routing_header, None)
        method, url = _next_hop(params.method, params.url, params.response)
        context.routing_header = _tag(config, method, url, params.headers)

    if config.enabled:
        trace_config.on_request_start.append(on_request_start)
        trace_config.on_request_redirect.append(on_request_redirect)
    return trace_config


def attach(session: ClientSession, config: RoutingConfig | Mapping[str, Any]) -> None:
    """Add the hook of ``routing_trace_config(config)`` to a session that exists already.

    Nothing happens where the session has that hook, or where ``config`` is not enabled.

    >>> attach(app[CLIENT], config)
    """
    config = as_config(config)
    hooks = session.trace_configs
    if not config.enabled or any(
        isinstance(hook, RoutingTraceConfig) and hook.config == config for hook in hooks
    ):
        return
    hook = routing_trace_config(config)
    hook.freeze()  # the session does that in its constructor only
    # A new list: the old one may be the caller's own, and that of other sessions.
    session._trace_configs = [*hooks, hook]


def _tag(config: RoutingConfig, method: str, url: URL, headers: CIMultiDict[str]) -> str | None:
    """Put the key on ``headers`` where the call is to have one, and return the header's name."""
    if not config.tags(method, url):
        return None
    session = session_of_call(method, url)
    if session is None:
        _missing(config, method, url)
        return None
    governing = session.config or config
    # What a client sent, and a naive proxy copied, must not choose the worker: of two keys the
    # gateway takes the first, and an index of a worker outranks them.
    for name in (ROUTING_KEY_HEADER, TARGET_WORKER_HEADER):
        headers.popall(name, None)
    headers[governing.header] = governing.routing_key(session.session_id)
    return governing.header


def _missing(config: RoutingConfig, method: str, url: URL) -> None:
    call = f"{method} {url.origin()}{url.raw_path}"
    if config.on_missing == "raise":
        raise MissingSessionError(
            f"{call} has no session: call it within a request whose session id is found by "
            f"session_id={config.session_id!r}, or within routing_session(...), "
            "or set on_missing = 'pass'"
        )
    if config.on_missing == "warn":
        logger.warning("%s has no session: the gateway may route it to any worker", call)


def _next_hop(method: str, url: URL, response: ClientResponse) -> tuple[str, URL]:
    """Return what the redirect leads to. Only 307 and 308 keep a POST a POST."""
    location = response.headers.get(hdrs.LOCATION) or response.headers.get(hdrs.URI)
    if response.status not in (307, 308) or location is None:
        return hdrs.METH_GET, url
    try:
        return method, url.join(URL(location))
    except ValueError:  # aiohttp is about to raise for it
        return hdrs.METH_GET, url
