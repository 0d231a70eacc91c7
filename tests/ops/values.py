"""Rows of operators that change values: elementwise, gating, pooling, reductions, contractions."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.ops.table import F8, T, nothing


class Opaque(torch.autograd.Function):
    """An operator nobody described."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x + x.roll(1, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad + grad.roll(-1, 1)


# -- elementwise -------------------------------------------------------------------------------------------------------

for _name in (
    "ReLU ReLU6 ELU CELU SELU GELU SiLU Mish Sigmoid Tanh Hardtanh Hardswish Hardsigmoid LeakyReLU LogSigmoid Softplus "
    "Softsign Tanhshrink Softshrink Hardshrink Identity"
).split():
    T.vector(
        f"module-{_name.lower()}",
        lambda name=_name: {"f": getattr(nn, name)()},
        lambda m, x: m.out(m.f(m.a(x))),
        a=F8,
    )
for _name in (
    "relu relu6 elu celu selu gelu silu mish sigmoid tanh hardtanh hardswish hardsigmoid leaky_relu logsigmoid softplus"
).split():
    T.vector(f"functional-{_name}", nothing, lambda m, x, f=_name: m.out(getattr(F, f)(m.a(x))), a=F8)
for (
    _name
) in "relu sigmoid tanh exp abs neg sin square erf expm1 atan relu_ sigmoid_ tanh_ abs_ neg_ mul_ clamp_".split():
    _args = {"mul_": (2,), "clamp_": (-1, 1)}.get(_name, ())
    T.vector(f"method-{_name}", nothing, lambda m, x, n=_name, a=_args: m.out(getattr(m.a(x) * 1.0, n)(*a)), a=F8)
