"""Infers a rule for an operator that has none, by an equivariance test on random tensors.

requires: a node without a rule whose operator owns no parameters: a function, a method or a plain module.
ensures:  an axis along which the operator is equivariant to selecting units is followed to the output; any other axis
          is pinned with the reason. Rules are cached by operator and the shapes of its arguments.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxgrow.axes.axes import Axis, Dims, Segment, UnitVar, axes_in, axis_of, dims_in, fixed, is_fixed, length, resolve
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
#: results of tests: `InferredRule`, a string that says why there is none, or whether a module keeps its units
_rules: dict[Any, Any] = {}


def infer_rule(ctx: Context, what: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The axes of the output of an operator without a rule, called `what` in messages; arguments as for a rule."""
    unknown = f"{what} is not described by any rule"
    tensors = [v for v in pytree.tree_leaves(_values(ctx.node)) if isinstance(v, Tensor)]
    dims = list(dims_in((args, kwargs)))
    if [tuple(t.shape) for t in tensors] != [tuple(map(length, d)) for d in dims]:
        raise Unsupported("an operator without a rule has arguments that are not plain tensors")
    if not tensors or (ctx.module is not None and [*ctx.module.parameters(), *ctx.module.buffers()]):
        raise Unsupported(unknown)
    for axis in axes_in(dims):
        if length(axis) == 1 and not is_fixed(axis):
            ctx.pin(axis, "broadcast", "one unit may be repeated by an operator that no rule describes")
    axes = [
        ((i, k), math.gcd(*(s.inner for s in resolve(axis))))
        for i, d in enumerate(dims)
        for k, axis in enumerate(d)
        if length(axis) > 1 and not is_fixed(axis)
    ]
    shapes, dtypes = [tuple(t.shape) for t in tensors], [t.dtype for t in tensors]
    rule = _cached(_key(ctx, shapes, dtypes, axes), lambda: _test(ctx, shapes, dtypes, axes))
    if isinstance(rule, str):
        raise Unsupported(f"{unknown}, and {rule}")
    for (i, k), message in rule.refused:
        ctx.pin(dims[i][k], "operator", f"{unknown}, and {message}")
    why = ctx.reason("operator", f"{unknown}, and {rule.refused[0][1]}") if rule.refused else None
    return _output_axes(ctx, rule, dims, why)


def _values(node: fx.Node, training: bool | None = None) -> Any:
    """Arguments with the nodes' values: those of train or eval mode, if `training` is given."""

    def value(argument: fx.Node) -> Any:
        if training is None or not _is_switch(argument):
            return argument.meta["val"]
        return argument.args[1 if training else 2] if argument.target is in_mode else training

    return fx.map_arg((node.args, node.kwargs), value)


def _cached(key: Any, test: Callable[[], Any]) -> Any:
    """The result of a test, from the cache unless `key` is None."""
    if key is None:
        return test()
    if key not in _rules:
        if len(_rules) >= _CACHE_SIZE:
            _rules.clear()
        _rules[key] = test()
    return _rules[key]


def _test(
    ctx: Context, shapes: list[tuple[int, ...]], dtypes: list[torch.dtype], axes: list[tuple[InputDim, int]]
) -> InferredRule | str:
    calls = _calls(ctx)
    size = sum(math.prod(shape) for shape in shapes)
    if size > SMALL and _is_torch(ctx) and all(inner == 1 for _, inner in axes):
        numbers = [v for v in pytree.tree_leaves(_values(ctx.node)) if isinstance(v, int) and not isinstance(v, bool)]
        computed = any(isinstance(n.meta["val"], int) for n in ctx.node.all_input_nodes)
        has_sizes = computed or any(abs(n) > _LITERAL for n in numbers) or ctx.module is not None
        wanted = {shapes[i][d] for (i, d), _ in axes} if has_sizes else None
        with contextlib.suppress(NotEquivariant):  # it may need the real sizes
            rule = EquivarianceTest(calls, _smaller_shapes(shapes, wanted), dtypes).infer(axes)
            if not rule.refused:
                return rule
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

    def test() -> bool:
        modes = [copy.deepcopy(module).train(training) for training in (False, True)]
        # a copy, since it may work in place
        calls = [lambda tensors, mode=mode: mode.forward(tensors[0].clone()) for mode in modes]
        try:
            maps = EquivarianceTest(calls, [shape], [torch.float64]).infer([((0, dim), 1)]).axis_maps
        except NotEquivariant:
            return False
        return [(m.layout, m.outputs) for m in maps] == [(Layout(), (((0, dim), Layout()),))]

    key = _module_key(module)
    return bool(_cached(key and (key, shape, dim), test))


