"""Copies within host memory: with few calls beside the training, or with many threads while the training waits."""

from __future__ import annotations

import ctypes
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter

import torch

from ..errors import StageError
from .addresses import FewBytes
from .chosen import Chosen

SMALL_BYTES = 4096  # up to this size, copying now costs no more than preparing a later copy
FEW_BYTES = 64  # up to this size, copying single words costs no more than a call of memcpy
GROUP_BYTES = 32 << 20  # per call of _foreach_copy_, which releases the GIL; few calls mean few waits for the GIL
PIECE_BYTES = 16 << 20  # per call of memcpy, so that the threads end at about the same time
MAX_THREADS = 8  # a few threads saturate the memory bus
SERIAL = 32768  # up to this many elements torch copies in one thread (at::internal::GRAIN_SIZE)
DEADLINE = 600.0  # seconds; a host copy of any state takes a fraction of it
TOO_SLOW = f"the copy of the state did not end within {DEADLINE:.0f} s; is the host out of memory?"

AS_BYTES = {getattr(torch, "float4_e2m1fn_x2", None)} - {None}  # dtypes that are copied as bytes: torch cannot

_libc = ctypes.CDLL(None)
_libc.memcpy.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_libc.memcpy.restype = ctypes.c_void_p
_holding_gil = ctypes.PyDLL(None)
_holding_gil.memcpy.argtypes = _libc.memcpy.argtypes
_holding_gil.memcpy.restype = None

_DTYPE = attrgetter("dtype")


def is_small(tensor: torch.Tensor) -> bool:
    """Return whether the tensor is one that `SmallPlaces` copies."""
    return 0 < tensor.nbytes <= SMALL_BYTES and tensor.untyped_storage().data_ptr() != 0 and _is_plain(tensor, tensor)


def no_memory(what: str) -> StageError:
    return StageError(f"{what} has no memory: its storage was freed before the save")


def addresses_of(tensors: Sequence[torch.Tensor]) -> list[int]:
    """Return the start address of each tensor. Raises `StageError` for a tensor with freed storage."""
    addresses = list(map(torch.Tensor.data_ptr, tensors))
    # If the storage is freed, the address of a part of it is just its offset, so 0 does not show it.
    if 0 in addresses or any(map(torch.Tensor.storage_offset, tensors)):
        for tensor in tensors:
            if not tensor.untyped_storage().data_ptr():
                raise no_memory(f"a tensor of shape {tuple(tensor.shape)}")
    return addresses


class SmallPlaces:
    """The destinations of many small tensors.

    Those of a few bytes are filled with one call, each of the others by one memcpy, in a loop that runs in C.
    """

    def __init__(self, places: Sequence[torch.Tensor]) -> None:
        addresses, sizes = list(map(torch.Tensor.data_ptr, places)), [place.nbytes for place in places]
        self._few = Chosen([n for n, size in enumerate(sizes) if size <= FEW_BYTES])
        self._more = Chosen([n for n, size in enumerate(sizes) if size > FEW_BYTES])
        self._few_bytes = FewBytes(self._few.of(addresses), self._few.of(sizes))
        self._addresses, self._sizes = self._more.of(addresses), self._more.of(sizes)
        self._sources: list[int] = []  # addresses at which there was memory

    def fill(self, sources: Sequence[torch.Tensor]) -> None:
        """Copy `sources`. All of them must be small (see `is_small`)."""
        addresses = list(map(torch.Tensor.data_ptr, sources))
        if addresses != self._sources:  # a tensor whose storage was freed has another address
            self._sources = addresses_of(sources)
        self._few_bytes.fill(self._few.of(addresses))
        deque(map(_holding_gil.memcpy, self._addresses, self._more.of(addresses), self._sizes), maxlen=0)


@dataclass(frozen=True, slots=True)
class Group:
    """A part of a copy: destinations and sources, and the tensors of the copy to which they belong."""

    to: list[torch.Tensor]
    of: list[torch.Tensor]
    tensors: slice


