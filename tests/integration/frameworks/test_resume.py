"""A training that was killed goes on from its checkpoint as if nothing had happened, to the last bit of everything it holds."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vembed_async_ckpt import latest

from ...conftest import check_root, leftovers
from ...crash.nursery import Nursery

BATCHES = 4  # of an epoch, as trainings has it


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    nursery = Nursery("resume_trainers", os.path.dirname(__file__))
    yield nursery
    nursery.close()


def interrupted(nursery: Nursery, root: Path, at: int, **options: Any) -> str:
    """What a training came to that saved after `at` micro-batches, in both ways, trained on and was killed."""
    paths = {"save_checkpoint": root / f"checkpoint-step-{at}", "save_state": root / f"checkpoint_{at}"}
    with nursery.child("save_and_die", paths={k: str(path) for k, path in paths.items()}, at=at, **options) as child:
        child.expect("STAGED")
        digest = child.expect("DIGEST")
        assert child.wait() < 0, "killed, so it drained nothing"
    assert latest(root) == paths["save_state"]
    return digest


def resumed(nursery: Nursery, root: Path, at: int, readers: tuple[str, ...], **options: Any) -> dict[str, str]:
    """What fresh trainings come to that begin where it was saved, by who saved and who read.

    The files of `save_checkpoint` have the names of `from_pretrained`, so accelerate's `load_state` needs to be `attached`."""
    saved = {"save_checkpoint": f"checkpoint-step-{at}", "save_state": f"checkpoint_{at}"}
    readings = [
        ("attached" if reader == "stock" and kind == "save_checkpoint" else reader, str(root / name))
        for kind, name in saved.items()
        for reader in readers
    ]
    with nursery.child("go_on", readings=readings, at=at, **options) as child:
        digests = {f"{os.path.basename(path)}, {reader}": child.expect("DIGEST") for reader, path in readings}
        assert child.wait() == 0, child
    return digests


def check(
    nursery: Nursery, root: Path, at: int, *, readers: tuple[str, ...] = ("ours", "stock"), **options: Any
) -> None:
    saving = {key: options.pop(key) for key in ("drop", "between") if key in options}
    expected = interrupted(nursery, root, at, **saving, **options)
    digests = resumed(nursery, root, at, readers, **options)
    assert digests == dict.fromkeys(digests, expected)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("scheduler", ["none", "cosine", "warmup"])
@pytest.mark.parametrize("optimizer", ["adamw", "fused", "sgd", "adafactor", "torch_adafactor"])
def test_it_goes_on_to_the_last_bit(nursery: Nursery, root: Path, optimizer: str, scheduler: str, lora: bool) -> None:
    """Killed after a save in mid-epoch, by save_checkpoint and save_state; our load and accelerate's come to what the run itself
    came to, dropout included."""
    check(nursery, root, 6, optimizer=optimizer, scheduler=scheduler, lora=lora)


def test_saving_changes_nothing(nursery: Nursery, root: Path) -> None:
    """A training that saves comes to what one comes to that does not, random states included."""
    saved = interrupted(nursery, root, 6)
    with nursery.child("train", at=6) as child:
        assert child.expect("DIGEST") == saved
        assert child.wait() == 0, child


@pytest.mark.parametrize("at", [6, 7])
def test_accumulation_goes_on_where_it_was(nursery: Nursery, root: Path, at: int) -> None:
    """With 3 micro-batches to a step: gradients are applied at the same ones. In the midst of an accumulation (7) those gathered so
    far are lost, as they are with accelerate's own checkpoints, and nothing else is."""
    check(nursery, root, at, accumulate=3, lora=True, drop=True)


@pytest.mark.parametrize(
    "options",
    [{"precision": "bf16"}, {"scaled": True}, {"scaled": True, "accumulate": 2, "optimizer": "sgd"}],
    ids=["bf16", "scaler", "scaler accumulating"],
)
def test_mixed_precision_goes_on(nursery: Nursery, root: Path, options: dict[str, Any]) -> None:
    """bf16 autocast, and a gradient scaler whose scale grows every three steps."""
    check(nursery, root, 6, **options)


@pytest.mark.parametrize("between", [False, True], ids=["on the last batch", "between epochs"])
@pytest.mark.parametrize("sampler", ["seedable", "generator", "default"])
def test_the_data_go_on_with_the_next_epoch(nursery: Nursery, root: Path, sampler: str, between: bool) -> None:
    """Whatever shuffles, nobody has to say `set_epoch`: our load puts the dataloader where it was. (accelerate 1.15 begins
    with the first epoch's order again, but for the default sampler, which draws from the random state of the process.)"""
    readers = ("ours", "stock") if sampler == "default" else ("ours",)
    check(nursery, root, BATCHES, readers=readers, sampler=sampler, between=between, set_epoch=False, data_seed=None)


def test_hooks_are_called_as_by_accelerate(nursery: Nursery, root: Path) -> None:
    """What a save hook writes is in the checkpoint; accelerate's load hook reads it."""
    expected = interrupted(nursery, root, 6, hooked=True)
    readings = [("attached", str(root / "checkpoint-step-6")), ("stock", str(root / "checkpoint_6"))]
    with nursery.child("go_on", readings=readings, at=6, hooked=True) as child:
        for _, path in readings:
            assert (Path(path) / "note.txt").read_text() == "of 1"
            assert child.expect("NOTE") == "of 1"
            assert child.expect("DIGEST") == expected
        assert child.wait() == 0, child


def test_automatic_names_after_a_kill_in_the_midst_of_a_save(nursery: Nursery, tmp_path: Path) -> None:
    """Trainer and writer die while they write: `checkpoints/` holds the checkpoint before and nothing else, `load_state()` finds
    it, and the restarted training saves under the next number."""
    with nursery.child("die_while_saving", project=str(tmp_path)) as child:
        assert child.expect("STATE") == "WRITING"
        child.wait()
    assert os.listdir(tmp_path / "checkpoints") == ["checkpoint_0"]
    with nursery.child("restart", project=str(tmp_path)) as child:
        assert child.expect("LOADED") == "0"
        assert child.expect("SAVED") == "checkpoint_1"
        assert child.wait() == 0, child
    assert check_root(tmp_path / "checkpoints") == [0, 1]
    assert leftovers(tmp_path / "checkpoints") == []
