"""The code in README.md runs: every python block, as it stands, with small stand-ins for what it takes for granted."""

from __future__ import annotations

import itertools
import os
import re
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from vembed_async_ckpt import latest, load, verify
from vembed_async_ckpt._engine import stop as stops
from vembed_async_ckpt.integrations.shared import close_shared

README = Path(__file__).parents[3] / "README.md"


@dataclass(frozen=True)
class Block:
    """A python block: `heading` above it, the line it begins at, its code."""

    heading: str
    line: int
    code: str

    def __str__(self) -> str:
        return f"{self.heading} (line {self.line})"


def blocks(text: str) -> list[Block]:
    found, heading, code, begun = [], "", [], 0
    for number, line in enumerate(text.splitlines(), 1):
        if begun:
            if line.startswith("```"):
                found.append(Block(heading, begun, "\n".join(code)))
                begun = 0
            code.append(line)
        elif line.startswith("```python"):
            code, begun = [], number + 1
        elif match := re.match(r"#+ (.*)", line):
            heading = match[1]
    return found


BLOCKS = blocks(README.read_text())


def run(block: Block, scope: dict[str, Any]) -> None:
    """Run the code with its own file and line numbers in tracebacks."""
    exec(compile("\n" * (block.line - 1) + block.code, README, "exec"), scope)


# -- what blocks take for granted


