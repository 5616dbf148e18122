"""The command ``verify``: its options, and the order in which its parts work."""

import asyncio
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import fields
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import click
from yarl import URL

from .. import __version__
from .facts import METRICS_PORT
from .judge import EXIT_STATUS, Verdict, judge
from .options import (
    API_KEY_VARIABLE,
    FiniteRange,
    api_key,
    header_name,
    json_path,
    model,
    output_file,
    picture_file,
    session_id,
    through,
    url,
    without_urls,
)
from .play import Play
from .report import Bars, show_plan, show_seen, show_verdict, write_json
from .seen import Plan, Seen
from .stop import Stop
from .streams import lasting, terminal

USAGE = 64  # EX_USAGE of sysexits.h; click would say 2, which is "could not tell" here

_DEFAULT = Plan(URL(), URL())


_SECONDS = FiniteRange(min=0, min_open=True)


def run(argv: Sequence[str]) -> int:
    """Run the command line ``argv``; return its exit status even if the output can't be written."""
    with redirect_stdout(lasting(sys.stdout)), redirect_stderr(lasting(sys.stderr)):
        return _run(argv)


def _run(argv: Sequence[str]) -> int:
    try:
        status = cli.main(list(argv), prog_name="aiohttp-smg-routing", standalone_mode=False)
    except click.ClickException as error:
        text = StringIO()
        error.show(text)
        print(without_urls(text.getvalue(), argv), end="", file=sys.stderr, flush=True)
        return USAGE
    except click.Abort:  # Ctrl-C before the run began
        return 128 + signal.SIGINT
    except Exception:
        # Python would exit with 1, which is "not pinned" here.
        traceback.print_exc()
        return EXIT_STATUS["could not tell"]
    return int(status or 0)


@click.group(context_settings={"show_default": True, "help_option_names": ["-h", "--help"]})
@click.version_option(__version__, message="%(prog)s %(version)s")
def cli() -> None:
    """Tools for sessions that are pinned to one worker behind an SMG gateway."""


@cli.command()
@click.argument("gateway", metavar="GATEWAY_URL", callback=url)
@click.option(
    "--through",
    metavar="URL",
    callback=through,
    help="A session server. All turns go through it, to URL/sessions/{session_id}/v1/...; "
    "put {session_id} elsewhere in the URL, or use one of the next two options.",
)
@click.option(
    "--session-header",
    metavar="NAME",
    is_eager=True,
    callback=header_name,
    help="With --through: the header that carries the session id.",
)
@click.option(
    "--session-json",
    metavar="PATH",
    is_eager=True,
    callback=json_path,
    help="With --through: the path of the session id in the JSON body: metadata.session_id.",
)
@click.option(
    "--create",
    metavar="URL",
    callback=url,
    help="With --through: the URL of the POST that makes a session and answers with its id.",
)
@click.option(
    "--header",
    metavar="NAME",
    callback=header_name,
    default=_DEFAULT.header,
    help="The header that carries the key: X-Session-ID for vllm-router.",
)
@click.option(
    "--metrics",
    metavar="URL",
    callback=url,
    help=f"The gateway's metrics.  [default: its host, port {METRICS_PORT}, /metrics]",
)
@click.option("--model", callback=model, help="[default: the first that the gateway lists]")
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
    type=FiniteRange(0, 1, min_open=True),
    default=0.99,
    help="The share of later turns that must stay on their session's worker.",
)
@click.option(
    "--session-id",
    metavar="PATTERN",
    callback=session_id,
    default=_DEFAULT.session_id,
    help="The form of the session ids: {n} is the session's number, {run} is new in each run.",
)
@click.option(
    "--api-key-file",
    metavar="FILE",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help=f"The file with the API key.  [default: the environment variable {API_KEY_VARIABLE}]",
)
@click.option(
    "--json",
    "json_file",
    metavar="FILE",
    type=click.Path(dir_okay=False, path_type=Path),
    callback=output_file,
    help="Write all that was seen to a JSON file.",
)
@click.option(
    "--plot",
    "plot_file",
    metavar="FILE",
    type=click.Path(dir_okay=False, path_type=Path),
    callback=picture_file,
    help="Draw the picture: FILE.svg or FILE.png.",
)
def verify(**options: Any) -> int:
    """Play sessions on the gateway, and turns in new sessions beside them, and judge the pins.

    Exit status: 0 pinned, 1 not pinned, 2 could not tell, 64 wrong usage, 130 ended by Ctrl-C,
    143 ended by SIGTERM.
    """
    for name in ("session_header", "session_json", "create"):
        if options[name] is not None and options["through"] is None:
            raise click.UsageError(f"--{name.replace('_', '-')} needs --through.")
    names = {field.name for field in fields(Plan)}
    beside = options["gateway"].with_scheme("http").with_port(METRICS_PORT)
    options["metrics"] = options["metrics"] or beside.with_path("/metrics")
    plan = Plan(**{name: value for name, value in options.items() if name in names})
    return _verify(
        plan,
        key=api_key(options["api_key_file"]),
        min_kept=options["min_kept"],
        json_file=options["json_file"],
        plot_file=options["plot_file"],
    )


def _verify(
    plan: Plan,
    *,
    key: str | None,
    min_kept: float,
    json_file: Path | None,
    plot_file: Path | None,
) -> int:
    """Play, judge and report; return the exit status."""
    out, err = terminal(sys.stdout), terminal(sys.stderr)
    bars = Bars(plan, err)
    play = Play(plan, api_key=key, played=bars.played)

    def ready(seen: Seen) -> None:
        show_plan(seen, out)
        bars.start()

    with Stop() as stop:
        try:
            asyncio.run(stop.run(play.run(ready)))
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
    """Write ``file``. A failure doesn't change the verdict."""
    try:
        if file:
            write(file)
    except OSError as error:
        print(f"Not written: {file}: {error.strerror or error}", file=sys.stderr, flush=True)


def _draw(seen: Seen, verdict: Verdict, file: Path) -> None:
    from .plot import draw  # takes a second, so only if asked for

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
