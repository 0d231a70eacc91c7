"""Everything that holds parameters of a model in training: checked when a Grower is made, changed at each growth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from fxgrow.errors import FxgrowError
from fxgrow.transfer.averaged_model import check_average, prepare_average
from fxgrow.transfer.module_hooks import prepare_module_hooks
from fxgrow.transfer.optimizer_state import check_owner, prepare_transfer
from fxgrow.transfer.parameter_change import Assign, ParameterChange
from fxgrow.transfer.parameters import prepare_gradients, prepare_parameter_hooks, prepare_parameter_lists


@dataclass
class TrainingState:
    """What holds parameters of the model: an average of its weights and lists that the user made, among others."""

    optimizers: Sequence[Optimizer]
    ema: nn.Module | None
    lists: list[list[Tensor]]

    def check(self, model: nn.Module, lr_scheduler: Any) -> None:
        """Refuses what belongs to another model before any time is spent."""
        unchanged = ParameterChange(model, model, {})
        for optimizer in self.optimizers:
            check_owner(optimizer, model)
        for scheduler in lr_scheduler if isinstance(lr_scheduler, (list, tuple)) else [lr_scheduler]:
            if scheduler is not None and not hasattr(scheduler, "step"):
                raise FxgrowError(
                    f"lr_scheduler is a {type(scheduler).__name__}: give a learning rate scheduler, or several."
                )
            owner = getattr(scheduler, "optimizer", None)
            if owner is not None and all(owner is not o for o in self.optimizers):
                raise FxgrowError(
                    f"the {type(scheduler).__name__} scheduler sets the rates of another optimizer than the Grower's; "
                    "make it from the one that trains the model"
                )
        if self.ema is not None:
            check_average(self.ema, model)
        prepare_parameter_lists(self.lists, unchanged)

    def prepare(self, change: ParameterChange) -> Assign:
        """Prepares the change of all of it; the function that is returned makes it and cannot fail."""
        assigns = [prepare_transfer(optimizer, change) for optimizer in self.optimizers]
        assigns += [prepare_gradients(change), prepare_parameter_hooks(change)]
        assigns.append(prepare_parameter_lists(self.lists, change))
        ema = self.ema
        if ema is not None:
            ema, assign_average = prepare_average(ema, change)
            assigns.append(assign_average)
        assigns.append(prepare_module_hooks(change))

        def assign() -> None:
            for each in assigns:
                each()
            self.ema = ema

        return assign


def optimizers_of(given: Any) -> Sequence[Optimizer]:
    """Returns one optimiser or several as a sequence."""
    optimizers = [given] if isinstance(given, Optimizer) else given
    several = isinstance(optimizers, (list, tuple)) and len(optimizers) > 0
    if not several or not all(isinstance(o, Optimizer) for o in optimizers):
        raise FxgrowError(f"optimizer is a {type(given).__name__}: give a torch.optim.Optimizer, or a list of several.")
    return optimizers


def lists_of(given: Any) -> list[list[Tensor]]:
    """Returns one list of parameters or several as a list of lists."""
    if not isinstance(given, (list, tuple)):
        raise FxgrowError(f"parameters is a {type(given).__name__}: give a list of parameters, or several lists.")
    lists: list[Any] = [given] if len(given) and isinstance(given[0], Tensor) else list(given)
    if not all(isinstance(tensors, list) for tensors in lists):
        raise FxgrowError("parameters= takes lists of parameters, which are changed in place.")
    return lists
