"""Does the other mode's code do the same? Followed along a trace, without recording or running anything again.

Most models that ask for their mode keep a cache in one of them, and compute the same. A second trace would say so too,
in three times the time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from fxgrow.errors import CaptureError
from fxgrow.tracing.tracer import ValueTracer


class Follower(ValueTracer):
    """Runs a model's code with some `training` flags read as their opposite, along the nodes of a trace.

    The code gets proxies of the trace's own nodes as long as it asks for those, in that order.
    """

    def __init__(self, trace: ValueTracer) -> None:
        """Follows `trace`, with the flags that its code branched on the other way."""
        super().__init__(trace.inputs, trace.call, trace.leaves, frozenset(trace.branches), trace.opaque)
        self.trail = trace.trail
        self.runner, self.constants = trace.runner, trace.constants
        self._names, self._fixed, self._guessed = trace._names, trace._fixed, trace._guessed
        self._on_flags = trace._flags
        self._at = 0
        #: the code may have caught the error that says so
        self._lost = False

    def agrees(self, model: nn.Module) -> bool:
        """Whether the model's code asks for the same nodes."""
        if any(_changes_shape(node) for node, _, _ in self.trail):
            return False  # the values that the trace left are not those the code saw on its way
        try:
            self.record(model)
        except CaptureError:
            return False
        return not self._lost and self._at == len(self.trail) and self.branches.keys() <= self.flipped

    def create_node(
        self,
        kind: str,
        target: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        name: str | None = None,
        type_expr: Any = None,
    ) -> fx.Node:
        """The trace's next node, if that is what the code asks for."""
        del name, type_expr
        if self._at < len(self.trail) and not self._lost:
            node, node_args, node_kwargs = self.trail[self._at]
            same = node.op == kind and node.target == target and node_args == args and node_kwargs == kwargs
            # what is computed from a flag has another value now
            if same and not any(source in self._on_flags for source in node.all_input_nodes):
                if node in self._on_flags:
                    self._flags[node] = self._on_flags[node]
                self._at += 1
                return node
        self._lost = True
        raise CaptureError(f"The other mode asks for {target}.")

    def forget_question(self, frame: Any) -> None:
        """The node is gone from the trace already."""
        key, _ = self._asked.pop((id(frame), frame.f_code, frame.f_lasti), (None, None))
        if key is not None:
            del self._guards[key]


def _changes_shape(node: fx.Node) -> bool:
    """`unsqueeze_` and its like."""
    if node.op != "call_method" or not str(node.target).endswith("_") or not node.args:
        return False
    source = node.args[0]
    value = source.meta.get("val") if isinstance(source, fx.Node) else None
    return isinstance(value, torch.Tensor) and value.shape != source.meta["tensor_meta"].shape  # type: ignore[union-attr]
