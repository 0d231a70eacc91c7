"""The structure of the library: packages import one way, files are small, a class name means one thing.

The tables of this file are the house rules; `docs/architecture.md` says what each package is for.
"""

from __future__ import annotations

import ast
import inspect
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import networkx
import pytest

import fxgrow

ROOT = Path(__file__).parents[1]
LIBRARY = ROOT / "fxgrow"
#: each imports only those before it
PACKAGES = (
    "axes", "errors", "graph", "ops", "analysis", "distributed", "data", "storage", "tracing", "rewriting",
    "statistics",
    "initialisers", "candidates", "checkpoints", "report", "transfer", "pipeline", "training", "integrations",
    "onnx_export", "__init__",
)  # fmt: skip
LINES_OF_A_FILE = 400
LINES_OF_A_FUNCTION = 60
PARAMETERS = 7
# 22,000 for what the house held when it was built, 4,000 for the idioms that capture and the rules read since, and
# 4,000 for what makes growth safe to leave on: bounds, checks of files and of requests.
LINES = 30_000


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 2 else parts)


SOURCES = {module_name(path): ast.parse(path.read_text()) for path in sorted(LIBRARY.rglob("*.py"))}


def imported(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Modules of the library that a file imports, lazily or for types alone too, with the lines."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module is not None and node.module.split(".")[0] == "fxgrow":
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield (name if name in SOURCES else node.module), node.lineno
        elif isinstance(node, ast.Import):
            yield from ((a.name, node.lineno) for a in node.names if a.name in SOURCES)


def package(name: str) -> str:
    return name.split(".")[1] if "." in name else "__init__"


def functions() -> Iterator[tuple[str, ast.FunctionDef]]:
    for name, tree in SOURCES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                yield f"{name}:{node.lineno} {node.name}", node


def test_every_package_has_a_place_in_the_order() -> None:
    assert {package(name) for name in SOURCES} == set(PACKAGES)


def test_packages_import_one_way() -> None:
    order = {name: i for i, name in enumerate(PACKAGES)}
    upwards = [
        f"{name}:{line} imports {other}"
        for name, tree in SOURCES.items()
        for other, line in imported(tree)
        if order[package(other)] > order[package(name)]
    ]
    assert upwards == []


def test_no_circle_between_files() -> None:
    graph = networkx.DiGraph(
        (name, other) for name, tree in SOURCES.items() for other, _ in imported(tree) if other != name
    )
    circles = [sorted(part) for part in networkx.strongly_connected_components(graph) if len(part) > 1]
    assert circles == []


def test_no_package_bears_the_name_of_a_public_function() -> None:
    assert {package(name) for name in SOURCES} & set(fxgrow.__all__) == set()


def test_files_and_functions_are_small() -> None:
    lengths = {name: len((ROOT / path).read_text().splitlines()) for name, path in files()}
    assert {name: n for name, n in lengths.items() if n > LINES_OF_A_FILE} == {}
    assert sum(lengths.values()) <= LINES
    long = {name: body_length(node) for name, node in functions()}
    assert {name: n for name, n in long.items() if n > LINES_OF_A_FUNCTION} == {}


def files() -> Iterator[tuple[str, Path]]:
    for path in sorted(LIBRARY.rglob("*.py")):
        yield module_name(path), path


def body_length(node: ast.FunctionDef) -> int:
    """Lines of a function, its signature included and its docstring left out."""
    doc = node.body[0] if ast.get_docstring(node, clean=False) is not None else None
    spent = 0 if doc is None or doc.end_lineno is None else doc.end_lineno - doc.lineno + 1
    assert node.end_lineno is not None
    return node.end_lineno - node.lineno + 1 - spent


def test_private_functions_take_few_parameters() -> None:
    """Constructors of records, public functions and public methods apart."""
    many = {}
    public = {name.rpartition(".")[2] for name in surface()}
    for name, node in functions():
        args = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
        if node.name != "__init__" and node.name not in public and len(args) > PARAMETERS:
            many[name] = len(args)
    assert many == {}


def test_a_class_name_means_one_thing() -> None:
    count = Counter(node.name for tree in SOURCES.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef))
    # each integration has the callback of its library
    assert [name for name, n in count.items() if n > 1 and name != "GrowthCallback"] == []


def test_a_public_function_name_means_one_thing() -> None:
    """Functions that other files import: one name, one function."""
    defined: dict[str, set[str]] = {}
    for name, tree in SOURCES.items():
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                defined.setdefault(node.name, set()).add(name)
    shared = {alias.name for tree in SOURCES.values() for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)
              and (node.module or "").startswith("fxgrow") for alias in node.names}  # fmt: skip
    assert {name: sorted(where) for name, where in defined.items() if len(where) > 1 and name in shared} == {}


def parameters(thing: object) -> list[str]:
    """Names, kinds and defaults; annotations may name private classes."""
    return [str(p.replace(annotation=inspect.Parameter.empty)) for p in inspect.signature(thing).parameters.values()]  # type: ignore[arg-type]


def surface() -> dict[str, object]:
    """Public names with their parameters; of classes those of the constructor and of public methods."""
    out: dict[str, object] = {}
    for name in sorted(fxgrow.__all__):
        thing = getattr(fxgrow, name)
        if inspect.isclass(thing) and issubclass(thing, Exception):
            out[name] = thing.__base__.__name__
            continue
        out[name] = parameters(thing)
        for attribute, value in sorted(vars(thing).items()) if inspect.isclass(thing) else ():
            method = value.__func__ if isinstance(value, (staticmethod, classmethod)) else value
            if not attribute.startswith("_") and inspect.isfunction(method):
                out[f"{name}.{attribute}"] = parameters(method)
    return out


def test_the_public_surface_is_the_stored_one() -> None:
    """A change of the surface is a decision: `python -m tests.test_imports` stores the new one."""
    assert surface() == json.loads((ROOT / "tests" / "public_surface.json").read_text())


@pytest.mark.parametrize("path", sorted(p.relative_to(ROOT) for p in (ROOT / "tests").rglob("test_*.py")), ids=str)
def test_tests_mirror_the_packages(path: Path) -> None:
    folder = path.parts[1] if len(path.parts) > 2 else ""
    assert folder in {*PACKAGES, "end_to_end", ""}


if __name__ == "__main__":
    (ROOT / "tests" / "public_surface.json").write_text(json.dumps(surface(), indent=1) + "\n")
