"""Save, load and resize: what comes back is what was saved, on the user's own fresh model."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import fxgrow
from tests.checkpoints import saved
from tests.checkpoints.saved import INPUTS, Attention, convolutions, images, mlp, outputs


def fresh_outputs(path: Path, name: str) -> Tensor:
    """What another process computes with the file and nothing else."""
    code = (
        "import sys, torch, fxgrow, safetensors.torch\n"
        "import tests.checkpoints.saved as t\n"
        f"torch.set_num_threads({torch.get_num_threads()})\n"
        "torch.manual_seed(99)\n"
        "net = fxgrow.load(getattr(t, sys.argv[2])(), sys.argv[1])\n"
        "out = t.outputs(net, t.INPUTS[sys.argv[2]]())\n"
        "safetensors.torch.save_file({'out': out.contiguous()}, sys.argv[1] + '.out')\n"
    )
    root = Path(__file__).parents[2]
    run = subprocess.run([sys.executable, "-c", code, str(path), name], cwd=root, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return safetensors.torch.load_file(f"{path}.out")["out"]


def batches(name: str, classes: int, n: int = 4) -> list[Any]:
    inputs = INPUTS[name]()
    if isinstance(inputs, dict):
        return [(inputs, inputs["input_ids"]) for _ in range(n)]
    return [(inputs[0], torch.arange(len(inputs[0])) % classes) for _ in range(n)]


def language_loss(output: Any, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output["logits"].flatten(0, 1), targets.flatten())


def grown_twice(name: str, first: dict[str, int], second: dict[str, int], classes: int) -> Any:
    """By `widen`, then by `grow` on a little random data, and moved away from where growth left it."""
    torch.manual_seed(1)
    net = fxgrow.widen(getattr(saved, name)(), INPUTS[name](), first)
    loss_fn = language_loss if name == "gpt2" else None
    grown = fxgrow.grow(net, batches(name, classes), loss_fn=loss_fn, neurons=second, method="random", progress=False)
    with torch.no_grad():
        for p in grown.parameters():
            p.add_(torch.randn_like(p), alpha=0.01)
    assert len(fxgrow.Recipe.of(grown).steps) == 2
    return grown


BIG = [
    ("resnet18", {"layer1.0.conv1": 8, "conv1": 3}, {"layer1.0.conv1": 2, "layer3.1.conv1": 1}, 1000),
    ("vit_tiny", {"blocks.0.mlp.fc1": 8, "blocks.1.attn.qkv": 9, "patch_embed.proj": 4}, {"blocks.0.mlp.fc1": 2}, 1000),
    ("gpt2", {"transformer.h.0.attn.c_attn": 24, "transformer.h.1.mlp.c_fc": 5}, {"transformer.h.0.mlp.c_fc": 2}, 50),
]
SMALL = [
    ("convolutions", {"0": 4}, {"0": 1}, 2),
    (
        "vit_small_enough",
        {"blocks.0.mlp.fc1": 8, "blocks.0.attn.qkv": 6, "patch_embed.proj": 4},
        {"blocks.0.mlp.fc1": 2},
        5,
    ),
    BIG[2],
]


@pytest.mark.parametrize(("name", "first", "second", "classes"), SMALL, ids=lambda v: v if isinstance(v, str) else "")
def test_comes_back_bit_for_bit(name: str, first: Any, second: Any, classes: int, tmp_path: Path) -> None:
    grown = grown_twice(name, first, second, classes)
    fxgrow.save(grown, tmp_path / "net")
    net = fxgrow.load(getattr(saved, name)(), tmp_path / "net")
    assert torch.equal(outputs(net, INPUTS[name]()), outputs(grown, INPUTS[name]()))
    assert net.code == grown.code and list(net.state_dict()) == list(grown.state_dict())
    assert fxgrow.Recipe.of(net) == fxgrow.Recipe.of(grown)


def test_comes_back_in_a_fresh_process(tmp_path: Path) -> None:
    torch.manual_seed(1)
    grown = fxgrow.widen(Attention(), INPUTS["Attention"](), {"qkv": 12, "embed": 3})
    fxgrow.save(grown, tmp_path / "net")
    assert torch.equal(fresh_outputs(tmp_path / "net", "Attention"), outputs(grown, INPUTS["Attention"]()))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "first", "second", "classes"), BIG, ids=[row[0] for row in BIG])
def test_big_ones_come_back_in_a_fresh_process(
    name: str, first: Any, second: Any, classes: int, tmp_path: Path
) -> None:
    grown = grown_twice(name, first, second, classes)
    fxgrow.save(grown, tmp_path / "net")
    assert torch.equal(fresh_outputs(tmp_path / "net", name), outputs(grown, INPUTS[name]()))
    with safetensors.safe_open(tmp_path / "net", framework="pt") as file:
        held = set(file.keys())
    assert held == {name for name in grown.state_dict() if name != "lm_head.weight"}  # tied to the embedding


# -- forms


@pytest.mark.parametrize("saved", ["graph", "module"])
@pytest.mark.parametrize("loaded", [None, "graph", "module"])
def test_graphs_and_modules(saved: Any, loaded: Any, tmp_path: Path) -> None:
    x = INPUTS["convolutions"]()
    grown = fxgrow.widen(fxgrow.widen(convolutions(), x, {"0": 4}, into=saved), x, {"0": 1}, into=saved)
    fxgrow.save(grown, tmp_path / "net")
    net = fxgrow.load(convolutions(), tmp_path / "net", into=loaded)
    assert isinstance(net, torch.fx.GraphModule if (loaded or saved) == "graph" else nn.Sequential)
    assert torch.equal(outputs(net, x), outputs(grown, x))
    assert str(fxgrow.Recipe.of(net)) == "widen: 0 +4\nwiden: 0 +1"


def test_what_was_loaded_grows_on(tmp_path: Path) -> None:
    fxgrow.save(fxgrow.widen(mlp(), INPUTS["mlp"](), {"0": 4}), tmp_path / "a")
    net = fxgrow.widen(fxgrow.load(mlp(), tmp_path / "a"), (), {"0": 1})
    fxgrow.save(net, tmp_path / "b")
    again = fxgrow.load(mlp(), tmp_path / "b")
    assert torch.equal(outputs(again, INPUTS["mlp"]()), outputs(net, INPUTS["mlp"]()))
    assert [dict(s.units) for s in fxgrow.Recipe.of(again).steps] == [{"0": 4}, {"0": 1}]


def test_models_that_never_grew(tmp_path: Path) -> None:
    x, plain = INPUTS["mlp"](), mlp()
    fxgrow.save(plain, tmp_path / "plain")
    net = fxgrow.load(mlp(), tmp_path / "plain")
    assert type(net) is nn.Sequential and torch.equal(outputs(net, x), outputs(plain, x))
    with pytest.raises(fxgrow.FileError, match="Pass example_inputs"):
        fxgrow.load(mlp(), tmp_path / "plain", into="graph")
    assert isinstance(fxgrow.load(mlp(), tmp_path / "plain", into="graph", example_inputs=x), torch.fx.GraphModule)
    fxgrow.save(fxgrow.capture(plain, x), tmp_path / "graph")
    graph = fxgrow.load(mlp(), tmp_path / "graph")
    assert isinstance(graph, torch.fx.GraphModule) and torch.equal(outputs(graph, x), outputs(plain, x))


def test_wrapped_models(tmp_path: Path) -> None:
    x = INPUTS["mlp"]()
    grown = fxgrow.widen(mlp(), x, {"0": 4})
    for wrapped in (torch.compile(grown), nn.DataParallel(grown), nn.DataParallel(torch.compile(grown))):
        fxgrow.save(wrapped, tmp_path / "net")
        assert torch.equal(outputs(fxgrow.load(torch.compile(mlp()), tmp_path / "net"), x), outputs(grown, x))


@pytest.mark.parametrize("into", ["graph", "module"])
@pytest.mark.parametrize("again", [lambda net: net, nn.DataParallel, torch.compile], ids=["", "parallel", "compiled"])
def test_a_wrapper_that_was_captured_itself_grows_with_its_names(into: Any, again: Any, tmp_path: Path) -> None:
    x = INPUTS["mlp"]()
    grown = fxgrow.widen(nn.DataParallel(mlp()), x, {"module.0": 4}, into=into)
    fxgrow.save(again(pickle.loads(pickle.dumps(grown))), tmp_path / "net")
    assert torch.equal(outputs(fxgrow.load(nn.DataParallel(mlp()), tmp_path / "net"), x), outputs(grown, x))


def test_under_distributed_data_parallel(tmp_path: Path) -> None:
    x = INPUTS["mlp"]()
    grown = fxgrow.widen(mlp(), x, {"0": 4})
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        fxgrow.save(nn.parallel.DistributedDataParallel(grown), tmp_path / "net")
    finally:
        torch.distributed.destroy_process_group()
    assert torch.equal(outputs(fxgrow.load(mlp(), tmp_path / "net"), x), outputs(grown, x))


def test_a_grown_part_of_a_larger_model(tmp_path: Path) -> None:
    grown = fxgrow.widen(mlp(), INPUTS["mlp"](), {"0": 4})
    with pytest.raises(fxgrow.FileError, match="Submodule '1' .* has grown on its own"):
        fxgrow.save(nn.Sequential(nn.Identity(), grown), tmp_path / "net")
    assert list(tmp_path.iterdir()) == []


def test_modes_and_frozen_weights_are_those_of_the_fresh_model(tmp_path: Path) -> None:
    x = INPUTS["convolutions"]()
    grown = fxgrow.widen(convolutions().eval(), x, {"0": 4})
    fxgrow.save(grown, tmp_path / "net")
    fresh = convolutions()
    fresh[5].requires_grad_(False)
    net = fxgrow.load(fresh, tmp_path / "net")
    assert net.training and net.get_submodule("1").training
    assert [n for n, p in net.named_parameters() if not p.requires_grad] == ["5.weight", "5.bias"]
    assert torch.equal(outputs(net, x), outputs(grown, x))


def test_channels_last_and_other_dtypes(tmp_path: Path) -> None:
    x = INPUTS["convolutions"]()
    grown = fxgrow.widen(convolutions(), x, {"0": 4}).to(memory_format=torch.channels_last).bfloat16()
    fxgrow.save(grown, tmp_path / "net")
    net = fxgrow.load(convolutions().bfloat16(), tmp_path / "net")
    assert net.get_parameter("0.weight").stride() == grown.get_parameter("0.weight").stride() == (27, 1, 9, 3)
    assert torch.equal(outputs(net, (x[0].bfloat16(),)), outputs(grown, (x[0].bfloat16(),)))
    with pytest.raises(fxgrow.FileError, match="torch.bfloat16 in the file and torch.float32 in this model"):
        fxgrow.load(convolutions(), tmp_path / "net")


def test_normed_weights(tmp_path: Path) -> None:
    def build() -> nn.Module:
        return nn.Sequential(weight_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 2))

    x = INPUTS["mlp"]()
    grown = fxgrow.widen(build(), x, {"0": 2})
    fxgrow.save(grown, tmp_path / "net")
    net = fxgrow.load(build(), tmp_path / "net")
    assert torch.equal(outputs(net, x), outputs(grown, x))
    assert list(net.state_dict()) == list(grown.state_dict())


class Counting(nn.Linear):
    """Keeps more than tensors."""

    seen = 0

    def get_extra_state(self) -> Any:
        return {"seen": self.seen}

    def set_extra_state(self, state: Any) -> None:
        self.seen = state["seen"]


def test_extra_state(tmp_path: Path) -> None:
    model = nn.Sequential(Counting(3, 4), nn.ReLU(), nn.Linear(4, 2))
    model[0].seen = 7
    fxgrow.save(model, tmp_path / "net")
    assert fxgrow.load(nn.Sequential(Counting(3, 4), nn.ReLU(), nn.Linear(4, 2)), tmp_path / "net")[0].seen == 7


def test_example_inputs_keep_no_data(tmp_path: Path) -> None:
    """Shapes, dtypes and masks only: example inputs are often the first batch of somebody's data."""
    secret = torch.full((2, 3), 0.5).copy_(torch.tensor([[1.5, 2.5, 3.5], [4.5, 5.5, 6.5]])).repeat(8, 1)
    grown = fxgrow.widen(mlp(), (secret,), {"0": 4})
    example = fxgrow.Recipe.of(grown).example
    assert example is not None
    (found,) = example.values(mlp())
    assert found.shape == secret.shape and found.dtype == secret.dtype and not bool((found == secret).any())
    masked = {
        "x": torch.arange(39, -1, -1).view(2, 20).flip(0),
        "mask": torch.ones(2, 20, dtype=torch.int64).tril(),
        "flag": True,
    }

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.out = nn.Embedding(40, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor, mask: Tensor, flag: bool = False) -> Tensor:
            return self.out(self.embed(x) * mask[..., None])

    example = fxgrow.Recipe.of(fxgrow.widen(Masked(), masked, {"embed": 2})).example
    assert example is not None
    again = example.values(Masked())
    assert isinstance(again, dict) and list(again) == ["x", "mask", "flag"]
    assert not torch.equal(again["x"], masked["x"]) and again["x"].max() == 39  # all that a file has of them
    assert torch.equal(again["mask"], masked["mask"]) and again["flag"] is True


