"""Paths that are not what somebody takes them for, and checkpoints that go while they are looked at."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from vembed_async_ckpt import (
    AsyncCheckpointer,
    CheckpointError,
    CorruptCheckpoint,
    KeepLast,
    checkpoints,
    delete,
    latest,
    load,
    verify,
)
from vembed_async_ckpt._disk import manifests
from vembed_async_ckpt._format import names
from vembed_async_ckpt.cli import app

runner = CliRunner()
MODEL = torch.nn.Linear(4, 4)


@pytest.fixture
def saved(root: Path) -> Path:
    with AsyncCheckpointer(root, writer="thread") as checkpointer:
        for step in (1, 2, 3):
            checkpointer.save(step, model=MODEL).result(60)
    return root


def trainers(directory: Path) -> None:
    """What transformers' Trainer writes, as far as names go."""
    directory.mkdir(parents=True)
    for name in ("model.safetensors", "trainer_state.json", "optimizer.pt", "rng_state.pth"):
        (directory / name).write_bytes(b"{}")


def tree(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))


def refused(action: Callable[[], Any], said: str) -> None:
    """`action` raises an error that says so, and calls nothing corrupt."""
    with pytest.raises(CheckpointError, match=said) as raised:
        action()
    assert not isinstance(raised.value, CorruptCheckpoint)
    assert "incomplete" not in str(raised.value)


PATHS = {
    "missing": "does not exist",
    "a file": "is a file; a checkpoint is a directory",
    "root": "is no checkpoint, but a directory that holds some",
    "theirs/checkpoint-5": "was written by transformers' Trainer, not by vembed_async_ckpt",
    "project": "is no checkpoint, and holds none",
}
READERS: dict[str, Callable[[Path], Any]] = {
    "load": lambda path: load(path, model=MODEL),
    "verify": verify,
    "delete": delete,
}


@pytest.fixture
def around(saved: Path, tmp_path: Path) -> Path:
    """A directory with one of each."""
    saved.rename(tmp_path / "root")
    (tmp_path / "a file").write_text("notes")
    trainers(tmp_path / "theirs" / "checkpoint-5")
    (tmp_path / "project" / "runs").mkdir(parents=True)
    return tmp_path


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", PATHS)
def test_a_path_that_is_no_checkpoint(around: Path, name: str, reader: str) -> None:
    """It is said what it is, and nothing is made there."""
    before = tree(around)
    refused(lambda: READERS[reader](around / name), PATHS[name])
    assert tree(around) == before


@pytest.mark.parametrize("command", [["inspect"], ["verify"], ["export"], ["diff"]], ids=lambda command: command[0])
@pytest.mark.parametrize("name", PATHS)
def test_commands_on_a_path_that_is_no_checkpoint(around: Path, name: str, command: list[str]) -> None:
    """One line, the same words; `verify` takes a root too."""
    if command == ["verify"] and name in ("root", "theirs/checkpoint-5"):
        return
    further = {"export": [str(around / "out")], "diff": [str(around / "root" / "checkpoint-1")]}.get(command[0], [])
    before = tree(around)
    done = runner.invoke(app, [*command, str(around / name), *further])
    assert isinstance(done.exception, CheckpointError)
    assert not isinstance(done.exception, CorruptCheckpoint)
    assert PATHS[name] in str(done.exception)
    assert tree(around) == before


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("missing", "does not exist"),
        ("a file", "is a file"),
        ("root/checkpoint-3", "is a checkpoint, not a directory that holds some"),
        ("root/checkpoint-9", "does not exist"),
    ],
)
@pytest.mark.parametrize(
    "command", [["ls"], ["prune", "--keep-last", "1"], ["sweep"], ["sweep", "--yes"]], ids=" ".join
)
def test_commands_on_a_path_that_is_no_root(around: Path, name: str, said: str, command: list[str]) -> None:
    """They name what it is; nothing is made or deleted."""
    before = tree(around)
    done = runner.invoke(app, [*command, str(around / name)])
    assert isinstance(done.exception, CheckpointError), done.output
    assert said in str(done.exception)
    assert tree(around) == before


@pytest.mark.parametrize("name", ["checkpoint-3", "checkpoint-9", "checkpoint-8"])
def test_latest_of_a_checkpoint(saved: Path, name: str) -> None:
    """Nobody starts at 0 because the path was one too long: there, gone, and empty."""
    (saved / "checkpoint-8").mkdir()
    refused(lambda: latest(saved / name), f"give the directory that holds it, {saved}, or load")
    (saved / "checkpoint-8").rmdir()


def test_latest_where_nothing_is_yet(tmp_path: Path) -> None:
    """A root that is empty or not there has none, whatever it is called; nothing is made."""
    for name in ("run", "checkpoint-3"):
        assert latest(tmp_path / name) is None
        (tmp_path / name).mkdir()
        assert latest(tmp_path / name) is None
    assert tree(tmp_path) == ["checkpoint-3", "run"]


