"""Encodes nested Python values as JSON without loss, and decodes them. Reading uses no pickle.

`capture` copies the containers at the call and refuses what cannot be saved. `encode` makes JSON of the copy later, off
the training thread. JSON lacks tuples, bytes, NaN, and keys that are not strings. These are written as an object with
one key that starts with `$`:

- {"$tuple": [...]}
- {"$dict": [[key, value], ...]}
- {"$counter": [[key, count], ...]}
- {"$bytes": base64}
- {"$float": "nan"}
- {"$tensor": name} and {"$numpy": name}
- {"$strided": [one of these two, strides]} for a tensor or array that is not contiguous
- {tag: [data, the values in it]} for a type that `values` knows

Tensors are passed to the caller, who stores them under that name.
"""

from __future__ import annotations

import base64
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..errors import CorruptCheckpoint, PlanError
from . import memory_format, values
from .values import Node, NotData

Put = Callable[[str, torch.Tensor], str | None]  # may return another name, under which it is stored already
Get = Callable[[str], torch.Tensor]

SCALARS = (type(None), bool, int, float, str, bytes)
_SCALARS = frozenset(SCALARS)
_SAME_IN_JSON = frozenset((type(None), bool, int, str))
_MAX_DEPTH = 200


@dataclass(frozen=True, slots=True)
class Ref:
    """Stands for a tensor in a captured tree.

    `numpy`: the value was a numpy array and becomes one again.
    `strides`: None if the tensor is contiguous.
    """

    name: str
    numpy: bool = False
    strides: memory_format.Strides | None = None


def capture(value: Any, where: str, put: Put, depth: int = 0) -> Any:
    """Return a copy of `value` with a `Ref` for each tensor and array.

    Later changes of the containers do not affect it.

    `put(name, tensor)` gets each tensor. With `sharing(put)`, a tensor in several places is stored only once.
    `where` is the start of their names, and of names in errors.

    Raises `PlanError` naming the key for anything that is not a nested dict, list or tuple of JSON scalars, tensors, numpy
    arrays, bytes and the types in `values`.
    """
    kind = type(value)
    if kind in SCALARS:
        return value
    if depth > _MAX_DEPTH:
        raise PlanError(f"{where}: nested deeper than {_MAX_DEPTH} levels, or contains itself")
    if kind is tuple or kind is list:
        return kind([capture(item, f"{where}.{n}", put, depth + 1) for n, item in enumerate(value)])
    if kind is dict or kind is Counter:
        items = {_key(key, where): capture(item, f"{where}.{key}", put, depth + 1) for key, item in value.items()}
        return Counter(items) if kind is Counter else items  # MultiStepLR calls Counter.elements()
    if isinstance(value, torch.Tensor):
        name = put(where, value) or where
        return _with_grad(value, Ref(name, strides=_strides(value)))
    if isinstance(value, np.generic) or kind is np.ndarray or kind is np.memmap:
        tensor = _from_numpy(value)
        if tensor is None:
            return _raw(value, where, put)
        put(where, tensor)
        ref = Ref(where, numpy=True, strides=_strides(tensor))
        return Node("$array", (), ref) if tensor.ndim == 0 and isinstance(value, np.ndarray) else ref
    node = _taken_apart(value, where)
    return Node(node.tag, node.says, capture(node.holds, where, put, depth + 1))


def sharing(put: Put) -> Put:
    """Return a `put` for one tree that calls `put` once for each tensor, however many places it is in."""
    known: dict[int, tuple[str, torch.Tensor]] = {}  # by id; held, so that no other tensor gets the same id

    def put_once(name: str, tensor: torch.Tensor) -> str:
        first, _ = known.setdefault(id(tensor), (name, tensor))
        if first == name:
            put(name, tensor)
        return first

    return put_once


