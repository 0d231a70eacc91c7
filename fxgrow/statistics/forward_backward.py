"""One forward and backward pass over the data that records layer inputs and output gradients.

The graph runs in eval mode (dropout off, running statistics), node by node, so a module used twice is two uses. No
parameter gets a `.grad`, and only gradients of requested weights are computed. The model's mode, the random state and
the parameters are the same afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch.autograd.graph import GradientEdge, get_gradient_edge

from fxgrow.data.batches import Batch, check_device
from fxgrow.data.loss import Loss, LossFn, first_samples, known_loss, loss_name, loss_of, repeated
from fxgrow.errors import FxgrowError, ProfileError, first_lines
from fxgrow.graph.conditional import graph_like
from fxgrow.graph.evaluate import eval_mode, lent_buffers
from fxgrow.graph.purity import overwrites
from fxgrow.ops.expert_routing import all_routes
from fxgrow.statistics.batch_dimension import by_sample, find_samples, like_output

#: called with a node's output and the gradient there, returns the gradient with which backward continues
Correction = Callable[[Tensor, Tensor], Tensor]


@dataclass
class BatchRecord:
    """Activations and gradients of one batch of n samples, with its mean loss."""

    #: outputs of the requested nodes, `[n, ...]`, or `[1, ...]` where they are not laid out by sample; see
    #: `batch_dimension.py`
    inputs: dict[fx.Node, Tensor] = field(default_factory=dict)
    #: V = -dl/da at the targets, laid out likewise, unless `on_output_gradient` takes them
    output_gradients: dict[fx.Node, Tensor] = field(default_factory=dict)
    #: by name, minus the gradient of the requested weights, summed over samples: the sum of V h^T
    gradients: dict[str, Tensor] = field(default_factory=dict)
    size: int = 0
    loss: float = 0.0


@dataclass(frozen=True)
class PassRequest:
    """What a pass records and calls."""

    #: nodes whose output is kept for the batch
    sources: Iterable[fx.Node]
    #: called after each batch
    on_batch: Callable[[Batch, BatchRecord], None]
    #: nodes at whose output V = -dl/da is needed, l the loss of one sample
    targets: Iterable[fx.Node] = ()
    #: called during backward with the record so far, the target and V, `[n, ...]`
    on_output_gradient: Callable[[BatchRecord, fx.Node, Tensor], None] | None = None
    #: parameters whose gradients are wanted, by name
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    #: called before each batch: whether they are wanted for this one
    weights_needed: Callable[[], bool] = lambda: True
    #: by source, a function that changes the gradient there
    corrections: Mapping[fx.Node, Correction] = field(default_factory=dict)


class _ActivationRecorder:
    """The graph's code with a call after every recorded node, compiled once.

    An interpreter would take longer for a node than a small network for a layer.
    """

    def __init__(self, gm: fx.GraphModule, request: PassRequest) -> None:
        self.gm, self.request = gm, request
        self.sources, self.targets = set(request.sources), set(request.targets)
        self.copied = {n for n in self.sources if any(n in overwrites(user, gm) for user in n.users)}
        self.samples = find_samples(gm.graph)
        #: rows of experts, and the nodes that assign them
        self.routes = {n: r for n, r in all_routes(gm).items() if n in self.sources or n in self.targets}
        self.routing = {n for r in self.routes.values() for n in r.nodes()}
        self.nodes = [n for n in gm.graph.nodes if n in self.sources or n in self.targets or n in self.routing]
        self.hooks: list[Any] = []
        self.record = BatchRecord()
        #: outputs of `routing`
        self.known: dict[fx.Node, Tensor] = {}
        self.weights_needed = True
        #: targets that backward would not reach by itself, since no requested weight comes before them
        self.ends: list[Tensor | GradientEdge] = []
        #: targets without an output gradient so far, with the shape, dtype and device of their output
        self.waiting: dict[fx.Node, tuple[torch.Size, torch.dtype, torch.device]] = {}
        code = self._tapped().python_code("self")
        names = dict(code.globals)
        # torch.fx runs the same text for a graph module
        exec(code.src, names)  # nosec B102
        self.run = partial(names["forward"], gm)

    def _tapped(self) -> fx.Graph:
        """A copy of the graph in which every value of `nodes` goes through `tap`."""
        graph, node_map = graph_like(self.gm.graph)
        first = next(n for n in graph.nodes if n.op != "placeholder")
        for i, node in enumerate(self.nodes):
            copy = node_map[node]
            with graph.inserting_before(first if node.op == "placeholder" else copy.next):
                tapped = graph.call_function(self.tap, (i, copy))
            others = [user for user in copy.users if user is not tapped]
            copy.replace_all_uses_with(tapped, delete_user_cb=others.__contains__)
        return graph

    def tap(self, i: int, value: Tensor) -> Tensor:
        """Records the output of the i-th of `nodes`, and returns the value with which the graph continues."""
        node = self.nodes[i]
        if value is None:  # of a node that runs in train mode only
            return value
        if node in self.sources:
            kept = value.detach().clone() if node in self.copied else value.detach()
            # the routing of rows may be computed after the rows
            self.record.inputs[node] = kept if node in self.routes else self.by_sample(node, kept)
        if node in self.routing:
            self.known[node] = value.detach()
        if node in self.targets:
            if not value.requires_grad:
                value = value.detach().requires_grad_()
                self.ends.append(value)
            elif not self.weights_needed:
                self.ends.append(get_gradient_edge(value))
            self.waiting[node] = value.shape, value.dtype, value.device
            self.hooks.append(value.register_hook(lambda g: self.returned(node, g.detach())))
        correct = self.request.corrections.get(node)
        if correct is not None and value.requires_grad:
            kept, n, place = self.record.inputs[node], self.record.size, self.samples.get(node)
            hook = lambda g: like_output(correct(kept, by_sample(g, n, place)), n, place, g)  # noqa: E731
            self.hooks.append(value.register_hook(hook))
        return value

    def returned(self, node: fx.Node, v: Tensor) -> None:
        del self.waiting[node]
        v = self.by_sample(node, v)
        if self.request.on_output_gradient is None:
            self.record.output_gradients[node] = v
        else:
            self.request.on_output_gradient(self.record, node, v)

    def by_sample(self, node: fx.Node, value: Tensor) -> Tensor:
        """The value with its samples first, or as one sample."""
        n = self.record.size
        if node in self.routes:
            return self.routes[node].by_sample(value, self.known, n)
        return by_sample(value, n, self.samples.get(node))

    def finish(self) -> None:
        """V is zero at targets that are still waiting: the loss does not depend on them."""
        for node, (shape, dtype, device) in list(self.waiting.items()):
            self.returned(node, torch.zeros((), dtype=dtype, device=device).expand(shape))

    def close(self) -> None:
        """Frees the batch: the autograd graph and the hooks refer to each other, unseen by the garbage collector."""
        for hook in self.hooks:
            hook.remove()
        for batch in (self.hooks, self.ends, self.waiting, self.known):
            batch.clear()
        self.record = BatchRecord()


def forward_backward(
    gm: fx.GraphModule, batches: Iterable[Batch], loss_fn: LossFn | None, request: PassRequest
) -> None:
    """Runs forward and backward over `batches`; `loss_fn` as in `fxgrow.data.loss.loss_of`."""
    recorder, known = _ActivationRecorder(gm, request), known_loss(loss_fn)
    with eval_mode(gm), lent_buffers(gm), torch.enable_grad():
        for batch in batches:
            record = recorder.record
            record.size = batch.size
            weights = request.weights if request.weights_needed() else {}
            recorder.weights_needed = bool(weights)
            try:
                if not known.name and batch.targets is None:
                    _look_at_own_loss(gm, batch, known)
                loss = loss_of(forward(recorder.run, gm, batch), batch, known)
                for node in recorder.routes.keys() & record.inputs.keys():
                    record.inputs[node] = recorder.by_sample(node, record.inputs[node])
                record.loss = float(loss.detach())
                if not loss.requires_grad:
                    raise ProfileError(
                        f"The loss of batch {batch.index} does not depend on the model's parameters: check that "
                        "loss_fn uses the output it is given and does not detach it."
                    )
                # with -n instead of 1 every output gradient is V, without a copy for each reader
                start = torch.full_like(loss, -float(batch.size))
                inputs: list[Any] = [*weights.values(), *recorder.ends]
                gradients = _backward(loss, inputs, start, batch) if inputs else ()
                for (name, p), g in zip(weights.items(), gradients, strict=False):
                    record.gradients[name] = (torch.zeros_like(p) if g is None else g).detach()
                recorder.finish()
                request.on_batch(batch, record)
            finally:
                recorder.close()


@torch.no_grad()
def _look_at_own_loss(gm: fx.GraphModule, batch: Batch, loss: Loss) -> None:
    """Finds the reduction of the model's own loss, on copies of one sample."""
    inputs, size = first_samples(batch.inputs, batch.size, entries=1)

    def of_copies(k: int) -> Any:
        copies = replace(batch, inputs=repeated(inputs, size, k), size=k * size)
        return loss.of(forward(gm.forward, gm, copies), copies)

    loss.name = loss_name(None)
    loss.find_reduction(of_copies)


def _backward(loss: Tensor, inputs: list[Any], start: Tensor, batch: Batch) -> tuple[Tensor | None, ...]:
    try:
        return torch.autograd.grad(loss, inputs, start, allow_unused=True)
    except RuntimeError as error:
        raise ProfileError(
            f"The backward pass in eval mode failed on batch {batch.index}: {first_lines(error)}. Does it work for the "
            "model itself?"
        ) from error


def forward(run: Callable[..., Any], gm: fx.GraphModule, batch: Batch) -> Any:
    """Runs a batch through `run`, which takes the graph's inputs; errors name the batch and its shapes."""
    check_device(batch, gm)
    arguments = batch.arguments(gm)
    try:
        return run(*arguments)
    except FxgrowError:
        raise
    except Exception as error:
        what = ", ".join(f"{tuple(t.shape)} {t.dtype}" for t in arguments if isinstance(t, Tensor))
        raise ProfileError(
            f"The model failed on batch {batch.index} (inputs {what}): {first_lines(error)}. Give batches of the "
            "shapes and dtypes that it takes."
        ) from error
