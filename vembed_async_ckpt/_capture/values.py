"""Encodes values that are data but not JSON, and makes them again without a pickle.

For each type it records what identifies the value. Nothing is imported to make a value again. An enum, dataclass or
namedtuple is found by its class name in a module that the program has loaded already. Its constructor is not called.
"""

from __future__ import annotations

import base64
import dataclasses
import datetime
import enum
import functools
import operator
import pathlib
import sys
import types
import uuid
from argparse import Namespace
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from typing import Any, cast

import numpy as np
import torch

from ..errors import CheckpointError


@dataclass(frozen=True, slots=True)
class Node:
    """A value in a captured tree.

    `tag`: its type.
    `says`: JSON scalars that identify the value.
    `holds`: the captured values in it.
    """

    tag: str
    says: tuple[Any, ...]
    holds: Any = None


class NotData(Exception):
    """Says why a value cannot be saved."""


def taken_apart(value: Any) -> Node | None:
    """Return `value` as a node with `holds` not captured yet; None for an unknown type.

    Raises `NotData` for a value that could not be made again.
    """
    kind = type(value)
    if kind in _LEAVES:
        tag, says = _LEAVES[kind]
        return Node(tag, says(value))
    if kind in _CONTAINERS:
        tag, apart = _CONTAINERS[kind]
        return Node(tag, *apart(value))
    if isinstance(value, np.dtype):
        if value.names is not None or value.hasobject:
            raise NotData("its fields cannot be saved")
        return Node("$numpy_dtype", (value.str,))
    if isinstance(value, enum.Enum):
        return _of_enum(value)
    if isinstance(value, tuple) and isinstance(getattr(kind, "_fields", None), tuple):
        return Node("$namedtuple", _class_name(kind), list(value))
    if dataclasses.is_dataclass(kind):
        return _of_dataclass(value)
    return None


def put_together(tag: str, says: Any, holds: Any) -> Any:
    """Return the value of a node.

    Raises `KeyError`, `TypeError`, `ValueError` and similar errors for a malformed node, and `CheckpointError` for a
    class that is not loaded.
    """
    return _MAKERS[tag](says, holds)


def is_tag(tag: str) -> bool:
    return tag in _MAKERS


# -- values that hold no others


def _of_time(value: Any) -> tuple[Any, ...]:
    zone = getattr(value, "tzinfo", None)
    if zone is not None and type(zone) is not datetime.timezone:
        raise NotData(f"its time zone {zone} cannot be saved; use value.astimezone(datetime.timezone.utc)")
    return value.isoformat(), getattr(value, "fold", 0)


def _of_slice(value: slice) -> tuple[Any, ...]:
    parts = (value.start, value.stop, value.step)
    if not all(part is None or type(part) is int for part in parts):
        raise NotData("its ends are not whole numbers")
    return parts


def _of_torch(value: Any) -> tuple[Any, ...]:
    return (str(value).removeprefix("torch."),)


def _of_path(value: pathlib.PurePath) -> tuple[Any, ...]:
    return "Path" if isinstance(value, pathlib.Path) else type(value).__name__, str(value)


_LEAVES: dict[type, tuple[str, Callable[[Any], tuple[Any, ...]]]] = {
    torch.dtype: ("$torch", _of_torch),
    torch.layout: ("$torch", _of_torch),
    torch.memory_format: ("$torch", _of_torch),
    torch.device: ("$device", lambda value: (str(value),)),
    torch.Size: ("$size", tuple),
    complex: ("$complex", lambda value: (repr(value.real), repr(value.imag))),
    range: ("$range", lambda value: (value.start, value.stop, value.step)),
    slice: ("$slice", _of_slice),
    bytearray: ("$bytearray", lambda value: (base64.b64encode(value).decode(),)),
    datetime.datetime: ("$datetime", _of_time),
    datetime.date: ("$date", lambda value: (value.isoformat(),)),
    datetime.time: ("$time", _of_time),
    datetime.timedelta: ("$timedelta", lambda value: (value.days, value.seconds, value.microseconds)),
    Decimal: ("$decimal", lambda value: (str(value),)),
    Fraction: ("$fraction", lambda value: (value.numerator, value.denominator)),
    uuid.UUID: ("$uuid", lambda value: (value.hex,)),
    type(pathlib.Path()): ("$path", _of_path),
    pathlib.PurePosixPath: ("$path", _of_path),
    pathlib.PureWindowsPath: ("$path", _of_path),
}

