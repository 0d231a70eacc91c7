"""Code that no graph can follow: the smallest module around it is one node, and everything else grows as ever."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxgrow
from fxgrow.errors import CaptureError


class Decides(nn.Module):
    """Takes one of two layers, by the values of its input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return self.up(x)
        return self.down(x)


class Around(nn.Module):
    """A norm with statistics, the decision, and another layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.inner, self.after = nn.BatchNorm1d(width), Decides(width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.inner(self.norm(x)).relu())


class Gathers(nn.Module):
    """As many rows as the data say, and a number of them that is no tensor."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width)
        self.calls = 0

    def forward(self, x: Tensor) -> dict[str, Any]:
        self.calls += 1
        best = self.norm(x)[x[:, 0].argsort().tolist()]
        return {"rows": [best, best.flip(0)], "scale": float(best.detach().abs().max() * 0 + 2)}


class Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


class Quantised(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Round.apply(x * 16) / 16


class Net(nn.Module):
    """Layers in front of something, layers behind it: `first` and `last` are widths that never meet it."""

    def __init__(self, middle: nn.Module, read: Callable[[Any], Tensor] = lambda out: out) -> None:
        super().__init__()
        self.first, self.into = nn.Linear(4, 6), nn.Linear(6, 5)
        self.middle, self.read = middle, read
        self.out, self.last = nn.Linear(5, 7), nn.Linear(7, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.read(self.middle(self.into(self.first(x).relu())))
        return self.last(self.out(h).relu())


class Sums(nn.Module):
    """Takes a list of tensors, as detectors take images."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(3, 8), nn.Linear(8, 2)

    def forward(self, images: list[Tensor]) -> list[Tensor]:
        return [self.head(self.layer(image).relu()) for image in images]


class Rooted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        if h.sum() > 0:  # in the root
            h = -h
        return self.b(h)


#: a middle, what is read of its output, and the path of the opaque module
MIDDLES: dict[str, tuple[Callable[[], nn.Module], Callable[[Any], Tensor], str]] = {
    "itself": (lambda: Decides(5), lambda out: out, "middle"),
    "inside-another": (lambda: Around(5), lambda out: out, "middle.inner"),
    "in-a-list": (lambda: nn.Sequential(nn.Linear(5, 5), Decides(5)), lambda out: out, "middle.1"),
    "structured": (lambda: Gathers(5), lambda out: out["rows"][0] * out["scale"] + out["rows"][1], "middle"),
}


@pytest.mark.parametrize("name", MIDDLES)
def test_what_does_not_touch_it_grows(name: str) -> None:
    torch.manual_seed(0)
    middle, read, path = MIDDLES[name]
    model = Net(middle(), read).double()
    x = torch.randn(6, 4, dtype=torch.float64)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    gm = fxgrow.capture(model, (x,))
    assert [n.target for n in gm.graph.nodes if "opaque" in n.meta] == [path]
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert getattr(model.middle, "calls", 0) == 0
    found = {w.name: w.pinned for w in fxgrow.widths(gm)}
    assert found["first"] is None and found["out"] is None
    touching = {"itself": "into", "inside-another": "into", "in-a-list": "middle.0", "structured": "into"}[name]
    why = found[touching]
    assert why is not None and why.code == "opaque"
    assert "test_opaque.py" in why.message and f"module '{path}'" in why.message
    wide = fxgrow.widen(gm, None, {"first": 3, "out": 2})
    again = fxgrow.widen(wide, None, {"first": 1})
    assert again.get_submodule("first").out_features == 10
    for batch in (x, -x, torch.randn(3, 4, dtype=torch.float64)):
        for training in (False, True):
            model.train(training), again.train(training)
            for m in (model, again):
                m.load_state_dict({k: v for k, v in state.items() if "running" in k or "batches" in k}, strict=False)
            assert torch.allclose(again(batch), model(batch), rtol=1e-10, atol=1e-12)


def test_explain_says_what_is_opaque_why_and_how_much() -> None:
    model = Net(Around(5))
    explained = fxgrow.explain(model, (torch.randn(6, 4),))
    (opaque,) = explained.opaque
    assert (opaque.name, opaque.parameters) == ("middle.inner", 60)
    assert "its code looks at the values of a tensor" in opaque.reason and "if x.sum() > 0:" in opaque.reason
    text = str(explained)
    share = 60 / sum(p.numel() for p in model.parameters())
    assert "opaque module" in text and "middle.inner" in text and f"{share:.1%}" in text
    assert not fxgrow.explain(Net(nn.ReLU()), (torch.randn(6, 4),)).opaque
    assert "opaque" not in str(fxgrow.explain(Net(nn.ReLU()), (torch.randn(6, 4),)))


def test_growth_with_the_default_method() -> None:
    torch.manual_seed(0)
    model = Net(Around(5))
    batches = [(torch.randn(32, 4), torch.randn(32, 2)) for _ in range(6)]
    grown = fxgrow.grow(model, batches, neurons=4, progress=False)
    added = {w.name: w.size for w in fxgrow.widths(grown)}
    assert (added["first"], added["into"], added["out"]) == (10, 5, 11)
    loss = nn.functional.mse_loss(grown(batches[0][0]), batches[0][1])
    loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in grown.parameters())


def test_a_custom_autograd_function_needs_no_opaque_module() -> None:
    """Its operator is tried: elementwise, so that even the width in front of it is free; its backward stays."""
    model = Net(Quantised()).double()
    x = torch.randn(6, 4, dtype=torch.float64)
    assert not fxgrow.explain(model, (x,)).opaque
    found = {w.name: w.pinned for w in fxgrow.widths(fxgrow.capture(model, (x,)))}
    assert found["first"] is None and found["into"] is None and found["out"] is None
    wide = fxgrow.widen(model, (x,), {"into": 3})
    assert torch.allclose(wide(x), model(x), rtol=1e-10, atol=1e-12)
    wide(x).sum().backward()
    assert wide.get_parameter("into.weight").grad.abs().sum() > 0


def test_a_list_of_tensors() -> None:
    model = Sums().double()
    images = [torch.randn(n, 3, dtype=torch.float64) for n in (5, 7)]
    gm = fxgrow.capture(model, (images,))
    assert fxgrow.widths(gm)[0].pinned is None
    wide = fxgrow.widen(gm, None, {"layer": 4})
    for a, b in zip(wide(images), model(images), strict=True):
        assert torch.allclose(a, b, rtol=1e-10)


def test_in_the_root_it_is_refused_with_module_and_line() -> None:
    with pytest.raises(CaptureError, match=r"Cannot capture the model \(Rooted\) at .*test_opaque.py:\d+: `if h.sum"):
        fxgrow.capture(Rooted(), (torch.randn(2, 3),))


class Fails(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x @ torch.ones(99, 1)


def test_what_fails_on_real_tensors_too_is_told_where_it_fails() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.ReLU(), Fails()))
    with pytest.raises(CaptureError, match=r"module '1.1' \(Fails\) at .*`return x @ torch.ones"):
        fxgrow.capture(model, (torch.randn(2, 3),))


class Box:
    """Not a thing that a graph can hold."""

    def __init__(self, x: Tensor) -> None:
        self.x = x


class Opens(nn.Module):
    def forward(self, box: Box) -> Tensor:
        return box.x if box.x.sum() > 0 else -box.x


class Boxes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.opens, self.layer = Opens(), nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.opens(Box(x)))


def test_the_module_around_it_where_it_cannot_be_a_node() -> None:
    model = Net(Boxes()).double()
    x = torch.randn(6, 4, dtype=torch.float64)
    (opaque,) = fxgrow.explain(model, (x,)).opaque
    assert opaque.name == "middle" and "module 'middle.opens' (Opens)" in opaque.reason
    wide = fxgrow.widen(model, (x,), {"first": 2, "out": 2})
    assert torch.allclose(wide(x), model(x), rtol=1e-10, atol=1e-12)


class Finds(nn.Module):
    """A detector in small: its own method keeps what scores well, and counts it."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(3, 8), nn.Linear(8, 2)
        self.threshold = 0.1

    def keep(self, scores: Tensor) -> list[Tensor]:
        best = scores[scores[:, 0] > self.threshold]
        count = min(3, len(best))
        return [best[:count], best[:count].flip(0)] if self.training else [best[:count]]

    def forward(self, x: Tensor) -> dict[str, Any]:
        scores = self.head(self.body(x).relu())
        return {"all": scores, "kept": self.keep(scores)[0]}


def positive(x: Tensor) -> Tensor:
    return x if x.sum() > 0 else -x


class Calls(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 8), nn.Linear(8, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(positive(self.b(self.a(x).relu())))


def test_a_method_of_the_root_that_counts_data_is_one_node() -> None:
    torch.manual_seed(0)
    model = Finds().double()
    x = torch.randn(7, 3, dtype=torch.float64)
    gm = fxgrow.capture(model, (x,))
    (opaque,) = fxgrow.explain(gm).opaque
    assert opaque.name == "keep_opaque" and opaque.parameters == 0
    assert "keep" not in vars(model) and not any("whole" in n for n, _ in model.named_modules())
    grown = fxgrow.widen(gm, (x,), {"body": 3})
    for data in (x, torch.randn(40, 3, dtype=torch.float64), -x):
        for mode in (True, False):
            found, expected = grown.train(mode)(data), model.train(mode)(data)
            torch.testing.assert_close(found["all"], expected["all"])
            torch.testing.assert_close(found["kept"], expected["kept"])
    assert list(grown.state_dict()) == list(model.state_dict())


def test_a_function_that_decides_is_one_node() -> None:
    torch.manual_seed(0)
    model = Calls().double()
    x = torch.randn(5, 3, dtype=torch.float64)
    before = positive
    grown = fxgrow.widen(model, (x,), {"a": 4})
    assert positive is before
    free = {w.name: w.pinned for w in fxgrow.widths(grown)}
    assert free["a"] is None and free["b"] is not None and free["b"].code == "opaque"
    for data in (x, -x, torch.randn(9, 3, dtype=torch.float64)):
        torch.testing.assert_close(grown(data), model(data))


class Sized:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.sizes = tensor, [tuple(tensor.shape)]


class Measures(nn.Module):
    """Nothing inside to grow and two modes: one node, which puts out an object of the model's own."""

    def forward(self, x: Tensor) -> Sized:
        return Sized(x * 1.0 if self.training else x)


class Reads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.measure, self.a, self.b = Measures(), nn.Linear(3, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        sized = self.measure(x)
        count = sized.sizes[0][0]
        return self.b(self.a(sized.tensor).relu()) * count


def test_numbers_in_an_object_of_the_model_follow_the_input() -> None:
    torch.manual_seed(0)
    model = Reads().double()
    grown = fxgrow.widen(model, (torch.randn(5, 3).double(),), {"a": 2})
    for n in (5, 9):
        x = torch.randn(n, 3, dtype=torch.float64)
        torch.testing.assert_close(grown(x), model(x))


def test_another_number_of_images_is_refused() -> None:
    model = Sums()
    gm = fxgrow.capture(model, ([torch.randn(2, 3), torch.randn(4, 3)],))
    with pytest.raises(CaptureError, match="length of the input 'images'"):
        gm([torch.randn(2, 3)] * 3)


class Decodes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 7), nn.Linear(7, 3)

    def decode(self, y: Tensor) -> Tensor:
        return y.sigmoid() if float(y.detach().max()) > -9 else y

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.a(x).relu())
        return y if self.training else self.decode(y) * 1.0


@pytest.mark.parametrize("training", [False, True])
def test_a_method_is_applied_once_wherever_its_module_sits_and_in_its_mode_alone(training: bool) -> None:
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), Decodes(), nn.Linear(3, 3)).train(training)
    names = list(net._modules)
    x = torch.randn(4, 6)
    gm = fxgrow.capture(net, (x,))
    for mode in (training, not training):
        net.train(mode), gm.train(mode)
        assert torch.equal(gm(x), net(x))
    assert list(net._modules) == names


