"""What holds the model's parameters goes with them: averages, gradients, lists, hooks, rates, frozen parts."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import lr_scheduler
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn

import fxgrow
from fxgrow.errors import FxgrowError
from models.mlp import MLP


class Net(nn.Module):
    """Two widths, a norm with buffers, a frozen layer, a block that is a module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.first = nn.Linear(6, 4)
        self.norm = nn.BatchNorm1d(4)
        self.block = nn.Sequential(nn.Linear(4, 5), nn.Tanh())
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(torch.relu(self.norm(self.first(self.frozen(x))))))


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 6, generator=generator)
    return [(part, (part.sum(1) > 0).long()) for part in x.split(16)]


def made(model: nn.Module, optimizer: Any = None, **options: Any) -> fxgrow.Grower:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = optimizer or torch.optim.SGD(trained, lr=0.05, momentum=0.9)
    usual: dict[str, Any] = {"dataloader": batches(), "neurons": 2, "method": "random"}
    return fxgrow.Grower(model, optimizer, fxgrow.Every(steps=10**6), **{**usual, **options})


def step(grower: fxgrow.Grower, count: int = 1) -> Tensor:
    for i in range(count):
        x, y = batches()[i % 4]
        grower.optimizer.zero_grad()  # type: ignore[union-attr]
        loss = F.cross_entropy(grower.model(x), y)
        loss.backward()
        grower.optimizer.step()  # type: ignore[union-attr, call-arg]
    return loss.detach()


def watched(grower: fxgrow.Grower) -> list[Any]:
    """The index of each growth, as a callback gets it."""
    found: list[Any] = []
    grower.on_growth(lambda old, new, index: found.append(index))
    return found


def old_part(value: Tensor, at: Any) -> Tensor:
    for dim, where in enumerate(at or ()):
        value = value if where is None else value.index_select(dim, where)
    return value


def new_mask(shape: torch.Size, at: Any) -> Tensor:
    mask = torch.ones(shape, dtype=torch.bool)
    places = [torch.arange(n) if w is None else w for n, w in zip(shape, at or (None,) * len(shape), strict=True)]
    if shape:
        mask[torch.meshgrid(*places, indexing="ij")] = False
    return mask & bool(shape)


def check_average(shadow: nn.Module, before: dict[str, Tensor], model: nn.Module, index: Any) -> None:
    now = {**dict(shadow.named_parameters()), **dict(shadow.named_buffers())}
    weights = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert now.keys() == before.keys() == weights.keys()
    for name, value in now.items():
        assert value.shape == weights[name].shape
        assert torch.equal(old_part(value, index.get(name)), before[name]), name
        mask = new_mask(value.shape, index.get(name))
        assert torch.equal(value[mask], weights[name][mask])
        assert value is not weights[name] and value.data_ptr() != weights[name].data_ptr()


@pytest.mark.parametrize("into", ["graph", "module"])
def test_an_averaged_model(into: Any) -> None:
    model = Net()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    average.module.eval()
    grower = made(model, ema=average, into=into)
    index = watched(grower)
    for _ in range(3):
        step(grower)
        average.update_parameters(grower.model)
    before = {k.removeprefix("module."): v.clone() for k, v in average.state_dict().items() if k != "n_averaged"}
    assert grower.grow_now()
    assert grower.ema is average and int(average.n_averaged) == 3
    check_average(average.module, before, grower.model, index[0])
    assert "first.weight" in index[0] and "norm.running_mean" in index[0]
    assert not average.module.training and grower.model.training
    # and goes on averaging: a tenth of the new weights each time
    was = {name: p.clone() for name, p in average.module.named_parameters()}
    step(grower)
    average.update_parameters(grower.model)
    for name, p in grower.model.named_parameters():
        found = average.module.get_parameter(name)
        assert torch.allclose(found, 0.9 * was[name] + 0.1 * p, atol=1e-6)
    with torch.no_grad():
        assert average(batches()[0][0]).shape == (16, 3)


@pytest.mark.parametrize("into", ["graph", "module"])
def test_a_plain_shadow_copy(into: Any) -> None:
    model = Net()
    shadow = copy.deepcopy(model).requires_grad_(False).eval()
    grower = made(model, ema=shadow, into=into)
    index = watched(grower)
    step(grower, 2)
    before = {k: v.clone() for k, v in shadow.state_dict().items()}
    assert grower.grow_now() and grower.grow_now()
    assert grower.ema is not None and grower.ema is not shadow
    assert isinstance(grower.ema, Net) == (into == "module")
    assert not any(p.requires_grad for p in grower.ema.parameters()) and not grower.ema.training
    # two growths, one after the other
    for name, value in grower.ema.state_dict().items():
        first = old_part(value, index[1].get(name))
        assert torch.equal(old_part(first, index[0].get(name)), before[name])


