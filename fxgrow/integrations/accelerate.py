"""Growth in a loop of Hugging Face Accelerate. Needs the package accelerate: `pip install fxgrow[accelerate]`.

`load_state` calls its hooks before it loads weights; they give the model the checkpoint's sizes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from fxgrow.data.argument_checks import shown
from fxgrow.errors import FileError, FxgrowError
from fxgrow.graph.graph import unwrap
from fxgrow.integrations._shared import check_one_process, missing_package, on_device
from fxgrow.storage.recipe import Recipe
from fxgrow.training.data_source import Source
from fxgrow.training.in_place import GrowerInPlace, recipe_of
from fxgrow.training.schedule import Schedule

try:
    from accelerate import Accelerator
    from accelerate.data_loader import DataLoaderDispatcher, DataLoaderShard
except ImportError as error:
    raise missing_package("accelerate", error) from error
#: file in the folder that `save_state` writes
FILE = "fxgrow.json"


class AcceleratedGrower(GrowerInPlace):
    """A Grower for what `accelerator.prepare` returned.

    The model stays the same object, so the loop needs no `grower.model`. `step()` counts only where gradients are
    synchronised, once per accumulated gradient. `accelerator.save_state` writes the recipe and the
    Grower's state beside the weights, and `load_state` restores them in a model as it was before it grew.

    Args:
        accelerator: of the training loop.
        model: prepared, or not yet.
        optimizer: likewise.
        schedule: see `fxgrow.Grower`.
        dataloader: batches for growth, not prepared: reading a prepared loader would advance its samplers. They are
            moved to the accelerator's device.
        options: other arguments of `fxgrow.Grower`; growth is `into="module"`.

    Raises:
        FxgrowError: the loader is a prepared one, there are several processes, or what `fxgrow.Grower` raises.

    Example:
        >>> import torch, fxgrow
        >>> from accelerate import Accelerator
        >>> from fxgrow.integrations.accelerate import AcceleratedGrower
        >>> accelerator = Accelerator(cpu=True)
        >>> net = torch.nn.Sequential(torch.nn.Linear(6, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1))
        >>> batches = [(torch.randn(32, 6), torch.randn(32, 1)) for _ in range(4)]
        >>> model, optimizer = accelerator.prepare(net, torch.optim.Adam(net.parameters()))
        >>> schedule = fxgrow.Every(steps=4)
        >>> grower = AcceleratedGrower(accelerator, model, optimizer, schedule, dataloader=batches, neurons=2)
        >>> for inputs, targets in batches:
        ...     accelerator.backward(torch.nn.functional.mse_loss(model(inputs), targets))
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        ...     _ = grower.step()
        >>> model[0].out_features
        5
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer],
        schedule: Schedule,
        *,
        dataloader: Source,
        **options: Any,
    ) -> None:
        if not isinstance(accelerator, Accelerator):
            raise FxgrowError(f"accelerator={shown(accelerator)}: give the Accelerator of the training loop.")
        check_one_process(accelerator.num_processes, "This Accelerator")
        if isinstance(dataloader, (DataLoaderShard, DataLoaderDispatcher)):
            raise FxgrowError(
                "The dataloader has been prepared by Accelerate: reading it would advance the training loop's "
                "samplers. Give the loader that was passed to accelerator.prepare."
            )
        self._accelerator = accelerator
        source = on_device(dataloader, accelerator.device)
        super().__init__(model, optimizer, schedule, dataloader=source, **options)
        accelerator.register_save_state_pre_hook(self._save)
        accelerator.register_load_state_pre_hook(self._load)

    def step(self, loss: Tensor | float | None = None) -> bool:
        """Counts an optimiser step, and grows if it is time; nothing while gradients accumulate.

        Args:
            loss: of this step, for `OnPlateau`.

        Returns:
            Whether the model has grown.
        """
        return super().step(loss) if self._accelerator.sync_gradients else False

    def _save(self, models: list[nn.Module], weights: list[Any], folder: str) -> None:
        recipe = json.loads(recipe_of(self._given).to_json())
        part = Path(folder) / f".{FILE}.part"
        part.write_text(json.dumps({"fxgrow": 1, "recipe": recipe, "grower": self.state_dict()}), encoding="utf-8")
        os.replace(part, part.with_name(FILE))

    def _load(self, models: list[nn.Module], folder: str) -> None:
        if all(unwrap(model) is not unwrap(self._given) for model in models):
            return
        path = Path(folder) / FILE
        try:
            body = json.loads(path.read_text(encoding="utf-8"))
            recipe, state = Recipe.from_json(json.dumps(body["recipe"])), body["grower"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise FileError(
                f"{path} cannot be read ({error!r}): the folder was not written by save_state with an "
                "AcceleratedGrower, or it is damaged."
            ) from error
        self.resize(recipe)
        self.load_state_dict(state)
