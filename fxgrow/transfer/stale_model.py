"""Warns when the model before a growth is trained as if it were the grown one, or by an optimiser that has left it.

Nothing is put on the models: their parameters are watched through weak references, when an optimiser has made a step.
The first step that trains what it should ends the watch, and with the last watch the hook on optimisers goes.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from fxgrow.errors import StaleModelWarning, warn

DROPPED = (
    "a model is trained that fxgrow has grown, and the grown one was dropped: growth returns a new model. Keep it: "
    "model = fxgrow.grow(model, ..., optimizer=optimizer)."
)
NOT_TRAINED = (
    "the optimizer was given to a growth and holds the grown model's parameters, but the gradients are of the model "
    "before: no step changes anything. Train the grown one: model = fxgrow.grow(model, ..., optimizer=optimizer), or "
    "grower.model after each growth of a Grower."
)
NOT_MOVED = (
    "the optimizer holds parameters of a model before growth, while the grown one gets the gradients: no step changes "
    "it. Pass the optimizer to the growth, fxgrow.grow(model, ..., optimizer=optimizer), or make a new one."
)


#: ends a watch without a word
AS_IT_SHOULD = ""


class _Watch:
    """The parameters of a model before and after a growth, and gradients that were there already."""

    def __init__(self, old: nn.Module, new: nn.Module, record: object, moved: bool) -> None:
        before, after = ({id(p): weakref.ref(p) for p in model.parameters()} for model in (old, new))
        self.old = {i: ref for i, ref in before.items() if i not in after}
        self.new = {i: ref for i, ref in after.items() if i not in before}
        self.left = {id(g): (weakref.ref(g), g._version) for p in _alive(self.old) if (g := p.grad) is not None}
        self.results = weakref.ref(new), weakref.ref(record)
        self.moved = moved
        #: steps of optimisers that hold old parameters and others, while the new ones got gradients
        self.steps = 0

    def new_gradient(self, p: Tensor) -> bool:
        """Whether a parameter has a gradient that was not there at the growth."""
        ref, version = self.left.get(id(p.grad), (None, 0))
        return p.grad is not None and (ref is None or ref() is not p.grad or version != p.grad._version)

    def after_step(self, owned: Mapping[int, Tensor]) -> str | None:
        """What a step of an optimiser with these parameters says: a warning, `AS_IT_SHOULD`, or None, nothing yet."""
        old, new = ([p for p in _alive(refs) if owned.get(id(p)) is p] for refs in (self.old, self.new))
        if next(_alive(self.old), None) is None:
            return AS_IT_SHOULD
        if any(map(self.new_gradient, new)):
            # another optimiser may have been left with old parameters
            return AS_IT_SHOULD if all(owned.get(id(p)) is p for p in _alive(self.new) if p.requires_grad) else None
        if new:
            return NOT_TRAINED if any(map(self.new_gradient, _alive(self.old))) else None
        if any(map(self.new_gradient, old)):
            return DROPPED if not self.moved and self._dropped() else AS_IT_SHOULD
        if not old or all(p.grad is None for p in _alive(self.new)):
            return None
        self.steps += 1
        others = any(p.grad is not None for i, p in owned.items() if i not in self.old)
        # an optimiser that trains something else too may come before one of the grown model
        return NOT_MOVED if self.steps > 1 or not others else None

    def _dropped(self) -> bool:
        if self.results[0]() is not None:
            gc.collect()  # graphs refer to themselves
        return all(ref() is None for ref in self.results)


def _alive(refs: Mapping[int, weakref.ref[nn.Parameter]]) -> Iterator[nn.Parameter]:
    return (p for ref in refs.values() if (p := ref()) is not None)


_watches: list[_Watch] = []
_hooks: list[Any] = []


def watch(old: nn.Module, new: nn.Module, record: object, moved: bool) -> None:
    """Warns if `old` is trained where `new`, grown from it, should be; `moved`: with the optimiser that trained it."""
    _watches.append(_Watch(old, new, record, moved))
    if not _hooks:
        _hooks.append(register_optimizer_step_post_hook(_after_step))


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if torch.compiler.is_compiling():
        return
    owned = {id(p): p for group in optimizer.param_groups for p in group["params"]}
    verdicts = [(each, each.after_step(owned)) for each in _watches]
    _watches[:] = [each for each, verdict in verdicts if verdict is None]
    if not _watches:
        while _hooks:
            _hooks.pop().remove()
    for message in {verdict for _, verdict in verdicts if verdict}:
        warn(message, StaleModelWarning)
