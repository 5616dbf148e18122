"""A cause: the plain value that every other file about them shares."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Cause:
    """What explains the verdict, or is worth knowing beside it, and what to do about it."""

    name: str
    text: str
    advice: str
