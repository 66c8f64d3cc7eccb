"""What stock accelerate allows around `save_state` and `load_state`, it allows with ours too: hooks, copies, other accelerators."""

from __future__ import annotations

import copy
import functools
import multiprocessing
import os
import pickle
import signal
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator, PartialState
from safetensors.torch import load_file

from vembed_async_ckpt import AsyncCheckpointer, CheckpointError, PlanError, load, save_checkpoint
from vembed_async_ckpt.integrations.accelerate import attach, save_state
from vembed_async_ckpt.integrations.shared import close_shared, open_at


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    yield
    close_shared(60)


class Training:
    """An accelerator with `models` linear models and one optimizer, prepared."""

    def __init__(self, models: int = 1) -> None:
        self.accelerator = Accelerator(cpu=True)
        made = [torch.nn.Linear(4, 2) for _ in range(models)]
        optimizer = torch.optim.AdamW([p for model in made for p in model.parameters()])
        *self.models, self.optimizer = self.accelerator.prepare(*made, optimizer)

    def save(self, path: Path, **options: Any) -> str:
        return str(save_state(self.accelerator, path, **options).result(60).path)

    def weights(self) -> list[torch.Tensor]:
        return [model.weight.detach().clone() for model in self.models]

    def overwrite(self) -> None:
        with torch.no_grad():
            for model in self.models:
                model.weight.fill_(7)

    def has(self, weights: list[torch.Tensor]) -> bool:
        return all(torch.equal(model.weight, weight) for model, weight in zip(self.models, weights, strict=True))


Way = Callable[[Training, str], None]


def _stock(training: Training, path: str) -> None:
    training.accelerator.load_state(path)


def _attached(training: Training, path: str) -> None:
    attach(training.accelerator)
    training.accelerator.load_state(path)


def _ours(training: Training, path: str) -> None:
    load(path, accelerator=training.accelerator)


ways = pytest.mark.parametrize("way", [_stock, _attached, _ours])


# -- copies


@pytest.mark.parametrize("done", ["saved", "attached", "loaded"])
def test_an_accelerator_can_be_pickled(tmp_path: Path, done: str) -> None:
    """Stock can: collate functions and datasets that hold one go to spawned workers."""
    training = Training()
    path = training.save(tmp_path / "one-1")
    if done != "saved":
        attach(training.accelerator)
    if done == "loaded":
        training.accelerator.load_state(path)
    before = training.weights()
    other = pickle.loads(pickle.dumps(training.accelerator))
    with torch.no_grad():
        other._models[0].weight.fill_(3)
    other.load_state(path)
    assert torch.equal(other._models[0].weight, before[0])
    assert copy.deepcopy(training.accelerator) is training.accelerator  # as accelerate has it
    assert not [name for name in vars(training.accelerator) if "vembed" in name]


def _loaded(accelerator: Accelerator, path: str) -> Any:
    PartialState(cpu=True)
    accelerator.load_state(path)
    return accelerator._models[0].weight.detach().tolist()


def test_a_spawned_process_gets_the_accelerator(tmp_path: Path) -> None:
    """With its hooks, and loads with them."""
    training = Training()
    path = training.save(tmp_path / "one-1")
    attach(training.accelerator)
    expected = training.weights()[0].tolist()
    training.overwrite()
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        assert pool.submit(_loaded, training.accelerator, path).result(100) == expected


@pytest.mark.parametrize("closing", [False, True])
def test_an_accelerator_is_freed_with_its_last_reference(tmp_path: Path, closing: bool) -> None:
    """No cycle through us: whoever counts on the memory of the model being free after `del` gets it."""
    training = Training()
    path = training.save(tmp_path / "one-1")
    attach(training.accelerator)
    training.accelerator.load_state(path)
    if closing:
        close_shared(60)
    gone = weakref.ref(training.accelerator)
    del training
    assert gone() is None


# -- load hooks


def test_attaching_twice_is_attaching_once(tmp_path: Path) -> None:
    """And each handle takes back its own."""
    training = Training()
    path = training.save(tmp_path / "one-1")
    before = training.weights()
    first, second = attach(training.accelerator), attach(training.accelerator)
    for handle in (None, first, second):
        if handle is not None:
            handle.remove()
        training.overwrite()
        training.accelerator.load_state(path)
        assert training.has(before)
    assert not training.accelerator._load_model_state_pre_hook


