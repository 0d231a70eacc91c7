"""Code that looks at data and computes nothing from it: checks, messages, logs; and numbers that a graph can read."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxgrow
from fxgrow import CaptureError

log = logging.getLogger(__name__)


class Net(nn.Module):
    """`look` gets the input and the first hidden layer, and returns the layer or nothing."""

    def __init__(self, look: Callable[[Any, Tensor, Tensor], Tensor | None]) -> None:
        super().__init__()
        self.look, self.a, self.b, self.out = look, nn.Linear(6, 8), nn.Linear(8, 7), nn.Linear(7, 3)
        self.strict = True

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).relu()
        looked = self.look(self, x, h)
        return self.out(self.b(h if looked is None else looked).tanh())


def asserts(m: Net, x: Tensor, h: Tensor) -> None:
    assert not torch.isnan(x).any(), "not a number"
    assert x.dim() == 2 and torch.isfinite(h).all() and not h.isnan().any().item(), f"{h.max()} {h.std().item():.2f}"
    assert -100 <= x.min() <= x.max() < 100
    assert torch.allclose(h, h.abs()), "the activation is negative"
    torch._assert((h >= 0).all(), "negative")


def raises(m: Net, x: Tensor, h: Tensor) -> None:
    if torch.isnan(h).any() or bool(h.isinf().any()):
        warnings.warn("bad", stacklevel=1)
        raise ValueError(f"bad activations: {h}")
    if (x < 100).all():
        pass
    else:
        raise ValueError
    finite(h)


def finite(h: Tensor) -> Tensor:
    if not h.isfinite().all():
        raise FloatingPointError("in a helper")
    return h


def reports(m: Net, x: Tensor, h: Tensor) -> None:
    if h.abs().max().item() > 1e6:
        log.warning("large activations %s", h.max().item())
    if m.strict and h.sum() == 0:
        print("all are dead", h.mean())


def logs(m: Net, x: Tensor, h: Tensor) -> None:
    m.last, m.largest = h.abs().mean().item(), [h.max().item()]
    m.mean = float(h.mean())
    m.note = f"{tuple(h.shape)} {h.mean():.3f} {h.min()}" + "%.2f %d" % (h.mean(), h.sum())  # noqa: UP031
    m.figures = {"mean": h.mean().item(), "dead": float((h == 0).double().mean())}
    log.error("mean %.3f, std %.3f", h.mean().item(), float(h.std()))
    m.values, m.numbers = h.detach().cpu().numpy(), h[0].tolist()


def scaled_by_a_number(m: Net, x: Tensor, h: Tensor) -> Tensor:
    return h * x.abs().max().item() if m.strict else h


@pytest.mark.parametrize("look", [asserts, raises, reports, logs, scaled_by_a_number])
def test_what_only_looks_binds_no_width(look: Callable[..., Any]) -> None:
    torch.manual_seed(0)
    m, x, others = Net(look).double(), torch.randn(4, 6).double(), 3 * torch.randn(5, 6).double()
    before = set(vars(m))
    gm = fxgrow.capture(m, (x,))
    assert set(vars(m)) == before
    assert {width.name: width.step for width in fxgrow.widths(gm) if width.pinned is None} == {"a": 1, "b": 1}
    wider = fxgrow.widen(m, (x,), {"a": 2, "b": 3})
    for inputs in (x, others):
        torch.testing.assert_close(gm(inputs), m(inputs), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(wider(inputs), m(inputs), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("look", [asserts, raises])
@pytest.mark.parametrize("value", [1e3, torch.nan])
def test_a_check_of_the_input_is_still_made(look: Callable[..., Any], value: float) -> None:
    m, x = Net(look), torch.randn(4, 6)
    wider = fxgrow.widen(m, (x,), {"a": 2})
    x[0, 0] = value
    with pytest.raises((AssertionError, ValueError)):
        m(x)
    with pytest.raises(CaptureError, match="model's code raises for this input: .*test_checks_of_data.py:"):
        wider(x)


def takes_another_way(m: Net, x: Tensor, h: Tensor) -> Tensor:
    if torch.isnan(h).any():
        h = torch.nan_to_num(h)
    return h


def reads_what_it_logged(m: Net, x: Tensor, h: Tensor) -> Tensor:
    m.scale = float(x.abs().max())
    return h * m.scale


def reads_one_of_the_figures(m: Net, x: Tensor, h: Tensor) -> Tensor:
    m.largest_of = {"x": float(x.abs().max())}
    return h * m.largest_of["x"]


def prints_and_goes_another_way(m: Net, x: Tensor, h: Tensor) -> Tensor:
    if h.mean() > 1:
        print("large")
        h = h / 2
    return h


WAYS = [takes_another_way, reads_what_it_logged, reads_one_of_the_figures, prints_and_goes_another_way]


@pytest.mark.parametrize("look", WAYS)
def test_what_a_result_depends_on_is_not_left_out(look: Callable[..., Any]) -> None:
    with pytest.raises(CaptureError, match="looks at the values of a tensor"):
        fxgrow.capture(Net(look), (torch.randn(4, 6),))
