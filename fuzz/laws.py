"""The laws that hold for any input. The property tests check them too."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

from aiohttp import ClientSession, TraceRequestStartParams
from multidict import CIMultiDict
from yarl import URL

from aiohttp_smg_routing import ConfigError, Routing, RoutingConfig, routing_key, routing_session
from harness.hook import done

ROUTING_HEADERS = ("X-SMG-Routing-Key", "X-SMG-Target-Worker")
ROUTING = Routing({"gateway": "http://gw.example/base"})
CHAT_URL = URL("http://gw.example/base/v1/chat/completions")
#: The name of the session id in a ``pin_by``.
SESSION_ID = "session_id"
#: It marks where a config may hold a credential. It is in two parts, because Hypothesis tries each
#: string of the code, even as the name of an option, which an error must show.
HIDDEN = "-".join(("hush", "7f3a"))


def _closed_session() -> ClientSession:
    async def make() -> ClientSession:
        async with ClientSession() as session:
            return session

    loop = asyncio.new_event_loop()
    try:
        return loop.run_until_complete(make())
    finally:
        loop.close()


#: The hook sees calls of this ClientSession. It is closed, so that no call goes out.
SESSION = _closed_session()


class LawError(AssertionError):
    """A law doesn't hold; the message has the input."""


def law(holds: bool, *shown: object) -> None:
    """Raise if a law doesn't hold, even under ``python -O``, which removes ``assert``."""
    if not holds:
        raise LawError(ascii(shown))


def key(one: str, other: str, form: Mapping[str, Any]) -> None:
    """Check that a key has 1 to 128 visible ASCII bytes, and belongs to one id only."""
    keys = [routing_key(session_id, **form) for session_id in (one, other)]
    prefix = form.get("prefix", "")
    for given in keys:
        _good_key(given, prefix, one, other, form)
    law(routing_key(one, **form) == keys[0], one, form)
    law((keys[0] == keys[1]) == (one == other), one, other, form, keys)
    # The key itself, which a client may have read, is the likeliest id to have the same key.
    copied = keys[0][len(prefix) :]
    law(copied == one or routing_key(copied, **form) != keys[0], one, form, keys)


def _good_key(given: str, *shown: Any) -> None:
    prefix = shown[0]
    law(given.startswith(prefix), given, *shown)
    law(1 <= len(given) <= 128, given, *shown)
    law(all("!" <= character <= "~" for character in given), given, *shown)


@dataclass(frozen=True, slots=True)
class Shared:
    """A combination that shares a worker: a ``pin_by``, a session, and what its sources found."""

    pin_by: str
    session_id: str
    found: Mapping[str, str | None]

    def key(self, form: Mapping[str, Any]) -> str:
        """Return the key that a call carries."""
        form = {"key": "digest", **form} if self.pin_by == "{session_id}" else form
        routing = Routing(RoutingConfig("http://gw.example/base", pin_by=self.pin_by, **form))
        with routing_session(self.session_id, self.found):
            return sent(routing, "POST", CHAT_URL).getone(ROUTING_HEADERS[0])

    def meaning(self, names: Sequence[str]) -> tuple[object, ...]:
        """Return a value that is equal if the keys must be; ``names`` are the sources."""
        found = [self.session_id if it == SESSION_ID else self.found.get(it) for it in names]
        if self.pin_by == "{session_id}" or not all(it and it.strip() for it in found):
            return (SESSION_ID, self.session_id)
        return ("shared", self.pin_by, *found)


