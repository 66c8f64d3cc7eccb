"""Stops trainings by signals at random moments, and checks what each leaves behind.

    python benchmarks/faults/stops.py plain --rounds 300                     a loop of one process
    python benchmarks/faults/stops.py plain --rounds 100 --drain staged      the trainer leaves, the writer goes on
    python benchmarks/faults/stops.py group --rounds 100                     the signal kills DataLoader workers too
    python benchmarks/faults/stops.py ranks --world 4 --rounds 60            ranks with an all_reduce in each step
    python benchmarks/faults/stops.py ranks --world 4 --rounds 60 --free     ranks that never wait for each other
    python benchmarks/faults/stops.py torchrun --world 2 --rounds 300        the signal goes to torchrun
    python benchmarks/faults/stops.py cost --world 4                         microseconds of should_stop and should_save
    python benchmarks/faults/stops.py pid1 --rounds 20                       process 1 of a pid namespace (needs root)

Every weight of the model is the number of steps made. A round is right if each process exits with 143 (torchrun itself
with 1), all ranks stopped after the same step, and the next round resumes from that step with those weights. Trainers
are forked from this process, which has imported torch; the workers of torchrun are started as usual.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any, NoReturn

import anyio._backends._asyncio  # noqa: F401  (so that no child has to)
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, IterableDataset

from vembed_async_ckpt import AsyncCheckpointer, KeepLast, latest, load
from vembed_async_ckpt._engine.agreement import Agreement
from vembed_async_ckpt.policies import budget, every, on_request

PATIENCE = 120.0
STEP = 0.003  # seconds of a step


class Counting(torch.nn.Module):
    """Two tensors whose elements are the number of steps made."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = torch.nn.ParameterList([torch.zeros(1 << 18) for _ in range(2)])

    def count(self) -> int:
        values = torch.cat(list(self.weights)).unique()
        assert values.numel() == 1, f"torn: {values}"
        return int(values.item())


def train(root: str, say: Callable[[str], None], *, drain: str, free: bool = False, late: float = 0.0) -> NoReturn:
    """Resume, train until told to stop, save, leave. Says RESUMED, READY and STOPPED with the step."""
    torch.set_num_threads(1)
    rank = dist.get_rank() if dist.is_initialized() else 0
    model = Counting()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    delay = _delay_agreement(late)
    with AsyncCheckpointer(root, retention=KeepLast(2)) as checkpointer:
        checkpointer.stop_on(signal.SIGTERM, drain=drain, grace=60.0)  # type: ignore[arg-type]
        found = latest(root)
        begun = 0 if found is None else load(found, model=model, optimizer=optimizer, verify="full").step or 0
        assert model.count() == begun
        say(f"RESUMED {begun}")
        if dist.is_initialized():
            dist.barrier()
        delay()
        say("READY")
        pace = random.Random(rank)
        for step in range(begun + 1, sys.maxsize):
            time.sleep(STEP * pace.uniform(0.5, 1.5))
            if dist.is_initialized() and not free:
                dist.all_reduce(torch.ones(1))
            for weight in model.parameters():
                weight.grad = -torch.ones_like(weight)
            optimizer.step()
            if checkpointer.should_stop(step):
                checkpointer.save(step, model=model, optimizer=optimizer)
                say(f"STOPPED {step} {time.monotonic_ns()}")
                break
            if step % 50 == 0:
                checkpointer.save(step, model=model, optimizer=optimizer)
    say(f"CLOSED {time.monotonic_ns()}")
    sys.exit(checkpointer.exit_code)


