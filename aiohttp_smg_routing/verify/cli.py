"""The options of ``verify``, and the order in which its parts do their work."""

import asyncio
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import fields
from functools import partial
from io import StringIO
from math import isfinite
from pathlib import Path
from types import FrameType
from typing import Any

import click
from yarl import URL

from .facts import METRICS_PORT
from .judge import EXIT_STATUS, Verdict, judge
from .play import Play
from .report import Bars, lasting, show_plan, show_seen, show_verdict, terminal, write_json
from .seen import Plan, Seen

API_KEY_VARIABLE = "SMG_API_KEY"
USAGE = 64  # EX_USAGE of sysexits.h; click would say 2, which is "could not tell" here

_DEFAULT = Plan(URL(), URL())


class _FiniteRange(click.FloatRange):
    """A range of numbers without ``nan`` and ``inf``: of these, no bound is ever reached."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if not isfinite(number):
            self.fail("it is no finite number.", param, ctx)
        return number


_SECONDS = _FiniteRange(min=0, min_open=True)


def run(argv: Sequence[str]) -> int:
    """Run the command line ``argv`` and return its exit status, whatever becomes of the output."""
    with redirect_stdout(lasting(sys.stdout)), redirect_stderr(lasting(sys.stderr)):
        return _run(argv)


def _run(argv: Sequence[str]) -> int:
    try:
        status = cli.main(list(argv), prog_name="aiohttp-smg-routing", standalone_mode=False)
    except click.ClickException as error:
        text = StringIO()
        error.show(text)
        print(_without_urls(text.getvalue(), argv), end="", file=sys.stderr, flush=True)
        return USAGE
    except click.Abort:  # Ctrl-C, before there was anything to stop
        return 128 + signal.SIGINT
    except Exception:
        # Python would exit with 1, which is "not pinned" here.
        traceback.print_exc()
        return EXIT_STATUS["could not tell"]
    return int(status or 0)


def _without_urls(message: str, argv: Sequence[str]) -> str:
    """Return ``message`` without the URLs of the command line: they may have a password in them."""
    for argument in argv:
        for piece in (argument, argument.partition("=")[2]):
            if "://" in piece or "@" in piece:
                message = message.replace(piece, "***").replace(repr(piece)[1:-1], "***")
    return message


def _url(ctx: click.Context, param: click.Parameter, value: str | None) -> URL | None:
    """Read an absolute http(s) URL. It holds no password: a command line is no place for one."""
    if value is None:
        return None
    with suppress(ValueError):
        url = URL(value)
        if url.user is not None or url.password is not None:
            raise click.BadParameter(f"no user or password in a URL: use {API_KEY_VARIABLE}.")
        if url.scheme in ("http", "https") and url.host and not url.query_string + url.fragment:
            return url
    raise click.BadParameter("it is not a URL of the form http://HOST:PORT.")


def _through(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """Complete the URL of a session server to that of a session."""
    if value is None:
        return None
    if "{session_id}" not in value:
        base = value.rstrip("/")
        value = base + ("/" if base.endswith("/sessions") else "/sessions/") + "{session_id}"
    _url(ctx, param, value.replace("{session_id}", "id"))
    return value


def _session_id(ctx: click.Context, param: click.Parameter, value: str) -> str:
    if "{n}" not in value or not value.isprintable():
        raise click.BadParameter("it needs {n}, the number of the session, and no control codes.")
    return value


def output_file(ctx: click.Context, param: click.Parameter, value: Path | None) -> Path | None:
    """Refuse a file that can't be written now, not when the run is over."""
    if value is None:
        return None
    place = value if value.exists() else value.parent
    if value.is_dir() or not os.access(place, os.W_OK):  # Path("") is a folder too
        raise click.BadParameter(f"{str(value)!r} can't be written.")
    return value


def picture_file(ctx: click.Context, param: click.Parameter, value: Path | None) -> Path | None:
    """Refuse a file whose name does not say that it is an SVG or a PNG, too."""
    if value is not None and value.suffix not in (".svg", ".png"):
        raise click.BadParameter(f"{str(value)!r} ends neither in .svg nor in .png.")
    return output_file(ctx, param, value)


def _api_key(file: Path | None) -> str | None:
    """Return the key from the file, else from the environment. No error shows any of it."""
    try:
        text = file.read_text("utf-8") if file else os.environ.get(API_KEY_VARIABLE, "")
    except (OSError, ValueError):
        raise click.BadParameter(f"{str(file)!r} can't be read.") from None
    key = text.strip()
    if not (key.isascii() and key.isprintable()) or (file and not key):
        raise click.BadParameter("the API key is not one line of ASCII.")
    return key or None


@click.group(context_settings={"show_default": True})
def cli() -> None:
    """Tools for sessions that are pinned to one worker behind an SMG gateway."""


