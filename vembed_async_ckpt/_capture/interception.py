"""Runs `save_pretrained` without writing weights: records what it would write as safetensors, and what it pickles.

Functions of safetensors, PEFT and torch are replaced once per process. Only a thread that is collecting gets other
behaviour; all other threads get the original functions.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import safetensors.torch
import torch
from torch.overrides import TorchFunctionMode

from ..errors import PlanError

Files = dict[str, tuple[dict[str, torch.Tensor], dict[str, str]]]
Pickle = tuple[Any, tuple[Any, ...], dict[str, Any]]  # the object given to torch.save, and the other arguments


@dataclass
class Captured:
    """What one call of `save_pretrained` wrote. Paths are those that it used.

    `files`: the safetensors files, as (tensors, metadata) by path.
    `pickles`: what it gave to `torch.save`, by path.
    `serialized`: addresses of the storages that it wrote to any file.
    `looked`: whether it turned tensors into numbers, or pickled them without `torch.save`. It may then have written
        their values.
    `in_torch_save`: whether a `torch.save` is running now.
    """

    files: Files = field(default_factory=dict)
    pickles: dict[str, Pickle] = field(default_factory=dict)
    serialized: set[int] = field(default_factory=set)
    looked: bool = False
    in_torch_save: bool = False


class _Watch(TorchFunctionMode):
    """Records which storages the code asks for. Everything that writes or pickles a tensor does so.

    With `in_place`, `contiguous()` returns the tensor itself. Staging copies it into contiguous memory, whatever its
    strides are.
    """

    def __init__(self, captured: Captured, *, in_place: bool) -> None:
        super().__init__()
        self._captured = captured
        self._in_place = in_place

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.contiguous and self._in_place:
            return args[0]
        result = func(*args, **(kwargs or {}))
        if func is torch.Tensor.untyped_storage:
            if args[0].is_meta:
                result = _StandInStorage(result)
            self._captured.serialized.add(result.data_ptr())
            self._captured.looked |= not self._captured.in_torch_save and _is_pickling(sys._getframe(1))
        elif func is torch.Tensor.numpy:
            self._captured.serialized.add(args[0].untyped_storage().data_ptr())
            self._captured.looked = True
        elif func in _LOOKS:
            self._captured.looked = True
        return result


class _StandInStorage:
    """The storage of a tensor without data. It has no address, so it answers with a number of its own."""

    def __init__(self, storage: torch.UntypedStorage) -> None:
        self._storage = storage

    def data_ptr(self) -> int:
        return int(self._storage._cdata)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._storage, name)


def _is_pickling(frame: FrameType | None) -> bool:
    """Return whether torch asks for a storage because it pickles a tensor."""
    callers = [frame, None if frame is None else frame.f_back]
    return any(caller is not None and caller.f_code.co_name == "_reduce_ex_internal" for caller in callers)


_LOOKS = {torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.__float__, torch.Tensor.__int__}


class Interceptor:
    """Intercepts `save_file` of safetensors.torch before it writes to disk.

    Threads that are not collecting are not affected.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._installed = False
        self._local = threading.local()

    def install(self) -> None:
        """Replace the functions, once per process.

        Raises `PlanError` if this version of safetensors does not have them.
        """
        with self._lock:
            self._take_peft_off_the_network()
            if self._installed:
                return
            save = torch.save
            flatten = getattr(safetensors.torch, "_flatten_as_ptr", None)
            serialize_file = getattr(safetensors.torch, "serialize_file", None)
            if flatten is None or serialize_file is None:
                raise PlanError("this version of safetensors is not supported; install safetensors>=0.8")

            def sink_flatten(tensors: dict[str, torch.Tensor], keep: Any) -> Any:
                if self._captured() is None:
                    return flatten(tensors, keep)
                self._local.tensors = dict(tensors)
                return {}

            def sink_serialize(flat: Any, filename: Any, metadata: Any = None) -> None:
                captured = self._captured()
                if captured is None:
                    serialize_file(flat, filename, metadata=metadata)
                    return
                captured.files[os.fspath(filename)] = (self._local.tensors, dict(metadata or {}))

            @functools.wraps(save)
            def noting_save(obj: Any, f: Any, *args: Any, **kwargs: Any) -> None:
                captured = self._captured()
                if captured is None or not isinstance(f, str | os.PathLike):
                    save(obj, f, *args, **kwargs)
                    return
                captured.in_torch_save = True
                try:
                    save(obj, f, *args, **kwargs)
                finally:
                    captured.in_torch_save = False
                captured.pickles[os.fspath(f)] = (obj, args, kwargs)

            safetensors.torch._flatten_as_ptr = sink_flatten
            safetensors.torch.serialize_file = sink_serialize
            torch.save = noting_save
            self._installed = True

    def _take_peft_off_the_network(self) -> None:
        """Keep PEFT from using the network while a thread is collecting.

        PEFT asks the hub for the vocabulary size of the base model, to decide whether embeddings must be saved. While
        collecting, it gets the answer from the local cache of the hub, or no answer if the model is not cached.
        """
        original = getattr(sys.modules.get("peft.utils.save_and_load"), "get_peft_model_state_dict", None)
        if original is None or hasattr(original, "_vembed_async_ckpt"):
            return

        def get_peft_model_state_dict(model: Any, *args: Any, **kwargs: Any) -> Any:
            if self._captured() is None:
                return original(model, *args, **kwargs)
            with contextlib.ExitStack() as stack:
                for config in model.peft_config.values():
                    stack.enter_context(_base_model_from_cache(config))
                return original(model, *args, **kwargs)

        get_peft_model_state_dict._vembed_async_ckpt = True  # type: ignore[attr-defined]
        for module in [module for name, module in tuple(sys.modules.items()) if name.partition(".")[0] == "peft"]:
            if getattr(module, "get_peft_model_state_dict", None) is original:
                module.get_peft_model_state_dict = get_peft_model_state_dict  # type: ignore[attr-defined]

    def _captured(self) -> Captured | None:
        return getattr(self._local, "captured", None)

    @contextlib.contextmanager
    def collecting(self, *, in_place: bool) -> Iterator[Captured]:
        """Context manager: record what this thread saves. With `in_place`, `contiguous()` makes no copies."""
        captured = self._local.captured = Captured()
        try:
            with torch.no_grad(), _quiet_progress_bars(), _Watch(captured, in_place=in_place):
                yield captured
        finally:
            captured.serialized.discard(0)
            self._local.captured = None
            self._local.tensors = None


@contextlib.contextmanager
def _base_model_from_cache(config: Any) -> Iterator[None]:
    """Context manager: let `config` name the base model's directory in the cache of the hub, or None.

    A local path stays as it is.
    """
    name = getattr(config, "base_model_name_or_path", None)
    if not name or os.path.exists(os.path.join(name, "config.json")):
        yield
        return
    config.base_model_name_or_path = _cached_directory(name)
    try:
        yield
    finally:
        config.base_model_name_or_path = name


def _cached_directory(repo: str) -> str | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(repo, "config.json")
    except HFValidationError:
        return None
    return os.path.dirname(found) if isinstance(found, str) else None


@contextlib.contextmanager
def _quiet_progress_bars() -> Iterator[None]:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


INTERCEPTOR = Interceptor()
