"""load() puts back what was saved, exactly and in place; what does not fit or is broken is refused before anything is changed."""

from __future__ import annotations

import copy
import errno
import fcntl
import functools
import json
import os
import random
import shutil
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf

from vembed_async_ckpt import AsyncCheckpointer, CheckpointError, CorruptCheckpoint, load, verify
from vembed_async_ckpt._capture import model as models
from vembed_async_ckpt._capture.dtypes import TO_TORCH
from vembed_async_ckpt._disk import filesystem as fs
from vembed_async_ckpt._disk import reader, reading
from vembed_async_ckpt._format import names
from vembed_async_ckpt._restore import tensors

BOUND = 30


class Loader:
    """A dataloader that knows where it is."""

    def __init__(self, position: int) -> None:
        self.state = {"position": position, "order": torch.arange(position), "epoch": (1, None), "seed": 2**70}

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state


class Training:
    """A model, an optimizer with state, a scheduler, a scaler and a dataloader."""

    def __init__(self, seed: int = 0, width: int = 5) -> None:
        torch.manual_seed(seed)
        self.model = torch.nn.Sequential(
            torch.nn.Linear(4, width), torch.nn.BatchNorm1d(width), torch.nn.Linear(width, 2)
        )
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 2)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0 ** (3 + seed))
        self.dataloader = Loader(seed)
        for _ in range(seed + 1):
            self.optimizer.zero_grad()
            self.model(torch.randn(6, 4)).sum().backward()
            self.optimizer.step()
            self.scheduler.step()

    def state(self) -> dict[str, Any]:
        return copy.deepcopy({name: part.state_dict() for name, part in vars(self).items()})


def same(one: Any, other: Any) -> bool:
    """Equal in every bit, dtype and type."""
    if isinstance(one, torch.Tensor):
        return (
            isinstance(other, torch.Tensor)
            and (one.dtype, one.shape) == (other.dtype, other.shape)
            and torch.equal(one.detach().reshape(-1).view(torch.uint8), other.detach().reshape(-1).view(torch.uint8))
        )
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other


