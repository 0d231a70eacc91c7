"""An interpreter of a graph with conditional nodes may free values, though their names are asked for later."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import fxgrow
from fxgrow.graph.conditional import ConditionalInterpreter


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        if self.training:
            h = h + torch.rand(h.shape[0], 1)
        return self.b(h * 3 if self.training else h)


def test_what_a_condition_asks_for_is_kept() -> None:
    x = torch.randn(3, 4)
    gm = fxgrow.capture(Noisy(), (x,))
    for mode in (True, False):
        gm.train(mode)
        torch.manual_seed(0)
        expected = gm(x)
        torch.manual_seed(0)
        assert torch.equal(ConditionalInterpreter(gm).run(x), expected)
