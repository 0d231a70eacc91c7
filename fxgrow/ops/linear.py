"""Layers that write a fresh axis at every position: Linear, Embedding, products with a parameter."""

from __future__ import annotations

import operator
from itertools import islice
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from fxgrow.axes.axes import Dims, UnitVar, axis_of, length
from fxgrow.ops.context import Context, Unsupported
from fxgrow.ops.elementwise import broadcast
from fxgrow.ops.expert_routing import routes
from fxgrow.ops.reductions import einsum_of_activations, matmul_of_activations
from fxgrow.ops.registry import op


@op(F.linear, nn.Linear)
def linear(ctx: Context, input: Dims, weight: Dims | None = None, bias: Dims | None = None) -> Dims:
    weight = weight or ctx.parameter("weight") or Dims()
    ctx.same(input[-1], weight[1])
    ctx.project(weight, bias or ctx.parameter("bias"), weight[0])
    ctx.attribute("out_features", weight[0])
    ctx.attribute("in_features", weight[1])
    return Dims((*input[:-1], weight[0]))


@op(F.embedding, nn.Embedding)
def embedding(
    ctx: Context, input: Dims, weight: Any = None, padding_idx: Any = None, max_norm: Any = None, *args: Any, **kw: Any
) -> Dims:
    weight = weight or ctx.parameter("weight") or Dims()
    ctx.pin(weight[0], "input", "one entry per index that the input can hold")
    if max_norm is not None or getattr(ctx.module, "max_norm", None) is not None:
        ctx.pin(weight[1], "norm", "max_norm scales by the norm over the whole axis")
    ctx.project(weight, None, weight[1], out_dim=1, in_dim=0, plain=False)
    ctx.attribute("embedding_dim", weight[1])
    return Dims((*input, weight[1]))


@op(torch.matmul, torch.mm, torch.bmm, operator.matmul, "matmul", "mm", "bmm", "__matmul__")
def matmul(ctx: Context, a: Dims, b: Dims) -> Dims:
    if b.parameter is not None and len(b) == 2 and len(a) >= 2:
        return _product(ctx, a, b, None, ctx.argument(0, "input", "mat1"))
    if b.parameter is not None and len(b) == 3 and len(a) == 3:
        # one weight per group, [groups, in, out]: experts that get all tokens
        ctx.pin(b[0], "size", "one entry per group")
        batch = broadcast(ctx, Dims(a[:1]), Dims(b[:1]))
        ctx.same(a[2], b[1])
        _project_experts(ctx, b, 2, 1, ctx.argument(0, "input"))
        return Dims((*batch, a[1], b[2]))
    return matmul_of_activations(ctx, a, b)


def _project_experts(ctx: Context, weight: Dims, out_dim: int, in_dim: int, source: Any) -> None:
    routing = routes(ctx.node)
    fields = {"plain": False, "experts": True, "groups": routing.experts if routing else 0, "source": source}
    ctx.project(weight, None, weight[out_dim], out_dim=out_dim, in_dim=in_dim, **fields)


@op(torch.addmm, "addmm")
def addmm(ctx: Context, input: Dims, mat1: Dims, mat2: Dims, *args: Any, **kwargs: Any) -> Dims:
    if mat2.parameter is None:
        raise Unsupported("a product of two activations, added to a third")
    bias = input if input.parameter is not None and len(input) == 1 else None
    out = _product(ctx, mat1, mat2, bias, ctx.argument(1, "mat1"))
    return out if bias is not None else broadcast(ctx, out, input)


@op("transformers.pytorch_utils.Conv1D")
def transposed_linear(ctx: Context, x: Dims) -> Dims:
    """`addmm` with its sizes as attributes, in the first GPTs."""
    weight = ctx.parameter("weight") or Dims()
    ctx.attribute("nf", weight[1])
    ctx.attribute("nx", weight[0])
    return _product(ctx, x, weight, ctx.parameter("bias"), ctx.node.all_input_nodes[0])


