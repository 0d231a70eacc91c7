"""Runs a graph on axes instead of tensors (abstract interpretation): what changes together, and what cannot change.

ensures: every parameter axis of a described operator is unified; what an unknown operator touches is pinned.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from dataclasses import replace
from fractions import Fraction
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

import fxgrow.ops  # noqa: F401  (enters the rules)
from fxgrow.analysis.expert_copies import copy_experts
from fxgrow.analysis.initial_state import find_initial_states
from fxgrow.analysis.size_guards import follows_from_widths, settle_guards
from fxgrow.axes.axes import (
    Dims,
    UnitVar,
    axes_in,
    axis_of,
    dims_in,
    fixed,
    is_fixed,
    length,
    multiplicity,
    pin,
    resolve,
    single_variable,
    unify,
)
from fxgrow.axes.records import Reason
from fxgrow.axes.size_expressions import SizeExpr, measured
from fxgrow.axes.structure import SizeCheck, SizeReplacement, Structure
from fxgrow.graph.arguments import get_argument
from fxgrow.graph.graph import lookup, operator_name
from fxgrow.graph.node_functions import guard
from fxgrow.graph.node_meta import OPAQUE
from fxgrow.graph.purity import overwrites
from fxgrow.ops.context import Context, Unsupported
from fxgrow.ops.infer_rule import infer_rule
from fxgrow.ops.registry import MAKES_AXES, find_rule


def propagate_axes(gm: fx.GraphModule) -> Structure:
    """Evaluates every node of a graph on axes."""
    structure = Structure()
    env: dict[fx.Node, Any] = structure.outputs
    for node in gm.graph.nodes:
        args, kwargs = fx.map_arg((node.args, node.kwargs), env.__getitem__)
        env[node] = _evaluate(Context(structure, gm, node), args, kwargs)
        _mark_weight(node, env, gm)
    for check in structure.checks:
        _check(structure, check)
    settle_guards(structure, [node for node in gm.graph.nodes if node.target in (guard, torch._assert)])
    _pin_frozen(gm, structure)
    find_initial_states(gm, structure)
    _separate_biases(structure)
    copy_experts(gm, structure)
    return structure


def _mark_weight(node: fx.Node, env: dict[fx.Node, Any], gm: fx.GraphModule) -> None:
    """Marks a tensor that is a parameter, or computed from parameters and from no input; buffers may take part."""
    value = env[node]
    parts = value if type(value) is tuple else (value,)
    if node.op == "get_attr" and isinstance(value, Dims) and value.parameter is not None:
        value.is_weight = isinstance(lookup(gm, value.parameter), torch.nn.Parameter) or None
    elif node.op.startswith("call_") and any(isinstance(part, Dims) for part in parts):
        kinds = {v.is_weight for v in _tensors_read(node.all_input_nodes, env)}
        # what is made as large as an activation, such as a first state, is one
        for source in [] if kinds or len(value) < 2 else (sizes := list(node.all_input_nodes)):
            read = _tensors_read(source.all_input_nodes, env)
            kinds |= {v.is_weight for v in read}
            sizes += [n for n in source.all_input_nodes if not read and n not in sizes]
        for part in parts if False not in kinds else ():
            if isinstance(part, Dims):
                part.is_weight = True in kinds or None


def _tensors_read(nodes: Iterable[fx.Node], env: dict[fx.Node, Any]) -> list[Dims]:
    values = (v[0] if type(v) is tuple and v else v for v in map(env.__getitem__, nodes))
    return [v for v in values if isinstance(v, Dims)]


def _evaluate(ctx: Context, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    node = ctx.node
    if node.op == "placeholder":
        return _fixed(ctx.value, ctx.reason("input", "a dimension of the model's input"))
    if node.op == "get_attr":
        name = str(node.target)
        path, _, leaf = name.rpartition(".")
        owner = ctx.gm.get_submodule(path)
        if leaf not in owner._parameters and leaf not in owner._buffers:
            return _fixed(ctx.value)  # a `training` flag or a submodule
        # by the real tensor, not its fake value: tied parameters are one object
        return ctx.dims_of(name, lookup(ctx.gm, name))
    if node.op == "output":
        for axis in axes_in(args):
            pin(axis, ctx.reason("output", "a dimension of the model's output"))
        _pin_sizes(args, ctx.reason("output", "its size is returned by the model"))
        return args
    if node.target is guard:
        return None  # settled once all axes are known
    if OPAQUE in node.meta:
        why = ctx.reason("opaque", f"the model's code cannot be followed there: {node.meta[OPAQUE]}")
        _pin_all(ctx, args, kwargs, why)
        return _fixed(ctx.value, why)
    rule = find_rule(node, ctx.module)
    writes = ctx.value is None and rule is not None
    if not writes and not any(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(ctx.value)):
        return _number(ctx, args, kwargs)
    acts = rule in MAKES_AXES or (ctx.module is not None and next(ctx.module.parameters(), None) is not None)
    if all(map(is_fixed, axes_in((args, kwargs)))) and not any(measured((args, kwargs))) and not acts:
        reasons = [s.reason for a in axes_in((args, kwargs)) for s in a if s.reason]
        # a function of an input is no input any more, but an unknown operator stays the reason
        return _fixed(ctx.value, next((r for r in reasons if r.code != "input"), None))
    return _apply(ctx, args, kwargs)


def _apply(ctx: Context, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    rule = find_rule(ctx.node, ctx.module)
    what = operator_name(ctx.gm, ctx.node)
    try:
        if ctx.node.kwargs.get("out") is not None:
            raise Unsupported(f"{what} writes its result into out=")
        if _changes_a_parameter(ctx, args):
            raise Unsupported(f"{what} changes a parameter in place")
        out = infer_rule(ctx, what, args, kwargs) if rule is None else rule(ctx, *args, **kwargs)
        _check_lengths(ctx, out)
    except (Unsupported, TypeError, IndexError, KeyError, ValueError) as refusal:
        code = refusal.code if isinstance(refusal, Unsupported) else "operator"
        why = ctx.reason(code, str(refusal) if isinstance(refusal, Unsupported) else f"{what}: {refusal}")
        _pin_all(ctx, args, kwargs, why)
        return _fixed(ctx.value, why)
    for size in measured((args, kwargs)):
        if not any(size is f for f in ctx.followed):
            _pin_sizes([size], ctx.reason("size", "its size is used as a number"))
    # an output is no parameter any more, even where it has the same axes
    return Dims(out) if any(out is a for a in args) else out


def _changes_a_parameter(ctx: Context, args: tuple[Any, ...]) -> bool:
    """Whether a node writes into a parameter: new entries are chosen for the values that are stored."""
    if not args or not isinstance(args[0], Dims) or args[0].parameter is None:
        return False
    written = ctx.node.args[0] in overwrites(ctx.node, ctx.gm)
    return written and isinstance(lookup(ctx.gm, args[0].parameter), torch.nn.Parameter)


def _pin_all(ctx: Context, args: tuple[Any, ...], kwargs: dict[str, Any], why: Reason) -> None:
    """Pins all axes that an operator without a rule can see."""
    for axis in axes_in((args, kwargs)):
        pin(axis, why)
    _pin_sizes((args, kwargs), why)
    if ctx.module is not None:
        for name, tensor in [*ctx.module.named_parameters(), *ctx.module.named_buffers()]:
            for axis in ctx.dims_of(f"{ctx.node.target}.{name}", tensor):
                pin(axis, why)


def _pin_sizes(value: Any, why: Reason) -> None:
    for size in measured(value):
        for axis in size.axes:
            pin(axis, why)


def _check_lengths(ctx: Context, out: Any) -> None:
    """Checks that the axes of a rule have the lengths of the real output."""
    expected = [tuple(v.shape) for v in pytree.tree_leaves(ctx.value) if isinstance(v, torch.Tensor)]
    given = [tuple(map(length, dims)) for dims in dims_in(out)]
    if expected != given:
        raise Unsupported(f"{operator_name(ctx.gm, ctx.node)}: the rule gives shapes {given}, the operator {expected}")


def _number(ctx: Context, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Evaluates shape arithmetic; a result that cannot be traced to its axes becomes an opaque size."""
    node, tensors = ctx.node, list(axes_in((args, kwargs)))
    out, known = ctx.value, False  # whether every size in `out` is a function of axes
    try:
        if tensors:
            rule = find_rule(node, ctx.module)
            out, known = (out, False) if rule is None else (rule(ctx, *args, **kwargs), True)
            if rule is None and (out is None or isinstance(out, list)):
                # a call for its side effects, or one that makes numbers of units
                what = operator_name(ctx.gm, node)
                _pin_all(ctx, args, kwargs, ctx.reason("operator", f"{what} is not described by any rule"))
        elif node.target is operator.getitem:
            out, known = args[0][args[1]], not any(measured(args[1]))
        elif node.target in _LINEAR:
            run: Any = math.prod if node.target == "numel" else node.target
            out = run(*args, **kwargs)
            known = any(measured(out))
    except Unsupported as refusal:
        _pin_all(ctx, args, kwargs, ctx.reason(refusal.code, str(refusal)))
    except (TypeError, IndexError, ValueError):
        out, known = ctx.value, False
    sources = [(c, a) for s in measured((args, kwargs)) for c, a in s.terms]
    if not sources and node.target not in _RANK:
        sources = [(Fraction(1), a) for a in tensors if not is_fixed(a)]
    if known or not sources:
        return out
    if isinstance(out, float) and follows_from_widths(ctx.structure, node):
        # such as 1/sqrt(d): the function stays if it does
        ctx.keep(out, [axis for _, axis in sources])
        return out
    if any(isinstance(leaf, float) for leaf in pytree.tree_leaves(out)):
        # it would change the function in an unknown way
        for _, axis in sources:
            pin(axis, ctx.reason("size", "its size is used as a number"))
    return pytree.tree_map_only(int, lambda n: SizeExpr.make(int(n), Fraction(0), sources, opaque=True), out)


