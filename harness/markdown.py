"""Tables in Markdown, as the pages have them."""


def head(*columns: str) -> str:
    """Return the first two lines of a table: the first column has names, the others numbers."""
    return f"{row(*columns)}\n{row('---', *['---:'] * (len(columns) - 1))}"


def row(*cells: str) -> str:
    """Return a row of a table."""
    return f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |"