def _calls(ctx: Context) -> list[Call]:
    """The operator in every mode: one that depends on a `training` flag is tested with both values."""
    node = ctx.node
    if ctx.module is not None:
        modules = [copy.deepcopy(ctx.module).train(training) for training in (False, True)]
        return [_call(module.forward, _values(node)) for module in modules]
    modes = (False, True) if any(map(_is_switch, node.all_input_nodes)) else (None,)
    return [_call(node.target, _values(node, mode)) for mode in modes]


def _call(target: Any, arguments: tuple[Any, Any]) -> Call:
    """A function, or a method by its name, as a function of the tensors among its arguments."""

    def call(tensors: list[Tensor]) -> object:
        rest = iter(tensors)
        args, kwargs = pytree.tree_map_only(Tensor, lambda _: next(rest), arguments)
        if isinstance(target, str):
            return getattr(args[0], target)(*args[1:], **kwargs)
        return target(*args, **kwargs)

    return call


def _is_switch(node: fx.Node) -> bool:
    """A number that differs between train and eval mode."""
    value = node.meta["val"]
    return isinstance(value, bool) or (node.target is in_mode and not isinstance(value, Tensor))


def _is_torch(ctx: Context) -> bool:
    """Whether it is torch's operator: those do not branch on the size of a dimension, a user's function may."""
    if ctx.node.op == "call_method":
        return True
    home = type(ctx.module).__module__ if ctx.module is not None else getattr(ctx.node.target, "__module__", "")
    return str(home or "torch").split(".")[0] in ("torch", "_operator")


def _smaller_shapes(shapes: list[tuple[int, ...]], only: set[int] | None) -> list[tuple[int, ...]]:
    """Replaces large sizes (only those in `only`, if given) by small ones; equal sizes stay equal, others differ."""
    long = sorted({n for shape in shapes for n in shape if n > _LITERAL and (only is None or n in only)})
    small = {n: min(n, _LITERAL + 1 + i) for i, n in enumerate(long)}
    return [tuple(small.get(n, n) for n in shape) for shape in shapes]


def _key(ctx: Context, shapes: Any, dtypes: Any, axes: Any) -> Any:
    """A cache key; None where the operator has state or arguments that cannot be compared."""
    target: Any = ctx.node.target if ctx.module is None else _module_key(ctx.module)
    leaves, tree = pytree.tree_flatten(_values(ctx.node))
    literals = tuple("tensor" if isinstance(v, Tensor) else (type(v), v if v == v else "nan") for v in leaves)
    flags = tuple(n.args[1:] for n in ctx.node.all_input_nodes if n.target is in_mode)
    key = (target, ctx.node.op, tuple(shapes), tuple(dtypes), tuple(axes), literals, str(tree), flags)
    try:
        hash(key)
    except TypeError:
        return None
    return key if target is not None else None


def _module_key(module: nn.Module) -> Any:
    """Class and settings; None for a module with other attributes than numbers and strings."""
    settings = {k: v for k, v in vars(module).items() if k not in vars(_EMPTY)}
    simple = (int, float, str, bool, type(None), torch.dtype)
    values = [v for value in settings.values() for v in (value if isinstance(value, tuple) else (value,))]
    if module._modules or module._buffers or not all(isinstance(v, simple) for v in values):
        return None
    return type(module), tuple((k, type(v), v) for k, v in sorted(settings.items()))


_EMPTY = nn.Module()
