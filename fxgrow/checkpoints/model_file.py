"""Saves a model with its recipe in one file without pickle, and loads it into a fresh model of the user."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from torch import Tensor, nn

from fxgrow.checkpoints.fingerprint import Fingerprint
from fxgrow.checkpoints.module_state import with_quantized, without_quantized
from fxgrow.checkpoints.weights import Weights, rebuild, weights_of
from fxgrow.data.argument_checks import NEW_FILE, checked_arguments
from fxgrow.errors import FileError
from fxgrow.graph.code_lines import code_lines
from fxgrow.graph.graph import unwrap
from fxgrow.graph.node_meta import is_captured
from fxgrow.storage import schema
from fxgrow.storage.plain_tree import decoded, encoded
from fxgrow.storage.recipe import Recipe, read_recipe
from fxgrow.storage.safetensors_file import read, read_body, require_kind, write
from fxgrow.storage.schema import checked

#: prefix of the names of a model's tensors in a checkpoint
PREFIX = "model/"


@checked_arguments(FileError, path=NEW_FILE)
def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Writes a model's weights, buffers and recipe in one `.safetensors` file, atomically and without pickle.

    Tensors have the names of `model.state_dict()`, so that any reader of safetensors can read them; tied ones appear
    once. The recipe is in the metadata, with a checksum over the whole file.

    Args:
        model: grown or not, a graph or a module; wrappers of torch.compile and DistributedDataParallel are removed.
        path: of the file; an existing one is replaced.

    Raises:
        FileError: something in the model cannot be stored, or the file cannot be written; an existing file is as
            before.
        MissingExtraError: safetensors is not installed.

    Example:
        >>> import os, tempfile, torch, fxgrow
        >>> build = lambda: torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
        >>> x = torch.randn(5, 4)
        >>> grown = fxgrow.widen(build(), (x,), {"0": 8})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = os.path.join(folder, "net.safetensors")
        ...     fxgrow.save(grown, path)
        ...     net = fxgrow.load(build(), path)
        >>> torch.equal(net(x), grown(x))
        True
    """
    tensors: dict[str, Tensor] = {}
    body = model_body(model, tensors, "")
    write(path, tensors, {"kind": "model", **body})


@checked_arguments(FileError)
def load(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    example_inputs: tuple[Any, ...] | dict[str, Any] | None = None,
    into: Literal["graph", "module"] | None = None,
    strict: bool = True,
) -> Any:
    """Replays a file's recipe on a fresh model and loads the weights.

    Weights go to the device of the fresh model; dtypes must be those of the file. Which parameters are frozen and
    whether it trains or evaluates is as in the fresh model.

    Args:
        model: built as the saved one was before it grew; it is left as it is.
        path: what `save` or `save_checkpoint` wrote.
        example_inputs: to capture the model with; None for those in the file.
        into: `graph` for a GraphModule, `module` for a copy of the model itself, None for the kind that was saved.
        strict: False loads the weights into a model of another function too: other options, code or outputs.

    Returns:
        The model as it was saved: equal outputs, bit for bit, on the same machine.

    Raises:
        FileError: the file is missing, truncated, damaged, foreign or newer, or the model does not fit it: the first
            thing that differs is named.
        CaptureError: the model cannot be traced.
        PlanError: the model's code does not allow `into="module"`.
        MissingExtraError: safetensors is not installed.
    """
    file, weights = model_in(*read(path), path)
    return rebuild(model, file.recipe, weights, example_inputs, into, file.fingerprint if strict else None)