T.vector("inplace-module", lambda: {"f": nn.ReLU(inplace=True)}, lambda m, x: m.out(m.f(m.a(x))), a=F8)
T.vector("inplace-functional", nothing, lambda m, x: m.out(F.relu(m.a(x), inplace=True)), a=F8)
T.vector("keyword-input", nothing, lambda m, x: m.out(F.relu(input=torch.tanh(input=m.a(x)))), a=F8)
T.vector("operators", nothing, lambda m, x: m.out((-m.a(x) * 2 + 1) / 3 - 0.5), a=F8)
T.vector("power", nothing, lambda m, x: m.out(m.a(x) ** 2 + 2 ** m.a(x).tanh() + m.a(x).pow(3)), a=F8)
T.vector("inplace-operators", nothing, lambda m, x: m.out(operator.imul(operator.iadd(m.a(x), 1), 2)), a=F8)
T.vector("dropout", lambda: {"f": nn.Dropout(0.0)}, lambda m, x: m.out(m.f(m.a(x))), a=F8)
T.vector("functional-dropout", nothing, lambda m, x: m.out(F.dropout(m.a(x), 0.0, m.training, False)), a=F8)
T.image("dropout2d", lambda: {"f": nn.Dropout2d(0.0)}, lambda m, x: m.out(F.dropout2d(m.f(m.a(x)), p=0.0)), a=F8)
T.image("prelu", lambda: {"f": nn.PReLU(8)}, lambda m, x: m.out(m.f(m.a(x))), a=F8)
T.image("prelu-shared", lambda: {"f": nn.PReLU()}, lambda m, x: m.out(m.f(m.a(x))), a=F8)
T.image("functional-prelu", lambda: {"f": nn.PReLU(8)}, lambda m, x: m.out(F.prelu(m.a(x), m.f.weight)), a=F8)
T.vector("where", nothing, lambda m, x: m.out(torch.where(m.a(x) > 0, m.a(x), m.a(x) * 0.1)), a=F8)
T.vector("masked-fill", nothing, lambda m, x: m.out((h := m.a(x)).masked_fill(h < 0, 0.5)), a=F8)
T.vector("max-of-two", lambda: {"b": nn.Linear(6, 8)}, lambda m, x: m.out(torch.max(m.a(x), m.b(x))), a=F8)
T.vector("minimum", lambda: {"b": nn.Linear(6, 8)}, lambda m, x: m.out(torch.minimum(m.a(x), m.b(x))), a=F8)
T.vector("clamp-by-tensor", nothing, lambda m, x: m.out(torch.clamp((h := m.a(x)), min=h.sin(), max=h.exp())), a=F8)
T.vector("lerp", lambda: {"b": nn.Linear(6, 8)}, lambda m, x: m.out(torch.lerp(m.a(x), m.b(x), 0.3)), a=F8)
T.vector("addcmul", lambda: {"b": nn.Linear(6, 8)}, lambda m, x: m.out(torch.addcmul(m.a(x), m.b(x), m.a(x))), a=F8)
T.vector("constant-tensor", lambda: {"c": torch.rand(8)}, lambda m, x: m.out(m.a(x) * m.c + m.c), a=F8)
T.vector("tensor-in-code", nothing, lambda m, x: m.out(m.a(x) + torch.arange(8.0).to(x)), a="size")
T.vector("scalar-parameter", lambda: {"s": nn.Parameter(torch.tensor(2.0))}, lambda m, x: m.out(m.a(x) * m.s), a=F8)
T.vector("one-parameter", lambda: {"s": nn.Parameter(torch.ones(1))}, lambda m, x: m.out(m.a(x) * m.s), a=F8)
T.image("layer-scale", lambda: {"s": nn.Parameter(torch.full((8, 1, 1), 0.1))}, lambda m, x: m.out(m.a(x) * m.s), a=F8)
T.vector("clone-and-cast", nothing, lambda m, x: m.out(m.a(x).float().clone().contiguous().to(x.dtype)), a=F8)
T.vector("zeros-like", nothing, lambda m, x: m.out(m.a(x) + torch.zeros_like(m.a(x))), a=F8)
T.vector(
    "out-argument",
    nothing,
    lambda m, x: m.out(torch.mul((h := m.a(x).detach()), 2, out=torch.empty_like(h))),
    a="operator",
)
T.vector("sum-of-size", nothing, lambda m, x: m.out((h := m.a(x)) + h.size(1)), a="size")
T.vector("scaled-by-root-of-size", nothing, lambda m, x: m.out((h := m.a(x)) / math.sqrt(h.size(1))), a=F8)
T.vector("times-tensor-of-size", nothing, lambda m, x: m.out((h := m.a(x)) * torch.full((1,), h.size(1))), a="size")
T.vector(
    "times-mean-of-arange", nothing, lambda m, x: m.out((h := m.a(x)) * torch.arange(h.size(1)).sum()), a="operator"
)
T.vector(
    "one-unit",
    lambda: {"a": nn.Linear(6, 1), "b": nn.Linear(6, 8)},
    lambda m, x: m.out(m.b(x) * m.a(x)),
    a="broadcast",
    b=F8,
)
T.vector(
    "input-added", lambda: {"a": nn.Linear(6, 6), "out": nn.Linear(6, 3)}, lambda m, x: m.out(m.a(x) + x), a="input"
)
T.vector("unknown-function", nothing, lambda m, x: m.out(Opaque.apply(m.a(x))), a="operator")
T.vector(
    "inplace-on-view",
    nothing,
    lambda m, x: m.out(_inplace_on_view(m.a(x) * 1.0)),
    a=None,
    **{"a[0]": (4, 1), "a[1]": (4, 1)},
)
T.vector("inplace-on-chunk", nothing, lambda m, x: m.out(_inplace_on_chunk(m.a(x).detach() * 1.0)), a=(8, 2))


def _inplace_on_view(h: Tensor) -> Tensor:
    h[:, 4:].mul_(2)
    return h


def _inplace_on_chunk(h: Tensor) -> Tensor:
    left, right = h.chunk(2, 1)
    left.mul_(2).add_(right)
    return h


# -- residual and gating -----------------------------------------------------------------------------------------------

T.vector(
    "residual", lambda: {"b": nn.Linear(8, 5), "c": nn.Linear(5, 8)},
    lambda m, x: m.out((h := m.a(x)) + m.c(m.b(h).relu())), a=F8, b=(5, 1),
)  # fmt: skip
T.image(
    "residual-strided",
    lambda: {"b": nn.Conv2d(8, 5, 3, 2, 1), "c": nn.Conv2d(5, 8, 1), "d": nn.Conv2d(8, 8, 1, 2)},
    lambda m, x: m.out(m.c(m.b(h := m.a(x))) + m.d(h)),
    a=F8, b=(5, 1), c=F8,
)  # fmt: skip
T.image(
    "squeeze-excite",
    lambda: {"s": nn.Conv2d(8, 2, 1), "e": nn.Conv2d(2, 8, 1)},
    lambda m, x: m.out((h := m.a(x)) * m.e(m.s(h.mean((2, 3), keepdim=True)).relu()).sigmoid()),
    a=F8, s=(2, 1),
)  # fmt: skip
T.image(
    "squeeze-excite-linear",
    lambda: {"s": nn.Linear(8, 2), "e": nn.Linear(2, 8)},
    lambda m, x: m.out((h := m.a(x)) * m.e(m.s(h.mean((2, 3))).relu()).sigmoid()[:, :, None, None]),
    a=F8, s=(2, 1),
)  # fmt: skip
T.image(
    "spatial-attention",
    lambda: {"s": nn.Conv2d(8, 1, 1)},
    lambda m, x: m.out((h := m.a(x)) * m.s(h).sigmoid()),
    a=F8, s="broadcast",
)  # fmt: skip
T.tokens(
    "token-mixing",
    lambda: {"t": nn.Linear(5, 7), "u": nn.Linear(7, 5)},
    lambda m, x: m.out((h := m.a(x)) + m.u(m.t(h.transpose(1, 2)).relu()).transpose(1, 2)),
    a=F8, t=(7, 1), u="input",
)  # fmt: skip

