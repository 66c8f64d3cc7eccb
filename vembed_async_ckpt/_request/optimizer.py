"""Optimizers: `optimizer.bin` as torch would write it, and the same state for our own `load`, which never unpickles."""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from operator import attrgetter
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from .._plan.plan import ZipContent
from ..errors import PlanError
from . import tree
from .dtypes import FROM_TORCH, check_storage
from .tree import Ref


@dataclass(frozen=True)
class _Kind:
    """What of a tensor its pickle says; each has a storage of its own, contiguous."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True)
class OptimizerState:
    """An optimizer as it will stand on disk.

    `tensors`, `keys`, `labels` (names in errors) and `owners` run in parallel; an owner is `optimizer` for what only its step
    changes, None for the rest (a scheduler may write to a tensor `lr`). `tree` is the captured state_dict; `pickled()` makes
    `data.pkl` of it. `arrays`: copies of what was no tensor but a numpy array: in the pickle they stand as such, by value.
    """

    content: ZipContent
    optimizer: Any
    tensors: list[torch.Tensor]
    keys: Sequence[str]
    labels: Sequence[str]
    owners: Sequence[Any]
    kinds: Sequence[_Kind]
    tree: Mapping[str, Any]
    arrays: Mapping[str, torch.Tensor]
    state_pickle: bytes | None

    def pickled(self) -> bytes:
        """`data.pkl`: torch's own pickle of this state_dict, its tensors being the records 0, 1, ... of the file."""
        refs = dict(zip(self.keys, enumerate(self.kinds), strict=True))
        if self.state_pickle is None or set(self.tree) != {"state", "param_groups"}:
            return _pickle(self.tree, refs, self.arrays)
        groups = _inner(_pickle(self.tree["param_groups"], refs, self.arrays))
        return b"\x80\x02}(" + _text("state") + self.state_pickle + _text("param_groups") + groups + b"u."

    def table(self, offsets: Sequence[int]) -> dict[str, Any]:
        """{key: [dtype, shape, offset in the file]} for the manifest."""
        return {
            key: [FROM_TORCH.get(kind.dtype) or str(kind.dtype).removeprefix("torch."), list(kind.shape), offset]
            for key, kind, offset in zip(self.keys, self.kinds, offsets, strict=True)
        }

    def rest(self) -> Any:
        """Everything but the tensors that are direct entries of a parameter's state: those stand in the table."""
        captured = dict(self.tree)
        state = captured.get("state")
        if isinstance(state, dict) and all(isinstance(entry, dict) for entry in state.values()):
            captured["state"] = {
                index: {key: value for key, value in entry.items() if not _is_direct(index, key, value)}
                for index, entry in state.items()
            }
        return tree.encode(captured)


_GROUP = "group."
_DTYPE = attrgetter("dtype")


def direct_key(index: Any, key: Any) -> str:
    """Name in the table of the tensor `state[index][key]`."""
    return f"{index}.{key}"


def _is_direct(index: Any, key: Any, value: Any) -> bool:
    return isinstance(value, Ref) and type(key) is str and type(index) is int and value.name == direct_key(index, key)


def unwrap(optimizer: Any) -> Any:
    """The optimizer inside accelerate's wrapper."""
    inner = getattr(optimizer, "optimizer", None)
    return inner if isinstance(inner, torch.optim.Optimizer) else optimizer


