"""What a pass remembers: the first samples of every batch, from which sampled moments are formed afterwards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, fx

#: smaller batches are joined up to so many samples
GROUP = 512


class Memory:
    """Inputs of weights and what came back to their outputs, a chunk per batch."""

    def __init__(self) -> None:
        self.inputs: dict[fx.Node, list[Tensor]] = {}
        self.updates: dict[fx.Node, list[Tensor]] = {}

    def add_input(self, node: fx.Node, batch: Tensor, keep: int) -> None:
        self.inputs.setdefault(node, []).append(_part(batch, keep))

    def add_update(self, node: fx.Node, batch: Tensor, keep: int) -> None:
        self.updates.setdefault(node, []).append(_part(batch, keep))

    def groups(
        self, keep: int, inputs: Sequence[fx.Node], updates: Sequence[fx.Node] = ()
    ) -> Iterator[tuple[dict[fx.Node, Tensor], dict[fx.Node, Tensor]]]:
        """The first `keep` samples of every batch, at all these nodes; small batches of one shape are joined."""
        waiting: list[list[Tensor]] = []
        for batch in zip(*(self.inputs[n] for n in inputs), *(self.updates[n] for n in updates), strict=True):
            chunks = [t[:keep] for t in batch]
            if waiting and not _joinable(waiting, chunks):
                yield _joined(waiting, inputs, updates)
                waiting = []
            waiting.append(chunks)
        if waiting:
            yield _joined(waiting, inputs, updates)


def _part(batch: Tensor, keep: int) -> Tensor:
    """A batch is held whole, or copied in part: never held for the sake of a part."""
    return batch if keep >= len(batch) else batch[:keep].clone()


def _joinable(waiting: Sequence[Sequence[Tensor]], chunks: Sequence[Tensor]) -> bool:
    size = sum(len(w[0]) for w in waiting) + len(chunks[0])
    return size <= GROUP and all(a.shape[1:] == b.shape[1:] for a, b in zip(waiting[0], chunks, strict=True))


def _joined(
    waiting: Sequence[Sequence[Tensor]], inputs: Sequence[fx.Node], updates: Sequence[fx.Node]
) -> tuple[dict[fx.Node, Tensor], dict[fx.Node, Tensor]]:
    whole = [parts[0] if len(parts) == 1 else torch.cat(parts) for parts in zip(*waiting, strict=True)]
    return dict(zip(inputs, whole, strict=False)), dict(zip(updates, whole[len(inputs) :], strict=True))
