"""Lightning's Trainer with our plugin: it goes on while the state is written, and resumes as if nothing had happened."""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import os
import pickle
import signal
import subprocess
import sys
import threading
from argparse import Namespace
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from lightning.fabric.utilities.data import AttributeDict
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, StochasticWeightAveraging, Timer
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.tuner import Tuner
from torch.utils.data import DataLoader, TensorDataset

from vembed_async_ckpt import (
    AsyncCheckpointer,
    CheckpointError,
    CorruptCheckpoint,
    Event,
    PlanError,
    SaveHandle,
    WriteError,
    latest,
    load,
)
from vembed_async_ckpt._disk.filesystem import LocalFilesystem
from vembed_async_ckpt._disk.lock import wait_for_orphan
from vembed_async_ckpt.integrations import lightning as plugin_module
from vembed_async_ckpt.integrations.lightning import VembedCheckpointIO, load_from_checkpoint, read_checkpoint
from vembed_async_ckpt.integrations.shared import close_shared, open_at
from vembed_async_ckpt.testing import use_filesystem

pytestmark = [
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch"),
]
BOUND = 30
STEPS = 8  # in two epochs


class Disk(LocalFilesystem):
    """A disk that can be held up, and that can be full."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.go.set()
        self.writing = threading.Event()
        self.full = False

    def write(self, fd: int, data: memoryview, offset: int) -> int:
        self.writing.set()
        assert self.go.wait(BOUND)
        if self.full:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(fd, data, offset)


class Net(LightningModule):
    """Logs `scores[step]` as the metric to be watched. Its data depend on the step alone: Lightning itself begins its epoch anew
    when it resumes within one."""

    def __init__(
        self, width: int = 3, scores: tuple[float, ...] = (), lr: float = 0.05, interval: str = "step"
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        with torch.random.fork_rng():
            torch.manual_seed(width)
            self.layers = torch.nn.Sequential(
                torch.nn.Linear(4, width), torch.nn.BatchNorm1d(width), torch.nn.Linear(width, 1)
            )

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        if self.hparams["scores"]:
            self.log("score", self.hparams["scores"][self.global_step])
        data = torch.randn(4, 4, generator=torch.Generator().manual_seed(self.global_step))
        loss = self.layers(data).square().mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams["lr"])
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
        return [optimizer], [{"scheduler": scheduler, "interval": self.hparams["interval"]}]


class At(Callback):
    """Does something after the optimizer step `step`, before the checkpoints of that step."""

    def __init__(self, step: int, action: Callable[[], None]) -> None:
        self.step, self.action, self.done = step, action, False

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            self.action()
            self.done = True


def batches() -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.ones(STEPS // 2, 4)))


def trainer(io: Any, *callbacks: Callback, steps: int = STEPS, **options: Any) -> Trainer:
    options = {"enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks)} | options
    return Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, max_steps=steps,
        callbacks=list(callbacks), plugins=[io] if io else None, **options,
    )  # fmt: skip


def every(steps: int, root: Path, **options: Any) -> ModelCheckpoint:
    return ModelCheckpoint(root, filename="{step}", every_n_train_steps=steps, **options)


def each_epoch(root: Path, **options: Any) -> ModelCheckpoint:
    return ModelCheckpoint(root, filename="{step}", **options)


def visible(root: Path) -> list[str]:
    return sorted(entry.name for entry in root.iterdir() if entry.name != "_vembed_async_ckpt")


def same(left: Any, right: Any) -> None:
    """Assert that two values have the same structure, types, and bits."""
    assert type(left) is type(right)
    if isinstance(left, torch.Tensor):
        assert (left.dtype, left.shape, left.requires_grad) == (right.dtype, right.shape, right.requires_grad)
        assert left.device == right.device
        as_bytes = [t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (left, right)]
        assert torch.equal(*as_bytes)
    elif isinstance(left, dict):
        assert list(left) == list(right)
        for key in left:
            same(left[key], right[key])
        assert getattr(left, "_metadata", None) == getattr(right, "_metadata", None)
    elif isinstance(left, list | tuple):
        assert len(left) == len(right)
        for one, other in zip(left, right, strict=True):
            same(one, other)
    elif isinstance(left, np.ndarray | np.generic):
        assert left.dtype == right.dtype
        assert left.tobytes() == right.tobytes()
    else:
        assert left == right or (left != left and right != right)


def state_of(fitted: Trainer) -> Any:
    """All that the next step depends on."""
    return [
        fitted.global_step,
        fitted.lightning_module.state_dict(),
        [optimizer.state_dict() for optimizer in fitted.optimizers],
        [config.scheduler.state_dict() for config in fitted.lr_scheduler_configs],
    ]


@pytest.fixture
def disk() -> Iterator[Disk]:
    """The disk of every plugin of this test with `writer="thread"`."""
    made = Disk()
    with use_filesystem(made):
        yield made
    made.go.set()


@pytest.fixture(autouse=True)
def _tear_down() -> Iterator[None]:
    yield
    failed = []
    for io in list(plugin_module._BUSY):
        try:
            io.teardown()
        except CheckpointError as error:
            failed.append(error)
    close_shared(BOUND)
    assert not failed, "a failure that the test has not read"


@pytest.fixture(scope="module")
def uninterrupted() -> Any:
    """The state after all steps of a run without any checkpoint."""
    fitted = trainer(None)
    fitted.fit(Net(), batches())
    return state_of(fitted)


# -- saving


def test_fit_goes_on_while_a_checkpoint_is_written(root: Path, disk: Disk) -> None:
    """With the disk held up from the first save on, training reaches its last step but one; then all is published."""
    disk.go.clear()

    def look() -> None:
        assert disk.writing.wait(BOUND)
        assert visible(root) == []
        disk.go.set()

    at = At(STEPS - 1, look)
    io = VembedCheckpointIO(writer="thread")
    trainer(io, every(4, root), at).fit(Net(), batches())
    assert at.done
    assert visible(root) == ["step=8.ckpt"]
    assert open_at(str(root)) is None, "fit has closed what it opened"


def test_what_is_saved_is_the_state_at_the_call(root: Path, disk: Disk) -> None:
    """Tensors and containers may change as soon as save_checkpoint has returned."""
    disk.go.clear()
    io = VembedCheckpointIO(writer="thread")
    weight, momentum, array = torch.ones(1000), torch.ones(1000), np.ones(3)
    checkpoint = {"state_dict": {"weight": weight}, "optimizer_states": [{"m": momentum}], "loops": [1], "array": array}
    io.save_checkpoint(checkpoint, root / "a.ckpt")
    weight.zero_()
    momentum.zero_()
    array[:] = 0
    checkpoint["loops"].append(2)
    checkpoint["later"] = True
    disk.go.set()
    saved = io.load_checkpoint(root / "a.ckpt")
    assert saved["state_dict"]["weight"].eq(1).all()
    assert saved["optimizer_states"][0]["m"].eq(1).all()
    assert (saved["array"] == 1).all()
    assert saved["loops"] == [1]
    assert "later" not in saved


def test_the_directory_has_the_weights_for_everybody(root: Path) -> None:
    """model.safetensors holds the state_dict, nothing in the directory is a pickle, and `load` puts it into the module."""
    net = Net()
    trainer(VembedCheckpointIO(), every(8, root)).fit(net, batches())
    directory = root / "step=8.ckpt"
    assert set(os.listdir(directory)) == {
        "model.safetensors", "vembed_training_state.safetensors", "vembed_training_state.json", "vembed_manifest.json",
    }  # fmt: skip
    stored = safetensors.torch.load_file(directory / "model.safetensors")
    same(dict(sorted(stored.items())), dict(sorted(net.state_dict().items())))
    fresh = Net()
    assert load(directory, model=fresh).step == 8
    same(fresh.state_dict(), net.state_dict())
    assert latest(root) == directory


def test_tied_weights_are_stored_once(root: Path) -> None:
    """Under the first of their names; they share memory again after loading, as they did before."""
    io = VembedCheckpointIO()
    net = torch.nn.Module()
    net.one, net.two = torch.nn.Linear(9, 9), torch.nn.Linear(9, 9)
    net.two.weight = net.one.weight
    io.save_checkpoint({"state_dict": net.state_dict()}, root / "a.ckpt")
    saved = io.load_checkpoint(root / "a.ckpt")["state_dict"]
    assert sorted(safetensors.torch.load_file(root / "a.ckpt/model.safetensors")) == [
        "one.bias",
        "one.weight",
        "two.bias",
    ]
    same(saved, net.state_dict())
    for where in ("cpu", "meta"):
        moved = io.load_checkpoint(root / "a.ckpt", map_location=where)["state_dict"]
        assert moved["two.weight"] is moved["one.weight"]


def test_views_of_one_memory_are_not_ties(root: Path) -> None:
    """Parts, and the same elements in another order, are tensors of their own."""
    io = VembedCheckpointIO(writer="thread")
    base = torch.arange(9.0).reshape(3, 3)
    state = {"base": base, "row": base[0], "turned": base.t(), "bits": base.view(torch.int32), "none": base[:0]}
    io.save_checkpoint({"state_dict": state | {"again": base, "nothing": base[:0]}}, root / "a.ckpt")
    same(io.load_checkpoint(root / "a.ckpt")["state_dict"], state | {"again": base, "nothing": base[:0]})
    stored = safetensors.torch.load_file(root / "a.ckpt/model.safetensors")
    assert set(stored) == {*state, "nothing"}


def test_the_layout_follows_the_state(root: Path) -> None:
    """Shapes, dtypes and names may differ from save to save."""
    io = VembedCheckpointIO(writer="thread")
    states = [
        {"w": torch.ones(3)},
        {"w": torch.zeros(5)},
        {"w": torch.zeros(5).half()},
        {"w": torch.ones(5).half(), "b": torch.ones(1)},
        {},
    ]
    for number, state in enumerate([*states, states[0]]):
        io.save_checkpoint({"state_dict": state}, root / f"{number}.ckpt")
        same(io.load_checkpoint(root / f"{number}.ckpt"), {"state_dict": state})


def test_a_name_is_replaced_at_once(root: Path, disk: Disk) -> None:
    """While the second save of a path is written, the first is what it holds; afterwards the second, and no trace of the first."""
    io = VembedCheckpointIO(writer="thread")
    path = root / "last.ckpt"
    io.save_checkpoint({"state_dict": {"w": torch.ones(3)}, "global_step": 1}, path)
    assert io.load_checkpoint(path)["global_step"] == 1
    disk.go.clear()
    io.save_checkpoint({"state_dict": {"w": torch.zeros(3)}, "global_step": 2}, path)
    weights = safetensors.torch.load_file(path / "model.safetensors")
    assert weights["w"].eq(1).all()
    disk.go.set()
    assert io.load_checkpoint(path)["global_step"] == 2
    io.teardown()
    assert visible(root) == ["last.ckpt"]


def test_what_cannot_be_saved_is_refused_before_anything_is_touched(root: Path) -> None:
    """PlanError out of fit names the key and what to do; there is no directory, and no checkpointer."""

    class Careless(Net):
        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["mine"] = {"things": [1, object()]}

    with pytest.raises(
        PlanError, match=r"checkpoint\['mine'\]\['things'\]\[1\]: a builtins.object .* its state_dict\(\)"
    ):
        trainer(VembedCheckpointIO(), every(1, root)).fit(Careless(), batches())
    assert not root.exists()


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [
        ({"hyper_parameters": {"net": torch.nn.ReLU()}}, r"\['hyper_parameters'\]\['net'\]: .*ReLU.*ignore="),
        ({"hyper_parameters": {"sort": sorted}}, r"\['sort'\]: a builtins\.builtin_function.*ignore="),
        ({"a": {1: {torch.float32: 1}}}, r"checkpoint\['a'\]\[1\]: the key torch\.float32"),
        ({"a": defaultdict(lambda: 1)}, r"checkpoint\['a'\]: its default_factory .*use a dict"),
        ({"state_dict": {"w": torch.eye(2).to_sparse()}}, r"\['state_dict'\]\['w'\].*dense"),
        ({"state_dict": {"w": torch.empty(2, device="meta")}}, r"\['w'\].*meta device"),
        ({"a": [torch.zeros(2, dtype=torch.complex128)]}, r"\['a'\]\[0\].*complex128.*convert"),
        ({"a": signal.SIGTERM}, r"\['a'\]: a signal\.Signals cannot be saved"),
    ],
)
def test_no_pickle_steps_in(root: Path, checkpoint: dict[str, Any], message: str) -> None:
    """What is no data is refused with its key, whatever Lightning's own plugin would do."""
    with pytest.raises(PlanError, match=message):
        VembedCheckpointIO().save_checkpoint(checkpoint, root / "a.ckpt")
    assert not root.exists()


