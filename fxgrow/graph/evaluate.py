"""Runs a module for its outputs in eval mode, and compares outputs within one tolerance."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from fxgrow.graph.kept_values import collections_kept

#: largest relative difference of outputs that rounding explains, per dtype
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}

_DROPOUTS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout, torch.dropout)


@contextlib.contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Switches to eval mode inside the block; every submodule gets its flag back."""
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for m, training in modes:
            m.training = training


@contextlib.contextmanager
def own_modes() -> Iterator[None]:
    """Leaves autocast and inference mode inside the block: results have the precision of the model, and can train."""
    accelerator = torch.accelerator.current_accelerator()
    with contextlib.ExitStack() as stack:
        for kind in filter(torch.is_autocast_enabled, ["cpu"] if accelerator is None else ["cpu", accelerator.type]):
            stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        yield


@contextlib.contextmanager
def lent_buffers(module: nn.Module, parameters: Collection[Tensor] = ()) -> Iterator[None]:
    """Lends a module copies of its buffers inside the block: statistics and counters stay as they are.

    So do weights that hooks compute before each call. The values of `parameters`, which the code may write into, are
    put back.
    """
    copies = {id(b): b.detach().clone() for b in module.buffers()}
    scripted = [m for m in module.modules() if isinstance(m, torch.jit.ScriptModule)]  # keep their own out of reach
    saved = [(m, m._buffers) for m in module.modules() if m not in scripted]
    hooked = [(m, dict(vars(m))) for m, _ in saved if m._forward_pre_hooks]
    values = [(t, t.detach().clone()) for t in (*parameters, *(b for m in scripted for b in m.buffers()))]
    for m, buffers in saved:
        m._buffers = {name: None if b is None else copies[id(b)] for name, b in buffers.items()}
    try:
        yield
    finally:
        for m, buffers in saved:
            m._buffers = buffers
        for m, attributes in hooked:
            vars(m).update(attributes)
        for parameter, value in values:
            parameter.data.copy_(value)


class WithoutDropout(TorchFunctionMode):
    """While open, functional dropout keeps everything, also where the code asks for it in eval mode."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _DROPOUTS:
            return args[0] if args else kwargs["input"]
        return func(*args, **kwargs)


@torch.no_grad()
def eval_outputs(module: nn.Module, inputs: Any, seed: int = 0) -> list[Tensor]:
    """Returns the tensors that a module outputs in eval mode; all else is as before, also what it may write into."""
    with eval_mode(module), lent_buffers(module), collections_kept(module), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        args = pytree.tree_map_only(Tensor, torch.clone, (inputs,) if isinstance(inputs, Tensor) else inputs)
        out = module(**args) if isinstance(args, Mapping) else module(*args)
        return [t.clone() for t in tensors_in(out)]


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yields the tensors in nested containers and dataclasses."""
    for leaf in pytree.tree_leaves(value):
        if isinstance(leaf, Tensor):
            yield leaf
        elif dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            yield from tensors_in([getattr(leaf, f.name) for f in dataclasses.fields(leaf)])


def equal_constants(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are one, or have the same dtype, device, shape and entries."""
    known = isinstance(a, Tensor) and isinstance(b, Tensor)  # and no generators
    return a is b or (known and (a.dtype, a.device, a.shape) == (b.dtype, b.device, b.shape) and torch.equal(a, b))


class Difference(NamedTuple):
    """How far an output is from the expected one; an infinity or NaN equals itself and nothing else."""

    error: float  # largest absolute difference
    scale: float  # largest finite expected magnitude
    tolerance: float  # relative error that rounding explains; 0 for numbers that are not rounded

    @property
    def relative(self) -> float:
        return self.error / max(self.scale, torch.finfo(torch.float32).tiny) if self.error else 0.0

    @property
    def is_rounding(self) -> bool:
        return self.relative <= self.tolerance

    def __str__(self) -> str:
        return f"{self.error:.3g} (largest output {self.scale:.3g})"


def difference(output: Tensor, expected: Tensor) -> Difference:
    """Compares two tensors of one shape; on the meta device they have no values that could differ."""
    if output.is_meta:
        return Difference(0.0, 0.0, 0.0)
    rounded = expected.is_floating_point() or expected.is_complex()
    dtype = torch.complex128 if expected.is_complex() else torch.float64
    a, b = output.detach().cpu().to(dtype), expected.detach().cpu().to(dtype)
    differ = (a != b) & ~(a.isnan() & b.isnan())
    errors, sizes = (a - b)[differ].abs(), b[torch.isfinite(b)].abs()
    error = float(errors.nan_to_num(math.inf, math.inf).max()) if len(errors) else 0.0
    scale = float(sizes.max()) if len(sizes) else 0.0
    return Difference(error, scale, TOLERANCE.get(expected.dtype, 1e-4) if rounded else 0.0)
