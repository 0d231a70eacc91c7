"""`into="module"`: the user's own class comes back wider, or an error says which line of its code is in the way."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxgrow
from fxgrow.graph.evaluate import TOLERANCE


class Classifier(nn.Module):
    """Methods, plain attributes, a tied and an unused layer."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(6, 8)
        self.norm = nn.BatchNorm1d(8)
        self.decode = nn.Linear(8, 3)
        self.alias = self.decode
        self.unused = nn.Linear(2, 2)
        self.labels = ["a", "b", "c"]

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(F.relu(self.norm(self.encode(x))))

    @torch.no_grad()
    def predict(self, x: Tensor) -> list[str]:
        return [self.labels[i] for i in self(x).argmax(1)]


class Viewed(nn.Module):
    """Flattens its hidden units with `size`, which each subclass gets in its own way."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 3)
        self.hidden, self.batches, self.half = 8, 8, 4

    def size(self, x: Tensor) -> int:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).tanh().view(-1, self.size(x)))


class Attribute(Viewed):
    def size(self, x: Tensor) -> int:
        return self.hidden


class Literal(Viewed):
    def size(self, x: Tensor) -> int:
        return 8


class Doubled(Viewed):
    def size(self, x: Tensor) -> int:
        return 2 * self.half


class Scaled(Attribute):
    """Its attribute stands in two places, of which the graph can change one only."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / self.hidden


def every_width(model: nn.Module, inputs: Any, times: int = 1) -> dict[str, int]:
    found = fxgrow.widths(fxgrow.capture(model, inputs))
    return {w.name: w.step * times for w in found if w.pinned is None}


def leaves(out: Any) -> list[Tensor]:
    return [t for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, Tensor)]


def widened(model: nn.Module, inputs: Any, units: dict[str, int], **options: Any) -> nn.Module:
    """Widens into the module; its outputs are the old ones, its parameters those of the graph, the model as before."""
    before = {name: (t, t.clone()) for name, t in model.state_dict(keep_vars=True).items()}
    sizes = {name: dict(vars(m)) for name, m in model.named_modules()}
    grown = fxgrow.widen(model, inputs, units, into="module", **options)
    graph = fxgrow.widen(model, inputs, units)
    assert type(grown) is type(model)
    assert {n: p.shape for n, p in grown.named_parameters()} == {n: p.shape for n, p in graph.named_parameters()}
    assert list(grown.state_dict()) == list(model.state_dict())
    assert all(model.state_dict(keep_vars=True)[n] is t and torch.equal(t, old) for n, (t, old) in before.items())
    assert all(vars(m).keys() == sizes[name].keys() for name, m in model.named_modules())
    for training in (False, True):
        for module in (model, grown):
            module.train(training)
        with torch.no_grad():
            a, b = (leaves(m(**inputs) if isinstance(inputs, dict) else m(*inputs)) for m in (model, grown))
        assert len(a) == len(b) > 0
        for x, y in zip(a, b, strict=True):
            assert (x - y).abs().max() <= TOLERANCE[x.dtype] * x.abs().max()
    return grown


def test_class_methods_and_attributes_survive() -> None:
    model, x = Classifier(), torch.randn(16, 6)
    grown = widened(model, (x,), {"encode": 3})
    assert isinstance(grown, Classifier)
    assert (grown.encode.out_features, grown.norm.num_features, grown.decode.in_features) == (11, 11, 11)
    assert grown.alias is grown.decode
    assert grown.unused is not model.unused and grown.labels is not model.labels
    assert grown.eval().predict(x) == model.eval().predict(x)
    assert "meta" not in vars(model)