@ways
def test_a_load_hook_sees_every_model(tmp_path: Path, way: Way) -> None:
    """Registered before or after `attach`; what it leaves in the list is loaded."""
    training = Training(2)
    path = training.save(tmp_path / "two-1")
    before, seen = training.weights(), []
    training.accelerator.register_load_state_pre_hook(lambda models, path: seen.append(("before", len(models))))
    attach(training.accelerator)
    training.accelerator.register_load_state_pre_hook(lambda models, path: seen.append(("after", len(models))))
    training.overwrite()
    way(training, path)
    assert seen == [("before", 2), ("after", 2)]
    assert training.has(before)


@ways
def test_a_load_hook_may_take_all_models(tmp_path: Path, way: Way) -> None:
    """`models.clear()`: the hook has its own way, and nothing else loads them."""
    training = Training(2)
    path = training.save(tmp_path / "two-1")
    attach(training.accelerator)
    training.accelerator.register_load_state_pre_hook(lambda models, path: models.clear())
    training.overwrite()
    expected = training.weights()
    way(training, path)
    assert training.has(expected)


@pytest.mark.parametrize("way", [_attached, _ours])
def test_a_load_hook_may_take_the_first_of_two_that_were_saved(tmp_path: Path, way: Way) -> None:
    """The second gets its own weights, not those of the first."""
    training = Training(2)
    path = training.save(tmp_path / "two-1")
    _, second = training.weights()
    training.accelerator.register_load_state_pre_hook(lambda models, path: models.pop(0) and None)
    training.overwrite()
    first = training.weights()[0]
    way(training, path)
    assert training.has([first, second])


def one_by_hooks(training: Training, which: int, attaching: str) -> None:
    """diffusers' recipe: the save hook writes one model and pops its weights, the load hook loads it and pops the model."""

    def save_hook(models: list[Any], weights: list[Any], directory: str) -> None:
        torch.save(models[which].state_dict(), os.path.join(directory, "mine.pt"))
        weights.pop(which)

    def load_hook(models: list[Any], directory: str) -> None:
        models.pop(which).load_state_dict(torch.load(os.path.join(directory, "mine.pt")))

    training.accelerator.register_save_state_pre_hook(save_hook)
    if attaching == "first":
        attach(training.accelerator)
    training.accelerator.register_load_state_pre_hook(load_hook)
    if attaching == "last":
        attach(training.accelerator)


@pytest.mark.parametrize("way", [_stock, _ours])
@pytest.mark.parametrize("attaching", ["first", "last", "never"])
@pytest.mark.parametrize(("models", "which"), [(1, 0), (2, 0), (2, 1), (3, 1)])
def test_hooks_may_save_and_load_one_model(tmp_path: Path, way: Way, attaching: str, models: int, which: int) -> None:
    training = Training(models)
    one_by_hooks(training, which, attaching)
    path = training.save(tmp_path / "one-1")
    before = training.weights()
    training.overwrite()
    way(training, path)
    assert training.has(before)


@pytest.mark.parametrize("models", [1, 2])
def test_what_a_save_hook_wrote_is_not_left_unrestored(tmp_path: Path, models: int) -> None:
    """Without the load hook nobody restores the model that its save hook took out: our load says so, and changes nothing."""
    training = Training(models)
    one_by_hooks(training, 0, "never")
    path = training.save(tmp_path / "one-1")
    other = Training(models)
    before, rate = other.weights(), other.optimizer.param_groups[0]["lr"]
    with pytest.raises(CheckpointError, match="register the load hook"):
        load(path, accelerator=other.accelerator)
    assert other.has(before)
    load(path, accelerator=other.accelerator, model={})
    assert other.has(before)
    assert other.optimizer.param_groups[0]["lr"] == rate


def test_hooks_are_called_after_everything_else_is_known_to_fit(tmp_path: Path) -> None:
    """Our load refuses a second optimizer before a load hook changes a model."""
    training = Training()
    path = training.save(tmp_path / "one-1")
    called = []
    other = Training()
    other.accelerator.prepare(torch.optim.SGD(other.models[0].parameters()))
    other.accelerator.register_load_state_pre_hook(lambda models, path: called.append(path))
    with pytest.raises(CheckpointError, match="2 objects where 1"):
        load(path, accelerator=other.accelerator)
    assert called == []


def test_weights_that_a_hook_wrote_under_accelerates_names_are_loaded(tmp_path: Path) -> None:
    """A save hook may write `model_1.safetensors` itself: stock loads it without a load hook, attached or not."""
    from safetensors.torch import save_file

    training = Training(2)

    def save_hook(models: list[Any], weights: list[Any], directory: str) -> None:
        save_file(weights.pop(), os.path.join(directory, "model_1.safetensors"))

    training.accelerator.register_save_state_pre_hook(save_hook)
    path = training.save(tmp_path / "two-1")
    before = training.weights()
    for way in (_stock, _attached):
        training.overwrite()
        way(training, path)
        assert training.has(before)


