"""Norms over a width and products of two activations: widened exactly where that is possible, pinned where not."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import fxgrow
from fxgrow.rewriting.rewrite import rewrite
from models import GPT, ViT


class OwnRMSNorm(nn.Module):
    """As language models write it; `offset` as Gemma does."""

    def __init__(self, size: int, offset: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.variance_epsilon = 1e-2
        self.offset = offset

    def forward(self, x: Tensor) -> Tensor:
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return (self.offset + self.weight) * x


class OwnNormOfHalf(OwnRMSNorm):
    """Looks like a norm, and computes something else."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 2


class Block(nn.Module):
    """Pre-norm attention and perceptron on a stream; `scaled` by one weight per unit."""

    def __init__(self, norm: Callable[[int], nn.Module], scaled: bool, dropout: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = norm(8), norm(8)
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.scale = nn.Parameter(torch.randn(8)) if scaled else None
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        h = self.norm1(x)
        q, k, v = (layer(h).view(n, t, 2, -1).transpose(1, 2) for layer in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, -1)
        y = self.dropout(self.o(y))
        x = x + (y if self.scale is None else y * self.scale)
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Stream(nn.Module):
    """Tokens, positions, two blocks, a last norm and a head, which may share the embedding's weight."""

    def __init__(
        self,
        norm: Callable[[int], nn.Module] = nn.LayerNorm,
        tied: bool = False,
        scaled: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(11, 8), nn.Parameter(torch.randn(1, 9, 8))
        self.blocks = nn.Sequential(Block(norm, scaled, dropout), Block(norm, scaled, dropout))
        self.norm, self.head = norm(8), nn.Linear(8, 11, bias=False)
        if tied:
            self.head.weight = self.tokens.weight
        for name, p in self.named_parameters():
            if "norm" in name:
                nn.init.normal_(p, 1.0 if name.endswith("weight") else 0.0, 0.3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.tokens(ids) + self.positions[:, : ids.shape[1]])))