def save(root: Path, **what: Any) -> Path:
    with AsyncCheckpointer(root, writer="thread") as checkpointer:
        return checkpointer.save(7, **what).result(BOUND).path


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A checkpoint of everything, which no test changes, and the state in it."""
    training = Training(3)
    extra = {"list": [1, 2.5, None, float("inf")], "t": torch.arange(3), "tuple": (b"x", {1: "one"}), "$odd": True}
    path = save(
        tmp_path_factory.mktemp("saved"), **vars(training), extra=extra, config={"lr": 0.1}, metrics={"loss": 0.25}
    )
    return path, training.state()


def test_everything_comes_back_in_place(saved: tuple[Path, dict[str, Any]]):
    """Each part in all its bits, in the same tensors; step, config, extra and metrics beside it."""
    path, expected = saved
    training = Training(1)
    places = [tensor.data_ptr() for tensor in training.model.state_dict().values()]
    restored = load(path, **vars(training), verify="full")
    assert same(training.state(), expected)
    assert [tensor.data_ptr() for tensor in training.model.state_dict().values()] == places
    assert (restored.step, restored.config, restored.metrics) == (7, {"lr": 0.1}, {"loss": 0.25})
    extra = restored.extra
    assert extra.pop("t").tolist() == [0, 1, 2]
    assert extra == {"list": [1, 2.5, None, float("inf")], "tuple": (b"x", {1: "one"}), "$odd": True}


def test_another_generator_of_numpy_goes_on(root: Path):
    """One set with `set_bit_generator` goes on where it was; a process with another kind keeps its own, and is told so."""
    before = np.random.get_bit_generator()
    optimizer = torch.optim.SGD(torch.nn.Linear(1, 1).parameters())
    try:
        np.random.set_bit_generator(np.random.SFC64(3))
        with AsyncCheckpointer(root, writer="thread") as checkpointer:
            path = checkpointer.save(1, optimizer=optimizer).result(30).path
        expected = np.random.rand(3).tolist()
        np.random.set_bit_generator(np.random.SFC64(5))
        load(path, optimizer=optimizer)
        assert np.random.rand(3).tolist() == expected
        np.random.set_bit_generator(np.random.PCG64(7))
        with pytest.warns(UserWarning, match="was saved as a SFC64, this process has a PCG64"):
            load(path, optimizer=optimizer)
    finally:
        np.random.set_bit_generator(before)


@pytest.mark.parametrize("part", ["model", "optimizer", "scheduler", "scaler", "dataloader"])
def test_one_part_alone_leaves_the_others_as_they_are(saved: tuple[Path, dict[str, Any]], part: str):
    """Only what is given is changed; the generators are set with everything but a model alone."""
    path, expected = saved
    training = Training(1)
    before = training.state()
    torch.manual_seed(99)
    random.seed(99)
    generators = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    load(path, **{part: getattr(training, part)})
    assert same(training.state(), {**before, part: expected[part]})
    now = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    assert torch.equal(now[0], generators[0]) == (part == "model")
    assert (now[1] == generators[1]) == (part == "model")


def test_what_is_loaded_does_not_hang_on_the_file(root: Path):
    """No file stays open or mapped, and what came back may be changed without changing the checkpoint."""
    training = Training(2)
    path = save(root, **vars(training), extra={"t": torch.ones(3)})
    before = sorted(os.listdir("/proc/self/fd"))
    for _ in range(3):
        restored = load(path, **vars(training))
    assert sorted(os.listdir("/proc/self/fd")) == before
    assert str(path) not in Path("/proc/self/maps").read_text()
    restored.extra["t"].fill_(7)
    for entry in training.optimizer.state.values():
        entry["exp_avg"].fill_(7)
    verify(path)


def test_several_models_and_optimizers_by_name(root: Path):
    """Each named model has a directory of its name; each comes back to the object of that name, in any order."""
    one, other = Training(1), Training(2)
    path = save(
        root,
        model={"query": one.model, "key": other.model},
        optimizer={"a": one.optimizer, "b": other.optimizer},
        scheduler={"a": one.scheduler, "b": other.scheduler},
    )
    assert (path / "query" / "model.safetensors").exists()
    assert (path / "optimizer_1.bin").exists()
    expected = [one.state(), other.state()]
    first, second = Training(3), Training(4)
    load(
        path,
        model={"key": second.model, "query": first.model},
        optimizer={"b": second.optimizer, "a": first.optimizer},
        scheduler={"b": second.scheduler, "a": first.scheduler},
    )
    for training, state in zip((first, second), expected, strict=True):
        for part in ("model", "optimizer", "scheduler"):
            assert same(training.state()[part], state[part])


def wider() -> dict[str, Any]:
    return {"model": Training(1, width=6).model}


def more_layers() -> dict[str, Any]:
    return {"model": torch.nn.Sequential(*Training(1).model, torch.nn.Linear(2, 2))}


def fewer_layers() -> dict[str, Any]:
    return {"model": Training(1).model[:2]}


def another_name() -> dict[str, Any]:
    return {"model": {"student": Training(1).model}}


def other_groups() -> dict[str, Any]:
    model = Training(1).model
    return {"optimizer": torch.optim.AdamW([{"params": model[0].parameters()}, {"params": model[2].parameters()}])}


def another_optimizer() -> dict[str, Any]:
    return {"optimizer": {"second": Training(1).optimizer}}


MISFITS: dict[Callable[[], dict[str, Any]], str] = {
    wider: r"0\.weight has shape \(6, 4\), saved was \(5, 4\)",
    more_layers: r"3\.weight was not saved",
    fewer_layers: r"2\.weight is not in the model",
    another_name: "no model 'student'",
    other_groups: r"groups of \[2, 2\] parameters, saved were \[6\]",
    another_optimizer: "no optimizer 'second'",
}


@pytest.mark.parametrize("misfit", MISFITS, ids=lambda misfit: misfit.__name__)
def test_objects_that_do_not_fit_are_refused_before_anything_is_changed(
    saved: tuple[Path, dict[str, Any]], misfit: Callable[[], dict[str, Any]]
):
    """The error names what does not fit; the parts that would have fit are untouched."""
    path, _ = saved
    training, wrong = Training(1), misfit()
    before = training.state()
    generators = torch.get_rng_state()
    models = [value for value in wrong.values() if isinstance(value, torch.nn.Module)]
    frozen = [copy.deepcopy(model.state_dict()) for model in models]
    with pytest.raises(CheckpointError, match=MISFITS[misfit]):
        load(path, **{**vars(training), **wrong})
    assert same(training.state(), before)
    assert all(same(model.state_dict(), state) for model, state in zip(models, frozen, strict=True))
    assert torch.equal(torch.get_rng_state(), generators)


@pytest.mark.parametrize("part", ["optimizer", "scheduler", "scaler", "dataloader"])
def test_a_part_that_was_not_saved_is_refused(root: Path, part: str):
    """The message says that it is not there; the model is untouched."""
    training = Training(1)
    path = save(root, model=training.model)
    model = Training(2).model
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CheckpointError, match=part):
        load(path, model=model, **{part: getattr(training, part)})
    assert same(model.state_dict(), before)


def test_an_unknown_way_to_verify_is_refused(saved: tuple[Path, dict[str, Any]]):
    """A typing error is no reason not to verify."""
    with pytest.raises(ValueError, match="'fast'"):
        load(saved[0], verify="fast")  # type: ignore[arg-type]


FILES = [
    "model.safetensors", "optimizer.bin", "scheduler.bin", "scaler.pt", names.random_states(0), names.CONFIG,
    names.TRAINING_STATE, names.TRAINING_TENSORS,
]  # fmt: skip


def test_the_list_of_files_is_complete(saved: tuple[Path, dict[str, Any]]):
    """The tests below break every file there is."""
    assert sorted(path.name for path in saved[0].iterdir()) == sorted([*FILES, names.MANIFEST])


@pytest.fixture
def broken(saved: tuple[Path, dict[str, Any]], tmp_path: Path) -> Path:
    """A copy that may be broken."""
    return Path(shutil.copytree(saved[0], tmp_path / "checkpoint-7"))


def flip(path: Path, where: float = 0.5) -> None:
    data = bytearray(path.read_bytes())
    data[int((len(data) - 1) * where)] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("where", [0, 0.5, 1])
@pytest.mark.parametrize("name", [*FILES, names.MANIFEST])
def test_full_verification_finds_one_flipped_bit(broken: Path, name: str, where: float):
    """In every file, at its start, in its middle and at its end; nothing is changed."""
    flip(broken / name, where)
    training = Training(1)
    before = training.state()
    with pytest.raises(CorruptCheckpoint, match=name):
        load(broken, **vars(training), verify="full")
    with pytest.raises(CorruptCheckpoint, match=name):
        verify(broken)
    assert same(training.state(), before)


@pytest.mark.parametrize("change", [-1, 1])
@pytest.mark.parametrize("name", [*FILES, names.MANIFEST])
def test_size_verification_finds_a_file_of_another_size(broken: Path, name: str, change: int):
    """Truncated or grown, in every file; the default of load()."""
    data = (broken / name).read_bytes()
    (broken / name).write_bytes(data[:-1] if change < 0 else data + b"\0")
    training = Training(1)
    before = training.state()
    with pytest.raises(CorruptCheckpoint, match=name):
        load(broken, **vars(training))
    assert same(training.state(), before)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_corrupt(broken: Path, name: str):
    """It is named, and said to be missing."""
    (broken / name).unlink()
    with pytest.raises(CorruptCheckpoint, match=rf"{name}.*missing"):
        load(broken, **vars(Training(1)))


@pytest.mark.parametrize("name", [names.CONFIG, names.TRAINING_STATE, "model.safetensors"])
@pytest.mark.parametrize("how", ["size", "none"])
def test_what_the_size_does_not_tell_is_still_found_before_anything_is_changed(broken: Path, name: str, how: Any):
    """A file of the right size whose content makes no sense: CorruptCheckpoint, and nothing was changed."""
    (broken / name).write_bytes(b"\0" * (broken / name).stat().st_size)
    training = Training(1)
    before = training.state()
    with pytest.raises(CorruptCheckpoint, match=name):
        load(broken, **vars(training), verify=how)
    assert same(training.state(), before)


def test_a_directory_that_is_no_checkpoint(tmp_path: Path):
    """An empty directory is incomplete, one that is not there does not exist."""
    with pytest.raises(CorruptCheckpoint, match=r"vembed_manifest\.json"):
        load(tmp_path)
    with pytest.raises(CheckpointError, match="missing: does not exist"):
        load(tmp_path / "missing")


# -- models whose files are not their state_dict

TEXT = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
MODELS: dict[str, Callable[[], Any]] = {
    "tied": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=32)),
    "tied thrice": lambda: hf.T5ForConditionalGeneration(
        hf.T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
    ),
    "bert": lambda: hf.BertModel(hf.BertConfig(**TEXT)),
    "parts": lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**TEXT, num_key_value_heads=1, num_local_experts=4)),
    "renamed": lambda: hf.LlavaForConditionalGeneration(
        hf.LlavaConfig(
            text_config=hf.LlamaConfig(**TEXT),
            vision_config=hf.CLIPVisionConfig(
                hidden_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                intermediate_size=24,
                image_size=16,
                patch_size=8,
            ),
        )
    ),
}


@pytest.mark.parametrize("shards", ["50GB", "10KB"])
@pytest.mark.parametrize("name", MODELS)
def test_models_of_transformers_come_back(root: Path, name: str, shards: str):
    """Tied, sharded, renamed or computed: every parameter and buffer is what it was, ties stay ties, optimizer included."""
    torch.manual_seed(1)
    model = MODELS[name]()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    with AsyncCheckpointer(root, writer="thread", max_shard_size=shards) as checkpointer:
        path = checkpointer.save(1, model={"m": model}, optimizer=optimizer).result(BOUND).path
    torch.manual_seed(2)
    fresh = MODELS[name]()
    fresh_optimizer = torch.optim.SGD(fresh.parameters(), lr=0.1, momentum=0.9)
    places = {key: tensor.data_ptr() for key, tensor in fresh.state_dict().items()}
    load(path, model={"m": fresh}, optimizer=fresh_optimizer)
    assert same(dict(fresh.state_dict()), dict(model.state_dict()))
    assert same(fresh_optimizer.state_dict(), optimizer.state_dict())
    assert {key: tensor.data_ptr() for key, tensor in fresh.state_dict().items()} == places


@pytest.fixture
def computing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for a family whose conversion cannot do without contiguous copies: the files hold computed values."""
    captured = models._captured

    def refusing(save_pretrained: Any, options: Any, *, in_place: bool) -> Any:
        if in_place:
            raise RuntimeError("view size is not compatible with input tensor's size and stride")
        return captured(save_pretrained, options, in_place=in_place)

    monkeypatch.setattr(models, "_captured", refusing)


