"""A cache of the first samples of every batch, from which sampled moments are formed after a pass."""

from __future__ import annotations

import itertools
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, fx

#: batches are copied into shared tensors of at most so many bytes, so that small batches need fewer products
STORAGE_BYTES = 8 << 20

#: a range of batches: the first, and one past the last
Span = tuple[int, int]


class Chunk(NamedTuple):
    """The cached samples of one batch: rows `start` to `stop` of a tensor that batches may share."""

    storage: Tensor
    start: int
    stop: int


class BatchStore:
    """The cached samples of one tensor, batch by batch."""

    def __init__(self) -> None:
        self.chunks: list[Chunk] = []

    def add(self, batch: Tensor, keep: int, expected: int) -> None:
        """Caches the first `keep` samples of a batch, of which about `expected` will come."""
        part = batch[:keep]
        storage, _, start = self.chunks[-1] if self.chunks else Chunk(batch[:0], 0, 0)
        if start + len(part) > len(storage) or storage.shape[1:] != part.shape[1:]:
            fit, left = STORAGE_BYTES // max(1, part.nbytes), expected - len(self.chunks)
            # a power of two, so that the spans of several nodes nest
            batches = left if 0 < left <= fit else 1 << max(0, fit.bit_length() - 1)
            if batches == 1:
                # a part is copied, so that it does not keep the rest of the batch alive
                self.chunks.append(Chunk(part if len(part) == len(batch) else part.clone(), 0, len(part)))
                return
            storage, start = part.new_empty(batches * len(part), *part.shape[1:]), 0
        self.chunks.append(Chunk(storage, start, start + len(part)))
        storage[start : start + len(part)] = part

    def read(self, span: Span, keep: int = sys.maxsize) -> Tensor:
        """The first `keep` samples of each batch of a span."""
        chunks = self.chunks[slice(*span)]
        stops = [min(c.stop, c.start + keep) for c in chunks]
        storage, start, last = chunks[0].storage, chunks[0].start, chunks[-1]
        if last.storage is storage and all(c.stop == stop for c, stop in zip(chunks, stops, strict=True)):
            return storage[start : last.stop]
        return torch.cat([c.storage[c.start : stop] for c, stop in zip(chunks, stops, strict=True)])


class ActivationCache:
    """Layer inputs by source node, and output gradients V by node; about `expected` batches will come."""

    def __init__(self) -> None:
        self.inputs: defaultdict[fx.Node, BatchStore] = defaultdict(BatchStore)
        self.output_gradients: defaultdict[fx.Node, BatchStore] = defaultdict(BatchStore)
        self.expected = 1

    def groups(
        self, inputs: Iterable[fx.Node], targets: Iterable[fx.Node] = (), keep: int = sys.maxsize
    ) -> Iterator[tuple[float, Span, dict[fx.Node, Tensor], dict[fx.Node, Tensor]]]:
        """Yields the largest spans of batches that share storage at all these nodes.

        With them come the first `keep` samples of each batch: their share of all such samples, inputs by node, and
        output gradients by node.
        """
        inputs, targets = list(dict.fromkeys(inputs)), list(dict.fromkeys(targets))
        stores = [*(self.inputs[n] for n in inputs), *(self.output_gradients[n] for n in targets)]
        total = sum(min(keep, c.stop - c.start) for c in stores[0].chunks)
        batches = list(zip(*(s.chunks for s in stores), strict=True))
        starts = [i for i, chunks in enumerate(batches) if any(c.start == 0 for c in chunks)]
        for span in itertools.pairwise([*starts, len(batches)]):
            layer_inputs = {n: self.inputs[n].read(span, keep) for n in inputs}
            gradients = {n: self.output_gradients[n].read(span, keep) for n in targets}
            yield len(layer_inputs[inputs[0]]) / total, span, layer_inputs, gradients
