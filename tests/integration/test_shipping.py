"""Checkpoints in a bucket: complete when they can be seen there, read back bit for bit, and kept here until then."""

from __future__ import annotations

import json
import logging
import os
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import obstore
import psutil
import pytest
import torch
from typer.testing import CliRunner

from vembed_async_ckpt import (
    AsyncCheckpointer,
    CheckpointError,
    CheckpointInfo,
    CorruptCheckpoint,
    Event,
    KeepLast,
    best,
    checkpoints,
    latest,
    load,
    verify,
)
from vembed_async_ckpt._disk import notes
from vembed_async_ckpt._format import names
from vembed_async_ckpt.cli import app
from vembed_async_ckpt.shipping import push_to_hub, upload

from ..buckets import SECRET, Bucket, is_end

BOUND = 60.0
WIDTH = 1600  # the weights are one object of 10 MB, the optimizer's state one of 20 MB, sent in parts


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + BOUND
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def store(moto: Bucket, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """The bucket, with its place and credentials in the environment."""
    for name, value in moto.environment.items():
        monkeypatch.setenv(name, value)
    return moto


@dataclass
class Training:
    """A model and its optimizer that are saved after each step."""

    width: int = 40
    events: list[Event] = field(default_factory=list)

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        self.model = torch.nn.Linear(self.width, self.width)
        self.optimizer = torch.optim.AdamW(self.model.parameters())

    def checkpointer(self, root: Path, **options: Any) -> AsyncCheckpointer:
        return AsyncCheckpointer(root, **{"retention": KeepLast(1), "sinks": [self.events.append], **options})

    def save(self, checkpointer: AsyncCheckpointer, step: int) -> CheckpointInfo:
        self.optimizer.zero_grad()
        self.model(torch.ones(self.width)).sum().backward()
        self.optimizer.step()
        metrics = {"loss": 1 / step}
        return checkpointer.save(step, model=self.model, optimizer=self.optimizer, metrics=metrics).result(BOUND)

    def told(self, phase: str) -> list[tuple[int | None, str]]:
        return [
            (event.step, event.detail) for event in self.events if (event.stage, event.phase) == ("after_commit", phase)
        ]


def local_steps(root: Path) -> list[int]:
    return sorted(int(path.name.split("-")[1]) for path in root.glob("checkpoint-*"))


def remote_steps(url: str) -> list[int | None]:
    return [entry.step for entry in checkpoints(url)]


@dataclass(frozen=True)
class Run:
    """A run that has ended: three checkpoints were uploaded, the newest is kept here."""

    url: str
    root: Path
    training: Training


@pytest.fixture(scope="module")
def run(moto: Bucket, tmp_path_factory: pytest.TempPathFactory) -> Run:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in moto.environment.items():
            patch.setenv(name, value)
        found = Run("s3://bucket/runs/one", tmp_path_factory.mktemp("run") / "root", Training(WIDTH))
        with found.training.checkpointer(found.root, after_commit=[upload(found.url + "/")]) as checkpointer:
            for step in (1, 2, 3):
                found.training.save(checkpointer, step)
    return found


def test_every_checkpoint_is_there_when_close_returns(run: Run, store: Bucket) -> None:
    """All three, whole, newest first; here the newest only, and no trace of the shipping."""
    assert remote_steps(run.url) == [3, 2, 1]
    assert all(entry.complete and entry.total_bytes > 3 * 4 * WIDTH**2 for entry in checkpoints(run.url))
    assert [verify(entry.path).step for entry in checkpoints(run.url)] == [3, 2, 1]
    assert os.listdir(run.root) == ["checkpoint-3"]
    assert [step for step, _ in run.training.told("complete")] == [1, 2, 3]
    assert run.training.told("failed") == []
    assert str(best(run.url, "loss")) == latest(run.url) == str(checkpoints(run.url)[0].path)
    sizes = [
        event.bytes for event in run.training.events if event.stage == "after_commit" and event.phase == "complete"
    ]
    assert sizes == [entry.total_bytes for entry in reversed(checkpoints(run.url))]
    assert store.sent_again("runs/one") == []
    sent = [
        key
        for method, key, query in store.requests()
        if is_end(method, query) and key.startswith("runs/one/checkpoint")
    ]
    assert len(sent) == len(set(sent)) == sum(len(verify(entry.path).files) + 1 for entry in checkpoints(run.url))


def test_what_is_loaded_from_a_url_is_what_was_saved(run: Run, store: Bucket) -> None:
    """Weights and the optimizer's state, bit for bit."""
    there = Training(WIDTH)
    restored = load(str(latest(run.url)), model=there.model, optimizer=there.optimizer)
    assert restored.step == 3
    for mine, theirs in zip(run.training.model.parameters(), there.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    for mine, theirs in zip(run.training.optimizer.state.values(), there.optimizer.state.values(), strict=True):
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_only_the_ranges_that_are_needed_are_read(run: Run, store: Bucket) -> None:
    """For the model alone, its bytes and a little; for one parameter of it, the list and the newest, less than a hundredth."""
    url, weights = str(latest(run.url)), 4 * WIDTH**2
    before = store.door.sent
    load(url, model=Training(WIDTH).model)
    assert weights < store.door.sent - before < 1.05 * weights
    before = store.door.sent
    load(url, model=Training(WIDTH).model, exclude="weight")
    checkpoints(run.url)
    assert latest(run.url) == url
    assert store.door.sent - before < 0.01 * weights


def test_the_command_line_reads_urls(run: Run, store: Bucket) -> None:
    """`ls`, `latest` and `verify` print what they print of a directory."""
    runner = CliRunner()
    listed = json.loads(runner.invoke(app, ["ls", run.url, "--json"]).output)
    assert [(row["step"], row["complete"]) for row in listed] == [(1, True), (2, True), (3, True)]
    assert runner.invoke(app, ["latest", run.url]).output.strip() == latest(run.url)
    done = runner.invoke(app, ["verify", run.url, "--json"])
    assert done.exit_code == 0
    assert [result["ok"] for result in json.loads(done.output)] == [True] * 3
    done = runner.invoke(app, ["verify", str(latest(run.url))])
    assert done.exit_code == 0
    assert done.output.strip() == f"{latest(run.url)}: ok"
    assert runner.invoke(app, ["ls", "s3://bucket/runs/none"]).exit_code == 1


def test_urls_that_are_not_what_they_should_be(run: Run, store: Bucket) -> None:
    """A run is not loaded, a checkpoint that is not there is said, and no URL is taken for a path."""
    assert latest("s3://bucket/runs/none") is None
    assert checkpoints("file:///does/not/exist") == []
    for url, why in {
        run.url: "use latest",
        "s3://bucket/runs/none": "is no checkpoint",
        "file:///does/not/exist": "does not exist",
        "ftp://bucket/run": "kind 'ftp' cannot be used",
        f"s3://key:{SECRET}@bucket/run": "credentials come from the environment",
        "s3://missing-bucket/run": "NoSuchBucket",
    }.items():
        with pytest.raises(CheckpointError, match=why) as caught:
            load(url, model=run.training.model)
        assert SECRET not in str(caught.value)
        with pytest.raises(CheckpointError, match=why):
            verify(url)


def test_bytes_that_change_in_the_bucket_are_found(run: Run, store: Bucket) -> None:
    """By `verify`, which names the object; a wrong size by `latest` too, which takes the checkpoint before it."""
    newest, second, _ = (str(entry.path) for entry in checkpoints(run.url))
    key = newest.removeprefix("s3://bucket/") + "/model.safetensors"
    data = bytes(obstore.get(store.store, key).bytes())
    try:
        obstore.put(store.store, key, data[:-1] + bytes([data[-1] ^ 1]))
        assert latest(run.url) == newest
        with pytest.raises(CorruptCheckpoint, match=f"{newest}/model.safetensors: content differs"):
            verify(newest)
        done = CliRunner().invoke(app, ["verify", run.url])
        assert done.exit_code == 1
        assert f"{newest}: BROKEN: {newest}/model.safetensors: content differs" in done.output
        with pytest.raises(CorruptCheckpoint, match="content differs"):
            load(newest, model=Training(WIDTH).model, verify="full")
        obstore.put(store.store, key, data[:-1])
        with pytest.warns(UserWarning, match="skipped a broken checkpoint.*the manifest says"):
            assert latest(run.url) == second
        obstore.delete(store.store, key)
        with pytest.warns(UserWarning, match="missing"):
            assert latest(run.url) == second
        assert [entry.complete for entry in checkpoints(run.url)] == [False, True, True]
    finally:
        obstore.put(store.store, key, data)
    verify(newest)


def test_nothing_is_deleted_here_before_it_is_there(store: Bucket, root: Path) -> None:
    """While the store cannot be reached, retention waits, and says so; afterwards all is shipped, and retention goes on."""
    training, url = Training(), "s3://bucket/runs/gone"
    store.door.shut()
    try:
        with training.checkpointer(root, after_commit=[upload(url)]) as checkpointer:
            for step in range(1, 5):
                training.save(checkpointer, step)
            until(lambda: bool(training.told("failed")))
            assert local_steps(root) == [1, 2, 3, 4]
            assert CliRunner().invoke(app, ["prune", str(root), "--keep-last", "1", "--dry-run"]).output == ""
            store.door.reopen()
    finally:
        store.door.reopen()
    assert remote_steps(url) == [4, 3, 2, 1]
    assert local_steps(root) == [4]
    assert training.told("failed")[0][1].startswith(f"checkpoint-1 to {url}: ")


def test_too_many_that_wait_give_way_aloud(store: Bucket, root: Path) -> None:
    """The one whose upload has begun goes on, the newest stays, and of the rest the oldest are given up by name."""
    training, url = Training(), "s3://bucket/runs/many"
    store.door.shut()
    try:
        with training.checkpointer(root, after_commit=[upload(url)], max_unshipped=2) as checkpointer:
            training.save(checkpointer, 1)
            until(lambda: bool(training.told("started")))
            for step in range(2, 7):
                training.save(checkpointer, step)
            until(lambda: local_steps(root) == [1, 5, 6])
            store.door.reopen()
    finally:
        store.door.reopen()
    assert remote_steps(url) == [6, 5, 1]
    given_up = [(step, said) for step, said in training.told("failed") if "max_unshipped" in said]
    assert [step for step, _ in given_up] == [2, 3, 4]
    assert given_up[0][1].startswith("checkpoint-2 was deleted and was not shipped")


def test_the_next_run_ships_what_was_left(store: Bucket, root: Path) -> None:
    """Even one that ships nothing itself; `close` did not wait for a network that is gone, and said what it left."""
    training, url = Training(), "s3://bucket/runs/left"
    store.door.shut()
    try:
        checkpointer = training.checkpointer(root, after_commit=[upload(url)])
        for step in (1, 2):
            training.save(checkpointer, step)
        begun = time.monotonic()
        with pytest.warns(UserWarning, match="2 checkpoints are not shipped yet"):
            checkpointer.close()
        assert time.monotonic() - begun < BOUND / 2
        assert len(notes.waiting(str(root))) == 2
        lines = {process: process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])}
        (shipper,) = (process for process, line in lines.items() if str(root) in line and "_ship" in str(line))
        shipper.kill()  # as the end of a container does
        swept = CliRunner().invoke(app, ["sweep", str(root), "--yes"]).output
        assert swept.startswith("still to be shipped: checkpoint-1;")
    finally:
        store.door.reopen()
    with training.checkpointer(root) as checkpointer:
        assert local_steps(root) == [1, 2]
        until(lambda: not notes.waiting(str(root)))
    assert remote_steps(url) == [2, 1]
    assert CliRunner().invoke(app, ["prune", str(root), "--keep-last", "1"]).output == "deleted checkpoint-1\n"


