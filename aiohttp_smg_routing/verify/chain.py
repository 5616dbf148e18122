"""Sends a turn straight to the gateway with a key, or through a session server with an id."""

import json
from collections.abc import Mapping
from contextlib import suppress
from typing import Any
from urllib.parse import quote

from yarl import URL

from ..gateway import CHAT_COMPLETIONS
from .call import CallError, Client, Reply
from .seen import Failure, Plan

_ENDPOINT = "/chat/completions"
_BASE = CHAT_COMPLETIONS.removesuffix(_ENDPOINT)
_ID_FIELDS = ("session_id", "id", "session")


def endpoint(through: str) -> str:
    """Return the URL of a session server's chat completions.

    ``through`` may leave out the endpoint, or the ``/v1`` as well: ``http://s/{session_id}``.
    """
    path, mark, query = through.partition("?")
    path = path.rstrip("/")
    if not path.endswith(_ENDPOINT):
        path += _ENDPOINT if path.endswith(_BASE) else CHAT_COMPLETIONS
    return path + mark + query


def session_url(through: str, session_id: str) -> URL:
    """Return ``through`` with the id in it. Raises ``ValueError`` if that is no URL."""
    return URL(through.replace("{session_id}", quote(session_id, safe="")), encoded=True)


class Chain:
    """Sends the turns of a plan. Makes and deletes sessions if the server requires that.

    ``extra`` counts the calls beyond the turns.
    """

    def __init__(self, client: Client, plan: Plan) -> None:
        self._client = client
        self._plan = plan
        self._made: dict[str, str] = {}  # the server's own id of each session
        self._create_url = _create_url(plan)
        self._makes = plan.create is not None
        self.extra: int = 0

    async def send(self, session_id: str, body: dict[str, Any]) -> Reply:
        """Send a turn of the session. Raises ``CallError``."""
        plan = self._plan
        if plan.through is None:
            url = plan.gateway / CHAT_COMPLETIONS[1:]
            return await self._client.chat(url, body, {plan.header: session_id})
        if self._makes and self._create_url and session_id not in self._made:
            await self._make(self._create_url, session_id)
        try:
            return await self._turn(plan.through, session_id, body)
        except CallError as error:
            is_made = session_id in self._made
            if error.failure.status != 404 or self._create_url is None or is_made:
                raise
            try:
                await self._make(self._create_url, session_id)
            except CallError:
                raise error from None
        self._makes = True  # the server wants each session made
        self.extra += 1
        return await self._turn(plan.through, session_id, body)

    async def end(self, session_id: str) -> None:
        """Delete the session if ``send()`` made it. A server need not support deletion."""
        made = self._made.pop(session_id, None)
        if made is not None:
            self.extra += 1
            with suppress(CallError):
                await self._client.delete(session_url(f"{self._create_url}/{{session_id}}", made))

    @property
    def open(self) -> tuple[str, ...]:
        """The sessions that were made and not yet deleted."""
        return tuple(self._made)

    async def _make(self, url: URL, session_id: str) -> None:
        self.extra += 1
        made = _id_in(await self._client.post(url, {"session_id": session_id}))
        if made is None and self._plan.create is not None:
            raise CallError(Failure("broken", url, text="its answer has no session id"))
        self._made[session_id] = made or session_id

    async def _turn(self, through: str, session_id: str, body: dict[str, Any]) -> Reply:
        plan = self._plan
        session_id = self._made.get(session_id, session_id)
        headers = {plan.session_header: session_id} if plan.session_header else {}
        if plan.session_json:
            body = _with(body, plan.session_json.split("."), session_id)
        return await self._client.chat(session_url(through, session_id), body, headers)


def _create_url(plan: Plan) -> URL | None:
    """Return the URL that makes a session: the given one, or the parent of a session's."""
    if plan.create is not None or plan.through is None:
        return plan.create
    above, mark, below = plan.through.partition("/{session_id}/")
    return URL(above) if mark and "{session_id}" not in below else None


def _with(body: Mapping[str, Any], path: list[str], value: str) -> dict[str, Any]:
    """Return the body with ``value`` at the path."""
    name, *rest = path
    inner = body.get(name)
    below = inner if isinstance(inner, dict) else {}
    return {**body, name: _with(below, rest, value) if rest else value}


def _id_in(said: str) -> str | None:
    """Return the id in an answer: the JSON itself, or the first of the usual fields in it."""
    try:
        found = json.loads(said)
    except (ValueError, RecursionError):
        return None
    if isinstance(found, dict):
        found = next((found[name] for name in _ID_FIELDS if name in found), None)
    if isinstance(found, dict):  # {"session": {"id": …}}
        found = next((found[name] for name in _ID_FIELDS if name in found), None)
    is_id = isinstance(found, str | int) and not isinstance(found, bool) and str(found).strip()
    return str(found) if is_id and str(found).isprintable() else None
