"""Optimizers of divided models: `optimizer.safetensors`, which holds the state under the names of the parameters.

Format: the tensor `state[parameter][key]` is named `{name of the parameter}.{key}` and has the shape that it has on one
process. So the file does not show how it was divided. A tensor in a parameter group is named `group.{number}.{key}`.
What is no tensor is in the training state. There, too, parameters have names in the place of numbers.

With FSDP version 1 an optimizer has state on a rank only for the parameters of which the rank holds a piece. So the
ranks tell each other what they have.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from .._format.plan import TensorContent
from .._format.safetensors import TensorSpec
from ..errors import PlanError
from . import memory_format, tree
from .agreement import Agreement, Entry
from .divided_model import DividedState
from .optimizer import call_state_dict, kind_of, unwrap
from .optimizer_layout import has_torchs_layout
from .parameters import Parameter, given_names, groups_of
from .shares import Addresses, Sharding, Share, dtype_name

NameOf = Callable[[torch.Tensor], str | None]
_Held = dict[str, tuple[torch.Tensor, dict[Any, Any]]]  # parameter and its state on this rank, by the parameter's name


@dataclass(frozen=True)
class DividedOptimizerState(DividedState):
    """An optimizer of divided models as it will be on disk.

    `rest`: in JSON, its state_dict without the tensors of its state, and with names in the place of numbers.
    `parameters`: see `parameters.Described`.
    """

    optimizer: Any = None
    rest: Any = None
    parameters: list[list[Parameter]] = field(default_factory=list)

    @property
    def rough_size(self) -> int:
        """An upper bound for `described()`, in bytes of JSON."""
        return tree.rough_size([self.rest, self.parameters])

    def parameter_ids(self) -> set[int]:
        """Return the ids of the parameters that the optimizer steps."""
        return set(map(id, _parameters(self.optimizer)))

    def described(self) -> str:
        """Return the entry of the optimizer in the training state, as JSON."""
        return tree.to_json(
            {
                "file": self.contents[0].name,
                "rest": self.rest,
                "class": kind_of(self.optimizer),
                "parameters": self.parameters,
            }
        )


@dataclass
class _Learned:
    """What stays valid as long as the optimizer has the same tensors in the same places.

    `looks`: names and identities of the parameters and tensors. `tensors` are kept, so that no other gets the same id.
    `local`, `entries`: what this rank has, and what all ranks have.
    """

    looks: Any
    tensors: list[torch.Tensor]
    addresses: Addresses
    local: Mapping[str, Entry]
    entries: Mapping[str, Entry]
    content: TensorContent
    shares: list[Share]
    owners: list[Any]
    parameters: list[list[Parameter]]


class DividedOptimizerReader:
    """Reads one optimizer of divided models repeatedly. Keeps nothing of an optimizer that has been deleted."""

    def __init__(self, file: str, agreement: Agreement) -> None:
        self._file = file
        self._agreement = agreement
        self._optimizer: weakref.ref[Any] | None = None
        self._learned: _Learned | None = None

    def read(self, optimizer: Any, sharding: Sharding, name_of: NameOf) -> DividedOptimizerState:
        """Return the optimizer as it is now.

        `sharding`: says what this rank holds of the parameters.
        `name_of`: returns the name of a parameter in the models of this save, or None.

        With FSDP version 1 all ranks must call this: they wait for each other. Raises `PlanError` naming what cannot be
        saved.
        """
        inner = unwrap(optimizer)
        state = _state_dict(inner)
        names = _names(inner, name_of)
        parameters = _parameters(inner)
        numbers = [number for group in state["param_groups"] for number in group["params"]]
        held = _held(inner, state["state"], dict(zip(numbers, zip(names, parameters, strict=True), strict=True)))
        groups, in_groups = _capture_groups(state["param_groups"], names)
        values = [value for _, entry in held.values() for value in entry.values()]
        tensors = [value for value in values if isinstance(value, torch.Tensor)]
        looks = (
            names,
            list(in_groups),
            [(name, *entry) for name, (_, entry) in held.items()],
            list(map(id, (*parameters, *tensors, *in_groups.values()))),
        )
        learned = self._learned if self._optimizer is not None and self._optimizer() is inner else None
        if (
            learned is not None
            and learned.looks == looks
            and learned.addresses.are_same()
            and len(tensors) == len(values)
        ):
            local = learned.local
        else:
            learned, local = None, _described(held, sharding)
        flat = any(id(parameter) in sharding.flat for parameter in parameters)
        entries = self._agreement.of_all_ranks(self._file, local) if flat else local
        if learned is None or learned.entries is not entries:
            shares = _shares(names, parameters, held, entries, in_groups, sharding)
            learned = _Learned(
                looks=looks,
                tensors=[*tensors, *in_groups.values()],
                addresses=Addresses(sharding, [*parameters, *tensors, *in_groups.values()]),
                local=local,
                entries=entries,
                content=self._content(shares),
                shares=shares,
                owners=[inner] * (len(shares) - len(in_groups)) + [None] * len(in_groups),
                parameters=_parameters_of_groups(inner, names, sharding),
            )
            self._keep(inner, learned)
        return DividedOptimizerState(
            contents=(learned.content,),
            shares=learned.shares,
            owners=learned.owners,
            optimizer=inner,
            rest={
                "state": {name: entries[name].values for name in names if name in entries},
                "param_groups": tree.encode(groups),
            },
            parameters=learned.parameters,
        )

    def _content(self, shares: Sequence[Share]) -> TensorContent:
        specs = tuple(TensorSpec(share.name, dtype_name(share), share.shape) for share in shares)
        if len({each.name for each in specs}) < len(specs):
            names = [each.name for each in specs]
            twice = sorted({name for name in names if names.count(name) > 1})
            raise PlanError(f"{self._file}: two values of the state have the same name: {twice}; rename a parameter")
        content = TensorContent(self._file, specs, {"format": "pt"})
        known = None if self._learned is None else self._learned.content
        return known if known is not None and known == content else content

    def _keep(self, inner: Any, learned: _Learned) -> None:
        def forget(reference: Any) -> None:
            if self._optimizer is reference:  # the deleted optimizer is the current one, not an earlier one
                self._learned = None

        self._optimizer = weakref.ref(inner, forget)
        self._learned = learned


def _parameters(inner: Any) -> list[torch.Tensor]:
    return [parameter for group in inner.param_groups for parameter in group["params"]]


def _state_dict(inner: Any) -> Any:
    state: Any = call_state_dict("optimizer", inner) if callable(getattr(inner, "state_dict", None)) else None
    if groups_of(inner) is None or not has_torchs_layout(state) or len(state) != 2:
        raise PlanError(
            f"optimizer: the state of a {kind_of(inner)} does not belong to single parameters, so with a divided model nothing "
            "says what this rank holds of it; use an optimizer with the state_dict of torch.optim.Optimizer"
        )
    return state


def _names(inner: Any, name_of: NameOf) -> list[str]:
    """Return the name of each parameter that the optimizer steps."""
    names: list[str] = []
    for number, group in enumerate(inner.param_groups):
        for parameter, given in zip(group["params"], given_names(group), strict=True):
            name = name_of(parameter) or given
            if name is None:
                raise PlanError(
                    f"optimizer: a parameter of shape {list(parameter.shape)} in its group {number} is in no model of this save, "
                    "so its state has no name; pass every model that the optimizer steps as model="
                )
            names.append(name)
    return names


def _held(inner: Any, state: Mapping[Any, Any], of_number: Mapping[Any, tuple[str, torch.Tensor]]) -> _Held:
    held: _Held = {}
    for number, entry in state.items():
        if number not in of_number or type(entry) is not dict or not all(type(key) is str for key in entry):
            raise PlanError(
                f"optimizer: the state {number!r} of a {kind_of(inner)} is not the state of a parameter, by name; with a divided "
                "model only such state can be saved"
            )
        name, parameter = of_number[number]
        held[name] = parameter, entry
    return held


def _capture_groups(
    groups: Sequence[Mapping[str, Any]], names: Sequence[str]
) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    """Return the parameter groups with names in the place of numbers, and the tensors in them by name."""
    tensors: dict[str, torch.Tensor] = {}
    left = iter(names)
    captured = []
    for number, group in enumerate(groups):
        options: dict[str, Any] = {}
        for key, value in group.items():
            if key == "params":
                options[key] = [next(left) for _ in value]
            elif type(value) in tree.SCALARS:
                options[key] = value
            else:
                # `weights_only`, which other readers require, cannot unpickle numpy scalars.
                plain = value.item() if isinstance(value, np.generic) else value
                options[key] = tree.capture(plain, f"group.{number}.{key}", tree.sharing(tensors.__setitem__))
        captured.append(options)
    return captured, tensors


def _described(held: _Held, sharding: Sharding) -> dict[str, Entry]:
    """Return what this rank has of the state. Raises `PlanError` for what is not divided like its parameter."""
    return {name: _entry(name, parameter, entry, sharding) for name, (parameter, entry) in held.items()}


def _entry(name: str, parameter: torch.Tensor, entry: Mapping[str, Any], sharding: Sharding) -> Entry:
    def refuse(where: str, tensor: torch.Tensor) -> str | None:
        raise PlanError(
            f"optimizer: {where} is a tensor inside another value; with a divided model nothing says what this rank holds of it"
        )

    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    values: dict[str, Any] = {}
    for key, value in entry.items():
        if isinstance(value, torch.Tensor):
            share = sharding.share_of_state(f"{name}.{key}", value, parameter)
            tensors[key] = dtype_name(share), share.shape
            values[key] = None
        else:
            values[key] = tree.encode(tree.capture(value, f"{name}.{key}", refuse))
    piece = sharding.flat.get(id(parameter))
    leads = piece is None or piece.is_first
    return Entry(tensors, values if len(tensors) < len(values) else {}, leads)


def _shares(
    names: Sequence[str],
    parameters: Sequence[torch.Tensor],
    held: _Held,
    entries: Mapping[str, Entry],
    in_groups: Mapping[str, torch.Tensor],
    sharding: Sharding,
) -> list[Share]:
    """Return what this rank holds of each tensor of the file, in its order."""
    shares = []
    for name, parameter in zip(names, parameters, strict=True):
        _, entry = held.get(name, (parameter, {}))
        for key, (dtype, shape) in entries[name].tensors.items() if name in entries else ():
            if key in entry:
                shares.append(sharding.share_of_state(f"{name}.{key}", entry[key], parameter))
            else:
                shares.append(sharding.flat[id(parameter)].share_elsewhere(f"{name}.{key}", dtype, shape))
    return [*shares, *(sharding.share(name, tensor) for name, tensor in in_groups.items())]


def _parameters_of_groups(inner: Any, names: Sequence[str], sharding: Sharding) -> list[list[Parameter]]:
    left = iter(names)
    return [
        [_parameter(next(left), parameter, sharding) for parameter in group["params"]] for group in inner.param_groups
    ]


def _parameter(name: str, parameter: torch.Tensor, sharding: Sharding) -> Parameter:
    piece = sharding.flat.get(id(parameter))
    if piece is not None:
        return [name, list(piece.shape)]
    strides = memory_format.kept(parameter) if parameter.layout is torch.strided else None
    return [name, list(parameter.shape), *([] if strides is None else [list(strides)])]