def test_saves_on_another_machine_are_newer(store: Bucket, tmp_path: Path) -> None:
    """Where the numbers of the saves begin anew, the newest is still the last that was uploaded."""
    url = "s3://bucket/runs/moved"
    for root, steps in (("a", (1, 2, 3)), ("b", (2,))):
        training = Training()
        with training.checkpointer(tmp_path / root, after_commit=[upload(url)]) as checkpointer:
            for step in steps:
                training.save(checkpointer, step)
    assert remote_steps(url) == [2, 3, 2, 1]


def test_a_save_under_the_same_name_replaces_what_waits(store: Bucket, root: Path) -> None:
    """The earlier one is not shipped, which is said; no checkpoint in the bucket mixes the two."""
    training, url = Training(), "s3://bucket/runs/twice"
    store.door.shut()
    try:
        with training.checkpointer(root, after_commit=[upload(url)]) as checkpointer:
            training.save(checkpointer, 1)
            until(lambda: bool(training.told("failed")))
            training.save(checkpointer, 1)
            until(lambda: any("another one has replaced it" in said for _, said in training.told("failed")))
            store.door.reopen()
    finally:
        store.door.reopen()
    (entry,) = checkpoints(url)
    there = Training()
    load(str(entry.path), model=there.model)
    assert torch.equal(there.model.weight, training.model.weight)


