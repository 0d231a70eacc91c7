"""The statistics against a loop over samples, on nets of every kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxgrow
from models.gpt import GPT
from tests.statistics.naive import Case, naive, same

EXACT = 1e-8


# -- the cases


def split(x: Tensor, y: Tensor, *sizes: int) -> list[tuple[Tensor, Tensor]]:
    return list(zip(x.split(list(sizes)), y.split(list(sizes)), strict=True))


def per_sample(out: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(out, y, reduction="none")


def randomised(model: nn.Module) -> nn.Module:
    """Float64, eval mode, BatchNorm statistics away from their defaults."""
    model = model.double().eval()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(std=0.3)
            m.running_var.uniform_(0.5, 2.0)
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.normal_(m.bias, std=0.3)
    return model


def mlp(loss: Callable[[Any, Any], Tensor] = F.cross_entropy) -> Case:
    model = randomised(nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)))
    x, y = torch.randn(47, 6, dtype=torch.float64), torch.randint(3, (47,))
    return Case(model, split(x, y, 20, 20, 7), loss, "0", ["0"], ["2"], {("2", 0): {("0", 0): same}})


def singular_mlp() -> Case:
    """A constant and a repeated input, a dead unit: M and S are singular."""
    case = mlp()
    with torch.no_grad():
        case.model[0].weight[1], case.model[0].bias[1] = 0.0, -9.0
    for x, _ in case.batches:
        x[:, 2], x[:, 3] = 0.7, x[:, 4]
    return case


def strided_conv(count: int = 25) -> Case:
    model = randomised(
        nn.Sequential(
            nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.GELU(), nn.Conv2d(3, 4, 3, stride=2, padding=2, dilation=2),
            nn.ReLU(), nn.Flatten(), nn.Linear(4 * 3 * 3, 3),
        )
    )  # fmt: skip
    x, y = torch.randn(count, 2, 11, 11, dtype=torch.float64), torch.randint(3, (count,))
    batches = split(x, y, 10, 10, count - 20)
    return Case(model, batches, F.cross_entropy, "0", ["0"], ["2"], {("2", 0): {("0", 0): same}})


def conv_flatten() -> Case:
    case = strided_conv(60)  # more samples than the 37 features, or nothing is left to ask for
    case.width, case.producers, case.consumers = "2", ["2"], ["5"]
    case.between = {("5", 0): {("2", 0): same}}
    return case


def pooled_conv() -> Case:
    model = randomised(
        nn.Sequential(
            nn.Conv2d(1, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3), nn.ReLU(inplace=True), nn.AvgPool2d(2),
            nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3),
        )
    )  # fmt: skip
    x, y = torch.randn(21, 1, 8, 8, dtype=torch.float64), torch.randint(3, (21,))
    pool = {("4", 0): {("0", 0): lambda b: F.avg_pool2d(b, 2)}}
    return Case(model, split(x, y, 12, 9), F.cross_entropy, "0", ["0"], ["4"], pool)


def global_pool() -> Case:
    case = pooled_conv()
    case.width, case.producers, case.consumers = "4", ["4"], ["8"]
    case.between = {("8", 0): {("4", 0): lambda b: b.mean((2, 3), keepdim=True)}}
    return case


class Meeting(nn.Module):
    """A map that is averaged and one that is strided meet; `twice`: their sum is averaged and read once more."""

    def __init__(self, twice: bool) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(2, 3, 3, stride=2, padding=1, bias=False)
        self.c, self.d = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 1) if twice else None

    def forward(self, x: Tensor) -> Tensor:
        s = F.avg_pool2d(self.a(x), 2) + self.b(x)
        out = self.c(s).mean((2, 3))
        return out if self.d is None else out + self.d(F.avg_pool2d(s, 2)).tanh().mean((2, 3))


def meeting() -> Case:
    x, y = torch.randn(33, 2, 8, 8, dtype=torch.float64), torch.randint(3, (33,))
    between = {("c", 0): {("a", 0): lambda m: F.avg_pool2d(m, 2), ("b", 0): same}}
    return Case(randomised(Meeting(False)), split(x, y, 20, 13), F.cross_entropy, "a", ["a", "b"], ["c"], between)


class Residual(nn.Module):
    """A stem and two blocks on one stream, read by four convolutions and (pooled or not) a head."""

    def __init__(self, pooled: bool) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(2, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3)
        self.a1, self.a2 = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 3, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(3)
        self.b1, self.b2 = nn.Conv2d(3, 2, 1), nn.Conv2d(2, 3, 3, padding=1)
        self.last = nn.Conv2d(3, 2, 3, stride=2, padding=1)
        self.head = nn.Linear(3 if pooled else 2, 3)
        self.pooled = pooled

    def forward(self, x: Tensor) -> Tensor:
        s = torch.relu(self.bn(self.stem(x)))
        s = torch.relu(s + self.bn2(self.a2(torch.relu(self.a1(s)))))
        s = s + self.b2(torch.tanh(self.b1(s)))
        return self.head(s.mean((2, 3)) if self.pooled else self.last(s).mean((2, 3)))


def residual(pooled: bool = False) -> Case:
    x, y = torch.randn(22, 2, 6, 6, dtype=torch.float64), torch.randint(3, (22,))
    stem, a, b = {("stem", 0): same}, {("a2", 0): same}, {("b2", 0): same}
    last = {**stem, **a, **b}
    between = {("a1", 0): stem, ("b1", 0): {**stem, **a}}
    if pooled:
        between["head", 0] = {k: lambda m: m.mean((2, 3), keepdim=True) for k in last}
    else:
        between["last", 0] = last
    consumers = ["a1", "b1", "head" if pooled else "last"]
    model = randomised(Residual(pooled))
    if not pooled:
        model.head = nn.Linear(2, 3).double()
    return Case(
        model, split(x, y, 9, 9, 4), F.cross_entropy, "stem", ["stem", "a2", "b2"], consumers, between,
        count_once=pooled,
    )  # fmt: skip


class Tokens(nn.Module):
    """A ViT-like block without norms on the stream: attention by softmax, then a perceptron."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(5, 4)
        self.qk, self.value, self.proj = nn.Linear(4, 6), nn.Linear(4, 3), nn.Linear(3, 4, bias=False)
        self.fc1, self.fc2 = nn.Linear(4, 6), nn.Linear(6, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        s = self.embed(x)
        q, k = self.qk(s).chunk(2, -1)
        s = s + self.proj((q @ k.transpose(1, 2)).softmax(-1) @ self.value(s))
        s = s + self.fc2(F.gelu(self.fc1(s)))
        return self.head(s)


def tokens_loss(out: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(out.flatten(0, 1), y.flatten())


def tokens(width: str) -> Case:
    x, y = torch.randn(19, 7, 5, dtype=torch.float64), torch.randint(3, (19, 7))
    batches = split(x, y, 8, 8, 3)
    model = randomised(Tokens())
    if width == "fc1":
        return Case(model, batches, tokens_loss, "fc1", ["fc1"], ["fc2"], {("fc2", 0): {("fc1", 0): same}})
    first, second, third = ({(p, 0): same} for p in ("embed", "proj", "fc2"))
    between = {(n, 0): first for n in ("qk", "value")}
    between |= {("fc1", 0): {**first, **second}, ("head", 0): {**first, **second, **third}}
    return Case(model, batches, tokens_loss, "embed", ["embed", "proj", "fc2"], ["qk", "value", "fc1", "head"], between)


def gpt() -> Case:
    model = randomised(GPT(23, 6, depth=1, heads=2, width=0.125))
    nn.init.normal_(model.blocks[0].mlp[0].weight, std=1.0)  # far from linear, or M is nearly singular
    x, y = torch.randint(23, (30, 6)), torch.randint(23, (30, 6))
    way = {("blocks.0.mlp.2", 0): {("blocks.0.mlp.0", 0): same}}
    return Case(model, split(x, y, 16, 14), tokens_loss, "blocks.0.mlp.0", ["blocks.0.mlp.0"], ["blocks.0.mlp.2"], way)


class Siamese(nn.Module):
    """One producer and one consumer, each used on two halves of the input."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.b(torch.tanh(self.a(x[:, :4]))), self.b(torch.relu(self.a(x[:, 4:])))
        return self.head(left - right)


def siamese() -> Case:
    x, y = torch.randn(30, 8, dtype=torch.float64), torch.randint(3, (30,))
    between = {("b", i): {("a", i): same} for i in (0, 1)}
    rounds = [{"a": 0}, {"a": 1}]
    return Case(
        randomised(Siamese()), split(x, y, 16, 14), F.cross_entropy, "a", ["a"], ["b"], between, rounds
    )  # fmt: skip


class Recurrent(nn.Module):
    """A layer that reads what it wrote: its second use sees its first one only, not the stem."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.loop, self.head = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.loop(torch.tanh(self.loop(torch.tanh(self.stem(x)))))))


def recurrent() -> Case:
    x, y = torch.randn(40, 4, dtype=torch.float64), torch.randint(3, (40,))
    between = {
        ("loop", 0): {("stem", 0): same},
        ("loop", 1): {("loop", 0): same},
        ("head", 0): {("loop", 1): same},
    }
    rounds = [{"stem": 0, "loop": 0}, {"loop": 1}]
    return Case(
        randomised(Recurrent()), split(x, y, 20, 20), F.cross_entropy, "stem", ["stem", "loop"], ["loop", "head"],
        between, rounds,
    )  # fmt: skip


class Video(nn.Module):
    """Frames lie in the batch dimension, `[samples * frames, ...]`, or `[frames * samples, ...]`."""

    def __init__(self, frames_first: bool) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 4, 3), nn.Linear(4, 3)
        self.frames_first = frames_first

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1) if self.frames_first else x
        n, t = x.shape[:2]
        y = self.c(self.b(self.a(x.flatten(0, 1)).tanh()).relu().mean((2, 3)))
        return y.view(n, t, -1).sum(0 if self.frames_first else 1)


