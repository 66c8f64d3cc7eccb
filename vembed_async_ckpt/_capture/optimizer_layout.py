"""The state layout of torch's own optimizers: parameters by number, each with a dict of tensors.

Values that contain only names are made once and reused for every save.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch

from . import tree
from .tree import Ref, to_json


def direct_key(index: Any, key: Any) -> str:
    """Return the name of the tensor `state[index][key]` in the table."""
    return f"{index}.{key}"


def is_direct(index: Any, key: Any, value: Any) -> bool:
    """Return whether `value` in a captured `state[index][key]` is the reference to the tensor of that name."""
    return isinstance(value, Ref) and type(key) is str and type(index) is int and value.name == direct_key(index, key)


def has_groups(state: Any) -> bool:
    """Return whether a state_dict has parameter groups like those of torch."""
    groups = state.get("param_groups")
    return type(groups) is list and all(type(group) is dict and type(group.get("params")) is list for group in groups)


def has_torchs_layout(state: Any) -> bool:
    """Return whether a state_dict is `{"state": {number: ...}, "param_groups": [...]}`, possibly with more keys."""
    return isinstance(state, dict) and isinstance(state.get("state"), dict) and has_groups(state)


@dataclass
class Parts:
    """A state_dict of torch's layout that has nothing but the two parts.

    `indices`, `entries`: keys and values of its "state".
    `groups`: its "param_groups".
    """

    indices: Sequence[Any]
    entries: list[Any]
    groups: list[dict[str, Any]]

    @classmethod
    def of(cls, state: Any) -> Parts | None:
        """Return the parts of a state_dict, or None if it has another layout."""
        if not has_torchs_layout(state) or len(state) != 2 or type(state["state"]) is not dict:
            return None
        entries = state["state"]
        return cls(list(entries), list(entries.values()), state["param_groups"])

    def state_dict(self) -> dict[str, Any]:
        return {"state": dict(zip(self.indices, self.entries, strict=True)), "param_groups": self.groups}


class Numbers:
    """The numbers of an optimizer's parameters in its state_dict.

    They stay valid while the same parameters are in the same places.
    """

    def __init__(self) -> None:
        self._grouped: list[list[int]] = []  # ids
        self._keys: list[int] = []
        self._of_groups: list[list[int]] = []  # numbers
        self._of_keys: list[Any] = []

    def read(self, inner: Any) -> Parts | Any:
        """Return the state_dict of `inner`; as `Parts` if it is made by torch's own `state_dict()`.

        If the numbers are known, the parts are made without looking at every parameter.
        """
        if not _packs_as_torch(inner):
            return inner.state_dict()
        grouped = [list(map(id, group["params"])) for group in inner.param_groups]
        keys = list(map(id, inner.state))
        if keys != self._keys or grouped != self._grouped:
            state = inner.state_dict()
            self._grouped = []  # after an interruption the numbers count as unknown
            self._of_groups = [group["params"] for group in state["param_groups"]]
            self._of_keys = list(state["state"])
            self._keys = keys
            if len(self._of_keys) == len(keys):  # every parameter has its own key
                self._grouped = grouped
            return Parts.of(state) or state
        groups = [
            {key: value for key, value in group.items() if key != "params"} | {"params": numbers}
            for group, numbers in zip(inner.param_groups, self._of_groups, strict=True)
        ]
        return Parts(self._of_keys, list(inner.state.values()), groups)


_TORCHS = torch.optim.Optimizer.state_dict


def _packs_as_torch(optimizer: Any) -> bool:
    if not isinstance(optimizer, torch.optim.Optimizer):
        return False
    attributes = vars(optimizer)
    return (
        type(optimizer).state_dict is _TORCHS
        and "state_dict" not in attributes
        # absent if super().__init__ was not called
        and not attributes.get("_optimizer_state_dict_pre_hooks", True)
        and not attributes.get("_optimizer_state_dict_post_hooks", True)
    )


@dataclass
class PlainState:
    """A state of torch's own optimizers that contains only tensors: parameters by number, each with a dict of tensors.

    Each tensor is in one place. The captured form and the pickle contain only names and shapes, so they are made once
    and reused for every save.
    """

    indices: list[int]
    counts: list[int]  # number of tensors of each parameter
    names: list[str]  # names of these tensors, parameter by parameter
    keys: list[str]
    refs: dict[int, dict[str, Ref]]
    ids: list[int]  # of the tensors when they were last looked at: no two of them are equal
    rest: str  # what the training state says of this part, as JSON
    pickled: bytes | None = None

    @classmethod
    def of(cls, parts: Parts, known: PlainState | None, tensors: list[torch.Tensor]) -> PlainState | None:
        """Return `known` if it still describes the parts, else a new one.

        Append the tensors to `tensors`, in the order of `keys`.

        Returns None and appends nothing if this state contains anything else.
        """
        entries = parts.entries
        if not set(map(type, entries)) <= {dict}:
            return None
        values = list(chain.from_iterable(map(dict.values, entries)))
        names, counts = list(chain.from_iterable(entries)), list(map(len, entries))
        if not all(issubclass(kind, torch.Tensor) for kind in set(map(type, values))):
            return None
        ids = list(map(id, values))
        if (known is None or ids != known.ids) and len(set(ids)) != len(ids):  # some of them share a tensor
            return None
        if known is None or (known.names, known.counts, known.indices) != (names, counts, parts.indices):
            indices = list(parts.indices)
            if not set(map(type, indices)) <= {int} or not set(map(type, names)) <= {str}:
                return None
            refs = {
                index: {key: Ref(direct_key(index, key)) for key in entry}
                for index, entry in zip(indices, entries, strict=True)
            }
            keys = [ref.name for entry in refs.values() for ref in entry.values()]
            rest = to_json(tree.encode({index: {} for index in indices}))
            known = cls(indices, counts, names, keys, refs, ids, rest)
        known.ids = ids
        tensors += values
        return known
