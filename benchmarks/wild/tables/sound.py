"""Speech and music: recognition, separation, codecs and vocoders."""

from __future__ import annotations

from torch import nn

from benchmarks.wild.entries import Entry, call, floats, imported, lengths, named, together, tokens

_WAVE = floats(1, 800, longer=(1, 1600))
_FRAMES = floats(20, 12, longer=(28, 12))
_SB = "speechbrain.lobes.models"


def _codec() -> nn.Module:
    from encodec.modules import SEANetDecoder, SEANetEncoder  # type: ignore[import-not-found]

    options = {"dimension": 16, "n_filters": 4, "ratios": [4, 2], "lstm": 1}
    return nn.Sequential(SEANetEncoder(**options), SEANetDecoder(**options))


def _vocos() -> nn.Module:
    from vocos.heads import ISTFTHead  # type: ignore[import-not-found]
    from vocos.models import VocosBackbone  # type: ignore[import-not-found]

    return nn.Sequential(VocosBackbone(12, 16, 24, 2), ISTFTHead(16, 32, 8))


ENTRIES = [
    Entry("torchaudio", "conformer", call("torchaudio.models:Conformer", 12, 2, 16, 2, 5), together(_FRAMES,
          lengths(20, 28)), True),
    Entry("torchaudio", "conv_tasnet", call("torchaudio.models:ConvTasNet", enc_num_feats=16, msk_num_feats=8,
          msk_num_hidden_feats=16, msk_num_layers=2, msk_num_stacks=2), _WAVE, True),
    Entry("torchaudio", "deepspeech", call("torchaudio.models:DeepSpeech", 12, n_hidden=16, n_class=5), floats(1, 20,
          12, longer=(1, 28, 12)), True),
    Entry("torchaudio", "emformer", call("torchaudio.models:Emformer", 16, 2, 24, 2, 4, right_context_length=2),
          together(floats(10, 16), lengths(10))),
    Entry("torchaudio", "wavernn", call("torchaudio.models:WaveRNN", [2, 2], 8, 4, n_res_block=1, n_rnn=12, n_fc=12,
          kernel_size=3, n_freq=8, n_hidden=8, n_output=8), together(floats(1, 16), floats(1, 8, 6))),
    Entry("torchaudio", "wav2vec2", call("torchaudio.models:wav2vec2_model", "group_norm", [(8, 10, 5), (8, 3, 2)],
          False, 16, 0.0, 8, 2, 2, 2, 0.1, 24, 0.1, 0.1, False, 0.05, 5), floats(800, longer=(1600,)), True),
    Entry("torchaudio", "hdemucs", call("torchaudio.models:HDemucs", ["a", "b"], audio_channels=1, channels=8,
          nfft=256, depth=3), floats(1, 2048), False),
    Entry("torchaudio", "tacotron2", call("torchaudio.models:Tacotron2", n_mels=8, n_symbol=20,
          symbol_embedding_dim=12, encoder_embedding_dim=12, encoder_n_convolution=1, decoder_rnn_dim=12,
          attention_rnn_dim=12, attention_hidden_dim=8, attention_location_n_filter=4,
          attention_location_kernel_size=5, prenet_dim=8, postnet_n_convolution=2, postnet_embedding_dim=8),
          together(tokens(20, 8), lengths(8), floats(8, 6), lengths(6))),
    Entry("speechbrain", "ecapa_tdnn", call(f"{_SB}.ECAPA_TDNN:ECAPA_TDNN", 12, lin_neurons=8, channels=[16, 16, 16,
          16, 32], attention_channels=8, res2net_scale=2, se_channels=8), _FRAMES, True),
    Entry("speechbrain", "xvector", call(f"{_SB}.Xvector:Xvector", tdnn_channels=[12, 12, 12, 12, 24], lin_neurons=8,
          in_channels=12), _FRAMES, True),
    Entry("speechbrain", "crdnn", call(f"{_SB}.CRDNN:CRDNN", input_shape=[None, None, 12], cnn_blocks=1,
          cnn_channels=[4], inter_layer_pooling_size=[2], rnn_class=imported("speechbrain.nnet.RNN:LSTM"),
          rnn_layers=1, rnn_neurons=8, dnn_blocks=1, dnn_neurons=12), _FRAMES, True),
    Entry("speechbrain", "contextnet", call(f"{_SB}.ContextNet:ContextNet", input_shape=[None, None, 12],
          out_channels=16, conv_channels=[12, 12], strides=[1, 2], num_blocks=2, num_layers=2, inner_dim=4), _FRAMES,
          True),
    Entry("speechbrain", "hifigan", call(f"{_SB}.HifiGAN:HifiganGenerator", 8, 1, "1", [[1, 3, 5], [1, 3, 5]], [3, 5],
          [8, 4], 16, [4, 2]), floats(8, 10, longer=(8, 14)), True),
    Entry("speechbrain", "masknet", call(f"{_SB}.conv_tasnet:MaskNet", 12, 8, 12, 3, 2, 2, 2), floats(12, 30,
          longer=(12, 40)), True),
    Entry("speechbrain", "dual_path", call(f"{_SB}.dual_path:Dual_Path_Model", 12, 8,
          call(f"{_SB}.dual_path:SBRNNBlock", 8, 8, 1, bidirectional=True), call(f"{_SB}.dual_path:SBRNNBlock", 8, 8,
          1, bidirectional=True), num_layers=1, K=10), floats(12, 30, longer=(12, 40)), True),
    Entry("speechbrain", "transformer_asr", call(f"{_SB}.transformer.TransformerASR:TransformerASR", 20, 12,
          d_model=16, nhead=2, num_encoder_layers=1, num_decoder_layers=1, d_ffn=24), named(src=_FRAMES, tgt=tokens(20,
          6, first=1)), False),
    Entry("demucs", "demucs", call("demucs.demucs:Demucs", ["a", "b"], audio_channels=1, channels=8, depth=3,
          dconv_comp=2, norm_starts=1, norm_groups=2, dconv_attn=2, dconv_lstm=2, samplerate=800), _WAVE, True),
    Entry("demucs", "htdemucs", call("demucs.htdemucs:HTDemucs", ["a", "b"], audio_channels=1, channels=8, nfft=256,
          depth=2, t_layers=2, t_heads=2, bottom_channels=0, samplerate=800, segment=4), floats(1, 3200)),
    Entry("asteroid", "conv_tasnet", call("asteroid.models:ConvTasNet", 2, n_blocks=2, n_repeats=1, bn_chan=8,
          hid_chan=12, skip_chan=8, n_filters=16), _WAVE, True),
    Entry("asteroid", "dprnn", call("asteroid.models:DPRNNTasNet", 2, bn_chan=8, hid_size=8, chunk_size=10,
          n_repeats=1, n_filters=12), _WAVE, True),
    Entry("asteroid", "sudormrf", call("asteroid.models:SuDORMRFNet", 2, bn_chan=8, num_blocks=1, upsampling_depth=2,
          n_filters=16), _WAVE, True),
    Entry("asteroid", "demask", call("asteroid.models:DeMask", hidden_dims=(16,), n_filters=32, stride=8,
          kernel_size=32), _WAVE, True),
    Entry("encodec", "autoencoder", _codec, _WAVE, True),
    Entry("vocos", "vocoder", _vocos, floats(12, 10, longer=(12, 14)), True),
]  # fmt: skip
