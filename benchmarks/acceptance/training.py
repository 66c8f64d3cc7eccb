"""A training of a given size and step time, on whose device the steps are timed without waiting for them."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any

import torch

from .common import Setting


class Training:
    def __init__(
        self, setting: Setting, size: int, tensors: int, fused: bool, dtype: torch.dtype = torch.float32
    ) -> None:
        """`size` bytes of weights and AdamW's moments, in `tensors` tensors."""
        self.setting = setting
        count = max(tensors // 3, 1)
        numel = max(size // (3 * count * dtype.itemsize), 1)
        parameters = [torch.nn.Parameter(torch.rand(numel, device=setting.device).to(dtype)) for _ in range(count)]
        self.model = torch.nn.ParameterList(parameters)
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=fused, foreach=not fused)
        for parameter in parameters:
            parameter.grad = torch.full_like(parameter, 1e-3)
        self.optimizer.step()
        self.nbytes = 3 * count * numel * dtype.itemsize

    def steps(self, count: int, step_ms: float, before_step: Callable[[int], None], seconds: float) -> list[float]:
        """Train, for so long at most; returns the seconds of each step, as the device saw them."""
        marks: list[Any] = []
        end = time.monotonic() + seconds
        for number in range(count):
            self._mark(marks)
            before_step(number)
            if self.setting.cuda:
                self.setting.busy(step_ms)
            else:
                time.sleep(step_ms / 1e3)
            self.optimizer.step()
            if time.monotonic() > end:
                break
        self._mark(marks)
        self.setting.synchronize()
        pairs = itertools.pairwise(marks)
        return [a.elapsed_time(b) / 1e3 if self.setting.cuda else b - a for a, b in pairs]

    def _mark(self, marks: list[Any]) -> None:
        if self.setting.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            marks.append(event)
        else:
            marks.append(time.perf_counter())
