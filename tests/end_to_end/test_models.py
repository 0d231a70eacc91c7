"""The networks compute what their names promise, at every width, and read the published weights."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from examples import data
from models import GPT, MLP, DigitsResNet, UNet, ViT, resnet20, vgg11, vgg11_bn


def images(channels: int, size: int) -> Callable[[int], Tensor]:
    return lambda n: torch.randn(n, channels, size, size)


def tokens(n: int) -> Tensor:
    return torch.randint(65, (n, 48))


# name, network at a width, inputs of n samples, shape of one sample's output
CASES = [
    ("mlp", lambda width: MLP([64, 20, 12, 10], nn.Tanh, width), images(1, 8), (10,)),
    ("resnet20", lambda width: resnet20(width), images(3, 32), (10,)),
    ("resnet20_conv", lambda width: resnet20(width, shortcut="conv", in_channels=1), images(1, 28), (10,)),
    ("digits", lambda width: DigitsResNet(width), images(1, 8), (10,)),
    ("vgg11", lambda width: vgg11(width), images(3, 32), (10,)),
    ("vgg11_bn", lambda width: vgg11_bn(width, classes=7), images(3, 32), (7,)),
    ("vit", lambda width: ViT(width=width), images(3, 32), (10,)),
    ("gpt", lambda width: GPT(width=width), tokens, (48, 65)),
    ("gpt_tied", lambda width: GPT(width=width, tied=True), tokens, (48, 65)),
    ("unet", lambda width: UNet(width=width), images(1, 16), (2, 16, 16)),
]


@pytest.mark.parametrize("width", [0.25, 0.4, 1.0])
@pytest.mark.parametrize(("build", "inputs", "shape"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_shape_and_gradients(
    build: Callable[[float], nn.Module],
    inputs: Callable[[int], Tensor],
    shape: tuple[int, ...],
    width: float,
) -> None:
    """Every parameter takes part: none is left without a gradient."""
    model = build(width)
    output = model(inputs(3))
    assert output.shape == (3, *shape)
    output.square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


@pytest.mark.parametrize(("build", "inputs"), [c[1:3] for c in CASES], ids=[c[0] for c in CASES])
def test_samples_do_not_mix(build: Callable[[float], nn.Module], inputs: Callable[[int], Tensor]) -> None:
    """In eval mode a sample's output is the same alone and in a batch."""
    model, x = build(0.25).eval(), inputs(4)
    with torch.no_grad():
        torch.testing.assert_close(model(x)[2:3], model(x[2:3]), rtol=1e-4, atol=1e-5)


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_width_scales_every_hidden_layer() -> None:
    narrow = dict(DigitsResNet(0.25).named_parameters())
    assert narrow["conv1.weight"].shape == (4, 1, 3, 3)
    assert narrow["layer2.0.shortcut.0.weight"].shape == (8, 4, 1, 1)
    assert narrow["linear.weight"].shape == (10, 8)
    for build in (resnet20, vgg11_bn):
        # A hidden layer has about a sixteenth of its weights at a quarter of the width.
        assert 0.05 < count(build(0.25)) / count(build(1.0)) < 0.08


def test_resnet20_is_the_published_network() -> None:
    model = resnet20()
    assert count(model) == 269_722
    state = model.state_dict()
    assert state["layer3.2.conv2.weight"].shape == (64, 64, 3, 3)
    assert not [name for name in state if "shortcut" in name]


def test_pad_shortcut_takes_every_second_pixel_between_zero_channels() -> None:
    x = torch.randn(2, 16, 8, 8)
    y = resnet20().layer2[0].shortcut(x)
    assert y.shape == (2, 32, 4, 4)
    torch.testing.assert_close(y[:, 8:24], x[:, :, ::2, ::2])
    assert y[:, :8].count_nonzero() == y[:, 24:].count_nonzero() == 0


def test_gpt_does_not_see_the_future() -> None:
    model, x = GPT(width=0.5).eval(), tokens(2)
    later = x.clone()
    later[:, 30:] = (later[:, 30:] + 1) % 65
    with torch.no_grad():
        a, b = model(x), model(later)
    torch.testing.assert_close(a[:, :30], b[:, :30])
    assert (a[:, 30:] - b[:, 30:]).abs().amax() > 1e-3


def test_gpt_tied_shares_one_parameter() -> None:
    model = GPT(tied=True)
    assert model.head.weight is model.tokens.weight
    assert count(GPT()) - count(model) == model.tokens.weight.numel()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: MLP([3]), "input and an output"),
        (lambda: resnet20(shortcut="none"), "pad"),  # type: ignore[arg-type]
        (lambda: ViT(30, 4), "does not divide"),
        (lambda: GPT(context=8)(torch.zeros(1, 9, dtype=torch.long)), "longer than the context"),
    ],
)
def test_wrong_arguments_are_named(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_digits_split() -> None:
    split = data.digits()
    assert split.x_train.shape == (1347, 1, 8, 8) and split.x_test.shape == (450, 1, 8, 8)
    assert split.x_train.dtype == torch.float32 and split.y_train.dtype == torch.int64
    assert split.x_train.amin() == 0 and split.x_train.amax() == 1
    assert split.y_test.bincount().min() >= 40
    # The figures of the examples' headers hold for this split only; another one has another checksum.
    weights = torch.arange(450)
    assert int((weights * split.y_test).sum()) == int((weights * data.digits().y_test).sum()) == 453081


def test_missing_data_names_the_variable(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.delenv("FXGROW_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match="FXGROW_DATA is not set.*cifar10.npz"):
        data.cifar10()
    monkeypatch.setenv("FXGROW_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="tinyshakespeare.txt is not in the folder that FXGROW_DATA"):
        data.shakespeare()


def _here(name: str) -> bool:
    try:
        return data.path(name).is_file()
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not _here("resnet20_cifar10.pt"), reason="needs resnet20_cifar10.pt in $FXGROW_DATA")
def test_resnet20_with_trained_weights() -> None:
    model = resnet20()
    model.load_state_dict(data.resnet20_weights(), strict=True)
    split = data.cifar10(train=0, test=500)
    with torch.no_grad():
        accuracy = (model.eval()(split.x_test).argmax(1) == split.y_test).float().mean()
    assert accuracy > 0.90


@pytest.mark.skipif(not _here("fashion_mnist.npz"), reason="needs fashion_mnist.npz in $FXGROW_DATA")
def test_fashion_mnist_and_text() -> None:
    split = data.fashion_mnist(train=100, test=50)
    assert split.x_train.shape == (100, 1, 28, 28) and split.y_test.shape == (50,)
    assert split.x_train.amax() == 1 and set(split.y_train.tolist()) == set(range(10))
    train, test, alphabet = data.shakespeare()
    assert len(alphabet) == 65 and len(train) + len(test) == 1_115_394
    assert "".join(alphabet[i] for i in train[:13]) == "First Citizen"
