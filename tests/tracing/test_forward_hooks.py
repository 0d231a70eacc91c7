"""Forward hooks are part of the function: what they change and what they collect for the code to read."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import fxgrow
from fxgrow.errors import CaptureError

log = logging.getLogger("features")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.block, self.out = nn.Linear(6, 8), nn.Sequential(nn.Linear(8, 7), nn.Tanh()), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Any:
        return self.out(self.block(self.a(x).relu()))


def changed_output(m: Net) -> None:
    m.a.register_forward_hook(lambda module, args, out: out.tanh() * 2)


def changed_input(m: Net) -> None:
    m.block[0].register_forward_pre_hook(lambda module, args: (args[0] + 1,))


def changed_keywords(m: Net) -> None:
    m.block.register_forward_pre_hook(lambda module, args, kwargs: ((args[0] * 3,), kwargs), with_kwargs=True)


def changed_in_place(m: Net) -> None:
    def double(module: nn.Module, args: Any, out: Tensor) -> None:
        out.mul_(2)

    m.a.register_forward_hook(double)


def changed_twice(m: Net) -> None:
    m.a.register_forward_hook(lambda module, args, out: out * 2)
    m.a.register_forward_hook(lambda module, args, out: out + 1, prepend=True)


def of_the_model(m: Net) -> None:
    m.register_forward_pre_hook(lambda module, args: args[0] - 1)
    m.register_forward_hook(lambda module, args, out: {"logits": out * 3})


def of_a_pruned_layer(m: Net) -> None:
    prune.random_unstructured(m.block[0], "weight", 0.3)
    m.block[0].register_forward_hook(lambda module, args, out: out * 2)


def computed_weight(m: Net) -> None:
    def halve(module: Any, args: Any) -> None:
        module.weight = module.weight_orig * 0.5

    layer: Any = m.block[0]
    layer.weight_orig = layer.weight
    del layer.weight
    layer.weight = layer.weight_orig.detach()
    layer.register_forward_pre_hook(halve)


HOOKS = [changed_output, changed_input, changed_in_place, changed_keywords, changed_twice, of_the_model]
ON_LAYERS = [of_a_pruned_layer, computed_weight]


def net(hook: Callable[[Net], None]) -> tuple[Net, Tensor]:
    torch.manual_seed(0)
    m, x = Net(), torch.randn(4, 6)
    hook(m)
    return m.double(), x.double()


def logits(out: Any) -> Tensor:
    return out["logits"] if isinstance(out, dict) else out


@pytest.mark.parametrize("hook", [*HOOKS, *ON_LAYERS])
def test_a_graph_computes_what_the_hooks_make_of_it(hook: Any) -> None:
    m, x = net(hook)
    gm = fxgrow.capture(m, (x,))
    for mode in (False, True):
        expected = logits(m.train(mode)(x))
        assert torch.allclose(logits(gm.train(mode)(x)), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("into", ["graph", "module"])
@pytest.mark.parametrize("hook", HOOKS)
def test_grown_models_run_such_hooks_once(hook: Any, into: Any) -> None:
    m, x = net(hook)
    optimizer = torch.optim.SGD(m.parameters(), lr=0.1)
    expected = logits(m(x))
    grown = fxgrow.widen(m, (x,), {"a": 2, "block.0": 1}, optimizer=optimizer, into=into)
    assert torch.allclose(logits(grown(x)), expected, rtol=0, atol=1e-10)
    again = fxgrow.widen(grown, (x,), {"a": 1}, optimizer=optimizer, into=into)
    assert torch.allclose(logits(again(x)), expected, rtol=0, atol=1e-10)


class Features(Net):
    """Reads in forward what hooks have collected on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []
        self.by_name: dict[str, Tensor] = {}
        self.probe = nn.Linear(15, 3)
        self.a.register_forward_hook(self.collect)
        for name, layer in self.block.named_children():
            layer.register_forward_hook(functools.partial(self.store, name))

    def collect(self, module: nn.Module, args: Any, out: Tensor) -> None:
        self.seen.append(out)

    def store(self, name: str, module: nn.Module, args: Any, out: Tensor) -> None:
        self.by_name[name] = out

    def forward(self, x: Tensor) -> Any:
        self.seen.clear()
        y = super().forward(x)
        return y + self.probe(torch.cat([self.seen[0], self.by_name["0"]], 1))


def test_features_that_forward_reads() -> None:
    m, x = Features().double(), torch.randn(4, 6).double()
    gm = fxgrow.capture(m, (x,))
    free = {w.name: 1 for w in fxgrow.widths(gm) if w.pinned is None}
    assert free.keys() == {"a", "block.0"} and not m.seen and not m.by_name
    expected = m(x)
    assert torch.allclose(gm(x), expected, rtol=0, atol=1e-10)
    for into in ("graph", "module"):
        grown: Any = fxgrow.widen(m, (x,), free, into=into)  # type: ignore[call-overload]
        assert torch.allclose(grown(x), expected, rtol=0, atol=1e-10)


def test_hooks_that_look_at_data_and_change_nothing_are_left_out() -> None:
    m, means = Net(), list[float]()
    m.a.register_forward_hook(lambda module, args, out: means.append(float(out.mean())))
    m.block.register_forward_hook(lambda module, args, out: log.info("%s", out.max().item() > 0))
    x = torch.randn(4, 6)
    gm = fxgrow.capture(m, (x,))
    assert not means and torch.equal(gm(x), m(x)) and len(means) == 1


def test_a_hook_that_cannot_be_followed_is_named() -> None:
    def clip(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        return out * 0.1 if out.abs().max() > 1e-3 else out

    m = Net()
    m.a.register_forward_hook(clip)
    with pytest.raises(CaptureError, match=r"forward hook .*clip on 'a' changes what the model computes"):
        fxgrow.capture(m, (torch.randn(4, 6),))


def test_hooks_on_attention() -> None:
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.maps = nn.MultiheadAttention(8, 2, batch_first=True), list[Tensor]()
            self.mid, self.out = nn.Linear(8, 7), nn.Linear(7, 3)
            self.attention.register_forward_hook(lambda module, args, out: (out[0] * 2, out[1]))
            self.attention.register_forward_hook(lambda module, args, out: self.maps.append(out[1]))

        def forward(self, x: Tensor) -> Tensor:
            h = self.attention(x, x, x, need_weights=True)[0]
            return self.out(self.mid(h).relu()) * self.maps.pop().mean()

    m, x = Attends().double(), torch.randn(2, 5, 8).double()
    gm = fxgrow.capture(m, (x,))
    assert torch.allclose(gm(x), m(x), rtol=0, atol=1e-10) and not m.maps
