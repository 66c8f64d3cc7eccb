"""The small values that change with every save: step, RNG, scheduler, scaler, dataloader position, extra.

They are captured by value at the call and rendered to files later, off the training thread. Our own `load` reads one
JSON file, with the tensors beside it in a safetensors file, and one small JSON file for each further rank. For other
programs the same values are in the files that they read (see `dialect`).
"""

from __future__ import annotations

import base64
import functools
import io
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .._format import bounded_json, names, safetensors
from .._format.safetensors import Layout, TensorSpec
from ..errors import CorruptCheckpoint, PlanError
from . import optimizer_pickle, random_state, scalers, tree
from .dialect import Dialect
from .divided_optimizer import DividedOptimizerState
from .dtypes import TO_TORCH, spec
from .optimizer import OptimizerState, call_state_dict, kind_of
from .tree import to_json


@dataclass(frozen=True)
class TrainingState:
    """The captured values.

    `registered`: the objects registered with an accelerator, by file name; None if only a pickle of the object was
        possible.
    `accelerator`: what else an accelerator knows (see `accelerator.state`).
    `classes`: class names of the schedulers and the scaler.
    `tensors`: the tensors found in the values, by name. Those that are not in `copies` are copied before `save()`
        returns. Then all are released.
    `copies`: those of them that are copies already. Pickles for other programs need them later.
    `layout`: the layout of the file with the tensors.
    `scaler_numbers`: keys of the scaler's state that are tensors on a device now and numbers in the files.
    """

    dialect: Dialect
    world_size: int
    step: int | None
    optimizers: Mapping[str, OptimizerState | DividedOptimizerState]
    schedulers: Mapping[str, Any]
    scaler: Any
    dataloader: Any
    extra: Any
    registered: Mapping[str, OptimizerState | None]
    accelerator: Any
    rng: dict[str, Any]
    classes: Mapping[str, Any]
    tensors: dict[str, torch.Tensor]
    copies: dict[str, torch.Tensor]
    layout: Layout
    scaler_numbers: Sequence[str]

    def file_names(self) -> list[str]:
        """Return the names of all files that hold the training state."""
        schedulers = [self.dialect.scheduler(index) for index in range(len(self.schedulers))]
        scaler = [] if self.scaler is None else [names.SCALER]
        ranks = [self.dialect.random_states(rank, self.world_size) for rank in range(self.world_size)]
        return [names.TRAINING_TENSORS, names.TRAINING_STATE, *schedulers, *scaler, *filter(None, ranks)]

    def render(self) -> list[tuple[str, bytes]]:
        """Return (name, bytes) of every file except the one with the tensors.

        The pickles among them are for other programs. Our `load` reads the JSON.
        """
        rng = random_state.as_tree(self.rng)
        files = [(names.TRAINING_STATE, bounded_json.checked(self._json(rng), file=names.TRAINING_STATE))]
        for index, state in enumerate(self.schedulers.values()):
            files.append((self.dialect.scheduler(index), _pickled(state, self.copies)))
        if self.scaler is not None:
            files.append((names.SCALER, _pickled(self._whole_scaler(), self.copies)))
        return files + _pickled_random_states(self.dialect, rng, self.copies, 0, self.world_size)

    def find_numbers(self, staged: Mapping[str, torch.Tensor]) -> None:
        """Take the numbers of the scaler from `staged`.

        `staged` are the tensors in host memory. They are filled by the time `render` is called.
        """
        for key in self.scaler_numbers:
            self.copies[f"scaler.{key}"] = staged[f"scaler.{key}"]

    def _whole_scaler(self) -> Any:
        if not self.scaler_numbers:
            return self.scaler
        return scalers.with_numbers(self.scaler, {key: self.copies[f"scaler.{key}"] for key in self.scaler_numbers})

    def _json(self, rng: dict[str, Any]) -> str:
        optimizers = ",".join(f"{to_json(name)}:{optimizer.described()}" for name, optimizer in self.optimizers.items())
        others = {
            "step": self.step,
            "schedulers": {name: tree.encode(state) for name, state in self.schedulers.items()},
            "scaler": tree.encode(self._whole_scaler()),
            "dataloader": tree.encode(self.dataloader),
            "extra": tree.encode(self.extra),
            "registered": [
                {"file": file, "rest": None if state is None else state.rest()}
                for file, state in self.registered.items()
            ],
            "accelerator": tree.encode(self.accelerator),
            "rng": tree.encode(rng),
            "classes": self.classes,
        }
        return f'{to_json(others)[:-1]},"optimizers":{{{optimizers}}}}}'


