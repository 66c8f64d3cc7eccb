"""One rank of Trainer or Lightning under torchrun, trained until a signal stops it: `stopped.py trainer|lightning DIRECTORY`.

Each rank writes DIRECTORY/ready-RANK when it trains, and DIRECTORY/stopped-RANK with its step.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

RANK = int(os.environ["RANK"])
FRAMEWORK, DIRECTORY = sys.argv[1], Path(sys.argv[2])


class Slow(Dataset):  # type: ignore[type-arg]
    def __len__(self) -> int:
        return 100_000

    def __getitem__(self, index: int) -> Any:
        time.sleep(0.002)
        return {"x": torch.ones(4), "labels": torch.ones(1)}


def ready(step: int) -> None:
    if step == 5:
        (DIRECTORY / f"ready-{RANK}").touch()


def stopped(step: int) -> None:
    (DIRECTORY / f"stopped-{RANK}").write_text(str(step))


def by_trainer() -> None:
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from vembed_async_ckpt.integrations.transformers import AsyncCheckpointMixin
    from vembed_async_ckpt.policies import every

    class Linear(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(4, 1)

        def forward(self, x: Any, labels: Any) -> dict[str, Any]:
            return {"loss": (self.layer(x) - labels).square().mean()}

    class Stopping(AsyncCheckpointMixin, Trainer):
        async_checkpoint_stop_on = (signal.SIGTERM,)
        async_checkpoint_options = {"policy": every(minutes=1 / 60)}  # noqa: RUF012

    class Ready(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            ready(state.global_step)

    arguments = TrainingArguments(
        str(DIRECTORY / "root"), use_cpu=True, report_to="none", disable_tqdm=True, dataloader_pin_memory=False,
        max_steps=100_000, per_device_train_batch_size=2, save_strategy="no", logging_strategy="no",
    )  # fmt: skip
    trainer = Stopping(model=Linear(), args=arguments, train_dataset=Slow(), callbacks=[Ready()])
    trainer.train()
    stopped(trainer.state.global_step)
    sys.exit(trainer.async_checkpoint_exit_code)


def by_lightning() -> None:
    from lightning.pytorch import LightningModule, Trainer

    from vembed_async_ckpt.integrations.lightning import VembedCheckpointIO
    from vembed_async_ckpt.integrations.lightning_callback import VembedCheckpoint
    from vembed_async_ckpt.policies import every

    class Net(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(4, 1)

        def training_step(self, batch: Any, index: int) -> Any:
            ready(self.trainer.global_step)
            return self.layer(batch["x"]).mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    callback = VembedCheckpoint(DIRECTORY / "root", policy=every(minutes=1 / 60), stop_on=[signal.SIGTERM])
    trainer = Trainer(
        max_steps=100_000, logger=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu",
        enable_checkpointing=False, callbacks=[callback], plugins=[VembedCheckpointIO()], devices=2, strategy="ddp",
    )  # fmt: skip
    try:
        trainer.fit(Net(), DataLoader(Slow(), batch_size=2))
    finally:
        stopped(trainer.global_step)


{"trainer": by_trainer, "lightning": by_lightning}[FRAMEWORK]()