class Packed(nn.Module):
    """Attention whose queries, keys and values come from one layer, taken apart in the ways people do."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form, self.qkv, self.o = form, nn.Linear(6, 24), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        if self.form in ("unbind", "by hand"):
            q, k, v = self.qkv(x).reshape(n, t, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            parts = self.qkv(x).chunk(3, -1) if self.form == "chunk" else self.qkv(x).split(8, 2)
            q, k, v = (p.view(n, t, 2, -1).transpose(1, 2) for p in parts)
        if self.form == "by hand":
            y = ((q * 4**-0.5) @ k.transpose(-2, -1)).softmax(-1) @ v
        elif self.form == "root of the size":
            y = (q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))).softmax(-1) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v)
        return self.o(y.transpose(1, 2).reshape(n, t, -1))


def widen_all(net: nn.Module, x: Any, times: int = 2) -> tuple[fx.GraphModule, fx.GraphModule, dict[str, int]]:
    gm = fxgrow.capture(net, (x,))
    free = {w.name: times * w.step for w in fxgrow.widths(gm) if w.pinned is None}
    return gm, rewrite(gm, free, generator=torch.Generator().manual_seed(0))[0], free


def assert_same(old: nn.Module, new: nn.Module, x: Any, bound: float = 1e-12) -> None:
    for training in (False, True):
        a, b = old.train(training)(x), new.train(training)(x)
        assert float((a - b).detach().abs().max()) <= bound * float(a.detach().abs().max()), training


def pinned(net: nn.Module, x: Any) -> dict[str, fxgrow.Reason]:
    return {w.name: w.pinned for w in fxgrow.widths(fxgrow.capture(net, (x,))) if w.pinned is not None}


pytestmark = pytest.mark.usefixtures("float64")


IDS = torch.randint(11, (3, 7), generator=torch.Generator().manual_seed(0))
NORMS: dict[str, Callable[[int], nn.Module]] = {
    "layer": nn.LayerNorm,
    "rms": nn.RMSNorm,
    "own": OwnRMSNorm,
    "own with offset": lambda size: OwnRMSNorm(size, 1.0),
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("norm", NORMS)
def test_streams_widen_exactly_and_learn(norm: str, scaled: bool, tied: bool) -> None:
    net = Stream(NORMS[norm], tied, scaled)
    gm, grown, free = widen_all(net, IDS)
    assert free.keys() >= {"tokens", "blocks.0.q", "blocks.0.v", "blocks.0.up", "blocks.1.q"}
    # the norm that is recognised is proved in float32
    assert_same(gm, grown, IDS, 1e-12 if norm in ("layer", "rms") else 1e-6)
    assert grown.get_submodule("blocks.0.norm1").weight.shape == (10,)
    again = {w.name: w.step for w in fxgrow.widths(grown) if w.pinned is None}
    assert again.keys() == free.keys()
    twice, _ = rewrite(grown, again, generator=torch.Generator().manual_seed(1))
    assert_same(gm, twice, IDS, 1e-12 if norm in ("layer", "rms") else 1e-6)
    F.cross_entropy(grown(IDS).flatten(0, 1), IDS.flatten()).backward()
    for name, alive in (("tokens.weight", (slice(None), slice(8, None))), ("blocks.0.o.weight", (slice(8, None),))):
        gradient = grown.get_parameter(name).grad
        assert gradient is not None and bool(gradient[alive].abs().max() > 0), name


def test_a_stream_with_dropout_is_pinned_by_its_layer_norm_alone() -> None:
    """The mean of the units is no mean any more when some are dropped; zeros stay zeros."""
    assert "normalised over the whole axis" in pinned(Stream(dropout=0.1), IDS)["tokens"].message
    assert "tokens" not in pinned(Stream(nn.RMSNorm, dropout=0.1), IDS)


def test_what_computes_something_else_is_followed_by_its_operators() -> None:
    """Half of a norm is no norm; the norm that is written in it is one."""
    gm, grown, free = widen_all(Stream(OwnNormOfHalf), IDS)
    assert "tokens" in free
    assert_same(gm, grown, IDS)


def test_post_norm_streams_are_pinned() -> None:
    class Post(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.norm, self.out = nn.Linear(6, 8), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(self.a(x))
            return self.out(self.norm(x + self.b(x)))

    net, x = Post(), torch.randn(5, 6)
    # until training gives its units weights of their own
    gm, grown, free = widen_all(net, x, 1)
    assert "a" in free
    assert_same(gm, grown, x)
    assert_same(gm, fxgrow.widen(grown, (x,), {"a": 2}), x)
    nn.init.normal_(net.norm.bias)
    assert_same(net, fxgrow.widen(net, (x,), {"a": 2}), x)
    nn.init.normal_(net.norm.weight)
    reason = pinned(net, x)["a"]
    assert reason.code == "norm" and "cannot be kept at their mean" in reason.message


@pytest.mark.parametrize("form", ["unbind", "by hand", "chunk", "split", "root of the size"])
def test_packed_attention_widens_exactly(form: str) -> None:
    x = torch.randn(2, 5, 6)
    gm, grown, free = widen_all(Packed(form), x)
    assert free == {"qkv": 12}
    assert_same(gm, grown, x)
    longer = torch.randn(3, 7, 6)
    assert_same(gm, grown, longer)
    rows = grown.get_parameter("qkv.weight").reshape(3, 2, 6, 6)[:, :, 4:]
    assert bool((rows[1] == 0).all()) and bool((rows[0] != 0).all()) and bool((rows[2] != 0).all())
    grown(x).square().sum().backward()
    gradient = grown.get_parameter("qkv.weight").grad
    assert gradient is not None and bool(gradient.reshape(3, 2, 6, 6)[1, :, 4:].abs().max() > 0)


def test_heads_with_a_mask_per_head_grow_with_it() -> None:
    class Biased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.o = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 3)
            self.bias = nn.Embedding(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            n, t, _ = x.shape
            q, k, v = (layer(x).view(n, t, -1, 4).transpose(1, 2) for layer in (self.q, self.k, self.v))
            mask = self.bias(torch.arange(t)[:, None].expand(t, t)).permute(2, 0, 1)[None]
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            return self.o(y.transpose(1, 2).reshape(n, t, -1))

    x = torch.randn(2, 5, 6)
    gm, grown, free = widen_all(Biased(), x, 1)
    assert free == {"q": 4}
    assert_same(gm, grown, x)
    assert grown.get_submodule("bias").embedding_dim == 3


@pytest.mark.parametrize("make", [lambda: (GPT(width=0.25, depth=2), IDS), lambda: (ViT(width=0.25), None)])
def test_the_transformers_of_models(make: Callable[[], tuple[nn.Module, Any]]) -> None:
    net, x = make()
    x = torch.randn(2, 3, 32, 32) if x is None else x
    gm, grown, free = widen_all(net, x, 1)
    assert len([w for w in fxgrow.widths(gm) if w.pinned is not None]) == 1  # the output
    assert_same(gm, grown, x)


def test_growth_of_attention_lowers_the_loss() -> None:
    """Queries, keys and values grow by what the data say; streams only where they are asked for by name."""
    torch.manual_seed(0)
    x = torch.randn(256, 5, 6)
    y = (x[:, :1] * x[:, 1:2]).sum((1, 2))[:, None, None].expand(-1, 5, 3).contiguous()
    batches = [(x[i : i + 32], y[i : i + 32]) for i in range(0, 256, 32)]
    grown = fxgrow.grow(Packed("unbind"), batches, neurons=6, progress=False)
    growth = grown.meta["fxgrow"]
    assert growth.plan.units == {"qkv": 6} and growth.losses["eval"][1] < growth.losses["eval"][0]
    stream = Stream()
    data = [(IDS, IDS)] * 4
    loss = lambda out, ids: F.cross_entropy(out.flatten(0, 1), ids.flatten())  # noqa: E731
    assert "tokens" not in fxgrow.profile(stream, data, loss, progress=False)
    named = fxgrow.grow(stream, data, loss_fn=loss, neurons={"tokens": 2, "blocks.0.up": 2}, progress=False)
    assert named.meta["fxgrow"].plan.units == {"tokens": 2, "blocks.0.up": 2}
    assert bool(named.get_parameter("blocks.0.q.weight")[:, 8:].abs().max() > 0)


def attend(**options: Any) -> nn.Module:
    class Attend(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.out = nn.Linear(6, 8), nn.Linear(8, 3)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            y, weights = self.attention(x, x, x, **options)
            return self.out(x + y) * (1 if weights is None else weights.sum())

    return Attend()


@pytest.mark.parametrize(
    "options",
    [
        {"need_weights": False},
        {"need_weights": False, "attn_mask": torch.ones(5, 5, dtype=torch.bool).triu(1)},
        {"attn_mask": torch.randn(4, 5, 5), "average_attn_weights": False},
        {"key_padding_mask": torch.tensor([[False] * 5, [False] * 3 + [True] * 2])},
    ],
    ids=["no weights", "causal", "mask per head", "padding"],
)
def test_multihead_attention_of_torch(options: dict[str, Any]) -> None:
    net = attend(**{k: v.double() if v is not False and v.is_floating_point() else v for k, v in options.items()})
    x = torch.randn(2, 5, 6)
    gm, grown, free = widen_all(net, x, 1)
    assert free.keys() >= {"a", "attention.in_proj_weight"}
    assert_same(net, gm, x)
    assert_same(gm, grown, x)


@pytest.mark.parametrize("first", [False, True])
def test_transformer_encoder_of_torch(first: bool) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=first)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    net, x = nn.Sequential(nn.Linear(6, 8), encoder, nn.LayerNorm(8), nn.Linear(8, 3)), torch.randn(2, 5, 6)
    for norm in (m for m in net.modules() if isinstance(m, nn.LayerNorm)):
        nn.init.normal_(norm.weight)
    gm, grown, free = widen_all(net, x, 1)
    assert ("0" in free) == first  # a post-norm stream cannot be made up for
    assert "1.layers.0.self_attn.in_proj_weight" in free and "1.layers.1.linear1" in free
    assert_same(net, gm, x)
    assert_same(gm, grown, x)


def test_a_bias_that_is_a_buffer() -> None:
    """As in DINOv3: the keys' part of the bias is zero and stays so."""

    class Biased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out = nn.Linear(6, 24, bias=False), nn.Linear(8, 3)
            self.q, self.v = nn.Parameter(torch.randn(8)), nn.Parameter(torch.randn(8))
            self.register_buffer("k", torch.zeros(8), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            bias = torch.cat([self.q, self.k, self.v])
            q, k, v = F.linear(x, self.qkv.weight, bias).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4).unbind(0)
            return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    net, x = Biased(), torch.randn(2, 5, 6)
    gm, grown, free = widen_all(net, x)
    assert free == {"qkv": 12}
    assert_same(net, gm, x)
    assert_same(gm, grown, x)
    assert not grown.get_buffer("k").requires_grad and not bool(grown.get_buffer("k").any())


