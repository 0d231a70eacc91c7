"""`nn.MultiheadAttention` by its parts, so that a graph shows queries, keys, values and heads.

The module keeps its parameters and their names; only its call, or that of the function, is traced through this instead
of staying one node.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def multihead_attention(m: nn.MultiheadAttention, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
    """Returns what `m(*args, **kwargs)` returns, where `m` adds no learnt or zero key to the given ones."""
    call = inspect.signature(nn.MultiheadAttention.forward).bind(m, *args, **kwargs)
    call.apply_defaults()
    given = call.arguments
    batch_first = m.batch_first or given["query"].dim() == 2
    inputs = (given[name] if batch_first else given[name].transpose(0, 1) for name in ("query", "key", "value"))
    q, k, v = _projected(m, *inputs)  # a proxy can be unpacked, but not iterated over
    q, k, v = (t.unflatten(-1, (m.num_heads, m.head_dim)).transpose(-3, -2) for t in (q, k, v))
    y, weights = _attention(q, k, v, m.num_heads, given, (m.dropout, m))
    y = m.out_proj(y)
    return y if y.dim() == 2 or not m.batch_first else y.transpose(0, 1), weights


def multi_head_attention_forward(*args: Any, **kwargs: Any) -> tuple[Tensor, Any] | None:
    """Returns what the function of this name returns; None where it adds keys to the given ones."""
    call = inspect.signature(F.multi_head_attention_forward).bind(*args, **kwargs)
    call.apply_defaults()
    given, heads = call.arguments, call.arguments["num_heads"]
    if any(given[name] is not None for name in ("bias_k", "bias_v", "static_k", "static_v")) or given["add_zero_attn"]:
        return None
    if given["use_separate_proj_weight"]:
        a, b, c = (given[f"{name}_proj_weight"] for name in "qkv")
    else:
        a, b, c = given["in_proj_weight"].chunk(3)
    d, e, f = (None,) * 3 if given["in_proj_bias"] is None else given["in_proj_bias"].chunk(3)
    inputs = (x if x.dim() == 2 else x.transpose(0, 1) for x in (given["query"], given["key"], given["value"]))
    parts = (F.linear(*part) for part in zip(inputs, (a, b, c), (d, e, f), strict=True))
    q, k, v = (t.unflatten(-1, (heads, t.shape[-1] // heads)).transpose(-3, -2) for t in parts)
    y, attention = _attention(q, k, v, heads, given, (given["dropout_p"], given["training"]))
    return F.linear(y, given["out_proj_weight"], given["out_proj_bias"]), attention


def _attention(
    q: Tensor, k: Tensor, v: Tensor, heads: int, given: dict[str, Any], dropout: tuple[float, Any]
) -> tuple[Tensor, Any]:
    """Returns the outputs of the heads side by side, steps first, and the weights if they are asked for."""
    mask = _mask(heads, q, given["attn_mask"], given["key_padding_mask"])
    (rate, mode), need_weights, weights = dropout, given["need_weights"], None
    if need_weights or rate:
        # the fused operator takes a number, which could not follow the mode
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        weights = (scores if mask is None else scores + mask).softmax(-1)
        weights = F.dropout(weights, rate, mode.training if isinstance(mode, nn.Module) else mode)
        y = weights @ v
        weights = (weights.mean(-3) if given["average_attn_weights"] else weights) if need_weights else None
    else:
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    # in memory steps come first, as those of the module do: dropout draws its numbers in that order
    return y.transpose(0, 1).flatten(1) if y.dim() == 3 else y.permute(2, 0, 1, 3).flatten(2), weights


def _projected(m: nn.MultiheadAttention, *inputs: Tensor) -> tuple[Tensor, ...]:
    """Returns queries, keys and values; in self-attention they come from one product."""
    if m._qkv_same_embed_dim and len({getattr(x, "node", x) for x in inputs}) == 1:
        return F.linear(inputs[0], m.in_proj_weight, m.in_proj_bias).chunk(3, -1)
    weights = (
        m.in_proj_weight.chunk(3) if m._qkv_same_embed_dim else (m.q_proj_weight, m.k_proj_weight, m.v_proj_weight)
    )
    biases = (None,) * 3 if m.in_proj_bias is None else m.in_proj_bias.chunk(3)
    return tuple(F.linear(*given) for given in zip(inputs, weights, biases, strict=True))


def _mask(heads: int, q: Tensor, attn: Tensor | None, padding: Tensor | None) -> Tensor | None:
    """Returns one mask that is added to the scores."""
    masks = []
    if attn is not None:
        attn = torch.zeros_like(attn, dtype=q.dtype).masked_fill(attn, -torch.inf) if attn.dtype == torch.bool else attn
        masks.append(attn.unflatten(0, (-1, heads)) if attn.dim() == 3 and q.dim() == 4 else attn)
    if padding is not None:
        if padding.dtype == torch.bool:
            padding = torch.zeros_like(padding, dtype=q.dtype).masked_fill(padding, -torch.inf)
        masks.append(padding[..., None, None, :])
    return sum(masks[1:], masks[0]) if masks else None