def train_with_workers(root: str, say: Callable[[str], None]) -> NoReturn:
    """As `train`, with batches from two DataLoader workers, which the signal kills too."""
    os.setpgid(0, 0)
    torch.set_num_threads(1)
    model = Counting()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with AsyncCheckpointer(root, retention=KeepLast(2)) as checkpointer:
        checkpointer.stop_on(signal.SIGTERM, grace=60.0)
        found = latest(root)
        step = 0 if found is None else load(found, model=model, optimizer=optimizer, verify="full").step or 0
        say(f"RESUMED {step}")
        batches = iter(DataLoader(_Endless(), batch_size=None, num_workers=2))
        next(batches)
        say("READY")
        stopping = False
        while not stopping:
            try:
                next(batches)
            except (RuntimeError, EOFError, OSError):  # a worker was killed: this is the end of a step
                if not checkpointer.exit_code:
                    raise
                stopping = True
            else:
                step += 1
                for weight in model.parameters():
                    weight.grad = -torch.ones_like(weight)
                    time.sleep(STEP / 2)
                optimizer.step()
                stopping = checkpointer.should_stop(step)
        checkpointer.save(step, model=model, optimizer=optimizer)
        say(f"STOPPED {step} {time.monotonic_ns()}")
    sys.exit(checkpointer.exit_code)


