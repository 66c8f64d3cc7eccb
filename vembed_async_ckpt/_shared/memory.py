"""Maps an arena and faults its pages in, without holding the GIL."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import weakref

_MADV_DONTFORK, _MADV_HUGEPAGE, _MADV_DONTDUMP, _MADV_POPULATE_WRITE = 10, 14, 16, 23  # asm-generic/mman-common.h
MEMFD = "vembed_async_ckpt"  # name of the memfd of every arena
_STEP = 16 << 20  # bytes per madvise call, which holds mmap_sem; other threads' page faults run between calls

_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


_mapped: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()


def _keep_for_ever() -> None:
    """In a forked child, prevent Python from unmapping arenas, and close their descriptors.

    The child does not inherit the mappings. If Python deleted their objects, it would unmap whatever the child has
    mapped at the same addresses. Each open descriptor would keep the memory of the whole arena alive.
    """
    if not _mapped:
        return
    for memory in list(_mapped):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(memory))
    _mapped.clear()
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the descriptor that listdir used is closed by now
            if os.readlink(f"/proc/self/fd/{fd}").startswith(f"/memfd:{MEMFD} "):
                os.close(int(fd))


os.register_at_fork(after_in_child=_keep_for_ever)


def map_arena(fd: int, size: int) -> mmap.mmap:
    """Map `size` bytes of an arena, shared and writable.

    The mapping is left out of core dumps and of forked children, and the children close the descriptor. Huge pages are
    requested but not required.
    """
    memory = mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
    _mapped.add(memory)
    for advice in (_MADV_DONTFORK, _MADV_DONTDUMP, _MADV_HUGEPAGE):
        _libc.madvise(address_of(memory), size, advice)
    return memory


def address_of(memory: mmap.mmap) -> int:
    """Return the address of the first byte. The caller must keep the mapping alive."""
    view = (ctypes.c_char * 0).from_buffer(memory)
    return ctypes.addressof(view)


def populate(memory: mmap.mmap, size: int) -> None:
    """Fault every page in for writing. The contents do not change.

    Kernels before 5.14 cannot do this; there the first copy faults the pages in. The call uses ctypes, which releases
    the GIL; `mmap.madvise` would hold it.
    """
    base = address_of(memory)
    for offset in range(0, size, _STEP):
        if _libc.madvise(base + offset, min(_STEP, size - offset), _MADV_POPULATE_WRITE):
            return
