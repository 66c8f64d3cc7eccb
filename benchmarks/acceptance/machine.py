"""What the machine gives, and how near a blocking save comes to it."""

from __future__ import annotations

import logging
import os
import time

import torch

from vembed_async_ckpt import AsyncCheckpointer, KeepLast

from .common import WAIT, Say, Setting


def run(setting: Setting, say: Say) -> None:
    warnings: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warnings.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("vembed_async_ckpt").addHandler(handler)
    about = {"torch": torch.__version__, "cores": os.cpu_count()}
    if setting.cuda:
        about |= {"gpu": torch.cuda.get_device_name(setting.device), "cuda": torch.version.cuda}
    say(machine=about)
    size = (8 << 20) if setting.tiny else (1 << 30)
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=setting.device)
    pinned = torch.empty(size, dtype=torch.uint8, pin_memory=setting.cuda)
    ceiling = _rate(setting, pinned, source)
    say(pinned_copy_GBps=ceiling, pageable_copy_GBps=_rate(setting, torch.ones(size, dtype=torch.uint8), source))
    del pinned
    for count in (1, 400):
        parts = [torch.nn.Parameter(part.clone(), requires_grad=False) for part in source.chunk(count)]
        model = torch.nn.ParameterList(parts)
        with AsyncCheckpointer(
            setting.directory / str(count), staging="blocking", retention=KeepLast(1)
        ) as checkpointer:
            begun = time.perf_counter()
            checkpointer.prewarm(model=model)
            checkpointer.wait(WAIT)
            say(**{f"prewarm_s_{count}": round(time.perf_counter() - begun, 3)})
            seconds = []
            for step in range(4):
                setting.synchronize()
                seconds.append(checkpointer.save(step, model=model).result(WAIT).timings.staging)
        say(**{f"blocking_save_GBps_{count}": round(size / min(seconds[1:]) / 1e9, 2)})
        if count == 1:
            say(share_of_pinned_copy=round(size / min(seconds[1:]) / 1e9 / ceiling, 3))
    say(warnings=warnings, pinned=not any("pinned" in line for line in warnings) if setting.cuda else None)


def _rate(setting: Setting, to: torch.Tensor, of: torch.Tensor) -> float:
    to.copy_(of, non_blocking=True)
    setting.synchronize()
    begun = time.perf_counter()
    for _ in range(4):
        to.copy_(of, non_blocking=True)
    setting.synchronize()
    return round(4 * of.nbytes / (time.perf_counter() - begun) / 1e9, 2)
