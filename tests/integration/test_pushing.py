"""Checkpoints on the Hub, against a double of it: one commit each, once. The xet way of the Hub is not tested here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load as load_safetensors
from transformers import LlamaConfig, LlamaForCausalLM

from vembed_async_ckpt import AsyncCheckpointer, Event
from vembed_async_ckpt._format import names
from vembed_async_ckpt.shipping import push_to_hub

from ..hub import Hub, hub

TOKEN = "hf_notARealTokenButASecretOne"


@pytest.fixture
def there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with hub() as found:
        monkeypatch.setenv("HF_ENDPOINT", found.endpoint)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
        monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
        yield found


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=128, num_key_value_heads=2, **sizes))


def test_each_checkpoint_is_one_commit(there: Hub, root: Path, model: LlamaForCausalLM) -> None:
    """Of what `from_pretrained` opens and nothing else; with the training state, of all files."""
    optimizer = torch.optim.AdamW(model.parameters())
    events: list[Event] = []
    whole = push_to_hub("me/model", revision="whole", private=True, training_state=True)
    targets = [push_to_hub("me/model"), whole]
    with AsyncCheckpointer(root, after_commit=targets, sinks=[events.append]) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, model=model, optimizer=optimizer)
    plain = [commit for commit in there.commits if commit.revision == "main"]
    complete = [commit for commit in there.commits if commit.revision == "whole"]
    assert (
        [commit.title for commit in plain] == [commit.title for commit in complete] == ["checkpoint-1", "checkpoint-2"]
    )
    assert set(plain[1].files) == {"model.safetensors", "config.json", "generation_config.json"}
    weights = load_safetensors(plain[1].files["model.safetensors"])
    assert torch.equal(weights["lm_head.weight"], model.lm_head.weight)
    on_disk = {path.name: path.read_bytes() for path in (root / "checkpoint-2").iterdir()}
    assert complete[1].files == on_disk
    assert names.MANIFEST in on_disk
    assert [event.detail for event in events if event.stage == "after_commit" and event.phase == "failed"] == []
    assert all(
        said == f"Bearer {TOKEN}" for _, path, said in there.requests if path.startswith(("/api/models", "/api/repos"))
    )
    assert TOKEN not in str(events)


@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
def test_a_push_that_fails_is_done_again_once(there: Hub, root: Path, model: LlamaForCausalLM, late: bool) -> None:
    """When the answer of the commit was an error, it is looked for before it is made again."""
    events: list[Event] = []
    there.failing = ("/commit/", 1, late)
    with AsyncCheckpointer(root, after_commit=[push_to_hub("me/model")], sinks=[events.append]) as checkpointer:
        checkpointer.save(1, model=model)
    assert [commit.title for commit in there.commits] == ["checkpoint-1"]
    phases = [event.phase for event in events if event.stage == "after_commit"]
    assert phases == ["started", "failed", "started", "complete"]
    assert any("/commits/" in path for _, path, _ in there.requests)
