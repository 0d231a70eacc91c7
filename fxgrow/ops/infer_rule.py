"""Infers a rule for an operator that has none, by an equivariance test on random tensors.

requires: a node without a rule whose operator owns no parameters: a function, a method or a plain module.
ensures:  an axis along which the operator is equivariant to selecting units is followed to the output; any other axis
          is pinned with the reason. Rules are cached by operator and the shapes of its arguments.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxgrow.axes.axes import Axis, Dims, Segment, UnitVar, axis_of, dims_in, fixed, is_fixed, length, resolve
from fxgrow.axes.records import Reason
from fxgrow.graph.node_functions import in_mode
from fxgrow.ops.context import Context, Unsupported
from fxgrow.ops.equivariance_test import Call, EquivarianceTest, InferredRule, InputDim, NotEquivariant
from fxgrow.ops.random_test_inputs import Layout

#: an operator of torch is tested at smaller sizes if its tensors have more entries than this ...
SMALL = 1 << 16
#: ... and on at most this many; other functions on at most `OTHER` entries and `ARGUMENTS` tensors
LARGE = 1 << 22
OTHER, ARGUMENTS = 1 << 18, 4
#: integer arguments up to this are dimensions or factors; a larger one may be a size
_LITERAL = 4
_CACHE_SIZE = 4096
#: a string says why there is no rule
_rules: dict[Any, InferredRule | str] = {}
_kept: dict[Any, bool] = {}


def infer_rule(ctx: Context, what: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The axes of the output of an operator without a rule.

    Args:
        ctx: of its node.
        what: its name for messages.
        args: with axes in place of tensors, as for a rule.
        kwargs: likewise.

    Raises:
        Unsupported: it cannot be tested, or the test failed.
    """
    unknown = f"{what} is not described by any rule"
    owns = ctx.module is not None and any(True for _ in (*ctx.module.parameters(), *ctx.module.buffers()))
    tensors, dims = _tensors(ctx, args, kwargs)
    if not tensors or owns:
        raise Unsupported(unknown)
    for d in dims:
        for axis in d:
            if length(axis) == 1 and not is_fixed(axis):
                ctx.pin(axis, "broadcast", "one unit may be repeated by an operator that no rule describes")
    axes = [
        ((i, k), math.gcd(*(s.inner for s in resolve(axis))))
        for i, d in enumerate(dims)
        for k, axis in enumerate(d)
        if length(axis) > 1 and not is_fixed(axis)
    ]
    rule = _cached_rule(ctx, tensors, axes)
    if isinstance(rule, str):
        raise Unsupported(f"{unknown}, and {rule}")
    for (i, k), message in rule.refused:
        ctx.pin(dims[i][k], "operator", f"{unknown}, and {message}")
    why = ctx.reason("operator", f"{unknown}, and {rule.refused[0][1]}") if rule.refused else None
    return _output_axes(ctx, rule, dims, why)


def _tensors(ctx: Context, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Tensor], list[Dims]]:
    """The tensors among the arguments, in order, and their axes."""
    values = pytree.tree_leaves(_values(ctx.node))
    dims = list(dims_in((args, kwargs)))
    tensors = [v for v in values if isinstance(v, Tensor)]
    if [tuple(t.shape) for t in tensors] != [tuple(map(length, d)) for d in dims]:
        raise Unsupported("an operator without a rule has arguments that are not plain tensors")
    return tensors, dims


def _values(node: fx.Node, training: bool | None = None) -> tuple[Any, Any]:
    """Arguments with the nodes' values (those of train or eval mode, if `training` is given), in plain containers."""

    def value(arg: Any) -> Any:
        if isinstance(arg, fx.Node):
            return arg.meta["val"] if training is None or not _is_switch(arg) else _switch(arg, training)
        if isinstance(arg, dict):
            return {k: value(v) for k, v in arg.items()}
        if isinstance(arg, slice):
            return slice(value(arg.start), value(arg.stop), value(arg.step))
        if isinstance(arg, list):
            return [value(v) for v in arg]
        return tuple(map(value, arg)) if type(arg) is tuple else arg

    return value(tuple(node.args)), value(dict(node.kwargs))


