"""From samples to the numbers that are shown: medians, p99, and ratios within one run. All times in seconds."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence

from . import figures
from .samples import Sample, by_engine, errors, median, p99, quiet_rounds


def of(result: Sample) -> Sample:
    """The summary of every measure there is."""
    return {name: SUMMARY[name](found["samples"]) for name, found in result["measures"].items()}


def _ours(name: str) -> bool:
    return name.startswith("ours")


def best_peer(engines: dict[str, Sample], key: str) -> tuple[str, float] | None:
    """The peer with the smallest value, if one was run."""
    peers = {name: entry[key] for name, entry in engines.items() if not _ours(name) and (entry.get(key) or 0) > 0}
    name = min(peers, key=lambda peer: peers[peer], default=None)
    return None if name is None else (name, peers[name])


def compare(engines: dict[str, Sample], key: str) -> None:
    """To every entry: how many times what ours takes it takes; to ours, what share of the best peer's it is."""
    reference = engines.get("ours", {}).get(key)
    best = best_peer(engines, key)
    for name, entry in engines.items():
        entry["times_ours"] = entry[key] / reference if reference else None
        if _ours(name) and best is not None:
            entry["of_best_peer"] = entry[key] / best[1]
            entry["best_peer"] = best[0]


def stall(samples: Sequence[Sample]) -> Sample:
    """Blocked time with its two parts; `work_ratio`: forward and backward beside a save to the same without; steps beside
    a save."""
    used, said = quiet_rounds(samples, "blocked")
    engines: dict[str, Sample] = {}
    for name, visits in by_engine(used).items():
        saves = [save for visit in visits for save in visit["blocked"]]
        values = [save["blocked"] for save in saves]
        copies = [value for visit in visits for value in visit["copy"]]
        engines[name] = {
            "blocked": median(values),
            "blocked_p99": p99(values),
            "save": median(save["save"] for save in saves),
            "step": median(save["step"] for save in saves),
            "work_ratio": median(save["work"] / save["work_alone"] for save in saves),
            "durable": median(save["durable"] for save in saves),
            "saves": len(values),
            "copy": median(copies),
            "of_copy_ceiling": median(copies) / median(values),
            "steps": _steps(visits),
        }
    compare(engines, "blocked")
    return {**said, "engines": engines, "errors": errors(samples)}


def _steps(visits: Sequence[Sample]) -> list[Sample]:
    """By number of torch threads. `lost`: what a save costs the training until it is durable, `floor`: what a raw write does.
    `inflation`: steps beside a save to quiet steps of the same visit. `idle`: quiet steps to steps before and after the engine."""
    found = []
    for threads in [steps["threads"] for steps in visits[0]["steps"]]:
        ours = [steps for visit in visits for steps in visit["steps"] if steps["threads"] == threads]
        quiet = [step / median(steps["quiet"]) for steps in ours for step in steps["quiet"]]
        beside = [step / median(steps["quiet"]) for steps in ours for step in steps["beside"]]
        idle = [median(steps["quiet"]) / median(steps["bare"]) for steps in ours]
        found.append(
            {
                "threads": threads,
                "lost": median(value for steps in ours for value in steps["lost"]),
                "floor": median(value for steps in ours for value in steps["floor"]),
                "quiet": median(step for steps in ours for step in steps["quiet"]),
                "inflation": median(beside) if beside else None,
                "inflation_p99": p99(beside) / p99(quiet) if beside else None,
                "idle": median(idle),
                "idle_p99": p99(
                    [step / median(steps["bare"]) for steps in ours for step in steps["quiet"]],
                )
                / p99([step / median(steps["bare"]) for steps in ours for step in steps["bare"]]),
                "count": len(beside),
            }
        )
    return found


