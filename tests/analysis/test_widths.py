"""Widths of whole networks: their names, what belongs to each, and why some cannot change."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fxgrow
from fxgrow.analysis.analyse import widths
from fxgrow.axes.axes import Dims
from fxgrow.axes.records import Width
from fxgrow.ops.context import Context
from fxgrow.ops.registry import _RULES
from fxgrow.rewriting.rewrite import rewrite
from fxgrow.tracing.capture import capture
from models import GPT, MLP, DigitsResNet, UNet, ViT, resnet20, vgg11_bn


def named(model: nn.Module, *inputs: Tensor) -> dict[str, Width]:
    return {w.name: w for w in widths(capture(model, inputs))}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(6)
        self.dw = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.conv2 = nn.Conv2d(6, 4, 1)
        self.skip = nn.Conv2d(3, 4, 1)
        self.scale = nn.Parameter(torch.ones(4, 1, 1))
        self.fc = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv2(self.dw(self.bn1(self.conv1(x)).relu()))
        return self.fc((h * self.scale + self.skip(x)).mean((2, 3)))


def test_what_belongs_to_a_width() -> None:
    found = named(Block(), torch.randn(2, 3, 5, 5))
    assert list(found) == ["conv1", "conv2", "fc"]
    inner, stream = found["conv1"], found["conv2"]
    assert (inner.producers, inner.followers, inner.consumers) == (("conv1",), ("bn1", "dw"), ("conv2",))
    assert (stream.producers, stream.followers, stream.consumers) == (("conv2", "skip"), ("scale",), ("fc",))


@pytest.mark.parametrize(
    ("model", "inputs", "pinned"),
    [
        (MLP([64, 20, 12, 10], nn.Tanh, 1.0), (torch.randn(2, 1, 8, 8),), {"output"}),
        (resnet20(0.5, shortcut="conv"), (torch.randn(2, 3, 32, 32),), {"output"}),
        (resnet20(0.5), (torch.randn(2, 3, 32, 32),), {"output", "size"}),
        (DigitsResNet(0.5), (torch.randn(2, 1, 8, 8),), {"output"}),
        (vgg11_bn(0.25), (torch.randn(2, 3, 32, 32),), {"output"}),
        (UNet(width=0.5), (torch.randn(2, 1, 16, 16),), {"output"}),
        (ViT(width=0.5), (torch.randn(2, 3, 32, 32),), {"output", "norm", "reduce", "operator", "size"}),
        (GPT(width=0.5), (torch.randint(65, (2, 48)),), {"output", "norm", "reduce", "operator", "size", "input"}),
    ],
    ids=["mlp", "resnet20-conv", "resnet20", "digits", "vgg", "unet", "vit", "gpt"],
)
def test_models(model: nn.Module, inputs: tuple[Tensor, ...], pinned: set[str]) -> None:
    """Nothing is pinned but for the reasons that are known, and something is free."""
    found = named(model, *inputs)
    assert {w.pinned.code for w in found.values() if w.pinned} <= pinned
    assert any(w.pinned is None for w in found.values())


def test_names_are_stable_under_growth() -> None:
    class Split(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            left, right = self.a(x).split([3, 5], 1)
            return self.b(left).repeat(1, 1) + right.mean(0).amax() * 0

    gm = capture(Split(), (torch.randn(2, 4),))
    assert [w.name for w in widths(gm)] == ["a[0]", "a[1]", "b"]
    grown, _ = rewrite(gm, {"a[0]": 2})
    assert [(w.name, w.size) for w in widths(grown)] == [("a[0]", 5), ("a[1]", 5), ("b", 2)]


def test_a_user_describes_a_layer() -> None:
    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(5))

        def forward(self, x: Tensor) -> Tensor:
            if not isinstance(x, Tensor):
                raise TypeError
            return torch.logcumsumexp(x, 1) * self.weight

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.out = nn.Linear(3, 5), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(torch.logcumsumexp(self.a(x), 1))

    x = torch.randn(2, 3)
    pinned = named(Net(), x)["a"].pinned
    assert pinned is not None and pinned.code == "operator" and "logcumsumexp" in pinned.message

    def rule(ctx: Context, x: Dims, dim: int) -> Dims:
        return x

    fxgrow.op(torch.logcumsumexp)(rule)
    try:
        assert named(Net(), x)["a"].pinned is None
    finally:
        del _RULES[torch.logcumsumexp]


def test_a_wrong_rule_is_not_believed() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.out = nn.Linear(3, 5), nn.Linear(10, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(torch.special.i0e(self.a(x)).repeat_interleave(2, 1))

    def rule(ctx: Context, x: Dims, *args: object) -> Dims:
        return x

    fxgrow.op("repeat_interleave")(rule)
    try:
        pinned = named(Net(), torch.randn(2, 3))["a"].pinned
    finally:
        del _RULES["repeat_interleave"]
    assert pinned is not None and pinned.code == "operator"


def test_a_branch_pins_and_says_where() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.out = nn.Linear(3, 5), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            return self.out(h if h.shape[-1] < 6 else -h)

    pinned = named(Net(), torch.randn(2, 3))["a"].pinned
    assert pinned is not None and pinned.code == "branch"


class Positions(nn.Module):
    """Attention that computes all its sizes from the stream's, over tokens with learned positions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.positions = nn.Linear(4, 8), nn.Parameter(torch.randn(1, 5, 8))
        self.qkv, self.proj, self.out = nn.Linear(8, 24), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x) + self.positions
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, 2, c // 2).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.proj(((q @ k.mT * 0.5).softmax(-1) @ v).transpose(1, 2).reshape(b, n, c))
        return self.out(x)


