"""Play recorded agent sessions through the real gateway, on simulated workers.

    python -m benchmarks trace FILE ...

The modules follow the path of a session: ``read`` it from a file, ``grow`` the trace to more
sessions, ``play`` them in ``arms`` on the ``workers``, each an ``engine`` with a ``cache``, and
compare the tokens from the cache with the ``limit``. ``check`` compares the model with real
engines, ``summary`` puts the tables of docs/traces.md into one.
"""