def test_the_average_of_a_compiled_model() -> None:
    model = Net()
    compiled = torch.compile(model, backend="eager")
    average = AveragedModel(compiled)
    grower = made(compiled, ema=average)
    grower.grow_now()
    average.update_parameters(grower.model)
    assert [p.shape for p in average.parameters()] == [p.shape for p in grower.parameters()]
    assert average(batches()[0][0]).shape == (16, 3)


@pytest.mark.parametrize("into", ["graph", "module"])
def test_accumulated_gradients_stay(into: Any) -> None:
    grower = made(Net(), into=into)
    index = watched(grower)
    x, y = batches()[0]
    F.cross_entropy(grower.model(x), y).backward()
    before = {name: None if p.grad is None else p.grad.clone() for name, p in grower.model.named_parameters()}
    grower.grow_now()
    for name, p in grower.model.named_parameters():
        was = before[name]
        if was is None:
            assert p.grad is None
            continue
        assert p.grad is not None
        assert torch.equal(old_part(p.grad, index[0].get(name)), was)
        assert (p.grad[new_mask(p.shape, index[0].get(name))] == 0).all()
    assert before["frozen.weight"] is None


def test_half_a_step_before_and_half_after() -> None:
    """Growth that keeps the function, between two micro-batches: old weights take the very same step."""
    torch.manual_seed(0)
    model = MLP((6, 4, 3))
    data = batches()
    weights = []
    for growing in (False, True):
        grower = made(copy.deepcopy(model), method="variance-transfer")
        index = watched(grower)
        F.cross_entropy(grower.model(data[0][0]), data[0][1]).backward()
        if growing:
            grower.grow_now()
        F.cross_entropy(grower.model(data[1][0]), data[1][1]).backward()
        grower.optimizer.step()  # type: ignore[union-attr, call-arg]
        found = grower.model.state_dict()
        weights.append({k: old_part(v, index[0].get(k)) if index else v for k, v in found.items()})
    torch.testing.assert_close(weights[0], weights[1])


def test_sparse_gradients_stay() -> None:
    model = nn.Sequential(nn.Embedding(9, 4, sparse=True), nn.Tanh(), nn.Linear(4, 3))
    data = [(torch.arange(8) % 9, torch.arange(8) % 3)] * 4
    optimizers = [torch.optim.SparseAdam([model[0].weight]), torch.optim.SGD(model[2].parameters(), 0.1)]
    grower = made(model, optimizers, dataloader=data)
    F.cross_entropy(model(data[0][0]), data[0][1]).backward()
    before = model[0].weight.grad.to_dense()  # type: ignore[union-attr, operator]
    grower.grow_now()
    after = grower.model.get_parameter("0.weight").grad
    assert after is not None and after.is_sparse
    assert torch.equal(after.to_dense()[:, :4], before) and (after.to_dense()[:, 4:] == 0).all()


def test_lists_of_parameters_for_clipping() -> None:
    model = Net()
    trained = [p for p in model.parameters() if p.requires_grad]
    heads, foreign = [*model.head.parameters()], nn.Parameter(torch.zeros(2))
    heads.append(foreign)
    grower = made(model, parameters=[trained, heads])
    kept = trained
    grower.grow_now()
    assert trained is kept and [id(p) for p in trained] == [id(p) for p in grower.parameters() if p.requires_grad]
    assert heads[0] is grower.model.get_parameter("head.weight") and heads[2] is foreign
    x, y = batches()[0]
    (100 * F.cross_entropy(grower.model(x), y)).backward()
    nn.utils.clip_grad_norm_(trained, 0.5)
    norms = [p.grad.norm() for p in grower.parameters() if p.grad is not None]
    assert float(torch.stack(norms).norm()) == pytest.approx(0.5, rel=1e-3)


