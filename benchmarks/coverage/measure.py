"""One network, measured stage by stage; each stage's findings are handed on at once, so that a timeout keeps them."""

from __future__ import annotations

import contextlib
import copy
import io
import math
import random
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

import fxgrow
from benchmarks.coverage.modes import InDouble, SameNoise
from benchmarks.coverage.process import Findings
from benchmarks.coverage.subjects import Inputs, Subject
from fxgrow.analysis.analyse import analyse
from fxgrow.axes.axes import resolve
from fxgrow.axes.structure import Structure
from fxgrow.graph.evaluate import tensors_in
from fxgrow.graph.graph import copy_graph, lookup
from fxgrow.rewriting.into_module import into_module
from fxgrow.rewriting.rewrite import rewrite
from fxgrow.tracing.leaf_modules import is_layer

T = TypeVar("T")
#: largest relative difference of outputs in float64 that counts as equal
EXACT = 1e-9
#: the same in float32, for networks with an operator that has no float64
SINGLE = 1e-4
#: what takes so many seconds is timed once
SLOW = 5.0
#: seconds spent on finding out which widths break a network
BLAME = 40.0


def measure(subject: Subject, options: Mapping[str, bool]) -> Iterator[Findings]:
    """Yields findings; the last stage that yielded is the last that worked.

    Args:
        subject: a network and its inputs.
        options: `onnx`, whether to export.
    """
    _warm_up()
    model = subject.model.eval()
    example = subject.inputs(2, 0)
    yield {"parameters": sum(p.numel() for p in model.parameters())}
    yield _baseline(model, example if subject.own is None else subject.own())
    try:
        captured, gm = _median(lambda: fxgrow.capture(model, example))
    except fxgrow.CaptureError as error:
        yield {"captured": False, "capture_error": str(error)}
        return
    analysed, found = _median(lambda: fxgrow.widths(gm))
    seconds = captured + analysed
    yield {
        "captured": True,
        "nodes": len(gm.graph.nodes),
        "capture_seconds": captured,
        "seconds": seconds,
        "opaque": _opaque(gm),
    }
    free = [w for w in found if w.pinned is None]
    reasons: dict[str, int] = defaultdict(int)
    for w in found:
        if w.pinned is not None:
            reasons[f"{w.pinned.code}: {w.pinned.message}"] += 1
    yield {"free": len(free), "pinned": dict(reasons), **_shares(gm)}
    bound = _in_double(model, example)

    def inputs(batch: int, other: int) -> Inputs:
        given = subject.inputs(batch, other)
        return _cast(given) if bound == EXACT else given

    yield {"dtype": "float64" if bound == EXACT else "float32"}
    yield _faithful(model, fxgrow.capture(model, inputs(2, 0)), inputs, bound, subject.outputs)
    if not free:
        return
    without_dropout(model)
    gm = fxgrow.capture(model, inputs(2, 0))
    units = {w.name: w.step * (1 + i % 2) for i, w in enumerate(free)}
    try:
        grown, _ = rewrite(gm, units, generator=torch.Generator().manual_seed(0))
    except Exception as error:
        yield {
            "widened": False,
            "error": f"{type(error).__name__}: {error}",
            "blame": _blame(gm, inputs(2, 0), units, bound),
        }
        return
    # against the graph, whose decisions on sizes both have: `_faithful` has compared it with the model
    yield (compared := _compare(gm, grown, inputs, bound, subject.outputs))
    if not compared["widened"]:
        yield {"blame": _blame(gm, inputs(2, 0), units, bound)}
    if subject.sizes:
        yield _other_size(model, grown, inputs(2, 1), bound, subject.outputs)
    yield _module(model, inputs(2, 0), gm, {w.name: w.step for w in free})
    if _train_step(copy_graph(gm), inputs(2, 0)).get("train_step"):
        yield _train_step(grown, inputs(2, 0))
    if options.get("onnx"):
        yield _onnx(model, grown, inputs(2, 0))


