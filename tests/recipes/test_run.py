"""Unchanged servers, started by the commands of docs/recipes.md, with the real gateway."""

import json
import os
import re
import shlex
import shutil
import sys
from asyncio.subprocess import DEVNULL
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from yarl import URL

from aiohttp_smg_routing.testing import Recorder, SmgGateway, StartSmgGateway, failure, free_port
from harness.agents import CHAT_PATH, chat
from harness.processes import ROOT, answering, local_url

from ..programs import SCRIPTS, absent
from ..ray_programs import options, ray_program
from ..turns import assert_keys, turns_of
from ..waiting import until_answered
from .serving import SESSIONS, TURNS, assert_gateway_pinned, by_body, play

PAGE = (ROOT / "docs" / "recipes.md").read_text()
HOSTED = Path(__file__).parent / "hosted"
GATEWAY, OTHER, PORT = "http://10.0.0.1:30000", "http://10.0.0.2:30000", "8080"


def blocks(section: str) -> dict[str, str]:
    """Return the block of each language in a section of the page."""
    text = re.split(rf"^#+ {re.escape(section)}$", PAGE, flags=re.MULTILINE)[1]
    text = re.split(r"^#+ [A-Z]", text, maxsplit=1, flags=re.MULTILINE)[0]
    return dict(re.findall(r"^```(\w+)\n(.*?)^```", text, re.DOTALL | re.MULTILINE))


def here(text: str, smg: SmgGateway, port: int, other: Recorder | None = None) -> str:
    """Replace the addresses in a text of the page with those of the test."""
    urls = {GATEWAY: str(smg.url), OTHER: str(other.url) if other else OTHER, PORT: str(port)}
    return re.sub("|".join(urls), lambda found: urls[found[0]], text)


@asynccontextmanager
async def as_on_the_page(folder: Path, port: int, shell: str) -> AsyncIterator[URL]:
    """Run a shell snippet of the page in ``folder`` until the block ends."""
    places = {"PATH": f"{SCRIPTS}:{os.environ['PATH']}", "PYTHONPATH": f"{ROOT}"}
    exports = "\n".join(f"export {name}={shlex.quote(it)}" for name, it in places.items())
    shell = shell.replace("aiohttp-smg-routing", "exec aiohttp-smg-routing")
    program = f"cd {shlex.quote(str(folder))}\n{exports}\n{shell}"
    url = local_url(port)
    async with answering(url, "sh", "-euc", program) as process:
        yield url
        process.terminate()  # the server has replaced the shell
        await process.wait()


def by_header(session_id: str) -> Mapping[str, Any]:
    return {"path": CHAT_PATH, "json": chat(session_id), "headers": {"X-Session-Id": session_id}}


def by_path(session_id: str) -> Mapping[str, Any]:
    return {"path": f"/sessions/{session_id}/chat", "json": chat(session_id)}


async def assert_ids_pinned(smg: SmgGateway) -> None:
    """Assert that the keys are the session ids, and that the gateway used each."""
    assert_keys(turns_of(*smg.workers))
    await assert_gateway_pinned(smg)


SHAPES = {
    "router": ("A router that runs in a thread of its own", by_header),
    "proxy": ("A proxy whose main() makes and runs its app", by_body),
}


@pytest.mark.parametrize(("name", "section", "call"), [(it, *SHAPES[it]) for it in SHAPES])
async def test_each_session_stays_on_one_worker(
    smg_gateway: StartSmgGateway, folder: Path, name: str, section: str, call: Any
) -> None:
    smg, port = await smg_gateway(3, policy="manual"), free_port()
    shutil.copy(HOSTED / f"{name}.py", folder)
    async with as_on_the_page(folder, port, here(blocks(section)["sh"], smg, port)) as url:
        await play(url, call)
    await assert_ids_pinned(smg)


