"""The plugin: one line joins both halves to an app."""

from collections.abc import AsyncIterator, Mapping
from typing import Any

from aiohttp import ClientSession, web

from .config import ALL_SESSIONS, ConfigError, RoutingConfig, as_config
from .gateway import ROUTED_WORKER_HEADER
from .hook import attach
from .instrument import instrument, instrument_session
from .jobs import keep_sessions_in_jobs
from .ledger import PinLedger
from .middleware import routing_middleware
from .values import is_named, several

ROUTING_CONFIG = web.AppKey("ROUTING_CONFIG", RoutingConfig)
"""Where ``setup()`` keeps the config: ``request.config_dict[ROUTING_CONFIG]`` in a handler."""

PINS = web.AppKey("PINS", PinLedger)
"""Where ``setup()`` keeps the ledger: ``request.config_dict[PINS]`` in a handler."""


def setup(app: web.Application, config: RoutingConfig | Mapping[str, Any]) -> None:
    """Pin each session of ``app`` to one worker behind the gateway.

    Installs the middleware, innermost of those that ``app`` has at this moment, and keeps the
    config under ``ROUTING_CONFIG`` and the ledger under ``PINS``. At start-up it attaches the hook
    to each ``ClientSession`` that ``config.client_session`` names, or to all that are made while
    ``app`` runs; other sessions take it as ``routing_trace_config(config)``. While ``app`` runs,
    jobs of aiojobs keep the session that spawned them. A config that is not enabled is kept, with
    an empty ledger, and nothing is installed.

    Raises ``ConfigError`` with every fault of the config, at start-up for a ``client_session`` that
    is not there; ``RuntimeError`` when ``app`` is set up already, or frozen.

    >>> setup(app, {"gateway": "http://10.0.0.1:30000", "client_session": "client"})
    """
    config = as_config(config)
    if ROUTING_CONFIG in app:
        raise RuntimeError("this app is set up already: one setup() takes several gateways")
    if app.middlewares.frozen:
        raise RuntimeError(
            "this app is frozen: call setup() before it is started or added to another app"
        )
    pins = _ledger(config)
    app[ROUTING_CONFIG] = config
    app[PINS] = pins
    if config.enabled:
        app.middlewares.append(routing_middleware(config, pins))
        if ALL_SESSIONS in several(config.client_session):
            app.cleanup_ctx.insert(0, _instrument)  # before the app makes its own
        app.on_startup.append(_attach_client_sessions)
        app.cleanup_ctx.append(_keep_sessions_in_jobs)
        app.on_cleanup.append(_close_ledger)
        if config.hide_worker_ids:
            app.on_response_prepare.append(_hide_worker_id)


def _ledger(config: RoutingConfig) -> PinLedger:
    if not (config.enabled and config.metrics):
        return PinLedger(config)
    from .metrics import prometheus_metrics

    try:
        return PinLedger(config, metrics=prometheus_metrics(config.metrics_registry))
    except ValueError as error:  # it has metrics of these names that are not ours
        raise ConfigError([("metrics_registry", str(error))]) from error


async def _instrument(app: web.Application) -> AsyncIterator[None]:
    undo = instrument(app[ROUTING_CONFIG], app[PINS])
    for value in app.values():
        if isinstance(value, ClientSession):  # made before the app starts
            instrument_session(value)
    yield
    undo()


async def _attach_client_sessions(app: web.Application) -> None:
    config = app[ROUTING_CONFIG]
    faults = []
    for name in several(config.client_session):
        if name == ALL_SESSIONS:
            continue
        found = [value for key, value in app.items() if is_named(key, name)]
        if len(found) == 1 and isinstance(found[0], ClientSession):
            attach(found[0], config, app[PINS])
        else:
            there = [key for key, value in app.items() if isinstance(value, ClientSession)]
            faults.append(
                (
                    "client_session",
                    f"{name!r} does not name one ClientSession of this app when it starts; "
                    f"there is {there or 'none'}. Where the app makes its session in on_startup, "
                    "call setup() after that is registered; to a session that is kept elsewhere, "
                    "attach(session, config)",
                )
            )
    if faults:
        raise ConfigError(faults)


async def _keep_sessions_in_jobs(app: web.Application) -> AsyncIterator[None]:
    undo = keep_sessions_in_jobs()
    yield
    undo()


async def _close_ledger(app: web.Application) -> None:
    app[PINS].close()


async def _hide_worker_id(request: web.Request, response: web.StreamResponse) -> None:
    response.headers.popall(ROUTED_WORKER_HEADER, None)
