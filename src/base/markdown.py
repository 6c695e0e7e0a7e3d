"""Markdown tables, as every script writes them."""

from collections.abc import Mapping, Sequence


def table_line(cells: Sequence[str], widths: Sequence[int] = ()) -> str:
    """One line of a table. widths: the least width of each cell."""
    cells = [cell.ljust(width) for cell, width in zip(cells, widths, strict=True)] if widths else cells
    return f"| {' | '.join(cells)} |\n"


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]] = ()) -> str:
    """A whole table. Each column is as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(head, *lines, strict=True)]
    return "".join(table_line(line, widths) for line in (head, ["-" * width for width in widths], *lines))


def dict_table(lines: Sequence[Mapping[str, str]]) -> str:
    """A table of lines given as {head: cell}, all with the same heads. Columns of empty cells are left out."""
    heads = [head for head in lines[0] if any(line[head] for line in lines)]
    return markdown(heads, [[line[head] for head in heads] for line in lines])