async def test_a_load_balancer_sends_the_key_with_each_attempt(
    smg_gateway: StartSmgGateway, recording_gateway: Recorder, folder: Path
) -> None:
    smg, port = await smg_gateway(3, policy="manual"), free_port()
    recording_gateway.answer = lambda call: failure()
    shutil.copy(HOSTED / "balancer.py", folder)
    block = blocks("A load balancer that retries on other backends")
    toml, shell = (here(block[it], smg, port, recording_gateway) for it in ("toml", "sh"))
    (folder / "balancer.toml").write_text(toml)
    async with as_on_the_page(folder, port, shell) as url:
        await play(url, by_body)
    failed = turns_of(recording_gateway)
    assert len(failed) == len(SESSIONS) * TURNS
    assert_keys(failed)
    await assert_ids_pinned(smg)


@pytest.mark.skipif(sys.platform == "win32", reason="gunicorn is for POSIX")
async def test_gunicorn_with_several_processes(smg_gateway: StartSmgGateway, folder: Path) -> None:
    smg, port = await smg_gateway(3, policy="manual"), free_port()
    [command] = re.findall(r"`(aiohttp-smg-routing run -- gunicorn .*)`", PAGE)
    shell = (
        f"export SMG_ROUTING_GATEWAY={smg.url} SMG_ROUTING_SESSION_ID=json:user GATEWAY={smg.url}\n"
        f"{command} --workers 2 --bind 127.0.0.1:{port} --no-control-socket"
    )
    (folder / "server.py").write_text(
        "from tests.recipes import unedited\n\n"
        "async def make_app():\n    return unedited.make_app()\n"
    )
    async with as_on_the_page(folder, port, shell) as url:
        await play(url, by_body)
    await assert_ids_pinned(smg)


def submitted(actor: str, smg: SmgGateway) -> tuple[str, Mapping[str, str]]:
    """Return the unchanged program, and the environment that ``ray job submit`` sets for it."""
    yaml = import_module("yaml")  # a dependency of Ray
    given = yaml.safe_load(here(blocks("A Ray actor")["yaml"], smg, 0))
    return actor, {"RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps({"runtime_env": given})}


def edited(actor: str, smg: SmgGateway) -> tuple[str, Mapping[str, str]]:
    """Return the program with the page's ``runtime_env`` in its ``ray.init()``."""
    snippet = here(blocks("A Ray actor")["python"], smg, 0)
    assert actor.count("ray.init(") == 1
    return snippet + actor.replace("ray.init(", "ray.init(runtime_env=RUNTIME_ENV, "), {}


@pytest.mark.parametrize("way", [submitted, edited])
async def test_a_ray_actor(smg_gateway: StartSmgGateway, way: Any) -> None:
    if find_spec("ray") is None:
        absent("Ray is not installed: pip install -e . --group scale")
    smg, port = await smg_gateway(3, policy="manual"), free_port()
    # Ray puts sockets into its folder, and their paths must be short.
    with TemporaryDirectory(prefix="ray-") as name:
        folder = Path(name)
        program, given = way((HOSTED / "actor.py").read_text(), smg)
        (folder / "actor.py").write_text(program)
        argv = ("actor.py", "--port", str(port), "--upstream", str(smg.url))
        async with ray_driver(folder, argv, given):
            await play(local_url(port), by_path)
    await assert_ids_pinned(smg)


@asynccontextmanager
async def ray_driver(
    folder: Path, argv: tuple[str, ...], given: Mapping[str, str]
) -> AsyncIterator[None]:
    """Run a program with a Ray cluster until the block ends; leave nothing behind."""
    env = {"RAY_INIT": json.dumps(options(str(folder), 1)), "PYTHONPATH": str(ROOT), **given}
    async with ray_program(folder, *argv, env=env, stdout=DEVNULL) as process:
        await until_answered(local_url(int(argv[2])), process)
        assert process.returncode is None, (folder / "log").read_text()
        yield
