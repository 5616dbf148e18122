"""The pages that users read are run: each snippet of README.md and docs/*.md is a test.

Those of docs/scaling.md that are not sh are what tests/scale runs.

Addresses in them are made real: ``http://10.0.0.1:30000`` is a recording gateway while they run,
and ``8080`` a free port.
Names that a snippet takes for granted, such as ``app``, are those that ``Page`` sets.
"""

import ast
import asyncio
import inspect
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Awaitable, Callable, Mapping
from importlib import import_module
from importlib.metadata import metadata
from pathlib import Path
from typing import Any

from aiohttp import ClientSession, CookieJar, web
from aiohttp.test_utils import TestClient, TestServer
from sybil import Example, Sybil
from sybil.parsers.markdown import CodeBlockParser
from yarl import URL

import aiohttp_smg_routing
from aiohttp_smg_routing.testing import Recorder, free_port, recording_gateway

tomllib = import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # or it asks the internet, when imported

ROOT = Path(__file__).parent
GATEWAY = "http://10.0.0.1:30000"
PORT = "8080"


class Page:
    """What the snippets of a page share: an event loop, a gateway, and the names that they set."""

    def __init__(self, namespace: dict[str, Any]) -> None:
        self.loop = asyncio.new_event_loop()
        self._gateway = recording_gateway()
        self.gateway: Recorder = self.loop.run_until_complete(self._gateway.__aenter__())
        self._session = self.loop.run_until_complete(new_session())
        namespace |= vars(aiohttp_smg_routing)
        namespace |= {
            "aiohttp_smg_routing": aiohttp_smg_routing,
            "app": web.Application(),
            "ClientSession": ClientSession,
            "CookieJar": CookieJar,
            "CLIENT": web.AppKey("client", ClientSession),
            "config": {"smg_routing": {"gateway": str(self.gateway.url)}},
            "gateway": self.gateway,
            "page": self,
            "play": self.play,
            "serve": serve,
            "session": self._session,
            "turn": {"messages": [{"role": "user", "content": "hello"}]},
            "web": web,
        }

    async def play(
        self,
        app: web.Application,
        call: Callable[[str], Mapping[str, Any]],
        *,
        sessions: tuple[str, ...] = ("s-1", "s-2"),
        turns: int = 2,
    ) -> None:
        """Play ``turns`` of each session in turn, as ``call`` makes them; all must be pinned."""
        self.gateway.calls.clear()
        async with serve(app) as client:
            for _ in range(turns):
                for session_id in sessions:
                    async with client.post(**call(session_id)) as response:
                        assert response.status == 200, await response.text()
                        await response.read()
        for session_id in sessions:
            routing = app.get(aiohttp_smg_routing.ROUTING)  # a sub-app may have it
            config = routing.config if routing else None
            self.gateway.assert_pinned(session_id, turns=turns, config=config)

    def run(self, coroutine: Awaitable[Any]) -> None:
        """Run what a snippet awaits."""
        self.loop.run_until_complete(coroutine)

    def close(self) -> None:
        """End with the page, and with the tasks that its snippets have left running."""
        self.run(self._session.close())
        self.run(self._gateway.__aexit__(None, None, None))
        self.run(_cancel_tasks())
        self.run(self.loop.shutdown_asyncgens())
        self.run(self.loop.shutdown_default_executor())
        self.loop.close()


async def _cancel_tasks() -> None:
    """Cancel every other task: on a closed loop it would fail a later test when it is collected."""
    left = asyncio.all_tasks() - {asyncio.current_task()}
    for task in left:
        task.cancel()
    await asyncio.gather(*left, return_exceptions=True)


def serve(app: web.Application, **kwargs: Any) -> "TestClient[web.Request, web.Application]":
    """Return a client of ``app``, which runs as long as the client is open."""
    return TestClient(TestServer(app), **kwargs)


async def new_session() -> ClientSession:
    """Return a session; aiohttp wants a running loop for it."""
    return ClientSession()


def python(example: Example) -> None:
    """Run a snippet, which may await."""
    page: Page = example.namespace["page"]
    source = "\n" * (example.line + example.parsed.line_offset) + real(example)
    flags = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
    code = compile(source, example.path, "exec", flags=flags, dont_inherit=True)

    async def run() -> None:
        coroutine = eval(code, example.namespace)  # noqa: S307 - it is our own page
        if inspect.iscoroutine(coroutine):
            await coroutine

    page.run(run())


def toml(example: Example) -> None:
    """Take a snippet as the config of the snippets below."""
    table = tomllib.loads(real(example))
    config = {"gateway": str(example.namespace["gateway"].url)}
    config |= table.get("smg_routing", table)
    aiohttp_smg_routing.RoutingConfig.from_mapping(config)
    example.namespace["config"] = {"smg_routing": config}


def shell(example: Example) -> None:
    """Look that there is what each line calls: what it does is tested where it takes minutes."""
    for line in example.parsed.splitlines():
        command, *words = shlex.split(line, comments=True)
        if command == "make":
            subprocess.run(["make", "--dry-run", *words], cwd=ROOT, check=True, capture_output=True)  # noqa: S603, S607
        elif command == "pip":
            extras = re.findall(r"aiohttp_smg_routing\[([^\]]+)\]", line)
            known = metadata("aiohttp_smg_routing").get_all("Provides-Extra") or []
            assert [extra for extra in extras if extra not in known] == []
        elif command != "gunicorn":  # tests/recipes/test_servers.py runs that line
            raise AssertionError(f"nothing looks after {line!r}")


def real(example: Example) -> str:
    """Return a snippet with real addresses in it."""
    url: URL = example.namespace["gateway"].url
    return str(example.parsed).replace(GATEWAY, str(url)).replace(PORT, str(free_port()))


def setup(namespace: dict[str, Any]) -> None:
    """Begin a page."""
    Page(namespace)


def teardown(namespace: dict[str, Any]) -> None:
    """End a page."""
    namespace["page"].close()


SHELL = CodeBlockParser("sh", shell)
PAGES_WITH_SNIPPETS = ("monitoring", "recipes", "reliability", "testing", "troubleshooting")
PAGES = Sybil(
    parsers=[CodeBlockParser("python", python), CodeBlockParser("toml", toml), SHELL],
    patterns=["README.md", "SECURITY.md", *(f"docs/{page}.md" for page in PAGES_WITH_SNIPPETS)],
    setup=setup,
    teardown=teardown,
)
pytest_collect_file = (PAGES + Sybil(parsers=[SHELL], patterns=["docs/scaling.md"])).pytest()
