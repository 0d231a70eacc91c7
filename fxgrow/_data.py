"""Batches: the same ones at every pass, split into a fitting and a held-back part, and the loss on them."""

from __future__ import annotations

import contextlib
import itertools
import math
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from fxgrow._errors import ProfileError
from fxgrow._world import ALONE, World

LossFn = Callable[[Any, Any], Tensor]

#: `samples=None` reads at most this many
DEFAULT_SAMPLES = 8192
#: one batch in so many is held back from fitting
HOLD = 4


@dataclass(frozen=True)
class Batch:
    """Inputs as the model takes them (a tuple or a dict), the targets (None: the model has its own loss)."""

    inputs: tuple[Any, ...] | dict[str, Any]
    targets: Any
    size: int
    index: int

    def arguments(self, gm: fx.GraphModule) -> list[Any]:
        """The inputs in the order of the graph's placeholders.

        Raises:
            ProfileError: the batch has other inputs than the graph was captured with.
        """
        names = [str(n.target) for n in gm.graph.nodes if n.op == "placeholder"]
        given = self.inputs
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


def parse(raw: Any, index: int) -> Batch:
    """Reads one item of a loader: `(inputs, targets)`, or a dict for a model that returns its own `.loss`.

    What has been read already stays as it is.

    Raises:
        ProfileError: the item has another layout, or holds no tensor.
    """
    if isinstance(raw, Batch):
        return raw
    if isinstance(raw, Mapping):
        inputs: Any = dict(raw)
        targets = None
    elif isinstance(raw, (tuple, list)) and len(raw) == 2:
        inputs, targets = raw
        if isinstance(inputs, Mapping):
            inputs = dict(inputs)
        elif isinstance(inputs, (tuple, list)):
            inputs = tuple(inputs)
        else:
            inputs = (inputs,)
    else:
        what = f"a {type(raw).__name__}" + (f" of {len(raw)} items" if isinstance(raw, (tuple, list)) else "")
        raise ProfileError(
            f"Batch {index} is {what}. A batch is (inputs, targets), where inputs may be a tuple or a dict, "
            "or a dict for models that return an object with a loss."
        )
    given = first_tensor(inputs)
    if given is None or given.dim() == 0:
        raise ProfileError(f"Batch {index} has no input tensor with a batch dimension.")
    return Batch(inputs, targets, given.shape[0], index)


def first_tensor(inputs: tuple[Any, ...] | dict[str, Any]) -> Tensor | None:
    """The first tensor of a batch, however deep it lies."""
    for value in inputs.values() if isinstance(inputs, dict) else inputs:
        if isinstance(value, Tensor):
            return value
        inner = next((t for t in pytree.tree_leaves(value) if isinstance(t, Tensor)), None)
        if inner is not None:
            return inner
    return None


class Data:
    """A loader that gives the same batches at every pass and leaves all random generators as they were.

    Args:
        loader: any iterable of batches; an iterator is read once and kept.
        samples: how many samples to use at most, of all processes together; None for `DEFAULT_SAMPLES`.
        world: the processes that read the rest of the data, each as many.

    Raises:
        ProfileError: `samples` is not positive.
    """

    def __init__(self, loader: Iterable[Any], samples: int | None = None, world: World = ALONE) -> None:
        if samples is not None and samples < 1:
            raise ProfileError(f"samples={samples}: at least one sample is needed to profile.")
        if not hasattr(loader, "__iter__"):
            raise ProfileError(f"The dataloader is a {type(loader).__name__}, which cannot be iterated over.")
        self.world = world
        self.limit = -(-(samples or DEFAULT_SAMPLES) // world.size)
        self.loader: Iterable[Any] = loader
        self._state = _random_state(loader)
        if _once(loader):
            try:
                self.loader = list(_until(loader, self.limit))
            finally:
                _set_random_state(self._state, loader)
        self.batches: int | None = None
        with contextlib.suppress(TypeError):
            self.batches = len(self.loader)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Batch]:
        """Every batch, moved nowhere and changed in nothing.

        Raises:
            ProfileError: there is none, or one has another layout.
        """
        count = 0
        for batch in self._batches():
            yield batch
            count += 1
        if not count:
            raise ProfileError("The dataloader is empty: give at least one batch of (inputs, targets).")
        self.batches = count

    def _batches(self) -> Iterator[Batch]:
        """Drawn from the same random state at every pass."""
        iterator = _until(self.loader, self.limit)
        if isinstance(self.loader, (list, tuple)):
            # draws nothing, and a generator's state takes as long to copy as a small network to run
            yield from iterator
            return
        inside = self._state
        while True:
            # swapped at every step: a pass that fails half-way leaves no other random state behind either
            outside = _random_state(self.loader)
            _set_random_state(inside, self.loader)
            try:
                batch = next(iterator, None)
            finally:
                inside = _random_state(self.loader)
                _set_random_state(outside, self.loader)
            if batch is None:
                return
            yield batch

    def expected(self, size: int) -> int:
        """How many batches of `size` samples a pass will read, as far as anybody can tell."""
        most = -(-self.limit // size)
        return min(self.batches, most) if self.batches is not None else min(8, most)

    def first(self) -> Batch:
        """The first batch."""
        for batch in self:
            return batch
        raise ProfileError("The dataloader is empty: give at least one batch of (inputs, targets).")

    def fitting(self, hold: bool = True) -> Iterator[Batch]:
        """The batches to fit on: all but those held back, or all unless `hold`."""
        return (b for b in self if not (hold and self.held(b)))

    def held_back(self) -> Iterator[Batch]:
        """The held-back batches; a single batch serves for both."""
        return (b for b in self if self.held(b) or self.batches == 1)

    def held(self, batch: Batch) -> bool:
        """Whether a batch is held back from fitting: every fourth, or the last of a few."""
        if self.batches is not None and self.batches < HOLD:
            return self.batches > 1 and batch.index == self.batches - 1
        return batch.index % HOLD == HOLD - 1


def _once(loader: Iterable[Any]) -> bool:
    """Whether it is an iterator, which can be read only once; a loader is not started to find out."""
    return hasattr(loader, "__next__")


def _until(loader: Iterable[Any], limit: int) -> Iterator[Batch]:
    seen = 0
    iterator = iter(loader)
    for index in itertools.count():
        if seen >= limit:
            return
        try:
            raw = next(iterator)
        except StopIteration:
            return
        batch = parse(raw, index)
        yield batch
        seen += batch.size


def _generators(loader: Any) -> list[torch.Generator]:
    places = (loader, getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None))
    found = [getattr(p, "generator", None) for p in (*places, getattr(places[2], "sampler", None))]
    return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())