class OptimizerReader:
    """Reads one optimizer again and again; remembers only names, shapes and the pickle that describes them."""

    def __init__(self, file: str) -> None:
        self._file = file
        self._layout: Any = None
        self._content: ZipContent | None = None
        self._keys: list[str] = []
        self._labels: list[str] = []
        self._kinds: list[_Kind] = []
        self._owned: list[bool] = []
        self._plain: _PlainState | None = None

    def read(self, optimizer: Any) -> OptimizerState:
        """The optimizer as it is now. Raises `PlanError` naming the value that cannot be saved."""
        inner = unwrap(optimizer)
        if not callable(getattr(inner, "state_dict", None)):
            raise PlanError(f"optimizer: a {type(inner).__module__}.{type(inner).__qualname__} has no state_dict()")
        return self._read(inner, inner.state_dict())

    def _read(self, inner: Any, state: Any) -> OptimizerState:
        keys: list[str] = []
        tensors: list[torch.Tensor] = []

        def put(key: str, tensor: torch.Tensor) -> None:
            keys.append(key)
            tensors.append(tensor)

        plain = self._plain_state(state)
        if plain is None:
            small = captured = self._capture(state, put)
        else:
            keys += plain.keys
            tensors += plain.tensors(state)
            small = {"param_groups": _capture_groups(state, put)}
            captured = {"state": plain.refs, **small}
        self._plain = plain
        arrays = {name: tensors[keys.index(name)] for name in _arrays(small)}
        # When what is pickled with the tensors has grown to twice its size, the file gets more room for it.
        room = tree.rough_size(list(small.values())).bit_length()
        layout = (room, keys, list(map(_DTYPE, tensors)), list(map(torch.Tensor.size, tensors)))
        if self._content is None or layout != self._layout:
            self._learn(keys, tensors, captured, arrays)
            self._layout = layout
        assert self._content is not None
        if plain is not None and plain.pickled is None:
            refs = dict(zip(self._keys, enumerate(self._kinds), strict=True))
            plain.pickled = _inner(_pickle(plain.refs, refs))
        return OptimizerState(
            content=self._content,
            optimizer=inner,
            tensors=tensors,
            keys=self._keys,
            labels=self._labels,
            owners=[inner if owned else None for owned in self._owned],
            kinds=self._kinds,
            tree=captured,
            arrays=arrays,
            state_pickle=None if plain is None else plain.pickled,
        )

    def _plain_state(self, state: Any) -> _PlainState | None:
        return _PlainState.of(state, self._plain)

    def _capture(self, state: Any, put: tree.Put) -> dict[str, Any]:
        if not isinstance(state, dict) or not isinstance(state.get("state"), dict):
            captured = tree.capture(state, "optimizer", put)
            if not isinstance(captured, dict):
                raise PlanError(f"{self._file}: state_dict() gave a {type(state).__qualname__}, not a dict")
            return captured
        result: dict[str, Any] = {}
        for name, value in state.items():
            if name == "state":
                result[name] = {index: _capture_entry(index, entry, put) for index, entry in value.items()}
            elif name == "param_groups":
                result[name] = _capture_groups(state, put)
            else:
                result[name] = tree.capture(value, str(name), put)
        return result

    def _learn(
        self,
        keys: list[str],
        tensors: Sequence[torch.Tensor],
        captured: Any,
        arrays: Mapping[str, torch.Tensor],
    ) -> None:
        if len(set(keys)) != len(keys):
            raise PlanError(f"{self._file}: two values of the state have the same name: {sorted(keys)}")
        for key, tensor in zip(keys, tensors, strict=True):
            check_storage(key, tensor, file=self._file)
        self._keys = keys
        self._labels = [f"{self._file}: {key}" for key in keys]
        self._kinds = [_Kind(tensor.dtype, tuple(tensor.shape), tensor.nbytes) for tensor in tensors]
        self._owned = [not key.startswith(_GROUP) for key in keys]
        if self._plain is not None:
            self._plain.pickled = None  # the order of the records has changed
        refs = dict(zip(keys, enumerate(self._kinds), strict=True))
        size = len(_pickle(captured, refs, arrays))
        self._content = ZipContent(self._file, tuple(kind.nbytes for kind in self._kinds), size)


class RegisteredReader(OptimizerReader):
    """Reads the state of any object with a `state_dict()`, again and again, into a file as `torch.save` would write it."""

    def read(self, registered: Any) -> OptimizerState:
        """The object as it is now; nothing of it is copied late. Raises `PlanError` naming what cannot be saved."""
        return self._read(None, registered.state_dict())

    def _plain_state(self, state: Any) -> None:
        return None

    def _capture(self, state: Any, put: tree.Put) -> dict[str, Any]:
        captured = tree.capture(state, "state_dict", put)
        if not isinstance(captured, dict):
            raise PlanError(f"{self._file}: state_dict() gave a {type(state).__qualname__}, not a dict")
        return captured


def _arrays(captured: Any) -> Iterator[str]:
    """The names of what was a numpy array."""
    if isinstance(captured, Ref):
        if captured.numpy:
            yield captured.name
    elif isinstance(captured, dict):
        for key, value in captured.items():
            if key != "params":  # numbers, thousands of them
                yield from _arrays(value)
    elif isinstance(captured, list | tuple):
        for value in captured:
            yield from _arrays(value)


