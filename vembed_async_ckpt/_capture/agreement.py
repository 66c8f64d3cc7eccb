"""What all ranks together have of an optimizer's state, where each rank has only a part of the parameters."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import PlanError

Gather = Callable[[bytes], list[bytes]]  # sends a message to all ranks; returns theirs, in the order of the ranks


@dataclass(frozen=True)
class Entry:
    """What is saved of the state of one parameter.

    `tensors`: {key: (safetensors dtype, shape of the whole)} of its tensors.
    `values`: in JSON, what is no tensor, with None in the place of a tensor; empty if everything is a tensor.
    `leads`: whether this rank writes what belongs to the parameter as a whole, such as the number of steps.
    """

    tensors: Mapping[str, tuple[str, tuple[int, ...]]]
    values: Mapping[str, Any]
    leads: bool

    @classmethod
    def of_json(cls, said: Any) -> Entry:
        return cls({key: (kind, tuple(shape)) for key, (kind, shape) in said[0].items()}, said[1], said[2])

    def to_json(self) -> Any:
        return [self.tensors, self.values, self.leads]


class Agreement:
    """Puts together what the ranks have. They send it again only if it has changed on a rank."""

    def __init__(self, gather: Gather | None) -> None:
        self._gather = gather
        self._local: Any = None
        self._digest = b""
        self._known: dict[str, tuple[bytes, Mapping[str, Entry]]] = {}  # by file: digest of all ranks, what they have

    def of_all_ranks(self, file: str, local: Mapping[str, Entry]) -> Mapping[str, Entry]:
        """Return what all ranks have. It is the same object as long as no rank has anything else.

        `file`: where it will be saved.
        `local`: what this rank has.

        All ranks must call this; they wait for each other. Raises `PlanError` on all ranks if they contradict each other.
        """
        if self._gather is None:
            raise PlanError(f"{file}: this rank cannot ask the others what they have of the optimizer's state")
        body = json.dumps({name: entry.to_json() for name, entry in local.items()}).encode()
        known, merged = self._known.get(file, (b"", {}))
        said = self._gather(_digest(body) + known)
        everything = _digest(b"".join(digest[:_SIZE] for digest in said))
        if any(digest[_SIZE:] != everything for digest in said):  # some rank does not know it
            merged = _merged(file, [json.loads(other) for other in self._gather(body)])
            self._known[file] = everything, merged
        return merged


_SIZE = 16


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=_SIZE).digest()


def _merged(file: str, said: list[dict[str, Any]]) -> dict[str, Entry]:
    merged: dict[str, tuple[int, Entry]] = {}
    for rank, entries in enumerate(said):
        for name, body in entries.items():
            entry = Entry.of_json(body)
            first, other = merged.setdefault(name, (rank, entry))
            if other.tensors != entry.tensors:
                raise PlanError(
                    f"{file}: rank {first} has {_listed(other)} as the state of {name}, rank {rank} has {_listed(entry)}; "
                    "step the optimizer on all ranks alike"
                )
            if entry.leads and not other.leads:
                merged[name] = rank, entry
    return {name: entry for name, (_, entry) in merged.items()}


def _listed(entry: Entry) -> str:
    return ", ".join(f"{key} {kind} {list(shape)}" for key, (kind, shape) in entry.tensors.items()) or "nothing"
