"""What a pass remembers: the first samples of every batch, from which sampled moments are formed afterwards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, fx

#: batches are copied side by side into pieces of up to so many bytes, so that few products serve many small ones
PIECE = 8 << 20


class Chunk(NamedTuple):
    """What is kept of one batch: rows of a piece of memory."""

    piece: Tensor
    start: int
    stop: int

    @property
    def size(self) -> int:
        """How many samples."""
        return self.stop - self.start


class Span(NamedTuple):
    """Batches from one number up to, not with, another."""

    start: int
    stop: int


class Store:
    """One tensor per batch."""

    def __init__(self) -> None:
        self.chunks: list[Chunk] = []

    def add(self, batch: Tensor, keep: int, expected: int) -> None:
        """Remembers the first `keep` samples of one of about so many batches."""
        count, *shape = batch.shape
        n = min(keep, count)
        part = batch if n == count else batch[:n]
        chunk = self._next(n, shape)
        if chunk is None:
            places = _places(part.nbytes, expected - len(self.chunks))
            if places == 1:
                # held whole where it is taken whole, but never for the sake of a part
                self.chunks.append(Chunk(part if n == count else part.clone(), 0, n))
                return
            chunk = Chunk(part.new_empty(places * n, *shape), 0, n)
        chunk.piece.narrow(0, chunk.start, n).copy_(part)
        self.chunks.append(chunk)

    def _next(self, n: int, shape: Sequence[int]) -> Chunk | None:
        """Room for n samples where the last batch lies, if there is any."""
        if not self.chunks:
            return None
        piece, start = self.chunks[-1].piece, self.chunks[-1].stop
        room, *own = piece.shape
        return Chunk(piece, start, start + n) if start + n <= room and own == list(shape) else None

    def read(self, start: int, stop: int, keep: int | None = None) -> Tensor:
        """The first `keep` samples of each batch from `start` to `stop`; None: all that are remembered."""
        chunks = self.chunks[start:stop]
        piece = chunks[0].piece
        if chunks[-1].piece is piece and (keep is None or all(c.size <= keep for c in chunks)):
            return piece[chunks[0].start : chunks[-1].stop]
        return torch.cat([c.piece[c.start : c.stop if keep is None else min(c.stop, c.start + keep)] for c in chunks])


class ActivationCache:
    """Inputs of weights and what came back to their outputs, a chunk per batch."""

    def __init__(self) -> None:
        self.inputs: dict[fx.Node, Store] = {}
        self.updates: dict[fx.Node, Store] = {}
        #: about how many batches there will be
        self.expected = 1

    def add_input(self, node: fx.Node, batch: Tensor, keep: int) -> None:
        self.inputs.setdefault(node, Store()).add(batch, keep, self.expected)

    def add_update(self, node: fx.Node, batch: Tensor, keep: int) -> None:
        self.updates.setdefault(node, Store()).add(batch, keep, self.expected)

    def read(self, nodes: Sequence[fx.Node], span: Span, keep: int | None = None) -> list[Tensor]:
        """The first `keep` samples of the batches of a span, at all these inputs."""
        return [self.inputs[n].read(*span, keep) for n in nodes]

    def spans(self, inputs: Sequence[fx.Node], updates: Sequence[fx.Node] = ()) -> Iterator[Span]:
        """As many batches at once as share a piece at all these nodes."""
        stores = [*(self.inputs[n] for n in inputs), *(self.updates[n] for n in updates)]
        start = 0
        for i, chunks in enumerate(zip(*(s.chunks for s in stores), strict=True)):
            if i and any(c.start == 0 for c in chunks):
                yield Span(start, i)
                start = i
        yield Span(start, len(stores[0].chunks))

    def groups(
        self, keep: int | None, inputs: Sequence[fx.Node], updates: Sequence[fx.Node] = ()
    ) -> Iterator[tuple[Span, dict[fx.Node, Tensor], dict[fx.Node, Tensor]]]:
        """The first `keep` samples of every batch, at all these nodes, span by span."""
        for span in self.spans(inputs, updates):
            yield (
                span,
                dict(zip(inputs, self.read(inputs, span, keep), strict=True)),
                {n: self.updates[n].read(*span, keep) for n in updates},
            )


def _places(size: int, expected: int) -> int:
    """How many batches of so many bytes share a piece: a power of two, so that pieces of several stores nest."""
    fit = PIECE // max(1, size)
    if 0 < expected <= fit:
        return expected
    return 1 << (fit.bit_length() - 1) if fit else 1
