"""Show what ``verify`` prints and draws for a gateway that pins, with real engines.

The output is for docs/verify.md. The options are those of ``verify``.

python -m benchmarks.pins [OPTION ...]
"""

import asyncio
import sys
from asyncio.subprocess import PIPE
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from aiohttp_smg_routing.testing import SmgGateway, smg_gateway
from harness.engines import engines, write_model
from harness.processes import CLI

WORKERS = 3
SLOTS, CONTEXT, BLOCKS = 24, 2048, 2
LAUNCH = ("--assignment-mode", "min_group")
OPTIONS = ("--concurrency", "2")  # two cores can't serve more
PICTURE = "pins.svg"


async def main(options: Sequence[str]) -> int:
    """Start engines and gateway, and run ``verify``; return its exit status."""
    with TemporaryDirectory(prefix="pins-") as folder:
        model = Path(folder, "model.gguf")
        write_model(model, blocks=BLOCKS)
        async with (
            engines(WORKERS, slots=SLOTS, context=CONTEXT, model=model) as urls,
            smg_gateway(urls, policy="manual", args=LAUNCH) as smg,
        ):
            return await show(smg, options)


async def show(smg: SmgGateway, options: Sequence[str]) -> int:
    """Run ``verify`` on the gateway and print its output as Markdown; return its exit status."""
    argv = (*CLI, "verify", str(smg.url), "--metrics", str(smg.metrics_url), *options)
    process = await asyncio.create_subprocess_exec(*argv, "--plot", PICTURE, stdout=PIPE)
    printed, _ = await process.communicate()
    print("```text", printed.decode().rstrip(), "```", sep="\n")
    return process.returncode or 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main(sys.argv[1:] or OPTIONS)))
