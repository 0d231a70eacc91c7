"""How much the loss varies between samples: losses of parts of a batch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fxgrow.data.batches import Batch
from fxgrow.data.loss import LossFn, loss_of

#: parts of a batch, and how well their losses must add up to that of the whole
PARTS, ADDS_UP = 8, 0.05


def losses_of_parts(output: Any, batch: Batch, loss_fn: LossFn | None) -> Tensor:
    """Losses of the samples of a batch, a few together, whose mean is `loss_of`; of the whole where it has no parts."""
    loss = loss_of(output, batch, loss_fn).detach().double().reshape(1)
    if batch.targets is None or batch.size < 2:
        return loss
    size = batch.size // min(PARTS, batch.size)
    given = pytree.tree_leaves((output, batch.targets))
    if not all(isinstance(t, Tensor) and t.dim() and len(t) == batch.size for t in given):
        return loss

    def part(start: int) -> Tensor:
        # the last part has what is left, too
        end = start + size if start + 2 * size <= batch.size else batch.size
        out, targets = pytree.tree_map(lambda t: t[start:end], (output, batch.targets))
        return loss_of(out, replace(batch, targets=targets, size=end - start), loss_fn).detach().double()

    try:
        parts = torch.stack([part(start) for start in range(0, batch.size - size + 1, size)])
    except Exception:  # a loss that takes whole batches only
        return loss
    excess = loss - parts.mean()
    return parts + excess if float(excess.abs()) <= ADDS_UP * float(loss.abs()) else loss
