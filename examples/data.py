"""The data of the examples: scikit-learn's handwritten digits, and larger sets from the folder $FXGROW_DATA.

The folder holds ``cifar10.npz`` and ``fashion_mnist.npz`` (uint8 images ``x_train``, ``x_test``, labels
``y_train``, ``y_test``), ``tinyshakespeare.txt`` and ``resnet20_cifar10.pt`` (a state_dict). Nothing is
downloaded.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

VARIABLE = "FXGROW_DATA"


class Split(NamedTuple):
    """Inputs and targets to train on and to test on."""

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor


@torch.no_grad()
def accuracy(model: nn.Module, data: Split) -> float:
    """Returns the accuracy on the test data in per cent, in eval mode."""
    model.eval()
    hits = (model(data.x_test).argmax(1) == data.y_test).float().mean()
    model.train()
    return 100 * float(hits)


def digits() -> Split:
    """1,347 and 450 handwritten digits [n, 1, 8, 8] float32 in [0, 1], labels [n] int64; a fixed split."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    x = torch.from_numpy(images).float().div(16).view(-1, 1, 8, 8)
    y = torch.from_numpy(labels).long()
    train, test = train_test_split(range(len(y)), test_size=450, stratify=labels, random_state=0)
    return Split(x[train], y[train], x[test], y[test])


def fashion_mnist(train: int | None = None, test: int | None = None) -> Split:
    """60,000 and 10,000 images of clothes [n, 1, 28, 28] float32 in [0, 1], or the first ``train`` and ``test``."""
    return _images("fashion_mnist.npz", train, test)


def cifar10(train: int | None = None, test: int | None = None) -> Split:
    """20,000 and 10,000 colour images [n, 3, 32, 32] float32, or the first ``train`` and ``test``.

    Normalised with ImageNet's mean and deviation, as the network of ``resnet20_weights`` was trained.
    """
    split = _images("cifar10.npz", train, test)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    for images in (split.x_train, split.x_test):
        images.sub_(mean).div_(std)
    return split


def shakespeare() -> tuple[Tensor, Tensor, str]:
    """Character numbers [n] int64 of the first 90 % and last 10 % of the text, and the alphabet."""
    return _tokens(path("tinyshakespeare.txt").read_text(encoding="utf-8"))


def text() -> tuple[Tensor, Tensor, str]:
    """Returns `shakespeare()`, or without $FXGROW_DATA the same of Python's manual (its `help()` topics in ASCII)."""
    if os.environ.get(VARIABLE):
        return shakespeare()
    from pydoc_data.topics import topics

    return _tokens("\n".join(topics[name] for name in sorted(topics)).encode("ascii", "ignore").decode())


def resnet20_weights() -> dict[str, Tensor]:
    """The state_dict of ``models.resnet20()`` trained on CIFAR-10."""
    return torch.load(path("resnet20_cifar10.pt"), map_location="cpu", weights_only=True)


def path(name: str) -> Path:
    """Returns the file ``name`` in the folder $FXGROW_DATA.

    Raises:
        FileNotFoundError: the variable is not set, or the file is missing.
    """
    folder = os.environ.get(VARIABLE)
    if not folder:
        raise FileNotFoundError(
            f"the environment variable {VARIABLE} is not set: set it to the folder that holds {name}"
        )
    file = Path(folder) / name
    if not file.is_file():
        raise FileNotFoundError(f"{name} is not in the folder that {VARIABLE} names, {folder}")
    return file


def _images(name: str, train: int | None, test: int | None) -> Split:
    with np.load(path(name), allow_pickle=False) as arrays:
        x_train, y_train = arrays["x_train"][:train], arrays["y_train"][:train]
        x_test, y_test = arrays["x_test"][:test], arrays["y_test"][:test]
    return Split(_scaled(x_train), _labels(y_train), _scaled(x_test), _labels(y_test))


def _tokens(text: str) -> tuple[Tensor, Tensor, str]:
    alphabet = "".join(sorted(set(text)))
    number = {character: index for index, character in enumerate(alphabet)}
    tokens = torch.tensor([number[character] for character in text])
    cut = int(0.9 * len(tokens))
    return tokens[:cut], tokens[cut:], alphabet


def _scaled(images: np.ndarray) -> Tensor:
    """[n, h, w] or [n, h, w, c] uint8 to [n, c, h, w] float32 in [0, 1]."""
    x = torch.from_numpy(images)
    x = x.unsqueeze(1) if x.ndim == 3 else x.permute(0, 3, 1, 2)
    return x.contiguous().float().div_(255)


def _labels(labels: np.ndarray) -> Tensor:
    return torch.from_numpy(labels).long()
