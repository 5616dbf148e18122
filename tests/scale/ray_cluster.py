"""Session servers as actors of a local Ray cluster, which ends with its standard input.

It prints the actors' addresses when they are there, and again for each line that it reads.

python -m tests.scale.ray_cluster FOLDER COUNT
"""

import json
import os
import sys
from importlib import import_module
from itertools import chain

from aiohttp import web

from aiohttp_smg_routing import setup

from ..recipes import unedited

# Without it Ray finds the machine's own address, and listens there.
LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0"}


def make_app() -> web.Application:
    app = unedited.make_app()
    setup(
        app,
        {"gateway": os.environ["GATEWAY"], "instrument": True, "session_id": "json:user"},
    )
    return app


def main(folder: str, count: int) -> None:
    ray = import_module("ray")
    ray.init(
        address="local",
        num_cpus=count,
        object_store_memory=80 * 2**20,  # bytes: the least that it takes
        include_dashboard=False,
        log_to_driver=False,
        _node_ip_address="127.0.0.1",
        _temp_dir=folder,
    )
    actors = [import_module("actor").SessionServer.remote() for _ in range(count)]
    for _ in chain([""], sys.stdin):
        print(json.dumps(ray.get([actor.url.remote() for actor in actors])), flush=True)
    ray.shutdown()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
