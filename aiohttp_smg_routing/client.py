"""The outbound half: the hook puts the key on the call, and tells the ledger who answered."""

import logging
import threading
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from types import SimpleNamespace
from typing import Any
from weakref import ref

from aiohttp import (
    ClientResponse,
    TraceConfig,
    TraceRequestEndParams,
    TraceRequestExceptionParams,
    TraceRequestRedirectParams,
    TraceRequestStartParams,
    hdrs,
)
from aiohttp.client import ClientSession
from multidict import CIMultiDict
from yarl import URL

from . import compat
from .context import Scope, current_scope
from .gateway import TARGET_WORKER_HEADER, path_of, server_of
from .ledger import PendingCall
from .log import say
from .rules import Rules

logger: logging.Logger = logging.getLogger(__name__)


class Sending:
    """A call of an httpx client. Its transport may send it by another client, such as aiohttp's."""

    def __init__(self, url: URL) -> None:
        self.url: URL = url
        self.scope: Scope | None = current_scope()
        self.header: str = ""  # empty if it carries no key
        self.key: str = ""
        self.is_over: bool = False

    def has_within(self, url: URL, headers: Mapping[str, str]) -> bool:
        """Tell whether a call that starts during this one is the same call, passed on.

        Its key shows it, because the code that yields the body may make a call to the same URL. The
        headers of an agent, which that code may have copied, do not.
        """
        if self.is_over or _place(url) != _place(self.url) or current_scope() is not self.scope:
            return False
        if not self.header:
            return True
        return headers.get(self.header) == self.key and TARGET_WORKER_HEADER not in headers


def _place(url: URL) -> tuple[object, str]:
    return server_of(url), path_of(url)


#: The call that an httpx client sends in this context, so that it is judged and counted only once.
#: Its transport and its body may also make other calls, and start tasks that make them later.
under_way: ContextVar[Sending | None] = ContextVar("aiohttp_smg_routing_under_way", default=None)


#: The redirect for whose next hop a hook has just set a header, and that header. The hook of the
#: hop before, which may come later in the list, must not take it off as its own.
_just_set: "ContextVar[tuple[ref[ClientResponse] | None, str]]" = ContextVar(
    "aiohttp_smg_routing_just_set", default=(None, "")
)


class Hook(TraceConfig):
    """A ``TraceConfig`` that puts the key on calls to its gateways, and leaves others alone.

    It must be the last to change headers. A later hook or client middleware that copies inbound
    headers may add a second key, or replace this one.
    """

    def __init__(self, *targets: Rules) -> None:
        super().__init__()
        self.targets = targets
        self.on_request_start.append(self._start)
        self.on_request_redirect.append(self._redirect)
        self.on_request_end.append(self._end)
        self.on_request_exception.append(self._exception)

    async def _start(
        self,
        session: ClientSession,
        context: SimpleNamespace,
        params: "TraceRequestStartParams | _Hop",
    ) -> None:
        context.call = None
        method, url = params.method, params.url
        sending = under_way.get()
        if sending and sending.has_within(url, params.headers):
            return
        targets = self.targets  # read once: another thread may change it
        for rules in targets:
            gateway = rules.exact.get((method, url.scheme, url.raw_authority, url.raw_path))
            if gateway is None:
                gateway = rules.gateway_of(method, url)
            if gateway is not None:
                there = compat.hooks(session)
                if (there and there[0] is self) or not _claimed(there, method, url, before=self):
                    context.call = rules.begin(gateway, method, url, params.headers)
                return
        if targets and method.upper() == hdrs.METH_POST:
            hooks = compat.hooks(session)
            ours = [hook for hook in hooks if isinstance(hook, Hook) and hook.targets]
            if ours and ours[0] is self and not _claimed(ours, method, url):
                targets[0].note_unmatched(method, url)

    async def _redirect(
        self, session: ClientSession, context: SimpleNamespace, params: TraceRequestRedirectParams
    ) -> None:
        hop = _next_hop(session, params.method, params.url, params.response, params.headers)
        if hop is None:
            return
        call: PendingCall | None = context.call
        redirect, header = _just_set.get()
        is_set = redirect is not None and redirect() is params.response
        if call and not (is_set and header == call.header.lower()):
            params.headers.popall(call.header, None)
        await self._start(session, context, hop)
        if context.call:
            _just_set.set((ref(params.response), context.call.header.lower()))
        elif call and call.header and hop.method != hdrs.METH_GET:
            targets = self.targets  # none if the app has ended meanwhile
            if targets and not _claimed(compat.hooks(session), hop.method, hop.url):
                targets[0].note_redirected(hop.method, params.url, hop.url)

    async def _end(
        self, session: ClientSession, context: SimpleNamespace, params: TraceRequestEndParams
    ) -> None:
        call: PendingCall | None = context.call
        # Cleared, so that an error in a later hook does not count as a second outcome.
        context.call = None
        if call:
            call.ledger.answered(call, params.response.status, params.response.headers)

    async def _exception(
        self, session: ClientSession, context: SimpleNamespace, params: TraceRequestExceptionParams
    ) -> None:
        if context.call:
            context.call.ledger.count("failed")


