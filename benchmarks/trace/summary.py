"""Print all tables of docs/traces.md as one: a row for each of them, a column for each main policy.

python -m benchmarks.trace.summary
"""

import re
from collections.abc import Iterator

from harness.markdown import head, row
from harness.processes import ROOT

PAGE = ROOT / "docs/traces.md"
# Each column has arms, of which the first that a table has counts. Broken lines keep it narrow.
COLUMNS = {
    "min_group": ("manual min_group",),
    "min_group,<br>overload<br>protection": ("manual min_group, overload protection",),
    "consistent_<br>hashing": ("consistent_hashing",),
    "cache_aware,<br>no key": ("cache_aware, no key",),
    "power_of_two<br>or random,<br>no key": ("power_of_two, no key", "random, no key"),
    "min_group,<br>group key": ("manual min_group, group key",),
}
OF_THE_LIMIT, ALL_DONE = 2, 5  # the columns of a table


def rows(page: str) -> Iterator[str]:
    """Yield a row for each table that has an arm of a column."""
    for name, played in tables(page).items():
        cells = [
            next((played[arm] for arm in arms if arm in played), "-") for arms in COLUMNS.values()
        ]
        if {*cells} != {"-"}:
            yield row(name, *cells)


def tables(page: str) -> dict[str, dict[str, str]]:
    """Return the two figures of each arm, by the section and the room of its table."""
    found: dict[str, dict[str, str]] = {}
    section = name = ""
    for line in page.splitlines():
        if line.startswith("#"):
            section = name = link(line.lstrip("# "))
        elif line.startswith("**Room "):
            room = line.lstrip("*").partition(" of the sessions:")[0].partition(" sessions:")[0]
            name = f"{section}: {room[0].lower()}{room[1:]}"
        elif line.startswith("| ") and len(cells := line.strip("| ").split(" | ")) > ALL_DONE:
            figures = median(cells[OF_THE_LIMIT]), median(cells[ALL_DONE])
            found.setdefault(name, {})[cells[0]] = "<br>".join(figures)
    return found


def link(heading: str) -> str:
    """Return a link to the section of docs/traces.md."""
    anchor = re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
    return f"[{heading}](traces.md#{anchor})"


def median(cell: str) -> str:
    """Return the figure of a cell without its range."""
    return re.sub(r" \(.*\)", "", cell)


def measured(page: str) -> str:
    """Say at which commits the page's tables were measured, and on which days."""
    found = re.findall(
        r"^\*`python -m benchmarks trace .*; commit (\w+); (\S+) ", page, re.MULTILINE
    )
    commits = ", ".join(f"{commit} ({day})" for commit, day in dict.fromkeys(found))
    return f"The tables were measured at these commits: {commits}."


def main() -> None:
    """Print the table, and of which commits it is."""
    page = PAGE.read_text("utf-8")
    print(head("", *COLUMNS), *rows(page), "", measured(page), sep="\n")


if __name__ == "__main__":
    main()
