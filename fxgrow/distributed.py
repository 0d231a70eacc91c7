"""Communication between the processes that grow one model together, each with its own part of the data.

Every process runs the same code on a model with the same weights. Sums have the same bits everywhere; rank 0 makes the
choices; an error in one process is raised by all of them, and none waits for another that has failed.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import logging
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fxgrow import errors
from fxgrow.errors import FxgrowError

T = TypeVar("T")
log = logging.getLogger("fxgrow")
#: tensors are reduced together in buckets of at most so many bytes
BUCKET_BYTES = 16 << 20


class ProcessGroup:
    """A single process; `DistributedGroup` overrides everything for several."""

    rank = 0
    size = 1

    @contextlib.contextmanager
    def session(self) -> Iterator[None]:
        """An error inside the block is raised by every process before the block ends, always as an `FxgrowError`."""
        yield

    def sum_(self, tensors: Iterable[Tensor]) -> None:
        """Replaces each tensor in place by its sum over all processes."""

    def sum_numbers(self, *numbers: float) -> list[float]:
        """Returns the sum of each number over all processes."""
        return list(numbers)

    def all_gather_rows(self, rows: Tensor) -> Tensor:
        """Concatenates the rows of all processes; their numbers may differ."""
        return rows

    def broadcast_from_rank0(self, make: Callable[[], T]) -> T:
        """Returns on every process what `make` returns on rank 0, the only one that calls it."""
        return make()

    def assert_same(self, what: str) -> None:
        """Raises an `FxgrowError` where processes are about to do different things."""

    def check_same(self, settings: Mapping[str, str]) -> None:
        """Raises an `FxgrowError` that names the first setting whose description differs between processes."""

    def mean(self, values: Sequence[float]) -> list[float]:
        """Returns the mean of each number over the processes."""
        return [v / self.size for v in self.sum_numbers(*values)]

    def check_equal(self, tensors: Mapping[str, Tensor], when: str) -> None:
        """Raises an `FxgrowError` where a tensor differs in any bit between processes."""

    @contextlib.contextmanager
    def sync_buffers(self, model: nn.Module) -> Iterator[None]:
        """Gives every process the buffers (running statistics) of rank 0 inside the block; checks the parameters."""
        yield


#: the group of one process
SINGLE_PROCESS = ProcessGroup()


def process_group_of(process_group: Any) -> ProcessGroup:
    """Wraps a process group of torch.distributed; None stands for a single process."""
    if process_group is None:
        return SINGLE_PROCESS
    if isinstance(process_group, ProcessGroup):
        return process_group
    if not (dist.is_available() and dist.is_initialized()):
        raise FxgrowError(
            "process_group= is given, but torch.distributed is not initialised: call "
            "torch.distributed.init_process_group() first, under torchrun."
        )
    if process_group is dist.group.WORLD or isinstance(process_group, dist.ProcessGroup):
        group: Any = process_group
        return DistributedGroup(group) if dist.get_world_size(group) > 1 else SINGLE_PROCESS
    if process_group == dist.GroupMember.NON_GROUP_MEMBER:
        raise FxgrowError("This process is not a member of process_group=: only members may call.")
    raise FxgrowError(
        f"process_group= is a {type(process_group).__name__}: give a torch.distributed process group, such as "
        "torch.distributed.group.WORLD."
    )


class DistributedGroup(ProcessGroup):
    """Several processes of torch.distributed.

    Before each collective all processes exchange a status: no error so far, and which collective comes next. A process
    that fails sends its error in place of its next status, so the others learn of it whatever they are about to do.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        nccl = dist.get_backend(group) == "nccl"
        self.device = torch.device("cuda", torch.cuda.current_device()) if nccl else None
        self._in_session = self._over = self._buffers_synced = False

    @contextlib.contextmanager
    def session(self) -> Iterator[None]:
        if self._in_session:
            yield
            return
        self._in_session, self._over = True, False
        try:
            yield
            self._sync_status("the end")
        except Exception as error:
            if self._over:
                raise
            self._sync_status("an error", error)
            if isinstance(error, FxgrowError):
                raise
            raise FxgrowError(f"Process {self.rank} of {self.size} failed: {_message(error)}") from error
        finally:
            self._in_session = False

    def _sync_status(self, what: str, error: Exception | None = None) -> None:
        """Exchanges statuses with all processes and raises the error of another one, if there is one."""
        status = torch.tensor([error is not None, zlib.crc32(what.encode())], device=self.device)
        try:
            statuses = self._all_gather(status)
        except RuntimeError:
            self._over = True  # a process is gone: there is nobody to send an error to
            raise
        failed = [rank for rank, other in enumerate(statuses) if other[0]]
        if not failed and all(torch.equal(other, status) for other in statuses):
            return
        self._over = True
        reports: list[Any] = [None] * self.size
        # a class of the user's, or of Python, arrives as an FxgrowError
        name = next((c.__name__ for c in type(error).__mro__ if hasattr(errors, c.__name__)), None)
        dist.all_gather_object(reports, (name, error and _message(error), what), group=self.group)
        if error is not None:
            return
        if failed:
            name, message, _ = reports[failed[0]]
            raise getattr(errors, str(name), FxgrowError)(f"Process {failed[0]} of {self.size} failed: {message}")
        where = "; ".join(f"process {rank}: {report[2]}" for rank, report in enumerate(reports))
        raise FxgrowError(
            f"The processes do different things ({where}). Each needs the same model, the same settings and data of "
            "the same shapes."
        )

    def _all_gather(self, tensor: Tensor) -> list[Tensor]:
        """Returns the tensors of all processes, by rank."""
        gathered = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(gathered, tensor, group=self.group)
        return gathered

    @torch.no_grad()
    def sum_(self, tensors: Iterable[Tensor]) -> None:
        parts: list[Tensor] = []
        for t in sorted(tensors, key=lambda t: str((t.dtype, t.device))):
            other = parts and (t.dtype, t.device) != (parts[0].dtype, parts[0].device)
            if other or sum(p.nbytes for p in parts) + t.nbytes > BUCKET_BYTES:
                self._sum(parts)
                parts = []
            parts.append(t)
        self._sum(parts)

    def _sum(self, parts: Sequence[Tensor]) -> None:
        if not parts:
            return
        self._sync_status(f"a sum of {', '.join(f'{tuple(t.shape)} {t.dtype}' for t in parts)}")
        flat = torch.cat([t.reshape(-1) for t in parts]).to(self.device or parts[0].device)
        dist.all_reduce(flat, group=self.group)
        for t, summed in zip(parts, flat.split([t.numel() for t in parts]), strict=True):
            t.copy_(summed.view(t.shape))

    def sum_numbers(self, *numbers: float) -> list[float]:
        sums = torch.tensor(numbers, dtype=torch.float64)
        self.sum_([sums])
        return cast(list[float], sums.tolist())

    @torch.no_grad()
    def all_gather_rows(self, rows: Tensor) -> Tensor:
        self._sync_status(f"rows of {tuple(rows.shape[1:])} {rows.dtype}")
        device = self.device or rows.device
        counts = [int(count) for count in self._all_gather(torch.tensor([len(rows)], device=device))]
        padded = rows.new_zeros(max(counts), *rows.shape[1:], device=device)
        padded[: len(rows)] = rows
        gathered = self._all_gather(padded)
        return torch.cat([t[:n] for t, n in zip(gathered, counts, strict=True)]).to(rows.device)

    def broadcast_from_rank0(self, make: Callable[[], T]) -> T:
        value = make() if self.rank == 0 else None
        self._sync_status("a broadcast from rank 0")
        return cast(T, self._broadcast(value))

    def _broadcast(self, value: Any) -> Any:
        """Sends the value of rank 0, tensors on each process's device; rank 0 reads it back like the others."""
        source = dist.get_global_rank(self.group, 0)
        data = torch.zeros(0, dtype=torch.uint8)
        if self.rank == 0:
            file = io.BytesIO()
            torch.save(value, file)
            data = torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)
        size = torch.tensor([len(data)], device=self.device)
        dist.broadcast(size, source, group=self.group)
        data = (data if self.rank == 0 else data.new_empty(int(size))).to(size.device)
        dist.broadcast(data, source, group=self.group)
        data = data.cpu()
        file = io.BytesIO(ctypes.string_at(data.data_ptr(), len(data)))
        # pickle between the processes of one run, as in torch.distributed.broadcast_object_list
        return torch.load(file, map_location=_to_this_device, weights_only=False)  # nosec B614

    def assert_same(self, what: str) -> None:
        self._sync_status(what)

    def check_same(self, settings: Mapping[str, str]) -> None:
        self._sync_status("a check of the settings")
        own = torch.tensor([zlib.crc32(repr(sorted(settings.items())).encode())], device=self.device)
        if all(torch.equal(other, own) for other in self._all_gather(own)):
            return
        reports: list[Any] = [None] * self.size
        dist.all_gather_object(reports, dict(settings), group=self.group)
        for name in sorted({name for report in reports for name in report}):
            values = [report.get(name, "nothing") for report in reports]
            other = next((rank for rank, value in enumerate(values) if value != values[0]), None)
            if other is not None:
                here, there = _where_they_differ(values[0], values[other])
                raise FxgrowError(
                    f"Processes 0 and {other} of {self.size} have different settings: {name} is {here} and {there}. "
                    "Every process needs the same model and the same settings."
                )

    def check_equal(self, tensors: Mapping[str, Tensor], when: str) -> None:
        checksums = torch.tensor([checksum(t) for t in tensors.values()], dtype=torch.long, device=self.device)
        self._sync_status(f"a check of {', '.join(tensors)}")
        gathered = self._all_gather(checksums)
        for name, *values in zip(tensors, *(t.tolist() for t in gathered), strict=True):
            if len(set(values)) > 1:
                other = next(rank for rank, value in enumerate(values) if value != values[0])
                raise FxgrowError(
                    f"Processes 0 and {other} have different values of {name!r} {when}: give every process the same "
                    "model (DistributedDataParallel sends rank 0's to all), and train them alike."
                )

    @contextlib.contextmanager
    def sync_buffers(self, model: nn.Module) -> Iterator[None]:
        if self._buffers_synced:
            yield
            return
        self.check_equal(dict(model.named_parameters()), "before growth")
        buffers = dict(model.named_buffers())
        before = {name: t.detach().clone() for name, t in buffers.items()}
        self._sync_status(f"the buffers {', '.join(before)}")
        synced = self.broadcast_from_rank0(lambda: before)
        self._buffers_synced = True
        try:
            with torch.no_grad():
                for name, t in buffers.items():
                    t.copy_(synced[name])
            yield
        finally:
            self._buffers_synced = False
            with torch.no_grad():
                for name, t in buffers.items():
                    t.copy_(before[name])


