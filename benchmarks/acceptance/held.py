"""Whether `timings.held` tells what a clock on the device shows."""

from __future__ import annotations

import time

import torch

from vembed_async_ckpt import AsyncCheckpointer, KeepLast

from .common import WAIT, Say, Setting


def run(setting: Setting, say: Say) -> None:
    """A step right after save() is held by the copy: events around it measure the same as `held`."""
    size = (1 << 20) if setting.tiny else (256 << 20)
    model = torch.nn.ParameterList([torch.nn.Parameter(torch.ones(size, device=setting.device)) for _ in range(8)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for parameter in model:
        parameter.grad = torch.ones_like(parameter)
    seen, told = [], []
    with AsyncCheckpointer(setting.directory / "held", retention=KeepLast(1)) as checkpointer:
        checkpointer.prewarm(model=model, optimizer=optimizer)
        checkpointer.wait(WAIT)
        optimizer.step()
        for number in range(4):
            alone = _seconds(setting, optimizer)
            setting.synchronize()
            handle = checkpointer.save(number, model=model, optimizer=optimizer)
            held = _seconds(setting, optimizer) - alone
            timings = handle.result(WAIT).timings
            seen.append(held)
            told.append(timings.held)
            if setting.left() < 8:
                break
    say(seen_ms=[round(value * 1e3, 2) for value in seen], told_ms=[round(value * 1e3, 2) for value in told])
    if setting.cuda and not setting.tiny:
        say(truthful=all(abs(a - b) <= 0.3 * max(a, b) + 2e-3 for a, b in zip(seen[1:], told[1:], strict=True)))


def _seconds(setting: Setting, optimizer: torch.optim.Optimizer) -> float:
    if not setting.cuda:
        begun = time.perf_counter()
        optimizer.step()
        return time.perf_counter() - begun
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before.record()
    optimizer.step()
    after.record()
    after.synchronize()
    return float(before.elapsed_time(after)) / 1e3
