"""Calls whose body is the id of the session that they belong to."""

from aiohttp import ClientSession, web

from aiohttp_smg_routing.testing import Recorder
from harness.proxies import CLIENT


async def post(session: ClientSession, wire: Recorder, session_id: str = "") -> None:
    """Call the gateway; the body names the session that the call belongs to."""
    async with session.post(wire.chat, data=session_id.encode()) as response:
        await response.read()


async def call(request: web.Request, wire: Recorder) -> None:
    """Call the gateway from a handler, in the session of its request."""
    await post(request.config_dict[CLIENT], wire, request.match_info["session_id"])


def assert_no_crosstalk(wire: Recorder, calls: int) -> None:
    assert len(wire.calls) == calls
    assert [call.keys for call in wire.calls] == [[call.body] for call in wire.calls]