def _product(ctx: Context, x: Dims, weight: Dims, bias: Dims | None, source: Any) -> Dims:
    """`x @ weight + bias`, the weight stored as [in, out]."""
    ctx.same(x[-1], weight[0])
    ctx.project(weight, bias, weight[1], out_dim=1, in_dim=0, source=source)
    return Dims((*x[:-1], weight[1]))


@op("torch.nn.functional.grouped_mm", "torch._grouped_mm")
def grouped_mm(ctx: Context, mat_a: Dims, mat_b: Dims, **options: Any) -> Dims:
    """One weight for each group of rows, [groups, in, out] or a transposed view of [groups, out, in]: experts."""
    if len(mat_a) != 2 or len(mat_b) != 3 or options.get("bias") is not None:
        raise Unsupported("grouped_mm of these dimensions, or with a bias")
    weight, in_dim, out_dim = mat_b, 1, 2
    stored = ctx.argument(1, "mat_b")
    if mat_b.parameter is None and getattr(stored, "target", None) == "transpose":
        weight, in_dim, out_dim = ctx.structure.outputs[stored.args[0]], 2, 1
        if not (weight[2] == mat_b[1] and weight[1] == mat_b[2]):
            raise Unsupported("expert weight transposed over the expert dimension")
    ctx.pin(weight[0], "size", "one entry per expert")
    ctx.same(mat_a[1], weight[in_dim])
    n = 16 // ctx.value.element_size()  # the kernel needs rows whose size is a multiple of 16 bytes
    for axis in (weight[in_dim], weight[out_dim]):
        if length(axis) % n:
            ctx.pin(axis, "size", f"its kernel needs a multiple of {n}")
        else:
            ctx.same(axis, axis_of(UnitVar(length(axis) // n), n), f"grows by multiples of {n}")
    _project_experts(ctx, weight, out_dim, in_dim, ctx.argument(0, "mat_a"))
    return Dims((mat_a[0], weight[out_dim]))


@op(torch.einsum, "torch.functional.einsum")
def einsum(ctx: Context, equation: str, *operands: Any) -> Dims:
    """A linear map along one letter, such as `bth,hd->btd` with a parameter [h, d]; else a product of activations."""
    tensors = list(operands[0]) if len(operands) == 1 and not isinstance(operands[0], Dims) else list(operands)
    terms, _, out = equation.replace(" ", "").replace("...", ".").partition("->")
    letters = terms.split(",")
    at = [i for i, t in enumerate(tensors) if t.parameter is not None and len(t) == 2]
    if len(at) != 1 or len(tensors) != 2 or len(letters) != 2 or not out:
        return einsum_of_activations(ctx, equation, tensors)
    weight, x = tensors[at[0]], tensors[1 - at[0]]
    term, given = letters[at[0]], letters[1 - at[0]]
    summed, made = set(term) - set(out), set(term) - set(given)
    linear_map = (
        len(summed) == len(made) == 1
        and summed | made == set(term)
        and "." not in term
        and all(len(set(word)) == len(word) for word in (term, given, out))
        and (set(given) | made) - summed == set(out)  # nothing else is summed over
    )
    if not linear_map:
        return einsum_of_activations(ctx, equation, tensors)
    (c,), (o,) = summed, made
    # a dot takes as many axes as the letters leave
    rest, spare = iter(x), len(x) - len(given) + 1
    axes = {letter: tuple(islice(rest, spare if letter == "." else 1)) for letter in given}
    ctx.same(axes[c][0], weight[term.index(c)])
    # statistics need features last, as in `F.linear`
    plain = given == out[:-1] + c and out[-1] == o
    produced = weight[term.index(o)]
    nodes: Any = ctx.node.args[1:] if len(ctx.node.args) > 2 else ctx.node.args[1]
    fields = {"plain": plain, "source": nodes[1 - at[0]]}
    ctx.project(weight, None, produced, out_dim=term.index(o), in_dim=term.index(c), **fields)
    axes[o] = (produced,)
    return Dims(axis for letter in out for axis in axes[letter])
