"""The networks of torchvision, timm and Hugging Face, untrained, each with inputs of any batch size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Inputs = Any  # a tuple of positional or a dict of keyword inputs

#: "family/name" of one member of every timm family; see `choose_timm`
TIMM = Path(__file__).parent / "timm.txt"
FAMILIES = ("torchvision", "segmentation", "detection", "video", "timm", "hf", "plain")


@dataclass
class Subject:
    """A network and how to make inputs for it.

    Attributes:
        model: untrained.
        inputs: inputs for so many samples; the second argument is 1 for another image size or sequence length.
        sizes: whether there is another size.
        targets: what the last layer must keep for the peer that removes channels: its number of outputs.
        outputs: what of the outputs is compared.
        own: two samples of the size that the network is made for, where `inputs` are smaller.
    """

    model: nn.Module
    inputs: Callable[[int, int], Inputs]
    sizes: bool = True
    targets: int | None = None
    outputs: Callable[[Any], Any] = lambda given: given
    own: Callable[[], Inputs] | None = None


def names(family: str) -> list[str]:
    if family == "timm":
        return [line.split()[0] for line in TIMM.read_text().splitlines() if line]
    if family == "hf":
        from benchmarks.coverage.huggingface import CASES

        return list(CASES)
    if family == "plain":
        from benchmarks.coverage.plain import CASES as PLAIN

        return list(PLAIN)
    from torchvision import models

    if family == "torchvision":
        return list(models.list_models(models))
    return list(models.list_models(getattr(models, family)))


def build(family: str, name: str) -> Subject:
    torch.manual_seed(0)
    if family == "hf":
        from benchmarks.coverage.huggingface import build as build_hf

        subject = build_hf(name)
    elif family == "plain":
        from benchmarks.coverage.plain import CASES as PLAIN

        subject = PLAIN[name]()
    elif family == "timm":
        subject = _timm(name)
    elif family == "detection":
        subject = _detection(name)
    elif family == "video":
        subject = _video(name)
    else:
        subject = _image(family, name)
    perturb(subject.model)
    return subject


def _image(family: str, name: str) -> Subject:
    from torchvision import models

    options: dict[str, Any] = {"weights": None}
    sides = (64, 96, 128, 224, 299)
    if family == "segmentation":
        options["weights_backbone"] = None
    if name in ("googlenet", "inception_v3"):
        options |= {"init_weights": False, "aux_logits": name == "googlenet"}
    if name.startswith("vit_"):
        sides = (64 if "16" in name or "32" in name else 56,)
        options["image_size"] = sides[0]
    if name == "maxvit_t":
        sides = (224,)
    model = models.get_model(name, **options)
    side = _smallest(model, [(3, s, s) for s in sides])[-1]
    fixed = name.startswith(("vit_", "maxvit"))
    own = None if fixed else lambda: _images(299 if name == "inception_v3" else 224)(2, 0)
    return Subject(model, _images(side), not fixed, 1000 if family == "torchvision" else 21, own=own)


#: fewer blocks where the smallest of a family does not fit into 24 GB twice over in double precision
SHALLOWER: dict[str, dict[str, Any]] = {"deepseek_vit_412m": {"depth": 4}}


def _timm(name: str) -> Subject:
    import timm

    model = timm.create_model(name, pretrained=False, **SHALLOWER.get(name, {}))
    config = model.pretrained_cfg
    shape = made_for = tuple(config["input_size"])
    fixed = bool(config.get("fixed_input_size")) or config.get("pool_size") is None
    # some that are said to be fixed run on others all the same, and then in a tenth of the memory
    shapes = [(shape[0], s, s) for s in (96, 128, 160) if s < shape[-1]] + [shape]
    shape = _smallest(model, shapes)
    own = lambda: _images(made_for[-1], made_for[0])(2, 0)  # noqa: E731
    return Subject(model, _images(shape[-1], shape[0]), not fixed, config.get("num_classes"), own=own)


def _video(name: str) -> Subject:
    from torchvision import models

    model = models.get_model(name, weights=None)
    shape = _smallest(model, [(3, 8, 64, 64), (3, 16, 112, 112), (3, 16, 224, 224)])

    def inputs(batch: int, other: int) -> Inputs:
        frames, side = shape[1], shape[-1] + 32 * other
        return (seeded(batch, 3, frames, side, side),)

    return Subject(model, inputs, not name.startswith("mvit"), 400)


def _detection(name: str) -> Subject:
    from torchvision import models

    from benchmarks.coverage.kernels import provide_kernels

    provide_kernels()
    # small images and few proposals: the operators that read them are slow in Python
    options = {} if name.startswith("ssd") else {"min_size": 128, "max_size": 192}
    if "rcnn" in name:
        options |= {f"rpn_{when}_nms_top_n_{mode}": 16 for when in ("pre", "post") for mode in ("train", "test")}
    model = models.get_model(name, weights=None, weights_backbone=None, **options)

    def inputs(batch: int, other: int) -> Inputs:
        # images of different sizes: the model's own transform makes a batch of them. Their number is that of the
        # example's, because a graph reads a list item by item
        return ([seeded(batch + i, 3, 96 + 32 * ((i + other) % 2), 128)[0].abs() for i in range(2)],)

    def outputs(found: Any) -> Any:
        # in an untrained network scores are so close that rounding decides which boxes come first
        return [image["scores"].sort().values for image in found] if isinstance(found, list) else found

    return Subject(model, inputs, outputs=outputs)


def _images(side: int, channels: int = 3) -> Callable[[int, int], Inputs]:
    return lambda batch, other: (seeded(batch, channels, side + 32 * other, side + 32 * other),)


def seeded(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(shape[0]))


def _smallest(model: nn.Module, shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
    """The first input shape that the model runs on, in train mode too."""
    model = model.train()
    failure: Exception | None = None
    for shape in shapes:
        try:
            with torch.no_grad():
                model(torch.randn(2, *shape))
            return shape
        except Exception as error:  # whatever a model raises for an image too small for it
            failure = error
    raise RuntimeError(f"no input size of {shapes} fits: {failure}")


@torch.no_grad()
def perturb(model: nn.Module) -> None:
    """Constant parameters and statistics (biases, layer scales, norms) would hide an entry in the wrong place."""
    generator = torch.Generator().manual_seed(1)

    def noise(tensor: Tensor) -> Tensor:
        return torch.randn(tensor.shape, generator=generator).to(tensor)

    for p in model.parameters():
        if p.is_floating_point() and p.numel() > 1 and bool((p == p.flatten()[0]).all()):
            p.add_(0.1 * noise(p))
    for module in model.modules():
        if isinstance(getattr(module, "running_var", None), Tensor):
            module.running_mean.add_(0.1 * noise(module.running_mean))
            module.running_var.mul_((0.2 * noise(module.running_var)).exp())


def choose_timm() -> list[str]:
    """The smallest member of every timm family, by parameters, made without memory; lines for `timm.txt`."""
    import timm

    chosen = []
    for family in timm.list_modules():
        sizes = []
        for name in timm.list_models(module=family):
            if not name.startswith("test_"):
                try:
                    with torch.device("meta"):
                        model = timm.create_model(name, pretrained=False)
                except Exception:  # a model that cannot be made without memory: others of its family can
                    continue
                sizes.append((sum(p.numel() for p in model.parameters()), name))
        chosen += [(*smallest, family) for smallest in sorted(sizes)[:1]]
    return [f"{name} {family} {count}" for count, name, family in sorted(chosen)]


if __name__ == "__main__":
    from fxgrow.integrations._torchvision import import_torchvision

    import_torchvision()
    TIMM.write_text("".join(f"{line}\n" for line in choose_timm()))
