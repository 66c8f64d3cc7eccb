"""Writes pickles with tensors: protocol 2, as torch.serialization writes them for tensors on the CPU."""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

from .._format import torch_zip
from . import memory_format, tree


@dataclass(frozen=True)
class Kind:
    """What the pickle says about a tensor with a dense storage of its own.

    `strides` is None if the tensor is contiguous.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int
    strides: tuple[int, ...] | None = None

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Kind:
        return cls(tensor.dtype, tuple(tensor.shape), tensor.nbytes, memory_format.kept(tensor))


class _Storage:
    def __init__(self, kind: Any, key: str, count: int) -> None:
        self.pid = ("storage", kind, key, "cpu", count)


class _Tensor:
    """Pickles as a tensor that uses all of its own storage (`Tensor.__reduce_ex__`)."""

    def __init__(self, key: str, kind: Kind) -> None:
        self._key = key
        self._kind = kind

    def __reduce_ex__(self, protocol: Any) -> Any:
        kind = self._kind
        strides = memory_format.contiguous(kind.shape) if kind.strides is None else kind.strides
        count = kind.nbytes // kind.dtype.itemsize
        place: tuple[Any, ...] = (0, kind.shape, strides, False, OrderedDict())
        legacy = _LEGACY_STORAGE.get(kind.dtype)
        if legacy is not None:
            return torch._utils._rebuild_tensor_v2, (_Storage(legacy, self._key, count), *place)
        storage = _Storage(torch.storage.UntypedStorage, self._key, kind.nbytes)
        return torch._utils._rebuild_tensor_v3, (storage, *place[:3], False, place[4], kind.dtype)


_LEGACY_STORAGE: dict[torch.dtype, Any] = {
    dtype: getattr(torch, name)
    for dtype, name in torch.storage._dtype_to_storage_type_map().items()
    if hasattr(torch, name)
}


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> Any:
        return obj.pid if type(obj) is _Storage else None


def dumps(
    captured: Any,
    refs: Mapping[str, tuple[int, Kind]],
    arrays: Mapping[str, torch.Tensor] = MappingProxyType({}),
) -> bytes:
    """Pickle `captured`, with a tensor in the place of each `Ref`.

    `refs`: number in the file and kind of each tensor.
    `arrays`: the values that the pickle itself contains.
    """
    tensors: dict[str, Any] = {key: _Tensor(str(index), kind) for key, (index, kind) in refs.items()}
    tensors |= arrays
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=2).dump(tree.refill(captured, lambda key: tensors[key]))
    return buffer.getvalue()


def file(captured: Any, tensors: Mapping[str, torch.Tensor]) -> bytes:
    """Return a file from which `torch.load` reads `captured`. `tensors`: the contiguous tensor in the host of each `Ref`."""
    stored: dict[str, tuple[int, Kind]] = {}
    arrays = {}
    for ref in tree.refs(captured):
        if ref.numpy:
            arrays[ref.name] = tensors[ref.name]
        elif ref.name not in stored:
            stored[ref.name] = len(stored), Kind.of(tensors[ref.name])
    storages = [tensors[name].reshape(-1).view(torch.uint8).numpy().tobytes() for name in stored]
    return torch_zip.archive(dumps(captured, stored, arrays), storages)


def inner(pickled: bytes) -> bytes:
    """Return a pickle without its PROTO and STOP opcodes, to be put inside another pickle."""
    return pickled[2:-1]


def state_dict(state: bytes, groups: bytes) -> bytes:
    """Return the pickle of {"state": ..., "param_groups": ...}, made of the `inner` pickles of both values."""
    return b"\x80\x02}(" + _text("state") + state + _text("param_groups") + groups + b"u."


def _text(value: str) -> bytes:
    encoded = value.encode()
    return b"X" + len(encoded).to_bytes(4, "little") + encoded
