"""The same faults for the libraries that people save with, and for ours: who loses what.

    python benchmarks/faults/peers.py --dir /a/disk [--points 24] [--out results.json]       # needs Linux, root and strace

Each fault meets a process that has one good checkpoint (number 1, on the disk for certain) and makes two more, 2 and 3: each in a
directory of its own (`new`), or all in the directory of the first (`again`). Faults:

    kill    SIGKILL at the entry of a call that changes the disk; calls sampled evenly from those of a traced run
    after   power cut right after the library said that number 3 is saved, or half a second later
    power   power cut at such a call: SIGKILL there, then the file system is shut down
    error   such a call fails once with EIO
    full    the disk has no room for all of it

Power is that of ext4 and xfs in a loop device (FS_IOC_SHUTDOWN), half of the cuts with the journal flushed, half without. What is
found afterwards is the directory with the highest number, as `get_last_checkpoint` and most scripts do it; for ours `latest()`,
its documented way. It is then loaded as the library's documentation says and every number in it compared. Counted alike for all:

    broken      what is found does not load, or has wrong contents, or nothing is found
    not there   a save was said to be saved, and neither it nor a newer one can be loaded
    all lost    no checkpoint at all can be loaded any more, not even number 1
    silent      (error, full) that, and no failure was ever reported
    hangs       (error) the call has not returned after 20 s
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

_HERE = Path(__file__).resolve().parent
sys.path += [path for path in (str(_HERE), str(_HERE.parents[1])) if path not in sys.path]

import surroundings  # noqa: E402
from soak import PowerDisk  # noqa: E402

from tests.crash.faults import CALLS, POWER_CUTS, attached, parse_trace  # noqa: E402
from tests.crash.nursery import Child, Nursery, wait_for_end  # noqa: E402

OURS = "vembed_async_ckpt"
LIBRARIES = ("torch.save", "safetensors save_file", "DCP save", "DCP async_save", "accelerate save_state", OURS)
KINDS = ("kill", "after", "power", "error", "full")
WRONGS = ("broken", "not there", "all lost", "silent", "hangs")
# How much of one checkpoint there is room for when the disk is full.
ROOM = (0.05, 0.3, 0.6, 0.9, 1.1, 1.6)
_PATIENCE = 20.0  # seconds for two saves of a megabyte; who takes longer waits for ever
_MEGABYTES = {"ext4": 64, "xfs": 64}


class Bench:
    """A place for one library's saves: a directory, or disks."""

    def __init__(self, directory: Path, nursery: Nursery, library: str, again: bool, points: int) -> None:
        directory.mkdir()
        self._directory = directory
        self._nursery = nursery
        self._points = points
        self.library, self.again = library, again
        self.counts: dict[str, dict[str, int]] = defaultdict(lambda: dict.fromkeys(("faults", *WRONGS), 0))
        self.examples: list[str] = []

    def run(self, kinds: tuple[str, ...]) -> None:
        root = str(self._directory / "root")
        calls = self._trace(root) if {"kill", "power", "error"} & set(kinds) else []
        if "kill" in kinds:
            for call, k in _sample(calls, self._points):
                self._at_call("kill", root, call, k, "signal=KILL")
        if "error" in kinds:
            for call, k in _sample([c for c in calls if c[0] not in ("unlink", "unlinkat", "rmdir")], self._points):
                self._at_call("error", root, call, k, "error=EIO")
        if not {"after", "power", "full"} & set(kinds):
            return
        for kind in ("ext4", "xfs"):
            place = self._directory / kind
            place.mkdir()
            with PowerDisk(place, kind, _MEGABYTES[kind]) as disk:
                on_disk = os.path.join(disk.path, "root")
                for n, how in enumerate(list(POWER_CUTS) * (self._points // 4)):
                    if "after" in kinds:
                        self._after(on_disk, disk, how, 0.5 * (n % 4 // 2))
                hows = list(POWER_CUTS)
                for n, (call, k) in enumerate(_sample(calls, self._points // 2) if "power" in kinds else []):
                    self._at_call("power", on_disk, call, k, "signal=KILL", disk, hows[n % 2])
                for share in ROOM if "full" in kinds else ():
                    self._full(on_disk, disk, share)

    # -- faults

    def _trace(self, root: str) -> list[tuple[str, int]]:
        """The calls below `root` of a run without a fault: (name, how many of its thread's it is)."""
        log = self._directory / "trace"
        self._lay_out(root)
        options = ["-f", "-y", "-s", "16", "-o", str(log), "-e", f"trace={CALLS}", "-e", "signal=none"]
        with self._saver(root, writer="thread") as child:
            child.expect("READY")
            with attached(child, options):
                child.expect("ALL")
                child.tell("end")
                child.wait()
            assert child.last("SAVED") == 3, child
        counts: dict[tuple[str, str], int] = defaultdict(int)
        found: dict[tuple[str, int], None] = {}
        for call in parse_trace(log.read_text()):
            counts[call.thread, call.name] += 1
            if call.changes and any((path + "/").startswith(root + "/") for path in call.paths):
                found[call.name, counts[call.thread, call.name]] = None
        return list(found)

    def _at_call(
        self, kind: str, root: str, call: str, k: int, what: str, disk: PowerDisk | None = None, how: str = ""
    ) -> None:
        self._lay_out(root, disk)
        log = self._directory / "struck"
        options = ["-f", "-o", str(log), "-e", f"trace={call}", "-e", f"inject={call}:{what}:when={k}"]
        hung = False
        with self._saver(root, writer="thread") as child:
            child.expect("READY")
            with attached(child, options):
                try:
                    child.expect("ALL", _PATIENCE)
                    child.tell("end")
                except AssertionError:  # it is dead, or waits for ever
                    hung = not wait_for_end(child._pidfd, _PATIENCE)  # one that was killed takes a moment
                    if hung:
                        child.kill()
                child.wait()
            struck = child._code == -9 if "KILL" in what else "(INJECTED)" in log.read_text()
            if disk:
                disk.fail(how)
                disk.restore()
            if struck:
                self._judge(kind, f"{call} #{k} {what} {how}", root, child, hung)

    def _after(self, root: str, disk: PowerDisk, how: str, later: float) -> None:
        self._lay_out(root, disk)
        with self._saver(root) as child:
            child.expect("READY")
            child.tell("go")
            child.expect("SAVED 3")
            time.sleep(later)
            disk.fail(how)
            child.kill()
            child.wait()
            disk.restore()
            self._judge("after", f"{how}, {later} s later", root, child)

    def _full(self, root: str, disk: PowerDisk, share: float) -> None:
        self._lay_out(root, disk)
        filler = os.path.join(disk.path, "filler")
        room = int(share * _size(os.path.join(root, "checkpoint-1")))
        status = os.statvfs(disk.path)
        with open(filler, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, max(status.f_bavail * status.f_frsize - room - (1 << 18), 1))
        try:
            with self._saver(root) as child:
                child.expect("READY")
                child.tell("go")
                child.expect("ALL", _PATIENCE)
                child.tell("end")
                child.wait()
                self._judge("full", f"room for {share} of a checkpoint", root, child)
        finally:
            os.unlink(filler)

    # -- before and after

    def _lay_out(self, root: str, disk: PowerDisk | None = None) -> None:
        """One good checkpoint, for certain on the disk."""
        template = str(self._directory / "template")
        if not os.path.isdir(template):
            with self._nursery.child(
                "save", library=self.library, root=template, numbers=[1], again=self.again
            ) as child:
                assert child.wait() == 0, child
                assert child.last("SAVED") == 1, child
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(template, root)
        if disk:
            disk.sync()

    @contextmanager
    def _saver(self, root: str, writer: str = "process") -> Iterator[Child]:
        arguments: dict[str, Any] = {"library": self.library, "root": root, "numbers": [2, 3], "again": self.again}
        if self.library == OURS:  # with one process to kill where one is killed
            arguments["writer"] = writer
        with self._nursery.child("save", wait=True, **arguments) as child:
            yield child

    def _judge(self, kind: str, where: str, root: str, child: Child, hung: bool = False) -> None:
        said = child.last("SAVED")
        with self._nursery.child("find", library=self.library, root=root) as finder:
            finder.wait()
            found, usable = finder.last("LOADED"), finder.last("USABLE")
            verdict = [m for m in finder.messages if not m.startswith(("READY", "USABLE"))] + [finder.stderr()[-200:]]
        counts = self.counts[kind]
        counts["faults"] += 1
        wrong = ["hangs"] if hung else []
        if not found:
            wrong.append("broken")
        if max(usable, found) < said:
            wrong.append("not there")
            if kind in ("error", "full") and not hung and not any(m.startswith("FAILED") for m in child.messages):
                wrong.append("silent")
        if not max(usable, found):
            wrong.append("all lost")
        for name in wrong:
            counts[name] += 1
        if wrong and len(self.examples) < 200:
            example = f"{kind}: {where}: {', '.join(wrong)}; said {said}, found {verdict}"
            self.examples.append(example.replace(root, "ROOT").replace(sys.prefix, "PREFIX"))


def _sample(calls: list[tuple[str, int]], n: int) -> list[tuple[str, int]]:
    """`n` of them, evenly over the run."""
    return [calls[i * len(calls) // n] for i in range(n)] if len(calls) > n else calls


def _size(path: str) -> int:
    return sum(os.lstat(os.path.join(base, name)).st_size for base, _, files in os.walk(path) for name in files)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--points", type=int, default=24, help="calls of each run at which a fault strikes")
    parser.add_argument("--libraries", default=",".join(LIBRARIES))
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    logging.getLogger("vembed_async_ckpt").setLevel(logging.ERROR)
    begun = time.monotonic()
    results = []
    options.dir.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        nursery = Nursery("peer_saver", str(_HERE))
        stack.callback(nursery.close)
        here = Path(
            os.path.realpath(stack.enter_context(tempfile.TemporaryDirectory(prefix="peers-", dir=options.dir)))
        )
        benches = [
            Bench(here / f"{n}-{again}", nursery, library, again, options.points)
            for n, library in enumerate(options.libraries.split(","))
            for again in (False, True)
        ]
        with ThreadPoolExecutor(3) as pool:
            list(pool.map(lambda bench: bench.run(tuple(options.kinds.split(","))), benches))
    print(f"{'library':24}{'directory':10}" + "".join(f"{kind:>30}" for kind in KINDS))
    print(f"{'':34}" + f"{'of: brkn gone lost slnt hang':>30}" * len(KINDS))
    for bench in benches:
        cells = []
        for kind in KINDS:
            counts = bench.counts[kind]
            cells.append(f"{counts['faults']}: " + " ".join(f"{counts[name]:4}" for name in WRONGS))
        print(f"{bench.library:24}{'same' if bench.again else 'new':10}" + "".join(f"{cell:>30}" for cell in cells))
        results.append(
            {
                "library": bench.library,
                "directory": "same" if bench.again else "new",
                "faults": {kind: bench.counts[kind] for kind in KINDS if kind in bench.counts},
                "examples": bench.examples[:12],
            }
        )
    seconds = round(time.monotonic() - begun, 1)
    print(f"{sum(c['faults'] for b in benches for c in b.counts.values())} faults in {seconds} s")
    if options.out:
        figures = {
            "machine": surroundings.facts(str(options.dir)),
            "seconds": seconds,
            "rules": __doc__,
            "results": results,
        }
        options.out.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
