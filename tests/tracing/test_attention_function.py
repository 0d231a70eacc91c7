"""`F.multi_head_attention_forward` called by hand, as in CLIP's attention pooling."""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxgrow


class AttentionPool(nn.Module):
    """One query, the mean, attends to all positions of a map."""

    def __init__(self, channels: int, positions: int, packed: bool, weights: bool) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.randn(positions + 1, channels) / channels**0.5)
        if packed:
            self.packed = nn.Linear(channels, 3 * channels)
        else:
            self.q, self.k, self.v = (nn.Linear(channels, channels) for _ in range(3))
        self.c, self.need_weights, self.separate = nn.Linear(channels, 3), weights, not packed

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2).permute(2, 0, 1)
        x = torch.cat([x.mean(0, keepdim=True), x]) + self.position[:, None]
        bias = torch.cat([self.q.bias, self.k.bias, self.v.bias]) if self.separate else self.packed.bias
        weights = [self.q.weight, self.k.weight, self.v.weight] if self.separate else [None] * 3
        x, attention = F.multi_head_attention_forward(
            x[:1], x, x, x.shape[-1], 2, None if self.separate else self.packed.weight, bias, None, None, False, 0.0,
            self.c.weight, self.c.bias, training=self.training, need_weights=self.need_weights,
            use_separate_proj_weight=self.separate, q_proj_weight=weights[0], k_proj_weight=weights[1],
            v_proj_weight=weights[2],
        )  # fmt: skip
        return x[0] if attention is None else x[0] + attention.sum()


def net(channels: int, packed: bool = False, weights: bool = False) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(2, channels, 3), nn.Tanh(), AttentionPool(channels, 9, packed, weights))


@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_its_parts_are_in_the_graph(packed: bool, weights: bool) -> None:
    torch.manual_seed(0)
    model, x = net(8, packed, weights).double(), torch.randn(4, 2, 5, 5).double()
    graph = fxgrow.capture(model, (x,))
    free = {w.name: w.step for w in fxgrow.widths(graph) if w.pinned is None}
    assert "0" in free and len(free) > 1
    wide = fxgrow.widen(model, (x,), free)
    for mode in (True, False):
        for other in (x, torch.randn(3, 2, 5, 5).double()):
            for result in (graph, wide):
                assert torch.allclose(result.train(mode)(other), model.train(mode)(other), atol=1e-10)


def test_the_time_of_its_analysis_does_not_grow_with_the_channels() -> None:
    graph = fxgrow.capture(net(256), (torch.randn(2, 2, 5, 5),))
    start = time.perf_counter()
    fxgrow.widths(graph)
    assert time.perf_counter() - start < 5


def test_learnt_keys_stay_one_node() -> None:
    class Extra(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.w, self.b = nn.Linear(3, 4), nn.Linear(4, 12), nn.Linear(4, 4)
            self.key, self.value = nn.Parameter(torch.randn(1, 1, 4)), nn.Parameter(torch.randn(1, 1, 4))

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            return F.multi_head_attention_forward(
                x, x, x, 4, 2, self.w.weight, self.w.bias, self.key, self.value, False, 0.0, self.b.weight, self.b.bias
            )[0]

    model, x = Extra(), torch.randn(5, 2, 3)
    graph = fxgrow.capture(model, (x,))
    assert graph.graph.find_nodes(op="call_function", target=F.multi_head_attention_forward)
    assert torch.equal(graph(x), model(x))
