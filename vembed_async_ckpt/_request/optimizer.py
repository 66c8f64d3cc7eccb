"""Optimizers: `optimizer.bin` as torch would write it, and the same state for our own `load`, which never unpickles."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from operator import attrgetter
from typing import Any

import numpy as np
import torch

from .._plan.plan import ZipContent
from ..errors import PlanError
from . import memory_format, optimizer_pickle, tree
from .dtypes import FROM_TORCH, check_storage
from .optimizer_pickle import Kind
from .tree import Ref


@dataclass(frozen=True)
class OptimizerState:
    """An optimizer as it will stand on disk.

    `tensors` are as their bytes lie in the file: what is not contiguous is permuted so that it is (see `memory_format.order`).
    `tensors`, `keys`, `labels` (names in errors) and `owned` run in parallel; `owned` is what only a step of the `optimizer`
    changes (a scheduler may write to a tensor `lr`). `tree` is the captured state_dict; `pickled()` makes
    `data.pkl` of it. `arrays`: copies of what was no tensor but a numpy array: in the pickle they stand as such, by value.
    `rough_size`: an upper bound for `rest()`, in bytes of JSON.
    """

    content: ZipContent
    optimizer: Any
    tensors: list[torch.Tensor]
    keys: Sequence[str]
    labels: Sequence[str]
    owned: Sequence[bool]
    kinds: Sequence[Kind]
    tree: Mapping[str, Any]
    arrays: Mapping[str, torch.Tensor]
    state_pickle: bytes | None
    rough_size: int

    @property
    def owners(self) -> list[Any]:
        """Of each tensor: the optimizer, or None."""
        return [self.optimizer if owned else None for owned in self.owned]

    def pickled(self) -> bytes:
        """`data.pkl`: torch's own pickle of this state_dict, its tensors being the records 0, 1, ... of the file."""
        refs = dict(zip(self.keys, enumerate(self.kinds), strict=True))
        if self.state_pickle is None or set(self.tree) != {"state", "param_groups"}:
            return optimizer_pickle.dumps(self.tree, refs, self.arrays)
        groups = optimizer_pickle.inner(optimizer_pickle.dumps(self.tree["param_groups"], refs, self.arrays))
        return optimizer_pickle.state_dict(self.state_pickle, groups)

    def table(self, offsets: Sequence[int]) -> dict[str, Any]:
        """{key: [dtype, shape, offset in the file]} for the manifest, and the strides of what is not contiguous."""
        return {
            key: [
                _dtype_name(kind.dtype),
                list(kind.shape),
                offset,
                *([] if kind.strides is None else [list(kind.strides)]),
            ]
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


def _dtype_name(dtype: torch.dtype) -> str:
    """safetensors' name where it says as much as torch's: its shapes of F4 count numbers, torch's pairs of them."""
    name = FROM_TORCH.get(dtype)
    return str(dtype).removeprefix("torch.") if name is None or name == "F4" else name


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
        self._kinds: list[Kind] = []
        self._orders: list[
            tuple[int, memory_format.Strides]
        ] = []  # of what is not contiguous: its place, its dimensions
        self._owned: list[bool] = []
        self._plain: _PlainState | None = None
        self._numbers = _Numbers()

    def read(self, optimizer: Any) -> OptimizerState:
        """The optimizer as it is now. Raises `PlanError` naming the value that cannot be saved."""
        inner = unwrap(optimizer)
        if not callable(getattr(inner, "state_dict", None)):
            raise PlanError(f"optimizer: a {type(inner).__module__}.{type(inner).__qualname__} has no state_dict()")
        return self._read(inner, self._numbers.state_dict(inner))

    def _read(self, inner: Any, state: Any) -> OptimizerState:
        keys: list[str] = []
        tensors: list[torch.Tensor] = []

        def put(key: str, tensor: torch.Tensor) -> None:
            keys.append(key)
            tensors.append(tensor)

        plain = self._plain_state(state, tensors)
        if plain is None:
            small = captured = self._capture(state, put)
        else:
            keys += plain.keys
            small = {"param_groups": _capture_groups(state, put)}
            captured = {"state": plain.refs, **small}
        self._plain = plain
        beside = len(keys) if plain is None else len(keys) - len(plain.keys)  # tensors and arrays in what is small
        arrays = {name: tensors[keys.index(name)] for name in _arrays(small)} if beside else {}
        # When what is pickled with the tensors has grown to twice its size, the file gets more room for it.
        rough_size = tree.rough_size(list(small.values())) + (0 if plain is None else 24 * len(plain.indices))
        shapes, strides = list(map(torch.Tensor.size, tensors)), list(map(torch.Tensor.stride, tensors))
        layout = (rough_size.bit_length(), keys, list(map(_DTYPE, tensors)), shapes, strides)
        if self._content is None or layout != self._layout:
            self._learn(keys, tensors, captured, arrays)
            self._layout = layout
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
            arrays=arrays,
            state_pickle=None if plain is None else plain.pickled,
            rough_size=rough_size,
        )

    def _plain_state(self, state: Any, tensors: list[torch.Tensor]) -> _PlainState | None:
        return _PlainState.of(state, self._plain, tensors)

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
        self._kinds = list(map(Kind.of, tensors))
        strided = [(place, kind.strides) for place, kind in enumerate(self._kinds) if kind.strides is not None]
        self._orders = [(place, memory_format.order(strides)) for place, strides in strided]
        self._owned = [not key.startswith(_GROUP) for key in keys]
        if self._plain is not None:
            self._plain.pickled = None  # the order of the records has changed
        refs = dict(zip(keys, enumerate(self._kinds), strict=True))
        size = len(optimizer_pickle.dumps(captured, refs, arrays))
        self._content = ZipContent(self._file, tuple(kind.nbytes for kind in self._kinds), size)