class _Endless(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        while True:
            time.sleep(STEP)
            yield 1


def _delay_agreement(seconds: float) -> Callable[[], None]:
    """Return a function that lets this rank's thread of the agreement not run for so long, once."""
    due: list[float] = []
    wait = Agreement._wait

    def late(agreement: Agreement, soon: bool) -> bool:
        while due:
            time.sleep(due.pop())
        return wait(agreement, soon)

    Agreement._wait = late  # type: ignore[method-assign]
    return lambda: due.append(seconds)


# -- the processes of a round


class Process:
    """A trainer that was forked or started. `said`: its messages."""

    def __init__(self, pid: int, read: int) -> None:
        self.pid = pid
        self.said: list[str] = []
        self._read = read
        self._rest = b""

    def listen(self, timeout: float) -> bool:
        """Take what it says next. Return False if it says nothing for `timeout` seconds or has ended."""
        if not select.select([self._read], [], [], timeout)[0]:
            return False
        data = os.read(self._read, 65536)
        *lines, self._rest = (self._rest + data).split(b"\n")
        self.said += [line.decode() for line in lines]
        return bool(data)

    def expect(self, word: str) -> None:
        deadline = time.monotonic() + PATIENCE
        while not any(line.split()[0] == word for line in self.said):
            if not self.listen(max(deadline - time.monotonic(), 0)):
                raise AssertionError(f"no {word}; it said {self.said}")

    def number(self, word: str) -> int | None:
        return next((int(line.split()[1]) for line in self.said if line.startswith(word)), None)

    def wait(self) -> int:
        """Return its exit code, negative for a signal."""
        poll = select.poll()
        pidfd = os.pidfd_open(self.pid)
        poll.register(pidfd, select.POLLIN)
        if not poll.poll(PATIENCE * 1000):
            os.kill(self.pid, signal.SIGKILL)
        os.close(pidfd)
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        while self.listen(0):
            pass
        os.close(self._read)
        return code


class InChild(Exception):
    """Raised in a forked child, to leave the frames of the parent: `job` is what it has to do."""

    def __init__(self, job: Callable[[], NoReturn]) -> None:
        self.job = job


def fork(job: Callable[[Callable[[str], None]], NoReturn]) -> Process:
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        raise InChild(lambda: job(lambda line: _say(write, line)))
    os.close(write)
    return Process(pid, read)


def _say(fd: int, line: str) -> None:
    os.write(fd, f"{line}\n".encode())


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def _rank(say: Callable[[str], None], rank: int, world: int, port: int, **options: Any) -> NoReturn:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    train(say=say, **options)


# -- rounds


def plain(arguments: argparse.Namespace, root: Path, chance: random.Random, result: Result) -> None:
    process = fork(lambda say: train(str(root), say, drain=arguments.drain))
    process.expect("READY")
    time.sleep(chance.uniform(0.0, 0.4))
    asked = time.monotonic()
    os.kill(process.pid, signal.SIGTERM)
    code = process.wait()
    result.round(root, [process], [code], time.monotonic() - asked)


def group(arguments: argparse.Namespace, root: Path, chance: random.Random, result: Result) -> None:
    process = fork(lambda say: train_with_workers(str(root), say))
    process.expect("READY")
    time.sleep(chance.uniform(0.0, 0.4))
    asked = time.monotonic()
    os.killpg(process.pid, signal.SIGTERM)
    code = process.wait()
    result.round(root, [process], [code], time.monotonic() - asked)


def ranks(arguments: argparse.Namespace, root: Path, chance: random.Random, result: Result) -> None:
    port = _free_port()
    processes = []
    for rank in range(arguments.world):
        late = arguments.late if rank == arguments.late_rank else 0.0
        options = {"root": str(root), "drain": arguments.drain, "free": arguments.free, "late": late}
        processes.append(fork(lambda say, r=rank, o=options: _rank(say, r, arguments.world, port, **o)))  # type: ignore[misc]
    for process in processes:
        process.expect("READY")
    time.sleep(chance.uniform(0.0, 0.4))
    told = range(arguments.world) if chance.random() < 0.3 else [chance.randrange(arguments.world)]
    asked = time.monotonic()
    dead = chance.choice(range(1, arguments.world)) if arguments.dead else None
    if dead is not None:
        os.kill(processes[dead].pid, signal.SIGKILL)
    for rank in told if dead is None else [chance.choice([r for r in range(arguments.world) if r != dead])]:
        os.kill(processes[rank].pid, signal.SIGTERM)
    codes = [process.wait() for process in processes]
    took = time.monotonic() - asked
    if dead is not None:
        assert codes.pop(dead) == -signal.SIGKILL
        processes.pop(dead)
    result.round(root, processes, codes, took)


def torchrun(arguments: argparse.Namespace, root: Path, chance: random.Random, result: Result) -> None:
    """The workers get no descriptors from torchrun, so each writes into a named pipe."""
    processes = [Process(0, _named_pipe(root, rank)) for rank in range(arguments.world)]
    options = ["--nproc-per-node", str(arguments.world), "--master-port", str(_free_port())]
    agent = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *options, *_worker(arguments, root)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    for process in processes:
        process.expect("READY")
    time.sleep(chance.uniform(0.0, 0.4))
    asked = time.monotonic()
    agent.send_signal(signal.SIGTERM)
    code = agent.wait(PATIENCE)
    for process in processes:
        while process.listen(0):
            pass
        os.close(process._read)
    result.round(root, processes, [143 if code == 1 else code], time.monotonic() - asked)


def pid1(arguments: argparse.Namespace, root: Path, chance: random.Random, result: Result) -> None:
    process = Process(0, _named_pipe(root, 0))
    outer = subprocess.Popen(
        ["unshare", "--pid", "--fork", "--mount-proc", sys.executable, *_worker(arguments, root)],
        stderr=subprocess.DEVNULL,
    )
    process.expect("READY")
    time.sleep(chance.uniform(0.0, 0.4))
    with open(f"/proc/{outer.pid}/task/{outer.pid}/children") as file:
        inner = int(file.read().split()[0])
    asked = time.monotonic()
    os.kill(inner, signal.SIGTERM)
    code = outer.wait(PATIENCE)
    while process.listen(0):
        pass
    os.close(process._read)
    result.round(root, [process], [code], time.monotonic() - asked)


def _worker(arguments: argparse.Namespace, root: Path) -> list[str]:
    return [__file__, "worker", "--root", str(root), "--drain", arguments.drain]


def _named_pipe(root: Path, rank: int) -> int:
    """Open the named pipe of a rank for reading; it is made anew, as an earlier round may have left something in it."""
    path = root.parent / f"pipe-{rank}"
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    return os.open(path, os.O_RDWR)


def cost(arguments: argparse.Namespace, root: Path) -> dict[str, Any]:
    """What the first rank's questions take, in microseconds, while the threads of all ranks look into the store."""
    port = _free_port()
    processes = [
        fork(lambda say, r=rank: _measure(say, str(root), r, arguments.world, port))  # type: ignore[misc]
        for rank in range(arguments.world)
    ]
    processes[0].expect("COST")
    for process in processes:
        process.wait()
    return json.loads(processes[0].said[0].partition(" ")[2])  # type: ignore[no-any-return]


def _measure(say: Callable[[str], None], root: str, rank: int, world: int, port: int) -> NoReturn:
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    policy = every(minutes=1000) | every(steps=10**9) | budget(percent=0.001) | on_request(None)
    found = {}
    with AsyncCheckpointer(root, policy=policy) as checkpointer:
        checkpointer.stop_on(signal.SIGTERM)
        time.sleep(1.0)
        for name in ("should_stop", "should_save"):
            ask = getattr(checkpointer, name)
            took = []
            for step in range(1, 20_001 if rank == 0 else 2):
                begun = time.perf_counter_ns()
                ask(step)
                took.append(time.perf_counter_ns() - begun)
            took.sort()
            found[name] = {"median": took[len(took) // 2] / 1000, "p99": took[int(len(took) * 0.99)] / 1000}
        if world > 1:
            dist.barrier()
    say(f"COST {json.dumps(found)}")
    sys.exit(0)


class Result:
    def __init__(self, arguments: argparse.Namespace) -> None:
        self._staged = arguments.drain == "staged"
        self.rounds = 0
        self.wrong: list[str] = []
        self.seconds: list[float] = []
        self._answered = 0

    def round(self, root: Path, processes: list[Process], codes: list[int], seconds: float) -> None:
        self.rounds += 1
        self.seconds.append(seconds)
        stopped = {process.number("STOPPED") for process in processes}
        resumed = {process.number("RESUMED") for process in processes}
        problems = []
        if set(codes) != {143}:
            problems.append(f"exit codes {codes}")
        if len(stopped) != 1 or None in stopped:
            problems.append(f"stopped after {stopped}")
        if resumed != {self._answered}:
            problems.append(f"resumed from {resumed} instead of {self._answered}")
        if self._staged:
            wait_for_writer(root)
        newest = latest(root, verify="full")
        self._answered = next(iter(stopped)) or 0
        if newest is None or newest.name != f"checkpoint-{self._answered}":
            problems.append(f"the newest checkpoint is {newest}, stopped after {stopped}")
            self._answered = 0 if newest is None else int(newest.name.rpartition("-")[2])
        if problems:
            self.wrong.append(f"round {self.rounds}: {'; '.join(problems)}")

    def report(self) -> dict[str, Any]:
        ordered = sorted(self.seconds)
        return {
            "rounds": self.rounds,
            "right": self.rounds - len(self.wrong),
            "wrong": self.wrong,
            "seconds_to_end": {"median": round(median(ordered), 3), "most": round(ordered[-1], 3)},
        }


def wait_for_writer(root: Path) -> None:
    from vembed_async_ckpt._disk.lock import wait_for_orphan

    wait_for_orphan(str(root))


def worker(arguments: argparse.Namespace) -> NoReturn:
    """A process of torchrun or of a pid namespace."""
    torch.set_num_threads(1)
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    fd = os.open(Path(arguments.root).parent / f"pipe-{os.environ.get('RANK', 0)}", os.O_WRONLY)
    train(arguments.root, lambda line: _say(fd, line), drain=arguments.drain)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("kind", choices=["plain", "group", "ranks", "torchrun", "pid1", "cost", "worker"])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--world", type=int, default=2)
    parser.add_argument("--drain", default="committed")
    parser.add_argument("--free", action="store_true", help="no collective between the ranks")
    parser.add_argument("--late", type=float, default=0.0, help="seconds for which the thread of a rank does not run")
    parser.add_argument("--late-rank", type=int, default=0)
    parser.add_argument("--dead", action="store_true", help="kill one of the ranks just before (with --free)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--root", default="")
    arguments = parser.parse_args()
    logging.getLogger("vembed_async_ckpt").setLevel(logging.ERROR)
    if arguments.kind == "worker":
        worker(arguments)
    chance = random.Random(arguments.seed)
    result = Result(arguments)
    directory = Path(tempfile.mkdtemp())
    play = {"plain": plain, "group": group, "ranks": ranks, "torchrun": torchrun, "pid1": pid1}
    try:
        if arguments.kind == "cost":
            found = cost(arguments, directory / "root")
        else:
            for _ in range(arguments.rounds):
                play[arguments.kind](arguments, directory / "root", chance, result)
            found = result.report()
    except InChild as child:
        job = child.job
    else:
        shutil.rmtree(directory)
        print(json.dumps(found))
        sys.exit(bool(result.wrong))
    job()


if __name__ == "__main__":
    main()
