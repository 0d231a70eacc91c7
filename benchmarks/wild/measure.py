"""One network of a table: the stages of `benchmarks.coverage`, then growth on batches, and saving what has grown."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils import _pytree as pytree

import fxgrow
from benchmarks.coverage.measure import call, distance, measure, run
from benchmarks.coverage.process import Findings, described
from benchmarks.coverage.subjects import Inputs, Subject
from benchmarks.wild.entries import Entry, drawn
from fxgrow.graph.evaluate import tensors_in

#: samples of the batches to grow on: the last one is smaller, and one of the two that are held out
BATCHES = (8, 8, 8, 8, 8, 8, 8, 5)
#: the held-out loss may be so much larger afterwards
WORSE = 0.01


def steps(entry: Entry, options: Mapping[str, Any]) -> Iterator[Findings]:
    """Yields findings; a stage that fails does not end those after it."""
    found: Findings = {}
    yield {"stage": "build"}
    subject = entry.subject()
    run(subject.model, subject.inputs(2, 0), False)  # a failure here is one of the table
    yield {"builds": True}
    try:
        for findings in measure(subject, options):
            found.update(findings)
            yield findings
    except Exception as error:
        yield {"crash": described(error)}
    if found.get("captured") and found.get("free"):
        yield from _growth(entry)


def _growth(entry: Entry) -> Iterator[Findings]:
    """Growth by two units at every width, from targets that other weights give, and the file of what has grown."""
    subject, teacher = entry.subject(), entry.subject(1)
    teacher.model.eval()
    given = drawn(subject.inputs, BATCHES)
    with torch.no_grad():
        data = [(inputs, _floating(teacher, call(teacher.model, inputs))) for inputs in given]

    def loss(output: Any, targets: list[Tensor]) -> Tensor:
        pairs = _alike(_floating(subject, output), targets)
        return torch.stack([(a - b).abs().square().mean() for a, b in pairs]).mean()

    _calibrate(subject.model, given)
    fresh = entry.subject().model  # layers under hooks, whose weights are computed, cannot be copied
    fresh.load_state_dict(subject.model.state_dict())
    if cannot := _own_failure(fresh.eval(), data, loss):
        yield {"not_asked": {"grown": cannot}}
        widths = fxgrow.widths(fxgrow.capture(subject.model, data[0][0]))
        grown = fxgrow.widen(subject.model, data[0][0], {w.name: w.step for w in widths if w.pinned is None})
    else:
        try:
            grown = fxgrow.grow(subject.model, data, loss_fn=loss, neurons=2, progress=False)
        except Exception as error:
            yield {"grown": False, "grown_error": described(error)}
            return
        yield _grown(grown)
    try:
        yield _saved(entry, grown, data[0][0])
    except Exception as error:
        yield {"saved": False, "saved_error": described(error)}


def _floating(subject: Subject, output: Any) -> list[Tensor]:
    return [t for t in tensors_in(subject.outputs(output)) if t.is_floating_point() or t.is_complex()]


def _own_failure(model: nn.Module, data: list[tuple[Inputs, list[Tensor]]], loss: Callable[..., Tensor]) -> str | None:
    """Why the network itself has no finite losses and gradients in eval mode, in which growth measures; None if so."""
    for i, (inputs, targets) in enumerate(data):
        try:
            value = loss(call(model, pytree.tree_map_only(Tensor, Tensor.clone, inputs)), targets)
            if not bool(value.isfinite()):
                return f"its own loss of batch {i} is {float(value)}"
            value.backward()
        except Exception as error:
            return f"its own backward pass in eval mode fails: {error}"[:300]
    return None


@torch.no_grad()
def _calibrate(model: nn.Module, given: list[Inputs]) -> None:
    """Running statistics of the data, as after some training; leaves the model in eval mode."""
    norms = [m for m in model.modules() if isinstance(m, _NormBase) and m.track_running_stats]
    momenta = [m.momentum for m in norms]
    for norm in norms:
        norm.momentum = 0.3
    torch.manual_seed(0)
    for inputs in given * 2 if norms else ():
        call(model.train(), inputs)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.eval()


def _alike(found: list[Tensor], targets: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Each target with the next output of its shape: some networks return more in one of the modes."""
    left = list(found)
    for target in targets:
        for i, tensor in enumerate(left):
            if tensor.shape == target.shape:
                yield left.pop(i), target
                break


def _grown(grown: fx.GraphModule) -> Findings:
    record = grown.meta["fxgrow"]
    before, after = record.losses["eval"]
    error = ""
    if not record.plan.units:
        error = f"added nothing: {record.declined}"
    elif not all(bool(p.isfinite().all()) for p in grown.parameters()) or not math.isfinite(after):
        error = "not finite"
    elif after > before * (1 + WORSE) + 1e-12:
        error = f"held-out loss {before:.4g} became {after:.4g}"
    return {"grown": not error, "grown_error": error, "losses": [before, after]}


def _saved(entry: Entry, grown: fx.GraphModule, given: Inputs) -> Findings:
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/net.safetensors"
        fxgrow.save(grown, path)
        again = fxgrow.load(entry.subject(2).model.eval(), path)
    differs = distance(run(grown, given, False), run(again, given, False))
    return {"saved": differs == 0.0, "saved_error": f"outputs differ by {differs:.2g}"}
