"""Replaying a recipe gives the code, sizes and attributes that growth gave, whatever the fresh weights are."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

import fxgrow
from fxgrow.graph.graph import named_tensors
from fxgrow.ops.registry import SIZE_ATTRIBUTES
from tests.end_to_end.test_exact_widenings import FREE, Row, given, made, named

FAST = {"swiglu_packed_chunk", "qk_bias", "multihead_attention_embed_plus_head", "postnorm_layernorm_uniform_weight"}


def attributes(net: nn.Module) -> dict[tuple[str, str], Any]:
    """What describes the modules: numbers, names and tuples."""
    plain = (int, float, str, tuple)
    return {
        (path, name): value
        for path, module in net.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, plain) and name != "training"
    }


def scrambled(model: nn.Module) -> nn.Module:
    """Another fresh model: other weights, none of which say what growth was allowed to do, and nothing trained."""
    with torch.no_grad():
        for p in model.parameters():
            p.normal_()
    return model.requires_grad_(False)


def assert_replays(grown: Any, fresh: nn.Module) -> None:
    net = fxgrow.resize(scrambled(fresh), fxgrow.Recipe.from_json(fxgrow.Recipe.of(grown).to_json()))
    assert net.code == grown.code
    assert attributes(net) == attributes(grown)
    ours, theirs = named_tensors(net), named_tensors(grown)
    assert {name: t.shape for name, t in ours.items()} == {name: t.shape for name, t in theirs.items()}
    old, new = {n.name: n for n in grown.graph.nodes}, {n.name: n for n in net.graph.nodes}
    for name, node in old.items():
        before, after = node.meta.get("val"), new[name].meta.get("val")
        if isinstance(before, torch.Tensor):
            assert before.shape == after.shape and before.dtype == after.dtype


def check(row: Row) -> None:
    inputs = given(row, 2)
    grown = fxgrow.widen(made(row), inputs, {name: row.steps[0] * step for name, step in row.free.items()})
    grown = fxgrow.widen(grown, inputs, {w.name: w.step for w in fxgrow.widths(grown) if w.name in row.free})
    assert len(fxgrow.Recipe.of(grown).steps) == 2
    assert_replays(grown, made(row))


@named([row for row in FREE if row.recipe in FAST])
def test_recipes_replay(row: Row) -> None:
    check(row)


@pytest.mark.slow
@named([row for row in FREE if row.recipe not in FAST])
def test_all_recipes_replay(row: Row) -> None:
    check(row)


class Uniform(nn.Module):
    """A post-norm stream, which can grow only while the norms have one weight for all units."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.norms = nn.ModuleList(nn.LayerNorm(6) for _ in range(3))
        self.out = nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norms[0](self.inner[0](x))
        for layer, norm in zip(self.inner[1:], self.norms[1:], strict=True):
            x = norm(x + layer(x))
        return self.out(x)


def test_values_of_a_fresh_model_do_not_matter() -> None:
    """Growth itself would be refused on this one: the proof behind it looks at the weights."""
    x = torch.randn(4, 6)
    grown = fxgrow.widen(Uniform(), (x,), {"inner.0": 2})
    fresh = scrambled(Uniform())
    with pytest.raises(fxgrow.PlanError):
        fxgrow.widen(fresh.requires_grad_(True), (x,), {"inner.0": 2})
    assert_replays(grown, fresh)
    eps = fxgrow.resize(fresh, fxgrow.Recipe.of(grown)).get_submodule("norms.1").eps
    assert eps == 1e-5 * (6 / 8)


@pytest.mark.parametrize("norm", [weight_norm, spectral_norm])
def test_weights_under_a_norm(norm: Callable[..., nn.Module]) -> None:
    def build() -> nn.Module:
        return nn.Sequential(norm(nn.Linear(3, 4)), nn.Tanh(), norm(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, 2))

    grown = fxgrow.widen(build(), (torch.randn(2, 3),), {"0": 2, "2": 1})
    assert_replays(grown, build())


