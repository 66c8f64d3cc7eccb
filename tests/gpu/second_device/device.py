"""Builds the second device type and makes it known to torch in this process."""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

NAME = "second"
DEVICES = 2
_SOURCE = Path(__file__).with_name("device.cpp")


def build(cache: Path) -> Path:
    """The shared library, from `cache` if it was built there for this source and this torch. Takes about ten seconds."""
    key = hashlib.sha256(_SOURCE.read_bytes() + torch.__version__.encode()).hexdigest()[:16]
    library = cache / f"second_device_{key}.so"
    if not library.exists():
        cache.mkdir(parents=True, exist_ok=True)
        home = Path(torch.__file__).parent
        ours = library.with_suffix(f".{os.getpid()}")
        include = [f"-I{home / 'include'}", f"-I{home / 'include/torch/csrc/api/include'}"]
        link = [f"-L{home / 'lib'}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{home / 'lib'}"]
        flags = ["-shared", "-fPIC", "-O0", "-w", "-std=c++20"]
        subprocess.run(["g++", *flags, *include, str(_SOURCE), "-o", str(ours), *link], check=True, timeout=250)
        ours.replace(library)
    return library


class Control:
    """What the device counts, and how it behaves."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        self._library.second_device_slow_copies.argtypes = [ctypes.c_double]
        self._library.second_device_fail_after.argtypes = [ctypes.c_long]
        for name in ("copies_out", "queued", "released_early", "has_context", "pending"):
            getattr(self._library, f"second_device_{name}").restype = ctypes.c_long

    def copies_out(self) -> int:
        """Copies from the device to host memory so far."""
        return int(self._library.second_device_copies_out())

    def queued(self) -> int:
        """Those of them that were queued on a stream."""
        return int(self._library.second_device_queued())

    def released_early(self) -> int:
        """How often memory was released that a queued copy was still to read."""
        return int(self._library.second_device_released_early())

    def has_context(self, index: int) -> bool:
        """Whether a device was made current, or has memory in use."""
        return bool(self._library.second_device_has_context(index))

    def pending(self) -> int:
        """Copies that were queued and have not run."""
        return int(self._library.second_device_pending())

    @contextmanager
    def slow_copies(self, seconds: float) -> Iterator[None]:
        """Each queued copy takes so long."""
        self._library.second_device_slow_copies(seconds)
        try:
            yield
        finally:
            self._library.second_device_slow_copies(0.0)

    @contextmanager
    def failing_after(self, copies: int) -> Iterator[None]:
        """Copies to the host raise when so many were issued."""
        self._library.second_device_fail_after(copies)
        try:
            yield
        finally:
            self._library.second_device_fail_after(-1)


class _Current:
    """The module's `device(...)`: a context in which a device is current; it makes no context on the one before."""

    def __init__(self, device: object) -> None:
        index = torch.device(device).index if isinstance(device, torch.device | str) else device  # type: ignore[arg-type]
        self._index = -1 if index is None else int(index)  # type: ignore[call-overload]

    def __enter__(self) -> None:
        self._before = torch._C._accelerator_maybeExchangeDevice(self._index) if self._index >= 0 else -1

    def __exit__(self, *error: object) -> None:
        if self._before >= 0:
            torch._C._accelerator_maybeExchangeDevice(self._before)


class _Stream:
    """The module's `stream(...)`: as `torch.cuda.stream`, whose end makes the device of the stream before current."""

    def __init__(self, stream: torch.Stream) -> None:
        self._stream = stream

    def __enter__(self) -> None:
        index = torch.accelerator.current_device_index()
        self._before = torch.accelerator.current_stream(index)
        self._here = torch.accelerator.current_stream(self._stream.device)
        torch.accelerator.set_stream(self._stream)

    def __exit__(self, *error: object) -> None:
        torch.accelerator.set_stream(self._here)
        torch.accelerator.set_stream(self._before)


def install(library: Path) -> Control:
    """Make `torch.device("second")` and `torch.second` work in this process."""
    torch.utils.rename_privateuse1_backend(NAME)
    control = Control(library)
    states = [torch.full((16,), index, dtype=torch.uint8) for index in range(DEVICES)]
    module = types.ModuleType(f"torch.{NAME}")

    def set_rng_state_all(new: list[torch.Tensor]) -> None:
        states[:] = [state.clone() for state in new]

    def set_rng_state(new: torch.Tensor, device: object = 0) -> None:
        states[_index(device)] = new.clone()

    vars(module).update(
        is_available=lambda: True,
        is_initialized=lambda: True,
        is_bf16_supported=lambda: True,
        device_count=lambda: DEVICES,
        current_device=lambda: torch.accelerator.current_device_index(),
        set_device=torch.accelerator.set_device_index,
        synchronize=lambda device=None: torch.accelerator.synchronize(device),
        device=_Current,
        stream=_Stream,
        current_stream=torch.accelerator.current_stream,
        Stream=torch.Stream,
        Event=torch.Event,
        manual_seed_all=lambda seed: None,
        manual_seed=lambda seed: None,
        _is_in_bad_fork=lambda: False,
        _lazy_init=lambda: None,
        get_amp_supported_dtype=lambda: [torch.bfloat16],
        get_rng_state=lambda device=0: states[_index(device)].clone(),
        set_rng_state=set_rng_state,
        get_rng_state_all=lambda: [state.clone() for state in states],
        set_rng_state_all=set_rng_state_all,
        control=control,
    )
    torch._register_device_module(NAME, module)
    torch.utils.generate_methods_for_privateuse1_backend(for_storage=True)
    return control


def _index(device: object) -> int:
    if isinstance(device, int):
        return device
    return torch.device(device).index or 0  # type: ignore[arg-type]
