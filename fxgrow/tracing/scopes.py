"""Blocks of the model's code that a trace is in: checkpointed ones, and those without gradients."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx

from fxgrow.graph.conditional import ConditionalCodeGen, part_numbers
from fxgrow.graph.node_functions import set_grad_enabled


class Scopes:
    """The blocks around the code that is being traced."""

    def __init__(self) -> None:
        #: the number of the checkpointed part
        self.checkpoint: int | None = None
        self._grad_modes: list[tuple[bool, fx.Node]] = []
        self._without_grad: bool | None = None  # whether an autograd function that is followed has switched them off

    @contextlib.contextmanager
    def checkpointed(self, graph: fx.Graph, in_function: bool) -> Iterator[None]:
        """Nodes recorded inside the block are a part that is computed again in the backward pass.

        `in_function`: the block is the forward of an autograd function, which has gradients off while it runs the part.
        """
        outer = self.checkpoint, self._without_grad
        self.checkpoint, self._without_grad = outer[0] or next(part_numbers), False if in_function else outer[1]
        graph.set_codegen(ConditionalCodeGen())
        try:
            yield
        finally:
            self.checkpoint, self._without_grad = outer

    def record_grad_mode(self, create_node: Callable[..., fx.Node], enabled: bool) -> None:
        """Records ``with torch.no_grad():`` as two nodes, the second of which restores the mode before the first."""
        if self._without_grad is enabled and not self._grad_modes:
            self._without_grad = not enabled
            return
        restores = self._grad_modes and self._grad_modes[-1][0] == enabled
        argument: Any = self._grad_modes.pop()[1] if restores else enabled
        node = create_node("call_function", set_grad_enabled, (argument,), {})
        if argument is enabled:
            self._grad_modes.append((torch.is_grad_enabled(), node))
        torch._C._set_grad_enabled(enabled)
