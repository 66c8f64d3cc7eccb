"""State_dicts that a caller passes as plain mappings. There is no module to look into, only names and tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from .._format import names
from .._format.plan import TensorContent
from .._tensor_guard import TensorGuard
from .dtypes import spec
from .model import ModelState


@dataclass(frozen=True)
class StateDict:
    """The state_dict of a model, passed in the place of the model."""

    tensors: Mapping[str, torch.Tensor]


class MappingReader:
    """Reads one state_dict repeatedly.

    The content is the same object as long as names, dtypes and shapes are the same.
    """

    def __init__(self, file: str = names.WEIGHTS) -> None:
        self._file = file
        self._content = TensorContent(file, ())
        self._looks = TensorGuard([])

    def read(self, tensors: Mapping[str, torch.Tensor]) -> ModelState:
        """Return the tensors as they are now, in one file. Tied tensors are stored once, under their first name.

        Raises `PlanError` naming the tensor that cannot be saved.
        """
        specs = {name: spec(name, tensor, file=self._file) for name, tensor in tensors.items()}
        first: dict[object, str] = {}
        ties = {}
        for name, tensor in tensors.items():
            kept = first.setdefault(_place(name, tensor), name)
            if kept != name:
                ties[name] = kept
        stored = {name: tensor.detach() for name, tensor in tensors.items() if name not in ties}
        content = TensorContent(self._file, tuple(specs[name] for name in stored), {"format": "pt"})
        if content != self._content:
            self._content = content
        live = list(stored.values())
        if not self._looks.holds(live):
            self._looks = TensorGuard(live)
        return ModelState(
            contents=(self._content,),
            tensors=live,
            labels=[f"{self._file}: {name}" for name in stored],
            owners=[None] * len(stored),
            volatile=frozenset(),
            names={
                "files": [self._file],
                "uncovered": [],
                "renamed": {},
                "ties": ties,
                "computed": {},
                "by_name": True,
                "left_out": [],
            },
            looks=self._looks,
        )


def _place(name: str, tensor: torch.Tensor) -> object:
    """Return a value that is equal for tensors with the same elements of the same memory."""
    if tensor.numel() == 0:
        return name
    return (
        tensor.device,
        tensor.data_ptr(),
        tensor.dtype,
        tensor.shape,
        tensor.stride(),
        tensor.is_conj(),
        tensor.is_neg(),
    )
