"""What cannot work says what was found and what to do, and leaves everything as it was."""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import fxgrow
from fxgrow.initialisers.registry import _TABLE


class Net(nn.Module):
    """Convolutions with a norm and dropout, and a head; three free widths."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.drop = nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Dropout(0.5)
        self.fc, self.fc2, self.head = nn.Linear(3, 4), nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.conv(x))).mean((2, 3))
        return self.head(self.drop(torch.tanh(self.fc2(torch.relu(self.fc(x))))))


def net() -> Net:
    """With gradients, hooks, mixed modes: all that could get lost."""
    model = Net().train()
    model.bn.eval()
    F.cross_entropy(model(torch.randn(5, 1, 6, 6)), torch.randint(3, (5,))).backward()
    model.fc.register_forward_hook(lambda module, inputs, output: None)
    model.head.bias.requires_grad_(False)
    return model


def batches(count: int = 4) -> list[Any]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(16, 1, 6, 6, generator=generator), torch.randint(3, (16,), generator=generator))
        for _ in range(count)
    ]


def everything(model: nn.Module, optimizer: torch.optim.Optimizer | None = None, loader: Any = None) -> list[Any]:
    """A copy of whatever growth could disturb, in a form that `==` compares."""

    def plain(t: Tensor | None) -> Any:
        return None if t is None else (t.dtype, t.device, "meta" if t.is_meta else t.detach().clone().tolist())

    state: list[Any] = [
        {n: (id(p), p._version, plain(p), plain(p.grad), p.requires_grad) for n, p in model.named_parameters()},
        {n: (id(b), b._version, plain(b)) for n, b in model.named_buffers()},
        [(n, id(m), m.training, list(m._forward_hooks), list(m._forward_pre_hooks), list(m._backward_hooks))
         for n, m in model.named_modules()],
        [len(p._backward_hooks or ()) for p in model.parameters()],
        random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist(),
        torch.is_grad_enabled(), torch.get_default_dtype(),
    ]  # fmt: skip
    if optimizer is not None:
        state.append([[id(p) for p in g["params"]] for g in optimizer.param_groups])
        state.append({id(p): {k: plain(v) for k, v in s.items()} for p, s in optimizer.state.items()})
    if loader is not None and loader.generator is not None:
        state.append(loader.generator.get_state().tolist())
    return state


def trained(model: nn.Module) -> torch.optim.Optimizer:
    """An Adam that has made a step, so that its state could get lost."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.0)
    for p in model.parameters():
        p.grad = torch.ones_like(p) if p.requires_grad else None
    optimizer.step()
    return optimizer


