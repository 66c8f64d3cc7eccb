"""`save_checkpoint` replaces vembed's, argument for argument: same files, same readers, and resuming works.

What the original did wrong, and the test that would see it here:

- a full fine-tune could not be resumed: test_readers.py (each_of_them_resumes), test_resume.py ([...-full])
- weights were written twice: the_directory_holds_what_every_reader_expects
- LoRA wrote the whole base: test_readers.py (the_base_of_an_adapter_is_not_written)
- FSDP hung, or saved one rank's shard: tests/ranks (test_frameworks.py)
- under DDP only the first rank's random states were saved: test_distributed.py
- one process of each node wrote: a_stand_in_off_the_main_process_writes_nothing
- a kill left half a directory: test_resume.py (after_a_kill_in_the_midst_of_a_save), tests/crash
- `topk_tokens: None` raised: the_config_is_all_that_is_data
"""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from tokenizers import Tokenizer, models
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, PreTrainedTokenizerFast

from vembed_async_ckpt import PlanError, load, save_checkpoint, verify
from vembed_async_ckpt._memory import arena
from vembed_async_ckpt._memory.arena import ArenaPool
from vembed_async_ckpt.integrations.accelerate import save_state
from vembed_async_ckpt.integrations.shared import open_at


def tokenizer() -> PreTrainedTokenizerFast:
    words = {"[UNK]": 0, "[CLS]": 1, "[SEP]": 2, "[PAD]": 3, "hello": 4}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="[UNK]")), unk_token="[UNK]", pad_token="[PAD]"
    )


def prepared() -> tuple[Accelerator, Any, Any, Any]:
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True)
    model = BertModel(
        BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=50)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
    return accelerator, *accelerator.prepare(model, optimizer, scheduler)


def train(accelerator: Accelerator, model: Any, optimizer: Any, scheduler: Any) -> None:
    optimizer.zero_grad()
    accelerator.backward(model(torch.randint(0, 50, (2, 8))).last_hidden_state.pow(2).mean())
    optimizer.step()
    scheduler.step()


CONFIG = {
    "model_name": "bert",
    "topk_tokens": None,
    "pooling_method": "mean",
    "training": {"lr": 1e-3, "dtype": torch.bfloat16, "out": Path("runs")},
    "processor": object(),
    "hub_token": "hf_secret",
}


@pytest.mark.filterwarnings("ignore:left out of the saved config")
def test_the_directory_holds_what_every_reader_expects(root: Path) -> None:
    """Weights under two names but one copy, config, tokenizer, training state; from_pretrained opens it."""
    state = prepared()
    train(*state)
    handle = save_checkpoint(root / "checkpoint-step-3", state[1], state[0], tokenizer(), CONFIG)
    info = handle.result(60)
    assert (info.step, info.path) == (3, root / "checkpoint-step-3")
    assert {
        "config.json", "model.safetensors", "model_state_dict.safetensors", "tokenizer.json", "tokenizer_config.json",
        "special_tokens_map.json", "vembed_config.json", "optimizer.bin", "scheduler.bin", "random_states_0.pkl",
        "vembed_manifest.json", "vembed_training_state.json", "vembed_training_state.safetensors",
    } == set(os.listdir(info.path))  # fmt: skip
    assert os.path.samefile(info.path / "model.safetensors", info.path / "model_state_dict.safetensors")
    weights = info.files["model.safetensors"]
    assert info.total_bytes == sum(info.files.values()) - weights, "one copy of the bytes counts once"
    verify(info.path)
    reloaded = AutoModel.from_pretrained(info.path)
    expected = state[0].unwrap_model(state[1]).state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in reloaded.state_dict().items())
    assert AutoTokenizer.from_pretrained(info.path).convert_tokens_to_ids("hello") == 4


def test_the_config_is_all_that_is_data_with_the_keys_readers_expect(root: Path) -> None:
    """The ten keys of vembed's inference are there with its defaults; live objects and secrets are not, and are named."""
    accelerator, model, _, _ = prepared()
    with pytest.warns(UserWarning, match=r"processor, hub_token"):
        handle = save_checkpoint(str(root / "one"), model, accelerator, config=CONFIG, training_state=False)
    config = json.loads((handle.result(60).path / "vembed_config.json").read_text())
    assert config["topk_tokens"] == 0
    assert (config["pooling_method"], config["retrieval_mode"], config["encoder_mode"]) == ("mean", "t2i", "auto")
    assert config["training"] == {"lr": 1e-3, "dtype": "bfloat16", "out": "runs"}
    assert "processor" not in config
    assert "hub_token" not in config


