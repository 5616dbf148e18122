"""The session stands on log records."""

import logging
from collections.abc import Mapping
from typing import Any

from .config import RoutingConfig, as_config
from .context import current_scope
from .key import routing_key


class SessionIdFilter(logging.Filter):
    """Puts the session of the running code on each log record as ``record.session_id``.

    It is the session's routing key: the id itself, unless that goes out as a digest. So a line of
    this log is found again in the gateway's, holds no line break that an agent sent, and shows no
    credential where ``key = "digest"``. Pass the ``config`` where ``routing_session()`` sets ids
    that are credentials. Without a session it is ``-``.

    >>> handler.addFilter(SessionIdFilter())
    >>> handler.setFormatter(logging.Formatter("%(session_id)s %(message)s"))
    """

    def __init__(self, config: RoutingConfig | Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self._config = None if config is None else as_config(config)

    def filter(self, record: logging.LogRecord) -> bool:
        """Put the session on ``record`` and let it pass."""
        scope = current_scope()
        if scope is None or scope.session_id is None:
            record.session_id = "-"
        else:
            config = scope.config or (scope.pins.config if scope.pins else self._config)
            key_of = config.routing_key if config else routing_key
            record.session_id = key_of(scope.session_id)
        return True
