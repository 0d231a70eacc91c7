"""A file comes back as what was saved, or is refused by the name of the first thing that differs."""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxgrow
from fxgrow.graph.code_lines import code_difference, code_lines
from fxgrow.graph.module_options import module_options, names_read, option_names
from fxgrow.storage.example_inputs import TensorSpec
from fxgrow.storage.safetensors_file import read, write
from tests.checkpoints.saved import outputs


class Choices:
    """An object of which nothing is known."""

    def __init__(self, given: dict[str, Any]) -> None:
        vars(self).update(given)


class Encoder(nn.Module):
    """Takes options in the ways of users: to layers, functions, branches and constants."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        given = {
            "heads": 2, "slope": 0.1, "eps": 1e-5, "p": 0.1, "padding": "zeros", "window": 0, "scale": 1.0,
            "late": False, "activation": F.relu, "approximate": "none", "base": 10.0, "drop": 0.2, "layer": nn.Tanh,
        } | options  # fmt: skip
        self.config: Any = Choices(given)
        self.conv = nn.Conv1d(4, 8, 3, padding=1, padding_mode=given["padding"])
        self.norm = nn.LayerNorm(8, given["eps"])
        self.attention = nn.MultiheadAttention(8, given["heads"], given["p"], batch_first=True)
        self.wide, self.narrow = nn.Linear(8, 6), nn.Linear(6, 8)
        self.middle = nn.Sequential(nn.LeakyReLU(given["slope"]), nn.GELU(given["approximate"]), given["layer"]())
        self.register_buffer("phase", torch.arange(6.0).div(given["base"]).sin()[:, None], persistent=False)
        self.table = [torch.full((8,), float(given["base"]))]

    def forward(self, x: Tensor) -> Tensor:
        c = self.config
        h = self.norm(self.conv(x).transpose(1, 2) + self.phase) * self.table[0]
        mask = torch.ones(6, 6, dtype=torch.bool).triu(1) if c.window else None
        h = h + self.attention(h, h, h, attn_mask=mask, need_weights=False)[0]
        h = F.dropout(self.narrow(self.middle(c.activation(self.wide(h)))), c.drop, self.training)
        return (h + x.mean()) * c.scale if c.late else h * c.scale + x.mean()


OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"heads": 4}, "num_heads of 'attention' is 2 in the file and 4"),
    ({"slope": 0.3}, "negative_slope of 'middle.0' is 0.1 in the file and 0.3"),
    ({"eps": 0.1}, "eps of 'norm' is 1e-05 in the file and 0.1"),
    ({"p": 0.9}, "dropout of 'attention' is 0.1 in the file and 0.9"),
    ({"padding": "circular"}, "padding_mode of 'conv' is 'zeros' in the file and 'circular'"),
    ({"approximate": "tanh"}, "approximate of 'middle.1' is 'none' in the file and 'tanh'"),
    ({"layer": nn.Sigmoid}, "class of 'middle.2' is Tanh in the file and Sigmoid"),
    ({"window": 3}, "code of this model is not that of the saved one"),
    ({"scale": 3.0}, r"code of this model.*mul\(%, 1\).*mul\(%, 3\)"),
    ({"late": True}, "code of this model"),
    ({"activation": F.gelu}, r"code of this model.*relu\(%.*gelu\(%"),
    ({"drop": 0.5}, r"code of this model.*p=0.2.*p=0.5"),
    ({"base": 100.0}, "computes something else than the saved one: output 0"),
]
X = (torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(3)),)


def saved_encoder(kind: str, path: Path) -> nn.Module:
    torch.manual_seed(0)
    net: nn.Module = Encoder()
    if kind == "captured":
        net = fxgrow.capture(net, X)
    elif kind != "plain":
        net = fxgrow.widen(fxgrow.widen(net, X, {"wide": 2}, into=kind), X, {"wide": 1}, into=kind)  # type: ignore[arg-type]
    (fxgrow.save_checkpoint if kind == "graph" else lambda p, m: fxgrow.save(m, p))(path, net)
    return net


def loaded(path: Path, kind: str, model: nn.Module, **options: Any) -> Any:
    return (fxgrow.load_checkpoint(path).model if kind == "graph" else lambda m, **o: fxgrow.load(m, path, **o))(
        model, **options
    )


@pytest.mark.parametrize("kind", ["captured", "graph", "module"])
def test_other_options_are_named(kind: str, tmp_path: Path) -> None:
    """From files of captured and grown models and from a checkpoint."""
    net = saved_encoder(kind, tmp_path / "net")
    same = loaded(tmp_path / "net", kind, Encoder(scale=1, padding="zeros"))
    assert torch.equal(outputs(same, X), outputs(net, X))
    for options, message in OPTIONS if kind == "module" else OPTIONS[::3]:
        model = Encoder(**options)
        with pytest.raises(fxgrow.FileError, match=message) as error:
            loaded(tmp_path / "net", kind, model)
        assert "strict=False" in str(error.value) and len(str(error.value)) < 500
    meant = loaded(tmp_path / "net", kind, Encoder(scale=3.0), strict=False)
    torch.testing.assert_close(outputs(meant, X) - X[0].mean(), 3 * (outputs(net, X) - X[0].mean()))
    if kind != "graph":
        with pytest.raises(fxgrow.FileError, match="eps of 'norm'"):
            fxgrow.resize(Encoder(eps=0.1), tmp_path / "net")


class Scaled(nn.Module):
    """Never captured, so that its options are all that a file has of it."""

    def __init__(
        self, scale: float, activation: Callable[..., Any], config: dict[str, Any], dims: list[int], device: Any = "cpu"
    ) -> None:
        super().__init__()
        self.factor = scale * 2
        self.activation, self.config, self.dims, self.device = activation, config, dims, device
        self.set_up(scale)
        self.calls, self.seen, self.log, self.rate = 0, None, [1], 1.0
        self.counts, self.table, self.losses = {"n": 0}, {"gain": scale}, []
        self.register_buffer("wave", torch.arange(99.0).mul(scale).sin(), persistent=False)
        self.layer, self.norm = nn.Linear(3, 3), nn.BatchNorm1d(3)

    def set_up(self, scale: float) -> None:
        self.offset = scale > 1

    def anneal(self) -> None:
        self.rate *= 0.5

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen = x.shape[0]
        self.log.append(2)
        self.counts["n"] += 1
        return self.activation(self.norm(self.layer(x)) * self.factor) * self.gain()

    def gain(self) -> float:
        return float(self.table["gain"])


def scaled(**options: Any) -> Scaled:
    given: Any = {"scale": 1.0, "activation": F.relu, "config": {"causal": False}, "dims": [1, 2]} | options
    return Scaled(**given)


def test_models_that_were_never_captured(tmp_path: Path) -> None:
    net = scaled()
    net(torch.randn(5, 3))
    net.anneal()
    net.losses.append(0.5)
    net.table["later"] = 1.0
    fxgrow.save(net, tmp_path / "net")
    again = fxgrow.load(scaled(scale=1, device=torch.device("cuda", 1)), tmp_path / "net")  # counters are none's option
    assert again.calls == 0 and torch.equal(outputs(again, (X[0][0, :, :3],)), outputs(net, (X[0][0, :, :3],)))
    for options, message in [
        ({"scale": 2.0}, "factor of 'the model' is 2 in the file and 4"),
        ({"activation": lambda x: x.cos() * 2.0}, r"is relu in the file and lambda: cos, 2.0 in"),
        ({"activation": torch.tanh}, "activation of 'the model' is relu in the file and tanh"),
        ({"config": {"causal": True}}, "config.causal of 'the model' is False in the file and True"),
        ({"dims": [1, 3]}, r"dims of 'the model' is \(1, 2\) in the file and \(1, 3\)"),
    ]:
        with pytest.raises(fxgrow.FileError, match=message):
            fxgrow.load(scaled(**options), tmp_path / "net")
    for change, message in [
        (lambda m: m.table.update(gain=2.0), "table.gain of 'the model' is 1 in the file and 2"),
        (lambda m: m.wave.mul_(2), "Buffer 'wave', which no file holds, is another one"),
    ]:
        changed = scaled()
        change(changed)
        with pytest.raises(fxgrow.FileError, match=message):
            fxgrow.load(changed, tmp_path / "net")
    other = scaled()
    other.norm = nn.SyncBatchNorm(3)
    assert isinstance(fxgrow.load(other, tmp_path / "net").norm, nn.SyncBatchNorm)
    other.more = nn.Dropout(0.5)
    with pytest.raises(fxgrow.FileError, match="'more' is a Dropout in this model, and there is no such module"):
        fxgrow.load(other, tmp_path / "net")


def double(model: Any, x: Tensor) -> Tensor:
    return model.widened(x) * getattr(model, "gain")  # noqa: B009


class Booked(nn.Module):
    """Keeps books about a run, and is told of things that only training asks for."""

    def __init__(self, number: int = 0, rate: float = 0.1, gain: float = 1.0, slope: float = 0.1) -> None:
        super().__init__()
        self.run, self.folder, self.created = f"run {number}", f"runs/{number}", 100.0 + number
        self.steps, self.best, self.notes = number, float(number), [number]
        self.rate, self.gain, self.slope = rate, gain, slope
        self.arguments = argparse.Namespace(rate=rate, slope=slope)
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), self.rate)

    def widened(self, x: Tensor) -> Tensor:
        return F.leaky_relu(self.a(x), self.arguments.slope)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(double(self, x))


@pytest.mark.parametrize("into", ["graph", "module"])
def test_what_no_forward_pass_reads_may_differ(into: Any, tmp_path: Path) -> None:
    x = (torch.randn(5, 3),)
    net = fxgrow.widen(Booked(), x, {"a": 2}, into=into)
    fxgrow.save(net, tmp_path / "net")
    fxgrow.save_checkpoint(tmp_path / "run", net)
    for load in (lambda m: fxgrow.load(m, tmp_path / "net"), fxgrow.load_checkpoint(tmp_path / "run").model):
        assert torch.equal(outputs(load(Booked(7, rate=0.2)), x), outputs(net, x))
        for options in ({"gain": 2.0}, {"slope": 0.5}):
            with pytest.raises(fxgrow.FileError, match="in the file and|has"):
                load(Booked(**options))  # type: ignore[arg-type]
    fxgrow.save(Booked(), tmp_path / "plain")  # of its arguments nothing else is known
    fxgrow.load(Booked(7), tmp_path / "plain")
    with pytest.raises(fxgrow.FileError, match="The option rate of 'the model' is 0.1 in the file and 0.2"):
        fxgrow.load(Booked(rate=0.2), tmp_path / "plain")


def test_names_that_a_forward_pass_reads() -> None:
    read = names_read(frozenset((Booked, nn.Conv2d, nn.MultiheadAttention, nn.LSTM)))
    assert read >= {"gain", "slope", "stride", "padding_mode", "num_heads", "bidirectional", "num_layers"}
    assert read.isdisjoint({"run", "folder", "created", "steps", "best", "notes", "rate", "configure_optimizers"})


def test_names_of_options() -> None:
    names = option_names(Scaled)  # type: ignore[arg-type]
    assert names.arguments >= {"activation", "config", "dims"}
    assert {"factor", "offset"} <= names.others
    assert not {"calls", "seen", "rate", "device"} & (names.others | names.arguments)
    options = module_options(nn.Sequential(nn.Conv2d(2, 4, 3, stride=2, groups=2), nn.GELU("tanh")), ())
    assert options["0"].items() >= {"class": "Conv2d", "stride": "(2, 2)", "groups": "2"}.items()
    assert options["1"] == {"class": "GELU", "approximate": "'tanh'"}


def test_lines_of_code_do_not_depend_on_mode_dtype_and_order() -> None:
    first = code_lines(fxgrow.capture(Encoder(), X))
    for model in (Encoder().eval(), Encoder().bfloat16(), Encoder().requires_grad_(False)):
        x = (X[0].to(next(model.parameters()).dtype),)
        with torch.no_grad():
            assert code_difference(first, code_lines(fxgrow.capture(model, x))) is None
    assert code_difference(first, code_lines(fxgrow.capture(Encoder(), (X[0][:1],)))) is None
    assert code_difference(first, first[:-1]) == (first[-1][13:], "nothing")


class Turned(nn.Module):
    """Attention of which only the angles depend on an option."""

    def __init__(self, base: float = 10.0) -> None:
        super().__init__()
        self.register_buffer("rates", base ** -torch.arange(2.0), persistent=False)
        self.tokens, self.wide, self.narrow = nn.Embedding(30, 4), nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.tokens(tokens)
        angles = torch.arange(tokens.shape[1])[:, None] * self.rates
        pairs = torch.view_as_complex(h.unflatten(-1, (2, 2))) * torch.polar(torch.ones_like(angles), angles)
        turned = torch.view_as_real(pairs).flatten(2)
        h = (turned @ turned.mT).softmax(-1) @ h
        return h + self.narrow(F.relu(self.wide(h)))


@pytest.mark.parametrize("into", ["graph", "module"])
def test_tokens_of_a_fingerprint_tell_positions_apart(into: Any, tmp_path: Path) -> None:
    tokens = (torch.randint(30, (2, 12)),)
    net = fxgrow.widen(Turned(), tokens, {"wide": 2}, into=into)
    fxgrow.save(net, tmp_path / "net")
    assert torch.equal(outputs(fxgrow.load(Turned(), tmp_path / "net"), tokens), outputs(net, tokens))
    with pytest.raises(fxgrow.FileError, match="computes something else than the saved one: output 0"):
        fxgrow.load(Turned(20.0), tmp_path / "net")


def test_integers_in_the_place_of_those_of_the_example() -> None:
    for given, expected in [
        (torch.tensor([[9, 2, 5] * 7, [0, 3, 1] * 7]), torch.arange(42) * 9 // 41),
        (torch.arange(30, 10, -1), torch.linspace(30, 11, 20).long()),
        (torch.tensor([-100, 3] * 10), torch.zeros(20)),
        (torch.tensor([0, 2**60] * 10), torch.zeros(20)),
        (torch.arange(20, dtype=torch.uint8), torch.arange(20)),
    ]:
        found = TensorSpec.of(given).tensor()
        assert found.shape == given.shape and found.dtype == given.dtype
        assert (found.flatten().double() - expected.double()).abs().max() <= 1
        assert given.min().clamp(max=0) <= found.min() and found.max() <= given.max()


class Noisy(nn.Module):
    """Random in eval mode, and never the same."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.dropout(self.a(x), 0.5, True))


