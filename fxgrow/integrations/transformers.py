"""Growth in the Trainer of Hugging Face transformers: a callback, and a model with a checkpoint's sizes to resume with.

Needs the packages transformers and accelerate: `pip install fxgrow[transformers]`. The Trainer loads a checkpoint's
weights before it calls any callback, so the model that it gets must have their sizes:

    last = get_last_checkpoint(folder)
    model = build() if last is None else resized(build(), last)
    Trainer(model, ..., callbacks=[GrowthCallback(...)]).train(resume_from_checkpoint=last)
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from fxgrow.checkpoints.model_file import resize
from fxgrow.data.argument_checks import PATH, read_argument
from fxgrow.errors import FileError, FxgrowError, MissingExtraError
from fxgrow.graph.graph import unwrap
from fxgrow.graph.node_meta import RECIPE
from fxgrow.integrations._shared import begun, check_one_process, missing_package, observe, on_device
from fxgrow.integrations._torchvision import import_torchvision
from fxgrow.training.data_source import Source
from fxgrow.training.in_place import GrowerInPlace, recipe_of
from fxgrow.training.schedule import Schedule

with contextlib.suppress(MissingExtraError):
    import_torchvision()  # models of transformers import it where it is installed
try:
    from transformers import PretrainedConfig, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
    from transformers.trainer_callback import ExportableState
except ImportError as error:
    raise missing_package("transformers", error) from error
#: file with the states of the Trainer's callbacks
STATE = "trainer_state.json"
#: file with a model's configuration
CONFIG = "config.json"
M = TypeVar("M", bound=nn.Module)


class GrowthCallback(TrainerCallback, ExportableState):
    """Grows a model while a `transformers.Trainer` trains it.

    The model stays the same object. The Trainer's checkpoints contain the recipe, the state of the schedule and the
    history, in `trainer_state.json`; `resized` reads them.

    Args:
        schedule: when to grow, see `fxgrow.Grower`; steps are those of the optimiser.
        dataloader: batches for growth; None for the training set in batches of the Trainer's size, shuffled by `seed`.
        monitor: a metric for `OnPlateau`, read after each evaluation, such as `eval_loss`.
        options: other arguments of `fxgrow.Grower`: `budget`, `neurons`, `samples`, `seed`, ...

    Attributes:
        grower: the `fxgrow.Grower`, once training has begun.

    Raises:
        FxgrowError: when training begins, if there are several processes, or `load_best_model_at_end=True`: the best
            model may have other sizes.

    Example:
        >>> import fxgrow
        >>> from fxgrow.integrations.transformers import GrowthCallback
        >>> growth = GrowthCallback(fxgrow.Every(steps=500).until(growths=3), budget="+20%")
        >>> growth.grower is None
        True
    """

    def __init__(
        self, schedule: Schedule, *, dataloader: Source | None = None, monitor: str | None = None, **options: Any
    ) -> None:
        self.grower: GrowerInPlace | None = None
        self._schedule, self._source, self._monitor, self._options = schedule, dataloader, monitor, options

    def state(self) -> dict[str, Any]:
        """Returns the callback's state for the Trainer's checkpoints: numbers, strings, lists and dicts only."""
        if self.grower is None:
            return {"args": {}, "attributes": {}}
        recipe = json.loads(recipe_of(self.grower.model).to_json())
        return {"args": {}, "attributes": {"recipe": recipe, "grower": self.grower.state_dict()}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Makes the Grower, now that optimiser and data exist, and restores its state from a checkpoint."""
        check_one_process(args.world_size, "This Trainer")
        if args.load_best_model_at_end:
            raise FxgrowError(
                "load_best_model_at_end=True loads weights from before later growths, which have other sizes: leave it "
                "out, and take the best checkpoint with fxgrow.integrations.transformers.resized."
            )
        source = self._source
        if source is None:
            source = _like(kwargs["train_dataloader"], args.train_batch_size, self._options.get("seed", 0))
        self.grower = GrowerInPlace(
            kwargs["model"], kwargs["optimizer"], self._schedule, dataloader=on_device(source, args.device),
            lr_scheduler=None, **self._options,
        )  # fmt: skip
        saved = _saved(state.stateful_callbacks)
        if "grower" in saved:
            self.grower.load_state_dict(saved["grower"])
        _keep_in_config(kwargs["model"])
        self.grower.on_growth(lambda *_: _keep_in_config(kwargs["model"]))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Grows after an optimiser step, before the Trainer logs, evaluates and saves."""
        begun(self.grower).step()

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Grows after an epoch, before the Trainer evaluates and saves."""
        begun(self.grower).epoch_end()

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Gives the metric to the schedule."""
        if self._monitor is not None and self.grower is not None:
            observe(self.grower, self._monitor, kwargs.get("metrics", {}), "metric of this evaluation")


def resized(model: M, checkpoint: str | os.PathLike[str]) -> M:
    """Returns a fresh model with the sizes of a Trainer's checkpoint, for `Trainer.train(resume_from_checkpoint=...)`.

    Args:
        model: built as the saved one was before it grew; left as it is.
        checkpoint: folder that a Trainer with a `GrowthCallback` wrote, also by `save_model`.

    Returns:
        A copy of the model; tensors that changed their size are zero until the weights are loaded.

    Raises:
        FileError: the folder contains no growth, or the model does not fit.
    """
    folder = Path(read_argument("checkpoint", checkpoint, PATH, FileError))
    path = folder / (STATE if (folder / STATE).exists() or not (folder / CONFIG).exists() else CONFIG)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        recipe = found.get(RECIPE) if path.name == CONFIG else _saved(found["stateful_callbacks"]).get("recipe")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise FileError(f"{path} cannot be read ({error!r}): give the folder of a checkpoint of a Trainer.") from error
    if recipe is None:
        raise FileError(f"{path} contains no growth: the checkpoint was written without a GrowthCallback.")
    out: M = resize(model, json.dumps(recipe), into="module")
    return out


def _keep_in_config(model: nn.Module) -> None:
    """Enters the recipe into the model's configuration, which `save_model` writes beside the weights."""
    config, recipe = getattr(unwrap(model), "config", None), recipe_of(model)
    if recipe.steps and isinstance(config, PretrainedConfig):
        setattr(config, RECIPE, json.loads(recipe.to_json()))


def _saved(states: Any) -> dict[str, Any]:
    """Returns the saved attributes of this callback among the states of a Trainer's callbacks."""
    state: Any = (states or {}).get(GrowthCallback.__name__, {})
    first = state[0] if isinstance(state, list) else state  # several callbacks of this class
    return cast(dict[str, Any], first.get("attributes", {}))


def _like(loader: Any, batch_size: int, seed: int) -> DataLoader[Any]:
    """Returns another loader of the Trainer's data: reading the Trainer's would advance its samplers."""
    shuffle = not isinstance(loader.dataset, IterableDataset)
    order = torch.Generator().manual_seed(seed) if shuffle else None
    return DataLoader(loader.dataset, batch_size, shuffle=shuffle, generator=order, collate_fn=loader.collate_fn)
