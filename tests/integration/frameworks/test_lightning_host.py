"""Inside Lightning's own program: what people and frameworks rely on where a checkpoint is saved, named, found and loaded."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from lightning.pytorch.trainer.connectors import signal_connector

from vembed_async_ckpt import PlanError, WriteError, latest, verify
from vembed_async_ckpt.integrations import lightning as plugin_module
from vembed_async_ckpt.integrations.lightning import VembedCheckpointIO, load_from_checkpoint, read_checkpoint
from vembed_async_ckpt.integrations.shared import open_at
from vembed_async_ckpt.testing import use_filesystem

from .test_lightning import STEPS, At, Disk, Net, batches, each_epoch, every, trainer, visible

pytestmark = [
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated"),
]


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "checkpoints"
    plugin_module._tear_down_at_exit()


@pytest.fixture
def disk() -> Iterator[Disk]:
    with use_filesystem(disk := Disk()):
        yield disk
        disk.go.set()
        plugin_module._tear_down_at_exit()


# -- saves that somebody relies on


@pytest.mark.parametrize("by", ["in a callback", "after fit"])
def test_a_save_of_the_users_is_there_when_the_call_returns(root: Path, by: str) -> None:
    """`trainer.save_checkpoint("manual.ckpt")`: whole, and nothing is left open or beside it."""
    path = root / "manual.ckpt"
    steps: list[int] = []

    def save() -> None:
        fitted.save_checkpoint(path)
        verify(path)
        steps.append(read_checkpoint(path)["global_step"])

    fitted = trainer(VembedCheckpointIO(), *([At(3, save)] if by == "in a callback" else []))
    fitted.fit(Net(), batches())
    if by == "after fit":
        save()
    assert steps == [3 if by == "in a callback" else STEPS]
    assert open_at(str(root)) is None
    assert os.listdir(root) == ["manual.ckpt"]


def test_a_save_of_the_users_does_not_end_those_of_model_checkpoint(root: Path) -> None:
    """Both in one directory."""
    fitted = trainer(
        VembedCheckpointIO(), every(1, root, save_top_k=-1), At(3, lambda: fitted.save_checkpoint(root / "m.ckpt"))
    )
    fitted.fit(Net(), batches())
    assert visible(root) == ["m.ckpt", *(f"step={step}.ckpt" for step in range(1, STEPS + 1))]


def test_a_save_of_the_users_that_fails_says_so(root: Path, disk: Disk) -> None:
    """The call raises, not the end of fit."""
    fitted = trainer(VembedCheckpointIO(writer="thread"), steps=1)
    fitted.fit(Net(), batches())
    disk.full = True
    with pytest.raises(WriteError, match="No space left"):
        fitted.save_checkpoint(root / "manual.ckpt")
    disk.full = False
    fitted.save_checkpoint(root / "manual.ckpt")
    assert visible(root) == ["manual.ckpt"]


def test_a_trainer_of_the_users_own_may_override_the_method(root: Path, disk: Disk) -> None:
    """What ModelCheckpoint saves through it goes on in the background; what anybody else saves is waited for."""

    class Own(Trainer):
        def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
            super().save_checkpoint(*args, **kwargs)

    disk.go.clear()
    late: list[bool] = []

    def release() -> None:
        late.append(not list(root.glob("*.ckpt")))
        disk.go.set()

    fitted = Own(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, max_steps=3,
        callbacks=[every(1, root), At(2, release)], plugins=[VembedCheckpointIO(writer="thread")],
    )  # fmt: skip
    fitted.fit(Net(), batches())
    assert late == [True]
    fitted.save_checkpoint(root / "manual.ckpt")
    assert (root / "manual.ckpt").exists()


def test_a_requeued_job_finds_its_checkpoint(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning's requeueing on Slurm: when `scontrol requeue` is called, upon which the job is killed, the checkpoint is whole."""
    root.mkdir()
    for name, value in {
        "JOB_ID": "12",
        "NTASKS": "1",
        "JOB_NAME": "job",
        "PROCID": "0",
        "LOCALID": "0",
        "NODEID": "0",
    }.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    found: list[int] = []

    def requeue(command: list[str]) -> int:
        assert command == ["scontrol", "requeue", "12"]
        verify(root / "hpc_ckpt_1.ckpt")
        found.append(read_checkpoint(root / "hpc_ckpt_1.ckpt")["global_step"])
        return 0

    monkeypatch.setattr(signal_connector, "call", requeue)
    environment = SLURMEnvironment(auto_requeue=True, requeue_signal=signal.SIGUSR1)
    fitted = Trainer(
        accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, enable_model_summary=False, max_steps=STEPS,
        default_root_dir=root, enable_checkpointing=False, plugins=[environment, VembedCheckpointIO()],
        callbacks=[At(5, lambda: signal.raise_signal(signal.SIGUSR1))],
    )  # fmt: skip
    fitted.fit(Net(), batches())
    assert found == [5]


