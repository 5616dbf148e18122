"""The outbound half for httpx, and for httpx2, which current SDKs import."""

import importlib.util
import logging
import sys
import threading
import weakref
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from aiohttp import hdrs
from multidict import CIMultiDict
from yarl import URL

from . import client, compat
from .context import current_scope
from .gateway import ROUTING_KEY_HEADER, TARGET_WORKER_HEADER, path_of
from .ledger import PendingCall
from .log import say
from .rules import Rules

logger: logging.Logger = logging.getLogger(__name__)

#: The extension that keeps the hop of a request. httpx passes it on to the next hop of a redirect.
_EXTENSION = "aiohttp_smg_routing"


class _Judged(client.Sending):
    """A request that has been judged: one hop of a call."""

    def __init__(self, hook: "HttpxHook", request: Any, url: URL) -> None:
        super().__init__(url)
        self.hook, self.request = hook, weakref.ref(request)
        self.call: PendingCall | None = None  # until its outcome is counted
        self.headers: Any = None  # those that are sent instead of the request's

    def end(self, response: Any) -> None:
        """Count the outcome of the request; it is a failure if there is no response."""
        call, self.call = self.call, None
        if call and response is None:
            call.ledger.count("failed")
        elif call:
            call.ledger.answered(call, response.status_code, response.headers)


class HttpxHook:
    """Does for the requests of httpx what a hook does for the calls of a ``ClientSession``."""

    def __init__(self, hook: client.Hook) -> None:
        self._hook = hook

    def event_hooks(self) -> dict[str, list[Callable[[Any], Any]]]:
        """Return the hooks for a client, which may be sync or async."""

        def request_hook(request: Any) -> _Done:
            self._begin(request, on_copy=False)
            return _DONE

        def response_hook(response: Any) -> _Done:
            hop: _Judged | None = response.request.extensions.get(_EXTENSION)
            if hop:
                hop.end(response)
            return _DONE

        return {"request": [request_hook], "response": [response_hook]}

    def send(self, original: Callable[[Any], Any], request: Any) -> Any:
        """Send a request of a sync client."""
        hop, response = self._begin(request, on_copy=True), None
        if hop is client.under_way.get():
            return original(request)
        with _sending(hop, request) as sent:
            try:
                response = original(sent)
                _restore(request, sent, response)
                return response
            finally:
                hop.end(response)

    async def send_async(self, original: Callable[[Any], Any], request: Any) -> Any:
        """Send a request of an async client."""
        hop, response = self._begin(request, on_copy=True), None
        if hop is client.under_way.get():
            return await original(request)
        with _sending(hop, request) as sent:
            try:
                response = await original(sent)
                _restore(request, sent, response)
                return response
            finally:
                hop.end(response)

    def _begin(self, request: Any, *, on_copy: bool) -> _Judged:
        """Judge a request that is about to leave, unless it has been judged.

        The key goes on the request itself, or ``on_copy``: the caller may send one request in two
        sessions at once.
        """
        method, url = request.method, _url(request)
        sending = client.under_way.get()
        if isinstance(sending, _Judged) and sending.has_within(url, request.headers):
            return sending  # a transport passes it on
        before: _Judged | None = request.extensions.get(_EXTENSION)
        is_again = before is not None and before.request() is request
        is_judged = before and is_again and before.hook is not self and before.call
        # From another scope, it is a new try: the one there has failed.
        if before and is_judged and before.scope is current_scope():
            return before
        hop = _Judged(self, request, url)
        _keep(hop, request)
        if before and before.header and not (is_again and before.headers):
            for name in (before.header, ROUTING_KEY_HEADER, TARGET_WORKER_HEADER):
                request.headers.pop(name, None)
        targets = self._hook.targets  # read once: another thread may change it
        for rules in targets:
            gateway = rules.gateway_of(method, url)
            if gateway is not None:
                headers = request.headers.copy() if on_copy else request.headers
                hop.call = _with_key(rules, gateway, method, url, headers)
                hop.header, hop.key = hop.call.header, hop.call.key
                hop.headers = headers if on_copy and hop.header else None
                return hop
        if targets and method.upper() == hdrs.METH_POST and not is_again:
            targets[0].note_unmatched(method, url)
            if before and before.header:
                targets[0].note_redirected(method, before.url, url)
        return hop


