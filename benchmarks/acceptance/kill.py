"""SIGKILL of a trainer right after `wait_staged`: the checkpoint appears, whole and right."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from vembed_async_ckpt import AsyncCheckpointer, latest, verify

from .common import WAIT, Say, Setting, build, change, differing, reference


def run(setting: Setting, say: Say) -> None:
    whole = []
    for turn in range(1 if setting.tiny else 2):
        root, expected = setting.directory / str(turn), setting.directory / f"expected{turn}.pt"
        command = [
            sys.executable,
            "-m",
            "acceptance.kill",
            setting.device,
            str(int(setting.tiny)),
            str(root),
            str(expected),
        ]
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert process.stdout is not None
        line = process.stdout.readline()
        process.kill()
        process.wait()
        path = latest(root)
        assert path is not None
        verify(path)
        wrong = differing(path, torch.load(expected), build(setting, "fused"))
        whole.append(line == b"staged\n" and path.name == "checkpoint-2" and not wrong)
        say(turns=whole, differs=wrong[:5])
    say(whole=all(whole))


def victim(device: str, tiny: str, root: str, expected: str) -> None:
    setting = Setting(device, bool(int(tiny)), float("inf"), Path(root))
    state = build(setting, "fused")
    checkpointer = AsyncCheckpointer(root)
    change(state, 1)
    checkpointer.save(1, model=state[0], optimizer=state[1]).result(WAIT)
    change(state, 2)
    torch.save({name: value.cpu() for name, value in reference(state).items()}, expected)
    setting.busy(30)
    handle = checkpointer.save(2, model=state[0], optimizer=state[1])
    change(state, 3)
    handle.wait_staged(WAIT)
    print("staged", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    victim(*sys.argv[1:])
