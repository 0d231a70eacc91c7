"""Rows of layers: linear, convolutions, normalisation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

from tests.ops.table import F8, Case, Net, T, nothing


class Leaf(nn.Linear):
    """A layer that computes something else than its parent."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flip(-1))


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
    "linear-softmax-of-weight",
    lambda: {"w": nn.Parameter(torch.randn(5, 8)), "out": nn.Linear(5, 3)},
    lambda m, x: m.out(F.linear(m.a(x), F.softmax(m.w, 0))),
    a="operator",
    w="reduce",
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
    w="operator",
)
T.vector(
    "tied-autoencoder",
    nothing,
    lambda m, x: F.linear(m.a(x).sigmoid(), m.a.weight.t()),
    out="operator",
    **{"a[0]": F8, "a[1]": "input"},
)
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
    a=F8,
    b=(5, 1),
)
T.vector(
    "pruned",
    lambda: {"b": prune.random_unstructured(nn.Linear(8, 5), "weight", 0.5), "out": nn.Linear(5, 3)},
    lambda m, x: m.out(m.b(m.a(x))),
    a=F8,
    b=(5, 1),
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

for _mode in ("sum", "mean", "max"):
    T.rows.append(
        Case(
            f"embedding-bag-{_mode}",
            lambda mode=_mode: Net(
                lambda m, i: m.out(m.e(i) + F.embedding_bag(i, m.w, mode=mode)),
                {"e": nn.EmbeddingBag(11, 8, mode=mode), "w": nn.Parameter(torch.randn(11, 8)), "out": nn.Linear(8, 3)},
            ),
            lambda n: (torch.randint(11, (n, 5)),),
            {"e": F8, "out": "output"},
            lambda n: (torch.randint(11, (n, 7)),),
        )
    )
T.rows.append(
    Case(
        "embedding-bag-of-a-list",
        lambda: Net(
            lambda m, i, at: m.out(m.e(i, at)), {"e": nn.EmbeddingBag(11, 8, mode="sum"), "out": nn.Linear(8, 3)}
        ),
        lambda n: (torch.randint(11, (3 * n,)), 3 * torch.arange(n)),
        {"e": F8, "out": "output"},
    )
)

# -- weights that the graph computes -----------------------------------------------------------------------------------


def _hidden(*shape: int) -> dict[str, Any]:
    return {"w": nn.Parameter(torch.randn(*shape)), "out": nn.Linear(5, 3)}


def _mask(*shape: int) -> Tensor:
    return (torch.arange(shape[0] * shape[1]).reshape(shape) % 3 > 0).float()


for _name, _shape, _weight in (
    ("transposed", (8, 5), lambda w: w.t()),
    ("scaled", (5, 8), lambda w: w * 2),
    ("scaled-transposed", (8, 5), lambda w: 0.5 * w.T / 3),
    ("squeezed", (5, 8, 1), lambda w: w.squeeze(-1).contiguous()),
    ("tanh", (8, 5), lambda w: -torch.tanh(w.permute(1, 0))),
    ("straight-through", (5, 8), lambda w: w + (w.sign() - w).detach()),
):
    T.vector(
        f"linear-weight-{_name}",
        lambda shape=_shape: _hidden(*shape),
        lambda m, x, f=_weight: m.out(F.linear(m.a(x).tanh(), f(m.w)).relu()),
        a=F8, w=(5, 1),
    )  # fmt: skip
T.vector(
    "linear-weight-plus-one",
    lambda: _hidden(5, 8),
    lambda m, x: m.out(F.linear(m.a(x), m.w + 1)),
    a="operator", w=(5, 1),
)  # fmt: skip
for _name, _weight in (
    ("divided-by-length", lambda m: m.gain * m.w / m.w.norm(dim=1, keepdim=True)),
    ("times-inverse-length", lambda m: m.w * (m.gain / m.w.norm(dim=1, keepdim=True))),
    ("normalised", lambda m: m.gain * F.normalize(m.w, dim=1)),
):
    T.vector(
        f"linear-weight-{_name}",
        lambda: {**_hidden(5, 8), "gain": nn.Parameter(torch.rand(5, 1))},
        lambda m, x, f=_weight: m.out(F.linear(m.a(x), f(m)).relu()),
        a=F8, w=(5, 1),
    )  # fmt: skip
T.vector(
    "linear-weight-normalised-over-outputs",
    lambda: _hidden(5, 8),
    lambda m, x: m.out(F.linear(m.a(x), F.normalize(m.w, dim=0)).relu()),
    a="operator", w="norm",
)  # fmt: skip
T.vector(
    "linear-weight-divided-by-length-behind-norm",
    lambda: {**_hidden(5, 8), "n": nn.LayerNorm(8)},
    lambda m, x: m.out(F.linear(m.n(m.a(x)), m.w / m.w.norm(dim=1, keepdim=True)).relu()),
    a=F8, w=(5, 1),
)  # fmt: skip
T.vector(
    "linear-weight-with-noise",
    lambda: {**_hidden(5, 8), "s": nn.Parameter(torch.rand(5, 8)), "noise": torch.randn(5, 8)},
    lambda m, x: m.out(F.linear(m.a(x), m.w + m.s * m.noise).relu()),
    a=F8, w=(5, 1),
)  # fmt: skip
T.vector(
    "linear-weight-softplus",
    lambda: _hidden(5, 8),
    lambda m, x: m.out(F.linear(m.a(x), F.softplus(m.w)).relu()),
    a="operator", w=(5, 1),
)  # fmt: skip
T.tokens(
    "linear-weights-beside-each-other",
    lambda: {name: nn.Linear(8, 8) for name in "qkv"},
    lambda m, x: m.out(_attention(F.linear(m.a(x), torch.cat([m.q.weight, m.k.weight, m.v.weight]), _packed_bias(m)))),
    a=F8, q=(24, 3), k=None, v=None,
)  # fmt: skip
T.vector(
    "linear-weights-stacked",
    lambda: {"b": nn.Linear(8, 5), "c": nn.Linear(8, 5), "out": nn.Linear(5, 3)},
    lambda m, x: m.out(torch.einsum("bi,eoi->ebo", m.a(x), torch.stack([m.b.weight, m.c.weight])).relu().sum(0)),
    a=F8, b=(5, 1), c=None,
)  # fmt: skip
T.vector(
    "linear-weight-masked",
    lambda: {**_hidden(5, 8), "mask": _mask(5, 8)},
    lambda m, x: m.out(F.linear(m.a(x), m.mask * m.w)),
    a=F8, w=(5, 1),
)  # fmt: skip
T.vector(
    "linear-weight-of-square-residual",
    lambda: {"w": nn.Parameter(torch.randn(8, 8))},
    lambda m, x: m.out((h := m.a(x)) + F.linear(h.relu(), 0.1 * m.w.t())),
    a=F8,
)
T.vector(
    "linear-weight-computed-under-norm",
    lambda: {**_hidden(5, 8), "b": nn.Parameter(torch.randn(5)), "n": nn.LayerNorm(5)},
    lambda m, x: m.out(m.n(F.linear(m.a(x).relu(), 0.3 * m.w, 0.1 * m.b))),
    a=F8, w=(5, 1),
)  # fmt: skip
T.vector(
    "linear-weight-bent-under-norm",
    lambda: {**_hidden(5, 8), "n": nn.LayerNorm(5)},
    lambda m, x: m.out(m.n(F.linear(m.a(x).relu(), torch.tanh(m.w)))),
    a=F8, w="norm",
)  # fmt: skip
T.vector(
    "linear-weight-of-two-parameters",
    lambda: {"u": nn.Parameter(torch.randn(5, 1)), "v": nn.Parameter(torch.randn(8)), "out": nn.Linear(5, 3)},
    lambda m, x: m.out(F.linear(m.a(x), m.u * m.v)),
    a="operator",
    u="operator",
)
T.vector(
    "linear-weight-by-layers",
    lambda: {"z": nn.Parameter(torch.randn(4)), "h": nn.Linear(4, 7), "g": nn.Linear(7, 40), "out": nn.Linear(5, 3)},
    lambda m, x: m.out(F.linear(m.a(x), m.g(m.h(m.z).relu()).view(5, 8))),
    a="operator", h=(7, 1),
)  # fmt: skip
T.image(
    "conv-weight-scaled",
    lambda: {"w": nn.Parameter(torch.randn(5, 8, 3, 3)), "b": nn.Parameter(torch.randn(5)), "out": nn.Conv2d(5, 3, 1)},
    lambda m, x: m.out(F.conv2d(m.a(x).relu(), m.w * 0.2, 0.1 * m.b, padding=1)),
    a=F8, w=(5, 1),
)  # fmt: skip
T.image(
    "conv-weight-of-a-matrix",
    lambda: {"w": nn.Parameter(torch.randn(8, 5)), "out": nn.Conv2d(5, 3, 1)},
    lambda m, x: m.out(F.conv2d(m.a(x).relu(), m.w.t()[:, :, None, None])),
    a=F8, w=(5, 1),
)  # fmt: skip
T.image(
    "conv-weight-flipped-in-and-out",
    lambda: {"w": nn.Parameter(torch.randn(8, 5, 3, 3)), "out": nn.Conv2d(5, 3, 1)},
    lambda m, x: m.out(F.conv2d(m.a(x).relu(), m.w.transpose(0, 1))),
    a=F8, w=(5, 1),
)  # fmt: skip
T.image(
    "conv-weight-standardised",
    lambda: {"w": nn.Parameter(torch.randn(5, 8, 3, 3)), "out": nn.Conv2d(5, 3, 1)},
    lambda m, x: m.out(F.conv2d(m.a(x), _standardised(m.w)).relu()),
    a="reduce", w=(5, 1),
)  # fmt: skip


def _kernel(o: int, i: int, k: int) -> dict[str, Any]:
    return {"w": nn.Parameter(torch.randn(o, i, k, k)), "out": nn.Conv2d(o, 3, 1)}


def _packed_bias(m: nn.Module) -> Tensor:
    return torch.cat([m.q.bias, m.k.bias, m.v.bias])


def _attention(qkv: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(*qkv.chunk(3, -1))


T.image(
    "conv-weight-of-two-kernels",
    lambda: {**_kernel(5, 8, 3), "v": _kernel(5, 8, 1)["w"]},
    lambda m, x: m.out(F.conv2d(m.a(x).relu(), m.w.flip(2, 3) + F.pad(m.v, [1, 1, 1, 1]), padding=1).relu()),
    a=F8, w=(5, 1),
)  # fmt: skip
T.image(
    "conv-weight-summed",
    lambda: _kernel(5, 8, 3),
    lambda m, x: m.out(F.conv2d(m.a(x), m.w, padding=1) - F.conv2d(m.a(x), m.w.sum((2, 3), keepdim=True))),
    a=F8, w=(5, 1),
)  # fmt: skip


def _standardised(w: Tensor) -> Tensor:
    return (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-5)


# -- products with a parameter -----------------------------------------------------------------------------------------

T.vector(
    "addmm",
    lambda: {"w": nn.Parameter(torch.randn(8, 5)), "b": nn.Parameter(torch.randn(5)), "out": nn.Linear(5, 3)},
    lambda m, x: m.out(torch.addmm(m.b, m.a(x), m.w).relu()),
    a=F8, w=(5, 1),
)  # fmt: skip
T.vector(
    "addmm-method",
    lambda: {"w": nn.Parameter(torch.randn(8, 8))},
    lambda m, x: m.out((h := m.a(x)).addmm(h.sin(), m.w)),
    a=F8,
)
T.vector(
    "addmm-of-activations",
    lambda: {"b": nn.Linear(6, 8)},
    lambda m, x: m.out(torch.addmm(m.a(x), m.a(x), m.b(x).T @ m.b(x))),
    a="operator",
    b="operator",
)
T.vector(
    "mm-parameter",
    lambda: {"w": nn.Parameter(torch.randn(8, 5)), "out": nn.Linear(5, 3)},
    lambda m, x: m.out(torch.mm(m.a(x), m.w)),
    a=F8, w=(5, 1),
)  # fmt: skip


def _linear_maps() -> dict[str, Any]:
    return {
        "tensordot": ((8, 5), lambda x, w: torch.tensordot(x, w, dims=1)),
        "tensordot-of-lists": ((5, 8), lambda x, w: torch.tensordot(x, w, dims=([2], [1]))),
        "matmul-weight-first": ((5, 8), lambda x, w: (w @ x.mT).mT),
        "matmul-of-half-a-weight": ((8, 5), lambda x, w: torch.matmul(x, 0.5 * w)),
        "einsum-implicit": ((8, 5), lambda x, w: torch.einsum("btc,cz", x, w)),
        "einsum-transposed": ((5, 8), lambda x, w: torch.einsum("bth,hd->btd", x, w.t())),
        "members-matmul": ((3, 8, 5), lambda x, w: (x[:, None] @ w).mean(1)),
        "members-einsum": ((3, 8, 5), lambda x, w: torch.einsum("bth,ehd->ebtd", x, w).mean(0)),
        "members-bmm": ((2, 8, 5), lambda x, w: torch.bmm(x.flatten(0, 1).expand(2, -1, -1), w).sum(0).view(-1, 5, 5)),
        "members-last": ((8, 5, 3), lambda x, w: torch.einsum("bth,hde->btde", x, w).sum(-1)),
        "per-position": ((8, 5, 5), lambda x, w: torch.einsum("bth,hdt->btd", x, w)),
    }


for _name, (_shape, _product) in _linear_maps().items():
    T.tokens(
        _name,
        lambda shape=_shape: _hidden(*shape),
        lambda m, x, f=_product: m.out(f(m.a(x).sin(), m.w)),
        a=F8, **({"w[0]": (5, 1), "w[1]": "reduce"} if _name == "members-last" else {"w": (5, 1)}),
    )  # fmt: skip
T.tokens(
    "members-baddbmm",
    lambda: {**_hidden(2, 8, 5), "b": nn.Parameter(torch.randn(2, 1, 5))},
    lambda m, x: m.out(torch.baddbmm(m.b, m.a(x).flatten(0, 1).expand(2, -1, -1), m.w).relu().sum(0)),
    a=F8, w=(5, 1),
)  # fmt: skip
T.vector(
    "biaffine-by-einsum",
    lambda: {"c": nn.Linear(6, 5), "u": nn.Parameter(torch.randn(7, 8, 5)), "out": nn.Linear(7, 3)},
    lambda m, x: m.out(torch.einsum("bi,oij,bj->bo", m.a(x).sin(), m.u, m.c(x)).relu()),
    a=F8, c=(5, 1), u=(7, 1),
)  # fmt: skip
T.vector(
    "quadratic-by-einsum",
    lambda: {"u": nn.Parameter(torch.randn(7, 8, 8)), "out": nn.Linear(7, 3)},
    lambda m, x: m.out(torch.einsum("bi,oij,bj->bo", m.a(x), m.u, m.a(x))),
    a=F8, u=(7, 1),
)  # fmt: skip
T.tokens(
    "heads-by-einsum",
    lambda: {"w": nn.Parameter(torch.randn(8, 2, 4)), "v": nn.Parameter(torch.randn(2, 4, 8))},
    lambda m, x: m.out(torch.einsum("bthd,hdo->bto", torch.einsum("bti,ihd->bthd", m.a(x), m.w).relu(), m.v)),
    a=F8, v=F8, **{"w[0]": (2, 1), "w[1]": (4, 1)},
)  # fmt: skip
T.vector(
    "bilinear",
    lambda: {"c": nn.Linear(6, 5), "f": nn.Bilinear(8, 5, 7), "out": nn.Linear(7, 3)},
    lambda m, x: m.out(m.f(m.a(x).sin(), m.c(x)).relu()),
    a=F8, c=(5, 1), f=(7, 1),
)  # fmt: skip
T.tokens(
    "bilinear-function",
    lambda: {"w": nn.Parameter(torch.randn(5, 8, 8)), "out": nn.Linear(5, 3)},
    lambda m, x: m.out(F.bilinear(m.a(x), m.a(x).tanh(), 0.2 * m.w)),
    a=F8, w=(5, 1),
)  # fmt: skip
T.tokens(
    "fourier-along-positions",
    lambda: _hidden(8, 5, 3, 2),
    lambda m, x: m.out(_fourier_layer(m.a(x), torch.view_as_complex(m.w))),
    a=F8, w=(5, 1),
)  # fmt: skip


T.tokens(
    "fourier-with-real-and-imaginary-weights",
    lambda: {**_hidden(8, 5), "i": nn.Parameter(torch.randn(8, 5))},
    lambda m, x: m.out(_complex_product(torch.fft.rfft(m.a(x), dim=1), m.w, m.i)),
    a=F8, w=(5, 1),
)  # fmt: skip


def _complex_product(x: Tensor, real: Tensor, imaginary: Tensor) -> Tensor:
    parts = x.real @ real - x.imag @ imaginary, x.real @ imaginary + x.imag @ real
    return torch.fft.irfft(torch.complex(*parts), n=5, dim=1)


def _fourier_layer(x: Tensor, w: Tensor) -> Tensor:
    return torch.fft.irfft(torch.einsum("bki,iok->bko", torch.fft.rfft(x, dim=1), w), n=5, dim=1)


for _name, _shape, _einsum in (
    ("in-out", (8, 5), lambda x, w: torch.einsum("bth,hd->btd", x, w)),
    ("out-in", (5, 8), lambda x, w: torch.einsum("bth, dh -> btd", x, w)),
    ("any-batch", (8, 5), lambda x, w: torch.einsum("...h,hd->...d", x, w)),
    ("weight-first", (8, 5), lambda x, w: torch.einsum("hd,bth->btd", w, x)),
    ("features-inside", (5, 8), lambda x, w: torch.einsum("bth,dh->bdt", x, w).mT),
    ("as-a-list", (8, 5), lambda x, w: torch.einsum("bth,hd->btd", [x, w])),
):
    T.tokens(
        f"einsum-parameter-{_name}",
        lambda shape=_shape: {"w": nn.Parameter(torch.randn(*shape)), "out": nn.Linear(5, 3)},
        lambda m, x, f=_einsum: m.out(f(m.a(x).sin(), m.w)),
        a=F8, w=(5, 1),
    )  # fmt: skip
T.tokens(
    "einsum-sums-more",
    lambda: {"w": nn.Parameter(torch.randn(8, 5)), "out": nn.Linear(5, 3)},
    lambda m, x: m.out(torch.einsum("bth,hd->bd", m.a(x), m.w)),
    a=F8,
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
        lambda conv=_conv: {"a": conv(3, 8, 3, 2), "b": conv(8, 4, 2, padding=1, dilation=2), "out": conv(4, 2, 1)},
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
    a="reduce", c=(7, 1),
)  # fmt: skip
T.tokens(
    "conv-transpose-over-channels",
    lambda: {"c": nn.ConvTranspose1d(5, 7, 3, padding=1), "d": nn.Linear(7, 3)},
    lambda m, x: m.out(h := m.a(x)).mean(1) + m.d(m.c(h).mean(-1)),
    a="reduce", c=(7, 1),
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
T.tokens("layernorm", lambda: {"n": nn.LayerNorm(8)}, lambda m, x: m.out(m.n(m.a(x))), a=F8)
T.tokens("layernorm-behind-relu", lambda: {"n": nn.LayerNorm(8)}, lambda m, x: m.out(m.n(m.a(x).relu())), a="norm")
T.tokens(
    "layernorm-no-weight",
    lambda: {"n": nn.LayerNorm(8, elementwise_affine=False)},
    lambda m, x: m.out(m.n(m.a(x))),
    a=F8,
)
T.image(
    "layernorm-over-image",
    lambda: {"n": nn.LayerNorm((8, 6, 6))},
    lambda m, x: m.out(m.n(m.a(x))),
    a="norm",
    n="size",
    one_size=True,
)
T.tokens("functional-layernorm", nothing, lambda m, x: m.out(F.layer_norm(m.a(x), (8,))), a=F8)
T.tokens("layernorm-no-weight-gated", nothing, lambda m, x: m.out(F.layer_norm(m.a(x), (8,)).tanh()), a="norm")
T.tokens("rmsnorm", lambda: {"n": nn.RMSNorm(8)}, lambda m, x: m.out(m.n(m.a(x))), a=F8)
T.tokens("rmsnorm-behind-relu", lambda: {"n": nn.RMSNorm(8)}, lambda m, x: m.out(m.n(m.a(x).relu())), a=F8)
T.tokens("rmsnorm-behind-sigmoid", lambda: {"n": nn.RMSNorm(8)}, lambda m, x: m.out(m.n(m.a(x).sigmoid())), a="norm")
T.tokens(
    "two-norms-of-one-width",
    lambda: {"n": nn.RMSNorm(8), "k": nn.LayerNorm(8)},
    lambda m, x: m.out(m.n(h := m.a(x)) + m.k(h)),
    a="norm",
)
T.image("local-response-norm", lambda: {"n": nn.LocalResponseNorm(3)}, lambda m, x: m.out(m.n(m.a(x))), a="norm")
T.vector("normalize", nothing, lambda m, x: m.out(F.normalize(m.a(x), dim=-1)), a=F8)

# -- recurrent layers --------------------------------------------------------------------------------------------------


def _recurrent(cls: type, **options: Any) -> Any:
    width = 8 // (2 if options.get("bidirectional") else 1)
    return lambda: {"r": cls(8, width, batch_first=True, **options)}


T.tokens("lstm", _recurrent(nn.LSTM), lambda m, x: m.out(m.r(m.a(x))[0]), a=F8, r=F8)
T.tokens("gru", _recurrent(nn.GRU, num_layers=2), lambda m, x: m.out(m.r(m.a(x))[0]), a=F8, r=F8)
T.tokens("rnn-last-state", _recurrent(nn.RNN), lambda m, x: m.out(m.r(m.a(x))[1][0]), a=F8, r=F8)
T.tokens(
    "lstm-bidirectional",
    _recurrent(nn.LSTM, num_layers=2, bidirectional=True),
    lambda m, x: m.out(m.r(m.a(x))[0]),
    a=F8,
    r=(4, 1),
)


def _steps(m: Any, h: Tensor, state: Any = None) -> Tensor:
    for t in range(h.size(1)):
        state = m.r(h[:, t], state)
    return state[0] if isinstance(state, tuple) else state


def _gates_by_hand(m: Any, x: Tensor) -> Tensor:
    h = x.new_zeros(x.size(0), 8)
    for t in range(x.size(1)):
        new, gate = (m.a(x[:, t]) + m.u(h)).chunk(2, -1)
        h = h + gate.sigmoid() * (new.tanh() - h)
    return h


def _packed_and_padded(x: Tensor) -> Tensor:
    p = nn.utils.rnn.pack_padded_sequence(x, torch.full((len(x),), 4), batch_first=True, enforce_sorted=False)
    p = nn.utils.rnn.PackedSequence(p.data.tanh(), *p[1:])
    return nn.utils.rnn.pad_packed_sequence(p, batch_first=True, total_length=x.shape[1])[0]


T.tokens("noise-in-place", nothing, lambda m, x: m.out(0 * torch.empty_like(h := m.a(x)).normal_() + h), a=F8)
T.tokens("packed-and-padded", nothing, lambda m, x: m.out(_packed_and_padded(m.a(x))), a=F8)
T.tokens("lstm-cell", lambda: {"r": nn.LSTMCell(8, 8)}, lambda m, x: m.out(_steps(m, m.a(x))), a=F8, r=F8)
T.tokens("gru-cell", lambda: {"r": nn.GRUCell(8, 8, bias=False)}, lambda m, x: m.out(_steps(m, m.a(x))), a=F8, r=F8)
T.tokens("rnn-cell", lambda: {"r": nn.RNNCell(8, 8)}, lambda m, x: m.out(_steps(m, m.a(x))), a=F8, r=F8)
T.tokens(
    "lstm-cell-from-zeros",
    lambda: {"r": nn.LSTMCell(8, 8)},
    lambda m, x: m.out(_steps(m, m.a(x), (x.new_zeros(len(x), 8), torch.zeros(len(x), m.r.hidden_size).to(x)))),
    a=F8,
    r=F8,
)
T.tokens(
    "lstm-from-zeros",
    _recurrent(nn.LSTM, num_layers=2),
    lambda m, x: m.out(m.r(m.a(x), (torch.zeros(2, x.size(0), 8).to(x), x.new_zeros(2, len(x), 8)))[0]),
    a=F8,
    r=F8,
)
T.tokens(
    "gru-from-zeros-of-a-parameter",
    _recurrent(nn.GRU),
    lambda m, x: m.out(m.r(m.a(x), next(m.r.parameters()).new_zeros(1, x.size(0), 8))[1][-1]),
    a=F8,
    r=F8,
)
T.tokens(
    "gates-by-hand",
    lambda: {"a": nn.Linear(6, 16), "u": nn.Linear(8, 16)},
    lambda m, x: m.out(_gates_by_hand(m, x)),
    a=(16, 2),
    u=None,
)
T.tokens(
    "lstm-projected",
    _recurrent(nn.LSTM, proj_size=4),
    lambda m, x: m.r(m.a(x))[0],
    a="operator",
    r="operator",
    out="operator",
)
