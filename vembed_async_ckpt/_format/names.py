"""Every on-disk name is made and parsed here, and nowhere else.

Hosts to mind: transformers globs `checkpoint-*` when it rotates, hub upload skips `_*`, accelerate reads a number out of every
entry of its automatic folder. So all that is not committed lives in `_vembed_async_ckpt/` beside the checkpoints.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Literal

WORK = "_vembed_async_ckpt"
LOCK = "lock"
REPLACED = "replaced"
ORPHAN_LOG = "orphan.log"
LATEST = "latest"  # in the root: a link to the newest checkpoint
SAVE_NOW = "save-now"  # a file in the root: somebody asks for a save

MANIFEST = "vembed_manifest.json"
CONFIG = "vembed_config.json"
TRAINING_STATE = "vembed_training_state.json"
TRAINING_TENSORS = "vembed_training_state.safetensors"
WEIGHTS = "model.safetensors"
UNCOVERED = "vembed_uncovered.safetensors"
SCALER = "scaler.pt"
PROGRESS = "training_state.json"  # vembed's own, since it resumes

_CHECKPOINT = re.compile(r"checkpoint(?:-|_|-step-|-epoch-)(0|[1-9][0-9]*)")
_SAVE_ID = r"[0-9a-f]{32}"
_WORK_ENTRY = re.compile(rf"(?P<kind>work|trash|rotated)-(?P<save_id>{_SAVE_ID})(?:\.(?P<attempt>[0-9]+))?")
_NEW_LINK = re.compile(rf"latest-{_SAVE_ID}")
_SWAP = re.compile(rf"swap-({_SAVE_ID})\.([^/]+)")
_FOR_RESUMING = (
    r"(?:optimizer|scheduler|sampler|dl_state_dict)(?:_[0-9]+)?\.bin|(?:optimizer|scheduler|scaler)\.pt"
    r"|random_states_[0-9]+\.pkl|custom_checkpoint_[0-9]+\.pkl|rng_state(?:_[0-9]+)?\.pth"
    r"|trainer_state\.json|training_args\.bin|training_state\.json"
    r"|vembed_(?:training_state|rank_state_[0-9]+)\.json|vembed_(?:training_state|uncovered)\.safetensors"
)
_TRAINING_STATE = re.compile(rf"(?:[^/]+/)?(?:{_FOR_RESUMING})")
_OURS = re.compile(
    r"(?:[^/]+/)?(?:"
    r"(?:pytorch_)?model(?:_[0-9]+)?(?:-[0-9]{5}-of-[0-9]{5})?\.(?:safetensors|bin)"
    r"|(?:pytorch_)?model(?:_[0-9]+)?\.(?:safetensors|bin)\.index\.json"
    r"|adapter_(?:model\.(?:safetensors|bin)|config\.json)"
    r"|[^/]*_state_dict\.safetensors"
    r"|vembed_(?:manifest|config)\.json"
    rf"|{_FOR_RESUMING}"
    r")"
)


@dataclass(frozen=True, slots=True)
class WorkEntry:
    """What an entry of the work directory says it is: a save under way, or a checkpoint on its way out: one of ours, of which
    only what its manifest names goes, or one that rotation may delete whole, whoever wrote it."""

    kind: Literal["work", "trash", "rotated"]
    save_id: str


def checkpoint(step: int) -> str:
    """Name of the directory that `AsyncCheckpointer.save(step)` publishes."""
    return f"checkpoint-{step}"


def parse_checkpoint(name: str) -> int | None:
    """The number in a checkpoint directory's name (four grammars: `checkpoint-N`, `checkpoint_N`, `checkpoint-step-N`,
    `checkpoint-epoch-N`), or None if the name is none of ours."""
    match = _CHECKPOINT.fullmatch(name)
    return int(match[1]) if match else None


def trailing_number(name: str) -> int | None:
    """The last integer in a name, if there is one."""
    numbers = re.findall(r"[0-9]+", name)
    return int(numbers[-1]) if numbers else None


def work_directory(root: str) -> str:
    """Where everything of a root lies that is no checkpoint: in the root, unless there is one beside it."""
    beside = work_directory_beside(root)
    return beside if os.path.isdir(beside) else os.path.join(root, WORK)


def work_directory_beside(root: str) -> str:
    """The work directory of a root in which nothing may lie but checkpoints."""
    return os.path.join(os.path.dirname(root), f"{WORK}.{os.path.basename(root)}")


def lock_file(root: str) -> str:
    return os.path.join(work_directory(root), LOCK)


def save_directory(root: str, save_id: str, attempt: int) -> str:
    """Where a save is built before it is published."""
    return os.path.join(work_directory(root), f"work-{save_id}.{attempt}")


def trash_directory(root: str, save_id: str) -> str:
    """Where retention moves a checkpoint before it deletes it."""
    return os.path.join(work_directory(root), f"trash-{save_id}")


def rotated_directory(root: str, identity: str) -> str:
    """Where rotation moves a checkpoint that Trainer itself wrote, before all of it is deleted. `identity` is like a save's."""
    return os.path.join(work_directory(root), f"rotated-{identity}")


