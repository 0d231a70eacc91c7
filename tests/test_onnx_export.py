"""The ONNX file computes what the module computes, or there is no file."""

from __future__ import annotations

import logging
import operator
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")

from fxgrow import onnx_export as _export  # noqa: E402
from fxgrow.errors import CaptureError, ExportError, MissingExtraError  # noqa: E402
from fxgrow.graph.evaluate import difference  # noqa: E402
from fxgrow.graph.node_functions import guard  # noqa: E402
from fxgrow.onnx_export import export_onnx  # noqa: E402
from fxgrow.pipeline.widen import widen  # noqa: E402


class ConvNet(nn.Module):
    """Residual, with BatchNorm statistics that are not the initial ones, and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.second = nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(6, 4)
        nn.init.normal_(self.norm.running_mean)
        nn.init.uniform_(self.norm.running_var, 0.5, 2.0)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        x = torch.relu(x + self.norm(self.second(x)))
        return self.head(self.drop(x.mean((2, 3))))


class Pair(nn.Module):
    """Integer and floating inputs, one that is not batched, and a dict of outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 5)
        self.out = nn.Linear(5, 3)

    def forward(self, ids: Tensor, mask: Tensor, scale: Tensor, times: int = 1) -> dict[str, Any]:
        hidden = self.embed(ids) * mask.unsqueeze(-1) * scale * times
        return {"logits": self.out(hidden), "states": (hidden, hidden.sum(1)), "nothing": None}


def run(path: Path, *arrays: Tensor) -> list[Tensor]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]
    fed = {name: array.numpy() for name, array in zip(names, arrays, strict=True)}
    return [torch.as_tensor(array) for array in session.run(None, fed)]


def axes(path: Path) -> list[list[int | str]]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return [entry.shape for entry in session.get_inputs()]


@pytest.mark.parametrize("size", [1, 4])
def test_traced_conv_net_runs_at_other_batch_sizes(tmp_path: Path, size: int) -> None:
    module = fx.symbolic_trace(ConvNet())
    module.norm.eval()
    modes = {name: part.training for name, part in module.named_modules()}
    before = {name: value.clone() for name, value in module.state_dict().items()}

    path = export_onnx(module, tmp_path / "net.onnx", (torch.randn(size, 3, 9, 9),))

    assert axes(path) == [["batch", 3, 9, 9]]
    assert {name: part.training for name, part in module.named_modules()} == modes
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    module.eval()
    for batch in (1, 7):
        x = torch.randn(batch, 3, 9, 9)
        torch.testing.assert_close(run(path, x)[0], module(x), rtol=1e-4, atol=1e-5)
    assert [file.name for file in tmp_path.iterdir()] == ["net.onnx"]


