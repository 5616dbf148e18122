"""What the user says: which gateway, where the session id is found, which key it gives."""

import difflib
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from aiohttp import hdrs, web
from multidict import istr
from yarl import URL

from .gateway import CHAT_COMPLETIONS, ROUTING_KEY_HEADER
from .key import KeyForm, SessionId, routing_key
from .source import Source, source_reader

OnMissing = Literal["pass", "warn", "raise"]


class ConfigError(ValueError):
    """A wrong config; ``faults`` has ``(key, what is wrong with it)`` for every fault."""

    def __init__(self, faults: Iterable[tuple[str, str]]) -> None:
        self.faults = tuple(faults)
        super().__init__("\n".join(f"{key}: {problem}" for key, problem in self.faults))


@dataclass(frozen=True, slots=True)
class RoutingConfig:
    """Which calls are tagged, and with the key of which session.

    A field that takes several values takes one alone, too. Values are checked and brought to one
    form, so that equal configs compare equal. Raises ``ConfigError`` with every fault.

    >>> RoutingConfig("http://10.0.0.1:30000", session_id=["header:X-Session-Id", "cookie:sid"])
    """

    gateway: str | URL | Sequence[str | URL]
    """The gateway's absolute http(s) URL, or several. Its path is the base path of the calls;
    credentials in it are dropped. A key goes nowhere else."""

    enabled: bool = True
    """When false nothing is installed and no call is tagged. The config is checked all the same."""

    session_id: Source | Sequence[Source] = "match_info:session_id"
    """Where the session id is found in the inbound request; the first source that has one counts.

    ``match_info:NAME``, ``header:NAME``, ``query:NAME``, ``cookie:NAME``, ``request:NAME`` (what an
    earlier middleware stored on the request), ``call:package.module:function``, or a function of
    the request, sync or async. ``header:Authorization`` gives the bearer token.
    """

    paths: str | Sequence[str] = (CHAT_COMPLETIONS,)
    """The gateway calls that are tagged: paths below the gateway's base path. POST only."""

    header: str = ROUTING_KEY_HEADER
    """The header that carries the key."""

    key: KeyForm = "session_id"
    """``session_id``: the id itself, where the gateway takes it. ``digest``: always a digest."""

    secret: str | None = field(default=None, repr=False)
    """Keys the digest, for ids that are credentials. Only with ``key = "digest"``."""

    on_missing: OnMissing = "pass"
    """What becomes of a call that matches but has no session: ``pass`` lets it go unchanged,
    ``warn`` also logs it at WARNING, ``raise`` raises ``MissingSessionError`` in the caller."""

    client_session: str | web.AppKey[Any] | Sequence[str | web.AppKey[Any]] = ()
    """The app key, or keys, under which the server keeps the ``ClientSession`` to attach to.

    A text names a string key, or an ``AppKey`` by its name with or without the module.
    """

    _calls: frozenset[tuple[str, str | None, int | None, str]] = field(
        init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        faults: list[tuple[str, str]] = []
        for name, convert in _CONVERTERS.items():
            value = getattr(self, name)
            given = as_tuple(value) if name in _SEVERAL else (value,)
            good = []
            for item in given:
                try:
                    good.append(convert(item))
                except ValueError as error:
                    faults.append((name, str(error)))
            if not given and name != "client_session":
                faults.append((name, _REQUIRED.get(name, "is empty: name at least one")))
            elif good:
                object.__setattr__(self, name, tuple(good) if name in _SEVERAL else good[0])
        if self.secret is not None and self.key == "session_id":
            faults.append(("secret", "is used with key = 'digest' only, and key is 'session_id'"))
        if faults:
            raise ConfigError(faults)
        calls = (
            (url.scheme, url.raw_host, url.port, url.raw_path.rstrip("/") + path)
            for url in as_tuple(self.gateway)
            for path in as_tuple(self.paths)
        )
        object.__setattr__(self, "_calls", frozenset(calls))

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> "RoutingConfig":
        """Build a config from the section that an app's YAML, TOML or JSON config has for it.

        Plain strings do for every value: a truth value is ``true``, ``yes``, ``on`` or ``1``, or
        ``false``, ``no``, ``off`` or ``0``; several values are separated by commas. Raises
        ``ConfigError`` with every fault, unknown keys with the nearest known one.

        >>> RoutingConfig.from_mapping({"gateway": "http://10.0.0.1:30000", "enabled": "yes"})
        """
        return _from_strings(mapping, {name: name for name in _CONVERTERS})

    @classmethod
    def from_env(
        cls, prefix: str = "SMG_ROUTING_", environ: Mapping[str, str] = os.environ
    ) -> "RoutingConfig":
        """Build a config from environment variables such as ``SMG_ROUTING_GATEWAY``.

        Values are as in ``from_mapping()``; an empty variable counts as not set. Raises
        ``ConfigError`` with every fault, variables of that prefix which it doesn't know included.

        >>> RoutingConfig.from_env(environ={"SMG_ROUTING_GATEWAY": "http://10.0.0.1:30000"})
        """
        given = {name: text for name, text in environ.items() if name.startswith(prefix) and text}
        return _from_strings(given, {prefix + name.upper(): name for name in _CONVERTERS})

    def tags(self, method: str, url: URL) -> bool:
        """Tell whether a call is one that carries a key: POST, to a path of the gateway."""
        call = (url.scheme, url.raw_host, url.port, url.raw_path)
        return method == hdrs.METH_POST and call in self._calls

    def routing_key(self, session_id: SessionId) -> str:
        """Return the key that ``session_id`` has under this config; see ``routing_key()``."""
        return routing_key(session_id, key=self.key, secret=self.secret)


def as_config(config: RoutingConfig | Mapping[str, Any]) -> RoutingConfig:
    """Return ``config``, built by ``from_mapping()`` where it is a mapping."""
    if isinstance(config, RoutingConfig):
        return config
    if not isinstance(config, Mapping):
        raise ConfigError([("config", f"{config!r} is not a RoutingConfig or a mapping")])
    return RoutingConfig.from_mapping(config)


def as_tuple(value: object) -> tuple[Any, ...]:
    """Return several values as a tuple, and one alone as a tuple of one."""
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


def _from_strings(mapping: Mapping[str, Any], known: Mapping[str, str]) -> RoutingConfig:
    """Build a config from ``mapping``, whose keys are the ``known`` names of the fields."""
    faults: list[tuple[str, str]] = []
    values: dict[str, Any] = {"gateway": ()}
    for name, value in mapping.items():
        if name in known:
            values[known[name]] = _parse(known[name], value)
        else:
            near = difflib.get_close_matches(str(name), known, n=1, cutoff=0)
            faults.append((str(name), f"unknown key; the nearest one is {near[0]!r}"))
    try:
        config = RoutingConfig(**values)
    except ConfigError as error:
        names = {field_name: name for name, field_name in known.items()}
        faults += [(names[field_name], problem) for field_name, problem in error.faults]
    if faults:
        raise ConfigError(faults)
    return config


def _parse(name: str, value: Any) -> Any:
    if not isinstance(value, str):
        return value
    if name == "enabled":
        return _BOOLS.get(value.strip().lower(), value)
    if name in _SEVERAL:
        return [item.strip() for item in value.split(",") if item.strip()]
    return value


def _gateway(value: Any) -> URL:
    try:
        url = URL(value)
        if url.scheme in ("http", "https") and url.raw_host and not url.query_string + url.fragment:
            origin = url.origin().with_port(None if url.is_default_port() else url.port)
            return URL(f"{origin}{url.raw_path.rstrip('/')}", encoded=True)
    except (TypeError, ValueError):
        pass
    shown = re.sub(r"//[^/@]*@", "//***@", repr(value))  # without credentials
    raise ValueError(f"{shown} is not an absolute http(s) URL")


def _path(value: Any) -> str:
    if isinstance(value, str) and re.fullmatch(r"/[^/?#][^?#]*", value):
        return URL(f"http://gateway{value}").raw_path
    raise ValueError(f"{value!r} is not a path such as {CHAT_COMPLETIONS!r}")


def _source(value: Any) -> Source:
    try:
        source_reader(value)
    except ValueError as error:
        raise ValueError(f"{value!r} {error}") from error
    return value  # type: ignore[no-any-return]


def _header(value: Any) -> istr:
    if isinstance(value, str) and _TOKEN.fullmatch(value):
        return istr(value)
    raise ValueError(f"{value!r} is not a header name such as {str(ROUTING_KEY_HEADER)!r}")


def _enabled(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    raise ValueError(f"{value!r} is not true or false")


def _secret(value: Any) -> str | None:
    if value is None or (isinstance(value, str) and value):
        return value
    raise ValueError("is not a text of one character or more")  # its value is never shown


def _app_key(value: Any) -> str | web.AppKey[Any]:
    if isinstance(value, (str, web.AppKey)) and value:
        return value
    raise ValueError(f"{value!r} is not an app key: a text or a web.AppKey")


def _one_of(choices: tuple[str, ...]) -> Callable[[Any], str]:
    def convert(value: Any) -> str:
        if value in choices:
            return str(value)
        raise ValueError(f"{value!r} is not one of {', '.join(map(repr, choices))}")

    return convert


_CONVERTERS: dict[str, Callable[[Any], Any]] = {
    "gateway": _gateway,
    "enabled": _enabled,
    "session_id": _source,
    "paths": _path,
    "header": _header,
    "key": _one_of(get_args(KeyForm)),
    "secret": _secret,
    "on_missing": _one_of(get_args(OnMissing)),
    "client_session": _app_key,
}
_SEVERAL = frozenset(("gateway", "session_id", "paths", "client_session"))
_REQUIRED = {"gateway": "is required: the URL of the gateway, such as 'http://10.0.0.1:30000'"}
_BOOLS = {
    **dict.fromkeys(("true", "yes", "on", "1"), True),
    **dict.fromkeys(("false", "no", "off", "0"), False),
}
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 9110, section 5.1
