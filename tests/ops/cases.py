"""The one table of operators: a row here enters an operator form into every test of widths and of the rewrite.

A row is a small network around the operator, with the widths that must be free (`name=(size, step)`) and those that
must be pinned (`name="code"`). The last layer is called `out` and is pinned as the model's output.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

Forward = Callable[..., Any]
Expected = tuple[int, int] | str


class Net(nn.Module):
    """Named parts and what is done with them."""

    def __init__(self, forward: Forward, parts: dict[str, Any]) -> None:
        super().__init__()
        self.compute = forward
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, *inputs: Any) -> Any:
        return self.compute(self, *inputs)


@dataclass(frozen=True)
class Case:
    """One row: `inputs(n)` is a batch of n samples, `larger(n)` one of another size where the net allows it."""

    id: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int], tuple[Any, ...]]
    expected: dict[str, Expected]
    larger: Callable[[int], tuple[Any, ...]] | None = None

    @property
    def free(self) -> dict[str, tuple[int, int]]:
        return {name: e for name, e in self.expected.items() if not isinstance(e, str)}


@dataclass
class Table:
    """Rows are added by a call per kind of input."""

    rows: list[Case] = field(default_factory=list)

    def add(self, id: str, shape: tuple[int, ...], larger: Any, parts: Any, forward: Forward, **expected: Any) -> None:
        named = {name.replace("__", "."): e for name, e in expected.items()}
        if not any(name == "out" for name in named):
            named["out"] = "output"
        self.rows.append(
            Case(
                id=id,
                build=lambda: Net(forward, parts()),
                inputs=lambda n: (torch.randn(n, *shape),),
                expected={name: e for name, e in named.items() if e is not None},
                larger=None if larger is None else lambda n: (torch.randn(n, *larger),),
            )
        )

    def vector(self, id: str, parts: Callable[[], dict[str, Any]], forward: Forward, **expected: Any) -> None:
        """Inputs [n, 6]; parts get `a`: 6 to 8 and `out`: 8 to 3 unless they bring their own."""
        self.add(id, (6,), None, lambda: {"a": nn.Linear(6, 8), "out": nn.Linear(8, 3), **parts()}, forward, **expected)

    def image(self, id: str, parts: Callable[[], dict[str, Any]], forward: Forward, **expected: Any) -> None:
        """Inputs [n, 3, 6, 6]; `a`: 3 to 8 channels, 3x3, and `out`: 8 to 3, 1x1."""
        larger = None if expected.pop("one_size", False) else (3, 8, 8)
        given = lambda: {"a": nn.Conv2d(3, 8, 3, padding=1), "out": nn.Conv2d(8, 3, 1), **parts()}  # noqa: E731
        self.add(id, (3, 6, 6), larger, given, forward, **expected)

    def tokens(self, id: str, parts: Callable[[], dict[str, Any]], forward: Forward, **expected: Any) -> None:
        """Inputs [n, 5, 6], channels last; `a`: 6 to 8 and `out`: 8 to 3."""
        given = lambda: {"a": nn.Linear(6, 8), "out": nn.Linear(8, 3), **parts()}  # noqa: E731
        self.add(id, (5, 6), None, given, forward, **expected)


def nothing() -> dict[str, Any]:
    return {}


@fx.wrap
def opaque(x: Tensor) -> Tensor:
    """An operator nobody described."""
    return x + x.roll(1, 1)


class Leaf(nn.Linear):
    """A layer that computes something else than its parent."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flip(-1))


T = Table()
F8 = (8, 1)

# -- linear layers and parameters used directly ------------------------------------------------------------------------

