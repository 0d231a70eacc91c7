"""Full training state in one file without pickle: model, recipe, optimisers, other states, random generators.

An optimiser can only be made for parameters that exist, so a checkpoint first returns the model, then restores the
objects that were made for it.
"""

from __future__ import annotations

import contextlib
import copy
import os
import weakref
from collections.abc import Mapping
from typing import Any, Literal, cast

from torch import Tensor, nn
from torch.optim import Optimizer

from fxgrow.checkpoints.model_file import PREFIX, CheckpointFile, model_body, model_in
from fxgrow.checkpoints.weights import rebuild
from fxgrow.data.argument_checks import NEW_FILE, checked_arguments
from fxgrow.data.random_state import check_random_state, random_state, set_random_state, set_state_of, state_of
from fxgrow.errors import FileError, FxgrowError
from fxgrow.graph.graph import unwrap
from fxgrow.storage.plain_tree import decoded, encoded
from fxgrow.storage.safetensors_file import read, require_kind, write


@checked_arguments(FileError, path=NEW_FILE)
def save_checkpoint(path: str | os.PathLike[str], model: nn.Module, **state: Any) -> None:
    """Writes a model, its recipe and everything that training needs in one `.safetensors` file, atomically.

    The states of Python's, NumPy's and PyTorch's global random generators are always part of it.

    Args:
        path: of the file; an existing one is replaced only when the new one is complete.
        model: see `fxgrow.save`.
        state: by name, what else to save: anything with `state_dict()` (optimisers, schedulers, a GradScaler, an
            averaged model, a sampler), random generators (`torch.Generator`, `random.Random`, NumPy's), or plain
            values: numbers, strings, tensors, and lists, tuples and dicts of them.

    Raises:
        FileError: something is not a plain value (its path is named), or the file cannot be written.
        MissingExtraError: safetensors is not installed.

    Example:
        >>> import os, tempfile, torch, fxgrow
        >>> build = lambda: torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
        >>> model = fxgrow.widen(build(), (torch.zeros(1, 4),), {"0": 8})
        >>> optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        >>> model(torch.ones(2, 4)).sum().backward()
        >>> optimizer.step()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = os.path.join(folder, "run.safetensors")
        ...     fxgrow.save_checkpoint(path, model, optimizer=optimizer, epoch=3)
        ...     ckpt = fxgrow.load_checkpoint(path)
        >>> again = ckpt.model(build())
        >>> optimizer_again = torch.optim.Adam(again.parameters())
        >>> ckpt.restore(optimizer=optimizer_again)
        >>> ckpt["epoch"], optimizer_again.param_groups[0]["lr"]
        (3, 0.1)
    """
    tensors: dict[str, Tensor] = {}
    body = model_body(model, tensors, PREFIX)
    entries = {}
    for name, thing in state.items():
        entries[name] = {"tree": encoded(state_of(thing), tensors, name)}
        if hasattr(thing, "param_groups"):
            entries[name]["parameters"] = _owned_parameters(thing, model)
    body["random"] = encoded(random_state(), tensors, "random")
    write(path, tensors, {"kind": "checkpoint", **body, "entries": entries})


