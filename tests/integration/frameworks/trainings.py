"""A small training with accelerate, in all its variants, that can be saved and resumed in every way there is.

What a training has come to is told as one digest of everything: weights, buffers, optimizer, scheduler, scaler, registered
objects, the accelerator's count of micro-batches, and the three random number generators.
"""

from __future__ import annotations

import hashlib
import os
import random
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anyio._backends._asyncio  # noqa: F401  (so that no child has to)
import numpy as np
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import (
    DataLoaderConfiguration,
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
)
from torch.utils.data import DataLoader, TensorDataset
from transformers.models.bert import modeling_bert  # noqa: F401
from transformers.optimization import Adafactor

import vembed_async_ckpt.checkpointer  # noqa: F401
from vembed_async_ckpt import SaveHandle, load, save_checkpoint
from vembed_async_ckpt.integrations.accelerate import attach, save_state

BATCHES = 4  # micro-batches of an epoch, on every rank
EPOCHS = 3
LAST = EPOCHS * BATCHES

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
    "fused": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, fused=True),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=1e-2, momentum=0.9),
    "adafactor": lambda parameters: Adafactor(parameters, lr=1e-2, relative_step=False, scale_parameter=False),
    "torch_adafactor": lambda parameters: torch.optim.Adafactor(parameters, lr=1e-2),
}
SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "none": lambda optimizer: None,
    "cosine": lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, LAST),
    "warmup": lambda optimizer: transformers.get_linear_schedule_with_warmup(optimizer, 4, LAST),
}


class Retriever(torch.nn.Module):
    """As vembed's retrieval model: a backbone below other names than its own, and a head that `save_pretrained` pickles."""

    def __init__(self, lora: bool) -> None:
        super().__init__()
        sizes = {
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "vocab_size": 64,
        }
        with torch.random.fork_rng():
            if lora:
                torch.manual_seed(0)  # the base that everybody downloads: it is in no checkpoint
            self.backbone: Any = transformers.BertModel(transformers.BertConfig(**sizes), add_pooling_layer=False)
        if lora:
            import peft  # which takes its time

            kind = peft.LoraConfig(r=4, target_modules=["query", "value"], lora_dropout=0.1)
            self.backbone = peft.get_peft_model(self.backbone, kind)
        self.head = torch.nn.Linear(16, 4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.backbone(input_ids=ids).last_hidden_state).float().pow(2).mean()

    def save_pretrained(self, directory: str) -> None:
        self.backbone.save_pretrained(directory)
        torch.save(self.head.state_dict(), os.path.join(directory, "projection_head.pt"))


