"""What a pass remembers: the first samples of every batch, from which sampled moments are formed afterwards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, fx

#: smaller batches are joined up to so many samples
GROUP = 1024


class Memory:
    """Inputs of weights and what came back to their outputs, a chunk per batch."""

    def __init__(self) -> None:
        self.inputs: dict[fx.Node, list[Tensor]] = {}
        self.updates: dict[fx.Node, list[Tensor]] = {}
        self.pieces: dict[tuple[int, int, int], Tensor] = {}

    def add_input(self, node: fx.Node, batch: Tensor, keep: int) -> None:
        self.inputs.setdefault(node, []).append(_part(batch, keep))

    def add_update(self, node: fx.Node, batch: Tensor, keep: int) -> None:
        self.updates.setdefault(node, []).append(_part(batch, keep))

    def groups(
        self, keep: int, inputs: Sequence[fx.Node], updates: Sequence[fx.Node] = ()
    ) -> Iterator[tuple[dict[fx.Node, Tensor], dict[fx.Node, Tensor]]]:
        """The first `keep` samples of every batch, at all these nodes; small batches of one shape are joined."""
        stores = [*(self.inputs[n] for n in inputs), *(self.updates[n] for n in updates)]
        start = 0
        for stop in _ends(stores, keep):
            whole = [self._joined(store, start, stop, keep) for store in stores]
            start = stop
            yield dict(zip(inputs, whole, strict=False)), dict(zip(updates, whole[len(inputs) :], strict=True))

    def _joined(self, store: list[Tensor], start: int, stop: int, keep: int) -> Tensor:
        """Chunks in one piece; where they were taken whole they become views of it, so that it is made once."""
        chunks = store[start:stop]
        if stop - start == 1:
            return chunks[0][:keep]
        if any(len(c) > keep for c in chunks):
            return torch.cat([c[:keep] for c in chunks])
        key = (id(store), start, stop)
        if key not in self.pieces:
            self.pieces[key] = torch.cat(chunks)
            store[start:stop] = self.pieces[key].split([len(c) for c in chunks])
        return self.pieces[key]


def _part(batch: Tensor, keep: int) -> Tensor:
    """A batch is held whole, or copied in part: never held for the sake of a part."""
    return batch if keep >= len(batch) else batch[:keep].clone()


def _ends(stores: Sequence[Sequence[Tensor]], keep: int) -> Iterator[int]:
    """Where groups of batches end: at a change of shape, or when they are large enough."""
    size = 0
    shapes: list[torch.Size] = []
    for i, chunks in enumerate(zip(*stores, strict=True)):
        n = min(keep, len(chunks[0]))
        now = [c.shape[1:] for c in chunks]
        if i and (size + n > GROUP or now != shapes):
            yield i
            size = 0
        size, shapes = size + n, now
    yield len(stores[0])
