"""The state of a model and of torch while the model is traced; everything is restored afterwards."""

from __future__ import annotations

import contextlib
import logging
import operator
import pickle  # nosec B403
import random
import sys
import threading
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from fxgrow.data.random_state import set_state_of, state_of
from fxgrow.tracing.intercept import MISSING, patched, put_entry
from fxgrow.tracing.proxy import ValueProxy
from fxgrow.tracing.surroundings import KEPT, RANDOM, Question, counter, generators_of


@contextlib.contextmanager
def without_caches(model: nn.Module) -> Iterator[None]:
    """Without key-value caches in the outputs: they are for generation, and not tensors."""
    every = (getattr(module, "config", None) for module in model.modules())
    configs = {id(c): c for c in every if getattr(c, "use_cache", None) is True}
    for config in configs.values():
        config.use_cache = False  # type: ignore[union-attr]
    try:
        yield
    finally:
        for config in configs.values():
            config.use_cache = True  # type: ignore[union-attr]


@contextlib.contextmanager
def without_fast_path() -> Iterator[None]:
    """Transformer layers of torch.nn run their parts instead of one fused operator for inference."""
    enabled, thread = torch.backends.mha.get_fastpath_enabled, threading.get_ident()
    here = lambda: threading.get_ident() != thread and enabled()  # noqa: E731
    with patched([(torch.backends.mha, "get_fastpath_enabled", here)]):
        yield


@contextlib.contextmanager
def without_compilation() -> Iterator[None]:
    """Compiled modules and functions run the Python code that they were made from."""
    dynamo: Any = sys.modules.get("torch._dynamo")
    with contextlib.ExitStack() as stack:
        if dynamo is not None:
            stack.enter_context(dynamo.config.patch(error_on_nested_fx_trace=False))
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


@contextlib.contextmanager
def without_failure_log() -> Iterator[None]:
    """Fake tensors log every failure as an error, also where a caller only tries whether a model accepts a size."""
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
    """Drops what a module caches between evaluations and clears in its `train()`: a graph would keep it for good."""
    modes = [(module, module.training) for module in model.modules()]
    for module, training in modes:
        if type(module).train is not nn.Module.train:
            with contextlib.suppress(Exception):  # some refuse one of the modes
                module.train(not training)
                module.train(training)
    for module, training in modes:
        module.training = training


@contextlib.contextmanager
def unchanged(model: nn.Module, asked: set[Question] | None = None) -> Iterator[None]:
    """Restores attributes of modules and states of random generators; enters those that have changed into `asked`."""
    saved = [(module, vars(module), dict(vars(module))) for module in model.modules()]
    containers = [v for _, attributes, _ in saved for v in attributes.values() if isinstance(v, (dict, list, set))]
    contents = [(container, _items(container) if container else []) for container in containers]
    generators = [*_global_generators(), *generators_of(model)]
    states = list(map(state_of, generators))
    try:
        _drop_caches(model)
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            if pickle.dumps(state_of(generator)) != pickle.dumps(state):
                set_state_of(generator, state, "a generator")
                (set() if asked is None or isinstance(generator, torch.Generator) else asked).add(RANDOM)
        for module, attributes, before in saved:
            if asked is not None:
                asked.update(_changed(module, attributes, before))
            attributes.clear()
            attributes.update(before)
        for container, content in contents:
            # one that is frozen has not changed; most are empty
            if (container or content) and list(map(id, _items(container))) != list(map(id, content)):
                container.clear()
                half = len(content) // 2
                if isinstance(container, dict):
                    container.update(zip(content[:half], content[half:], strict=True))
                else:
                    (container.extend if isinstance(container, list) else container.update)(content)


def _global_generators() -> list[Any]:
    numpy: Any = sys.modules.get("numpy")
    return [random._inst, *([] if numpy is None else [numpy.random.mtrand._rand])]


def _changed(module: nn.Module, attributes: dict[str, Any], before: dict[str, Any]) -> Iterator[Question]:
    for name, value in attributes.items():
        old, value = before.get(name), value.carried if type(value) is ValueProxy else value
        if value is not old and value != old if type(old) in (int, float) else value is not old:
            if name[0] != "_" and name != "training":
                yield counter(module, name) if type(old) in (int, float) else KEPT


def _items(container: Any) -> list[Any]:
    """Returns what a container holds; of a dict its keys, then its values."""
    return [*container, *container.values()] if isinstance(container, dict) else list(container)


@contextlib.contextmanager
def without_leftovers(containers: Sequence[Any], of_trace: bool = True) -> Iterator[None]:
    """Takes what a trace, or else any run, put into dicts, lists, sets and classes out again: caches of the model."""
    saved = [(owner, contents(owner)) for owner in containers]
    try:
        yield
    finally:
        for owner, before in saved:
            new = contents(owner)
            if len(new) == len(before) and all(map(operator.is_, new, before)):
                continue
            if isinstance(owner, (list, set)):
                if not of_trace or any(map(_is_leftover, new)):
                    owner.clear()
                    (owner.extend if isinstance(owner, list) else owner.update)(before)
                continue
            old, pairs = dict(zip(before[::2], before[1::2], strict=True)), list(zip(new[::2], new[1::2], strict=True))
            if any(_is_leftover(name) for name, _ in pairs):
                # without a question for the hash of a proxy, which would be recorded
                owner.clear()
                owner.update(old | {k: value for k, value in pairs if not (_is_leftover(k) or _is_leftover(value))})
                continue
            for name, value in pairs:
                if value is not old.get(name, MISSING) and (not of_trace or _is_leftover(value)):
                    put_entry(owner, name, old.get(name, MISSING))


def contents(owner: Any) -> list[Any]:
    """What a list or set holds; of a dict, or of the attributes of a class, each key and its value."""
    if isinstance(owner, (list, set)):
        return list(owner)
    # not by the methods of a subclass, which may make what it has not yet
    pairs = dict.items(owner) if isinstance(owner, dict) else vars(owner).items()
    return [part for pair in pairs for part in pair]


def _is_leftover(value: Any, depth: int = 4) -> bool:
    """Whether a value holds proxies or fake tensors; what it shares with others may contain itself."""
    kind = type(value)
    if kind is ValueProxy or kind is FakeTensor:
        return True
    if kind is not dict and kind is not tuple and kind is not list:  # an object, such as a distribution
        value = {} if isinstance(value, (type, ModuleType, nn.Module)) else getattr(value, "__dict__", {})
    if isinstance(value, dict):
        value = (*value, *value.values())
    return depth > 0 and any(_is_leftover(item, depth - 1) for item in value)
