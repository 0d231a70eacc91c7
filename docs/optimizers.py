"""Grows a net under every optimiser of torch.optim and writes a table of their state: ``python -m docs.optimizers``."""

from __future__ import annotations

import copy
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn, optim
from torch.nn import functional as F

import fxgrow

PAGE = Path(__file__).with_name("optimizers.md")

#: every class of torch.optim, with the options it is tried with; `betas` and the like stay at their defaults
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "ASGD": [{"t0": 1}],
    "Adadelta": [{"lr": 0.5}],
    "Adafactor": [{}],
    "Adagrad": [{}, {"initial_accumulator_value": 0.1}, {"fused": True}],
    "Adam": [{"amsgrad": True}, {"foreach": True}, {"fused": True}],
    "AdamW": [{"amsgrad": True}, {"fused": True}],
    "Adamax": [{}],
    "LBFGS": [{"max_iter": 3, "lr": 0.1}],
    "Muon": [{}],
    "NAdam": [{}, {"decoupled_weight_decay": True}],
    "RAdam": [{}],
    "RMSprop": [{"momentum": 0.9, "centered": True}],
    "Rprop": [{}],
    "SGD": [{}, {"momentum": 0.9, "nesterov": True}, {"momentum": 0.9, "fused": True}],
    "SparseAdam": [{}],
}
#: where new entries of a state do not start at zero
STARTS = {
    ("ASGD", "ax"): "the weights",
    ("Adagrad", "sum"): "initial_accumulator_value",
    ("Rprop", "step_size"): "lr",
}
TOKENS = 11

HEAD = """# Optimisers under growth

Every optimiser of `torch.optim`, four steps before a growth of two widths and twenty after it. This table is written by
`python -m docs.optimizers` (`make docs-tables`); `tests/transfer/test_optimizers.py` fails if it is wrong.

*State*: what the optimiser keeps for each entry of a parameter; in brackets, what it keeps once per parameter.
*Old entries*: their state is the same, bit for bit. *New entries*: what their state starts at. *One owner*: every
parameter of the grown model is in one group of one optimiser, and no others are.

| optimiser | options | state | old entries | new entries | one owner | 20 more steps |
|---|---|---|---|---|---|---|"""
FOOT = """
SparseAdam takes only sparse gradients: it trains the embedding, SGD the rest. LBFGS keeps one history of all its
parameters, concatenated; zeros at the new positions keep every product of its vectors.

The state of other optimisers is matched by its shapes; what cannot be matched is reset, with a warning. Schedulers and
`GradScaler` hold the optimiser, which stays the same object, as do its groups and their options.
"""


