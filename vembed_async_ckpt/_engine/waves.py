"""A state that is larger than the memory allowed passes through a small arena: fill it, have it written, fill it again.

The training thread is blocked all the while, and nothing of the save is staged before its last part is in the arena.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch

from .. import _signals
from .._arena.arena import Arena
from .._plan.plan import START, SavePlan
from .._request.request import Request
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
        self._turn = threading.Semaphore(0)

    def place_job(self) -> tuple[int, int]:
        """Put the job where the first wave will go; the writer reads it before it accepts. Returns offset and length."""
        job = self._assembly.job
        if START + len(job) > self._arena.size:
            raise StageError(
                f"the save's description alone needs {len(job)} bytes; allow an arena of more than {self._arena.size}"
            )
        self._arena.write(START, job)
        return START, len(job)

    def go_on(self) -> None:
        """The writer is ready for the next part, or the save has ended."""
        self._turn.release()

    def run(self, send: Callable[[int, int], None], ended: Callable[[], bool], alive: Callable[[], None]) -> None:
        """Pass every part through. Returns early when the save has `ended`; `alive` raises when nobody would ever answer."""
        window = self._arena.size - START
        for start in range(START, self._assembly.end, window):
            end = min(start + window, self._assembly.end)
            while not self._turn.acquire(timeout=_signals.SLICE):
                _signals.deliver()
                alive()
            if ended():
                return
            self._fill(start, end)
            send(start, end)

    def _fill(self, start: int, end: int) -> None:
        self._arena.clear(START, START + end - start)
        memory = torch.frombuffer(self._arena.memory, dtype=torch.uint8)
        for position, what in self._pieces:
            size = what.nbytes if isinstance(what, torch.Tensor) else len(what)
            low, high = max(position, start), min(position + size, end)
            if low >= high:
                continue
            at = START + low - start
            if isinstance(what, torch.Tensor):
                flat = what.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)
                memory[at : at + high - low].copy_(flat[low - position : high - position])
            else:
                self._arena.write(at, what[low - position : high - position])
