"""Plays the sessions of both arms on the gateway, in one schedule."""

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from typing import Any, TypeVar

from ..gateway import CHAT_COMPLETIONS
from . import ask
from .call import CallError, Client, Reply
from .chain import Chain
from .facts import PROBES, UNCOUNTED_POLICIES
from .schedule import Session, message, prompt, schedule, seeded
from .seen import NO_ANSWER, Counters, Failure, Outcome, Plan, Seen, Turn
from .summary import with_cached_tokens

_BETWEEN_LOOKS = 2  # seconds
_LAST = 1  # at least so many seconds to read the counters at the end: a run needs them
T = TypeVar("T")


class Play:
    """A run. ``seen`` has what the run has seen so far, even after it was cancelled.

    The two arms differ only in the sessions: one keeps a session for all its turns, the other has a
    new session, and so a new key, for each turn. ``played`` is called with each turn. Calls go
    only to the plan's gateway, its metrics and its session server.
    """

    def __init__(
        self, plan: Plan, *, api_key: str | None, played: Callable[[Turn], None] = lambda turn: None
    ) -> None:
        self._seen = Seen(replace(plan, run=plan.run or secrets.token_hex(4)))
        self._turns: list[Turn] = []
        self._api_key = api_key
        self._played = played
        self._failed_in_a_row = 0
        self._deadline = 0.0

    @property
    def seen(self) -> Seen:
        """What has been seen so far."""
        return replace(self._seen, turns=with_cached_tokens(self._turns))

    async def run(self, ready: Callable[[Seen], None] = lambda seen: None) -> Seen:
        """Play the plan; call ``ready`` once the gateway has answered, before the turns."""
        begin = time.perf_counter()
        self._deadline = begin + self._seen.plan.time_limit
        try:
            async with Client(self._seen.plan.timeout, self._api_key) as client:
                if await self._in_time(self._prepare(client)):
                    before = await self._in_time(self._counters(client))
                    ready(self.seen)
                    if before:
                        before = await self._in_time(self._probe(client, before)) or before
                    if not self._seen.stopped:
                        await self._play(client, before)
                    if before:
                        after = await self._in_time(self._counters(client), _LAST)
                        self._see(counters=ask.growth(before, after))
                        if after and not self._seen.counters:
                            anew = "they began anew, as when the gateway is restarted"
                            self._see(no_counters=anew)
                    await self._in_time(self._look_again(client), _LAST)
        finally:
            self._see(seconds=time.perf_counter() - begin)
        return self.seen

    def _see(self, **changes: Any) -> None:
        self._seen = replace(self._seen, **changes)

    async def _in_time(self, lookup: Awaitable[T], least: float = 0) -> T | None:
        """Wait for ``lookup`` until the deadline, but at least ``least`` seconds; None if late."""
        try:
            left = self._deadline - time.perf_counter()
            return await asyncio.wait_for(lookup, max(least, left))
        except asyncio.TimeoutError:
            self._see(stopped="time_limit")
            return None

    async def _prepare(self, client: Client) -> bool:
        """Ask for the models and the workers; tell whether the run can start."""
        plan = self._seen.plan
        try:
            self._see(models=await ask.models(client, plan.gateway))
        except CallError as error:
            # A gateway need not list its models: try a name that the user gave.
            if plan.model is None or error.failure.kind in ("refused", "timeout"):
                self._see(failure=error.failure)
                return False
        model = plan.model or next(iter(self._seen.models or ()), None)
        if model is None:
            url = plan.gateway / "v1/models"
            self._see(failure=Failure("broken", url, text="it lists no model"))
            return False
        self._see(
            plan=replace(plan, model=model),
            workers=await ask.healthy_workers(client, plan.gateway, model),
        )
        return True

    async def _look_again(self, client: Client) -> None:
        """See whether the workers have changed: one may have come, or been unhealthy."""
        plan, before = self._seen.plan, self._seen.workers
        after = await ask.healthy_workers(client, plan.gateway, plan.model or "")
        if before is not None and after is not None and after != before:
            kinds = {*before, *after}
            most = {kind: max(before.get(kind, 0), after.get(kind, 0)) for kind in kinds}
            self._see(workers=most, has_changed=True)

    async def _watch(self, client: Client) -> None:
        """Check regularly whether workers are overloaded, because an overload may pass."""
        while True:
            await asyncio.sleep(_BETWEEN_LOOKS)
            await self._counters(client)

    async def _counters(self, client: Client) -> Counters | None:
        self._see(no_counters=NO_ANSWER)
        try:
            counters, load = await ask.read_metrics(client, self._seen.plan.metrics)
        except CallError as error:
            self._see(no_counters=error.failure.reason)
            return None
        except ValueError as error:
            self._see(no_counters=client.clean(str(error)))
            return None
        before = self._seen.load
        usage = {**before.kv_usage, **load.kv_usage}
        load = replace(
            load,
            overloaded=max(before.overloaded, load.overloaded),
            circuits=max(before.circuits, load.circuits),
            kv_usage=usage,
        )
        self._see(no_counters="", load=load)
        return counters

    async def _probe(self, client: Client, before: Counters) -> Counters | None:
        """Make a few calls without any key; return the counters after them.

        The calls show whether the metrics belong to this gateway, and whether it counts even them
        as routed by a key.
        """
        url = self._seen.plan.gateway / CHAT_COMPLETIONS[1:]
        words = (prompt([], seeded(f"{self._seen.plan.run} {n}"), "") for n in range(PROBES))
        calls = [client.chat(url, self._body([message(text)]), {}) for text in words]
        # If they fail, the turns will show why.
        replies = await asyncio.gather(*calls, return_exceptions=True)
        after = await self._counters(client)
        probe = ask.growth(before, after) or Counters()
        self._see(probe=probe)
        named = any(isinstance(reply, Reply) and reply.worker for reply in replies)
        policies = {policy for pool in probe.pools.values() for policy in pool}
        if self._seen.plan.through is None and not named and policies & UNCOUNTED_POLICIES:
            # Only the workers' counts name the worker, and only if calls come one at a time.
            self._see(plan=replace(self._seen.plan, concurrency=1))
        return after

    async def _play(self, client: Client, counters: Counters | None) -> None:
        """Play the schedule, ``concurrency`` calls at a time, to its end or the deadline."""
        plan = self._seen.plan
        chain, turns = Chain(client, plan), schedule(plan)
        follow = (
            ask.Follower(client, plan.metrics, counters)
            if plan.concurrency == 1 and counters
            else None
        )
        players = [
            asyncio.ensure_future(self._player(chain, turns, follow))
            for _ in range(plan.concurrency)
        ]
        watchers = [asyncio.ensure_future(self._watch(client))] if counters else []
        try:
            left = max(0.0, self._deadline - time.perf_counter())
            _, late = await asyncio.wait(players, timeout=left)
            if late:
                self._see(stopped="time_limit")
        finally:
            for task in (*watchers, *players):
                task.cancel()
            await asyncio.gather(*watchers, *players, return_exceptions=True)
            await asyncio.gather(*map(chain.end, chain.open))
            self._see(sent_for_sessions=chain.extra)
        for player in players:
            if not player.cancelled():
                player.result()  # a fault of this program must not pass unseen

    async def _player(
        self,
        chain: Chain,
        turns: Iterator[tuple[Session, int]],
        follow: ask.Follower | None,
    ) -> None:
        limit = 2 * self._seen.plan.concurrency
        for session, number in turns:
            async with session.lock:
                if self._failed_in_a_row >= limit:
                    self._see(stopped="failures")
                    return
                self._see(sent=self._seen.sent + 1)
                turn = await self._turn(chain, session, number, follow)
            self._failed_in_a_row = self._failed_in_a_row + 1 if turn.failure else 0
            self._turns.append(turn)
            self._played(turn)

    async def _turn(
        self, chain: Chain, session: Session, number: int, follow: ask.Follower | None
    ) -> Turn:
        """Play a turn. One that fails leaves no trace in the session."""
        plan = self._seen.plan
        said = message(prompt(session.messages, session.words, plan.run))
        keyed = session.arm == "keyed"
        name = plan.keyed_id(session.number) if keyed else plan.control_id(session.number, number)
        try:
            reply = await chain.send(name, self._body([*session.messages, said]))
        except CallError as error:
            return Turn(session.arm, session.number, number, "failed", failure=error.failure)
        finally:
            if not keyed:
                await chain.end(name)
        worker = reply.worker
        if follow and worker is None:
            worker = await follow.worker()
        session.messages += [said, {"role": "assistant", "content": reply.text}]
        outcome: Outcome
        if worker is None:
            outcome = "unknown"
        elif session.worker is None:
            outcome = "first"
        else:
            outcome = "kept" if worker == session.worker else "moved"
        session.worker = worker or session.worker
        return Turn(
            session.arm,
            session.number,
            number,
            outcome,
            worker=worker,
            prompt_tokens=reply.prompt_tokens,
            cached_tokens=reply.cached_tokens,
            first_token_seconds=reply.first_token_seconds,
        )

    def _body(self, messages: list[dict[str, str]]) -> dict[str, Any]:
        return {
            "model": self._seen.plan.model,
            "messages": messages,
            "max_tokens": self._seen.plan.max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
