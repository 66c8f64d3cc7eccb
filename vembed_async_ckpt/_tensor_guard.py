"""Checks with one call whether many tensors look as they did, instead of with a loop for each property."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch


class TensorGuard:
    """Records how tensors look, to check later tensors against it. Keeps none of the tensors.

    It records type, dtype, device, shape and strides of each tensor, whether it is a conjugate, negative or inference
    tensor, and whether it requires gradients.
    """

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._count = len(tensors)
        self._check = _make(tensors) if tensors else None

    def holds(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Return True if each tensor looks like the recorded one in its place.

        False may also mean that this cannot tell, for example under autocast. Then compare the tensors themselves.
        """
        return self._check is not None and len(tensors) == self._count and bool(self._check(*tensors))


def _make(tensors: Sequence[torch.Tensor]) -> Any:
    if _GUARDS is None:
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
            if check(known.clone()) is True and not any(map(check, others)):
                return make
    except Exception:
        pass  # another version of torch
    return None


_GUARDS = _working_guards()
