"""Points an optimizer at the parameters of a grown model and carries its state over."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import ASGD, LBFGS, Adafactor, Adagrad, Optimizer, Rprop

from fxgrow.errors import FxgrowError
from fxgrow.transfer.parameter_change import Assign, ParameterChange, ParameterMove, Positions, put_at, spread

log = logging.getLogger("fxgrow")
# State that does not start at zero, and the option of the group that it starts at. An Rprop step of zero
# would be clamped to the smallest step there is, which leaves a new unit still for dozens of iterations.
_STARTS = {(Rprop, "step_size"): "lr", (Adagrad, "sum"): "initial_accumulator_value"}
# Factored state, and the dimension that it has averaged away (kept with size 1).
_AVERAGED = {(Adafactor, "row_var"): -1, (Adafactor, "col_var"): -2}


def repoint(optimizer: Optimizer, old: nn.Module, new: nn.Module, index: Mapping[str, Positions]) -> None:
    """Makes an optimizer that trains `old` train `new` from here on; it remains the same object.

    Each parameter of `old` is replaced, in its place in its group, by that of the same name in `new`; others stay.
    State of the parameter's shape (momentum, moments) keeps its old entries bit for bit and starts at zero for the new
    ones; state with some dimensions averaged away (factored second moments) follows the dimensions it has; scalars
    (`step`) stay. State that cannot be matched is dropped with a logged warning: the optimizer starts it afresh.

    Raises:
        FxgrowError: the optimizer owns no parameter of `old`; `new` misses one, or ties them in another way; `index`
            does not fit the shapes. Nothing has been changed then.
    """
    prepare_transfer(optimizer, ParameterChange(old, new, index))()


def check_owner(optimizer: Optimizer, model: nn.Module) -> None:
    """Raises an `FxgrowError` where an optimizer owns no parameter of the model, before any time is spent."""
    prepare_transfer(optimizer, ParameterChange(model, model, {}))


@torch.no_grad()
def prepare_transfer(optimizer: Optimizer, change: ParameterChange) -> Assign:
    """Does all of `repoint` but its assignments: what can fail has failed on return, and nothing has changed."""
    moves = _moves(optimizer, change)
    new = {key: move.new for key, move in moves.items()}
    _check_once(optimizer, moves)
    options = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    state: dict[Tensor, Any] = {}
    for parameter, entries in optimizer.state.items():
        move = moves.get(id(parameter))
        if isinstance(optimizer, LBFGS):
            state[new.get(id(parameter), parameter)] = _flat_state(optimizer, entries, moves)
        elif move is None:
            state[parameter] = entries
        elif (moved := _state(optimizer, options[id(parameter)], entries, move)) is not None:
            state[move.new] = moved

    def assign() -> None:
        for group in optimizer.param_groups:
            # in place: LBFGS keeps a second reference to this list
            group["params"][:] = [new.get(id(p), p) for p in group["params"]]
        optimizer.state.clear()
        optimizer.state.update(state)
        if isinstance(optimizer, LBFGS):
            optimizer._numel_cache = None

    return assign


def _moves(optimizer: Optimizer, change: ParameterChange) -> dict[int, ParameterMove]:
    """Returns the moves of the parameters that the optimizer owns, by id of the old one."""
    owned = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    moves = {id(parameter): change.move(parameter) for parameter in owned if id(parameter) in change.names}
    if not moves:
        raise FxgrowError(
            f"the {type(optimizer).__name__} optimizer owns {len(owned)} parameters, none of them of this "
            f"{type(change.old).__name__}; pass the optimizer that trains this model, built from its parameters() "
            "before growth"
        )
    return moves


def _check_once(optimizer: Optimizer, moves: Mapping[int, ParameterMove]) -> None:
    """Refuses to leave the optimizer with one parameter twice: it would be stepped twice."""
    seen: dict[int, str] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            move = moves.get(id(parameter))
            name, new = ("one it owned before", parameter) if move is None else (move.name, move.new)
            first = seen.setdefault(id(new), name)
            if first != name:
                raise FxgrowError(
                    f"the optimizer would own one parameter of the grown model twice, as {first!r} and "
                    f"{name!r}; pass an optimizer that owns the old model's parameters only"
                )


def _state(
    optimizer: Optimizer, options: Mapping[str, Any], entries: Mapping[str, Any], move: ParameterMove
) -> dict[str, Any] | None:
    """Returns the state of one parameter for its new shape; None where some of it cannot be matched."""
    if move.unchanged:
        return dict(entries)
    moved: dict[str, Any] = {}
    for key, value in entries.items():
        # One number with another number of dimensions than the parameter is a count, such as `step`.
        what = f"a {type(value).__name__}"
        if isinstance(value, Tensor) and (value.numel() != 1 or value.dim() == move.old.dim()):
            what = f"a tensor of shape {list(value.shape)}"
            if (grown := _grown(optimizer, options, key, value, move)) is not None:
                moved[key] = grown
                continue
        elif value is None or isinstance(value, (Tensor, bool, int, float, complex, str)):
            moved[key] = value
            continue
        log.warning(
            f"{type(optimizer).__name__} keeps {what} as {key!r} for parameter {move.name!r} of shape "
            f"{list(move.old.shape)}; it cannot be carried over to shape {list(move.new.shape)}, so the optimizer "
            "starts this parameter's state afresh"
        )
        return None
    return moved


def _flat_state(optimizer: Optimizer, entries: Mapping[str, Any], moves: Mapping[int, ParameterMove]) -> dict[str, Any]:
    """Moves the state of LBFGS: one history of all its parameters, concatenated, under the first of them.

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


