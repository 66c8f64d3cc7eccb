"""Checks whether many tensors look as they did, with one call if torch has it, else with a loop for each property."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from operator import attrgetter
from typing import Any

import torch


class TensorGuard:
    """Records how tensors look, to check later tensors against it. Keeps none of the tensors.

    The look of a tensor is its type, dtype, device, shape and strides, and whether it is a conjugate, negative or
    inference tensor.
    """

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._count = len(tensors)
        self._looks = _looks(tensors)
        self._check = _make(tensors)

    def holds(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Return whether there are as many tensors, and each looks like the recorded one in its place."""
        if len(tensors) != self._count:
            return False
        if not self._count or (self._check is not None and self._check(*tensors)):
            return True
        if _looks(tensors) != self._looks:
            return False
        # torch's guard also compares what is no part of a look, such as `requires_grad`.
        self._check = _make(tensors)
        return True


_PROPERTIES = (
    type,
    attrgetter("dtype"),
    attrgetter("device"),
    torch.Tensor.size,
    torch.Tensor.is_conj,
    torch.Tensor.is_neg,
    torch.Tensor.is_inference,
)


def _looks(tensors: Sequence[torch.Tensor]) -> list[list[Any]]:
    return [*(list(map(look, tensors)) for look in _PROPERTIES), _strides(tensors)]


def _strides(tensors: Sequence[torch.Tensor]) -> list[Any]:
    try:
        return list(map(torch.Tensor.stride, tensors))
    except RuntimeError:  # some have none: they are sparse or nested
        return [tensor.stride() if tensor.layout is torch.strided else None for tensor in tensors]


def _make(tensors: Sequence[torch.Tensor]) -> Any:
    if _GUARDS is None or not tensors:
        return None
    try:
        return _GUARDS(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None).check
    except Exception:  # a private function of torch may refuse any tensor: then the loops are used
        return None


def _working_guards() -> Any:
    """Return torch's private `TensorGuards`, or None if this version lacks it or it does not notice every difference."""
    try:
        make: Any = importlib.import_module("torch._C._dynamo.guards").TensorGuards
        with torch.device("cpu"):
            known = torch.zeros(2, 3, dtype=torch.complex64)
            with torch.inference_mode():
                inference = torch.zeros(2, 3, dtype=torch.complex64)
            others = [
                known.to(torch.complex128),
                torch.zeros(3, 2, dtype=torch.complex64),
                torch.zeros(3, 2, dtype=torch.complex64).t(),
                known.conj(),
                torch._neg_view(known),
                known.to("meta"),
                inference,
                torch.nn.Parameter(known),
            ]
            check = make(known, dynamic_dims_sizes=None, dynamic_dims_strides=None).check
            if check(known.clone()) is True and not any(check(other) for other in others):
                return make
    except Exception:
        pass  # another version of torch
    return None


_GUARDS = _working_guards()
