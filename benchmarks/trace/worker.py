"""A worker for the real gateway: the model of an engine behind the API of a real one.

A call's prompt is the text of its messages. The body also has the model's ``reply``, which the
trace knows. The answer comes as a whole once the engine is done. Its ``usage`` has the cached
tokens, and its ``timings`` have the times of the engine's steps. Many workers share one process,
which imports this file and no aiohttp, and are bare protocols, to leave the machine's time to the
gateway.
"""

import asyncio
import json
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

from benchmarks.stub import Requests, answer

from .engine import Engine, Job, Speed, TooLongError


class Worker:
    """A worker: an engine, and the connections that wait for answers."""

    def __init__(self, speed: Speed, scale: float, models: dict[str, Any]) -> None:
        self.engine = Engine(speed)
        self.models = models
        self._model: str = models["data"][0]["id"]
        self._scale = scale
        self._asked: dict[int, tuple[Job, Connection]] = {}
        self._alarm: asyncio.TimerHandle | None = None

    def now(self) -> float:
        """Return the model's time, which is the same in all processes."""
        return time.monotonic() * self._scale

    def take(self, body: bytes, connection: "Connection") -> None:
        """Take a call.

        Raises ``TooLongError``; ``LookupError``, ``TypeError`` or ``ValueError`` for a bad body.
        """
        document = json.loads(body)
        prompt = "".join(message["content"] for message in document["messages"])
        job = Job(prompt, document["reply"], self.now())
        self._answer(job.at)  # finish the calls that are done by now
        self.engine.take(job)
        self._asked[id(job)] = job, connection
        self._set_alarm()

    def _ring(self) -> None:
        self._answer(self.now())
        self._set_alarm()

    def _answer(self, now: float) -> None:
        for job in self.engine.until(now):
            _, connection = self._asked.pop(id(job))
            connection.say(completion(job, now, self._model))

    def _set_alarm(self) -> None:
        if self._alarm:
            self._alarm.cancel()
        self._alarm = None
        if self._asked:
            at = max(self.engine.next / self._scale, time.monotonic())
            # asyncio's and uvloop's loops use the same clock.
            loop = asyncio.get_running_loop()
            self._alarm = loop.call_later(at - time.monotonic(), self._ring)

    def metrics(self) -> bytes:
        """Return the metrics that the gateway polls, with vLLM's names."""
        engine = self.engine
        self._answer(self.now())
        values = {
            "num_requests_running": engine.running,
            "num_requests_waiting": len(engine.waiting),
            "kv_cache_usage_perc": engine.usage,
            "prefix_cache_queries_total": engine.prompt_tokens,
            "prefix_cache_hits_total": engine.cached_tokens,
            "prompt_tokens_total": engine.prompt_tokens,
            "generation_tokens_total": engine.output_tokens,
        }
        labels = f'{{engine="0",model_name="{self._model}"}}'
        return "".join(f"vllm:{name}{labels} {value}\n" for name, value in values.items()).encode()


def completion(job: Job, now: float, model: str) -> bytes:
    """Return the answer to a call of ``model``, made at ``now``."""
    document = {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": model,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": job.output},
                "finish_reason": "stop",
            }
        ],
        "usage": {
            "prompt_tokens": job.prompt_tokens,
            "completion_tokens": job.output_tokens,
            "total_tokens": job.prompt_tokens + job.output_tokens,
            "prompt_tokens_details": {"cached_tokens": job.cached_tokens},
        },
        "timings": {
            "arrived": job.at,
            "begun": job.begun,
            "first_token": job.first_token,
            "done": job.done,
            "late": now - job.done,
        },
    }
    return answer(document)


class Connection(Requests):
    """A connection to a worker."""

    def __init__(self, worker: Worker) -> None:
        super().__init__()
        self._worker = worker

    def say(self, content: bytes) -> None:
        """Send an answer, if the client is still connected."""
        if not self.transport.is_closing():
            self.transport.write(content)

    def request(self, head: bytes, body: bytes) -> None:
        """Take a call, or answer what the gateway polls."""
        method, path, *_ = head.split(b" ", 2)
        if method == b"POST" and path == b"/v1/chat/completions":
            try:
                self._worker.take(body, self)
            except TooLongError as error:
                self.say(refusal("400 Bad Request", str(error)))
            except (LookupError, TypeError, ValueError) as error:
                self.say(refusal("400 Bad Request", f"no call of a trace: {error!r}"))
        elif path == b"/metrics":
            self.say(answer(self._worker.metrics()))
        elif path == b"/v1/models":
            self.say(answer(self._worker.models))
        elif path == b"/health":
            self.say(answer(b""))
        else:
            self.say(refusal("404 Not Found", "a worker of the benchmark does not have it"))


def refusal(status: str, message: str) -> bytes:
    """Return an error in the form of the OpenAI API."""
    return answer({"error": {"message": message, "type": "invalid_request_error"}}, status=status)


def main(ports: Sequence[int], speed: dict[str, Any], scale: float, models: dict[str, Any]) -> None:
    """Run some of the workers in this process until it is killed.

    ``models`` is what they answer to ``GET /v1/models``.
    """
    asyncio.run(_run(ports, Speed(**speed), scale, models))


async def _run(ports: Sequence[int], speed: Speed, scale: float, models: dict[str, Any]) -> None:
    loop = asyncio.get_running_loop()
    for port in ports:
        worker = Worker(speed, scale, models)
        server = await loop.create_server(
            partial(Connection, worker), "127.0.0.1", port, backlog=4096
        )
    await server.serve_forever()