@pytest.mark.parametrize("reader", ["accelerate", "ours"])
def test_training_goes_on_from_it_bit_for_bit(root: Path, reader: str) -> None:
    """Three more steps after resuming equal three more steps of the run that saved (where the original cannot resume)."""
    state = prepared()
    train(*state)
    handle = save_checkpoint(root / "checkpoint-step-1", state[1], state[0])
    for _ in range(3):
        train(*state)
    path = handle.result(60).path
    resumed = prepared()
    train(*resumed)
    if reader == "accelerate":
        resumed[0].load_state(str(path))
    else:
        load(path, accelerator=resumed[0])
    for _ in range(3):
        train(*resumed)
    for one, other in zip(state[1].parameters(), resumed[1].parameters(), strict=True):
        assert torch.equal(one, other)


def test_foreign_files_in_the_target_stay(root: Path) -> None:
    """Overwriting a directory keeps the user's notes in it, and drops what would be read as part of the new checkpoint."""
    target = root / "final"
    target.mkdir(parents=True)
    (target / "notes.txt").write_text("mine")
    accelerator, model, _, _ = prepared()
    for prefix in ("", "best"):
        save_checkpoint(target, model, accelerator, None, None, prefix, training_state=False).result(60)
    assert (target / "notes.txt").read_text() == "mine"
    assert (target / "best_state_dict.safetensors").exists()
    assert not (target / "model_state_dict.safetensors").exists()


def test_end_training_drains(root: Path) -> None:
    """`accelerator.end_training()` returns when the pending save is durable."""
    accelerator, model, _, _ = prepared()
    handle = save_checkpoint(root / "checkpoint-step-1", model, accelerator)
    accelerator.end_training()
    assert handle.done()
    verify(root / "checkpoint-step-1")


def test_a_stand_in_accelerator_gets_the_original_calls(tmp_path: Path) -> None:
    """A mock in somebody's test sees save_state with the exact path, and save_pretrained of the unwrapped model."""
    accelerator, model = MagicMock(), MagicMock()
    accelerator.unwrap_model.return_value = model
    target = tmp_path / "there already"
    target.mkdir()
    handle = save_checkpoint(str(target), model, accelerator)
    accelerator.save_state.assert_called_with(str(target))
    model.save_pretrained.assert_called_with(str(target))
    assert handle.done()
    assert handle.result().path == target


def test_a_path_that_cannot_be_a_checkpoint_is_refused(root: Path) -> None:
    """The work directory's own name is refused before anything is touched."""
    accelerator, model, _, _ = prepared()
    with pytest.raises(PlanError, match="name another one"):
        save_checkpoint(root / "_vembed_async_ckpt", model, accelerator)
    with pytest.raises(PlanError, match="a URL; save to a directory on this machine"):
        save_checkpoint(f"file://{root}/checkpoint-1", model, accelerator)
    with pytest.raises(PlanError, match="a URL; save to a directory on this machine"):
        save_state(accelerator, f"file://{root}/checkpoint-1")
    assert not root.exists()


