"""The child process that ``processes.command()`` asks for.

It imports the module of the function, and no more: a child without aiohttp starts in a third of
the time.
"""

import json
import sys
from importlib import import_module

if __name__ == "__main__":
    module, function, arguments = sys.argv[1:]
    getattr(import_module(module), function)(**json.loads(arguments))
