"""The engines themselves, one small class each, configured as `catalog` says.

    engine = create(name, directory, state)     prepared: buffers allocated and processes started where that can be asked for
    handle = engine.save(number)                what the training loop calls
    handle.barrier()                            what it calls before `optimizer.step()`
    handle.wait()                               until the engine says that the checkpoint is written
    engine.load(number)                         into the model and the optimizer of `state`, in place
    engine.close()

All timing is done by the caller, the same for all. `peers` has the asynchronous ones of others.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file, save_file

from vembed_async_ckpt import AsyncCheckpointer, CheckpointInfo, load

from .catalog import ENGINES
from .state import State

DEADLINE = 600.0


@dataclass
class Handle:
    """A save under way. `wait` returns what the engine knows of it, if anything."""

    barrier: Callable[[], object] = lambda: None
    wait: Callable[[], CheckpointInfo | None] = lambda: None
    done: Callable[[], bool] = lambda: True


class Engine:
    """`syncs`: whether everything has been fsynced when it calls a checkpoint written."""

    syncs: ClassVar[bool] = False

    def __init__(self, directory: str, state: State) -> None:
        self.directory = directory
        self.state = state
        os.makedirs(directory, exist_ok=True)
        self.prepare()

    def prepare(self) -> None: ...

    def save(self, number: int) -> Handle:
        raise NotImplementedError

    def load(self, number: int) -> None:
        raise NotImplementedError

    def close(self) -> None: ...

    def path(self, number: int) -> str:
        return os.path.join(self.directory, f"checkpoint-{number}")

    def remove(self, number: int) -> None:
        """Make room; the benchmark calls it outside all timing."""
        with suppress(FileNotFoundError):
            shutil.rmtree(self.path(number))


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
        return Handle(wait=lambda: handle.result(DEADLINE), done=handle.done)  # the barrier is a hook of the optimizer

    def load(self, number: int) -> None:
        load(self.path(number), **self.arguments)

    def close(self) -> None:
        self.checkpointer.close()


class OursBlocking(Ours):
    options: ClassVar[dict[str, Any]] = {"staging": "blocking"}


class OursThread(Ours):
    options: ClassVar[dict[str, Any]] = {"writer": "thread"}


class Original(Engine):
    """What vembed's `save_checkpoint` does, without accelerate: its `save_state` writes weights and optimizer, then
    `save_pretrained` the weights again, to the same file."""

    def save(self, number: int) -> Handle:
        path = self.path(number)
        os.makedirs(path)
        self._weights(path)
        torch.save(self.state.optimizer.state_dict(), os.path.join(path, "optimizer.bin"))
        self._weights(path)
        return Handle()

    def _weights(self, path: str) -> None:
        model: Any = self.state.model
        if hasattr(model, "save_pretrained"):
            model.save_pretrained(path)
        else:
            save_file(model.state_dict(), os.path.join(path, "model.safetensors"))

    def load(self, number: int) -> None:
        path = self.path(number)
        weights = load_file(os.path.join(path, "model.safetensors"))
        self.state.model.load_state_dict(weights, strict=False)  # of tied weights one name is in the file
        self.state.optimizer.load_state_dict(torch.load(os.path.join(path, "optimizer.bin")))


class TorchSave(Engine):
    def file(self, number: int) -> str:
        return os.path.join(self.path(number), "state.pt")

    def save(self, number: int) -> Handle:
        os.makedirs(self.path(number))
        torch.save(self.state.state_dict(), self.file(number))
        return Handle()

    def load(self, number: int) -> None:
        found = torch.load(self.file(number))
        self.state.model.load_state_dict(found["model"])
        self.state.optimizer.load_state_dict(found["optimizer"])


class Safetensors(Engine):
    def file(self, number: int) -> str:
        return os.path.join(self.path(number), "model.safetensors")

    def save(self, number: int) -> Handle:
        os.makedirs(self.path(number))
        flat = self.state.flat()
        once = {tensor.data_ptr() or id(tensor): name for name, tensor in reversed(flat.items())}
        save_file({name: flat[name].contiguous() for name in once.values()}, self.file(number))
        return Handle()

    def load(self, number: int) -> None:
        found, flat = load_file(self.file(number)), self.state.flat()
        with torch.no_grad():
            for name, tensor in found.items():
                flat[name].copy_(tensor)


def create(name: str, directory: str, state: State) -> Engine:
    """The engine of that name. What it imports beyond torch is imported here."""
    from . import peers

    kinds: dict[str, type[Engine]] = {
        "ours": Ours,
        "ours-blocking": OursBlocking,
        "ours-thread": OursThread,
        "original": Original,
        "torch-save": TorchSave,
        "safetensors": Safetensors,
        **peers.KINDS,
    }
    assert set(kinds) == set(ENGINES)
    return kinds[name](directory, state)
