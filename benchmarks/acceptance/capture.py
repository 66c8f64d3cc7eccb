"""Graphs recorded in torch's default mode, which forbids much to other threads: beside saves, and beside pinning."""

from __future__ import annotations

import time

import torch

from vembed_async_ckpt import AsyncCheckpointer, KeepLast

from .common import WAIT, Say, Setting, build, change


def run(setting: Setting, say: Say) -> None:
    values = torch.zeros(1 << 20, device=setting.device)
    errors: dict[str, list[str]] = {"captures beside saves": [], "saves": [], "captures beside pinning": []}

    def capture(hold: float, where: str) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                graph.capture_begin()  # without the synchronization that torch.cuda.graph begins with
                try:
                    values.add_(1)
                    time.sleep(hold)
                    values.add_(1)
                finally:
                    graph.capture_end()
            graph.replay()
        except RuntimeError as error:
            errors[where].append(str(error)[:200])

    state = build(setting, "foreach")
    with AsyncCheckpointer(setting.directory / "a", on_error="warn", retention=KeepLast(1)) as checkpointer:
        change(state, 1)
        checkpointer.save(0, model=state[0], optimizer=state[1]).result(WAIT)
        for number in range(1, 11):
            setting.synchronize()
            setting.busy(20 if number % 2 else 0)
            handle = checkpointer.save(number, model=state[0], optimizer=state[1])
            time.sleep((number % 4) * 0.002)
            capture(0.05, "captures beside saves")
            if (error := handle.exception(WAIT)) is not None:
                errors["saves"].append(str(error)[:200])
        say(errors=errors)
    big = torch.nn.ParameterList([torch.nn.Parameter(torch.zeros(64 << 20, device=setting.device)) for _ in range(8)])
    with AsyncCheckpointer(setting.directory / "b", on_error="warn") as checkpointer:
        checkpointer.prewarm(model=big)
        for _ in range(15):
            capture(0.1, "captures beside pinning")
        checkpointer.wait(WAIT)
    say(errors=errors, ok=not any(errors.values()))