def test_a_divisor_is_not_silenced() -> None:
    """Periods of a rotation, one for each unit and no part of a weight: zero keys are enough."""

    class Rotated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.out = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(6, 5), nn.Linear(5, 3)
            self.register_buffer("periods", torch.rand(8) + 1)

        def forward(self, x: Tensor) -> Tensor:
            turn = (torch.arange(x.shape[1])[:, None] / self.periods).cos()
            q, k = self.q(x) * turn, self.k(x) * turn
            return self.out(F.scaled_dot_product_attention(q, k, self.v(x)))

    net, x = Rotated(), torch.randn(2, 5, 6)
    gm, grown, free = widen_all(net, x)
    assert free == {"q": 2, "v": 2}
    assert_same(net, gm, x)
    assert_same(gm, grown, x)
    assert bool((grown.get_buffer("periods") > 0).all())


class WrittenOut(nn.Module):
    """Inverted bottlenecks with an RMSNorm over the channels in a function, as in MobileNetV5."""

    def __init__(self, form: str, affine: bool) -> None:
        super().__init__()
        self.form = form
        self.expand, self.project = nn.Conv2d(3, 8, 1, bias=False), nn.Conv2d(8, 4, 1)
        self.depth = nn.Conv2d(8, 8, 3, groups=8)
        self.weight = nn.Parameter(torch.randn(8)) if affine else None

    def norm(self, x: Tensor) -> Tensor:
        if self.form == "rsqrt":
            x = x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 0.1)
        elif self.form == "divided":
            x = x / torch.sqrt(0.1 + torch.mean(x * x, dim=1, keepdim=True))
        else:
            squares = x.square()
            x = x * (squares.mean(dim=1, keepdim=True) + 0.1).rsqrt() + 0 * squares
        return x if self.weight is None else x * self.weight.reshape(1, -1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.expand(x))
        if self.weight is not None:
            x = self.depth(F.pad(F.gelu(x), (1, 1, 1, 1)))
        return self.project(x)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("form", ["rsqrt", "divided", "something else"])
