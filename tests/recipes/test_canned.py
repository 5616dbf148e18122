"""The SDK of each API accepts the recording gateway's answers."""

from importlib import import_module
from typing import Any

import pytest
from aiohttp import ClientSession

from aiohttp_smg_routing.testing import Recorder, failure
from harness.agents import CHAT, chat

TYPES = {
    CHAT: "openai.types.chat ChatCompletion",
    "v1/completions": "openai.types Completion",
    "v1/responses": "openai.types.responses Response",
    "v1/messages": "anthropic.types Message",
}


def type_of(name: str) -> Any:
    """Import the type only now, because the SDKs take seconds."""
    module, _, kind = name.partition(" ")
    return getattr(import_module(module), kind)


@pytest.mark.parametrize("path", TYPES)
async def test_answer_is_a_whole_one_of_its_api(recording_gateway: Recorder, path: str) -> None:
    url = recording_gateway.url / path
    async with ClientSession() as session, session.post(url, json=chat("s-1")) as response:
        body = await response.read()
    answer = type_of(TYPES[path]).model_validate_json(body, strict=True)
    assert "ok" in body.decode()
    assert (answer.model, answer.usage is None) == ("stub", path == "v1/responses")
    if hasattr(answer, "choices"):
        assert [(choice.index, choice.finish_reason) for choice in answer.choices] == [(0, "stop")]


async def test_stream_begins_with_the_role_and_ends_with_its_reason(
    recording_gateway: Recorder,
) -> None:
    kind = type_of("openai.types.chat ChatCompletionChunk")
    url, turn = recording_gateway.chat, chat("s-1", stream=True)
    async with ClientSession() as session, session.post(url, json=turn) as response:
        text = await response.text()
    *chunks, end = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    choices = [kind.model_validate_json(chunk, strict=True).choices[0] for chunk in chunks]
    assert end == "[DONE]"
    assert {choice.index for choice in choices} == {0}
    assert [choice.delta.role for choice in choices] == ["assistant", None, None]
    assert [choice.delta.content for choice in choices] == ["", "ok", None]
    assert [choice.finish_reason for choice in choices] == [None, None, "stop"]


async def test_error_is_one_that_the_sdk_shows(recording_gateway: Recorder) -> None:
    openai: Any = import_module("openai")
    recording_gateway.answer_with(failure(429, "too many"))
    url = str(recording_gateway.url / "v1")
    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as sdk:
        with pytest.raises(openai.RateLimitError) as caught:
            await sdk.chat.completions.create(**chat("s-1"))
    assert caught.value.body == {"message": "too many", "type": "gateway_error"}