def video(width: str, frames_first: bool) -> Case:
    x, y = torch.randn(40, 3, 2, 5, 5, dtype=torch.float64), torch.randint(3, (40,))
    reader, way = ("b", same) if width == "a" else ("c", lambda m: m.mean((2, 3), keepdim=True))
    between = {(reader, i): {(width, i): way} for i in range(3)}
    model, batches, rounds = randomised(Video(frames_first)), split(x, y, 18, 22), [{width: i} for i in range(3)]
    return Case(model, batches, F.cross_entropy, width, [width], [reader], between, rounds, frames=3)


class StepsFirst(nn.Module):
    """Samples in the second dimension; `flat`: in one dimension with the steps, or in a stack of such."""

    def __init__(self, layout: str) -> None:
        super().__init__()
        self.a, self.b, self.layout = nn.Linear(5, 4), nn.Linear(4, 3), layout

    def forward(self, x: Tensor) -> Tensor:
        steps = x.permute(1, 0, 2)
        if self.layout == "flat":
            steps = steps.reshape(-1, 5)
        if self.layout == "stacked":
            steps = torch.stack([steps, steps**2])
        y = self.b(self.a(steps).tanh())
        return y.view(-1, x.shape[1], x.shape[0], 3).sum((0, 1))


def steps_first(layout: str) -> Case:
    x, y = torch.randn(21, 4, 5, dtype=torch.float64), torch.randint(3, (21,))
    model, batches = randomised(StepsFirst(layout)), split(x, y, 12, 9)
    return Case(model, batches, F.cross_entropy, "a", ["a"], ["b"], {("b", 0): {("a", 0): same}})


