"""Residual networks for small images (He et al. 2015, section 4.2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from ._scale import scaled

Shortcut = Literal["pad", "conv"]


class PadShortcut(nn.Module):
    """Option A of the paper: every ``stride``-th pixel, zero channels in front and behind; no parameters."""

    def __init__(self, channels: int, new_channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.front = (new_channels - channels) // 2
        self.back = new_channels - channels - self.front

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, self.front, self.back))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm, and a shortcut around them."""

    def __init__(self, channels: int, new_channels: int, stride: int, shortcut: Shortcut) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, new_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(new_channels)
        self.conv2 = nn.Conv2d(new_channels, new_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(new_channels)
        self.shortcut: nn.Module
        if stride == 1 and channels == new_channels:
            self.shortcut = nn.Identity()
        elif shortcut == "pad":
            self.shortcut = PadShortcut(channels, new_channels, stride)
        else:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels, new_channels, 1, stride, bias=False), nn.BatchNorm2d(new_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + self.shortcut(x))


class ResNet(nn.Module):
    """A 3x3 stem, stages of basic blocks, a global average pool, a linear layer.

    Args:
        blocks: number of blocks in each stage.
        sizes: channels of each stage before ``width``; each stage after the first halves the image.
        shortcut: where the shape changes, ``"pad"`` (no parameters) or ``"conv"`` (1x1, with BatchNorm).
        in_channels: channels of the images.
        classes: number of classes.
        width: factor on ``sizes``.
    """

    def __init__(
        self,
        blocks: Sequence[int] = (3, 3, 3),
        sizes: Sequence[int] = (16, 32, 64),
        *,
        shortcut: Shortcut = "pad",
        in_channels: int = 3,
        classes: int = 10,
        width: float = 1.0,
    ) -> None:
        super().__init__()
        if shortcut not in ("pad", "conv"):
            raise ValueError(f'shortcut is "pad" or "conv", got {shortcut!r}')
        if len(blocks) != len(sizes):
            raise ValueError(f"blocks and sizes have one entry per stage, got {len(blocks)} and {len(sizes)}")
        channels = scaled(sizes[0], width)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.stages = len(blocks)
        for stage, (count, size) in enumerate(zip(blocks, sizes, strict=True), start=1):
            layer = nn.Sequential()
            for index in range(count):
                stride = 2 if stage > 1 and index == 0 else 1
                layer.append(BasicBlock(channels, scaled(size, width), stride, shortcut))
                channels = scaled(size, width)
            self.add_module(f"layer{stage}", layer)
        self.linear = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Maps images [n, in_channels, h, w] to logits [n, classes]."""
        x = F.relu(self.bn1(self.conv1(x)))
        for stage in range(1, self.stages + 1):
            x = getattr(self, f"layer{stage}")(x)
        return self.linear(x.mean((2, 3)))


def resnet20(width: float = 1.0, *, shortcut: Shortcut = "pad", in_channels: int = 3, classes: int = 10) -> ResNet:
    """The 20-layer network for CIFAR; 269,722 parameters at width 1."""
    return ResNet(width=width, shortcut=shortcut, in_channels=in_channels, classes=classes)


class DigitsResNet(ResNet):
    """Two stages of one block for 8x8 images; at width 0.25 its layers have 4 and 8 channels."""

    def __init__(self, width: float = 1.0, *, in_channels: int = 1, classes: int = 10) -> None:
        super().__init__((1, 1), (16, 32), shortcut="conv", in_channels=in_channels, classes=classes, width=width)
