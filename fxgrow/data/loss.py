"""The loss: as given, of the model, or chosen by the targets; its name, and whether it is a sum over the batch."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from fxgrow.data.batches import Batch
from fxgrow.errors import InfiniteLossError, LossWarning, ProfileError, first_lines, warn
from fxgrow.graph.evaluate import lent_buffers

LossFn = Callable[[Any, Any], Tensor]
#: entries of an output that are looked at to find out what a loss does
LOOKED_AT = 2**18
#: the target that cross-entropy leaves out, where nothing else is said
IGNORED = -100
#: numbers that are all between 0 and 1 say something if they are so many
FEW = 8
#: of autograd, nodes that change no value
VIEWS = "View", "Squeeze", "Unsqueeze", "Permute", "Transpose", "T", "Reshape", "Select", "Slice", "Clone", "ToCopy"


@dataclass
class Loss:
    """A loss, and what its first batch said of it; takes the place of the function that was given.

    Attributes:
        function: takes (output, targets); None for the model's own loss, or one chosen by the targets.
        name: for reports; empty before the first batch.
        summed: whether it grows with the number of samples, and is divided by that number.
    """

    function: LossFn | None = None
    name: str = ""
    summed: bool = False

    def __call__(self, output: Any, targets: Any) -> Tensor:
        loss: Tensor = self.of(output, Batch((), targets, 1, 0))
        return loss

    def of(self, output: Any, batch: Batch) -> Any:
        """What the function, or the default, makes of a batch."""
        return _default_loss(output, batch) if self.function is None else self.function(output, batch.targets)

    @torch.no_grad()
    def look_at(self, output: Any, batch: Batch) -> None:
        """Finds the name and the reduction on a batch, and warns of a guess that seems wrong."""
        self.name = loss_name(self.function)
        if self.function is None:
            if batch.targets is not None:
                (logits, targets), _ = first_samples((_logits(output), batch.targets), batch.size)
                self.name = _name_of_guess(logits, targets, _ends_in_sigmoid(_logits(output)))
            return
        pair, size = first_samples((output, batch.targets), batch.size)
        function = self.function
        self.find_reduction(lambda copies: function(*repeated(pair, size, copies)))

    def find_reduction(self, loss_of_copies: Callable[[int], Any]) -> None:
        """Finds the reduction from the losses of so many copies of the same samples."""
        try:
            with _unchanged(self.function):
                one, two, three = (float(loss_of_copies(copies).mean()) for copies in (1, 2, 3))
        except Exception:  # of other numbers of samples than the batch's some losses have no value
            self.summed = _says_sum(self.function)
        else:
            # a mean stays; a sum grows by the same with each copy, whatever is added to it once per batch
            self.summed = abs(two - one) > 1e-3 * abs(one) and math.isclose(three - two, two - one, rel_tol=1e-3)
        if self.summed:
            self.name += ", a sum: divided by the number of samples"


def known_loss(loss_fn: LossFn | None) -> Loss:
    """The same loss, which finds out about itself on the first batch."""
    return loss_fn if isinstance(loss_fn, Loss) else Loss(loss_fn)


def loss_of(output: Any, batch: Batch, loss_fn: LossFn | None) -> Tensor:
    """The mean loss of a batch, on which the model returned `output`.

    `loss_fn` takes (output, targets) and returns the mean over the batch, the sum, or one value per sample. None: the
    model's own `.loss`, cross-entropy for integer targets, mean squared error for floating ones.
    """
    known = known_loss(loss_fn)
    try:
        loss = known.of(output, batch)
    except ProfileError:
        raise
    except Exception as error:
        name = "the default loss" if known.function is None else loss_name(known.function)
        raise ProfileError(
            f"{name} failed on batch {batch.index} (output {_describe(output)}, targets {_describe(batch.targets)}): "
            f"{first_lines(error)}"
        ) from error
    if not isinstance(loss, Tensor):
        raise ProfileError(f"The loss of batch {batch.index} is a {type(loss).__name__}, not a tensor.")
    if not known.name:
        known.look_at(output, batch)
    loss = loss.mean() if loss.dim() else loss / batch.size if known.summed else loss
    if not math.isfinite(loss.detach()):
        raise InfiniteLossError(
            f"The loss of batch {batch.index} is {loss.item()}: growth needs finite losses. Look for bad samples in "
            "this batch, a learning rate that is too high, or an overflow in half precision."
        )
    return loss


def loss_name(function: LossFn | None) -> str:
    """The name of a loss function, with the options of a partial one."""
    if function is None:
        return "the model's own loss"
    if isinstance(function, functools.partial):
        options = ", ".join(f"{k}={v!r}" for k, v in function.keywords.items() if not isinstance(v, Tensor))
        return loss_name(function.func) + (f"({options})" if options else "")
    return str(getattr(function, "__name__", type(function).__name__))


@contextlib.contextmanager
def _unchanged(function: Any) -> Iterator[None]:
    """What a loss counts or keeps in itself, and the random state, are as before."""
    own = getattr(function, "__dict__", {})
    before = dict(own)
    buffers = lent_buffers(function) if isinstance(function, nn.Module) else contextlib.nullcontext()
    with torch.random.fork_rng(devices=[]), buffers:
        try:
            yield
        finally:
            own.clear()
            own.update(before)


def _says_sum(function: Any) -> bool:
    if isinstance(function, functools.partial):
        return bool(function.keywords.get("reduction") == "sum") or _says_sum(function.func)
    return getattr(function, "reduction", None) == "sum"


def repeated(value: Any, size: int, copies: int) -> Any:
    """So many copies of a batch of `size` samples, in all tensors of it that have rows of these samples."""
    return pytree.tree_map_only(Tensor, lambda t: torch.cat([t] * copies) if _has_rows(t, size) else t, value)


def first_samples(value: Any, size: int, entries: int = LOOKED_AT) -> tuple[Any, int]:
    """The first samples of a batch of `size`, as many as have so many entries at most, and how many these are."""
    tensors = [t for t in pytree.tree_leaves(value) if isinstance(t, Tensor) and _has_rows(t, size)]
    most = max((t.numel() for t in tensors), default=1)
    samples = min(size, max(1, entries * size // max(1, most)))
    cut = {id(t): t[: samples * len(t) // size] for t in tensors}
    return pytree.tree_map_only(Tensor, lambda t: cut.get(id(t), t), value), samples


def _has_rows(t: Tensor, size: int) -> bool:
    return t.dim() > 0 and len(t) >= size and len(t) % size == 0


def _logits(output: Any) -> Any:
    return getattr(output, "logits", output)


def _ends_in_sigmoid(output: Tensor) -> bool:
    """Whether autograd says so; views may follow."""
    node = output.grad_fn
    while node is not None and node.name().startswith(VIEWS) and node.next_functions:
        node = node.next_functions[0][0]
    return node is not None and node.name().startswith(("Sigmoid", "Hardsigmoid"))


def _name_of_guess(output: Tensor, targets: Tensor, sigmoid: bool) -> str:
    """The name of the default loss; warns, or refuses it, where outputs and targets look like those of another one."""
    floating = targets.is_floating_point()
    name = "mean squared error" if floating else "cross-entropy"
    outputs, labels = _kind(output), _kind(targets) if floating else "labels"
    if outputs == "log-probabilities":
        use = "nn.KLDivLoss(reduction='batchmean')" if floating else "nn.NLLLoss()"
    elif labels == "probabilities":
        cross_entropy = "nn.CrossEntropyLoss()", "lambda output, target: -(target * output.log()).sum(1).mean()"
        use = cross_entropy[outputs == "probabilities"]
    elif labels == "between 0 and 1":
        use = "nn.BCELoss()" if sigmoid else "nn.BCEWithLogitsLoss()"
        use += ", after a sigmoid nn.BCELoss()" if outputs == labels and not sigmoid else ""
    elif floating and sigmoid:
        use = "nn.L1Loss()"
    elif not floating and (outputs == "probabilities" or sigmoid):
        use = "lambda output, target: F.nll_loss(output.log(), target)"
    else:
        return name
    what = (labels or "any numbers") if floating else "integers"
    message = (
        f"loss_fn=None stands for {name} here, but the outputs are {outputs or 'any numbers'} and the targets are "
        f"{what}. Growth must lower the loss that trains the model: pass it, such as loss_fn={use}"
    )
    if floating and ("log-probabilities" == outputs or labels == "probabilities" != outputs):
        raise ProfileError(message + ".")
    meant = "nn.MSELoss()" if floating else "nn.CrossEntropyLoss()"
    warn(f"{message}, or loss_fn={meant} if that is the one.", LossWarning)
    return name


def _kind(t: Tensor) -> str:
    """What the values of outputs or floating targets are, where that says which loss they are for."""
    if t.is_complex():
        return ""
    t = t.double()
    dims = {d for d in (1, t.dim() - 1) if 0 < d < t.dim() and t.shape[d] > 1}
    for kind, positive in (("log-probabilities", t.exp()), ("probabilities", t)):
        if any(bool((positive >= 0).all()) and _sums_to_one(positive, d) for d in dims):
            return kind
    # a few numbers say something if each is 0 or 1
    telling = t.numel() >= FEW or bool(((t == 0) | (t == 1)).all())
    within = telling and bool(t.any()) and bool(((t >= 0) & (t <= 1)).all())
    return "between 0 and 1" if within else ""


def _sums_to_one(t: Tensor, dim: int) -> bool:
    return bool(((t.sum(dim) - 1).abs() < 1e-2).all())


def _default_loss(output: Any, batch: Batch) -> Tensor:
    if batch.targets is None:
        loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        if not isinstance(loss, Tensor):
            what = "is a dict without targets" if isinstance(batch.inputs, dict) else "has no targets (None)"
            raise ProfileError(
                f"Batch {batch.index} {what}, so the model must return an object with a loss, but "
                f"it returned {_describe(output)}. Put the labels into the batch, or pass (inputs, targets) batches."
            )
        return loss
    logits, targets = _logits(output), batch.targets
    if not isinstance(logits, Tensor) or not isinstance(targets, Tensor) or targets.is_complex():
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
    return _cross_entropy(logits, targets)


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy; raises a `ValueError` where the targets are no class numbers, before a GPU would stop."""
    if logits.dim() == targets.dim() + 1 and logits.dim() > 2 and logits.shape[:-1] == targets.shape:
        # tokens: classes are the last dimension
        logits, targets = logits.flatten(0, -2), targets.flatten()
    if logits.dim() < 2 or targets.shape != (logits.shape[0], *logits.shape[2:]):
        raise ValueError(
            "cross-entropy takes one class number per sample, targets of the output's shape without its classes. Give "
            "such targets, or pass loss_fn: for several labels a sample, nn.BCEWithLogitsLoss() and targets as floats"
        )
    classes = logits.shape[1]
    if classes == 1:
        raise ValueError(
            "one output and class numbers: cross-entropy of one class is always 0. Pass loss_fn, for two classes "
            "lambda output, target: F.binary_cross_entropy_with_logits(output.squeeze(1), target.float()), or give "
            "floating targets for a mean squared error"
        )
    targets = targets.long()
    wrong = (targets < 0) | (targets >= classes)
    wrong &= targets != IGNORED
    if bool(wrong.any()):
        label = int(targets[wrong][0])
        raise ValueError(
            f"target {label} is out of bounds: the model has the classes 0 to {classes - 1}. If {label} marks what to "
            f"leave out, pass loss_fn=nn.CrossEntropyLoss(ignore_index={label})"
        )
    return F.cross_entropy(logits, targets)


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')} on {value.device}"
    if isinstance(value, Mapping):
        return f"a dict of {sorted(map(str, value))}"
    name = type(value).__name__
    return f"{'an' if name[:1] in 'aeiouAEIOU' else 'a'} {name}"
