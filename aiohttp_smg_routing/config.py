"""The config: which gateway, where the session id is, which key it gives."""

import difflib
import logging
import os
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from aiohttp import web
from yarl import URL

from . import values
from .gateway import CHAT_COMPLETIONS, ROUTED_WORKER_HEADER, ROUTING_KEY_HEADER
from .keys import KeyForm, SessionId, as_prefix, as_secret, routing_key, session_key, shared_key
from .log import say
from .pins import Move
from .sources import JSON_MAX_SIZE, SESSION_ID, PinBy, Source
from .values import option

logger: logging.Logger = logging.getLogger(__name__)

OnMissing = Literal["pass", "warn", "raise"]


class ConfigError(ValueError):
    """A config has faults. The text of the error has a line for each."""

    def __init__(self, faults: Iterable[tuple[str, str]]) -> None:
        self.faults: tuple[tuple[str, str], ...] = tuple(faults)
        """``(option, what is wrong with it)`` for every fault."""
        super().__init__("\n".join(f"{name}: {problem}" for name, problem in self.faults))

    def __reduce__(self) -> tuple[type["ConfigError"], tuple[Any, ...]]:
        return type(self), (self.faults,)  # so that a pickle keeps the faults


@dataclass(frozen=True, slots=True, init=False)
class RoutingConfig:
    """Which calls carry a key, which session's key it is, and what the ledger keeps.

    Each option except ``on_move`` and ``metrics_registry`` also takes a string. Write a boolean as
    ``true``, ``yes``, ``on`` or ``1``, or as ``false``, ``no``, ``off`` or ``0``. Separate several
    values by commas. Raises ``ConfigError`` with every fault.

    >>> config = RoutingConfig("http://10.0.0.1:30000", session_id=["cookie:sid", "query:sid"])
    """

    gateway: tuple[URL, ...] = option(values.gateway_url, (), several=True, hidden="@?#")
    """The gateway's absolute http(s) URL, or several. A URL's path is the base path, below which
    ``paths`` begin. Credentials in a URL are dropped. No other URL gets a key. Required."""

    enabled: bool = option(values.boolean, True)
    """If false, nothing is installed and no call carries a key, but the config is still checked.
    Default: true."""

    session_id: tuple[Source, ...] = option(values.source, "match_info:session_id", several=True)
    """Where the session id is in the inbound request. The first source that has one counts:
    ``match_info:NAME``, ``header:NAME`` (``header:Authorization`` gives the bearer token),
    ``query:NAME``, ``cookie:NAME``, ``json:PATH`` (a string or an integer in the JSON body, such as
    ``json:metadata.session_id``; the handler can still read the body), ``request:NAME`` (stored by
    an earlier middleware), or a function, sync or async. Default: ``match_info:session_id``."""

    ignore_ids: tuple[str, ...] = option(values.session_id, (), several=True)
    """Session ids that count as no session, such as the placeholder ``default``, which would
    pin all anonymous callers to one worker. The next source is asked. Default: none."""

    pin_by: PinBy = option(values.pin_by, "{session_id}")
    """What shares a worker, if not the session alone: a string with sources in braces, such as
    ``{session_id}/{json:model}`` or ``{header:X-Group-Id}``. The sources read the inbound
    request. If one finds nothing, the session alone is pinned. Default: ``{session_id}``."""

    paths: tuple[str, ...] = option(values.call_path, (CHAT_COMPLETIONS,), several=True)
    """The paths of the calls that carry a key, below the gateway's base path. Only a POST carries
    one. Default: ``/v1/chat/completions``."""

    header: str = option(values.header_name, str(ROUTING_KEY_HEADER))
    """The header that carries the key. Default: ``X-SMG-Routing-Key``."""

    worker_header: str = option(values.header_name, str(ROUTED_WORKER_HEADER))
    """The header of the gateway's answer that names the worker. Default:
    ``X-SMG-Routed-Worker-Id``, which SMG sends since 1.10 (``docs/gateways.md``)."""

    key: KeyForm = option(values.one_of(get_args(KeyForm)), "session_id", hidden="any")
    """``session_id``: the id is the key if the gateway takes it, otherwise its digest is.
    ``digest``: always a digest. Default: ``session_id``."""

    secret: str | None = option(as_secret, None, hidden="any")
    """The secret of the digest (HMAC-SHA256), for ids that are credentials. It needs
    ``key = "digest"`` or ``pin_by``. Default: none."""

    prefix: str = option(as_prefix, "")
    """The beginning of every key: up to 52 visible ASCII characters, such as ``job-7/``. It keeps
    jobs apart that share a gateway and have equal ids. Default: empty."""

    on_missing: OnMissing = option(values.one_of(get_args(OnMissing)), "pass")
    """What happens to a call to the gateway without a session: ``pass`` (the default) sends it
    unchanged, ``warn`` also logs it, ``raise`` raises ``MissingSessionError`` in the caller."""

    on_late: OnMissing = option(values.one_of(get_args(OnMissing)), "warn")
    """What happens to a call in a request's session after the request has ended: ``pass`` sends it
    with the key, ``warn`` (the default) also logs it, ``raise`` raises ``MissingSessionError``."""

    client_session: tuple[str | web.AppKey[Any], ...] = option(values.app_key, (), several=True)
    """The app keys of the ``ClientSession`` objects that get the hook at start-up. A string names a
    string key, or a ``web.AppKey`` with or without its module. Default: none."""

    instrument: bool = option(values.boolean, False)
    """If true, every ``ClientSession`` that the process makes while the app runs gets the hook. So
    do those that the app already keeps, and every client of httpx. Default: false."""

    json_max_size: int = option(values.count, JSON_MAX_SIZE)
    """The largest JSON body, in bytes, that a ``json:`` source or ``peek_json()`` reads. The app's
    ``client_max_size`` does not matter. Default: 16,777,216 (16 MiB)."""

    track_sessions: int = option(values.count, 100_000)
    """How many sessions the ledger keeps: those that called last, with up to 64 pins each. 0
    switches the ledger off. Default: 100,000."""

    on_move: Callable[[Move], object] | None = option(values.function, None)
    """A function that is called with each ``Move``. It must not be async. What it raises is logged
    once. Default: none."""

    metrics: Literal["prometheus"] | None = option(values.metrics_kind, None)
    """``prometheus`` exports the ledger's counts. It needs the extra ``metrics``. Default: none."""

    metrics_registry: Any = option(values.registry, None)
    """The ``prometheus_client.CollectorRegistry`` for the metrics. Default: the process's own."""

    hide_worker_ids: bool = option(values.boolean, False)
    """If true, answers to agents lose the header that names the worker. Default: false."""

    def __init__(self, /, gateway: str | URL | Sequence[str | URL] = (), **options: object) -> None:
        faults = _unknown(options)
        given = {"gateway": gateway, **options}
        for name, its in OPTIONS.items():
            value = its.read(name, given.get(name, its.default), faults)
            object.__setattr__(self, name, value)
        wrong = {name for name, _ in faults}
        faults += [fault for fault in self._conflicts(wrong) if fault[0] not in wrong]
        if faults:
            raise ConfigError(faults)

    def _conflicts(self, wrong: Container[str]) -> Iterable[tuple[str, str]]:
        """Return the faults of options that are missing, or conflict with each other."""
        if not self.gateway:
            yield "gateway", "is required: the URL of the gateway, such as 'http://10.0.0.1:30000'"
        for name, what in (("session_id", "source"), ("paths", "path")):
            if not getattr(self, name):
                yield name, f"is empty: name at least one {what}"
        for text, head, path in values.overlaps(self.gateway, self.paths):
            right = f"write {text.removesuffix(head)!r}"
            yield "gateway", f"{text!r} ends in {head!r}, which {path!r} begins with: {right}"
        is_plain = self.key == "session_id" and ("pin_by" in wrong or self.pin_by.is_session)
        if self.secret is not None and is_plain:
            yield "secret", "needs key = 'digest' or pin_by, and there is neither"
        for name in ("metrics", "on_move"):
            if getattr(self, name) and not self.track_sessions:
                yield name, "needs the ledger, and track_sessions = 0 switches it off"

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> "RoutingConfig":
        """Build a config from its table in an app's YAML, TOML or JSON config.

        Raises ``ConfigError`` with every fault. For an unknown option it names the nearest one.

        >>> config = RoutingConfig.from_mapping({"gateway": "http://10.0.0.1:30000"})
        """
        if not isinstance(mapping, Mapping):
            raise ConfigError(  # it may hold a secret, so only its type is shown
                [("config", f"is a {type(mapping).__name__}: pass the table of options")]
            )
        if table := values.table_in(mapping):
            raise ConfigError([("config", f"is the whole file: pass its table, config{table}")])
        return cls(**{str(name): value for name, value in mapping.items()})

    @classmethod
    def from_env(
        cls, prefix: str = "SMG_ROUTING_", environ: Mapping[str, str] | None = None
    ) -> "RoutingConfig":
        """Build a config from environment variables such as ``SMG_ROUTING_GATEWAY``.

        ``environ`` is ``os.environ`` by default. An empty variable counts as not set, except an
        empty secret. Raises ``ConfigError`` with every fault. A variable that names no option is a
        fault if it resembles one. Otherwise it is only logged: Kubernetes sets
        ``SMG_ROUTING_PORT`` for a service called ``smg-routing``.

        >>> config = RoutingConfig.from_env(environ={"SMG_ROUTING_GATEWAY": "http://10.0.0.1:30000"})
        """
        environ = os.environ if environ is None else environ
        variables = {
            rest.lower() if rest.isupper() else rest: prefix + rest
            for rest in (name.removeprefix(prefix) for name in environ if name.startswith(prefix))
            if environ[prefix + rest] or rest == "SECRET"
        }
        foreign = [name for name in variables if name not in OPTIONS and not _near(name)]
        if foreign:
            names = ", ".join(variables[name] for name in foreign)
            say(logger, logging.WARNING, "%s: ignored, there are no such options", names)
        try:
            return cls.from_mapping(
                {name: environ[it] for name, it in variables.items() if name not in foreign}
            )
        except ConfigError as error:
            faults = [(variables.get(it, prefix + it.upper()), why) for it, why in error.faults]
            raise ConfigError(faults) from None

    def routing_key(self, session_id: SessionId) -> str:
        """Return the key of ``session_id`` without ``pin_by``. Raises as ``routing_key()`` does."""
        return routing_key(session_id, key=self.key, secret=self.secret, prefix=self.prefix)


