"""Run tests on a copy of the repository, each in its own process."""

import gc
import itertools
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path

from .selection import PACKAGE

#: Most tests import these. They are loaded once, because each run is forked from this process. So
#: are the plugins of pytest, except the package's own, which comes from the copy.
_LOADED = ("pytest", "aiohttp.test_utils", "aiohttp.web", "hypothesis.strategies")

_FORK = multiprocessing.get_context("fork")
# pytest warns that hypothesis, which has a plugin, was imported too early to be rewritten.
_QUIET = "ignore:Module already imported"
_OPTIONS = ("-q", "-x", "--hypothesis-seed=0", "-p", "no:cacheprovider", "-W", _QUIET)
_STOP = {signal.SIGINT, signal.SIGTERM}
_NO_TESTS = 5  # an exit status of pytest

_SECONDS_MORE = 20  # more than three times the seconds without a fault


class Copy:
    """A copy of the working tree, without the files that git ignores."""

    def __init__(self, root: Path, folder: Path) -> None:
        self._tree = folder / "tree"
        self._printed, self._temporary = folder / "printed", folder / "tmp"
        self._temporary.mkdir()
        self._seconds: dict[str, float] = {}
        self._times = itertools.count(int(time.time()))
        command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        names = subprocess.run(command, cwd=root, capture_output=True, check=True, text=True).stdout  # noqa: S603
        for name in names.split("\0"):
            if (root / name).is_file():
                (self._tree / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(root / name, self._tree / name)
        for name in _LOADED:
            import_module(name)
        for plugin in entry_points(group="pytest11"):
            if PACKAGE not in plugin.value:
                plugin.load()
        gc.freeze()
        # Both signals raise KeyboardInterrupt, but only while the process waits for a run.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        signal.pthread_sigmask(signal.SIG_BLOCK, _STOP)

    def measure(self, test: str) -> float:
        """Return the seconds that a test file takes without a fault; exit if it fails."""
        started = time.monotonic()
        if self._run(test, None) != 0:
            sys.exit(f"{self._printed.read_text(errors='replace')}\n{test} fails without a mutant.")
        self._seconds[test] = time.monotonic() - started
        return self._seconds[test]

    def outcome(self, file: str, text: str, tests: tuple[str, ...]) -> str:
        """Return the outcome of ``tests``, fastest first, if ``file`` has another text."""
        with self._changed(self._tree / file, text):
            for test in sorted(tests, key=self._seconds.__getitem__):
                status = self._run(test, _SECONDS_MORE + 3 * self._seconds[test])
                if status != 0:
                    return "timed out" if status is None else "caught"
        return "survived"

    @contextmanager
    def _changed(self, file: Path, text: str) -> Iterator[None]:
        before = file.read_text(encoding="utf-8")
        try:
            self._write(file, text)
            yield
        finally:
            self._write(file, before)

    def _write(self, file: Path, text: str) -> None:
        file.write_text(text, encoding="utf-8")
        # Python recompiles a file only if its size or its time, in whole seconds, changes.
        now = next(self._times)
        os.utime(file, (now, now))

    def _run(self, test: str, limit: float | None) -> int | None:
        """Return the exit status of pytest, or None if it took longer than ``limit`` seconds."""
        run = _FORK.Process(target=self._pytest, args=[test])
        run.start()
        assert run.pid is not None  # noqa: S101 - it has started
        try:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOP)
            run.join(limit)
            status = run.exitcode
            if status is None:
                os.kill(run.pid, signal.SIGINT)  # fixtures end processes in their own groups
                run.join(_SECONDS_MORE)
        finally:
            signal.pthread_sigmask(signal.SIG_BLOCK, _STOP)
            with suppress(ProcessLookupError):
                os.killpg(run.pid, signal.SIGKILL)
            run.kill()
            run.join()
        if status == _NO_TESTS:
            sys.exit(f"{test} has no tests.")
        return status

    def _pytest(self, test: str) -> None:
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOP)
        printed = os.open(self._printed, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(printed, 1)
        os.dup2(printed, 2)
        os.chdir(self._tree)
        os.environ |= {"PYTHONPATH": str(self._tree), "TMPDIR": str(self._temporary)}
        path = f"pythonpath={self._tree}"  # the copy's package, which is not imported yet
        sys.exit(import_module("pytest").main([*_OPTIONS, "-o", path, test]))