class Groups:
    """Divides a copy to fixed destinations into groups of a few milliseconds each."""

    def __init__(self, destinations: Sequence[torch.Tensor]) -> None:
        self._destinations = list(destinations)
        self._together: list[slice] = []
        first, size = 0, 0
        for n, destination in enumerate(destinations):
            if n > first and size + destination.nbytes > GROUP_BYTES:
                self._together.append(slice(first, n))
                first, size = n, 0
            size += destination.nbytes
        if destinations:
            self._together.append(slice(first, len(destinations)))

    def of(self, sources: Sequence[torch.Tensor]) -> Iterator[Group]:
        """Yield the groups.

        Small tensors share one. Each large one is split among several, if both sides are contiguous or the copy goes to a
        part of a larger tensor.
        """
        for tensors in self._together:
            to, of = self._destinations[tensors], list(sources[tensors])
            if not AS_BYTES.isdisjoint(map(_DTYPE, of)):
                of = [source.view(torch.uint8) if source.dtype in AS_BYTES else source for source in of]
            if len(of) == 1 and to[0].nbytes > GROUP_BYTES:
                for part, part_of in zip(*_pieces(to[0], of[0]), strict=True):
                    yield Group([part], [part_of], tensors)
            else:
                yield Group(to, of, tensors)


def _pieces(destination: torch.Tensor, source: torch.Tensor) -> tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]:
    if not destination.is_contiguous():
        dim = max(range(destination.ndim), key=destination.shape.__getitem__)
        rows = max(1, destination.shape[dim] * GROUP_BYTES // destination.nbytes)
        return torch.split(destination, rows, dim), torch.split(source, rows, dim)
    if source.is_contiguous():
        count = GROUP_BYTES // destination.itemsize
        return torch.split(destination.view(-1), count), torch.split(source.view(-1), count)
    return (destination,), (source,)


def copy_group(destinations: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
    """Copy the tensors of a `Group` without holding the GIL. Returns when every byte has arrived."""
    with torch.no_grad():
        torch._foreach_copy_(destinations, sources)


def copy_alone(destinations: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
    """Copy in this thread only, with memcpy where a byte copy is enough. Returns when every byte has arrived.

    This is faster than `copy_group` while no thread holds the GIL for long.
    """
    for to, source in zip(destinations, sources, strict=True):
        if _is_plain(to, source):
            _libc.memcpy(to.data_ptr(), source.data_ptr(), to.nbytes)
        else:
            copy_group([to], [source])


def copy_blocking(destinations: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
    """Copy with as many threads as torch would use here. Returns when every byte has arrived.

    Contiguous tensors are copied by memcpy, whose stores bypass the cache. Large ones use extra threads, which end with
    the copy. The rest is copied by torch with its OpenMP team; in it, every thread waits for the slowest one.
    """
    rest: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
    large: list[tuple[int, int, int]] = []
    for to, source in zip(destinations, sources, strict=True):
        if source.numel() and source.is_cpu:
            addresses_of([source])
        if not _is_plain(to, source):
            rest[0].append(to)
            rest[1].append(source)
        elif source.numel() > SERIAL:
            large.append((to.data_ptr(), source.data_ptr(), to.nbytes))
        else:
            _libc.memcpy(to.data_ptr(), source.data_ptr(), to.nbytes)
    if not large:
        _copy_serially(*rest)
        return
    pieces = deque(
        (to + start, source + start, min(PIECE_BYTES, size - start))
        for to, source, size in large
        for start in range(0, size, PIECE_BYTES)
    )
    threads = min(torch.get_num_threads(), MAX_THREADS, len(pieces))
    helpers: list[threading.Thread] = []
    try:
        for _ in range(threads - 1):
            helper = threading.Thread(target=_copy_pieces, args=(pieces,), daemon=True)
            try:
                helper.start()
            except RuntimeError:
                break  # the process may start no more threads: continue with those that run
            helpers.append(helper)
        _copy_serially(*rest)
        _copy_pieces(pieces)
    finally:
        pieces.clear()  # after an interruption: no thread may write to the arena when another save uses it
        for helper in helpers:
            helper.join(DEADLINE)
    if any(helper.is_alive() for helper in helpers):
        raise StageError(TOO_SLOW)


def _is_plain(to: torch.Tensor, source: torch.Tensor) -> bool:
    return (
        source.is_cpu
        and source.is_contiguous()
        and to.is_contiguous()
        and not source.is_conj()
        and not source.is_neg()
        and (source.dtype is to.dtype or source.dtype in AS_BYTES)
    )


def _copy_serially(destinations: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
    for group in Groups(destinations).of(sources):
        copy_group(group.to, group.of)


def _copy_pieces(pieces: deque[tuple[int, int, int]]) -> None:
    """Copy pieces until none are left."""
    while True:
        try:
            piece = pieces.popleft()
        except IndexError:
            return
        _libc.memcpy(*piece)
