"""Pin each session of an aiohttp session server to one worker behind an SMG gateway.

PYTEST_DONT_REWRITE: pytest, which loads the fixtures from here, is not to warn that it comes late.
"""

from .call import MissingSessionError
from .client_middleware import routing_client_middleware
from .config import ConfigError, RoutingConfig
from .context import current_session_id, routing_session
from .gateway import ROUTING_KEY_HEADER
from .hook import attach, routing_trace_config
from .instrument import instrument
from .key import routing_key
from .ledger import Move, PinLedger, PinSummary, SessionPin
from .log import SessionIdFilter
from .middleware import routing_middleware
from .plugin import PINS, ROUTING_CONFIG, setup

__version__ = "0.1.0"

__all__ = (
    "PINS",
    "ROUTING_CONFIG",
    "ROUTING_KEY_HEADER",
    "ConfigError",
    "MissingSessionError",
    "Move",
    "PinLedger",
    "PinSummary",
    "RoutingConfig",
    "SessionIdFilter",
    "SessionPin",
    "attach",
    "current_session_id",
    "instrument",
    "routing_client_middleware",
    "routing_key",
    "routing_middleware",
    "routing_session",
    "routing_trace_config",
    "setup",
)
