"""The asynchronous engines of others, each as its own documentation has it best on this device."""

from __future__ import annotations

import copy
import threading
from typing import Any, ClassVar

import torch
from torch import distributed
from torch.distributed import checkpoint
from torch.distributed.checkpoint.staging import BlockingAsyncStager, DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

from .engines import DEADLINE, Engine, Handle

dist: Any = distributed  # much of what is documented is not exported for type checkers
dcp: Any = checkpoint


class DcpSave(Engine):
    """torch.distributed.checkpoint, not in the background."""

    options: ClassVar[dict[str, Any]] = {"no_dist": True}

    def save(self, number: int) -> Handle:
        dcp.save(self.state.state_dict(), checkpoint_id=self.path(number), **self.options)
        return Handle()

    def load(self, number: int) -> None:
        into = self.state.state_dict()  # its tensors are the model's and the optimizer's own: loaded in place
        dcp.load(into, checkpoint_id=self.path(number), no_dist=True)


class Dcp(DcpSave):
    """async_save as it comes: staged in the call, written by a thread."""

    stager: Any = None

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
    """With buffers that are kept. Without an accelerator the stager cannot pin them, and is given them ready-made."""

    def prepare(self) -> None:
        self.stager = BlockingAsyncStager(cache_staged_state_dict=True)
        if self.state.device.type != "cuda":
            self.stager.state_dict_cache = copy.deepcopy(self.state.state_dict())


class DcpOverlap(Dcp):
    """Staged by a thread into buffers that are kept; the loop waits for it before the optimizer's step."""

    shared: ClassVar[bool] = False

    def prepare(self) -> None:
        cuda = self.state.device.type == "cuda"
        self.stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=cuda,
                use_shared_memory=self.shared or cuda,
                use_async_staging=True,
                use_non_blocking_copy=cuda,
            )
        )


class DcpProcess(DcpOverlap):
    """The same into shared memory, written by a process; this one needs a process group."""

    shared = True
    options: ClassVar[dict[str, Any]] = {"async_checkpointer_type": AsyncCheckpointerType.PROCESS}

    def prepare(self) -> None:
        super().prepare()
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)

    def close(self) -> None:
        super().close()
        dist.destroy_process_group()


class TorchCheckpointing(Engine):
    """Staged to shared memory, written by its own process; with the lock that its documentation asks for.

    No pinned memory without an accelerator (its troubleshooting page); no O_DIRECT, whose unaligned writes ext4 refuses.
    """

    def prepare(self) -> None:
        from torch_checkpointing import CheckpointManager, CheckpointStagerConfig
        from torch_checkpointing.checkpoint_writer import CheckpointWriterConfig
        from torch_checkpointing.config import AsyncCheckpointSaverConfig
        from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig

        cuda = self.state.device.type == "cuda"
        self.manager = CheckpointManager.Config(
            save=AsyncCheckpointSaverConfig(
                staging_config=CheckpointStagerConfig(use_pinned_memory=cuda, use_non_blocking_copy=cuda),
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

    def load(self, number: int) -> None:
        found = self.manager.load(self.path(number), into=self.state.state_dict())
        self.state.model.load_state_dict(found["model"])
        self.state.optimizer.load_state_dict(found["optimizer"])

    def close(self) -> None:
        self.manager.close()


class Torchsnapshot(Engine):
    def save(self, number: int) -> Handle:
        from torchsnapshot import Snapshot

        pending = Snapshot.async_take(self.path(number), self._app_state())
        return Handle(wait=lambda: pending.wait() and None, done=pending.done)

    def load(self, number: int) -> None:
        from torchsnapshot import Snapshot

        Snapshot(self.path(number)).restore(self._app_state())

    def _app_state(self) -> dict[str, Any]:
        return {"model": self.state.model, "optimizer": self.state.optimizer}


class Lightning(Engine):
    """The plugin as a Trainer calls it. It tells nobody when a save has ended, so the plugin under it does."""

    def prepare(self) -> None:
        from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
        from lightning.pytorch.plugins.io import AsyncCheckpointIO

        self.written = threading.Event()
        inner: Any = TorchCheckpointIO()
        save = inner.save_checkpoint

        def save_and_say(*arguments: Any, **options: Any) -> None:
            try:
                save(*arguments, **options)
            finally:
                self.written.set()

        inner.save_checkpoint = save_and_say
        self.plugin = AsyncCheckpointIO(inner)

    def save(self, number: int) -> Handle:
        self.written.clear()
        self.plugin.save_checkpoint(self.state.state_dict(), self.path(number) + "/state.ckpt")
        return Handle(wait=self._wait, done=self.written.is_set)

    def _wait(self) -> None:
        if not self.written.wait(DEADLINE):
            raise TimeoutError(f"AsyncCheckpointIO has not written its checkpoint within {DEADLINE:.0f} s")
        if self.plugin._error is not None:
            raise self.plugin._error

    def load(self, number: int) -> None:
        found = torch.load(self.path(number) + "/state.ckpt")
        self.state.model.load_state_dict(found["model"])
        self.state.optimizer.load_state_dict(found["optimizer"])

    def close(self) -> None:
        self.plugin.teardown()


KINDS: dict[str, type[Engine]] = {
    "dcp-save": DcpSave,
    "dcp": Dcp,
    "dcp-cached": DcpCached,
    "dcp-overlap": DcpOverlap,
    "dcp-process": DcpProcess,
    "torch_checkpointing": TorchCheckpointing,
    "torchsnapshot": Torchsnapshot,
    "lightning": Lightning,
}
