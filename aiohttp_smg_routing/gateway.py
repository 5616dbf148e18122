"""What the core knows of a gateway: headers, keys, and which URL is a call to it.

Measured on SMG 1.9 to 1.13. ``docs/gateways.md`` has the whole table.
"""

import re
from collections.abc import Iterable
from contextlib import suppress
from ipaddress import ip_address
from typing import Final

from aiohttp import hdrs
from multidict import CIMultiDict, istr
from yarl import URL

ROUTING_KEY_HEADER: Final = istr("X-SMG-Routing-Key")
"""The request header that SMG's policies ``manual`` and ``consistent_hashing`` route on.

Most other policies ignore it. If a call has it twice, the gateway takes the first. Measured on
SMG 1.9 to 1.13: ``docs/gateways.md``.

>>> headers = {ROUTING_KEY_HEADER: routing_key("s-17")}
"""

#: Names a worker by its index, and outranks the key under ``consistent_hashing``. The gateway
#: answers 503 to an index that does not exist.
TARGET_WORKER_HEADER: Final = istr("X-SMG-Target-Worker")

#: The answer header that names the worker by its address, which is internal to the cluster. SMG has
#: it since 1.10, for HTTP workers.
ROUTED_WORKER_HEADER: Final = istr("X-SMG-Routed-Worker-Id")

#: The keys that every version takes: 1 to 128 bytes of visible ASCII. Most versions silently
#: drop other keys, and route the call as if it had none.
VALID_KEY: Final = re.compile(r"[!-~]{1,128}")

#: The path of OpenAI's chat completions, below the gateway's base path.
CHAT_COMPLETIONS: Final = "/v1/chat/completions"

_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")


def is_header_name(value: object) -> bool:
    """Tell whether a value can be the name of a header: RFC 9110, section 5.1."""
    return isinstance(value, str) and _TOKEN.fullmatch(value) is not None


def keep_past_proxies(headers: CIMultiDict[str], header: str) -> None:
    """Take ``header`` out of ``Connection``, whose headers a proxy removes.

    RFC 9110, section 7.6.1. Envoy removes them; nginx and SMG 1.13.0 do not.
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


def origin(url: URL) -> str:
    """Return the scheme, host and port of a URL, or an empty string if they can't be read."""
    try:
        return str(url.origin())
    except ValueError:
        return ""


def host_of(url: URL) -> str:
    """Return the host of a URL in one spelling, or an empty string if it can't be read.

    yarl leaves capitals in some hosts that are not ASCII, and any spelling in an encoded URL.
    """
    try:
        host = (url.raw_host or "").lower()
    except ValueError:  # an encoded URL is read only now: aiohttp is about to refuse it
        return ""
    if ":" in host:
        with suppress(ValueError):  # an address of a later version of IP
            return ip_address(host).compressed
    return host


def server_of(url: URL) -> tuple[str, str, int | None] | None:
    """Return the scheme, host and port of a URL in one spelling, or None if they can't be read."""
    try:
        return url.scheme, host_of(url), url.port
    except ValueError:  # aiohttp is about to refuse this encoded URL
        return None


def path_of(url: URL) -> str:
    """Return the path of a URL as yarl spells it, but with its dot segments.

    A client that sends them asks for another resource. yarl keeps them in a relative URL.
    """
    return URL(f"x/{url.raw_path}").raw_path[2:]


def difference(url: URL, gateways: Iterable[URL], paths: Iterable[str]) -> tuple[str, str, str]:
    """Say how a URL differs from the nearest call to a gateway.

    Also returns what may be added to the config: the option and the value, or two empty strings.
    """
    if not origin(url):
        return "its host or port cannot be read", "", ""
    calls = [(gateway, path) for gateway in gateways for path in paths]
    nearest, path = min(calls, key=lambda call: len(_differing(url, *call)))
    differing = _differing(url, nearest, path)
    said = "; ".join(f"its {name} is {its}, and {right}" for name, its, right in differing)
    if "//" in url.raw_path:
        return f"{said}; write one slash", "", ""
    names, base = {name for name, _, _ in differing}, nearest.raw_path.rstrip("/")
    if names == {"path"} and url.raw_path.startswith(f"{base}/"):
        return said, "paths", url.raw_path.removeprefix(base)
    if names == {"path"} and url.raw_path.endswith(path):
        return said, "gateway", f"{origin(url)}{url.raw_path.removesuffix(path)}"
    # It may be a judge model, which would get session ids: never advise to add another host.
    is_loopback = _is_loopback(url) and _is_loopback(nearest)
    if "path" not in names and (is_loopback or "host" not in names):
        return said, "gateway", f"{origin(url)}{base}"
    return said, "", ""


def _differing(url: URL, gateway: URL, path: str) -> list[tuple[str, str, str]]:
    path = gateway.raw_path.rstrip("/") + path
    parts = (
        ("scheme", url.scheme, gateway.scheme, f"the gateway's is {gateway.scheme}"),
        ("host", host_of(url), host_of(gateway), f"the gateway is {host_of(gateway)}"),
        ("port", url.port, gateway.port, f"the gateway's is {gateway.port}"),
        ("path", url.raw_path, path, f"the gateway's is {path}"),
    )
    return [(name, str(its or "missing"), said) for name, its, right, said in parts if its != right]


def _is_loopback(url: URL) -> bool:
    try:
        address = ip_address(host_of(url))
    except ValueError:
        return host_of(url) == "localhost"
    return address.is_loopback or address.is_unspecified


_MOST_WORKERS = 1000


class Gateways:
    """Which of several gateways count as one: those that have named the same worker.

    Two ``manual`` gateways before the same workers split a session, and the ledger must show that.
    Two gateways with workers of their own each pin it.
    """

    def __init__(self, gateways: Iterable[URL]) -> None:
        self.group: dict[str, str] = {str(gateway): str(gateway) for gateway in gateways}
        self._of_worker: dict[str, str] = {}

    def named(self, gateway: str, worker: str) -> bool:
        """Note that a gateway has named a worker; tell whether that made two groups one."""
        group = self.group[gateway]
        other = self._of_worker.setdefault(worker, group)
        if len(self._of_worker) > _MOST_WORKERS:  # workers come and go
            del self._of_worker[next(iter(self._of_worker))]
        if other == group:
            return False
        for groups in (self.group, self._of_worker):
            groups.update({name: other for name, its in groups.items() if its == group})
        return True
