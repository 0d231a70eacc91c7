"""Turns a model into a ``torch.fx.GraphModule`` that shares its modules and parameters."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils import _pytree as pytree

from fxgrow.data.argument_checks import checked_arguments
from fxgrow.data.batches import as_tensors, dtype_of, first_tensor
from fxgrow.errors import CaptureError
from fxgrow.graph.captured_graph import CapturedGraph
from fxgrow.graph.conditional import ConditionalCodeGen, is_code
from fxgrow.graph.graph import lint, release_generated_source
from fxgrow.graph.kept_values import collections_kept
from fxgrow.graph.node_functions import holds
from fxgrow.graph.node_meta import DTYPE, EXAMPLE_INPUTS, KEYWORDS, NON_PERSISTENT, OTHER_MODE, is_captured
from fxgrow.graph.purity import is_pure
from fxgrow.storage.example_inputs import weights_dtype
from fxgrow.storage.recipe import Recipe, keep_recipe
from fxgrow.tracing.alignment import share_constants
from fxgrow.tracing.bind_inputs import bind_inputs
from fxgrow.tracing.forward_hooks import ForwardHooks
from fxgrow.tracing.input_sizes import keep_input_sizes
from fxgrow.tracing.intercept import CAPTURE_LOCK
from fxgrow.tracing.model_check import called_once, check_against_model, is_right_with_other_weights, set_modes_as_in
from fxgrow.tracing.model_state import (
    unchanged,
    without_caches,
    without_compilation,
    without_failure_log,
    without_fast_path,
)
from fxgrow.tracing.namespaces import Namespaces
from fxgrow.tracing.opaque import OpaqueFallback
from fxgrow.tracing.outcomes import Outcomes
from fxgrow.tracing.random_branches import alternatives_of, nearest_outcomes
from fxgrow.tracing.size_decisions import Decision, Otherwise
from fxgrow.tracing.surroundings import OUTCOMES
from fxgrow.tracing.tracer import ValueTracer
from fxgrow.tracing.train_eval import guard_modes, merge_modes


@checked_arguments(CaptureError)
def capture(model: nn.Module, example_inputs: tuple[Any, ...] | dict[str, Any] | torch.Tensor) -> fx.GraphModule:
    """Traces a model into a graph at module level, on fake tensors.

    The result shares modules, parameters and buffers with ``model``, which is left as it is. It is called
    like the model with the arguments given here, works at other batch sizes and in train and eval mode, and
    raises ``CaptureError`` for an input that would take another branch of the model's code.

    Args:
        model: any module. A graph that ``capture`` returned is returned as it is.
        example_inputs: positional arguments as a tuple, or keyword arguments as a dict; only shapes, dtypes
            and Python values count. A single tensor counts as a tuple of one.

    A function, a method or a submodule whose code cannot be traced (it branches on a tensor's values, say) stays one
    node, the smallest one possible; ``fxgrow.explain`` lists them.

    Returns:
        A GraphModule with the keys of the model's ``state_dict()``. ``node.meta["val"]`` holds each node's
        value on the example (tensors are fake), ``node.meta["tensor_meta"]`` the shapes,
        ``gm.meta["example_inputs"]`` the inputs in the order of the placeholders.

    Raises:
        CaptureError: the inputs do not fit, the model's code fails on them, or the model's own ``forward``
            (not a function it calls, nor a submodule) looks at a tensor's values.

    Example:
        >>> import torch, fxgrow
        >>> net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU())
        >>> [node.op for node in fxgrow.capture(net, (torch.zeros(2, 3),)).graph.nodes]
        ['placeholder', 'call_module', 'call_module', 'output']
    """
    if is_captured(model):
        return model
    model = getattr(model, "_orig_mod", model)  # without torch.compile
    if isinstance(model, torch.jit.ScriptModule):
        raise CaptureError("A TorchScript module has no Python code to trace. Capture the module it was made from.")
    example_inputs = as_tensors(example_inputs, dtype_of(model))
    first = first_tensor(example_inputs)
    if first is not None and first.dim() and not len(first):
        raise CaptureError(
            f"example_inputs have no samples: a tensor of shape {tuple(first.shape)}. Give at least one."
        )
    inputs, call = bind_inputs(model, example_inputs)
    keywords = list(inputs) if isinstance(example_inputs, Mapping) else None

    def traced(otherwise: Mapping[Decision, Otherwise]) -> tuple[ValueTracer, fx.GraphModule]:
        tracer = _trace(model, inputs, call, otherwise, namespaces, hooks)
        gm = _assemble(model, tracer, tuple(inputs.values()), keywords)
        hooks.own_layers(gm)
        with unchanged(model), namespaces.unchanged(), hooks.named_in_errors():
            if otherwise and not is_right_with_other_weights(model, gm, call):
                raise CaptureError("The other way gives another result.")
            for other_mode in (False, True) if tracer.branches else (False,):
                check_against_model(model, gm, call, other_mode, list(namespaces.asked))
        set_modes_as_in(model, gm)
        gm.meta[OTHER_MODE] = _in_other_mode(model)
        return tracer, gm

    hooks = ForwardHooks(model)
    kept = collections_kept(model) if hooks.hooked else contextlib.nullcontext()
    quiet = without_failure_log()  # an error says what fails
    with CAPTURE_LOCK, without_caches(model), without_fast_path(), without_compilation(), kept, quiet:
        namespaces = Namespaces(model)
        return _at_all_sizes(traced, lambda: called_once(model, call, inputs))


def _at_all_sizes(
    traced: Callable[[Mapping[Decision, Otherwise]], tuple[ValueTracer, fx.GraphModule]],
    called_once: Callable[[], AbstractContextManager[None]],
) -> fx.GraphModule:
    """Returns the graph of a model with as few decisions on sizes as there can be: see `size_decisions`."""

    def decide(taken: Mapping[Decision, Otherwise]) -> tuple[ValueTracer, fx.GraphModule, Mapping[Decision, Otherwise]]:
        tried = set(taken)
        tracer, gm = traced(taken)
        while new := next((d for d in tracer.decisions.open if d not in tried), None):
            tried.add(new)
            outcome, bounded = tracer.decisions.open[new]
            otherwise = {**taken, new: Otherwise(outcome, bounded=False)}
            with contextlib.suppress(CaptureError):
                other, graph = traced(otherwise)
                if bounded and not other.written - tracer.written:  # else it fills a cache, and is right at every size
                    if new in tracer.decisions.unequal:
                        continue
                    otherwise[new] = Otherwise(outcome, bounded)
                    other, graph = traced(otherwise)
                if len(other.opaque) <= len(tracer.opaque):  # else the other way raises, inside of what is opaque now
                    tracer, gm, taken = other, graph, otherwise
        return tracer, gm, taken

    tracer, gm, taken = decide({})
    if tracer.written and tracer.decisions.unequal:
        with contextlib.suppress(CaptureError):
            with called_once():
                _, _, more = decide(taken)
            gm = gm if more == taken else traced(more)[1]
    return gm


def _trace(
    model: nn.Module,
    inputs: dict[str, Any],
    call: Callable[[list[Any]], Any],
    otherwise: Mapping[Decision, Otherwise],
    namespaces: Namespaces,
    hooks: ForwardHooks,
    followed: bool = True,
) -> ValueTracer:
    """Traces until both train and eval mode are described, or the other one is refused.

    Branches on random numbers are `followed` if eval mode has none.
    """
    leaves = frozenset(module for module in model.modules() if _is_drop_path(module))
    fallback = OpaqueFallback(model, namespaces)

    def attempt(
        values: dict[str, Any], flipped: frozenset[str], outcomes: Outcomes
    ) -> tuple[ValueTracer, CaptureError | None]:
        tracer = ValueTracer(values, call, leaves, flipped, fallback.reasons, otherwise)
        tracer.outcomes = outcomes.again()
        tracer.runner.asked = namespaces.asked
        try:
            with unchanged(model, namespaces.asked), fallback.applied(), hooks.traced(tracer):
                tracer.record(model)
        except CaptureError as error:
            return tracer, error
        return tracer, None

    def trace_around_obstacles(flipped: frozenset[str] = frozenset(), outcomes: Outcomes | None = None) -> ValueTracer:
        while True:
            left = len(hooks.left)
            tracer, error = attempt(inputs, flipped, outcomes or Outcomes(followed))
            if error is None:
                return tracer
            if len(hooks.left) == left:
                fallback.add(tracer.failed_in, error, tracer.failed_calls)

    def finish(tracer: ValueTracer) -> ValueTracer:
        keep_input_sizes(tracer, lambda values: attempt(values, tracer.flipped, tracer.outcomes))
        _prune(tracer.graph)
        return tracer

    tracer = _follow_numbers(
        trace_around_obstacles(), namespaces, hooks, lambda outcomes: attempt(inputs, frozenset(), outcomes)
    )
    while small := _small_modules(model, tracer.branches) - leaves:
        leaves |= small
        tracer = trace_around_obstacles()
    other = finish(tracer)
    try:
        for place in dict.fromkeys(tracer.outcomes.places):
            other = trace_around_obstacles(outcomes=Outcomes(true_at=frozenset((place,))))
            tracer.branches = {**other.branches, **tracer.branches}
        other = finish(trace_around_obstacles(frozenset(tracer.branches))) if tracer.branches else tracer
        tracer = _merge(tracer, other, lambda flipped, outcomes: finish(trace_around_obstacles(flipped, outcomes)))
    except CaptureError:
        if tracer.outcomes.asked or other.outcomes.asked:
            return _trace(model, inputs, call, otherwise, namespaces, hooks, followed=False)
        guard_modes(tracer)
    namespaces.asked |= {OUTCOMES} if tracer.graph.find_nodes(op="call_function", target=holds) else set()
    tracer.opaque_functions.update({name: function for name, (_, function) in fallback.functions.items()})
    return tracer


def _follow_numbers(
    tracer: ValueTracer,
    namespaces: Namespaces,
    hooks: ForwardHooks,
    retrace: Callable[[Outcomes], tuple[ValueTracer, CaptureError | None]],
) -> ValueTracer:
    """Returns a trace in which numbers that the code makes of sizes are nodes, if its code runs on them."""
    left, patches = len(hooks.left), namespaces.follow_numbers(tracer.asked_in)
    if patches:
        symbolic, error = retrace(Outcomes(tracer.outcomes.followed))
        if error is None and len(hooks.left) == left:
            return symbolic
        namespaces.forget(patches)
    return tracer


def _merge(
    tracer: ValueTracer, other: ValueTracer, retrace: Callable[[frozenset[str], Outcomes], ValueTracer]
) -> ValueTracer:
    """Returns one trace for both modes and all outcomes of random decisions; eval mode may not depend on these."""
    both = [tracer] if tracer is other else [tracer, other]
    trained = 0 if any(now for _, now, _ in tracer.branches.values()) else -1
    if len(both) == 2:
        trace, like = both[trained], both[-1 - trained]
        both[trained] = nearest_outcomes(trace, like, functools.partial(retrace, trace.flipped))
        both[0].branches = {**both[0].branches, **tracer.branches}
        share_constants(both[0], both[1])
    found = [alternatives_of(t, both[0], functools.partial(retrace, t.flipped)) for t in both]
    if found[-1 - trained if len(both) == 2 else 0]:
        raise CaptureError("A random number decides what the model computes in eval mode.")
    if len(both) == 2:
        merge_modes(both[0], both[1], found[trained])
    for node in both[0].graph.find_nodes(op="call_function", target=holds):
        if not node.users:
            both[0].graph.erase_node(node)
    return both[0]


def _small_modules(model: nn.Module, branches: Mapping[str, tuple[str, bool, str]]) -> frozenset[nn.Module]:
    """Modules that branch on their mode and may as well be one node: norms, and those that hold nothing."""
    innermost = {model.get_submodule(path) for path, _, _ in branches.values() if path}
    return frozenset(m for m in innermost if isinstance(m, _NormBase) or not _has_children_or_parameters(m))


def _is_drop_path(module: nn.Module) -> bool:
    """Whether a module is a DropPath by its name; `_small_modules` finds others, with one more trace."""
    name = type(module).__name__.lower()
    return ("droppath" in name or "stochasticdepth" in name) and not _has_children_or_parameters(module)


def _has_children_or_parameters(module: nn.Module) -> bool:
    return any(True for _ in module.children()) or any(True for _ in module.parameters(recurse=False))


def _prune(graph: fx.Graph) -> None:
    """Removes pure nodes without users (the pass of torch.fx also removes in-place methods)."""
    for node in reversed(list(graph.nodes)):
        if not node.users and is_pure(node):
            graph.erase_node(node)


def _assemble(
    model: nn.Module, tracer: ValueTracer, values: tuple[Any, ...], keywords: list[str] | None
) -> fx.GraphModule:
    gm = CapturedGraph(nn.Module(), fx.Graph(), class_name=type(model).__name__)
    for name in ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set"):
        getattr(gm, name).update(getattr(model, name))
    used = {str(node.target) for node in tracer.graph.find_nodes(op="call_module")}
    gm._modules.update({name: f.train(model.training) for name, f in tracer.opaque_functions.items() if name in used})
    gm.training = model.training
    attributes = {
        str(node.target): vars(model).get(str(node.target)) for node in tracer.graph.find_nodes(op="get_attr")
    }
    for name, value in (attributes | tracer.constants).items():
        if isinstance(value, torch.Tensor):
            gm.register_buffer(name, value, persistent=False)
        elif isinstance(value, torch.Generator):
            setattr(gm, name, value)
    tracer.graph._tracer_cls = None  # ValueTracer needs inputs; any tracer can read the graph again
    for node in tracer.graph.nodes:
        node.meta.pop("is_wrapped", None)  # the code of such a node would enter its function into fx's global table
    if not all(is_code(str(node.target)) for node in tracer.graph.nodes if node.op in ("call_module", "get_attr")):
        tracer.graph.set_codegen(ConditionalCodeGen())
    gm.graph = tracer.graph
    lint(gm)
    release_generated_source(gm)
    # a slice of a data set would keep all of it in every copy and every saved file
    gm.meta[EXAMPLE_INPUTS] = pytree.tree_map_only(torch.Tensor, _compact, values)
    gm.meta[KEYWORDS] = keywords
    gm.meta[DTYPE] = weights_dtype(model)
    if Recipe.of(model).steps:
        keep_recipe(gm, replace(Recipe.of(model), into="graph"))
    gm.meta[NON_PERSISTENT] = sorted(gm._non_persistent_buffers_set)
    gm._register_deepcopy_hook(_keep_buffer_flags)
    return gm


def _in_other_mode(model: nn.Module) -> dict[bool, list[str]]:
    """Names of the modules that a model's own `train(mode)` leaves in the other mode, by mode."""
    found: dict[bool, list[str]] = {}
    if type(model).train is nn.Module.train:
        return found
    with unchanged(model), contextlib.suppress(Exception):  # some refuse one of the modes
        for mode in (True, False):
            model.train(mode)
            found[mode] = [name for name, m in model.named_modules() if name and m.training is not mode]
    return found


def _compact(x: torch.Tensor) -> torch.Tensor:
    """Returns a copy of a tensor that is a part of a larger storage."""
    if x.layout is not torch.strided or x.untyped_storage().nbytes() <= x.numel() * x.element_size():
        return x
    return x.detach().clone()


def _keep_buffer_flags(copied: fx.GraphModule) -> None:
    """Undoes that a copied GraphModule has its root's buffers as persistent ones, which adds keys to its state."""
    for name in copied.meta[NON_PERSISTENT]:
        if name in copied._parameters:
            copied._buffers[name] = copied._parameters.pop(name)
        copied._non_persistent_buffers_set.add(name)
