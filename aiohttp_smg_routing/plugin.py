"""The plugin: ``Routing`` joins both halves, and ``setup()`` joins them to an app."""

import logging
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any
from weakref import WeakSet

from aiohttp import TraceConfig, web
from aiohttp.client import ClientSession
from aiohttp.typedefs import Middleware
from yarl import URL

from . import client, compat, httpx_client
from .config import ConfigError, RoutingConfig, as_config
from .keys import SessionId
from .ledger import PinLedger
from .log import say
from .metrics import PrometheusMetrics, prometheus_metrics
from .middleware import hide, inbound
from .rules import Rules
from .sources import is_named, named_sources

logger: logging.Logger = logging.getLogger(__name__)

_IDLE = "%s: no effect on a Routing that setup(app, config) did not make; instead, %s"
#: The options that only an app can carry out, and what to do without one.
_OF_AN_APP = {
    "instrument": "make the ClientSession in a with routing.instrument(): block",
    "client_session": "write ClientSession(trace_configs=[routing.trace_config()])",
    "hide_worker_ids": "delete the header that names the worker from your answers",
}


class Routing:
    """A config, its ledger, the middleware and the hook. ``setup()`` joins it to an app.

    Without an app, ``instrument``, ``client_session`` and ``hide_worker_ids`` of the config have no
    effect, and a log line says so. Raises ``ConfigError`` with every fault of the config.

    >>> routing = Routing({"gateway": "http://10.0.0.1:30000"})
    >>> app = web.Application(middlewares=[routing.middleware])
    >>> routing.pins.summary().first, routing.config.header
    (0, 'X-SMG-Routing-Key')
    """

    def __init__(
        self, config: RoutingConfig | Mapping[str, Any], *, _has_app: bool = False
    ) -> None:
        self.config: RoutingConfig = as_config(config)
        """The config, checked."""
        for name, remedy in _OF_AN_APP.items():
            if getattr(self.config, name) and self.config.enabled and not _has_app:
                say(logger, logging.WARNING, _IDLE, name, remedy)
        self.pins: PinLedger = _ledger(self.config)
        """The ledger: which worker answered which session."""
        self._rules = Rules(self.config, self.pins)
        self.middleware: Middleware = inbound(self._rules)
        """The inbound half: it enters the session of a request in the context."""
        self._hook = client.Hook(self._rules)
        self._hooked = False
        self._attached: WeakSet[ClientSession] = WeakSet()
        self._undo = ExitStack()  # of what the app's start did

    def trace_config(self) -> TraceConfig:
        """Return the hook, for a ``ClientSession`` that you make.

        It puts the key of the running code's session on each call to the gateway, and decides anew
        at each hop of a redirect. It must be the last hook that changes headers. If ``enabled`` is
        false, the hook does nothing.

        >>> session = ClientSession(trace_configs=[routing.trace_config()])
        """
        if not self.config.enabled:
            return TraceConfig()
        self._hooked = True
        return client.Hook(self._rules)

    def attach(self, session: ClientSession) -> None:
        """Put the hook on a ``ClientSession`` that exists already, unless it has the hook.

        A mock stays as it is, and a log line says so. Raises ``TypeError`` for anything else.

        >>> routing.attach(app[CLIENT])
        """
        if not client.takes_hook(session, "attach()"):
            raise TypeError(
                f"attach() takes an aiohttp.ClientSession, not a {type(session).__name__}: make "
                "the session in it with trace_configs=[routing.trace_config()]"
            )
        if self.config.enabled and compat.is_client_session(session):
            self._hooked = True
            client.attach(session, self._hook)
            self._attached.add(session)  # an app's clean-up takes the hook off

    def instrument(self) -> ExitStack:
        """Put the hook on every ``ClientSession`` that is made from now on, and on httpx clients.

        It wraps the constructor of ``aiohttp.ClientSession`` until the block ends, or until you
        call ``close()`` on the stack. That reaches subclasses, and code that has imported the class
        already, but no existing ``ClientSession``. It reaches every httpx client, existing ones
        too. Several can be in force at once. ``instrument = true`` does this while an app runs.

        >>> with routing.instrument():
        ...     session = ClientSession()
        """
        stack = ExitStack()
        if self.config.enabled:
            self._hooked = True
            stack.callback(httpx_client.instrument(self._rules))
        return stack

    def httpx_hooks(self) -> dict[str, list[Callable[[Any], Any]]]:
        """Return the hook as ``event_hooks`` for a client of httpx or httpx2, sync or async.

        An assignment to ``client.event_hooks`` takes the hook off, and a call that raises is not
        counted. ``instrument()`` has neither limit. If ``enabled`` is false, there are no hooks.

        >>> event_hooks = routing.httpx_hooks()  # httpx.AsyncClient(event_hooks=event_hooks)
        """
        if not self.config.enabled:
            return {"request": [], "response": []}  # the caller may add hooks to the lists
        self._hooked = True
        return httpx_client.HttpxHook(client.Hook(self._rules)).event_hooks()

    def explain(self, method: str, url: str | URL) -> str:
        """Return a sentence: the call carries a key, or why it does not and what to change.

        Raises ``ValueError`` if ``url`` is not a URL, ``TypeError`` if it is not a string.

        >>> routing.explain("GET", "http://10.0.0.1:30000/v1/chat/completions")
        'GET http://10.0.0.1:30000/v1/chat/completions goes out without a key: only a POST carries
        one'
        """
        return self._rules.explain(method, URL(url))

    def end(self, session_id: SessionId) -> None:
        """Forget a session that is over, as ``pins.end()`` does.

        Raises ``TypeError`` unless the id is a string, integer, ``UUID`` or None. None and a blank
        id are no session.

        >>> routing.end("s-17")
        """
        self.pins.end(session_id)