def nan_loss(out: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(out, y) * float("nan")


def infinite_loss(out: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(out, y) / 0.0


def failing_loss(out: Tensor, y: Tensor) -> Tensor:
    raise ValueError("the targets are odd")


def detached_loss(out: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(out.detach(), y)


def number_loss(out: Tensor, y: Tensor) -> Any:
    return 0.5


def late_nan(out: Tensor, y: Tensor) -> Tensor:
    """Fails on the third batch only, when much has been done."""
    late_nan.calls += torch.is_grad_enabled()  # not those that find out whether it is a sum
    return F.cross_entropy(out, y) * (float("nan") if late_nan.calls == 3 else 1.0)


class Loader(list):
    """A list with another error than an empty one."""

    def __iter__(self) -> Iterator[Any]:
        yield from list.__iter__(self)
        raise OSError("the disk is gone")


X, Y = torch.zeros(16, 1, 6, 6), torch.zeros(16, dtype=torch.long)
#: name -> data, arguments of grow, the error, what its message says
CASES: dict[str, tuple[Any, dict[str, Any], type[Exception], str]] = {
    "empty list": ([], {}, fxgrow.ProfileError, "dataloader is empty: give at least one batch"),
    "empty iterator": (iter(()), {}, fxgrow.ProfileError, "dataloader is empty: give at least one batch"),
    "no loader": (7, {}, fxgrow.ProfileError, "dataloader is a int, which cannot be iterated over"),
    "nan": (batches(), {"loss_fn": nan_loss}, fxgrow.ProfileError, "loss of batch 0 is nan.*finite"),
    "inf": (batches(), {"loss_fn": infinite_loss}, fxgrow.ProfileError, "loss of batch 0 is inf.*finite"),
    "late nan": (batches(), {"loss_fn": late_nan}, fxgrow.ProfileError, "loss of batch 2 is nan"),
    "failing loss": (
        batches(), {"loss_fn": failing_loss}, fxgrow.ProfileError, r"failing_loss failed on batch 0 \(output \(16, 3\) "
        r"float32 on cpu, targets \(16,\) int64 on cpu\): the targets are odd",
    ),
    "detached loss": (batches(), {"loss_fn": detached_loss}, fxgrow.ProfileError, "does not depend on.*detach"),
    "loss no tensor": (batches(), {"loss_fn": number_loss}, fxgrow.ProfileError, "loss of batch 0 is a float"),
    "three items": (
        [(X, Y, Y)], {}, fxgrow.ProfileError, r"Batch 0 is a tuple of 3 items. A batch is \(inputs, targets\)",
    ),
    "bare tensor": ([X], {}, fxgrow.ProfileError, r"Batch 0 is a Tensor. A batch is \(inputs, targets\)"),
    "string": (["images"], {}, fxgrow.ProfileError, r"Batch 0 is a str. A batch is \(inputs, targets\)"),
    "later batch": ([*batches(1), (X, Y, Y)], {}, fxgrow.ProfileError, "Batch 1 is a tuple of 3 items"),
    "no tensor": ([("images", Y)], {}, fxgrow.ProfileError, "Batch 0 has no input tensor"),
    "other inputs": ([*batches(1), ((X, X), Y)], {}, fxgrow.ProfileError, "Batch 1 has 2 inputs.*captured with 1"),
    "other shape": (
        [*batches(1), (X.expand(-1, 2, -1, -1), Y)], {}, fxgrow.ProfileError,
        r"failed on batch 1 \(inputs \(16, 2, 6, 6\).*channels",
    ),
    "targets do not fit": ([(X, Y[:3])] * 4, {}, fxgrow.ProfileError, "default loss failed on batch 0"),
    "targets of no kind": ([(X, "cat")] * 4, {}, fxgrow.ProfileError, "No default loss.*targets a str: pass loss_fn"),
    "float targets of another shape": (
        [(X, Y.float())] * 4, {}, fxgrow.ProfileError, r"equal shapes, found output \(16, 3\) and targets \(16,\)",
    ),
    "integer input": (
        [((X * 255).to(torch.uint8), Y)] * 4, {}, fxgrow.CaptureError,
        "'conv'.*Input type .unsigned char.*Check that the model runs on these example inputs",
    ),
    "budget 0": (batches(), {"budget": 0}, fxgrow.PlanError, "budget=0 leaves 0 parameters.*positive"),
    "budget negative": (batches(), {"budget": -5}, fxgrow.PlanError, "budget=-5.*positive"),
    "budget negative share": (batches(), {"budget": "-10%"}, fxgrow.PlanError, "budget='-10%'.*positive"),
    "budget word": (batches(), {"budget": "abc"}, fxgrow.PlanError, r"budget='abc': give a number.*'\+10%'"),
    "budget fraction": (batches(), {"budget": 0.25}, fxgrow.PlanError, r"budget=0.25: .* such as '\+25%'"),
    "budget nan": (batches(), {"budget": "nan%"}, fxgrow.PlanError, "budget='nan%'"),
    "budget and neurons": (batches(), {"budget": 9, "neurons": 1}, fxgrow.PlanError, "budget or .*neurons, not both"),
    "neurons 0": (batches(), {"neurons": 0}, fxgrow.PlanError, "neurons=0: give a positive"),
    "neurons fraction": (batches(), {"neurons": 1.5}, fxgrow.PlanError, "neurons=1.5: give a positive"),
    "unknown width": (
        batches(), {"neurons": {"conv1": 2}}, fxgrow.PlanError, "no width named 'conv1'.*free ones here: conv, fc",
    ),
    "pinned width": (batches(), {"neurons": {"head": 2}}, fxgrow.PlanError, "'head' cannot change: output"),
    "method": (
        batches(), {"method": "nonsense"}, fxgrow.ProfileError, "no method 'nonsense'; there are default,.*tiny",
    ),
    "samples 0": (batches(), {"samples": 0}, fxgrow.ProfileError, "samples=0: at least one"),
    "loader's own error": (Loader(batches(2)), {}, OSError, "the disk is gone"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_error_says_what_and_changes_nothing(name: str) -> None:
    data, arguments, kind, message = CASES[name]
    late_nan.calls = 0
    model = net()
    optimizer = trained(model)
    before = everything(model, optimizer)
    with pytest.raises(kind) as caught:
        fxgrow.grow(model, data, optimizer=optimizer, progress=False, **arguments)
    assert re.search(message, str(caught.value), re.DOTALL), str(caught.value)
    assert everything(model, optimizer) == before


def test_budget_too_small() -> None:
    """Found out only where some unit is worth having."""
    x = torch.randn(1024, 4)
    data = list(zip(x.split(64), x[:, :1].abs().split(64), strict=True))
    model = nn.Sequential(nn.Linear(4, 2), nn.ReLU(), nn.Linear(2, 1))
    with pytest.raises(fxgrow.PlanError, match=r"budget of 3 parameters is less than the smallest growth, 6 .*'0'"):
        fxgrow.grow(model, data, budget=3, progress=False)


@pytest.mark.parametrize("layer", ["conv", "fc"])
def test_frozen_producer_or_consumer(layer: str) -> None:
    model = net()
    model.get_submodule(layer).requires_grad_(False)
    before = everything(model)
    width = "conv"  # written by conv, read by fc
    for call in (
        lambda: fxgrow.grow(model, batches(), neurons={width: 2}, progress=False),
        lambda: fxgrow.widen(model, (X,), {width: 2}),
        lambda: fxgrow.profile(model, batches(), widths=[width], progress=False),
    ):
        with pytest.raises(fxgrow.PlanError, match=rf"'{width}' cannot change: frozen at {layer}.*"):
            call()
    assert everything(model) == before


def test_everything_frozen() -> None:
    model = net().requires_grad_(False)
    before = everything(model)
    with pytest.raises(fxgrow.ProfileError, match="No width of this model can grow .*conv: frozen.*both trainable"):
        fxgrow.grow(model, batches(), progress=False)
    assert everything(model) == before


def test_every_width_pinned() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 3))
    with pytest.raises(fxgrow.ProfileError, match="No width of this model can grow .*1: output"):
        fxgrow.grow(model, batches(), progress=False)
    with pytest.raises(fxgrow.ProfileError, match="No width .*no hidden layers"):
        fxgrow.grow(nn.Sequential(nn.Flatten(), nn.Identity()), [(X, X.flatten(1))], progress=False)


@pytest.mark.parametrize("call", ["grow", "profile"])
def test_model_on_another_device(call: str) -> None:
    model = Net().to("meta")
    before = everything(model)
    with pytest.raises(fxgrow.FxgrowError, match="on cpu, the model on meta.*(Move|model.to)"):
        getattr(fxgrow, call)(model, batches(), progress=False)
    assert everything(model) == before


def test_unknown_names() -> None:
    model = net()
    with pytest.raises(fxgrow.PlanError, match="no width named 'nowhere'.*conv, fc"):
        fxgrow.widen(model, (X,), {"nowhere": 1})
    with pytest.raises(fxgrow.PlanError, match="no width named 'nowhere'.*conv, fc"):
        fxgrow.profile(model, batches(), widths=["nowhere"], progress=False)
    with pytest.raises(fxgrow.ProfileError, match="positions='some'"):
        fxgrow.profile(model, batches(), positions="some", progress=False)
    profile = fxgrow.profile(model, batches(), widths=["fc"], units=2, progress=False)
    with pytest.raises(fxgrow.PlanError, match="'conv' was not profiled; profiled: fc"):
        fxgrow.plan(profile, neurons={"conv": 1})
    with pytest.raises(fxgrow.PlanError, match="3 units are asked for at width 'fc', but the profile proposed 2"):
        fxgrow.plan(profile, neurons=3)
    with pytest.raises(fxgrow.PlanError, match="not a plan of fxgrow"):
        fxgrow.Plan.from_json('{"fxgrow": 1}')
    with pytest.raises(fxgrow.PlanError, match="not a plan of fxgrow"):
        fxgrow.Plan.from_json("units")


def test_negative_units() -> None:
    with pytest.raises(fxgrow.PlanError, match="'fc'.*positive"):
        fxgrow.widen(net(), (X,), {"fc": -1})


def shuffled() -> DataLoader[Any]:
    x, y = (torch.cat(parts) for parts in zip(*batches(), strict=True))
    return DataLoader(TensorDataset(x, y), 16, shuffle=True, generator=torch.Generator().manual_seed(3))


SOURCES: dict[str, Callable[[], Any]] = {
    "list": batches,
    "generator": lambda: (b for b in batches()),
    "shuffled": shuffled,
    "shuffled by the global generator": lambda: DataLoader(shuffled().dataset, 16, shuffle=True),
}


@pytest.mark.parametrize("method", sorted(_TABLE))
@pytest.mark.parametrize("source", SOURCES)
def test_success_changes_nothing_either(source: str, method: str) -> None:
    model = net()
    loader = SOURCES[source]()
    before = everything(model, loader=loader if isinstance(loader, DataLoader) else None)
    grown = fxgrow.grow(model, loader, neurons=2, method=method, progress=False)
    assert everything(model, loader=loader if isinstance(loader, DataLoader) else None) == before
    # those that split old units add none that would not lower the held-out loss
    added = grown.meta["fxgrow"].plan.units if method in ("splitting", "firefly") else {"conv": 2, "fc": 2}
    assert (grown.conv.out_channels, grown.fc.out_features) == (3 + added.get("conv", 0), 4 + added.get("fc", 0))
    shared = {id(p) for p in model.parameters()} & {id(p) for p in grown.parameters()}
    assert not shared and all(p.grad is None for p in grown.parameters())
    flags = {n: m.training for n, m in model.named_modules()}
    assert {n: m.training for n, m in grown.named_modules() if n in flags} == flags


def test_optimizer_of_another_model() -> None:
    model = net()
    other = trained(Net())
    before = everything(model, other)
    with pytest.raises(fxgrow.FxgrowError, match="owns .* none of them of this Net"):
        fxgrow.grow(model, batches(), neurons=1, optimizer=other, progress=False)
    assert everything(model, other) == before


def test_captured_graph_is_left_alone() -> None:
    gm = fxgrow.capture(net(), (X,))
    before, code = everything(gm), gm.code
    fxgrow.grow(gm, batches(), neurons=1, progress=False)
    fxgrow.apply(gm, fxgrow.Plan({"fc": 2}))
    assert everything(gm) == before and gm.code == code and copy.deepcopy(gm).code == code
