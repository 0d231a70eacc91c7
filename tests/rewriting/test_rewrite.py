"""The rewrite: old entries stay, new ones do nothing yet, sizes are rewritten, and whatever fails changes nothing."""

from __future__ import annotations

import copy
import gc
import linecache
import math

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import fxgrow
from fxgrow.analysis.analyse import widths
from fxgrow.errors import PlanError, RewriteError
from fxgrow.rewriting.rewrite import rewrite
from fxgrow.rewriting.values import Values
from fxgrow.rewriting.verify import check_function, check_shapes
from fxgrow.tracing.capture import capture


class Net(nn.Module):
    """A residual block, a split, a view with literal sizes, an unused layer and a tied one."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(2, 2)
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.mid = nn.Conv2d(8, 6, 3, padding=1)
        self.back = nn.Conv2d(6, 8, 1)
        self.fc = nn.Linear(8 * 2 * 2, 5)
        self.head = nn.Linear(5, 2)
        self.register_buffer("offset", torch.randn(8, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.bn(self.conv(x)).relu() + self.offset
        h = h + self.back(self.mid(h).relu())
        return self.head(self.fc(F.adaptive_avg_pool2d(h, 2).view(-1, 8 * 2 * 2)).tanh())


X = torch.randn(3, 3, 6, 6, dtype=torch.float64)


def captured() -> tuple[nn.Module, fx.GraphModule]:
    torch.manual_seed(0)
    model = Net().double()
    return model, capture(model, (X,))


def close(a: nn.Module, b: nn.Module, x: Tensor = X, training: bool = False) -> bool:
    """Whether two networks give the same outputs; running statistics are left as they were."""
    outputs = []
    for module in (a, b):
        state = [buffer.clone() for buffer in module.buffers()]
        with torch.no_grad():
            outputs.append(module.train(training)(x))
        for buffer, before in zip(module.buffers(), state, strict=True):
            buffer.copy_(before)
    return torch.allclose(*outputs, rtol=1e-10, atol=1e-12)


def test_old_entries_are_bit_for_bit_where_the_index_says() -> None:
    model, gm = captured()
    grown, index = rewrite(gm, {"conv": 2, "mid": 1, "fc": 3})
    old, new = dict(model.state_dict()), dict(grown.state_dict())
    for name, tensor in old.items():
        places = index.get(name, (None,) * tensor.dim())
        picked = new[name]
        for dim, positions in enumerate(places):
            if positions is not None:
                picked = picked.index_select(dim, positions)
        assert torch.equal(picked, tensor), name
    assert index["fc.weight"][1] is not None and len(index["fc.weight"][1]) == 32
    assert index.keys() - {"offset"} == {n for n in old if old[n].shape != new[n].shape}


def test_new_entries() -> None:
    """Rows random and not all alike, columns zero, biases zero, norms the identity, other followers the mean."""
    _, gm = captured()
    grown, _ = rewrite(gm, {"conv": 2, "mid": 3})
    state = dict(grown.state_dict())
    assert state["conv.weight"][8:].std() > 0.05 and not torch.equal(*state["conv.weight"][8:])
    assert state["mid.weight"][:6, 8:].abs().max() == 0 and state["mid.weight"][6:].abs().min() > 0
    assert state["fc.weight"][:, 32:].abs().max() == 0
    assert state["conv.bias"][8:].abs().max() == 0
    identity = {"weight": 1, "bias": 0, "running_mean": 0, "running_var": 1}
    assert all((state[f"bn.{n}"][8:] == v).all() for n, v in identity.items())
    offset = grown.get_buffer("offset")
    assert torch.allclose(offset[8:], offset[:8].mean())


def test_rows_have_the_scale_of_kaiming() -> None:
    net = nn.Sequential(nn.Linear(400, 3), nn.ReLU(), nn.Linear(3, 2))
    grown, _ = rewrite(capture(net, (torch.randn(2, 400),)), {"0": 200})
    std = grown.get_parameter("0.weight")[3:].std().item()
    assert abs(std / math.sqrt(2 / 400) - 1) < 0.02


def test_the_original_is_left_as_it_was() -> None:
    model, gm = captured()
    before, code = copy.deepcopy(model.state_dict()), gm.code
    model(X).sum().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    with torch.no_grad():
        expected = model.eval()(X)
    grown, _ = rewrite(gm, {"conv": 1, "fc": 1})
    assert gm.code == code and all(torch.equal(a, before[n]) for n, a in model.state_dict().items() if "bn." not in n)
    assert all(torch.equal(p.grad, gradients[n]) for n, p in model.named_parameters() if p.grad is not None)
    assert all(p.grad is None for p in grown.parameters())
    with torch.no_grad():
        for p in grown.parameters():
            p.zero_()
        assert torch.equal(model(X), expected)


def test_names_classes_and_flags_stay() -> None:
    model, gm = captured()
    model.mid.requires_grad_(False)
    model.bn.eval()
    with pytest.raises(PlanError, match="'mid' cannot change: frozen at mid: mid.weight is frozen"):
        rewrite(gm, {"mid": 1})
    grown, _ = rewrite(gm, {"fc": 2})
    assert list(grown.state_dict()) == list(model.state_dict())
    assert "offset" in dict(grown.named_buffers()) and "unused.weight" in grown.state_dict()
    assert {n: type(m) for n, m in grown.named_modules() if n} == {n: type(m) for n, m in model.named_modules() if n}
    assert {n for n, p in grown.named_parameters() if not p.requires_grad} == {"mid.weight", "mid.bias"}
    assert not grown.get_submodule("bn").training and grown.get_submodule("mid").training
    fc, head = grown.get_submodule("fc"), grown.get_submodule("head")
    assert (fc.out_features, fc.in_features, head.in_features) == (7, 32, 7)


def test_literal_sizes_are_rewritten_by_what_they_mean() -> None:
    """64 is the number of positions and of channels; only one of them grows."""

    class Sizes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.out = nn.Conv2d(1, 64, 1), nn.Linear(64, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.a(x).view(-1, 64, 64).transpose(1, 2).reshape(-1, 64))

    model = Sizes().double()
    x = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    grown, _ = rewrite(capture(model, (x,)), {"a": 3})
    assert "view(-1, 67, 64)" in grown.code and "reshape(-1, 67)" in grown.code
    assert close(model, grown, x)


def test_one_after_the_other_is_both_at_once() -> None:
    model, gm = captured()
    both, _ = rewrite(gm, {"conv": 2, "fc": 3})
    first, _ = rewrite(gm, {"fc": 3})
    second, _ = rewrite(first, {"conv": 2})
    shapes = {n: t.shape for n, t in both.state_dict().items()}
    assert {n: t.shape for n, t in second.state_dict().items()} == shapes
    assert [w for w in widths(both)] == [w for w in widths(second)]
    assert close(model, second) and close(model, second, training=True)


def test_tied_stays_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 6)
            self.c.weight = self.b.weight
            self.out = nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.c(self.b(self.a(x)).relu()) + F.linear(self.a(x), self.c.weight))

    model = Tied().double()
    x = torch.randn(3, 4, dtype=torch.float64)
    grown, _ = rewrite(capture(model, (x,)), {"a": 2})
    assert grown.get_parameter("c.weight") is grown.get_parameter("b.weight")
    assert grown.get_parameter("b.weight").shape == (8, 8)
    assert len(list(grown.parameters())) == len(list(model.parameters()))
    assert close(model, grown, x)


def test_given_values_are_written() -> None:
    _, gm = captured()
    rows, columns, delta = torch.randn(2, 32).double(), torch.randn(2, 2).double(), torch.randn(2, 5).double()
    values = Values(
        new={"fc.weight": {("fc", 0): rows}, "head.weight": {("fc", 1): columns}}, delta={"head.weight": delta}
    )
    before = gm.get_parameter("head.weight").detach().clone()
    grown, index = rewrite(gm, {"fc": 2}, values)
    assert torch.equal(grown.get_parameter("fc.weight")[5:], rows)
    assert torch.equal(grown.get_parameter("head.weight")[:, 5:], columns)
    assert torch.equal(grown.get_parameter("head.weight")[:, :5], before + delta)
    assert set(index) == {"fc.weight", "fc.bias", "head.weight"}
    unchanged, index = rewrite(gm, {}, Values(delta={"head.weight": delta}))
    assert index == {} and torch.equal(unchanged.get_parameter("head.weight"), before + delta)


def test_without_a_corner_new_rows_do_not_read_new_units() -> None:
    _, gm = captured()
    grown, _ = rewrite(gm, {"conv": 2, "mid": 2}, Values(new_units_see_each_other=False))
    assert grown.get_parameter("mid.weight")[:, 8:].abs().max() == 0
    assert grown.get_parameter("mid.weight")[6:, :8].abs().min() > 0


def test_same_generator_same_rows() -> None:
    _, gm = captured()
    draws = [rewrite(gm, {"mid": 2}, generator=torch.Generator().manual_seed(s))[0] for s in (1, 1, 2)]
    first, again, other = (d.get_parameter("mid.weight")[6:] for d in draws)
    assert torch.equal(first, again) and not torch.equal(first, other)
    state = torch.get_rng_state()
    rewrite(gm, {"mid": 2}, generator=torch.Generator().manual_seed(1))
    assert torch.equal(torch.get_rng_state(), state)


def test_half_precision_and_many_widths_in_one_axis() -> None:
    """More than a few runs of old entries in one axis: channel shuffle of a concatenation, in bfloat16."""

    class Shuffle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList(nn.Conv2d(2, 4, 1) for _ in range(6))
            self.mix, self.out = nn.Conv2d(24, 4, 1), nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.cat([p(x) for p in self.parts], 1)
            b, c, height, width = h.shape
            h = h.view(b, 12, c // 12, height, width).transpose(1, 2).reshape(b, c, height, width)
            return self.out(self.mix(h).relu())

    model = Shuffle().to(torch.bfloat16)
    x = torch.randn(2, 2, 3, 3, dtype=torch.bfloat16)
    gm = capture(model, (x,))
    free = {w.name: w.step for w in widths(gm) if w.pinned is None}
    grown, _ = rewrite(gm, free)
    assert grown.get_parameter("mix.weight").dtype == torch.bfloat16
    with torch.no_grad():
        assert torch.allclose(model(x).float(), grown(x).float(), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("additions", "message"),
    [
        ({"nowhere": 1}, "no width named 'nowhere'.*free ones here: conv, mid, fc"),
        ({"head": 1}, "'head' cannot change: output at"),
        ({"conv": -1}, "-1 units for width 'conv'.*step 1; try 1"),
    ],
)
def test_refusals_say_what_to_do(additions: dict[str, int], message: str) -> None:
    _, gm = captured()
    with pytest.raises(PlanError, match=message):
        rewrite(gm, additions)


def test_a_number_that_is_no_multiple_of_the_step() -> None:
    net = nn.Sequential(nn.Conv2d(2, 8, 1), nn.GroupNorm(4, 8), nn.Conv2d(8, 2, 1))
    gm = capture(net, (torch.randn(2, 2, 3, 3),))
    with pytest.raises(PlanError, match="3 units for width '0'.*step 2; try 4"):
        rewrite(gm, {"0": 3})
    grown, _ = rewrite(gm, {"0": 4})
    assert (grown.get_submodule("1").num_groups, grown.get_submodule("1").num_channels) == (6, 12)


def test_checks_find_a_broken_graph() -> None:
    """The checks of a rewrite are able to fail."""
    _, gm = captured()
    conv = next(n for n in gm.graph.nodes if n.name == "conv")
    with pytest.raises(RewriteError, match=r"Node 'conv' \(conv\) has shape .* expected \(3, 9, 6, 6\)"):
        check_shapes(gm, {conv: (3, 9, 6, 6)})
    other, _ = rewrite(gm, {})
    with torch.no_grad():
        other.get_parameter("head.bias").add_(0.1)
    with pytest.raises(RewriteError, match="should compute the same function, but its output differs by 0.1"):
        check_function(gm, other, (X,))
    other.get_submodule("bn").weight = nn.Parameter(torch.ones(9).double())
    with pytest.raises(RewriteError, match="weight should contain 8 elements not 9"):
        check_shapes(other, {})


def test_the_text_of_a_graph_goes_with_its_code() -> None:
    """torch.fx keeps it for tracebacks; a run that grows without end would only ever add to it."""
    gm = capture(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), (torch.randn(2, 3),))
    texts = len(linecache.cache)
    grown, _ = rewrite(gm, {"0": 2})
    name = type(grown).forward.__code__.co_filename
    assert "def forward(self" in "".join(linecache.getlines(name))
    del grown
    gc.collect()
    assert name not in linecache.cache
    assert len(linecache.cache) <= texts


class Autoregressive(nn.Module):
    """An output may only depend on inputs before it: each hidden unit has a place, and masks follow from the places."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(5, 8), nn.Linear(8, 7), nn.Linear(7, 5)
        places = torch.arange(5), torch.arange(8) % 4, torch.arange(7) % 4
        self.register_buffer("a", (places[1][:, None] >= places[0]).float())
        self.register_buffer("b", (places[2][:, None] >= places[1]).float())
        self.register_buffer("c", (places[0][:, None] > places[2]).float())

    def forward(self, x: Tensor) -> Tensor:
        h = F.linear(x, self.a * self.first.weight, self.first.bias).tanh()
        h = F.linear(h, self.second.weight * self.b, self.second.bias).tanh()
        return F.linear(h, self.c * self.last.weight, self.last.bias)


