"""One forward and one backward over the data; readers see what enters a weight and what comes back to its output.

The graph runs in eval mode (dropout off, running statistics), node by node, so a module used twice is two uses. No
parameter gets a `.grad`; only the weights that are asked for have their gradients computed. The model's mode, the
random state and the parameters are the same afterwards.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from fxgrow._data import Batch, LossFn, check_device, loss_of
from fxgrow._errors import FxgrowError, ProfileError

_INPLACE = {operator.iadd, operator.isub, operator.imul, operator.itruediv}

#: called with a node and V = -dl/da at its output, for the loss of each sample: `[n, ...]`
Reader = Callable[[fx.Node, Tensor], None]


@dataclass
class Seen:
    """What one batch left behind: inputs of weights by source node, and weight gradients by name.

    Attributes:
        inputs: what the asked-for nodes put out, `[n, ...]`.
        gradients: -n dl/dW for the asked-for weights, summed over samples: the sum of V h^T.
        size: number of samples n.
        loss: mean loss of the batch.
    """

    inputs: dict[fx.Node, Tensor] = field(default_factory=dict)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    size: int = 0
    loss: float = 0.0


class _Recorder(fx.Interpreter):
    """Runs the graph, keeps what `sources` put out and hooks the gradient at `targets`."""

    def __init__(self, gm: fx.GraphModule, sources: Iterable[fx.Node], targets: Iterable[fx.Node]) -> None:
        super().__init__(gm)
        self.sources, self.targets = set(sources), set(targets)
        self.copied = {n for n in self.sources if _overwritten(gm, n)}
        self.seen = Seen()
        self.reader: Reader | None = None
        self.hooks: list[Any] = []

    def run_node(self, n: fx.Node) -> Any:
        out = super().run_node(n)
        if n in self.sources:
            self.seen.inputs[n] = out.detach().clone() if n in self.copied else out.detach()
        if n in self.targets and self.reader is not None:
            if not out.requires_grad:
                out = out.detach().requires_grad_()
            hook = out.register_hook(lambda g: self.reader(n, g.detach()))
            self.hooks.append(hook)
        return out

    def close(self) -> None:
        """Lets the batch go: the autograd graph holds the hooks, which hold us, and no collector sees that circle."""
        for hook in self.hooks:
            hook.remove()
        self.env.clear()
        self.seen.inputs.clear()


def _overwritten(gm: torch.nn.Module, node: fx.Node) -> bool:
    """Whether somebody writes into this node's output after us."""
    for user in node.users:
        if user.op == "call_module" and getattr(gm.get_submodule(str(user.target)), "inplace", False):
            return True
        if user.target in _INPLACE or user.kwargs.get("inplace"):
            return True
        if user.op == "call_method" and str(user.target).endswith("_") and not str(user.target).endswith("__"):
            return True
    return False


@contextlib.contextmanager
def eval_mode(gm: torch.nn.Module) -> Iterator[None]:
    """Eval mode for the time being; every module gets its own flag back."""
    modes = [(m, m.training) for m in gm.modules()]
    gm.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def run_pass(
    gm: fx.GraphModule,
    batches: Iterable[Batch],
    loss_fn: LossFn | None,
    *,
    sources: Iterable[fx.Node],
    targets: Iterable[fx.Node],
    weights: Mapping[str, Tensor],
    reader: Callable[[Seen, fx.Node, Tensor], None],
    done: Callable[[Batch, Seen], None],
) -> None:
    """Forward and backward over `batches`.

    Args:
        gm: the graph.
        batches: what to run on.
        loss_fn: see `fxgrow._data.loss_of`.
        sources: nodes whose output is kept for the batch.
        targets: nodes at whose output V = -dl/da is read.
        weights: parameters whose gradients are wanted, by name.
        reader: called during backward with what was kept, the node and V.
        done: called after each batch.

    Raises:
        ProfileError: a batch does not fit, the forward pass fails, or the loss is not finite.
    """
    sources, targets, names = list(sources), list(targets), list(weights)
    parameters = [weights[n] for n in names]
    with eval_mode(gm), torch.enable_grad():
        for batch in batches:
            recorder = _Recorder(gm, sources, targets)
            seen = recorder.seen
            seen.size = batch.size
            recorder.reader = lambda node, v, seen=seen: reader(seen, node, v)
            try:
                loss = loss_of(forward(recorder, gm, batch), batch, loss_fn)
                seen.loss = float(loss.detach())
                if not loss.requires_grad:
                    raise ProfileError(
                        f"The loss of batch {batch.index} does not depend on the model's parameters: check that "
                        "loss_fn uses the output it is given and does not detach it."
                    )
                # starting from -n instead of 1 gives V itself everywhere, without a copy at each reader
                start = torch.full_like(loss, -float(batch.size))
                gradients = torch.autograd.grad(loss, parameters, start, allow_unused=True)
                for name, p, g in zip(names, parameters, gradients, strict=True):
                    g = torch.zeros_like(p) if g is None else g
                    seen.gradients[name] = g.detach()
                done(batch, seen)
            finally:
                recorder.close()


def forward(runner: fx.Interpreter | fx.GraphModule, gm: fx.GraphModule, batch: Batch) -> Any:
    """Runs a batch through the graph (or an interpreter of it), and says what was wrong with it."""
    check_device(batch, gm)
    arguments = batch.arguments(gm)
    try:
        if isinstance(runner, fx.Interpreter):
            return runner.run(*arguments, enable_io_processing=False)
        return runner(**batch.inputs) if isinstance(batch.inputs, dict) else runner(*batch.inputs)
    except FxgrowError:
        raise
    except Exception as error:
        what = ", ".join(f"{tuple(t.shape)} {t.dtype}" for t in arguments if isinstance(t, Tensor))
        raise ProfileError(f"The model failed on batch {batch.index} (inputs {what}): {error}") from error
