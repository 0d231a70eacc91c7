"""Arguments of a node by their paths: a position or a keyword, then indices into containers (0 to 2 in a slice)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from torch import fx

Path: TypeAlias = tuple[int | str, ...]


def argument_leaves(node: fx.Node) -> Iterator[tuple[Path, Any]]:
    """Yields path and value of everything in a node's arguments that is no container."""
    yield from _leaves(node.args, ())
    yield from _leaves(node.kwargs, ())


def _leaves(value: Any, path: Path) -> Iterator[tuple[Path, Any]]:
    if isinstance(value, slice):
        value = value.start, value.stop, value.step
    if isinstance(value, (tuple, list, Mapping)):
        for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _leaves(item, (*path, key))
    else:
        yield path, value


def get_argument(node: fx.Node, path: Path) -> Any:
    """Returns the argument at a path: None where there is none, a node where the rest of the path is in its value."""
    value: Any = None if not path else node.kwargs if isinstance(path[0], str) else node.args
    for part in path:
        if isinstance(value, fx.Node):
            return value
        if isinstance(value, slice):
            value = value.start, value.stop, value.step
        try:
            value = value[part]
        except (KeyError, IndexError, TypeError):
            return None
    return value


def set_argument(node: fx.Node, path: Path, value: Any) -> None:
    """Replaces one value in a node's arguments."""
    node.args, node.kwargs = replaced_argument(node.args, node.kwargs, path, value)


def replaced_argument(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], path: Path, value: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns arguments with one value replaced."""
    if isinstance(path[0], str):
        return args, replaced_item(kwargs, path, value)
    return replaced_item(args, path, value), dict(kwargs)


def replaced_item(container: Any, path: Sequence[int | str], value: Any) -> Any:
    """Returns a copy of a container with one item replaced, and `value` itself for an empty path."""
    if not path:
        return value
    first, *rest = path
    if isinstance(container, Mapping):
        return {**container, first: replaced_item(container.get(first), rest, value)}
    ends = isinstance(container, slice)
    items: Any = [container.start, container.stop, container.step] if ends else list(container)
    items[first] = replaced_item(items[first], rest, value)
    return slice(*items) if ends else tuple(items) if isinstance(container, tuple) else items
