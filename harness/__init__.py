"""What the tests, the soak, the benchmarks and the demo run: processes, servers, workers, agents.

It is for developers: the package does not have it, and what users copy is in ``examples``.
"""