def _taken_apart(value: Any, where: str) -> Node:
    kind = type(value)
    try:
        node = values.taken_apart(value)
    except NotData as error:
        raise PlanError(f"{where}: a {kind.__module__}.{kind.__qualname__} cannot be saved: {error}") from error
    if node is None:
        raise PlanError(
            f"{where}: a {kind.__module__}.{kind.__qualname__} cannot be saved; use dicts, lists, tuples, numbers, strings, "
            "tensors, numpy arrays, bytes, enums or dataclasses"
        )
    return node


def _with_grad(tensor: torch.Tensor, ref: Ref) -> Any:
    if isinstance(tensor, torch.nn.Parameter):
        return Node("$parameter", (tensor.requires_grad,), ref)
    return Node("$requires_grad", (), ref) if tensor.requires_grad and tensor.is_leaf else ref


def _key(key: Any, where: str) -> Any:
    if type(key) in SCALARS:
        return key
    if type(key) is tuple:
        return tuple(_key(part, where) for part in key)
    node = _taken_apart(key, f"{where}, a key")
    if node.holds is not None:
        raise PlanError(f"{where}: the key {key!r} cannot be saved; use strings or numbers")
    return node


def _strides(tensor: torch.Tensor) -> memory_format.Strides | None:
    return memory_format.kept(tensor) if tensor.layout is torch.strided else None  # refused when it is stored


def _from_numpy(value: Any) -> torch.Tensor | None:
    """Return a copy, because the array may change before it is staged.

    Returns None if torch does not have the dtype.
    """
    try:
        return torch.from_numpy(np.array(value, order="K"))
    except (TypeError, ValueError):
        return None


def _raw(value: Any, where: str, put: Put) -> Node:
    """Capture an array of strings, dates or numbers with a dtype that torch does not have, as its bytes."""
    dtype = value.dtype
    if dtype.hasobject or dtype.names is not None or dtype.str.startswith("|V"):
        raise PlanError(f"{where}: a numpy array of {dtype} cannot be saved; convert it to numbers")
    put(where, torch.from_numpy(np.frombuffer(value.tobytes(), np.uint8).copy()))
    return Node("$raw_array", (dtype.str, isinstance(value, np.generic), *value.shape), Ref(where, numpy=True))


def encode(captured: Any) -> Any:
    """Return a captured tree as JSON values."""
    if isinstance(captured, Ref):
        named = {"$numpy" if captured.numpy else "$tensor": captured.name}
        return named if captured.strides is None else {"$strided": [named, list(captured.strides)]}
    if isinstance(captured, Node):
        return {captured.tag: [list(map(encode, captured.says)), encode(captured.holds)]}
    if isinstance(captured, float):
        return captured if math.isfinite(captured) else {"$float": repr(captured)}
    if isinstance(captured, bytes):
        return {"$bytes": base64.b64encode(captured).decode()}
    if isinstance(captured, tuple | list):
        items = captured if _SAME_IN_JSON.issuperset(map(type, captured)) else list(map(encode, captured))
        return {"$tuple": items} if isinstance(captured, tuple) else items
    if isinstance(captured, Counter):
        return {"$counter": [[encode(key), encode(item)] for key, item in captured.items()]}
    if isinstance(captured, dict):
        if all(type(key) is str and not key.startswith("$") for key in captured):
            return {key: encode(item) for key, item in captured.items()}
        return {"$dict": [[encode(key), encode(item)] for key, item in captured.items()]}
    return captured


def to_json(encoded: Any) -> str:
    """Return what `encode` returned, as text."""
    return json.dumps(encoded, separators=(",", ":"))


