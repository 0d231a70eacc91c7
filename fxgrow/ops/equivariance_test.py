"""Running an operator on made-up tensors, to see whether the units of an axis pass through it one by one.

An operator does so if it commutes with choosing units: for any list of units (some left out, some twice, in any order,
more or fewer of them) the output for the chosen units is the output's entries of those units. Elementwise operators do
along every axis, a cumulative sum over time along channels, a transposition into another dimension. Softmax, sorting
and mean subtraction along the axis do not: some choice changes what is left.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fxgrow.ops.random_test_inputs import (
    FEW_KINDS,
    KINDS,
    MIN_UNITS,
    SPREADS,
    Layout,
    index_selections,
    levels,
    random_values,
    separate_units,
)

#: outputs agree within this share of the largest entry of their unit: operators may compute in float32
TOLERANCE = 1e-6
#: up to so many elements all kinds of made-up values are tried, beyond only some
MANY = 1 << 18
#: ways in which the axes of several tensors may belong together that are tried
WAYS = 32
InputDim = tuple[int, int]


class NotEquivariant(Exception):
    """What was seen when the operator ran; it is not unit by unit."""


@dataclass(frozen=True)
class AxisMap:
    """Units that pass: the input axes (tensor, dimension) they stand in together, and where they come out."""

    inputs: tuple[InputDim, ...]
    layout: Layout
    outputs: tuple[tuple[InputDim, Layout], ...]


@dataclass(frozen=True)
class InferredRule:
    """What a trial found: the passages, and per axis without one the reason."""

    passages: tuple[AxisMap, ...]
    refused: tuple[tuple[InputDim, str], ...]


Call = Callable[[list[Tensor]], object]


class EquivarianceTest:
    """One operator with tensors of these shapes and dtypes."""

    def __init__(self, calls: Sequence[Call], shapes: Sequence[tuple[int, ...]], dtypes: Sequence[torch.dtype]) -> None:
        """`calls`: the operator in every mode the graph may run it in; floating point is tried in float64."""
        self.calls, self.shapes, self.dtypes = calls, shapes, dtypes
        self.generator = torch.Generator().manual_seed(0)
        #: whether it draws random numbers: it starts from one seed each time, so noise that all units share is no harm
        self.random = False
        large = sum(math.prod(shape) for shape in shapes) > MANY
        self.kinds: tuple[int, ...] = FEW_KINDS if large else KINDS

    def judge(self, axes: Sequence[tuple[InputDim, int]]) -> InferredRule:
        """Looks for a passage of every axis in question; each comes with the entries that its units have there.

        Raises:
            NotEquivariant: the operator is random, writes into its inputs, or does not run at all.
        """
        with _as_before():
            outputs = [self._steady(call) for call in self.calls]
            lengths = {n for leaves in outputs for t in leaves if isinstance(t, Tensor) for n in t.shape}
            passages: list[AxisMap] = []
            refused: list[tuple[InputDim, str]] = []
            for place, inner in axes:
                if any(place in p.inputs for p in passages):
                    continue
                try:
                    passages.append(self._axis_map(place, inner, lengths))
                except NotEquivariant as why:
                    refused.append((place, str(why)))
            taken = [where for p in passages for where, _ in p.outputs]
            if len(set(taken)) < len(taken):
                raise NotEquivariant("it joins the units of several dimensions in one")
            if len(passages) > 1:
                self._agree(passages)
        return InferredRule(tuple(passages), tuple(refused))

    def _steady(self, call: Call) -> list[object]:
        """The output at the shapes as given; the same twice, with nothing else changed."""
        tensors = self._runnable(call)
        first, given = _run(call, tensors)
        second, _ = _run(call, tensors)
        drawn = torch.get_rng_state()
        torch.default_generator.manual_seed(0)
        self.random = self.random or not torch.equal(drawn, torch.get_rng_state())
        if not all(_same(a, b, None) for a, b in zip(tensors, given, strict=True)):
            raise NotEquivariant("it writes into its input")
        if not _all_same(first, second, {}):
            raise NotEquivariant("it is random, or keeps a state")
        return first

    def _runnable(self, call: Call) -> list[Tensor]:
        """Some values on which it runs; kinds of values that it does not take are left out from here on."""
        runs: dict[int, list[Tensor]] = {}
        failure: Exception | None = None
        for kind in self.kinds:
            tensors = self._values(self.shapes, kind)
            try:
                _run(call, tensors)
                runs[kind] = tensors
            except Exception as error:
                failure = failure or error
        self.kinds = tuple(runs)
        if not runs:
            raise NotEquivariant(f"it does not run on made-up values ({_first_line(failure)})") from failure
        return runs[self.kinds[-1]]

    def _axis_map(self, place: InputDim, inner: int, lengths: set[int]) -> AxisMap:
        n = self.shapes[place[0]][place[1]]
        mixes: NotEquivariant | None = None
        fails: NotEquivariant | None = None
        for layout in _layouts(n, inner, lengths):
            for inputs in self._together(place, n):
                try:
                    return AxisMap(inputs, layout, self._try(inputs, layout))
                except NotEquivariant as why:
                    mixes = mixes or (
                        NotEquivariant("it is random, with other noise for every unit") if self.random else why
                    )
                except Exception as error:
                    text = f"it does not run with another number of entries in dimension {place[1]}"
                    fails = fails or NotEquivariant(f"{text} ({_first_line(error)})")
        raise mixes or fails or NotEquivariant("nothing was tried")

    def _together(self, place: InputDim, n: int) -> Iterator[tuple[InputDim, ...]]:
        """The axis alone, then with axes of the same length of the other tensors, aligned ones first."""
        from_right = len(self.shapes[place[0]]) - place[1]
        options: list[list[InputDim | None]] = []
        for i, shape in enumerate(self.shapes):
            if i != place[0]:
                equal = [(i, d) for d, length in enumerate(shape) if length == n]
                options.append([None, *sorted(equal, key=lambda p: len(self.shapes[p[0]]) - p[1] != from_right)])
        ways = itertools.islice(itertools.product(*options), WAYS)
        for way in sorted(ways, key=lambda w: sum(p is not None for p in w)):
            yield (place, *(p for p in way if p is not None))

    def _try(self, inputs: tuple[InputDim, ...], layout: Layout) -> tuple[tuple[InputDim, Layout], ...]:
        """Where the units of these axes come out, if they pass.

        Raises:
            NotEquivariant: they do not.
        """
        units = self.shapes[inputs[0][0]][inputs[0][1]] // layout.entries
        out: dict[int, tuple[int, list[Layout]]] | None = None
        seen = False
        for call, kind in itertools.product(self.calls, self.kinds):
            more, whole = max(units + 2, MIN_UNITS), AxisMap(inputs, layout, ())
            tensors = self._values(self._extended([(whole, more)]), kind)
            level = torch.linspace(-1, 1, more, dtype=torch.float64)[torch.randperm(more, generator=self.generator)]
            for i, d in inputs:
                tensors[i] = separate_units(tensors[i], d, layout, level, kind)
            base, _ = _run(call, tensors)
            seen = seen or _says_something(base)
            order = levels(tensors[inputs[0][0]], inputs[0][1], layout, more, sizes=kind in SPREADS)
            for chosen in index_selections(order, units, 12 if kind in SPREADS else 2, self.generator):
                part, _ = _run(call, _select(tensors, [(whole, chosen, more)]))
                found = _carrying(base, part, more, len(chosen))
                if out is None:
                    out = found or {}
                elif found is not None and _dimensions(found) != _dimensions(out):
                    raise NotEquivariant("its output has other sizes for other values")
                out = _narrow(out, base, part, chosen, more, inputs[0][1])
        if not seen or out is None:
            raise NotEquivariant("nothing but NaN comes out of made-up values")
        return tuple(((leaf, dim), layouts[0]) for leaf, (dim, layouts) in out.items())

    def _agree(self, passages: Sequence[AxisMap]) -> None:
        """Several widths at once: what holds for each alone must hold for all of them together."""
        for call, kind in itertools.product(self.calls, self.kinds[:2]):
            sizes = [self.shapes[p.inputs[0][0]][p.inputs[0][1]] // p.layout.entries for p in passages]
            more = [n + 2 for n in sizes]
            tensors = self._values(self._extended(list(zip(passages, more, strict=True))), kind)
            chosen = [torch.randint(m, (n + 1,), generator=self.generator) for n, m in zip(sizes, more, strict=True)]
            try:
                base, _ = _run(call, tensors)
                part, _ = _run(call, _select(tensors, list(zip(passages, chosen, more, strict=True))))
            except Exception as error:
                text = f"it does not run when several dimensions change at once ({_first_line(error)})"
                raise NotEquivariant(text) from error
            where: dict[int, int] = {}
            for p, c, m in zip(passages, chosen, more, strict=True):
                for (leaf, dim), layout in p.outputs:
                    base[leaf] = base[leaf].index_select(dim, layout.positions(c, m))  # type: ignore[attr-defined]
                    where[leaf] = dim
            if not _all_same(base, part, where):
                raise NotEquivariant("it mixes units when several dimensions change at once")

    def _extended(self, grow: Sequence[tuple[AxisMap, int]]) -> list[tuple[int, ...]]:
        """The shapes with another number of units in some axes."""
        shapes = [list(shape) for shape in self.shapes]
        for passage, units in grow:
            for i, d in passage.inputs:
                shapes[i][d] = units * passage.layout.entries
        return [tuple(shape) for shape in shapes]

    def _values(self, shapes: Sequence[tuple[int, ...]], kind: int) -> list[Tensor]:
        return [random_values(s, d, kind, self.generator) for s, d in zip(shapes, self.dtypes, strict=True)]


def _layouts(n: int, inner: int, lengths: set[int]) -> list[Layout]:
    """Entry by entry; then in the units that are known; then as the output's sizes suggest (`glu`, `pixel_shuffle`)."""
    found = [Layout()]
    ratios = sorted({2, 3, 4, *(n // m for m in lengths if m > 1 and n % m == 0 and 1 < n // m <= 16)})
    found += [Layout(1, inner)] if inner > 1 else []
    found += [layout for r in ratios for layout in (Layout(r, 1), Layout(1, r))]
    return [k for k in dict.fromkeys(found) if n % k.entries == 0 and n // k.entries > 1]


def _select(tensors: Sequence[Tensor], choices: Sequence[tuple[AxisMap, Tensor, int]]) -> list[Tensor]:
    out = list(tensors)
    for passage, chosen, units in choices:
        for i, d in passage.inputs:
            out[i] = out[i].index_select(d, passage.layout.positions(chosen, units))
    return out


def _carrying(
    base: list[object], part: list[object], units: int, chosen: int
) -> dict[int, tuple[int, list[Layout]]] | None:
    """Per output the dimension whose length follows the number of units, and how they may lie in it.

    None where the number is the same and nothing can be seen.
    """
    found: dict[int, tuple[int, list[Layout]]] = {}
    if len(base) != len(part):
        raise NotEquivariant("the number of its outputs depends on a size")
    if units == chosen:
        return None
    for leaf, (a, b) in enumerate(zip(base, part, strict=True)):
        if not isinstance(a, Tensor) or not isinstance(b, Tensor):
            continue
        if a.dim() != b.dim():
            raise NotEquivariant("the number of its output's dimensions depends on a size")
        changed = [d for d in range(a.dim()) if a.shape[d] != b.shape[d]]
        if not changed:
            continue
        each = a.shape[changed[0]] // units
        if len(changed) > 1 or not each or (a.shape[changed[0]], b.shape[changed[0]]) != (each * units, each * chosen):
            raise NotEquivariant("the sizes of its output do not follow the number of units")
        inners = [i for i in range(each, 0, -1) if each % i == 0]
        found[leaf] = (changed[0], [Layout(each // i, i) for i in inners])
    return found


def _dimensions(found: dict[int, tuple[int, list[Layout]]]) -> dict[int, int]:
    return {leaf: dim for leaf, (dim, _) in found.items()}


def _narrow(
    out: dict[int, tuple[int, list[Layout]]],
    base: list[object],
    part: list[object],
    chosen: Tensor,
    units: int,
    dim: int,
) -> dict[int, tuple[int, list[Layout]]]:
    """Keeps the layouts under which the output for the chosen units is what it was."""
    left = dict(out)
    for leaf, (a, b) in enumerate(zip(base, part, strict=True)):
        if leaf not in out:
            fits = _same(a, b, None)
        else:
            axis, layouts = out[leaf]
            kept = [k for k in layouts if _same(_picked(a, axis, k, chosen, units), b, axis)]
            left[leaf] = (axis, kept)
            fits = bool(kept)
        if not fits:
            raise NotEquivariant(f"it mixes the units of dimension {dim}")
    return left


def _picked(a: object, axis: int, layout: Layout, chosen: Tensor, units: int) -> object:
    if not isinstance(a, Tensor):
        return a
    return a.index_select(axis, layout.positions(chosen, units))


def _run(call: Call, tensors: Sequence[Tensor]) -> tuple[list[object], list[Tensor]]:
    """The leaves of the output, and the tensors as the call left them."""
    given = [t.clone() for t in tensors]
    torch.default_generator.manual_seed(0)
    random.seed(0)
    out = pytree.tree_leaves(call(given))
    return [t.detach() if isinstance(t, Tensor) else t for t in out], given


def _all_same(a: Sequence[object], b: Sequence[object], where: dict[int, int]) -> bool:
    return len(a) == len(b) and all(_same(x, y, where.get(i)) for i, (x, y) in enumerate(zip(a, b, strict=True)))


def _same(a: object, b: object, dim: int | None) -> bool:
    """Equal up to rounding, which is measured by the largest entry of each unit along `dim`."""
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return type(a) is type(b) and bool(a == b)
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not (a.is_floating_point() or a.is_complex()):
        return torch.equal(a, b)
    size = a.abs().double().nan_to_num(0.0, 0.0, 0.0)
    if dim is not None and size.numel():
        other = [d for d in range(size.dim()) if d != dim]
        size = size.amax(other, keepdim=True) if other else size
    tolerance = max(TOLERANCE, 8 * torch.finfo(a.dtype).eps)
    near = (a - b).abs().double() <= size * tolerance
    return bool((near | (a == b) | (a.isnan() & b.isnan())).all())


def _says_something(leaves: Sequence[object]) -> bool:
    """Whether most of an output is a number."""
    return all(bool(t.isfinite().double().mean() >= 0.5) for t in leaves if isinstance(t, Tensor) and t.numel())


def _first_line(error: BaseException | None) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:160]


@contextlib.contextmanager
def _as_before() -> Iterator[None]:
    """Runs without gradients and warnings, on the CPU; the random generators are given back as they were."""
    state = random.getstate()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]), torch.device("cpu"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        random.setstate(state)
