"""Attention and its relatives, written with einops."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from benchmarks.wild.entries import Entry, call, floats, images, named, together, tokens

_VIT = {"image_size": 16, "patch_size": 4, "num_classes": 5, "dim": 16, "depth": 2, "heads": 2, "mlp_dim": 24}
_LM = {"num_tokens": 32, "max_seq_len": 24}
_IMAGE = floats(3, 16, 16)
_TOKENS = tokens(32, 10, 14)


def _vit(name: str, cls: str, module: str = "", **changed: object) -> Entry:
    options = {k: v for k, v in {**_VIT, **changed}.items() if v is not None}
    return Entry("vit-pytorch", name, call(f"vit_pytorch.{module or name}:{cls}", **options), _IMAGE)


def _vq_autoencoder() -> nn.Module:
    from vector_quantize_pytorch import VectorQuantize  # type: ignore[import-not-found]

    class Autoencoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encode = nn.Sequential(nn.Conv2d(3, 8, 4, 2, 1), nn.GELU(), nn.Conv2d(8, 12, 3, padding=1))
            self.quantize = VectorQuantize(dim=12, codebook_size=16, accept_image_fmap=True)
            self.decode = nn.Sequential(nn.Conv2d(12, 8, 3, padding=1), nn.GELU(), nn.ConvTranspose2d(8, 3, 2, 2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            codes, _, _ = self.quantize(self.encode(x))
            return self.decode(codes)

    return Autoencoder()


def _rotary_attention() -> nn.Module:
    from rotary_embedding_torch import RotaryEmbedding  # type: ignore[import-not-found]

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rotary = RotaryEmbedding(dim=4)
            self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
            q, k = self.rotary.rotate_queries_or_keys(q), self.rotary.rotate_queries_or_keys(k)
            y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            return self.out(y.transpose(1, 2).flatten(2))

    return nn.Sequential(nn.Linear(6, 16), Attention(), nn.Linear(16, 3))


def _between(path: str, width: int, *args: object, **options: object) -> Callable[[], nn.Module]:
    """A layer between two linear ones."""
    first, last = call("torch.nn:Linear", 6, width), call("torch.nn:Linear", width, 3)
    return call("torch.nn:Sequential", first, call(path, *args, **options), last)


ENTRIES = [
    _vit("vit", "ViT"),
    _vit("simple_vit", "SimpleViT"),
    _vit("cait", "CaiT", depth=1, cls_depth=1),
    Entry("vit-pytorch", "t2t", call("vit_pytorch.t2t:T2TViT", image_size=32, num_classes=5, dim=16, depth=2, heads=2,
          mlp_dim=24, t2t_layers=((7, 4), (3, 2))), floats(3, 32, 32)),
    Entry("vit-pytorch", "cct", call("vit_pytorch.cct:CCT", img_size=16, embedding_dim=16, n_conv_layers=1,
          num_layers=2, num_heads=2, mlp_ratio=1.5, num_classes=5, positional_embedding="learnable"), _IMAGE),
    Entry("vit-pytorch", "cross_vit", call("vit_pytorch.cross_vit:CrossViT", image_size=16, num_classes=5, depth=1,
          sm_dim=16, sm_patch_size=4, sm_enc_depth=1, sm_enc_heads=2, sm_enc_mlp_dim=24, sm_enc_dim_head=8, lg_dim=24,
          lg_patch_size=8, lg_enc_depth=1, lg_enc_heads=2, lg_enc_mlp_dim=32, lg_enc_dim_head=8, cross_attn_depth=1,
          cross_attn_heads=2, cross_attn_dim_head=8), _IMAGE),
    Entry("vit-pytorch", "pit", call("vit_pytorch.pit:PiT", image_size=16, patch_size=4, dim=16, num_classes=5,
          depth=(1, 1), heads=2, mlp_dim=24), _IMAGE),
    Entry("vit-pytorch", "levit", call("vit_pytorch.levit:LeViT", image_size=64, num_classes=5, stages=2, dim=(16, 24),
          depth=1, heads=(2, 3), mlp_mult=2), floats(3, 64, 64)),
    Entry("vit-pytorch", "cvt", call("vit_pytorch.cvt:CvT", num_classes=5, s1_emb_dim=8, s1_heads=1, s1_depth=1,
          s2_emb_dim=16, s2_heads=2, s2_depth=1, s3_emb_dim=24, s3_heads=2, s3_depth=1), floats(3, 64, 64)),
    Entry("vit-pytorch", "crossformer", call("vit_pytorch.crossformer:CrossFormer", num_classes=5, dim=(32, 32, 64,
          64), depth=(1, 1, 1, 1), global_window_size=(4, 2, 1, 1), local_window_size=(4, 4, 2, 1)), floats(3, 64,
          64)),
    Entry("vit-pytorch", "regionvit", call("vit_pytorch.regionvit:RegionViT", dim=(8, 8, 16, 16), depth=(1, 1, 1, 1),
          window_size=2, num_classes=5), floats(3, 64, 64)),
    Entry("vit-pytorch", "scalable_vit", call("vit_pytorch.scalable_vit:ScalableViT", num_classes=5, dim=8, heads=(1,
          2), depth=(1, 1), ssa_dim_key=(8, 8), reduction_factor=(4, 2), window_size=(4, None)), floats(3, 64, 64)),
    Entry("vit-pytorch", "max_vit", call("vit_pytorch.max_vit:MaxViT", num_classes=5, dim_conv_stem=8, dim=8,
          dim_head=8, depth=(1, 1), window_size=4), floats(3, 64, 64)),
    Entry("vit-pytorch", "nest", call("vit_pytorch.nest:NesT", image_size=32, patch_size=4, dim=8, heads=2,
          num_hierarchies=2, block_repeats=(1, 1), num_classes=5), floats(3, 32, 32)),
    Entry("vit-pytorch", "mobile_vit", call("vit_pytorch.mobile_vit:MobileViT", image_size=(64, 64), dims=[16, 16, 16],
          channels=[8, 8, 12, 12, 16, 16, 24, 24, 32, 32, 48], num_classes=5), floats(3, 64, 64)),
    Entry("vit-pytorch", "xcit", call("vit_pytorch.xcit:XCiT", **_VIT, cls_depth=1), _IMAGE),
    Entry("vit-pytorch", "vit_for_small_dataset", call("vit_pytorch.vit_for_small_dataset:ViT", **_VIT), _IMAGE),
    Entry("vit-pytorch", "ats_vit", call("vit_pytorch.ats_vit:ViT", **{**_VIT, "mlp_dim": 24}, max_tokens_per_depth=(8,
          4)), _IMAGE),
    Entry("vit-pytorch", "vivit", call("vit_pytorch.vivit:ViViT", image_size=16, frames=4, image_patch_size=4,
          frame_patch_size=2, num_classes=5, dim=16, spatial_depth=1, temporal_depth=1, heads=2, mlp_dim=24), floats(3,
          4, 16, 16)),
    Entry("perceiver-pytorch", "perceiver", call("perceiver_pytorch:Perceiver", input_channels=3, input_axis=2,
          num_freq_bands=2, max_freq=4.0, depth=2, num_latents=6, latent_dim=16, cross_heads=1, latent_heads=2,
          cross_dim_head=8, latent_dim_head=8, num_classes=5, weight_tie_layers=False), floats(8, 8, 3, longer=(12, 12,
          3)), True),
    Entry("perceiver-pytorch", "perceiver_io", call("perceiver_pytorch:PerceiverIO", dim=10, queries_dim=12,
          logits_dim=5, depth=2, num_latents=6, latent_dim=16, cross_heads=1, latent_heads=2, cross_dim_head=8,
          latent_dim_head=8), named(data=floats(7, 10, longer=(9, 10)), queries=lambda b, o: floats(4, 12)(b, o)),
          True),
    Entry("linformer", "lm", call("linformer:LinformerLM", num_tokens=32, dim=16, seq_len=10, depth=2, heads=2, k=4),
          tokens(32, 10)),
    Entry("performer-pytorch", "lm", call("performer_pytorch:PerformerLM", dim=16, depth=2, heads=2, dim_head=8,
          causal=False, **_LM), _TOKENS, True),
    Entry("linear-attention-transformer", "lm", call("linear_attention_transformer:LinearAttentionTransformerLM",
          dim=16, heads=2, depth=2, num_tokens=32, max_seq_len=16, n_local_attn_heads=0, causal=True), tokens(32, 16)),
    Entry("local-attention", "transformer", call("local_attention:LocalTransformer", dim=16, depth=2, heads=2,
          dim_head=8, local_attn_window_size=4, **_LM), _TOKENS, True),
    Entry("nystrom-attention", "nystromformer", _between("nystrom_attention:Nystromformer", 16, dim=16, depth=2,
          heads=2, dim_head=8, num_landmarks=4, pinv_iterations=2), floats(16, 6, longer=(24, 6)), True),
    Entry("axial-attention", "image_transformer", call("torch.nn:Sequential", call("torch.nn:Conv2d", 3, 16, 1),
          call("axial_attention:AxialImageTransformer", dim=16, depth=1, heads=2, reversible=False),
          call("torch.nn:Conv2d", 16, 3, 1)), images(3, 8, 4), True),
    Entry("conformer", "conformer", _between("conformer:Conformer", 16, dim=16, depth=2, heads=2, dim_head=8,
          conv_kernel_size=5), floats(10, 6, longer=(14, 6)), True),
    Entry("g-mlp-pytorch", "lm", call("g_mlp_pytorch:gMLP", num_tokens=32, dim=16, depth=2, seq_len=10, heads=2),
          tokens(32, 10)),
    Entry("g-mlp-pytorch", "vision", call("g_mlp_pytorch:gMLPVision", image_size=16, patch_size=4, num_classes=5,
          dim=16, depth=2), _IMAGE),
    Entry("mlp-mixer-pytorch", "mixer", call("mlp_mixer_pytorch:MLPMixer", image_size=16, channels=3, patch_size=4,
          dim=16, depth=2, num_classes=5), _IMAGE),
    Entry("lambda-networks", "between_convs", call("torch.nn:Sequential", call("torch.nn:Conv2d", 3, 16, 1),
          call("lambda_networks:LambdaLayer", dim=16, dim_out=16, r=3, dim_k=4, heads=2, dim_u=1),
          call("torch.nn:Conv2d", 16, 3, 1)), images(3, 8, 4), True),
    Entry("bottleneck-transformer-pytorch", "stack", call("torch.nn:Sequential", call("torch.nn:Conv2d", 3, 16, 1),
          call("bottleneck_transformer_pytorch:BottleStack", dim=16, fmap_size=8, dim_out=32, num_layers=2, heads=2,
          dim_head=8), call("torch.nn:Conv2d", 32, 3, 1)), floats(3, 8, 8)),
    Entry("soft-moe-pytorch", "layer", _between("soft_moe_pytorch:SoftMoE", 16, dim=16, seq_len=10, num_experts=3),
          floats(10, 6)),
    Entry("siren-pytorch", "siren", call("siren_pytorch:SirenNet", dim_in=2, dim_hidden=16, dim_out=3, num_layers=3),
          floats(2)),
    Entry("vector-quantize-pytorch", "autoencoder", _vq_autoencoder, images(3, 16, 8), True),
    Entry("rotary-embedding-torch", "attention", _rotary_attention, floats(8, 6, longer=(12, 6)), True),
    Entry("x-transformers", "decoder", call("x_transformers:TransformerWrapper", **_LM,
          attn_layers=call("x_transformers:Decoder", dim=16, depth=2, heads=2, attn_dim_head=8)), _TOKENS, True),
    Entry("x-transformers", "modern", call("x_transformers:TransformerWrapper", **_LM,
          attn_layers=call("x_transformers:Decoder", dim=16, depth=2, heads=2, attn_dim_head=8, rotary_pos_emb=True,
          use_rmsnorm=True, ff_glu=True, ff_swish=True, attn_kv_heads=1)), _TOKENS, True),
    Entry("x-transformers", "encoder_alibi", call("x_transformers:TransformerWrapper", **_LM,
          attn_layers=call("x_transformers:Encoder", dim=16, depth=2, heads=2, attn_dim_head=8, alibi_pos_bias=True)),
          _TOKENS, True),
    Entry("x-transformers", "encoder_decoder", call("x_transformers:XTransformer", dim=16, enc_num_tokens=32,
          enc_depth=1, enc_heads=2, enc_max_seq_len=24, dec_num_tokens=32, dec_depth=1, dec_heads=2,
          dec_max_seq_len=24), together(_TOKENS, _TOKENS)),
    Entry("x-transformers", "vision", call("x_transformers:ViTransformerWrapper", image_size=16, patch_size=4,
          num_classes=5, attn_layers=call("x_transformers:Encoder", dim=16, depth=2, heads=2, attn_dim_head=8)),
          _IMAGE),
    Entry("itransformer", "itransformer", call("iTransformer:iTransformer", num_variates=5, lookback_len=12, dim=16,
          depth=2, heads=2, dim_head=8, pred_length=4, num_tokens_per_variate=1, use_reversible_instance_norm=True),
          floats(12, 5)),
    Entry("tab-transformer-pytorch", "tab_transformer", call("tab_transformer_pytorch:TabTransformer", categories=(5,
          4), num_continuous=3, dim=16, dim_out=2, depth=2, heads=2, dim_head=8, mlp_act=call("torch.nn:ReLU")),
          together(tokens(4, 2), floats(3))),
    Entry("tab-transformer-pytorch", "ft_transformer", call("tab_transformer_pytorch:FTTransformer", categories=(5, 4),
          num_continuous=3, dim=16, dim_out=2, depth=2, heads=2, dim_head=8), together(tokens(4, 2), floats(3))),
    Entry("egnn-pytorch", "network", call("egnn_pytorch:EGNN_Network", depth=2, dim=16, m_dim=8), together(floats(6,
          16, longer=(8, 16)), floats(6, 3, longer=(8, 3))), True),
]  # fmt: skip
