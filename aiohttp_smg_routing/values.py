"""Plain values are checked and brought to one form.

``ValueError`` says what is wrong with one, and does not show it: the config knows which it may.
"""

import re
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from inspect import iscoroutinefunction
from typing import Any

from aiohttp import web
from multidict import istr
from yarl import URL

from .gateway import CHAT_COMPLETIONS, ROUTING_KEY_HEADER
from .key import as_session_id

_BOOLS = {
    **dict.fromkeys(("true", "yes", "on", "1"), True),
    **dict.fromkeys(("false", "no", "off", "0"), False),
}
_FRAMING = frozenset(("connection", "content-length", "host", "transfer-encoding", "upgrade"))
_PATH = re.compile(r"/[^/?#][^?#]*")
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")

#: Makes a key of a request's storage from a name and a type: a text where aiohttp is before 3.14.
request_key: Callable[[str, Any], Any] = getattr(web, "RequestKey", lambda name, _: name)


def several(value: Any) -> tuple[Any, ...]:
    """Return a list or a tuple as a tuple, a text as its parts between commas, else one alone."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


def imported(path: str) -> Any:
    """Return what ``package.module:name`` names."""
    module, separator, name = path.partition(":")
    if not (module and separator and name):
        raise ValueError("does not have the form 'package.module:name'")
    try:
        return getattr(import_module(module), name)
    except (Exception, SystemExit) as error:  # whatever the module raises while it is imported
        raise ValueError(f"cannot be imported: {error!r}") from error


def imported_function(path: str) -> Callable[..., Any]:
    """Return the function that ``package.module:function`` names."""
    function = imported(path)
    if not callable(function):
        raise ValueError(f"names a {type(function).__name__}, which cannot be called")
    return function  # type: ignore[no-any-return]


def sync_function(value: Any) -> Callable[..., Any]:
    """Return a function that is not async, or the one ``call:package.module:function`` names."""
    function = value
    if isinstance(value, str) and value.startswith("call:"):
        function = imported_function(value.removeprefix("call:"))
    if not callable(function):
        raise ValueError("is not a function or 'call:package.module:function'")
    if iscoroutinefunction(function):
        raise ValueError("is async: nobody would await it")
    return function  # type: ignore[no-any-return]


def is_named(key: object, name: object) -> bool:
    """Tell whether a key of an app's or a request's storage is ``name``, or has that name.

    An ``AppKey`` or ``RequestKey`` is found by its name with or without the module.
    """
    if key == name or isinstance(key, str) or not isinstance(name, str):
        return key == name
    full_name: str = getattr(key, "_name", "")
    return full_name == name or full_name.endswith(f".{name}")


def registry(value: Any) -> Any:
    """Return a registry of metrics, or the one that ``package.module:NAME`` names."""
    found = imported(value) if isinstance(value, str) else value
    if isinstance(found, type) or not hasattr(found, "register"):
        raise ValueError("is not a prometheus_client.CollectorRegistry")
    return found


def gateway_url(value: Any) -> URL:
    """Return the URL of a gateway without credentials, default port and trailing slash."""
    try:
        url = URL(value)
        if url.scheme in ("http", "https") and url.raw_host and not url.query_string + url.fragment:
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
    if isinstance(value, str) and _PATH.fullmatch(value):
        path = URL(f"http://gateway{value}").raw_path
        if _PATH.fullmatch(path):  # of "/a/.." nothing is left
            return path
    raise ValueError(f"is not a path such as {CHAT_COMPLETIONS!r}")


def is_header_name(value: object) -> bool:
    """Tell whether a value can be the name of a header: RFC 9110, section 5.1."""
    return isinstance(value, str) and _TOKEN.fullmatch(value) is not None


def header_name(value: Any) -> istr:
    """Return the name of a header that a call has no use of its own for."""
    if is_header_name(value) and value.lower() not in _FRAMING:
        return istr(value)
    raise ValueError(f"is not a header name such as {str(ROUTING_KEY_HEADER)!r}")


def boolean(value: Any) -> bool:
    """Return a truth value, or what a text such as ``yes`` or ``off`` says."""
    said = _BOOLS.get(value.strip().lower()) if isinstance(value, str) else value
    if isinstance(said, bool):
        return said
    raise ValueError("is not true or false")


def count(value: Any) -> int:
    """Return a whole number of 0 or more, or what its text says."""
    if isinstance(value, str) and re.fullmatch(r"\s*[0-9]{1,18}\s*", value):
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    raise ValueError("is not a whole number of 0 or more")


def secret(value: Any) -> str | None:
    """Return a secret."""
    if value is None or (isinstance(value, str) and value):
        return value
    raise ValueError("is not a text of one character or more")


def session_id(value: Any) -> str:
    """Return the text of a session id."""
    try:
        if (text := as_session_id(value)) is not None:
            return text
    except TypeError:
        pass
    raise ValueError("is not a session id: a text that is not blank, or a number")


def app_key(value: Any) -> str | web.AppKey[Any]:
    """Return an app key or the name of one."""
    if isinstance(value, (str, web.AppKey)):
        return value
    raise ValueError("is not an app key: a text or a web.AppKey")


def one_of(choices: tuple[str, ...]) -> Callable[[Any], str]:
    """Return a check that a value is one of the ``choices``."""

    def check(value: Any) -> str:
        if value in choices:
            return str(value)
        raise ValueError(f"is not one of {', '.join(map(repr, choices))}")

    return check


def optional(check: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return ``check`` for a value that may be None."""
    return lambda value: None if value is None else check(value)


def need(package: str, *, extra: str) -> None:
    """Say which extra to install where an optional ``package`` is not there."""
    if find_spec(package) is None:
        raise ValueError(f"needs {package}: pip install 'aiohttp_smg_routing[{extra}]'")


def metrics_kind(value: Any) -> str:
    """Return the kind of metrics to keep, where what it needs is there."""
    kind = one_of(("prometheus",))(value)
    need("prometheus_client", extra="metrics")
    return kind
