"""After growth the optimizer trains the new parameters, with the state of the old entries."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim

from fxgrow.errors import FxgrowError
from fxgrow.transfer.optimizer_state import repoint
from fxgrow.transfer.parameter_change import Positions

Index = dict[str, Positions]

# Every optimizer of torch.optim that trains dense parameters; a class missing here fails a test below.
OPTIMIZERS: dict[str, list[dict[str, Any]]] = {
    "SGD": [{"lr": 0.01, "momentum": 0.9}, {"lr": 0.01}],
    "Adam": [{"amsgrad": True}, {"capturable": False, "foreach": True}, {"fused": True}],
    "AdamW": [{"amsgrad": True}],
    "Adamax": [{}],
    "NAdam": [{}],
    "RAdam": [{}],
    "RMSprop": [{"momentum": 0.9, "centered": True}],
    "Adagrad": [{}],
    "Adadelta": [{}],
    "ASGD": [{"t0": 1}],
    "Rprop": [{}],
    "Adafactor": [{}],
    "Muon": [{}],
    "LBFGS": [{"max_iter": 2, "lr": 0.1}],
}
SKIPPED = {
    "SparseAdam": "takes sparse gradients only, which no layer that grows has",
    "Optimizer": "abstract",
}
CASES = [(name, options) for name, several in OPTIMIZERS.items() for options in several]


class Net(nn.Module):
    """Two hidden dimensions that grow, a convolution, a tied weight, and a parameter that stays."""

    def __init__(self, channels: int = 3, hidden: int = 5) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, channels, 3).to(memory_format=torch.channels_last)
        self.norm = nn.BatchNorm2d(channels)
        self.first = nn.Linear(channels, hidden)
        self.second = nn.Linear(hidden, 2)
        self.tied = nn.Linear(channels, hidden, bias=False)
        self.tied.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(torch.relu(self.conv(x))).mean((2, 3))
        return self.second(torch.tanh(self.first(x)) + self.tied(x))


# Old channels keep their places, new hidden units come between the old ones.
C, H = torch.arange(3), torch.tensor([0, 1, 3, 4, 6])
NET_INDEX: Index = {
    "conv.weight": (C, None, None, None),
    "conv.bias": (C,),
    "norm.weight": (C,),
    "norm.bias": (C,),
    "tied.weight": (H, C),
    "first.bias": (H,),
    "second.weight": (None, H),
}


def matrices(width: int) -> nn.Module:
    """Two-dimensional parameters only, for Muon."""
    return nn.Sequential(nn.Flatten(), nn.Linear(36, width, bias=False), nn.Tanh(), nn.Linear(width, 2, bias=False))


def pair(name: str) -> tuple[nn.Module, nn.Module, Index]:
    if name == "Muon":
        return matrices(5), matrices(7), {"1.weight": (H, None), "3.weight": (None, H)}
    return Net(), Net(4, 7), NET_INDEX


def train(model: nn.Module, optimizer: optim.Optimizer, steps: int) -> list[float]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(16, 1, 6, 6, generator=generator)
    y = torch.randn(16, 2, generator=generator)

    def closure() -> float:
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        return loss.item()

    return [float(optimizer.step(closure)) for _ in range(steps)]  # type: ignore[arg-type]


def old_entries(value: Tensor, positions: Positions) -> Tensor:
    for dim, where in enumerate(positions):
        if where is not None and value.shape[dim] > 1:
            value = value.index_select(dim, where)
    return value


def new_entries(value: Tensor, positions: Positions) -> Tensor:
    mask = torch.ones(value.shape, dtype=torch.bool)
    places = [
        torch.arange(size) if where is None or size == 1 else where
        for size, where in zip(value.shape, positions, strict=True)
    ]
    mask[torch.meshgrid(*places, indexing="ij")] = False
    return value[mask]


def owned(optimizer: optim.Optimizer) -> list[int]:
    return [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]


def test_every_optimizer_of_torch_is_in_the_table() -> None:
    classes = {
        name for name, value in vars(optim).items() if isinstance(value, type) and issubclass(value, optim.Optimizer)
    }
    assert classes == set(OPTIMIZERS) | set(SKIPPED)


@pytest.mark.parametrize(("name", "options"), [case for case in CASES if case[0] != "LBFGS"])
def test_old_entries_keep_their_state_and_new_ones_start_at_zero(name: str, options: dict[str, Any]) -> None:
    old, new, index = pair(name)
    optimizer = getattr(optim, name)(old.parameters(), **options)
    train(old, optimizer, 4)
    before = {
        parameter_name: copy.deepcopy(optimizer.state[parameter])
        for parameter_name, parameter in old.named_parameters()
    }
    index_by_kept_name = {**index, "first.weight": index.get("tied.weight", ())}
    moved_any = False

    repoint(optimizer, old, new, index)

    assert owned(optimizer) == [id(parameter) for parameter in new.parameters()]
    assert set(map(id, optimizer.state)) <= set(owned(optimizer))
    for parameter_name, parameter in new.named_parameters():
        positions = index_by_kept_name.get(parameter_name, (None,) * parameter.dim())
        assert optimizer.state[parameter].keys() == before[parameter_name].keys()
        for key, value in optimizer.state[parameter].items():
            was = before[parameter_name][key]
            if not isinstance(value, Tensor) or value.dim() != parameter.dim():
                assert value == was
                continue
            moved_any = True
            assert value.dtype == was.dtype
            assert torch.equal(old_entries(value, positions), was)
            start = options.get("lr", 0.01) if (name, key) == ("Rprop", "step_size") else 0
            # an average of weights starts where the weights do
            expected = new_entries(parameter, positions) if (name, key) == ("ASGD", "ax") else start
            assert (new_entries(value, positions) == expected).all()
            if value.shape == parameter.shape:
                assert value.stride() == parameter.stride()
    assert moved_any == (options != {"lr": 0.01})  # plain SGD has nothing to move

    untouched = [parameter.clone() for parameter in new.parameters()]
    losses = train(new, optimizer, 20)
    assert all(torch.isfinite(torch.tensor(losses)))
    assert losses[-1] < losses[0]
    for parameter, then in zip(new.parameters(), untouched, strict=True):
        assert torch.isfinite(parameter).all()
        assert not torch.equal(parameter, then)


def test_flat_history_has_zeros_in_new_places() -> None:
    """Every parameter's piece of every vector, compared by itself; products of vectors stay."""
    old, new, index = pair("LBFGS")
    optimizer = optim.LBFGS(old.parameters(), lr=0.1, max_iter=3)
    train(old, optimizer, 3)
    before = copy.deepcopy(optimizer.state[next(old.parameters())])
    repoint(optimizer, old, new, index)
    after = optimizer.state[next(new.parameters())]
    assert len(optimizer.state) == 1 and after.keys() == before.keys()
    pairs = [(before["d"], after["d"]), *zip(before["old_dirs"], after["old_dirs"], strict=True)]
    assert len(pairs) > 3
    positions = {**index, "first.weight": index["tied.weight"]}
    for was, now in pairs:
        was_parts = was.split([p.numel() for p in old.parameters()])
        now_parts = now.split([p.numel() for p in new.parameters()])
        for (name, p), q, a, b in zip(old.named_parameters(), new.parameters(), was_parts, now_parts, strict=True):
            at = positions.get(name, (None,) * p.dim())
            assert torch.equal(old_entries(b.view(q.shape), at), a.view(p.shape))
            assert (new_entries(b.view(q.shape), at) == 0).all()
        torch.testing.assert_close(now @ now, was @ was)
    losses = train(new, optimizer, 20)
    assert all(torch.isfinite(torch.tensor(losses)))