SCHEDULERS = {
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.2, total_steps=12),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda n: 0.9**n),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.1), lr_scheduler.ExponentialLR(o, 0.9)], milestones=[3]
    ),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 12),
    "SWALR": lambda o: SWALR(o, swa_lr=0.01, anneal_epochs=4),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler([lr_scheduler.StepLR(o, 2, 0.9)], o),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_rates_go_on(name: str) -> None:
    """The rates of every step are those of a run without growth, in both groups, and reach the new weights."""
    runs = []
    for growing in (False, True):
        model = Net()
        others = [*model.norm.parameters(), *model.block.parameters(), *model.head.parameters()]
        groups = [{"params": [*model.first.parameters()], "lr": 0.01}, {"params": others}]
        optimizer = torch.optim.SGD(groups, lr=0.05, momentum=0.9, weight_decay=0.0)
        scheduler = SCHEDULERS[name](optimizer)
        grower = made(model, optimizer, lr_scheduler=scheduler)
        rates = []
        for i in range(10):
            if growing and i == 5:
                grower.grow_now()
            step(grower)
            scheduler.step()
            rates.append([group["lr"] for group in optimizer.param_groups])
        runs.append(rates)
        assert len(grower.history) == growing
    assert runs[0] == runs[1]
    assert len(set(map(tuple, runs[0]))) > 2
    before = grower.model.get_parameter("first.weight").clone()
    step(grower)
    assert (grower.model.get_parameter("first.weight") != before).any(1).all()  # new rows too


def test_reduce_on_plateau_goes_on() -> None:
    grower = made(Net())
    scheduler = lr_scheduler.ReduceLROnPlateau(grower.optimizer, patience=1, factor=0.5)  # type: ignore[arg-type]
    for value in (1.0, 1.0):
        scheduler.step(value)
    grower.grow_now()
    scheduler.step(1.0)
    assert grower.optimizer.param_groups[0]["lr"] == 0.025  # type: ignore[union-attr]


def test_groups_keep_their_options_and_order() -> None:
    model = Net()
    optimizer = torch.optim.AdamW(
        [
            {"params": [*model.head.named_parameters()], "weight_decay": 0.0, "mine": "a"},
            {"params": [*model.first.named_parameters()], "lr": 1e-2, "betas": (0.8, 0.9)},
        ]
    )
    groups, options = [*optimizer.param_groups], [{**g, "params": None} for g in optimizer.param_groups]
    grower = made(model, optimizer)
    step(grower)
    grower.grow_now()
    assert all(a is b for a, b in zip(groups, optimizer.param_groups, strict=True))
    assert [{**g, "params": None} for g in optimizer.param_groups] == options
    assert optimizer.param_groups[1]["params"][0] is grower.model.get_parameter("first.weight")


def test_gradient_scaling() -> None:
    """Growth between a backward pass and the scaler's step, which then takes scaled gradients of both parts."""
    grower = made(Net())
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    for i in range(6):
        x, y = batches()[i % 4]
        grower.optimizer.zero_grad()  # type: ignore[union-attr]
        scaler.scale(F.cross_entropy(grower.model(x), y)).backward()
        if i in (1, 3):
            grower.grow_now()
        before = grower.model.get_parameter("head.weight").clone()
        scaler.unscale_(grower.optimizer)  # type: ignore[arg-type]
        total = nn.utils.clip_grad_norm_(grower.parameters(), 10.0)
        assert 0 < float(total) < 10
        scaler.step(grower.optimizer)  # type: ignore[arg-type]
        scaler.update()
        assert not torch.equal(before, grower.model.get_parameter("head.weight"))
    assert scaler.get_scale() == 1024.0 * 2**3


def test_frozen_parts_stay_frozen() -> None:
    model = Net()
    before = model.frozen.weight.clone()
    grower = made(model)
    grower.grow_now()
    step(grower, 3)
    flags = {name: p.requires_grad for name, p in grower.model.named_parameters()}
    assert [name for name, flag in flags.items() if not flag] == ["frozen.weight", "frozen.bias"]
    assert torch.equal(grower.model.get_parameter("frozen.weight"), before)
    owned = {id(p) for g in grower.optimizer.param_groups for p in g["params"]}  # type: ignore[union-attr]
    assert owned == {id(p) for p in grower.parameters() if p.requires_grad}


def test_inside_autocast() -> None:
    """A loop that runs in autocast altogether: statistics are as without it."""
    grown = []
    for enabled in (False, True):
        torch.manual_seed(0)
        grower = made(MLP((6, 4, 3)), method="default")
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            grower.grow_now()
            assert torch.is_autocast_enabled("cpu") == enabled
            assert grower.model(batches()[0][0]).dtype == (torch.bfloat16 if enabled else torch.float32)
        grown.append(grower.model.state_dict())
    torch.testing.assert_close(grown[0], grown[1])


