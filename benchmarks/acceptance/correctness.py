"""Cases of training that goes on at once, behind 60 ms of work on the device: each checkpoint is the state at its call."""

from __future__ import annotations

import contextlib
import gc
import shutil
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from vembed_async_ckpt import AsyncCheckpointer, KeepLast, load

from .common import WAIT, Say, Setting, State, build, change, differing, quantiles, reference

Case = dict[str, Any]
After = Callable[[State, int], None]


def run(setting: Setting, say: Say) -> None:
    cases: dict[str, Case] = {}
    say(torn_copy_noticed=_torn_copy_noticed(setting))
    for name, case in _cases(setting).items():
        begun = time.monotonic()
        if setting.left() < 6:
            cases[name] = {"ok": None, "skipped": "no time is left"}
        else:
            try:
                cases[name] = case()
            except Exception as error:
                cases[name] = {"ok": False, "error": repr(error)[:500], "traceback": traceback.format_exc()[-700:]}
        cases[name]["seconds"] = round(time.monotonic() - begun, 2)
        gc.collect()
        say(cases=cases)


def _cases(setting: Setting) -> dict[str, Callable[[], Case]]:
    f32, bf16, f16 = torch.float32, torch.bfloat16, torch.float16

    def of(kind: str, dtype: torch.dtype = f32, **options: Any) -> Callable[[], Case]:
        return lambda: rounds(setting, kind, dtype, **options)

    cases = {
        "foreach": of("foreach"),
        "fused bf16": of("fused", bf16),
        "fused": of("fused"),
        "sgd fp16": of("sgd", f16),
        "blocking": of("foreach", staging="blocking"),
        "conjugate buffer": of("conj"),
        "tensor lr": of("tensor_lr"),
        "data swapped": of("foreach", after=_swap),
        "many saves": of("fused", bf16, count=8),
        "model deleted": lambda: _deleted(setting),
        "changed by hand": lambda: _by_hand(setting),
        "scaler": lambda: _scaler(setting),
        "random generators": lambda: _generators(setting),
    }
    if setting.cuda:
        cases |= {
            "capturable": of("capturable"),
            "own stream": of("fused", stream=torch.cuda.Stream()),
            "step on another stream": of("fused", after=_step_elsewhere),
            "graph replay": lambda: _graph_replay(setting),
        }
    return cases


def rounds(
    setting: Setting,
    kind: str,
    dtype: torch.dtype = torch.float32,
    *,
    staging: Any = "overlap",
    count: int = 3,
    after: After = change,
    stream: Any = None,
) -> Case:
    """Save, train on at once while the device is busy with what came before, compare."""
    state, fresh = build(setting, kind, dtype), build(setting, kind, dtype)
    step_calls: list[float] = []
    held: list[float] = []
    wrong: list[str] = []
    with contextlib.ExitStack() as stack:
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream())
            stack.enter_context(torch.cuda.stream(stream))
        root = stack.enter_context(_directory(setting))
        checkpointer = stack.enter_context(AsyncCheckpointer(root, staging=staging, retention=KeepLast(1)))
        change(state, 1)
        for number in range(count):
            setting.busy(60)
            expected = reference(state)
            setting.busy(60)
            handle = checkpointer.save(number, model=state[0], optimizer=state[1])
            begun = time.perf_counter()
            after(state, number + 2)
            step_calls.append(time.perf_counter() - begun)
            after(state, number + 3)
            info = handle.result(WAIT)
            held.append(info.timings.held)
            wrong += differing(info.path, expected, fresh)
        overlap = checkpointer.statistics()["overlap"]
    return {
        "ok": not wrong and overlap is (staging == "overlap"),
        "differs": wrong[:5],
        "overlap": overlap,
        "step_call_ms": quantiles(step_calls),
        "held_ms": quantiles(held),
    }


@contextlib.contextmanager
def _directory(setting: Setting) -> Any:
    root = setting.directory / "case"
    yield root
    shutil.rmtree(root, ignore_errors=True)


def _swap(state: State, number: int) -> None:
    """`p.data = new`, and its memory written over by whoever gets it."""
    for parameter in state[0].parameters():
        parameter.data = torch.full_like(parameter.data, float(number))
    device = next(state[0].parameters()).device
    junk = [torch.full((1 << 18,), 7.0, device=device) for _ in range(20)]
    del junk


def _step_elsewhere(state: State, number: int) -> None:
    other = torch.cuda.Stream()
    other.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(other):
        change(state, number)
    torch.cuda.current_stream().wait_stream(other)


