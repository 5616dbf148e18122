"""Read a trace: a file of recorded sessions, JSONL or ``.jsonl.xz``, in one of two formats.

*Calls*: a line is a call, with ``session_id``, ``timestamp`` (when it began, in microseconds),
``input`` (the whole prompt) and ``output``. *Chat transcripts*: a line is a session, with
``session_id``, ``messages`` in the form of OpenAI's API, and optionally ``group``, the task that
the session is a sample of. Each message of the assistant is a call, and the messages before it are
its prompt.
"""

import json
import lzma
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from os.path import commonprefix
from pathlib import Path
from typing import IO, Any

MICROSECONDS = 1e6


class TraceError(ValueError):
    """A file is no trace. The message says where, what is wrong, and what would be right."""


@dataclass(frozen=True, slots=True)
class Turn:
    """A recorded call."""

    prompt: str
    output: str
    pause: float | None = None
    """Seconds from the start of the call before to the start of this one; None if the trace doesn't
    have it, and for the first turn."""


@dataclass(frozen=True, slots=True)
class Session:
    """A recorded session, or a copy or sample of one."""

    id: str
    group: str
    """The task that the session is a sample of; empty if the trace has no groups."""

    turns: tuple[Turn, ...]
    place: int = 0
    """The position of a copy's mark in all of its prompts, in characters."""

    mark: str = ""
    sample_mark: str = ""
    """A mark that distinguishes samples with the same first prompt. It follows the first prompt:
    before the first output, and in each later prompt."""

    def prompt(self, number: int) -> str:
        """Return the prompt of a turn, counted from 0."""
        text = self.turns[number].prompt
        if self.sample_mark and number:
            first = self.turns[0].prompt
            if not text.startswith(first):
                first = commonprefix([first, text])  # noqa: RUF071 - characters are meant
            text = first + self.sample_mark + text[len(first) :]
        return text[: self.place] + self.mark + text[self.place :] if self.mark else text

    def output(self, number: int) -> str:
        """Return the output of a turn, counted from 0."""
        output = self.turns[number].output
        return output if number else self.sample_mark + output

    @property
    def length(self) -> int:
        """The characters of the longest call, prompt and output, which a cache must hold."""
        longest = max(len(turn.prompt) + len(turn.output) for turn in self.turns)
        return longest + len(self.mark) + len(self.sample_mark)


def read(file: Path) -> list[Session]:
    """Return the sessions of a file, in the order of their first lines.

    Raises ``OSError`` if it can't be read, and ``TraceError`` if it is no trace.
    """
    calls: dict[str, list[tuple[float, Turn]]] = {}
    transcripts: dict[str, Session] = {}
    for number, line in _lines(file):
        place = f"{file}, line {number}"
        if "messages" in line:
            session = _transcript(line, place)
            if session.id in transcripts:
                raise TraceError(f"{place}: the session {session.id!r} has a line already")
            if session.turns:
                transcripts[session.id] = session
        elif "input" in line:
            session_id = _text(line, "session_id", place)
            began = line.get("timestamp")
            if isinstance(began, bool) or not isinstance(began, int | float):
                raise TraceError(f"{place}: 'timestamp' must be a number of microseconds")
            turn = Turn(
                _text(line, "input", place), _text(line, "output", place, may_be_empty=True)
            )
            calls.setdefault(session_id, []).append((began / MICROSECONDS, turn))
        else:
            raise TraceError(
                f"{place}: neither a call, which has 'session_id', 'timestamp', 'input' and"
                " 'output', nor a transcript, which has 'session_id' and 'messages'"
            )
    if calls and transcripts:
        raise TraceError(f"{file} has both calls and transcripts: put them into two files")
    sessions = [_session(session_id, turns) for session_id, turns in calls.items()]
    if not (sessions or transcripts):
        raise TraceError(f"{file} has no call: each line is a call or a transcript, as JSON")
    return sessions or list(transcripts.values())


def _lines(file: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    is_compressed = file.suffix == ".xz"
    opener: Callable[..., IO[str]] = lzma.open if is_compressed else open
    try:
        with opener(file, "rt", encoding="utf-8") as lines:
            for number, text in enumerate(lines, 1):
                if text.strip():
                    yield number, _object(text, f"{file}, line {number}")
    except (lzma.LZMAError, EOFError, UnicodeDecodeError) as error:
        kind = "xz-compressed JSONL" if is_compressed else "JSONL in UTF-8"
        raise TraceError(f"{file} is not {kind}: {error}") from error


def _object(text: str, place: str) -> Mapping[str, Any]:
    try:
        line = json.loads(text)
    except ValueError as error:
        raise TraceError(f"{place}: it is not JSON: {error}") from error
    if not isinstance(line, dict):
        raise TraceError(f"{place}: it must be a JSON object, not {type(line).__name__}")
    return line


def _text(line: Mapping[str, Any], name: str, place: str, *, may_be_empty: bool = False) -> str:
    value = line.get(name)
    if isinstance(value, str) and (value or may_be_empty):
        return value
    raise TraceError(f"{place}: {name!r} must be a text{'' if may_be_empty else ', not empty'}")


def _session(session_id: str, calls: list[tuple[float, Turn]]) -> Session:
    calls.sort(key=lambda call: call[0])
    pauses = [None, *(later - before for (before, _), (later, _) in pairwise(calls))]
    turns = (
        Turn(turn.prompt, turn.output, pause)
        for (_, turn), pause in zip(calls, pauses, strict=True)
    )
    return Session(session_id, "", tuple(turns))


def _transcript(line: Mapping[str, Any], place: str) -> Session:
    session_id = _text(line, "session_id", place)
    group = _text(line, "group", place) if line.get("group") is not None else ""
    messages = line["messages"]
    if not isinstance(messages, list) or not all(isinstance(each, dict) for each in messages):
        raise TraceError(f"{place}: 'messages' must be a list of JSON objects")
    return Session(session_id, group, tuple(_turns(messages, place)))


def _turns(messages: Sequence[Mapping[str, Any]], place: str) -> Iterator[Turn]:
    """Yield a turn for each message of the assistant; its prompt is the text of all before."""
    text = ""
    for number, message in enumerate(messages, 1):
        role = _text(message, "role", f"{place}, message {number}")
        text += f"<|{role}|>\n"
        said = _said(message, f"{place}, message {number}")
        if role == "assistant" and number > 1:
            yield Turn(text, said)
        text += f"{said}\n"


def _said(message: Mapping[str, Any], place: str) -> str:
    content = message.get("content")
    if isinstance(content, list):  # parts, some of which may not be text
        content = "".join(
            part["text"]
            for part in content
            if isinstance(part, dict) and isinstance(part.get("text"), str)
        )
    if not isinstance(content, str | None):
        raise TraceError(f"{place}: 'content' must be a text, a list of parts, or null")
    calls = message.get("tool_calls")
    return (content or "") + (json.dumps(calls, ensure_ascii=False) if calls else "")
