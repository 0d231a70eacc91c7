"""Runs the nodes of a graph on fake tensors, without touching the model they belong to.

Parameters become fake outside of the mode: inside of it their creation would be dispatched too, which took half of a
capture. Hand-written shape rules would save 12 ms for resnet18 and 128 ms for densenet121: not worth 350 lines.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.utils.rnn import PackedSequence, PackedSequence_, pack_padded_sequence, pad_packed_sequence
from torch.utils import _pytree as pytree

from fxgrow.data.random_state import random_state_kept
from fxgrow.graph.graph import submodule
from fxgrow.graph.node_functions import draw, guard
from fxgrow.tracing.result_cache import cached_result, is_ordinary, keep_result, result_key
from fxgrow.tracing.source_location import looks_at_data
from fxgrow.tracing.surroundings import Question

#: of zeros they find nothing, and an empty result says that its size depends on data
_FIND_ENTRIES = {"nonzero", "argwhere", "where", "masked_select"}
#: their argument for a number may be a tensor, which says nothing about the shape of the result
_FILL = {"full", "full_like", "new_full"}


def argument_values(node: fx.Node) -> Any:
    """Returns the values of a node's arguments."""
    return fx.node.map_arg((node.args, node.kwargs), lambda source: source.meta["val"])


class FakeRunner:
    """Evaluates single nodes."""

    def __init__(self) -> None:
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        #: true during an evaluation, which a tracer must not record
        self.silent = False
        #: what the model's code has looked at besides its inputs and state
        self.asked: set[Question] = set()
        #: whether the sizes of the last node depend on data, and are those for random data
        self.guessed = False

    @contextlib.contextmanager
    def quiet(self, module: nn.Module | None = None) -> Iterator[None]:
        """Runs torch code on fake values, with the state of `module` fake too; records nothing, keeps no gradients."""
        before, self.silent = self.silent, True
        try:
            # DisableTorchFunction first: `no_grad` would call the active torch function modes
            with torch._C.DisableTorchFunction(), self._fake_state(module), self.mode, torch.no_grad():
                yield
        finally:
            self.silent = before

    def call(self, node: fx.Node, root: nn.Module) -> Any:
        """Returns the value of a ``call_*`` node, from the values of its arguments."""
        args, kwargs = argument_values(node)
        self.guessed = False
        module = submodule(root, str(node.target)) if node.op == "call_module" else None
        with torch._C.DisableTorchFunction():
            key = result_key(node, module, args, kwargs)
            with contextlib.suppress(KeyError):
                return cached_result(key, self.mode)
            value = self._evaluate(node, module, args, kwargs)
            if key is not None and not self.guessed:
                keep_result(key, value)
        return value

    def _evaluate(self, node: fx.Node, module: nn.Module | None, args: Any, kwargs: Any) -> Any:
        target: Any = node.target
        if target is draw:
            with random_state_kept():
                return self.guess(draw, args, kwargs)
        try:
            with self.quiet(module):
                if isinstance(module, nn.RNNBase) and isinstance(args[0], PackedSequence_):
                    return _packed_outputs(module, args[0])
                if module is not None:
                    # not __call__: the user's hooks must not see fake tensors
                    return module.forward(*args, **kwargs)
                if node.op == "call_method":
                    return getattr(args[0], str(node.target))(*args[1:], **kwargs)
                self.guessed = target in _OF_LENGTHS
                return _KERNELS.get(target, target)(*args, **kwargs)
        except Exception as error:
            home = str(getattr(node.target, "__module__", None) or "torch")
            name = getattr(node.target, "__name__", node.target)
            finds = node.op != "call_module" and name in _FIND_ENTRIES | _FILL and looks_at_data(error)
            of_data = node.op != "call_module" and home.startswith("torch") and name in _OF_DATA
            foreign = node.op == "call_function" and not home.startswith("torch")
            if not (of_data or finds) and not (foreign and looks_at_data(error)):
                raise
        # indexing with a mask, or a function marked with torch.fx.wrap, may look at data
        function = target if node.op == "call_function" else getattr(torch.Tensor, str(node.target))
        return self.guess(function, args, kwargs, _zeros_like if finds else _random_like)

    def guess(
        self,
        function: Callable[..., Any],
        args: Any,
        kwargs: Any,
        like: Callable[[FakeTensor], torch.Tensor] | None = None,
    ) -> Any:
        """Returns the fake result of code that looks at data: its shape on random real tensors."""
        before, self.silent, self.guessed = self.silent, True, True
        try:
            with torch.no_grad(), torch._C.DisableTorchFunction(), torch.random.fork_rng(devices=[]):
                real_args, real_kwargs = real_values((args, kwargs), like)
                return pytree.tree_map_only(torch.Tensor, self.fake, function(*real_args, **real_kwargs))
        finally:
            self.silent = before

    def fake(self, value: Any) -> Any:
        """Returns the same value with fake tensors, in nested tuples, lists and dicts too."""
        kind = type(value)
        if isinstance(value, torch.Tensor):
            known = isinstance(value, FakeTensor) and value.fake_mode is self.mode
            return value if known else fake_tensor(value, self.mode)
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            # a packed sequence as a tuple: it can hold nothing else than tensors
            return (PackedSequence_ if kind is PackedSequence else kind)(*(self.fake(item) for item in value))
        if isinstance(value, (list, tuple)) and not isinstance(value, torch.Size):
            return kind([self.fake(item) for item in value])
        if isinstance(value, dict):
            return {name: self.fake(item) for name, item in value.items()}
        return value

    @contextlib.contextmanager
    def _fake_state(self, module: nn.Module | None) -> Iterator[None]:
        """Lends a module fake parameters and buffers: batch norm counts its calls even in a fake mode."""
        saved = []
        for part in () if module is None else module.modules():
            attributes = vars(part)
            for kind in ("_parameters", "_buffers"):
                tensors = attributes[kind]
                saved.append((attributes, kind, tensors))
                attributes[kind] = {k: t if t is None else fake_tensor(t, self.mode) for k, t in tensors.items()}
        try:
            yield
        finally:
            for attributes, kind, tensors in saved:
                attributes[kind] = tensors