def decode(value: Any, get: Get) -> Any:
    """Return the value that was captured. Tensors come from `get(name)`.

    Raises `CorruptCheckpoint` for JSON that `encode` does not make.
    """
    if isinstance(value, list):
        return [decode(item, get) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) != 1 or not next(iter(value)).startswith("$"):
        return {key: decode(item, get) for key, item in value.items()}
    ((tag, content),) = value.items()
    try:
        if values.is_tag(tag):
            says, holds = content
            return values.put_together(tag, [decode(part, get) for part in says], decode(holds, get))
        return _DECODERS[tag](content, get)
    except RecursionError:
        raise
    except (LookupError, ValueError, TypeError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise CorruptCheckpoint(f"the saved value {tag} {str(content)[:60]!r} cannot be read: {error}") from error


_DECODERS: dict[str, Callable[[Any, Get], Any]] = {
    "$tuple": lambda content, get: tuple(decode(item, get) for item in content),
    "$dict": lambda content, get: {decode(key, get): decode(item, get) for key, item in content},
    "$counter": lambda content, get: Counter({decode(key, get): decode(item, get) for key, item in content}),
    "$bytes": lambda content, get: base64.b64decode(content, validate=True),
    "$float": lambda content, get: float(content),
    "$tensor": lambda content, get: get(content),
    "$strided": lambda content, get: _restrided(content[0], content[1], get),
    "$numpy": lambda content, get: _to_numpy(get(content)),
}


def _restrided(named: dict[str, str], strides: list[int], get: Get) -> Any:
    ((tag, name),) = named.items()
    tensor = get(name)
    strided = memory_format.restored(tensor, memory_format.checked(tensor.shape, strides))
    if strided is not tensor:
        tensor.data = strided  # in place: it may stand in other places too
    return tensor if tag == "$tensor" else _to_numpy(tensor)


def _to_numpy(tensor: torch.Tensor) -> Any:
    array = tensor.cpu().numpy()
    return array[()] if array.ndim == 0 else array


def refill(captured: Any, get: Callable[[str], Any]) -> Any:
    """Return a captured tree with its tensors put back, for a file that other programs unpickle."""
    if isinstance(captured, Ref):
        return _to_numpy(get(captured.name)) if captured.numpy else get(captured.name)
    if isinstance(captured, Node):
        return values.put_together(captured.tag, captured.says, refill(captured.holds, get))
    if isinstance(captured, tuple | list):
        return (
            captured if _SCALARS.issuperset(map(type, captured)) else type(captured)(refill(i, get) for i in captured)
        )
    if isinstance(captured, dict):
        items = {refill(key, get): refill(item, get) for key, item in captured.items()}
        return Counter(items) if isinstance(captured, Counter) else items
    return captured


def refs(captured: Any) -> Iterator[Ref]:
    """Yield every `Ref` in a captured tree."""
    if isinstance(captured, Ref):
        yield captured
    elif isinstance(captured, dict):
        for value in captured.values():
            yield from refs(value)
    elif isinstance(captured, list | tuple):
        for value in () if _SCALARS.issuperset(map(type, captured)) else captured:
            yield from refs(value)
    elif isinstance(captured, Node):
        yield from refs(captured.holds)


def moved(value: Any, device: torch.device) -> Any:
    """Return a value from `decode`, with its tensors on this device."""
    tensors: dict[str, torch.Tensor] = {}
    captured = capture(value, "", tensors.__setitem__)
    return refill(captured, lambda name: tensors[name].to(device))


def rough_size(captured: Any) -> int:
    """Return an upper bound for the bytes that a captured tree takes as JSON or as a pickle."""
    kind = type(captured)
    if kind is dict:
        return 16 + sum(
            # A group may have thousands of parameter numbers; do not visit each.
            24 * len(value) if key == "params" and type(value) is list else rough_size(key) + rough_size(value)
            for key, value in captured.items()
        )
    if kind is list or kind is tuple:
        return 32 + sum(map(rough_size, captured))
    if kind is Node:
        return 64 + rough_size(captured.says) + rough_size(captured.holds)
    if kind is str or kind is bytes:
        return 32 + 6 * len(captured)  # six: a character escaped as \\uXXXX
    if kind is int:
        return 32 + int(captured).bit_length() // 3
    return 96
