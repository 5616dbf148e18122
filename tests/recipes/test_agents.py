"""The agents of docs/agents.md: their recorded requests get the keys that the page promises.

``agents.json`` has the relevant parts of the requests that the programs sent. ``id`` is the session
id in a request, as a person read it; a request without ``id`` has none.
"""

import json
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientSession, web
from pytest_aiohttp.plugin import AiohttpClient
from yarl import URL

from aiohttp_smg_routing import RoutingConfig, setup
from aiohttp_smg_routing.testing import Recorder, StartSmgGateway
from harness.processes import ROOT

from ..turns import answered
from .unedited import make_app

Row = Mapping[str, str]
Request = Mapping[str, Any]

PAGE = (ROOT / "docs" / "agents.md").read_text("utf-8")
RECORDED: Mapping[str, Sequence[Request]] = json.loads(
    Path(__file__).with_name("agents.json").read_text("utf-8")
)
SESSION = "s-1"


def rows(head: str) -> list[Row]:
    """Return the rows of the table on the page whose header begins with ``head``."""
    [lines] = [part.splitlines() for part in PAGE.split("\n\n") if part.startswith(f"| {head} |")]
    names, _, *cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [dict(zip(names, row, strict=True)) for row in cells]


def code(cell: str) -> list[str]:
    """Return the code spans of a cell, without quotes."""
    return [span.strip('"') for span in re.findall(r"`([^`]+)`", cell)]


AGENTS = {row["agent"].removesuffix(" †"): row for row in rows("agent | calls")}
CLIENTS = {row["client"]: row for row in rows("client")}
WITHOUT_ID = [name for name, requests in RECORDED.items() if not any("id" in it for it in requests)]
SOURCES = [code(row["`session_id`"])[0] for row in (*AGENTS.values(), *CLIENTS.values())]


def body_of(request: Request, text: str = "hello") -> dict[str, Any]:
    """Return the body of a recorded request, with a prompt in the form of its API."""
    said = [{"role": "user", "content": text}]
    prompt: dict[str, Any] = {"messages": said}
    if request["path"] == "/v1/responses":
        prompt = {"input": said}
    elif request["path"].startswith("/v1/messages"):
        prompt["max_tokens"] = 16
    return {"model": "stub", **prompt, **request.get("body", {})}


async def send(server: URL, request: Request, *, text: str = "hello", below: str = "") -> None:
    url = f"{server.origin()}{below}{request['path']}"
    async with ClientSession() as agent:
        await answered(agent, url, json=body_of(request, text), headers=request["headers"])


StartServer = Callable[..., Awaitable[URL]]


@pytest.fixture
def start_server(aiohttp_client: AiohttpClient, recording_gateway: Recorder) -> StartServer:
    """Start a session server with these options in its config; return its URL."""

    async def start(gateway: URL = recording_gateway.url, **options: Any) -> URL:
        app = make_app(gateway)
        setup(app, RoutingConfig(gateway, instrument=True, **options))
        return (await aiohttp_client(app)).make_url("/")

    return start


def test_each_agent_of_the_page_has_a_recording_and_each_recording_is_on_the_page() -> None:
    assert set(AGENTS) < set(RECORDED)
    assert all(name in PAGE for name in RECORDED)
    [sentence] = [part for part in PAGE.split("\n\n") if " send no id\nto an " in part]
    for name in WITHOUT_ID:
        assert name in sentence


@pytest.mark.parametrize("agent", AGENTS)
async def test_the_gateway_receives_the_key_that_the_page_says(
    recording_gateway: Recorder, start_server: StartServer, agent: str
) -> None:
    row, requests = AGENTS[agent], RECORDED[agent]
    server = await start_server(session_id=code(row["`session_id`"])[0], paths=code(row["calls"]))
    for request in requests:
        await send(server, request)
    assert [call.keys for call in recording_gateway.calls] == [
        [request["id"].encode()] for request in requests
    ]
    sessions = {request["id"] for request in requests if not request.get("sub_agent")}
    assert len(sessions) > 1
    assert {request["path"].partition("?")[0] for request in requests} == set(code(row["calls"]))


@pytest.mark.parametrize("agent", AGENTS)
def test_a_sub_agent_has_what_the_page_says(agent: str) -> None:
    requests = RECORDED[agent]
    sessions = {request["id"] for request in requests if not request.get("sub_agent")}
    own = {request["id"] not in sessions for request in requests if request.get("sub_agent")}
    said = {"the same id": {False}, "an id of its own": {True}, "–": set[bool]()}  # noqa: RUF001
    assert own == said[AGENTS[agent]["a sub-agent has"]]