def test_what_contains_itself_is_refused(root: Path) -> None:
    """Not a RecursionError."""
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(PlanError, match="contains itself"):
        VembedCheckpointIO().save_checkpoint({"a": endless}, root / "a.ckpt")


@pytest.mark.parametrize("path", ["s3://bucket/a.ckpt", "/", "_vembed_async_ckpt"])
def test_paths_that_cannot_be_a_directory_of_ours(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other machines, and names without a place."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PlanError, match=path):
        VembedCheckpointIO().save_checkpoint({}, path)
    assert list(tmp_path.iterdir()) == []


def test_options_are_checked_when_they_are_given() -> None:
    """Not at the first checkpoint, an hour later."""
    with pytest.raises(ValueError, match="when_busy"):
        VembedCheckpointIO(when_busy="never")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_in_flight"):
        VembedCheckpointIO(max_in_flight=0)
    with pytest.raises(TypeError, match="storage_options"):
        VembedCheckpointIO().save_checkpoint({}, "a.ckpt", storage_options={})


# -- structure

EVERYTHING: dict[str, Any] = {
    "dicts": {1: "a", (1, "b"): 2, None: 3, 2.5: True, "__vembed__": ["weight", "x"], "$tensor": {"$dict": []}},
    "ordered": OrderedDict([("b", OrderedDict()), ("a", (1, [2, (3,)]))]),
    "attributes": AttributeDict(a=AttributeDict(b=[1])),
    "namespace": Namespace(a=1, b=[Path("c")]),
    "sets": [{1, 2}, frozenset("ab"), set()],
    "default": defaultdict(list, {"a": [1]}),
    "counter": Counter("aab"),
    "paths": [Path("/a/b"), PurePosixPath("c")],
    "torch": [torch.bfloat16, torch.device("cuda:1"), torch.Size([1, 2])],
    "moments": [
        datetime.datetime(2024, 2, 29, 1, 2, 3, 4, datetime.timezone.utc), datetime.datetime(2024, 1, 1),
        datetime.date(2024, 1, 1), datetime.time(1, 2), datetime.timedelta(days=-1, microseconds=7),
    ],
    "numbers": [float("nan"), float("-inf"), -0.0, 1 << 80, complex(1, float("inf")), range(1, 9, 3)],
    "bytes": [b"\0\xff", bytearray(b"x")],
    "text": "\u00e9\ud800\0",
    "arrays": [np.arange(6.0).reshape(2, 3), np.float32(2.5), np.bool_(True), np.empty((0, 2), dtype=np.int8)],
    "parameter": [torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2), requires_grad=False)],
    "tensors": {
        "scalar": torch.tensor(3), "bf16": torch.randn(5).bfloat16(), "empty": torch.empty(0, 3), "bool": torch.ones(3) > 0,
        "strided": torch.randn(4, 3).t(), "nan": torch.tensor([float("nan"), -0.0]), "f8": torch.ones(3).to(torch.float8_e4m3fn),
    },
    "state_dict": {"w": torch.randn(3), "_extra_state": {"t": torch.ones(2)}, "empty": torch.empty(0)},
}  # fmt: skip


