"""Pin each session of an aiohttp session server to one worker behind an SMG gateway.

The middleware finds the session id in a request and turns it into a routing key. The key rides in
the context, and the hook puts it on the call. The ledger records which worker answered.

What ``__all__`` lists is public, here, in ``aiohttp_smg_routing.testing`` and in
``aiohttp_smg_routing.run``. All else is private.

PYTEST_DONT_REWRITE: pytest rewrites the asserts of a distribution that has a plugin, and would warn
if the package is already imported.
"""

from .config import ConfigError, RoutingConfig
from .context import SessionIdFilter, current_session_id, in_session, routing_session
from .gateway import ROUTING_KEY_HEADER
from .keys import routing_key
from .ledger import PinLedger
from .pins import Move, PinSummary, SessionPin
from .plugin import ROUTING, Routing, setup
from .rules import MissingSessionError
from .sources import PinBy, peek_json

__version__ = "0.1.0"

__all__ = (
    "ROUTING",
    "ROUTING_KEY_HEADER",
    "ConfigError",
    "MissingSessionError",
    "Move",
    "PinBy",
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
