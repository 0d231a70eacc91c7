"""The table of methods: the documentation lists it, docstrings take the names from it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import fxgrow
from fxgrow.initialisers.registry import method_names

ROOT = Path(__file__).parents[2]


def listed_in_the_readme() -> list[str]:
    (row,) = re.findall(r"^\| `method` \|(.*)\|$", (ROOT / "README.md").read_text(), re.MULTILINE)
    return re.findall(r"`([a-z0-9-]+)`", row)


def listed_in_the_method_page() -> list[str]:
    text = (ROOT / "docs" / "method.md").read_text()
    (table,) = re.findall(r"^\| method \| new units \|.*\n\|[-|]+\n((?:\|.*\n)+)", text, re.MULTILINE)
    return re.findall(r"^\| `([a-z0-9-]+)` \|", table, re.MULTILINE)


def test_the_documentation_lists_every_method() -> None:
    assert sorted(listed_in_the_readme()) == method_names()
    # the default has a section of its own
    assert sorted(["default", *listed_in_the_method_page()]) == method_names()


@pytest.mark.parametrize("function", [fxgrow.grow, fxgrow.profile])
def test_docstrings_list_every_method(function: object) -> None:
    assert ", ".join(method_names()) in (function.__doc__ or "")
