"""How many bytes a checkpoint is, and how many are written for it: vembed's own `save_checkpoint`, sequence by sequence, and ours.

python benchmarks/bytes_written.py [--out benchmarks/results/bytes-DATE.json]

Counted, not timed: the figures are the same on every machine. `on disk`: sizes of the files that are there afterwards, an inode
once. `written`: what the kernel was asked to write (`wchar` in /proc/PID/io), by the process itself and, for ours, the writer.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import rich
import torch
import transformers
from accelerate import Accelerator
from rich.table import Table
from tokenizers import Tokenizer, models

from vembed_async_ckpt import AsyncCheckpointer, save_checkpoint

CONFIG = {"pooling_method": "mean", "projection_dim": 64, "topk_tokens": 0}


class Retriever(torch.nn.Module):
    """As vembed's retrieval model: a backbone and a head, saved by a method that takes a directory and nothing else."""

    def __init__(self, width: int, layers: int, lora: bool) -> None:
        super().__init__()
        sizes = {
            "hidden_size": width,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "intermediate_size": 4 * width,
        }
        self.backbone: Any = transformers.BertModel(transformers.BertConfig(**sizes))
        if lora:
            self.backbone = peft.get_peft_model(self.backbone, peft.LoraConfig(r=8, target_modules=["query", "value"]))
        self.head = torch.nn.Linear(width, 64, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.backbone(input_ids=ids).last_hidden_state).pow(2).mean()

    def save_pretrained(self, directory: str) -> None:
        self.backbone.save_pretrained(directory)
        torch.save(self.head.state_dict(), os.path.join(directory, "projection_head.pt"))


def original(path: str, model: Any, accelerator: Any, processor: Any) -> None:
    """The calls of vembed's `save_checkpoint`, one after the other."""
    accelerator.save_state(path)
    accelerator.unwrap_model(model).save_pretrained(path)
    processor.save_pretrained(path)
    Path(path, "vembed_config.json").write_text(json.dumps(CONFIG, indent=2))


@contextlib.contextmanager
def training(width: int, layers: int, lora: bool) -> Iterator[tuple[Any, Any, Any]]:
    """(model, accelerator, tokenizer) after one step of AdamW."""
    accelerator = Accelerator(cpu=True)
    model = Retriever(width, layers, lora)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100)
    model, optimizer, _ = accelerator.prepare(model, optimizer, scheduler)
    accelerator.backward(model(torch.ones(1, 4, dtype=torch.int64)))
    optimizer.step()
    words = {word: number for number, word in enumerate(["[UNK]", "[PAD]", *map(str, range(2000))])}
    backend = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    yield model, accelerator, transformers.PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]")
    accelerator.free_memory()


def on_disk(path: str) -> dict[str, int]:
    """Bytes by file, those that have two names once."""
    seen, sizes = set(), {}
    for file in sorted(Path(path).rglob("*")):
        status = file.stat()
        if file.is_file() and status.st_ino not in seen:
            seen.add(status.st_ino)
            sizes[str(file.relative_to(path))] = status.st_size
    return sizes


def asked_for(*processes: int | None) -> int:
    total = 0
    for process in filter(None, processes):
        fields = dict(line.split(": ") for line in Path(f"/proc/{process}/io").read_text().splitlines())
        total += int(fields["wchar"])
    return total


def measure(lora: bool, width: int, layers: int) -> dict[str, Any]:
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="vembed-ckpt-") as directory, training(width, layers, lora) as state:
        model = state[0]
        results["parameters"] = sum(p.numel() for p in model.parameters())
        results["trainable"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
        results["original"] = count(os.path.join(directory, "original", "checkpoint-step-1"), original, *state)
        with AsyncCheckpointer(os.path.join(directory, "ours")) as checkpointer:
            checkpointer.prewarm(model=model)
            checkpointer.wait(600)  # the writer is there

            def ours(path: str, model: Any, accelerator: Any, processor: Any) -> None:
                saved = save_checkpoint(path, model, accelerator, processor, CONFIG, checkpointer=checkpointer)
                saved.result(600)

            writer = checkpointer.statistics()["writer_pid"]
            results["ours"] = count(os.path.join(directory, "ours", "checkpoint-step-1"), ours, *state, writer=writer)
    return results


def count(path: str, save: Callable[..., None], *state: Any, writer: int | None = None) -> dict[str, Any]:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    before = asked_for(os.getpid(), writer)
    save(path, *state)
    written = asked_for(os.getpid(), writer) - before
    files = on_disk(path)
    return {"on_disk": sum(files.values()), "written": written, "files": files}


def show(results: dict[str, Any]) -> None:
    table = Table(
        "fine-tune", "save", "on disk, MB", "written, MB", "of the original's", title="Bytes of one checkpoint"
    )
    for kind in ("full", "lora"):
        for who in ("original", "ours"):
            counted = results[kind][who]
            share = counted["written"] / results[kind]["original"]["written"]
            table.add_row(
                kind, who, f"{counted['on_disk'] / 1e6:.2f}", f"{counted['written'] / 1e6:.2f}", f"{share:.1%}"
            )
    rich.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    today = datetime.date.today().isoformat()
    parser.add_argument("--out", default=os.path.join(os.path.dirname(__file__), "results", f"bytes-{today}.json"))
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    transformers.utils.logging.disable_progress_bar()
    sizes = (options.width, options.layers)
    results: dict[str, Any] = {"versions": versions(), "full": measure(False, *sizes), "lora": measure(True, *sizes)}
    show(results)
    Path(options.out).write_text(json.dumps(results, indent=1) + "\n")


def versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "accelerate", "transformers", "safetensors", "peft")}


if __name__ == "__main__":
    main()
