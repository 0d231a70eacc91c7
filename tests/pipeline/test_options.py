"""Options of `grow` and `Grower`: one list, shown in signatures, unknown names refused."""

from __future__ import annotations

import inspect
import typing

import pytest
import torch
from torch import nn

import fxgrow
from fxgrow.pipeline.options import DEFAULTS, GrowOptions

BATCHES = [(torch.zeros(4, 3), torch.zeros(4, 1))]


def test_every_option_has_a_default_and_a_type() -> None:
    assert typing.get_type_hints(GrowOptions).keys() == DEFAULTS.keys()


def test_signatures_show_the_options() -> None:
    grow, grower = inspect.signature(fxgrow.grow).parameters, inspect.signature(fxgrow.Grower).parameters
    assert grow["progress"].default is True and grower["progress"].default is False
    assert grow["budget"].annotation == grower["budget"].annotation == str | float | None
    assert DEFAULTS.keys() <= grow.keys() and DEFAULTS.keys() <= grower.keys()


def test_an_unknown_option_is_named() -> None:
    net = nn.Linear(3, 1)
    with pytest.raises(TypeError, match="unexpected keyword argument 'neuron'"):
        fxgrow.grow(net, BATCHES, neuron=2)  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="unexpected keyword argument 'budgets'"):
        fxgrow.Grower(net, torch.optim.SGD(net.parameters()), fxgrow.Every(steps=1), dataloader=BATCHES, budgets=2)  # type: ignore[call-arg]
