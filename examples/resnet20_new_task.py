"""A ResNet-20 trained on CIFAR-10 meets Fashion-MNIST: a new head for one epoch, then growth.

    FXGROW_DATA=<folder> python -m examples.resnet20_new_task

The folder holds `resnet20_cifar10.pt` and `fashion_mnist.npz`, see `examples/data.py`.

HEADER
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxgrow
from examples.data import fashion_mnist, resnet20_weights
from models import resnet20

IMAGES, BATCH = 4000, 128


def as_cifar(x: Tensor) -> Tensor:
    """Clothes [n, 1, 28, 28] in [0, 1] as the backbone takes images: [n, 3, 32, 32], ImageNet's statistics."""
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    return (F.pad(x, (2, 2, 2, 2)).expand(-1, 3, -1, -1) - mean) / std


def train(net: nn.Module, parameters: list[nn.Parameter], batches: list[tuple[Tensor, Tensor]], rate: float) -> None:
    net.train()
    optimizer = torch.optim.SGD(parameters, rate, momentum=0.9, weight_decay=5e-4)
    for x, y in batches:
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()


@torch.no_grad()
def test(net: nn.Module, x: Tensor, y: Tensor) -> str:
    net.eval()
    logits = torch.cat([net(part) for part in x.split(500)])
    accuracy = 100 * float((logits.argmax(1) == y).float().mean())
    return f"test loss {float(F.cross_entropy(logits, y)):.4f}, accuracy {accuracy:.2f} %"


def main() -> None:
    try:
        weights, data = resnet20_weights(), fashion_mnist(IMAGES, 2000)
    except FileNotFoundError as error:
        sys.exit(f"{error}")
    torch.manual_seed(0)
    net = resnet20()
    net.load_state_dict(weights)
    net.linear = nn.Linear(net.linear.in_features, 10)
    x_test = as_cifar(data.x_test)
    batches = [(as_cifar(data.x_train[i]), data.y_train[i]) for i in torch.randperm(len(data.x_train)).split(BATCH)]
    train(net, list(net.linear.parameters()), batches, 0.05)
    print(f"new head:            {test(net, x_test, data.y_test)}")

    grown = fxgrow.grow(net, batches, samples=2048, progress=False)
    print(f"grown, untrained:    {test(grown, x_test, data.y_test)}\n\n{grown.meta['fxgrow']}\n")

    train(net, list(net.parameters()), batches, 0.01)
    train(grown, list(grown.parameters()), batches, 0.01)
    print(f"one more epoch, net never grown: {test(net, x_test, data.y_test)}")
    print(f"one more epoch, grown net:       {test(grown, x_test, data.y_test)}")


if __name__ == "__main__":
    main()
