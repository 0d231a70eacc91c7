"""Norm modules that people write themselves, recognised by what they compute; each is one node of the graph.

These are RMSNorm and LayerNorm over the last dimension, and global response normalisation (ConvNeXt V2).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fxgrow.axes.axes import Dims
from fxgrow.ops.context import Context
from fxgrow.ops.normalization import norm_over_last
from fxgrow.ops.registry import RECOGNISED

_EPS = ("eps", "variance_epsilon", "epsilon")


@dataclass(frozen=True)
class NormForm:
    """Which norm a module computes.

    "rms": `x / sqrt(mean(x^2) + eps) * (weight + offset)`; "layer": the same of x less its mean; "response":
    `x + weight * x * r / (mean(r) + eps) + bias`, r the L2 norm of each channel.
    """

    kind: str
    eps: str  # name of the attribute
    offset: float = 0.0
    dim: int = -1  # of the channels


_forms: WeakKeyDictionary[nn.Module, NormForm | None] = WeakKeyDictionary()


def norm_form(module: nn.Module) -> NormForm | None:
    """The norm that a module computes, if any."""
    if module not in _forms:
        _forms[module] = _recognise(module)
    return _forms[module]


def _recognise(module: nn.Module) -> NormForm | None:
    """Chooses the possible forms by the module's parts, then compares them with its output on random numbers."""
    parameters = dict(module.named_parameters())
    names = [n for n in _EPS if isinstance(getattr(module, n, None), float)]
    plain = not [*module.children(), *module.buffers()] and all(p.dim() == 1 for p in parameters.values())
    if "norm" not in type(module).__name__.lower() or len(names) != 1 or not plain:
        return None
    if parameters.keys() == {"weight"}:
        shape: tuple[int, ...] = (3, 2)
        forms = [NormForm(kind, names[0], offset) for kind in ("rms", "layer") for offset in (0.0, 1.0)]
    elif parameters.keys() == {"weight", "bias"} and not type(module).__module__.startswith("torch.nn."):
        shape = (2, 3, 5)
        forms = [NormForm("response", names[0], dim=dim) for dim in (3, 1)]
    else:
        return None
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*shape, len(parameters["weight"]), generator=generator)
    try:
        test_copy: Any = copy.deepcopy(module).to("cpu", torch.float32)
        setattr(test_copy, names[0], 0.3)  # large, so that its place in the formula shows
        for p in test_copy.parameters():
            p.data = torch.randn(p.shape, generator=generator)
    except Exception:
        return None
    return next((form for form in forms if _computes(test_copy, form, x)), None)


def _computes(module: Any, form: NormForm, x: Tensor) -> bool:
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            out = module(x.movedim(-1, form.dim)).movedim(form.dim, -1)
            return out.shape == x.shape and torch.allclose(out, _expected(module, form, x), rtol=1e-4, atol=1e-5)
    except Exception:
        return False  # not a norm of one such tensor


def _expected(module: Any, form: NormForm, x: Tensor) -> Tensor:
    eps = getattr(module, form.eps)
    if form.kind == "response":
        response = x.square().sum((1, 2), keepdim=True).sqrt()
        y = x * response / (response.mean(3, keepdim=True) + eps)
        return x + module.weight * y + module.bias  # type: ignore[no-any-return]
    if form.kind == "layer":
        x = x - x.mean(-1, keepdim=True)
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * (module.weight + form.offset)  # type: ignore[no-any-return]


def custom_norm(ctx: Context, x: Dims) -> Dims:
    form: Any = norm_form(ctx.module)
    eps = float(getattr(ctx.module, form.eps))
    if form.kind == "response":
        return _response_norm(ctx, x, form, eps)
    ctx.attribute("normalized_shape", x[-1], 0)
    weight = ctx.parameter("weight")
    return norm_over_last(ctx, x, 1, form.kind, weight, None, eps, eps_name=form.eps, offset=form.offset)


RECOGNISED.append((lambda module: norm_form(module) is not None, custom_norm))


def _response_norm(ctx: Context, x: Dims, form: NormForm, eps: float) -> Dims:
    """New channels that are zero have no response, but count in the mean of the responses."""
    weight, bias = ctx.parameter("weight"), ctx.parameter("bias")
    for p in filter(None, (weight, bias)):
        ctx.same(p[0], x[form.dim])
        ctx.fill(p, 0.0)
    name = weight and weight.parameter
    ctx.require_state("response", ctx.node.all_input_nodes[0], x[form.dim], weight=name, eps=eps, eps_name=form.eps)
    return x