def test_a_root_of_another_program(tmp_path: Path) -> None:
    """It holds checkpoints, but none to go on from here: an error, not None, and nothing is called broken."""
    trainers(tmp_path / "checkpoint-5")
    refused(lambda: latest(tmp_path), "nothing there is a checkpoint of ours.*was written by transformers' Trainer")
    rows = json.loads(runner.invoke(app, ["ls", str(tmp_path), "--json"]).output)
    assert [(row["name"], row["complete"], row["ours"]) for row in rows] == [("checkpoint-5", False, False)]
    listing = runner.invoke(app, ["verify", str(tmp_path)])
    assert listing.exit_code == 1
    assert "BROKEN" not in listing.output


def test_checkpoints_of_two_programs_in_one_root(saved: Path) -> None:
    """Ours is found, the other one is named and not called broken."""
    trainers(saved / "checkpoint-500")
    with pytest.warns(UserWarning, match=r"^skipped: .*checkpoint-500: was written by transformers' Trainer"):
        assert latest(saved) == saved / "checkpoint-3"
    done = runner.invoke(app, ["verify", str(saved)])
    assert done.exit_code == 0
    assert done.output.count(": ok") == 3
    assert "checkpoint-500: was written by transformers' Trainer" in done.output
    shutil.rmtree(saved / "checkpoint-500")


def test_one_of_ours_that_lost_its_manifest_is_broken(saved: Path) -> None:
    """It is not taken for somebody else's."""
    manifest = saved / "checkpoint-2" / names.MANIFEST
    content = manifest.read_bytes()
    manifest.unlink()
    for reader in READERS.values():
        with pytest.raises(CorruptCheckpoint, match="incomplete"):
            reader(saved / "checkpoint-2")
    assert "BROKEN: " in runner.invoke(app, ["verify", str(saved)]).output
    manifest.write_bytes(content)


# -- beside a training that saves


class Meanwhile:
    """Does something when the files of `checkpoint` are about to be compared, once for each time in `when`."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, checkpoint: Path, act: Callable[[], object], times: int = 1
    ) -> None:
        self.left = times
        really = manifests.check

        def check(directory: str, *arguments: Any) -> None:
            if os.path.basename(directory) == checkpoint.name and self.left:
                self.left -= 1
                act()
            really(directory, *arguments)

        monkeypatch.setattr(manifests, "check", check)


COMMANDS = {"verify": ["verify"], "ls": ["ls"], "inspect": ["inspect"], "diff": ["diff"]}


def run(command: str, root: Path, name: str) -> Any:
    at = {
        "verify": [str(root)],
        "ls": [str(root), "--json"],
        "inspect": [str(root / name)],
        "diff": [str(root / name), str(root / "checkpoint-3")],
    }
    return runner.invoke(app, [*COMMANDS[command], *at[command]])


@pytest.mark.parametrize("command", COMMANDS)
def test_one_that_goes_meanwhile_is_not_broken(saved: Path, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    """A root is looked at as it is; who asked for that one is told that it is gone."""
    one = saved / "checkpoint-1"
    Meanwhile(monkeypatch, one, lambda: shutil.rmtree(one))
    done = run(command, saved, "checkpoint-1")
    assert "BROKEN" not in done.output
    assert not isinstance(done.exception, CorruptCheckpoint)
    if command == "verify":
        assert f"{one}: gone" in done.output
        assert (done.exit_code, done.output.count(": ok")) == (0, 2)
    elif command == "ls":
        assert [row["name"] for row in json.loads(done.output)] == ["checkpoint-2", "checkpoint-3"]
    else:
        assert f"{one}: is gone" in str(done.exception)


@pytest.mark.parametrize("command", COMMANDS)
def test_one_that_is_replaced_meanwhile_is_looked_at_again(
    saved: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    """The same step is saved again: what is there now is whole."""

    def again() -> None:
        with AsyncCheckpointer(saved, writer="thread") as checkpointer:
            checkpointer.save(1, model=torch.nn.Linear(9, 9)).result(60)

    Meanwhile(monkeypatch, saved / "checkpoint-1", again)
    done = run(command, saved, "checkpoint-1")
    assert "BROKEN" not in done.output
    assert isinstance(done.exception, SystemExit | None), done.exception
    if command == "ls":
        assert all(row["complete"] for row in json.loads(done.output))
    else:
        assert done.exit_code == (1 if command == "diff" else 0)


@pytest.mark.parametrize("command", ["verify", "inspect", "diff"])
def test_retention_leaves_alone_what_is_being_read(saved: Path, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    """As `load` does: it goes with the next save."""

    def save() -> None:
        with AsyncCheckpointer(saved, writer="thread", retention=KeepLast(3)) as checkpointer:
            checkpointer.save(4, model=MODEL).result(60)

    Meanwhile(monkeypatch, saved / "checkpoint-1", save)
    done = run(command, saved, "checkpoint-1")
    assert "gone" not in done.output
    assert isinstance(done.exception, SystemExit | None), done.exception
    assert (saved / "checkpoint-1").exists()


def test_listing_beside_a_training(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`checkpoints()` leaves out what has gone, and `verify()` says so."""
    one = saved / "checkpoint-1"
    Meanwhile(monkeypatch, one, lambda: shutil.rmtree(one))
    assert [entry.path.name for entry in checkpoints(saved) if entry.complete] == ["checkpoint-3", "checkpoint-2"]
    two = saved / "checkpoint-2"
    Meanwhile(monkeypatch, two, lambda: shutil.rmtree(two))
    refused(lambda: verify(two), "is gone: it was deleted or replaced while it was read")
