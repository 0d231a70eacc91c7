"""Growth in Lightning: a callback that grows a LightningModule, or a part of it, through fit, checkpoint and resume.

Needs the package lightning: `pip install fxgrow[lightning]`. Lightning loads weights before it restores callbacks, so
the callback replays the recipe just before the module's `on_load_checkpoint`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from fxgrow.checkpoints.weights import rebuild
from fxgrow.errors import FxgrowError, MissingExtraError
from fxgrow.graph.graph import unwrap
from fxgrow.graph.node_meta import RECIPE
from fxgrow.integrations._shared import begun, check_one_process, missing_package, observe, on_device
from fxgrow.integrations._torchvision import import_torchvision
from fxgrow.storage.recipe import Recipe
from fxgrow.training.data_source import Source
from fxgrow.training.grower import Grower
from fxgrow.training.in_place import GrowerInPlace, adopt, fresh_copy, fresh_if_resized, recipe_of
from fxgrow.training.schedule import Schedule
from fxgrow.transfer.wrappers import unwrapped

with contextlib.suppress(MissingExtraError):
    import_torchvision()  # Lightning imports it where it is installed
try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as error:
    raise missing_package("lightning", error) from error


class GrowthCallback(Callback):
    """Grows a module while Lightning trains it.

    Checkpoints contain the recipe, the state of the schedule and the history. `fit`, `validate`, `test` and `predict`
    with a `ckpt_path` first give the module the checkpoint's sizes: build it as it was before it grew. Growth follows
    an optimiser step (`Every(steps=...)`, counted by `trainer.global_step`), or precedes the next epoch
    (`Every(epochs=...)`); `ModelCheckpoint` runs after it.

    Args:
        schedule: when to grow, see `fxgrow.Grower`.
        module: name of the submodule that grows, `"net"` for `self.net`; it may become a graph. By default the
            LightningModule itself grows in place: its `forward` is captured, its class stays.
        dataloader: batches `(inputs, targets)` for growth; None for those that the Trainer trains on.
        monitor: a logged metric for `OnPlateau`, read after each validation.
        options: other arguments of `fxgrow.Grower`: `loss_fn`, `budget`, `neurons`, `into`, ...

    Attributes:
        grower: the `fxgrow.Grower`, once training has begun.

    Raises:
        FxgrowError: when training begins, if the Trainer runs several processes, there is no submodule of that name,
            or no optimiser trains it.

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

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Copies the module before it grows, and wraps its checkpoint hooks."""
        if trainer.strategy.restore_checkpoint_after_setup:
            raise FxgrowError(
                f"{type(trainer.strategy).__name__} loads weights after it has made the optimizers, when a module can "
                "no longer be resized: take a strategy for one device."
            )
        net = self._net(pl_module)
        if self._fresh is None:
            self._fresh = fresh_copy(net)
        for name, before in (("on_save_checkpoint", self._save_recipe), ("on_load_checkpoint", self._resize)):
            vars(pl_module)[name] = _preceded(before, pl_module, getattr(type(pl_module), name))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Restores the module's hooks."""
        for name in ("on_save_checkpoint", "on_load_checkpoint"):
            vars(pl_module).pop(name, None)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Saves the recipe in checkpoints that are written after training too."""
        self._save_recipe(pl_module, checkpoint)

    def _save_recipe(self, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint[RECIPE] = recipe_of(self._net(pl_module)).to_json()

    def _resize(self, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        recipe = Recipe.from_json(checkpoint[RECIPE]) if RECIPE in checkpoint else Recipe()
        net = self._net(pl_module)
        fresh = fresh_if_resized(net, recipe, self._fresh)
        if fresh is not None and self._name:
            self._set_net(pl_module, unwrapped(net)[1](rebuild(fresh, recipe)))
        elif fresh is not None:
            adopt(unwrap(net), rebuild(fresh, recipe, into="module"))

    def state_dict(self) -> dict[str, Any]:
        """Returns the state of the Grower for the checkpoint."""
        return {} if self.grower is None else self.grower.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps the state until training begins."""
        self._state = state_dict

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Makes the Grower, now that optimisers and data exist."""
        check_one_process(trainer.world_size, "This Trainer")
        net = self._net(pl_module)
        ids = {id(p) for p in net.parameters()}
        optimizers = [o for o in trainer.optimizers if any(id(p) in ids for g in o.param_groups for p in g["params"])]
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
            self.grower.on_growth(lambda *_: self._set_net(pl_module, begun(self.grower).model))
        self.grower.on_growth(lambda *_: self._log(trainer))
        if self._state:
            self.grower.load_state_dict(self._state)
        self._state, self._counted = None, trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Counts optimiser steps; with accumulated gradients several batches make one."""
        if trainer.global_step == self._counted:
            return
        self._counted = trainer.global_step
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        begun(self.grower).step(loss if isinstance(loss, Tensor) else None)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Counts the epochs before this one; a checkpoint may be from before or after the end of the last one."""
        while begun(self.grower).epochs < trainer.current_epoch:
            begun(self.grower).epoch_end()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gives the metric to the schedule."""
        if self._monitor is not None and self.grower is not None and not trainer.sanity_checking:
            observe(self.grower, self._monitor, trainer.callback_metrics, "logged metric")

    def _net(self, pl_module: LightningModule) -> nn.Module:
        try:
            net: nn.Module = pl_module.get_submodule(self._name)
        except AttributeError:
            parts = ", ".join(name for name, _ in pl_module.named_children())
            raise FxgrowError(
                f"{type(pl_module).__name__} has no module named {self._name!r}; it has: {parts}."
            ) from None
        return net

    def _set_net(self, pl_module: LightningModule, net: nn.Module) -> None:
        owner, _, name = self._name.rpartition(".")
        setattr(pl_module.get_submodule(owner), name, net)

    def _log(self, trainer: Trainer) -> None:
        last = begun(self.grower).history[-1]
        values = {"parameters": last.parameters[1], "loss": last.loss[1], "seconds": last.seconds}
        for logger in trainer.loggers:
            logger.log_metrics({f"fxgrow/{name}": value for name, value in values.items()}, step=trainer.global_step)


def _preceded(
    before: Callable[[Any, dict[str, Any]], None], module: LightningModule, hook: Callable[..., None]
) -> Callable[[dict[str, Any]], None]:
    """Returns the module's hook, preceded by another; a function, because copying a module does not copy functions."""

    def both(checkpoint: dict[str, Any]) -> None:
        before(module, checkpoint)
        hook(module, checkpoint)

    return both
