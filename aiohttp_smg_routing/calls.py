"""Which calls are a routing's own, whose key they carry, and why a call is not its own."""

import logging
import sys

from aiohttp import hdrs
from multidict import CIMultiDict, istr
from yarl import URL

from .config import RoutingConfig
from .context import Owner, Scope, current_scope, session_scope
from .gateway import (
    ROUTING_KEY_HEADER,
    TARGET_WORKER_HEADER,
    difference,
    keep_past_proxies,
    origin,
)
from .ledger import Call, PinLedger
from .log import Capped, Once, running_code, say
from .sources import named_sources

logger = logging.getLogger(__name__)

#: So many calls without a session, or near misses, are no accident where no call carried a key.
NOTICED = 20
#: So many POST requests with a session, and no call that they led to, before the first and after.
NOTICED_REQUESTS, NOTICED_REQUESTS_LATER = 50, 1000

_SEE_SESSION_ID = "no source of session_id finds one, or the calls are made outside a request"


class MissingSessionError(LookupError):
    """A call to the gateway has no session, or a late one, and the config asks for an error."""


class Calls(Owner):
    """A config and its ledger: the calls that carry a key, and what is seen of them."""

    def __init__(self, config: RoutingConfig, pins: PinLedger) -> None:
        self.config, self.pins = config, pins
        self.header = istr(config.header)  # saves multidict the lower-casing
        places = [
            (gateway, gateway.raw_path.rstrip("/") + path)
            for gateway in (config.gateway if config.enabled else ())
            for path in config.paths
        ]
        #: The gateway of each call, as nearly all are spelled, and as other spellings mean it. yarl
        #: works out a host and a port anew for each URL, which takes as long as all the rest.
        self.exact = {
            (hdrs.METH_POST, url.scheme, url.raw_authority, path): str(url) for url, path in places
        }
        self._normalized = {
            (url.scheme, url.raw_host, url.port, path): str(url) for url, path in places
        }
        self._paths = frozenset(path for _, path in places)
        self._hosts = frozenset(url.raw_host for url, _ in places)
        names = [path.lower().split("/")[1:] for path in config.paths]
        self._tails = tuple("/" + "/".join(its[1:] or its) for its in names)  # without "/v1"
        self._has_tagged = False
        self.requests, self.noticed_requests = 0, NOTICED_REQUESTS
        self._missing = self._unmatched = 0
        self._once = Once()
        self.missing_log = Capped(logger, "calls without a session", _SEE_SESSION_ID)

    def gateway_of(self, method: str, url: URL) -> str | None:
        """Return the gateway that a call goes to, where it is one that carries a key."""
        # aiohttp before 3.14 shows the method, and any version an encoded URL, as it was passed.
        if url.raw_path not in self._paths or method.upper() != hdrs.METH_POST:
            return None
        try:
            host = (url.raw_host or "").lower()
            return self._normalized.get((url.scheme, host, url.port, url.raw_path))
        except ValueError:  # an encoded URL is read only now: aiohttp is about to refuse it
            return None

    def begin(self, gateway: str, method: str, url: URL, headers: CIMultiDict[str]) -> Call:
        """Put the key on the ``headers`` of a call to ``gateway``, where it has a session.

        Raises ``MissingSessionError`` where the config asks for it.
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
            return Call(owner.pins, "", "", gateway, "")
        if scope.task is not None:
            task = scope.task()  # nearly always it runs yet
            if (task is None or task.done()) and scope.is_late():
                owner._note_late(method, url)
        if not owner._has_tagged:
            owner._has_tagged, owner.noticed_requests = True, NOTICED_REQUESTS_LATER
        owner.requests = 0
        # What a client sent, and a naive proxy copied, must not choose the worker: of two keys the
        # gateway takes the first, and an index of a worker outranks them.
        headers.popall(ROUTING_KEY_HEADER, None)
        headers.popall(TARGET_WORKER_HEADER, None)
        header = owner.header
        headers[header] = key
        if hdrs.CONNECTION in headers:
            keep_past_proxies(headers, header)
        if logger.isEnabledFor(logging.DEBUG):
            say(logger, logging.DEBUG, "%s carries the key of %s", _shown(method, url), name)
        return Call(owner.pins, header, name, gateway, key)

    def _whose(self, method: str, url: URL) -> "tuple[Calls, Scope | None]":
        """Return whose call it is, and the scope with its session, if one has a session.

        It is that of the innermost scope with a session which may go there; a block's may go
        anywhere, and is its app's where that has such calls. Without a session it is that of the
        innermost app that has such calls, or of the hook.
        """
        sessionless: tuple[Calls, Scope | None] | None = None
        scope = current_scope()
        while scope is not None:
            owner = scope.owner
            if not isinstance(owner, Calls) or owner.gateway_of(method, url) is None:
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
        return self.config.name_and_key(scope.session_id, scope.parts)

    def _note_missing(self, method: str, url: URL, scope: Scope | None) -> None:
        self.pins.count("missing")
        self._missing += 1
        is_noticed = self._missing == NOTICED and not self._has_tagged
        if self.config.on_missing == "pass" and not is_noticed:
            return
        where = f"route {scope.route}" if scope and scope.route else running_code()
        sources = named_sources(self.config.session_id)
        problem = f"{_shown(method, url)} has no session: {sources} found none in {where}"
        if is_noticed:
            message = "%d calls to the gateway, and none had a session. %s. Correct session_id."
            say(logger, logging.WARNING, message, NOTICED, problem)
        if self.config.on_missing == "raise":
            raise MissingSessionError(
                f"{problem}. Correct session_id, make the call within routing_session(...), or set "
                "on_missing = 'pass'"
            )
        if self.config.on_missing == "warn":
            self.missing_log.warn("%s; the gateway may route it to any worker", problem)

    def _note_late(self, method: str, url: URL) -> None:
        self.pins.count("late")
        if self.config.on_late == "pass":
            return
        code = running_code()
        problem = (
            f"{_shown(method, url)} is made by {code} in the session of a request that has ended. "
            "If that code serves other sessions too, start it when the app starts; if it is a job "
            "of this session, make it with in_session(...) or within routing_session(...)"
        )
        if self.config.on_late == "raise":
            raise MissingSessionError(problem)
        if self._once.is_new(("late", code)):
            say(logger, logging.WARNING, "%s. This is said once for that code.", problem)

    def note_unmatched(self, method: str, url: URL) -> None:
        """Note a POST that no hook tags, where it has a session and looks like one of ours."""
        scope = session_scope()
        if scope is None:
            return
        calls = scope.owner if isinstance(scope.owner, Calls) else self
        is_own = calls.gateway_of(method, url) is not None
        level = logging.DEBUG
        if is_own or calls._is_near(url):
            calls.pins.count("unmatched")
            calls._unmatched += 1
            calls.requests = 0
            is_noticed = calls._unmatched >= NOTICED and not calls._has_tagged
            if is_noticed and calls._once.is_new(("unmatched", origin(url))):
                level = logging.WARNING
        if logger.isEnabledFor(level):
            said = calls.explain(method, url)
            if is_own:
                said += ", but its ClientSession has no hook of this app: name it in client_session"
            say(logger, level, "%s", said)

    def note_requests(self) -> None:
        """Say once that many POST requests had a session, and led to no call that was seen."""
        count, self.noticed_requests = self.noticed_requests, sys.maxsize
        message = (
            "%d POST requests in a row had a session, and no call to the gateway was seen. If this "
            "server calls the gateway: the ClientSession that calls has no hook (name its app key "
            "in client_session, or pass trace_configs=[routing.trace_config()]); or it was made "
            "later (set instrument = true); or the call is made by httpx and not by aiohttp, as in "
            "OpenAI's SDK unless it is given DefaultAioHttpClient()."
        )
        say(logger, logging.WARNING, message, count)

    def _is_near(self, url: URL) -> bool:
        try:
            host = (url.raw_host or "").lower()
        except ValueError:
            return False
        return url.raw_path.rstrip("/").lower().endswith(self._tails) or host in self._hosts

    def explain(self, method: str, url: str | URL) -> str:
        """Return a sentence: that a call carries a key, or why it does not, and what to change.

        >>> routing.explain("POST", "http://localhost:30000/v1/chat/completions")
        'POST http://localhost:30000/v1/chat/completions goes out without a key: its host is
        localhost, and the gateway is 127.0.0.1; add http://localhost:30000 to gateway'
        """
        url = URL(url)
        if self.gateway_of(method, url):
            return f"{_shown(method, url)} carries {self.config.header}, where it has a session"
        if not self.config.enabled:
            why = "enabled is false"
        elif method.upper() != hdrs.METH_POST:
            why = "only a POST carries one"
        else:
            try:
                why = difference(url, self.config.gateway, self.config.paths)
            except ValueError:  # an encoded URL is read only now: aiohttp is about to refuse it
                why = "its host or port cannot be read"
        return f"{_shown(method, url)} goes out without a key: {why}"


def _shown(method: str, url: URL) -> str:
    return f"{method} {origin(url)}{url.raw_path}"
