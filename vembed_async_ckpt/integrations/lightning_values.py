"""Converts the values in Lightning's checkpoints to values that `extra` takes, and back.

The conversion is exact, and reading never uses pickle.

`extra` takes dicts, lists, tuples, JSON scalars, tensors, arrays and bytes. Any other value of a checkpoint is written
as a dict with the one key `MARK`. Its value is a list: the kind, and what the kind needs. The tensors of `state_dict`
go to the weights file; only their names are stored here.
"""

from __future__ import annotations

import datetime
import importlib
import sys
from argparse import Namespace
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path, PurePath, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import torch

from .._capture.dtypes import spec
from ..errors import CorruptCheckpoint, PlanError

MARK = "__vembed__"
# one code base under two names: `lightning` and `pytorch_lightning`
PACKAGES = ("lightning.fabric", "lightning_fabric")

_MAX_DEPTH = 100
_SCALARS = (type(None), bool, int, float, str, bytes)
_PATHS = {"Path": Path, "PurePosixPath": PurePosixPath, "PureWindowsPath": PureWindowsPath}
_FACTORIES = {kind.__name__: kind for kind in (list, dict, set, int, float, str)}
_HYPER_PARAMETERS = ("hyper_parameters", "datamodule_hyper_parameters")


def pack(checkpoint: Any) -> tuple[dict[str, torch.Tensor], Any]:
    """Return (tensors of its `state_dict` by name, everything else as `extra` takes it).

    Containers are copied, tensors are not. Raises `PlanError` that names the key of a value that cannot be saved, and
    what to do about it.
    """
    packer = _Packer()
    return packer.weights, packer.pack(checkpoint, ())