# -- resize


def test_resize_makes_a_plain_load_state_dict_work(tmp_path: Path) -> None:
    x = INPUTS["Attention"]()
    grown = fxgrow.widen(Attention(), x, {"qkv": 12, "embed": 3})
    fxgrow.save(grown, tmp_path / "net")
    recipe = fxgrow.Recipe.of(grown)
    for given in (recipe, recipe.to_json(), tmp_path / "net", str(tmp_path / "net")):
        net = fxgrow.resize(Attention(), given)
        assert torch.equal(net.get_parameter("qkv.weight"), torch.zeros(36, 11))
        net.load_state_dict(grown.state_dict())
        assert net.get_parameter("head.weight") is net.get_parameter("embed.weight")
        assert torch.equal(outputs(net, x), outputs(grown, x))


def test_recipes_are_plain_data() -> None:
    recipe = fxgrow.Recipe.of(fxgrow.widen(Attention(), INPUTS["Attention"](), {"qkv": 12, "embed": 3}))
    again = fxgrow.Recipe.from_json(recipe.to_json())
    assert again == recipe and str(again) == "widen: qkv +12, embed +3"
    for text, message in [
        ("{}", "is not a recipe"),
        (3, "A int is no recipe"),
        ("{nothing", "is not a recipe"),
        (recipe.to_json().replace('"fxgrow_recipe": 1', '"fxgrow_recipe": 2'), "version 2"),
        (recipe.to_json().replace('"sizes"', '"size"'), "is not a recipe"),
    ]:
        with pytest.raises(fxgrow.FileError, match=message):
            fxgrow.resize(Attention(), text)


