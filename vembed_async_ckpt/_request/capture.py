"""`save_pretrained` run with the disk taken away: what it would have written as safetensors, and what it pickles.

safetensors' and PEFT's functions are replaced once per process; only the thread that is collecting, while it is collecting, gets
anything else than the originals.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterator
from typing import Any

import safetensors.torch
import torch
from torch.overrides import TorchFunctionMode

from ..errors import PlanError

Files = dict[str, tuple[dict[str, torch.Tensor], dict[str, str]]]


class Watch(TorchFunctionMode):
    """Notes in `serialized` the addresses of the storages that somebody asks for, as everything does that writes or pickles a
    tensor. With `in_place`, `contiguous()` gives the tensor itself: whatever its strides are, staging copies it into contiguous
    memory."""

    def __init__(self, *, in_place: bool) -> None:
        super().__init__()
        self._in_place = in_place
        self.serialized: set[int] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.contiguous and self._in_place:
            return args[0]
        result = func(*args, **(kwargs or {}))
        if func is torch.Tensor.untyped_storage:
            self.serialized.add(result.data_ptr())
        elif func is torch.Tensor.numpy:
            self.serialized.add(args[0].untyped_storage().data_ptr())
        return result


class Sink:
    """Stands in safetensors.torch between `save_file` and the disk. Threads that are not collecting pass through."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._installed = False
        self._local = threading.local()

    def install(self) -> None:
        """Put it in place, once per process. Raises `PlanError` if this version of safetensors has no such place."""
        with self._lock:
            self._take_peft_off_the_network()
            if self._installed:
                return
            flatten = getattr(safetensors.torch, "_flatten_as_ptr", None)
            serialize_file = getattr(safetensors.torch, "serialize_file", None)
            if flatten is None or serialize_file is None:
                raise PlanError("this version of safetensors is not supported; install safetensors>=0.8")

            def sink_flatten(tensors: dict[str, torch.Tensor], keep: Any) -> Any:
                if self._files() is None:
                    return flatten(tensors, keep)
                self._local.tensors = dict(tensors)
                return {}

            def sink_serialize(flat: Any, filename: Any, metadata: Any = None) -> None:
                files = self._files()
                if files is None:
                    serialize_file(flat, filename, metadata=metadata)
                    return
                files[os.fspath(filename)] = (self._local.tensors, dict(metadata or {}))

            safetensors.torch._flatten_as_ptr = sink_flatten
            safetensors.torch.serialize_file = sink_serialize
            self._installed = True

    def _take_peft_off_the_network(self) -> None:
        """PEFT asks the hub for the base model's vocabulary size, to learn whether embeddings must be saved. On a thread that
        is collecting it asks the copy in the hub's local cache instead; without one, nobody."""
        original = getattr(sys.modules.get("peft.utils.save_and_load"), "get_peft_model_state_dict", None)
        if original is None or hasattr(original, "_vembed_async_ckpt"):
            return

        def get_peft_model_state_dict(model: Any, *args: Any, **kwargs: Any) -> Any:
            if self._files() is None:
                return original(model, *args, **kwargs)
            with contextlib.ExitStack() as stack:
                for config in model.peft_config.values():
                    stack.enter_context(_base_model_from_cache(config))
                return original(model, *args, **kwargs)

        get_peft_model_state_dict._vembed_async_ckpt = True  # type: ignore[attr-defined]
        for module in [module for name, module in sys.modules.items() if name.partition(".")[0] == "peft"]:
            if getattr(module, "get_peft_model_state_dict", None) is original:
                module.get_peft_model_state_dict = get_peft_model_state_dict  # type: ignore[attr-defined]

    def _files(self) -> Files | None:
        return getattr(self._local, "files", None)

    @contextlib.contextmanager
    def collecting(self) -> Iterator[Files]:
        self._local.files = {}
        try:
            yield self._local.files
        finally:
            self._local.files = None
            self._local.tensors = None


@contextlib.contextmanager
def _base_model_from_cache(config: Any) -> Iterator[None]:
    """Let `config` name the base model's directory in the hub's cache, or none, for a while; a local path stays."""
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
def quiet_progress_bars() -> Iterator[None]:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


SINK = Sink()