def _in_double(model: nn.Module, example: Inputs) -> float:
    """Casts the model to float64, unless an operator of it has none; returns how far outputs may differ."""
    try:
        run(model.double(), _cast(example), False, plain=True)
    except RuntimeError:
        model.float()
        return SINGLE
    return EXACT


def without_dropout(model: nn.Module) -> None:
    """Train mode must be the same for a wider network: every dropout and stochastic depth keeps everything."""
    for module in model.modules():
        kind = type(module).__name__.lower()
        for name, value in list(vars(module).items()):
            drops = "drop" in name or (name == "p" and ("drop" in kind or "depth" in kind))
            if drops and isinstance(value, float):
                setattr(module, name, 0.0)


def _warm_up() -> None:
    """What a process pays once, on either side of the comparison: lazy imports, tables, thread pools."""
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(64, 2)
    tiny, x = nn.Sequential(*layers).eval(), torch.randn(2, 3, 6, 6)
    fx.symbolic_trace(tiny)(x)
    fxgrow.widths(fxgrow.capture(tiny, (x,)))


def _baseline(model: nn.Module, example: Inputs) -> Findings:
    """`torch.fx.symbolic_trace` and one forward on images of the network's own size, in CPU seconds."""
    try:
        copied = copy.deepcopy(model)  # a trace leaves proxies in the attributes that forward assigns
        traced, _ = _median(lambda: fx.symbolic_trace(copied))
    except Exception as error:  # what it raises on code it cannot trace is anything
        return {"symbolic_trace": None, "symbolic_trace_error": f"{type(error).__name__}: {error}"[:200]}
    with torch.no_grad():
        forward, _ = _median(lambda: call(model, example))
    return {"symbolic_trace": traced, "forward": forward}


def _median(run: Callable[[], T]) -> tuple[float, T]:
    """CPU seconds, the median of three unless one takes long, and the last result."""
    seconds: list[float] = []
    while True:
        start = time.process_time()
        result = run()
        seconds.append(time.process_time() - start)
        if len(seconds) == 3 or seconds[0] > SLOW:
            return statistics.median(seconds), result


def _opaque(gm: fx.GraphModule) -> dict[str, int]:
    """Parameters in modules that stay one node though they are no layer of torch.nn, by class."""
    share: dict[str, int] = defaultdict(int)
    for node in gm.graph.find_nodes(op="call_module"):
        module = gm.get_submodule(str(node.target))
        if not is_layer(type(module)):
            count = sum(p.numel() for p in module.parameters())
            if count:
                share[type(module).__name__] += count
    return dict(share)


def _shares(gm: fx.GraphModule) -> Findings:
    """Parameters in layers with at least one free width, and the others by what pins them."""
    analysed = analyse(gm)
    structure, free = analysed.structure, {w.var for w in analysed.free_widths}
    owners: dict[str, bool] = defaultdict(bool)
    for name, dims in structure.parameters.items():
        owners[name.rpartition(".")[0]] |= any(s.var in free for axis in dims for s in resolve(axis))
    names = {id(p): name for name, p in reversed(list(gm.named_parameters(remove_duplicate=False)))}
    known = {id(lookup(gm, name)): name for name in structure.parameters}
    open_, pinned = 0, defaultdict(int)
    for p in gm.parameters():
        name = known.get(id(p), names[id(p)])
        if owners[name.rpartition(".")[0]]:
            open_ += p.numel()
        else:
            pinned[_why(structure, name if id(p) in known else None)] += p.numel()
    return {"open": open_, "pinned_parameters": dict(pinned)}


def _why(structure: Structure, name: str | None) -> str:
    """The first reason that is not that an axis is the model's input or output, else that one."""
    if name is None:
        return "unused: no node that reads it is described"
    reasons = []
    for axis in structure.parameters[name]:
        for s in resolve(axis):
            reason = s.var.pinned if s.var is not None else s.reason
            reasons.append(f"{reason.code}: {reason.message}" if reason else "output: no weight reads or writes it")
    inner = [r for r in reasons if not r.startswith(("output", "input"))]
    return (inner or reasons or ["scalar"])[0]


