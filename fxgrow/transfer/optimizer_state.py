"""Point an optimizer at the parameters of a grown model, and carry its state over."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import ASGD, LBFGS, Adafactor, Adagrad, Optimizer, Rprop

from fxgrow.errors import FxgrowError
from fxgrow.graph.graph import put

# Per dimension of a parameter: where its old entries are in the new one. None: it did not change.
Positions: TypeAlias = tuple[Tensor | None, ...]
T = TypeVar("T")
_log = logging.getLogger(__name__)
# State that does not start at zero, and the option of the group that it starts at. An Rprop step of zero
# would be clamped to the smallest step there is, which leaves a new unit still for dozens of iterations.
_STARTS: dict[tuple[type[Optimizer], str], str] = {
    (Rprop, "step_size"): "lr",
    (Adagrad, "sum"): "initial_accumulator_value",
}
# State that is an average of the parameter itself: new entries start where the parameter's do.
_WEIGHTS: dict[tuple[type[Optimizer], str], bool] = {(ASGD, "ax"): True}
# Factored state, and the dimension that it has averaged away (kept with size 1).
_AVERAGED: dict[tuple[type[Optimizer], str], int] = {(Adafactor, "row_var"): -1, (Adafactor, "col_var"): -2}


@torch.no_grad()
def repoint(optimizer: Optimizer, old: nn.Module, new: nn.Module, index: Mapping[str, Positions]) -> None:
    """Make ``optimizer``, which trains ``old``, train ``new`` from here on.

    Every parameter of ``old`` that the optimizer owns is replaced, in its place in its group, by the
    parameter of the same qualified name in ``new``. State of the parameter's shape (momentum, moments)
    keeps its old entries bit for bit and starts at zero for the new ones; state with some dimensions
    averaged away (factored second moments) follows the dimensions it has; scalars (``step``) stay. State
    that cannot be matched is dropped with a logged warning, so that the optimizer starts it afresh. The
    optimizer remains the same object, so schedulers and gradient scalers that hold it stay valid.

    Args:
        optimizer: Any ``torch.optim.Optimizer``; changed in place. Parameters that are not ``old``'s stay.
        old: The model before growth, whose parameters the optimizer owns.
        new: The grown model, with parameters of the same qualified names on the same device.
        index: Parameter name to, for each of its dimensions, an integer tensor ``[old size]`` with the new
            position of each old entry, or None for a dimension that did not change. A name left out
            means an unchanged shape; of tied parameters any one name is enough.

    Raises:
        FxgrowError: The optimizer owns no parameter of ``old``; ``new`` misses one, or ties them in
            another way; ``index`` does not fit the shapes. Nothing has been changed then.

    Example:
        >>> import torch
        >>> old, new = torch.nn.Linear(2, 2, bias=False), torch.nn.Linear(2, 3, bias=False)
        >>> optimizer = torch.optim.SGD(old.parameters(), lr=0.1, momentum=0.9)
        >>> repoint(optimizer, old, new, {"weight": (torch.tensor([0, 1]), None)})
        >>> optimizer.param_groups[0]["params"][0] is new.weight
        True
    """
    prepare_transfer(optimizer, old, new, index)()


@torch.no_grad()
def prepare_transfer(
    optimizer: Optimizer, old: nn.Module, new: nn.Module, index: Mapping[str, Positions]
) -> Callable[[], None]:
    """All of `repoint` but its assignments: what can fail has failed when this returns, and nothing has changed."""
    moves = _moves(optimizer, old, new, index)
    _check_once(optimizer, moves)
    state: dict[Tensor, Any] = {}
    flat = isinstance(optimizer, LBFGS)
    for parameter, entries in optimizer.state.items():
        move = moves.get(id(parameter))
        if flat:
            state[_target(moves, parameter)] = _flat_state(optimizer, entries, moves)  # type: ignore[arg-type]
        elif move is None:
            state[parameter] = entries
        elif (moved := _moved(optimizer, entries, move)) is not None:
            state[move.new] = moved

    def assign() -> None:
        for group in optimizer.param_groups:
            # In place: LBFGS keeps a second reference to this list.
            group["params"][:] = [_target(moves, parameter) for parameter in group["params"]]
        optimizer.state.clear()
        optimizer.state.update(state)
        if isinstance(optimizer, LBFGS):
            optimizer._numel_cache = None

    return assign


@dataclass(frozen=True)
class _Move:
    """One parameter's way from the old model to the new one."""

    name: str
    old: nn.Parameter
    new: nn.Parameter
    positions: Positions
    options: Mapping[str, Any]  # of the group that owns it

    @property
    def unchanged(self) -> bool:
        return self.old.shape == self.new.shape and all(where is None for where in self.positions)


