"""The command ``watch``: its options, and the order in which its parts work."""

import asyncio
import sys
from collections.abc import Collection
from contextlib import AbstractContextManager, nullcontext

import click
from yarl import URL

from ..verify.call import BRIEF, Client
from ..verify.options import FiniteRange, url
from ..verify.stop import Stop
from ..verify.streams import is_broken, terminal
from .endpoint import Endpoint
from .judge import judge
from .page import Gateway, Server, gateway_shrank, read_gateway, read_server, server_shrank
from .show import Json, Log, Picture, Show
from .view import View

_LIVE, _PLAIN = 1.0, 5.0  # seconds between two looks
_FASTEST = 0.1  # seconds
_NO_READER = 141  # 128 + SIGPIPE, as in a shell


def _metrics(ctx: click.Context, param: click.Parameter, value: str | None) -> URL | None:
    """Read the URL of metrics; complete one that has no path."""
    found = url(ctx, param, value)
    return found / "metrics" if found and found.path == "/" else found


@click.command()
@click.argument("gateway", metavar="GATEWAY_METRICS_URL", callback=_metrics)
@click.argument("server", metavar="[SERVER_METRICS_URL]", required=False, callback=_metrics)
@click.option(
    "--interval",
    type=FiniteRange(min=_FASTEST),
    help=f"Seconds between two looks.  [default: {_LIVE:g} on a terminal, else {_PLAIN:g}]",
)
@click.option("--once", is_flag=True, help="Look twice, an interval apart, print it, and end.")
@click.option("--json", "as_json", is_flag=True, help="Print a line of JSON for each interval.")
@click.option(
    "--min-kept",
    type=FiniteRange(0, 1, min_open=True),
    default=0.99,
    help="The share of later calls that must come to their session's worker.",
)
def watch(
    gateway: URL,
    server: URL | None,
    interval: float | None,
    once: bool,
    as_json: bool,
    min_kept: float,
) -> int:
    """Show the pins of a running job, from the metrics of its gateway and its session server.

    Exit status of --once: 0 pinned, 1 not pinned, 2 could not tell. Otherwise it runs until a
    signal ends it: 130 Ctrl-C, 143 SIGTERM, 141 if nobody reads what it prints. 64 wrong usage.
    """
    out = terminal(sys.stdout)
    is_live = out.is_terminal and not (out.is_dumb_terminal or once or as_json)
    seconds = interval or (_LIVE if is_live else _PLAIN)
    lines = Json(out) if as_json else Log(out)
    shows: AbstractContextManager[Show] = Picture(out) if is_live else nullcontext(lines)
    with Stop() as stop, shows as show:
        watching = Watching(gateway, server, seconds, min_kept, show)
        asyncio.run(stop.run(watching.once() if once else watching.run()))
    if stop.received is not None:
        return 128 + stop.received
    return watching.exit_status if once else _NO_READER


class Watching:
    """Looks at a gateway and a session server, and shows what it sees and concludes."""

    def __init__(
        self, gateway: URL, server: URL | None, interval: float, min_kept: float, show: Show
    ) -> None:
        self._gateway, self._server = gateway, server
        self._interval = interval
        self._min_kept = min_kept
        self._show = show
        self.exit_status: int = 0
        """What the last picture concludes, as the exit status of ``verify``."""

    async def once(self) -> None:
        """Look twice, and show that."""
        async with Client(BRIEF, None) as client:
            gateway, server = self._endpoints(client)
            looks = [it.look for it in (gateway, server) if it]
            await asyncio.gather(*(look() for look in looks))
            if not gateway.seen.error:  # else a second look would fail, too
                await asyncio.sleep(self._interval)
                await asyncio.gather(*(look() for look in looks))
            self._draw(gateway, server)

    async def run(self) -> None:
        """Look and show until this is cancelled, or nobody reads what is printed."""
        async with Client(BRIEF, None) as client:
            gateway, server = self._endpoints(client)
            looking = [
                asyncio.ensure_future(it.keep_looking(self._interval))
                for it in (gateway, server)
                if it
            ]
            try:
                await self._pause(looking, min(self._interval, _LIVE))
                while not is_broken(sys.stdout):
                    self._draw(gateway, server)
                    # Not after the looks: one that hangs must not hold up the picture.
                    await self._pause(looking, self._interval)
            finally:
                for task in looking:
                    task.cancel()
                await asyncio.gather(*looking, return_exceptions=True)

    async def _pause(self, looking: Collection[asyncio.Task[None]], seconds: float) -> None:
        done, _ = await asyncio.wait(looking, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()  # a fault of this program must not pass unseen

    def _endpoints(self, client: Client) -> tuple[Endpoint[Gateway], Endpoint[Server] | None]:
        gateway = Endpoint(client, self._gateway, read_gateway, gateway_shrank)
        if self._server is None:
            return gateway, None
        return gateway, Endpoint(client, self._server, read_server, server_shrank)

    def _draw(self, gateway: Endpoint[Gateway], server: Endpoint[Server] | None) -> None:
        view = View(gateway.seen, server.seen if server else None)
        verdict = judge(view, self._min_kept)
        self.exit_status = verdict.exit_status
        self._show(view, verdict)
