"""`AsyncCheckpointMixin`: what stock Trainer writes, resumes from, keeps and announces, without stopping the training."""

from __future__ import annotations

import copy
import gc
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.utils import DistributedType
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from torch.utils.data import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    EarlyStoppingCallback,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
    default_data_collator,
)
from transformers.trainer_callback import ExportableState

from vembed_async_ckpt import (
    AsyncCheckpointer,
    CheckpointError,
    KeepBest,
    KeepEvery,
    KeepLast,
    PlanError,
    SaveHandle,
    checkpoints,
    verify,
)
from vembed_async_ckpt._disk import manifests
from vembed_async_ckpt._disk.filesystem import LocalFilesystem, RenameMode, walk_files
from vembed_async_ckpt._format import names
from vembed_async_ckpt.integrations import trainer_state
from vembed_async_ckpt.integrations.transformers import AsyncCheckpointMixin, _Run
from vembed_async_ckpt.policies import every, on_best
from vembed_async_ckpt.shipping import upload
from vembed_async_ckpt.testing import use_filesystem

# PEFT's; of transformers' own names.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
THREAD = MappingProxyType({"writer": "thread"})


class Async(AsyncCheckpointMixin, Trainer):
    async_checkpoint_options = THREAD


@pytest.fixture(autouse=True, scope="module")
def _fast() -> Iterator[None]:
    """Trainer collects garbage at every start: what the imports have made is left out of that. Tiny models want one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.freeze()
    yield
    gc.unfreeze()
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def reasons(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Why Trainer saved by itself. A test that expects it takes the reason out: no other passes on Trainer's own saves."""
    said: list[str] = []
    say = AsyncCheckpointMixin._say_why_stock
    monkeypatch.setattr(
        AsyncCheckpointMixin, "_say_why_stock", lambda self, reason: (said.append(reason), say(self, reason))
    )
    yield said
    assert said == []


@pytest.fixture
def root(root: Path) -> Iterator[Path]:
    """Its checkpoints are whole at the end, as far as they are ours."""
    yield root
    for path in root.glob("checkpoint-*"):
        if path.is_dir() and not (path / names.MANIFEST).exists():
            shutil.rmtree(path)


# -- models, data, trainers


def llama(**config: Any) -> LlamaForCausalLM:
    """Its dropout makes every step depend on the random state."""
    torch.manual_seed(1)
    settings = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "attention_dropout": 0.2}
    return LlamaForCausalLM(LlamaConfig(**settings, **heads, **config))


def lora(*further: str) -> Any:
    config = LoraConfig(r=2, lora_dropout=0.2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(llama(), config)
    for name in further:
        model.add_adapter(name, config)
    return model


class Plain(torch.nn.Module):
    """No `save_pretrained`; a buffer that forward changes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embed = torch.nn.Embedding(40, 8)
        self.norm = torch.nn.BatchNorm1d(8)
        self.out = torch.nn.Linear(8, 40)

    def forward(self, input_ids: Any, labels: Any = None) -> dict[str, Any]:
        logits = self.out(torch.nn.functional.dropout(self.norm(self.embed(input_ids).mean(1)), 0.2, self.training))
        return {"loss": torch.nn.functional.cross_entropy(logits, labels[:, 0]), "logits": logits}


class Foreign(Plain):
    """Has a `save_pretrained` that Trainer does not use."""

    def save_pretrained(self, directory: str, **kwargs: Any) -> None:
        raise AssertionError("Trainer saves the state_dict of what is not a PreTrainedModel")


KINDS: dict[str, Callable[[], Any]] = {
    "full": llama,
    "tied": lambda: llama(tie_word_embeddings=True),
    "frozen": lambda: frozen(llama()),
    "lora": lora,
    "two adapters": lambda: lora("other"),
    "plain": Plain,
    "foreign": Foreign,
}


def frozen(model: Any) -> Any:
    model.model.embed_tokens.weight.requires_grad_(False)
    return model


class Tokens(Dataset):  # type: ignore[type-arg]
    def __init__(self, count: int = 16) -> None:
        self._ids = torch.randint(0, 40, (count, 6), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": self._ids[index], "labels": self._ids[index]}


def tokenizer() -> PreTrainedTokenizerFast:
    words = {"[UNK]": 0, "[PAD]": 1, "hello": 2}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="[UNK]")), unk_token="[UNK]", pad_token="[PAD]"
    )


def arguments(root: Path, **given: Any) -> TrainingArguments:
    quiet = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "dataloader_pin_memory": False}
    usual = {
        "per_device_train_batch_size": 2,
        "learning_rate": 0.01,
        "logging_steps": 1,
        "save_steps": 2,
        "max_steps": 4,
    }
    return TrainingArguments(str(root), **{**quiet, **usual, **given})


def make(root: Path, kind: str = "full", cls: type[Trainer] = Async, **given: Any) -> Any:
    """A trainer; keywords of Trainer go to it, all others to TrainingArguments."""
    own = {
        key: given.pop(key)
        for key in ("callbacks", "processing_class", "data_collator", "eval_dataset")
        if key in given
    }
    return cls(model=KINDS[kind](), args=arguments(root, **given), train_dataset=Tokens(), **own)


class Judged(Trainer):
    """Its evaluations give what `verdicts` says, without evaluating; higher is better."""

    verdicts: Sequence[float] = ()

    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        value, *self.verdicts = self.verdicts
        metrics = {"eval_accuracy": value}
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


class JudgedAsync(AsyncCheckpointMixin, Judged):
    async_checkpoint_options = THREAD


def judged(root: Path, verdicts: Sequence[float], cls: type[Judged] = JudgedAsync, **given: Any) -> Any:
    """A trainer whose evaluations at steps 2, 4, ... (unless said otherwise) give the verdicts."""
    usual = {"eval_strategy": "steps", "eval_steps": 2, "metric_for_best_model": "accuracy", "greater_is_better": True}
    trainer = make(root, cls=cls, eval_dataset=Tokens(2), **{**usual, **given})
    trainer.verdicts = list(verdicts)
    return trainer


class Recorder(TrainerCallback):
    """What happened, in order: (event, step). Every checkpoint announced must be whole."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.events: list[tuple[str, int]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.events.append(("step", state.global_step))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        verify(self.root / f"checkpoint-{state.global_step}")
        self.events.append(("save", state.global_step))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.events.append(("end", state.global_step))

    @property
    def saves(self) -> list[int]:
        return [step for event, step in self.events if event == "save"]


class Gate(LocalFilesystem):
    """Publishes no checkpoint while it is shut."""

    def __init__(self) -> None:
        self.open = threading.Event()

    def rename(self, source: str, target: str, mode: RenameMode) -> None:
        if os.path.basename(target).startswith("checkpoint-"):
            assert self.open.wait(60)
        super().rename(source, target, mode)


# -- comparing


def steps(root: Path) -> list[int]:
    """Numbers of all `checkpoint-N` directories."""
    return sorted(int(path.name.rpartition("-")[2]) for path in root.glob("checkpoint-*") if path.is_dir())


def files(directory: Path) -> set[str]:
    """Names of Trainer's files in a checkpoint: ours begin with `vembed_`."""
    return {name for name, _ in walk_files(str(directory)) if not name.startswith("vembed_")}


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other) and one.dtype == other.dtype
    if isinstance(one, np.ndarray):
        return np.array_equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other) and type(one) is type(other)