# -- pooling, resizing, padding ----------------------------------------------------------------------------------------

for _name, _pool in {
    "max": lambda: nn.MaxPool2d(2),
    "avg": lambda: nn.AvgPool2d(2),
    "adaptive-avg": lambda: nn.AdaptiveAvgPool2d(2),
    "adaptive-max": lambda: nn.AdaptiveMaxPool2d((2, None)),
    "lp": lambda: nn.LPPool2d(2, 2),
    "upsample": lambda: nn.Upsample(scale_factor=2),
    "zero-pad": lambda: nn.ZeroPad2d(1),
    "reflection-pad": lambda: nn.ReflectionPad2d(1),
    "constant-pad": lambda: nn.ConstantPad2d((1, 0, 2, 1), 0.5),
    "circular-pad": lambda: nn.CircularPad2d(1),
}.items():
    T.image(f"pool-{_name}", lambda pool=_pool: {"p": pool()}, lambda m, x: m.out(m.p(m.a(x))), a=F8)
for _name, _function in {
    "max_pool2d": lambda x: F.max_pool2d(x, 3, 2, 1),
    "avg_pool2d": lambda x: F.avg_pool2d(x, 2),
    "adaptive_avg_pool2d": lambda x: F.adaptive_avg_pool2d(x, (1, 1)),
    "adaptive_max_pool2d": lambda x: F.adaptive_max_pool2d(x, 2),
    "torch.max_pool2d": lambda x: torch.max_pool2d(x, 2),
    "interpolate": lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"),
    "interpolate-size": lambda x: F.interpolate(F.avg_pool2d(x, 2), size=x.shape[-2:]),
    "pad-spatial": lambda x: F.pad(x, (1, 1, 0, 2), mode="reflect"),
    "max-indices": lambda x: F.max_pool2d(x, 2, return_indices=True)[0],
}.items():
    T.image(f"functional-{_name}", nothing, lambda m, x, f=_function: m.out(f(m.a(x))), a=F8)
T.image(
    "pad-channels",
    lambda: {"out": nn.Conv2d(10, 3, 1)},
    lambda m, x: m.out(F.pad(m.a(x), (0, 0, 0, 0, 1, 1))),
    a="size",
)
T.add(
    "pool1d", (3, 8), (3, 10), lambda: {"a": nn.Conv1d(3, 8, 3), "out": nn.Conv1d(8, 3, 1)},
    lambda m, x: m.out(F.avg_pool1d(F.max_pool1d(m.a(x), 2), 2)), a=F8,
)  # fmt: skip
T.tokens(
    "pool-over-channels", lambda: {"out": nn.Linear(4, 3)}, lambda m, x: m.out(F.avg_pool1d(m.a(x), 2)), a="reduce"
)
T.tokens("max-pool-over-channels", nothing, lambda m, x: m.out(F.max_pool1d(m.a(x), 3, 1, 1)), a="reduce")
T.tokens(
    "adaptive-over-channels",
    lambda: {"out": nn.Linear(4, 3)},
    lambda m, x: m.out(F.adaptive_avg_pool1d(m.a(x), 4)),
    a="reduce",
)
T.tokens("pool2d-of-three-dimensions", nothing, lambda m, x: m.out(F.max_pool2d(m.a(x), 3, 1, 1)), a="reduce")
T.tokens(
    "pad-module-over-channels",
    lambda: {"p": nn.ConstantPad1d(1, 0.0), "out": nn.Linear(10, 3)},
    lambda m, x: m.out(m.p(m.a(x))),
    a="size",
)
for _name, _shift in {"zeros": nn.ZeroPad2d, "reflection": nn.ReflectionPad2d}.items():
    T.tokens(
        f"pad-module-over-tokens-{_name}", lambda f=_shift: {"p": f((0, 0, 1, -1)), "norm": nn.LayerNorm(8)},
        lambda m, x: m.out(m.norm((h := m.a(x)) + m.p(h))), a=F8,
    )  # fmt: skip
