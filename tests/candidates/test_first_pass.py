"""Widths in several passes because memory is limited."""

from __future__ import annotations

import pytest
import torch

import fxgrow
from fxgrow.analysis.analyse import analyse
from fxgrow.candidates.first_pass import FirstPass
from fxgrow.candidates.multiple_passes import split_into_passes
from fxgrow.data.batches import Data
from fxgrow.initialisers.registry import find_initialiser
from fxgrow.statistics.collect import Statistics
from models import MLP, DigitsResNet


class Counted(list):
    """A loader that counts how often it is read."""

    readings = 0

    def __iter__(self):
        self.readings += 1
        return super().__iter__()


def data(*shape: int) -> Counted:
    torch.manual_seed(0)
    x, y = torch.randn(192, *shape).double(), torch.randint(5, (192,))
    return Counted(zip(x.split(32), y.split(32), strict=True))


@pytest.mark.parametrize("method", ["default", "tiny"])
def test_several_passes_change_nothing_but_the_number_of_readings(method: str) -> None:
    model, batches = MLP([6, 12, 10, 5]).double(), data(6)
    options = {"method": method, "positions": "all", "progress": False}
    whole = fxgrow.profile(model, batches, **options)
    readings, batches.readings = batches.readings, 0
    several = fxgrow.profile(model, batches, memory_limit=16_000, **options)
    assert batches.readings > readings
    assert list(whole) == list(several) and several.updates.keys() == whole.updates.keys()
    assert (several.samples, several.loss) == (whole.samples, pytest.approx(whole.loss, rel=1e-12))
    for name, b in whole.items():
        again = several[name]
        assert (again.bottleneck, again.desired) == pytest.approx((b.bottleneck, b.desired), rel=1e-9)
        assert again.singular_values == pytest.approx(b.singular_values, rel=1e-9)
        assert again.gains == pytest.approx(b.gains, rel=1e-6, abs=1e-12) and again.significant == b.significant
    for name, update in whole.updates.items():
        torch.testing.assert_close(several.updates[name], update)


def test_matrices_of_a_pass_fit() -> None:
    model, batches = DigitsResNet(0.5).double(), data(1, 8, 8)
    gm = fxgrow.capture(model, (batches[0][0],))
    analysed = analyse(gm)
    every = analysed.free_widths
    assert split_into_passes(every, gm, None) == [every]
    limit = 2_000_000
    groups = split_into_passes(every, gm, limit)
    assert 1 < len(groups) and [h for own in groups for h in own] == every
    first_pass = FirstPass(analysed, find_initialiser("default"), Data(batches), None, True, torch.Generator())
    for own in groups:
        stats = Statistics(analysed, own, exact=True, output_side=True)
        first_pass.collect(stats)
        stats.finish(torch.Generator())
        moments = [t for w in stats.widths.values() for t in (w.s, *w.blocks.values())]
        moments += [t for c in stats.consumers.values() for t in (c.m, c.g, c.vh)]
        taken = sum(t.nbytes for t in moments if t is not None)
        # room for the solver's copies, but not for another width's
        assert limit / 8 < taken < 0.75 * limit


def test_too_little_memory_for_one_width() -> None:
    model, batches = MLP([6, 12, 10, 5]).double(), data(6)
    with pytest.raises(fxgrow.ProfileError, match=r"moments of width 'layers\.\d' take .* raise it to at least [\d,]+"):
        fxgrow.profile(model, batches, memory_limit=2_000, progress=False)
    with pytest.raises(fxgrow.ProfileError, match="memory_limit"):
        fxgrow.grow(model, batches, memory_limit=2_000, progress=False)
