"""The networkx view: the same nodes and edges as the graph, and widths where the axes carry them."""

from __future__ import annotations

import networkx as nx
import torch
from torch import Tensor, nn

import fxgrow
from models import DigitsResNet, UNet


def test_nodes_and_edges_are_those_of_the_graph() -> None:
    gm = fxgrow.capture(DigitsResNet(0.25), (torch.zeros(2, 1, 8, 8),))
    graph = fxgrow.to_networkx(gm)
    assert list(graph) == [node.name for node in gm.graph.nodes]
    assert set(graph.edges) == {(n.name, user.name) for n in gm.graph.nodes for user in n.users}
    assert nx.is_directed_acyclic_graph(graph)
    conv = graph.nodes["layer1_0_conv1"]
    assert (conv["op"], conv["target"], conv["module"]) == ("call_module", "layer1.0.conv1", "Conv2d")
    assert (conv["shape"], conv["dtype"]) == ((2, 4, 8, 8), torch.float32)


def test_search_finds_the_producers_and_consumers_of_every_width() -> None:
    gm = fxgrow.capture(UNet(), (torch.zeros(2, 1, 32, 32),))
    graph = fxgrow.to_networkx(gm)
    for name, width in graph.graph["widths"].items():
        for key, members in (("produces", width.producers), ("consumes", width.consumers)):
            found = {graph.nodes[n]["target"] for n, names in graph.nodes(data=key) if name in names}
            assert found == set(members), (name, key)


def test_a_width_flows_from_its_producer_to_its_consumers() -> None:
    gm = fxgrow.capture(DigitsResNet(0.25), (torch.zeros(2, 1, 8, 8),))
    graph = fxgrow.to_networkx(gm)
    carriers = graph.subgraph(n for n, names in graph.nodes(data="widths") if "conv1" in names)
    assert nx.is_weakly_connected(carriers)
    assert {"conv1", "layer1_0_conv2", "layer1_0_bn2", "add"} <= set(carriers)
    # inside the block flows another width
    assert graph.nodes["layer1_0_bn1"]["widths"] == ("layer1.0.conv1",)


def test_concatenation_carries_both_widths() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(3, 5), nn.Linear(9, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(torch.cat([self.a(x), self.b(x)], 1))

    graph = fxgrow.to_networkx(fxgrow.capture(Two(), (torch.zeros(1, 3),)))
    assert graph.nodes["cat"]["widths"] == ("a", "b")
    assert graph.nodes["c"]["consumes"] == ("a", "b")


def test_grown_graph_shows_its_new_sizes() -> None:
    net, x = DigitsResNet(0.25), torch.randn(2, 1, 8, 8)
    graph = fxgrow.to_networkx(fxgrow.widen(net, (x,), {"layer1.0.conv1": 3}))
    assert graph.graph["widths"]["layer1.0.conv1"].size == 7
    assert graph.nodes["layer1_0_bn1"]["shape"] == (2, 7, 8, 8)
