"""Language models, reinforcement learning, physics, flows and self-supervision."""

from __future__ import annotations

from torch import nn

from benchmarks.wild.entries import Entry, call, floats, imported, together, tokens

_GPT = {"block_size": 32, "n_layer": 2, "n_embd": 16, "n_head": 2, "vocab_size": 32, "padding_multiple": 1}


def _box(path: str, **options: object) -> object:
    """A policy for observations of six numbers and two actions."""
    return call(path, call("gymnasium.spaces:Box", -1.0, 1.0, (6,)), call("gymnasium.spaces:Box", -1.0, 1.0, (2,)),
                imported("benchmarks.wild.tables.other:rate"), **options)  # fmt: skip


def rate(progress: float) -> float:
    return 1e-3


def _nature_cnn() -> nn.Module:
    import gymnasium  # type: ignore[import-not-found]
    import numpy
    from stable_baselines3.common.torch_layers import NatureCNN  # type: ignore[import-not-found]

    pictures = gymnasium.spaces.Box(0, 255, (2, 36, 36), numpy.uint8)
    return nn.Sequential(NatureCNN(pictures, features_dim=16), nn.Linear(16, 3))


def _vae(kind: str) -> object:
    def build() -> nn.Module:
        from pythae import models  # type: ignore[import-not-found]

        config = getattr(models, f"{kind}Config")(input_dim=(1, 6, 6), latent_dim=4)
        return _Pythae(getattr(models, kind)(config))

    return build


class _Pythae(nn.Module):
    """Takes a tensor; the model takes an object that has it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x):  # type: ignore[no-untyped-def]
        encoded = self.model.encoder(x)
        return self.model.decoder(encoded.embedding).reconstruction


def _lit(name: str, **options: object) -> Entry:
    config = call("litgpt.config:Config", **_GPT, **options)
    return Entry("litgpt", name, call("litgpt.model:GPT", config), tokens(32, 8, 12), True)


ENTRIES = [
    _lit("pythia"),
    _lit("llama", norm_class_name="RMSNorm", mlp_class_name="LLaMAMLP", intermediate_size=24, parallel_residual=False,
          bias=False, n_query_groups=1),
    _lit("mixtral", norm_class_name="RMSNorm", mlp_class_name="LLaMAMoE", intermediate_size=24,
          moe_intermediate_size=24, parallel_residual=False, bias=False, n_expert=4, n_expert_per_token=2),
    Entry("mambapy", "mamba", call("torch.nn:Sequential", call("torch.nn:Linear", 6, 16), call("mambapy.mamba:Mamba",
          call("mambapy.mamba:MambaConfig", d_model=16, n_layers=2, d_state=4, pscan=False)), call("torch.nn:Linear",
          16, 3)), floats(8, 6)),
    Entry("mambapy", "mamba_pscan", call("torch.nn:Sequential", call("torch.nn:Linear", 6, 16),
          call("mambapy.mamba:Mamba", call("mambapy.mamba:MambaConfig", d_model=16, n_layers=2, d_state=4)),
          call("torch.nn:Linear", 16, 3)), floats(8, 6)),
    Entry("stable-baselines3", "actor_critic", _box("stable_baselines3.common.policies:ActorCriticPolicy",
          net_arch=[12, 12]), floats(6)),
    Entry("stable-baselines3", "sac_actor", call("stable_baselines3.sac.policies:Actor", call("gymnasium.spaces:Box",
          -1.0, 1.0, (6,)), call("gymnasium.spaces:Box", -1.0, 1.0, (2,)), [12, 12],
          call("stable_baselines3.common.torch_layers:FlattenExtractor", call("gymnasium.spaces:Box", -1.0, 1.0,
          (6,))), 6), together(floats(6), lambda b, o: (True,))),
    Entry("stable-baselines3", "dqn", call("stable_baselines3.dqn.policies:QNetwork", call("gymnasium.spaces:Box",
          -1.0, 1.0, (6,)), call("gymnasium.spaces:Discrete", 3),
          call("stable_baselines3.common.torch_layers:FlattenExtractor", call("gymnasium.spaces:Box", -1.0, 1.0,
          (6,))), 6, net_arch=[12, 12]), floats(6)),
    Entry("stable-baselines3", "nature_cnn", _nature_cnn, floats(2, 36, 36)),
    Entry("deepxde", "fnn", call("deepxde.nn.pytorch:FNN", [2, 16, 16, 1], "tanh", "Glorot normal"), floats(2)),
    Entry("deepxde", "pfnn", call("deepxde.nn.pytorch:PFNN", [2, [8, 8], [8, 8], 2], "tanh", "Glorot normal"),
          floats(2)),
    Entry("deepxde", "deeponet", call("deepxde.nn.pytorch:DeepONet", [10, 16, 12], [2, 16, 12], "relu",
          "Glorot normal"), lambda b, o: ((*floats(10)(b, o), *floats(2)(b, o)),)),
    Entry("neuraloperator", "fno", call("neuralop.models:FNO", (4, 4), 1, 1, 8, n_layers=2), floats(1, 16, 16,
          longer=(1, 24, 24)), True),
    Entry("neuraloperator", "tfno", call("neuralop.models:TFNO", (4, 4), 1, 1, 8, n_layers=2, rank=0.5), floats(1, 16,
          16, longer=(1, 24, 24)), True),
    Entry("neuraloperator", "uno", call("neuralop.models:UNO", 1, 1, 8, lifting_channels=16, projection_channels=16,
          n_layers=3, channel_mlp_skip="linear", uno_out_channels=[8, 8, 8], uno_n_modes=[[4, 4]] * 3,
          uno_scalings=[[1.0, 1.0], [0.5, 0.5], [2, 2]]), floats(1, 16, 16)),
    Entry("zuko", "mlp", call("zuko.nn:MLP", 4, 3, [12, 8], normalize=True), floats(4)),
    Entry("zuko", "masked_mlp", call("zuko.nn:MaskedMLP", call("torch:ones", 3, 4, dtype=imported("torch:bool")), [12,
          8]), floats(4)),
    Entry("normflows", "glow_block_net", call("normflows.nets:ConvNet2d", [3, 12, 12, 6], [3, 1, 3]), floats(3, 8, 8)),
    Entry("normflows", "real_nvp", call("normflows:NormalizingFlow", call("normflows.distributions:DiagGaussian", 2),
          [call("normflows.flows:AffineCouplingBlock", call("normflows.nets:MLP", [1, 12, 12, 2])),
          call("normflows.flows:Permute", 2)]), floats(2)),
    Entry("nflows", "residual_net", call("nflows.nn.nets:ResidualNet", 4, 3, 12, num_blocks=2, use_batch_norm=True,
          dropout_probability=0.1), floats(4)),
    Entry("nflows", "made", call("nflows.transforms.made:MADE", 4, 12, num_blocks=1), floats(4)),
    Entry("nflows", "conv_residual_net", call("nflows.nn.nets:ConvResidualNet", 3, 4, 12, num_blocks=1), floats(3, 8,
          8)),
    Entry("pythae", "vae", _vae("VAE"), floats(1, 6, 6)),
    Entry("pythae", "ae", _vae("AE"), floats(1, 6, 6)),
    Entry("lightly", "simclr_head", call("lightly.models.modules:SimCLRProjectionHead", 12, 16, 8), floats(12)),
    Entry("lightly", "dino_head", call("lightly.models.modules:DINOProjectionHead", 12, 16, 8, 10), floats(12)),
    Entry("lightly", "resnet", call("lightly.models:ResNetGenerator", "resnet-9", 0.125), floats(3, 32, 32)),
]  # fmt: skip
