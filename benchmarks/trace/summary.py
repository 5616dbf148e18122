"""Print all tables of docs/traces.md as one: a row for each of them, a column for each main arm.

python -m benchmarks.trace.summary
"""

import re
from collections.abc import Iterator

from harness.markdown import head, row
from harness.processes import ROOT

PAGE = ROOT / "docs/traces.md"
ARMS = (
    "manual min_group",
    "manual min_group, overload protection",
    "consistent_hashing",
    "cache_aware, no key",
    "power_of_two, no key",
    "random, no key",
    "manual min_group, group key",
)
OF_THE_LIMIT, ALL_DONE = 2, 5  # the columns of a table


def rows(page: str) -> Iterator[str]:
    """Yield a row for each table that has one of the arms."""
    heading, room = "", ""
    found: dict[str, str] = {}
    for line in [*page.splitlines(), "# end"]:
        if line.startswith(("#", "**Room ")):
            if any(arm in found for arm in ARMS):
                yield row(f"{link(heading)}: {room}", *(found.get(arm, "-") for arm in ARMS))
            found = {}
        if line.startswith("#"):
            heading = line.lstrip("# ")
        elif line.startswith("**Room "):
            room = line.lstrip("*").partition(" of the sessions:")[0].partition(" sessions:")[0]
            room = room[0].lower() + room[1:]
        elif line.startswith("| ") and len(cells := line.strip("| ").split(" | ")) > ALL_DONE:
            found[cells[0]] = f"{median(cells[OF_THE_LIMIT])} in {median(cells[ALL_DONE])}"


def link(heading: str) -> str:
    """Return a link to the section of docs/traces.md."""
    anchor = re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
    return f"[{heading}](traces.md#{anchor})"


def median(cell: str) -> str:
    """Return the figure of a cell without its range."""
    return re.sub(r" \(.*\)", "", cell)


def main() -> None:
    """Print the table."""
    print(head("", *ARMS), *rows(PAGE.read_text("utf-8")), sep="\n")


if __name__ == "__main__":
    main()