class Average:
    """A registered object: the average of the weights so far, a count, and what numpy gave."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        self.average = {name: value.clone() for name, value in model.named_parameters()}
        self.count = 0
        self.best = np.float64(0.0)

    def update(self) -> None:
        self.count += 1
        self.best = np.float64(random.random())
        with torch.no_grad():
            for name, value in self.model.named_parameters():
                self.average[name].lerp_(value, 0.1)

    def state_dict(self) -> dict[str, Any]:
        return {"average": self.average, "count": self.count, "best": self.best, "history": np.arange(self.count)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert len(state["history"]) == state["count"]
        self.average = {name: value.clone() for name, value in state["average"].items()}
        self.count, self.best = state["count"], state["best"]


class Training:
    """One training, at its micro-batch `done`."""

    def __init__(
        self,
        seed: int,
        optimizer: str = "adamw",
        scheduler: str = "cosine",
        lora: bool = False,
        accumulate: int = 1,
        sampler: str = "seedable",
        precision: str = "no",
        scaled: bool = False,
        data_seed: int | None = 7,
        registered: bool = True,
        hooked: bool = False,
    ) -> None:
        """`sampler`: "seedable", "generator" (a user's own) or "default" (the random state of the process)."""
        for plant in (random.seed, np.random.seed, torch.manual_seed):
            plant(seed)
        self.accelerator = Accelerator(
            cpu=True,
            mixed_precision=precision,
            dataloader_config=DataLoaderConfiguration(use_seedable_sampler=sampler == "seedable", data_seed=data_seed),
            gradient_accumulation_plugin=GradientAccumulationPlugin(accumulate, sync_with_dataloader=False),
            # Else DDP puts gradients into other buckets after the first step of a process, and so adds in another order.
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
        )
        if scaled:
            self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
        model = Retriever(lora)
        inner = OPTIMIZERS[optimizer]([p for p in model.parameters() if p.requires_grad])
        size = 4 * BATCHES * self.accelerator.num_processes
        data = torch.randint(64, (size, 5), generator=torch.Generator().manual_seed(0))
        generator = None if sampler == "default" else torch.Generator().manual_seed(seed)
        loader = DataLoader(TensorDataset(data), batch_size=4, shuffle=True, generator=generator)
        self.model, self.optimizer, self.loader = self.accelerator.prepare(model, inner, loader)
        following = SCHEDULERS[scheduler](inner)
        self.scheduler = None if following is None else self.accelerator.prepare(following)
        self.average = Average(self.model) if registered else None
        if self.average is not None:
            self.accelerator.register_for_checkpointing(self.average)
        if hooked:
            self.accelerator.register_save_state_pre_hook(self._save_hook)
            self.accelerator.register_load_state_pre_hook(self._load_hook)
        self.model.train()
        self.done = 0
        self.note = f"of {seed}"
        self.synced: list[int] = []

    def _save_hook(self, models: Any, weights: Any, directory: str) -> None:
        (Path(directory) / "note.txt").write_text(self.note)

    def _load_hook(self, models: Any, directory: str) -> None:
        self.note = (Path(directory) / "note.txt").read_text()

    def steps(self, *, set_epoch: bool = True, between: bool = False) -> Iterator[int]:
        """Train to the end; gives the number of micro-batches done after each of them. `between`: for the last of an epoch only
        when its loop is over."""
        while self.done < LAST:
            epoch, skipped = divmod(self.done, BATCHES)
            if set_epoch:
                self.loader.set_epoch(epoch)
            loader = self.accelerator.skip_first_batches(self.loader, skipped) if skipped else self.loader
            for (ids,) in loader:
                self._step(ids)
                self.done += 1
                if not between or self.done % BATCHES:
                    yield self.done
            if between:
                yield self.done

    def _step(self, ids: torch.Tensor) -> None:
        with self.accelerator.accumulate(self.model):
            with self.accelerator.autocast():
                loss = self.model(ids)
            self.accelerator.backward(loss)
            if self.accelerator.sync_gradients:
                self.synced.append(self.done)
                self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            if self.scheduler is not None:
                self.scheduler.step()
            self.optimizer.zero_grad()
        if self.average is not None:
            self.average.update()
        np.random.rand()

    def finish(self, **options: Any) -> str:
        for _ in self.steps(**options):
            pass
        return self.digest()

    def save(self, kind: str, path: str) -> SaveHandle:
        if kind == "save_state":
            return save_state(self.accelerator, path)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "model_state_dict.safetensors was left out")
            return save_checkpoint(path, self.model, self.accelerator)

    def resume(self, reader: str, path: str, done: int) -> None:
        if reader == "ours":
            load(path, accelerator=self.accelerator)
        else:
            if reader == "attached":
                attach(self.accelerator)
            self.accelerator.load_state(path)
        self.done = done

    def digest(self) -> str:
        found = hashlib.sha256()
        scaler = self.accelerator.scaler
        self._add(found, self.model.state_dict())
        self._add(found, self.optimizer.state_dict())
        self._add(found, None if self.scheduler is None else self.scheduler.state_dict())
        self._add(found, None if scaler is None else scaler.state_dict())
        self._add(found, None if self.average is None else self.average.state_dict())
        self._add(found, (self.accelerator.step, random.getstate(), np.random.get_state(), torch.get_rng_state()))
        return found.hexdigest()

    def _add(self, found: Any, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            found.update(f"{value.dtype} {tuple(value.shape)}".encode())
            found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(value, np.ndarray):
            found.update(f"{value.dtype}".encode() + value.tobytes())
        elif isinstance(value, dict):
            for key in sorted(value, key=str):
                found.update(repr(key).encode())
                self._add(found, value[key])
        elif isinstance(value, list | tuple):
            for item in value:
                self._add(found, item)
        else:
            found.update(repr(value).encode())
