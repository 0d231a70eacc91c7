"""`nn.MultiheadAttention` by its parts, so that a graph shows queries, keys, values and heads.

The module keeps its parameters and their names; only its call is traced through this instead of staying one node.
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
    query, need_weights = given["query"], given["need_weights"]
    batch_first = m.batch_first or query.dim() == 2
    q, k, v = _projected(m, *(x if batch_first else x.transpose(0, 1) for x in (query, given["key"], given["value"])))
    q, k, v = (t.unflatten(-1, (m.num_heads, m.head_dim)).transpose(-3, -2) for t in (q, k, v))
    mask = _mask(m, q, given["attn_mask"], given["key_padding_mask"])
    weights = None
    if need_weights or m.dropout:
        # the fused operator takes a number, which could not follow the mode
        scores = (q * m.head_dim**-0.5) @ k.transpose(-2, -1)
        weights = (scores if mask is None else scores + mask).softmax(-1)
        weights = F.dropout(weights, m.dropout, m.training)
        y = weights @ v
        weights = (weights.mean(-3) if given["average_attn_weights"] else weights) if need_weights else None
    else:
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    if query.dim() == 2:
        return m.out_proj(y.transpose(0, 1).flatten(1)), weights
    # in memory steps come first, as those of the module do: dropout draws its numbers in that order
    y = m.out_proj(y.permute(2, 0, 1, 3).flatten(2))
    return y.transpose(0, 1) if m.batch_first else y, weights


def _projected(m: nn.MultiheadAttention, *inputs: Tensor) -> tuple[Tensor, ...]:
    """Returns queries, keys and values; in self-attention they come from one product."""
    if m._qkv_same_embed_dim and len({getattr(x, "node", x) for x in inputs}) == 1:
        return F.linear(inputs[0], m.in_proj_weight, m.in_proj_bias).chunk(3, -1)
    weights = (
        m.in_proj_weight.chunk(3) if m._qkv_same_embed_dim else (m.q_proj_weight, m.k_proj_weight, m.v_proj_weight)
    )
    biases = (None,) * 3 if m.in_proj_bias is None else m.in_proj_bias.chunk(3)
    return tuple(F.linear(*given) for given in zip(inputs, weights, biases, strict=True))


def _mask(m: nn.MultiheadAttention, q: Tensor, attn: Tensor | None, padding: Tensor | None) -> Tensor | None:
    """Returns one mask that is added to the scores."""
    masks = []
    if attn is not None:
        attn = torch.zeros_like(attn, dtype=q.dtype).masked_fill(attn, -torch.inf) if attn.dtype == torch.bool else attn
        masks.append(attn.unflatten(0, (-1, m.num_heads)) if attn.dim() == 3 and q.dim() == 4 else attn)
    if padding is not None:
        if padding.dtype == torch.bool:
            padding = torch.zeros_like(padding, dtype=q.dtype).masked_fill(padding, -torch.inf)
        masks.append(padding[..., None, None, :])
    return sum(masks[1:], masks[0]) if masks else None
