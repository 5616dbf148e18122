"""Run the pages that users read: each snippet of README.md and docs/*.md is a test.

tests/scale runs the snippets of docs/scaling.md that are not sh.

Real addresses replace those in the snippets: a recording gateway replaces
``http://10.0.0.1:30000``, and a free port replaces ``8080``. ``Page`` sets the names that snippets
take for granted, such as ``app``.

A snippet that begins with a file name, such as ``# server.py``, is also written to that file. The
lines ``smg launch`` and ``python server.py`` run the real gateway and that file, on free ports.
"""

import ast
import asyncio
import inspect
import json
import re
import shlex
import sys
import sysconfig
import tempfile
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
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
from aiohttp_smg_routing.testing import (
    Recorder,
    SmgGateway,
    child_process,
    free_port,
    free_ports,
    recording_gateway,
)
from harness.agents import CHAT
from harness.processes import ROOT, finished, local_url
from harness.workers import recorders

from .commands import verify
from .gateways import gateway_program, worker_urls
from .turns import answered

tomllib = import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
sys.modules["tomllib"] = tomllib  # Python 3.10 has no tomllib

GATEWAY = "http://10.0.0.1:30000"
PORT = "8080"
SERVER = f"http://127.0.0.1:{PORT}"
ELSEWHERE = (  # tests/recipes runs the first four
    *("aiohttp-smg-routing", "export", "gunicorn", "ray"),
    *("python3", "ruff"),
)
FILE = re.compile(r"# (\S+\.(?:py|toml))\n")  # the first line of a snippet for a file
TURN = {"messages": [{"role": "user", "content": "hello"}]}


