"""Trains by Trainer or Lightning in forked processes and stops each by SIGTERM at a random moment. Prints JSON for each.

    stopped.py trainer|lightning ROOT SEED group|main ROUNDS

`group`: the signal hits the two workers of the DataLoader too.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch.utils.data import DataLoader, Dataset

from vembed_async_ckpt._disk import manifests

STEPS = 100_000


class Slow(Dataset):  # type: ignore[type-arg]
    def __len__(self) -> int:
        return 2 * STEPS

    def __getitem__(self, index: int) -> Any:
        time.sleep(0.002)
        return {"x": torch.ones(4), "labels": torch.ones(1)}


def say(fd: int, **what: Any) -> None:
    os.write(fd, f"{json.dumps(what)}\n".encode())


def by_trainer(root: str, fd: int) -> NoReturn:
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from vembed_async_ckpt.integrations.transformers import AsyncCheckpointMixin

    class Linear(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(4, 1)

        def forward(self, x: Any, labels: Any) -> dict[str, Any]:
            return {"loss": (self.layer(x) - labels).square().mean()}

    class Stopping(AsyncCheckpointMixin, Trainer):
        async_checkpoint_stop_on = (signal.SIGTERM,)

    class Saying(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if not self.begun:
                self.begun = True
                say(fd, resumed=state.global_step)

        begun = False

    arguments = TrainingArguments(
        root, use_cpu=True, report_to="none", disable_tqdm=True, dataloader_pin_memory=False, max_steps=STEPS,
        per_device_train_batch_size=2, save_steps=50, save_total_limit=2, dataloader_num_workers=2, logging_strategy="no",
        ignore_data_skip=True,
    )  # fmt: skip
    trainer = Stopping(model=Linear(), args=arguments, train_dataset=Slow(), callbacks=[Saying()])
    trainer.train(resume_from_checkpoint=any(Path(root).glob("checkpoint-*")))
    say(fd, stopped=trainer.state.global_step)
    sys.exit(trainer.async_checkpoint_exit_code)


def by_lightning(root: str, fd: int) -> NoReturn:
    from lightning.pytorch import LightningModule, Trainer

    from vembed_async_ckpt.integrations.lightning import VembedCheckpointIO
    from vembed_async_ckpt.integrations.lightning_callback import VembedCheckpoint
    from vembed_async_ckpt.policies import every

    class Net(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(4, 1)
            self.begun = False

        def training_step(self, batch: Any, index: int) -> Any:
            if not self.begun:
                self.begun = True
                say(fd, resumed=self.trainer.global_step)
            return self.layer(batch["x"]).mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    callback = VembedCheckpoint(root, policy=every(steps=50), stop_on=[signal.SIGTERM])
    trainer = Trainer(
        max_steps=STEPS, logger=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu",
        enable_checkpointing=False, callbacks=[callback], plugins=[VembedCheckpointIO()],
    )  # fmt: skip
    try:
        trainer.fit(Net(), DataLoader(Slow(), batch_size=2, num_workers=2), ckpt_path=callback.newest())
    finally:
        say(fd, stopped=trainer.global_step)
    raise AssertionError("the training was not stopped")


def play(framework: str, root: str, chance: random.Random, whom: str) -> None:
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.setpgid(0, 0)
        os.close(read)
        torch.set_num_threads(1)
        {"trainer": by_trainer, "lightning": by_lightning}[framework](root, write)
    os.close(write)
    with open(read) as lines:
        begun = json.loads(lines.readline())
        time.sleep(chance.uniform(0.0, 0.5))
        (os.killpg if whom == "group" else os.kill)(pid, signal.SIGTERM)
        ended = json.loads(lines.readline() or '{"stopped": null}')
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    saved = max(
        (manifests.read(str(path.parent)).step or 0 for path in Path(root).glob("*/vembed_manifest.json")), default=0
    )
    print(json.dumps({**begun, **ended, "code": code, "saved": saved}), flush=True)


def main() -> None:
    framework, root, seed, whom, rounds = sys.argv[1:]
    if framework == "trainer":
        import transformers.trainer  # noqa: F401
    else:
        import lightning.pytorch  # noqa: F401
    chance = random.Random(int(seed))
    for _ in range(int(rounds)):
        play(framework, root, chance, whom)


main()
