"""Gradients, hooks and lists of parameters after a growth.

Everything that can fail fails while a change is prepared; making it is assignments alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxgrow.errors import FxgrowError
from fxgrow.transfer.parameter_change import Assign, ParameterChange, ParameterMove, spread


def prepare_gradients(change: ParameterChange) -> Assign:
    """Prepares accumulated gradients: old entries keep theirs, new ones start at zero."""
    moved = [(move.new, _gradient(move, move.old.grad)) for move in change.moves if move.old.grad is not None]

    def assign() -> None:
        for parameter, gradient in moved:
            parameter.grad = gradient

    return assign


def _gradient(move: ParameterMove, old: Tensor) -> Tensor:
    if move.unchanged:
        return old
    zeros = torch.zeros_like(move.new)
    if old.layout is torch.strided:
        return spread(old, move.positions, zeros)
    return spread(old.to_dense(), move.positions, zeros).to_sparse(old.sparse_dim())


def prepare_parameter_hooks(change: ParameterChange) -> Assign:
    """Prepares hooks on gradients (`register_hook`, `register_post_accumulate_grad_hook`).

    New parameters take over the very dicts that hold the hooks, so that the user's handles still remove them.
    """
    moves = change.moves

    def assign() -> None:
        for move in moves:
            for kind in ("_backward_hooks", "_post_accumulate_grad_hooks"):
                hooks = getattr(move.old, kind, None)
                if hooks:
                    setattr(move.new, kind, hooks)

    return assign


def prepare_parameter_lists(lists: list[list[Tensor]], change: ParameterChange) -> Assign:
    """Prepares the user's lists of parameters (for clipping, say), which are changed in place."""
    new = {id(move.old): move.new for move in change.moves}
    for tensors in lists:
        if tensors and not any(id(t) in new for t in tensors):
            raise FxgrowError(
                f"A list in parameters= holds {len(tensors)} tensors, none of them a parameter of this "
                f"{type(change.old).__name__}: pass lists made from its parameters(), or read grower.parameters()."
            )
    moved = [(tensors, [new.get(id(t), t) for t in tensors]) for tensors in lists]

    def assign() -> None:
        for tensors, replaced in moved:
            tensors[:] = replaced

    return assign
