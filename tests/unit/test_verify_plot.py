"""The picture is drawn in both formats, for few and many workers, whatever was measured."""

import xml.etree.ElementTree as ElementTree
from pathlib import Path
from random import Random

import pytest
from matplotlib.figure import Figure
from numpy import asarray
from PIL import Image
from yarl import URL

from aiohttp_smg_routing.verify.judge import judge
from aiohttp_smg_routing.verify.plot import PALETTE, draw
from aiohttp_smg_routing.verify.seen import ARM_TITLES, ARMS, Failure, Outcome, Plan, Seen, Turn

GATEWAY = URL("http://10.0.0.1:30000")
SVG = "{http://www.w3.org/2000/svg}"


def played(workers: int, sessions: int = 24, turns: int = 6) -> Seen:
    """Return turns that stay with the key and scatter without it, and a failed turn in each arm."""
    random = Random(1)
    names = [f"http://10.0.3.{number}:8000" for number in range(workers)]
    seen = []
    for arm in ARMS:
        for session in range(1, sessions + 1):
            before = None
            for number in range(1, turns + 1):
                if (session, number) == (2, 2):
                    failure = Failure("timeout", GATEWAY)
                    seen.append(Turn(arm, session, number, "failed", failure=failure))
                    continue
                worker = names[session % workers] if arm == "keyed" else random.choice(names)
                moved: Outcome = "kept" if worker == before else "moved"
                outcome: Outcome = moved if before else "first"
                seen.append(Turn(arm, session, number, outcome, worker, 100, 50, 0.1))
                before = worker
    plan = Plan(GATEWAY, GATEWAY, model="m", sessions=sessions, turns=turns)
    return Seen(plan, tuple(seen), len(seen), workers={"regular": workers})


