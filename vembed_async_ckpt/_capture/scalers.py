"""Reads torch's gradient scalers without waiting for their device.

Their `state_dict()` would wait, to fetch two numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

_KEYS = {"scale": "_scale", "_growth_tracker": "_growth_tracker"}  # {key in the state_dict: attribute}


def numbers_on_device(scaler: Any) -> dict[str, torch.Tensor]:
    """Return the device tensors that are numbers in the scaler's state_dict, by key.

    Returns {} if the scaler is not torch's own, is disabled, or has no such tensors.
    """
    of_torch = isinstance(scaler, torch.amp.GradScaler) and type(scaler).state_dict is torch.amp.GradScaler.state_dict
    if not of_torch or not scaler.is_enabled():
        return {}
    tensors = {key: getattr(scaler, name, None) for key, name in _KEYS.items()}
    found = {key: value for key, value in tensors.items() if isinstance(value, torch.Tensor) and not value.is_cpu}
    return found if len(found) == len(_KEYS) else {}


def without_numbers(scaler: torch.amp.GradScaler) -> dict[str, Any]:
    """Return the state_dict of the scaler, with None in place of these numbers."""
    return {
        "scale": None,
        "growth_factor": scaler.get_growth_factor(),
        "backoff_factor": scaler.get_backoff_factor(),
        "growth_interval": scaler.get_growth_interval(),
        "_growth_tracker": None,
    }


def with_numbers(state: Mapping[str, Any], numbers: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Return the state_dict with the numbers put in."""
    return {**state, **{key: value.item() for key, value in numbers.items()}}
