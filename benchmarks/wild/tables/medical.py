"""Volumes, scans and signals of the body; video."""

from __future__ import annotations

from benchmarks.wild.entries import Entry, call, floats, images, imported, integers, together

_NETS = "monai.networks.nets"
_EEG = {"n_chans": 4, "n_outputs": 3}
_UNET = {"spatial_dims": 2, "in_channels": 1, "out_channels": 2}


def _eeg(name: str, cls: str, times: int = 250, **options: object) -> Entry:
    return Entry("braindecode", name, call(f"braindecode.models:{cls}", n_times=times, **_EEG, **options),
                 floats(4, times))  # fmt: skip


ENTRIES = [
    Entry("monai", "unet_3d", call(f"{_NETS}:UNet", spatial_dims=3, in_channels=1, out_channels=2, channels=(4, 8, 16),
          strides=(2, 2), num_res_units=1), floats(1, 16, 16, 16, longer=(1, 24, 16, 16)), True),
    Entry("monai", "segresnet", call(f"{_NETS}:SegResNet", spatial_dims=2, init_filters=8, in_channels=1,
          blocks_down=(1, 1), blocks_up=(1,)), images(1, 16, 8), True),
    Entry("monai", "dynunet", call(f"{_NETS}:DynUNet", **_UNET, kernel_size=[3, 3, 3], strides=[1, 2, 2],
          upsample_kernel_size=[2, 2], filters=[4, 8, 16], res_block=True, deep_supervision=True, deep_supr_num=1),
          images(1, 16, 8), True, outputs=lambda out: out[:, 0] if out.dim() == 5 else out),
    Entry("monai", "unetr", call(f"{_NETS}:UNETR", in_channels=1, out_channels=2, img_size=32, feature_size=4,
          hidden_size=24, mlp_dim=32, num_heads=2, spatial_dims=2), floats(1, 32, 32)),
    Entry("monai", "swin_unetr", call(f"{_NETS}:SwinUNETR", in_channels=1, out_channels=2, feature_size=12, depths=(1,
          1, 1, 1), num_heads=(2, 2, 2, 2), window_size=4, spatial_dims=2), images(1, 64, 32), True),
    Entry("monai", "attention_unet", call(f"{_NETS}:AttentionUnet", **_UNET, channels=(4, 8, 16), strides=(2, 2)),
          images(1, 16, 8), True),
    Entry("monai", "basic_unet_plus_plus", call(f"{_NETS}:BasicUNetPlusPlus", spatial_dims=2, features=(4, 4, 8, 12,
          16, 4)), images(1, 32, 16), True),
    Entry("monai", "var_autoencoder", call(f"{_NETS}:VarAutoEncoder", spatial_dims=2, in_shape=(1, 16, 16),
          out_channels=1, latent_size=6, channels=(4, 8), strides=(2, 2)), floats(1, 16, 16)),
    Entry("monai", "vqvae", call(f"{_NETS}:VQVAE", spatial_dims=2, in_channels=1, out_channels=1, channels=(8, 12),
          num_res_layers=1, num_res_channels=(8, 12), downsample_parameters=((2, 4, 1, 1),) * 2,
          upsample_parameters=((2, 4, 1, 1, 0),) * 2, num_embeddings=16, embedding_dim=6), images(1, 16, 8), True),
    Entry("monai", "autoencoder_kl", call(f"{_NETS}:AutoencoderKL", spatial_dims=2, num_res_blocks=(1, 1), channels=(8,
          8), attention_levels=(False, True), latent_channels=3, norm_num_groups=4), images(1, 16, 8), True),
    Entry("monai", "diffusion_unet", call(f"{_NETS}:DiffusionModelUNet", spatial_dims=2, in_channels=1, out_channels=1,
          num_res_blocks=(1, 1), channels=(8, 16), attention_levels=(False, True), norm_num_groups=4,
          num_head_channels=4), together(images(1, 16, 8), integers(50)), True),
    Entry("monai", "mednext", call(f"{_NETS}:MedNeXt", spatial_dims=2, init_filters=8, kernel_size=3, blocks_down=(1,
          1), blocks_bottleneck=1, blocks_up=(1, 1)), images(1, 16, 8), True),
    Entry("monai", "senet", call(f"{_NETS}:SENet", 2, 1, "se_resnetxt_bottleneck", [1, 1, 1, 1], groups=4, reduction=4,
          inplanes=16, num_classes=5), images(1, 32, 32), True),
    Entry("monai", "densenet", call(f"{_NETS}:DenseNet", 2, 1, 5, init_features=8, growth_rate=4, block_config=(2, 2)),
          images(1, 32, 16), True),
    Entry("monai", "highresnet", call(f"{_NETS}:HighResNet", spatial_dims=2, layer_params=({"name": "conv_0",
          "n_features": 8, "kernel_size": 3}, {"name": "res_1", "n_features": 8, "kernels": (3, 3), "repeat": 1},
          {"name": "res_2", "n_features": 12, "kernels": (3, 3), "repeat": 1}, {"name": "conv_1", "n_features": 16,
          "kernel_size": 1}, {"name": "conv_2", "kernel_size": 1})), images(1, 16, 8), True),
    Entry("dynamic-network-architectures", "plain_unet",
          call("dynamic_network_architectures.architectures.unet:PlainConvUNet", 1, 3, (4, 8, 12),
          imported("torch.nn:Conv2d"), 3, (1, 2, 2), 1, 2, 1, conv_bias=True,
          norm_op=imported("torch.nn:InstanceNorm2d"), norm_op_kwargs={"affine": True},
          nonlin=imported("torch.nn:LeakyReLU"), deep_supervision=True), images(1, 16, 8), True),
    Entry("dynamic-network-architectures", "residual_unet",
          call("dynamic_network_architectures.architectures.unet:ResidualEncoderUNet", 1, 3, (4, 8, 12),
          imported("torch.nn:Conv3d"), 3, (1, 2, 2), 1, 2, 1, conv_bias=True,
          norm_op=imported("torch.nn:InstanceNorm3d"), norm_op_kwargs={"affine": True},
          nonlin=imported("torch.nn:LeakyReLU")), floats(1, 8, 8, 8, longer=(1, 12, 8, 8)), True),
    Entry("torchxrayvision", "densenet", call("torchxrayvision.models:DenseNet", growth_rate=4, block_config=(2, 2, 2,
          2), num_init_features=8, num_classes=5), floats(1, 224, 224)),
    _eeg("eegnet", "EEGNet"),
    _eeg("shallow", "ShallowFBCSPNet"),
    _eeg("deep4", "Deep4Net", 600, n_filters_time=8, n_filters_spat=8, n_filters_2=8, n_filters_3=12, n_filters_4=16),
    _eeg("eegconformer", "EEGConformer", 250, n_filters_time=8, num_layers=2, num_heads=2),
    _eeg("atcnet", "ATCNet", 500, sfreq=125.0),
    _eeg("tcn", "BDTCN", 250, n_filters=8, n_blocks=2, kernel_size=3),
    _eeg("eegnex", "EEGNeX", 250),
    _eeg("tidnet", "TIDNet", 250),
    Entry("pytorchvideo", "slow_resnet", call("pytorchvideo.models.resnet:create_resnet", model_depth=50,
          model_num_class=5, stem_dim_out=8, head_pool_kernel_size=(4, 2, 2)), floats(3, 4, 64, 64)),
    Entry("pytorchvideo", "x3d", call("pytorchvideo.models.x3d:create_x3d", input_clip_length=4, input_crop_size=64,
          model_num_class=5, width_factor=0.5, depth_factor=1.0, head_dim_out=32), floats(3, 4, 64, 64)),
    Entry("pytorchvideo", "mvit", call("pytorchvideo.models.vision_transformers:create_multiscale_vision_transformers",
          spatial_size=32, temporal_size=4, depth=2, patch_embed_dim=16, num_heads=2, head_num_classes=5,
          pool_q_stride_size=[[1, 1, 2, 2]], pool_kv_stride_adaptive=[1, 2, 2], pool_kvq_kernel=[3, 3, 3],
          embed_dim_mul=[[1, 2.0]], atten_head_mul=[[1, 2.0]]), floats(3, 4, 32, 32)),
]  # fmt: skip
