"""The engines by name: how each is configured, and what it leaves out. Loads none of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec

from .options import DISK, Refused

_HERE = __name__.rpartition(".")[0]


@dataclass(frozen=True)
class Listed:
    """`lacks`: what a checkpoint of this engine does not have when it says that it is there. `waits`: `save()` returns
    when the file is written, so that nothing runs beside training. `target`: "module:Class". `package`, `pip`: what has to
    be installed."""

    name: str
    title: str
    configuration: str
    lacks: str
    target: str
    waits: bool = False
    package: str = ""
    pip: str = ""

    @property
    def installed(self) -> bool:
        return not self.package or find_spec(self.package) is not None

    @property
    def ours(self) -> bool:
        return self.name.startswith("ours")


def _ours(name: str, title: str, kind: str, configuration: str, lacks: str = "") -> Listed:
    return Listed(name, title, configuration, lacks, f"{_HERE}.engines.ours:{kind}")


def _waiting(name: str, title: str, kind: str, configuration: str, lacks: str) -> Listed:
    lacks = f"nothing in the background, {lacks}"
    return Listed(name, title, configuration, lacks, f"{_HERE}.engines.waiting:{kind}", waits=True)


def _dcp(name: str, title: str, kind: str, configuration: str, *, waits: bool = False) -> Listed:
    lacks = "nothing in the background, " * waits + "directory not synced, files in place, no hash"
    return Listed(name, title, configuration, lacks, f"{_HERE}.engines.dcp:{kind}", waits)


def _background(title: str, kind: str, configuration: str, lacks: str, package: str, pip: str = "") -> Listed:
    target = f"{_HERE}.engines.background:{kind}"
    return Listed(package, title, configuration, lacks, target, package=package, pip=pip or package)


_NO_SAFETY = "no fsync, no hash"
_DLROVER = "pynvml deprecated wrapt grpcio tornado protobuf requests urllib3 idna certifi charset-normalizer"

ENGINES: dict[str, Listed] = {
    listed.name: listed
    for listed in (
        _ours("ours", "vembed-async-ckpt", "Ours", "staging='overlap', writer='process', prewarmed"),
        _ours(
            "ours-blocking", "ours in blocking mode", "OursBlocking", "staging='blocking', writer='process', prewarmed"
        ),
        _ours(
            "ours-thread",
            "ours with a thread",
            "OursThread",
            "staging='overlap', writer='thread', prewarmed",
            "a kill of the trainer loses staged saves",
        ),
        _waiting(
            "original",
            "vembed's own",
            "Original",
            "save_file(weights), torch.save(optimizer), then the weights once more, as vembed's save_checkpoint does",
            f"{_NO_SAFETY}, files in place; weights written twice",
        ),
        _waiting(
            "torch-save", "torch.save", "TorchSave", "one call for model and optimizer", f"{_NO_SAFETY}, file in place"
        ),
        _waiting(
            "safetensors",
            "safetensors",
            "Safetensors",
            "save_file: one file of all tensors, optimizer's included",
            _NO_SAFETY,
        ),
        _waiting(
            "accelerate",
            "accelerate",
            "Accelerate",
            "Accelerator.save_state of model and optimizer, safetensors",
            f"{_NO_SAFETY}, files in place",
        ),
        _waiting(
            "trainer",
            "HF Trainer",
            "HuggingFaceTrainer",
            "transformers' Trainer at a save step: model.safetensors, optimizer.pt, scheduler, random states",
            f"{_NO_SAFETY}, files in place",
        ),
        _dcp("dcp-save", "DCP save", "DcpSave", "dcp.save, FileSystemWriter as it comes, no process group", waits=True),
        _dcp("dcp", "DCP async_save", "Dcp", "as it comes: staged in the call, a thread writes"),
        _dcp(
            "dcp-cached",
            "DCP cached",
            "DcpCached",
            "BlockingAsyncStager(cache_staged_state_dict=True), buffers made beforehand; a thread writes",
        ),
        _dcp(
            "dcp-overlap",
            "DCP overlapping",
            "DcpOverlap",
            "DefaultStager: staged by a thread into kept buffers, waited for before the step; a thread writes",
        ),
        _dcp(
            "dcp-process",
            "DCP process",
            "DcpProcess",
            "DefaultStager into shared memory; AsyncCheckpointerType.PROCESS writes; needs a process group",
        ),
        _background(
            "torch_checkpointing",
            "TorchCheckpointing",
            "async saver, shared memory, prewarmed, its lock() around the step, two file threads; no O_DIRECT (ext4 refuses it)",
            f"{_NO_SAFETY}, files in place",
            "torch_checkpointing",
            "torch-checkpointing",
        ),
        _background(
            "torchsnapshot",
            "Torchsnapshot",
            "Snapshot.async_take of model and optimizer",
            f"{_NO_SAFETY}, files in place; CPU tensors are not copied: later steps get into the checkpoint",
            "torchsnapshot",
        ),
        _background(
            "Lightning",
            "Lightning",
            "AsyncCheckpointIO(TorchCheckpointIO()): cloned in the call, a thread writes",
            f"{_NO_SAFETY}; queued saves hold a clone each, without bound",
            "lightning",
        ),
        _background(
            "moonclip",
            "Moonclip",
            "CheckpointManager as it comes, lossless: differences, zstd, xxh3, its own retention",
            "no Hugging Face directory (a store of packs of its own); its flush() is the only way to know that a save has ended",
            "moonclip",
        ),
        _background(
            "DLRover flash ckpt",
            "Dlrover",
            "DdpCheckpointer.save_checkpoint(storage_type=DISK): shared memory, its saver process writes with torch.save",
            f"{_NO_SAFETY}, files in place; a save is skipped while the one before is being written; without dlrover-run the saver "
            "dies with the trainer",
            "dlrover",
            f"--no-deps dlrover {_DLROVER}",
        ),
    )
}


def listed(name: str) -> Listed:
    """The entry of a name in the catalog, or of an engine of one's own: "module:Class"."""
    if ":" not in name:
        return ENGINES[name]
    module, _, kind = name.partition(":")
    return Listed(name, kind, f"class of {module}", "", name)


