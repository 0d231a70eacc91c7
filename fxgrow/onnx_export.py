"""Writes a module to ONNX and checks that the file computes the same as the module."""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxgrow.data.argument_checks import NEW_FILE, checked_arguments
from fxgrow.data.batches import as_tensors, dtype_of
from fxgrow.errors import ExportError, FxgrowError, MissingExtraError, first_lines
from fxgrow.graph.evaluate import difference, tensors_in
from fxgrow.graph.node_functions import guard

ExampleInputs: TypeAlias = tuple[Any, ...] | Mapping[str, Any]
#: loggers that are silenced while a module is exported
_LOGGERS = ("torch.onnx", "torch.export", "torch.fx", "torch._dynamo", "onnxscript", "onnx_ir", "onnx")
_AXIS = "batch"
_NOT_FREE = "the batch size cannot stay free"


@checked_arguments(ExportError, path=NEW_FILE)
def export_onnx(
    module: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: ExampleInputs,
    *,
    dynamic_batch: bool = True,
    check: bool = True,
    tolerance: float = 1e-4,
    opset: int | None = None,
) -> Path:
    """Writes a module in eval mode to an ONNX file and checks the file in onnxruntime.

    The module itself is left as it is: a copy that shares its parameters is switched to eval mode and exported with
    `torch.onnx.export(dynamo=True)`. The file appears at `path` only after it has passed the check; until then an
    existing file stays. Weights above ONNX's limit of 2 GB per file go to `<path>.data` beside it.

    Args:
        module: any `nn.Module`, also a captured or grown `GraphModule`.
        path: of the file; the folder must exist.
        example_inputs: tuple of positional inputs or dict of keyword inputs, on the module's device. Tensors of any
            shape `[batch, ...]` and any dtype that NumPy has (not bfloat16).
        dynamic_batch: leaves dimension 0 free (named `batch`) in every input tensor whose dimension 0 has the size of
            the first one's; dimension 1 where dimension 0 is that of the steps of a recurrent layer, whose number
            the exporter fixes. Otherwise all sizes of the example are fixed in the file.
        check: runs the file in onnxruntime (CPU) on the example and, with `dynamic_batch`, on the example with one
            more sample, and compares with the module.
        tolerance: largest `max|file - module| / max|module|` that is accepted, per output.
        opset: ONNX operator set; None is the exporter's default.

    Returns:
        The path of the file.

    Raises:
        MissingExtraError: onnx, onnxscript or (with `check`) onnxruntime is not installed.
        ExportError: the example holds no batch; the module cannot be exported, or not with a free batch size; the file
            cannot be written, cannot be run, or differs by more than `tolerance`.

    Example:
        >>> import tempfile, torch, fxgrow
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     fxgrow.export_onnx(net, folder + "/net.onnx", (torch.randn(3, 4),)).name
        'net.onnx'
    """
    _require("onnx", "onnxscript", *(("onnxruntime",) if check else ()))
    path = Path(path)
    inputs = _Inputs.of(as_tensors(example_inputs, dtype_of(module)), dynamic_batch)
    frozen = _eval_copy(module)
    cases = _cases(frozen, inputs) if check else []
    program, exported = _with_free_batch(frozen, inputs, opset)
    if check and exported is not inputs:
        cases = _cases(frozen, exported)
    try:
        # A folder beside the target keeps the final rename on one file system. The file has its final name in it,
        # which is how it refers to a file of external weights.
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
            written = Path(folder) / path.name
            program.save(written, external_data=False)
            for case, expected in cases:
                _check_file(written, case, expected, tolerance)
            # weights first, so that a file at `path` is always complete
            for file in sorted(Path(folder).iterdir(), key=lambda file: file.name == path.name):
                os.replace(file, path.parent / file.name)
    except OSError as error:
        raise ExportError(f"cannot write {path}: {error}; choose another path") from error
    return path


