"""Networks that tests save, their inputs and outputs; the process that loads them imports this file too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fxgrow.integrations._torchvision import import_torchvision


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


def convolutions(hidden: int = 4, classes: int = 2) -> nn.Module:
    layers = [nn.Conv2d(3, hidden, 3), nn.BatchNorm2d(hidden), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(hidden, classes))


class Attention(nn.Module):
    """A scale and sizes written as numbers, a norm over a stream, a tied embedding, a mask that is no state."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.norm, self.last = nn.LayerNorm(8), nn.LayerNorm(8)
        self.qkv = nn.Linear(8, 24)
        self.out = nn.Linear(8, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("mask", torch.ones(16, 16).tril().log(), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        b, n, _ = x.shape
        q, k, v = self.qkv(self.norm(x)).view(b, n, 3, 2, 4).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2) * 4**-0.5 + self.mask[:n, :n]
        x = x + self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, n, 8))
        return self.head(self.last(x))


def resnet18() -> nn.Module:
    return import_torchvision().models.resnet18()


def vit_tiny() -> nn.Module:
    import_torchvision()
    import timm

    return timm.create_model("vit_tiny_patch16_224")


def vit_small_enough() -> nn.Module:
    import_torchvision()
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(img_size=16, patch_size=8, embed_dim=12, depth=1, num_heads=2, num_classes=5)


def gpt2() -> nn.Module:
    import_torchvision()
    from transformers import GPT2Config, GPT2LMHeadModel

    numbers = {"n_layer": 2, "n_embd": 32, "n_head": 4, "vocab_size": 50, "n_positions": 16}
    return GPT2LMHeadModel(GPT2Config(**numbers, bos_token_id=0, eos_token_id=0))


def images(size: int, n: int = 4) -> tuple[Tensor]:
    return (torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(3)),)


def tokens(n: int = 4) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(50, (n, 8), generator=torch.Generator().manual_seed(3))}


INPUTS: dict[str, Callable[[], Any]] = {
    "mlp": lambda: (torch.randn(5, 3, generator=torch.Generator().manual_seed(3)),),
    "convolutions": lambda: images(8),
    "Attention": lambda: (torch.randint(11, (2, 5), generator=torch.Generator().manual_seed(3)),),
    "resnet18": lambda: images(64),
    "vit_tiny": lambda: images(224, 2),
    "vit_small_enough": lambda: images(16),
    "gpt2": tokens,
}


def outputs(net: nn.Module, inputs: Any) -> Tensor:
    with torch.no_grad():
        out = net.eval()(**inputs) if isinstance(inputs, dict) else net.eval()(*inputs)
    return out if isinstance(out, Tensor) else out["logits"]
