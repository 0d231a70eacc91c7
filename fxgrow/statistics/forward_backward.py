"""One forward and one backward over the data; readers see what enters a weight and what comes back to its output.

The graph runs in eval mode (dropout off, running statistics), node by node, so a module used twice is two uses. No
parameter gets a `.grad`; only the weights that are asked for have their gradients computed. The model's mode, the
random state and the parameters are the same afterwards.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch.autograd.graph import GradientEdge, get_gradient_edge

from fxgrow.data.batches import Batch, check_device
from fxgrow.data.loss import LossFn, loss_of
from fxgrow.errors import FxgrowError, ProfileError
from fxgrow.graph.evaluate import eval_mode
from fxgrow.ops.expert_routing import all_routes
from fxgrow.statistics.batch_dimension import nodes_with_batch_second

_INPLACE = {operator.iadd, operator.isub, operator.imul, operator.itruediv}
#: called with a node and V = -dl/da at its output, for the loss of each sample: `[n, ...]`
Reader = Callable[[fx.Node, Tensor], None]
#: called with what a node put out and the gradient there, returns the gradient to go on with
Correction = Callable[[Tensor, Tensor], Tensor]


@dataclass
class BatchRecord:
    """What one batch left behind: inputs of weights by source node, and weight gradients by name.

    Attributes:
        inputs: what the asked-for nodes put out, `[n, ...]`; rows of a list of positions are the samples' again.
        gradients: -n dl/dW for the asked-for weights, summed over samples: the sum of V h^T.
        size: number of samples n.
        loss: mean loss of the batch.
    """

    inputs: dict[fx.Node, Tensor] = field(default_factory=dict)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    size: int = 0
    loss: float = 0.0


class _ActivationRecorder:
    """The graph's own code with a call at every node that is read; keeps what `sources` put out, hooks `targets`.

    Compiled once: an interpreter takes longer for a node than a small network for a layer.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        sources: Iterable[fx.Node],
        targets: Iterable[fx.Node],
        read: Reader,
        corrections: Mapping[fx.Node, Correction],
    ) -> None:
        self.gm, self.read, self.corrections = gm, read, corrections
        self.sources, self.targets = set(sources), set(targets)
        self.copied = {n for n in self.sources if _overwritten(gm, n)}
        self.second = nodes_with_batch_second(gm.graph)
        #: rows of experts, and what says whose they are
        self.routes = {n: r for n, r in all_routes(gm).items() if n in self.sources or n in self.targets}
        self.routing = {n for r in self.routes.values() for n in r.nodes()}
        self.nodes = [n for n in gm.graph.nodes if n in self.sources or n in self.targets or n in self.routing]
        self.hooks: list[Any] = []
        self.seen = BatchRecord()
        self.known: dict[fx.Node, Tensor] = {}
        #: whether gradients of weights are asked for
        self.weighted = True
        #: targets that backward must be asked to reach: those that no weight stands before that is asked for
        self.ends: list[Tensor | GradientEdge] = []
        #: targets that nothing has come back to yet, with the shape, dtype and device of what they put out
        self.waiting: dict[fx.Node, tuple[torch.Size, torch.dtype, torch.device]] = {}
        code = self._tapped().python_code("self")
        names = dict(code.globals)
        exec(code.src, names)
        self.code = names["forward"]

    def _tapped(self) -> fx.Graph:
        """A copy of the graph in which every value of `nodes` goes through `tap`."""
        graph = fx.Graph()
        node_map: dict[fx.Node, fx.Node] = {}
        graph.output(graph.graph_copy(self.gm.graph, node_map))
        first = next(n for n in graph.nodes if n.op != "placeholder")
        for i, node in enumerate(self.nodes):
            twin = node_map[node]
            with graph.inserting_before(first if node.op == "placeholder" else twin.next):
                tapped = graph.call_function(self.tap, (i, twin))
            others = [user for user in twin.users if user is not tapped]
            twin.replace_all_uses_with(tapped, delete_user_cb=others.__contains__)
        return graph

    def __call__(self, *arguments: Any) -> Any:
        return self.code(self.gm, *arguments)

    def tap(self, i: int, value: Tensor) -> Tensor:
        """What the graph goes on with after the i-th of `nodes`."""
        node = self.nodes[i]
        if node in self.sources:
            kept = value.detach().clone() if node in self.copied else value.detach()
            # whose rows these are may be found out later than what they are
            self.seen.inputs[node] = kept if node in self.routes else self._by_sample(node, kept)
        if node in self.routing:
            self.known[node] = value.detach()
        if node in self.targets:
            if not value.requires_grad:
                value = value.detach().requires_grad_()
                self.ends.append(value)
            elif not self.weighted:
                self.ends.append(get_gradient_edge(value))
            self.waiting[node] = value.shape, value.dtype, value.device
            self.hooks.append(value.register_hook(lambda g: self.returned(node, g.detach())))
        correct = self.corrections.get(node)
        if correct is not None and value.requires_grad:
            kept, by_sample = self.seen.inputs[node], partial(self._by_sample, node)
            self.hooks.append(value.register_hook(lambda g: self._as_put_out(node, correct(kept, by_sample(g)), g)))
        return value

    def returned(self, node: fx.Node, v: Tensor) -> None:
        del self.waiting[node]
        self.read(node, self._by_sample(node, v))

    def lay_out(self) -> None:
        """After the forward pass: what experts read, by sample."""
        for node in self.routes.keys() & self.seen.inputs.keys():
            self.seen.inputs[node] = self._by_sample(node, self.seen.inputs[node])

    def _by_sample(self, node: fx.Node, value: Tensor) -> Tensor:
        """`[n, positions, features]`, where the model has steps first, or one list of all samples' positions."""
        n = self.seen.size
        if node in self.routes:
            return self.routes[node].by_sample(value, self.known, n)
        if self._is_second(node, value):
            return value.transpose(0, 1)
        return value.unflatten(0, (n, -1)) if value.dim() == 2 and len(value) > n and len(value) % n == 0 else value

    def _is_second(self, node: fx.Node, value: Tensor) -> bool:
        return node in self.second and value.dim() > 2 and value.shape[1] == self.seen.size

    def _as_put_out(self, node: fx.Node, by_sample: Tensor, like: Tensor) -> Tensor:
        return by_sample.transpose(0, 1) if self._is_second(node, like) else by_sample.view_as(like)

    def finish(self) -> None:
        """The loss does not depend on what is still waiting: V is zero there."""
        for node, (shape, dtype, device) in list(self.waiting.items()):
            self.returned(node, torch.zeros((), dtype=dtype, device=device).expand(shape))

    def close(self) -> None:
        """Lets the batch go: the autograd graph holds the hooks, which hold us, and no collector sees that circle."""
        for hook in self.hooks:
            hook.remove()
        self.hooks.clear()
        self.ends.clear()
        self.waiting.clear()
        self.known.clear()
        self.seen = BatchRecord()


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