@checked_arguments(FileError)
def load_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Reads and checks what `save_checkpoint` wrote; nothing is changed yet.

    Args:
        path: of the file.

    Returns:
        A `Checkpoint`: `model(fresh_model)` first, then `restore(optimizer=...)`.

    Raises:
        FileError: the file is missing, truncated, damaged, foreign or newer, or holds only a model.
        MissingExtraError: safetensors is not installed.
    """
    body, tensors = read(path)
    return Checkpoint(str(path), body, tensors)


class Checkpoint(Mapping[str, Any]):
    """What `save_checkpoint` wrote, by name: plain values and the states of objects.

    Attributes:
        path: of the file.
        recipe: the growths that the model has been through.
    """

    def __init__(self, path: str, body: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        self.path = path
        require_kind(body, "checkpoint", path, "Load it with fxgrow.load.")
        file, self._weights = model_in(body, tensors, path)
        file = cast(CheckpointFile, file)
        self.recipe, self._fingerprint = file.recipe, file.fingerprint
        self._entries, self._random, self._tensors = file.entries, file.random, tensors
        self._model: weakref.ref[nn.Module] | None = None

    def __getitem__(self, name: str) -> Any:
        """A copy of the state that was saved under a name."""
        return copy.deepcopy(decoded(self._entries[name].tree, self._tensors))

    def __iter__(self) -> Any:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    @checked_arguments(FileError)
    def model(
        self,
        model: nn.Module,
        *,
        example_inputs: tuple[Any, ...] | dict[str, Any] | None = None,
        into: Literal["graph", "module"] | None = None,
        strict: bool = True,
    ) -> Any:
        """The saved model from a fresh one; see `fxgrow.load`."""
        fingerprint = self._fingerprint if strict else None
        out = rebuild(model, self.recipe, self._weights, example_inputs, into, fingerprint)
        self._model = weakref.ref(out)
        return out

    def restore(self, *, random: bool = True, **things: Any) -> None:
        """Restores the states of objects, and last the global random generators.

        Args:
            random: False leaves the global random generators as they are.
            things: objects by the names they were saved under.

        Raises:
            FileError: a name is not in the checkpoint, an optimiser owns other parameters, or an object refuses its
                state. Objects and generators are then as before.
        """
        unknown = things.keys() - self._entries.keys()
        if unknown:
            raise FileError(
                f"{self.path} has no {sorted(unknown)[0]!r}; it has: {', '.join(self._entries) or 'only the model'}."
            )
        model = None if self._model is None else self._model()
        for name, thing in things.items():
            saved = self._entries[name].parameters
            if hasattr(thing, "param_groups") and saved is not None:
                _check_owned(name, saved, _owned_parameters(thing, model))
        before = {name: copy.deepcopy(state_of(thing)) for name, thing in things.items()}
        own = random_state()
        done: list[str] = []
        try:
            for name, thing in things.items():
                done.append(name)
                set_state_of(thing, self[name], name)
                if isinstance(thing, Optimizer):
                    _restore_dtypes(thing, self[name])
            if random:
                done.append("a random generator")
                generators = copy.deepcopy(decoded(self._random, self._tensors))
                check_random_state(generators)
                set_random_state(generators)
        except Exception as error:
            for name in reversed(done):
                with contextlib.suppress(Exception):  # the last may have taken a part
                    set_state_of(things[name], before[name], name)
            set_random_state(own)
            if isinstance(error, FxgrowError):
                raise
            raise FileError(f"{done[-1]} does not take its state: {type(error).__name__}: {error}") from error


def _owned_parameters(optimizer: Any, model: nn.Module | None) -> tuple[tuple[Any, ...], ...]:
    """Returns name and shape of each parameter, per group."""
    names = {} if model is None else {id(p): name for name, p in unwrap(model).named_parameters()}
    groups = (group["params"] for group in optimizer.param_groups)
    return tuple(tuple((names.get(id(p)), tuple(p.shape)) for p in group) for group in groups)


def _restore_dtypes(optimizer: Optimizer, saved: Mapping[str, Any]) -> None:
    """Restores the dtypes of an optimiser's state: `load_state_dict` casts all of it to the parameter's dtype."""
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    owned = dict(zip(numbers, (p for group in optimizer.param_groups for p in group["params"]), strict=True))
    for number, entries in saved["state"].items():
        state = optimizer.state[owned[number]] if number in owned else {}
        for key, value in entries.items():
            cast = state.get(key)
            if isinstance(value, Tensor) and isinstance(cast, Tensor) and cast.dtype != value.dtype:
                state[key] = value.to(cast.device)


def _check_owned(name: str, saved: tuple[tuple[Any, ...], ...], given: tuple[tuple[Any, ...], ...]) -> None:
    """Refuses an optimiser whose state would go to other parameters."""
    if [len(group) for group in saved] != [len(group) for group in given]:
        raise FileError(
            f"{name} was saved with {[len(g) for g in saved]} parameters per group, and this one has "
            f"{[len(g) for g in given]}. Build it as before, for the parameters of the checkpoint's model."
        )
    for old, new in zip(sum(saved, ()), sum(given, ()), strict=True):
        renamed = None not in (old[0], new[0]) and old[0] != new[0]
        if renamed or old[1] != new[1]:
            raise FileError(
                f"{name} was saved with {old[0] or 'a parameter'} {list(old[1])} where this one has {new[0] or 'one'} "
                f"{list(new[1])}. Build it as before, for the parameters of the checkpoint's model."
            )
