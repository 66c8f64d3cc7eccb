"""What was true of a module when it was learned, and whether it still is."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter, is_
from typing import Any

import torch


class Truth:
    """What was true of a module when it was learned. Looked at before every save, so all of it in loops that run in C."""

    def __init__(
        self,
        module: torch.nn.Module,
        watched: Sequence[torch.Tensor],
        divided: Sequence[torch.Tensor],
        empty: Sequence[torch.Tensor],
        left_out: Sequence[torch.Tensor],
        ties: Sequence[tuple[torch.Tensor, torch.Tensor]],
    ) -> None:
        """`watched` are stored, `divided` are those of them that are stored in parts, `left_out` are frozen and not stored."""
        holders: list[dict[str, Any]] = [h for m in module.modules() for h in (m._modules, m._parameters, m._buffers)]
        entries = [(holder, key, value) for holder in holders for key, value in holder.items()]
        self._holders = [holder for holder, _, _ in entries]
        self._keys = [key for _, key, _ in entries]
        self._values = [value for _, _, value in entries]
        sets = [m._non_persistent_buffers_set for m in module.modules()]
        self._vacant = [holder for holder in (*holders, *sets) if not holder]
        self._filled = [holder for holder in holders if holder]
        self._counts = [len(holder) for holder in self._filled]
        self._sets = [names for names in sets if names]
        self._copies = [set(names) for names in self._sets]
        self._watched = list(watched)
        self._shapes = [tensor.shape for tensor in watched]
        self._dtypes = [tensor.dtype for tensor in watched]
        self._divided = list(divided)
        self._strides = [tensor.stride() for tensor in divided]
        self._empty = list(empty)
        self._left_out = list(left_out)
        self._one = [one for one, _ in ties]
        self._other = [other for _, other in ties]
        self._settings = _Settings(module)

    @property
    def stable(self) -> bool:
        return self._settings.stable

    def holds(self) -> bool:
        """Whether structure, identity, shape, dtype, ties and configuration are still those that were learned."""
        return (
            all(map(is_, map(dict.get, self._holders, self._keys), self._values))
            and not any(self._vacant)
            and list(map(len, self._filled)) == self._counts
            and self._sets == self._copies
            and list(map(torch.Tensor.size, self._watched)) == self._shapes
            and list(map(_DTYPE, self._watched)) == self._dtypes
            and list(map(torch.Tensor.stride, self._divided)) == self._strides
            and not any(map(torch.Tensor.numel, self._empty))
            and not any(map(_REQUIRES_GRAD, self._left_out))
            and list(map(torch.Tensor.data_ptr, self._one)) == list(map(torch.Tensor.data_ptr, self._other))
            and self._settings.unchanged()
        )


_DTYPE = attrgetter("dtype")
_REQUIRES_GRAD = attrgetter("requires_grad")


class _Settings:
    """The configs that a `save_pretrained` in the module writes, the containers in them, and plain attributes of parts that have
    a `save_pretrained` of their own, as they were."""

    def __init__(self, module: torch.nn.Module) -> None:
        self._attributes: list[tuple[Any, str, Any]] = []
        self._plain: list[tuple[torch.nn.Module, dict[str, Any]]] = []
        self._containers: dict[int, tuple[Any, Any, list[type]]] = {}
        for part in module.modules():
            save_pretrained = getattr(type(part), "save_pretrained", None)
            if part is module or callable(save_pretrained):
                for name in ("config", "generation_config", "peft_config"):
                    value = getattr(part, name, None)
                    self._attributes.append((part, name, value))
                    self._keep(value)
            if callable(save_pretrained) and save_pretrained.__module__.partition(".")[0] not in (
                "transformers",
                "peft",
            ):
                plain = _plain_attributes(part)
                self._plain.append((part, plain))
                self._keep(tuple(plain.values()))
        self.stable = self.unchanged()  # a config that is made anew at every look is not

    def _keep(self, value: Any) -> None:
        if isinstance(value, tuple):
            inner: Any = value
        elif isinstance(value, dict | list | set):
            if id(value) in self._containers:
                return
            inner = value.values() if isinstance(value, dict) else value
            self._containers[id(value)] = (value, value.copy(), list(map(type, inner)))
        elif callable(getattr(value, "to_dict", None)) and hasattr(value, "__dict__"):
            inner = (vars(value),)
        else:
            return
        for item in inner:
            self._keep(item)

    def unchanged(self) -> bool:
        try:
            return (
                all(getattr(part, name, None) is value for part, name, value in self._attributes)
                and all(_plain_attributes(part) == plain for part, plain in self._plain)
                and all(
                    live == copy and list(map(type, live.values() if isinstance(live, dict) else live)) == types
                    for live, copy, types in self._containers.values()
                )
            )
        except (ValueError, RuntimeError):  # what has no plain truth value was replaced
            return False


def _plain_attributes(module: torch.nn.Module) -> dict[str, Any]:
    """What else a `save_pretrained` may write: the module's attributes that are data."""
    return {
        name: value
        for name, value in vars(module).items()
        if name != "training" and not name.startswith("_") and isinstance(value, _DATA)
    }


_DATA = (int, float, str, bytes, dict, list, tuple, set, type(None))