def _capture_entry(index: Any, entry: Any, put: tree.Put) -> Any:
    if type(entry) is not dict:
        return tree.capture(entry, f"state.{index}", put)
    result = {}
    for key, value in entry.items():
        if isinstance(value, torch.Tensor) and type(key) is str and type(index) is int:
            name = direct_key(index, key)
            put(name, value)
            result[key] = Ref(name)
        else:
            result[key] = tree.capture(value, f"state.{index}.{key}", put)
    return result


def _capture_groups(state: Mapping[str, Any], put: tree.Put) -> list[dict[str, Any]]:
    return [
        {
            key: list(value) if key == "params" else tree.capture(_plain_number(value), f"{_GROUP}{number}.{key}", put)
            for key, value in group.items()
        }
        for number, group in enumerate(state["param_groups"])
    ]


def _plain_number(value: Any) -> Any:
    """A number that numpy computed, as python's: numpy's cannot be unpickled with `weights_only`, which accelerate demands."""
    return value.item() if isinstance(value, np.generic) else value


@dataclass
class _PlainState:
    """The state of torch's own optimizers: parameters by number, each with a dict of tensors and nothing else.

    Its captured form and its pickle say only names and shapes, so they are made once and used for every save.
    """

    indices: list[int]
    names: list[tuple[str, ...]]  # of the tensors of each parameter
    keys: list[str]
    refs: dict[int, dict[str, Ref]]
    pickled: bytes | None = None

    @classmethod
    def of(cls, state: Any, known: _PlainState | None) -> _PlainState | None:
        """`known` if it still describes `state`, else a new one; None if this state is not of that kind."""
        if not isinstance(state, dict) or state.keys() != {"state", "param_groups"}:
            return None
        entries = state["state"]
        if type(entries) is not dict or not set(map(type, entries.values())) <= {dict}:
            return None
        indices, names = list(entries), list(map(tuple, entries.values()))
        if not all(isinstance(value, torch.Tensor) for value in cls.tensors(state)):
            return None
        if known is not None and (known.indices, known.names) == (indices, names):
            return known
        if not all(type(index) is int for index in indices) or not all(type(key) is str for key in chain(*names)):
            return None
        refs = {
            index: {key: Ref(direct_key(index, key)) for key in keys}
            for index, keys in zip(indices, names, strict=True)
        }
        return cls(indices, names, [ref.name for entry in refs.values() for ref in entry.values()], refs)

    @staticmethod
    def tensors(state: Mapping[str, Any]) -> list[torch.Tensor]:
        """The tensors, in the order of `keys`."""
        return list(chain.from_iterable(map(dict.values, state["state"].values())))


# -- the pickle: protocol 2, as torch.serialization writes it for a tensor on the CPU


class _Storage:
    def __init__(self, kind: Any, key: str, count: int) -> None:
        self.pid = ("storage", kind, key, "cpu", count)


class _Tensor:
    """Pickles as a contiguous tensor that begins its own storage (`Tensor.__reduce_ex__`)."""

    def __init__(self, key: str, kind: _Kind) -> None:
        self._key = key
        self._kind = kind

    def __reduce_ex__(self, protocol: Any) -> Any:
        kind = self._kind
        strides, step = [], 1
        for n in reversed(kind.shape):
            strides.append(step)
            step *= max(n, 1)
        count = kind.nbytes // kind.dtype.itemsize
        place: tuple[Any, ...] = (0, kind.shape, tuple(strides[::-1]), False, OrderedDict())
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


def _pickle(
    captured: Any,
    refs: Mapping[str, tuple[int, _Kind]],
    arrays: Mapping[str, torch.Tensor] = MappingProxyType({}),
) -> bytes:
    tensors: dict[str, Any] = {key: _Tensor(str(index), kind) for key, (index, kind) in refs.items()}
    tensors |= arrays
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=2).dump(tree.refill(captured, lambda key: tensors[key]))
    return buffer.getvalue()


def _inner(pickled: bytes) -> bytes:
    """A pickle without its PROTO opcode and its STOP, to be put inside another."""
    return pickled[2:-1]


def _text(value: str) -> bytes:
    encoded = value.encode()
    return b"X" + len(encoded).to_bytes(4, "little") + encoded
