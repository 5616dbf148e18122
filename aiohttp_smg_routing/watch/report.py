"""Shows the state at a moment as lines, for a terminal or a log."""

from collections.abc import Collection, Iterator
from datetime import datetime
from textwrap import wrap
from typing import Any

from ..verify.facts import KEY_BRANCHES, NO_KEY_BRANCHES
from ..verify.judge import Verdict
from ..verify.seen import Counters
from ..verify.streams import WIDTH
from .endpoint import Look
from .page import Gateway, Server, Worker
from .view import Share, View, kept_by_gateway, kept_by_server

_FEWEST_WORKERS = 3  # shown on the smallest terminal
_SMALL = 32  # lines; a smaller terminal has no room for outcomes that never occurred
_SERVER_ROWS = ("first", "kept", "moved", "unknown", "untagged", "failed", "late", "unmatched")
_ORDER = (*KEY_BRANCHES, *NO_KEY_BRANCHES)
_COLUMNS = "{:<{name}} {:>11} {:>13} {:>13}"
_WORKER_COLUMNS = "{:<{name}} {:<9} {:>8} {:>9} {:>8} {:>6} {:>5} {:>5}"


def lines(
    view: View,
    verdict: Verdict,
    width: int = WIDTH,
    height: int | None = None,
    told: Collection[str] = (),
) -> list[str]:
    """Return a moment as plain lines of at most ``width`` columns.

    The second line is the verdict. If ``height`` is small, outcomes that never occurred and the
    workers that tell least are left out. The causes in ``told`` are shown by name only.
    """
    kind = (view.gateway.page and view.gateway.page.load.kind) or "gateway"
    head = [f"{datetime.now():%H:%M:%S}  {kind} {view.gateway.url}", *wrap(verdict.sentence, width)]
    for cause in verdict.causes:
        if cause.name not in told:
            head += ["", *_wrapped(cause.text, width), *_wrapped(cause.advice, width, "  -> ")]
    if again := [cause.name for cause in verdict.causes if cause.name in told]:
        head += ["", *_wrapped(f"As before: {', '.join(again)}.", width)]
    is_small = height is not None and height < _SMALL
    body = [*_gateway_lines(view, width), *_server_lines(view, width, is_small)]
    body += _pool_lines(view)
    room = None if height is None else max(_FEWEST_WORKERS, height - len(head) - len(body) - 1)
    return [line[:width].rstrip() for line in (*head, *body, *_worker_lines(view, width, room))]


def _wrapped(text: str, width: int, indent: str = "") -> list[str]:
    blank = " " * len(indent)
    return wrap(text, width, initial_indent=indent, subsequent_indent=blank, break_on_hyphens=False)


def _gateway_lines(view: View, width: int) -> Iterator[str]:
    page, now, totals = view.gateway.page, view.now, view.totals
    if page is None:
        return
    yield from _head("gateway", view.gateway, width)
    rows = {**_branches(totals), **_selections(totals)}
    grown = {**_branches(now), **_selections(now)} if now else {}
    for name, total in rows.items():
        yield _row(name, None if now is None else grown.get(name, 0), total, view.gateway, width)
    if "manual" in totals.branches:
        share = None if now is None else kept_by_gateway(now)
        yield _share("kept share", share, kept_by_gateway(totals), width)


def _branches(counters: Counters) -> dict[str, int]:
    """Return the branches under their own names, with the policy's if several count."""
    several = len(counters.branches) > 1
    return {
        f"{policy} {branch}" if several else branch: count
        for policy, taken in sorted(counters.branches.items())
        for branch, count in sorted(taken.items(), key=_place)
    }


def _place(taken: tuple[str, int]) -> tuple[bool, int, str]:
    branch, _ = taken
    return branch not in _ORDER, _ORDER.index(branch) if branch in _ORDER else 0, branch


def _selections(counters: Counters) -> dict[str, int]:
    return {
        f"policy {policy}" if pool == "regular" else f"{pool} policy {policy}": count
        for pool, policies in sorted(counters.pools.items())
        for policy, count in sorted(policies.items())
    }


def _server_lines(view: View, width: int, is_small: bool) -> Iterator[str]:
    look = view.server
    if look is None or look.page is None:
        return
    yield from _head("session server", look, width)
    now, totals = view.server_now, view.server_totals
    for name in _SERVER_ROWS:
        if totals.get(name) or not is_small:
            grown = None if now is None else now.get(name, 0)
            yield _row(name, grown, totals.get(name, 0), look, width)
    share = None if now is None else kept_by_server(now)
    yield _share("kept share", share, kept_by_server(totals), width)