class RegisteredReader(OptimizerReader):
    """Reads the state of any object with a `state_dict()`, again and again, into a file as `torch.save` would write it."""

    def read(self, registered: Any) -> OptimizerState:
        """The object as it is now; nothing of it is copied late. Raises `PlanError` naming what cannot be saved."""
        return self._read(None, registered.state_dict())

    def _plain_state(self, state: Any, tensors: list[torch.Tensor]) -> None:
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
            key: value if type(value) in tree.SCALARS else _capture_option(f"{_GROUP}{number}.{key}", key, value, put)
            for key, value in group.items()
        }
        for number, group in enumerate(state["param_groups"])
    ]


def _capture_option(where: str, key: str, value: Any, put: tree.Put) -> Any:
    """A number that numpy computed becomes python's: numpy's cannot be unpickled with `weights_only`, which accelerate demands."""
    if key == "params":
        return list(value)
    return tree.capture(value.item() if isinstance(value, np.generic) else value, where, put)


class _Numbers:
    """The numbers of an optimizer's parameters in its state_dict, which stay as long as the same ones stand in the same places."""

    def __init__(self) -> None:
        self._grouped: list[list[int]] = []  # ids
        self._keys: list[int] = []
        self._of_groups: list[list[int]] = []  # numbers
        self._of_keys: list[Any] = []

    def state_dict(self, inner: Any) -> Any:
        """`inner.state_dict()`, which looks at every parameter, or the same made of the numbers known."""
        if not _packs_as_torch(inner):
            return inner.state_dict()
        grouped = [list(map(id, group["params"])) for group in inner.param_groups]
        keys = list(map(id, inner.state))
        if (grouped, keys) != (self._grouped, self._keys):
            state = inner.state_dict()
            self._grouped = []  # an interruption leaves nothing that is half known
            self._of_groups = [group["params"] for group in state["param_groups"]]
            self._of_keys = list(state["state"])
            self._keys = keys
            if len(self._of_keys) == len(keys):  # no key stands for two
                self._grouped = grouped
            return state
        return {
            "state": dict(zip(self._of_keys, inner.state.values(), strict=True)),
            "param_groups": [
                {key: value for key, value in group.items() if key != "params"} | {"params": numbers}
                for group, numbers in zip(inner.param_groups, self._of_groups, strict=True)
            ],
        }


_TORCHS = torch.optim.Optimizer.state_dict


def _packs_as_torch(optimizer: Any) -> bool:
    return (
        isinstance(optimizer, torch.optim.Optimizer)
        and type(optimizer).state_dict is _TORCHS
        and "state_dict" not in vars(optimizer)
        and not optimizer._optimizer_state_dict_pre_hooks
        and not optimizer._optimizer_state_dict_post_hooks
    )


@dataclass
class _PlainState:
    """The state of torch's own optimizers: parameters by number, each with a dict of tensors and nothing else.

    Its captured form and its pickle say only names and shapes, so they are made once and used for every save.
    """

    indices: list[int]
    counts: list[int]  # of the tensors of each parameter
    names: list[str]  # of these tensors, one parameter's after the other's
    keys: list[str]
    refs: dict[int, dict[str, Ref]]
    pickled: bytes | None = None

    @classmethod
    def of(cls, state: Any, known: _PlainState | None, tensors: list[torch.Tensor]) -> _PlainState | None:
        """`known` if it still describes `state`, else a new one, and the tensors of `state` in the order of `keys`. None and no
        tensors if this state is not of that kind."""
        if not isinstance(state, dict) or state.keys() != {"state", "param_groups"}:
            return None
        entries = state["state"]
        if type(entries) is not dict or not set(map(type, entries.values())) <= {dict}:
            return None
        values = list(chain.from_iterable(map(dict.values, entries.values())))
        if not all(issubclass(kind, torch.Tensor) for kind in set(map(type, values))):
            return None
        indices, counts = list(entries), list(map(len, entries.values()))
        names = list(chain.from_iterable(entries.values()))
        if known is None or (known.indices, known.counts, known.names) != (indices, counts, names):
            if not set(map(type, indices)) <= {int} or not set(map(type, names)) <= {str}:
                return None
            refs = {index: {key: Ref(direct_key(index, key)) for key in entry} for index, entry in entries.items()}
            known = cls(indices, counts, names, [ref.name for entry in refs.values() for ref in entry.values()], refs)
        tensors += values
        return known
