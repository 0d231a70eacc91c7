"""Runs a module for its outputs: in eval mode, without gradients, and compared within one tolerance."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree


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


#: largest relative difference of outputs that rounding explains, per dtype
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


@torch.no_grad()
def outputs(gm: fx.GraphModule, inputs: tuple[Any, ...]) -> list[Tensor]:
    """The tensors `gm` returns in eval mode, with modes and random state as before."""
    modes = [(m, m.training) for m in gm.modules()]
    gm.eval()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            out = gm(*inputs)
    finally:
        for m, training in modes:
            m.training = training
    return [t for t in pytree.tree_leaves(out) if isinstance(t, Tensor)]