def mixtral(**changed: Any) -> Any:
    return hf.MixtralForCausalLM(hf.MixtralConfig(**{**TEXT, **changed}, num_key_value_heads=1, num_local_experts=4))


@pytest.mark.parametrize("name", ["", "m"])
def test_a_model_whose_files_hold_computed_values_comes_back(root: Path, computing: None, name: str):
    """By the model's own way back, from_pretrained; in place."""
    model = mixtral()
    path = save(root, model={name: model} if name else model)
    assert json.loads((path / names.MANIFEST).read_bytes())["names"][name]["computed"]
    fresh = mixtral()
    places = {key: tensor.data_ptr() for key, tensor in fresh.state_dict().items()}
    load(path, model={name: fresh} if name else fresh)
    assert same(dict(fresh.state_dict()), dict(model.state_dict()))
    assert {key: tensor.data_ptr() for key, tensor in fresh.state_dict().items()} == places


@pytest.mark.parametrize("computed", [False, True])
def test_a_converted_model_of_another_shape_is_refused(root: Path, request: pytest.FixtureRequest, computed: bool):
    """Also where the files are not the state_dict nothing is changed when a model does not fit."""
    if computed:
        request.getfixturevalue("computing")
    path = save(root, model={"m": mixtral(), "n": Training(2).model})
    other, training = mixtral(vocab_size=41), Training(1)
    before = copy.deepcopy(other.state_dict()), training.state()
    with pytest.raises(CheckpointError, match=r"embed_tokens\.weight"):
        load(path, model={"n": training.model, "m": other})
    assert same((other.state_dict(), training.state()), before)


