"""Finds what is wrong with the endpoints, the workers, the spread, and the session server."""

from collections.abc import Iterator, Mapping
from datetime import datetime

from ..verify import known_causes
from ..verify.cause import Cause
from ..verify.facts import METRICS_PORT
from .endpoint import Look
from .page import Gateway, Server
from .view import View

HOT = 2.0  # times the mean
_FEWEST_CALLS, _FEWEST_SESSIONS = 50, 10  # fewer are uneven by chance
_SHOWN = 3  # workers that a sentence names
_SPREAD_MORE = (
    "Fewer sessions per worker and ending sessions that are over (routing.end) help, too. A worker "
    "that has just joined fills up with new sessions."
)


def states(view: View) -> Iterator[Cause]:
    """Yield what is wrong now, whatever the verdict is."""
    yield from _gateway(view.gateway)
    if view.server:
        yield from _server(view.server)
    if page := view.gateway.page:
        yield from _workers(page)
        if page.load.overloaded:
            yield known_causes.overloaded(page.load)
        yield from _traffic(view)
        yield from _skew(view, page)
    if view.server and view.server.page:
        yield from _calls(view.server_now or {}, view.server.page)


def _at(moment: datetime | None) -> str:
    return f"{moment:%H:%M:%S}"


def _gateway(look: Look[Gateway]) -> Iterator[Cause]:
    if look.error:
        kept = ". The figures are from before that" if look.page else ""
        yield Cause(
            "no_counters",
            f"The gateway's counters could not be read at {look.url}, since {_at(look.since)}: "
            f"{look.error}{kept}.",
            "Check that the gateway runs, and give the address of its metrics: its "
            f"--prometheus-port, {METRICS_PORT} by default, and /metrics.",
        )
    if look.restarts:
        yield Cause(
            "gateway_restarted",
            f"The gateway's counters began anew at {_at(look.restarted)}: it was restarted"
            f"{_times(look.restarts, 'gateways')}. What came before is not counted. Under manual, "
            "a restart forgets all pins, and sessions move once.",
            "Read its log for why it ended. SMG's --policy consistent_hashing needs no memory."
            f"{_each(look.restarts)}",
        )


def _times(count: int, several: str) -> str:
    return f", {count} times by now, or several {several} answer there in turn" if count > 1 else ""


def _each(count: int) -> str:
    return " If several answer in turn, give the URL of a single one." if count > 1 else ""


def _server(look: Look[Server]) -> Iterator[Cause]:
    if look.error:
        kept = ". Its figures are from before that" if look.page else ""
        yield Cause(
            "no_server_counters",
            f"The session server's metrics could not be read at {look.url}, since "
            f"{_at(look.since)}: {look.error}{kept}.",
            'Check that it runs, that the plugin\'s config has metrics = "prometheus", and that it '
            "serves them at this URL.",
        )
    if look.restarts:
        yield Cause(
            "server_restarted",
            f"The session server's counts began anew at {_at(look.restarted)}: it was restarted"
            f"{_times(look.restarts, 'processes')}. The gateway's pins stay.",
            f"Read its log for why it ended.{_each(look.restarts)}",
        )


def _workers(page: Gateway) -> Iterator[Cause]:
    down = [name for name, worker in page.workers.items() if worker.healthy is False]
    circuits = [name for name, worker in page.workers.items() if worker.circuit == "open"]
    if not any(page.pool_sizes.values()):
        yield Cause(
            "no_healthy_workers",
            "The gateway has no worker.",
            "Give it some with --worker-urls, or see its log for why they are gone.",
        )
    if down:
        yield Cause(
            "worker_down",
            f"{len(down)} of {len(page.workers)} workers {'is' if len(down) == 1 else 'are'} not "
            f"healthy: {_names(down)}. Sessions that are pinned there move, and come back with the "
            "worker.",
            known_causes.WORKER_ADVICE,
        )
    if circuits:
        yield known_causes.circuit_open(_names(circuits), page.load.kind)


def _names(names: list[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _traffic(view: View) -> Iterator[Cause]:
    if not view.totals.calls:
        yield Cause(
            "no_calls",
            f"The gateway whose metrics are at {view.gateway.url} has routed no call since it "
            "started.",
            "Play a turn. If you did, the session server calls another gateway, or this is the "
            "metrics URL of another one.",
        )
    elif view.now and not (view.now.calls or (view.gateway.page and view.gateway.page.in_flight)):
        yield Cause(
            "idle",
            f"The gateway has routed no call in the {view.gateway.span}.",
            "If the job should be busy now, see the session server and its log.",
        )


def _skew(view: View, page: Gateway) -> Iterator[Cause]:
    for skew, what, fewest in (
        (view.sessions_skew, "active sessions", _FEWEST_SESSIONS),
        (view.calls_skew, f"calls of the {view.gateway.span}", _FEWEST_CALLS),
    ):
        if skew:  # sessions outrank calls: some sessions are busier
            if skew.most >= fewest and skew.ratio >= HOT:
                yield Cause(
                    "one_sided",
                    f"{skew.worker} has {skew.most} {what}, {skew.ratio:.1f} times the mean of all "
                    "workers.",
                    f"{known_causes.spread(page.load.kind)} {_SPREAD_MORE}",
                )
            return


_SERVER_CAUSES = {
    "untagged": (
        "calls had no session, so they carried no key",
        'Set on_missing = "warn" in the plugin\'s config and read the log. Correct session_id, or '
        "put routing_session() around calls outside a request.",
    ),
    "late": (
        "calls were made in the session of a request that had ended",
        "Read the coroutine's name in the server's log. A job of one session may do so: make it "
        "with in_session(). A task for all sessions must start when the app starts.",
    ),
    "unmatched": (
        "calls look like calls to the gateway, but carried no key",
        'Call routing.explain("POST", url), or read the server\'s log at level DEBUG: both name '
        "what differs, and what to write. Calls to a judge model must carry none.",
    ),
}


def _calls(now: Mapping[str, int], page: Server) -> Iterator[Cause]:
    for name, (said, advice) in _SERVER_CAUSES.items():
        if count := page.counts.get(name, 0):
            yield Cause(
                name,
                f"{count} of the session server's {said}; {now.get(name, 0)} of them just now.",
                advice,
            )
