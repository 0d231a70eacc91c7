"""Averages of weights grow with the model: `swa_utils.AveragedModel`, or a plain copy that the user updates.

requires: an average with the names and shapes of the model before growth.
ensures:  old entries keep their averages, new ones start at the new weights.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.optim.swa_utils import AveragedModel

from fxgrow.errors import FxgrowError
from fxgrow.graph.graph import copy_graph
from fxgrow.transfer.optimizer_state import spread
from fxgrow.transfer.parameters import Assign, ParameterChange
from fxgrow.transfer.wrappers import unwrapped


def check_average(average: nn.Module, model: nn.Module) -> None:
    """Refuses what is no average of this model before any time is spent.

    Raises:
        FxgrowError: a parameter is missing, or has another shape.
    """
    shadow, _ = unwrapped(_shadow(average))
    theirs = _tensors(shadow)
    for name, parameter in model.named_parameters():
        found = theirs.get(name)
        if found is None or found.shape != parameter.shape:
            what = "is missing" if found is None else f"has the shape {list(found.shape)}"
            raise FxgrowError(
                f"ema= is no average of this model: {name!r} {what} in it and has the shape {list(parameter.shape)} in "
                "the model. Make it from the model, before growth."
            )


@torch.no_grad()
def grown_average(average: nn.Module, change: ParameterChange) -> tuple[nn.Module, Assign]:
    """The average that goes on: the same `AveragedModel` once `Assign` is called, or a new plain module.

    Raises:
        FxgrowError: it is no average of the model before growth.
    """
    check_average(average, change.old)
    shadow, wrap = unwrapped(_shadow(average))
    theirs = _tensors(shadow)
    memo: dict[int, Any] = {}
    for name, tensor in _tensors(change.new).items():
        old = theirs.get(name)
        if old is None or id(tensor) in memo:
            continue  # a constant that only a graph has; tied parameters are one
        positions = change.index.get(name)
        if positions is None and old.shape != tensor.shape:
            continue
        value = old.detach().clone() if positions is None else spread(old, positions, tensor)
        memo[id(tensor)] = nn.Parameter(value, old.requires_grad) if isinstance(tensor, nn.Parameter) else value
    twin = _copy(change.new, memo)
    for path, module in twin.named_modules():
        module.training = _mode(shadow, path)
    now = wrap(twin)

    def assign() -> None:
        if isinstance(average, AveragedModel):
            average.module = now

    return (average if isinstance(average, AveragedModel) else now), assign


def _shadow(average: nn.Module) -> nn.Module:
    return average.module if isinstance(average, AveragedModel) else average


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def _copy(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    if isinstance(model, fx.GraphModule):
        return copy_graph(model, memo)
    meta = vars(model).get("meta")
    if isinstance(meta, dict) and meta.keys() <= {"fxgrow"}:
        memo[id(meta)] = {}  # the record of the growth is the model's
    return copy.deepcopy(model, memo)


def _mode(shadow: nn.Module, path: str) -> bool:
    try:
        return shadow.get_submodule(path).training
    except AttributeError:
        return shadow.training
