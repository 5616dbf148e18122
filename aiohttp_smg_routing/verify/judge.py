"""From what was seen to a verdict: pure functions."""

from dataclasses import dataclass

from .causes import Cause, failures, notes, routing
from .evidence import (
    from_counters,
    from_workers,
    key_parts_sessions,
    key_was_used,
    keys_shared,
    more_than_chance,
    worker_count,
)
from .seen import Answer, Seen, Summary, summarise

EXIT_STATUS: dict[Answer, int] = {"pinned": 0, "not pinned": 1, "could not tell": 2}


@dataclass(frozen=True, slots=True)
class Verdict:
    """The judgement on a run, in one word and in one sentence, with its causes."""

    answer: Answer
    sentence: str
    causes: tuple[Cause, ...]

    @property
    def exit_status(self) -> int:
        """0 pinned, 1 not pinned, 2 could not tell."""
        return EXIT_STATUS[self.answer]


def judge(seen: Seen, min_kept: float) -> Verdict:
    """Return the verdict on ``seen``: pinned needs ``min_kept`` of the keyed later turns kept.

    A later turn that failed, or whose worker nobody names, is neither kept nor moved: where such
    turns could turn the verdict, there is none.
    """
    keyed, unkeyed = (summarise(seen.turns, arm) for arm in ("keyed", "unkeyed"))
    answer, why = _answer(seen, keyed, unkeyed, min_kept)
    causes = (
        *failures(seen),
        *routing(seen, keyed, unkeyed, answer, min_kept),
        *notes(seen, keyed, answer),
    )
    return Verdict(answer, f"{answer.capitalize()}: {why}.", causes)


def _answer(seen: Seen, keyed: Summary, unkeyed: Summary, min_kept: float) -> tuple[Answer, str]:
    if not keyed.answered:
        return "could not tell", "no call with the key was answered"
    if worker_count(seen) == 1:
        return "could not tell", "there is one worker only, so every session stays on it"
    named = bool(keyed.workers)
    evidence = from_workers(keyed) if named else from_counters(seen, keyed)
    if evidence is None:
        return "could not tell", "the gateway names no worker, and its counters do not tell"
    if not evidence.later:
        return "could not tell", "no session came to a second turn"
    share = f"{evidence.kept} of {evidence.later} later turns with the key"
    if not named:
        share = f"by the gateway's counters {share}"
    if evidence.moved > (1 - min_kept) * evidence.later + 1e-9:
        return "not pinned", f"{share} stayed on their session's worker"
    if evidence.kept < min_kept * evidence.later - 1e-9:
        return "could not tell", f"{share} are known to have stayed on their session's worker"
    return _credit(seen, keyed, unkeyed, f"{share} stayed on their session's worker")


def _credit(seen: Seen, keyed: Summary, unkeyed: Summary, share: str) -> tuple[Answer, str]:
    """Tell whether it was the key that kept the sessions together."""
    by_counters = key_was_used(seen, keyed)
    without = f"{unkeyed.outcomes['kept']} of {unkeyed.later} without it"
    compared = f"{share}, {without}" if unkeyed.workers else share
    if by_counters is False:
        return "not pinned", f"{share}, but not because of the key: the gateway did not use it"
    if keys_shared(seen, keyed):
        return "could not tell", f"{share}, but not each session has a key of its own"
    if by_counters or more_than_chance(keyed, unkeyed):
        return "pinned", compared
    if key_parts_sessions(seen, keyed):
        return "pinned", f"{compared}, but those are all on one worker"
    return "could not tell", f"{compared}: that is no difference that shows the key at work"
