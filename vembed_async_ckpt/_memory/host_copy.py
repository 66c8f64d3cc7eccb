"""Copies within host memory: with few calls beside the training, or with many threads while the training waits."""

from __future__ import annotations

import ctypes
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from operator import attrgetter

import torch

from ..errors import StageError

SMALL_BYTES = 4096  # up to this size, copying now costs no more than preparing a later copy
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

_IS_CPU = attrgetter("is_cpu")

Group = tuple[list[torch.Tensor], list[torch.Tensor]]  # destinations, sources


def is_small(tensor: torch.Tensor) -> bool:
    """Return whether the tensor is one that `SmallPlaces` copies."""
    return 0 < tensor.nbytes <= SMALL_BYTES and tensor.untyped_storage().data_ptr() != 0 and _is_plain(tensor, tensor)


def are_plain(tensors: Sequence[torch.Tensor]) -> bool:
    """Return whether tensors that were small may still be copied as bytes.

    Their dtypes and shapes must be unchanged.
    """
    return (
        False not in map(_IS_CPU, tensors)
        and False not in map(torch.Tensor.is_contiguous, tensors)
        and True not in map(torch.Tensor.is_conj, tensors)
        and True not in map(torch.Tensor.is_neg, tensors)
    )


def addresses_of(tensors: Sequence[torch.Tensor], names: Sequence[str] = ()) -> list[int]:
    """Return the start address of each tensor. Raises `StageError` for a tensor with freed storage."""
    addresses = list(map(torch.Tensor.data_ptr, tensors))
    # If the storage is freed, the address of a part of it is just its offset, so 0 does not show it.
    if 0 in addresses or any(map(torch.Tensor.storage_offset, tensors)):
        for n, tensor in enumerate(tensors):
            if not tensor.untyped_storage().data_ptr():
                what = repr(names[n]) if names else f"a tensor of shape {tuple(tensor.shape)}"
                raise StageError(f"{what} has no memory: its storage was freed before the save")
    return addresses


class SmallPlaces:
    """The destinations of many small tensors. Each is filled by one memcpy, in a loop that runs in C."""

    def __init__(self, places: Sequence[torch.Tensor]) -> None:
        self._addresses = list(map(torch.Tensor.data_ptr, places))
        self._sizes = [place.nbytes for place in places]

    def fill(self, sources: Sequence[torch.Tensor]) -> None:
        """Copy `sources`. All of them must satisfy `are_plain`."""
        deque(map(_holding_gil.memcpy, self._addresses, addresses_of(sources), self._sizes), maxlen=0)


def groups(destinations: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> Iterator[Group]:
    """Yield a copy in parts of a few milliseconds each.

    Large tensors are split, if both sides are contiguous or the copy goes to a part of a larger tensor. Small ones share a
    group.
    """
    to: list[torch.Tensor] = []
    of: list[torch.Tensor] = []
    size = 0
    for destination, source in zip(destinations, sources, strict=True):
        if source.dtype in AS_BYTES:
            source = source.view(torch.uint8)
        for part, part_of in zip(*_pieces(destination, source), strict=True):
            to.append(part)
            of.append(part_of)
            size += part.nbytes
            if size >= GROUP_BYTES:
                yield to, of
                to, of, size = [], [], 0
    if to:
        yield to, of


def _pieces(destination: torch.Tensor, source: torch.Tensor) -> tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]:
    if destination.nbytes > GROUP_BYTES and not destination.is_contiguous():
        dim = max(range(destination.ndim), key=destination.shape.__getitem__)
        rows = max(1, destination.shape[dim] * GROUP_BYTES // destination.nbytes)
        return torch.split(destination, rows, dim), torch.split(source, rows, dim)
    if destination.nbytes > GROUP_BYTES and source.is_contiguous():
        count = GROUP_BYTES // destination.itemsize
        return torch.split(destination.view(-1), count), torch.split(source.view(-1), count)
    return (destination,), (source,)


def copy_group(destinations: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
    """Copy one of the `groups` without holding the GIL. Returns when every byte has arrived."""
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
    for group in groups(destinations, sources):
        copy_group(*group)


def _copy_pieces(pieces: deque[tuple[int, int, int]]) -> None:
    """Copy pieces until none are left."""
    while True:
        try:
            piece = pieces.popleft()
        except IndexError:
            return
        _libc.memcpy(*piece)
