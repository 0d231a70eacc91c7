"""Batches: the same ones at every pass, split into fitting and held-out ones."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxgrow.data.random_state import random_state, set_random_state
from fxgrow.distributed import SINGLE_PROCESS, ProcessGroup
from fxgrow.errors import ProfileError
from fxgrow.graph.evaluate import eval_mode, lent_buffers

log = logging.getLogger("fxgrow")
#: `samples=None` reads at most this many
DEFAULT_SAMPLES = 8192
#: one batch in so many is held out
HOLD_OUT_EVERY = 4


@dataclass(frozen=True)
class Batch:
    """Inputs as the model takes them (a tuple or a dict), the targets (None: the model has its own loss)."""

    inputs: tuple[Any, ...] | dict[str, Any]
    targets: Any
    size: int
    index: int

    def arguments(self, gm: fx.GraphModule) -> list[Any]:
        """Copies of the inputs, into which the model may write, in the order of the graph's placeholders."""
        names = [str(n.target) for n in gm.graph.nodes if n.op == "placeholder"]
        given = pytree.tree_map_only(Tensor, torch.clone, self.inputs)
        if isinstance(given, dict):
            missing = [n for n in names if n not in given]
            if missing:
                raise ProfileError(
                    f"Batch {self.index} has the inputs {sorted(given)}, but the graph was captured with {names}; "
                    f"missing: {missing}."
                )
            return [given[n] for n in names]
        if len(given) != len(names):
            raise ProfileError(
                f"Batch {self.index} has {len(given)} inputs, but the graph was captured with {len(names)} ({names}). "
                "A batch is (inputs, targets), where several inputs are a tuple or a dict."
            )
        return list(given)


@dataclass(frozen=True)
class BatchReader:
    """Reads the items of a loader.

    Attributes:
        batch: the user's function from an item to what `parse` takes, or None.
        dtype: of the model; NumPy's float64 becomes it.
    """

    batch: Callable[[Any], Any] | None = None
    dtype: torch.dtype | None = None

    @classmethod
    def of(cls, model: nn.Module, batch: Callable[[Any], Any] | None = None) -> BatchReader:
        """The reader for a model."""
        return cls(batch, dtype_of(model))

    def __call__(self, item: Any, index: int) -> Batch:
        if isinstance(item, Batch):
            return item
        if self.batch is not None:
            try:
                item = self.batch(item)
            except Exception as error:
                raise ProfileError(
                    f"batch= failed on item {index} of the dataloader, {_layout(item)}: {type(error).__name__}: {error}"
                ) from error
        return parse(item, index, self.dtype)


def dtype_of(model: nn.Module) -> torch.dtype | None:
    """The dtype of a model's floating parameters, as far as it has any."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), None)


def as_tensors(value: Any, dtype: torch.dtype | None) -> Any:
    """Makes tensors of NumPy's arrays and numbers in nested containers; those of float64 get the dtype."""
    numpy: Any = sys.modules.get("numpy")
    if numpy is None:
        return value

    def tensor(array: Any) -> Tensor:
        try:
            made = torch.from_numpy(numpy.array(array, dtype=array.dtype.newbyteorder("=")))
        except TypeError as error:
            raise ProfileError(f"A NumPy array of dtype {array.dtype} cannot be a tensor: give numbers.") from error
        return made.to(dtype) if dtype is not None and made.dtype == torch.float64 else made

    return pytree.tree_map_only((numpy.ndarray, numpy.generic), tensor, value)


def _layout(item: Any) -> str:
    many = f" of {len(item)} items" if isinstance(item, (tuple, list)) else ""
    return f"{'an' if type(item).__name__[:1] in 'aeiou' else 'a'} {type(item).__name__}{many}"