@cli.command()
@click.argument("gateway", metavar="GATEWAY_URL", callback=_url)
@click.option(
    "--through",
    metavar="URL",
    callback=_through,
    help="A session server: the turns with the key go to URL/sessions/{session_id}/v1/... instead.",
)
@click.option(
    "--metrics",
    metavar="URL",
    callback=_url,
    help=f"The gateway's metrics.  [default: its host, port {METRICS_PORT}, /metrics]",
)
@click.option("--model", help="[default: the first that the gateway lists]")
@click.option("--sessions", type=click.IntRange(1), default=_DEFAULT.sessions, help="In each arm.")
@click.option("--turns", type=click.IntRange(2), default=_DEFAULT.turns, help="In each session.")
@click.option(
    "--concurrency", type=click.IntRange(1), default=_DEFAULT.concurrency, help="Calls at a time."
)
@click.option(
    "--max-tokens", type=click.IntRange(1), default=_DEFAULT.max_tokens, help="Of each reply."
)
@click.option("--timeout", type=_SECONDS, default=_DEFAULT.timeout, help="Seconds for one call.")
@click.option(
    "--time-limit", type=_SECONDS, default=_DEFAULT.time_limit, help="Seconds for all of it."
)
@click.option(
    "--min-kept",
    type=_FiniteRange(0, 1, min_open=True),
    default=0.99,
    help="The share of later turns that must stay on their session's worker.",
)
@click.option(
    "--session-id",
    metavar="PATTERN",
    callback=_session_id,
    default=_DEFAULT.session_id,
    help="Your own form of id, to try it: {n} is the session's number, {run} is new in each run.",
)
@click.option(
    "--api-key-file",
    metavar="FILE",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help=f"Has the API key.  [default: the environment variable {API_KEY_VARIABLE}]",
)
@click.option(
    "--json",
    "json_file",
    metavar="FILE",
    type=click.Path(dir_okay=False, path_type=Path),
    callback=output_file,
    help="Write all that was seen, for machines.",
)
@click.option(
    "--plot",
    "plot_file",
    metavar="FILE",
    type=click.Path(dir_okay=False, path_type=Path),
    callback=picture_file,
    help="Draw it: FILE.svg or FILE.png.",
)
def verify(**options: Any) -> int:
    """Play sessions on the gateway, with the routing key and without, and judge the pin.

    Exit status: 0 pinned, 1 not pinned, 2 could not tell, 64 wrong usage; 130 and 143 where
    Ctrl-C and SIGTERM end it early.
    """
    names = {field.name for field in fields(Plan)}
    gateway = options["gateway"]
    default = URL.build(scheme="http", host=gateway.host, port=METRICS_PORT, path="/metrics")
    options["metrics"] = options["metrics"] or default
    plan = Plan(**{name: value for name, value in options.items() if name in names})
    return _verify(
        plan,
        api_key=_api_key(options["api_key_file"]),
        min_kept=options["min_kept"],
        json_file=options["json_file"],
        plot_file=options["plot_file"],
    )


def _verify(
    plan: Plan,
    *,
    api_key: str | None,
    min_kept: float,
    json_file: Path | None,
    plot_file: Path | None,
) -> int:
    """Play, judge and report; return the exit status."""
    out, err = terminal(sys.stdout), terminal(sys.stderr)
    bars = Bars(plan, err)
    play = Play(plan, api_key=api_key, played=bars.played)

    def ready(seen: Seen) -> None:
        show_plan(seen, out)
        bars.start()

    with _Stop() as stop:
        try:
            asyncio.run(stop.run(play, ready))
        finally:
            bars.stop()
        seen = play.seen
        verdict, status = _conclude(seen, stop.received, min_kept)
        _write(json_file, lambda file: write_json(seen, verdict, status, file))
        _write(plot_file, partial(_draw, seen, verdict))
        show_seen(seen, out)
        show_verdict(verdict, out)
    return status


def _write(file: Path | None, write: Callable[[Path], None]) -> None:
    """Write ``file``; that it can't be written doesn't change the verdict."""
    try:
        if file:
            write(file)
    except OSError as error:
        print(f"Not written: {file}: {error.strerror or error}", file=sys.stderr, flush=True)


def _draw(seen: Seen, verdict: Verdict, file: Path) -> None:
    from .plot import draw  # a second that only those pay who want the picture

    draw(seen, verdict, file)


def _conclude(
    seen: Seen, stopped_by: signal.Signals | None, min_kept: float
) -> tuple[Verdict, int]:
    """Return the verdict on what was seen, and the exit status."""
    if stopped_by is None:
        verdict = judge(seen, min_kept)
        return verdict, verdict.exit_status
    sentence = f"Stopped by {stopped_by.name} after {len(seen.turns)} turns: no verdict."
    return Verdict("could not tell", sentence, ()), 128 + stopped_by


class _Stop:
    """Ctrl-C and SIGTERM, within its block: the first one ends the run, no other ends the report.

    A signal that is ignored when the block begins (as ``nohup`` has it) stays ignored.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._cancel: Callable[[], object] = _nothing
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        self._before = {
            number: handler for number, handler in handlers.items() if handler != signal.SIG_IGN
        }

    def __enter__(self) -> "_Stop":
        for number in self._before:
            signal.signal(number, self._heard)
        return self

    def __exit__(self, *exc_info: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _heard(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received = signal.Signals(number)
            self._cancel()

    async def run(self, play: Play, ready: Callable[[Seen], None]) -> None:
        """Play to the end, or until a signal. Nothing is left running."""
        loop = asyncio.get_running_loop()
        task = asyncio.ensure_future(play.run(ready))
        self._cancel = partial(loop.call_soon_threadsafe, task.cancel)
        if self.received is not None:  # before there was anything to stop
            task.cancel()
        try:
            await asyncio.wait({task})
        finally:
            self._cancel = _nothing
        if not task.cancelled():
            task.result()


def _nothing() -> None:
    pass
