"""Graph networks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.wild.entries import Entry, call, edges, generator, graph, imported

_GNN = {"in_channels": 5, "hidden_channels": 8, "num_layers": 2, "out_channels": 3}
_MODELS = "torch_geometric.nn.models"


def _gnn(name: str, cls: str, **options: object) -> Entry:
    return Entry("torch-geometric", name, call(f"torch_geometric.nn:{cls}", **_GNN, **options), edges(5))


class _Classifier(nn.Module):
    """As the tutorial writes it: two convolutions, the mean over each graph, a linear layer."""

    def __init__(self, first: nn.Module, second: nn.Module, last: int = 8) -> None:
        super().__init__()
        self.conv1, self.conv2, self.lin = first, second, nn.Linear(last, 3)

    def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor) -> Tensor:
        from torch_geometric.nn import global_mean_pool  # type: ignore[import-not-found]

        x = self.conv1(x, edge_index).relu()
        x = nn.functional.dropout(self.conv2(x, edge_index), 0.5, self.training)
        return self.lin(global_mean_pool(x, batch))


def _classifier(conv: str, last: int = 8, **options: object) -> object:
    layer = f"torch_geometric.nn:{conv}"
    return call(f"{__name__}:_Classifier", call(layer, 5, 8, **options), call(layer, last, 8, **options), last)


def _gin() -> nn.Module:
    from torch_geometric.nn import GINConv

    def perceptron(inputs: int) -> nn.Module:
        return nn.Sequential(nn.Linear(inputs, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 8))

    return _Classifier(GINConv(perceptron(5)), GINConv(perceptron(8)))


def _weighted(batch: int, other: int) -> tuple[Tensor, ...]:
    x, ends, of = graph(5)(batch, other)
    return x, ends, torch.randn(ends.shape[1], 4, generator=generator(batch, other)), of


def _molecule(batch: int, other: int) -> tuple[Tensor, ...]:
    random = generator(batch, other)
    kinds = torch.randint(1, 9, (5 * batch,), generator=random)
    return kinds, 2 * torch.rand(5 * batch, 3, generator=random), torch.arange(batch).repeat_interleave(5)


ENTRIES = [
    _gnn("gcn", "GCN", dropout=0.5),
    _gnn("sage", "GraphSAGE", norm="batch_norm"),
    _gnn("gat", "GAT", heads=2),
    _gnn("gatv2", "GAT", v2=True, heads=2, norm="layer_norm"),
    _gnn("gin", "GIN", norm="batch_norm", jk="cat"),
    _gnn("edge_cnn", "EdgeCNN"),
    Entry("torch-geometric", "gcn_classifier", _classifier("GCNConv"), graph(5)),
    Entry("torch-geometric", "graph_conv_classifier", _classifier("GraphConv"), graph(5)),
    Entry("torch-geometric", "transformer_classifier", _classifier("TransformerConv", 16, heads=2), graph(5)),
    Entry("torch-geometric", "cheb_classifier", _classifier("ChebConv", K=2), graph(5)),
    Entry("torch-geometric", "tag_classifier", _classifier("TAGConv", K=2), graph(5)),
    Entry("torch-geometric", "arma_classifier", _classifier("ARMAConv"), graph(5)),
    Entry("torch-geometric", "gin_classifier", _gin, graph(5)),
    Entry("torch-geometric", "attentive_fp", call(f"{_MODELS}:AttentiveFP", 5, 8, 3, 4, 2, 2), _weighted),
    Entry("torch-geometric", "schnet", call(f"{_MODELS}:SchNet", hidden_channels=8, num_filters=8, num_interactions=2,
          num_gaussians=6, interaction_graph=imported("benchmarks.wild.tables.graphs:all_pairs")), _molecule),
]  # fmt: skip


def all_pairs(positions: Tensor, batch: Tensor) -> tuple[Tensor, Tensor]:
    """Edges between all atoms of a molecule of five, and their lengths; torch-cluster would find the near ones."""
    pairs = torch.tensor([[i, j] for i in range(5) for j in range(5) if i != j]).T
    first = torch.arange(positions.shape[0] // 5) * 5
    ends = (pairs[:, None, :] + first[None, :, None]).flatten(1)
    return ends, (positions[ends[0]] - positions[ends[1]]).norm(dim=-1)
