"""What the tests, the soak, the benchmarks and the demo run: processes, servers, workers, agents.

It is for developers, and no part of the package. What users copy is in ``examples``.
"""
