"""Fuzz each target for some seconds: ``python -m fuzz SECONDS``, by default 60.

Each run begins with the same inputs, and goes on with new ones. 0 seconds try the first only.
If a law is broken the exit status is 1. The input is then shown, and kept in a file that
``python -m fuzz.run TARGET FILE`` tries again.
"""

import random
import re
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from harness.markdown import head, row

TARGETS = ("key", "matcher", "config")
FIRST = 1000  #: The number of inputs that each run of a target begins with.


def main() -> int:
    """Fuzz each target in its own process, as libFuzzer requires; return the exit status."""
    seconds = int(sys.argv[1]) if len(sys.argv) > 1 else 60
    tried = {target: fuzz(target, seconds) for target in TARGETS}
    broken = [target for target, (holds, _) in tried.items() if not holds]
    print(head("target", "seconds", "inputs"))
    for target, (_, inputs) in tried.items():
        print(row(target, str(seconds), f"{inputs:,}"))
    print()
    print(f"a law was broken: {', '.join(broken)}" if broken else "no law was broken")
    return 1 if broken else 0


def fuzz(target: str, seconds: int) -> tuple[bool, int]:
    """Return whether a target's laws hold for libFuzzer's inputs, and the number of inputs."""
    inputs, chosen = 0, random.Random(target)  # noqa: S311
    with TemporaryDirectory() as corpus:
        # Long inputs to begin with, because short inputs seldom fill more than one field.
        for number in range(FIRST):
            Path(corpus, str(number)).write_bytes(chosen.randbytes(1024))
        command = [sys.executable, "-m", "fuzz.run", target, corpus]
        limit = f"-max_total_time={seconds}" if seconds else "-runs=0"
        options = [limit, f"-artifact_prefix=fuzz-{target}-"]
        options += ["-max_len=1024", "-len_control=0", "-reduce_inputs=0", "-timeout=20"]
        options += ["-print_final_stats=1"]
        with subprocess.Popen([*command, *options], stderr=subprocess.PIPE) as process:
            for line in process.stderr or ():
                sys.stderr.buffer.write(line)
                sys.stderr.flush()
                if found := re.match(rb"stat::number_of_executed_units: +(\d+)", line):
                    inputs = int(found[1])
        return process.returncode == 0, inputs


if __name__ == "__main__":
    sys.exit(main())
