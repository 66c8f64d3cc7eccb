"""What `latest` and `load` make of a damaged root: the right checkpoint with the reason for passing over others, or an error.

Never silence, never None where something claims to be a checkpoint.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
import struct
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from vembed_async_ckpt import (
    AsyncCheckpointer,
    CheckpointError,
    CorruptCheckpoint,
    Event,
    KeepLast,
    latest,
    load,
    verify,
)
from vembed_async_ckpt._disk import manifests
from vembed_async_ckpt._format import names
from vembed_async_ckpt.testing import FailingFilesystem, use_filesystem

from .conftest import Tally
from .inprocess import Hasty, Writer

FLIPS = 64


class Processor:
    """Something with files of its own."""

    def save_pretrained(self, directory: str) -> None:
        Path(directory, "preprocessor_config.json").write_text('{"size": 224, "mean": [0.5, 0.5, 0.5]}')


def training() -> dict[str, Any]:
    model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Linear(5, 2))
    return {"model": model, "optimizer": torch.optim.AdamW(model.parameters())}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with two checkpoints, which no test changes."""
    root = tmp_path_factory.mktemp("saved") / "root"
    parts = training()
    with AsyncCheckpointer(root, writer="thread") as checkpointer:
        for step in (1, 2):
            parts["model"](torch.ones(1, 4)).sum().backward()
            parts["optimizer"].step()
            checkpointer.save(step, **parts, processor=Processor(), config={"lr": 0.1}, extra={"n": step}).result(60)
    return root


@pytest.fixture
def root(saved: Path, memory: Path) -> Path:
    """A copy that may be damaged."""
    return Path(shutil.copytree(saved, memory / "root"))


FILES = [
    "model.safetensors", "optimizer.bin", "preprocessor_config.json", names.CONFIG, names.MANIFEST, names.TRAINING_STATE,
]  # fmt: skip


