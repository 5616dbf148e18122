"""Session servers as actors of a local Ray cluster, which ends with its standard input.

It prints the actors' addresses once they run, and again for each line that it reads.

python -m tests.scale.ray_cluster FOLDER COUNT
"""

import json
import sys
from importlib import import_module
from itertools import chain

from ..ray_programs import options


def main(folder: str, count: int) -> None:
    ray = import_module("ray")
    ray.init(**options(folder, count), log_to_driver=False)
    actors = [import_module("actor").SessionServer.remote() for _ in range(count)]
    for _ in chain([""], sys.stdin):
        print(json.dumps(ray.get([actor.url.remote() for actor in actors])), flush=True)
    ray.shutdown()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