def capture(
    dialect: Dialect,
    world_size: int,
    step: int | None,
    optimizers: Mapping[str, OptimizerState | DividedOptimizerState],
    schedulers: Mapping[str, Any],
    scaler: Any,
    dataloader: Any,
    extra: Any,
    registered: Mapping[str, OptimizerState | None],
    accelerator: Any,
) -> TrainingState:
    """Capture everything as it is now. Raises `PlanError` naming the value that cannot be saved."""
    tensors: dict[str, torch.Tensor] = {}
    copies: dict[str, torch.Tensor] = {}

    def put(name: str, tensor: torch.Tensor) -> None:
        if name in tensors:
            raise PlanError(f"two values are named {name!r}; rename a key")
        tensors[name] = tensor.detach()

    def put_copy(name: str, tensor: torch.Tensor) -> None:
        put_fresh(name, tensor.detach().cpu().clone())

    def put_fresh(name: str, tensor: torch.Tensor) -> None:
        copies[name] = tensor
        put(name, tensor)

    captured = {
        name: tree.capture(
            _state_dict(f"scheduler {name}".rstrip(), scheduler), f"scheduler.{name}", tree.sharing(put_copy)
        )
        for name, scheduler in schedulers.items()
    }
    numbers: Mapping[str, torch.Tensor] = {} if scaler is None else scalers.numbers_on_device(scaler)
    saved_scaler = (
        None if scaler is None else tree.capture(_scaler_state(scaler, numbers), "scaler", tree.sharing(put_copy))
    )
    for key, number in numbers.items():
        put(f"scaler.{key}", number)
    position = (
        None
        if dataloader is None
        else tree.capture(_state_dict("dataloader", dataloader), "dataloader", tree.sharing(put))
    )
    captured_extra = tree.capture({} if extra is None else extra, "extra", tree.sharing(put))
    captured_accelerator = tree.capture(accelerator, "accelerator", put)
    rng = random_state.capture(put_fresh)
    specs = tuple(spec(name, tensor, file=names.TRAINING_TENSORS) for name, tensor in tensors.items())
    return TrainingState(
        dialect=dialect,
        world_size=world_size,
        step=step,
        optimizers=optimizers,
        schedulers=captured,
        scaler=saved_scaler,
        dataloader=position,
        extra=captured_extra,
        registered=registered,
        accelerator=captured_accelerator,
        rng=rng,
        classes={
            "schedulers": {name: kind_of(unwrap_scheduler(scheduler)) for name, scheduler in schedulers.items()},
            "in_schedulers": {
                name: kinds_inside(unwrap_scheduler(scheduler)) for name, scheduler in schedulers.items()
            },
            "scaler": None if scaler is None else kind_of(scaler),
        },
        tensors=tensors,
        copies=copies,
        layout=_layout(specs),
        scaler_numbers=tuple(numbers),
    )


def _scaler_state(scaler: Any, numbers: Mapping[str, torch.Tensor]) -> Any:
    return scalers.without_numbers(scaler) if numbers else _state_dict("scaler", scaler)


def unwrap_scheduler(scheduler: Any) -> Any:
    """Return the scheduler inside accelerate's own wrapper, which has the same state_dict.

    Any other object is returned as it is.
    """
    accelerate = sys.modules.get("accelerate.scheduler")
    while accelerate is not None and isinstance(scheduler, accelerate.AcceleratedScheduler):
        scheduler = scheduler.scheduler
    return scheduler


def kinds_inside(scheduler: Any) -> list[Any]:
    """Return [class name, kinds inside it] of each scheduler inside a `SequentialLR` or `ChainedScheduler`."""
    inside = getattr(scheduler, "_schedulers", None)
    return [[kind_of(each), kinds_inside(each)] for each in inside] if isinstance(inside, list | tuple) else []


@functools.lru_cache(maxsize=8)
def _layout(specs: tuple[TensorSpec, ...]) -> Layout:
    return safetensors.layout(specs, {"format": "pt"}, file=names.TRAINING_TENSORS)


