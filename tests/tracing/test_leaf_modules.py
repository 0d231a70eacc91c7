"""Functions marked with torch.fx.wrap: their code is followed, or they stay the node that their author asked for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn
from torch.fx import _symbolic_trace

import fxgrow
from fxgrow.integrations._torchvision import import_torchvision
from fxgrow.ops import registry


@fx.wrap
def both(x: Tensor, times: int) -> Tensor:
    return torch.cat([x, x * times], len(x.shape) - 1)


@fx.wrap
def by_sign(x: Tensor) -> Tensor:
    return x if float(x.detach().sum()) > 0 else -x


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 6), nn.Linear(12, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(by_sign(self.second(both(self.first(x), 2).relu())).relu())


def test_followed_or_one_node() -> None:
    torch.manual_seed(0)
    marks = set(_symbolic_trace._wrapped_fns_to_patch)
    model, x = Net().double(), torch.randn(5, 4, dtype=torch.float64)
    gm = fxgrow.capture(model, (x[:2],))
    targets = [node.target for node in gm.graph.nodes]
    assert both not in targets and torch.cat in targets
    assert "by_sign_opaque" in targets
    assert marks <= set(_symbolic_trace._wrapped_fns_to_patch)
    found = {w.name: w.pinned.code if w.pinned else None for w in fxgrow.widths(gm)}
    assert found["first"] is None and found["last"] == "output"
    grown = fxgrow.widen(gm, (x,), {"first": 2})
    torch.testing.assert_close(grown(x), model(x), rtol=1e-12, atol=0)


def test_attention_behind_a_mark() -> None:
    """Swin's shifted windows in torchvision are such a function: its attention becomes a width, in 2-D and 3-D."""
    models = import_torchvision().models
    kwargs = {"embed_dim": 8, "depths": [2, 2], "num_heads": [2, 2], "num_classes": 5, "stochastic_depth_prob": 0.0}
    torch.manual_seed(0)
    flat = models.swin_transformer.SwinTransformer(patch_size=[4, 4], window_size=[4, 4], **kwargs)
    deep = models.video.swin_transformer.SwinTransformer3d(patch_size=[2, 4, 4], window_size=[2, 4, 4], **kwargs)
    for model, x in ((flat, torch.randn(2, 3, 32, 32)), (deep, torch.randn(2, 3, 4, 32, 32))):
        model, x = model.double(), x.double()
        gm = fxgrow.capture(model, (x[:1],))
        free = [w for w in fxgrow.widths(gm) if w.pinned is None]
        inside = {w.name for w in free if "attn" in w.name}
        assert len(inside) == 4  # one of each block
        grown = fxgrow.widen(gm, (x,), {w.name: w.step for w in free})
        for training in (False, True):
            a, b = model.train(training)(x), grown.train(training)(x)
            assert float((a - b).detach().abs().max()) <= 1e-10 * float(a.detach().abs().max())


def test_a_described_function_is_an_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule of the user's says more than the code would."""
    monkeypatch.setattr(registry, "_RULES", dict(registry._RULES))
    fxgrow.op(both)(registry._RULES[torch.relu])
    gm = fxgrow.capture(Net(), (torch.randn(2, 4),))
    assert both in [node.target for node in gm.graph.nodes]
