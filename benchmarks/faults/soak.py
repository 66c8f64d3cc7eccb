"""A soak: thousands of random kills and power cuts of real trainings, on roots that live through hundreds of them.

    python benchmarks/faults/soak.py --kills 2000 --cuts 200 --dir /a/disk [--seed S] [--out results.json]

After every fault the root is compared with a model of it (`soak_model.py`) that knows only what the trainings said. The next
training goes on in the same root: with another rule of retention, from the newest checkpoint or from nothing, with the same step
once more. Power cuts are those of small file systems of their own (ext4, xfs), need root, and lose what was not synced, with and
without the journal. A violation is printed with its seed, and the root is copied for who examines it; the exit status is then 1.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import logging
import os
import random
import shutil
import signal
import struct
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_HERE = Path(__file__).resolve().parent
sys.path += [path for path in (str(_HERE), str(_HERE.parents[1])) if path not in sys.path]

import surroundings  # noqa: E402
from soak_model import Model, Rule, Said  # noqa: E402

from tests.crash.faults import _SHUTDOWN, POWER_CUTS, Disk, missing, unmount  # noqa: E402
from tests.crash.nursery import PATIENCE, Child, Nursery  # noqa: E402
from vembed_async_ckpt import latest  # noqa: E402

RULES: list[Rule] = [
    [["last", 1]],
    [["last", 2]],
    [["last", 3]],
    [["last", 2], ["best", 1]],
    [["last", 1], ["best", 2]],
    [["last", 1], ["every", 10]],
]
SAVES = 60  # of one training at most
AT_ONCE = 3  # roots
_EARLIEST = 0.3  # seconds from the fork within which the early faults strike


@dataclass
class Plan:
    """One training and its fault, all of it decided by a seed."""

    seed: str
    victim: str  # "trainer", "writer", "both", or a way of cutting the power
    early: bool  # at a random moment of the start; else after a number of saves
    after: int  # messages of this kind to wait for
    message: str
    delay: float
    gap: float  # between two victims
    resume: bool
    plants: bool
    options: dict[str, Any]

    @classmethod
    def of(cls, seed: str, victims: list[str]) -> Plan:
        chance = random.Random(seed)
        victim = chance.choice(victims)
        cut = victim in POWER_CUTS
        thread = (cut and chance.random() < 0.4) or (victim == "trainer" and chance.random() < 0.1)
        options = {
            "keep": chance.choice(RULES),
            "again": chance.choice((0.0, 0.2, 0.5)),
            "writer": "thread" if thread else "process",
            "buffered": cut and thread,
            "staging": chance.choice(("overlap", "overlap", "blocking")),
            "in_flight": chance.choice((1, 1, 2)),
        }
        return cls(
            seed=seed,
            victim=victim,
            early=victim != "writer" and chance.random() < 0.25,
            after=chance.randrange(1, 8),
            message=chance.choice(("SAVE", "STAGED", "COMMITTED")),
            delay=chance.uniform(0, 0.04),
            gap=chance.choice((0.0, chance.uniform(0, 0.02))),
            resume=chance.random() < 0.7,
            plants=chance.random() < 0.05,
            options=options,
        )

    def __str__(self) -> str:
        moment = "early" if self.early else f"{self.delay * 1e3:.1f} ms after {self.message} {self.after}"
        return f"{self.victim} {moment}, resume={self.resume}, {self.options}"


@dataclass
class Tally:
    """Faults by kind, and what was wrong."""

    faults: Counter[str] = field(default_factory=Counter)
    saves: Counter[str] = field(default_factory=Counter)
    violations: list[dict[str, Any]] = field(default_factory=list)


class PowerDisk(Disk):
    """A disk that fails at one moment and is mounted again at another."""

    def fail(self, how: str) -> None:
        fd = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.ioctl(fd, _SHUTDOWN, struct.pack("I", POWER_CUTS[how]))
        finally:
            os.close(fd)

    def restore(self) -> None:
        unmount(self.path)
        self._mount()


class Lane:
    """One root and the faults it lives through, one after another."""

    def __init__(
        self, name: str, root: str, seed: int, nursery: Nursery, keep: Path, disk: PowerDisk | None = None
    ) -> None:
        self.name, self.root, self.disk = name, root, disk
        self.tally = Tally()
        self._seed = seed
        self._nursery = nursery
        self._examine = keep
        self._model = Model(root)
        self._serial = 1
        self._victims = list(POWER_CUTS) if disk else ["trainer", "writer", "both"]
        self._n = 0

    def run(self, faults: int) -> None:
        """Live through at least so many faults, and end with a training in which nothing happens."""
        while sum(self.tally.faults.values()) < faults:
            self._n += 1
            plan = Plan.of(f"{self._seed}/{self.name}/{self._n}", self._victims)
            self._one(plan)
        self._one(Plan.of(f"{self._seed}/{self.name}/end", ["nobody"]))

    def _one(self, plan: Plan) -> None:
        if plan.plants:
            self._model.plant(self._n)
        before = [save.serial for save in self._model.present]
        arguments = {"root": self.root, "seed": plan.seed, "first": self._serial, "saves": SAVES, "resume": plan.resume}
        problems: list[str] = []
        with self._nursery.child("train", **arguments, **plan.options) as child:
            try:
                kind, faults = self._strike(plan, child, problems)
            except Exception as error:  # whatever it is, it is what we are looking for
                kind, faults = plan.victim, 1
                problems.append(f"{type(error).__name__}: {error}")
                self._end(child, problems)
            cut = plan.victim in POWER_CUTS
            story = str(child)
            said = Said.of(child.messages, failures_are_expected=cut)
            if not cut and (stderr := child.stderr().strip()):
                problems.append(f"stderr: {stderr[-2000:]}")
        closed = "CLOSED" in child.messages
        unprotected = cut or plan.victim == "both" or plan.options["writer"] == "thread"
        if said.found and said.found != self._expected_to_be_found():
            problems.append(f"found {said.found}, not {self._expected_to_be_found()}")
        floor = said.committed if unprotected else said.staged
        try:
            problems += self._model.after(
                said, plan.options["keep"], floor=floor, late=plan.victim == "writer", closed=closed
            )
        except Exception as error:
            problems.append(f"cannot be looked at: {type(error).__name__}: {error}")
        self._serial += SAVES
        if kind:
            self.tally.faults[kind] += faults
        self.tally.saves["asked for"] += len(said.saves)
        self.tally.saves["committed, acknowledged"] += said.committed
        self.tally.saves["resumed from"] += bool(said.found) and said.found != "none"
        if problems:
            self._violation(plan, problems, before, story)

    def _expected_to_be_found(self) -> str:
        newest = self._model.present[-1:]
        return f"{newest[0].serial} {newest[0].count}" if newest else "none"

    # -- faults

    def _strike(self, plan: Plan, child: Child, problems: list[str]) -> tuple[str, int]:
        """Let the fault happen and the processes end; returns what it was, and how often."""
        if plan.victim == "nobody":
            self._wait(child, "COMMITTED", 3)
            self._stop(child, problems)
            return "", 0
        if plan.victim == "writer":
            return self._kill_writers(plan, child, problems)
        if plan.early:
            self._listen(child, random.Random(plan.seed).uniform(0, _EARLIEST))
        else:
            self._wait(child, plan.message, plan.after)
            self._listen(child, plan.delay)
        moment = "at its start" if not any(m.startswith("SAVE") for m in child.messages) else "while it saves"
        if self.disk:
            self.disk.fail(plan.victim)
            self._listen(child, plan.gap)
            self._kill(child, ["writer", "trainer"], 0.0)
            child.wait()
            self._await_writers(child)
            self.disk.restore()
            return f"power cut, {self.name}, {plan.victim}, {moment}", 1
        order = ["trainer", "writer"] if random.Random(plan.seed).random() < 0.7 else ["writer", "trainer"]
        self._kill(child, order if plan.victim == "both" else [plan.victim], plan.gap)
        child.wait()
        latest(self.root)  # waits for a writer that still finishes
        self._await_writers(child)
        return f"{plan.victim} killed, {moment}", 1

    def _kill_writers(self, plan: Plan, child: Child, problems: list[str]) -> tuple[str, int]:
        """Kill the writer up to three times: every time another one takes over all that was staged."""
        chance = random.Random(plan.seed)
        kills = 0
        for _ in range(chance.randrange(1, 4)):
            self._wait(child, plan.message, plan.after)
            self._listen(child, chance.uniform(0, 0.04))
            if len(child.messages) and child.messages[-1] == "CLOSED":
                break
            self._kill(child, ["writer"], 0.0)
            kills += 1
            self._wait(child, "WRITER", kills + 1, in_all=True)
            if sum(m.startswith("SAVE") for m in child.messages) < SAVES - 12:
                self._wait(child, "COMMITTED", 1)
            else:
                break
        self._stop(child, problems)
        said = Said.of(child.messages)
        if said.committed < len(said.saves):
            problems.append(f"{len(said.saves)} saves, {said.committed} committed, though only the writer was killed")
        return "writer killed, while it saves", kills

    def _end(self, child: Child, problems: list[str]) -> None:
        """After something that should not have happened: everything ends, and the root can be looked at."""
        child.kill()
        child.wait()
        self._await_writers(child)
        try:
            if self.disk:
                self.disk.restore()
            latest(self.root)
        except Exception as error:
            problems.append(f"{type(error).__name__}: {error}")

    def _stop(self, child: Child, problems: list[str]) -> None:
        child.tell("stop")
        if (status := child.wait()) != 0:
            problems.append(f"the training ended with {status}")

    def _kill(self, child: Child, whom: list[str], gap: float) -> None:
        for n, victim in enumerate(whom):
            if n:
                time.sleep(gap)
            if victim == "trainer":
                child.kill()
            else:
                while child._receive(0):
                    pass
                writers = self._writers(child)
                if writers:
                    _kill_quietly(writers[-1])

    def _writers(self, child: Child) -> list[int]:
        return [int(m.split()[1]) for m in child.messages if m.startswith("WRITER")]

    def _await_writers(self, child: Child) -> None:
        """Writers that nobody waits for any more have ended when their locks are gone, but their descriptors close late."""
        for pid in self._writers(child):
            deadline = time.monotonic() + PATIENCE
            while _alive(pid):
                if time.monotonic() > deadline:
                    raise AssertionError(f"writer {pid} is still there")
                time.sleep(0.002)

    def _wait(self, child: Child, start: str, count: int, in_all: bool = False) -> None:
        """Until `count` more such messages have come, or no more can come."""
        have = sum(m.startswith(start) for m in child.messages)
        until = count if in_all else have + count
        deadline = time.monotonic() + PATIENCE
        while have < until:
            before = len(child.messages)
            if not child._receive(deadline - time.monotonic()):
                raise AssertionError(f"no {start} no. {until} from {child}")
            have += sum(m.startswith(start) for m in child.messages[before:])
            if sum(m.startswith("COMMITTED") for m in child.messages) >= SAVES:
                return

    def _listen(self, child: Child, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0 and child._receive(left):
            pass

    def _violation(self, plan: Plan, problems: list[str], before: list[int], story: str) -> None:
        kept = self._examine / f"{self.name}-{self._n}"
        shutil.rmtree(kept, ignore_errors=True)
        if os.path.isdir(self.root):
            shutil.copytree(self.root, kept / "root", symlinks=True)
        kept.mkdir(parents=True, exist_ok=True)
        (kept / "said.txt").write_text("\n".join([f"{plan}", f"before: {before}", *problems, "", story]))
        found = {"seed": plan.seed, "plan": str(plan), "problems": problems[:10], "kept": str(kept)}
        self.tally.violations.append(found)
        print(f"VIOLATION {plan.seed}: {plan}\n  " + "\n  ".join(problems[:10]), flush=True)


def _kill_quietly(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def _alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def soak(
    directory: Path,
    kills: int,
    cuts: int,
    seed: int,
    roots: int = 4,
    at_once: int = AT_ONCE,
    progress: float = 30.0,
    nursery: Nursery | None = None,
) -> dict[str, Any]:
    """All faults; returns the figures."""
    directory = Path(os.path.realpath(directory))
    directory.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    with ExitStack() as stack:
        if nursery is None:
            nursery = Nursery("soak_trainer", str(_HERE))
            stack.callback(nursery.close)
        here = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="soak-", dir=directory)))
        examine = directory / "violations"
        lanes: list[tuple[Lane, int]] = []
        for kind in ("ext4", "xfs") if cuts else ():
            if reason := missing(kind):
                raise SystemExit(f"power cuts of {kind}: {reason}; use --cuts 0")
            place = here / kind
            place.mkdir()
            disk = stack.enter_context(PowerDisk(place, kind, megabytes=400))
            lanes.append((Lane(kind, os.path.join(disk.path, "root"), seed, nursery, examine, disk), -(-cuts // 2)))
        roots = min(roots, kills)
        for n in range(roots):
            lanes.append((Lane(f"root-{n}", str(here / f"root-{n}"), seed, nursery, examine), -(-kills // roots)))
        with ThreadPoolExecutor(at_once) as pool:
            running = [pool.submit(lane.run, faults) for lane, faults in lanes]
            last = begun
            while not all(future.done() for future in running):
                time.sleep(0.1)
                if time.monotonic() - last > progress:
                    last = time.monotonic()
                    done = sum(sum(lane.tally.faults.values()) for lane, _ in lanes)
                    wrong = sum(len(lane.tally.violations) for lane, _ in lanes)
                    print(f"{last - begun:6.0f} s  {done:5} faults  {wrong} violations", flush=True)
            for future in running:
                future.result()
        if left := nursery.left_alive(10.0):
            raise AssertionError(f"processes are left: {left}")
    faults: Counter[str] = Counter()
    saves: Counter[str] = Counter()
    for lane, _ in lanes:
        faults += lane.tally.faults
        saves += lane.tally.saves
    return {
        "seed": seed,
        "seconds": round(time.monotonic() - begun, 1),
        "roots": {lane.name: sum(lane.tally.faults.values()) for lane, _ in lanes},
        "faults": dict(sorted(faults.items())),
        "faults_in_all": sum(faults.values()),
        "saves": dict(saves),
        "violations": [violation for lane, _ in lanes for violation in lane.tally.violations],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=2000)
    parser.add_argument("--cuts", type=int, default=200, help="power cuts, half on ext4, half on xfs; they need root")
    parser.add_argument("--dir", type=Path, required=True, help="where the roots lie while it runs")
    parser.add_argument("--seed", type=int, default=None, help="default: another one every time; it is printed")
    parser.add_argument("--roots", type=int, default=4, help="roots that live through kills")
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    options = parser.parse_args()
    seed = random.SystemRandom().randrange(1 << 32) if options.seed is None else options.seed
    logging.getLogger("vembed_async_ckpt").setLevel(
        logging.ERROR
    )  # that it waits for an orphan is what we are here for
    print(f"seed {seed}", flush=True)
    figures = soak(options.dir, options.kills, options.cuts, seed, options.roots)
    for kind, count in figures["faults"].items():
        print(f"{count:6}  {kind}")
    print(f"{figures['faults_in_all']:6}  faults in {figures['seconds']} s, {len(figures['violations'])} violations")
    print("saves: " + ", ".join(f"{count} {what}" for what, count in figures["saves"].items()))
    if options.out:
        options.out.write_text(
            json.dumps({"machine": surroundings.facts(str(options.dir)), **figures}, indent=1) + "\n"
        )
    return 1 if figures["violations"] else 0


if __name__ == "__main__":
    sys.exit(main())
