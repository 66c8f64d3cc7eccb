"""What is under a root: ordered by sequence and step, broken ones named, and what changes meanwhile looked at again."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from vembed_async_ckpt import CheckpointError, CorruptCheckpoint, latest, verify
from vembed_async_ckpt._disk import catalog, manifests
from vembed_async_ckpt._format import names

from ..by_hand import checkpoint, save_id, write_files


@pytest.fixture(autouse=True)
def no_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog.time, "sleep", lambda seconds: None)


def found(root: Path) -> list[str]:
    return [Path(entry.path).name for entry in catalog.scan(str(root))]


def test_the_order_is_by_sequence_then_step_and_never_by_name(root: Path) -> None:
    checkpoint(root / "checkpoint-9", 9, sequence=1)
    checkpoint(root / "checkpoint-10", 10, sequence=3)
    checkpoint(root / "checkpoint-2", 2, sequence=3)
    checkpoint(root / "best", 1, sequence=2, step=None)
    assert found(root) == ["checkpoint-9", "best", "checkpoint-2", "checkpoint-10"]
    assert latest(root) == root / "checkpoint-10"


def test_broken_ones_come_first_and_others_do_not_count(root: Path) -> None:
    checkpoint(root / "checkpoint-1", 1)
    (root / "checkpoint-2").mkdir()
    (root / "checkpoint-3").symlink_to(root / "checkpoint-1")
    (root / "somebody").mkdir()
    (root / "link").symlink_to(root / "checkpoint-1")
    (root / "checkpoint-4").touch()
    assert found(root) == ["checkpoint-2", "checkpoint-3", "checkpoint-1"]


def test_no_root_is_an_empty_one_and_a_file_is_an_error(tmp_path: Path) -> None:
    assert catalog.scan(str(tmp_path / "nothing")) == []
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot be listed"):
        catalog.scan(str(tmp_path / "file"))


def test_a_broken_newest_is_skipped_with_its_reason(root: Path) -> None:
    checkpoint(root / "checkpoint-1", 1)
    checkpoint(root / "checkpoint-2", 2)
    (root / "checkpoint-2" / "optimizer.bin").unlink()
    with pytest.warns(UserWarning, match=r"skipped a broken checkpoint: .*checkpoint-2/optimizer.bin: missing"):
        assert latest(root) == root / "checkpoint-1"
    assert latest(root, verify="none") == root / "checkpoint-2"
    (root / "checkpoint-1" / names.MANIFEST).unlink()
    with pytest.raises(CorruptCheckpoint, match=r"none of the 2 checkpoints is complete; newest first: .*checkpoint-2"):
        latest(root)


def test_one_without_a_readable_manifest_may_be_the_newest_and_is_named(root: Path) -> None:
    checkpoint(root / "checkpoint-1", 1)
    checkpoint(root / "checkpoint-2", 2)
    (root / "checkpoint-2" / names.MANIFEST).write_bytes(b"damaged")
    with pytest.warns(UserWarning, match=r"checkpoint-2.*unusable manifest"):
        assert latest(root) == root / "checkpoint-1"


def test_what_other_programs_wrote_is_no_broken_one_of_ours(root: Path) -> None:
    write_files(root / "checkpoint-5", {"trainer_state.json": b"{}"})
    with pytest.raises(CheckpointError, match="nothing there is a checkpoint of ours") as raised:
        latest(root)
    assert "was written by transformers' Trainer" in str(raised.value)
    checkpoint(root / "checkpoint-1", 1)
    with pytest.warns(UserWarning, match=r"^skipped: .*checkpoint-5: was written by transformers' Trainer"):
        assert latest(root) == root / "checkpoint-1"


def test_an_interrupted_replacement_is_listed_and_said(root: Path) -> None:
    checkpoint(Path(names.swap_directory(str(root), save_id(2), "checkpoint-1")), 1)
    checkpoint(Path(names.swap_directory(str(root), save_id(2), "checkpoint-0")), 0)
    checkpoint(root / "checkpoint-0", 3)  # this one was published
    (entry,) = catalog.interrupted(str(root))
    assert (entry.path, entry.order) == (str(root / "checkpoint-1"), (1, 1))
    assert "vembed-ckpt sweep" in str(entry.error)
    shutil.rmtree(root / "checkpoint-0")
    with pytest.raises(CorruptCheckpoint, match="its replacement was interrupted"):
        latest(root)


def test_a_link_for_the_kept_directories_leads_nowhere(root: Path, tmp_path: Path) -> None:
    write_files(tmp_path / "outside", {f"swap-{save_id(1)}.checkpoint-1": b""})
    (root / names.WORK / names.REPLACED).symlink_to(tmp_path / "outside")
    assert catalog.list_replaced(str(root)) == []
    (root / names.WORK / names.REPLACED).unlink()
    (root / names.WORK / names.REPLACED).touch()
    assert catalog.list_replaced(str(root)) == []


@pytest.mark.parametrize("what", ["replaced/", "the root"])
def test_what_cannot_be_listed_is_unknown(root: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    def fail(path: str) -> None:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "listdir" if what == "replaced/" else "scandir", fail)
    with pytest.raises(CheckpointError, match="cannot be listed \\(Permission denied\\): what is there is unknown"):
        catalog.scan(str(root))


def test_one_that_is_replaced_while_it_is_checked_is_looked_at_again(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint(root / "checkpoint-1", 1)
    (root / "checkpoint-1" / "optimizer.bin").unlink()
    real = manifests.check

    def replacing(directory: str, *rest: object) -> None:
        try:
            real(directory, *rest)  # type: ignore[arg-type]
        except CorruptCheckpoint:
            shutil.rmtree(root / "checkpoint-1")
            checkpoint(root / "checkpoint-1", 2)
            raise

    monkeypatch.setattr(manifests, "check", replacing)
    assert latest(root) == root / "checkpoint-1"


def test_one_that_never_stops_changing_ends_in_its_error(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint(root / "checkpoint-1", 1)
    (root / "checkpoint-1" / "optimizer.bin").unlink()
    monkeypatch.setattr(catalog, "_has_changed", lambda entry: True)
    with pytest.raises(CorruptCheckpoint, match="none of the 1 checkpoints is complete"):
        latest(root)


def test_a_survey_names_what_is_broken_and_leaves_out_what_went(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in (1, 2, 3):
        checkpoint(root / f"checkpoint-{number}", number)
    (root / "checkpoint-2" / "optimizer.bin").unlink()
    real = catalog.scan

    def going(path: str) -> list[catalog.Entry]:
        entries = real(path)
        shutil.rmtree(root / "checkpoint-3")
        return entries

    monkeypatch.setattr(catalog, "scan", going)
    survey = {Path(entry.path).name: entry.error for entry in catalog.survey(str(root))}
    assert survey.keys() == {"checkpoint-1", "checkpoint-2"}
    assert survey["checkpoint-1"] is None
    assert "missing" in str(survey["checkpoint-2"])


def test_verify_reads_every_byte(root: Path) -> None:
    path = checkpoint(root / "checkpoint-1", 1)
    assert verify(path).save_id == save_id(1)
    (path / "optimizer.bin").write_bytes((path / "optimizer.bin").read_bytes()[::-1])
    with pytest.raises(CorruptCheckpoint, match="content differs"):
        verify(path)


def test_manifests_are_read_once_and_anew_when_they_change(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in (1, 2):
        checkpoint(root / f"checkpoint-{number}", number, tensors={"optimizer.bin": {}}, names={"a": {}})
    (root / "checkpoint-3").mkdir()
    read: list[str] = []
    real = manifests.read
    monkeypatch.setattr(manifests, "read", lambda path: (read.append(Path(path).name), real(path))[1])
    committed = catalog.Committed(str(root))
    assert sorted(manifest.sequence for _, manifest in committed.refresh()) == [1, 2]
    assert all(not manifest.tensors and not manifest.names for _, manifest in committed.refresh())
    assert sorted(read) == ["checkpoint-1", "checkpoint-2"]
    shutil.rmtree(root / "checkpoint-2")
    checkpoint(root / "checkpoint-2", 5)
    (root / "checkpoint-1" / names.MANIFEST).write_bytes(b"damaged")
    assert [manifest.sequence for _, manifest in committed.refresh()] == [5]
