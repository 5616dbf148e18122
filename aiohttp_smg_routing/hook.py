"""The outbound half: the hook puts the key on the call, and tells the ledger where it went."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

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

from .call import Call, answered, begin, failed
from .config import RoutingConfig, as_config
from .ledger import PinLedger


@dataclass(slots=True, eq=False)
class Target:
    """A config whose calls a hook tags, and the ledger that takes those outside any request."""

    config: RoutingConfig
    pins: PinLedger | None


class RoutingTraceConfig(TraceConfig):
    """The hook: a ``TraceConfig`` that knows whose calls it tags."""

    def __init__(self, *targets: Target) -> None:
        super().__init__()
        self.targets = [*targets]
        self.on_request_start.append(self._start)
        self.on_request_redirect.append(self._redirect)
        self.on_request_end.append(self._end)
        self.on_request_exception.append(self._exception)

    def target(self, method: str, url: URL) -> Target | None:
        """Return the first target whose config tags a call."""
        for target in self.targets:
            if target.config.tags(method, url):
                return target
        return None

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
        if context.call:
            header, *_ = context.call
            params.headers.popall(header, None)
        context.call = self._begin(session, *hop, params.headers)

    async def _end(
        self, session: ClientSession, context: SimpleNamespace, params: TraceRequestEndParams
    ) -> None:
        # Taken: another hook's error, after this one has run, is not a second outcome.
        call: Call | None = context.call
        context.call = None
        if call:
            answered(call, params.response)

    async def _exception(
        self, session: ClientSession, context: SimpleNamespace, params: TraceRequestExceptionParams
    ) -> None:
        if context.call:
            failed(context.call)

    def _begin(
        self, session: ClientSession, method: str, url: URL, headers: CIMultiDict[str]
    ) -> Call | None:
        target = self.target(method, url)
        if target is None:
            return None
        if hooks(session)[0] is not self and is_claimed(session, method, url, before=self):
            return None
        return begin(target.config, target.pins, method, url, headers)


def is_claimed(
    session: ClientSession, method: str, url: URL, *, before: TraceConfig | None = None
) -> bool:
    """Tell whether a hook of ``session`` has the call: it is tagged and counted once."""
    for hook in hooks(session):
        if hook is before:
            break
        if isinstance(hook, RoutingTraceConfig) and hook.target(method, url):
            return True
    return False


def routing_trace_config(
    config: RoutingConfig | Mapping[str, Any], pins: PinLedger | None = None
) -> TraceConfig:
    """Return a trace config that puts the routing key on each call that ``config`` tags.

    The session is that of the request whose handler makes the call, or of ``routing_session()``.
    A redirect is judged again on every hop. It does nothing where ``config`` is not enabled.
    A call within a request of an app is entered in that app's ledger, any other in ``pins``.

    >>> ClientSession(trace_configs=[routing_trace_config(config)])
    """
    config = as_config(config)
    return RoutingTraceConfig(Target(config, pins)) if config.enabled else TraceConfig()


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
    for there in hooks(session):
        if type(there) is RoutingTraceConfig:  # not that of instrument(), which is undone
            for target in there.targets:
                if target.config == config:
                    target.pins = target.pins or pins
                    return
    add_hook(session, routing_trace_config(config, pins))


def add_hook(session: ClientSession, hook: TraceConfig) -> None:
    """Add a hook to a session that exists already."""
    hook.freeze()  # the session does that in its constructor only
    # A new list: the old one may be the caller's own, and that of other sessions.
    session._trace_configs = [*hooks(session), hook]


def hooks(session: ClientSession) -> list[TraceConfig]:
    """Return what a session has for its calls; a subclass may show something else to others."""
    return session._trace_configs


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