class Net(nn.Module):
    """Tokens in, classes out; one hidden width, that of the embedding, and one between two matrices."""

    def __init__(self, sparse: bool, bias: bool) -> None:
        super().__init__()
        self.tokens = nn.Embedding(TOKENS, 4, sparse=sparse)
        self.hidden = nn.Linear(4, 5, bias=bias)
        self.head = nn.Linear(5, 3, bias=bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map [n] int64 to [n, 3]."""
        return self.head(torch.tanh(self.hidden(self.tokens(tokens))))


@dataclass
class Row:
    """What became of one optimiser."""

    name: str
    options: dict[str, Any]
    state: list[str] = field(default_factory=list)
    kept: bool = True
    owners: bool = True
    finite: bool = True
    starts: list[str] = field(default_factory=list)
    afresh: bool = False


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(TOKENS, (64,), generator=generator)
    return [(part, part % 3) for part in tokens.split(16)]


def train(grower: fxgrow.Grower, optimizers: list[optim.Optimizer], steps: int) -> list[float]:
    losses = []
    data = batches()
    for step in range(steps):
        x, y = data[step % len(data)]

        def closure() -> Tensor:
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss = F.cross_entropy(grower.model(x), y)  # noqa: B023
            loss.backward()
            return loss

        losses.append(closure().item())
        for optimizer in optimizers:
            optimizer.step(closure) if isinstance(optimizer, optim.LBFGS) else optimizer.step()  # type: ignore[call-overload]
        grower.step()
    return losses


def entries(value: Tensor, at: Any, new: bool) -> Tensor:
    """Of a state tensor with the dimensions of its parameter: those at the old positions, or all others."""
    if not new:
        for dim, where in enumerate(at):
            if where is not None and value.shape[dim] > 1:
                value = value.index_select(dim, where)
        return value
    mask = torch.ones(value.shape, dtype=torch.bool)
    places = [torch.arange(n) if where is None or n == 1 else where for n, where in zip(value.shape, at, strict=True)]
    mask[torch.meshgrid(*places, indexing="ij")] = False
    return value[mask]


def by_parameter(model: nn.Module, state: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The history of LBFGS, cut into pieces of the shapes of the parameters."""
    names, sizes = zip(*((n, p.numel()) for n, p in model.named_parameters()), strict=True)
    out: dict[str, dict[str, Any]] = {n: {} for n in names}
    vectors = {"d": state["d"], "prev_flat_grad": state["prev_flat_grad"], "old_dirs": state["old_dirs"][-1]}
    vectors["old_stps"] = state["old_stps"][-1]
    for key, vector in vectors.items():
        for n, part in zip(names, vector.split(sizes), strict=True):
            out[n][key] = part.view(model.get_parameter(n).shape)
    return out


def tried(name: str, options: dict[str, Any]) -> Row:
    """One growth under an optimiser: every entry of its state compared with what it was."""
    torch.manual_seed(0)
    row = Row(name, options)
    model = Net(sparse=name == "SparseAdam", bias=name != "Muon")
    mine, others = list(model.parameters()), []
    if name == "SparseAdam":  # takes sparse gradients alone
        mine, others = [model.tokens.weight], [*model.hidden.parameters(), *model.head.parameters()]
    optimizers: list[optim.Optimizer] = [getattr(optim, name)(mine, **options)]
    if others:
        optimizers.append(optim.SGD(others, lr=0.1))
    grower = fxgrow.Grower(model, optimizers, fxgrow.Every(steps=999), dataloader=batches(), method="random", neurons=2)
    train(grower, optimizers, 4)
    names = {id(p): n for n, p in model.named_parameters()}
    before = {names[id(p)]: copy.deepcopy(state) for p, state in optimizers[0].state.items()}
    maps: list[Any] = []
    grower.on_growth(lambda old, new, index: maps.append(index))
    grower.grow_now()
    found = dict(grower.model.named_parameters())
    if name == "LBFGS":
        before = by_parameter(model, before["tokens.weight"])
        first = optimizers[0].state.pop(found["tokens.weight"])
        apart = by_parameter(grower.model, first)
        state_of = {found[n]: apart[n] for n in found}
    else:
        state_of = dict(optimizers[0].state)
    owned = [id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    row.owners = sorted(owned) == sorted(map(id, found.values()))
    for parameter, old_state in before.items():
        state = state_of.get(found[parameter], {})
        row.afresh |= not state
        at = maps[0].get(parameter, (None,) * found[parameter].dim())
        for key, was in old_state.items() if state else ():
            label = f"{key}" if isinstance(was, Tensor) and was.dim() == found[parameter].dim() else f"({key})"
            if label not in row.state:
                row.state.append(label)
            now = state[key]
            if label != key:
                row.kept &= bool(now == was)
                continue
            row.kept &= torch.equal(entries(now, at, new=False), was) and now.dtype == was.dtype
            fresh = entries(now, at, new=True)
            if (name, key) == ("ASGD", "ax"):
                expected: Any = entries(found[parameter].detach(), at, new=True)
            else:
                option = STARTS.get((name, key))
                expected = optimizers[0].param_groups[0][option] if option else 0.0
            row.kept &= bool((fresh == expected).all())
            start = STARTS.get((name, key))
            if start and f"{key}: {start}" not in row.starts:
                row.starts.append(f"{key}: {start}")
    if name == "LBFGS":
        optimizers[0].state[found["tokens.weight"]] = first
    losses = train(grower, optimizers, 20)
    row.finite = all(torch.isfinite(p).all() for p in grower.parameters()) and losses[-1] == losses[-1]
    return row


def rows() -> list[Row]:
    """All of them."""
    return [tried(name, options) for name, several in OPTIONS.items() for options in several]


def page(found: list[Row]) -> str:
    """The page with the table."""
    text = [HEAD]
    for row in found:
        options = ", ".join(f"{k}={v}" for k, v in row.options.items()) or "·"
        old = "afresh" if row.afresh else "kept" if row.kept else "CHANGED"
        starts = "; ".join(row.starts) or ("afresh" if row.afresh else "zero" if row.state else "·")
        cells = [
            row.name, options, ", ".join(row.state) or "·", old, starts, "yes" if row.owners else "NO",
            "finite" if row.finite else "NOT FINITE",
        ]  # fmt: skip
        text.append(f"| {' | '.join(cells)} |")
    text.append(FOOT)
    return "\n".join(text)


if __name__ == "__main__":
    torch.set_num_threads(1)
    PAGE.write_text(page(rows()), encoding="utf-8")
    sys.stdout.write(f"{PAGE}\n")
