"""Fuzz one target: ``python -m fuzz.run TARGET``, with libFuzzer's arguments after it."""

import re
import sys
from dataclasses import fields
from typing import Any

import atheris
from yarl import URL

with atheris.instrument_imports(include=["aiohttp_smg_routing"]):
    from aiohttp_smg_routing import RoutingConfig

    from . import laws

_FIELDS = tuple(field.name for field in fields(RoutingConfig))
_BEGINNINGS = [
    "http://",
    "http://gw.example",
    "HTTP://GW.EXAMPLE:80",
    "http://gw.example/base/",
    "",
]
_ENDINGS = ["/base/v1/chat/completions", "v1/chat/completions", "/chat/completions", ""]
_NEARLY = {"gateway": "http://", "session_id": "json:", "pin_by": "{session_id}", "paths": "/"}
_NAMES = ["session_id", "json:a", "header:b", "json:a.b"]
_PIECES = [
    *(
        "/",
        "//",
        "..",
        ".",
        "%2f",
        "%2e",
        "\\",
        "?",
        "#",
        "@",
        ":",
        ":80",
        ":x",
        "[",
        "]",
        "[]",
        "[::1]",
    ),
    *("gw", "example", "GW.example", ".evil", "user:pw@", "base", "v1", "chat", "completions", " "),
    *("\n", "\t", "\0", "\udc80", "é", "%", ",", "a"),
]


def key(data: Any) -> None:
    """Make two ids, or two combinations that share a worker, and the options of their keys."""
    form = {
        "key": data.PickValueInList(["session_id", "digest"]),
        "secret": _text(data, 8) or None,
        "prefix": "job-7/" if data.ConsumeBool() else "",
    }
    if data.ConsumeBool():
        (one, its), (other, others) = _combination(data), _combination(data)
        laws.shared(one, other, [its, others], {**form, "key": "digest"})
        return
    first, second = _text(data, 150), _text(data, 150)
    if data.ConsumeBool():
        second = first + second  # two similar ids
    if first.strip() and second.strip():
        laws.key(first, second, form)


def _combination(data: Any) -> tuple[laws.Shared, list[str]]:
    """Return a combination that shares a worker, and the sources in its ``pin_by``."""
    count = data.ConsumeIntInRange(1, 3)
    names = [data.PickValueInList(_NAMES) for _ in range(count)]
    between = [re.sub("[{}]", "", _text(data, 3)) for _ in names]
    pin_by = "".join(f"{{{name}}}{text}" for name, text in zip(names, between, strict=True))
    found = {name: _text(data, 6) or None for name in names if name != laws.SESSION_ID}
    session_id = _text(data, 6)
    return laws.Shared(pin_by, session_id if session_id.strip() else "s", found), names


def matcher(data: Any) -> None:
    """Make a call, and the headers that its caller passes."""
    method = data.PickValueInList(["POST", "post", "GET"])
    headers = [
        (data.PickValueInList([*laws.ROUTING_HEADERS, "x-smg-routing-key", "X-A"]), value)
        for value in _text(data, 20).split(",")
    ]
    session_id = _text(data, 20)
    text = data.PickValueInList(_BEGINNINGS) + _pieces(data) + data.PickValueInList(_ENDINGS)
    encoded = data.ConsumeBool()
    try:
        url = URL(text, encoded=encoded)
    except (ValueError, IndexError):
        return
    laws.matcher(method, url, session_id if session_id.strip() else "s", headers)


def config(data: Any) -> None:
    """Make a mapping as an app's config file may have it."""
    mapping: dict[str, Any] = {"gateway": "http://gw"} if data.ConsumeBool() else {}
    for _ in range(data.ConsumeIntInRange(0, 4)):
        name = data.PickValueInList([*_FIELDS, _text(data, 12)])
        mapping[name] = _value(data, name)
    laws.config(mapping)


def _value(data: Any, name: str) -> Any:
    kind = data.ConsumeIntInRange(0, 9)
    if kind == 0:
        return [_value(data, name) for _ in range(data.ConsumeIntInRange(0, 2))]
    if kind == 1:
        return {_text(data, 4): laws.HIDDEN}
    if kind == 2:
        return data.ConsumeInt(16)
    if kind == 3:
        return data.PickValueInList([None, True, False, data.ConsumeFloat()])
    text = _NEARLY.get(name, "") + _pieces(data)
    if name == "gateway":
        credential = ["", laws.HIDDEN + _pieces(data) + "@", "?" + laws.HIDDEN, "#" + laws.HIDDEN]
        text += data.PickValueInList(credential) + _pieces(data)
    elif name in ("key", "secret") or name not in _FIELDS:
        text = data.PickValueInList(["digest", text + laws.HIDDEN])
    return text


def _text(data: Any, longest: int) -> str:
    text: str = data.ConsumeUnicode(data.ConsumeIntInRange(0, longest))
    return text


def _pieces(data: Any) -> str:
    """Return a text of pieces that often break parsers of URLs, paths and names."""
    count = data.ConsumeIntInRange(0, 5)
    return "".join(data.PickValueInList([*_PIECES, _text(data, 6)]) for _ in range(count))


TARGETS = {"key": key, "matcher": matcher, "config": config}


def main() -> None:
    """Fuzz the target that the command line names; this ends the process."""
    target = TARGETS[sys.argv.pop(1)]

    def one_input(raw: bytes) -> None:
        target(atheris.FuzzedDataProvider(raw))

    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