T.vector("linear", nothing, lambda m, x: m.out(m.a(x)), a=F8)
T.vector("linear-no-bias", lambda: {"a": nn.Linear(6, 8, bias=False)}, lambda m, x: m.out(m.a(x)), a=F8)
T.tokens("linear-tokens", nothing, lambda m, x: m.out(m.a(x).relu()), a=F8)
T.vector(
    "functional-linear",
    lambda: {"w": nn.Parameter(torch.randn(5, 8)), "b": nn.Parameter(torch.randn(5)), "out": nn.Linear(5, 3)},
    lambda m, x: m.out(F.linear(m.a(x).tanh(), m.w, m.b)),
    a=F8, w=(5, 1),
)  # fmt: skip
T.vector(
    "functional-linear-cast",
    lambda: {"w": nn.Parameter(torch.randn(5, 8)), "out": nn.Linear(5, 3)},
    lambda m, x: m.out(F.linear(m.a(x), m.w.to(x.dtype))),
    a=F8, w=(5, 1),
)  # fmt: skip
T.vector(
    "linear-computed-weight",
    lambda: {"w": nn.Parameter(torch.randn(5, 8)), "out": nn.Linear(5, 3)},
    lambda m, x: m.out(F.linear(m.a(x), m.w * 2)),
    a="operator",
)
T.vector(
    "linear-softmax-of-weight",
    lambda: {"w": nn.Parameter(torch.randn(5, 8)), "out": nn.Linear(5, 3)},
    lambda m, x: m.out(F.linear(m.a(x), F.softmax(m.w, 0))),
    a="operator",
)
T.vector(
    "linear-weight-changed-in-place",
    lambda: {"w": nn.Parameter(torch.randn(5, 8)), "out": nn.Linear(5, 3)},
    lambda m, x: m.out(F.linear(m.a(x), m.w.clone().add_(1))),
    a="operator",
)
T.vector(
    "linear-weight-changed-in-place-before",
    lambda: {"w": nn.Parameter(torch.randn(5, 8)), "out": nn.Linear(5, 3)},
    lambda m, x: m.out(F.linear(m.a(x), (w := m.w.detach(), w.mul_(1.0).add_(1).sub_(1))[0])),
    a="operator",
)
T.vector("linear-transposed", nothing, lambda m, x: F.linear(m.a(x), m.a.weight.t()), a="operator", out=None)
T.vector("used-twice", lambda: {"b": nn.Linear(8, 8)}, lambda m, x: m.out(m.b(m.b(m.a(x)).relu())), a=F8)
T.vector(
    "tied",
    lambda: {"b": (b := nn.Linear(8, 8)), "c": b},
    lambda m, x: m.out(m.c(m.b(m.a(x)).relu())),
    a=F8,
)


def _tied_weight() -> dict[str, Any]:
    b, c = nn.Linear(8, 5), nn.Linear(8, 5)
    c.weight = b.weight
    return {"b": b, "c": c, "out": nn.Linear(10, 3)}


T.vector(
    "tied-weight", _tied_weight, lambda m, x: m.out(torch.cat([m.b(m.a(x)), m.c(m.a(x).relu())], 1)), a=F8, b=(5, 1)
)
T.vector(
    "tied-weight-used-directly",
    _tied_weight,
    lambda m, x: m.out(torch.cat([m.c(m.a(x)), F.linear(m.a(x).relu(), m.b.weight)], 1)),
    a=F8, c=(5, 1),
)  # fmt: skip
T.vector("weight-also-penalised", nothing, lambda m, x: m.out(m.a(x)) + m.a.weight.square().sum(), a="reduce")
T.vector("subclass-with-own-forward", lambda: {"b": Leaf(8, 8)}, lambda m, x: m.out(m.b(m.a(x))), a="reduce", b=F8)
T.vector(
    "parametrized",
    lambda: {"b": parametrizations.weight_norm(nn.Linear(8, 5)), "out": nn.Linear(5, 3)},
    lambda m, x: m.out(m.b(m.a(x))),
    a="operator",
)
T.vector(
    "pruned",
    lambda: {"b": prune.random_unstructured(nn.Linear(8, 5), "weight", 0.5), "out": nn.Linear(5, 3)},
    lambda m, x: m.out(m.b(m.a(x))),
    a="operator",
)
T.rows.append(
    Case(
        "embedding",
        lambda: Net(lambda m, i: m.out(m.e(i).mean(1)), {"e": nn.Embedding(11, 8), "out": nn.Linear(8, 3)}),
        lambda n: (torch.randint(11, (n, 5)),),
        {"e": F8, "out": "output"},
        lambda n: (torch.randint(11, (n, 7)),),
    )
)
T.rows.append(
    Case(
        "embedding-max-norm",
        lambda: Net(lambda m, i: m.out(m.e(i)), {"e": nn.Embedding(11, 8, max_norm=1.0), "out": nn.Linear(8, 3)}),
        lambda n: (torch.randint(11, (n, 5)),),
        {"e": "norm", "out": "output"},
    )
)


