"""For the tests of a server that uses the plugin: a gateway that records, and the real one.

    async def test_my_server(aiohttp_client, recording_gateway):
        client = await aiohttp_client(make_app(gateway=recording_gateway.url))
        for _ in range(3):
            await client.post("/sessions/s-1/v1/chat/completions", json={"messages": []})
        recording_gateway.assert_pinned("s-1", turns=3)

If pytest-asyncio is installed, pytest has the fixtures ``recording_gateway`` and ``smg_gateway``.
The latter starts the real gateway, and needs the extra ``gateway``. Here both are async context
managers, for use without pytest. ``docs/testing.md`` has more.
"""

from .answers import Answer, answer, canned, completion, failure, redirect, stream
from .call import Call
from .gateway import SmgGateway, StartSmgGateway, smg_gateway
from .processes import child_process, free_port, free_ports
from .recorder import Recorder, recording_gateway

__all__ = (
    "Answer",
    "Call",
    "Recorder",
    "SmgGateway",
    "StartSmgGateway",
    "answer",
    "canned",
    "child_process",
    "completion",
    "failure",
    "free_port",
    "free_ports",
    "recording_gateway",
    "redirect",
    "smg_gateway",
    "stream",
)