@pytest.mark.parametrize(
    "build",
    [
        Noisy,
        lambda: nn.Sequential(nn.Embedding(5, 3), nn.RNN(3, 3, 2, dropout=0.5)),
        lambda: nn.Sequential(nn.Conv1d(3, 40, 1), nn.BatchNorm1d(40), nn.Softmax(1)),
    ],
    ids=["random", "tuple", "large"],
)
def test_the_same_model_in_other_circumstances(build: Callable[[], nn.Module], tmp_path: Path) -> None:
    """In train and eval mode, cast, under wrappers, and frozen; what is saved stays as it is."""
    x = (torch.randint(5, (4, 2)),) if isinstance(build(), nn.Sequential) and type(build()[0]) is nn.Embedding else (  # type: ignore[index]
        torch.randn(2, 3, 30) if isinstance(build(), nn.Sequential) else torch.randn(6, 3),
    )  # fmt: skip
    for change, fresh in [
        (lambda m: m.eval(), lambda m: m.train()),
        (lambda m: m.bfloat16(), lambda m: m.bfloat16()),
        (lambda m: m.double(), lambda m: m.double()),
        (torch.compile, lambda m: m.requires_grad_(False)),
        (nn.DataParallel, torch.compile),
    ]:
        for net in (build(), fxgrow.capture(build(), x)):
            net = change(net)
            state, mode, random = (
                {k: v.clone() for k, v in net.state_dict().items()},
                net.training,
                torch.get_rng_state(),
            )
            with torch.autocast("cpu"), torch.inference_mode():
                fxgrow.save(net, tmp_path / "net")
            assert net.training is mode and torch.equal(torch.get_rng_state(), random)
            assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
            fxgrow.load(fresh(build()), tmp_path / "net")
    body, _ = read(tmp_path / "net")
    assert len(json.dumps(body)) < 20_000


