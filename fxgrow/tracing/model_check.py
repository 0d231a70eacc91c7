"""Proof that a captured graph computes what its model computes: one forward pass of each, on the example inputs."""

from __future__ import annotations

import contextlib
import functools
import logging
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxgrow.data.random_state import random_state_kept
from fxgrow.errors import CaptureError
from fxgrow.graph.conditional import ConditionalInterpreter
from fxgrow.graph.evaluate import difference, lent_buffers, tensors_in
from fxgrow.graph.purity import written_parameters
from fxgrow.tracing.model_state import unchanged
from fxgrow.tracing.surroundings import Change, Question, as_it_is, changes, generators_of, seed_all

_TRIES = 3
log = logging.getLogger("fxgrow")


def check_against_model(
    model: nn.Module, gm: fx.GraphModule, call: Callable[[list[Any]], Any], other_mode: bool, asked: Sequence[Question]
) -> None:
    """Raises a CaptureError where outputs of a model and its graph differ by more than rounding.

    They are compared again with other answers to what the model's code has `asked` of its surroundings.

    A model on `meta`, or one that does not run on the values of the example, is not compared. Buffers and random states
    are as before; modes are left changed, and `capture` restores them.
    """
    inputs = list(gm.meta["example_inputs"])
    state = [*model.parameters(), *model.buffers(), *tensors_in(inputs)]
    if any(t.device.type == "meta" or type(t) not in (Tensor, nn.Parameter, nn.Buffer) for t in state):
        return
    quiet: list[bool] = []
    outputs = functools.partial(_outputs, written_parameters(gm), quiet=quiet)
    if other_mode:
        model.train(not model.training)
        set_modes_as_in(model, gm)

    def differ(change: Change = as_it_is) -> bool:
        quiet.clear()
        try:
            expected = outputs(model, call, inputs, change)
        except Exception as error:
            log.debug("the model does not run on its example inputs: %s", error)
            return False
        for _ in range(_TRIES):
            try:
                found = outputs(gm, lambda values: gm(*values), inputs, change)
            except CaptureError:
                return False  # it refuses this mode, or these inputs
            if _agree(found, expected):
                return False
            if not _agree(outputs(model, call, inputs, change), expected):
                return all(quiet)  # else another thread may draw random numbers
        return True

    mode = "train" if model.training else "eval"
    differs = differ()
    for question in asked:
        if differs or any(map(differ, changes(model, question))):
            raise CaptureError(
                f"In {mode} mode, what {type(model).__name__} computes depends on {question.what}. A graph does not "
                f"see that. {question.advice}."
            )
    if differs:
        raise CaptureError(
            f"The graph of {type(model).__name__} computes something else than the model does in {mode} mode, first at "
            f"{_first_difference(model, gm, call, inputs)}. Its code depends on something that a graph does not see, "
            "such as the type of a tensor, or gives another result each time."
        )


def is_right_with_other_weights(model: nn.Module, gm: fx.GraphModule, call: Callable[[list[Any]], Any]) -> bool:
    """Whether a graph computes what its model does, also with noise on the parameters.

    False where that cannot be said. Changes what `check_against_model` changes.
    """
    inputs = list(gm.meta["example_inputs"])
    outputs = functools.partial(_outputs, written_parameters(gm))
    try:
        with _perturbed_parameters(model):
            expected = outputs(model, call, inputs)
            found = outputs(gm, lambda values: gm(*values), inputs)
    except Exception as error:
        log.debug("cannot run the model or its graph: %s", error)
        return False
    return _agree(found, expected) and all(bool(t.isfinite().all()) for t in expected)


@contextlib.contextmanager
def called_once(model: nn.Module, call: Callable[[list[Any]], Any], inputs: dict[str, Any]) -> Iterator[None]:
    """While open, the model is as after a call; a CaptureError if it does not run on the example."""
    with unchanged(model), lent_buffers(model), random_state_kept():
        try:
            with torch.no_grad():
                call(_copied(list(inputs.values())))
        except Exception as error:
            raise CaptureError("The model does not run on its example inputs.") from error
        yield


