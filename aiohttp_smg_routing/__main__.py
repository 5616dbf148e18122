"""The command line: ``aiohttp-smg-routing``, or ``python -m aiohttp_smg_routing``."""

import sys
from collections.abc import Sequence
from importlib.util import find_spec

from . import __version__

_NEEDED = ("click", "matplotlib", "prometheus_client", "rich")
_USAGE = 64  # EX_USAGE of sysexits.h
_INTERRUPTED = 130  # 128 + SIGINT, as in a shell


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that ``argv`` names, by default ``sys.argv[1:]``; return its exit status.

    It is 64 if the extra ``verify`` is not installed, 130 if Ctrl-C comes during the imports.
    """
    try:
        return _run(sys.argv[1:] if argv is None else argv)
    except KeyboardInterrupt:
        return _INTERRUPTED


def _run(argv: Sequence[str]) -> int:
    if argv[:1] == ["run"]:  # needs nothing but the core
        from .run.command import main as run_server

        return run_server(argv[1:])
    if list(argv) == ["--version"]:
        print(f"aiohttp-smg-routing {__version__}")
        return 0
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        print(
            f"Commands other than run need {', '.join(missing)}: "
            "pip install 'aiohttp_smg_routing[verify]'",
            file=sys.stderr,
        )
        return _USAGE
    import click

    from .run.command import SUMMARY
    from .verify.cli import cli, run
    from .watch.cli import watch

    cli.add_command(watch)
    cli.add_command(click.Command("run", help=SUMMARY))  # for the help: it has its own main()
    return run(argv)


if __name__ == "__main__":
    sys.exit(main())