class Page:
    """The event loop, the gateway and the names that the snippets of a page share."""

    def __init__(self, namespace: dict[str, Any]) -> None:
        self.loop = asyncio.new_event_loop()
        self._programs = AsyncExitStack()
        self._folder = self._programs.enter_context(tempfile.TemporaryDirectory())
        self._played: Counter[str] = Counter()  # turns by session
        self._ports = dict(zip(("30000", PORT), map(str, free_ports(2)), strict=True))
        self._server = local_url(int(self._ports[PORT]))
        self.smg: SmgGateway
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
            "serve": client_of,  # what the pages call it
            "session": self._session,
            "turn": TURN,
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
        """Play ``turns`` turns of each session, made by ``call``; assert that all are pinned."""
        self.gateway.calls.clear()
        async with client_of(app) as client:
            for _ in range(turns):
                for session_id in sessions:
                    await answered(client, **call(session_id))
        for session_id in sessions:
            routing = app.get(aiohttp_smg_routing.ROUTING)  # a sub-app may have it
            config = routing.config if routing else None
            self.gateway.assert_pinned(session_id, turns=turns, config=config)

    def save(self, name: str, text: str) -> str:
        """Write a snippet to its file, and return the text of the file."""
        text = self.here(text)
        Path(self._folder, name).write_text(text)
        return text

    def here(self, text: str) -> str:
        """Replace the ports in a text with the real ports of this page."""
        return re.sub("|".join(self._ports), lambda port: self._ports[port[0]], text)

    async def launch(self, words: Sequence[str]) -> None:
        """Run ``smg launch`` with a recorder in place of each worker that the line names."""
        end = words.index("--worker-urls")
        smg = str(Path(sysconfig.get_path("scripts"), "smg"))
        enter = self._programs.enter_async_context
        workers = await enter(recorders(len(words) - end - 1))
        port = int(self._ports["30000"])
        self.smg = await enter(
            gateway_program(smg, *words[:end], *worker_urls(workers), workers=workers, port=port)
        )

    async def start(self, name: str) -> None:
        """Run a file of this page as a program that listens at port 8080."""
        code = (
            f"import os, runpy; os.chdir({self._folder!r}); "
            f"runpy.run_path({name!r}, run_name='__main__')"
        )

        async def ready() -> bool:
            async with self._session.get(self._server) as response:
                return response.status == 404

        program = child_process(sys.executable, "-c", code, ready=ready)
        await self._programs.enter_async_context(program)

    async def play_on_server(self, *, sessions: int, turns: int) -> None:
        """Play sessions up to that turn, every other turn streamed; assert that all are pinned."""
        names = [f"s-{number}" for number in range(1, sessions + 1)]
        for number in range(turns):
            for session_id in names:
                if self._played[session_id] <= number:  # the page's own lines may have played it
                    body = {"model": "stub", **TURN, "stream": bool(number % 2)}
                    await self._turn(f"/sessions/{session_id}/{CHAT}", body)
        for session_id in names:
            self.smg.assert_pinned(session_id, turns=turns)

    async def curl(self, words: Sequence[str]) -> None:
        """Send the turns that ``curl URL -H HEADER -d BODY`` sends to the program.

        The URL may have curl's ranges, such as ``[1-5]``.
        """
        url, *options = words
        assert options[::2] == ["-H", "-d"], options
        assert options[1] == "Content-Type: application/json"
        body = json.loads(options[3]) | {"model": "stub"}
        texts = [url.removeprefix(SERVER)]
        while found := re.search(r"\[(\d+)-(\d+)\]", texts[0]):
            numbers = range(int(found[1]), int(found[2]) + 1)
            texts = [text.replace(found[0], str(it)) for text in texts for it in numbers]
        for path in texts:
            await self._turn(path, body)

    async def _turn(self, path: str, body: Mapping[str, Any]) -> None:
        async with self._session.post(self._server.join(URL(path)), json=body) as answer:
            text = await answer.text()
            assert answer.status == 200, text
            assert ("data: [DONE]" in text) == body.get("stream", False)
        self._played[path.split("/")[2]] += 1

    async def verify(self, words: Sequence[str]) -> None:
        """Run ``aiohttp-smg-routing verify`` on the real gateway; it must find it pinned."""
        url, *options = map(self.here, words)
        options += ["--metrics", str(self.smg.metrics_url)]
        folder = Path(self._folder)
        run = await asyncio.to_thread(verify, folder, URL(url), *options, program=True)
        assert run.status == 0, run.out + run.err

    def run(self, coroutine: Awaitable[Any]) -> None:
        """Run a coroutine of a snippet."""
        self.loop.run_until_complete(coroutine)

    def close(self) -> None:
        """Stop the page's programs, and cancel the tasks that its snippets left running."""
        self.run(self._programs.aclose())
        self.run(self._session.close())
        self.run(self._gateway.__aexit__(None, None, None))
        self.run(_cancel_tasks())
        self.run(self.loop.shutdown_asyncgens())
        self.run(self.loop.shutdown_default_executor())
        self.loop.close()


async def _cancel_tasks() -> None:
    """Cancel every other task, because garbage collection of one would fail a later test."""
    left = asyncio.all_tasks() - {asyncio.current_task()}
    for task in left:
        task.cancel()
    await asyncio.gather(*left, return_exceptions=True)


def client_of(app: web.Application, **kwargs: Any) -> "TestClient[web.Request, web.Application]":
    """Return a client of ``app``; ``app`` runs while the client is open."""
    return TestClient(TestServer(app), **kwargs)


async def new_session() -> ClientSession:
    """Return a ClientSession, which aiohttp must make in a running loop."""
    return ClientSession()


def python(example: Example) -> None:
    """Run a Python snippet, which may await."""
    page: Page = example.namespace["page"]
    source = "\n" * (example.line + example.parsed.line_offset) + saved(example)
    flags = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
    code = compile(source, example.path, "exec", flags=flags, dont_inherit=True)

    async def run() -> None:
        coroutine = eval(code, example.namespace)  # noqa: S307 - it is our own page
        if inspect.iscoroutine(coroutine):
            await coroutine

    page.run(run())


