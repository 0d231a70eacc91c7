"""A small vision transformer (Dosovitskiy et al. 2020), its attention written out, qkv fused."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._scale import scaled


class Attention(nn.Module):
    """Multi-head self-attention by matmul and softmax; the code contains the head size as a number."""

    def __init__(self, size: int, heads: int, head_size: int) -> None:
        super().__init__()
        self.heads, self.head_size = heads, head_size
        self.qkv = nn.Linear(size, 3 * heads * head_size)
        self.proj = nn.Linear(heads * head_size, size)

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        qkv = self.qkv(x).reshape(n, t, 3, self.heads, self.head_size).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        weights = (q @ k.transpose(-2, -1) * self.head_size**-0.5).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(n, t, self.heads * self.head_size))


class Block(nn.Module):
    """Attention and a two-layer perceptron, each normalised first and added to the stream."""

    def __init__(self, size: int, heads: int, head_size: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(size)
        self.attention = Attention(size, heads, head_size)
        self.norm2 = nn.LayerNorm(size)
        self.fc1 = nn.Linear(size, hidden)
        self.fc2 = nn.Linear(hidden, size)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class ViT(nn.Module):
    """Patches, a class token, blocks, a linear layer on the class token.

    Args:
        image_size: height and width of the images.
        patch_size: height and width of a patch.
        in_channels: channels of the images.
        classes: number of classes.
        depth: number of blocks.
        heads: attention heads in each block, at any ``width``.
        width: factor on the stream (64), the head size (16) and the perceptrons (128).
    """

    def __init__(
        self,
        image_size: int = 32,
        patch_size: int = 4,
        *,
        in_channels: int = 3,
        classes: int = 10,
        depth: int = 4,
        heads: int = 4,
        width: float = 1.0,
    ) -> None:
        super().__init__()
        if image_size % patch_size:
            raise ValueError(f"patch_size {patch_size} does not divide image_size {image_size}")
        size = scaled(64, width)
        tokens = (image_size // patch_size) ** 2 + 1
        self.patches = nn.Conv2d(in_channels, size, patch_size, stride=patch_size)
        self.class_token = nn.Parameter(torch.zeros(1, 1, size))
        self.positions = nn.Parameter(0.02 * torch.randn(1, tokens, size))
        self.blocks = nn.Sequential(*(Block(size, heads, scaled(16, width), scaled(128, width)) for _ in range(depth)))
        self.norm = nn.LayerNorm(size)
        self.head = nn.Linear(size, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Maps images [n, in_channels, image_size, image_size] to logits [n, classes]."""
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.expand(x.shape[0], -1, -1), x], dim=1) + self.positions
        return self.head(self.norm(self.blocks(x))[:, 0])
