"""Records what a growth changed in a graph, and makes the same changes in the graph of a fresh model.

ensures: the replayed graph has the code, attributes and sizes of the grown one; its tensors are the given ones, or
         zero where their size changed.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxgrow.errors import FileError, RewriteError
from fxgrow.graph.arguments import Path, argument_leaves, set_argument
from fxgrow.graph.code_lines import code_lines
from fxgrow.graph.graph import caller, compile_graph, copy_graph, named_tensors, same_kind
from fxgrow.ops.registry import may_change
from fxgrow.rewriting.transplant import changed_attributes
from fxgrow.rewriting.verify import check_shapes
from fxgrow.storage.example_inputs import Example
from fxgrow.storage.plain_tree import is_plain
from fxgrow.storage.recipe import CallSite, ChangedArgument, ChangedAttribute, GrowthStep, Recipe, keep_recipe
from fxgrow.tracing.opaque_functions import OpaqueFunction

#: arguments that a growth adds to a call of a norm or an attention which has none
_ADDED = {("eps",), ("scale",)}
_ADVICE = "Build the model as it was before it grew: the same class, with the same arguments."


def record(
    out: nn.Module, before: fx.GraphModule, after: fx.GraphModule, units: Mapping[str, int], method: str
) -> None:
    """Adds a growth to the recipe that it started with, unless it changed nothing, and keeps that with the result.

    `out` is what the user gets: the grown graph itself, or the module that holds its parameters.
    """
    old = Recipe.of(before)
    into = "graph" if isinstance(out, fx.GraphModule) and out is after else "module"
    # code of theirs that runs as it is, in one node, may keep sizes of the last batch on them
    running = {m.__dict__["owner"] for m in (*before.modules(), *after.modules()) if isinstance(m, OpaqueFunction)}
    ignored = running if into == "graph" else set()
    step = _growth_step(before, after, {name: k for name, k in units.items() if k}, method, ignored)
    steps = old.steps + ((step,) if step.sizes else ())
    code = old.code if old.code or old.steps else code_lines(before)
    new = Recipe(steps, old.example or Example.of(before), into, code)
    keep_recipe(out, new)
    if out is not after:
        keep_recipe(after, new)


def _growth_step(
    before: fx.GraphModule, after: fx.GraphModule, units: Mapping[str, int], method: str, ignored: Collection[nn.Module]
) -> GrowthStep:
    """Returns what is different in the second graph, a grown copy of the first."""
    new_tensors = named_tensors(after)
    sizes = {}
    for name, old in named_tensors(before).items():
        dims = enumerate(zip(old.shape, new_tensors[name].shape, strict=True))
        if changed := tuple((d, n, m) for d, (n, m) in dims if n != m):
            sizes[name] = changed
    attributes = [
        ChangedAttribute(path, *values)
        for path, module in after.named_modules()
        if path and module not in ignored
        for values in changed_attributes(before.get_submodule(path), module)
    ]
    new_nodes = {node.name: node for node in after.graph.nodes}
    numbers, erased = [], []
    for node, site in _call_sites(before.graph):
        new = new_nodes.get(node.name)
        if new is None:
            erased.append(site)
        else:
            numbers += [ChangedArgument(site, *values) for values in _changed_arguments(node, new)]
    return GrowthStep(units, method, sizes, tuple(attributes), tuple(numbers), tuple(erased))


def replayed(gm: fx.GraphModule, recipe: Recipe, given: Mapping[str, Tensor] | None = None) -> fx.GraphModule:
    """Returns a copy of the graph after the recipe's growths, with given tensors in place of its own or zeros.

    Raises `FileError` where the graph is not the one the recipe starts from.
    """
    given = given or {}
    replaced: dict[int, Tensor] = {}
    tensors = named_tensors(gm)
    for name, shape in sizes_after(tensors, recipe).items():
        t = tensors[name]
        if name in given:
            replaced[id(t)] = given[name]
        elif shape != t.shape and id(t) not in replaced:
            replaced[id(t)] = same_kind(torch.zeros(shape, dtype=t.dtype, device=t.device), t)
    out, bounds = copy_graph(gm, replaced), _Bounds(recipe)
    for step in recipe.steps:
        _set_attributes(out, step, bounds)
        _change_code(out, step, bounds)
    if any(step.sizes for step in recipe.steps):
        compile_graph(out)
        try:
            check_shapes(out, {})
        except RewriteError as error:
            raise FileError(f"The model's code does not run with the recipe's sizes: {error} {_ADVICE}") from error
    keep_recipe(out, recipe)
    return out


def sizes_after(tensors: Mapping[str, Tensor], recipe: Recipe, constants: bool = True) -> dict[str, torch.Size]:
    """Returns the shapes of parameters and buffers after the recipe's growths.

    Raises `FileError` where a tensor is missing, or has another size than the recipe starts from. Without `constants`
    there may be none of those that the model's code makes, which only its graph has names for.
    """
    shapes = {name: list(t.shape) for name, t in tensors.items()}
    for number, step in enumerate(recipe.steps, 1):
        for name, dims in step.sizes.items():
            if name not in shapes:
                if not constants and "." not in name:
                    continue
                raise FileError(f"The model has no tensor {name!r}, which growth {number} widens. {_ADVICE}")
            for d, before, after in dims:
                size = shapes[name][d] if d < len(shapes[name]) else None
                if size != before:
                    raise FileError(
                        f"Dimension {d} of {name!r} is {size} in this model ({list(tensors[name].shape)}), and growth "
                        f"{number} of the recipe takes it from {before} to {after}. {_ADVICE}"
                    )
                shapes[name][d] = after
    return {name: torch.Size(shape) for name, shape in shapes.items()}


def _set_attributes(out: fx.GraphModule, step: GrowthStep, bounds: _Bounds) -> None:
    modules = dict(out.named_modules())
    for a in step.attributes:
        what, module = f"{a.module}.{a.name}", modules.get(a.module)
        if module is None or a.name not in vars(module):
            raise FileError(f"The model has no {what}, which the recipe sets. {_ADVICE}")
        value = vars(module)[a.name]
        if not may_change(module, a.name) or isinstance(value, (bool, str)):
            raise FileError(f"The recipe sets {what}, which is no size of a layer: no growth writes it.")
        if value != a.before:
            raise FileError(
                f"{what} is {value!r} in this model, and a growth of the recipe takes it from {a.before!r} to "
                f"{a.after!r}. {_ADVICE}"
            )
        if type(value) in (tuple, list, torch.Size):
            if type(a.after) is not type(value) or len(a.after) != len(value):
                raise FileError(f"The recipe makes {what} = {value!r} {a.after!r}, which is of another kind.")
            for old, new in zip(value, a.after, strict=True):
                bounds.check(what, old, new)
        else:
            bounds.check(what, value, a.after)
        setattr(module, a.name, a.after)


class _Bounds:
    """How large a number can become where sizes grow as a recipe says; sizes are those of tensors."""

    def __init__(self, recipe: Recipe) -> None:
        steps = [[dim[1:] for dims in step.sizes.values() for dim in dims] for step in recipe.steps]
        self.largest = max((after for sizes in steps for _, after in sizes), default=0)
        ratios = [max((after / max(1, before) for before, after in sizes), default=1.0) for sizes in steps]
        self.ratio = min(math.prod(max(1.0, ratio) for ratio in ratios), 1e9)

    def check(self, what: str, before: Any, after: Any) -> None:
        """Refuses a number that no growth makes of another one: a product of up to four sizes, or a part of it."""
        if before is None:  # an epsilon that followed the dtype, a scale that followed the size
            good = type(after) is float and 0 < after <= 1
        else:
            factor = self.ratio**4
            if type(before) is int:
                good = type(after) is int and abs(after) <= factor * (abs(before) + self.largest)
            else:
                good = type(after) is float and 0 < 1 / factor <= after / (before or after) <= factor
        if not good:
            raise FileError(f"The recipe makes {what} = {before!r} {after!r}, which follows from none of its sizes.")


def _change_code(out: fx.GraphModule, step: GrowthStep, bounds: _Bounds) -> None:
    """Sets numbers in calls, and erases nodes."""
    nodes = {site: node for node, site in _call_sites(out.graph)}
    missing = [site for site in (*(number.place for number in step.numbers), *step.erased) if site not in nodes]
    if missing:
        raise FileError(f"The model's code does not make {missing[0]}, which the recipe changes. {_ADVICE}")
    for number in step.numbers:
        node, before = nodes[number.place], number.before
        leaves = dict(argument_leaves(node))
        what = f"argument {'.'.join(map(str, number.path))} of {number.place}"
        if number.path not in leaves and number.path not in _ADDED:
            raise FileError(f"The model's code gives no {what}, which the recipe changes. {_ADVICE}")
        value = leaves.get(number.path)
        # a computed size may have become a number, and a number may have become -1, to be inferred
        known = is_plain(value) and before is not None and -1 not in (value, before)
        if known and (value != before or type(value) is not type(before)):
            raise FileError(
                f"{number.place} takes {value!r} in this model's code, and a growth of the recipe takes it from "
                f"{before!r} to {number.after!r}. {_ADVICE}"
            )
        now = value.meta.get("val") if isinstance(value, fx.Node) else value
        if -1 not in (now, number.after) and (now is value or type(now) in (int, float)):
            bounds.check(what, now, number.after)
        set_argument(node, number.path, number.after)
    for site in reversed(step.erased):
        if nodes[site].users or not isinstance(nodes[site].meta.get("val"), (int, float)):
            raise FileError(f"This model's code uses {site} elsewhere, and the recipe leaves it out. {_ADVICE}")
        out.graph.erase_node(nodes[site])


def _call_sites(graph: fx.Graph) -> Iterator[tuple[fx.Node, CallSite]]:
    """Yields each call of a graph with its module, its target, and its number among that module's calls of it."""
    counts: Counter[tuple[str, str]] = Counter()
    for node in graph.nodes:
        if node.op in ("call_function", "call_method", "call_module"):
            target: Any = node.target
            if node.op == "call_function":
                target = f"{getattr(target, '__module__', '')}.{getattr(target, '__qualname__', target)}"
            key = caller(node), f".{target}" if node.op == "call_method" else target
            yield node, CallSite(*key, counts[key])
            counts[key] += 1


def _changed_arguments(node: fx.Node, new: fx.Node) -> Iterator[tuple[Path, Any, Any]]:
    """Yields path, old and new value of the arguments that growth changed in a node."""
    old = dict(argument_leaves(node))
    for path, after in argument_leaves(new):
        before = old.get(path)
        if isinstance(after, fx.Node):
            same = isinstance(before, fx.Node) and before.name == after.name
        else:
            same = type(before) is type(after) and (before == after or before != before)
        if same:
            continue
        if not isinstance(after, (int, float)):
            raise RewriteError(
                f"Growth has put {after!r} into node {node.name!r}, which a recipe cannot hold. Please report the "
                "model."
            )
        yield path, before if isinstance(before, (int, float)) else None, after