T.tokens(
    "interpolate-over-channels",
    lambda: {"out": nn.Linear(16, 3)},
    lambda m, x: m.out(F.interpolate(m.a(x), scale_factor=2)),
    a="reduce",
)

# -- reductions and contractions ---------------------------------------------------------------------------------------

for _name, _reduce in {
    "mean": lambda x: x.mean((2, 3)),
    "mean-keepdim": lambda x: x.mean([-1, -2], keepdim=True).flatten(1),
    "mean-dtype": lambda x: torch.mean(x, dim=(2, 3), dtype=torch.float64).to(x.dtype),
    "sum": lambda x: x.sum(-1).sum(-1),
    "amax": lambda x: x.amax((2, 3)),
    "max-values": lambda x: x.flatten(2).max(-1).values,
    "max-pair": lambda x: torch.max(torch.max(x, 3)[0], dim=2)[0],
    "min": lambda x: x.flatten(2).min(dim=2)[0],
    "std": lambda x: x.std((2, 3)),
    "var-keepdim": lambda x: x.var(3, True, True).mean((2, 3)),
    "logsumexp": lambda x: x.logsumexp((2, 3)),
    "norm": lambda x: x.norm(2, dim=(2, 3)),
    "norm-positional": lambda x: torch.norm(x.flatten(2), 2, -1),
    "softmax-positions": lambda x: x.flatten(2).softmax(-1).amax(-1),
    "cumsum-positions": lambda x: x.flatten(2).cumsum(2)[..., -1],
    "flip-positions": lambda x: x.flip(2, 3)[..., 0, 0],
    "roll-positions": lambda x: x.roll(1, 2)[..., 0, 0],
}.items():
    T.image(
        f"reduce-{_name}", lambda: {"out": nn.Linear(8, 3)}, lambda m, x, f=_reduce: m.out(f(m.a(x))), a=F8,
    )  # fmt: skip
for _name, _over in {
    "softmax": lambda x: x.softmax(-1),
    "softmax-module": nn.Softmax(1),
    "log-softmax": lambda x: F.log_softmax(x, dim=1),
    "gumbel": lambda x: F.gumbel_softmax(x, 1) * 0 + x,
    "cumsum": lambda x: x.cumsum(1),
    "flip": lambda x: x.flip(0, 1).flip(0),
    "flip-list": lambda x: torch.flip(x, [1]),
    "roll": lambda x: x.roll(1, 1),
    "sort": lambda x: x.sort(1)[0],
    "max-subtracted": lambda x: x - x.max(1, keepdim=True)[0],
    "max-of-all": lambda x: x / x.max(),
    "topk": lambda x: x * x.topk(1, 1)[0],
}.items():
    T.vector(
        f"over-width-{_name}", lambda f=_over: {"f": f} if isinstance(f, nn.Module) else {},
        lambda m, x, f=_over: m.out(f(m.a(x))), a="operator" if _name in ("gumbel", "topk") else "reduce",
    )  # fmt: skip
