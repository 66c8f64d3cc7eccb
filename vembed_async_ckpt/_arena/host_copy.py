"""Copies within host memory: beside the training, in few calls; while the training waits, with all the threads it would use."""

from __future__ import annotations

import ctypes
import threading
from collections import deque
from collections.abc import Sequence

import torch

from ..errors import StageError

GROUP_BYTES = 64 << 20  # per call of _foreach_copy_, which holds no GIL: few calls, few waits for the GIL
PIECE_BYTES = 16 << 20  # per call of memcpy, so that threads end together
MAX_THREADS = 8  # a few threads fill the memory bus
SERIAL = 32768  # elements up to which torch copies in one thread, at::internal::GRAIN_SIZE
DEADLINE = 600.0  # seconds; a host copy of any state takes a fraction of it

AS_BYTES = {getattr(torch, "float4_e2m1fn_x2", None)} - {None}  # dtypes that torch cannot copy as themselves

_libc = ctypes.CDLL(None)
_libc.memcpy.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_libc.memcpy.restype = ctypes.c_void_p


def copy_beside(destinations: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
    """Copy tensor by tensor, in few calls. Returns when every byte has arrived."""
    to: list[torch.Tensor] = []
    of: list[torch.Tensor] = []
    size = 0
    with torch.no_grad():
        for destination, source in zip(destinations, sources, strict=True):
            to.append(destination)
            of.append(source.view(torch.uint8) if source.dtype in AS_BYTES else source)
            size += destination.nbytes
            if size >= GROUP_BYTES:
                torch._foreach_copy_(to, of)
                to, of, size = [], [], 0
        if to:
            torch._foreach_copy_(to, of)


def copy_blocking(destinations: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
    """Copy with as many threads as torch would use in this one. Returns when every byte has arrived.

    Large contiguous tensors by memcpy, whose stores bypass the cache, in threads that are gone afterwards; OpenMP's team, which
    does the rest, makes every thread wait for the one whose core is busy.
    """
    small: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
    large: list[tuple[int, int, int]] = []
    for to, source in zip(destinations, sources, strict=True):
        if source.numel() and source.is_cpu and not source.data_ptr():
            raise StageError(
                f"a tensor of shape {tuple(source.shape)} has no memory: its storage was freed before the save"
            )
        if source.numel() > SERIAL and _is_plain(to, source):
            large.append((to.data_ptr(), source.data_ptr(), to.nbytes))
        else:
            small[0].append(to)
            small[1].append(source)
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
        copy_beside(*small)
        _copy_pieces(pieces)
    finally:
        pieces.clear()  # if this was interrupted: no thread writes to the arena once it may be another save's
        for helper in helpers:
            helper.join(DEADLINE)
    if any(helper.is_alive() for helper in helpers):
        raise StageError(f"the copy of the state did not end within {DEADLINE:.0f} s; is the host out of memory?")


def _is_plain(to: torch.Tensor, source: torch.Tensor) -> bool:
    return (
        source.is_cpu
        and source.is_contiguous()
        and not source.is_conj()
        and not source.is_neg()
        and (source.dtype is to.dtype or source.dtype in AS_BYTES)
    )


def _copy_pieces(pieces: deque[tuple[int, int, int]]) -> None:
    """Copy until there are none left."""
    while True:
        try:
            piece = pieces.popleft()
        except IndexError:
            return
        _libc.memcpy(*piece)
