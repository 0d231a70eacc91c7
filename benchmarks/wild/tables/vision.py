"""Detection, segmentation, classification, restoration and matching of images."""

from __future__ import annotations

from torch import nn

from benchmarks.wild.entries import Entry, call, floats, images, imported, together, tokens

_SMP = {"encoder_weights": None, "classes": 3}
_SIDE = images(3, 64, 32)
_SPANDREL = "spandrel.architectures"


def _small_efficientnet() -> nn.Module:
    from efficientnet_pytorch import EfficientNet  # type: ignore[import-not-found]
    from efficientnet_pytorch.utils import BlockDecoder, GlobalParams  # type: ignore[import-not-found]

    blocks = BlockDecoder.decode(["r1_k3_s11_e1_i32_o16_se0.25", "r2_k3_s22_e6_i16_o24_se0.25"])
    options = GlobalParams(width_coefficient=0.5, depth_coefficient=1.0, image_size=64, dropout_rate=0.2,
                           num_classes=5, batch_norm_momentum=0.99, batch_norm_epsilon=1e-3, drop_connect_rate=0.2,
                           depth_divisor=8, min_depth=None, include_top=True)  # fmt: skip
    return EfficientNet(blocks, options)


def _smp(name: str, encoder: str = "tu-mobilenetv3_small_050", **options: object) -> Entry:
    label = name.lower() if encoder.startswith("tu-mobile") else f"{name}_{encoder}".lower()
    return Entry("segmentation-models-pytorch", label, call(
        f"segmentation_models_pytorch:{name}", encoder_name=encoder, **_SMP, **options), _SIDE, True)  # fmt: skip


def _open_clip(image: dict[str, object], text: dict[str, object]) -> object:
    vision = call("open_clip.model:CLIPVisionCfg", image_size=32, **image)
    sizes = {"context_length": 8, "vocab_size": 32, "width": 16, "heads": 2, "layers": 2}
    words = call("open_clip.model:CLIPTextCfg", **sizes, **text)
    return call("open_clip.model:CLIP", embed_dim=12, vision_cfg=vision, text_cfg=words)


