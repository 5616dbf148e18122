"""Pin each session of an aiohttp session server to one worker behind an SMG gateway.

A session id, found in the request, becomes a key; the key rides in the context; the hook puts it on
the call; the ledger sees where it went.

PYTEST_DONT_REWRITE: pytest, which loads the fixtures from here, is not to warn that it comes late.
"""

from .config import ConfigError, RoutingConfig
from .context import SessionIdFilter, current_session_id, in_session, routing_session
from .gateway import ROUTING_KEY_HEADER
from .keys import routing_key
from .ledger import PinLedger
from .metrics import Move, PinSummary, SessionPin
from .plugin import ROUTING, Routing, setup
from .rules import MissingSessionError
from .sources import peek_json

__version__ = "0.1.0"

__all__ = (
    "ROUTING",
    "ROUTING_KEY_HEADER",
    "ConfigError",
    "MissingSessionError",
    "Move",
    "PinLedger",
    "PinSummary",
    "Routing",
    "RoutingConfig",
    "SessionIdFilter",
    "SessionPin",
    "current_session_id",
    "in_session",
    "peek_json",
    "routing_key",
    "routing_session",
    "setup",
)
