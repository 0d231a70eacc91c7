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
    if name in _MOVES:
        # a tensor whose sizes number its dimensions shows where they go
        numbered = torch.empty(tuple(range(before.dim())), device="meta")
        options = {k: v for k, v in node.kwargs.items() if k != "input"}
        args, options = fx.map_arg((node.args[1:], options), lambda n: n.meta["val"])
        return bool(getattr(numbered, name)(*args, **options).shape[1] == int(second))
    if after.dim() > before.dim():
        return second != (name in _STACKS and after.shape[1:] == before.shape)
    return second and after.shape[:2] == before.shape[:2]
