"""Optimizers: captures `optimizer.bin` as torch would write it, and the same state for our own `load`.

Our `load` never unpickles.
"""

from __future__ import annotations

import pickle
import sys
from collections import Counter
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .._format.plan import ZipContent
from .._tensor_guard import TensorGuard
from ..errors import PlanError
from . import memory_format, optimizer_pickle, tree
from .dtypes import FROM_TORCH, check_storage
from .optimizer_layout import Numbers, Parts, PlainState, direct_key, has_torchs_layout, is_direct
from .optimizer_pickle import Kind
from .parameters import Described, Names, Parameters, groups_of
from .tree import Ref, to_json


@dataclass(frozen=True)
class OptimizerState:
    """An optimizer as it will be on disk.

    `content`: the layout of the file.
    `optimizer`: the optimizer without accelerate's wrapper.
    `tensors`: each in the order of its bytes in the file. A tensor that is not contiguous is permuted so that it is
        (see `memory_format.order`).
    `keys`, `labels`: the key of each tensor, and its name in errors.
    `owned`: whether only a step of the `optimizer` changes the tensor. A scheduler may write to a tensor `lr`, and a
        wrapper to what it keeps beside the state.
    `kinds`: dtype, shape and strides of each tensor.
    `tree`: the captured state_dict, from which `pickled()` makes `data.pkl`.
    `parameters`: None if there are no parameter groups.
    `arrays`: copies of the numpy arrays. The pickle contains them by value.
    `state_pickle`, `state_rest`: the pickle of the "state" part, and its part of `rest()` as JSON. None if they must be
        made for every save.
    `rough_size`: an upper bound for `rest()`, in bytes of JSON.
    `looks`: the same object as long as keys and looks of the tensors are the same.
    """

    content: ZipContent
    optimizer: Any
    tensors: list[torch.Tensor]
    keys: Sequence[str]
    labels: Sequence[str]
    owned: Sequence[bool]
    kinds: Sequence[Kind]
    tree: Any
    parameters: Parameters | None
    arrays: Mapping[str, torch.Tensor]
    state_pickle: bytes | None
    state_rest: str | None
    rough_size: int
    looks: TensorGuard

    @property
    def owners(self) -> list[Any]:
        """For each tensor the optimizer, or None if something else may change it too."""
        return [self.optimizer if owned else None for owned in self.owned]

    def parameter_ids(self) -> set[int] | None:
        """Return the ids of the parameters that the optimizer steps; None if it has no parameter groups."""
        groups = groups_of(self.optimizer)
        return None if groups is None else {id(parameter) for group in groups for parameter in group["params"]}

    def pickled(self) -> bytes:
        """Return `data.pkl`: torch's own pickle of this state_dict.

        The tensors in it are the records 0, 1, ... of the file.
        """
        if self.state_pickle is None:
            refs = dict(zip(self.keys, enumerate(self.kinds), strict=True))
            return optimizer_pickle.dumps(self.tree, refs, self.arrays)
        groups = self.tree["param_groups"]
        numbers = {name: self.keys.index(name) for name in {ref.name for ref in tree.refs(groups)}}
        refs = {name: (number, self.kinds[number]) for name, number in numbers.items()}
        pickled = optimizer_pickle.dumps(groups, refs, self.arrays)
        return optimizer_pickle.state_dict(self.state_pickle, optimizer_pickle.inner(pickled))

    def table(self, offsets: Sequence[int]) -> dict[str, Any]:
        """Return {key: [dtype, shape, offset in the file]} for the manifest.

        A tensor that is not contiguous also has its strides.
        """
        return {
            key: [
                _dtype_name(kind.dtype),
                list(kind.shape),
                offset,
                *([] if kind.strides is None else [list(kind.strides)]),
            ]
            for key, kind, offset in zip(self.keys, self.kinds, offsets, strict=True)
        }

    def described(self) -> str:
        """Return the entry of the optimizer in the training state, as JSON."""
        said = {"file": to_json(self.content.name), "class": to_json(kind_of(self.optimizer))}
        if self.state_rest is None:
            said["rest"] = to_json(self.rest())
        else:
            groups = to_json(tree.encode(self.tree["param_groups"]))
            said["rest"] = f'{{"state":{self.state_rest},"param_groups":{groups}}}'
        if self.parameters is not None:
            said["parameters"] = self.parameters.json
        return "{" + ",".join(f'"{key}":{value}' for key, value in said.items()) + "}"

    def rest(self) -> Any:
        """Return everything except the tensors that are direct entries of a parameter's state. The table has those."""
        if not has_torchs_layout(self.tree):
            return tree.encode(self.tree)
        captured = dict(self.tree)
        entries = captured["state"]
        if all(isinstance(entry, dict) for entry in entries.values()):
            shared = _shared(captured)
            captured["state"] = {index: _without_tensors(index, entry, shared) for index, entry in entries.items()}
        return tree.encode(captured)


