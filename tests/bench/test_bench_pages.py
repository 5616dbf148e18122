"""``make figures`` writes a command's blocks, and writes nothing if the command fails."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import pages as renewing
from benchmarks.pages import BLOCK, Output
from benchmarks.trace import summary
from harness.proc import processes_in
from harness.processes import ROOT, finished, running

STREAM = "python -m benchmarks stream --quick --markdown figures.md --picture stream.svg"
BODY = "python -m benchmarks.body --quick"
BEFORE = "old, by `{}`"


def block(command: str, section: str | None = None, content: str | None = None) -> str:
    of = f"; section: {section}" if section else ""
    content = BEFORE.format(command) if content is None else content
    return f"<!-- figures: {command}{of} -->\n{content}\n<!-- end of figures -->\n"


def pages(folder: Path, *argv: str) -> "subprocess.CompletedProcess[str]":
    return finished(folder, sys.executable, "-m", "benchmarks.pages", *argv)


def test_each_figure_of_the_pages_names_a_command_that_is_there() -> None:
    listed = pages(ROOT, "--list")
    assert (listed.returncode, listed.stderr) == (0, "")
    with_figures = {"README.md", "docs/performance.md", "docs/reliability.md", "docs/scaling.md"}
    assert with_figures <= set(re.findall(r"[\w/]+\.md(?=, |$)", listed.stdout, re.MULTILINE))


def test_the_table_of_all_traces_is_what_the_traces_say(
    capsys: pytest.CaptureFixture[str],
) -> None:
    summary.main()
    printed = capsys.readouterr().out
    assert printed.count("\n") > 12
    assert printed in (ROOT / "docs/performance.md").read_text()
    measured = (ROOT / "docs/traces.md").read_text()
    figures = re.findall(r"([\d.]+) %<br>([\d,.]+) s", printed)
    assert len(figures) > 40
    for share, seconds in figures:
        told = rf"\| {share}(?: \(.+?\))? % \|.* {seconds}(?: \(.+?\))? s \|"
        assert re.search(told, measured), (share, seconds)


def test_a_text_about_traces_has_no_figure_of_its_own() -> None:
    """A figure in a text would stay as it is when the tables are renewed."""
    count = 0
    for page in (ROOT / "docs").glob("*.md"):
        for paragraph in re.split(r"\n\n|\n- ", BLOCK.sub("", page.read_text())):
            if re.search(r"traces\.md#|`miniswe`", paragraph) and "| theirs |" not in paragraph:
                assert not re.search(r"\d (%|s\b|times the mean)", paragraph), paragraph
                count += 1
    assert count > 10


def test_a_table_made_from_a_page_comes_after_the_commands_that_renew_that_page() -> None:
    listed = pages(ROOT, "--list").stdout.splitlines()
    assert listed[-1] == "python -m benchmarks.trace.summary: docs/performance.md"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (block(BODY).replace("<!-- end", "<!-- en"), "no end"),
        (block(BODY).replace("<!-- figures: ", "<!-- figures"), "no end"),
        (2 * block(BODY).replace("<!-- end of figures -->\n", "", 1), "no end"),
        (block(BODY, content="| a table |"), f"does not say that '{BODY}'"),
        (block("python -m soak.nothing"), "no command 'python -m soak.nothing'"),
        (block("python -m json"), "no command 'python -m json'"),
        (block(".ci/nothing"), "no command '.ci/nothing'"),
        (block("setup.cfg"), "no command 'setup.cfg'"),
    ],
)
def test_a_broken_block_is_told_before_anything_runs(
    text: str,
    complaint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    page = tmp_path / "page.md"
    page.write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["pages", "page.md"])
    assert renewing.main() == 2
    told = capsys.readouterr()
    assert complaint in told.err
    assert told.out == ""
    assert page.read_text() == text


def test_one_run_renews_the_blocks_of_a_command_on_every_page(tmp_path: Path) -> None:
    for folder in ("docs/images", "elsewhere"):
        (tmp_path / folder).mkdir(parents=True)
    other = block(BODY)
    section = "A streamed answer"
    (tmp_path / "docs/page.md").write_text(f"Before.\n\n{block(STREAM, section)}After.\n")
    (tmp_path / "README.md").write_text(f"{block(STREAM)}{other}")
    (tmp_path / "elsewhere/page.md").write_text(block(STREAM))
    done = pages(tmp_path, "docs/page.md")
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "docs/page.md").read_text()
    assert text.startswith(f"Before.\n\n<!-- figures: {STREAM}; section: {section} -->\n\n**CPU ")
    assert text.endswith("<!-- end of figures -->\nAfter.\n")
    assert "## How it was measured" not in text
    source = re.search(
        rf"^\*`{STREAM}`, \d+ s; commit (\w+)(?: with changes)?; 20\d\d-.* UTC; "
        r".+ cores, Linux .+, CPython 3[\d.]+, aiohttp [\d.]+, smg [\d.]+\.\*$",
        text,
        re.MULTILINE,
    )
    assert source, text
    head = finished(ROOT, "git", "rev-parse", "--short", "HEAD").stdout
    assert source[1] == (head.strip() or "unknown")
    everything = (tmp_path / "README.md").read_text()
    assert everything.endswith(other)  # the block of a command that did not run
    assert "## How it was measured" in everything
    assert source[0] in everything
    assert (tmp_path / "docs/images/stream.svg").read_text().startswith("<?xml")
    # A file outside docs counts as a page only if it is named.
    assert (tmp_path / "elsewhere/page.md").read_text() == block(STREAM)
    assert pages(tmp_path, "--list", "docs/page.md").returncode == 0
    assert sorted(each.name for each in tmp_path.rglob("*") if each.is_file()) == [
        *("README.md", "page.md", "page.md", "stream.svg")
    ]


def test_a_failure_leaves_the_pages_and_does_not_keep_the_others_from_being_renewed(
    tmp_path: Path,
) -> None:
    failing = "python -m benchmarks frobnicate"
    bad, good = tmp_path / "bad.md", tmp_path / "good.md"
    text = block(failing) + block(BODY, "Nothing")
    bad.write_text(text)
    good.write_text(block(f"{BODY} "))
    done = pages(tmp_path, "bad.md", "good.md")
    assert done.returncode == 1
    assert f"bad.md stays as it was: {failing!r}: it ended with status 2" in done.stderr
    assert f"bad.md stays as it was: {BODY!r}: its output has no section 'Nothing'" in done.stderr
    assert bad.read_text() == text
    assert "| 1 MiB | " in good.read_text()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_an_interrupted_command_leaves_its_page_and_no_process(
    number: signal.Signals, tmp_path: Path
) -> None:
    command = "python -m benchmarks sessions"
    page = tmp_path / "page.md"
    page.write_text(block(command))
    argv = ("-m", "benchmarks.pages", "page.md")
    async with running(tmp_path, *argv, PYTHONPATH=str(ROOT)) as process:
        assert process.stdout is not None
        while b"agents at once" not in (line := await process.stdout.readline()):
            assert line, (await process.communicate())[1].decode()
        process.send_signal(number)
        _, err = await process.communicate()
    assert process.returncode == 1
    assert "Stopped by SIGTERM; all processes are gone." in err.decode()  # the command's own words
    assert f"page.md stays as it was: {command!r}: interrupted" in err.decode()
    assert page.read_text() == block(command)
    assert processes_in(tmp_path) == {}
    assert os.listdir(tmp_path) == ["page.md"]


def test_a_picture_that_no_page_names_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "docs/images").mkdir(parents=True)
    page = tmp_path / "docs/page.md"
    page.write_text(f"![A picture](images/named.svg)\n\n{block(BODY)}")
    pictures = {"named.svg": b"<svg/>", "other.svg": b"<svg/>"}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(renewing, "run", lambda command: Output("text", pictures, f"`{command}`"))
    renewing.renew(BODY, [page])
    assert [each.name for each in (tmp_path / "docs/images").iterdir()] == ["named.svg"]
