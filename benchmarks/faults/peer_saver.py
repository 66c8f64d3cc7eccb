"""One state saved and loaded the way each library is used. Runs in children of a nursery with torch loaded.

Every number of save `n` is `n`. `save` says BEGIN, then SAVED or FAILED; `find` says LOADED, BROKEN or NOTHING for what a user of
that library would find, and USABLE for the newest checkpoint that loads at all (0: none).
"""

from __future__ import annotations

import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

import anyio._backends._asyncio  # noqa: F401  (so that no child has to)
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration

import vembed_async_ckpt

FLOATS = 1 << 16  # per tensor: 1.5 MB in all
_NAME = "checkpoint"


class State:
    """A model of three tensors and an optimizer with as many."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self.model = torch.nn.Module()
        for name in ("a", "b", "c"):
            self.model.register_parameter(name, torch.nn.Parameter(torch.zeros(FLOATS)))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1.0, momentum=0.5)
        for parameter in self.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()

    def fill(self, n: int) -> None:
        with torch.no_grad():
            for tensor in self._tensors():
                tensor.fill_(n)

    def number(self, with_optimizer: bool) -> int:
        """Which save this is; asserts that all numbers agree."""
        found = {float(x) for tensor in self._tensors()[: 6 if with_optimizer else 3] for x in tensor.aminmax()}
        assert len(found) == 1, f"wrong contents: {sorted(found)[:5]}"
        return int(found.pop())

    def _tensors(self) -> list[torch.Tensor]:
        states = self.optimizer.state.values()
        return [*self.model.parameters(), *(state["momentum_buffer"] for state in states)]

    def dictionary(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def take(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])


# -- the libraries: `save(path)` returns when the library says that it is saved; `load(path)`


class TorchSave:
    with_optimizer = True

    def __init__(self, root: str, state: State, **_: Any) -> None:
        self.state = state

    def save(self, n: int, path: str) -> None:
        os.makedirs(path, exist_ok=True)
        torch.save(self.state.dictionary(), os.path.join(path, "state.pt"))

    def load(self, path: str) -> None:
        self.state.take(torch.load(os.path.join(path, "state.pt")))

    def close(self) -> None: ...


class Safetensors(TorchSave):
    with_optimizer = False

    def save(self, n: int, path: str) -> None:
        os.makedirs(path, exist_ok=True)
        safetensors.torch.save_file(self.state.model.state_dict(), os.path.join(path, "model.safetensors"))

    def load(self, path: str) -> None:
        self.state.model.load_state_dict(safetensors.torch.load_file(os.path.join(path, "model.safetensors")))


class Distributed(TorchSave):
    def save(self, n: int, path: str) -> None:
        dcp.save(self.state.dictionary(), checkpoint_id=path)

    def load(self, path: str) -> None:
        state = self.state.dictionary()
        dcp.load(state, checkpoint_id=path)
        self.state.take(state)


class DistributedAsync(Distributed):
    def save(self, n: int, path: str) -> None:
        dcp.async_save(self.state.dictionary(), checkpoint_id=path).result()  # type: ignore[union-attr]


class Accelerate(TorchSave):
    def __init__(self, root: str, state: State, **_: Any) -> None:
        self.state = state
        self.accelerator = Accelerator(cpu=True, project_config=ProjectConfiguration(project_dir=root))
        state.model, state.optimizer = self.accelerator.prepare(state.model, state.optimizer)

    def save(self, n: int, path: str) -> None:
        self.accelerator.save_state(path)

    def load(self, path: str) -> None:
        self.accelerator.load_state(path)


class Ours(TorchSave):
    def __init__(self, root: str, state: State, writer: str = "process", saves: bool = True) -> None:
        self.state = state
        self.checkpointer = vembed_async_ckpt.AsyncCheckpointer(root, writer=writer) if saves else None  # type: ignore

    def save(self, n: int, path: str) -> None:
        assert self.checkpointer is not None
        step = int(path.rpartition("-")[2])
        self.checkpointer.save(step, model=self.state.model, optimizer=self.state.optimizer).result(100)

    def load(self, path: str) -> None:
        vembed_async_ckpt.load(path, model=self.state.model, optimizer=self.state.optimizer)

    def close(self) -> None:
        if self.checkpointer is not None:
            self.checkpointer.close(100)


LIBRARIES: dict[str, type[TorchSave]] = {
    "torch.save": TorchSave,
    "safetensors save_file": Safetensors,
    "DCP save": Distributed,
    "DCP async_save": DistributedAsync,
    "accelerate save_state": Accelerate,
    "vembed_async_ckpt": Ours,
}


def save(
    talk: Any, library: str, root: str, numbers: list[int], again: bool, wait: bool = False, **options: Any
) -> None:
    """Make these saves: each in a new directory, or all `again` in the same one."""
    warnings.simplefilter("ignore")
    os.makedirs(root, exist_ok=True)
    state = State()
    it = LIBRARIES[library](root, state, **options)
    talk.say("READY")
    if wait:
        talk.listen()
    for n in numbers:
        state.fill(n)
        talk.say(f"BEGIN {n}")
        try:
            it.save(n, os.path.join(root, f"{_NAME}-{1 if again else n}"))
        except BaseException as error:  # DCP's CheckpointException is no Exception
            talk.say(f"FAILED {n} {type(error).__name__}: {str(error)[:300]}")
        else:
            talk.say(f"SAVED {n}")
    if wait:
        talk.say("ALL")
        talk.listen()
    try:
        it.close()
    except Exception as error:
        talk.say(f"FAILED close {type(error).__name__}: {str(error)[:300]}")
    os._exit(0)


def find(talk: Any, library: str, root: str) -> None:
    """What is found: the directory with the highest number, for ours what `latest` says; then the newest that loads at all."""
    warnings.simplefilter("ignore")
    state = State()
    it = LIBRARIES[library](root, state, **({"saves": False} if library == "vembed_async_ckpt" else {}))
    there = sorted(Path(root).glob(f"{_NAME}-*"), key=lambda path: int(path.name.rpartition("-")[2]))

    def number(path: Path) -> int:
        state.fill(-1)
        it.load(str(path))
        return state.number(it.with_optimizer)

    newest = None
    try:
        newest = vembed_async_ckpt.latest(root) if library == "vembed_async_ckpt" else there[-1] if there else None
        talk.say(f"LOADED {number(newest)}" if newest else "NOTHING there")
    except BaseException as error:
        talk.say(f"BROKEN {newest and newest.name}: {type(error).__name__}: {str(error)[:300]}")
    usable = 0
    for path in there:
        try:
            usable = max(usable, number(path))
        except BaseException:
            continue
    talk.say(f"USABLE {usable}")
    os._exit(0)


def _warm() -> None:
    """What is imported at the first use is imported once, before any fork: the optimizer, DCP, what ours resolves lazily."""
    state = State()
    with tempfile.TemporaryDirectory() as directory:
        for library in LIBRARIES.values():
            if library not in (DistributedAsync, Ours):  # they start threads
                it = library(directory, state)
                path = os.path.join(directory, library.__name__)
                it.save(1, path)
                it.load(path)
    for name in vembed_async_ckpt.__all__:
        getattr(vembed_async_ckpt, name)


warnings.simplefilter("ignore")
_warm()
