"""The loss: as given, of the model, or chosen by the targets."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from fxgrow.data.batches import Batch
from fxgrow.errors import ProfileError

LossFn = Callable[[Any, Any], Tensor]


def loss_of(output: Any, batch: Batch, loss_fn: LossFn | None) -> Tensor:
    """The mean loss of a batch, on which the model returned `output`.

    `loss_fn` takes (output, targets) and returns the mean over the batch, or one value per sample. None: the model's
    own `.loss`, cross-entropy for integer targets, mean squared error for floating ones.
    """
    try:
        loss = loss_fn(output, batch.targets) if loss_fn is not None else _default_loss(output, batch)
    except ProfileError:
        raise
    except Exception as error:
        name = getattr(loss_fn, "__name__", type(loss_fn).__name__) if loss_fn is not None else "the default loss"
        raise ProfileError(
            f"{name} failed on batch {batch.index} (output {_describe(output)}, targets {_describe(batch.targets)}): "
            f"{error}"
        ) from error
    if not isinstance(loss, Tensor):
        raise ProfileError(f"The loss of batch {batch.index} is a {type(loss).__name__}, not a tensor.")
    loss = loss.mean() if loss.dim() else loss
    if not math.isfinite(loss.detach()):
        raise ProfileError(
            f"The loss of batch {batch.index} is {loss.item()}: growth needs finite losses. Look for bad samples in "
            "this batch, a learning rate that is too high, or an overflow in half precision."
        )
    return loss


def _default_loss(output: Any, batch: Batch) -> Tensor:
    if batch.targets is None:
        loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        if not isinstance(loss, Tensor):
            raise ProfileError(
                f"Batch {batch.index} is a dict without targets, so the model must return an object with a loss, but "
                f"it returned {_describe(output)}. Put the labels into the batch, or pass (inputs, targets) batches."
            )
        return loss
    logits = getattr(output, "logits", output)
    targets = batch.targets
    if not isinstance(logits, Tensor) or not isinstance(targets, Tensor):
        raise ProfileError(
            f"No default loss for output {_describe(output)} and targets {_describe(targets)}: pass loss_fn."
        )
    if targets.is_floating_point():
        if logits.shape != targets.shape:
            raise ProfileError(
                f"Mean squared error needs equal shapes, found output {tuple(logits.shape)} and targets "
                f"{tuple(targets.shape)} in batch {batch.index}; pass loss_fn."
            )
        return F.mse_loss(logits, targets)
    if logits.dim() == targets.dim() + 1 and logits.dim() > 2 and logits.shape[:-1] == targets.shape:
        # tokens: classes are the last dimension
        return F.cross_entropy(logits.flatten(0, -2), targets.flatten())
    return F.cross_entropy(logits, targets)


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')} on {value.device}"
    if isinstance(value, Mapping):
        return f"a dict of {sorted(map(str, value))}"
    name = type(value).__name__
    return f"{'an' if name[:1] in 'aeiouAEIOU' else 'a'} {name}"
