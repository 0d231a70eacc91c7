"""Second moments of rows against their definition."""

from __future__ import annotations

import pytest
import torch

from fxgrow.statistics.gram import gram


@pytest.mark.parametrize("size", [7, 301])
def test_gram_is_the_weighted_product_and_symmetric(size: int) -> None:
    rows, weight = torch.randn(40, size, dtype=torch.float64), torch.randint(4, (40,))
    got = gram(rows, weight)
    torch.testing.assert_close(got, torch.einsum("mp,m,mq->pq", rows, weight.double(), rows))
    assert torch.equal(got, got.T)
    torch.testing.assert_close(gram(rows), rows.T @ rows)
