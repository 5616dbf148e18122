"""Checks the value of each option, and gives it the form that the config keeps.

Each function returns its value, or raises ``ValueError`` that says what is wrong and what would be
right. It does not quote the value: the option knows which values an error may show.
"""

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from inspect import iscoroutinefunction
from typing import Any

from aiohttp import web
from yarl import URL

from .gateway import CHAT_COMPLETIONS, ROUTING_KEY_HEADER, is_header_name
from .keys import as_secret, as_session_id
from .sources import SESSION_ID, PinBy, Source, reader

_BOOLS = {
    **dict.fromkeys(("true", "yes", "on", "1"), True),
    **dict.fromkeys(("false", "no", "off", "0"), False),
}
_TAKEN = re.compile(
    "authorization|connection|content-(length|type)|cookie|host|transfer-.*|upgrade"
)
_PATH = re.compile(r"/[^/?#][^?#]*")


def several(value: Any) -> tuple[Any, ...]:
    """Return the items of a list or tuple, the parts of a string between commas, or one value."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


@dataclass(frozen=True, slots=True)
class Option:
    """How to read an option's value, its default, and how much of it an error shows."""

    parse: Callable[[Any], Any]
    default: Any
    several: bool
    hidden: str  # a value with one of these characters is not shown; "any" hides all

    def read(self, name: str, value: Any, faults: list[tuple[str, str]]) -> Any:
        """Return the value in the form that the config keeps; add what is wrong to ``faults``."""
        given = several(value) if self.several else (value,)
        good = []
        for place, item in enumerate(given):
            try:
                good.append(self.parse(item))
            except ValueError as error:
                faults.append((name, f"{self._shown(given, place)}{error}"))
        return tuple(good) if self.several else (good or [None])[0]

    def _shown(self, given: Sequence[Any], place: int) -> str:
        value = given[place]
        texts = "".join(text for text in given if isinstance(text, str))
        # A comma in a password splits it: the first item has no "@", and must not be shown either.
        if self.hidden == "any" or not set(self.hidden).isdisjoint(texts):
            return f"number {place + 1} of {len(given)} " if len(given) > 1 else ""
        if value is None or isinstance(value, (str, float)):
            return f"{value!r} "
        # Python refuses to write out a very long integer.
        if isinstance(value, int) and value.bit_length() < 64:
            return f"{value!r} "
        return f"a {type(value).__name__} "


def option(
    parse: Callable[[Any], Any], default: Any, *, several: bool = False, hidden: str = ""
) -> Any:
    """Return the field of an option. An error shows no value that has a character of ``hidden``."""
    return field(
        metadata={"option": Option(parse, default, several, hidden)},
        repr=parse is not as_secret,
    )


def gateway_url(value: Any) -> URL:
    """Return the URL of a gateway without credentials, default port and trailing slash."""
    # A password may have any character in it.
    named = str(value).rpartition("@")[2] if isinstance(value, (str, URL)) else ""
    if not set("*{}").isdisjoint(named):
        raise ValueError("has a wildcard: name each gateway")
    try:
        url = URL(value)
        if (
            url.scheme in ("http", "https")
            and url.raw_host
            and ";" not in url.raw_host
            and not re.match(r"https?://https?:*//", str(url))  # a scheme too many
            and not url.query_string + url.fragment
        ):
            # yarl before 1.10 keeps a default port that the text names.
            origin = url.origin().with_port(None if url.is_default_port() else url.port)
            return URL(f"{origin}{url.raw_path.rstrip('/')}", encoded=True)
    except (TypeError, ValueError, IndexError):  # the last one is yarl's for "http://[]@"
        pass
    raise ValueError(
        "is not an absolute http(s) URL such as 'http://10.0.0.1:30000', without query and fragment"
    )


def call_path(value: Any) -> str:
    """Return a path, percent-encoded as it goes out."""
    if isinstance(value, str) and not set("*{}").isdisjoint(value):
        raise ValueError("has a wildcard: name each path")
    if isinstance(value, str) and _PATH.fullmatch(value):
        path = URL(f"http://gateway{value}").raw_path
        if _PATH.fullmatch(path):  # "/a/.." leaves nothing
            return path
    raise ValueError(f"is not a path such as {CHAT_COMPLETIONS!r}")


