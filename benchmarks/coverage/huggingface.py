"""Small Hugging Face networks, from configurations of a few dozen channels; nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.coverage.subjects import Inputs, Subject

VOCABULARY, LENGTH, SIDE = 96, 12, 32


@dataclass(frozen=True)
class Case:
    """A class of `transformers`, its inputs, and how its configuration differs from `_COMMON` (None: its default)."""

    model: str
    inputs: Callable[[int, int], Inputs]
    config: dict[str, Any] = field(default_factory=dict)
    #: whether it runs at another image size or sequence length
    sizes: bool = True


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(shape[0]))


def _ids(batch: int, length: int) -> Tensor:
    return torch.randint(4, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(batch))


def _text(batch: int, other: int) -> Inputs:
    return {"input_ids": _ids(batch, LENGTH + 4 * other)}


def _masked(batch: int, other: int) -> Inputs:
    ids = _ids(batch, LENGTH + 4 * other)
    mask = torch.ones_like(ids)
    mask[-1, -3:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def _pairs(batch: int, other: int) -> Inputs:
    return {"input_ids": _ids(batch, LENGTH + 4 * other), "decoder_input_ids": _ids(batch, 7 + other)}


def _images(batch: int, other: int) -> Inputs:
    return {"pixel_values": _random(batch, 3, SIDE + 32 * other, SIDE + 32 * other)}


def _large(batch: int, other: int) -> Inputs:
    return {"pixel_values": _random(batch, 3, 64 + 32 * other, 64 + 32 * other)}


def _sound(batch: int, other: int) -> Inputs:
    return {"input_values": _random(batch, 1600 + 800 * other)}


def _mel(batch: int, other: int) -> Inputs:
    return {"input_features": _random(batch, 16, 40)}


def _spectrum(batch: int, other: int) -> Inputs:
    return {"input_values": _random(batch, 32, 16)}


def _both(batch: int, other: int) -> Inputs:
    return {"input_ids": _ids(batch, LENGTH), "pixel_values": _random(batch, 3, SIDE, SIDE)}


# The same thing has many names; a configuration takes those it knows.
_COMMON = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "head_dim": 8,
    "n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 48, "n_positions": 64, "n_ctx": 64,
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "d_ff": 48, "d_kv": 8,
    "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4, "dim": 32, "hidden_dim": 48, "n_heads": 4, "n_layers": 2,
    "ffn_dim": 48, "word_embed_proj_dim": 32, "embedding_size": 16, "max_position_embeddings": 64,
    "image_size": SIDE, "patch_size": 8, "num_labels": 5, "use_cache": False,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "type_vocab_size": 2,
}  # fmt: skip
_ALWAYS = ("num_labels", "use_cache")
_STAGES = {"depths": [1, 1], "num_stages": 2, "hidden_sizes": [16, 32]}
_MIXTURE = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}

CASES: dict[str, Case] = {
    # encoders
    "bert": Case("BertForSequenceClassification", _masked),
    "roberta": Case("RobertaForMaskedLM", _masked),
    "xlm_roberta": Case("XLMRobertaForTokenClassification", _masked),
    "distilbert": Case("DistilBertForSequenceClassification", _masked),
    "albert": Case("AlbertForSequenceClassification", _masked),
    "electra": Case("ElectraForSequenceClassification", _masked),
    "deberta_v2": Case("DebertaV2ForSequenceClassification", _masked, {"relative_attention": True,
        "pos_att_type": ["p2c", "c2p"], "position_buckets": 8}),
    "mpnet": Case("MPNetForSequenceClassification", _masked),
    "camembert": Case("CamembertForMaskedLM", _masked),
    "funnel": Case("FunnelBaseModel", _masked, {"block_sizes": [1, 1], "d_head": 8, "d_inner": 48,
        "num_hidden_layers": None}),
    "modernbert": Case("ModernBertForSequenceClassification", _masked),
    "convbert": Case("ConvBertForSequenceClassification", _masked),
    "squeezebert": Case("SqueezeBertForSequenceClassification", _masked, {"embedding_size": 32}),
    "fnet": Case("FNetForSequenceClassification", _text),
    "roformer": Case("RoFormerForSequenceClassification", _masked, {"embedding_size": 32}),
    "layoutlm": Case("LayoutLMForTokenClassification", _masked, {"max_2d_position_embeddings": 64}),
    # decoders
    "gpt2": Case("GPT2LMHeadModel", _text),
    "gpt_neo": Case("GPTNeoForCausalLM", _text, {"attention_types": [[["global", "local"], 1]], "window_size": 4}),
    "gpt_neox": Case("GPTNeoXForCausalLM", _text),
    "gptj": Case("GPTJForCausalLM", _text, {"rotary_dim": 4}),
    "gpt_bigcode": Case("GPTBigCodeForCausalLM", _text),
    "codegen": Case("CodeGenForCausalLM", _text, {"rotary_dim": 4}),
    "opt": Case("OPTForCausalLM", _text),
    "bloom": Case("BloomForCausalLM", _text),
    "llama": Case("LlamaForCausalLM", _masked),
    "mistral": Case("MistralForCausalLM", _text),
    "qwen2": Case("Qwen2ForCausalLM", _text),
    "qwen3": Case("Qwen3ForCausalLM", _text),
    "gemma": Case("GemmaForCausalLM", _text),
    "gemma2": Case("Gemma2ForCausalLM", _text),
    "phi": Case("PhiForCausalLM", _text),
    "phi3": Case("Phi3ForCausalLM", _text),
    "falcon": Case("FalconForCausalLM", _text, {"head_dim": None, "ffn_hidden_size": 48}),
    "stablelm": Case("StableLmForCausalLM", _text),
    "olmo": Case("OlmoForCausalLM", _text),
    "cohere": Case("CohereForCausalLM", _text),
    "mpt": Case("MptForCausalLM", _text),
    "starcoder2": Case("Starcoder2ForCausalLM", _text),
    # mixtures of experts, state spaces
    "mixtral": Case("MixtralForCausalLM", _text, _MIXTURE),
    "qwen2_moe": Case("Qwen2MoeForCausalLM", _text, _MIXTURE | {"shared_expert_intermediate_size": 24}),
    "mamba": Case("MambaForCausalLM", _text, {"state_size": 4}),
    "rwkv": Case("RwkvForCausalLM", _text, {"context_length": 64, "attention_hidden_size": 32}),
    # encoder-decoders
    "t5": Case("T5ForConditionalGeneration", _pairs),
    "t5_gated": Case("T5ForConditionalGeneration", _pairs, {"feed_forward_proj": "gated-gelu"}),
    "bart": Case("BartForConditionalGeneration", _pairs),
    "mbart": Case("MBartForConditionalGeneration", _pairs),
    "pegasus": Case("PegasusForConditionalGeneration", _pairs),
    "marian": Case("MarianMTModel", _pairs),
    "blenderbot": Case("BlenderbotForConditionalGeneration", _pairs),
    "prophetnet": Case("ProphetNetForConditionalGeneration", _pairs, {"num_encoder_layers": 2,
        "num_encoder_attention_heads": 4, "num_decoder_attention_heads": 4, "num_hidden_layers": None}),
    # images
    "vit": Case("ViTForImageClassification", _images, sizes=False),
    "deit": Case("DeiTForImageClassification", _images, sizes=False),
    "beit": Case("BeitForImageClassification", _images, sizes=False),
    "dinov2": Case("Dinov2ForImageClassification", _images),
    "swin": Case("SwinForImageClassification", _images, {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4],
        "num_attention_heads": None, "num_layers": None, "window_size": 4, "patch_size": 4}),
    "convnext": Case("ConvNextForImageClassification", _images, _STAGES | {"patch_size": 4}),
    "convnextv2": Case("ConvNextV2ForImageClassification", _images, _STAGES | {"patch_size": 4}),
    "resnet": Case("ResNetForImageClassification", _images, _STAGES | {"embedding_size": 16}),
    "regnet": Case("RegNetForImageClassification", _images, _STAGES | {"embedding_size": 16, "groups_width": 8}),
    "segformer": Case("SegformerForSemanticSegmentation", _large, {"num_encoder_blocks": 2, "depths": [1, 1],
        "sr_ratios": [2, 1], "hidden_sizes": [16, 32], "patch_sizes": [7, 3], "strides": [4, 2],
        "num_attention_heads": [2, 4], "mlp_ratios": [2, 2], "decoder_hidden_size": 24}),
    "mobilevit": Case("MobileViTForImageClassification", _large, {"hidden_sizes": [16, 24, 32],
        "neck_hidden_sizes": [8, 8, 16, 16, 24, 24, 32], "patch_size": 2, "num_attention_heads": 4}),
    "mobilenet_v2": Case("MobileNetV2ForImageClassification", _images),
    "poolformer": Case("PoolFormerForImageClassification", _large, {"depths": [1, 1, 1, 1],
        "hidden_sizes": [8, 16, 16, 32], "patch_size": 7}),
    "efficientnet": Case("EfficientNetForImageClassification", _large, {"hidden_dim": 320, "width_coefficient": 0.25,
        "depth_coefficient": 0.25}),
    "levit": Case("LevitForImageClassification", _large, {"hidden_sizes": [16, 24, 32], "key_dim": [8, 8, 8],
        "num_attention_heads": [2, 2, 2], "depths": [1, 1, 1], "image_size": 64, "patch_size": 16}, sizes=False),
    "vit_mae": Case("ViTModel", _images, sizes=False),
    "siglip": Case("SiglipVisionModel", _images, sizes=False),
    # images and text, sound
    "clip": Case("CLIPModel", _both, sizes=False),
    "clip_text": Case("CLIPTextModel", _text),
    "clip_vision": Case("CLIPVisionModel", _images, sizes=False),
    "wav2vec2": Case("Wav2Vec2ForSequenceClassification", _sound, {"conv_dim": [16, 16, 16], "conv_stride": [5, 2, 2],
        "conv_kernel": [10, 3, 3], "num_feat_extract_layers": 3, "num_conv_pos_embeddings": 16,
        "num_conv_pos_embedding_groups": 4, "apply_spec_augment": False, "mask_time_prob": 0.0}),
    "hubert": Case("HubertForSequenceClassification", _sound, {"conv_dim": [16, 16, 16], "conv_stride": [5, 2, 2],
        "conv_kernel": [10, 3, 3], "num_feat_extract_layers": 3, "num_conv_pos_embeddings": 16,
        "num_conv_pos_embedding_groups": 4, "apply_spec_augment": False, "mask_time_prob": 0.0}),
    "whisper_encoder": Case("WhisperForAudioClassification", _mel, {"num_mel_bins": 16, "max_source_positions": 20},
        sizes=False),
    "ast": Case("ASTForAudioClassification", _spectrum, {"num_mel_bins": 16, "max_length": 32, "patch_size": 8,
        "frequency_stride": 8, "time_stride": 8}, sizes=False),
}  # fmt: skip


def build(name: str) -> Subject:
    import transformers

    transformers.logging.set_verbosity_error()
    case = CASES[name]
    cls = getattr(transformers, case.model)
    config = cls.config_class(**_known(cls.config_class, {"vocab_size": VOCABULARY, **_COMMON, **case.config}))
    for part in (config, *(v for v in vars(config).values() if isinstance(v, transformers.PretrainedConfig))):
        for key, value in list(vars(part).items()):
            if "drop" in key and isinstance(value, float):
                setattr(part, key, 0.0)
    model: nn.Module = cls(config)
    return Subject(model, case.inputs, case.sizes)


def _known(config: type, wanted: dict[str, Any]) -> dict[str, Any]:
    """Those of the common names that this configuration has; parts of it get their own."""
    default = config()
    known = {k: v for k, v in wanted.items() if v is not None and (hasattr(default, k) or k in _ALWAYS)}
    parts = {k: part for k in ("text_config", "vision_config") if (part := getattr(default, k, None)) is not None}
    return known | {k: _known(type(part), wanted) for k, part in parts.items()}
