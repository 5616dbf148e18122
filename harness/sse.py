"""A chat completion as it is read: whole, or streamed as server-sent events."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(slots=True)
class Completion:
    """What a chat completion has said so far."""

    text: str = ""
    usage: Mapping[str, Any] | None = None
    is_whole: bool = False
    """Whether its end has come, and all before it was readable."""

    _unread: bytes = b""
    _failed: bool = False

    def feed(self, piece: bytes) -> None:
        """Read on in a stream; a piece may begin and end anywhere."""
        *lines, self._unread = (self._unread + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                self._take(line.removeprefix(b"data:").strip())

    def _take(self, data: bytes) -> None:
        if data == b"[DONE]":
            self.is_whole = not self._failed
            return
        try:
            document = json.loads(data)
            for choice in document["choices"]:
                said = choice["delta"] if "delta" in choice else choice["message"]
                self.text += said.get("content") or ""
            self.usage = document.get("usage") or self.usage
        except (AttributeError, LookupError, TypeError, ValueError):
            self._failed = True  # an error, or unreadable


def read_completion(content: bytes) -> Completion:
    """Return what an answer says, streamed or not."""
    completion = Completion()
    if content.startswith(b"{"):
        completion._take(content)
        completion.is_whole = not completion._failed
    else:
        completion.feed(content)
    return completion