def _tied_embedding() -> dict[str, Any]:
    e, out = nn.Embedding(11, 8), nn.Linear(8, 11, bias=False)
    out.weight = e.weight
    return {"e": e, "fc": nn.Linear(8, 8), "out": out}


T.rows.append(
    Case(
        "embedding-tied-with-output",
        lambda: Net(lambda m, i: m.out(m.fc(m.e(i)).relu()), _tied_embedding()),
        lambda n: (torch.randint(11, (n, 5)),),
        {"e": F8, "out": "input"},
    )
)

# -- convolutions ------------------------------------------------------------------------------------------------------

for _nd, _conv in ((1, nn.Conv1d), (2, nn.Conv2d), (3, nn.Conv3d)):
    T.add(
        f"conv{_nd}d",
        (3, *[6] * _nd),
        (3, *[7] * _nd),
        lambda conv=_conv: {"a": conv(3, 8, 3, stride=2, padding=1), "out": conv(8, 2, 1)},
        lambda m, x: m.out(m.a(x).relu()),
        a=F8,
    )
for _nd, _conv in ((1, nn.ConvTranspose1d), (2, nn.ConvTranspose2d), (3, nn.ConvTranspose3d)):
    T.add(
        f"conv-transpose{_nd}d",
        (3, *[4] * _nd),
        (3, *[5] * _nd),
        lambda conv=_conv: {"a": conv(3, 8, 3, stride=2), "b": conv(8, 4, 2, padding=1, dilation=2), "out": conv(4, 2, 1)},
        lambda m, x: m.out(m.b(m.a(x)).relu()),
        a=F8, b=(4, 1),
    )  # fmt: skip
for _mode in ("circular", "reflect", "replicate"):
    T.image(
        f"conv-{_mode}",
        lambda mode=_mode: {"b": nn.Conv2d(8, 4, 3, padding=1, padding_mode=mode), "out": nn.Conv2d(4, 3, 1)},
        lambda m, x: m.out(m.b(m.a(x))),
        a=F8, b=(4, 1),
    )  # fmt: skip