def test_an_unchanged_model_trains_on_exactly_as_before() -> None:
    models = [Net(), Net()]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [optim.Adam(model.parameters(), lr=0.01) for model in models]
    for model, optimizer in zip(models, optimizers, strict=True):
        train(model, optimizer, 5)
    moved = copy.deepcopy(models[1])
    repoint(optimizers[1], models[1], moved, {})
    assert train(models[0], optimizers[0], 5) == train(moved, optimizers[1], 5)


def test_groups_schedulers_and_foreign_parameters_stay() -> None:
    old, new = Net(), Net(4, 7)
    other = nn.Linear(2, 2)
    frozen = {"norm.weight", "norm.bias"}
    decayed = [(n, p) for n, p in old.named_parameters() if n not in frozen and n.endswith("weight")]
    biases = [(n, p) for n, p in old.named_parameters() if n not in frozen and n.endswith("bias")]
    optimizer = optim.AdamW(
        [
            {"params": decayed, "weight_decay": 0.1},
            {"params": [("other.bias", other.bias), *biases], "weight_decay": 0.0, "lr": 0.02},
        ],
        lr=0.01,
    )
    scheduler = optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    other.bias.grad = torch.ones(2)
    optimizer.step()
    kept = optimizer.state[other.bias]
    scheduler.step()
    options = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]

    repoint(optimizer, old, new, NET_INDEX)

    assert [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups] == options
    assert options[0]["param_names"] == ["conv.weight", "first.weight", "second.weight"]
    named = dict(new.named_parameters())
    for group in optimizer.param_groups:
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            assert parameter is (other.bias if name == "other.bias" else named[name])
    assert not {id(named[name]) for name in frozen} & set(owned(optimizer))
    assert optimizer.state[other.bias] is kept
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.0025, 0.005]
    assert optimizer.state[nn.Parameter(torch.zeros(1))] == {}  # still a defaultdict


