"""What `save()` costs the training thread, for several checkouts of the package side by side.

    python benchmarks/call_cost.py ../before .                 # each is a folder that holds vembed_async_ckpt/
    python benchmarks/call_cost.py . --weights 291 --elements 4096

Each checkout runs in a process of its own. The processes take turns of a few saves, so that all of them meet the same
neighbours on the machine. Before each save there is an optimizer step. Nothing is in flight when a save begins. Prints
microseconds of `save()`, the thread's CPU time and the wall clock, and the CPU time of the staging thread until the
save was durable.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

Samples = dict[str, list[float]]


def serve(weights: int, elements: int, staging: str) -> None:
    """Make as many saves as each line of standard input says, and answer with a line of JSON."""
    import torch

    from vembed_async_ckpt import AsyncCheckpointer

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = torch.nn.Module()
    for n in range(weights):
        model.register_parameter(f"w{n:04}", torch.nn.Parameter(torch.rand(elements)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    with (
        tempfile.TemporaryDirectory() as root,
        AsyncCheckpointer(root, staging=staging) as checkpointer,  # type: ignore[arg-type]
    ):
        step = 0
        staging_thread = _clock_of("vembed-ckpt-staging")
        for line in sys.stdin:
            samples: Samples = {"cpu": [], "wall": [], "staging": []}
            for _ in range(int(line)):
                optimizer.step()
                step += 1
                beside = time.clock_gettime(staging_thread)
                wall, cpu = time.perf_counter(), time.thread_time()
                handle = checkpointer.save(step % 4, model=model, optimizer=optimizer)
                samples["cpu"].append(time.thread_time() - cpu)
                samples["wall"].append(time.perf_counter() - wall)
                handle.result(60)
                samples["staging"].append(time.clock_gettime(staging_thread) - beside)
            print(json.dumps(samples), flush=True)


def _clock_of(name: str) -> int:
    return next(time.pthread_getcpuclockid(t.ident) for t in threading.enumerate() if t.name == name and t.ident)


def start(checkout: str, arguments: argparse.Namespace) -> subprocess.Popen[str]:
    command = [sys.executable, str(Path(__file__).resolve()), "--serve", "--weights", str(arguments.weights)]
    command += ["--elements", str(arguments.elements), "--staging", arguments.staging]
    environment = os.environ | {"PYTHONPATH": str(Path(checkout).resolve())}
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def ask(process: subprocess.Popen[str], saves: int) -> Samples:
    assert process.stdin is not None
    assert process.stdout is not None
    print(saves, file=process.stdin, flush=True)
    answer = process.stdout.readline()
    if not answer:
        raise SystemExit("a process ended; see above")
    return json.loads(answer)  # type: ignore[no-any-return]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkouts", nargs="*", default=["."])
    parser.add_argument(
        "--weights", type=int, default=133, help="parameters; AdamW adds two tensors and a step to each"
    )
    parser.add_argument("--elements", type=int, default=16384, help="float32 numbers in each of them")
    parser.add_argument("--saves", type=int, default=200, help="saves of each checkout")
    parser.add_argument("--turn", type=int, default=4, help="saves before the next checkout has its turn")
    parser.add_argument("--staging", choices=("overlap", "blocking"), default="overlap")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.weights, arguments.elements, arguments.staging)
        return
    processes = [start(checkout, arguments) for checkout in arguments.checkouts]
    try:
        for process in processes:
            ask(process, 10)
        samples: list[Samples] = [{} for _ in processes]
        for _ in range(arguments.saves // arguments.turn):
            for process, kept in zip(processes, samples, strict=True):
                for name, values in ask(process, arguments.turn).items():
                    kept.setdefault(name, []).extend(values)
        for checkout, kept in zip(arguments.checkouts, samples, strict=True):
            print(checkout)
            for name, values in kept.items():
                tenth = statistics.quantiles(values, n=10)[0]
                print(f"  {name:8} median {statistics.median(values) * 1e6:7.0f}   p10 {tenth * 1e6:7.0f}")
    finally:
        for process in processes:
            process.communicate(timeout=120)


if __name__ == "__main__":
    main()
