"""The laws that hold for any input. The property tests ask them too."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any
from urllib.parse import urlsplit

from multidict import CIMultiDict
from yarl import URL

from aiohttp_smg_routing import ConfigError, RoutingConfig, routing_key, routing_session
from aiohttp_smg_routing.call import begin
from aiohttp_smg_routing.values import several

ROUTING_HEADERS = ("X-SMG-Routing-Key", "X-SMG-Target-Worker")
CONFIG = RoutingConfig("http://gw.example/base")
#: Where it stands in a config a credential may stand.
HIDDEN = "hush-7f3a"


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
        law(given.startswith(prefix), one, other, form, keys)
        law(1 <= len(given) <= 128, one, other, form, keys)
        law(all("!" <= character <= "~" for character in given), one, other, form, keys)
    law(routing_key(one, **form) == keys[0], one, form)
    law((keys[0] == keys[1]) == (one == other), one, other, form, keys)
    # Of all ids the key itself, as a client may have read it, is the nearest to a second one.
    copied = keys[0][len(prefix) :]
    law(copied == one or routing_key(copied, **form) != keys[0], one, form, keys)


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
    urls = [URL(url) for url in several(made.gateway)]
    is_plain = any(HIDDEN in f"{url.raw_host}{url.raw_path}" for url in urls)  # no credential
    law(is_plain or HIDDEN not in repr(made), mapping)
    values = {field.name: getattr(made, field.name) for field in fields(made) if field.init}
    for again in (RoutingConfig.from_mapping(mapping), RoutingConfig(**values)):
        law(again == made and hash(again) == hash(made), mapping)
    for url in (URL("http://gw"), URL("http://gw/")):
        law(not made.tags("POST", url), mapping)


def matcher(method: str, url: URL, session_id: str, headers: Sequence[tuple[str, str]]) -> None:
    """Ask that a call to the gateway has one key, and that no other call is tagged."""
    tagged = CONFIG.tags(method, url)
    text = str(url)
    try:
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
    if tagged:
        _one_key(method, url, session_id, headers)


def _one_key(method: str, url: URL, session_id: str, headers: Sequence[tuple[str, str]]) -> None:
    sent = CIMultiDict(headers)
    with routing_session(session_id):
        begin(CONFIG, None, method, url, sent)
    law(sent.getall(ROUTING_HEADERS[0]) == [routing_key(session_id)], session_id, headers)
    law(ROUTING_HEADERS[1] not in sent, headers)
    others = [pair for pair in CIMultiDict(headers).items() if not _routes(pair[0])]
    law([pair for pair in sent.items() if not _routes(pair[0])] == others, headers)


def _routes(name: str) -> bool:
    return name.lower() in map(str.lower, ROUTING_HEADERS)
