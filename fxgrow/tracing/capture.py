"""Turn a model into a ``torch.fx.GraphModule`` that shares its modules and parameters."""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import random
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from fxgrow.errors import CaptureError
from fxgrow.graph.graph import lint, release_generated_source
from fxgrow.graph.node_meta import EXAMPLE_INPUTS, KEYWORDS, NON_PERSISTENT, is_captured
from fxgrow.graph.purity import is_pure
from fxgrow.ops.registry import recognised
from fxgrow.storage.recipe import Recipe, keep_recipe
from fxgrow.tracing.input_sizes import keep_input_sizes
from fxgrow.tracing.model_check import check_against_model
from fxgrow.tracing.opaque import OpaqueFallback
from fxgrow.tracing.tracer import ValueTracer
from fxgrow.tracing.train_eval import guard_modes, merge_modes


def capture(model: nn.Module, example_inputs: tuple[Any, ...] | dict[str, Any] | torch.Tensor) -> fx.GraphModule:
    """Trace a model into a graph at module level, on fake tensors.

    The result shares modules, parameters and buffers with ``model``, which is left as it is. It is called
    like the model with the arguments given here, works at other batch sizes and in train and eval mode, and
    raises ``CaptureError`` for an input that would take another branch of the model's code.

    Args:
        model: any module. A graph that ``capture`` returned is returned as it is.
        example_inputs: positional arguments as a tuple, or keyword arguments as a dict; only shapes, dtypes
            and Python values count. A single tensor counts as a tuple of one.

    A function, a method or a submodule whose code cannot be followed (it decides on a tensor's values, say) stays one
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
    if not isinstance(model, nn.Module):
        raise CaptureError(f"capture needs a torch.nn.Module, not a {type(model).__name__}.")
    if is_captured(model):
        return model
    model = getattr(model, "_orig_mod", model)  # what torch.compile wrapped
    if isinstance(model, torch.jit.ScriptModule):
        raise CaptureError("A TorchScript module has no Python code to trace. Capture the module it was made from.")
    lazy = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if is_lazy(tensor)]
    if lazy:
        raise CaptureError(f"{lazy[0]} has no shape yet. Run the model once on a batch, then capture it.")
    inputs, call = _bind(model, example_inputs)
    for module in model.modules():
        recognised(module)  # runs it on numbers of its own, which tracing would record
    keywords = list(inputs) if isinstance(example_inputs, Mapping) else None
    with _without_caches(model), _without_fast_path():
        tracer = _trace(model, inputs, call)
        gm = _assemble(model, tracer, tuple(inputs.values()), keywords)
        for other_mode in (False, True) if tracer.branches else (False,):
            with _untouched(model):
                check_against_model(model, gm, call, other_mode)
        gm.training = model.training
    return gm


def _bind(model: nn.Module, example_inputs: Any) -> tuple[dict[str, Any], Callable[[list[Any]], Any]]:
    """Placeholder names with their example values, and a call of forward that takes them in that order."""
    if isinstance(example_inputs, torch.Tensor):
        example_inputs = (example_inputs,)
    keywords = isinstance(example_inputs, Mapping)
    if not keywords and not isinstance(example_inputs, (tuple, list)):
        raise CaptureError(
            f"example_inputs is a {type(example_inputs).__name__}. Give a tuple of positional inputs, or a "
            "dict of keyword inputs."
        )
    forward = model.forward
    try:
        signature = inspect.signature(forward)
        bound = signature.bind(**example_inputs) if keywords else signature.bind(*example_inputs)
    except TypeError as error:
        raise CaptureError(
            f"{type(model).__name__}.forward{inspect.signature(forward)} cannot take the example inputs: {error}."
        ) from error
    inputs: dict[str, Any] = {}
    slots: list[tuple[str, str | None]] = []  # (placeholder, keyword or None)
    positional = True
    for name, value in bound.arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            slots += [(f"{name}_{i}", None) for i in range(len(value))]
            inputs.update({f"{name}_{i}": item for i, item in enumerate(value)})
        elif kind is inspect.Parameter.VAR_KEYWORD:
            slots += [(key, key) for key in value]
            inputs.update(value)
        else:
            before = list(signature.parameters)[: list(signature.parameters).index(name)]
            positional = (
                positional
                and kind is not inspect.Parameter.KEYWORD_ONLY
                and all(earlier in bound.arguments for earlier in before)
            )
            slots.append((name, None if positional else name))
            inputs[name] = value

    def call(values: list[Any]) -> Any:
        args = [value for value, (_, key) in zip(values, slots, strict=True) if key is None]
        kwargs = {key: value for value, (_, key) in zip(values, slots, strict=True) if key is not None}
        return forward(*args, **kwargs)

    return inputs, call


def _trace(model: nn.Module, inputs: dict[str, Any], call: Callable[[list[Any]], Any]) -> ValueTracer:
    """Trace until train and eval mode are both described, or the other one is refused."""
    leaves = frozenset(module for module in model.modules() if _asks_for_mode(module))
    fallback = OpaqueFallback(model)
    while True:
        tracer = ValueTracer(inputs, call, leaves, opaque=fallback.reasons)
        try:
            with _untouched(model), fallback.applied():
                tracer.record(model)
        except CaptureError as error:
            fallback.add(tracer.failed_in, error, tracer.failed_calls)
            continue
        innermost = {model.get_submodule(path) for path, _, _ in tracer.branches.values() if path}
        small = {module for module in innermost if isinstance(module, _NormBase) or not _holds_anything(module)}
        if small <= leaves:
            break
        leaves |= small

    def retrace(changed: dict[str, Any], flipped: frozenset[str] = frozenset()) -> tuple[ValueTracer, bool]:
        again = ValueTracer(changed, call, leaves, flipped, fallback.reasons)
        try:
            with _untouched(model), fallback.applied(), _without_log_of_failures():
                again.record(model)
        except CaptureError:
            return again, False
        return again, True

    keep_input_sizes(tracer, retrace)
    _prune(tracer.graph)
    if tracer.branches:
        other = ValueTracer(inputs, call, leaves, frozenset(tracer.branches), fallback.reasons)
        try:
            with _untouched(model), fallback.applied():
                other.record(model)
            keep_input_sizes(other, functools.partial(retrace, flipped=other.flipped))
            _prune(other.graph)
            merge_modes(tracer, other)
        except CaptureError:
            guard_modes(tracer)
    tracer.opaque_functions.update({name: function for name, (_, function) in fallback.functions.items()})
    return tracer


def _asks_for_mode(module: nn.Module) -> bool:
    """The likes of DropPath: nothing inside to grow, so the whole module may as well be one node.

    Others that branch on their mode are found by a trace; a name that is known saves one.
    """
    name = type(module).__name__.lower()
    return ("droppath" in name or "stochasticdepth" in name) and not _holds_anything(module)


def _holds_anything(module: nn.Module) -> bool:
    return any(True for _ in module.children()) or any(True for _ in module.parameters(recurse=False))


def _prune(graph: fx.Graph) -> None:
    """Remove nodes nobody uses that change nothing (fx's own pass also removes in-place methods)."""
    for node in reversed(list(graph.nodes)):
        if not node.users and is_pure(node):
            graph.erase_node(node)


def _assemble(
    model: nn.Module, tracer: ValueTracer, values: tuple[Any, ...], keywords: list[str] | None
) -> fx.GraphModule:
    gm = fx.GraphModule(nn.Module(), fx.Graph(), class_name=type(model).__name__)
    gm._modules.update(model._modules)
    used = {str(node.target) for node in tracer.graph.find_nodes(op="call_module")}
    functions = {name: f.train(model.training) for name, f in tracer.opaque_functions.items() if name in used}
    gm._modules.update(functions)
    gm._parameters.update(model._parameters)
    gm._buffers.update(model._buffers)
    gm._non_persistent_buffers_set.update(model._non_persistent_buffers_set)
    gm.training = model.training
    constants = dict(tracer.constants)
    for node in tracer.graph.find_nodes(op="get_attr"):
        name = str(node.target)
        owner = vars(model)
        if "." not in name and isinstance(owner.get(name), torch.Tensor):
            constants[name] = owner[name]  # a tensor the model keeps as a plain attribute
    for name, tensor in constants.items():
        gm.register_buffer(name, tensor, persistent=False)
    tracer.graph._tracer_cls = None  # our tracer needs inputs; any tracer can read the graph again
    gm.graph = tracer.graph
    lint(gm)
    release_generated_source(gm)
    # a slice of a data set would carry all of it into every copy and every saved file
    gm.meta[EXAMPLE_INPUTS] = pytree.tree_map_only(torch.Tensor, _alone, values)
    gm.meta[KEYWORDS] = keywords
    if Recipe.of(model).steps:
        keep_recipe(gm, replace(Recipe.of(model), into="graph"))
    gm.meta[NON_PERSISTENT] = sorted(gm._non_persistent_buffers_set)
    gm._register_deepcopy_hook(_keep_buffer_flags)
    return gm


def _alone(x: torch.Tensor) -> torch.Tensor:
    """The tensor with a storage of its own where it is a part of a larger one."""
    if x.layout is not torch.strided or x.untyped_storage().nbytes() <= x.numel() * x.element_size():
        return x
    return x.detach().clone()


def _keep_buffer_flags(copied: fx.GraphModule) -> None:
    """Undo that copying a GraphModule makes its root's buffers persistent: that adds keys to its state."""
    for name in copied.meta[NON_PERSISTENT]:
        if name in copied._parameters:
            copied._buffers[name] = copied._parameters.pop(name)
        copied._non_persistent_buffers_set.add(name)


@contextlib.contextmanager
def _without_caches(model: nn.Module) -> Iterator[None]:
    """No key-value caches in the outputs: they are for generation, and no tensors."""
    found = (getattr(module, "config", None) for module in model.modules())
    configs = {id(c): c for c in found if getattr(c, "use_cache", None) is True}
    for config in configs.values():
        config.use_cache = False  # type: ignore[union-attr]
    try:
        yield
    finally:
        for config in configs.values():
            config.use_cache = True  # type: ignore[union-attr]


@contextlib.contextmanager
def _without_fast_path() -> Iterator[None]:
    """Transformer layers of torch.nn show their parts instead of one fused operator for inference."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextlib.contextmanager
def _without_log_of_failures() -> Iterator[None]:
    """Fake tensors log every failure as an error; here it only says that the model does not take a size."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    thread = threading.get_ident()

    def other_thread(record: logging.LogRecord) -> bool:
        return record.thread != thread

    log.addFilter(other_thread)
    try:
        yield
    finally:
        log.removeFilter(other_thread)


def _drop_caches(model: nn.Module) -> None:
    """What a module keeps between evaluations and drops in its own `train()`: a graph would keep it for good."""
    modes = [(module, module.training) for module in model.modules()]
    for module, training in modes:
        if type(module).train is not nn.Module.train:
            with contextlib.suppress(Exception):  # some refuse one of the modes
                module.train(not training)
                module.train(training)
    for module, training in modes:
        module.training = training


@contextlib.contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Give every module its attributes back, and the random generators their state."""
    saved: list[tuple[dict[str, Any], dict[str, Any], list[tuple[Any, Any]]]] = []
    containers = dict, list, set
    for module in model.modules():
        attributes = vars(module)
        # most are empty: hooks that nobody registered
        contents = [
            (value, value.copy() if value else ()) for value in attributes.values() if isinstance(value, containers)
        ]
        saved.append((attributes, dict(attributes), contents))
    state = random.getstate()
    try:
        _drop_caches(model)
        yield
    finally:
        random.setstate(state)
        for attributes, before, contents in saved:
            attributes.clear()
            attributes.update(before)
            for container, content in contents:
                if not content and not container:
                    continue
                container.clear()
                if isinstance(container, list):
                    container.extend(content)
                else:
                    container.update(content)
