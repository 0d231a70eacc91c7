"""From axes to widths: the hidden dimensions of a graph, with everything that must change with each."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from torch import fx

from fxgrow.analysis.axis_statistics import COPY
from fxgrow.analysis.initial_state import InitialState
from fxgrow.axes.axes import UnitVar, multiplicity, resolve, variables
from fxgrow.axes.records import Reason, Width
from fxgrow.axes.structure import Projection, Structure
from fxgrow.graph.conditional import runs_in_eval_mode
from fxgrow.graph.node_meta import OWNER


@dataclass(frozen=True, eq=False)
class GrowableWidth:
    """A width together with what the later stages need of the graph's structure."""

    width: Width
    var: UnitVar
    #: uses of weights that write it, and of those that read it in eval mode
    producers: tuple[Projection, ...]
    consumers: tuple[Projection, ...]
    #: how its new units must start, where a norm or a product asks for it
    initial_state: InitialState | None = None

    @property
    def name(self) -> str:
        return self.width.name

    @property
    def step(self) -> int:
        return self.width.step

    @property
    def starts_at_zero(self) -> bool:
        """Whether new units can send nothing on at first: a profile finds no signal in them."""
        return self.initial_state is not None and (bool(self.initial_state.norms) or not self.consumers)

    @property
    def grows_by_copies(self) -> bool:
        """Whether its units are the experts of a mixture, which grows by copies of all of them."""
        return self.initial_state is not None and self.initial_state.kind == COPY


def find_widths(gm: fx.GraphModule, structure: Structure) -> dict[str, GrowableWidth]:
    """Every unbound variable that some weight writes, as a width."""
    producers: dict[UnitVar, list[Projection]] = defaultdict(list)
    consumers: dict[UnitVar, list[Projection]] = defaultdict(list)
    carriers: dict[UnitVar, list[str]] = defaultdict(list)
    for p in structure.projections:
        for var in variables(p.input_axis):
            consumers[var].append(p)
        for var in variables(p.output_axis):
            producers[var].append(p)
    for name, dims in structure.parameters.items():
        for var in variables(*dims):
            carriers[var].append(name)
    layers: Counter[str] = Counter(layer(uses[0]) for uses in producers.values())
    numbers: Counter[str] = Counter()
    widths = {}
    for var, writes in producers.items():
        reads, name = consumers[var], layer(writes[0])
        if layers[name] > 1:
            # a producer whose output is split: its parts by number, a name that growth does not change
            numbers[name] += 1
            name = f"{name}[{numbers[name] - 1}]"
        step = multiplicity(writes[0].out)[var]
        initial_state = structure.initial_states.get(var)
        pinned = var.pinned
        if pinned is None and var.size == 0:
            pinned = Reason("size", writes[0].node.name, "it has size 0, and nothing shows what reads a unit of it")
        if pinned is None and not reads and initial_state is None:
            pinned = Reason("output", writes[0].node.name, "no weight reads it")
        weights = {name for p in (*writes, *reads) for name in (p.weight, p.bias)}
        width = Width(
            name=name,
            size=var.size * step,
            producers=tuple(dict.fromkeys(map(layer, writes))),
            followers=tuple(dict.fromkeys(n.rpartition(".")[0] or n for n in carriers[var] if n not in weights)),
            consumers=tuple(dict.fromkeys(map(layer, reads))),
            step=step,
            pinned=pinned,
        )
        # a profile sees what runs in eval mode; new units start without effect on the rest
        used = tuple(p for p in reads if runs_in_eval_mode(p.node))
        widths[name] = GrowableWidth(width, var, tuple(writes), used, initial_state)
    return {**widths, **_other_weights(gm, structure, widths)}


def _other_weights(
    gm: fx.GraphModule, structure: Structure, widths: Mapping[str, GrowableWidth]
) -> dict[str, GrowableWidth]:
    """Trainable weights that no width has, as pinned widths: nothing that could grow is left out in silence."""
    weights = {p.weight for p in structure.projections}
    listed = {w.var for w in widths.values()}
    called = {str(node.target) for node in gm.graph.nodes if node.op == "call_module"}
    rows: dict[str, GrowableWidth] = {}
    end = next(iter(gm.graph.find_nodes(op="output")))
    for name, tensor in gm.named_parameters():
        # a parametrized weight is known by the name of what is computed
        name = re.sub(r"parametrizations\.(.+)\.original\d*$", r"\1", name)
        own = structure.aliases.get(id(tensor), name)
        dims = structure.parameters.get(own, ())
        if tensor.dim() < 2 or not tensor.requires_grad or own in weights or listed.intersection(variables(*dims)):
            continue
        module, _, leaf = name.rpartition(".")
        row = module if module and (leaf == "weight" or module in called) else name
        reasons = [v.pinned for v in variables(*dims)] + [s.reason for axis in dims for s in resolve(axis)]
        other = "no layer writes the activations that it acts on" if dims else "the model's code does not use it"
        why = next(filter(None, reasons), None) or Reason("operator", end.name, other)
        size = next((n for n in tensor.shape if n > 1), 1)
        width = Width(row, size, (row,), (), (), pinned=why)
        if row not in widths:
            rows.setdefault(row, GrowableWidth(width, UnitVar(size, why), (), ()))
    return rows


def layer(p: Projection) -> str:
    """The module that uses the weight; a weight that the graph uses directly stands for itself or for its layer."""
    if p.node.op == "call_module":
        return str(p.node.target)
    if OWNER in p.node.meta:
        return str(p.node.meta[OWNER])
    module, _, leaf = p.weight.rpartition(".")
    return module if module and leaf == "weight" else p.weight
