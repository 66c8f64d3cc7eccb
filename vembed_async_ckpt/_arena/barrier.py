"""The barrier: before any optimizer changes anything, it waits for what is still being copied.

One global hook of torch, installed once per process. It also learns which optimizers really pass through it: only their
tensors may be copied after `save()` has returned. Optimizers that bypass the hook (not torch's, `step` replaced on the instance,
the functional API) are never seen, so nothing of theirs is ever copied late.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook


class Pending(Protocol):
    """A snapshot that is not complete yet."""

    def barrier(self) -> None:
        """Return when the optimizer may change tensors."""


class _Gate:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._installed = False
        self.seen: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
        self.generation = 0  # grows when an optimizer is seen for the first time
        self.pending: tuple[Pending, ...] = ()

    def install(self) -> None:
        with self._lock:
            if not self._installed:
                register_optimizer_step_pre_hook(_before_step)
                os.register_at_fork(after_in_child=self._forget)
                self._installed = True

    def note(self, optimizer: torch.optim.Optimizer) -> None:
        with self._lock:
            self.seen.add(optimizer)
            self.generation += 1

    def add(self, snapshot: Pending) -> None:
        with self._lock:
            self.pending = (*self.pending, snapshot)

    def remove(self, snapshot: Pending) -> None:
        with self._lock:
            self.pending = tuple(other for other in self.pending if other is not snapshot)

    def _forget(self) -> None:
        """In a forked child nobody copies: there is nothing to wait for."""
        self._lock = threading.Lock()
        self.pending = ()


GATE = _Gate()


@torch.compiler.disable
def _before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    if optimizer not in GATE.seen:
        GATE.note(optimizer)
    for snapshot in GATE.pending:
        snapshot.barrier()


class Earned:
    """Which tensors may be copied late: those that only the step of an optimizer seen at the barrier changes."""

    def __init__(self) -> None:
        self._key: Any = None
        self._chosen: list[int] = []

    def choose(
        self, key: Any, tensors: Sequence[torch.Tensor], owners: Sequence[Any], volatile: frozenset[int]
    ) -> list[int]:
        """Indices of the tensors that may be copied late. `key` is equal as long as owners and their order are the same.

        Not among them: buffers, frozen parameters, copies that nobody steps, computed values, parameters in `volatile`, what is
        not in host memory, and everything of optimizers that have not been seen.
        """
        groups = [group["params"] for optimizer in GATE.seen for group in optimizer.param_groups]
        now = (key, GATE.generation, [len(parameters) for parameters in groups])
        if now != self._key:
            allowed = {id(parameter) for parameters in groups for parameter in parameters} - volatile
            allowed |= {id(optimizer) for optimizer in GATE.seen}
            self._chosen = [
                n
                for n, (tensor, owner) in enumerate(zip(tensors, owners, strict=True))
                if id(owner) in allowed and tensor.is_cpu and not tensor.is_inference() and tensor.numel()
            ]
            self._key = now
        return self._chosen
