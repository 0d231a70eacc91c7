"""What a growth changed in a graph, and the same changes on the graph of a fresh model.

requires: for `change`, a captured graph and its grown copy; for `replayed`, a captured graph of the model that the
          first step was taken from.
ensures:  the replayed graph has the code, attributes and sizes of the grown one; its tensors are the given ones, or
          zero where their size changed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxgrow.errors import FileError, RewriteError
from fxgrow.graph.graph import caller, compile_graph, copy_graph, named_tensors, same_kind
from fxgrow.rewriting.transplant import changed_attributes
from fxgrow.rewriting.verify import check_shapes
from fxgrow.storage.example_inputs import Example
from fxgrow.storage.plain_tree import is_plain
from fxgrow.storage.recipe import CallSite, ChangedArgument, ChangedAttribute, GrowthStep, Recipe, keep_recipe


def record(
    out: nn.Module, before: fx.GraphModule, after: fx.GraphModule, units: Mapping[str, int], method: str
) -> None:
    """Keeps the recipe of what a growth returns: the one it started with, and this growth where it changed anything.

    Args:
        out: what is returned, the grown graph itself or the module that holds its parameters.
        before: the captured graph.
        after: the grown one.
        units: that were added, per width.
        method: what made them.
    """
    old = Recipe.of(before)
    step = change(before, after, {name: k for name, k in units.items() if k}, method)
    into = "graph" if isinstance(out, fx.GraphModule) and out is after else "module"
    new = Recipe(old.steps + ((step,) if step.sizes else ()), old.example or Example.of(before), into)
    keep_recipe(out, new)
    if out is not after:
        keep_recipe(after, new)


def change(before: fx.GraphModule, after: fx.GraphModule, units: Mapping[str, int], method: str) -> GrowthStep:
    """What is different in the second graph, a grown copy of the first."""
    ours, theirs = named_tensors(before), named_tensors(after)
    sizes = {name: _grown(old, theirs[name]) for name, old in ours.items() if old.shape != theirs[name].shape}
    attributes = []
    for path, module in list(after.named_modules())[1:]:
        attributes += [
            ChangedAttribute(path, *change) for change in changed_attributes(before.get_submodule(path), module)
        ]
    node_map = {node.name: node for node in after.graph.nodes}
    numbers, erased = [], []
    for node, place in _places(before.graph):
        twin = node_map.get(node.name)
        if twin is None:
            erased.append(place)
        else:
            numbers += [ChangedArgument(place, path, old, new) for path, old, new in _changes(node, twin)]
    return GrowthStep(units, method, sizes, tuple(attributes), tuple(numbers), tuple(erased))


def replayed(gm: fx.GraphModule, recipe: Recipe, given: Mapping[str, Tensor] | None = None) -> fx.GraphModule:
    """A copy of the graph after the recipe's growths.

    Args:
        gm: a captured graph; it is left as it is.
        recipe: what to replay.
        given: tensors to take, by name; the graph's own, or zeros, for others.

    Raises:
        FileError: the graph is not the one the recipe starts from.
    """
    given = given or {}
    replaced: dict[int, Tensor] = {}
    old = named_tensors(gm)
    for name, shape in sizes_after(old, recipe).items():
        t = old[name]
        if name in given:
            replaced[id(t)] = given[name]
        elif shape != t.shape and id(t) not in replaced:
            zeros = torch.zeros(shape, dtype=t.dtype, device=t.device)
            replaced[id(t)] = same_kind(zeros, t)
    out = copy_graph(gm, replaced)
    for step in recipe.steps:
        _set_attributes(out, step)
        _set_numbers(out, step)
    if any(step.sizes for step in recipe.steps):
        compile_graph(out)
        try:
            check_shapes(out, {})
        except RewriteError as error:
            raise FileError(f"The model's code does not run with the recipe's sizes: {error} {_OTHER}") from error
    keep_recipe(out, recipe)
    return out


def sizes_after(tensors: Mapping[str, Tensor], recipe: Recipe, constants: bool = True) -> dict[str, torch.Size]:
    """The shapes of parameters and buffers after the recipe's growths.

    Args:
        tensors: before them, by name.
        recipe: the growths.
        constants: whether tensors that a model's code makes, and only its graph has names for, must be there.

    Raises:
        FileError: a tensor is missing, or has another size than the recipe starts from.
    """
    shapes = {name: list(t.shape) for name, t in tensors.items()}
    for number, step in enumerate(recipe.steps, 1):
        for name, dims in step.sizes.items():
            if name not in shapes:
                if not constants and "." not in name:
                    continue
                raise FileError(f"The model has no tensor {name!r}, which growth {number} widens. {_OTHER}")
            for d, before, after in dims:
                found = shapes[name][d] if d < len(shapes[name]) else None
                if found != before:
                    raise FileError(
                        f"Dimension {d} of {name!r} is {found} in this model ({list(tensors[name].shape)}), and growth "
                        f"{number} of the recipe takes it from {before} to {after}. {_OTHER}"
                    )
                shapes[name][d] = after
    return {name: torch.Size(shape) for name, shape in shapes.items()}


def _grown(old: Tensor, new: Tensor) -> tuple[tuple[int, int, int], ...]:
    return tuple((d, n, m) for d, (n, m) in enumerate(zip(old.shape, new.shape, strict=True)) if n != m)


_OTHER = "Build the model as it was before it grew: the same class, with the same arguments."


def _set_attributes(out: fx.GraphModule, step: GrowthStep) -> None:
    for a in step.attributes:
        try:
            module = out.get_submodule(a.module)
            found = vars(module)[a.name]
        except (AttributeError, KeyError):
            raise FileError(f"The recipe sets {a.module}.{a.name}, which is not there. {_OTHER}") from None
        if found != a.before:
            raise FileError(
                f"{a.module}.{a.name} is {found!r} in this model, and a growth of the recipe takes it from "
                f"{a.before!r} to {a.after!r}. {_OTHER}"
            )
        setattr(module, a.name, a.after)


def _set_numbers(out: fx.GraphModule, step: GrowthStep) -> None:
    at = {place: node for node, place in _places(out.graph)}
    missing = [p for p in (*(n.place for n in step.numbers), *step.erased) if p not in at]
    if missing:
        raise FileError(f"The recipe changes {missing[0]}, which this model's code does not make. {_OTHER}")
    for n in step.numbers:
        node = at[n.place]
        found = _leaf(node, n.path)
        plain = is_plain(found) and is_plain(n.before) and found != -1 and n.before != -1
        if plain and found != n.before:  # what was computed may have become a number, or one to infer
            raise FileError(
                f"{n.place} takes {found!r} in this model's code, and a growth of the recipe takes it from "
                f"{n.before!r} to {n.after!r}. {_OTHER}"
            )
        first, *rest = n.path
        if isinstance(first, str):
            node.kwargs = {**node.kwargs, first: _with(node.kwargs.get(first), rest, n.after)}
        else:
            node.args = tuple(_with(a, rest, n.after) if i == first else a for i, a in enumerate(node.args))
    for place in reversed(step.erased):
        if at[place].users:
            raise FileError(f"The recipe leaves out {place}, which this model's code uses elsewhere. {_OTHER}")
        out.graph.erase_node(at[place])


def _places(graph: fx.Graph) -> Iterator[tuple[fx.Node, CallSite]]:
    seen: Counter[tuple[str, str]] = Counter()
    for node in graph.nodes:
        if node.op in ("call_function", "call_method", "call_module"):
            key = caller(node), _target(node)
            yield node, CallSite(*key, seen[key])
            seen[key] += 1


def _target(node: fx.Node) -> str:
    if isinstance(node.target, str):
        return node.target if node.op == "call_module" else f".{node.target}"
    return f"{getattr(node.target, '__module__', '')}.{getattr(node.target, '__qualname__', node.target)}"


def _changes(node: fx.Node, twin: fx.Node) -> Iterator[tuple[tuple[int | str, ...], Any, Any]]:
    old = dict(_leaves((node.args, node.kwargs)))
    for path, new in _leaves((twin.args, twin.kwargs)):
        before = old.get(path)
        if isinstance(new, fx.Node):
            same = isinstance(before, fx.Node) and before.name == new.name
        else:
            same = type(before) is type(new) and (before == new or before != before)
        if same:
            continue
        if not isinstance(new, (int, float)):
            raise RewriteError(
                f"Growth has put {new!r} into node {node.name!r}, which no recipe can hold. Please report the model."
            )
        # without whether it is in args or kwargs, which the type of the next part says
        yield path[1:], before if isinstance(before, (int, float)) else None, new


def _leaves(value: Any, path: tuple[int | str, ...] = ()) -> Iterator[tuple[tuple[int | str, ...], Any]]:
    if isinstance(value, (tuple, list)):
        for i, item in enumerate(value):
            yield from _leaves(item, (*path, i))
    elif isinstance(value, slice):
        yield from _leaves((value.start, value.stop, value.step), path)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(item, (*path, key))
    else:
        yield path, value


def _leaf(node: fx.Node, path: tuple[int | str, ...]) -> Any:
    for p, value in _leaves((node.args, node.kwargs)):
        if p[1:] == path:
            return value
    return None


def _with(argument: Any, path: list[Any], value: Any) -> Any:
    if not path:
        return value
    whole = isinstance(argument, slice)
    items = [argument.start, argument.stop, argument.step] if whole else list(argument)
    items[path[0]] = _with(items[path[0]], path[1:], value)
    if whole:
        return slice(*items)
    return type(argument)(items) if type(argument) in (list, tuple) else tuple(items)
