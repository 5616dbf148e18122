"""The fixtures in a project that installs this package."""

from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

from ..fresh import pytest_on

TEST = """
import aiohttp
from aiohttp import web

from aiohttp_smg_routing import setup


async def test_server(aiohttp_client, recording_gateway):
    async def handler(request):
        async with aiohttp.ClientSession() as session:
            async with session.post(recording_gateway.chat, json=await request.json()) as answer:
                return web.Response(body=await answer.read(), status=answer.status)

    app = web.Application()
    app.router.add_post("/{session_id}", handler)
    setup(app, {"gateway": str(recording_gateway.url), "instrument": True})
    client = await aiohttp_client(app)
    for _ in range(3):
        async with client.post("/s-1", json={"messages": []}) as answer:
            assert answer.status == 200
    recording_gateway.assert_pinned("s-1", turns=TURNS)


async def test_real(smg_gateway):
    smg = await smg_gateway(1, policy="manual")
    assert len(smg.workers) == 1
"""


INI = """
[pytest]
asyncio_mode = auto
asyncio_default_fixture_loop_scope = function
filterwarnings = error
"""


def run(folder: Path, turns: int, *args: str, **options: Any) -> "CompletedProcess[str]":
    return pytest_on(folder, TEST.replace("TURNS", str(turns)), *args, ini=INI, **options)


def test_they_are_there_in_any_project(tmp_path: Path) -> None:
    done = run(tmp_path, 3)
    assert done.returncode == 0, done.stdout
    assert "2 passed" in done.stdout


def test_a_failing_assertion_shows_the_test_and_not_our_code(tmp_path: Path) -> None:
    done = run(tmp_path, 4)
    assert done.returncode == 1
    assert "AssertionError: session 's-1' is not pinned" in done.stdout
    assert "came on 3 calls, not on 4" in done.stdout
    assert "recorder.py" not in done.stdout


def test_a_program_that_has_imported_the_package_before_pytest_gets_no_warning(
    tmp_path: Path,
) -> None:
    code = "import sys, aiohttp_smg_routing, pytest; sys.exit(pytest.main())"
    done = run(tmp_path, 3, "-k", "server", program=("-c", code))
    assert done.returncode == 0, done.stdout + done.stderr
