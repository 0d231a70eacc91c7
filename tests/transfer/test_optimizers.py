"""Every optimiser of torch.optim under growth: the table in the documentation is what happens."""

from __future__ import annotations

from typing import Any

import pytest
from torch import optim

from docs import optimizers as table

CASES = [(name, options) for name, several in table.OPTIONS.items() for options in several]
_rows: dict[str, table.Row] = {}


def test_no_optimizer_is_missing() -> None:
    classes = {n for n, v in vars(optim).items() if isinstance(v, type) and issubclass(v, optim.Optimizer)}
    assert classes - {"Optimizer"} == set(table.OPTIONS)


@pytest.mark.parametrize(("name", "options"), CASES, ids=lambda v: v if isinstance(v, str) else ",".join(v))
def test_old_entries_keep_their_state(name: str, options: dict[str, Any]) -> None:
    row = _rows[f"{name}{options}"] = table.tried(name, options)
    assert row.kept, "state of old entries changed, or new ones start elsewhere"
    assert not row.afresh
    assert row.owners, "a parameter has no owner, or several"
    assert row.finite
    plain_sgd = name == "SGD" and not options
    assert bool(row.state) != plain_sgd


def test_the_page_is_up_to_date() -> None:
    found = [_rows.get(f"{name}{options}") or table.tried(name, options) for name, options in CASES]
    assert table.PAGE.read_text(encoding="utf-8") == table.page(found), "run: python -m docs.optimizers"