class Fused(torch.nn.Module):
    """Its state_dict shows the parts of one fused parameter, as some models' hooks do."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = torch.nn.Parameter(torch.randn(6, 4))
        self.register_state_dict_post_hook(self.split)

    @staticmethod
    def split(module: Any, state: dict[str, torch.Tensor], prefix: str, local_metadata: Any) -> None:
        state[prefix + "q"], state[prefix + "kv"] = state.pop(prefix + "qkv").split([2, 4])


def test_parts_of_a_parameter_go_where_they_were(root: Path):
    """Saved as parts, restored into the whole; a parameter of other strides is refused, not filled wrongly."""
    module, fresh = Fused(), Fused()
    path = save(root, model=module)
    load(path, model=fresh)
    assert torch.equal(fresh.qkv, module.qkv)
    fresh.qkv.data = torch.zeros(4, 6).t()
    with pytest.raises(CheckpointError, match="qkv is not contiguous"):
        load(path, model=fresh)
    assert not fresh.qkv.any()


def test_extra_state_of_a_module_comes_back(root: Path):
    """`get_extra_state` may give a tensor: it is stored, and handed to set_extra_state."""

    class Counting(torch.nn.Linear):
        calls = 3

        def get_extra_state(self) -> torch.Tensor:
            return torch.tensor([self.calls])

        def set_extra_state(self, state: torch.Tensor) -> None:
            self.calls = int(state)

    module = Counting(2, 2)
    path = save(root, model=module)
    fresh = Counting(2, 2)
    fresh.calls = 0
    load(path, model=fresh)
    assert fresh.calls == 3
    assert same(dict(fresh.state_dict()), dict(module.state_dict()))


def test_state_of_another_dtype_than_its_parameter_comes_back_exactly(root: Path):
    """torch would cast it to the parameter's dtype; here float32 and int state of bfloat16 parameters stay what they were."""
    model = torch.nn.Linear(3, 2).bfloat16()
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3).bfloat16()).sum().backward()
    optimizer.step()
    for entry in optimizer.state.values():
        entry["exp_avg"] = torch.randn(entry["exp_avg"].shape) / 3
        entry["exp_avg_sq"] = entry["exp_avg_sq"].double() / 3
        entry["indices"] = torch.arange(3)
    expected = copy.deepcopy(optimizer.state_dict())
    path = save(root, model=model, optimizer=optimizer)
    fresh = torch.nn.Linear(3, 2).bfloat16()
    fresh_optimizer = torch.optim.AdamW(fresh.parameters())
    load(path, model=fresh, optimizer=fresh_optimizer)
    assert same(fresh_optimizer.state_dict(), expected)
    assert same(fresh.weight, model.weight)


def test_a_tensor_lr_comes_back_as_one(root: Path):
    """What stands in param_groups is restored with its type, tensors and tuples included."""
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.125), foreach=False)
    expected = copy.deepcopy(optimizer.state_dict())
    path = save(root, optimizer=optimizer)
    optimizer.param_groups[0]["lr"].fill_(1)
    load(path, optimizer=optimizer)
    assert same(optimizer.state_dict(), expected)


def decay(step: int) -> float:
    return 0.9**step


L = torch.optim.lr_scheduler
SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": functools.partial(L.LambdaLR, lr_lambda=decay),
    "MultiplicativeLR": functools.partial(L.MultiplicativeLR, lr_lambda=lambda step: 0.9),
    "StepLR": functools.partial(L.StepLR, step_size=2),
    "MultiStepLR": functools.partial(L.MultiStepLR, milestones=[2, 4, 4, 6]),
    "ConstantLR": L.ConstantLR,
    "LinearLR": L.LinearLR,
    "ExponentialLR": functools.partial(L.ExponentialLR, gamma=0.9),
    "PolynomialLR": L.PolynomialLR,
    "CosineAnnealingLR": functools.partial(L.CosineAnnealingLR, T_max=10),
    "CosineAnnealingWarmRestarts": functools.partial(L.CosineAnnealingWarmRestarts, T_0=3),
    "CyclicLR": functools.partial(L.CyclicLR, base_lr=0.01, max_lr=0.1, cycle_momentum=False),
    "OneCycleLR": functools.partial(L.OneCycleLR, max_lr=0.1, total_steps=20),
    "SequentialLR": lambda o: L.SequentialLR(o, [L.LinearLR(o), L.MultiStepLR(o, [2, 3])], milestones=[2]),
    "ChainedScheduler": lambda o: L.ChainedScheduler([L.ConstantLR(o), L.ExponentialLR(o, 0.9)]),
    "ReduceLROnPlateau": functools.partial(L.ReduceLROnPlateau, patience=1),
    "SWALR": functools.partial(torch.optim.swa_utils.SWALR, swa_lr=0.05),
    "transformers cosine": lambda o: hf.get_cosine_schedule_with_warmup(o, 2, 10),
    "transformers linear": lambda o: hf.get_linear_schedule_with_warmup(o, 2, 10),
}


