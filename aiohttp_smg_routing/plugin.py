"""The plugin: ``Routing`` joins both halves, and ``setup()`` joins them to an app."""

import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any
from weakref import WeakSet

from aiohttp import TraceConfig, web
from aiohttp.client import ClientSession
from aiohttp.typedefs import Middleware
from yarl import URL

from . import client, compat
from .config import ConfigError, RoutingConfig, as_config
from .keys import SessionId
from .ledger import PinLedger
from .log import say
from .metrics import PrometheusMetrics, prometheus_metrics
from .middleware import inbound
from .rules import Rules
from .sources import is_named, named_sources

logger: logging.Logger = logging.getLogger(__name__)


class Routing:
    """A config and its ledger, with both halves that use them; ``setup()`` joins it to an app.

    >>> routing = Routing({"gateway": "http://10.0.0.1:30000"})
    >>> session = ClientSession(trace_configs=[routing.trace_config()])
    """

    def __init__(self, config: RoutingConfig | Mapping[str, Any]) -> None:
        self.config: RoutingConfig = as_config(config)
        """The config."""
        self.pins: PinLedger = _ledger(self.config)
        """The ledger: what the calls show of the pins."""
        self._rules = Rules(self.config, self.pins)
        self.middleware: Middleware = inbound(self._rules)
        """The inbound half alone, for an app that does not use ``setup()``: it finds the session id
        in the request, and enters it in the context."""
        self._hook = client.Hook(self._rules)
        self._hooked = 0
        self._attached: WeakSet[ClientSession] = WeakSet()

    def trace_config(self) -> TraceConfig:
        """Return the hook, for a ``ClientSession`` that you make.

        It puts the key on each call to the gateway, and judges each hop of a redirect anew. The
        session is that of the request whose handler makes the call, or of ``routing_session()``. It
        must be the last hook that touches headers. It does nothing where the config is not enabled.

        >>> ClientSession(trace_configs=[routing.trace_config()])
        """
        if not self.config.enabled:
            return TraceConfig()
        self._hooked += 1
        return client.Hook(self._rules)

    def attach(self, session: ClientSession) -> None:
        """Put the hook on a session that exists already, unless it is there.

        A mock in a test is left as it is, with a line in the log. Raises ``TypeError`` for what is
        no ``ClientSession``.

        >>> routing.attach(app[CLIENT])
        """
        if not _takes_hook(session, "attach()"):
            raise TypeError(
                f"attach() takes an aiohttp.ClientSession, not a {type(session).__name__}: make "
                "the session in it with trace_configs=[routing.trace_config()]"
            )
        if self.config.enabled and compat.is_client_session(session):
            self._hooked += 1
            client.attach(session, self._hook)
            self._attached.add(session)  # until the app is cleaned up, where it is an app's

    def instrument(self) -> ExitStack:
        """Put the hook on every ``ClientSession`` that is made from now on, whoever makes it.

        It wraps the constructor of ``aiohttp.ClientSession``, for subclasses and for whoever has
        imported the class already, until the block ends, or ``close()`` of what is returned. Which
        calls carry a key stays the same. A session that was made before has no hook. Several in
        force at once work side by side. ``instrument = true`` does it as long as an app runs.

        >>> with routing.instrument():
        ...     await rollout()
        """
        stack = ExitStack()
        if self.config.enabled:
            self._hooked += 1
            stack.callback(client.instrument(self._rules))
        return stack

    def explain(self, method: str, url: str | URL) -> str:
        """Return a sentence: that a call carries a key, or why it does not, and what to change.

        >>> routing.explain("POST", "http://localhost:30000/v1/chat/completions")
        'POST http://localhost:30000/v1/chat/completions goes out without a key: its host is
        localhost, and the gateway is 127.0.0.1; add http://localhost:30000 to gateway'
        """
        return self._rules.explain(method, URL(url))

    def end(self, session_id: SessionId) -> None:
        """Forget a session that is over; answers to calls that began before leave no row.

        >>> routing.end("s-17")
        """
        self.pins.end(session_id)


ROUTING = web.AppKey("ROUTING", Routing)
"""Where ``setup()`` keeps the ``Routing``: ``request.config_dict[ROUTING]`` in a handler."""


