"""One call that tells whether many tensors look as they did, in place of a loop for each of their properties."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch


class TensorGuard:
    """Whether tensors have the types, dtypes, devices, shapes and strides of those that it was made of, one by one, are conjugate,
    negative or inference tensors where those were, and require gradients where those did. Holds none of them."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._count = len(tensors)
        self._check = _make(tensors) if tensors else None

    def holds(self, tensors: Sequence[torch.Tensor]) -> bool:
        """True if so. False may also mean that it cannot tell, as under autocast: look at the tensors themselves then."""
        return self._check is not None and len(tensors) == self._count and bool(self._check(*tensors))


def _make(tensors: Sequence[torch.Tensor]) -> Any:
    if _GUARDS is None:
        return None
    try:
        return _GUARDS(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None).check
    except Exception:  # it is torch's own and may refuse what it likes: then the loops look
        return None


def _working_guards() -> Any:
    """torch's private `TensorGuards` if this version has it and it notices what it must; else None."""
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