def unpack(extra: Any, weights: Mapping[str, torch.Tensor], move: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Return the checkpoint that was packed. Every tensor passes through `move` once.

    Raises `CorruptCheckpoint` for a value that `pack` cannot have made.
    """
    return _Unpacker(weights, move).unpack(extra)


class _Packer:
    def __init__(self) -> None:
        self.weights: dict[str, torch.Tensor] = {}

    def pack(self, value: Any, path: tuple[Any, ...]) -> Any:
        kind = type(value)
        if len(path) > _MAX_DEPTH:
            raise PlanError(f"{_shown(path[:4])}...: nested deeper than {_MAX_DEPTH} levels, or contains itself")
        if kind is list or kind is tuple:
            return kind([self.pack(item, (*path, n)) for n, item in enumerate(value)])
        if kind is dict and MARK not in value:
            return dict(self.items(value, path))
        if kind in _SCALARS or kind is Counter or isinstance(value, np.ndarray | np.generic):
            return value
        if isinstance(value, torch.Tensor):
            return self._tensor(value, path)
        if kind in _PACKERS:
            return {MARK: [kind.__name__, *_PACKERS[kind](self, value, path)]}
        if isinstance(value, PurePath):
            return {MARK: ["Path" if isinstance(value, Path) else kind.__name__, str(value)]}
        if kind.__name__ == "AttributeDict" and kind.__module__.startswith(PACKAGES):
            return {MARK: ["AttributeDict", self.items(value, path)]}
        raise PlanError(
            f"{_shown(path)}: a {kind.__module__}.{kind.__qualname__} cannot be saved without a pickle; {_remedy(path)}"
        )

    def items(self, mapping: Mapping[Any, Any], path: tuple[Any, ...]) -> list[Any]:
        for key in mapping:
            if type(key) not in _SCALARS and not (type(key) is tuple and all(type(part) in _SCALARS for part in key)):
                raise PlanError(f"{_shown(path)}: the key {key!r} cannot be saved; use strings or numbers")
        return [[key, self.pack(item, (*path, key))] for key, item in mapping.items()]

    def members(self, values: Any, path: tuple[Any, ...]) -> list[Any]:
        return [self.pack(item, (*path, n)) for n, item in enumerate(values)]

    def metadata(self, value: Any, path: tuple[Any, ...]) -> Any:
        """Return the module versions, which `Module.state_dict` attaches to its result."""
        return self.pack(getattr(value, "_metadata", None), (*path, "_metadata"))

    def _tensor(self, value: torch.Tensor, path: tuple[Any, ...]) -> Any:
        spec(_shown(path), value, file="Lightning's checkpoint")  # refuse it here, before there is a file for it
        if len(path) == 2 and path[0] == "state_dict" and type(path[1]) is str:
            self.weights[path[1]] = value
            return {MARK: ["weight", path[1]]}
        if type(value) is torch.nn.Parameter:
            return {MARK: ["Parameter", value.detach(), value.requires_grad]}
        return value


def _isoformat(packer: _Packer, value: Any, path: tuple[Any, ...]) -> list[Any]:
    zone = getattr(value, "tzinfo", None)
    if zone is not None and type(zone) is not datetime.timezone:
        raise PlanError(
            f"{_shown(path)}: its time zone {zone} cannot be saved; use value.astimezone(datetime.timezone.utc)"
        )
    return [value.isoformat()]


def _default_factory(packer: _Packer, value: Any, path: tuple[Any, ...]) -> list[Any]:
    factory = value.default_factory
    if factory is not None and factory not in _FACTORIES.values():
        raise PlanError(f"{_shown(path)}: its default_factory {factory!r} cannot be saved; use a dict")
    return [factory and factory.__name__, packer.items(value, path)]


_PACKERS: dict[type, Callable[[_Packer, Any, tuple[Any, ...]], list[Any]]] = {
    dict: lambda packer, value, path: [packer.items(value, path)],  # a dict that has the key MARK
    OrderedDict: lambda packer, value, path: [packer.items(value, path), packer.metadata(value, path)],
    defaultdict: _default_factory,
    Namespace: lambda packer, value, path: [packer.items(vars(value), path)],
    set: lambda packer, value, path: [packer.members(value, path)],
    frozenset: lambda packer, value, path: [packer.members(value, path)],
    torch.Size: lambda packer, value, path: [list(value)],
    torch.dtype: lambda packer, value, path: [str(value).removeprefix("torch.")],
    torch.device: lambda packer, value, path: [str(value)],
    bytearray: lambda packer, value, path: [bytes(value)],
    complex: lambda packer, value, path: [value.real, value.imag],
    range: lambda packer, value, path: [value.start, value.stop, value.step],
    datetime.datetime: _isoformat,
    datetime.date: _isoformat,
    datetime.time: _isoformat,
    datetime.timedelta: lambda packer, value, path: [value.days, value.seconds, value.microseconds],
}


def _shown(path: tuple[Any, ...]) -> str:
    return "checkpoint" + "".join(f"[{key!r}]" for key in path)


def _remedy(path: tuple[Any, ...]) -> str:
    if path and path[0] in _HYPER_PARAMETERS:
        return "leave it out with save_hyperparameters(ignore=[...]), or pass numbers, strings, lists and dicts"
    return "put numbers, strings, lists, dicts or tensors there, such as its state_dict()"


class _Unpacker:
    def __init__(self, weights: Mapping[str, torch.Tensor], move: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._weights = weights
        self._move = move
        self._moved: dict[int, torch.Tensor] = {}

    def unpack(self, value: Any) -> Any:
        kind = type(value)
        if kind is list or kind is tuple:
            return kind(map(self.unpack, value))
        if kind is dict:
            if MARK in value:
                return self._marked(*value[MARK])
            return {key: self.unpack(item) for key, item in value.items()}
        return self.moved(value) if isinstance(value, torch.Tensor) else value

    def moved(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the moved tensor. Names that shared a tensor share it afterwards."""
        if id(tensor) not in self._moved:
            self._moved[id(tensor)] = self._move(tensor)
        return self._moved[id(tensor)]

    def pairs(self, items: Any) -> list[tuple[Any, Any]]:
        return [(key, self.unpack(item)) for key, item in items]

    def weight(self, name: str) -> torch.Tensor:
        return self.moved(self._weights[name])

    def _marked(self, kind: Any, *content: Any) -> Any:
        try:
            return _UNPACKERS[kind](self, *content)
        except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
            raise CorruptCheckpoint(f"a value of kind {kind!r} cannot be read: {error!r}") from error


def _ordered(unpacker: _Unpacker, items: Any, metadata: Any) -> Any:
    result = OrderedDict(unpacker.pairs(items))
    if metadata is not None:
        result._metadata = unpacker.unpack(metadata)  # type: ignore[attr-defined]
    return result


def _attribute_dict(unpacker: _Unpacker, items: Any) -> Any:
    """Return Lightning's own class, or a plain dict if Lightning is not installed."""
    module = fabric("utilities.data")
    return (dict if module is None else module.AttributeDict)(unpacker.pairs(items))


def fabric(name: str) -> Any:
    """Return the module `name` of Lightning's fabric, from the package in use; None if neither package is installed."""
    for package in (*[package for package in PACKAGES if package in sys.modules], *PACKAGES):
        try:
            return importlib.import_module(f"{package}.{name}")
        except ModuleNotFoundError:
            continue
    return None


_UNPACKERS: dict[str, Callable[..., Any]] = {
    "weight": _Unpacker.weight,
    "Parameter": lambda unpacker, value, grad: torch.nn.Parameter(unpacker.moved(value), requires_grad=grad),
    "dict": lambda unpacker, items: dict(unpacker.pairs(items)),
    "OrderedDict": _ordered,
    "defaultdict": lambda unpacker, name, items: defaultdict(name and _FACTORIES[name], unpacker.pairs(items)),
    "AttributeDict": _attribute_dict,
    "Namespace": lambda unpacker, items: Namespace(**dict(unpacker.pairs(items))),
    "set": lambda unpacker, members: set(map(unpacker.unpack, members)),
    "frozenset": lambda unpacker, members: frozenset(map(unpacker.unpack, members)),
    "Size": lambda unpacker, sizes: torch.Size(sizes),
    "dtype": lambda unpacker, name: _dtype(name),
    "device": lambda unpacker, name: torch.device(name),
    "bytearray": lambda unpacker, data: bytearray(data),
    "complex": lambda unpacker, real, imaginary: complex(real, imaginary),
    "range": lambda unpacker, *limits: range(*limits),
    "datetime": lambda unpacker, text: datetime.datetime.fromisoformat(text),
    "date": lambda unpacker, text: datetime.date.fromisoformat(text),
    "time": lambda unpacker, text: datetime.time.fromisoformat(text),
    "timedelta": lambda unpacker, *parts: datetime.timedelta(*parts),
}


_UNPACKERS |= {name: lambda unpacker, text, kind=kind: kind(text) for name, kind in _PATHS.items()}


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"{name} is no dtype")
    return found
