"""A character-level GPT (Radford et al. 2019)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._scale import scaled


class CausalAttention(nn.Module):
    """Causal self-attention by ``scaled_dot_product_attention``; q, k and v are split from one layer."""

    def __init__(self, size: int, heads: int, head_size: int) -> None:
        super().__init__()
        self.heads, self.head_size = heads, head_size
        self.qkv = nn.Linear(size, 3 * heads * head_size)
        self.proj = nn.Linear(heads * head_size, size)

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q, k, v = self.qkv(x).split(self.heads * self.head_size, dim=2)
        q = q.view(n, t, self.heads, self.head_size).transpose(1, 2)
        k = k.view(n, t, self.heads, self.head_size).transpose(1, 2)
        v = v.view(n, t, self.heads, self.head_size).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.proj(y.transpose(1, 2).contiguous().view(n, t, self.heads * self.head_size))


class Block(nn.Module):
    """Causal attention and a two-layer perceptron, each normalised first and added to the stream."""

    def __init__(self, size: int, heads: int, head_size: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(size)
        self.attention = CausalAttention(size, heads, head_size)
        self.norm2 = nn.LayerNorm(size)
        self.mlp = nn.Sequential(nn.Linear(size, hidden), nn.GELU(), nn.Linear(hidden, size))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """Token and position embeddings, blocks, a linear layer to the vocabulary.

    Args:
        vocabulary: number of different tokens.
        context: longest sequence.
        depth: number of blocks.
        heads: attention heads in each block, at any ``width``.
        tied: the last layer shares the weight of the token embedding.
        width: factor on the stream (64), the head size (16) and the perceptrons (256).
    """

    def __init__(
        self,
        vocabulary: int = 65,
        context: int = 64,
        *,
        depth: int = 4,
        heads: int = 4,
        tied: bool = False,
        width: float = 1.0,
    ) -> None:
        super().__init__()
        size = scaled(64, width)
        self.context = context
        self.tokens = nn.Embedding(vocabulary, size)
        self.positions = nn.Embedding(context, size)
        self.blocks = nn.ModuleList(Block(size, heads, scaled(16, width), scaled(256, width)) for _ in range(depth))
        self.norm = nn.LayerNorm(size)
        self.head = nn.Linear(size, vocabulary, bias=False)
        for embedding in (self.tokens, self.positions):
            nn.init.normal_(embedding.weight, std=0.02)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Maps token numbers [n, t] (int64, t up to ``context``) to logits [n, t, vocabulary]."""
        t = tokens.shape[1]
        if t > self.context:
            raise ValueError(f"a sequence of {t} tokens is longer than the context, {self.context}")
        x = self.tokens(tokens) + self.positions(torch.arange(t, device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))