T.tokens(
    "pooled-by-a-vector", lambda: {"w": nn.Parameter(torch.randn(8))},
    lambda m, x: m.out(((h := m.a(x)) * torch.softmax(h.tanh() @ m.w, 1)[..., None]).sum(1)), a=F8,
)  # fmt: skip
T.tokens(
    "pooled-by-a-sum-of-products", lambda: {"w": nn.Parameter(torch.randn(8))},
    lambda m, x: m.out(((h := m.a(x)) * torch.softmax((h.tanh() * m.w).sum(-1), 1)[..., None]).sum(1)), a=F8,
)  # fmt: skip
T.tokens(
    "cosine-similarity", lambda: {"b": nn.Linear(6, 8), "out": nn.Linear(4, 3)},
    lambda m, x: m.out(F.cosine_similarity(m.a(x), m.b(x), dim=-1)[:, :4]), a=F8,
)  # fmt: skip
T.vector("mean-of-width", lambda: {"out": nn.Linear(1, 3)}, lambda m, x: m.out(m.a(x).mean(1, True)), a="reduce")
T.tokens("gumbel-positional", nothing, lambda m, x: m.out(F.gumbel_softmax(m.a(x), 1) * 0 + m.a(x)), a="operator")
T.vector(
    "matmul-parameter",
    lambda: {"w": nn.Parameter(torch.randn(8, 5)), "out": nn.Linear(5, 3)},
    lambda m, x: m.out((m.a(x) @ m.w).tanh()),
    a=F8, w=(5, 1),
)  # fmt: skip
T.tokens(
    "scores", lambda: {"k": nn.Linear(6, 8), "v": nn.Linear(6, 8)},
    lambda m, x: m.out(torch.softmax(m.a(x) @ m.k(x).transpose(1, 2) / 3, -1) @ m.v(x)), a=F8, k=None, v=F8,
)  # fmt: skip
T.tokens(
    "baddbmm", nothing, lambda m, x: m.out(torch.baddbmm(x[..., :1], x @ x.transpose(1, 2), m.a(x), alpha=0.5)), a=F8
)
T.tokens("bmm", nothing, lambda m, x: m.out(torch.bmm(x @ x.transpose(1, 2), m.a(x))), a=F8)
T.tokens(
    "einsum",
    lambda: {"k": nn.Linear(6, 8), "v": nn.Linear(6, 8)},
    lambda m, x: m.out(torch.einsum("nqk,nkd->nqd", torch.einsum("nqd,nkd->nqk", m.a(x), m.k(x)), m.v(x))),
    a=F8,
    k=None,
    v=F8,
)
T.tokens(
    "einsum-ellipsis",
    lambda: {"k": nn.Linear(6, 8), "v": nn.Linear(6, 8)},
    lambda m, x: m.out(torch.einsum("...qk,...kd->...qd", torch.einsum("...qd,...kd", m.a(x), m.k(x)), m.v(x))),
    a=F8,
    k=None,
    v=F8,
)
T.tokens(
    "einsum-inner-ellipsis",
    lambda: {"v": nn.Linear(6, 8)},
    lambda m, x: m.out(torch.einsum("n...d,n...d->n...d", m.a(x), m.v(x))),
    a=F8,
    v=None,
)
T.tokens(
    "attention", lambda: {"k": nn.Linear(6, 8), "v": nn.Linear(6, 8)},
    lambda m, x: m.out(F.scaled_dot_product_attention(m.a(x), m.k(x), m.v(x))), a=F8, k=None, v=F8,
)  # fmt: skip
T.vector("branch-on-size", nothing, lambda m, x: m.out(h if (h := m.a(x)).size(1) < 9 else -h), a="branch")
T.vector("branch-on-this-size", nothing, lambda m, x: m.out(h if (h := m.a(x)).size(1) == 8 else -h), a="branch")
T.vector("branch-that-growth-keeps", nothing, lambda m, x: m.out(h if (h := m.a(x)).size(1) > 4 else -h), a=F8)
T.vector("branch-on-a-remainder", nothing, lambda m, x: m.out(h if (h := m.a(x)).size(1) % 4 == 0 else -h), a=(8, 4))
T.vector("branch-on-equal-sizes", nothing, lambda m, x: m.out(h if (h := m.a(x)).shape == h.relu().shape else -h), a=F8)
T.vector("size-returned", nothing, lambda m, x: (m.out(h := m.a(x)), h.size(1)), a="output")
T.vector("hidden-returned", nothing, lambda m, x: (m.out(h := m.a(x)), h), a="output")
T.vector("frozen", lambda: {"a": nn.Linear(6, 8).requires_grad_(False)}, lambda m, x: m.out(m.a(x)), a="frozen")
_TENSORS: dict[str, Callable[[Tensor], Tensor]] = {
    "root": lambda h: h / torch.sqrt(torch.tensor(h.size(-1))),
    "float": lambda h: h * torch.as_tensor(float(h.shape[1]), dtype=h.dtype).rsqrt(),
    "list": lambda h: h / torch.tensor([len(h), h.size(-1), 2.0]).to(h).sum(),
    "scalar": lambda h: h - torch.scalar_tensor(h.size(1)),
}
for _name, _scaled in _TENSORS.items():
    T.vector(f"size-as-a-tensor-{_name}", nothing, lambda m, x, f=_scaled: m.out(f(m.a(x))), a=F8)
for _name, _root in {"numel": lambda h: h.numel() ** 0.5, "product": lambda h: math.sqrt(len(h) * h.size(1))}.items():
    T.vector(f"root-of-the-{_name}", nothing, lambda m, x, f=_root: m.out((h := m.a(x)) / f(h)), a="size")
T.vector("numel-as-a-tensor", nothing, lambda m, x: m.out((h := m.a(x)) / torch.tensor(h.numel())), a="size")
T.vector("new-zeros", nothing, lambda m, x: m.out((h := m.a(x)) + h.new_zeros(h.size(0), h.size(1))), a=F8)
T.vector(
    "zeros-of-other-size",
    nothing,
    lambda m, x: m.out((h := m.a(x)) + torch.zeros(h.size(0), 2 * h.size(1) - 8)),
    a="size",
)
