"""What is compared: one small class per way of saving, each configured as its own documentation has it best for a CPU.

    engine = SomeEngine(directory, state)       prepared: buffers allocated and processes started where that can be asked for
    handle = engine.save(number)                what the training loop calls
    handle.barrier()                            what it calls before `optimizer.step()`
    handle.wait()                               until the engine says that the checkpoint is written
    engine.close()

All timing is done by the caller, the same for all.
"""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch.distributed.checkpoint.staging import BlockingAsyncStager, DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

from vembed_async_ckpt import AsyncCheckpointer, CheckpointInfo

DEADLINE = 600.0


class State:
    """What is saved: `tensors` float32 tensors of together `megabytes` MiB, owned by an optimizer that has stepped once.

    "weights": parameters alone. "adamw": a third of them parameters, the rest what AdamW keeps for them.
    Later steps find no gradients and change nothing, but they pass through torch's hooks as any step does.
    """

    def __init__(self, kind: str, megabytes: int, tensors: int = 300) -> None:
        self.kind = kind
        owned = tensors if kind == "weights" else tensors // 3
        columns = 1024
        rows = max(1, round(megabytes * 2**20 / tensors / 4 / columns))
        self.model = torch.nn.Module()
        for n in range(owned):
            self.model.register_parameter(f"layer{n:03}", torch.nn.Parameter(torch.rand(rows, columns)))
        parameters = self.model.parameters()
        self.optimizer: torch.optim.Optimizer
        if kind == "weights":
            self.optimizer = torch.optim.SGD(parameters, lr=0.0)
        else:
            self.optimizer = torch.optim.AdamW(parameters, lr=1e-3)
            for parameter in self.model.parameters():
                parameter.grad = torch.full_like(parameter, 1e-3)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        """As a training loop hands it to a peer, made anew for each save."""
        state = {"model": self.model.state_dict()}
        return state if self.kind == "weights" else state | {"optimizer": self.optimizer.state_dict()}

    def tensors(self) -> list[torch.Tensor]:
        moments = [t for s in self.optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor)]
        return [p.detach() for p in self.model.parameters()] + moments

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors())


@dataclass
class Handle:
    """A save under way. `wait` returns what the engine knows of it, if anything."""

    barrier: Callable[[], object] = lambda: None
    wait: Callable[[], CheckpointInfo | None] = lambda: None
    done: Callable[[], bool] = lambda: True


class Engine:
    """`syncs`: what has been fsynced when it calls a checkpoint written: "all", "files" (no directory) or "nothing"."""

    name: ClassVar[str]
    syncs: ClassVar[str] = "nothing"

    def __init__(self, directory: str, state: State) -> None:
        self.directory = directory
        self.state = state
        os.makedirs(directory, exist_ok=True)
        self.prepare()

    def prepare(self) -> None: ...

    def save(self, number: int) -> Handle:
        raise NotImplementedError

    def close(self) -> None: ...

    def path(self, number: int) -> str:
        return os.path.join(self.directory, f"checkpoint-{number}")

    def remove(self, number: int) -> None:
        """Make room; the benchmark calls it outside all timing."""
        with suppress(FileNotFoundError):
            shutil.rmtree(self.path(number))


class Nothing(Engine):
    """The floor of the measurement: no save at all."""

    name = "no save"

    def save(self, number: int) -> Handle:
        return Handle()


class Ours(Engine):
    name = "ours, overlap"
    syncs = "all"
    staging: ClassVar[Any] = "overlap"

    def prepare(self) -> None:
        self.checkpointer = AsyncCheckpointer(self.directory, staging=self.staging)
        self.arguments: dict[str, Any] = {"model": self.state.model}
        if self.state.kind == "adamw":
            self.arguments["optimizer"] = self.state.optimizer
        self.checkpointer.prewarm(**self.arguments)
        self.checkpointer.wait(DEADLINE)

    def save(self, number: int) -> Handle:
        handle = self.checkpointer.save(number, **self.arguments)
        return Handle(wait=lambda: handle.result(DEADLINE), done=handle.done)  # the barrier is a hook of the optimizer

    def close(self) -> None:
        self.checkpointer.close()


class OursBlocking(Ours):
    name = "ours, blocking"
    staging = "blocking"


