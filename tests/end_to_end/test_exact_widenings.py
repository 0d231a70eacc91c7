"""Known ways to widen modern layers without changing the function, each on a real module that uses the layer.

One row for each recipe and module: the widths that must be free, with the number of units that they grow by at once, or
the widths that must be pinned, with the reason. A recipe may be one of several exact ways to grow a width; the row then
asks that the width grows exactly, whichever way fxgrow takes, and a comment says which.
"""

from __future__ import annotations

import copy
import functools
import importlib
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.utils import _pytree as pytree

import fxgrow
from fxgrow.integrations._torchvision import import_torchvision
from fxgrow.rewriting.rewrite import rewrite

Inputs = Any  # a tuple of positional or a dict of keyword inputs


class Row(NamedTuple):
    """A recipe on one module.

    Attributes:
        recipe: its name.
        on: the module, for the test's name.
        build: makes it.
        inputs: makes inputs for so many samples.
        free: the widths that must grow, together, with the step of each.
        pinned: the widths that must not, each with the code of its reason and a part of the message.
        steps: how many steps to grow by.
        single: compared in float32, where the module computes nothing else.
        fresh: LayerNorms have one weight for all units, as before training.
        slow: a second module for a recipe, for `make test-all`.
    """

    recipe: str
    on: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int], Inputs]
    free: Mapping[str, int] = {}
    pinned: Mapping[str, tuple[str, str]] = {}
    steps: tuple[int, int] = (1, 2)
    single: bool = False
    fresh: bool = False
    slow: bool = False


def library(name: str) -> Any:
    """A module of torchvision, or of timm or transformers, which import it."""
    pytest.importorskip("torchvision")
    import_torchvision()
    pytest.importorskip(name.partition(".")[0])
    return importlib.import_module(name)


def hugging_face(model: str, **options: Any) -> nn.Module:
    """A class of transformers in a tiny configuration."""
    cls = getattr(library("transformers"), model)
    if "vocab_size" in options:
        options |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "use_cache": False}
    return cls(cls.config_class(**options))


TEXT = {
    "vocab_size": 23, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2,
    "max_position_embeddings": 32,
}  # fmt: skip
GROUPED = TEXT | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
GPT2 = {"vocab_size": 23, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32} | {
    f"{where}_pdrop": 0.0 for where in ("resid", "attn", "embd")
}
IMAGE = {"image_size": 16, "patch_size": 4, "num_labels": 3, "num_hidden_layers": 1, "num_attention_heads": 2}
OPT = TEXT | {"ffn_dim": 20, "word_embed_proj_dim": 8, "dropout": 0.0, "tie_word_embeddings": False}


#: an eps that shows where it is left as it was
RMS_NORM = functools.partial(nn.RMSNorm, eps=0.1)


def text(n: int) -> Inputs:
    return {"input_ids": torch.randint(3, 23, (n, 7))}


def pixels(n: int) -> Inputs:
    return {"pixel_values": torch.randn(n, 3, 16, 16)}


def shaped(*shape: int) -> Callable[[int], Inputs]:
    """Inputs with a batch dimension in front."""
    return lambda n: (torch.randn(n, *shape),)


IMAGES, TOKENS = shaped(3, 8, 8), shaped(5, 6)