@pytest.mark.parametrize("field", ["header:session-id", "json:prompt_cache_key"])
async def test_codex_has_an_id_that_its_sub_agents_share(
    recording_gateway: Recorder, start_server: StartServer, field: str
) -> None:
    requests = RECORDED["Codex 0.169.0"]
    server = await start_server(session_id=field, paths="/v1/responses")
    for request in requests:
        await send(server, request)
    main, _, sub_agent, other = (call.keys for call in recording_gateway.calls)
    assert requests[2]["sub_agent"]
    assert main == sub_agent != other


async def test_openhands_has_a_cache_key_that_its_sub_agents_share(
    recording_gateway: Recorder, start_server: StartServer
) -> None:
    server = await start_server(session_id="json:prompt_cache_key")
    for request in RECORDED["OpenHands SDK 1.58.2"]:
        await send(server, request)
    main, sub_agent, other = (call.keys for call in recording_gateway.calls)
    assert main == sub_agent != other


async def test_two_chats_of_nanobot_have_one_affinity(
    recording_gateway: Recorder, start_server: StartServer
) -> None:
    server = await start_server(session_id="header:x-session-affinity")
    for request, text in zip(RECORDED["nanobot 0.3.5"], ("alice", "bob"), strict=True):
        await send(server, request, text=text)
    alice, bob = (call.keys for call in recording_gateway.calls)
    assert alice == bob != []


@pytest.mark.parametrize("agent", WITHOUT_ID)
async def test_an_agent_without_an_id_is_pinned_by_its_base_url(
    recording_gateway: Recorder,
    start_server: StartServer,
    aiohttp_client: AiohttpClient,
    agent: str,
) -> None:
    paths = ["/v1/chat/completions", "/v1/responses"]
    requests = RECORDED[agent]
    server = await start_server(session_id=SOURCES, paths=paths)
    for request in requests:
        await send(server, request)
    assert [call.keys for call in recording_gateway.calls] == [[]] * len(requests)
    recording_gateway.calls.clear()

    async def proxy(request: web.Request) -> web.Response:
        url = recording_gateway.url / request.match_info["path"]
        async with ClientSession() as session, session.post(url, data=request.content) as answer:
            return web.Response(body=await answer.read(), status=answer.status)

    [route] = re.findall(r"The route `(.+?)`", PAGE)
    app = web.Application()
    app.router.add_post(route, proxy)
    setup(app, {"gateway": str(recording_gateway.url), "instrument": True, "paths": paths})
    base = (await aiohttp_client(app)).make_url("/")
    for request in requests:
        for session in ("s-1", "s-2"):
            await send(base, request, below=f"/sessions/{session}")
    assert [call.keys for call in recording_gateway.calls] == [[b"s-1"], [b"s-2"]] * len(requests)


async def ask_openai(server: URL) -> None:
    from openai import AsyncOpenAI

    async with AsyncOpenAI(base_url=f"{server}v1", api_key="none") as sdk:
        message: Any = {"role": "user", "content": "hello"}
        await sdk.chat.completions.create(
            model="stub", messages=[message], prompt_cache_key=SESSION
        )
        await sdk.responses.create(model="stub", input="hello", prompt_cache_key=SESSION)


async def ask_anthropic(server: URL) -> None:
    from anthropic import AsyncAnthropic

    async with AsyncAnthropic(base_url=str(server), api_key="none") as sdk:
        await sdk.messages.create(
            model="stub",
            max_tokens=16,
            messages=[{"role": "user", "content": "hello"}],
            metadata={"user_id": SESSION},
        )


async def ask_litellm(server: URL) -> None:
    await complete_with_litellm(server, extra_headers={"X-Session-Id": SESSION})


async def complete_with_litellm(server: URL, **options: Any) -> None:
    messages = [{"role": "user", "content": "hello"}]
    import litellm  # importing it takes seconds, and each process collects this file

    await litellm.acompletion(
        "openai/stub", messages=messages, api_base=f"{server}v1", api_key="none", **options
    )
    await litellm.close_litellm_async_clients()


def replay(agent: str) -> Callable[[URL], Awaitable[None]]:
    async def ask(server: URL) -> None:
        for request in RECORDED[agent]:
            await send(server, request)

    return ask