def _moves(optimizer: Optimizer, old: nn.Module, new: nn.Module, index: Mapping[str, Positions]) -> dict[int, _Move]:
    """By id of the old parameter, what becomes of each one that the optimizer owns."""
    names, targets = _names(old), dict(new.named_parameters(remove_duplicate=False))
    moves = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if id(parameter) in names:
                moves[id(parameter)] = _move(parameter, names[id(parameter)], targets, index, group)
    if not moves:
        owned = sum(len(group["params"]) for group in optimizer.param_groups)
        raise FxgrowError(
            f"the {type(optimizer).__name__} optimizer owns {owned} parameters, none of them of this "
            f"{type(old).__name__}; pass the optimizer that trains this model, built from its parameters() "
            "before growth"
        )
    return moves


def _names(model: nn.Module) -> dict[int, list[str]]:
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return names


def moved_parameters(
    old: nn.Module, new: nn.Module, index: Mapping[str, Positions]
) -> list[tuple[nn.Parameter, nn.Parameter, Positions]]:
    """Each parameter of `old` with the one that takes its place, and where its entries are there.

    Raises:
        FxgrowError: as `repoint`.
    """
    targets = dict(new.named_parameters(remove_duplicate=False))
    names = _names(old)
    moves = [_move(parameter, names[id(parameter)], targets, index, {}) for parameter in old.parameters()]
    return [(move.old, move.new, move.positions) for move in moves]


def _move(
    parameter: nn.Parameter,
    names: list[str],
    targets: Mapping[str, nn.Parameter],
    index: Mapping[str, Positions],
    options: Mapping[str, Any],
) -> _Move:
    kept = [name for name in names if name in targets]
    if not kept:
        raise FxgrowError(f"the grown model has no parameter {names[0]!r}; it must keep the old names")
    target = targets[kept[0]]
    untied = [name for name in kept if targets[name] is not target]
    if untied:
        raise FxgrowError(
            f"{kept[0]!r} and {untied[0]!r} are one parameter in the old model and two in the grown one; "
            "tie them again before the optimizer is passed on"
        )
    given = [index[name] for name in names if name in index]
    positions = given[0] if given else (None,) * parameter.dim()
    _check_positions(names[0], parameter, target, positions)
    return _Move(names[0], parameter, target, positions, options)


def _check_positions(name: str, old: Tensor, new: Tensor, positions: Positions) -> None:
    if not old.dim() == new.dim() == len(positions):
        raise FxgrowError(
            f"parameter {name!r} of shape {list(old.shape)} cannot become {list(new.shape)} with "
            f"{len(positions)} index entries; there must be one per dimension"
        )
    for dim, where in enumerate(positions):
        before, after = old.shape[dim], new.shape[dim]
        if where is None:
            fits, found = before == after, "no index"
        else:
            values = where.tolist()
            fits = len(values) == before == len(set(values)) and all(0 <= v < after for v in values)
            found = f"an index of {len(values)} entries"
        if not fits:
            raise FxgrowError(
                f"dimension {dim} of parameter {name!r} goes from {before} to {after} with {found}; give the "
                f"new position, each once and below {after}, of every old entry"
            )


def _check_once(optimizer: Optimizer, moves: Mapping[int, _Move]) -> None:
    """Refuse to leave the optimizer with one parameter twice: it would be stepped twice."""
    seen: dict[int, str] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            move = moves.get(id(parameter))
            name = move.name if move is not None else "one it owned before"
            first = seen.setdefault(id(_target(moves, parameter)), name)
            if first != name:
                raise FxgrowError(
                    f"the optimizer would own one parameter of the grown model twice, as {first!r} and "
                    f"{name!r}; pass an optimizer that owns the old model's parameters only"
                )


def _target(moves: Mapping[int, _Move], parameter: nn.Parameter) -> nn.Parameter:
    move = moves.get(id(parameter))
    return parameter if move is None else move.new


def _moved(optimizer: Optimizer, entries: Mapping[str, Any], move: _Move) -> dict[str, Any] | None:
    """State of one parameter for its new shape; None where some of it cannot be matched."""
    if move.unchanged:
        return dict(entries)
    moved: dict[str, Any] = {}
    for key, value in entries.items():
        # One number with another number of dimensions than the parameter is a count, such as `step`.
        if isinstance(value, Tensor) and (value.numel() != 1 or value.dim() == move.old.dim()):
            grown = _grown(optimizer, key, value, move)
            if grown is None:
                _warn(optimizer, key, f"a tensor of shape {list(value.shape)}", move)
                return None
            moved[key] = grown
        elif value is None or isinstance(value, (Tensor, bool, int, float, complex, str)):
            moved[key] = value
        else:
            _warn(optimizer, key, f"a {type(value).__name__}", move)
            return None
    return moved