def head_only(data: bytes) -> bytes:
    """As when the first pages reached the disk and the rest did not."""
    head = 8 + struct.unpack("<Q", data[:8])[0] if data[:1] not in b"{P" else min(len(data) // 2, 64)
    return data[:head] + bytes(len(data) - head)


# By name: what becomes of the bytes; None: the file is gone.
DAMAGES: dict[str, Callable[[bytes], bytes | None]] = {
    "missing": lambda data: None,
    "empty": lambda data: b"",
    "truncated": lambda data: data[: len(data) // 2],
    "zeros": lambda data: bytes(len(data)),
    "header and zeros": head_only,
    "trailing bytes": lambda data: data + bytes(512),
}


def damage(path: Path, how: Callable[[bytes], bytes | None]) -> bool:
    """Damage a file; returns whether its size tells."""
    before = path.read_bytes()
    after = how(before)
    assert after != before
    path.unlink()
    if after is not None:
        path.write_bytes(after)
    return after is None or len(after) != len(before)


def chosen(root: Path, how: str) -> tuple[Path | None, str]:
    """What `latest` finds, and what it says of what it passed over."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        return latest(root, verify=how), "\n".join(str(warning.message) for warning in said)


def wrong_choices(root: Path, name: str, size_tells: bool) -> Iterator[str]:
    """What is wrong with how `latest` and `load` take the damage of `name` in checkpoint-2, and then of both."""
    broken = root / "checkpoint-2"
    for how in ("size", "full"):
        tells = size_tells or how == "full" or name == names.MANIFEST
        found, said = chosen(root, how)
        if found != root / f"checkpoint-{1 if tells else 2}":
            yield f"latest, {how}: {found}"
        if tells != ("checkpoint-2" in said and name in said):
            yield f"latest, {how}, said {said!r}"
        if tells:
            parts = training()
            before = {key: value.clone() for key, value in parts["model"].state_dict().items()}
            try:
                load(broken, **parts, verify=how)
                yield f"load, {how}: nothing was raised"
            except CorruptCheckpoint as error:
                if name not in str(error) or "checkpoint-2" not in str(error):
                    yield f"load, {how}: {error}"
            if any(not torch.equal(value, before[key]) for key, value in parts["model"].state_dict().items()):
                yield f"load, {how}: the model was changed"
    (root / "checkpoint-1" / "model.safetensors").unlink()
    try:
        yield f"all broken: {latest(root, verify='full')}"
    except CorruptCheckpoint as error:
        if not all(what in str(error) for what in ("checkpoint-1", "checkpoint-2", name, "none of the 2")):
            yield f"all broken: {error}"


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_every_file_damaged_in_every_way(tally: Tally, root: Path, name: str, how: str) -> None:
    """The newest is passed over for the one before it, with file and reason; both damaged, that is an error."""
    tally.fault(how, list(wrong_choices(root, name, damage(root / "checkpoint-2" / name, DAMAGES[how]))))
    tally.settle(at_least=1)


def test_one_bit(tally: Tally, root: Path) -> None:
    """Any bit of any file: hashes tell, and nothing but the file that it is in is named."""
    dice = random.Random(8)
    files = sorted(path for path in (root / "checkpoint-2").rglob("*") if path.is_file() and path.stat().st_size)
    for _ in range(FLIPS):
        path = dice.choice(files)
        data = path.read_bytes()
        at, bit = dice.randrange(len(data)), dice.randrange(8)
        path.write_bytes(data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :])
        found, said = chosen(root, "full")
        right = found == root / "checkpoint-1" and path.name in said
        tally.fault(f"{path.name}, byte {at}, bit {bit}", [] if right else [f"{found}, {said!r}"])
        path.write_bytes(data)
    assert chosen(root, "full") == (root / "checkpoint-2", "")
    tally.settle(at_least=FLIPS)


# -- roots

ERRORS = [errno.EIO, errno.EACCES, errno.ESTALE, errno.ENOTDIR, errno.ELOOP, errno.EMFILE]


@pytest.mark.parametrize("error", ERRORS, ids=errno.errorcode.get)
def test_a_root_that_cannot_be_listed(tally: Tally, root: Path, monkeypatch: pytest.MonkeyPatch, error: int) -> None:
    """Nobody knows what is there: an error, not "nothing"."""
    real = os.scandir

    def scandir(path: Any) -> Any:
        if os.fspath(path) == str(root):
            raise OSError(error, os.strerror(error), path)
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(CheckpointError, match=os.strerror(error)):
        latest(root)
    tally.fault(errno.errorcode[error], [])
    tally.settle(at_least=1)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody without rights")
@pytest.mark.parametrize("what", ["root", "work", "lock", "replaced"])
def test_without_the_right_to_look(tally: Tally, root: Path, memory: Path, what: str) -> None:
    """A root, a work directory, a lock file of somebody else: an error that says so, not "nothing" and no bare OSError."""
    (root / names.WORK / "replaced").mkdir(parents=True)
    (root / names.WORK / "lock").touch()
    path = {"root": root, "work": root / names.WORK}.get(what, root / names.WORK / what)
    memory.chmod(0o755)
    path.chmod(0)
    os.seteuid(65534)
    try:
        with pytest.raises(CheckpointError, match="Permission denied"):
            latest(root)
    finally:
        os.seteuid(0)
        path.chmod(0o755)
    tally.fault(what, [])
    tally.settle(at_least=1)


def loop(root: Path) -> None:
    shutil.rmtree(root)
    root.symlink_to(root)


def a_file(root: Path) -> None:
    shutil.rmtree(root)
    root.touch()


@pytest.mark.parametrize("make", [loop, a_file])
def test_a_root_that_is_no_directory(tally: Tally, root: Path, make: Callable[[Path], None]) -> None:
    """A file, or a link to itself: an error."""
    make(root)
    with pytest.raises(CheckpointError):
        latest(root)
    tally.fault(make.__name__, [])
    tally.settle(at_least=1)


def test_a_root_that_is_not_there_or_empty(tally: Tally, root: Path, memory: Path) -> None:
    """That is no error: there is nothing yet; nor is what a crash left before the first commit."""
    assert latest(memory / "nowhere") is None
    (root / names.WORK).mkdir()
    for checkpoint in root.glob("checkpoint-*"):
        checkpoint.rename(root / names.WORK / f"work-{checkpoint.name[-1] * 32}.0")
    assert latest(root) is None
    tally.fault("nothing", [])
    tally.settle(at_least=1)


def empty(root: Path) -> str:
    (root / "checkpoint-999").mkdir()
    return "checkpoint-999"


def without_manifest(root: Path) -> str:
    shutil.copytree(root / "checkpoint-1", root / "checkpoint-999")
    (root / "checkpoint-999" / names.MANIFEST).unlink()
    return "checkpoint-999"


def torn(root: Path) -> str:
    shutil.copytree(root / "checkpoint-2", root / "checkpoint-999")
    damage(root / "checkpoint-999" / names.MANIFEST, DAMAGES["truncated"])
    return "checkpoint-999"


def dangling(root: Path) -> str:
    (root / "checkpoint-999").symlink_to(root / "nowhere")
    return "checkpoint-999"


def linked(root: Path) -> str:
    (root / "checkpoint-999").symlink_to("checkpoint-1")
    return "checkpoint-999"


def linked_to_itself(root: Path) -> str:
    (root / "checkpoint-999").symlink_to("checkpoint-999")
    return "checkpoint-999"


def another_name(root: Path) -> str:
    (root / "best").mkdir()
    (root / "best" / names.MANIFEST).touch()
    return "best"


@pytest.mark.parametrize("make", [empty, without_manifest, torn, dangling, linked, linked_to_itself, another_name])
@pytest.mark.parametrize("how", ["none", "size", "full"])
def test_something_broken_beside_it(tally: Tally, root: Path, make: Callable[[Path], str], how: str) -> None:
    """What claims to be a checkpoint and is none is passed over with a warning, however high its number; nobody deletes it."""
    name = make(root)
    found, said = chosen(root, how)
    right = found == root / "checkpoint-2" and name in said and "skipped a broken checkpoint" in said
    tally.fault(name, [] if right else [f"{found}, {said!r}"])
    with Writer(str(root), Hasty()) as writer:
        assert writer.save(3, 3, keep=1).acknowledged
    assert sorted(set(os.listdir(root)) - {names.WORK}) == sorted(["checkpoint-3", name])
    tally.settle(at_least=1)


@pytest.mark.parametrize("how", ["none", "size", "full"])
def test_what_a_crash_left_is_not_looked_at(tally: Tally, root: Path, how: str) -> None:
    """Work and trash, whole or torn, say nothing about what is newest."""
    work = root / names.WORK
    shutil.copytree(root / "checkpoint-2", work / f"work-{'a' * 32}.0")
    (work / f"work-{'b' * 32}.1").mkdir()
    shutil.move(root / "checkpoint-2", work / f"trash-{'c' * 32}")
    assert chosen(root, how) == (root / "checkpoint-1", "")
    tally.fault("leftovers", [])
    tally.settle(at_least=1)


@pytest.mark.parametrize("how", ["size", "full"])
def test_a_replacement_between_two_looks(tally: Tally, memory: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """The newest is saved again while `latest` compares it with the manifest that it had: it looks again, and warns of nothing."""
    root, real, turns = memory / "root", manifests.check, iter([2])
    with Writer(str(root), Hasty()) as writer:
        assert writer.save(1, 7, 3).acknowledged
        assert writer.save(2, 8, 3).acknowledged

        def check(*arguments: Any) -> None:
            if next(turns, None):
                assert writer.save(3, 8, 3).acknowledged
            real(*arguments)

        monkeypatch.setattr(manifests, "check", check)
        found, said = chosen(root, how)
    tally.fault(how, [] if (found, said) == (root / "checkpoint-8", "") else [f"{found}, {said!r}"])
    tally.settle(at_least=1)


ODD = [
    "checkpoint-٣", "checkpoint-3\n", "checkpoint-03", "checkpoint-+3", "checkpoint--3", "checkpoint-3_0", "checkpoint- 3",
    "checkpoint-³", "xcheckpoint-3", "checkpoint-3.0", "checkpoint-3~", "Checkpoint-3", "checkpoint-", "checkpoint",
]  # fmt: skip


@pytest.mark.parametrize("name", ODD, ids=ascii)
def test_names_that_are_none_of_ours(tally: Tally, root: Path, name: str) -> None:
    """Empty, such a directory claims nothing; whole, it is a checkpoint by its manifest, but not one that retention may delete."""
    problems = []
    (root / name).mkdir()
    if chosen(root, "full") != (root / "checkpoint-2", ""):
        problems.append(f"empty: {chosen(root, 'full')}")
    (root / name).rmdir()
    (root / "checkpoint-2").rename(root / name)
    if chosen(root, "full") != (root / name, ""):
        problems.append(f"whole: {chosen(root, 'full')}")
    with Writer(str(root), Hasty()) as writer:
        assert writer.save(3, 3, keep=1).acknowledged
    if sorted(set(os.listdir(root)) - {names.WORK}) != sorted([name, "checkpoint-3"]):
        problems.append(f"retention left {os.listdir(root)}")
    verify(root / name)
    tally.fault(name, problems)
    tally.settle(at_least=1)


# -- what the writer has to say about it


@pytest.mark.parametrize(
    ("call", "path"), [("sync_directory", ""), ("unlink", "trash-")], ids=["the sweep", "retention"]
)
def test_what_the_writer_could_not_clean_up_is_logged_once(
    tally: Tally, memory: Path, caplog: pytest.LogCaptureFixture, call: str, path: str
) -> None:
    """One warning that names the root, one event; the saves are made."""
    root, events = memory / "root", list[Event]()
    disk = FailingFilesystem(Hasty())
    disk.fail(errno.EIO, call, path=path)
    with (
        use_filesystem(disk),
        AsyncCheckpointer(root, retention=KeepLast(1), writer="thread", sinks=[events.append]) as checkpointer,
    ):
        for step in (1, 2):
            checkpointer.save(step, **training()).result(60)
    assert disk.failed
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    told = [event.detail for event in events if event.stage == "writer" and event.phase == "failed"]
    right = len(said) == len(told) == 1 and str(root) in said[0] and told[0] in said[0]
    tally.fault(call, [] if right and os.strerror(errno.EIO) in said[0] else [f"{said}, {told}"])
    tally.settle(at_least=1)