@torch.no_grad()
def run(
    module: nn.Module,
    inputs: Inputs,
    training: bool,
    outputs: Callable[[Any], Any] = lambda given: given,
    *,
    buffers: Iterable[str] = (),
    seeded: bool = False,
    plain: bool = False,
) -> list[Tensor]:
    """Outputs, with parameters, buffers and flags left as they were: some networks write into their codebook.

    Args:
        module: a model or a graph.
        inputs: for it.
        training: the mode.
        outputs: what of its output is returned.
        buffers: names of buffers whose values after the forward pass are returned too.
        seeded: draws random numbers from a seed; else those of a wider tensor begin with those of a narrow one.
        plain: leaves code that computes in float32 by name as it is.
    """
    inputs = pytree.tree_map_only(Tensor, Tensor.clone, inputs)  # some networks write into them
    state = [(t, t.clone()) for t in (*module.parameters(), *module.buffers())]
    modes = [(m, m.training) for m in module.modules()]
    module.train(training)
    random.seed(0)
    torch.manual_seed(0)
    double = any(p.dtype is torch.float64 for p in module.parameters())
    try:
        with contextlib.ExitStack() as stack:
            if double and not plain:
                stack.enter_context(InDouble())
            if not seeded:
                stack.enter_context(SameNoise())
            found = [t.clone() for t in tensors_in(outputs(call(module, inputs)))]
        return found + [module.get_buffer(name).clone() for name in buffers]
    finally:
        for tensor, before in state:
            tensor.copy_(before)
        for m, mode in modes:
            m.training = mode


def call(module: nn.Module, inputs: Inputs) -> Any:
    return module(**inputs) if isinstance(inputs, dict) else module(*inputs)


def distance(a: list[Tensor], b: list[Tensor]) -> float:
    """Largest relative difference of corresponding outputs; infinite where they are not alike."""
    if [t.shape for t in a] != [t.shape for t in b]:
        return float("inf")
    worst = 0.0
    for x, y in zip(a, b, strict=True):
        if not (x.is_floating_point() or x.is_complex()):
            worst = max(worst, 0.0 if torch.equal(x, y) else float("inf"))
        elif x.numel():
            # where both have the same infinity or nothing (masked scores) they agree
            same = (x == y) | (x.isnan() & y.isnan())
            scale = float(x[x.isfinite()].abs().max()) if bool(x.isfinite().any()) else 1.0
            error = float((x - y).abs().masked_fill(same, 0).max()) / max(scale, 1e-300)
            worst = max(worst, error if error == error else float("inf"))
    return worst


def _faithful(
    model: nn.Module,
    gm: fx.GraphModule,
    inputs: Callable[[int, int], Inputs],
    bound: float,
    outputs: Callable[[Any], Any],
) -> Findings:
    """The graph against the model, dropout and other noise included, and how their buffers move.

    They compute the same as they are, or with all in float64: of a table that one reads and the other computes anew,
    either may be rounded alone.
    """
    buffers = [name for name, b in model.named_buffers() if b.is_floating_point() and name in dict(gm.named_buffers())]
    found = _compare(model, gm, inputs, bound, outputs, buffers=buffers, seeded=True)
    if not found["widened"]:
        found = _compare(model, gm, inputs, bound, outputs, buffers=buffers, seeded=True, plain=True)
    return {
        "faithful": found["widened"],
        "faithful_error": found.get("error", f"differs: {found['differences']}"),
    }


def _compare(
    reference: nn.Module,
    wide: nn.Module,
    inputs: Callable[[int, int], Inputs],
    bound: float,
    outputs: Callable[[Any], Any],
    **options: Any,
) -> Findings:
    """Two batch sizes, eval and train mode; a mode that the network itself has not is left out."""
    worst: dict[str, float] = {}
    errors: dict[str, str] = {}
    for training in (False, True):
        for batch in (2, 3):
            key = f"{'train' if training else 'eval'} {batch}"
            given = inputs(batch, 0)
            try:
                expected = run(reference, given, training, outputs, **options)
            except Exception:  # detection in train mode wants targets
                continue
            try:
                worst[key] = distance(expected, run(wide, given, training, outputs, **options))
            except Exception as error:
                errors[key] = f"{type(error).__name__}: {error}"[:500]
    ok = bool(worst) and not errors and max(worst.values()) <= bound
    return {"widened": ok, "differences": worst, **({"error": next(iter(errors.values()))} if errors else {})}