def run(scheduler: Any, optimizer: Any, steps: int) -> list[float]:
    rates = []
    for _ in range(steps):
        optimizer.step()
        scheduler.step(*([1.0] if isinstance(scheduler, L.ReduceLROnPlateau) else []))
        rates.append(optimizer.param_groups[0]["lr"])
    return rates


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_goes_on_where_it_was(root: Path, name: str):
    """Learning rates after a restore equal those of the run that was not interrupted; accelerate's file holds the same."""

    def make() -> tuple[Any, Any]:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # SequentialLR steps its schedulers when it is made
            return optimizer, SCHEDULERS[name](optimizer)

    optimizer, scheduler = make()
    run(scheduler, optimizer, 3)
    path = save(root, optimizer=optimizer, scheduler=scheduler)
    state = copy.deepcopy(scheduler.state_dict())
    fresh_optimizer, fresh = make()
    load(path, optimizer=fresh_optimizer, scheduler=fresh)
    assert run(fresh, fresh_optimizer, 6) == run(scheduler, optimizer, 6)
    theirs = torch.load(path / "scheduler.bin", weights_only=False)
    assert same(theirs, state)


SCRIPT = """
import sys
from pathlib import Path
import torch
import vembed_async_ckpt
from vembed_async_ckpt import load
sys.path.insert(0, sys.argv[1])
found = []
model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.BatchNorm1d(5), torch.nn.Linear(5, 2))
optimizer = torch.optim.AdamW(model.parameters())
scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
class Loader:
    def load_state_dict(self, state): pass
load(sys.argv[2])  # imports what it needs
sys.addaudithook(lambda event, arguments: found.append((event, arguments)) if event.startswith(("pickle.", "marshal.")) else None)
load(sys.argv[2], model=model, optimizer=optimizer, scheduler=scheduler, dataloader=Loader(), scaler=torch.amp.GradScaler("cpu"))
print(len(found), found[:3])
torch.load(Path(sys.argv[2]) / "optimizer.bin", weights_only=False)
assert found, "the hook would have seen it"
"""


def test_nothing_is_unpickled(saved: tuple[Path, dict[str, Any]], tmp_path: Path):
    """No audit event of pickle while everything is restored; torch.load of the same directory raises many."""
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path), str(saved[0])], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1].startswith("0 "), result.stdout


def test_a_saved_value_that_we_never_write_is_corrupt(broken: Path):
    """A tag nobody knows, or a tensor that is not there, in a training state whose hash is right."""
    import xxhash

    for tag in ({"$pickle": "gASVCAAAAAAAAABdlEsBSwJlLg=="}, {"$tensor": "nowhere"}, {"$bytes": "?"}, {"$tuple": 3}):
        state = json.loads((broken / names.TRAINING_STATE).read_bytes())
        state["extra"] = tag
        content = json.dumps(state).encode()
        (broken / names.TRAINING_STATE).write_bytes(content)
        manifest = json.loads((broken / names.MANIFEST).read_bytes())
        manifest["files"][names.TRAINING_STATE] = {"size": len(content), "xxh3_128": xxhash.xxh3_128_hexdigest(content)}
        manifest.pop("self")
        body = json.dumps(manifest).encode()[:-1] + b","
        (broken / names.MANIFEST).write_bytes(body + b'"self":"%s"}' % xxhash.xxh3_128_hexdigest(body).encode())
        model = Training(1).model
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(CorruptCheckpoint, match=r"training_state|cannot be read"):
            load(broken, model=model, verify="full")
        assert same(model.state_dict(), before)


# -- where the bytes go


def every_kind() -> torch.nn.Module:
    """Parameters and buffers of every dtype that is saved, and of shapes that are easily got wrong."""
    module = torch.nn.Module()
    for number, dtype in enumerate(TO_TORCH.values()):
        raw = torch.randint(0, 2, (3, 4, 16), dtype=torch.uint8)
        module.register_buffer(f"kind{number}", raw.view(dtype))
        module.register_buffer(f"turned{number}", (raw ^ 1).view(dtype).transpose(0, 1))
    module.empty = torch.nn.Parameter(torch.empty(0, 3))
    module.scalar = torch.nn.Parameter(torch.rand(()))
    module.one = torch.nn.Parameter(torch.rand(1))
    module.large = torch.nn.Parameter(torch.rand(300, 1000))
    module.transposed = torch.nn.Parameter(torch.rand(5, 7).t())
    module.register_buffer("expanded", torch.rand(1, 3).expand(4, 3))
    return module


