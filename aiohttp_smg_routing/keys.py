"""A session id becomes a routing key."""

import hashlib
import hmac
import operator
import re
from collections.abc import Iterable
from typing import Literal, SupportsIndex, get_args
from uuid import UUID

from .gateway import VALID_KEY

SessionId = str | SupportsIndex | UUID
KeyForm = Literal["session_id", "digest"]

#: A prefix must leave room for the longest digest in the 128 bytes of a key.
LONGEST_PREFIX = 128 - len("hmac-sha256-") - 64

# The form of our digests. An id that looks like one is digested too, or it would share the
# key of the session with that digest.
_DIGEST = re.compile(r"(?:hmac-)?sha256-[0-9a-f]{64}")
_SHORTEST_DIGEST = len("sha256-") + 64


def as_session_id(value: object) -> str | None:
    """Return ``value`` as a session id, or None if it is None, empty or blank.

    Raises ``TypeError`` unless it is a string, an integer, a ``UUID`` or None.
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


def as_prefix(value: object) -> str:
    """Return ``value`` if it can begin a routing key; ``ValueError`` says what can."""
    if value == "":
        return ""
    if isinstance(value, str) and len(value) <= LONGEST_PREFIX and VALID_KEY.fullmatch(value):
        return value
    raise ValueError(
        f"is not a string of up to {LONGEST_PREFIX} visible ASCII characters, no spaces"
    )


def as_secret(value: object) -> str | None:
    """Return ``value`` if it can be a secret, or is None; ``ValueError`` says what can."""
    if value is None or (isinstance(value, str) and value):
        return value
    raise ValueError("is not a string of one character or more")


def routing_key(
    session_id: SessionId,
    *,
    key: KeyForm = "session_id",
    secret: str | None = None,
    prefix: str = "",
) -> str:
    """Return the key that the gateway will see for ``session_id``.

    With ``key="session_id"``, an id is its own key if it has 1 to 128 bytes of visible ASCII, with
    the prefix: most versions of SMG silently drop other keys (``docs/gateways.md``). Any other id
    is digested: its key is ``sha256-`` and 64 hexadecimal digits. An id that looks like such a
    digest is digested too, so that no two ids share a key. ``key="digest"`` digests every id. A
    ``secret`` makes each digest an HMAC-SHA256, but an id that is its own key stays readable. The
    key begins with ``prefix``: up to 52 visible ASCII characters, none by default. An id has the
    same key on every machine and in every process.

    Raises ``ValueError`` if the id is None, empty or blank, and for a wrong ``key``, ``secret`` or
    ``prefix``; ``TypeError`` unless the id is a string, integer, ``UUID`` or None.

    >>> routing_key("task-7")
    'task-7'
    >>> routing_key("task 7")
    'sha256-a39087ee83d1f77b594dbe891c42977bea07d7415ae86119155aa1abec86aee1'
    """
    text = as_session_id(session_id)
    if text is None:
        raise ValueError(f"a session id must not be empty or blank: {session_id!r}")
    if key not in get_args(KeyForm):
        raise ValueError(f"key is 'session_id' or 'digest', not {key!r}")
    try:
        secret = as_secret(secret)
    except ValueError as error:  # the value may be a secret, so it is not shown
        raise ValueError(f"secret {error}") from None
    try:
        prefix = as_prefix(prefix)
    except ValueError as error:
        raise ValueError(f"prefix {prefix!r} {error}") from None
    return session_key(text, key, secret, prefix)


def session_key(text: str, key: KeyForm, secret: str | None, prefix: str) -> str:
    """Return the key of a session; its id comes from ``as_session_id()``."""
    whole = prefix + text
    is_digest = len(text) >= _SHORTEST_DIGEST and _DIGEST.fullmatch(text)
    if key == "session_id" and not is_digest and VALID_KEY.fullmatch(whole):
        return whole
    return _digest(_bytes(text), secret, prefix)


def shared_key(template: str, parts: Iterable[str], secret: str | None, prefix: str) -> str:
    """Return the key of what shares a worker: a digest of the template and the parts in it.

    The length of each part precedes it, so that no two combinations share a key. No UTF-8 text has
    the first byte, so no such key equals the key of a session id.
    """
    data = [b"\xff"]
    for text in (template, *parts):
        encoded = _bytes(text)
        data += [b"%d:" % len(encoded), encoded]
    return _digest(b"".join(data), secret, prefix)


def _bytes(text: str) -> bytes:
    # A path or a header can have lone surrogates (bytes that were not UTF-8): they count too.
    return text.encode("utf-8", "surrogatepass")


def _digest(data: bytes, secret: str | None, prefix: str) -> str:
    if secret is None:
        return f"{prefix}sha256-{hashlib.sha256(data).hexdigest()}"
    return f"{prefix}hmac-sha256-{hmac.digest(_bytes(secret), data, 'sha256').hex()}"
