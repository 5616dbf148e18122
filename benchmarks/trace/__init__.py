"""Recorded agent sessions, played through the real gateway on workers that are a model.

    python -m benchmarks trace FILE ...

The files follow the way of a session: ``read`` it from a file, ``grow`` the trace to more sessions,
``play`` them in ``arms`` on the ``worker``s, each an ``engine`` with a ``cache``, and compare what
came from the cache with the ``limit``. ``check`` compares the model with real engines.
"""
