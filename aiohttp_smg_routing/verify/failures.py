"""Finds why calls fail, and what to do about it."""

from collections.abc import Iterator

from .cause import Cause
from .seen import Failure, Seen


def failures(seen: Seen) -> Iterator[Cause]:
    """Yield a cause for each kind of failure, the most frequent one first."""
    counts: dict[Failure, int] = {}
    for failure in [seen.failure, *(turn.failure for turn in seen.turns)]:
        if failure:
            # One address stands for all sessions of a session server.
            url = failure.url if failure.status in (404, 405) else failure.url.origin()
            alike = Failure(failure.kind, url, failure.status, failure.text)
            counts[alike] = counts.get(alike, 0) + 1
    shown = set()
    for failure in sorted(counts, key=counts.__getitem__, reverse=True):
        if (failure.kind, failure.status) not in shown:
            shown.add((failure.kind, failure.status))
            yield _failure(seen, failure)


def _failure(seen: Seen, failure: Failure) -> Cause:
    said = f" ({failure.text})" if failure.text else ""
    model = str(seen.plan.model)
    unknown = model in failure.text if seen.models is None else model not in seen.models
    match failure:
        case Failure(kind="refused"):
            return Cause(
                "refused",
                f"No connection to {failure.url}{said}.",
                "Check the address and its http:// or https://, and that the server runs and can "
                "be reached from here.",
            )
        case Failure(kind="timeout"):
            return Cause(
                "timeout",
                f"{failure.url} did not answer in time.",
                "See whether its workers are busy or stuck, or allow more with --timeout SECONDS.",
            )
        case Failure(status=400 | 404) if unknown:
            advice = f"Name one that it has with --model: {', '.join(seen.models or ())}."
            if not seen.models:
                advice = "It has none: see in GET /workers whether it has healthy workers."
            return Cause(
                "unknown_model",
                f"{failure.url.origin()} has no model {model!r}{said}.",
                advice,
            )
        case Failure(status=400 | 404) if model == "unknown" and not seen.plan.through:
            return Cause(
                "unknown_model",
                f"{failure.url.origin()} does not name its models{said}.",
                "Name the one that its workers serve with --model.",
            )
    return _status(failure, said)


def _status(failure: Failure, said: str) -> Cause:
    """Return the cause for an answer that is an error or is unreadable."""
    answers = f"{failure.url} answers {failure.status}{said}."
    match failure.status:
        case None:
            return Cause(
                "broken",
                f"{failure.url} gives no complete answer{said}.",
                "Call it by hand and read its log: it should stream chat completions.",
            )
        case 401 | 403:
            advice = "Put the API key into SMG_API_KEY, or name its file with --api-key-file."
        case 404 | 405:
            advice = _wrong_url(failure)
        case 503:
            advice = "It has no free worker: see GET /workers and the log of the gateway."
        case 300 | 301 | 302 | 303 | 307 | 308:
            advice = "Give the URL that it points to: no redirect is followed."
        case _:
            advice = "Read the log of the gateway and of its workers."
    return Cause(f"http_{failure.status}", answers, advice)


def _wrong_url(failure: Failure) -> str:
    path = failure.url.path
    if "/v1/v1/" in path or path.endswith("/v1/v1"):
        return "Leave /v1 out of the URL: the command adds it."
    return (
        "Check the URL, and the path that a proxy in front wants: the command adds "
        "/v1/chat/completions. The session id can be in the URL, a header (--session-header) or "
        "the body (--session-json). If the server wants sessions made first, give --create URL."
    )
