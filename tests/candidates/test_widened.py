"""Candidate units inside the real graph: nothing changes, norms are transparent, rows are where they should be."""

from __future__ import annotations

import torch
from torch import nn

import fxgrow
from fxgrow.analysis.analyse import analyse
from fxgrow.candidates.widened import Candidates
from fxgrow.graph.evaluate import eval_outputs
from fxgrow.initialisers.registry import Proposal


def net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, padding=1, groups=4),
        nn.BatchNorm2d(4),
        nn.Conv2d(4, 5, 1),
        nn.ReLU(),
        nn.Conv2d(5, 3, 1),
    )


def build(k: int = 3):
    torch.manual_seed(0)
    model, x = net().double(), torch.randn(64, 2, 6, 6).double()
    model(x)  # running statistics
    gm = fxgrow.capture(model.eval(), (x,))
    rows = torch.randn(2, 2 * 9 + 1).double()
    proposals = {"0": Proposal({"0.weight": rows}), "5": Proposal()}
    found = Candidates(analyse(gm), proposals, {"0": k, "5": 2}, [x], torch.Generator().manual_seed(0))
    return gm, found, rows, x


def test_the_function_is_unchanged():
    gm, found, _, x = build()
    for a, b in zip(eval_outputs(gm, (x,)), eval_outputs(found.gm, (x,)), strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-13)


def test_new_channels_put_out_what_they_get_in_both_modes():
    _, found, rows, x = build()
    conv, norm = found.gm.get_submodule("0"), found.gm.get_submodule("1")
    assert torch.equal(conv.weight[4:6].detach().flatten(1), rows[:, :-1])
    assert torch.equal(conv.bias[4:6].detach(), rows[:, -1])
    with torch.no_grad():
        u = conv(x)
        for mode in (False, True):
            out = norm.train(mode)(u)
            assert torch.allclose(out[:, 4:], u[:, 4:], rtol=1e-6, atol=1e-7), f"train={mode}"


def test_depthwise_kernels_pass_proposed_units_on():
    _, found, _, _ = build()
    kernel = found.gm.get_submodule("3").weight[4:].detach()
    expected = torch.zeros(3, 1, 3, 3).double()
    expected[:, 0, 1, 1] = 1
    assert torch.equal(kernel, expected)


def test_values_are_slices_of_old_sizes():
    _, found, _, _ = build()
    assert found.slices["0.weight"]["0", 0].shape == (3, 2, 3, 3)
    # the rows of the second width read the old channels of the first only
    assert found.slices["5.weight"]["5", 0].shape == (2, 4, 1, 1)
    assert ("5", 1) not in found.slices.get("7.weight", {})