def test_files_of_earlier_versions_and_of_other_ones_of_torch(tmp_path: Path) -> None:
    net = saved_encoder("module", tmp_path / "net")
    body, tensors = read(tmp_path / "net")
    body = {key: value for key, value in body.items() if key not in ("version", "layouts")}
    other = {**body, "fingerprint": {**body["fingerprint"], "torch_version": "1.0"}}
    other["recipe"] = {**body["recipe"], "code": ["0123456789ab relu(%)"]}
    write(tmp_path / "other", tensors, other)
    assert torch.equal(outputs(fxgrow.load(Encoder(), tmp_path / "other"), X), outputs(net, X))
    with pytest.raises(fxgrow.FileError, match="eps of 'norm'"):
        fxgrow.load(Encoder(eps=0.1), tmp_path / "other")
    with pytest.raises(fxgrow.FileError, match="computes something else"):
        fxgrow.load(Encoder(window=1), tmp_path / "other")
    old = {key: value for key, value in body.items() if key not in ("fingerprint", "own")}
    old["recipe"] = {key: value for key, value in body["recipe"].items() if key != "code"}
    write(tmp_path / "old", tensors, old)
    assert torch.equal(outputs(fxgrow.load(Encoder(), tmp_path / "old"), X), outputs(net, X))