@pytest.mark.parametrize("attaching", [False, True])
def test_strict_is_respected(tmp_path: Path, attaching: bool) -> None:
    """`load_state(strict=False)`: names on one side only are left as they are."""
    training = Training()
    path = training.save(tmp_path / "one-1")
    before = training.weights()[0]
    if attaching:
        attach(training.accelerator)
    model = training.models[0]
    del model.bias
    model.register_parameter("extra", torch.nn.Parameter(torch.ones(2)))
    training.accelerator._optimizers.clear()
    training.overwrite()
    with pytest.raises((RuntimeError, CheckpointError)):
        training.accelerator.load_state(path)
    training.accelerator.load_state(path, strict=False)
    assert torch.equal(model.weight, before)
    assert torch.equal(model.extra, torch.ones(2))


# -- save hooks


def _deletes(models: list[Any], weights: list[Any], directory: str) -> None:
    del weights[0]["bias"]


def _halves(models: list[Any], weights: list[Any], directory: str) -> None:
    weights[0]["weight"] = weights[0]["weight"].half()


def _halves_data(models: list[Any], weights: list[Any], directory: str) -> None:
    weights[0]["weight"].data = weights[0]["weight"].half()


def _renames(models: list[Any], weights: list[Any], directory: str) -> None:
    for state in weights:
        for name in list(state):
            state["module." + name] = state.pop(name)


def _adds(models: list[Any], weights: list[Any], directory: str) -> None:
    weights[0]["average"] = torch.ones(3)


def _replaces(models: list[Any], weights: list[Any], directory: str) -> None:
    weights[0] = {"only": torch.zeros(2)}


def _appends(models: list[Any], weights: list[Any], directory: str) -> None:
    weights.append({"average": torch.ones(2)})


def _reverses(models: list[Any], weights: list[Any], directory: str) -> None:
    weights.reverse()


def _changes_the_model(models: list[Any], weights: list[Any], directory: str) -> None:
    with torch.no_grad():
        models[0].weight.add_(1)


def _leaves_a_file(models: list[Any], weights: list[Any], directory: str) -> None:
    os.makedirs(os.path.join(directory, "sub", "deep"))
    Path(directory, "sub", "deep", "name.txt").write_text(os.path.basename(directory))


def _writes_what_is_written_anyway(models: list[Any], weights: list[Any], directory: str) -> None:
    for name in ("model.safetensors", "pytorch_model_1.bin", "optimizer.bin", "random_states_0.pkl", "config.json"):
        Path(directory, name).write_text("of the hook")


@pytest.mark.parametrize(
    "hook",
    [
        _writes_what_is_written_anyway,
        _deletes,
        _halves,
        _halves_data,
        _renames,
        _adds,
        _replaces,
        _appends,
        _reverses,
        _changes_the_model,
        _leaves_a_file,
    ],
)
@pytest.mark.parametrize("safe", [True, False])
def test_what_a_save_hook_leaves_is_what_is_saved(tmp_path: Path, hook: Any, safe: bool) -> None:
    """The same weights in the same files as stock writes; and after the hook is gone all of it again."""
    found: dict[Any, Any] = {}
    listed: dict[Any, list[str]] = {}
    for who, save in (("stock", Accelerator.save_state), ("ours", save_state)):
        torch.manual_seed(0)
        training = Training(2)
        save(training.accelerator, tmp_path / who / "first-1", safe_serialization=safe)
        handle = training.accelerator.register_save_state_pre_hook(hook)
        save(training.accelerator, tmp_path / who / "hooked-1", safe_serialization=safe)
        handle.remove()
        save(training.accelerator, tmp_path / who / "last-1", safe_serialization=safe)
        close_shared(60)
        for name in ("first-1", "hooked-1", "last-1"):
            directory = tmp_path / who / name
            read = load_file if safe else functools.partial(torch.load, weights_only=True)
            files = list(directory.glob("model*" if safe else "pytorch_model*.bin"))
            found[who, name] = {file.name: dict(read(file)) for file in files}
            found[who, name] |= {str(f.relative_to(directory)): f.read_text() for f in directory.glob("sub/deep/*")}
            listed[who, name] = sorted(f.name for f in directory.iterdir() if not f.name.startswith("vembed_"))
    for name in ("first-1", "hooked-1", "last-1"):
        stock, ours = found["stock", name], found["ours", name]
        assert listed["ours", name] == listed["stock", name]
        for file, state in stock.items():
            if isinstance(state, str):
                assert ours[file] == state
                continue
            assert sorted(ours[file]) == sorted(state)
            for key, value in state.items():
                assert ours[file][key].dtype is value.dtype
                assert torch.equal(ours[file][key], value)


