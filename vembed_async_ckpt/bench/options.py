"""What is to be measured, and how long; checked without torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from .workloads import DEFAULT, WORKLOADS

MEASURES = {
    "cost": "what one save costs: training stopped and slowed, until it is durable, and loading it back",
    "stall": "the same in detail: one torch thread and all, the idle engine, the fastest copy",
    "durable": "from the call to a checkpoint that survives a power cut, against the raw disk",
    "memory": "host memory at the peak, beyond the same training",
    "scaling": "blocked time by size of the state and by number of tensors; whole training time by save interval",
    "restore": "loading into an existing model and optimizer, page cache warm and cold, against the raw disk",
}
DEFAULT_ENGINES = ("ours", "original", "dcp", "torch_checkpointing", "dcp-overlap")
LONGER_ENGINES = (*DEFAULT_ENGINES, "accelerate", "moonclip", "dlrover")
DISK = "raw-disk"  # visited like an engine by the measure `cost`
BUDGET = 120.0
MIB, GIB = 1 << 20, 1 << 30


class Refused(ValueError):
    """The run was not begun and nothing written: an option that makes no sense, or too little disk or memory for it."""


@dataclass(frozen=True)
class Options:
    """What is saved: `workload` at `scale`, or `tensors` equal ones of together `size` bytes, or `model`.

    `rounds`: how often each engine is visited, in a new process each time, in random order; None is as often as fits into
    `budget` seconds. `saves`: that count in a visit, after `warm_up`. `stretch`: seconds of forward and backward between a
    save and the next optimizer step, of a transformer `width` wide. `quiet`: seconds, and `least`: number, of steps
    without a save that steps beside one are held against. `patience`: seconds to wait for other people's processes to be
    quiet. `sizes`, `tensor_counts`,
    `intervals`, `interval_steps`, `limit`: of the scaling measure; a training that saves takes no longer than `limit`
    seconds, with fewer steps if need be.
    """

    measures: tuple[str, ...] = ("cost",)
    engines: tuple[str, ...] = ()
    workload: str = DEFAULT
    scale: str = ""
    size: int | None = None
    tensors: int = 300
    model: str | None = None
    device: str = "cpu"
    budget: float | None = None
    rounds: int | None = 2
    saves: int = 2
    warm_up: int = 1
    stretch: float = 0.3
    width: int = 512
    quiet: float = 0.25
    least: int = 4
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
            value = getattr(self, name)
            if value is not None and value < 1:
                raise Refused(f"{name} is {value}; at least 1 is needed")
        if self.tensors < 3:
            raise Refused(f"tensors is {self.tensors}; at least 3 are needed: a weight and what AdamW keeps for it")
        if self.workload not in WORKLOADS:
            raise Refused(f"no workload {self.workload!r}; there are {', '.join(WORKLOADS)}")
        if self.rounds is None and self.budget is None:
            raise Refused("neither rounds nor a budget is given")
        object.__setattr__(self, "scale", str(parse_scale(self.scale or str(WORKLOADS[self.workload].scale))))

    @property
    def nbytes(self) -> int | None:
        """Of the state; None for a model, whose size is not known yet."""
        if self.model is not None:
            return None
        return WORKLOADS[self.workload].nbytes(Fraction(self.scale)) if self.size is None else self.size

    def full(self) -> Options:
        """Everything, for publication."""
        return replace(
            self,
            measures=tuple(MEASURES),
            engines=self.engines or ("all",),
            size=1 * GIB,
            budget=None,
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


def default_engines(budget: float | None) -> tuple[str, ...]:
    """Those for which so many seconds do: three, five, eight, all."""
    if budget is None or 60 <= budget < 600:
        return DEFAULT_ENGINES
    return DEFAULT_ENGINES[:3] if budget < 60 else LONGER_ENGINES if budget < 3600 else ("all",)


def parse_size(text: str) -> int:
    """Bytes of "1GiB", "300 MB", "64M" (binary) or a plain number. Raises `Refused`."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?b)?\s*", text.lower())
    if found is None or (found[2] == "" and found[3] == "ib"):
        raise Refused(f"size {text!r} is none; write it as 256MiB or 1GiB")
    base = 1000 if found[3] == "b" else 1024
    return int(float(found[1]) * base ** (" kmgt".index(found[2] or " ")))


def parse_time(text: str, option: str) -> float:
    """Seconds of "30s", "2m", "1.5h", "10 days" or a plain number of seconds. Raises `Refused`."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(s|m|min|h|d|days?)?\s*", text.lower())
    seconds = float(found[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[(found[2] or "s")[0]] if found else 0.0
    if seconds <= 0:
        raise Refused(f"{option} {text!r} is no time; write it as 30s, 2m or 8h")
    return seconds


def parse_share(text: str, option: str) -> float:
    """0.01 of "1%" or "0.01". Raises `Refused`."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(%)?\s*", text)
    share = float(found[1]) / (100 if found[2] else 1) if found else 0.0
    if not share > 0:
        raise Refused(f"{option} {text!r} is no share; write it as 1%")
    return share


def parse_scale(text: str) -> Fraction:
    """Of "1/8" or "0.125". Raises `Refused`."""
    try:
        scale = Fraction(text.strip())
    except (ValueError, ZeroDivisionError):
        scale = Fraction(0)
    if not 0 < scale <= 1:
        raise Refused(f"--scale {text!r} is none; write it as 1/8, or 1 for the whole state")
    return scale


def names(values: Sequence[str]) -> tuple[str, ...]:
    """`["ours,dcp", "safetensors"]` as three names."""
    return tuple(name.strip() for value in values for name in value.split(",") if name.strip())
