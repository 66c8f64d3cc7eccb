"""Mapping an arena and faulting its pages in, without holding the GIL."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import weakref

_MADV_DONTFORK, _MADV_HUGEPAGE, _MADV_DONTDUMP, _MADV_POPULATE_WRITE = 10, 14, 16, 23  # asm-generic/mman-common.h
MEMFD = "vembed_async_ckpt"  # name of every arena's memory
_STEP = 16 << 20  # mmap_sem is held for one step at a time, so that other threads' faults get in between

_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


_mapped: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()


def _keep_for_ever() -> None:
    """In a forked child the mappings are not there, and the end of their objects, garbage or not, would unmap whatever the child
    has put in the same place. The descriptors that those objects have are closed: each would hold all of the memory."""
    if not _mapped:
        return
    for memory in list(_mapped):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(memory))
    _mapped.clear()
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the listing's own is closed already
            if os.readlink(f"/proc/self/fd/{fd}").startswith(f"/memfd:{MEMFD} "):
                os.close(int(fd))


os.register_at_fork(after_in_child=_keep_for_ever)


def map_arena(fd: int, size: int) -> mmap.mmap:
    """Map `size` bytes of an arena, shared and writable; left out of core dumps and of forked children, which close its
    descriptors.

    Huge pages are advised, never depended on.
    """
    memory = mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
    _mapped.add(memory)
    for advice in (_MADV_DONTFORK, _MADV_DONTDUMP, _MADV_HUGEPAGE):
        _libc.madvise(address_of(memory), size, advice)
    return memory


def address_of(memory: mmap.mmap) -> int:
    """Address of the first byte. The mapping must be kept alive by the caller."""
    view = (ctypes.c_char * 0).from_buffer(memory)
    return ctypes.addressof(view)


def populate(memory: mmap.mmap, size: int) -> None:
    """Fault every page in for writing; contents are unchanged. Where the kernel cannot (before 5.14), pages are faulted
    in by the first copy instead. ctypes releases the GIL around the call; `mmap.madvise` would hold it."""
    base = address_of(memory)
    for offset in range(0, size, _STEP):
        if _libc.madvise(base + offset, min(_STEP, size - offset), _MADV_POPULATE_WRITE):
            return
