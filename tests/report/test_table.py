"""Tables: they fit, and nothing that matters is cut."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from fxgrow.report.table import WIDTH, Column, shorten, table

NAMES = st.text("abcdefgh.12", min_size=1, max_size=150)


@given(NAMES, st.integers(3, 60))
def test_shorten_keeps_both_ends(text: str, width: int) -> None:
    short = shorten(text, width)
    if len(text) <= width:
        assert short == text
    else:
        head, tail = short.split("…")
        assert len(short) == width
        assert head and text.startswith(head) and text.endswith(tail)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(NAMES, st.integers(0, 10**9).map(str), NAMES, NAMES), min_size=1, max_size=6))
def test_tables_fit_whatever_the_names(rows: list[tuple[str, ...]]) -> None:
    columns = [Column("a", shrink=True), Column("n", right=True), Column("b", shrink=True), Column("c", wrap=True)]
    lines = table(columns, rows).splitlines()
    assert max(map(len, lines)) <= WIDTH
    # numbers are never cut, and what wraps is all there
    assert [n for line in lines for n in line.split() if n in {r[1] for r in rows}]
    start = lines[0].rindex("c")
    assert "".join(line[start:].strip() for line in lines[2:]) == "".join(r[3] for r in rows)


def test_titles_of_two_lines_stand_on_the_rule() -> None:
    lines = table([Column("a"), Column("two\nlines", right=True)], [("x", "1")]).splitlines()
    assert lines == ["     two", "a  lines", "────────", "x      1"]
