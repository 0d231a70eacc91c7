"""Profiles of parts of the data, merged, against one of all of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn

import fxgrow
from tests.distributed.processes import convolutions, mlp, shard

#: float64
CLOSE = 1e-10


def pooled() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 4, 3, padding=1, stride=2), nn.AvgPool2d(2), nn.Tanh(),
        nn.Flatten(), nn.Linear(4, 1),
    ).double()  # fmt: skip


def transposed() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1, bias=False), nn.Tanh(), nn.ConvTranspose2d(3, 2, 2, stride=2), nn.Tanh(),
        nn.Flatten(), nn.Linear(128, 1),
    ).double()  # fmt: skip


CASES = {"mlp": (mlp, (6,)), "pooled": (pooled, (2, 4, 4)), "transposed": (transposed, (2, 4, 4))}


def graph_and_parts(case: str) -> tuple[fx.GraphModule, list[list[tuple[Tensor, Tensor]]]]:
    net, shape = CASES[case]
    # parts of different sizes: means alone would not add up
    parts = [shard(0, shape, 3, 4), shard(1, shape, 3, 8)]
    return fxgrow.capture(net(), (parts[0][0][0],)), parts


def same_units(found: fxgrow.Profile, expected: fxgrow.Profile, close: float = CLOSE) -> None:
    assert found.keys() == expected.keys() and found.samples == expected.samples
    assert found.loss == pytest.approx(expected.loss, rel=close)
    for name, b in expected.items():
        assert found[name].bottleneck == pytest.approx(b.bottleneck, rel=close)
        assert found[name].desired == pytest.approx(b.desired, rel=close)
        assert found[name].positions == b.positions
        assert found[name].gains == pytest.approx(b.gains, rel=close, abs=close)
    plans = [fxgrow.plan(p, neurons=1) for p in (found, expected)]
    for name, t in fxgrow.apply(expected.graph, plans[1]).state_dict().items():
        mine = fxgrow.apply(found.graph, plans[0]).state_dict()[name]
        # a unit and its outgoing weights have no sign of their own
        torch.testing.assert_close(mine.abs(), t.abs(), rtol=1e3 * close, atol=1e3 * close)


@pytest.mark.parametrize("positions", ["sampled", "all"])
@pytest.mark.parametrize("method", ["tiny", "gradmax"])
@pytest.mark.parametrize("case", CASES)
def test_without_a_refit_parts_make_up_the_whole(case: str, method: str, positions: str) -> None:
    gm, parts = graph_and_parts(case)
    settings = {"method": method, "positions": positions, "progress": False}
    found = [fxgrow.profile(gm, part, keep_moments=True, **settings) for part in parts]
    same_units(fxgrow.Profile.merge(found), fxgrow.profile(gm, parts[0] + parts[1], **settings))


@pytest.mark.parametrize("case", ["mlp", "pooled"])
def test_the_default_refits_on_the_data_at_hand(case: str) -> None:
    gm, parts = graph_and_parts(case)
    found = [fxgrow.profile(gm, part, keep_moments=True, progress=False) for part in parts]
    # every fourth batch is held out, in the parts as in the whole
    merged = fxgrow.Profile.merge(found, dataloader=parts[0] + parts[1], progress=False)
    whole = fxgrow.profile(gm, parts[0] + parts[1], progress=False)
    same_units(merged, whole, 1e-8)
    assert {n: b.significant for n, b in merged.items()} == {n: b.significant for n, b in whole.items()}


def test_keeping_moments_changes_nothing_else() -> None:
    gm, parts = graph_and_parts("pooled")
    kept = fxgrow.profile(gm, parts[1], keep_moments=True, progress=False)
    plain = fxgrow.profile(gm, parts[1], progress=False)
    same_units(kept, plain, 1e-9)
    assert plain.moments is None and kept.record().moments is None


def test_moments_are_files_without_pickle(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    gm, parts = graph_and_parts("mlp")
    found = [fxgrow.profile(gm, part, method="tiny", keep_moments=True, progress=False) for part in parts]
    paths = [tmp_path / f"{i}.safetensors" for i in range(2)]
    for path, part in zip(paths, found, strict=True):
        part.moments.save(path)
    assert safetensors.load_file(paths[0])["width/0/S"].shape == (7, 7)
    again = fxgrow.Profile.merge([fxgrow.Moments.load(path) for path in paths], gm)
    here = fxgrow.Profile.merge(found)
    assert [b.gains for b in again.values()] == [b.gains for b in here.values()]
    paths[0].write_bytes(paths[0].read_bytes()[:-9])
    with pytest.raises(fxgrow.FileError):
        fxgrow.Moments.load(paths[0])
    fxgrow.save(gm, paths[1])
    with pytest.raises(fxgrow.FileError, match="holds a model, not a moments"):
        fxgrow.Moments.load(paths[1])


def test_what_does_not_belong_together_is_refused() -> None:
    gm, (first, second) = graph_and_parts("mlp")

    def profiled(model: nn.Module = gm, method: str = "tiny", **settings: object) -> fxgrow.Profile:
        return fxgrow.profile(model, second, method=method, keep_moments=True, progress=False, **settings)

    own = profiled()
    other = fxgrow.capture(mlp(), (first[0][0],))
    with torch.no_grad():
        other.get_parameter("0.bias")[0] += 1e-9
    for parts, graph, message in (
        ([], gm, "nothing to merge"),
        ([own, fxgrow.profile(gm, first, method="tiny", progress=False)], gm, "Part 1 has no moments"),
        ([own, profiled(other)], gm, "Part 1 was profiled with other weights"),
        ([own, profiled(method="gradmax")], gm, "part 1 'gradmax'"),
        ([own, profiled(positions="all")], gm, "part 1 'all'"),
        ([own, profiled(widths=["0"])], gm, "Part 0 has widths"),
        ([own.moments], None, "give gm="),
        ([profiled(method="default")], gm, "give dataloader="),
        ([own, replace(own.moments, tensors={})], gm, "another"),
    ):
        with pytest.raises(fxgrow.ProfileError, match=message):
            fxgrow.Profile.merge(parts, graph)
    with pytest.raises(fxgrow.ProfileError, match="has none"):
        profiled(method="splitting")
    norms = fxgrow.capture(convolutions(), (torch.zeros(2, 2, 4, 4, dtype=torch.float64),))
    part = fxgrow.profile(norms, shard(0, (2, 4, 4)), method="tiny", keep_moments=True, progress=False)
    with pytest.raises(fxgrow.ProfileError, match="BatchNorm"):
        fxgrow.Profile.merge([part])
    merged = fxgrow.Profile.merge([part], dataloader=shard(0, (2, 4, 4)), progress=False)
    same_units(merged, fxgrow.profile(norms, shard(0, (2, 4, 4)), method="tiny", progress=False), 1e-8)