def test_growths_by_every_door_are_steps() -> None:
    """`grow`, `apply` and `widen` append; a growth that declines does not."""
    torch.manual_seed(0)
    x = torch.randn(256, 3)
    batches = [(part, part.prod(1, keepdim=True)) for part in x.split(64)]

    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))

    one = fxgrow.grow(build(), batches, neurons=2, progress=False)
    two = fxgrow.apply(one, fxgrow.Plan({"0": 3}, method="by hand"))
    three = fxgrow.widen(two, (), {"0": 1})
    splits = fxgrow.grow(three, batches, neurons=1, method="splitting", progress=False)
    kept = fxgrow.grow(splits, [(x, splits(x).detach())] * 4, progress=False)
    assert kept.meta["fxgrow"].declined
    recipe = fxgrow.Recipe.of(kept)
    assert [(s.method, dict(s.units)) for s in recipe.steps[:3]] == [
        ("default", {"0": 2}),
        ("by hand", {"0": 3}),
        ("widen", {"0": 1}),
    ]
    assert recipe == fxgrow.Recipe.of(splits) and len(recipe.steps) == 3 + bool(splits.meta["fxgrow"].plan.units)
    assert_replays(kept, build())
    assert fxgrow.Recipe.of(one).steps == recipe.steps[:1]


def test_units_of_a_recipe_sum_to_the_sizes() -> None:
    """An independent count of what a chain of growths did."""
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))
    grown = net
    for units in ({"0": 1}, {"2": 2}, {"0": 3, "2": 4}):
        grown = fxgrow.widen(grown, (torch.zeros(1, 3),), units)
    total: dict[str, int] = {}
    for step in fxgrow.Recipe.of(grown).steps:
        for name, k in step.units.items():
            total[name] = total.get(name, 0) + k
    assert total == {"0": 4, "2": 6}
    assert [tuple(p.shape) for p in fxgrow.resize(net, fxgrow.Recipe.of(grown)).parameters()] == [
        (8, 3), (8,), (11, 8), (11,), (2, 11), (2,),
    ]  # fmt: skip


class KeepsSizes(nn.Module):
    """Code that looks at data stays one node, and keeps on its module how large the last batch was."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.batch = nn.Linear(4, 6), nn.Linear(6, 2), 0

    def scaled(self, x: torch.Tensor) -> torch.Tensor:
        self.batch = len(x)
        return x / self.batch if bool((x > 0).any()) else x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(self.scaled(x)).relu())


def test_what_a_network_keeps_as_it_runs_is_no_part_of_a_recipe() -> None:
    batches = [(torch.randn(n, 4), torch.randn(n, 2)) for n in (8, 8, 8, 5)]
    model = nn.Sequential(KeepsSizes())
    model(batches[0][0])
    grown = fxgrow.grow(model, batches, loss_fn=nn.functional.mse_loss, neurons=2, progress=False)
    (step,) = fxgrow.Recipe.of(grown).steps
    assert {(a.module, a.name) for a in step.attributes} == {("0.a", "out_features"), ("0.b", "in_features")}
    fxgrow.resize(nn.Sequential(KeepsSizes()), fxgrow.Recipe.of(grown))


# -- hostile recipes


def hostile(change: Callable[[dict[str, Any]], None]) -> Any:
    """Loads a net whose recipe has been changed; all of the rest is as it was saved."""

    def build() -> nn.Module:
        return Scaled()

    recipe = json.loads(fxgrow.Recipe.of(fxgrow.widen(build(), (torch.randn(2, 4),), {"a": 3})).to_json())
    change(recipe["steps"][0])
    return fxgrow.resize(build(), json.dumps(recipe))


class Scaled(nn.Module):
    """A norm, dropout and a number in a call."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.drop, self.b = nn.Linear(4, 3), nn.Dropout(0.1), nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.drop(nn.functional.leaky_relu(self.a(x).view(-1, 3), negative_slope=0.2)))


def number(path: list[Any], before: Any, after: Any, target: str = ".view", module: str = "") -> Any:
    def change(step: dict[str, Any]) -> None:
        place = {"module": module, "target": target, "nth": 0}
        step["numbers"] = [{"place": place, "path": path, "before": before, "after": after}]

    return change


