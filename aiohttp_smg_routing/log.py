"""Log records that neither flood a log nor fail a turn: logged once, or at most 60 a minute."""

import asyncio
import inspect
import logging
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Hashable
from contextlib import suppress
from typing import Any

LOGGED_A_MINUTE = 60
A_RUN = 20
_MINUTE = 60.0  # seconds
_MOST_REMEMBERED = 1000


Task = asyncio.Task[Any]


def say(
    logger: logging.Logger,
    level: int,
    message: str,
    *args: object,
    error: BaseException | None = None,
) -> None:
    """Log a record, with the traceback of an ``error``.

    If the user's logging handler or filter raises, the error is printed and no call fails.
    """
    try:
        logger.log(level, message, *args, exc_info=error)
    except Exception:
        with suppress(Exception):
            traceback.print_exc(file=sys.stderr)


def running_task() -> Task | None:
    """Return the running task, or None where no event loop runs in this thread."""
    try:
        return asyncio.current_task()
    except RuntimeError:
        return None


def running_code(task: Task | None = None) -> str:
    """Return the name of code for a log line: the coroutine of ``task``, or of the running one."""
    task = task or running_task()
    return getattr(task and task.get_coro(), "__qualname__", None) or "code outside a task"


class Once:
    """Tells new things from those that were logged before.

    It remembers 1,000 things. After that, nothing counts as new.
    """

    def __init__(self) -> None:
        self._said: dict[Hashable, object] = {}

    def is_new(self, what: Hashable) -> bool:
        """Tell whether no thread has asked about ``what`` before."""
        if what in self._said or len(self._said) >= _MOST_REMEMBERED:
            return False
        mine = object()
        return self._said.setdefault(what, mine) is mine


class News:
    """Calls to the user's code that wait until no lock is held. A failure there is logged once.

    Any thread may add one at any point.
    """

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger
        self.waiting: deque[tuple[str, Callable[[], object]]] = deque()
        self._failures = Once()

    def add(self, what: str, tell: Callable[[], object]) -> None:
        """Add a call; ``what`` is its name in the log if it fails."""
        self.waiting.append((what, tell))

    def tell(self) -> None:
        """Make all waiting calls."""
        with suppress(IndexError):  # if another thread has taken the last one
            while self.waiting:
                what, tell = self.waiting.popleft()
                try:
                    returned = tell()
                    if inspect.iscoroutine(returned):
                        returned.close()
                        raise TypeError(f"{what} is async: nobody awaits it")
                except (Exception, asyncio.CancelledError) as error:
                    if self._failures.is_new(what):
                        message = "%s failed: the call goes on, and this is logged once"
                        say(self._logger, logging.ERROR, message, what, error=error)


class Capped:
    """Logs at most 60 warnings a minute, and after the minute how many more there were.

    The ``hint`` follows the twentieth warning of a minute. It says what so many warnings may mean.
    """

    def __init__(self, logger: logging.Logger, what: str, hint: str) -> None:
        self._logger = logger
        self._what = what
        self._hint = hint
        self._lock = threading.RLock()
        self._began = -_MINUTE
        self._logged = self._held_back = 0

    def warn(self, message: str, *args: object) -> None:
        """Log a warning, or count it as held back."""
        with self._lock:
            now = time.monotonic()
            left = self._began + _MINUTE - now
            if left <= 0:
                self.flush()
                self._began, self._logged, left = now, 0, _MINUTE
            if self._logged == LOGGED_A_MINUTE:
                self._held_back += 1
                if self._held_back == 1:
                    with suppress(RuntimeError):  # no loop runs here: the next warning flushes
                        asyncio.get_running_loop().call_later(left, self.flush)
                return
            self._logged += 1
            is_a_run = self._logged == A_RUN
        say(self._logger, logging.WARNING, message, *args)
        if is_a_run:
            say(self._logger, logging.WARNING, "%d %s: %s", A_RUN, self._what, self._hint)

    def flush(self) -> None:
        """Log how many warnings were held back, if any were."""
        with self._lock:
            held_back, self._held_back = self._held_back, 0
        if held_back:
            say(
                self._logger,
                logging.WARNING,
                "%d more %s: at most %d a minute are logged one by one",
                held_back,
                self._what,
                LOGGED_A_MINUTE,
            )
