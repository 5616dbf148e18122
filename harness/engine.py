"""One llama.cpp engine; its process imports this file, and no aiohttp."""

import os
import signal
from importlib.util import find_spec


def require_engine() -> None:
    """Raise ``ModuleNotFoundError``, naming what to install, if an engine cannot run."""
    missing = [name for name in ("xllamacpp", "gguf", "numpy") if find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(
            f"the engines need {', '.join(missing)}: pip install -e . --group engine"
        )


def run_engine(model: str, port: int, slots: int, context: int, threads: int) -> None:
    """Run one worker on 127.0.0.1 until SIGINT or SIGTERM; for the rest see ``engines()``."""
    require_engine()
    import xllamacpp

    # Blocked before the server makes its threads, which inherit it: no thread dies of the signal
    # before sigwait() sees it.
    stop = {signal.SIGINT, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, stop)
    params = xllamacpp.CommonParams()
    params.model.path = model
    params.model_alias = {"random-llama"}
    params.hostnames = ["127.0.0.1"]
    params.port = port
    params.n_parallel = slots
    params.n_ctx = slots * context  # llama.cpp divides it among the slots
    params.cpuparams.n_threads = threads
    params.cpuparams_batch.n_threads = threads
    params.n_threads_http = 32
    params.cache_ram_mib = 0  # its default keeps displaced conversations in up to 8 GiB of RAM
    params.endpoint_metrics = True
    params.ui = False
    server = xllamacpp.Server(params)
    print(f"listening on {server.listening_address}", flush=True)
    signal.sigwait(stop)
    os._exit(0)  # its destructor waits for the open connections
