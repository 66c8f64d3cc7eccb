"""`save_state` in the place of `accelerator.save_state`: what accelerate's own tests of checkpoints expect of it holds, and stock
`load_state` reads what it writes.

The cases of accelerate's `tests/test_state_checkpointing.py`, `tests/test_accelerator.py` and `test_checkpointing.py` that need
neither network nor accelerator are here in our own words, each named in its docstring.
"""

from __future__ import annotations

import copy
import json
import os
import random
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, set_seed
from torch.utils.data import DataLoader, TensorDataset

from vembed_async_ckpt import CheckpointError, PlanError, SaveHandle, latest, load, save_checkpoint, verify
from vembed_async_ckpt._memory.staging import Snapshot
from vembed_async_ckpt.integrations.accelerate import save_state
from vembed_async_ckpt.integrations.shared import close_shared, open_at

from ...conftest import check_root, leftovers


@pytest.fixture
def project(tmp_path: Path) -> Iterator[Path]:
    """A project_dir; at the end all of its checkpoints are whole, and beside `checkpoints/` is only our work directory."""
    yield tmp_path
    close_shared(60)
    automatic = tmp_path / "checkpoints"
    if automatic.exists():
        check_root(automatic)
        assert leftovers(automatic) == []
        assert all(name.startswith("checkpoint_") for name in os.listdir(automatic))