def _shared(captured: Any) -> set[str]:
    """Return the names of the tensors that are in several places."""
    return {name for name, count in Counter(ref.name for ref in tree.refs(captured)).items() if count > 1}


def _without_tensors(index: Any, entry: Mapping[Any, Any], shared: Container[str]) -> dict[Any, Any]:
    """Return the part of a parameter's state that is not only in the table.

    Beside other values, None marks the place of a tensor. The `shared` tensors stay: `load` needs to know all of their places.
    """
    in_table = {key for key, value in entry.items() if is_direct(index, key, value) and value.name not in shared}
    rest = {key: None if key in in_table else value for key, value in entry.items()}
    return rest if len(in_table) < len(entry) else {}


def _dtype_name(dtype: torch.dtype) -> str:
    """Return safetensors' name of a dtype, or torch's name if that says more.

    For F4, safetensors counts single 4-bit numbers in a shape, and torch counts pairs of them. So F4 gets torch's name.
    """
    name = FROM_TORCH.get(dtype)
    return str(dtype).removeprefix("torch.") if name is None or name == "F4" else name


_GROUP = "group."
_NO_NAMES = Names()


def unwrap(optimizer: Any) -> Any:
    """Return the optimizer inside accelerate's own wrapper, which has the same state_dict.

    Any other wrapper may have state of its own and is returned as it is.
    """
    accelerate = sys.modules.get("accelerate.optimizer")
    while accelerate is not None and isinstance(optimizer, accelerate.AcceleratedOptimizer):
        if type(optimizer).state_dict is not accelerate.AcceleratedOptimizer.state_dict or "state_dict" in vars(
            optimizer
        ):
            break
        optimizer = optimizer.optimizer
    return optimizer


def kind_of(value: Any) -> str:
    """Return the name of an object's class, as used in checkpoints and messages."""
    return f"{type(value).__module__}.{type(value).__qualname__}"


def call_state_dict(what: str, owner: Any, ask: Callable[[Any], Any] = lambda owner: owner.state_dict()) -> Any:
    """Return what `state_dict()` of an object returns. Raises `PlanError` if the call fails."""
    try:
        return ask(owner)
    except Exception as error:
        raise PlanError(
            f"{what}: state_dict() of a {kind_of(owner)} failed: {type(error).__name__}: {error}"
        ) from error


