"""Where the samples lie in the tensors of a graph: in the first dimension, in another, or beside frames or tokens.

Statistics see every tensor with its samples first, `[n, ...]`: frames of a video that lie in the batch dimension as
`[n, frames, ...]`. A tensor whose rows belong to no single sample (a weight that another network makes, a batch that a
convolution sees as its length) counts as one sample, `[1, ...]`.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.nn.modules.conv import _ConvNd

from fxgrow.graph.unrolled_rnn import rnn_outputs, rnn_scan

#: operators that may move a dimension and leave the shape as it is
_MOVES = {"transpose", "permute", "swapaxes", "swapdims", "movedim", "moveaxis", "t"}
#: dimensions of a tensor are numbered by sizes from here on
_FIRST = 101


class Samples(NamedTuple):
    """The samples lie in a dimension that is `[before, n, after]`, flattened."""

    dim: int = 0
    before: int = 1
    after: int = 1

    def fits(self, value: Tensor, n: int) -> bool:
        """Whether the value can have n samples there."""
        return value.dim() > self.dim and value.shape[self.dim] == self.before * n * self.after

    def first(self, value: Tensor, n: int) -> Tensor | None:
        """The value as `[n, ...]`; None where it does not have that many samples, or has them for features."""
        if value.dim() <= self.dim + 1 or value.shape[self.dim] % (self.before * n):
            return None
        after = value.shape[self.dim] // (self.before * n)
        if self.before == after == 1:
            return value if self.dim == 0 else value.movedim(self.dim, 0)
        parts: Tensor = value.unflatten(self.dim, (self.before, n, after)).movedim(self.dim + 1, 0)
        return parts.squeeze([d for d, size in ((self.dim + 1, self.before), (self.dim + 2, after)) if size == 1])

    def back(self, by_sample: Tensor, shape: torch.Size) -> Tensor:
        """The inverse of `first`, for a value of this shape."""
        n = len(by_sample)
        after = shape[self.dim] // (self.before * n)
        sizes = [n, *shape[: self.dim], self.before, after, *shape[self.dim + 1 :]]
        return by_sample.reshape(sizes).movedim(0, self.dim + 1).reshape(shape)


def by_sample(value: Tensor, n: int, samples: Samples | None) -> Tensor:
    """The value as `[n, ...]`, or `[1, ...]` where it is not laid out by sample."""
    first = samples.first(value, n) if samples is not None else None
    first = Samples().first(value, n) if first is None else first
    return value.unsqueeze(0) if first is None else first


def as_maps(value: Tensor, spatial: int) -> Tensor:
    """A value `[n, ...]` as `[rows, C, *spatial]`: the maps that a sample has beside each other become rows."""
    return value.flatten(0, value.dim() - spatial - 2) if spatial else value


def like_output(value: Tensor, n: int, samples: Samples | None, output: Tensor) -> Tensor:
    """The inverse of `by_sample`, for a value like `output`."""
    known = samples if samples is not None and samples.first(output, n) is not None else Samples()
    return known.back(value, output.shape) if len(value) == n else value.view_as(output)


def find_samples(graph: fx.Graph) -> dict[fx.Node, Samples]:
    """Where the samples of each tensor lie, as far as it can be followed; inputs have them in the first dimension."""
    places: dict[fx.Node, Samples] = {}
    n = next((v.shape[0] for v in map(_tensor, graph.find_nodes(op="placeholder")) if v is not None and v.dim()), 1)
    for node in graph.nodes:
        if node.op == "placeholder":
            places[node] = Samples()
            continue
        # a sum with a parameter is laid out like the other summand
        source = next((s for s in node.all_input_nodes if s in places), None)
        place = None if source is None else _followed(node, source, places[source], n)
        if place is not None and place.dim and _is_convolution(node):
            # the convolution runs along the samples
            places.pop(node.all_input_nodes[0], None)
        elif place is not None and isinstance(node.meta.get("val"), (Tensor, tuple, list)):
            places[node] = place
    return places


def _followed(node: fx.Node, source: fx.Node, place: Samples, n: int) -> Samples | None:
    before, after, name = _tensor(source), _tensor(node), _name(node)
    if after is None:
        return place
    if source.target is rnn_outputs and node.args[1] != 0:
        return Samples(1)  # last states: [layers, samples, units]
    if source.target is rnn_scan and node.args[1] != 0:
        return Samples()
    if before is None:
        return next((p for p in (place, Samples(), Samples(1)) if p.fits(after, n)), None)
    if before.shape == after.shape and name not in _MOVES:
        return place
    moved = _moved(node, source, place.dim)
    if moved is not None:
        place = place._replace(dim=moved)
    elif name == "stack":
        dim: Any = node.kwargs.get("dim", (*node.args, 0, 0)[1])
        dim %= after.dim()
        place = place._replace(dim=place.dim + (dim <= place.dim))
    elif before.numel() == after.numel():
        return _viewed(place, before, after, n)
    return place if place.fits(after, n) else None


def _viewed(place: Samples, before: Tensor, after: Tensor, n: int) -> Samples | None:
    """Where the samples lie in a view of the same entries in the same order."""
    outer = math.prod(before.shape[: place.dim]) * place.before
    for dim, size in enumerate(after.shape):
        start = math.prod(after.shape[:dim])
        if (size > 1 or n == 1) and outer % start == 0 and (start * size) % (outer * n) == 0:
            return Samples(dim, outer // start, start * size // (outer * n))
    return None


def _moved(node: fx.Node, source: fx.Node, dim: int) -> int | None:
    """Where an operator puts a dimension: shown by a tensor whose sizes number its dimensions."""
    known = node.op == "call_method" or getattr(node.target, "__module__", "").split(".")[0] in ("torch", "_operator")
    if node.op == "call_module" or not known or node.all_input_nodes != [source]:
        return None
    rank, like = source.meta["val"].dim(), node.meta["val"].dim()
    numbered = torch.empty(tuple(range(_FIRST, _FIRST + rank)), device="meta")
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda _: numbered)
    try:
        run: Any = getattr(numbered, str(node.target)) if node.op == "call_method" else node.target
        out = run(*args[node.op == "call_method" :], **kwargs)
    except Exception:  # sizes of a view, say
        return None
    sizes = list(out.shape) if isinstance(out, Tensor) and out.dim() == like else []
    return sizes.index(_FIRST + dim) if _FIRST + dim in sizes else None


def _is_convolution(node: fx.Node) -> bool:
    owner = node.graph.owning_module
    if node.op == "call_module" and owner is not None:
        return isinstance(owner.get_submodule(str(node.target)), _ConvNd)
    return _name(node).startswith("conv")


def _name(node: fx.Node) -> str:
    # a layer may have any name
    return "" if node.op == "call_module" else getattr(node.target, "__name__", str(node.target))


def _tensor(node: fx.Node) -> Tensor | None:
    value = node.meta.get("val")
    return value if isinstance(value, Tensor) else None
