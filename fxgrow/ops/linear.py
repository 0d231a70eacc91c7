"""Layers that write a fresh axis at every position: Linear, Embedding, products with a parameter."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from itertools import islice
from string import ascii_letters as _LETTERS
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from fxgrow.axes.axes import Axis, Dims, UnitVar, axis_of, fixed, length
from fxgrow.ops.context import Context, Unsupported
from fxgrow.ops.elementwise import broadcast
from fxgrow.ops.expert_routing import routes
from fxgrow.ops.reductions import baddbmm_of_activations, einsum_of_activations, matmul_of_activations
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
    _lookup(ctx, weight, getattr(ctx.module, "max_norm", max_norm))
    return Dims((*input, weight[1]))


def _lookup(ctx: Context, weight: Dims, max_norm: Any) -> None:
    """Rows of a weight by their numbers."""
    ctx.pin(weight[0], "input", "one entry per index that the input can hold")
    if max_norm is not None:
        ctx.pin(weight[1], "norm", "max_norm scales by the norm over the whole axis")
    source = ctx.argument(0, "input")
    ctx.project(weight, None, weight[1], out_dim=1, in_dim=0, plain=False, source=source)
    ctx.attribute("embedding_dim", weight[1])


@op(torch.matmul, torch.mm, torch.bmm, operator.matmul, "matmul", "mm", "bmm", "__matmul__")
def matmul(ctx: Context, a: Dims, b: Dims) -> Dims:
    at = _weight_among(a, b)
    if at is None or min(len(a), len(b)) < 2:
        return matmul_of_activations(ctx, a, b)
    batch = _LETTERS[: max(len(a), len(b)) - 2]
    first, second = (batch[len(batch) + 2 - len(t) :] + word for t, word in ((a, "yz"), (b, "zx")))
    nodes = [ctx.argument(0, "input", "mat1"), ctx.argument(1, "other", "mat2")]
    return linear_map(ctx, [first, second], batch + "yx", [a, b], nodes, at)


@op(torch.tensordot)
def tensordot(ctx: Context, a: Dims, b: Dims, dims: Any = 2, out: Any = None) -> Dims:
    over = (range(len(a) - dims, len(a)), range(dims)) if isinstance(dims, int) else dims
    first, second = list(_LETTERS[: len(a)]), list(_LETTERS[len(a) : len(a) + len(b)])
    made = first + second
    for i, j in zip(*over, strict=True):
        made = [letter for letter in made if letter not in (first[i], second[j])]
        second[j] = first[i]
    return einsum(ctx, f"{''.join(first)},{''.join(second)}->{''.join(made)}", a, b)


@op(torch.addmm, "addmm")
def addmm(ctx: Context, input: Dims, mat1: Dims, mat2: Dims, *args: Any, **kwargs: Any) -> Dims:
    if _weight_among(mat1, mat2) != 1:
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
    routing, source = routes(ctx.node), ctx.argument(0, "mat_a")
    fields = {"plain": False, "experts": True, "groups": routing.experts if routing else 0, "source": source}
    ctx.project(weight, None, weight[out_dim], out_dim=out_dim, in_dim=in_dim, **fields)
    return Dims((mat_a[0], weight[out_dim]))


@op(torch.baddbmm, "baddbmm")
def baddbmm(ctx: Context, input: Dims, batch1: Dims, batch2: Dims, *args: Any, **kwargs: Any) -> Dims:
    at = _weight_among(batch1, batch2)
    if at is None:
        return baddbmm_of_activations(ctx, input, batch1, batch2)
    nodes = [ctx.argument(1, "batch1"), ctx.argument(2, "batch2")]
    return broadcast(ctx, linear_map(ctx, ["ayz", "azx"], "ayx", [batch1, batch2], nodes, at), input)


@op(torch.einsum, "torch.functional.einsum")
def einsum(ctx: Context, equation: str, *operands: Any) -> Dims:
    """A linear map along some letters, such as `bth,hd->btd` with a weight [h, d]; else a product of activations."""
    tensors = list(operands[0]) if len(operands) == 1 and not isinstance(operands[0], Dims) else list(operands)
    given, arrow, out = equation.replace(" ", "").replace("...", ".").partition("->")
    terms = given.split(",")
    if not arrow:
        out = "".join(sorted(letter for letter in set(given) - {","} if letter == "." or given.count(letter) == 1))
    at = _weight_among(*tensors) if len(tensors) == len(terms) > 1 else None
    nodes: list[Any] = []
    fx.map_arg(ctx.node.args, nodes.append)
    if at is None or len(nodes) != len(terms) or not _is_linear_map(terms, at, out):
        return einsum_of_activations(ctx, *_spelled_out(terms, out, tensors), tensors)
    return linear_map(ctx, terms, out, tensors, nodes, at)


def _spelled_out(terms: list[str], out: str, tensors: list[Dims]) -> tuple[list[str], str]:
    """Terms and output with one letter, from the last on, for each axis that a dot stands for."""
    spare = [len(tensor) - len(term) + 1 if "." in term else 0 for term, tensor in zip(terms, tensors, strict=True)]
    letters = "".join(map(chr, range(ord("α"), ord("α") + max(spare))))
    dots = [letters[len(letters) - n :] for n in spare]
    return [term.replace(".", dot) for term, dot in zip(terms, dots, strict=True)], out.replace(".", letters)


def _is_linear_map(terms: list[str], at: int, out: str) -> bool:
    """Whether every unit of the output sums over some of another factor's and nothing else is summed over."""
    weight, others = terms[at], [term for i, term in enumerate(terms) if i != at]
    given = set("".join(others))
    summed = set(weight) & given - set(out)
    once = all(len(set(word)) == len(word) for word in (*terms, out)) and "." not in weight
    alone = all(sum(letter in term for term in others) == 1 for letter in (*summed, *(["."] if "." in given else [])))
    return bool(summed and set(weight) - given) and once and alone and given | set(weight) == set(out) | summed


