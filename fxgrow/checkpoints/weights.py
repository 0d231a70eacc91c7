"""The stored tensors of a model by name, and a fresh model that takes them.

Tied tensors are stored once, but tensors that only share memory each. A loaded tensor takes the device and
`requires_grad` of the fresh model, and keeps the dtype and strides that it was saved with.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fxgrow.checkpoints.fingerprint import Fingerprint
from fxgrow.checkpoints.module_state import copy_with_state, own_entries, set_module_state, with_extra_state
from fxgrow.errors import FileError
from fxgrow.graph.code_lines import code_lines
from fxgrow.graph.graph import copy_module, named_tensors, same_kind, unwrap
from fxgrow.rewriting.into_module import check_into, into_module
from fxgrow.rewriting.replay import replayed, sizes_after
from fxgrow.storage.recipe import Recipe, grown_inside, keep_recipe
from fxgrow.tracing.capture import capture

#: a message lists at most so many names
LISTED = 4


@dataclass(frozen=True)
class Weights:
    """The stored state of a model: tensors, each once, and results of `get_extra_state()` by the module's name."""

    tensors: Mapping[str, Tensor]
    #: other names of tied tensors, and the name each is stored under
    aliases: Mapping[str, str]
    extra: Mapping[str, Any]
    #: what else the model's `state_dict()` has
    entries: Mapping[str, Any]


def weights_of(model: nn.Module, recipe: Recipe) -> Weights:
    """Returns the state of a model without wrappers."""
    if (inside := next(grown_inside(model), None)) is not None:
        raise FileError(
            f"Submodule {inside!r} of this {type(model).__name__} has grown on its own: save that one "
            f"(model.{inside}), and load it into the fresh model's."
        )
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    names: dict[int, str] = {}
    stored = _stored_tensors(model, recipe)
    for name, tensor in stored.items():
        first = names.setdefault(id(tensor), name)
        if first == name:
            tensors[name] = tensor
        else:
            aliases[name] = first
    extra = {name: m.get_extra_state() for name, m in with_extra_state(model)}
    return Weights(tensors, aliases, extra, own_entries(model, stored))


def rebuild(
    model: nn.Module,
    recipe: Recipe,
    weights: Weights | None = None,
    example_inputs: tuple[Any, ...] | dict[str, Any] | None = None,
    into: str | None = None,
    fingerprint: Fingerprint | None = None,
) -> nn.Module:
    """Returns a copy of a fresh model with the recipe's sizes, and the weights; see `fxgrow.load`.

    Without weights, entries are zero where sizes changed, and the model's values elsewhere. With a fingerprint the
    result is checked against it.
    """
    into = into or recipe.into
    bare, names = unwrap(model), {name for step in recipe.steps for name in step.sizes}
    # a wrapper that was captured itself has grown with its names
    model = model if names and names <= named_tensors(model).keys() - named_tensors(bare).keys() else bare
    check_into(into, model)
    if Recipe.of(model).steps:
        raise FileError("This model has grown already. A recipe starts from a model as it was before it grew.")
    extra, entries = ({}, {}) if weights is None else (weights.extra, weights.entries)
    code = None
    if into == "module" and not recipe.steps:
        loaded = {} if weights is None else _loaded(model, recipe, weights)
        out = copy_module(model, {id(t): loaded[name] for name, t in named_tensors(model).items() if name in loaded})
        keep_recipe(out, recipe)
    else:
        # before the capture, whose errors would say less; constants of a graph are checked in it
        sizes_after(named_tensors(model), recipe, constants=False)
        inputs = _inputs(model, recipe, weights) if example_inputs is None else example_inputs
        model = copy_with_state(model, extra, entries)
        gm = capture(model, inputs)
        if example_inputs is None and recipe.code is not None and fingerprint is not None:
            code = code_lines(gm)
        out = replayed(gm, recipe, {} if weights is None else _loaded(gm, recipe, weights))
        if into == "module":
            out = into_module(model, inputs, gm, out)
            keep_recipe(out, recipe)
    set_module_state(out, extra, entries)
    if fingerprint is not None:
        fingerprint.check(out, recipe, code)
    return out