def test_rms_norms_written_out_in_a_function(form: str, affine: bool) -> None:
    net, x = WrittenOut(form, affine), torch.randn(2, 3, 5, 5)
    gm, grown, free = widen_all(net, x)
    assert ("expand" in free) == (form != "something else")
    assert_same(net, gm, x)
    assert_same(gm, grown, x)
    if "expand" in free:
        assert_same(gm, fxgrow.widen(grown, (x,), {"expand": 3}), x)


def test_depthwise_convolutions_and_zero_padding_keep_new_units_silent() -> None:
    class Late(nn.Module):
        """The norm behind them."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.depth = nn.Conv1d(3, 8, 1), nn.Conv1d(8, 8, 3, groups=8)
            self.norm, self.out = nn.RMSNorm(8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.norm(self.depth(F.pad(self.a(x), (1, 1))).mT))

    net, x = Late(), torch.randn(2, 3, 5)
    gm, grown, free = widen_all(net, x)
    assert "a" in free
    assert_same(gm, grown, x)


class InputCrossMoment(nn.Module):
    """Attention from one sequence to another, with sizes of its own for keys and values."""

    def __init__(self, sizes: dict[str, int], bias: bool) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(6, 8), nn.Linear(6, sizes.get("kdim", 8))
        self.v, self.out = nn.Linear(6, sizes.get("vdim", 8)), nn.Linear(8, 3)
        self.attention = nn.MultiheadAttention(8, 2, bias=bias, batch_first=True, **sizes)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.attention(self.q(x[:, :3]), self.k(x), self.v(x), need_weights=False)[0])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sizes", [{}, {"kdim": 5, "vdim": 7}])
def test_cross_attention_of_torch(sizes: dict[str, int], bias: bool) -> None:
    net, x = InputCrossMoment(sizes, bias), torch.randn(2, 5, 6)
    gm, grown, free = widen_all(net, x, 1)
    # a packed weight has one column for each entry of the three
    assert free.keys() >= ({"q", "k", "v", "attention.q_proj_weight"} if sizes else {"q", "attention.in_proj_weight"})
    assert_same(net, gm, x)
    assert_same(gm, grown, x)
    data = [(torch.randn(4, 5, 6, dtype=torch.float64), torch.randint(3, (4, 3))) for _ in range(8)]
    loss = lambda out, y: F.cross_entropy(out.flatten(0, 1), y.flatten())  # noqa: E731
    # the parts of a packed weight have no statistics: their new units are random
    named = {"q": 2, "attention.q_proj_weight" if sizes else "attention.in_proj_weight": 2}
    assert fxgrow.grow(net, data, loss_fn=loss, neurons=named, progress=False).meta["fxgrow"].plan.units == named


def test_transformer_of_torch() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.out = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 3)
            layer = nn.TransformerDecoderLayer(8, 2, 16, 0.0, batch_first=True, norm_first=True)
            self.decoder = nn.TransformerDecoder(layer, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.decoder(self.a(x[:, :3]), self.b(x)))

    net, x = Pair(), torch.randn(2, 5, 6)
    gm, grown, free = widen_all(net, x, 1)
    names = {f"decoder.layers.{i}.{part}" for i in (0, 1) for part in ("multihead_attn.in_proj_weight", "linear1")}
    assert free.keys() >= names
    assert_same(net, gm, x)
    assert_same(gm, grown, x)


@pytest.mark.parametrize(
    "between",
    [
        lambda h: 1 / h,
        lambda h: torch.add(h, other=1),
        lambda h: h.masked_fill(torch.ones(8, dtype=torch.bool), 2.0),
        lambda h: h.pow(0),
        lambda h: F.pad(h, (0, 0, 1, 0), value=3.0),
    ],
    ids=["divided by", "plus one", "filled", "power", "padded"],
)
@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_what_loses_the_state_of_new_units_pins_or_stays_exact(
    norm: Callable[[int], nn.Module], between: Callable[[Tensor], Tensor]
) -> None:
    class Between(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm, self.out = nn.Linear(6, 8), norm(8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.norm(between(self.a(x))))

    net, x = Between(), torch.randn(2, 5, 6)
    gm, grown, _ = widen_all(net, x)
    assert_same(gm, grown, x)


def test_a_mean_over_more_than_the_units_is_no_mean_of_them() -> None:
    class Flat(nn.Module):
        """The norm reads five entries for each unit."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm, self.out = nn.Conv1d(2, 4, 1), nn.LayerNorm(20), nn.Linear(20, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.norm(self.a(x).flatten(1)))

    class Shared(nn.Module):
        """One layer writes the normalised width and another one."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm = nn.Linear(6, 12), nn.LayerNorm(8)
            self.one, self.other = nn.Linear(8, 3), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            h, rest = self.a(x).split([8, 4], -1)
            return self.one(self.norm(h)) + self.other(rest)

    for net, x in ((Flat(), torch.randn(2, 2, 5)), (Shared(), torch.randn(2, 6))):
        gm, grown, _ = widen_all(net, x)
        assert_same(gm, grown, x)
        assert any(r.code == "norm" for r in pinned(net, x).values())