def _grown(
    optimizer: Optimizer, options: Mapping[str, Any], key: str, value: Tensor, move: ParameterMove
) -> Tensor | None:
    """Returns a state tensor for the new shape; None where its dimensions cannot be matched."""
    dims = _parameter_dims(optimizer, key, value, move)
    if dims is None:
        return None
    if isinstance(optimizer, ASGD) and key == "ax":  # an average of the parameter: new entries start where its do
        return spread(value, move.positions, move.new)
    option = _lookup(_STARTS, optimizer, key)
    start = 0.0 if option is None else float(options[option])
    positions = tuple(None if dim is None else move.positions[dim] for dim in dims)
    sizes = zip(value.shape, dims, positions, strict=True)
    shape = [n if dim is None or at is None else move.new.shape[dim] for n, dim, at in sizes]
    grown = value.new_full(shape, start)
    put_at(grown, positions, value)
    if grown.shape == move.new.shape:
        # The parameter's own strides (channels_last), which the fused and foreach kernels count on.
        grown = torch.empty_like(move.new, dtype=value.dtype, device=value.device).copy_(grown)
    return grown


def _lookup(table: Mapping[tuple[Any, str], Any], optimizer: Optimizer, key: str) -> Any:
    return next((v for (kind, name), v in table.items() if isinstance(optimizer, kind) and name == key), None)


def _parameter_dims(optimizer: Optimizer, key: str, value: Tensor, move: ParameterMove) -> list[int | None] | None:
    """Returns, for each dimension of a state tensor, the dimension of the parameter it runs along (None: none)."""
    sizes = list(move.old.shape)
    if (averaged := _lookup(_AVERAGED, optimizer, key)) is not None:
        return [None if dim - len(sizes) == averaged else dim for dim in range(len(sizes))]
    if value.dim() == len(sizes):
        if any(size not in (1, full) for size, full in zip(value.shape, sizes, strict=True)):
            return None
        return [dim if value.shape[dim] == full else None for dim, full in enumerate(sizes)]
    matches = [
        list(dims)
        for dims in itertools.combinations(range(len(sizes)), value.dim())
        if [sizes[dim] for dim in dims] == list(value.shape)
    ]
    # Several matches are still one answer where the dimensions they disagree on did not change.
    changed = {tuple(dim if move.positions[dim] is not None else None for dim in dims) for dims in matches}
    return [*matches[0]] if len(changed) == 1 else None
