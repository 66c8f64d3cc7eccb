"""Other libraries that save in the background, each as its own documentation has it best on this device."""

from __future__ import annotations

import os
import threading
import time
from typing import Any

import torch

from ..engine import DEADLINE, Engine, Handle


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
        return Handle(self._barrier, lambda: future.result(DEADLINE) and None)

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
        return Handle(wait=lambda: pending.wait() and None)

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
        return Handle(wait=self._wait)

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


class Moonclip(Engine):
    """Its defaults, which are lossless: copied in the call; a thread takes differences, compresses, writes and fsyncs.

    All checkpoints share one store of packs, from which its own retention deletes.
    """

    syncs = True

    def prepare(self) -> None:
        from moonclip import CheckpointManager

        self.manager = CheckpointManager(self.directory)

    def save(self, number: int) -> Handle:
        self.manager.save(step=number + 1, model=self.state.model, optimizer=self.state.optimizer)
        return Handle(wait=self.manager.flush)

    def load(self, number: int) -> None:
        self.manager.load_latest(model=self.state.model, optimizer=self.state.optimizer)

    def path(self, number: int) -> str:
        return self.directory

    def remove(self, number: int) -> None: ...


class Dlrover(Engine):
    """Flash checkpoint of DLRover, single process: copied to shared memory in the call, written by its saver process.

    Loaded from the file: what is in memory outlives a crash only under `dlrover-run`.
    """

    def prepare(self) -> None:
        os.environ.setdefault("DLROVER_LOG_LEVEL", "ERROR")
        from dlrover.trainer.torch.flash_checkpoint.checkpointer import StorageType
        from dlrover.trainer.torch.flash_checkpoint.ddp import DdpCheckpointer

        self.disk = StorageType.DISK
        self.checkpointer: Any = DdpCheckpointer(self.directory)
        self.tracker = os.path.join(self.directory, "dlrover_latest.txt")

    def file(self, number: int) -> str:
        return os.path.join(self.path(number), "rank_0.pt")

    def save(self, number: int) -> Handle:
        step = number + 1
        self.checkpointer.save_checkpoint(step, self.state.state_dict(), self.file(number), storage_type=self.disk)
        if self.checkpointer._engine.latest_step != step:
            raise RuntimeError(f"DLRover skipped the save of step {step}: the one before is still being written")
        return Handle(wait=lambda: self._wait(step))

    def _wait(self, step: int) -> None:
        """Until its tracker file names the step; its own wait looks only every 3 seconds."""
        end = time.monotonic() + DEADLINE
        while time.monotonic() < end:
            try:
                with open(self.tracker) as file:
                    if file.read() == str(step):
                        return
            except FileNotFoundError:
                pass  # it is written after the first checkpoint
            time.sleep(0.002)
        raise TimeoutError(f"DLRover has not written step {step} within {DEADLINE:.0f} s")

    def load(self, number: int) -> None:
        found = torch.load(self.file(number))
        self.state.model.load_state_dict(found["model"])
        self.state.optimizer.load_state_dict(found["optimizer"])

    def close(self) -> None:
        engine = self.checkpointer._engine
        engine.close()
        if engine.saver_proc is not None:
            engine.saver_proc.terminate()
            engine.saver_proc.join(5)