def colours(file: Path) -> set[str]:
    """Return the fill colours in an SVG."""
    styles = [element.get("style", "") for element in ElementTree.parse(file).iter()]  # noqa: S314
    return {style.split("fill: ")[1][:7].upper() for style in styles if "fill: #" in style}


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Return the list that gets each figure, instead of its file."""
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **options: drawn.append(figure))
    return drawn


@pytest.mark.thorough
@pytest.mark.parametrize("workers", [2, 3, 8, 16])
def test_each_worker_has_a_colour_of_its_own(tmp_path: Path, workers: int) -> None:
    seen = played(workers)
    draw(seen, judge(seen, 0.9), tmp_path / "pins.svg")
    assert set(PALETTE[:workers]) <= colours(tmp_path / "pins.svg")
    assert not set(PALETTE[workers:]) & colours(tmp_path / "pins.svg")
    assert len(set(PALETTE)) == 16


def test_arm_with_the_key_is_above_and_the_curves_are_beside(
    tmp_path: Path, figures: list[Figure]
) -> None:
    seen = played(3)
    draw(seen, judge(seen, 0.9), tmp_path / "pins.svg")
    panels = {axes.get_title(loc="left"): axes for axes in figures[0].axes}
    above, below = panels["Same session"], panels["New session each turn"]
    assert above.get_position().y0 > below.get_position().y1
    top = figures[0].transFigure.transform(above.get_position().corners())[:, 1].max()
    for text in figures[0].texts:
        assert top < text.get_window_extent().y0 < text.get_window_extent().y1 < figures[0].bbox.y1
    assert above.get_title(loc="right") == "0 moves"
    assert below.get_title(loc="right") != "0 moves"
    assert (above.get_xlabel(), below.get_xlabel()) == ("", "turn")
    [legend] = figures[0].legends
    named = [text.get_text().split("//")[-1] for text in legend.get_texts()]
    assert named[:3] == [f"10.0.3.{number}:8000" for number in range(3)]
    for title, value in (
        ("Prompt tokens from the KV cache", 0.5),
        ("Time to first token, median", 0.1),
    ):
        lines = panels[title].lines
        curves = {line.get_label(): asarray(line.get_ydata()).tolist() for line in lines}
        assert curves == {name: [value] * 6 for name in ARM_TITLES.values()}
        assert panels[title].get_legend()
    assert panels["Time to first token, median"].get_xlabel() == "turn"


def test_ticks_are_whole_turns(tmp_path: Path, figures: list[Figure]) -> None:
    seen = played(3, turns=2)
    draw(seen, judge(seen, 0.9), tmp_path / "pins.svg")
    panels = {axes.get_title(loc="left"): axes for axes in figures[0].axes}
    ticks = panels["Time to first token, median"].get_xticks()
    assert all(float(tick).is_integer() for tick in ticks)


@pytest.mark.thorough
@pytest.mark.parametrize("workers", [3, 30, 100])
def test_the_names_of_the_workers_stand_below_all_else(
    tmp_path: Path, figures: list[Figure], workers: int
) -> None:
    seen = played(workers, sessions=2 * workers)
    draw(seen, judge(seen, 0.9), tmp_path / "pins.svg")
    [figure] = figures
    figure.draw_without_rendering()
    [legend] = figure.legends
    assert legend.get_window_extent().y0 >= 0
    boxes = [axes.get_tightbbox() for axes in figure.axes]
    assert legend.get_window_extent().y1 < min(box.y0 for box in boxes if box)


def test_worker_with_an_odd_name_is_drawn(tmp_path: Path) -> None:
    turns = tuple(Turn(arm, 1, 1, "first", r"$\x$ $") for arm in ARMS)
    seen = Seen(Plan(GATEWAY, GATEWAY, model=r"$\x$"), turns)
    draw(seen, judge(seen, 0.9), tmp_path / "pins.png")
    assert (tmp_path / "pins.png").stat().st_size > 0


def test_svg_is_the_same_each_time(tmp_path: Path) -> None:
    seen = played(3)
    for name in ("a.svg", "b.svg"):
        draw(seen, judge(seen, 0.9), tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


@pytest.mark.thorough
@pytest.mark.parametrize(("sessions", "turns", "workers"), [(1, 2, 2), (200, 40, 30)])
def test_png_of_any_size_opens(tmp_path: Path, sessions: int, turns: int, workers: int) -> None:
    seen = played(workers, sessions, turns)
    draw(seen, judge(seen, 0.9), tmp_path / "pins.png")
    with Image.open(tmp_path / "pins.png") as image:
        image.load()
        assert image.format == "PNG"
        assert image.width > 1000


def test_what_is_not_known_is_said(tmp_path: Path) -> None:
    plan = Plan(GATEWAY, GATEWAY)
    turns = tuple(Turn(arm, 1, 1, "unknown", first_token_seconds=2.0) for arm in ARMS)
    for name, seen in (("nothing.svg", Seen(plan)), ("unknown.svg", Seen(plan, turns))):
        draw(seen, judge(seen, 0.9), tmp_path / name)
        root = ElementTree.parse(tmp_path / name).getroot()  # noqa: S314
        assert root.tag == f"{SVG}svg"


def test_picture_counts_no_moves_where_nobody_names_a_worker(
    tmp_path: Path, figures: list[Figure]
) -> None:
    turns = tuple(
        Turn(arm, session, number, "unknown")
        for arm in ARMS
        for session in range(1, 25)
        for number in range(1, 7)
    )
    named = [Turn(arm, 1, 1, "first", "http://w") for arm in ARMS[1:]]
    for seen in (turns, (*turns, *named)):
        run = Seen(Plan(GATEWAY, GATEWAY), seen)
        draw(run, judge(run, 0.9), tmp_path / "pins.svg")
    for figure in figures:
        texts = [axes.get_title(loc="right") for axes in figure.axes]
        texts += [text.get_text() for text in figure.texts]
        assert not [text for text in texts[:1] if "moves" in text]
        assert not [text for text in texts if "stayed" in text]