# -- models that do not fit


@pytest.mark.parametrize(
    ("fresh", "message"),
    [
        (
            lambda: convolutions(hidden=5),
            r"Dimension 0 of '0.weight' is 5 in this model \(\[5, 3, 3, 3\]\).* from 4 to 8",
        ),
        (lambda: convolutions(classes=7), r"'5.weight' has the shape \[2, 8\] in the file and \[7, 8\] in this model"),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 3)), "The model has no tensor '1.weight', which growth 1 widens"),
        (lambda: nn.Sequential(*convolutions(), nn.Linear(2, 2)), "the file has no '6.bias', '6.weight'"),
        (
            lambda: nn.Sequential(*convolutions()[:5], nn.Linear(4, 2, bias=False)),
            "the model has no '5.bias'",
        ),
        (lambda: convolutions().double(), "torch.float32 in the file and torch.float64 in this model"),
        (lambda: fxgrow.widen(convolutions(), images(8), {"0": 4}), "has grown already"),
        (lambda: "net", "model=.net.: this needs a torch.nn.Module, not a str"),
    ],
    ids=["sizes", "classes", "another", "longer", "bias", "dtype", "grown", "no module"],
)
def test_models_that_do_not_fit(fresh: Callable[[], Any], message: str, tmp_path: Path) -> None:
    fxgrow.save(fxgrow.widen(convolutions(), images(8), {"0": 4}), tmp_path / "net")
    model = fresh()
    before = copy.deepcopy(model.state_dict()) if isinstance(model, nn.Module) else {}
    with pytest.raises(fxgrow.FileError, match=message):
        fxgrow.load(model, tmp_path / "net")
    for name, t in before.items():
        assert torch.equal(model.state_dict()[name], t)


