"""What a file knows of the function that was saved: options of modules, and a batch of outputs.

With the lines of the code in the recipe they tell whether a fresh model was built as the saved one was. Other versions
of PyTorch may trace the same code to other lines, and round otherwise.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fxgrow.data.random_state import random_state_kept
from fxgrow.errors import FileError
from fxgrow.graph.code_lines import ANY, code_difference
from fxgrow.graph.evaluate import TOLERANCE, difference, eval_outputs, own_modes
from fxgrow.graph.graph import named_tensors
from fxgrow.graph.module_options import CLASS, module_options
from fxgrow.storage import schema
from fxgrow.storage.example_inputs import weights_dtype
from fxgrow.storage.recipe import Recipe
from fxgrow.storage.schema import checked
from fxgrow.tracing.model_state import unchanged, without_caches

#: so many numbers are kept of an output, of so many outputs
_BUCKETS, _OUTPUTS = 64, 16
_ADVICE = (
    "Build the model with the options that it had when it was saved, or pass strict=False if it is to be another "
    "function."
)


@dataclass(frozen=True)
class Output:
    """A tensor among the outputs: all of a few entries, or a count sketch, in which every entry counts."""

    shape: tuple[int, ...] = checked(schema.array(schema.integer(), longest=64))
    numbers: tuple[float, ...] = checked(schema.array(schema.real(), longest=_BUCKETS))

    @classmethod
    def of(cls, t: Tensor) -> Output:
        """Returns the record of a tensor."""
        flat = torch.view_as_real(t).flatten() if t.is_complex() else t.flatten()
        flat = flat.detach().cpu().double().nan_to_num(nan=1.0, posinf=2.0, neginf=-3.0)
        numbers = flat
        if len(flat) > _BUCKETS:
            index = torch.arange(len(flat))
            signs = ((index * 2654435761 >> 16) & 1) * 2 - 1
            numbers = torch.zeros(_BUCKETS, dtype=torch.float64).index_add_(0, index % _BUCKETS, flat * signs)
        return cls(tuple(t.shape), tuple(numbers.nan_to_num().tolist()))


@dataclass(frozen=True)
class Fingerprint:
    """What a file knows of the function of the model in it."""

    #: version of PyTorch, type of the device
    torch_version: str = checked(schema.name)
    device: str = checked(schema.name)
    #: see `module_options`
    options: Mapping[str, Mapping[str, str]] = checked(schema.mapping(schema.mapping(schema.string(300))))
    #: in eval mode, of the recipe's example inputs; None where there are none, or the model does not run on them
    outputs: tuple[Output, ...] | None = checked(
        schema.optional(schema.array(schema.read_as(Output), longest=_OUTPUTS)), required=False, default=None
    )
    #: those that are no part of the state, where no outputs depend on them
    buffers: Mapping[str, Output] = checked(
        schema.mapping(schema.read_as(Output)), required=False, default_factory=dict
    )

    @classmethod
    def of(cls, model: nn.Module, recipe: Recipe) -> Fingerprint:
        """Returns the fingerprint of a model without wrappers."""
        try:
            found = _outputs(model, recipe)
        except Exception:  # it is saved all the same
            found = None
        outputs = None if found is None else tuple(Output.of(t) for t in found[:_OUTPUTS])
        buffers = {} if outputs is not None else dict(_unsaved_buffers(model))
        return cls(torch.__version__, _device(model), module_options(model, _written(recipe)), outputs, buffers)

    def check(self, model: nn.Module, recipe: Recipe, code: Sequence[str] | None) -> None:
        """Raises `FileError` where a loaded model differs; `code` has the lines of the fresh model, or None."""
        same_torch = self.torch_version == torch.__version__
        found = module_options(model, _written(recipe), not same_torch, unread_arguments=recipe.code is None)
        self._check_options(found, isinstance(model, torch.fx.GraphModule) != ("" not in self.options))
        same_dtype = recipe.example is not None and recipe.example.dtype == weights_dtype(model)
        if same_torch and same_dtype and code is not None and recipe.code is not None:
            if (lines := code_difference(recipe.code, code)) is not None:
                raise FileError(
                    f"The code of this model is not that of the saved one: first {lines[0]!r} in the file where this "
                    f"one has {lines[1]!r}. {_ADVICE}"
                )
        if self.outputs is not None:
            self._check_outputs(model, recipe)
        given = dict(_unsaved_buffers(model)) if self.buffers else {}
        for name in filter(given.__contains__, self.buffers):
            if self.buffers[name].shape == given[name].shape and self._far(self.buffers[name], given[name], model):
                raise FileError(f"Buffer {name!r}, which no file holds, is another one in this model. {_ADVICE}")

    def _check_options(self, found: Mapping[str, Mapping[str, str]], other_kind: bool) -> None:
        """Between a graph and a module less is comparable."""
        for path in dict.fromkeys((*self.options, *found)):
            saved, given = self.options.get(path), found.get(path)
            if saved is None or given is None:
                if other_kind:
                    continue
                has, lacks = ("this model", "the file") if saved is None else ("the file", "this model")
                kind = (saved or given or {}).get(CLASS, "module")
                raise FileError(f"{path!r} is a {kind} in {has}, and there is no such module in {lacks}. {_ADVICE}")
            for name in filter(given.__contains__, saved):
                if saved[name] != given[name] and ANY not in (saved[name], given[name]):
                    what = "The class" if name == CLASS else f"The option {name}"
                    raise FileError(
                        f"{what} of {path or 'the model'!r} is {saved[name]} in the file and {given[name]} in this "
                        f"model. {_ADVICE}"
                    )

    def _check_outputs(self, model: nn.Module, recipe: Recipe) -> None:
        try:
            outputs = _outputs(model, recipe)
        except Exception as error:
            raise FileError(
                f"This model fails on the file's example inputs, and the saved one did not: {type(error).__name__}: "
                f"{error}. {_ADVICE}"
            ) from error
        if outputs is None:
            return
        problem = self._output_difference(model, outputs)
        if problem is not None and not _is_random(model, recipe, outputs):
            raise FileError(f"This model computes something else than the saved one: {problem}. {_ADVICE}")

    def _output_difference(self, model: nn.Module, outputs: Sequence[Tensor]) -> str | None:
        for number, (saved, t) in enumerate(itertools.zip_longest(self.outputs or (), outputs[:_OUTPUTS])):
            found = None if t is None else Output.of(t)
            if saved is None or found is None or found.shape != saved.shape:
                shapes = ["missing" if o is None else f"{list(o.shape)}" for o in (saved, found)]
                return f"output {number} is {shapes[0]} in the file and {shapes[1]} in this model"
            if not self._exact(model) and not t.is_floating_point():
                continue  # may be indices of the largest
            if (far := self._far(saved, found, model, t.dtype)) is not None:
                return (
                    f"output {number} on the file's example inputs differs by {far[0]:.2g} (it is up to {far[1]:.2g})"
                )
        return None

    def _exact(self, model: nn.Module) -> bool:
        return self.torch_version == torch.__version__ and self.device == _device(model) == "cpu"

    def _far(
        self, saved: Output, found: Output, model: nn.Module, dtype: torch.dtype | None = None
    ) -> tuple[float, float] | None:
        """Returns difference and size of what differs by more than rounding."""
        dtypes = {dtype, *(t.dtype for t in named_tensors(model).values())}
        tolerance = max(TOLERANCE.get(of, 0.0) for of in dtypes if of is not None) or TOLERANCE[torch.float32]
        tolerance = tolerance if self._exact(model) else min(50 * tolerance, 0.25)
        if len(saved.numbers) != len(found.numbers):
            return math.inf, math.inf
        a, b = (torch.tensor(o.numbers, dtype=torch.float64) for o in (saved, found))
        error, scale = ((float(t.abs().max()) if len(t) else 0.0) for t in (a - b, a))
        return (error, scale) if error > tolerance * max(scale, 1e-3) else None


def _written(recipe: Recipe) -> set[str]:
    return {attribute.name for step in recipe.steps for attribute in step.attributes}


def _unsaved_buffers(model: nn.Module) -> Iterator[tuple[str, Output]]:
    """Yields the buffers that are no part of the state; an integer may be a counter."""
    for path, module in model.named_modules():
        for name in sorted(module._non_persistent_buffers_set):
            t = module._buffers.get(name)
            if t is not None and (t.is_floating_point() or t.numel() > 1):
                yield f"{path}.{name}".removeprefix("."), Output.of(t)


def _outputs(model: nn.Module, recipe: Recipe, seed: int = 0) -> list[Tensor] | None:
    """Returns outputs of the recipe's example inputs; model and random states are as before.

    With several processes None: code of the model may wait for the others.
    """
    size = sum(t.nbytes for t in named_tensors(model).values())
    inputs = None if recipe.example is None else recipe.example.within(size).values(model)
    if inputs is None or (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return None
    with own_modes(), random_state_kept(), unchanged(model), without_caches(model):
        return eval_outputs(model, inputs, seed)


def _is_random(model: nn.Module, recipe: Recipe, outputs: Sequence[Tensor]) -> bool:
    again = _outputs(model, recipe, seed=1) or []
    return any(a.shape != b.shape or not difference(a, b).is_rounding for a, b in zip(outputs, again, strict=False))


def _device(model: nn.Module) -> str:
    return next((t.device.type for t in named_tensors(model).values()), "cpu")
