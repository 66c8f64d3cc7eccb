"""What a path is when somebody takes it for a checkpoint or for a root."""

from __future__ import annotations

from pathlib import Path

import pytest

from vembed_async_ckpt import CheckpointError
from vembed_async_ckpt._disk import places
from vembed_async_ckpt._format import names

from ..by_hand import checkpoint, write_files


@pytest.mark.parametrize(
    ("file", "program"),
    [("trainer_state.json", "transformers' Trainer"), ("random_states_0.pkl", "accelerate"), ("zero_to_fp32.py", "DeepSpeed"),
     (".metadata", "torch.distributed.checkpoint"), ("global_step12/a", "DeepSpeed"), ("last.ckpt", "Lightning"),
     ("model-00001-of-00002.safetensors", "save_pretrained"), ("adapter_model.bin", "save_pretrained"),
     ("optimizer.pt", "another program"), ("notes.txt", "")],
)  # fmt: skip
def test_the_program_that_wrote_it(tmp_path: Path, file: str, program: str) -> None:
    path = write_files(tmp_path / "run", {file: b"x"})
    assert places.other_program(str(path)) == program
    assert places.no_checkpoint(str(path)) == (
        f"{path}: was written by {program}, not by vembed_async_ckpt: it has no {names.MANIFEST}"
        if program
        else f"{path}: is no checkpoint, and holds none"
    )
    (path / names.TRAINING_STATE).touch()
    assert places.other_program(str(path)) == "", "one of ours that lost its manifest"
    assert places.no_checkpoint(str(path)) == ""


def test_what_may_be_a_checkpoint_is_not_argued_away(root: Path, tmp_path: Path) -> None:
    """Damaged ones, links, and an empty directory, which may be what is left of one."""
    assert places.no_checkpoint(str(checkpoint(root / "checkpoint-1", 1))) == ""
    (root / "checkpoint-2").mkdir()
    assert places.no_checkpoint(str(root / "checkpoint-2")) == ""
    (root / "link").symlink_to(tmp_path)
    assert places.no_checkpoint(str(root / "link")) == ""


def test_what_certainly_is_none(root: Path) -> None:
    assert places.no_checkpoint(str(root / "nothing")).endswith("does not exist")
    (root / "file").touch()
    assert "is a file; a checkpoint is a directory" in places.no_checkpoint(str(root / "file"))
    for number in range(4):
        checkpoint(root / f"checkpoint-{number}", number)
    said = places.no_checkpoint(str(root))
    assert "that holds some (checkpoint-0, checkpoint-1, checkpoint-2, ...); use latest()" in said


def test_a_checkpoint_is_no_root(root: Path) -> None:
    path = checkpoint(root / "checkpoint-1", 1)
    with pytest.raises(CheckpointError, match=f"is a checkpoint, not a directory that holds some; give .*{root}"):
        places.refuse_checkpoint(str(path))
    with pytest.raises(CheckpointError, match=r"checkpoint-2: does not exist; .* holds checkpoints"):
        places.refuse_checkpoint(str(root / "checkpoint-2"))
    (root / "checkpoint-3").mkdir()
    with pytest.raises(CheckpointError, match="has the name of a checkpoint, and is none"):
        places.refuse_checkpoint(str(root / "checkpoint-3"))
    places.refuse_checkpoint(str(root))
    places.refuse_checkpoint(str(root / "new"))


def test_a_root_of_that_name_that_holds_checkpoints_is_one(tmp_path: Path) -> None:
    checkpoint(tmp_path / "checkpoint-1" / "checkpoint-7", 7)
    checkpoint(tmp_path / "checkpoint-2", 2)
    places.refuse_checkpoint(str(tmp_path / "checkpoint-1"))


def test_what_is_no_root(root: Path) -> None:
    places.refuse_no_root(str(root))
    with pytest.raises(CheckpointError, match="does not exist"):
        places.refuse_no_root(str(root / "nothing"))
    (root / "file").touch()
    with pytest.raises(CheckpointError, match="is a file; give a directory"):
        places.refuse_no_root(str(root / "file"))


def test_what_cannot_be_listed_is_not_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: str) -> list[str]:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(places.os, "listdir", fail)
    assert places.no_checkpoint(str(tmp_path)) == ""
