"""A ResNet-20 trained on CIFAR-10 meets Fashion-MNIST: a new head for one epoch, then growth.

    FXGROW_DATA=<folder> python -m examples.resnet20_new_task

The folder holds `resnet20_cifar10.pt` and `fashion_mnist.npz`, see `examples/data.py`.

Its output, on 2 busy cores:

new head:            test loss 1.4565, accuracy 49.35 %
grown, untrained:    test loss 0.7539, accuracy 76.80 %

Growth by default: 68 units, 269,722 → 322,850 parameters (+19.7%)
held-out loss: eval 1.4546 → 0.7436 (-48.9%), train 1.4540 → 0.7426 (-48.9%)
decrease: 1.8537 predicted, 0.7109 realised
gamma: 114 applied, 114 best on held-out batches
loss along gamma: 0: 1.4540  40.4: 0.8809  80.9: 0.7633  114: 0.7426  162: 0.7492  229: 0.7845  324: 0.8607  647: 1.2039
seconds: 269.63 (capture 0.97, profile 110.26, plan 3.15, search 155.24)

                                                                         share of  predicted
width           size  step  producers → consumers            bottleneck  gradient       gain  priority  accepted  added
───────────────────────────────────────────────────────────────────────────────────────────────────────────────────────
layer1.0.conv1    16     1  layer1.0.conv1 → layer1.0.conv2      0.0973     99.9%     0.0117     0.037    4 of 4     +4
layer1.1.conv1    16     1  layer1.1.conv1 → layer1.1.conv2      0.0581     99.8%     0.0133     0.031    4 of 4     +4
layer1.2.conv1    16     1  layer1.2.conv1 → layer1.2.conv2      0.0524     99.7%     0.0102     0.032    4 of 4     +4
layer2.0.conv1    32     1  layer2.0.conv1 → layer2.0.conv2      0.0885     98.8%     0.0109     0.054    8 of 8     +8
layer2.1.conv1    32     1  layer2.1.conv1 → layer2.1.conv2       0.117     98.9%     0.0235     0.066    8 of 8     +8
layer2.2.conv1    32     1  layer2.2.conv1 → layer2.2.conv2       0.171     98.8%     0.0149     0.078    8 of 8     +8
layer3.0.conv1    64     1  layer3.0.conv1 → layer3.0.conv2        0.15     94.3%     0.0094     0.097   0 of 16      ·
layer3.1.conv1    64     1  layer3.1.conv1 → layer3.1.conv2       0.274     92.2%     0.0151      0.14  16 of 16    +16
layer3.2.conv1    64     1  layer3.2.conv1 → layer3.2.conv2       0.094     89.6%     0.0179     0.086  16 of 16    +16

bottleneck: gradient energy that the consumers' existing weights cannot explain; share: of all of it.
predicted gain: decrease of the loss by the best unit; accepted: units that a test on held-out batches accepts.
priority: of a few more units here, against the other widths; budgets lean towards priority for the size.

pinned width    at node  because
──────────────────────────────────────────────────────────────
conv1           pad      padded with a fixed number of entries
layer2.0.conv2  pad      padded with a fixed number of entries
layer3.0.conv2  pad_1    padded with a fixed number of entries
linear          output   a dimension of the model's output

one more epoch, net never grown: test loss 0.7637, accuracy 76.45 %
one more epoch, grown net:       test loss 0.5121, accuracy 83.00 %
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
