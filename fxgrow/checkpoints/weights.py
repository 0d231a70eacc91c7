"""What a model holds, by name, and a fresh model that holds it.

Tensors are parameters, persistent buffers, and whatever else a growth made larger. Tied ones are stored once; others
with the same memory are stored each. On the way back a tensor goes to where the fresh model has it (device,
requires_grad), with the dtype and strides that it had.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fxgrow.errors import FileError
from fxgrow.graph.graph import copy_module, named_tensors, same_kind, unwrap
from fxgrow.rewriting.into_module import check_into, into_module
from fxgrow.rewriting.replay import replayed, sizes_after
from fxgrow.storage.recipe import Recipe, grown_inside, keep_recipe
from fxgrow.tracing.capture import capture

#: so many names are listed in a message
LISTED = 4


@dataclass(frozen=True)
class Weights:
    """What a model holds.

    Attributes:
        tensors: by name, each once.
        aliases: other names of tied tensors, and the name it is stored under.
        extra: what modules give as `get_extra_state()`, by the module's name.
    """

    tensors: Mapping[str, Tensor]
    aliases: Mapping[str, str] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)


def weights_of(model: nn.Module, recipe: Recipe) -> Weights:
    """What a bare model holds.

    Raises:
        FileError: a part of it has grown on its own, or has no shape yet.
    """
    inside = next(grown_inside(model), None)
    if inside is not None:
        raise FileError(
            f"Submodule {inside!r} of this {type(model).__name__} has grown on its own: save that one "
            f"(model.{inside}), and load it into the fresh model's."
        )
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    names: dict[int, str] = {}
    for name, tensor in _kept(model, recipe).items():
        if is_lazy(tensor):
            raise FileError(f"{name!r} has no shape yet. Run the model once on a batch, then save it.")
        first = names.setdefault(id(tensor), name)
        if first == name:
            tensors[name] = tensor
        else:
            aliases[name] = first
    extra = {name: m.get_extra_state() for name, m in _with_extra(model)}
    return Weights(tensors, aliases, extra)


def resized(
    model: nn.Module,
    recipe: Recipe,
    weights: Weights | None = None,
    example_inputs: tuple[Any, ...] | dict[str, Any] | None = None,
    into: str | None = None,
) -> nn.Module:
    """A copy of a fresh model with the recipe's sizes, and the weights.

    Args:
        model: as it was before it grew; left as it is.
        recipe: the growths.
        weights: None for zeros where sizes changed, and the model's own values elsewhere.
        example_inputs: to capture it with; None for those of the recipe.
        into: `graph`, `module`, or None for what the recipe's model was.

    Raises:
        FileError: the model does not fit the recipe or the weights.
        CaptureError: the model cannot be traced.
        PlanError: the model's code does not allow `into="module"`.
    """
    into = into or recipe.into
    model = unwrap(model)
    check_into(into, model)
    if Recipe.of(model).steps:
        raise FileError("This model has grown already. A recipe starts from a model as it was before it grew.")
    if into == "module" and not recipe.steps:
        given = _placed(model, recipe, weights) if weights is not None else {}
        out = copy_module(model, {id(t): given[name] for name, t in named_tensors(model).items() if name in given})
        keep_recipe(out, recipe)
    else:
        # of another model nothing else is worth saying; what only the graph's root has will be seen there
        sizes_after(named_tensors(model), recipe, constants=False)
        inputs = example_inputs
        if inputs is None and recipe.example is not None:
            inputs = recipe.example.inputs(model)
        if inputs is None:
            raise FileError(
                "What this model was captured with is not in its recipe"
                + (": it never was" if recipe.example is None else ", since it is no plain data")
                + '. Pass example_inputs, or into="module" for one that never grew.'
            )
        gm = capture(model, inputs)
        given = _placed(gm, recipe, weights) if weights is not None else {}
        out = replayed(gm, recipe, given)
        if into == "module":
            out = into_module(model, inputs, gm, out)
            keep_recipe(out, recipe)
    for name, state in ({} if weights is None else weights.extra).items():
        out.get_submodule(name).set_extra_state(state)
    return out


def _kept(model: nn.Module, recipe: Recipe) -> dict[str, Tensor]:
    """Parameters, persistent buffers, and others that grew."""
    grown = {name for step in recipe.steps for name in step.sizes}
    passing = {
        f"{path}.{name}" if path else name
        for path, m in model.named_modules(remove_duplicate=False)
        for name in m._non_persistent_buffers_set
    }
    return {name: t for name, t in named_tensors(model).items() if name not in passing or name in grown}


def _with_extra(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    plain = nn.Module.get_extra_state
    return ((name, m) for name, m in model.named_modules() if type(m).get_extra_state is not plain)


def _placed(model: nn.Module, recipe: Recipe, weights: Weights) -> dict[str, Tensor]:
    """The weights as parameters and buffers for a fresh model, under all of their names.

    Raises:
        FileError: names, shapes, dtypes or ties are not those that the model has after the recipe.
    """
    own = _kept(model, recipe)
    shapes = sizes_after(own, recipe)
    found = {**weights.tensors, **{name: weights.tensors[first] for name, first in weights.aliases.items()}}
    _check_names(own, found)
    for name, t in found.items():
        if t.shape != shapes[name]:
            raise FileError(
                f"{name!r} has the shape {list(t.shape)} in the file and {list(shapes[name])} in this model"
                + (f" (before growth {list(own[name].shape)}). " if own[name].shape != shapes[name] else ". ")
                + "Build the model with the sizes that it had when it was saved."
            )
        if t.dtype != own[name].dtype:
            raise FileError(
                f"{name!r} is {t.dtype} in the file and {own[name].dtype} in this model. Convert the fresh model first "
                f"(model.to({t.dtype})): weights are loaded as they are."
            )
    _check_ties(own, weights)
    extra = {name for name, _ in _with_extra(model)}
    if extra != weights.extra.keys():
        raise FileError(f"Modules with extra state differ: {_list(extra ^ weights.extra.keys())}.")
    made: dict[int, Tensor] = {}
    out: dict[str, Tensor] = {}
    for name, old in own.items():
        if id(old) not in made:
            if old.device.type == "meta":
                raise FileError(f"{name!r} is on the meta device. Build the fresh model on a real one.")
            t = found[name]
            new = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=old.device).copy_(t)
            made[id(old)] = same_kind(new, old)
        out[name] = made[id(old)]
    return out


def _check_names(own: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    missing, surplus = own.keys() - found.keys(), found.keys() - own.keys()
    if missing or surplus:
        parts = [f"the file has {_list(surplus)} and this model has not"] if surplus else []
        parts += [f"this model has {_list(missing)} and the file has not"] if missing else []
        raise FileError(f"The file is of another model: {'; '.join(parts)}.")


def _check_ties(own: Mapping[str, Tensor], weights: Weights) -> None:
    firsts: dict[int, str] = {}
    for name, t in own.items():
        first = firsts.setdefault(id(t), name)
        mine, theirs = weights.aliases.get(first, first), weights.aliases.get(name, name)
        if first != name and mine != theirs:
            raise FileError(f"{first!r} and {name!r} are one tensor in this model and two in the file.")
    for name, first in weights.aliases.items():
        if own[name] is not own[first]:
            raise FileError(f"{first!r} and {name!r} are one tensor in the file and two in this model. Tie them first.")


def _list(names: Any) -> str:
    names = sorted(names)
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(repr(name) for name in names[:LISTED]) + more
