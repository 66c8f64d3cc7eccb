"""Sinks that put the numbers of a run where people look: `AsyncCheckpointer(root, sinks=[JsonLines("events.jsonl")])`.

All run on the reporting thread. The library that a sink needs is imported when the sink is made. Of several ranks the first
writes to the path that was given; `JsonLines` and `ChromeTrace` write a file of its own for each other rank, with `.rank1` and
so on before the suffix.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any

from .events import Event

__all__ = ["JsonLines", "TrackerSink", "Prometheus", "ChromeTrace", "PerSave", "SaveFigures"]

MAX_BYTES = 64 << 20
_RECENT = 64  # saves that are kept in mind until their end is reported
_TRIMESTER = 7_889_238 * 10**9  # nanoseconds; torch's profiler counts from a multiple of it
_WRITING = threading.Lock()  # checkpointers may share a sink


# -- one line for each event


class JsonLines:
    """Appends each event to a file, as one JSON object in a line of its own. `vembed-ckpt report` reads it.

    The file is bounded: when it has grown to half of `max_bytes`, it is renamed to `{path}.1`, which replaces the one before.
    A run that is resumed goes on with the same file.
    """

    wants_steps = True

    def __init__(self, path: str | os.PathLike[str], *, max_bytes: int = MAX_BYTES) -> None:
        self._path = _Path(path)
        self._max_bytes = max_bytes
        self._checked = False  # that the file ends with a whole line

    def __call__(self, event: Event) -> None:
        with _WRITING:
            self._append(self._path.of_this_rank(), _to_json(event))

    def _append(self, path: str, line: bytes) -> None:
        fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            size = os.fstat(fd).st_size
            if size and size + len(line) > self._max_bytes // 2:
                os.close(fd)
                fd = -1
                os.replace(path, f"{path}.1")
                fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
            elif size and not self._checked and os.pread(fd, 1, size - 1) != b"\n":
                line = b"\n" + line  # a line was torn when the run before died
            self._checked = False
            _write_all(fd, line)
            self._checked = True
        finally:
            if fd >= 0:
                os.close(fd)

    @staticmethod
    def read(path: str | os.PathLike[str]) -> Iterator[Event]:
        """The events in the file `path`, and before them those in `{path}.1`. What is not a whole line is skipped.

        Raises OSError if `path` cannot be read.
        """
        known = {field.name for field in fields(Event)}
        before = f"{os.fspath(path)}.1"
        for name in [before] * os.path.exists(before) + [os.fspath(path)]:
            with open(name, encoding="utf-8", errors="replace") as file:
                for line in file:
                    try:
                        found = json.loads(line)
                        event = Event(**{key: value for key, value in found.items() if key in known})
                    except (ValueError, TypeError, AttributeError):
                        continue
                    yield event


def _to_json(event: Event) -> bytes:
    values = asdict(event)
    values["seconds"] = round(event.seconds, 6)
    values["time"] = round(event.time, 6)
    if event.parts:
        values["parts"] = [round(part, 6) for part in event.parts]
    else:
        del values["parts"]
    return json.dumps(values, separators=(",", ":")).encode() + b"\n"


# -- once for each save


@dataclass(frozen=True, slots=True)
class SaveFigures:
    """What one save cost and did. `blocked`: seconds that the training thread lost to it. `durable`: seconds from the call to the
    checkpoint that survives a power cut, `bytes` its size, `write_rate` bytes per second. `failed`: whether it failed; then there
    are no `durable` and `bytes`. `time`: when it ended, in seconds since the epoch."""

    step: int | None
    blocked: float
    failed: bool
    durable: float
    bytes: int
    write_rate: float
    time: float


class PerSave:
    """Base of sinks that report once for each save, when it has ended: `report` gets its figures."""

    def __init__(self) -> None:
        self._blocked: dict[str, float] = {}
        self._writing: dict[str, float] = {}

    def __call__(self, event: Event) -> None:
        key = event.save_id or f"step {event.step}"  # the ranks that do not write know no save_id
        if (event.stage, event.phase) in (("call", "complete"), ("barrier", "complete")):
            self._blocked[key] = self._blocked.get(key, 0.0) + event.seconds
        elif (event.stage, event.phase) == ("write", "complete"):
            self._writing[key] = event.seconds
        elif event.stage == "save" and event.phase != "started":
            writing = self._writing.pop(key, 0.0)
            failed = event.phase == "failed"
            self.report(
                SaveFigures(
                    event.step,
                    self._blocked.pop(key, 0.0),
                    failed,
                    0.0 if failed else event.seconds,
                    0 if failed else event.bytes,
                    event.bytes / writing if writing and not failed else 0.0,
                    event.time,
                )
            )
        for kept in (self._blocked, self._writing):
            while len(kept) > _RECENT:
                del kept[next(iter(kept))]

    def report(self, save: SaveFigures) -> None:
        """A save has ended."""
        raise NotImplementedError


def log_values(save: SaveFigures, failed: int) -> dict[str, float]:
    """What is logged of a save, by name. `failed`: saves that have failed so far."""
    values: dict[str, float] = {"checkpoint/blocked_ms": save.blocked * 1e3, "checkpoint/failed": failed}
    if not save.failed:
        values["checkpoint/durable_s"] = save.durable
        values["checkpoint/write_gbps"] = save.write_rate / 1e9
        values["checkpoint/bytes"] = save.bytes
    return values


class TrackerSink(PerSave):
    """Logs each save with the trackers of an `Accelerator` (TensorBoard, Weights & Biases, ...) or with one of Lightning's
    loggers, at the step that was saved: `checkpoint/blocked_ms`, `checkpoint/durable_s`, `checkpoint/write_gbps`,
    `checkpoint/bytes`, and `checkpoint/failed`, the number of saves that have failed so far.

    Weights & Biases takes no values for a step that is past. There they go into the current row, beside `checkpoint/step`.
    """

    def __init__(self, accelerator: Any) -> None:
        super().__init__()
        self._accelerator = accelerator
        self._failed = 0

    def report(self, save: SaveFigures) -> None:
        self._failed += save.failed
        values = log_values(save, self._failed)
        if _rank() != 0:
            return
        if hasattr(self._accelerator, "log_metrics"):
            self._accelerator.log_metrics(values, step=save.step)  # a logger of Lightning
            return
        trackers = getattr(self._accelerator, "trackers", [])
        if not any(tracker.name == "wandb" for tracker in trackers):
            self._accelerator.log(values, step=save.step)
            return
        for tracker in trackers:
            if tracker.name == "wandb":
                further = {} if save.step is None else {"checkpoint/step": save.step}
                tracker.log({**values, **further}, commit=False)
            else:
                tracker.log(values, step=save.step)


class Prometheus(PerSave):
    """Keeps a text file for node_exporter's textfile collector, replaced atomically after each save:
    `Prometheus("/var/lib/node_exporter/training.prom")`. Needs prometheus-client.

    Its metrics begin with `vembed_checkpoint_`: `saves_total{outcome}`, `blocked_seconds` and `durable_seconds` (histograms),
    `written_bytes_total`, `bytes`, `write_bytes_per_second`, `last_step`, `last_success_timestamp_seconds`. Of several ranks the
    first writes.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__()
        try:
            import prometheus_client as client
        except ImportError as error:
            raise ImportError(
                "sinks.Prometheus needs prometheus-client: pip install 'vembed-async-ckpt[prometheus]'"
            ) from error
        self._path = os.fspath(path)
        self._client = client
        self._registry = registry = client.CollectorRegistry()
        prefix = "vembed_checkpoint"
        self._saves = client.Counter(f"{prefix}_saves", "Saves that have ended.", ["outcome"], registry=registry)
        for outcome in ("committed", "failed"):
            self._saves.labels(outcome)
        self._stalls = client.Histogram(
            f"{prefix}_blocked_seconds", "Time that a save took from the training thread.", registry=registry,
            buckets=(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30),
        )  # fmt: skip
        self._delays = client.Histogram(
            f"{prefix}_durable_seconds", "Time from the call until the checkpoint is durable.", registry=registry,
            buckets=(0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600),
        )  # fmt: skip
        self._written = client.Counter(f"{prefix}_written_bytes", "Bytes of all checkpoints.", registry=registry)
        gauges = (
            ("bytes", "Size of the newest checkpoint."),
            ("write_bytes_per_second", "Rate at which the newest checkpoint was written."),
            ("last_step", "Step of the newest checkpoint."),
            ("last_success_timestamp_seconds", "When the newest checkpoint became durable."),
        )
        self._gauges = {name: client.Gauge(f"{prefix}_{name}", text, registry=registry) for name, text in gauges}
        if _rank() == 0:
            self._write()

    def report(self, save: SaveFigures) -> None:
        if _rank() != 0:
            return
        self._saves.labels("failed" if save.failed else "committed").inc()
        self._stalls.observe(save.blocked)
        if not save.failed:
            self._delays.observe(save.durable)
            self._written.inc(save.bytes)
            self._gauges["bytes"].set(save.bytes)
            self._gauges["write_bytes_per_second"].set(save.write_rate)
            self._gauges["last_success_timestamp_seconds"].set(save.time)
            if save.step is not None:
                self._gauges["last_step"].set(save.step)
        self._write()

    def _write(self) -> None:
        self._client.write_to_textfile(self._path, self._registry)