ENTRIES = [
    Entry("ultralytics", "yolov8n", call("ultralytics.nn.tasks:DetectionModel", "yolov8n.yaml", nc=5, verbose=False),
          _SIDE, True),
    Entry("ultralytics", "yolo11n", call("ultralytics.nn.tasks:DetectionModel", "yolo11n.yaml", nc=5, verbose=False),
          _SIDE, True),
    Entry("ultralytics", "yolov5n", call("ultralytics.nn.tasks:DetectionModel", "yolov5n.yaml", nc=5, verbose=False),
          _SIDE, True),
    Entry("ultralytics", "yolov8n_seg", call("ultralytics.nn.tasks:SegmentationModel", "yolov8n-seg.yaml", nc=5,
          verbose=False), _SIDE, True),
    Entry("ultralytics", "yolo11n_cls", call("ultralytics.nn.tasks:ClassificationModel", "yolo11n-cls.yaml", nc=5,
          verbose=False), _SIDE, True),
    Entry("ultralytics", "yolov8n_ghost", call("ultralytics.nn.tasks:DetectionModel", "yolov8n-ghost.yaml", nc=5,
          verbose=False), _SIDE, True),
    _smp("Unet", decoder_channels=(32, 24, 16, 12, 8)),
    _smp("UnetPlusPlus", decoder_channels=(32, 24, 16, 12, 8)),
    _smp("FPN", decoder_pyramid_channels=32, decoder_segmentation_channels=32),
    _smp("PSPNet", psp_out_channels=32),
    _smp("DeepLabV3Plus", decoder_channels=16),
    _smp("Linknet"),
    _smp("Segformer", "mit_b0", decoder_segmentation_channels=16),
    _smp("UPerNet", decoder_channels=16),
    Entry("efficientnet-pytorch", "small", _small_efficientnet, floats(3, 64, 64)),
    Entry("efficientnet-pytorch", "b0", call("efficientnet_pytorch:EfficientNet.from_name", "efficientnet-b0",
          num_classes=5), floats(3, 64, 64)),
    Entry("spandrel", "rcan", call(f"{_SPANDREL}.RCAN.__arch.rcan_arch:RCAN", scale=2, n_resgroups=2, n_resblocks=2,
          n_feats=16, reduction=4), images(3, 16, 8), True),
    Entry("spandrel", "nafnet", call(f"{_SPANDREL}.NAFNet.__arch.NAFNet_arch:NAFNet", width=8, enc_blk_nums=[1, 1],
          dec_blk_nums=[1, 1]), images(3, 16, 8), True),
    Entry("spandrel", "span", call(f"{_SPANDREL}.SPAN.__arch.span:SPAN", num_in_ch=3, num_out_ch=3,
          feature_channels=12, upscale=2), images(3, 16, 8), True),
    Entry("spandrel", "swinir", call(f"{_SPANDREL}.SwinIR.__arch.SwinIR:SwinIR", img_size=16, embed_dim=16, depths=[2,
          2], num_heads=[2, 2], window_size=4, mlp_ratio=2, upscale=2, upsampler="pixelshuffledirect"), images(3, 16,
          8), True),
    Entry("spandrel", "hat", call(f"{_SPANDREL}.HAT.__arch.HAT:HAT", img_size=16, embed_dim=16, depths=(2,),
          num_heads=(2,), window_size=4, squeeze_factor=4, compress_ratio=2, mlp_ratio=2, upscale=2, num_feat=16),
          images(3, 16, 8), True),
    Entry("spandrel", "esrgan", call(f"{_SPANDREL}.ESRGAN.__arch.RRDB:RRDBNet", num_filters=12, num_blocks=2, scale=2),
          images(3, 12, 8), True),
    Entry("spandrel", "compact", call(f"{_SPANDREL}.Compact.__arch.SRVGG:SRVGGNetCompact", num_feat=12, num_conv=3,
          upscale=2), images(3, 16, 8), True),
    Entry("spandrel", "dncnn", call(f"{_SPANDREL}.DnCNN.__arch.network_dncnn:DnCNN", in_nc=3, out_nc=3, nc=12, nb=5,
          mode="BR"), images(3, 16, 8), True),
    Entry("spandrel", "plksr", call(f"{_SPANDREL}.PLKSR.__arch.PLKSR:PLKSR", dim=16, n_blocks=2, upscaling_factor=2),
          images(3, 20, 8), True),
    Entry("spandrel", "safmn", call(f"{_SPANDREL}.SAFMN.__arch.safmn:SAFMN", dim=16, n_blocks=2, upscaling_factor=2),
          images(3, 16, 16), True),
    Entry("spandrel", "omnisr", call(f"{_SPANDREL}.OmniSR.__arch.OmniSR:OmniSR", num_feat=16, block_num=1, res_num=1,
          up_scale=2, window_size=4), images(3, 16, 8), True),
    Entry("spandrel", "drunet", call(f"{_SPANDREL}.DRUNet.__arch.network_unet:DRUNet", in_nc=3, out_nc=3, nc=[8, 12,
          16, 24], nb=1), images(3, 16, 8), True),
    Entry("kornia", "hardnet", call("kornia.feature:HardNet", pretrained=False), floats(1, 32, 32)),
    Entry("kornia", "sosnet", call("kornia.feature:SOSNet", pretrained=False), floats(1, 32, 32)),
    Entry("kornia", "tiny_vit", call("kornia.models.tiny_vit:TinyViT", img_size=64, num_classes=5, embed_dims=(8, 16,
          16, 24), depths=(1, 1, 1, 1), num_heads=(1, 2, 2, 3), window_sizes=(4, 4, 4, 2)), floats(3, 64, 64)),
    Entry("kornia", "vit", call("kornia.models.vit:VisionTransformer", image_size=16, patch_size=4, embed_dim=16,
          depth=2, num_heads=2), floats(3, 16, 16)),
    Entry("kornia", "mobile_vit", call("kornia.models.vit_mobile:MobileViT", mode="xxs"), images(3, 64, 64), True),
    Entry("segment-anything", "image_encoder", call("segment_anything.modeling:ImageEncoderViT", img_size=64,
          patch_size=8, embed_dim=16, depth=2, num_heads=2, out_chans=12, use_rel_pos=True, window_size=4,
          global_attn_indexes=(1,)), floats(3, 64, 64)),
    Entry("open-clip-torch", "vit", _open_clip({"layers": 2, "width": 16, "head_width": 8, "patch_size": 8}, {}),
          together(floats(3, 32, 32), tokens(32, 8))),
    Entry("open-clip-torch", "resnet", _open_clip({"layers": (1, 1, 1, 1), "width": 8, "head_width": 8}, {}),
          together(floats(3, 32, 32), tokens(32, 8))),
    Entry("open-clip-torch", "siglip_text", _open_clip({"layers": 2, "width": 16, "head_width": 8, "patch_size": 8,
          "pool_type": "avg"}, {"no_causal_mask": True, "pool_type": "last"}), together(floats(3, 32, 32), tokens(32,
          8))),
    Entry("facenet-pytorch", "onet", call("facenet_pytorch.models.mtcnn:ONet", pretrained=False), floats(3, 48, 48)),
    Entry("resnest", "resnest", call("resnest.torch.resnet:ResNet", imported("resnest.torch.resnet:Bottleneck"), [1, 1,
          1, 1], radix=2, groups=1, bottleneck_width=16, num_classes=5, deep_stem=True, stem_width=8, avg_down=True,
          avd=True, avd_first=False), images(3, 64, 32), True),
    Entry("torchsr", "edsr", call("torchsr.models.edsr:EDSR", n_resblocks=2, n_feats=12, scale=2, res_scale=0.1),
          images(3, 12, 8), True),
    Entry("torchsr", "ninasr", call("torchsr.models.ninasr:NinaSR", 2, 12, 2, expansion=2.0), images(3, 12, 8), True),
    Entry("pytorchcv", "seresnet20", call("pytorchcv.model_provider:get_model", "seresnet20_cifar10"), floats(3, 32,
          32)),
    Entry("pytorchcv", "diaresnet20", call("pytorchcv.model_provider:get_model", "diaresnet20_cifar10"), floats(3, 32,
          32)),
    Entry("pytorchcv", "densenet40_k12", call("pytorchcv.model_provider:get_model", "densenet40_k12_cifar10"),
          floats(3, 32, 32)),
    Entry("pytorchcv", "shakeshakeresnet20_2x16d", call("pytorchcv.model_provider:get_model",
          "shakeshakeresnet20_2x16d_cifar10"), floats(3, 32, 32)),
    Entry("pytorchcv", "ror3_56", call("pytorchcv.model_provider:get_model", "ror3_56_cifar10"), floats(3, 32, 32)),
    Entry("pytorchcv", "nin", call("pytorchcv.model_provider:get_model", "nin_cifar10"), floats(3, 32, 32)),
    Entry("pretrainedmodels", "dpn", call("pretrainedmodels.models.dpn:DPN", small=True, num_init_features=8, k_r=16,
          groups=4, k_sec=(1, 1, 1, 1), inc_sec=(4, 8, 8, 8), num_classes=5), images(3, 64, 32), True),
]  # fmt: skip