@dataclass(frozen=True)
class _Inputs:
    """Inputs of one call, as a flattened pytree."""

    leaves: list[Any]
    spec: pytree.TreeSpec
    #: size of the tensors that hold the batch, along `dim`; None where it is fixed
    batch: int | None
    dim: int = 0
    #: whether the batch is that of the user's example
    is_example: bool = True

    @classmethod
    def of(cls, example: ExampleInputs, dynamic_batch: bool) -> _Inputs:
        if isinstance(example, Tensor) or not isinstance(example, (tuple, list, Mapping)):
            raise ExportError(
                f"example_inputs is a {type(example).__name__}; pass a tuple of positional inputs, such as "
                "(x,), or a dict of keyword inputs"
            )
        call = ((), dict(example)) if isinstance(example, Mapping) else (tuple(example), {})
        leaves, spec = pytree.tree_flatten(call)
        first = next((leaf for leaf in leaves if isinstance(leaf, Tensor)), None)
        if first is None:
            raise ExportError("example_inputs holds no tensor; pass the inputs of one forward call")
        size = first.shape[0] if first.dim() else 0
        if dynamic_batch and size == 0:
            raise ExportError(
                f"the first input has shape {list(first.shape)}, so no samples along dimension 0; "
                "pass at least one sample, or dynamic_batch=False"
            )
        return cls(leaves, spec, size if dynamic_batch else None)

    def holds_batch(self, leaf: Any) -> bool:
        """Returns whether the dimension of an input is the batch."""
        known = self.batch is not None and isinstance(leaf, Tensor) and leaf.dim() > self.dim
        return known and leaf.shape[self.dim] == self.batch

    def at(self, size: int) -> _Inputs:
        """Returns the inputs with samples repeated to another batch size."""

        def repeated(x: Tensor) -> Tensor:
            return x.index_select(self.dim, torch.arange(size, device=x.device) % x.shape[self.dim])

        leaves = [repeated(leaf) if self.holds_batch(leaf) else leaf for leaf in self.leaves]
        return replace(self, leaves=leaves, batch=size, is_example=False)

    def call(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Returns the inputs as positional and keyword arguments."""
        args, kwargs = pytree.tree_unflatten(self.leaves, self.spec)
        return args, kwargs

    def __str__(self) -> str:
        return "on the example" if self.batch is None else f"at batch size {self.batch}"


def _eval_copy(module: nn.Module) -> nn.Module:
    """Returns a copy in eval mode that shares every parameter and buffer."""
    shared: list[Any] = [*module.parameters(), *module.buffers()]
    # records of a growth hold measurements: copying them with the graph would cost memory for nothing
    shared += [part.meta for part in module.modules() if isinstance(part, fx.GraphModule)]
    return copy.deepcopy(module, {id(value): value for value in shared}).eval()


def _without_guards(module: nn.Module) -> nn.Module:
    """Removes the guards of captured graphs, for which ONNX has no operator."""
    for part in module.modules():
        if isinstance(part, fx.GraphModule):
            guards = part.graph.find_nodes(op="call_function", target=guard)
            for node in reversed(guards):
                conditions = node.all_input_nodes
                part.graph.erase_node(node)
                for condition in conditions:
                    # bool(size > 1) without a guard would still fix the size
                    if condition.target in (bool, int, float) and not condition.users:
                        part.graph.erase_node(condition)
            if guards:
                part.recompile()
    return module


def _cases(module: nn.Module, inputs: _Inputs) -> list[tuple[_Inputs, list[Tensor]]]:
    """Returns the inputs to compare on, and the module's outputs: a captured graph refuses what it always refuses."""
    compared = [inputs] if inputs.batch is None else [inputs, inputs.at(inputs.batch + 1)]
    return [(case, _expected(module, case)) for case in compared]


def _expected(module: nn.Module, inputs: _Inputs) -> list[Tensor]:
    """Returns the module's output tensors on the CPU."""
    args, kwargs = inputs.call()
    try:
        with torch.no_grad(), _quiet():
            return [t.detach().cpu() for t in tensors_in(module(*args, **kwargs))]
    except Exception as error:
        if not inputs.is_example:
            advice = "; where only the example's batch size is possible, pass dynamic_batch=False"
        elif isinstance(error, FxgrowError):  # it has an advice of its own
            advice = ""
        else:
            advice = "; pass example_inputs that it accepts, on its device"
        raise ExportError(f"the module itself fails {inputs}: {first_lines(error, named=True)}{advice}") from error


def _with_free_batch(module: nn.Module, inputs: _Inputs, opset: int | None) -> tuple[torch.onnx.ONNXProgram, _Inputs]:
    """Exports with dimension 0 free, or else dimension 1; returns the inputs with the one that is."""
    bare = _without_guards(_eval_copy(module))
    try:
        return _to_onnx(bare, inputs, opset), inputs
    except ExportError as error:
        steps_first = any(isinstance(m, nn.RNNBase) and not m.batch_first for m in module.modules())
        first = next(leaf for leaf in inputs.leaves if isinstance(leaf, Tensor))
        if not steps_first or not str(error).startswith(_NOT_FREE) or first.dim() < 2:
            raise
    inputs = replace(inputs, batch=first.shape[1], dim=1)
    return _to_onnx(bare, inputs, opset), inputs


def _to_onnx(module: nn.Module, inputs: _Inputs, opset: int | None) -> torch.onnx.ONNXProgram:
    """Exports with torch.export, then translates; two steps, so that the reason of a failure of the first is kept."""
    # torch.export takes a dimension of size 1 for a constant, so the trace needs two samples
    traced = inputs if inputs.batch is None else inputs.at(max(inputs.batch, 2))
    args, kwargs = traced.call()
    shapes = torch.export.ShapesCollection()
    batch = torch.export.Dim(_AXIS)
    for leaf, original in zip(traced.leaves, inputs.leaves, strict=True):
        if inputs.holds_batch(original):
            shapes[leaf] = {inputs.dim: batch}
    dynamic_shapes = axis_names = None
    if inputs.batch is not None:
        dynamic_shapes = shapes.dynamic_shapes(module, args, kwargs)
        axis_names = [
            {inputs.dim: _AXIS} if inputs.holds_batch(t) else {} for t in inputs.leaves if isinstance(t, Tensor)
        ]
    try:
        with torch.no_grad(), _quiet():
            exported = torch.export.export(module, args, kwargs, dynamic_shapes=dynamic_shapes, strict=False)
    except Exception as error:
        raise ExportError(_why_not(error, inputs.batch is not None)) from error
    try:
        with _quiet():
            program = torch.onnx.export(
                exported, (), dynamo=True, verbose=False, opset_version=opset, dynamic_shapes=axis_names
            )
    except Exception as error:
        raise ExportError(f"torch.onnx has no translation for this module: {first_lines(error, named=True)}") from error
    if program is None:
        raise ExportError("torch.onnx.export returned no program; update torch and onnxscript")
    written = program.model.opset_imports.get("")
    if opset is not None and written != opset:
        raise ExportError(
            f"asked for ONNX operator set {opset}, but this module could only be written in {written}; leave opset=None"
        )
    return program


def _why_not(error: Exception, dynamic: bool) -> str:
    if dynamic and ("specialized" in str(error) or "Constraints violated" in str(error)):
        reasons = [line.strip(" -") for line in str(error).splitlines() if line.strip().startswith("- ")]
        reason = reasons[0].split(" If you're using")[0].rstrip(".") if reasons else first_lines(error, named=True)
        return (
            f"{_NOT_FREE}: {reason}; pass dynamic_batch=False, or an example whose batch "
            "size differs from its other sizes"
        )
    return f"torch.export cannot follow this module: {first_lines(error, named=True)}"


def _check_file(path: Path, inputs: _Inputs, expected: list[Tensor], tolerance: float) -> None:
    """Runs the file on inputs and raises unless every output agrees."""
    outputs = _run(path, inputs)
    if [t.shape for t in outputs] != [t.shape for t in expected]:
        raise ExportError(
            f"{inputs} the ONNX file gives outputs of shapes {[list(t.shape) for t in outputs]}, the "
            f"module {[list(t.shape) for t in expected]}; no file was written"
        )
    for number, (output, wanted) in enumerate(zip(outputs, expected, strict=True)):
        error = difference(output, wanted).relative
        if error > tolerance:
            raise ExportError(
                f"{inputs} output {number} of the ONNX file differs from the module's by {error:.2e} of its largest "
                f"value (tolerance {tolerance:.0e}); no file was written"
            )


def _run(path: Path, inputs: _Inputs) -> list[Tensor]:
    onnxruntime: Any = importlib.import_module("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only: warnings go straight to the terminal
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        names = [entry.name for entry in session.get_inputs()]
        arrays = [leaf.detach().cpu().numpy() for leaf in inputs.leaves if isinstance(leaf, Tensor)]
        return [torch.as_tensor(array) for array in session.run(None, dict(zip(names, arrays, strict=True)))]
    except Exception as error:
        raise ExportError(
            f"onnxruntime cannot run the exported file {inputs}: {first_lines(error, named=True)}; no file was "
            "written (check=False writes it unchecked)"
        ) from error


def _require(*packages: str) -> None:
    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise MissingExtraError(
                f"exporting to ONNX needs the package {package}, which cannot be imported ({error}); "
                "run: pip install fxgrow[onnx]"
            ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences warnings and log lines of the exporter; what matters is raised."""
    levels = {logger: logger.level for logger in map(logging.getLogger, _LOGGERS)}
    for logger in levels:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        # torch.export prints the graph it could not finish to stderr, past every logger.
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)