def _head(name: str, look: Look[Any], width: int) -> Iterator[str]:
    yield ""
    now = look.span if look.before else "now"
    yield _columns(name, "per second", now, "since start", width)


def _row(name: str, now: int | None, total: int, look: Look[Any], width: int) -> str:
    if now is None:
        return _columns(name, "-", "-", f"{total}", width)
    return _columns(name, f"{now / look.seconds:.1f}", f"{now}", f"{total}", width)


def _share(name: str, now: Share | None, total: Share, width: int) -> str:
    shares = _percent(now.value if now else None), _percent(total.value)
    return _columns(name, "", *shares, width)


def _columns(name: str, first: str, second: str, third: str, width: int) -> str:
    room = max(10, min(width, WIDTH) - 40)
    return _COLUMNS.format(_cut(name, room), first, second, third, name=room)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _pool_lines(view: View) -> Iterator[str]:
    page = view.gateway.page
    if page is None:
        return
    states = [_state(worker) for worker in page.workers.values()]
    yield ""
    count = sum(page.pool_sizes.values())
    yield (
        f"{count} worker{'s' * (count != 1)}: {states.count('down')} down, "
        f"{states.count('open')} with an open circuit, {page.load.overloaded} overloaded"
    )
    for skew, what in ((view.calls_skew, "calls"), (view.sessions_skew, "active sessions")):
        if skew:
            ratio = f"{skew.most} / {skew.mean:.1f} = {skew.ratio:.2f}"
            yield f"{what} of the fullest worker over the mean: {ratio}"


def _worker_lines(view: View, width: int, room: int | None) -> Iterator[str]:
    page, server = view.gateway.page, view.server.page if view.server else None
    names = sorted({*page.workers, *(server.sessions if server else ())}) if page else []
    if page is None or not names:
        return
    head = ("sessions", "active") if server else ("keys", "")
    yield _worker_columns("worker", "state", "calls/s", "calls", *head, "KV", "hits", width=width)
    shown = _most_telling(view, page, names, len(names) if room is None else room)
    for name in shown:
        yield _worker(name, page.workers.get(name, Worker()), view, server, width)
    if len(shown) < len(names):
        yield f".. and {len(names) - len(shown)} more workers"


def _most_telling(view: View, page: Gateway, names: list[str], room: int) -> list[str]:
    """Return as many names as there is room for: first what is wrong, then the fullest."""
    if len(names) <= room:
        return names
    calls = view.now.workers if view.now else {}

    def weight(name: str) -> tuple[bool, int, int]:
        worker = page.workers.get(name, Worker())
        return _state(worker) not in ("ok", "-"), calls.get(name, 0), worker.calls

    return sorted(sorted(names, key=weight, reverse=True)[: room - 1])


def _state(worker: Worker) -> str:
    if worker.healthy is False:
        return "down"
    if worker.healthy is None and worker.circuit is None:
        return "-"  # the session server alone names it
    return "ok" if worker.circuit in ("closed", None) else worker.circuit


def _worker(name: str, worker: Worker, view: View, server: Server | None, width: int) -> str:
    now = view.now
    rate = "-" if now is None else f"{now.workers.get(name, 0) / view.gateway.seconds:.1f}"
    if server is None:
        sessions, active = "-" if worker.keys is None else f"{worker.keys}", ""
    else:
        sessions = f"{server.sessions.get(name, 0)}"
        active = "-" if server.active is None else f"{server.active.get(name, 0)}"
    usage, hits = (_whole(worker.token_usage), _whole(worker.cache_hit_rate))
    return _worker_columns(
        name, _state(worker), rate, f"{worker.calls}", sessions, active, usage, hits, width=width
    )


def _whole(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _worker_columns(name: str, *values: str, width: int) -> str:
    room = max(10, min(width, WIDTH) - 57)
    return _WORKER_COLUMNS.format(_cut(name.removeprefix("http://"), room), *values, name=room)


def _cut(name: str, room: int) -> str:
    """Leave out the middle of a long name: workers differ in their names' ends."""
    half = (room - 2) // 2
    return name if len(name) <= room else f"{name[: room - 2 - half]}..{name[-half:]}"