class OptimizerReader:
    """Reads one optimizer repeatedly. It keeps only names, shapes and the pickle that describes them."""

    def __init__(self, file: str) -> None:
        self._file = file
        self._layout: Any = None
        self._looks = TensorGuard([])
        self._content: ZipContent | None = None
        self._keys: list[str] = []
        self._labels: list[str] = []
        self._kinds: list[Kind] = []
        self._orders: list[tuple[int, memory_format.Strides]] = []  # (index, dimensions) of each non-contiguous tensor
        self._owned: list[bool] = []
        self._plain: PlainState | None = None
        self._numbers = Numbers()
        self._groups: tuple[Any, int] = None, 0  # the captured groups of the last save, and their rough size
        self._described = Described()

    def read(self, optimizer: Any, names: Names = _NO_NAMES) -> OptimizerState:
        """Return the optimizer as it is now.

        `names` has the names of its parameters. Raises `PlanError` naming what cannot be saved.
        """
        inner = unwrap(optimizer)
        if not callable(getattr(inner, "state_dict", None)):
            raise PlanError(f"optimizer: a {kind_of(inner)} has no state_dict()")
        state = call_state_dict("optimizer", inner, self._numbers.read)
        return self._read(inner, state, self._described.read(inner, names))

    def _read(self, inner: Any, state: Any, parameters: Parameters | None) -> OptimizerState:
        keys: list[str] = []
        tensors: list[torch.Tensor] = []

        def append(key: str, tensor: torch.Tensor) -> None:
            keys.append(key)
            tensors.append(tensor)

        parts = state if isinstance(state, Parts) else Parts.of(state)
        plain = None if parts is None else self._plain_state(parts, tensors)
        put = tree.sharing(append)
        if parts is None or plain is None:
            captured = self._capture(state.state_dict() if isinstance(state, Parts) else state, put)
            small = [captured]
        else:
            keys += plain.keys
            groups = _capture_groups(parts.groups, put)
            captured, small = {"state": plain.refs, "param_groups": groups}, [groups]
            if groups != self._groups[0]:
                self._groups = groups, tree.rough_size(groups) + 24 * len(plain.indices)
        self._plain = plain
        beside = len(keys) if plain is None else len(keys) - len(plain.keys)  # number of tensors and arrays in `small`
        arrays = {ref.name: tensors[keys.index(ref.name)] for ref in tree.refs(small) if ref.numpy} if beside else {}
        # When the pickled values have grown to twice their size, the file gets more room for them.
        rough_size = tree.rough_size(captured) if plain is None else self._groups[1]
        layout = (rough_size.bit_length(), keys)
        if self._content is None or layout != self._layout or not self._looks.holds(tensors):
            self._learn(keys, tensors, captured, arrays)
            self._layout, self._looks = layout, TensorGuard(tensors)
        assert self._content is not None
        for place, order in self._orders:
            tensors[place] = tensors[place].permute(order)
        if plain is not None and plain.pickled is None:
            refs = dict(zip(self._keys, enumerate(self._kinds), strict=True))
            plain.pickled = optimizer_pickle.inner(optimizer_pickle.dumps(plain.refs, refs))
        return OptimizerState(
            content=self._content,
            optimizer=inner,
            tensors=tensors,
            keys=self._keys,
            labels=self._labels,
            owned=self._owned,
            kinds=self._kinds,
            tree=captured,
            parameters=parameters,
            arrays=arrays,
            state_pickle=None if plain is None else plain.pickled,
            state_rest=None if plain is None else plain.rest,
            rough_size=rough_size,
            looks=self._looks,
        )

    def _plain_state(self, parts: Parts, tensors: list[torch.Tensor]) -> PlainState | None:
        return PlainState.of(parts, self._plain, tensors)

    def _capture(self, state: Any, put: tree.Put) -> Any:
        if not has_torchs_layout(state):
            return tree.capture(state, "state_dict", put)
        result: dict[str, Any] = {}
        for name, value in state.items():
            if name == "state":
                result[name] = {index: _capture_entry(index, entry, put) for index, entry in value.items()}
            elif name == "param_groups":
                result[name] = _capture_groups(value, put)
            else:
                result[name] = tree.capture(value, f"state_dict.{name}", put)
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
        self._kinds = list(map(Kind.of, tensors))
        strided = [(place, kind.strides) for place, kind in enumerate(self._kinds) if kind.strides is not None]
        self._orders = [(place, memory_format.order(strides)) for place, strides in strided]
        # In a state of unknown layout, the owner of a tensor is not known.
        known = has_torchs_layout(captured)
        self._owned = [known and not key.startswith((_GROUP, "state_dict.")) for key in keys]
        if self._plain is not None:
            self._plain.pickled = None  # the order of the records has changed
        refs = dict(zip(keys, enumerate(self._kinds), strict=True))
        try:
            size = len(optimizer_pickle.dumps(captured, refs, arrays))
        except (TypeError, AttributeError, pickle.PicklingError) as error:
            raise PlanError(f"{self._file}: holds a value that torch.save cannot write either: {error}") from error
        self._content = ZipContent(self._file, tuple(kind.nbytes for kind in self._kinds), size)


class RegisteredReader(OptimizerReader):
    """Reads the state of any object with a `state_dict()` repeatedly, into a file as `torch.save` would write it."""

    def read(self, registered: Any, names: Any = None) -> OptimizerState:
        """Return the object as it is now. None of it is copied late. Raises `PlanError` naming what cannot be saved."""
        return self._read(None, registered.state_dict(), None)

    def _plain_state(self, parts: Parts, tensors: list[torch.Tensor]) -> None:
        return None

    def _capture(self, state: Any, put: tree.Put) -> Any:
        return tree.capture(state, "state_dict", put)


def _capture_entry(index: Any, entry: Any, put: tree.Put) -> Any:
    if type(entry) is not dict:
        return tree.capture(entry, f"state.{index}", put)
    result = {}
    for key, value in entry.items():
        if isinstance(value, torch.Tensor) and type(key) is str and type(index) is int:
            name = direct_key(index, key)
            result[key] = Ref(put(name, value) or name)
        else:
            result[key] = tree.capture(value, f"state.{index}.{key}", put)
    return result


def _capture_groups(groups: Sequence[Mapping[str, Any]], put: tree.Put) -> list[dict[str, Any]]:
    return [
        {
            key: value if type(value) in tree.SCALARS else _capture_option(f"{_GROUP}{number}.{key}", key, value, put)
            for key, value in group.items()
        }
        for number, group in enumerate(groups)
    ]


def _capture_option(where: str, key: str, value: Any, put: tree.Put) -> Any:
    """Capture one option of a parameter group. A numpy scalar becomes a Python number.

    `weights_only`, which accelerate requires, cannot unpickle numpy scalars.
    """
    if key == "params":
        return list(value)
    return tree.capture(value.item() if isinstance(value, np.generic) else value, where, put)