@checked_arguments(FileError)
def resize(
    model: nn.Module,
    recipe: Recipe | str | os.PathLike[str],
    *,
    example_inputs: tuple[Any, ...] | dict[str, Any] | None = None,
    into: Literal["graph", "module"] | None = None,
    strict: bool = True,
) -> Any:
    """Replays a recipe without weights, so that `load_state_dict` of the grown model's weights works.

    Tensors that change their size are zero until then; others keep the model's values.

    Args:
        model: built as the grown one was before it grew; it is left as it is.
        recipe: a `Recipe`, its JSON text, or the path of a file that `save` or `save_checkpoint` wrote.
        example_inputs: see `load`.
        into: see `load`.
        strict: see `load`; options are in files, and not in a recipe.

    Returns:
        A copy with the recipe's sizes.

    Raises:
        FileError: the recipe cannot be read, or the model does not fit it.
        CaptureError: the model cannot be traced.
        PlanError: the model's code does not allow `into="module"`.

    Example:
        >>> import torch, fxgrow
        >>> build = lambda: torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
        >>> grown = fxgrow.widen(build(), (torch.zeros(1, 4),), {"0": 8})
        >>> net = fxgrow.resize(build(), fxgrow.Recipe.of(grown))
        >>> net.load_state_dict(grown.state_dict())
        <All keys matched successfully>
    """
    fingerprint = None
    if isinstance(recipe, str) and recipe.lstrip().startswith("{"):
        recipe = Recipe.from_json(recipe)
    elif isinstance(recipe, (str, os.PathLike)):
        file, _ = model_in(*read(recipe), recipe)
        recipe = file.recipe
        if strict and file.fingerprint is not None:
            fingerprint = replace(file.fingerprint, outputs=None)
    elif not isinstance(recipe, Recipe):
        raise FileError(f"A {type(recipe).__name__} is no recipe: pass a Recipe, its JSON text, or the path of a file.")
    return rebuild(model, recipe, None, example_inputs, into, fingerprint)


def model_body(model: nn.Module, tensors: dict[str, Tensor], prefix: str) -> dict[str, Any]:
    """Returns the plain part of a model and enters its tensors into `tensors`."""
    model = unwrap(model)
    recipe = Recipe.of(model)
    weights = weights_of(model, recipe)
    if recipe.example is not None:
        size = sum(t.nbytes for t in weights.tensors.values())
        recipe = replace(recipe, example=recipe.example.within(size))
    if is_captured(model) and not recipe.steps:
        recipe = replace(recipe, code=code_lines(model))
    tensors.update({prefix + name: t for name, t in weights.tensors.items()})
    extra = {name: encoded(state, tensors, f"{name}._extra_state") for name, state in weights.extra.items()}
    own = {name: encoded(without_quantized(entry), tensors, prefix + name) for name, entry in weights.entries.items()}
    stored = {"names": list(weights.tensors), "aliases": dict(weights.aliases), "extra": extra, "own": own}
    written = json.loads(recipe.to_json())
    Recipe.from_json(json.dumps(written))  # names that no file may have are refused here
    return {"recipe": written, **stored, "fingerprint": asdict(Fingerprint.of(model, recipe))}


@dataclass(frozen=True)
class ModelFile:
    """What a file says about a model."""

    recipe: Recipe = checked(read_recipe)
    names: tuple[str, ...] = checked(schema.array(schema.name))
    aliases: Mapping[str, str] = checked(schema.mapping(schema.name))
    extra: Mapping[str, Any] = checked(schema.mapping(schema.anything))
    #: what files of earlier versions do not have
    own: Mapping[str, Any] = checked(schema.mapping(schema.anything), required=False, default_factory=dict)
    fingerprint: Fingerprint | None = checked(schema.read_as(Fingerprint), required=False, default=None)


@dataclass(frozen=True)
class Entry:
    """A state in a checkpoint; of an optimiser with name and shape of its parameters, per group."""

    tree: Any = checked(schema.anything)
    parameters: tuple[tuple[Any, ...], ...] | None = checked(
        schema.array(schema.array(schema.array(schema.optional(schema.name), schema.array(schema.integer())))),
        required=False,
        default=None,
    )


@dataclass(frozen=True, kw_only=True)
class CheckpointFile(ModelFile):
    """What the file of a checkpoint says."""

    entries: Mapping[str, Entry] = checked(schema.mapping(schema.read_as(Entry)))
    random: Any = checked(schema.anything)


def model_in(
    body: Mapping[str, Any], tensors: Mapping[str, Tensor], path: str | os.PathLike[str]
) -> tuple[ModelFile, Weights]:
    """Returns what a file says and its weights, from the body and the tensors."""
    prefix, record = (PREFIX, CheckpointFile) if body.get("kind") == "checkpoint" else ("", ModelFile)
    if record is ModelFile:
        require_kind(body, "model", path, "")
    file: ModelFile = read_body(record, body, path)
    missing = [name for name in file.names if prefix + name not in tensors]
    if missing := [*missing, *(set(file.aliases.values()) - set(file.names))]:
        raise FileError(f"{path} has no tensor {schema.quoted(missing[0])}, which its list of names has.")
    extra = {name: decoded(state, tensors) for name, state in file.extra.items()}
    own = {name: with_quantized(decoded(entry, tensors)) for name, entry in file.own.items()}
    return file, Weights({name: tensors[prefix + name] for name in file.names}, file.aliases, extra, own)
