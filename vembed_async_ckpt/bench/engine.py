"""What an engine is to the benchmark. All timing is done by the measures, the same for every engine.

    engine = create(name, directory, state)     prepared: buffers allocated and processes started where that can be asked for
    handle = engine.save(number)                what the training loop calls
    handle.barrier()                            what it calls before `optimizer.step()`
    handle.wait()                               until the engine says that the checkpoint is written; called by another thread
    engine.load(number)                         into the model and the optimizer of `state`, in place
    engine.close()

An engine of one's own is a subclass of `Engine` with `save` and `load`: `vembed-ckpt bench --engine my_module:MyEngine`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from typing import ClassVar

from vembed_async_ckpt import CheckpointInfo

from .catalog import listed
from .options import Refused
from .state import State

DEADLINE = 600.0


@dataclass
class Handle:
    """A save under way. `wait` returns what the engine knows of it, if anything. An engine that waits in `save` needs none
    of it."""

    barrier: Callable[[], object] = lambda: None
    wait: Callable[[], CheckpointInfo | None] = lambda: None


class Engine:
    """`syncs`: whether everything has been fsynced when it calls a checkpoint written; else the benchmark syncs it and
    counts the time.

    `lacks`: what a checkpoint of this engine does not have when the engine says that it is there; shown with the results.
    """

    syncs: ClassVar[bool] = False
    lacks: ClassVar[str] = ""

    def __init__(self, directory: str, state: State) -> None:
        """`state` has `model`, `optimizer` and `state_dict()`; `directory` is empty and the engine's own."""
        self.directory = directory
        self.state = state
        os.makedirs(directory, exist_ok=True)
        self.prepare()

    def prepare(self) -> None:
        """Allocate what can be allocated before the first save."""

    def save(self, number: int) -> Handle:
        """Save the state as checkpoint `number`."""
        raise NotImplementedError

    def load(self, number: int) -> None:
        """Load checkpoint `number`, the newest one, into the model and the optimizer."""
        raise NotImplementedError

    def close(self) -> None:
        """End what `prepare` and `save` started."""

    def path(self, number: int) -> str:
        """The directory of checkpoint `number`."""
        return os.path.join(self.directory, f"checkpoint-{number}")

    def remove(self, number: int) -> None:
        """Delete checkpoint `number`; the benchmark calls it outside all timing."""
        with suppress(FileNotFoundError):
            shutil.rmtree(self.path(number))


def kind_of(name: str) -> type[Engine]:
    """The class behind a name of the catalog or behind "module:Class". Raises `Refused` if it is no engine."""
    module, _, attribute = listed(name).target.partition(":")
    try:
        kind = getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise Refused(f"--engine {name}: {error}") from error
    if not (isinstance(kind, type) and issubclass(kind, Engine)):
        raise Refused(f"--engine {name}: {attribute} is not a subclass of vembed_async_ckpt.bench.Engine")
    return kind


def create(name: str, directory: str, state: State) -> Engine:
    """The engine of that name. What it imports beyond torch is imported here."""
    return kind_of(name)(directory, state)
