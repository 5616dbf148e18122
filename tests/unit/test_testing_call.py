import asyncio

from aiohttp_smg_routing.testing import Recorder


async def test_a_client_that_tries_http_2_first_is_sent_away_and_is_no_call(
    recording_gateway: Recorder,
) -> None:
    """sglang-router tries HTTP/2 first, then uses HTTP/1.1."""
    url = recording_gateway.url
    reader, writer = await asyncio.open_connection(url.host, url.port)
    writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9))
    assert await reader.read() == b""
    assert recording_gateway.calls == []
    writer.close()
