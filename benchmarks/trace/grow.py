"""Grows a trace to more sessions or to more samples of each, or cuts it to fewer sessions."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import count
from os.path import commonprefix

from .read import Session


def grow(recorded: Sequence[Session], sessions: int) -> list[Session]:
    """Return so many sessions: the recorded ones, then copies of them, over and over.

    No two sessions are more alike than the trace says. A copy has a mark in each of its prompts,
    where the text of the recorded session stops being the same as that of any other session. So
    what all sessions share, such as a system prompt, the copies share too. From the mark on they
    differ, as other tasks would. A group is copied as one: the mark stands where its text stops
    being that of any other *group*, and is the same for all samples in that copy of the group.
    """
    places = shared_with_others(recorded)
    grown = list(recorded[:sessions])
    for number in count(1):
        if len(grown) == sessions:
            break
        rest = zip(recorded, places, strict=True)
        grown += [copy(session, number, place) for session, place in rest][: sessions - len(grown)]
    return grown


def sample(recorded: Sequence[Session], samples: int) -> list[Session]:
    """Return so many samples of each session, side by side, as GRPO draws them of one prompt.

    The first one is the recorded session. The others share its first prompt, and have a mark where
    that ends: from there on they differ. They are one group: the session's own, if it has one.
    """
    return [
        replace(
            session,
            id=f"{session.id}-sample-{number}" if number else session.id,
            group=name(session),
            sample_mark=f"{number}: " if number else "",
        )
        for session in recorded
        for number in range(samples)
    ]


def copy(session: Session, number: int, place: int) -> Session:
    """Return a copy of a session, marked at that place."""
    name = f"copy-{number}"
    group = session.group and f"{session.group}-{name}"
    return replace(session, id=f"{session.id}-{name}", group=group, place=place, mark=f"<{name}>")


def shared_with_others(sessions: Sequence[Session]) -> list[int]:
    """Return for each session how many characters its group's prompts share with other groups.

    It is the longest prefix that a first prompt of the group shares with one of another group. A
    session without a group is a group by itself.
    """
    ordered = sorted(sessions, key=lambda session: session.turns[0].prompt)
    longest: dict[str, int] = {}
    for way in (ordered, ordered[::-1]):
        # In sorted order, no text shares more than the nearest one on each side.
        before = other = ""
        of_group = None
        for session in way:
            prompt = session.turns[0].prompt
            if name(session) != of_group:
                other, of_group = before, name(session)
            shared = len(commonprefix([other, prompt]))  # noqa: RUF071 - characters are meant
            longest[of_group] = max(longest.get(of_group, 0), shared)
            before = prompt
    return [longest[name(session)] for session in sessions]


def name(session: Session) -> str:
    """Return the name of its group, or of the session where it has none."""
    return session.group or session.id
