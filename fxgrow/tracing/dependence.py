"""What the values of nodes depend on, as far as Python code that looks at them is concerned."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx

from fxgrow.graph.node_functions import draw

_RANDOM = ("rand", "normal", "uniform", "bernoulli", "multinomial", "exponential")


class Dependence:
    """Facts about the nodes of a trace, found while they are recorded."""

    def __init__(self) -> None:
        #: nodes that no input can change
        self.constant: set[fx.Node] = set()
        #: nodes that depend on parameters or buffers
        self.hidden: set[fx.Node] = set()
        #: nodes that depend on the values of tensors: empty tensors, and all that is not a tensor
        self.data: set[fx.Node] = set()
        #: nodes that depend on random numbers, and on no values of inputs, parameters or buffers
        self.drawn: set[fx.Node] = set()
        #: per number that depends on them, the paths of `training` flags
        self.flags: dict[fx.Node, frozenset[str]] = {}

    def is_size(self, node: fx.Node) -> bool:
        """Whether a number is made of the sizes of inputs and of activations."""
        return node not in self.constant and node not in self.data and node not in self.flags

    def add(self, node: fx.Node, value: Any, guessed: bool) -> None:
        """Enters a node after its inputs; `guessed` says that its sizes depend on data."""
        sources = node.all_input_nodes
        if node.op != "placeholder" and self.constant.issuperset(sources):
            self.constant.add(node)
        if node.op in ("call_module", "get_attr") or not self.hidden.isdisjoint(sources):
            self.hidden.add(node)
        guessed = guessed or not self.data.isdisjoint(sources)
        if node.target is len and sources and not isinstance(sources[0].meta["val"], Tensor):
            guessed = False  # the items of a list may depend on data, their number rarely does
        if guessed and (not isinstance(value, Tensor) or value.numel() == 0):
            self.data.add(node)
        values = [s for s in sources if isinstance(s.meta["val"], Tensor) or s in self.data]
        if node.op in ("call_function", "call_method") and all(s in self.drawn or s in self.constant for s in values):
            name = str(getattr(node.target, "__name__", node.target))
            if node.target is draw or any(word in name for word in _RANDOM) or not self.drawn.isdisjoint(sources):
                self.drawn.add(node)
        flags = frozenset().union(*(self.flags.get(source, frozenset()) for source in sources))
        if flags and not isinstance(value, Tensor):
            self.flags[node] = flags
