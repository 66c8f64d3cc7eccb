"""A program that uses the public surface, as a type checker sees it. It is checked, never run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from typing_extensions import assert_type

from vembed_async_ckpt import (
    AsyncCheckpointer,
    CheckpointEntry,
    CheckpointError,
    CheckpointInfo,
    Event,
    KeepBest,
    KeepEvery,
    KeepLast,
    Restored,
    SaveHandle,
    SaveState,
    StallMeter,
    StallReport,
    best,
    checkpoints,
    delete,
    latest,
    load,
    save_checkpoint,
)
from vembed_async_ckpt.policies import SavePolicy, before_time_limit, budget, every, on_best, on_request
from vembed_async_ckpt.shipping import push_to_hub, upload
from vembed_async_ckpt.sinks import ChromeTrace, JsonLines, Prometheus, TrackerSink


def on_event(event: Event) -> None:
    print(event.stage, event.phase, event.seconds + event.bytes)


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, accelerator: Any) -> None:
    keep = KeepLast(3) | KeepEvery(1000) | KeepBest("loss", mode="max", n=2)
    with AsyncCheckpointer("runs/one", retention=keep, when_busy="skip", sinks=[on_event]) as checkpointer:
        assert_type(checkpointer, AsyncCheckpointer)
        checkpointer.prewarm(model=model, optimizer=optimizer)
        handle = checkpointer.save(
            1, model={"query": model}, optimizer=optimizer, extra={"a": [1]}, metrics={"loss": 0.1}
        )
        assert_type(handle, SaveHandle)
        assert_type(handle.state, SaveState)
        assert_type(handle.path, Path)
        assert_type(handle.wait_staged(timeout=1.0), None)
        info = handle.result(timeout=60)
        assert_type(info, CheckpointInfo)
        assert_type(info.timings.stall + info.timings.durable, float)
        assert_type(handle.exception(), CheckpointError | None)
        checkpointer.wait()
    assert_type(save_checkpoint("runs/two/checkpoint-1", model, accelerator, config={"lr": 0.1}), SaveHandle)


def watch(accelerator: Any) -> None:
    AsyncCheckpointer(
        "runs/one",
        sinks=[TrackerSink(accelerator), Prometheus("a.prom"), JsonLines("a.jsonl"), ChromeTrace(Path("a.json"))],
    ).close()
    assert_type(list(JsonLines.read("a.jsonl")), list[Event])


def plan(model: torch.nn.Module) -> None:
    policy = every(steps=5) | every(minutes=1.5) | budget(percent=2) | on_request() | on_best("loss", mode="max")
    assert_type(policy, SavePolicy)
    with AsyncCheckpointer(
        "runs/one",
        policy=policy | before_time_limit(minutes=5, end=2e9),
        latest_link=True,
        max_unshipped=3,
        after_commit=[upload("s3://bucket/run"), push_to_hub("me/model", private=True), lambda info: print(info.path)],
    ) as checkpointer:
        assert_type(checkpointer.should_save(1), bool)
        assert_type(checkpointer.should_save(2, metrics={"loss": 0.5}), bool)


async def look(handle: SaveHandle) -> None:
    assert_type(await handle, CheckpointInfo)
    async with AsyncCheckpointer(Path("runs/one")) as checkpointer:
        async for event in checkpointer.events():
            on_event(event)


def resume(model: torch.nn.Module) -> int | None:
    path = latest("runs/one")
    assert_type(path, Path | str | None)  # a URL gives a URL
    assert_type(latest(Path("runs/one")), Path | None)
    if path is None:
        return 0
    restored = load(path, model=model, verify="full")
    assert_type(restored, Restored)
    for entry in checkpoints("runs/one"):
        assert_type(entry, CheckpointEntry)
        if not entry.complete:
            delete(entry.path)
    assert_type(best(Path("runs/one"), "loss", mode="min"), Path | None)
    return restored.step


def measure(step: int) -> StallReport:
    meter = StallMeter()
    with meter.step():
        pass
    return meter.report()
