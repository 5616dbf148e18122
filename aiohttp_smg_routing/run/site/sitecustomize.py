"""What Python imports at its start, for ``aiohttp-smg-routing run``; it leaves no trace."""

import json
import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn


def _begin() -> None:
    here = str(Path(__file__).parent)
    with suppress(ValueError):
        sys.path.remove(here)
    given = json.loads(os.environ.get("AIOHTTP_SMG_ROUTING_RUN") or "null")
    if given is None:
        return
    is_child = given["is_child"]
    if given["children"]:
        os.environ["AIOHTTP_SMG_ROUTING_RUN"] = json.dumps({**given, "is_child": True})
    else:
        del os.environ["AIOHTTP_SMG_ROUTING_RUN"]
        # What the server's own launcher has added stays.
        path = os.environ.pop("PYTHONPATH").split(os.pathsep)
        left = [part for part in path if part != here]
        if left or given["has_pythonpath"]:
            os.environ["PYTHONPATH"] = os.pathsep.join(left)
        _keep_over_exec(here, given)
    try:
        run = import_module("aiohttp_smg_routing.run")
    except Exception as error:
        print(
            f"aiohttp-smg-routing run: {sys.executable} can't import it, and no call carries a key "
            f"({error}): install aiohttp_smg_routing where the server runs",
            file=sys.stderr,
        )
    else:
        run.install(given["config"], is_child=is_child, has_children=given["children"])


def _keep_over_exec(here: str, given: dict[str, Any]) -> None:
    """Stay in this process where it becomes the server by ``exec``, as launchers do."""
    execve, process = os.execve, os.getpid()

    def keep(path: Any, argv: Any, env: Mapping[Any, Any]) -> NoReturn:
        if os.getpid() == process:
            before = env.get("PYTHONPATH")
            run = json.dumps({**given, "has_pythonpath": before is not None})
            parts = [here, *([before] if before else [])]
            env = {
                **env,
                "AIOHTTP_SMG_ROUTING_RUN": run,
                "PYTHONPATH": os.pathsep.join(parts),
            }
        execve(path, argv, env)

    def keep_own(path: Any, argv: Any, /) -> NoReturn:
        keep(path, argv, os.environ)

    # The other functions of os call these two.
    os.execve, os.execv = keep, keep_own


def _go_on() -> None:
    """Import the ``sitecustomize`` that would have been imported, such as Debian's."""
    ours = sys.modules.pop("sitecustomize")
    try:
        import_module("sitecustomize")
    except ModuleNotFoundError as error:
        if error.name != "sitecustomize":
            raise
        sys.modules["sitecustomize"] = ours


_begin()
_go_on()
