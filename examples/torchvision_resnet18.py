"""torchvision's ResNet-18 on a new task (digits as 3x64x64 images): a new head, a few epochs, growth, export.

    python -m examples.torchvision_resnet18 [DEFAULT]

With `DEFAULT` it starts from torchvision's trained weights, which torchvision downloads; without, from random ones.

A network of 11 million parameters has enough width for 1,024 digits: no unit passes the held-out test, and nothing is
added. Losses after one more epoch differ only by the optimiser: the ungrown copy gets a fresh one. Output, on 2 busy
cores:

ResNet: 12 of 13 widths can grow; 100.0% of 11,181,642 parameters are in weights that would grow with them

free width      size  step  producers          → consumers        followers
─────────────────────────────────────────────────────────────────────────────────
conv1             64     1  conv1 +2           layer1.0.conv1 +3  bn1 +2
layer1.0.conv1    64     1  layer1.0.conv1     layer1.0.conv2     layer1.0.bn1
layer1.1.conv1    64     1  layer1.1.conv1     layer1.1.conv2     layer1.1.bn1
layer2.0.conv1   128     1  layer2.0.conv1     layer2.0.conv2     layer2.0.bn1
layer2.0.conv2   128     1  layer2.0.conv2 +2  layer2.1.conv1 +2  layer2.0.bn2 +2
layer2.1.conv1   128     1  layer2.1.conv1     layer2.1.conv2     layer2.1.bn1
layer3.0.conv1   256     1  layer3.0.conv1     layer3.0.conv2     layer3.0.bn1
layer3.0.conv2   256     1  layer3.0.conv2 +2  layer3.1.conv1 +2  layer3.0.bn2 +2
layer3.1.conv1   256     1  layer3.1.conv1     layer3.1.conv2     layer3.1.bn1
layer4.0.conv1   512     1  layer4.0.conv1     layer4.0.conv2     layer4.0.bn1
layer4.0.conv2   512     1  layer4.0.conv2 +2  layer4.1.conv1 +1  layer4.0.bn2 +2
layer4.1.conv1   512     1  layer4.1.conv1     layer4.1.conv2     layer4.1.bn1

pinned width  size  because
─────────────────────────────────────────────────────────────────────
fc              10  a dimension of the model's output, at node output

2 epochs:        test loss 0.2331, accuracy 93.0 %, 11,181,642 parameters
grown:           test loss 0.2331, accuracy 93.0 %, 11,181,642 parameters

Growth by default: nothing added
declined: no width has a unit that the held-out test accepts
held-out loss: eval 0.0750 → 0.0750 (+0.0%), train 0.0274 → 0.0274 (+0.0%)
seconds: 361.32 (capture 1.15, profile 357.65, plan 0.15, search 2.37)

                                                                          share of  predicted
width           size  step  producers → consumers             bottleneck  gradient       gain  priority  accepted  added
────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────
conv1             64     1  conv1 +2 → layer1.0.conv1 +3           0.259     99.5%     0.0013    0.0088   0 of 16      ·
layer1.0.conv1    64     1  layer1.0.conv1 → layer1.0.conv2        0.133     99.6%     0.0011    0.0066   0 of 16      ·
layer1.1.conv1    64     1  layer1.1.conv1 → layer1.1.conv2       0.0761     99.5%     0.0009    0.0046   0 of 16      ·
layer2.0.conv1   128     1  layer2.0.conv1 → layer2.0.conv2       0.0617     97.1%     0.0014    0.0034   0 of 32      ·
layer2.0.conv2   128     1  layer2.0.conv2 +…yer2.1.conv1 +2      0.0738     93.3%     0.0042    0.0038   0 of 32      ·
layer2.1.conv1   128     1  layer2.1.conv1 → layer2.1.conv2       0.0443     95.6%     0.0008    0.0025   0 of 32      ·
layer3.0.conv1   256     1  layer3.0.conv1 → layer3.0.conv2        0.031     80.0%          0    0.0038   0 of 64      ·
layer3.0.conv2   256     1  layer3.0.conv2 +…yer3.1.conv1 +2      0.0292     72.2%          0    0.0063   0 of 64      ·
layer3.1.conv1   256     1  layer3.1.conv1 → layer3.1.conv2       0.0193     77.0%          0    0.0039   0 of 64      ·
layer4.0.conv1   512     1  layer4.0.conv1 → layer4.0.conv2      0.00943     36.5%          0    0.0044  0 of 128      ·
layer4.0.conv2   512     1  layer4.0.conv2 +…yer4.1.conv1 +1      0.0314     51.9%          0    0.0067  0 of 128      ·
layer4.1.conv1   512     1  layer4.1.conv1 → layer4.1.conv2      0.00418     32.2%          0    0.0031  0 of 128      ·

bottleneck: gradient energy that the consumers' existing weights cannot explain; share: of all of it.
predicted gain: decrease of the loss by the best unit; accepted: units that a test on held-out batches accepts.
priority: of a few more units here, against the other widths; budgets lean towards priority for the size.

pinned width  at node  because
────────────────────────────────────────────────────────
fc            output   a dimension of the model's output

one more epoch:  test loss 0.1082, accuracy 98.0 %, 11,181,642 parameters
... never grown: test loss 0.1176, accuracy 97.5 %, 11,181,642 parameters
wrote out/resnet18.onnx, checked in onnxruntime
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxgrow
from examples.data import digits
from fxgrow.integrations._torchvision import import_torchvision

IMAGES, BATCH, EPOCHS = 1024, 64, 2


def as_photographs(x: Tensor) -> Tensor:
    """Digits [n, 1, 8, 8] in [0, 1] as [n, 3, 64, 64]."""
    return F.interpolate(x, size=(64, 64), mode="bilinear").expand(-1, 3, -1, -1).contiguous()


def train(net: nn.Module, optimizer: torch.optim.Optimizer, batches: list[tuple[Tensor, Tensor]]) -> None:
    net.train()
    for x, y in batches:
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()


@torch.no_grad()
def test(net: nn.Module, x: Tensor, y: Tensor) -> str:
    net.eval()
    logits = torch.cat([net(part) for part in x.split(64)])
    accuracy = 100 * float((logits.argmax(1) == y).float().mean())
    size = sum(p.numel() for p in net.parameters())
    return f"test loss {float(F.cross_entropy(logits, y)):.4f}, accuracy {accuracy:.1f} %, {size:,} parameters"


def main(weights: str | None) -> None:
    torch.manual_seed(0)
    data = digits()
    # plain `import torchvision` where its build fits that of torch
    net: nn.Module = import_torchvision().models.resnet18(weights=weights)
    net.fc = nn.Linear(net.fc.in_features, 10)
    x_train, y_train = as_photographs(data.x_train[:IMAGES]), data.y_train[:IMAGES]
    batches = list(zip(x_train.split(BATCH), y_train.split(BATCH), strict=True))
    x_test, y_test = as_photographs(data.x_test[:200]), data.y_test[:200]

    print(f"{fxgrow.explain(net, (x_test[:2],))}\n")
    optimizer = torch.optim.SGD(net.parameters(), 0.01, momentum=0.9)
    for _ in range(EPOCHS):
        train(net, optimizer, batches)
    print(f"{EPOCHS} epochs:        {test(net, x_test, y_test)}")
    ungrown = copy.deepcopy(net)

    net = fxgrow.grow(net, batches, budget="+5%", optimizer=optimizer, progress=False)
    print(f"grown:           {test(net, x_test, y_test)}\n\n{net.meta['fxgrow']}\n")
    train(net, optimizer, batches)
    print(f"one more epoch:  {test(net, x_test, y_test)}")
    train(ungrown, torch.optim.SGD(ungrown.parameters(), 0.01, momentum=0.9), batches)
    print(f"... never grown: {test(ungrown, x_test, y_test)}")

    Path("out").mkdir(exist_ok=True)
    written = fxgrow.export_onnx(net, "out/resnet18.onnx", (x_test[:2],))
    print(f"wrote {written}, checked in onnxruntime")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None)
