"""Packed sequences: the recurrent layer keeps its size, and what is around it grows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import fxgrow


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj, self.rnn = nn.Linear(6, 7), nn.LSTM(7, 8, batch_first=True)
        self.head = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 3))

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(self.proj(x), lengths.cpu(), batch_first=True, enforce_sorted=False)
        return self.head(self.rnn(packed)[1][0][-1])


class Sorted(Net):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(7, 4, 2, bidirectional=True)  # type: ignore[assignment]

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        lengths, order = lengths.sort(descending=True)
        packed = nn.utils.rnn.pack_padded_sequence(self.proj(x[order]).transpose(0, 1), lengths.tolist())
        out, _ = pad_packed_sequence(self.rnn(packed, None)[0], total_length=x.size(1))
        return self.head(out.transpose(0, 1)[order.argsort()].max(1)[0])


class LastStep(Net):
    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(self.proj(x), lengths, True, False)
        out, n = pad_packed_sequence(self.rnn(packed)[0], batch_first=True, padding_value=-1.0)
        return self.head(out[torch.arange(len(n)), n - 1])


class PerToken(Net):
    """Layers between packing and the recurrent layer see the packed data."""

    def __init__(self) -> None:
        super().__init__()
        self.mid, self.drop = nn.Linear(7, 7), nn.Dropout(0.0)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        self.rnn.flatten_parameters()
        p = pack_padded_sequence(self.proj(x), lengths.cpu().numpy(), batch_first=True, enforce_sorted=False)
        assert isinstance(p, PackedSequence)
        p = PackedSequence(self.mid(p.data.relu()), p.batch_sizes, p.sorted_indices, p.unsorted_indices)
        p, (h, c) = self.rnn(p)
        data, sizes, *order = p
        out = pad_packed_sequence(PackedSequence(self.drop(data), sizes, *order), batch_first=True)[0]
        return self.head(out.sum(1) + h[0] * c[0])


def example(n: int = 4) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 5, 6, dtype=torch.float64), torch.tensor([3, 5, 2, 4, 1, 5])[:n]


@pytest.mark.parametrize("kind", [Net, Sorted, LastStep, PerToken])
def test_what_is_around_a_packed_sequence_grows(kind: Any) -> None:
    torch.manual_seed(0)
    m = kind().double()
    gm = fxgrow.capture(m, example())
    pinned = {w.name: w.pinned.message for w in fxgrow.widths(gm) if w.pinned is not None}
    assert "packed sequence" in pinned["rnn"] and "packed sequence" in pinned["mid" if kind is PerToken else "proj"]
    free = {w.name: 1 for w in fxgrow.widths(gm) if w.pinned is None}
    assert set(free) == ({"head.0", "proj"} if kind is PerToken else {"head.0"})
    grown = fxgrow.widen(m, example(), free)
    for mode in (False, True):
        for inputs in (example(), example(3), example(6), (example()[0], torch.tensor([2, 3, 1, 1]))):
            expected = m.train(mode)(*inputs)
            assert torch.allclose(gm.train(mode)(*inputs), expected, rtol=0, atol=1e-10)
            assert torch.allclose(grown.train(mode)(*inputs), expected, rtol=0, atol=1e-10)


def test_growth_around_a_packed_sequence() -> None:
    torch.manual_seed(0)
    m = Net()
    batches = [((x.float(), n), torch.randn(6, 3)) for x, n in (example(6) for _ in range(4))]
    grown = fxgrow.grow(m, batches, neurons=2, progress=False)
    assert grown.get_submodule("head.0").out_features == 14
