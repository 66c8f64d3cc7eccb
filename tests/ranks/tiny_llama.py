"""A small Llama and a Trainer of it that saves in the background."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from vembed_async_ckpt.integrations.transformers import AsyncCheckpointMixin


class SavingTrainer(AsyncCheckpointMixin, Trainer):
    pass


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=20,
        intermediate_size=28,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=51,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def trainer(directory: Path, fsdp_version: int | None = None, **further: Any) -> SavingTrainer:
    """Four steps, of which the second and the last are saved. Divided by FSDP of that version."""
    generator = torch.Generator().manual_seed(1)
    data = [{"input_ids": words, "labels": words} for words in torch.randint(0, 51, (32, 12), generator=generator)]
    options: dict[str, Any] = {}
    if fsdp_version is not None:
        options["fsdp"] = True
        options["fsdp_config"] = {
            "fsdp_version": fsdp_version,
            "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
            "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "state_dict_type": "SHARDED_STATE_DICT",
            "cpu_ram_efficient_loading": False,
            "sync_module_states": False,
        }
    arguments = TrainingArguments(
        str(directory),
        use_cpu=True,
        max_steps=4,
        save_steps=2,
        save_total_limit=1 if directory.name == "resumed" else None,
        logging_steps=1,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        report_to=[],
        disable_tqdm=True,
        **options,
    )
    return SavingTrainer(model(), arguments, train_dataset=data, **further)