#: their results do not depend on sizes
_RANK = frozenset(
    {"dim", "ndimension", "is_floating_point", "is_complex", "get_device", "element_size", "is_contiguous"}
)
#: operators of `SizeExpr`; of anything else (min, max, %) only the value is known
_LINEAR = frozenset(
    {
        operator.add, operator.sub, operator.mul, operator.floordiv, operator.neg,
        operator.iadd, operator.isub, operator.imul, operator.ifloordiv, sum, math.prod, "numel",
    }
)  # fmt: skip


def _check(structure: Structure, check: SizeCheck) -> None:
    """A computed size must be the same linear form as the axis it is used for."""
    entries = sum(s.inner for s in resolve(check.axis) if s.var is None)
    expected = Fraction(entries), {v: Fraction(m) for v, m in multiplicity(check.axis).items()}
    form = check.size.form()
    if form is not None and _without_pinned(form) == _without_pinned(expected):
        return
    axes = (*check.size.axes, check.axis)
    if check.where is not None:
        # a number that no input changes: the size of a width, or computed from such sizes
        number = get_argument(*check.where)
        of_width = single_variable(check.axis) is not None and not check.part
        if of_width or (isinstance(number, fx.Node) and follows_from_widths(structure, number)):
            structure.size_replacements.append(SizeReplacement(*check.where, axes, check.axis))
            return
        # one size of a view can be inferred, whatever the others are
        others = (node for node, _, _, axis in structure.size_replacements if axis is None)
        if check.infer and all(node is not check.where[0] for node in others):
            structure.size_replacements.append(SizeReplacement(*check.where, axes, None))
            return
    # else what is measured must grow with this axis
    if check.size.measures_one and not any(is_fixed(a) for a in axes):
        unify(check.axis, check.size.axes[0], check.why)
        return
    if form is not None and form[0] == expected[0] and len(form[1]) == len(expected[1]) == 1:
        ((mine, entries_of_mine),), ((other, entries_of_other),) = form[1].items(), expected[1].items()
        if entries_of_mine == entries_of_other:
            unify(axis_of(mine), axis_of(other), check.why)
            return
    for a in axes:
        pin(a, check.why)


