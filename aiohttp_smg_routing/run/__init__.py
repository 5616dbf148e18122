"""The plugin on every app that a process serves, for servers that have no place for ``setup()``.

``command`` starts such a server; ``install()`` works in its process.
"""

from .apps import install

__all__ = ("install",)
