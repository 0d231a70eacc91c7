"""torchvision's ResNet-18 on a new task (digits as 3x64x64 images): a new head, a few epochs, growth, export.

    python -m examples.torchvision_resnet18 [DEFAULT]

With `DEFAULT` it starts from torchvision's trained weights, which torchvision downloads; without, from random ones.

HEADER
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
from fxgrow._torchvision import import_torchvision

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