def _other_size(
    reference: nn.Module, wide: nn.Module, inputs: Inputs, bound: float, outputs: Callable[[Any], Any]
) -> Findings:
    differs = math.inf
    for plain in (False, True):  # as for `_faithful`
        try:
            expected = run(reference, inputs, False, outputs, plain=plain)
        except Exception:  # the network itself has one size only
            return {}
        try:
            differs = min(differs, distance(expected, run(wide, inputs, False, outputs, plain=plain)))
        except Exception as error:
            return {"other_size": False, "other_size_error": f"{type(error).__name__}: {error}"[:500]}
        if differs <= bound:
            break
    return {"other_size": differs <= bound, "other_size_error": f"differs by {differs:.2g}"}


def _blame(gm: fx.GraphModule, given: Inputs, units: Mapping[str, int], bound: float) -> dict[str, str]:
    """The widths that break the network on their own, as far as time allows."""
    found: dict[str, str] = {}
    start = time.monotonic()
    expected = run(gm, given, False)
    for name, k in units.items():
        if time.monotonic() - start > BLAME or len(found) == 6:
            break
        try:
            grown, _ = rewrite(gm, {name: k}, generator=torch.Generator().manual_seed(0))
            differs = distance(expected, run(grown, given, False))
            if differs > bound:
                found[name] = f"differs by {differs:.2g}"
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"[:300]
    return found


def _module(model: nn.Module, example: Inputs, gm: fx.GraphModule, units: Mapping[str, int]) -> Findings:
    """Every width by one step: what one attribute counts, such as the size of a head, grows alike everywhere."""
    try:
        into_module(model, example, gm, rewrite(gm, units, generator=torch.Generator().manual_seed(0))[0])
    except fxgrow.PlanError as error:
        return {"into_module": False, "into_module_error": str(error)[:500]}
    return {"into_module": True}


def _train_step(grown: fx.GraphModule, inputs: Inputs) -> Findings:
    """Gradients of the mean square of the outputs are finite."""
    if sum(p.numel() for p in grown.parameters()) > 5e7:
        return {}  # memory and time
    torch.manual_seed(0)
    try:
        out = [t for t in tensors_in(call(grown.train(), inputs)) if t.is_floating_point() and t.requires_grad]
    except Exception as error:
        return {"train_step": False, "train_step_error": f"{type(error).__name__}: {error}"[:300]}
    torch.stack([t[t.isfinite()].square().mean() for t in out]).sum().backward()
    gradients = [p.grad for p in grown.parameters() if p.grad is not None]
    return {"train_step": bool(gradients) and all(bool(g.isfinite().all()) for g in gradients)}


def _onnx(model: nn.Module, grown: fx.GraphModule, inputs: Inputs) -> Findings:
    """The export of the grown graph; nothing where the network itself cannot be exported."""
    single = pytree.tree_map_only(Tensor, lambda t: t.float() if t.dtype is torch.float64 else t, inputs)
    with tempfile.TemporaryDirectory() as folder:
        try:
            fxgrow.export_onnx(grown.float(), f"{folder}/net.onnx", single)
        except fxgrow.FxgrowError as error:
            args, kwargs = ((), single) if isinstance(single, dict) else (single, {})
            with contextlib.redirect_stdout(io.StringIO()):
                try:
                    torch.onnx.export(model.float().eval(), args, f"{folder}/own.onnx", kwargs=kwargs, dynamo=True)
                except Exception:
                    return {}
            return {"onnx": False, "onnx_error": str(error)[:300]}
    return {"onnx": True}


def _cast(inputs: Inputs) -> Inputs:
    return pytree.tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, inputs)
