"""Experts of a mixture: one weight for all of them, multiplied group by group."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxgrow

grouped = pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="this PyTorch has no grouped_mm")


class Mixture(nn.Module):
    """Tokens go to their best expert, sorted by expert; weights stored [experts, in, out] or transposed."""

    def __init__(self, transposed: bool, hidden: int = 12) -> None:
        super().__init__()
        self.transposed, self.experts = transposed, 3
        self.first, self.router, self.last = nn.Linear(5, 8), nn.Linear(5, 3), nn.Linear(8, 4)
        up, down = torch.randn(3, 8, 2 * hidden) * 0.3, torch.randn(3, hidden, 8) * 0.3
        self.up = nn.Parameter(up.mT.contiguous() if transposed else up)
        self.down = nn.Parameter(down.mT.contiguous() if transposed else down)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        probability, expert = self.router(rows).softmax(-1).max(-1)
        expert, order = torch.sort(expert)
        ends = torch.histc(expert.float(), bins=self.experts, min=0, max=self.experts - 1).cumsum(0, dtype=torch.int32)
        h = self.first(rows)[order]
        gate, value = F.grouped_mm(h, self.up.transpose(-2, -1) if self.transposed else self.up, offs=ends).chunk(2, -1)
        h = F.silu(gate) * value
        h = F.grouped_mm(h, self.down.transpose(-2, -1) if self.transposed else self.down, offs=ends)
        out = torch.empty_like(h)
        out[order] = h * probability[order].unsqueeze(-1)
        return self.last(out).unflatten(0, x.shape[:2])


class Dense(nn.Module):
    """All tokens go to all experts."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(3, 5, 6)), nn.Parameter(torch.randn(3, 6, 4))

    def forward(self, x: Tensor) -> Tensor:
        return (torch.bmm(x.expand(3, -1, -1), self.up).relu() @ self.down).sum(0)


def test_dense_experts() -> None:
    torch.manual_seed(0)
    model, x = Dense().double(), torch.randn(1, 7, 5, dtype=torch.float64)
    gm = fxgrow.capture(model, (x,))
    assert [(w.name, w.size, w.step) for w in fxgrow.widths(gm) if w.pinned is None] == [("up", 6, 1)]
    grown = fxgrow.widen(gm, (x,), {"up": 3})
    torch.testing.assert_close(grown(x), model(x), rtol=1e-12, atol=1e-12)
    assert grown.up.shape == (3, 5, 9) and grown.down.shape == (3, 9, 4)


@grouped
@pytest.mark.parametrize("transposed", [False, True])
def test_hidden_width_of_the_experts(transposed: bool) -> None:
    torch.manual_seed(0)
    model, x = Mixture(transposed), torch.randn(4, 6, 5)
    gm = fxgrow.capture(model, (x[:2],))
    found = {w.name: w for w in fxgrow.widths(gm)}
    assert found["up"].pinned is None and (found["up"].size, found["up"].step) == (24, 8)
    assert found["up"].consumers == ("down",)
    assert found["first"].pinned is None and found["first"].step == 4
    assert found["router"].pinned is not None
    for units in ({"up": 8}, {"up": 16, "first": 4}):
        grown = fxgrow.widen(gm, (x,), units)
        for training in (False, True):
            torch.testing.assert_close(grown.train(training)(x), model.train(training)(x), rtol=1e-5, atol=1e-6)
    before = [p.clone() for p in (grown.up, grown.down)]
    optimizer = torch.optim.SGD(grown.parameters(), 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        grown(x).square().mean().backward()
        optimizer.step()
    for p, old in zip((grown.up, grown.down), before, strict=True):
        moved = (p - old).abs().sum((0, 1) if (p is grown.up) != transposed else (0, 2))
        assert bool((moved > 0).all())


@grouped
def test_sizes_that_the_kernel_refuses() -> None:
    """Rows are whole 16 bytes: a width of ten floats cannot be, and nothing is guessed."""
    with pytest.raises(fxgrow.FxgrowError, match="cannot|Cannot"):
        gm = fxgrow.capture(Mixture(False, hidden=5), (torch.randn(2, 6, 5),))
        fxgrow.widen(gm, (torch.randn(2, 6, 5),), {"up": 2})


@grouped
def test_growth_of_experts() -> None:
    """There are no statistics of grouped products yet: such units are random, with outgoing weights zero."""
    torch.manual_seed(0)
    model = Mixture(True)
    batches = [(x, x.flatten(1)[:, :24].view(8, 6, 4).sin()) for x in torch.randn(6, 8, 6, 5)]
    grown = fxgrow.grow(model, batches, loss_fn=F.mse_loss, neurons={"up": 8, "first": 4}, progress=False)
    before, after = grown.meta["fxgrow"].losses["eval"]
    assert after <= before * (1 + 1e-5) and grown.up.shape == (3, 32, 12)
