"""Write a module to ONNX and prove that the file computes the same thing."""

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
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxgrow.errors import ExportError, FxgrowError, MissingExtraError
from fxgrow.graph.evaluate import difference, tensors_in

ExampleInputs: TypeAlias = tuple[Any, ...] | Mapping[str, Any]
_NOISY = ("torch.onnx", "torch.export", "torch.fx", "torch._dynamo", "onnxscript", "onnx_ir", "onnx")
_AXIS = "batch"


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
    """Write ``module`` in evaluation mode to an ONNX file and check the file in onnxruntime.

    The module itself is not touched: a copy that shares its parameters is switched to evaluation mode
    and exported with ``torch.onnx.export(dynamo=True)``. The file appears at ``path`` only once it has
    passed the check; until then, whatever was there stays. Weights above ONNX's limit of 2 GB per file
    go to ``<path>.data`` beside it.

    Args:
        module: Any ``nn.Module``, a captured or grown ``GraphModule`` included.
        path: Where to write; the folder must exist.
        example_inputs: Tuple of positional inputs or dict of keyword inputs, on the module's device.
            Tensors of any shape ``[batch, ...]`` and any dtype that NumPy has (not bfloat16).
        dynamic_batch: Leave dimension 0 free (named ``batch``) in every input tensor whose dimension 0
            has the size of the first one's. Otherwise every size of the example is fixed in the file.
        check: Run the file in onnxruntime (CPU) on the example and, with ``dynamic_batch``, on the
            example repeated to one more sample, and compare with the module.
        tolerance: Largest ``max|file - module| / max|module|`` accepted, per output.
        opset: ONNX operator set; None is the exporter's default.

    Returns:
        The path written.

    Raises:
        MissingExtraError: onnx, onnxscript or (with ``check``) onnxruntime is not installed.
        ExportError: The example holds no batch; the module cannot be exported, or not with a free batch
            size; the file cannot be written, cannot be run, or differs by more than ``tolerance``.

    Example:
        >>> import tempfile, torch, fxgrow
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     fxgrow.export_onnx(net, folder + "/net.onnx", (torch.randn(3, 4),)).name
        'net.onnx'
    """
    _require("onnx", "onnxscript", *(("onnxruntime",) if check else ()))
    path = Path(path)
    if not path.parent.is_dir():
        raise ExportError(f"cannot write {path}: the folder {path.parent} does not exist; create it first")
    inputs = _Inputs(example_inputs, dynamic_batch)
    frozen = _eval_copy(module)
    # With the guards still in place: an input that the captured graph refuses is refused here too.
    cases = [(case, _reference(frozen, case)) for case in inputs.cases(check)]
    program = _to_onnx(_without_guards(frozen), inputs, opset)

    try:
        # A folder beside the target keeps the final rename on one file system, and the final file name
        # inside it is the one that a file of external weights is referred to by.
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
            written = Path(folder) / path.name
            program.save(written, external_data=False)
            for case, expected in cases:
                _compare(written, case, expected, tolerance)
            # Weights first, so that a file at `path` is always complete.
            for file in sorted(Path(folder).iterdir(), key=lambda file: file.name == path.name):
                os.replace(file, path.parent / file.name)
    except OSError as error:
        raise ExportError(f"cannot write {path}: {error}; choose another path") from error
    return path