def test_state_saved_after_growth_can_be_loaded() -> None:
    old, new, index = pair("Adam")
    optimizer = optim.Adam(old.parameters())
    train(old, optimizer, 2)
    repoint(optimizer, old, new, index)
    fresh = optim.Adam(new.parameters())
    fresh.load_state_dict(optimizer.state_dict())
    for parameter in new.parameters():
        assert torch.equal(fresh.state[parameter]["exp_avg_sq"], optimizer.state[parameter]["exp_avg_sq"])


def grow_state(shape: list[int], positions: Positions, state: dict[str, Any], new_shape: list[int]) -> Any:
    old, new = nn.ParameterDict({"p": torch.zeros(shape)}), nn.ParameterDict({"p": torch.zeros(new_shape)})
    optimizer = optim.SGD(old.parameters(), lr=0.1)
    optimizer.state[old["p"]] = state
    repoint(optimizer, old, new, {"p": positions})
    return optimizer.state[new["p"]] if new["p"] in optimizer.state else None


def test_factored_moments_of_other_optimizers() -> None:
    row, col = torch.rand(3), torch.rand(5)
    moved = grow_state([3, 5], (C, H), {"row": row, "col": col, "step": torch.tensor(4.0), "m": None}, [4, 7])
    assert moved["row"].tolist() == [*row.tolist(), 0.0]
    assert torch.equal(moved["col"][H], col) and (moved["col"] == 0).sum() == 2
    assert moved["step"] == 4 and moved["m"] is None
    # A convolution's two kernel dimensions are alike, but neither grows, so the answer is the same.
    factor = torch.rand(3, 2, 5)
    moved = grow_state([3, 2, 5, 5], (C, None, None, None), {"row": factor}, [4, 2, 5, 5])
    assert moved["row"].shape == (4, 2, 5) and torch.equal(moved["row"][:3], factor)
    # Which side of a square matrix this is, its shape does not tell.
    assert grow_state([3, 3], (C, None), {"row": row, "m": torch.rand(3, 3)}, [4, 3]) is None
    assert grow_state([3, 3], (C, C), {"packed": torch.rand(9)}, [4, 4]) is None