@pytest.mark.parametrize("staging", [None, 64, 4096])
def test_every_kind_of_tensor_comes_back(root: Path, monkeypatch: pytest.MonkeyPatch, staging: int | None):
    """Straight into its memory, or through staging memory of `staging` bytes as what is not on the host does."""
    module, fresh = every_kind(), every_kind()
    path = save(root, model=module)
    if staging is not None:
        monkeypatch.setattr(tensors, "_STAGING_BYTES", staging)
        monkeypatch.setattr(tensors, "_is_on_host", lambda place: False)
    before = {key: (tensor.data_ptr(), tensor._version) for key, tensor in fresh.state_dict(keep_vars=True).items()}
    assert not same(dict(fresh.state_dict()), dict(module.state_dict()))
    load(path, model=fresh)
    for key, tensor in fresh.state_dict(keep_vars=True).items():
        assert tensor.data_ptr() == before[key][0]
        assert tensor._version > before[key][1] or not tensor.numel(), key  # autograd knows that it was changed
    assert same(dict(fresh.state_dict()), dict(module.state_dict()))


@pytest.mark.parametrize("staging", [64, 1 << 20])
def test_tensors_of_another_dtype_or_order_get_the_values(root: Path, monkeypatch: pytest.MonkeyPatch, staging: int):
    """As `copy_` has it: cast, or strided; also where one tensor alone is more than the staging memory."""
    module, fresh = torch.nn.Linear(40, 30), torch.nn.Linear(40, 30).to(torch.bfloat16)
    fresh.weight.data = fresh.weight.data.t().contiguous().t()
    path = save(root, model=module)
    monkeypatch.setattr(tensors, "_STAGING_BYTES", staging)
    load(path, model=fresh)
    assert torch.equal(fresh.weight, module.weight.bfloat16())
    assert torch.equal(fresh.bias, module.bias.bfloat16())
    assert fresh.weight.stride() == (1, 30)


def momentum(**changed: Any) -> torch.optim.Optimizer:
    """An optimizer of two parameters that has stepped."""
    parameters = [torch.nn.Parameter(torch.rand(4, 5)) for _ in range(2)]
    for parameter in parameters:
        parameter.grad = torch.rand(4, 5)
    optimizer = changed.pop("kind", torch.optim.SGD)(parameters, lr=0.1, momentum=0.9, **changed)
    optimizer.step()
    return optimizer


def buffers(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [entry["momentum_buffer"] for entry in optimizer.state.values()]


class Own(torch.optim.SGD):
    """Keeps the tensors that it has, and copies into them what it is given."""

    def load_state_dict(self, state: Any) -> None:
        for held, entry in zip(self.state.values(), state["state"].values(), strict=True):
            held["momentum_buffer"].zero_()
            held["momentum_buffer"].copy_(entry["momentum_buffer"])


def shared(optimizer: torch.optim.Optimizer) -> None:
    first, second = optimizer.state.values()
    second["momentum_buffer"] = first["momentum_buffer"]


def of_one_storage(optimizer: torch.optim.Optimizer) -> None:
    both = torch.rand(2, 4, 5)
    for entry, part in zip(optimizer.state.values(), both, strict=True):
        entry["momentum_buffer"] = part


def in_a_larger_one(optimizer: torch.optim.Optimizer) -> None:
    for entry in optimizer.state.values():
        entry["momentum_buffer"] = torch.rand(2, 4, 5)[1]


def of_the_parameters(optimizer: torch.optim.Optimizer) -> None:
    for parameter, entry in optimizer.state.items():
        entry["momentum_buffer"] = parameter.detach()


def of_the_gradients(optimizer: torch.optim.Optimizer) -> None:
    for parameter, entry in optimizer.state.items():
        entry["momentum_buffer"] = parameter.grad


def of_another_dtype(optimizer: torch.optim.Optimizer) -> None:
    for entry in optimizer.state.values():
        entry["momentum_buffer"] = entry["momentum_buffer"].double()


def of_another_shape(optimizer: torch.optim.Optimizer) -> None:
    for entry in optimizer.state.values():
        entry["momentum_buffer"] = torch.rand(5, 4)


def no_tensor(optimizer: torch.optim.Optimizer) -> None:
    for entry in optimizer.state.values():
        entry["momentum_buffer"] = None


def test_state_that_an_optimizer_has_is_overwritten_in_place(root: Path):
    """As weights are: no second copy of it is ever needed."""
    saved, fresh = momentum(), momentum()
    path = save(root, optimizer=saved)
    places = [tensor.data_ptr() for tensor in buffers(fresh)]
    load(path, optimizer=fresh)
    assert [tensor.data_ptr() for tensor in buffers(fresh)] == places
    assert all(map(torch.equal, buffers(fresh), buffers(saved)))


@pytest.mark.parametrize(
    "change",
    [
        shared,
        of_one_storage,
        in_a_larger_one,
        of_the_parameters,
        of_the_gradients,
        of_another_dtype,
        of_another_shape,
        no_tensor,
    ],
)
def test_state_whose_memory_is_not_its_own_is_replaced(root: Path, change: Callable[[Any], None]):
    """What else has that memory keeps what is in it, and each tensor gets its own values."""
    saved, fresh = momentum(), momentum()
    path = save(root, optimizer=saved)
    change(fresh)
    old = [value for value in buffers(fresh) if value is not None]
    before = copy.deepcopy(old), copy.deepcopy([(p, p.grad) for p in fresh.state])
    load(path, optimizer=fresh)
    assert same(buffers(fresh), buffers(saved))
    assert same((old, [(p, p.grad) for p in fresh.state]), before)


def test_an_optimizer_that_loads_in_a_way_of_its_own_is_given_other_tensors(root: Path):
    """It may clear those it has before it looks at what it is given."""
    saved, fresh = momentum(), momentum(kind=Own)
    load(save(root, optimizer=saved), optimizer=fresh)
    assert all(map(torch.equal, buffers(fresh), buffers(saved)))


# -- how they are read


def test_any_parts_of_files_are_read_to_where_they_belong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Of any size, near to and far from each other, overlapping, twice, in any order, of several files; nothing else is written."""
    monkeypatch.setattr(reading, "READ_BYTES", 10_000)
    monkeypatch.setattr(reading, "MAX_BUFFERS", 7)
    draw = random.Random(0)
    contents = [draw.randbytes(size) for size in (200_000, 1, 50_000)]
    files = []
    for number, content in enumerate(contents):
        (tmp_path / str(number)).write_bytes(content)
        files.append(reading.OpenFile(str(tmp_path / str(number))))
    for _ in range(100):
        memory, expected, parts = bytearray(1_000_000), bytearray(1_000_000), []
        at = 0
        for _ in range(draw.randrange(40)):
            n = draw.randrange(3)
            offset = draw.randrange(len(contents[n]))
            size = min(draw.choice([0, 1, 8, 300, 25_000]), len(contents[n]) - offset)
            at += draw.randrange(3)
            parts.append((files[n], offset, memoryview(memory)[at : at + size]))
            expected[at : at + size] = contents[n][offset : offset + size]
            at += size
        reading.read_into(parts)
        assert memory == expected
    for file in files:
        file.close()


def test_reads_that_come_short_are_continued(
    saved: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As they may on a network disk, or after a signal: in the midst of a tensor and between two."""
    path, expected = saved
    whole = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, into, offset: whole(fd, [into[0][:5]], offset))
    training = Training(1)
    load(path, **vars(training))
    assert same(training.state(), expected)