class Function(nn.Module):
    """Layers, and what a forward does with them."""

    def __init__(self, forward: Callable[..., Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.computes = forward
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.computes(self, x)


def llama4_experts() -> nn.Module:
    """All tokens go to all experts."""
    config = library("transformers").Llama4TextConfig(hidden_size=6, intermediate_size=8, num_local_experts=3)
    experts: nn.Module = library("transformers.models.llama4.modeling_llama4").Llama4TextExperts(config)
    for p in experts.parameters():
        nn.init.normal_(p)
    return experts


def interleaved() -> nn.Module:
    """Gates and values in turn, as (g0, u0, g1, u1, ...)."""

    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.gate_up(x).unflatten(-1, (-1, 2))
        return m.down(F.silu(y[..., 0]) * y[..., 1])

    return Function(forward, gate_up=nn.Linear(6, 16), down=nn.Linear(8, 4))


def recurrent(cls: type[nn.RNNBase], both: bool) -> nn.Module:
    layers = {"r": cls(6, 5, 2, batch_first=True, bidirectional=both), "out": nn.Linear(10 if both else 5, 3)}
    return Function(lambda m, x: m.out(m.r(x)[0]), **layers)


def values_of_another_size() -> nn.Module:
    attention = nn.MultiheadAttention(6, 2, vdim=10, batch_first=True)
    layers = {"value": nn.Linear(6, 10), "attention": attention, "out": nn.Linear(6, 3)}
    return Function(lambda m, x: m.out(m.attention(x, x, m.value(x), need_weights=False)[0]), **layers)


def encoder(first: bool, norm: Callable[[int], nn.Module] = nn.LayerNorm) -> nn.Module:
    """A stream into an encoder layer of torch and out of it."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, F.silu, batch_first=True, norm_first=first)
    layer.norm1, layer.norm2 = norm(8), norm(8)
    return nn.Sequential(nn.Linear(6, 8), layer, norm(8) if first else nn.Identity(), nn.Linear(8, 3))


def vit(**options: Any) -> nn.Module:
    sizes = {"image_size": 8, "patch_size": 4, "num_layers": 1, "num_heads": 2, "hidden_dim": 8, "mlp_dim": 16}
    return library("torchvision.models").VisionTransformer(**sizes, num_classes=3, **options)


def timm_vit(**options: Any) -> nn.Module:
    sizes = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2, "num_classes": 3}
    return library("timm.models.vision_transformer").VisionTransformer(**sizes, **options)


def convnext() -> nn.Module:
    module = library("torchvision.models.convnext")
    return module.ConvNeXt([module.CNBlockConfig(6, 8, 1), module.CNBlockConfig(8, None, 1)], num_classes=3)


def mb_conv() -> nn.Module:
    module = library("torchvision.models.efficientnet")
    return module.MBConv(module.MBConvConfig(2, 3, 1, 8, 8, 1), 0.5, nn.BatchNorm2d)


def shuffled() -> nn.Module:
    unit = library("torchvision.models.shufflenetv2").InvertedResidual
    return nn.Sequential(nn.Conv2d(3, 4, 1), unit(4, 8, 2), unit(8, 8, 1), nn.Conv2d(8, 3, 1))


def basic_block(**options: Any) -> nn.Module:
    return library("torchvision.models.resnet").BasicBlock(6, 6, **options)


def convolutions(*between: nn.Module, into: int, out_of: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, into, 3, padding=1), *between, nn.Conv2d(out_of, 4, 1))


def mixtral(experts: str) -> nn.Module:
    if experts == "grouped_mm" and not hasattr(F, experts):
        pytest.skip("this PyTorch has no grouped_mm")
    options = {"num_local_experts": 4, "num_experts_per_tok": 2, "experts_implementation": experts}
    return hugging_face("MixtralForCausalLM", **GROUPED, **options)


LLAMA = functools.partial(hugging_face, "LlamaForCausalLM", **GROUPED, rms_norm_eps=0.1)
Q_PROJ = "model.layers.0.self_attn.q_proj"

ROWS = [
    # gated perceptrons
    Row("swiglu_separate", "timm SwiGLU", lambda: library("timm.layers").SwiGLU(6, 8, 4), TOKENS, {"fc1_g": 1}),
    # an alternative start of the same width, which grows with its outgoing weights at zero
    Row("swiglu_separate_omega_nonzero", "Llama", LLAMA, text, {"model.layers.0.mlp.gate_proj": 1}),
    Row("swiglu_packed_chunk", "timm SwiGLUPacked", lambda: library("timm.layers").SwiGLUPacked(6, 16, 4), TOKENS,
        {"fc1": 2}),
    Row("swiglu_packed_chunk", "Phi-3", lambda: hugging_face("Phi3ForCausalLM", **GROUPED), text,
        {"model.layers.0.mlp.gate_up_proj": 2}, slow=True),
    Row("swiglu_interleaved", "torch", interleaved, TOKENS, {"gate_up": 2}),
    Row("glu_conv_channels", "torch", lambda: convolutions(nn.GLU(1), into=8, out_of=4), IMAGES, {"0": 2}),
    # attention
    Row("value_width", "OPT", lambda: hugging_face("OPTForCausalLM", **OPT), text,
        {"model.decoder.layers.0.self_attn.v_proj": 2}),
    Row("value_width", "LeViT", lambda: library("timm.models.levit").Attention(8, 4, num_heads=2, resolution=(2, 3)),
        shaped(6, 8), {"qkv.linear[1]": 2}, slow=True),
    Row("qk_width_scale_kept", "OPT", lambda: hugging_face("OPTForCausalLM", **OPT), text,
        {"model.decoder.layers.0.self_attn.q_proj": 2}),
    # fxgrow writes the old scale into the graph instead of rescaling the queries
    Row("qk_width_scale_recomputed", "CaiT", lambda: library("timm.models.cait").ClassAttn(8, 2), shaped(5, 8),
        {"q": 2, "v": 2}),
    Row("qk_bias", "torch", lambda: encoder(True), TOKENS, {"1.self_attn.in_proj_weight": 6}),
    # rotated queries and keys grow by whole heads: the table of angles stays as it is
    Row("rope_half", "Qwen2", lambda: hugging_face("Qwen2ForCausalLM", **TEXT, num_key_value_heads=2), text,
        {Q_PROJ: 8}),
    Row("rope_interleaved", "Cohere", lambda: hugging_face("CohereForCausalLM", **TEXT, num_key_value_heads=2), text,
        {Q_PROJ: 8}),
    Row("rope_partial", "Phi", lambda: hugging_face("PhiForCausalLM", **TEXT, partial_rotary_factor=0.5), text,
        {Q_PROJ: 8}),
    Row("whole_head", "ViT", lambda: hugging_face("ViTForImageClassification", **IMAGE, hidden_size=16), pixels,
        {"vit.layers.0.attention.q_proj": 8}),
    Row("fused_qkv_head_and_width", "timm ViT", timm_vit, IMAGES, {"blocks.0.attn.qkv": 6}),
    Row("fused_qkv_per_head", "GPT-NeoX", lambda: hugging_face("GPTNeoXForCausalLM", **TEXT), text,
        {"gpt_neox.layers.0.attention.query_key_value": 24}),
    Row("fused_qkv_per_head", "BLOOM",
        lambda: hugging_face("BloomForCausalLM", vocab_size=23, hidden_size=16, n_layer=1, n_head=2,
                             hidden_dropout=0.0, attention_dropout=0.0), text,
        {"transformer.h.0.self_attention.query_key_value": 6}, slow=True),
    Row("gqa_kv_group", "Llama", LLAMA, text, {Q_PROJ: 16}),
    # the same width grows by a group, which is another way to have more query heads
    Row("gqa_q_head_in_every_group", "Mistral", lambda: hugging_face("MistralForCausalLM", **GROUPED), text,
        {Q_PROJ: 16}),
    # the attention is written out in the graph, where the stream and the heads are widths of their own
    Row("multihead_attention_embed_plus_head", "torch", lambda: encoder(True), TOKENS,
        {"0": 1, "1.self_attn.in_proj_weight": 6}),
    Row("multihead_attention_value_width", "torch", values_of_another_size, TOKENS,
        {"value": 1, "attention.q_proj_weight": 2}),
    Row("swin_bias_table", "Swin",
        lambda: hugging_face("SwinForImageClassification", image_size=16, patch_size=2, num_labels=3, embed_dim=16,
                             depths=[1], num_heads=[2], window_size=4, drop_path_rate=0.0),
        pixels, {"swin.encoder.layers.0.blocks.0.attention.q_proj": 8}),
    # the slopes are computed from the number of heads, so that the heads become wider and not more
    Row("alibi_new_head", "MPT",
        lambda: hugging_face("MptForCausalLM", vocab_size=23, d_model=16, n_heads=2, n_layers=1, expansion_ratio=2),
        text, {"transformer.blocks.0.attn.Wqkv": 6}),
    # normalised queries and keys grow by whole heads: each head keeps its size
    Row("qk_rmsnorm_split", "Qwen3", lambda: hugging_face("Qwen3ForCausalLM", **GROUPED), text, {Q_PROJ: 16}),
    Row("qk_layernorm_mean", "Phi", lambda: hugging_face("PhiForCausalLM", **TEXT, qk_layernorm=True), text,
        {Q_PROJ: 8}),
    Row("cosine_attention_qk_split", "Swin v2",
        lambda: hugging_face("Swinv2ForImageClassification", image_size=16, patch_size=2, num_labels=3, embed_dim=16,
                             depths=[1], num_heads=[2], window_size=4, drop_path_rate=0.0),
        pixels, {"swinv2.encoder.layers.0.blocks.0.attention.self.query": 2}),
    # residual streams
    Row("prenorm_layernorm_mean", "torchvision ViT", vit, IMAGES, {"conv_proj": 1}),
    Row("prenorm_layernorm_mean", "GPT-2", lambda: hugging_face("GPT2LMHeadModel", **GPT2), text,
        {"transformer.wte": 1}, slow=True),
    Row("prenorm_rmsnorm_zero", "timm ViT", lambda: timm_vit(norm_layer=RMS_NORM), IMAGES, {"patch_embed.proj": 1}),
    # random rows would change the statistics, and an activation lies between the rows and the norm
    Row("prenorm_alpha_free_omega_zero", "timm Mlp",
        lambda: library("timm.layers").Mlp(6, 8, 4, norm_layer=nn.LayerNorm), TOKENS,
        pinned={"fc1": ("norm", "cannot be kept at their mean")}),
    # there are no weights to rescale: the columns of what reads the norm are
    Row("layernorm_no_affine_readers_rescaled", "torch",
        lambda: nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8, elementwise_affine=False), nn.Linear(8, 3)), TOKENS,
        {"0": 1}),
    Row("layernorm_no_affine_readers_rescaled", "OLMo", lambda: hugging_face("OlmoForCausalLM", **TEXT), text,
        {"model.embed_tokens": 1}, single=True),
    Row("prenorm_layernorm_mean", "OPT", lambda: hugging_face("OPTForCausalLM", **OPT), text,
        {"model.decoder.embed_positions": 1}, slow=True),
    Row("prenorm_layernorm_mean", "Cohere, which writes its LayerNorm itself",
        lambda: hugging_face("CohereForCausalLM", **TEXT, num_key_value_heads=2), text, {"model.embed_tokens": 1},
        single=True, slow=True),
    Row("prenorm_rmsnorm_zero", "timm's RmsNorm",
        lambda: timm_vit(norm_layer=library("timm.layers").RmsNorm), IMAGES, {"patch_embed.proj": 1}, slow=True),
    Row("grn_convnextv2", "timm", lambda: library("timm.layers").GlobalResponseNormMlp(6, 8, 4), shaped(5, 5, 6),
        {"fc1": 1}),
    Row("weight_norm", "torch",
        lambda: nn.Sequential(weight_norm(nn.Linear(6, 8)), nn.Tanh(), weight_norm(nn.Linear(8, 4))), TOKENS, {"0": 1}),
    Row("spectral_norm", "torch",
        lambda: nn.Sequential(spectral_norm(nn.Linear(6, 4)), nn.Tanh(), spectral_norm(nn.Linear(4, 3))), TOKENS,
        {"0": 1}),
    # eps is a number in the call of a function; the graph holds it, and it is rewritten there
    Row("frozen_eps_writers_rescaled", "timm ViT", timm_vit, IMAGES, {"patch_embed.proj": 1}),
    Row("postnorm_layernorm_uniform_weight", "torch", lambda: encoder(False), TOKENS, {"0": 1}, fresh=True),
    Row("postnorm_layernorm_uniform_weight", "BERT",
        lambda: hugging_face("BertForSequenceClassification", **TEXT, hidden_dropout_prob=0.0,
                             attention_probs_dropout_prob=0.0), text,
        {"bert.embeddings.word_embeddings": 1}, fresh=True, slow=True),
    Row("postnorm_layernorm_trained", "torch", lambda: encoder(False), TOKENS,
        pinned={"0": ("norm", "cannot be kept at their mean")}),
    Row("postnorm_layernorm_trained", "BERT", lambda: hugging_face("BertForMaskedLM", **TEXT), text,
        pinned={"bert.embeddings.word_embeddings": ("norm", "cannot be kept at their mean")}, slow=True),
    # doubled by new units at the mean; tiling is another way
    Row("stream_tile_doubling", "GPT-2", lambda: hugging_face("GPT2LMHeadModel", **GPT2), text,
        {"transformer.wte": 1}, steps=(16, 48)),
    Row("postnorm_rmsnorm_zero", "torch", lambda: encoder(False, RMS_NORM), TOKENS, {"0": 1}),
    # the same streams grow by silent units, where these recipes split old ones or leave the new ones out of the norm
    Row("stream_isometric_rms", "torch", lambda: encoder(True, RMS_NORM), TOKENS, {"0": 1}),
    Row("stream_isometric_ln", "torch", lambda: encoder(True), TOKENS, {"0": 1}),
    Row("norm_over_old_slice", "OLMo-2", lambda: hugging_face("Olmo2ForCausalLM", **TEXT, rms_norm_eps=0.1), text,
        {"model.embed_tokens": 1}, single=True),
    Row("stream_new_information", "timm Mlp",
        lambda: library("timm.layers").Mlp(6, 8, 4, act_layer=nn.Sigmoid, norm_layer=RMS_NORM), TOKENS,
        pinned={"fc1": ("norm", "cannot be kept at zero")}),
    Row("convnext_stream", "torchvision ConvNeXt", convnext, shaped(3, 32, 32),
        pinned={"features.0.0": ("norm", "cannot be kept at their mean"),
                "features.2.1": ("norm", "cannot be kept at their mean")}),
    # convolutions and their norms
    Row("batchnorm", "torchvision ResNet", basic_block, shaped(6, 8, 8), {"conv1": 1}),
    Row("instancenorm", "torch",
        lambda: convolutions(nn.InstanceNorm2d(6, affine=True, track_running_stats=True), nn.ReLU(), into=6, out_of=6),
        IMAGES, {"0": 1}),
    Row("groupnorm_whole_groups", "torchvision ResNet",
        lambda: basic_block(norm_layer=functools.partial(nn.GroupNorm, 2)), shaped(6, 8, 8), {"conv1": 3}),
    Row("groupnorm_within_groups", "torch",
        lambda: convolutions(nn.LayerNorm([6, 8, 8]), nn.SiLU(), into=6, out_of=6), IMAGES,
        pinned={"0": ("norm", "normalised over the whole axis")}),
    # twice the groups, where the recipe makes each twice as large
    Row("groupnorm_tile_within_groups", "torchvision ResNet",
        lambda: basic_block(norm_layer=functools.partial(nn.GroupNorm, 2)), shaped(6, 8, 8), {"conv1": 3},
        steps=(2, 4)),
    Row("layernorm_on_hidden", "torchvision MLP",
        lambda: library("torchvision.ops").MLP(6, [8, 4], norm_layer=nn.LayerNorm), TOKENS, {"0": 1}),
    Row("squeeze_excite", "torchvision",
        lambda: convolutions(library("torchvision.ops").SqueezeExcitation(6, 2), into=6, out_of=6), IMAGES,
        {"0": 1, "1.fc1": 1}),
    Row("resnext_grouped", "torchvision ResNeXt",
        lambda: library("torchvision.models.resnet").Bottleneck(8, 2, groups=2), shaped(8, 8, 8),
        {"conv1": 2, "conv2": 2}),
    Row("depthwise_separable", "torchvision MobileNetV2",
        lambda: library("torchvision.models.mobilenetv2").InvertedResidual(4, 4, 1, 2), shaped(4, 8, 8),
        {"conv.0.0": 1}),
    Row("depthwise_separable", "torch, two kernels for each channel",
        lambda: convolutions(nn.Conv2d(6, 12, 3, groups=6), nn.ReLU6(), into=6, out_of=12), IMAGES, {"0": 1}),
    Row("channel_shuffle", "torch", lambda: convolutions(nn.ChannelShuffle(2), into=6, out_of=6), IMAGES, {"0": 2}),
    Row("channel_shuffle", "torchvision ShuffleNetV2", shuffled, IMAGES,
        {"1.branch1.2": 2, "1.branch2.0": 1, "2.branch2.0": 1}, slow=True),
    Row("pixel_shuffle", "torch", lambda: convolutions(nn.PixelShuffle(2), into=20, out_of=5), IMAGES, {"0": 4}),
    Row("pixel_shuffle", "torch, back", lambda: convolutions(nn.PixelUnshuffle(2), into=5, out_of=20), IMAGES,
        {"0": 1}),
    Row("conv_transpose", "torchvision Mask R-CNN",
        lambda: library("torchvision.models.detection.mask_rcnn").MaskRCNNPredictor(4, 6, 3), shaped(4, 5, 5),
        {"conv5_mask": 1}),
    Row("conv_transpose", "torch, groups",
        lambda: convolutions(nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), into=4, out_of=6), IMAGES,
        {"0": 2, "1": 2}),
    # everything else
    # the kernel takes float32 and rows of 16 bytes, hence four units at once, with a gate and a value for each
    Row("moe_hidden", "Mixtral", lambda: mixtral("grouped_mm"), text, {"model.layers.0.mlp.experts.gate_up_proj": 8},
        single=True),
    Row("moe_hidden", "Llama 4", llama4_experts, lambda n: (torch.randn(3 * n, 6),), {"gate_up_proj": 2}, slow=True),
    # as many experts again, as copies, and as many more are chosen for each token
    Row("moe_double_experts", "Mixtral", lambda: mixtral("grouped_mm"), text, {"model.layers.0.mlp.gate": 4},
        single=True),
    Row("moe_double_experts", "OLMoE",
        lambda: hugging_face("OlmoeForCausalLM", **TEXT, num_experts=4, num_experts_per_tok=2), text,
        {"model.layers.0.mlp.gate": 4, "model.layers.0.mlp.experts.gate_up_proj": 8}, single=True, slow=True),
    Row("moe_double_experts", "gpt-oss, with biases",
        lambda: hugging_face("GptOssForCausalLM", **GROUPED, num_local_experts=4, num_experts_per_tok=2), text,
        {"model.layers.0.mlp.router": 4}, single=True, slow=True),
    Row("moe_add_expert_topk", "Mixtral", lambda: mixtral("eager"), text,
        pinned={"model.layers.0.mlp.gate": ("reduce", "every entry depends on the whole axis")}),
    Row("lstm_gru_hidden", "torch LSTM", lambda: recurrent(nn.LSTM, True), TOKENS, {"r": 1}),
    Row("lstm_gru_hidden", "torch GRU", lambda: recurrent(nn.GRU, False), TOKENS, {"r": 1}),
    Row("embedding_size", "OPT", lambda: hugging_face("OPTForCausalLM", **OPT), text,
        {"model.decoder.embed_tokens": 1}),
    Row("stochastic_depth", "torchvision EfficientNet", mb_conv, shaped(8, 8, 8), {"block.0.0": 1}),
    Row("dropout_on_width", "torchvision MLP", lambda: library("torchvision.ops").MLP(6, [8, 4], dropout=0.5), TOKENS,
        {"0": 1}),
    Row("dropout_on_ln_stream", "torchvision ViT", lambda: vit(dropout=0.1), IMAGES,
        pinned={"conv_proj": ("norm", "cannot be kept at their mean")}),
    Row("prenorm_ffn_real_llama", "Llama", functools.partial(LLAMA, tie_word_embeddings=True), text,
        {"model.embed_tokens": 1, "model.layers.0.mlp.gate_proj": 1}, single=True),
]  # fmt: skip
FREE, PINNED = [r for r in ROWS if r.free], [r for r in ROWS if r.pinned]


def named(rows: list[Row]) -> Any:
    marks = {True: [pytest.mark.slow], False: []}
    return pytest.mark.parametrize("row", [pytest.param(r, id=f"{r.recipe}-{r.on}", marks=marks[r.slow]) for r in rows])


def made(row: Row) -> nn.Module:
    """The row's module as if trained: no parameter is zero or one, no statistics are those of new layers."""
    model = row.build().to(torch.float32 if row.single else torch.float64)
    model.eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.2)
        for norm in (m for m in model.modules() if isinstance(m, nn.LayerNorm) and row.fresh):
            norm.weight.fill_(1.3)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_()
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5)
    return model


