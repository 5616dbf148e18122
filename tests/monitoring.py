"""What the pages, the alert rules and the dashboard read of the metrics."""

import json
import re
from collections.abc import Iterator

from harness.processes import ROOT

DOCS = ROOT / "docs"
PAGE = (DOCS / "monitoring.md").read_text()
ALERTS = (DOCS / "alerts.yml").read_text()
ALERT_TESTS = (DOCS / "alerts_test.yml").read_text()
DASHBOARD = json.loads((DOCS / "grafana-dashboard.json").read_text())
PAGES = "".join(page.read_text() for page in [ROOT / "README.md", *sorted(DOCS.glob("*.md"))])
OURS = {
    "smg_routing_calls_total",
    "smg_routing_worker_calls_total",
    "smg_routing_sessions",
    "smg_routing_active_sessions",
    "smg_routing_missing_session_total",
    "smg_routing_late_total",
    "smg_routing_unmatched_total",
}
OUTCOMES = {"first", "kept", "moved", "unknown", "untagged", "failed"}
# Under --routing-key-override the gateway has a series that begins like ours.
GATEWAY_LOOKALIKE = "smg_routing_key_source_total"


def expressions() -> Iterator[tuple[str, str]]:
    """Yield the name of each query of the dashboard, and its PromQL as Grafana sends it."""
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", []):
            expr = re.sub(r"\$__(rate_interval|range)\b", "5m", target["expr"])
            for variable in DASHBOARD["templating"]["list"]:
                expr = re.sub(rf"\${variable['name']}\b", variable["allValue"], expr)
            yield f"panel_{panel['id']}_{target['refId']}", expr


def queries() -> str:
    """Return the text of all queries: of the alerts, their tests and the dashboard."""
    variables = [variable["query"]["query"] for variable in DASHBOARD["templating"]["list"]]
    return "\n".join([ALERTS, ALERT_TESTS, *variables, *(expr for _, expr in expressions())])


def series(text: str) -> set[str]:
    """Return every name that begins like a series, except the config section and the fixture."""
    return set(re.findall(r"\bsmg_\w+", text)) - {"smg_routing", "smg_gateway"}


def label_values(label: str) -> set[str]:
    """Return every value that a query compares with ``label``."""
    matchers: list[str] = re.findall(rf'\b{label}=~?"([^"]+)"', queries())
    return {value for matcher in matchers for value in matcher.split("|")}