T.image(
    "conv-same",
    lambda: {"b": nn.Conv2d(8, 4, 3, padding="same", dilation=2), "out": nn.Conv2d(4, 3, 1)},
    lambda m, x: m.out(m.b(m.a(x))),
    a=F8, b=(4, 1),
)  # fmt: skip
T.image(
    "conv-groups",
    lambda: {"b": nn.Conv2d(8, 4, 3, padding=1, groups=2), "out": nn.Conv2d(4, 3, 1)},
    lambda m, x: m.out(m.b(m.a(x))),
    a=(8, 2), b=(4, 2),
)  # fmt: skip
T.image("depthwise", lambda: {"b": nn.Conv2d(8, 8, 3, groups=8)}, lambda m, x: m.out(m.b(m.a(x))), a=F8)
T.image(
    "depthwise-multiplier",
    lambda: {"b": nn.Conv2d(8, 24, 3, groups=8), "c": nn.Conv2d(24, 6, 1, groups=2), "out": nn.Conv2d(6, 3, 1)},
    lambda m, x: m.out(m.c(m.b(m.a(x)).relu())),
    a=(8, 2), c=(6, 2),
)  # fmt: skip
T.image(
    "conv-transpose-groups",
    lambda: {"b": nn.ConvTranspose2d(8, 6, 2, 2, groups=2), "out": nn.Conv2d(6, 3, 1)},
    lambda m, x: m.out(m.b(m.a(x))),
    a=(8, 2), b=(6, 2),
)  # fmt: skip
T.image(
    "conv-transpose-depthwise",
    lambda: {"b": nn.ConvTranspose2d(8, 16, 2, 2, groups=8), "out": nn.Conv2d(16, 3, 1)},
    lambda m, x: m.out(m.b(m.a(x))),
    a=F8,
)
T.image(
    "functional-conv-groups",
    lambda: {"w": nn.Parameter(torch.randn(4, 4, 3, 3)), "out": nn.Conv2d(4, 3, 1)},
    lambda m, x: m.out(F.conv2d(m.a(x), m.w, None, 1, 1, 1, 2)),
    a=(8, 2), w=(4, 2),
)  # fmt: skip
T.image(
    "functional-depthwise",
    lambda: {"w": nn.Parameter(torch.randn(8, 1, 3, 3)), "v": nn.Parameter(torch.randn(8, 1, 3, 3))},
    lambda m, x: m.out(F.conv2d((h := F.conv2d(m.a(x), m.w, groups=8)), m.v, padding=1, groups=h.shape[1])),
    a=F8,
)
T.image(
    "functional-conv-transpose",
    lambda: {"w": nn.Parameter(torch.randn(8, 4, 2, 2)), "out": nn.Conv2d(4, 3, 1)},
    lambda m, x: m.out(F.conv_transpose2d(m.a(x), m.w, stride=2)),
    a=F8, w=(4, 1),
)  # fmt: skip
T.image(
    "groups-from-a-size",
    lambda: {"w": nn.Parameter(torch.randn(4, 2, 3, 3)), "out": nn.Conv2d(4, 3, 1)},
    lambda m, x: m.out(F.conv2d((h := m.a(x)), m.w, groups=h.shape[1] // 2)),
    a="size", w=(4, 4),
)  # fmt: skip

T.tokens(
    "conv-over-channels",
    lambda: {"c": nn.Conv1d(5, 7, 3, padding=1), "d": nn.Linear(7, 3)},
    lambda m, x: m.out(h := m.a(x)).mean(1) + m.d(m.c(h).mean(-1)),
    a="reduce", c=(7, 1), d="output",
)  # fmt: skip
T.tokens(
    "conv-transpose-over-channels",
    lambda: {"c": nn.ConvTranspose1d(5, 7, 3, padding=1), "d": nn.Linear(7, 3)},
    lambda m, x: m.out(h := m.a(x)).mean(1) + m.d(m.c(h).mean(-1)),
    a="reduce", c=(7, 1), d="output",
)  # fmt: skip

# -- normalisation -----------------------------------------------------------------------------------------------------

T.vector("batchnorm1d", lambda: {"n": nn.BatchNorm1d(8)}, lambda m, x: m.out(m.n(m.a(x)).relu()), a=F8)
T.image("batchnorm2d", lambda: {"n": nn.BatchNorm2d(8)}, lambda m, x: m.out(m.n(m.a(x)).relu()), a=F8)
T.image(
    "batchnorm-plain",
    lambda: {"n": nn.BatchNorm2d(8, affine=False), "k": nn.BatchNorm2d(8, track_running_stats=False)},
    lambda m, x: m.out(m.k(m.n(m.a(x)))),
    a=F8,
)
T.add(
    "batchnorm3d",
    (2, 4, 4, 4),
    None,
    lambda: {"a": nn.Conv3d(2, 8, 3), "n": nn.BatchNorm3d(8), "out": nn.Conv3d(8, 2, 1)},
    lambda m, x: m.out(m.n(m.a(x))),
    a=F8,
)
# [n, tokens, channels]: BatchNorm1d takes the tokens for channels, and the channels for positions
T.tokens("batchnorm-over-channels", lambda: {"n": nn.BatchNorm1d(5)}, lambda m, x: m.out(m.n(m.a(x))), a="norm")
T.tokens("instancenorm-over-channels", lambda: {"n": nn.InstanceNorm1d(5)}, lambda m, x: m.out(m.n(m.a(x))), a="norm")
T.tokens("groupnorm-over-channels", lambda: {"n": nn.GroupNorm(1, 5)}, lambda m, x: m.out(m.n(m.a(x))), a="norm")
T.tokens(
    "batchnorm-of-folded-channels",
    lambda: {"n": nn.BatchNorm1d(5)},
    lambda m, x: m.out(m.n(m.a(x).transpose(1, 2).reshape(-1, 5)).view(-1, 8, 5).transpose(1, 2)),
    a="norm",
)
T.image(
    "instancenorm",
    lambda: {"n": nn.InstanceNorm2d(8, affine=True, track_running_stats=True)},
    lambda m, x: m.out(m.n(m.a(x))),
    a=F8,
)
T.image(
    "functional-norms",
    lambda: {"n": nn.BatchNorm2d(8)},
    lambda m, x: m.out(
        F.instance_norm(
            F.batch_norm(m.a(x), m.n.running_mean, m.n.running_var, m.n.weight, m.n.bias, m.training), eps=1e-3
        )
    ),
    a=F8,
)
T.image("groupnorm", lambda: {"n": nn.GroupNorm(4, 8)}, lambda m, x: m.out(m.n(m.a(x)).relu()), a=(8, 2))
T.image("groupnorm-one", lambda: {"n": nn.GroupNorm(1, 8)}, lambda m, x: m.out(m.n(m.a(x))), a=(8, 8))
T.image("functional-groupnorm", nothing, lambda m, x: m.out(F.group_norm(m.a(x), 4)), a=(8, 2))
T.image(
    "groupnorm-by-two-and-by-four",
    lambda: {"n": nn.GroupNorm(4, 8), "k": nn.GroupNorm(2, 8)},
    lambda m, x: m.out(m.k(m.n(m.a(x)))),
    a=(8, 4),
)
T.image(
    "groupnorm-after-cat",
    lambda: {"b": nn.Conv2d(3, 4, 1), "n": nn.GroupNorm(6, 12), "out": nn.Conv2d(12, 3, 1)},
    lambda m, x: m.out(m.n(torch.cat([m.a(x), m.b(x)], 1))),
    a=(8, 2), b=(4, 2),
)  # fmt: skip
T.image(
    "groupnorm-across-cat",
    lambda: {"b": nn.Conv2d(3, 4, 1), "n": nn.GroupNorm(4, 12), "out": nn.Conv2d(12, 3, 1)},
    lambda m, x: m.out(m.n(torch.cat([m.a(x), m.b(x)], 1))),
    a="size", b="size",
)  # fmt: skip
T.tokens("layernorm", lambda: {"n": nn.LayerNorm(8)}, lambda m, x: m.out(m.n(m.a(x))), a="norm")
T.tokens("functional-layernorm", nothing, lambda m, x: m.out(F.layer_norm(m.a(x), (8,))), a="norm")
T.tokens("rmsnorm", lambda: {"n": nn.RMSNorm(8)}, lambda m, x: m.out(m.n(m.a(x))), a="norm")
T.image("local-response-norm", lambda: {"n": nn.LocalResponseNorm(3)}, lambda m, x: m.out(m.n(m.a(x))), a="norm")
T.vector("normalize", nothing, lambda m, x: m.out(F.normalize(m.a(x), dim=-1)), a="norm")

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
    T.vector(f"functional-{_name}", nothing, lambda m, x, f=getattr(F, _name): m.out(f(m.a(x))), a=F8)
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
T.vector("scaled-by-root-of-size", nothing, lambda m, x: m.out((h := m.a(x)) / math.sqrt(h.size(1))), a="size")
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
T.vector("unknown-function", nothing, lambda m, x: m.out(opaque(m.a(x))), a="operator")
T.vector("inplace-on-view", nothing, lambda m, x: m.out(_inplace_on_view(m.a(x) * 1.0)), a="size")
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
    lambda: {"b": nn.Conv2d(8, 5, 3, 2, 1), "c": nn.Conv2d(5, 6, 1), "d": nn.Conv2d(8, 6, 1, 2), "out": nn.Conv2d(6, 3, 1)},
    lambda m, x: m.out(m.c(m.b(h := m.a(x))) + m.d(h)),
    a=F8, b=(5, 1), c=(6, 1),
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
    a="reduce",
)
T.tokens(
    "interpolate-over-channels",
    lambda: {"out": nn.Linear(16, 3)},
    lambda m, x: m.out(F.interpolate(m.a(x), scale_factor=2)),
    a="reduce",
)

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
T.vector("view-of-other-shape", nothing, lambda m, x: m.out(m.a(x)[:, None].view((h := m.a(x)).shape)), a=F8)
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
    a="size",
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
T.vector("view-rounded-half", nothing, lambda m, x: m.out((h := m.a(x)).view(-1, h.size(1) // 2 * 2)), a="size")
T.vector("view-of-minimum", nothing, lambda m, x: m.out((h := m.a(x)).view(-1, min(h.size(1), 8))), a="branch")
T.vector("view-of-maximum", nothing, lambda m, x: m.out((h := m.a(x)).view(-1, 8 + h.size(1) % 8)), a="size")
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
    a="operator",
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
T.vector("glu", lambda: {"out": nn.Linear(4, 3)}, lambda m, x: m.out(F.glu(m.a(x))), a=(8, 2))
T.image("glu-module", lambda: {"g": nn.GLU(1), "out": nn.Conv2d(4, 3, 1)}, lambda m, x: m.out(m.g(m.a(x))), a=(8, 2))
T.vector("unbind", nothing, lambda m, x: m.out(torch.stack(m.a(x).unbind(1), 1)), a="size")
T.vector(
    "tensor-split", lambda: {"out": nn.Linear(4, 3)}, lambda m, x: m.out(m.a(x).tensor_split(2, 1)[0]), a="operator"
)
T.tokens("first-token", nothing, lambda m, x: m.out(m.a(x)[:, 0]), a=F8)
T.tokens("select-token", nothing, lambda m, x: m.out(m.a(x).select(1, 2) + m.a(x).narrow(1, 0, 1).squeeze(1)), a=F8)
T.vector("slice", lambda: {"out": nn.Linear(4, 3)}, lambda m, x: m.out(m.a(x)[:, :4]), a="size")
T.vector("slice-everything", nothing, lambda m, x: m.out(m.a(x)[:, :][..., 0:]), a=F8)
T.vector("slice-to-literal-end", nothing, lambda m, x: m.out(m.a(x)[:, :8]), a="size")
T.vector("slice-from-negative", nothing, lambda m, x: m.out(m.a(x)[:, -8:]), a="size")
T.vector("slice-by-size", nothing, lambda m, x: m.out((h := m.a(x))[:, h.size(1) - 8 :]), a="size")
T.vector(
    "slice-of-input-by-size",
    lambda: {"a": nn.Linear(6, 6), "out": nn.Linear(6, 3)},
    lambda m, x: m.out(m.a(x).sum(1, True) + x[:, : m.a(x).size(1)]),
    a="reduce",
    out="output",
)
T.vector("pick", lambda: {"out": nn.Linear(1, 3)}, lambda m, x: m.out(m.a(x)[:, 2:3] + m.a(x)[:, -1:]), a="size")
T.vector("index-list", lambda: {"out": nn.Linear(2, 3)}, lambda m, x: m.out(m.a(x)[:, [0, 3]]), a="operator")
T.vector("index-buffer", lambda: {"i": torch.randperm(8)}, lambda m, x: m.out(m.a(x)[:, m.i]), a="size")
T.tokens("index-tokens", lambda: {"i": torch.tensor([2, 0])}, lambda m, x: m.out(m.a(x)[:, m.i]), a=F8)
T.vector(
    "index-by-width", lambda: {"t": torch.randn(6, 2)}, lambda m, x: m.out(m.t.to(x)[(m.a(x) > 0).long()].sum(-1)), a=F8
)
T.vector("boolean-mask", nothing, lambda m, x: m.out(torch.where(m.a(x) > 0, x[0, 0], 0.0)), a=F8)
T.vector("index-select", nothing, lambda m, x: m.out(m.a(x).index_select(1, torch.arange(8))), a="operator")
T.vector("gather", nothing, lambda m, x: m.out((h := m.a(x)).gather(1, h.argsort(0) * 0)), a="operator")
T.vector("assign-part", nothing, lambda m, x: m.out(_assign_part(m.a(x) * 1.0)), a="size")
T.vector("assign-sample", nothing, lambda m, x: m.out(_assign_sample(m.a(x) * 1.0)), a=F8)
T.vector("assign-width", lambda: {"b": nn.Linear(6, 8)}, lambda m, x: m.out(_assign_all(m.a(x) * 1.0, m.b(x))), a=F8)


T.vector("assign-where", nothing, lambda m, x: m.out(_assign_where(m.a(x) * 1.0)), a=F8)
T.vector("assign-at", nothing, lambda m, x: m.out(_assign_at(m.a(x) * 1.0)), a="operator")


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
    "mean-subtracted": lambda x: x - x.mean(1, keepdim=True),
    "max-subtracted": lambda x: x - x.max(1, keepdim=True)[0],
    "max-of-all": lambda x: x / x.max(),
    "sum-of-all": lambda x: x / (x.abs().sum() + 1),
    "topk": lambda x: x * x.topk(1, 1)[0],
}.items():
    T.vector(
        f"over-width-{_name}", lambda f=_over: {"f": f} if isinstance(f, nn.Module) else {},
        lambda m, x, f=_over: m.out(f(m.a(x))), a="operator" if _name in ("gumbel", "topk") else "reduce",
    )  # fmt: skip
T.tokens("gumbel-positional", nothing, lambda m, x: m.out(F.gumbel_softmax(m.a(x), 1) * 0 + m.a(x)), a="operator")
T.vector(
    "matmul-parameter", lambda: {"w": nn.Parameter(torch.randn(8, 8))}, lambda m, x: m.out(m.a(x) @ m.w), a="reduce"
)
T.tokens(
    "scores", lambda: {"k": nn.Linear(6, 8), "v": nn.Linear(6, 8)},
    lambda m, x: m.out(torch.softmax(m.a(x) @ m.k(x).transpose(1, 2) / 3, -1) @ m.v(x)), a="reduce", k=None, v=F8,
)  # fmt: skip
T.tokens("bmm", nothing, lambda m, x: m.out(torch.bmm(x @ x.transpose(1, 2), m.a(x))), a=F8)
T.tokens(
    "einsum",
    lambda: {"k": nn.Linear(6, 8), "v": nn.Linear(6, 8)},
    lambda m, x: m.out(torch.einsum("nqk,nkd->nqd", torch.einsum("nqd,nkd->nqk", m.a(x), m.k(x)), m.v(x))),
    a="reduce",
    k=None,
    v=F8,
)
T.tokens(
    "attention", lambda: {"k": nn.Linear(6, 8), "v": nn.Linear(6, 8)},
    lambda m, x: m.out(F.scaled_dot_product_attention(m.a(x), m.k(x), m.v(x))), a="reduce", k=None, v=F8,
)  # fmt: skip
T.vector("branch-on-size", nothing, lambda m, x: m.out(h if (h := m.a(x)).size(1) > 4 else -h), a="branch")
T.vector("size-returned", nothing, lambda m, x: (m.out(h := m.a(x)), h.size(1)), a="output")
T.vector("hidden-returned", nothing, lambda m, x: (m.out(h := m.a(x)), h), a="output")
T.vector("frozen", lambda: {"a": nn.Linear(6, 8).requires_grad_(False)}, lambda m, x: m.out(m.a(x)), a="frozen")
T.vector("new-zeros", nothing, lambda m, x: m.out((h := m.a(x)) + h.new_zeros(h.size(0), h.size(1))), a=F8)
T.vector(
    "zeros-of-other-size",
    nothing,
    lambda m, x: m.out((h := m.a(x)) + torch.zeros(h.size(0), 2 * h.size(1) - 8)),
    a="size",
)

CASES = T.rows
