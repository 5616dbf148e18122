"""The laws that hold for any input. The property tests ask them too."""

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
CHAT = URL("http://gw.example/base/v1/chat/completions")
#: The name of the session id in a ``pin_by``.
SESSION_ID = "session_id"
#: It marks where a config may hold a credential. Hypothesis tries each string of the code, also as
#: the name of an option, which an error has to show. So the code does not contain it whole.
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


#: The session whose calls the hook sees. It is closed: no call of it goes out.
SESSION = _closed_session()


class LawError(AssertionError):
    """A law does not hold; the message has the input."""


def law(holds: bool, *shown: object) -> None:
    """Raise where a law does not hold: an ``assert`` would be gone under ``python -O``."""
    if not holds:
        raise LawError(ascii(shown))


def key(one: str, other: str, form: Mapping[str, Any]) -> None:
    """Ask that a key is 1 to 128 visible ASCII bytes, and that of one id alone."""
    keys = [routing_key(session_id, **form) for session_id in (one, other)]
    prefix = form.get("prefix", "")
    for given in keys:
        _good_key(given, prefix, one, other, form)
    law(routing_key(one, **form) == keys[0], one, form)
    law((keys[0] == keys[1]) == (one == other), one, other, form, keys)
    # Of all ids the key itself, as a client may have read it, is the nearest to a second one.
    copied = keys[0][len(prefix) :]
    law(copied == one or routing_key(copied, **form) != keys[0], one, form, keys)


def _good_key(given: str, *shown: Any) -> None:
    prefix = shown[0]
    law(given.startswith(prefix), given, *shown)
    law(1 <= len(given) <= 128, given, *shown)
    law(all("!" <= character <= "~" for character in given), given, *shown)


@dataclass(frozen=True, slots=True)
class Shared:
    """What shares a worker: a ``pin_by``, the session, and what the sources in it found."""

    pin_by: str
    session_id: str
    found: Mapping[str, str | None]

    def key(self, form: Mapping[str, Any]) -> str:
        """Return the key that a call carries."""
        form = {"key": "digest", **form} if self.pin_by == "{session_id}" else form
        routing = Routing(RoutingConfig("http://gw.example/base", pin_by=self.pin_by, **form))
        with routing_session(self.session_id, self.found):
            return sent(routing, "POST", CHAT).getone(ROUTING_HEADERS[0])

    def meaning(self, names: Sequence[str]) -> tuple[object, ...]:
        """Return what is the same where the key is; ``names`` are the sources in ``pin_by``."""
        found = [self.session_id if it == SESSION_ID else self.found.get(it) for it in names]
        if self.pin_by == "{session_id}" or not all(it and it.strip() for it in found):
            return (SESSION_ID, self.session_id)
        return ("shared", self.pin_by, *found)


def shared(one: Shared, other: Shared, names: Sequence[Sequence[str]], form: Any) -> None:
    """Ask that no two combinations share a key, and none that of a session id.

    ``names`` are the sources in the ``pin_by`` of both, and ``form`` is what their configs say of
    the key.
    """
    keys = [one.key(form), other.key(form)]
    for given in keys:
        _good_key(given, form.get("prefix", ""), one, other, form)
    law(one.key(form) == keys[0], one, form)
    meant = [it.meaning(its) for it, its in zip((one, other), names, strict=True)]
    law((keys[0] == keys[1]) == (meant[0] == meant[1]), one, other, form, keys)
    # The ids that are the nearest: what the parts spell, and the key as a client may have read it.
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
    """Ask that a mapping gives faults, or a config that is made again of its own values.

    Neither shows what may be a credential.
    """
    try:
        made = RoutingConfig.from_mapping(mapping)
    except ConfigError as error:
        law(bool(error.faults and str(error)), mapping)
        law(HIDDEN not in str(error), mapping)
        return
    # A host or a path is no credential.
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
    """Ask that a call to the gateway has one key, and that no other call is tagged."""
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
    # urlsplit() takes no notice of some characters, and of a port 0.
    if text.isprintable() and " " not in text and read.port != 0:
        law(tagged == meant, method, url)
    law(meant or not tagged, method, url)


def carries(routing: Routing, method: str, url: URL) -> bool:
    """Tell whether the plugin says that such a call carries a key."""
    return f" carries {routing.config.header}," in routing.explain(method, url)


def sent(
    routing: Routing, method: str, url: URL, headers: Sequence[tuple[str, str]] = ()
) -> "CIMultiDict[str]":
    """Return the headers of a call as the hook lets it go."""
    hook, going = routing.trace_config(), CIMultiDict(headers)
    hook.freeze()
    start = TraceRequestStartParams(method, url, going)
    # A loop would take longer than all the rest.
    done(hook.on_request_start.send(SESSION, SimpleNamespace(), start))
    return going


def _routes(name: str) -> bool:
    return name.lower() in map(str.lower, ROUTING_HEADERS)