def fake_tensor(tensor: torch.Tensor, mode: FakeTensorMode) -> torch.Tensor:
    """Returns what `mode.from_tensor` gives for a strided tensor, without its history and in a third of the time."""
    if not is_ordinary(tensor):
        return mode.from_tensor(tensor)
    meta = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    fake = FakeTensor(mode, meta, tensor.device)
    fake.requires_grad_(tensor.requires_grad)
    if isinstance(tensor, nn.Parameter):
        fake._is_param = True
    return fake


def _grouped_mm(mat_a: torch.Tensor, mat_b: torch.Tensor, **options: Any) -> torch.Tensor:
    """Multiplies each row by the matrix of its group; the registered kernel knows bfloat16 only."""
    if mat_a.dim() != 2 or mat_b.dim() != 3 or mat_a.shape[1] != mat_b.shape[1]:
        return torch._grouped_mm(mat_a, mat_b, **options)
    return mat_a.new_empty(mat_a.shape[0], mat_b.shape[2])


def _guard(value: Any, expected: Any, message: str) -> None:
    """Checks numbers; a fake tensor has no values."""
    if not isinstance(value, torch.Tensor):
        guard(value, expected, message)


def _packed(
    input: torch.Tensor, lengths: Any, batch_first: bool = False, enforce_sorted: bool = True
) -> PackedSequence_:
    """Packs sequences that have the full length, as theirs are data."""
    n, steps = input.shape[:2] if batch_first else input.shape[1::-1]
    order = None if enforce_sorted else torch.empty(n, dtype=torch.int64, device=input.device)
    return PackedSequence_(
        input.new_empty(n * steps, *input.shape[2:]), torch.empty(steps, dtype=torch.int64, device="cpu"), order, order
    )


def _padded(
    sequence: PackedSequence_, batch_first: bool = False, padding_value: float = 0.0, total_length: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    n, steps = len(sequence.data) // len(sequence.batch_sizes), total_length or len(sequence.batch_sizes)
    out = sequence.data.new_empty(*((n, steps) if batch_first else (steps, n)), *sequence.data.shape[1:])
    return out, sequence.batch_sizes.new_empty(n)


def _packed_outputs(m: nn.RNNBase, x: PackedSequence_) -> Any:
    """What a recurrent layer returns for a packed sequence; its own code looks at the batch sizes."""
    n, directions = len(x.data) // len(x.batch_sizes), 1 + m.bidirectional
    h, c = (x.data.new_empty(m.num_layers * directions, n, k) for k in (m.proj_size or m.hidden_size, m.hidden_size))
    packed = x._replace(data=x.data.new_empty(len(x.data), directions * h.shape[-1]))
    return packed, (h, c) if isinstance(m, nn.LSTM) else h


#: what makes numbers from the values of a tensor
_OF_DATA = {"item", "tolist", "numpy", "equal", "allclose", "is_nonzero"}
#: sizes of their results depend on the lengths of sequences
_OF_LENGTHS = {pack_padded_sequence, pad_packed_sequence}
_KERNELS: dict[Any, Any] = {
    guard: _guard,
    pack_padded_sequence: _packed,
    pad_packed_sequence: _padded,
    PackedSequence: PackedSequence_,
    getattr(F, "grouped_mm", None): _grouped_mm,
    getattr(torch, "_grouped_mm", None): _grouped_mm,
}


def _zeros_like(fake: FakeTensor) -> torch.Tensor:
    return torch.zeros(fake.shape, dtype=fake.dtype, device=fake.device)


def _random_like(fake: FakeTensor) -> torch.Tensor:
    real = _zeros_like(fake)
    return real.uniform_() if fake.dtype.is_floating_point else real


def real_values(values: Any, like: Callable[[FakeTensor], torch.Tensor] | None = None) -> Any:
    """Returns nested values with real tensors, random where nothing else is said, in place of fake ones."""
    return pytree.tree_map_only(FakeTensor, like or _random_like, values)


_SIZES = {"shape", "size", "numel", "nelement", "device"}


def arithmetic_key(kind: str, target: Any, args: Any, kwargs: Any) -> tuple[Any, ...] | None:
    """Returns a key that equal numbers share, or None: half of a raw trace is the same sizes computed again."""
    values = [arg.meta["val"] for arg in args if isinstance(arg, fx.Node)]
    name = args[1] if target is getattr else target
    if (target is getattr or kind == "call_method") and name in _SIZES and isinstance(values[0], torch.Tensor):
        # with the shape, as an in-place method may have changed it
        return target, repr(args), repr(kwargs), tuple(values[0].shape)
    if kind == "call_function" and getattr(target, "__module__", "") == "_operator" and values:
        if all(isinstance(value, (bool, int, float, torch.Size)) for value in values):
            return target, repr(args), repr(kwargs)
    return None
