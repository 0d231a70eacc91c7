"""Tests on random tensors whether an operator is equivariant to selecting units along an axis.

It is if it commutes with `index_select`: for any list of units (some left out, some repeated, in any order) the output
for the selected units is the selection of the output. Elementwise operators are equivariant along every axis, a
cumulative sum over time along channels; softmax, sorting and mean subtraction along the axis are not.
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

from fxgrow.ops.random_test_inputs import MIN_UNITS, Layout, index_selections, kinds, random_values, separate_units

#: relative tolerance to the largest entry of a unit: operators may compute in float32
TOLERANCE = 1e-6
#: at most this many combinations of axes of several tensors are tried
COMBINATIONS = 32
#: an axis of an input: (tensor, dimension)
InputDim = tuple[int, int]


class NotEquivariant(Exception):
    """The operator is not equivariant; the message says how that showed."""


@dataclass(frozen=True)
class AxisMap:
    """The input axes that hold the same units, and the output axes in which these units come out."""

    inputs: tuple[InputDim, ...]
    layout: Layout
    outputs: tuple[tuple[InputDim, Layout], ...]


@dataclass(frozen=True)
class InferredRule:
    """The result of a test: maps of axes, and for each axis without a map the reason."""

    axis_maps: tuple[AxisMap, ...]
    refused: tuple[tuple[InputDim, str], ...]


Call = Callable[[list[Tensor]], object]
#: per output the dimension that holds the units, and their possible layouts in it
OutputLayouts = dict[InputDim, list[Layout]]


class EquivarianceTest:
    """Tests one operator on tensors of these shapes and dtypes."""

    def __init__(self, calls: Sequence[Call], shapes: Sequence[tuple[int, ...]], dtypes: Sequence[torch.dtype]) -> None:
        """`calls`: the operator in each mode (train, eval) in which the graph may run it; floats are float64."""
        self.calls, self.shapes, self.dtypes = calls, shapes, dtypes
        self.generator = torch.Generator().manual_seed(0)
        #: whether it draws random numbers; each run has the same seed, so noise that all units share is fine
        self.random = False
        self.kinds = kinds(sum(math.prod(shape) for shape in shapes))

    def infer(self, axes: Sequence[tuple[InputDim, int]]) -> InferredRule:
        """Looks for a map of every axis in `axes`, which are given with the number of entries per unit."""
        with _isolated():
            outputs = [self._deterministic_output(call) for call in self.calls]
            lengths = {n for leaves in outputs for t in leaves if isinstance(t, Tensor) for n in t.shape}
            maps: list[AxisMap] = []
            refused: list[tuple[InputDim, str]] = []
            for place, inner in axes:
                if any(place in m.inputs for m in maps):
                    continue
                try:
                    maps.append(self._axis_map(place, inner, lengths))
                except NotEquivariant as why:
                    refused.append((place, str(why)))
            output_dims = [where for m in maps for where, _ in m.outputs]
            if len(set(output_dims)) < len(output_dims):
                raise NotEquivariant("its output dimension mixes several input dimensions")
            if len(maps) > 1:
                self._check_together(maps)
        return InferredRule(tuple(maps), tuple(refused))

    def _deterministic_output(self, call: Call) -> list[object]:
        """The output at the given shapes; raises unless it is the same twice and the inputs are unchanged."""
        tensors = self._runnable(call)
        first, given = _run(call, tensors)
        second, _ = _run(call, tensors)
        seeded = torch.Generator().manual_seed(0).get_state()
        self.random = self.random or not torch.equal(seeded, torch.get_rng_state())
        if not all(_same(a, b, None) for a, b in zip(tensors, given, strict=True)):
            raise NotEquivariant("it writes into its input")
        if not _all_same(first, second, {}):
            raise NotEquivariant("it is random, or keeps a state")
        return first

    def _runnable(self, call: Call) -> list[Tensor]:
        """Values on which it runs; kinds of values on which it fails are left out from here on."""
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
            raise NotEquivariant(f"it does not run on random values ({_first_line(failure)})") from failure
        return runs[self.kinds[-1]]

    def _axis_map(self, place: InputDim, inner: int, lengths: set[int]) -> AxisMap:
        """Tries layouts and combinations of inputs until one is equivariant."""
        n = self.shapes[place[0]][place[1]]
        mixes: list[str] = []
        fails: list[str] = []
        for layout in _layouts(n, inner, lengths):
            for inputs in self._combinations(place, n):
                try:
                    return AxisMap(inputs, layout, self._output_dims(inputs, layout))
                except NotEquivariant as why:
                    mixes.append("it is random, with different noise for each unit" if self.random else str(why))
                except Exception as error:
                    text = f"it does not run with another number of entries in dimension {place[1]}"
                    fails.append(f"{text} ({_first_line(error)})")
        raise NotEquivariant([*mixes, *fails][0])

    def _combinations(self, place: InputDim, n: int) -> Iterator[tuple[InputDim, ...]]:
        """The axis alone, then with equally long axes of the other tensors, those aligned from the right first."""
        from_right = len(self.shapes[place[0]]) - place[1]
        options: list[list[InputDim | None]] = []
        for i, shape in enumerate(self.shapes):
            if i != place[0]:
                equal = [(i, d) for d, length in enumerate(shape) if length == n]
                options.append([None, *sorted(equal, key=lambda p: len(self.shapes[p[0]]) - p[1] != from_right)])
        combinations = itertools.islice(itertools.product(*options), COMBINATIONS)
        for others in sorted(combinations, key=lambda c: sum(p is not None for p in c)):
            yield (place, *(p for p in others if p is not None))

    def _output_dims(self, inputs: tuple[InputDim, ...], layout: Layout) -> tuple[tuple[InputDim, Layout], ...]:
        """The output axes in which the units of these input axes come out; raises if the operator mixes them."""
        i, d = inputs[0]
        units = self.shapes[i][d] // layout.entries
        more, axes = max(units + 2, MIN_UNITS), AxisMap(inputs, layout, ())
        out: OutputLayouts | None = None
        finite = False
        for call, kind in itertools.product(self.calls, self.kinds):
            tensors = self._values(self._resized_shapes([(axes, more)]), kind)
            level = torch.linspace(-1, 1, more, dtype=torch.float64)[torch.randperm(more, generator=self.generator)]
            for tensor, dim in inputs:
                tensors[tensor] = separate_units(tensors[tensor], dim, layout, level, kind)
            base, _ = _run(call, tensors)
            leaves = [t for t in base if isinstance(t, Tensor) and t.numel()]
            finite = finite or all(bool(t.isfinite().double().mean() >= 0.5) for t in leaves)
            for chosen in index_selections(tensors[i], d, layout, units, kind, self.generator):
                part, _ = _run(call, _select(tensors, [(axes, chosen, more)]))
                candidates = _candidate_layouts(base, part, more, len(chosen))
                if out is None:
                    out = candidates or {}
                elif candidates is not None and candidates.keys() != out.keys():
                    raise NotEquivariant("the sizes of its output depend on values")
                out = _matching_layouts(out, base, part, (chosen, more), d)
        if not finite or out is None:
            raise NotEquivariant("its output is NaN or infinite on random values")
        return tuple((place, layouts[0]) for place, layouts in out.items())

    def _check_together(self, maps: Sequence[AxisMap]) -> None:
        """Checks the maps again with units selected along all axes at once."""
        for call, kind in itertools.product(self.calls, self.kinds[:2]):
            sizes = [self.shapes[m.inputs[0][0]][m.inputs[0][1]] // m.layout.entries for m in maps]
            more = [n + 2 for n in sizes]
            tensors = self._values(self._resized_shapes(list(zip(maps, more, strict=True))), kind)
            chosen = [torch.randint(m, (n + 1,), generator=self.generator) for n, m in zip(sizes, more, strict=True)]
            try:
                base, _ = _run(call, tensors)
                part, _ = _run(call, _select(tensors, list(zip(maps, chosen, more, strict=True))))
            except Exception as error:
                text = f"it does not run when several dimensions change at once ({_first_line(error)})"
                raise NotEquivariant(text) from error
            where: dict[int, int] = {}
            for axis_map, indices, units in zip(maps, chosen, more, strict=True):
                for (leaf, dim), layout in axis_map.outputs:
                    base[leaf] = base[leaf].index_select(dim, layout.positions(indices, units))  # type: ignore[attr-defined]
                    where[leaf] = dim
            if not _all_same(base, part, where):
                raise NotEquivariant("it mixes units when several dimensions change at once")

    def _resized_shapes(self, sizes: Sequence[tuple[AxisMap, int]]) -> list[tuple[int, ...]]:
        """The shapes with other numbers of units in some axes."""
        shapes = [list(shape) for shape in self.shapes]
        for axis_map, units in sizes:
            for i, d in axis_map.inputs:
                shapes[i][d] = units * axis_map.layout.entries
        return [tuple(shape) for shape in shapes]

    def _values(self, shapes: Sequence[tuple[int, ...]], kind: int) -> list[Tensor]:
        return [random_values(s, d, kind, self.generator) for s, d in zip(shapes, self.dtypes, strict=True)]


def _layouts(n: int, inner: int, lengths: set[int]) -> list[Layout]:
    """One entry per unit; then `inner` per unit; then what the output's sizes suggest (`glu`, `pixel_shuffle`)."""
    layouts = [Layout()]
    ratios = sorted({2, 3, 4, *(n // m for m in lengths if m > 1 and n % m == 0 and 1 < n // m <= 16)})
    layouts += [Layout(1, inner)] if inner > 1 else []
    layouts += [layout for r in ratios for layout in (Layout(r, 1), Layout(1, r))]
    return [k for k in dict.fromkeys(layouts) if n % k.entries == 0 and n // k.entries > 1]


def _select(tensors: Sequence[Tensor], choices: Sequence[tuple[AxisMap, Tensor, int]]) -> list[Tensor]:
    out = list(tensors)
    for axis_map, chosen, units in choices:
        for i, d in axis_map.inputs:
            out[i] = out[i].index_select(d, axis_map.layout.positions(chosen, units))
    return out


def _candidate_layouts(base: list[object], part: list[object], units: int, chosen: int) -> OutputLayouts | None:
    """Every output dimension whose length follows the number of units; None where `units == chosen`: none changes."""
    candidates: OutputLayouts = {}
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
        candidates[leaf, changed[0]] = [Layout(each // i, i) for i in inners]
    return candidates


def _matching_layouts(
    out: OutputLayouts, base: list[object], part: list[object], selection: tuple[Tensor, int], dim: int
) -> OutputLayouts:
    """Keeps the layouts under which `part`, the output for the selected units, is the selection of `base`."""
    axes = dict(out.keys())
    matching = {}
    for leaf, (a, b) in enumerate(zip(base, part, strict=True)):
        if isinstance(a, Tensor) and leaf in axes:
            place = leaf, axes[leaf]
            selected = ((k, a.index_select(axes[leaf], k.positions(*selection))) for k in out[place])
            matching[place] = [k for k, entries in selected if _same(entries, b, axes[leaf])]
            fits = bool(matching[place])
        else:
            fits = _same(a, b, None)
        if not fits:
            raise NotEquivariant(f"it mixes the units of dimension {dim}")
    return matching


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
    """Whether two outputs are equal up to rounding, relative to the largest entry of each unit along `dim`."""
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


def _first_line(error: BaseException | None) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:160]


@contextlib.contextmanager
def _isolated() -> Iterator[None]:
    """Runs without gradients and warnings, on the CPU, and restores the random generators."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]), torch.device("cpu"), contextlib.ExitStack() as stack:
        stack.callback(random.setstate, random.getstate())
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        yield