def _random_state(loader: Any) -> dict[str, Any]:
    state: dict[str, Any] = {
        "python": random.getstate(),
        "torch": torch.get_rng_state(),
        "loader": [g.get_state() for g in _generators(loader)],
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state_all()
    if "numpy" in sys.modules:
        state["numpy"] = sys.modules["numpy"].random.get_state()
    return state


def _set_random_state(state: dict[str, Any], loader: Any) -> None:
    random.setstate(state["python"])
    torch.set_rng_state(state["torch"])
    for g, s in zip(_generators(loader), state["loader"], strict=True):
        g.set_state(s)
    if "cuda" in state:
        torch.cuda.set_rng_state_all(state["cuda"])
    if "numpy" in state:
        sys.modules["numpy"].random.set_state(state["numpy"])


@dataclass(frozen=True)
class Fitting:
    """The fitting part of some data as a loader of its own: who reads it cannot see what is held back."""

    data: Data

    def __iter__(self) -> Iterator[Batch]:
        return self.data.fitting()


@contextlib.contextmanager
def random_state_kept() -> Iterator[None]:
    """Leaves all global random generators as they were, whatever a loss or a dropout layer draws."""
    state = _random_state(None)
    try:
        yield
    finally:
        _set_random_state(state, None)


def loss_of(output: Any, batch: Batch, loss_fn: LossFn | None) -> Tensor:
    """The mean loss of a batch: `loss_fn`, or what the targets suggest.

    Args:
        output: what the model returned.
        batch: the batch it was computed on.
        loss_fn: takes (output, targets) and returns the mean over the batch, or one value per sample. None: the
            model's own `.loss`, cross-entropy for integer targets, mean squared error for floating ones.

    Raises:
        ProfileError: the loss cannot be computed, is not a number, or does not depend on the output.
    """
    try:
        loss = loss_fn(output, batch.targets) if loss_fn is not None else _default_loss(output, batch)
    except ProfileError:
        raise
    except Exception as error:
        name = getattr(loss_fn, "__name__", type(loss_fn).__name__) if loss_fn is not None else "the default loss"
        raise ProfileError(
            f"{name} failed on batch {batch.index} (output {_describe(output)}, targets {_describe(batch.targets)}): "
            f"{error}"
        ) from error
    if not isinstance(loss, Tensor):
        raise ProfileError(f"The loss of batch {batch.index} is a {type(loss).__name__}, not a tensor.")
    loss = loss.mean() if loss.dim() else loss
    if not math.isfinite(loss.detach()):
        raise ProfileError(
            f"The loss of batch {batch.index} is {loss.item()}: growth needs finite losses. Look for bad samples in "
            "this batch, a learning rate that is too high, or an overflow in half precision."
        )
    return loss


def _default_loss(output: Any, batch: Batch) -> Tensor:
    if batch.targets is None:
        own = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        if not isinstance(own, Tensor):
            raise ProfileError(
                f"Batch {batch.index} is a dict without targets, so the model must return an object with a loss, but "
                f"it returned {_describe(output)}. Put the labels into the batch, or pass (inputs, targets) batches."
            )
        return own
    logits = getattr(output, "logits", output)
    targets = batch.targets
    if not isinstance(logits, Tensor) or not isinstance(targets, Tensor):
        raise ProfileError(
            f"No default loss for output {_describe(output)} and targets {_describe(targets)}: pass loss_fn."
        )
    if targets.is_floating_point():
        if logits.shape != targets.shape:
            raise ProfileError(
                f"Mean squared error needs equal shapes, found output {tuple(logits.shape)} and targets "
                f"{tuple(targets.shape)} in batch {batch.index}; pass loss_fn."
            )
        return F.mse_loss(logits, targets)
    if logits.dim() == targets.dim() + 1 and logits.dim() > 2 and logits.shape[:-1] == targets.shape:
        # tokens: the classes stand last
        return F.cross_entropy(logits.flatten(0, -2), targets.flatten())
    return F.cross_entropy(logits, targets)


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')} on {value.device}"
    if isinstance(value, Mapping):
        return f"a dict of {sorted(map(str, value))}"
    name = type(value).__name__
    return f"{'an' if name[:1] in 'aeiouAEIOU' else 'a'} {name}"


def check_device(batch: Batch, gm: nn.Module) -> None:
    """Raises a `ProfileError` when the batch is on another device than the model's parameters."""
    own = next(gm.parameters(), None)
    given = first_tensor(batch.inputs)
    if own is not None and given is not None and own.device != given.device:
        raise ProfileError(
            f"Batch {batch.index} is on {given.device}, the model on {own.device}. Move one of them: "
            f"wrap the loader so that it yields batches on {own.device}, or call model.to({str(given.device)!r})."
        )
