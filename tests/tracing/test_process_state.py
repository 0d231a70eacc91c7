"""What a capture leaves in the process and in the model's own containers: nothing."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, arange, nn

import fxgrow


class Frozen(OrderedDict):  # type: ignore[type-arg]
    """A configuration that nobody may change, as several libraries have it."""

    def clear(self) -> None:
        raise TypeError("frozen")

    def update(self, *args: Any, **kwargs: Any) -> None:
        raise TypeError("frozen")


class Positions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config = Frozen(width=8, nested={"heads": 2})
        self.embed, self.out = nn.Embedding(16, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        assert self.config["width"] == 8
        return self.out(x + self.embed(arange(x.shape[1], device=x.device)))


def test_functions_of_torch_by_their_bare_names() -> None:
    net, x = Positions(), torch.randn(2, 5, 8)
    gm = fxgrow.capture(net, (x,))
    assert torch.fx.symbolic_trace(nn.Sequential(nn.Linear(3, 3)))(torch.zeros(1, 3)).shape == (1, 3)
    assert torch.equal(fxgrow.capture(Positions(), (x,))(x[:1]).shape and gm(x), net(x))
    assert not [key for key in torch.fx._symbolic_trace._wrapped_fns_to_patch if "arange" in key[1]]


def test_a_frozen_configuration_stays() -> None:
    net = Positions()
    before = dict(net.config)
    fxgrow.capture(net, (torch.randn(2, 5, 8),))
    assert type(net.config) is Frozen and dict(net.config) == before


def test_an_activation_that_the_model_keeps_is_no_obstacle_to_a_copy() -> None:
    class Keeps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.out = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            self.kept = [self.a(x).relu()]
            return self.out(self.kept[0])

    net, x = Keeps(), torch.randn(3, 4)
    net(x).sum().backward()
    wider = fxgrow.widen(net, (x,), {"a": 2}, into="module")
    assert torch.allclose(wider(x), net(x), atol=1e-6)