ROUTING = web.AppKey("ROUTING", Routing)
"""The app key of the ``Routing`` that ``setup()`` makes."""


def setup(app: web.Application, config: RoutingConfig | Mapping[str, Any]) -> Routing:
    """Pin each session of ``app`` to one worker behind the gateway.

    It appends the middleware, so that it runs after those that ``app`` has already. When the app
    starts, it puts the hook on each ``ClientSession`` that ``client_session`` names, or with
    ``instrument`` on all that are made while the app runs, and logs where the hook is. The hooks
    come off when the app and its sub-apps have been cleaned up. If ``enabled`` is false, nothing is
    installed. Returns the ``Routing``, which is also ``app[ROUTING]``.

    Raises ``ConfigError`` with every fault of the config (at start-up for a ``client_session`` that
    is not there), ``RuntimeError`` if ``app`` is set up already or frozen, ``TypeError`` if it is
    not a ``web.Application``.

    >>> app = web.Application()
    >>> routing = setup(app, {"gateway": "http://10.0.0.1:30000"})
    """
    if not isinstance(app, web.Application):
        raise TypeError(f"setup(app, config) takes the app first, not a {type(app).__name__}")
    if ROUTING in app:
        raise RuntimeError("this app is set up already: call setup() once, with every gateway")
    if app.on_startup.frozen:
        raise RuntimeError(
            "this app is frozen: call setup() where the app is made, before it is started (and not "
            "in on_startup) or added to another app"
        )
    app[ROUTING] = routing = Routing(config, _has_app=True)
    app.on_startup.append(_started)
    if routing.config.enabled:
        app.middlewares.append(routing.middleware)
        app.cleanup_ctx.insert(0, _running)  # before the app makes its own sessions
        compat.when_cleaned_up(app, routing._undo.close)
        if routing.config.hide_worker_ids:
            app.on_response_prepare.append(partial(hide, routing.config.worker_header))
    return routing


def _ledger(config: RoutingConfig) -> PinLedger:
    metrics = _metrics(config)
    ledger = PinLedger(config, metrics.add if metrics else None)
    if metrics:
        metrics.ledgers.add(ledger)
    return ledger


def _metrics(config: RoutingConfig) -> PrometheusMetrics | None:
    if not (config.enabled and config.metrics):
        return None
    try:
        return prometheus_metrics(config.metrics_registry)
    except ValueError as error:  # the registry has other metrics of these names
        raise ConfigError([("metrics_registry", str(error))]) from error


async def _running(app: web.Application) -> AsyncIterator[None]:
    """Export the pins while the app runs, and hook every ClientSession if the config asks."""
    routing = app[ROUTING]
    _metrics(routing.config)  # the registry may have been emptied since setup()
    routing.pins.show(True)
    routing._undo.callback(_ended, routing)
    for session in routing._attached:  # by attach(), or by an earlier run of the app
        client.attach(session, routing._hook)
    if routing.config.instrument:
        routing._undo.callback(httpx_client.instrument(routing._rules))
        for value in app.values():
            if compat.is_client_session(value):  # made before the app starts
                client.attach_every(value)
    has_started = False
    try:
        yield
        has_started = app.on_cleanup.frozen
    finally:
        if not has_started:  # then aiohttp sends no on_cleanup
            routing._undo.close()


def _ended(routing: Routing) -> None:
    """Hide the pins and take the hook off every ClientSession that it was attached to."""
    routing.pins.show(False)
    routing._rules.missing_log.flush()
    routing._rules.unmatched_log.flush()
    for session in routing._attached:
        compat.remove_hook(session, routing._hook)


async def _started(app: web.Application) -> None:
    """Attach the hook to the sessions that the config names, and log what will happen."""
    routing = app[ROUTING]
    if not routing.config.enabled:
        say(logger, logging.INFO, "enabled is false: no call carries a key")
        return
    faults, hooked = [], []
    for name in routing.config.client_session:
        found = [value for key, value in app.items() if is_named(key, name)]
        if len(found) == 1 and client.takes_hook(found[0], f"client_session {name!r}"):
            if compat.is_client_session(found[0]):
                client.attach(found[0], routing._hook)
                routing._attached.add(found[0])
                hooked.append(f"that of app[{compat.storage_name(name)!r}]")
            continue
        kept = [key for key, value in app.items() if compat.is_client_session(value)]
        there = [compat.storage_name(key).rpartition(".")[2] for key in kept]
        problem = (
            f"{name!r} does not name one ClientSession of this app when it starts; it has "
            f"{there or 'none'}. If the app makes its session in on_startup, call setup() after "
            "that handler is added; for a session kept elsewhere, use routing.attach(session)"
        )
        faults.append(("client_session", problem))
    if faults:
        raise ConfigError(faults)
    say(logger, logging.INFO, "%s", _what_will_happen(routing, hooked))


def _what_will_happen(routing: Routing, hooked: list[str]) -> str:
    config = routing.config
    if config.instrument:
        hooked.append("every one that is made from now on, and every httpx client")
    if routing._hooked:
        hooked.append("those with routing.trace_config(), attach() or httpx_hooks()")
    where = f"the hook is on these ClientSessions: {', '.join(hooked)}"
    if not hooked:
        where = (
            "no ClientSession has the hook yet: name one in client_session, set instrument = true, "
            "or pass trace_configs=[routing.trace_config()]"
        )
    read = named_sources(config.session_id)
    read += "" if config.pin_by.is_session else f", pinned by {config.pin_by.template}"
    return (
        f"POST {', '.join(config.paths)} to {', '.join(map(str, config.gateway))} carries "
        f"{config.header}; the session id is read from {read}; {where}"
    )
