"""VGG-11 for 32x32 images (Simonyan and Zisserman 2014), with one linear layer as classifier."""

from __future__ import annotations

from torch import Tensor, nn

from ._scale import scaled

_LAYOUT = (64, "pool", 128, "pool", 256, 256, "pool", 512, 512, "pool", 512, 512, "pool")


class VGG(nn.Module):
    """3x3 convolutions and five poolings, which leave a 1x1 map for the linear layer.

    Args:
        width: factor on the channels.
        batch_norm: BatchNorm after each convolution.
        in_channels: channels of the images.
        classes: number of classes.
    """

    def __init__(self, width: float = 1.0, *, batch_norm: bool = True, in_channels: int = 3, classes: int = 10) -> None:
        super().__init__()
        self.features = nn.Sequential()
        channels = in_channels
        for entry in _LAYOUT:
            if isinstance(entry, str):
                self.features.append(nn.MaxPool2d(2))
                continue
            size = scaled(entry, width)
            self.features.append(nn.Conv2d(channels, size, 3, padding=1))
            if batch_norm:
                self.features.append(nn.BatchNorm2d(size))
            self.features.append(nn.ReLU(inplace=True))
            channels = size
        self.classifier = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Maps images [n, in_channels, 32, 32] to logits [n, classes]."""
        return self.classifier(self.features(x).flatten(1))


def vgg11(width: float = 1.0, *, in_channels: int = 3, classes: int = 10) -> VGG:
    """VGG-11 without normalisation."""
    return VGG(width, batch_norm=False, in_channels=in_channels, classes=classes)


def vgg11_bn(width: float = 1.0, *, in_channels: int = 3, classes: int = 10) -> VGG:
    """VGG-11 with BatchNorm."""
    return VGG(width, batch_norm=True, in_channels=in_channels, classes=classes)
