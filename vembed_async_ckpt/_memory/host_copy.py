"""Copies within host memory: beside the training, in few calls; while the training waits, with all the threads it would use."""

from __future__ import annotations

import ctypes
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from operator import attrgetter

import torch

from ..errors import StageError

SMALL_BYTES = 4096  # up to here a copy costs no more than what is needed to make it later
GROUP_BYTES = 32 << 20  # per call of _foreach_copy_, which holds no GIL: few calls, few waits for the GIL
PIECE_BYTES = 16 << 20  # per call of memcpy, so that threads end together
MAX_THREADS = 8  # a few threads fill the memory bus
SERIAL = 32768  # elements up to which torch copies in one thread, at::internal::GRAIN_SIZE
DEADLINE = 600.0  # seconds; a host copy of any state takes a fraction of it
TOO_SLOW = f"the copy of the state did not end within {DEADLINE:.0f} s; is the host out of memory?"

AS_BYTES = {getattr(torch, "float4_e2m1fn_x2", None)} - {None}  # dtypes that torch cannot copy as themselves

_libc = ctypes.CDLL(None)
_libc.memcpy.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_libc.memcpy.restype = ctypes.c_void_p
_holding_gil = ctypes.PyDLL(None)
_holding_gil.memcpy.argtypes = _libc.memcpy.argtypes
_holding_gil.memcpy.restype = None

_IS_CPU = attrgetter("is_cpu")

Group = tuple[list[torch.Tensor], list[torch.Tensor]]  # destinations, sources


def is_small(tensor: torch.Tensor) -> bool:
    """Whether it is one for `SmallPlaces`."""
    return 0 < tensor.nbytes <= SMALL_BYTES and tensor.untyped_storage().data_ptr() != 0 and _is_plain(tensor, tensor)


def are_plain(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether tensors that were small, of the same dtypes and shapes, may still be copied as bytes."""
    return (
        False not in map(_IS_CPU, tensors)
        and False not in map(torch.Tensor.is_contiguous, tensors)
        and True not in map(torch.Tensor.is_conj, tensors)
        and True not in map(torch.Tensor.is_neg, tensors)
    )


def addresses_of(tensors: Sequence[torch.Tensor], names: Sequence[str] = ()) -> list[int]:
    """Where tensors in memory begin. Raises `StageError` for one whose storage was freed."""
    addresses = list(map(torch.Tensor.data_ptr, tensors))
    # Without memory the address of a part of a tensor is its offset.
    if 0 in addresses or any(map(torch.Tensor.storage_offset, tensors)):
        for n, tensor in enumerate(tensors):
            if not tensor.untyped_storage().data_ptr():
                what = repr(names[n]) if names else f"a tensor of shape {tuple(tensor.shape)}"
                raise StageError(f"{what} has no memory: its storage was freed before the save")
    return addresses


class SmallPlaces:
    """The places of many small tensors: filled by a memcpy each, in loops that run in C."""

    def __init__(self, places: Sequence[torch.Tensor]) -> None:
        self._addresses = list(map(torch.Tensor.data_ptr, places))
        self._sizes = [place.nbytes for place in places]

    def fill(self, sources: Sequence[torch.Tensor]) -> None:
        """Copy `sources`, which `are_plain`."""
        deque(map(_holding_gil.memcpy, self._addresses, addresses_of(sources), self._sizes), maxlen=0)


def groups(destinations: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> Iterator[Group]:
    """All of a copy, in parts that take a few milliseconds: large contiguous tensors are divided, small ones share a group."""
    to: list[torch.Tensor] = []
    of: list[torch.Tensor] = []
    size = 0
    for destination, source in zip(destinations, sources, strict=True):
        if source.dtype in AS_BYTES:
            source = source.view(torch.uint8)
        large = destination.nbytes > GROUP_BYTES and source.is_contiguous()
        count = GROUP_BYTES // destination.itemsize if large else 0
        for part, part_of in zip(_pieces(destination, count), _pieces(source, count), strict=True):
            to.append(part)
            of.append(part_of)
            size += part.nbytes
            if size >= GROUP_BYTES:
                yield to, of
                to, of, size = [], [], 0
    if to:
        yield to, of


def _pieces(tensor: torch.Tensor, count: int) -> Sequence[torch.Tensor]:
    return torch.split(tensor.view(-1), count) if count else (tensor,)


def copy_group(destinations: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
    """Copy one of the `groups` without holding the GIL. Returns when every byte has arrived."""
    with torch.no_grad():
        torch._foreach_copy_(destinations, sources)


def copy_alone(destinations: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
    """Copy in this thread only, by memcpy where bytes are all there is to it: faster than `copy_group`, while nobody holds the GIL
    for long. Returns when every byte has arrived."""
    for to, source in zip(destinations, sources, strict=True):
        if _is_plain(to, source):
            _libc.memcpy(to.data_ptr(), source.data_ptr(), to.nbytes)
        else:
            copy_group([to], [source])


def copy_blocking(destinations: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
    """Copy with as many threads as torch would use in this one. Returns when every byte has arrived.

    Contiguous tensors by memcpy, whose stores bypass the cache, large ones in threads that are gone afterwards; OpenMP's team,
    which does the rest, makes every thread wait for the one whose core is busy.
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
                break  # the process may have no more threads: then with those it has
            helpers.append(helper)
        _copy_serially(*rest)
        _copy_pieces(pieces)
    finally:
        pieces.clear()  # if this was interrupted: no thread writes to the arena once it may be another save's
        for helper in helpers:
            helper.join(DEADLINE)
    if any(helper.is_alive() for helper in helpers):
        raise StageError(TOO_SLOW)


def _is_plain(to: torch.Tensor, source: torch.Tensor) -> bool:
    return (
        source.is_cpu
        and source.is_contiguous()
        and not source.is_conj()
        and not source.is_neg()
        and (source.dtype is to.dtype or source.dtype in AS_BYTES)
    )


def _copy_serially(destinations: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
    for group in groups(destinations, sources):
        copy_group(*group)


def _copy_pieces(pieces: deque[tuple[int, int, int]]) -> None:
    """Copy until there are none left."""
    while True:
        try:
            piece = pieces.popleft()
        except IndexError:
            return
        _libc.memcpy(*piece)