class _Hop(SimpleNamespace):
    """The call that a redirect leads to."""

    method: str
    url: URL
    headers: "CIMultiDict[str]"


def _claimed(
    there: Iterable[TraceConfig], method: str, url: URL, *, before: Hook | None = None
) -> bool:
    """Tell whether a hook in the list, up to ``before``, takes a call. Only one may tag it."""
    for hook in there:
        if hook is before:
            break
        if isinstance(hook, Hook) and any(it.gateway_of(method, url) for it in hook.targets):
            return True
    return False


def _next_hop(
    session: ClientSession,
    method: str,
    url: URL,
    response: ClientResponse,
    headers: "CIMultiDict[str]",
) -> _Hop | None:
    """Return the call that a redirect leads to, or None if the caller gets the redirect."""
    location = response.headers.get(hdrs.LOCATION) or response.headers.get(hdrs.URI)
    if location is None:
        return None
    if response.status not in (307, 308):  # others turn a POST into a GET
        return _Hop(method=hdrs.METH_GET, url=url, headers=headers)
    try:
        url = url.join(URL(location, encoded=not session.requote_redirect_url))
    except ValueError:  # aiohttp is about to raise this error
        method = hdrs.METH_GET
    return _Hop(method=method, url=url, headers=headers)


def takes_hook(value: object, place: str) -> bool:
    """Tell whether a value is a ClientSession, or a mock of one in a user's tests."""
    if compat.is_client_session(value):
        return True
    is_mock = isinstance(value, ClientSession) or type(value).__module__ == "unittest.mock"
    if is_mock:
        say(logger, logging.WARNING, "%s: a %s takes no hook", place, type(value).__name__)
    return is_mock


def attach(session: ClientSession, hook: Hook) -> None:
    """Add a hook to a session that exists already, unless it has the hook."""
    if not any(there is hook for there in compat.hooks(session)):
        compat.add_hook(session, hook)


# One hook for all routings that use instrument(), so that a ClientSession that a library keeps for
# the whole process also serves an app that starts later.
every: Hook = Hook()
_lock = threading.RLock()
_layer: Any = None


def instrument(rules: Rules) -> Callable[[], None]:
    """Put a hook on every ``ClientSession`` that is made from now on; return what undoes it."""
    global _layer
    with _lock:
        # A new tuple, because calls in other threads iterate over the old one. Those that raise
        # come last: a call outside any request raises only if all routings ask for that.
        targets = (*every.targets, rules)
        every.targets = tuple(sorted(targets, key=lambda it: it.config.on_missing == "raise"))
        _layer = compat.wrap_constructor(_made, _layer)

    def undo() -> None:
        global _layer
        with _lock:
            left = list(every.targets)
            left.remove(rules)
            every.targets = tuple(left)
            if not left and compat.unwrap_constructor(_layer):
                _layer = None

    return undo


def attach_every(session: ClientSession) -> None:
    """Put the hook of ``instrument()`` on a session that exists already."""
    attach(session, every)


def _made(session: ClientSession) -> None:
    if every.targets:
        attach(session, every)
