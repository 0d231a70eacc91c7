"""Denoisers and autoencoders of generative models."""

from __future__ import annotations

from benchmarks.wild.entries import Entry, call, fixed, floats, images, integers, named, together

_BLOCKS = {"block_out_channels": (8, 16), "norm_num_groups": 4}
_DOWN = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
_CROSS = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}  # fmt: skip
_HEADS = {"num_attention_heads": 2, "attention_head_dim": 8}
_TEXT = floats(5, 12, longer=(7, 12))
_AE = {
    "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2,
    "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "latent_channels": 4,
}  # fmt: skip

ENTRIES = [
    Entry("diffusers", "unet2d", call("diffusers:UNet2DModel", layers_per_block=1, attention_head_dim=4, **_BLOCKS,
          **_DOWN), together(images(3, 16, 8), integers(50)), True),
    Entry("diffusers", "unet2d_condition", call("diffusers:UNet2DConditionModel", layers_per_block=1,
          cross_attention_dim=12, attention_head_dim=4, **_BLOCKS, **_CROSS), together(images(4, 16, 8), integers(50),
          _TEXT), True),
    Entry("diffusers", "unet1d", call("diffusers:UNet1DModel", block_out_channels=(8, 16), in_channels=14,
          out_channels=14, time_embedding_type="positional", flip_sin_to_cos=False, use_timestep_embedding=True,
          act_fn="mish", down_block_types=("DownResnetBlock1D",) * 2, up_block_types=("UpResnetBlock1D",),
          out_block_type="OutConv1DBlock", mid_block_type="MidResTemporalBlock1D", downsample_each_block=False),
          together(floats(14, 16), integers(50))),
    Entry("diffusers", "autoencoder_kl", call("diffusers:AutoencoderKL", **_AE), named(sample=images(3, 16, 8),
          sample_posterior=fixed(True)), True),
    Entry("diffusers", "vq_model", call("diffusers:VQModel", num_vq_embeddings=16, **_AE), images(3, 16, 8), True,
          outputs=lambda out: out[0]),
    Entry("diffusers", "autoencoder_tiny", call("diffusers:AutoencoderTiny", encoder_block_out_channels=(8, 8),
          decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 2), num_decoder_blocks=(2, 1)), images(3, 16, 8),
          True),
    Entry("diffusers", "dit", call("diffusers:DiTTransformer2DModel", in_channels=4, out_channels=4, num_layers=2,
          sample_size=8, patch_size=2, norm_num_groups=4, num_embeds_ada_norm=10, **_HEADS),
          named(hidden_states=floats(4, 8, 8), timestep=integers(50), class_labels=integers(10))),
    Entry("diffusers", "pixart", call("diffusers:PixArtTransformer2DModel", in_channels=4, out_channels=8,
          num_layers=2, sample_size=8, cross_attention_dim=16, caption_channels=12, use_additional_conditions=False,
          **_HEADS), named(hidden_states=floats(4, 8, 8), encoder_hidden_states=_TEXT, timestep=integers(50)), True),
    Entry("diffusers", "sd3", call("diffusers:SD3Transformer2DModel", sample_size=8, in_channels=4, out_channels=4,
          num_layers=2, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=12, caption_projection_dim=16,
          pooled_projection_dim=10, pos_embed_max_size=16), named(hidden_states=images(4, 8, 8),
          encoder_hidden_states=_TEXT, pooled_projections=floats(10), timestep=integers(50)), True),
    Entry("diffusers", "prior", call("diffusers:PriorTransformer", num_layers=2, embedding_dim=12, num_embeddings=5,
          additional_embeddings=4, **_HEADS), named(hidden_states=floats(12), timestep=integers(50),
          proj_embedding=floats(12), encoder_hidden_states=floats(5, 12))),
    Entry("diffusers", "t2i_adapter", call("diffusers:T2IAdapter", in_channels=3, channels=[8, 16], num_res_blocks=1,
          downscale_factor=4, adapter_type="full_adapter"), images(3, 32), True),
    Entry("diffusers", "controlnet", call("diffusers:ControlNetModel", layers_per_block=1, cross_attention_dim=12,
          attention_head_dim=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
          conditioning_embedding_out_channels=(4, 8), **_BLOCKS), named(sample=images(4, 16, 8), timestep=integers(50),
          encoder_hidden_states=_TEXT, controlnet_cond=images(3, 32, 16)), True),
    Entry("denoising-diffusion-pytorch", "unet", call("denoising_diffusion_pytorch:Unet", dim=8, dim_mults=(1, 2),
          attn_heads=2, attn_dim_head=8, flash_attn=False), together(images(3, 16, 8), integers(50)), True),
    Entry("denoising-diffusion-pytorch", "unet1d", call("denoising_diffusion_pytorch:Unet1D", dim=8, dim_mults=(1, 2),
          channels=3, attn_heads=2, attn_dim_head=8), together(floats(3, 16), integers(50))),
    Entry("denoising-diffusion-pytorch", "karras_unet", call("denoising_diffusion_pytorch.karras_unet:KarrasUnet",
          image_size=16, dim=8, dim_max=16, num_downsamples=1, num_blocks_per_stage=1, attn_res=(8,), attn_dim_head=4,
          num_classes=5), named(x=floats(4, 16, 16), time=floats(), class_labels=integers(5))),
    Entry("compressai", "factorized_prior", call("compressai.models:FactorizedPrior", 8, 12), images(3, 64, 32), True),
    Entry("compressai", "scale_hyperprior", call("compressai.models:ScaleHyperprior", 8, 12), images(3, 64, 64), True),
    Entry("compressai", "mean_scale", call("compressai.models:MeanScaleHyperprior", 8, 12), images(3, 64, 64), True),
    Entry("compressai", "joint_autoregressive", call("compressai.models:JointAutoregressiveHierarchicalPriors", 8, 12),
          images(3, 64, 64), True),
    Entry("compressai", "cheng2020_attention", call("compressai.models:Cheng2020Attention", 8), images(3, 64, 64),
          True),
]  # fmt: skip
