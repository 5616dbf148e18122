import sys

import aiohttp_smg_routing

from ..fresh import python


def test_public_names() -> None:
    assert set(aiohttp_smg_routing.__all__) == {
        "ROUTING",
        "ROUTING_KEY_HEADER",
        "ConfigError",
        "MissingSessionError",
        "Move",
        "PinBy",
        "PinLedger",
        "PinSummary",
        "Routing",
        "RoutingConfig",
        "SessionIdFilter",
        "SessionPin",
        "current_session_id",
        "in_session",
        "peek_json",
        "routing_key",
        "routing_session",
        "setup",
    }
    for name in aiohttp_smg_routing.__all__:
        assert getattr(aiohttp_smg_routing, name).__doc__


def test_core_imports_aiohttp_multidict_yarl_and_the_standard_library_alone() -> None:
    printed = python(
        "import sys, aiohttp.web; before = set(sys.modules); import aiohttp_smg_routing;"
        "print(*{name.partition('.')[0] for name in set(sys.modules) - before})"
    )
    assert set(printed.split()) - sys.stdlib_module_names == {"aiohttp_smg_routing"}


def test_a_server_without_metrics_needs_no_extra() -> None:
    """An app is set up, started and cleaned up with the packages of the extras hidden."""
    printed = python(
        """
import asyncio, sys
for name in ("prometheus_client", "aiohttp_session", "click", "rich", "matplotlib", "pytest"):
    sys.modules[name] = None
from aiohttp import ClientSession, web
from aiohttp_smg_routing import RoutingConfig, setup

async def main():
    app = web.Application()
    routing = setup(app, RoutingConfig("http://gw", session_id="json:user", instrument=True))
    runner = web.AppRunner(app)
    await runner.setup()
    await runner.cleanup()
    print(routing.pins.summary().failed)

asyncio.run(main())
"""
    )
    assert printed == "0\n"


def test_without_metrics_nothing_is_registered() -> None:
    printed = python(
        """
import asyncio, prometheus_client as it
from aiohttp import web
from aiohttp_smg_routing import RoutingConfig, setup

async def main():
    app = web.Application()
    setup(app, RoutingConfig("http://gw", metrics_registry=it.REGISTRY))
    runner = web.AppRunner(app)
    await runner.setup()
    print("smg_routing" in it.generate_latest().decode())
    await runner.cleanup()

asyncio.run(main())
"""
    )
    assert printed == "False\n"