def test_growing_twice_and_the_record() -> None:
    model, x = Classifier(), torch.randn(64, 6)
    batches = [(part, part.sum(1).gt(0).long()) for part in x.split(16)]
    once = fxgrow.grow(model, batches, neurons=2, into="module", progress=False)
    twice = fxgrow.grow(once, batches, neurons=1, into="module", progress=False)
    assert type(twice) is Classifier
    assert [m.encode.out_features for m in (model, once, twice)] == [8, 10, 11]
    assert isinstance(once.meta["fxgrow"], fxgrow.Growth)
    assert twice.meta["fxgrow"].plan.units == {"encode": 1}
    assert once.meta["fxgrow"].plan.units == {"encode": 2}
    graph = fxgrow.grow(once, batches, neurons=1, progress=False)
    assert all(torch.equal(t, twice.state_dict()[name]) for name, t in graph.state_dict().items())


def test_own_meta_is_left_alone() -> None:
    model = Classifier()
    model.meta = {"author": "me"}
    x = torch.randn(32, 6)
    grown = fxgrow.grow(model, [(x, x[:, 0].gt(0).long())] * 4, neurons=1, into="module", progress=False)
    assert grown.meta == {"author": "me"}


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adam])
def test_optimizer_owns_the_module_once(make: Callable[..., torch.optim.Optimizer]) -> None:
    model, x = Classifier(), torch.randn(16, 6)
    optimizer = make(model.parameters(), lr=1e-2)
    F.cross_entropy(model(x), torch.zeros(16, dtype=torch.long)).backward()
    optimizer.step()
    grown = fxgrow.widen(model, (x,), {"encode": 3}, optimizer=optimizer, into="module")
    owned = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert owned == [id(p) for p in grown.parameters()]
    before = {name: p.detach().clone() for name, p in grown.named_parameters()}
    F.cross_entropy(grown(x), torch.zeros(16, dtype=torch.long)).backward()
    optimizer.step()
    moved = {name for name, p in grown.named_parameters() if not torch.equal(p, before[name])}
    assert {"encode.weight", "norm.weight", "decode.weight"} <= moved


def test_attribute_that_holds_the_size_is_set() -> None:
    """Two attributes are 8; the one that the code reads is found."""
    grown = widened(Attribute(), (torch.randn(5, 4),), {"first": 3})
    assert (grown.hidden, grown.batches, grown.half) == (11, 8, 4)


class Joined(Viewed):
    """The shape is put together first, as in many Hugging Face models."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x).tanh()
        return self.last(y.view(*(y.size()[:-1] + (self.hidden,))))


def test_shape_put_together_from_an_attribute() -> None:
    grown = widened(Joined(), (torch.randn(5, 4),), {"first": 3})
    assert (grown.hidden, grown.batches) == (11, 8)


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (Literal, "the model has no attribute that its code reads it from"),
        (Doubled, "the model has no attribute that its code reads it from"),
        (Scaled, "with hidden = 12 instead, node 'truediv' at "),
    ],
)
def test_refused_with_the_line(kind: type[Viewed], why: str) -> None:
    """A literal, a size made from another number, an attribute that also scales the output."""
    model, x = kind(), torch.randn(5, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(fxgrow.PlanError) as caught:
        fxgrow.widen(model, (x,), {"first": 4}, into="module", optimizer=optimizer)
    text = str(caught.value)
    assert "node 'view'" in text and "test_into_module.py:" in text and "`return self.last(self.first(x).tanh()" in text
    assert f"takes the size 8, which growth makes 12; {why}" in text and 'into="graph"' in text
    # nothing has changed, and the graph can grow
    assert {id(p) for p in model.parameters()} == {id(p) for g in optimizer.param_groups for p in g["params"]}
    assert model.hidden == 8
    assert fxgrow.widen(model, (x,), {"first": 4})(x).shape == (5, 3)


def test_code_that_does_something_else_at_the_new_size() -> None:
    """The graph took the branch of a small layer; the module's own code would take the other."""

    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            return self.b(y.relu() if self.a.out_features < 8 else y.tanh())

    with pytest.raises(fxgrow.PlanError, match=r"node '\w+' at .*test_into_module.py:\d+.*relu.*in the grown graph"):
        fxgrow.widen(Branch(), (torch.randn(3, 4),), {"a": 4}, into="module")
    assert type(widened(Branch(), (torch.randn(3, 4),), {"a": 1})) is Branch