# -- a signal handler that saves in the middle of something


class Interrupting(dict[Any, Any]):
    """A dict that is interrupted by a signal when it is first changed."""

    waiting = True

    def __setitem__(self, key: Any, value: Any) -> None:
        if self.waiting:
            self.waiting = False
            signal.raise_signal(signal.SIGUSR1)
        super().__setitem__(key, value)


@pytest.fixture
def on_signal() -> Iterator[Callable[[Callable[[], Any]], None]]:
    before = signal.getsignal(signal.SIGUSR1)
    yield lambda action: signal.signal(signal.SIGUSR1, lambda *_: action()) and None
    signal.signal(signal.SIGUSR1, before)


@pytest.mark.parametrize("where", ["_saves", "_doomed"])
def test_a_handler_saves_in_the_middle_of_the_plugins_own_work(root: Path, on_signal: Any, where: str) -> None:
    """The thread holds the plugin's lock already: nothing hangs, both are saved, and what was to be deleted is."""
    io = VembedCheckpointIO(max_in_flight=3)
    io.save_checkpoint({"global_step": 1}, root / "a.ckpt")
    setattr(io, where, Interrupting(getattr(io, where)))
    on_signal(lambda: io.save_checkpoint({"global_step": 9}, root / "signal.ckpt"))
    io.save_checkpoint({"global_step": 2}, root / "b.ckpt")
    io.remove_checkpoint(root / "a.ckpt")
    io.teardown()
    assert visible(root) == ["b.ckpt", "signal.ckpt"]
    assert read_checkpoint(root / "signal.ckpt") == {"global_step": 9}