def parse(raw: Any, index: int, dtype: torch.dtype | None = None) -> Batch:
    """Reads a batch: `(inputs, targets)`, or a dict for a model with its own `.loss`; NumPy's float64 as `dtype`."""
    if isinstance(raw, Mapping):
        inputs, targets = raw, None
    elif isinstance(raw, (tuple, list)) and len(raw) == 2:
        inputs, targets = raw
    else:
        example = "lambda x: (x, x) for an autoencoder"
        if isinstance(raw, Tensor):
            example += "; if it is all samples, give DataLoader(TensorDataset(inputs, targets), batch_size)"
        elif isinstance(raw, (tuple, list)) and len(raw) > 2:
            example = "lambda item: item[:2]"
        raise ProfileError(
            f"Batch {index} is {_layout(raw)}. A batch is (inputs, targets), where inputs may be a tuple or a dict, "
            "or a dict for models that return an object with a loss. Give batch=, a function from an item of the "
            f"dataloader to that, such as {example}."
        )
    if isinstance(inputs, Mapping):
        inputs = dict(inputs)
    else:
        inputs = tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
    inputs, targets = as_tensors((inputs, targets), dtype)
    if any(isinstance(t, Tensor) and t.is_inference() for t in pytree.tree_leaves((inputs, targets))):
        inputs, targets = pytree.tree_map_only(Tensor, torch.clone, (inputs, targets))  # no pass could go back
    given = first_tensor(inputs)
    if given is None or given.dim() == 0:
        what = _layout(next(iter(inputs.values() if isinstance(inputs, dict) else inputs), None))
        raise ProfileError(
            f"Batch {index} has no input tensor with a batch dimension; its first input is {what}. Give tensors or "
            "NumPy arrays, or batch=, a function from an item of the dataloader to (inputs, targets)."
        )
    if given.dim() == 1 and isinstance(targets, Tensor) and not targets.dim():
        raise ProfileError(
            f"Batch {index} seems to be one sample, an input of shape {tuple(given.shape)} with one target: put the "
            "samples into a torch.utils.data.DataLoader."
        )
    if not len(given):
        raise ProfileError(
            f"Batch {index} has no samples (an input of shape {tuple(given.shape)}): leave empty batches out of the "
            "dataloader."
        )
    return Batch(inputs, targets, given.shape[0], index)


def first_tensor(inputs: Any) -> Tensor | None:
    """The first tensor of a batch, in nested inputs too."""
    return next((t for t in pytree.tree_leaves(inputs) if isinstance(t, Tensor)), None)


def check_iterable(loader: Any) -> None:
    """Refuses what cannot be a loader."""
    if isinstance(loader, type) or not hasattr(loader, "__iter__"):
        what = f"the class {loader.__name__}" if isinstance(loader, type) else f"a {type(loader).__name__}"
        data_set = "" if not hasattr(loader, "__getitem__") else ": put the data set into a torch.utils.data.DataLoader"
        raise ProfileError(f"The dataloader is {what}, which cannot be iterated over{data_set}.")


