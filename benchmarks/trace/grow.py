"""Grow a trace to more sessions or more samples of each session, or cut it to fewer sessions."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import count
from os.path import commonprefix

from .read import Session


def grow(recorded: Sequence[Session], sessions: int) -> list[Session]:
    """Return ``count`` sessions: the recorded ones, then as many copies of them as needed.

    No two sessions are more alike than those of the trace. A copy has a mark in each prompt, at the
    point where the recorded session's text differs from that of every other session. So the copies
    still share what all sessions share, such as a system prompt. From the mark on they differ, as
    other tasks would. A group is copied as a whole: its mark is where its text differs from that of
    every other *group*, and all samples in a copy of the group have the same mark.
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
    """Return ``count`` samples of each session, next to each other, as GRPO draws from a prompt.

    The first sample is the recorded session. The others share its first prompt, and differ from a
    mark at its end on. They are one group, that of the session if it has one.
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
    """Return a copy of a session, with a mark at ``place``."""
    name = f"copy-{number}"
    group = session.group and f"{session.group}-{name}"
    return replace(session, id=f"{session.id}-{name}", group=group, place=place, mark=f"<{name}>")


def shared_with_others(sessions: Sequence[Session]) -> list[int]:
    """Return how many characters each session's group shares with other groups.

    That is the longest prefix that a first prompt of the group has in common with one of another
    group. A session without a group is a group by itself.
    """
    ordered = sorted(sessions, key=lambda session: session.turns[0].prompt)
    longest: dict[str, int] = {}
    for way in (ordered, ordered[::-1]):
        # In sorted order, the neighbours share the longest prefix with a text.
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
    """Return the name of a session's group, or of the session if it has none."""
    return session.group or session.id
