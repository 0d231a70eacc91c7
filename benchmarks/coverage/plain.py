"""Hand-written networks: those of `models/`, and a few classics that are not in it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.coverage.subjects import Inputs, Subject
from models import GPT, MLP, UNet, ViT, resnet20, vgg11_bn


class LeNet(nn.Module):
    """LeCun et al. 1998, with the flattening that most copies of it have."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 6, 5, padding=2), nn.Conv2d(6, 16, 5)
        self.fc1, self.fc2, self.fc3 = nn.Linear(16 * 25, 120), nn.Linear(120, 84), nn.Linear(84, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool2d(self.conv1(x).relu(), 2)
        x = nn.functional.max_pool2d(self.conv2(x).relu(), 2)
        return self.fc3(self.fc2(self.fc1(x.view(-1, 16 * 25)).relu()).relu())


class Tagger(nn.Module):
    """An embedding, a recurrent layer both ways and a linear one."""

    def __init__(self, cell: Callable[..., nn.RNNBase]) -> None:
        super().__init__()
        self.embed = nn.Embedding(96, 24)
        self.cell = cell(24, 16, num_layers=2, batch_first=True, bidirectional=True)
        self.tags = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.tags(self.cell(self.embed(x))[0])


class Autoencoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Sequential(
            nn.Conv2d(1, 8, 3, 2, 1), nn.GroupNorm(2, 8), nn.GELU(), nn.Conv2d(8, 16, 3, 2, 1), nn.InstanceNorm2d(16)
        )
        self.decode = nn.Sequential(
            nn.ConvTranspose2d(16, 8, 2, 2), nn.BatchNorm2d(8), nn.PReLU(8), nn.ConvTranspose2d(8, 1, 2, 2)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x))


def _images(channels: int, side: int) -> Callable[[int, int], Inputs]:
    def inputs(batch: int, other: int) -> Inputs:
        generator = torch.Generator().manual_seed(batch)
        return (torch.randn(batch, channels, side + 16 * other, side + 16 * other, generator=generator),)

    return inputs


def _tokens(vocabulary: int) -> Callable[[int, int], Inputs]:
    def inputs(batch: int, other: int) -> Inputs:
        return (torch.randint(vocabulary, (batch, 12 + 4 * other), generator=torch.Generator().manual_seed(batch)),)

    return inputs


CASES: dict[str, Callable[[], Subject]] = {
    "mlp": lambda: Subject(MLP([64, 20, 12, 10]), _images(1, 8), False, 10),
    "lenet": lambda: Subject(LeNet(), _images(1, 28), False, 10),
    "resnet20": lambda: Subject(resnet20(), _images(3, 32), targets=10),
    "vgg11_bn": lambda: Subject(vgg11_bn(), _images(3, 32), False, 10),
    "vit": lambda: Subject(ViT(), _images(3, 32), False, 10),
    "unet": lambda: Subject(UNet(), _images(1, 16)),
    "gpt": lambda: Subject(GPT(), _tokens(65)),
    "gpt_tied": lambda: Subject(GPT(tied=True), _tokens(65)),
    "autoencoder": lambda: Subject(Autoencoder(), _images(1, 16)),
    "lstm": lambda: Subject(Tagger(nn.LSTM), _tokens(96)),
    "gru": lambda: Subject(Tagger(nn.GRU), _tokens(96)),
    "transformer": lambda: Subject(
        nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 48, 0.0, batch_first=True), 2),
        lambda batch, other: (torch.randn(batch, 6 + 2 * other, 32, generator=torch.Generator().manual_seed(batch)),),
    ),
}