@pytest.mark.parametrize("name", ["a.ckpt", "b.ckpt"])
def test_a_handler_saves_in_the_middle_of_a_deletion(
    root: Path, on_signal: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Of another checkpoint or of the one that it saves anew: what it saved stays."""
    io = VembedCheckpointIO(max_in_flight=3)
    io.save_checkpoint({"global_step": 1}, root / "a.ckpt")
    io.teardown()
    delete = plugin_module._delete

    def interrupted(path: str) -> None:
        signal.raise_signal(signal.SIGUSR1)
        delete(path)

    on_signal(lambda: io.save_checkpoint({"global_step": 2}, root / name))
    monkeypatch.setattr(plugin_module, "_delete", interrupted)
    io.remove_checkpoint(root / "a.ckpt")
    io.teardown()
    assert visible(root) == [name]
    assert read_checkpoint(root / name) == {"global_step": 2}


# -- names


@pytest.mark.parametrize("keep", [-1, 2])
def test_equal_names_get_versions_as_with_stock(root: Path, tmp_path: Path, disk: Disk, keep: int) -> None:
    """A name that is being saved is taken, though nothing of it is on the disk yet."""

    def run(io: Any, directory: Path) -> tuple[list[str], list[str]]:
        callback = ModelCheckpoint(
            directory, filename="same", every_n_train_steps=2, save_top_k=keep, monitor="score", mode="max"
        )
        last = ModelCheckpoint(directory, filename="same", every_n_train_steps=4, save_last=True)
        release = At(STEPS, disk.go.set)
        trainer(io, callback, last, release).fit(Net(scores=tuple(float(n) for n in range(STEPS))), batches())
        names = [Path(path).name for path in callback.best_k_models]
        return names, [*visible(directory), Path(callback.best_model_path).name]

    expected = run(None, tmp_path / "stock")
    disk.go.clear()
    assert run(VembedCheckpointIO(writer="thread", max_in_flight=8), root) == expected


# -- finding and loading


def test_the_best_path_is_loaded_by_lightnings_own_method(root: Path) -> None:
    """`MyModule.load_from_checkpoint(best_model_path)`, with hyperparameters, in the middle of the save too."""
    checkpoint = every(2, root, monitor="score")
    net = Net(width=5, scores=tuple(float(n) for n in range(STEPS)))
    loaded: list[Net] = []
    load_it = At(3, lambda: loaded.append(Net.load_from_checkpoint(checkpoint.best_model_path)))
    trainer(VembedCheckpointIO(), checkpoint, load_it).fit(net, batches())
    assert loaded[0].hparams["width"] == 5
    at_the_end = Net.load_from_checkpoint(checkpoint.best_model_path, map_location="cpu", lr=0.5)
    assert at_the_end.hparams["lr"] == 0.5
    read = read_checkpoint(checkpoint.best_model_path)["state_dict"]
    assert all(torch.equal(value, read[name]) for name, value in at_the_end.state_dict().items())
    ours = load_from_checkpoint(Net, checkpoint.best_model_path)
    assert all(torch.equal(value, read[name]) for name, value in ours.state_dict().items())
    with pytest.raises(RuntimeError, match="size mismatch"):
        Net.load_from_checkpoint(checkpoint.best_model_path, width=7)


class Data(LightningDataModule):
    def __init__(self, size: int = 1) -> None:
        super().__init__()
        self.save_hyperparameters()

    def train_dataloader(self) -> Any:
        return batches()


def test_a_data_module_is_loaded_too(root: Path) -> None:
    fitted = trainer(VembedCheckpointIO(), each_epoch(root))
    fitted.fit(Net(), datamodule=Data(size=3))
    assert Data.load_from_checkpoint(fitted.checkpoint_callback.best_model_path).hparams["size"] == 3


def test_stock_files_load_as_before(root: Path) -> None:
    checkpoint = every(8, root)
    trainer(None, checkpoint).fit(Net(width=5), batches())
    VembedCheckpointIO()
    assert os.path.isfile(checkpoint.best_model_path)
    assert Net.load_from_checkpoint(checkpoint.best_model_path, weights_only=False).hparams["width"] == 5
    with pytest.raises(FileNotFoundError):
        Net.load_from_checkpoint(root / "none.ckpt")


@pytest.mark.parametrize("where", ["dirpath", "default_root_dir"])
def test_another_machine_is_refused_when_training_begins(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not at the first save, after an hour; stock, which can save there, is not disturbed."""
    begun: list[int] = []

    class Begun(Callback):
        def on_train_start(self, *_: Any) -> None:
            begun.append(1)

    url = "memory://bucket/run"
    options: dict[str, Any] = {"default_root_dir": url} if where == "default_root_dir" else {}
    directory = url if where == "dirpath" else None
    for io in (VembedCheckpointIO(), AsyncCheckpointIO(VembedCheckpointIO())):
        with pytest.raises(PlanError, match="is not on a mounted file system"):
            trainer(io, ModelCheckpoint(directory), Begun(), **options).fit(Net(), batches())
    assert begun == []
    trainer(None, ModelCheckpoint(directory), Begun(), **options).fit(Net(), batches())
    assert begun == [1]


def test_nothing_of_ours_is_left_after_fit(root: Path) -> None:
    """`latest` finds the checkpoints; no directory of ours stays among them."""
    trainer(VembedCheckpointIO(), every(4, root, save_top_k=-1)).fit(Net(), batches())
    assert sorted(os.listdir(root)) == ["step=4.ckpt", "step=8.ckpt"]
    assert latest(root) == root / "step=8.ckpt"