def _torn_copy_noticed(setting: Setting) -> bool | None:
    """A step behind the hook's back while the copy is pending: the save fails, or the comparison sees it."""
    if not setting.cuda:
        return None
    state, fresh = build(setting, "fused"), build(setting, "fused")
    unhooked = type(state[1]).step.__wrapped__  # type: ignore[attr-defined]
    with _directory(setting) as root, AsyncCheckpointer(root, on_error="warn") as checkpointer:
        change(state, 1)
        expected = reference(state)
        setting.synchronize()
        setting.busy(150)
        handle = checkpointer.save(0, model=state[0], optimizer=state[1])
        with torch.cuda.stream(torch.cuda.Stream()):  # so that no wait of ours orders it
            change(state, 5, lambda: unhooked(state[1]))
        noticed = handle.exception(WAIT) is not None or bool(differing(handle.path, expected, fresh))
        setting.synchronize()
    return noticed


def _graph_replay(setting: Setting) -> Case:
    """The step inside a captured graph is replayed without its hook."""
    wrong: list[str] = []
    with _directory(setting) as root, AsyncCheckpointer(root, retention=KeepLast(1)) as checkpointer:
        state, fresh = build(setting, "capturable"), build(setting, "capturable")
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            change(state, 2)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            change(state, 3)
        for number in range(4):
            expected = reference(state)
            setting.busy(60)
            handle = checkpointer.save(number, model=state[0], optimizer=state[1])
            graph.replay()
            wrong += differing(handle.result(WAIT).path, expected, fresh)
    return {"ok": not wrong, "differs": wrong[:5]}


def _deleted(setting: Setting) -> Case:
    wrong: list[str] = []
    with _directory(setting) as root, AsyncCheckpointer(root) as checkpointer:
        for number in range(2):
            state = build(setting, "fused")
            change(state, 1)
            expected = reference(state)
            setting.busy(100)
            handle = checkpointer.save(number, model=state[0], optimizer=state[1])
            del state
            gc.collect()
            junk = [torch.full((1 << 16,), 7.0, device=setting.device) for _ in range(100)]
            del junk
            wrong += differing(handle.result(WAIT).path, expected, build(setting, "fused"))
    return {"ok": not wrong, "differs": wrong[:5]}


def _by_hand(setting: Setting) -> Case:
    """A weight is changed while it is copied, without any optimizer: the save fails, or is right."""
    outcomes = {"failed": 0, "right": 0, "torn": 0}
    with _directory(setting) as root, AsyncCheckpointer(root, on_error="warn") as checkpointer:
        state = build(setting, "fused")
        change(state, 1)
        for number in range(3):
            expected = reference(state)
            setting.busy(80)
            handle = checkpointer.save(number, model=state[0], optimizer=state[1])
            with torch.no_grad():
                state[0].layers[0].weight.add_(1)
            if handle.exception(WAIT) is not None:
                outcomes["failed"] += 1
            else:
                torn = differing(handle.path, expected, build(setting, "fused"))
                outcomes["torn" if torn else "right"] += 1
    return {"ok": outcomes["torn"] == 0, **outcomes}


def _scaler(setting: Setting) -> Case:
    """The scaler comes back, and save() does not wait for 60 ms of the device's work to read it."""
    kind = setting.device.partition(":")[0]
    scaler = torch.amp.GradScaler(kind, init_scale=256.0)
    scaler.scale(torch.ones((), device=setting.device))
    expected = scaler.state_dict()
    calls = []
    with _directory(setting) as root, AsyncCheckpointer(root, retention=KeepLast(1)) as checkpointer:
        state = build(setting, "fused")
        change(state, 1)
        for number in range(3):
            setting.busy(60)
            begun = time.perf_counter()
            handle = checkpointer.save(number, model=state[0], optimizer=state[1], scaler=scaler)
            calls.append(time.perf_counter() - begun)
            path = handle.result(WAIT).path
        fresh = torch.amp.GradScaler(kind, init_scale=2.0)
        load(path, scaler=fresh)
    waited = setting.cuda and min(calls[1:]) > 0.04
    return {"ok": fresh.state_dict() == expected and not waited, "call_ms": quantiles(calls)}


def _generators(setting: Setting) -> Case:
    with _directory(setting) as root, AsyncCheckpointer(root) as checkpointer:
        state = build(setting, "fused")
        path: Path = checkpointer.save(1, model=state[0], optimizer=state[1]).result(WAIT).path
        drawn = torch.rand(5, device=setting.device)
        load(path, model=state[0], optimizer=state[1])
        return {"ok": bool(torch.equal(torch.rand(5, device=setting.device), drawn))}