def setup(app: web.Application, config: RoutingConfig | Mapping[str, Any]) -> Routing:
    """Pin each session of ``app`` to one worker behind the gateway.

    Installs the middleware, innermost of those that ``app`` has at this moment, and keeps what it
    returns under ``ROUTING``. At start-up it attaches the hook to each ``ClientSession`` that
    ``config.client_session`` names, or with ``config.instrument`` to all that are made while the
    app runs, and logs in a line what it will do. All of it is taken off when the app is cleaned up.
    With a config that is not enabled nothing is installed.

    Raises ``ConfigError`` with every fault of the config, at start-up for a ``client_session`` that
    is not there; ``RuntimeError`` when ``app`` is set up already, or frozen.

    >>> setup(app, {"gateway": "http://10.0.0.1:30000", "client_session": "client"})
    """
    if not isinstance(app, web.Application):
        raise TypeError(
            f"setup(app, config) takes the app first, and this is: {type(app).__name__}"
        )
    if ROUTING in app:
        raise RuntimeError("this app is set up already: one setup() takes several gateways")
    if app.on_startup.frozen:
        raise RuntimeError(
            "this app is frozen: call setup() where the app is made, before it is started (and not "
            "in on_startup) or added to another app"
        )
    app[ROUTING] = routing = Routing(config)
    app.on_startup.append(_started)
    if routing.config.enabled:
        app.middlewares.append(routing.middleware)
        app.cleanup_ctx.insert(0, _running)  # before the app makes its own sessions
        if routing.config.hide_worker_ids:
            app.on_response_prepare.append(partial(_hide, routing.config.worker_header))
    return routing


def _ledger(config: RoutingConfig) -> PinLedger:
    metrics = _metrics(config)
    ledger = PinLedger(config, metrics.add if metrics else None)
    if metrics:
        metrics.untold.add(ledger.news)
    return ledger


def _metrics(config: RoutingConfig) -> PrometheusMetrics | None:
    if not (config.enabled and config.metrics):
        return None
    try:
        return prometheus_metrics(config.metrics_registry)
    except ValueError as error:  # it has metrics of these names that are not ours
        raise ConfigError([("metrics_registry", str(error))]) from error


def _takes_hook(value: object, place: str) -> bool:
    """Tell whether a value is a ClientSession, or a mock of one in somebody's tests."""
    if compat.is_client_session(value):
        return True
    is_mock = isinstance(value, ClientSession) or type(value).__module__ == "unittest.mock"
    if is_mock:
        say(logger, logging.WARNING, "%s: a %s takes no hook", place, type(value).__name__)
    return is_mock


async def _running(app: web.Application) -> AsyncIterator[None]:
    """Show the pins, and reach every ClientSession where that is asked for, while the app runs."""
    routing = app[ROUTING]
    _metrics(routing.config)  # the registry may have been emptied since
    routing.pins.show(True)
    for session in routing._attached:  # before the app starts, or when it ran before
        client.attach(session, routing._hook)
    with ExitStack() as stack:
        if routing.config.instrument:
            stack.callback(client.instrument(routing._rules))
            for value in app.values():
                if compat.is_client_session(value):  # made before the app starts
                    client.attach_every(value)
        yield
    routing.pins.show(False)
    routing._rules.missing_log.flush()
    for session in routing._attached:  # aiohttp sends no on_cleanup where start-up failed
        compat.remove_hook(session, routing._hook)


async def _started(app: web.Application) -> None:
    """Attach the hook to the sessions that the config names, and say what will happen."""
    routing = app[ROUTING]
    if not routing.config.enabled:
        say(logger, logging.INFO, "enabled is false: no call carries a key")
        return
    faults, hooked = [], []
    for name in routing.config.client_session:
        found = [value for key, value in app.items() if is_named(key, name)]
        if len(found) == 1 and _takes_hook(found[0], f"client_session {name!r}"):
            if compat.is_client_session(found[0]):
                client.attach(found[0], routing._hook)
                routing._attached.add(found[0])
                hooked.append(f"that of app[{compat.storage_name(name)!r}]")
            continue
        there = [key for key, value in app.items() if compat.is_client_session(value)]
        problem = (
            f"{name!r} does not name one ClientSession of this app when it starts; there is "
            f"{there or 'none'}. Where the app makes its session in on_startup, call setup() after "
            "that is registered; for a session that is kept elsewhere, use routing.attach(session)"
        )
        faults.append(("client_session", problem))
    if faults:
        raise ConfigError(faults)
    say(logger, logging.INFO, "%s", _what_will_happen(routing, hooked))


def _what_will_happen(routing: Routing, hooked: list[str]) -> str:
    config = routing.config
    if config.instrument:
        hooked.append("every one that is made from now on")
    if routing._hooked:
        hooked.append("those with routing.trace_config() or attach()")
    where = (
        "no ClientSession has the hook yet: name one in client_session, set instrument = true, or "
        "pass trace_configs=[routing.trace_config()]"
    )
    if hooked:
        where = f"the hook is on these ClientSessions: {', '.join(hooked)}"
    pin_by = "" if config.pin_by.is_session else f", pinned by {config.pin_by.template}"
    read = named_sources(config.session_id) + pin_by
    return (
        f"POST {', '.join(config.paths)} to {', '.join(map(str, config.gateway))} carries "
        f"{config.header}; the session id is read from {read}; {where}"
    )


async def _hide(header: str, request: web.Request, response: web.StreamResponse) -> None:
    response.headers.popall(header, None)
