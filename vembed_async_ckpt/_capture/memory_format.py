"""Memory formats: the strides of dense tensors, and the order of their elements in memory.

A tensor is *dense* if its elements fill its memory without gaps and without overlap: contiguous, channels_last,
transposed. The strides of a dense tensor are kept exactly. Any other tensor (a slice with gaps, an expanded one) gets
the strides that `clone()` would give it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

Strides = tuple[int, ...]


def contiguous(shape: Sequence[int]) -> Strides:
    """Return the strides of a contiguous tensor of this shape."""
    strides, step = [], 1
    for n in reversed(shape):
        strides.append(step)
        step *= max(n, 1)
    return tuple(strides[::-1])


def is_dense(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Return whether the elements of a tensor with these strides fill its memory without gaps and without overlap."""
    if 0 in shape:
        return True
    expected = 1
    for stride, n in sorted((stride, n) for stride, n in zip(strides, shape, strict=True) if n != 1):
        if stride != expected:
            return False
        expected *= n
    return True


def kept(tensor: torch.Tensor) -> Strides | None:
    """Return the strides with which `tensor` is saved, or None if they are those of a contiguous tensor."""
    strides = tensor.stride()
    if not is_dense(tensor.shape, strides):
        strides = torch.empty_like(tensor, device="meta").stride()
    return None if strides == contiguous(tensor.shape) else tuple(strides)


def checked(shape: Sequence[int], strides: Any) -> Strides:
    """Check strides that were read from a file.

    Raises `ValueError` or `TypeError` if no dense tensor of this shape has them.
    """
    if not all(type(n) is int and 0 <= n < 1 << 63 for n in strides) or not is_dense(shape, strides):
        raise ValueError(f"its strides are {str(strides)[:60]}")
    return tuple(strides)


def order(strides: Sequence[int]) -> Strides:
    """Return the dimensions from the outermost in memory to the innermost.

    A dense tensor permuted in this order is contiguous.
    """
    return tuple(sorted(range(len(strides)), key=lambda dimension: -strides[dimension]))


def restored(tensor: torch.Tensor, strides: Sequence[int]) -> torch.Tensor:
    """Return `tensor` with these strides: the tensor itself if it has them, else a copy."""
    if tensor.stride() == tuple(strides):
        return tensor
    return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device).copy_(tensor)
