"""A small decoder as large language models are built today: RMSNorm, rotary positions, SwiGLU (Touvron et al. 2023)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._scale import scaled


class Attention(nn.Module):
    """Causal self-attention with rotary positions; the code contains the number of heads, or their size."""

    def __init__(self, size: int, heads: int, head_size: int, fixed_heads: bool) -> None:
        super().__init__()
        self.shape = (heads, -1) if fixed_heads else (-1, head_size)
        self.q, self.k, self.v = (nn.Linear(size, heads * head_size, bias=False) for _ in range(3))
        self.o = nn.Linear(heads * head_size, size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        n, t, _ = x.shape
        q, k, v = (layer(x).view(n, t, *self.shape).transpose(1, 2) for layer in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(_rotated(q, cos, sin), _rotated(k, cos, sin), v, is_causal=True)
        return self.o(y.transpose(1, 2).reshape(n, t, -1))


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], -1) * sin


class SwiGLU(nn.Module):
    """Two layers multiplied, one of them through a SiLU, and a third."""

    def __init__(self, size: int, hidden: int) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(size, hidden, bias=False), nn.Linear(size, hidden, bias=False)
        self.down = nn.Linear(hidden, size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """Attention and a gated perceptron, each normalised first and added to the stream."""

    def __init__(self, size: int, heads: int, head_size: int, hidden: int, fixed_heads: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(size, eps=1e-5), nn.RMSNorm(size, eps=1e-5)
        self.attention = Attention(size, heads, head_size, fixed_heads)
        self.mlp = SwiGLU(size, hidden)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x), cos, sin)
        return x + self.mlp(self.norm2(x))


class Decoder(nn.Module):
    """Token embedding, blocks, a linear layer to the vocabulary.

    Args:
        vocabulary: number of different tokens.
        context: longest sequence.
        depth: number of blocks.
        heads: attention heads in each block, of ``head_size``.
        head_size: even.
        fixed_heads: whether the code contains the number of heads or their size; the other follows from the layers.
        width: factor on the stream (64) and the perceptrons (128).
    """

    def __init__(
        self,
        vocabulary: int = 65,
        context: int = 64,
        *,
        depth: int = 2,
        heads: int = 4,
        head_size: int = 16,
        fixed_heads: bool = False,
        width: float = 1.0,
    ) -> None:
        super().__init__()
        size = scaled(64, width)
        self.tokens = nn.Embedding(vocabulary, size)
        self.blocks = nn.ModuleList(
            Block(size, heads, head_size, scaled(128, width), fixed_heads) for _ in range(depth)
        )
        self.norm = nn.RMSNorm(size, eps=1e-5)
        self.head = nn.Linear(size, vocabulary, bias=False)
        nn.init.normal_(self.tokens.weight, std=0.02)
        angles = torch.arange(context)[:, None] * 10000.0 ** -(torch.arange(0, head_size, 2) / head_size)
        angles = torch.cat([angles, angles], -1)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Maps token numbers [n, t] (int64, t up to ``context``) to logits [n, t, vocabulary]."""
        t = tokens.shape[1]
        x = self.tokens(tokens)
        for block in self.blocks:
            x = block(x, self.cos[:t], self.sin[:t])
        return self.head(self.norm(x))