def _flat_state(optimizer: Optimizer, entries: Mapping[str, Any], moves: Mapping[int, _Move]) -> dict[str, Any]:
    """LBFGS keeps one history of all its parameters, end to end, under the first of them.

    Zeros in the new places leave every product of its vectors as it was.
    """
    parameters = optimizer.param_groups[0]["params"]
    # real numbers only: a complex entry is two
    sizes = [p.numel() * (2 if p.is_complex() else 1) for p in parameters]

    def moved(value: Any) -> Any:
        if isinstance(value, list):
            return [moved(v) for v in value]
        if not isinstance(value, Tensor) or value.shape != (sum(sizes),):
            return value
        parts = []
        for parameter, part in zip(parameters, value.split(sizes), strict=True):
            move = moves.get(id(parameter))
            if move is not None and not move.unchanged:
                real = torch.view_as_complex(part.view(-1, 2)) if parameter.is_complex() else part
                wide = spread(real.view(parameter.shape), move.positions, torch.zeros_like(move.new)).reshape(-1)
                part = torch.view_as_real(wide).reshape(-1) if parameter.is_complex() else wide
            parts.append(part)
        return torch.cat(parts)

    return {key: moved(value) for key, value in entries.items()}


def _warn(optimizer: Optimizer, key: str, what: str, move: _Move) -> None:
    _log.warning(
        "%s keeps %s as %r for parameter %r of shape %s; it cannot be carried over to shape %s, so the "
        "optimizer starts this parameter's state afresh",
        type(optimizer).__name__,
        what,
        key,
        move.name,
        list(move.old.shape),
        list(move.new.shape),
    )


def _grown(optimizer: Optimizer, key: str, value: Tensor, move: _Move) -> Tensor | None:
    dims = _dims(optimizer, key, value, move)
    if dims is None:
        return None
    if _listed(_WEIGHTS, optimizer, key):
        return spread(value, move.positions, move.new)
    option = _listed(_STARTS, optimizer, key)
    start = 0.0 if option is None else float(move.options[option])
    grown = value
    for axis, dim in enumerate(dims):
        where = None if dim is None else move.positions[dim]
        if dim is None or where is None:
            continue
        shape = [*grown.shape[:axis], move.new.shape[dim], *grown.shape[axis + 1 :]]
        grown = grown.new_full(shape, start).index_copy_(axis, where.to(grown.device), grown)
    if grown.shape == move.new.shape:
        # The parameter's own strides (channels_last), which the fused and foreach kernels count on.
        grown = torch.empty_like(move.new, dtype=value.dtype, device=value.device).copy_(grown)
    return grown


def spread(old: Tensor, positions: Positions, new: Tensor) -> Tensor:
    """What `new` holds, in the type and place of `old`, with the entries of `old` at their positions."""
    out = new.detach().clone().to(device=old.device, dtype=old.dtype)
    whole = [torch.arange(n) if at is None else at for n, at in zip(out.shape, positions, strict=True)]
    put(out, whole, old.detach())
    return out


def _listed(table: Mapping[tuple[type[Optimizer], str], T], optimizer: Optimizer, key: str) -> T | None:
    found = (value for (kind, name), value in table.items() if isinstance(optimizer, kind) and name == key)
    return next(found, None)


def _dims(optimizer: Optimizer, key: str, value: Tensor, move: _Move) -> list[int | None] | None:
    """For each dimension of a state tensor, the dimension of the parameter it runs along (None: none)."""
    sizes = list(move.old.shape)
    averaged = _listed(_AVERAGED, optimizer, key)
    if averaged is not None:
        return [None if dim - len(sizes) == averaged else dim for dim in range(len(sizes))]
    if value.dim() == len(sizes):
        pairs = list(zip(value.shape, sizes, strict=True))
        if not all(size in (1, full) for size, full in pairs):
            return None
        return [dim if size == full else None for dim, (size, full) in enumerate(pairs)]
    matches = [
        list(dims)
        for dims in itertools.combinations(range(len(sizes)), value.dim())
        if [sizes[dim] for dim in dims] == list(value.shape)
    ]
    # Several matches are still one answer where the dimensions they disagree on did not change.
    changed = {tuple(dim if move.positions[dim] is not None else None for dim in dims) for dims in matches}
    if len(changed) != 1:
        return None
    return [*matches[0]]