def _cached_rule(ctx: Context, tensors: list[Tensor], axes: list[tuple[InputDim, int]]) -> InferredRule | str:
    """The rule from the cache or from a test; a string says why there is none."""
    shapes = [tuple(t.shape) for t in tensors]
    dtypes = [t.dtype for t in tensors]
    key = _key(ctx, shapes, dtypes, axes)
    if key is not None and key in _rules:
        return _rules[key]
    rule = _test(ctx, shapes, dtypes, axes)
    if key is not None:
        if len(_rules) >= _CACHE_SIZE:
            _rules.clear()
        _rules[key] = rule
    return rule


def _test(
    ctx: Context, shapes: list[tuple[int, ...]], dtypes: list[torch.dtype], axes: list[tuple[InputDim, int]]
) -> InferredRule | str:
    calls = list(_calls(ctx))
    size = sum(math.prod(shape) for shape in shapes)
    if size > SMALL and _is_torch(ctx) and all(inner == 1 for _, inner in axes):
        wanted = {shapes[i][d] for (i, d), _ in axes} if _sizes_among(ctx.node) else None
        try:
            rule = EquivarianceTest(calls, _smaller_shapes(shapes, wanted), dtypes).infer(axes)
            if not rule.refused:
                return rule
        except NotEquivariant:
            pass  # it may need the real sizes
    if size > (LARGE if _is_torch(ctx) else OTHER):
        return "its tensors are too large to test it"
    if len(shapes) > ARGUMENTS and not _is_torch(ctx):
        return "it takes too many tensors to test it"
    try:
        return EquivarianceTest(calls, shapes, dtypes).infer(axes)
    except NotEquivariant as why:
        return str(why)