ASK: Mapping[str, Callable[[URL], Awaitable[None]]] = {
    "OpenAI's SDK": ask_openai,
    "OpenAI Agents SDK": replay("OpenAI Agents SDK"),
    "LangChain's `ChatOpenAI`": replay("LangChain's `ChatOpenAI`"),
    "LiteLLM": ask_litellm,
    "Anthropic's SDK": ask_anthropic,
}


@pytest.mark.parametrize("client", CLIENTS)
async def test_a_client_in_your_code_sends_the_id_that_the_page_says(
    recording_gateway: Recorder, start_server: StartServer, client: str
) -> None:
    paths = ["/v1/chat/completions", "/v1/responses", "/v1/messages"]
    [source] = code(CLIENTS[client]["`session_id`"])
    await ASK[client](await start_server(session_id=source, paths=paths))
    assert recording_gateway.calls
    assert all(call.keys == [SESSION.encode()] for call in recording_gateway.calls)


async def test_litellm_keeps_its_session_id_to_itself(
    recording_gateway: Recorder, start_server: StartServer
) -> None:
    server = await start_server()
    await complete_with_litellm(
        server, litellm_session_id="kept", metadata={"session_id": "kept", "trace_id": "kept"}
    )
    [call] = recording_gateway.calls
    assert b"kept" not in b"\n".join([*call.header_lines, call.body])


def without_what_smg_refuses(request: Request) -> Request:
    body = {name: it for name, it in request.get("body", {}).items() if name != "client_metadata"}
    return {**request, "body": body}


async def test_the_real_gateway_pins_every_agent(
    smg_gateway: StartSmgGateway, start_server: StartServer
) -> None:
    smg = await smg_gateway(3, policy="manual")
    for agent, row in AGENTS.items():
        for worker in smg.workers:
            worker.calls.clear()  # agents share some of the ids
        source, paths = code(row["`session_id`"])[0], code(row["calls"])
        server = await start_server(smg.url, session_id=source, paths=paths)
        requests = [without_what_smg_refuses(request) for request in RECORDED[agent]]
        for _ in range(3):
            for request in requests:
                await send(server, request)
        ids = [request["id"] for request in requests]
        for session in set(ids):
            smg.assert_pinned(session, turns=3 * ids.count(session))


SMG_MINOR = version("smg").rpartition(".")[0]


async def test_smg_answers_to_each_field_of_a_responses_body_as_the_page_says(
    smg_gateway: StartSmgGateway,
) -> None:
    texts = ("session_id", "prompt_cache_key")
    smg = await smg_gateway(1, policy="manual")
    async with ClientSession() as agent:
        for row in rows("field"):
            [field], [status] = code(row["field"]), code(row["SMG 1.13"])
            value = SESSION if field in texts else {"session_id": SESSION}
            body = {"model": "stub", "input": "hello", field: value}
            async with agent.post(smg.url / "v1/responses", json=body) as response:
                assert response.status == int(status if SMG_MINOR == "1.13" else "200"), field


def _policies() -> list[str]:
    cells = {row["gateway"]: row for row in rows("gateway")}
    [row] = [row for name, row in cells.items() if SMG_MINOR in name]
    return code(row["policies that read `--routing-key-headers`"])


@pytest.mark.parametrize("launch", _policies())
async def test_smg_reads_the_header_of_an_agent_before_its_own(
    smg_gateway: StartSmgGateway, launch: str
) -> None:
    policy, *args = launch.split()
    smg = await smg_gateway(3, policy=policy, args=(*args, "--routing-key-headers", "thread-id"))
    sessions, turns = 8, 4
    for turn in range(turns):
        for session in range(sessions):
            # The plugin's header changes each turn; it would spread the session over workers.
            headers = {"thread-id": f"t-{session}", "X-SMG-Routing-Key": f"{session} in {turn}"}
            request = {"path": "/v1/responses", "headers": headers}
            await send(smg.url, request, text=f"of {session}")
    workers_of: dict[str, set[URL]] = {}
    for worker in smg.workers:
        for call in worker.calls:
            if call.method == "POST":
                text = call.json()["input"][0]["content"]
                workers_of.setdefault(text, set()).add(worker.url)
    assert len(workers_of) == sessions
    assert all(len(workers) == 1 for workers in workers_of.values())
    assert len(set.union(*workers_of.values())) > 1