def test_a_system_without_preadv_loads_too(saved: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows has none."""
    path, expected = saved
    monkeypatch.delattr(os, "preadv")
    training = Training(1)
    load(path, **vars(training))
    assert same(training.state(), expected)


def test_a_process_that_may_have_no_more_threads_loads_too(
    saved: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the one that it has."""
    path, expected = saved

    def refuse(thread: Any) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(reading, "READ_BYTES", 64)
    monkeypatch.setattr(reading.threading.Thread, "start", refuse)
    training = Training(1)
    load(path, **vars(training))
    assert same(training.state(), expected)


@pytest.mark.parametrize("how", ["an error", "the end"])
def test_a_file_that_fails_while_tensors_are_read(
    saved: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """CorruptCheckpoint with its name, where a mapped file would kill the process; no thread reads on, and what is restored
    after the tensors is as it was."""
    path, _ = saved
    whole = os.preadv

    def preadv(fd: int, into: Any, offset: int) -> int:
        if os.readlink(f"/proc/self/fd/{fd}").endswith("optimizer.bin"):
            if how == "the end":
                return 0
            raise OSError(errno.EIO, "Input/output error")
        return whole(fd, into, offset)

    monkeypatch.setattr(reading, "READ_BYTES", 64)
    monkeypatch.setattr(os, "preadv", preadv)
    training = Training(1)
    before = training.state()
    generators = torch.get_rng_state()
    threads = threading.active_count()
    with pytest.raises(CorruptCheckpoint, match=r"optimizer\.bin: (cannot be read: Input/output error|ends at \d+)"):
        load(path, **vars(training))
    assert threading.active_count() == threads
    after = training.state()
    assert all(same(after[part], before[part]) for part in ("scheduler", "scaler", "dataloader"))
    assert torch.equal(torch.get_rng_state(), generators)


# -- while another process saves the same step


class Replacing:
    """`copies` take the place of a checkpoint, one after another, at the openings of files that `when` counts out."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, checkpoint: Path, copies: list[Path], when: set[int]) -> None:
        self.opened = 0
        self.replaced = 0
        really = fs.open_regular

        def open_regular(path: str) -> int:
            self.opened += 1
            if self.opened in when and self.replaced < len(copies):
                old = copies[self.replaced]
                fs.LocalFilesystem().rename(str(old), str(checkpoint), "exchange")
                self.replaced += 1
                shutil.rmtree(old)
            return really(path)

        for module in (fs, reading, reader):
            monkeypatch.setattr(module, "open_regular", open_regular)


@pytest.fixture(scope="module")
def of_one_step(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, dict[str, Any]]]:
    """Three checkpoints whose files have the same names and sizes, and the states in them."""
    found = []
    for seed in (4, 5, 6):
        training = Training(seed)
        found.append((save(tmp_path_factory.mktemp("same"), **vars(training), extra=seed), training.state()))
    return found


@pytest.mark.parametrize("how", ["size", "full", "none"])
def test_what_is_replaced_while_it_is_loaded_is_loaded_whole(
    of_one_step: list[tuple[Path, dict[str, Any]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: Any
) -> None:
    """Before any opening of a file: what comes back is one of the two in all its parts, never some of each."""
    (old, state), (new, other_state), _ = of_one_step
    for n in range(1, 200):
        checkpoint, copy_ = (Path(shutil.copytree(path, tmp_path / f"{n}-{path.parent.name}")) for path in (old, new))
        training = Training(1)
        with monkeypatch.context() as patch:
            replacing = Replacing(patch, checkpoint, [copy_], {n})
            restored = load(checkpoint, **vars(training), verify=how)
        if replacing.replaced == 0:
            break
        came_back = training.state()
        expected = state if restored.extra == 4 else other_state
        assert all(same(came_back[part], expected[part]) for part in came_back), (n, restored)
    assert n > 6


def test_what_is_replaced_again_and_again_is_refused(
    of_one_step: list[tuple[Path, dict[str, Any]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One more try, then an error that says so; nothing was changed."""
    checkpoint, *copies = (Path(shutil.copytree(path, tmp_path / path.parent.name)) for path, _ in of_one_step)
    training = Training(1)
    before = training.state()
    replacing = Replacing(monkeypatch, checkpoint, copies, {3, 12})
    with pytest.raises(CheckpointError, match="was replaced twice while it was read"):
        load(checkpoint, **vars(training))
    assert replacing.replaced == 2
    assert same(training.state(), before)


def test_what_is_loaded_is_what_is_kept_from_retention(
    of_one_step: list[tuple[Path, dict[str, Any]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replaced between the lock and the reading of its manifest: the lock is then on the one that took its place."""
    checkpoint, copy_ = (Path(shutil.copytree(path, tmp_path / path.parent.name)) for path, _ in of_one_step[:2])
    locked = []

    class Watching(Loader):
        def load_state_dict(self, state: dict[str, Any]) -> None:
            with (checkpoint / names.MANIFEST).open() as manifest:
                try:
                    fcntl.flock(manifest, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    locked.append(True)

    replacing = Replacing(monkeypatch, checkpoint, [copy_], {2})
    assert load(checkpoint, dataloader=Watching(0)).extra == 5
    assert replacing.replaced == 1
    assert locked == [True]


def stepped(seed: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = torch.nn.Linear(4, 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.randn(2, 4)).sum().backward()
    optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("how", ["taken", "loaded"])
def test_a_state_dict_from_before_is_left_as_it_was(root: Path, how: str):
    """torch's state_dicts share their tensors: to look at an older checkpoint and go back must not change what one goes back to."""
    (model, optimizer), (saved, its_optimizer) = stepped(1), stepped(2)
    with AsyncCheckpointer(root) as checkpointer:
        path = checkpointer.save(1, model=saved, optimizer=its_optimizer).result(BOUND).path
    if how == "taken":
        before = optimizer.state_dict()
    else:
        before = stepped(3)[1].state_dict()
        optimizer.load_state_dict(before)
    expected = copy.deepcopy(before)
    load(path, model=model, optimizer=optimizer)
    for index, entry in before["state"].items():
        for key, value in entry.items():
            assert torch.equal(value, expected["state"][index][key]), key
    moments = zip(optimizer.state.values(), its_optimizer.state.values(), strict=True)
    assert all(torch.equal(one["exp_avg"], other["exp_avg"]) for one, other in moments)


def test_memory_that_cannot_be_written_is_not_blamed_on_the_file(root: Path, tmp_path: Path):
    """A weight over a read-only map of a file."""
    model = torch.nn.Linear(64, 64)
    with AsyncCheckpointer(root) as checkpointer:
        path = checkpointer.save(1, model=model).result(BOUND).path
    np.zeros((64, 64), dtype=np.float32).tofile(tmp_path / "zeros")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.weight.data = torch.from_numpy(np.memmap(tmp_path / "zeros", np.float32, "r", shape=(64, 64)))
    with pytest.raises(CheckpointError, match="read-only") as caught:
        load(path, model=model)
    assert not isinstance(caught.value, CorruptCheckpoint)


ELSEWHERE = """
import ctypes, sys

class Refusing(ctypes.CDLL):
    def __init__(self, name, *arguments, **options):
        if name is None:
            raise TypeError("argument of type 'NoneType' is not iterable")  # as Windows has it
        super().__init__(name, *arguments, **options)

import torch, transformers  # theirs may
ctypes.CDLL = Refusing
from vembed_async_ckpt import latest, load, verify

model = torch.nn.Linear(4, 3)
verify(latest(sys.argv[1]))
load(latest(sys.argv[1]), model=model)
assert model.weight.eq(7).all()
"""


def test_reading_needs_nothing_that_only_linux_has(root: Path):
    """The C library of the process, which the saving side calls."""
    model = torch.nn.Linear(4, 3)
    torch.nn.init.constant_(model.weight, 7)
    with AsyncCheckpointer(root) as checkpointer:
        checkpointer.save(1, model=model).result(BOUND)
    child = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, str(root)], capture_output=True, text=True, timeout=120, check=False
    )
    assert child.returncode == 0, child.stderr
