"""Names of modules and parameters that are no Python names: keywords, and names with quotes."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxgrow


class Net(nn.Module):
    def __init__(self, branches: bool) -> None:
        super().__init__()
        self.branches, self.trunk = branches, nn.Linear(6, 8)
        self.heads = nn.ModuleDict({"class": nn.Linear(8, 7), "class_2": nn.Linear(8, 6), "it's": nn.Linear(8, 5)})
        self.tails = nn.ModuleDict(
            {"import": nn.Linear(7, 3), 'a "b"': nn.Linear(6, 3), "back\\slash": nn.Linear(5, 3)}
        )
        self.scales = nn.ParameterDict({"lambda": torch.randn(8), "in": torch.randn(8)})
        self.add_module("with", nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))

    def forward(self, x: Tensor) -> Any:
        x = self.trunk(x).tanh() * self.scales["lambda"] + self.scales["in"]
        if self.branches and self.training:
            x = F.dropout(x, 0.5)
        outputs = [tail(head(x).relu()) for head, tail in zip(self.heads.values(), self.tails.values(), strict=True)]
        return {"class": getattr(self, "with")(sum(outputs)), "it's": outputs[2]}


@pytest.mark.parametrize("branches", [False, True])
def test_names_that_are_no_code(branches: bool) -> None:
    torch.manual_seed(0)
    m, x = Net(branches).double(), torch.randn(4, 6, dtype=torch.float64)
    gm = fxgrow.capture(m, (x,))
    free = {w.name: 1 for w in fxgrow.widths(gm) if w.pinned is None}
    assert free.keys() == {"trunk", "heads.class", "heads.class_2", "heads.it's", "with.0"}
    grown = fxgrow.widen(m, (x,), free)
    for mode in (False, True):
        for graph in (gm, grown, copy.deepcopy(grown), pickle.loads(pickle.dumps(grown))):
            torch.manual_seed(0)
            expected = m.train(mode)(x)
            torch.manual_seed(0)
            found = graph.train(mode)(x)
            if mode and branches and graph is not gm:  # other random numbers
                continue
            assert found.keys() == expected.keys()
            assert all(torch.allclose(found[k], expected[k], rtol=0, atol=1e-10) for k in found)
    batches = [(torch.randn(16, 6), torch.randn(16, 2)) for _ in range(4)]
    loss = lambda out, y: F.mse_loss(out["class"], y)  # noqa: E731
    again = fxgrow.grow(m.float(), batches, loss_fn=loss, neurons={"heads.class": 2}, progress=False)
    assert again.get_submodule("heads.class").out_features == 9
