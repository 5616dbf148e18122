"""The content of docs/reference.md: the public names, their docstrings and the examples in them.

An example runs in a handler of a real session server, after six turns of session ``s-17``.
"""

import ast
import asyncio
import doctest
import inspect
import io
import logging
import re
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import AsyncExitStack, redirect_stdout, suppress
from functools import cache
from typing import Any

from aiohttp import ClientResponse, ClientSession, web
from aiohttp.test_utils import TestClient, TestServer

import aiohttp_smg_routing
from aiohttp_smg_routing import ROUTING, testing
from aiohttp_smg_routing import run as server_run
from aiohttp_smg_routing.testing import completion, recording_gateway
from harness.processes import ROOT

PACKAGE = ROOT / "aiohttp_smg_routing"
PUBLIC = (*aiohttp_smg_routing.__all__, *testing.__all__, *server_run.__all__)
#: The public names whose examples need the real gateway.
ON_A_GATEWAY = ("SmgGateway", "smg_gateway", "StartSmgGateway")
#: An entry on the page: a directive, its name, its options, and any text after them.
ENTRY = re.compile(r"^\.\. auto\w+:: (?:\w+\.)*(\w+).*\n((?: +.*\n|\n)*)", re.MULTILINE)

GATEWAY = "http://10.0.0.1:30000"
CLIENT = web.AppKey("client", ClientSession)
TURN = {"model": "stub", "messages": [{"role": "user", "content": "hello", "name": "s-17"}]}
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@cache
def page() -> dict[str, str]:
    """Return the page's own text for each name, in addition to the docstring."""
    text = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    return {name: inspect.cleandoc(f"\n{beside}") for name, beside in ENTRY.findall(text)}


@cache
def texts() -> dict[str, str]:
    """Return the docstring of each public name, and of each member as ``Class.member``."""
    found: dict[str, str] = {}
    for folder in (PACKAGE, PACKAGE / "testing", PACKAGE / "run"):
        module = ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))
        for node in module.body:
            if isinstance(node, ast.ImportFrom) and node.module is not None:
                file = folder / f"{node.module}.py"
                names = {alias.name for alias in node.names} & set(PUBLIC)
                found |= {
                    name: text
                    for name, text in _texts(file.read_text(encoding="utf-8"))
                    if name.partition(".")[0] in names
                }
    hidden = {f"{name}.{member}" for name, text in page().items() for member in excluded(text)}
    return {name: text for name, text in found.items() if name not in hidden}


def excluded(beside: str) -> list[str]:
    """Return the members that the page leaves out."""
    line = re.search(r"^:exclude-members: (.+)$", beside, re.MULTILINE)
    return line[1].split(", ") if line else []


def _texts(source: str) -> Iterator[tuple[str, str]]:
    """Yield each name that a file defines, and each member of its classes, with its docstring."""
    lines = source.splitlines()
    for name, node, text in _defined(ast.parse(source).body, lines):
        yield name, text
        if isinstance(node, ast.ClassDef):
            for member, inner, its in _defined(node.body, lines):
                if member == "__init__" and isinstance(inner, ast.FunctionDef):
                    for attribute, _, about in _defined(inner.body, lines, of_self=True):
                        yield f"{name}.{attribute}", about
                elif not member.startswith("_"):
                    yield f"{name}.{member}", its


def _defined(
    body: list[ast.stmt], lines: list[str], *, of_self: bool = False
) -> Iterator[tuple[str, ast.stmt, str]]:
    """Yield the functions, classes and public variables that statements define.

    A variable's text is the string below it, or a comment beside it that begins with ``#:``.
    """
    for node, after in zip(body, (*body[1:], None), strict=True):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, node, ast.get_docstring(node) or ""
            continue
        targets = node.targets if isinstance(node, ast.Assign) else []
        for target in [node.target] if isinstance(node, ast.AnnAssign) else targets:
            name = ast.unparse(target).removeprefix("self." if of_self else "")
            if isinstance(target, ast.Attribute) == of_self and not name.startswith("_"):
                comment = lines[(node.end_lineno or 0) - 1].partition("#:")[2].strip()
                yield name, node, _string(after) or comment


def _string(node: ast.stmt | None) -> str:
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return inspect.cleandoc(str(node.value.value))
    return ""


