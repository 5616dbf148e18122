"""The micro-benchmarks, compared with those of a commit, one round each."""

import os
import re
import subprocess
import sys

from harness.processes import ROOT

BENCHMARKS = re.findall(
    r"(?<=^def )test_\w+", (ROOT / "benchmarks/test_micro.py").read_text(), re.MULTILINE
)
# pytest-benchmark measures nothing in a worker of pytest-xdist, which this variable marks.
ENVIRONMENT = {name: it for name, it in os.environ.items() if not name.startswith("PYTEST_")}
ONE_ROUND = ("--benchmark-min-rounds=1", "--benchmark-max-time=0.001")


def test_each_piece_of_a_turn_is_shown_beside_that_of_a_commit() -> None:
    done = subprocess.run(  # noqa: S603 - it is ours
        [ROOT / ".ci" / "micro", "HEAD", *ONE_ROUND],
        env={**ENVIRONMENT, "VENV": sys.prefix},
        capture_output=True,
        text=True,
        check=True,
    )
    if not (ROOT / ".git").exists():  # an sdist
        assert done.stderr == ".ci/micro: there is no commit HEAD here to compare with.\n"
        return
    assert done.stderr == ""
    shown = re.findall(r"^(test_\w+) \((base|head)\)", done.stdout, re.MULTILINE)
    assert sorted(shown) == sorted((name, tree) for name in BENCHMARKS for tree in ("base", "head"))