def test_sizes_of_positions_are_numbers() -> None:
    """Learned positions pin the tokens: what measures them takes no place from a size that must be inferred."""
    torch.manual_seed(0)
    model, x = Positions().double(), torch.randn(3, 5, 4, dtype=torch.float64)
    gm = fxgrow.capture(model, (x[:2],))
    assert {w.name: w.step for w in widths(gm) if w.pinned is None} == {"stem": 1, "qkv": 6}
    for units in ({"stem": 2}, {"qkv": 6}, {"stem": 1, "qkv": 12}):
        grown = fxgrow.widen(gm, (x[:2],), units)
        torch.testing.assert_close(grown(x), model(x), rtol=1e-12, atol=1e-12)


class Untouched(nn.Module):
    """Weights that no layer of the library stands for."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.table = nn.LSTM(4, 8, proj_size=6), nn.Parameter(torch.randn(3, 4))
        self.first, self.scale = nn.Linear(4, 8), nn.Parameter(torch.randn(1, 8))
        self.spare, self.bias, self.out = nn.Linear(3, 3), nn.Parameter(torch.randn(4)), nn.Linear(14, 2)
        self.frozen = nn.Parameter(torch.randn(2, 4), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden, _ = self.cell(x + self.table.cumsum(0).amax(0) + self.bias + self.frozen.sum(0))
        return self.out(torch.cat([hidden, self.first(x) * self.scale], 1))


def test_every_trainable_matrix_is_listed() -> None:
    """Weights without a width are pinned ones with a reason, each once; a follower needs no line of its own."""
    found = named(Untouched(), torch.randn(2, 4))
    assert found.keys() == {"cell", "table", "first", "spare", "out"}
    assert found["first"].followers == ("scale",) and found["first"].pinned is None
    pinned = {name: width.pinned for name, width in found.items() if width.pinned is not None}
    assert pinned.keys() == {"cell", "table", "spare", "out"}
    assert "proj_size" in pinned["cell"].message and pinned["spare"].message == "the model's code does not use it"
    assert "table" in str(fxgrow.explain(Untouched(), (torch.randn(2, 4),)))
    with pytest.raises(fxgrow.PlanError, match="proj_size"):
        fxgrow.widen(Untouched(), (torch.randn(2, 4),), {"cell": 1})


def test_a_width_of_no_units_says_so() -> None:
    net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 0), nn.Linear(0, 2))
    found = {w.name: w.pinned for w in fxgrow.widths(fxgrow.capture(net, (torch.randn(3, 4),)))}
    assert found["0"] is None
    assert found["2"] is not None and found["2"].code == "size" and "size 0" in found["2"].message