def test_new_units_are_masked_as_old_ones() -> None:
    """Whatever new weights become, no output depends on inputs that its mask hides."""
    torch.manual_seed(0)
    net, x = Autoregressive().double(), torch.randn(3, 5, dtype=torch.float64)
    wide = fxgrow.widen(net, (x,), {"first": 11, "second": 3})
    torch.testing.assert_close(wide(x), net(x), rtol=1e-10, atol=1e-10)
    with torch.no_grad():
        for p in wide.parameters():
            p.normal_()
    jacobian = torch.autograd.functional.jacobian(lambda v: wide(v[None])[0], x[0])
    assert jacobian.triu().abs().max() == 0 and jacobian.tril(-1).ne(0).sum() == 10


def test_new_units_of_a_tied_autoencoder_learn() -> None:
    """Their only weights start at zero, as the function must stay: a bias of zero would leave them dead."""
    torch.manual_seed(0)

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.bias = nn.Linear(6, 4), nn.Parameter(torch.zeros(6))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(self.encoder(x).relu(), self.encoder.weight.t(), self.bias)

    model, x = Tied().double(), torch.randn(5, 6, dtype=torch.float64)
    wide = fxgrow.widen(model, (x,), {"encoder[0]": 3})
    torch.testing.assert_close(wide(x), model(x), rtol=1e-10, atol=1e-10)
    (wide(x) - x).square().sum().backward()
    weight = wide.get_parameter("encoder.weight")
    assert weight.grad is not None and weight.shape == (7, 6) and weight.grad[4:].abs().amin() > 0
