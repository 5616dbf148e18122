"""The benchmark of many sessions: its figures are those that the policies must have."""

import re
import subprocess
import sys
from collections.abc import Sequence

import pytest

from harness.proc import HAS_PROC
from harness.processes import ROOT

QUICK = 200  # sessions


@pytest.mark.skipif(not HAS_PROC, reason="it reads the gateway's memory in /proc")
def test_a_quick_run_has_what_each_policy_must_have() -> None:
    argv = (sys.executable, "-m", "benchmarks.scaling", "--quick")
    said = subprocess.run(argv, cwd=ROOT, check=True, capture_output=True, text=True).stdout  # noqa: S603

    def figures(pattern: str) -> Sequence[int]:
        """Return the numbers of the one line."""
        [line] = [found for line in said.splitlines() if (found := re.fullmatch(pattern, line))]
        return [int(number) for number in line.groups()]

    several = r"  {}: (\d+) of (\d+) sessions on several workers"
    split, played = figures(several.format("manual"))
    assert (played, split > QUICK / 2) == (QUICK, True)  # 7 of 8 on average
    assert figures(several.format("consistent_hashing")) == [0, QUICK]

    moved = r"  starts again{}, {}: (\d+)"
    assert figures(moved.format("", "manual"))[0] > QUICK / 2
    for what in ("", " in another order of its workers"):
        assert figures(moved.format(what, "consistent_hashing")) == [0]
    [count] = figures(moved.format(" with one worker less", "consistent_hashing"))
    assert 0 < count < QUICK / 2
    assert f"{count}\n    of which had been on that worker: {count}\n" in said

    # Memory: as many calls of known keys as of new ones, beside the 200 of the first round.
    assert ("'occupied_hit': 2000" in said, "'vacant': 2200" in said) == (True, True)
    assert said.count("at once: ") == 2 * (4 + 1)  # four policies, and the last with more sessions
