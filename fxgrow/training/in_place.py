"""Growth in place, for trainers that keep the model object: it stays the same object and gets new parameters."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from fxgrow.checkpoints.weights import rebuild
from fxgrow.data.argument_checks import MODULE, read_argument
from fxgrow.errors import CaptureError, FileError, FxgrowError
from fxgrow.graph.graph import unwrap
from fxgrow.pipeline.growth_record import keep_record
from fxgrow.rewriting.transplant import transplant
from fxgrow.storage.recipe import Recipe, keep_recipe
from fxgrow.training.grower import Grower
from fxgrow.training.schedule import Schedule
from fxgrow.transfer.wrappers import unwrapped


def adopt(model: nn.Module, grown: nn.Module) -> None:
    """Gives a model the parameters, buffers, sizes and recipe of `grown`, a copy of it with other sizes."""
    transplant(model, grown)
    keep_recipe(model, Recipe.of(grown))


class GrowerInPlace(Grower):
    """A Grower whose model stays the same object, for loops that other libraries run.

    Takes what `fxgrow.Grower` takes. Growth is `into="module"`, so the model's code must allow it. Optimisers that wrap
    another one as `.optimizer` are unwrapped.

    Raises:
        FxgrowError: `into="graph"` is given, or what `Grower` raises.

    Example:
        >>> import torch, fxgrow
        >>> model = torch.nn.Sequential(torch.nn.Linear(6, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1))
        >>> batches = [(torch.randn(32, 6), torch.randn(32, 1)) for _ in range(4)]
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> grower = GrowerInPlace(model, optimizer, fxgrow.Every(steps=9), dataloader=batches, neurons=2)
        >>> grower.grow_now(), grower.model is model, model[0].out_features
        (True, True, 5)
    """

    def __init__(
        self, model: nn.Module, optimizer: Optimizer | Sequence[Optimizer], schedule: Schedule, **options: Any
    ) -> None:
        if options.setdefault("into", "module") != "module":
            raise FxgrowError(
                'into="graph" returns a new object, and this trainer keeps the model that it was given: take '
                'into="module", or grow a submodule where the integration takes the name of one.'
            )
        self._given = read_argument("model", model, MODULE, CaptureError)
        inside, _ = unwrapped(model)
        with without_forward_override(inside):
            super().__init__(model, _inner(optimizer), schedule, **options)
            self._fresh = fresh_copy(inside)
        self._callbacks.append(self._grow_in_place)

    def resize(self, recipe: Recipe) -> None:
        """Gives the model the sizes of a recipe, so that weights and optimisers saved with it can be loaded.

        Tensors whose sizes differ from the fresh model's are zero until then, and optimisers start afresh.
        """
        inside, _ = unwrapped(self._given)
        fresh = fresh_if_resized(inside, recipe, self._fresh)
        if fresh is None:
            return
        if self.ema is not None:
            raise FxgrowError("An average of the weights cannot be resized: make it after loading the checkpoint.")
        with without_forward_override(inside):
            new = rebuild(fresh, recipe, into="module")
        for optimizer in self._training_state.optimizers:
            _replace_parameters(optimizer, inside, new)
        adopt(inside, new)

    def grow_now(self, *args: Any, **options: Any) -> bool:
        with without_forward_override(unwrapped(self._given)[0]):
            return super().grow_now(*args, **options)

    def _ask(self, epoch_end: bool) -> bool:
        with without_forward_override(unwrapped(self._given)[0]):
            return super()._ask(epoch_end)

    def _grow_in_place(self, old: nn.Module, new: nn.Module, index: Mapping[str, Any]) -> None:
        adopt(old, new)
        if not hasattr(old, "meta"):
            old.meta = {}  # type: ignore[assignment]
        keep_record(old, self.growth)
        self.model, self._metrics.model = self._given, old


@contextlib.contextmanager
def without_forward_override(model: nn.Module) -> Iterator[None]:
    """Removes a `forward` that overrides the class's on the object, as Accelerate sets it for mixed precision."""
    attributes = vars(model)
    names = ("forward", "_original_forward") if "_original_forward" in attributes else ()
    override = {name: attributes.pop(name) for name in names}
    try:
        yield
    finally:
        attributes.update(override)


def recipe_of(model: nn.Module) -> Recipe:
    """Returns the recipe of a model inside its wrappers."""
    return Recipe.of(unwrap(model))


def fresh_copy(model: nn.Module) -> nn.Module | None:
    """Returns a copy of a model that has not grown; None of one that has."""
    return None if recipe_of(model).steps else copy.deepcopy(unwrap(model))


def fresh_if_resized(model: nn.Module, recipe: Recipe, fresh: nn.Module | None) -> nn.Module | None:
    """Returns the copy to rebuild a recipe's model from; None where the model has been through those growths."""
    if recipe_of(model).steps == recipe.steps:
        return None
    if fresh is None:
        raise FileError(
            "The saved model went through other growths than this one, which had grown before it was given here: build "
            "the model as it was before it grew."
        )
    return fresh


def _inner(optimizer: Any) -> Any:
    if isinstance(optimizer, (list, tuple)):
        return [_inner(o) for o in optimizer]
    inner = getattr(optimizer, "optimizer", None)
    return _inner(inner) if isinstance(inner, Optimizer) else optimizer


def _replace_parameters(optimizer: Optimizer, old: nn.Module, new: nn.Module) -> None:
    """Replaces the old model's parameters in an optimiser by the new one's, without state."""
    replaced = {p: new.get_parameter(name) for name, p in old.named_parameters()}
    for group in optimizer.param_groups:
        for p in replaced.keys() & group["params"]:
            optimizer.state.pop(p, None)
        group["params"][:] = [replaced.get(p, p) for p in group["params"]]
