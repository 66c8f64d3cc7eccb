"""What is small and changes with every save: step, RNG, scheduler, scaler, dataloader position, extra.

Captured by value at the call; rendered to files later, off the training thread. For our own `load` it is one JSON file with its
tensors beside it in safetensors; for `accelerator.load_state` the same values stand in the files that accelerate reads.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .._plan import safetensors
from .._plan.safetensors import Layout
from .._store import names
from ..errors import PlanError
from . import random_state, tree
from .dtypes import spec
from .optimizer import OptimizerState


@dataclass(frozen=True)
class TrainingState:
    """Captured values. `tensors` are those found in them, by name: they are copied before `save()` returns, and then let go.
    `copies` are copies of those that pickles for accelerate need later. `layout` is the file that holds the tensors."""

    step: int | None
    optimizers: Mapping[str, OptimizerState]
    schedulers: Mapping[str, Any]
    scaler: Any
    dataloader: Any
    extra: Any
    rng: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    copies: Mapping[str, torch.Tensor]
    layout: Layout

    def file_names(self) -> list[str]:
        """Names of all files that hold the training state."""
        schedulers = [names.scheduler(index) for index in range(len(self.schedulers))]
        scaler = [] if self.scaler is None else [names.SCALER]
        return [names.TRAINING_TENSORS, names.TRAINING_STATE, *schedulers, *scaler, names.random_states(0)]

    def render(self, rank: int = 0) -> list[tuple[str, bytes]]:
        """(name, bytes) of every file but the tensors'. Pickles in them are for accelerate; our `load` reads the JSON."""

        def get(name: str) -> torch.Tensor:
            return self.copies[name]

        files = [(names.TRAINING_STATE, json.dumps(self._json(), separators=(",", ":")).encode())]
        for index, state in enumerate(self.schedulers.values()):
            files.append((names.scheduler(index), _torch_save(tree.refill(state, get))))
        if self.scaler is not None:
            files.append((names.SCALER, _torch_save(tree.refill(self.scaler, get))))
        rng = random_state.for_accelerate(tree.refill(self.rng, get), self.step)
        files.append((names.random_states(rank), _torch_save(rng)))
        return files

    def _json(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "optimizers": {
                name: {"file": optimizer.content.name, "rest": optimizer.rest()}
                for name, optimizer in self.optimizers.items()
            },
            "schedulers": {name: tree.encode(state) for name, state in self.schedulers.items()},
            "scaler": tree.encode(self.scaler),
            "dataloader": tree.encode(self.dataloader),
            "extra": tree.encode(self.extra),
            "rng": tree.encode(self.rng),
        }


def capture(
    step: int | None,
    optimizers: Mapping[str, OptimizerState],
    schedulers: Mapping[str, Any],
    scaler: Any,
    dataloader: Any,
    extra: Any,
) -> TrainingState:
    """Everything as it is now. Raises `PlanError` naming the value that cannot be saved."""
    tensors: dict[str, torch.Tensor] = {}
    copies: dict[str, torch.Tensor] = {}

    def put(name: str, tensor: torch.Tensor) -> None:
        if name in tensors:
            raise PlanError(f"two values are named {name!r}; rename a key")
        tensors[name] = tensor.detach()

    def put_copy(name: str, tensor: torch.Tensor) -> None:
        copies[name] = tensor.detach().cpu().clone()
        put(name, copies[name])

    captured = {
        name: tree.capture(_state_dict(f"scheduler {name}".rstrip(), scheduler), f"scheduler.{name}", put_copy)
        for name, scheduler in schedulers.items()
    }
    saved_scaler = None if scaler is None else tree.capture(_state_dict("scaler", scaler), "scaler", put_copy)
    position = None if dataloader is None else tree.capture(_state_dict("dataloader", dataloader), "dataloader", put)
    captured_extra = tree.capture({} if extra is None else extra, "extra", put)
    rng = random_state.capture(put_copy)
    specs = [spec(name, tensor, file=names.TRAINING_TENSORS) for name, tensor in tensors.items()]
    return TrainingState(
        step=step,
        optimizers=optimizers,
        schedulers=captured,
        scaler=saved_scaler,
        dataloader=position,
        extra=captured_extra,
        rng=rng,
        tensors=tensors,
        copies=copies,
        layout=safetensors.layout(specs, {"format": "pt"}, file=names.TRAINING_TENSORS),
    )


def _state_dict(what: str, owner: Any) -> Any:
    if not callable(getattr(owner, "state_dict", None)):
        raise PlanError(
            f"{what}: a {type(owner).__module__}.{type(owner).__qualname__} has no state_dict(); "
            "put what must be restored into extra="
        )
    return owner.state_dict()


def _torch_save(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def rough_size(state: TrainingState, further: Sequence[bytes]) -> int:
    """An upper bound, in bytes, for what `render` will give and for the `further` files."""
    values = [state.schedulers, state.scaler, state.dataloader, state.extra]
    for optimizer in state.optimizers.values():
        values += [value for key, value in optimizer.tree.items() if key != "state" or optimizer.state_pickle is None]
    return (512 << 10) + 2 * tree.rough_size(values) + sum(len(data) + 4096 for data in further)
