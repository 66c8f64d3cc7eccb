"""The step barrier: before an optimizer changes anything, it waits for the copies that are still running.

The barrier is torch's global step hook, installed once per process. It also records which optimizers pass through it.
Only the tensors of these optimizers may be copied after `save()` has returned. Some optimizers bypass the hook: those
that are not torch's, those with `step` replaced on the instance, and the functional API. They are never recorded, so
their tensors are never copied late. An optimizer that changes weights first and then calls a hooked step is recorded,
but waits too late. Only the checks of `staging.DeferredCopy` detect that.
"""

from __future__ import annotations

import functools
import os
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any, Protocol

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from .. import _signals
from .._tensor_guard import TensorGuard
from .addresses import PROBE_BYTES, TailProbe
from .captures import is_capturing
from .chosen import Chosen
from .devices import is_on_device
from .host_copy import is_small
from .places import Place


class Pending(Protocol):
    """A snapshot that is not complete yet."""

    def barrier(self) -> None:
        """Return when the optimizer may change tensors."""


class SavedOptimizer(Protocol):
    """An optimizer that is saved, or an object that represents one."""

    @property
    def optimizer(self) -> Any: ...

    def parameter_ids(self) -> set[int] | None:
        """Return the ids of the parameters that it steps, or None if they are not known."""