def test_weights_that_are_none_are_refused(tmp_path: Path) -> None:
    """What a hook puts into the list must be a state_dict."""
    training = Training()
    training.accelerator.register_save_state_pre_hook(lambda models, weights, directory: weights.append(models[0]))
    with pytest.raises(PlanError, match="put a Linear into the list of weights"):
        save_state(training.accelerator, tmp_path / "one-1")
    assert list(tmp_path.glob("one-1")) == []


# -- pickled weights


@pytest.mark.parametrize("models", [1, 2])
def test_pickled_weights_are_stocks(tmp_path: Path, models: int) -> None:
    """safe_serialization=False: accelerate's files, which its load_state reads, attached or not; our load, which unpickles
    nothing, says who restores them and changes nothing."""
    training = Training(models)
    Accelerator.save_state(training.accelerator, str(tmp_path / "stock"), safe_serialization=False)
    path = training.save(tmp_path / "one-1", safe_serialization=False)
    names = set(os.listdir(tmp_path / "stock"))
    assert "pytorch_model.bin" in names
    assert {name for name in os.listdir(path) if not name.startswith("vembed_")} == names
    before = training.weights()
    for way in (_stock, _attached):
        training.overwrite()
        way(training, path)
        assert training.has(before)
    training.overwrite()
    expected = training.weights()
    with pytest.raises(CheckpointError, match=r"safe_serialization=False, use accelerator\.load_state"):
        load(path, accelerator=training.accelerator)
    assert training.has(expected)


def test_pickled_weights_are_those_of_the_call(tmp_path: Path) -> None:
    """They may be changed as soon as the call has returned; saved anew as safetensors, no pickle is left."""
    training = Training()
    before = training.weights()
    handle = save_state(training.accelerator, tmp_path / "one-1", safe_serialization=False)
    training.overwrite()
    path = handle.result(60).path
    assert torch.equal(torch.load(path / "pytorch_model.bin")["weight"], before[0])
    training.save(tmp_path / "one-1")
    assert "pytorch_model.bin" not in os.listdir(path)
    assert torch.equal(load_file(path / "model.safetensors")["weight"], training.weights()[0])


# -- other accelerators


@pytest.mark.parametrize("saver", ["save_state", "save_checkpoint", "checkpointer"])
def test_another_accelerator_waits_for_the_save_that_it_loads(tmp_path: Path, saver: str) -> None:
    """One that was never given to us, while the save is in flight: it gets what is being saved, not "folder does not exist"."""
    training = Training()
    own = AsyncCheckpointer(tmp_path) if saver == "checkpointer" else None
    training.save(tmp_path / "zero-0", checkpointer=own)
    checkpointer = own or open_at(os.path.realpath(tmp_path))
    assert checkpointer is not None
    writer = checkpointer.statistics()["writer_pid"]
    os.kill(writer, signal.SIGSTOP)
    try:
        if saver == "save_checkpoint":
            handle = save_checkpoint(tmp_path / "one-1", training.models[0], training.accelerator)
        else:
            handle = save_state(training.accelerator, tmp_path / "one-1", checkpointer=own)
        before = training.weights()
        assert not handle.done()
        timer = threading.Timer(0.3, os.kill, (writer, signal.SIGCONT))
        timer.start()
        other = Training()
        other.accelerator.load_state(str(tmp_path / "one-1"))
        timer.join()
    finally:
        os.kill(writer, signal.SIGCONT)
    assert handle.done()
    assert other.has(before)
    if own is not None:
        own.close(60)


def test_methods_of_a_subclass_wait_too(tmp_path: Path) -> None:
    """An Accelerator whose class has a load_state of its own, which never calls the one it overrides."""

    class Own(Accelerator):  # type: ignore[misc]
        loaded = ""

        def load_state(self, input_dir: str) -> None:  # type: ignore[override]
            assert os.path.isdir(input_dir)
            self.loaded = input_dir

    accelerator = Own(cpu=True)
    accelerator.prepare(torch.nn.Linear(4, 2))
    handle = save_state(accelerator, tmp_path / "one-1")
    accelerator.load_state(str(tmp_path / "one-1"))
    assert handle.done()
    assert accelerator.loaded == str(tmp_path / "one-1")
