"""Averages of weights grow with the model: `swa_utils.AveragedModel`, or a plain copy that the user updates.

requires: an average with the names and shapes of the model before growth.
ensures:  old entries keep their averages, new ones start at the new weights.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from fxgrow.errors import FxgrowError
from fxgrow.graph.graph import copy_module, named_tensors, same_kind
from fxgrow.transfer.parameter_change import Assign, ParameterChange, spread
from fxgrow.transfer.wrappers import unwrapped


def check_average(average: nn.Module, model: nn.Module) -> None:
    """Refuses an average of another model before any time is spent.

    Raises:
        FxgrowError: a parameter is missing, or has another shape.
    """
    averages = named_tensors(unwrapped(_averaged(average))[0])
    for name, parameter in model.named_parameters():
        tensor = averages.get(name)
        if tensor is None or tensor.shape != parameter.shape:
            what = "is missing" if tensor is None else f"has the shape {list(tensor.shape)}"
            raise FxgrowError(
                f"ema= is no average of this model: {name!r} {what} in it and has the shape {list(parameter.shape)} in "
                "the model. Make it from the model, before growth."
            )


@torch.no_grad()
def prepare_average(average: nn.Module, change: ParameterChange) -> tuple[nn.Module, Assign]:
    """Returns the grown average: the same `AveragedModel` once `Assign` is called, or a new plain module.

    Raises:
        FxgrowError: it is no average of the model before growth.
    """
    check_average(average, change.old)
    averaged, wrap = unwrapped(_averaged(average))
    averages = named_tensors(averaged)
    replaced: dict[int, Tensor] = {}
    for name, tensor in named_tensors(change.new).items():
        old = averages.get(name)
        if old is None or id(tensor) in replaced:
            continue  # a constant that only a graph has; tied parameters are one
        positions = change.index.get(name)
        if positions is None and old.shape != tensor.shape:
            continue
        value = old.detach().clone() if positions is None else spread(old, positions, tensor)
        replaced[id(tensor)] = same_kind(value, old)
    grown = copy_module(change.new, replaced)
    modes = {path: module.training for path, module in averaged.named_modules()}
    for path, module in grown.named_modules():
        module.training = modes.get(path, averaged.training)
    wrapped = wrap(grown)

    def assign() -> None:
        if isinstance(average, AveragedModel):
            average.module = wrapped

    return (average if isinstance(average, AveragedModel) else wrapped), assign


def _averaged(average: nn.Module) -> nn.Module:
    return average.module if isinstance(average, AveragedModel) else average