def plain() -> dict[str, Any]:
    """A prepared training of a small transformers model."""
    from accelerate import Accelerator
    from tokenizers import Tokenizer, models
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = BertModel(BertConfig(**sizes, vocab_size=40))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    accelerator = Accelerator(cpu=True)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10_000)
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    backend = Tokenizer(models.WordLevel({"[UNK]": 0, "[PAD]": 1, "hello": 2}, unk_token="[UNK]"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", pad_token="[PAD]")
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)

    calls = itertools.count(1)

    def train_step(*_: Any) -> torch.Tensor:
        if next(calls) % 100 == 0:  # thousands of them in a block: it need not be each
            optimizer.step()
            scheduler.step()
        return torch.tensor(0.5)

    return {
        "torch": torch,
        "model": model,
        "optimizer": optimizer,
        "scheduler": scheduler,
        "accelerator": accelerator,
        "tokenizer": tokenizer,
        "processor": tokenizer,
        "config": {"pooling_method": "mean", "training": {"lr": 1e-3}},
        "train_step": train_step,
        "step": 500,
    }


def with_peft() -> dict[str, Any]:
    """As plain, `model` with an adapter; `base` is the model below, and `lora` its configuration."""
    from peft import LoraConfig, get_peft_model

    scope = plain()
    lora = LoraConfig(r=2, target_modules=["query", "value"])
    base = scope["accelerator"].unwrap_model(scope["model"])
    model = get_peft_model(base, lora)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    scope["accelerator"].free_memory()
    scope["model"], scope["optimizer"] = scope["accelerator"].prepare(model, optimizer)
    return scope | {"base": base, "lora": lora}


def with_trainer() -> dict[str, Any]:
    """What a Trainer is made of."""
    from transformers import BertConfig, BertForSequenceClassification, TrainingArguments

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    data = [{"input_ids": torch.tensor([n, 1]), "labels": torch.tensor(n % 2)} for n in range(8)]
    arguments = TrainingArguments(
        output_dir="output",
        max_steps=4,
        save_steps=2,
        report_to=[],
        use_cpu=True,
        per_device_train_batch_size=2,
        disable_tqdm=True,
    )
    model = BertForSequenceClassification(BertConfig(**sizes, vocab_size=40))
    return {
        "model": model,
        "args": arguments,
        "arguments": arguments,
        "training_args": arguments,
        "dataset": data,
        "train_dataset": data,
        "tokenizer": plain()["tokenizer"],
    }


def with_lightning() -> dict[str, Any]:
    """A module that logs its loss, its class, and data for it."""
    from lightning.pytorch import LightningModule
    from torch.utils.data import DataLoader, TensorDataset

    class Model(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(2, 1)

        def training_step(self, batch: Any, _: int) -> torch.Tensor:
            loss = self.layer(batch[0]).pow(2).mean()
            self.log("loss", loss)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    data = DataLoader(TensorDataset(torch.ones(8, 2)), batch_size=4)
    return {
        "model": Model(),
        "module": Model(),
        "Model": Model,
        "MyModel": Model,
        "data": data,
        "train_dataloader": data,
    }


def scope_of(block: Block) -> dict[str, Any]:
    """By what the block imports, or what its heading says."""
    if "integrations.transformers" in block.code:
        return with_trainer()
    if "integrations.lightning" in block.code:
        return with_lightning()
    if re.search("peft|lora|adapter", f"{block.heading} {block.code}", re.IGNORECASE):
        return with_peft()
    return plain()


# -- the blocks


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where a block writes. At the end everything that it opened is closed."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    close_shared(60)
    for left in list(reversed(stops._INSTALLED)):  # handlers of a stop stay until the process ends
        left._remove()


def checkpoints(directory: Path) -> list[Path]:
    return sorted(
        path.parent for path in directory.rglob("vembed_manifest.json") if "_vembed_async_ckpt" not in str(path)
    )


@pytest.mark.filterwarnings("ignore::FutureWarning:transformers", "ignore:.*does not have many workers")
@pytest.mark.filterwarnings(
    "ignore:.*number of training batches", "ignore:.*LeafSpec.* is deprecated", "ignore:.*tensorboardX"
)
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_a_block_of_the_readme_runs(
    directory: Path, block: Block, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it stands; whatever it saves is whole."""
    if "s3://" in block.code:
        for name, value in request.getfixturevalue("moto").environment.items():
            monkeypatch.setenv(name, value)
    scope = scope_of(block)
    if "stop_on" in block.code:
        signaled(scope)
    run(block, scope)
    close_shared(60)
    found = checkpoints(directory)
    assert found, "a block that saves nothing"
    for path in found:
        verify(path)


def signaled(scope: dict[str, Any]) -> None:
    """Let the training get SIGTERM in its fifth step."""
    calls, train_step = itertools.count(1), scope["train_step"]

    def signaled_step(*arguments: Any) -> Any:
        if next(calls) == 5:
            signal.raise_signal(signal.SIGTERM)
        return train_step(*arguments)

    scope["train_step"] = signaled_step


def test_the_block_for_slurm_saves_the_step_of_the_signal(directory: Path) -> None:
    """And gives the exit code."""
    scope = plain()
    signaled(scope)
    run(block_of("Slurm"), scope)
    assert [path.name for path in checkpoints(directory)] == ["checkpoint-5"]
    assert scope["checkpointer"].exit_code == 143


def block_of(heading: str) -> Block:
    return next(block for block in BLOCKS if heading in block.heading)


def test_the_quickstart_keeps_what_it_says_and_resumes(directory: Path) -> None:
    """Three checkpoints of twenty; a second run begins where the first ended; transformers opens the newest."""
    from transformers import AutoModel, AutoTokenizer

    block = block_of("Quickstart")
    first = plain()
    run(block, first)
    assert [path.name for path in checkpoints(directory)] == [f"checkpoint-{n}" for n in (10000, 9000, 9500)]
    second = plain()
    run(block, second)
    assert second["start"] == 10_000
    newest = latest("runs/one")
    assert newest is not None
    opened = AutoModel.from_pretrained(newest).state_dict()
    for model in (second["model"], first["model"]):
        assert all(torch.equal(value, opened[name]) for name, value in model.state_dict().items())
    assert AutoTokenizer.from_pretrained(newest)("hello")["input_ids"] == [2]


def test_the_replaced_save_checkpoint_is_drained_by_end_training(directory: Path) -> None:
    """The one changed import, and what the paragraph below it says."""
    scope = plain()
    run(block_of("save_checkpoint"), scope)
    scope["accelerator"].end_training()
    assert scope["handle"].done()
    path = scope["handle"].result().path
    assert os.path.relpath(path) == "output/checkpoint-step-500"
    scope["accelerator"].load_state(str(path))
    assert load(path, accelerator=scope["accelerator"]).step == 500


def test_blocks_are_found() -> None:
    """Headings, line numbers and code of fenced blocks, of python alone."""
    text = "# One\n```\nno\n```\n## Two `x`\ntext\n```python\na = 1\nb = 2\n```\n```python\nc\n```\n"
    assert blocks(text) == [Block("Two `x`", 8, "a = 1\nb = 2"), Block("Two `x`", 12, "c")]
    assert len(BLOCKS) == README.read_text().count("```python")
