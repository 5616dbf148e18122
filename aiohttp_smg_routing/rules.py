"""Decides which calls carry a key, and whose key; explains why a call carries none."""

import logging
from collections import Counter
from typing import Any

from aiohttp import hdrs
from multidict import CIMultiDict, istr
from yarl import URL

from .config import ConfigError, RoutingConfig, name_and_key
from .context import Owner, Scope, current_scope, current_session_id, session_scope
from .gateway import (
    ROUTING_KEY_HEADER,
    TARGET_WORKER_HEADER,
    difference,
    host_of,
    keep_past_proxies,
    origin,
    server_of,
)
from .ledger import PendingCall, PinLedger
from .log import Capped, Once, running_code, say
from .sources import named_sources

logger: logging.Logger = logging.getLogger(__name__)

#: This many in a row are no accident. "missing": calls without a session. "unmatched" and "stray":
#: near misses, in a session and outside one. "idle" and "sessionless": requests without a call.
NOTICED = {"missing": 20, "unmatched": 20, "stray": 20, "idle": 50, "sessionless": 1000}
NOTICED_LATER = 1000  # of each kind, once a call has carried a key


class MissingSessionError(LookupError):
    """A call has no session, or a late one, and ``on_missing`` or ``on_late`` is ``raise``."""


class Rules(Owner):
    """A config and its ledger, as rules: which calls carry a key, and what to note about them."""

    def __init__(self, config: RoutingConfig, pins: PinLedger) -> None:
        self.config: RoutingConfig = config
        self.pins: PinLedger = pins
        self.header: istr = istr(config.header)  # saves multidict the lower-casing
        places = _places(config)
        # Keyed by parts of the URL's text, because yarl computes host and port on each access.
        self.exact: dict[tuple[str, str, str, str], str] = {
            (hdrs.METH_POST, url.scheme, url.raw_authority, path): str(url) for url, path in places
        }
        self._normalized = {(server_of(url), path): str(url) for url, path in places}
        self._paths = frozenset(path for _, path in places)
        self._segments = frozenset(segment for path in self._paths for segment in path.split("/"))
        self._hosts = frozenset(host_of(url) for url, _ in places)
        names = [path.lower().split("/")[1:] for path in config.paths]
        self._tails = tuple("/" + "/".join(its[1:] or its) for its in names)  # without "/v1"
        self._has_tagged, self._runs = False, Counter[str]()
        # A memory for each kind of line, so that many lines of one do not silence the others.
        self._once = {what: Once() for what in (*NOTICED, "late", "redirected")}
        ignored = ", or one of ignore_ids," if config.ignore_ids else ""
        self._found = f"{named_sources(config.session_id)} found none{ignored} in route"
        hint = "no source of session_id finds one, or the calls are made outside a request"
        self.missing_log: Capped = Capped(logger, "calls without a session", hint)
        hint = "gateway or paths may be wrong, or other services are called"
        self.unmatched_log: Capped = Capped(logger, "URLs that resemble the gateway's", hint)

    def gateway_of(self, method: str, url: URL) -> str | None:
        """Return the gateway of a call that carries a key; None for any other call."""
        # aiohttp before 3.14 passes on the method as given, and any version an encoded URL.
        if url.raw_path not in self._paths or method.upper() != hdrs.METH_POST:
            return None
        return self._normalized.get((server_of(url), url.raw_path))

    def begin(self, gateway: str, method: str, url: URL, headers: CIMultiDict[str]) -> PendingCall:
        """Put the key on the ``headers`` of a call to ``gateway``, if the call has a session.

        Raises ``MissingSessionError`` if the config asks for it.
        """
        scope = current_scope()
        if scope is not None and scope.owner is self and scope.key:  # nearly every call
            owner, name, key = self, scope.name, scope.key
        else:
            owner, scope = self._whose(method, url)
            gateway = owner.gateway_of(method, url) or gateway
            name, key = owner._name_and_key(scope)
        if not key or scope is None:
            owner._note_missing(method, url, scope)
            return PendingCall(owner.pins, "", "", gateway, "")
        if scope.task is not None:
            task = scope.task()  # nearly always it still runs
            if (task is None or task.done()) and scope.is_late():
                owner._note_late(method, url)
        owner._has_tagged = scope.has_called = True
        if owner._runs:
            owner._runs.clear()
        if scope.outer is not None or scope.around is not None:
            scope.called()
        # Headers that a client sent and a naive proxy copied must not choose the worker. The
        # gateway takes the first of two keys, and the index of a worker outranks both.
        headers.popall(ROUTING_KEY_HEADER, None)
        headers.popall(TARGET_WORKER_HEADER, None)
        header = owner.header
        headers[header] = key
        if hdrs.CONNECTION in headers:
            keep_past_proxies(headers, header)
        if logger.isEnabledFor(logging.DEBUG):
            say(logger, logging.DEBUG, "%s carries the key of %s", self._shown(method, url), name)
        return PendingCall(owner.pins, header, name, gateway, key)

    def _whose(self, method: str, url: URL) -> "tuple[Rules, Scope | None]":
        """Return whose rules decide, and the innermost scope whose session may go there, or None.

        An app's session goes only to that app's gateways. A ``routing_session()`` goes anywhere:
        the rules of the app around it decide if they know the call, otherwise the hook's rules.
        """
        sessionless: tuple[Rules, Scope | None] | None = None
        scope = current_scope()
        while scope is not None:
            owner = scope.owner
            if not isinstance(owner, Rules) or owner.gateway_of(method, url) is None:
                owner = self if scope.is_block else None
            if owner is not None:
                if scope.session_id is not None:
                    return owner, scope
                sessionless = sessionless or (owner, scope)
            scope = scope.outer
        return sessionless or (self, None)

    def _name_and_key(self, scope: Scope | None) -> tuple[str, str]:
        if scope is None or scope.session_id is None or scope.session_id in self.config.ignore_ids:
            return "", ""
        if scope.owner is self:
            return scope.name, scope.key
        return name_and_key(self.config, scope.session_id, scope.parts)

    def _note_missing(self, method: str, url: URL, scope: Scope | None) -> None:
        self.pins.count("missing")
        if (innermost := current_scope()) is not None:
            innermost.called()
        if not (is_noticed := self._is_noticed("missing")) and self.config.on_missing == "pass":
            return
        if scope is not None and scope.route:
            why, remedy = f"{self._found} {scope.route}", "Correct session_id"
        elif scope is not None and scope.is_block:
            why, remedy = "its routing_session() has none, or an ignored one", "Pass it the id"
        else:
            why = f"it is made by {running_code()}, outside the requests of the app"
            remedy = (
                "Make it within routing_session(...) or with in_session(...); run a thread in "
                "copy_context(); or call setup() on the app that serves sessions"
            )
        problem = f"{self._shown(method, url)} has no session: {why}"
        if is_noticed:
            message = "%d calls to the gateway, and none had a session. %s. %s."
            say(logger, logging.WARNING, message, self._runs["missing"], problem, remedy)
        if self.config.on_missing == "raise":
            raise MissingSessionError(f"{problem}. {remedy}, or set on_missing = 'pass'")
        if self.config.on_missing == "warn":
            self.missing_log.warn("%s; the gateway may route it to any worker", problem)

    def _note_late(self, method: str, url: URL) -> None:
        self.pins.count("late")
        if self.config.on_late == "pass":
            return
        code, call = running_code(), self._shown(method, url)
        problem = (
            f"{call} is made by {code} in the session of a request that has ended. If that code "
            "serves other sessions too, start it when the app starts; if it is a job of this "
            "session, make it with in_session(...) or within routing_session(...)"
        )
        if self.config.on_late == "raise":
            raise MissingSessionError(problem)
        if self._once["late"].is_new(code):
            say(logger, logging.WARNING, "%s. This is logged once for that code.", problem)

    def note_unmatched(self, method: str, url: URL) -> None:
        """Note a POST that no hook tags, if it has a session and resembles a call to a gateway."""
        scope = session_scope()
        if scope is None:  # then there are two faults, and each hides the other
            if not self._has_tagged and self._is_near(url) and self._is_noticed("stray"):
                message = "%s. It has no session either: see session_id."
                say(logger, logging.WARNING, message, self.explain(method, url))
            return
        rules = self._rules_of(scope)
        if rules.gateway_of(method, url) is not None or rules._is_near(url):
            rules.pins.count("unmatched")
            if not rules._has_tagged:
                rules._runs["idle"] = 0
                scope.called()
            if rules._is_noticed("unmatched", self._shown(method, url)):
                rules.unmatched_log.warn("%s", rules._why_not(method, url))
                return
        if logger.isEnabledFor(logging.DEBUG):
            say(logger, logging.DEBUG, "%s", rules._why_not(method, url))

    def note_redirected(self, method: str, url: URL, to: URL) -> None:
        """Log a redirect that the key does not follow, once for each origin."""
        rules = self._rules_of(session_scope())
        if rules._once["redirected"].is_new(origin(to)):
            message = "%s is redirected, and the key does not follow: %s"
            why = rules._why_not(method, to)
            say(logger, logging.WARNING, message, self._shown(method, url), why)

    def _rules_of(self, scope: Scope | None) -> "Rules":
        return scope.owner if scope and isinstance(scope.owner, Rules) else self

    def _why_not(self, method: str, url: URL) -> str:
        if self.gateway_of(method, url) is None:
            return self.explain(method, url)
        why = (
            "its client has no hook of this app: name a ClientSession in client_session, pass "
            "httpx_hooks() to an httpx client, or set instrument = true"
        )
        return f"{self._shown(method, url)} goes out without a key: {why}"

    def note_request(self, method: str, scope: Scope) -> None:
        """Note a request that ended before a call to the gateway was seen."""
        what = "sessionless" if scope.session_id is None else "idle"
        is_known = self._has_tagged if what == "sessionless" else self._runs["missing"] > 0
        if is_known or method != hdrs.METH_POST or not self._is_noticed(what):
            return
        if scope.session_id is None:
            message = "%d POST requests, and no session: %s %s. Correct session_id."
            say(logger, logging.WARNING, message, self._runs[what], self._found, scope.route)
            return
        why = (
            "was made before the app started (use routing.attach(session))"
            if self.config.instrument
            else "has no hook (name its app key in client_session, or pass "
            "trace_configs=[routing.trace_config()]); or it was made later, or the call is made by "
            "httpx, as in OpenAI's SDK (set instrument = true)"
        )
        message = (
            "%d POST requests in a row had a session, and ended before a call to the gateway was "
            "seen. If they call it: their ClientSession %s; or gateway and paths name another URL "
            "(see routing.explain()); or neither aiohttp nor httpx calls"
        )
        say(logger, logging.WARNING, message, self._runs[what], why)

    def _is_noticed(self, what: str, where: str = "") -> bool:
        """Count one more; tell whether there are now enough to log, and none was logged yet."""
        self._runs[what] += 1
        is_run = self._runs[what] >= (NOTICED_LATER if self._has_tagged else NOTICED[what])
        return is_run and self._once[what].is_new((where, self._has_tagged))

    def _is_near(self, url: URL) -> bool:
        return host_of(url) in self._hosts or url.raw_path.rstrip("/").lower().endswith(self._tails)

    def explain(self, method: str, url: URL) -> str:
        """Return a sentence: the call carries a key, or why it does not and what to change."""
        if self.gateway_of(method, url):
            return f"{self._shown(method, url)} carries {self.config.header}, if it has a session"
        why = "only a POST carries one" if self.config.enabled else "enabled is false"
        if self.config.enabled and method.upper() == hdrs.METH_POST:
            why = self._difference(self._without_session_id(url))
        return f"{self._shown(method, url)} goes out without a key: {why}"

    def _difference(self, url: URL) -> str:
        """Say how a URL differs from a call to a gateway, and what to add if that helps."""
        said, option, value = difference(url, self.config.gateway, self.config.paths)
        if "{session_id}" in value:
            return f"{said}; leave the session id out of the path"
        if not option:
            return said
        options: dict[str, Any] = {"gateway": self.config.gateway, "paths": self.config.paths}
        options[option] += (value,)
        try:
            places = _places(RoutingConfig(**options))
        except ConfigError:
            return said
        call = server_of(url), url.raw_path
        helped = any((server_of(gateway), path) == call for gateway, path in places)
        condition = "it is to be pinned" if option == "paths" else "that is a gateway"
        return f"{said}; if {condition}, add {value} to {option}" if helped else said

    def _shown(self, method: str, url: URL) -> str:
        return f"{method} {origin(url)}{self._without_session_id(url).raw_path}"

    def _without_session_id(self, url: URL) -> URL:
        """Return a URL to be shown: the id of the session that makes the call may be a credential.

        An agent may choose an id such as ``v1``, which every path has.
        """
        session_id = current_session_id()
        if session_id not in url.parts or session_id in self._segments:
            return url
        parts = zip(url.parts, url.raw_parts, strict=True)
        shown = ["{session_id}" if part == session_id else raw for part, raw in parts]
        return url.with_path("/" + "/".join(shown[1:]), encoded=True)


def _places(config: RoutingConfig) -> list[tuple[URL, str]]:
    """Return the gateway and the path of each call that a config names."""
    return [
        (gateway, gateway.raw_path.rstrip("/") + path)
        for gateway in (config.gateway if config.enabled else ())
        for path in config.paths
    ]