def test_secrets_are_nowhere(store: Bucket, root: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Not in a note, a manifest, an event, a log, a warning, a command line or an object, when all goes wrong too."""
    caplog.set_level(logging.DEBUG)
    training, url = Training(), "s3://bucket/runs/secret"
    seen: list[str] = []
    store.door.shut()
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            checkpointer = training.checkpointer(root, after_commit=[upload(url)])
            training.save(checkpointer, 1)
            until(lambda: len(training.told("failed")) > 1)
            seen += [str(child.cmdline()) for child in psutil.Process().children(recursive=True)]
            seen += [path.read_bytes().decode(errors="replace") for path in root.rglob("*") if path.is_file()]
            assert any("_ship" in line for line in seen)
            assert any('"upload"' in text for text in seen)
            store.door.reopen()
            checkpointer.close()
    finally:
        store.door.reopen()
    seen += [str(event) for event in training.events] + [record.getMessage() for record in caplog.records]
    seen += [str(warning.message) for warning in warned]
    for found in obstore.list(store.store, "runs/secret").collect():
        seen += [found["path"], bytes(obstore.get(store.store, found["path"]).bytes()).decode(errors="replace")]
    assert len(seen) > 30
    assert [text for text in seen if SECRET in text] == []


def test_functions_are_called_in_order_and_never_fail_a_save(root: Path, tmp_path: Path) -> None:
    """After the upload before them, each with the checkpoint still there; one that raises is tried again and reported."""
    training, url = Training(), (tmp_path / "folder").as_uri()
    called: list[tuple[str, int | None]] = []

    def first(info: CheckpointInfo) -> None:
        verify(info.path)
        called.append(("first", info.step))
        assert info.step in remote_steps(url)

    def fails(info: CheckpointInfo) -> None:
        called.append(("fails", info.step))
        if [what for what, step in called if step == info.step].count("fails") < 2:
            raise RuntimeError("no luck")

    def last(info: CheckpointInfo) -> None:
        called.append(("last", info.step))

    with training.checkpointer(root, after_commit=[upload(url), first, fails, last]) as checkpointer:
        for step in (1, 2):
            training.save(checkpointer, step)
    order = ["first", "fails", "fails", "last"]
    assert called == [(what, step) for step in (1, 2) for what in order]
    assert [said.split("<locals>.")[1] for _, said in training.told("failed")] == [
        "fails: RuntimeError: no luck; failed 1 times, next try in 1 s"
    ] * 2
    assert remote_steps(url) == [2, 1]
    assert checkpointer.statistics()["failed"] == 0


@pytest.mark.parametrize("writer", ["process", "thread"])
def test_a_folder_takes_uploads_too(root: Path, tmp_path: Path, writer: Any) -> None:
    """With both kinds of writer; everything there is durable and whole, nothing else lies there."""
    training, folder = Training(), tmp_path / "a folder" / "run"
    with training.checkpointer(root, writer=writer, after_commit=[upload(folder.as_uri())]) as checkpointer:
        training.save(checkpointer, 1)
    (entry,) = checkpoints(folder.as_uri())
    verify(entry.path)
    directory = folder / str(entry.path).rpartition("/")[2]
    assert {path.name for path in directory.iterdir()} == {*verify(directory).files, names.MANIFEST}
    assert load(entry.path, model=training.model, optimizer=training.optimizer).step == 1


@pytest.mark.parametrize(
    ("options", "kind", "said"),
    [
        ({"after_commit": "s3://bucket/run"}, TypeError, "use a list of functions"),
        ({"after_commit": [1]}, TypeError, "use a list of functions"),
        ({"after_commit": 5}, TypeError, "use a list of functions"),
        ({"max_unshipped": 0}, ValueError, "at least 1, or None"),
        ({"max_unshipped": True}, ValueError, "at least 1, or None"),
    ],
)
def test_options_that_cannot_be(tmp_path: Path, options: dict[str, Any], kind: type[Exception], said: str) -> None:
    """Refused by name, before anything is made."""
    with pytest.raises(kind, match=said):
        AsyncCheckpointer(tmp_path / "root", **options)
    assert not (tmp_path / "root").exists()


@pytest.mark.parametrize(
    "make",
    [
        lambda: upload("bucket/run"),
        lambda: upload("https://bucket/run"),
        lambda: upload("s3://"),
        lambda: upload("file://folder/run"),
        lambda: upload(f"s3://key:{SECRET}@bucket/run"),
        lambda: upload(f"az://container/run?sig={SECRET}"),
        lambda: push_to_hub("me/model/more"),
        lambda: push_to_hub("me/model", revision=""),
    ],
)
def test_targets_that_cannot_be(make: Callable[[], object]) -> None:
    """Refused at once, and what may be a secret is not repeated."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011  (what is said differs)
        make()
    assert SECRET not in str(caught.value)
