"""Which tensors of a graph have their samples in the second dimension, `[steps, samples, ...]`; inputs have not.

Operators that move dimensions, stack tensors or select an entry are followed; all others keep the dimension.
"""

from __future__ import annotations

import operator

import torch
from torch import Tensor, fx

from fxgrow.graph.unrolled_rnn import rnn_outputs

_MOVES = {"transpose", "permute", "swapaxes", "swapdims", "movedim", "moveaxis", "t"}
_STACKS = {"stack", "unsqueeze"}
#: distinct sizes, to see where a dimension goes
_SIZES = (2, 3, 5, 7, 11, 13, 17, 19)


def nodes_with_batch_second(graph: fx.Graph) -> set[fx.Node]:
    """The nodes whose output, or whose outputs, have samples in the second dimension."""
    nodes: set[fx.Node] = set()
    for node in graph.nodes:
        sources = node.all_input_nodes
        # a sum with a parameter is laid out like the other summand
        if sources and _second(node, next((n for n in sources if n in nodes), sources[0]), nodes):
            nodes.add(node)
    return nodes


def _second(node: fx.Node, source: fx.Node, nodes: set[fx.Node]) -> bool:
    before, after = source.meta.get("val"), node.meta.get("val")
    second = source in nodes
    if source.target is rnn_outputs and node.target is operator.getitem:
        return second if node.args[1] == 0 else True  # last states: [layers, samples, units]
    if not isinstance(before, Tensor) or not isinstance(after, Tensor):
        return second
    # a layer may have any name
    name = "" if node.op == "call_module" else getattr(node.target, "__name__", str(node.target))
    if name in _MOVES and before.dim() <= len(_SIZES):
        return _moved(node, before.dim(), int(second)) == 1
    if after.dim() > before.dim():
        return second != (name in _STACKS and after.shape[1:] == before.shape)
    return second and after.shape[:2] == before.shape[:2]


def _moved(node: fx.Node, dims: int, at: int) -> int:
    """Where a dimension goes, found by moving the dimensions of a meta tensor."""
    marked = torch.empty(_SIZES[:dims], device="meta")
    args = fx.map_arg(node.args[1:], lambda n: n.meta["val"])
    kwargs = fx.map_arg({k: v for k, v in node.kwargs.items() if k != "input"}, lambda n: n.meta["val"])
    move = getattr(marked, getattr(node.target, "__name__", str(node.target)))
    return tuple(move(*args, **kwargs).shape).index(_SIZES[at])
