"""A state as of 8 billion parameters in bf16 with AdamW, as far as memory, disk and time allow."""

from __future__ import annotations

import os
import shutil
import time
from typing import Any

import torch

from vembed_async_ckpt import AsyncCheckpointer, KeepLast, load

from .common import WAIT, Say, Setting, quantiles
from .training import Training


def run(setting: Setting, say: Say) -> None:
    if setting.tiny:
        size, step_ms = 6 << 20, 20.0
    else:
        memory = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        free = shutil.disk_usage(setting.directory).free
        size, step_ms = int(min(48e9 if setting.cuda else 1e9, 0.35 * memory, 0.4 * free)), 400.0
    training = Training(setting, size, 873, fused=setting.cuda, dtype=torch.bfloat16)
    say(bytes=training.nbytes)
    alone = training.steps(6, step_ms, lambda number: None, 8)
    calls: list[float] = []
    handles: list[Any] = []

    def save(number: int) -> None:
        if not handles or handles[-1].done():
            begun = time.perf_counter()
            handles.append(checkpointer.save(number, model=training.model, optimizer=training.optimizer))
            calls.append(time.perf_counter() - begun)

    with AsyncCheckpointer(setting.directory / "big", retention=KeepLast(1)) as checkpointer:
        begun = time.perf_counter()
        checkpointer.prewarm(model=training.model, optimizer=training.optimizer)
        checkpointer.wait(WAIT)
        say(prewarm_s=round(time.perf_counter() - begun, 2))
        beside = training.steps(1000, step_ms, save, max(setting.left() / 3, 3))
        say(step_alone_ms=quantiles(alone), step_beside_ms=quantiles(beside), call_ms=quantiles(calls))
        wanted = [parameter.detach().clone() for parameter in list(training.model)[:3]]
        handles[-1].result(WAIT)
        info = checkpointer.save(9999, model=training.model, optimizer=training.optimizer).result(WAIT)
        timings = info.timings
        say(staging_GBps=round(training.nbytes / timings.staging / 1e9, 2), durable_s=round(timings.durable, 3))
        begun = time.perf_counter()
        load(info.path, model=training.model, optimizer=training.optimizer)
        setting.synchronize()
        say(load_GBps=round(training.nbytes / (time.perf_counter() - begun) / 1e9, 2))
        say(right=all(torch.equal(a, b) for a, b in zip(wanted, training.model, strict=False)))