def read(path: Path) -> Any:
    """The content of a file, by which two checkpoints are compared."""
    if path.name == "training_args.bin":
        settings = torch.load(path, weights_only=False).to_dict()
        return {key: value for key, value in settings.items() if key not in ("output_dir", "logging_dir")}
    if path.suffix in (".pt", ".pth"):
        return torch.load(path, weights_only=False)
    return path.read_bytes()


def assert_same_files(ours: Path, stock: Path) -> None:
    assert files(ours) == files(stock)
    for name in files(stock):
        assert same(read(ours / name), read(stock / name)), f"{name} differs"


def weights(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def state_of(trainer: Any) -> dict[str, Any]:
    """All that must be equal after a resumed training: weights, optimizer, scheduler, random state and losses."""
    log = [
        {key: value for key, value in entry.items() if "runtime" not in key and "per_second" not in key}
        for entry in trainer.state.log_history
        if "train_runtime" not in entry
    ]
    return {
        "weights": weights(trainer),
        "optimizer": trainer.optimizer.state_dict(),
        "scheduler": trainer.lr_scheduler.state_dict(),
        "random": torch.get_rng_state(),
        "log": log,
    }


# -- the files


@pytest.mark.filterwarnings("ignore:.*were not stored:UserWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_every_file_is_the_one_that_trainer_writes(root: Path, tmp_path: Path, kind: str) -> None:
    """Same names, same bytes; what is pickled holds the same. And the training itself is the same."""
    trained = []
    for cls, place in ((Trainer, tmp_path / "stock"), (Async, root)):
        trainer = make(place, kind, cls)
        trainer.train()
        trained.append(state_of(trainer))
    assert same(*trained)
    assert steps(root) == [2, 4]
    for step in steps(root):
        assert_same_files(root / f"checkpoint-{step}", tmp_path / "stock" / f"checkpoint-{step}")


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_save_only_model_leaves_the_training_state_out(root: Path, tmp_path: Path, kind: str) -> None:
    """No optimizer, no scheduler, no random state, as with Trainer."""
    for cls, place in ((Trainer, tmp_path / "stock"), (Async, root)):
        make(place, kind, cls, save_only_model=True).train()
    ours = root / "checkpoint-4"
    assert_same_files(ours, tmp_path / "stock" / "checkpoint-4")
    assert not files(ours) & {"optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state.pth"}


class Collator:
    def __init__(self) -> None:
        self.tokenizer = tokenizer()
        self.tokenizer.add_tokens(["new"])

    def __call__(self, features: Any) -> Any:
        return default_data_collator(features)


@pytest.mark.parametrize("given", [{"processing_class": tokenizer}, {"data_collator": Collator}])
def test_the_tokenizer_is_saved(root: Path, tmp_path: Path, given: dict[str, Callable[[], Any]]) -> None:
    """The processing class, or else the collator's tokenizer with the tokens that were added to it."""
    for cls, place in ((Trainer, tmp_path / "stock"), (Async, root)):
        trainer = make(place, cls=cls, **{key: value() for key, value in given.items()})
        trainer.train()
    assert_same_files(root / "checkpoint-2", tmp_path / "stock" / "checkpoint-2")
    saved = trainer.processing_class or trainer.data_collator.tokenizer
    assert len(AutoTokenizer.from_pretrained(root / "checkpoint-2")) == len(saved)


def test_a_gradient_scaler_is_saved(root: Path, tmp_path: Path) -> None:
    """scaler.pt is there when training has one."""
    for cls, place in ((Trainer, tmp_path / "stock"), (Async, root)):
        trainer = make(place, cls=cls)
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
        trainer.train()
    assert "scaler.pt" in files(root / "checkpoint-4")
    assert_same_files(root / "checkpoint-4", tmp_path / "stock" / "checkpoint-4")


def test_a_sharded_checkpoint_is_read_and_resumed(root: Path) -> None:
    """With a small max_shard_size: index and shards, which from_pretrained and Trainer's own resume understand."""
    whole = make(root)
    whole.async_checkpoint_options = {**THREAD, "max_shard_size": "4KB"}
    whole.train()
    path = root / "checkpoint-2"
    assert "model.safetensors.index.json" in files(path)
    assert "model.safetensors" not in files(path)
    AutoModelForCausalLM.from_pretrained(path)
    resumed = make(root)
    resumed.train(resume_from_checkpoint=str(path))
    assert same(state_of(resumed), state_of(whole))


def test_the_state_is_that_of_the_call(root: Path, tmp_path: Path) -> None:
    """trainer_state.json holds the log up to the save, the callbacks' states, and the best checkpoint even if it is this one."""
    for cls, place in ((Judged, tmp_path / "stock"), (JudgedAsync, root)):
        callbacks = [Remembering("one"), Remembering("two"), EarlyStoppingCallback(3)]
        judged(place, [0.1, 0.3, 0.2], cls, max_steps=6, callbacks=callbacks, load_best_model_at_end=True).train()
    for step in (2, 4, 6):
        ours, stock = (
            json.loads((p / f"checkpoint-{step}/trainer_state.json").read_text()) for p in (root, tmp_path / "stock")
        )
        assert ours.pop("best_model_checkpoint") == str(root / f"checkpoint-{min(step, 4)}")
        assert stock.pop("best_model_checkpoint") == str(tmp_path / f"stock/checkpoint-{min(step, 4)}")
        assert ours == stock
        assert len(ours["log_history"]) == step


class Remembering(TrainerCallback, ExportableState):
    """A stateful callback that counts steps."""

    def __init__(self, name: str = "") -> None:
        self.name = name
        self.steps = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps += 1

    def state(self) -> dict[str, Any]:
        return {"args": {"name": self.name}, "attributes": {"steps": self.steps}}


STATES: list[dict[str, Any]] = [
    {},
    {"log_history": [{"loss": 0.1, "step": 1}]},
    {
        "log_history": [
            {"loss": float("nan"), "step": 1},
            {"text": 'a "quoted"\n  "log_history": [],\n text é', "step": 2},
        ]
    },
    {"log_history": [{"nested": {"list": [1, [2, {}], []], "none": None}, "step": 3}, {}], "trial_params": {"a": [1]}},
    {"stateful_callbacks": {"log_history": []}, "best_metric": float("inf")},
]


def test_the_state_is_rendered_as_trainer_renders_it(tmp_path: Path) -> None:
    """Byte for byte, whatever is in it; entries that were changed afterwards are rendered anew."""
    renderer = trainer_state.Renderer()
    for fields in STATES:
        state = TrainerState(**fields)
        for change in (lambda log: None, lambda log: log.append({"step": 9}), lambda log: log[0].update(more=1)):
            change(state.log_history)
            state.save_to_json(str(tmp_path / "stock.json"))
            assert renderer.render(state) == (tmp_path / "stock.json").read_bytes()


def test_what_was_logged_is_in_the_manifest(root: Path) -> None:
    """`KeepBest("eval_loss")` and `vembed-ckpt ls` see the numbers of the step, and of no other."""
    make(root, eval_dataset=Tokens(4), eval_strategy="steps", eval_steps=2, save_steps=1).train()
    metrics = [manifests.read(str(root / f"checkpoint-{step}")).metrics for step in (1, 2, 3, 4)]
    assert all({"loss", "learning_rate", "epoch"} <= numbers.keys() for numbers in metrics)
    assert ["eval_loss" in numbers for numbers in metrics] == [False, True, False, True]


# -- resuming


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("scheduler", ["linear", "cosine"])
@pytest.mark.parametrize("optimizer", ["adamw_torch", "adamw_torch_fused", "sgd", "adafactor"])
def test_a_resumed_training_is_the_uninterrupted_one(root: Path, optimizer: str, scheduler: str, kind: str) -> None:
    """Weights, optimizer, scheduler, random state and losses are equal to the last bit."""
    given = {"optim": optimizer, "lr_scheduler_type": scheduler, "max_steps": 6, "save_steps": 3}
    whole = make(root, kind, **given)
    whole.train()
    expected = state_of(whole)
    shutil.rmtree(root / "checkpoint-6")
    resumed = make(root, kind, **given)
    resumed.train(resume_from_checkpoint=True)
    assert resumed._initial_global_step == 3
    assert same(state_of(resumed), expected)


@pytest.mark.parametrize(
    ("kind", "given", "step"),
    [
        ("plain", {}, 2),
        ("foreign", {}, 4),
        ("tied", {}, 6),
        ("frozen", {}, 4),
        ("two adapters", {}, 4),
        ("full", {"gradient_accumulation_steps": 2, "max_steps": 8}, 2),
        ("full", {"max_steps": 14}, 10),  # in the second epoch
        ("full", {"max_steps": 14}, 8),  # between two epochs
        ("full", {"save_strategy": "epoch", "max_steps": -1, "num_train_epochs": 3}, 8),
        ("full", {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_steps": 1}, 4),
        ("full", {"max_grad_norm": 0.1, "warmup_steps": 3, "lr_scheduler_type": "cosine_with_restarts"}, 2),
    ],
)
def test_it_goes_on_from_any_checkpoint(root: Path, kind: str, given: dict[str, Any], step: int) -> None:
    """By path; whatever the model, within an epoch, after it, in the middle of accumulated gradients."""
    given = {"max_steps": 8, **given}
    if "eval_strategy" in given:
        given["eval_dataset"] = Tokens(4)
    whole = make(root, kind, **given)
    whole.train()
    resumed = make(root, kind, **given)
    resumed.train(resume_from_checkpoint=str(root / f"checkpoint-{step}"))
    assert resumed._initial_global_step == step
    assert same(state_of(resumed), state_of(whole))


def test_stock_trainer_resumes_from_ours_and_we_from_its(root: Path) -> None:
    """Switching to the mixin and back in the middle of a training changes nothing."""
    whole = make(root, max_steps=6)
    whole.train()
    expected = state_of(whole)
    shutil.rmtree(root)
    make(root, cls=Trainer, max_steps=6).train()
    for path in ("checkpoint-4", "checkpoint-6"):
        shutil.rmtree(root / path)
    for cls, start in ((Async, 2), (Trainer, 4)):
        trainer = make(root, cls=cls, max_steps=6)
        trainer.train(resume_from_checkpoint=True)
        assert trainer._initial_global_step == start
        assert same(state_of(trainer), expected)
        shutil.rmtree(root / "checkpoint-6")


def test_the_writer_of_a_dead_training_is_waited_for(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before Trainer looks for what there is to resume from; wherever the given path lies, and without saves of its own."""
    make(root).train()
    waited: list[str] = []
    monkeypatch.setattr("vembed_async_ckpt.integrations.transformers.wait_for_orphan", waited.append)
    monkeypatch.setattr(Trainer, "train", lambda self, *args: waited.append("train"))
    make(root / "other", save_strategy="no").train(resume_from_checkpoint=str(root / "checkpoint-2"))
    make(root, save_strategy="no").train(resume_from_checkpoint=True)
    make(root, save_strategy="no").train()
    assert waited == [str(root), "train", str(root), "train", "train"]


def test_the_order_of_the_data_is_kept(root: Path) -> None:
    """A resumed epoch sees the batches that were still to come, no others."""
    seen: list[Any] = []

    class Listening(Async):
        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            seen.append(inputs["input_ids"].clone())
            return super().training_step(model, inputs, *args, **kwargs)

    make(root, cls=Listening, max_steps=12).train()
    whole, seen[:] = list(seen), []
    make(root, cls=Listening, max_steps=12).train(resume_from_checkpoint=str(root / "checkpoint-10"))
    assert same(seen, whole[10:])


def test_nothing_to_resume_from(root: Path) -> None:
    """Trainer's own errors for a path that holds nothing and for an empty directory; False begins anew."""
    with pytest.raises(ValueError, match="Can't find a valid checkpoint"):
        make(root).train(resume_from_checkpoint=str(root / "checkpoint-bogus"))
    with pytest.raises(ValueError, match="No valid checkpoint found"):
        make(root).train(resume_from_checkpoint=True)
    trainer = make(root)
    trainer.train(resume_from_checkpoint=False)
    assert trainer.state.global_step == 4


def test_another_batch_size_may_be_resumed_with(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The new arguments hold, and Trainer compares them with those that were saved."""
    make(root).train()
    trainer = make(root, per_device_train_batch_size=4, save_steps=3)
    logging.getLogger("transformers").addHandler(caplog.handler)
    try:
        trainer.train(resume_from_checkpoint=str(root / "checkpoint-2"))
    finally:
        logging.getLogger("transformers").removeHandler(caplog.handler)
    assert trainer._train_batch_size == 4
    assert "save_steps: 3 (from args) != 2 (from trainer_state.json)" in caplog.text
    assert "per_device_train_batch_size: 4 (from args) != 2 (from trainer_state.json)" in caplog.text


def test_a_smaller_batch_size_is_found_and_resumed(root: Path) -> None:
    """With auto_find_batch_size a step that runs out of memory begins anew, while a save is under way, and ends well."""

    class OutOfMemory(TrainerCallback):
        left = 1

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 3 and self.left:
                self.left -= 1
                raise RuntimeError("CUDA out of memory.")

    trainer = make(root, auto_find_batch_size=True, per_device_train_batch_size=8, callbacks=[OutOfMemory()])
    trainer.train()
    found = trainer._train_batch_size
    assert found < 8
    assert steps(root) == [2, 4]
    trainer = make(root, auto_find_batch_size=True, per_device_train_batch_size=8)
    trainer.train(resume_from_checkpoint=True)
    assert trainer._train_batch_size == found


def test_the_states_of_callbacks_come_back(root: Path) -> None:
    """With restore_callback_states_from_checkpoint, EarlyStoppingCallback has its patience again."""
    given = {"load_best_model_at_end": True, "max_steps": 2}
    judged(root, [0.5], callbacks=[EarlyStoppingCallback(5, 0.2)], **given).train()
    trainer = judged(
        root, [0.5], callbacks=[EarlyStoppingCallback()], restore_callback_states_from_checkpoint=True, **given
    )
    trainer.train(resume_from_checkpoint=str(root / "checkpoint-2"))
    (restored,) = (c for c in trainer.callback_handler.callbacks if isinstance(c, EarlyStoppingCallback))
    assert (restored.early_stopping_patience, restored.early_stopping_threshold) == (5, 0.2)


class MyTrainer(AsyncCheckpointMixin, Trainer):
    """As in the README; with a writer process."""


def train_and_die(root: Path, staged: bool) -> None:
    """Be killed at step 5: as soon as the save of step 4 is staged, or before that perhaps."""
    trainer = make(root, cls=MyTrainer, max_steps=8)

    class Death(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 4:
                if staged:
                    trainer._async_run.pending[-1].handle.wait_staged(60)
                os.kill(os.getpid(), signal.SIGKILL)

    trainer.add_callback(Death())
    trainer.train()


def die_twice(roots: Sequence[str]) -> None:
    """In a process of its own, which has no threads yet: one child for each root."""
    torch.set_num_threads(1)
    for root, staged in zip(roots, (True, False), strict=True):
        child = os.fork()
        if not child:
            train_and_die(Path(root), staged)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def test_end_to_end_a_killed_training_goes_on_as_if_nothing_had_happened(root: Path, tmp_path: Path) -> None:
    """kill -9 right after a save, then `train(resume_from_checkpoint=True)`: the weights are those of a training never killed.

    What was staged is not lost: the writer outlives the training, and resuming waits for it.
    """
    at_once = tmp_path / "killed at once"
    code = f"import sys; sys.path.insert(0, {os.path.dirname(__file__)!r})\n"
    code += f"import {Path(__file__).stem}; {Path(__file__).stem}.die_twice(sys.argv[1:])"
    ran = subprocess.run([sys.executable, "-c", code, root, at_once], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    whole = make(tmp_path / "whole", cls=Trainer, max_steps=8)
    whole.train()
    for place, begins in ((root, {4}), (at_once, {2, 4})):
        trainer = make(place, cls=MyTrainer, max_steps=8)
        trainer.train(resume_from_checkpoint=True)
        assert trainer._initial_global_step in begins
        assert same(state_of(trainer), state_of(whole))
        assert steps(place) == [2, 4, 6, 8]


# -- the end of a training, and saves outside of it


def test_train_returns_when_everything_is_on_disk(root: Path) -> None:
    """No save is pending, the directory is free for others, and the trainer can train again."""
    trainer = make(root, cls=MyTrainer)
    trainer.train()
    for step in (2, 4):
        verify(root / f"checkpoint-{step}")
    AsyncCheckpointer(root, writer="thread").close()
    trainer.args.max_steps = 6
    trainer.train(resume_from_checkpoint=True)
    assert steps(root) == [2, 4, 6]


def test_an_exception_loses_no_checkpoint(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was called before it is completed; the exception itself comes out."""

    class Fails(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                raise KeyError("of the user")

    gate, close = Gate(), AsyncCheckpointer.close
    monkeypatch.setattr(AsyncCheckpointer, "close", lambda self: (gate.open.set(), close(self)))
    trainer = make(root, callbacks=[Fails()])
    with use_filesystem(gate), pytest.raises(KeyError, match="of the user"):
        trainer.train()
    verify(root / "checkpoint-2")
    assert trainer._async_run is None


def test_a_save_outside_of_train_is_durable_when_it_returns(root: Path) -> None:
    """`_save_checkpoint` called by a script: nothing stays open behind it, and no other checkpoint goes."""
    trainer = make(root, save_total_limit=1)
    trainer.train()
    trainer.state.global_step = 9
    trainer.state.best_model_checkpoint = str(root / "checkpoint-4")
    trainer._save_checkpoint(trainer.model, trial=None)
    assert steps(root) == [4, 9]
    verify(root / "checkpoint-9")
    AsyncCheckpointer(root, writer="thread").close()


def test_trainer_ships_and_its_rotation_waits(root: Path, tmp_path: Path) -> None:
    """`save_total_limit` deletes nothing before it has arrived; what is there is whole."""
    trainer = make(root, max_steps=6, save_total_limit=1)
    url = (tmp_path / "folder").as_uri()
    trainer.async_checkpoint_options = {**THREAD, "after_commit": [upload(url)]}
    trainer.train()
    assert [entry.step for entry in checkpoints(url)] == [6, 4, 2]
    assert all(verify(entry.path).step == entry.step for entry in checkpoints(url))
    assert steps(root)[-1] == 6


def test_no_saves_no_directory(root: Path) -> None:
    """With save_strategy="no" nothing of ours is made, unless a callback asks for a save all the same."""
    make(root, save_strategy="no").train()
    assert os.listdir(root) == []

    class Asks(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_save = state.global_step == 3

    recorder = Recorder(root)
    make(root, save_strategy="no", callbacks=[Asks(), recorder]).train()
    assert (steps(root), recorder.saves) == ([3], [3])


def test_save_model_at_the_end_is_trainers_own(root: Path) -> None:
    """`save_model(output_dir)` writes at once, beside the checkpoints."""
    trainer = make(root)
    trainer.train()
    trainer.save_model()
    assert (root / "model.safetensors").read_bytes() == (root / "checkpoint-4/model.safetensors").read_bytes()


# -- on_save


def test_on_save_comes_at_the_first_step_after_the_commit(root: Path) -> None:
    """Training goes on meanwhile; the callback then finds a whole checkpoint and the state as it was at the save."""
    gate, recorder = Gate(), Recorder(root)

    class Opens(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 4:
                assert not (root / "checkpoint-2").exists()
                gate.open.set()
                assert trainer._async_run.pending[0].handle.exception(60) is None

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                assert trainer.state is state
                assert len(state.log_history) == 2
                assert not control.should_save

    trainer = make(root, max_steps=6, save_steps=2, callbacks=[recorder, Opens()])
    trainer.async_checkpoint_options = {**THREAD, "max_in_flight": 2}
    with use_filesystem(gate):
        trainer.train()
    assert recorder.events[:5] == [("step", 1), ("step", 2), ("step", 3), ("step", 4), ("save", 2)]
    assert recorder.saves == [2, 4, 6]
    assert recorder.events[-1] == ("end", 6)
    assert trainer.state.global_step == 6


def test_on_save_is_not_missed_at_the_end(root: Path) -> None:
    """Saves that are committed after the last step are announced before on_train_end."""
    recorder = Recorder(root)

    class DeferredCopy(Async):
        def _ended_everywhere(self, run: Any) -> int:
            return 0

    make(root, cls=DeferredCopy, max_steps=6, save_total_limit=1, callbacks=[recorder]).train()
    assert recorder.events[-4:] == [("save", 2), ("save", 4), ("save", 6), ("end", 6)]
    assert steps(root) == [6], "on_save found all three, then two of them went"


def test_what_on_save_asks_for_is_done(root: Path) -> None:
    """control.should_training_stop from on_save ends the training."""

    class Stops(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 3:
                trainer._async_run.checkpointer.wait()

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = True

    trainer = make(root, max_steps=8, callbacks=[Stops()])
    trainer.train()
    assert trainer.state.global_step <= 3
    assert steps(root) == [2]


def test_a_step_that_announces_a_save_keeps_its_own(root: Path) -> None:
    """on_save resets control.should_save, of the step that was saved and not of the one at hand."""

    class Waits(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            wanted = control.should_save
            trainer.wait_for_checkpoints()
            assert control.should_save == wanted

    recorder = Recorder(root)
    trainer = make(root, save_steps=1, callbacks=[Waits(), recorder])
    trainer.train()
    assert steps(root) == [1, 2, 3, 4]
    assert recorder.saves == [1, 2, 3, 4]


@pytest.mark.parametrize("on_error", ["raise", "warn"])
def test_a_save_that_fails_is_not_announced(root: Path, caplog: pytest.LogCaptureFixture, on_error: str) -> None:
    """It is raised by the next save, or logged while training goes on."""
    root.mkdir()
    (root / "checkpoint-4").write_text("in the way")

    class Waits(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            trainer._async_run.checkpointer.wait()  # so that the failure is known to the next save

    recorder = Recorder(root)
    trainer = make(root, max_steps=6, callbacks=[recorder, Waits()])
    trainer.async_checkpoint_options = {**THREAD, "on_error": on_error}
    if on_error == "raise":
        with pytest.raises(CheckpointError, match="checkpoint-4"):
            trainer.train()
    else:
        trainer.train()
        assert "checkpoint-4" in caplog.text
    assert recorder.saves == [2] if on_error == "raise" else [2, 6]
    assert steps(root) == recorder.saves


def test_a_failure_of_the_last_save_is_raised_by_train(root: Path) -> None:
    """There is no next save to raise it; on_train_end has been called by then."""
    root.mkdir()
    (root / "checkpoint-4").write_text("in the way")
    recorder = Recorder(root)
    with pytest.raises(CheckpointError, match="checkpoint-4"):
        make(root, callbacks=[recorder]).train()
    assert recorder.saves == [2]
    assert recorder.events[-1] == ("end", 4)


def test_a_skipped_save_is_not_announced(root: Path) -> None:
    """With when_busy="skip" a step whose save found no arena free is as if it had not been asked for."""
    gate, recorder = Gate(), Recorder(root)

    class Opens(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 5:
                gate.open.set()
                trainer._async_run.checkpointer.wait()

    trainer = make(root, max_steps=6, callbacks=[recorder, Opens()])
    trainer.async_checkpoint_options = {**THREAD, "when_busy": "skip"}
    with use_filesystem(gate):
        trainer.train()
    assert steps(root) == recorder.saves == [2, 6]


# -- the best checkpoint


@pytest.mark.parametrize("limit", [None, 1, 2])
@pytest.mark.parametrize("verdicts", [(0.1, 0.2, 0.3, 0.4), (0.9, 0.1, 0.2, 0.3), (0.1, 0.9, 0.2, 0.9)])
def test_the_best_checkpoint_is_trainers_choice(
    root: Path, tmp_path: Path, verdicts: Sequence[float], limit: int | None
) -> None:
    """Same best metric, step and directory, same checkpoints left, and the best model loaded at the end."""
    seen = []
    for cls, place in ((Judged, tmp_path / "stock"), (JudgedAsync, root)):
        trainer = judged(place, verdicts, cls, max_steps=8, load_best_model_at_end=True, save_total_limit=limit)
        trainer.train()
        state = trainer.state
        best = Path(state.best_model_checkpoint)
        seen.append((steps(place), state.best_metric, state.best_global_step, best.name, weights(trainer)))
        loaded = AutoModelForCausalLM.from_pretrained(best).state_dict()
        assert same(loaded, weights(trainer))
    assert same(*seen)


@pytest.mark.parametrize(
    ("given", "verdicts"),
    [
        ({"save_strategy": "best"}, (0.1, 0.3, 0.2, 0.4)),
        ({"save_strategy": "best", "save_total_limit": 1}, (0.1, 0.3, 0.2, 0.4)),
        ({"save_strategy": "best", "load_best_model_at_end": True}, (0.5, 0.3, 0.2, 0.1)),
        (
            {"save_strategy": "epoch", "eval_strategy": "epoch", "max_steps": 24, "load_best_model_at_end": True},
            (0.1, 0.3, 0.2),
        ),
        ({"save_steps": 1, "eval_strategy": "epoch", "max_steps": 18, "save_total_limit": 1}, (0.9, 0.3, 0.2)),
        ({"save_steps": 2, "eval_steps": 3, "max_steps": 9}, (0.9, 0.8, 0.7)),
        ({"save_steps": 4, "eval_steps": 2, "max_steps": 8}, (0.1, 0.8, 0.9, 0.7)),
        ({"save_steps": 1, "eval_steps": 1, "max_steps": 3, "save_total_limit": 1}, (0.9, 0.8, 0.7)),
        ({"save_steps": 1, "eval_strategy": "no", "save_total_limit": 1}, ()),
    ],
)
def test_every_strategy_has_trainers_outcome(
    root: Path, tmp_path: Path, given: dict[str, Any], verdicts: Sequence[float]
) -> None:
    """Saves and evaluations at the same steps, at others, each epoch, at each new best: all as with stock Trainer."""
    seen = []
    for cls, place in ((Judged, tmp_path / "stock"), (JudgedAsync, root)):
        trainer = judged(place, verdicts, cls, **{"max_steps": 8, **given})
        trainer.train()
        state = trainer.state
        best = None if state.best_model_checkpoint is None else Path(state.best_model_checkpoint).name
        seen.append((steps(place), state.best_metric, state.best_global_step, best, weights(trainer)))
    assert same(*seen)


def test_a_real_evaluation_chooses_the_best(root: Path, tmp_path: Path) -> None:
    """eval_loss of a real evaluation, lower is better, plain modules too: as with stock Trainer."""
    given = {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "load_best_model_at_end": True,
        "max_steps": 6,
        "learning_rate": 0.5,
    }
    seen = []
    for cls, place in ((Trainer, tmp_path / "stock"), (Async, root)):
        trainer = make(place, "plain", cls, eval_dataset=Tokens(4), **given)
        trainer.train()
        seen.append((Path(trainer.state.best_model_checkpoint).name, trainer.state.best_metric, weights(trainer)))
    assert same(*seen)


def test_the_best_model_is_waited_for(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The best checkpoint is the last one, and not published before Trainer wants to load it."""
    gate = Gate()
    wait = AsyncCheckpointer.wait

    def open_and_wait(self: AsyncCheckpointer, timeout: float | None = None) -> None:
        gate.open.set()
        wait(self, timeout)

    monkeypatch.setattr(AsyncCheckpointer, "wait", open_and_wait)
    trainer = judged(root, [0.5], max_steps=2, load_best_model_at_end=True)
    loaded: list[str] = []
    load = Trainer._load_best_model
    monkeypatch.setattr(Trainer, "_load_best_model", lambda self: (loaded.extend(os.listdir(root)), load(self)))
    with use_filesystem(gate):
        trainer.train()
    assert "checkpoint-2" in loaded


def test_a_failed_save_is_nobodys_best(root: Path) -> None:
    """The best evaluation was at a step whose save failed: the best checkpoint is the one before it, and it is kept."""
    root.mkdir()
    (root / "checkpoint-4").write_text("in the way")
    trainer = judged(root, [0.5, 0.9, 0.1, 0.2], max_steps=8, load_best_model_at_end=True, save_total_limit=1)
    trainer.async_checkpoint_options = {**THREAD, "on_error": "warn"}
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(root / "checkpoint-2")
    assert same(weights(trainer), AutoModelForCausalLM.from_pretrained(root / "checkpoint-2").state_dict())
    assert steps(root) == [2]


# -- rotation


def test_the_newest_are_kept_by_the_order_of_saving(root: Path) -> None:
    """After going back to an earlier step, what was saved before that is older, whatever its number."""
    make(root, max_steps=8).train()
    make(root, save_total_limit=1).train(resume_from_checkpoint=str(root / "checkpoint-2"))
    assert steps(root) == [4]


def test_only_checkpoints_are_counted_and_deleted(root: Path) -> None:
    """Copies somebody made, directories of other names, a file: neither counted nor deleted, even at the end with a limit of 1."""
    steps_said = {
        "checkpoint-2-backup": 2,  # as Trainer wrote it, and somebody kept it
        "checkpoint-007": 7,
        "checkpoint-3.tmp": 3,
        "checkpoint-1": 5,  # of another step than it says
        "checkpoint-old": 1,
    }
    for name, step in steps_said.items():
        (root / name).mkdir(parents=True)
        (root / name / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    (root / "checkpoint-8").mkdir()
    (root / "checkpoint-5").write_text("a file")

    class Copies(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 4:
                shutil.copytree(root / "checkpoint-4", root / "checkpoint-4 copy")

    trainer = judged(
        root, [0.9, 0.1, 0.1], max_steps=6, save_total_limit=1, load_best_model_at_end=True, callbacks=[Copies()]
    )
    trainer.train()
    left = {path.name for path in root.glob("checkpoint-*")}
    assert left == {*steps_said, "checkpoint-8", "checkpoint-5", "checkpoint-4 copy", "checkpoint-2"}
    assert trainer.args.save_total_limit == 1


def test_checkpoints_of_stock_trainer_are_counted(root: Path) -> None:
    """Those from before the switch are the oldest, and go when save_total_limit says so."""
    make(root, cls=Trainer, max_steps=6).train()
    assert steps(root) == [2, 4, 6]
    make(root, max_steps=8, save_total_limit=2).train(resume_from_checkpoint=True)
    assert steps(root) == [6, 8]
    assert not (root / "checkpoint-6" / names.MANIFEST).exists()
    make(root, max_steps=12, save_total_limit=2).train(resume_from_checkpoint=True)
    assert steps(root) == [10, 12]


def test_a_best_checkpoint_of_stock_trainer_is_kept(root: Path) -> None:
    """best_model_checkpoint of the training that is resumed stays."""
    judged(root, [0.9, 0.1], Judged, max_steps=4).train()
    judged(root, [0.2, 0.3], max_steps=8, save_total_limit=1, load_best_model_at_end=True).train(
        resume_from_checkpoint=True
    )
    assert 2 in steps(root)


def test_foreign_files_in_a_checkpoint_are_kept(root: Path) -> None:
    """A note put into a checkpoint of ours survives its deletion."""

    class Notes(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                (root / "checkpoint-2" / "note.txt").write_text("mine")

    make(root, save_total_limit=1, callbacks=[Notes()]).train()
    assert steps(root) == [4]
    replaced = root / names.WORK / names.REPLACED
    (note,) = replaced.rglob("note.txt")
    assert note.read_text() == "mine"
    shutil.rmtree(replaced)


def test_a_deletion_that_fails_stops_nobody(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It is logged, training goes on, and the next one takes it up again."""

    class Stuck(LocalFilesystem):
        stuck = 1

        def rename(self, source: str, target: str, mode: RenameMode) -> None:
            if "trash-" in target and self.stuck:
                self.stuck -= 1
                raise OSError(5, "stuck")
            super().rename(source, target, mode)

    with use_filesystem(Stuck()):
        make(root, max_steps=8, save_total_limit=1).train()
    assert "could not be deleted" in caplog.text
    assert steps(root) == [8]


@pytest.mark.parametrize(
    ("policy", "verdicts", "left"),
    [
        (KeepLast(1) | KeepEvery(4), [0.1, 0.2, 0.2, 0.2, 0.9], [4, 8, 10]),
        (KeepLast(2), [0.1, 0.2, 0.9, 0.3, 0.4], [6, 8, 10]),
        (KeepBest("loss") | KeepLast(1), [0.9, 0.2, 0.1, 0.3, 0.4], None),
    ],
)
def test_a_policy_of_ours_may_decide(
    root: Path, policy: Any, verdicts: Sequence[float], left: list[int] | None
) -> None:
    """`retention` among the options; the best checkpoint stays all the same."""
    trainer = judged(root, verdicts, max_steps=10)
    trainer.async_checkpoint_options = {**THREAD, "retention": policy}
    trainer.train()
    if left is None:
        losses = {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}
        left = sorted({2, min((2, 4, 6, 8, 10), key=losses.__getitem__), 10})
    assert steps(root) == left


def test_a_metric_that_no_checkpoint_has_deletes_nothing(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It is said once, with the metrics that there are."""
    trainer = make(root, max_steps=6)
    trainer.async_checkpoint_options = {**THREAD, "retention": KeepBest("nope")}
    trainer.train()
    assert steps(root) == [2, 4, 6]
    assert caplog.text.count("no checkpoint has the metric 'nope'") == 1


def test_nothing_is_deleted_while_a_save_begins(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the directory of the same name that is being replaced could be the one that goes."""
    idle = []
    save_as = AsyncCheckpointer.save_as

    def watched(self: AsyncCheckpointer, *args: Any) -> SaveHandle:
        idle.append(trainer._async_run.rotation._thread is None)
        return save_as(self, *args)

    monkeypatch.setattr(AsyncCheckpointer, "save_as", watched)
    trainer = make(root, save_steps=1, save_total_limit=1)
    trainer.train()
    assert idle == [True] * 4


def test_two_rules_are_refused(root: Path) -> None:
    """save_total_limit and a policy at once: an error at the start, not after hours. An unknown option, too."""
    trainer = make(root, save_total_limit=1)
    trainer.async_checkpoint_options = {**THREAD, "retention": KeepLast(1)}
    with pytest.raises(ValueError, match="save_total_limit"):
        trainer.train()
    trainer.async_checkpoint_options = {"writers": "thread"}
    with pytest.raises(TypeError, match="writers"):
        trainer.train()


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"retention": 3}, TypeError, "retention is 3"),
        ({"retentions": None}, TypeError, "'retentions' is no option; there are retention, when_busy"),
        ({"root": "elsewhere"}, TypeError, "'root' is no option"),
        ({"when_busy": "never"}, ValueError, "when_busy is 'never'"),
        ({"max_in_flight": 0}, ValueError, "max_in_flight is 0"),
        (3, TypeError, "async_checkpoint_options is 3"),
    ],
)
def test_options_are_checked_when_they_are_given(root: Path, options: Any, kind: type[Exception], message: str) -> None:
    """Of the class when a trainer is made, of the trainer when its training begins; not when the first checkpoint is due."""

    class Wrong(Async):
        async_checkpoint_options = options

    with pytest.raises(kind, match=message):
        make(root, cls=Wrong)
    trainer = make(root)
    trainer.async_checkpoint_options = options
    with pytest.raises(kind, match=message):
        trainer.train()
    assert not root.exists() or os.listdir(root) == []


@pytest.mark.parametrize("when", ["before", "during", "after"])
def test_a_trainer_can_be_copied(root: Path, when: str) -> None:
    """As stock Trainer can, in the middle of a training too; the copy trains and saves on its own."""
    copies: list[Any] = []

    class Copying(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if when == "during" and state.global_step == 2:
                copies.append(copy.deepcopy(trainer))

    trainer = make(root, save_steps=1, callbacks=[Copying()])
    trainer.async_checkpoint_options = THREAD
    if when == "before":
        copies.append(copy.deepcopy(trainer))
    trainer.train()
    if when == "after":
        copies.append(copy.deepcopy(trainer))
    (other,) = copies
    when = "done"
    other.args.output_dir = str(root / "of the copy")
    other.train()
    assert state_of(trainer)
    assert (root / "of the copy" / "checkpoint-4" / "vembed_manifest.json").exists()


@pytest.mark.parametrize("by", ["callback", "signal"])
def test_a_save_during_on_save_is_of_the_present(root: Path, monkeypatch: pytest.MonkeyPatch, by: str) -> None:
    """`on_save` is shown the state of the step that was saved, which is past; what is saved meanwhile is the training's own, and
    durable when the call returns."""

    def at_step_three(self: Any, run: Any) -> int:
        if self.state.global_step < 3:
            return 0
        run.checkpointer.wait()
        return len(run.pending)

    shown: list[int] = []
    saved: list[Any] = []

    def save(*_: Any) -> None:
        trainer._save_checkpoint(trainer.model, None)
        state = json.loads((root / "checkpoint-3" / "trainer_state.json").read_text())
        weights = load_file(root / "checkpoint-3" / "model.safetensors")
        live = trainer.model.state_dict()
        saved.append((state["global_step"], all(torch.equal(weights[name], live[name]) for name in weights)))

    class Saving(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            shown.append(state.global_step)
            if len(shown) == 1:
                if by == "signal":
                    signal.raise_signal(signal.SIGUSR1)
                else:
                    save()
                shown.append(trainer.state.global_step)

    monkeypatch.setattr(AsyncCheckpointMixin, "_ended_everywhere", at_step_three)
    trainer = make(root, save_steps=2, max_steps=4, callbacks=[Saving()])
    before = signal.signal(signal.SIGUSR1, save)
    try:
        trainer.train()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert saved == [(3, True)]
    assert shown == [2, 2, 4]
    assert sorted(os.listdir(root))[-3:] == ["checkpoint-2", "checkpoint-3", "checkpoint-4"]
    assert trainer.state.global_step == 4


def test_nothing_of_ours_is_left_when_the_training_is_over(root: Path) -> None:
    """Whoever lists the output directory, as transformers' own tests do, finds checkpoints only."""
    trainer = make(root, save_steps=1, save_total_limit=2)
    trainer.train()
    assert sorted(os.listdir(root)) == ["checkpoint-3", "checkpoint-4"]
    trainer.train(resume_from_checkpoint=True)  # which takes one step more
    assert sorted(os.listdir(root)) == ["checkpoint-4", "checkpoint-5"]


# -- just-in-time checkpoints


def test_a_jit_checkpoint_is_durable_before_training_stops(root: Path) -> None:
    """On SIGTERM Trainer saves and stops: when its save returns it is on disk, and nothing partial was ever visible."""
    whole = make(root, max_steps=6)
    whole.train()
    expected = state_of(whole)
    shutil.rmtree(root)
    visible: list[bool] = []

    class Watching(LocalFilesystem):
        def rename(self, source: str, target: str, mode: RenameMode) -> None:
            visible.append(os.path.lexists(target))
            super().rename(source, target, mode)

    class Terminated(TrainerCallback):
        """Comes after Trainer's own callback in the list."""

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 3:
                jit._sigterm_handler(signal.SIGTERM, None)
                for timer in (thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)):
                    timer.join(60)

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 3:
                verify(root / "checkpoint-3")
                assert not (root / "checkpoint-3" / "checkpoint-is-incomplete.txt").exists()

    trainer = make(root, max_steps=6, save_steps=5, enable_jit_checkpoint=True, callbacks=[Terminated()])
    (jit,) = (c.jit_manager for c in trainer.callback_handler.callbacks if hasattr(c, "jit_manager"))
    jit.kill_wait = 0.0
    with use_filesystem(Watching()):
        trainer.train()
    assert trainer.state.global_step == 4
    assert visible == [False], "checkpoint-3 appeared whole"
    resumed = make(root, max_steps=6)
    resumed.train(resume_from_checkpoint=True)
    assert resumed._initial_global_step == 3
    assert same(state_of(resumed), expected)


def test_a_jit_checkpoint_that_fails_is_raised_at_once(root: Path) -> None:
    """The caller is about to stop the process: it must know."""
    trainer = make(root)
    trainer.train()
    trainer.state.global_step = 5
    (root / "checkpoint-5").write_text("in the way")
    with pytest.raises(CheckpointError, match="checkpoint-5"):
        trainer._save_checkpoint(trainer.model, trial=None)


# -- the hub


class Hub:
    """Stands for the hub: notes what was uploaded, and whether it was whole; uploads end when the test lets them."""

    def __init__(self) -> None:
        self.uploads: list[tuple[str, str]] = []
        self.jobs: list[Future[None]] = []

    def create_repo(self, *args: Any, **kwargs: Any) -> Any:
        return type("Url", (), {"repo_id": "me/model"})()

    def upload_folder(self, *, folder_path: str, commit_message: str, **kwargs: Any) -> Any:
        if "checkpoint-" in os.path.basename(folder_path):
            verify(folder_path)
        else:
            assert (Path(folder_path) / "model.safetensors").exists()
        self.uploads.append((os.path.basename(folder_path), commit_message))
        self.jobs.append(Future())
        return self.jobs[-1]


def test_pushes_follow_the_commit(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is uploaded is whole, says its own step, and is not deleted while the upload runs."""
    hub, recorder = Hub(), Recorder(root)
    monkeypatch.setattr("transformers.trainer.hf_api", lambda: hub)

    class Uploaded(TrainerCallback):
        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            trainer._async_run.rotation.join()
            assert steps(root) == [2, 4, 6], "all of them are still being uploaded"
            for job in hub.jobs:
                job.set_result(None)

    given = {"push_to_hub": True, "hub_strategy": "all_checkpoints", "hub_always_push": True, "hub_token": "hf_x"}
    trainer = make(root, max_steps=6, save_total_limit=1, callbacks=[recorder, Uploaded()], **given)
    trainer.train()
    expected = []
    for step in (2, 4, 6):
        message = f"Training in progress, step {step}"
        expected += [(root.name, message), (f"checkpoint-{step}", message + ", checkpoint")]
    assert hub.uploads == expected
    assert recorder.saves == [2, 4, 6]
    assert steps(root) == [6]


def test_push_to_hub_waits_for_pending_saves(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Called by a callback in the middle of a training."""
    monkeypatch.setattr(Trainer, "push_to_hub", lambda self: seen.append(steps(root)))
    seen: list[list[int]] = []

    class Pushes(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                trainer.push_to_hub()

    trainer = make(root, callbacks=[Pushes()])
    trainer.train()
    assert seen == [[2]]


# -- where Trainer saves by itself


class OwnModel(Async):
    def save_model(self, *args: Any, **kwargs: Any) -> None:
        super().save_model(*args, **kwargs)


class OwnCheckpoint(Trainer):
    saved: int

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.saved = self.state.global_step
        super()._save_checkpoint(model, trial)


class First(AsyncCheckpointMixin, OwnCheckpoint):
    async_checkpoint_options = THREAD


class Last(OwnCheckpoint, AsyncCheckpointMixin):
    async_checkpoint_options = THREAD


class Odd(torch.optim.SGD):
    """Its state cannot be saved without pickling."""

    def state_dict(self) -> Any:
        return {**super().state_dict(), "odd": print}


def with_odd_optimizer(trainer: Any) -> None:
    trainer.optimizer = Odd(trainer.model.parameters(), lr=0.1)


def in_a_search(trainer: Any) -> None:
    trainer.hp_search_backend = "optuna"


@pytest.mark.parametrize(
    ("cls", "spoil", "reason"),
    [
        (OwnModel, None, "OwnModel.save_model is not Trainer's"),
        (First, None, "name AsyncCheckpointMixin after it"),
        (Async, with_odd_optimizer, "odd"),
        (Async, in_a_search, "hyperparameter search"),
    ],
)
def test_what_cannot_be_saved_in_the_background_is_saved_all_the_same(
    root: Path, caplog: pytest.LogCaptureFixture, reasons: list[str], cls: Any, spoil: Any, reason: str
) -> None:
    """By Trainer itself, after one warning that says why; on_save and rotation are then Trainer's."""
    announced = []

    class Announced(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            announced.append(state.global_step)
            assert "optimizer.pt" in files(root / f"checkpoint-{state.global_step}")

    trainer = make(root, cls=cls, max_steps=6, save_total_limit=2, callbacks=[Announced()])
    if spoil is not None:
        spoil(trainer)
    trainer.train()
    assert announced == [2, 4, 6]
    assert steps(root) == [4, 6]
    assert not (root / "checkpoint-6" / names.MANIFEST).exists()
    assert reason in reasons.pop()
    assert caplog.text.count("Trainer saves checkpoints by itself") == 1


def test_what_goes_wrong_later_is_no_reason_to_lose_a_save(root: Path, reasons: list[str]) -> None:
    """The state becomes unsaveable in the middle: earlier saves are announced first, in order, then Trainer goes on alone."""

    class Spoils(Recorder):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            super().on_step_end(args, state, control)
            if state.global_step == 3:
                trainer.lr_scheduler.odd = print

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.events.append(("save", state.global_step))

    recorder = Spoils(root)
    trainer = make(root, max_steps=6, callbacks=[recorder])
    trainer.train()
    assert recorder.saves == steps(root) == [2, 4, 6]
    assert [(root / f"checkpoint-{step}" / names.MANIFEST).exists() for step in (2, 4, 6)] == [True, False, False]
    assert "odd" in reasons.pop()


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda t: setattr(t, "is_deepspeed_enabled", True), "sharded"),
        (lambda t: setattr(t.accelerator.state, "distributed_type", DistributedType.FSDP), "without use_orig_params"),
        (lambda t: setattr(t, "is_distributed_loading_by_transformers", True), "sharded at load time"),
        (lambda t: setattr(t.accelerator.state, "parallelism_config", object()), "parallelism_config"),
        (lambda t: setattr(t, "model", torch.nn.DataParallel(t.model)), "DataParallel"),
        (lambda t: setattr(t, "save_model", print), "save_model"),
    ],
)
def test_why_trainer_saves_by_itself(root: Path, spoil: Any, reason: str) -> None:
    """Wherever this process does not hold the whole state, or does not know what belongs into a checkpoint."""
    trainer = make(root)
    assert trainer._why_stock() is None
    spoil(trainer)
    assert reason in trainer._why_stock()


def test_several_ranks_do_not_fall_back_alone(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other ranks would wait for this one: the error comes out."""
    trainer = make(root)
    monkeypatch.setattr(TrainingArguments, "world_size", 2)
    with pytest.raises(PlanError, match="of this rank"), trainer._falling_back(_Run()):
        raise PlanError("of this rank")


def test_a_trainer_with_a_save_checkpoint_of_its_own(root: Path) -> None:
    """Named before the mixin, its `super()._save_checkpoint()` is ours."""
    trainer = make(root, cls=Last)
    trainer.train()
    assert trainer.saved == 4
    assert (root / "checkpoint-4" / names.MANIFEST).exists()


def test_a_save_checkpoint_that_replaces_ours_is_left_alone(root: Path) -> None:
    """Whoever does all of it himself has his on_save at once."""

    class SingleRank(Async):
        def _save_checkpoint(self, model: Any, trial: Any) -> None:
            written.append(self.state.global_step)

    class Announced(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            assert written[-1] == state.global_step
            written.append(-state.global_step)

    written: list[int] = []
    make(root, cls=SingleRank, callbacks=[Announced()]).train()
    assert written == [2, -2, 4, -4]


def test_an_optimizer_that_swaps_weights_between_steps_is_copied_at_once(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Schedule-free optimizers have train() and eval(), which change the weights: nothing of them is copied late."""

    class Swapping(torch.optim.SGD):
        def train(self) -> None:
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.data.mul_(2.0)

        def eval(self) -> None:
            raise AssertionError("not evaluated here")

    waited: list[int | None] = []
    wait = SaveHandle.wait_staged
    monkeypatch.setattr(SaveHandle, "wait_staged", lambda self: (waited.append(self.step), wait(self)))
    trainer = make(root)
    trainer.optimizer = Swapping(trainer.model.parameters(), lr=0.1)
    trainer.train()
    assert waited == steps(root) == [2, 4]


# -- policies and numbers


def steps_of(root: Path) -> list[int]:
    return sorted(int(path.name[11:]) for path in root.glob("checkpoint-*"))


@pytest.mark.parametrize("strategy", ["no", "steps"])
def test_a_policy_says_when_to_save(root: Path, strategy: str) -> None:
    """Besides Trainer's own save_strategy, or instead of it; each is announced as every checkpoint is."""
    recorder = Recorder(root)
    trainer = make(root, max_steps=7, save_strategy=strategy, save_steps=4, callbacks=[recorder])
    trainer.async_checkpoint_options = {**THREAD, "policy": every(steps=3)}
    trainer.train()
    saved = [step for event, step in recorder.events if event == "save"]
    assert saved == ([3, 6] if strategy == "no" else [3, 4, 6, 7])
    assert steps_of(root) == saved


def test_a_policy_that_trainer_has_itself_is_refused(root: Path) -> None:
    """The metrics of an evaluation are Trainer's to judge."""
    trainer = make(root)
    trainer.async_checkpoint_options = {**THREAD, "policy": every(steps=3) | on_best("eval_loss")}
    with pytest.raises(
        ValueError, match=r"on_best\('eval_loss'\): Trainer saves the best itself, with save_strategy='best'"
    ):
        trainer.train()


def test_the_numbers_are_in_the_log_history_when_asked_for(root: Path) -> None:
    """Once for each save, failed ones too; callbacks hear them as every log. Not by default."""
    heard: list[dict[str, Any]] = []

    class Hears(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            heard.append(logs)

    trainer = make(root, max_steps=6, save_steps=2, callbacks=[Hears()])
    trainer.train()
    assert not any("checkpoint/blocked_ms" in entry for entry in trainer.state.log_history)

    trainer = make(root, max_steps=6, save_steps=2, callbacks=[Hears()])
    trainer.async_checkpoint_log = True
    trainer.async_checkpoint_options = {**THREAD, "on_error": "warn"}
    heard.clear()
    with use_filesystem(FailingOnce(root)):
        trainer.train()
    entries = [entry for entry in trainer.state.log_history if "checkpoint/blocked_ms" in entry]
    assert [entry["checkpoint/step"] for entry in entries] == [2, 4, 6]
    assert [entry["checkpoint/failed"] for entry in entries] == [0, 1, 1]
    for entry in entries:
        assert entry["step"] >= entry["checkpoint/step"]
        assert ("checkpoint/bytes" in entry) == (entry["checkpoint/step"] != 4)
    good = entries[0]
    assert good["checkpoint/blocked_ms"] > 0
    assert 0 < good["checkpoint/durable_s"] < 60
    assert good["checkpoint/write_gbps"] > 0
    size = sum(path.stat().st_size for path in walk(root / "checkpoint-2") if path.name != names.MANIFEST)
    assert good["checkpoint/bytes"] == size
    assert [logs["checkpoint/step"] for logs in heard if "checkpoint/step" in logs] == [2, 4, 6]


def walk(directory: Path) -> list[Path]:
    return [path for path in directory.rglob("*") if path.is_file()]


class FailingOnce(LocalFilesystem):
    """The disk takes no file of the second save."""

    def __init__(self, root: Path) -> None:
        self._saves: list[str] = []
        self._work = str(root)

    def create(self, path: str, *, direct: bool) -> int:
        save_id = path.partition("work-")[2][:32]
        if save_id and save_id not in self._saves:
            self._saves.append(save_id)
        if save_id and self._saves.index(save_id) == 1:
            raise OSError(5, "no", path)
        return super().create(path, direct=direct)