def set_modes_as_in(model: nn.Module, gm: fx.GraphModule) -> None:
    """Gives a graph, and the layers that are its own, the modes of its model."""
    modules = dict(gm.named_modules(remove_duplicate=False))
    for name, module in model.named_modules(remove_duplicate=False):
        if modules.get(name, module) is not module:
            modules[name].training = module.training


@torch.no_grad()
def _outputs(
    parameters: list[nn.Parameter],
    module: nn.Module,
    run: Callable[[list[Any]], Any],
    inputs: list[Any],
    change: Change = as_it_is,
    quiet: list[bool] | None = None,
) -> list[Tensor]:
    """Tensors of a seeded run, and whether it is `quiet`: draws no numbers; buffers and parameters are as before."""
    with unchanged(module), lent_buffers(module, parameters), random_state_kept():
        torch.manual_seed(0)
        seed_all(generators_of(module), 0)
        with change(_copied(inputs), run) as values:
            before = random.getstate(), torch.get_rng_state()
            found = [t.detach().clone() for t in tensors_in(run(values))]
            if quiet is not None:
                same = random.getstate() == before[0] and torch.equal(torch.get_rng_state(), before[1])
                quiet.append(same and not torch.cuda.is_initialized())
            return found


@contextlib.contextmanager
@torch.no_grad()
def _perturbed_parameters(model: nn.Module) -> Iterator[None]:
    """While open, noise is added to the trainable parameters: a gate that starts at 0 hides what comes before it.

    A cache may have been filled from those that are frozen, unless all are.
    """
    parameters = [p for p in model.parameters() if p.is_floating_point()]
    parameters = [p for p in parameters if p.requires_grad] or parameters
    saved = [p.detach().clone() for p in parameters]
    random = torch.Generator().manual_seed(0)
    try:
        for p in parameters:
            scale = 0.1 + 0.1 * float(p.std(correction=0)) if p.numel() else 0.0
            p.data.add_(torch.randn(p.shape, generator=random).to(p), alpha=scale)  # `data`: a backward may be due
        yield
    finally:
        for p, before in zip(parameters, saved, strict=True):
            p.data.copy_(before)


def _copied(inputs: list[Any]) -> list[Any]:
    """The example is the user's, and a model may write into its inputs (`x *= 255`)."""
    return list(pytree.tree_map_only(Tensor, torch.clone, inputs))


def _agree(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    return len(found) == len(expected) and all(
        a.shape == b.shape and difference(a, b).is_rounding for a, b in zip(found, expected, strict=True)
    )


def _first_difference(model: nn.Module, gm: fx.GraphModule, call: Callable[[list[Any]], Any], inputs: list[Any]) -> str:
    """The first module whose output is another one in the graph, with the line that calls it; else the output."""
    seen: dict[str, list[list[Tensor]]] = {}
    outputs = functools.partial(_outputs, written_parameters(gm))
    targets = {str(node.target) for node in gm.graph.find_nodes(op="call_module")}

    def hook(name: str) -> Any:
        return lambda module, args, out: seen.setdefault(name, []).append([t.clone() for t in tensors_in(out)])

    with contextlib.ExitStack() as hooks:
        for name in targets & dict(model.named_modules()).keys():
            hooks.enter_context(model.get_submodule(name).register_forward_hook(hook(name)))
        outputs(model, call, inputs)
    different: list[fx.Node] = []

    class Compare(ConditionalInterpreter):
        def run_node(self, n: fx.Node) -> Any:
            out = super().run_node(n)
            if n.op == "call_module" and seen.get(str(n.target)) and pytree.tree_leaves(out)[0] is not None:
                if not _agree(list(tensors_in(out)), seen[str(n.target)].pop(0)):
                    different.append(n)
            return out

    outputs(gm, lambda values: Compare(gm).run(*values, enable_io_processing=False), inputs)
    node = different[0] if different else next(iter(gm.graph.find_nodes(op="output")))
    where = (node.stack_trace or "").strip().replace("\n", ":")
    return f"module {node.target!r} ({where})" if different else "the output"
