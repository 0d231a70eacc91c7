"""Nodes run on fake tensors: nothing of the model changes, and grouped products are known in every dtype."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import fxgrow
from fxgrow.tracing.fake_values import fake_tensor

IMAGE, TOKENS, VECTOR = (2, 4, 6, 6), (2, 5, 4), (3, 4)
LAYERS: list[tuple[nn.Module, tuple[int, ...]]] = [
    (nn.Linear(4, 3), TOKENS), (nn.Conv2d(4, 3, 3, 2, 1), IMAGE), (nn.ConvTranspose2d(4, 3, 3, 2), IMAGE),
    (nn.BatchNorm2d(4), IMAGE), (nn.BatchNorm1d(4), VECTOR), (nn.LayerNorm(4), TOKENS), (nn.GroupNorm(2, 4), IMAGE),
    (nn.InstanceNorm2d(4), IMAGE), (nn.ReLU6(True), IMAGE), (nn.GELU(), TOKENS), (nn.GLU(1), IMAGE),
    (nn.PReLU(4), IMAGE), (nn.Softmax(-1), TOKENS),
    (nn.Dropout(), TOKENS), (nn.MaxPool2d(2), IMAGE), (nn.AdaptiveAvgPool2d(1), IMAGE),
    (nn.Flatten(), IMAGE), (nn.Upsample(scale_factor=2), IMAGE), (nn.LSTM(4, 3, batch_first=True), TOKENS),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_keep_their_state(dtype: torch.dtype) -> None:
    """A layer's output on fake tensors has the shape, strides and dtype of the real one; its buffers do not move."""
    for layer, shape in LAYERS:
        net = nn.Sequential(layer.to(dtype).train())
        state = {name: t.clone() for name, t in net.state_dict().items()}
        x = torch.zeros(shape, dtype=dtype)
        gm = fxgrow.capture(net, (x.clone(),))
        assert all(torch.equal(t, state[name]) for name, t in net.state_dict().items())
        node = next(n for n in gm.graph.nodes if n.op == "call_module")
        found, real = node.meta["val"], layer(x)
        for a, b in zip(*(t if isinstance(t, tuple) else (t,) for t in (found, real)), strict=True):
            if isinstance(b, torch.Tensor):
                assert type(a) is FakeTensor
                assert (a.shape, a.stride(), a.dtype, a.device) == (b.shape, b.stride(), b.dtype, b.device)


def test_fake_tensor() -> None:
    mode = FakeTensorMode()
    p = nn.Parameter(torch.zeros(3, 4).t())
    fake = fake_tensor(p, mode)
    assert isinstance(fake, nn.Parameter) and fake.requires_grad and fake.stride() == p.stride()
    sparse = fake_tensor(torch.eye(3).to_sparse(), mode)
    assert sparse.layout is torch.sparse_coo


@pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="a PyTorch without grouped_mm")
def test_grouped_mm_in_float32() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(2, 8, 16))

        def forward(self, x: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
            return F.grouped_mm(x, self.weight, offs=ends)

    gm = fxgrow.capture(Experts(), (torch.randn(6, 8), torch.tensor([2, 6], dtype=torch.int32)))
    (node,) = (n for n in gm.graph.nodes if "grouped_mm" in n.name)
    assert node.meta["val"].shape == (6, 16)