def examples(*, on_a_gateway: bool) -> dict[str, str]:
    """Return the texts whose examples need the real gateway, or those whose examples don't.

    The page's own text about a name has the key ``NAME beside``.
    """
    found = {**texts(), **{f"{name} beside": text for name, text in page().items()}}
    return {
        name: text
        for name, text in found.items()
        if ">>>" in text and (owner(name) in ON_A_GATEWAY) == on_a_gateway
    }


def owner(name: str) -> str:
    """Return the public name to which a text belongs."""
    return re.split("[. ]", name)[0]


def examples_of(name: str) -> str:
    """Return the examples of a public name, including those of its members and on the page."""
    parser = doctest.DocTestParser()
    return "\n".join(
        f"{example.source}{example.want}"
        for place, text in examples(on_a_gateway=name in ON_A_GATEWAY).items()
        if owner(place) == name
        for example in parser.get_examples(text)
    )


async def run(text: str, **names: Any) -> None:
    """Run the examples in a text; raise ``AssertionError`` if one prints something else.

    They share the names that readers take for granted, and may await.
    """
    queue: asyncio.Queue[Any] = asyncio.Queue()

    async def work() -> None:
        while True:
            await (await queue.get())
            queue.task_done()

    async with AsyncExitStack() as stack:
        recorder = await stack.enter_async_context(recording_gateway())
        recorder.answer = lambda call: completion(worker="http://10.0.0.2:8000")
        app = web.Application()

        async def client(app: web.Application) -> AsyncIterator[None]:
            async with ClientSession() as app[CLIENT]:
                yield

        async def play_turn() -> None:
            async with app[CLIENT].post(recorder.chat, json=TURN) as response:
                response.raise_for_status()

        async def handler(request: web.Request) -> web.Response:
            if request.match_info["what"] == "turn":
                await play_turn()
                return web.Response()
            namespace: dict[str, Any] = {
                **vars(aiohttp_smg_routing),
                **vars(testing),
                "CLIENT": CLIENT,
                "ClientSession": ClientSession,
                "app": app,
                "handler": logging.StreamHandler(),
                "install": server_run.install,
                "logging": logging,
                "play_turn": play_turn,
                "queue": queue,
                "recorder": recorder,
                "request": request,
                "routing": app[ROUTING],
                "session": app[CLIENT],
                "turn": TURN,
                "web": web,
                **names,
            }
            try:
                await _run(text.replace(GATEWAY, str(recorder.url)), namespace)
                await queue.join()
            except AssertionError as error:
                return web.Response(status=500, text=str(error))
            finally:
                await _close(namespace)
            return web.Response()

        app.cleanup_ctx.append(client)
        app.router.add_post("/sessions/{session_id}/{what}", handler)
        aiohttp_smg_routing.setup(app, {"gateway": str(recorder.url), "client_session": "client"})
        agent = await stack.enter_async_context(TestClient(TestServer(app)))
        worker = asyncio.create_task(work())
        try:
            for what in (*["turn"] * 6, "examples"):
                async with agent.post(f"/sessions/s-17/{what}", json=TURN) as response:
                    assert response.status == 200, await response.text()
        finally:
            worker.cancel()
            with suppress(asyncio.CancelledError):
                await worker


async def _run(text: str, namespace: dict[str, Any]) -> None:
    checker, flags = doctest.OutputChecker(), ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
    for example in doctest.DocTestParser().get_examples(text):
        code = compile(example.source, "<example>", "single", flags=flags, dont_inherit=True)
        printed, want = io.StringIO(), example.exc_msg or example.want
        try:
            with redirect_stdout(printed):
                awaited = eval(code, namespace)  # noqa: S307 - it is our own docstring
                if inspect.iscoroutine(awaited):
                    await awaited
        except Exception as error:
            got = f"{type(error).__name__}: {error}\n"
            if example.exc_msg is None:
                raise AssertionError(f"{example.source}raised {got}") from error
        else:
            got = printed.getvalue()
        if not checker.check_output(want, got, FLAGS):
            raise AssertionError(f"{example.source}printed\n{got}and not\n{want}")


async def _close(namespace: Mapping[str, Any]) -> None:
    """Close what the examples left open, except what belongs to the app."""
    for value in namespace.values():
        if isinstance(value, ClientResponse):
            value.release()
        if isinstance(value, ClientSession) and value is not namespace["app"].get(CLIENT):
            await value.close()
