"""The networks that examples, tests and benchmarks grow.

Plain PyTorch: nothing here imports fxgrow or was written for it. Every network takes ``width``, a factor
on all its hidden widths.
"""

from .decoder import Decoder
from .gpt import GPT
from .mlp import MLP
from .resnet import DigitsResNet, ResNet, resnet20
from .unet import UNet
from .vgg import VGG, vgg11, vgg11_bn
from .vit import ViT

__all__ = ["GPT", "MLP", "VGG", "Decoder", "DigitsResNet", "ResNet", "UNet", "ViT", "resnet20", "vgg11", "vgg11_bn"]
