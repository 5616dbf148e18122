"""The tests for each file of the package."""

from pathlib import Path

PACKAGE = "aiohttp_smg_routing"

# By the path below the package. Slow tests of many files are left out, such as test_properties.py
# and most tests on the real gateway.
TESTS = {
    "__init__": "unit/test_init unit/test_architecture",
    "__main__": "unit/test_verify_cli unit/test_run",
    "client": "wire/test_client wire/test_plugin wire/test_instrument wire/test_never_silent "
    "wire/test_foreign_code wire/test_httpx_foreign_code unit/test_ledger",
    "compat": "unit/test_compat wire/test_late wire/test_foreign_code wire/test_instrument "
    "wire/test_body wire/test_client wire/test_httpx",
    "config": "unit/test_config unit/test_secrets unit/test_keys wire/test_plugin",
    "context": "unit/test_context unit/test_log wire/test_late wire/test_middleware "
    "wire/test_client wire/test_never_silent",
    "gateway": "unit/test_gateway unit/test_config unit/test_keys wire/test_client "
    "wire/test_plugin wire/test_never_silent unit/test_verify_play unit/test_ledger",
    "httpx_client": "wire/test_httpx wire/test_httpx_foreign_code",
    "keys": "unit/test_keys unit/test_config unit/test_secrets",
    "ledger": "unit/test_ledger unit/test_metrics wire/test_client",
    "log": "unit/test_log unit/test_context unit/test_ledger wire/test_never_silent "
    "wire/test_client",
    "metrics": "unit/test_metrics unit/test_monitoring unit/test_config unit/test_ledger",
    "pins": "unit/test_ledger unit/test_metrics",
    "middleware": "wire/test_middleware wire/test_body wire/test_plugin wire/test_late "
    "wire/test_never_silent wire/test_client unit/test_sources",
    "plugin": "wire/test_plugin wire/test_instrument wire/test_never_silent "
    "wire/test_foreign_code unit/test_metrics",
    "rules": "wire/test_client wire/test_plugin wire/test_never_silent wire/test_late "
    "wire/test_middleware unit/test_context",
    "run": "unit/test_run wire/test_run wire/test_run_foreign_code",
    "sources": "unit/test_sources wire/test_body wire/test_middleware unit/test_config "
    "wire/test_never_silent",
    "values": "unit/test_config unit/test_secrets wire/test_plugin",
    "testing": "unit/test_testing_call unit/test_testing_processes wire/test_testing_recorder "
    "gateway/test_testing_fixtures gateway/test_testing_gateway recipes/test_canned",
    "watch": "unit/test_watch unit/test_watch_cli",
    "verify": "unit/test_verify_judge unit/test_verify_report unit/test_verify_cli",
    "verify/ask": "unit/test_verify_play unit/test_verify_call unit/test_verify_cli",
    "verify/call": "unit/test_verify_call unit/test_verify_play unit/test_verify_chain",
    "verify/chain": "unit/test_verify_chain unit/test_verify_play unit/test_verify_cli",
    "verify/facts": "unit/test_verify_judge unit/test_verify_play unit/test_verify_cli",
    "verify/play": "unit/test_verify_play unit/test_verify_chain unit/test_verify_cli",
    "verify/plot": "unit/test_verify_plot unit/test_verify_cli",
    "verify/schedule": "unit/test_verify_play unit/test_verify_cli",
    "verify/seen": "unit/test_verify_judge unit/test_verify_play unit/test_verify_report "
    "unit/test_verify_call unit/test_verify_plot unit/test_verify_cli",
    "verify/summary": "unit/test_verify_judge unit/test_verify_play unit/test_verify_plot "
    "unit/test_verify_report unit/test_verify_cli",
}


def files(root: Path) -> list[str]:
    """Return the paths of all files of the package."""
    return sorted(path.relative_to(root).as_posix() for path in (root / PACKAGE).rglob("*.py"))


def selected(file: str) -> tuple[str, ...]:
    """Return the test files for a file of the package, from its own row or its folder's."""
    name = Path(file).relative_to(PACKAGE).with_suffix("")
    row = TESTS.get(name.as_posix()) or TESTS[name.parts[0]]
    return tuple(f"tests/{test}.py" for test in row.split())