@pytest.mark.parametrize("key", EVERYTHING)
def test_structure_types_and_bits_come_back(root: Path, key: str) -> None:
    """Whatever stock Lightning or a hook of a callback puts there, at the top and deep inside."""
    io = VembedCheckpointIO(writer="thread")
    checkpoint = {key: EVERYTHING[key], "callbacks": {"Mine": {"inner": [EVERYTHING[key]]}}}
    io.save_checkpoint(checkpoint, root / "a.ckpt")
    same(io.load_checkpoint(root / "a.ckpt"), checkpoint)


def test_a_bare_state_dict_is_a_checkpoint_too(root: Path) -> None:
    """Lightning's launchers hand weights from process to process through the plugin."""
    io = VembedCheckpointIO(writer="thread")
    state = Net().state_dict()
    io.save_checkpoint(state, root / "weights.ckpt")
    same(io.load_checkpoint(root / "weights.ckpt"), state)


def test_all_that_lightning_saves_comes_back(root: Path) -> None:
    """A run with many stateful parts: what the plugin loads is what stock Lightning loads of the same state."""
    files, given = root.parent / "stock.ckpt", []

    class Both(VembedCheckpointIO):
        def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
            given.append(list(checkpoint))
            super().save_checkpoint(checkpoint, path)
            TorchCheckpointIO().save_checkpoint(checkpoint, files)

    callbacks = [
        ModelCheckpoint(root, filename="{epoch}-{step}", monitor="loss", save_top_k=2),
        EarlyStopping("loss", patience=9),
        Timer({"hours": 1}),
        StochasticWeightAveraging(0.01, swa_epoch_start=1),
    ]
    io = Both()
    trainer(io, *callbacks, steps=-1, max_epochs=3).fit(Net(interval="epoch"), batches())
    assert {"state_dict", "loops", "callbacks", "optimizer_states", "lr_schedulers", "hyper_parameters"} <= set(
        given[-1]
    )
    newest = latest(root)
    assert newest is not None
    stock = TorchCheckpointIO().load_checkpoint(str(files), weights_only=False)
    assert len(stock["callbacks"]) == 4
    assert list(stock["state_dict"]._metadata) == list(read_checkpoint(newest)["state_dict"]._metadata)
    same(io.load_checkpoint(newest), stock)


