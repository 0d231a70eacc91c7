"""The processes that grow one model together, each with its own part of the data.

requires: every process of the group runs the same code on models with the same weights.
ensures:  sums are those over all processes and the same bits everywhere; what is chosen is chosen by the first process;
          an error in one process is raised by all of them, and none waits for another that has failed.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import logging
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fxgrow import errors as _errors
from fxgrow.errors import FxgrowError

T = TypeVar("T")
log = logging.getLogger("fxgrow")
#: tensors are sent together up to so many bytes
TOGETHER = 16 << 20


class ProcessGroup:
    """This process alone.

    Attributes:
        rank: number of this process in the group.
        size: how many there are.
    """

    rank = 0
    size = 1

    @contextlib.contextmanager
    def session(self) -> Iterator[None]:
        """What is done together: an error inside is raised by every process before the session ends."""
        yield

    def sum_(self, tensors: Iterable[Tensor]) -> None:
        """Puts the sum over all processes in the place of each tensor."""

    def total(self, *numbers: float) -> list[float]:
        """Sums of numbers over all processes."""
        return list(numbers)

    def all_gather_rows(self, rows: Tensor) -> Tensor:
        """The rows of all processes, which may have different numbers of them."""
        return rows

    def first(self, make: Callable[[], T]) -> T:
        """What the first process makes; only that one calls `make`."""
        return make()

    def agree(self, what: str) -> None:
        """Raises an `FxgrowError` where processes are about to do different things."""

    def mean(self, values: Sequence[float]) -> list[float]:
        """Means over the processes, number by number."""
        return [v / self.size for v in self.total(*values)]

    def check_equal(self, tensors: Mapping[str, Tensor], when: str) -> None:
        """Raises an `FxgrowError` where a tensor has different bits in different processes."""

    @contextlib.contextmanager
    def same_buffers(self, model: nn.Module) -> Iterator[None]:
        """For the time being every process has the buffers (running statistics) of the first.

        Raises:
            FxgrowError: parameters differ.
        """
        yield


#: this process alone
SINGLE_PROCESS = ProcessGroup()


def process_group_of(process_group: Any) -> ProcessGroup:
    """The processes of a group; None for this process alone.

    Raises:
        FxgrowError: this is no process group, or this process is no part of it.
    """
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
        raise FxgrowError("This process is no member of process_group=: only members may call.")
    raise FxgrowError(
        f"process_group= is a {type(process_group).__name__}: give a torch.distributed process group, such as "
        "torch.distributed.group.WORLD."
    )


class DistributedGroup(ProcessGroup):
    """Several processes.

    Before anything is exchanged all processes say that they are well and what they are about to exchange. One that
    fails says so in the place of its next exchange: whatever the others are about to do, they hear of it there.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        nccl = dist.get_backend(group) == "nccl"
        self.device = torch.device("cuda", torch.cuda.current_device()) if nccl else None
        self._depth = 0
        self._over = False
        self._alike = False

    # -- errors

    @contextlib.contextmanager
    def session(self) -> Iterator[None]:
        if self._depth:
            yield
            return
        self._depth, self._over = 1, False
        try:
            yield
            self._meet("the end")
        except Exception as error:
            if not self._over:
                self._meet("an error", error)
            raise
        finally:
            self._depth = 0

    def _meet(self, what: str, error: Exception | None = None) -> None:
        """Waits for all; raises the error of one of them, where there is one that is not this process's own."""
        own = torch.tensor([error is not None, zlib.crc32(what.encode())], device=self.device)
        all_ = [torch.empty_like(own) for _ in range(self.size)]
        try:
            dist.all_gather(all_, own, group=self.group)
        except RuntimeError:
            self._over = True  # a process is gone: nobody is left to tell
            raise
        failed = [r for r, t in enumerate(all_) if t[0]]
        if not failed and all(torch.equal(t, own) for t in all_):
            return
        self._over = True
        told: list[Any] = [None] * self.size
        name = None if error is None else type(error).__name__
        dist.all_gather_object(told, (name, str(error), what), group=self.group)
        if error is not None:
            return
        if failed:
            name, message, _ = told[failed[0]]
            raise _error_class(name)(f"Process {failed[0]} of {self.size} failed: {message}")
        where = "; ".join(f"process {r}: {t[2]}" for r, t in enumerate(told))
        raise FxgrowError(
            f"The processes do not do the same ({where}). Each needs the same model, the same settings and data of the "
            "same shapes."
        )

    # -- exchange

    @torch.no_grad()
    def sum_(self, tensors: Iterable[Tensor]) -> None:
        parts: list[Tensor] = []
        for t in sorted(tensors, key=lambda t: str((t.dtype, t.device))):
            if parts and (_kind(t) != _kind(parts[0]) or sum(p.nbytes for p in parts) + t.nbytes > TOGETHER):
                self._sum(parts)
                parts = []
            parts.append(t)
        if parts:
            self._sum(parts)

    def _sum(self, parts: Sequence[Tensor]) -> None:
        self._meet(f"a sum of {', '.join(f'{tuple(t.shape)} {t.dtype}' for t in parts)}")
        flat = torch.cat([t.reshape(-1) for t in parts]).to(self.device or parts[0].device)
        dist.all_reduce(flat, group=self.group)
        for t, own in zip(parts, flat.split([t.numel() for t in parts]), strict=True):
            t.copy_(own.view(t.shape))

    def total(self, *numbers: float) -> list[float]:
        sums = torch.tensor(numbers, dtype=torch.float64)
        self.sum_([sums])
        return [float(v) for v in sums.tolist()]

    @torch.no_grad()
    def all_gather_rows(self, rows: Tensor) -> Tensor:
        self._meet(f"rows of {tuple(rows.shape[1:])} {rows.dtype}")
        place = self.device or rows.device
        counts = [torch.zeros(1, dtype=torch.long, device=place) for _ in range(self.size)]
        dist.all_gather(counts, torch.tensor([len(rows)], device=place), group=self.group)
        sizes = [int(c) for c in counts]
        padded = rows.new_zeros(max(sizes), *rows.shape[1:], device=place)
        padded[: len(rows)] = rows
        found = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(found, padded, group=self.group)
        return torch.cat([t[:n] for t, n in zip(found, sizes, strict=True)]).to(rows.device)

    def first(self, make: Callable[[], T]) -> T:
        made = make() if self.rank == 0 else None
        self._meet("what the first process made")
        return cast(T, self._broadcast(made))

    def _broadcast(self, value: Any) -> Any:
        """The first process's value, its tensors on this process's device, and on every process through one file."""
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
        # between the processes of one run, as torch.distributed itself sends objects
        return torch.load(file, map_location=_here, weights_only=False)

    # -- checks

    def agree(self, what: str) -> None:
        self._meet(what)

    def check_equal(self, tensors: Mapping[str, Tensor], when: str) -> None:
        own = torch.tensor([checksum(t) for t in tensors.values()], dtype=torch.long, device=self.device)
        self._meet(f"a check of {', '.join(tensors)}")
        all_ = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(all_, own, group=self.group)
        for name, *found in zip(tensors, *(t.tolist() for t in all_), strict=True):
            if len(set(found)) > 1:
                other = next(r for r, v in enumerate(found) if v != found[0])
                raise FxgrowError(
                    f"Processes 0 and {other} have different values of {name!r} {when}: give every process the same "
                    "model (DistributedDataParallel sends the first one's to all), and train them alike."
                )

    @contextlib.contextmanager
    def same_buffers(self, model: nn.Module) -> Iterator[None]:
        if self._alike:
            yield
            return
        self.check_equal(dict(model.named_parameters()), "before growth")
        buffers = dict(model.named_buffers())
        kept = {name: t.detach().clone() for name, t in buffers.items()}
        self._meet(f"the buffers {', '.join(kept)}")
        given = self.first(lambda: kept)
        self._alike = True
        try:
            with torch.no_grad():
                for name, t in buffers.items():
                    t.copy_(given[name])
            yield
        finally:
            self._alike = False
            with torch.no_grad():
                for name, t in buffers.items():
                    t.copy_(kept[name])


def _kind(t: Tensor) -> tuple[torch.dtype, torch.device]:
    return t.dtype, t.device


def _here(storage: Any, place: str) -> Any:
    return storage.cuda(torch.cuda.current_device()) if place.startswith("cuda") else storage


def _error_class(name: str) -> type[FxgrowError]:
    """An error of fxgrow keeps its class, any other becomes one of fxgrow."""
    found = getattr(_errors, str(name), None)
    return found if isinstance(found, type) and issubclass(found, FxgrowError) else FxgrowError


@torch.no_grad()
def checksum(t: Tensor) -> int:
    """A number that changes with any bit of a tensor and its place, computed where the tensor is."""
    if t.is_complex():
        t = torch.view_as_real(t)
    bits = t.detach().contiguous().view(-1)
    if bits.dtype != torch.bool:
        bits = bits.view(torch.uint8)
    bits = bits.long() + 1
    odd = torch.arange(len(bits), device=bits.device) * 2 + 1
    # integers overflow by wrapping around; products of odd numbers are a hash of the place
    return int((bits * (odd * odd * 0x9E3779B1 + odd)).sum())
