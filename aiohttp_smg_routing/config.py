"""What the user says: which gateway, where the session id is found, which key it gives."""

import difflib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from aiohttp import web
from aiohttp.hdrs import METH_POST
from yarl import URL

from . import values
from .gateway import CHAT_COMPLETIONS, ROUTING_KEY_HEADER
from .key import KeyForm, SessionId, as_prefix, routing_key
from .source import Source, source_reader

OnMissing = Literal["pass", "warn", "raise"]

#: As ``client_session``: every ``ClientSession`` that is made while the app runs.
ALL_SESSIONS = "all"


class ConfigError(ValueError):
    """A wrong config; ``faults`` has ``(key, what is wrong with it)`` for every fault."""

    def __init__(self, faults: Iterable[tuple[str, str]]) -> None:
        self.faults = tuple(faults)
        super().__init__("\n".join(f"{key}: {problem}" for key, problem in self.faults))

    def __reduce__(self) -> tuple[type["ConfigError"], tuple[Any, ...]]:
        return type(self), (self.faults,)  # it comes whole out of another process


@dataclass(frozen=True, slots=True)
class RoutingConfig:
    """Which calls are tagged, with the key of which session, and what is kept of it.

    A field that takes several values takes one alone, or a text with commas, too. Values are
    checked and brought to one form, so that equal configs compare equal. Raises ``ConfigError``
    with every fault.

    >>> RoutingConfig("http://10.0.0.1:30000", session_id=["header:X-Session-Id", "cookie:sid"])
    """

    gateway: str | URL | Sequence[str | URL]
    """The gateway's absolute http(s) URL, or several. Its path is the base path of the calls;
    credentials in it are dropped. A key goes nowhere else."""

    enabled: bool = True
    """When false nothing is installed and no call is tagged. The config is checked all the same."""

    session_id: Source | Sequence[Source] = "match_info:session_id"
    """Where the session id is found in the inbound request; the first source that has one counts.

    ``match_info:NAME``, ``header:NAME``, ``query:NAME``, ``cookie:NAME``, ``json:PATH`` (a text in
    the JSON body, such as ``json:metadata.session_id``; the handler can still read the body),
    ``request:NAME`` (what an earlier middleware stored on the request), ``aiohttp_session:NAME``
    (a value of aiohttp-session's session), ``call:package.module:function``, or a function of the
    request, sync or async. ``header:Authorization`` gives the bearer token.
    """

    ignore_ids: str | Sequence[str] = ()
    """Session ids that count as none: placeholders, such as ``default``, that would bring every
    anonymous caller to one worker. The next source is asked."""

    paths: str | Sequence[str] = (CHAT_COMPLETIONS,)
    """The gateway calls that are tagged: paths below the gateway's base path. POST only."""

    header: str = ROUTING_KEY_HEADER
    """The header that carries the key."""

    key: KeyForm = "session_id"
    """``session_id``: the id itself, where the gateway takes it. ``digest``: always a digest."""

    secret: str | None = field(default=None, repr=False)
    """Keys the digest, for ids that are credentials. Only with ``key = "digest"``."""

    prefix: str = ""
    """Begins every key, so that jobs which share a gateway stay apart where their ids are the same:
    up to 52 visible ASCII characters, such as ``job-7/``."""

    on_missing: OnMissing = "pass"
    """What becomes of a call that matches but has no session: ``pass`` lets it go unchanged,
    ``warn`` also logs it at WARNING, ``raise`` raises ``MissingSessionError`` in the caller."""

    client_session: str | web.AppKey[Any] | Sequence[str | web.AppKey[Any]] = ()
    """The app key, or keys, under which the server keeps the ``ClientSession`` to attach to.

    A text names a string key, or an ``AppKey`` by its name with or without the module. ``all``
    stands for every ``ClientSession`` that the process makes while the app runs, whoever makes it,
    and for those that the app keeps already.
    """

    track_sessions: int = 100_000
    """How many sessions the ledger keeps: those that called last. 0 switches the ledger off."""

    on_move: Callable[[Any], object] | str | None = None
    """Called with a ``Move`` when a session is seen on another worker than before: a function or
    ``call:package.module:function``. It runs in the call's task; what it raises is logged."""

    metrics: Literal["prometheus"] | None = None
    """``prometheus`` keeps the ledger's counts as metrics; needs the extra ``metrics``."""

    metrics_registry: Any = None
    """The registry that takes the metrics: a ``prometheus_client.CollectorRegistry``, or where it
    is imported from as ``package.module:NAME``. None stands for prometheus-client's default."""

    hide_worker_ids: bool = False
    """Take the header that names the worker off what the server answers to agents."""

    # The calls that are tagged: as nearly all are spelled, and as other spellings may mean them.
    _paths: frozenset[str] = field(init=False, repr=False, compare=False)
    _spelled: frozenset[tuple[str, str, str]] = field(init=False, repr=False, compare=False)
    _meant: frozenset[tuple[str, str | None, int | None, str]] = field(
        init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        faults: list[tuple[str, str]] = []
        for name, check in _CHECKS.items():
            value = getattr(self, name)
            given = values.several(value) if name in _SEVERAL else (value,)
            good = []
            for place, item in enumerate(given):
                try:
                    good.append(check(item))
                except ValueError as error:
                    faults.append((name, f"{_shown(name, given, place)}{error}"))
            if not given and name in _REQUIRED:
                faults.append((name, _REQUIRED[name]))
            elif len(good) == len(given):
                object.__setattr__(self, name, tuple(good) if name in _SEVERAL else good[0])
        if self.secret is not None and self.key == "session_id":
            faults.append(("secret", "is used with key = 'digest' only, and key is 'session_id'"))
        if self.metrics and self.track_sessions == 0:
            faults.append(
                ("metrics", "come from the ledger, and track_sessions = 0 switches it off")
            )
        if faults:
            raise ConfigError(faults)
        calls = [
            (url, url.raw_path.rstrip("/") + path)
            for url in values.several(self.gateway if self.enabled else ())
            for path in values.several(self.paths)
        ]
        spelled = frozenset((url.scheme, url.raw_authority, path) for url, path in calls)
        meant = frozenset((url.scheme, url.raw_host, url.port, path) for url, path in calls)
        object.__setattr__(self, "_paths", frozenset(path for _, path in calls))
        object.__setattr__(self, "_spelled", spelled)
        object.__setattr__(self, "_meant", meant)

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> "RoutingConfig":
        """Build a config from the section that an app's YAML, TOML or JSON config has for it.

        Plain strings do for every value: a truth value is ``true``, ``yes``, ``on`` or ``1``, or
        ``false``, ``no``, ``off`` or ``0``; several values are separated by commas. Raises
        ``ConfigError`` with every fault, unknown keys with the nearest known one.

        >>> RoutingConfig.from_mapping({"gateway": "http://10.0.0.1:30000", "enabled": "yes"})
        """
        return _from_named(mapping, {name: name for name in _CHECKS})

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
        return _from_named(given, {prefix + name.upper(): name for name in _CHECKS})

    def tags(self, method: str, url: URL) -> bool:
        """Tell whether a call is one that carries a key: POST, to a path of the gateway."""
        # aiohttp before 3.14 shows the method, and any version an encoded URL, as it was passed.
        if method != METH_POST and method.upper() != METH_POST:
            return False
        # yarl works out a host and a port anew for each URL, which takes as long as all the rest.
        if (url.scheme, url.raw_authority, url.raw_path) in self._spelled:
            return True
        if url.raw_path not in self._paths:
            return False
        try:
            return (url.scheme, (url.raw_host or "").lower(), url.port, url.raw_path) in self._meant
        except ValueError:  # an encoded URL is read only now: aiohttp is about to refuse it
            return False

    def routing_key(self, session_id: SessionId) -> str:
        """Return the key that ``session_id`` has under this config; see ``routing_key()``."""
        return routing_key(session_id, key=self.key, secret=self.secret, prefix=self.prefix)


def as_config(config: RoutingConfig | Mapping[str, Any]) -> RoutingConfig:
    """Return ``config``, built by ``from_mapping()`` where it is a mapping."""
    if isinstance(config, RoutingConfig):
        return config
    if not isinstance(config, Mapping):
        raise ConfigError(  # it may hold a secret: its type alone is shown
            [("config", f"is a {type(config).__name__}, not a RoutingConfig or a mapping")]
        )
    return RoutingConfig.from_mapping(config)


def _from_named(mapping: Mapping[str, Any], fields: Mapping[str, str]) -> RoutingConfig:
    """Build a config from ``mapping``, in which the fields have the names in ``fields``."""
    faults: list[tuple[str, str]] = []
    given: dict[str, Any] = {"gateway": ()}
    for name, value in mapping.items():
        if name in fields:
            given[fields[name]] = value
        else:
            near = difflib.get_close_matches(str(name), fields, n=1, cutoff=0)
            faults.append((str(name), f"unknown key; the nearest one is {near[0]!r}"))
    try:
        config = RoutingConfig(**given)
    except ConfigError as error:
        names = {field_name: name for name, field_name in fields.items()}
        faults += [(names[field_name], problem) for field_name, problem in error.faults]
    if faults:
        raise ConfigError(faults)
    return config


def _shown(name: str, given: Sequence[Any], place: int) -> str:
    """Return how a fault names the value in that place: itself, unless it may hold a secret."""
    value = given[place]
    texts = "".join(text for text in given if isinstance(text, str))
    # A password with a comma is in two places, and stands before the "@" in the second one.
    if name in ("key", "secret") or (name == "gateway" and not set("@?#").isdisjoint(texts)):
        return f"number {place + 1} of {len(given)} " if len(given) > 1 else ""
    if value is None or isinstance(value, (str, float)):
        return f"{value!r} "
    if isinstance(value, int) and value.bit_length() < 64:  # Python writes out no very long ones
        return f"{value!r} "
    return f"a {type(value).__name__} "


def _as_given(check: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return ``check`` for a value that is kept as it was given.

    A text, unlike the function that it names, can go to another process.
    """

    def keep(value: Any) -> Any:
        check(value)
        return value

    return keep


_CHECKS: dict[str, Callable[[Any], Any]] = {
    "gateway": values.gateway_url,
    "enabled": values.boolean,
    "session_id": _as_given(source_reader),
    "ignore_ids": values.session_id,
    "paths": values.call_path,
    "header": values.header_name,
    "key": values.one_of(get_args(KeyForm)),
    "secret": values.secret,
    "prefix": as_prefix,
    "on_missing": values.one_of(get_args(OnMissing)),
    "client_session": values.app_key,
    "track_sessions": values.count,
    "on_move": values.optional(_as_given(values.sync_function)),
    "metrics": values.optional(values.metrics_kind),
    "metrics_registry": values.optional(_as_given(values.registry)),
    "hide_worker_ids": values.boolean,
}
_SEVERAL = frozenset(("gateway", "session_id", "ignore_ids", "paths", "client_session"))
_REQUIRED = {
    "gateway": "is required: the URL of the gateway, such as 'http://10.0.0.1:30000'",
    "session_id": "is empty: name at least one source",
    "paths": "is empty: name at least one path",
}