CASES: dict[str, Callable[[], Case]] = {
    "mlp": mlp,
    "per-sample losses": lambda: mlp(per_sample),
    "singular": singular_mlp,
    "strided, padded, dilated": strided_conv,
    "flatten": conv_flatten,
    "average pool between": pooled_conv,
    "global pool": global_pool,
    "maps of different sizes": meeting,
    "residual stream": residual,
    "residual stream, pooled head": lambda: residual(pooled=True),
    "tokens": lambda: tokens("fc1"),
    "token stream": lambda: tokens("embed"),
    "gpt": gpt,
    "used twice": siamese,
    "recurrent": recurrent,
    "frames beside samples": lambda: video("a", frames_first=False),
    "frames beside samples, pooled": lambda: video("b", frames_first=False),
    "frames before samples": lambda: video("a", frames_first=True),
    "frames before samples, pooled": lambda: video("b", frames_first=True),
    "steps first": lambda: steps_first(""),
    "steps and samples in one dimension": lambda: steps_first("flat"),
    "a stack of steps first": lambda: steps_first("stacked"),
}


def close(found: Tensor | float, expected: Tensor | float, tolerance: float = EXACT) -> bool:
    found, expected = torch.as_tensor(found), torch.as_tensor(expected)
    return bool((found - expected).abs().max() <= tolerance * expected.abs().max())


