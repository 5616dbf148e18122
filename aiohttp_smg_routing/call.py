"""One call to the gateway: the key is put on it, and the ledger is told where it went.

The trace hook and the client middleware both ask here, so that they decide alike.
"""

import logging

from aiohttp import ClientResponse, hdrs
from multidict import CIMultiDict
from yarl import URL

from .config import RoutingConfig
from .context import scope_of_call
from .gateway import ROUTED_WORKER_HEADER, ROUTING_KEY_HEADER, TARGET_WORKER_HEADER
from .ledger import PinLedger

logger = logging.getLogger(__name__)


class MissingSessionError(LookupError):
    """A call to the gateway has no session, and the config says ``on_missing = "raise"``."""


Call = tuple[str, str, PinLedger | None, int]
"""A call that is under way: the header that carries its key, empty where it has no session; how
the ledger names its session; the ledger; its number there. It is a plain tuple because to make
and read a ``NamedTuple`` takes as long as all the rest of :func:`begin`."""


def begin(
    config: RoutingConfig,
    pins: PinLedger | None,
    method: str,
    url: URL,
    headers: CIMultiDict[str],
) -> Call:
    """Put the key on the ``headers`` of a call that ``config`` tags, where it has a session."""
    scope = scope_of_call(config, pins, method, url)
    pins = scope.ledger
    if not scope.key:
        if pins:
            pins.missing()
        _missing(scope.config or config, method, url)
        return "", "", pins, 0
    # What a client sent, and a naive proxy copied, must not choose the worker: of two keys the
    # gateway takes the first, and an index of a worker outranks them.
    headers.popall(ROUTING_KEY_HEADER, None)
    headers.popall(TARGET_WORKER_HEADER, None)
    headers[scope.header] = scope.key
    if hdrs.CONNECTION in headers:
        _keep_to_the_end(headers, scope.header)
    return scope.header, scope.name, pins, pins.start() if pins else 0


def answered(call: Call, response: ClientResponse) -> None:
    """Tell the ledger what the answer to ``call`` shows."""
    header, name, pins, number = call
    if not pins:
        return
    if response.status >= 400:
        pins.count("failed")
    elif header:
        pins.answered(name, response.headers.get(ROUTED_WORKER_HEADER) or None, number)
    else:
        pins.count("untagged")


def failed(call: Call) -> None:
    """Tell the ledger that ``call`` raised."""
    _, _, pins, _ = call
    if pins:
        pins.count("failed")


def _keep_to_the_end(headers: CIMultiDict[str], header: str) -> None:
    """Take ``header`` off what ``Connection`` names: that ends at the next proxy.

    RFC 9110, section 7.6.1. Envoy does so; nginx and SMG 1.13.0 do not.
    """
    lines = headers.getall(hdrs.CONNECTION)
    left = [_without(line, header.lower()) for line in lines]
    if left != lines:
        del headers[hdrs.CONNECTION]
        pairs = zip(lines, left, strict=True)
        headers.extend((hdrs.CONNECTION, line) for before, line in pairs if line or not before)


def _without(line: str, name: str) -> str:
    options = [option.strip() for option in line.split(",")]
    kept = [option for option in options if option.lower() != name]
    return line if kept == options else ", ".join(kept)


def _missing(config: RoutingConfig, method: str, url: URL) -> None:
    call = f"{method} {url.origin()}{url.raw_path}"
    if config.on_missing == "raise":
        raise MissingSessionError(
            f"{call} has no session: call it within a request whose session id is found by "
            f"session_id={config.session_id!r}, or within routing_session(...), "
            "or set on_missing = 'pass'"
        )
    if config.on_missing == "warn":
        logger.warning("%s has no session: the gateway may route it to any worker", call)
