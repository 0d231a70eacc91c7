"""Small members of the classification families of torchvision and timm, and the smallest images that they take."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import nn

#: one of every family
TORCHVISION = (
    "alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "efficientnet_v2_s", "googlenet", "inception_v3",
    "maxvit_t", "mnasnet0_5", "mobilenet_v2", "mobilenet_v3_small", "regnet_x_400mf", "regnet_y_400mf", "resnet18",
    "resnext50_32x4d", "shufflenet_v2_x0_5", "squeezenet1_1", "swin_t", "swin_v2_t", "vgg11", "vgg11_bn", "vit_b_16",
    "wide_resnet50_2",
)  # fmt: skip
#: other than 64
_SIDES = {"inception_v3": 75} | dict.fromkeys(
    ("efficientnet_b0", "googlenet", "regnet_x_400mf", "regnet_y_400mf", "resnet18", "vgg11", "vgg11_bn"), 32
)


def torchvision_model(name: str) -> tuple[nn.Module, int, int]:
    """A network of ten classes, with fewer or narrower blocks where it is large; the side of its images, channels."""
    from torchvision import models

    options: dict[str, Any] = {"num_classes": 10}
    if name == "convnext_tiny":
        block = models.convnext.CNBlockConfig
        sizes = [block(24, 48, 2), block(48, 96, 2), block(96, 128, 2), block(128, None, 1)]
        return models.ConvNeXt(sizes, 0.1, **options), 64, 3
    if name == "efficientnet_v2_s":
        from torchvision.models.efficientnet import FusedMBConvConfig, MBConvConfig

        blocks = [FusedMBConvConfig(1, 3, 1, 16, 16, 1), FusedMBConvConfig(4, 3, 2, 16, 24, 2),
                  MBConvConfig(4, 3, 2, 24, 40, 2), MBConvConfig(6, 3, 2, 40, 64, 2)]  # fmt: skip
        return models.EfficientNet(blocks, 0.2, last_channel=256, **options), 64, 3
    if name in ("swin_t", "swin_v2_t"):
        v2 = name == "swin_v2_t"
        parts = {"block": models.swin_transformer.SwinTransformerBlockV2,
                 "downsample_layer": models.swin_transformer.PatchMergingV2} if v2 else {}  # fmt: skip
        return models.SwinTransformer([4, 4], 24, [1, 2, 2], [2, 4, 8], [4, 4], **parts, **options), 64, 3
    if name == "vit_b_16":
        return models.VisionTransformer(64, 16, 4, 4, 64, 128, dropout=0.1, **options), 64, 3
    if name == "maxvit_t":
        channels = {"stem_channels": 16, "partition_size": 2, "block_channels": [16, 32], "block_layers": [1, 1]}
        return models.MaxVit((64, 64), head_dim=8, stochastic_depth_prob=0.1, **channels, **options), 64, 3
    if name in ("resnext50_32x4d", "wide_resnet50_2"):
        widths = {"groups": 8, "width_per_group": 4} if name.startswith("resnext") else {"width_per_group": 80}
        return models.ResNet(models.resnet.Bottleneck, [1, 1, 1, 1], **widths, **options), 32, 3
    if name == "densenet121":
        return models.DenseNet(12, (3, 3, 3), 24, **options), 64, 3
    if name in ("googlenet", "inception_v3"):
        options |= {"init_weights": False, "aux_logits": name == "googlenet"}
    model = models.get_model(name, weights=None, **options)
    if name in ("alexnet", "vgg11", "vgg11_bn"):  # most of their parameters are between two widths of 4,096
        inner = model.classifier
        for at, wide in enumerate(m for m in list(inner) if isinstance(m, nn.Linear)):
            last = wide.out_features == 10
            slot = next(i for i, m in enumerate(inner) if m is wide)
            inner[slot] = nn.Linear(wide.in_features if at == 0 else 128, 10 if last else 128)
    return model, _SIDES.get(name, 64), 3


#: networks with more parameters than this get images of 32 pixels, where they take them
LARGE = 5_000_000
#: options that make the smallest of a family small enough to train in seconds
_VIT = {"embed_dim": 96, "depth": 4, "num_heads": 3}
_DEPTHS = {"depths": (1, 1, 2, 1)}
_SWIN: dict[str, Any] = {**_DEPTHS, "embed_dim": 24, "num_heads": (1, 2, 3, 6), "img_size": 64}
_OPTIONS: dict[str, dict[str, Any]] = {
    "beit_base_patch16_224": _VIT | {"img_size": 64},
    "cait_xxs24_224": {"depth": 4, "img_size": 64},
    "coat_tiny": {"img_size": 64},
    "davit_tiny": {"depths": (1, 1, 1, 1), "embed_dims": (24, 48, 96, 192), "num_heads": (1, 2, 4, 8)},
    "deepseek_vit_412m": {"embed_dim": 96, "depth": 2, "num_heads": 3, "img_size": 56},
    "efficientformerv2_s0": {"img_size": 64},
    "gemma4_vit_167m": {"embed_dim": 96, "depth": 2, "num_heads": 3, "img_size": 64},
    "hiera_tiny_224": {"stages": (1, 1, 2, 1), "embed_dim": 24, "img_size": 64},
    "naflexvit_base_patch16_parfac_gap": {"embed_dim": 96, "depth": 2, "num_heads": 3},
    "qwen3_vit_88m": {"embed_dim": 96, "depth": 2, "num_heads": 3, "img_size": 64},
    "res2next50": {"layers": (1, 1, 1, 1)},
    "sam2_hiera_tiny": {"stages": (1, 1, 2, 1), "embed_dim": 24},
    "samvit_base_patch16_224": _VIT | {"img_size": 64, "global_attn_indexes": (1, 3)},
    "sequencer2d_s": {"layers": (1, 1, 2, 1)},
    "swin_tiny_patch4_window7_224": {**_SWIN, "window_size": 4},
    "swinv2_cr_tiny_224": _SWIN,
    "swinv2_tiny_window16_256": {**_SWIN, "window_size": 4},
    "tiny_vit_5m_224": {"depths": (1, 1, 2, 1)},
    "tnt_s_legacy_patch16_224": {"embed_dim": 96, "inner_dim": 12, "depth": 4, "img_size": 64},
    "twins_svt_small": {"embed_dims": (16, 32, 64, 128), "depths": (1, 1, 2, 1)},
    "mobilenetv5_base": {"channel_multiplier": 0.25},
    "vgg11": {"mlp_ratio": 0.03},
    "vit_srelpos_small_patch16_224": _VIT | {"img_size": 64},
}
_XCEPTION = [
    *({"in_chs": a, "out_chs": b, "stride": 2} for a, b in ((64, 96), (96, 128))),
    {"in_chs": 128, "out_chs": (128, 160, 160), "no_skip": True, "stride": 1},
]
#: classes with their arguments, where the functions that timm calls do not let those through
_CLASSES: dict[str, tuple[str, dict[str, Any]]] = {
    "convmixer_768_32": ("convmixer.ConvMixer", {"dim": 96, "depth": 4, "patch_size": 4, "kernel_size": 5}),
    "crossvit_tiny_240": ("crossvit.CrossVit", {"img_size": 64, "embed_dim": (32, 64), "depth": ((1, 2, 1),) * 2,
                                                "num_heads": (2, 4)}),
    "efficientformer_l1": ("efficientformer.EfficientFormer", {"depths": (1, 1, 2, 2), "embed_dims": (24, 48, 96, 128),
                                                              "num_vit": 1, "img_size": 64}),
    "focalnet_tiny_srf": ("focalnet.FocalNet", {**_DEPTHS, "embed_dim": 24}),
    "gcvit_xxtiny": ("gcvit.GlobalContextVit", {"depths": (1, 1, 1, 1), "embed_dim": 16, "img_size": 64,
                                               "window_size": (4, 4, 4, 2)}),
    "mvitv2_tiny": ("mvitv2.MultiScaleVit", {}),
    "nest_tiny": ("nest.Nest", {"depths": (1, 1, 2), "embed_dims": (24, 48, 96), "num_heads": (1, 2, 4),
                                "img_size": 64}),
    "nextvit_small": ("nextvit.NextViT", {"in_chans": 3, "depths": (1, 1, 5, 1), "stem_chs": (32, 16, 32)}),
    "rdnet_tiny": ("rdnet.RDNet", {"growth_rates": (16,) * 7, "num_init_features": 32}),
    "tresnet_m": ("tresnet.TResNet", {"layers": [1, 1, 1, 1], "width_factor": 0.25}),
    "nasnetalarge": ("nasnet.NASNetALarge", {"stem_size": 24, "num_features": 384}),
    "xception41p": ("xception_aligned.XceptionAligned", {"block_cfg": _XCEPTION, "preact": True}),
    "volo_d1_224": ("volo.VOLO", {"layers": (1, 1, 1, 1), "embed_dims": (24, 48, 48, 48), "num_heads": (2, 4, 4, 4),
                                  "img_size": 64}),
}  # fmt: skip
#: the smallest of a family, or a smaller one made for tests, where options do not help
_INSTEAD = {
    "halonet_h1": "lambda_resnet26t", "convnext_zepto_rms": "test_convnext", "mambaout_femto": "test_mambaout",
    "nf_regnet_b0": "test_nfnet",
    "mobileone_s1": "test_byobnet", "mobilenetv2_035": "test_efficientnet", "resnet10t": "test_resnet",
    "vit_tiny_patch16_224": "test_vit",
}  # fmt: skip


def _timm_names() -> tuple[str, ...]:
    from benchmarks.coverage.subjects import names

    return tuple(_INSTEAD.get(name, name) for name in names("timm"))


TIMM = _timm_names()


def timm_model(name: str) -> tuple[nn.Module, int, int]:
    """As `torchvision_model`."""
    # those that cannot be made for other images are made for their own
    tries: list[dict[str, Any]] = [{"img_size": 64, "depth": 4}, {"img_size": 64}, {}]
    failure: Exception | None = None
    for options in [_OPTIONS[name]] if name in _OPTIONS else [{}] if name in _CLASSES else tries:
        try:
            model = _timm(name, options)
        except (TypeError, ValueError, AssertionError, RuntimeError) as error:
            failure = error
            continue
        small = sum(p.numel() for p in model.parameters()) < LARGE
        channels = model.pretrained_cfg["input_size"][0] if hasattr(model, "pretrained_cfg") else 3
        for side in (64 if small else 32, 64, 32, 56, 96, 128, 160, 224, 256):
            try:
                with torch.no_grad():
                    model.train()(torch.randn(2, channels, side, side))
            except Exception as error:  # whatever a model raises for an image of another size
                failure = error
                continue
            return _timm(name, options), side, channels
    raise RuntimeError(f"{name}: {failure}")


def _timm(name: str, options: dict[str, Any]) -> nn.Module:
    import timm

    if name not in _CLASSES:
        return timm.create_model(name, pretrained=False, num_classes=10, **options)
    path, arguments = _CLASSES[name]
    module, _, kind = path.partition(".")
    library = importlib.import_module(f"timm.models.{module}")
    if name == "mvitv2_tiny":
        config = library.MultiScaleVitCfg(depths=(1, 1, 2, 1), embed_dim=24)
        arguments = {"cfg": config, "img_size": 64}
    return getattr(library, kind)(num_classes=10, **arguments)
