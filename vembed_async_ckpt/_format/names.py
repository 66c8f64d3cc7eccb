"""Makes and parses every name on disk. No other module does.

Other programs restrict the names. transformers globs `checkpoint-*` when it rotates checkpoints, the hub upload skips
`_*`, and accelerate reads a number from every entry of its automatic folder. So everything that is not committed lives
in `_vembed_async_ckpt/` beside the checkpoints.
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
LATEST = "latest"  # a link in the root to the newest checkpoint
SAVE_NOW = "save-now"  # a file in the root; whoever creates it asks for a save
SHIPPING = "shipping"  # in the work directory: what is still to be shipped

MANIFEST = "vembed_manifest.json"
CONFIG = "vembed_config.json"
TRAINING_STATE = "vembed_training_state.json"
TRAINING_TENSORS = "vembed_training_state.safetensors"
WEIGHTS = "model.safetensors"
UNCOVERED = "vembed_uncovered.safetensors"  # model state that its own save_pretrained did not write to safetensors
SCALER = "scaler.pt"
DCP = "vembed_dcp.json"  # what torch.distributed.checkpoint needs to read a checkpoint that it wrote through us
DCP_STATE = "vembed_dcp_state.safetensors"  # the tensors that are not the model's
DCP_OBJECTS = "vembed_dcp_objects"  # directory of what is no tensor
PROGRESS = "training_state.json"  # vembed itself writes and reads this file to resume

_CHECKPOINT = re.compile(r"checkpoint(?:-|_|-step-|-epoch-)(0|[1-9][0-9]*)")
_SAVE_ID = r"[0-9a-f]{32}"
_WORK_ENTRY = re.compile(rf"(?P<kind>work|trash|rotated|scratch)-(?P<save_id>{_SAVE_ID})(?:\.(?P<attempt>[0-9]+))?")
_NEW_LINK = re.compile(rf"latest-{_SAVE_ID}")
_NOTE = re.compile(rf"({_SAVE_ID})\.json")
_MARKER = re.compile(rf"([0-9]{{12}})-([^/]+\.{_SAVE_ID})")
_SWAP = re.compile(rf"swap-({_SAVE_ID})\.([^/]+)")
_FOR_RESUMING = (
    r"(?:optimizer|scheduler|sampler|dl_state_dict)(?:_[0-9]+)?\.bin|optimizer(?:_[0-9]+)?\.safetensors|(?:optimizer|scheduler|scaler)\.pt"
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
    r"|vembed_(?:manifest|config|dcp)\.json|vembed_dcp_state\.safetensors"
    r"|vembed_dcp_objects/[0-9]+\.bin"
    rf"|{_FOR_RESUMING}"
    r")"
)


@dataclass(frozen=True, slots=True)
class WorkEntry:
    """The parsed name of an entry in the work directory.

    `kind`: "work" is a save in progress. "trash" is a checkpoint of ours that is being deleted; only the files in its
        manifest may be deleted. "rotated" is a checkpoint that rotation removes; all of it may be deleted, whoever
        wrote it. "scratch" is where a process prepares files.
    `save_id`: the id in the name.
    """

    kind: Literal["work", "trash", "rotated", "scratch"]
    save_id: str


def checkpoint(step: int) -> str:
    """Return the name of the directory that `AsyncCheckpointer.save(step)` publishes."""
    return f"checkpoint-{step}"


def parse_checkpoint(name: str) -> int | None:
    """Return the number in the name of a checkpoint directory, or None if the name is not one of ours.

    Four forms are known: `checkpoint-N`, `checkpoint_N`, `checkpoint-step-N`, `checkpoint-epoch-N`.
    """
    match = _CHECKPOINT.fullmatch(name)
    return int(match[1]) if match else None


def trailing_number(name: str) -> int | None:
    """Return the last integer in a name, or None."""
    numbers = re.findall(r"[0-9]+", name)
    return int(numbers[-1]) if numbers else None


def work_directory(root: str) -> str:
    """Return the directory that holds everything of a root except its checkpoints.

    It lies inside the root, unless `work_directory_beside(root)` exists.
    """
    beside = work_directory_beside(root)
    return beside if os.path.isdir(beside) else os.path.join(root, WORK)


def work_directory_beside(root: str) -> str:
    """Return the work directory for a root that may contain nothing but checkpoints."""
    return os.path.join(os.path.dirname(root), f"{WORK}.{os.path.basename(root)}")


def lock_file(root: str) -> str:
    return os.path.join(work_directory(root), LOCK)


def save_directory(root: str, save_id: str, attempt: int) -> str:
    """Return the directory in which a save is built before it is published."""
    return os.path.join(work_directory(root), f"work-{save_id}.{attempt}")


def trash_directory(root: str, save_id: str) -> str:
    """Return the directory to which retention moves a checkpoint before it deletes it."""
    return os.path.join(work_directory(root), f"trash-{save_id}")


def rotated_directory(root: str, identity: str) -> str:
    """Return the directory to which rotation moves a checkpoint that Trainer wrote, before deleting all of it.

    `identity` has the form of a save id.
    """
    return os.path.join(work_directory(root), f"rotated-{identity}")


def scratch_directory(root: str, identity: str) -> str:
    """Return where files are prepared if the temporary directory cannot be used. `identity` has the form of a save id."""
    return os.path.join(work_directory(root), f"scratch-{identity}")


def replaced_directory(root: str) -> str:
    """Return the directory that keeps files which we must not delete."""
    return os.path.join(work_directory(root), REPLACED)


def is_save_id(value: object) -> bool:
    """Return whether `value` is a valid save id. Names on disk are built from save ids."""
    return isinstance(value, str) and re.fullmatch(_SAVE_ID, value) is not None


def parse_work_entry(name: str) -> WorkEntry | None:
    """Parse the name of an entry in the work directory.

    Returns None unless `save_directory`, `trash_directory`, `rotated_directory` or `scratch_directory` made the name.
    """
    match = _WORK_ENTRY.fullmatch(name)
    if match is None or (match["kind"] == "work") != (match["attempt"] is not None):
        return None
    return WorkEntry(match["kind"], match["save_id"])  # type: ignore[arg-type]  # the pattern allows these four kinds only


def new_link(root: str, save_id: str) -> str:
    """Return where a new `latest` link is created, before it is renamed to its final name."""
    return os.path.join(work_directory(root), f"latest-{save_id}")


def is_new_link(name: str) -> bool:
    """Return whether `new_link` made the name of this entry in the work directory."""
    return _NEW_LINK.fullmatch(name) is not None


def swap_directory(root: str, save_id: str, name: str) -> str:
    """Return where the old directory `name` is kept while save `save_id` replaces it.

    Used where the file system cannot exchange two directories.
    """
    return os.path.join(work_directory(root), REPLACED, f"swap-{save_id}.{name}")


def parse_swap(name: str) -> tuple[str, str] | None:
    """Return (id of the replacing save, checkpoint name) for a name made by `swap_directory`, else None."""
    match = _SWAP.fullmatch(name)
    return (match[1], match[2]) if match else None


def kept_directory(root: str, save_id: str, name: str) -> str:
    """Return where the rest of the replaced directory `name` is kept.

    The rest are the files that we did not write and cannot carry over.
    """
    return os.path.join(work_directory(root), REPLACED, f"kept-{save_id}.{name}")


def shipping_directory(root: str) -> str:
    """Return the directory that says what is still to be shipped."""
    return os.path.join(work_directory(root), SHIPPING)


def shipping_note(root: str, save_id: str) -> str:
    """Return the file that says where the checkpoint of a save is still to be shipped."""
    return os.path.join(shipping_directory(root), f"{save_id}.json")


def parse_shipping_note(name: str) -> str | None:
    """Return the save id in a name made by `shipping_note`, else None."""
    match = _NOTE.fullmatch(name)
    return match[1] if match else None


def shipping_lock(root: str) -> str:
    """Return the file that a process locks while it ships."""
    return os.path.join(shipping_directory(root), "lock")


def shipping_successor(root: str) -> str:
    """Return the file that asks a process which ships, and which nobody watches any more, to end."""
    return os.path.join(shipping_directory(root), "waiting")


def remote_checkpoint(name: str, save_id: str) -> str:
    """Return the key of a checkpoint below the URL of its run. Two saves never have the same key."""
    return f"{name}.{save_id}"


MARKERS = f"{WORK}/newest"  # the keys of the markers begin with this
_LAST_ORDER = 10**12 - 1


def remote_marker(order: int, key: str) -> str:
    """Return the key of the marker of an uploaded checkpoint.

    `order`: 1 for the first checkpoint of the run; at most 10^12 - 1. The marker of the newest comes first in a list
    of keys, because stores list keys in the order of their bytes.
    """
    return f"{MARKERS}/{_LAST_ORDER - order:012d}-{key}"


def parse_remote_marker(marker: str) -> tuple[int, str] | None:
    """Return (order, key of the checkpoint) for a key made by `remote_marker`, else None."""
    match = _MARKER.fullmatch(marker.removeprefix(f"{MARKERS}/"))
    return (_LAST_ORDER - int(match[1]), match[2]) if match else None


def optimizer(index: int) -> str:
    return f"optimizer_{index}.bin" if index else "optimizer.bin"


def divided_optimizer(index: int) -> str:
    """Return the name of the file for an optimizer of models that are divided among ranks."""
    return f"optimizer_{index}.safetensors" if index else "optimizer.safetensors"


def scheduler(index: int) -> str:
    return f"scheduler_{index}.bin" if index else "scheduler.bin"


def sampler(index: int) -> str:
    return f"sampler_{index}.bin" if index else "sampler.bin"


def dataloader_state(index: int) -> str:
    return f"dl_state_dict_{index}.bin" if index else "dl_state_dict.bin"


def custom_checkpoint(index: int) -> str:
    return f"custom_checkpoint_{index}.pkl"


def state_dict(prefix: str) -> str:
    """Return the second name that `save_checkpoint` gives to the weights file."""
    return f"{prefix or 'model'}_state_dict.safetensors"


def random_states(rank: int) -> str:
    return f"random_states_{rank}.pkl"


def rank_state(rank: int) -> str:
    """Return the name of the file from which `load` restores a rank other than the first.

    The first rank uses `TRAINING_STATE`.
    """
    return f"vembed_rank_state_{rank}.json"


def plain_weights(index: int) -> str:
    """Return the name that `accelerator.save_state` gives to the state_dict of a model."""
    return f"model_{index}.safetensors" if index else WEIGHTS


def pickled_weights(index: int) -> str:
    """Return the name that `accelerator.save_state(safe_serialization=False)` gives to the state_dict of a model."""
    return f"pytorch_model_{index}.bin" if index else "pytorch_model.bin"


def dcp_object(index: int) -> str:
    """Return the name of a value that torch.distributed.checkpoint saved through us and that is no tensor."""
    return f"{DCP_OBJECTS}/{index}.bin"


TRAINER_OPTIMIZER = "optimizer.pt"
TRAINER_SCHEDULER = "scheduler.pt"
TRAINER_STATE = "trainer_state.json"
TRAINING_ARGUMENTS = "training_args.bin"


def trainer_random_states(rank: int, world_size: int) -> str:
    return "rng_state.pth" if world_size == 1 else f"rng_state_{rank}.pth"


def is_plan_name(relative: str) -> bool:
    """Return whether one of our plans can produce this name.

    Such a file must not be carried over from a replaced directory: it would be read as part of the new checkpoint.
    """
    return _OURS.fullmatch(relative) is not None


def is_training_state(relative: str) -> bool:
    """Return whether a file is needed only to resume training: optimizer, scheduler, random states and the like."""
    return _TRAINING_STATE.fullmatch(relative) is not None


def is_second_name(relative: str) -> bool:
    """Return whether a file has the second name that `save_checkpoint` gives to the weights file (see `state_dict`)."""
    return relative.endswith("_state_dict.safetensors")