def test_a_model_in_bfloat16() -> None:
    torch.manual_seed(0)
    model = MLP((6, 4, 3)).bfloat16()
    data = [(x.bfloat16(), y) for x, y in batches()]
    grower = made(model, torch.optim.AdamW(model.parameters()), dataloader=data, method="default")
    F.cross_entropy(grower.model(data[0][0]), data[0][1]).backward()
    grower.optimizer.step()  # type: ignore[union-attr, call-arg]
    assert grower.grow_now()
    for p in grower.parameters():
        assert p.dtype == torch.bfloat16 and torch.isfinite(p).all()
    loss = F.cross_entropy(grower.model(data[0][0]), data[0][1])
    loss.backward()
    grower.optimizer.step()  # type: ignore[union-attr, call-arg]
    assert torch.isfinite(loss)


class Recorder:
    """A user's object that hears from the model, with what it has heard."""

    def __init__(self) -> None:
        self.heard: list[tuple[int, ...]] = []

    def forward(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.heard.append(tuple(output.shape))

    def backward(self, module: nn.Module, inputs: Any, outputs: Any) -> None:
        self.heard.append(tuple(outputs[0].shape))


@pytest.mark.parametrize("into", ["graph", "module"])
def test_hooks_on_layers_and_on_the_model_stay(into: Any) -> None:
    model, recorders = Net(), [Recorder() for _ in range(3)]
    handles = [
        model.first.register_forward_hook(recorders[0].forward),
        model.head.register_full_backward_hook(recorders[1].backward),
        model.register_forward_hook(recorders[2].forward),
    ]
    grower = made(model, into=into)
    grower.grow_now()
    for recorder in recorders:
        recorder.heard.clear()
    step(grower)
    assert [r.heard for r in recorders] == [[(16, 6)], [(16, 3)], [(16, 3)]]
    for handle in handles:
        handle.remove()
    step(grower)
    assert [len(r.heard) for r in recorders] == [1, 1, 1]


def test_hooks_that_cannot_be_called_are_reported_once(caplog: pytest.LogCaptureFixture) -> None:
    model, recorder = Net(), Recorder()
    model.block.register_forward_hook(recorder.forward)
    grower = made(model)
    with caplog.at_level(logging.WARNING, "fxgrow"):
        grower.grow_now()
        grower.grow_now()
    assert [r.getMessage() for r in caplog.records] == [
        "The forward hook Recorder.forward on 'block' is no longer called: the grown model is a graph without a node "
        "for that module (an output that the hook changed is changed there too). Register it on a layer inside, or "
        'take into="module".'
    ]
    model = Net()
    model.block.register_forward_hook(recorder.forward)
    grower = made(model, into="module")
    grower.grow_now()
    recorder.heard.clear()
    step(grower)
    assert recorder.heard == [(16, 7)]


def test_a_hook_of_the_models_own() -> None:
    """A method of one of its modules belongs to the copy: the old model must not go on hearing, nor stay alive."""

    class Own(Net):
        def __init__(self) -> None:
            super().__init__()
            self.calls = 0
            self.first.register_forward_hook(self.count)

        def count(self, module: nn.Module, args: Any, output: Tensor) -> None:
            self.calls += 1

    model = Own()
    grower = made(model, into="module")
    grower.grow_now()
    new = grower.model
    assert isinstance(new, Own)
    calls = model.calls, new.calls
    step(grower)
    assert (model.calls, new.calls) == (calls[0], calls[1] + 1)


def test_hooks_on_parameters_stay() -> None:
    model = Net()
    heard: list[Any] = []
    handles = [
        model.first.weight.register_post_accumulate_grad_hook(lambda p: heard.append(tuple(p.shape))),
        model.head.weight.register_hook(lambda g: heard.append(tuple(g.shape))),
    ]
    grower = made(model)
    grower.grow_now()
    heard.clear()
    step(grower)
    assert heard == [(3, 7), (6, 6)]
    for handle in handles:
        handle.remove()
    heard.clear()
    step(grower)
    assert heard == []


def test_two_optimizers() -> None:
    model = MLP((6, 4, 3))
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    muon, adam = torch.optim.Muon(matrices), torch.optim.AdamW(vectors)
    grower = made(model, [muon, adam])
    grower.grow_now()
    x, y = batches()[0]
    for _ in range(2):
        F.cross_entropy(grower.model(x), y).backward()
        muon.step()
        adam.step()
    owned = [id(p) for o in (muon, adam) for p in o.param_groups[0]["params"]]
    assert sorted(owned) == sorted(id(p) for p in grower.parameters())
    assert len(muon.state) == len(adam.state) == 2
    with pytest.raises(FxgrowError, match="none of them of this"):
        made(grower.model, [muon, torch.optim.SGD(nn.Linear(1, 1).parameters())])