def rows_of(case: Case, grown: nn.Module, k: int) -> Tensor:
    """New incoming weights of all producers, `[P, k]`."""
    parts = []
    for name in case.producers:
        module = grown.get_submodule(name)
        old = case.model.get_submodule(name)
        rows = module.weight[-k:]
        rows = rows[:, : old.weight.shape[1]].flatten(1)
        parts.append(rows if module.bias is None else torch.cat([rows, module.bias[-k:, None]], 1))
    return torch.cat(parts, 1).T


def columns_of(case: Case, grown: nn.Module, name: str, k: int) -> Tensor:
    """New outgoing weights to one consumer, `[k, taps, O]`."""
    weight = grown.get_submodule(name).weight
    old = case.model.get_submodule(name).weight
    taps = old.shape[1] // case.model.get_submodule(case.producers[0]).weight.shape[0]
    taps = taps if old.dim() == 2 else 1
    columns = weight[: old.shape[0], -k * taps :]
    return columns.reshape(len(old), k, -1).permute(1, 2, 0)


class Gated(nn.Module):
    """A gate that a linear layer writes multiplies the channels of maps before a linear layer reads their means."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.out = nn.Conv2d(2, 6, 3, padding=1), nn.Linear(6, 3)
        self.squeeze, self.gate = nn.Linear(6, 4), nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        gate = self.gate(self.squeeze(x.mean((2, 3))).relu()).sigmoid()
        return self.out((x * gate.view(*gate.shape, 1, 1)).mean((2, 3)))


def test_producers_with_and_without_positions_before_one_consumer() -> None:
    torch.manual_seed(0)
    batches = [(torch.randn(16, 2, 5, 5), torch.randn(16, 3)) for _ in range(4)]
    grown = fxgrow.grow(Gated(), batches, neurons={"a": 2}, loss_fn=F.mse_loss, progress=False)
    assert (grown.a.out_channels, grown.gate.out_features, grown.out.in_features) == (8, 8, 8)


@pytest.mark.parametrize("positions", ["all", "sampled"])
def test_maps_of_different_sizes_that_are_read_at_different_sizes(positions: str) -> None:
    case = meeting()
    settings = {"widths": ["a"], "units": 2, "positions": positions, "progress": False}
    profile = fxgrow.profile(Meeting(True).double(), case.batches, method="tiny", **settings)
    grown = fxgrow.apply(profile.gm, fxgrow.plan(profile, neurons={"a": 2}, update_existing=False))
    assert (grown.a.out_channels, grown.b.out_channels, grown.d.in_channels) == (5, 5, 5)
    assert profile["a"].singular_values[0] > 0


@pytest.mark.parametrize("name", CASES)
def test_equal_to_naive(name: str) -> None:
    case = CASES[name]()
    expected = naive(case)
    k = min(3, len(expected.values))
    profile = fxgrow.profile(
        case.model, case.batches, None if "loss" not in name else case.loss, method="tiny", positions="all",
        widths=[case.width], units=k, progress=False,
    )  # fmt: skip
    found = profile[case.width]
    assert close(found.bottleneck, expected.psi)
    assert close(found.desired, expected.desired)
    values = torch.tensor(found.singular_values, dtype=torch.float64)
    assert close(values[:k], expected.values[:k])
    assert len(values) == len(expected.values) and close(values, expected.values, 1e-7)

    for update in (False, True):
        plan = fxgrow.plan(profile, neurons={case.width: k}, update_existing=update)
        grown = fxgrow.apply(profile.gm, plan)
        alpha = rows_of(case, grown, k)
        for consumer, product in expected.product(k).items():
            omega = columns_of(case, grown, consumer, k)
            assert close(torch.einsum("pk,kto->pto", alpha, omega), product), consumer
        for consumer in case.consumers:
            old, new = case.model.get_submodule(consumer), grown.get_submodule(consumer)
            kept = new.weight[tuple(map(slice, old.weight.shape))] if old.weight.dim() == 4 else None
            if kept is None:
                kept = new.weight[: old.weight.shape[0], : old.weight.shape[1]]
            move = (kept - old.weight).flatten(1)
            if old.bias is not None:
                move = torch.cat([move, (new.bias[: len(old.bias)] - old.bias)[:, None]], 1)
            wanted = expected.updates[consumer]
            assert close(move, wanted) if update else not move.any()
