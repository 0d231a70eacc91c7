"""The networks: small members of every family of torchvision and timm, of Hugging Face, a GAN, a VAE, own nets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.harmless.stock import TIMM, TORCHVISION, timm_model, torchvision_model
from benchmarks.harmless.trials import Critic, Trial, classes, labelled
from examples.data import Split, digits

#: the part of the steps that networks of so many parameters and more train for
PACE = ((15_000_000, 0.25), (3_000_000, 0.5), (0, 1.0))
#: held-out samples
HELD_OUT = 64
Make = Callable[[int, int], Trial]


@cache
def pictures() -> Split:
    """Handwritten digits in random colours."""
    split, generator = digits(), torch.Generator().manual_seed(0)

    def coloured(x: Tensor) -> Tensor:
        return x.sub(0.3) * (0.5 + 2 * torch.rand(len(x), 3, 1, 1, generator=generator))

    return Split(coloured(split.x_train), split.y_train, coloured(split.x_test), split.y_test)


def _images(model: nn.Module, side: int, samples: int, seed: int, rate: float = 0.02, channels: int = 3) -> Trial:
    split = pictures()
    # what is learnt from a few hundred of them carries over, so that growth has something to accept
    order = torch.randperm(len(split.x_train), generator=torch.Generator().manual_seed(seed))[:samples]

    def shaped(x: Tensor) -> Tensor:
        x = F.interpolate(x, side, mode="bilinear") if side != x.shape[-1] else x
        return x.mean(1, keepdim=True).expand(-1, channels, -1, -1).contiguous() if channels != 3 else x

    few = Split(shaped(split.x_train[order]), split.y_train[order],
                shaped(split.x_test[:HELD_OUT]), split.y_test[:HELD_OUT])  # fmt: skip
    return Trial(model, *labelled(few), classes, rate=rate)


def _stock(build: Callable[[str], tuple[nn.Module, int, int]], name: str, samples: int, seed: int) -> Trial:
    model, side, channels = build(name)
    normed = any("norm" in type(m).__name__.lower() for m in model.modules())
    trial = _images(model, side, samples, seed, 0.02 if normed else 0.005, channels)
    parameters = sum(p.numel() for p in model.parameters())
    return replace(trial, pace=next(pace for size, pace in PACE if parameters >= size))


def _mlp(kind: str, samples: int, seed: int) -> Trial:
    """Handwritten digits through two hidden layers, with dropout or without."""
    rest = [nn.Dropout(0.5)] if kind == "dropout" else []
    sizes = (64, 24, 24)
    layers: list[nn.Module] = [nn.Flatten()]
    for a, b in zip(sizes, sizes[1:], strict=False):
        layers += [nn.Linear(a, b), nn.ReLU(), *rest]
    return _digits(nn.Sequential(*layers, nn.Linear(sizes[-1], 10)), samples, seed)


def _convolutions(norm: Callable[[int], nn.Module], samples: int, seed: int) -> Trial:
    layers: list[nn.Module] = []
    for a, b in ((1, 8), (8, 12), (12, 16)):
        layers += [nn.Conv2d(a, b, 3, padding=1), norm(b), nn.ReLU()]
    return _digits(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)), samples, seed)


def _digits(model: nn.Module, samples: int, seed: int) -> Trial:
    split = digits()
    generator = torch.Generator().manual_seed(seed)
    # more samples than there are: copies with noise
    rows = torch.randperm(2 * len(split.x_train), generator=generator)[:samples] % len(split.x_train)
    x = split.x_train[rows]
    x = x + 0.2 * torch.randn(x.shape, generator=generator)
    few = Split(x, split.y_train[rows], split.x_test[:256], split.y_test[:256])
    return Trial(model, *labelled(few), classes, rate=0.05)


class VAE(nn.Module):
    """Draws its code in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU())
        self.mean, self.log_variance = nn.Linear(32, 6), nn.Linear(32, 6)
        self.decoder = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 64))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden = self.encoder(x)
        mean, log_variance = self.mean(hidden), self.log_variance(hidden)
        code = mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean)
        return self.decoder(code), mean, log_variance