def _state_dict(what: str, owner: Any) -> Any:
    if not callable(getattr(owner, "state_dict", None)):
        raise PlanError(
            f"{what}: a {type(owner).__module__}.{type(owner).__qualname__} has no state_dict(); "
            "put what must be restored into extra="
        )
    return call_state_dict(what, owner)


@dataclass(frozen=True)
class RankState:
    """What a rank that writes no checkpoint adds to it: its random states and its dataloader position."""

    dialect: Dialect
    rng: Any
    dataloader: Any
    tensors: Mapping[str, torch.Tensor]

    def render(self, rank: int, world_size: int) -> list[tuple[str, bytes]]:
        """Return (name, bytes) of the rank's files."""
        file, rng = names.rank_state(rank), random_state.as_tree(self.rng)
        body = {
            "rng": tree.encode(rng),
            "dataloader": tree.encode(self.dataloader),
            "tensors": {name: _inline(tensor) for name, tensor in self.tensors.items()},
        }
        return [
            (file, bounded_json.dumps(body, file=file)),
            *_pickled_random_states(self.dialect, rng, self.tensors, rank, world_size),
        ]


def capture_rank(dialect: Dialect, dataloader: Any) -> RankState:
    """Capture the state of this rank as it is now. Raises `PlanError` naming the value that cannot be saved."""
    tensors: dict[str, torch.Tensor] = {}

    def put(name: str, tensor: torch.Tensor) -> None:
        tensors[name] = tensor

    position = None
    if dataloader is not None:
        state = _state_dict("dataloader", dataloader)
        put_copy = tree.sharing(lambda name, tensor: put(name, tensor.detach().cpu().clone()))
        position = tree.capture(state, "dataloader", put_copy)
    rng = random_state.capture(put)
    return RankState(dialect, rng, position, tensors)


def parse_rank(body: Any) -> tuple[Any, Any]:
    """Return (random states, dataloader position) of a rank from the JSON of its file. Raises `CorruptCheckpoint`."""
    try:
        tensors = {name: _outline(*entry) for name, entry in body["tensors"].items()}
        return tree.decode(body["rng"], tensors.__getitem__), tree.decode(body["dataloader"], tensors.__getitem__)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise CorruptCheckpoint(f"the state of a rank cannot be read: {error!r}") from error


def _inline(tensor: torch.Tensor) -> list[Any]:
    described = spec("state", tensor, file="rank state")
    data = bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    return [described.dtype, list(described.shape), base64.b64encode(data).decode()]


def _outline(dtype: str, shape: list[int], data: str) -> torch.Tensor:
    raw = bytearray(base64.b64decode(data, validate=True))
    flat = torch.frombuffer(raw, dtype=TO_TORCH[dtype]) if raw else torch.empty(0, dtype=TO_TORCH[dtype], device="cpu")
    return flat.reshape(shape)


def _pickled_random_states(
    dialect: Dialect, state: dict[str, Any], tensors: Mapping[str, torch.Tensor], rank: int, world_size: int
) -> list[tuple[str, bytes]]:
    name = dialect.random_states(rank, world_size)
    return [] if name is None else [(name, _pickled(dialect.random_values(state, world_size), tensors))]


def _pickled(captured: Any, tensors: Mapping[str, torch.Tensor]) -> bytes:
    """Return what `torch.save` would write for a captured tree, in a tenth of the time if all tensors are contiguous."""
    if all(tensors[ref.name].is_contiguous() for ref in tree.refs(captured)):
        return optimizer_pickle.file(captured, tensors)
    return torch_save(tree.refill(captured, lambda name: tensors[name]))


def torch_save(value: Any) -> bytes:
    """Return the bytes that `torch.save` writes for `value`."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def rough_size(state: TrainingState, further: Sequence[bytes]) -> int:
    """Return an upper bound, in bytes, for what `render` will return plus the `further` files."""
    values = [state.schedulers, state.scaler, state.dataloader, state.extra, state.accelerator]
    captured = tree.rough_size(values)
    captured += sum(o.rough_size for o in (*state.optimizers.values(), *filter(None, state.registered.values())))
    return (512 << 10) + 2 * captured + sum(len(data) + 4096 for data in further)