class Line(torch.nn.Module):
    """y = a x + b."""

    def __init__(self) -> None:
        super().__init__()
        self.a = torch.nn.Parameter(torch.randn(1))
        self.b = torch.nn.Parameter(torch.randn(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a * x + self.b


class Run:
    """A line fitted to points, everything prepared; `save` is ours in the place of accelerate's, durable when it returns."""

    def __init__(self, project: Path, scheduled: bool = True, **configuration: Any) -> None:
        set_seed(42)
        automatic = configuration.pop("automatic_checkpoint_naming", True)
        self.project = ProjectConfiguration(
            project_dir=str(project), automatic_checkpoint_naming=automatic, **configuration
        )
        self.accelerator = Accelerator(cpu=True, project_config=self.project)
        self.accelerator.save_state = self.save  # type: ignore[method-assign]
        model = Line()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        x = torch.randn(64, 1)
        loader = DataLoader(TensorDataset(x, 2 * x + 3 + 0.1 * torch.randn(64, 1)), batch_size=16, shuffle=True)
        self.model, self.optimizer, self.loader = self.accelerator.prepare(model, optimizer, loader)
        self.scheduler = None
        if scheduled:
            self.scheduler = self.accelerator.prepare(torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.99))

    def begin(self, *arguments: Any, **options: Any) -> SaveHandle:
        return save_state(self.accelerator, *arguments, **options)

    def save(self, *arguments: Any, **options: Any) -> str:
        return str(self.begin(*arguments, **options).result(60).path)

    def train(self, epochs: int) -> list[float]:
        drawn = []
        for _ in range(epochs):
            for x, y in self.loader:
                self.accelerator.backward(torch.nn.functional.mse_loss(self.model(x), y))
                self.optimizer.step()
                self.optimizer.zero_grad()
            drawn.append(random.random())
            if self.scheduler is not None:
                self.scheduler.step()
        return drawn

    def weights(self) -> tuple[float, float]:
        return self.model.a.item(), self.model.b.item()


@pytest.fixture(params=["ours", "stock"])
def reader(request: pytest.FixtureRequest) -> Callable[[Run, str | None], None]:
    """Both ways back: accelerate's, and ours for a path."""

    def read(run: Run, path: str | None) -> None:
        if request.param == "ours" and path is not None:
            load(path, accelerator=run.accelerator)
        else:
            run.accelerator.load_state(path)

    return read


# -- accelerate's own cases


def test_the_limit_counts(project: Path) -> None:
    """test_with_save_limit: with a limit of one the second save leaves one checkpoint, and nothing of ours beside
    it."""
    run = Run(project, total_limit=1)
    run.accelerator.save_state()
    run.accelerator.save_state()
    run.accelerator.end_training()
    assert os.listdir(project / "checkpoints") == ["checkpoint_1"]
    assert os.listdir(project) == ["checkpoints"]


def test_old_checkpoints_go(project: Path) -> None:
    """test_checkpoint_deletion: of eleven saves with a limit of two, the last two stay."""
    run = Run(project, total_limit=2)
    for _ in range(11):
        run.accelerator.save_state()
    run.accelerator.end_training()
    assert sorted(os.listdir(project / "checkpoints")) == ["checkpoint_10", "checkpoint_9"]


@pytest.mark.parametrize("where", ["folder", "automatic", "relative"])
def test_a_training_goes_on(
    project: Path, monkeypatch: pytest.MonkeyPatch, where: str, reader: Callable[[Run, str | None], None]
) -> None:
    """test_can_resume_training, _with_folder, _checkpoints_relative_path: three epochs in one go, and with two interruptions, give
    the same weights, optimizer and random numbers; in a folder of one's own, by automatic names, and below a relative path, the
    newest found by accelerate itself."""
    named = where == "folder"
    monkeypatch.chdir(project)
    directory = Path("here") if where == "relative" else project
    paths = (str(project / "initial"), str(project / "second")) if named else (None, None)
    run = Run(directory, automatic_checkpoint_naming=not named)
    initial = run.accelerator.save_state(paths[0])
    begun, moments = run.weights(), run.optimizer.state_dict()
    drawn = run.train(3)
    expected, final = run.weights(), copy.deepcopy(run.optimizer.state_dict())

    again = Run(directory, automatic_checkpoint_naming=not named, iteration=1)
    again.train(1)
    reader(again, None if where == "relative" else initial)
    assert (again.weights(), again.optimizer.state_dict()) == (begun, moments)
    drawn_again = again.train(2)
    second = again.accelerator.save_state(paths[1])
    reader(again, second)
    drawn_again += again.train(1)
    assert (again.weights(), again.optimizer.state_dict()) == (expected, final)
    assert drawn_again == drawn
    if where == "relative":
        close_shared(60)
        assert check_root(Path("here/checkpoints")) == [0, 1]


def test_a_scheduler_goes_back(project: Path, reader: Callable[[Run, str | None], None]) -> None:
    """test_with_scheduler: three epochs later its state is another one, and loading brings the old one back."""
    run = Run(project)
    path = run.accelerator.save_state()
    assert run.scheduler is not None
    before = run.scheduler.state_dict()
    run.train(3)
    assert run.scheduler.state_dict() != before
    reader(run, path)
    assert run.scheduler.state_dict() == before


def test_the_newest_is_found(project: Path) -> None:
    """test_automatic_loading: `load_state()` without a path takes the last one saved."""
    run = Run(project)
    run.accelerator.save_state()
    run.train(2)
    expected = run.weights()
    run.accelerator.save_state()
    run.train(1)
    assert run.weights() != expected
    run.accelerator.load_state()
    assert run.weights() == expected


def test_what_cannot_be_registered_is_refused_as_before(project: Path) -> None:
    """test_invalid_registration: accelerate names the two items that have no state_dict, and saving goes on without them."""
    run = Run(project)
    with pytest.raises(ValueError, match=r"Item at index 0.*\n.*Item at index 1") as raised:
        run.accelerator.register_for_checkpointing(
            torch.tensor([1]), torch.tensor([2]), Line(), run.optimizer.optimizer
        )
    assert "index 2" not in str(raised.value)
    assert not any(name.startswith("custom_checkpoint") for name in os.listdir(run.accelerator.save_state()))


def test_the_device_to_load_to_can_be_named(project: Path) -> None:
    """test_map_location, as far as there is one device: "cpu" and "on_device" load, another word is accelerate's TypeError."""
    run = Run(project)
    run.train(1)
    path = run.accelerator.save_state()
    expected = copy.deepcopy(run.optimizer.state_dict())
    for place in ("cpu", "on_device"):
        run.train(1)
        run.accelerator.load_state(path, map_location=place)
        assert run.optimizer.state_dict() == expected
        assert all(value.is_cpu for state in run.optimizer.state.values() for value in state.values())
    with pytest.raises(TypeError, match="map location"):
        run.accelerator.load_state(path, map_location="invalid")


def test_each_epoch_can_be_returned_to(project: Path, reader: Callable[[Run, str | None], None]) -> None:
    """The script test_checkpointing: an epoch's directory gives back learning rate, optimizer's learning rate and the score that
    were noted when it was saved."""

    def facts(run: Run) -> dict[str, Any]:
        x, y = run.loader.dataset.tensors
        with torch.no_grad():
            score = torch.nn.functional.mse_loss(run.model(x), y).item()
        assert run.scheduler is not None
        return {"score": score, "lr": run.scheduler.get_last_lr(), "optimizer": run.optimizer.param_groups[0]["lr"]}

    run = Run(project, automatic_checkpoint_naming=False)
    noted = {}
    for epoch in range(3):
        run.train(1)
        noted[run.accelerator.save_state(str(project / f"epoch_{epoch}"))] = facts(run)
    assert len({str(values) for values in noted.values()}) == 3
    for path, values in noted.items():
        fresh = Run(project, automatic_checkpoint_naming=False)
        reader(fresh, path)
        assert facts(fresh) == values


def test_weights_come_back(project: Path) -> None:
    """test_save_load_model: what was changed after the save is as it was."""
    run = Run(project, automatic_checkpoint_naming=False)
    before = run.weights()
    path = run.accelerator.save_state(str(project / "one"))
    with torch.no_grad():
        run.model.a.fill_(123)
    run.accelerator.load_state(path)
    assert run.weights() == before


@pytest.mark.parametrize("popping", [False, True])
def test_hooks_save_and_load(project: Path, popping: bool) -> None:
    """test_save_load_model_with_hooks: hooks write and read a file of their own, and may take the weights into their own hands;
    taken back, they are not called any more."""
    run = Run(project, automatic_checkpoint_naming=False)

    def save_hook(models: list[Any], weights: list[Any], directory: str) -> None:
        (Path(directory) / "data.json").write_text(json.dumps({"class_name": type(models[0]).__name__}))
        if popping:
            torch.save(weights.pop(), Path(directory) / "mine.pt")

    def load_hook(models: list[Any], directory: str) -> None:
        models[0].class_name = json.loads((Path(directory) / "data.json").read_text())["class_name"]
        if popping:
            models.pop().load_state_dict(torch.load(Path(directory) / "mine.pt"))

    handles = [
        run.accelerator.register_save_state_pre_hook(save_hook),
        run.accelerator.register_load_state_pre_hook(load_hook),
    ]
    before = run.weights()
    path = run.accelerator.save_state(str(project / "one"))
    assert ("model.safetensors" in os.listdir(path)) is not popping
    run.train(1)
    run.model.class_name = "random"
    run.accelerator.load_state(path)
    assert run.weights() == before
    assert run.model.class_name == "Line"
    for handle in handles:
        handle.remove()
    path = run.accelerator.save_state(str(project / "two"))
    assert "data.json" not in os.listdir(path)
    assert "model.safetensors" in os.listdir(path)
    run.model.class_name = "random"
    run.accelerator.load_state(path)
    assert run.model.class_name == "random"


def test_the_names_of_files_are_those_of_accelerate(project: Path) -> None:
    """Two models, two optimizers, two schedulers, a scaler, a registered object: what stock writes, we write, and ours besides."""

    def prepared(where: Path) -> Accelerator:
        accelerator = Accelerator(cpu=True)
        accelerator.scaler = torch.amp.GradScaler("cpu")
        models = [Line(), Line()]
        optimizers = [torch.optim.Adam(model.parameters()) for model in models]
        schedulers = [torch.optim.lr_scheduler.ConstantLR(optimizer) for optimizer in optimizers]
        accelerator.prepare(*models, *optimizers, *schedulers)
        accelerator.register_for_checkpointing(Line())
        return accelerator

    stock = prepared(project)
    stock.save_state(str(project / "stock"))
    ours = save_state(prepared(project), project / "ours").result(60).path
    names = set(os.listdir(project / "stock"))
    assert {"model_1.safetensors", "optimizer_1.bin", "scheduler_1.bin", "custom_checkpoint_0.pkl", "scaler.pt"} < names
    assert names < set(os.listdir(ours))
    assert all(name.startswith("vembed_") for name in set(os.listdir(ours)) - names)
    stock.load_state(str(ours))


# -- automatic names


def stopped(run: Run, root: Path) -> Callable[[], None]:
    """Begin a save whose writer stands still; call what is returned to let it go on."""
    checkpointer = open_at(os.path.realpath(root))
    assert checkpointer is not None
    writer = checkpointer.statistics()["writer_pid"]
    os.kill(writer, signal.SIGSTOP)
    return lambda: os.kill(writer, signal.SIGCONT)


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """What is copied late is copied when this is set: by the first that waits at the barrier, or by the test."""
    go = threading.Event()
    run, barrier = Snapshot.run, Snapshot.barrier

    def held_run(self: Snapshot) -> None:
        assert go.wait(60)
        run(self)

    def releasing_barrier(self: Snapshot) -> None:
        go.set()
        barrier(self)

    monkeypatch.setattr(Snapshot, "run", held_run)
    monkeypatch.setattr(Snapshot, "barrier", releasing_barrier)
    yield go
    go.set()


def test_loading_waits_for_what_is_being_copied(
    project: Path, late: threading.Event, reader: Callable[[Run, str | None], None]
) -> None:
    """A save, and at once back to the one before: the weights change only when the save has its copy of them."""
    run = Run(project)
    late.set()
    first = run.accelerator.save_state()
    run.train(1)
    expected = run.weights()
    late.clear()
    handle = run.begin()
    reader(run, first)
    late.set()
    assert run.weights() != expected
    run.accelerator.load_state(str(handle.result(60).path))
    assert run.weights() == expected


def test_nothing_but_checkpoints_is_among_them_while_one_is_saved(project: Path) -> None:
    """accelerate reads a number out of every entry: while a save is in flight, anybody's `load_state()` finds the one before, and
    the next save_state its number. The accelerator that saves waits for it."""
    run = Run(project)
    run.accelerator.save_state()
    expected = run.weights()
    run.train(1)
    go_on = stopped(run, project / "checkpoints")
    try:
        handle = run.begin()
        assert os.listdir(project / "checkpoints") == ["checkpoint_0"]
        newest = run.weights()
        Accelerator.load_state.__wrapped__(run.accelerator)  # past what save_state has put before it
        assert run.weights() == expected
        assert not handle.done()
    finally:
        go_on()
    run.accelerator.load_state()
    assert handle.done()
    assert run.weights() == newest
    run.begin()
    assert handle.result(60).path.name == "checkpoint_1"
    close_shared(60)
    assert sorted(os.listdir(project / "checkpoints")) == ["checkpoint_0", "checkpoint_1", "checkpoint_2"]
    assert [handle.result().step, run.project.iteration] == [1, 3]


def test_a_name_that_is_taken_is_refused(project: Path) -> None:
    """A restart that does not say where it was would overwrite: it is told what to set, and nothing is touched."""
    run = Run(project)
    path = Path(run.accelerator.save_state())
    before = (path / "vembed_manifest.json").read_bytes()
    again = Run(project)
    with pytest.raises(PlanError, match="iteration"):
        again.accelerator.save_state()
    assert (path / "vembed_manifest.json").read_bytes() == before
    again.project.iteration = 7
    assert again.accelerator.save_state() == str(project / "checkpoints" / "checkpoint_7")


def test_only_ours_are_counted_and_deleted(project: Path) -> None:
    """A checkpoint that accelerate itself wrote before us stays, whatever the limit is."""
    run = Run(project, total_limit=2)
    Accelerator.save_state(run.accelerator)
    for _ in range(4):
        run.accelerator.save_state()
    run.accelerator.end_training()
    assert sorted(os.listdir(project / "checkpoints")) == ["checkpoint_0", "checkpoint_3", "checkpoint_4"]
    (project / "checkpoints" / "checkpoint_0").rename(project / "moved")  # it has no manifest, and `project` wants one


def test_two_roots_in_one_project(project: Path) -> None:
    """Automatic checkpoints below it and a final one of save_checkpoint in it do not get in each other's way."""
    run = Run(project, total_limit=2)
    handles = []
    for _ in range(3):
        handles.append(run.begin())
        run.train(1)
        handles.append(save_checkpoint(project / "final", run.model, run.accelerator))
    run.accelerator.end_training()
    assert all(handle.done() and handle.exception() is None for handle in handles)
    assert sorted(os.listdir(project / "checkpoints")) == ["checkpoint_1", "checkpoint_2"]
    verify(project / "final")
    expected = run.weights()
    assert latest(project) == project / "final"
    run.train(1)
    run.accelerator.load_state(str(project / "final"))
    assert run.weights() == expected
    run.accelerator.load_state()
    assert run.weights() != expected


# -- what else an accelerator knows


class Notes:
    """A registered object with any state."""

    def __init__(self, state: Any) -> None:
        self.state = state

    def state_dict(self) -> Any:
        return self.state

    def load_state_dict(self, state: Any) -> None:
        self.state = state


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype is other.dtype and torch.equal(one, other)
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and bool((one == other).all())
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return type(one) is type(other) and all(map(same, one, other)) and len(one) == len(other)
    return type(one) is type(other) and one == other


STATES: dict[str, Any] = {
    "numbers": {"n": 3, "best": 0.25, "name": "é", "flag": None, 5: (1, [2])},
    "tensors": {"shadow": {"w": torch.arange(6.0).reshape(2, 3).T, "b": torch.ones(3, dtype=torch.bfloat16)}},
    "numpy": {"best": np.float64(0.5), "history": np.arange(4, dtype=np.int16)},
    "like an optimizer": {"state": {"x": 1, "y": 2}, "param_groups": "none"},
    "empty": {},
}


@pytest.mark.parametrize("state", STATES.values(), ids=STATES)
def test_registered_objects_come_back(project: Path, state: Any, reader: Callable[[Run, str | None], None]) -> None:
    """Whatever data their state is: by our load without unpickling, and by accelerate from the same bytes."""
    run = Run(project)
    notes = Notes(state)
    run.accelerator.register_for_checkpointing(Notes({"first": 1}), notes)
    path = run.accelerator.save_state()
    notes.state = {"other": 0}
    reader(run, path)
    assert same(notes.state, state)


def test_a_registered_object_is_saved_as_it_was_at_the_call(project: Path, late: threading.Event) -> None:
    """Tensors that change right after the call are those of the call: no optimizer's step guards them, so they are not copied
    late. Their bytes are written once."""
    run = Run(project)
    average = torch.zeros(1 << 22)
    run.accelerator.register_for_checkpointing(Notes({"average": average}))
    late.set()
    run.accelerator.save_state()
    run.train(1)  # from now on what belongs to the optimizer may be copied late
    late.clear()
    handle = run.begin()
    average.fill_(7)
    late.set()
    info = handle.result(60)
    assert not torch.load(info.path / "custom_checkpoint_0.pkl")["average"].any()
    assert info.total_bytes < 1.5 * average.nbytes


def test_what_is_more_than_data_is_left_to_accelerate(project: Path) -> None:
    """A state with live objects in it is pickled, with a warning that says who restores it; our load refuses before it changes
    anything."""
    run = Run(project)
    run.accelerator.register_for_checkpointing(Notes({"when": ValueError("no data")}))
    before = run.weights()
    with pytest.warns(UserWarning, match="registered object 0, a Notes, is pickled: only accelerator.load_state"):
        path = run.accelerator.save_state()
    run.train(1)
    after = run.weights()
    with pytest.raises(CheckpointError, match=r"custom_checkpoint_0\.pkl is a pickle"):
        load(path, accelerator=run.accelerator)
    assert run.weights() == after
    run.accelerator.load_state(path)
    assert run.weights() == before


def test_another_number_of_registered_objects_is_refused(project: Path) -> None:
    """As accelerate does, but before anything is changed."""
    run = Run(project)
    path = run.accelerator.save_state()
    run.accelerator.register_for_checkpointing(Notes({}))
    run.train(1)
    after = run.weights()
    with pytest.raises(CheckpointError, match="holds 0 registered objects, the accelerator has 1"):
        load(path, accelerator=run.accelerator)
    assert run.weights() == after


def test_another_number_of_dataloaders_is_said(project: Path) -> None:
    """Everything else is restored."""
    run = Run(project)
    path = run.accelerator.save_state()
    before = run.weights()
    run.train(1)
    run.accelerator.prepare(DataLoader(TensorDataset(torch.zeros(4)), batch_size=2))
    with pytest.warns(UserWarning, match="has 2 dataloaders, saved were 1"):
        load(path, accelerator=run.accelerator)
    assert run.weights() == before
    assert run.loader.iteration == 1


def test_a_dataloader_with_a_state_of_its_own_gets_it_back(project: Path) -> None:
    """What torchdata's StatefulDataLoader would say is in the checkpoint, for accelerate as a file and for our load as data."""
    run = Run(project)
    state = {"_num_yielded": 3, "_sampler_iter_state": {"generator": torch.arange(4, dtype=torch.uint8)}}
    received = []
    run.loader.use_stateful_dataloader = True
    run.loader.dl_state_dict = state
    run.loader.base_dataloader.load_state_dict = received.append
    path = run.accelerator.save_state()
    run.loader.dl_state_dict = {}
    run.accelerator.load_state(path)
    load(path, accelerator=run.accelerator)
    assert len(received) == 2
    assert same(received[0], state)
    assert same(received[1], state)


def test_an_optimizer_may_have_numpy_numbers(project: Path, reader: Callable[[Run, str | None], None]) -> None:
    """A learning rate that numpy computed is saved and comes back."""
    run = Run(project, scheduled=False)
    run.optimizer.param_groups[0]["lr"] = np.float64(0.125)
    path = run.accelerator.save_state()
    run.optimizer.param_groups[0]["lr"] = 1.0
    reader(run, path)
    assert run.optimizer.param_groups[0]["lr"] == 0.125


# -- as accelerate.save_state has it


def test_a_save_needs_a_place(project: Path) -> None:
    """Without automatic names a directory must be named; with them a project_dir."""
    run = Run(project, automatic_checkpoint_naming=False)
    with pytest.raises(PlanError, match="output_dir is None"):
        run.begin()
    accelerator = Accelerator(cpu=True, project_config=ProjectConfiguration(automatic_checkpoint_naming=True))
    with pytest.raises(PlanError, match="needs a project_dir"):
        save_state(accelerator)


def test_what_is_sharded_is_refused(project: Path) -> None:
    """Where one process does not hold the whole state, and on every node, nothing is written."""
    run = Run(project, save_on_each_node=True)
    with pytest.raises(PlanError, match="save_on_each_node"):
        run.begin()
    assert os.listdir(project) == []