def test_ties_that_differ(tmp_path: Path) -> None:
    x = INPUTS["Attention"]()
    untied = Attention()
    untied.head.weight = nn.Parameter(untied.embed.weight.detach().clone())
    fxgrow.save(fxgrow.widen(Attention(), x, {"qkv": 12}), tmp_path / "tied")
    fxgrow.save(fxgrow.widen(untied, x, {"qkv": 12}), tmp_path / "untied")
    with pytest.raises(fxgrow.FileError, match="one tensor in the file and two in this model"):
        fxgrow.load(untied, tmp_path / "tied")
    with pytest.raises(fxgrow.FileError, match="one tensor in this model and two in the file"):
        fxgrow.load(Attention(), tmp_path / "untied")


class Scaled(nn.Module):
    """The same parameters, and another number in the code that growth edits."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu().view(x.shape[0], self.heads, 8 // self.heads).flatten(1))


def test_code_that_differs(tmp_path: Path) -> None:
    x = (torch.randn(3, 4),)
    (width, _) = fxgrow.widths(fxgrow.capture(Scaled(2), x))
    fxgrow.save(fxgrow.widen(Scaled(2), x, {"first": 2 * width.step}), tmp_path / "net")
    with pytest.raises(fxgrow.FileError, match="takes . in this model's code.*from"):
        fxgrow.load(Scaled(4), tmp_path / "net")


def test_the_fresh_model_is_never_changed(tmp_path: Path) -> None:
    grown = fxgrow.widen(convolutions(), images(8), {"0": 4})
    fxgrow.save(grown, tmp_path / "net")
    fresh = convolutions()
    before, attributes = copy.deepcopy(fresh.state_dict()), repr(fresh)
    net = fxgrow.load(fresh, tmp_path / "net")
    with torch.no_grad():
        for p in net.parameters():
            p.zero_()
    assert repr(fresh) == attributes and not hasattr(fresh, "fxgrow_recipe")
    assert all(torch.equal(fresh.state_dict()[name], t) for name, t in before.items())


@pytest.mark.gpu
def test_weights_go_to_the_fresh_model_s_device(tmp_path: Path) -> None:
    x = images(8)
    grown = fxgrow.widen(convolutions().cuda(), (x[0].cuda(),), {"0": 4})
    fxgrow.save(grown, tmp_path / "net")
    for device in ("cpu", "cuda"):
        net = fxgrow.load(convolutions().to(device), tmp_path / "net")
        assert {t.device.type for t in net.state_dict().values()} == {device}
        for name, t in grown.state_dict().items():
            assert torch.equal(net.state_dict()[name].cpu(), t.cpu())
    assert torch.equal(outputs(net, (x[0].cuda(),)), outputs(grown, (x[0].cuda(),)))
