"""`checkpoints`, `best` and `delete`: what is under a root, for programs."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

import vembed_async_ckpt
from vembed_async_ckpt import AsyncCheckpointer, CheckpointerBusy, CheckpointError, best, checkpoints, delete, verify
from vembed_async_ckpt._format import names


def save(root: Path, metrics: Mapping[int, Mapping[str, float]]) -> torch.nn.Module:
    """One checkpoint for each step, in this order."""
    model = torch.nn.Linear(4, 4)
    with AsyncCheckpointer(root) as checkpointer:
        for step, values in metrics.items():
            checkpointer.save(step, model=model, metrics=values).result(60)
    return model


def test_checkpoints_are_listed_newest_first(root: Path) -> None:
    """By the order of the saves, not by step: after a rollback the lower step is the newer one."""
    save(root, {10: {"loss": 2.0}, 20: {"loss": 1.0}, 15: {}})
    found = checkpoints(root)
    assert [entry.step for entry in found] == [15, 20, 10]
    assert [entry.path for entry in found] == [root / f"checkpoint-{step}" for step in (15, 20, 10)]
    assert [dict(entry.metrics) for entry in found] == [{}, {"loss": 1.0}, {"loss": 2.0}]
    assert all(entry.complete and entry.problem == "" for entry in found)
    assert found[0].sequence == 3
    assert found[0].time == pytest.approx(verify(found[0].path).time)


def test_sizes_are_those_on_disk(root: Path) -> None:
    """In bytes without the manifest; what has two names counts once."""
    save(root, {1: {}})
    directory = root / "checkpoint-1"
    files = [file for file in directory.rglob("*") if file.is_file() and file.name != names.MANIFEST]
    (entry,) = checkpoints(root)
    assert entry.total_bytes == sum(file.stat().st_size for file in files) > 64


def test_a_file_with_two_names_counts_once(root: Path) -> None:
    """As `save_checkpoint` writes its weights."""
    from accelerate import Accelerator

    from vembed_async_ckpt import save_checkpoint
    from vembed_async_ckpt.integrations.vembed import close_shared

    model = torch.nn.Linear(64, 64)
    handle = save_checkpoint(root / "checkpoint-1", model, Accelerator(cpu=True))
    info = handle.result(60)
    close_shared()
    (entry,) = checkpoints(root)
    assert entry.total_bytes == info.total_bytes


def test_a_broken_checkpoint_says_why(tmp_path: Path) -> None:
    """One whose file is cut keeps its place; one without a manifest comes last."""
    save(tmp_path, {1: {"loss": 1.0}, 2: {"loss": 0.5}})
    weights = tmp_path / "checkpoint-2" / names.WEIGHTS
    os.truncate(weights, 10)
    (tmp_path / "checkpoint-3").mkdir()
    newest, older, last = checkpoints(tmp_path)
    assert (newest.step, newest.complete) == (2, False)
    assert str(weights) in newest.problem
    assert older.complete
    assert (last.path.name, last.step, last.sequence, last.time, last.total_bytes) == (
        "checkpoint-3",
        None,
        None,
        None,
        0,
    )
    assert names.MANIFEST in last.problem


def test_no_root_is_no_checkpoints(tmp_path: Path) -> None:
    assert checkpoints(tmp_path / "absent") == []
    assert best(tmp_path / "absent", "loss") is None
    assert not (tmp_path / "absent").exists()


@pytest.mark.parametrize(("mode", "step"), [("min", 3), ("max", 1)])
def test_best_goes_by_the_metric(root: Path, mode: str, step: int) -> None:
    """Not by step or time; of equal values the newest."""
    save(root, {1: {"loss": 3.0}, 2: {"loss": 1.0}, 3: {"loss": 1.0}, 4: {"other": 0.0}})
    assert best(root, "loss", mode=mode) == root / f"checkpoint-{step}"  # type: ignore[arg-type]


def test_best_leaves_out_what_is_not_rated_or_not_whole(tmp_path: Path) -> None:
    """Infinity is a value, NaN is none; a broken checkpoint is no answer."""
    save(tmp_path, {1: {"loss": 3.0}, 2: {"loss": math.nan}, 3: {}, 4: {"loss": 0.1}})
    (tmp_path / "checkpoint-4" / names.WEIGHTS).unlink()
    assert best(tmp_path, "loss") == tmp_path / "checkpoint-1"
    assert best(tmp_path, "accuracy") is None


def test_an_unknown_mode_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'median'; use 'min' or 'max'"):
        best(tmp_path, "loss", mode="median")  # type: ignore[arg-type]


def test_delete_takes_one_and_no_other(root: Path) -> None:
    save(root, {1: {}, 2: {}})
    delete(root / "checkpoint-1")
    assert [entry.step for entry in checkpoints(root)] == [2]


def test_delete_keeps_what_is_not_ours(tmp_path: Path) -> None:
    """A file that somebody put there is moved to `replaced/`."""
    save(tmp_path, {1: {}})
    (tmp_path / "checkpoint-1" / "notes.txt").write_text("mine")
    delete(tmp_path / "checkpoint-1")
    (kept,) = Path(names.replaced_directory(str(tmp_path))).iterdir()
    assert [(file.name, file.read_text()) for file in kept.iterdir()] == [("notes.txt", "mine")]


def test_delete_refuses_what_it_cannot_judge(tmp_path: Path) -> None:
    """A directory without a manifest that can be read."""
    directory = tmp_path / "checkpoint-1"
    directory.mkdir()
    (directory / names.WEIGHTS).write_bytes(b"weights")
    with pytest.raises(CheckpointError, match="checkpoint-1: was written by save_pretrained"):
        delete(directory)
    assert (directory / names.WEIGHTS).read_bytes() == b"weights"
    with pytest.raises(CheckpointError, match="absent: does not exist"):
        delete(tmp_path / "absent")
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-1"]


def test_delete_refuses_while_a_training_saves_there(root: Path) -> None:
    save(root, {1: {}})
    with AsyncCheckpointer(root), pytest.raises(CheckpointerBusy):
        delete(root / "checkpoint-1")
    verify(root / "checkpoint-1")


def test_delete_refuses_what_is_being_loaded(root: Path) -> None:
    import fcntl

    save(root, {1: {}})
    with open(root / "checkpoint-1" / names.MANIFEST) as manifest:
        fcntl.flock(manifest, fcntl.LOCK_SH)
        with pytest.raises(CheckpointerBusy, match="loading"):
            delete(root / "checkpoint-1")
    delete(root / "checkpoint-1")
    assert checkpoints(root) == []


def test_the_name_of_a_function_stays_one() -> None:
    """No module of the package takes the place of the function `checkpoints`."""
    assert callable(vembed_async_ckpt.best)
    assert callable(vembed_async_ckpt.checkpoints)