# -- a trace


class ChromeTrace:
    """Writes a trace that Perfetto and chrome://tracing open: training steps, the time that saves block training, copying,
    writing, committing, retention and `after_commit`, each on a track of its own.

    The file is on the clock of torch.profiler's own traces, and under the same process id: opened together in Perfetto they show
    one picture. It is whole JSON after each event. It is bounded: when it has grown to half of `max_bytes`, it is renamed to
    `{path}.1` and a new one is begun; so is the file of an earlier run.
    """

    wants_steps = True

    def __init__(self, path: str | os.PathLike[str], *, max_bytes: int = MAX_BYTES) -> None:
        self._path = _Path(path)
        self._max_bytes = max_bytes
        self._end = 0  # where the next event goes; 0 before the first
        self._base = 0
        self._last_end: dict[str, float] = {}

    def __call__(self, event: Event) -> None:
        with _WRITING:
            if not self._end or self._end > self._max_bytes // 2:
                self._begin()
            self._append(self._events(event))

    def _append(self, found: list[dict[str, Any]]) -> None:
        if found:
            text = "".join(f",\n{json.dumps(one, separators=(',', ':'))}" for one in found).encode()
            fd = os.open(self._path.of_this_rank(), os.O_WRONLY | os.O_CLOEXEC)
            try:
                _write_all(fd, text + _TRACE_END, self._end)
            finally:
                os.close(fd)
            self._end += len(text)

    def _begin(self) -> None:
        path = self._path.of_this_rank()
        if os.path.exists(path):
            os.replace(path, f"{path}.1")
        self._base = time.time_ns() // _TRIMESTER * _TRIMESTER
        names = [
            {"ph": "M", "name": name, "pid": os.getpid(), "tid": tid, "args": {key: value}}
            for tid, track in enumerate(_TRACKS.values(), _FIRST_TRACK)
            for name, key, value in (
                ("thread_name", "name", f"checkpoints: {track}"),
                ("thread_sort_index", "sort_index", tid),
            )
        ]
        head = f'{{"schemaVersion":1,"displayTimeUnit":"ms","baseTimeNanoseconds":{self._base},"traceEvents":[\n'
        text = (head + ",\n".join(json.dumps(name, separators=(",", ":")) for name in names)).encode()
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        try:
            _write_all(fd, text + _TRACE_END, 0)
        finally:
            os.close(fd)
        self._end = len(text)

    def _events(self, event: Event) -> list[dict[str, Any]]:
        if event.phase == "started":
            return []
        args: dict[str, Any] = {"step": event.step, "save": event.save_id}
        if event.bytes:
            args["bytes"] = event.bytes
        if event.detail:
            args["detail"] = event.detail
        begun = event.time - event.seconds
        if event.stage == "step":
            return self._spans("step", ["step"] * len(event.parts), begun, event.parts, {})
        if event.stage == "write" and len(event.parts) == 2:
            return self._spans("write", ["write", "commit"], begun, event.parts, args)
        if event.stage == "save":
            name = f"checkpoint {event.step}" if event.phase == "complete" else f"checkpoint {event.step} failed"
            return self._spans(self._free_track(begun), [name], begun, (event.seconds,), args)
        if event.stage in _TRACKS and event.phase == "complete":
            name = event.detail if event.stage == "after_commit" else _SPANS.get(event.stage, event.stage)
            return self._spans(event.stage, [name], begun, (event.seconds,), args)
        if event.phase == "failed":
            common = {"name": f"{event.stage} failed", "cat": "checkpoint", "pid": os.getpid(), "tid": _FIRST_TRACK}
            return [{**common, "ph": "i", "s": "p", "ts": self._microseconds(event.time), "args": args}]
        return []

    def _spans(
        self, track: str, names: list[str], begun: float, seconds: tuple[float, ...], args: dict[str, Any]
    ) -> list[dict[str, Any]]:
        """Spans that follow each other. On one track none may overlap: what would is cut off at its beginning."""
        found = []
        tid = _FIRST_TRACK + list(_TRACKS).index(track)
        for name, took in zip(names, seconds, strict=True):
            start, end = self._microseconds(begun), self._microseconds(begun + took)
            start = max(start, self._last_end.get(track, start))
            begun += took
            if end > start:
                self._last_end[track] = end
                span = {"ph": "X", "cat": "checkpoint", "name": name, "pid": os.getpid(), "tid": tid}
                found.append({**span, "ts": start, "dur": round(end - start, 3), "args": args})
        return found

    def _free_track(self, begun: float) -> str:
        """Where a save can be shown whole: one may begin before the one before it is durable."""
        start = self._microseconds(begun)
        return next((track for track in ("save", "save2") if self._last_end.get(track, start) <= start), "save2")

    def _microseconds(self, moment: float) -> float:
        return round(moment * 1e6 - self._base / 1e3, 3)