class Data:
    """Yields the same batches of a loader at every pass, and leaves all random generators as they were.

    An iterator is read once and kept. `samples` bounds those of all processes of the group together.
    """

    def __init__(
        self,
        loader: Iterable[Any],
        samples: int | None = None,
        process_group: ProcessGroup = SINGLE_PROCESS,
        reader: BatchReader = BatchReader(),  # noqa: B008
    ) -> None:
        check_iterable(loader)
        self.reader = reader
        self.process_group = process_group
        self.limit = -(-(samples or DEFAULT_SAMPLES) // process_group.size)
        self.loader: Iterable[Any] = loader
        self._state = random_state(loader)
        if hasattr(loader, "__next__"):  # an iterator can be read only once
            try:
                self.loader = list(self._parsed())
            finally:
                set_random_state(self._state, loader)
        #: numbers of batches that are left out
        self.refused: frozenset[int] = frozenset()
        #: whether the model takes fewer samples at once than a batch has, once `leave_out_refused` has tried
        self.any_size: bool | None = None
        self.batches: int | None = None
        with contextlib.suppress(Exception):  # a length that the loader's code gets wrong is none
            self.batches = len(self.loader)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Batch]:
        """Every batch, unchanged and on its device, but for those that are left out."""
        count = 0
        for batch in self._batches():
            if batch.index not in self.refused:
                yield replace(batch, index=count) if self.refused else batch
                count += 1
        if not count:
            raise ProfileError("The dataloader is empty: give at least one batch of (inputs, targets).")
        self.batches = count

    @torch.no_grad()
    def leave_out_refused(self, gm: fx.GraphModule, first: Batch | None = None) -> Data:
        """Leaves out batches of another size than the first one's where the graph takes that size only."""
        if self.any_size is not None:
            return self
        first = first or self.first()
        self.any_size = first.size == 1 or _runs(gm, first, 1)
        if not self.any_size:
            others = [b.index for b in self if b.size != first.size and not _runs(gm, b)]
            if others:
                log.warning("the model takes %d samples at once only: batches of other sizes left out: %d of %s",
                            first.size, len(others), self.batches)  # fmt: skip
                self.refused = frozenset(others)
                self.batches = None if self.batches is None else self.batches - len(others)
        return self

    def _batches(self) -> Iterator[Batch]:
        """Drawn from the same random state at every pass."""
        iterator = self._parsed()
        if isinstance(self.loader, (list, tuple)):
            # draws no random numbers, and copying the states takes as long as a small network's forward pass
            yield from iterator
            return
        inside = self._state
        while True:
            # states are swapped at every step, so that they are right when a pass ends early
            outside = random_state(self.loader)
            set_random_state(inside, self.loader)
            try:
                batch = next(iterator, None)
            finally:
                inside = random_state(self.loader)
                set_random_state(outside, self.loader)
            if batch is None:
                return
            yield batch

    def _parsed(self) -> Iterator[Batch]:
        """Batches until they hold the limit of samples; the loader's iterator is made at the first step."""
        yield from take((self.reader(item, index) for index, item in enumerate(self.loader)), self.limit)

    def expected(self, size: int) -> int:
        """How many batches of `size` samples a pass will read, as far as known."""
        most = -(-self.limit // size)
        return min(self.batches, most) if self.batches is not None else min(8, most)

    def first(self) -> Batch:
        """The first batch."""
        return next(iter(self))

    def fitting(self, hold: bool = True) -> Iterator[Batch]:
        """The batches to fit on: all but the held-out ones, or all unless `hold`."""
        return (b for b in self if not (hold and self.is_held_out(b)))

    def held_out(self) -> Iterator[Batch]:
        """The held-out batches; a single batch serves for both."""
        return (b for b in self if self.is_held_out(b) or self.batches == 1)

    def is_held_out(self, batch: Batch) -> bool:
        """Whether a batch is held out: every fourth, or the last of a few."""
        if self.batches is not None and self.batches < HOLD_OUT_EVERY:
            return self.batches > 1 and batch.index == self.batches - 1
        return batch.index % HOLD_OUT_EVERY == HOLD_OUT_EVERY - 1


def take(batches: Iterable[Batch], samples: int) -> Iterator[Batch]:
    """As many batches as hold `samples`, or all."""
    seen = 0
    for batch in batches:
        yield batch
        seen += batch.size
        if seen >= samples:
            return


@dataclass(frozen=True)
class Fitting:
    """The fitting batches of some data as a loader, without the held-out ones."""

    data: Data

    def __iter__(self) -> Iterator[Batch]:
        return self.data.fitting()


def _runs(gm: fx.GraphModule, batch: Batch, start: int = 0) -> bool:
    """Whether the graph takes a batch, from a sample on, in eval mode."""

    def cut(t: Tensor) -> Tensor:
        return t[start:] if start and t.dim() and len(t) == batch.size else t

    with eval_mode(gm), lent_buffers(gm):
        try:
            inputs = pytree.tree_map_only(Tensor, cut, batch.inputs)
            gm.forward(*replace(batch, inputs=inputs).arguments(gm))  # the call would print the line that fails
        except Exception:
            return False
    return True


def check_device(batch: Batch, gm: nn.Module) -> None:
    """Raises a `ProfileError` when the batch is on another device than the model's parameters, or these are on meta."""
    parameter = next(gm.parameters(), None)
    given = first_tensor(batch.inputs)
    if parameter is not None and parameter.is_inference():
        raise ProfileError(
            "The model's parameters were made in torch.inference_mode() and cannot be trained: build the model outside."
        )
    if parameter is not None and given is not None and parameter.device != given.device:
        raise ProfileError(
            f"Batch {batch.index} is on {given.device}, the model on {parameter.device}. Move one of them: "
            f"wrap the loader so that it yields batches on {parameter.device}, or call model.to({str(given.device)!r})."
        )
    if parameter is not None and parameter.is_meta:
        raise ProfileError(
            "The model is on the meta device: it has no values that data could say anything of. Load its weights first "
            "(model.to_empty, load_state_dict), or add units without data by fxgrow.widen."
        )
