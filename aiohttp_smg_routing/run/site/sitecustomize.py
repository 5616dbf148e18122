"""What Python imports at its start, for ``aiohttp-smg-routing run``; it leaves no trace."""

import json
import os
import sys
from contextlib import suppress
from importlib import import_module
from pathlib import Path


def _begin() -> None:
    here = str(Path(__file__).parent)
    with suppress(ValueError):
        sys.path.remove(here)
    given = json.loads(os.environ.get("AIOHTTP_SMG_ROUTING_RUN") or "null")
    if given is None:
        return
    if not given["children"]:
        del os.environ["AIOHTTP_SMG_ROUTING_RUN"]
        del os.environ["PYTHONPATH"]
        if given["pythonpath"] is not None:
            os.environ["PYTHONPATH"] = given["pythonpath"]
    try:
        run = import_module("aiohttp_smg_routing.run")
    except ImportError as error:
        print(
            f"aiohttp-smg-routing run: {sys.executable} can't import it, and no call carries a key "
            f"({error}): install aiohttp_smg_routing where the server runs",
            file=sys.stderr,
        )
    else:
        run.install(given["config"])


def _go_on() -> None:
    """Import the ``sitecustomize`` that would have been imported, such as Debian's."""
    ours = sys.modules.pop("sitecustomize")
    try:
        import_module("sitecustomize")
    except ModuleNotFoundError:
        sys.modules["sitecustomize"] = ours


_begin()
_go_on()
