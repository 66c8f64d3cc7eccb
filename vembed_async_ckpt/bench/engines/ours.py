"""This library, in its modes."""

from __future__ import annotations

from typing import Any, ClassVar

from vembed_async_ckpt import AsyncCheckpointer, load

from ..engine import DEADLINE, Engine, Handle


class Ours(Engine):
    syncs = True
    options: ClassVar[dict[str, Any]] = {"staging": "overlap"}

    def prepare(self) -> None:
        self.checkpointer = AsyncCheckpointer(self.directory, **self.options)
        self.arguments: dict[str, Any] = {"model": self.state.model, "optimizer": self.state.optimizer}
        self.checkpointer.prewarm(**self.arguments)
        self.checkpointer.wait(DEADLINE)

    def save(self, number: int) -> Handle:
        handle = self.checkpointer.save(number, **self.arguments)
        return Handle(wait=lambda: handle.result(DEADLINE))  # the barrier is a hook of the optimizer

    def load(self, number: int) -> None:
        load(self.path(number), **self.arguments)

    def close(self) -> None:
        self.checkpointer.close()


class OursBlocking(Ours):
    options: ClassVar[dict[str, Any]] = {"staging": "blocking"}


class OursThread(Ours):
    options: ClassVar[dict[str, Any]] = {"writer": "thread"}