_PATHS = {"Path": pathlib.Path, "PurePosixPath": pathlib.PurePosixPath, "PureWindowsPath": pathlib.PureWindowsPath}


def _torch(name: str) -> Any:
    value = vars(torch)[name]
    if not isinstance(value, torch.dtype | torch.layout | torch.memory_format):
        raise ValueError(f"torch.{name} is none of torch's dtypes, layouts and memory formats")
    return value


# -- containers


def _of_default_dict(value: defaultdict[Any, Any]) -> tuple[tuple[Any, ...], Any]:
    factory = value.default_factory
    if factory is not None and _FACTORIES.get(getattr(factory, "__name__", "")) is not factory:
        raise NotData(f"its default_factory {factory!r} cannot be saved; use a dict")
    return (None if factory is None else factory.__name__,), dict(value)


_FACTORIES: dict[str, Any] = {
    kind.__name__: kind for kind in (list, dict, set, tuple, int, float, str, bool, bytes, Counter, OrderedDict, deque)
}

_CONTAINERS: dict[type, tuple[str, Callable[[Any], tuple[tuple[Any, ...], Any]]]] = {
    deque: ("$deque", lambda value: ((value.maxlen,), list(value))),
    set: ("$set", lambda value: ((), list(value))),
    frozenset: ("$frozenset", lambda value: ((), list(value))),
    OrderedDict: ("$ordered", lambda value: ((), [dict(value), vars(value)] if vars(value) else dict(value))),
    defaultdict: ("$defaultdict", _of_default_dict),
    Namespace: ("$namespace", lambda value: ((), vars(value))),
    types.SimpleNamespace: ("$simple_namespace", lambda value: ((), vars(value))),
}


def _ordered(holds: Any) -> Any:
    """Make an OrderedDict, with its attributes if it has any. The result of `Module.state_dict()` has `_metadata`."""
    items, attributes = holds if isinstance(holds, list) else (holds, {})
    return _with_attributes(OrderedDict(items), attributes)


def _with_attributes(value: Any, attributes: dict[str, Any]) -> Any:
    vars(value).update(attributes)
    return value


# -- classes of the program


def _class_name(kind: type) -> tuple[str, str]:
    if _find(kind.__module__, kind.__qualname__) is not kind:
        raise NotData("its class is not found by its name; define it at the top of a module")
    return kind.__module__, kind.__qualname__


def _find(module: str, qualname: str) -> Any:
    """Return a class of a loaded module, found without running any of its code; None if there is no class of that name."""
    found: Any = sys.modules.get(module)
    for part in qualname.split("."):
        attributes = getattr(found, "__dict__", {})
        found = attributes.get(part) if isinstance(attributes, Mapping) else None
    return found if isinstance(found, type) else None


def _class(module: str, qualname: str) -> Any:
    found = _find(module, qualname)
    if found is None:
        raise CheckpointError(
            f"a saved value is a {module}.{qualname}, and no module that is loaded has this class; import it before load()"
        )
    return found


def _of_enum(value: enum.Enum) -> Node:
    kind = type(value)
    if isinstance(value, enum.Flag):
        names = [name for name, member in kind.__members__.items() if member.name == name and member in value]  # type: ignore[operator]
        if not value.value:
            names = []
    else:
        names = [value.name]
    says = (*_class_name(kind), *names)
    if _enum(says, None) != value:
        raise NotData("it is not made of members of its class")
    return Node("$enum", says)


def _enum(says: Any, _: Any) -> Any:
    module, qualname, *names = says
    kind = _class(module, qualname)
    if not issubclass(kind, enum.Enum):
        raise ValueError(f"{module}.{qualname} is no enum")
    if issubclass(kind, enum.Flag):
        return functools.reduce(operator.or_, (kind.__members__[name] for name in names), kind(0))
    (name,) = names
    return kind.__members__[name]


def _of_dataclass(value: Any) -> Node:
    kind: Any = type(value)
    names = [field.name for field in dataclasses.fields(kind)]
    if kind.__new__ is not object.__new__ or set(getattr(value, "__dict__", ())) - set(names):
        raise NotData("it holds more than the fields of a dataclass")
    return Node("$dataclass", _class_name(kind), {name: getattr(value, name) for name in names if hasattr(value, name)})


