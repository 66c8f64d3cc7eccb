"""Passes a state that is larger than the allowed memory through a small arena in parts ("waves").

One half of the arena is filled while the other is written. The training thread is blocked for the whole time. The save
counts as staged only when its last part is in the arena.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable
from typing import Any

import torch

from .. import _signals
from .._capture.request import Request
from .._format.plan import START, SavePlan
from .._memory.arena import Arena
from .._memory.devices import DeviceCopies, is_on_device
from .._shared.protocol import wave_base
from ..errors import StageError
from .assembly import Assembly


class Waves:
    """The parts of one save, in order."""

    def __init__(self, arena: Arena, plan: SavePlan, request: Request, assembly: Assembly) -> None:
        self._arena = arena
        self._assembly = assembly
        self._pieces: list[tuple[int, Any]] = [*plan.pieces, *assembly.pieces]
        self._pieces += zip(plan.offsets, request.tensors, strict=True)
        state = request.state
        self._pieces += [(plan.end + state.layout.offsets[name], tensor) for name, tensor in state.tensors.items()]
        self._turn = threading.Semaphore(0)  # counts the halves that may be filled
        self._accepted = False
        # (position, bytes) of the tensor in which the last part ended
        self._flat: tuple[int, torch.Tensor] | None = None

    def place_job(self) -> tuple[int, int]:
        """Write the job to the place of the first part.

        The writer reads the job before it accepts it. Return (offset, length).

        Raises `StageError` if the job alone does not fit into the arena.
        """
        job = self._assembly.job
        if START + len(job) > self._arena.size:
            raise StageError(
                f"the save's description alone needs {len(job)} bytes; allow an arena of more than {self._arena.size}"
            )
        self._arena.write(START, job)
        return START, len(job)

    def go_on(self) -> None:
        """Called when the writer has read the job, when it has written a part, or when the save has ended."""
        self._turn.release(1 if self._accepted else 2)
        self._accepted = True

    def run(self, send: Callable[[int, int], None], ended: Callable[[], bool], alive: Callable[[], None]) -> None:
        """Pass every part through the arena.

        Returns early once `ended()` is True: then the save is over. `alive` raises if no answer can come any more.
        """
        window = part_size(self._arena)
        for start in range(START, self._assembly.end, window):
            end = min(start + window, self._assembly.end)
            while not self._turn.acquire(timeout=_signals.SLICE):
                _signals.deliver()
                alive()
            if ended():
                return
            self._fill(start, end)
            send(start, end)
        self._flat = None

    def _fill(self, start: int, end: int) -> None:
        base = wave_base(start, part_size(self._arena))
        self._arena.clear(base, base + end - start)
        memory = torch.frombuffer(self._arena.memory, dtype=torch.uint8)
        by_device: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
        for position, what in self._pieces:
            size = what.nbytes if isinstance(what, torch.Tensor) else len(what)
            low, high = max(position, start), min(position + size, end)
            if low >= high:
                continue
            at = base + low - start
            if isinstance(what, torch.Tensor):
                to, of = memory[at : at + high - low], self._bytes_of(what, position)[low - position : high - position]
                if is_on_device(what):
                    by_device[0].append(to)
                    by_device[1].append(of)
                else:
                    to.copy_(of)
            else:
                self._arena.write(at, what[low - position : high - position])
        copies = DeviceCopies.of(by_device[1])
        if copies is not None:
            try:
                copies.issue(*by_device)
            finally:
                copies.wait()

    def _bytes_of(self, tensor: torch.Tensor, position: int) -> torch.Tensor:
        """Return the bytes of the tensor's elements in order.

        The result is kept while further parts need this tensor: a tensor that is not contiguous must be copied as a
        whole.
        """
        if self._flat is None or self._flat[0] != position:
            flat = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)
            self._flat = position, flat
        return self._flat[1]


def part_size(arena: Arena) -> int:
    """Return the bytes of each part. The last part may be shorter."""
    return (arena.size - START) // 2 // mmap.PAGESIZE * mmap.PAGESIZE
