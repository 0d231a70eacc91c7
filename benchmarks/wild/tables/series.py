"""Time series and tables."""

from __future__ import annotations

from typing import Any

from torch import nn

from benchmarks.wild.entries import Entry, call, floats, named, positional, together, tokens

_WINDOW = named(insample_y=floats(24, 1), insample_mask=lambda b, o: (floats(24, 1)(b, o)[0] * 0 + 1,))
_NF: dict[str, Any] = {"h": 6, "input_size": 24}


def _forecaster(name: str, cls: str, **options: object) -> Entry:
    windows = lambda b, o: {**_WINDOW(b, o), "futr_exog": None, "hist_exog": None, "stat_exog": None}  # noqa: E731
    return Entry("neuralforecast", name, call(f"neuralforecast.models:{cls}", **_NF, **options), positional(windows))


def _deepctr() -> nn.Module:
    from deepctr_torch.inputs import DenseFeat, SparseFeat  # type: ignore[import-not-found]
    from deepctr_torch.models import DeepFM  # type: ignore[import-not-found]

    columns = [SparseFeat("a", 8, 4), SparseFeat("b", 8, 4), DenseFeat("c", 3)]
    return DeepFM(columns, columns, dnn_hidden_units=(12, 8))


def _row(batch: int, other: int) -> tuple[Any, ...]:
    import torch

    return (torch.cat([tokens(8, 2)(batch, other)[0].float(), floats(3)(batch, other)[0]], 1),)


ENTRIES = [
    Entry("tsai", "inception_time", call("tsai.models.InceptionTime:InceptionTime", 3, 4, nf=4, ks=9), floats(3, 24,
          longer=(3, 32)), True),
    Entry("tsai", "tst", call("tsai.models.TST:TST", 3, 4, 24, n_layers=2, d_model=16, n_heads=2, d_ff=24), floats(3,
          24)),
    Entry("tsai", "patch_tst", call("tsai.models.PatchTST:PatchTST", 3, 4, 24, 6, n_layers=2, n_heads=2, d_model=16,
          d_ff=24, patch_len=8, stride=4), floats(3, 24)),
    Entry("tsai", "resnet", call("tsai.models.ResNet:ResNet", 3, 4), floats(3, 24, longer=(3, 32)), True),
    Entry("tsai", "xception_time", call("tsai.models.XceptionTime:XceptionTime", 3, 4, nf=4), floats(3, 24, longer=(3,
          32)), True),
    Entry("tsai", "lstm_fcn", call("tsai.models.RNN_FCN:LSTM_FCN", 3, 4, seq_len=24, hidden_size=12, conv_layers=[8,
          12, 8], se=4), floats(3, 24)),
    Entry("tsai", "tsit", call("tsai.models.TSiTPlus:TSiTPlus", 3, 4, 24, d_model=16, depth=2, n_heads=2), floats(3,
          24)),
    Entry("tsai", "tcn", call("tsai.models.TCN:TCN", 3, 4, layers=[8, 8], ks=3), floats(3, 24, longer=(3, 32)), True),
    Entry("tsai", "gmlp", call("tsai.models.gMLP:gMLP", 3, 4, 24, d_model=16, d_ffn=24, depth=2), floats(3, 24)),
    Entry("tsai", "xcm", call("tsai.models.XCM:XCM", 3, 4, 24, nf=8), floats(3, 24)),
    Entry("tsai", "mwdn", call("tsai.models.mWDN:mWDN", 3, 4, 24, levels=2, nf=4), floats(3, 24)),
    _forecaster("nbeats", "NBEATS", stack_types=["identity", "trend"], n_blocks=[1, 1], mlp_units=[[16, 16], [16,
          16]]),
    _forecaster("nhits", "NHITS", n_blocks=[1, 1, 1], mlp_units=[[16, 16]] * 3),
    _forecaster("dlinear", "DLinear", moving_avg_window=5),
    _forecaster("patch_tst", "PatchTST", encoder_layers=2, n_heads=2, hidden_size=16, linear_hidden_size=24,
          patch_len=8, stride=4),
    _forecaster("timesnet", "TimesNet", hidden_size=8, conv_hidden_size=8, top_k=2, num_kernels=2, encoder_layers=1),
    _forecaster("tide", "TiDE", hidden_size=16, decoder_output_dim=8, temporal_decoder_dim=12),
    _forecaster("tcn", "TCN", encoder_hidden_size=12, decoder_hidden_size=12, dilations=[1, 2]),
    _forecaster("lstm", "LSTM", encoder_hidden_size=12, decoder_hidden_size=12),
    _forecaster("bitcn", "BiTCN", hidden_size=8),
    Entry("neuralforecast", "tsmixer", call("neuralforecast.models:TSMixer", n_series=3, ff_dim=8, n_block=2, **_NF),
          positional(named(insample_y=floats(24, 3)))),
    Entry("neuralforecast", "itransformer", call("neuralforecast.models:iTransformer", n_series=3, hidden_size=16,
          n_heads=2, e_layers=1, d_ff=24, **_NF), positional(named(insample_y=floats(24, 3)))),
    Entry("pytorch-tcn", "tcn", call("pytorch_tcn:TCN", 3, [8, 12], kernel_size=3, use_norm="weight_norm"), floats(3,
          24, longer=(3, 32)), True),
    Entry("pytorch-tcn", "tcn_gated", call("pytorch_tcn:TCN", 3, [8, 8], kernel_size=3, use_norm="layer_norm",
          use_gate=True, use_skip_connections=True), floats(3, 24, longer=(3, 32)), True),
    Entry("pytorch-tabnet", "tabnet", call("pytorch_tabnet.tab_network:TabNet", 6, 3, n_d=4, n_a=4, n_steps=2,
          virtual_batch_size=8, group_attention_matrix=call("torch:eye", 6)), floats(6)),
    Entry("rtdl-revisiting-models", "mlp", call("rtdl_revisiting_models:MLP", d_in=6, d_out=3, n_blocks=2, d_block=12,
          dropout=0.1), floats(6)),
    Entry("rtdl-revisiting-models", "resnet", call("rtdl_revisiting_models:ResNet", d_in=6, d_out=3, n_blocks=2,
          d_block=12, d_hidden=16, d_hidden_multiplier=None, dropout1=0.1, dropout2=0.1), floats(6)),
    Entry("rtdl-revisiting-models", "ft_transformer", call("rtdl_revisiting_models:FTTransformer", n_cont_features=3,
          cat_cardinalities=[4, 4], d_out=3, n_blocks=2, d_block=16, attention_n_heads=2, attention_dropout=0.1,
          ffn_d_hidden=None, ffn_d_hidden_multiplier=1.5, ffn_dropout=0.1, residual_dropout=0.0), together(floats(3),
          tokens(4, 2))),
    Entry("deepctr-torch", "deepfm", _deepctr, _row),
]  # fmt: skip