def overlaps(gateways: Iterable[URL], paths: Iterable[str]) -> Iterator[tuple[str, str, str]]:
    """Yield (gateway, overlap, path) if a gateway's path ends as a call's path begins."""
    for gateway, path in itertools.product(gateways, paths):
        segments = path.split("/")
        for count in range(len(segments), 1, -1):
            head = "/".join(segments[:count])
            if gateway.raw_path.rstrip("/").endswith(head):
                yield str(gateway).rpartition("@")[2], head, path  # before "@" may be a password
                break


def header_name(value: Any) -> str:
    """Return the name of a header that a call does not use for anything else."""
    if is_header_name(value) and not _TAKEN.fullmatch(value.lower()):
        return str(value)
    raise ValueError(f"is not a header name such as {str(ROUTING_KEY_HEADER)!r}")


def boolean(value: Any) -> bool:
    """Return a boolean, also from a string such as ``yes`` or ``off``."""
    said = _BOOLS.get(value.strip().lower()) if isinstance(value, str) else value
    if isinstance(said, bool):
        return said
    raise ValueError("is not true or false")


def count(value: Any) -> int:
    """Return a whole number of 0 or more, also from a string."""
    if isinstance(value, str) and re.fullmatch(r"\s*[0-9]{1,18}\s*", value):
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63:
        return value
    raise ValueError("is not a whole number of 0 or more")


def session_id(value: Any) -> str:
    """Return a session id as a string."""
    try:
        if (text := as_session_id(value)) is not None:
            return text
    except TypeError:
        pass
    raise ValueError("is not a session id: a string that is not blank, or an integer")


def source(value: Any) -> Source:
    """Return a source as it was given, if it can be read."""
    reader(value)
    return value  # type: ignore[no-any-return]


def pin_by(value: Any) -> PinBy:
    """Return a template with its sources."""
    if isinstance(value, PinBy):
        return value
    if not isinstance(value, str):
        raise ValueError("is not a string such as '{session_id}/{json:model}'")
    names = tuple(re.findall(r"{([^{}]*)}", value))
    if not names or set(re.sub(r"{[^{}]*}", "", value)) & set("{}"):
        raise ValueError("has no source in braces, such as '{session_id}/{json:model}'")
    for name in names:
        if name != SESSION_ID:
            try:
                reader(name)
            except ValueError as error:
                raise ValueError(f"has {{{name}}} in it, which {error}") from None
    return PinBy(value, names)


def app_key(value: Any) -> str | web.AppKey[Any]:
    """Return an app key or the name of one."""
    if isinstance(value, str) and value.lower() == "all":
        raise ValueError("is not an app key: for every ClientSession write instrument = true")
    if isinstance(value, (str, web.AppKey)):
        return value
    raise ValueError("is not an app key: a string or a web.AppKey")


def one_of(choices: tuple[str, ...]) -> Callable[[Any], str]:
    """Return a check that a value is one of the ``choices``."""

    def check(value: Any) -> str:
        if value in choices:
            return str(value)
        raise ValueError(f"is not one of {', '.join(map(repr, choices))}")

    return check


def function(value: Any) -> Callable[..., Any] | None:
    """Return a function that is not async."""
    if value is None:
        return None
    if not callable(value):
        raise ValueError("is not a function: a config imports no code, so pass it in code")
    if iscoroutinefunction(value) or iscoroutinefunction(type(value).__call__):
        raise ValueError("is async: nobody would await it")
    return value  # type: ignore[no-any-return]


def registry(value: Any) -> Any:
    """Return a registry of metrics."""
    if value is None or (hasattr(value, "register") and not isinstance(value, type)):
        return value
    raise ValueError("is not a prometheus_client.CollectorRegistry: pass it in code")


def metrics_kind(value: Any) -> str | None:
    """Return the kind of metrics to export, if its library is installed."""
    if value is None:
        return None
    kind = one_of(("prometheus",))(value)
    if find_spec("prometheus_client") is None:
        raise ValueError("needs prometheus_client: pip install 'aiohttp_smg_routing[metrics]'")
    return kind


def table_in(mapping: Mapping[str, Any], depth: int = 3) -> str | None:
    """Return where the table with a gateway is in a config file, as ``['tool']['routing']``."""
    for name, value in mapping.items():
        if isinstance(value, Mapping) and depth and "gateway" not in mapping:
            inner = "" if "gateway" in value else table_in(value, depth - 1)
            if inner is not None:
                return f"[{name!r}]{inner}"
    return None
