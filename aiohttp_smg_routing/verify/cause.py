"""A cause: the plain value that all files about causes share."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Cause:
    """Something that explains the verdict or is worth knowing, and what to do about it."""

    name: str
    text: str
    advice: str
