"""Run the nodes of a graph on fake tensors, without touching the model they belong to."""

from __future__ import annotations

import builtins
import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from fxgrow.graph.graph import submodule
from fxgrow.tracing.meta_kernels import fake_tensor
from fxgrow.tracing.meta_kernels import run as run_on_meta
from fxgrow.tracing.source_location import looks_at_data

_isinstance, _NOTHING = builtins.isinstance, contextlib.nullcontext()


class FakeRunner:
    """Evaluates single nodes; ``silent`` is true while it does, so that a tracer can look away.

    ``guessed`` says of the last one whether its sizes depend on data and were learnt from some that were made up.
    """

    def __init__(self) -> None:
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.silent = False
        self.guessed = False

    @contextlib.contextmanager
    def quiet(self, fake: bool = True) -> Iterator[None]:
        """Run torch code on fake values: nothing is recorded, no gradients are kept."""
        before, self.silent = self.silent, True
        # What a tracer puts in the way has nothing to say here, and asking it costs time.
        patched, builtins.isinstance = builtins.isinstance, _isinstance
        try:
            # first of all: even `no_grad` asks who listens; without a fake mode nothing here has gradients
            modes = (self.mode, torch.no_grad()) if fake else (_NOTHING, _NOTHING)
            with torch._C.DisableTorchFunction(), modes[0], modes[1]:
                yield
        finally:
            builtins.isinstance = patched
            self.silent = before

    def call(self, node: fx.Node, root: nn.Module) -> Any:
        """The value of a ``call_*`` node, from the values of its arguments."""
        args = fx.node.map_arg(node.args, lambda source: source.meta["val"])
        kwargs = fx.node.map_arg(node.kwargs, lambda source: source.meta["val"])
        self.guessed = False
        module = submodule(root, str(node.target)) if node.op == "call_module" else None
        with self.quiet(fake=False):
            value = run_on_meta(node.target if module is None else module, args, kwargs, self.mode)
        if value is not None:
            return value
        try:
            with self.quiet():
                if module is not None:
                    with self._fake_state(module):
                        # Not __call__: hooks are the user's and must not see fake tensors.
                        return module.forward(*args, **kwargs)
                if node.op == "call_method":
                    return getattr(args[0], str(node.target))(*args[1:], **kwargs)
                return node.target(*args, **kwargs)  # type: ignore[operator]
        except Exception as error:
            home = str(getattr(node.target, "__module__", None) or "torch")
            if node.op != "call_function" or home.startswith("torch") or not looks_at_data(error):
                raise
        # Indexing with a mask, or a function marked with torch.fx.wrap, may look at data: to learn its result's shape,
        # give it some.
        before, self.silent, self.guessed = self.silent, True, True
        try:
            with torch.no_grad():
                real_args, real_kwargs = fx.node.map_aggregate((args, kwargs), _made_up)
                return self.fake(node.target(*real_args, **real_kwargs))  # type: ignore[operator]
        finally:
            self.silent = before

    def fake(self, value: Any) -> Any:
        """The same value with fake tensors, in nested tuples, lists and dicts too."""
        kind = type(value)
        if isinstance(value, torch.Tensor):
            return value if isinstance(value, FakeTensor) else fake_tensor(value, self.mode)
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return kind(*(self.fake(item) for item in value))
        if isinstance(value, (list, tuple)) and not isinstance(value, torch.Size):
            return kind([self.fake(item) for item in value])
        if isinstance(value, dict):
            return {name: self.fake(item) for name, item in value.items()}
        return value

    @contextlib.contextmanager
    def _fake_state(self, module: nn.Module) -> Iterator[None]:
        """Lend a module fake parameters and buffers: batch norm counts its calls even in a fake mode."""
        saved = []
        for part in module.modules():
            attributes = vars(part)
            saved.append((attributes, attributes["_parameters"], attributes["_buffers"]))
            for kind in ("_parameters", "_buffers"):
                attributes[kind] = {
                    name: None if tensor is None else fake_tensor(tensor, self.mode)
                    for name, tensor in attributes[kind].items()
                }
        try:
            yield
        finally:
            for attributes, parameters, buffers in saved:
                attributes["_parameters"], attributes["_buffers"] = parameters, buffers


def _made_up(value: Any) -> Any:
    if not isinstance(value, FakeTensor):
        return value
    real = torch.zeros(value.shape, dtype=value.dtype, device=value.device)
    return real.uniform_() if value.dtype.is_floating_point else real


_SIZES = {"shape", "size", "numel", "nelement", "device"}


def arithmetic_key(kind: str, target: Any, args: Any, kwargs: Any) -> tuple[Any, ...] | None:
    """Equal keys mean equal numbers: half of a raw trace is the same sizes computed again."""
    values = [arg.meta["val"] for arg in args if isinstance(arg, fx.Node)]
    name = args[1] if target is getattr else target
    if (target is getattr or kind == "call_method") and name in _SIZES and isinstance(values[0], torch.Tensor):
        # The shape too, as an in-place method may have changed it.
        return target, repr(args), repr(kwargs), tuple(values[0].shape)
    if kind == "call_function" and getattr(target, "__module__", "") == "_operator" and values:
        if all(isinstance(value, (bool, int, float, torch.Size)) for value in values):
            return target, repr(args), repr(kwargs)
    return None
