"""A prefix cache like that of vLLM and SGLang: blocks of tokens, hashed in a chain, LRU."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

BLOCK = 16
"""Tokens in a block; only whole blocks are reused."""


def tokens_in(characters: int, per_token: float) -> int:
    """Return the number of tokens in a text of so many characters."""
    return max(1, int(characters / per_token))


def characters_in_block(per_token: float) -> int:
    """Return the number of characters in a block."""
    return int(BLOCK * per_token)


def chain(text: str, per_token: float) -> list[int]:
    """Return the names of the full blocks of a text. A name also depends on all blocks before."""
    size = characters_in_block(per_token)
    names, before = [], 0
    for begin in range(0, len(text) - size + 1, size):
        before = hash((before, text[begin : begin + size]))
        names.append(before)
    return names


@dataclass(frozen=True, slots=True)
class Held:
    """The blocks that a running call holds, and the room for those that it has yet to write."""

    names: Sequence[int]
    cached: int
    """How many of the blocks were in the cache."""

    room: int

    def reused(self, prompt_tokens: int) -> int:
        """Return the prompt tokens that need not be computed: at most all but one.

        The last token must be computed, because the next token comes from it.
        """
        return BLOCK * min(self.cached, (prompt_tokens - 1) // BLOCK)


class PrefixCache:
    """The blocks of one worker, or of one cache for all.

    A running call holds its blocks, and no other call can displace them. After its end they stay
    until their room is needed. The least recently used block goes first; among the blocks that one
    call used last, the one at the end of its text. So no block outlives the one before it.
    """

    def __init__(self, blocks: float) -> None:
        self.blocks = blocks
        """The size in blocks; ``inf`` for a cache that displaces nothing."""

        self._calls: dict[int, int] = {}  # how many calls hold each block
        self._idle: OrderedDict[int, None] = OrderedDict()  # the next to go first
        self._room = 0

    @property
    def held(self) -> int:
        """How many blocks running calls hold."""
        return len(self._calls) + self._room

    def begin(self, names: Sequence[int], blocks: int) -> Held | None:
        """Hold the blocks of a prompt, and room for ``blocks`` blocks in all.

        Return None if running calls leave too little room.
        """
        calls, idle = self._calls, self._idle
        cached = shared = 0
        for name in names:
            if name in calls:
                shared += 1
            elif name not in idle:
                break
            cached += 1
        room = blocks - len(names)
        if self.held + len(names) - shared + room > self.blocks:
            return None
        for name in names:
            idle.pop(name, None)
            calls[name] = calls.get(name, 0) + 1
        self._room += room
        while len(idle) + self.held > self.blocks:
            idle.popitem(last=False)
        return Held(names, cached, room)

    def begin_call(
        self, names: Sequence[int], prompt: int, characters: int, per_token: float
    ) -> Held | None:
        """Hold the blocks and the room of a call; ``names`` are the blocks of prompt and output.

        ``prompt`` is the number of characters of the prompt, ``characters`` that of both. Return
        None if running calls leave too little room.
        """
        size = characters_in_block(per_token)
        return self.begin(names[: prompt // size], -(-characters // size))

    def end(self, held: Held, names: Sequence[int]) -> None:
        """Keep the blocks of a call that has ended: ``names``, those of prompt and output."""
        self._room -= held.room
        calls, idle = self._calls, self._idle
        for place in range(len(names) - 1, -1, -1):
            name = names[place]
            if place < len(held.names):
                calls[name] -= 1
                if calls[name]:
                    continue
                del calls[name]
            elif name in calls:
                continue
            idle[name] = None
            idle.move_to_end(name)
