"""Batches: the same at every pass, whatever the loader; and the loss that the targets suggest."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

import fxgrow
from fxgrow.data.batches import DEFAULT_SAMPLES, Batch, Data, parse
from fxgrow.data.loss import loss_of
from models.gpt import GPT
from models.unet import UNet


class Noisy(Dataset[Any]):
    """Augments with all three global generators."""

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> Any:
        noise = torch.rand(1) + random.random() + float(np.random.rand())
        return torch.full((3,), float(index)) + noise, index


LOADERS = {
    "shuffled": lambda: DataLoader(Noisy(), 6, shuffle=True),
    "own generator": lambda: DataLoader(Noisy(), 6, shuffle=True, generator=torch.Generator().manual_seed(5)),
    "list": lambda: [(torch.rand(4, 3), torch.arange(4)) for _ in range(3)],
    "generator": lambda: ((torch.rand(4, 3), torch.arange(4)) for _ in range(3)),
}


@pytest.mark.parametrize("name", LOADERS)
def test_every_pass_gives_the_same_batches(name: str) -> None:
    """Though the reader draws random numbers too, and stops half-way once."""
    loader = LOADERS[name]()
    own = [loader.generator] if isinstance(loader, DataLoader) and loader.generator is not None else []

    def states() -> list[Any]:
        return [
            random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist(),
            *(g.get_state().tolist() for g in own),
        ]  # fmt: skip

    before = states()
    data = Data(loader)
    first = list(data)
    assert states() == before
    for _ in data:
        break
    assert states() == before
    second = []
    for batch in data:
        second.append(batch)
        torch.rand(3), random.random(), np.random.rand()  # what a loss with dropout would do
    assert len(first) == len(second) > 2
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.inputs[0], b.inputs[0]) and torch.equal(a.targets, b.targets)
    assert isinstance(loader, list) or not torch.equal(first[0].inputs[0], first[1].inputs[0])


def test_a_training_loop_goes_on_as_if_nothing_had_been_read() -> None:
    loader = DataLoader(TensorDataset(torch.arange(12.0)[:, None], torch.arange(12)), 4, shuffle=True)
    torch.manual_seed(3)
    expected = [y.tolist() for _ in range(2) for _, y in loader]
    torch.manual_seed(3)
    found = [y.tolist() for _, y in loader]
    list(Data(loader))
    found += [y.tolist() for _, y in loader]
    assert found == expected


def test_samples_are_limited_to_whole_batches() -> None:
    batches = [(torch.zeros(6, 2), torch.zeros(6)) for _ in range(5)]
    assert [b.size for b in Data(batches, samples=13)] == [6, 6, 6]
    assert [b.size for b in Data(iter(batches), samples=12)] == [6, 6]

    def endless() -> Iterator[Any]:
        while True:
            yield torch.zeros(1024, 2), torch.zeros(1024)

    assert sum(b.size for b in Data(endless())) == DEFAULT_SAMPLES


@pytest.mark.parametrize(("count", "held"), [(1, []), (2, [1]), (3, [2]), (4, [3]), (9, [3, 7])])
def test_held_out_batches(count: int, held: list[int]) -> None:
    data = Data([(torch.zeros(2, 1), torch.zeros(2)) for _ in range(count)])
    assert [b.index for b in data if data.is_held_out(b)] == held
    once = Data((torch.zeros(2, 1), torch.zeros(2)) for _ in range(count))
    assert [b.index for b in once if once.is_held_out(b)] == held


def test_layouts() -> None:
    x, y = torch.zeros(5, 2), torch.zeros(5)
    assert parse((x, y), 0).inputs == (x,)
    assert parse([x, y], 0).targets is y
    assert parse(((x, x), y), 0).inputs == (x, x)
    assert parse(({"a": x}, y), 0).inputs == {"a": x}
    own = parse({"input_ids": x, "labels": y}, 3)
    assert own.targets is None and own.size == 5 and own.index == 3


def batch(targets: Any) -> Batch:
    return Batch((torch.zeros(4, 1),), targets, 4, 0)


def test_default_losses() -> None:
    tokens, classes = torch.randn(4, 7, 5), torch.randint(5, (4, 7))
    assert torch.equal(loss_of(tokens, batch(classes), None), F.cross_entropy(tokens.flatten(0, 1), classes.flatten()))
    square, labels = torch.randn(4, 5, 5), torch.randint(5, (4, 5))  # as many tokens as classes: classes stand last
    assert torch.equal(loss_of(square, batch(labels), None), F.cross_entropy(square.flatten(0, 1), labels.flatten()))
    maps, pixels = torch.randn(4, 5, 6, 7), torch.randint(5, (4, 6, 7))
    assert torch.equal(loss_of(maps, batch(pixels), None), F.cross_entropy(maps, pixels))
    values = torch.randn(4, 5)
    assert torch.equal(loss_of(values, batch(values * 2), None), F.mse_loss(values, values * 2))
    ignored = torch.tensor([1, -100, 2, -100])
    assert torch.equal(loss_of(values, batch(ignored), None), F.cross_entropy(values, ignored))
    soft = torch.softmax(torch.randn(4, 5), 1)
    assert loss_of(values, batch(soft), lambda o, y: F.cross_entropy(o, y, reduction="none")).shape == ()


@dataclass
class Output:
    logits: Tensor
    loss: Tensor | None = None


class WithLoss(nn.Module):
    """Like a Hugging Face model: keyword inputs, labels among them, an object with `.loss` comes back."""

    def __init__(self, kind: Callable[..., Any]) -> None:
        super().__init__()
        self.kind = kind
        self.embedding, self.fc, self.head = nn.Embedding(11, 6), nn.Linear(6, 4), nn.Linear(4, 11)

    def forward(self, input_ids: Tensor, mask: Tensor, labels: Tensor | None = None) -> Any:
        h = torch.tanh(self.fc(self.embedding(input_ids) * mask[..., None]))
        logits = self.head(h)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return self.kind(loss=loss, logits=logits)


def ids() -> Tensor:
    return torch.randint(11, (16, 5))


@pytest.mark.parametrize("kind", [dict, Output])
def test_model_with_its_own_loss(kind: Callable[..., Any]) -> None:
    batches = [{"input_ids": (i := ids()), "mask": torch.ones(16, 5), "labels": (i + 1) % 11} for _ in range(6)]
    model = WithLoss(kind)
    grown = fxgrow.grow(model, batches, neurons={"fc": 2}, progress=False)
    growth = grown.meta["fxgrow"]
    assert grown.fc.out_features == 6
    with torch.no_grad():
        outs = [model(**b) for b in batches]
        own = torch.stack([o["loss"] if kind is dict else o.loss for o in outs]).mean()
    assert growth.profile.loss == pytest.approx(float(own), rel=1e-5)
    missing = [{"input_ids": ids(), "mask": torch.ones(16, 5)} for _ in range(3)]
    returned = r"dict of \['logits', 'loss'" if kind is dict else "Output"
    with pytest.raises(fxgrow.ProfileError, match=f"a dict without targets.*loss.*returned an? {returned}"):
        fxgrow.grow(model, missing, progress=False)
    changed = [*batches[:2], {"input_ids": ids(), "labels": ids()}]
    message = r"Batch 2 has the inputs \['input_ids', 'labels'\].*missing: \['mask'\]"
    with pytest.raises(fxgrow.ProfileError, match=message):
        fxgrow.grow(model, changed, progress=False)


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(3, 4), nn.Linear(2, 4), nn.Linear(4, 2)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.head(torch.relu(self.a(left) + self.b(right)))


@pytest.mark.parametrize("kind", ["dict", "dict in another order", "tuple"])
def test_several_inputs(kind: str) -> None:
    def one() -> Any:
        left, right = torch.randn(16, 3), torch.randn(16, 2)
        y = (left[:, :2] * right).float()
        if kind == "tuple":
            return (left, right), y
        return ({"left": left, "right": right} if kind == "dict" else {"right": right, "left": left}), y

    batches = [one() for _ in range(4)]
    model = Named()
    grown = fxgrow.grow(model, batches, neurons=2, progress=False)
    assert grown.head.in_features == 6
    with torch.no_grad():
        outs = [model(**x) if isinstance(x, dict) else model(*x) for x, _ in batches]
        expected = torch.stack([F.mse_loss(o, y) for o, (_, y) in zip(outs, batches, strict=True)]).mean()
    assert grown.meta["fxgrow"].profile.loss == pytest.approx(float(expected), rel=1e-5)


def test_token_and_pixel_targets() -> None:
    tokens = [(t, t.roll(1, 1)) for t in (torch.randint(9, (8, 6)) for _ in range(4))]
    grown = fxgrow.grow(GPT(9, 6, depth=1, heads=2, width=0.125), tokens, neurons={"blocks.0.mlp.0": 3}, progress=False)
    assert grown.get_submodule("blocks.0.mlp.0").out_features == 35
    images = [(torch.randn(4, 1, 8, 8), torch.randint(2, (4, 8, 8))) for _ in range(4)]
    grown = fxgrow.grow(UNet(width=0.125), images, neurons={"down1.0": 2}, progress=False)
    assert grown.get_submodule("down1.0").out_channels == 4