def test_adafactor_of_a_single_column() -> None:
    """Its row moments have the parameter's own shape, but do not follow it."""
    old, new = nn.Linear(1, 3, bias=False), nn.Linear(2, 4, bias=False)
    optimizer = optim.Adafactor(old.parameters())
    old(torch.randn(8, 1)).square().sum().backward()
    optimizer.step()
    repoint(optimizer, old, new, {"weight": (C, torch.tensor([0]))})
    assert optimizer.state[new.weight]["row_var"].shape == (4, 1)
    assert optimizer.state[new.weight]["col_var"].shape == (1, 2)


def test_reduced_precision_state_keeps_its_dtype() -> None:
    moved = grow_state([3], (C,), {"m": torch.rand(3, dtype=torch.bfloat16), "n": torch.rand(3).double()}, [4])
    assert (moved["m"].dtype, moved["n"].dtype) == (torch.bfloat16, torch.float64)


def untied() -> Net:
    net = Net(4, 7)
    net.tied.weight = nn.Parameter(net.tied.weight.clone())
    return net


def without_bias() -> Net:
    net = Net(4, 7)
    net.second.bias = None
    return net


@pytest.mark.parametrize(
    ("new", "index", "message"),
    [
        (Net(4, 7), {}, r"dimension 0 of parameter 'conv.weight' goes from 3 to 4 with no index"),
        (Net(4, 7), {**NET_INDEX, "first.bias": (C,)}, "'first.bias' goes from 5 to 7 with an index of 3"),
        (Net(4, 7), {**NET_INDEX, "conv.bias": (torch.tensor([0, 1, 4]),)}, "below 4"),
        (Net(4, 7), {**NET_INDEX, "conv.bias": (torch.tensor([0, 1, 1]),)}, "each once"),
        (Net(4, 7), {**NET_INDEX, "conv.bias": (C, None)}, "one per dimension"),
        (untied(), NET_INDEX, "'first.weight' and 'tied.weight' are one parameter in the old model"),
        (without_bias(), NET_INDEX, "no parameter 'second.bias'"),
    ],
)
def test_a_misfit_changes_nothing(new: nn.Module, index: Index, message: str) -> None:
    old = Net()
    optimizer = optim.Adam(old.parameters())
    train(old, optimizer, 2)
    before, state = owned(optimizer), copy.deepcopy(optimizer.state_dict()["state"])
    with pytest.raises(FxgrowError, match=message):
        repoint(optimizer, old, new, index)
    assert owned(optimizer) == before
    after = optimizer.state_dict()["state"]
    assert after.keys() == state.keys()
    assert all(torch.equal(after[i][key], state[i][key]) for i in state for key in state[i])


def test_the_optimizer_of_another_model() -> None:
    old, new, index = pair("Adam")
    with pytest.raises(FxgrowError, match="Adam optimizer owns 2 parameters, none of them of this Net; pass"):
        repoint(optim.Adam(nn.Linear(2, 2).parameters()), old, new, index)
    both = optim.SGD([*old.parameters(), new.second.bias], lr=0.1)
    with pytest.raises(FxgrowError, match="twice, as 'second.bias' and"):
        repoint(both, old, new, index)


def test_first_adam_step_of_new_entries() -> None:
    """With both moments at zero and a large step count: lr * 0.1 g / sqrt(0.001 g^2) = 3.16 lr."""
    old, new = nn.Linear(2, 1, bias=False), nn.Linear(3, 1, bias=False)
    optimizer = optim.Adam(old.parameters(), lr=1e-3)
    for _ in range(10_000):
        old.weight.grad = torch.ones_like(old.weight)
        optimizer.step()
    repoint(optimizer, old, new, {"weight": (None, torch.tensor([0, 1]))})
    before = new.weight[0, 2].item()
    new.weight.grad = torch.full_like(new.weight, 0.3)
    optimizer.step()
    assert before - new.weight[0, 2].item() == pytest.approx(3.16e-3, rel=1e-2)
