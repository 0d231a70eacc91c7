"""Growth in Lightning: a callback that grows a LightningModule, or a part of it, through fit, checkpoint and resume.

Needs the package lightning: `pip install fxgrow[lightning]`. Lightning loads weights before it restores callbacks, so
the recipe is replayed from the module's own `on_load_checkpoint`, which the callback puts a step before.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from fxgrow.checkpoints.weights import rebuild
from fxgrow.errors import FileError, FxgrowError, MissingExtraError
from fxgrow.graph.graph import unwrap
from fxgrow.integrations._batches import check_one_process, on_device
from fxgrow.integrations._torchvision import import_torchvision
from fxgrow.storage.recipe import Recipe
from fxgrow.training.data_source import Source
from fxgrow.training.grower import Grower
from fxgrow.training.in_place import GrowerInPlace, adopt, recipe_of
from fxgrow.training.schedule import Schedule
from fxgrow.transfer.wrappers import unwrapped

with contextlib.suppress(MissingExtraError):
    import_torchvision()  # where it is installed Lightning imports it, and so must be able to
try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as error:
    raise MissingExtraError(
        f"fxgrow.integrations.lightning needs the package lightning, which cannot be imported ({error}): "
        "pip install 'fxgrow[lightning]'."
    ) from error
#: where the recipe lies in a checkpoint
KEY = "fxgrow_recipe"


class GrowthCallback(Callback):
    """Grows a module while Lightning trains it.

    Checkpoints carry the recipe, the schedule's memory and the history. `fit`, `validate`, `test` and `predict` with a
    `ckpt_path` give the module the checkpoint's sizes first: build it as it was before it grew. Growth comes after an
    optimiser step (`Every(steps=...)`, counted by `trainer.global_step`), or before the next epoch
    (`Every(epochs=...)`); `ModelCheckpoint` runs after it.

    Args:
        schedule: when to grow, see `fxgrow.Grower`.
        module: name of the submodule that grows, `"net"` for `self.net`; it may become a graph. Without, the
            LightningModule itself grows in place: its `forward` is read, its class stays.
        dataloader: batches `(inputs, targets)` for growth; None for those that the Trainer trains on.
        monitor: a logged metric for `OnPlateau`, read after each validation.
        options: what `fxgrow.Grower` takes besides: `loss_fn`, `budget`, `neurons`, `into`, ...

    Attributes:
        grower: the `fxgrow.Grower`, once training has begun.

    Raises:
        FxgrowError: when training begins, if the Trainer runs several processes, the module has no such part, or no
            optimiser trains it.

    Example:
        >>> import lightning.pytorch as pl, torch, fxgrow
        >>> from fxgrow.integrations.lightning import GrowthCallback
        >>> class Net(pl.LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.net = torch.nn.Sequential(torch.nn.Linear(6, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1))
        ...
        ...     def training_step(self, batch, _):
        ...         return torch.nn.functional.mse_loss(self.net(batch[0]), batch[1])
        ...
        ...     def configure_optimizers(self):
        ...         return torch.optim.Adam(self.parameters())
        >>> data = torch.utils.data.TensorDataset(torch.randn(256, 6), torch.randn(256, 1))
        >>> growth = GrowthCallback(fxgrow.Every(epochs=1), module="net", neurons=2)
        >>> trainer = pl.Trainer(
        ...     max_epochs=2, callbacks=[growth], accelerator="cpu", logger=False, enable_checkpointing=False,
        ...     enable_progress_bar=False, enable_model_summary=False,
        ... )  # doctest: +SKIP
        >>> trainer.fit(Net(), torch.utils.data.DataLoader(data, 64))  # doctest: +SKIP
    """

    def __init__(
        self,
        schedule: Schedule,
        *,
        module: str = "",
        dataloader: Source | None = None,
        monitor: str | None = None,
        **options: Any,
    ) -> None:
        self.grower: Grower | None = None
        self._schedule, self._options = schedule, options
        self._name, self._source, self._monitor = module, dataloader, monitor
        self._fresh: nn.Module | None = None
        self._state: dict[str, Any] | None = None
        self._counted = 0

    # -- sizes come before weights

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Keeps the module as it is before growth, and listens to its checkpoints."""
        if trainer.strategy.restore_checkpoint_after_setup:
            raise FxgrowError(
                f"{type(trainer.strategy).__name__} loads weights after it has made the optimizers, when a module can "
                "no longer be rebuild: take a strategy for one device."
            )
        net = self._net(pl_module)
        if self._fresh is None and not recipe_of(net).steps:
            self._fresh = copy.deepcopy(unwrap(net))
        mine = vars(pl_module)
        for name, before in (("on_save_checkpoint", self._note), ("on_load_checkpoint", self._resize)):
            mine[name] = _after(before, pl_module, getattr(type(pl_module), name))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leaves the module's hooks as they were."""
        for name in ("on_save_checkpoint", "on_load_checkpoint"):
            vars(pl_module).pop(name, None)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Also of a checkpoint that is written when training is over."""
        self._note(pl_module, checkpoint)

    def _note(self, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint[KEY] = recipe_of(self._net(pl_module)).to_json()

    def _resize(self, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        recipe = Recipe.from_json(checkpoint[KEY]) if KEY in checkpoint else Recipe()
        net = self._net(pl_module)
        if recipe.steps == recipe_of(net).steps:
            return
        if self._fresh is None:
            raise FileError(
                "The checkpoint's module went through other growths than this one, which had grown before it came to "
                "the Trainer. Build it as it was before it grew."
            )
        if self._name:
            self._put(pl_module, unwrapped(net)[1](rebuild(self._fresh, recipe)))
        else:
            adopt(unwrap(net), rebuild(self._fresh, recipe, into="module"))

    def state_dict(self) -> dict[str, Any]:
        """The Grower's, for the checkpoint."""
        return {} if self.grower is None else self.grower.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Kept until training begins."""
        self._state = state_dict

    # -- growth

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Makes the Grower: optimisers and data are there now."""
        check_one_process(trainer.world_size, "This Trainer")
        net = self._net(pl_module)
        own = {id(p) for p in net.parameters()}
        optimizers = [o for o in trainer.optimizers if any(id(p) in own for g in o.param_groups for p in g["params"])]
        if not optimizers:
            raise FxgrowError(f"No optimizer of this Trainer trains {self._name or type(pl_module).__name__!r}.")
        schedulers = [c.scheduler for c in trainer.lr_scheduler_configs if c.scheduler.optimizer in optimizers]
        source = trainer.train_dataloader if self._source is None else self._source
        kind = Grower if self._name else GrowerInPlace
        self.grower = kind(
            net, optimizers, self._schedule, dataloader=on_device(source, pl_module.device), lr_scheduler=schedulers,
            **self._options,
        )  # fmt: skip
        if self._name:
            self.grower.on_growth(lambda *_: self._put(pl_module, self._grower.model))
        self.grower.on_growth(lambda *_: self._log(trainer))
        if self._state:
            self.grower.load_state_dict(self._state)
        self._state, self._counted = None, trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Counts optimiser steps, of which an accumulated gradient has one in several batches."""
        if trainer.global_step == self._counted:
            return
        self._counted = trainer.global_step
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        self._grower.step(loss if isinstance(loss, Tensor) else None)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Counts the epochs before this one; a checkpoint may have been written before or after the last one's end."""
        while self._grower.epochs < trainer.current_epoch:
            self._grower.epoch_end()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reads the metric."""
        if self._monitor is None or self.grower is None or trainer.sanity_checking:
            return
        if self._monitor not in trainer.callback_metrics:
            found = ", ".join(trainer.callback_metrics) or "none"
            raise FxgrowError(f"monitor={self._monitor!r} is no logged metric; those are: {found}.")
        self.grower.observe(trainer.callback_metrics[self._monitor])

    # -- where things are

    @property
    def _grower(self) -> Grower:
        if self.grower is None:
            raise FxgrowError("GrowthCallback has no Grower yet: the Trainer makes it when fit begins.")
        return self.grower

    def _net(self, pl_module: LightningModule) -> nn.Module:
        try:
            net: nn.Module = pl_module.get_submodule(self._name)
        except AttributeError:
            parts = ", ".join(name for name, _ in pl_module.named_children())
            raise FxgrowError(
                f"{type(pl_module).__name__} has no module named {self._name!r}; it has: {parts}."
            ) from None
        return net

    def _put(self, pl_module: LightningModule, net: nn.Module) -> None:
        owner, _, name = self._name.rpartition(".")
        setattr(pl_module.get_submodule(owner), name, net)

    def _log(self, trainer: Trainer) -> None:
        last = self._grower.history[-1]
        values = {"parameters": last.parameters[1], "loss": last.loss[1], "seconds": last.seconds}
        for logger in trainer.loggers:
            logger.log_metrics({f"fxgrow/{name}": value for name, value in values.items()}, step=trainer.global_step)


def _after(
    before: Callable[[Any, dict[str, Any]], None], module: LightningModule, hook: Callable[..., None]
) -> Callable[[dict[str, Any]], None]:
    """The module's hook with something before it; a function, so that a copied module does not copy what is in it."""

    def both(checkpoint: dict[str, Any]) -> None:
        before(module, checkpoint)
        hook(module, checkpoint)

    return both