def forward_backward(
    gm: fx.GraphModule,
    batches: Iterable[Batch],
    loss_fn: LossFn | None,
    *,
    sources: Iterable[fx.Node],
    targets: Iterable[fx.Node],
    weights: Mapping[str, Tensor],
    wanted: Callable[[], bool] = lambda: True,
    reader: Callable[[BatchRecord, fx.Node, Tensor], None],
    done: Callable[[Batch, BatchRecord], None],
    corrections: Mapping[fx.Node, Correction] | None = None,
) -> None:
    """Forward and backward over `batches`.

    Args:
        gm: the graph.
        batches: what to run on.
        loss_fn: see `fxgrow.data.loss.loss_of`.
        sources: nodes whose output is kept for the batch.
        targets: nodes at whose output V = -dl/da is read.
        weights: parameters whose gradients are wanted, by name.
        wanted: asked before each batch whether they are.
        reader: called during backward with what was kept, the node and V.
        done: called after each batch.
        corrections: by source, what becomes of the gradient there.

    Raises:
        ProfileError: a batch does not fit, the forward pass fails, or the loss is not finite.
    """
    recorder = _ActivationRecorder(
        gm, sources, targets, lambda node, v: reader(recorder.seen, node, v), corrections or {}
    )
    with eval_mode(gm), torch.enable_grad():
        for batch in batches:
            seen = recorder.seen
            seen.size = batch.size
            asked = weights if wanted() else {}
            recorder.weighted = bool(asked)
            try:
                loss = loss_of(forward(recorder, gm, batch), batch, loss_fn)
                recorder.lay_out()
                seen.loss = float(loss.detach())
                if not loss.requires_grad:
                    raise ProfileError(
                        f"The loss of batch {batch.index} does not depend on the model's parameters: check that "
                        "loss_fn uses the output it is given and does not detach it."
                    )
                # starting from -n instead of 1 gives V itself everywhere, without a copy at each reader
                start = torch.full_like(loss, -float(batch.size))
                reached: list[Any] = [*asked.values(), *recorder.ends]
                gradients = torch.autograd.grad(loss, reached, start, allow_unused=True) if reached else ()
                for (name, p), g in zip(asked.items(), gradients, strict=False):
                    g = torch.zeros_like(p) if g is None else g
                    seen.gradients[name] = g.detach()
                recorder.finish()
                done(batch, seen)
            finally:
                recorder.close()


def forward(run: Callable[..., Any], gm: fx.GraphModule, batch: Batch) -> Any:
    """Runs a batch through `run`, which takes what the graph takes, and says what was wrong with it."""
    check_device(batch, gm)
    arguments = batch.arguments(gm)
    try:
        return run(*arguments)
    except FxgrowError:
        raise
    except Exception as error:
        what = ", ".join(f"{tuple(t.shape)} {t.dtype}" for t in arguments if isinstance(t, Tensor))
        raise ProfileError(f"The model failed on batch {batch.index} (inputs {what}): {error}") from error
