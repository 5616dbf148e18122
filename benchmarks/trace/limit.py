"""The limit: the share of the prompt tokens that a cache shared by all workers could give."""

from collections.abc import Iterable, Sequence

from .cache import BLOCK, PrefixCache, tokens_in

Blocks = tuple[Sequence[int], int, int]
"""The blocks of a call's prompt and output, and the characters of its prompt and of both."""


def shared_cache(calls: Iterable[Blocks], tokens: float, per_token: float) -> float:
    """Return the share of the prompt tokens that one LRU cache of this size gives, 0 to 1.

    With ``tokens`` of ``inf`` it is the most that the trace allows. The next call finds a call's
    blocks at once, as if no two calls ran at the same time.
    """
    cache = PrefixCache(tokens // BLOCK)
    cached = prompts = 0
    for names, prompt, characters in calls:
        held = cache.begin_call(names, prompt, characters, per_token)
        if held is None:
            raise ValueError(
                f"the cache has {tokens} tokens, and a call of {characters} characters"
            )
        cache.end(held, names)
        tokens_of_prompt = tokens_in(prompt, per_token)
        cached += held.reused(tokens_of_prompt)
        prompts += tokens_of_prompt
    return cached / prompts
