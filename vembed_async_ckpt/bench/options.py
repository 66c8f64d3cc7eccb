"""What is to be measured, and how long; checked without torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

MEASURES = {
    "stall": "what a save takes from the training loop, and how much slower the steps beside it are",
    "durable": "from the call to a checkpoint that survives a power cut, against the raw disk",
    "memory": "host memory at the peak, beyond the same training",
    "scaling": "blocked time by size of the state and by number of tensors; whole training time by save interval",
    "restore": "loading into an existing model and optimizer, page cache warm and cold, against the raw disk",
}
DEFAULT_MEASURES = ("stall", "durable")
DEFAULT_ENGINES = ("ours", "original", "dcp", "dcp-overlap", "torch_checkpointing")
MIB, GIB = 1 << 20, 1 << 30


class Refused(ValueError):
    """The run was not begun and nothing written: an option that makes no sense, or too little disk or memory for it."""


@dataclass(frozen=True)
class Options:
    """`rounds`: how often each engine is visited, in a new process each time, in random order; `saves`: that count in a visit,
    after `warm_up`. `stretch`: seconds of forward and backward between a save and the next optimizer step, of a transformer
    `width` wide. `quiet`: seconds, and `least`: number, of steps without a save that steps beside one are held against.
    `patience`: seconds to wait before each save for other people's processes to be quiet. `sizes`, `tensor_counts`,
    `intervals`, `interval_steps`, `limit`: of the scaling measure; a training that saves takes no longer than `limit` seconds,
    with fewer steps if need be."""

    measures: tuple[str, ...] = DEFAULT_MEASURES
    engines: tuple[str, ...] = ()
    size: int = 256 * MIB
    tensors: int = 300
    model: str | None = None
    device: str = "cpu"
    rounds: int = 2
    saves: int = 3
    warm_up: int = 1
    stretch: float = 0.3
    width: int = 512
    quiet: float = 0.3
    least: int = 5
    patience: float = 1.0
    sizes: tuple[int, ...] = (64 * MIB, 256 * MIB, 1 * GIB)
    tensor_counts: tuple[int, ...] = (100, 1000, 5000)
    intervals: tuple[int, ...] = (1, 10, 50)
    interval_steps: int = 50
    limit: float = 30.0

    def __post_init__(self) -> None:
        for measure in self.measures:
            if measure not in MEASURES:
                raise Refused(f"no measure {measure!r}; there are {', '.join(MEASURES)}")
        for name in ("size", "tensors", "rounds", "saves", "interval_steps"):
            if getattr(self, name) < 1:
                raise Refused(f"{name} is {getattr(self, name)}; at least 1 is needed")
        if self.tensors < 3:
            raise Refused(f"tensors is {self.tensors}; at least 3 are needed: a weight and what AdamW keeps for it")

    def full(self) -> Options:
        """Everything, for publication."""
        return replace(
            self,
            measures=tuple(MEASURES),
            engines=self.engines or ("all",),
            size=1 * GIB,
            rounds=3,
            saves=4,
            warm_up=2,
            stretch=0.4,
            quiet=1.0,
            patience=5.0,
            sizes=(GIB // 4, GIB // 2, 1 * GIB, 2 * GIB, 4 * GIB),
            tensor_counts=(100, 300, 1000, 3000, 10_000),
            intervals=(1, 2, 5, 10, 20, 50, 100),
            interval_steps=100,
            limit=60.0,
        )


def parse_size(text: str) -> int:
    """Bytes of "1GiB", "300 MB", "64M" (binary) or a plain number. Raises `Refused`."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?b)?\s*", text.lower())
    if found is None or (found[2] == "" and found[3] == "ib"):
        raise Refused(f"size {text!r} is none; write it as 256MiB or 1GiB")
    base = 1000 if found[3] == "b" else 1024
    return int(float(found[1]) * base ** (" kmgt".index(found[2] or " ")))


def names(values: Sequence[str]) -> tuple[str, ...]:
    """`["ours,dcp", "safetensors"]` as three names."""
    return tuple(name.strip() for value in values for name in value.split(",") if name.strip())
