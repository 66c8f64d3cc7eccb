"""Finds out what a path is when the user takes it for a checkpoint or for a root of checkpoints."""

from __future__ import annotations

import os
import re

from .._format import names
from ..errors import CheckpointError

# Files that identify the checkpoints of other programs. Ours have some of these names too, but also files that start
# with `vembed_`.
_MARKS = {
    r"trainer_state\.json": "transformers' Trainer",
    r"random_states_[0-9]+\.pkl": "accelerate",
    r"\.metadata": "torch.distributed.checkpoint",
    r"global_step[0-9]+|zero_to_fp32\.py": "DeepSpeed",
    r".*\.ckpt": "Lightning",
    r"pytorch_model.*\.bin|model.*\.safetensors|adapter_model\.(?:bin|safetensors)": "save_pretrained",
    r"optimizer\.(?:bin|pt)": "another program",
}


def no_checkpoint(directory: str) -> str:
    """Return why `directory` is certainly not a checkpoint of ours. Empty if it may be one, damaged or not."""
    if not os.path.lexists(directory):
        return f"{directory}: does not exist"
    if os.path.islink(directory) or os.path.lexists(os.path.join(directory, names.MANIFEST)):
        return ""
    if not os.path.isdir(directory):
        return f"{directory}: is a file; a checkpoint is a directory"
    if held := _held_by(directory):
        return f"{directory}: is no checkpoint, but a directory that holds some ({held}); use latest(), or name one of them"
    if writer := other_program(directory):
        return f"{directory}: was written by {writer}, not by vembed_async_ckpt: it has no {names.MANIFEST}"
    if _is_unrelated(directory):
        return f"{directory}: is no checkpoint, and holds none"
    return ""


def other_program(directory: str) -> str:
    """Return the program that wrote a checkpoint that is not ours. Empty if no file tells."""
    found = _list(directory)
    if _has_our_files(directory):
        return ""
    return next((who for mark, who in _MARKS.items() if any(re.fullmatch(mark, name) for name in found)), "")


def refuse_checkpoint(root: str) -> None:
    """Raise `CheckpointError` if `root` is a checkpoint, or the path of a deleted one.

    A root must be a directory of checkpoints.
    """
    path = os.path.abspath(root)
    parent = os.path.dirname(path)
    advice = f"give the directory that holds it, {parent}, or load() the checkpoint itself"
    if os.path.lexists(os.path.join(path, names.MANIFEST)):
        raise CheckpointError(f"{root}: is a checkpoint, not a directory that holds some; {advice}")
    if names.parse_checkpoint(os.path.basename(path)) is not None and not _held_by(path) and _held_by(parent):
        what = "has the name of a checkpoint, and is none" if os.path.lexists(path) else "does not exist"
        raise CheckpointError(f"{root}: {what}; {parent} holds checkpoints: {advice}")


def refuse_no_root(root: str) -> None:
    """Raise `CheckpointError` unless `root` is a directory that may hold checkpoints."""
    if not os.path.lexists(root):
        raise CheckpointError(f"{root}: does not exist")
    if not os.path.isdir(root):
        raise CheckpointError(f"{root}: is a file; give a directory that holds checkpoints")
    refuse_checkpoint(root)


def _held_by(directory: str) -> str:
    """Return up to three names of our checkpoints in `directory`, as text. Empty if there is none."""
    found = [name for name in _list(directory) if os.path.lexists(os.path.join(directory, name, names.MANIFEST))]
    return ", ".join(sorted(found)[:3]) + (", ..." if len(found) > 3 else "")


def _is_unrelated(directory: str) -> bool:
    """Whether neither its name nor anything in it is that of a checkpoint. An empty directory may be what is left of one."""
    named = names.parse_checkpoint(os.path.basename(os.path.abspath(directory))) is not None
    return not named and bool(_list(directory)) and not _has_our_files(directory)


def _has_our_files(directory: str) -> bool:
    return any(name.startswith("vembed_") for name in _list(directory))


def _list(directory: str) -> list[str]:
    try:
        return os.listdir(directory)
    except OSError:
        return []  # the code that reads this directory reports the error