class _Inputs:
    """Example inputs as ``args`` and ``kwargs``, and which of their tensors carry the batch."""

    def __init__(self, example: ExampleInputs, dynamic_batch: bool) -> None:
        if isinstance(example, Tensor) or not isinstance(example, (tuple, list, Mapping)):
            raise ExportError(
                f"example_inputs is a {type(example).__name__}; pass a tuple of positional inputs, such as "
                "(x,), or a dict of keyword inputs"
            )
        keyword = isinstance(example, Mapping)
        nested = ((), dict(example)) if keyword else (tuple(example), {})
        self.leaves, self._spec = pytree.tree_flatten(nested)
        tensors = [leaf for leaf in self.leaves if isinstance(leaf, Tensor)]
        if not tensors:
            raise ExportError("example_inputs holds no tensor; pass the inputs of one forward call")
        self.dynamic = dynamic_batch
        self.size = tensors[0].shape[0] if tensors[0].dim() else 0
        if dynamic_batch and self.size == 0:
            raise ExportError(
                f"the first input has shape {list(tensors[0].shape)}, so no samples along dimension 0; "
                "pass at least one sample, or dynamic_batch=False"
            )

    def batched(self, leaf: Any) -> bool:
        """Whether dimension 0 of this input is the batch."""
        return self.dynamic and isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == self.size

    def at(self, size: int) -> list[Any]:
        """The example's leaves with the batch repeated or cut to ``size`` samples."""
        return [
            leaf[torch.arange(size, device=leaf.device) % self.size] if self.batched(leaf) else leaf
            for leaf in self.leaves
        ]

    def cases(self, check: bool) -> list[_Case]:
        """The inputs to compare on."""
        sizes = [self.size, self.size + 1] if self.dynamic else [None]
        return [_Case(self, size) for size in sizes] if check else []

    def call(self, leaves: list[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """``args`` and ``kwargs`` with these leaves."""
        args, kwargs = pytree.tree_unflatten(leaves, self._spec)
        return args, kwargs


class _Case:
    """One set of inputs, with the words that name it in an error."""

    def __init__(self, inputs: _Inputs, size: int | None) -> None:
        self.leaves = inputs.leaves if size is None else inputs.at(size)
        self.args, self.kwargs = inputs.call(self.leaves)
        self.where = "on the example" if size is None else f"at batch size {size}"
        self.repeated = size is not None and size != inputs.size


def _eval_copy(module: nn.Module) -> nn.Module:
    """A copy in evaluation mode that shares every parameter and buffer."""
    shared: list[Any] = [*module.parameters(), *module.buffers()]
    # Records of a growth hold measurements; copying them with the graph would cost memory for nothing.
    shared += [part.meta for part in module.modules() if isinstance(part, fx.GraphModule)]
    return copy.deepcopy(module, {id(value): value for value in shared}).eval()


def _without_guards(module: nn.Module) -> nn.Module:
    """Remove the shape guards of captured graphs, which ONNX has no operator for."""
    for part in module.modules():
        if isinstance(part, fx.GraphModule):
            guards = [node for node in part.graph.nodes if _is_guard(node)]
            for guard in reversed(guards):
                looked_at = guard.all_input_nodes
                part.graph.erase_node(guard)
                for node in looked_at:
                    # Left alone, bool(size > 1) would fix the size as surely as the guard did.
                    if node.target in (bool, int, float) and not node.users:
                        part.graph.erase_node(node)
            if guards:
                part.recompile()
    return module


def _is_guard(node: fx.Node) -> bool:
    target = node.target
    named = (getattr(target, "__module__", None), getattr(target, "__name__", None))
    return node.op == "call_function" and named == ("fxgrow.graph.node_functions", "guard")


def _reference(module: nn.Module, case: _Case) -> list[Tensor]:
    """The module's output tensors, flattened, on the CPU."""
    try:
        with torch.no_grad(), _quiet():
            return [t.detach().cpu() for t in tensors_in(module(*case.args, **case.kwargs))]
    except Exception as error:
        if case.repeated:
            advice = "; where only the example's batch size is possible, pass dynamic_batch=False"
        elif isinstance(error, FxgrowError):  # it says itself what to do
            advice = ""
        else:
            advice = "; pass example_inputs that it accepts, on its device"
        raise ExportError(f"the module itself fails {case.where}: {_first_lines(error)}{advice}") from error


def _to_onnx(module: nn.Module, inputs: _Inputs, opset: int | None) -> torch.onnx.ONNXProgram:
    """Export with torch.export, then translate; two steps, so that the first one's reason is not lost."""
    # torch.export takes a dimension of size 1 for a constant, so the trace needs two samples.
    leaves = inputs.at(max(inputs.size, 2)) if inputs.dynamic else inputs.leaves
    args, kwargs = inputs.call(leaves)
    shapes = torch.export.ShapesCollection()
    named = []  # per tensor input, for the axis names in the file
    batch = torch.export.Dim(_AXIS)
    for leaf, original in zip(leaves, inputs.leaves, strict=True):
        if inputs.batched(original):
            shapes[leaf] = {0: batch}
        if isinstance(leaf, Tensor):
            named.append({0: _AXIS} if inputs.batched(original) else {})
    specification = shapes.dynamic_shapes(module, args, kwargs) if inputs.dynamic else None
    try:
        with torch.no_grad(), _quiet():
            exported = torch.export.export(module, args, kwargs, dynamic_shapes=specification, strict=False)
    except Exception as error:
        raise ExportError(_why_not(error, inputs.dynamic)) from error
    try:
        with _quiet():
            program = torch.onnx.export(
                exported,
                (),
                dynamo=True,
                verbose=False,
                opset_version=opset,
                dynamic_shapes=named if inputs.dynamic else None,
            )
    except Exception as error:
        raise ExportError(f"torch.onnx has no translation for this module: {_first_lines(error)}") from error
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
        found = [line.strip(" -") for line in str(error).splitlines() if line.strip().startswith("- ")]
        reason = found[0].split(" If you're using")[0].rstrip(".") if found else _first_lines(error)
        return (
            f"the batch size cannot stay free: {reason}; pass dynamic_batch=False, or an example whose batch "
            "size differs from its other sizes"
        )
    return f"torch.export cannot follow this module: {_first_lines(error)}"


def _compare(path: Path, case: _Case, expected: list[Tensor], tolerance: float) -> None:
    """Run the file on one case and raise unless every output agrees."""
    onnxruntime: Any = importlib.import_module("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only: warnings go straight to the terminal
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        names = [entry.name for entry in session.get_inputs()]
        arrays = [leaf.detach().cpu().numpy() for leaf in case.leaves if isinstance(leaf, Tensor)]
        found = [torch.as_tensor(array) for array in session.run(None, dict(zip(names, arrays, strict=True)))]
    except Exception as error:
        raise ExportError(
            f"onnxruntime cannot run the exported file {case.where}: {_first_lines(error)}; no file was "
            "written (check=False writes it unchecked)"
        ) from error
    if [tensor.shape for tensor in found] != [tensor.shape for tensor in expected]:
        raise ExportError(
            f"{case.where} the ONNX file gives outputs of shapes {[list(t.shape) for t in found]}, the "
            f"module {[list(t.shape) for t in expected]}; no file was written"
        )
    for number, (got, want) in enumerate(zip(found, expected, strict=True)):
        error_found = difference(got, want).relative
        if not error_found <= tolerance:
            raise ExportError(
                f"{case.where} output {number} of the ONNX file differs from the module's by "
                f"{error_found:.2e} of its largest value (tolerance {tolerance:.0e}); no file was written"
            )


def _first_lines(error: BaseException, count: int = 3) -> str:
    """The root cause, without the advice that the exporters wrap around it."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:count])}".rstrip(" .;:")


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
    """Keep the exporter's warnings and log lines to itself; what matters is raised."""
    loggers = [logging.getLogger(name) for name in _NOISY]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        # torch.export prints the graph it could not finish to stderr, past every logger.
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