def elbo(out: tuple[Tensor, Tensor, Tensor], x: Tensor) -> Tensor:
    made, mean, log_variance = out
    divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1)
    return F.binary_cross_entropy_with_logits(made, x.flatten(1), reduction="none").sum(1).add(divergence).mean()


def _vae(samples: int, seed: int) -> Trial:
    trial = _digits(VAE(), samples, seed)
    clean = digits().x_train[:samples]
    return Trial(trial.model, ((clean,), clean), (trial.held_out[0], trial.held_out[0][0]), elbo, rate=0.001)


def _gan(samples: int, seed: int, norm: bool = True) -> Trial:
    """The generator, trained against a discriminator."""
    split, code = digits(), 8
    generator = torch.Generator().manual_seed(seed)
    norms = [nn.BatchNorm1d(32)] if norm else []
    net = nn.Sequential(nn.Linear(code, 32), *norms, nn.ReLU(), nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 64))
    critic = Critic(nn.Sequential(nn.Linear(64, 48), nn.LeakyReLU(0.2), nn.Linear(48, 1)))
    real = split.x_train.flatten(1)[:samples]
    codes = torch.randn(len(real), code, generator=generator)
    held_out = ((torch.randn(256, code, generator=generator),), split.x_test.flatten(1)[:256])
    return Trial(net, ((codes,), real), held_out, critic.loss, critic, rate=0.005)


def _huggingface(name: str, samples: int, seed: int) -> Trial:
    """From a configuration of a few dozen channels, with its dropout; on letters that follow from each other."""
    import transformers

    transformers.logging.set_verbosity_error()
    sizes: dict[str, Any] = {"vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
                             "intermediate_size": 48}  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    follows = torch.randn(32, 32, generator=torch.Generator().manual_seed(0)).mul(2).softmax(1)
    ids = torch.randint(32, (samples + HELD_OUT, 1), generator=generator)
    for _ in range(15):
        ids = torch.cat([ids, torch.multinomial(follows[ids[:, -1]], 1, generator=generator)], 1)
    if name == "bert":
        config: Any = transformers.BertConfig(**sizes, num_labels=4)
        model, labels = transformers.BertForSequenceClassification(config), (ids[:, :4].sum(1) + ids[:, 5]) % 4
    elif name == "llama":
        config = transformers.LlamaConfig(**sizes, num_key_value_heads=2, use_cache=False, pad_token_id=0)
        model, labels = transformers.LlamaForCausalLM(config), ids
    else:
        config = transformers.GPT2Config(vocab_size=32, n_embd=32, n_layer=2, n_head=4, n_positions=32, use_cache=False,
                                         bos_token_id=1, eos_token_id=2)  # fmt: skip
        model, labels = transformers.GPT2LMHeadModel(config), ids
    given = {"input_ids": ids, "labels": labels}
    parts = [{key: value[at] for key, value in given.items()} for at in (slice(samples), slice(samples, None))]
    return Trial(model, (parts[0], None), (parts[1], None), rate=0.02)


SMALL: Mapping[str, Make] = {
    "mlp": partial(_mlp, "plain"),
    "dropout": partial(_mlp, "dropout"),
    "batchnorm": partial(_convolutions, nn.BatchNorm2d),
    "batchnorm_slow": partial(_convolutions, partial(nn.BatchNorm2d, momentum=0.01)),
    "groupnorm": partial(_convolutions, partial(nn.GroupNorm, 4)),
    "no_norm": partial(_convolutions, lambda _: nn.Identity()),
}
NETS: Mapping[str, Mapping[str, Make]] = {
    "small": SMALL,
    "gan": {"gan": _gan, "gan_no_norm": partial(_gan, norm=False)},
    "vae": {"vae": _vae},
    "hf": {name: partial(_huggingface, name) for name in ("bert", "llama", "gpt2")},
    "torchvision": {name: partial(_stock, torchvision_model, name) for name in TORCHVISION},
    "timm": {name: partial(_stock, timm_model, name) for name in TIMM},
}
