"""What the entries of a resized graph become where the defaults are not wanted."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class CopiedUnits:
    """New units of a width that are like old ones."""

    #: the old unit that each is like, `[k]`
    origin: Tensor
    #: the part of an old unit's outgoing weights that each unit gets, old units first, `[size + k]` (a new one's of its
    #: origin's). A new unit with none is like its origin only in what follows on the path (norms, depthwise kernels)
    shares: Tensor


@dataclass
class Values:
    """What new and old entries become, where the defaults are not wanted."""

    #: per parameter, by width and dimension, the new slices along that dimension; other dimensions have their old sizes
    new: dict[str, dict[tuple[str, int], Tensor]] = field(default_factory=dict)
    #: per parameter, what is added to its old entries
    delta: dict[str, Tensor] = field(default_factory=dict)
    #: whether new rows of a producer read the new units of other widths (random), or not (zero)
    new_units_see_each_other: bool = True
    #: per width, the old units that its new ones are like; `new` is what they have of their own
    copies: dict[str, CopiedUnits] = field(default_factory=dict)