class Wrapped(torch.nn.Module):
    """As vembed's retrieval model: a module whose save_pretrained takes no state_dict and pickles its head."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = BertModel(
            BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=50)
        )
        self.head = torch.nn.Linear(16, 4)

    def save_pretrained(self, directory: str) -> None:
        self.backbone.save_pretrained(directory)
        torch.save(self.head.state_dict(), os.path.join(directory, "projection_head.pt"))


def test_a_foreign_save_pretrained_is_taken_as_it_is(root: Path) -> None:
    """Backbone from the snapshot, head as it was at each call: changed weights right after the call change neither."""
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(Wrapped())
    for step in (1, 2):
        expected = {key: value.clone() for key, value in model.state_dict().items()}
        handle = save_checkpoint(root / f"checkpoint-step-{step}", model, accelerator, training_state=False)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1)
        path = handle.result(60).path
        head = torch.load(path / "projection_head.pt")
        assert torch.equal(head["weight"], expected["head.weight"])
        backbone = AutoModel.from_pretrained(path).state_dict()
        assert all(torch.equal(backbone[key], expected[f"backbone.{key}"]) for key in backbone)


@pytest.mark.parametrize("kind", ["DEEPSPEED", "MEGATRON_LM"])
@pytest.mark.parametrize("main", [True, False])
def test_sharded_states_are_refused_on_every_rank(
    root: Path, monkeypatch: pytest.MonkeyPatch, kind: str, main: bool
) -> None:
    """At once and alike: no rank goes alone into a collective, none saves its share as if it were the whole."""
    accelerator, model, _, _ = prepared()
    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType[kind])
    monkeypatch.setattr(Accelerator, "is_main_process", main)
    with pytest.raises(PlanError, match=f"sharded by {kind}"):
        save_checkpoint(root / "checkpoint-step-1", model, accelerator)
    assert not root.exists()


def test_a_stand_in_off_the_main_process_writes_nothing(tmp_path: Path) -> None:
    """The global main process writes, and it alone: not the first of every node."""
    accelerator, model = MagicMock(), MagicMock()
    accelerator.is_main_process, accelerator.is_local_main_process = False, True
    handle = save_checkpoint(str(tmp_path / "one"), model, accelerator, config={"topk_tokens": None})
    accelerator.save_state.assert_not_called()
    assert handle.done()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("value", [{"global_step": 7, "best_metric": 0.5}, None, True])
def test_the_training_state_of_newer_versions_is_saved(root: Path, value: Any) -> None:
    """As training_state.json, beside ours; None, which they pass by default, does not mean that optimizers are left out."""
    accelerator, model, _, _ = prepared()
    info = save_checkpoint(root / "checkpoint-step-7", model, accelerator, training_state=value).result(60)
    assert "optimizer.bin" in info.files
    progress = info.path / "training_state.json"
    assert (json.loads(progress.read_text()) if progress.exists() else None) == (value if type(value) is dict else None)
    with pytest.raises(PlanError, match="training_state: "):
        save_checkpoint(root / "checkpoint-step-8", model, accelerator, training_state={"model": model})


def test_a_stand_in_gets_the_training_state_too(tmp_path: Path) -> None:
    """As the original would write it."""
    target = tmp_path / "one"
    save_checkpoint(str(target), MagicMock(), MagicMock(), config={"topk_tokens": None}, training_state={"epoch": 1})
    assert json.loads((target / "training_state.json").read_text()) == {"epoch": 1}
    assert json.loads((target / "vembed_config.json").read_text())["topk_tokens"] == 0


def test_a_step_and_an_epoch_are_saved_back_to_back(root: Path) -> None:
    """The second call does not wait until the first checkpoint is written: it has memory of its own."""
    accelerator, model, optimizer, scheduler = prepared()
    train(accelerator, model, optimizer, scheduler)
    save_checkpoint(root / "checkpoint-step-0", model, accelerator).result(60)
    writer = open_at(os.path.realpath(root)).statistics()["writer_pid"]  # type: ignore[union-attr]
    os.kill(writer, signal.SIGSTOP)
    try:
        train(accelerator, model, optimizer, scheduler)
        handles = [save_checkpoint(root / f"checkpoint-{name}-1", model, accelerator) for name in ("step", "epoch")]
        assert not any(handle.done() for handle in handles)
    finally:
        os.kill(writer, signal.SIGCONT)
    for handle in handles:
        verify(handle.result(60).path)
    accelerator.end_training()


def test_the_second_save_waits_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A further arena is taken only if as much stays free beside it."""
    pool = ArenaPool(2, None, lambda arena: None, lambda arena: None)
    monkeypatch.setattr(arena, "available_memory", lambda: 30 << 20)
    first = pool.acquire(16 << 20)
    assert first is not None
    assert pool.acquire(16 << 20) is None
    monkeypatch.setattr(arena, "available_memory", lambda: 64 << 20)
    assert pool.acquire(16 << 20) is not None
    pool.close()
