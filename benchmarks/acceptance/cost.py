"""What saving costs a training of 400 tensors: the call, the steps beside it, memory of the device."""

from __future__ import annotations

import gc
import statistics
import time
from typing import Any

import torch

from vembed_async_ckpt import AsyncCheckpointer, KeepLast

from .common import WAIT, Say, Setting, quantiles
from .training import Training


def run(setting: Setting, say: Say) -> None:
    size, step_ms, steps = (3 << 20, 2.0, 30) if setting.tiny else (1_200_000_000, 60.0, 200)
    for kind in ("foreach", "fused"):
        training = Training(setting, size, 400, fused=kind == "fused")
        alone = training.steps(steps // 2, step_ms, lambda number: None, 8)
        found: dict[str, Any] = {"bytes": training.nbytes, "step_alone_ms": quantiles(alone)}
        with AsyncCheckpointer(setting.directory / kind, retention=KeepLast(1)) as checkpointer:
            begun = time.perf_counter()
            checkpointer.prewarm(model=training.model, optimizer=training.optimizer)
            checkpointer.wait(WAIT)
            found["prewarm_s"] = round(time.perf_counter() - begun, 3)
            calls: list[float] = []
            handles: list[Any] = []

            def save(number: int, *, handles: Any = handles, calls: Any = calls, training: Any = training) -> None:
                if number % 10 == 0 and (not handles or handles[-1].done()):
                    begun = time.perf_counter()
                    handles.append(checkpointer.save(number, model=training.model, optimizer=training.optimizer))
                    calls.append(time.perf_counter() - begun)

            if setting.cuda:
                torch.cuda.reset_peak_memory_stats()
                found["device_bytes_before"] = torch.cuda.memory_allocated()
            beside = training.steps(steps, step_ms, save, min(setting.left() / 3, 18))
            if setting.cuda:
                found["device_bytes_peak"] = torch.cuda.max_memory_allocated()
            checkpointer.wait(WAIT)
            timings = [handle.result(WAIT).timings for handle in handles]
        found |= {
            "step_beside_ms": quantiles(beside),
            "median_step_inflation": round(statistics.median(beside) / statistics.median(alone) - 1, 4),
            "lost_per_save_ms": round(
                (sum(beside) - len(beside) * statistics.median(alone)) / max(len(handles), 1) * 1e3, 3
            ),
            "call_ms": quantiles(calls[1:] or calls),
            "held_ms": quantiles([timing.held for timing in timings]),
            "staging_ms": quantiles([timing.staging for timing in timings]),
            "durable_ms": quantiles([timing.durable for timing in timings]),
        }
        say(**{kind: found})
        del training
        gc.collect()
