"""Plans the optimizer state of parameters that are divided among ranks: it is divided like the parameter."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

import torch

from .._capture.shares import Share, is_dtensor
from ..errors import CheckpointError
from .targets import Targets
from .tensors import Move, Saved, region_moves


def plan_state(
    targets: Targets,
    what: str,
    parameter: torch.Tensor,
    field: str,
    saved: Saved,
    kept: torch.Tensor | None,
    home: torch.device,
) -> tuple[torch.Tensor, list[Move]] | None:
    """Plan one tensor of the state of a parameter. Returns the state tensor for this rank, and the moves that fill it.

    `what`: the name of the tensor in errors.
    `kept`: the tensor that the optimizer has now, if it may be overwritten. It is used if it fits.
    `home`: the device for a new one.

    Returns None if the tensor is whole on every rank: the parameter is, or the tensor is a number such as `step`.
    Raises `CheckpointError` for a tensor that cannot be divided like the parameter.
    """
    share = targets.share(what, parameter)
    if share is None or field == "step":
        return None
    if saved.shape == share.shape:
        value = kept if kept is not None and _is_like(kept, parameter, share, saved.dtype) else None
        if value is None:
            value = _as_state(torch.empty_like(share.local, dtype=saved.dtype, device=home), parameter)
        pieces = share.pieces(local_part(value))
        return value, [move for region, piece in pieces for move in region_moves(piece, saved, region)]
    if not saved.shape:
        return None
    if not is_dtensor(parameter):
        raise CheckpointError(
            f"{what} has shape {saved.shape}, its parameter {share.shape}: FSDP version 1 cannot divide it like the parameter; "
            "use FSDP2 (fsdp_version: 2), or load without optimizer="
        )
    # What an optimizer makes of a DTensor with another shape is whole on every rank, unless it says otherwise.
    value = kept if kept is not None and is_dtensor(kept) and tuple(kept.shape) == saved.shape else None
    if value is None:
        value = _whole(saved.empty(home), parameter)
    pieces = targets.state_share(what, value, parameter).pieces()
    return value, [move for region, piece in pieces for move in region_moves(piece, saved, region)]


def refuse_nested(what: str, entry: Mapping[Any, Any]) -> None:
    """Raise `CheckpointError` if the state of a divided parameter has tensors inside other values."""
    for key, value in entry.items():
        if _holds_tensors(value):
            raise CheckpointError(
                f"{what}.{key} holds tensors inside a {type(value).__name__}, and its parameter is divided among the ranks: it "
                "cannot be divided like the parameter; load without optimizer="
            )


def _holds_tensors(value: Any) -> bool:
    if isinstance(value, list | tuple | deque | dict):
        inside = value.values() if isinstance(value, dict) else value
        return any(isinstance(each, torch.Tensor) or _holds_tensors(each) for each in inside)
    return False


def _is_like(kept: torch.Tensor, parameter: Any, share: Share, dtype: torch.dtype) -> bool:
    """Return whether a state tensor is divided like its parameter."""
    if is_dtensor(kept) != is_dtensor(parameter) or kept.dtype is not dtype:
        return False
    if is_dtensor(kept) and (kept.device_mesh, kept.placements) != (parameter.device_mesh, parameter.placements):  # type: ignore[attr-defined]
        return False
    return local_part(kept).shape == share.local.shape


def local_part(value: Any) -> torch.Tensor:
    """Return what this rank holds of a tensor, as a plain tensor."""
    if not is_dtensor(value):
        return value  # type: ignore[no-any-return]
    with torch.no_grad():
        return value.to_local()  # type: ignore[no-any-return]


def _as_state(local: torch.Tensor, parameter: Any) -> torch.Tensor:
    """Return the state tensor of which this rank holds `local`, divided like the parameter."""
    if not is_dtensor(parameter):
        return local
    return _dtensor(local, parameter.device_mesh, parameter.placements, parameter.shape, parameter.stride())


def _whole(local: torch.Tensor, parameter: Any) -> torch.Tensor:
    from torch.distributed.tensor import Replicate

    mesh = parameter.device_mesh
    return _dtensor(local, mesh, [Replicate()] * mesh.ndim, local.shape, local.stride())


def _dtensor(local: torch.Tensor, mesh: Any, placements: Any, shape: Any, stride: Any) -> torch.Tensor:
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(local, mesh, placements, run_check=False, shape=shape, stride=stride)  # type: ignore[no-any-return, no-untyped-call, unused-ignore]