def _weight_among(*tensors: Dims) -> int | None:
    """Which of some tensors is a weight, where the others are none; of two a stored matrix is one for the other."""
    kinds = [t.parameter is not None or bool(t.is_weight) for t in tensors]
    if len(kinds) == 2 and all(kinds):
        return 1 if tensors[1].parameter is not None and len(tensors[1]) == 2 else None
    at = kinds.index(True) if kinds.count(True) == 1 else None
    # a stored tensor that is no parameter is a weight on the right, where layers have it
    return None if at is None or (at == 0 and not tensors[0].is_weight) else at


def linear_map(
    ctx: Context, terms: Sequence[str], out: str, tensors: Sequence[Dims], nodes: Sequence[Any], at: int
) -> Dims:
    """A product of tensors, with a letter for each axis, whose factor `at` is a weight: it sums over some letters.

    Others it makes. The rest number the members of an ensemble, and so do letters that are made and stand before all
    that is summed over, as in [members, in, out].
    """
    weight, term = tensors[at], terms[at]
    axes: dict[str, tuple[Axis, ...]] = {}
    source: dict[str, Any] = {}
    for i in (i for i in range(len(terms)) if i != at):
        # a dot takes as many axes as the letters leave
        rest, spare = iter(tensors[i]), len(tensors[i]) - len(terms[i]) + 1
        for letter in terms[i]:
            here = tuple(islice(rest, spare if letter == "." else 1))
            axes[letter] = tuple(broadcast(ctx, Dims(axes[letter]), Dims(here))) if letter in axes else here
            source[letter] = nodes[i]
    summed = [letter for letter in term if letter in axes and letter not in out]
    made = [letter for letter in term if letter not in axes]
    made = [c for c in made if c == made[-1] or term.index(c) > min(map(term.index, summed))]
    members = [letter for letter in term if letter not in (*summed, *made)]
    for letter, axis in zip(term, weight, strict=True):
        if letter in members:
            ctx.pin(axis, "size", "one entry per group")
            axes[letter] = (broadcast(ctx, Dims([axis]), Dims(axes.get(letter, (axis,))))[0],)
        elif letter in summed:
            ctx.same(axes[letter][0], axis)
        else:
            axes[letter] = (axis,)
    # statistics need features last, as in `F.linear`
    given = terms[1 - at]
    plain = len(term) == len(terms) == 2 and given == out[:-1] + summed[0] and out[-1] == made[0] and len(given) > 1
    routing = routes(ctx.node) if members and at == 1 else None
    groups = 1 if not members else routing.experts if routing else 0
    fields = {"plain": plain, "experts": term[0] in members, "groups": groups}
    for o in made:
        for c in summed:
            at_dims = {"out_dim": term.index(o), "in_dim": term.index(c)}
            ctx.project(weight, None, axes[o][0], **at_dims, source=source[c], **fields)
    return Dims(axis for letter in out for axis in axes[letter])


@op(F.bilinear, nn.Bilinear)
def bilinear(ctx: Context, input1: Dims, input2: Dims, weight: Dims | None = None, bias: Dims | None = None) -> Dims:
    """A form per output: it reads both inputs, and new columns on either side are zero."""
    weight, bias = weight or ctx.parameter("weight") or Dims(), bias or ctx.parameter("bias")
    for i, (x, name) in enumerate(((input1, "in1_features"), (input2, "in2_features"))):
        ctx.same(x[-1], weight[1 + i])
        ctx.attribute(name, weight[1 + i])
        source = ctx.argument(i, f"input{1 + i}")
        ctx.project(weight, bias, weight[0], in_dim=1 + i, plain=False, source=source)
    ctx.attribute("out_features", weight[0])
    batch = broadcast(ctx, Dims(input1[:-1]), Dims(input2[:-1])) if len(input1) > 1 else ()
    return Dims((*batch, weight[0]))


@op(F.embedding_bag, nn.EmbeddingBag)
def embedding_bag(
    ctx: Context, input: Dims, weight: Any = None, offsets: Any = None, max_norm: Any = None, *args: Any, **kwargs: Any
) -> Dims:
    """Means or sums of embeddings: of the rows of a matrix, or of the parts of a list that begin at offsets."""
    if ctx.module is not None:  # called with (input, offsets, per_sample_weights)
        weight, max_norm = ctx.parameter("weight"), ctx.module.max_norm
    elif len(weight) != 2:
        raise Unsupported("embedding_bag with its arguments in the old order")
    bags = input[:1] if len(input) == 2 else tuple(fixed(n) for n in ctx.shape[:1])
    _lookup(ctx, weight, max_norm)
    return Dims((*bags, weight[1]))