def test_bad_arguments() -> None:
    net, x = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), torch.randn(2, 4)
    with pytest.raises(fxgrow.PlanError, match="into='class'"):
        fxgrow.widen(net, (x,), {"0": 1}, into="class")  # type: ignore[call-overload]
    with pytest.raises(fxgrow.PlanError, match="needs the model itself"):
        fxgrow.widen(fxgrow.capture(net, (x,)), (x,), {"0": 1}, into="module")
    net.handle = (i for i in range(3))  # type: ignore[assignment]
    with pytest.raises(fxgrow.PlanError, match="Sequential cannot be copied.*generator"):
        fxgrow.widen(net, (x,), {"0": 1}, into="module")


def test_outputs_in_a_dataclass_are_compared() -> None:
    @dataclasses.dataclass
    class Out:
        y: Tensor

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
            self.shift = 0.0

        def forward(self, x: Tensor) -> Out:
            return Out(self.net(x))

    class Copied(Model):
        def __deepcopy__(self, memo: dict[int, Any]) -> Copied:
            other = Copied()
            memo[id(self)] = other
            other.net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
            # same code, same shapes, but a copy that does not compute the same
            return other

    x = torch.randn(5, 4)
    grown = fxgrow.widen(Model(), (x,), {"net.0": 1}, into="module")
    assert type(grown(x)) is Out
    with pytest.raises(fxgrow.PlanError, match="outputs of the grown Copied differ from the graph's by"):
        fxgrow.widen(Copied(), (x,), {"net.0": 1}, into="module")


def test_resnet18() -> None:
    torchvision = pytest.importorskip("torchvision")
    model, x = torchvision.models.resnet18(num_classes=5).double(), torch.randn(2, 3, 64, 64).double()
    units = every_width(model, (x,), 2)
    assert len(units) > 8
    grown = widened(model, (x,), units)
    assert type(grown) is torchvision.models.ResNet
    assert (grown.conv1.out_channels, grown.bn1.num_features, grown.layer1[0].conv1.in_channels) == (66, 66, 66)
    assert "conv1" in fxgrow.explain(grown, (x,)).__str__()


def test_timm() -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=4)
    x = torch.randn(2, 3, 32, 32)
    grown = widened(model, (x,), {"blocks.0.mlp.fc1": 5, "blocks.1.mlp.fc1": 2})
    assert grown.blocks[0].mlp.fc2.in_features == 768 + 5
    torch.testing.assert_close(grown.eval().forward_features(x), model.eval().forward_features(x))


def huggingface() -> Any:
    return pytest.importorskip("transformers")


def test_bert() -> None:
    transformers = huggingface()
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(config)
    ids = torch.randint(0, 40, (3, 7))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    grown = widened(model, inputs, {f"bert.encoder.layer.{i}.intermediate.dense": 8 for i in range(2)})
    assert type(grown) is transformers.BertForSequenceClassification
    assert grown.config is not model.config and grown.config.num_labels == 2
    assert grown.bert.encoder.layer[1].output.dense.in_features == 32
    assert type(grown(**inputs)) is type(model(**inputs))


def test_llama_generates() -> None:
    transformers = huggingface()
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=24, use_cache=False, bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    ids = torch.randint(3, 40, (2, 6))
    grown = widened(model, {"input_ids": ids}, {f"model.layers.{i}.mlp.gate_proj": 8 for i in range(2)})
    options = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    for cache in (False, True):
        a, b = (m.eval().generate(ids, use_cache=cache, **options) for m in (model, grown))
        assert a.shape[1] > ids.shape[1] and torch.equal(a, b)
