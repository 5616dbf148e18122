"""The gateway of this environment, and what ``docs/gateways.md`` says about it."""

import asyncio
import re
import secrets
import sys
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from aiohttp import ClientSession
from yarl import URL

from aiohttp_smg_routing import Routing, RoutingConfig, routing_session
from aiohttp_smg_routing.testing import Recorder, SmgGateway
from harness.agents import CHAT, CHAT_PATH
from harness.processes import ROOT
from harness.workers import recorders

from ..gateways import gateway_program, worker_urls
from ..turns import answered

PAGE = ROOT / "docs" / "gateways.md"

_PROGRAMS = {
    "smg": ("smg", "launch", "--disable-tokenizer-autoload", "--log-level", "warn"),
    "sglang-router": ("sglang_router.launch_router", "--log-level", "warn"),
    "vllm-router": ("vllm_router.launch_router", "--log-level", "warning"),
}


def _installed() -> Iterator[tuple[str, str]]:
    for name in _PROGRAMS:
        with suppress(PackageNotFoundError):
            yield name, version(name)


# An environment has exactly one gateway.
[(PACKAGE, VERSION)] = _installed()


def _rows() -> Iterator[Mapping[str, str]]:
    """Yield the rows of the page's tables about the installed gateway.

    The page names SMG by its minor version, and the others by their full version.
    """
    minor = VERSION.rpartition(".")[0] if PACKAGE == "smg" else VERSION
    head: list[str] = []
    for line in PAGE.read_text("utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("|"):
            head = []
        elif not head:
            head = cells
        elif cells[0].startswith(f"`{PACKAGE}` ") and minor in re.findall(r"[\d.]+", cells[0]):
            yield dict(zip(head, cells, strict=True))


def _facts() -> Mapping[str, Sequence[str]]:
    """Return the code spans of each column; a column that says "none" has none."""
    cells = {head: cell for row in _rows() for head, cell in row.items()}
    return {head: re.findall(r"`([^`]+)`", cell) for head, cell in cells.items()}


FACTS = _facts()
[HEADER] = FACTS["reads the key in"]


@asynccontextmanager
async def launched(launch: str, workers: int = 3) -> AsyncIterator[SmgGateway]:
    """Run the gateway with the policy and the options in ``launch``."""
    program = (sys.executable, "-m", *_PROGRAMS[PACKAGE], "--policy", *launch.split())
    async with (
        recorders(workers) as started,
        gateway_program(*program, *worker_urls(started), workers=started) as gateway,
    ):
        yield gateway


async def play(
    gateway: SmgGateway,
    sessions: Sequence[str],
    turns: int,
    header: str = HEADER,
    **fields: object,
) -> None:
    """Play turns of all sessions at once, with the hook on the client."""
    routing = Routing(RoutingConfig(gateway.url, header=header))
    async with ClientSession(trace_configs=[routing.trace_config()]) as client:

        async def one(session_id: str) -> None:
            with routing_session(session_id):
                for _ in range(turns):
                    body = {**random_turn(session_id), **fields}
                    await answered(client, gateway.url / CHAT, json=body)

        await asyncio.gather(*map(one, sessions))


def prompt(session: object) -> str:
    """Return a random prompt of a session, so that only the key can pin it."""
    return f"{secrets.token_hex(16)} <{session}>"


def random_turn(session: object) -> Mapping[str, object]:
    """Return the body of a turn with a random prompt that names its session."""
    return {"model": "stub", "messages": [{"role": "user", "content": prompt(session)}]}


def served_by_prompt(workers: Sequence[Recorder], path: str = CHAT_PATH) -> dict[str, list[URL]]:
    """Return the workers that received each session's calls, by the prompts."""
    found = defaultdict(list)
    for worker in workers:
        for call in worker.calls:
            if call.path == path:
                [session] = re.findall(rb"<([^>]+)>", call.body)
                found[session.decode()].append(worker.url)
    return found


def is_pinned(sessions: Mapping[Any, Sequence[URL]]) -> bool:
    """Tell whether each session came to one worker, and not all sessions to the same one."""
    workers = [set(urls) for urls in sessions.values()]
    return all(len(urls) == 1 for urls in workers) and len(set.union(*workers)) > 1
