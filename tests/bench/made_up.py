"""Results that were never measured, with the values that a test is about."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

Visits = Sequence[Sequence[float]]


def save(blocked: float, durable: float, size: int) -> dict[str, Any]:
    times = {"save": blocked, "step": 0.0, "blocked": blocked, "work": 0.3, "work_alone": 0.3}
    return {**times, "written": durable, "durable": durable, "bytes": size}


def visit(
    engine: str,
    number: int,
    blocked: Sequence[float],
    lost: Sequence[float],
    durable: Sequence[float],
    others: float = 0.01,
) -> dict[str, Any]:
    """One visit of the measure `cost`."""
    size = 200 << 20
    return {
        "engine": engine,
        "round": number,
        "bytes": size,
        "first": save(3 * blocked[0], durable[0], size),
        "saves": [save(seconds, durable[0], size) for seconds in blocked],
        "steps": [
            {"lost": seconds, "call": blocked[0], "quiet": [0.05], "beside": [0.06], "written": d, "durable": d}
            for seconds, d in zip(lost, durable, strict=True)
        ],
        "alone": [save(blocked[0], seconds, size) for seconds in durable],
        "loads": [{"warm": durable[0] / 2, "cold": durable[0]}],
        "others": others,
        "seconds": 10.0,
    }


def result(engines: Mapping[str, tuple[Visits, Visits, Visits]], others: float = 0.01) -> dict[str, Any]:
    """A whole result: blocked, lost and durable of each visit to each engine."""
    from vembed_async_ckpt.bench.catalog import listed

    samples = [
        visit(name, number, *parts, others=others)
        for name, quantities in engines.items()
        for number, parts in enumerate(zip(*quantities, strict=True))
    ]
    machine = {"date": "2026-11-30T12:00:00+00:00", "cpu": "Some", "cpus": 2, "gpu": None, "memory_bytes": 8 << 30}
    machine |= {"kernel": "6", "file_system": "ext4", "device": "/dev/x", "load": 0.1, "versions": {"torch": "2.13"}}
    return {
        "format": 2,
        "complete": True,
        "machine": machine,
        "options": {"measures": ["cost"], "engines": [], "device": "cpu", "saves": 2, "stretch": 0.3, "tensors": 300},
        "state": {
            "bytes": 200 << 20,
            "tensors": 400,
            "parameters": 1,
            "model": "synthetic",
            "batch": 1,
            "trained": False,
        },
        "engines": {
            name: {
                "name": name,
                "title": listed(name).title,
                "configuration": "as it comes",
                "lacks": "fsync",
                "installed": True,
                "pip": "",
            }
            for name in engines
        },
        "measures": {"cost": {"seconds": 50.0, "samples": samples}},
        "summary": {},
    }


def noisy(
    chance: random.Random, value: float, visits: int, *, between: float = 0.08, within: float = 0.06
) -> list[list[float]]:
    """Visits of two saves: each visit off by some 8 %, each save of it by some 6 %, with a heavy tail."""
    found = []
    for _ in range(visits):
        centre = value * chance.lognormvariate(0, between)
        tail = 1.5 if chance.random() < 0.05 else 1.0
        found.append([centre * chance.lognormvariate(0, within) * tail, centre * chance.lognormvariate(0, within)])
    return found


FAST = ([[0.003, 0.004], [0.0035, 0.003]], [[0.14, 0.15], [0.13, 0.16]], [[0.28, 0.3], [0.27, 0.29]])
SLOW = ([[0.2, 0.25], [0.22, 0.24]], [[0.5, 0.55], [0.45, 0.6]], [[0.6, 0.65], [0.58, 0.7]])
QUICKER_CALL = ([[0.001, 0.0012], [0.0011, 0.001]], [[0.3, 0.25], [0.28, 0.35]], [[0.6, 0.62], [0.58, 0.7]])
