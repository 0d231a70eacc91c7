"""What a growth means for whatever holds parameters of the model: one change, prepared first and then made.

requires: the model before and after, and the new positions of old entries.
ensures:  everything that can fail fails while a change is prepared; making it is assignments alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from fxgrow.errors import FxgrowError
from fxgrow.transfer.optimizer_state import Positions, moved_parameters, spread

Assign = Callable[[], None]


@dataclass(frozen=True)
class ParameterChange:
    """A growth.

    Attributes:
        old: the model before, without what wraps it.
        new: the model after.
        index: for each parameter and buffer that grew, the new positions of its old entries per dimension.
    """

    old: nn.Module
    new: nn.Module
    index: Mapping[str, Positions]

    @cached_property
    def parameters(self) -> list[tuple[nn.Parameter, nn.Parameter, Positions]]:
        """Each old parameter, the one in its place, and where its entries are."""
        return moved_parameters(self.old, self.new, self.index)


def gradients(change: ParameterChange) -> Assign:
    """What has been accumulated stays: old entries keep their gradient, new ones have none yet."""
    found = [(new, _gradient(old.grad, new, at)) for old, new, at in change.parameters if old.grad is not None]

    def assign() -> None:
        for parameter, gradient in found:
            parameter.grad = gradient

    return assign


def _gradient(old: Tensor, new: nn.Parameter, at: Positions) -> Tensor:
    if all(positions is None for positions in at):
        return old
    if old.layout is torch.strided:
        return spread(old, at, torch.zeros_like(new))
    dense = spread(old.to_dense(), at, torch.zeros_like(new))
    return dense.to_sparse(old.sparse_dim())


def parameter_hooks(change: ParameterChange) -> Assign:
    """Hooks on gradients (`register_hook`, `register_post_accumulate_grad_hook`) go with their parameter.

    The dict that holds them goes as it is, so that the handles of the user still remove them.
    """

    def assign() -> None:
        for old, new, _ in change.parameters:
            for kind in ("_backward_hooks", "_post_accumulate_grad_hooks"):
                hooks = getattr(old, kind, None)
                if hooks:
                    setattr(new, kind, hooks)

    return assign


def parameter_lists(lists: list[list[Tensor]], change: ParameterChange) -> Assign:
    """Lists of the user's that hold parameters, for clipping say, hold the new ones in their places.

    Raises:
        FxgrowError: one of them holds no parameter of the model.
    """
    places = {id(old): new for old, new, _ in change.parameters}
    for held in lists:
        if held and not any(id(t) in places for t in held):
            raise FxgrowError(
                f"A list in parameters= holds {len(held)} tensors, none of them a parameter of this "
                f"{type(change.old).__name__}: pass lists made from its parameters(), or read grower.parameters()."
            )
    found = [(held, [places.get(id(t), t) for t in held]) for held in lists]

    def assign() -> None:
        for held, now in found:
            held[:] = now

    return assign