def shared(one: Shared, other: Shared, names: Sequence[Sequence[str]], form: Any) -> None:
    """Check that no two combinations share a key, and that none has the key of a session id.

    ``names`` are the sources in the ``pin_by`` of each, and ``form`` has the options of the key in
    their configs.
    """
    keys = [one.key(form), other.key(form)]
    for given in keys:
        _good_key(given, form.get("prefix", ""), one, other, form)
    law(one.key(form) == keys[0], one, form)
    meant = [it.meaning(its) for it, its in zip((one, other), names, strict=True)]
    law((keys[0] == keys[1]) == (meant[0] == meant[1]), one, other, form, keys)
    # The likeliest ids to share the key: the parts put together, and the key itself.
    ids = {*one.found.values(), one.pin_by, keys[0], keys[0][len(form.get("prefix", "")) :]}
    spelled = one.pin_by
    for name in names[0]:
        spelled = spelled.replace(f"{{{name}}}", str(one.found.get(name, one.session_id)))
    texts = [one.pin_by, *(one.found.get(name, one.session_id) or "" for name in names[0])]
    lengths = "".join(f"{len(it.encode('utf-8', 'surrogatepass'))}:{it}" for it in texts)
    for near in {*ids, spelled, lengths}:
        if near and near.strip() and meant[0] != (SESSION_ID, near):
            law(routing_key(near, **form) != keys[0], near, one, form, keys)


def config(mapping: Mapping[str, Any]) -> None:
    """Check that a mapping has faults, or makes a config that its own values make again.

    Neither may show a credential.
    """
    try:
        made = RoutingConfig.from_mapping(mapping)
    except ConfigError as error:
        law(bool(error.faults and str(error)), mapping)
        law(HIDDEN not in str(error), mapping)
        return
    # A host or a path is not a credential.
    is_plain = any(HIDDEN in f"{url.raw_host}{url.raw_path}" for url in made.gateway)
    law(is_plain or HIDDEN not in repr(made), mapping)
    values = {field.name: getattr(made, field.name) for field in fields(made)}
    for again in (RoutingConfig.from_mapping(mapping), RoutingConfig(**values), replace(made)):
        law(again == made and hash(again) == hash(made), mapping)
    routing = Routing(replace(made, metrics=None, metrics_registry=None))
    for url in (URL("http://gw"), URL("http://gw/")):
        law(not carries(routing, "POST", url), mapping)
    for gateway in made.gateway:
        for path in made.paths:
            url = URL(f"{gateway}{path}", encoded=True)
            law(carries(routing, "POST", url) == made.enabled, mapping)


def matcher(method: str, url: URL, session_id: str, headers: Sequence[tuple[str, str]]) -> None:
    """Check that a call to the gateway has one key, and that no other call is tagged."""
    tagged, explained = carries(ROUTING, method, url), ROUTING.explain(method, url)
    law((" goes out without a key: " in explained) != tagged, method, url, explained)
    with routing_session(session_id):
        arrived = sent(ROUTING, method, url, headers)
    if tagged:
        law(arrived.getall(ROUTING_HEADERS[0]) == [routing_key(session_id)], session_id, headers)
        law(ROUTING_HEADERS[1] not in arrived, headers)
        others = [pair for pair in CIMultiDict(headers).items() if not _routes(pair[0])]
        law([pair for pair in arrived.items() if not _routes(pair[0])] == others, headers)
    else:
        law([*arrived.items()] == [*CIMultiDict(headers).items()], method, url, headers)
    try:
        text = str(url)
        read = urlsplit(text)
        there = (read.scheme, read.hostname, read.port or 80, read.path)
    except ValueError:
        law(not tagged, method, url)
        return
    meant = method.upper() == "POST" and there == (
        *("http", "gw.example", 80),
        "/base/v1/chat/completions",
    )
    # urlsplit() ignores some characters and a port 0.
    if text.isprintable() and " " not in text and read.port != 0:
        law(tagged == meant, method, url)
    law(meant or not tagged, method, url)


def carries(routing: Routing, method: str, url: URL) -> bool:
    """Tell whether the plugin says that a call carries a key."""
    return f" carries {routing.config.header}," in routing.explain(method, url)


def sent(
    routing: Routing, method: str, url: URL, headers: Sequence[tuple[str, str]] = ()
) -> "CIMultiDict[str]":
    """Return the headers of a call after the hook."""
    hook, going = routing.trace_config(), CIMultiDict(headers)
    hook.freeze()
    start = TraceRequestStartParams(method, url, going)
    # An event loop would take longer than the rest.
    done(hook.on_request_start.send(SESSION, SimpleNamespace(), start))
    return going


def _routes(name: str) -> bool:
    return name.lower() in map(str.lower, ROUTING_HEADERS)