def _url(request: Any) -> URL:
    """Return the URL of a request without its query, its path in the spelling of a gateway's.

    If yarl refuses the host, return the path alone.
    """
    try:
        url = URL(str(request.url), encoded=True)
        return url.with_path(path_of(url), encoded=True)
    except (ValueError, IndexError):  # httpx sends to hosts that yarl refuses; no gateway has one
        return URL.build(path=request.url.path)


def _keep(hop: _Judged, request: Any) -> None:
    request.extensions = {**request.extensions, _EXTENSION: hop}  # the old dict may be the caller's


@contextmanager
def _sending(hop: _Judged, request: Any) -> Iterator[Any]:
    """Return what to send: the request, or a copy of it with the headers of the hop.

    Keep the hop in the context and off what is sent, whose extensions a transport may copy.
    """
    token, sent = client.under_way.set(hop), request
    if hop.headers:  # copy.copy() would lose the stream of the body
        sent = object.__new__(type(request))
        vars(sent).update(vars(request), headers=hop.headers)
    sent.extensions = {it: its for it, its in request.extensions.items() if it != _EXTENSION}
    try:
        yield sent
    except Exception as error:
        _restore(request, sent, error)
        raise
    finally:
        vars(request).update(vars(sent), headers=request.headers)  # a transport may read the body
        _keep(hop, request)
        hop.is_over = True
        with suppress(ValueError):  # garbage collection runs in any context
            client.under_way.reset(token)


def _restore(request: Any, sent: Any, outcome: Any) -> None:
    """Make a response or an error name the request of the caller, not what was sent."""
    with suppress(AttributeError, RuntimeError):  # most errors have none
        if outcome.request is sent:
            outcome.request = request


class _Done:
    """A result that an async client awaits and a sync client ignores."""

    def __await__(self) -> Generator[None, None, None]:
        yield from ()


_DONE = _Done()


def _with_key(rules: Rules, gateway: str, method: str, url: URL, headers: Any) -> PendingCall:
    before = CIMultiDict(
        (name.decode("latin-1"), value.decode("latin-1")) for name, value in headers.raw
    )
    after = before.copy()
    call = rules.begin(gateway, method, url, after)
    # In place, because an auth flow may hold the object, and only what differs, because others may
    # send it now.
    for name in before:
        if name not in after:
            headers.pop(name, None)
    headers.update(
        [
            (name.encode("latin-1"), value.encode("latin-1"))
            for name, value in after.items()
            if after.getall(name) != before.getall(name, None)
        ]
    )
    return call


# One hook for every client, as for every ClientSession.
_every = HttpxHook(client.every)
_lock = threading.RLock()
_layers: dict[type, Any] = {}


def instrument(rules: Rules) -> Callable[[], None]:
    """Do what ``client.instrument()`` does, for clients of httpx too; return what undoes it."""
    undo_sessions = client.instrument(rules)
    with _lock:
        for name in ("httpx", "httpx2"):
            _instrument(name)

    def undo() -> None:
        undo_sessions()
        with _lock:
            for kind, layer in [*_layers.items()] if not client.every.targets else ():
                if compat.unwrap_httpx(kind, layer):
                    del _layers[kind]

    return undo


def _instrument(name: str) -> None:
    there = sys.modules[name] if name in sys.modules else importlib.util.find_spec(name)
    if there is None:
        return
    try:
        module = importlib.import_module(name)
        for client_of, send in (
            (module.Client, _every.send),
            (module.AsyncClient, _every.send_async),
        ):
            kind = compat.sender(client_of)
            _layers[kind] = compat.wrap_httpx(kind, send, _layers.get(kind))
    except Exception as error:
        message = (
            "instrument does not reach the clients of %s %s (%r): pass them "
            "event_hooks=routing.httpx_hooks(), or install a version that the plugin was tried on"
        )
        version = getattr(sys.modules.get(name), "__version__", "")
        say(logger, logging.WARNING, message, name, version, error)