def _message(error: Exception) -> str:
    return str(error) if isinstance(error, FxgrowError) else f"{type(error).__name__}: {error}"


def _where_they_differ(first: str, second: str) -> tuple[str, str]:
    """Returns the first lines of two texts that differ, shortened."""
    pairs = zip_longest(first.splitlines(), second.splitlines(), fillvalue="nothing")
    here, there = next(pair for pair in pairs if pair[0] != pair[1])
    start = max(0, len(os.path.commonprefix([here, there])) - 40)
    return here[start:][:120].strip(), there[start:][:120].strip()


def _to_this_device(storage: Any, location: str) -> Any:
    return storage.cuda(torch.cuda.current_device()) if location.startswith("cuda") else storage


@torch.no_grad()
def checksum(t: Tensor) -> int:
    """Hashes the bits of a tensor and their positions, on the tensor's device."""
    if t.is_complex():
        t = torch.view_as_real(t)
    bits = t.detach().contiguous().view(-1)
    if bits.dtype != torch.bool:
        bits = bits.view(torch.uint8)
    bits = bits.long() + 1
    odd = torch.arange(len(bits), device=bits.device) * 2 + 1
    # integers overflow by wrapping around; products of odd numbers hash the position
    return int((bits * (odd * odd * 0x9E3779B1 + odd)).sum())