# -- resuming


@pytest.mark.parametrize("how", ["last", "path", "link"])
def test_a_resumed_run_ends_as_an_uninterrupted_one(root: Path, uninterrupted: Any, how: str) -> None:
    """Bit for bit: weights, BatchNorm statistics, optimizer, scheduler."""
    save_last = "link" if how == "link" else True
    trainer(VembedCheckpointIO(), each_epoch(root, save_last=save_last), steps=4).fit(Net(), batches())
    assert visible(root) == ["last.ckpt", "step=4.ckpt"]
    assert (root / "last.ckpt").is_symlink() == (how == "link")
    resumed = trainer(VembedCheckpointIO(), each_epoch(root, save_last=save_last))
    resumed.fit(Net(), batches(), ckpt_path=str(root / "step=4.ckpt") if how == "path" else "last")
    same(state_of(resumed), uninterrupted)
    newest = latest(root)
    assert newest is not None
    same(read_checkpoint(newest)["state_dict"], resumed.lightning_module.state_dict())


KILLED = """
import os, runpy, signal, sys
tests = runpy.run_path(sys.argv[1])
class Deadly(tests["VembedCheckpointIO"]):
    def save_checkpoint(self, checkpoint, path, storage_options=None):
        super().save_checkpoint(checkpoint, path)
        if checkpoint["global_step"] == 4:
            self._newest.wait_staged()
            writer = tests["open_at"](sys.argv[2]).statistics()["writer_pid"]
            os.kill(writer, signal.SIGSTOP)
            print(writer, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
checkpoints = tests["each_epoch"](tests["Path"](sys.argv[2]))
tests["trainer"](Deadly(), checkpoints).fit(tests["Net"](), tests["batches"]())
"""