class _StepBarrier:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._installed = False
        self.seen: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
        self.captured: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
        self.steps = 0  # how many optimizer steps the hook has seen begin
        self.generation = 0  # grows when an optimizer is recorded for the first time
        self._recorded: list[weakref.ref[torch.optim.Optimizer]] = []  # those of `optimizers()`
        self.pending: tuple[Pending, ...] = ()
        self._stepping: list[int] = []  # ids of optimizers whose step has begun and has not returned

    def install(self) -> None:
        with _signals.held(), self._lock:
            if not self._installed:
                register_optimizer_step_pre_hook(_before_step)
                register_optimizer_step_post_hook(_after_step)
                os.register_at_fork(after_in_child=self._forget)
                self._installed = True

    def note(self, optimizer: torch.optim.Optimizer) -> None:
        with _signals.held(), self._lock:
            self.seen.add(optimizer)
            self._record()

    def note_captured(self, optimizer: torch.optim.Optimizer) -> None:
        with _signals.held(), self._lock:
            self.captured.add(optimizer)
            self._record()

    def _record(self) -> None:
        self._recorded = [weakref.ref(optimizer) for optimizer in self.seen if optimizer not in self.captured]
        self.generation += 1

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Return the recorded optimizers that still exist.

        It leaves out an optimizer with a step that a CUDA graph replays, because the replay does not run the hook.
        """
        return [optimizer for recorded in self._recorded if (optimizer := recorded()) is not None]

    def step_begins(self, optimizer: torch.optim.Optimizer) -> None:
        self.steps += 1
        self.step_ends(optimizer)  # in case its previous step ended in an exception
        self._stepping.append(id(optimizer))

    def step_ends(self, optimizer: torch.optim.Optimizer) -> None:
        if id(optimizer) in self._stepping:
            del self._stepping[self._stepping.index(id(optimizer)) :]

    def is_stepping(self) -> bool:
        """Return whether an optimizer is in the middle of a step, on any thread.

        A step that ends in an exception calls no hook. So the call stacks are looked at, if a step has begun and not returned.
        """
        if not self._stepping:
            return False
        if any(map(_is_in_step, sys._current_frames().values())):
            return True
        self._stepping = []
        return False

    def add(self, snapshot: Pending) -> None:
        with _signals.held(), self._lock:
            self.pending = (*self.pending, snapshot)

    def remove(self, snapshot: Pending) -> None:
        with _signals.held(), self._lock:
            self.pending = tuple(other for other in self.pending if other is not snapshot)

    def _forget(self) -> None:
        """In a forked child: drop the pending snapshots, because no thread copies here."""
        self._lock = threading.Lock()
        self.pending = ()
        self._stepping = []


STEP_BARRIER = _StepBarrier()


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    STEP_BARRIER.step_begins(optimizer)
    if optimizer not in STEP_BARRIER.seen:
        STEP_BARRIER.note(optimizer)
    if is_capturing() and optimizer not in STEP_BARRIER.captured:
        STEP_BARRIER.note_captured(optimizer)
    for snapshot in STEP_BARRIER.pending:
        snapshot.barrier()


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    STEP_BARRIER.step_ends(optimizer)


# Every optimizer's step is wrapped by a function with this code, which calls the hooks.
_STEP = torch.optim.Optimizer.profile_hook_step(lambda self: None).__code__


def _is_in_step(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code is _STEP:
            return True
        frame = frame.f_back
    return False


@dataclass(frozen=True)
class CopyPlan:
    """Which tensors are copied before `save()` returns, and which may be copied later. All tensors are given by index.

    `small`: host tensors of a few KiB, copied before `save()` returns.
    `now`: the other tensors that are copied before `save()` returns.
    `late`: tensors that may be copied later. The remaining fields describe these.
    `names`: the name of each late tensor.
    `in_host`, `on_device`: those late tensors that are in host memory, and those that a device copies. Given by index
        among the late ones.
    `shapes`: dtype, size and strides of each late tensor.
    `looks`: of their `.data`.
    `tails`: reads the last bytes of those in host memory.
    """

    small: Chosen
    now: Chosen
    late: Chosen
    names: list[str]
    in_host: Chosen
    on_device: Chosen
    shapes: list[tuple[torch.dtype, torch.Size, tuple[int, ...]]]
    looks: TensorGuard
    tails: TailProbe


class OverlapPolicy:
    """Decides which tensors may be copied late.

    These are the tensors that change only in the step of an optimizer recorded at the barrier.
    """

    def __init__(self) -> None:
        self._key: Any = None
        self._copy_plan = all_now(0)

    def divide(
        self,
        key: Any,
        tensors: Sequence[torch.Tensor],
        names: Callable[[], Sequence[str]],
        owners: Callable[[], Sequence[Any]],
        volatile: frozenset[int],
        saved: Sequence[SavedOptimizer] = (),
        places: Sequence[Place] | None = None,
    ) -> CopyPlan:
        """Divide the tensors of a save into those copied at once and those that may be copied late.

        `key`: equal as long as names and owners of the tensors, their looks (see `TensorGuard`), their places and their
            order are the same.
        `names`, `owners`: return the name of each tensor, and the parameter, buffer or optimizer to which it belongs.
        `volatile`: ids of the parameters that the forward pass changes.
        `saved`: the optimizers that are saved.
        `places`: where the tensors go, if they are not contiguous there.

        These are copied at once: small tensors, buffers, frozen parameters, copies that no optimizer steps (EMA),
        computed values, parameters in `volatile`, host tensors that are not contiguous, and those that go to rows of less
        than 8 bytes. So is everything of an optimizer that has not been recorded, or whose step a CUDA graph replays. So
        are the parameters of a wrapper that has not been recorded itself, because it may change them before or after the
        step that it wraps. So are the parameters of an optimizer with `train()` and `eval()`, which change them between
        its steps; such a schedule-free optimizer must be saved between `eval()` and `train()`.
        """
        seen = STEP_BARRIER.optimizers()
        groups = [group["params"] for optimizer in seen if not _switches(optimizer) for group in optimizer.param_groups]
        unseen = [each.parameter_ids() for each in saved if not any(other is each.optimizer for other in seen)]
        now = (key, STEP_BARRIER.generation, [list(map(id, parameters)) for parameters in groups], unseen)
        if now != self._key:
            small = {n for n, tensor in enumerate(tensors) if is_small(tensor) and not is_on_device(tensor)}
            if places is not None:
                small = {n for n in small if places[n].strides is None}
            allowed = {id(parameter) for parameters in groups for parameter in parameters} - volatile
            for parameters in unseen:
                allowed = set() if parameters is None else allowed - parameters
            allowed |= {id(optimizer) for optimizer in seen}
            late = [
                n
                for n, owner in enumerate(owners())
                if n not in small
                and id(owner) in allowed
                and _can_be_late(tensors[n])
                and (places is None or places[n].row(tensors[n]) >= PROBE_BYTES)
            ]
            rest = sorted(set(range(len(tensors))) - small - set(late))
            self._copy_plan = _copy_plan(sorted(small), rest, late, Chosen(late).of(names()), tensors)
            self._key = now
        return self._copy_plan


def _switches(optimizer: torch.optim.Optimizer) -> bool:
    return callable(getattr(optimizer, "train", None)) and callable(getattr(optimizer, "eval", None))


@functools.lru_cache(maxsize=8)
def all_now(count: int) -> CopyPlan:
    """Return the plan in which none of `count` tensors is copied late."""
    return _copy_plan([], list(range(count)), [], [], [])


def _copy_plan(
    small: list[int],
    now: list[int],
    late: list[int],
    names: list[str],
    tensors: Sequence[torch.Tensor],
) -> CopyPlan:
    copied_late = [tensors[n].data for n in late]
    in_host = Chosen([n for n, tensor in enumerate(copied_late) if not is_on_device(tensor)])
    return CopyPlan(
        small=Chosen(small),
        now=Chosen(now),
        late=Chosen(late),
        names=names,
        in_host=in_host,
        on_device=Chosen([n for n, tensor in enumerate(copied_late) if is_on_device(tensor)]),
        shapes=[(tensor.dtype, tensor.size(), tensor.stride()) for tensor in copied_late],
        looks=TensorGuard(copied_late),
        tails=TailProbe([tensor.nbytes for tensor in in_host.of(copied_late)]),
    )


def _can_be_late(tensor: torch.Tensor) -> bool:
    """Return whether the tensor may be copied late.

    A device copies any strides, and its tensors are not probed: they need only a version counter and at least one
    element. A conjugate or negative tensor is not what its memory says.
    """
    if tensor.is_inference() or tensor.is_conj() or tensor.is_neg():
        return False
    if tensor.is_cpu:
        return tensor.nbytes >= PROBE_BYTES and tensor.is_contiguous()
    return tensor.numel() > 0 and is_on_device(tensor)
