"""Sets up each app that the process serves, once the app is complete and before it is frozen."""

import atexit
import logging
import os
import sys
from collections.abc import Iterable
from dataclasses import replace
from functools import partial

from aiohttp import web

from .. import compat
from ..log import say
from ..plugin import ROUTING, setup
from ..plugin import logger as plugin_logger
from ..sources import is_named
from .config import load

logger: logging.Logger = logging.getLogger(__name__)

_NO_APP = (
    "this process has ended, and it served no aiohttp app: so no call carried a key. run is for "
    "servers that serve a web.Application with web.run_app(), AppRunner or gunicorn; if a process "
    "that this one starts serves it, add --children"
)
_NO_APP_HERE = (
    "this process served no aiohttp app itself; those that it started have the plugin too"
)


class _Seen:
    """What the process has done so far."""

    has_app = has_forked = False


def install(config: str = "", *, is_child: bool = False, has_children: bool = False) -> None:
    """Put the plugin on every app that this process serves from now on.

    ``config`` is a TOML file with a table ``[smg_routing]``, or ``package.module:NAME``. If it
    is empty, as it is by default, the environment variables ``SMG_ROUTING_*`` are the options. They
    are read when an app starts, and a wrong config stops that app with ``ConfigError``.
    ``instrument`` is true unless the config sets it. An app that calls ``setup()`` itself, or has a
    sub-app that does, is left as it is. A process that ends without an app logs that, unless
    ``is_child`` is true. ``has_children`` says that its child processes have the plugin. Both are
    false by default.

    Call it before the server makes its app. ``aiohttp-smg-routing run`` does so. Ray's
    ``worker_process_setup_hook`` can.

    >>> runtime_env = {"worker_process_setup_hook": install}  # ray.init(runtime_env=runtime_env)
    """
    seen = _Seen()
    compat.wrap_runner(partial(_started, seen, config))
    os.register_at_fork(after_in_parent=partial(setattr, seen, "has_forked", True))
    if not is_child:
        atexit.register(_ended, seen, _NO_APP_HERE if has_children else _NO_APP)


async def _started(seen: _Seen, source: str, app: web.Application) -> None:
    seen.has_app = True
    if any(ROUTING in it for it in compat.tree(app)):
        return  # it called setup() itself, or was served before
    if app.on_startup.frozen:
        message = "an app is frozen before it is served, and its calls carry no key: call setup()"
        say(logger, logging.WARNING, message)
        return
    config = load(source)
    # The config is of a whole process: it can't say which app has the ClientSession.
    app.on_startup.append(_show_lines)
    setup(app, replace(config, client_session=()))
    app.on_startup.append(_hide_lines)
    app.on_startup.append(partial(_attach, config.client_session, config.instrument))


_lines = logging.StreamHandler()
_lines.setFormatter(logging.Formatter("aiohttp-smg-routing run: %(message)s"))


async def _show_lines(_: web.Application) -> None:
    """Print the start-up line on standard error if the server's logging would drop it."""
    if not (plugin_logger.isEnabledFor(logging.INFO) and plugin_logger.hasHandlers()):
        _lines.stream = sys.stderr  # setStream() flushes the one before, which may be closed
        plugin_logger.addHandler(_lines)
        plugin_logger.setLevel(logging.INFO)


async def _hide_lines(_: web.Application) -> None:
    if _lines in plugin_logger.handlers:
        plugin_logger.removeHandler(_lines)
        plugin_logger.setLevel(logging.NOTSET)


async def _attach(names: Iterable[object], has_all: bool, app: web.Application) -> None:
    for name in names:
        named = [value for key, value in app.items() if is_named(key, name)]
        found = [value for value in named if compat.is_client_session(value)]
        if found:
            app[ROUTING].attach(found[0])
        else:
            remedy = "" if has_all else "; name what each app has, or set instrument = true"
            message = "client_session: an app that is served has no ClientSession under %r%s"
            say(logger, logging.WARNING, message, name, remedy)


def _ended(seen: _Seen, message: str) -> None:
    if not (seen.has_app or seen.has_forked):
        say(logger, logging.WARNING, message)