OPTIONS: Mapping[str, values.Option] = {
    it.name: it.metadata["option"] for it in fields(RoutingConfig)
}


def as_config(config: RoutingConfig | Mapping[str, Any]) -> RoutingConfig:
    """Return ``config``, built by ``from_mapping()`` if it is a mapping."""
    return config if isinstance(config, RoutingConfig) else RoutingConfig.from_mapping(config)


def name_and_key(
    config: RoutingConfig, session_id: str, parts: Mapping[str, str | None]
) -> tuple[str, str]:
    """Return the name of a session in ledger and logs, and its key.

    The id comes from ``as_session_id()``. ``parts`` are what the sources of ``pin_by`` found.
    """
    name = session_key(session_id, config.key, config.secret, config.prefix)
    if config.pin_by.is_session:
        return name, name
    sources = config.pin_by.sources
    found = [session_id if part == SESSION_ID else parts.get(part) for part in sources]
    shared = [part for part in found if part is not None]
    if len(shared) < len(found):
        return name, name
    return name, shared_key(config.pin_by.template, shared, config.secret, config.prefix)


def _near(name: str) -> list[str]:
    return difflib.get_close_matches(name.lower(), OPTIONS, n=1, cutoff=0.75)


def _unknown(options: Iterable[str]) -> list[tuple[str, str]]:
    return [
        (name, "; ".join(["unknown option", *(f"the nearest one is {it!r}" for it in _near(name))]))
        for name in options
        if name not in OPTIONS
    ]
