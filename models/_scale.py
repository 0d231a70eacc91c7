"""The width multiplier, the same rule for every network."""

from __future__ import annotations


def scaled(size: int, width: float) -> int:
    """Returns ``size`` times ``width``, rounded, and at least 1."""
    return max(1, round(size * width))
