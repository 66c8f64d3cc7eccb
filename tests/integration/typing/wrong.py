"""Mistakes that a type checker must find: one in each line that says so."""

from __future__ import annotations

from vembed_async_ckpt import AsyncCheckpointer, KeepBest, SaveHandle, best, load

AsyncCheckpointer("runs", when_busy="later")  # wrong
AsyncCheckpointer("runs", retention=3)  # wrong
KeepBest("loss", mode="median")  # wrong
best("runs", "loss", mode="median")  # wrong
load("runs/checkpoint-1", verify="some")  # wrong


def use(handle: SaveHandle) -> None:
    handle.result("soon")  # wrong
    handle.absent()  # wrong