def toml(example: Example) -> None:
    """Use a snippet as the config of the snippets below it."""
    table = tomllib.loads(saved(example))
    config = {"gateway": str(example.namespace["gateway"].url)}
    config |= table.get("smg_routing", table)
    aiohttp_smg_routing.RoutingConfig.from_mapping(config)
    example.namespace["config"] = {"smg_routing": config}


def shell(example: Example) -> None:
    """Run the lines of a shell snippet that start programs; check the names in the others."""
    page: Page | None = example.namespace.get("page")
    for line in example.parsed.replace("\\\n", "").splitlines():
        command, *words = shlex.split(line, comments=True)
        command = command.removeprefix(".venv/bin/")
        if command == "make":
            finished(ROOT, "make", "--dry-run", *words, check=True)
        elif command == "pip":
            named = re.findall(r"(?:aiohttp_smg_routing|\.)\[([^\]]+)\]", line)
            extras = ",".join(named).split(",") if named else []
            known = metadata("aiohttp_smg_routing").get_all("Provides-Extra") or []
            assert [extra for extra in extras if extra not in known] == []
            groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]
            assert {*re.findall(r"--group (\S+)", line)} <= {*groups}
        elif page and command == "smg":
            page.run(page.launch(words))
        elif words[:2] == ["-m", "pytest"]:
            assert all((ROOT / name).exists() for name in words[2:]), line
        elif page and command == "python":
            page.run(page.start(*words))
        elif page and words[:1] == ["verify"]:
            page.run(page.verify(words[1:]))
        elif page and command == "curl":
            is_turn = words[0].startswith(SERVER)
            page.run(
                page.curl(words) if is_turn else prints(page, line, Path(example.path).read_text())
            )
        elif command not in ELSEWHERE:
            raise AssertionError(f"nothing looks after {line!r}")


async def prints(page: Page, line: str, text: str) -> None:
    """Assert that the page shows the output of ``curl -s METRICS | grep NAME``."""
    found = re.fullmatch(r"curl -s http://127.0.0.1:29000/metrics \| grep \^(\w+)", line)
    assert found, line
    async with ClientSession() as session, session.get(page.smg.metrics_url) as response:
        lines = [it for it in (await response.text()).splitlines() if it.startswith(found[1])]
    assert lines
    assert set(lines) <= set(text.splitlines())  # the gateway's order varies


def saved(example: Example) -> str:
    """Return a snippet with real addresses; also write it to the file that it names, if any."""
    name = FILE.match(example.parsed)
    page: Page = example.namespace["page"]
    return page.save(name[1], str(example.parsed)) if name else real(example)


def real(example: Example) -> str:
    """Return a snippet with real addresses."""
    url: URL = example.namespace["gateway"].url
    return str(example.parsed).replace(GATEWAY, str(url)).replace(PORT, str(free_port()))


def setup(namespace: dict[str, Any]) -> None:
    """Begin a page."""
    Page(namespace)


def teardown(namespace: dict[str, Any]) -> None:
    """End a page."""
    namespace["page"].close()


SHELL = CodeBlockParser("sh", shell)
PAGES_ABOVE = ("README.md", "CONTRIBUTING.md", "SECURITY.md")
PAGES_WITH_SNIPPETS = (
    *("agents", "configuration", "monitoring", "pins", "recipes", "reliability", "testing"),
    "troubleshooting",
)
PAGES = Sybil(
    parsers=[CodeBlockParser("python", python), CodeBlockParser("toml", toml), SHELL],
    path=str(ROOT),
    patterns=[*PAGES_ABOVE, *(f"docs/{page}.md" for page in PAGES_WITH_SNIPPETS)],
    setup=setup,
    teardown=teardown,
)
SCALING = Sybil(parsers=[SHELL], path=str(ROOT), patterns=["docs/scaling.md"])
collect_page = (PAGES + SCALING).pytest()