def test_dict_inputs_and_outputs(tmp_path: Path) -> None:
    module = Pair().eval()
    inputs = {
        "mask": torch.rand(3, 6),
        "ids": torch.randint(0, 11, (3, 6)),
        "scale": torch.rand(5),
        "times": 2,
    }
    path = export_onnx(module, tmp_path / "pair.onnx", inputs)

    assert axes(path) == [["batch", 6], ["batch", 6], [5]]
    mask, ids, scale = torch.rand(7, 6), torch.randint(0, 11, (7, 6)), torch.rand(5)
    want = module(ids, mask, scale, times=2)
    for got, expected in zip(run(path, mask, ids, scale), [want["logits"], *want["states"]], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


class StepsFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb, self.rnn, self.out = nn.Embedding(20, 5), nn.GRU(5, 6), nn.Linear(6, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.rnn(self.emb(ids))[1][-1])


def test_the_batch_of_a_recurrent_layer_may_be_dimension_1(tmp_path: Path) -> None:
    net, ids = StepsFirst(), torch.arange(12).reshape(4, 3)
    path = export_onnx(widen(net, (ids,), {"rnn": 2}), tmp_path / "net.onnx", (ids,))
    session = onnxruntime.InferenceSession(str(path))
    (entry,) = session.get_inputs()
    assert entry.shape == [4, "batch"]
    many = torch.arange(20).reshape(4, 5)
    (out,) = session.run(None, {entry.name: many.numpy()})
    torch.testing.assert_close(torch.as_tensor(out), net.eval()(many).detach(), rtol=1e-5, atol=1e-5)


def test_a_fixed_batch_stays_fixed(tmp_path: Path) -> None:
    path = export_onnx(nn.Linear(4, 2), str(tmp_path / "fixed.onnx"), (torch.randn(3, 4),), dynamic_batch=False)
    assert axes(path) == [[3, 4]]


def test_a_file_that_disagrees_is_not_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "net.onnx"
    target.write_bytes(b"an older file")
    translate = _export._to_onnx

    def planted(module: nn.Module, *args: Any) -> Any:
        wrong = nn.Linear(4, 2)
        wrong.load_state_dict({name: 1.01 * value for name, value in module.state_dict().items()})
        return translate(wrong, *args)

    monkeypatch.setattr(_export, "_to_onnx", planted)
    inputs = (torch.randn(3, 4),)
    with pytest.raises(ExportError, match=r"at batch size 3 output 0 .* differs .* by 1\.00e-02") as caught:
        export_onnx(nn.Linear(4, 2), target, inputs)
    assert "tolerance 1e-04" in str(caught.value)
    assert target.read_bytes() == b"an older file"
    assert list(tmp_path.iterdir()) == [target]
    export_onnx(nn.Linear(4, 2), target, inputs, tolerance=0.02)
    export_onnx(nn.Linear(4, 2), target, inputs, check=False)


def test_shape_guards_are_left_out_of_the_file_only(tmp_path: Path) -> None:
    inner = fx.symbolic_trace(ConvNet())
    entry = next(node for node in inner.graph.nodes if node.op == "placeholder")
    with inner.graph.inserting_before(entry.next):
        size = inner.graph.call_method("size", (entry, 0))
        small = inner.graph.call_function(operator.le, (size, 8))
        taken = inner.graph.call_function(bool, (small,))
        inner.graph.call_function(guard, (taken, True, "line 3: x.shape[0] <= 8"))
    inner.recompile()
    module = nn.Sequential(inner, nn.ReLU())
    code = inner.code

    path = export_onnx(module, tmp_path / "guarded.onnx", (torch.randn(4, 3, 9, 9),))
    assert run(path, torch.randn(9, 3, 9, 9))[0].shape == (9, 4)
    assert inner.code == code
    with pytest.raises(CaptureError, match="x.shape"):
        module(torch.randn(9, 3, 9, 9))
    with pytest.raises(ExportError, match=r"fails at batch size 9: CaptureError.*dynamic_batch=False"):
        export_onnx(module, tmp_path / "guarded.onnx", (torch.randn(8, 3, 9, 9),))


class Specialised(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flip(0) if x.shape[0] == 4 else x


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class Untranslated(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.special.bessel_j0(x)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Specialised(), r"batch size cannot stay free: .*constant \(4\); pass dynamic_batch=False"),
        (Branching(), "torch.export cannot follow this module: .*data-dependent"),
        (Untranslated(), "no translation .*bessel_j0"),
        (nn.Linear(3, 2), "the module itself fails at batch size 4: .*pass example_inputs that it accepts"),
        (nn.Linear(6, 2).bfloat16(), "fails at batch size 4"),
    ],
)
def test_what_cannot_be_exported_says_why(tmp_path: Path, module: nn.Module, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        export_onnx(module, tmp_path / "net.onnx", (torch.ones(4, 6),))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (torch.ones(1, 2), r"is a Tensor; pass a tuple"),
        ((), "holds no tensor"),
        ((torch.ones(0, 2),), r"shape \[0, 2\]"),
        ((torch.tensor(1.0),), "no samples along dimension 0"),
    ],
)
def test_bad_examples(tmp_path: Path, inputs: Any, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        export_onnx(nn.Linear(2, 2), tmp_path / "net.onnx", inputs)


def test_a_missing_folder_or_package_or_operator_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = (torch.ones(1, 2),)
    with pytest.raises(ExportError, match="nowhere does not exist"):
        export_onnx(nn.Linear(2, 2), tmp_path / "nowhere" / "net.onnx", inputs)
    with pytest.raises(ExportError, match="operator set 3"):
        export_onnx(nn.Linear(2, 2), tmp_path / "net.onnx", inputs, opset=3)
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(MissingExtraError, match=r"onnxruntime.*pip install fxgrow\[onnx\]"):
        export_onnx(nn.Linear(2, 2), tmp_path / "net.onnx", inputs)
    assert export_onnx(nn.Linear(2, 2), tmp_path / "net.onnx", inputs, check=False).exists()


def test_the_exporters_are_silent(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    level = logging.getLogger("torch.onnx").level
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ids = torch.zeros(2, 3, dtype=torch.long)
        export_onnx(Pair(), tmp_path / "net.onnx", (ids, torch.ones(2, 3), torch.ones(5)))
        with pytest.raises(ExportError):
            export_onnx(Branching(), tmp_path / "net.onnx", (torch.ones(2),))
    assert not caught
    assert capfd.readouterr() == ("", "")
    assert logging.getLogger("torch.onnx").level == level


@pytest.mark.parametrize("traced", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_resnet18(tmp_path: Path, traced: bool) -> None:
    from fxgrow.integrations._torchvision import import_torchvision

    module: nn.Module = import_torchvision().models.resnet18(num_classes=10)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.normal_(part.running_mean, std=0.1)
            nn.init.uniform_(part.running_var, 0.5, 2.0)
    module = fx.symbolic_trace(module) if traced else module
    path = export_onnx(module, tmp_path / "resnet18.onnx", (torch.randn(2, 3, 32, 32),))
    module.eval()
    for batch in (1, 7):
        x = torch.randn(batch, 3, 32, 32)
        want = module(x)
        assert difference(run(path, x)[0], want.detach()).relative < 1e-4