def _inputs(model: nn.Module, recipe: Recipe, weights: Weights | None) -> Any:
    """Returns the example inputs that the recipe holds."""
    stored = {} if weights is None else weights.tensors
    size = sum(t.nbytes for t in (*named_tensors(model).values(), *stored.values()))
    inputs = None if recipe.example is None else recipe.example.within(size).values(model)
    if inputs is None:
        raise FileError(
            "The recipe holds no example inputs"
            + (": the model was never captured" if recipe.example is None else " that are plain data of its size")
            + '. Pass example_inputs, or into="module" for a model that never grew.'
        )
    return inputs


def _stored_tensors(model: nn.Module, recipe: Recipe) -> dict[str, Tensor]:
    """Returns parameters, persistent buffers, and others that grew."""
    grown = {name for step in recipe.steps for name in step.sizes}
    not_persistent = {
        f"{path}.{name}" if path else name
        for path, m in model.named_modules(remove_duplicate=False)
        for name in m._non_persistent_buffers_set
    }
    return {name: t for name, t in named_tensors(model).items() if name not in not_persistent or name in grown}


def _loaded(model: nn.Module, recipe: Recipe, weights: Weights) -> dict[str, Tensor]:
    """Returns the weights as parameters and buffers for a fresh model, under all of their names."""
    stored = {**weights.tensors, **{name: weights.tensors[first] for name, first in weights.aliases.items()}}
    fresh = _stored_tensors(model, recipe)
    _check_names(stored, fresh)
    _check_types(stored, fresh, sizes_after(fresh, recipe))
    _check_ties(weights, fresh)
    extra = {name for name, _ in with_extra_state(model)}
    if extra != weights.extra.keys():
        raise FileError(f"Modules with extra state differ: {_list(extra ^ weights.extra.keys())}.")
    entries = own_entries(model, fresh).keys()
    if entries != weights.entries.keys():
        raise FileError(f"What state_dict() has besides tensors differs: {_list(entries ^ weights.entries.keys())}.")
    loaded: dict[int, Tensor] = {}
    for name, old in fresh.items():
        if id(old) not in loaded:
            t = stored[name]
            copied = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=old.device).copy_(t)
            loaded[id(old)] = same_kind(copied, old)
    return {name: loaded[id(old)] for name, old in fresh.items()}


def _check_names(stored: Mapping[str, Tensor], fresh: Mapping[str, Tensor]) -> None:
    missing = {"the model": stored.keys() - fresh.keys(), "the file": fresh.keys() - stored.keys()}
    if parts := [f"{owner} has no {_list(names)}" for owner, names in missing.items() if names]:
        raise FileError(f"The file is of another model: {'; '.join(parts)}.")


def _check_types(stored: Mapping[str, Tensor], fresh: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> None:
    for name, t in stored.items():
        if t.shape != shapes[name]:
            raise FileError(
                f"{name!r} has the shape {list(t.shape)} in the file and {list(shapes[name])} in this model"
                + (f" (before growth {list(fresh[name].shape)}). " if fresh[name].shape != shapes[name] else ". ")
                + "Build the model with the sizes that it had when it was saved."
            )
        if t.dtype != fresh[name].dtype:
            raise FileError(
                f"{name!r} is {t.dtype} in the file and {fresh[name].dtype} in this model. Convert the fresh model "
                f"first (model.to({t.dtype})): weights are loaded as they are."
            )
        if fresh[name].device.type == "meta":
            raise FileError(f"{name!r} is on the meta device. Build the fresh model on a real one.")


def _check_ties(weights: Weights, fresh: Mapping[str, Tensor]) -> None:
    first_names: dict[int, str] = {}
    for name, t in fresh.items():
        first = first_names.setdefault(id(t), name)
        if first != name and weights.aliases.get(first, first) != weights.aliases.get(name, name):
            raise FileError(f"{first!r} and {name!r} are one tensor in this model and two in the file.")
    for name, first in weights.aliases.items():
        if fresh[name] is not fresh[first]:
            raise FileError(f"{first!r} and {name!r} are one tensor in the file and two in this model. Tie them first.")


def _list(names: Any) -> str:
    names = sorted(names)
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(repr(name) for name in names[:LISTED]) + more
