"""A cache of the first samples of every batch, from which sampled moments are formed after a pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, fx

#: batches are copied into shared tensors of at most so many bytes, so that small batches need fewer products
STORAGE_BYTES = 8 << 20


class Chunk(NamedTuple):
    """The cached samples of one batch: rows `start` to `stop` of a tensor that batches may share."""

    storage: Tensor
    start: int
    stop: int

    @property
    def size(self) -> int:
        """Number of samples."""
        return self.stop - self.start


class Span(NamedTuple):
    """A range of batches."""

    start: int
    stop: int


class BatchStore:
    """One tensor per batch."""

    def __init__(self) -> None:
        self.chunks: list[Chunk] = []

    def add(self, batch: Tensor, keep: int, expected: int) -> None:
        """Caches the first `keep` samples of a batch, of which about `expected` will come."""
        count, *shape = batch.shape
        n = min(keep, count)
        part = batch if n == count else batch[:n]
        chunk = self._next(n, shape)
        if chunk is None:
            batches = _batches_per_storage(part.nbytes, expected - len(self.chunks))
            if batches == 1:
                # a part is copied, so that it does not keep the rest of the batch alive
                self.chunks.append(Chunk(part if n == count else part.clone(), 0, n))
                return
            chunk = Chunk(part.new_empty(batches * n, *shape), 0, n)
        chunk.storage.narrow(0, chunk.start, n).copy_(part)
        self.chunks.append(chunk)

    def _next(self, n: int, shape: Sequence[int]) -> Chunk | None:
        """Space for n samples in the storage of the last batch, if there is any."""
        if not self.chunks:
            return None
        storage, start = self.chunks[-1].storage, self.chunks[-1].stop
        fits = start + n <= len(storage) and storage.shape[1:] == torch.Size(shape)
        return Chunk(storage, start, start + n) if fits else None

    def read(self, start: int, stop: int, keep: int | None = None) -> Tensor:
        """The first `keep` samples of each batch from `start` to `stop`; None: all that are cached."""
        chunks = self.chunks[start:stop]
        storage = chunks[0].storage
        if chunks[-1].storage is storage and (keep is None or all(c.size <= keep for c in chunks)):
            return storage[chunks[0].start : chunks[-1].stop]
        return torch.cat([c.storage[c.start : c.stop if keep is None else min(c.stop, c.start + keep)] for c in chunks])


class ActivationCache:
    """Layer inputs by source node, and output gradients V by node, batch by batch."""

    def __init__(self) -> None:
        self.inputs: dict[fx.Node, BatchStore] = {}
        self.output_gradients: dict[fx.Node, BatchStore] = {}
        #: expected number of batches
        self.expected = 1

    def add_input(self, node: fx.Node, batch: Tensor, keep: int) -> None:
        self.inputs.setdefault(node, BatchStore()).add(batch, keep, self.expected)

    def add_output_gradient(self, node: fx.Node, batch: Tensor, keep: int) -> None:
        self.output_gradients.setdefault(node, BatchStore()).add(batch, keep, self.expected)

    def read(self, nodes: Sequence[fx.Node], span: Span, keep: int | None = None) -> list[Tensor]:
        """The first `keep` samples of the batches of a span, for each of these inputs."""
        return [self.inputs[n].read(*span, keep) for n in nodes]

    def spans(self, inputs: Sequence[fx.Node], targets: Sequence[fx.Node] = ()) -> Iterator[Span]:
        """Yields the largest ranges of batches that share storage at all these nodes."""
        stores = [*(self.inputs[n] for n in inputs), *(self.output_gradients[n] for n in targets)]
        start = 0
        for i, chunks in enumerate(zip(*(s.chunks for s in stores), strict=True)):
            if i and any(c.start == 0 for c in chunks):
                yield Span(start, i)
                start = i
        yield Span(start, len(stores[0].chunks))

    def groups(
        self, keep: int | None, inputs: Sequence[fx.Node], targets: Sequence[fx.Node] = ()
    ) -> Iterator[tuple[Span, dict[fx.Node, Tensor], dict[fx.Node, Tensor]]]:
        """Yields a span of batches with the first `keep` samples of each: inputs by node, output gradients by node."""
        for span in self.spans(inputs, targets):
            yield (
                span,
                dict(zip(inputs, self.read(inputs, span, keep), strict=True)),
                {n: self.output_gradients[n].read(*span, keep) for n in targets},
            )


def _batches_per_storage(size: int, expected: int) -> int:
    """How many batches of `size` bytes share storage: a power of two, so that those of several nodes nest."""
    fit = STORAGE_BYTES // max(1, size)
    if 0 < expected <= fit:
        return expected
    return 1 << (fit.bit_length() - 1) if fit else 1
