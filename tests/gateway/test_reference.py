"""The examples on docs/reference.md that need the real gateway."""

import pytest
from aiohttp import ClientSession

from aiohttp_smg_routing import Routing, routing_session
from aiohttp_smg_routing.testing import StartSmgGateway
from harness.agents import CHAT, chat

from ..reference import examples, run

THESE = examples(on_a_gateway=True)


@pytest.mark.parametrize("name", THESE)
async def test_an_example_does_what_it_says(name: str, smg_gateway: StartSmgGateway) -> None:
    if name == "smg_gateway":  # the context manager starts its own
        await run(THESE[name])
        return
    smg = await smg_gateway(3, policy="manual")
    hook = Routing({"gateway": str(smg.url)}).trace_config()
    async with ClientSession(trace_configs=[hook]) as session:
        with routing_session("s-17"):
            for _ in range(3):
                async with session.post(smg.url / CHAT, json=chat("s-17")) as turn:
                    assert turn.status == 200
    await run(THESE[name], smg=smg, smg_gateway=smg_gateway)