def _dataclass(says: Any, holds: Any) -> Any:
    kind = _class(*says)
    if not dataclasses.is_dataclass(kind) or kind.__new__ is not object.__new__:
        raise ValueError(f"{kind.__qualname__} is no dataclass")
    names = {field.name for field in dataclasses.fields(kind)}
    if unknown := holds.keys() - names:
        raise CheckpointError(f"a saved {says[0]}.{says[1]} has fields that the class here has not: {sorted(unknown)}")
    value: Any = object.__new__(cast(Any, kind))
    for name, item in holds.items():
        object.__setattr__(value, name, item)
    return value


def _namedtuple(says: Any, holds: Any) -> Any:
    kind = _class(*says)
    if not issubclass(kind, tuple) or len(getattr(kind, "_fields", ())) != len(holds):
        raise CheckpointError(f"a saved {says[0]}.{says[1]} has {len(holds)} fields, the class here has others")
    return tuple.__new__(kind, holds)


# -- tensors with further properties; `holds` may be a stand-in that is pickled as a tensor


def _parameter(says: Any, holds: Any) -> Any:
    return torch.nn.Parameter(holds, requires_grad=bool(says[0])) if isinstance(holds, torch.Tensor) else holds


def _requiring_grad(says: Any, holds: Any) -> Any:
    return holds.requires_grad_() if isinstance(holds, torch.Tensor) else holds


def _fraction(says: Any, _: Any) -> Fraction:
    if not all(type(part) is int for part in says):
        raise ValueError("its parts are not whole numbers")  # Fraction("1e1000000000") would compute for hours
    return Fraction(*says)


def _slice(says: Any, _: Any) -> slice:
    if not all(part is None or type(part) is int for part in says):
        raise ValueError("its ends are not whole numbers")
    return slice(*says)


def _raw_array(says: Any, holds: Any) -> Any:
    dtype, is_scalar, *shape = says
    kind = np.dtype(str(dtype))
    if kind.hasobject:
        raise ValueError(f"{dtype} is not data")
    array: Any = np.ndarray(tuple(shape), kind, buffer=bytearray(holds.tobytes()))
    return array[()] if is_scalar else array


_MAKERS: dict[str, Callable[[Any, Any], Any]] = {
    "$torch": lambda says, holds: _torch(*says),
    "$device": lambda says, holds: torch.device(*map(str, says)),
    "$size": lambda says, holds: torch.Size(says),
    "$complex": lambda says, holds: complex(*map(float, says)),
    "$range": lambda says, holds: range(*says),
    "$slice": _slice,
    "$bytearray": lambda says, holds: bytearray(base64.b64decode(says[0], validate=True)),
    "$datetime": lambda says, holds: datetime.datetime.fromisoformat(says[0]).replace(fold=says[1]),
    "$date": lambda says, holds: datetime.date.fromisoformat(*says),
    "$time": lambda says, holds: datetime.time.fromisoformat(says[0]).replace(fold=says[1]),
    "$timedelta": lambda says, holds: datetime.timedelta(*says),
    "$decimal": lambda says, holds: Decimal(str(says[0])),
    "$fraction": _fraction,
    "$uuid": lambda says, holds: uuid.UUID(hex=says[0]),
    "$path": lambda says, holds: _PATHS[says[0]](says[1]),
    "$numpy_dtype": lambda says, holds: np.dtype(str(says[0])),
    "$deque": lambda says, holds: deque(holds, says[0]),
    "$set": lambda says, holds: set(holds),
    "$frozenset": lambda says, holds: frozenset(holds),
    "$ordered": lambda says, holds: _ordered(holds),
    "$defaultdict": lambda says, holds: defaultdict(None if says[0] is None else _FACTORIES[says[0]], holds),
    "$namespace": lambda says, holds: _with_attributes(Namespace(), holds),
    "$simple_namespace": lambda says, holds: _with_attributes(types.SimpleNamespace(), holds),
    "$enum": _enum,
    "$dataclass": _dataclass,
    "$namedtuple": _namedtuple,
    "$parameter": _parameter,
    "$requires_grad": _requiring_grad,
    "$raw_array": _raw_array,
    "$array": lambda says, holds: np.asarray(holds),  # an array without dimensions
}