def given(row: Row, n: int) -> Inputs:
    dtype = torch.float32 if row.single else torch.float64
    return pytree.tree_map(lambda t: t.to(dtype) if t.is_floating_point() else t, row.inputs(n))


def output(net: nn.Module, inputs: Inputs) -> Tensor:
    """What a network returns; masks of random depth are the same for every network."""
    torch.manual_seed(1)
    out = net(**inputs) if isinstance(inputs, dict) else net(*inputs)
    return getattr(out, "logits", out)


def without_dropout(net: nn.Module, training: bool) -> nn.Module:
    """A copy in one of the modes; a wider layer draws another mask of dropout, so there is none."""
    net = copy.deepcopy(net)
    net.train(training)
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return net


@torch.no_grad()
def outputs(net: nn.Module, batches: list[Inputs]) -> list[Tensor]:
    """For every batch, in eval and in train mode."""
    nets = [without_dropout(net, training) for training in (False, True)]
    return [output(net, inputs) for net in nets for inputs in batches]


def new_entries(p: Tensor, places: tuple[Tensor | None, ...]) -> Tensor:
    """A mask of the entries that a parameter has more than before."""
    old = torch.ones(p.shape, dtype=torch.bool)
    for dim, positions in enumerate(places):
        if positions is not None:
            kept = torch.zeros(p.shape[dim], dtype=torch.bool).index_fill(0, positions, True)
            old &= kept.view([-1 if i == dim else 1 for i in range(p.dim())])
    return ~old


