"""Detects changes of the data from which the files beside the weights are rendered."""

from __future__ import annotations

import dataclasses
import types
import weakref
from collections import deque
from itertools import repeat
from operator import is_
from typing import Any

import torch

_REFERENT = weakref.ref.__call__
_SCALARS = (str, bool, int, float, bytes, type(None))
_INERT = (*_SCALARS, type, torch.nn.Module, types.FunctionType, types.MethodType, types.ModuleType)
_CONTAINERS = (dict, list, tuple, set, frozenset, deque)
_SMALL_ARRAY = 64 << 10  # bytes
_SAMPLES = 64  # how many entries of a vocabulary are compared
_LARGE = 10_000  # up to this many entries, a container inside a processor is compared as a whole
_MANY = 5_000  # containers that are followed inside a processor
_MODEL_OPTIONS = (
    "unk_token", "dropout", "byte_fallback", "fuse_unk", "ignore_merges", "continuing_subword_prefix",
    "end_of_word_suffix", "max_input_chars_per_word",
)  # fmt: skip


class Settings:
    """Records data and detects changes of it, at any depth.

    Data are scalars, containers, dataclasses, namespaces, arrays up to 64 KiB, and objects with `to_dict` or
    `save_pretrained`. All other objects are compared by identity. A tokenizer of the tokenizers library is compared by
    its added tokens, padding, truncation, normalizer, pre-tokenizer, post-processor and decoder, by the options of its
    model, and by the size and 64 samples of its vocabulary.

    These changes are not noticed: a vocabulary or merges of equal size that are replaced in the same tokenizer, if no
    sample differs; changes inside larger arrays; changes inside objects that are compared by identity (modules,
    functions, objects without `__dict__`); and changes of files on disk that a `save_pretrained` copies.
    """

    def __init__(self, *, of_processor: bool = False) -> None:
        """`of_processor`: look into every object with a `__dict__`, up to 5,000 containers, and compare containers with
        more than 10,000 entries, such as vocabularies, by their length only."""
        self._of_processor = of_processor
        self._owners: list[weakref.ref[Any]] = []  # the objects of single attributes, parallel to names and attributes
        self._names: list[str] = []
        self._attributes: list[Any] = []
        self._holders: list[dict[str, Any]] = []  # the dicts of single entries, parallel to keys and values
        self._keys: list[str] = []
        self._values: list[Any] = []
        self._containers: list[tuple[Any, Any, list[Any]]] = []
        self._lengths: list[tuple[Any, int]] = []
        self._arrays: list[tuple[Any, bytes]] = []
        self._tensors: list[tuple[torch.Tensor, int]] = []
        self._tokens: list[Any] = []
        self._texts: list[str] = []
        self._tokenizers: list[tuple[Any, Any]] = []
        self._known: dict[int, Any] = {}  # what was followed already; held, so that no other object gets its id

    def follow_attribute(self, holder: Any, name: str) -> None:
        """Record an attribute of an object, or that it has none. The object itself is not held."""
        value = getattr(holder, name, None)
        if isinstance(holder, torch.nn.Module) and value is vars(holder).get(name, getattr(type(holder), name, None)):
            # On a module without the attribute, `getattr` takes ten times as long as these two together.
            self.follow_entry(vars(holder), name)
            holder, value = type(holder), getattr(type(holder), name, None)
        self._owners.append(weakref.ref(holder))
        self._names.append(name)
        self._attributes.append(value)
        self.follow(value)

    def follow_entry(self, holder: dict[str, Any], key: str) -> None:
        """Record an entry of a dict."""
        self._holders.append(holder)
        self._keys.append(key)
        self._values.append(holder.get(key))
        self.follow(holder.get(key))

    def follow_length(self, holder: dict[str, Any]) -> None:
        """Record how many entries a dict has."""
        self._lengths.append((holder, len(holder)))

    def follow(self, value: Any) -> None:
        """Record a value and the data inside it."""
        waiting = [value]
        while waiting:
            value = waiting.pop()
            if not isinstance(value, _INERT) and id(value) not in self._known:
                self._known[id(value)] = value
                waiting += self._note(value)

    def _note(self, value: Any) -> tuple[Any, ...]:
        """Record one value. Return what is inside it."""
        if isinstance(value, _CONTAINERS):
            if len(value) > _LARGE and self._of_processor:
                self._lengths.append((value, len(value)))
                return ()
            inner = list(value.values()) if isinstance(value, dict) else list(value)
            if not isinstance(value, tuple | frozenset):
                self._containers.append((value, value.copy(), _order_and_types(value)))
            return tuple(item for item in inner if not isinstance(item, _INERT))
        if isinstance(value, torch.Tensor):
            if not value.is_inference():
                self._tensors.append((value, value._version))
        elif type(value).__module__ == "numpy" and hasattr(value, "tobytes"):
            if value.nbytes <= _SMALL_ARRAY:
                self._arrays.append((value, value.tobytes()))
        elif type(value).__module__.partition(".")[0] == "tokenizers":
            if hasattr(value, "get_added_tokens_decoder"):
                self._tokenizers.append((value, _state_of_tokenizer(value)))
            else:
                self._tokens.append(value)
                self._texts.append(repr(value))
        elif _is_data(value) or (self._of_processor and hasattr(value, "__dict__") and len(self._containers) < _MANY):
            if hasattr(value, "save_pretrained"):
                self.follow_attribute(value, "_auto_class")
            return (vars(value),)
        return ()

    def unchanged(self) -> bool:
        """Return whether everything is still as recorded."""
        try:
            return (
                all(map(is_, map(dict.get, self._holders, self._keys), self._values))
                and all(
                    map(is_, map(getattr, map(_REFERENT, self._owners), self._names, repeat(None)), self._attributes)
                )
                and all(live == copy and _order_and_types(live) == kept for live, copy, kept in self._containers)
                and all(len(value) == size for value, size in self._lengths)
                and all(value.tobytes() == data for value, data in self._arrays)
                and all(tensor._version == version for tensor, version in self._tensors)
                and list(map(repr, self._tokens)) == self._texts
                and all(_state_of_tokenizer(tokenizer) == state for tokenizer, state in self._tokenizers)
            )
        except Exception:  # what cannot be compared counts as changed; saving it will report the error
            return False


def _is_data(value: Any) -> bool:
    """Return whether to look into an object, because its attributes decide what is written for it."""
    kind = type(value)
    return hasattr(value, "__dict__") and (
        dataclasses.is_dataclass(kind)
        or isinstance(value, types.SimpleNamespace)
        or callable(getattr(kind, "to_dict", None))
        or callable(getattr(kind, "save_pretrained", None))
    )


def _order_and_types(value: Any) -> list[Any]:
    """Return what `==` does not compare: the order of keys, and types (1 == True)."""
    if isinstance(value, dict):
        return [*value, *map(type, value.values())]
    return list(map(type, value))


def _state_of_tokenizer(tokenizer: Any) -> Any:
    model, size = tokenizer.model, tokenizer.get_vocab_size(False)
    parts = (tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.post_processor, tokenizer.decoder)
    return (
        type(model),
        size,
        list(map(tokenizer.id_to_token, range(0, size, max(size // _SAMPLES, 1)))),
        tokenizer.id_to_token(max(size - 1, 0)),
        [getattr(model, name, None) for name in _MODEL_OPTIONS],
        repr(tokenizer.get_added_tokens_decoder()),
        tokenizer.padding,
        tokenizer.truncation,
        [None if part is None else part.__getstate__() for part in parts],
    )
