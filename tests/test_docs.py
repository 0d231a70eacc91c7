"""The documentation names what is there: files, packages, benchmarks, links."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.test_imports import PACKAGES

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")),
    *sorted(ROOT.glob("docs/*.md")),
    *sorted(ROOT.glob("benchmarks/*.md")),
]


def anchors(page: Path) -> set[str]:
    """Anchors of the headings as GitHub makes them."""
    heads = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


def test_contributing_names_files_that_exist() -> None:
    (table,) = re.findall(r"^\| question \| file \|\n(.*?)\n\n", (ROOT / "CONTRIBUTING.md").read_text(), re.M | re.S)
    files = re.findall(r"`([\w/]+\.py)`", table)
    assert len(files) > 20
    assert [file for file in files if not (ROOT / "fxgrow" / file).exists()] == []


def test_every_package_has_a_paragraph_in_import_order() -> None:
    names = re.findall(r"^\*\*(\w+)\.\*\*", (ROOT / "docs" / "architecture.md").read_text(), re.MULTILINE)
    assert names == [name for name in PACKAGES if name != "__init__"]


def test_every_benchmark_is_listed() -> None:
    listed = re.findall(r"^\| .* \| `(\w+)` \|", (ROOT / "benchmarks" / "README.md").read_text(), re.MULTILINE)
    modules = [p.stem for p in (ROOT / "benchmarks").glob("[a-z]*.py")]
    packages = [p.parent.name for p in (ROOT / "benchmarks").glob("*/__main__.py")]
    assert sorted(listed) == sorted(modules + packages)


def test_every_promise_of_safety_has_a_test() -> None:
    rows = re.findall(r"^\| (?!promise|-)(.*) \| (.*) \|$", (ROOT / "docs" / "safety.md").read_text(), re.MULTILINE)
    assert len(rows) > 40
    for promise, tests in rows:
        named = re.findall(r"`([^`]*)`", tests)
        assert named, promise
        for test in named:
            file, _, name = test.partition("::")
            tree = ast.parse((ROOT / file).read_text())
            functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
            assert file.startswith("tests/") and (not name or name in functions), test
