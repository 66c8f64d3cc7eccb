"""The state of every random number generator of the process.

Captured at the call, which is cheap, and serialized later.
"""

from __future__ import annotations

import hashlib
import random
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..errors import CorruptCheckpoint
from . import mersenne, tree

_OF_THE_HOST = ("python", "numpy", "torch")
_warned: set[str] = set()


def capture(put: tree.Put) -> dict[str, Any]:
    """Return the states of the generators of python, numpy, torch and its accelerator, for `as_tree`.

    Tensors go to `put`. The states for a type of device are under its name, one for each device.
    """
    put("rng.torch", torch.get_rng_state())
    state: dict[str, Any] = {
        "python": mersenne.of_python() or random.getstate(),
        "numpy": _of_numpy(put),
        "torch": tree.Ref("rng.torch"),
    }
    device = torch.accelerator.current_accelerator()
    if device is not None and _is_initialized(device.type):
        values = _states(device.type)
        state[device.type] = [tree.Ref(f"rng.{device.type}.{n}") for n in range(len(values))]
        for ref, value in zip(state[device.type], values, strict=True):
            put(ref.name, value)
    return state


def as_tree(state: dict[str, Any]) -> dict[str, Any]:
    """Return what `capture` returned as a captured tree. This takes longer than the capture, and may come later."""
    python = state["python"]
    return {**state, "python": python.value() if isinstance(python, mersenne.PythonState) else python}


def _of_numpy(put: tree.Put) -> Any:
    read = mersenne.of_numpy()
    if read is not None:
        put("rng.numpy", torch.from_numpy(read[0]))
        return ("MT19937", tree.Ref("rng.numpy", numpy=True), *read[1:])
    state = np.random.get_state(legacy=False)
    if state["bit_generator"] != "MT19937":  # another one, set with `np.random.set_bit_generator`
        return tree.capture(state, "rng.numpy", put)
    put("rng.numpy", torch.from_numpy(state["state"]["key"]))
    # the tuple that `np.random.get_state()` would return, which takes as long again
    keys = tree.Ref("rng.numpy", numpy=True)
    return (state["bit_generator"], keys, state["state"]["pos"], state["has_gauss"], state["gauss"])


def of_devices(state: dict[str, Any]) -> dict[str, Any]:
    """Return the generator states of devices, by the type of the device."""
    return {kind: value for kind, value in state.items() if kind not in _OF_THE_HOST}


def _is_initialized(kind: str) -> bool:
    module = getattr(torch, kind, None)
    initialized = getattr(module, "is_initialized", None)
    return module is not None and (initialized is None or bool(initialized()))


def _states(kind: str) -> Sequence[torch.Tensor]:
    get_all = getattr(getattr(torch, kind), "get_rng_state_all", None)
    if get_all is not None:
        return list(get_all())
    if kind not in _warned:
        _warned.add(kind)
        warnings.warn(
            f"torch.{kind} does not give the states of its random generators: checkpoints go without them, and a resumed run draws "
            f"other numbers on {kind} devices",
            stacklevel=2,
        )
    return []


def checked(state: Any, where: str) -> dict[str, Any]:
    """Return the decoded `state`. Raises `CorruptCheckpoint` if a generator of the host would not take it."""
    try:
        random.Random().setstate(state["python"])
        torch.Generator().set_state(state["torch"])
        numpy = state["numpy"]
        kind = getattr(np.random, numpy["bit_generator"] if isinstance(numpy, dict) else numpy[0])
        if not issubclass(kind, np.random.BitGenerator):
            raise TypeError(f"numpy has no generator {kind.__name__}")
        np.random.RandomState(kind(0)).set_state(numpy)
        for kind, states in of_devices(state).items():
            if not isinstance(states, list) or not all(isinstance(value, torch.Tensor) for value in states):
                raise TypeError(f"the states of {kind} devices are no tensors")
        return dict(state)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise CorruptCheckpoint(f"{where}: the random states cannot be used: {error}") from error


def restore(state: dict[str, Any]) -> None:
    """Set every generator in the decoded `state` that this process has too. Warns of those that differ."""
    random.setstate(state["python"])
    _set_numpy(state["numpy"])
    torch.set_rng_state(state["torch"])
    for kind, states in of_devices(state).items():
        module = getattr(torch, kind, None)
        available = getattr(module, "is_available", None)
        here = int(module.device_count()) if module is not None and available is not None and available() else 0
        for number, value in enumerate(states[:here]):
            module.set_rng_state(value, number)  # type: ignore[union-attr]
        if len(states) != here:
            warnings.warn(
                f"random generators of {len(states)} {kind} devices were saved, this process has {here}: those of the first "
                f"{min(here, len(states))} were restored; on others it draws other numbers than the run that was saved",
                stacklevel=4,
            )


def derived(state: dict[str, Any], rank: int) -> dict[str, Any]:
    """Return random states for a rank of which none were saved, made from the decoded `state` of the first rank.

    They are the same for every load, and other ones for every rank.
    """
    seed = int.from_bytes(hashlib.sha256(b"%d " % rank + bytes(state["torch"].numpy())).digest()[:8], "little") >> 1
    numpy = state["numpy"]
    legacy = not isinstance(numpy, dict)
    kind = getattr(np.random, numpy[0] if legacy else numpy["bit_generator"])
    of_numpy = np.random.RandomState(kind(seed))
    return {
        "python": random.Random(seed).getstate(),
        "numpy": of_numpy.get_state() if legacy else of_numpy.get_state(legacy=False),
        "torch": torch.Generator().manual_seed(seed).get_state(),
        **{
            device: [
                torch.Generator(torch.device(device, number)).manual_seed(seed).get_state()
                for number in range(len(states))
            ]
            for device, states in of_devices(state).items()
            if getattr(getattr(torch, device, None), "device_count", int)() >= len(states)
        },
    }


def _set_numpy(state: Any) -> None:
    saved = state["bit_generator"] if isinstance(state, dict) else state[0]
    here = np.random.get_state(legacy=False)["bit_generator"]
    if saved == here:
        np.random.set_state(state)
        return
    warnings.warn(
        f"numpy's random generator was saved as a {saved}, this process has a {here}: it was not restored; call "
        f"np.random.set_bit_generator(np.random.{saved}()) before load()",
        stacklevel=5,
    )
