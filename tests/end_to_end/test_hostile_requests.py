"""Requests that cannot be: each a short `FxgrowError`, before anything is read or changed."""

from __future__ import annotations

import inspect
import io
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fxgrow
from fxgrow.data import argument_checks
from fxgrow.rewriting import memory
from fxgrow.rewriting.widened_graph import WidenedGraph

X, Y = torch.randn(64, 6), torch.randint(0, 3, (64,))
BATCHES = list(zip(X.split(16), Y.split(16), strict=True))
HUGE = 10**12


def net(outputs: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, outputs))


class World:
    """A model in training and what a call may be given; made anew for each call."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        self.net = net()
        self.optimizer = torch.optim.Adam(self.net.parameters())
        self.grown = fxgrow.widen(self.net, (X,), {"0": 1})
        self.file, self.run = folder / "net.safetensors", folder / "run.safetensors"
        fxgrow.save(self.grown, self.file)
        fxgrow.save_checkpoint(self.run, self.grown)
        self.profile = fxgrow.profile(self.net, BATCHES, progress=False)

    def grow(self, data: Any = BATCHES, **options: Any) -> Any:
        return fxgrow.grow(self.net, data, progress=False, **options)

    def grower(self, data: Any = BATCHES, schedule: Any = None, optimizer: Any = None, **options: Any) -> Any:
        schedule = fxgrow.OnPlateau(patience=1) if schedule is None else schedule
        return fxgrow.Grower(self.net, optimizer or self.optimizer, schedule, dataloader=data, **options)

    def state(self) -> list[Any]:
        """What no refused call may change."""
        return [
            {name: (t._version, t.tolist()) for name, t in self.net.state_dict(keep_vars=True).items()},
            [m.training for m in self.net.modules()], [id(p) for p in self.optimizer.param_groups[0]["params"]],
            torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist(),
            torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_num_threads(),
        ]  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


#: an argument that no number, model, path, ... may be; every function below gets every one of these
ODD: list[Any] = [
    None, "2", "x", 2.5, -1, 0, True, math.nan, math.inf, 10**30, b"2", 1j, [], [2], {0: 1}, {"0": "2"}, {"0": 2.0},
    {"0": True}, {"0": -1}, {"0": 10**30}, {"0": HUGE}, object(), np.float64(0.5), np.array([1.5, 2]), torch.rand(2),
    nn.Linear, torch.optim.Adam, lambda: 0, io.BytesIO, float,
]  # fmt: skip
#: what takes an argument, and which of the odd ones it may well accept
TAKES: dict[str, tuple[Callable[[World, Any], Any], Callable[[Any], bool]]] = {
    "grow model": (lambda w, v: fxgrow.grow(v, BATCHES, progress=False), lambda v: False),
    "profile model": (lambda w, v: fxgrow.profile(v, BATCHES, progress=False), lambda v: False),
    "capture model": (lambda w, v: fxgrow.capture(v, (X,)), lambda v: False),
    "explain model": (lambda w, v: fxgrow.explain(v, (X,)), lambda v: False),
    "widths": (lambda w, v: fxgrow.widths(v), lambda v: False),
    "networkx": (lambda w, v: fxgrow.to_networkx(v), lambda v: False),
    "widen model": (lambda w, v: fxgrow.widen(v, (X,), {"0": 1}), lambda v: False),
    "apply model": (lambda w, v: fxgrow.apply(v, fxgrow.Plan({"0": 1}), (X,)), lambda v: False),
    "apply plan": (lambda w, v: fxgrow.apply(w.net, v, (X,)), lambda v: False),
    "units of a plan": (lambda w, v: fxgrow.apply(w.net, fxgrow.Plan(v), (X,)), lambda v: False),
    "plan profile": (lambda w, v: fxgrow.plan(v), lambda v: False),
    "save model": (lambda w, v: fxgrow.save(v, w.file.with_name("odd")), lambda v: False),
    "load model": (lambda w, v: fxgrow.load(v, w.file), lambda v: False),
    "resize model": (lambda w, v: fxgrow.resize(v, w.file), lambda v: False),
    "resize recipe": (lambda w, v: fxgrow.resize(w.net, v), lambda v: False),
    "load path": (lambda w, v: fxgrow.load(w.net, v), lambda v: False),
    "checkpoint model": (lambda w, v: fxgrow.save_checkpoint(w.file.with_name("odd"), v), lambda v: False),
    "checkpoint path": (lambda w, v: fxgrow.load_checkpoint(v), lambda v: False),
    "Grower model": (lambda w, v: fxgrow.Grower(v, w.optimizer, fxgrow.Every(steps=1), dataloader=BATCHES),
                     lambda v: False),
    "Grower optimizer": (lambda w, v: w.grower(optimizer=[v]), lambda v: False),
    "Grower schedule": (lambda w, v: w.grower(schedule=fxgrow.Either((v,))), lambda v: False),
    "Grower data": (lambda w, v: w.grower(v).grow_now(), lambda v: False),
    "Grower step": (lambda w, v: w.grower(neurons=1).step(v), lambda v: v is None or _is_number(v)),
    "Grower observe": (lambda w, v: w.grower(neurons=1).observe(v), lambda v: _is_number(v)),
    "Grower on_growth": (lambda w, v: w.grower().on_growth(v), callable),
    "Grower state": (lambda w, v: w.grower().load_state_dict(v), lambda v: False),
    "Grower ema": (lambda w, v: w.grower(ema=v), lambda v: v is None),
    "Grower parameters": (lambda w, v: w.grower(parameters=v), lambda v: v == []),
    "grow data": (lambda w, v: w.grow(v), lambda v: False),
    "widen units": (lambda w, v: fxgrow.widen(w.net, (X,), v), lambda v: False),
    "try_widths units": (lambda w, v: fxgrow.try_widths(w.profile, BATCHES, units=v), lambda v: False),
    "merge": (lambda w, v: fxgrow.Profile.merge(v), lambda v: False),
    "plot": (lambda w, v: w.profile.plot(v), lambda v: v is None or v in ("2", "x")),
    "tensorboard": (lambda w, v: fxgrow.History().to_tensorboard(v), lambda v: v in ("2", "x")),
    "export_onnx": (lambda w, v: fxgrow.export_onnx(v, w.file.with_name("odd.onnx"), (X,)), lambda v: False),
    **{f"grow {name}": ((lambda w, v, name=name: w.grow(**{name: v})), accepts) for name, accepts in {
        "neurons": lambda v: v is None,
        "budget": lambda v: v is None or v == 10**30 or v == "2",
        "samples": lambda v: v is None,
        "memory_limit": lambda v: v is None,
        "multiple": lambda v: False,
        "seed": lambda v: v in (-1, 0),
        "method": lambda v: False,
        "cost": lambda v: False,
        "optimizer": lambda v: v is None,
        "loss_fn": lambda v: v is None,
        "batch": lambda v: v is None,
        "into": lambda v: False,
        "update_existing": lambda v: v is True,
        "example_inputs": lambda v: v is None,
    }.items()},
    **{f"profile {name}": ((lambda w, v, name=name: fxgrow.profile(w.net, BATCHES, progress=False, **{name: v})), acc)
       for name, acc in {
        "units": lambda v: v is None,
        "widths": lambda v: v is None or v == [],
        "positions": lambda v: False,
        "keep_moments": lambda v: v is True,
    }.items()},
    **{f"{kind.__name__} {name}": ((lambda w, v, kind=kind, name=name: kind(**{name: v})), accepts)
       for kind, name, accepts in [
        (fxgrow.Every, "steps", lambda v: v == 10**30),
        (fxgrow.OnPlateau, "patience", lambda v: v == 10**30),
        (fxgrow.OnPlateau, "min_delta", lambda v: type(v) in (int, float) and math.isfinite(v)),
        (fxgrow.OnPlateau, "largest", lambda v: v is True),
    ]},
    "until total": (lambda w, v: fxgrow.Every(steps=1).until(total=v), lambda v: v in ("2", 2.5, 10**30, 0.5)),
    "LayerByLayer": (lambda w, v: fxgrow.LayerByLayer(v, steps=1), lambda v: v in ({"0": 10**30}, {"0": HUGE})),
}  # fmt: skip


def _is_number(v: Any) -> bool:
    return isinstance(v, (int, float)) and not isinstance(v, bool) or isinstance(v, Tensor)


def accepted(accepts: Callable[[Any], bool], value: Any) -> bool:
    try:
        return bool(accepts(value))
    except (ValueError, RuntimeError, OverflowError):  # arrays have no truth value
        return False


def refused(call: Callable[[], object]) -> str:
    """The message of a call that has to be refused."""
    with pytest.raises(fxgrow.FxgrowError) as caught:
        call()
    text = str(caught.value)
    assert text.count("\n") < 6 and 10 < len(text) < 700, text
    return text


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TAKES)
def test_odd_arguments_are_refused_and_nothing_changes(
    name: str, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    call, accepts = TAKES[name]
    before = world.state()
    for value in ODD:
        if not accepted(accepts, value):
            try:
                refused(lambda value=value: call(world, value))
            except BaseException as error:
                raise AssertionError(f"{name} of {value!r}: {type(error).__name__}: {error}") from error
            assert world.state() == before, f"{name} of {value!r}"


@pytest.mark.parametrize("name", [name for name in TAKES if name.endswith(("model", "export_onnx"))])
def test_models_without_sizes_are_refused(name: str, world: World) -> None:
    for lazy in (
        nn.Sequential(nn.LazyLinear(4), nn.ReLU(), nn.Linear(4, 3)),
        nn.Sequential(nn.Linear(6, 4), nn.LazyBatchNorm1d(), nn.ReLU(), nn.Linear(4, 3)),
    ):
        assert "has no shape yet. Run the model once on a batch first" in refused(
            lambda m=lazy: TAKES[name][0](world, m)
        )
        assert any(isinstance(p, nn.UninitializedParameter) for p in lazy.parameters())
    optimizer = torch.optim.SGD(lazy.parameters(), 0.1)
    assert "no shape yet" in refused(lambda: fxgrow.grow(lazy, BATCHES, optimizer=optimizer))


PATHS = ["nodir/x.png", "a\0b.png", "", ".", "x" * 300 + ".png", "\ud800.png", "x" * 5000, 3, b"x", Path("nodir/x")]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: repr(path)[:12])
def test_paths_that_cannot_be_written(path: Any, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    growth = fxgrow.grow(world.net, BATCHES, neurons=1, method="random", progress=False).meta["fxgrow"]
    moments = fxgrow.profile(world.net, BATCHES, method="tiny", keep_moments=True, progress=False).moments
    for write in (
        lambda: fxgrow.save(world.grown, path),
        lambda: fxgrow.save_checkpoint(path, world.grown),
        lambda: moments.save(path),
        lambda: fxgrow.export_onnx(world.net, path, (X,)),
        lambda: world.profile.plot(path),
        lambda: growth.plot(path),
        lambda: fxgrow.History().plot(path),
    ):
        refused(write)
    for read in (fxgrow.load_checkpoint, fxgrow.Moments.load, lambda path: fxgrow.load(net(), path)):
        refused(lambda read=read: read(path))
    assert list(tmp_path.iterdir()) == []


def test_a_format_that_is_none_and_a_device_are_no_place_for_a_file(world: World, tmp_path: Path) -> None:
    assert "not supported" in refused(lambda: world.profile.plot(str(tmp_path / "x.unknown")))
    for write in (lambda p: fxgrow.save(world.grown, p), lambda p: world.profile.plot(p)):
        assert "a device" in refused(lambda write=write: write("/dev/null"))
    assert Path("/dev/null").is_char_device()
    world.profile.plot(io.BytesIO())  # type: ignore[arg-type]


@pytest.mark.parametrize("units", [10**9, HUGE, 2**61])
def test_memory_is_estimated_before_it_is_allocated(units: int, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda device: 8e9)
    large = torch.empty

    def small(*sizes: Any, **options: Any) -> Any:
        assert not sizes or not isinstance(sizes[0], int) or math.prod(sizes) < 10**7
        return large(*sizes, **options)

    monkeypatch.setattr(torch, "empty", small)
    for call in (
        lambda: world.grow(neurons=units),
        lambda: world.grow(neurons={"0": units}),
        lambda: fxgrow.profile(world.net, BATCHES, units=units, progress=False),
        lambda: fxgrow.widen(world.net, (X,), {"0": units}),
        lambda: fxgrow.apply(net(), fxgrow.Plan({"0": units}), (X,)),
        lambda: world.grower(neurons=units).grow_now(),
        lambda: world.grower().grow_now(neurons=units),
    ):  # fmt: skip
        assert "GB of memory" in refused(call)
    # on meta only the indices take memory
    assert "GB of memory" in refused(lambda: fxgrow.widen(net().to("meta"), (X.to("meta"),), {"0": 2 * units}))


def test_the_fit_of_many_units_is_estimated_too(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda device: 8e9)
    assert "Fitting 50,000 units of width '0' needs at least 10.0 GB" in refused(lambda: world.grow(neurons=50_000))
    world.grow(neurons=2)


FULL = [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), RuntimeError("[enforce] can't allocate memory: 9")]


@pytest.mark.parametrize("error", FULL, ids=lambda error: type(error).__name__)
def test_memory_that_runs_out_all_the_same(error: BaseException, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise error

    before, grower = world.state(), world.grower(neurons=1, on_error="skip")
    monkeypatch.setattr(WidenedGraph, "_write_sizes", full)
    for call in (
        lambda: world.grow(neurons=1),
        lambda: fxgrow.widen(world.net, (X,), {"0": 1}),
        lambda: fxgrow.apply(world.net, fxgrow.Plan({"0": 1}), (X,)),
        lambda: world.grower(neurons=1).grow_now(),
    ):
        assert "Memory ran out" in refused(call)
    assert not grower.grow_now() and world.state() == before


def test_other_errors_of_torch_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(WidenedGraph, "_write_sizes", lambda _: torch.zeros(2) + torch.zeros(3))
    with pytest.raises(RuntimeError, match="must match the size"):
        fxgrow.widen(net(), (X,), {"0": 1})


def test_available_memory_is_a_sensible_number() -> None:
    assert 1e8 < memory.available_memory(torch.device("cpu")) < 1e15
    assert memory.available_memory(torch.device("meta")) == math.inf


#: name -> data, options, what the message says
DATA: dict[str, tuple[Any, dict[str, Any], str]] = {
    "a data set": (torch.utils.data.TensorDataset(X, Y), {}, "DataLoader"),
    "a class": (torch.utils.data.DataLoader, {}, "the class DataLoader"),
    "all samples": ((X, Y), {}, r"DataLoader(TensorDataset(inputs, targets), batch_size)"),
    "single samples": (list(zip(X, Y, strict=True)), {}, "one sample"),
    "single samples, a loss": (list(zip(X, Y, strict=True)), {"loss_fn": nn.CrossEntropyLoss()}, "one sample"),
    "an exhausted iterator": (iter([]), {}, "empty"),
    "strings": (["a", "b"], {}, "batch="),
    "pairs of strings": ([("a", "b")], {}, "a str"),
    "inputs, targets, index": ([(X, Y, Y)], {}, "batch=, a function from an item of the dataloader to that, such as "
                               "lambda item: item[:2]"),
    "inputs alone": ([[X]], {}, "lambda x: (x, x)"),
    "no samples": ([(X[:0], Y[:0])], {}, "Batch 0 has no samples"),
    "later no samples": ([*BATCHES, (X[:0], Y[:0])], {}, "Batch 4 has no samples"),
    "one-hot floats": ([(X, nn.functional.one_hot(Y, 3).float())] * 4, {}, "CrossEntropyLoss"),
    "one-hot integers": ([(X, nn.functional.one_hot(Y, 3))] * 4, {}, "one class number per sample"),
    "a class too many": ([(X, Y + 1)] * 4, {}, "target 3 is out of bounds: the model has the classes 0 to 2"),
    "255 to leave out": ([(X, torch.where(Y == 0, 255, Y))] * 4, {}, "ignore_index=255"),
    "no targets": ([(X, None)] * 4, {}, "has no targets (None)"),
    "other features": ([(X[:, :5], Y)] * 4, {}, "[64, 5]"),
    "other features later": ([*BATCHES[:3], (X[:, :5], Y)], {}, "batch 3"),
    "double": ([(X.double(), Y)] * 4, {}, "torch.float64"),
    "text in NumPy": ([(np.array(["a"] * 4), Y[:4].numpy())] * 4, {}, "cannot be a tensor"),
    "batch= fails": (BATCHES, {"batch": lambda item: item.x}, "batch= failed on item 0 of the dataloader, a tuple"),
    "batch= of no batch": (BATCHES, {"batch": lambda item: 3}, "Batch 0 is an int"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", DATA)
def test_data_that_cannot_be(name: str, world: World, capfd: pytest.CaptureFixture[str]) -> None:
    data, options, message = DATA[name]
    before = world.state()
    calls = [
        lambda: world.grow(data, **options),
        lambda: fxgrow.profile(world.net, data, progress=False, **options),
    ]
    if name != "one-hot floats":  # a guess is looked at when the loss is first used, in the profile
        calls.append(lambda: fxgrow.try_widths(world.profile, data, **options))
    if not hasattr(data, "__next__"):
        calls.append(lambda: world.grower(data, **options).grow_now())
    for call in calls:
        text = refused(call)
    assert message in text or message in refused(calls[0]), text
    assert world.state() == before
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


def test_whole_numbers_for_one_output() -> None:
    data = [(X, (Y > 0).long())] * 4
    text = refused(lambda: fxgrow.grow(net(1), data, progress=False))
    assert "binary_cross_entropy_with_logits" in text
    binary = lambda output, target: nn.functional.binary_cross_entropy_with_logits(  # noqa: E731
        output.squeeze(1), target.float()
    )
    assert fxgrow.grow(net(1), data, loss_fn=binary, neurons=1, progress=False).get_submodule("0").out_features == 5


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_class_numbers_of_any_integer_type(dtype: torch.dtype) -> None:
    losses = [fxgrow.profile(net_of_zeros(), [(X, y)] * 4, progress=False).loss for y in (Y, Y.to(dtype))]
    assert losses[0] == losses[1]


def net_of_zeros() -> nn.Module:
    torch.manual_seed(1)
    return net()


@pytest.mark.parametrize("kind", ["float32", "float64", "reversed", "read-only", "big-endian", "in a dict"])
def test_numpy_batches_are_those_of_tensors(kind: str) -> None:
    x, y = X.numpy().copy(), Y.numpy().copy()
    expected = fxgrow.profile(net_of_zeros(), [(X, Y)] * 4, progress=False).loss
    if kind == "float64":
        x = x.astype("float64")
    elif kind == "reversed":
        x, y = x[::-1].copy()[::-1], y[::-1].copy()[::-1]
    elif kind == "read-only":
        x.setflags(write=False)
    elif kind == "big-endian":
        x = x.astype(">f4")
    inputs = {"input": x} if kind == "in a dict" else x
    assert fxgrow.profile(net_of_zeros(), [(inputs, y)] * 4, progress=False).loss == expected
    grown = fxgrow.grow(net_of_zeros(), [(inputs, y)] * 4, neurons=2, progress=False)
    assert grown.get_submodule("0").out_features == 6


def test_float64_arrays_take_the_dtype_of_the_model() -> None:
    data = [(X.double().numpy(), X[:, :3].double().numpy() * 9)] * 4
    for model in (net(), net().double(), net().bfloat16()):
        grown = fxgrow.grow(model, data, neurons=1, progress=False)
        assert grown.get_parameter("0.weight").dtype == model.get_parameter("0.weight").dtype
    wide = fxgrow.widen(net(), (X.double().numpy(),), {"0": 1})
    assert wide.meta["example_inputs"][0].dtype == torch.float32
    # an array that is float32 stays so, and a tensor whatever it is
    assert "torch.float32" in refused(lambda: fxgrow.grow(net().double(), [(X.numpy(), Y)] * 4, progress=False))


def test_batch_reads_the_items_of_any_loader() -> None:
    rows = [{"image": x, "label": y, "index": i} for i, (x, y) in enumerate(BATCHES)]
    batch = lambda row: (row["image"], row["label"])  # noqa: E731
    model, results = net_of_zeros(), []
    for data, options in ((BATCHES, {}), (rows, {"batch": batch})):
        results.append(fxgrow.grow(model, data, neurons=2, progress=False, **options).state_dict())
        profile = fxgrow.profile(model, data, progress=False, **options)
        tried = fxgrow.try_widths(profile, data, units=1, **options)
        grower = fxgrow.Grower(
            model, torch.optim.SGD(model.parameters()), fxgrow.OnBottleneck(share=0.0, every=1), dataloader=data,
            neurons=2, **options,
        )  # fmt: skip
        assert tried["0"].units == 1 and grower.step()
        results.append(grower.model.state_dict())
    for a, b in zip(results[:2], results[2:], strict=True):
        assert all(torch.equal(t, b[name]) for name, t in a.items())


def test_a_compiled_model_and_its_optimizer() -> None:
    inside = net()
    model = torch.compile(inside, backend="eager")
    optimizer = torch.optim.Adam(model.parameters())
    model(X).sum().backward()
    optimizer.step()
    step = optimizer.state[inside[0].weight]["step"]
    for grow in (
        lambda o: fxgrow.grow(model, BATCHES, neurons=2, optimizer=o, progress=False),
        lambda o: fxgrow.grow(model, BATCHES, neurons=2, optimizer=o, progress=False, into="module"),
        lambda o: fxgrow.widen(model, (X,), {"0": 2}, optimizer=o),
        lambda o: fxgrow.widen(model, (X,), {"0": 2}, optimizer=o, into="module"),
    ):
        copy = torch.optim.Adam(model.parameters())
        copy.load_state_dict(optimizer.state_dict())
        grown = grow(copy)
        owned = [id(p) for p in copy.param_groups[0]["params"]]
        assert owned == [id(p) for p in grown.parameters()] and grown.get_parameter("0.weight").shape == (6, 6)
        assert copy.state[grown.get_parameter("0.weight")]["step"] == step


def test_an_optimizer_of_another_model_is_refused_before_any_time_is_spent(world: World) -> None:
    def read() -> Any:
        raise AssertionError
        yield

    class Loader:
        __iter__ = staticmethod(read)

    other = torch.optim.SGD(net().parameters())
    assert "none of them of this" in refused(lambda: world.grow(Loader(), optimizer=other))
    assert "none of them of this" in refused(lambda: fxgrow.widen(world.net, (X,), {"0": 1}, optimizer=other))


def test_numbers_of_numpy_are_numbers(world: World) -> None:
    grown = world.grow(neurons={"0": np.int64(2)}, samples=np.int32(64), seed=np.uint8(3), budget=None)
    plan = grown.meta["fxgrow"].plan
    assert grown.get_submodule("0").out_features == 6 and fxgrow.Plan.from_json(plan.to_json()).units == {"0": 2}
    assert world.grow(budget=np.float32(20), memory_limit=1e9) is not None


def test_every_public_function_checks_its_arguments() -> None:
    """A new function that takes what the table knows must be checked too."""
    unchecked = {"widths", "to_networkx", "Grower"}  # that check by themselves
    for name in fxgrow.__all__:
        function = getattr(fxgrow, name)
        if inspect.isfunction(function) and name not in unchecked:
            if argument_checks._KINDS.keys() & inspect.signature(function).parameters.keys():
                assert hasattr(function, "__wrapped__"), name
                assert function.__code__.co_filename == argument_checks.__file__, name