_TRACKS = {
    "step": "training steps",
    "call": "save(), blocks training",
    "backpressure": "waits for memory, blocks training",
    "barrier": "optimizer.step() waits, blocks training",
    "stage": "copy",
    "write": "write and commit",
    "retention": "retention",
    "after_commit": "after the commit",
    "save": "until durable",
    "save2": "until durable, beside another",
}
_SPANS = {"call": "save()", "barrier": "wait for the copy", "backpressure": "wait for memory", "stage": "copy"}
_FIRST_TRACK = 2_000_000_000  # above every thread id, which torch's trace has
_TRACE_END = b"\n]}\n"


# -- files


class _Path:
    """A path, and the one that this rank uses instead. Known at the first event: ranks are set up after the sink perhaps."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._given = os.path.abspath(os.fspath(path))
        os.makedirs(os.path.dirname(self._given), exist_ok=True)
        self._known: str | None = None

    def of_this_rank(self) -> str:
        if self._known is None:
            stem, suffix = os.path.splitext(self._given)
            rank = _rank()
            self._known = f"{stem}.rank{rank}{suffix}" if rank else self._given
        return self._known


def _rank() -> int:
    """The rank of this process in its job; 0 without one."""
    dist = sys.modules.get("torch.distributed")
    if dist is not None and dist.is_available() and dist.is_initialized():
        return int(dist.get_rank())
    rank = os.environ.get("RANK", "")
    return int(rank) if rank.isdecimal() else 0


def _write_all(fd: int, data: bytes, at: int | None = None) -> None:
    done = 0
    while done < len(data):
        done += os.write(fd, data[done:]) if at is None else os.pwrite(fd, data[done:], at + done)
