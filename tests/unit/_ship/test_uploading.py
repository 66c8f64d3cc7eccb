"""One upload to a folder: what is there is not sent again, and what is damaged here never arrives."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from vembed_async_ckpt import latest, verify
from vembed_async_ckpt._format import names
from vembed_async_ckpt._ship import uploading
from vembed_async_ckpt._ship.checkpoint import Damaged, Gone, LocalCheckpoint
from vembed_async_ckpt._ship.uploading import Uploading

from ..by_hand import checkpoint, save_id

SECOND = "model_state_dict.safetensors"  # a second name of the weights
WEIGHTS = bytes(range(256)) * 40
FILES = {
    "model.safetensors": WEIGHTS,
    SECOND: WEIGHTS,
    "optimizer.bin": b"state",
    "inner/config.json": b"{}",
    "empty": b"",
}


class Upload:
    """Uploads of checkpoint-1, and what each of them finished."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(uploading, "_PART", 4096)
        self.path = checkpoint(directory / "checkpoint-1", 1, FILES)
        self.folder = directory / "folder"
        self.sent: dict[str, str] = {}

    def run(self, between: Callable[[], None] = lambda: None) -> set[str]:
        """Upload; returns the names of the files that were finished, also if it fails."""
        finished: set[str] = set()

        def note(name: str, e_tag: str, size: int) -> None:
            assert size == len(FILES[name]) or (size == 0 and FILES[name] is WEIGHTS)  # one of the two is copied there
            finished.add(name)
            self.sent[name] = e_tag

        key = names.remote_checkpoint("checkpoint-1", save_id(1))
        with LocalCheckpoint(str(self.path), save_id(1)) as local:
            try:
                Uploading(self.folder.as_uri(), local, key, self.sent, note, between).run()
            finally:
                self.finished = finished
        return finished


@pytest.fixture
def upload(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Upload:
    return Upload(tmp_path, monkeypatch)


def test_what_is_there_is_not_sent_again(upload: Upload) -> None:
    """All of it at first; then what is missing or has another size there, and nothing else."""
    assert upload.run() == set(FILES)
    url = str(latest(upload.folder.as_uri()))
    verify(url)
    assert upload.run() == set()
    there = upload.folder / url.rpartition("/")[2]
    (there / "optimizer.bin").unlink()
    (there / "model.safetensors").unlink()  # a link to the second name
    (there / "model.safetensors").write_bytes(b"cut")
    assert upload.run() == {"optimizer.bin", "model.safetensors"}
    (there / SECOND).unlink()
    assert upload.run() == {SECOND}
    assert (there / SECOND).read_bytes() == FILES[SECOND]
    verify(url)
    assert len(list((upload.folder / names.MARKERS).iterdir())) == 1


def test_an_upload_that_was_interrupted_cannot_be_seen(upload: Upload) -> None:
    """However far it came: no marker before the manifest, no manifest before all else. The next one goes on."""
    for most in range(20):
        calls = 0

        def between() -> None:
            nonlocal calls
            calls += 1
            if calls > most:  # noqa: B023
                raise InterruptedError

        before = set(upload.sent)
        try:
            upload.run(between)
        except InterruptedError:
            assert latest(upload.folder.as_uri()) is None
            assert not before & upload.finished
            continue
        break
    assert 1 < most < 19
    verify(str(latest(upload.folder.as_uri())))


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.bin"])
@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: data + b"x", lambda data: data[:-1] + b"\0"])
def test_a_file_that_changed_here_never_arrives(upload: Upload, name: str, damage: Callable[[bytes], bytes]) -> None:
    """Sent in parts or in one: the object does not come to be, and no manifest names it."""
    (upload.path / name).write_bytes(damage(FILES[name]))
    with pytest.raises(Damaged, match=f"checkpoint-1/{name}: is not what was saved"):
        upload.run()
    assert latest(upload.folder.as_uri()) is None
    assert name not in upload.finished
    assert [
        path.name for path in upload.folder.rglob("*") if path.is_file() and path.name in (name, names.MANIFEST)
    ] == []


def test_the_files_of_one_save_are_read_whatever_takes_its_name(upload: Upload, tmp_path: Path) -> None:
    """Another save that exchanges the directory meanwhile gets nothing into this one; one that is gone is said to be."""

    exchanging = threading.Lock()  # several threads send, and each asks between two parts

    def exchange() -> None:
        with exchanging:
            if not (tmp_path / "old").exists():
                upload.path.rename(tmp_path / "old")
                checkpoint(upload.path, 2, {name: data[::-1] for name, data in FILES.items()})

    upload.run(exchange)
    assert verify(str(latest(upload.folder.as_uri()))).save_id == save_id(1)
    with pytest.raises(Gone, match="another save has replaced it"):
        upload.run()
    os.rename(upload.path, tmp_path / "elsewhere")
    with pytest.raises(Gone, match="is gone"):
        upload.run()
