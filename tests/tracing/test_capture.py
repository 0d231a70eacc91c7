"""Captured graphs compute what the model computes, in both modes, at other batch sizes."""

from __future__ import annotations

import copy
import dataclasses
import io
import random
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.utils import _pytree as pytree

import fxgrow
from fxgrow.errors import CaptureError
from fxgrow.integrations._torchvision import import_torchvision
from fxgrow.tracing.capture import capture


@dataclasses.dataclass
class Output:
    logits: torch.Tensor
    hidden: tuple[torch.Tensor, ...] | None = None
    loss: torch.Tensor | None = None


class Pair(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor


@fx.wrap
def opaque_scale(x: torch.Tensor, training: bool) -> torch.Tensor:
    if float(x.detach().sum()) == 0.0:  # data-dependent: only runs because it stays one node
        return x
    return x * (0.5 if training else 2.0)


class FunctionalModes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(6))
        self.register_buffer("var", torch.ones(6))
        self.fc = nn.Linear(6, 6)

    def forward(self, x):
        x = F.batch_norm(self.fc(x), self.mean, self.var, training=self.training)
        x = opaque_scale(x, self.training)
        return F.dropout(x, 0.3, self.training)


class LiteralByMode(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"a": nn.Linear(6, 6)})

    def forward(self, x):
        return F.dropout(self.inner["a"](x), p=0.4 if self.training else 0.0)


class DropPath(nn.Module):
    def forward(self, x):
        if self.training:
            return x * torch.empty(x.shape[0], 1).bernoulli_(0.5)
        return x


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.path = nn.Linear(6, 6), DropPath()

    def forward(self, x):
        x += self.path(self.fc(x) * 1.0)
        return x + self.path(F.relu(x, inplace=True))


class SameInBothModes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.aux = nn.Linear(6, 6), None

    def forward(self, x):
        out = self.fc(x)
        if self.training and self.aux is not None:
            return out, self.aux(x)
        return out


class Sizes(nn.Module):
    def forward(self, x):
        b, t = x.shape
        steps = torch.arange(x.size(1), device=x.device, dtype=x.dtype)
        table = torch.zeros(b, t) + torch.ones(x.shape) * steps + torch.full((b, 1), 2.0)
        noise = torch.rand(3, device=x.device)[:2].sum()
        y = torch.cat([x, table.view(b, -1)], dim=-1).reshape(b * 2, t)
        return y.expand(1, *y.shape)[0][:, None].squeeze(1) / t**0.5 + noise


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, x):
        if x.shape[1] > 3 and x.dim() == 2 and x.is_floating_point():
            x = self.fc(x)
        for column in range(x.shape[1]):
            x = x + column
        assert isinstance(x, torch.Tensor) and isinstance(x.shape, tuple) and isinstance(x.shape[0], int)
        return x + len(x.unbind(1)) + int(x.size(-1))


class Direct(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 6))
        self.scales = nn.ParameterList([nn.Parameter(torch.randn(6)) for _ in range(3)])
        self.register_buffer("shift", torch.randn(6), persistent=False)
        self.register_buffer("count", torch.zeros(6))
        self.table = torch.randn(6)
        self.hidden = [nn.Linear(6, 6)]
        self.unused = nn.Linear(2, 2)

    def forward(self, x):
        self.count.add_(1)
        x = F.linear(x, self.weight).clone()
        x[:, 0] = self.table[0]
        x[:, 1:] *= 2
        for scale in self.scales:
            x = x * scale
        x = nn.Softplus()(self.hidden[0](x))
        return x @ self.weight.t() + self.shift + self.count + torch.tensor([1.0, 2, 3, 4, 5, 6])


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.Tanh())
        self.tied = nn.Linear(6, 6)
        self.tied.weight = self.net[0].weight

    def forward(self, x):
        return self.net(self.net[:3](x)) + self.tied(self.net[-1](x))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.attention = (
            nn.LSTM(6, 6, batch_first=True),
            nn.MultiheadAttention(6, 2, batch_first=True),
        )

    def forward(self, x):
        x, (hidden, _) = self.rnn(x[:, None].repeat(1, 3, 1))
        x, weights = self.attention(x, x, x)
        q, k = x.chunk(2, dim=-1)
        best = torch.max(q * k, dim=-1)
        return Pair(best.values + hidden[0, :, :3], weights)


