"""What the entries of a resized graph become where the defaults are not wanted."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class CopiedUnits:
    """New units of a width that are like old ones.

    Attributes:
        origin: the old unit that each is like, `[k]`.
        shares: the part of an old unit's outgoing weights that each unit gets (an old one of its own, a new one of its
            origin's), old units first, `[size + k]`. A new unit with none is like its origin only in what follows on
            the path (norms, depthwise kernels): its incoming and outgoing weights are its own.
    """

    origin: Tensor
    shares: Tensor


@dataclass
class Values:
    """What new and old entries become, where the defaults are not wanted.

    Attributes:
        new: per parameter, by width and dimension, the new slices along that dimension in the order of their
            positions; the other dimensions have their old sizes.
        delta: per parameter, what is added to its old entries.
        new_units_see_each_other: whether new rows of a producer read the new units of other widths (random), or not
            (zero).
        copies: per width, the old units that its new ones are like; `new` is what they have of their own.
    """

    new: dict[str, dict[tuple[str, int], Tensor]] = field(default_factory=dict)
    delta: dict[str, Tensor] = field(default_factory=dict)
    new_units_see_each_other: bool = True
    copies: dict[str, CopiedUnits] = field(default_factory=dict)
