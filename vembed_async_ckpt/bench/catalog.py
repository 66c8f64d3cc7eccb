"""The engines by name: how each is configured, and what it leaves out. Loads none of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec

from .options import Refused


@dataclass(frozen=True)
class Listed:
    """`waits`: `save()` returns when the file is written, so that nothing runs beside training. `lacks`: what a checkpoint
    of this engine does not have when it says that it is there. `package`, `pip`: what has to be installed."""

    name: str
    title: str
    configuration: str
    lacks: str
    waits: bool = False
    package: str = ""
    pip: str = ""

    @property
    def installed(self) -> bool:
        return not self.package or find_spec(self.package) is not None

    @property
    def ours(self) -> bool:
        return self.name.startswith("ours")


_NO_SAFETY = "no fsync, no hash"
_DCP = "directory not synced, files in place, no hash"

ENGINES: dict[str, Listed] = {
    listed.name: listed
    for listed in (
        Listed("ours", "vembed-async-ckpt", "staging='overlap', writer='process', prewarmed", ""),
        Listed(
            "ours-blocking",
            "vembed-async-ckpt, blocking",
            "staging='blocking', writer='process', prewarmed",
            "",
        ),
        Listed(
            "ours-thread",
            "vembed-async-ckpt, thread",
            "staging='overlap', writer='thread', prewarmed",
            "a kill of the trainer loses staged saves",
        ),
        Listed(
            "original",
            "original sequence, synchronous",
            "save_file(weights), torch.save(optimizer), then the weights once more, as vembed's save_checkpoint does",
            f"nothing in the background, {_NO_SAFETY}, files in place; weights written twice",
            waits=True,
        ),
        Listed(
            "torch-save",
            "torch.save",
            "one call for model and optimizer",
            f"nothing in the background, {_NO_SAFETY}, file in place",
            waits=True,
        ),
        Listed(
            "safetensors",
            "safetensors.save_file",
            "one file of all tensors, optimizer's included",
            f"nothing in the background, {_NO_SAFETY}",
            waits=True,
        ),
        Listed(
            "dcp-save",
            "torch DCP save",
            "dcp.save, FileSystemWriter as it comes, no process group",
            f"nothing in the background, {_DCP}",
            waits=True,
        ),
        Listed("dcp", "torch DCP async_save", "as it comes: staged in the call, a thread writes", _DCP),
        Listed(
            "dcp-cached",
            "torch DCP, cached stager",
            "BlockingAsyncStager(cache_staged_state_dict=True), buffers made beforehand; a thread writes",
            _DCP,
        ),
        Listed(
            "dcp-overlap",
            "torch DCP, overlapping stager",
            "DefaultStager: staged by a thread into kept buffers, waited for before the step; a thread writes",
            _DCP,
        ),
        Listed(
            "dcp-process",
            "torch DCP, overlapping, process",
            "DefaultStager into shared memory; AsyncCheckpointerType.PROCESS writes; needs a process group",
            _DCP,
        ),
        Listed(
            "torch_checkpointing",
            "torch_checkpointing",
            "async saver, shared memory, prewarmed, its lock() around the step, two file threads; no O_DIRECT (ext4 refuses it)",
            f"{_NO_SAFETY}, files in place",
            package="torch_checkpointing",
            pip="torch-checkpointing",
        ),
        Listed(
            "torchsnapshot",
            "torchsnapshot async_take",
            "Snapshot.async_take of model and optimizer",
            f"{_NO_SAFETY}, files in place; CPU tensors are not copied: later steps get into the checkpoint",
            package="torchsnapshot",
            pip="torchsnapshot",
        ),
        Listed(
            "lightning",
            "Lightning AsyncCheckpointIO",
            "AsyncCheckpointIO(TorchCheckpointIO()): cloned in the call, a thread writes",
            f"{_NO_SAFETY}; queued saves hold a clone each, without bound",
            package="lightning",
            pip="lightning",
        ),
    )
}


def choose(names: Sequence[str], default: Sequence[str]) -> tuple[list[str], list[str]]:
    """(engines to run, engines that would be run were they installed), from what was asked for.

    No name means `default`; "all" all. Raises `Refused` for a name that does not exist, and for a missing package only where
    the engine was named itself.
    """
    wanted: list[str] = []
    for name in names or default:
        if name != "all" and name not in ENGINES:
            raise Refused(f"no engine {name!r}; there are {', '.join(ENGINES)}, and all")
        wanted += list(ENGINES) if name == "all" else [name]
    wanted = list(dict.fromkeys(wanted))
    missing = [name for name in wanted if not ENGINES[name].installed]
    for name in missing:
        if name in names:
            raise Refused(f"engine {name!r} is not installed: pip install {ENGINES[name].pip}")
    return [name for name in wanted if name not in missing], missing
