"""A small U-Net (Ronneberger et al. 2015)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ._scale import scaled


def double_conv(channels: int, new_channels: int) -> nn.Sequential:
    """Two 3x3 convolutions that keep the image's size, each with BatchNorm and ReLU."""
    return nn.Sequential(
        nn.Conv2d(channels, new_channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(new_channels),
        nn.ReLU(inplace=True),
        nn.Conv2d(new_channels, new_channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(new_channels),
        nn.ReLU(inplace=True),
    )


class UNet(nn.Module):
    """Two halvings, two transposed convolutions back, a concatenation at each level.

    Args:
        in_channels: channels of the images.
        classes: number of classes of a pixel.
        width: factor on the channels (16, 32 and 64).
    """

    def __init__(self, in_channels: int = 1, classes: int = 2, *, width: float = 1.0) -> None:
        super().__init__()
        fine, middle, coarse = (scaled(size, width) for size in (16, 32, 64))
        self.down1 = double_conv(in_channels, fine)
        self.down2 = double_conv(fine, middle)
        self.bottom = double_conv(middle, coarse)
        self.pool = nn.MaxPool2d(2)
        self.raise2 = nn.ConvTranspose2d(coarse, middle, 2, stride=2)
        self.up2 = double_conv(2 * middle, middle)
        self.raise1 = nn.ConvTranspose2d(middle, fine, 2, stride=2)
        self.up1 = double_conv(2 * fine, fine)
        self.head = nn.Conv2d(fine, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Maps images [n, in_channels, h, w], h and w multiples of 4, to logits [n, classes, h, w]."""
        fine = self.down1(x)
        middle = self.down2(self.pool(fine))
        x = self.bottom(self.pool(middle))
        x = self.up2(torch.cat([self.raise2(x), middle], dim=1))
        x = self.up1(torch.cat([self.raise1(x), fine], dim=1))
        return self.head(x)
