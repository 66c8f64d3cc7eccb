"""The training the demo saves: a BERT-style text embedder, its optimizer and schedule, one step at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.nn import functional
from transformers import BertConfig, BertModel, get_cosine_schedule_with_warmup

SEED = 20240229
_TEMPERATURE = 0.05
_WARMUP = 0.1


@dataclass(frozen=True, slots=True)
class Size:
    """One choice of `--size`: the encoder, and how much a step of it reads."""

    vocabulary: int
    hidden: int
    layers: int
    batch_size: int
    length: int
    learning_rate: float


SIZES = {
    "tiny": Size(vocabulary=4096, hidden=128, layers=2, batch_size=16, length=32, learning_rate=2e-3),
    "small": Size(vocabulary=8192, hidden=256, layers=4, batch_size=16, length=32, learning_rate=1e-3),
    "base": Size(vocabulary=16384, hidden=768, layers=12, batch_size=8, length=32, learning_rate=1e-4),
}


class Trainer:
    """Model, optimizer and schedule of `steps` steps, prepared by accelerate; equal arguments give equal weights."""

    def __init__(self, size: Size, *, vocabulary: int, padding: int, steps: int) -> None:
        set_seed(SEED)
        accelerator = Accelerator()
        model = BertModel(_encoder_config(size, vocabulary, padding))
        model.pooler.requires_grad_(False)  # mean pooling leaves it out, but AutoModel expects its weights
        optimizer = torch.optim.AdamW(model.parameters(), lr=size.learning_rate, weight_decay=0.01)
        scheduler = get_cosine_schedule_with_warmup(optimizer, int(_WARMUP * steps), steps)
        self.accelerator = accelerator
        self.model, self.optimizer, self.scheduler = accelerator.prepare(model, optimizer, scheduler)

    @property
    def objects(self) -> dict[str, Any]:
        """What a checkpoint of this training holds and restores, under the names that `save` and `load` give it."""
        return {"model": self.model, "optimizer": self.optimizer, "scheduler": self.scheduler}

    def parameter_count(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    def step(self, ids: torch.Tensor, mask: torch.Tensor) -> float:
        """Train on one batch (signatures, then their docstrings) and return its loss."""
        self.model.train()
        device = self.accelerator.device
        loss = contrastive_loss(_embed(self.model, ids.to(device), mask.to(device)))
        self.accelerator.backward(loss)
        self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        return loss.item()


def contrastive_loss(embeddings: torch.Tensor) -> torch.Tensor:
    """InfoNCE both ways: row i of the first half belongs to row i of the second, every other row is a negative."""
    signatures, docstrings = embeddings.chunk(2)
    similarity = signatures @ docstrings.T / _TEMPERATURE
    answers = torch.arange(len(similarity), device=similarity.device)
    return (functional.cross_entropy(similarity, answers) + functional.cross_entropy(similarity.T, answers)) / 2


def _embed(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state
    weights = mask.unsqueeze(-1).to(hidden.dtype)
    return functional.normalize((hidden * weights).sum(1) / weights.sum(1), dim=-1)


def _encoder_config(size: Size, vocabulary: int, padding: int) -> BertConfig:
    return BertConfig(
        vocab_size=vocabulary,
        hidden_size=size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.hidden // 64,
        intermediate_size=4 * size.hidden,
        pad_token_id=padding,
    )