class TorchCheckpointing(Engine):
    """Async, staged to shared memory, written by its own process; with the lock that its documentation asks for.

    No pinned memory without an accelerator (its troubleshooting page); no O_DIRECT, whose unaligned writes ext4 refuses.
    """

    name = "torch_checkpointing"

    def prepare(self) -> None:
        from torch_checkpointing import CheckpointManager, CheckpointStagerConfig
        from torch_checkpointing.checkpoint_writer import CheckpointWriterConfig
        from torch_checkpointing.config import AsyncCheckpointSaverConfig
        from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig

        self.manager = CheckpointManager.Config(
            save=AsyncCheckpointSaverConfig(
                staging_config=CheckpointStagerConfig(use_pinned_memory=False, use_non_blocking_copy=False),
                writer_config=CheckpointWriterConfig(file_write_max_threads=2),
            ),
            storage_config=LocalFileSystemStorageConfig(use_direct_io=False),
        ).build()
        self.manager.prewarm_staging(self.state.state_dict())

    def save(self, number: int) -> Handle:
        future = self.manager.save(self.path(number), self.state.state_dict())
        assert future is not None
        return Handle(self._barrier, lambda: future.result(DEADLINE) and None, future.done)

    def _barrier(self) -> None:
        with self.manager.lock():
            pass

    def close(self) -> None:
        self.manager.close()


class Dcp(Engine):
    """torch.distributed.checkpoint.async_save as it comes: staged in the call, written by a thread."""

    name = "DCP default"
    syncs = "files"
    stager: Any = None
    options: ClassVar[dict[str, Any]] = {"no_dist": True}

    def save(self, number: int) -> Handle:
        started: Any = dcp.async_save(
            self.state.state_dict(), checkpoint_id=self.path(number), async_stager=self.stager, **self.options
        )
        if self.stager is None or isinstance(self.stager, BlockingAsyncStager):
            return Handle(wait=lambda: started.result(DEADLINE) and None, done=started.done)
        staging, upload = started.staging_completion, started.upload_completion
        return Handle(
            lambda: staging.result(DEADLINE), lambda: upload.result(DEADLINE) and None, lambda: bool(upload.done())
        )

    def close(self) -> None:
        if self.stager is not None:
            self.stager.close()


class DcpCached(Dcp):
    """With buffers that are kept. The stager would pin them, which needs an accelerator: it is given them ready-made."""

    name = "DCP cached"

    def prepare(self) -> None:
        self.stager = BlockingAsyncStager(cache_staged_state_dict=True)
        self.stager.state_dict_cache = copy.deepcopy(self.state.state_dict())


class DcpOverlap(Dcp):
    """Staged by a thread into buffers that are kept; the loop waits for it before the optimizer's step."""

    name = "DCP overlap"

    def prepare(self) -> None:
        self.stager = DefaultStager(StagingOptions(False, False, True, False))


class DcpProcess(Dcp):
    """The same into shared memory, written by a process; this one needs a process group."""

    name = "DCP process"
    options: ClassVar[dict[str, Any]] = {"async_checkpointer_type": AsyncCheckpointerType.PROCESS}

    def prepare(self) -> None:
        self.stager = DefaultStager(StagingOptions(False, True, True, False))
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)

    def close(self) -> None:
        super().close()
        dist.destroy_process_group()


class SafetensorsFile(Engine):
    """The synchronous call."""

    name = "safetensors"

    def save(self, number: int) -> Handle:
        os.makedirs(self.path(number))
        state = self.state.state_dict()
        tensors = dict(state["model"])
        for key, values in state.get("optimizer", {"state": {}})["state"].items():
            tensors |= {f"optimizer.{key}.{name}": value for name, value in values.items()}
        save_file(tensors, os.path.join(self.path(number), "model.safetensors"))
        return Handle()


ENGINES: dict[str, type[Engine]] = {
    "none": Nothing,
    "ours": Ours,
    "ours-blocking": OursBlocking,
    "torch_checkpointing": TorchCheckpointing,
    "dcp": Dcp,
    "dcp-cached": DcpCached,
    "dcp-overlap": DcpOverlap,
    "dcp-process": DcpProcess,
    "safetensors": SafetensorsFile,
}
