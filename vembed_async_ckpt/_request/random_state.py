"""The state of every random number generator of the process: captured at the call, cheap; serialized later."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

from . import tree


def capture(put: tree.Put) -> dict[str, Any]:
    """The generators of python, numpy, torch and its CUDA devices, as a captured tree; tensors go to `put`."""
    kind, keys, *rest = np.random.get_state()
    put("rng.numpy", torch.from_numpy(keys))
    put("rng.torch", torch.get_rng_state())
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (kind, tree.Ref("rng.numpy", numpy=True), *rest),
        "torch": tree.Ref("rng.torch"),
    }
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        state["cuda"] = [tree.Ref(f"rng.cuda.{n}") for n in range(torch.cuda.device_count())]
        for ref, value in zip(state["cuda"], torch.cuda.get_rng_state_all(), strict=True):
            put(ref.name, value)
    return state


def restore(state: dict[str, Any]) -> None:
    """Set every generator that `state`, as decoded, has and this process has too."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available() and torch.cuda.device_count() == len(state["cuda"]):
        torch.cuda.set_rng_state_all(state["cuda"])