class Structured(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, batch, pair, scale=2.0, *, mask=None):
        x = self.fc(batch["x"]) * scale
        extra = dict(**batch)
        assert type(pair) is tuple and "y" in batch and len(extra) == 2
        a, (b,) = pair
        if mask is not None:
            x = x.masked_fill(mask, 0.0)
        return Output(logits=x + a, hidden=(b, *[value + 1 for value in extra.values()]))


class Containers(nn.Module):
    def forward(self, *xs, **named):
        return OrderedDict(out=sum(xs), rest={"named": [named["z"], 3, None]})


class NoGrad(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.frozen = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        with torch.no_grad():
            y = self.frozen(x)
            with torch.enable_grad():
                z = self.fc(x)
        return y + z + self.fc(x)


class Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return torch.sign(x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient  # straight through


sign = Sign.apply


class TakenEarlier(nn.Module):
    """Functions with their own backward under another name, of the file and of the module."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.sign = nn.Linear(6, 6), Sign.apply

    def forward(self, x):
        return self.sign(self.fc(x)) + sign(self.fc(x) - 0.1)


class Written(nn.Module):
    """Buffers that forward replaces, and a function with its own backward."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)
        self.register_buffer("steps", torch.zeros(()))
        self.register_buffer("average", torch.ones(6))

    def forward(self, x):
        x = self.fc(x)
        self.steps += 1
        self.average = 0.9 * self.average + 0.1 * x.mean(0)
        return Sign.apply(x) + self.average / self.steps


def rows(count: int) -> tuple[torch.Tensor]:
    return (torch.randn(count, 6),)


def structured(count: int) -> dict[str, Any]:
    x, y = torch.randn(2, count, 6)
    return {"batch": {"x": x, "y": y}, "pair": (x + 1, (y,)), "mask": x > 0}


CASES: list[tuple[Callable[[], nn.Module], Callable[[int], Any]]] = [
    (FunctionalModes, rows),
    (LiteralByMode, rows),
    (Residual, rows),
    (SameInBothModes, rows),
    (Sizes, rows),
    (Branches, rows),
    (Direct, rows),
    (Twice, rows),
    (Recurrent, rows),
    (NoGrad, rows),
    (Written, rows),
    (TakenEarlier, rows),
    (Structured, structured),
    (lambda: nn.Linear(6, 4), rows),
    (lambda: nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.5)), rows),
]


def case_id(case: Any) -> str:
    return getattr(case[0], "__name__", "") if case[0].__name__ != "<lambda>" else type(case[0]()).__name__


def invoke(module: nn.Module, inputs: Any) -> Any:
    torch.manual_seed(7)
    inputs = copy.deepcopy(inputs)  # some models write into their input
    return module(**inputs) if isinstance(inputs, dict) else module(*inputs)


def tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, Output):
        value = [getattr(value, field.name) for field in dataclasses.fields(value)]
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def same(mine: Any, theirs: Any) -> bool:
    pairs = list(zip(tensors(mine), tensors(theirs), strict=True))
    return type(mine) is type(theirs) and all(torch.allclose(a, b, atol=1e-6, equal_nan=True) for a, b in pairs)


