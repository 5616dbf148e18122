"""What the user says: which gateway, where the session id is found, which key it gives."""

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
from .keys import KeyForm, SessionId, as_prefix, routing_key, session_key, shared_key
from .log import say
from .sources import JSON_MAX_SIZE, SESSION_ID, PinBy, Source
from .values import option

logger: logging.Logger = logging.getLogger(__name__)

OnMissing = Literal["pass", "warn", "raise"]


class ConfigError(ValueError):
    """A wrong config; ``faults`` has ``(option, what is wrong with it)`` for every fault."""

    def __init__(self, faults: Iterable[tuple[str, str]]) -> None:
        self.faults: tuple[tuple[str, str], ...] = tuple(faults)
        super().__init__("\n".join(f"{name}: {problem}" for name, problem in self.faults))

    def __reduce__(self) -> tuple[type["ConfigError"], tuple[Any, ...]]:
        return type(self), (self.faults,)  # it comes whole out of another process


@dataclass(frozen=True, slots=True, init=False)
class RoutingConfig:
    """Which calls carry a key, the key of which session, and what is kept of it.

    Each option can be given as text, as an environment has it: a truth value is ``true``, ``yes``,
    ``on`` or ``1``, or ``false``, ``no``, ``off`` or ``0``; several values stand between commas. An
    option with several values takes one alone, too. Raises ``ConfigError`` with every fault.

    >>> RoutingConfig("http://10.0.0.1:30000", session_id=["header:X-Session-Id", "cookie:sid"])
    """

    gateway: tuple[URL, ...] = option(values.gateway_url, (), several=True, hidden="@?#")
    """The gateway's absolute http(s) URL, or several. Required. Its path is the base path of the
    calls, without what ``paths`` begin with; credentials in it are dropped. A key goes nowhere
    else."""

    enabled: bool = option(values.boolean, True)
    """When false nothing is installed and no call carries a key. The config is checked all the
    same. Default: true."""

    session_id: tuple[Source, ...] = option(values.source, "match_info:session_id", several=True)
    """Where the session id is in the inbound request; the first source that has one counts.
    ``match_info:NAME`` (the default is ``match_info:session_id``), ``header:NAME``
    (``header:Authorization`` gives the bearer token), ``query:NAME``, ``cookie:NAME``,
    ``json:PATH`` (a text or an integer in the JSON body, such as ``json:metadata.session_id``; the
    handler can still read the body), ``request:NAME`` (what an earlier middleware stored on the
    request), or a function of the request, sync or async."""

    ignore_ids: tuple[str, ...] = option(values.session_id, (), several=True)
    """Session ids that count as none: placeholders, such as ``default``, that would bring every
    anonymous caller to one worker. The next source is asked. Default: none."""

    pin_by: PinBy = option(values.pin_by, "{session_id}")
    """What shares a worker, where that is not the session: a text with sources in braces, such as
    ``{session_id}/{json:model}`` or ``{header:X-Group-Id}``. They are read from the inbound
    request. Where one finds nothing, the session alone is pinned. Default: ``{session_id}``."""

    paths: tuple[str, ...] = option(values.call_path, (CHAT_COMPLETIONS,), several=True)
    """The gateway calls that carry a key: paths below the gateway's base path, POST only. Default:
    ``/v1/chat/completions``."""

    header: str = option(values.header_name, str(ROUTING_KEY_HEADER))
    """The header that carries the key. Default: ``X-SMG-Routing-Key``."""

    worker_header: str = option(values.header_name, str(ROUTED_WORKER_HEADER))
    """The header of an answer that names the worker, for gateways that have another one. Default:
    ``X-SMG-Routed-Worker-Id``."""

    key: KeyForm = option(values.one_of(get_args(KeyForm)), "session_id", hidden="any")
    """``session_id`` (the default): the id itself, where the gateway takes it. ``digest``: always a
    digest."""

    secret: str | None = option(values.secret, None, hidden="any")
    """Keys the digest, for ids that are credentials. Only with ``key = "digest"`` or ``pin_by``."""

    prefix: str = option(as_prefix, "")
    """Begins every key, so that jobs which share a gateway stay apart where their ids are the same:
    up to 52 visible ASCII characters, such as ``job-7/``. Default: empty."""

    on_missing: OnMissing = option(values.one_of(get_args(OnMissing)), "pass")
    """What becomes of a call to the gateway that has no session: ``pass`` (the default) lets it go
    unchanged, ``warn`` also logs it, ``raise`` raises ``MissingSessionError`` in the caller."""

    on_late: OnMissing = option(values.one_of(get_args(OnMissing)), "warn")
    """What becomes of a call in a request's session once the request has ended: ``warn`` (the
    default) and ``pass`` keep the key, ``raise`` raises ``MissingSessionError`` in the caller."""

    client_session: tuple[str | web.AppKey[Any], ...] = option(values.app_key, (), several=True)
    """The app keys of the ``ClientSession`` objects to attach to at start-up. A text names a string
    key, or a ``web.AppKey`` by its name with or without the module. Default: none."""

    instrument: bool = option(values.boolean, False)
    """Attach to every ``ClientSession`` that the process makes while the app runs, whoever makes
    it, and to those that the app keeps already. Default: false."""

    json_max_size: int = option(values.count, JSON_MAX_SIZE)
    """The bytes of a JSON body that are read for a ``json:`` source or ``peek_json()``; a longer
    body has no session. The app's ``client_max_size`` does not matter. Default: 16 MiB."""

    track_sessions: int = option(values.count, 100_000)
    """How many sessions the ledger keeps, each with up to 64 pins: those that called last. 0
    switches the ledger off. Default: 100,000."""

    on_move: Callable[[Any], object] | None = option(values.function, None)
    """A function that is called with each ``Move``, without a lock; what it raises is logged once.
    Default: none."""

    metrics: Literal["prometheus"] | None = option(values.metrics_kind, None)
    """``prometheus`` keeps the ledger's counts as metrics; needs the extra ``metrics``. Default:
    none."""

    metrics_registry: Any = option(values.registry, None)
    """The ``prometheus_client.CollectorRegistry`` that takes the metrics. Default: that of
    prometheus-client."""

    hide_worker_ids: bool = option(values.boolean, False)
    """Take the header that names the worker off the answers to agents. A body can name a worker all
    the same. Default: false."""

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
        """Return what is wrong with values that are right each by itself."""
        if not self.gateway:
            yield "gateway", "is required: the URL of the gateway, such as 'http://10.0.0.1:30000'"
        if not self.session_id:
            yield "session_id", "is empty: name at least one source"
        if not self.paths:
            yield "paths", "is empty: name at least one path"
        for text, head, path in values.overlaps(self.gateway, self.paths):
            right = f"write {text.removesuffix(head)!r}"
            yield "gateway", f"{text!r} ends in {head!r}, and so begins the path {path!r}: {right}"
        is_plain = self.key == "session_id" and ("pin_by" in wrong or self.pin_by.is_session)
        if self.secret is not None and is_plain:
            yield "secret", "is used with key = 'digest' or pin_by only, and there is neither"
        if self.metrics and not self.track_sessions:
            yield "metrics", "come from the ledger, and track_sessions = 0 switches it off"

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> "RoutingConfig":
        """Build a config from the table that an app's YAML, TOML or JSON config has for it.

        Raises ``ConfigError`` with every fault; an unknown option with the one that is near.

        >>> RoutingConfig.from_mapping({"gateway": "http://10.0.0.1:30000", "enabled": "yes"})
        """
        if not isinstance(mapping, Mapping):
            raise ConfigError(  # it may hold a secret: its type alone is shown
                [("config", f"is a {type(mapping).__name__}, not a RoutingConfig or a mapping")]
            )
        if table := values.table_in(mapping):
            raise ConfigError([("config", f"is the whole file: pass its table, config{table}")])
        return cls(**{str(name): value for name, value in mapping.items()})

    @classmethod
    def from_env(
        cls, prefix: str = "SMG_ROUTING_", environ: Mapping[str, str] | None = None
    ) -> "RoutingConfig":
        """Build a config from environment variables such as ``SMG_ROUTING_GATEWAY``.

        ``environ`` is ``os.environ`` unless given. An empty variable counts as not set, but for an
        empty secret. Raises ``ConfigError`` with every fault. A variable that is no option is a
        fault where its name is near that of one; else it is logged, since it may not be ours:
        Kubernetes sets ``SMG_ROUTING_PORT`` for a service called ``smg-routing``.

        >>> RoutingConfig.from_env(environ={"SMG_ROUTING_GATEWAY": "http://10.0.0.1:30000"})
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
        """Return the key that ``session_id`` has under this config, where it alone is pinned."""
        return routing_key(session_id, key=self.key, secret=self.secret, prefix=self.prefix)

    def name_and_key(self, session_id: str, parts: Mapping[str, str | None]) -> tuple[str, str]:
        """Return how ledger and logs name a session, and its key.

        The id has been through ``as_session_id()``; ``parts`` are what those of ``pin_by`` found.
        """
        name = session_key(session_id, self.key, self.secret, self.prefix)
        if self.pin_by.is_session:
            return name, name
        found = [
            session_id if part == SESSION_ID else parts.get(part) for part in self.pin_by.sources
        ]
        shared = [part for part in found if part is not None]
        if len(shared) < len(found):
            return name, name
        return name, shared_key(self.pin_by.template, shared, self.secret, self.prefix)


OPTIONS: Mapping[str, values.Option] = {
    it.name: it.metadata["option"] for it in fields(RoutingConfig)
}


def as_config(config: RoutingConfig | Mapping[str, Any]) -> RoutingConfig:
    """Return ``config``, built by ``from_mapping()`` where it is a mapping."""
    return config if isinstance(config, RoutingConfig) else RoutingConfig.from_mapping(config)


def _near(name: str) -> list[str]:
    return difflib.get_close_matches(name.lower(), OPTIONS, n=1, cutoff=0.75)


def _unknown(options: Iterable[str]) -> list[tuple[str, str]]:
    return [
        (name, "; ".join(["unknown option", *(f"the nearest one is {it!r}" for it in _near(name))]))
        for name in options
        if name not in OPTIONS
    ]