def _without_pinned(form: tuple[Fraction, dict[UnitVar, Fraction]]) -> tuple[Fraction, dict[UnitVar, Fraction]]:
    """The linear form in which pinned variables are numbers."""
    const, coefficients = form
    const += sum(c * v.size for v, c in coefficients.items() if v.pinned is not None)
    return const, {v: c for v, c in coefficients.items() if v.pinned is None}


def _pin_frozen(gm: fx.GraphModule, structure: Structure) -> None:
    """Pins the axes of frozen weights: they cannot learn what new units would need, and may not be changed."""
    for p in structure.projections:
        with torch.enable_grad():  # a weight may be computed
            weight = lookup(gm, p.weight)
        if not weight.requires_grad:
            why = Reason("frozen", p.node.name, f"{p.weight} is frozen (requires_grad=False)")
            pin(p.output_axis, why)
            pin(p.input_axis, why)


def _separate_biases(structure: Structure) -> None:
    """Takes a weight that is used with several biases, or with and without one, for one without a bias."""
    biases: dict[str, set[str | None]] = {}
    for p in structure.projections:
        biases.setdefault(p.weight, set()).add(p.bias)
    columns = {(p.weight, p.in_dim) for p in structure.projections}
    for i, p in enumerate(structure.projections):
        if len(biases[p.weight]) > 1:
            structure.projections[i] = replace(p, bias=None)
            if p.bias is not None:
                # where the row of a unit is also the column that reads it, as in a tied autoencoder, both are zero at
                # first: behind a ReLU such a unit learns by its bias alone
                structure.fills.setdefault(p.bias, 0.1 if (p.weight, p.out_dim) in columns else 0.0)


def _fixed(value: Any, why: Reason | None = None) -> Any:
    return pytree.tree_map_only(torch.Tensor, lambda t: Dims(fixed(n, why) for n in t.shape), value)
