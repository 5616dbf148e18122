"""A session id becomes a routing key."""

import hashlib
import hmac
import operator
from typing import Literal, SupportsIndex
from uuid import UUID

from .gateway import VALID_KEY

SessionId = str | SupportsIndex | UUID
KeyForm = Literal["session_id", "digest"]


def as_session_id(value: object) -> str | None:
    """Return ``value`` as the text of a session id, or None where it is None, empty or blank.

    Raises ``TypeError`` for what can't be one: anything but a text, an integer or a ``UUID``.
    """
    if isinstance(value, str):
        return str.__str__(value) if value.strip() else None
    if value is None:
        return None
    if isinstance(value, UUID):
        return str(value)
    if isinstance(value, SupportsIndex) and not isinstance(value, bool):
        return str(operator.index(value))
    raise TypeError(f"a session id is a str, an int or a UUID, not a {type(value).__name__}")


def routing_key(
    session_id: SessionId, *, key: KeyForm = "session_id", secret: str | None = None
) -> str:
    """Return the key that the gateway will see for ``session_id``.

    With ``key="session_id"`` an id of 1 to 128 bytes of visible ASCII is its own key. Any other
    id (longer, not ASCII, with spaces or control characters) gives ``sha256-`` and 64 hexadecimal
    digits, because the gateway drops what it does not accept, silently. ``key="digest"`` digests
    every id, as HMAC-SHA256 where there is a ``secret``. An id has the same key on every machine
    and in every process.

    Raises ``ValueError`` for an empty or blank id, ``TypeError`` for what is no id.

    >>> routing_key("task-7")
    'task-7'
    >>> routing_key("task 7")
    'sha256-a39087ee83d1f77b594dbe891c42977bea07d7415ae86119155aa1abec86aee1'
    """
    text = as_session_id(session_id)
    if text is None:
        raise ValueError(f"a session id is not empty or blank, but this is: {session_id!r}")
    return key_of(text, key, secret)


def key_of(text: str, key: KeyForm, secret: str | None) -> str:
    """Return the key of a session whose id has been through ``as_session_id()``."""
    if key == "session_id" and VALID_KEY.fullmatch(text):
        return text
    # A path or a header can hold lone surrogates (bytes that were not UTF-8): they count as well.
    data = text.encode("utf-8", "surrogatepass")
    if secret is None:
        return f"sha256-{hashlib.sha256(data).hexdigest()}"
    digest = hmac.digest(secret.encode("utf-8", "surrogatepass"), data, "sha256")
    return f"hmac-sha256-{digest.hex()}"