def test_a_killed_run_resumes_as_if_it_had_not_been(
    root: Path, uninterrupted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL as soon as a save is staged: the writer finishes it, the new run waits for that and goes on."""
    ended = subprocess.run(
        [sys.executable, "-c", KILLED, __file__, str(root)], capture_output=True, text=True, timeout=240
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    writer = os.pidfd_open(int(ended.stdout))

    def wake_and_wait(directory: str) -> None:
        signal.pidfd_send_signal(writer, signal.SIGCONT)
        wait_for_orphan(directory)

    monkeypatch.setattr(plugin_module, "wait_for_orphan", wake_and_wait)
    try:
        resumed = trainer(VembedCheckpointIO(), each_epoch(root))
        resumed.fit(Net(), batches(), ckpt_path=str(root / "step=4.ckpt"))
    finally:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(writer, signal.SIGCONT)
        os.close(writer)
    same(state_of(resumed), uninterrupted)
    assert visible(root) == ["step=4.ckpt", "step=8.ckpt"], "Lightning keeps what it resumed from"


def test_a_checkpoint_still_being_written_is_waited_for(
    root: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loading asks for the end of the save first, whichever plugin made it and through whichever link."""
    disk.go.clear()
    VembedCheckpointIO(writer="thread").save_checkpoint({"global_step": 5}, root / "a.ckpt")
    (root / "last.ckpt").symlink_to("a.ckpt")
    result = SaveHandle.result

    def release_and_wait(handle: SaveHandle, timeout: float | None = None) -> Any:
        disk.go.set()
        return result(handle, timeout)

    monkeypatch.setattr(SaveHandle, "result", release_and_wait)
    assert VembedCheckpointIO(writer="thread").load_checkpoint(root / "last.ckpt") == {"global_step": 5}


def test_the_best_checkpoint_is_loaded_for_testing(root: Path) -> None:
    """`ckpt_path="best"` right after fit."""

    class Tested(Net):
        def test_step(self, batch: Any, index: int) -> None:
            self.log("weight", self.layers[0].weight.sum())

        def test_dataloader(self) -> DataLoader[Any]:
            return batches()

    net = Tested(scores=(9, 3, 1, 4, 5, 6, 7, 8))
    checkpoints = every(1, root, monitor="score", save_top_k=2)
    fitted = trainer(VembedCheckpointIO(), checkpoints, limit_test_batches=1)
    fitted.fit(net, batches())
    assert visible(root) == ["step=2.ckpt", "step=3.ckpt"]
    assert checkpoints.best_model_path == str(root / "step=3.ckpt")
    ended = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    (logged,) = fitted.test(net, ckpt_path="best", verbose=False)
    best = read_checkpoint(root / "step=3.ckpt")["state_dict"]
    assert logged["weight"] == pytest.approx(best["layers.0.weight"].sum().item())
    same(net.state_dict(), best)
    assert not torch.equal(ended["layers.0.weight"], best["layers.0.weight"])


def test_the_learning_rate_finder_restores_its_own_checkpoint(tmp_path: Path) -> None:
    """It saves, loads and removes one under a hidden name, without a teardown in between."""
    net = Net()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    fitted = trainer(VembedCheckpointIO(), default_root_dir=tmp_path)
    Tuner(fitted).lr_find(net, batches(), num_training=5, update_attr=False)
    same(dict(net.state_dict()), before)
    assert [name for name in visible(tmp_path) if name.endswith(".ckpt")] == []


@pytest.mark.parametrize("map_location", ["cpu", None, torch.device("cpu"), {"cpu": "meta"}, {"cuda:0": "cpu"}, "meta"])
def test_map_location(root: Path, map_location: Any) -> None:
    """As torch.load has it; every tensor comes from the CPU."""
    io = VembedCheckpointIO(writer="thread")
    io.save_checkpoint({"state_dict": {"w": torch.ones(3)}, "more": [torch.ones(2)]}, root / "a.ckpt")
    saved = io.load_checkpoint(root / "a.ckpt", map_location=map_location)
    where = "meta" if "meta" in str(map_location) else "cpu"
    assert {saved["state_dict"]["w"].device.type, saved["more"][0].device.type} == {where}


def test_map_location_may_be_a_function(root: Path) -> None:
    """It is given storage and location, and may decline."""
    io = VembedCheckpointIO(writer="thread")
    io.save_checkpoint({"t": torch.arange(6).reshape(2, 3)}, root / "a.ckpt")
    asked = []

    def moved(storage: Any, location: str) -> Any:
        asked.append(location)
        return storage.clone()

    for function in (moved, lambda storage, location: None, lambda storage, location: storage):
        same(io.load_checkpoint(root / "a.ckpt", map_location=function), {"t": torch.arange(6).reshape(2, 3)})
    assert asked == ["cpu"]


def test_nothing_is_unpickled(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading a directory of ours calls neither torch.load nor pickle."""
    trainer(VembedCheckpointIO(), every(8, root)).fit(Net(), batches())

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("unpickled")

    for module, name in ((torch, "load"), (pickle, "load"), (pickle, "loads"), (pickle, "Unpickler")):
        monkeypatch.setattr(module, name, refuse)
    assert read_checkpoint(root / "step=8.ckpt")["global_step"] == 8


def test_a_damaged_checkpoint_is_not_loaded(root: Path) -> None:
    """CorruptCheckpoint names the file; a checkpoint that Lightning did not save is told from one that is damaged."""
    io = VembedCheckpointIO(writer="thread")
    io.save_checkpoint({"state_dict": {"w": torch.ones(3)}}, root / "a.ckpt")
    io.teardown()
    whole = (root / "a.ckpt/model.safetensors").read_bytes()
    (root / "a.ckpt/model.safetensors").write_bytes(whole[:-1])
    with pytest.raises(CorruptCheckpoint, match=r"model\.safetensors"):
        io.load_checkpoint(root / "a.ckpt")
    (root / "a.ckpt/model.safetensors").write_bytes(whole)
    with AsyncCheckpointer(root) as checkpointer:
        path = checkpointer.save(1, model=torch.nn.Linear(1, 1)).result(BOUND).path
    with pytest.raises(CheckpointError, match="not saved by Lightning"):
        io.load_checkpoint(path)


@pytest.mark.parametrize("flavour", ["ours", "stock"])
def test_a_module_is_made_from_a_checkpoint(root: Path, flavour: str) -> None:
    """`load_from_checkpoint` for directories and files: hyperparameters, overrides, weights."""
    net = Net(width=5)
    trainer(VembedCheckpointIO() if flavour == "ours" else None, every(8, root)).fit(net, batches())
    made = load_from_checkpoint(Net, root / "step=8.ckpt", lr=0.5)
    assert (made.hparams["width"], made.hparams["lr"]) == (5, 0.5)
    same(made.state_dict(), net.state_dict())


def test_a_directory_becomes_a_stock_file(root: Path, tmp_path: Path, uninterrupted: Any) -> None:
    """`torch.save(read_checkpoint(...))` is what Lightning without the plugin resumes from."""
    trainer(VembedCheckpointIO(), each_epoch(root), steps=4).fit(Net(), batches())
    torch.save(read_checkpoint(root / "step=4.ckpt"), tmp_path / "stock.ckpt")
    resumed = trainer(None, each_epoch(root))
    resumed.fit(Net(), batches(), ckpt_path=str(tmp_path / "stock.ckpt"))
    same(state_of(resumed), uninterrupted)


# -- beside stock checkpoints


def test_a_stock_run_goes_on_with_the_plugin(root: Path, uninterrupted: Any) -> None:
    """Its files load, its last.ckpt gives way to a directory, and what top_k drops is deleted, file or not."""
    trainer(None, each_epoch(root, save_last=True), steps=4).fit(Net(), batches())
    assert (root / "last.ckpt").is_file()
    resumed = trainer(VembedCheckpointIO(), each_epoch(root, save_last=True))
    resumed.fit(Net(), batches(), ckpt_path="last")
    same(state_of(resumed), uninterrupted)
    assert visible(root) == ["last.ckpt", "step=8.ckpt"]
    assert (root / "last.ckpt").is_dir()


def test_a_stock_file_comes_back_when_its_successor_fails(root: Path, disk: Disk) -> None:
    """It is moved out of the way, where "last" still finds it, until the directory of its name is durable."""
    root.mkdir()
    torch.save({"global_step": 1}, root / "last.ckpt")
    io = VembedCheckpointIO(writer="thread")
    disk.full = True
    disk.go.clear()
    io.save_checkpoint({"global_step": 2}, root / "last.ckpt")
    assert visible(root) == ["last-replaced.ckpt"]
    disk.go.set()
    with pytest.raises(WriteError, match="No space left"):
        io.teardown()
    assert visible(root) == ["last.ckpt"]
    assert io.load_checkpoint(root / "last.ckpt") == {"global_step": 1}
    disk.full = False
    io.save_checkpoint({"global_step": 3}, root / "last.ckpt")
    assert io.load_checkpoint(root / "last.ckpt") == {"global_step": 3}
    io.teardown()
    assert visible(root) == ["last.ckpt"]


def test_a_file_that_gave_way_stays_away_from_a_later_save(root: Path, disk: Disk) -> None:
    """The first successor fails, the second is on its way already: the file must not stand in its way."""
    root.mkdir()
    torch.save({"global_step": 1}, root / "last.ckpt")
    io = VembedCheckpointIO(writer="thread", on_error="warn")
    disk.go.clear()
    disk.full = True
    io.save_checkpoint({"global_step": 2}, root / "last.ckpt")
    first = io._saves[str(root / "last.ckpt")]
    io.save_checkpoint({"global_step": 3}, root / "last.ckpt")
    first.add_done_callback(lambda _: setattr(disk, "full", False))
    disk.go.set()
    io.teardown()
    assert first.exception(0) is not None
    assert visible(root) == ["last.ckpt"]
    assert read_checkpoint(root / "last.ckpt") == {"global_step": 3}


def test_a_link_gives_way_and_its_target_stays(root: Path) -> None:
    """What last.ckpt pointed to, of a run with `save_last="link"`, is not written over."""
    io = VembedCheckpointIO(writer="thread")
    io.save_checkpoint({"global_step": 1}, root / "a.ckpt")
    (root / "last.ckpt").symlink_to("a.ckpt")
    io.save_checkpoint({"global_step": 2}, root / "last.ckpt")
    io.teardown()
    assert visible(root) == ["a.ckpt", "last.ckpt"]
    assert not (root / "last.ckpt").is_symlink()
    assert [read_checkpoint(root / name)["global_step"] for name in visible(root)] == [1, 2]


def test_a_link_to_what_was_never_saved_says_so(root: Path) -> None:
    """The message names the link's target and where to look."""
    root.mkdir()
    (root / "last.ckpt").symlink_to("step=4.ckpt")
    with pytest.raises(FileNotFoundError, match=r"links to .*step=4\.ckpt.*latest\("):
        VembedCheckpointIO().load_checkpoint(root / "last.ckpt")


# -- removing


def test_a_checkpoint_is_deleted_when_its_successor_is_durable(root: Path, disk: Disk) -> None:
    """While step 2 is written, step 1 stays, though Lightning has removed it; afterwards it goes."""
    io = VembedCheckpointIO(writer="thread", max_in_flight=3)
    seen = []
    look = At(3, lambda: (seen.append(visible(root)), disk.go.set()))  # type: ignore[arg-type, func-returns-value]
    hold = At(2, lambda: (io._newest.result(BOUND), disk.go.clear()))  # type: ignore[union-attr, arg-type, func-returns-value]
    trainer(io, every(1, root), hold, look, steps=3).fit(Net(), batches())
    assert seen == [["step=1.ckpt"]]
    assert visible(root) == ["step=3.ckpt"]


@pytest.mark.parametrize("on_error", ["raise", "warn"])
def test_nothing_is_deleted_when_the_successor_fails(
    root: Path, disk: Disk, on_error: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Step 1 is there in the end, and the failure is raised by fit, or logged."""
    io = VembedCheckpointIO(writer="thread", on_error=on_error)
    fill = At(2, lambda: (io._newest.result(BOUND), setattr(disk, "full", True)))  # type: ignore[union-attr, arg-type, func-returns-value]
    fitting = trainer(io, every(1, root), fill, steps=4)
    if on_error == "raise":
        with pytest.raises(WriteError, match=r"step=2\.ckpt was not saved: .*No space left"):
            fitting.fit(Net(), batches())
    else:
        fitting.fit(Net(), batches())
        assert "step=4.ckpt was not saved" in caplog.text
    assert "step=1.ckpt stays" in caplog.text
    assert visible(root) == ["step=1.ckpt"]
    disk.full = False


def test_a_skipped_save_deletes_nothing(root: Path, disk: Disk) -> None:
    """`when_busy="skip"`: what was not saved makes nothing superfluous."""
    io = VembedCheckpointIO(writer="thread", when_busy="skip", max_in_flight=1)
    io.save_checkpoint({"global_step": 1}, root / "a.ckpt")
    io.load_checkpoint(root / "a.ckpt")
    disk.go.clear()
    io.save_checkpoint({"global_step": 2}, root / "b.ckpt")
    io.save_checkpoint({"global_step": 3}, root / "c.ckpt")
    io.remove_checkpoint(root / "a.ckpt")
    disk.go.set()
    io.teardown()
    assert visible(root) == ["a.ckpt", "b.ckpt"]


def test_the_best_stay_and_the_others_go(root: Path) -> None:
    """`save_top_k=2` by a metric that goes up and down, with `save_last`."""
    checkpoints = every(1, root, monitor="score", save_top_k=2, mode="max", save_last=True)
    trainer(VembedCheckpointIO(), checkpoints).fit(Net(scores=(1, 5, 2, 9, 3, 8, 4, 0)), batches())
    assert visible(root) == ["last.ckpt", "step=4.ckpt", "step=6.ckpt"]
    assert {Path(path).name for path in checkpoints.best_k_models} == {"step=4.ckpt", "step=6.ckpt"}
    assert read_checkpoint(root / "last.ckpt")["global_step"] == STEPS


def test_a_path_saved_again_is_not_deleted(root: Path, disk: Disk) -> None:
    """Removed and saved again before the deletion's turn has come, which is late: it is wanted."""
    path = root / "a.ckpt"

    def late(event: Event) -> None:
        if (event.stage, event.phase, event.step) == ("write", "complete", 2):
            io._saves[str(path)].result(BOUND)

    io = VembedCheckpointIO(writer="thread", max_in_flight=3, sinks=[late])
    io.save_checkpoint({"global_step": 1}, path)
    io.load_checkpoint(path)
    disk.go.clear()
    io.save_checkpoint({"global_step": 2}, root / "b.ckpt")
    io.remove_checkpoint(path)
    io.save_checkpoint({"global_step": 3}, path)
    disk.go.set()
    io.teardown()
    assert read_checkpoint(path) == {"global_step": 3}


def test_two_callbacks_that_chose_one_name(root: Path, disk: Disk) -> None:
    """The second could not see that the name was taken: it is deleted when both have removed it."""
    io = VembedCheckpointIO(writer="thread", max_in_flight=3)
    disk.go.clear()
    io.save_checkpoint({"global_step": 1}, root / "a.ckpt")
    io.save_checkpoint({"global_step": 1}, root / "a.ckpt")
    io.save_checkpoint({"global_step": 2}, root / "b.ckpt")
    io.remove_checkpoint(root / "a.ckpt")
    disk.go.set()
    io.teardown()
    assert visible(root) == ["a.ckpt", "b.ckpt"]
    io.remove_checkpoint(root / "a.ckpt")
    io.teardown()
    assert visible(root) == ["b.ckpt"]


def test_what_somebody_reads_is_not_deleted(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As retention has it: a reader holds a lock on the manifest."""
    io = VembedCheckpointIO(writer="thread")
    io.save_checkpoint({"global_step": 1}, root / "a.ckpt")
    io.teardown()
    with open(root / "a.ckpt/vembed_manifest.json") as manifest:
        fcntl.flock(manifest, fcntl.LOCK_SH)
        io.remove_checkpoint(root / "a.ckpt")
    assert visible(root) == ["a.ckpt"]
    assert "somebody is reading it" in caplog.text
    io.remove_checkpoint(root / "a.ckpt")
    assert visible(root) == []


def test_removing_what_is_not_there_opens_nothing(root: Path) -> None:
    """`OnExceptionCheckpoint` removes its checkpoint at the end of every run that had none."""
    VembedCheckpointIO().remove_checkpoint(root / "on_exception.ckpt")
    assert not root.exists()


def test_files_of_others_outlive_a_removed_checkpoint(root: Path) -> None:
    """What we did not write is kept aside."""
    io = VembedCheckpointIO(writer="thread")
    io.save_checkpoint({"global_step": 1}, root / "a.ckpt")
    io.teardown()
    (root / "a.ckpt/notes.txt").write_text("mine")
    io.remove_checkpoint(root / "a.ckpt")
    assert visible(root) == []
    (kept,) = (root / "_vembed_async_ckpt/replaced").iterdir()
    assert (kept / "notes.txt").read_text() == "mine"
    (kept / "notes.txt").unlink()
    kept.rmdir()
    kept.parent.rmdir()


# -- ending


def test_a_failure_is_raised_at_the_end_of_fit(root: Path, disk: Disk) -> None:
    """By teardown, if no save came after it."""
    disk.full = True
    with pytest.raises(WriteError, match=r"step=8\.ckpt was not saved"):
        trainer(VembedCheckpointIO(writer="thread"), every(8, root)).fit(Net(), batches())
    assert visible(root) == []


def test_loading_what_failed_says_why_once(root: Path, disk: Disk) -> None:
    """Then what the path held before is loaded."""
    io = VembedCheckpointIO(writer="thread")
    io.save_checkpoint({"global_step": 1}, root / "a.ckpt")
    assert io.load_checkpoint(root / "a.ckpt") == {"global_step": 1}
    disk.full = True
    io.save_checkpoint({"global_step": 2}, root / "a.ckpt")
    with pytest.raises(WriteError, match="No space left"):
        io.load_checkpoint(root / "a.ckpt")
    assert io.load_checkpoint(root / "a.ckpt") == {"global_step": 1}


def test_what_is_pending_is_drained_at_exit(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A save that nobody tears down is durable at the interpreter's end."""
    VembedCheckpointIO().save_checkpoint({"global_step": 3}, root / "mine.ckpt")
    assert open_at(str(root)) is not None
    plugin_module._tear_down_at_exit()
    assert open_at(str(root)) is None
    assert read_checkpoint(root / "mine.ckpt")["global_step"] == 3
    assert capsys.readouterr().err == ""


def test_what_failed_at_exit_is_printed(root: Path, disk: Disk, capsys: pytest.CaptureFixture[str]) -> None:
    """There is nobody left to raise to."""
    disk.full = True
    VembedCheckpointIO(writer="thread").save_checkpoint({}, root / "a.ckpt")
    plugin_module._tear_down_at_exit()
    assert "at exit: WriteError" in capsys.readouterr().err


def test_an_exception_in_training_loses_no_checkpoint(root: Path) -> None:
    """fit raises what training raised, and what was being saved is there."""

    def fail() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        trainer(VembedCheckpointIO(), every(1, root), At(3, fail)).fit(Net(), batches())
    assert visible(root) == ["step=2.ckpt"]


def test_an_exception_in_training_is_not_hidden_by_a_failed_save(
    root: Path, disk: Disk, caplog: pytest.LogCaptureFixture
) -> None:
    """fit raises what training raised, the failure is logged; inside somebody's `except` a failure is raised all the same."""

    def fail() -> None:
        raise ZeroDivisionError

    disk.full = True
    with pytest.raises(ZeroDivisionError):
        trainer(VembedCheckpointIO(writer="thread"), every(2, root), At(3, fail)).fit(Net(), batches())
    assert "No space left" in caplog.text
    try:
        fail()
    except ZeroDivisionError:
        with pytest.raises(WriteError):
            trainer(VembedCheckpointIO(writer="thread"), every(2, root), steps=2).fit(Net(), batches())


def test_directories_are_let_go_of(root: Path) -> None:
    """A name with a slash is a directory of its own for each save: the checkpointers of all but a few are closed."""
    io = VembedCheckpointIO(writer="thread")
    for step in range(7):
        io.save_checkpoint({"global_step": step}, root / f"{step}-val/loss=1.ckpt")
    assert [open_at(str(root / f"{step}-val")) is not None for step in range(7)] == [False] * 3 + [True] * 4
    io.teardown()
    assert all(read_checkpoint(root / f"{step}-val/loss=1.ckpt") == {"global_step": step} for step in range(7))


def test_a_spawned_process_gets_its_options(root: Path) -> None:
    """The plugin can be pickled, with a save under way, and starts afresh."""
    io = VembedCheckpointIO(writer="thread", max_in_flight=3)
    io.save_checkpoint({"global_step": 1}, root / "a.ckpt")
    copy = pickle.loads(pickle.dumps(io))
    assert copy._options == io._options
    copy.save_checkpoint({"global_step": 2}, root / "b.ckpt")
    copy.teardown()
    io.teardown()
    assert visible(root) == ["a.ckpt", "b.ckpt"]


def test_pytorch_lightning_takes_it_too(root: Path) -> None:
    """The same code under its other name has a CheckpointIO class of its own."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("warnings.warn", lambda *_, **__: None)  # of its imports
        import pytorch_lightning

    class Other(pytorch_lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(4, 1)

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            return self.layer(batch[0]).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    checkpoints = pytorch_lightning.callbacks.ModelCheckpoint(root, filename="{step}", every_n_train_steps=4)
    fitted = pytorch_lightning.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, max_steps=4,
        callbacks=[checkpoints], plugins=[VembedCheckpointIO()],
    )  # fmt: skip
    net = Other()
    fitted.fit(net, batches())
    same(read_checkpoint(root / "step=4.ckpt")["state_dict"], net.state_dict())
    stock = root / "stock.ckpt"
    torch.save({"global_step": 4}, stock)
    assert fitted.strategy.checkpoint_io.load_checkpoint(stock) == {"global_step": 4}
