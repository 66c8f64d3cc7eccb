"""torch.distributed.checkpoint, in the ways its documentation has."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

from torch import distributed
from torch.distributed import checkpoint
from torch.distributed.checkpoint.staging import BlockingAsyncStager, DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

from ..engine import DEADLINE, Engine, Handle

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
            return Handle(wait=lambda: started.result(DEADLINE) and None)
        staging, upload = started.staging_completion, started.upload_completion
        return Handle(lambda: staging.result(DEADLINE), lambda: upload.result(DEADLINE) and None)

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
