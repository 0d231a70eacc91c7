"""Tables, the explanation and the pictures: they fit, they say what the records say, and they leave no state."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import fxgrow
from examples.data import digits
from fxgrow import Growth, MissingExtraError, Plan, Profile
from fxgrow.pipeline.explain import explain
from fxgrow.pipeline.report import growth_report, profile_table
from fxgrow.report.plot import ACCEPTED, BOTTLENECK, CHOSEN, REJECTED, plot_growth, plot_profile
from fxgrow.report.table import WIDTH, Column, shorten, table
from models import DigitsResNet

NAMES = st.text("abcdefgh.12", min_size=1, max_size=150)


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


@given(NAMES, st.integers(3, 60))
def test_shorten_keeps_both_ends(text: str, width: int) -> None:
    short = shorten(text, width)
    if len(text) <= width:
        assert short == text
    else:
        head, tail = short.split("…")
        assert len(short) == width
        assert head and text.startswith(head) and text.endswith(tail)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(NAMES, st.integers(0, 10**9).map(str), NAMES, NAMES), min_size=1, max_size=6))
def test_tables_fit_whatever_the_names(rows: list[tuple[str, ...]]) -> None:
    columns = [Column("a", shrink=True), Column("n", right=True), Column("b", shrink=True), Column("c", wrap=True)]
    lines = table(columns, rows).splitlines()
    assert max(map(len, lines)) <= WIDTH
    # numbers are never cut, and what wraps is all there
    assert [n for line in lines for n in line.split() if n in {r[1] for r in rows}]
    start = lines[0].rindex("c")
    assert "".join(line[start:].strip() for line in lines[2:]) == "".join(r[3] for r in rows)


def test_profile_table_says_what_the_profile_says(grown: tuple[Profile, Growth]) -> None:
    profile, _ = grown
    text = profile_table(profile)
    rows = {line.split()[0]: line for line in text.splitlines() if line[:1].isalpha()}
    decided = fxgrow.plan(profile)
    assert decided.units and all(b.gains[0] > 1e-3 for b in profile.values())
    for name, b in profile.items():
        assert f"{b.bottleneck:.3g}" in rows[name]
        assert f"{b.bottleneck / b.desired:.1%}" in rows[name]
        assert f"{b.gains[0]:.4f}" in rows[name]
        assert f"{b.significant} of {len(b.gains)}" in rows[name]
        assert rows[name].endswith(f"+{decided.units[name]}" if name in decided.units else "·")
    assert f"{decided.parameters[0]:,} → {decided.parameters[1]:,} parameters" in text
    assert "a dimension of the model's output" in rows["linear"]
    assert str(profile) == text


def test_growth_report_says_what_was_done(grown: tuple[Profile, Growth]) -> None:
    _, growth = grown
    text = growth_report(growth)
    rows = {line.split()[0]: line for line in text.splitlines() if line[:1].isalpha()}
    assert rows["conv1"].endswith("+1") and rows["layer2.0.conv2"].endswith("+3")
    # a width that was asked for nothing is not measured
    assert set(rows) & {"layer1.0.conv1", "layer2.0.conv1"} == set()
    for before, after in growth.losses.values():
        assert f"{before:.4f} → {after:.4f}" in text
    assert f"gamma: {growth.plan.scale:.3g} applied" in text
    assert max(map(len, text.splitlines())) <= WIDTH
    assert str(growth) == text


def test_declined_growth_says_why(grown: tuple[Profile, Growth]) -> None:
    _, growth = grown
    why = "no step along the proposed units lowers the held-back loss"
    declined = replace(growth, plan=Plan({}, reason=why), search=None, declined=why)
    text = growth_report(declined)
    assert "nothing added" in text.splitlines()[0]
    assert f"declined: {why}" in text
    assert plot_growth(declined).axes[2].texts[0].get_text() == why


def test_record_of_a_growth_prints_without_the_network(grown: tuple[Profile, Growth]) -> None:
    _, growth = grown
    assert growth.profile.gm is None
    assert "with the default budget" not in profile_table(growth.profile)


def test_explain_counts_what_can_grow() -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 5), nn.Softmax(1), nn.Linear(5, 2))
    e = explain(net, (torch.zeros(1, 4),))
    assert [w.name for w in e.widths if w.pinned is None] == ["0"]
    # 8x4 + 8 of the producer, 5x8 of the consumer; its bias and the last layer stay as they are
    assert (e.parameters, e.reachable) == (8 * 5 + 5 * 9 + 2 * 6, 8 * 5 + 5 * 8)
    assert "1 of 3 widths can grow; 82.5% of 97 parameters" in str(e)
    assert repr(e) == str(e)


class Ranked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x).softmax(1))


def test_explain_names_the_line_that_pins() -> None:
    e = explain(Ranked(), (torch.zeros(1, 4),))
    file, line = e.places["a"].split(":")
    assert "softmax(1)" in Path(__file__).with_name(Path(file).name).read_text().splitlines()[int(line) - 1]
    text = str(e)
    assert f"at node softmax ({file}:{line})" in " ".join(text.split())
    assert max(map(len, text.splitlines())) <= WIDTH


def test_explain_takes_a_captured_graph() -> None:
    net = DigitsResNet(0.25)
    x = torch.zeros(2, 1, 8, 8)
    assert explain(fxgrow.capture(net, (x,))).widths == explain(net, (x,)).widths


def test_bars_have_the_lengths_of_the_profile(grown: tuple[Profile, Growth], tmp_path: Path) -> None:
    profile, _ = grown
    path = tmp_path / "profile.png"
    left, right = plot_profile(profile, str(path)).axes
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
    plot_profile(grown[0])
    assert pyplot.get_fignums() == []


def test_plot_without_matplotlib_says_what_to_install(
    grown: tuple[Profile, Growth], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match=r"pip install fxgrow\[report\]"):
        plot_profile(grown[0])


def _rgba(color: str) -> tuple[float, ...]:
    from matplotlib.colors import to_rgba

    return to_rgba(color)
