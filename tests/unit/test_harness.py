"""The harness, and what a contributor meets first."""

import re
import signal
import sys
from pathlib import Path

import pytest

from harness.agents import Reply
from harness.proc import HAS_PROC, processes_in
from harness.processes import ROOT, finished, running
from harness.sse import Completion, read_completion

from ..stopping import assert_stopped, until_it_says

PROGRAM = """
import asyncio, sys
from aiohttp_smg_routing.testing import child_process
from harness.stopping import exit_status

async def ready():
    return True

async def work():
    async with child_process("sleep", "1000", ready=ready):
        print("at work", flush=True)
        await asyncio.Event().wait()

sys.exit(exit_status("program", work()))
"""


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
async def test_a_signal_stops_a_program_and_what_it_started(
    number: signal.Signals, status: int, folder: Path
) -> None:
    async with running(folder, "-c", PROGRAM) as process:
        await until_it_says(process, b"at work")
        if HAS_PROC:
            assert len(processes_in(folder)) == 2
        await assert_stopped(process, number, status)


def test_the_readme_has_at_most_700_words() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    prose = re.sub(r"```.*?```|<!--.*?-->|(?<=\])\([^)]*\)", "", text, flags=re.DOTALL)
    assert len(re.findall(r"\S*\w\S*", prose)) <= 700


LACKING = (
    "import no_such_package",
    "def test_it():\n    import no_such_package",
    "from importlib.metadata import version\ndef test_it():\n    version('no_such_package')",
    "import sys\ndef test_it():\n    sys.exit(\"pip install 'aiohttp_smg_routing[verify]'\")",
)


def test_a_missing_package_gets_a_remedy(tmp_path: Path) -> None:
    for number, code in enumerate(LACKING):
        (tmp_path / f"test_{number}.py").write_text(code)
    options = ("-p", "conftest", "-p", "no:cacheprovider", "--continue-on-collection-errors")
    done = finished(tmp_path, sys.executable, "-m", "pytest", *options)
    # Each failure begins with a line of underscores that names it.
    failures = re.split(r"^_{3,} .* _{3,}$", done.stdout, flags=re.MULTILINE)[1:]
    assert len(failures) == len(LACKING)
    assert [it for it in failures if "pip install -e . --group test" not in it] == []


def test_importing_the_engines_imports_nothing_that_their_extra_brings() -> None:
    code = (
        "import sys, harness.arms, harness.engines;"
        "print({'gguf', 'numpy', 'xllamacpp'} & set(sys.modules))"
    )
    assert finished(ROOT, sys.executable, "-c", code).stdout == "set()\n"


STREAM = (
    b'data: {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}\n\n'
    b'data: {"choices": [{"index": 0, "delta": {"content": "it is "}}]}\n\n'
    b'data: {"choices": [{"index": 0, "delta": {"content": "42"}}]}\n\n'
    b'data: {"choices": [], "usage": {"prompt_tokens": 7}}\n\n'
    b"data: [DONE]\n\n"
)
PLAIN = b'{"choices": [{"message": {"content": "it is 42"}}], "usage": {"prompt_tokens": 7}}'


@pytest.mark.parametrize("content", [PLAIN, STREAM, STREAM.replace(b"\n", b"\r\n")])
def test_a_completion_is_read_whether_streamed_or_not(content: bytes) -> None:
    completion = read_completion(content)
    assert (completion.text, completion.usage) == ("it is 42", {"prompt_tokens": 7})
    assert completion.is_whole
    assert Reply(200, content).text == "it is 42"


def test_a_piece_of_a_stream_may_end_anywhere() -> None:
    completion = Completion()
    for byte in STREAM:
        completion.feed(bytes([byte]))
    assert (completion.text, completion.is_whole) == ("it is 42", True)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        PLAIN[:-10],
        b'{"error": {"code": "busy"}}',
        b'{"choices": [{"message": null}]}',
        STREAM.removesuffix(b"data: [DONE]\n\n"),
        STREAM.replace(b"42", b'42"'),
        b'data: {"error": {"code": "busy"}}\n\n' + STREAM,
    ],
)
def test_what_breaks_off_or_cannot_be_read_is_not_whole(content: bytes) -> None:
    assert not read_completion(content).is_whole
    assert Reply(200, content).text is None
