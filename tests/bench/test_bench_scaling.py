"""The benchmark of many sessions: its figures fit the policies."""

import re
import sys
from collections.abc import Sequence

import pytest

from harness.proc import HAS_PROC
from harness.processes import ROOT, finished

QUICK = 100  # sessions


@pytest.mark.skipif(not HAS_PROC, reason="it reads the gateway's memory in /proc")
def test_a_quick_run_has_what_each_policy_must_have() -> None:
    said = finished(ROOT, sys.executable, "-m", "benchmarks.scaling", "--quick", check=True).stdout

    def figures(pattern: str) -> Sequence[int]:
        """Return the numbers in the only line that matches."""
        [line] = [found for line in said.splitlines() if (found := re.fullmatch(pattern, line))]
        return [int(number) for number in line.groups()]

    [split] = figures(r"\| `manual` \| (\d+) \|")
    assert split > QUICK / 2  # 7 of 8 on average
    assert figures(r"\| `consistent_hashing` \| (\d+) \|") == [0]

    for what in ("the same workers", "its workers in another order"):
        manual, hashed = figures(rf"\| with {what} \| (\d+) \| (\d+) \|")
        assert (manual > QUICK / 2, hashed) == (True, 0)
    of_those = r"(\d+), of those (\d+) had been on that worker"
    *_, count, gone = figures(rf"\| with one worker less \| {of_those} \| {of_those} \|")
    assert 0 < count == gone < QUICK / 2

    # Memory: as many calls with known keys as with new ones, plus the 50 of the first round.
    assert ("500 `occupied_hit`" in said, "550 `vacant`" in said) == (True, True)
    # Four policies with one and with many sessions at a time, and the last also with more sessions.
    assert len(re.findall(r"^\| `\w+[^|]*` \| [0-9,]+ \| (?:1|32) \| ", said, re.MULTILINE)) == 10