def padding_of(lengths: Tensor) -> Tensor:
    """Its size is that of the longest sequence, which only the values say."""
    steps = torch.arange(int(lengths.max().item()), device=lengths.device)
    return steps[None] >= lengths[:, None]


class Padded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.attend, self.o = nn.Linear(4, 6), nn.MultiheadAttention(6, 2, batch_first=True), nn.Linear(6, 2)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        padding = padding_of(lengths + 1 - 1)
        h = self.a(x).masked_fill(padding[..., None], 0.0)
        return self.o(h + self.attend(h, h, h, key_padding_mask=padding, need_weights=False)[0])


def test_sizes_that_data_decide_are_those_of_the_example() -> None:
    torch.manual_seed(0)
    model = Padded().double().eval()
    gm = fxgrow.capture(model, (torch.randn(2, 5, 4).double(), torch.tensor([5, 3])))
    assert [n.name for n in gm.graph.nodes if "opaque" in n.meta] == ["padding_of_opaque"]
    wider = fxgrow.widen(gm, None, {w.name: w.step for w in fxgrow.widths(gm) if w.pinned is None})
    assert sum(p.numel() for p in wider.parameters()) > sum(p.numel() for p in model.parameters())
    for n, steps in ((2, 5), (3, 7), (4, 2)):
        x, lengths = torch.randn(n, steps, 4).double(), torch.arange(n) % steps + 1
        lengths[0] = steps
        torch.testing.assert_close(gm(x, lengths), model(x, lengths))
        torch.testing.assert_close(wider(x, lengths), model(x, lengths))