def attribute(module: str, name: str, before: Any, after: Any) -> Any:
    return lambda step: step["attributes"].append({"module": module, "name": name, "before": before, "after": after})


LEAKY = "torch.nn.functional.leaky_relu"
HOSTILE = {
    "code in a keyword": (number(["**(print('ran') or {}), out"], None, 1), "not the name of an argument"),
    "a reserved word": (number(["lambda"], None, 1), "not the name of an argument"),
    "a dunder": (number(["__class__"], None, 1), "not the name of an argument"),
    "a keyword that is not there": (number(["out"], None, 1), "gives no argument out of call 1 of .view"),
    "another position": (number([7], None, 1), "gives no argument 7"),
    "an argument of a number": (number([2, 0], None, 1), "gives no argument 2.0"),
    "text for a number": (number([2], 3, "6"), "not a finite number"),
    "a bool for a number": (number([2], 3, True), "not a finite number"),
    "a float for a size": (number([2], 3, 6.0), "follows from none of its sizes"),
    "a huge size": (number([2], 3, 2**40), "follows from none of its sizes"),
    "a number of another call": (number(["negative_slope"], 0.2, -3e9, LEAKY), "follows from none of its sizes"),
    "a call that is not there": (number([1], None, 1, "os.system"), "does not make call 1 of os.system"),
    "training": (attribute("drop", "training", 1, 0), "no size of a layer"),
    "the rate of dropout": (attribute("drop", "p", 0.1, 0.9), "no size of a layer"),
    "hooks": (attribute("drop", "_forward_hooks", None, 1), "no size of a layer"),
    "a method": (attribute("a", "forward", None, 1), "The model has no a.forward"),
    "a class": (attribute("a", "__class__", None, 1), "not the name of an argument or attribute"),
    "text for an attribute": (attribute("a", "out_features", 3, "6"), "not a finite number"),
    "a huge attribute": (attribute("b", "out_features", 2, 2**40), "follows from none of its sizes"),
    "a tuple for an attribute": (attribute("b", "out_features", 2, {"tuple": [2]}), "follows from none of its sizes"),
    "a call that has a use": (lambda s: s["erased"].append({"module": "", "target": ".view", "nth": 0}), "elsewhere"),
    "a field of its own": (lambda s: s.update(run="os.system"), "has 'run', which is no field"),
    "no field": (lambda s: s.pop("sizes"), "has no 'sizes'"),
}


@pytest.mark.parametrize(("change", "message"), HOSTILE.values(), ids=HOSTILE)
def test_what_no_growth_writes_is_refused(change: Any, message: str) -> None:
    with pytest.raises(fxgrow.FileError, match=re.escape(message)):
        hostile(change)


def test_layers_with_a_rule_of_their_own_have_sizes_of_their_own() -> None:
    class Gate(nn.Module):
        def __init__(self, channels: int) -> None:
            super().__init__()
            self.channels, self.rate = channels, 0.5
            self.weight = nn.Parameter(torch.ones(channels))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.weight

    @fxgrow.op(Gate)
    def gate(ctx: Any, x: Any) -> Any:
        ctx.same(x[-1], ctx.parameter("weight")[0])
        ctx.attribute("channels", x[-1])
        return x

    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 3), Gate(3), nn.Linear(3, 2))

    grown = fxgrow.widen(build(), (torch.randn(2, 4),), {"0": 3})
    assert fxgrow.resize(build(), fxgrow.Recipe.of(grown).to_json()).get_submodule("1").channels == 6


def test_the_rules_write_no_other_attributes() -> None:
    """What the rules of the library name as sizes is what a recipe may set."""
    files = (Path(fxgrow.__file__).parent / "ops").glob("*.py")
    written = {name for file in files for name in re.findall(r'ctx\.attribute\("(\w+)"', file.read_text())}
    assert len(written) > 10 and written <= SIZE_ATTRIBUTES