def replaced_directory(root: str) -> str:
    """Where things wait that are not ours to delete."""
    return os.path.join(work_directory(root), REPLACED)


def is_save_id(value: object) -> bool:
    """Whether this can be the id of a save: names are made of it."""
    return isinstance(value, str) and re.fullmatch(_SAVE_ID, value) is not None


def parse_work_entry(name: str) -> WorkEntry | None:
    """What an entry of the work directory is, or None if it was made neither by `save_directory` nor by `trash_directory` nor by
    `rotated_directory`."""
    match = _WORK_ENTRY.fullmatch(name)
    if match is None or (match["kind"] == "work") != (match["attempt"] is not None):
        return None
    return WorkEntry(match["kind"], match["save_id"])  # type: ignore[arg-type]  # it is one of the three


def new_link(root: str, save_id: str) -> str:
    """Where the link `latest` is made before it gets its name."""
    return os.path.join(work_directory(root), f"latest-{save_id}")


def is_new_link(name: str) -> bool:
    """Whether an entry of the work directory was made by `new_link`."""
    return _NEW_LINK.fullmatch(name) is not None


def swap_directory(root: str, save_id: str, name: str) -> str:
    """Where the old directory `name` waits while a file system without exchange gets the new one of save `save_id`."""
    return os.path.join(work_directory(root), REPLACED, f"swap-{save_id}.{name}")


def parse_swap(name: str) -> tuple[str, str] | None:
    """(save id of the replacing save, checkpoint name) of an entry made by `swap_directory`, or None."""
    match = _SWAP.fullmatch(name)
    return (match[1], match[2]) if match else None


def kept_directory(root: str, save_id: str, name: str) -> str:
    """Where what remains of the replaced directory `name` is kept: files we did not write and cannot carry over."""
    return os.path.join(work_directory(root), REPLACED, f"kept-{save_id}.{name}")


def optimizer(index: int) -> str:
    return f"optimizer_{index}.bin" if index else "optimizer.bin"


def scheduler(index: int) -> str:
    return f"scheduler_{index}.bin" if index else "scheduler.bin"


def sampler(index: int) -> str:
    return f"sampler_{index}.bin" if index else "sampler.bin"


def dataloader_state(index: int) -> str:
    return f"dl_state_dict_{index}.bin" if index else "dl_state_dict.bin"


def custom_checkpoint(index: int) -> str:
    return f"custom_checkpoint_{index}.pkl"


def state_dict(prefix: str) -> str:
    """The second name that `save_checkpoint` gives the weights file."""
    return f"{prefix or 'model'}_state_dict.safetensors"


def random_states(rank: int) -> str:
    return f"random_states_{rank}.pkl"


def rank_state(rank: int) -> str:
    """What `load` restores on a rank other than the first, whose state is in `TRAINING_STATE`."""
    return f"vembed_rank_state_{rank}.json"


def plain_weights(index: int) -> str:
    """The state_dict of a model, as `accelerator.save_state` names it."""
    return f"model_{index}.safetensors" if index else WEIGHTS


def pickled_weights(index: int) -> str:
    """The state_dict of a model, as `accelerator.save_state(safe_serialization=False)` names it."""
    return f"pytorch_model_{index}.bin" if index else "pytorch_model.bin"


TRAINER_OPTIMIZER = "optimizer.pt"
TRAINER_SCHEDULER = "scheduler.pt"
TRAINER_STATE = "trainer_state.json"
TRAINING_ARGUMENTS = "training_args.bin"


def trainer_random_states(rank: int, world_size: int) -> str:
    return "rng_state.pth" if world_size == 1 else f"rng_state_{rank}.pth"


def is_plan_name(relative: str) -> bool:
    """Whether a plan of ours can make this name: carried over from a replaced directory it would be read as part of the
    new checkpoint."""
    return _OURS.fullmatch(relative) is not None


def is_training_state(relative: str) -> bool:
    """Whether a file is only for a training that resumes: optimizer, scheduler, random states and the like."""
    return _TRAINING_STATE.fullmatch(relative) is not None


def is_second_name(relative: str) -> bool:
    """Whether a file has the name that `save_checkpoint` gives the weights file besides its own (see `state_dict`)."""
    return relative.endswith("_state_dict.safetensors")
