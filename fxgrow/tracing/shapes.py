"""Shapes of results that a few numbers tell: many of these operators are decomposed on meta tensors, which takes long.

A rule gets the tensors as they are (fake ones) and answers with a `Like`, or None where it does not know; contiguous
tensors only, where the order of the strides would be a question.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.pooling import _AdaptiveAvgPoolNd

Shape = tuple[int, ...]


class Like(NamedTuple):
    """What is known of a tensor before there is one."""

    shape: Shape
    stride: Shape
    dtype: torch.dtype


def shape_of(target: nn.Module | Callable[..., Any] | str, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """The result of a layer of torch.nn, of a function, or of a method by name: a `Like`, or nested tuples of them."""
    try:
        if not isinstance(target, nn.Module):
            return _CALLS[target](*args, **kwargs) if target in _CALLS else None
        kind, (x,) = type(target), args
        if kwargs or not isinstance(x, Tensor) or not x.is_floating_point():
            return None
        if kind in _LAYERS:
            return _LAYERS[kind](target, x)
        elementwise = kind.__module__ in ("torch.nn.modules.activation", "torch.nn.modules.dropout")
        return _like(x) if elementwise and kind not in _NOT_ELEMENTWISE else None
    except (TypeError, ValueError, RuntimeError):  # a call that no rule describes, or one that is wrong
        return None


def _like(x: Tensor, *_: Any, **__: Any) -> Like | None:
    """Elementwise operators keep the order of the strides, and leave no gaps."""
    stride = _packed(tuple(x.shape), x.stride())
    return Like(tuple(x.shape), stride, x.dtype) if stride is not None and x.is_floating_point() else None


def _new_like(x: Tensor, shape: Shape) -> Like:
    return Like(shape, _contiguous(shape), x.dtype)


def _new(x: Tensor, shape: Shape) -> Like | None:
    """A contiguous result, of a contiguous tensor."""
    return _new_like(x, shape) if x.stride() == _contiguous(tuple(x.shape)) else None


@functools.lru_cache(maxsize=4096)
def _contiguous(shape: Shape) -> Shape:
    strides = [1]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * max(size, 1))
    return tuple(reversed(strides)) if shape else ()


@functools.lru_cache(maxsize=4096)
def _packed(shape: Shape, stride: Shape) -> Shape | None:
    """Strides in the same order without gaps; None where the order is not clear."""
    if stride == _contiguous(shape):
        return stride
    if 0 in stride or 0 in shape or 1 in shape or len(set(stride)) < len(stride):
        return None
    order = sorted(range(len(shape)), key=lambda i: -stride[i])
    strides = dict(zip(order, _contiguous(tuple(shape[i] for i in order)), strict=True))
    return tuple(strides[i] for i in range(len(shape)))


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Like | None:
    fits = weight.dim() == 2 and x.dim() > 1 and x.shape[-1] == weight.shape[1] and x.dtype is weight.dtype
    fits = fits and (bias is None or bias.shape == weight.shape[:1])
    return _new_like(x, (*x.shape[:-1], weight.shape[0])) if fits else None


def _conv(module: _ConvNd, x: Tensor) -> Like | None:
    if module.transposed or x.dim() != len(module.kernel_size) + 2 or x.shape[1] != module.in_channels:
        return None
    if x.dtype is not module.weight.dtype or tuple(module.weight.shape[:1]) != (module.out_channels,):
        return None
    if module.padding == "same":
        sizes = tuple(x.shape[2:])
    else:
        padding = (0,) * len(module.kernel_size) if isinstance(module.padding, str) else module.padding
        geometry = zip(x.shape[2:], module.kernel_size, module.stride, padding, module.dilation, strict=True)
        sizes = tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in geometry)
    return _new(x, (x.shape[0], module.out_channels, *sizes)) if min(sizes) > 0 else None


def _channels(module: Any, x: Tensor) -> Like | None:
    if isinstance(module, _BatchNorm):
        module._check_input_dim(x)
        count = module.num_features
    else:
        count = module.num_channels
    state = [t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None and t.dim()]
    fits = x.dim() > 1 and x.shape[1] == count and all(t.shape == x.shape[1:2] for t in state)
    return _new(x, tuple(x.shape)) if fits else None


def _batch_norm(x: Tensor, running_mean: Any, running_var: Any, *state: Any, **_: Any) -> Like | None:
    vectors = [t for t in (running_mean, running_var, *state) if isinstance(t, Tensor)]
    return _new(x, tuple(x.shape)) if x.dim() > 1 and all(t.shape == x.shape[1:2] for t in vectors) else None


def _layer_norm(x: Tensor, shape: Sequence[int], weight: Any = None, bias: Any = None, eps: float = 0) -> Like | None:
    shape = tuple(shape)
    fits = tuple(x.shape[-len(shape) :]) == shape and all(p is None or p.shape == shape for p in (weight, bias))
    return _new_like(x, tuple(x.shape)) if fits and x.is_floating_point() else None


def _pooled(module: _AdaptiveAvgPoolNd, x: Tensor) -> Like | None:
    n = int(type(module).__name__[-2])
    given = module.output_size
    sizes = tuple(given) if isinstance(given, (tuple, list)) else (given,) * n
    if x.dim() != n + 2 or 0 in x.shape:
        return None
    return _new(x, (*x.shape[:2], *(s if o is None else o for s, o in zip(x.shape[2:], sizes, strict=True))))


def _recurrent(layer: nn.RNNBase, x: Tensor) -> Any:
    """A batch of sequences; the layer computes with time first, and gives back a view."""
    if x.dim() != 3 or x.shape[-1] != layer.input_size or x.dtype is not layer.weight_ih_l0.dtype:
        return None
    batch, time = (x.shape[0], x.shape[1]) if layer.batch_first else (x.shape[1], x.shape[0])
    ways, size = 1 + layer.bidirectional, layer.proj_size or layer.hidden_size
    out = _new_like(x, (time, batch, ways * size))
    if layer.batch_first:
        t, b, c = out.stride
        out = Like((batch, time, ways * size), (b, t, c), x.dtype)
    hidden = _new_like(x, (ways * layer.num_layers, batch, size))
    if isinstance(layer, nn.LSTM):
        return out, (hidden, _new_like(x, (ways * layer.num_layers, batch, layer.hidden_size)))
    return out, hidden


def _attended(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, dropout_p: float = 0.0, *_: Any, **__: Any
) -> Like | None:
    """Fused kernels keep the layout of the queries; they need its last dimension dense."""
    shape = tuple(query.shape)
    same = key.shape[:-2] == query.shape[:-2] and value.shape[-1] == shape[-1] == key.shape[-1]
    fits = same and query.dim() == 4 and dropout_p == 0 and key.shape[-2] == value.shape[-2]
    fits = fits and query.dtype is key.dtype is value.dtype and value.shape[:-2] == query.shape[:-2]
    if not fits:
        return None
    return _like(query) if query.stride()[-1] == 1 else _new_like(query, shape)


def _arithmetic(a: Any, b: Any, **options: Any) -> Like | None:
    """Tensors of one shape, or one of them broadcast."""
    if options:
        return None
    tensors = [t for t in (a, b) if isinstance(t, Tensor)]
    if not all(isinstance(t, (Tensor, int, float)) for t in (a, b)):
        return None
    dtype = torch.result_type(a, b)
    if not dtype.is_floating_point:
        return None  # division, and powers of integers, have types of their own
    shapes = [tuple(t.shape) for t in tensors]
    shape = shapes[0] if len(set(shapes)) == 1 else tuple(torch.broadcast_shapes(*shapes))
    if all(t.stride() == _contiguous(tuple(t.shape)) for t in tensors):
        return Like(shape, _contiguous(shape), dtype)
    stride = _packed(shape, tensors[0].stride())
    same = stride is not None and len({(tuple(t.shape), t.stride()) for t in tensors}) == 1
    return Like(shape, stride, dtype) if same and stride is not None else None


def _mean(x: Tensor, dim: int | Sequence[int], keepdim: bool = False) -> Like | None:
    dims = {d % x.dim() for d in ((dim,) if isinstance(dim, int) else dim)}
    if not dims or not x.is_floating_point():
        return None
    sizes = tuple(1 if i in dims else s for i, s in enumerate(x.shape) if keepdim or i not in dims)
    return _new(x, sizes)


def _resized(
    x: Tensor, size: Any = None, scale_factor: Any = None, mode: str = "nearest", **options: Any
) -> Like | None:
    n = x.dim() - 2
    if size is not None:
        sizes = tuple(size) if isinstance(size, (tuple, list)) else (size,) * n
    else:
        factors = tuple(scale_factor) if isinstance(scale_factor, (tuple, list)) else (scale_factor,) * n
        sizes = tuple(int(s * f) for s, f in zip(x.shape[2:], factors, strict=True))
    known = {"nearest", "nearest-exact", "area", "linear", "bilinear", "bicubic", "trilinear"}
    fits = mode in known and all(type(s) is int and s > 0 for s in sizes) and len(sizes) == n and 0 not in x.shape
    return _new(x, (*x.shape[:2], *sizes)) if fits and x.is_floating_point() else None


_NOT_ELEMENTWISE = {nn.GLU, nn.PReLU, nn.MultiheadAttention}
_LAYERS: dict[type, Callable[[Any, Tensor], Any]] = {
    nn.Linear: lambda layer, x: _linear(x, layer.weight, layer.bias),
    nn.LayerNorm: lambda layer, x: _layer_norm(x, layer.normalized_shape, layer.weight, layer.bias),
    nn.Identity: lambda layer, x: Like(tuple(x.shape), x.stride(), x.dtype),
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), _conv),
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.GroupNorm), _channels),
    **dict.fromkeys((nn.Softmax, nn.LogSoftmax, nn.Softmax2d, nn.Softmin), lambda layer, x: _new(x, tuple(x.shape))),
    **dict.fromkeys((nn.RNN, nn.LSTM, nn.GRU), _recurrent),
    **dict.fromkeys((nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d), _pooled),
}
_ELEMENTWISE = "relu relu6 gelu silu mish hardswish hardsigmoid sigmoid tanh elu leaky_relu softplus dropout".split()
_CALLS: dict[Any, Callable[..., Like | None]] = {
    F.linear: _linear,
    F.layer_norm: _layer_norm,
    F.interpolate: _resized,
    F.scaled_dot_product_attention: _attended,
    torch.mean: _mean,
    "mean": _mean,
    **{getattr(F, name): _like for name in _ELEMENTWISE},
    F.batch_norm: _batch_norm,
    **{getattr(torch, name): _like for name in ("relu", "sigmoid", "tanh")},
    **dict.fromkeys(("relu", "sigmoid", "tanh"), _like),
    **{getattr(operator, name): _arithmetic for name in ("add", "sub", "mul", "truediv")},
    **{getattr(torch, name): _arithmetic for name in ("add", "sub", "mul", "div")},
    **dict.fromkeys(("add", "sub", "mul", "div"), _arithmetic),
}
