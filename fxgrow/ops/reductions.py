"""Reductions, contractions and sorting: the axis that is reduced cannot change, the other axes pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from fxgrow.axes.axes import Axis, Dims, axes_in, fixed, is_fixed, length, resolve
from fxgrow.graph.graph import operator_name
from fxgrow.ops.context import Context, Unsupported
from fxgrow.ops.elementwise import broadcast
from fxgrow.ops.registry import op

_REDUCE = "max min prod amax amin logsumexp median any all argmax argmin nansum nanmean".split()
#: of these it is known what new units change (`analysis/axis_statistics.py`)
_STATISTICS = "mean sum std var std_mean var_mean".split()
_NORMS = [torch.norm, torch.linalg.norm, torch.linalg.vector_norm]
_ALONG = "softmax log_softmax softmin cumsum cumprod sort argsort flip roll".split()


def _forms(names: list[str]) -> list[Any]:
    return [*names, *(f for n in names for s in (torch, F) if (f := getattr(s, n, None)) is not None)]


@op(*_forms(_REDUCE + _STATISTICS))
def reduce(ctx: Context, input: Dims, dim: Any = None, *args: Any, **kwargs: Any) -> Any:
    dim = kwargs.get("axis", dim)
    if isinstance(dim, Dims):  # max and min of two tensors
        return broadcast(ctx, input, dim)
    if isinstance(dim, torch.dtype):
        dim = None
    over = _dimensions(None if isinstance(dim, bool) else dim, len(input))
    name = operator_name(ctx.gm, ctx.node)
    growing = [input[d] for d in over if not is_fixed(input[d])]
    if len(growing) == 1 and (ctx.node.target in _NORMS or name in (*_STATISTICS, "norm")):
        _statistic(ctx, growing[0])
    else:
        for axis in growing:
            ctx.pin(axis, "reduce", "summed or compared over the whole axis")

    def kept(value: torch.Tensor) -> Dims:
        keepdim = value.dim() == len(input)
        return Dims(fixed(1) if i in over else a for i, a in enumerate(input) if keepdim or i not in over)

    return pytree.tree_map_only(torch.Tensor, kept, ctx.value)


def _statistic(ctx: Context, axis: Axis) -> None:
    """A mean or length that may be part of a norm; a sum of products of two tensors, as in attention."""
    source = ctx.node.all_input_nodes[0]
    factors = source.all_input_nodes if operator_name(ctx.gm, source) == "mul" else []
    if operator_name(ctx.gm, ctx.node) == "sum" and len(factors) == 2:
        both = [any(resolve(axis) == resolve(a) for a in axes_in(ctx.structure.outputs[n])) for n in factors]
        if all(both):
            ctx.require_state("product", factors[1], axis)
            return
    ctx.require_state("statistic", source, axis)


@op("norm", *_NORMS)
def norm(ctx: Context, input: Dims, p: Any = 2, dim: Any = None, *args: Any, **kwargs: Any) -> Any:
    return reduce(ctx, input, dim)


def _dimensions(dim: Any, rank: int) -> set[int]:
    """The dimensions that an argument names; None and () mean all."""
    dims = [dim] if isinstance(dim, int) else list(dim or range(rank))
    return {d % rank for d in dims}


@op(*_forms(_ALONG), nn.Softmax, nn.LogSoftmax, nn.Softmin)
def along(ctx: Context, input: Dims, *args: Any, **kwargs: Any) -> Any:
    """Changes values along an axis and keeps its shape."""
    at = 1 if ctx.node.target in ("roll", torch.roll) else 0
    dim = args[at] if len(args) > at else getattr(ctx.module, "dim", None)
    if ctx.node.target == "flip" and isinstance(dim, int):
        dim = args  # x.flip(2, 3)
    for d in _dimensions(kwargs.get("dim", kwargs.get("dims", dim)), len(input)):
        ctx.pin(input[d], "reduce", "every entry depends on the whole axis")
    return pytree.tree_map_only(torch.Tensor, lambda t: Dims(input), ctx.value)


@op(nn.Softmax2d)
def softmax2d(ctx: Context, x: Dims) -> Any:
    return along(ctx, x, -3)


def _contract(ctx: Context, a: Axis, b: Axis, source: Any) -> None:
    """An axis summed over in a product of two activations; the sum stays if new units of the second are zero."""
    ctx.same(a, b)
    if not is_fixed(a):
        ctx.require_state("product", source, a)


def matmul_of_activations(ctx: Context, a: Dims, b: Dims) -> Dims:
    """Part of the rule for `matmul` in `ops/linear.py`: neither factor is a parameter."""
    if len(a) < 2:
        raise Unsupported("product with a vector")
    if len(b) == 1:
        _contract(ctx, a[-1], b[0], ctx.argument(1, "other", "mat2"))
        return Dims(a[:-1])
    _contract(ctx, a[-1], b[-2], ctx.argument(1, "other", "mat2"))
    batch = broadcast(ctx, Dims(a[:-2]), Dims(b[:-2])) if len(ctx.shape) > 2 else ()
    return Dims((*batch, a[-2], b[-1]))


def baddbmm_of_activations(ctx: Context, input: Dims, batch1: Dims, batch2: Dims) -> Dims:
    """Part of the rule for `baddbmm` in `ops/linear.py`."""
    _contract(ctx, batch1[2], batch2[1], ctx.argument(2, "batch2"))
    ctx.same(batch1[0], batch2[0])
    return broadcast(ctx, input, Dims((batch1[0], batch1[1], batch2[2])))


def einsum_of_activations(ctx: Context, terms: list[str], out: str, tensors: list[Dims]) -> Dims:
    """Part of the rule for `einsum` in `ops/linear.py`: no operand is a weight."""
    axes: dict[str, Axis] = {}
    for term, t in zip(terms, tensors, strict=True):
        for letter, axis in zip(term, t, strict=True):
            ctx.same(axes.setdefault(letter, axis), axis)
    for letter in axes.keys() - set(out):
        if [term.count(letter) for term in terms] == [1, 1]:
            sources = ctx.node.args[1:] if len(ctx.node.args) > 2 else ctx.node.args[1]
            _contract(ctx, axes[letter], axes[letter], sources[1])  # type: ignore[index]
        else:
            ctx.pin(axes[letter], "reduce", f"summed over ({letter!r} in {','.join(terms)}->{out})")
    return Dims(axes[letter] for letter in out)


@op(F.cosine_similarity, torch.cosine_similarity, nn.CosineSimilarity)
def cosine_similarity(ctx: Context, x1: Dims, x2: Dims, dim: int = 1, eps: float = 1e-8) -> Dims:
    out = list(broadcast(ctx, x1, x2))
    axis = out.pop((dim if ctx.module is None else ctx.module.dim) % len(out))
    if not is_fixed(axis):
        ctx.require_state("length", ctx.argument(0, "x1", "input1"), axis)
        ctx.require_state("product", ctx.argument(1, "x2", "input2"), axis)
    return Dims(out)


@op(F.scaled_dot_product_attention)
def scaled_dot_product(
    ctx: Context, query: Dims, key: Dims, value: Dims, attn_mask: Any = None, *args: Any, **kwargs: Any
) -> Dims:
    _contract(ctx, query[-1], key[-1], ctx.argument(1, "key"))
    if kwargs.get("scale") is None:
        # the default is the inverse root of the size, which would change: the old value is written into the call
        ctx.keep(length(query[-1]) ** -0.5, [query[-1]], "scale")
    for tokens in (key[-2], query[-2]):
        ctx.pin(tokens, "reduce", "attention is normalised over the keys")
    mask = attn_mask if isinstance(attn_mask, Dims) else Dims()
    ctx.fix(mask[-2:])
    if kwargs.get("enable_gqa"):
        ctx.fix(mask)
        ctx.fix([query[-3], key[-3], value[-3]], "heads are shared in groups")
        return Dims((*query[:-1], value[-1]))
    batch = broadcast(ctx, Dims(query[:-2]), Dims(key[:-2]), Dims(value[:-2]), Dims(mask[:-2]))
    return Dims((*batch, query[-2], value[-1]))
