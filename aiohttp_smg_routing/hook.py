"""The outbound half: the hook puts the key on the call, and tells the ledger where it went."""

import logging
from collections.abc import Mapping
from itertools import takewhile
from types import SimpleNamespace
from typing import Any, NamedTuple

from aiohttp import (
    ClientResponse,
    ClientSession,
    TraceConfig,
    TraceRequestEndParams,
    TraceRequestExceptionParams,
    TraceRequestRedirectParams,
    TraceRequestStartParams,
    hdrs,
)
from multidict import CIMultiDict
from yarl import URL

from .config import RoutingConfig, as_config
from .context import Scope, scope_of_call
from .gateway import ROUTED_WORKER_HEADER, ROUTING_KEY_HEADER, TARGET_WORKER_HEADER
from .ledger import PinLedger

logger = logging.getLogger(__name__)


class MissingSessionError(LookupError):
    """A call to the gateway has no session, and the config says ``on_missing = "raise"``."""


class Call(NamedTuple):
    """A call to the gateway that is under way."""

    header: str | None
    """The header that carries its key; None where it has no session."""
    key: str
    """How the ledger names its session."""
    pins: PinLedger | None
    number: int


class RoutingTraceConfig(TraceConfig):
    """The hook: a ``TraceConfig`` that knows its routing config and the ledger of its app."""

    def __init__(self, config: RoutingConfig, pins: PinLedger | None) -> None:
        super().__init__()
        self.config = config
        self.pins = pins
        if config.enabled:
            self.on_request_start.append(self._start)
            self.on_request_redirect.append(self._redirect)
            self.on_request_end.append(self._end)
            self.on_request_exception.append(self._exception)

    async def _start(
        self, session: ClientSession, context: SimpleNamespace, params: TraceRequestStartParams
    ) -> None:
        context.call = self._begin(session, params.method, params.url, params.headers)

    async def _redirect(
        self, session: ClientSession, context: SimpleNamespace, params: TraceRequestRedirectParams
    ) -> None:
        hop = _next_hop(session, params.method, params.url, params.response)
        if hop is None:
            return
        if context.call and context.call.header:
            params.headers.popall(context.call.header, None)
        context.call = self._begin(session, *hop, params.headers)

    async def _end(
        self, session: ClientSession, context: SimpleNamespace, params: TraceRequestEndParams
    ) -> None:
        # Taken: another hook's error, after this one has run, is not a second outcome.
        call: Call | None = context.call
        context.call = None
        if call is None or call.pins is None:
            return
        if params.response.status >= 400:
            call.pins.count("failed")
        elif call.header is None:
            call.pins.count("untagged")
        else:
            worker = params.response.headers.get(ROUTED_WORKER_HEADER) or None
            call.pins.answered(call.key, worker, call.number)

    async def _exception(
        self, session: ClientSession, context: SimpleNamespace, params: TraceRequestExceptionParams
    ) -> None:
        if context.call and context.call.pins:
            context.call.pins.count("failed")

    def _begin(
        self, session: ClientSession, method: str, url: URL, headers: CIMultiDict[str]
    ) -> Call | None:
        """Put the key on ``headers`` where the call is to have one."""
        if not (self.config.tags(method, url) and self._decides(session, method, url)):
            return None
        scope = scope_of_call(method, url) or Scope(None)
        config = scope.config or self.config
        pins = self.pins if scope.config is None and scope.pins is None else scope.pins
        if pins and not pins.config.track_sessions:
            pins = None
        if scope.session_id is None:
            if pins:
                pins.missing()
            _missing(config, method, url)
            return Call(None, "", pins, 0)
        # What a client sent, and a naive proxy copied, must not choose the worker: of two keys the
        # gateway takes the first, and an index of a worker outranks them.
        for name in (ROUTING_KEY_HEADER, TARGET_WORKER_HEADER):
            headers.popall(name, None)
        headers[config.header] = key = config.routing_key(scope.session_id)
        if pins is None:
            return Call(config.header, key, None, 0)
        if pins.config is not config:
            key = pins.config.routing_key(scope.session_id)
        return Call(config.header, key, pins, pins.start())

    def _decides(self, session: ClientSession, method: str, url: URL) -> bool:
        """Tell whether no hook before this one has the call: it is tagged and counted once."""
        before = takewhile(lambda hook: hook is not self, session.trace_configs)
        return not any(
            isinstance(hook, RoutingTraceConfig) and hook.config.tags(method, url)
            for hook in before
        )


def routing_trace_config(
    config: RoutingConfig | Mapping[str, Any], pins: PinLedger | None = None
) -> TraceConfig:
    """Return a trace config that puts the routing key on each call that ``config`` tags.

    The session is that of the request whose handler makes the call, or of ``routing_session()``.
    A redirect is judged again on every hop. It does nothing where ``config`` is not enabled.
    A call within a request of an app is entered in that app's ledger, any other in ``pins``.

    >>> ClientSession(trace_configs=[routing_trace_config(config)])
    """
    return RoutingTraceConfig(as_config(config), pins)


def attach(
    session: ClientSession,
    config: RoutingConfig | Mapping[str, Any],
    pins: PinLedger | None = None,
) -> None:
    """Add the hook of ``routing_trace_config(config, pins)`` to a session that exists already.

    Nothing is added where the session has that hook, or where ``config`` is not enabled.

    >>> attach(app[CLIENT], config)
    """
    config = as_config(config)
    if not config.enabled:
        return
    for there in session.trace_configs:
        if isinstance(there, RoutingTraceConfig) and there.config == config:
            there.pins = there.pins or pins
            return
    hook = routing_trace_config(config, pins)
    hook.freeze()  # the session does that in its constructor only
    # A new list: the old one may be the caller's own, and that of other sessions.
    session._trace_configs = [*session.trace_configs, hook]


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


def _next_hop(
    session: ClientSession, method: str, url: URL, response: ClientResponse
) -> tuple[str, URL] | None:
    """Return what a redirect leads to; None where it leads nowhere, and the caller gets it."""
    location = response.headers.get(hdrs.LOCATION) or response.headers.get(hdrs.URI)
    if location is None:
        return None
    if response.status not in (307, 308):
        return hdrs.METH_GET, url  # the others make a GET of a POST
    try:
        return method, url.join(URL(location, encoded=not session.requote_redirect_url))
    except ValueError:  # aiohttp is about to raise for it
        return hdrs.METH_GET, url