def title_of(name: str) -> str:
    """As people name it."""
    return "the raw disk" if name == DISK else listed(name).title if ":" in name or name in ENGINES else name


def choose(names: Sequence[str], default: Sequence[str]) -> tuple[list[str], list[str]]:
    """(engines to run, engines that would be run were they installed), from what was asked for.

    No name means `default`; "all" all; "module:Class" is an engine of one's own. Raises `Refused` for a name that does not
    exist, and for a missing package only where the engine was named itself.
    """
    wanted: list[str] = []
    for name in names or default:
        if ":" in name:
            _check_own(name)
        elif name != "all" and name not in ENGINES:
            raise Refused(f"no engine {name!r}; there are {', '.join(ENGINES)}, and all")
        wanted += list(ENGINES) if name == "all" else [name]
    wanted = list(dict.fromkeys(wanted))
    missing = [name for name in wanted if not listed(name).installed]
    for name in missing:
        if name in names:
            raise Refused(f"engine {name!r} is not installed: pip install {listed(name).pip}")
    return [name for name in wanted if name not in missing], missing


def _check_own(name: str) -> None:
    """Raises `Refused` if "module:Class" has no such form or no such module; the class is looked at when it is loaded."""
    module, _, kind = name.partition(":")
    if not kind.isidentifier() or not all(part.isidentifier() for part in module.split(".")):
        raise Refused(f"--engine {name}: write it as module:Class")
    if find_spec(module.partition(".")[0]) is None:
        raise Refused(
            f"--engine {name}: no module {module!r}; it is looked for in the current folder and in what is installed"
        )