def assert_alive(grown: nn.Module, index: Mapping[str, tuple[Tensor | None, ...]], inputs: Inputs) -> None:
    """Some new entry has a slope now, and after a step of SGD; no slope is infinite."""
    grown = without_dropout(grown, True)
    masks = {name: new_entries(p, index[name]) for name, p in grown.named_parameters() if name in index}
    assert any(bool(mask.any()) for mask in masks.values())
    target = torch.randn_like(output(grown, inputs))
    for _ in range(2):
        grown.zero_grad()
        (output(grown, inputs) - target).square().mean().backward()
        slopes = {name: p.grad for name, p in grown.named_parameters() if p.grad is not None}
        assert all(bool(g.isfinite().all()) for g in slopes.values())
        assert any(bool(slopes[name][mask].ne(0).any()) for name, mask in masks.items() if name in slopes)
        torch.optim.SGD(grown.parameters(), lr=1e-3).step()


@named(FREE)
def test_grows_exactly_and_learns(row: Row) -> None:
    model, inputs, other = made(row), given(row, 2), given(row, 3)
    gm = fxgrow.capture(model, inputs)
    found = {w.name: w for w in fxgrow.widths(gm)}
    assert {name: (found[name].pinned, found[name].step) for name in row.free} == {
        name: (None, step) for name, step in row.free.items()
    }
    for name, step in row.free.items():
        if step > 1:  # half a head, or a channel in one of the groups
            with pytest.raises(fxgrow.FxgrowError, match=re.escape(name)):
                fxgrow.widen(gm, inputs, {name: step - 1})
    bound = 1e-5 if row.single else 1e-10
    expected = outputs(model, [inputs, other])
    for steps in row.steps:
        units = {name: steps * step for name, step in row.free.items()}
        grown = fxgrow.widen(gm, inputs, units)
        sizes = {w.name: w.size for w in fxgrow.widths(grown)}
        assert {name: sizes[name] - found[name].size for name in units} == units
        for a, b in zip(expected, outputs(grown, [inputs, other]), strict=True):
            assert float((a - b).abs().max()) <= bound * float(a.abs().max())
    assert_alive(*rewrite(gm, dict(row.free), generator=torch.Generator().manual_seed(0)), other)


@named(PINNED)
def test_is_pinned_with_its_reason(row: Row) -> None:
    gm = fxgrow.capture(made(row), given(row, 2))
    found = {w.name: w for w in fxgrow.widths(gm)}
    for name, (code, message) in row.pinned.items():
        reason = found[name].pinned
        assert reason is not None and reason.code == code and message in reason.message
        with pytest.raises(fxgrow.FxgrowError, match=re.escape(name)):
            fxgrow.widen(gm, given(row, 2), {name: found[name].step})
