import subprocess
import sys

import aiohttp_smg_routing


def test_public_names() -> None:
    assert set(aiohttp_smg_routing.__all__) == {
        "PINS",
        "ROUTING_CONFIG",
        "ROUTING_KEY_HEADER",
        "ConfigError",
        "MissingSessionError",
        "Move",
        "PinLedger",
        "PinSummary",
        "RoutingConfig",
        "SessionIdFilter",
        "SessionPin",
        "attach",
        "current_session_id",
        "instrument",
        "routing_client_middleware",
        "routing_key",
        "routing_middleware",
        "routing_session",
        "routing_trace_config",
        "setup",
    }
    for name in aiohttp_smg_routing.__all__:
        assert getattr(aiohttp_smg_routing, name).__doc__


def test_core_imports_aiohttp_multidict_yarl_and_the_standard_library_alone() -> None:
    code = (
        "import sys, aiohttp.web; before = set(sys.modules); import aiohttp_smg_routing;"
        "print(*{name.partition('.')[0] for name in set(sys.modules) - before})"
    )
    printed = subprocess.run(  # noqa: S603
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout
    assert set(printed.split()) - sys.stdlib_module_names == {"aiohttp_smg_routing"}
