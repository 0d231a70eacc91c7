"""Records of a profile and a growth, printed and plotted: they say what the records hold, and leave no state."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import fxgrow
from examples.data import digits
from fxgrow import Growth, MissingExtraError, Plan, Profile
from fxgrow.report.plot import ACCEPTED, BOTTLENECK, CHOSEN, REJECTED
from fxgrow.report.table import WIDTH
from models import DigitsResNet


@pytest.fixture(scope="module")
def grown() -> tuple[Profile, Growth]:
    """A profile and a growth of one briefly trained network."""
    torch.manual_seed(0)
    net = DigitsResNet(0.25)
    data = digits()
    batches = list(zip(data.x_train.split(64), data.y_train.split(64), strict=True))
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for a, b in batches * 3:
        optimizer.zero_grad()
        F.cross_entropy(net(a), b).backward()
        optimizer.step()
    profile = fxgrow.profile(net, batches, progress=False)
    growth = fxgrow.grow(net, batches, neurons={"conv1": 1, "layer2.0.conv2": 3}, progress=False).meta["fxgrow"]
    return profile, growth


def test_profile_table_says_what_the_profile_says(grown: tuple[Profile, Growth]) -> None:
    profile, _ = grown
    text = str(profile)
    rows = {line.split()[0]: line for line in text.splitlines() if line[:1].isalpha()}
    decided = fxgrow.plan(profile)
    assert decided.units and all(b.gains[0] > 1e-3 for b in profile.values())
    for name, b in profile.items():
        assert f"{b.bottleneck:.3g}" in rows[name]
        assert f"{b.share:.1%}" in rows[name] and b.share == pytest.approx(sum(b.gains[: b.significant]) / profile.loss)
        assert f"{b.gains[0]:.4f}" in rows[name]
        assert f"{b.significant} of {len(b.gains)}" in rows[name]
        assert rows[name].endswith(f"+{decided.units[name]}" if name in decided.units else "·")
    assert f"{decided.parameters[0]:,} → {decided.parameters[1]:,} parameters" in text
    assert "a dimension of the model's output" in rows["linear"]


def test_growth_report_says_what_was_done(grown: tuple[Profile, Growth]) -> None:
    _, growth = grown
    text = str(growth)
    rows = {line.split()[0]: line for line in text.splitlines() if line[:1].isalpha()}
    assert rows["conv1"].endswith("+1") and rows["layer2.0.conv2"].endswith("+3")
    # a width that was asked for nothing is not measured
    assert set(rows) & {"layer1.0.conv1", "layer2.0.conv1"} == set()
    for before, after in growth.losses.values():
        assert f"{before:.4f} → {after:.4f}" in text
    assert f"gamma: {growth.plan.scale:.3g} applied" in text
    assert max(map(len, text.splitlines())) <= WIDTH


def test_declined_growth_says_why(grown: tuple[Profile, Growth]) -> None:
    _, growth = grown
    why = "no step along the proposed units lowers the held-out loss"
    declined = replace(growth, plan=Plan({}, reason=why), search=None, declined=why)
    text = str(declined)
    assert "nothing added" in text.splitlines()[0]
    assert f"declined: {why}" in text
    assert declined.plot().axes[2].texts[0].get_text() == why


def test_record_of_a_growth_prints_without_the_network(grown: tuple[Profile, Growth]) -> None:
    _, growth = grown
    assert growth.profile.gm is None
    assert "with the default budget" not in str(growth.profile)


def test_bars_have_the_lengths_of_the_profile(grown: tuple[Profile, Growth], tmp_path: Path) -> None:
    profile, _ = grown
    path = tmp_path / "profile.png"
    left, right = profile.plot(str(path)).axes
    colored = [p for p in left.patches if p.get_facecolor() == _rgba(BOTTLENECK)]
    assert [p.get_width() for p in colored] == pytest.approx([b.bottleneck for b in profile.values()])
    assert [p.get_width() for p in right.patches] == pytest.approx([g for b in profile.values() for g in b.gains])
    grey = sum(p.get_facecolor() == _rgba(REJECTED) for p in right.patches)
    assert grey == sum(len(b.gains) - b.significant for b in profile.values())
    assert path.read_bytes().startswith(b"\x89PNG")


def test_growth_picture_marks_units_and_gamma(grown: tuple[Profile, Growth], tmp_path: Path) -> None:
    _, growth = grown
    figure = growth.plot(str(tmp_path / "growth.svg"))
    _, middle, right = figure.axes
    colors = [p.get_facecolor() for p in middle.patches]
    assert colors.count(_rgba(CHOSEN)) == 4
    added = growth.plan.units
    rest = sum(max(0, b.significant - added.get(name, 0)) for name, b in growth.profile.items())
    assert colors.count(_rgba(ACCEPTED)) == rest
    assert growth.search is not None
    curve = max(right.lines, key=lambda line: len(line.get_xdata()))
    assert tuple(curve.get_xdata()) == growth.search.gammas
    assert tuple(curve.get_ydata()) == growth.search.losses
    assert [growth.plan.scale] in [list(line.get_xdata()) for line in right.lines]
    low, high = right.get_ylim()
    assert low < growth.losses["eval"][1] < high
    assert "<svg" in (tmp_path / "growth.svg").read_text()


def test_plots_leave_pyplot_alone(grown: tuple[Profile, Growth]) -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    grown[0].plot()
    assert pyplot.get_fignums() == []


def test_plot_without_matplotlib_says_what_to_install(
    grown: tuple[Profile, Growth], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match=r"pip install fxgrow\[report\]"):
        grown[0].plot()


def _rgba(color: str) -> tuple[float, ...]:
    from matplotlib.colors import to_rgba

    return to_rgba(color)