@pytest.mark.parametrize("captured_in", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_same_function_in_both_modes_at_other_batch_sizes(case: Any, captured_in: bool) -> None:
    make, batch = case
    torch.manual_seed(0)
    model = make().train(captured_in)
    twin = copy.deepcopy(model)
    gm = capture(model, batch(4))
    gm.graph.lint()
    assert type(gm).__name__ == type(model).__name__
    assert list(gm.state_dict()) == list(model.state_dict())
    assert {id(p) for p in gm.parameters()} == {id(p) for p in model.parameters()}
    for training in (captured_in, not captured_in):
        for count in (4, 3):
            inputs = batch(count)
            expected = invoke(twin.train(training), inputs)
            assert same(invoke(gm.train(training), inputs), expected)
    for name, buffer in twin.named_buffers():
        assert torch.allclose(buffer, gm.get_buffer(name)), name


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_every_node_has_a_value_and_tensors_have_shapes(case: Any) -> None:
    make, batch = case
    gm = capture(make(), batch(4))
    for node in gm.graph.nodes:
        assert "val" in node.meta, node
        if isinstance(node.meta["val"], torch.Tensor):
            assert type(node.meta["val"]) is not torch.Tensor, "a real tensor would keep memory alive"
            assert node.meta["tensor_meta"].shape == node.meta["val"].shape


def test_called_like_the_model_with_the_given_arguments() -> None:
    x, y, z = torch.randn(3, 2, 6)
    gm = capture(Containers(), {"z": z})
    assert invoke(gm, {"z": x})["rest"]["named"][0] is not None
    gm = capture(_Named(), (x, y))
    assert torch.equal(gm(x, b=y), _Named()(x, y)) and torch.equal(gm(b=y, a=x), _Named()(x, y))
    assert [node.target for node in gm.graph.find_nodes(op="placeholder")] == ["a", "b"]
    gm = capture(_Named(), {"c": z, "a": x})
    assert torch.equal(gm(a=x, c=z), _Named()(x, c=z))
    stored = gm.meta["example_inputs"]
    assert torch.equal(stored[0], x) and torch.equal(stored[1], z)
    assert torch.equal(capture(nn.ReLU(), x)(y), F.relu(y))


class _Named(nn.Module):
    def forward(self, a, b=None, c=None):
        a = a if b is None else a - b
        return a if c is None else a * c


def test_var_arguments_and_ordered_dict() -> None:
    model, x = Containers(), torch.randn(2, 6)
    out = capture(_Both(model), (x, x))(x, 2 * x)
    assert type(out) is OrderedDict and torch.equal(out["out"], 3 * x)
    assert out["rest"]["named"][1:] == [3, None] and torch.equal(out["rest"]["named"][0], x)


class _Both(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *xs):
        return self.inner(*xs, z=xs[0])


def test_python_inputs_are_guarded() -> None:
    gm = capture(_Flagged(), (torch.ones(2), 3, "up", True))
    assert torch.equal(gm(torch.ones(2), 3, "up", True), torch.full((2,), 4.0))
    with pytest.raises(CaptureError, match="'down'"):
        gm(torch.ones(2), 3, "down", True)
    with pytest.raises(CaptureError, match="False"):
        gm(torch.ones(2), 3, "up", False)


class _Flagged(nn.Module):
    def forward(self, x, n, direction, add):
        if add:
            x = x + n
        return x if direction == "up" else -x


def test_guards_refuse_what_would_branch_otherwise() -> None:
    gm = capture(Branches(), rows(4))
    guards = [node for node in gm.graph.nodes if node.op == "call_function" and node.target.__name__ == "guard"]
    assert len(guards) == len({(node.args[0], repr(node.args[1])) for node in guards})
    with pytest.raises(CaptureError, match=r"x.shape\[1\] > 3.*test_capture.py") as raised:
        gm(torch.randn(4, 2))
    assert "Branches" in str(raised.value)
    # Nothing looked at the batch size, and sizes handed to an operator are no decisions.
    assert not [n for n in capture(Sizes(), rows(4)).graph.nodes if getattr(n.target, "__name__", "") == "guard"]


def test_guards_survive_dead_code_elimination() -> None:
    gm = capture(Branches(), rows(4))
    before = len(gm.graph.nodes)
    gm.graph.eliminate_dead_code()
    assert sum(getattr(n.target, "__name__", "") == "guard" for n in gm.graph.nodes) >= 2, before


class AuxInTraining(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.aux = nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x):
        if self.training:
            return self.fc(x), self.aux(x)
        return self.fc(x)


class Deep(nn.Module):
    """Auxiliary heads as GoogLeNet has them: norms, dropout and activations in place that only training reads."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.fc = nn.Linear(6, 8), nn.Linear(8, 2)
        self.aux = nn.ModuleList([nn.Linear(8, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)])

    def forward(self, x):
        x = self.stem(x).relu()
        extra = None
        if self.training:
            extra = self.aux[2](F.relu(self.aux[1](self.aux[0](x)), inplace=True))
        x = self.fc(x)
        return {"out": x, "aux": extra} if extra is not None else x


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("make", [AuxInTraining, Deep])
def test_what_one_mode_alone_returns(make: Any, training: bool) -> None:
    model = make().train(training)
    gm = capture(model, rows(2))
    statistics = {n: b.clone() for n, b in model.named_buffers()}
    for mode in (False, True):
        x = rows(5)
        expected = copy.deepcopy(model).train(mode)(*x)
        run = copy.deepcopy(gm).train(mode)
        assert same(run(*x), expected)
        wide = fxgrow.widen(gm, rows(2), {w.name: w.step for w in fxgrow.widths(gm) if w.pinned is None})
        assert make is AuxInTraining or wide.stem.out_features == 9
        assert same(wide.train(mode)(*x), expected)
        moved = any(not torch.equal(b, statistics[n]) for n, b in run.named_buffers())
        assert moved == (mode and bool(statistics))


class NormInEval(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm = nn.Linear(6, 6), nn.BatchNorm1d(6)

    def forward(self, x):
        return self.fc(x) if self.training else self.norm(self.fc(x))


@pytest.mark.parametrize("training", [True, False])
def test_a_norm_of_eval_mode_takes_no_statistics_in_training(training: bool) -> None:
    model = NormInEval().train(training)
    gm = capture(model, rows(2))
    x = rows(5)
    for mode in (training, not training):
        gm.train(mode), model.train(mode)
        before = {name: t.clone() for name, t in model.named_buffers()}
        assert same(gm(*x), model(*x))
        assert all(torch.equal(t, before[name]) for name, t in model.named_buffers())


class LooksInTraining(nn.Module):
    def forward(self, x):
        return (x if x.sum() > 0 else -x) if self.training else x * 2


def test_a_graph_for_one_mode_refuses_the_other() -> None:
    model = LooksInTraining().eval()
    gm = capture(model, rows(2))
    x = rows(5)
    assert same(gm(*x), model(*x))
    gm.train()
    with pytest.raises(CaptureError, match="Capture the model again after calling .train"):
        gm(*x)


def test_small_module_that_branches_on_mode_becomes_a_leaf() -> None:
    gm = capture(Residual(), rows(2))
    assert [n.target for n in gm.graph.find_nodes(op="call_module")] == ["fc", "path", "path"]


def test_gradients_follow_no_grad_blocks_and_leave_the_mode_alone() -> None:
    model = NoGrad()
    gm = capture(model, rows(2))
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            out = gm(*rows(3))
            assert torch.is_grad_enabled() is enabled and out.requires_grad is enabled
    gm(*rows(3)).sum().backward()
    assert model.frozen.weight.grad is None and model.fc.weight.grad is not None


def test_a_function_keeps_its_own_backward() -> None:
    model = Written()
    capture(model, rows(2))(*rows(3)).sum().backward()
    assert torch.equal(model.fc.bias.grad, torch.full((6,), 3.0))


def test_equal_sizes_are_one_node() -> None:
    class Again(nn.Module):
        def forward(self, x):
            return x.reshape(x.shape[0] * 2, -1) + x.shape[0] * 2 + x.view(x.shape[0] * 2, -1)

    gm = capture(Again(), rows(2))
    assert sum(getattr(node.target, "__name__", "") == "mul" for node in gm.graph.nodes) == 1


def test_captured_graphs_are_returned_and_other_graphs_traced() -> None:
    gm = capture(Twice(), rows(2))
    assert capture(gm, rows(3)) is gm
    other = fx.symbolic_trace(SameInBothModes().fc)
    again = capture(other, rows(2))
    assert again is not other and same(again(*(x := rows(3))), other(*x))


def test_copies_keep_keys_guards_and_modes() -> None:
    gm = copy.deepcopy(copy.deepcopy(capture(Direct(), rows(2))))
    assert gm.state_dict().keys() == Direct().state_dict().keys()
    twin = copy.deepcopy(capture(LiteralByMode(), rows(2)))
    x = rows(3)
    assert same(invoke(twin.eval(), x), twin.inner.a(*x)) and not same(invoke(twin.train(), x), twin.inner.a(*x))


def test_a_slice_of_a_data_set_does_not_carry_the_rest_along() -> None:
    data = torch.randn(100_000, 4)
    file = io.BytesIO()
    torch.save(capture(nn.Linear(4, 2), (data[:2],)), file)
    assert file.tell() < 100_000


def test_graphs_pickle_and_trace_again() -> None:
    gm, x = capture(Twice(), rows(2)), rows(3)
    file = io.BytesIO()
    torch.save(gm, file)
    file.seek(0)
    assert same(torch.load(file, weights_only=False)(*x), gm(*x))
    again = fx.symbolic_trace(capture(_Wide(), rows(2)))
    with pytest.raises(CaptureError, match="gives True, but here it gives False"):
        again(torch.randn(2, 2))


class _Wide(nn.Module):
    def forward(self, x):
        return x if x.shape[1] > 3 else -x


# -- the model afterwards ----------------------------------------------------------------------------------


class Remembers(nn.Module):
    def __init__(self, fails: bool) -> None:
        super().__init__()
        self.fc, self.bn, self.fails = nn.Linear(6, 6), nn.BatchNorm1d(6), fails
        self.drop = nn.Dropout(0.5)
        self.seen: list[Any] = []
        self.cache: dict[str, Any] = {}

    def forward(self, x):
        self.last = self.drop(self.bn(self.fc(x)))
        self.seen.append(self.last)
        self.cache["x"] = torch.rand(2) + random.random()
        if self.fails:
            raise RuntimeError("no luck")
        return self.last


@pytest.mark.parametrize("fails", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_untouched(training: bool, fails: bool) -> None:
    model = Remembers(fails).train(training)
    model.bn.eval()
    model.fc.weight.requires_grad_(False)
    calls: list[Any] = []
    model.fc.register_forward_hook(lambda *_: calls.append(1))
    inputs = rows(4)
    names = {module: dict(vars(module)) for module in model.modules()}
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = [(p.requires_grad, p.grad, p._version) for p in model.parameters()]
    torch_state, python_state = torch.get_rng_state(), random.getstate()
    with torch.no_grad():
        if fails:
            with pytest.raises(CaptureError, match="no luck"):
                capture(model, inputs)
        else:
            capture(model, inputs)
        assert not torch.is_grad_enabled()
    assert torch.equal(torch_state, torch.get_rng_state()) and python_state == random.getstate()
    assert all(vars(module) == attributes for module, attributes in names.items())
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert [(p.requires_grad, p.grad, p._version) for p in model.parameters()] == flags
    assert not model.seen and not model.cache and not hasattr(model, "last") and not calls
    assert isinstance(torch.zeros(1), torch.Tensor) and torch.zeros.__name__ == "zeros"


# -- errors ------------------------------------------------------------------------------------------------


class DataBranch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = _Decides()

    def forward(self, x):
        return self.inner(x)


class _Decides(nn.Module):
    def forward(self, x):
        if x.sum() > 0:  # the branch
            return x
        return -x


class _Number(_Decides):
    def forward(self, x):
        return x * int(x.max())


class _Fails(_Decides):
    def forward(self, x):
        return x @ torch.ones(99, 1)


class _Returns(_Decides):
    def forward(self, x):
        return x, object()


ERRORS = [
    (_Decides, "looks at the values of a tensor.*torch.where", "if x.sum\\(\\) > 0:  # the branch"),
    (_Number, "looks at the values of a tensor", "int\\(x.max\\(\\)\\)"),
    (_Fails, "raises RuntimeError", "torch.ones\\(99, 1\\)"),
]


@pytest.mark.parametrize(("inner", "problem", "line"), ERRORS)
def test_errors_name_module_line_and_remedy(inner: Callable[[], nn.Module], problem: str, line: str) -> None:
    model: nn.Module = inner()
    where = rf"the model \({inner.__name__}\)"
    if inner is _Fails:  # on real tensors too; a submodule that only looks at data would be opaque
        model, where = DataBranch(), rf"module 'inner' \({inner.__name__}\)"
        model.inner = inner()
    with pytest.raises(CaptureError) as raised:
        capture(model, rows(2))
    raised.match(rf"Cannot capture {where} at .*test_capture.py:\d+: `.*{line}.*`")
    raised.match(problem)
    assert raised.value.__cause__ is not None


def test_wrong_arguments_are_explained() -> None:
    for wrong, message in [
        ((lambda x: x, rows(1)), "needs a torch.nn.Module, not a function"),
        ((nn.ReLU(), 3), "example_inputs is a int"),
        ((nn.ReLU(), (1, 2, 3)), "ReLU.forward.* cannot take the example inputs"),
        ((nn.ReLU(), {"nothing": 1}), "missing a required argument: 'input'"),
        ((nn.LazyLinear(3), rows(1)), "weight has no shape yet. Run the model once"),
        ((_Returns(), rows(1)), "A graph holds tensors, numbers"),
    ]:
        with pytest.raises(CaptureError, match=message):
            capture(*wrong)  # type: ignore[arg-type]


# -- torchvision -------------------------------------------------------------------------------------------

ZOO = [
    "resnet18",
    "googlenet",
    "densenet121",
    "efficientnet_b0",
    "convnext_tiny",
    "regnet_y_400mf",
    "vit_b_16",
]


@pytest.mark.parametrize("name", ZOO)
def test_torchvision_models_in_both_modes(name: str) -> None:
    extra = {"init_weights": False, "aux_logits": False} if name == "googlenet" else {}
    extra |= {"image_size": 32} if name == "vit_b_16" else {}
    torch.manual_seed(0)
    model = import_torchvision().models.get_model(name, weights=None, num_classes=10, **extra).eval()
    gm = capture(model, (torch.randn(2, 3, 32, 32),))
    guards = [node for node in gm.graph.nodes if "guard" in getattr(node.target, "__name__", "")]
    assert all("Wrong image" in str(node.args) for node in guards)  # what the model itself asserts of its input
    before = copy.deepcopy(model.state_dict())
    for training, count in [(False, 3), (True, 2)]:
        x = (torch.randn(count, 3, 32, 32),)
        with torch.no_grad():
            expected = invoke(model.train(training), x)
            model.load_state_dict(before)
            assert same(invoke(gm.train(training), x), expected)
            model.load_state_dict(before)


class KeepsTable(nn.Module):
    """Keeps a table between evaluations, as many position biases are kept."""

    def __init__(self) -> None:
        super().__init__()
        self.bias, self.layer = nn.Parameter(torch.randn(6)), nn.Linear(6, 6)
        self.register_buffer("order", torch.tensor([3, 1, 0, 5, 2, 4]))
        self.kept: dict[str, torch.Tensor] = {}
        self.calls = 0

    def train(self, mode: bool = True) -> KeepsTable:
        super().train(mode)
        self.calls += 1
        if mode:
            self.kept = {}
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            return self.layer(x) + self.bias[self.order]
        if "bias" not in self.kept:
            self.kept["bias"] = self.bias[self.order]
        return self.layer(x) + self.kept["bias"]


@pytest.mark.parametrize("training", [False, True])
def test_what_a_module_keeps_between_evaluations(training: bool) -> None:
    torch.manual_seed(0)
    model, x = KeepsTable().eval(), torch.randn(3, 6)
    model.layer.eval()
    expected = model(x)
    kept = model.kept
    model.train(training)
    model.kept, calls = kept, model.calls
    gm = capture(model, (x,))
    assert model.kept is kept and list(kept) == ["bias"] and model.training is training and model.calls == calls
    for mode in (True, False):
        torch.testing.assert_close(gm.train(mode)(x), expected)
    with torch.no_grad():
        model.bias += 1
    for mode in (True, False):
        torch.testing.assert_close(gm.train(mode)(x), expected + 1)


class OnlyEval(nn.Linear):
    def train(self, mode: bool = True) -> OnlyEval:
        if mode:
            raise NotImplementedError("a teacher")
        return super().train(mode)


def test_a_module_that_refuses_a_mode() -> None:
    model = nn.Sequential(nn.Linear(4, 3), OnlyEval(3, 2))
    model[1].training = False
    x = torch.randn(5, 4)
    assert same(capture(model, (x,))(x), model(x))
    assert model.training and not model[1].training


class Mixer(nn.Module):
    """Attention without parameters, whose dropout asks for the mode."""

    def forward(self, q: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.dropout((q @ q.transpose(1, 2)).softmax(-1), 0.0, self.training) @ v


class Mixes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.v, self.mixer, self.out = nn.Linear(4, 6), nn.Linear(4, 5), Mixer(), nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.mixer(self.q(x), self.v(x)))


def test_a_module_that_passes_its_mode_on_is_followed() -> None:
    gm = capture(Mixes(), (torch.randn(2, 3, 4),))
    assert "mixer" not in [node.target for node in gm.graph.nodes]
    assert "v" in {w.name for w in fxgrow.widths(gm) if w.pinned is None}


class Remembered(KeepsTable):
    """As attention biases are kept: what the modes compute is the same, in the same order."""

    def forward(self, x):
        if self.training:
            bias = self.bias[self.order]
            return self.layer(x) + bias
        return super().forward(x)


class Unsqueezes(nn.Module):
    """What is reshaped in place later on has another shape when a trace is over than on the way."""

    def forward(self, x):
        y = x * 1
        y = y.relu_() if self.training else y.relu_()
        return y.unsqueeze_(0)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("make", [Remembered, Unsqueezes, AuxInTraining, LiteralByMode, NormInEval])
def test_one_graph_is_right_in_both_modes(make: Any, training: bool) -> None:
    model = make().train(training)
    gm = capture(model, rows(2))
    for mode in (training, not training):
        if make is NormInEval and mode != training:
            continue  # refused there
        x = rows(5)
        torch.manual_seed(0)
        expected = copy.deepcopy(model).train(mode)(*x)
        torch.manual_seed(0)
        assert same(copy.deepcopy(gm).train(mode)(*x), expected)
