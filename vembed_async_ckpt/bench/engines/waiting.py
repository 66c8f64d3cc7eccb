"""Ways of saving that training waits for."""

from __future__ import annotations

import os
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from ..engine import Engine, Handle


class Original(Engine):
    """What vembed's `save_checkpoint` does, without accelerate: its `save_state` writes weights and optimizer, then
    `save_pretrained` the weights again, to the same file."""

    def save(self, number: int) -> Handle:
        path = self.path(number)
        os.makedirs(path)
        self._weights(path)
        torch.save(self.state.optimizer.state_dict(), os.path.join(path, "optimizer.bin"))
        self._weights(path)
        return Handle()

    def _weights(self, path: str) -> None:
        model: Any = self.state.model
        if hasattr(model, "save_pretrained"):
            model.save_pretrained(path)
        else:
            save_file(model.state_dict(), os.path.join(path, "model.safetensors"))

    def load(self, number: int) -> None:
        path = self.path(number)
        weights = load_file(os.path.join(path, "model.safetensors"))
        self.state.model.load_state_dict(weights, strict=False)  # of tied weights one name is in the file
        self.state.optimizer.load_state_dict(torch.load(os.path.join(path, "optimizer.bin")))


class TorchSave(Engine):
    """One `torch.save` of model and optimizer."""

    def file(self, number: int) -> str:
        return os.path.join(self.path(number), "state.pt")

    def save(self, number: int) -> Handle:
        os.makedirs(self.path(number))
        torch.save(self.state.state_dict(), self.file(number))
        return Handle()

    def load(self, number: int) -> None:
        found = torch.load(self.file(number))
        self.state.model.load_state_dict(found["model"])
        self.state.optimizer.load_state_dict(found["optimizer"])


class Safetensors(Engine):
    """One `safetensors.torch.save_file` of every tensor."""

    def file(self, number: int) -> str:
        return os.path.join(self.path(number), "model.safetensors")

    def save(self, number: int) -> Handle:
        os.makedirs(self.path(number))
        flat = self.state.flat()
        once = {tensor.data_ptr() or id(tensor): name for name, tensor in reversed(flat.items())}
        save_file({name: flat[name].contiguous() for name in once.values()}, self.file(number))
        return Handle()

    def load(self, number: int) -> None:
        found, flat = load_file(self.file(number)), self.state.flat()
        with torch.no_grad():
            for name, tensor in found.items():
                flat[name].copy_(tensor)


class Accelerate(Engine):
    """`Accelerator.save_state` of the prepared model and optimizer."""

    def prepare(self) -> None:
        from accelerate import Accelerator

        self.accelerator = Accelerator(cpu=self.state.device.type == "cpu")
        self.accelerator.prepare(self.state.model, self.state.optimizer)

    def save(self, number: int) -> Handle:
        self.accelerator.save_state(self.path(number))
        return Handle()

    def load(self, number: int) -> None:
        self.accelerator.load_state(self.path(number))


class HuggingFaceTrainer(Engine):
    """What transformers' Trainer does at a save step, through its own method, which has no public name."""

    def prepare(self) -> None:
        from transformers import Trainer, TrainingArguments

        arguments: Any = TrainingArguments(
            output_dir=self.directory, use_cpu=self.state.device.type == "cpu", report_to="none"
        )
        scheduler = torch.optim.lr_scheduler.LambdaLR(self.state.optimizer, lambda step: 1.0)
        self.trainer: Any = Trainer(
            model=self.state.model, args=arguments, optimizers=(self.state.optimizer, scheduler)
        )

    def save(self, number: int) -> Handle:
        self.trainer.state.global_step = number
        self.trainer._save_checkpoint(self.state.model, None)
        return Handle()

    def load(self, number: int) -> None:
        self.trainer._load_from_checkpoint(self.path(number))
        self.trainer._load_optimizer_and_scheduler(self.path(number))
