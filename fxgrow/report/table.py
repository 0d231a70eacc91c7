"""Plain text in columns, at most 120 wide, without a dependency."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

#: what a terminal and a pull request show without wrapping
WIDTH = 120
GAP = "  "


def few(names: Sequence[str], most: int) -> str:
    """The first names, and how many more there are.

    Example:
        >>> few(("conv1", "conv2", "conv3"), 2)
        'conv1, conv2 +1'
    """
    more = f" +{len(names) - most}" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def count(n: int, what: str) -> str:
    """A number with its noun.

    Example:
        >>> count(1, "width"), count(2_000, "width")
        ('1 width', '2,000 widths')
    """
    return f"{n:,} {what}{'' if n == 1 else 's'}"


@dataclass(frozen=True)
class Column:
    """A column; where the table is too wide, its texts lose their middle (shrink), or, of the last one, wrap."""

    title: str
    right: bool = False
    shrink: bool = False
    wrap: bool = False


def number(title: str) -> Column:
    """A column of numbers."""
    return Column(title, right=True)


def text(title: str) -> Column:
    """A column of texts, which are shortened where the table is too wide."""
    return Column(title, shrink=True)


def shorten(text: str, width: int) -> str:
    """A text of at most `width` characters; what is too long loses its middle.

    Example:
        >>> shorten("features.denseblock1.denselayer1.conv1", 20)
        'features.d…er1.conv1'
    """
    if len(text) <= width:
        return text
    tail = (width - 1) // 2
    return text[: width - 1 - tail] + "…" + text[len(text) - tail :]


def table(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> str:
    """Rows under their headings, with a rule between: lines of at most `WIDTH` characters."""
    widths = _fit(columns, rows)
    titles = [c.title.split("\n") for c in columns]
    height = max(map(len, titles))
    # titles stand on the rule
    heads = zip(*([""] * (height - len(title)) + title for title in titles), strict=True)
    lines = [_line(columns, [shorten(text, w) for text, w in zip(head, widths, strict=True)], widths) for head in heads]
    lines.append("─" * (sum(widths) + len(GAP) * (len(widths) - 1)))
    indent = " " * (sum(widths[:-1]) + len(GAP) * (len(widths) - 1))
    for row in rows:
        cells = [shorten(cell, width) for cell, width in zip(row, widths, strict=True)]
        more: list[str] = []
        if columns[-1].wrap:
            cells[-1], *more = textwrap.wrap(row[-1], widths[-1]) or [""]
        lines += [_line(columns, cells, widths), *(indent + text for text in more)]
    return "\n".join(lines)


def _line(columns: Sequence[Column], cells: Sequence[str], widths: Sequence[int]) -> str:
    padded = [
        cell.rjust(width) if column.right else cell.ljust(width)
        for column, cell, width in zip(columns, cells, widths, strict=True)
    ]
    return GAP.join(padded).rstrip()


def _fit(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> list[int]:
    """The natural widths; while they are too much, the widest column that may shrink loses one character."""
    widths = [
        max(len(text) for text in (*c.title.split("\n"), *(row[i] for row in rows))) for i, c in enumerate(columns)
    ]
    shrinkable = [i for i, c in enumerate(columns) if c.shrink or c.wrap]
    while shrinkable and sum(widths) + len(GAP) * (len(widths) - 1) > WIDTH:
        widest = max(shrinkable, key=lambda i: widths[i])
        widths[widest] -= 1
    return widths