def durable(samples: Sequence[Sample]) -> Sample:
    """Call to written, call to durable, and the raw write of as many bytes beside each save."""
    used, said = quiet_rounds(samples, "saves")
    engines: dict[str, Sample] = {}
    for name, visits in by_engine(used).items():
        saves = [save for visit in visits for save in visit["saves"]]
        seconds = median(save["durable"] for save in saves)
        engines[name] = {
            "save": median(save["save"] for save in saves),
            "written": median(save["written"] for save in saves),
            "durable": seconds,
            "durable_p99": p99([save["durable"] for save in saves]),
            "raw": median(save["raw"] for save in saves),
            "of_ceiling": median(save["raw"] / save["durable"] for save in saves),
            "throughput": visits[0]["bytes"] / seconds,
            "bytes_on_disk": median(save["bytes"] for save in saves),
            "direct": visits[0]["direct"],
            "saves": len(saves),
        }
    compare(engines, "durable")
    return {**said, "engines": engines, "errors": errors(samples)}


def memory(samples: Sequence[Sample]) -> Sample:
    """Peaks of `saving` less those of `training`, the largest of all rounds, in bytes and in sizes of the state."""
    engines: dict[str, Sample] = {}
    for name, visits in by_engine(sample for sample in samples if "error" not in sample).items():

        def added(kind: str, visits: Sequence[Sample] = visits) -> int:
            return max(int(visit[kind].get("saving", 0) - visit[kind].get("training", 0)) for visit in visits)

        size = visits[0]["bytes"]
        engines[name] = {
            "proportional": added("proportional"),
            "resident": added("resident"),
            "gpu": added("gpu"),
            "of_state": added("proportional") / size,
            "allowed": round(1.05 * size) + (64 << 20),
        }
    compare(engines, "proportional")
    return {"engines": engines, "errors": errors(samples)}


def restore(samples: Sequence[Sample]) -> Sample:
    """Seconds to load, warm and cold, and the raw read beside it."""
    used, said = quiet_rounds(samples, "loads")
    engines: dict[str, Sample] = {}
    for name, visits in by_engine(used).items():
        loads = [load for visit in visits for load in visit["loads"]]
        engines[name] = {
            "warm": median(load["warm"] for load in loads),
            "warm_p99": p99([load["warm"] for load in loads]),
            "cold": median(load["cold"] for load in loads),
            "cold_p99": p99([load["cold"] for load in loads]),
            "raw": median(load["raw"] for load in loads),
            "of_ceiling": median(load["raw"] / load["cold"] for load in loads),
            "loads": len(loads),
        }
    compare(engines, "warm")
    return {**said, "engines": engines, "errors": errors(samples)}


def scaling(samples: Sequence[Sample]) -> Sample:
    """By engine: [value, median, p99] of blocked time for every size and number of tensors, and for intervals [interval,
    whole time of the training per step to steps without a save, saves, steps]."""
    curves: dict[str, dict[str, list[list[float]]]] = {"size": {}, "tensors": {}, "interval": {}}
    for kind in ("size", "tensors"):
        used, _ = quiet_rounds([sample for sample in samples if sample["kind"] == kind], "blocked")
        for name, visits in by_engine(used).items():
            points: dict[int, list[float]] = defaultdict(list)
            for visit in visits:
                points[visit["value"]] += [save["blocked"] for save in visit["blocked"]]
            curves[kind][name] = [[value, median(found), p99(found)] for value, found in sorted(points.items())]
    used, _ = quiet_rounds([sample for sample in samples if sample["kind"] == "interval"], "runs")
    for name, visits in by_engine(used).items():
        runs: dict[int, list[Sample]] = defaultdict(list)
        for visit in visits:
            for run in visit["runs"]:
                runs[run["interval"]].append(run)
        curves["interval"][name] = [
            [
                interval,
                median(run["seconds"] / run["steps"] / statistics.mean(run["quiet"]) for run in found),
                sum(run["saves"] for run in found),
                sum(run["steps"] for run in found),
            ]
            for interval, found in sorted(runs.items())
        ]
    return {**curves, "errors": errors(samples)}


SUMMARY: dict[str, Callable[[Sequence[Sample]], Sample]] = {
    "cost": figures.summary,
    "stall": stall,
    "durable": durable,
    "memory": memory,
    "scaling": scaling,
    "restore": restore,
}
