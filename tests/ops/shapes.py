"""Rows of operators that move data: views, permutations, joins, splits, indexing."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.ops.table import F8, Case, Net, T, nothing

# -- views and permutations --------------------------------------------------------------------------------------------

_HEAD: Callable[[], dict[str, Any]] = lambda: {"p": nn.AdaptiveAvgPool2d(2), "out": nn.Linear(32, 3)}  # noqa: E731
for _name, _flatten in {
    "flatten": lambda x: torch.flatten(x, 1),
    "flatten-method": lambda x: x.flatten(start_dim=1),
    "view-minus-one": lambda x: x.view(x.size(0), -1),
    "reshape-minus-one": lambda x: x.reshape(x.shape[0], -1),
    "view-literal": lambda x: x.view(-1, 32),
    "view-literal-product": lambda x: x.view(x.size(0), 8 * 2 * 2),
    "view-tuple": lambda x: x.view((-1, 32)),
    "reshape-function": lambda x: torch.reshape(x, (-1, 32)),
    "reshape-keyword": lambda x: torch.reshape(x, shape=(-1, 32)),
    "view-shape-product": lambda x: x.view(x.shape[0], x.shape[1] * x.shape[2] * x.shape[3]),
    "view-prod": lambda x: x.view(-1, math.prod(x.shape[1:])),
    "view-numel": lambda x: x.view(x.shape[0], x[0].numel()),
    "view-two-steps": lambda x: x.view(-1, 8, 4).view(-1, 32),
    "view-sum": lambda x: x.view(x.size(0), x.size(1) * 3 + x.size(1)),
    "flatten-module": nn.Flatten(),
}.items():
    T.image(
        f"conv-to-linear-{_name}", _HEAD, lambda m, x, f=_flatten: m.out(f(m.p(m.a(x)).relu())),
        a=F8,
    )  # fmt: skip


def _unpacked(x: Tensor) -> Tensor:
    b, c, h, w = x.shape
    return x.view(b, c * h * w)


def _tokens_of(x: Tensor) -> Tensor:
    b, c, h, w = x.shape
    return x.reshape(b, c, h * w).permute(0, 2, 1)


def _shuffle(x: Tensor, groups: int) -> Tensor:
    b, c, h, w = x.shape
    return x.view(b, groups, c // groups, h, w).transpose(1, 2).contiguous().view(b, c, h, w)


T.image("conv-to-linear-unpacked", _HEAD, lambda m, x: m.out(_unpacked(m.p(m.a(x)))), a=F8)
T.image("to-tokens", lambda: {"out": nn.Linear(8, 3)}, lambda m, x: m.out(_tokens_of(m.a(x))), a=F8)
T.image("to-tokens-flatten", lambda: {"out": nn.Linear(8, 3)}, lambda m, x: m.out(m.a(x).flatten(2).mT), a=F8)
T.image(
    "channels-last",
    lambda: {"b": nn.Linear(8, 8)},
    lambda m, x: m.out(m.b(m.a(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)),
    a=F8,
    b=F8,
)
T.image("permute-keyword", nothing, lambda m, x: m.out(m.a(x).permute(dims=(0, 1, 3, 2))), a=F8)
T.image("movedim", lambda: {"out": nn.Linear(8, 3)}, lambda m, x: m.out(m.a(x).movedim(1, -1)), a=F8)
T.image("transpose-twice", nothing, lambda m, x: m.out(m.a(x).transpose(1, 3).transpose(dim0=1, dim1=3)), a=F8)
T.image("channel-shuffle", nothing, lambda m, x: m.out(_shuffle(m.a(x), 2)), a=(8, 2))
T.image("view-as", nothing, lambda m, x: m.out((h := m.a(x)).flatten(1).view_as(h.relu())), a=F8)
T.vector("view-of-other-shape", nothing, lambda m, x: m.out(m.a(x)[:, None].view(m.a(x).shape)), a=F8)
T.vector(
    "squeeze-unsqueeze", nothing, lambda m, x: m.out(m.a(x).unsqueeze(1).unsqueeze(-1).squeeze(-1).squeeze(1)), a=F8
)
T.image(
    "squeeze-pooled",
    lambda: {"out": nn.Linear(8, 3)},
    lambda m, x: m.out(F.adaptive_avg_pool2d(m.a(x), 1).squeeze(-1).squeeze(-1)),
    a=F8,
)
T.vector("none-index", nothing, lambda m, x: m.out(m.a(x)[:, None, :][:, 0]), a=F8)
T.vector(
    "expanded-and-flattened",
    lambda: {"out": nn.Linear(16, 3)},
    lambda m, x: m.out(m.a(x)[:, :, None].expand(-1, 8, 2).flatten(1)),
    a=F8,
)
T.vector("expand", nothing, lambda m, x: m.out(m.a(x)[:, None].expand(-1, 4, -1)).sum(1), a=F8)
T.vector("expand-literal", nothing, lambda m, x: m.out(m.a(x)[:, None].expand(-1, 4, 8)), a=F8)
T.vector(
    "expand-one-to-a-width",
    lambda: {"b": nn.Linear(6, 1)},
    lambda m, x: m.out((h := m.a(x)) * m.b(x).expand(-1, h.size(1))),
    a=F8,
    b="size",
)
T.vector(
    "expand-one-to-a-literal",
    lambda: {"b": nn.Linear(6, 1)},
    lambda m, x: m.out(m.a(x) * m.b(x).expand(-1, 8)),
    a=F8,
    b="size",
)
T.image(
    "expand-as",
    lambda: {"b": nn.Conv2d(3, 8, 1)},
    lambda m, x: m.out((h := m.a(x)) + m.b(x).mean((2, 3), True).expand_as(h)),
    a=F8,
)
T.image("broadcast-to", nothing, lambda m, x: m.out(F.adaptive_avg_pool2d(h := m.a(x), 1).broadcast_to(h.shape)), a=F8)
T.tokens(
    "heads",
    nothing,
    lambda m, x: m.out((h := m.a(x)).view(h.size(0), h.size(1), 2, 4).transpose(1, 2).transpose(1, 2).flatten(2)),
    a=(8, 2),
)
T.tokens("unflatten", nothing, lambda m, x: m.out(m.a(x).unflatten(-1, (2, -1)).flatten(-2)), a=(8, 2))
T.vector(
    "two-widths-flattened",
    lambda: {"b": nn.Linear(6, 2), "out": nn.Linear(16, 3)},
    lambda m, x: m.out((m.a(x)[:, :, None] * m.b(x)[:, None]).flatten(1)),
    a="size",
    b="size",
)
T.vector("view-of-half", nothing, lambda m, x: m.out((h := m.a(x)).view(-1, 2, h.size(1) // 2).flatten(1)), a=(8, 2))
T.vector("view-rounded-half", nothing, lambda m, x: m.out((h := m.a(x)).view(-1, h.size(1) // 2 * 2)), a=F8)
T.vector("view-of-minimum", nothing, lambda m, x: m.out((h := m.a(x)).view(-1, min(h.size(1), 8))), a=F8)
T.vector("view-of-maximum", nothing, lambda m, x: m.out((h := m.a(x)).view(-1, 8 + h.size(1) % 8)), a=F8)
T.vector(
    "view-as-dtype",
    lambda: {"out": nn.Linear(16, 3).half()},
    lambda m, x: m.out(m.a(x.float()).view(torch.float16)),
    a="operator",
)
T.vector("repeat", lambda: {"out": nn.Linear(16, 3)}, lambda m, x: m.out(m.a(x).repeat(1, 2)), a=F8)
T.vector("repeat-rows", nothing, lambda m, x: m.out(m.a(x).repeat(2, 1)), a=F8)
T.vector(
    "repeat-interleave",
    lambda: {"out": nn.Linear(16, 3)},
    lambda m, x: m.out(m.a(x).repeat_interleave(2, 1)),
    a=F8,
)
T.vector("one-sample-at-a-time", nothing, lambda m, x: m.out(torch.stack([m.a(x[0]), m.a(x[1])])), a=F8)

# -- joining and splitting ---------------------------------------------------------------------------------------------

_TWO: Callable[[], dict[str, Any]] = lambda: {"b": nn.Linear(6, 4), "out": nn.Linear(12, 3)}  # noqa: E731
T.vector("cat", _TWO, lambda m, x: m.out(torch.cat([m.a(x), m.b(x)], 1)), a=F8, b=(4, 1))
T.vector("cat-keyword", _TWO, lambda m, x: m.out(torch.cat([m.a(x), m.b(x)], dim=-1)), a=F8, b=(4, 1))
T.vector(
    "concat-with-input", lambda: {"out": nn.Linear(14, 3)}, lambda m, x: m.out(torch.concat((m.a(x), x), -1)), a=F8
)
T.vector(
    "cat-with-itself",
    lambda: {"out": nn.Linear(16, 3)},
    lambda m, x: m.out(torch.cat([h := m.a(x), h.relu()], 1)),
    a=F8,
)
T.image(
    "dense-block",
    lambda: {"n": nn.BatchNorm2d(11), "b": nn.Conv2d(11, 4, 3, padding=1), "out": nn.Conv2d(15, 3, 1)},
    lambda m, x: m.out(torch.cat([h := torch.cat([x, m.a(x)], 1), m.b(m.n(h))], 1)),
    a=F8, b=(4, 1),
)  # fmt: skip
T.vector("cat-of-samples", nothing, lambda m, x: m.out(torch.cat([m.a(x), m.a(x * 2)], 0)), a=F8)
T.vector("stack", lambda: {"b": nn.Linear(6, 8)}, lambda m, x: m.out(torch.stack([m.a(x), m.b(x)], 1)), a=F8)
T.vector(
    "stack-last",
    lambda: {"b": nn.Linear(6, 8), "out": nn.Linear(16, 3)},
    lambda m, x: m.out(torch.stack([m.a(x), m.b(x)], -1).flatten(1)),
    a=F8,
)
T.vector(
    "chunk",
    lambda: {"out": nn.Linear(4, 3)},
    lambda m, x: m.out((h := m.a(x).chunk(2, 1))[0] * h[1].sigmoid()),
    a=(8, 2),
)
T.vector(
    "chunk-fewer-than-asked", lambda: {"out": nn.Linear(2, 3)}, lambda m, x: m.out(m.a(x).chunk(5, 1)[3]), a="size"
)
T.vector("split-equal", lambda: {"out": nn.Linear(4, 3)}, lambda m, x: m.out(sum(m.a(x).split(4, 1))), a=(8, 2))
T.vector(
    "split-size",
    lambda: {"out": nn.Linear(4, 3)},
    lambda m, x: m.out(sum((h := m.a(x)).split(h.size(1) // 2, dim=1))),
    a=(8, 2),
)
T.vector(
    "split-list",
    lambda: {"out": nn.Linear(4, 3)},
    lambda m, x: m.out(sum(torch.split(m.a(x), [4, 4], dim=1))),
    a=(8, 2),
)
T.rows.append(
    Case(
        "split-unequal",
        lambda: Net(
            lambda m, x: m.out(torch.cat([(h := torch.split(m.a(x), [3, 5], 1))[1].relu(), h[0].tanh()], 1)),
            {"a": nn.Linear(6, 8), "out": nn.Linear(8, 3)},
        ),
        lambda n: (torch.randn(n, 6),),
        {"a[0]": (3, 1), "a[1]": (5, 1), "out": "output"},
    )
)
T.vector("split-remainder", nothing, lambda m, x: m.out(torch.cat(m.a(x).split(3, 1), 1)), a="size")
T.vector(
    "glu-by-slices",
    lambda: {"out": nn.Linear(4, 3)},
    lambda m, x: m.out((h := m.a(x))[:, : h.shape[1] // 2] * h[:, h.shape[1] // 2 :].sigmoid()),
    a=(8, 2),
)
T.vector(
    "glu-by-slices-of-a-number",
    lambda: {"out": nn.Linear(4, 3)},
    lambda m, x: m.out((h := m.a(x))[:, :4] * h[:, 4:].sigmoid()),
    a=(8, 2),
)
T.vector(
    "glu-in-turn",
    lambda: {"out": nn.Linear(4, 3)},
    lambda m, x: m.out((h := m.a(x))[:, ::2] * h[..., 1::2].sigmoid()),
    a=(8, 2),
)
T.vector("every-third", lambda: {"out": nn.Linear(3, 3)}, lambda m, x: m.out(m.a(x)[:, ::3]), a="size")
T.vector(
    "all-but-some", lambda: {"out": nn.Linear(6, 3)}, lambda m, x: m.out((h := m.a(x))[:, : h.shape[1] - 2]), a="size"
)
T.vector("glu", lambda: {"out": nn.Linear(4, 3)}, lambda m, x: m.out(F.glu(m.a(x))), a=(8, 2))
T.image("glu-module", lambda: {"g": nn.GLU(1), "out": nn.Conv2d(4, 3, 1)}, lambda m, x: m.out(m.g(m.a(x))), a=(8, 2))
T.vector("unbind", nothing, lambda m, x: m.out(torch.stack(m.a(x).unbind(1), 1)), a="size")
T.vector("tensor-split", lambda: {"out": nn.Linear(4, 3)}, lambda m, x: m.out(m.a(x).tensor_split(2, 1)[0]), a=(8, 2))
T.tokens("first-token", nothing, lambda m, x: m.out(m.a(x)[:, 0]), a=F8)
T.tokens("select-token", nothing, lambda m, x: m.out(m.a(x).select(1, 2) + m.a(x).narrow(1, 0, 1).squeeze(1)), a=F8)
T.vector("slice", lambda: {"out": nn.Linear(4, 3)}, lambda m, x: m.out(m.a(x)[:, :4]), a="size")
T.vector("slice-everything", nothing, lambda m, x: m.out(m.a(x)[:, :][..., 0:]), a=F8)
T.vector("slice-to-literal-end", nothing, lambda m, x: m.out(m.a(x)[:, :8]), a=F8)
T.vector("slice-from-negative", nothing, lambda m, x: m.out(m.a(x)[:, -8:]), a=F8)
T.vector("slice-beyond-the-end", nothing, lambda m, x: m.out(m.a(x)[:, :100]), a="size")
T.vector("slice-by-size", nothing, lambda m, x: m.out((h := m.a(x))[:, h.size(1) - 8 :]), a="size")
T.vector(
    "slice-of-input-by-size",
    lambda: {"a": nn.Linear(6, 6), "out": nn.Linear(6, 3)},
    lambda m, x: m.out(m.a(x).amax(1, True) + x[:, : m.a(x).size(1)]),
    a="reduce",
    out="output",
)
T.vector("pick", lambda: {"out": nn.Linear(1, 3)}, lambda m, x: m.out(m.a(x)[:, 2:3] + m.a(x)[:, -1:]), a="size")
T.vector("index-list", lambda: {"out": nn.Linear(2, 3)}, lambda m, x: m.out(m.a(x)[:, [0, 3]]), a="size")
T.vector("index-buffer", lambda: {"i": torch.randperm(8)}, lambda m, x: m.out(m.a(x)[:, m.i]), a="size")
T.tokens("index-tokens", lambda: {"i": torch.tensor([2, 0])}, lambda m, x: m.out(m.a(x)[:, m.i]), a=F8)
T.vector(
    "index-by-width", lambda: {"t": torch.randn(6, 2)}, lambda m, x: m.out(m.t.to(x)[(m.a(x) > 0).long()].sum(-1)), a=F8
)
T.vector("boolean-mask", nothing, lambda m, x: m.out(torch.where(m.a(x) > 0, x[0, 0], 0.0)), a=F8)
T.vector("index-select", nothing, lambda m, x: m.out(m.a(x).index_select(1, torch.arange(8))), a="operator")
T.vector("gather", nothing, lambda m, x: m.out((h := m.a(x)).gather(1, h.argsort(0) * 0)), a="operator")
T.vector(
    "assign-part",
    nothing,
    lambda m, x: m.out(_assign_part(m.a(x) * 1.0)),
    a=None,
    **{"a[0]": (7, 1), "a[1]": "size"},
)
T.vector("assign-sample", nothing, lambda m, x: m.out(_assign_sample(m.a(x) * 1.0)), a=F8)
T.vector("assign-width", lambda: {"b": nn.Linear(6, 8)}, lambda m, x: m.out(_assign_all(m.a(x) * 1.0, m.b(x))), a=F8)


T.vector("assign-where", nothing, lambda m, x: m.out(_assign_where(m.a(x) * 1.0)), a=F8)
T.vector("assign-at", nothing, lambda m, x: m.out(_assign_at(m.a(x) * 1.0)), a=F8)


def _assign_where(h: Tensor) -> Tensor:
    h[h < 0] = 0.1
    return h


def _assign_at(h: Tensor) -> Tensor:
    h[torch.tensor([0])] = 0.1
    return h


def _assign_part(h: Tensor) -> Tensor:
    h[:, -1] = 0.0
    return h


def _assign_sample(h: Tensor) -> Tensor:
    h[0] = 0.0
    return h


def _assign_all(h: Tensor, value: Tensor) -> Tensor:
    h[:] = value
    return h


# -- pieces of units ---------------------------------------------------------------------------------------------------

for _name, _pieces in {
    "last": lambda h: h.view(-1, 4, 2).max(-1)[0],
    "first": lambda h: h.view(h.size(0), 2, 4).amax(1),
    "last-values": lambda h: h.reshape(len(h), 4, 2).max(dim=-1).values,
    "unflattened": lambda h: h.unflatten(1, (4, 2)).amin(2),
    "last-mean": lambda h: h.view(-1, 4, 2).mean(2),
    "after-an-activation": lambda h: torch.sum(h.view(*h.shape[:-1], 4, 2).abs().sqrt(), -1),
    "counted": lambda h: h.view(h.size(0), 4, -1).logsumexp(-1),
    "normalised": lambda h: h.view(-1, 4, 2).softmax(-1)[..., 0],
}.items():
    T.vector(f"pieces-{_name}", lambda: {"out": nn.Linear(4, 3)}, lambda m, x, f=_pieces: m.out(f(m.a(x))), a=(8, 2))
T.image(
    "pieces-of-channels",
    lambda: {"out": nn.Conv2d(4, 3, 1)},
    lambda m, x: m.out((h := m.a(x)).view(h.size(0), 4, 2, h.size(2), h.size(3)).max(2)[0]),
    a=(8, 2),
)

# -- parts that are read, or written, by themselves --------------------------------------------------------------------

_HALF: Callable[[], dict[str, Any]] = lambda: {"out": nn.Linear(4, 3)}  # noqa: E731
T.vector(
    "halves-by-narrow", _HALF, lambda m, x: m.out((h := m.a(x)).narrow(1, 0, 4).tanh() * h.narrow(-1, 4, 4)), a=(8, 2)
)
T.vector(
    "halves-by-narrow-keywords",
    _HALF,
    lambda m, x: m.out((h := m.a(x)).narrow(dim=1, start=-4, length=4) * torch.narrow(h, 1, 0, 4)),
    a=(8, 2),
)
T.vector(
    "halves-from-the-end",
    _HALF,
    lambda m, x: m.out((h := m.a(x))[..., :-4] * h[..., -4:].sigmoid()),
    a=(8, 2),
)


def _parts_of_three(h: Tensor) -> Tensor:
    n = h.shape[-1] // 3
    q, k, v = h[..., :n], h[..., n : 2 * n], h[..., 2 * n :]
    return (q @ k.mT).softmax(-1) @ v


def _density_and_features(h: Tensor) -> Tensor:
    return h[..., 1:].tanh() * h[..., 0].unsqueeze(-1)


def _density_last(h: Tensor) -> Tensor:
    return h[..., :-1].tanh() * h[..., -1:].sigmoid()


def _swapped(h: Tensor) -> Tensor:
    return torch.cat([h[:, 3:], h[:, :3]], 1)


T.rows += [
    Case(
        f"slices-{name}",
        lambda parts=parts, forward=forward: Net(lambda m, x: m.out(forward(m.a(x))), parts()),
        lambda n: (torch.randn(n, 5, 6),),
        {**expected, "out": "output"},
    )
    for name, parts, forward, expected in (
        (
            "of-three-parts",
            lambda: {"a": nn.Linear(6, 12), "out": nn.Linear(4, 3)},
            _parts_of_three,
            {"a[0]": (8, 2), "a[1]": (4, 1)},
        ),
        (
            "one-and-the-rest",
            lambda: {"a": nn.Linear(6, 9), "out": nn.Linear(8, 3)},
            _density_and_features,
            {"a[0]": "size", "a[1]": (8, 1)},
        ),
        (
            "the-rest-and-one",
            lambda: {"a": nn.Linear(6, 9), "out": nn.Linear(8, 3)},
            _density_last,
            {"a[0]": (8, 1), "a[1]": "broadcast"},
        ),
    )
]
T.rows.append(
    Case(
        "slices-joined-again",
        lambda: Net(lambda m, x: m.out(_swapped(m.a(x))), {"a": nn.Linear(6, 8), "out": nn.Linear(8, 3)}),
        lambda n: (torch.randn(n, 6),),
        {"a[0]": (3, 1), "a[1]": (5, 1), "out": "output"},
    )
)
T.vector(
    "a-part-beside-the-whole",
    nothing,
    lambda m, x: m.out((h := m.a(x)) + h[:, 2:3].tanh()),
    a=None,
    **{"a[0]": (2, 1), "a[1]": "broadcast", "a[2]": (5, 1)},
)
T.vector(
    "tensor-split-at",
    lambda: {"b": nn.Linear(3, 3), "out": nn.Linear(5, 3)},
    lambda m, x: m.out((h := torch.tensor_split(m.a(x), (3,), 1))[1]) * m.b(h[0].tanh()),
    a=None,
    **{"a[0]": (3, 1), "a[1]": (5, 1)},
)
T.tokens(
    "gathered-by-repeated-index",
    nothing,
    lambda m, x: m.out((h := m.a(x)).gather(1, torch.arange(3).view(1, -1, 1).repeat(len(h), 1, h.size(-1)))),
    a=F8,
)
T.tokens(
    "gathered-by-literally-repeated-index",
    nothing,
    lambda m, x: m.out(m.a(x).gather(1, torch.arange(3)[:, None].repeat(len(x), 1, 8))),
    a=F8,
)
T.vector(
    "slices-at-a-size-of-the-input",
    nothing,
    lambda m, x: m.out((h := m.a(x)) + torch.cat([h[:, : x.size(1)].tanh(), h[:, x.size(1) :]], 1)),
    a=None,
    **{"a[0]": "size", "a[1]": "size"},
)
T.vector("slices-that-overlap", _HALF, lambda m, x: m.out((h := m.a(x))[:, :4] * h[:, 2:6]), a="size")


def _filled_in_parts(a: Tensor, b: Tensor) -> Tensor:
    out = torch.empty(len(a), 12, dtype=a.dtype)
    out[:, :8], out[:, 8:] = a, b
    return out


T.vector("written-in-parts", _TWO, lambda m, x: m.out(_filled_in_parts(m.a(x), m.b(x))), a=F8, b=(4, 1))


# -- tensors of literal sizes ------------------------------------------------------------------------------------------

for _name, _start in {
    "zeros": lambda x: torch.zeros(x.size(0), 8, dtype=x.dtype),
    "zeros-tuple": lambda x: torch.zeros((x.size(0), 8)).to(x),
    "zeros-size": lambda x: torch.zeros(size=(len(x), 8)).to(x),
    "full": lambda x: torch.full((x.shape[0], 8), 0.5).to(x),
    "new-zeros": lambda x: x.new_zeros(x.shape[0], 8),
    "new-full": lambda x: x.new_full((x.shape[0], 8), 0.5),
    "zeros-of-a-sum": lambda x: x.new_zeros(x.shape[:1] + (8,)),
    "ones-expanded": lambda x: torch.ones(1, 1).to(x).expand(x.shape[0], 8),
}.items():
    T.vector(f"starts-with-{_name}", nothing, lambda m, x, f=_start: m.out(f(x) + m.a(x)), a=F8)


def _step_by_step(h: Tensor) -> Tensor:
    out = h.new_empty(h.size(0), h.size(1), 8)
    for t in range(h.size(1)):
        out[:, t] = h[:, t] if t == 0 else h[:, t] + out[:, t - 1]
    return out


T.tokens("filled-step-by-step", nothing, lambda m, x: m.out(_step_by_step(m.a(x))), a=F8)

# -- entries picked and put by tensors ---------------------------------------------------------------------------------


def _put(x: Tensor, h: Tensor) -> Tensor:
    mask = x[:, 0] > 0
    out = h.new_zeros(len(h), 8)
    out[mask] = h[mask].tanh()
    return out


def _added_at(h: Tensor) -> Tensor:
    out = torch.zeros(3, 8, dtype=h.dtype)
    return out.index_put((torch.arange(len(h)) % 3,), h, accumulate=True)


def _edges(h: Tensor) -> Tensor:
    return torch.arange(len(h)) // 2


def _set_in_turn(h: Tensor) -> Tensor:
    out = torch.zeros_like(h)
    out[torch.arange(len(h)).flip(0)] = h
    out[_edges(h)] += h.tanh()
    return out


for _name, _pick in {
    "list": lambda h: h[:, [-1]].squeeze(1),
    "lists": lambda h: h[:, [0, 2]].sum(1),
    "rows-and-tokens": lambda h: h[torch.arange(h.size(0)), torch.arange(h.size(0)) % 2],
    "rows-and-token": lambda h: h[torch.arange(h.size(0)).flip(0), -1],
    "apart": lambda h: h[torch.arange(h.size(0))[:, None], None, torch.tensor([[0, 1]])].sum((1, 2)),
}.items():
    T.tokens(f"picked-by-{_name}", nothing, lambda m, x, f=_pick: m.out(f(m.a(x))), a=F8)
T.vector(
    "picked-where", nothing,
    lambda m, x: m.out(
        (h := m.a(x)).new_zeros(h.shape).index_add(
            0, i := torch.where(x[:, 0] > 0)[0], h[None, i].reshape(-1, h.size(1))
        )
    ),
    a=F8,
)  # fmt: skip
T.vector("put-under-a-mask", nothing, lambda m, x: m.out(_put(x, m.a(x))), a=F8)
T.vector("put-by-index", nothing, lambda m, x: m.out(_set_in_turn(m.a(x))), a=F8)
T.vector("index-put", nothing, lambda m, x: m.out(_added_at(m.a(x))), a=F8)
for _name, _sum in {
    "index_add_": lambda h: torch.zeros(len(h), 8, dtype=h.dtype).index_add_(0, _edges(h), h),
    "index_add": lambda h: h.new_zeros(h.shape).index_add(0, _edges(h), h, alpha=0.5),
    "index_copy_": lambda h: torch.zeros_like(h).index_copy_(0, _edges(h), h),
    "index_reduce": lambda h: h.new_ones(len(h), 8).index_reduce(0, _edges(h), h, "mean"),
    "index_fill": lambda h: h.index_fill(0, _edges(h)[:1], 0.5),
    "scatter_add_": lambda h: h.new_zeros(len(h), 8).scatter_add_(0, _edges(h)[:, None].expand_as(h), h),
    "scatter_add-literal": lambda h: h.new_zeros(len(h), 8).scatter_add(0, _edges(h)[:, None].expand(-1, 8), h),
    "scatter_reduce_": lambda h: h.new_zeros(h.shape).scatter_reduce_(
        0, _edges(h).view(-1, 1).expand_as(h), h, "amax", include_self=False
    ),
    "scatter_": lambda h: h.clone().scatter_(0, _edges(h)[:1, None].expand(1, h.size(1)), 0.5),
}.items():
    T.vector(f"summed-by-{_name}", nothing, lambda m, x, f=_sum: m.out(f(m.a(x))), a=F8)
T.vector(
    "scatter-into-units", nothing, lambda m, x: m.out(m.a(x).scatter(1, torch.zeros(len(x), 1).long(), 0.5)), a="size"
)
