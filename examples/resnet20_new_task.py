"""A ResNet-20 trained on CIFAR-10 meets Fashion-MNIST: a new head for one epoch, then growth.

    FXGROW_DATA=<folder> python -m examples.resnet20_new_task

The folder holds `resnet20_cifar10.pt` and `fashion_mnist.npz`, see `examples/data.py`.

Its output, on 2 busy cores:

    new head:            test loss 1.4565, accuracy 49.35 %
    grown, untrained:    test loss 1.0913, accuracy 63.85 %

    Growth by default: 83 units, 269,722 → 336,416 parameters (+24.7%)
    held-out loss: eval 1.4546 → 1.0919 (-24.9%), train 1.4540 → 1.1424 (-21.4%)
    gamma: 13.5 applied, 53.8 best on held-out batches
    loss along gamma: 0: 1.4546  13.5: 1.0919  26.9: 0.8928  38.1: 0.8097  53.8: 0.7683  76.1: 0.7962  108: 0.9248
                      215: 1.6323
    seconds: 345.16 (capture 0.34, profile 252.10, plan 11.00, search 81.71)

                                                                             share of  predicted
    width           size  step  producers → consumers            bottleneck  gradient       gain  accepted  added
    ─────────────────────────────────────────────────────────────────────────────────────────────────────────────
    layer1.0.conv1    16     1  layer1.0.conv1 → layer1.0.conv2      0.0967     99.9%     0.0124    4 of 4     +4
    layer1.1.conv1    16     1  layer1.1.conv1 → layer1.1.conv2      0.0577     99.8%     0.0161    4 of 4     +4
    layer1.2.conv1    16     1  layer1.2.conv1 → layer1.2.conv2      0.0521     99.7%     0.0078    3 of 4     +3
    layer2.0.conv1    32     1  layer2.0.conv1 → layer2.0.conv2       0.088     98.9%     0.0099    8 of 8     +8
    layer2.1.conv1    32     1  layer2.1.conv1 → layer2.1.conv2       0.117     99.0%     0.0218    8 of 8     +8
    layer2.2.conv1    32     1  layer2.2.conv1 → layer2.2.conv2        0.17     98.9%     0.0098    8 of 8     +8
    layer3.0.conv1    64     1  layer3.0.conv1 → layer3.0.conv2        0.15     94.7%     0.0048  16 of 16    +16
    layer3.1.conv1    64     1  layer3.1.conv1 → layer3.1.conv2       0.273     92.4%     0.0119  16 of 16    +16
    layer3.2.conv1    64     1  layer3.2.conv1 → layer3.2.conv2      0.0939     89.6%     0.0162  16 of 16    +16

    bottleneck: gradient energy that the consumers' existing weights cannot explain; share: of all of it.
    predicted gain: decrease of the loss by the best unit; accepted: units that a test on held-out batches accepts.

    pinned width    at node  because
    ──────────────────────────────────────────────────────────────
    conv1           pad      padded with a fixed number of entries
    layer2.0.conv2  pad      padded with a fixed number of entries
    layer3.0.conv2  pad_1    padded with a fixed number of entries
    linear          output   a dimension of the model's output

    one more epoch, net never grown: test loss 0.7566, accuracy 76.75 %
    one more epoch, grown net:       test loss 0.5399, accuracy 81.70 %
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
