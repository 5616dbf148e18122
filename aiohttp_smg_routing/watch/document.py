"""Shows the state at a moment as JSON, for a program."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime
from typing import Any

from ..verify.judge import Verdict
from ..verify.seen import Counters
from .endpoint import Look
from .page import Server
from .view import Skew, View, kept_by_gateway, kept_by_server


def document(view: View, verdict: Verdict) -> str:
    """Return a moment as one line of JSON."""
    return json.dumps(
        {
            "time": datetime.now().astimezone().isoformat(timespec="seconds"),
            "verdict": verdict.answer,
            "exit_status": verdict.exit_status,
            "sentence": verdict.sentence,
            "causes": [asdict(cause) for cause in verdict.causes],
            "gateway": _gateway(view),
            "server": view.server and _server(view, view.server),
        },
        allow_nan=False,
    )


def _endpoint(look: Look[Any]) -> dict[str, Any]:
    return {
        "url": str(look.url),
        "error": look.error or None,
        "restarts": look.restarts,
        "now_seconds": look.seconds if look.before else None,
    }


def _gateway(view: View) -> dict[str, Any]:
    page, now = view.gateway.page, view.now
    told = _endpoint(view.gateway)
    if page is None:
        return told
    workers = {
        name: {**asdict(worker), "calls_now": now and now.workers.get(name, 0)}
        for name, worker in page.workers.items()
    }
    return {
        **told,
        "kind": page.load.kind,
        "total": _counts(view.totals),
        "now": now and _counts(now),
        "pool_sizes": page.pool_sizes,
        "overloaded": page.load.overloaded,
        "calls_skew": _skew(view.calls_skew),
        "workers": workers,
    }


def _counts(counters: Counters) -> dict[str, Any]:
    return {
        "calls": counters.calls,
        "branches": counters.branches,
        "pools": counters.pools,
        "kept_share": kept_by_gateway(counters).value,
    }


def _server(view: View, look: Look[Server]) -> dict[str, Any]:
    told, page = _endpoint(look), look.page
    if page is None:
        return told
    return {
        **told,
        "total": _calls(view.server_totals),
        "now": None if view.server_now is None else _calls(view.server_now),
        "sessions": page.sessions,
        "active_sessions": page.active,
        "sessions_skew": _skew(view.sessions_skew),
    }


def _calls(counts: Mapping[str, int]) -> dict[str, Any]:
    return {**counts, "kept_share": kept_by_server(counts).value}


def _skew(skew: Skew | None) -> dict[str, Any] | None:
    return None if skew is None else {**asdict(skew), "ratio": skew.ratio}
