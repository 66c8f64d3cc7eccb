"""Signals at random moments of a training that saves at every step; the handler saves, as scripts for preemption do.

    python benchmarks/faults/signals_hosts.py lightning|trainer [--signals 50] [--seed 0]

Counted: how many came while our code was running, how many saves of the handler were whole on disk when they returned and had the
weights of that moment, and how many were refused with `CheckpointerBusy`. At the end every checkpoint of the training must be
whole. A hang of 60 seconds ends the script with the stacks of all threads.
"""

from __future__ import annotations

import argparse
import faulthandler
import itertools
import json
import os
import random
import signal
import sys
import tempfile
import threading
import warnings
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from safetensors.torch import load_file

from vembed_async_ckpt import CheckpointerBusy, verify

OURS = os.sep + "vembed_async_ckpt" + os.sep
HANG = 60.0  # seconds


def is_ours(frame: FrameType | None) -> bool:
    """Whether a call of ours is on the stack; not counted is the mixin's `train`, under which everything happens."""
    while frame is not None:
        if OURS in frame.f_code.co_filename and frame.f_code.co_name != "train":
            return True
        frame = frame.f_back
    return False


class Signals:
    """Sends `number` signals to this process, each at a random moment after the handler of the one before has returned."""

    def __init__(self, number: int, seed: int) -> None:
        self.left = number
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.refusals: list[str] = []
        self.number = itertools.count(1)
        self.save: Any = None  # (number) -> path of what the handler saves
        self.model: Any = None
        self._random = random.Random(seed)
        self._handled = threading.Event()
        signal.signal(signal.SIGUSR1, self._handle)

    def start(self) -> None:
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while self.left:
            threading.Event().wait(self._random.uniform(0.001, 0.03))
            if self._random.random() < 0.7:
                self._await_our_code()
            self._handled.clear()
            os.kill(os.getpid(), signal.SIGUSR1)
            self._handled.wait()

    def _await_our_code(self) -> None:
        """Wait until the main thread is inside a save."""
        for _ in range(100_000):
            frame = sys._current_frames().get(threading.main_thread().ident or 0)
            while frame is not None and frame.f_code.co_name not in ("save_as", "_save_in_background"):
                frame = frame.f_back
            if frame is not None:
                return

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        faulthandler.dump_traceback_later(HANG, exit=True)
        self.counts["signals"] += 1
        self.counts["inside our code"] += is_ours(frame)
        try:
            path = self.save(next(self.number))
            verify(path)
            saved, live = load_file(path / "model.safetensors"), self.model.state_dict()
            wrong = [name for name in saved if not torch.equal(saved[name], live[name])]
            self.wrong += [f"{path}: {name} is not what it was" for name in wrong]
            self.counts["whole and right on return"] += not wrong
        except CheckpointerBusy as error:
            self.counts["refused"] += 1
            self.refusals.append(str(error))
        except Exception as error:
            self.wrong.append(f"{type(error).__name__}: {error}")
        finally:
            self.left -= 1
            faulthandler.dump_traceback_later(HANG, exit=True)
            self._handled.set()


def lightning(root: Path, signals: Signals) -> list[Path]:
    from lightning.pytorch import Callback, Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.demos.boring_classes import BoringModel

    from vembed_async_ckpt.integrations.lightning import VembedCheckpointIO

    class Ending(Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            trainer.should_stop = signals.left == 0

    every = ModelCheckpoint(
        root / "steps", filename="{step}", every_n_train_steps=1, save_top_k=3, monitor="step", mode="max"
    )
    trainer = Trainer(
        accelerator="cpu", max_epochs=-1, min_steps=1, callbacks=[every, Ending()], plugins=[VembedCheckpointIO()], logger=False,
        enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
    )  # fmt: skip

    def save(number: int) -> Path:
        # Every other one beside the checkpoints of the training, under the same lock.
        path = root / ("steps" if number % 2 else "signals") / f"signal-{number}.ckpt"
        trainer.save_checkpoint(path)
        return path

    class Model(BoringModel):
        def on_train_start(self) -> None:
            signals.start()

        def training_step(self, batch: Any, index: int) -> Any:
            self.log("step", float(self.global_step))
            return super().training_step(batch, index)

    signals.save = save
    signals.model = Model()
    trainer.fit(signals.model)
    return [*(root / "steps").glob("*.ckpt"), *(root / "signals").glob("*.ckpt")]


def trainer(root: Path, signals: Signals) -> list[Path]:
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

    from vembed_async_ckpt.integrations.transformers import AsyncCheckpointMixin

    class Async(AsyncCheckpointMixin, Trainer):
        pass

    class Ending(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            signals.start()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = signals.left == 0

    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, num_key_value_heads=2, max_position_embeddings=64, **size))
    data = [{"input_ids": torch.arange(8) % 16, "labels": torch.arange(8) % 16} for _ in range(64)]
    arguments = TrainingArguments(
        str(root), max_steps=100_000, save_steps=1, save_total_limit=3, per_device_train_batch_size=4, report_to=[],
        disable_tqdm=True, use_cpu=True, logging_steps=100_000,
    )  # fmt: skip
    training = Async(model=model, args=arguments, train_dataset=data, callbacks=[Ending()])

    def save(number: int) -> Path:
        step = training.state.global_step
        training._save_checkpoint(training.model, None)
        found = [path for path in root.glob("checkpoint-*") if int(path.name.rpartition("-")[2]) >= step]
        return max(found, key=lambda path: int(path.name.rpartition("-")[2]))

    signals.save, signals.model = save, model
    training.train()
    return list(root.glob("checkpoint-*"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("host", choices=["lightning", "trainer"])
    parser.add_argument("--signals", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    sys.setswitchinterval(0.0001)  # else the thread that sends sees the main thread between its saves only
    faulthandler.dump_traceback_later(HANG, exit=True)
    signals = Signals(options.signals, options.seed)
    with tempfile.TemporaryDirectory() as directory:
        left = {"lightning": lightning, "trainer": trainer}[options.host](Path(directory), signals)
        for path in left:
            verify(path)
        signals.counts["checkpoints whole at the end"] = len(left)
    print(
        json.dumps(
            {"host": options.host, **signals.counts, "refusals": signals.refusals, "wrong": signals.wrong}, indent=2
        )
    )
    return bool(signals.wrong)


if __name__ == "__main__":
    sys.exit(main())