# -- state that modules keep in ways of their own


class Packed(nn.Module):
    """Weights that are no parameters, as layers of torch.ao keep them."""

    def __init__(self) -> None:
        super().__init__()
        self.w = [torch.randn(5, 6)]

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "w"] = self.w[0]

    def _load_from_state_dict(self, state: Any, prefix: str, *args: Any) -> None:
        self.w[0] = state.pop(prefix + "w")
        super()._load_from_state_dict(state, prefix, *args)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.w[0].T


class Hooked(nn.Module):
    """By hooks on its state."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = torch.randn(5)
        self.layer = nn.Linear(6, 5)
        self.register_state_dict_post_hook(lambda m, state, prefix, _: state.update({prefix + "shift": m.shift}))
        self.register_load_state_dict_pre_hook(self.read)

    @staticmethod
    def read(module: Any, state: Any, prefix: str, *args: Any) -> None:
        module.shift = state.pop(prefix + "shift")

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.shift


class Calibrated(nn.Linear):
    """By `get_extra_state`; tracing makes its number a constant of the graph."""

    def __init__(self) -> None:
        super().__init__(6, 5)
        self.scale = float(torch.rand(()))

    def get_extra_state(self) -> Any:
        return {"scale": self.scale}

    def set_extra_state(self, state: Any) -> None:
        self.scale = state["scale"]

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale


def quantised() -> nn.Module:
    ao = torch.ao.quantization
    kinds = {"0": ao.default_dynamic_qconfig, "2": ao.per_channel_dynamic_qconfig}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 5))
        out: nn.Module = ao.quantize_dynamic(net, kinds, torch.qint8)
    return out


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("layer", [Packed, Hooked, Calibrated, quantised])
@pytest.mark.parametrize("kind", ["plain", "graph", "module"])
def test_state_that_is_no_tensor_of_the_model(layer: Callable[[], nn.Module], kind: Any, tmp_path: Path) -> None:
    def build() -> nn.Module:
        return nn.Sequential(layer(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))

    x = (torch.randn(7, 6),)
    net = build()
    if kind != "plain":
        net = fxgrow.widen(net, x, {"1": 2}, into=kind)
    fxgrow.save(net, tmp_path / "net")
    fxgrow.save_checkpoint(tmp_path / "checkpoint", net)
    for load in (lambda m: fxgrow.load(m, tmp_path / "net"), fxgrow.load_checkpoint(tmp_path / "checkpoint").model):
        fresh = build()
        before = outputs(fresh, x)
        assert torch.equal(outputs(load(fresh), x), outputs(net, x))
        assert torch.equal(outputs(fresh, x), before)
    with pytest.raises(fxgrow.FileError, match="differs|differ|no '"):
        fxgrow.load(nn.Sequential(nn.Linear(6, 5), *list(build())[1:]), tmp_path / "net")


def test_state_that_no_file_holds(tmp_path: Path) -> None:
    net = Packed()
    net.w[0] = object()  # type: ignore[call-overload]
    with pytest.raises(fxgrow.FileError, match="w is a builtins.object, which cannot be saved without pickle"):
        fxgrow.save(net, tmp_path / "net")
    assert list(tmp_path.iterdir()) == []


def test_quantised_tensors_that_fit_nothing(tmp_path: Path) -> None:
    fxgrow.save(quantised(), tmp_path / "net")
    body, tensors = read(tmp_path / "net")
    body = {key: value for key, value in body.items() if key not in ("version", "layouts")}
    name = next(name for name in body["own"] if name.startswith("2.") and name.endswith("_packed_params"))
    for scales in (torch.ones(3).double(), torch.ones(2, 2), torch.ones(5, dtype=torch.bool)):
        changed = json.loads(json.dumps(body))
        changed["own"][name]["tuple"][0]["tuple"][2] = {"tensor": "scales"}
        write(tmp_path / "other", {**tensors, "scales": scales}, changed)
        with pytest.raises(fxgrow.FileError, match="quantised tensor|state of its modules"):
            fxgrow.load(quantised(), tmp_path / "other")


def test_working_in_place_is_no_other_function(tmp_path: Path) -> None:
    def net(inplace: bool) -> nn.Module:
        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                torch.manual_seed(0)
                self.a, self.act, self.b = nn.Linear(4, 6), nn.ReLU(inplace), nn.Linear(6, 2)

            def forward(self, x: Tensor) -> Tensor:
                return F.elu(self.b(self.act(self.a(x))), inplace=inplace)

        return Net()

    x = torch.randn(3, 4)
    for into in ("graph", "module"):
        grown = fxgrow.widen(net(False), (x,), {"a": 2}, into=into)
        fxgrow.save(grown, tmp_path / "net.safetensors")
        assert fxgrow.load(net(True), tmp_path / "net.safetensors")(x).equal(grown(x))
