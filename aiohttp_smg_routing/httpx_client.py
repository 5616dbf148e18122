"""The outbound half for httpx, and for httpx2, which current SDKs import."""

import importlib.util
import logging
import sys
import threading
import weakref
from collections.abc import Callable, Generator
from contextlib import suppress
from typing import Any

from aiohttp import hdrs
from multidict import CIMultiDict
from yarl import URL

from . import client, compat
from .ledger import Call
from .log import say
from .rules import Rules

logger: logging.Logger = logging.getLogger(__name__)

#: Where a request keeps what was done to it. httpx hands it on to the next hop of a redirect.
_EXTENSION = "aiohttp_smg_routing"


class _Hop:
    """A request that has been judged: one hop of a call."""

    def __init__(self, hook: "HttpxHook", request: Any, url: URL) -> None:
        self.hook, self.request, self.url = hook, weakref.ref(request), url
        self.call: Call | None = None  # until its outcome is counted
        self.header = ""  # that carries the key


class HttpxHook:
    """Does for the requests of httpx what a hook does for the calls of a ``ClientSession``."""

    def __init__(self, hook: client.Hook) -> None:
        self._hook = hook

    def event_hooks(self) -> dict[str, list[Callable[[Any], Any]]]:
        """Return the hooks for a client, which may be sync or async."""

        def request_hook(request: Any) -> _Done:
            self._begin(request)
            return _DONE

        def response_hook(response: Any) -> _Done:
            self._end(response.request, response)
            return _DONE

        return {"request": [request_hook], "response": [response_hook]}

    def send(self, original: Callable[[Any], Any], request: Any) -> Any:
        """Send a request of a sync client."""
        is_ours, response = self._begin(request), None
        token = client.under_way.set(True)
        try:
            response = original(request)
            return response
        finally:
            client.under_way.reset(token)
            if is_ours:
                self._end(request, response)

    async def asend(self, original: Callable[[Any], Any], request: Any) -> Any:
        """Send a request of an async client."""
        is_ours, response = self._begin(request), None
        token = client.under_way.set(True)
        try:
            response = await original(request)
            return response
        finally:
            with suppress(ValueError):  # collected as garbage, in whatever context
                client.under_way.reset(token)
            if is_ours:
                self._end(request, response)

    def _begin(self, request: Any) -> bool:
        """Judge a request that is about to leave; False where another hook has done so."""
        before: _Hop | None = request.extensions.get(_EXTENSION)
        is_again = before is not None and before.request() is request
        if before and is_again and before.hook is not self and before.call:
            return False
        method, url = request.method, URL(str(request.url), encoded=True)
        request.extensions[_EXTENSION] = hop = _Hop(self, request, url)
        if before and before.header:
            request.headers.pop(before.header, None)
        targets = self._hook.targets  # one look: another thread may change it meanwhile
        for rules in targets:
            gateway = rules.gateway_of(method, url)
            if gateway is not None:
                hop.call = _with_key(rules, gateway, method, url, request)
                hop.header = hop.call.header
                return True
        if targets and method.upper() == hdrs.METH_POST and not is_again:
            targets[0].note_unmatched(method, url)
            if before and before.header:
                targets[0].note_redirected(method, before.url, url)
        return True

    def _end(self, request: Any, response: Any) -> None:
        """Count the outcome of a request; it is a failure where there is no response."""
        hop: _Hop | None = request.extensions.get(_EXTENSION)
        if hop and hop.hook is self and hop.call:
            call, hop.call = hop.call, None
            if response is None:
                call.ledger.count("failed")
            else:
                call.ledger.answered(call, response.status_code, response.headers)


class _Done:
    """What an async client awaits, and a sync one ignores."""

    def __await__(self) -> Generator[None, None, None]:
        yield from ()


_DONE = _Done()


def _with_key(rules: Rules, gateway: str, method: str, url: URL, request: Any) -> Call:
    headers = CIMultiDict(
        (name.decode("latin-1"), value.decode("latin-1")) for name, value in request.headers.raw
    )
    call = rules.begin(gateway, method, url, headers)
    if call.header:
        raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
        request.headers = type(request.headers)(raw)
    return call


# One hook for every client, as for every ClientSession.
_every = HttpxHook(client.every)
_lock = threading.RLock()
_users = 0
_layers: dict[type, Any] = {}


def instrument(rules: Rules) -> Callable[[], None]:
    """Do what ``client.instrument()`` does, for clients of httpx too; return what undoes it."""
    global _users
    undo_sessions = client.instrument(rules)
    with _lock:
        _users += 1
        for name in ("httpx", "httpx2"):
            _instrument(name)

    def undo() -> None:
        global _users
        undo_sessions()
        with _lock:
            _users -= 1
            for kind, layer in [*_layers.items()] if not _users else ():
                if compat.unwrap_httpx(kind, layer):
                    del _layers[kind]

    return undo


def _instrument(name: str) -> None:
    if name not in sys.modules and importlib.util.find_spec(name) is None:
        return
    try:
        module = importlib.import_module(name)
        for kind, send in ((module.Client, _every.send), (module.AsyncClient, _every.asend)):
            _layers[kind] = compat.wrap_httpx(kind, send, _layers.get(kind))
    except Exception as error:
        message = (
            "instrument does not reach the clients of %s %s (%r): pass them "
            "event_hooks=routing.httpx_hooks(), or install a version that the plugin was tried on"
        )
        version = getattr(sys.modules.get(name), "__version__", "")
        say(logger, logging.WARNING, message, name, version, error)