def _output_axes(ctx: Context, rule: InferredRule, dims: list[Dims], why: Reason | None) -> Any:
    """Unifies input axes that hold the same units and builds the output's axes; `why` fixes those without units."""
    leaves, tree = pytree.tree_flatten(ctx.value)
    out = [[fixed(n, why) for n in v.shape] if isinstance(v, Tensor) else v for v in leaves]
    for axis_map in rule.axis_maps:
        first, *others = (dims[i][d] for i, d in axis_map.inputs)
        for other in others:
            ctx.same(other, first, "goes into an operator together with an axis that does not change")
        unit: Axis | None = None
        if axis_map.layout != Layout():
            unit = axis_of(UnitVar(length(first) // axis_map.layout.entries))
            ctx.same(first, _laid_out(unit, axis_map.layout), "the operator takes several entries together")
        for (leaf, d), layout in axis_map.outputs:
            axis = next((a for a in (first, *others) if not is_fixed(a)), first) if unit is None else unit
            out[leaf][d] = _laid_out(axis, layout)
    return pytree.tree_unflatten([Dims(o) if isinstance(o, list) else o for o in out], tree)


def _laid_out(axis: Axis, layout: Layout) -> Axis:
    if layout == Layout():
        return axis
    return tuple(Segment(s.var, s.inner * layout.inner, s.reason) for s in resolve(axis)) * layout.copies


def keeps_units(module: nn.Module, shape: tuple[int, ...], dim: int) -> bool:
    """Whether a plain module is equivariant along a dimension and keeps it in place, as an activation does."""
    key = _module_key(module), shape, dim
    if key[0] is None:
        return _keeps_units(module, shape, dim)
    if key not in _kept:
        _kept[key] = _keeps_units(module, shape, dim)
    return _kept[key]


def _keeps_units(module: nn.Module, shape: tuple[int, ...], dim: int) -> bool:
    modes = [copy.deepcopy(module).train(training) for training in (False, True)]
    # a copy, since it may work in place
    calls = [lambda tensors, mode=mode: mode.forward(tensors[0].clone()) for mode in modes]
    try:
        (axis_map,) = EquivarianceTest(calls, [shape], [torch.float64]).infer([((0, dim), 1)]).axis_maps
    except (NotEquivariant, ValueError):
        return False
    return axis_map.layout == Layout() and axis_map.outputs == (((0, dim), Layout()),)


def _calls(ctx: Context) -> Iterator[Call]:
    """The operator in every mode: one that depends on a `training` flag is tested with both values."""
    node = ctx.node
    if ctx.module is not None:
        for training in (False, True):
            module = copy.deepcopy(ctx.module).train(training)
            yield _call(module.forward, _values(node))
        return
    target = _method(str(node.target)) if node.op == "call_method" else node.target
    for mode in (False, True) if any(map(_is_switch, node.all_input_nodes)) else (None,):
        yield _call(target, _values(node, mode))


def _call(target: Any, arguments: tuple[Any, Any]) -> Call:
    """`target` as a function of the tensors among its arguments."""
    leaves, tree = pytree.tree_flatten(arguments)
    at = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

    def call(tensors: list[Tensor]) -> object:
        filled = list(leaves)
        for i, t in zip(at, tensors, strict=True):
            filled[i] = t
        a, k = pytree.tree_unflatten(filled, tree)
        return target(*a, **k)

    return call


def _method(method: str) -> Callable[..., Any]:
    return lambda x, *args, **kwargs: getattr(x, method)(*args, **kwargs)


def _is_switch(node: fx.Node) -> bool:
    """A number that differs between train and eval mode."""
    value = node.meta["val"]
    return isinstance(value, bool) or (node.target is in_mode and not isinstance(value, Tensor))


def _switch(node: fx.Node, training: bool) -> Any:
    return node.args[1 if training else 2] if node.target is in_mode else training


def _is_torch(ctx: Context) -> bool:
    """Whether it is torch's operator: those do not branch on the size of a dimension, a user's function may."""
    if ctx.node.op == "call_method":
        return True
    home = type(ctx.module).__module__ if ctx.module is not None else getattr(ctx.node.target, "__module__", "")
    return str(home or "torch").split(".")[0] in ("torch", "_operator")


def _sizes_among(node: fx.Node) -> bool:
    """Whether an integer argument may be a size."""
    numbers = [v for v in pytree.tree_leaves(_values(node)) if isinstance(v, int) and not isinstance(v, bool)]
    computed = any(isinstance(n.meta["val"], int) for n in node.all_input_nodes)
    return computed or any(abs(n) > _LITERAL for n in numbers) or node.op == "call_module"


def _smaller_shapes(shapes: list[tuple[int, ...]], only: set[int] | None) -> list[tuple[int, ...]]:
    """Replaces large sizes (only those in `only`, if given) by small ones; equal sizes stay equal, others differ."""
    long = sorted({n for shape in shapes for n in shape if n > _LITERAL and (only is None or n in only)})
    small = {n: min(n, _LITERAL + 1 + i) for i, n in enumerate(long)}
    return [tuple(small.get(n, n) for n in shape) for shape in shapes]


def _key(ctx: Context, shapes: Any, dtypes: Any, axes: Any) -> Any:
    """A cache key; None where the operator has state or arguments that cannot be compared."""
    target: Any = ctx.node.target
    if ctx.module is not None:
        target = _module_key(ctx.module)
        if target is None:
            return None
    leaves, tree = pytree.tree_flatten(_values(ctx.node))
    literals = tuple("tensor" if isinstance(v, Tensor) else (type(v), v if v == v else "nan") for v in leaves)
    flags = tuple(n.args[1:] for n in ctx.node.all_input_nodes if n.target is in_mode)
    key = (target, ctx.node.op, tuple(shapes), tuple(dtypes), tuple(axes), literals, str(tree), flags)
    try:
        hash(key)
    except TypeError:
        return None
    return key


def _module_key(module: nn.Module) -> Any:
    """Class and settings; None for a module with other attributes than numbers and strings."""
    settings = {k: v for k, v in vars(module).items() if k not in vars(_EMPTY)}
    simple = (int, float, str, bool, type(None), torch.dtype)
    values = [v for value in settings.values() for v in (value if isinstance(value, tuple) else (value,))]
    if module._modules or module._buffers or not all(isinstance(v, simple) for v in values):
        return None
    return type(module), tuple((k, type(v), v) for k, v in sorted(settings.items()))


_EMPTY = nn.Module()
