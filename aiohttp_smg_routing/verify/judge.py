"""Judges what a run has seen. All functions here are pure."""

from collections.abc import Iterator
from dataclasses import dataclass

from .cause import Cause
from .causes import causes
from .counting import answering, key_use, pools
from .evidence import Bounds, Evidence, bounds, weigh
from .failures import failures
from .notes import notes
from .seen import Answer, Seen
from .summary import Summary, summarise

EXIT_STATUS: dict[Answer, int] = {"pinned": 0, "not pinned": 1, "could not tell": 2}


@dataclass(frozen=True, slots=True)
class Verdict:
    """The judgement on a run, as an answer and as a sentence, with its causes."""

    answer: Answer
    sentence: str
    causes: tuple[Cause, ...]

    @property
    def exit_status(self) -> int:
        """0 pinned, 1 not pinned, 2 could not tell."""
        return EXIT_STATUS[self.answer]


def decide(evidence: Evidence) -> Answer:
    """Return the answer of the first rule that applies; ``docs/verify.md`` has the rules."""
    match evidence:
        case Evidence(played="nothing" | "too little") | Evidence(one_worker=True):
            return "could not tell"
        case Evidence(key="not used") | Evidence(stayed="moved"):
            return "not pinned"
        case Evidence(stayed="unclear") | Evidence(shared=True):
            return "could not tell"
        case Evidence(key="used", direct=True) | Evidence(better=True):
            return "pinned"
    return "could not tell"


def judge(seen: Seen, min_kept: float) -> Verdict:
    """Return the verdict on ``seen``. "Pinned" needs the share ``min_kept`` of later turns.

    A later turn that failed, or whose worker is unknown, is neither kept nor moved. If such turns
    could change the verdict, the answer is "could not tell".
    """
    keyed, control = (summarise(seen.turns, arm) for arm in ("keyed", "control"))
    evidence = weigh(seen, keyed, control, min_kept)
    answer = decide(evidence)
    told = (
        *failures(seen),
        *causes(seen, keyed, control, evidence, answer),
        *notes(seen, keyed, answer),
    )
    sentence = _sentence(seen, keyed, control, evidence)
    return Verdict(answer, f"{answer.capitalize()}: {sentence}.", told)


def _sentence(seen: Seen, keyed: Summary, control: Summary, evidence: Evidence) -> str:
    """Say what was seen, and nothing about workers that are unknown."""
    if evidence.played == "nothing":
        return "no turn in a session that keeps its key was answered"
    if evidence.played == "too little":
        return (
            f"{keyed.later} of {seen.plan.planned} later turns were played, which is too few to "
            "tell"
        )
    if evidence.one_worker:
        return "only one worker is known, so every session stays on it"
    if evidence.key == "not used" and seen.counters and not seen.counters.calls:
        return "no call of the session server reached this gateway"
    said = "; ".join(_shares(seen, keyed, control))
    if not said:
        return "the gateway names no worker, and its counters do not tell"
    if evidence.key == "not used" or evidence.stayed != "kept":
        return said
    if evidence.shared:
        return f"{said}; but the gateway does not tell all sessions apart"
    if decide(evidence) == "pinned":
        return said
    return f"{said}; but nothing shows that the key did it"


def _shares(seen: Seen, keyed: Summary, control: Summary) -> Iterator[str]:
    """Yield what answers or counters show about each kind of worker."""
    names, later = pools(seen), keyed.later
    by_counters = "by the gateway's counters, the key chose"
    for known in bounds(seen, keyed, control) or [Bounds("regular", 0, later)]:
        worker = "worker" if known.pool == "regular" else f"{known.pool} worker"
        if keyed.named and known.pool == answering(names):
            kept = keyed.outcomes["kept"]
            yield f"{kept} of {later} later turns stayed on their session's {worker}"
            if control.named:
                kept, of = control.outcomes["kept"], control.later
                yield f"with a new session for each turn {kept} of {of} did"
        if key_use(seen, known.pool) == "not used":
            yield f"{by_counters} no {worker}"
        elif keyed.named and known.pool == answering(names):
            if known.most < keyed.outcomes["kept"]:
                yield f"{by_counters} the {worker} of at most {known.most} of {later} later turns"
        elif known.least:
            yield f"{by_counters} the {worker} of {known.least} of {later} later turns"
        elif known.most < later:
            yield f"{by_counters} the {worker} of at most {known.most} of {later} later turns"
