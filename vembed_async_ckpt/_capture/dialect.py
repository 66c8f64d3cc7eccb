"""The files that other programs resume from, in addition to our own: their names, and their form of the random states.

Sources: `accelerate/checkpointing.py` (save_accelerator_state), `transformers/trainer.py` (_save_rng_state).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from .._format import names
from ..errors import PlanError
from .random_state import of_devices


class Dialect(ABC):
    """The files of one program. An object is named by its index in the order given to `save()`."""

    @abstractmethod
    def optimizer(self, index: int) -> str: ...

    @abstractmethod
    def scheduler(self, index: int) -> str: ...

    @abstractmethod
    def random_states(self, rank: int, world_size: int) -> str | None:
        """Return the name of the file with the random states of a rank, or None if there is no such file."""

    @abstractmethod
    def random_values(self, state: dict[str, Any], world_size: int) -> dict[str, Any]:
        """Return what is pickled into that file.

        `state` comes from `random_state.as_tree`.
        """


@dataclass(frozen=True)
class Accelerate(Dialect):
    """The files of accelerate.

    `step`: the accelerator's own micro-batch counter, with which it schedules gradient accumulation.
    """

    step: int = 0

    def optimizer(self, index: int) -> str:
        return names.optimizer(index)

    def scheduler(self, index: int) -> str:
        return names.scheduler(index)

    def random_states(self, rank: int, world_size: int) -> str:
        return names.random_states(rank)

    def random_values(self, state: dict[str, Any], world_size: int) -> dict[str, Any]:
        values = {
            "step": self.step,
            "random_state": state["python"],
            "numpy_random_seed": state["numpy"],
            "torch_manual_seed": state["torch"],
        }
        for kind, states in of_devices(state).items():
            values[f"torch_{kind}_manual_seed"] = states
        return values


@dataclass(frozen=True)
class Trainer(Dialect):
    """The files of transformers' Trainer, which has one optimizer and one scheduler.

    `device`: the index of this process's CUDA device. None saves the state of all devices, as under torchrun.
    `random`: whether random states are saved (not with `save_only_model`).
    """

    device: int | None = 0
    random: bool = True

    def optimizer(self, index: int) -> str:
        return _only(names.TRAINER_OPTIMIZER, index)

    def scheduler(self, index: int) -> str:
        return _only(names.TRAINER_SCHEDULER, index)

    def random_states(self, rank: int, world_size: int) -> str | None:
        return names.trainer_random_states(rank, world_size) if self.random else None

    def random_values(self, state: dict[str, Any], world_size: int) -> dict[str, Any]:
        values = {"python": state["python"], "numpy": state["numpy"], "cpu": state["torch"]}
        for kind, states in of_devices(state).items():
            values[kind] = states if world_size > 1 or self.device is None else states[self.device]
        return values


@dataclass(frozen=True)
class Own(Dialect):
    """No other program: only our own `load` resumes from the checkpoint."""

    def optimizer(self, index: int) -> str:
        return names.optimizer(index)

    def scheduler(self, index: int) -> str:
        return names.scheduler(index)

    def random_states(self, rank: int, world_size: int) -> None:
        return None

    def random_values(self, state: dict[str, Any], world_size: int) -> dict[str, Any]:
        return {}


def _only(name: str, index: int) -> str:
    if index:
        raise PlanError(f"{name}: transformers' Trainer has one optimizer and one scheduler, not several")
    return name
